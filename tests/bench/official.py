"""Another training script with the official interface, run beside ours: same shards, same environment.

On a CPU a copy is made that does without CUDA, by the few edits of CPU_EDITS. Where an edit finds no place
the script is refused: a copy that half works would measure something else. Nothing of it is kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import train_gpt
from data.shards import read_tokens, write_shard

ROOT = Path(__file__).resolve().parents[2]

# (what it is, where it stands, what stands there in the copy). torch.compile and fused Adam stay.
CPU_EDITS = (
    ("refusal to run without CUDA", r"if not torch\.cuda\.is_available\(\):\n\s+raise \w+\([^\n]*\)", "pass"),
    ("device", r'torch\.device\("cuda"[^)]*\)', 'torch.device("cpu")'),
    ("choice of the device", r"torch\.cuda\.set_device\([^)]*\)", "None"),
    ("wait for the device", r"torch\.cuda\.synchronize\(\)", "None"),
    ("autocast's device", r'device_type="cuda"', 'device_type="cpu"'),
    ("call of nvidia-smi", r'\["nvidia-smi"\]', '["true"]'),
)
STEP = re.compile(r"^step:(\d+)/\d+ train_loss:(\S+) train_time:(\d+)ms", re.M)


def for_cpu(source: str, name: str) -> str:
    """The script's text without its need of CUDA; RunError naming the first place that is not there."""
    for what, pattern, new in CPU_EDITS:
        source, count = re.subn(pattern, new, source)
        missing = f"{name} has no {what} (/{pattern}/): it cannot be made to run on a CPU"
        if count == 0:
            raise train_gpt.RunError(missing)
    return source


def official_names(source: Path, folder: Path, val_tokens: int) -> Path:
    """A dataset with the official file names: links to the training shards, the head of the other text."""
    folder.mkdir(parents=True)
    train, val = (sorted(source.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
    if not (train and val):
        raise train_gpt.RunError(f"no *_train_*.bin and *_val_*.bin in {source}; set DATA_PATH")
    for number, path in enumerate(train):
        (folder / f"fineweb_train_{number:06d}.bin").symlink_to(path.resolve())
    write_shard(folder / "fineweb_val_000000.bin", read_tokens(val[0])[: val_tokens + 1])
    return folder


def clean_environment() -> dict[str, str]:
    """The caller's, without knobs: all that is set must reach both scripts."""
    names = {f.name.upper() for f in fields(train_gpt.Config)}
    return {name: value for name, value in os.environ.items() if name not in names}


def run_script(script: Path, knobs: dict[str, str], folder: Path) -> dict[str, object]:
    """One whole run in a folder of its own: milliseconds and losses of its logged steps, all its seconds."""
    folder.mkdir(parents=True)
    began, used = time.perf_counter(), os.times()
    command = [sys.executable, str(script.resolve())]
    env = clean_environment() | knobs | dict(RUN_ID=folder.name)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    if done.returncode != 0:
        raise train_gpt.RunError(f"{script.name} ended with {done.returncode}: {' '.join(said)}")
    found = {int(step): (int(ms), float(loss)) for step, loss, ms in STEP.findall(done.stdout)}
    cpu = sum(os.times()[2:4]) - sum(used[2:4])  # beside the seconds it tells whether the machine was shared
    params = re.search(r"model_params:(\d+)", done.stdout)
    return dict(
        train_ms={step: ms for step, (ms, _) in found.items()},
        losses={step: loss for step, (_, loss) in found.items()},
        params=int(params[1]) if params else None,
        seconds=round(time.perf_counter() - began, 1),
        cpu_seconds=round(cpu, 1),
    )


def step_ms(train_ms: dict[int, int], skip: int) -> float:
    """Milliseconds a step from the log, by its first `skip` steps left out."""
    last = max(train_ms)
    return (train_ms[last] - train_ms[skip]) / (last - skip)
