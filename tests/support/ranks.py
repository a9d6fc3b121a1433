"""Several ranks in the threads of one process, so that a test can score a text on them in milliseconds."""

import threading
from collections.abc import Callable
from copy import deepcopy

import torch

from train_gpt import Run, RunLog, Runtime


class Meeting:
    """Where the ranks exchange values: all wait until all are there, twice."""

    def __init__(self, ranks: int):
        self.barrier = threading.Barrier(ranks, timeout=120)
        self.values = [None] * ranks

    def exchange(self, rank: int, value) -> list:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class RankInThread(Runtime):
    """One rank of several; what it sends and receives goes through the meeting."""

    def __init__(self, meeting: Meeting, rank: int):
        super().__init__(rank=rank, world_size=len(meeting.values))
        self.meeting = meeting

    def sum(self, tensor):
        total = torch.stack(self.meeting.exchange(self.rank, tensor.clone())).sum(0)
        return tensor.copy_(total)

    def gather(self, value):
        return self.meeting.exchange(self.rank, value)

    def main_decides(self, decide):
        return self.meeting.exchange(self.rank, self.on_main(decide))[0]


def on_ranks(ranks: int, run: Run, act: Callable[[Run], object]) -> list:
    """What `act` gives on each rank, by rank; each has a copy of the model. The first error is raised."""
    meeting = Meeting(ranks)
    results = [None] * ranks
    errors = []

    def work(rank: int) -> None:
        own = Run(run.cfg, RankInThread(meeting, rank), RunLog(None, ""), deepcopy(run.model), run.data)
        try:
            results[rank] = act(own)
        except threading.BrokenBarrierError:
            pass  # the error of the rank that did not come is the one to show
        except Exception as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
