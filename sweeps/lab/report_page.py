"""The page of sweeps/report.py: one HTML file that holds its data, its drawing library, and no address.

Rows are data, never markup: they stand in the page as JSON in which nothing can end the script element, and
page/page.js writes them as text. The page's policy forbids every request."""

import html
import json
import math
import time
from collections.abc import Sequence
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
from sweeps.lab.verdicts import Ablation, Contrast, Effect, Row

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


def run(row: Row) -> dict:
    found = {name: row.get(name) for name in SHOWN.split()}
    batch = fx.number(fx.setting(row, "train_batch_tokens"))
    change = " ".join(f"{knob}={value}" for knob, value in fx.change(row).items())
    return found | dict(run_id=fx.run_id(row), change=change, tokens_per_step=batch)


def bars(value: Contrast | None) -> dict | None:
    if value is None:
        return None
    low, high = value.interval or (None, None)
    return dict(mean=value.mean, low=low, high=high, n=value.n)


def effect(found: Effect) -> dict:
    return dict(
        arm=found.arm, change=" ".join(f"{k}={v}" for k, v in found.change.items()), n=found.n,
        hypothesis=found.hypothesis, mean=found.mean, sd=found.sd, interval=found.interval,
        family=found.family, p=found.p_family, verdict=found.verdict,
        pairs=[[seed, value] for seed, value in found.pairs.items()],
        same_steps=found.same_steps, same_time=found.same_time,
    )  # fmt: skip


def parts(found: Ablation | None, title: str) -> dict | None:
    if found is None:
        return None
    lines = [[one.name, bars(one.alone), bars(one.last)] for one in found.parts]
    lines += [["sum of the parts", bars(found.total), None], ["the whole", None, bars(found.whole)]]
    return dict(title=title, lines=lines, interaction=bars(found.interaction))


def group(rows: Sequence[Row], wave: str, title: str) -> dict:
    """A regime of a wave: its own table, never joined with another."""
    found = fx.effects(rows)
    trends = [
        dict(knob=t.knob, levels=t.levels, means=t.means, p=t.p_family, verdict=t.verdict, unit=t.unit)
        for t in fx.trends(rows)
    ]
    return dict(
        wave=wave, title=title, regime=regime_line(rows), counts=counts_line(rows), noise=noise_line(rows),
        note=notes(rows, found), floor=fx.noise(rows).floor, effects=[effect(e) for e in found],
        trends=trends, ablation=parts(fx.ablation(rows), title),
        held_out=[[h.arm, bars(h.selection), bars(h.held_out)] for h in fx.held_out(rows)],
    )  # fmt: skip


def across(waves: Sequence) -> dict:
    """What several waves say together."""
    steps = [
        [s.wave, s.regime, s.control, s.best.arm if s.best else None, s.best_bpb] for s in progression(waves)
    ]
    ladders = [
        dict(change=one.change, parent=one.parent, unit=one.unit, says=one.says, slope=bars(one.slope),
             rungs=[[rung.length, bars(rung.effect)] for rung in one.rungs])
        for one in all_ladders(waves)
    ]  # fmt: skip
    ablations = [
        parts(found, f"added in {adds}, taken out in {drops}") for adds, drops, found in all_ablations(waves)
    ]
    regimes = [regime_line(group) for group in all_regimes(waves)]
    return dict(steps=steps, regimes=regimes, ladders=ladders, ablations=ablations)


def payload(waves: Sequence, watch: float | None) -> dict:
    """All that page.js draws, as it will find it."""
    groups = []
    for wave in waves:
        several = wave.regimes
        for place, rows in enumerate(several, 1):
            title = wave.name + f", regime {place} of {len(several)}" * (len(several) > 1)
            groups.append(group(rows, wave.name, title))
    names = [dict(name=w.name, question=w.question, unreadable=w.unreadable, began=w.began) for w in waves]
    runs = [run(row) for wave in waves for row in wave.rows]
    written = datetime.fromtimestamp(time.time(), timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return dict(
        waves=names,
        groups=groups,
        runs=runs,
        across=across(waves),
        limit=SIZE_LIMIT,
        watch=watch,
        written=written,
    )


@cache
def library() -> str:
    """Plotly, as the installed package has it, so that no script element ends inside."""
    return get_plotlyjs().replace("</script", "<\\/script")


def page(waves: Sequence, watch: float | None = None) -> str:
    """The whole file. watch: it reloads itself every so many seconds."""
    reload = f'<meta http-equiv="refresh" content="{max(1, round(watch))}">' if watch else ""
    title = "Waves: " + (", ".join(wave.name for wave in waves) or "no results yet")
    pieces = dict(
        TITLE=html.escape(title), RELOAD=reload, DATA=as_json(payload(waves, watch)), LIBRARY=library(),
        STYLE=(PARTS / "page.css").read_text(encoding="utf-8"),
        SCRIPT=(PARTS / "page.js").read_text(encoding="utf-8"),
    )  # fmt: skip
    text = (PARTS / "page.html").read_text(encoding="utf-8")
    before, *rest = text.split("@@")  # @@NAME@@ marks a place
    out = [before]
    for name, after in zip(rest[::2], rest[1::2], strict=True):
        out += [pieces[name], after]
    return "".join(out)
