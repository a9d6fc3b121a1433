"""Milliseconds a step on 1 to 32 GPUs, on paper: counted FLOPs, counted bytes, named assumptions.

    python sweeps/scale.py                                  the baseline, and how far the model is right
    python sweeps/scale.py progressive_depth MODEL_DIM=768  another preset, other sizes
    python sweeps/scale.py --gpu H200 --plan official --gpus 8 16 32

A step is the products of one rank's sequences at a fraction of the peak, then what of the communication is
not hidden behind them. The fraction is FITTED: it makes the official script's step 43.54 ms on 8xH100. All
else in the table of published runs is predicted from that one number, and the errors are printed.

Not in the model: the memory's bandwidth, and that small shares of a batch reach a smaller fraction (kernels
get too short for the host that starts them). So beyond 8 GPUs it is a bound from below.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import train_gpt
from data.user_error import UserError
from sweeps.lab.show import step_flops
from sweeps.lab.wave_spec import Sizes, preset_env


@dataclass(frozen=True)
class Machine:
    """A node of eight GPUs and the network between nodes. Rates are a GPU's, one way, bytes a second."""

    peak: float  # dense bf16 FLOP/s: NVIDIA's data sheets (989 TFLOP/s for H100 SXM and H200)
    nvlink: float = 450e9  # NVLink 4: 900 GB/s both ways (data sheet)
    network: float = 50e9  # assumed: one 400 Gb/s port a GPU, as in DGX H100
    achieved: float = 0.6  # assumed: share of a link's rate that a collective of tens of MB reaches
    latency: float = 20e-6  # assumed: seconds to start a collective
    hop: float = 3e-6  # assumed: seconds each step of a ring takes at least
    gpus_a_node: int = 8


MACHINES = {"H100": Machine(989e12), "H200": Machine(989e12)}  # they differ in memory alone
BANDWIDTH = {"H100": 3.35, "H200": 4.8}  # TB/s, data sheets


@dataclass(frozen=True)
class Plan:
    """What a step sends. Bytes a weight; exposed: the share of the gradient's time that nothing hides."""

    gradient: float  # bytes a trained weight
    update: float  # bytes a matrix weight of Muon's
    exposed: float
    sharded: bool = False  # reduce-scatter and all-gather, half an all-reduce each


PLANS = dict(
    # DistributedDataParallel: float32 gradients in buckets, behind the backward pass; assumed: 0.1 is seen.
    official=Plan(gradient=4, update=2, exposed=0.1),
    # One float32 buffer after the backward pass, then Muon's updates in float32; both are waited for.
    here=Plan(gradient=4, update=4, exposed=1),
    # bfloat16 both ways, each rank reduces only the matrices it steps; half hidden. What could be had.
    sharded=Plan(gradient=2, update=2, exposed=0.5, sharded=True),
)


@dataclass(frozen=True)
class Work:
    """What a step must do, whoever does it."""

    flops: float  # forward and backward, all tokens
    orthogonal: float  # Muon's Newton-Schulz, all matrices
    weights: int
    matrices: int  # weights in Muon's matrices
    largest: float  # the largest matrix's part of `orthogonal`: one rank does it alone
    sequences: int


def work_of(knobs: Mapping[str, str]) -> Work:
    """Counted on a model that takes no memory."""
    cfg = train_gpt.Config.from_env(knobs)
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    weights = train_gpt.weights_of(cfg, model)
    shapes = [sorted(w.param.shape) for w in weights if w.role == "matrix"]
    each = [cfg.muon_backend_steps * (4.0 * r * r * c + 2.0 * r**3) for r, c in shapes]  # r <= c
    counts = sum(w.param.numel() for w in weights), sum(r * c for r, c in shapes)
    return Work(step_flops(cfg, model), sum(each), *counts, max(each, default=0.0), cfg.sequences)


def all_reduce(bytes_: float, gpus: int, machine: Machine) -> float:
    """Seconds of a ring all-reduce: within a node, then of an eighth between nodes, then within again."""
    inside = min(gpus, machine.gpus_a_node)
    nodes = math.ceil(gpus / machine.gpus_a_node)
    seconds = machine.latency if gpus > 1 else 0.0
    for members, size, rate in ((inside, bytes_, machine.nvlink), (nodes, bytes_ / inside, machine.network)):
        steps = 2 * (members - 1)
        seconds += steps * (size / members / (machine.achieved * rate) + machine.hop)
    return seconds


def communication(work: Work, gpus: int, machine: Machine, plan: Plan) -> float:
    """Seconds that a step waits for other ranks."""
    gradient = all_reduce(plan.gradient * work.weights, gpus, machine)
    update = all_reduce(plan.update * work.matrices, gpus, machine)
    return plan.exposed * (gradient + update) / 2 if plan.sharded else plan.exposed * gradient + update


def compute(work: Work, gpus: int, machine: Machine, fraction: float) -> float:
    """Seconds of the slowest rank: its sequences, and its share of Muon's matrices, which cannot be split."""
    sequences = math.ceil(work.sequences / gpus) / work.sequences
    orthogonal = max(work.orthogonal / gpus, work.largest)
    return (work.flops * sequences + orthogonal) / (machine.peak * fraction)


def step_ms(work: Work, gpus: int, machine: Machine, plan: Plan, fraction: float) -> float:
    return 1000 * (compute(work, gpus, machine, fraction) + communication(work, gpus, machine, plan))


def fitted_fraction(work: Work, gpus: int, machine: Machine, plan: Plan, ms: float) -> float:
    """The fraction of the peak at which the model gives these milliseconds."""
    return compute(work, gpus, machine, 1.0) / (ms / 1000 - communication(work, gpus, machine, plan))


# Runs of the official script or its near descendants: (what, GPU, number, knobs, step_avg of the log in ms).
# Folders of openai/parameter-golf's records at commit 4908dc4; then two depths of PR #895's 4-hour run.
DEPTH = dict(NUM_LAYERS="3", MODEL_DIM="832", NUM_VALUE_EMBEDS="2")
PUBLISHED = (
    ("NaiveBaseline", "H100", 8, {}, 43.54),
    ("LowerLR", "H200", 8, {}, 41.60),
    ("LoRA_TTT train_v1", "H100", 2, {}, 169.37),
    ("10L_MixedPrecision", "H200", 8, dict(NUM_LAYERS="10"), 45.78),
    ("LongContextSeq2048", "H100", 8, dict(TRAIN_SEQ_LEN="2048"), 51.89),
    ("TrainingOptSeq4096", "H100", 8, dict(TRAIN_SEQ_LEN="4096", TRAIN_BATCH_TOKENS="393216"), 71.47),
    ("PR #895, 2 repeats", "H100", 8, DEPTH | dict(NUM_REPEATS="2"), 72.1),
    ("PR #895, 5 repeats", "H100", 8, DEPTH | dict(NUM_REPEATS="5"), 173.3),
)


def published_rows(fraction: float) -> list[tuple[str, float, float]]:
    """(what, published ms, the model's ms) by the official plan; the first is the one that was fitted."""
    rows = []
    for name, gpu, gpus, knobs, ms in PUBLISHED:
        model = step_ms(work_of(knobs), gpus, MACHINES[gpu], PLANS["official"], fraction)
        rows.append((f"{name}, {gpus}x{gpu}", ms, model))
    return rows


def fraction_of_baseline() -> float:
    name, gpu, gpus, knobs, ms = PUBLISHED[0]
    return fitted_fraction(work_of(knobs), gpus, MACHINES[gpu], PLANS["official"], ms)


def print_published(fraction: float) -> None:
    print(f"{'published run':34} {'ms':>7} {'model':>7} {'error':>7}")
    for number, (what, ms, model) in enumerate(published_rows(fraction)):
        how = "fitted" if not number else f"{100 * (model / ms - 1):+.1f} %"
        print(f"{what:34} {ms:7.2f} {model:7.2f} {how:>7}")
    print(
        f"If only bandwidth made 8xH200 faster, {memory_bound_ms():.1f} of 43.54 ms wait for memory (fitted)."
    )


def memory_bound_ms() -> float:
    """Of the H100's step, what would shrink with the bandwidth to give the H200's: two runs, one unknown."""
    (*_, here), (*_, there) = PUBLISHED[:2]
    return (here - there) / (1 - BANDWIDTH["H100"] / BANDWIDTH["H200"])


def print_scaling(work: Work, machine: Machine, plans: list[str], sizes: list[int], fraction: float) -> None:
    """For each number of GPUs: compute alone, then each plan's step and its speed-up over one GPU."""
    print(f"\n{'GPUs':>4} {'compute':>8}" + "".join(f" {name + ' ms':>13} {'speed-up':>8}" for name in plans))
    for gpus in sizes:
        alone = 1000 * compute(work, gpus, machine, fraction)
        cells = ""
        for plan in (PLANS[name] for name in plans):
            one, ms = (step_ms(work, n, machine, plan, fraction) for n in (1, gpus))
            cells += f" {ms:13.2f} {one / ms:8.2f}"
        print(f"{gpus:4} {alone:8.2f}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("preset", nargs="?", default="baseline")
    add("knobs", nargs="*", metavar="KNOB=VALUE")
    add("--gpu", choices=MACHINES, default="H100")
    add("--plan", choices=PLANS, action="append", help="what is sent and when (default: all)")
    add("--fraction", type=float, help="of the peak that the products reach (default: fitted)")
    add("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24, 32], help="8 to a node")
    options = parser.parse_intermixed_args()
    try:
        knobs = preset_env(options.preset, Sizes()) | dict(pair.split("=", 1) for pair in options.knobs)
        work = work_of(knobs)
    except (train_gpt.RunError, UserError) as error:
        raise SystemExit(f"error: {error}") from None
    fraction = options.fraction or fraction_of_baseline()
    counted = f"{work.flops / 1e12:.1f} TFLOP a step, {work.orthogonal / 1e12:.2f} of Muon's"
    print(f"{counted}, {work.weights} weights")
    print(f"fraction of the peak: {fraction:.4f} ({'given' if options.fraction else 'fitted'})\n")
    print_published(fraction)
    print_scaling(work, MACHINES[options.gpu], options.plan or [*PLANS], options.gpus, fraction)
