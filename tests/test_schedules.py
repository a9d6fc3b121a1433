"""Schedules end when the clock does, on any machine: the real training loop on simulated ones."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import mean
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Clock, Config, RunError, Runtime, StepPlan, Trained, is_finished, plan_step

CAP = 600.0


@dataclass
class Machine:
    """Simulated time. `seconds(step)` is what a step takes; with `ahead` the device works asynchronously."""

    seconds: Callable[[int], float]
    ahead: bool = False
    host: float = 1000.0  # a clock that does not start at zero
    device: float = 0.0  # when the device will have finished what it was given

    def work(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds
        self.host = self.host + 1e-4 if self.ahead else self.device

    def wait(self, until: float | None = None) -> None:
        self.host = max(self.host, self.device if until is None else until)


class SimulatedRuntime(Runtime):
    machine: Machine

    def synchronize(self) -> None:
        self.machine.wait()


class SimulatedEvent:
    """torch.cuda.Event: recorded behind the work given so far."""

    machine: Machine

    def record(self) -> None:
        self.at = self.machine.device

    def synchronize(self) -> None:
        self.machine.wait(self.at)


class Counted(train_gpt.Training):
    """Counts steps and reads the clock; there is no state to save or to check."""

    def __init__(self, run, _, step_seconds: float):
        self.clock, self.average = Clock(run.runtime, step_seconds), SimpleNamespace(kind="")
        self.step, self.lr_scale_sum, self.saved_at = 0, 0.0, 0.0
        self.run, self.length, self.length_since = run, run.cfg.train_seq_len, -math.inf
        self.optimisers = SimpleNamespace(loss_scale=SimpleNamespace(is_used=False))

    def count_step(self, plan: StepPlan, loss) -> None:
        self.step, self.lr_scale_sum = self.step + 1, self.lr_scale_sum + plan.lr_scale

    check = save = resume = lambda *_: None


@dataclass
class Trace:
    """What the loop decided."""

    end: Trained
    plans: list[StepPlan] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # device seconds trained before each step
    lengths: list[float] = field(default_factory=list)
    trained: float = 0.0

    @property
    def rates(self) -> list[float]:
        return [plan.lr_scale for plan in self.plans]


def simulate(
    cfg: Config, seconds, measured: float = 0.0, ahead: bool = False, validation: float = 50.0
) -> Trace:
    """train() itself, with time in place of work. measured: the step seconds that the warm-up reports."""
    machine, trace = Machine(seconds, ahead), Trace(Trained())
    runtime = SimulatedRuntime(torch.device("cuda" if ahead else "cpu"))
    runtime.machine = SimulatedEvent.machine = machine

    def step(run, optimisers, batch, plan, limit):
        trace.plans.append(plan)
        trace.starts.append(trace.trained)
        trace.lengths.append(machine.seconds(len(trace.lengths)))
        trace.trained += trace.lengths[-1]
        machine.work(trace.lengths[-1])
        assert len(trace.lengths) < 20_000, "the run does not end"
        return torch.zeros(())

    def validate(run, step, seconds, depth):
        machine.work(validation)
        machine.wait()

    stubs = dict(
        warm_up=lambda *_: (1, [measured]), forecast=mock.Mock(), validate=validate,
        report_step=mock.Mock(), report_progress=mock.Mock(),
        batches=lambda *_: itertools.repeat(None), prefetch=lambda items, _: (item for item in items),
        train_step=step, report_end_of_training=mock.Mock(), Training=Counted,
        time=SimpleNamespace(perf_counter=lambda: machine.host),
    )  # fmt: skip
    run = SimpleNamespace(cfg=cfg, runtime=runtime, log=mock.Mock(), model=None)
    stream = SimpleNamespace(epoch=lambda *_: 1)
    with mock.patch.multiple(train_gpt, **stubs), mock.patch("torch.cuda.Event", SimulatedEvent):
        trace.end = train_gpt.train(run, None, stream)
    return trace


def config(**knobs) -> Config:
    chosen = dict(max_wallclock_seconds=CAP, iterations=10**9, val_loss_every=0, train_log_every=0)
    return Config(**(chosen | knobs))


def tidal_curve(p: float) -> float:
    """PR #1434's published points, joined: the reference the trace is held against."""
    if p < 0.382:
        return 0.1 + 0.9 * p / 0.382
    return 0.55 + 0.45 * math.cos(math.pi * (p - 0.382) / 0.618)


# --- values --------------------------------------------------------------------------------------


SEEN = dict(  # (steps, multiplier at the stop, its mean)
    tidal_lr=[(240, 0.751, 0.681), (259, 0.649, 0.682), (266, 0.609, 0.681), (276, 0.552, 0.678)],
    cosine_lr=[(240, 0.411, 0.778), (259, 0.349, 0.749), (266, 0.327, 0.738), (276, 0.297, 0.723)],
)


@pytest.mark.parametrize("schedule, seen", [(name, row) for name, rows in SEEN.items() for row in rows])
def test_a_schedule_has_the_multipliers_seen_in_pr_1434(schedule, seen):
    steps, at_stop, average = seen
    cfg = config(**{schedule: True}, iterations=400, max_wallclock_seconds=0)
    rates = [plan_step(cfg, step, 0.0, 2.0).lr_scale for step in range(steps + 1)]
    assert rates[-1] == pytest.approx(at_stop, abs=6e-4) and mean(rates) == pytest.approx(average, abs=2e-3)


@pytest.mark.parametrize(
    "knobs, step, expected",
    [
        (dict(tidal_lr=True, iterations=3000), 240, 0.288),
        (dict(tidal_lr=True, iterations=20000), 276, 0.133),
        (dict(tidal_lr=True, iterations=20000), 6800, 0.901),
        (dict(tidal_lr=True, iterations=1000), 0, 0.1),
        (dict(tidal_lr=True, iterations=1000), 382, 1.0),
        (dict(tidal_lr=True, iterations=1000), 1000, 0.1),
        (dict(tidal_lr=True, tidal_warmup=0.25, iterations=1000), 250, 1.0),
        (dict(tidal_lr=True, tidal_warmup=0.25, iterations=1000), 625, 0.55),
        (dict(cosine_lr=True, iterations=3000), 240, 0.986),
        (dict(cosine_lr=True, iterations=1000), 0, 1.0),
        (dict(cosine_lr=True, iterations=1000), 1000, 0.1),
        (dict(cosine_lr=True, golden_lr=True, iterations=1000), 1000, 0.382),
        (dict(cosine_lr=True, golden_lr=True, iterations=1000), 500, 0.691),
        (dict(cosine_lr=True, cosine_cycles=2.0, iterations=1000), 499, 0.1),
        (dict(cosine_lr=True, cosine_cycles=2.0, iterations=1000), 500, 1.0),  # the hard restart
        (dict(cosine_lr=True, cosine_cycles=2.0, iterations=1000), 1000, 0.1),
        (dict(iterations=10_000), 8800, 1.0),
        (dict(iterations=10_000), 9400, 0.5),
        (dict(iterations=10_000), 9999, 1 / 1200),
        (dict(iterations=10_000, warmdown_iters=0), 9999, 1.0),
        # The record's fall, to a floor that clamps, and ours that bends.
        (dict(iterations=10_000, warmdown_frac=0.85, min_lr=0.1), 1500, 1.0),
        (dict(iterations=10_000, warmdown_frac=0.85, min_lr=0.1), 5750, 0.5),
        (dict(iterations=10_000, warmdown_frac=0.85, min_lr=0.1), 9150, 0.1),
        (dict(iterations=10_000, warmdown_frac=0.85, min_lr=0.1), 9151, 0.1),
        (dict(iterations=10_000, warmdown_frac=0.85, lr_floor=0.1), 5750, 0.55),
        (dict(iterations=10_000, warmdown_frac=0.72, min_lr=0.0), 6400, 0.5),
        (dict(iterations=10_000, min_lr=0.1), 9940, 0.1),
    ],
)
def test_schedules_by_steps(knobs, step, expected):
    cfg = config(max_wallclock_seconds=0, **knobs)
    assert plan_step(cfg, step, 12.0, 3.0).lr_scale == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "elapsed, step_seconds, expected",
    [
        (0, 0.0437, 1.0),  # 8 H100: 13,700 steps, 1200 of them the last 52 s
        (547.0, 0.0437, 1.0),
        (573.78, 0.0437, 0.5),
        (600, 0.0437, 0.0),
        (0, 2.5, 0.2),  # one slow GPU: the trap of PR #1434, now said aloud before the run
        (300, 2.5, 0.1),
    ],
)
def test_warmdown_by_the_clock(elapsed, step_seconds, expected):
    cfg = config(iterations=20_000)
    assert plan_step(cfg, 100, elapsed, step_seconds).lr_scale == pytest.approx(expected, abs=2e-3)


def test_seconds_kept_for_quantising_are_part_of_the_clock():
    cfg = config(gptq_reserve_seconds=12.0, warmdown_frac=0.72)
    assert cfg.cap == CAP - 12
    assert plan_step(cfg, 100, 588.0, 0.1).progress == 1.0
    assert plan_step(cfg, 100, 294.0, 0.1).progress == pytest.approx(0.5)
    assert plan_step(cfg, 100, 294.0, 0.1).lr_scale == pytest.approx(0.5 / 0.72)
    assert not is_finished(cfg, 100, 587.8, 0.1) and is_finished(cfg, 100, 587.95, 0.1)
    assert is_finished(replace(cfg, gptq_reserve_seconds=0.0), 100, 587.95, 0.1) is False


@pytest.mark.parametrize("reserve, clock", [(600.0, 600.0), (700.0, 600.0)])
def test_a_reserve_that_leaves_no_time_is_refused(reserve, clock):
    with pytest.raises(RunError, match="GPTQ_RESERVE_SECONDS=.* leaves nothing of MAX_WALLCLOCK_SECONDS"):
        config(gptq_reserve_seconds=reserve, max_wallclock_seconds=clock)


def test_a_reserve_without_a_clock_has_no_effect():
    env = dict(GPTQ_RESERVE_SECONDS="4", MAX_WALLCLOCK_SECONDS="0")
    with pytest.raises(RunError, match="GPTQ_RESERVE_SECONDS has no effect without MAX_WALLCLOCK_SECONDS!=0"):
        Config.from_env(env)
    assert Config.from_env(env | dict(ALLOW_INERT="1")).cap == math.inf


@pytest.mark.parametrize("step, expected", [(0, 0.85), (250, 0.9), (276, 0.9052), (500, 0.95), (9000, 0.95)])
def test_momentum_rises_linearly_in_steps(step, expected):
    assert plan_step(config(), step, 300.0, 0.1).muon_momentum == pytest.approx(expected)


def test_momentum_without_warm_up_is_the_momentum():
    assert plan_step(config(muon_momentum_warmup_steps=0), 0, 0.0, 0.1).muon_momentum == 0.95


SCHEDULES = st.sampled_from(
    [{}, dict(tidal_lr=True), dict(cosine_lr=True), dict(cosine_lr=True, golden_lr=True)]
)


@given(
    SCHEDULES,
    st.integers(0, 10**6),
    st.floats(0, 2 * CAP),
    st.floats(0, 100),
    st.integers(0, 10**6),
    st.sampled_from([0.0, CAP]),
)
def test_every_plan_is_sane_whatever_the_clock_says(knobs, step, elapsed, step_seconds, iterations, cap):
    cfg = config(**knobs, iterations=iterations, max_wallclock_seconds=cap)
    plan = plan_step(cfg, step, elapsed, step_seconds)
    assert 0 <= plan.progress <= 1 and 0 <= plan.lr_scale <= 1 + 1e-12
    assert 0.85 - 1e-9 <= plan.muon_momentum <= 0.95 + 1e-9


@given(st.floats(0, CAP), st.floats(0, CAP), st.integers(0, 1000), st.integers(0, 1000))
def test_progress_never_falls(early, late, step, more):
    cfg = config(iterations=1500)
    early, late = sorted((early, late))
    before, after = plan_step(cfg, step, early, 0.1), plan_step(cfg, step + more, late, 0.1)
    assert before.progress <= after.progress


# --- the loop on simulated machines --------------------------------------------------------------

STEP = st.floats(0.4, 8.0)
JITTER = st.lists(st.floats(0.6, 1.7), min_size=1, max_size=40)
SLOW_FIRST = st.sampled_from([0.0, 20.0])


@st.composite
def machines(draw):
    """(seconds of each step, typical seconds, warm-up's measurement): jitter, slow first step, slow-down."""
    typical, jitter, first = draw(STEP), draw(JITTER), draw(SLOW_FIRST)
    slow_from, slower = draw(st.integers(1, 1500)), draw(st.sampled_from([1.0, 1.0, 3.0, 10.0]))

    def seconds(step: int) -> float:
        extra = first if step == 0 else 0.0
        return extra + typical * jitter[step % len(jitter)] * (slower if step >= slow_from else 1.0)

    return seconds, draw(st.sampled_from([0.0, typical]))


@settings(deadline=None, max_examples=60)
@given(SCHEDULES, machines(), st.booleans())
def test_a_run_ends_within_a_step_of_the_clock(knobs, machine, ahead):
    seconds, measured = machine
    trace = simulate(config(**knobs), seconds, measured, ahead)
    longest, hidden = max(trace.lengths), 2 if ahead else 0  # steps the device may be behind the host
    assert trace.end.seconds == pytest.approx(trace.trained, abs=0.5)
    assert CAP - (2 + hidden) * longest <= trace.trained <= CAP + (1 + hidden) * longest
    assert trace.end.progress >= 1 - (2 + hidden) * longest / CAP
    assert trace.end.step == len(trace.plans)


@settings(deadline=None, max_examples=30)
@given(machines())
def test_tidal_anneals_to_its_floor_on_any_machine(machine):
    trace = simulate(config(tidal_lr=True), *machine)
    assume(max(trace.lengths[-50:]) < 0.02 * CAP)  # the clock keeps free what the slow ones of 50 steps took
    assert 0.1 <= trace.rates[-1] < 0.12


@settings(deadline=None, max_examples=30)
@given(machines(), st.booleans())
def test_tidal_follows_the_fraction_curve_on_any_machine(machine, ahead):
    """Slow first step, slow-down, asynchronous device: the rate is the curve at the share of the clock."""
    trace = simulate(config(tidal_lr=True), *machine, ahead)
    starts = [start / CAP for start in trace.starts]  # an asynchronous clock reads up to two steps back
    for index, rate in enumerate(trace.rates):
        first, last = (
            starts[max(0, index - 2) if ahead else index],
            starts[index],
        )
        ends = tidal_curve(first), tidal_curve(last)
        assert min(ends) - 0.01 <= rate <= (1.0 if first < 0.382 < last else max(ends)) + 0.01


@settings(deadline=None, max_examples=30)
@given(STEP, st.lists(st.floats(0.9, 1.1), min_size=1, max_size=40), st.booleans())
def test_warmdown_ends_near_zero(typical, jitter, ahead):
    cfg = config(warmdown_iters=60)
    trace = simulate(cfg, lambda step: typical * jitter[step % len(jitter)], typical, ahead)
    assert trace.rates[-1] <= 6 / 60
    assert max(trace.rates) == 1.0 or trace.end.step < 100


@pytest.mark.parametrize("slow_step", [0, 1, 2, 7, 100])
def test_one_slow_step_does_not_bend_the_warmdown(slow_step):
    """A 20 s step among steps of 0.1 s: 1200 steps are the last 120 s, so the rate stays 1 until then."""
    trace = simulate(config(), lambda step: 20.0 if step == slow_step else 0.1, measured=0.1)
    for rate, start in zip(trace.rates, trace.starts, strict=True):
        assert rate == pytest.approx(min(1.0, (CAP - start) / 120), abs=0.01)


@pytest.mark.parametrize("first, measured", [(0.0, 2.2), (20.0, 2.2), (0.0, 0.0), (20.0, 0.0)])
def test_the_published_trap_finishes_its_tidal(first, measured):
    """ITERATIONS=3000, 600 s, 2.2 s a step: PR #1434 stopped at 8 % of its schedule, still rising."""
    cfg = config(tidal_lr=True, iterations=3000)
    trace = simulate(cfg, lambda step: 2.2 + first * (step == 0), measured)
    assert 260 <= trace.end.step <= 273 and not trace.end.is_truncated
    assert max(trace.rates) > 0.99 and trace.rates[-1] < 0.11
    assert trace.end.mean_lr_scale == pytest.approx(0.55, abs=0.03)  # of the whole curve


@settings(deadline=None, max_examples=20)
@given(SCHEDULES, st.integers(1, 200), st.floats(0.01, 2.9), st.booleans())
def test_the_step_limit_ends_a_run_with_time_to_spare(knobs, iterations, step_seconds, ahead):
    trace = simulate(config(**knobs, iterations=iterations), lambda step: step_seconds, step_seconds, ahead)
    assert trace.end.step == iterations and trace.end.progress == 1.0
    assert [plan.progress for plan in trace.plans] == pytest.approx(
        [step / iterations for step in range(iterations)], abs=0.01
    )


@pytest.mark.parametrize("measured, ahead", [(0.0, False), (1000.0, False), (1000.0, True)])
def test_one_step_always_runs(measured, ahead):
    trace = simulate(config(), lambda step: 1000.0, measured, ahead)
    assert trace.end.step == 1 and trace.end.seconds == pytest.approx(1000.0, abs=0.1)


@pytest.mark.parametrize("ahead", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("every, slower", [(5, 3.0), (12, 6.0), (24, 2.0)])
def test_slow_steps_among_the_recent_ones_are_foretold(every, slower, ahead):
    """A busy machine: some steps take several times the median. The run keeps that much free at its end."""
    for typical in (0.8, 0.87, 0.93, 1.0, 1.11):
        trace = simulate(config(), lambda n, t=typical: t * (slower if n % every == 0 else 1.0), ahead=ahead)
        margin = (3 if ahead else 1) * slower * typical  # an asynchronous device has two steps to do as well
        assert CAP - margin - typical <= trace.trained <= CAP
        assert trace.end.seconds <= CAP


def test_a_step_like_the_slow_one_before_it_is_foretold():
    """What began just now is not in a quantile of the recent steps yet."""
    trace = simulate(config(), lambda step: 9.0 if step >= 590 else 1.0)
    assert CAP - 9 < trace.trained <= CAP and trace.end.step == 591


@pytest.mark.parametrize(
    "steps, foretold",
    [
        ([], 0.0),
        ([2.0], 2.0),
        ([9.0, 1.0, 2.0], 9.0),
        ([9.0, *[1.0] * 49], 1.0),  # one of 50 is passed over
        ([9.0, 8.0, *[1.0] * 48], 8.0),
        ([9.0, *[1.0] * 48, 7.0], 7.0),  # the one before
        ([*[9.0] * 9, *[1.0] * 50], 1.0),  # long ago
    ],
)
def test_the_next_step_is_foretold_by_a_high_quantile_and_the_one_before(steps, foretold):
    clock = Clock(Runtime())
    clock.recent_steps.extend(steps)
    assert clock.foretell_step() == foretold


@pytest.mark.parametrize("ahead", [False, True])
def test_an_overrun_that_nothing_foretold_is_in_the_training_seconds(ahead):
    trace = simulate(config(), lambda step: 80.0 if step == 595 else 1.0, ahead=ahead)
    assert trace.trained == trace.end.seconds > CAP + 70 if not ahead else trace.end.seconds > CAP + 70


def test_an_asynchronous_device_does_not_hide_long_steps():
    assert simulate(config(), lambda step: 250.0, measured=250.0, ahead=True).trained <= CAP


def test_a_run_without_limits_of_time_makes_its_steps():
    trace = simulate(config(iterations=50, max_wallclock_seconds=0), lambda step: 1e4)
    assert trace.end.step == 50 and not trace.end.is_truncated


def test_a_run_of_no_steps_only_validates():
    trace = simulate(config(iterations=0), lambda step: 1.0)
    assert trace.plans == [] and trace.end.step == 0 and not trace.end.is_truncated


@pytest.mark.parametrize("ahead", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("every", [1, 2, 3, 10, 100])
def test_validations_cost_no_training_time(every, ahead):
    """Nor do they disturb the measured step time, and with it the warm-down."""
    cfg = config(val_loss_every=every, warmdown_iters=100)
    trace = simulate(cfg, lambda step: 2.0, measured=2.0, ahead=ahead, validation=30.0)
    assert CAP - 4 <= trace.trained <= CAP
    assert trace.end.seconds == pytest.approx(trace.trained, abs=0.5)
    for rate, start in zip(trace.rates, trace.starts, strict=True):
        assert rate == pytest.approx(min(1.0, (CAP - start) / 200), abs=0.031)


def test_a_run_cut_short_says_so():
    trace = simulate(config(), lambda step: 380.0, measured=380.0)
    assert trace.end.step == 1 and trace.end.is_truncated


# --- the clock -----------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """A settable time."""
    moment = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: moment.seconds))
    return moment


def test_clock_stands_still_while_paused(now):
    clock = Clock(Runtime())
    clock.start()
    now.seconds += 3
    with clock.paused():
        now.seconds += 100
    now.seconds += 4
    assert clock.seconds() == pytest.approx(7) and clock.tick() == pytest.approx(7)


def test_clock_measures_steps_and_not_pauses(now):
    clock = Clock(Runtime())
    assert clock.step_seconds() == 0.0
    clock.start()
    for _ in range(5):
        clock.tick()
        with clock.paused():
            now.seconds += 100
        for _ in range(3):
            clock.tick()
            now.seconds += 2
    assert clock.step_seconds() == pytest.approx(2)


@given(st.lists(st.floats(0.9, 1.1), min_size=2, max_size=40), st.floats(5, 1000), st.data())
def test_median_step_ignores_one_slow_step(steps, slow, data):
    steps[data.draw(st.integers(0, len(steps) - 1))] = slow
    moment = [0.0]
    with mock.patch.object(train_gpt, "time", SimpleNamespace(perf_counter=lambda: moment[0])):
        clock = Clock(Runtime(), 1.0)
        clock.start()
        for seconds in steps:
            clock.tick()
            moment[0] += seconds
        clock.tick()
        assert 0.9 <= round(clock.step_seconds(), 9) <= 1.1


class OtherRank(Runtime):
    """A rank that hears rank 0 say a number, and no signal."""

    heard = 0.0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor([self.heard, 0.0, 0.0])


@pytest.mark.parametrize("knobs", [{}, dict(tidal_lr=True), dict(cosine_lr=True)])
def test_every_rank_plans_by_rank_0s_clock(now, knobs):
    cfg, ranks = config(**knobs, warmdown_iters=100), []
    for drift in (0.0, 0.3, -0.2):  # other ranks' own clocks run apart
        runtime, plans = OtherRank(rank=1, world_size=2), []
        clock = Clock(runtime, 2.0)
        clock.start()
        for step in range(300):
            runtime.heard = 2.0 * step
            plans.append(plan_step(cfg, step, clock.tick(), clock.step_seconds()))
            now.seconds += 2.0 + drift
        ranks.append(plans)
    assert ranks[0] == ranks[1] == ranks[2]


@pytest.mark.parametrize(
    ("step", "elapsed", "expected"),
    [(10, 0.0, 0.0), (11, 0.0, 0.0), (9, 0.0, 1.0), (0, CAP + 1.0, 0.0), (0, CAP - 1.0, 0.5)],
)
def test_no_step_is_foretold_beyond_either_limit(step, elapsed, expected):
    cfg = Config(iterations=10, max_wallclock_seconds=CAP)
    assert train_gpt.predict_steps_left(cfg, step, elapsed, step_seconds=2.0) == expected
