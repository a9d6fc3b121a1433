"""The throughput benchmark prints numbers that hang together. How fast they are is not a test."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZES = [
    "NUM_LAYERS=2",
    "MODEL_DIM=32",
    "NUM_HEADS=2",
    "NUM_KV_HEADS=1",
    "TRAIN_SEQ_LEN=64",
    "TRAIN_BATCH_TOKENS=512",
]


def bench(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests" / "bench_throughput.py"), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)


def test_each_variant_gets_a_row_of_consistent_numbers(tmp_path):
    out = tmp_path / "bench.json"
    vary = ["--vary", "DTYPE=fp32,bf16", "--steps", "3", "--out", str(out)]
    done = bench(tmp_path, "baseline", *SIZES, "COMPILE=0", "DEVICE=cpu", *vary)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(out.read_text()) and report["preset"] == "baseline"
    assert [row["dtype"] for row in report["rows"]] == ["fp32", "bf16"]
    for row in report["rows"]:
        assert row["steps"] == 3 and row["peak_memory_mib"] > 0 and row["torch"] and row["device"]
        assert row["tokens_per_second"] == pytest.approx(512 / (row["ms_per_step"] / 1000), rel=0.01)
        assert row["share_of_peak"] == pytest.approx(
            row["flops_per_second"] / row["peak_flops_per_second"], abs=1e-4
        )


def test_sliding_windows_are_timed_beside_the_plain_score_and_the_naive_way(tmp_path):
    command = [sys.executable, str(ROOT / "tests/bench_sliding.py"), "baseline", *SIZES, "EVAL_STRIDE=16"]
    command += ["COMPILE=0", "DTYPE=fp32", "DEVICE=cpu", "--tokens", "4096", "--rounds", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["seconds"].keys() == {"plain", "sliding", "naive"} and report["tokens"] == 4096
    assert all(len(times) == 2 and min(times) > 0 for times in report["all_seconds"].values())


def test_a_switch_costs_its_first_step_less_the_median_of_the_ten_after_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "sweeps"))
    depth = importlib.import_module("depth")
    lengths = [100] * 5 + [450] + [200, 210] * 6  # the sixth step is the first of its depth
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    events = [dict(event="step", step=n + 1, train_ms=end) for n, end in enumerate(ends)]
    events.insert(5, dict(event="phase", step=5, depth=6))
    log = tmp_path / "run/logs/run.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert depth.switches(tmp_path) == [dict(step=5, layers=6, first_ms=450, later_ms=205)]


def test_a_bad_knob_is_one_line(tmp_path):
    done = bench(tmp_path, "baseline", "MATRX_LR=1")
    assert done.returncode == 1 and done.stderr.startswith("error: MATRX_LR") and done.stderr.count("\n") == 1
