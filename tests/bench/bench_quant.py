"""Bytes and bpb of one trained model at several levels and clips.

    DATA_PATH=... TOKENIZER_PATH=... python tests/bench/bench_quant.py PRESET MODEL.pt [KNOB=VALUE ...] \\
        [--out FILE]

MODEL.pt is a run's final_model.pt; the knobs must give its shape. Each row is packed, unpacked and scored by
the official windows. Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import train_gpt  # noqa: E402
from tests.bench.bench_throughput import Sizes, commit, preset_env  # noqa: E402

# Of attention, MLP and embeddings (0: as attention). The published "int5" has 16 levels up and down.
LEVELS = {
    "int8": (127, 0, 0),
    "int8, int7 tables": (127, 0, 63),
    "int7/int5": (63, 16, 0),
    "int6/int5": (31, 16, 0),
}
CLIPS = "max", "gptq_lite", "grid"


def measure(knobs: dict[str, str], path: str) -> dict:
    """The JSON report."""
    cfg = train_gpt.Config.from_env(knobs)
    data = train_gpt.load_validation(cfg, train_gpt.load_tokenizer(cfg))
    with train_gpt.Runtime.launch(cfg, {}) as runtime:
        model = train_gpt.GPT(cfg, runtime.dtype).to(runtime.device)
        state = train_gpt.load_initial_weights(path)
        train_gpt.load_weights(model, state, path)
        run = train_gpt.Run(cfg, runtime, train_gpt.RunLog(None, ""), model, data)
        run.settle(lambda: train_gpt.warm_evaluation(run))
        rows, before = [], run.score().bpb
        for (label, levels), clip in itertools.product(LEVELS.items(), CLIPS):
            names = "quant_levels", "mlp_quant_levels", "embed_quant_levels"
            this = replace(cfg, quant_clip=clip, **dict(zip(names, levels, strict=True)))
            blob = train_gpt.pack(this, state, {})
            train_gpt.load_weights(model, train_gpt.unpack(blob, "packed")[0], "packed")
            bpb, predicted = run.score().bpb, train_gpt.predict_size(this, model)
            rows.append(dict(levels=label, clip=clip, bytes=len(blob), predicted=predicted, bpb=bpb))
            print(f"{label:18} {clip:10} {len(blob):>10,} bytes  {bpb:.4f}", flush=True)
        machine = train_gpt.describe_machine(runtime)
    return dict(
        benchmark="quant", commit=commit(), knobs=knobs, model=Path(path).name, live_bpb=before,
        val_sha256=data.sha256, **machine, rows=rows,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("model", help="final_model.pt of a run")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    places = {name: os.environ[name] for name in ("DATA_PATH", "TOKENIZER_PATH") if name in os.environ}
    knobs = preset_env(options.preset, Sizes()) | places | dict(pair.split("=", 1) for pair in options.knobs)
    try:
        report = measure(knobs, options.model)
    except train_gpt.RunError as error:
        raise SystemExit(f"error: {error}") from None
    if options.out:
        train_gpt.write_atomic(options.out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
