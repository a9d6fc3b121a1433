"""The tests; `support` holds what they share, `bench` what is measured and not tested."""
