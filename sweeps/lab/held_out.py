"""Finished runs of a wave on the half of the validation text that no choice has seen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from data.user_error import UserError
from sweeps.lab.paths import ROOT
from sweeps.lab.run_rows import Results, Row, last_error, read_result
from sweeps.lab.run_state import RunState
from sweeps.lab.validation_halves import HELD_OUT, SELECTION
from sweeps.lab.wave_plan import Run
from sweeps.lab.wave_spec import CONTROL, KNOBS

MODEL = "final_model.int8.ptz"  # the packed model that a run leaves in its folder


def score_run(row: Row) -> float:
    """Bits per byte of a run's packed model on the held-out half; UserError where there is none."""
    out_dir = (ROOT / row["out_dir"]).resolve()
    started_with = json.loads((out_dir / "run.json").read_text())
    selection = Path(started_with["env"]["DATA_PATH"])
    if selection.name != SELECTION:
        raise UserError(f"{row['run_id']} was selected on all of the text; --val-tokens holds a part out")
    score_dir = out_dir / "held_out"
    score_id = f"{row['run_id']}.held_out"
    shutil.rmtree(score_dir, ignore_errors=True)
    score_dir.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in KNOBS}
    env |= started_with["env"]
    env["EVAL_ONLY"] = str(out_dir / MODEL)
    env["DATA_PATH"] = str(selection.with_name(HELD_OUT))
    env["OUT_DIR"] = str(score_dir)
    env["RUN_ID"] = score_id
    env["RESUME"] = "0"
    with (score_dir / "stdout.txt").open("wb") as stdout, (score_dir / "stderr.txt").open("wb") as stderr:
        finished = subprocess.run(started_with["command"], env=env, stdout=stdout, stderr=stderr)
    result = read_result(score_dir, score_id)
    if finished.returncode or result.get("val_bpb") is None:
        raise UserError(
            f"{row['run_id']}: no held-out score, exit code {finished.returncode}: {last_error(score_dir)}"
        )
    return result["val_bpb"]


def score_rows(chosen: list[Row], results: dict[str, Results], jobs: int) -> None:
    """Score these runs, `jobs` at once, and write the scores into their rows; what has one is left alone."""
    fresh = [row for row in chosen if row["held_out_val_bpb"] is None]
    with ThreadPoolExecutor(jobs) as pool:
        for row, bpb in zip(fresh, pool.map(score_run, fresh), strict=True):
            results[row["wave"]].append(row | {"held_out_val_bpb": bpb})
            print(f"held out     {row['run_id']}  bpb {bpb:.4f} (selection {row['val_bpb']:.4f})", flush=True)
    for wave_results in results.values():
        wave_results.compact()


def best_arms(rows: dict[tuple[str, int], Row], seeds: tuple[int, ...], count: int) -> list[str]:
    """The arms with the lowest mean difference to the control of the same seed, the best first.

    rows: by arm and seed. Only arms of which every seed is valid can be chosen. Whether they are better than
    the control is not said here, but by verdicts.py.
    """
    means = {}
    for arm in dict.fromkeys(arm for arm, _ in rows):
        pairs = [(rows[arm, seed], rows[CONTROL, seed]) for seed in seeds]
        if arm != CONTROL and all(is_valid(row) and is_valid(control) for row, control in pairs):
            means[arm] = mean(row["val_bpb"] - control["val_bpb"] for row, control in pairs)
    return sorted(means, key=means.get)[:count]


def is_valid(row: Row) -> bool:
    return row["state"] == RunState.OK


def finalists(rows: dict[str, Row], runs: list[Run], count: int) -> list[Row]:
    """The rows of each wave's control and of its `count` best arms, arm by arm. rows: by run id."""
    chosen: list[Row] = []
    for wave in {run.wave.name: run.wave for run in runs}.values():
        by_arm_and_seed = {}
        for run in runs:
            if run.wave.name == wave.name and not run.rerun and not run.duplicate_of:
                by_arm_and_seed[run.arm.name, run.seed] = rows[run.run_id]
        arms = best_arms(by_arm_and_seed, wave.seeds, count)
        controls = [by_arm_and_seed[CONTROL, seed] for seed in wave.seeds]
        if all(is_valid(row) for row in controls):
            chosen += controls
        for arm in arms:
            chosen += [by_arm_and_seed[arm, seed] for seed in wave.seeds]
    return chosen


def score_by_id(run_ids: list[str], results: dict[str, Results], jobs: int) -> None:
    """Score runs by their names. Raises UserError where one has no valid result."""
    rows: dict[str, Row] = {}
    for wave_results in results.values():
        rows |= wave_results.latest()
    for run_id in run_ids:
        if run_id not in rows or rows[run_id]["state"] != RunState.OK:
            raise UserError(f"{run_id} has no valid result in {next(iter(results.values())).path.parent}")
    score_rows([rows[run_id] for run_id in run_ids], results, jobs)
