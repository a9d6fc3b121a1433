"""Where the time of a training step goes: the program's own loop, its functions timed from outside.

`train_gpt.train` is called as it is. What is not training is left out: the warm-up, the forecast and the
final validation. Every moment from one tick of the clock to the next belongs to exactly one part.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from unittest.mock import patch

import torch
import torch.distributed as dist

import train_gpt

LOOP = "clock_and_logs"  # of the loop, all that is not in another part
PARTS = "data", "forward", "backward", "optimiser", "communication", "rest_of_step", LOOP
TENSORS = "all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather", "broadcast"
COLLECTIVES = (*TENSORS, "all_gather_object", "broadcast_object_list", "barrier")


class Waited:
    """The handle of a collective under way; waiting for it counts as communication."""

    def __init__(self, work, timers: Timers):
        self.work, self.wait = work, timers.timed("communication", work.wait)

    def __getattr__(self, name: str):
        return getattr(self.work, name)


class Timers:
    """Seconds of each part, step by step. A part within another counts as the inner one alone."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None):
        self.synchronize, self.owner = synchronize, threading.get_ident()
        self.stack, self.now, self.steps = [LOOP], 0.0, []
        self.current: Counter | None = None  # of the step under way; None before the first

    def charge(self) -> None:
        """What has passed since the last call goes to the innermost part."""
        self.synchronize()
        before, self.now = self.now, time.perf_counter()
        if self.current is not None:
            self.current[self.stack[-1]] += self.now - before

    def lap(self) -> None:
        """A step ends here and the next begins."""
        self.charge()
        if self.current is not None:
            self.steps.append(self.current)
        self.current = Counter()

    def timed(self, part: str, fn: Callable) -> Callable:
        """fn, with its time charged to a part; another thread's calls pass unseen."""

        def run(*args, **kwargs):
            if threading.get_ident() != self.owner:
                return fn(*args, **kwargs)
            self.charge()
            self.stack.append(part)
            try:
                result = fn(*args, **kwargs)
            finally:
                self.charge()
                self.stack.pop()
            return Waited(result, self) if part == "communication" and hasattr(result, "wait") else result

        return run

    def items(self, make: Callable[..., Iterator]) -> Callable[..., Iterator]:
        """A maker of iterators whose every item is waited for as `data`."""

        def run(*args):
            inner = make(*args)
            step = self.timed("data", lambda: next(inner))
            with contextlib.closing(inner):
                while True:
                    yield step()

        return run


@contextmanager
def observed(run: train_gpt.Run, timers: Timers, steps: int, limit: int, split: bool) -> Iterator[None]:
    """The program with its clock's ticks as laps and its end after `steps`; split: its parts timed too."""
    tick, timed = train_gpt.Clock.tick, timers.timed

    def lap(clock, *rest) -> float:
        timers.lap()
        return tick(clock, *rest)

    changes = [
        (train_gpt.Clock, "tick", lap),
        (train_gpt, "is_finished", lambda cfg, step, *_: step >= steps),
        (train_gpt, "warm_up", lambda *_: (limit, [0.0])),
        (train_gpt, "forecast", lambda *_: None),
        (train_gpt, "validate", lambda *_: None),
    ]
    if split:
        changes += [
            (train_gpt, "prefetch", timers.items(train_gpt.prefetch)),
            (train_gpt, "train_step", timed("rest_of_step", train_gpt.train_step)),
            (train_gpt.Optimisers, "step", timed_method("optimiser", train_gpt.Optimisers.step, timers)),
            (torch.autograd, "backward", timed("backward", torch.autograd.backward)),
            (run, "loss", timed("forward", run.loss)),
            *((dist, name, timed("communication", getattr(dist, name))) for name in COLLECTIVES),
        ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield


def timed_method(part: str, method: Callable, timers: Timers) -> Callable:
    """A plain function again, so that it binds to its object."""
    timed = timers.timed(part, method)
    return lambda self, *args, **kwargs: timed(self, *args, **kwargs)


def train_block(run, optimisers, stream, limit: int, steps: int, split: bool) -> list[Counter]:
    """Train so many steps from the first batch on; the seconds of each step by part, all in LOOP unless
    split. On CUDA a split waits for the device at every border, so its steps are slower than they are."""
    timers = Timers(run.runtime.synchronize if split else lambda: None)
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        observed(run, timers, steps, limit, split),
    ):
        train_gpt.train(run, optimisers, stream)
    return timers.steps
