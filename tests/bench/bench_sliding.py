"""Seconds of the sliding-window score beside the plain one and the naive way, on random weights and tokens.

    python tests/bench/bench_sliding.py progressive_depth NUM_LAYERS=2 MODEL_DIM=256 TRAIN_SEQ_LEN=256

plain: official windows, as every run ends with. sliding: compiled, logits only where scored. naive: the same
windows run eagerly, all logits, as PR #895's script did; a quarter of them, its time scaled up. All take
turns; medians are reported. Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt  # noqa: E402
from tests.bench.bench_throughput import Sizes, commit, preset_env  # noqa: E402


def naive(run: train_gpt.Run, stride: int, share: float) -> float:
    """Seconds of all windows by whole logits of the eager model, measured on the first `share` of them."""
    cfg, data = run.cfg, run.data
    todo = train_gpt.plan_windows(data.targets, cfg.eval_length, stride)
    todo = todo[: max(cfg.eval_batch_seqs, int(share * len(todo)))]
    began = time.perf_counter()
    for at in range(0, len(todo), cfg.eval_batch_seqs):
        starts = [start for start, _, _ in todo[at : at + cfg.eval_batch_seqs]]
        rows = np.stack([data.tokens[s : s + cfg.eval_length + 1].astype(np.int64) for s in starts])
        ids = torch.from_numpy(rows).to(run.runtime.device)
        with torch.no_grad():
            nats = train_gpt.cross_entropy(run.model(ids[:, :-1]), ids[:, 1:])
        nats[:, -stride:].double().sum().item()
    return (
        (time.perf_counter() - began)
        * len(train_gpt.plan_windows(data.targets, cfg.eval_length, stride))
        / len(todo)
    )


def measure(knobs: dict[str, str], tokens: int, rounds: int) -> dict:
    """The JSON report."""
    cfg = train_gpt.Config.from_env(knobs)
    with train_gpt.Runtime.launch(cfg, {}) as runtime:
        torch.manual_seed(cfg.seed)
        model = train_gpt.GPT(cfg, runtime.dtype).to(runtime.device)
        stream = np.random.default_rng(0).integers(cfg.vocab_size, size=tokens + 1).astype(np.uint16)
        data = train_gpt.Validation(stream, np.ones(tokens, np.int16), 1, "")
        run = train_gpt.Run(cfg, runtime, train_gpt.RunLog(None, ""), model, data)
        began = time.perf_counter()
        run.settle(lambda: train_gpt.warm_evaluation(run))
        compile_seconds, stride = time.perf_counter() - began, cfg.eval_stride
        ways = dict(
            plain=lambda: run.score().seconds,
            sliding=lambda: run.score(stride).seconds,
            naive=lambda: naive(run, stride, 0.25),
        )
        times = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(way())
        middle = {name: round(median(seconds), 3) for name, seconds in times.items()}
        ratios = {name: round(middle["sliding"] / middle[name], 3) for name in ("plain", "naive")}
        machine = train_gpt.describe_machine(runtime)
    return dict(
        benchmark="sliding", commit=commit(), knobs=knobs, tokens=tokens, rounds=rounds, **machine,
        seconds=middle, all_seconds=times, sliding_over=ratios, compile_seconds=round(compile_seconds, 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    knobs = preset_env(options.preset, Sizes()) | dict(pair.split("=", 1) for pair in options.knobs)
    try:
        report = json.dumps(measure(knobs, options.tokens, options.rounds), indent=1)
    except train_gpt.RunError as error:
        raise SystemExit(f"error: {error}") from None
    print(report)
    if options.out:
        train_gpt.write_atomic(options.out, report.encode() + b"\n")


if __name__ == "__main__":
    main()
