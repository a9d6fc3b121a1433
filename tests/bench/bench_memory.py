"""What it is worth on a CPU that freed memory is kept (Runtime.launch): a training step and the Hedge mixer.

    python tests/bench/bench_memory.py baseline NUM_LAYERS=4 MODEL_DIM=256 TRAIN_SEQ_LEN=256 \\
        TRAIN_BATCH_TOKENS=8192

The setting belongs to a process, so each measurement is a process of its own; the two kinds take turns (A B A
B). Medians are reported, and each round's ratio. Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import torch  # noqa: E402

import train_gpt  # noqa: E402
from tests.bench.bench_throughput import Sizes, Variant, commit, preset_env  # noqa: E402


def once(knobs: dict[str, str], keep: bool, steps: int, tokens: int) -> dict[str, float]:
    """Seconds of a training step (median) and of mixing random tokens, and the peak memory in MiB."""
    with nullcontext() if keep else patch("ctypes.CDLL", side_effect=OSError):  # launch then does without
        variant = Variant(knobs)
        variant.build()
    step = median(variant.step() for _ in range(steps))
    rng = torch.Generator().manual_seed(0)
    stream = torch.randint(variant.cfg.vocab_size, (tokens + 1,), generator=rng)
    began = time.perf_counter()
    train_gpt.mix_with_ngrams(variant.cfg, stream, torch.rand(tokens, generator=rng, dtype=torch.float64) + 1)
    mixing = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(step_seconds=step, mix_seconds=mixing, peak_mib=peak) | train_gpt.describe_machine(
        variant.runtime
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--once", choices=("keep", "free"), help="one measurement, printed as JSON")
    options = parser.parse_args()
    knobs = preset_env(options.preset, Sizes()) | dict(word.split("=", 1) for word in options.knobs)
    knobs |= dict(DEVICE="cpu")
    if options.once:
        print("ONCE " + json.dumps(once(knobs, options.once == "keep", options.steps, options.tokens)))
        return
    found: dict[str, list[dict]] = dict(keep=[], free=[])
    for _ in range(options.rounds):
        for kind, rounds in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--once", kind]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rounds.append(json.loads(text.rpartition("ONCE ")[2]))
    numbers = ("step_seconds", "mix_seconds", "peak_mib")
    machine = {key: value for key, value in found["keep"][0].items() if key not in numbers}
    report = dict(benchmark="memory", commit=commit(), knobs=knobs, tokens=options.tokens, **machine)
    for name in numbers:
        both = {kind: [row[name] for row in rounds] for kind, rounds in found.items()}
        ratios = [keep / free for keep, free in zip(both["keep"], both["free"], strict=True)]
        report[name] = {kind: round(median(values), 4) for kind, values in both.items()}
        report[name] |= dict(ratio=round(median(ratios), 3), ratios=[round(r, 3) for r in ratios])
        row = report[name]
        print(f"{name:13} keep {row['keep']:9} free {row['free']:9} ratio {row['ratio']}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
