"""Seconds and peak memory of the n-gram and Hedge mixer, by tokens and by order; how fast they grow.

    python tests/bench/bench_hedge.py --out records/benchmarks/cpu_hedge.json
    python tests/bench/bench_hedge.py --millions 1 4 16 62 --tokens fineweb_val_000000.bin --device cuda

The tokens are a file's first ones (an official shard or bare uint16), never repeated, or by default a made-up
text: each token from a Zipf distribution that depends on the one before, so that contexts recur. Neural nats
are made up. HEDGE_ORDER 0 to 6 at the smallest size, 6 at the others; --points adds MILLIONS:ORDER, by
default what must take under 12 s on two cores. Each row is a process of its own, for its peak of memory:
the whole process's on a CPU, what torch allocated on CUDA. Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt  # noqa: E402
from tests.bench.bench_throughput import commit  # noqa: E402

HIGHEST = 6
LANES = 4096
# Column of the report -> the function of train_gpt that it times.
PARTS = dict(ngram="ngram_probabilities", gate="gate_shares", hedge="hedge_mixture")


def zipf_markov(count: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Made-up tokens: a rank from Zipf's law is, three times in four, a place in the order that the token
    before prefers, else in the text's own. Many chains grow side by side, then stand one after the other."""
    rng, lanes = np.random.default_rng(seed), min(LANES, count)
    chance = np.cumsum(np.arange(1, vocab + 1) ** -1.2)
    shuffled, step, token = rng.permutation(vocab), vocab * 38 // 100 | 1, np.zeros(lanes, np.int64)
    text = np.empty((lanes, -(-count // lanes)), np.uint16)
    for place in range(text.shape[1]):
        rank = np.searchsorted(chance, chance[-1] * rng.random(lanes))
        follows = shuffled[(token * step + rank) % vocab]
        token = np.where(rng.random(lanes) < 0.75, follows, rank)
        text[:, place] = token
    return text.reshape(-1)[:count]


def open_tokens(path: Path, count: int) -> np.ndarray:
    """The first tokens of an official shard or of bare uint16, on disk; RunError where there are too few."""
    if not path.is_file() or path.stat().st_size < 2:
        raise train_gpt.RunError(f"{path} holds no tokens")
    head = np.fromfile(path, dtype="<i4", count=1)
    is_shard = len(head) and head[0] == train_gpt.SHARD_MAGIC
    tokens = train_gpt.open_shard(path) if is_shard else np.memmap(path, dtype="<u2", mode="r")
    few = f"{path} holds {len(tokens)} tokens, {count} are needed; to repeat them would flatter the mixer"
    if len(tokens) < count:
        raise train_gpt.RunError(few)
    return tokens[:count]


def make_text(options: argparse.Namespace, count: int) -> np.ndarray:
    """uint16 tokens [count]; RunError where one is outside the vocabulary."""
    if not options.tokens:
        return zipf_markov(count, options.vocab)
    tokens = np.array(open_tokens(options.tokens, count))
    if tokens.max() >= options.vocab:
        raise train_gpt.RunError(f"{options.tokens} has token {tokens.max()}; set --vocab")
    return tokens


def timed(runtime: train_gpt.Runtime, seconds: dict[str, float], name: str, work: Callable) -> Callable:
    """`work`, which also adds up what it takes."""

    def measured(*args):
        runtime.synchronize()
        began = time.perf_counter()
        result = work(*args)
        runtime.synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        return result

    return measured


def measure(options: argparse.Namespace, count: int, order: int) -> dict:
    """The row of one size: `mix_with_ngrams` on so many targets."""
    where = dict(device=options.device, dtype="fp32", compile="0")
    cfg = train_gpt.Config(vocab_size=options.vocab, use_hedge=True, hedge_order=order, **where)
    with train_gpt.Runtime.launch(cfg, {}) as runtime:
        device, seconds = runtime.device, {}
        text = make_text(options, count + 1)
        tokens, rng = torch.from_numpy(text).to(device).long(), torch.Generator().manual_seed(0)
        nats = torch.empty(count, dtype=torch.float64).exponential_(0.4, generator=rng).to(device)
        train_gpt.mix_with_ngrams(
            cfg, tokens[:4097], nats[:4096]
        )  # what only a first call costs is no growth
        for name, function in PARTS.items():
            setattr(train_gpt, function, timed(runtime, seconds, name, getattr(train_gpt, function)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if runtime.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() // 2**20
        mixture = timed(runtime, seconds, "total", train_gpt.mix_with_ngrams)(cfg, tokens, nats)
        logs = mixture.log_probs
        if not logs.isfinite().all():
            raise train_gpt.RunError("the mixture is not finite")
        memory = dict(before_mib=before, peak_mib=runtime.peak_memory_mib()[0])
        neural, *_, gate = (-expert.log_likelihood for expert in mixture.experts)
        nats = dict(mixture=-logs.sum().item(), neural=neural, gate=gate)
        machine = train_gpt.describe_machine(runtime)
    seconds["other"] = seconds["total"] - sum(seconds[name] for name in PARTS)
    loss = {name: round(value / count, 4) for name, value in nats.items()}
    return dict(
        tokens=count, hedge_order=order, seconds={k: round(s, 3) for k, s in seconds.items()},
        **memory, loss=loss, machine=machine | dict(threads=torch.get_num_threads()),
    )  # fmt: skip


def in_its_own_process(count: int, order: int) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", f"{count}:{order}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def exponents(rows: list[dict]) -> dict[str, float]:
    """Slope of log seconds against log tokens, by part: 1 is linear."""
    sizes = np.log([row["tokens"] for row in rows])
    if len(set(sizes)) < 2:
        return {}
    times = {part: [max(row["seconds"][part], 1e-3) for row in rows] for part in (*PARTS, "total")}
    return {part: round(float(np.polyfit(sizes, np.log(t), 1)[0]), 3) for part, t in times.items()}


def point(text: str) -> tuple[int, int]:
    """MILLIONS:ORDER as (tokens, order)."""
    millions, _, order = text.partition(":")
    return round(float(millions) * 1e6), int(order)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 4, 16], help="millions of tokens")
    parser.add_argument("--orders", type=int, nargs="+", default=list(range(HIGHEST + 1)), metavar="K")
    parser.add_argument("--points", type=point, nargs="*", default=[point("6.9:5")], metavar="MILLIONS:ORDER")
    parser.add_argument(
        "--tokens", type=Path, metavar="FILE", help="a shard or bare uint16; default: made up"
    )
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # TOKENS:ORDER, in a process of its own
    options = parser.parse_args()
    try:
        if options.only:
            return print(json.dumps(measure(options, *map(int, options.only.split(":")))))
        if options.tokens:
            most = max([round(m * 1e6) for m in options.millions] + [count for count, _ in options.points])
            open_tokens(options.tokens, most + 1)
    except train_gpt.RunError as error:
        raise SystemExit(f"error: {error}") from None
    sizes = [round(millions * 1e6) for millions in sorted(options.millions)]
    todo = [(sizes[0], order) for order in options.orders]
    todo += [(size, HIGHEST) for size in sizes if (size, HIGHEST) not in todo] + options.points
    print("  tokens order    ngram     gate    hedge    total s   peak MiB", flush=True)
    rows = []
    for count, order in todo:
        rows.append(row := in_its_own_process(count, order))
        times = " ".join(f"{row['seconds'][part]:8.2f}" for part in (*PARTS, "total"))
        print(f"{count / 1e6:7.2f}M {order:5} {times} {row['peak_mib']:12}", flush=True)
    growth = exponents([row for row in rows if row["hedge_order"] == HIGHEST])
    print("growth, seconds ~ tokens^x:", " ".join(f"{part} {x:.2f}" for part, x in growth.items()))
    machine = [row.pop("machine") for row in rows][0]
    source = options.tokens.name if options.tokens else "Zipf-Markov, seed 0"
    report = dict(
        benchmark="hedge mixer", commit=commit(), **machine, cores=os.cpu_count(), text=source,
        vocab_size=options.vocab, growth_exponent=growth, rows=rows,
    )  # fmt: skip
    if options.out:
        train_gpt.write_atomic(options.out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
