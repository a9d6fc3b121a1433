"""Tests, intervals and power for the means of a few seeds. Lower values are better; all are in one unit.

Welch's test is that of B. L. Welch, Biometrika 34 (1947); power is by the noncentral t distribution.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

LEVEL = 0.01  # of p, as the challenge asks of a record
POWER = 0.8  # chance to show a gain that is there
MOST_SEEDS = 100_000  # what needs more is not counted on


class TTest(NamedTuple):
    """A one-sided t-test that ours are lower: t < 0 speaks for it, p is the chance of such a t by luck."""

    t: float
    df: float
    p: float


class Interval(NamedTuple):
    low: float
    high: float


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def variance(values: Sequence[float]) -> float:
    """With n - 1; exactly zero for equal values."""
    return float(np.var(np.asarray(values) - values[0], ddof=1))


def stdev(values: Sequence[float]) -> float:
    return math.sqrt(variance(values))


def t_test(difference: float, error: float, df: float) -> TTest:
    """Of a difference with its standard error, both in one unit. Without any spread p is 0, 1/2 or 1."""
    if error:
        t = difference / error
    elif difference:
        t = math.copysign(math.inf, difference)
    else:
        t = 0.0
    return TTest(t, df, float(special.stdtr(df, t)))


def interval(middle: float, error: float, df: float, confidence: float) -> Interval:
    reach = float(stats.t.ppf((1 + confidence) / 2, df)) * error
    return Interval(middle - reach, middle + reach)


def welch_error(ours: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """(standard error of the difference of means, Welch-Satterthwaite degrees of freedom).

    error² = v1 / n1 + v2 / n2,   1 / df = sum of ((v / n) / error²)² / (n - 1).
    """
    our_part = variance(ours) / len(ours)
    their_part = variance(baseline) / len(baseline)
    total = our_part + their_part
    if not total:
        return 0.0, len(ours) + len(baseline) - 2
    our_term = (our_part / total) ** 2 / (len(ours) - 1)
    their_term = (their_part / total) ** 2 / (len(baseline) - 1)
    return math.sqrt(total), 1 / (our_term + their_term)


def welch(ours: Sequence[float], baseline: Sequence[float], gain: float = 0.0) -> TTest:
    """Are ours lower than the baseline by more than `gain`? Spreads may differ; two runs a side at least."""
    error, df = welch_error(ours, baseline)
    return t_test(mean(ours) - mean(baseline) + gain, error, df)


def paired(ours: Sequence[float], baseline: Sequence[float], gain: float = 0.0) -> TTest:
    """The same question of runs in pairs, as of one seed each: what both share drops out."""
    return against_bar(differences(ours, baseline), 0.0, gain)


def against_bar(ours: Sequence[float], bar: float, gain: float = 0.0) -> TTest:
    """Is the mean of ours under `bar` by more than `gain`? The bar is taken as exact."""
    return t_test(mean(ours) - bar + gain, stdev(ours) / math.sqrt(len(ours)), len(ours) - 1)


def differences(ours: Sequence[float], baseline: Sequence[float]) -> list[float]:
    return [own - other for own, other in zip(ours, baseline, strict=True)]


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Confidence interval of the mean, in the values' unit."""
    return interval(mean(values), stdev(values) / math.sqrt(len(values)), len(values) - 1, confidence)


def difference_interval(
    ours: Sequence[float], baseline: Sequence[float], confidence: float = 0.95, pairs: bool = False
) -> Interval:
    """Confidence interval of ours minus baseline: Welch's, or of the pairs."""
    if pairs:
        return mean_interval(differences(ours, baseline), confidence)
    return interval(mean(ours) - mean(baseline), *welch_error(ours, baseline), confidence)


def power(seeds: int, effect: float, noise: float, level: float = LEVEL, sides: int = 2) -> float:
    """Chance that `seeds` runs a side show, at p < level one-sided, a true difference of `effect`.

    effect: beyond the gain asked for; noise: standard deviation between seeds; both in one unit. sides: 2
    for two sets of equal size and noise, 1 for a bar, or for pairs with the noise of their differences.
    Exact for the test with equal variances, of which Welch's with equal sizes falls short by a little."""
    df = sides * (seeds - 1)
    centre = effect / (noise * math.sqrt(sides / seeds))
    return float(stats.nct.sf(stats.t.isf(level, df), df, centre))


def seeds_needed(
    effect: float, noise: float, level: float = LEVEL, chance: float = POWER, sides: int = 2
) -> int | None:
    """The fewest runs a side with power >= chance; None if that is over 100,000. Units as for `power`."""
    if effect <= 0:
        return None
    not_enough = 1
    enough = 2
    while power(enough, effect, noise, level, sides) < chance:
        not_enough = enough
        enough *= 2
        if enough > MOST_SEEDS:
            return None
    while enough - not_enough > 1:
        middle = (not_enough + enough) // 2
        if power(middle, effect, noise, level, sides) >= chance:
            enough = middle
        else:
            not_enough = middle
    return enough
