"""The page of sweeps/report.py: one HTML file that holds its data, its drawing library, and no address.

Rows are data, never markup: they stand in the page as JSON in which nothing can end the script element, and
page/page.js writes them as text. The page's policy forbids every request."""

import html
import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from plotly.offline import get_plotlyjs

from sweeps.lab import verdicts as fx
from sweeps.lab.report_tables import (
    all_ablations,
    all_ladders,
    all_regimes,
    counts_line,
    noise_line,
    notes,
    progression,
    regime_line,
)
from sweeps.lab.size_limit import SIZE_LIMIT
from sweeps.lab.verdicts import Ablation, Contrast, Effect, Ladder, Row, Trend

PARTS = Path(__file__).resolve().parent / "page"
# What the page reads of a run; the rest of a row would only make it heavier.
SHOWN = """
wave arm seed rerun hypothesis parent state message steps tokens train_seconds step_ms progress mean_lr_scale
lr_trace train_loss curve loss_curve live_val_bpb prequant_val_bpb val_bpb held_out_val_bpb code_bytes
model_bytes total_bytes groups peak_memory_mib device config_hash code_sha256 started ended
"""


def finite(value: object) -> object:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def as_json(value: object) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def change_text(change: Mapping[str, str]) -> str:
    return " ".join(f"{knob}={value}" for knob, value in change.items())


def run(row: Row) -> dict:
    """What the page shows of a run."""
    shown = {name: row.get(name) for name in SHOWN.split()}
    shown["run_id"] = fx.run_id(row)
    shown["change"] = change_text(fx.change(row))
    shown["tokens_per_step"] = fx.number(fx.setting(row, "train_batch_tokens"))
    return shown


def bars(value: Contrast | None) -> dict | None:
    if value is None:
        return None
    low, high = value.interval or (None, None)
    return {"mean": value.mean, "low": low, "high": high, "n": value.n}


def effect(one: Effect) -> dict:
    return {
        "arm": one.arm,
        "change": change_text(one.change),
        "n": one.n,
        "hypothesis": one.hypothesis,
        "mean": one.mean,
        "sd": one.sd,
        "interval": one.interval,
        "family": one.family,
        "p": one.p_family,
        "verdict": one.verdict,
        "pairs": [[seed, value] for seed, value in one.pairs.items()],
        "same_steps": one.same_steps,
        "same_time": one.same_time,
    }


def trend(one: Trend) -> dict:
    return {
        "knob": one.knob,
        "levels": one.levels,
        "means": one.means,
        "p": one.p_family,
        "verdict": one.verdict,
        "unit": one.unit,
    }


def parts(ablation: Ablation | None, title: str) -> dict | None:
    if ablation is None:
        return None
    lines = [[part.name, bars(part.alone), bars(part.last)] for part in ablation.parts]
    lines.append(["sum of the parts", bars(ablation.total), None])
    lines.append(["the whole", None, bars(ablation.whole)])
    return {"title": title, "lines": lines, "interaction": bars(ablation.interaction)}


def group(rows: Sequence[Row], wave: str, title: str) -> dict:
    """A regime of a wave: its own table, never joined with another."""
    effects = fx.effects(rows)
    return {
        "wave": wave,
        "title": title,
        "regime": regime_line(rows),
        "counts": counts_line(rows),
        "noise": noise_line(rows),
        "note": notes(rows, effects),
        "floor": fx.noise(rows).floor,
        "effects": [effect(one) for one in effects],
        "trends": [trend(one) for one in fx.trends(rows)],
        "ablation": parts(fx.ablation(rows), title),
        "held_out": [[one.arm, bars(one.selection), bars(one.held_out)] for one in fx.held_out(rows)],
    }


def ladder(one: Ladder) -> dict:
    return {
        "change": one.change,
        "parent": one.parent,
        "unit": one.unit,
        "says": one.says,
        "slope": bars(one.slope),
        "rungs": [[rung.length, bars(rung.effect)] for rung in one.rungs],
    }


def across(waves: Sequence) -> dict:
    """What several waves say together."""
    steps = []
    for step in progression(waves):
        best_arm = step.best.arm if step.best else None
        steps.append([step.wave, step.regime, step.control, best_arm, step.best_bpb])
    ablations = []
    for adds, drops, ablation in all_ablations(waves):
        ablations.append(parts(ablation, f"added in {adds}, taken out in {drops}"))
    return {
        "steps": steps,
        "regimes": [regime_line(rows) for rows in all_regimes(waves)],
        "ladders": [ladder(one) for one in all_ladders(waves)],
        "ablations": ablations,
    }


def payload(waves: Sequence, watch: float | None) -> dict:
    """All that page.js draws, as it will find it."""
    groups = []
    runs = []
    names = []
    for wave in waves:
        regimes = wave.regimes
        for number, rows in enumerate(regimes, 1):
            title = f"{wave.name}, regime {number} of {len(regimes)}" if len(regimes) > 1 else wave.name
            groups.append(group(rows, wave.name, title))
        runs += [run(row) for row in wave.rows]
        names.append({
            "name": wave.name,
            "question": wave.question,
            "unreadable": wave.unreadable,
            "began": wave.began,
        })  # fmt: skip
    written = datetime.fromtimestamp(time.time(), timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {
        "waves": names,
        "groups": groups,
        "runs": runs,
        "across": across(waves),
        "limit": SIZE_LIMIT,
        "watch": watch,
        "written": written,
    }


@cache
def library() -> str:
    """Plotly, as the installed package has it, so that no script element ends inside."""
    return get_plotlyjs().replace("</script", "<\\/script")


def page(waves: Sequence, watch: float | None = None) -> str:
    """The whole file. watch: it reloads itself every so many seconds."""
    title = "Waves: " + (", ".join(wave.name for wave in waves) or "no results yet")
    pieces = {
        "TITLE": html.escape(title),
        "RELOAD": f'<meta http-equiv="refresh" content="{max(1, round(watch))}">' if watch else "",
        "DATA": as_json(payload(waves, watch)),
        "LIBRARY": library(),
        "STYLE": (PARTS / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (PARTS / "page.js").read_text(encoding="utf-8"),
    }
    template = (PARTS / "page.html").read_text(encoding="utf-8")
    before, *rest = template.split("@@")  # @@NAME@@ marks where a piece goes
    text = [before]
    for name, after in zip(rest[::2], rest[1::2], strict=True):
        text += [pieces[name], after]
    return "".join(text)
