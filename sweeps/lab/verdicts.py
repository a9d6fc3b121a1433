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
3 to 9 %).

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
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from data.user_error import UserError
from sweeps.lab.run_state import UNFINISHED, RunState
from sweeps.lab.statistics import Interval, mean, mean_interval, stdev

Row = Mapping[str, Any]
BySeed = dict[int, float]
Facts = dict[str, object]  # of a regime
Curve = Sequence[tuple[float, float]]

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
        as_float = float(value)
    except ValueError:
        return None
    return as_float if math.isfinite(as_float) else None


def run_id(row: Row) -> str:
    if row.get("run_id"):
        return row["run_id"]
    rerun = f".r{row['rerun']}" if row.get("rerun") else ""
    return f"{row.get('wave')}.{row.get('arm')}.{row.get('seed')}{rerun}"


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
    for source in ("config", "change", "env"):
        for name, value in (row.get(source) or {}).items():
            if name.lower() == knob.lower():
                return value
    return None


def change(row: Row) -> dict[str, str]:
    """The arm's diff from the base, in capitals and as text."""
    return {knob.upper(): str(value) for knob, value in sorted((row.get("change") or {}).items())}


def first_of(rows: Iterable[Row], arm: str) -> Row | None:
    """The first row of an arm."""
    for row in rows:
        if str(row.get("arm")) == arm:
            return row
    return None


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


def regime(row: Row, free: Iterable[str] = ()) -> Facts:
    """What a run must share with those it is compared with; None where unknown, the arm's own, or `free`."""
    facts = {name: row.get(name) for name in MACHINE}
    varied = {knob.lower() for knob in change(row)} | set(free)
    for name in SIZES:
        facts[name] = None if name in varied else number(setting(row, name))
    return facts


def agree(ours: Mapping[str, object], theirs: Mapping[str, object]) -> bool:
    return not clashes(ours, theirs)


def clashes(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """The facts that both know and that differ."""
    return [
        name
        for name, value in ours.items()
        if value is not None and theirs[name] is not None and value != theirs[name]
    ]


def filled(ours: Mapping[str, object], theirs: Mapping[str, object]) -> Facts:
    """Ours, and theirs where ours knows nothing."""
    return {name: value if ours.get(name) is None else ours[name] for name, value in theirs.items()}


@dataclass
class Group:
    """Rows of one regime, and what is known of it."""

    facts: Facts
    rows: list[Row]


def home(groups: list[Group], facts: Facts) -> Group:
    """The newest group that agrees with the facts, or a new one; it knows the facts from now on."""
    for group in reversed(groups):
        if agree(facts, group.facts):
            group.facts |= filled(group.facts, facts)
            return group
    groups.append(Group(dict(facts), []))
    return groups[-1]


def by_regime(rows: Iterable[Row], free: Iterable[str] = ()) -> list[list[Row]]:
    """The rows in groups that agree wherever both sides know; a row that knows nothing joins the last."""
    rows = latest(rows)
    groups: list[Group] = []
    for row in sorted(rows, key=lambda row: row.get("code_sha256") is None):  # those that know, first
        home(groups, regime(row, free)).rows.append(row)
    order = {id(row): index for index, row in enumerate(rows)}
    return [sorted(group.rows, key=lambda row: order[id(row)]) for group in groups]


def joined(parts: Iterable[list[Row]]) -> list[list[Row]]:
    """The regimes of several waves, those that agree in one list.

    The control speaks first for its wave: what an arm's own knobs change must not part it from its control.
    """
    groups: list[Group] = []
    for rows in parts:
        facts: Facts = {}
        for row in sorted(rows, key=lambda row: row.get("arm") != CONTROL):
            facts = filled(facts, regime(row))
        home(groups, facts).rows.extend(rows)
    return [group.rows for group in groups]


def require_one_regime(rows: Iterable[Row], free: Iterable[str] = ()) -> None:
    """Raises UserError, which names the facts that differ."""
    groups = by_regime(rows, free)
    if len(groups) < 2:
        return
    differing = clashes(regime(groups[0][0], free), regime(groups[1][0], free))
    raise UserError(f"runs of {len(groups)} regimes in one table; they differ in {', '.join(differing)}")


def sharing(rows: Iterable[Row]) -> int:
    """How many runs had another one beside them on the machine for part of their time."""
    spans = []
    for row in latest(rows):
        start = number(row.get("started"))
        end = number(row.get("ended"))
        if start is not None and end is not None:
            spans.append((start, end))
    count = 0
    for index, (start, end) in enumerate(spans):
        others = spans[:index] + spans[index + 1 :]
        count += any(start < their_end and their_start < end for their_start, their_end in others)
    return count


def step_limited(rows: Iterable[Row]) -> bool | None:
    """Did all of the runs end by their step count, not by a clock? None where nothing says so."""
    ended_by_steps = []
    for row in rows:
        steps = number(row.get("steps"))
        most = number(setting(row, "iterations"))
        if steps is not None and most is not None:
            ended_by_steps.append(steps >= most)
    return all(ended_by_steps) if ended_by_steps else None


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
    total = pair_variance + (1 - inverse_runs) * rerun_variance
    share = np.divide(2 * rerun_variance, total, out=np.zeros_like(total), where=total > 0)
    return np.round(np.clip(share, 0.0, 1.0) / SHARE_STEP) * SHARE_STEP


def share_in(wave_noise: Noise, control_runs: Iterable[int]) -> float:
    """The share of a wave; 0 where nothing was run again."""
    if not wave_noise.rerun_df or wave_noise.pair_sd is None:
        return 0.0
    rerun_variance = np.array(wave_noise.rerun_sd**2)
    pair_variance = np.array(wave_noise.pair_sd**2)
    inverse_runs = mean([1 / runs for runs in control_runs])
    return float(rerun_share(rerun_variance, pair_variance, inverse_runs))


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
    for rank, arm in enumerate(order):
        as_low = np.count_nonzero(least[:, rank] <= ps[arm])
        highest = max(highest, (1 + as_low) / (1 + len(null_ps)))
        adjusted[arm] = min(1.0, highest)
    return adjusted


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, for tests whose dependence is not known."""
    adjusted = [1.0] * len(ps)
    highest = 0.0
    for rank, index in enumerate(np.argsort(ps, kind="stable")):
        highest = max(highest, (len(ps) - rank) * ps[index])
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


def judge(
    pairs: Mapping[str, BySeed], control_runs: Mapping[int, int], wave_noise: Noise
) -> dict[str, Judged]:
    """Of the arms with two pairs or more. control_runs: how many runs of the control each seed has."""
    several = {arm: list(values.values()) for arm, values in pairs.items() if len(values) > 1}
    if not several:
        return {}
    places = {seed: index for index, seed in enumerate(control_runs)}
    shape = tuple(tuple(places[seed] for seed in pairs[arm]) for arm in several)
    runs = tuple(control_runs.values())
    without_effects = null(shape, runs, share_in(wave_noise, runs))
    errors = []
    ts = []
    ps = []
    for index, values in enumerate(several.values()):
        error = max(stdev(values), wave_noise.pair_sd) / math.sqrt(len(values))
        t = t_of(mean(values), error)
        errors.append(error)
        ts.append(t)
        ps.append(float(p_of(t, without_effects.sorted_ts[:, index])))
    families = step_down(ps, without_effects.ps)
    judged = {}
    for index, arm in enumerate(several):
        reach, family_reach = without_effects.reaches[index]
        judged[arm] = Judged(errors[index], ts[index], ps[index], families[index], reach, family_reach)
    return judged


def verdict(middle: float, p_family: float | None) -> str:
    """The one place where the words come from."""
    if p_family is None:
        return UNDECIDED
    if p_family >= LEVEL:
        return INSIDE
    return BETTER if middle < 0 else WORSE


class Reading(NamedTuple):
    """A difference of one pair of runs, and how it was read."""

    difference: float
    how: str  # final: scores of the packed models; curve: validation curves of the live ones


class Column(NamedTuple):
    """A mean difference by another yardstick, over n pairs; how it was read."""

    mean: float
    n: int
    how: str  # as of a reading; both, where seeds differ in it


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
    arm_rows = [row for row in rows if str(row.get("arm")) == arm]
    values = list(pairs.values())
    middle = mean(values) if values else None
    return Effect(
        arm=arm,
        change=change(arm_rows[0]),
        hypothesis=str(arm_rows[0].get("hypothesis") or ""),
        runs=len(arm_rows),
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


def unsteady(of_arms: Iterable[Effect], floor: float) -> list[str]:
    """Arms whose seeds differ so much more than the floor that their p is a hopeful one."""
    return [e.arm for e in of_arms if e.sd is not None and e.sd > UNSTEADY * floor > 0]


# Equal steps, equal time

STEPS = 0  # the axes of a curve's points
TIME = 1


def points(row: Row, axis: int) -> Curve:
    """(step or training ms, val_bpb) of the run's validations, ascending; axis: STEPS or TIME."""
    values = {}
    for point in row.get("curve") or []:
        if len(point) > 2:
            x = number(point[axis])
            y = number(point[2])
            if x is not None and y is not None:
                values[x] = y
    return sorted(values.items())


def read_curve(curve: Curve, at: float) -> float | None:
    """bpb at `at`, between points in the axis's logarithm; None outside, or where points are too sparse."""
    for x, y in curve:
        if x == at:
            return y
    for (left, low), (right, high) in pairwise(curve):
        if left < at < right:
            if left <= 0 or right - left > WIDEST_GAP * at:
                return None
            return low + (high - low) * math.log(at / left) / math.log(right / left)
    return None


def by_curves(arm: Row, control: Row, axis: int) -> Reading | None:
    """Difference where the shorter of two curves ends, whatever the runs did after."""
    arm_curve = points(arm, axis)
    control_curve = points(control, axis)
    if not arm_curve or not control_curve:
        return None
    at = min(arm_curve[-1][0], control_curve[-1][0])
    ours = read_curve(arm_curve, at)
    theirs = read_curve(control_curve, at)
    if at <= 0 or ours is None or theirs is None:
        return None
    return Reading(ours - theirs, "curve")


def same_steps(arm: Row, control: Row) -> Reading | None:
    """Difference at equal steps: the final scores, or the curves where the slower run ended."""
    arm_steps = number(arm.get("steps"))
    if arm_steps is not None and arm_steps == number(control.get("steps")):
        return Reading(arm["val_bpb"] - control["val_bpb"], "final")
    return by_curves(arm, control, STEPS)


def same_time(arm: Row, control: Row) -> Reading | None:
    """Difference at equal training time, where the run that took less of it ended."""
    return by_curves(arm, control, TIME)


def column(rows: Iterable[Row], arm: str, compare: Callable[[Row, Row], Reading | None]) -> Column | None:
    """Mean of `compare` over seeds; over the control's reruns within a seed. None unless a pair can tell."""
    ours = by_seed(rows, arm)
    theirs = by_seed(rows, CONTROL)
    means = []
    ways = set()
    for seed in ours.keys() & theirs.keys():
        readings = [compare(run, control) for run in ours[seed] for control in theirs[seed]]
        readings = [reading for reading in readings if reading]
        if readings:
            means.append(mean([reading.difference for reading in readings]))
            ways |= {reading.how for reading in readings}
    if not means:
        return None
    return Column(mean(means), len(means), "+".join(sorted(ways)))


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
        if p >= LEVEL:
            return "no trend"
        return "falls" if self.slope < 0 else "rises"


def doses(rows: Iterable[Row]) -> dict[str, dict[float, BySeed]]:
    """knob -> value -> seed -> score, of knobs that arms change alone, to numbers; and the control's."""
    rows = valid(rows)
    scores_of: dict[str, dict[float, BySeed]] = {}
    for arm in arms_of(rows):
        knobs = change(first_of(rows, arm))
        if len(knobs) == 1:
            ((knob, text),) = knobs.items()
            value = number(text)
            if value is not None:
                scores_of.setdefault(knob, {})[value] = scores(rows, arm)
    control = first_of(rows, CONTROL)
    for knob, levels in scores_of.items():
        own = number(setting(control, knob)) if control else None
        if own is not None:
            levels.setdefault(own, scores(rows, CONTROL))
        if max(levels) > 0:  # a negative value beside others is a code word, as -1 for automatic
            scores_of[knob] = {value: levels[value] for value in levels if value >= 0}
    return scores_of


def slopes_of(x: np.ndarray, table: np.ndarray) -> list[float]:
    """The slope of each line of the table over x."""
    return [float(stats.linregress(x, line).slope) for line in table]


def trend(knob: str, levels: Mapping[float, BySeed]) -> Trend | None:
    """None for fewer than three values, or without a seed that has them all."""
    values = sorted(levels)
    if len(values) < 3:
        return None
    seeds = sorted(set.intersection(*(set(levels[value]) for value in values)))
    if not seeds:
        return None
    table = np.array([[levels[value][seed] for value in values] for seed in seeds])
    is_by_doubling = values[0] > 0 and values[-1] >= 4 * values[0]
    slopes = slopes_of(np.log2(values) if is_by_doubling else np.array(values), table)
    p_rising = stats.page_trend_test(table, ranked=False).pvalue
    p_falling = stats.page_trend_test(table[:, ::-1], ranked=False).pvalue
    slope_p = None
    if len(slopes) > 1 and stdev(slopes):
        with np.errstate(all="ignore"):
            slope_p = float(stats.ttest_1samp(slopes, 0.0).pvalue)
    return Trend(
        knob=knob,
        levels=values,
        means=(table - table[:, :1]).mean(0).tolist(),
        seeds=len(seeds),
        page_p=float(min(1.0, 2 * min(p_rising, p_falling))),
        slope=mean(slopes),
        slope_p=slope_p,
        unit="doubling" if is_by_doubling else "unit",
    )


def trends(rows: Iterable[Row]) -> list[Trend]:
    """All of a wave, with Holm's correction over them."""
    of_knobs = [trend(knob, levels) for knob, levels in doses(rows).items()]
    of_knobs = [one for one in of_knobs if one]
    families = holm([one.page_p for one in of_knobs])
    return [replace(one, p_family=p) for one, p in zip(of_knobs, families, strict=True)]


# Parts and the whole


class Contrast(NamedTuple):
    """A mean over seeds with its 95 % interval (Student's t; None below two seeds), and how many seeds."""

    mean: float
    interval: Interval | None
    n: int

    @property
    def clear(self) -> bool:
        """The interval leaves out zero."""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


def contrast(differences_by_seed: BySeed) -> Contrast | None:
    values = list(differences_by_seed.values())
    if not values:
        return None
    interval = mean_interval(values) if len(values) > 1 else None
    return Contrast(mean(values), interval, len(values))


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
    if not parts:
        return {}
    seeds = set.intersection(*map(set, parts))
    return {seed: math.fsum(values[seed] for values in parts) for seed in sorted(seeds)}


def summarise(name: str, whole: BySeed, alone: Mapping[str, BySeed], last: Mapping[str, BySeed]) -> Ablation:
    """From differences by seed; the sum is over all of `alone`, of seeds that all of them have."""
    total = summed(list(alone.values()))
    names = dict.fromkeys([*alone, *last])
    parts = [part(one, alone.get(one, {}), last.get(one, {})) for one in names]
    return Ablation(name, parts, contrast(whole), contrast(total), contrast(subtract(whole, total)))


Words = frozenset  # of (knob, value): an arm's change


def words_of_arms(rows: Iterable[Row]) -> dict[str, Words]:
    """arm -> its change, as the first of its rows has it."""
    words: dict[str, Words] = {}
    for row in rows:
        words.setdefault(str(row.get("arm")), Words(change(row).items()))
    return words


def names_of_parts(stack: Words, inside: Mapping[str, Words]) -> dict[Words, str]:
    """change -> arm, of the arms inside the stack that have no arm inside them, if these add up to it.

    They add up if each word of the stack is in one of them, and in one only; else nothing is returned.
    """
    smallest = {arm: words for arm, words in inside.items() if not any(w < words for w in inside.values())}
    count = sum(len(words) for words in smallest.values())
    every_word = Words().union(*smallest.values())
    if not count == len(stack) == len(every_word):
        return {}
    return {words: arm for arm, words in smallest.items()}


def ablation(rows: Iterable[Row]) -> Ablation | None:
    """Within one wave. The whole is an arm whose change is that of two or more other arms together; an arm
    with all of it but one part gives that part's worth in the presence of the others. Where the control is a
    full stack whose arms take parts out, `alone` is leaving one out, and `last` leaving out the last one."""
    rows = latest(rows)
    pairs = differences(rows)
    words = words_of_arms(rows)
    for stack in sorted(pairs, key=lambda arm: -len(words[arm])):
        inside = {arm: words[arm] for arm in pairs if words[arm] and words[arm] < words[stack]}
        if len(inside) < 2:
            continue
        names = names_of_parts(words[stack], inside)
        last = {}
        for arm in inside:
            missing = words[stack] - words[arm]
            if names and missing not in names:
                continue
            label = names.get(missing) or " ".join(f"{knob}={value}" for knob, value in sorted(missing))
            last[label] = subtract(pairs[stack], pairs[arm])
        return summarise(stack, pairs[stack], {arm: pairs[arm] for arm in names.values()}, last)
    return None


def goes_forth_and_back(adds: Row, drops: Row, base: Row, stack: Row) -> bool:
    """Whether one arm sets knobs of the base to the stack's values, and the other sets them back."""
    forth = change(adds)
    back = change(drops)
    if not forth or forth.keys() != back.keys():
        return False
    for knob in forth:
        if not same_value(forth[knob], setting(stack, knob)):
            return False
        if not same_value(back[knob], setting(base, knob)):
            return False
    return True


def add_and_drop(adds: Iterable[Row], drops: Iterable[Row]) -> Ablation | None:
    """Across two waves: in one, arms add a part to a base; in the other, arms take the part out of the stack,
    which is its control. A part is a set of knobs whose values go forth in one and back in the other."""
    adds = valid(adds)
    drops = valid(drops)
    base = first_of(adds, CONTROL)
    stack = first_of(drops, CONTROL)
    if base is None or stack is None:
        return None
    added = differences(adds)
    dropped = differences(drops)
    alone = {}
    last = {}
    for arm in added:
        for other in dropped:
            if goes_forth_and_back(first_of(adds, arm), first_of(drops, other), base, stack):
                alone[arm] = added[arm]
                last[arm] = {seed: -value for seed, value in dropped[other].items()}
    whole = subtract(scores(drops, CONTROL), scores(adds, CONTROL))
    return summarise("the stack", whole, alone, last) if alone else None


def plain_value(value: object) -> object:
    """A knob's value without the ways to spell it: True as 1, a list as its words."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return value


def same_value(ours: object, theirs: object) -> bool:
    """Of knobs: 1, 1.0 and True are one value, and so are "a,b" and a list of both."""
    our_number = number(plain_value(ours))
    their_number = number(plain_value(theirs))
    if our_number is not None and their_number is not None:
        return our_number == their_number
    return str(plain_value(ours)) == str(plain_value(theirs))


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
        """Two runs disagree in sign, both with intervals clear of zero."""
        clear_means = [rung.effect.mean for rung in self.rungs if rung.effect.clear]
        return any(one * other < 0 for one, other in combinations(clear_means, 2))

    @property
    def says(self) -> str:
        """Generated as verdicts are: one sign and sign flips need intervals clear of zero."""
        if self.flips:
            return "sign flips"
        signs = {math.copysign(1, rung.effect.mean) for rung in self.rungs}
        all_clear = all(rung.effect.clear for rung in self.rungs)
        return "one sign" if len(signs) == 1 and all_clear else "unclear"


STEP_LIMIT = "iterations"
CLOCK = "max_wallclock_seconds"
HORIZON = (STEP_LIMIT, CLOCK)
# Of a run's config, what does not make its base another one.
PLACES = HORIZON + (
    "seed", "run_id", "out_dir", "data_path", "tokenizer_path", "resume", "checkpoint_seconds",
    "val_loss_every", "train_log_every",
)  # fmt: skip


def horizon(row: Row) -> tuple[float, str] | None:
    """(length, unit): the clock where there is one, else the steps asked for."""
    clock = number(setting(row, CLOCK))
    steps = number(setting(row, STEP_LIMIT))
    made_all_steps = steps and steps <= (number(row.get("steps")) or 0)
    if clock and not made_all_steps:
        return clock, "seconds"
    return (steps, "steps") if steps else None


def rest(row: Row) -> str:
    """The arm's change but for the length of the run; empty for a control."""
    return " ".join(f"{knob}={value}" for knob, value in change(row).items() if knob.lower() not in HORIZON)


def base_of(row: Row) -> str:
    """Of a control: all knobs but the length, the seed and the places; what its arms are changes of."""
    config = {name: value for name, value in (row.get("config") or {}).items() if name not in PLACES}
    return json.dumps(config, sort_keys=True, default=str)


@dataclass
class Length:
    """The runs of one wave at one length."""

    length: float
    unit: str
    base: str = ""  # of its control, as base_of tells it; there is none without a control
    scores: dict[str, dict[int, list[float]]] = field(default_factory=dict)  # by change and seed


def lengths_of(rows: Iterable[Row]) -> tuple[list[Length], dict[str, str]]:
    """All lengths of all waves, in the order met; and of each base the preset that it is of."""
    lengths: dict[tuple, Length] = {}
    parents: dict[str, str] = {}
    for row in rows:
        at = horizon(row)
        if at is None:
            continue
        one = lengths.setdefault((*at, row.get("wave")), Length(*at))
        arm = rest(row)
        scores_by_seed = one.scores.setdefault(arm, {})
        scores_by_seed.setdefault(row.get("seed"), []).append(row["val_bpb"])
        if not arm:
            one.base = base_of(row)
            parents.setdefault(one.base, str(row.get("parent") or ""))
    return list(lengths.values()), parents


def ladders(rows: Iterable[Row]) -> list[Ladder]:
    """Effects against length. Rows may be of several waves, of which those with one base make rungs together,
    or of one whose arms set ITERATIONS too: an arm without any other change is the control there."""
    rows = valid(rows)
    require_one_regime(rows, HORIZON)
    lengths, parents = lengths_of(rows)
    changes: dict[tuple[str, str, str], dict[float, BySeed]] = {}
    for one in lengths:
        averages = {}
        for arm, scores_by_seed in one.scores.items():
            averages[arm] = {seed: mean(values) for seed, values in scores_by_seed.items()}
        control = averages.get("", {})
        for arm, values in averages.items():
            pairs = subtract(values, control) if arm else {}
            if pairs:
                rungs = changes.setdefault((arm, one.unit, one.base), {})
                rungs.setdefault(one.length, {}).update(pairs)
    several = {key: rungs for key, rungs in changes.items() if len(rungs) > 1}
    return [ladder(arm, parents[base], unit, rungs) for (arm, unit, base), rungs in several.items()]


def ladder(name: str, parent: str, unit: str, lengths: Mapping[float, BySeed]) -> Ladder:
    """From length -> seed -> difference. The slope is fitted to each seed for itself."""
    order = sorted(lengths)
    seeds = sorted(set.intersection(*(set(lengths[length]) for length in order)))
    table = np.array([[lengths[length][seed] for length in order] for seed in seeds])
    slopes = dict(zip(seeds, slopes_of(np.log2(order), table), strict=True))
    rungs = [Rung(length, contrast(lengths[length])) for length in order]
    return Ladder(name, parent, unit, rungs, contrast(slopes))


# The held-out half


class HeldOut(NamedTuple):
    """A finalist where it was chosen and on text that chose nothing, over the same pairs."""

    arm: str
    selection: Contrast
    held_out: Contrast
    shrink: Contrast  # held-out less selection: above zero is what the choice had flattered


def held_out_score(row: Row) -> float | None:
    return number(row.get("held_out_val_bpb"))


def held_out(rows: Iterable[Row]) -> list[HeldOut]:
    """Of the arms that were scored there, best on the selection text first."""
    chosen = differences(rows)
    finalists = []
    for arm, values in differences(rows, held_out_score).items():
        if values:
            selection = {seed: chosen[arm][seed] for seed in values}
            flattered = subtract(values, selection)
            finalists.append(HeldOut(arm, contrast(selection), contrast(values), contrast(flattered)))
    return sorted(finalists, key=lambda one: one.selection.mean)
