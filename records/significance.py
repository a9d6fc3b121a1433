"""Is one set of runs better than another, or than a bar? Tests, intervals, and how many seeds it takes.

    python records/significance.py --baseline 2.0727,2.0731,2.0719 --ours 2.0649,2.0655,2.0643
    python records/significance.py --baseline ... --ours ... --paired      the same seeds in the same order
    python records/significance.py --ours 1.8822,1.8816,1.8822 --bar 1.8900     a record's mean as the bar

A value is a run's val_loss in nats per token, or its val_bpb; all in one unit, and lower is better. The
challenge asks a record for 0.005 nats (--gain, in the values' unit) at p < 0.01 (--level). A mean is
compared with --gain taken off the other side, so p is the chance to see such runs, or better ones, if the
true gain were exactly --gain. A bar is taken as exact, which it is not: it is the mean of a few runs too,
and the lowest of many that were tried. Welch's test is hopeful where one side has more runs: with 3 runs
against 10 of half their spread it shows, at a nominal 1 %, 2.0 % of gains that are not there.

The mathematics is that of the waves, sweeps/lab/statistics.py.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.user_error import run_tool  # noqa: E402
from sweeps.lab.statistics import (  # noqa: E402
    LEVEL,
    MOST_SEEDS,
    POWER,
    TTest,
    against_bar,
    difference_interval,
    differences,
    mean,
    mean_interval,
    paired,
    seeds_needed,
    stdev,
    variance,
    welch,
)

GAIN = 0.005  # nats that the challenge asks of a record
UNEQUAL = (
    "unequal n: the p of Welch's test is hopeful, e.g. 2.0 % at a nominal 1 % with 3 runs against 10 of half "
    "their spread; give both sides as many"
)


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
    seeds = f"{count} seeds a side" if count else f"over {MOST_SEEDS} seeds"
    return f"power: with {what} {seeds} show a true {gain:g} at p < {level:g} in {POWER:.0%} of cases"


def compare(ours: list[float], asked: argparse.Namespace) -> list[str]:
    """Ours beside the baseline: the difference, then its tests against nothing and against the gain."""
    baseline = asked.baseline
    low, high = difference_interval(ours, baseline, asked.confidence, asked.paired)
    difference = mean(ours) - mean(baseline)
    lines = [show_values("baseline", baseline, asked.confidence)]
    lines.append(f"difference: {difference:.8f}, {asked.confidence:.0%} interval {low:.8f} to {high:.8f}")
    name = "paired" if asked.paired else "welch"
    test = paired if asked.paired else welch
    for gain in dict.fromkeys((0.0, asked.gain)):
        lines.append(show_test(name, test(ours, baseline, gain), gain, asked.level))
    if len(ours) != len(baseline):
        lines.append(UNEQUAL)
    return lines


def power_line(ours: list[float], asked: argparse.Namespace) -> str:
    """The power of what was asked for, with the noise that the runs show."""
    if asked.baseline and asked.paired:
        return show_power(stdev(differences(ours, asked.baseline)), asked.gain, asked.level, 1)
    if asked.baseline:
        pooled = math.sqrt((variance(ours) + variance(asked.baseline)) / 2)
        return show_power(pooled, asked.gain, asked.level, 2)
    return show_power(stdev(ours), asked.gain, asked.level, 1)


def report(ours: list[float], asked: argparse.Namespace) -> list[str]:
    """All lines that what was given allows."""
    lines = [show_values("ours", ours, asked.confidence)]
    if asked.baseline:
        lines += compare(ours, asked)
    if asked.bar is not None:
        test = against_bar(ours, asked.bar, asked.gain)
        lines.append(show_test(f"bar {asked.bar:g}", test, asked.gain, asked.level))
    lines.append(power_line(ours, asked))
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
    run_tool(main)
