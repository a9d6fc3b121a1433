"""How often waves in which no arm does anything name one all the same: `python -m sweeps.lab.null_study`.

It draws such waves, judges them by the rule of verdicts.py, and prints a Markdown table. For each design of
a wave it tells how many of them name an arm (5 % are promised), how many of the 95 % intervals hold the true
difference, zero, and in how many waves all family intervals do. results/study_false_alarms.md has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.user_error import run_tool
from sweeps.lab.verdicts import LEVEL, null, p_of, pooled_variance, rerun_share

SEED = 19
WAVES = 20_000


@dataclass(frozen=True)
class Design:
    """Waves of one design: their shape, and where their noise comes from, in SDs of a usual run."""

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


DESIGNS = (
    Design("no reruns", arms=1, seeds=3),
    Design("no reruns", arms=5, seeds=2),
    Design("no reruns", arms=12, seeds=3),
    Design("no reruns", arms=20, seeds=5),
    Design("reruns give the same bits", arms=2, seeds=3, runs=2),
    Design("reruns give the same bits", arms=12, seeds=3, runs=2),
    Design("reruns give the same bits", arms=12, seeds=3, runs=4),
    Design("reruns vary, a quarter of the variance", arms=1, seeds=3, runs=2, share=0.25),
    Design("reruns vary, a quarter of the variance", arms=12, seeds=3, runs=2, share=0.25),
    Design("reruns vary, half of the variance", arms=2, seeds=3, runs=2, share=0.5),
    Design("reruns vary, half of the variance", arms=12, seeds=3, runs=4, share=0.5),
    Design("reruns vary as much as seeds", arms=1, seeds=3, runs=2, share=1.0),
    Design("reruns vary as much as seeds", arms=2, seeds=3, runs=2, share=1.0),
    Design("reruns vary as much as seeds", arms=5, seeds=2, runs=3, share=1.0),
    Design("reruns vary as much as seeds", arms=12, seeds=3, runs=2, share=1.0),
    Design("reruns vary as much as seeds", arms=12, seeds=3, runs=4, share=1.0),
    Design("reruns vary as much as seeds", arms=12, seeds=5, runs=2, share=1.0),
    Design("control 1.5 times as noisy as the arms", arms=12, seeds=3, control_sd=1.5),
    Design("control twice as noisy", arms=2, seeds=3, control_sd=2.0),
    Design("control twice as noisy", arms=12, seeds=3, control_sd=2.0),
    Design("control twice as noisy, reruns vary", arms=12, seeds=3, runs=4, share=0.5, control_sd=2.0),
    Design("control half as noisy", arms=12, seeds=3, control_sd=0.5),
    Design("one arm three times as noisy", arms=12, seeds=3, noisy_arms=1),
    Design("half of the arms three times as noisy", arms=12, seeds=3, noisy_arms=6),
)


def simulate(design: Design, waves: int, seed: int = SEED) -> Waves:
    """Waves without effects: all scores are normal, each seed's own level drops out of the differences."""
    rng = np.random.default_rng(seed)
    of_seed = rng.standard_normal((waves, design.seeds)) * np.sqrt(1 - design.share)
    of_run = rng.standard_normal((waves, design.seeds, design.runs)) * np.sqrt(design.share)
    control = design.control_sd * (of_seed + of_run.mean(-1))
    rerun_variances = np.zeros(waves)
    if design.runs > 1:
        rerun_variances = design.control_sd**2 * of_run.var(-1, ddof=1).mean(-1)
    scores = rng.standard_normal((waves, design.arms, design.seeds))
    scores[:, : design.noisy_arms] *= 3
    pairs = scores - control[:, None, :]
    return Waves(pairs.mean(-1), pairs.var(-1, ddof=1), rerun_variances)


def judged_rates(design: Design, drawn: Waves) -> Rates:
    """The rates of these waves, by the rule of verdicts.judge."""
    pooled = pooled_variance(drawn.variances, [design.seeds - 1] * design.arms)
    errors = np.sqrt(np.maximum(drawn.variances, pooled[:, None]) / design.seeds)
    ts = np.abs(drawn.means) / errors
    shares = rerun_share(drawn.rerun_variances, pooled, 1 / design.runs)
    shape = (tuple(range(design.seeds)),) * design.arms
    names_an_arm = np.zeros(len(ts), bool)
    covered = np.zeros(ts.shape, bool)
    all_covered = np.zeros(len(ts), bool)
    for share in np.unique(shares):
        at_share = shares == share
        without_effects = null(shape, (design.runs,) * design.seeds, float(share))
        least = np.sort(without_effects.ps.min(1))
        ps = np.stack(
            [p_of(ts[at_share, a], without_effects.sorted_ts[:, a]) for a in range(design.arms)], axis=1
        )
        lower = np.searchsorted(least, ps.min(1), side="right")  # the first step of verdicts.step_down
        names_an_arm[at_share] = (1 + lower) / (1 + len(least)) < LEVEL
        reaches = np.array(without_effects.reaches)
        covered[at_share] = ts[at_share] <= reaches[:, 0]
        all_covered[at_share] = (ts[at_share] <= reaches[:, 1]).all(1)
    return Rates(float(names_an_arm.mean()), float(covered.mean()), float(all_covered.mean()))


def line_of(design: Design, rates: Rates) -> str:
    shape = f"{design.arms} | {design.seeds} | {design.runs}"
    found = " | ".join(f"{100 * rate:.1f}" for rate in rates)
    return f"| {design.about} | {shape} | {found} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--waves", type=int, default=WAVES, help=f"of each design; default {WAVES}")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the simulation; default {SEED}")
    asked = parser.parse_args(arguments)
    print("| waves without effects | arms | seeds | runs of the control a seed | name an arm, % |", end="")
    print(" 95 % intervals that hold, % | waves whose family intervals all hold, % |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for design in DESIGNS:
        print(line_of(design, judged_rates(design, simulate(design, asked.waves, asked.seed))), flush=True)
    return 0


if __name__ == "__main__":
    run_tool(main)
