"""The README of a record folder against its logs and its submission.json.

Of any author's: the table with a row for each seed, and the sha256 that stands beside a file's name. Of a
page that records/make.py wrote, each line whose form is still that page's: score, table, t-test, sizes,
volume, settings. What a person wrote around them is not read.
"""

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from statistics import mean, stdev

import numpy as np

from records.lint_folder import Folder, number, sha256_forms
from records.lint_log import Log, as_setting
from records.lint_statements import Truth, truth_of

GAIN = 0.005  # nats a record must gain
SHA_OF_FILE = re.compile(r"`([^`/\n]+)`[^`\n]*sha256 `([0-9a-f]{64})`")
SHA_OF_TEXT = re.compile(r"^Validation text: ([\d,]+) tokens, ([\d,]+) bytes, sha256 `([0-9a-f]{64})`", re.M)
HEADLINE = re.compile(
    r"^val_bpb \*\*(\d+\.\d+)\*\* \(score `(\w+)`; "
    r"(?:mean of (\d+) seeds, sample standard deviation (\d+\.\d+)|one seed)\)",
    re.M,
)
T_TEST = re.compile(
    r"The mean `(\w+)` val_bpb is ([+-]\d+\.\d+) bpb \(([+-]\d+\.\d+) nats\) from the bar (\d+\.\d+)\. "
    r"One-sided t-tests, the bar taken as exact, that it is lower: t\((\d+)\) = (-?\d+\.\d+), p = (\d\.\d+); "
    r"that it is lower by (\d\.\d+) nats: t\((\d+)\) = (-?\d+\.\d+), p = (\d\.\d+)\."
)
OF_THE_COMMAND = {"DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "OUT_DIR", "SEED"}  # not those of the log
ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")
# Columns of the table of seeds, as the claim of a seed calls them.
COLUMNS = {"steps": "step_stop", "train s": "wallclock_seconds", "eval s": "eval_seconds"}
COLUMNS |= {"total bytes": "bytes_total"}
# Lines of the page of one run: what stands before the number, and its key.
SINGLE_LINES = {
    "Packed model": "bytes_model_",
    "Code": "bytes_code",
    "Total": "bytes_total",
}


def t_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t: with T = sqrt(df) tan(angle) it is an integral of cos(angle)^(df-1)."""
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def integral(low: float, high: float) -> float:
        angle = low + (high - low) * (nodes + 1) / 2
        return float((high - low) / 2 * weights @ np.cos(angle) ** (df - 1))

    return integral(math.atan(t / math.sqrt(df)), math.pi / 2) / integral(-math.pi / 2, math.pi / 2)


def check_readme(folder: Folder, record: dict, logs: list[Log]) -> None:
    """There is a README, it gives the score, and what it repeats of logs and claims is theirs."""
    names = folder.top(r"(?i)readme\.(md|txt|rst)")
    text = "".join(map(folder.text, names))
    value = number(record.get("val_bpb"))
    if not text.strip():
        folder.add("error", "no_readme", "README.md is empty" if names else "no README.md")
        return
    if value is not None and not any(f"{value:.{n}f}" in text for n in range(4, 9)):
        folder.add("warn", "readme_score", f"README does not give the val_bpb {value}")
    check_file_hashes(folder, text)
    tables = list(seed_rows(text))
    if logs and all(log.is_ours and log.results for log in logs):
        check_own_rows(folder, tables, logs)
        check_page(folder, text, logs, tables)
    else:
        check_rows(folder, tables, logs)


def check_file_hashes(folder: Folder, text: str) -> None:
    """A sha256 on the line of a file's name is that file's."""
    for name, sha in SHA_OF_FILE.findall(text):
        if name in folder.sizes and sha not in sha256_forms(folder.read(name)):
            text = f"README: the sha256 of {name} is {sha[:16]}, by the file another"
            folder.add("error", "readme_differs", text)


# The table of seeds


@dataclass(frozen=True)
class Row:
    """One row of a Markdown table whose first column is the seed: cells by their heading."""

    first: str
    cells: dict[str, str]


def seed_rows(text: str) -> Iterator[Row]:
    """Yield the rows of every Markdown table that begins with a column of seeds."""
    heads: list[str] = []
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            heads = []
            continue
        cells = [cell.strip().strip("*` ") for cell in line.strip().strip("|").split("|")]
        if not heads:
            heads = [cell.lower() for cell in cells]
        elif heads[0] == "seed" and not set("".join(cells)) <= set("-: "):
            yield Row(cells[0].lower(), dict(zip(heads, cells, strict=False)))


def plain_number(cell: str) -> Decimal | None:
    """A cell that is one number, with or without commas."""
    text = cell.replace(",", "")
    return Decimal(text) if re.fullmatch(r"-?\d{1,15}(\.\d{1,12})?", text) else None


def numbers_of_seeds(tables: list[Row], logs: list[Log]) -> Iterator[tuple[Log, str, Decimal]]:
    """Yield (log, heading, number) of every cell in a row of a seed that has one log."""
    for row in tables:
        own = [log for log in logs if str(log.seed) == row.first]
        for heading, cell in row.cells.items():
            value = plain_number(cell)
            if value is not None and len(own) == 1:
                yield own[0], heading, value


def check_rows(folder: Folder, tables: list[Row], logs: list[Log]) -> None:
    """Any author's scores of a seed stand in that seed's log; one line for all that do not."""
    strange = []
    for log, heading, value in numbers_of_seeds(tables, logs):
        if "bpb" in heading and -value.as_tuple().exponent >= 4 and not says_score(log, value):
            strange.append(f"seed {log.seed} has {heading} {value}, which {log.name} does not say")
    if strange:
        more = f"; and {len(strange) - 1} more" if len(strange) > 1 else ""
        folder.add("warn", "readme_seed", f"README: {strange[0]}{more}")


def check_own_rows(folder: Folder, tables: list[Row], logs: list[Log]) -> None:
    """The cells of the table that records/make.py writes."""
    for log, heading, value in numbers_of_seeds(tables, logs):
        check_own_cell(folder, log, heading, value)
    known = {str(log.seed) for log in logs}
    for row in tables:
        if row.first.isdigit() and row.first not in known:
            folder.add(
                "error", "readme_differs", f"README: a row of seed {row.first}, of which there is no log"
            )


def check_own_cell(folder: Folder, log: Log, heading: str, value: Decimal) -> None:
    """A cell of the table that records/make.py writes."""
    key = COLUMNS.get(heading, heading.replace(" ", "_") if heading.endswith(" val_bpb") else "")
    truth = truth_of(log, key, "roundtrip") if key else None
    if truth and not is_rounded(value, truth):
        text = f"README: seed {log.seed} has {heading} {value}, {log.name} says {truth.value}"
        folder.add("error", "readme_differs", text)


def is_rounded(value: Decimal, truth: Truth) -> bool:
    """Whether the value is the truth, rounded to the value's decimals."""
    half = Decimal(10) ** value.as_tuple().exponent / 2
    return abs(value - truth.value) <= half + truth.tolerance + Decimal("1e-9")


def says_score(log: Log, value: Decimal) -> bool:
    """Whether any line of the log gives this bpb, rounded or not."""
    scores = [score.bpb for score in log.finals + log.others]
    scores += [line.score[1] for line in log.steps if line.score]
    half = Decimal(10) ** value.as_tuple().exponent / 2
    return any(abs(value - score) <= half * 2 for score in scores)


# The page of records/make.py


def check_page(folder: Folder, text: str, logs: list[Log], tables: list[Row]) -> None:
    """The lines of the page that still have its form."""

    def differs(what: str, said: object, truth: object) -> None:
        folder.add("error", "readme_differs", f"README: {what} is {said}, by the logs {truth}")

    check_headline(text, logs, differs)
    check_spread_rows(tables, logs, differs)
    check_t_test(text, logs, differs)
    if len(logs) == 1:
        check_single_lines(text, logs[0], differs)
    check_volume(text, logs, differs)
    check_text_line(text, logs[0], differs)
    found = re.search(r"^- Config hash: `([0-9a-f]+)`", text, re.M)
    if found and "config_hash" in logs[0].said and found[1] != logs[0].said["config_hash"][0].value:
        differs("the config hash", found[1], logs[0].said["config_hash"][0].value)
    check_configuration(text, logs[0], differs)
    check_machine(text, logs, differs)
    check_command(text, logs[0], differs)
    check_changes(text, logs[0], differs)


def scores_of(logs: list[Log], name: str, key: str) -> list[float]:
    """A score of every log; shorter where one has none."""
    truths = [truth_of(log, f"{name}_val_{key}", name) for log in logs]
    return [float(truth.value) for truth in truths if truth]


def check_headline(text: str, logs: list[Log], differs) -> None:
    """val_bpb **X** (score, mean of N seeds, its spread)."""
    found = HEADLINE.search(text)
    if not found:
        return
    scores = scores_of(logs, found[2], "bpb")
    if len(scores) < len(logs):
        differs("the score", found[2], "without such a line")
        return
    if abs(float(found[1]) - mean(scores)) > 1.1e-8:
        differs("val_bpb", found[1], f"{mean(scores):.8f}")
    if int(found[3] or 1) != len(logs):
        differs("the number of seeds", found[3] or 1, len(logs))
    if found[4] and len(scores) > 1 and abs(float(found[4]) - stdev(scores)) > 1.1e-8:
        differs("the standard deviation", found[4], f"{stdev(scores):.8f}")


def check_spread_rows(tables: list[Row], logs: list[Log], differs) -> None:
    """The rows of means and standard deviations below the seeds'."""
    functions = {"mean": mean, "sample std": stdev}
    for row in tables:
        for heading, cell in row.cells.items():
            value = plain_number(cell)
            if row.first not in functions or value is None or not heading.endswith(" val_bpb"):
                continue
            scores = scores_of(logs, heading.removesuffix(" val_bpb"), "bpb")
            if len(scores) == len(logs) > 1:
                truth = functions[row.first](scores)
                if abs(float(value) - truth) > 1.1e-8:
                    differs(f"the {row.first} of {heading}", value, f"{truth:.8f}")


def check_t_test(text: str, logs: list[Log], differs) -> None:
    """The sentence with the bar: the distance, both t and both p."""
    found = T_TEST.search(text)
    if not found:
        return
    bpb = scores_of(logs, found[1], "bpb")
    loss = scores_of(logs, found[1], "loss")
    if len(bpb) < len(logs) or len(loss) < len(logs) or len(logs) < 2 or not stdev(bpb):
        differs("a t-test", "there", "without seeds that differ")
        return
    bar = float(found[4])
    gap = mean(bpb) - bar
    nats_a_bit = mean(loss) / mean(bpb)
    error = stdev(bpb) / math.sqrt(len(bpb))
    df = len(bpb) - 1
    expected = {"the distance from the bar": (found[2], gap), "its nats": (found[3], gap * nats_a_bit)}
    for what, gain, t, p in (
        ("that it is lower", 0.0, found[6], found[7]),
        ("that it is lower by a gain", float(found[8]) / nats_a_bit, found[10], found[11]),
    ):
        true_t = (gap + gain) / error
        expected[f"t of the test {what}"] = (t, true_t)
        expected[f"p of the test {what}"] = (p, t_tail(-true_t, df))
    for what, (said, truth) in expected.items():
        decimals = len(said.partition(".")[2])
        if abs(float(said) - truth) > 0.51 * 10.0**-decimals + 2e-6 * abs(truth):
            differs(what, said, f"{truth:.{decimals}f}")
    if (int(found[5]), int(found[9])) != (df, df):
        differs("the degrees of freedom", f"{found[5]} and {found[9]}", df)


def check_single_lines(text: str, log: Log, differs) -> None:
    """The bullets of a page of one run."""
    for what, key in SINGLE_LINES.items():
        found = re.search(rf"^- {what}: ([\d,]+) bytes$", text, re.M)
        truth = truth_of(log, key, "roundtrip")
        if found and truth and plain_number(found[1]) != truth.value:
            differs(what, found[1], truth.value)
    scores = {score.name for score in log.finals if score.label.startswith("final_")}
    for line in re.findall(r"^- (.*), from the packed file: val_loss:(\S+) val_bpb:(\S+)$", text, re.M):
        title = line[0].lower()
        name = {"test-time training": "ttt", "hedge mixer": "hedge"}.get(title, title)
        for said, key in zip(line[1:], ("loss", "bpb"), strict=True):
            truth = truth_of(log, f"{name}_val_{key}", name)
            if scores and (truth is None or abs(Decimal(said) - truth.value) > truth.tolerance):
                differs(f"{name}'s val_{key}", said, truth.value if truth else "not made")
    for pattern, key in (
        (r"^- Before packing: val_bpb:(\d+\.\d+)$", "pre_quant_val_bpb"),
        (r"^- Train time: (\d+\.\d+) s", "wallclock_seconds"),
        (r"^- Train time: .*; evaluation: (\d+\.\d+) s$", "eval_seconds"),
        (r"^- Training stopped at step ([\d,]+) of ", "step_stop"),
    ):
        found = re.search(pattern, text, re.M)
        truth = truth_of(log, key, "roundtrip")
        value = plain_number(found[1]) if found else None
        if value is not None and truth and not is_rounded(value, truth):
            differs(key, found[1], truth.value)
    found = re.search(r"^- Parameters: ([\d,]+)$", text, re.M)
    said = log.said.get("model_params")
    if found and said and plain_number(found[1]) != said[0].value:
        differs("the number of parameters", found[1], said[0].value)


def check_volume(text: str, logs: list[Log], differs) -> None:
    """Tokens and steps of each run, and the batch."""
    pattern = r"^- Total tokens trained: ([\d,]+) in ([\d,]+) steps(?:, seed (\d+))?$"
    for tokens, steps, seed in re.findall(pattern, text, re.M):
        for log in logs:
            if seed and str(log.seed) != seed:
                continue
            truth = tuple(number(log.result.get(key)) for key in ("tokens", "steps"))
            if None not in truth and (plain_number(tokens), plain_number(steps)) != truth:
                differs(f"the volume of {log.name}", f"{tokens} in {steps}", f"{truth[0]} in {truth[1]}")
    found = re.search(r"^- Global batch: ([\d,]+) tokens$", text, re.M)
    batch = logs[0].said.get("setting train_batch_tokens")
    if found and batch and as_setting(found[1].replace(",", "")) != batch[0].value:
        differs("the global batch", found[1], batch[0].value)


def check_text_line(text: str, log: Log, differs) -> None:
    """Tokens, bytes and sha256 of the validation text."""
    found = SHA_OF_TEXT.search(text)
    if not found:
        return
    sha = log.said.get("val_sha256")
    pairs = [(found[1], log.targets), (found[2], log.text_bytes), (found[3], sha[0].value if sha else None)]
    for said, truth in pairs:
        if truth is not None and said.replace(",", "") != str(truth):
            differs("the validation text", said, truth)


def check_configuration(text: str, log: Log, differs) -> None:
    """Packing, limit and learning rates of the list of settings."""
    found = re.search(r"^- Packing: (\S+), (\S+)$", text, re.M)
    packing = log.said.get("packing")
    if found and packing and f"{found[1]}+{found[2]}" != packing[0].value:
        differs("the packing", f"{found[1]}+{found[2]}", packing[0].value)
    found = re.search(r"^- Limit: ([\d,]+) steps or (\d+(?:\.\d+)?) s ", text, re.M)
    for index, name in enumerate(("iterations", "max_wallclock_seconds"), 1):
        setting = log.said.get(f"setting {name}")
        if found and setting and as_setting(found[index].replace(",", "")) != setting[0].value:
            differs(f"the limit of {name}", found[index], setting[0].value)
    rates = re.search(r"^- Learning rates: (.*)$", text, re.M)
    for name, value in re.findall(r"([A-Z_]+)=(\S+)", rates[1] if rates else ""):
        if name in log.overrides and as_setting(value) != as_setting(log.overrides[name]):
            differs(name, value, log.overrides[name])


def check_machine(text: str, logs: list[Log], differs) -> None:
    """Cards, versions and compute type of the hardware note."""
    found = re.search(
        r"^## Hardware note\n+(.*); python (\S+), torch (\S+); compute type (\S+)\.$", text, re.M
    )
    if not found:
        return
    machines = {f"{log.result.get('world_size')}x {log.result.get('device')}" for log in logs}
    if {*found[1].split("; ")} != machines:
        differs("the hardware", found[1], "; ".join(sorted(machines)))
    for said, key in zip(found.groups()[1:], ("python", "torch", "dtype"), strict=True):
        known = {str(log.result.get(key)) for log in logs}
        if said not in known:
            differs(key, said, min(known))


def check_command(text: str, log: Log, differs) -> None:
    """The settings of the command are those of the run."""
    found = re.search(r"^## Command\n+```bash\n(.*?)^```", text, re.M | re.S)
    if not found:
        return
    try:
        words = shlex.split(found[1].replace("\\\n", " "), comments=True)
    except ValueError:
        return
    given = dict(word.split("=", 1) for word in words if ASSIGNMENT.match(word))
    for name, value in given.items():
        if name in OF_THE_COMMAND:
            continue
        truth = setting_text(log.overrides.get(name))
        if name not in log.overrides:
            differs(f"{name} of the command", value, "not set")
        elif as_setting(value) != truth and value.rpartition("/")[2] != truth.rpartition("/")[2]:
            differs(f"{name} of the command", value, truth)


def check_changes(text: str, log: Log, differs) -> None:
    """The list of changed knobs is of the run."""
    for name, value in re.findall(r"^- `([A-Z][A-Z0-9_]*)=([^`\n]*)` \(", text, re.M):
        truth = setting_text(log.overrides.get(name))
        if name not in log.overrides:
            differs(f"{name} of the changes", value, "not set")
        elif as_setting(value.strip("'")) != truth and value.rpartition("/")[2] != truth.rpartition("/")[2]:
            differs(f"{name} of the changes", value, truth)


def setting_text(value: object) -> str:
    """A knob's value as the environment spells it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(as_setting(entry) for entry in value)
    return as_setting(value)
