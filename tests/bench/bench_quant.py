"""The curve: bytes of a trained model against the bits per byte that packing it costs, by several recipes.

    DATA_PATH=... TOKENIZER_PATH=... python tests/bench/bench_quant.py PRESET MODEL.pt [KNOB=VALUE ...] \\
        [--batches N] [--balance-tokens N] [--calibration FILE.pt] [--windows N] [--recipes NAME ...]
        [--rates FACTOR ...] [--join FILE.json ...] [--plot FILE.png] [--out FILE.json]

MODEL.pt is a run's final_model.pt; the knobs must give its shape. Each recipe packs the model at several
rates; each artifact is unpacked and scored on the same windows, evenly spread over the validation text. The
Hessians are those of `--batches` training batches of TRAIN_BATCH_TOKENS. #1394's integers are packed by ZPAQ
too where the program lrzip is on the PATH. Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt  # noqa: E402
from tests.bench.bench_throughput import Sizes, commit, preset_env  # noqa: E402

OURS = dict(quant_clip="sdclip", quant_levels=127, row_step_power=0.5, column_step_power=0.75)
OURS |= dict(steps_per_octave=4, codec="rans", control_float16=True, step_balance_rounds=2)
PRICE = 0.1  # RATE_LAMBDA
RATES = (0.7, 1.0, 1.4, 2.0)  # factors of a recipe's steps
rates = list(RATES)  # those that were asked for


@dataclass(frozen=True)
class Packed:
    """One point of the curve before it is scored."""

    label: str
    size: int
    predicted: int  # by predict_size; 0 where the recipe is not the script's own
    state: dict  # what comes back
    by_shapes: int = 0  # the same, without the calibration
    recipe: str = ""  # where a recipe packs the same integers in two ways


def by_script(cfg, model, state: dict, calibration, label: str, **knobs) -> Packed:
    """A point that the script packs itself."""
    own = replace(cfg, **knobs)
    calibration = calibration if own.gptq_calibration_batches else None
    blob = train_gpt.pack(own, state, {}, calibration)
    restored = train_gpt.unpack(blob, "packed")[0]
    train_gpt.load_weights(model, state, "the trained model")  # it has an earlier point's weights
    by_shapes = train_gpt.predict_size(own, model)
    predicted = train_gpt.predict_size(own, model, calibration)
    return Packed(label, len(blob), predicted, restored, by_shapes=by_shapes)


def official(cfg, model, state: dict, calibration) -> Iterator[Packed]:
    """The official script's int8 and zlib; below int8 with as many levels less."""
    for levels in (127, 63, 31, 15):
        yield by_script(cfg, model, state, None, f"levels {levels}", codec="zlib", quant_levels=levels)


def zstandard(cfg, model, state: dict, calibration) -> Iterator[Packed]:
    """The same by zstd, level 22."""
    for levels in (127, 63, 31, 15):
        yield by_script(cfg, model, state, None, f"levels {levels}", codec="zstd", quant_levels=levels)


def gptq_lite(cfg, model, state: dict, calibration) -> Iterator[Packed]:
    """PR #895's five clips a row, and zstd, level 22."""
    knobs = dict(codec="zstd", quant_clip="gptq_lite")
    for levels in (127, 63, 31, 15):
        yield by_script(cfg, model, state, None, f"levels {levels}", quant_levels=levels, **knobs)


def published(cfg, model, state: dict, calibration) -> Iterator[Packed]:
    """#1394: GPTQ, SDClip, int6 and an int8 table, byte shuffle, brotli 11; the rates scale its sigmas."""
    for rate in rates:
        knobs = dict(quant_clip="sdclip", quant_levels=31, embed_quant_levels=127, gptq_calibration_batches=1)
        knobs |= dict(quant_clip_sigmas=12.85 * rate, embed_quant_clip_sigmas=20 * rate)
        own = replace(cfg, **knobs)
        encoded = train_gpt.encode_tensors(own, state, train_gpt.Calibration(calibration.hessians))
        stored = {}
        for plan, arrays in encoded.items():
            if plan.levels:
                stored[f"{plan.name}.q"] = arrays[0]
                stored[f"{plan.name}.scale"] = arrays[1]
            else:
                stored[plan.name] = arrays[0].half()
        file = io.BytesIO()
        torch.save(stored, file)
        raw = file.getvalue()
        shuffled = raw[::2] + raw[1::2]
        size = len(train_gpt.brotli_module().compress(shuffled, quality=11))
        blob = train_gpt.pack_arrays(replace(own, codec="zlib"), encoded, {})
        restored = train_gpt.unpack(blob, "packed")[0]
        yield Packed(f"sigmas x {rate}", size, 0, restored)
        if shutil.which("lrzip"):
            yield Packed(f"sigmas x {rate}", zpaq_size(shuffled), 0, restored, recipe="#1394+zpaq")
        else:
            print("ZPAQ is left out: the program lrzip is not on the PATH (Debian: apt-get install lrzip)")


def zpaq_size(raw: bytes) -> int:
    """Bytes that `lrzip -z -L 9` makes of these, as #1855 packs its integers."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "raw"
        plain.write_bytes(raw)
        subprocess.run(["lrzip", "-q", "-z", "-L", "9", "-N", "0", "-o", f"{plain}.lrz", plain], check=True)
        return Path(f"{plain}.lrz").stat().st_size


def coded(cfg, model, state: dict, calibration) -> Iterator[Packed]:
    """The same integers by our coder: what CODEC=rans alone is worth."""
    knobs = dict(quant_clip="sdclip", quant_levels=31, embed_quant_levels=127, gptq_calibration_batches=1)
    knobs |= dict(codec="rans", control_float16=True)
    for rate in rates:
        knobs |= dict(quant_clip_sigmas=12.85 * rate, embed_quant_clip_sigmas=20 * rate)
        bare = train_gpt.Calibration(calibration.hessians)
        yield by_script(cfg, model, state, bare, f"sigmas x {rate}", **knobs)


def ours(cfg, model, state: dict, calibration) -> Iterator[Packed]:
    """GPTQ with steps by column and half by row, weighed against each other, and our coder."""
    for rate in (*rates, 2.8, 4.0):
        knobs = OURS | dict(quant_clip_sigmas=50 * rate, gptq_calibration_batches=1)
        yield by_script(cfg, model, state, calibration, f"sigmas x {rate}", **knobs)


def priced(cfg, model, state: dict, calibration) -> Iterator[Packed]:
    """The same with a price of bits: what of the trellis a scalar quantiser can have too."""
    for rate in rates:
        knobs = OURS | dict(quant_clip_sigmas=50 * rate, gptq_calibration_batches=1, rate_lambda=PRICE)
        yield by_script(cfg, model, state, calibration, f"sigmas x {rate}", **knobs)


def trellised(cfg, model, state: dict, calibration) -> Iterator[Packed]:
    """The same with the trellis."""
    for rate in (*rates, 2.8, 4.0):
        knobs = OURS | dict(quant_clip_sigmas=50 * rate, gptq_calibration_batches=1, rate_lambda=PRICE)
        yield by_script(cfg, model, state, calibration, f"sigmas x {rate}", trellis=True, **knobs)


RECIPES: dict[str, Callable] = {
    "int8+zlib": official,
    "int8+zstd": zstandard,
    "gptq_lite+zstd": gptq_lite,
    "#1394": published,
    "#1394+rans": coded,
    "ours": ours,
    "ours+price": priced,
    "ours+trellis": trellised,
}


def spread_windows(cfg, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets) [count, T] of windows evenly spread over the validation shards."""
    stream = train_gpt.TokenStream(cfg.data_path, "val", cfg.vocab_size)
    length = cfg.train_seq_len
    windows = stream.count_windows(length)
    starts = np.unique(np.linspace(0, windows - 1, min(count, windows)).astype(int)) * length
    block = torch.from_numpy(
        np.array([stream.read(start, length + 1) for start in starts.tolist()], np.int64)
    )
    return block[:, :-1], block[:, 1:]


def mean_nats(run, windows: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Nats a token of the live weights, on the same windows each time."""
    total = 0.0
    most = train_gpt.micro_batch_limit(run.cfg, run.runtime.device)
    with torch.no_grad():
        for ids, target_ids in train_gpt.micro_batches(windows, most):
            nats = run.nats(ids.to(run.runtime.device), target_ids.to(run.runtime.device))
            total += nats.double().sum().item()
    return total / windows[1].numel()


def measure(
    knobs: dict[str, str],
    path: str,
    batches: int,
    windows: int,
    recipes: list[str],
    calibration_file: Path | None = None,
) -> dict:
    """The JSON report."""
    cfg = train_gpt.Config.from_env(knobs)
    data = train_gpt.load_validation(cfg, train_gpt.load_tokenizer(cfg))
    tokens_per_byte = data.targets / int(data.target_bytes.sum())
    with train_gpt.Runtime.launch(cfg, {}) as runtime:
        model = train_gpt.GPT(cfg, runtime.dtype).to(runtime.device)
        state = train_gpt.load_initial_weights(path)
        train_gpt.load_weights(model, state, path)
        run = train_gpt.Run(cfg, runtime, train_gpt.RunLog(None, ""), model, data)
        texts = spread_windows(cfg, windows)
        live = mean_nats(run, texts)
        stream = train_gpt.TokenStream(cfg.data_path, "train", cfg.vocab_size)
        cfg = replace(cfg, max_wallclock_seconds=0.0)
        run.cfg = replace(cfg, **OURS, quant_clip_sigmas=50.0, gptq_calibration_batches=batches)
        if not any(name.startswith("ours") for name in recipes):
            run.cfg = replace(run.cfg, step_balance_rounds=0)
        most = train_gpt.micro_batch_limit(cfg, runtime.device)
        if calibration_file and calibration_file.exists():
            calibration = train_gpt.Calibration(**torch.load(calibration_file, weights_only=True))
        else:
            calibration = train_gpt.calibrate(run, stream, train_gpt.Trained(max_sequences=most))
            if calibration_file:
                torch.save(vars(calibration), calibration_file)
        weights = sum(tensor.numel() for tensor in state.values())
        rows = []
        for name in recipes:
            began = time.process_time()
            scored = None
            for point in RECIPES[name](cfg, model, state, calibration):
                seconds = time.process_time() - began
                if point.state is not scored:
                    scored = point.state
                    train_gpt.load_weights(model, scored, "packed")
                    lost = (mean_nats(run, texts) - live) / math.log(2) * tokens_per_byte
                row = dict(
                    recipe=point.recipe or name,
                    label=point.label,
                    bytes=point.size,
                    predicted=point.predicted,
                    predicted_by_shapes=point.by_shapes,
                )
                row |= dict(bits=8 * point.size / weights, bpb_lost=lost, cpu_seconds=seconds)
                rows.append(row)
                off = f"{point.predicted / point.size - 1:+.2%}" if point.predicted else ""
                print(
                    f"{row['recipe']:15} {point.label:14} {point.size:>10,} bytes {row['bits']:.3f} bits  "
                    f"{lost:+.5f} bpb  {off}",
                    flush=True,
                )
                began = time.process_time()
        machine = train_gpt.describe_machine(runtime)
    return dict(
        benchmark="quant", commit=commit(), knobs=knobs, model=Path(path).name, weights=weights,
        live_bpb=live / math.log(2) * tokens_per_byte, windows=len(texts[0]), calibration_batches=batches,
        balance_tokens=train_gpt.BALANCE_TOKENS, val_sha256=data.sha256, **machine, rows=rows,
    )  # fmt: skip


def savings(rows: list[dict], base: str = "#1394") -> dict[str, float]:
    """Share of bytes that each recipe saves at the base's losses: the mean over its points that can be told.

    log(bytes) is taken as linear in log(bpb lost) between a recipe's points; none is told beyond them.
    """
    curves = {}
    for row in rows:
        if row["bpb_lost"] > 0:
            curves.setdefault(row["recipe"], []).append((math.log(row["bpb_lost"]), math.log(row["bytes"])))
    found = {}
    for recipe, points in curves.items():
        points.sort()
        losses, sizes = zip(*points, strict=True)
        logs = []
        for loss, size in curves.get(base, []):
            if losses[0] <= loss <= losses[-1]:
                logs.append(size - float(np.interp(loss, losses, sizes)))
        if logs:
            found[recipe] = 1 - math.exp(-sum(logs) / len(logs))
    return found


def plot(report: dict, path: Path) -> None:
    """bits a weight against bpb lost, a line for each recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["recipe"] for row in report["rows"]):
        points = [(row["bits"], row["bpb_lost"]) for row in report["rows"] if row["recipe"] == name]
        points = sorted((bits, lost) for bits, lost in points if lost > 0)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="bits per weight, all of the artifact", ylabel="bpb lost", yscale="log")
    axes.set_title(f"{report['weights'] / 1e6:.1f} M weights, live {report['live_bpb']:.4f} bpb")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("model", help="final_model.pt of a run")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument("--batches", type=int, default=16, help="training batches for the Hessians")
    parser.add_argument("--balance-tokens", type=int, default=train_gpt.BALANCE_TOKENS)
    parser.add_argument("--calibration", type=Path, help="read them from here, or save them here")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES, help="factors of the steps")
    parser.add_argument("--windows", type=int, default=400, help="validation windows to score")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--join", nargs="*", type=Path, default=[], help="earlier reports of the same model")
    parser.add_argument("--plot", type=Path, help="draw the curve here")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    places = {name: os.environ[name] for name in ("DATA_PATH", "TOKENIZER_PATH") if name in os.environ}
    knobs = preset_env(options.preset, Sizes()) | places | dict(pair.split("=", 1) for pair in options.knobs)
    train_gpt.BALANCE_TOKENS = options.balance_tokens
    rates[:] = options.rates
    given = options.batches, options.windows, options.recipes, options.calibration
    try:
        report = measure(knobs, options.model, *given)
    except train_gpt.RunError as error:
        raise SystemExit(f"error: {error}") from None
    for path in options.join:
        earlier = json.loads(path.read_text())
        for fact in (
            "knobs",
            "weights",
            "live_bpb",
            "windows",
            "calibration_batches",
            "balance_tokens",
            "val_sha256",
        ):
            if earlier[fact] != report[fact]:
                raise SystemExit(f"error: {path} has another {fact}: {earlier[fact]}")
        report["rows"] += earlier["rows"]
    report["saved"] = savings(report["rows"])
    report["saved_against_zpaq"] = savings(report["rows"], "#1394+zpaq")
    for base, shares in (("#1394", report["saved"]), ("#1394+zpaq", report["saved_against_zpaq"])):
        for recipe, share in shares.items():
            print(f"{recipe:15} {share:+.1%} bytes saved at the losses of {base}")
    if options.plot:
        plot(report, options.plot)
    if options.out:
        train_gpt.write_atomic(options.out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
