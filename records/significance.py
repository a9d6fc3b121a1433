"""Is one set of runs better than another, or than a bar? Tests, intervals, and how many seeds it takes.

    python records/significance.py --baseline 2.0727,2.0731,2.0719 --ours 2.0649,2.0655,2.0643
    python records/significance.py --baseline ... --ours ... --paired      the same seeds in the same order
    python records/significance.py --ours 1.8822,1.8816,1.8822 --bar 1.8900     a record's mean as the bar

A value is a run's val_loss in nats per token, or its val_bpb; all in one unit, and lower is better. The
challenge asks a record for 0.005 nats (--gain, in the values' unit) at p < 0.01 (--level). A mean is
compared with --gain taken off the other side, so p is the chance to see such runs, or better ones, if the
true gain were exactly --gain. A bar is taken as exact, which it is not: it is the mean of a few runs too,
and the lowest of many that were tried.

Welch's test is that of B. L. Welch, Biometrika 34 (1947); power is by the noncentral t distribution.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

GAIN, LEVEL, POWER = 0.005, 0.01, 0.8
MOST_SEEDS = 100_000


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
    t = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    return TTest(t, df, float(special.stdtr(df, t)))


def interval(middle: float, error: float, df: float, confidence: float) -> Interval:
    reach = float(stats.t.ppf((1 + confidence) / 2, df)) * error
    return Interval(middle - reach, middle + reach)


def welch_error(ours: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """(standard error of the difference of means, Welch-Satterthwaite degrees of freedom)."""
    parts = [variance(values) / len(values) for values in (ours, baseline)]
    total = sum(parts)
    if not total:
        return 0.0, len(ours) + len(baseline) - 2
    scaled = [(part / total) ** 2 / (len(v) - 1) for part, v in zip(parts, (ours, baseline), strict=True)]
    return math.sqrt(total), 1 / sum(scaled)


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
    low, high = 1, 2
    if effect <= 0:
        return None
    while power(high, effect, noise, level, sides) < chance:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:  # not enough at low, enough at high
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, effect, noise, level, sides) >= chance else (middle, high)
    return high


# Command line


def numbers(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError("give two finite numbers or more, with commas between")
    return values


def show_values(name: str, values: list[float], confidence: float) -> str:
    low, high = mean_interval(values, confidence)
    spread = f"sd {stdev(values):.8f}, {confidence:.0%} interval {low:.8f} to {high:.8f}"
    return f"{name}: {len(values)} runs, mean {mean(values):.8f}, {spread}"


def show_test(name: str, test: TTest, gain: float, level: float) -> str:
    verdict = "shown" if test.p < level else "not shown"
    rest = f"t {test.t:.4f}, df {test.df:.2f}, p {test.p:.3g}"
    return f"{name}: a gain over {gain:g} is {verdict} at p < {level:g}: {rest}"


def show_power(noise: float, gain: float, level: float, sides: int) -> str:
    """How many seeds a true difference of `gain` takes, against nothing."""
    count = seeds_needed(gain, noise, level, POWER, sides) if noise else 2
    what = "two sets of runs" if sides == 2 else "pairs or a bar"
    said = f"{count} seeds a side" if count else f"over {MOST_SEEDS} seeds"
    return f"power: with {what} {said} show a true {gain:g} at p < {level:g} in {POWER:.0%} of cases"


def report(ours: list[float], asked: argparse.Namespace) -> list[str]:
    """All lines that what was given allows."""
    gain, level, confidence, baseline = asked.gain, asked.level, asked.confidence, asked.baseline
    lines = [show_values("ours", ours, confidence)]
    if baseline:
        low, high = difference_interval(ours, baseline, confidence, asked.paired)
        lines.append(show_values("baseline", baseline, confidence))
        text = f"difference: {mean(ours) - mean(baseline):.8f}, {confidence:.0%} interval"
        lines.append(f"{text} {low:.8f} to {high:.8f}")
        name, test = ("paired", paired) if asked.paired else ("welch", welch)
        lines += [show_test(name, test(ours, baseline, g), g, level) for g in dict.fromkeys((0.0, gain))]
    if asked.bar is not None:
        lines.append(show_test(f"bar {asked.bar:g}", against_bar(ours, asked.bar, gain), gain, level))
    if baseline and asked.paired:
        lines.append(show_power(stdev(differences(ours, baseline)), gain, level, 1))
    elif baseline:
        pooled = math.sqrt((variance(ours) + variance(baseline)) / 2)
        lines.append(show_power(pooled, gain, level, 2))
    else:
        lines.append(show_power(stdev(ours), gain, level, 1))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=numbers, required=True, metavar="X,X,...")
    parser.add_argument("--baseline", type=numbers, metavar="X,X,...")
    parser.add_argument("--bar", type=float, help="an exact value to beat")
    parser.add_argument("--paired", action="store_true", help="ours and baseline are pairs, in order")
    parser.add_argument("--gain", type=float, default=GAIN, help="to beat it by; default 0.005")
    parser.add_argument("--level", type=float, default=LEVEL, help="of p; default 0.01")
    parser.add_argument("--confidence", type=float, default=0.95, help="of intervals; default 0.95")
    asked = parser.parse_args(arguments)
    if asked.paired and len(asked.baseline or ()) != len(asked.ours):
        parser.error("--paired needs as many --baseline as --ours")
    if not (0 < asked.level < 1 and 0 < asked.confidence < 1):
        parser.error("--level and --confidence lie between 0 and 1")
    print("\n".join(report(asked.ours, asked)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
