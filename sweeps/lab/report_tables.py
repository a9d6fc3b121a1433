"""What sweeps/report.py says of waves, in Markdown: reading the result rows, and every table made of them."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from sweeps.lab import verdicts as fx
from sweeps.lab.paths import ROOT
from sweeps.lab.run_summary import read_events
from sweeps.lab.statistics import Interval, mean
from sweeps.lab.verdicts import Contrast, Effect, Row

ABSENT = "–"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of a wave that the report will read
# The first line of every file that the report owns as a whole.
GENERATED = "<!-- Written by sweeps/report.py from the .jsonl files beside it; changes by hand are lost. -->"
ALL_WAVES = "all_waves"  # the page of all waves together


# Rows


@dataclass(frozen=True)
class Wave:
    """The newest row of every run of a wave; unreadable: lines of its file that are none."""

    name: str
    rows: list[Row]
    unreadable: int = 0

    @property
    def question(self) -> str:
        questions = [str(row["question"]) for row in self.rows if row.get("question")]
        return questions[0] if questions else ""

    @property
    def began(self) -> float:
        """The start of its first run in seconds since 1970; 0 before that."""
        starts = [fx.number(row.get("started")) for row in self.rows]
        return min((start for start in starts if start is not None), default=0.0)

    @property
    def regimes(self) -> list[list[Row]]:
        return fx.by_regime(self.rows)


def read_wave(path: Path, root: Path = ROOT) -> Wave:
    """One file of results. A line that a killed writer cut short is skipped, and counted."""
    rows = []
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if isinstance(value, dict):
            rows.append(value | {"wave": path.stem})
        elif isinstance(value, str):
            unreadable += 1
    return Wave(path.stem, [follow(row, root) for row in fx.latest(rows)], unreadable)


def read_waves(folder: Path, root: Path = ROOT) -> list[Wave]:
    """All of a folder, the oldest first; those that have not begun, last."""
    waves = [read_wave(path, root) for path in sorted(folder.glob("*.jsonl")) if NAME.fullmatch(path.stem)]
    return sorted(waves, key=lambda wave: (wave.began == 0, wave.began))


def follow(row: Row, root: Path) -> Row:
    """A running run with what its own event log says so far; all other rows as they are."""
    if row.get("state") != "running" or not row.get("out_dir"):
        return row
    log_folder = root / str(row["out_dir"]) / "logs"
    try:
        logs = sorted(log_folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        events = read_events(logs[-1])[0] if logs else []
    except OSError:  # it may be moved or removed at any time
        return row
    steps = newest_by_step(events, "step")
    vals = newest_by_step(events, "val")
    known = {
        "loss_curve": [[e.get("step"), e.get("train_ms"), e.get("train_loss")] for e in steps],
        "curve": [[e.get("step"), e.get("train_ms"), e.get("val_bpb")] for e in vals],
        "lr_trace": [[e.get("progress"), e.get("lr_scale")] for e in steps],
        "steps": max((e.get("step") or 0 for e in steps + vals), default=None),
    }
    if steps:
        known["progress"] = steps[-1].get("progress")
        known["train_loss"] = steps[-1].get("train_loss")
    return row | known


def newest_by_step(events: Iterable[dict], event_name: str) -> list[dict]:
    """Ascending; a step that a resumed run did again, as it went the last time."""
    newest = {}
    for event in events:
        if event["event"] == event_name and fx.number(event.get("step")) is not None:
            newest[event["step"]] = event
    return [newest[step] for step in sorted(newest)]


# Cells


def cell(text: object) -> str:
    """Text as one cell of a Markdown table: nothing in it can end the cell, the line or a marker."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("|", "\\|")


def code(text: object) -> str:
    plain = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|").replace("-->", "--")
    return f"`{plain}`" if plain else ""


def signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.4f}"


def plain(value: float | None, pattern: str = "{:.4f}") -> str:
    return ABSENT if value is None else pattern.format(value)


def between(interval: Interval | None) -> str:
    return ABSENT if interval is None else f"{interval.low:+.4f} to {interval.high:+.4f}"


def chance(p: float | None) -> str:
    if p is None:
        return ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def by_column(column: fx.Column | None) -> str:
    return ABSENT if column is None else f"{column.mean:+.4f} ({column.n} {column.how})"


def of_contrast(value: Contrast | None) -> str:
    if value is None:
        return ABSENT
    if value.interval is None:
        return f"{value.mean:+.4f}"
    return f"{value.mean:+.4f} ({between(value.interval)})"


def table(head: str, align: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines. head: words parted by |; align: l or r of each column."""
    marks = {"l": "---", "r": "--:"}
    lines = [f"| {' | '.join(head.split('|'))} |"]
    lines.append(f"|{'|'.join(marks[letter] for letter in align)}|")
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return lines


def spread(values: Iterable[float | None], pattern: str = "{:,.0f}") -> str:
    """One value, or the range."""
    known = [value for value in values if value is not None]
    if not known:
        return ABSENT
    low = pattern.format(min(known))
    high = pattern.format(max(known))
    return low if low == high else f"{low} to {high}"


def numbers_of(rows: Iterable[Row], name: str) -> list[float | None]:
    return [fx.number(row.get(name)) for row in rows]


# One wave


def common(rows: Iterable[Row], name: str) -> str:
    """A field that all runs agree on, as text; all values where they do not."""
    texts = dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None)
    return " and ".join(texts) or ABSENT


def control_row(rows: Sequence[Row]) -> Row:
    """The first run of the control; of a wave without one, the first run."""
    control = fx.first_of(rows, fx.CONTROL)
    if control is not None:
        return control
    return rows[0] if rows else {}


def ran_or_all(rows: Sequence[Row]) -> Sequence[Row]:
    """The valid runs; all rows where none is."""
    return fx.valid(rows) or list(rows)


def steps_text(rows: Sequence[Row]) -> str:
    """How many steps the runs made, and what ended them, where that is known."""
    steps = f"{spread(numbers_of(rows, 'steps'))} steps"
    are_step_limited = fx.step_limited(rows)
    if are_step_limited is None:
        return steps
    return steps + (", all that were asked for" if are_step_limited else ", limited by the clock")


def regime_line(rows: Sequence[Row]) -> str:
    """Where the numbers of a table come from, and how far the runs went."""
    ran = ran_or_all(rows)
    control = control_row(ran)
    size = {name: fx.number(fx.setting(control, name)) for name in fx.SIZES}
    is_compiled = common(ran, "compile").lower() in ("true", "1", "auto")
    words = [
        steps_text(ran),
        f"{spread(numbers_of(ran, 'tokens'))} tokens",
        f"{plain(size['train_batch_tokens'], '{:,.0f}')} tokens a step",
        f"sequence {plain(size['train_seq_len'], '{:.0f}')}",
        f"{plain(size['num_layers'], '{:.0f}')} layers x {plain(size['model_dim'], '{:.0f}')}",
        f"vocabulary {plain(size['vocab_size'], '{:,.0f}')}",
        f"preset {common(ran, 'parent')}",
        "seeds " + " ".join(dict.fromkeys(str(row.get("seed")) for row in ran)),
        f"{common(ran, 'world_size')} x {common(ran, 'device')}",
        f"{common(ran, 'dtype')}, {'compiled' if is_compiled else 'eager'}",
        f"torch {common(ran, 'torch')}, numpy {common(ran, 'numpy')}, Python {common(ran, 'python')}",
        f"code {common(ran, 'code_sha256')[:12]}",
        f"validation text {common(ran, 'val_sha256')[:12]}, {common(ran, 'val_tokens')} tokens",
    ]
    return "; ".join(words)


def counts_line(rows: Sequence[Row]) -> str:
    """Planned, started, finished, scored, valid, and how many are in each state."""
    counted = fx.counts(rows)
    states = ", ".join(f"{number} {state}" for state, number in counted.states.items())
    return (
        f"{counted.planned} runs planned, {counted.started} started, {counted.finished} finished, "
        f"{counted.scored} with a score, {counted.valid} valid ({states})"
    )


def noise_line(rows: Sequence[Row]) -> str:
    """Both parts of the noise, and how to read p beside the family interval."""
    noise = fx.noise(rows)
    rerun = "not measured"
    if noise.rerun_df:
        rerun = f"SD {noise.rerun_sd:.4f}, df {noise.rerun_df}"
    pair = ABSENT
    if noise.pair_sd is not None:
        pair = f"SD {noise.pair_sd:.4f} from {noise.pair_arms} arms"
    if noise.seed_sd is not None and noise.rerun_df:
        pair += f", {noise.seed_sd:.4f} of it from seeds"
    return (
        f"same seed again {rerun}; one paired difference {pair}; floor {noise.floor:.4f}. "
        "p is family-wise: 5 % of waves without effects name any arm, if arms and control are equally noisy. "
        "The family interval holds for all arms at once; p steps down from arm to arm and may be clear where "
        "that interval just touches zero."
    )


MAIN_HEAD = "arm|change|n|bpb|less control|SD|95 %|family|p|verdict|same steps|same time"
MAIN_ALIGN = "llrrrrrrrlrr"


def control_cells(rows: Sequence[Row]) -> list[str]:
    """The first line of the main table."""
    scores = list(fx.scores(rows, fx.CONTROL).values())
    runs = [row for row in rows if row.get("arm") == fx.CONTROL]
    preset = code(common(runs, "parent")) if runs else ""
    cells = ["`control`", preset, str(len(scores)), plain(mean(scores) if scores else None)]
    return cells + [""] * 8  # it has no difference to itself


def effect_cells(rows: Sequence[Row], effect: Effect) -> list[str]:
    """An arm's line of the main table."""
    scores = list(fx.scores(rows, effect.arm).values())
    return [
        code(effect.arm),
        code(" ".join(f"{knob}={value}" for knob, value in effect.change.items())),
        str(effect.n),
        plain(mean(scores) if scores else None),
        signed(effect.mean),
        plain(effect.sd),
        between(effect.interval),
        between(effect.family),
        chance(effect.p_family),
        effect.verdict,
        by_column(effect.same_steps),
        by_column(effect.same_time),
    ]


def effect_rows(rows: Sequence[Row], effects: Sequence[Effect]) -> list[list[str]]:
    """The cells of the main table: the control, then every arm, whatever became of it."""
    return [control_cells(rows), *(effect_cells(rows, effect) for effect in effects)]


def notes(rows: Sequence[Row], effects: Sequence[Effect]) -> str:
    """How far the table may be trusted, its column at equal time above all."""
    ran = fx.valid(rows)
    sentences = [
        "Same steps, same time: pairs read where the shorter run ended; curve: from live validations"
    ]
    if fx.step_limited(ran):
        sentences.append("All runs were limited by steps, so time is only what each happened to take")
    unsteady = fx.unsteady(effects, fx.noise(rows).floor)
    if unsteady:
        names = ", ".join(unsteady)
        names = names[:1].upper() + names[1:]
        sentences.append(f"{names}: far noisier than the floor, so p is hopeful there; more seeds")
    shared = fx.sharing(ran)
    if shared:
        sentences.append(
            f"{shared} of {len(ran)} runs shared the machine with another, so their time is a busy one's"
        )
    return ". ".join(sentences) + "."


def unranked(rows: Sequence[Row]) -> list[str]:
    """The runs that gave no number to rank, with why."""
    ranked = {fx.run_id(row) for row in fx.valid(rows)}
    texts = []
    for row in rows:
        if fx.run_id(row) not in ranked:
            why = f": {cell(row['message'])[:200]}" if row.get("message") else ""
            texts.append(f"{code(fx.run_id(row))} {cell(row.get('state') or ABSENT)}{why}")
    return texts


def trend_cells(trend: fx.Trend) -> list[str]:
    return [
        code(trend.knob),
        " ".join(f"{level:g}" for level in trend.levels),
        " ".join(f"{value:+.4f}" for value in trend.means),
        str(trend.seeds),
        f"{trend.slope:+.4f} a {trend.unit} (p {chance(trend.slope_p)})",
        chance(trend.page_p),
        chance(trend.p_family),
        f"{trend.verdict}, lowest at {trend.best:g}",
    ]


def trend_table(rows: Sequence[Row]) -> list[str]:
    trends = fx.trends(rows)
    if not trends:
        return []
    head = "knob|values|bpb against the first|seeds|slope|Page's p|p (Holm)|trend"
    return ["", *table(head, "lllrlrrl", [trend_cells(trend) for trend in trends])]


def ablation_table(ablation: fx.Ablation | None, title: str = "") -> list[str]:
    if ablation is None:
        return []
    lines = []
    for part in ablation.parts:
        effects = [of_contrast(part.alone), of_contrast(part.last), of_contrast(part.interaction)]
        lines.append([code(part.name), *effects])
    lines.append(["sum of the parts, each alone", of_contrast(ablation.total), "", ""])
    name = f"the whole ({code(ablation.whole_name)})"
    lines.append([name, of_contrast(ablation.whole), "", of_contrast(ablation.interaction)])
    above = [title, ""] if title else []
    head = "part|alone|with all others there|difference (interaction)"
    return ["", *above, *table(head, "llll", lines)]


def held_out_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for one in fx.held_out(rows):
        lines.append([
            code(one.arm), of_contrast(one.selection), of_contrast(one.held_out), of_contrast(one.shrink)
        ])  # fmt: skip
    if not lines:
        return []
    head = "finalist|on the text it was chosen by|on the held-out half|held-out less chosen"
    return ["", *table(head, "llll", lines)]


def regime_block(rows: Sequence[Row], title: str) -> list[str]:
    """All tables of one regime."""
    effects = fx.effects(rows)
    lines = [f"Regime    {title}{cell(regime_line(rows))}", ""]
    lines += [f"Counts    {cell(counts_line(rows))}", ""]
    lines += [f"Noise     {noise_line(rows)}", ""]
    lines += table(MAIN_HEAD, MAIN_ALIGN, effect_rows(rows, effects))
    lines += ["", cell(notes(rows, effects))]
    lines += trend_table(rows)
    lines += ablation_table(fx.ablation(rows))
    lines += held_out_table(rows)
    missing = unranked(rows)
    if missing:
        lines += ["", "Not ranked: " + "; ".join(missing) + "."]
    return lines


def figure_lines(figures: Iterable[str]) -> list[str]:
    return [f"![{Path(path).stem}]({path})" for path in figures]


def wave_block(wave: Wave, figures: Sequence[str] = ()) -> str:
    """The tables of a wave, one set for each regime, then its figures."""
    groups = wave.regimes
    lines = []
    for number, rows in enumerate(groups, 1):
        title = f"{number} of {len(groups)}, not to be merged: " if len(groups) > 1 else ""
        lines += [*regime_block(rows, title), ""]
    if not groups:
        lines += ["No runs yet.", ""]
    if wave.unreadable:
        lines += [f"{wave.unreadable} unreadable line(s) in the results were skipped.", ""]
    lines += figure_lines(figures)
    return "\n".join(lines).rstrip() + "\n"


def wave_page(wave: Wave, figures: Sequence[str] = ()) -> str:
    """The file WAVE.md beside WAVE.jsonl; `figures` are paths as that file names them."""
    question = cell(wave.question) or "(none in the results)"
    together = f"All waves together: [{ALL_WAVES}.md]({ALL_WAVES}.md)."
    head = [GENERATED, "", f"# {wave.name}", "", f"Question  {question}", "", together, ""]
    return "\n".join(head) + "\n" + wave_block(wave, figures)


# Across waves


@dataclass(frozen=True)
class Step:
    """A wave's place in the progression; best is None where no arm is better beyond noise."""

    wave: str
    regime: int
    length: str  # steps that its runs made
    parent: str  # the preset that its arms are changes of
    control: float | None
    best: Effect | None
    best_bpb: float | None


def all_rows(waves: Iterable[Wave]) -> list[Row]:
    """Of all waves, each run under a name of its own."""
    rows = []
    for wave in waves:
        for row in wave.rows:
            rows.append(row | {"run_id": f"{wave.name}/{fx.run_id(row)}"})
    return rows


def all_regimes(waves: Iterable[Wave]) -> list[list[Row]]:
    """The rows of all waves by regime; runs that never started are in none."""
    groups = []
    for wave in waves:
        started = [row for row in all_rows([wave]) if row.get("code_sha256") is not None]
        groups += fx.by_regime(started)
    return fx.joined(groups)


def all_ladders(waves: Iterable[Wave]) -> list[fx.Ladder]:
    """Over waves that differ in the length of their runs only."""
    ladders = []
    for group in fx.by_regime(fx.valid(all_rows(waves)), fx.HORIZON):
        ladders += fx.ladders(group)
    return ladders


def all_ablations(waves: Iterable[Wave]) -> list[tuple[str, str, fx.Ablation]]:
    """(wave that adds parts to a base, wave that takes them from the stack, what they say together). Which
    control is the stack: the better one."""
    ablations = []
    for adds, drops in permutations(waves, 2):
        if len(fx.by_regime(fx.valid(all_rows([adds, drops])))) != 1:
            continue
        ablation = fx.add_and_drop(adds.rows, drops.rows)
        if ablation and ablation.whole and ablation.whole.mean < 0:
            ablations.append((adds.name, drops.name, ablation))
    return ablations


def best_arm(rows: Sequence[Row]) -> Effect | None:
    """The arm of a wave that is better than the control by most, beyond noise."""
    better = [effect for effect in fx.effects(rows) if effect.verdict == fx.BETTER]
    return min(better, key=lambda effect: effect.mean, default=None)


def mean_score(rows: Sequence[Row], arm: str) -> float | None:
    scores = list(fx.scores(rows, arm).values())
    return mean(scores) if scores else None


def step_of(wave: str, regime: int, rows: Sequence[Row]) -> Step:
    """A wave's place in the progression, from its rows of one regime."""
    ran = ran_or_all(rows)
    best = best_arm(rows)
    return Step(
        wave=wave,
        regime=regime,
        length=spread(numbers_of(ran, "steps")),
        parent=common(ran, "parent"),
        control=mean_score(rows, fx.CONTROL),
        best=best,
        best_bpb=mean_score(rows, best.arm) if best else None,
    )


def progression(waves: Iterable[Wave]) -> list[Step]:
    """Each wave's control and its best arm, in the order in which they ran; a step for each regime of it."""
    steps = []
    for number, group in enumerate(all_regimes(waves), 1):
        for name in dict.fromkeys(str(row["wave"]) for row in group):
            steps.append(step_of(name, number, [row for row in group if row["wave"] == name]))
    order = {wave.name: index for index, wave in enumerate(waves)}
    return sorted(steps, key=lambda step: (order[step.wave], step.regime))


def ladder_table(waves: Sequence[Wave]) -> list[str]:
    lines = []
    for ladder in all_ladders(waves):
        rungs = "; ".join(f"{rung.length:g}: {of_contrast(rung.effect)}" for rung in ladder.rungs)
        change = code(ladder.change)
        parent = code(ladder.parent)
        lines.append([change, parent, ladder.unit, rungs, of_contrast(ladder.slope), ladder.says])
    if not lines:
        return []
    head = "change|made to|length in|effect at each length (95 %)|slope a doubling|sign"
    return ["", *table(head, "llllll", lines)]


def best_of(step: Step) -> str:
    return code(step.best.arm) if step.best else "none beyond noise"


def across_block(waves: Sequence[Wave], figures: Sequence[str] = ()) -> str:
    """What all waves say together: regimes, a line for each wave, ladders of length, parts and wholes."""
    lines = [f"All {len(waves)} waves: {cell(counts_line(all_rows(waves)))}", ""]
    for number, rows in enumerate(all_regimes(waves), 1):
        lines += [f"Regime {number}  {cell(regime_line(rows))}", ""]
    cells = []
    for step in progression(waves):
        cells.append([
            f"[{step.wave}]({step.wave}.md)",
            str(step.regime),
            plain(step.control),
            best_of(step),
            plain(step.best_bpb),
            signed(step.best.mean if step.best else None),
            between(step.best.family if step.best else None),
        ])  # fmt: skip
    lines += table("wave|regime|control bpb|best arm|its bpb|less control|family", "lrrlrrr", cells)
    lines += ladder_table(waves)
    for adds, drops, ablation in all_ablations(waves):
        title = f"Parts added one by one in {code(adds)}, taken out one by one in {code(drops)}:"
        lines += ablation_table(ablation, title)
    lines += ["", *figure_lines(figures)]
    return "\n".join(lines).rstrip() + "\n"


def across_page(waves: Sequence[Wave], figures: Sequence[str] = ()) -> str:
    """The file all_waves.md."""
    head = [GENERATED, "", "# All waves together", ""]
    return "\n".join(head) + "\n" + across_block(waves, figures)


def index_block(waves: Sequence[Wave], folder: str) -> str:
    """The list of all waves for experiment_log.md; `folder` is where that file finds their pages."""
    cells = []
    for step in progression(waves):
        link = f"[{step.wave}]({folder}/{step.wave}.md)"
        less_control = signed(step.best.mean if step.best else None)
        cells.append([link, step.length, cell(step.parent), plain(step.control), best_of(step), less_control])
    counts = cell(counts_line(all_rows(waves)))
    together = f"All {len(waves)} waves: {counts}. Together: [{ALL_WAVES}.md]({folder}/{ALL_WAVES}.md)."
    head = "wave, oldest first|steps|preset|control bpb|best arm|less control"
    return "\n".join([together, "", *table(head, "lrlrlr", cells)]) + "\n"
