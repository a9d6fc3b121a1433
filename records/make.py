"""A record folder from one or several finished runs of train_gpt.py (several seeds of one experiment).

    python records/make.py RUN_ID [RUN_ID ...] --name NAME --author AUTHOR --github-id ID --track TRACK

The folder holds the script that ran, as the log's head has it, the logs, submission.json and README.md; of a
packed script (records/pack_script.py) the source to read as well. Every number comes from the runs' own logs.
Whatever does not fit is refused: one line, exit code 2, no folder.
"""

import argparse
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.user_error import run_tool  # noqa: E402
from records.finished import (  # noqa: E402
    CLAIMS,
    Finished,
    Parser,
    Refused,
    check_together,
    find_run,
    guarded,
    read_run,
    require,
)
from records.page import Bar, Page, knobs_of  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ARTIFACT = "final_model.int8.ptz"
READABLE = "train_gpt_readable.py"
SCORES = "roundtrip", "sliding", "isolated", "ttt", "hedge"


def import_script(source: bytes, path: Path) -> ModuleType:
    """The shipped script as a module, for its own knobs, their defaults, and its reader of artifacts."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "train_gpt.py"
        copy.write_bytes(source)
        spec = importlib.util.spec_from_file_location("shipped_train_gpt", copy)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            return module
        except Exception as error:
            raise Refused(f"the script in {path} does not import here ({error}); install its needs") from None
        finally:
            del sys.modules[spec.name]


def readable_source(run: Finished, given: Path | None) -> bytes | None:
    """What the run's packed script was packed from, found by its sha256; None if it was not packed."""
    sha = run.last("config").get("readable_sha256")
    if sha is None:
        require(given is None, f"--readable: the script of {run.run_id} was not packed; leave it out")
        return None
    places = [given] if given else [run.out_dir / READABLE, Path("packed") / READABLE, ROOT / "train_gpt.py"]
    for path in places:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha:
            return path.read_bytes()
    where = ", ".join(map(str, places))
    mend = f"name the {READABLE} that was packed with --readable"
    raise Refused(
        f"the source with sha256 {sha[:12]} that {run.run_id} was packed from is not {where}; {mend}"
    )


def tested(bar: float, runs: list[Finished], kind: str) -> Bar:
    """How sure it is that the seeds' mean is below the bar, and below it by what a record must gain."""
    try:
        from records.significance import GAIN, against_bar
    except ImportError:
        raise Refused("--bar needs scipy; pip install -r requirements-lab.txt") from None
    loss, bpb = ([run.result[f"{kind}_{key}"] for run in runs] for key in CLAIMS)
    require(len(set(bpb)) > 1, "--bar: all seeds have one score, so there is no spread to test")
    gain = GAIN * statistics.mean(bpb) / statistics.mean(loss)  # in bpb
    return Bar(bar, GAIN, against_bar(bpb, bar), against_bar(bpb, bar, gain))


def artifact_of(run: Finished, script: ModuleType) -> bytes:
    """The run's packed model, if it is that run's by size and by the config hash in its head."""
    path = run.out_dir / ARTIFACT
    require(path.is_file(), f"{path} is missing; put the packed model back, or leave out --artifact")
    blob = path.read_bytes()
    try:
        header = script.unpack(blob, str(path))[1]
    except script.RunError as error:
        raise Refused(f"{error}; put back the file that {run.run_id} wrote") from None
    same = len(blob) == run.result["model_bytes"] and header.get("config_hash") == run.result["config_hash"]
    require(same, f"{path} is not the model of {run.run_id}; put that back, or leave out --artifact")
    return blob


def prequant(run: Finished) -> dict[str, float]:
    """The weights before packing: their average where one was taken, else as trained."""
    score = run.last("average") or run.last("val")
    return {f"pre_quant_{key}": round(score[key], 8) for key in CLAIMS if key in score}


def numbers(run: Finished, kind: str) -> dict[str, object]:
    """What submission.json says of one run; `kind` is the score that counts."""
    result = run.result
    found = {key: result[f"{kind}_{key}"] for key in CLAIMS}
    found |= {f"{name}_{key}": result[f"{name}_{key}"] for name in run.scores for key in CLAIMS}
    found |= prequant(run)
    found |= dict(step_stop=result["steps"], wallclock_seconds=result["train_seconds"])
    found |= dict(eval_seconds=result["eval_seconds"], bytes_total=result["total_bytes"])
    found[f"bytes_model_{result['quant']}_{result['codec']}"] = result["model_bytes"]
    return found | dict(bytes_code=result["code_bytes"])


def together(rows: list[dict]) -> dict[str, object]:
    """Of several seeds: the mean of each score, its spread, and the largest of sizes, steps and seconds."""
    merged: dict[str, object] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        merged[key] = round(statistics.mean(values), 8) if key.endswith(CLAIMS) else max(values)
        if key == "val_bpb" and len(rows) > 1:
            merged["val_bpb_std"] = round(statistics.stdev(values), 8)
    return merged


def submission(runs: list[Finished], options: argparse.Namespace, blobs: dict[int, bytes]) -> dict:
    """submission.json: the official keys first, in their order, then what makes the claim checkable."""
    rows = {run.seed: numbers(run, options.score) for run in runs}
    first, ended = runs[0], max(run.last("end")["time"] for run in runs)
    date = datetime.fromtimestamp(ended, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    about = dict(author=options.author, github_id=options.github_id, name=options.name)
    about |= dict(blurb=options.blurb or default_blurb(runs, options), date=date, track=options.track)
    about |= together(list(rows.values())) | dict(score=options.score, seeds=list(rows))
    for seed, blob in blobs.items():
        rows[seed]["artifact_sha256"] = hashlib.sha256(blob).hexdigest()
    if len(runs) > 1:
        about["seed_results"] = {str(seed): row for seed, row in rows.items()}
    elif blobs:
        about["artifact_sha256"] = rows[first.seed]["artifact_sha256"]
    machine = [f"{run.result['world_size']}x {run.result['device']}" for run in runs]
    about |= dict(hardware="; ".join(dict.fromkeys(machine)), pytorch_version=first.result["torch"])
    about |= dict(code_sha256=first.code_sha256, config_hash=first.result["config_hash"])
    if sha := first.last("config").get("readable_sha256"):
        about["readable_sha256"] = sha
    resumed = sorted({step for run in runs for step in run.result.get("resumed", [])})
    return about | dict(val_sha256=first.result["val_sha256"], resumed=resumed)


def default_blurb(runs: list[Finished], options: argparse.Namespace) -> str:
    """One sentence of the runs' own facts."""
    bpb = statistics.mean(run.result[f"{options.score}_val_bpb"] for run in runs)
    seeds = f"the mean of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    steps = " and ".join(dict.fromkeys(f"{run.result['steps']:,}" for run in runs))
    return f"val_bpb {bpb:.4f} ({options.score}), {seeds}, after {steps} steps."


def contents(runs: list[Finished], options: argparse.Namespace) -> dict[str, bytes]:
    """Every file of the folder, by name."""
    runs = sorted(runs, key=lambda run: run.seed)
    first, several = runs[0], len(runs) > 1
    options.score = options.score or first.scores[-1]
    there = f"{first.run_id} has the scores {', '.join(first.scores)}"
    require(options.score in first.scores, f"no {options.score} score: {there}; choose one with --score")
    require(several or options.bar is None, "--bar needs several seeds; name more runs or leave it out")
    script = import_script(first.source, first.log.path)
    blobs = {run.seed: artifact_of(run, script) for run in runs} if options.artifact else {}
    claim, bar = submission(runs, options, blobs), None
    if options.bar is not None:
        bar = tested(options.bar, runs, options.score)
    files = {"train_gpt.py": first.source}
    readable = readable_source(first, options.readable)
    if readable is not None:
        files[READABLE] = readable
    for run in runs:
        files[f"train_seed{run.seed}.log" if several else "train.log"] = run.log.data
    for seed, blob in blobs.items():
        files[f"final_model_seed{seed}.int8.ptz" if several else ARTIFACT] = blob
    files["submission.json"] = (json.dumps(claim, indent=2, ensure_ascii=False) + "\n").encode()
    page = Page(runs, claim, knobs_of(script, first.config), bar, ["README.md", *files], options.blurb)
    return files | {"README.md": page.text().encode()}


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    """All files or nothing: a temporary folder beside, then one rename."""
    base = next(path for path in out.absolute().parents if path.is_dir())
    temporary = base / f".{out.name}.tmp-{os.getpid()}"
    try:
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def default_folder(runs: list[Finished], name: str) -> Path:
    """records/DATE_NAME beside this file."""
    day = datetime.fromtimestamp(max(run.last("end")["time"] for run in runs), timezone.utc)
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "record"
    return Path(__file__).resolve().parent / f"{day:%Y-%m-%d}_{slug}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_ids", nargs="+", metavar="RUN_ID", help="a finished run; several: its seeds")
    for option, what in (
        ("name", "title of the submission"),
        ("author", "your name"),
        ("github-id", "your account"),
        ("track", "e.g. 10min_16mb or non-record-unlimited-compute-16mb"),
    ):
        parser.add_argument(f"--{option}", required=True, help=what)
    parser.add_argument("--blurb", default="", help="one or two sentences; default: the score and the steps")
    parser.add_argument("--score", choices=SCORES, help="the one that is val_bpb; default: the log's last")
    parser.add_argument("--out", type=Path, help="folder to make; default records/DATE_NAME")
    parser.add_argument("--runs", nargs="+", type=Path, help="OUT_DIRs of the runs; default . and runs/*")
    parser.add_argument("--bar", type=float, help="bpb to be below: one-sided t-test of the seeds")
    parser.add_argument("--artifact", action="store_true", help="ship the packed models too")
    parser.add_argument(
        "--readable", type=Path, help="what a packed script was packed from; default: looked for"
    )
    options = parser.parse_args(arguments)
    require(options.bar is None or math.isfinite(options.bar), "--bar is not a number of bpb, such as 1.2244")
    for name in ("name", "author", "github_id", "track"):
        value = getattr(options, name)
        clear = value.strip() and "\n" not in value
        require(clear, f"--{name.replace('_', '-')} is empty or has a line break; give one line")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    folders = options.runs or [Path("."), *map(Path, sorted(glob.glob("runs/*")))]
    runs = [read_run(find_run(run_id, folders)) for run_id in options.run_ids]
    check_together(runs)
    out = options.out or default_folder(runs, options.name)
    require(not os.path.lexists(out), f"{out} is there already; move it away or choose another --out")
    files = contents(runs, options)
    write_folder(out, files)
    print(f"{out}: {', '.join(sorted(files))}")
    return 0


if __name__ == "__main__":
    run_tool(partial(guarded, main, None))
