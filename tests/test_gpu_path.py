"""What a run does about GPUs, as far as a machine without one can show it; the rest is in pretend_gpu.sh."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from tests.test_settle import CompilerFailed, Unlucky
from train_gpt import (
    GPT,
    Run,
    RunError,
    RunLog,
    Runtime,
    StepPlan,
    attend,
    pick_device_type,
    serves_capability,
)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(text): the only program on the PATH says this of the machine's GPU."""

    def install(text: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return install


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize("driver, mend", [
    ("580.65.06", "/whl/cu130"),
    ("570.124", "/whl/cu128"),
    ("550.54.15", "/whl/cu126"),
    ("470.1", "install NVIDIA driver 580 or newer"),
])  # fmt: skip
def test_a_gpu_that_torch_cannot_use_is_no_cpu_run(nvidia_smi, wanted, driver, mend):
    nvidia_smi(f"NVIDIA L4, {driver}")
    with pytest.raises(RunError, match="there is a NVIDIA L4") as refusal:
        pick_device_type(wanted, {})
    text = str(refusal.value)
    assert mend in text and driver in text and "DEVICE=cpu" in text and "\n" not in text
    assert refusal.value.code == 2


def test_device_cpu_takes_the_cpu_beside_any_gpu(nvidia_smi):
    nvidia_smi("NVIDIA L4, 470.1")
    assert pick_device_type("cpu", {}) == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_hidden_on_purpose_is_not_missed(nvidia_smi, hidden):
    nvidia_smi("NVIDIA L4, 470.1")
    assert pick_device_type("auto", dict(CUDA_VISIBLE_DEVICES=hidden)) == "cpu"


def test_a_driver_without_a_gpu_is_no_gpu(nvidia_smi):
    nvidia_smi("No devices were found", 6)
    assert pick_device_type("auto", {}) == "cpu"


@pytest.mark.parametrize("architectures, capability, expected", [
    ("sm_75 sm_80 sm_90 compute_90", (8, 0), True),
    ("sm_75 sm_80 sm_90", (8, 9), True),  # a kernel for 8.0 runs on 8.9
    ("sm_75 sm_86 sm_90", (8, 0), False),  # one for 8.6 does not run on 8.0
    ("sm_75 sm_80 sm_90", (7, 0), False),
    ("sm_75 sm_80 sm_90a", (9, 0), True),
    ("sm_75 sm_80 sm_90", (12, 0), False),
    ("sm_75 sm_90 compute_90", (12, 0), True),
    ("sm_100 sm_120", (12, 0), True),
    ("sm_100 sm_120", (10, 3), True),
])  # fmt: skip
def test_kernels_run_on_later_gpus_of_their_major_version_and_ptx_on_all(architectures, capability, expected):
    assert serves_capability(architectures.split(), capability) is expected


def test_a_compiler_that_fails_on_a_gpu_is_an_error_with_its_cause(tiny, monkeypatch):
    cfg = tiny(compile="auto")
    run = Run(cfg, Unlucky(compiles=True), RunLog(None, ""), GPT(cfg), None)
    monkeypatch.setattr(Unlucky, "is_cuda", True)

    def fails():
        raise CompilerFailed("gcc: not found\nand more")

    with pytest.raises(RunError, match="gcc: not found and more[.] Is there a C compiler") as refusal:
        run.settle(fails)
    assert refusal.value.code == 2 and run.runtime.compiles


def test_where_one_ranks_compiler_fails_all_ranks_run_eagerly(tiny):
    class OtherRankFailed(Unlucky):
        def gather(self, value):
            return [value, "CompilerFailed: no g++"]

    cfg = tiny(compile="auto")
    run = Run(cfg, OtherRankFailed(compiles=True), RunLog(None, ""), GPT(cfg), None)
    calls = []
    run.settle(lambda: calls.append(run.runtime.compiles))
    assert calls == [True, False]


def test_dials_are_the_same_on_a_device(monkeypatch):
    """As CUDA is given them: from pinned memory, without waiting; played here by tensors of the CPU."""
    copies = []

    def pin_memory(tensor):
        copies.append("pinned")
        return tensor

    def to(tensor, device, non_blocking=False):
        copies.append(non_blocking)
        return tensor

    plan = StepPlan(0.25, 1.0, 0.9, layers=(True, False), noise=7)
    expected = plan.dials(torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert torch.equal(plan.dials(torch.device("cuda")), expected)
    assert copies == ["pinned", True]


@pytest.mark.parametrize("returns_sums", [False, True])
def test_flash_attention_3_gets_its_layout(monkeypatch, returns_sums):
    """Its function takes and gives [B, T, H, D]; played by torch's own attention in float64."""

    def flash_attention_3(q, k, v, causal, deterministic):
        assert causal and not deterministic
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        rows = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)
        return (y, None) if returns_sums else y

    q = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 9, 8, dtype=torch.float64).unbind()
    expected = attend(q, k, v)
    monkeypatch.setattr(train_gpt, "flash_attention_3", flash_attention_3)
    assert not train_gpt.has_flash_attention_3(q.device)
    monkeypatch.setattr(train_gpt, "has_flash_attention_3", lambda device: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    torch.testing.assert_close(attend(q, k, v), expected)


def test_out_of_memory_halves_the_passes_until_they_fit(tiny, capfd):
    cfg = tiny(train_batch_tokens=512, train_seq_len=32)  # 16 sequences
    run = Run(cfg, train_gpt.Runtime(), RunLog(None, ""), GPT(cfg), None)
    loss = run.loss

    def takes_six(ids, *rest):
        if len(ids) > 6:
            raise torch.OutOfMemoryError
        return loss(ids, *rest)

    run.loss = takes_six
    ids = torch.randint(cfg.vocab_size, (16, 32))
    assert train_gpt.fit_micro_batch(run, (ids, ids)) == 4
    assert capfd.readouterr().err.count("out of memory") == 2
    assert all(math.isfinite(param.grad.sum()) for param in run.model.parameters() if param.grad is not None)


# --- float16, for GPUs without bf16 ---


@pytest.fixture
def half_run(tiny):
    """half_run(steps) -> (optimisers, losses) of a float16 run on the CPU on one batch, learned by heart."""

    def run_steps(steps: int, scale: float = 0.0, dtype: torch.dtype = torch.float16, **knobs):
        cfg = tiny(matrix_lr=0.02, **knobs)
        torch.manual_seed(1)
        model = GPT(cfg, dtype)
        runtime = train_gpt.Runtime(dtype=dtype)
        run = Run(cfg, runtime, RunLog(None, ""), model, None)
        optimisers = train_gpt.Optimisers(cfg, model, runtime)
        if scale:
            optimisers.loss_scale.value = scale
        ids = torch.randint(cfg.vocab_size, (4, 33), generator=torch.Generator().manual_seed(2))
        batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        losses = []
        for step in range(steps):
            plan = train_gpt.plan_step(cfg, step, 0.0, 0.0)
            losses.append(train_gpt.train_step(run, optimisers, batch, plan, 4).item())
        return optimisers, losses

    return run_steps


def test_float16_trains_as_float32_does(half_run):
    half, losses = half_run(15)
    _, exact = half_run(15, dtype=torch.float32)
    assert losses == pytest.approx(exact, rel=0.02) and losses[-1] < losses[0] - 0.5
    assert half.loss_scale.value == half.loss_scale.FIRST and half.loss_scale.skipped_steps == 0


def test_a_gradient_that_overflows_leaves_the_step_out_and_halves_the_scale(half_run):
    optimisers, _ = half_run(1, scale=2.0**40)
    assert optimisers.loss_scale.value == 2.0**39 and optimisers.loss_scale.skipped_steps == 1
    torch.manual_seed(1)
    untrained = GPT(optimisers.cfg, torch.float16)
    first = dict(untrained.named_parameters())
    assert all(torch.equal(weight.param, first[weight.name]) for weight in optimisers.weights)
    assert not optimisers.adam.state  # nothing has stepped


def test_the_scale_grows_after_sound_steps_and_is_kept_by_checkpoints(half_run, monkeypatch):
    monkeypatch.setattr(train_gpt.LossScale, "SOUND_STEPS", 3)
    optimisers, _ = half_run(4)
    assert optimisers.loss_scale.value == 2 * optimisers.loss_scale.FIRST
    other, _ = half_run(0)
    other.load(optimisers.state())
    assert other.loss_scale.state() == optimisers.loss_scale.state() == [2.0**16, 1, 0]


def test_at_a_scale_of_one_a_run_that_diverges_is_let_be_seen():
    scale = train_gpt.LossScale(torch.float16)
    scale.value = 1.0
    assert scale.take_off(torch.tensor([math.nan])) and scale.skipped_steps == 0


def test_other_types_have_no_scale():
    gradient = torch.tensor([math.inf, 3.0])
    scale = train_gpt.LossScale(torch.bfloat16)
    assert scale.take_off(gradient) and scale.value == 1.0 and gradient[1] == 3.0


@pytest.mark.parametrize("capability, expected", [
    ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((6, 1), "fp32"),
])  # fmt: skip
def test_the_type_is_the_fastest_that_the_card_has(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train_gpt.pick_dtype("auto", torch.device("cuda", 0)) == expected


def test_a_float16_run_says_what_became_of_its_scale(run_main):
    code, out, err = run_main(dtype="fp16", iterations=6)
    assert code == 0, err
    assert "loss_scale:32768 steps_left_out:0" in out


def test_peak_memory_is_told_in_mib(monkeypatch):
    """Linux counts the resident set in KiB, CUDA counts bytes."""
    usage = SimpleNamespace(ru_maxrss=3 * 1024**2 + 1)
    monkeypatch.setattr(train_gpt.resource, "getrusage", lambda who: usage)
    assert Runtime().peak_memory_mib() == (3072, 3072)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**33 + 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**34 - 1)
    assert Runtime(device=torch.device("cuda")).peak_memory_mib() == (8192, 16383)
