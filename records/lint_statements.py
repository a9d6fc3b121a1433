"""What a record folder says more than once, compared: each contradiction is an error of one line.

Of any author's folder: rounded and exact lines, loss against bpb, the clock of the steps, logs against each
other, packed models against logs. Of a folder of ours (records/make.py) everything else too: the lines of
a log against its RESULT, both against submission.json, the packed models against all three. What nobody
says twice cannot be checked here: records/rescore.py makes the scores again.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations, pairwise
from statistics import mean, median

from records.artifact_head import BadArtifact, NoCodec, is_ours, read_head
from records.lint_folder import Folder, digits, number, sha256_forms
from records.lint_log import OF_A_PLACE, OF_A_PROCESS, SEEDED, Log, Score, as_setting

ARTIFACT = re.compile(r"final_model\.(?!pt$).+|.+\.(?:ptz|zst|br|lzma)")  # a packed model by its name
# Loss and bpb of two scores of another's log may be of slightly different tokens: an official sliding window
# drops the end of the text, test-time training another. Their ratios differed by 0.0065 % at most in 60
# folders. Beyond the first share it is said; beyond the second no choice of tokens explains it.
RATIO_NOISE = 2e-4
RATIO_LIMIT = 1e-2
SAME_LINES = 5  # lines of training that two runs never have in common
LEAST_SAME_MS = 1000


# Within a log


def check_log(folder: Folder, log: Log) -> None:
    """Whatever one log says twice."""
    for fault in log.result_faults:
        folder.add("error", "result_invalid", f"{log.name}: {fault}")
    check_statements(folder, log)
    check_rounded_lines(folder, log)
    check_loss_against_bpb(folder, log)
    check_step_lines(folder, log)
    if log.is_ours:
        check_result(folder, log)


def check_statements(folder: Folder, log: Log) -> None:
    """Two places of a log that name one thing name one value."""
    if not log.is_ours:
        return
    for what, statements in log.said.items():
        if log.is_resumed and what in OF_A_PROCESS:
            continue
        first = statements[0]
        for other in statements[1:]:
            if not first.agrees_with(other):
                text = f"{log.name}: {what} is {first.value} in {first.where}, {other.value} in {other.where}"
                folder.add("error", "log_contradicts", text)
                break


def check_rounded_lines(folder: Folder, log: Log) -> None:
    """A final line and the exact one after it are one score."""
    for rounded, exact in pairwise(log.finals):
        if exact.label != f"{rounded.label}_exact":
            continue
        for key in ("loss", "bpb"):
            short = getattr(rounded, key)
            full = getattr(exact, key)
            unit = Decimal(10) ** short.as_tuple().exponent  # some cut the digits instead of rounding
            if abs(short - full) > unit:
                text = f"{log.name}: val_{key} {short} in '{rounded.label}', {full} in '{exact.label}'"
                folder.add("error", "final_lines", text)


def check_loss_against_bpb(folder: Folder, log: Log) -> None:
    """All scores of one text have one ratio of nats a token to bits a byte."""
    scores = [score for score in log.finals + log.others if not score.label.startswith("partial_")]
    for line in log.steps:
        if line.score:
            scores.append(Score(f"step:{line.step}", *line.score, 0.0))
    scores = [score for score in scores if score.bpb > 0 and score.loss > 0]
    ratio, noise, source = text_ratio(log, scores)
    for score in scores:
        rounding = half_unit(score.loss) + ratio * half_unit(score.bpb)
        off = abs(float(score.loss) - ratio * float(score.bpb))
        if off > rounding + noise * float(score.loss):
            text = f"{log.name}: '{score.label}' has val_loss {score.loss} and val_bpb {score.bpb}, which is "
            text += f"{float(score.loss / score.bpb):.6f} nats a bit; {source} has {ratio:.6f}"
            is_slight = not log.is_ours and off <= rounding + RATIO_LIMIT * float(score.loss)
            folder.add("warn" if is_slight else "error", "loss_and_bpb", text)


def text_ratio(log: Log, scores: list[Score]) -> tuple[float, float, str]:
    """(nats a token for each bit a byte, how far others may be from it relatively, where it stands)."""
    if log.is_ours and log.targets and log.text_bytes:
        return math.log(2) * log.text_bytes / log.targets, 1e-9, "the text of the line 'val:'"
    if not scores:
        return 1.0, 0.0, ""
    full = [score for score in scores if digits(score.bpb) >= 6]
    judges = full if len(full) > 2 else scores  # of two, neither is the middle one
    middle = median(float(score.loss / score.bpb) for score in judges)
    return middle, RATIO_NOISE, "the middle one of the log"


def half_unit(value: Decimal) -> float:
    """How far a printed number may be from what it rounds."""
    return 0.5 * 10.0 ** value.as_tuple().exponent + 1e-12


def check_step_lines(folder: Folder, log: Log) -> None:
    """Steps and clock go forward together, and step_avg is one by the other."""
    for line in log.steps:
        average = float(line.step_avg)
        if line.step and abs(average * line.step - line.ms) > 0.0051 * line.step + 0.51:
            text = f"{log.name}: step:{line.step} has train_time {line.ms} ms and step_avg {line.step_avg} ms"
            folder.add("error", "step_avg", text)
            break
    for before, after in pairwise(log.steps):
        is_back = after.step < before.step or after.ms < before.ms
        if is_back and not log.is_resumed and log.is_ours:
            text = f"{log.name}: step:{after.step} at {after.ms} ms comes after "
            text += f"step:{before.step} at {before.ms} ms"
            folder.add("error", "steps_back", text)
            break


def check_result(folder: Folder, log: Log) -> None:
    """RESULT is there once, adds up, and is of the settings in the head."""
    result = log.result
    if not log.results:
        folder.add("error", "no_result", f"{log.name} has no RESULT with a score: the run did not finish")
        return
    if log.results > 1 and log.runs == 1:
        folder.add("error", "result_twice", f"{log.name} has {log.results} RESULT lines with a score")
    overrides = result.get("overrides")
    if isinstance(overrides, dict) and log.has_identity:
        check_overrides(folder, log, overrides)
    steps = number(result.get("steps"))
    tokens = number(result.get("tokens"))
    batch = log.said.get("setting train_batch_tokens")
    if None not in (steps, tokens) and batch and tokens != steps * int(float(batch[0].value)):
        text = f"{log.name}: RESULT has {tokens} tokens, but {steps} steps of {batch[0].value}"
        folder.add("error", "log_contradicts", text)
    if result.get("status") == "ok" and result.get("exit_code", 0) != 0:
        text = f"{log.name}: RESULT has status ok and exit_code {result['exit_code']}"
        folder.add("error", "log_contradicts", text)
    if result.get("status") == "ok" and log.error:
        folder.add(
            "error", "log_contradicts", f"{log.name}: RESULT has status ok, a line before '{log.error}'"
        )
    if log.is_truncated and result.get("truncated") is False:
        text = f"{log.name}: RESULT has truncated false, a line before warns of schedule_truncated"
        folder.add("error", "log_contradicts", text)
    sizes = [number(result.get(f"{name}_bytes")) for name in ("model", "code", "total")]
    if None not in sizes and sizes[0] + sizes[1] != sizes[2]:
        text = f"{log.name}: RESULT has {sizes[0]} and {sizes[1]} bytes, total {sizes[2]}"
        folder.add("error", "sum_wrong", text)
    seconds = number(result.get("eval_seconds"))
    if seconds is not None and abs(float(seconds) - log.eval_seconds) > 0.001 * len(log.finals) + 0.001:
        text = f"{log.name}: RESULT has eval_seconds {seconds}, its final lines {log.eval_seconds:.3f}"
        folder.add("error", "log_contradicts", text)


def check_overrides(folder: Folder, log: Log, overrides: dict) -> None:
    """The settings that RESULT repeats are those of the head."""
    name = first_difference(log.overrides, overrides)
    if name:
        head = log.overrides.get(name, "unset")
        said = overrides.get(name, "unset")
        text = f"{log.name}: {name} is {head} in the line 'run_id:', {said} in RESULT"
        folder.add("error", "log_contradicts", text)


def first_difference(one: dict, other: dict) -> str:
    """The first key, by name, that two objects do not have in common; "" if there is none."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or as_setting(one[name]) != as_setting(other[name]):
            return name
    return ""


# Logs against each other


def check_logs_together(folder: Folder, logs: list[Log]) -> None:
    """Logs of several seeds are of several runs, on one text, with one setting."""
    for one, other in combinations(logs, 2):
        if one.seed is not None and one.seed == other.seed:
            continue
        pair = f"{one.name} and {other.name}"
        if is_copy(one, other):
            text = f"{pair} end with one score in every digit: one run under two seeds"
            folder.add("error", "run_copied", text)
        elif have_the_same_steps(one, other):
            text = f"{pair} have the same losses or times at every step: one run under two seeds"
            folder.add("error", "run_copied", text)
    if logs:
        check_against_first(folder, logs)


def is_copy(one: Log, other: Log) -> bool:
    """Whether both end with the same score, with enough decimals that it is no accident."""
    if not (one.final and other.final):
        return False
    has_decimals = -one.final.loss.as_tuple().exponent >= 6
    return has_decimals and (one.final.loss, one.final.bpb) == (other.final.loss, other.final.bpb)


def have_the_same_steps(one: Log, other: Log) -> bool:
    """Whether the training lines of two logs agree in all losses, or in all times, beyond the start."""
    if min(len(one.steps), len(other.steps)) < SAME_LINES or len(one.steps) != len(other.steps):
        return False
    losses, others_losses = ([line.what for line in log.steps if line.step] for log in (one, other))
    times, others_times = ([line.ms for line in log.steps if line.step] for log in (one, other))
    # Milliseconds of steps that take a few agree by accident.
    return losses == others_losses or (times == others_times and times[-1] >= LEAST_SAME_MS)


def check_against_first(folder: Folder, logs: list[Log]) -> None:
    """Text and settings of each log are those of the first."""
    first = logs[0]
    for log in logs[1:]:
        pair = f"{first.name} and {log.name}"
        for what in ("val tokens", "val_sha256"):
            if what in first.said and what in log.said and differ(first, log, what):
                values = f"{first.said[what][0].value} and {log.said[what][0].value}"
                text = f"{pair} are of different validation texts: {what} {values}"
                folder.add("error", "text_varies", text)
                break
        if not (first.is_ours and log.is_ours):
            continue
        settings, others = (
            {name: value for name, value in log.overrides.items() if name not in OF_A_PLACE}
            for log in (first, log)
        )
        name = first_difference(settings, others)
        if name:
            values = f"{settings.get(name, 'unset')} and {others.get(name, 'unset')}"
            folder.add("error", "config_varies", f"{pair} have {name} {values}")
        elif differ(first, log, "config_hash"):
            folder.add("error", "config_varies", f"{pair} have one setting and two config hashes")


def differ(one: Log, other: Log, what: str) -> bool:
    """Whether two logs that both speak of a thing name different values."""
    if what not in one.said or what not in other.said:
        return False
    return one.said[what][0].value != other.said[what][0].value


# submission.json against the logs


@dataclass(frozen=True)
class Truth:
    """What a log says of a key of submission.json, and how far the key may be from it."""

    value: Decimal
    tolerance: Decimal

    def holds(self, claim: Decimal, factor: int = 1) -> bool:
        """Whether the claim is that value."""
        return abs(claim - self.value) <= self.tolerance * factor + Decimal("1e-12")


EXACT = Decimal("5e-9")  # of a number with eight decimals


def truths_of(log: Log, claim: dict, score: str) -> dict[str, Truth]:
    """What a log of ours says of each key of `claim`; keys that it says nothing of are left out."""
    found: dict[str, Truth] = {}
    for key in claim:
        if number(claim[key]) is None:
            continue
        truth = truth_of(log, key, score)
        if truth:
            found[key] = truth
    return found


def truth_of(log: Log, key: str, score: str) -> Truth | None:
    """What a log of ours says of one key, None if nothing."""
    if key in ("val_loss", "val_bpb"):
        return stated(log, f"{score} {key}", EXACT)
    if key.startswith("pre_quant_"):
        what = key.removeprefix("pre_quant_")
        state = "averaged" if any(one.label == "averaged" for one in log.others) else "live"
        return stated(log, f"{state} {what}", EXACT)
    if key.endswith(("_val_loss", "_val_bpb")):
        name, _, what = key.rpartition("_val_")
        return stated(log, f"{name} val_{what}", EXACT)
    if key == "step_stop":
        return stated(log, "steps", Decimal(0))
    if key == "wallclock_seconds":
        return stated(log, "train_seconds", Decimal("0.0005"))
    if key == "eval_seconds":
        value = number(log.result.get("eval_seconds"))
        return None if value is None else Truth(value, Decimal("0.0005"))
    if key.startswith("bytes_model_"):
        return stated(log, "model_bytes", Decimal(0))
    if key in ("bytes_total", "artifact_bytes"):
        return stated(log, "total_bytes", Decimal(0))
    if key == "bytes_code":
        return stated(log, "code_bytes", Decimal(0))
    return None


def stated(log: Log, what: str, tolerance: Decimal) -> Truth | None:
    """The most exact statement of a number; of a rounded one the claim may be half a unit away."""
    numbers = [one for one in log.said.get(what, []) if isinstance(one.value, Decimal)]
    if not numbers:
        return None
    best = max(numbers, key=lambda statement: statement.decimals)
    rounding = Decimal(10) ** -best.decimals / 2 if 0 < best.decimals < 8 else Decimal(0)
    return Truth(best.value, tolerance + rounding)


def check_claims(folder: Folder, record: dict, rows: dict[str, dict], logs: list[Log]) -> None:
    """Each number of submission.json that a log of ours says too. rows: its seed_results."""
    own = [log for log in logs if log.is_ours and log.results]
    if not own or len(own) != len(logs):
        return
    score = record.get("score")
    score = score if isinstance(score, str) else "roundtrip"
    for seed, row in rows.items():
        for log in own:
            if str(log.seed) == seed:
                check_row(folder, f"seed {seed}: ", row, truths_of(log, row, score), log.name)
    if len(own) == 1:
        check_row(folder, "", record, truths_of(own[0], record, score), own[0].name)
    else:
        check_whole(folder, record, [truths_of(log, record, score) for log in own])
    check_facts(folder, record, own)


def check_row(folder: Folder, who: str, row: dict, truths: dict[str, Truth], log_name: str) -> None:
    """The claims of one run."""
    for key, truth in truths.items():
        claim = number(row[key])
        if not truth.holds(claim):
            text = f"{who}{key} is {claim} in submission.json, {truth.value} in {log_name}"
            folder.add("error", "claim_differs", text)


def check_whole(folder: Folder, record: dict, truths: list[dict[str, Truth]]) -> None:
    """The claims of several runs: means of scores, the largest of all else."""
    shared = [key for key in truths[0] if all(key in row for row in truths)]
    for key in shared:
        claim = number(record[key])
        values = [row[key].value for row in truths]
        tolerance = max(row[key].tolerance for row in truths)
        is_score = key.endswith(("val_loss", "val_bpb"))
        expected = Truth(mean(values) if is_score else max(values), tolerance + (EXACT if is_score else 0))
        if not expected.holds(claim):
            kind = "mean" if is_score else "largest"
            # A mean of decimals has 28 digits; a log's scores have eight.
            value = f"{expected.value:.8f}" if is_score else f"{expected.value:f}"
            text = f"{key} is {claim} in submission.json, the {kind} of the logs is {value}"
            folder.add("error", "claim_differs", text)


def check_facts(folder: Folder, record: dict, logs: list[Log]) -> None:
    """Hashes, versions, machine and seeds of submission.json."""
    for key, what in (
        ("config_hash", "config_hash"),
        ("val_sha256", "val_sha256"),
        ("pytorch_version", "torch"),
        ("readable_sha256", "readable_sha256"),
    ):
        claim = record.get(key)
        for log in logs:
            values = {str(statement.value) for statement in log.said.get(what, [])}
            if what == "torch":  # make.py gives the first seed's; a seed that went on may have met another
                values = {str(one.value) for log in logs for one in log.said.get(what, [])}
            if isinstance(claim, str) and values and claim not in values:
                text = f"{key} is {claim} in submission.json, {min(values)} in {log.name}"
                folder.add("error", "claim_differs", text)
                break
    machines = {f"{log.result.get('world_size')}x {log.result.get('device')}" for log in logs}
    hardware = record.get("hardware")
    if isinstance(hardware, str) and {*hardware.split("; ")} != machines:
        text = f"hardware is {hardware} in submission.json, {'; '.join(sorted(machines))} in the logs"
        folder.add("error", "claim_differs", text)
    resumed: set[int] = set()
    for log in logs:
        steps = log.result.get("resumed")
        resumed |= {step for step in steps if type(step) is int} if isinstance(steps, list) else set()
    if isinstance(record.get("resumed"), list) and record["resumed"] != sorted(resumed):
        text = f"resumed is {record['resumed']} in submission.json, {sorted(resumed)} in the logs"
        folder.add("error", "claim_differs", text)
    seeds = record.get("seeds")
    left_out = [log for log in logs if isinstance(seeds, list) and log.seed not in seeds]
    for log in left_out:
        text = f"{log.name} is of seed {log.seed}, which is not among the seeds of submission.json"
        folder.add("error", "seed_left_out", text)
    check_blurb(folder, record, logs)


def check_blurb(folder: Folder, record: dict, logs: list[Log]) -> None:
    """The sentence that records/make.py writes where no other is given."""
    found = re.match(
        r"val_bpb (\d+\.\d{4}) \((\w+)\), (?:the mean of (\d+) seeds|one seed), after (.*) steps\.$",
        record["blurb"] if isinstance(record.get("blurb"), str) else "",
    )
    if not found:
        return
    steps = " and ".join(dict.fromkeys(f"{log.result.get('steps'):,}" for log in logs))
    bpb = number(record.get("val_bpb"))
    count = int(found[3] or 1)
    is_score = bpb is None or f"{bpb:.4f}" == found[1]
    if not is_score or found[2] != record.get("score") or count != len(logs) or found[4] != steps:
        text = f"the blurb says '{found[0]}'; the logs are {len(logs)}, of {steps} steps, val_bpb {bpb}"
        folder.add("error", "blurb_differs", text)


def check_official_keys(folder: Folder, record: dict, logs: list[Log]) -> None:
    """Keys of the official submission.json that any author's log says something of."""
    if any(log.is_ours for log in logs):
        return
    steps = [log.last_step for log in logs if log.last_step]
    claim = number(record.get("step_stop"))
    if claim is not None and steps and not (min(steps) <= claim <= max(steps)):
        said = ", ".join(map(str, steps))
        text = f"step_stop is {claim} in submission.json, but the logs end at step {said}"
        folder.add("error", "claim_differs", text)
    seconds = [log.train_seconds for log in logs if log.train_seconds]
    for key in ("wallclock_seconds", "train_time_seconds"):
        claim = number(record.get(key))
        if claim is None or not seconds:
            continue
        if not (0.999 * min(seconds) - 1 <= float(claim) <= 1.001 * max(seconds) + 1):
            said = ", ".join(f"{value:.1f}" for value in seconds)
            folder.add("error", "claim_differs", f"{key} is {claim} in submission.json, {said} s in the logs")
    for key in ("loss", "bpb"):
        claim = number(record.get(f"pre_quant_val_{key}"))
        said = list(live_scores(logs, key))
        if claim is None or not said:
            continue
        low, high = min(said), max(said)
        if not (float(low) - 1e-4 <= float(claim) <= float(high) + 1e-4):
            text = f"pre_quant_val_{key} is {claim} in submission.json, {low} to {high} in the logs"
            folder.add("error", "claim_differs", text)


def live_scores(logs: list[Log], key: str) -> Iterator[Decimal]:
    """Scores of the weights before packing: at the end of training, and any that is marked so."""
    for log in logs:
        validations = [line.score for line in log.steps if line.score]
        if validations:
            yield validations[-1][0 if key == "loss" else 1]
        for score in log.others:
            yield getattr(score, key)


# Hashes of the script


def check_code_hash(folder: Folder, record: dict, logs: list[Log], scripts: dict[str, str]) -> None:
    """code_sha256 and readable_sha256 are those of the files that are here."""
    claims = {"code_sha256": "train_gpt.py", "readable_sha256": "train_gpt_readable.py"}
    for key, name in claims.items():
        said = {log.name: log.said[key][0].value for log in logs if key in log.said}
        claim = record.get(key)
        if isinstance(claim, str) and claim:
            said["submission.json"] = claim
        if name not in folder.sizes or not said:
            continue
        forms = sha256_forms(folder.read(name))
        for place, value in said.items():
            if value not in forms:
                text = f"the {key} of {name} is {value[:16]} in {place}, by the file another"
                folder.add("error", "code_hash", text)


# Packed models


def check_artifacts(folder: Folder, record: dict, rows: dict[str, dict], logs: list[Log]) -> None:
    """Each packed model is of the run that its name says, by size, sha256 and what its head says."""
    seen: dict[str, str] = {}
    for name in folder.top(ARTIFACT.pattern):
        log = log_of_artifact(name, logs)
        blob = folder.read(name)
        sha = hashlib.sha256(blob).hexdigest()
        if sha in seen:
            folder.add("error", "artifact_copied", f"{name} and {seen[sha]} are one file")
        seen[sha] = name
        sizes = {one.model_bytes for one in ([log] if log else logs) if one.model_bytes}
        if sizes and folder.sizes[name] not in sizes:
            owner = log.name if log else "the logs"
            text = f"{name} has {folder.sizes[name]} bytes, the model of {owner} {max(sizes)}"
            folder.add("error", "artifact_size", text)
        claim = claimed_hash(record, rows, log)
        if claim and claim != sha:
            text = f"{name} has sha256 {sha[:16]}, submission.json says {claim[:16]}"
            folder.add("error", "artifact_hash", text)
        if is_ours(blob):
            check_artifact_head(folder, name, blob, log)


def log_of_artifact(name: str, logs: list[Log]) -> Log | None:
    """The log of the seed in a packed model's name, or the only log."""
    named = SEEDED.search(name)
    if named:
        own = [log for log in logs if log.seed == int(named[1])]
        return own[0] if len(own) == 1 else None
    return logs[0] if len(logs) == 1 else None


def claimed_hash(record: dict, rows: dict[str, dict], log: Log | None) -> str:
    """The sha256 that submission.json gives the packed model of a log, "" if none."""
    row = rows.get(str(log.seed), {}) if log else {}
    for place in (row, record):
        value = place.get("artifact_sha256")
        if isinstance(value, str):
            return value
    return ""


def check_artifact_head(folder: Folder, name: str, blob: bytes, log: Log | None) -> None:
    """The head of a packed model names the config and the packing of its log."""
    try:
        head = read_head(blob)
    except BadArtifact as error:
        folder.add("error", "artifact_damaged", f"{name}: {error}")
        return
    except NoCodec as error:
        folder.add("info", "artifact_unread", f"the head of {name} is not read: {error}")
        return
    if not log or not log.is_ours:
        return
    facts = {"config_hash": head.get("config_hash"), "dtype": head.get("dtype")}
    if "quant" in head and "codec" in head:
        facts["packing"] = f"{head['quant']}+{head['codec']}"
    for what, value in facts.items():
        said = log.said.get(what, [])
        if value is None or not said or log.is_resumed and what in OF_A_PROCESS:
            continue
        if str(value) not in {str(statement.value) for statement in said}:
            text = f"{name} was packed with {what} {value}, {log.name} says {said[0].value}"
            folder.add("error", "artifact_head", text)
    shape = head.get("model")
    for knob, value in shape.items() if isinstance(shape, dict) else ():
        said = log.overrides.get(knob.upper(), value)  # unset: the head may list defaults too
        if as_setting(said) != as_setting(value):
            text = f"{name} was packed with {knob.upper()} {value}, {log.name} says {said}"
            folder.add("error", "artifact_head", text)
