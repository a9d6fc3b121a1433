"""What the runs of a wave say, in numbers: differences paired by seed, their noise, and a verdict.

Pure functions of rows, the lines of sweeps/results/*.jsonl; nothing here reads or writes a file. Lower bpb is
better, and a difference is always the arm's less the control's.

Noise     Two parts. The rerun SD is that of control runs repeated with the same seed. The pair SD is that of
one paired difference: from each arm's variance between seeds the median over the arms is taken and divided by
what that median is for normal noise, so that no arm that went wild sets it; arms that hardly differ from the
control are left out. It holds the rerun noise of both runs too. The floor is the larger of the pair SD and
sqrt(2) rerun SDs; it is shown, and names arms that look unsteady.

Test      t = mean / (larger of the arm's own SD and the pair SD) * sqrt(pairs). No table has this statistic,
and all differences share the control, so its distribution is drawn: waves of the same shape (which arm has
which seed, how often the control ran) in which no arm does anything. Where the control ran again, its mean is
drawn as much quieter as its reruns show: as their share of a run's variance says, and not at all if they gave
the same bits. p comes from the arm's own draws. The family-wise p is Holm's step-down over the wave; for the
arms that remain it takes the drawn distribution of their smallest p instead of the sum of their p's. So
5 % of waves without effects name an arm, not fewer: 4.7 to 5.5 % of simulated ones.

The rerun SD does not bound the spread in t. It did once: then 0.2 to 2.6 % of waves whose reruns vary named
an arm; and draws of that rule would have to know the reruns' share exactly (with the share that a wave shows,
4 to 9 %).

Limits    The 5 % are for arms and a control of one noise. An arm that is noisier than the others is held to
its own SD, which few seeds tell badly: with one arm of twelve at three times the noise 8 % of waves without
effects name an arm, with half of the arms 14 %. `unsteady` names arms that look so; they want more seeds.
With a control twice as noisy as its arms it is 7 to 8 %, and 92 of 100 intervals of 95 % hold; with one half
as noisy 4 %. A wave of few seeds cannot tell. All rates: sweeps/results/study_false_alarms.md, which
null_study.py makes.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from data.user_error import UserError
from sweeps.lab.run_state import UNFINISHED, RunState
from sweeps.lab.statistics import Interval, mean, mean_interval, stdev

Row = Mapping[str, Any]
BySeed = dict[int, float]

CONTROL = "control"
BETTER = "better"
WORSE = "worse"
INSIDE = "inside noise"
UNDECIDED = "undecided"
LEVEL = 0.05  # of the family-wise p
DRAWS = 20_000  # waves without effects, for each shape
SHARE_STEP = 0.05  # rerun_share is told in such steps
# A table holds runs that agree on all of these; those of the second line but for the arm's own knobs.
MACHINE = (
    "code_sha256", "val_sha256", "val_tokens", "device", "world_size", "dtype", "compile", "torch", "python",
    "numpy",
)  # fmt: skip
SIZES = (
    "iterations", "max_wallclock_seconds", "train_batch_tokens", "train_seq_len", "vocab_size", "num_layers",
    "model_dim", "num_heads", "num_kv_heads",
)  # fmt: skip
IDLE = 0.001  # an arm with less than this share of the usual variance hardly differs from the control
UNSTEADY = 2.5  # an arm with an SD of more floors than this; of arms with the usual noise 0.2 % have it (n 3)
WIDEST_GAP = 0.25  # between two points of a curve, as a share of where it is read


# Rows


def number(value: object) -> float | None:
    """A finite number, or one spelt as text; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def run_id(row: Row) -> str:
    again = f".r{row['rerun']}" if row.get("rerun") else ""
    return row.get("run_id") or f"{row.get('wave')}.{row.get('arm')}.{row.get('seed')}{again}"


def latest(rows: Iterable[Row]) -> list[Row]:
    """One row a run: the last written, where its first one stood."""
    return list({run_id(row): row for row in rows}.values())


def valid(rows: Iterable[Row]) -> list[Row]:
    """The runs that may be ranked: finished well, with a score."""
    return [row for row in latest(rows) if row.get("state") == RunState.OK and final_score(row) is not None]


def final_score(row: Row) -> float | None:
    """The ranking number: bpb of the packed model."""
    return number(row.get("val_bpb"))


def setting(row: Row, knob: str) -> object:
    """A knob as the run had it: from its resolved config, else from what was set; None where unknown."""
    for place in ("config", "change", "env"):
        for name, value in (row.get(place) or {}).items():
            if name.lower() == knob.lower():
                return value
    return None


def change(row: Row) -> dict[str, str]:
    """The arm's diff from the base, in capitals and as text."""
    return {knob.upper(): str(value) for knob, value in sorted((row.get("change") or {}).items())}


class Counts(NamedTuple):
    """Duplicates are in `states` only: they stand for no run of their own."""

    planned: int
    started: int
    finished: int  # nothing is left to be done, for good or bad
    scored: int  # with a final bpb, whatever it is worth
    valid: int
    states: dict[str, int]


def counts(rows: Iterable[Row]) -> Counts:
    """How many runs came how far. Nothing is counted by hand: states that no run is in are left out."""
    rows = latest(rows)
    states = [str(row.get("state") or RunState.PLANNED) for row in rows]
    known_states = [state.value for state in RunState]
    foreign_states = sorted(set(states) - set(known_states))
    by_state = {state: states.count(state) for state in [*known_states, *foreign_states] if state in states}
    planned = len(rows) - states.count(RunState.DUPLICATE)
    return Counts(
        planned=planned,
        started=planned - states.count(RunState.PLANNED),
        finished=planned - sum(states.count(state) for state in UNFINISHED),
        scored=sum(final_score(row) is not None for row in rows),
        valid=len(valid(rows)),
        states=by_state,
    )


# Regimes


def regime(row: Row, free: Iterable[str] = ()) -> dict[str, object]:
    """What a run must share with those it is compared with; None where unknown, the arm's own, or `free`."""
    own = {knob.lower() for knob in change(row)} | set(free)
    sizes = {name: None if name in own else number(setting(row, name)) for name in SIZES}
    return {name: row.get(name) for name in MACHINE} | sizes


def agree(ours: Mapping[str, object], theirs: Mapping[str, object]) -> bool:
    return all(None in (value, theirs[name]) or value == theirs[name] for name, value in ours.items())


def filled(ours: Mapping[str, object], theirs: Mapping[str, object]) -> dict[str, object]:
    """Ours, and theirs where ours knows nothing."""
    return {name: value if ours.get(name) is None else ours[name] for name, value in theirs.items()}


def home(groups: list[tuple[dict[str, object], list[Row]]], facts: dict[str, object]) -> list[Row]:
    """The rows of the newest group that agrees with the facts and now knows them too, or of a new one."""
    known, members = next((group for group in reversed(groups) if agree(facts, group[0])), ({}, []))
    if not members:
        groups.append((known, members))
    known |= filled(known, facts)
    return members


def by_regime(rows: Iterable[Row], free: Iterable[str] = ()) -> list[list[Row]]:
    """The rows in groups that agree wherever both sides know; a row that knows nothing joins the last."""
    groups: list[tuple[dict[str, object], list[Row]]] = []
    rows = latest(rows)
    for row in sorted(rows, key=lambda row: row.get("code_sha256") is None):  # those that know, first
        home(groups, regime(row, free)).append(row)
    place = {id(row): place for place, row in enumerate(rows)}
    return [sorted(members, key=lambda row: place[id(row)]) for _, members in groups]


def joined(parts: Iterable[list[Row]]) -> list[list[Row]]:
    """The regimes of several waves, those that agree in one list: what an arm's own knobs change must not
    part it from its control."""
    groups: list[tuple[dict[str, object], list[Row]]] = []
    for rows in parts:
        facts: dict[str, object] = {}
        for row in sorted(rows, key=lambda row: row.get("arm") != CONTROL):
            facts = filled(facts, regime(row))
        home(groups, facts).extend(rows)
    return [members for _, members in groups]


def require_one_regime(rows: Iterable[Row], free: Iterable[str] = ()) -> None:
    """Raises UserError, which names the facts that differ."""
    groups = by_regime(rows, free)
    if len(groups) > 1:
        first, second = (regime(group[0], free) for group in groups[:2])
        apart = [k for k in first if None not in (first[k], second[k]) and first[k] != second[k]]
        text = f"runs of {len(groups)} regimes in one table; they differ in {', '.join(apart)}"
        raise UserError(text)


def sharing(rows: Iterable[Row]) -> int:
    """How many runs had another one beside them on the machine for part of their time."""
    spans = [(number(row.get("started")), number(row.get("ended"))) for row in latest(rows)]
    known = [span for span in spans if None not in span]
    return sum(any(a[0] < b[1] and b[0] < a[1] for b in known if b is not a) for a in known)


def step_limited(rows: Iterable[Row]) -> bool | None:
    """Did all of the runs end by their step count, not by a clock? None where nothing says so."""
    pairs = [(number(row.get("steps")), number(setting(row, "iterations"))) for row in rows]
    known = [pair for pair in pairs if None not in pair]
    return all(steps >= most for steps, most in known) if known else None


# Paired differences


def arms_of(rows: Iterable[Row]) -> list[str]:
    """Arms other than the control, in the order in which they first appear."""
    names = dict.fromkeys(str(row.get("arm")) for row in latest(rows))
    return [name for name in names if name != CONTROL]


def by_seed(rows: Iterable[Row], arm: str) -> dict[int, list[Row]]:
    """An arm's valid runs by seed; several where the same seed was run again."""
    runs: dict[int, list[Row]] = {}
    for row in valid(rows):
        if str(row.get("arm")) == arm:
            runs.setdefault(row.get("seed"), []).append(row)
    return runs


def scores(rows: Iterable[Row], arm: str, of: Callable[[Row], float | None] = final_score) -> BySeed:
    """seed -> score, the mean over reruns of that seed."""
    averages: BySeed = {}
    for seed, runs in by_seed(rows, arm).items():
        values = [of(run) for run in runs]
        values = [value for value in values if value is not None]
        if values:
            averages[seed] = mean(values)
    return averages


def subtract(ours: BySeed, theirs: BySeed) -> BySeed:
    """By seed, where both have it."""
    return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}


def differences(rows: Iterable[Row], of: Callable[[Row], float | None] = final_score) -> dict[str, BySeed]:
    """arm -> seed -> its score less the control's of the same seed."""
    rows = latest(rows)
    control = scores(rows, CONTROL, of)
    return {arm: subtract(scores(rows, arm, of), control) for arm in arms_of(rows)}


def control_scores(rows: Iterable[Row]) -> dict[int, list[float]]:
    """seed -> the score of every valid run of the control."""
    return {seed: [run["val_bpb"] for run in runs] for seed, runs in by_seed(rows, CONTROL).items()}


class Noise(NamedTuple):
    """Standard deviations in bpb; None where nothing tells them."""

    rerun_sd: float | None  # one run, same seed again
    rerun_df: int
    pair_sd: float | None  # one paired difference
    pair_arms: int  # arms it is pooled over
    floor: float  # what a single difference is taken to vary by at least

    @property
    def seed_sd(self) -> float | None:
        """The part of the pair SD that reruns do not explain."""
        if self.pair_sd is None:
            return None
        rerun_part = 2 * (self.rerun_sd or 0.0) ** 2
        return math.sqrt(max(0.0, self.pair_sd**2 - rerun_part))


def pooled_variance(variances: np.ndarray, freedoms: Sequence[int]) -> np.ndarray:
    """One variance from those of the arms, [..., arms] -> [...]; freedoms: their degrees of freedom.

    The median over the arms that do anything, made right for normal noise: each variance is divided by what
    the median of such a variance is, so that no arm that went wild sets it, and arms that hardly differ from
    the control are left out. Of one or two arms, the mean.
    """
    arms = len(freedoms)
    if arms < 3:
        return np.average(variances, axis=-1, weights=freedoms)
    medians = np.array([stats.chi2.median(freedom) / freedom for freedom in freedoms])
    ascending = np.sort(variances / medians, axis=-1)
    usual = np.median(ascending[..., arms // 2 :], axis=-1, keepdims=True)
    idle_arms = (ascending < IDLE * usual).sum(-1)
    lower_place = (idle_arms + arms - 1) // 2  # the middle of the arms that are left; two if they are even
    upper_place = (idle_arms + arms) // 2
    lower = np.take_along_axis(ascending, lower_place[..., None], -1)[..., 0]
    upper = np.take_along_axis(ascending, upper_place[..., None], -1)[..., 0]
    return np.mean([lower, upper], axis=0)


def noise(rows: Iterable[Row]) -> Noise:
    """Of the wave's valid runs; its two parts are said at the head of this file."""
    rows = latest(rows)
    return noise_of(differences(rows), control_scores(rows))


def noise_of(pairs: Mapping[str, BySeed], control: Mapping[int, Sequence[float]]) -> Noise:
    """From the differences of each arm and the scores of the control, both by seed."""
    rerun_df = 0
    rerun_squares = 0.0
    for values in control.values():
        if len(values) > 1:
            rerun_df += len(values) - 1
            rerun_squares += stdev(values) ** 2 * (len(values) - 1)
    rerun_sd = math.sqrt(rerun_squares / rerun_df) if rerun_df else None
    several = [list(values.values()) for values in pairs.values() if len(values) > 1]
    pair_sd = None
    if several:
        variances = np.array([stdev(values) ** 2 for values in several])
        pair_sd = math.sqrt(pooled_variance(variances, [len(values) - 1 for values in several]))
    floor = max(pair_sd or 0.0, math.sqrt(2) * (rerun_sd or 0.0))
    return Noise(rerun_sd, rerun_df, pair_sd, len(several), floor)


# The test


def rerun_share(rerun_variance, pair_variance, inverse_runs):
    """The share of a run's variance V that shows when the same seed is run again; of numbers or arrays.

    inverse_runs: 1 / n, n runs of the control a seed, as the mean over the seeds. The control's mean keeps
    V (1 - share + share / n), and so
        rerun variance = share V,    pair variance = V (2 - share (1 - 1/n)).
    The share is solved from these two and held to 0 .. 1: 0 where reruns give the same bits, 1 where seeds
    add nothing of their own. It is rounded to steps of 0.05, of which each has its own draws.
    """
    whole = pair_variance + (1 - inverse_runs) * rerun_variance
    share = np.divide(2 * rerun_variance, whole, out=np.zeros_like(whole), where=whole > 0)
    return np.round(np.clip(share, 0.0, 1.0) / SHARE_STEP) * SHARE_STEP


def share_in(found: Noise, control_runs: Iterable[int]) -> float:
    """The share of a wave; 0 where nothing was run again."""
    if not found.rerun_df or found.pair_sd is None:
        return 0.0
    inverse_runs = mean([1 / runs for runs in control_runs])
    return float(rerun_share(np.array(found.rerun_sd**2), np.array(found.pair_sd**2), inverse_runs))


def null_draws(
    shape: tuple[tuple[int, ...], ...], control: tuple[int, ...], draws: int, share: float = 1.0
) -> np.ndarray:
    """|t| of every arm [draws, arms] in waves without effects.

    shape: each arm's seeds, as places in `control`; control: how many runs of the control each seed has;
    share: of the control's variance that its reruns average out, as rerun_share tells it.
    """
    rng = np.random.default_rng(1434)
    runs = np.array(control)
    control_means = rng.standard_normal((draws, len(control))) * np.sqrt(1 - share + share / runs)
    means = np.empty((draws, len(shape)))
    variances = np.empty((draws, len(shape)))
    for arm, seeds in enumerate(shape):
        pairs = rng.standard_normal((draws, len(seeds))) - control_means[:, seeds]
        means[:, arm] = pairs.mean(1)
        variances[:, arm] = pairs.var(1, ddof=1)
    pooled = pooled_variance(variances, [len(seeds) - 1 for seeds in shape])
    squared_spread = np.maximum(variances, pooled[:, None])
    counts_of_pairs = np.sqrt([len(seeds) for seeds in shape])
    return np.abs(means) * counts_of_pairs / np.sqrt(squared_spread)


class Null(NamedTuple):
    """What waves without effects give."""

    sorted_ts: np.ndarray  # [draws, arms], each arm's |t| ascending
    ps: np.ndarray  # [draws, arms], each wave's p's: the rank of its t among that arm's draws
    reaches: list[tuple[float, float]]  # by arm: |t| that 5 % of its draws pass, and that any arm does in 5 %


@lru_cache(maxsize=64)
def null(
    shape: tuple[tuple[int, ...], ...], control: tuple[int, ...], share: float = 1.0, draws: int = DRAWS
) -> Null:
    """Arguments as for null_draws."""
    ts = null_draws(shape, control, draws, share)
    ps = stats.rankdata(-ts, axis=0, method="max") / draws
    rarest = np.quantile(ps.min(1), LEVEL)
    reaches = np.quantile(ts, [1 - LEVEL, 1 - rarest], axis=0).T.tolist()
    return Null(np.sort(ts, axis=0), ps, [(own, family) for own, family in reaches])


def p_of(t, sorted_ts: np.ndarray):
    """How often waves without effects give an arm such a |t| or a larger one; of a number or an array."""
    draws = len(sorted_ts)
    above = draws - np.searchsorted(sorted_ts, t)
    return (1 + above) / (1 + draws)


def step_down(ps: Sequence[float], null_ps: np.ndarray) -> list[float]:
    """Family-wise p of each arm: how often one of the arms that are not yet named goes so low by luck."""
    order = np.argsort(ps, kind="stable")
    from_last = null_ps[:, order[::-1]]
    least = np.minimum.accumulate(from_last, axis=1)[:, ::-1]  # of this arm and those after it
    adjusted = [1.0] * len(ps)
    highest = 0.0
    for place, arm in enumerate(order):
        as_low = np.count_nonzero(least[:, place] <= ps[arm])
        highest = max(highest, (1 + as_low) / (1 + len(null_ps)))
        adjusted[arm] = min(1.0, highest)
    return adjusted


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, for tests whose dependence is not known."""
    adjusted = [1.0] * len(ps)
    highest = 0.0
    for place, index in enumerate(np.argsort(ps, kind="stable")):
        highest = max(highest, (len(ps) - place) * ps[index])
        adjusted[index] = min(1.0, highest)
    return adjusted


class Judged(NamedTuple):
    """An arm's test. error: of its mean; the reaches: half the widths of its intervals, in errors."""

    error: float
    t: float
    p: float
    p_family: float
    reach: float
    family_reach: float


def t_of(difference: float, error: float) -> float:
    """|difference| in errors; without any spread 0 or infinite."""
    if error:
        return abs(difference) / error
    return math.inf if difference else 0.0


def judge(pairs: Mapping[str, BySeed], control_runs: Mapping[int, int], found: Noise) -> dict[str, Judged]:
    """Of the arms with two pairs or more. control_runs: how many runs of the control each seed has."""
    several = {arm: list(values.values()) for arm, values in pairs.items() if len(values) > 1}
    if not several:
        return {}
    places = {seed: place for place, seed in enumerate(control_runs)}
    shape = tuple(tuple(places[seed] for seed in pairs[arm]) for arm in several)
    runs = tuple(control_runs.values())
    drawn = null(shape, runs, share_in(found, runs))
    errors = []
    ts = []
    ps = []
    for place, values in enumerate(several.values()):
        error = max(stdev(values), found.pair_sd) / math.sqrt(len(values))
        t = t_of(mean(values), error)
        errors.append(error)
        ts.append(t)
        ps.append(float(p_of(t, drawn.sorted_ts[:, place])))
    families = step_down(ps, drawn.ps)
    judged = {}
    for place, arm in enumerate(several):
        reach, family_reach = drawn.reaches[place]
        judged[arm] = Judged(errors[place], ts[place], ps[place], families[place], reach, family_reach)
    return judged


def verdict(middle: float, p_family: float | None) -> str:
    """The one place where the words come from."""
    if p_family is None:
        return UNDECIDED
    if p_family >= LEVEL:
        return INSIDE
    return BETTER if middle < 0 else WORSE


class Column(NamedTuple):
    """A mean difference by another yardstick, over n pairs; how it was read."""

    mean: float
    n: int
    how: str  # final: scores of the packed models; curve: validation curves of the live ones


@dataclass(frozen=True)
class Effect:
    """An arm against the control of its wave."""

    arm: str
    change: dict[str, str]
    hypothesis: str
    runs: int  # planned, whatever became of them
    pairs: BySeed
    mean: float | None
    sd: float | None
    p: float | None
    p_family: float | None
    interval: Interval | None  # 95 %
    family: Interval | None  # that holds for all arms of 95 % of waves
    verdict: str
    same_steps: Column | None
    same_time: Column | None

    @property
    def n(self) -> int:
        return len(self.pairs)


def effects(rows: Iterable[Row]) -> list[Effect]:
    """Every arm of one wave in one regime, in the wave's order."""
    rows = latest(rows)
    if len({row.get("wave") for row in rows}) > 1:
        raise UserError("runs of several waves in one table")
    require_one_regime(valid(rows))
    pairs = differences(rows)
    control = control_scores(rows)
    control_runs = {seed: len(values) for seed, values in control.items()}
    judged = judge(pairs, control_runs, noise_of(pairs, control))
    return [effect(rows, arm, values, judged.get(arm)) for arm, values in pairs.items()]


def around(middle: float, test: Judged, reach: float) -> Interval:
    """The interval that reaches so many errors to both sides."""
    return Interval(middle - reach * test.error, middle + reach * test.error)


def effect(rows: list[Row], arm: str, pairs: BySeed, test: Judged | None) -> Effect:
    """One arm's, from its pairs and their test; without a test it is undecided."""
    own = [row for row in rows if str(row.get("arm")) == arm]
    values = list(pairs.values())
    middle = mean(values) if values else None
    return Effect(
        arm=arm,
        change=change(own[0]),
        hypothesis=str(own[0].get("hypothesis") or ""),
        runs=len(own),
        pairs=pairs,
        mean=middle,
        sd=stdev(values) if test else None,
        p=test.p if test else None,
        p_family=test.p_family if test else None,
        interval=around(middle, test, test.reach) if test else None,
        family=around(middle, test, test.family_reach) if test else None,
        verdict=verdict(middle or 0.0, test.p_family if test else None),
        same_steps=column(rows, arm, same_steps),
        same_time=column(rows, arm, same_time),
    )


def unsteady(found: Iterable[Effect], floor: float) -> list[str]:
    """Arms whose seeds differ so much more than the floor that their p is a hopeful one."""
    return [e.arm for e in found if e.sd is not None and e.sd > UNSTEADY * floor > 0]


# Equal steps, equal time


def points(row: Row, axis: int) -> list[tuple[float, float]]:
    """(step or training ms, val_bpb) of the run's validations, ascending; axis: 0 for steps, 1 for time."""
    found = [(number(point[axis]), number(point[2])) for point in row.get("curve") or [] if len(point) > 2]
    return sorted({x: y for x, y in found if x is not None and y is not None}.items())


def read_curve(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """bpb at `at`, between points in the axis's logarithm; None outside, or where points are too sparse."""
    for (left, low), (right, high) in zip(curve, [*curve[1:], curve[-1]], strict=True):
        if at in (left, right):
            return low if at == left else high
        if left < at < right:
            if left <= 0 or right - left > WIDEST_GAP * at:
                return None
            return low + (high - low) * math.log(at / left) / math.log(right / left)
    return None


def by_curves(arm: Row, control: Row, axis: int) -> tuple[float, str] | None:
    """Difference where the shorter of two curves ends, whatever the runs did after."""
    curves = points(arm, axis), points(control, axis)
    if not all(curves):
        return None
    at = min(curve[-1][0] for curve in curves)
    ours, theirs = (read_curve(curve, at) for curve in curves)
    return None if at <= 0 or None in (ours, theirs) else (ours - theirs, "curve")


def same_steps(arm: Row, control: Row) -> tuple[float, str] | None:
    """Difference at equal steps: the final scores, or the curves where the slower run ended."""
    steps = number(arm.get("steps")), number(control.get("steps"))
    if None not in steps and steps[0] == steps[1]:
        return arm["val_bpb"] - control["val_bpb"], "final"
    return by_curves(arm, control, 0)


def same_time(arm: Row, control: Row) -> tuple[float, str] | None:
    """Difference at equal training time, where the run that took less of it ended."""
    return by_curves(arm, control, 1)


def column(rows: Iterable[Row], arm: str, compare: Callable) -> Column | None:
    """Mean of `compare` over seeds; over the control's reruns within a seed. None unless a pair can tell."""
    ours, theirs = by_seed(rows, arm), by_seed(rows, CONTROL)
    found, hows = [], set()
    for seed in ours.keys() & theirs.keys():
        told = [compare(a, c) for a in ours[seed] for c in theirs[seed]]
        told = [pair for pair in told if pair]
        if told:
            found.append(mean([value for value, _ in told]))
            hows |= {how for _, how in told}
    return Column(mean(found), len(found), "+".join(sorted(hows))) if found else None


# Dose and response


@dataclass(frozen=True)
class Trend:
    """A knob at three values or more. means: against the lowest; slope: bpb per unit, or per doubling."""

    knob: str
    levels: list[float]
    means: list[float]
    seeds: int
    page_p: float  # Page's test, both directions
    slope: float
    slope_p: float | None  # t over the seeds' own slopes
    unit: str
    p_family: float | None = None  # Holm over the wave's trends

    @property
    def best(self) -> float:
        return self.levels[int(np.argmin(self.means))]

    @property
    def verdict(self) -> str:
        """Of the trend; a slope's sign is told only where Page's test sees order."""
        if self.seeds < 2:
            return UNDECIDED
        p = self.page_p if self.p_family is None else self.p_family
        return "no trend" if p >= LEVEL else "falls" if self.slope < 0 else "rises"


def doses(rows: Iterable[Row]) -> dict[str, dict[float, BySeed]]:
    """knob -> value -> seed -> score, of knobs that arms change alone, to numbers; and the control's."""
    rows, found = valid(rows), {}
    for arm in arms_of(rows):
        row = next(row for row in rows if str(row.get("arm")) == arm)
        knobs = change(row)
        value = number(next(iter(knobs.values()))) if len(knobs) == 1 else None
        if value is not None:
            found.setdefault(next(iter(knobs)), {})[value] = scores(rows, arm)
    control = next((row for row in rows if row.get("arm") == CONTROL), None)
    for knob, levels in found.items():
        own = number(setting(control, knob)) if control else None
        if own is not None:
            levels.setdefault(own, scores(rows, CONTROL))
        if max(levels) > 0:  # a negative value beside others is a code word, as -1 for automatic
            found[knob] = {value: by for value, by in levels.items() if value >= 0}
    return found


def trend(knob: str, levels: Mapping[float, BySeed]) -> Trend | None:
    """None for fewer than three values, or without a seed that has them all."""
    values = sorted(levels)
    seeds = sorted(set.intersection(*(set(levels[value]) for value in values))) if values else []
    if len(values) < 3 or not seeds:
        return None
    table = np.array([[levels[value][seed] for value in values] for seed in seeds])
    doubling = values[0] > 0 and values[-1] >= 4 * values[0]
    x = np.log2(values) if doubling else np.array(values)
    slopes = [float(stats.linregress(x, line).slope) for line in table]
    ups = [stats.page_trend_test(table[:, ::way], ranked=False).pvalue for way in (1, -1)]
    with np.errstate(all="ignore"):
        p = float(stats.ttest_1samp(slopes, 0.0).pvalue) if len(slopes) > 1 and stdev(slopes) else None
    means = (table - table[:, :1]).mean(0).tolist()
    page = float(min(1.0, 2 * min(ups)))
    return Trend(knob, values, means, len(seeds), page, mean(slopes), p, "doubling" if doubling else "unit")


def trends(rows: Iterable[Row]) -> list[Trend]:
    """All of a wave, with Holm's correction over them."""
    found = [some for knob, levels in doses(rows).items() if (some := trend(knob, levels))]
    return [
        Trend(**(vars(some) | dict(p_family=p)))
        for some, p in zip(found, holm([some.page_p for some in found]), strict=True)
    ]


# Parts and the whole


class Contrast(NamedTuple):
    """A mean over seeds with its 95 % interval (Student's t; None below two seeds), and how many seeds."""

    mean: float
    interval: Interval | None
    n: int

    @property
    def clear(self) -> bool:
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


def contrast(values: BySeed) -> Contrast | None:
    some = list(values.values())
    return Contrast(mean(some), mean_interval(some) if len(some) > 1 else None, len(some)) if some else None


class Part(NamedTuple):
    """One change: what it does alone, what it does when all the others are there, and the latter less the
    former. Below zero is a gain."""

    name: str
    alone: Contrast | None
    last: Contrast | None
    interaction: Contrast | None


@dataclass(frozen=True)
class Ablation:
    """A whole and its parts. interaction: the whole less the sum of its parts, each alone."""

    whole_name: str
    parts: list[Part]
    whole: Contrast | None
    total: Contrast | None
    interaction: Contrast | None


def part(name: str, alone: BySeed, last: BySeed) -> Part:
    return Part(name, contrast(alone), contrast(last), contrast(subtract(last, alone)))


def summed(parts: Sequence[BySeed]) -> BySeed:
    """By seed, where all parts have it."""
    seeds = set.intersection(*map(set, parts)) if parts else set()
    return {seed: math.fsum(values[seed] for values in parts) for seed in sorted(seeds)}


def summarise(name: str, whole: BySeed, alone: Mapping[str, BySeed], last: Mapping[str, BySeed]) -> Ablation:
    """From differences by seed; the sum is over all of `alone`, of seeds that all of them have."""
    total = summed(list(alone.values()))
    names = dict.fromkeys([*alone, *last])
    parts = [part(one, alone.get(one, {}), last.get(one, {})) for one in names]
    return Ablation(name, parts, contrast(whole), contrast(total), contrast(subtract(whole, total)))


def ablation(rows: Iterable[Row]) -> Ablation | None:
    """Within one wave. The whole is an arm whose change is that of two or more other arms together; an arm
    with all of it but one part gives that part's worth in the presence of the others. Where the control is a
    full stack whose arms take parts out, `alone` is leaving one out, and `last` leaving out the last one."""
    pairs, words = differences(rows := latest(rows)), {}
    for row in rows:
        words.setdefault(str(row.get("arm")), frozenset(change(row).items()))
    for name in sorted(pairs, key=lambda arm: -len(words[arm])):
        inside = {arm: words[arm] for arm in pairs if words[arm] and words[arm] < words[name]}
        parts = {arm: own for arm, own in inside.items() if not any(o < own for o in inside.values())}
        exact = sum(map(len, parts.values())) == len(words[name]) == len(frozenset().union(*parts.values()))
        names = {own: arm for arm, own in parts.items()} if exact else {}
        last = {}
        for arm, own in inside.items():
            missing = words[name] - own
            if not exact or missing in names:
                label = names.get(missing) or " ".join(f"{k}={v}" for k, v in sorted(missing))
                last[label] = subtract(pairs[name], pairs[arm])
        if len(inside) > 1:
            return summarise(name, pairs[name], {arm: pairs[arm] for arm in names.values()}, last)
    return None


def add_and_drop(adds: Iterable[Row], drops: Iterable[Row]) -> Ablation | None:
    """Across two waves: in one, arms add a part to a base; in the other, arms take the part out of the stack,
    which is its control. A part is a set of knobs whose values go forth in one and back in the other."""
    adds, drops = valid(adds), valid(drops)
    bases = [next((row for row in rows if row.get("arm") == CONTROL), None) for rows in (adds, drops)]
    if None in bases:
        return None
    forth, back = differences(adds), differences(drops)
    alone, last = {}, {}
    for (arm, pairs), (other, taken) in ((a, b) for a in forth.items() for b in back.items()):
        ours, theirs = (
            change(next(row for row in rows if str(row.get("arm")) == name))
            for rows, name in ((adds, arm), (drops, other))
        )
        if ours and ours.keys() == theirs.keys() and all(
            same_value(ours[k], setting(bases[1], k)) and same_value(theirs[k], setting(bases[0], k))
            for k in ours
        ):  # fmt: skip
            alone[arm], last[arm] = pairs, {seed: -value for seed, value in taken.items()}
    whole = subtract(scores(drops, CONTROL), scores(adds, CONTROL))
    return summarise("the stack", whole, alone, last) if alone else None


def same_value(ours: object, theirs: object) -> bool:
    """Of knobs: 1, 1.0 and True are one value, and so are "a,b" and a list of both."""
    plain = [
        int(v) if isinstance(v, bool) else ",".join(map(str, v)) if isinstance(v, list | tuple) else v
        for v in (ours, theirs)
    ]
    a, b = map(number, plain)
    return a == b if None not in (a, b) else str(plain[0]) == str(plain[1])


# Horizons


@dataclass(frozen=True)
class Rung:
    """An effect at one length of run."""

    length: float  # steps asked for, or seconds
    effect: Contrast


@dataclass(frozen=True)
class Ladder:
    """One change at several lengths. slope: bpb per doubling, over the seeds that have all lengths."""

    change: str
    parent: str  # the preset that the change was made to
    unit: str
    rungs: list[Rung]
    slope: Contrast | None

    @property
    def flips(self) -> bool:
        """The shortest and another run disagree in sign, both with intervals clear of zero."""
        return any(
            a.effect.clear and b.effect.clear and a.effect.mean * b.effect.mean < 0
            for a, b in combinations(self.rungs, 2)
        )

    @property
    def says(self) -> str:
        """Generated as verdicts are: one sign and sign flips need intervals clear of zero."""
        signs = {math.copysign(1, rung.effect.mean) for rung in self.rungs}
        unsure = any(not rung.effect.clear for rung in self.rungs)
        return "sign flips" if self.flips else "one sign" if len(signs) == 1 and not unsure else "unclear"


HORIZON = "iterations", "max_wallclock_seconds"
# Of a run's config, what does not make its base another one.
PLACES = HORIZON + (
    "seed", "run_id", "out_dir", "data_path", "tokenizer_path", "resume", "checkpoint_seconds",
    "val_loss_every", "train_log_every",
)  # fmt: skip


def horizon(row: Row) -> tuple[float, str] | None:
    """(length, unit): the clock where there is one, else the steps asked for."""
    clock, steps = number(setting(row, HORIZON[1])), number(setting(row, HORIZON[0]))
    if clock and not (steps and steps <= (number(row.get("steps")) or 0)):
        return clock, "seconds"
    return (steps, "steps") if steps else None


def rest(row: Row) -> str:
    """The arm's change but for the length of the run; empty for a control."""
    return " ".join(f"{knob}={value}" for knob, value in change(row).items() if knob.lower() not in HORIZON)


def base_of(row: Row) -> str:
    """Of a control: all knobs but the length, the seed and the places; what its arms are changes of."""
    config = {name: value for name, value in (row.get("config") or {}).items() if name not in PLACES}
    return json.dumps(config, sort_keys=True, default=str)


def ladders(rows: Iterable[Row]) -> list[Ladder]:
    """Effects against length. Rows may be of several waves, of which those with one base make rungs together,
    or of one whose arms set ITERATIONS too: an arm without any other change is the control there."""
    require_one_regime(rows := valid(rows), HORIZON)
    groups: dict[tuple, dict[str, dict[int, list[float]]]] = {}
    bases: dict[tuple, str] = {}
    parents: dict[str, str] = {}
    for row in rows:
        if at := horizon(row):
            key, arm = (*at, row.get("wave")), rest(row)
            seeds = groups.setdefault(key, {}).setdefault(arm, {})
            seeds.setdefault(row.get("seed"), []).append(row["val_bpb"])
            if not arm:
                bases[key] = base_of(row)
                parents.setdefault(bases[key], str(row.get("parent") or ""))
    found: dict[tuple[str, str, str], dict[float, BySeed]] = {}
    for key, arms in groups.items():
        averages = {arm: {seed: mean(v) for seed, v in seeds.items()} for arm, seeds in arms.items()}
        for arm, values in averages.items():
            if pairs := subtract(values, averages.get("", {})) if arm else {}:
                rungs = found.setdefault((arm, key[1], bases[key]), {})
                rungs.setdefault(key[0], {}).update(pairs)
    return [
        ladder(arm, parents[base], unit, rungs)
        for (arm, unit, base), rungs in found.items()
        if len(rungs) > 1
    ]


def ladder(name: str, parent: str, unit: str, lengths: Mapping[float, BySeed]) -> Ladder:
    """From length -> seed -> difference. The slope is fitted to each seed for itself."""
    order = sorted(lengths)
    seeds = set.intersection(*(set(lengths[length]) for length in order))
    x = np.log2(order)
    slopes = {
        seed: float(stats.linregress(x, [lengths[length][seed] for length in order]).slope)
        for seed in sorted(seeds)
    }
    rungs = [Rung(length, contrast(lengths[length])) for length in order]
    return Ladder(name, parent, unit, rungs, contrast(slopes))


# The held-out half


class HeldOut(NamedTuple):
    """A finalist where it was chosen and on text that chose nothing, over the same pairs."""

    arm: str
    selection: Contrast
    held_out: Contrast
    shrink: Contrast  # held-out less selection: above zero is what the choice had flattered


def held_out(rows: Iterable[Row]) -> list[HeldOut]:
    """Of the arms that were scored there, best on the selection text first."""
    chosen = differences(rows)
    found = []
    for arm, values in differences(rows, lambda row: number(row.get("held_out_val_bpb"))).items():
        there = {seed: chosen[arm][seed] for seed in values}
        if values:
            found.append(HeldOut(arm, *map(contrast, (there, values, subtract(values, there)))))
    return sorted(found, key=lambda one: one.selection.mean)
