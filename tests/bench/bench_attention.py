"""CPU attention, forward and backward: ours by blocks of queries and torch's SDPA, in turn.

    python tests/bench/bench_attention.py [--out records/benchmarks/cpu_attention.json]

8,192 tokens, eight heads that share four keys and values, of 32 or 64, bfloat16, eager and compiled, on as
many threads as torch takes. Medians over --rounds. Not a test.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import torch  # noqa: E402

import train_gpt  # noqa: E402
from tests.bench.bench_throughput import commit  # noqa: E402

TOKENS, HEADS, KV_HEADS = 8192, 8, 4


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What the script does beyond the longest sequence for blocks."""
    with patch.object(train_gpt, "LONGEST_BLOCKED", 0):
        return train_gpt.attend(q, k, v)


def seconds(attention, inputs: list[torch.Tensor], gradient: torch.Tensor) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    torch.autograd.grad(attention(*inputs), inputs, gradient)
    return time.perf_counter() - start


def measure(length: int, head_dim: int, rounds: int) -> dict[str, object]:
    """Median milliseconds of each variant at one sequence length. q, k and v lie as the model's do."""
    torch.compiler.reset()
    shapes = [(TOKENS // length, length, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(s).bfloat16().transpose(1, 2).requires_grad_() for s in shapes]
    gradient = torch.randn(shapes[0]).bfloat16().transpose(1, 2)
    blocked = train_gpt.BlockedAttention.apply
    arms = dict(sdpa=sdpa, blocked=blocked, blocked_compiled=torch.compile(blocked, dynamic=False))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, attention in arms.items():
            times[name].append(seconds(attention, inputs, gradient))
    found = {name: round(1000 * median(t[1:]), 1) for name, t in times.items()}
    return dict(length=length, head_dim=head_dim, **found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = [(n, d) for n in (128, 512, 1024, 2048) for d in (32, 64)]
    rows = [measure(*size, arguments.rounds) for size in sizes]
    machine = train_gpt.describe_machine(train_gpt.Runtime(dtype=torch.bfloat16))
    head = dict(benchmark="attention forward+backward, ms", commit=commit(), tokens=TOKENS)
    text = json.dumps(dict(head, heads=HEADS, kv_heads=KV_HEADS, machine=machine, rows=rows), indent=1)
    print(text)
    if arguments.out:
        train_gpt.write_atomic(arguments.out, text.encode() + b"\n")


if __name__ == "__main__":
    main()
