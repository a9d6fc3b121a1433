"""Print one run as a short table, from its event log: python sweeps/summary.py logs/RUN_ID.jsonl"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from sweeps.lab.size_limit import SIZE_LIMIT

EVALUATION_SECONDS = 600.0  # unless the log says MAX_EVAL_SECONDS
ABSENT = "-"

Event = dict[str, Any]


def read_events(path: Path) -> tuple[list[Event], int]:
    """The log's events, and how many lines were not one (a killed run cuts its last line)."""
    events, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and "event" in event:
            events.append(event)
        else:
            unreadable += 1
    return events, unreadable


def last(events: list[Event], kind: str) -> Event:
    """The newest event of a kind; empty when there is none."""
    return next((event for event in reversed(events) if event["event"] == kind), {})


def scores(events: list[Event]) -> dict[str, Event]:
    """The newest score under each name, in the order the names first appeared."""
    return {event.get("name", ABSENT): event for event in events if event["event"] == "score"}


def training_seconds(events: list[Event]) -> float | None:
    clocks = [event["train_ms"] for event in events if event.get("train_ms") is not None]
    return max(clocks) / 1000 if clocks else None


def setting(events: list[Event], knob: str, default: float | None = None) -> float | None:
    """A number of the run's config, whose keys may be written in either case; 0 there means none."""
    config = last(events, "config").get("config") or {}
    return next((value for name, value in config.items() if name.lower() == knob), default) or None


def steps_and_tokens(events: list[Event]) -> tuple[int | None, int | None]:
    """What was trained. Not every step is logged, so the tokens of the last one are counted, not read."""
    step, end = last(events, "step"), last(events, "end")
    steps = step.get("step") if end.get("step") is None else end["step"]
    batch = setting(events, "train_batch_tokens")
    counted = step.get("tokens") if steps is None or batch is None else steps * batch
    return steps, end.get("tokens", counted)


def sizes(events: list[Event]) -> tuple[int | None, int | None, int | None]:
    """Bytes of code, of the packed model, and together."""
    artifact = last(events, "artifact")
    code = artifact.get("code_bytes", last(events, "config").get("code_bytes"))
    model = artifact.get("model_bytes")
    total = None if code is None or model is None else code + model
    return code, model, artifact.get("total_bytes", total)


def show(value: float | None, pattern: str) -> str:
    return ABSENT if value is None else pattern.format(value)


def against(value: float | None, limit: float | None, pattern: str, unit: str) -> str:
    """'value of limit unit', with a shout when it is over."""
    over = value is not None and limit is not None and value > limit
    return f"{show(value, pattern)} of {show(limit, pattern)} {unit}{'  OVER THE LIMIT' if over else ''}"


def size_cell(events: list[Event]) -> str:
    code, model, total = sizes(events)
    share = show(None if total is None else total / SIZE_LIMIT, "{:.1%}")
    parts = f"code {show(code, '{:,}')} + model {show(model, '{:,}')}"
    return f"{against(total, SIZE_LIMIT, '{:,}', 'bytes')} ({share}; {parts})"


def bpb_cell(score: Event) -> str:
    """A score's bpb, with a shout when the clock cut it short."""
    missing = score.get("left") or 0
    return show(score.get("val_bpb"), "{:.4f}") + (
        f"  PARTIAL: {missing:,} TOKENS UNSCORED" if missing else ""
    )


def summarise(events: list[Event], log: Path) -> list[tuple[str, str]]:
    """The table's rows: what it says, and the value."""
    live, average, named = last(events, "val").get("val_bpb"), last(events, "average"), scores(events)
    before = average.get("val_bpb", live)
    roundtrip = named.get("roundtrip", {})
    after = None if roundtrip.get("left") else roundtrip.get("val_bpb")
    cost = None if before is None or after is None else after - before
    seconds = [score["seconds"] for score in named.values() if score.get("seconds") is not None]
    evaluated = sum(seconds) if seconds else None
    clock = setting(events, "max_wallclock_seconds")
    evaluation_clock = setting(events, "max_eval_seconds", EVALUATION_SECONDS)
    steps, tokens = steps_and_tokens(events)
    end, artifact, env = (last(events, kind) for kind in ("end", "artifact", "env"))
    averaged = f" ({average.get('kind')} of {average.get('count')})" if average else ""
    truncated = "  SCHEDULE TRUNCATED" if end.get("truncated") else ""
    packed = " ".join(str(artifact[key]) for key in ("quant", "codec") if key in artifact)
    others = [(f"bpb, {name}", score) for name, score in named.items() if name != "roundtrip"]
    return [
        ("status", f"{end.get('status', ABSENT)} (exit code {end.get('exit_code', ABSENT)}){truncated}"),
        ("machine", f"{env.get('world_size', ABSENT)} x {env.get('device', ABSENT)}"),
        *([("bpb of the live weights", show(live, "{:.4f}"))] if average else []),
        ("bpb before quantisation", f"{show(before, '{:.4f}')}{averaged}"),
        ("bpb after quantisation", f"{bpb_cell(roundtrip)} ({packed or ABSENT})"),
        ("quantisation cost", show(cost, "{:+.4f}")),
        *((label, bpb_cell(score)) for label, score in others),
        ("size", size_cell(events)),
        ("training", against(training_seconds(events), clock, "{:.1f}", "s")),
        ("evaluation", against(evaluated, evaluation_clock, "{:.1f}", "s")),
        ("steps", show(steps, "{:,}")),
        ("tokens trained", show(tokens, "{:,}")),
        ("packed model", str(artifact.get("path", ABSENT))),
        ("logs", " ".join(str(p) for p in (log.with_suffix(".txt"), log) if p.exists()) or ABSENT),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path, help="the run's event log, one JSON object a line")
    parser.add_argument("--exit-code", action="store_true", help="print the run's own exit code instead")
    options = parser.parse_args(arguments)
    try:
        events, unreadable = read_events(options.log)
    except OSError as error:
        print(f"no summary: cannot read {options.log}: {error.strerror}", file=sys.stderr)
        return 2
    if options.exit_code:
        code = last(events, "end").get("exit_code")
        if code is not None:
            print(code)
        return 0 if code is not None else 1
    rows = summarise(events, options.log)
    # Of a run that was refused or stopped early most rows would be dashes.
    rows = [row for row in rows if row[0] == "status" or not re.match(f"{ABSENT}( |$)", row[1])]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    if unreadable:
        print(f"{'note':<{width}}  {unreadable} unreadable line(s) in the log, skipped")
    if command := last(events, "end").get("command"):
        print(f"to go on, paste this line:\n{command}")
    return 0
