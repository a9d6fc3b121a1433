"""Draws sweeps/figures/gains_by_length.png: what a change gains, at each length of the run.

    python -m sweeps.lab.gains_by_length            from the project's folder; writes the figure

The README shows this figure. It is made of the committed results of waves 15 and 20, which measure changes
of the baseline after several numbers of steps.
"""

from pathlib import Path
from typing import NamedTuple

from data.user_error import run_tool
from sweeps.lab.paths import SHIPPED_FIGURES, SHIPPED_RESULTS
from sweeps.lab.report_figures import plt, save
from sweeps.lab.run_rows import read_lines
from sweeps.lab.verdicts import effects

FIGURE = SHIPPED_FIGURES / "gains_by_length.png"


class Curve(NamedTuple):
    """One change of the baseline, and the wave that measured it at several lengths."""

    label: str
    arm: str
    wave: str
    colour: str
    label_down: int = 0  # points by which the label stands below the last point


HORIZON = "wave15_horizon"
VALUES = "wave20_value_residual_baseline"
CURVES = (
    Curve("Muon rate 0.11, not 0.04", "lr11", HORIZON, "#c4372c"),
    Curve("no U-Net skips", "encoder0", HORIZON, "#8250df"),
    Curve("value residual", "value_residual", VALUES, "#0a7ea4"),
    Curve("Tidal schedule", "tidal", HORIZON, "#bf8700"),
    Curve("value embeddings", "value_embeds", VALUES, "#1a7f37"),
    Curve("output head of its own", "untied", HORIZON, "#24292f", label_down=12),
)


class Point(NamedTuple):
    """A change's effect at one length: bpb less the control's, and the 95 % interval around it."""

    steps: int
    mean: float
    low: float
    high: float


def points_of(curve: Curve, results: Path = SHIPPED_RESULTS) -> list[Point]:
    """The effect of a change in each wave of its ladder, the shortest first."""
    found = []
    for path in results.glob(f"{curve.wave}_h*.jsonl"):
        steps = int(path.stem.rpartition("_h")[2])
        for effect in effects(read_lines(path)):
            if effect.arm == curve.arm:
                found.append(Point(steps, effect.mean, *effect.interval))
    return sorted(found)


def draw(path: Path = FIGURE) -> Path:
    """Write the figure and return its path."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.axhline(0, color="#24292f", lw=0.8)
    for number, curve in enumerate(CURVES):
        points = points_of(curve)
        shift = 1 + 0.012 * (number - len(CURVES) / 2)  # so that the intervals do not hide each other
        steps = [point.steps * shift for point in points]
        means = [point.mean for point in points]
        below = [point.mean - point.low for point in points]
        above = [point.high - point.mean for point in points]
        axes.errorbar(
            steps, means, yerr=(below, above), color=curve.colour, marker="o", ms=4, lw=1.4, elinewidth=0.8
        )
        axes.annotate(
            curve.label,
            (steps[-1], means[-1]),
            xytext=(8, -curve.label_down),
            textcoords="offset points",
            color=curve.colour,
            va="center",
            fontsize=8,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([75, 150, 300, 600], ["75", "150", "300", "600"])
    axes.minorticks_off()
    axes.set_xlim(68, 1150)
    axes.set_xlabel("training steps")
    axes.set_ylabel("bpb less the baseline's\n(below 0 is better)")
    axes.grid(axis="y", color="#eaeef2", lw=0.6)
    axes.set_axisbelow(True)
    return save(figure, path)


def main() -> None:
    print(f"wrote {draw()}")


if __name__ == "__main__":
    run_tool(main)
