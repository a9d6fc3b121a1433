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

ABSENT, NAME = "–", re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
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
        return next((str(row["question"]) for row in self.rows if row.get("question")), "")

    @property
    def began(self) -> float:
        return min((t for row in self.rows if (t := fx.number(row.get("started"))) is not None), default=0.0)

    @property
    def regimes(self) -> list[list[Row]]:
        return fx.by_regime(self.rows)


def read_wave(path: Path, root: Path = ROOT) -> Wave:
    """One file of results. A line that a killed writer cut short is skipped, and counted."""
    rows, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if isinstance(row, dict):
            rows.append(row | dict(wave=path.stem))
        unreadable += isinstance(row, str)
    return Wave(path.stem, [follow(row, root) for row in fx.latest(rows)], unreadable)


def read_waves(folder: Path, root: Path = ROOT) -> list[Wave]:
    """All of a folder, the oldest first; those that have not begun, last."""
    waves = [read_wave(path, root) for path in sorted(folder.glob("*.jsonl")) if NAME.fullmatch(path.stem)]
    return sorted(waves, key=lambda wave: (wave.began == 0, wave.began))


def follow(row: Row, root: Path) -> Row:
    """A running run with what its own event log says so far; all other rows as they are."""
    folder = root / str(row.get("out_dir") or "")
    if row.get("state") != "running" or not row.get("out_dir"):
        return row
    try:
        logs = sorted((folder / "logs").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        events = read_events(logs[-1])[0] if logs else []
    except OSError:  # it may be moved or removed at any time
        return row
    steps, vals = ([*newest_by_step(events, kind)] for kind in ("step", "val"))
    return row | dict(
        loss_curve=[[e.get("step"), e.get("train_ms"), e.get("train_loss")] for e in steps],
        curve=[[e.get("step"), e.get("train_ms"), e.get("val_bpb")] for e in vals],
        lr_trace=[[e.get("progress"), e.get("lr_scale")] for e in steps],
        **{k: steps[-1].get(k) for k in ("progress", "train_loss") if steps},
        steps=max((e.get("step") or 0 for e in steps + vals), default=None),
    )


def newest_by_step(events: Iterable[dict], kind: str) -> Iterable[dict]:
    """Ascending; a step that a resumed run did again, as it went the last time."""
    found = {e["step"]: e for e in events if e["event"] == kind and fx.number(e.get("step")) is not None}
    return (found[step] for step in sorted(found))


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
    return ABSENT if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def by_column(column: fx.Column | None) -> str:
    return ABSENT if column is None else f"{column.mean:+.4f} ({column.n} {column.how})"


def of_contrast(value: Contrast | None) -> str:
    if value is None:
        return ABSENT
    return f"{value.mean:+.4f} ({between(value.interval)})" if value.interval else f"{value.mean:+.4f}"


def table(head: str, align: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines. head: words parted by |; align: l or r of each column."""
    marks = {"l": "---", "r": "--:"}
    lines = [f"| {' | '.join(head.split('|'))} |", f"|{'|'.join(marks[a] for a in align)}|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def spread(values: Iterable[float | None], pattern: str = "{:,.0f}") -> str:
    """One value, or the range."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return ABSENT
    low, high = pattern.format(known[0]), pattern.format(known[-1])
    return low if low == high else f"{low} to {high}"


# One wave


def common(rows: Iterable[Row], name: str) -> str:
    """A field that all runs agree on, as text; all values where they do not."""
    found = dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None)
    return " and ".join(found) or ABSENT


def regime_line(rows: Sequence[Row]) -> str:
    """Where the numbers of a table come from, and how far the runs went."""
    ran = fx.valid(rows) or list(rows)
    control = next((row for row in ran if row.get("arm") == fx.CONTROL), ran[0] if ran else {})
    size = {name: fx.number(fx.setting(control, name)) for name in fx.SIZES}
    limited = {True: ", all that were asked for", False: ", limited by the clock", None: ""}
    compiled = "compiled" if common(ran, "compile").lower() in ("true", "1", "auto") else "eager"
    words = [
        f"{spread(fx.number(row.get('steps')) for row in ran)} steps{limited[fx.step_limited(ran)]}",
        f"{spread(fx.number(row.get('tokens')) for row in ran)} tokens",
        f"{plain(size['train_batch_tokens'], '{:,.0f}')} tokens a step",
        f"sequence {plain(size['train_seq_len'], '{:.0f}')}",
        f"{plain(size['num_layers'], '{:.0f}')} layers x {plain(size['model_dim'], '{:.0f}')}",
        f"vocabulary {plain(size['vocab_size'], '{:,.0f}')}",
        f"preset {common(ran, 'parent')}",
        "seeds " + " ".join(dict.fromkeys(str(row.get("seed")) for row in ran)),
        f"{common(ran, 'world_size')} x {common(ran, 'device')}",
        f"{common(ran, 'dtype')}, {compiled}",
        f"torch {common(ran, 'torch')}, numpy {common(ran, 'numpy')}, Python {common(ran, 'python')}",
        f"code {common(ran, 'code_sha256')[:12]}",
        f"validation text {common(ran, 'val_sha256')[:12]}, {common(ran, 'val_tokens')} tokens",
    ]
    return "; ".join(words)


def counts_line(rows: Sequence[Row]) -> str:
    """Planned, started, finished, scored, valid, and how many are in each state."""
    found = fx.counts(rows)
    states = ", ".join(f"{number} {state}" for state, number in found.states.items())
    return (
        f"{found.planned} runs planned, {found.started} started, {found.finished} finished, "
        f"{found.scored} with a score, {found.valid} valid ({states})"
    )


def noise_line(rows: Sequence[Row]) -> str:
    """Both parts of the noise, and how to read p beside the family interval."""
    found = fx.noise(rows)
    rerun = "not measured"
    if found.rerun_df:
        rerun = f"SD {found.rerun_sd:.4f}, df {found.rerun_df}"
    pair = ABSENT
    if found.pair_sd is not None:
        pair = f"SD {found.pair_sd:.4f} from {found.pair_arms} arms"
    if found.seed_sd is not None and found.rerun_df:
        pair += f", {found.seed_sd:.4f} of it from seeds"
    return (
        f"same seed again {rerun}; one paired difference {pair}; floor {found.floor:.4f}. "
        "p is family-wise: 5 % of waves without effects name any arm, if arms and control are equally noisy. "
        "The family interval holds for all arms "
        "at once; p steps down from arm to arm and may be clear where that interval just touches zero."
    )


def effect_rows(rows: Sequence[Row], found: Sequence[Effect]) -> list[list[str]]:
    """The cells of the main table: the control, then every arm, whatever became of it."""
    control = fx.scores(rows, fx.CONTROL)
    own = [row for row in rows if row.get("arm") == fx.CONTROL]
    first = ["`control`", code(common(own, "parent")) if own else "", f"{len(control)}"]
    lines = [[*first, plain(mean(list(control.values())) if control else None), *[""] * 8]]
    for e in found:
        scores = list(fx.scores(rows, e.arm).values())
        cells = [code(e.arm), code(" ".join(f"{k}={v}" for k, v in e.change.items())), str(e.n)]
        cells += [plain(mean(scores) if scores else None), signed(e.mean), plain(e.sd)]
        cells += [between(e.interval), between(e.family), chance(e.p_family), e.verdict]
        lines.append([*cells, by_column(e.same_steps), by_column(e.same_time)])
    return lines


def notes(rows: Sequence[Row], found: Sequence[Effect]) -> str:
    """How far the table may be trusted, its column at equal time above all."""
    ran = fx.valid(rows)
    shared, limited = fx.sharing(ran), fx.step_limited(ran)
    says = ["same steps, same time: pairs read where the shorter run ended; curve: from live validations"]
    if limited:
        says.append("all runs were limited by steps, so time is only what each happened to take")
    if restless := fx.unsteady(found, fx.noise(rows).floor):
        says.append(f"{', '.join(restless)}: far noisier than the floor, so p is hopeful there; more seeds")
    if shared:
        says.append(
            f"{shared} of {len(ran)} runs shared the machine with another, so their time is a busy one's"
        )
    return ". ".join(word[0].upper() + word[1:] for word in says) + "."


def unranked(rows: Sequence[Row]) -> list[str]:
    """The runs that gave no number to rank, with why."""
    good = {fx.run_id(row) for row in fx.valid(rows)}
    return [
        f"{code(fx.run_id(row))} {cell(row.get('state') or ABSENT)}"
        + (f": {cell(row['message'])[:200]}" if row.get("message") else "")
        for row in rows
        if fx.run_id(row) not in good
    ]


def trend_table(rows: Sequence[Row]) -> list[str]:
    found = fx.trends(rows)
    if not found:
        return []
    lines = [
        [
            code(one.knob), " ".join(f"{level:g}" for level in one.levels),
            " ".join(f"{value:+.4f}" for value in one.means), str(one.seeds),
            f"{one.slope:+.4f} a {one.unit} (p {chance(one.slope_p)})", chance(one.page_p),
            chance(one.p_family), f"{one.verdict}, lowest at {one.best:g}",
        ]
        for one in found
    ]  # fmt: skip
    head = "knob|values|bpb against the first|seeds|slope|Page's p|p (Holm)|trend"
    return ["", *table(head, "lllrlrrl", lines)]


def ablation_table(found: fx.Ablation | None, title: str = "") -> list[str]:
    if found is None:
        return []
    lines = [
        [code(one.name), of_contrast(one.alone), of_contrast(one.last), of_contrast(one.interaction)]
        for one in found.parts
    ]
    lines.append(["sum of the parts, each alone", of_contrast(found.total), "", ""])
    lines.append([f"the whole ({code(found.whole_name)})", of_contrast(found.whole), "",
                  of_contrast(found.interaction)])  # fmt: skip
    head = "part|alone|with all others there|difference (interaction)"
    return ["", *([title, ""] if title else []), *table(head, "llll", lines)]


def held_out_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        [code(one.arm), *map(of_contrast, (one.selection, one.held_out, one.shrink))]
        for one in fx.held_out(rows)
    ]
    head = "finalist|on the text it was chosen by|on the held-out half|held-out less chosen"
    return ["", *table(head, "llll", lines)] if lines else []


def regime_block(rows: Sequence[Row], title: str) -> list[str]:
    """All tables of one regime."""
    head = "arm|change|n|bpb|less control|SD|95 %|family|p|verdict|same steps|same time"
    lines = [f"Regime    {title}{cell(regime_line(rows))}", "", f"Counts    {cell(counts_line(rows))}", ""]
    lines += [f"Noise     {noise_line(rows)}", ""]
    found = fx.effects(rows)
    lines += table(head, "llrrrrrrrlrr", effect_rows(rows, found))
    lines += ["", cell(notes(rows, found))]
    lines += trend_table(rows) + ablation_table(fx.ablation(rows)) + held_out_table(rows)
    missing = unranked(rows)
    return lines + (["", "Not ranked: " + "; ".join(missing) + "."] if missing else [])


def wave_block(wave: Wave, figures: Sequence[str] = ()) -> str:
    """The tables of a wave, one set for each regime, then its figures."""
    groups = wave.regimes
    lines = []
    for place, rows in enumerate(groups, 1):
        title = f"{place} of {len(groups)}, not to be merged: " if len(groups) > 1 else ""
        lines += [*regime_block(rows, title), ""]
    if not groups:
        lines += ["No runs yet.", ""]
    if wave.unreadable:
        lines += [f"{wave.unreadable} unreadable line(s) in the results were skipped.", ""]
    lines += [f"![{Path(path).stem}]({path})" for path in figures]
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
    return [row | dict(run_id=f"{wave.name}/{fx.run_id(row)}") for wave in waves for row in wave.rows]


def all_regimes(waves: Iterable[Wave]) -> list[list[Row]]:
    """The rows of all waves by regime; runs that never started are in none."""
    started = [[row for row in all_rows([wave]) if row.get("code_sha256") is not None] for wave in waves]
    return fx.joined(part for rows in started for part in fx.by_regime(rows))


def all_ladders(waves: Iterable[Wave]) -> list[fx.Ladder]:
    """Over waves that differ in the length of their runs only."""
    groups = fx.by_regime(fx.valid(all_rows(waves)), fx.HORIZON)
    return [ladder for group in groups for ladder in fx.ladders(group)]


def all_ablations(waves: Iterable[Wave]) -> list[tuple[str, str, fx.Ablation]]:
    """(wave that adds parts to a base, wave that takes them from the stack, what they say together). Which
    control is the stack: the better one."""
    found = []
    for pair in permutations(waves, 2):
        if len(fx.by_regime(fx.valid(all_rows(pair)))) == 1:
            one = fx.add_and_drop(*(wave.rows for wave in pair))
            if one and one.whole and one.whole.mean < 0:
                found.append((*(wave.name for wave in pair), one))
    return found


def progression(waves: Iterable[Wave]) -> list[Step]:
    """Each wave's control and its best arm, in the order in which they ran; a step for each regime of it."""
    steps = []
    for place, group in enumerate(all_regimes(waves), 1):
        for name in dict.fromkeys(str(row["wave"]) for row in group):
            rows = [row for row in group if row["wave"] == name]
            better = [e for e in fx.effects(rows) if e.verdict == fx.BETTER]
            best = min(better, key=lambda e: e.mean, default=None)
            control = list(fx.scores(rows, fx.CONTROL).values())
            bpb = mean(list(fx.scores(rows, best.arm).values())) if best else None
            ran = fx.valid(rows) or rows
            length = spread(fx.number(row.get("steps")) for row in ran)
            parent = common(ran, "parent")
            steps.append(Step(name, place, length, parent, mean(control) if control else None, best, bpb))
    order = {wave.name: place for place, wave in enumerate(waves)}
    return sorted(steps, key=lambda step: (order[step.wave], step.regime))


def ladder_table(waves: Sequence[Wave]) -> list[str]:
    lines = []
    for one in all_ladders(waves):
        rungs = "; ".join(f"{r.length:g}: {of_contrast(r.effect)}" for r in one.rungs)
        change, parent = code(one.change), code(one.parent)
        lines.append([change, parent, one.unit, rungs, of_contrast(one.slope), one.says])
    head = "change|made to|length in|effect at each length (95 %)|slope a doubling|sign"
    return ["", *table(head, "llllll", lines)] if lines else []


def best_of(step: Step) -> str:
    return code(step.best.arm) if step.best else "none beyond noise"


def across_block(waves: Sequence[Wave], figures: Sequence[str] = ()) -> str:
    """What all waves say together: regimes, a line for each wave, ladders of length, parts and wholes."""
    lines = [f"All {len(waves)} waves: {cell(counts_line(all_rows(waves)))}", ""]
    for place, rows in enumerate(all_regimes(waves), 1):
        lines += [f"Regime {place}  {cell(regime_line(rows))}", ""]
    cells = []
    for step in progression(waves):
        best_bpb = plain(step.best_bpb)
        less_control = signed(step.best.mean if step.best else None)
        family = between(step.best.family if step.best else None)
        link = f"[{step.wave}]({step.wave}.md)"
        control = plain(step.control)
        cells.append([link, str(step.regime), control, best_of(step), best_bpb, less_control, family])
    lines += table("wave|regime|control bpb|best arm|its bpb|less control|family", "lrrlrrr", cells)
    lines += ladder_table(waves)
    for adds, drops, found in all_ablations(waves):
        title = f"Parts added one by one in {code(adds)}, taken out one by one in {code(drops)}:"
        lines += ablation_table(found, title)
    lines += ["", *(f"![{Path(path).stem}]({path})" for path in figures)]
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
