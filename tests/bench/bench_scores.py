"""What each score costs: measured here in CPU seconds, or reckoned for GPUs from what its passes compute.

    python tests/bench/bench_scores.py measure baseline NUM_LAYERS=2 EVAL_STRIDE=64 --tokens 20000
    python tests/bench/bench_scores.py measure baseline EVAL_STRIDE=64 --weights final_model.pt --check 20
    python tests/bench/bench_scores.py reckon frontier --tokens 47851520 --gpus 8
    python tests/bench/bench_scores.py reckon frontier --official --sample 4

measure: random weights and tokens, or with --weights a model on the first tokens of its validation text, and
its bpb; seconds are those of the process (time.process_time), which other programs do not lengthen, beside
those of the clock. --check: SCORE_CHECK for so many seconds before. Made-up documents have lengths
exp(N(6.462, 0.897)), 957 tokens on average with 5 % above 2,800: fitted to what is told of the challenge's
text, not to the text itself.
reckon: takes the plans of all ranks, pass by pass, with their padding. Counted are the products of matrices,
forward, and backward where a pass learns: once more where the weights are frozen, twice where not; and, of a
LoRA for each document, the bytes of its factors, gradients and moments. Nothing else: no launches, no
elementwise work, no traffic between ranks; `--share` says which part of the peak the products reach. Ranks
meet after each turn, so the slowest one of each counts. Of Hedge and the tilt the seconds are those that
Hedge took on two threads of a CPU (sweeps/results/study_hedge.md): on a GPU they are fewer.
`--sample` plans one in so many documents, but for a LoRA for each document all: few groups would share badly.
`--official`: the four validation texts of the challenge, of 50,000 documents each, and whether all scores
together keep within MAX_EVAL_SECONDS.
Not a test: pytest does not collect it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt  # noqa: E402
from records.legality import check_own_scores  # noqa: E402
from tests.bench.bench_throughput import Sizes, commit, preset_env  # noqa: E402

H100_FLOPS = 989e12  # dense bf16 products a second (NVIDIA's data sheet)
H100_BYTES = 3.35e12  # a second
# Times that a LoRA's floats pass through memory in a step: AdamW reads weight, gradient and two moments and
# writes three (7), the pass scales B, casts both and reads them forward and backward (about 5), the gradient
# is set to zero and written (2).
LORA_PASSES = 14
# Seconds a million targets that Hedge takes on two threads of a CPU: 62 M in 163 s.
MIXTURE_SECONDS = 2.63
# Targets of the challenge's validation texts, by what made their tokens; each has 50,000 documents.
OFFICIAL_TARGETS = (62_000_000, 45_500_000, 40_500_000, 47_900_000)
OFFICIAL_DOCUMENTS = 50_000
MEAN_LENGTH = 957


def documents(tokens: int, seed: int = 0, mean: float = MEAN_LENGTH) -> np.ndarray:
    """First targets of documents but the first, in a text of so many targets."""
    rng = np.random.default_rng(seed)
    level = 6.462 + math.log(mean / MEAN_LENGTH)
    lengths = []
    while sum(lengths) < tokens:
        lengths += np.exp(rng.normal(level, 0.897, 1 + tokens // 900)).astype(int).clip(2).tolist()
    ends = np.cumsum(lengths)
    return ends[ends < tokens]


def text_of(cfg: train_gpt.Config, tokens: int, mean: float = MEAN_LENGTH) -> train_gpt.Validation:
    """Random tokens in documents of that kind."""
    stream = np.random.default_rng(0).integers(cfg.vocab_size, size=tokens + 1).astype(np.uint16)
    return train_gpt.Validation(stream, np.ones(tokens, np.int16), 1, "", documents(tokens, mean=mean))


def first_targets(cfg: train_gpt.Config, count: int) -> train_gpt.Validation:
    """The beginning of the validation text."""
    text = train_gpt.load_inputs(cfg, 0, trains=False).validation
    count = min(count, text.targets)
    return replace(
        text,
        tokens=text.tokens[: count + 1],
        target_bytes=text.target_bytes[:count],
        starts=text.starts[text.starts < count],
    )


def measure(knobs: dict[str, str], tokens: int, weights: str = "", check_seconds: float = 0.0) -> dict:
    """The JSON report of one round of every score that the knobs switch on."""
    cfg = replace(train_gpt.Config.from_env(knobs), max_eval_seconds=0.0)
    found = {}
    bpb = {}
    with train_gpt.Runtime.launch(cfg, {}) as runtime:
        torch.manual_seed(cfg.seed)
        model = train_gpt.GPT(cfg, runtime.dtype).to(runtime.device)
        data = first_targets(cfg, tokens) if weights else text_of(cfg, tokens)
        if weights:
            state = train_gpt.read_artifact(weights) if weights.endswith(".ptz") else None
            train_gpt.load_weights(model, state or train_gpt.load_initial_weights(weights), weights)
        run = train_gpt.Run(cfg, runtime, train_gpt.RunLog(None, ""), model, data)
        if check_seconds:
            check_own_scores(run, check_seconds)
        if runtime.compiles:
            run.settle(lambda: train_gpt.warm_evaluation(run))
        began = time.process_time()
        for name, score in train_gpt.score_all(run):
            spent = time.process_time() - began
            scale = 1e6 / data.targets
            per_million = dict(cpu_seconds=scale * spent, clock_seconds=scale * score.seconds)
            found[name] = {unit: round(value, 2) for unit, value in per_million.items()}
            bpb[name] = score.bpb
            print(f"{name}: {score.text} {spent:.1f} CPU seconds", file=sys.stderr, flush=True)
            began = time.process_time()
        machine = train_gpt.describe_machine(runtime)
    report = dict(benchmark="scores", commit=commit(), knobs=knobs, tokens=data.targets, **machine)
    if weights:
        report |= dict(val_bpb=bpb, documents=len(data.spans))
    if check_seconds:
        report["score_check"] = f"passed, tried for {check_seconds:g} s"
    return report | dict(per_million_tokens=found)


@lru_cache(maxsize=1000)
def pass_flops(cfg: train_gpt.Config, model: train_gpt.GPT, shape: train_gpt.PassShape) -> float:
    """Multiplications and additions of a forward pass of that shape: the blocks' matrices, causal attention
    (half of the square), and the head where targets are scored."""
    matrices = 0
    for layer in model.plans[-1]:
        if layer.runs:
            matrices += sum(p.numel() for p in model.blocks[layer.block].parameters() if p.role == "matrix")
            matrices += shape.length * cfg.model_dim
    head = cfg.model_dim * cfg.vocab_size
    return 2.0 * shape.batch * (shape.length * matrices + shape.width * head)


@lru_cache(maxsize=1000)
def lora_floats(cfg: train_gpt.Config, model: train_gpt.GPT, documents: int) -> int:
    """Floats of the factors of so many documents."""
    sizes = train_gpt.adapter_sizes(cfg, model).values()
    return documents * cfg.ttt_lora_rank * sum(inputs + outputs for inputs, outputs in sizes)


def turn_cost(
    cfg: train_gpt.Config, model: train_gpt.GPT, name: str, turn: train_gpt.ScoreTurn, gpus: int
) -> tuple[float, float]:
    """(products, bytes) of one turn on one rank."""
    if not turn.windows and not turn.chunk:
        return 0.0, 0.0
    flops = pass_flops(cfg, model, turn.shape) if turn.windows else 0.0
    if name != "ttt":
        return flops, 0.0
    if cfg.ttt_batch_size:
        floats = lora_floats(cfg, model, turn.shape.batch)
        flops += 2.0 * turn.shape.length * floats
        learns = bool(turn.learning)
        steps = cfg.ttt_steps if learns else 0
        return flops * max(1, 2 * steps), 4.0 * floats * LORA_PASSES * steps
    if turn.chunk and not turn.chunk.ends_text:
        length = cfg.train_seq_len
        windows = -(-(turn.chunk.stop - turn.chunk.first) // length)
        shape = train_gpt.PassShape(-(-windows // gpus), length, length)
        flops += 3 * cfg.ttt_steps * pass_flops(cfg, model, shape)
    return flops, 0.0


def phase_cost(cfg: train_gpt.Config, model: train_gpt.GPT, mean: float, gpus: int) -> float:
    """Products of all phases of PHASED_TTT_PREFIX_DOCS on the busiest rank: its first one, to a window."""
    if not cfg.phased_ttt_prefix_docs:
        return 0.0
    runtime = train_gpt.Runtime(device=torch.device("cuda"), world_size=gpus)
    shape = train_gpt.phase_shape(cfg, runtime)
    spans = text_of(cfg, int(1.2 * mean * cfg.phased_ttt_prefix_docs), mean).spans
    flops = 0.0
    for edge in train_gpt.phase_edges(cfg):
        for windows in train_gpt.phase_steps(cfg, spans[:edge]):
            passes = -(-len(windows) // gpus // shape.batch)
            flops += 3 * passes * pass_flops(cfg, model, shape)
    return flops


def plans_of_documents(
    cfg: train_gpt.Config, data: train_gpt.Validation, ranks: list[train_gpt.Runtime]
) -> list[list[train_gpt.DocumentTurn]]:
    """The turns of TTT_BATCH_SIZE on each rank; the turns of a group are planned once for all of them."""
    planned = {}

    def document_turns(cfg, group):
        key = group[0]  # a document is in one group
        if key not in planned:
            planned[key] = DOCUMENT_TURNS(cfg, group)
        return planned[key]

    with patch.object(train_gpt, "document_turns", document_turns):
        return [train_gpt.plan_document_turns(cfg, data, rank) for rank in ranks]


DOCUMENT_TURNS = train_gpt.document_turns


def plans_of(cfg: train_gpt.Config, data: train_gpt.Validation, rank: train_gpt.Runtime) -> dict:
    """{score: turns of that rank} of all scores that run a model, but TTT_BATCH_SIZE."""
    plans = {}
    for name, _ in train_gpt.scorers(cfg):
        if name == "isolated":
            plans[name] = train_gpt.plan_isolated_turns(cfg, data, rank)
        elif name not in train_gpt.MIXTURES and not (name == "ttt" and cfg.ttt_batch_size):
            stride = 0 if name == "roundtrip" else cfg.eval_stride
            plans[name] = train_gpt.plan_turns(cfg, data, rank, stride, name == "ttt")
    return plans


def reckon(
    knobs: dict[str, str], tokens: int, gpus: int, share: float, sample: int, mean: float = MEAN_LENGTH
) -> dict:
    """The JSON report: seconds of each score on so many H100s. mean: targets of a document."""
    cfg = train_gpt.Config.from_env(knobs)
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    planned = max(1, tokens // sample)
    data = text_of(cfg, planned, mean)
    cuda = torch.device("cuda")
    ranks = [train_gpt.Runtime(device=cuda, rank=rank, world_size=gpus) for rank in range(gpus)]
    sampled_plans = [plans_of(cfg, data, rank) for rank in ranks]
    plans = {name: ([of_rank[name] for of_rank in sampled_plans], planned) for name in sampled_plans[0]}
    if cfg.ttt_steps and cfg.ttt_batch_size:
        plans["ttt"] = (plans_of_documents(cfg, text_of(cfg, tokens, mean), ranks), tokens)
    found = {}
    for name, (of_ranks, planned) in plans.items():
        flops = moved = seconds = read = 0.0
        for turns in zip(*of_ranks, strict=True):
            costs = [turn_cost(cfg, model, name, turn, gpus) for turn in turns]
            flops += sum(cost[0] for cost in costs)
            moved += sum(cost[1] for cost in costs)
            read += sum(turn.shape.tokens for turn in turns if turn.windows)
            seconds += max(cost[0] / share / H100_FLOPS + cost[1] / H100_BYTES for cost in costs)
        scale = tokens / planned
        if name == "ttt":
            phases = phase_cost(cfg, model, mean, gpus) / scale
            flops += gpus * phases
            seconds += phases / share / H100_FLOPS
        found[name] = dict(
            tokens_read_per_target=round(read / planned, 2),
            petaflop=float(f"{scale * flops / 1e15:.4g}"),
            terabytes=float(f"{scale * moved / 1e12:.4g}"),
            seconds=float(f"{scale * seconds:.4g}"),
        )
    for name, _ in train_gpt.scorers(cfg):
        if name in train_gpt.MIXTURES:
            found[name] = dict(seconds=float(f"{MIXTURE_SECONDS * tokens / 1e6:.4g}"))
    total = sum(score["seconds"] for score in found.values())
    return dict(
        total_seconds=round(total, 1), limit=cfg.max_eval_seconds, fits=total <= cfg.max_eval_seconds,
        benchmark="scores_reckoned", commit=commit(), knobs=knobs, tokens=tokens, sample=sample, gpus=gpus,
        share_of_peak=share, scores=found,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "reckon"))
    parser.add_argument("preset")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.3, help="of the peak that the products reach")
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--official", action="store_true", help="reckon the four official texts")
    parser.add_argument("--weights", default="", help="measure this model on its validation text")
    parser.add_argument("--check", type=float, default=0.0, metavar="SECONDS", help="SCORE_CHECK before")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    knobs = preset_env(options.preset, Sizes()) | dict(pair.split("=", 1) for pair in options.knobs)
    try:
        if options.what == "measure":
            found = measure(knobs, options.tokens, options.weights, options.check)
        elif options.official:
            texts = []
            for targets in OFFICIAL_TARGETS:
                mean = targets / OFFICIAL_DOCUMENTS
                texts.append(reckon(knobs, targets, options.gpus, options.share, options.sample, mean))
            found = dict(benchmark="scores_reckoned_official", commit=commit(), texts=texts)
        else:
            found = reckon(knobs, options.tokens, options.gpus, options.share, options.sample)
    except train_gpt.RunError as error:
        raise SystemExit(f"error: {error}") from None
    report = json.dumps(found, indent=1)
    print(report)
    if options.out:
        train_gpt.write_atomic(options.out, report.encode() + b"\n")


if __name__ == "__main__":
    main()
