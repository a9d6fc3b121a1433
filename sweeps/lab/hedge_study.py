"""What each part of the Hedge mixer is worth, on scores that runs have dumped.

    USE_HEDGE=1 SCORE_DUMP=a.npz ... python train_gpt.py
    python -m sweeps.lab.hedge_study a.npz b.npz --vocab 1024 --out records/benchmarks/cpu_hedge_study.json

The dump needs the sliding or the roundtrip score; its first token is not in it and is taken as 0. Each line
changes one thing of the mixer as it stands. All is computed from the dumped log-probabilities, so no model
runs, and every number is exact for its text: there is no seed. A difference between two lines says something
about this text and this model only; the lines of several models show which differences hold.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import train_gpt
from data.user_error import run_tool
from tests.bench.bench_throughput import commit

GRID = (0.0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.92)


def gate_alone(neural, ngram, experts, bins, eta, window):
    """In the stead of `hedge_mixture`: the gate's mixture by itself."""
    return train_gpt.Mixture(torch.log(neural + experts[-1].share * (ngram - neural)), [])


def pure_experts(neural, ngram, experts, bins, eta, window):
    """Hedge over the neural model and the n-gram, unmixed."""
    return HEDGE(neural, ngram, train_gpt.fixed_experts((0.0, 1.0)), bins, eta, window)


def no_gate(neural, ngram, experts, bins, eta, window):
    """Hedge over the fixed shares."""
    fixed = train_gpt.fixed_experts(train_gpt.EXPERT_SHARES)
    return HEDGE(neural, ngram, fixed, bins, eta, window)


def no_gate_fine(neural, ngram, experts, bins, eta, window):
    """Hedge over a finer grid of shares."""
    return HEDGE(neural, ngram, train_gpt.fixed_experts(GRID), bins, eta, window)


def one_bin(neural, ngram, experts, bins, eta, window):
    """Hedge that does not tell contexts apart."""
    return HEDGE(neural, ngram, experts, torch.zeros_like(bins), eta, window)


HEDGE = train_gpt.hedge_mixture
# name -> (knobs of the mixer, names of train_gpt that are replaced)
VARIANTS: dict[str, tuple[dict, dict]] = {
    "as it stands": ({}, {}),
    "pure experts": ({}, dict(hedge_mixture=pure_experts)),
    "no gate": ({}, dict(hedge_mixture=no_gate)),
    "no gate, 14 shares": ({}, dict(hedge_mixture=no_gate_fine)),
    "gate alone": ({}, dict(hedge_mixture=gate_alone)),
    "one bin": ({}, dict(hedge_mixture=one_bin)),
    **{f"order {k}": (dict(hedge_order=k), {}) for k in (0, 1, 2, 3, 4, 5, 8, 12)},
    **{f"eta {eta}": (dict(hedge_eta=eta), {}) for eta in (0.01, 0.03, 0.3, 1.0)},
    **{f"window {n}": (dict(hedge_window=n), {}) for n in (0, 300, 3000, 10_000)},
    **{f"discount {d}": ({}, dict(DISCOUNT=d)) for d in (0.4, 0.5, 0.7, 0.8, 0.9)},
}


def study(path: Path, vocab: int) -> dict:
    """bpb of the dumped scores and of every variant."""
    with np.load(path) as dump:
        given = {name: dump[name] for name in dump.files}
    base = next((f"{name}_logprob" for name in ("sliding", "roundtrip") if f"{name}_logprob" in given), None)
    if base is None:
        raise SystemExit(f"error: {path} has no sliding or roundtrip score; dump one with SCORE_DUMP")
    tokens = torch.from_numpy(np.concatenate(([0], given["target"])).astype(np.int64))
    nats, size = -torch.from_numpy(given[base]).double(), int(given["bytes"].sum(dtype=np.int64))
    if int(tokens.max()) >= vocab:
        raise SystemExit(f"error: {path} holds token {int(tokens.max())}; set --vocab")
    names = [name for name in given if name.endswith("_logprob")]
    scores = {name[:-8]: -given[name].sum(dtype=np.float64) / math.log(2) / size for name in names}
    rows = {}
    for name, (knobs, replaced) in VARIANTS.items():
        cfg, began = train_gpt.Config(vocab_size=vocab, use_hedge=True, **knobs), time.perf_counter()
        with ExitStack() as stack:
            for target, value in replaced.items():
                stack.enter_context(patch.object(train_gpt, target, value))
            logs = train_gpt.mix_with_ngrams(cfg, tokens, nats).log_probs
        rows[name] = dict(bpb=-logs.sum().item() / math.log(2) / size, seconds=time.perf_counter() - began)
        saved = scores[base[:-8]] - rows[name]["bpb"]
        print(f"{path.stem:24} {name:22} {rows[name]['bpb']:.4f}  saved {saved:.4f}", flush=True)
    return dict(tokens=len(nats), bytes=size, base=base[:-8], dumped=scores, variants=rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dumps", nargs="+", type=Path)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with train_gpt.Runtime.launch(train_gpt.Config(device="cpu", dtype="fp32", compile="0"), {}) as runtime:
        machine = train_gpt.describe_machine(runtime)
    found = {path.stem: study(path, options.vocab) for path in options.dumps}
    if options.out:
        report = dict(benchmark="hedge_study", commit=commit(), **machine, dumps=found)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
