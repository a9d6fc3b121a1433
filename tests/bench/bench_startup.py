"""Where the time of many short runs goes that is not training, and whether runs of one shape compile again.

    python tests/bench/bench_startup.py baseline --runs 20 --jobs 2
    python tests/bench/bench_startup.py baseline COMPILE=1 --runs 20 --jobs 2 --out startup.json
    python tests/bench/bench_startup.py baseline --runs 7 --fork      as a wave with --fork starts them
    python tests/bench/bench_startup.py --profile                     seconds of the imports, one by one

Whole processes at the sizes of a proxy wave (bash sweeps/WAVE.sh --proxy): its preset, its part of the
validation text, a CPU thread each, seeds 1, 2, ... The first run is alone and finds an empty compile cache;
the others share what it left. The stages are read from the events of each run's log.
Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from sweeps.lab.forked_runs import Nursery  # noqa: E402

STAGES = (
    "imports",
    "inputs",
    "warm_up",
    "training",
    "pauses",
    "last_validation",
    "packing",
    "scoring",
    "exit",
)
SCORES = "pauses", "last_validation", "scoring"  # evaluation, a checkpoint or two; the rest is overhead
IMPORTS = dict(
    python="pass",
    numpy="import numpy",
    torch="import torch",
    sentencepiece="import sentencepiece",
    all_of_ours="import train_gpt",
    dynamo="import torch; import torch._dynamo",
    inductor="import torch; import torch._inductor.compile_fx",
)


def child(script: str, notes: str) -> None:
    """The program, as ever; it notes when its imports were done and, at its end, what was compiled."""
    import numpy  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch  # noqa: F401

    imported = time.time()

    def note() -> None:
        from tests.bench.bench_throughput import compiler_counts

        counts = {name: count for name, count in compiler_counts().items() if count}
        about = dict(imported=imported, ended=ended or time.time(), cpu_seconds=cpu_seconds, counts=counts)
        Path(notes).write_text(json.dumps(about))

    ended = cpu_seconds = 0.0
    atexit.register(note)
    sys.argv = [script]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        ended = time.time()  # before `note` imports what only it needs
        cpu_seconds = round(time.process_time(), 2)  # of this process: a fork's clock begins at 0


def last(events: Iterable[dict], kind: str) -> dict:
    return [event for event in events if event["event"] == kind][-1]


def stages_of(events: list[dict], began: float, imported: float, ended: float) -> dict[str, float]:
    """Seconds of each stage of a run, from its start to its end; they follow each other without a gap. The
    validation before the first step leaves no sign of its start: it is taken to last as long as the last.
    VAL_LOSS_EVERY=-1 has none; the last step is then one that the log has."""
    steps = [event for event in events if event["event"] == "step"]
    validations = [event for event in events if event["event"] == "val"]
    artifact = last(events, "artifact")
    trained = (validations or steps)[-1]["train_ms"] / 1000
    stopped = steps[-1]["time"] + trained - steps[-1]["train_ms"] / 1000
    validated = validations[-1]["time"] if validations else stopped
    early = any(event["step"] == 0 for event in validations)
    timed = steps[0]["time"] - steps[0]["train_ms"] / 1000 - early * (validated - stopped)
    ends = dict(
        imports=imported,
        inputs=last(events, "config")["time"],
        warm_up=timed,
        training=timed + trained,
        pauses=stopped,  # as if all validations and checkpoints came after the training
        last_validation=validated,
        packing=artifact["time"],
        scoring=last(events, "score")["time"],
        exit=ended,
    )
    borders = [began, *ends.values()]
    return {name: borders[n + 1] - borders[n] for n, name in enumerate(ends)}


def run_to_its_end(command: tuple[str, ...], env: dict[str, str], out: Path, nursery: Nursery | None) -> int:
    """The exit code of a process, or of the nursery's fork; it writes to out/stdout and out/stderr."""
    with (out / "stdout").open("wb") as stdout, (out / "stderr").open("wb") as stderr:
        if not nursery:
            return subprocess.run(command, env=env, stdout=stdout, stderr=stderr).returncode
        descriptors = [file.fileno() for file in (stdout, stderr)]
        run = nursery.start(command, env, (*descriptors, descriptors[0]))  # here the lock is any open file
    while run.poll() is None:
        time.sleep(0.02)
    return run.returncode


def one_run(
    script: Path, knobs: dict[str, str], folder: Path, seed: int, nursery: Nursery | None
) -> dict[str, object]:
    """Start a run, wait for its end, read its stages."""
    out, notes = folder / f"run{seed}", folder / f"run{seed}.json"
    env = dict(os.environ, OMP_NUM_THREADS="1", TORCHINDUCTOR_CACHE_DIR=str(folder / "cache")) | knobs
    env |= dict(SEED=str(seed), RUN_ID="r", OUT_DIR=str(out))
    out.mkdir()
    program = folder / f"run{seed}.py"
    place = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    program.write_text(
        f"{place}\nfrom tests.bench.bench_startup import child\nchild({str(script)!r}, {str(notes)!r})\n"
    )
    began = time.time()
    code = run_to_its_end((sys.executable, str(program)), env, out, nursery)
    if code:
        raise SystemExit(f"error: a run ended with {code}: {(out / 'stderr').read_text().strip()[-300:]}")
    events = [json.loads(line) for line in (out / "logs/r.jsonl").read_text().splitlines()]
    found = json.loads(notes.read_text())
    stages = stages_of(events, began, found["imported"], found["ended"])
    rounded = {name: round(seconds, 3) for name, seconds in stages.items()}
    return dict(
        seed=seed,
        stages=rounded,
        cpu_seconds=found["cpu_seconds"],
        counts=found["counts"],
        compile=last(events, "env")["compile"],
    )


def shares(rows: list[dict]) -> dict[str, float]:
    """Of the time of these runs: outside training, in evaluation, and what is neither."""
    total = {name: sum(row["stages"][name] for row in rows) for name in STAGES}
    whole, scores = sum(total.values()), sum(total[name] for name in SCORES)
    outside = whole - total["training"]
    found = dict(outside_training=outside, evaluation=scores, overhead=outside - scores)
    return {name: round(seconds / whole, 4) for name, seconds in found.items()}


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The JSON report: the first run alone, the others as many at once as a wave would have."""
    import train_gpt
    from sweeps.lab.validation_halves import HALF_TOKENS, SELECTION, cut
    from sweeps.lab.wave_spec import Sizes, preset_env
    from tests.bench.bench_throughput import commit

    data = Path(os.environ.get("DATA_PATH", ROOT / "data/datasets/pydocs_sp1024"))
    tokenizer = os.environ.get("TOKENIZER_PATH", str(ROOT / "data/tokenizers/pydocs_1024_bpe.model"))
    own = preset_env(options.preset, Sizes(True, True)) | dict(pair.split("=", 1) for pair in options.knobs)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        selection = cut(data, folder, HALF_TOKENS) / SELECTION
        knobs = own | dict(DATA_PATH=str(selection), TOKENIZER_PATH=tokenizer)
        nursery = Nursery(threads=1) if options.fork else None
        began = time.perf_counter()
        rows = [one_run(options.script, knobs, folder, 1, nursery)]
        with ThreadPoolExecutor(options.jobs) as pool:
            later = range(2, options.runs + 1)
            rows += pool.map(lambda seed: one_run(options.script, knobs, folder, seed, nursery), later)
        seconds = time.perf_counter() - began
        if nursery:
            nursery.close()
    later = rows[1:] or rows
    about = train_gpt.describe_machine(train_gpt.Runtime())
    machine = {name: about[name] for name in ("device", "python", "torch", "numpy")}
    return dict(
        benchmark="startup", preset=options.preset, knobs=own, commit=commit(), **machine,
        forked=options.fork, script=options.script.name, runs=options.runs, jobs=options.jobs,
        compile=rows[0]["compile"],
        wall_seconds=round(seconds, 1), shares=shares(rows), shares_of_later_runs=shares(later),
        first={name: rows[0]["stages"][name] for name in STAGES},
        later={name: round(median(row["stages"][name] for row in later), 3) for name in STAGES},
        cache_misses_of_later_runs=sum(row["counts"].get("fxgraph_cache_miss", 0) for row in later),
        rows=rows,
    )  # fmt: skip


def profile(rounds: int) -> dict[str, object]:
    """Median seconds of a process that only imports."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            times[name].append(time.perf_counter() - began)
    seconds = {name: round(median(values), 3) for name, values in times.items()}
    return dict(benchmark="imports", python=sys.version.split()[0], rounds=rounds, seconds=seconds, all=times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("preset", nargs="?", default="baseline")
    add("knobs", nargs="*", metavar="KNOB=VALUE")
    add("--runs", type=int, default=20)
    add("--jobs", type=int, default=2, help="runs at once (default 2)")
    add("--fork", action="store_true", help="runs are forks of a process that has their imports")
    add("--script", type=Path, default=ROOT / "train_gpt.py", help="another copy of ours, to compare")
    add("--profile", action="store_true", help="time the imports instead")
    add("--out", type=Path, help="write the JSON here too")
    options = parser.parse_intermixed_args()
    text = json.dumps(profile(5) if options.profile else measure(options), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
