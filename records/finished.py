"""Finished runs as their logs tell them; what is missing or does not fit is refused in one line.

find_run and read_run serve records/make.py, read_log and its parts records/rescore.py too.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.user_error import UserError, tell, tell_os_error  # noqa: E402
from records.unpack_script import script_of_shown  # noqa: E402
from sweeps.lab.run_summary import last, read_events, scores  # noqa: E402

RULE = b"=" * 100  # the official log's line after the source
CLAIMS = "val_loss", "val_bpb"
NEEDED = {
    "run_id",
    "seed",
    "config_hash",
    "val_sha256",
    "overrides",
    "device",
    "world_size",
    "python",
    "torch",
}
NEEDED |= {"model_bytes", "code_bytes", "total_bytes", "steps", "tokens", "train_seconds", "eval_seconds"}
NEEDED |= {"quant", "codec", "dtype"}


Refused = UserError  # its name in records/make.py


def require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


class Parser(argparse.ArgumentParser):
    """Bad arguments are refused in one line as well."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def guarded(main: Callable[[list[str] | None], int], arguments: list[str] | None) -> int:
    """main's exit code; 2 and one line on stderr where it refuses or cannot read or write."""
    try:
        return main(arguments)
    except UserError as error:
        return tell(error)
    except OSError as error:
        return tell_os_error(error)


@dataclass(frozen=True)
class Log:
    """The .txt log of a run: its bytes, the source at its head, the object of its last RESULT line."""

    path: Path
    data: bytes
    result: dict

    def find(self, pattern: str) -> str:
        """The last match of a line's number or word."""
        found = re.findall(pattern, self.tail, re.M)
        require(found, f"{self.path} has no line {pattern!r}; is it a log of this version of train_gpt.py?")
        return found[-1]

    @property
    def source(self) -> bytes:
        return embedded_source(self.path, self.data)

    @property
    def tail(self) -> str:
        """All after the source."""
        return self.data.partition(b"\n" + RULE + b"\n")[2].decode("utf-8", "replace")


@dataclass(frozen=True)
class Finished:
    """A run that ended well: its log, its event log, and what a record says of it."""

    log: Log
    events: list[dict]
    source: bytes

    def last(self, kind: str) -> dict:
        return last(self.events, kind)

    run_id = property(lambda self: self.log.path.stem)
    result = property(lambda self: self.log.result)
    config = property(lambda self: self.last("config")["config"])
    seed = property(lambda self: self.config["seed"])
    code_sha256 = property(lambda self: self.last("config")["code_sha256"])
    scores = property(lambda self: list(scores(self.events)))
    out_dir = property(lambda self: self.log.path.parent.parent)


def embedded_source(path: Path, data: bytes) -> bytes:
    """What the log has before its first rule; a run that went on in a new log says so in a line before."""
    head, rule, _ = data.partition(b"\n" + RULE + b"\n")
    require(rule, f"{path} does not begin with the source of the run; only logs of train_gpt.py will do")
    head = head.partition(b"\n")[2] if head.startswith(b"resumed: ") else head
    try:
        return script_of_shown(head.decode())
    except UnicodeError:
        return head  # its sha256 will say that it is not what ran


def read_log(path: Path) -> Log:
    """The whole log of a run that ended ok."""
    require(path.is_file(), f"{path} is missing; copy it from where the run was made")
    data = path.read_bytes()
    found = re.findall(rb"^RESULT (.*)$", data.partition(b"\n" + RULE + b"\n")[2], re.M)
    require(
        found, f"{path} has no RESULT line: the run did not finish; go on with RESUME=auto or run it again"
    )
    try:
        result = json.loads(found[-1])
    except ValueError:
        raise UserError(f"{path}: its RESULT line is not JSON; it was cut off or edited") from None
    status = result.get("status")
    require(status == "ok", f"{path}: its RESULT says {status}; a record needs a run that ended ok")
    missing = ", ".join(sorted(NEEDED - result.keys()))
    require(not missing, f"{path}: its RESULT has no {missing}; run it again with this version")
    return Log(path, data, result)


def find_run(run_id: str, folders: Iterable[Path]) -> Path:
    """The run's event log, in the one OUT_DIR that has it."""
    looked = list(folders)
    found = {(folder / "logs" / f"{run_id}.jsonl").resolve() for folder in looked}
    there = sorted(path for path in found if path.is_file())
    where = ", ".join(map(str, looked)) or "no folder"
    require(there, f"no logs/{run_id}.jsonl in {where}; name the run's OUT_DIR with --runs")
    twice = " and ".join(map(str, there))
    require(len(there) == 1, f"{run_id} is there twice, {twice}; say which OUT_DIR with --runs")
    return there[0]


def read_run(path: Path) -> Finished:
    """The run behind an event log, if it is finished, whole, and its two logs agree."""
    try:
        return checked_run(path)
    except KeyError as error:
        raise UserError(f"{path}: an event has no {error}; run it again with this version") from None


def checked_run(path: Path) -> Finished:
    """As read_run; KeyError where an event lacks a value."""
    events, unreadable = read_events(path)
    require(not unreadable, f"{path} has {unreadable} unreadable line(s): it was cut off or edited")
    check_end(path, events)
    log, configs = read_log(path.with_suffix(".txt")), [e for e in events if e["event"] == "config"]
    for key, what in (("code_sha256", "code"), ("config_hash", "config")):
        values = {event.get(key) for event in configs}
        require(len(values) == 1, f"{path}: the run changed its {what} on the way; run it again in one go")
    sha = hashlib.sha256(log.source).hexdigest()
    told = configs[0]["code_sha256"]
    same = sha == told and len(log.source) == configs[0]["code_bytes"]
    mend = "one of the two was edited; run it again"
    require(same, f"the source in {log.path} has sha256 {sha[:12]}, {path.name} says {told[:12]}: {mend}")
    check_agreement(path, log, events)
    return Finished(log, events, log.source)


def check_end(path: Path, events: list[dict]) -> None:
    """Refuse a run that is not finished, not within the limits, cut short, or scored in part."""
    end, run = last(events, "end"), path.stem
    require(last(events, "config"), f"{path} has no config event; is it the event log of a run?")
    ended = end and events[-1] is end
    require(ended, f"{run} is not finished ({path} has no end event); wait, or go on with RESUME=auto")
    how = f"{run} ended as {end.get('status')} (exit code {end.get('exit_code')}, {path})"
    require(end.get("status") == "ok", f"{how}; a record needs a run that ended ok")
    seconds = end.get("train_seconds", 0.0)
    cap = last(events, "config").get("config", {}).get("max_wallclock_seconds") or seconds
    over = f"{run} trained {seconds} s, its cap was {cap} ({path}): its last step overran"
    require(seconds <= cap, f"{over}; run it again on a machine that does nothing else")
    require(last(events, "artifact"), f"{run} trained nothing (EVAL_ONLY, {path}); name the run that trained")
    short = f"{run} stopped at progress {end.get('progress', 0):.3f} of its schedule ({path})"
    require(not end.get("truncated"), f"{short}; shorten its steps or its warm-up and run it again")
    for name, score in scores(events).items():
        part = f"{run}: {score.get('left')} tokens have no {name} score ({path})"
        require(not score.get("left"), f"{part}; raise MAX_EVAL_SECONDS or switch that score off")
    require("roundtrip" in scores(events), f"{run} has no roundtrip score ({path}); run it again")


def check_agreement(path: Path, log: Log, events: list[dict]) -> None:
    """Events, RESULT line and final lines must tell the same numbers."""
    run, result, mend = path.stem, log.result, "a log was edited; run it again"
    require(result.get("run_id") == run, f"{log.path} is the log of {result.get('run_id')}, not of {run}")
    told = {f"{n}_{key}": round(e[key], 8) for n, e in scores(events).items() for key in CLAIMS}
    told |= {key: last(events, "artifact")[key] for key in ("model_bytes", "code_bytes", "total_bytes")}
    told |= dict(steps=last(events, "end")["step"], status="ok")
    told |= dict(config_hash=last(events, "config")["config_hash"])
    for name, value in told.items():
        other = f"{name} is {value} in {path.name}, {result.get(name)} in the RESULT of {log.path.name}"
        require(result.get(name) == value, f"{other}: {mend}")
    lines = {float(value) for value in re.findall(r"^final_\S+_exact .*val_bpb:(\S+)$", log.tail, re.M)}
    for name in scores(events):
        value = told[f"{name}_val_bpb"]
        require(value in lines, f"{log.path} has no final line with {name}'s {value:.8f}: {mend}")


def check_together(runs: list[Finished]) -> None:
    """Refuse runs that are not seeds of one experiment on the same text."""
    facts: dict[str, Callable[[Finished], object]] = {
        "code (sha256)": lambda run: run.code_sha256[:12],
        "config (hash)": lambda run: run.last("config")["config_hash"],
        "validation text (sha256)": lambda run: run.result["val_sha256"][:12],
        "training data": lambda run: run.log.find(r"^train_loader:(dataset:.*)$"),
        "scores": lambda run: " ".join(run.scores),
    }
    first = runs[0]
    for what, fact in facts.items():
        for run in runs[1:]:
            differ = f"{fact(first)} in {first.run_id}, {fact(run)} in {run.run_id}"
            mend = "one record needs one; run the seeds again with the same"
            require(fact(run) == fact(first), f"different {what}: {differ}; {mend}")
    seeds: dict[int, str] = {}
    for run in runs:
        same = f"{seeds.get(run.seed)} and {run.run_id} both have SEED={run.seed}"
        require(run.seed not in seeds, f"{same}; give each run of a record its own seed")
        seeds[run.seed] = run.run_id
