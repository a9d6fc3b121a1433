"""Checks of a run on a GPU: one line each, JSON at the end. tests/gpu.sh says how it is called.

The numbers of LIMITS are first guesses until they have been calibrated on a card; `calibrated` in the JSON
says which. Checks in this process use a small model; those of whole runs start the script as a user does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import torch  # noqa: E402

import train_gpt  # noqa: E402
from tests.as_users_run import embedded_corpus, environment, knobs_of, read_events  # noqa: E402
from train_gpt import (  # noqa: E402
    GPT,
    MODEL_FILE,
    PREEMPTED,
    Config,
    Optimisers,
    Run,
    RunLog,
    Runtime,
    plan_step,
    training_loss,
)

# How far numbers may be apart; relative, but for the scores (bpb).
LIMITS = dict(
    fp32_loss=1e-5,
    fp32_gradient=1e-3,
    bf16_loss=5e-3,
    bf16_gradient=0.1,  # 0.018 on a CPU; a wrong attention moves it by 1.6 and the loss by 0.002
    compiled_loss=2e-3,
    compiled_gradient=5e-2,
    micro_batch_loss=1e-3,
    resumed_bpb=5e-3,
    hedge_nats=1e-6,
    ranks_loss=5e-3,
)
CALIBRATED = False  # on no card yet

SMALL = dict(
    vocab_size=1024, num_layers=4, model_dim=256, num_heads=4, num_kv_heads=2, train_seq_len=256,
    train_batch_tokens=4096, iterations=100, seed=7,
)  # fmt: skip
WHOLE_RUN = """
    NUM_LAYERS=3 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=16384
    ITERATIONS=40 WARMDOWN_ITERS=10 MUON_MOMENTUM_WARMUP_STEPS=10 WARMUP_STEPS=3 MAX_WALLCLOCK_SECONDS=0
    VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=1
"""
# Of the self-test on a CPU, where a check of whole runs takes seconds.
CPU_RUN = """
    NUM_LAYERS=2 MODEL_DIM=64 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=2048 COMPILE=0
"""
CPU_SMALL = dict(num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1, train_seq_len=128)
CPU_BACKEND = "aot_eager"  # graphs that run eagerly: to write C++ would take a minute on a busy machine
# There only check_depths makes graphs, and a sitecustomize.py leaves the compiling away, of minutes.
GRAPHS_ALONE = """
import torch

compile = torch.compile


def compile_graphs(function, **settings):
    return compile(function, **settings | dict(backend="eager"))


torch.compile = compile_graphs
"""
# Each rank of a run appends a line a step of each optimiser to weights.RANK: a hash of what it trains.
WEIGHT_HASHES = """
import hashlib
import os

from torch.optim.optimizer import register_optimizer_step_post_hook


def note(optimiser, *given):
    sha256 = hashlib.sha256()
    for group in optimiser.param_groups:
        for weight in group["params"]:
            sha256.update(weight.detach().cpu().numpy().tobytes())
    with open("weights." + os.environ["RANK"], "a") as file:
        print(type(optimiser).__name__, sha256.hexdigest(), file=file)


register_optimizer_step_post_hook(note)
"""
PATIENCE = 900  # seconds that a whole run may take on a busy machine; on a card it takes less than one minute
BEST = "NUM_KV_HEADS=2 PARALLEL_BLOCK=1 MLP_ACT=silu2 ENCODER_LAYERS=0 TIE_EMBEDDINGS=0 XSA_LAST_N=-1"
OFFICIAL_TOKENS = 65_536  # that a card computes at a time
H100_FLOPS = 989e12  # dense bf16 products a second, by NVIDIA's data sheet


class NotHere(Exception):
    """A check that this machine cannot make; its text says what it needs."""


@dataclass
class Verdict:
    """What a check found."""

    is_good: bool
    text: str
    numbers: dict


@dataclass
class Lab:
    """What the checks run on."""

    device: torch.device
    folder: Path
    data: dict[str, str]
    official: Path | None = None
    processes: list[subprocess.Popen] = field(default_factory=list)  # all that were started

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def size(self) -> dict[str, int]:
        """What the model of the checks in this process has other than SMALL."""
        return {} if self.is_cuda else CPU_SMALL

    @property
    def batch_tokens(self) -> int:
        """TRAIN_BATCH_TOKENS of the whole runs."""
        words = WHOLE_RUN if self.is_cuda else CPU_RUN
        return int(knobs_of(words)["TRAIN_BATCH_TOKENS"])

    def need_cuda(self) -> None:
        if not self.is_cuda:
            raise NotHere("needs a card")

    def need_ranks(self) -> int:
        """How many ranks a run can have here: one for each card, two on a CPU; NotHere if that is one."""
        ranks = torch.cuda.device_count() if self.is_cuda else 2
        if ranks < 2:
            raise NotHere("needs two cards")
        return ranks

    def start_with(self, code: str) -> dict[str, str]:
        """Environment of a run whose Pythons begin with this code."""
        site = self.folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(code)
        return dict(PYTHONPATH=str(site))

    def end_runs(self) -> None:
        """Kill what a check has left running when it failed."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
        self.processes.clear()

    def whole_run(self, name: str, words: str = "", ranks: int = 1, expected: int = 0, **more: str) -> Path:
        """Run the script to its end in a folder of its own; AssertionError unless it ends with this code."""
        out = self.folder / name
        process = self.start_run(out, words, ranks, **more)
        code = process.wait(PATIENCE)
        last = (out / "output").read_text().strip().splitlines()[-1:]
        assert code == expected, f"{name}: exit code {code}, not {expected}: {' '.join(last)[:300]}"
        return out

    def start_run(self, out: Path, words: str = "", ranks: int = 1, **more: str) -> subprocess.Popen:
        """Start the script in this folder, under torchrun with so many ranks or, with 0, alone."""
        out.mkdir(parents=True, exist_ok=True)
        size = WHOLE_RUN if self.is_cuda else WHOLE_RUN + CPU_RUN
        env = environment(f"{size} {words}", self.data)
        env |= dict(OUT_DIR=str(out), DEVICE=self.device.type) | more
        if not self.is_cuda:
            env["OMP_NUM_THREADS"] = "1"  # threads of a small model wait for each other on a busy machine
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *(torchrun if ranks else []), str(ROOT / "train_gpt.py")]
        with (out / "output").open("a") as output:
            process = subprocess.Popen(command, cwd=out, env=env, stdout=output, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process


# -- In this process -------------------------------------------------------------------------------------


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-30)


def relative_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| of two flat tensors."""
    difference = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
    return difference.item()


def one_pass(
    device: torch.device, dtype: torch.dtype, compiles: bool, **knobs
) -> tuple[float, torch.Tensor, bool]:
    """Loss and flat gradient of one training pass of the small model, and whether every gradient is still a
    view of the optimisers' buffer after it."""
    cfg = replace(Config(), **SMALL | knobs)
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, dtype)
    # At its start the model's output is nearly zero, whatever is wrong in it.
    for param in model.parameters():
        param.data += 0.1 * torch.randn_like(param)
    backend = "inductor" if device.type == "cuda" else CPU_BACKEND
    runtime = Runtime(device, dtype=dtype, compiles=compiles, backend=backend)
    model.to(device)
    optimisers = Optimisers(cfg, model, runtime)
    optimisers.flat.zero_()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(cfg.vocab_size, (8, cfg.train_seq_len + 1), generator=generator).to(device)
    loss = runtime.compile(training_loss(cfg, model))
    dials = plan_step(cfg, 0, 0.0, 0.0).dials(device)
    objective, _ = loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), dials, -1)
    objective.backward()
    start = optimisers.flat.untyped_storage().data_ptr()
    are_views = all(param.grad.untyped_storage().data_ptr() == start for param in optimisers.trained)
    return objective.item(), optimisers.flat.cpu(), are_views


def compare_passes(
    lab: Lab, first: Callable, second: Callable, loss_limit: str, gradient_limit: str
) -> Verdict:
    first_loss, first_gradient, _ = first()
    second_loss, second_gradient, are_views = second()
    loss_apart = relative(second_loss, first_loss)
    gradient_apart = relative_norm(second_gradient, first_gradient)
    is_near = loss_apart <= LIMITS[loss_limit] and gradient_apart <= LIMITS[gradient_limit]
    text = f"loss {loss_apart:.1e}, gradient {gradient_apart:.1e} apart"
    text += "" if are_views else "; a gradient has left the buffer"
    return Verdict(is_near and are_views, text, dict(loss_apart=loss_apart, gradient_apart=gradient_apart))


def check_fp32(lab: Lab) -> Verdict:
    """float32 on the CPU against float32 here: losses and gradients."""
    on_cpu = partial(one_pass, torch.device("cpu"), torch.float32, False, **lab.size)
    here = partial(one_pass, lab.device, torch.float32, False, **lab.size)
    return compare_passes(lab, on_cpu, here, "fp32_loss", "fp32_gradient")


def check_bf16(lab: Lab) -> Verdict:
    """bfloat16 against float32, both here: losses and gradients."""
    exact = partial(one_pass, lab.device, torch.float32, False, **lab.size)
    half = partial(one_pass, lab.device, torch.bfloat16, False, **lab.size)
    return compare_passes(lab, exact, half, "bf16_loss", "bf16_gradient")


def check_compiled(lab: Lab) -> Verdict:
    """Compiled against eager; gradients stay views of the flat buffer after a compiled backward pass."""
    eager = partial(one_pass, lab.device, torch.bfloat16, False, **lab.size)
    compiled = partial(one_pass, lab.device, torch.bfloat16, True, **lab.size)
    return compare_passes(lab, eager, compiled, "compiled_loss", "compiled_gradient")


def check_documents(lab: Lab) -> Verdict:
    """Rows of several documents: compiled, which takes FlexAttention, against eager, which takes a mask."""
    # Of 64 pieces one in 64 begins a document, so that a row holds some.
    packed = lab.size | dict(pack_documents=True, vocab_size=64)
    eager = partial(one_pass, lab.device, torch.bfloat16, False, **packed)
    compiled = partial(one_pass, lab.device, torch.bfloat16, True, **packed)
    return compare_passes(lab, eager, compiled, "compiled_loss", "compiled_gradient")


def check_attention(lab: Lab) -> Verdict:
    """The attention kernel, for long and short rows and grouped heads, against float64 on the CPU."""
    worst = 0.0
    for heads, key_heads, length in ((8, 4, 1024), (8, 8, 256), (8, 2, 130), (4, 4, 17)):
        generator = torch.Generator().manual_seed(length)
        q = torch.randn(2, heads, length, 64, generator=generator)
        k = torch.randn(2, key_heads, length, 64, generator=generator)
        v = torch.randn(2, key_heads, length, 64, generator=generator)
        inputs = [x.to(lab.device, torch.bfloat16) for x in (q, k, v)]
        exact = train_gpt.attend(*(x.cpu().double() for x in inputs))
        found = train_gpt.attend(*inputs).cpu().double()
        worst = max(worst, (found - exact).abs().max().item())
    return Verdict(worst < 0.03, f"off by {worst:.1e} at the most", dict(worst=worst))


def check_no_waits(lab: Lab) -> Verdict:
    """Plain steps under torch's sync debug mode: the host never waits for the card."""
    lab.need_cuda()
    cfg = replace(Config(), **SMALL)
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, torch.bfloat16).to(lab.device)
    runtime = Runtime(lab.device, dtype=torch.bfloat16, compiles=True)
    run = Run(cfg, runtime, RunLog(None, ""), model, None)
    optimisers = Optimisers(cfg, model, runtime)
    ids = torch.randint(cfg.vocab_size, (16, cfg.train_seq_len)).pin_memory()
    for step in range(6):
        if step == 3:  # the first ones compile and make states
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_gpt.train_step(run, optimisers, (ids, ids), plan_step(cfg, step, 0.0, 0.0), 16)
        finally:
            if step == 5:
                torch.cuda.set_sync_debug_mode("default")
    return Verdict(True, "three steps without one", {})


def check_hedge(lab: Lab) -> Verdict:
    """The mixer here against the mixer on the CPU, token by token."""
    cfg = replace(Config(), **SMALL)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(50, (60_001,), generator=generator)
    nats = torch.rand(60_000, generator=generator, dtype=torch.float64) * 6
    exact = train_gpt.mix_with_ngrams(cfg, tokens, nats.clone()).log_probs
    here = train_gpt.mix_with_ngrams(cfg, tokens.to(lab.device), nats.to(lab.device)).log_probs
    apart = (here.cpu() - exact).abs().max().item()
    return Verdict(apart <= LIMITS["hedge_nats"], f"{apart:.1e} nats apart", dict(apart=apart))


def check_hedge_forecast(lab: Lab) -> Verdict:
    """What the mixer foretells of 4 M targets, within a factor 2."""
    lab.need_cuda()  # the clock of a CPU that others use says nothing
    cfg = replace(Config(), **SMALL)
    targets = 4_000_000
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(50, (targets + 1,), generator=generator).to(lab.device)
    nats = torch.rand(targets, generator=generator, dtype=torch.float64).to(lab.device) * 6
    fixed, of_each = train_gpt.foretell_mixture(cfg, tokens, nats)
    foretold = fixed + targets * of_each
    began = time.perf_counter()
    train_gpt.mix_with_ngrams(cfg, tokens, nats)
    seconds = time.perf_counter() - began
    text = f"{foretold:.2f} s foretold, {seconds:.2f} s taken"
    return Verdict(0.5 <= foretold / seconds <= 2.0, text, dict(foretold=foretold, seconds=seconds))


# -- Whole runs ------------------------------------------------------------------------------------------


def result_of(out: Path) -> dict:
    lines = (out / "output").read_text().splitlines()
    results = [line for line in lines if line.startswith("RESULT ")]
    return json.loads(results[-1].removeprefix("RESULT "))


def step_losses(out: Path) -> dict[int, float]:
    return {event["step"]: event["train_loss"] for event in read_events(out) if event["event"] == "step"}


def furthest(a: dict[int, float], b: dict[int, float]) -> float:
    """The largest relative distance of two runs' losses; infinite if they have other steps."""
    if a.keys() != b.keys() or not a:
        return math.inf
    return max(relative(a[step], b[step]) for step in a)


def check_depths(lab: Lab) -> Verdict:
    """Three depths with LAYER_DROP and validations on the way: no graph is made inside the clock."""
    knobs = "NUM_REPEATS=3 PROG_DEPTH=0.35:1,0.65:2,1.0:3 LAYER_DROP=0.2 VAL_LOSS_EVERY=10 COMPILE=1 RUN_ID=r"
    out = lab.whole_run("depths", knobs, **({} if lab.is_cuda else lab.start_with(GRAPHS_ALONE)))
    events = read_events(out)
    compiles = [event["compile"] for event in events if event["event"] == "env"]
    switches = sum(event["event"] == "phase" for event in events)
    late = re.findall(r"(\d+) graphs were compiled inside the clock", (out / "output").read_text())
    assert compiles == [True], "it ran uncompiled"
    text = f"{switches} switches, {' '.join(late) or 'no'} late graphs"
    return Verdict(switches == 2 and not late, text, dict(late_graphs=sum(map(int, late))))


def check_micro_batches(lab: Lab) -> Verdict:
    """The same run in passes of 64, 32 and 16 sequences (16 and 4 on a CPU)."""
    losses = []
    for part in (1, 2, 4) if lab.is_cuda else (1, 4):
        tokens = lab.batch_tokens // part
        out = lab.whole_run(f"micro{tokens}", f"MICRO_BATCH_TOKENS={tokens} ITERATIONS=10 RUN_ID=r")
        losses.append(step_losses(out))
    apart = max(furthest(losses[0], other) for other in losses[1:])
    return Verdict(apart <= LIMITS["micro_batch_loss"], f"losses {apart:.1e} apart", dict(apart=apart))


def check_out_of_memory(lab: Lab) -> Verdict:
    """With too little memory for the default pass it is halved, and the run ends with 0."""
    lab.need_cuda()
    knobs = "TRAIN_BATCH_TOKENS=262144 MICRO_BATCH_TOKENS=262144 ITERATIONS=4 RUN_ID=r COMPILE=0"
    need = result_of(lab.whole_run("memory", knobs))["peak_memory_mib"]
    total = torch.cuda.mem_get_info()[1] / 2**20
    share = 0.55 * need / total
    limit = f"import torch; torch.cuda.set_per_process_memory_fraction({share})"
    out = lab.whole_run("less_memory", knobs, **lab.start_with(limit))
    halved = "out of memory, micro-batch is now" in (out / "output").read_text()
    return Verdict(halved, f"needs {need} MiB, had {share * total:.0f}", dict(need_mib=need))


def wait_for_step(out: Path, process: subprocess.Popen, step: int) -> None:
    """Until a run's log has this step; AssertionError if it ends before it, or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not any(event["event"] == "step" and event["step"] >= step for event in read_events(out)):
        assert process.poll() is None, f"it ended before step {step}"
        assert time.monotonic() < deadline, f"no step {step} after {PATIENCE} s"
        time.sleep(0.01)


def check_stop_and_resume(lab: Lab) -> Verdict:
    """A run that SIGTERM stops in its middle goes on to the score of one that was left alone."""
    whole = lab.whole_run("whole", "RUN_ID=r")
    out = lab.folder / "stopped"
    process = lab.start_run(out, "RUN_ID=r", ranks=0)
    wait_for_step(out, process, 12)
    process.send_signal(signal.SIGTERM)
    code = process.wait(PATIENCE)
    assert code == PREEMPTED, f"exit code {code} after SIGTERM, not {PREEMPTED}"
    lab.whole_run("stopped", "RUN_ID=r", ranks=0, RESUME="auto")
    went_on = [event["step"] for event in read_events(out) if event["event"] == "resumed"]
    assert len(went_on) == 1 and went_on[0] >= 12, f"resumed from steps {went_on}"
    apart = abs(result_of(out)["val_bpb"] - result_of(whole)["val_bpb"])
    text = f"resumed from step {went_on[0]}, {apart:.1e} bpb apart"
    return Verdict(apart <= LIMITS["resumed_bpb"], text, dict(apart=apart))


def check_scores(lab: Lab) -> Verdict:
    """All scores with SCORE_CHECK; and the artifact scored again in a new process, equal in every digit."""
    knobs = "EVAL_STRIDE=64 USE_HEDGE=1 TTT_STEPS=1 TTT_CHUNK_TOKENS=8192 RUN_ID=r"
    out = lab.whole_run("scores", f"{knobs} SCORE_CHECK=1")
    first = result_of(out)
    again = result_of(lab.whole_run("scores_again", f"{knobs} EVAL_ONLY={out / MODEL_FILE}"))
    names = [f"{name}_val_bpb" for name in ("roundtrip", "sliding", "ttt", "hedge")]
    apart = max(abs(first[name] - again[name]) for name in names)
    tried = (out / "output").read_text().count("score_check: ")
    is_good = apart == 0.0 and tried == len(names)
    text = f"{len(names)} scores, {apart:.1e} bpb apart, {tried} tried for legality"
    return Verdict(is_good, text, dict(apart=apart))


def check_best(lab: Lab) -> Verdict:
    """The best recipe's architecture learns: well below a uniform guess after 40 steps."""
    result = result_of(lab.whole_run("best", f"{BEST} RUN_ID=r"))
    uniform = math.log(1024)
    return Verdict(
        result["val_loss"] < 0.85 * uniform,
        f"{result['val_loss']:.3f} nats a token, uniform {uniform:.3f}",
        dict(val_loss=result["val_loss"]),
    )


def check_torchrun(lab: Lab) -> Verdict:
    """Under torchrun with all cards (two ranks on a CPU): the losses of one rank, over nccl between cards."""
    ranks = torch.cuda.device_count() if lab.is_cuda else 2
    one = step_losses(lab.whole_run("one_rank", "RUN_ID=r ITERATIONS=20", ranks=0))
    many = step_losses(lab.whole_run("ranks", "RUN_ID=r ITERATIONS=20", ranks=ranks))
    apart = furthest(one, many)
    return Verdict(
        apart <= LIMITS["ranks_loss"],
        f"{ranks} ranks, losses {apart:.1e} apart",
        dict(ranks=ranks, apart=apart),
    )


def check_equal_weights(lab: Lab) -> Verdict:
    """After each of 20 steps all ranks have the same weights, bit by bit (two ranks on a CPU)."""
    ranks = lab.need_ranks()
    knobs = "RUN_ID=r ITERATIONS=20 WARMUP_STEPS=0"
    out = lab.whole_run("equal_weights", knobs, ranks=ranks, **lab.start_with(WEIGHT_HASHES))
    lines = [(out / f"weights.{rank}").read_text().splitlines() for rank in range(ranks)]
    updates = len(lines[0])
    unequal = [at for at, hashes in enumerate(zip_longest(*lines)) if len(set(hashes)) > 1]
    text = f"{ranks} ranks, {updates} updates in 20 steps, {len(unequal)} with other weights on a rank"
    return Verdict(updates == 40 and not unequal, text, dict(ranks=ranks, unequal=len(unequal)))


def check_lost_rank(lab: Lab) -> Verdict:
    """A rank that is killed ends the run with an error, not a hang."""
    lab.need_ranks()
    out = lab.folder / "lost"
    process = lab.start_run(out, "RUN_ID=r ITERATIONS=100000", ranks=2)
    wait_for_step(out, process, 5)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    began = time.monotonic()
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    code = process.wait(120)
    seconds = time.monotonic() - began
    return Verdict(code == 1, f"exit code {code} after {seconds:.0f} s", dict(seconds=seconds))


# -- Speed -----------------------------------------------------------------------------------------------


def products_per_token(cfg: Config, model: GPT) -> float:
    """Floating-point operations a token of forward and backward: 6 a weight, and attention's 12 L d T / 2."""
    weights = sum(param.numel() for param in model.parameters())
    layers = cfg.phases[-1].depth
    return 6 * weights + 6 * layers * cfg.model_dim * cfg.train_seq_len


def time_steps(lab: Lab, cfg: Config) -> tuple[float, GPT]:
    """Milliseconds of a compiled step of 65,536 tokens in bfloat16, the median of 30; and its model."""
    cfg = replace(cfg, train_batch_tokens=OFFICIAL_TOKENS)
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, torch.bfloat16).to(lab.device)
    runtime = Runtime(lab.device, dtype=torch.bfloat16, compiles=True)
    run = Run(cfg, runtime, RunLog(None, ""), model, None)
    optimisers = Optimisers(cfg, model, runtime)
    sequences = OFFICIAL_TOKENS // cfg.train_seq_len
    ids = torch.randint(cfg.vocab_size, (sequences, cfg.train_seq_len)).pin_memory()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = []
    for step in range(40):
        plan = plan_step(cfg, step, 0.0, 0.0)
        torch.cuda.synchronize()
        began = time.perf_counter()
        train_gpt.train_step(run, optimisers, (ids, ids), plan, sequences)
        torch.cuda.synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - began))
    return sorted(milliseconds[10:])[15], model


def check_speed(lab: Lab) -> Verdict:
    """Milliseconds of a step at the official shape (9 x 512, 65,536 tokens a card), MFU and peak memory."""
    lab.need_cuda()
    cfg = Config()
    median, model = time_steps(lab, cfg)
    utilisation = products_per_token(cfg, model) * OFFICIAL_TOKENS / (median / 1e3) / H100_FLOPS
    peak = torch.cuda.max_memory_allocated() // 2**20
    text = f"{median:.1f} ms a step, {utilisation:.1%} of an H100's products, peak {peak} MiB"
    return Verdict(True, text, dict(step_ms=median, mfu_of_h100=utilisation, peak_mib=peak))


def check_fused_mlp(lab: Lab) -> Verdict:
    """FUSED_MLP on against off, compiled: losses, gradients, and a step of the official shape both ways."""
    lab.need_cuda()
    numbers = {}
    is_good = True
    for knobs in (dict(mlp_act="relu2"), dict(mlp_act="leaky_relu2", leaky_slope=0.5)):
        plain = partial(one_pass, lab.device, torch.bfloat16, True, **knobs)
        fused = partial(plain, fused_mlp=True)
        verdict = compare_passes(lab, plain, fused, "compiled_loss", "compiled_gradient")
        is_good = is_good and verdict.is_good
        numbers |= {f"{knobs['mlp_act']}_{name}": value for name, value in verdict.numbers.items()}
    for name, is_fused in (("plain", False), ("fused", True), ("plain_again", False)):
        numbers[f"{name}_ms"], _ = time_steps(lab, replace(Config(), fused_mlp=is_fused))
    loss_apart = max(value for name, value in numbers.items() if name.endswith("loss_apart"))
    gradient_apart = max(value for name, value in numbers.items() if name.endswith("gradient_apart"))
    times = ", ".join(f"{name} {numbers[f'{name}_ms']:.1f} ms" for name in ("plain", "fused", "plain_again"))
    text = f"loss {loss_apart:.1e}, gradient {gradient_apart:.1e} apart at the most; a step {times}"
    return Verdict(is_good, text, numbers)


def check_official(lab: Lab) -> Verdict:
    """Milliseconds of the official script's step, whose path is given, on the same data."""
    lab.need_cuda()
    if lab.official is None:
        raise NotHere("needs --official")
    env = environment("", lab.data) | dict(ITERATIONS="60", VAL_LOSS_EVERY="0", TRAIN_LOG_EVERY="20")
    env |= dict(MAX_WALLCLOCK_SECONDS="0", TRAIN_BATCH_TOKENS=str(8 * OFFICIAL_TOKENS), RUN_ID="official")
    done = subprocess.run(
        [sys.executable, str(lab.official)],
        cwd=lab.folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    averages = [line.partition("step_avg:")[2] for line in done.stdout.splitlines() if "step_avg:" in line]
    assert averages, f"exit code {done.returncode}, no step: {done.stderr.strip()[-200:]}"
    step_ms = float(averages[-1].split("ms")[0]) / 8  # it accumulates over 8 passes of 65,536 tokens
    return Verdict(True, f"{step_ms:.1f} ms for 65,536 tokens", dict(step_ms=step_ms))


CHECKS: dict[str, Callable[[Lab], Verdict]] = dict(
    fp32=check_fp32,
    bf16=check_bf16,
    attention=check_attention,
    compiled=check_compiled,
    documents=check_documents,
    no_waits=check_no_waits,
    hedge=check_hedge,
    hedge_forecast=check_hedge_forecast,
    speed=check_speed,
    fused_mlp=check_fused_mlp,
    official=check_official,
    depths=check_depths,
    micro_batches=check_micro_batches,
    out_of_memory=check_out_of_memory,
    stop_and_resume=check_stop_and_resume,
    scores=check_scores,
    best=check_best,
    torchrun=check_torchrun,
    equal_weights=check_equal_weights,
    lost_rank=check_lost_rank,
)


def describe(lab: Lab) -> dict:
    """Card, driver and versions."""
    about = dict(torch=torch.__version__, python=platform.python_version(), calibrated=CALIBRATED)
    if not lab.is_cuda:
        return about | dict(device="cpu")
    _, driver = train_gpt.nvidia_gpu({})
    return about | dict(
        device=torch.cuda.get_device_name(),
        cards=torch.cuda.device_count(),
        driver=driver,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        attention=train_gpt.describe_machine(Runtime(lab.device, dtype=torch.bfloat16))["attention"],
    )


def make_check(name: str, lab: Lab) -> dict:
    """Make one check and print its line."""
    began = time.monotonic()
    try:
        verdict = CHECKS[name](lab)
        word = "ok" if verdict.is_good else "FAIL"
        found = dict(check=name, verdict=word, text=verdict.text, **verdict.numbers)
    except NotHere as reason:
        found = dict(check=name, verdict="skip", text=f"skipped: {reason}")
    except Exception as error:  # whatever breaks is what it looks for
        found = dict(
            check=name, verdict="FAIL", text=f"{type(error).__name__}: {error}".splitlines()[0][:400]
        )
    lab.end_runs()
    found["seconds"] = round(time.monotonic() - began, 1)
    print(f"{found['verdict']:5s}{name:16s}{found['text']} ({found['seconds']:.0f} s)", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"default all: {' '.join(CHECKS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--official", type=Path, help="the official train_gpt.py, to be timed beside ours")
    parser.add_argument("--json", type=Path, help="file for what was found; it is printed in any case")
    wanted = parser.parse_args()
    unknown = [name for name in wanted.checks if name not in CHECKS]
    if unknown:
        parser.error(f"no check {unknown[0]}; there are {' '.join(CHECKS)}")
    if wanted.device == "cuda" and not torch.cuda.is_available():
        print("gpu.sh: torch sees no CUDA device here; nothing was checked", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if wanted.device == "cuda" else torch.device("cpu")
    train_gpt.use_fused_attention(device, deterministic=False)
    if device.type == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="gpu_checks-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        lab = Lab(device, folder, embedded_corpus(folder / "data"), wanted.official)
        about = describe(lab)
        print(" ".join(f"{key}:{value}" for key, value in about.items()), flush=True)
        found = [make_check(check, lab) for check in wanted.checks or CHECKS]
    report = json.dumps(dict(about=about, checks=found), indent=1)
    print(report)
    if wanted.json:
        wanted.json.write_text(report + "\n")
    verdicts = {check["verdict"] for check in found}
    if "FAIL" in verdicts:
        return 1
    return 0 if "ok" in verdicts else 2  # where all were skipped, nothing has passed


if __name__ == "__main__":
    sys.exit(main())
