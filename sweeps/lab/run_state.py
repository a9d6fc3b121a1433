"""How far a run of a wave came, and what its result is worth."""

from enum import Enum


class RunState(str, Enum):
    """The state in a run's row. It is a plain word in the JSON lines, and equal to that word here.

    They stand in the order in which counts are told.
    """

    PLANNED = "planned"
    RUNNING = "running"
    OK = "ok"  # finished well; the only state whose score may be ranked
    CRASHED = "crashed"
    UNTRAINED = "untrained"  # its score is that of a model that has learnt nothing
    TRUNCATED = "truncated"  # its schedule was cut short
    DIVERGED = "diverged"
    OVER_SIZE = "over_size"
    DUPLICATE = "duplicate"  # the same experiment as another arm's, so it is not run
    PREEMPTED = "preempted"  # stopped from outside; the same command goes on with it
    KILLED_EARLY = "killed_early"  # it was too far behind its control

    __str__ = str.__str__  # the bare word in texts, on every Python
    __format__ = str.__format__


# Runs in these states are waiting for an engine or are under way; all others are done with, for good or bad.
UNFINISHED = (RunState.PLANNED, RunState.RUNNING, RunState.PREEMPTED)
FINISHED = tuple(state for state in RunState if state not in UNFINISHED)
