"""The throughput benchmark prints numbers that hang together. How fast they are is not a test."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from sweeps.lab.depth_switches import DepthSwitch, depth_switches
from sweeps.lab.show import step_flops
from tests.bench import bench_scores, bench_sliding, bench_startup, bench_throughput, official, step_parts

ROOT = Path(__file__).resolve().parents[1]
SIZES = [
    "NUM_LAYERS=2",
    "MODEL_DIM=32",
    "NUM_HEADS=2",
    "NUM_KV_HEADS=1",
    "TRAIN_SEQ_LEN=64",
    "TRAIN_BATCH_TOKENS=512",
]


@pytest.fixture
def report_of(monkeypatch, capsys):
    """report_of(benchmark, word, ...) -> the JSON that it prints, run in this process."""

    def run(benchmark, *words: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        benchmark.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_each_variant_gets_a_row_of_consistent_numbers(tmp_path):
    """As a process, as people start a benchmark; the others are called."""
    out = tmp_path / "bench.json"
    vary = ["--vary", "DTYPE=fp32,bf16", "--steps", "3", "--rounds", "1", "--out", str(out)]
    script = ROOT / "tests/bench/bench_throughput.py"
    command = [sys.executable, str(script), "baseline", *SIZES, "COMPILE=0", "DEVICE=cpu", *vary]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
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
        assert row["recompiles"] == 0 and row["mfu_datasheet"] is None
        parts = row["parts"]
        assert sum(part["share"] for part in parts.values()) == pytest.approx(1, abs=1e-3)
        assert parts["communication"]["ms"] == 0 < min(parts[n]["ms"] for n in ("forward", "backward"))


def test_a_part_within_another_counts_once_and_other_threads_pass(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(step_parts.time, "perf_counter", lambda: next(now))  # a second each time it is read
    timers = step_parts.Timers()
    inner = timers.timed("communication", lambda: None)
    outer = timers.timed("optimiser", lambda: (inner(), inner()))
    thread = threading.Thread(target=inner)
    outer()  # before the first lap: of no step
    timers.lap()
    outer()
    thread.start(), thread.join()
    timers.lap()
    assert [dict(step) for step in timers.steps] == [dict(clock_and_logs=2, optimiser=3, communication=2)]


def test_the_steps_are_those_of_the_programs_own_loop():
    """As many as asked for, each with all parts; the program is as before."""
    own = dict(vars(train_gpt)), train_gpt.Clock.tick, train_gpt.Optimisers.step
    knobs = dict(pair.split("=") for pair in SIZES) | dict(DEVICE="cpu", COMPILE="0", DTYPE="fp32")
    variant = bench_throughput.Variant(knobs)
    variant.build()
    before = variant.run.model.tok_emb.weight.clone()
    variant.block(2)
    variant.stack.close()
    assert len(variant.steps) == len(variant.times) == 2
    assert all(step.keys() == {*step_parts.PARTS} - {"communication"} for step in variant.steps)
    assert not torch.equal(before, variant.run.model.tok_emb.weight), "it trained"
    assert own == (dict(vars(train_gpt)), train_gpt.Clock.tick, train_gpt.Optimisers.step)


def test_flops_by_the_formula_are_those_counted_but_for_attention():
    """Products of activations and weights: 6 a weight and token. Attention differs by what a kernel skips."""
    cfg = train_gpt.Config(num_layers=3, model_dim=64, train_seq_len=32, train_batch_tokens=32)
    model = train_gpt.GPT(cfg)
    ids = torch.zeros(1, 32, dtype=torch.int64)
    with (
        FlopCounterMode(display=False) as counter,
        patch.object(train_gpt, "attend", lambda q, k, v, documents: q + k.sum() + v.sum()),
    ):
        train_gpt.training_loss(cfg, model)(ids, ids)[0].backward()
    attention = 12 * 64 * 16 * 3 * 32  # as step_flops has it: width, half the context, layers, tokens
    assert step_flops(cfg, model) - attention == pytest.approx(counter.get_total_flops(), rel=1e-6)


SCRIPT = """
if not torch.cuda.is_available():
    raise RuntimeError("CUDA is required")
device = torch.device("cuda", local_rank)
torch.cuda.set_device(device)
cards = subprocess.run(["nvidia-smi"])
with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
    torch.cuda.synchronize()
"""


def test_a_script_for_cuda_is_made_to_run_on_a_cpu_or_refused():
    copy = official.for_cpu(SCRIPT, "theirs.py")
    assert "cuda" not in copy.replace("torch.cuda.is", "") and "nvidia" not in copy
    assert 'torch.device("cpu")' in copy and 'device_type="cpu"' in copy and "bfloat16" in copy
    with pytest.raises(train_gpt.RunError, match="theirs.py has no autocast's device"):
        official.for_cpu(SCRIPT.replace('device_type="cuda"', "device"), "theirs.py")


def test_another_script_gets_the_same_shards_under_the_official_names(tmp_path, dataset):
    data = official.official_names(dataset, tmp_path / "data", 100)
    names = sorted(path.name for path in data.iterdir())
    trains = len(list(dataset.glob("*_train_*.bin")))
    assert names == [f"fineweb_train_{n:06d}.bin" for n in range(trains)] + ["fineweb_val_000000.bin"]
    whole = train_gpt.open_shard(next(dataset.glob("*_val_*.bin")))
    assert (train_gpt.open_shard(data / "fineweb_val_000000.bin") == whole[:101]).all()
    log = "step:1/9 train_loss:6.9 train_time:90ms step_avg:90ms\nstep:3/9 train_loss:6.8 train_time:110ms "
    assert [(int(n), int(ms)) for n, _, ms in official.STEP.findall(log)] == [(1, 90), (3, 110)]
    assert official.step_ms({1: 90, 3: 110}, 1) == 10


def test_the_stages_of_a_run_follow_each_other_without_a_gap():
    """Two steps of a second each, a validation of three seconds before, between and after them."""
    rows = [("config", 105, 0, 0), ("val", 110, 0, 0), ("step", 111, 1, 1), ("val", 114, 1, 1)]
    rows += [("step", 115, 2, 2), ("val", 118, 2, 2), ("artifact", 120, 0, 0), ("score", 124, 0, 0)]
    events = [dict(event=e, time=time, step=step, train_ms=1000 * s) for e, time, step, s in rows]
    stages = bench_startup.stages_of(events, began=100, imported=102, ended=125)
    assert stages == dict(
        imports=2, inputs=3, warm_up=2, training=2, pauses=6, last_validation=3, packing=2, scoring=4, exit=1
    )
    found = bench_startup.shares([dict(stages=stages)])
    assert found == dict(outside_training=23 / 25, evaluation=13 / 25, overhead=10 / 25)


def test_sliding_windows_are_timed_beside_the_plain_score_and_the_naive_way(report_of):
    words = ["EVAL_STRIDE=16", "COMPILE=0", "DTYPE=fp32", "DEVICE=cpu", "--tokens", "1024", "--rounds", "2"]
    report = report_of(bench_sliding, "baseline", *SIZES, *words)
    assert report["seconds"].keys() == {"plain", "sliding", "naive"} and report["tokens"] == 1024
    assert all(len(times) == 2 and min(times) > 0 for times in report["all_seconds"].values())


def test_a_switch_costs_its_first_step_less_the_median_of_the_ten_after_it(tmp_path):
    lengths = [100] * 5 + [450] + [200, 210] * 6  # the sixth step is the first of its depth
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    events = [dict(event="step", step=n + 1, train_ms=end) for n, end in enumerate(ends)]
    events.insert(5, dict(event="phase", step=5, depth=6))
    log = tmp_path / "run/logs/run.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert depth_switches(log) == [DepthSwitch(step=5, layers=6, first_ms=450, later_ms=205)]


def test_a_bad_knob_is_one_line(report_of):
    with pytest.raises(SystemExit, match="^error: MATRX_LR.*$"):
        report_of(bench_throughput, "baseline", "MATRX_LR=1")


SCORED = [*SIZES, "EVAL_STRIDE=16", "EVAL_DOC_ISOLATED=1", "COMPILE=0", "DTYPE=fp32", "DEVICE=cpu"]
SCORED += ["TTT_STEPS=1", "TTT_LORA_RANK=2", "TTT_BATCH_SIZE=4", "TTT_CHUNK_SIZE=16"]


def test_each_score_is_timed(report_of):
    report = report_of(bench_scores, "measure", "baseline", *SCORED, "--tokens", "1000")
    assert report["per_million_tokens"].keys() == {"roundtrip", "sliding", "isolated", "ttt"}
    assert all(times["cpu_seconds"] > 0 for times in report["per_million_tokens"].values())


def test_a_reckoning_shares_the_work_out(report_of):
    few, many = (
        report_of(
            bench_scores, "reckon", "baseline", *SCORED, "--tokens", "100000", "--gpus", n, "--share", "1"
        )["scores"]
        for n in ("1", "4")
    )
    assert all(many[name]["petaflop"] >= few[name]["petaflop"] > 0 for name in few)
    assert many["sliding"]["seconds"] < 0.5 * few["sliding"]["seconds"]
    assert few["ttt"]["tokens_read_per_target"] > few["isolated"]["tokens_read_per_target"] > 1
    assert few["ttt"]["terabytes"] > 0 == few["isolated"]["terabytes"]


def test_phases_and_mixtures_are_reckoned_and_the_limit_is_told():
    knobs = dict(pair.split("=") for pair in SIZES) | dict(
        TTT_STEPS="1", TTT_LORA_RANK="2", TTT_BATCH_SIZE="4"
    )
    plain = bench_scores.reckon(knobs, 50_000, 2, 1.0, 1)
    phases = dict(PHASED_TTT_PREFIX_DOCS="8", PHASED_TTT_NUM_PHASES="2", USE_HEDGE="1")
    more = bench_scores.reckon(knobs | phases | dict(MAX_EVAL_SECONDS="0.001"), 50_000, 2, 1.0, 1)
    cfg = train_gpt.Config.from_env(knobs | phases)
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    flops = bench_scores.phase_cost(cfg, model, bench_scores.MEAN_LENGTH, 2)
    added = more["scores"]["ttt"]["petaflop"] - plain["scores"]["ttt"]["petaflop"]
    assert added == pytest.approx(2 * flops / 1e15, rel=0.01) and flops > 0
    assert more["scores"]["hedge"]["seconds"] > 0 and plain["fits"] and not more["fits"]


def test_the_products_of_a_pass_are_those_that_torch_counts():
    cfg = train_gpt.Config(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, vocab_size=128)
    model, shape = train_gpt.GPT(cfg), train_gpt.PassShape(2, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 32, dtype=torch.int64))
    whole_square = 2.0 * 2 * 32 * 2 * 32 * 64  # torch counts the half of the attention that is masked, too
    assert bench_scores.pass_flops(cfg, model, shape) + whole_square == counter.get_total_flops()
