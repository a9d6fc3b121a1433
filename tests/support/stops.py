"""Runs that are stopped: where one is started again and again, and what makes it stop at a place."""

import json
from pathlib import Path
from signal import SIGKILL

from tests.conftest import env_of
from tests.support.forkserver import ForkServer, left_behind

STEPS = 8
BASE = dict(
    iterations=STEPS, train_log_every=1, warmdown_iters=3, run_id="r", num_layers=1, train_batch_tokens=256,
    val_batch_size=4096,
)  # fmt: skip

# Sends a signal before or after the CALL-th call of one of the script's functions.
DIES = """
def arm(path, number, call, after, only):
    *owners, name = path.split(".")
    owner, calls = train_gpt, [0]
    for step in owners:
        owner = getattr(owner, step)
    inside = getattr(owner, name)
    def armed(*given, **named):
        calls[0] += 1
        if calls[0] == call and not after:
            die(number)
        made = inside(*given, **named)
        if calls[0] == call and after:
            die(number)
        return made
    if only is None or rank == only:
        setattr(owner, name, armed)
arm({path!r}, {number}, {call}, {after}, {only})
"""

# The same in the step that follows on STEP others; those of the warm-up do not count.
DIES_IN_STEP = """
def arm(step, number, only):
    inside = train_gpt.train_step
    def armed(run, optimisers, batch, plan, limit):
        if run.runtime.defers_stop and plan.step == step:
            die(number)
        return inside(run, optimisers, batch, plan, limit)
    if only is None or rank == only:
        train_gpt.train_step = armed
arm({step}, {number}, {only})
"""

# Each look at the clock takes 10 ms more, however busy the machine is; a process starts at {start} of them.
STEADY = """
import itertools, time, types
looks = itertools.count({start})
train_gpt.time = types.SimpleNamespace(**vars(time) | dict(perf_counter=lambda: next(looks) * 0.01))
"""

# Appends a line to the file `calls` for each call of a function by rank 0.
COUNTS = """
def count(name):
    inside = getattr(train_gpt, name)
    def counted(*given, **named):
        with open("calls", "a") as file:
            print(name, file=file)
        return inside(*given, **named)
    if rank == 0:
        setattr(train_gpt, name, counted)
for name in {names!r}.split():
    count(name)
"""


def dies(path: str, number: int = SIGKILL, call: int = 1, after: bool = False, only=None) -> str:
    return DIES.format(path=path, number=int(number), call=call, after=after, only=only)


def in_step(step: int, number: int, only=None) -> str:
    return DIES_IN_STEP.format(step=step, number=int(number), only=only)


def steady(start: int = 0) -> str:
    return STEADY.format(start=start)


class Folder:
    """Where one run is started again and again."""

    def __init__(self, path: Path, server: ForkServer, dataset: Path, knobs: dict, ranks: int = 1):
        self.path, self.server, self.dataset, self.ranks = path, server, dataset, ranks
        self.knobs = BASE | knobs
        path.mkdir(exist_ok=True)

    def start(self, patch: str = "", ranks=None, data=None, kill=None, **knobs) -> list[int]:
        """Exit codes of one start, by rank."""
        env = env_of(data or self.dataset, **self.knobs | knobs)
        return self.server.run(self.path, env, ranks or self.ranks, patch, kill)

    def resume(self, patch: str = "", **how) -> list[int]:
        return self.start(patch, resume="auto", **how)

    def text(self, name: str) -> str:
        return (self.path / name).read_text()

    def error(self, rank: int = 0) -> str:
        """The error line of a rank's stderr; the command that goes on may follow, and no more."""
        text = self.text(f"{rank}.err")
        line, *more = text.splitlines(keepends=True)
        assert line.startswith("error: ") and len(more) <= 1, text
        assert all("RESUME=auto RUN_ID=" in command for command in more), text
        return line

    def command(self) -> str:
        """The last line of rank 0's stderr: what goes on."""
        return self.text("0.err").splitlines()[-1]

    def events(self, kind: str) -> list[dict]:
        events = map(json.loads, self.text("logs/r.jsonl").splitlines())
        return [event for event in events if event["event"] == kind]

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events("step")]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.path.glob("checkpoints/*"))

    def result(self) -> dict:
        return json.loads(self.text("logs/r.txt").splitlines()[-1].removeprefix("RESULT "))

    def left(self) -> dict:
        return left_behind(self.path, "r")
