"""What the log of a run says, ours or another author's: scores, steps, sizes, settings, RESULT.

`read_log` gives a Log of the last run in a text. What our own logs say more than once is kept as Statements
under one name, so that lint_statements.py can compare them all alike.
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from records.lint_folder import Folder, digits, load_json, number
from sweeps.lab.size_limit import SIZE_LIMIT

LINE_LIMIT = 600  # characters of a line that may hold a score; RESULT and the settings may be longer
LONG_LINE_LIMIT = 100_000
RULE = re.compile(rf"^{'=' * 100}[ \t]*$", re.M)  # between the parts of an official log's head
VALUE = r"[:=]\s*(\d{1,3}\.\d{1,12})\b"
SCORE = re.compile(rf"^(.*?)\bval_loss{VALUE}.*?\bval_bpb{VALUE}(.*)$")
TIME = re.compile(r"(?:eval_)?time:\s*(\d{1,12}(?:\.\d+)?)\s*(ms|s)\b")
STEP = re.compile(r"\s*(step[: ]|\d+/\d+ )")
STEP_LINE = re.compile(
    r"step:(\d{1,9})/(\d{1,9}) (.*?)train_time:(\d{1,12})ms step_avg:(\d{1,9}\.\d\d)ms(?: |$)"
)
STOPPED = re.compile(r"stopping_early: wallclock_cap train_time:(\d{1,12})ms step:(\d{1,9})/(\d{1,9})\s*$")
NOT_FINAL = re.compile(r"diagnostic|pre[-_]?quant|post[-_]ema|averaged|\bswa\b|:done|partial", re.I)
SIZE = re.compile(r"(Code size|Serialized model|Total submission size)( \S.*?)?: ([\d,]{1,20}) bytes")
BUDGET = re.compile(rf"budget:(\d{{1,12}})/{SIZE_LIMIT}\b")  # of the ternary records
TRAINED = re.compile(r"\btrain_time:\s*(\d{1,12}(?:\.\d+)?)ms\b")
SEED = re.compile(r"\s*seed[:=]\s*(\d{1,18})\s*$")
SEEDED = re.compile(r"seed[-_]?(\d{1,18})(?!\d)")  # in the name of a log or of a packed model
STAMP = re.compile(r"^\d{9,11}\.\d+ ")  # some loggers put the time before each line

# Lines of our own logs.
IDENTITY = re.compile(r"run_id:(\S+) config_hash:([0-9a-f]+) overrides:(\{.*\})$")
TEXT = re.compile(r"val: tokens:(\d+) bytes:(\d+) docs:(\d+) sha256:([0-9a-f]{64})$")
VAL_LOADER = re.compile(r"val_loader:shards pattern=.* tokens:(\d{1,15})$")
MACHINE = re.compile(
    r"device:(?P<device>.*) world_size:(?P<world_size>\d+) dtype:(?P<dtype>\S+) compile:(?P<compile>\S+) "
    r"attention:(?P<attention>.*?)(?: deterministic:(?P<deterministic>\S+))? python:(?P<python>\S+) "
    r"torch:(?P<torch>\S+) numpy:(?P<numpy>\S+)$"
)
SETTINGS = re.compile(r"(?:train_batch_tokens|attention_mode|tie_embeddings):\S+ \S")
SETTING = re.compile(r"\b([a-z_]+):(\S+)")
AVERAGED = re.compile(rf"averaged val_loss{VALUE} val_bpb{VALUE} live val_loss{VALUE} val_bpb{VALUE}$")
CODE = re.compile(r"code_sha256:([0-9a-f]{64}) code_bytes:(\d+) readable_sha256:([0-9a-f]{64})$")
# What RESULT tells of a run beside its scores, under the names of Statements.
RESULT_COUNTS = ("seed", "steps", "tokens", "model_bytes", "code_bytes", "total_bytes", "world_size")
RESULT_TEXTS = (
    "run_id",
    "config_hash",
    "val_sha256",
    "device",
    "dtype",
    "attention",
    "python",
    "torch",
    "numpy",
    "compile",
    "deterministic",
)
# Facts of one process: after a kill the run may have gone on elsewhere.
OF_A_PROCESS = {"world_size", "device", "dtype", "attention", "python", "torch", "numpy", "compile"}
OF_A_PROCESS |= {"deterministic"}
# Settings that differ from machine to machine or seed to seed, and are not in the config hash: the knobs
# with role="place".
OF_A_PLACE = {"RUN_ID", "OUT_DIR", "SEED", "DEVICE", "COMPILE", "DETERMINISTIC", "DATA_PATH"}
OF_A_PLACE |= {"TOKENIZER_PATH", "EVAL_ONLY", "MAX_EVAL_SECONDS", "VAL_BATCH_SIZE", "EVAL_BATCH_SEQS"}
OF_A_PLACE |= {"SCORE_DUMP", "SCORE_CHECK", "CHECKPOINT_SECONDS", "RESUME", "MICRO_BATCH_TOKENS"}
OF_A_PLACE |= {"WARMUP_STEPS", "VAL_LOSS_EVERY", "TRAIN_LOG_EVERY", "ALLOW_INERT", "ALLOW_ENV"}


@dataclass
class Score:
    """One line of val_loss and val_bpb."""

    label: str
    loss: Decimal  # nats per token
    bpb: Decimal
    seconds: float  # 0: not said

    @property
    def name(self) -> str:
        """The label of a rounded line and of its exact one alike."""
        return self.label.removesuffix("_exact")


@dataclass(frozen=True)
class StepLine:
    """The end of a training step, or a validation after it, in the official format."""

    step: int
    last: int  # ITERATIONS
    what: str  # "train_loss:3.1 ", "val_loss:3.0 val_bpb:2.0 "
    ms: int
    step_avg: Decimal

    @property
    def is_validation(self) -> bool:
        """Whether it gives a val_loss."""
        return self.what.startswith("val_loss")

    @property
    def score(self) -> tuple[Decimal, Decimal] | None:
        """(loss, bpb) of a validation."""
        found = re.match(rf"val_loss{VALUE} val_bpb{VALUE}", self.what)
        return (Decimal(found[1]), Decimal(found[2])) if found else None


@dataclass(frozen=True)
class Statement:
    """What one place says of a thing that other places speak of too."""

    value: Decimal | str
    decimals: int  # that a number is right to; 0 of a count or a text
    where: str

    def agrees_with(self, other: "Statement") -> bool:
        """Whether both can be roundings of one number; texts must be equal."""
        if not (isinstance(self.value, Decimal) and isinstance(other.value, Decimal)):
            return str(self.value) == str(other.value)
        if self.decimals == other.decimals:
            return self.value == other.value
        units = Decimal(10) ** -self.decimals + Decimal(10) ** -other.decimals
        return abs(self.value - other.value) <= units / 2


@dataclass
class Log:
    """What a log says of its last run."""

    name: str
    head: str  # the part with the script's source, "" if there is none
    runs: int = 1
    seed: int | None = None
    finals: list[Score] = field(default_factory=list)  # of the packed model
    others: list[Score] = field(default_factory=list)  # of the live weights, of parts
    steps: list[StepLine] = field(default_factory=list)
    code_bytes: int | None = None  # as it counts
    plain_bytes: int | None = None  # of the script, where what counts is a compressed one
    raw_bytes: int | None = None  # of the model before packing
    raw_total: int | None = None
    model_bytes: int | None = None
    total_bytes: int | None = None
    train_seconds: float = 0.0
    eval_seconds: float = 0.0  # all evaluations of the packed model
    targets: int | None = None  # tokens of the validation text
    text_bytes: int | None = None
    result: dict = field(default_factory=dict)  # of the last RESULT line
    results: int = 0  # RESULT lines with a score
    result_faults: list[str] = field(default_factory=list)
    overrides: dict = field(default_factory=dict)  # as the head says
    chosen: str = ""  # the score that submission.json names as the one that counts
    is_resumed: bool = False
    error: str = ""  # the line that a broken limit leaves
    is_truncated: bool = False  # it warns that the schedule did not reach its end
    has_identity: bool = False  # the line that our logs begin their facts with
    said: dict[str, list[Statement]] = field(default_factory=dict)  # of our own logs

    @property
    def is_ours(self) -> bool:
        """Whether train_gpt.py of this project wrote it."""
        return self.has_identity or "config_hash" in self.result

    @property
    def script_bytes(self) -> int | None:
        """Of the script as it ran, before any compression."""
        return self.plain_bytes or self.code_bytes

    @property
    def final(self) -> Score | None:
        """The last exact line; where none is marked so, the last with all decimals, or the last.

        Of the chosen score, if there is one.
        """
        finals = [score for score in self.finals if self.chosen in score.label]
        exact = [score for score in finals if "exact" in score.label]
        full = [score for score in finals if digits(score.bpb) >= 8]
        for group in (exact, full, finals):
            if group:
                return group[-1]
        return None

    @property
    def last_step(self) -> int | None:
        """The step that training ended with, as the step lines say."""
        return max((line.step for line in self.steps), default=None)

    def say(self, what: str, value: object, where: str, decimals: int = 0) -> None:
        """Keep a statement; what is neither number nor text is kept as its text."""
        if isinstance(value, int | Decimal) and not isinstance(value, bool):
            value = Decimal(value)
            if not value.is_finite():
                value = str(value)
        else:
            value = str(value)
        self.said.setdefault(what, []).append(Statement(value, decimals, where))


def short_score_name(label: str) -> str:
    """RESULT's name of the score that a final line of ours tells."""
    name = label.removesuffix("_exact").removeprefix("final_")
    if name.endswith("_roundtrip"):
        return "roundtrip"
    return {"sliding_window": "sliding", "hedge_mixer": "hedge"}.get(name, name)


# Reading a text


def split_log(text: str) -> tuple[str, str, list[str], int]:
    """(what stands before the versions: the source, after a preamble; the versions; the lines; runs).

    Of several runs in one text, those of the last.
    """
    parts = RULE.split(text)
    heads = [i for i, part in enumerate(parts) if i and re.match(r"\s*(Running )?Python \d", part)]
    if not heads:
        return "", "", text.splitlines(), 1
    head = parts[heads[-1] - 1]
    has_source = re.search(r"^(import|from) \w", head, re.M)
    return head if has_source else "", parts[heads[-1]], parts[-1].splitlines(), len(heads)


def read_log(name: str, text: str) -> Log:
    """The last run of a log."""
    head, versions, lines, runs = split_log(text)
    log = Log(name, head, runs)
    log.is_resumed = text.startswith("resumed: ")
    for line in lines:
        if len(line) <= LINE_LIMIT:
            read_line(log, STAMP.sub("", line))
        if len(line) <= LONG_LINE_LIMIT:
            read_own_line(log, line)
    read_versions(log, versions)
    named = SEEDED.search(Path(name).name)
    if log.seed is None and named:
        log.seed = int(named[1])
    if log.is_ours:
        state_what_lines_say(log)
        state_result(log)
    return log


def read_line(log: Log, line: str) -> None:
    """One line in the format of any author."""
    if found := SEED.match(line):
        log.seed = int(found[1])
        log.say("seed", log.seed, f"the line 'seed:{log.seed}'")
    for found in TRAINED.finditer(line):
        log.train_seconds = max(log.train_seconds, float(found[1]) / 1000)
    if found := STOPPED.match(line):
        where = "the line 'stopping_early'"
        log.say("train_seconds", Decimal(found[1]) / 1000, where, 1)
        log.say("steps", int(found[2]), where)
        log.say("setting iterations", as_setting(found[3]), where)
    if found := STEP_LINE.match(line):
        step = StepLine(int(found[1]), int(found[2]), found[3], int(found[4]), Decimal(found[5]))
        log.steps.append(step)
    if found := SIZE.match(line):
        read_size(log, found[1], found[2] or "", int(found[3].replace(",", "") or 0))
    if found := BUDGET.match(line):
        log.total_bytes = int(found[1])
    if found := VAL_LOADER.match(line):
        log.targets = int(found[1])
        log.say("val tokens", log.targets, "the line 'val_loader:'")
    found = SCORE.match(line)
    if found and not STEP.match(line):
        read_score(log, found)


def read_score(log: Log, found: re.Match) -> None:
    """A score outside the steps: of the packed model, unless its label says otherwise."""
    clock = TIME.search(found[4])
    seconds = 0.0
    if clock:
        seconds = float(clock[1]) / (1000 if clock[2] == "ms" else 1)
    score = Score(found[1].strip(), Decimal(found[2]), Decimal(found[3]), seconds)
    if NOT_FINAL.search(score.label):
        log.others.append(score)
    else:
        log.finals.append(score)
        log.eval_seconds += seconds


def read_size(log: Log, what: str, label: str, value: int) -> None:
    """The raw model's lines, which have no label, come before those of the packed one and count nothing."""
    if what == "Code size" and "uncompressed" in label:
        log.plain_bytes = value
    elif what == "Code size":
        log.code_bytes = value
        log.say("code_bytes", value, "the line 'Code size'")
    elif what == "Serialized model" and label:
        log.model_bytes = value
        log.say("model_bytes", value, f"the line 'Serialized model{label}'")
        log.say("packing", label.strip(), f"the line 'Serialized model{label}'")
    elif what == "Serialized model":
        log.raw_bytes = value
    elif label or log.model_bytes:
        log.total_bytes = value
        log.say("total_bytes", value, f"the line 'Total submission size{label}'")
    else:
        log.raw_total = value


def read_versions(log: Log, versions: str) -> None:
    """The versions between the rules, as the official script writes them."""
    if found := re.search(r"^Running Python (\S+)", versions, re.M):
        log.say("python", found[1], "the line 'Running Python'")
    if found := re.search(r"^Running PyTorch (\S+)", versions, re.M):
        log.say("torch", found[1], "the line 'Running PyTorch'")


def read_own_line(log: Log, line: str) -> None:
    """One line in the format of train_gpt.py of this project."""
    if line.startswith("RESULT "):
        read_result(log, line)
    elif line.startswith("resumed: step:"):
        log.is_resumed = True
    elif line.startswith("error: "):
        log.error = line
    elif "schedule_truncated at progress" in line:
        log.is_truncated = True
    elif found := IDENTITY.match(line):
        log.has_identity = True
        log.say("run_id", found[1], "the line 'run_id:'")
        log.say("config_hash", found[2], "the line 'run_id:'")
        try:
            overrides = load_json(found[3]).value
        except ValueError:
            log.result_faults.append("the overrides of the line 'run_id:' are not JSON")
        else:
            log.overrides = overrides if isinstance(overrides, dict) else {}
    elif found := TEXT.match(line):
        log.text_bytes = int(found[2])
        log.say("val tokens", int(found[1]), "the line 'val:'")
        log.say("val_sha256", found[4], "the line 'val:'")
    elif found := MACHINE.match(line):
        for name, value in found.groupdict().items():
            if value is not None:
                log.say(name, Decimal(value) if name == "world_size" else value, "the line 'device:'")
    elif SETTINGS.match(line):
        for name, value in SETTING.findall(line):
            # With tied embeddings these two are not the knobs of their names.
            if name not in ("embed_lr", "head_lr") or "tie_embeddings:False" in line:
                log.say(f"setting {name}", as_setting(value), f"the line '{line.partition(':')[0]}:'")
    elif found := CODE.match(line):
        log.say("code_sha256", found[1], "the line 'code_sha256:'")
        log.say("code_bytes", int(found[2]), "the line 'code_sha256:'")
        log.say("readable_sha256", found[3], "the line 'code_sha256:'")
    elif found := re.match(r"model_params:(\d+)$", line):
        log.say("model_params", int(found[1]), "the line 'model_params:'")


def read_result(log: Log, line: str) -> None:
    """A RESULT line; the last one counts."""
    try:
        loaded = load_json(line[7:])
    except ValueError as error:
        if line.startswith("RESULT {"):
            log.result_faults.append(f"its RESULT is not JSON: {error}")
        return
    if not isinstance(loaded.value, dict):
        return
    log.result = loaded.value
    log.results += number(log.result.get("val_bpb")) is not None
    if loaded.contradicting:
        log.result_faults.append(f"its RESULT gives {', '.join(loaded.contradicting)} twice, differently")


# What our own logs say more than once


def state_what_lines_say(log: Log) -> None:
    """Statements of the lines that only together tell something: the last step, the scores, the settings."""
    for score in log.finals:
        if not score.label.startswith("final_"):
            continue
        line = f"the line '{score.label}'"
        name = short_score_name(score.label)
        log.say(f"{name} val_loss", score.loss, line, digits(score.loss))
        log.say(f"{name} val_bpb", score.bpb, line, digits(score.bpb))
        if name == "roundtrip":
            packing = score.name.removeprefix("final_").removesuffix("_roundtrip")
            log.say("packing", packing.replace("_", "+"), line)
    state_last_step(log)
    for line in log.steps:
        log.say("setting iterations", as_setting(line.last), f"the line 'step:{line.step}/{line.last}'")
    for score in log.others:
        if score.label == "averaged":
            log.say("averaged val_loss", score.loss, "the line 'averaged'", 4)
            log.say("averaged val_bpb", score.bpb, "the line 'averaged'", 4)
    for name, value in log.overrides.items():
        if f"setting {name.lower()}" in log.said:
            log.say(f"setting {name.lower()}", as_setting(value), "the overrides of the line 'run_id:'")
    if "SEED" in log.overrides:
        log.say("seed", log.overrides["SEED"], "the overrides of the line 'run_id:'")


def state_last_step(log: Log) -> None:
    """How far training went, and the score of the live weights at its end."""
    if not log.steps:
        return
    last = log.steps[-1]
    where = f"the line 'step:{last.step}/{last.last}'"
    log.say("steps", last.step, where)
    log.say("train_seconds", Decimal(last.ms) / 1000, where, 1)
    if last.is_validation and last.score:
        log.say("live val_loss", last.score[0], where, 4)
        log.say("live val_bpb", last.score[1], where, 4)


def state_result(log: Log) -> None:
    """Statements of the RESULT line."""
    result = log.result
    for name in RESULT_COUNTS:
        value = number(result.get(name))
        if value is not None:
            log.say(name, value, "RESULT")
    for name in RESULT_TEXTS:
        if name in result:
            log.say(name, result[name], "RESULT")
    seconds = number(result.get("train_seconds"))
    if seconds is not None:
        log.say("train_seconds", seconds, "RESULT", 3)
    for key, value in result.items():
        if key.endswith(("_val_loss", "_val_bpb")) and number(value) is not None:
            name, _, what = key.rpartition("_val_")
            log.say(f"{name} val_{what}", value, "RESULT", 8)
    for key in ("val_loss", "val_bpb"):  # of the official score, the roundtrip
        if number(result.get(key)) is not None:
            log.say(f"roundtrip {key}", result[key], "RESULT", 8)
    prequant = number(result.get("prequant_val_bpb"))
    if prequant is not None and any(score.label == "averaged" for score in log.others):
        log.say("averaged val_bpb", prequant, "RESULT", 8)
    elif prequant is not None:
        log.say("live val_bpb", prequant, "RESULT", 8)
    if "quant" in result and "codec" in result:
        log.say("packing", f"{result['quant']}+{result['codec']}", "RESULT")
    state_result_settings(log)


def state_result_settings(log: Log) -> None:
    """Statements of RESULT's overrides on what the head's lines say too."""
    overrides = log.result.get("overrides")
    if not isinstance(overrides, dict):
        return
    for name, value in overrides.items():
        if f"setting {name.lower()}" in log.said:
            log.say(f"setting {name.lower()}", as_setting(value), "the overrides of RESULT")
    if "SEED" in overrides:
        log.say("seed", overrides["SEED"], "the overrides of RESULT")


def as_setting(value: object) -> str:
    """A knob's value in one spelling, whether a line of the log or a JSON object gave it."""
    if isinstance(value, bool):
        return str(value)
    with suppress(TypeError, ValueError, OverflowError):
        return format(float(value), ".10g")
    return str(value)


# The folder's logs


def find_logs(folder: Folder) -> list[Log]:
    """The runs' logs: those that give a score, each once."""
    logs: list[Log] = []
    seen: dict[bytes, str] = {}
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
