"""Progressive against fixed depth under one clock, paired by seed, and what each switch of depth costs.

    python sweeps/depth.py run --out runs/depth [KNOB=VALUE ...]
    python sweeps/depth.py table --out runs/depth [--json FILE]

The arms are the preset progressive_depth with and without PROG_DEPTH, by turns; a clocked run wants a quiet
machine. A finished run is kept.
A switch costs its first step less the median of the ten steps after it.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from sweeps.ideas import SEEDS, result_of  # noqa: E402

ARMS = dict(progressive=[], fixed=["PROG_DEPTH="])
KNOBS = ["MAX_WALLCLOCK_SECONDS=150", "TRAIN_LOG_EVERY=1", "EVAL_STRIDE=0", "SWA_ENABLED=1", "SWA_EVERY=2"]


def run(out: Path, knobs: list[str]) -> None:
    for seed in SEEDS:
        for arm, own in ARMS.items():
            folder = out / f"{arm}-{seed}"
            if result_of(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)  # of a run that did not finish
                folder.mkdir(parents=True)
                place = [f"SEED={seed}", f"OUT_DIR={folder / 'run'}", "RUN_ID=run"]
                command = [
                    "bash",
                    str(ROOT / "run_best.sh"),
                    "progressive_depth",
                    *KNOBS,
                    *knobs,
                    *own,
                    *place,
                ]
                with (folder / "stdout.txt").open("w") as log:
                    subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
            result = result_of(folder) or dict(val_bpb=float("nan"), steps=0)
            print(f"{arm} seed {seed}: {result['val_bpb']:.4f} in {result['steps']} steps", flush=True)


def switches(folder: Path) -> list[dict]:
    """Of each change of depth: its step, layers, milliseconds of the first step and of the ten after it."""
    events = [json.loads(line) for line in (folder / "run/logs/run.jsonl").read_text().splitlines()]
    clock = {event["step"]: event["train_ms"] for event in events if event["event"] == "step"}
    found = []
    for event in (event for event in events if event["event"] == "phase"):
        first = event["step"] + 1  # the event counts completed steps
        steps = [clock[n] - clock[n - 1] for n in range(first, first + 11) if n in clock and n - 1 in clock]
        after = median(steps[1:])
        found.append(dict(step=event["step"], layers=event["depth"], first_ms=steps[0], later_ms=after))
    return found


def portable(result: dict) -> dict:
    """A RESULT without the places of this machine."""
    knobs = {name: value for name, value in result["overrides"].items() if name != "OUT_DIR"}
    return {key: value for key, value in result.items() if key != "path"} | dict(overrides=knobs)


def collect(out: Path) -> dict:
    """Every run with its switches, and the differences progressive - fixed."""
    runs = [
        dict(portable(result), arm=arm, switches=switches(out / f"{arm}-{seed}"))
        for arm in ARMS
        for seed in SEEDS
        if (result := result_of(out / f"{arm}-{seed}"))
    ]
    bpb = {(run["arm"], run["seed"]): run["val_bpb"] for run in runs}
    return dict(runs=runs, paired=[bpb["progressive", s] - bpb["fixed", s] for s in SEEDS])


def table(out: Path, path: Path | None) -> None:
    found = collect(out)
    print("| depth | seed | steps | bpb live | bpb averaged | bpb packed |\n|---|--:|--:|--:|--:|--:|")
    for one in found["runs"]:
        bits = " | ".join(f"{one[key]:.4f}" for key in ("live_val_bpb", "prequant_val_bpb", "val_bpb"))
        print(f"| {one['arm']} | {one['seed']} | {one['steps']} | {bits} |")
    deltas = found["paired"]
    print(f"\nprogressive - fixed: mean {mean(deltas):+.4f}, sd {stdev(deltas):.4f}, n {len(deltas)}\n")
    print("| seed | switch to | at step | first step | the ten after | extra |\n|--:|--:|--:|--:|--:|--:|")
    for one in found["runs"]:
        for turn in one["switches"]:
            first, later = turn["first_ms"], turn["later_ms"]
            where = f"| {one['seed']} | {turn['layers']} layers | {turn['step']} |"
            print(f"{where} {first:.0f} ms | {later:.0f} ms | {first - later:+.0f} ms |")
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("knobs", nargs="*", metavar="KNOB=VALUE", help="with `run`: for both arms")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="with `table`: also write everything here")
    options = parser.parse_args()
    if options.action == "run":
        run(options.out.resolve(), options.knobs)
    else:
        table(options.out, options.json)


if __name__ == "__main__":
    sys.exit(main())
