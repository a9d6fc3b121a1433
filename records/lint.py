"""Is a record folder of the challenge whole, within the rules, and true to its own logs?

    python records/lint.py FOLDER ...               one line a finding, one line a folder
    python records/lint.py --bar 1.0810 FOLDER      and: does it beat that val_bpb by 0.005 nats at p < 0.01?
    python records/lint.py --json FOLDER ...

For any folder of records/track_.../, ours or another's. Nothing in it is executed or imported, links in it
are not followed, and of one file at most 16 MiB are read. A finding is an error (a rule broken, or two of
the folder's own numbers that contradict each other), a warning (it cannot be checked, or misleads) or an
info. Exit code: 0 no error, 1 an error, 2 wrong usage.

The rules are those of the challenge's README: 16,000,000 bytes of code and model, 600 s of training and
600 s of evaluation on the 10-minute track, 0.005 nats at p < 0.01 for a record. What goes wrong in practice
was counted over 1,803 submitted folders: no log, other code than the log's, other bytes than the log's,
logs of different versions. The LowerLR record's shipped script, for one, is not the one its log shows.
"""

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import stat
import sys
import tokenize
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from statistics import mean, pstdev, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402

from records.pack_script import is_same_program, strip  # noqa: E402
from records.unpack_script import Unpacked, Unreadable, unpack  # noqa: E402
from sweeps.lab.size_limit import SIZE_LIMIT  # noqa: E402

CLOCK, OVERSHOOT = 600.0, 1.0  # seconds; the official script ends after the step that crosses the limit
GAIN, LEVEL = 0.005, 0.01  # nats a record must gain, at this p
READ_LIMIT, WHOLE_LIMIT, SCRIPT_LIMIT = 2**24, 2**28, 2**21  # bytes read of a file, of all, of a script
FILE_LIMIT, DEPTH_LIMIT, LINE_LIMIT = 1000, 20, 600
RULE = re.compile(rf"^{'=' * 100}[ \t]*$", re.M)  # between the parts of an official log's head
OFFICIAL = dict(author=str, github_id=str, name=str, blurb=str, date=str) | dict.fromkeys(
    ("val_loss", "val_bpb", "bytes_total", "bytes_code"), Decimal
)
NEEDED = "name", "github_id", "val_bpb"  # those the README asks for
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ARTIFACT = re.compile(r"final_model\.(?!pt$).+|.+\.(?:ptz|zst|br|lzma)")  # a packed model by its name
ORDER = "error", "warn", "info"


@dataclass(frozen=True)
class Finding:
    severity: str
    code: str
    text: str


def clean(text: str, limit: int = 300) -> str:
    """One printable line, whatever a name or a value holds."""
    text = text.encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])
    return text


class Folder:
    """The regular files below a folder, by their path in it, and what has been found so far."""

    def __init__(self, path: Path):
        self.path, self.sizes, self.findings, self.left = path, {}, [], WHOLE_LIMIT
        self.sources: dict[str, list[str]] = {}  # of each self-extracting script: what it holds, and the
        # source that it was packed from
        self.walk()

    def add(self, severity: str, code: str, text: str) -> None:
        self.findings.append(Finding(severity, code, clean(text)))

    def walk(self) -> None:
        unread = []
        for root, folders, files in os.walk(self.path, onerror=unread.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]
            if len(Path(root).relative_to(self.path).parts) >= DEPTH_LIMIT and folders:
                self.add("warn", "too_deep", f"folders below {DEPTH_LIMIT} others are not looked at")
                folders.clear()
            for name in sorted(files) + links:
                self.take(Path(root, name))
            if len(self.sizes) > FILE_LIMIT:
                self.add("warn", "many_files", f"over {FILE_LIMIT} files; the rest is not looked at")
                break
        for error in unread:
            self.add("warn", "unreadable", f"{error.filename}: {error.strerror}")

    def take(self, path: Path) -> None:
        name = str(path.relative_to(self.path))
        try:
            about = path.lstat()
        except OSError as error:
            return self.add("warn", "unreadable", f"{name}: {error.strerror}")
        if stat.S_ISREG(about.st_mode):
            self.sizes[name] = about.st_size
        else:
            kind = "a link" if stat.S_ISLNK(about.st_mode) else "no regular file"
            self.add("warn", "not_a_file", f"{name} is {kind}; not looked at")

    def top(self, pattern: str) -> list[str]:
        """Files directly in the folder."""
        return [name for name in self.sizes if os.sep not in name and re.fullmatch(pattern, name)]

    def read(self, name: str) -> bytes:
        """The file's bytes, unpacked; of a longer one the start, which is said."""
        limit = min(READ_LIMIT, self.left)
        try:
            opener = OPENERS.get(Path(name).suffix, open)
            with opener(self.path / name, "rb") as file:
                data = file.read(limit + 1)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            self.add("warn", "unreadable", f"{name}: {type(error).__name__}")
            return b""
        if len(data) > limit:
            self.add("warn", "too_long", f"only the first {limit} bytes of {name} are looked at")
        self.left -= len(data[:limit])
        return data[:limit]

    def text(self, name: str) -> str:
        return decode(self.read(name))


def decode(data: bytes) -> str:
    """UTF-8, or UTF-16 where it says so (as PowerShell's Tee writes); lines end in a newline alone."""
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if wide else "utf-8-sig", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# Numbers


def number(value) -> Decimal | None:
    """A JSON number that a quantity can have, else None."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    value = Decimal(value)
    return value if value.is_finite() and abs(value.adjusted()) < 20 else None


def digits(value: Decimal) -> int:
    """Decimals that a score is right to: at most the eight of an exact line, and, as a JSON writer drops
    zeros at the end, four at least."""
    return min(8, max(4, -value.as_tuple().exponent))


def agrees(value: Decimal, truth: Decimal | float, units: float = 0.5) -> bool:
    """value is truth, rounded to the decimals of value."""
    off = abs(Decimal(value) - Decimal(truth))
    return off <= Decimal(units) * Decimal(10) ** -digits(value) + Decimal("1e-12")


def t_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t: with T = sqrt(df) tan(angle) it is an integral of cos(angle)^(df-1)."""
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def integral(low: float, high: float) -> float:
        angle = low + (high - low) * (nodes + 1) / 2
        return float((high - low) / 2 * weights @ np.cos(angle) ** (df - 1))

    return integral(math.atan(t / math.sqrt(df)), math.pi / 2) / integral(-math.pi / 2, math.pi / 2)


# Logs


@dataclass
class Score:
    label: str
    loss: Decimal  # nats per token
    bpb: Decimal
    seconds: float  # 0: not said


@dataclass
class Log:
    """What a log says of its last run."""

    name: str
    head: str  # the part with the script's source, "" if there is none
    runs: int = 1
    seed: int | None = None
    finals: list[Score] = field(default_factory=list)  # of the packed model
    others: list[Score] = field(default_factory=list)  # of the live weights, of parts
    code_bytes: int | None = None  # as it counts
    plain_bytes: int | None = None  # of the script, where what counts is a compressed one
    model_bytes: int | None = None
    total_bytes: int | None = None
    train_seconds: float = 0.0
    eval_seconds: float = 0.0  # all evaluations of the packed model
    result: dict = field(default_factory=dict)  # a RESULT line
    chosen: str = ""  # the score that submission.json names as the one that counts

    @property
    def script_bytes(self) -> int | None:
        """Of the script as it ran, before any compression."""
        return self.plain_bytes or self.code_bytes

    @property
    def final(self) -> Score | None:
        """The last exact line; where none is marked so, the last with all decimals, or the last. Of the
        chosen score, if there is one."""
        finals = [score for score in self.finals if self.chosen in score.label]
        exact = [score for score in finals if "exact" in score.label]
        full = [score for score in finals if digits(score.bpb) >= 8]
        return next((found[-1] for found in (exact, full, finals) if found), None)


VALUE = r"[:=]\s*(\d{1,3}\.\d{1,12})\b"
SCORE = re.compile(rf"^(.*?)\bval_loss{VALUE}.*?\bval_bpb{VALUE}(.*)$")
TIME = re.compile(r"(?:eval_)?time:\s*(\d{1,12}(?:\.\d+)?)\s*(ms|s)\b")
STEP = re.compile(r"\s*(step[: ]|\d+/\d+ )")
NOT_FINAL = re.compile(r"diagnostic|pre[-_]?quant|post[-_]ema|averaged|\bswa\b|:done|partial", re.I)
SIZE = re.compile(r"(Code size|Serialized model|Total submission size)( \S.*?)?: ([\d,]{1,20}) bytes")
BUDGET = re.compile(r"budget:(\d{1,12})/16000000\b")  # of the ternary records
TRAINED = re.compile(r"\btrain_time:\s*(\d{1,12}(?:\.\d+)?)ms\b")
SEED = re.compile(r"\s*seed[:=]\s*(\d{1,18})\s*$")
SEEDED = re.compile(r"seed[-_]?(\d{1,18})(?!\d)")  # in a log's name
STAMP = re.compile(r"^\d{9,11}\.\d+ ")  # some loggers put the time before each line


def split_log(text: str) -> tuple[str, list[str], int]:
    """(what stands before the versions: the source, after a preamble; the last run's lines; runs)."""
    parts = RULE.split(text)
    heads = [i for i, part in enumerate(parts) if i and re.match(r"\s*(Running )?Python \d", part)]
    if not heads:
        return "", text.splitlines(), 1
    head = parts[heads[-1] - 1]
    return head if re.search(r"^(import|from) \w", head, re.M) else "", parts[-1].splitlines(), len(heads)


def read_log(name: str, text: str) -> Log:
    head, lines, runs = split_log(text)
    log = Log(name, head, runs)
    for line in lines:
        if len(line) <= LINE_LIMIT:
            read_line(log, STAMP.sub("", line))
        if line.startswith("RESULT {"):
            with suppress(ValueError):
                log.result = load_json(line[7:])[0]
    named = SEEDED.search(Path(name).name)
    if log.seed is None and named:
        log.seed = int(named[1])
    return log


def read_line(log: Log, line: str) -> None:
    if found := SEED.match(line):
        log.seed = int(found[1])
    for found in TRAINED.finditer(line):
        log.train_seconds = max(log.train_seconds, float(found[1]) / 1000)
    if found := SIZE.match(line):
        read_size(log, found[1], found[2] or "", int(found[3].replace(",", "") or 0))
    if found := BUDGET.match(line):
        log.total_bytes = int(found[1])
    found = SCORE.match(line)
    if found and not STEP.match(line):
        clock = TIME.search(found[4])
        seconds = float(clock[1]) / (1000 if clock[2] == "ms" else 1) if clock else 0.0
        score = Score(found[1].strip(), Decimal(found[2]), Decimal(found[3]), seconds)
        early = NOT_FINAL.search(score.label)
        (log.others if early else log.finals).append(score)
        log.eval_seconds += 0.0 if early else seconds


def read_size(log: Log, what: str, label: str, value: int) -> None:
    """The raw model's lines, which have no label, come before those of the packed one and count nothing."""
    if what == "Code size":
        log.plain_bytes = value if "uncompressed" in label else log.plain_bytes
        log.code_bytes = log.code_bytes if "uncompressed" in label else value
    elif label and what == "Serialized model":
        log.model_bytes = value
    elif what == "Total submission size" and (label or log.model_bytes):
        log.total_bytes = value


def find_logs(folder: Folder) -> list[Log]:
    """The runs' logs: those that give a score, each once."""
    logs, seen = [], {}
    for name in folder.sizes:
        plain = re.sub(r"\.(gz|bz2|xz)$", "", name.lower())
        if not re.search(r"\.(log|txt|out)$", plain) or "requirements" in plain:
            continue
        text = folder.text(name)
        if not re.search(rf"\bval_bpb{VALUE}", text):
            continue
        key = hashlib.sha256(text.encode()).digest()
        if key in seen:
            folder.add("info", "same_log", f"{name} is {seen[key]}")
            continue
        seen[key] = name
        logs.append(read_log(name, text))
    return logs


def topmost(folder: Folder, logs: list[Log]) -> list[Log]:
    """Those of the topmost folder that has any; others are of side experiments."""
    depth = min((log.name.count(os.sep) for log in logs), default=0)
    chosen = [log for log in logs if log.name.count(os.sep) == depth]
    if len(chosen) < len(logs):
        more = len(logs) - len(chosen)
        folder.add(
            "info", "logs_below", f"{more} logs in folders below the others are only searched for scores"
        )
    return chosen


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
    """Those with a score that submission.json gives, else all: a study has logs of other things."""
    values = [record.get("val_bpb"), *(values.get("val_bpb") for values in seed_results(record).values())]
    values = [value for value in map(number, values) if value is not None]
    chosen = [log for log in logs if any(agrees(v, score.bpb) for v in values for score in log.finals)]
    return chosen or logs


# submission.json


def load_json(text: str) -> tuple[object, list[str]]:
    """(the value, with exact decimals; keys given twice). ValueError if it is none."""
    twice = []

    def pairs(found: list) -> dict:
        twice.extend(key for key, count in Counter(key for key, _ in found).items() if count > 1)
        return dict(found)

    try:
        return json.loads(text, parse_float=Decimal, object_pairs_hook=pairs), twice
    except (ArithmeticError, RecursionError) as error:
        raise ValueError(str(error)) from None


def find_record(folder: Folder) -> dict:
    """submission.json's object; {} if there is none."""
    names = folder.top(r"submission\.json") or folder.top(r"submission.*\.json")
    if not names:
        folder.add("error", "no_json", "no submission.json")
        return {}
    if names[0] != "submission.json":
        folder.add("warn", "json_name", f"{names[0]} should be called submission.json")
    try:
        record, twice = load_json(folder.text(names[0]))
    except ValueError as error:
        folder.add("error", "json_invalid", f"{names[0]} is not JSON: {error}")
        return {}
    for key in twice:
        folder.add("warn", "json_key_twice", f"{key} is given twice")
    if not isinstance(record, dict):
        folder.add("error", "json_invalid", f"{names[0]} holds no object")
        return {}
    check_keys(folder, record)
    return record


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


def seed_results(record: dict) -> dict[str, dict]:
    results = record.get("seed_results")
    items = results.items() if isinstance(results, dict) else ()
    return {seed: values for seed, values in items if isinstance(values, dict)}


def claimed_seeds(record: dict) -> set[int]:
    """Seeds that submission.json names."""
    given = record.get("seeds")
    listed = [seed for seed in given if type(seed) is int] if isinstance(given, list) else []
    return {*listed, *(int(seed) for seed in seed_results(record) if re.fullmatch(r"\d{1,18}", seed))}


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


# Checks


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
    return {name: decode(data) for name, data in scripts.items() if data.strip() and name not in own}


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
    elif hashlib.sha256(data).hexdigest() != found.readable_sha256:
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
    source, main = source_of(log.head), next(iter(scripts), None)
    shown = len(source.encode())  # without blank ends
    if log.runs == 1 and log.script_bytes and not 0 <= log.script_bytes - shown <= 8:
        text = f"{log.name} shows a script of {shown} bytes, but counts {log.script_bytes}"
        folder.add("error", "log_source_size", text)
    forms = {name: [text, *folder.sources.get(name, [])] for name, text in scripts.items()}
    same = [name for name, texts in forms.items() if any(ends_in(log.head, text) for text in texts)]
    if scripts and not same:
        lines = Counter(source.splitlines())
        off = {n: (lines - (c := Counter(t.splitlines())), c - lines) for n, t in scripts.items()}
        name = min(off, key=lambda name: sum(part.total() for part in off[name]))
        more, less = (part.total() for part in off[name])
        text = f"{more} lines only in the log, {less} only in {name}"
        folder.add("error", "source_differs", f"{log.name} shows a script that is not here: {text}")
    elif scripts and main not in same:
        folder.add("warn", "other_script", f"{log.name} shows {same[0]}, not {main}")


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


def close(value: int, truths: list[int], share: float) -> bool:
    return any(abs(value - truth) <= share * truth for truth in truths)


def check_bytes(folder: Folder, record: dict, logs: list[Log], scripts: dict[str, str]) -> None:
    """One size in the log, in submission.json and on the disk, and under the cap."""
    shipped = {name: folder.sizes[name] for name in scripts}
    for log in logs:
        check_log_bytes(folder, log)
    check_shipped(folder, logs, shipped)
    total, code = (number(record.get(key)) for key in ("bytes_total", "bytes_code"))
    totals = [log.total_bytes for log in logs if log.total_bytes]
    if total is not None and total > SIZE_LIMIT:
        folder.add("error", "over_cap", f"bytes_total {total} is over {SIZE_LIMIT}")
    if (
        total is not None
        and totals
        and total not in [*totals, sum(totals) // len(totals), round(mean(totals))]
    ):
        known = ", ".join(map(str, sorted(set(totals))))
        rounded = total % 1000 == 0 and close(int(total), totals, 0.005)
        kind = ("warn", "bytes_rounded") if rounded else ("error", "bytes_differ")
        folder.add(*kind, f"bytes_total {total}, but the logs say {known}")
    codes = {size for log in logs for size in (log.code_bytes, log.plain_bytes) if size} | {*shipped.values()}
    if code is not None and codes and code not in codes:
        known = ", ".join(map(str, sorted(codes)))
        folder.add(
            "error", "code_bytes_differ", f"bytes_code {code}, but the logs and the script say {known}"
        )
    models = {log.model_bytes for log in logs} - {None}
    for name in folder.top(ARTIFACT.pattern):
        size, main = folder.sizes[name], next(iter(shipped.values()), 0)
        if models and size not in models:
            folder.add(
                "error", "artifact_size", f"{name} has {size} bytes, the logs' model {sorted(models)[-1]}"
            )
        if size + main > SIZE_LIMIT:
            folder.add(
                "error", "over_cap", f"{name} and the script have {size + main} bytes, over {SIZE_LIMIT}"
            )


def check_log_bytes(folder: Folder, log: Log) -> None:
    """A log's sizes add up and are under the cap."""
    if log.total_bytes is not None and log.total_bytes > SIZE_LIMIT:
        folder.add("error", "over_cap", f"{log.name} says {log.total_bytes} bytes, over {SIZE_LIMIT}")
    if log.total_bytes and log.model_bytes and log.code_bytes:
        whole = log.model_bytes + log.code_bytes
        if whole != log.total_bytes:
            text = f"{log.name}: model and code are {whole} bytes, its total {log.total_bytes}"
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
    if main and largest and (real := largest.model_bytes + shipped[main]) > SIZE_LIMIT:
        text = f"{largest.name}: the model with {main} as it is here ({shipped[main]} bytes) takes {real}"
        kind = ("warn", "over_cap_unpacked") if largest.plain_bytes else ("error", "over_cap_shipped")
        folder.add(*kind, f"{text}, over {SIZE_LIMIT}")


def check_clocks(folder: Folder, record: dict, logs: list[Log]) -> None:
    """600 s of training and 600 s of evaluation."""
    for key, code in (("wallclock_seconds", "train_time"), ("eval_time_seconds", "eval_time")):
        if (value := number(record.get(key))) is not None and value > CLOCK + OVERSHOOT:
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
        status = log.result.get("status", "ok") if isinstance(log.result, dict) else "ok"
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
    if twice and timed:
        severity = "error" if len(known) == 1 else "warn"
        folder.add(severity, "seed_twice", f"several logs have seed {', '.join(map(str, twice))}")
    if timed and 0 < len(known) < 3:
        folder.add("warn", "few_seeds", f"{len(known)} of the three seeds that a record has in practice")


def score_means(logs: list[Log], key: str) -> dict[str, float]:
    """Mean over logs of each kind of score that several have, by its label."""
    kinds = {}
    for log in logs:
        for label, score in {score.label: score for score in log.finals}.items():
            kinds.setdefault((os.path.dirname(log.name), label), []).append(getattr(score, key))
    return {f"the mean '{label}' of {len(v)} logs": mean(v) for (_, label), v in kinds.items() if len(v) > 1}


def check_score(folder: Folder, record: dict, logs: list[Log], every: list[Log], key: str) -> None:
    """val_bpb or val_loss is a log's last exact line, or the mean of several; `every`: with logs below."""
    value, name = number(record.get(key)), key.removeprefix("val_")
    finals = [getattr(log.final, name) for log in logs if log.final]
    if value is None or not finals:
        return
    entries = [number(values.get(key)) for values in seed_results(record).values()]
    proved = {*seed_results(record)} <= {str(log.seed) for log in every}  # by check_seed_results
    claimed = [getattr(log.final, name) for log in logs if log.final and log.seed in claimed_seeds(record)]
    groups = [finals, claimed, [entry for entry in entries * proved if entry is not None]]
    means = [mean(group) for group in groups if len(group) > 1]
    single = [(score.label, log.name, score) for log in every for score in log.finals + log.others]
    others = [f"'{label}' of {log}" for label, log, score in single if agrees(value, getattr(score, name))]
    others += [text for text, middle in score_means(every, name).items() if agrees(value, middle, 1)]
    last = [score for score in finals if agrees(value, score)]
    middle = [middle for middle in means if agrees(value, middle)]
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


def check_seed_results(folder: Folder, record: dict, logs: list[Log]) -> None:
    """Each entry of seed_results is what a log of that seed says; so is the spread."""
    for seed, values in seed_results(record).items():
        own = [log for log in logs if log.seed is not None and str(log.seed) == seed]
        if own:
            check_seed_entry(folder, seed, values, own)
    if (value := number(record.get("val_bpb_std"))) is not None:
        entries = [number(values.get("val_bpb")) for values in seed_results(record).values()]
        scores = [entry for entry in entries if entry is not None] or [
            log.final.bpb for log in logs if log.final
        ]
        spreads = [stdev(scores), pstdev(scores)] if len(scores) > 1 else []
        if spreads and not any(agrees(value, spread, 2) for spread in spreads):
            folder.add("warn", "std", f"val_bpb_std {value}, that of the seeds is {spreads[0]:.8f} (n - 1)")


def check_seed_entry(folder: Folder, seed: str, values: dict, logs: list[Log]) -> None:
    for key in ("bpb", "loss"):
        value = number(values.get(f"val_{key}"))
        last = [getattr(log.final, key) for log in logs if log.final]
        others = [(score.label, getattr(score, key)) for log in logs for score in log.finals]
        labels = [label for label, score in others if agrees(value, score, 1)] if value is not None else []
        if value is None or not last or any(agrees(value, score, 1) for score in last):
            continue
        text = f"seed {seed}: val_{key} {value}, but its log ends with {', '.join(map(str, last))}"
        kind = ("warn", "other_score") if labels else ("error", "seed_result")
        folder.add(*kind, text + (f"; it is '{labels[0]}'" if labels else ""))
    size, sizes = number(values.get("artifact_bytes")), [log.total_bytes for log in logs if log.total_bytes]
    if size is not None and sizes and size not in sizes:
        bare = ", with the code" if any(size == log.model_bytes for log in logs) else ""
        text = f"seed {seed}: artifact_bytes {size}, but its log says {', '.join(map(str, sizes))}{bare}"
        folder.add("error", "seed_bytes", text)


def claimed_bar(folder: Folder, record: dict) -> tuple[float, str]:
    """(val_bpb to beat, where it stands): a key of submission.json, or the README's word; 0 if none."""
    for key in ("base_val_bpb", "comparison_baseline_bpb"):
        if (value := number(record.get(key))) is not None:
            return float(value), key
    text = "".join(map(folder.text, folder.top(r"(?i)readme\.md")))
    found = re.search(r"(?i)\bsota\b[^\n.]{0,80}?[^\d.](1\.\d{4,8})\b(?! *nats)", text)
    return (float(found[1]), "README") if found else (0.0, "")


def check_gain(folder: Folder, record: dict, logs: list[Log], bar: float, timed: bool) -> None:
    """Mean and spread of the seeds; if there is a bar, one-sided t-test of a gain over 0.005 nats."""
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
    bpb, loss = ([float(getattr(run, key)) for run in runs] for key in ("bpb", "loss"))
    text = f"{len(runs)} seeds: val_bpb {mean(bpb):.8f}, sd {stdev(bpb):.8f}; sd {stdev(loss):.8f} nats"
    folder.add("info", "spread", text)
    if not (bar and mean(bpb)):
        return
    nats = mean(loss) / mean(bpb)  # of 1 bpb on this text
    gain, error = (bar - mean(bpb)) * nats, stdev(loss) / math.sqrt(len(runs))
    far = (gain - GAIN) / error if error else math.copysign(math.inf, gain - GAIN)
    p = t_tail(far, len(runs) - 1) if error else float(far < 0)
    text = f"{gain:.5f} nats below {bar} ({source}); p of a gain over {GAIN} by chance: {p:.2g}"
    folder.add(*(("info", "gain") if p < LEVEL else ("warn", "gain_not_shown")), text)


def check_readme(folder: Folder, record: dict) -> None:
    names = folder.top(r"(?i)readme\.(md|txt|rst)")
    text = "".join(map(folder.text, names))
    value = number(record.get("val_bpb"))
    if not text.strip():
        folder.add("error", "no_readme", "README.md is empty" if names else "no README.md")
    elif value is not None and not any(f"{value:.{n}f}" in text for n in range(4, 9)):
        folder.add("warn", "readme_score", f"README does not give the val_bpb {value}")


def check_folder(path: Path, bar: float = 0.0) -> list[Finding]:
    """All that is found, worst first."""
    folder = Folder(path)
    record, scripts, every = find_record(folder), find_scripts(folder), find_logs(folder)
    timed, logs = track_of(folder, record) == "10min", topmost(folder, every)
    check_readme(folder, record)
    if not logs:
        folder.add("error", "no_log", "no log with a val_bpb")
    check_runs(folder, logs)
    choose_score(folder, record, every)
    chosen = logs if timed else claimed_logs(record, logs)
    check_source(folder, chosen, scripts)
    check_bytes(folder, record, chosen, scripts)
    check_seeds(folder, record, chosen, every, timed)
    for key in ("val_bpb", "val_loss"):
        check_score(folder, record, chosen, every, key)
    check_seed_results(folder, record, [*chosen, *(log for log in every if log not in logs)])
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
    sys.stdout.reconfigure(errors="backslashreplace")
    broken = False
    for path in asked.folders:
        found = check_folder(path, asked.bar)
        counts = Counter(finding.severity for finding in found)
        broken |= counts["error"] > 0
        name = clean(str(path))
        if asked.json:
            print(
                json.dumps(dict(folder=name, **{s: counts[s] for s in ORDER}, findings=[*map(asdict, found)]))
            )
            continue
        for finding in found:
            print(f"{finding.severity:5} {finding.code:17} {finding.text}")
        print(f"{name}: {counts['error']} errors, {counts['warn']} warnings, {counts['info']} infos")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
