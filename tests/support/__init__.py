"""What the tests share: a tiny run, its processes, models written a second time, made-up results."""
