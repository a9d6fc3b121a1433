"""TRAIN_SEQ_SCHEDULE: windows that grow as the run goes on, of the same number of tokens a step."""

import itertools
import math
from signal import SIGTERM

import pytest
import torch

import train_gpt
from tests.conftest import VOCAB, Traced, random_model
from tests.support.stops import in_step
from tests.test_frontier import LOOP, SMALLEST, finished
from train_gpt import (
    PREEMPTED,
    Config,
    Optimisers,
    Run,
    RunLog,
    Runtime,
    TokenStream,
    Training,
    batches,
    plan_step,
    train_step,
    window_order,
)

GROWS = dict(train_seq_schedule="8@0.25,16@0.6,32@1.0")
LAYERS = dict(num_layers=7, enable_looping_at=0.5) | LOOP


def stretches(cfg: Config) -> list[tuple[float, int, int]]:
    """(until, layers, tokens of a window) of each phase."""
    return [(phase.until, phase.depth, phase.length) for phase in cfg.phases]


def test_lengths_and_layers_change_at_their_own_progress(tiny):
    assert stretches(tiny()) == [(1.0, 2, 32)]
    assert stretches(tiny(**GROWS)) == [(0.25, 2, 8), (0.6, 2, 16), (1.0, 2, 32)]
    both = [(0.25, 7, 8), (0.5, 7, 16), (0.6, 11, 16), (1.0, 11, 32)]
    assert stretches(tiny(**GROWS, **LAYERS)) == both
    at_once = tiny(**LAYERS, train_seq_schedule="8@0.5,32@1.0")
    assert stretches(at_once) == [(0.5, 7, 8), (1.0, 11, 32)]
    never = tiny(**LAYERS | dict(enable_looping_at=1.0), **GROWS)
    assert stretches(never)[-2:] == [(1.0, 7, 32), (1.0, 11, 32)]
    deep = tiny(num_repeats=2, prog_depth="0.5:1,0.9:2", train_seq_schedule="8@0.95,32@1")
    assert stretches(deep) == [(0.5, 2, 8), (0.95, 4, 8), (1.0, 4, 32)]


def test_a_phase_is_scored_by_the_last_one_with_its_layers(tiny):
    cfg = tiny(**GROWS, **LAYERS)
    assert [cfg.last_alike(phase) for phase in (-4, -3, -2, -1)] == [-3, -3, -1, -1]


@pytest.mark.parametrize("limits, step, seconds, length", [
    (dict(iterations=100), 24, 0, 8), (dict(iterations=100), 25, 0, 16), (dict(iterations=100), 99, 0, 32),
    (dict(iterations=10**6, max_wallclock_seconds=100.0), 3, 59.9, 16),
    (dict(iterations=10**6, max_wallclock_seconds=100.0), 3, 60.0, 32),
])  # fmt: skip
def test_the_length_follows_steps_or_clock(tiny, limits, step, seconds, length):
    cfg = tiny(**GROWS, **limits)
    assert cfg.phases[plan_step(cfg, step, seconds, 0.0).phase].length == length


@pytest.mark.parametrize("length", [8, 16, 32])
def test_a_step_holds_as_many_tokens_of_the_same_text_at_any_length(tiny, dataset, length):
    cfg, stream = tiny(**GROWS), TokenStream(str(dataset), "train", VOCAB)
    text = stream.read(0, 2049)
    for step, (ids, targets) in zip(range(2, 4), batches(cfg, stream, Runtime(), 2, length), strict=False):
        assert ids.shape == targets.shape == (512 // length, length)
        assert ids.flatten().tolist() == text[512 * step : 512 * (step + 1)].tolist()
        assert targets.flatten().tolist() == text[512 * step + 1 : 512 * (step + 1) + 1].tolist()
    ranks = [next(batches(cfg, stream, Runtime(rank=rank, world_size=3), 2, length))[0] for rank in range(3)]
    assert torch.equal(torch.cat(ranks), next(batches(cfg, stream, Runtime(), 2, length))[0])


def test_shuffled_windows_of_a_length_are_each_seen_once_an_epoch(tiny):
    cfg = tiny(data_shuffle=True, **GROWS)
    seen = itertools.chain.from_iterable(window_order(cfg, 128, step, 16).tolist() for step in range(4))
    assert sorted(seen) == list(range(128))


def test_the_rate_rises_again_after_each_change(tiny):
    cfg = tiny(**GROWS, iterations=20, warmdown_iters=0, seq_change_warmup_steps=4)
    run = Run(cfg, Runtime(), RunLog(None, ""), random_model(cfg), None)
    training = Training(run, Optimisers(cfg, run.model, run.runtime), 0.0)
    plans = [training.notice_length(plan_step(cfg, step, 0.0, 0.0)) for step in range(20)]
    rise = [0.25, 0.5, 0.75, 1.0]
    assert [plan.lr_scale for plan in plans] == [1.0] * 5 + rise + [1.0] * 3 + rise + [1.0] * 4


def test_short_windows_go_into_passes_of_as_many_tokens(tiny):
    """64 tokens: two windows of 32, eight of 8; the loss is the same mean over all tokens."""
    cfg = tiny(**GROWS, train_batch_tokens=128)
    run = Run(cfg, Runtime(), RunLog(None, ""), random_model(cfg), None)
    optimisers = Optimisers(cfg, run.model, run.runtime)
    sizes, loss = [], run.loss

    def noted(ids, *rest):
        sizes.append(tuple(ids.shape))
        return loss(ids, *rest)

    run.loss = noted
    ids = torch.arange(128).view(16, 8)
    expected = train_gpt.training_loss(cfg, run.model)(ids, ids.flip(1))[1].item()
    found = train_step(run, optimisers, (ids, ids.flip(1)), plan_step(cfg, 0, 0.0, 0.0), 2)
    assert sizes == [(8, 8), (8, 8)] and math.isclose(found.item(), expected, rel_tol=1e-6)


def test_every_length_and_plan_is_compiled_before_the_clock(dataset):
    """Four phases of training; validation has but the two plans."""
    knobs = SMALLEST | GROWS | dict(iterations=12, val_loss_every=2, pack_documents=1)
    run, trained = finished(dataset, Traced(), **knobs)
    assert trained.late_graphs == 0 and run.runtime.graphs == 4 + 2
    switches = [line for line in run.log.lines if "switched" in line]
    assert switches == [
        "train_seq_len: switched to 16 tokens at step:3 frac:0.25",
        "layer_loop: switched to 3 layers at step:5 frac:0.42",
        "train_seq_len: switched to 32 tokens at step:8 frac:0.67",
    ]


def test_a_shard_that_breaks_at_the_change_ends_the_run_in_one_line(new):
    """Each rank hears of it, though only one reads there."""
    patch = """
inside = train_gpt.batches
def broken(cfg, stream, runtime, first=0, length=0):
    if runtime.defers_stop and length == 16 and rank == 1:
        raise train_gpt.RunError("a shard is broken")
    yield from inside(cfg, stream, runtime, first, length)
train_gpt.batches = broken
"""
    folder = new(GROWS, 2)
    assert folder.start(patch) == [2, 2]
    assert folder.error() == "error: a shard is broken\n"


# A clock that every rank but the first reads wrongly, and that goes on by a quarter of a second a step.
EVEN_CLOCK = """
begin, tick = train_gpt.Clock.start, train_gpt.Clock.tick
def start(self):
    begin(self)
    self.ticks = 0
def count(self, *given):
    now = tick(self, *given)
    self.ticks += 1
    return now
train_gpt.Clock.start, train_gpt.Clock.tick = start, count
train_gpt.Clock.seconds = lambda self: self.total + 0.25 * self.ticks * (1 + rank)
"""
# Each rank writes step, phase and length of its steps to a file.
NOTED = """
inside = train_gpt.train_step
def noted(run, optimisers, batch, plan, limit):
    if run.runtime.defers_stop:
        with open(f"{rank}.steps", "a") as file:
            print(plan.step, plan.phase, batch[0].size(1), file=file)
    return inside(run, optimisers, batch, plan, limit)
train_gpt.train_step = noted
"""
SMALL_LOOP = dict(num_layers=3, num_loops=1, loop_start=1, loop_end=1, enable_looping_at=0.5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_under_a_clock_a_run_that_is_stopped_at_each_change_ends_as_one_that_is_not(new, ranks):
    """Eight steps of a clock of two seconds, stopped where the windows and where the layers change."""
    knobs = SMALL_LOOP | GROWS | dict(max_wallclock_seconds=2.0, iterations=10**6, seq_change_warmup_steps=2)
    whole, stopped = new(knobs, ranks), new(knobs, ranks)
    patch = EVEN_CLOCK + NOTED
    assert whole.start(patch) == [0] * ranks, whole.text("0.err")
    assert stopped.start(patch + in_step(2, SIGTERM)) == [PREEMPTED] * ranks, stopped.text("0.err")
    assert stopped.resume(patch + in_step(4, SIGTERM)) == [PREEMPTED] * ranks, stopped.text("0.err")
    assert stopped.resume(patch) == [0] * ranks, stopped.text("0.err")
    lengths = [8, 8, 16, 16, 16, 32, 32, 32]
    phases = [-4, -4, -3, -3, -2, -1, -1, -1]
    expected = [f"{step} {phases[step]} {lengths[step]}" for step in range(8)]
    for folder, rank in itertools.product((whole, stopped), range(ranks)):
        assert folder.text(f"{rank}.steps").splitlines() == expected
    assert [name for name, value in whole.left().items() if stopped.left()[name] != value] == []
