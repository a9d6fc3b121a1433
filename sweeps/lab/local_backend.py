"""The runs of a wave on this machine: one GPU each, or a share of the cores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sweeps.lab.forked_runs import Nursery, can_fork
from sweeps.lab.run_process import Orphan, Process, Spec, running_on, share_cores, start


@dataclass(frozen=True, eq=False)
class Slot:
    """Room for one run: its GPU, if there are any, and the cores that it is held to."""

    gpu: str | None
    cores: tuple[int, ...]


class LocalBackend:
    """Starts runs as long as there are free slots; one that is alive may be taken over without a slot.

    forks: runs on a CPU are forks of a helper that has their imports.
    """

    def __init__(self, gpus: list[str], jobs: int, threads: int, forks: bool = False):
        self.threads = threads
        self.forks = forks and not gpus
        self.nursery: Nursery | None = None
        self.slots: list[Slot] = []
        cores_by_job = [()] * jobs if gpus else share_cores(jobs, threads)
        for job in range(jobs):
            gpu = gpus[job % len(gpus)] if gpus else None
            self.slots.append(Slot(gpu, cores_by_job[job]))
        self.free_slots = list(self.slots)

    def start(self, spec: Spec) -> Process | Orphan:
        """A handle with poll() and signal(); its slot is free again after give_back.

        A run that is alive already keeps the GPU it has, and counts even where there is no room.
        """
        current_gpu = running_on(spec)
        slot = None
        for candidate in self.free_slots:
            if current_gpu is None or candidate.gpu in (None, current_gpu):
                slot = candidate
                break
        env = dict(spec.env) | {"OMP_NUM_THREADS": str(self.threads)}
        gpu = slot.gpu if slot else current_gpu
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        if slot:
            self.free_slots.remove(slot)
        if self.nursery and self.nursery.has_died():
            self.nursery = None
        if self.forks and not self.nursery and can_fork(spec.command):
            self.nursery = Nursery(self.threads)
        handle = start(replace(spec, env=env, cores=slot.cores if slot else ()), self.nursery)
        handle.slot = slot
        return handle

    def room(self) -> bool:
        return bool(self.free_slots)

    def width(self) -> int:
        """Runs at once."""
        return len(self.slots)

    def give_back(self, handle: Process | Orphan) -> None:
        if handle.slot:
            self.free_slots.append(handle.slot)

    def close(self) -> None:
        """Let go of all but the runs."""
        if self.nursery:
            self.nursery.close()
