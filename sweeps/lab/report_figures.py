"""The figures of sweeps/report.py: effects with their intervals, validation curves, and ladders."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from sweeps.lab import verdicts as fx  # noqa: E402
from sweeps.lab.report_tables import Wave  # noqa: E402
from sweeps.lab.statistics import mean  # noqa: E402
from sweeps.lab.verdicts import Effect, Ladder, Row  # noqa: E402

COLOURS = {fx.BETTER: "#1a7f37", fx.WORSE: "#c4372c", fx.INSIDE: "#57606a", fx.UNDECIDED: "#a8b0b8"}
MOST_CURVES = 10
LADDER_COLUMNS = 4
plt.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "figure.dpi": 110, "savefig.bbox": "tight", "legend.frameon": False,
})  # fmt: skip


def save(figure, path: Path) -> Path:
    """The same bytes for the same data, wherever it is drawn with one version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path


def plain(text: object) -> str:
    """Text that matplotlib does not take for a formula."""
    return str(text).replace("$", r"\$")


def forest(rows: Sequence[Row], title: str, path: Path) -> Path | None:
    """Every arm's difference: dots are seeds, thick 95 %, thin family-wise, grey one SD of a difference."""
    effects = [effect for effect in fx.effects(rows) if effect.mean is not None]
    if not effects:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 1.4 + 0.28 * len(effects)))
    floor = fx.noise(rows).floor
    axes.axvspan(-floor, floor, color="#d0d7de", alpha=0.5, lw=0, label="noise floor of one difference (SD)")
    axes.axvline(0, color="#24292f", lw=0.8)
    for line, effect in enumerate(effects):
        draw_arm(axes, line, effect)
    axes.set_yticks(range(len(effects)), [plain(effect.arm) for effect in effects])
    axes.set_ylim(len(effects) - 0.4, -0.6)
    axes.set_xlabel("bpb less the control's (left is better)")
    axes.set_title(plain(title), loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.55 / figure.get_figheight() - 0.04), fontsize=8)
    axes.grid(axis="x", color="#eaeef2", lw=0.6)
    axes.set_axisbelow(True)
    return save(figure, path)


def draw_arm(axes, line: int, effect: Effect) -> None:
    """One arm of the forest, on its line from the top."""
    colour = COLOURS[effect.verdict]
    if effect.family:
        axes.plot(effect.family, [line, line], color=colour, lw=1)
        axes.plot(effect.interval, [line, line], color=colour, lw=3, alpha=0.75)
    seeds = list(effect.pairs.values())
    axes.plot(seeds, [line] * effect.n, "o", ms=3.2, mfc="white", mec=colour, mew=0.9)
    axes.plot([effect.mean], [line], "D", ms=5, color=colour)
    axes.annotate(
        effect.verdict,
        (1.01, line),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8,
        color=colour,
    )


def average_curve(rows: Sequence[Row], arm: str) -> list[tuple[float, float]]:
    """Mean over the arm's runs, at the steps that all of them have."""
    curves = []
    for runs in fx.by_seed(rows, arm).values():
        for row in runs:
            curve = dict(fx.points(row, fx.STEPS))
            if curve:
                curves.append(curve)
    if not curves:
        return []
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, mean([curve[step] for curve in curves])) for step in steps if step > 0]


def curves(rows: Sequence[Row], title: str, path: Path) -> Path | None:
    """Validation against steps, of the control and of the arms that moved most."""
    effects = [effect for effect in fx.effects(rows) if effect.mean is not None]
    effects.sort(key=lambda effect: -abs(effect.mean))
    arms = [fx.CONTROL, *(effect.arm for effect in effects[: MOST_CURVES - 1])]
    lines = {}
    for arm in arms:
        line = average_curve(rows, arm)
        if len(line) > 1:
            lines[arm] = line
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 4))
    colours = plt.get_cmap("tab10")
    for number, (arm, line) in enumerate(lines.items()):
        steps, values = zip(*line, strict=True)
        style = {"color": "black", "lw": 2}
        if arm != fx.CONTROL:
            style = {"color": colours(number % 10), "lw": 1.2}
        axes.plot(steps, values, label=plain(arm), **style)
    axes.set(xlabel="step", ylabel="validation bpb of the live weights")
    left_out = len(effects) + 1 - len(arms)
    more = f" ({left_out} arms that moved less are left out)" if left_out > 0 else ""
    axes.set_title(plain(title + more), loc="left")
    axes.grid(color="#eaeef2", lw=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return save(figure, path)


def ladders(of_changes: Sequence[Ladder], path: Path) -> Path | None:
    """A small panel for each change: its effect (95 %) at every length of run that was tried.

    All panels share their axes, so that what shrinks with length is seen to shrink."""
    if not of_changes:
        return None
    columns = min(LADDER_COLUMNS, len(of_changes))
    rows = math.ceil(len(of_changes) / columns)
    size = (2.6 * columns, 0.8 + 2.1 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, ladder in zip(panels, of_changes, strict=False):
        draw_ladder(axes, ladder)
        lengths = []
        for other in of_changes:
            if other.unit == ladder.unit:
                lengths += [rung.length for rung in other.rungs]
        axes.set_xlim(min(lengths) / 1.3, max(lengths) * 1.3)
    for axes in panels[len(of_changes) :]:
        axes.axis("off")
    figure.suptitle(
        "Effect against length of run, 95 % intervals: green is better, red worse, grey holds zero",
        fontsize=10,
    )
    figure.supylabel("bpb less the control's (below zero is better)", fontsize=9)
    figure.tight_layout()
    return save(figure, path)


def draw_ladder(axes, one: Ladder) -> None:
    """One change: a dot and its interval at each length, coloured where the interval leaves out zero."""
    lengths = [rung.length for rung in one.rungs]
    axes.axhline(0, color="#24292f", lw=0.8)
    axes.plot(lengths, [rung.effect.mean for rung in one.rungs], color="#8c959f", lw=1)
    for rung in one.rungs:
        colour = COLOURS[fx.INSIDE]
        if rung.effect.clear:
            colour = COLOURS[fx.BETTER if rung.effect.mean < 0 else fx.WORSE]
        if rung.effect.interval:
            axes.plot([rung.length, rung.length], rung.effect.interval, color=colour, lw=1.6)
        axes.plot([rung.length], [rung.effect.mean], "o", ms=4.5, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.minorticks_off()
    axes.set_title(plain("\n".join([*one.change.split(), f"on {one.parent}"])), fontsize=7.5)
    axes.set_xlabel(one.unit, fontsize=8)
    axes.grid(axis="y", color="#eaeef2", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def draw_wave(wave: Wave, folder: Path) -> list[Path]:
    """The figures of one wave, two for each regime; those without anything to show are not made."""
    drawn = []
    groups = wave.regimes
    for number, rows in enumerate(groups, 1):
        stem = wave.name
        title = wave.name
        if len(groups) > 1:
            stem += f"_{number}"
            title += f", regime {number}"
        drawn.append(forest(rows, title, folder / f"{stem}_effects.png"))
        drawn.append(curves(rows, title, folder / f"{stem}_curves.png"))
    return [path for path in drawn if path]


def draw(
    waves: Sequence[Wave], of_changes: Sequence[Ladder], chosen: Iterable[str], folder: Path, base: Path
) -> dict[str, list[str]]:
    """All figures: wave name, or "" for those of all waves -> paths as a page in `base` names them."""
    together = ladders(of_changes, folder / "ladders.png")
    drawn = {"": [together] if together else []}
    names = set(chosen)
    for wave in waves:
        if wave.name in names:
            drawn[wave.name] = draw_wave(wave, folder)
    links = {}
    for name, paths in drawn.items():
        links[name] = [Path(os.path.relpath(path, base)).as_posix() for path in paths]
    return links
