"""One training as a process group that outlives whoever started it, and is found again.

A run holds the lock on OUT_DIR/run.lock for as long as it lives, because it inherits the open file: no list
of process numbers can say so without doubt. Another engine that meets the lock waits for that run and reads
what it wrote; nothing is trained twice at once. Where a file system has no locks, the run's number in that
file has to do; it says nothing of a run on another machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from data.file_locks import lock
from sweeps.lab.forked_runs import Child, Nursery


@dataclass(frozen=True)
class Spec:
    """What to run: the command, what it sets in the environment, what it hides there, its cores or none."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    out_dir: str
    hidden: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


class Process:
    """A run that this process started."""

    def __init__(self, child: subprocess.Popen | Child):
        self.child = child

    def poll(self) -> int | None:
        """The exit code, or None while it runs. What is left of its group ends with it."""
        if self.child.returncode is None and hasattr(os, "waitid"):
            with contextlib.suppress(ChildProcessError):
                if not os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return None
                self.signal(signal.SIGKILL)  # not reaped yet, so the number is still its own
        return self.child.poll()

    def signal(self, number: int) -> None:
        if self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, number)


class Orphan:
    """A run whose engine is gone; known by its lock. It is waited for: what it does is not lost."""

    def __init__(self, out_dir: Path):
        self.path = out_dir / "run.lock"

    def poll(self) -> int | None:
        """None while it runs, then 1: how it ended stands in its log, if it got that far."""
        return None if is_alive(self.path.parent) else 1

    def signal(self, number: int) -> None:
        text = self.path.read_text()
        if text.isdigit() and self.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(text), number)


def is_alive(out_dir: Path) -> bool:
    """Whether a run is writing there now: its lock says so, or its number where there are no locks."""
    path = out_dir / "run.lock"
    if not path.exists():
        return False
    with path.open("a+") as file:
        try:
            if lock(file, wait=False):
                return False
        except BlockingIOError:
            return True
        file.seek(0)
        return leads_a_group(file.read())


def leads_a_group(text: str) -> bool:
    """Whether that is the number of a process here that leads a process group, as every run does."""
    try:
        return os.getpgid(int(text)) == int(text)
    except (ValueError, ProcessLookupError, PermissionError):
        return False


def running_on(spec: Spec) -> str | None:
    """The GPU that a run which is alive there has, "" on a CPU; None if there is no such run."""
    out = Path(spec.out_dir)
    if not is_alive(out):
        return None
    return json.loads((out / "run.json").read_text())["env"].get("CUDA_VISIBLE_DEVICES", "")


def start(spec: Spec, nursery: Nursery | None = None) -> Process | Orphan:
    """Start the run in a session of its own, as a fork of the nursery's if there is one; or take over the run
    that is alive there."""
    out = Path(spec.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if is_alive(out):
        return Orphan(out)
    with (out / "run.lock").open("a+") as own_lock:
        try:
            lock(own_lock, wait=False)
        except BlockingIOError:  # another engine was faster
            return Orphan(out)
        return Process(start_group(spec, out, own_lock, nursery))


def start_group(spec: Spec, out: Path, own_lock: TextIO, nursery: Nursery | None) -> subprocess.Popen | Child:
    """Start the run as a process group of its own that inherits the lock; its number is written there."""
    temporary = out / ".run.json.tmp"
    temporary.write_text(json.dumps(asdict(spec), indent=1) + "\n")
    temporary.replace(out / "run.json")
    own_lock.truncate(0)
    kept = {name: value for name, value in os.environ.items() if name not in spec.hidden}
    env = kept | dict(spec.env)
    with (out / "stdout.txt").open("ab") as stdout, (out / "stderr.txt").open("wb") as stderr:
        if nursery:
            child = nursery.start(spec.command, env, (stdout.fileno(), stderr.fileno(), own_lock.fileno()))
        else:
            child = subprocess.Popen(
                spec.command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                pass_fds=(own_lock.fileno(),),
            )
    own_lock.write(str(child.pid))
    own_lock.flush()
    if spec.cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(child.pid, spec.cores)
    return child


def share_cores(jobs: int, threads: int) -> list[tuple[int, ...]]:
    """Cores for each of `jobs` runs at once; none where a run has one thread, which the system places best,
    or where there are too few."""
    if not hasattr(os, "sched_getaffinity"):
        return [()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if threads < 2 or jobs * threads > len(cores):
        return [()] * jobs
    return [tuple(cores[i * threads : (i + 1) * threads]) for i in range(jobs)]


def core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
