"""The throughput benchmark prints numbers that hang together. How fast they are is not a test."""

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


def test_a_bad_knob_is_one_line(tmp_path):
    done = bench(tmp_path, "baseline", "MATRX_LR=1")
    assert done.returncode == 1 and done.stderr.startswith("error: MATRX_LR") and done.stderr.count("\n") == 1
