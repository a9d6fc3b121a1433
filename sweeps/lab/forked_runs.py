"""Runs of train_gpt.py as forks of one process that has made their imports: three seconds of each are saved.

A proxy run on a CPU trains for twenty seconds, and its imports (torch, torch._dynamo, numpy) would take a
seventh of that again. The helper, which `Nursery` starts and talks to, computes nothing on one thread, so
that a fork of it is as good as a new process. A forked run leads a session of its own, holds its lock and
outlives helper and engine like any run. Not for GPUs: CUDA must not be forked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

from sweeps.lab.paths import ROOT

# What an eager run on a CPU imports; torch imports its compiler for deterministic kernels and for Adam.
PRELOADED = ("numpy", "sentencepiece", "zstandard", "torch", "torch._dynamo", "torch._inductor.config")
LONGEST_ORDER = 2**20  # bytes
STREAMS = 3  # file descriptors of an order: stdout, stderr and the lock


def can_fork(command: tuple[str, ...]) -> bool:
    """Whether that is a plain run of a script by this Python, on a system whose torch survives a fork."""
    return sys.platform == "linux" and len(command) == 2 and command[0] == sys.executable


class Nursery:
    """The engine's side: a helper for runs of one environment of threads."""

    def __init__(self, threads: int):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = ours
        self.turn = threading.Lock()  # of asking: the helper answers one at a time
        # Not as a script: sweeps/lab/statistics.py would hide the standard library's from torch.
        find_us = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
        code = f"{find_us}; from sweeps.lab.forked_runs import main; main({theirs.fileno()}, {PRELOADED})"
        self.helper = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | dict(OMP_NUM_THREADS=str(threads)),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # a Ctrl-C is the engine's business
        )
        theirs.close()

    def ask(self, order: dict, descriptors: tuple[int, ...] = ()) -> int | None:
        """The helper's answer. OSError if it is gone."""
        with self.turn:
            socket.send_fds(self.socket, [json.dumps(order).encode()], list(descriptors))
            answer = self.socket.recv(LONGEST_ORDER)
        if not answer:
            raise BrokenPipeError("the helper that forks the runs is gone")
        return json.loads(answer)

    def start(self, command: tuple[str, ...], env: Mapping[str, str], descriptors: tuple[int, ...]) -> Child:
        """Fork a run of this command in this environment; descriptors: its stdout, stderr and lock."""
        order = dict(command=command, env=dict(env), folder=os.getcwd())
        return Child(self, self.ask(order, descriptors))

    def has_died(self) -> bool:
        """Whether the helper is gone."""
        return self.helper.poll() is not None

    def close(self) -> None:
        """Let the helper go; runs go on."""
        self.socket.close()
        self.helper.wait()


class Child:
    """A forked run: what run_process.Process needs of a subprocess.Popen."""

    def __init__(self, nursery: Nursery, pid: int):
        self.nursery = nursery
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, -N after signal N, or None while it runs. Its group ends with it.

        Without the helper nobody can know the code: 1 as soon as the process is gone.
        """
        if self.returncode is None:
            try:
                self.returncode = self.nursery.ask(dict(ended=self.pid))
            except OSError:
                if not Path(f"/proc/{self.pid}").exists():
                    self.returncode = 1
        return self.returncode


def serve(orders: socket.socket) -> dict | None:
    """The helper: do what it is told until the engine is gone, then None; in each fork, the order of its run.

    The forks return from here, so that they have no caller but the interpreter.
    """
    while True:
        text, descriptors, _, _ = socket.recv_fds(orders, LONGEST_ORDER, STREAMS)
        if not text:
            return None
        order = json.loads(text)
        if "ended" in order:
            answer = end_of(order["ended"])
        else:
            read_end, write_end = os.pipe()
            answer = os.fork()
            if answer == 0:
                os.setsid()
                for descriptor in (read_end, write_end, orders.detach()):
                    os.close(descriptor)
                return order | dict(descriptors=descriptors)
            os.close(write_end)
            os.read(read_end, 1)  # until the fork leads a group, or signals would not reach it
            os.close(read_end)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(json.dumps(answer).encode())


def end_of(pid: int) -> int | None:
    """The exit code of a fork, or None while it runs; what is left of its group is killed before the number
    is free for another process."""
    if not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def become(order: dict) -> None:
    """In a fork: be the run, as if it had been started by itself."""
    stdout, stderr, _ = order["descriptors"]  # the lock just stays open
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["env"])
    script = order["command"][1]
    sys.argv = [script]
    sys.path[:2] = [str(Path(script).resolve().parent)]  # not ROOT and the current folder, see Nursery
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:  # as the interpreter would, but without the lines of this file
        traceback.print_exc()
        sys.exit(1)


def main(descriptor: int, modules: tuple[str, ...]) -> None:
    """The helper, given the number of its socket and what it imports."""
    orders = socket.socket(fileno=descriptor)
    for module in modules:
        with contextlib.suppress(ImportError):  # the run says what is missing
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that no collection in a fork copies these pages
    order = serve(orders)
    if order:
        become(order)
