"""What a run does about GPUs, as far as a machine without one can show it; the rest is in pretend_gpu.sh."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from tests import gpu_checks
from tests.conftest import ROOT
from tests.gpu_checks import CHECKS, Lab, make_check
from tests.pretend_gpu import run as pretend_gpu
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

    calls = []

    def flash_attention_3(q, k, v, causal, deterministic):
        assert causal and not deterministic
        calls.append(q.shape)
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
    monkeypatch.setattr(train_gpt, "LONGEST_BLOCKED", 0)
    torch.testing.assert_close(attend(q, k, v), expected)
    assert calls == [(2, 9, 4, 8)]


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


# --- MPS, which has no float64 ---


class WithoutFloat64(TorchDispatchMode):
    """As MPS does, refuses each operation that would make a float64 tensor; it is played by "meta"."""

    def __torch_dispatch__(self, operation, types, given=(), settings=None):
        made = operation(*given, **(settings or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype == torch.float64:
                raise TypeError(f"{operation}: MPS has no float64")
        return made


@pytest.mark.parametrize("knobs", [
    {},
    dict(swa_enabled=True, swa_every=1, swa_start_frac=1.0),
    dict(xsa_last_n=-1, num_value_embeds=1, grad_clip_norm=0.3),
    dict(layer_drop=0.3, sam_rho=0.05),
    dict(parallel_block=True, head_diversity=1e-4, tie_embeddings=False),
])  # fmt: skip
def test_no_float64_is_made_on_mps(tiny, knobs):
    """Training steps with all that is counted of them, and the model's two ways to score."""
    cfg = tiny(**knobs)
    device = torch.device("meta")
    with WithoutFloat64():
        with device:
            model = GPT(cfg, torch.float32)
        runtime = train_gpt.Runtime(device)
        optimisers = train_gpt.Optimisers(cfg, model, runtime)
        run = Run(cfg, runtime, RunLog(None, ""), model, None)
        training = train_gpt.Training(run, optimisers, 0.0)
        ids = torch.zeros(4, 32, dtype=torch.int64, device=device)
        for step in range(2):
            plan = train_gpt.plan_step(cfg, step, 0.0, 0.0)
            loss = train_gpt.train_step(run, optimisers, (ids, ids), plan, 4)
            training.count_step(plan, loss)
        with torch.no_grad():
            assert run.nats(ids, ids).dtype == torch.float32
            assert run.nats(ids, ids[:, :8], ids[:, :8]).dtype == torch.float32
    assert training.step == 2 and training.sound.device == device


def test_the_guard_of_float64_guards():
    with pytest.raises(TypeError, match="no float64"), WithoutFloat64():
        torch.zeros(3, device="meta").double()


# --- what the log says of a GPU ---


class OnGpu(train_gpt.Runtime):
    """A runtime that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("capability, dtype, tf32, is_slow", [
    ((8, 0), torch.float32, False, True),
    ((9, 0), torch.float32, False, True),
    ((9, 0), torch.float32, True, False),
    ((9, 0), torch.bfloat16, False, False),
    ((7, 5), torch.float32, False, False),  # it has none
])  # fmt: skip
def test_float32_without_tf32_is_said(monkeypatch, capability, dtype, tf32, is_slow):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=tf32))
    warned = []
    log = RunLog(None, "")
    monkeypatch.setattr(log, "warn", warned.append)
    runtime = OnGpu(torch.device("cuda", 0), dtype=dtype)
    model = torch.nn.Linear(1, 1)
    train_gpt.log_start_warnings(Run(train_gpt.Config(), runtime, log, model, None))
    assert [text for text in warned if "TF32" in text] == warned
    assert len(warned) == is_slow


def test_float32_on_a_cpu_is_no_news():
    assert not train_gpt.is_slow_float32(train_gpt.Runtime())


@pytest.mark.parametrize("has_package, uses_cudnn, expected", [
    (False, False, "sdpa, cuDNN "), (False, True, "cudnn or sdpa, cuDNN "), (True, True, "FlashAttention-3"),
])  # fmt: skip
def test_the_log_names_the_attention_of_a_gpu(monkeypatch, has_package, uses_cudnn, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: uses_cudnn)
    monkeypatch.setattr(train_gpt, "has_flash_attention_3", lambda device: has_package)
    machine = train_gpt.describe_machine(OnGpu(torch.device("cuda", 0), dtype=torch.bfloat16))
    assert machine["device"] == "H100" and machine["attention"].startswith(expected)


# --- gains in the weights ---


def logits_and_gradients(cfg, dtype, adapters):
    """Of a model that a seed makes, its weights far from where they start; flat."""
    torch.manual_seed(3)
    model = GPT(cfg, dtype).to(dtype)
    for param in model.parameters():
        param.data += 0.3 * torch.randn_like(param)
    ids = torch.randint(cfg.vocab_size, (2, 16))
    logits = model(ids, adapters=adapters)
    (logits * torch.randn_like(logits)).sum().backward()
    gradients = [param.grad.flatten() for param in model.parameters() if param.grad is not None]
    return logits.detach().flatten(), torch.cat(gradients)


def lora_everywhere(cfg, dtype):
    """Adapters that change what "o" and "mlp" give in each layer."""
    torch.manual_seed(4)
    places = {}
    for place in ("o", "mlp"):
        places[place] = tuple(
            torch.randn(2, *shape, dtype=dtype) for shape in ((3, cfg.model_dim), (cfg.model_dim, 3))
        )
    return [places] * cfg.depth + [{}]


@pytest.mark.parametrize("knobs", [
    {},
    dict(sandwich_norm=True),
    dict(num_repeats=2, repeat_lora_rank=2),
    dict(parallel_start_layer=1, encoder_layers=0),
    dict(adapters=True),
])  # fmt: skip
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gains_in_the_weights_change_rounding_alone(tiny, monkeypatch, knobs, dtype, limit):
    has_adapters = knobs.get("adapters", False)
    cfg = tiny(**{name: value for name, value in knobs.items() if name != "adapters"})
    adapters = lora_everywhere(cfg, dtype) if has_adapters else None
    plain = logits_and_gradients(cfg, dtype, adapters)
    monkeypatch.setattr(train_gpt, "folds_gains", lambda device: True)
    for apart, whole in zip(logits_and_gradients(cfg, dtype, adapters), plain, strict=True):
        assert (apart - whole).norm() <= limit * whole.norm()


def test_gains_are_folded_on_gpus_alone():
    assert train_gpt.folds_gains(torch.device("cuda", 0)) and not train_gpt.folds_gains(torch.device("cpu"))


# --- gpu.sh's checks, on a CPU ---


@pytest.fixture
def lab(tmp_path):
    return Lab(torch.device("cpu"), tmp_path, data={})


@pytest.mark.parametrize("name", ["fp32", "bf16", "attention", "hedge"])
def test_a_cheap_check_passes_on_a_cpu(lab, name):
    found = make_check(name, lab)
    assert found["verdict"] == "ok", found


@pytest.mark.parametrize(
    "name", ["no_waits", "hedge_forecast", "speed", "fused_mlp", "official", "out_of_memory"]
)
def test_a_check_that_needs_a_card_is_skipped_on_a_cpu_and_never_passes(lab, name):
    found = make_check(name, lab)
    assert (found["verdict"], found["text"]) == ("skip", "skipped: needs a card")


def attend_wrongly_in_bfloat16(q, k, v):
    return attend(q if q.dtype != torch.bfloat16 else 3 * q, k, v)


@pytest.mark.parametrize("name", ["bf16", "attention"])
def test_an_attention_that_is_wrong_in_bfloat16_fails(lab, monkeypatch, name):
    monkeypatch.setattr(train_gpt, "attend", attend_wrongly_in_bfloat16)
    assert make_check(name, lab)["verdict"] == "FAIL"


def test_a_mixer_that_differs_fails(lab, monkeypatch):
    mix, calls = train_gpt.mix_with_ngrams, []

    def off_at_the_second_time(cfg, tokens, nats):
        calls.append(len(nats))
        return mix(cfg, tokens, nats + (len(calls) - 1) * 1e-5)

    monkeypatch.setattr(train_gpt, "mix_with_ngrams", off_at_the_second_time)
    assert make_check("hedge", lab)["verdict"] == "FAIL"


@pytest.mark.parametrize("name", ["compiled", "documents"])
@pytest.mark.parametrize("loss, gradient, are_views, verdict", [
    (1.0, 1.0, True, "ok"),
    (1.01, 1.0, True, "FAIL"),
    (1.0, 1.1, True, "FAIL"),
    (1.0, 1.0, False, "FAIL"),
])  # fmt: skip
def test_a_compiled_pass_that_differs_or_leaves_the_buffer_fails(
    lab, monkeypatch, name, loss, gradient, are_views, verdict
):
    def one_pass(device, dtype, compiles, **knobs):
        assert knobs.get("pack_documents", False) == (name == "documents")
        if not compiles:
            return 1.0, torch.ones(3), True
        return loss, torch.full((3,), gradient), are_views

    monkeypatch.setattr(gpu_checks, "one_pass", one_pass)
    assert make_check(name, lab)["verdict"] == verdict


def test_a_forecast_beyond_a_factor_of_two_fails(lab, monkeypatch):
    """On a card that the CPU plays."""
    monkeypatch.setattr(Lab, "is_cuda", True)
    monkeypatch.setattr(train_gpt, "foretell_mixture", lambda *given: (1000.0, 0.0))
    monkeypatch.setattr(train_gpt, "mix_with_ngrams", lambda *given: None)
    assert make_check("hedge_forecast", lab)["verdict"] == "FAIL"


class PlayedRuns(Lab):
    """Whole runs that leave these events, output and RESULT, each the next ones, instead of being made."""

    def play(self, *runs: dict) -> None:
        self.runs = list(runs)

    def whole_run(self, name, words="", ranks=1, expected=0, **more):
        played = self.runs.pop(0)
        out = self.folder / name
        (out / "logs").mkdir(parents=True)
        events = [json.dumps(event) + "\n" for event in played.get("events", [])]
        (out / "logs/r.jsonl").write_text("".join(events))
        result = "RESULT " + json.dumps(played.get("result", {}))
        (out / "output").write_text(played.get("text", "") + "\n" + result + "\n")
        return out


@pytest.fixture
def played(tmp_path):
    return PlayedRuns(torch.device("cpu"), tmp_path, data={})


def losses(*values: float) -> dict:
    steps = enumerate(values, 1)
    return dict(events=[dict(event="step", step=step, train_loss=value) for step, value in steps])


@pytest.mark.parametrize("second, verdict", [
    ((6.0, 5.0), "ok"), ((6.0, 5.1), "FAIL"), ((6.0,), "FAIL"), ((), "FAIL"),
])  # fmt: skip
@pytest.mark.parametrize("name, count", [("micro_batches", 2), ("torchrun", 2)])
def test_runs_whose_losses_part_fail(played, name, count, second, verdict):
    played.play(losses(6.0, 5.0), *[losses(*second)] * (count - 1))
    assert make_check(name, played)["verdict"] == verdict


@pytest.mark.parametrize("other, verdict", [(0, "ok"), (1, "FAIL"), (-1, "FAIL")])
def test_ranks_whose_weights_part_or_that_miss_a_step_fail(played, other, verdict):
    """other: the step in which the second rank has other weights; -1: it stops a step early."""
    out = played.folder / "equal_weights"
    out.mkdir()
    steps = [f"{name} {step}" for step in range(1, 21) for name in ("Adam", "Muon")]
    second = steps[:-1] if other < 0 else steps
    second = ["Muon x" if other and line == f"Muon {other}" else line for line in second]
    for rank, lines in enumerate((steps, second)):
        (out / f"weights.{rank}").write_text("\n".join(lines) + "\n")
    played.play({})
    assert make_check("equal_weights", played)["verdict"] == verdict


DEPTHS = dict(events=[dict(event="env", compile=True), dict(event="phase"), dict(event="phase")])


@pytest.mark.parametrize("change, verdict", [
    ({}, "ok"),
    (dict(text="warning: 2 graphs were compiled inside the clock; set WARMUP_STEPS >= 1"), "FAIL"),
    (dict(events=DEPTHS["events"][:2]), "FAIL"),
    (dict(events=[dict(event="env", compile=False), *DEPTHS["events"][1:]]), "FAIL"),
])  # fmt: skip
def test_late_graphs_missing_depths_and_eager_runs_fail(played, change, verdict):
    played.play(DEPTHS | change)
    assert make_check("depths", played)["verdict"] == verdict


@pytest.mark.parametrize("hedge, tried, verdict", [(1.5, 4, "ok"), (1.500001, 4, "FAIL"), (1.5, 3, "FAIL")])
def test_scores_that_change_in_a_new_process_or_go_untried_fail(played, hedge, tried, verdict):
    result = dict.fromkeys(("roundtrip_val_bpb", "sliding_val_bpb", "ttt_val_bpb", "hedge_val_bpb"), 1.5)
    played.play(
        dict(result=result, text="score_check: x\n" * tried), dict(result=result | dict(hedge_val_bpb=hedge))
    )
    assert make_check("scores", played)["verdict"] == verdict


@pytest.mark.parametrize("nats, verdict", [(5.0, "ok"), (6.5, "FAIL")])
def test_a_recipe_that_does_not_learn_fails(played, nats, verdict):
    played.play(dict(result=dict(val_loss=nats)))
    assert make_check("best", played)["verdict"] == verdict


def test_a_run_that_a_failed_check_leaves_behind_is_ended(lab, monkeypatch):
    def check(lab):
        """A check that breaks while its run goes on."""
        out = lab.folder / "x"
        lab.start_run(out, ranks=0, PYTHONPATH=lab.start_with("import time; time.sleep(600)")["PYTHONPATH"])
        raise AssertionError("broken")

    monkeypatch.setitem(CHECKS, "broken", check)
    started = []
    start = Lab.start_run

    def start_run(lab, *given, **more):
        started.append(start(lab, *given, **more))
        return started[0]

    monkeypatch.setattr(Lab, "start_run", start_run)
    assert make_check("broken", lab)["text"] == "AssertionError: broken"
    assert started[0].poll() is not None


@pytest.fixture
def gpu_sh(monkeypatch, capsys):
    """gpu_sh(*words) -> (exit code, stdout, stderr) of the program behind gpu.sh where there is no card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_checks, "embedded_corpus", lambda folder: {})

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpu_checks.py", *words])
        try:
            code = gpu_checks.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_without_a_card_nothing_is_checked_and_the_exit_code_is_2(gpu_sh):
    code, out, err = gpu_sh()
    assert (code, out) == (2, "") and "no CUDA device" in err


def test_an_unknown_check_is_wrong_usage(gpu_sh):
    assert gpu_sh("--device", "cpu", "fp64")[0] == 2


def test_the_exit_code_says_whether_a_check_failed_passed_or_was_made_at_all(gpu_sh, tmp_path, monkeypatch):
    code, out, _ = gpu_sh("--device", "cpu", "no_waits")
    assert code == 2 and "skip no_waits        skipped: needs a card" in out
    report = tmp_path / "found.json"
    assert gpu_sh("--device", "cpu", "attention", "no_waits", "--json", str(report))[0] == 0
    found = json.loads(report.read_text())
    assert [check["verdict"] for check in found["checks"]] == ["ok", "skip"]
    assert found["about"]["device"] == "cpu" and not found["about"]["calibrated"]
    monkeypatch.setattr(train_gpt, "attend", attend_wrongly_in_bfloat16)
    assert gpu_sh("--device", "cpu", "attention", "no_waits")[0] == 1


# --- pretend_gpu.sh's bookkeeping ---


@pytest.mark.parametrize("megabytes, told", [
    ([1000.0, 2000.0], 0),
    ([1019.0, 1961.0], 0),
    ([1021.0, 2000.0], 1),
    ([979.0, 2041.0], 2),  # fewer are told too: the table is to be renewed
])  # fmt: skip
def test_bytes_are_compared_within_two_percent(megabytes, told):
    kept = dict(megabytes=[1000.0, 2000.0])
    assert len(pretend_gpu.compare_bytes(dict(megabytes=megabytes), kept)) == told


def test_bytes_of_which_none_are_kept_are_no_pass():
    assert pretend_gpu.compare_bytes(dict(megabytes=[1.0, 2.0]), None)


def test_presets_that_differ_in_rates_and_lengths_alone_share_their_graphs():
    names = pretend_gpu.preset_names()
    assert {name: pretend_gpu.counted_for(name, names) for name in names} == dict(
        baseline="baseline",
        best="best",
        frontier="frontier",
        frontier_1394="frontier_1394",
        frontier_1493="frontier_1493",
        lower_lr="baseline",
        progressive_depth="progressive_depth",
        progressive_depth_4h="progressive_depth_4h",
        tidal_1434="best",
    )


def counted(megabytes: float = 1000.0, wrong: tuple[str, ...] = ()) -> dict:
    """What is found of a preset, but for its graphs and kernels."""
    return dict(
        wrong=list(wrong), megabytes=[megabytes, 2 * megabytes], graphs=dict(train=1, eval=2), kernels=50,
        attention=["_scaled_dot_product_flash_attention.default"], dtype="torch.bfloat16", waits={},
    )  # fmt: skip


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """pretend(found, *words) -> exit code of run.py where each check finds this, with a table of its own."""
    table = tmp_path / "records/benchmarks/table.json"
    table.parent.mkdir(parents=True)
    monkeypatch.setattr(pretend_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(pretend_gpu, "KEPT", table)
    monkeypatch.setattr(pretend_gpu, "describe_versions", lambda: dict(commit="abc"))

    def call(found: dict, *words: str) -> int:
        checked = []

        def check(card: str, preset: str) -> dict:
            checked.append(f"{card} {preset}")
            return found

        monkeypatch.setattr(pretend_gpu, "check", check)
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        code = pretend_gpu.main()
        call.checked = checked
        return code

    call.table = table
    return call


def test_a_table_is_kept_compared_and_kept_from_what_is_broken(pretend):
    words = ("9.0", "7.5", "--presets", "baseline,lower_lr")
    assert pretend(counted(), *words) == 1, "nothing is kept yet"
    assert pretend(counted(), *words, "--write") == 0
    assert pretend.checked == ["9.0 baseline", "7.5 baseline"], "the same graphs are counted once"
    kept = json.loads(pretend.table.read_text())
    assert sorted(kept) == ["7.5 baseline", "7.5 lower_lr", "9.0 baseline", "9.0 lower_lr"]
    assert {row["counted_for"] for row in kept.values()} == {"baseline"}
    assert {row["versions"]["commit"] for row in kept.values()} == {"abc"}
    assert pretend(counted(1015.0), *words) == 0
    assert pretend(counted(1030.0), *words) == 1
    assert pretend(counted(1000.0, wrong=("a graph was compiled again",)), *words) == 1
    assert pretend(counted(9000.0, wrong=("a graph was compiled again",)), *words, "--write") == 1
    assert pretend(dict(wrong=["exit code 1: nothing said"]), *words, "--write") == 1
    assert json.loads(pretend.table.read_text()) == kept, "what fails a check is not kept"


def test_the_table_that_is_kept_is_sound():
    """Of each card and preset: no promise broken, fused attention alone, and no wait in a plain step but the
    one of float16, which must know whether a gradient has overflown."""
    kept = json.loads((ROOT / "records/benchmarks/pretend_gpu.json").read_text())
    assert {place.split()[0] for place in kept} == set(pretend_gpu.CARDS)
    for place, row in kept.items():
        card, preset = place.split()
        assert preset in pretend_gpu.preset_names() and row["wrong"] == [], place
        assert all(megabytes > 1000 for megabytes in row["megabytes"]), place
        assert sum(row["waits"].values()) == (card == "7.5"), place
        assert row["dtype"] == ("torch.float16" if card == "7.5" else "torch.bfloat16"), place
        assert not any("math" in name for name in row["attention"]), place
        assert row["versions"]["torch"] == "2.13.0" and len(row["versions"]["commit"]) == 10, place
        twin = f"{card} {row.get('counted_for', preset)}"
        assert kept[twin]["megabytes"] == row["megabytes"], place


def test_peak_memory_is_told_in_mib(monkeypatch):
    """Linux counts the resident set in KiB, CUDA counts bytes."""
    usage = SimpleNamespace(ru_maxrss=3 * 1024**2 + 1)
    monkeypatch.setattr(train_gpt.resource, "getrusage", lambda who: usage)
    assert Runtime().peak_memory_mib() == (3072, 3072)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**33 + 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**34 - 1)
    assert Runtime(device=torch.device("cuda")).peak_memory_mib() == (8192, 16383)
