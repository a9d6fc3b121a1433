"""The Python of the lab: waves of runs, what they measured, and what may be concluded from that."""
