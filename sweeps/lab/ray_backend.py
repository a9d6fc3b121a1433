"""The runs of a wave as Ray tasks, on all machines of a cluster: bash sweeps/WAVE.sh --engine ray

Ray is optional: pip install ray==2.60.0 on every machine, then `ray start --head` on one and
`ray start --address=HEAD:6379` on the others, and RAY_ADDRESS=HEAD:6379 for the wave. The project and --out
must be in folders that all machines share, at the same paths. A run asks for one GPU, or on a cluster without
GPUs for its CPU threads. The rows are written where the wave was started. A run whose machine dies goes on
from its last checkpoint on another one.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from data import file_locks
from data.user_error import UserError
from sweeps.lab import run_process as process

try:
    import ray
except ImportError:  # said by `connect`, when it is wanted
    ray = None

STOP, NODES = "stop", "nodes.txt"
RETRIES, LOOK, REFRESH = 5, 0.2, 2.0  # of a task whose machine died; seconds between looks


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or make one of this machine."""
    if ray is None:
        raise UserError("--engine ray wants Ray, which is optional: pip install ray==2.60.0")
    if ray.is_initialized():
        return
    try:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {os.environ.get('RAY_ADDRESS', 'hand')}: {error}") from None
    for module in (file_locks, process, sys.modules[__name__]):  # so that a worker needs no path to them
        ray.cloudpickle.register_pickle_by_value(module)


def cluster_gpus() -> int:
    connect()
    return int(ray.cluster_resources().get("GPU", 0))


def run_here(spec: process.Spec, threads: int) -> int:
    """In a worker: start the run, or wait for the one that is alive; the exit code. Signals come as a file,
    since the folder is shared and a task has no process group to send them to."""
    out = Path(spec.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with (out / NODES).open("a") as file:
        print(
            f"{time.time():.3f} {socket.gethostname()} {ray.get_runtime_context().get_node_id()}", file=file
        )
    env = dict(spec.env) | dict(OMP_NUM_THREADS=str(threads))
    handle, sent = process.start(replace(spec, env=env, command=(sys.executable, *spec.command[1:]))), set()
    while (code := handle.poll()) is None:
        asked = (out / STOP).read_text().split() if (out / STOP).exists() else []
        for number in (int(word) for word in asked if word not in sent):
            handle.signal(number)
        sent |= set(asked)
        time.sleep(LOOK)
    return code


class Task:
    """A run in the cluster: waiting for a place, or running somewhere."""

    def __init__(self, ref, out: Path, before: int):
        self.ref, self.out, self.before = ref, out, before

    def poll(self) -> int | None:
        if not ray.wait([self.ref], timeout=0)[0]:
            return None
        try:
            return ray.get(self.ref)
        except ray.exceptions.RayError as error:  # its machine died too often, or the task was cancelled
            lines = str(error).strip().splitlines() or [type(error).__name__]
            (self.out / "stderr.txt").write_text(f"{lines[0]}\n")
            return 1

    def signal(self, number: int) -> None:
        """Leave word for the worker; a task that still waits for a place is dropped."""
        if starts(self.out) == self.before:
            ray.cancel(self.ref)
        with (self.out / STOP).open("a") as file:
            print(int(number), file=file)

    def moves(self) -> int:
        """How often Ray started it again by itself."""
        return max(0, starts(self.out) - self.before - 1)


def starts(out: Path) -> int:
    """How often the run was started on any machine."""
    path = out / NODES
    return len(path.read_text().splitlines()) if path.exists() else 0


class RayBackend:
    """Places in a cluster, as many as it has at the moment."""

    def __init__(self, on_gpus: bool, jobs: int | None, threads: int):
        self.needs = dict(num_gpus=1, num_cpus=1) if on_gpus else dict(num_gpus=0, num_cpus=threads)
        self.jobs, self.threads, self.busy, self.looked, self.places = jobs, threads, 0, 0.0, 1
        connect()
        self.task = ray.remote(max_retries=RETRIES, **self.needs)(run_here)

    def width(self) -> int:
        """Runs at once; machines may come and go."""
        if time.time() > self.looked + REFRESH:
            there, self.looked = ray.cluster_resources(), time.time()
            kind, each = ("GPU", 1) if self.needs["num_gpus"] else ("CPU", self.threads)
            self.places = max(1, int(there.get(kind, 0) // each))
        return min(self.places, self.jobs or self.places)

    def room(self) -> bool:
        return self.busy < self.width()

    def start(self, spec: process.Spec) -> Task:
        out = Path(spec.out_dir)
        out.mkdir(parents=True, exist_ok=True)
        (out / STOP).unlink(missing_ok=True)
        self.busy += 1
        before = starts(out)
        return Task(self.task.remote(spec, self.threads), out, before)

    def give_back(self, _task: Task) -> None:
        self.busy -= 1

    def close(self) -> None:
        ray.shutdown()
