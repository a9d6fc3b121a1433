"""FUSED_MLP: the kernel's values where Triton is installed, and without it all that surrounds the kernel."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from records import pack_script
from tests.conftest import ROOT
from tests.test_gpu_path import logits_and_gradients
from train_gpt import Config, Run, RunError, RunLog, Runtime


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_kernel_gives_values_and_gradients_in_tritons_interpreter(tmp_path, is_packed):
    """Of the packed script Triton reads the readable one's lines, and calls the packed one's function."""
    pytest.importorskip("triton")
    if is_packed:
        pack_script.main(["-o", str(tmp_path / "train_gpt.py")])
    command = [sys.executable, ROOT / "tests/support/fused_mlp_values.py", tmp_path if is_packed else ROOT]
    done = subprocess.run(
        command, env=os.environ | dict(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.count("allowed") == 2, done.stdout + done.stderr[-2000:]


def plain_launch(a, b, product, seen, slope):
    """What the kernel makes, by torch."""
    made = a @ b
    if seen is None:
        product.copy_(made)
        return F.leaky_relu(made, slope).square()
    return made * 2 * torch.where(seen > 0, seen, slope**2 * seen)


@pytest.fixture
def plays_gpu(monkeypatch):
    """A CPU whose kernel torch plays; the list has what it was asked for."""
    asked = []

    def launch(a, b, product, seen, slope):
        asked.append("forward" if seen is None else "backward")
        return plain_launch(a, b, product, seen, slope)

    monkeypatch.setattr(train_gpt, "folds_gains", lambda device: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(train_gpt, "can_fuse_mlp", lambda device, dtype, is_compiled: is_compiled)
    monkeypatch.setattr(train_gpt, "launch_squared_product", launch)
    return asked


@pytest.mark.parametrize("knobs", [
    dict(mlp_act="relu2"),
    dict(mlp_act="leaky_relu2", leaky_slope=0.3),
    dict(mlp_act="relu2", num_repeats=2),
])  # fmt: skip
def test_the_model_and_its_gradients_are_the_plain_ones(tiny, plays_gpu, knobs):
    plain = logits_and_gradients(tiny(**knobs), torch.float64, None)
    assert plays_gpu == []
    cfg = tiny(fused_mlp=True, **knobs)
    for fused, whole in zip(logits_and_gradients(cfg, torch.float64, None), plain, strict=True):
        assert (fused - whole).norm() <= 1e-12 * whole.norm()
    assert plays_gpu == ["forward"] * cfg.depth + ["backward"] * cfg.depth


@pytest.mark.parametrize("knobs", [
    dict(mlp_act="gelu2"),
    dict(mlp_act="silu2"),
    dict(mlp_act="swiglu"),
    dict(num_repeats=2, repeat_lora_rank=2),  # `proj` adds its factors' product
])  # fmt: skip
def test_what_the_kernel_cannot_make_takes_the_plain_path(tiny, plays_gpu, knobs):
    logits_and_gradients(tiny(fused_mlp=True, **knobs), torch.float64, None)
    assert plays_gpu == []


def test_evaluation_takes_the_plain_path(tiny, plays_gpu):
    model = train_gpt.GPT(tiny(fused_mlp=True))
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert plays_gpu == []


@pytest.mark.parametrize("has_triton, dtype, is_compiled, is_new_gpu, expected", [
    (True, torch.bfloat16, True, True, True),
    (True, torch.float16, True, True, True),
    (False, torch.bfloat16, True, True, False),
    (True, torch.float32, True, True, False),
    (True, torch.bfloat16, False, True, False),
    (True, torch.bfloat16, True, False, False),
])  # fmt: skip
def test_where_it_can_act_and_the_line_of_a_run_where_it_cannot(
    monkeypatch, has_triton, dtype, is_compiled, is_new_gpu, expected
):
    monkeypatch.setattr(train_gpt, "tl", "triton.language" if has_triton else None)
    monkeypatch.setattr(train_gpt, "is_ampere_or_newer", lambda device: is_new_gpu)
    device = torch.device("cpu")
    assert train_gpt.can_fuse_mlp(device, dtype, is_compiled) is expected
    warned = []
    for cfg in (Config(), Config(fused_mlp=True)):
        log = RunLog(None, "")
        monkeypatch.setattr(log, "warn", warned.append)
        runtime = Runtime(device, dtype=dtype, compiles=is_compiled)
        train_gpt.log_start_warnings(Run(cfg, runtime, log, torch.nn.Linear(1, 1), None))
    assert [text.startswith("FUSED_MLP=1 is idle: it needs Triton") for text in warned] == [True] * (
        not expected
    )


@pytest.mark.parametrize("line, need", [
    ("COMPILE=0", "COMPILE!=0"),
    ("DEVICE=cpu", "DEVICE!=cpu"),
    ("DTYPE=fp32", "DTYPE!=fp32"),
    ("NUM_REPEATS=2 REPEAT_LORA_RANK=2", "REPEAT_LORA_RANK=0"),
    ("MLP_ACT=silu2", "MLP_ACT=relu2 or MLP_ACT=leaky_relu2"),
])  # fmt: skip
def test_knobs_with_which_it_does_nothing_refuse_it_in_one_line(line, need):
    env = dict(word.split("=") for word in line.split()) | dict(FUSED_MLP="1")
    with pytest.raises(RunError) as refusal:
        Config.from_env(env)
    assert (
        str(refusal.value) == f"FUSED_MLP has no effect without {need} (ALLOW_INERT=1 makes this a warning)"
    )


def test_it_is_off_by_default_and_no_other_experiment():
    assert not Config().fused_mlp and Config(fused_mlp=True).hash == Config().hash
