"""The statistics of records/significance.py: against published numbers, scipy's own tests, and chance."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from records import significance
from sweeps.lab import statistics as ours
from tests.conftest import ROOT

SAMPLES = st.lists(st.floats(1.0, 3.0).map(lambda x: round(x, 6)), min_size=2, max_size=9)


def spread(values) -> bool:
    return float(np.std(values)) > 1e-5


@settings(max_examples=50, deadline=None)
@given(SAMPLES, SAMPLES)
def test_welch_is_scipys(a, b):
    if spread(a) and spread(b):
        known = stats.ttest_ind(a, b, equal_var=False, alternative="less")
        assert ours.welch(a, b) == pytest.approx(
            (known.statistic, known.df, known.pvalue), rel=1e-6, abs=1e-9
        )
        low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
        assert ours.difference_interval(a, b, 0.9) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1.0, 3.0), st.floats(1.0, 3.0)), min_size=2, max_size=9))
def test_paired_and_bar_are_scipys(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    if spread(np.subtract(a, b)) and spread(a):
        known = stats.ttest_rel(a, b, alternative="less")
        assert ours.paired(a, b) == pytest.approx(
            (known.statistic, known.df, known.pvalue), rel=1e-6, abs=1e-9
        )
        known = stats.ttest_1samp(a, 1.995, alternative="less")
        assert ours.against_bar(a, 2.0, 0.005)[::2] == pytest.approx(
            (known.statistic, known.pvalue), rel=1e-6, abs=1e-9
        )
        low, high = stats.ttest_1samp(a, 0.0).confidence_interval(0.99)
        assert ours.mean_interval(a, 0.99) == pytest.approx((low, high), rel=1e-6)


def test_students_sleep_data():
    """Student's data of 1908, as in the manual of R: Welch t -1.8608, df 17.776, p 0.07939 two-sided; paired
    t -4.0621, p 0.002833."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    t, df, p = ours.welch(first, second)
    assert (t, df, 2 * p) == pytest.approx((-1.8608, 17.776, 0.07939), rel=1e-4)
    assert ours.difference_interval(first, second) == pytest.approx((-3.3654832, 0.2054832), rel=1e-6)
    t, df, p = ours.paired(first, second)
    assert (t, df, 2 * p) == pytest.approx((-4.0621, 9, 0.002833), rel=1e-3)
    assert ours.difference_interval(first, second, pairs=True) == pytest.approx((-2.4598858, -0.7001142))


def test_a_records_own_welch_test():
    """The record of 25 March 2026 (PR #1019) states t -11.8339 and 3.3063 degrees of freedom against the
    three runs of PR #549, both by the val_loss of their logs."""
    its = [1.88276292, 1.88156874, 1.88220393]
    before = [1.88976776, 1.88919190, 1.89110239]
    assert ours.welch(its, before)[:2] == pytest.approx((-11.8339, 3.3063), abs=1e-4)


def test_a_gain_moves_the_null_and_not_the_spread():
    a, b = [1.0, 1.1, 1.3], [1.2, 1.4, 1.3]
    shifted = [x + 0.05 for x in a]
    assert ours.welch(a, b, 0.05) == pytest.approx(ours.welch(shifted, b))
    assert ours.paired(a, b, 0.05) == pytest.approx(ours.paired(shifted, b))
    assert ours.against_bar(a, 1.5, 0.05) == pytest.approx(ours.against_bar(shifted, 1.5))


def test_without_spread_the_sign_decides():
    assert ours.against_bar([1.0, 1.0], 2.0).p == 0
    assert ours.against_bar([1.0, 1.0], 1.0).p == 0.5
    assert ours.welch([2.0, 2.0], [1.0, 1.0]).p == 1
    assert ours.paired([1.0, 2.0], [1.5, 2.5]).p == 0


def binomial_bounds(chance: float, trials: int, doubt: float = 1e-5) -> tuple[float, float]:
    """What the share of hits stays within, but for one case in 1 / doubt."""
    return tuple(stats.binom.ppf((doubt / 2, 1 - doubt / 2), trials, chance) / trials)


def share_shown(test, ours_at: float, sizes, noise, trials: int, seed: int) -> float:
    """Share of simulated pairs of samples, the second at 0, for which test(a, b) is under LEVEL."""
    rng = np.random.default_rng(seed)
    a = rng.normal(ours_at, noise[0], (trials, sizes[0])).tolist()
    b = rng.normal(0.0, noise[1], (trials, sizes[1])).tolist()
    return sum(test(x, y).p < ours.LEVEL for x, y in zip(a, b, strict=True)) / trials


CASES = {
    "bar": (lambda a, b: ours.against_bar(a, 0.0), (3, 2), (0.7, 1.0)),
    "bar with a gain": (lambda a, b: ours.against_bar([x - 5 for x in a], 0.0, 5.0), (4, 2), (0.7, 1.0)),
    "paired": (ours.paired, (5, 5), (1.0, 1.0)),
    "welch": (ours.welch, (6, 6), (1.0, 1.0)),
    "welch, unequal": (ours.welch, (8, 5), (0.5, 2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_luck_alone_wins_one_time_in_a_hundred(name):
    """Without a true gain p < 0.01 comes up in about 1 % of cases; with Welch, no exact test, 0.8 to 1.2."""
    test, sizes, noise = CASES[name]
    low, high = binomial_bounds(ours.LEVEL, 20_000)
    slack = 0.002 if name.startswith("welch") else 0.0
    assert low - slack <= share_shown(test, 0.0, sizes, noise, 20_000, seed=11) <= high + slack


@pytest.mark.parametrize(
    "seeds, effect, sides", [(3, 5.0, 1), (6, 1.5, 1), (4, 3.5, 2), (8, 1.5, 2)], ids=str
)
def test_power_is_how_often_it_is_shown(seeds, effect, sides):
    """Welch's test stays a little under, the more so with few seeds."""
    test = (lambda a, b: ours.against_bar(a, 0.0)) if sides == 1 else ours.welch
    expected, trials = ours.power(seeds, effect, 1.0, sides=sides), 3000
    assert 0.3 < expected < 0.99
    low, high = binomial_bounds(expected, trials)
    slack = 0.0 if sides == 1 else 0.06
    assert low - slack <= share_shown(test, -effect, (seeds, seeds), (1, 1), trials, seed=5) <= high


def test_power_against_the_published_table():
    """Cohen's d 0.5 at one-sided 0.05 with power 0.8 takes 51 a side, 27 against a constant (G*Power)."""
    assert ours.seeds_needed(0.5, 1.0, 0.05, 0.8, sides=2) == 51
    assert ours.seeds_needed(0.5, 1.0, 0.05, 0.8, sides=1) == 27
    assert ours.power(51, 0.5, 1.0, 0.05) == pytest.approx(0.8059, abs=2e-4)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 20.0), st.sampled_from([1, 2]), st.sampled_from([0.01, 0.05]))
def test_the_seeds_needed_are_the_fewest(effect, sides, level):
    count = ours.seeds_needed(effect, 1.0, level, 0.8, sides)
    assert ours.power(count, effect, 1.0, level, sides) >= 0.8
    assert count == 2 or ours.power(count - 1, effect, 1.0, level, sides) < 0.8


def test_hopeless_effects_need_no_number():
    assert ours.seeds_needed(0.0, 1.0) is None and ours.seeds_needed(-1.0, 1.0) is None
    assert ours.seeds_needed(1e-6, 1.0) is None


def test_power_without_an_effect_is_the_level():
    assert ours.power(5, 0.0, 1.0, 0.01) == pytest.approx(0.01, rel=1e-6)


def test_welch_with_unequal_sizes_wins_by_luck_as_often_as_is_said():
    """2.0 % at a nominal 1 %: three runs against ten of half their spread."""
    shown = share_shown(ours.welch, 0.0, (3, 10), (1.0, 0.5), 20_000, seed=13)
    low, high = binomial_bounds(0.0204, 20_000)
    assert low <= shown <= high and "2.0 % at a nominal 1 %" in significance.UNEQUAL


def test_unequal_sizes_are_told(capsys):
    assert significance.UNEQUAL in run(capsys, "--ours", "1,2,3", "--baseline", "2,3,4,5")
    assert "unequal" not in run(capsys, "--ours", "1,2,3", "--baseline", "2,3,4")


def run(capsys, *arguments) -> str:
    assert significance.main(arguments) == 0
    return capsys.readouterr().out


def test_the_command_line(capsys):
    out = run(
        capsys, "--ours", "2.0649,2.0655,2.0643", "--baseline", "2.0727,2.0731,2.0719", "--bar", "2.0701"
    )
    t, df, p = ours.welch([2.0649, 2.0655, 2.0643], [2.0727, 2.0731, 2.0719], 0.005)
    assert f"welch: a gain over 0.005 is shown at p < 0.01: t {t:.4f}, df {df:.2f}, p {p:.3g}" in out
    assert "bar 2.0701: a gain over 0.005 is not shown" in out
    assert "power: with two sets of runs 3 seeds a side show a true 0.005" in out
    out = run(capsys, "--ours", "1,2,3", "--baseline", "2,3,4.5", "--paired", "--gain", "0")
    assert out.count("paired: ") == 1 and "welch" not in out
    assert "power: " in run(capsys, "--ours", "1,1", "--bar", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ours", "1"],
        ["--ours", "1,nan"],
        ["--ours", "1,x"],
        ["--ours", "1,2", "--baseline", "1,2,3", "--paired"],
        ["--ours", "1,2", "--paired"],
        ["--ours", "1,2", "--level", "0"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        significance.main(arguments)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_its_name_hides_no_module_of_python():
    """records/ is on the path of its scripts, where train_gpt.py looks for `statistics` too."""
    names = {path.stem for path in (ROOT / "records").glob("*.py")}
    assert not names & set(sys.stdlib_module_names) and math.isclose(ours.mean([1, 2]), 1.5)


@pytest.mark.parametrize("how, sides", [("", 2), ("--paired", 1), ("--bar", 1)])
def test_the_power_is_that_of_the_test_that_was_asked_for(capsys, how, sides):
    """Two sets of runs have the noise of both; pairs that of their differences, a bar that of ours alone."""
    ones, others = [2.0649, 2.0662, 2.0643], [2.0727, 2.0751, 2.0719]
    noise = {
        "": math.sqrt((np.var(ones, ddof=1) + np.var(others, ddof=1)) / 2),
        "--paired": np.std(np.subtract(ones, others), ddof=1),
        "--bar": np.std(ones, ddof=1),
    }[how]
    words = ["--ours", ",".join(map(str, ones)), "--gain", "0.0008"]
    words += ["--bar", "2.07"] if how == "--bar" else ["--baseline", ",".join(map(str, others))]
    words += [how] if how == "--paired" else []
    needed = {kind: ours.seeds_needed(0.0008, noise, 0.01, 0.8, kind) for kind in (1, 2)}
    assert needed[1] != needed[2], "else the test could not tell"
    assert f" {needed[sides]} seeds a side show a true 0.0008" in run(capsys, *words)


def test_differences_are_of_pairs():
    assert ours.differences([3.0, 5.0], [1.0, 1.0]) == [2.0, 4.0]
    with pytest.raises(ValueError):
        ours.differences([3.0, 5.0], [1.0])
