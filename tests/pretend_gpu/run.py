"""Runs the checks on each pretended card for each preset, and compares the bytes moved with those kept.

Prints a line for each. Exit codes: 0 all is well, 1 a promise is broken or more bytes are moved,
2 wrong usage.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from sweeps.lab.wave_spec import read_preset  # noqa: E402

KEPT = ROOT / "records/benchmarks/pretend_gpu.json"
CARDS = {"9.0": "H100", "8.9": "L4", "8.0": "A100", "7.5": "T4"}
TOLERANCE = 0.02  # of the bytes kept
# Rates and lengths, which no graph and no kernel reads: presets that differ in them alone are counted once.
NO_GRAPH_READS = (
    "ITERATIONS",
    "MATRIX_LR",
    "SCALAR_LR",
    "TIED_EMBED_LR",
    "VAL_LOSS_EVERY",
    "TRAIN_LOG_EVERY",
)
PRESETS = ROOT / "sweeps/presets"
OVERLAYS = ("cpu", "proxy")  # sizes, no presets


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.env") if path.stem not in OVERLAYS)


def graph_knobs(preset: str) -> dict[str, str]:
    """The knobs of a preset that its graphs may depend on."""
    knobs = read_preset(PRESETS / f"{preset}.env")
    return {name: value for name, value in knobs.items() if name not in NO_GRAPH_READS}


def counted_for(preset: str, presets: list[str]) -> str:
    """The first of the presets with the same graphs as this one."""
    return next(other for other in presets if graph_knobs(other) == graph_knobs(preset))


def last_line(*command: str) -> str:
    """The last line that a program prints; "unknown" if it fails or there is none."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def describe_versions() -> dict[str, str]:
    """What the numbers of one preset and card depend on, beside the code of `commit`."""
    triton = importlib.metadata.distribution("triton")
    ptxas = triton.locate_file("triton/backends/nvidia/bin/ptxas")
    return dict(
        commit=last_line("git", "rev-parse", "--short=10", "HEAD"),
        torch=importlib.metadata.version("torch"),
        triton=triton.version,
        ptxas=last_line(str(ptxas), "--version"),  # names the release of CUDA that it is from
        python=platform.python_version(),
    )


def check(card: str, preset: str) -> dict:
    """What the checks say of a preset on a card; their last line if they fail."""
    folder = os.environ["PRETEND_GPU"]
    env = os.environ | dict(
        LD_PRELOAD=f"{folder}/libpretend_cudart.so",
        LD_LIBRARY_PATH=folder,
        PRETEND_RUNTIME=f"{folder}/libpretend_cudart.so",
        PRETEND_CAPABILITY=card,
        PYTHONPATH=f"{ROOT}:{HERE}",
        OMP_NUM_THREADS="1",
    )
    knobs = [f"{name}={value}" for name, value in read_preset(PRESETS / f"{preset}.env").items()]
    command = [sys.executable, HERE / "device.py", preset, *knobs]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0:
        return dict(wrong=[f"exit code {done.returncode}: {lines[-1] if lines else 'nothing said'}"])
    return json.loads(lines[-1])


def compare_bytes(found: dict, kept: dict | None) -> list[str]:
    """How the bytes of forward and backward pass differ from those kept, a sentence each."""
    if kept is None:
        return ["no bytes are kept for it: look at them and run again with --write"]
    wrong = []
    for name, now, before in zip(("forward", "backward"), found["megabytes"], kept["megabytes"], strict=True):
        if abs(now / before - 1) > TOLERANCE:
            wrong.append(f"{name} moves {now:.0f} MB, {now / before - 1:+.1%} of the {before:.0f} kept")
    return wrong


def describe(found: dict) -> str:
    forward, backward = found["megabytes"]
    graphs = found["graphs"]
    attention = found["attention"][0].removeprefix("_scaled_dot_product_").partition("_attention")[0]
    return (
        f"{found['dtype'].removeprefix('torch.')}, attention {attention}, graphs {graphs['train']} + "
        f"{graphs['eval']}, {found['kernels']} kernels, {forward / 1e3:.2f} + {backward / 1e3:.2f} GB, "
        f"waits {sum(found['waits'].values())}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cards", nargs="*", default=list(CARDS), metavar="CARD", help=" ".join(CARDS))
    parser.add_argument("--presets", type=lambda text: text.split(","), default=preset_names())
    parser.add_argument("--write", action="store_true", help=f"keep the bytes in {KEPT.relative_to(ROOT)}")
    wanted = parser.parse_args()
    unknown = [card for card in wanted.cards if card not in CARDS]
    unknown += [preset for preset in wanted.presets if preset not in preset_names()]
    if unknown:
        parser.error(f"{unknown[0]} is none of {' '.join(CARDS)}, nor of {' '.join(preset_names())}")
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    versions = describe_versions()
    broken = 0
    for card in wanted.cards:
        counted = {}
        for preset in wanted.presets:
            began = time.monotonic()
            first = counted_for(preset, wanted.presets)
            found = counted.get(first) or check(card, preset)
            counted[preset] = found
            place = f"{card} {preset}"
            wrong = list(found["wrong"])
            if "megabytes" in found and not wanted.write:
                wrong += compare_bytes(found, kept.get(place))
            broken += bool(wrong)
            text = "; ".join([*wrong, describe(found) if "megabytes" in found else ""])
            verdict = "FAIL" if wrong else "ok"
            how = f"{time.monotonic() - began:.0f} s" if first == preset else f"the graphs of {first}"
            print(f"{verdict:5s}{card} {CARDS[card]:5s}{preset:22s}{text} ({how})", flush=True)
            if wanted.write and not wrong:
                kept[place] = found | dict(counted_for=first, versions=versions)
                KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
