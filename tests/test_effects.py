"""The statistics of waves against scipy, examples done by hand, and simulated waves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from data.user_error import UserError
from sweeps.lab import null_study
from sweeps.lab import verdicts as effects
from sweeps.lab.paths import SHIPPED_RESULTS
from sweeps.lab.verdicts import CONTROL
from tests.support.lab_rows import broken_rows, finished, row

SEEDS = 1337, 42, 7


def wave(scores: dict[str, list[float]], seeds=SEEDS, **more) -> list[dict]:
    """Rows of arms with their scores by seed."""
    return [
        row(arm, seed, bpb, **more)
        for arm, values in scores.items()
        for seed, bpb in zip(seeds, values, strict=False)
    ]


def null_wave(rng, arms: int, seeds: int = 3, shift: float = 0.0, **scale) -> list[dict]:
    """Arms that do nothing but for the first, which moves by `shift`; seeds differ far more than runs."""
    level = 2 + 0.01 * rng.standard_normal(seeds)
    noise = 0.002 * rng.standard_normal((arms + 1, seeds))
    for arm, factor in scale.items():
        noise[int(arm[1:])] *= factor
    noise[1] += shift
    names = [CONTROL, *(f"a{arm}" for arm in range(1, arms + 1))]
    return wave({name: list(level + noise[i]) for i, name in enumerate(names)}, range(seeds))


# Rows and counts


def test_the_latest_row_of_a_run_wins_and_stays_in_its_place():
    rows = [row("a", 1, None, state="running"), row("b", 1, 2.0), row("a", 1, 1.9)]
    assert [(r["arm"], r["val_bpb"]) for r in effects.latest(rows)] == [("a", 1.9), ("b", 2.0)]


def test_only_good_runs_are_ranked():
    rows = [row(CONTROL, 1, 2.0), row("a", 1, 1.9), *broken_rows(), row("odd", 1, float("nan"))]
    assert [r["arm"] for r in effects.valid(rows)] == [CONTROL, "a"]
    assert effects.differences(rows)["a"] == {1: pytest.approx(-0.1)}
    assert all(not pairs for arm, pairs in effects.differences(rows).items() if arm != "a")


def test_counts_are_derived():
    rows = [row(CONTROL, 1, None, state="running"), row(CONTROL, 1, 2.0), row("a", 1, 1.9), *broken_rows()]
    found = effects.counts(rows)
    assert found[:5] == (11, 10, 8, 5, 2)  # of all but the duplicate
    assert found.states == dict(
        planned=1, running=1, ok=2, crashed=1, untrained=1, truncated=1, diverged=1, over_size=1,
        duplicate=1, preempted=1, killed_early=1,
    )  # fmt: skip
    assert effects.counts([])[:5] == (0, 0, 0, 0, 0)


def test_a_number_is_finite_and_no_flag():
    values = [1, "0.5", True, None, "x", float("inf"), [1]]
    assert list(map(effects.number, values)) == [1.0, 0.5, None, None, None, None, None]


# Noise


def test_noise_by_hand():
    rows = wave(dict(control=[2.0, 2.1, 2.2], a=[2.01, 2.11, 2.24], b=[1.9, 2.02, 2.1], c=[2.0, 2.2, 2.1]))
    rows += [row(CONTROL, 1337, 2.002, rerun=1), row(CONTROL, 1337, 2.004, rerun=2)]
    found = effects.noise(rows)
    assert found.rerun_sd == pytest.approx(0.002) and found.rerun_df == 2  # 2.000 2.002 2.004
    pairs = {"a": [0.008, 0.01, 0.04], "b": [-0.102, -0.08, -0.1], "c": [-0.002, 0.1, -0.1]}
    variances = sorted(np.var(values, ddof=1) for values in pairs.values())
    expected = math.sqrt(variances[1] / (stats.chi2.median(2) / 2))
    assert found.pair_sd == pytest.approx(expected) and found.pair_arms == 3
    assert found.floor == found.pair_sd
    assert found.seed_sd == pytest.approx(math.sqrt(expected**2 - 2 * 0.002**2))


def test_noise_of_reruns_alone_is_a_floor_too():
    rows = [row(CONTROL, 1, bpb, rerun=n) for n, bpb in enumerate([2.0, 2.01])]
    found = effects.noise(rows)
    assert found.pair_sd is None and found.seed_sd is None
    assert found.floor == pytest.approx(0.01)  # sqrt(2) times an SD of 0.01 / sqrt(2)
    assert effects.noise([]) == (None, 0, None, 0, 0.0)


def test_pooling_is_unbiased_and_does_not_follow_a_wild_arm_or_idle_ones():
    rng = np.random.default_rng(1)
    variances = rng.chisquare(2, (4000, 11)) / 2
    middle = np.median(effects.pooled_variance(variances, [2] * 11))
    assert middle == pytest.approx(1, abs=0.04)  # the median of an odd number is right in the median
    variances[:, :1] *= 1e4
    variances[:, 1:5] *= 1e-8
    assert np.median(effects.pooled_variance(variances, [2] * 11)) == pytest.approx(1.1, abs=0.2)
    assert effects.pooled_variance(np.zeros(4), [2] * 4) == 0
    by_hand = np.array([1e-4, 3.0, 1.0, 2.0, 5.0]) * stats.chi2.median(4) / 4
    assert effects.pooled_variance(by_hand, [4] * 5) == pytest.approx(2.5)  # of 1 2 3 5


# The test


def test_one_arm_is_the_paired_t_test():
    rows = wave(dict(control=[2.0, 2.1, 2.05, 2.03], a=[1.99, 2.08, 2.055, 2.0]), range(4))
    a, c = ([r["val_bpb"] for r in rows if r["arm"] == arm] for arm in ("a", CONTROL))
    (found,), expected = effects.effects(rows), stats.ttest_rel(a, c)
    assert found.p == pytest.approx(expected.pvalue, abs=0.008) and found.p_family == found.p
    interval = expected.confidence_interval(0.95)
    width = interval.high - interval.low
    assert found.interval == pytest.approx((interval.low, interval.high), abs=0.02 * width)
    assert found.family == pytest.approx(found.interval, abs=1e-4)
    assert found.mean == pytest.approx(np.mean(np.subtract(a, c))) and found.n == 4


@pytest.mark.parametrize("arms, seeds", [(12, 3), (5, 2), (20, 5)])
def test_draws_have_the_level_they_claim(arms, seeds):
    shape = (tuple(range(seeds)),) * arms
    null = effects.null(shape, (1,) * seeds).ps
    assert (null <= 0.05).mean(0) == pytest.approx(np.full(arms, 0.05), abs=1e-3)
    assert arms * np.quantile(null.min(1), 0.05) >= 0.05  # the step-down wastes less than Bonferroni


def test_family_wise_error_of_a_wave_is_five_percent():
    rng, trials = np.random.default_rng(2), 600
    named = 0
    for _ in range(trials):
        pairs = rng.standard_normal((12, 3)) - rng.standard_normal(3)
        by_arm = {f"a{i}": dict(enumerate(map(float, values))) for i, values in enumerate(pairs)}
        judged = effects.judge(by_arm, {0: 1, 1: 1, 2: 1}, effects.noise_of(by_arm, {}))
        named += any(test.p_family < effects.LEVEL for test in judged.values())
    low, high = stats.binom.interval(0.999, trials, 0.05)
    assert low <= named <= high, named / trials


@pytest.mark.parametrize("arms, runs, share", [
    (1, 2, 1.0), (2, 4, 1.0), (2, 2, 0.5), pytest.param(5, 3, 0.25, marks=pytest.mark.slow),
])  # fmt: skip
def test_family_wise_error_is_five_percent_where_the_control_is_run_again(arms, runs, share):
    """share: of a run's variance that shows in reruns; the rest goes with the seed."""
    rng, trials = np.random.default_rng(9), 500
    named = 0
    for _ in range(trials):
        of_seed = math.sqrt(1 - share) * rng.standard_normal((3, 1))
        control = 2 + 0.01 * (of_seed + math.sqrt(share) * rng.standard_normal((3, runs)))
        rows = [row(CONTROL, seed, bpb, rerun=n) for seed in range(3) for n, bpb in enumerate(control[seed])]
        for arm in range(arms):
            rows += wave({f"a{arm}": list(2 + 0.01 * rng.standard_normal(3))}, range(3))
        named += any(e.verdict != effects.INSIDE for e in effects.effects(rows))
    low, high = stats.binom.interval(0.999, trials, 0.05)
    assert low <= named <= high, named / trials


def test_reruns_that_give_the_same_bits_say_nothing():
    """The control's mean is no quieter for them: every number is that of the wave without them."""
    plain = null_wave(np.random.default_rng(10), 5)
    again = [row(CONTROL, one["seed"], one["val_bpb"], rerun=1) for one in plain if one["arm"] == CONTROL]
    assert effects.effects(plain + again) == effects.effects(plain)
    assert effects.noise(plain + again).rerun_df == 3 and effects.noise(plain + again).rerun_sd == 0


def test_the_share_of_reruns_by_hand():
    """Of a run's variance 4, 1 shows again: with two runs a seed a pair has 2 * 4 - (1 - 1/2) = 7.5."""
    share = effects.rerun_share(np.array([1.0, 0.0, 9.0, 0.0]), np.array([7.5, 3.0, 1.0, 0.0]), 0.5)
    assert share == pytest.approx([0.25, 0.0, 1.0, 0.0])


def test_the_study_of_false_alarms_judges_as_waves_are_judged():
    design = null_study.Design("", arms=3, seeds=3, runs=2, share=0.5)
    drawn = null_study.simulate(design, 60, seed=1)
    rng = np.random.default_rng(1)  # as the study draws
    of_seed = rng.standard_normal((60, 3)) * math.sqrt(0.5)
    control = of_seed[..., None] + rng.standard_normal((60, 3, 2)) * math.sqrt(0.5)
    scores = rng.standard_normal((60, 3, 3))
    named = []
    for runs, arms in zip(control, scores, strict=True):
        rows = [row(CONTROL, seed, bpb, rerun=n) for seed in range(3) for n, bpb in enumerate(runs[seed])]
        rows += wave({f"a{arm}": list(values) for arm, values in enumerate(arms)}, range(3))
        found = effects.effects(rows)
        named.append(any(e.verdict != effects.INSIDE for e in found))
    assert null_study.judged_rates(design, drawn).named == pytest.approx(np.mean(named)) and any(named)


@pytest.mark.parametrize("place", [0, 2, pytest.param(14, marks=pytest.mark.slow)])
def test_the_page_of_false_alarms_is_what_the_study_finds(place):
    design = null_study.DESIGNS[place]
    drawn = null_study.simulate(design, null_study.WAVES)
    line = null_study.line_of(design, null_study.judged_rates(design, drawn))
    page = (SHIPPED_RESULTS / "study_false_alarms.md").read_text(encoding="utf-8")
    assert line in page and f"seed {null_study.SEED}" in page


def test_whole_rows_under_the_null_and_with_an_effect():
    rng = np.random.default_rng(3)
    null = [effects.effects(null_wave(rng, 12)) for _ in range(60)]
    named = sum(any(e.verdict != effects.INSIDE for e in wave) for wave in null)
    assert named <= stats.binom.isf(0.001, 60, 0.05)
    with_effect = [effects.effects(null_wave(rng, 12, shift=-0.02)) for _ in range(40)]
    assert sum(wave[0].verdict == effects.BETTER for wave in with_effect) >= 38  # 7 SD of a difference
    small = [effects.effects(null_wave(rng, 12, shift=0.002)) for _ in range(40)]
    assert sum(wave[0].verdict == effects.WORSE for wave in small) <= 10  # 0.7 SD cannot be seen
    assert not any(wave[0].verdict == effects.BETTER for wave in small[:10])


def test_power_rises_with_seeds():
    rng = np.random.default_rng(4)
    shares = [
        np.mean([effects.effects(null_wave(rng, 12, n, 0.008))[0].verdict == "worse" for _ in range(40)])
        for n in (2, 3, 5)
    ]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.9, shares


def test_an_arm_that_varies_more_is_held_to_its_own_spread():
    """Ten times the others' noise: it is named far less often than the floor alone would."""
    rng = np.random.default_rng(5)
    waves = [effects.effects(null_wave(rng, 12, a1=10)) for _ in range(60)]
    assert np.mean([wave[0].verdict != effects.INSIDE for wave in waves]) < 0.2
    assert np.mean([effects.unsteady(wave, 0.003) == ["a1"] for wave in waves]) > 0.6
    first = waves[0][0]
    assert first.interval.high - first.interval.low > 4 * (
        waves[0][1].interval.high - waves[0][1].interval.low
    )


def test_the_family_interval_is_wider_and_says_what_the_verdict_says():
    rows = wave(
        dict(control=[2.0, 2.1, 2.05], a=[1.9, 2.001, 1.949], b=[2.001, 2.1, 2.05], c=[2, 2.101, 2.05])
    )
    for found in effects.effects(rows):
        assert found.family.low < found.interval.low <= found.mean <= found.interval.high < found.family.high
        clear = not found.family.low <= 0 <= found.family.high
        assert clear == (found.verdict in (effects.BETTER, effects.WORSE))
    assert [e.verdict for e in effects.effects(rows)] == ["better", "inside noise", "inside noise"]


def test_few_pairs_are_undecided():
    rows = wave(dict(control=[2.0, 2.1], a=[1.9], b=[1.9, 2.0], c=[None, None]), (1, 2))
    a, b, c = effects.effects(rows)
    assert (a.verdict, a.n, a.mean) == ("undecided", 1, pytest.approx(-0.1)) and a.interval is None
    assert b.n == 2 and b.p is not None
    assert (c.verdict, c.n, c.mean, c.runs) == ("undecided", 0, None, 2)
    assert effects.effects([]) == [] and effects.effects(wave(dict(control=[2.0, 2.1]))) == []
    assert effects.effects(wave(dict(a=[2.0, 2.1])))[0].verdict == "undecided"  # no control


def test_an_arm_that_changes_nothing_at_all():
    rows = wave(dict(control=[2.0, 2.1, 2.2], same=[2.0, 2.1, 2.2]))
    (found,) = effects.effects(rows)
    assert (found.mean, found.sd, found.verdict) == (0.0, 0.0, "inside noise")


def test_reruns_of_the_control_are_averaged_and_counted():
    rows = wave(dict(control=[2.0, 2.1], a=[2.0, 2.1]), (1, 2)) + [row(CONTROL, 1, 2.02, rerun=1)]
    assert effects.differences(rows)["a"] == {1: pytest.approx(-0.01), 2: 0.0}
    quiet = effects.null_draws(((0, 1), (0, 1)), (4, 4), 20_000)
    usual = effects.null_draws(((0, 1), (0, 1)), (1, 1), 20_000)
    assert np.corrcoef(quiet.T)[0, 1] < np.corrcoef(usual.T)[0, 1] - 0.05, (
        "arms share less of a quiet control"
    )


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=12))
def test_holm_is_between_the_plain_p_and_bonferronis(ps):
    adjusted = effects.holm(ps)
    for p, new in zip(ps, adjusted, strict=True):
        assert p <= new + 1e-12 and new <= min(1, len(ps) * p) + 1e-12
    order = np.argsort(ps, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_holm_by_hand():
    assert effects.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert effects.holm([]) == []


def test_step_down_of_independent_tests_is_close_to_holm():
    null = np.random.default_rng(6).random((200_000, 3))
    found = effects.step_down([0.01, 0.04, 0.03], null)
    sidak = [1 - 0.99**3, max(1 - 0.97**2, 0.04), 1 - 0.97**2]
    assert found == pytest.approx(sidak, abs=0.003)


# Equal steps and equal time


def test_curves_are_read_between_near_points_only():
    curve = [(0.0, 4.0), (100.0, 3.0), (110.0, 2.9), (400.0, 2.0)]
    assert effects.read_curve(curve, 100) == 3.0 and effects.read_curve(curve, 400) == 2.0
    expected = 3.0 - 0.1 * math.log(1.05) / math.log(1.1)
    assert effects.read_curve(curve, 105) == pytest.approx(expected)
    assert [effects.read_curve(curve, at) for at in (50, 200, 500, -1)] == [None] * 4
    assert effects.read_curve(curve[:1], 0.0) == 4.0


def test_equal_steps_compare_the_final_scores_and_equal_time_the_curves():
    (found,) = effects.effects(wave(dict(control=[2.0, 2.1], a=[1.9, 2.0]), (1, 2)))
    assert found.same_steps == (pytest.approx(-0.1), 2, "final")
    assert found.same_time == (pytest.approx(-0.1), 2, "curve")


def test_a_slower_arm_is_compared_where_it_ended():
    """Same curve by steps, but each step takes twice the time and it stops at half of them."""
    slow = finished(2.0)["curve"]
    slow = [[step, 2 * ms, bpb] for step, ms, bpb in slow if step <= 150]
    rows = [row(CONTROL, 1, 2.0), row("slow", 1, slow[-1][2], steps=150, curve=slow)]
    (found,) = effects.effects(rows)
    assert found.mean > 0.05  # at the end it is worse
    assert found.same_steps == (0.0, 1, "curve")  # step for step the same
    assert found.same_time.mean == pytest.approx(found.mean)  # 150 slow steps take the time of 300
    rows[1]["curve"] = None
    assert effects.effects(rows)[0].same_steps is None and effects.effects(rows)[0].same_time is None


def test_what_limits_runs_and_who_shared_the_machine():
    rows = [row(CONTROL, 1, 2.0), row("a", 1, 2.0, started=1010.0, ended=1030.0)]
    rows += [row("b", 1, 2.0, started=1030.0, ended=1040.0)]
    assert effects.sharing(rows) == 2 and effects.step_limited(rows) is True
    rows[1]["steps"] = 299
    assert effects.step_limited(rows) is False and effects.step_limited([dict(arm="x")]) is None


# Regimes


@pytest.mark.parametrize(
    "other", [dict(code_sha256="ef" * 32), dict(device="other"), dict(config=dict(train_batch_tokens=4096))]
)
def test_regimes_are_not_mixed(other):
    rows = [row(CONTROL, 1, 2.0), row("a", 1, 1.9, **other)]
    assert [[r["arm"] for r in group] for group in effects.by_regime(rows)] == [[CONTROL], ["a"]]
    word = next(iter(other)) if "config" not in other else "train_batch_tokens"
    with pytest.raises(UserError, match=word):
        effects.effects(rows)


def test_an_arm_may_change_a_size_and_an_unstarted_run_belongs_anywhere():
    rows = [row(CONTROL, 1, 2.0), row("deep", 1, 1.9, change=dict(NUM_LAYERS="9")), *broken_rows()]
    assert len(effects.by_regime(rows)) == 1 and len(effects.by_regime([])) == 0
    with pytest.raises(UserError, match="waves"):
        effects.effects([row(CONTROL, 1, 2.0), row("a", 1, 1.9, wave="other")])


# Doses


def dose_rows(values: dict[str, list[float]]) -> list[dict]:
    rows = wave(dict(control=values.pop("0.04")))
    for value, scores in values.items():
        rows += wave({f"lr{value}": scores}, change=dict(MATRIX_LR=value))
    return rows


def test_a_monotone_knob_has_a_trend():
    rows = dose_rows({
        "0.04": [2.0, 2.1, 2.2], "0.02": [2.1, 2.22, 2.3], "0.08": [1.9, 2.0, 2.08], "0.16": [1.8, 1.9, 2.0],
    })  # fmt: skip
    (found,) = effects.trends(rows)
    table = [[2.1, 2.0, 1.9, 1.8], [2.22, 2.1, 2.0, 1.9], [2.3, 2.2, 2.08, 2.0]]
    reverse = [line[::-1] for line in table]
    assert found.page_p == pytest.approx(2 * stats.page_trend_test(reverse).pvalue)
    assert (found.knob, found.levels, found.unit) == ("MATRIX_LR", [0.02, 0.04, 0.08, 0.16], "doubling")
    slopes = [stats.linregress([1, 2, 3, 4], line).slope for line in table]
    assert found.slope == pytest.approx(np.mean(slopes))
    assert found.slope_p == pytest.approx(stats.ttest_1samp(slopes, 0).pvalue)
    assert found.verdict == "falls" and found.best == 0.16 and found.p_family == found.page_p
    assert found.means[0] == 0 and found.means[-1] == pytest.approx(-0.3067, abs=1e-3)


def test_no_trend_and_what_is_no_dose():
    rows = dose_rows({"0.04": [2.0, 2.1, 2.2], "0.05": [2.1, 2.0, 2.3], "0.06": [2.05, 2.1, 2.1]})
    (found,) = effects.trends(rows)
    assert found.verdict == "no trend" and found.unit == "unit"
    two = wave(dict(control=[2.0, 2.1])) + wave(dict(a=[1.9, 2.0]), change=dict(MATRIX_LR="0.05"))
    text = wave(dict(control=[2.0])) + wave(dict(a=[1.9]), change=dict(MLP_ACT="relu2"))
    both = wave(dict(control=[2.0])) + wave(dict(a=[1.9]), change=dict(MATRIX_LR="1", NUM_LAYERS="3"))
    assert effects.trends(two) == effects.trends(text) == effects.trends(both) == effects.trends([]) == []


def test_a_code_word_below_zero_is_no_dose():
    rows = wave(dict(control=[2.0, 2.1]), config=dict(encoder_layers=-1))
    for value in (1, 2, 3):
        rows += wave({f"e{value}": [2 + value / 10] * 2}, change=dict(ENCODER_LAYERS=str(value)))
    assert effects.trends(rows)[0].levels == [1, 2, 3]


# Parts and the whole


PARTS = dict(a=dict(KNOB_A="1"), b=dict(KNOB_B="2"), c=dict(KNOB_C="3"))


def stack_rows(gain: dict[frozenset, float], names: list[str]) -> list[dict]:
    """Arms of joined parts ("ab" has both), each seed with a little of its own."""
    rows = wave(dict(control=[2.0, 2.1, 2.2]))
    for name in names:
        changed = {knob: value for letter in name for knob, value in PARTS[letter].items()}
        scores = [2.0 + n / 10 + gain[frozenset(name)] + n * 1e-4 for n in range(3)]
        rows += wave({name: scores}, change=changed)
    return rows


def test_interactions_of_three_parts_by_hand():
    gain = {"a": -0.01, "b": -0.02, "c": 0.0, "abc": -0.05, "bc": -0.02, "ac": -0.02, "ab": -0.03}
    rows = stack_rows({frozenset(k): v for k, v in gain.items()}, list(gain))
    found = effects.ablation(rows)
    assert found.whole_name == "abc" and [one.name for one in found.parts] == ["a", "b", "c"]
    assert [one.alone.mean for one in found.parts] == pytest.approx([-0.0099, -0.0199, 0.0001])
    assert [one.last.mean for one in found.parts] == pytest.approx([-0.03, -0.03, -0.02])
    assert [one.interaction.mean for one in found.parts] == pytest.approx([-0.0201, -0.0101, -0.0201])
    assert found.whole.mean == pytest.approx(-0.0499) and found.total.mean == pytest.approx(-0.0297)
    assert found.interaction.mean == pytest.approx(-0.0202) and found.interaction.clear
    expected = stats.t.interval(0.95, 2, -0.0099, 1e-4 / math.sqrt(3))
    assert found.parts[0].alone.interval == pytest.approx(expected)


def test_two_parts_and_their_whole():
    gain = {frozenset(k): v for k, v in {"a": -0.01, "b": -0.02, "ab": -0.025}.items()}
    found = effects.ablation(stack_rows(gain, ["a", "b", "ab"]))
    assert [one.last.mean for one in found.parts] == pytest.approx([-0.005, -0.015])
    assert effects.ablation(stack_rows(gain, ["a", "b"])) is None and effects.ablation([]) is None


def test_a_stack_with_each_part_left_out_only():
    gain = {frozenset(k): v for k, v in {"abc": -0.05, "bc": -0.03, "ac": -0.04, "ab": -0.05}.items()}
    found = effects.ablation(stack_rows(gain, ["abc", "bc", "ac", "ab"]))
    assert {one.name: round(one.last.mean, 6) for one in found.parts} == {
        "KNOB_A=1": -0.02, "KNOB_B=2": -0.01, "KNOB_C=3": 0.0
    }  # fmt: skip
    assert found.total is None and found.parts[0].alone is None and found.whole.mean < 0


def test_adding_in_one_wave_and_taking_out_in_another():
    base, stack = dict(tidal_lr=False, parallel_block=False), dict(tidal_lr=True, parallel_block=True)
    adds = wave(dict(control=[2.0, 2.1]), wave="add", config=base)
    adds += wave(dict(tidal=[1.95, 2.05]), wave="add", change=dict(TIDAL_LR="1"))
    adds += wave(dict(other=[1.5, 1.5]), wave="add", change=dict(MATRIX_LR="1"))
    drops = wave(dict(control=[1.9, 2.0]), wave="drop", config=stack)
    drops += wave(dict(no_tidal=[1.96, 2.06]), wave="drop", change=dict(TIDAL_LR="0"))
    found = effects.add_and_drop(adds, drops)
    assert [one.name for one in found.parts] == ["tidal"]
    assert found.parts[0].alone.mean == pytest.approx(-0.05)
    assert found.parts[0].last.mean == pytest.approx(-0.06)
    assert found.whole.mean == pytest.approx(-0.1)
    assert effects.same_value("a,b", ["a", "b"]) and not effects.same_value("a", "b")
    assert effects.add_and_drop(adds, adds) is None and effects.add_and_drop([], drops) is None


# Horizons and the held-out half


def ladder_rows(gains: dict[int, float]) -> list[dict]:
    rows = []
    for steps, gain in gains.items():
        more = dict(wave=f"h{steps}", steps=steps, config=dict(iterations=steps))
        rows += wave(dict(control=[2.0, 2.1, 2.2]), **more)
        rows += wave(dict(lr=[2 + gain, 2.1001 + gain, 2.1999 + gain]), change=dict(MATRIX_LR="0.08"), **more)
    return rows


def test_an_effect_that_flips_with_the_horizon():
    (found,) = effects.ladders(ladder_rows({250: -0.02, 500: 0.0, 1000: 0.02}))
    assert [rung.length for rung in found.rungs] == [250, 500, 1000] and found.unit == "steps"
    assert found.change == "MATRIX_LR=0.08" and found.says == "sign flips"
    assert found.parent == "tidal_1434"
    assert found.slope.mean == pytest.approx(0.02) and found.slope.n == 3


def test_an_effect_that_keeps_its_sign_and_one_that_is_unclear():
    assert effects.ladders(ladder_rows({250: -0.02, 1000: -0.01}))[0].says == "one sign"
    assert effects.ladders(ladder_rows({250: -0.02, 1000: 0.00001}))[0].says == "unclear"
    assert effects.ladders(ladder_rows({250: -0.02})) == [] and effects.ladders([]) == []


def test_a_ladder_inside_one_wave():
    rows = wave(dict(control=[2.0, 2.1])) + wave(dict(x=[1.9, 2.0]), change=dict(MLP_ACT="relu2"))
    long = dict(ITERATIONS="600")
    rows += wave(dict(long=[1.8, 1.9]), change=long, steps=600)
    rows += wave(dict(long_x=[1.75, 1.85]), change=long | dict(MLP_ACT="relu2"), steps=600)
    (found,) = effects.ladders(rows)
    assert [(rung.length, round(rung.effect.mean, 6)) for rung in found.rungs] == [(300, -0.1), (600, -0.05)]


def test_a_change_of_another_base_is_no_rung():
    def of(steps, gain, **config):
        more = dict(wave=f"h{steps}", steps=steps, config=dict(iterations=steps, **config))
        changed = dict(change=dict(MATRIX_LR="0.08"), **more)
        return wave(dict(control=[2.0, 2.1]), **more) + wave(dict(lr=[2.0 + gain, 2.1 + gain]), **changed)

    same = of(250, -0.02, seed=1, out_dir="runs/x") + of(1000, -0.01, seed=2)
    assert [len(one.rungs) for one in effects.ladders(same)] == [2]
    assert effects.ladders(of(250, -0.02) + of(1000, -0.01, tidal_lr=True)) == []


def test_regimes_of_waves_keep_an_arm_with_its_control():
    small = wave(dict(control=[2.0, 2.1]), wave="small", config=dict(num_kv_heads=4))
    small += wave(dict(kv2=[1.9, 2.0]), wave="small", change=dict(NUM_KV_HEADS="2"))
    other = wave(dict(control=[2.0, 2.1]), wave="other", config=dict(num_kv_heads=2))
    same = wave(dict(control=[2.0, 2.1]), wave="same", config=dict(num_kv_heads=4))
    found = effects.joined(part for rows in (other, small, same) for part in effects.by_regime(rows))
    assert [{row["wave"] for row in rows} for rows in found] == [{"other"}, {"small", "same"}]
    assert [len(rows) for rows in found] == [2, 6]


def test_rungs_differ_in_their_length_only():
    rows = ladder_rows({250: -0.02, 1000: -0.01})
    with pytest.raises(UserError, match="device"):
        effects.ladders([*rows, row("a", 1, 2.0, wave="h9", device="other")])


def test_the_held_out_half_shows_what_the_choice_flattered():
    rows = [row(CONTROL, s, 2.0, held_out_val_bpb=2.1) for s in SEEDS]
    rows += [row("lucky", s, 1.9 + n / 1e3, held_out_val_bpb=2.06) for n, s in enumerate(SEEDS)]
    rows += [row("other", s, 1.8) for s in SEEDS]
    (found,) = effects.held_out(rows)
    assert (found.arm, found.selection.n) == ("lucky", 3)
    assert found.selection.mean == pytest.approx(-0.099) and found.held_out.mean == pytest.approx(-0.04)
    assert found.shrink.mean == pytest.approx(0.059)


def test_the_best_of_many_regresses_on_a_held_out_half():
    """Sixty arms that do nothing: the one that wins on one half is nobody on the other."""
    rng = np.random.default_rng(7)
    rows = [
        row(arm, seed, *rng.normal(2, 0.01, 1), held_out_val_bpb=rng.normal(2, 0.01))
        for arm in (CONTROL, *(f"a{n}" for n in range(60)))
        for seed in SEEDS
    ]
    best = effects.held_out(rows)[0]
    assert best.selection.mean < -0.008 and best.shrink.mean > 0.004


def test_one_sign_needs_every_length_clear_of_zero():
    (found,) = effects.ladders(ladder_rows({250: -0.02, 1000: -0.00001}))
    assert [rung.effect.mean < 0 for rung in found.rungs] == [True, True]
    assert [rung.effect.clear for rung in found.rungs] == [True, False] and found.says == "unclear"


def test_a_run_does_not_share_the_machine_with_itself():
    spans = dict(a=(0, 10), b=(20, 30), c=(5, 8))
    rows = [dict(run_id=name, started=start, ended=end) for name, (start, end) in spans.items()]
    assert effects.sharing(rows) == 2 and effects.sharing(rows[:2]) == effects.sharing(rows[:1]) == 0
