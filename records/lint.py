"""Is a record folder of the challenge whole, within the rules, and true to its own logs?

    python records/lint.py FOLDER ...               one line a finding, one line a folder
    python records/lint.py --bar 1.0810 FOLDER      and: does it beat that val_bpb by 0.005 nats at p < 0.01?
    python records/lint.py --json FOLDER ...

For any folder of records/track_.../, ours or another's. Nothing in it is executed or imported, links in it
are not followed, and of one file at most 16 MiB are read. A finding is an error (a rule broken, or two of
the folder's own statements that contradict each other), a warning (it cannot be checked, or misleads) or an
info. Exit code: 0 no error, 1 an error, 2 wrong usage. What it compares, and what it cannot know, is in
records/README.md.

The rules are those of the challenge's README: 16,000,000 bytes of code and model, 600 s of training and
600 s of evaluation on the 10-minute track, 0.005 nats at p < 0.01 for a record. What goes wrong in practice
was counted over 1,803 submitted folders: no log, other code than the log's, other bytes than the log's,
logs of different versions. The LowerLR record's shipped script, for one, is not the one its log shows.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import tokenize
import warnings
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from statistics import mean, pstdev, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.missing_packages import explain_missing_packages  # noqa: E402
from data.user_error import run_tool  # noqa: E402

explain_missing_packages()
from records.lint_folder import (  # noqa: E402
    Finding,
    Folder,
    agrees,
    clean,
    decode,
    digits,
    hidden_characters,
    load_json,
    number,
    sha256_forms,
    strings_in,
    unix_lines,
)
from records.lint_log import SEEDED, Log, find_logs, topmost  # noqa: E402
from records.lint_readme import GAIN, check_readme, t_tail  # noqa: E402
from records.lint_statements import (  # noqa: E402
    ARTIFACT,
    check_artifacts,
    check_claims,
    check_code_hash,
    check_log,
    check_logs_together,
    check_official_keys,
)
from records.pack_script import is_same_program, strip  # noqa: E402
from records.unpack_script import Unpacked, Unreadable, script_of_shown, shown_in_log, unpack  # noqa: E402
from sweeps.lab.size_limit import SIZE_LIMIT  # noqa: E402

CLOCK = 600.0  # seconds of training, and of evaluation again, on the 10-minute track
OVERSHOOT = 1.0  # seconds; the official script ends after the step that crosses the limit
LEVEL = 0.01  # p at which a record must gain GAIN nats
SCRIPT_LIMIT = 2**21  # bytes of a script that is compiled
OFFICIAL = dict(author=str, github_id=str, name=str, blurb=str, date=str) | dict.fromkeys(
    ("val_loss", "val_bpb", "bytes_total", "bytes_code"), Decimal
)
NEEDED = "name", "github_id", "val_bpb"  # those the README asks for
ORDER = "error", "warn", "info"


# submission.json


def find_record(folder: Folder) -> dict:
    """submission.json's object; {} if there is none."""
    names = folder.top(r"submission\.json") or folder.top(r"submission.*\.json")
    if not names:
        folder.add("error", "no_json", "no submission.json")
        return {}
    if names[0] != "submission.json":
        folder.add("warn", "json_name", f"{names[0]} should be called submission.json")
    try:
        loaded = load_json(folder.text(names[0]))
    except ValueError as error:
        folder.add("error", "json_invalid", f"{names[0]} is not JSON: {error}")
        return {}
    for key in loaded.twice:
        folder.add("warn", "json_key_twice", f"{key} is given twice")
    for key in loaded.contradicting:
        folder.add("error", "json_key_differs", f"{key} is given twice, with two values")
    if not isinstance(loaded.value, dict):
        folder.add("error", "json_invalid", f"{names[0]} holds no object")
        return {}
    check_keys(folder, loaded.value)
    check_texts(folder, loaded.value)
    return loaded.value


def check_keys(folder: Folder, record: dict) -> None:
    """The official keys and their types; others are welcome."""
    for key, kind in OFFICIAL.items():
        value = record.get(key)
        severity = "error" if key in NEEDED else "warn"
        if value is None or value == "":
            folder.add(severity, "key_missing", f"{key} is {'empty' if key in record else 'missing'}")
        elif not (isinstance(value, str) if kind is str else number(value) is not None):
            folder.add("error", "key_type", f"{key} should be a {'text' if kind is str else 'number'}")
        elif kind is Decimal and (value <= 0 or key.startswith("bytes") and value != int(value)):
            folder.add("error", "key_value", f"{key} is {value}")
    try:
        date = record.get("date")
        if isinstance(date, str) and date:
            datetime.fromisoformat(date.replace("Z", "+00:00"))
    except ValueError:
        folder.add("warn", "date", f"date {date!r} is not ISO 8601")


def check_texts(folder: Folder, record: dict) -> None:
    """Texts hold text: no escape codes, no half characters, nothing that turns what stands beside it."""
    for where, text in strings_in(record):
        is_one_line = where in ("author", "github_id", "name", "track", "date")
        hidden = hidden_characters(text, "" if is_one_line else "\n\r\t")
        if hidden:
            folder.add("error", "text_hidden", f"{where} of submission.json holds {', '.join(hidden)}")


def seed_results(record: dict) -> dict[str, dict]:
    """The claims of each seed, by the seed's text."""
    results = record.get("seed_results")
    items = results.items() if isinstance(results, dict) else ()
    return {seed: values for seed, values in items if isinstance(values, dict)}


def claimed_seeds(record: dict) -> set[int]:
    """Seeds that submission.json names."""
    given = record.get("seeds")
    listed = [seed for seed in given if type(seed) is int] if isinstance(given, list) else []
    scored = [int(seed) for seed in seed_results(record) if re.fullmatch(r"\d{1,18}", seed)]
    return {*listed, *scored}


def track_of(folder: Folder, record: dict) -> str:
    """'10min', 'free' (no clock, no bar) or 'unknown'."""
    given = record.get("track")
    for text in (folder.path.absolute().parent.name, given if isinstance(given, str) else ""):
        if re.search(r"non[-_]?record|unlimited", text, re.I):
            return "free"
        if re.search(r"10[-_]?min", text, re.I):
            return "10min"
    folder.add(
        "info", "track_unknown", "neither the folder above nor submission.json names a track: no clock"
    )
    return "unknown"


# Which logs and which score count


def choose_score(folder: Folder, record: dict, logs: list[Log]) -> None:
    """Where submission.json says which score counts (`score`, as records/make.py does), that one does."""
    name = record.get("score")
    for log in logs:
        labels = [score.label for score in log.finals]
        if isinstance(name, str) and name and any(name in label for label in labels):
            log.chosen = name
            if name not in labels[-1]:
                folder.add("info", "score_chosen", f"{log.name}: {name} counts, it ends with {labels[-1]}")


def claimed_logs(record: dict, logs: list[Log]) -> list[Log]:
    """Those with a score that submission.json gives, else all: a study has logs of other things.

    Logs of train_gpt.py in one folder are seeds of one experiment: all of them count.
    """
    if logs and all(log.is_ours for log in logs):
        return logs
    values = [record.get("val_bpb"), *(values.get("val_bpb") for values in seed_results(record).values())]
    values = [value for value in map(number, values) if value is not None]
    chosen = []
    for log in logs:
        if any(agrees(value, score.bpb) for value in values for score in log.finals):
            chosen.append(log)
    return chosen or logs


# The script


def find_scripts(folder: Folder) -> dict[str, str]:
    """The training scripts, train_gpt.py first; says what is wrong with their being there."""
    names = sorted(folder.top(r"train.*\.py"), key=lambda name: name != "train_gpt.py")
    names = names or folder.top(r".*\.py")
    if "train_gpt.py" not in names:
        kind = ("warn", "script_name") if names else ("error", "no_script")
        folder.add(*kind, f"no train_gpt.py{', but ' + ', '.join(names) if names else ''}")
    scripts = {name: folder.read(name) for name in names}
    for name, data in scripts.items():
        if not data.strip():
            folder.add("error", "script_empty", f"{name} is empty")
        elif len(data) > SCRIPT_LIMIT:
            folder.add("warn", "too_long", f"{name} is not compiled: {len(data)} bytes")
        elif wrong := syntax_error(data):
            folder.add("error", "script_syntax", f"{name} does not compile: {wrong}")
        else:
            check_packed(folder, name, data)
    own = {readable_of(name) for name, texts in folder.sources.items() if len(texts) > 1}
    return {name: script_text(data) for name, data in scripts.items() if data.strip() and name not in own}


def script_text(script: bytes) -> str:
    """The text of a script, as a log would show it; lines end in a newline alone."""
    try:
        return decode(shown_in_log(script).encode())
    except UnicodeError:
        return decode(script)


def bytes_on_disk(source: str) -> int:
    """How many bytes the script takes that a log shows as this text."""
    try:
        return len(script_of_shown(source))
    except UnicodeError:
        return len(source.encode())


def readable_of(name: str) -> str:
    """Where records/pack_script.py puts the source of a packed script."""
    return f"{Path(name).stem}_readable.py"


def check_packed(folder: Folder, name: str, data: bytes) -> None:
    """A self-extracting script holds a script that can be read, and was packed from the one beside it."""
    try:
        found = unpack(data)
    except Unreadable as error:
        folder.add("info", "packed_unread", f"{name} runs what it extracts, not read here: {error}")
        return
    if not found:
        return
    how = ", ".join(found.codecs)
    folder.add("info", "packed", f"{name} holds a script of {len(found.source.encode())} bytes ({how})")
    if wrong := syntax_error(found.source.encode()):
        folder.add("warn", "packed_syntax", f"{name} holds a script that does not compile: {wrong}")
    folder.sources[name] = [found.source]
    check_readable(folder, name, found)


def check_readable(folder: Folder, name: str, found: Unpacked) -> None:
    """Ours names the sha256 of what it was packed from; of another's, the program alone can be compared."""
    readable = readable_of(name)
    if readable not in folder.sizes:
        if found.readable_sha256:
            folder.add("warn", "no_readable", f"{readable}, which {name} was packed from, is not here")
        return
    data = folder.read(readable)
    text = decode(data)
    if not found.readable_sha256:
        if not is_same_program(text, found.source):
            folder.add("warn", "readable_differs", f"{name} may be another program than {readable}")
    elif found.readable_sha256 not in sha256_forms(data):
        folder.add("error", "readable_differs", f"{name} was packed from another {readable}")
    elif stripped(text) != found.source:
        folder.add("error", "readable_differs", f"{name} holds another program than {readable}")
    else:
        folder.sources[name].append(text)


def stripped(text: str) -> str:
    """As records/pack_script.py strips it; "" where it is no Python."""
    try:
        return strip(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return ""


def syntax_error(source: bytes) -> str:
    """Why the source is no Python; it is parsed and compiled, never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "script", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        why = str(error) or type(error).__name__
        return f"{why} (Python {sys.version_info.major}.{sys.version_info.minor})"
    return ""


def ends_in(head: str, script: str) -> bool:
    """The log's head is this script, after a preamble without code, up to blank ends."""
    head, script = head.rstrip(), script.rstrip()
    before = head[: len(head) - len(script)]
    return head.endswith(script) and not re.search(r"^(import|from|def|class) ", before, re.M)


def source_of(head: str) -> str:
    """The source in a log's head, without what stands before it."""
    start = re.search(r"^(\"|'''|#|import \w|from \w)", head, re.M)
    return head[start.start() :].strip() if start else ""


def compare_source(folder: Folder, log: Log, scripts: dict[str, str]) -> None:
    """The source in a log against its own count of bytes, and against the shipped scripts."""
    source = source_of(log.head)
    main = next(iter(scripts), None)
    shown = bytes_on_disk(source)  # without blank ends
    if log.runs == 1 and log.script_bytes and not is_counted(source, log.script_bytes):
        text = f"{log.name} shows a script of {shown} bytes, but counts {log.script_bytes}"
        folder.add("error", "log_source_size", text)
    same = []
    for name, text in scripts.items():
        forms = [text, *folder.sources.get(name, [])]
        if any(ends_in(log.head, form) for form in forms):
            same.append(name)
    if scripts and not same:
        text = nearest_script(source, scripts)
        folder.add("error", "source_differs", f"{log.name} shows a script that is not here: {text}")
    elif scripts and main not in same:
        folder.add("warn", "other_script", f"{log.name} shows {same[0]}, not {main}")


def is_counted(source: str, count: int) -> bool:
    """Whether a log's count of code bytes is that of the source it shows, with either kind of line ends."""
    shown = bytes_on_disk(source)
    windows = shown + source.count("\n")
    return 0 <= count - shown <= 8 or 0 <= count - windows <= 8


def nearest_script(source: str, scripts: dict[str, str]) -> str:
    """How many lines the source in a log has that the most similar script has not, and the reverse."""
    lines = Counter(source.splitlines())
    best = ""
    fewest = -1
    for name, script in scripts.items():
        others = Counter(script.splitlines())
        more = (lines - others).total()
        less = (others - lines).total()
        if fewest < 0 or more + less < fewest:
            fewest = more + less
            best = f"{more} lines only in the log, {less} only in {name}"
    return best


def check_source(folder: Folder, logs: list[Log], scripts: dict[str, str]) -> None:
    """Each log's source is a shipped script, and all logs' is one."""
    for log in logs:
        if log.runs > 1:
            folder.add("info", "several_runs", f"{log.name} holds {log.runs} runs; the last one counts")
        if not log.head:
            folder.add("info", "no_source", f"{log.name} does not show the script that ran")
        else:
            compare_source(folder, log, scripts)
    sources = {hashlib.sha256(source_of(log.head).encode()).digest() for log in logs if log.head}
    sizes = {log.script_bytes for log in logs if log.script_bytes}
    if len(sources) > 1 or len(sizes) > 1:
        said = f", code sizes {', '.join(map(str, sorted(sizes)))}" if len(sizes) > 1 else ""
        folder.add("error", "code_varies", f"the logs come from different versions of the code{said}")


# Bytes


def shipped_sizes(folder: Folder, logs: list[Log], scripts: dict[str, str]) -> dict[str, int]:
    """Bytes of each script: as it ran, where a checkout on Windows has only changed its line ends."""
    counted = {log.script_bytes for log in logs}
    sizes = {}
    for name in scripts:
        sizes[name] = folder.sizes[name]
        unix = len(unix_lines(folder.read(name)))
        if unix in counted and sizes[name] not in counted:
            sizes[name] = unix
            folder.add("info", "line_ends", f"{name} has Windows line ends; it ran with {unix} bytes")
    return sizes


def is_close(value: int, truths: list[int], share: float) -> bool:
    """Whether the value is one of the truths but for that share of it."""
    return any(abs(value - truth) <= share * truth for truth in truths)


def check_bytes(folder: Folder, record: dict, logs: list[Log], scripts: dict[str, str]) -> None:
    """One size in the log, in submission.json and on the disk, and under the cap."""
    shipped = shipped_sizes(folder, logs, scripts)
    for log in logs:
        check_log_bytes(folder, log)
    check_shipped(folder, logs, shipped)
    check_claimed_bytes(folder, record, logs, shipped)
    main = next(iter(shipped.values()), 0)
    for name in folder.top(ARTIFACT.pattern):
        size = folder.sizes[name] + main
        if size > SIZE_LIMIT:
            folder.add("error", "over_cap", f"{name} and the script have {size} bytes, over {SIZE_LIMIT}")


def check_claimed_bytes(folder: Folder, record: dict, logs: list[Log], shipped: dict[str, int]) -> None:
    """bytes_total and bytes_code of submission.json."""
    total, code = (number(record.get(key)) for key in ("bytes_total", "bytes_code"))
    totals = [log.total_bytes for log in logs if log.total_bytes]
    if total is not None and total > SIZE_LIMIT:
        folder.add("error", "over_cap", f"bytes_total {total} is over {SIZE_LIMIT}")
    if total is not None and totals:
        allowed = [*totals, sum(totals) // len(totals), round(mean(totals))]
        known = ", ".join(map(str, sorted(set(totals))))
        if total not in allowed:
            is_rounded = total % 1000 == 0 and is_close(int(total), totals, 0.005)
            kind = ("warn", "bytes_rounded") if is_rounded else ("error", "bytes_differ")
            folder.add(*kind, f"bytes_total {total}, but the logs say {known}")
    codes = {size for log in logs for size in (log.code_bytes, log.plain_bytes) if size}
    codes |= {*shipped.values()}
    if code is not None and codes and code not in codes:
        known = ", ".join(map(str, sorted(codes)))
        folder.add(
            "error", "code_bytes_differ", f"bytes_code {code}, but the logs and the script say {known}"
        )


def check_log_bytes(folder: Folder, log: Log) -> None:
    """A log's sizes add up and are under the cap."""
    if log.total_bytes is not None and log.total_bytes > SIZE_LIMIT:
        folder.add("error", "over_cap", f"{log.name} says {log.total_bytes} bytes, over {SIZE_LIMIT}")
    sizes = [(log.model_bytes, log.total_bytes)]
    if log.is_ours:
        sizes.append((log.raw_bytes, log.raw_total))  # before packing; others count the code otherwise there
    for model, total in sizes:
        if not (model and total and log.code_bytes):
            continue
        if model + log.code_bytes != total:
            text = f"{log.name}: model and code are {model + log.code_bytes} bytes, its total {total}"
            folder.add("error", "sum_wrong", text)


def check_shipped(folder: Folder, logs: list[Log], shipped: dict[str, int]) -> None:
    """The code that the logs count is the script that is here; with it, too, the total is under the cap."""
    main = next(iter(shipped), None)
    unpacked = {len(text.encode()) for texts in folder.sources.values() for text in texts}
    counted = {log.script_bytes for log in logs if log.plain_bytes not in unpacked} - {None}
    for size in sorted(counted - {*shipped.values()}):
        names = [log.name for log in logs if log.script_bytes == size]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        if main:
            text = f"{names[0]}{more}: {size} bytes of code, {main} has {shipped[main]}"
            folder.add("error", "code_size", text)
    under = [log for log in logs if log.model_bytes and (log.total_bytes or 0) <= SIZE_LIMIT]
    largest = max(under, key=lambda log: log.model_bytes, default=None)
    if not (main and largest):
        return
    real = largest.model_bytes + shipped[main]
    if real > SIZE_LIMIT:
        text = f"{largest.name}: the model with {main} as it is here ({shipped[main]} bytes) takes {real}"
        kind = ("warn", "over_cap_unpacked") if largest.plain_bytes else ("error", "over_cap_shipped")
        folder.add(*kind, f"{text}, over {SIZE_LIMIT}")


# Clocks, runs, seeds


def check_clocks(folder: Folder, record: dict, logs: list[Log]) -> None:
    """600 s of training and 600 s of evaluation."""
    for key, code in (("wallclock_seconds", "train_time"), ("eval_time_seconds", "eval_time")):
        value = number(record.get(key))
        if value is not None and value > CLOCK + OVERSHOOT:
            folder.add("error", code, f"{key} {value}, over 600")
    for log in logs:
        over = log.train_seconds - CLOCK
        if over > OVERSHOOT:
            folder.add("error", "train_time", f"{log.name}: {log.train_seconds:.3f} s of training, over 600")
        elif over > 0:
            folder.add(
                "info", "train_overshoot", f"{log.name}: {log.train_seconds:.3f} s, the last step's end"
            )
        longest = max((score.seconds for score in log.finals), default=0.0)
        if longest > CLOCK:
            folder.add("error", "eval_time", f"{log.name}: an evaluation of {longest:.0f} s, over 600")
        elif log.eval_seconds > CLOCK:
            folder.add("warn", "eval_time_sum", f"{log.name}: evaluations of {log.eval_seconds:.0f} s in all")


def check_runs(folder: Folder, logs: list[Log]) -> None:
    """What each log says of itself: a score, a status, the seed of its name."""
    for log in logs:
        status = log.result.get("status", "ok")
        if not log.final:
            severity = "warn" if any(other.final for other in logs) else "error"
            folder.add(severity, "no_score", f"{log.name} gives no score of the packed model")
        if status != "ok":
            folder.add("error", "run_failed", f"{log.name}: its RESULT says {status}")
        named = SEEDED.search(Path(log.name).name)
        if named and log.seed != int(named[1]):
            folder.add("error", "seed_name", f"{log.name} is a run with seed {log.seed}")


def check_seeds(folder: Folder, record: dict, logs: list[Log], every: list[Log], timed: bool) -> None:
    """A log for each seed claimed, one that gives its score; for a record, different seeds."""
    known = Counter(log.seed for log in logs if log.seed is not None)
    scored = {int(seed) for seed in seed_results(record) if re.fullmatch(r"\d{1,18}", seed)}
    missing = sorted((claimed_seeds(record) - {log.seed for log in every}) | (scored - {*known}))
    if missing and known:
        folder.add("error", "seed_without_log", f"no log of seed {', '.join(map(str, missing))}")
    twice = sorted(seed for seed, count in known.items() if count > 1)
    if twice and (timed or any(log.is_ours for log in logs)):
        severity = "error" if len(known) == 1 or not timed else "warn"
        folder.add(severity, "seed_twice", f"several logs have seed {', '.join(map(str, twice))}")
    if timed and 0 < len(known) < 3:
        folder.add("warn", "few_seeds", f"{len(known)} of the three seeds that a record has in practice")


# Scores


def score_means(logs: list[Log], key: str) -> dict[str, float]:
    """Mean over logs of each kind of score that several have, by its label."""
    kinds: dict[tuple[str, str], list[Decimal]] = {}
    for log in logs:
        for label, score in {score.label: score for score in log.finals}.items():
            kinds.setdefault((os.path.dirname(log.name), label), []).append(getattr(score, key))
    means = {}
    for (_, label), values in kinds.items():
        if len(values) > 1:
            means[f"the mean '{label}' of {len(values)} logs"] = mean(values)
    return means


def check_score(folder: Folder, record: dict, logs: list[Log], every: list[Log], key: str) -> None:
    """val_bpb or val_loss is a log's last exact line, or the mean of several; `every`: with logs below."""
    value, name = number(record.get(key)), key.removeprefix("val_")
    finals = [getattr(log.final, name) for log in logs if log.final]
    if value is None or not finals:
        return
    means = expected_means(record, logs, every, key)
    last = [score for score in finals if agrees(value, score)]
    middle = [middle for middle in means if agrees(value, middle)]
    others = other_scores(value, every, name)
    if middle or last:
        if not any(abs(value - Decimal(truth)) < Decimal("6e-9") for truth in middle + last):
            folder.add("info", "score_rounded", f"{key} {value} is rounded; the logs have more decimals")
        if key == "val_bpb" and len(finals) > 1 and not middle and last[0] == min(finals):
            text = f"{key} {value} is the best of {len(finals)} logs, whose mean is {means[0]:.8f}"
            folder.add("warn", "best_seed", text)
    elif digits(value) < 7 and any(agrees(value, middle, 2) for middle in means):
        folder.add("info", "mean_rounded", f"{key} {value}, the logs' mean is {means[0]:.8f}")
    elif others:
        folder.add("warn", "other_score", f"{key} {value} is {others[0]}, not of the last exact line")
    else:
        said = ", ".join(map(str, finals[:5]))
        text = f"{key} {value}, but the logs end with {said}"
        text += f"; mean {means[0]:.8f}" if len(finals) > 1 else ""
        folder.add("error", "score_differs", text)


def expected_means(record: dict, logs: list[Log], every: list[Log], key: str) -> list[Decimal]:
    """The means that a score may be: of all logs, of the seeds claimed, of the entries with a log."""
    name = key.removeprefix("val_")
    finals = [getattr(log.final, name) for log in logs if log.final]
    claimed = [getattr(log.final, name) for log in logs if log.final and log.seed in claimed_seeds(record)]
    entries: list[Decimal] = []
    if {*seed_results(record)} <= {str(log.seed) for log in every}:  # check_seed_results looks at each
        values = [number(values.get(key)) for values in seed_results(record).values()]
        entries = [value for value in values if value is not None]
    return [mean(group) for group in (finals, claimed, entries) if len(group) > 1]


def other_scores(value: Decimal, logs: list[Log], name: str) -> list[str]:
    """Every single line, then every mean of a kind of line, that the value may be."""
    found = []
    for log in logs:
        for score in log.finals + log.others:
            if agrees(value, getattr(score, name)):
                found.append(f"'{score.label}' of {log.name}")
    found += [text for text, middle in score_means(logs, name).items() if agrees(value, middle, 1)]
    return found


def check_seed_results(folder: Folder, record: dict, logs: list[Log]) -> None:
    """Each entry of seed_results is what a log of that seed says; so is the spread."""
    for seed, values in seed_results(record).items():
        own = [log for log in logs if log.seed is not None and str(log.seed) == seed]
        if own:
            check_seed_entry(folder, seed, values, own)
    value = number(record.get("val_bpb_std"))
    if value is None:
        return
    entries = [number(values.get("val_bpb")) for values in seed_results(record).values()]
    scores = [entry for entry in entries if entry is not None]
    scores = scores or [log.final.bpb for log in logs if log.final]
    spreads = [stdev(scores), pstdev(scores)] if len(scores) > 1 else []
    if spreads and not any(agrees(value, spread, 2) for spread in spreads):
        severity = "error" if all(log.is_ours for log in logs) else "warn"
        folder.add(severity, "std", f"val_bpb_std {value}, that of the seeds is {spreads[0]:.8f} (n - 1)")


def check_seed_entry(folder: Folder, seed: str, values: dict, logs: list[Log]) -> None:
    """The scores and the bytes of one seed."""
    for key in ("bpb", "loss"):
        value = number(values.get(f"val_{key}"))
        last = [getattr(log.final, key) for log in logs if log.final]
        if value is None or not last or any(agrees(value, score, 1) for score in last):
            continue
        labels = []
        for log in logs:
            labels += [score.label for score in log.finals if agrees(value, getattr(score, key), 1)]
        text = f"seed {seed}: val_{key} {value}, but its log ends with {', '.join(map(str, last))}"
        kind = ("warn", "other_score") if labels else ("error", "seed_result")
        folder.add(*kind, text + (f"; it is '{labels[0]}'" if labels else ""))
    size = number(values.get("artifact_bytes"))
    sizes = [log.total_bytes for log in logs if log.total_bytes]
    if size is not None and sizes and size not in sizes:
        bare = ", with the code" if any(size == log.model_bytes for log in logs) else ""
        text = f"seed {seed}: artifact_bytes {size}, but its log says {', '.join(map(str, sizes))}{bare}"
        folder.add("error", "seed_bytes", text)


# The gain


def claimed_bar(folder: Folder, record: dict) -> tuple[float, str]:
    """(val_bpb to beat, where it stands): a key of submission.json, or the README's word; 0 if none."""
    for key in ("base_val_bpb", "comparison_baseline_bpb"):
        value = number(record.get(key))
        if value is not None:
            return float(value), key
    text = "".join(map(folder.text, folder.top(r"(?i)readme\.md")))
    found = re.search(r"(?i)\bsota\b[^\n.]{0,80}?[^\d.](1\.\d{4,8})\b(?! *nats)", text)
    return (float(found[1]), "README") if found else (0.0, "")


def check_gain(folder: Folder, record: dict, logs: list[Log], bar: float, timed: bool) -> None:
    """Mean and spread of the seeds; if there is a bar, one-sided t-test of a gain over 0.005 nats.

    Seeds that all end with one score are no sample: then there is no p.
    """
    scored = list({log.seed: log for log in logs if log.final}.values())
    kinds = [{score.label: score for score in log.finals if log.chosen in score.label} for log in scored]
    shared = [label for label in (kinds[0] if kinds else ()) if all(label in k for k in kinds)]
    label = shared[-1] if shared else ""
    runs = [kind[label] for kind in kinds] if label else [log.final for log in scored]
    source = "--bar"
    if not bar and timed:
        bar, source = claimed_bar(folder, record)
    if len(runs) < 2:
        return
    bpb = [float(run.bpb) for run in runs]
    loss = [float(run.loss) for run in runs]
    text = f"{len(runs)} seeds: val_bpb {mean(bpb):.8f}, sd {stdev(bpb):.8f}; sd {stdev(loss):.8f} nats"
    folder.add("info", "spread", text)
    if not (bar and mean(bpb)):
        return
    error = stdev(loss) / math.sqrt(len(runs))
    if not error:
        folder.add("warn", "no_spread", f"{len(runs)} seeds have one score: no p of a gain below {bar}")
        return
    nats = mean(loss) / mean(bpb)  # of 1 bpb on this text
    gain = (bar - mean(bpb)) * nats
    p = t_tail((gain - GAIN) / error, len(runs) - 1)
    text = f"{gain:.5f} nats below {bar} ({source}); p of a gain over {GAIN} by chance: {p:.2g}"
    folder.add(*(("info", "gain") if p < LEVEL else ("warn", "gain_not_shown")), text)


# The whole


def check_folder(path: Path, bar: float = 0.0) -> list[Finding]:
    """All that is found, worst first."""
    folder = Folder(path)
    record = find_record(folder)
    scripts = find_scripts(folder)
    every = find_logs(folder)
    timed = track_of(folder, record) == "10min"
    logs = topmost(folder, every)
    if not logs:
        folder.add("error", "no_log", "no log with a val_bpb")
    check_runs(folder, logs)
    choose_score(folder, record, every)
    chosen = logs if timed else claimed_logs(record, logs)
    check_readme(folder, record, chosen)
    check_source(folder, chosen, scripts)
    check_bytes(folder, record, chosen, scripts)
    check_seeds(folder, record, chosen, every, timed)
    for key in ("val_bpb", "val_loss"):
        check_score(folder, record, chosen, every, key)
    check_seed_results(folder, record, [*chosen, *(log for log in every if log not in logs)])
    for log in chosen:
        check_log(folder, log)
    check_logs_together(folder, chosen)
    check_claims(folder, record, seed_results(record), chosen)
    check_official_keys(folder, record, chosen)
    check_code_hash(folder, record, chosen, scripts)
    check_artifacts(folder, record, seed_results(record), chosen)
    if timed:
        check_clocks(folder, record, logs)
    check_gain(folder, record, chosen, bar, timed)
    check_own_clock(folder, every)
    return sorted(folder.findings, key=lambda finding: ORDER.index(finding.severity))


def check_own_clock(folder: Folder, logs: list[Log]) -> None:
    """A log whose RESULT says more seconds of training than the run's own cap, as train_gpt.py logs both.

    Another's log has a last step that may cross the limit; ours says so itself (exit code 4).
    """
    for log in logs:
        result = log.result if isinstance(log.result, dict) else {}
        seconds, overrides = number(result.get("train_seconds")), result.get("overrides")
        if seconds is None or not isinstance(overrides, dict):
            continue
        cap = number(overrides.get("MAX_WALLCLOCK_SECONDS", Decimal(int(CLOCK))))
        if cap and seconds > cap:
            text = f"{log.name}: {seconds} s of training, over the run's own {cap} (MAX_WALLCLOCK_SECONDS)"
            folder.add("error", "own_clock", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--bar", type=float, default=0.0, help="val_bpb of the record to beat")
    parser.add_argument("--json", action="store_true", help="print one JSON object a folder")
    asked = parser.parse_args()
    for folder in asked.folders:
        if not folder.is_dir():
            parser.error(f"{clean(str(folder))} is no folder")
    is_broken = False
    for path in asked.folders:
        found = check_folder(path, asked.bar)
        counts = Counter(finding.severity for finding in found)
        is_broken = is_broken or counts["error"] > 0
        name = clean(str(path))
        if asked.json:
            totals = {severity: counts[severity] for severity in ORDER}
            print(json.dumps(dict(folder=name, **totals, findings=[asdict(one) for one in found])))
            continue
        for finding in found:
            print(f"{finding.severity:5} {finding.code:17} {finding.text}")
        print(f"{name}: {counts['error']} errors, {counts['warn']} warnings, {counts['info']} infos")
    return int(is_broken)


if __name__ == "__main__":
    run_tool(main)
