"""How often waves in which no arm does anything name one all the same: `python -m sweeps.lab.null_study`.

It draws such waves, judges them by the rule of verdicts.py, and prints a Markdown table. For each kind of
wave it tells how many of them name an arm (5 % are promised), how many of the 95 % intervals hold the true
difference, zero, and in how many waves all family intervals do. results/study_false_alarms.md has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sweeps.lab.verdicts import LEVEL, null, p_of, pooled_variance, rerun_share

SEED = 19
WAVES = 20_000


@dataclass(frozen=True)
class Kind:
    """Waves of one kind: their shape, and where their noise comes from, in SDs of a usual run."""

    about: str
    arms: int
    seeds: int
    runs: int = 1  # of the control, for each seed
    share: float = 0.0  # of the control's variance that shows when the same seed is run again
    control_sd: float = 1.0
    noisy_arms: int = 0  # arms with three times the noise


class Waves(NamedTuple):
    """Simulated waves, a line for each."""

    means: np.ndarray  # [waves, arms], mean difference to the control
    variances: np.ndarray  # [waves, arms], between the seeds' differences
    rerun_variances: np.ndarray  # [waves], of the control's reruns; zero without


class Rates(NamedTuple):
    """Shares of waves, or of intervals."""

    named: float  # waves that name an arm
    covered: float  # 95 % intervals that hold zero
    all_covered: float  # waves of which all family intervals do


KINDS = (
    Kind("no reruns", arms=1, seeds=3),
    Kind("no reruns", arms=5, seeds=2),
    Kind("no reruns", arms=12, seeds=3),
    Kind("no reruns", arms=20, seeds=5),
    Kind("reruns give the same bits", arms=2, seeds=3, runs=2),
    Kind("reruns give the same bits", arms=12, seeds=3, runs=2),
    Kind("reruns give the same bits", arms=12, seeds=3, runs=4),
    Kind("reruns vary, a quarter of the variance", arms=1, seeds=3, runs=2, share=0.25),
    Kind("reruns vary, a quarter of the variance", arms=12, seeds=3, runs=2, share=0.25),
    Kind("reruns vary, half of the variance", arms=2, seeds=3, runs=2, share=0.5),
    Kind("reruns vary, half of the variance", arms=12, seeds=3, runs=4, share=0.5),
    Kind("reruns vary as much as seeds", arms=1, seeds=3, runs=2, share=1.0),
    Kind("reruns vary as much as seeds", arms=2, seeds=3, runs=2, share=1.0),
    Kind("reruns vary as much as seeds", arms=5, seeds=2, runs=3, share=1.0),
    Kind("reruns vary as much as seeds", arms=12, seeds=3, runs=2, share=1.0),
    Kind("reruns vary as much as seeds", arms=12, seeds=3, runs=4, share=1.0),
    Kind("reruns vary as much as seeds", arms=12, seeds=5, runs=2, share=1.0),
    Kind("control 1.5 times as noisy as the arms", arms=12, seeds=3, control_sd=1.5),
    Kind("control twice as noisy", arms=2, seeds=3, control_sd=2.0),
    Kind("control twice as noisy", arms=12, seeds=3, control_sd=2.0),
    Kind("control twice as noisy, reruns vary", arms=12, seeds=3, runs=4, share=0.5, control_sd=2.0),
    Kind("control half as noisy", arms=12, seeds=3, control_sd=0.5),
    Kind("one arm three times as noisy", arms=12, seeds=3, noisy_arms=1),
    Kind("half of the arms three times as noisy", arms=12, seeds=3, noisy_arms=6),
)


def simulate(kind: Kind, waves: int, seed: int = SEED) -> Waves:
    """Waves without effects: all scores are normal, each seed's own level drops out of the differences."""
    rng = np.random.default_rng(seed)
    of_seed = rng.standard_normal((waves, kind.seeds)) * np.sqrt(1 - kind.share)
    of_run = rng.standard_normal((waves, kind.seeds, kind.runs)) * np.sqrt(kind.share)
    control = kind.control_sd * (of_seed + of_run.mean(-1))
    rerun_variances = np.zeros(waves)
    if kind.runs > 1:
        rerun_variances = kind.control_sd**2 * of_run.var(-1, ddof=1).mean(-1)
    scores = rng.standard_normal((waves, kind.arms, kind.seeds))
    scores[:, : kind.noisy_arms] *= 3
    pairs = scores - control[:, None, :]
    return Waves(pairs.mean(-1), pairs.var(-1, ddof=1), rerun_variances)


def judged_rates(kind: Kind, drawn: Waves) -> Rates:
    """The rates of these waves, by the rule of verdicts.judge."""
    pooled = pooled_variance(drawn.variances, [kind.seeds - 1] * kind.arms)
    errors = np.sqrt(np.maximum(drawn.variances, pooled[:, None]) / kind.seeds)
    ts = np.abs(drawn.means) / errors
    shares = rerun_share(drawn.rerun_variances, pooled, 1 / kind.runs)
    shape = (tuple(range(kind.seeds)),) * kind.arms
    names_an_arm = np.zeros(len(ts), bool)
    covered = np.zeros(ts.shape, bool)
    all_covered = np.zeros(len(ts), bool)
    for share in np.unique(shares):
        here = shares == share
        without_effects = null(shape, (kind.runs,) * kind.seeds, float(share))
        least = np.sort(without_effects.ps.min(1))
        ps = np.stack([p_of(ts[here, a], without_effects.sorted_ts[:, a]) for a in range(kind.arms)], axis=1)
        lower = np.searchsorted(least, ps.min(1), side="right")  # the first step of verdicts.step_down
        names_an_arm[here] = (1 + lower) / (1 + len(least)) < LEVEL
        reaches = np.array(without_effects.reaches)
        covered[here] = ts[here] <= reaches[:, 0]
        all_covered[here] = (ts[here] <= reaches[:, 1]).all(1)
    return Rates(float(names_an_arm.mean()), float(covered.mean()), float(all_covered.mean()))


def line_of(kind: Kind, rates: Rates) -> str:
    shape = f"{kind.arms} | {kind.seeds} | {kind.runs}"
    found = " | ".join(f"{100 * rate:.1f}" for rate in rates)
    return f"| {kind.about} | {shape} | {found} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--waves", type=int, default=WAVES, help=f"of each kind; default {WAVES}")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the simulation; default {SEED}")
    asked = parser.parse_args(arguments)
    print("| waves without effects | arms | seeds | runs of the control a seed | name an arm, % |", end="")
    print(" 95 % intervals that hold, % | waves whose family intervals all hold, % |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for kind in KINDS:
        print(line_of(kind, judged_rates(kind, simulate(kind, asked.waves, asked.seed))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
