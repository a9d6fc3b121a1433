"""CPU attention, forward and backward: train_gpt.BlockedAttention.apply against torch's SDPA, interleaved.

    python tests/bench_attention.py [--out records/benchmarks/cpu_attention.json]

8,192 tokens, four heads of 64, bfloat16, compiled and eager. Medians over --rounds. Not a test.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_throughput import commit  # noqa: E402

import train_gpt  # noqa: E402

TOKENS, HEADS, HEAD_DIM = 8192, 4, 64


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def seconds(attention, length: int) -> float:
    """One forward and backward pass."""
    shape = TOKENS // length, HEADS, length, HEAD_DIM
    q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    gradient = torch.ones_like(q)
    start = time.perf_counter()
    attention(q, k, v).backward(gradient)
    return time.perf_counter() - start


def measure(length: int, rounds: int) -> dict[str, object]:
    """Median milliseconds of each variant at one sequence length."""
    torch.compiler.reset()
    blocked = train_gpt.blocked_attention
    arms = dict(sdpa=sdpa, blocked=blocked, blocked_compiled=torch.compile(blocked, dynamic=False))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, attention in arms.items():
            times[name].append(seconds(attention, length))
    return dict(length=length, **{name: round(1000 * median(t[1:]), 1) for name, t in times.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [measure(length, arguments.rounds) for length in (128, 256, 512, 1024)]
    machine = train_gpt.describe_machine(train_gpt.Runtime(dtype=torch.bfloat16))
    head = dict(benchmark="attention forward+backward, ms", commit=commit(), tokens=TOKENS, heads=HEADS)
    text = json.dumps(dict(head, head_dim=HEAD_DIM, machine=machine, rows=rows), indent=1)
    print(text)
    if arguments.out:
        train_gpt.write_atomic(arguments.out, text.encode() + b"\n")


if __name__ == "__main__":
    main()
