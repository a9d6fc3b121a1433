"""A run's files as one row of results, and the file of rows: sweeps/results/WAVE.jsonl, one object a line.

All numbers come from the run's events, logs/RUN_ID.jsonl, and its RESULT line.
The latest row of a run counts.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TextIO

from data.file_locks import lock
from sweeps.lab import run_summary as summary
from sweeps.lab.paths import ROOT
from sweeps.lab.run_state import RunState
from sweeps.lab.run_summary import last as newest
from train_gpt import write_atomic

TRAINED_SHARE = 0.98  # progress below which a schedule was cut
PREEMPTED = 75  # the exit code of a run that was stopped
UNTRAINED_BAND = 0.01  # a score so near to that of no model at all, as a share, is that of one
FIRST_SETTLED_STEP = 10  # steps before it are slower and left out of the times
# A run's status, where its state has another name or that is all there is to say. The program's other
# complaints (recompiled, over_eval_time, ...) make a score that must not be ranked.
STATES = {
    state.value: state for state in (RunState.OK, RunState.OVER_SIZE, RunState.DIVERGED, RunState.PREEMPTED)
}
MACHINE = ("device", "world_size", "dtype", "compile", "torch", "python", "numpy")
VALIDATION = ("val_sha256", "val_tokens", "val_bytes")
NAMES = """
wave arm seed rerun run_id hypothesis question parent change env state status exit_code attempts resumed
message config_hash code_sha256 config steps tokens train_seconds step_ms progress mean_lr_scale lr_trace
train_loss curve loss_curve live_val_bpb prequant_val_bpb val_bpb scores held_out_val_bpb code_bytes
model_bytes total_bytes groups peak_memory_mib device world_size dtype compile torch python numpy val_sha256
val_tokens val_bytes started ended run_seconds out_dir
"""
FIELDS = NAMES.split()

Event = dict
Row = dict


# ---------------------------------------------------------------------------------------- a run's files


def text_of(path: Path) -> str:
    """A file's text, '' if there is none; what is no UTF-8 is marked in it."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, a line each; what a kill has cut is passed over."""
    objects = []
    for line in text_of(path).splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def log_of(out_dir: Path, run_id: str) -> Path:
    return out_dir / "logs" / f"{run_id}.jsonl"


def read_events(out_dir: Path, run_id: str) -> list[Event]:
    """The run's events as one training: what a checkpoint's resumption repeats is there once."""
    path = log_of(out_dir, run_id)
    if not path.is_file():
        return []
    events: list[Event] = []
    for event in summary.read_events(path)[0]:
        if event.get("event") == "resumed":
            events = [earlier for earlier in events if not is_repeated(earlier, event.get("step", 0))]
        events.append(event)
    return events


def is_repeated(event: Event, resumed_at: int) -> bool:
    """Whether a run that is resumed at this step makes the event again."""
    return event.get("event") in ("step", "val", "phase") and event.get("step", 0) > resumed_at


def ended(events: list[Event]) -> Event | None:
    """The `end` event, if the log ends with it: one before a resumption is another end."""
    return events[-1] if events and events[-1].get("event") == "end" else None


def read_result(out_dir: Path, run_id: str) -> dict:
    """The last RESULT line of the run's log, and its peak memory in MiB (allocated)."""
    text = text_of(log_of(out_dir, run_id).with_suffix(".txt"))
    result = {}
    result_lines = re.findall(r"^RESULT (\{.*\})$", text, re.M)
    if result_lines:
        try:
            result = json.loads(result_lines[-1])
        except ValueError:
            result = {}
    peaks = re.findall(r"^peak memory allocated: (\d+) MiB reserved: \d+ MiB$", text, re.M)
    if peaks:
        result["peak_memory_mib"] = int(peaks[-1])
    return result


def last_error(out_dir: Path) -> str:
    """The last line that the process wrote to its error stream: of a traceback, what was raised."""
    lines = [line.strip() for line in text_of(out_dir / "stderr.txt").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")[:500] if lines else ""


def named(events: list[Event], name: str) -> list[Event]:
    """The events of one name."""
    return [event for event in events if event.get("event") == name]


def progress_of(event: Event, config: Mapping) -> float:
    """How far the run was at a `step` or `val` event, as the schedules count it."""
    if event.get("progress") is not None:
        return event["progress"]
    most_steps = config.get("iterations") or math.inf
    most_seconds = config.get("max_wallclock_seconds") or math.inf
    most_seconds -= config.get("gptq_reserve_seconds") or 0.0
    by_steps = event.get("step", 0) / most_steps
    by_clock = event.get("train_ms", 0.0) / 1000 / most_seconds
    return min(1.0, max(by_steps, by_clock))


def step_times(events: list[Event]) -> dict[str, float] | None:
    """Median and 95th percentile of a step in ms, between logged steps; the first ten are left out."""
    spans = [(a, b) for a, b in pairwise(named(events, "step")) if b["step"] > a["step"]]
    settled = [span for span in spans if span[0]["step"] >= FIRST_SETTLED_STEP]
    times = []
    for before, after in settled or spans:
        times.append((after["train_ms"] - before["train_ms"]) / (after["step"] - before["step"]))
    if not times:
        return None
    times.sort()
    p95 = times[math.ceil(0.95 * len(times)) - 1]
    return {"median": round(median(times), 3), "p95": round(p95, 3)}


def uniform_bpb(events: list[Event]) -> float | None:
    """Bits per byte of a model that has learnt nothing: log2(V) bits a token."""
    env = newest(events, "env")
    config = newest(events, "config").get("config") or {}
    if not env.get("val_bytes") or not config.get("vocab_size"):
        return None
    return math.log2(config["vocab_size"]) * env["val_tokens"] / env["val_bytes"]


def portable(value, root: Path = ROOT):
    """Without this machine's folders: a path inside the project from there, another one by its name."""
    if isinstance(value, dict):
        return {key: portable(part, root) for key, part in value.items()}
    if not isinstance(value, str) or "/" not in value:
        return value
    inside = value.replace(f"{root}/", "")
    return re.sub(r"(?<![\w.])(?:/[\w.+-]+){2,}", lambda found: found[0].rpartition("/")[2], inside)


# ------------------------------------------------------------------------------------------ state


def state_of(row: Row, events: list[Event]) -> tuple[RunState, str]:
    """(state, why) of a run that ended, from what its row holds by now."""
    status = row["status"]
    bpb = row["val_bpb"]
    if status not in STATES:
        return RunState.CRASHED, row["message"] or f"ended with exit code {row['exit_code']}, status {status}"
    if status not in ("ok", "over_size"):
        return STATES[status], row["message"]
    if bpb is None or not math.isfinite(bpb):
        return RunState.DIVERGED, "its score is not a number"
    if not row["train_loss"]:
        return RunState.UNTRAINED, f"its training loss is {row['train_loss']}"
    no_model = uniform_bpb(events)
    if no_model and abs(bpb / no_model - 1) <= UNTRAINED_BAND:
        return RunState.UNTRAINED, f"bpb {bpb:.4f} is that of a model that has learnt nothing, {no_model:.4f}"
    if row["progress"] is not None and row["progress"] < TRAINED_SHARE:
        return RunState.TRUNCATED, f"its schedule was cut at progress {row['progress']:.3f}"
    return STATES[status], row["message"]


def measured(events: list[Event], result: Mapping) -> Row:
    """The numbers of a run's row, as far as it got."""
    config = newest(events, "config")
    env = newest(events, "env")
    end = newest(events, "end")
    artifact = newest(events, "artifact")
    steps = named(events, "step")
    vals = named(events, "val")
    last = steps[-1] if steps else {}
    last_seconds = last["train_ms"] / 1000 if last else None
    row = {
        "config_hash": config.get("config_hash"),
        "code_sha256": config.get("code_sha256"),
        "config": portable(config.get("config") or {}) or None,
        "code_bytes": artifact.get("code_bytes", config.get("code_bytes")),
        "steps": result.get("steps", last.get("step")),
        "tokens": result.get("tokens", last.get("tokens")),
        "train_seconds": end.get("train_seconds", last_seconds),
        "step_ms": step_times(events),
        "progress": end.get("progress", last.get("progress")),
        "mean_lr_scale": end.get("mean_lr_scale"),
        "train_loss": last.get("train_loss"),
        "lr_trace": [[e["progress"], e["lr_scale"]] for e in steps],
        "curve": [[e["step"], e["train_ms"], e["val_bpb"]] for e in vals],
        "loss_curve": [[e["step"], e["train_ms"], e["train_loss"]] for e in steps],
        "scores": {e["name"]: e["val_bpb"] for e in named(events, "score") if not e.get("left")},
        "groups": newest(events, "quantise").get("groups"),
        "resumed": [e["step"] for e in named(events, "resumed") if e.get("step")],
    }
    for name in ("live_val_bpb", "prequant_val_bpb", "val_bpb", "peak_memory_mib"):
        row[name] = result.get(name)
    for name in ("model_bytes", "total_bytes"):
        row[name] = artifact.get(name)
    for name in MACHINE + VALIDATION:
        row[name] = env.get(name)
    return row


def status_without_end(exit_code: int | None) -> str:
    """Of a run whose log has no end."""
    return "preempted" if exit_code == PREEMPTED else "crashed"


def row_of(about: Row, out_dir: Path, exit_code: int | None = None) -> Row:
    """The whole row of a run that ended: `about` it, what it measured, and its state."""
    run_id = about["run_id"]
    events = read_events(out_dir, run_id)
    end = ended(events)
    result = read_result(out_dir, run_id) if end else {}
    row = dict.fromkeys(FIELDS) | about | measured(events, result)
    row["exit_code"] = end["exit_code"] if end else exit_code
    row["status"] = end["status"] if end else status_without_end(exit_code)
    message = result.get("message")
    if not message and row["status"] != "ok":
        message = last_error(out_dir)
    row["message"] = portable(message or "")
    row["state"], row["message"] = state_of(row, events)
    return row


# ------------------------------------------------------------------------------ behind the control?


Points = list[tuple[float, float]]  # (progress, value), ascending


def val_trail(row: Row) -> Points:
    """(progress, bpb) of a row's validations after the start."""
    points = []
    for step, train_ms, bpb in row["curve"] or ():
        progress = progress_of({"step": step, "train_ms": train_ms}, row["config"] or {})
        if progress > 0:
            points.append((progress, bpb))
    return points


def loss_trail(row: Row) -> Points:
    """(progress, training loss) of a row's logged steps."""
    points = []
    for trace, logged in zip(row["lr_trace"] or (), row["loss_curve"] or (), strict=True):
        progress = trace[0]
        loss = logged[2]
        if loss is not None:
            points.append((progress, loss))
    return points


def between(points: Points, at: float) -> float | None:
    """The value at this progress, linear between points; None outside them."""
    for (a, low), (b, high) in pairwise(points):
        if a <= at <= b:
            return low if a == b else low + (high - low) * (at - a) / (b - a)
    return points[-1][1] if points and points[-1][0] == at else None


def behind(control: Row, arm: Row, since: float, window: float = 0.25) -> tuple[float, float] | None:
    """(bpb by which the arm is worse than the control at the same progress, that progress); None before
    `since`. By the last validation, or by the mean training loss of the last `window` where there is none."""
    vals = val_trail(arm)
    losses = loss_trail(arm)
    now = max([progress for progress, _ in vals[-1:] + losses[-1:]], default=0.0)
    if vals:
        progress, bpb = vals[-1]
        control_bpb = between(val_trail(control), progress)
        if progress >= max(since, now - window) and control_bpb is not None:
            return bpb - control_bpb, progress
    control_losses = loss_trail(control)
    gaps = []
    for progress, loss in losses:
        control_loss = between(control_losses, progress)
        if progress > now - window and control_loss is not None:
            gaps.append(loss - control_loss)
    if now < since or len(gaps) < 3 or not arm.get("val_bytes"):
        return None
    nats_a_token = sum(gaps) / len(gaps)
    return nats_a_token / math.log(2) * arm["val_tokens"] / arm["val_bytes"], now


# ---------------------------------------------------------------------------------------- the file


class Results:
    """The rows of one wave's file. Whoever writes holds its lock; a reader needs none."""

    def __init__(self, folder: Path, wave: str):
        self.path = folder / f"{wave}.jsonl"
        self.lock_path = folder / f".{wave}.lock"
        self.lock: TextIO | None = None  # open while this process may write

    def claim(self) -> bool:
        """Whether no other process writes; this one alone may until it ends.

        Always true where the file system has no locks, after a warning.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock_path.open("a+")
        try:
            lock(self.lock, wait=False)
        except BlockingIOError:
            self.lock.close()
            return False
        return True

    def latest(self) -> dict[str, Row]:
        """The newest row of every run, in the order the runs first appeared."""
        rows: dict[str, Row] = {}
        for row in read_lines(self.path):
            if "run_id" in row:
                rows[row["run_id"]] = row
        return rows

    def append(self, *rows: Row) -> None:
        """Add whole lines: one write, on the disk when this returns. A line that a kill cut goes first."""
        if not rows:
            return
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            os.write(file.fileno(), data)
            os.fsync(file.fileno())

    def compact(self) -> None:
        """Keep the newest row of every run only, at once."""
        lines = (json.dumps(row) + "\n" for row in self.latest().values())
        write_atomic(self.path, "".join(lines).encode())
