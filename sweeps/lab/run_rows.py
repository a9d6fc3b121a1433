"""A run's files as one row of results, and the file of rows: sweeps/results/WAVE.jsonl, one object a line.

All numbers come from the run's events, logs/RUN_ID.jsonl, and its RESULT line.
The latest row of a run counts.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from sweeps.lab import run_summary as summary
from sweeps.lab.paths import ROOT
from sweeps.lab.run_state import RunState
from sweeps.lab.run_summary import last as newest
from train_gpt import write_atomic

TRAINED_SHARE, UNTRAINED_BAND = 0.98, 0.01
# A run's status, where its state has another name or that is all there is to say. The program's other
# complaints (recompiled, over_eval_time, ...) make a score that must not be ranked.
STATES = {
    state.value: state for state in (RunState.OK, RunState.OVER_SIZE, RunState.DIVERGED, RunState.PREEMPTED)
}
MACHINE = "device", "world_size", "dtype", "compile", "torch", "python", "numpy"
VALIDATION = "val_sha256", "val_tokens", "val_bytes"
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


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, a line each; what a kill has cut is passed over."""
    found = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def log_of(out_dir: Path, run_id: str) -> Path:
    return out_dir / "logs" / f"{run_id}.jsonl"


def read_events(out_dir: Path, run_id: str) -> list[Event]:
    """The run's events as one training: what a checkpoint's resumption repeats is there once."""
    events: list[Event] = []
    path = log_of(out_dir, run_id)
    for event in summary.read_events(path)[0] if path.is_file() else ():
        if event.get("event") == "resumed":
            at = event.get("step", 0)
            again = ("step", "val", "phase")
            events = [e for e in events if e.get("event") not in again or e.get("step", 0) <= at]
        events.append(event)
    return events


def ended(events: list[Event]) -> Event | None:
    """The `end` event, if the log ends with it: one before a resumption is another end."""
    return events[-1] if events and events[-1].get("event") == "end" else None


def read_result(out_dir: Path, run_id: str) -> dict:
    """The last RESULT line of the run's log, and its peak memory (allocated, reserved) in MiB."""
    path = log_of(out_dir, run_id).with_suffix(".txt")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.findall(r"^RESULT (\{.*\})$", text, re.M)
    peak = re.findall(r"^peak memory allocated: (\d+) MiB reserved: (\d+) MiB$", text, re.M)
    result = {}
    if found:
        try:
            result = json.loads(found[-1])
        except ValueError:
            result = {}
    return result | (dict(peak_memory_mib=int(peak[-1][0])) if peak else {})


def last_error(out_dir: Path) -> str:
    """The last line that the process wrote to its error stream: of a traceback, what was raised."""
    path = out_dir / "stderr.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ")[:500] if lines else ""


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event.get("event") == kind]


def progress_of(event: Event, config: Mapping) -> float:
    """How far the run was at a `step` or `val` event, as the schedules count it."""
    if event.get("progress") is not None:
        return event["progress"]
    cap, most = config.get("max_wallclock_seconds") or math.inf, config.get("iterations") or math.inf
    cap -= config.get("gptq_reserve_seconds") or 0.0
    return min(1.0, max(event.get("step", 0) / most, event.get("train_ms", 0.0) / 1000 / cap))


def step_times(events: list[Event]) -> dict[str, float] | None:
    """Median and 95th percentile of a step in ms, between logged steps; the first ten are left out."""
    steps = of_kind(events, "step")
    pairs = [(a, b) for a, b in zip(steps, steps[1:], strict=False) if b["step"] > a["step"]]
    settled = [pair for pair in pairs if pair[0]["step"] >= 10] or pairs
    times = sorted((b["train_ms"] - a["train_ms"]) / (b["step"] - a["step"]) for a, b in settled)
    if not times:
        return None
    return dict(median=round(median(times), 3), p95=round(times[math.ceil(0.95 * len(times)) - 1], 3))


def uniform_bpb(events: list[Event]) -> float | None:
    """Bits per byte of a model that has learnt nothing: log2(V) bits a token."""
    env, config = newest(events, "env"), newest(events, "config").get("config") or {}
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
    status, bpb, plain = row["status"], row["val_bpb"], uniform_bpb(events)
    if status not in STATES:
        return RunState.CRASHED, row["message"] or f"ended with exit code {row['exit_code']}, status {status}"
    if status != "ok" and status != "over_size":
        return STATES[status], row["message"]
    if bpb is None or not math.isfinite(bpb):
        return RunState.DIVERGED, "its score is not a number"
    if not row["train_loss"]:
        return RunState.UNTRAINED, f"its training loss is {row['train_loss']}"
    if plain and abs(bpb / plain - 1) <= UNTRAINED_BAND:
        return RunState.UNTRAINED, f"bpb {bpb:.4f} is that of a model that has learnt nothing, {plain:.4f}"
    if row["progress"] is not None and row["progress"] < TRAINED_SHARE:
        return RunState.TRUNCATED, f"its schedule was cut at progress {row['progress']:.3f}"
    return STATES[status], row["message"]


def measured(events: list[Event], result: Mapping) -> Row:
    """The numbers of a run's row, as far as it got."""
    config, env, end = newest(events, "config"), newest(events, "env"), newest(events, "end")
    steps, whole = of_kind(events, "step"), config.get("config") or {}
    vals, artifact = of_kind(events, "val"), newest(events, "artifact")
    last = steps[-1] if steps else {}
    row = dict(
        config_hash=config.get("config_hash"), code_sha256=config.get("code_sha256"),
        config=portable(whole) or None, code_bytes=artifact.get("code_bytes", config.get("code_bytes")),
        steps=result.get("steps", last.get("step")), tokens=result.get("tokens", last.get("tokens")),
        train_seconds=end.get("train_seconds", last["train_ms"] / 1000 if last else None),
        step_ms=step_times(events), progress=end.get("progress", last.get("progress")),
        mean_lr_scale=end.get("mean_lr_scale"), train_loss=last.get("train_loss"),
        lr_trace=[[e["progress"], e["lr_scale"]] for e in steps],
        curve=[[e["step"], e["train_ms"], e["val_bpb"]] for e in vals],
        loss_curve=[[e["step"], e["train_ms"], e["train_loss"]] for e in steps],
        scores={e["name"]: e["val_bpb"] for e in of_kind(events, "score") if not e.get("left")},
        groups=newest(events, "quantise").get("groups"),
        resumed=[e["step"] for e in of_kind(events, "resumed") if e.get("step")],
    )  # fmt: skip
    for name in ("live_val_bpb", "prequant_val_bpb", "val_bpb", "peak_memory_mib"):
        row[name] = result.get(name)
    for name in ("model_bytes", "total_bytes"):
        row[name] = artifact.get(name)
    for name in MACHINE + VALIDATION:
        row[name] = env.get(name)
    return row


def row_of(about: Row, out_dir: Path, exit_code: int | None = None) -> Row:
    """The whole row of a run that ended: `about` it, what it measured, and its state."""
    events, run_id = read_events(out_dir, about["run_id"]), about["run_id"]
    end, result = ended(events), read_result(out_dir, run_id)
    row = dict.fromkeys(FIELDS) | about | measured(events, result if end else {})
    row["exit_code"] = end["exit_code"] if end else exit_code
    row["status"] = end["status"] if end else "preempted" if exit_code == 75 else "crashed"
    said = result.get("message") if end else None
    row["message"] = portable(said or ("" if row["status"] == "ok" else last_error(out_dir)))
    row["state"], row["message"] = state_of(row, events)
    return row


# ------------------------------------------------------------------------------ behind the control?


def trail(row: Row) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(progress, bpb) of a row's validations after the start, and (progress, train loss) of its steps."""
    config, vals = row["config"] or {}, []
    for step, train_ms, bpb in row["curve"] or ():
        vals.append((progress_of(dict(step=step, train_ms=train_ms), config), bpb))
    losses = [
        (at, loss)
        for (at, _), (_, _, loss) in zip(row["lr_trace"] or (), row["loss_curve"] or (), strict=True)
        if loss is not None
    ]
    return [(at, bpb) for at, bpb in vals if at > 0], losses


def between(points: list[tuple[float, float]], at: float) -> float | None:
    """The value at this progress, linear between points; None outside them."""
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if a <= at <= b:
            return low if a == b else low + (high - low) * (at - a) / (b - a)
    return points[-1][1] if points and points[-1][0] == at else None


def behind(control: Row, arm: Row, since: float, window: float = 0.25) -> tuple[float, float] | None:
    """(bpb by which the arm is worse than the control at the same progress, that progress); None before
    `since`. By the last validation, or by the mean training loss of the last `window` where there is none."""
    (their_vals, theirs), (vals, losses) = trail(control), trail(arm)
    now = max([at for at, _ in vals[-1:] + losses[-1:]], default=0.0)
    for at, bpb in vals[-1:]:
        other = between(their_vals, at)
        if at >= max(since, now - window) and other is not None:
            return bpb - other, at
    pairs = [(loss, between(theirs, at)) for at, loss in losses if at > now - window]
    gaps = [loss - other for loss, other in pairs if other is not None]
    if now < since or len(gaps) < 3 or not arm.get("val_bytes"):
        return None
    return sum(gaps) / len(gaps) / math.log(2) * arm["val_tokens"] / arm["val_bytes"], now


# ---------------------------------------------------------------------------------------- the file


class Results:
    """The rows of one wave's file. Whoever writes holds its lock; a reader needs none."""

    def __init__(self, folder: Path, wave: str):
        self.path, self.lock = folder / f"{wave}.jsonl", None
        self.lock_path = folder / f".{wave}.lock"

    def claim(self) -> bool:
        """Whether this process is now the only one that writes; it is until it ends."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock_path.open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
                file.seek(max(0, size - 1))
                if file.read(1) != b"\n":
                    file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            os.write(file.fileno(), data)
            os.fsync(file.fileno())

    def compact(self) -> None:
        """Keep the newest row of every run only, at once."""
        lines = (json.dumps(row) + "\n" for row in self.latest().values())
        write_atomic(self.path, "".join(lines).encode())
