"""Score a record's packed models again with its own script, and compare with what it claims.

    python records/rescore.py FOLDER --data DATASET_FOLDER --tokenizer MODEL [--artifact PATH [--seed N]]

The script runs alone, in a temporary folder and an environment of its own: the settings of the record's log,
your data, nothing else. Exit codes: 0 every score is equal, or within --tolerance bpb; 1 one differs; 2 bad
input.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import read_manifest, sha256_file  # noqa: E402
from data.user_error import UserError, run_tool  # noqa: E402
from records.finished import Log, Parser, guarded, read_log, require  # noqa: E402
from records.page import as_text  # noqa: E402

# What the script's process gets of ours: where programs, libraries, GPUs and scratch space are.
KEPT = ["PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CC", "CXX"]
# Settings of the run that scoring again must not have.
DROPPED = ["RUN_ID", "OUT_DIR", "EVAL_ONLY", "INIT_FROM", "RESUME", "CHECKPOINT_SECONDS"]
DROPPED += ["SCORE_DUMP", "SCORE_CHECK"]
EQUAL, WITHIN, DIFFERS = "equal", "within tolerance", "differs"
HEAD = "what", "submission.json", "log", "again", "difference", "verdict"


@dataclass(frozen=True)
class Row:
    """One number: as submission.json claims it, as the log has it, and as made again."""

    what: str
    claimed: float | None
    logged: float | None
    again: float
    tolerance: float

    @property
    def difference(self) -> float:
        others = [value for value in (self.claimed, self.logged) if value is not None]
        return max((self.again - value for value in others), key=abs, default=math.inf)

    @property
    def verdict(self) -> str:
        off = abs(self.difference)
        return EQUAL if round(off, 8) == 0 else WITHIN if off <= self.tolerance else DIFFERS

    @property
    def cells(self) -> list[str]:
        numbers = [self.claimed, self.logged, self.again]
        shown = ["-" if value is None else f"{value:.8f}" for value in numbers]
        return [self.what, *shown, f"{self.difference:+.8f}", self.verdict]


@dataclass(frozen=True)
class Record:
    """A record folder: its claim, its script, its logs by seed."""

    folder: Path
    claim: dict
    script: bytes
    logs: dict[int, Log]

    def of(self, seed: int) -> Mapping[str, object]:
        """The claims of one seed; those of a record of one seed stand at the top."""
        rows = self.claim.get("seed_results") or {str(seed): self.claim}
        require(isinstance(rows, dict), f"{self.where}: seed_results is no object; make the record anew")
        row = rows.get(str(seed))
        require(isinstance(row, dict), f"{self.where} claims nothing for seed {seed}; make the record anew")
        return row

    where = property(lambda self: self.folder / "submission.json")


def read_record(folder: Path) -> Record:
    """The folder's files, if they belong together."""
    require(folder.is_dir(), f"{folder} is no folder; name the record's")
    mend = "make the record with records/make.py"
    for name in ("submission.json", "train_gpt.py"):
        require((folder / name).is_file(), f"{folder / name} is missing; {mend}")
    try:
        claim = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'submission.json'} is not JSON ({error}); {mend}") from None
    require(isinstance(claim, dict), f"{folder / 'submission.json'} holds no object; {mend}")
    paths = sorted([*folder.glob("train.log"), *folder.glob("train_seed*.log")])
    require(paths, f"{folder} has neither train.log nor train_seed*.log; {mend}")
    logs, script = {}, (folder / "train_gpt.py").read_bytes()
    for path in paths:
        log = read_log(path)
        same = log.source == script
        require(same, f"{folder / 'train_gpt.py'} is not the script at the head of {path.name}; {mend}")
        logs[log.result["seed"]] = log
    return Record(folder, claim, script, logs)


def artifacts(record: Record, given: Path | None, seed: int | None) -> dict[int, Path]:
    """The packed model of each seed that has one."""
    seeds = list(record.logs)
    have = f"the record has {', '.join(map(str, seeds))}"
    require(seed is None or seed in seeds, f"--seed {seed} has no log in {record.folder}; {have}")
    chosen = seeds if seed is None else [seed]
    if given:
        require(given.is_file(), f"--artifact {given} is no file")
        require(len(chosen) == 1, f"--artifact of which seed? {have}; say it with --seed")
        return {chosen[0]: given}
    one = len(seeds) == 1
    names = {s: "final_model.int8.ptz" if one else f"final_model_seed{s}.int8.ptz" for s in chosen}
    found = {s: record.folder / name for s, name in names.items() if (record.folder / name).is_file()}
    missing = f"{record.folder} holds no {' or '.join(names.values())}"
    require(found, f"{missing}; make the record with --artifact, or name the file with --artifact")
    return found


def environment(log: Log, artifact: Path, options: argparse.Namespace, out: Path) -> dict[str, str]:
    """The run's own settings, our files, and little else. The thread count moves the last digits on a CPU."""
    env = {name: os.environ[name] for name in KEPT if name in os.environ}
    settings = {k: as_text(v) for k, v in log.result["overrides"].items() if k not in DROPPED}
    if threads := re.search(r", (\d+) threads$", log.result["device"]):
        env["OMP_NUM_THREADS"] = threads[1]
    own = dict(DATA_PATH=options.data.resolve(), TOKENIZER_PATH=options.tokenizer.resolve(), OUT_DIR=out)
    own |= dict(EVAL_ONLY=artifact.resolve(), RUN_ID="rescore", MAX_EVAL_SECONDS=0)
    return env | settings | {name: str(value) for name, value in own.items()}


def score_again(record: Record, seed: int, artifact: Path, options: argparse.Namespace) -> dict:
    """The RESULT of the record's script on the artifact; its refusal is ours."""
    log = record.logs[seed]
    with tempfile.TemporaryDirectory(prefix="rescore-") as name:
        folder = Path(name)
        (folder / "train_gpt.py").write_bytes(record.script)
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        command = [sys.executable, *(ranks if options.ranks > 1 else []), "train_gpt.py"]
        where = dict(cwd=folder, env=environment(log, artifact, options, folder / "out"))
        with (
            (folder / "stderr").open("w+") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, **where) as run,
        ):
            result = read_result(run, log, options.data)
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit code {run.wait()}"]
    said = next((line[7:] for line in lines if line.startswith("error: ")), lines[-1])
    require("val_bpb" in result, f"{artifact} cannot be scored by the record's script: {said}")
    return result


def read_result(run: subprocess.Popen, log: Log, data: Path) -> dict:
    """The RESULT a scoring process prints, {} if none; it is stopped where it names another text."""
    result = {}
    for line in run.stdout:
        text = re.match(r"val: .* sha256:(\w+)$", line)
        if text and text[1] != log.result["val_sha256"]:
            run.terminate()
            both = f"{text[1][:12]}, the record's has {log.result['val_sha256'][:12]}"
            raise UserError(
                f"the validation text in {data} has sha256 {both}; name the data it was made with"
            )
        if line.startswith("RESULT "):
            result = json.loads(line[7:])
    return result


def number(claim: Mapping[str, object], key: str, where: Path) -> float | None:
    """A claim, or None; refuse what is there and no number."""
    value = claim.get(key)
    good = value is None or isinstance(value, int | float) and not isinstance(value, bool)
    require(good and (value is None or math.isfinite(value)), f"{where}: {key}={value!r} is not a number")
    return value


def scores_in(numbers: Mapping[str, object]) -> list[str]:
    """Names of the scores of a packed model among a record's or RESULT's keys."""
    names = [key.removesuffix("_val_bpb") for key, value in numbers.items() if key.endswith("_val_bpb")]
    return [name for name in names if name not in ("live", "prequant", "pre_quant")]


def rows_of(record: Record, seed: int, again: dict, tolerance: float) -> Iterator[Row]:
    """Every score of the log or the claim. The tolerance is of bpb; a loss gets as much in proportion."""
    claim, result = record.of(seed), record.logs[seed].result
    scores = scores_in(again)
    gone = " and ".join(sorted({*scores_in(claim), *scores_in(result)} - {*scores}))
    both = f"{record.where} or {record.logs[seed].path.name}"
    require(not gone, f"{both} has a score {gone} that the run's settings do not make; make the record anew")
    main = record.claim.get("score", scores[-1])
    require(main in scores, f"{record.where}: score={main!r} is none of {', '.join(scores)}")
    for shown, name in [("", main), *((f"{name}_", name) for name in scores)]:
        for kind in ("val_bpb", "val_loss"):
            value = again[f"{name}_{kind}"]
            scale = tolerance * value / again[f"{name}_val_bpb"]
            told = number(claim, f"{shown}{kind}", record.where)
            require(told is not None or shown, f"{record.where} has no {kind}; make the record anew")
            yield Row(f"{shown}{kind}", told, result.get(f"{name}_{kind}"), value, scale)


def means_of(record: Record, rows: dict[int, list[Row]]) -> Iterator[Row]:
    """The claimed means of several seeds, where all were scored again."""
    if len(record.logs) == len(rows) > 1:
        for seeds in zip(*rows.values(), strict=True):
            told = number(record.claim, seeds[0].what, record.where)
            logged, again = ([getattr(row, key) for row in seeds] for key in ("logged", "again"))
            mean = None if None in logged else round(statistics.mean(logged), 8)
            yield Row(seeds[0].what, told, mean, round(statistics.mean(again), 8), seeds[0].tolerance)


def show(title: str, rows: list[Row]) -> None:
    cells = [HEAD, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(title)
    for line in cells:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def check_file(record: Record, seed: int, artifact: Path) -> list[str]:
    """How the packed model differs from the one the claim was made with."""
    blob, claim, result = artifact.read_bytes(), record.of(seed), record.logs[seed].result
    sha, told, found = hashlib.sha256(blob).hexdigest(), claim.get("artifact_sha256"), []
    if len(blob) != result["model_bytes"]:
        found.append(f"{artifact} has {len(blob)} bytes, the log says {result['model_bytes']}")
    if told and told != sha:
        found.append(f"{artifact} has sha256 {sha[:12]}, submission.json says {told[:12]}")
    return found


def check_tokenizer(data: Path, tokenizer: Path) -> None:
    """Refuse a tokenizer that the manifest beside the data, where there is one, does not name.

    Scripts of older records do not look: they would print another bpb for the same text.
    """
    made_with = (read_manifest(data / "manifest.json") or {}).get("tokenizer")
    expected = made_with.get("sha256") if isinstance(made_with, dict) else None
    sha = sha256_file(tokenizer)
    require(
        not isinstance(expected, str) or sha == expected,
        f"--tokenizer {tokenizer} did not make {data}: its sha256 is {sha[:16]}, the manifest says "
        f"{str(expected)[:16]}",
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a record folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with its *_val_*.bin")
    parser.add_argument("--tokenizer", type=Path, required=True, help="its SentencePiece model")
    parser.add_argument("--artifact", type=Path, help="the packed model, if the folder has none")
    parser.add_argument("--seed", type=int, help="only this seed of a record of several")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="bpb that still count as the same")
    parser.add_argument("--ranks", type=int, default=1, help="processes, one a GPU; 1 is always right")
    options = parser.parse_args(arguments)
    require(0 <= options.tolerance < math.inf, "--tolerance is not a number of bpb, such as 1e-4")
    require(options.ranks >= 1, "--ranks is not at least 1")
    require(options.data.is_dir(), f"--data {options.data} is no folder; name the one with *_val_*.bin")
    require(options.tokenizer.is_file(), f"--tokenizer {options.tokenizer} is no file")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    check_tokenizer(options.data, options.tokenizer)
    record = read_record(options.folder)
    rows: dict[int, list[Row]] = {}
    changed: list[str] = []
    for seed, artifact in artifacts(record, options.artifact, options.seed).items():
        changed += check_file(record, seed, artifact)
        again = score_again(record, seed, artifact, options)
        rows[seed] = list(rows_of(record, seed, again, options.tolerance))
        show(f"seed {seed}: {artifact}", rows[seed])
    means = list(means_of(record, rows))
    if means:
        show(f"mean of {len(rows)} seeds", means)
    for seed in record.logs.keys() - rows.keys():
        print(f"seed {seed} was not scored again")
    for line in changed:
        print(f"changed: {line}")
    verdicts = {row.verdict for row in [*sum(rows.values(), []), *means]} | {DIFFERS for _ in changed}
    worst = next(verdict for verdict in (DIFFERS, WITHIN, EQUAL) if verdict in verdicts)
    print(f"verdict: {worst} (tolerance {options.tolerance:g} bpb)")
    return int(worst == DIFFERS)


if __name__ == "__main__":
    run_tool(partial(guarded, main, None))
