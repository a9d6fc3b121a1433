"""Train a small GPT under a clock, pack it under 16,000,000 bytes, report its bits per byte.

    python train_gpt.py                                    one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py  the same run on eight GPUs
    SEED=7 MATRIX_LR=0.03 python train_gpt.py              every knob is an environment variable
    python train_gpt.py --help                             all knobs: default, range, meaning
    python train_gpt.py --version                          this script's version and the hash of its bytes
    python train_gpt.py --list-ideas                       the published ideas: what became of each
    python train_gpt.py --knob-table                       all knobs as Markdown: sweeps/KNOBS.md
    python train_gpt.py --dry-run                          what this run would be; trains nothing
    python train_gpt.py --doctor                           is all that it needs here?
    EVAL_ONLY=final_model.int8.ptz python train_gpt.py     score a packed model again

What is in it:
  - a GPT with grouped-query attention, RoPE, QK norm, U-Net skips, tied or untied head; blocks that repeat
    (PR #895) with progressive depth, value embeddings, value residual, XSA; from the later records (#1394,
    #1493, #1855) partial RoPE, skip gates, two lanes, attention gate, SmearGate and a loop of some layers
  - Muon for the blocks' matrices, Adam for the rest, over any number of ranks; SWA, EMA
  - int8 and fewer levels, four ways to clip, zstd or zlib, a container that loads without executing anything
  - scores of every validation token exactly once: official windows, sliding windows, test-time training
    that scores first, a Hedge mixture with exact n-grams
  - exact resume, one log line for every surprise, exit codes
  - a museum of published ideas that did not pay (section 17), each behind its own knob; those that no hook
    fits (weight sharing, layer drop, progressive growing, SAM, recycled attention) stay where they act

Exit codes: 0 ok, 1 a bug (with its traceback), 2 bad knob or input, or no memory or disk left, 3 over
16,000,000 bytes, 4 over the training or the evaluation clock, 5 diverged, 6 a graph was compiled inside the
training clock, 7 a score fails SCORE_CHECK, 8 another rank was lost, 75 stopped by a signal (SIGTERM, SIGINT,
SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU); the last line is the command that goes on.

Sections follow the life of a run: 1 Head, 2 Knob machinery,
3 Runtime and logs, 4 Schedules, 5 Data, 6 Bytes, 7 Model, 8 Loss and hooks, 9 Optimisers, 10 Averages,
11 Quantise and pack, 12 Score, 13 Hedge mixer, 14 Checkpoints, 15 Train, 16 Report, 17 Museum,
18 Config and main.
A section calls only what stands above it. What it reads of `cfg` may be declared anywhere: `Config` joins all
knobs. "Progress" is 0 at the start of a run and 1 at its end: the further of steps and training clock.

Where to start reading: `train` (section 15) is the loop; `GPT.logits` (7) the forward pass; `training_loss`
(8) what is minimised; `Optimisers.step` (9) the update; `execute` (18) a whole run.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import getpass
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import median_low
from typing import NamedTuple, TextIO, TypedDict

try:
    import numpy as np
    import sentencepiece
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
except ModuleNotFoundError as error:
    if __name__ != "__main__":  # told by whoever imports this file
        raise
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(__doc__)
    advice = "pip install torch numpy sentencepiece zstandard"
    for folder in Path(__file__).resolve().parents:
        helper = folder / "data/missing_packages.py"
        if helper.is_file():
            print("error:", runpy.run_path(str(helper))["describe_missing"](error.name), file=sys.stderr)
            sys.exit(2)
    print(f"error: {error.name} is not installed for {sys.executable}; {advice}", file=sys.stderr)
    sys.exit(2)

VERSION = "1.0.0"

# Exit codes, as the head of this file lists them.
BAD_INPUT = 2
OVER_SIZE = 3
OVER_EVAL_TIME = 4
OVER_TRAIN_TIME = 4
DIVERGED = 5
RECOMPILED = 6
ILLEGAL_SCORE = 7
LOST_RANK = 8
PREEMPTED = 75
CLOSED_PIPE = 141  # of --help and the like, which nobody reads on, as after `| head`

SIZE_LIMIT = 16_000_000  # decimal bytes of code + packed model: the challenge's rule


class RunError(Exception):
    """Ends the run with one line for the user and an exit code.

    lone_rank: True where the other ranks do not know of the error, so that this rank must print it itself;
    None until that is decided. command: what the user may paste to go on; it is printed as the last line.
    """

    def __init__(self, message: str, code: int = BAD_INPUT, lone_rank: bool | None = None):
        super().__init__(message)
        self.code = code
        self.lone_rank = lone_rank
        self.command = ""


# ----------------------------------------------------------------------------------------------------------
# 2. KNOB MACHINERY
#
# A knob is a field of a frozen dataclass: DataKnobs, ModelKnobs, ... stand by the code that they steer and
# section 18 joins them into `Config`. Each is set by the environment variable of its name in capitals.
# A hook is a function that hangs a term or an edit on one of eight points of the training; it runs when its
# knob is off its default. To add an idea that fits a point: one knob, one hook, nothing else.
# ----------------------------------------------------------------------------------------------------------
KNOB_ROLES = ("train", "model", "pack", "place")
FATES = ("works", "rejected", "broken", "not run")

# Far beyond any use: a typo, or a forged artifact, cannot ask for endless layers or overflow in torch.
MOST_OF_TYPE = {"int": 2**32, "float": 2.0**100}


def knob(
    default,
    doc: str,
    *,
    source: str,
    low: float | None = None,
    high: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    needs: str = "",
    role: str = "train",
    effect: str = "",
    fate: str = "",
):
    """Declare a Config field.

    low, high: the range that makes sense, shown by --help. most: a bound against typos only.
    needs: comma list of `NAME=VALUE`, `NAME!=VALUE` or NO_OTHER_SCHEDULE, without which it does nothing; of
    conditions joined by `|` one is enough.
    role: "train" and "pack" shape the result; so does "model", which an artifact stores as well; "place" is
    where and how the run happens, and stays out of the config hash.
    source: the paper, pull request or record that it comes from; "official" is the baseline's own script.
    effect: what it was measured to do here; "" = not measured. fate: of a published idea, one of FATES;
    "broken" means that the published code did something else than its description, nothing, or crashed; ours
    does what was described.
    """
    if role not in KNOB_ROLES or fate not in ("", *FATES):
        raise ValueError(f"role {role!r} is not in {KNOB_ROLES}, or fate {fate!r} not in {FATES}")
    metadata = dict(
        doc=doc,
        source=source,
        low=low,
        high=high,
        most=most,
        choices=choices,
        needs=needs,
        role=role,
        effect=effect,
        fate=fate,
    )
    return field(default=default, metadata=metadata)


NO_OTHER_SCHEDULE = "no other schedule"  # in `needs`: each knob with a hook of the point "schedule" is off


class Need(NamedTuple):
    """One condition without which a knob has no effect: another knob's value, or that it is not so."""

    name: str
    operator: str  # "=" or "!="
    text: str
    instead: tuple[Need, ...] = ()  # conditions that do as well

    @classmethod
    def of(cls, text: str) -> Need:
        """Read `NAME=VALUE` or `NAME!=VALUE`, or several joined by `|`."""
        first, *others = text.split("|")
        name, operator, value = re.fullmatch(r"(\w+)(!?=)(.*)", first).groups()
        return cls(name, operator, value, tuple(map(cls.of, others)))

    def is_met(self, values: Mapping[str, object], knob_fields: Mapping[str, Field]) -> bool:
        """Whether it holds; values, knob_fields: of every knob, by its field's name."""
        name = self.name.lower()
        is_equal = values[name] == parse_knob(knob_fields[name], self.text)
        if is_equal == (self.operator == "="):
            return True
        return any(need.is_met(values, knob_fields) for need in self.instead)

    def __str__(self) -> str:
        return " or ".join([f"{self.name}{self.operator}{self.text}", *map(str, self.instead)])


def needs_of(knob_field: Field) -> list[Need]:
    """The conditions in a knob's `needs`, one by one."""
    needs = []
    for condition in filter(None, knob_field.metadata["needs"].split(",")):
        if condition == NO_OTHER_SCHEDULE:
            needs += [Need(name.upper(), "=", "0") for name, _ in HOOKS["schedule"]]
        else:
            needs.append(Need.of(condition))
    return needs


def unmet_needs(
    knob_field: Field, values: Mapping[str, object], knob_fields: Mapping[str, Field]
) -> list[Need]:
    """The conditions that do not hold. values, knob_fields: of every knob, by its field's name."""
    return [need for need in needs_of(knob_field) if not need.is_met(values, knob_fields)]


def parse_knob(knob_field: Field, text: str):
    """The knob's value from the text of its environment variable; RunError if it does not fit the type."""
    wanted = "text"
    try:
        if knob_field.type == "bool":
            wanted = "0 or 1"
            return {"0": False, "1": True}[text]
        if knob_field.type == "int":
            wanted = "a whole number"
            return int(text)
        if knob_field.type == "float":
            wanted = "a finite number"
            value = float(text)
            if math.isfinite(value):
                return value
            raise ValueError
        if knob_field.type == "tuple[str, ...]":
            return tuple(filter(None, text.split(",")))
        return text
    except (KeyError, ValueError):
        raise RunError(f"{knob_field.name.upper()}={text!r} is not {wanted}") from None


def check_limits(knob_field: Field, value) -> None:
    """RunError if a value is outside its knob's range or choices."""
    name = knob_field.name.upper()
    limits = knob_field.metadata
    most = limits["most"] or MOST_OF_TYPE.get(knob_field.type)
    if most and not abs(value) <= most:  # NaN is above nothing, so that the comparison must not be turned
        raise RunError(f"{name}={value} is beyond any use; {most} is the most")
    if limits["low"] is not None and value < limits["low"]:
        raise RunError(f"{name}={value} is below {limits['low']}")
    if limits["high"] is not None and value > limits["high"]:
        raise RunError(f"{name}={value} is above {limits['high']}")
    if limits["choices"] and value not in limits["choices"]:
        raise RunError(f"{name}={value!r} is not one of {', '.join(limits['choices'])}")


def knob_text(value) -> str:
    """A knob's value as its environment variable would spell it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value)


class KnobRow(NamedTuple):
    """What tables say of a knob: --help, --knob-table and --list-ideas are made of these."""

    name: str
    default: str
    allowed: str
    doc: str
    fate: str
    source: str
    effect: str
    group: str


def knob_rows(config_type: type) -> Iterator[KnobRow]:
    """A row for every knob, grouped by the section that declares it, in the order of the sections."""
    for group in reversed(config_type.__mro__):
        if is_dataclass(group) and group is not config_type:
            for knob_field in fields(group):
                yield knob_row(knob_field, group.__name__.removesuffix("Knobs"))


def knob_row(knob_field: Field, group: str) -> KnobRow:
    """The table row of one knob."""
    about = knob_field.metadata
    limits = []
    if about["low"] is not None:
        limits.append(f">= {about['low']}")
    if about["high"] is not None:
        limits.append(f"<= {about['high']}")
    allowed = " ".join(about["choices"]) or " ".join(limits)
    if knob_field.type == "bool":
        allowed = "0 1"
    doc = about["doc"]
    if about["needs"]:
        doc += f" [needs {about['needs'].replace(',', ' and ').replace('|', ' or ')}]"
    return KnobRow(
        name=knob_field.name.upper(),
        default=knob_text(knob_field.default),
        allowed=allowed,
        doc=doc,
        fate=about["fate"],
        source=about["source"],
        effect=about["effect"],
        group=group,
    )


# What a hook of each point takes and gives. All of a point's hooks run, in the order written; of the
# schedules one may be on. Those of "embedding", "input" and "loss" are compiled into the graph (fullgraph: no
# Python `if` on a tensor) and see one micro-batch, so that a loss must be a mean, not a sum.
HOOK_POINTS = {
    "schedule": "(cfg, progress, steps_left) -> learning-rate multiplier, instead of the linear warmdown",
    "embedding": "(cfg, x [B, T, d], ids [B, T], dials) -> x, before the embedding's norm; training only",
    "input": "(cfg, x [B, T, d], ids [B, T], dials) -> x, after the embedding's norm; training only",
    "loss": "(cfg, seen) -> scalar, a mean over positions, added to the mean nats per token; training only",
    "edit_gradients": "(cfg, weights, plan) -> None, of the gradients summed over ranks, before the clip",
    "edit_weights": "(cfg, weights, plan) -> None, after the step",
    "lr_share": "(cfg, weight, progress, blocks) -> the share of its step that a weight makes",
    "decay": "(cfg, progress) -> weight decay of the blocks' matrices, multiplied by their learning rate",
}
HOOKS: dict[str, list[tuple[str, Callable]]] = {point: [] for point in HOOK_POINTS}


def hook(point: str, knob: str) -> Callable[[Callable], Callable]:
    """Decorator: run this function at that point whenever that knob is off its default.

    So the knob's default must be the value at which the idea is off.
    """

    def register(function: Callable) -> Callable:
        HOOKS[point].append((knob, function))
        return function

    return register


def active(cfg: Config, point: str) -> list[Callable]:
    """The hooks of a point whose knob is off its default, in the order written."""
    return [function for knob_name, function in HOOKS[point] if cfg.is_changed(knob_name)]


# ----------------------------------------------------------------------------------------------------------
# 3. RUNTIME AND LOGS: the only code that knows about devices, ranks and files
#
# `Runtime.launch` takes the knobs and torchrun's environment and gives the `Runtime` that a whole run is
# handed: device, compute type, compiler, and how ranks talk. One process on a CPU is the same code, where
# every method is a no-op or the identity. `claim_outputs` makes sure that no run writes over another, RunLog
# writes both logs, `write_atomic` every other file. Section 18 calls these in that order.
# ----------------------------------------------------------------------------------------------------------
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM: 4 times float32's products on an EPYC

# What stops a run: Ctrl-C and schedulers, then a terminal that closes, Slurm's warnings, a limit of CPU time.
# Those of the second kind stay ignored where they were, as `nohup` does it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_UNLESS_IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

# The model files in OUT_DIR, by their official names; the integers of the second may have fewer levels.
WEIGHTS_FILE = "final_model.pt"
MODEL_FILE = "final_model.int8.ptz"


@dataclass(frozen=True)
class RuntimeKnobs:
    """Where a run happens and what its files are called; of these only DTYPE shapes the result."""

    run_id: str = knob(
        "",
        "Name of the run's logs, OUT_DIR/logs/RUN_ID.txt and .jsonl; empty makes one from date and time.",
        role="place",
        source="official",
    )
    out_dir: str = knob(
        ".",
        "Folder for logs/, checkpoints/ and the model files; it is made if it is not there.",
        role="place",
        source="ours",
    )
    seed: int = knob(
        1337,
        "Seed of the initial weights and of every random choice.",
        low=0,
        high=2**32 - 1,
        role="place",
        source="official",
    )
    device: str = knob(
        "auto",
        "Where to run; auto takes CUDA if torch sees a GPU, else the CPU. mps is untested.",
        choices=("auto", "cuda", "cpu", "mps"),
        role="place",
        source="ours",
    )
    dtype: str = knob(
        "auto",
        "Type that the model computes in; auto takes bf16 where the device has bf16 products, fp16 on older "
        "GPUs (T4, V100), else fp32.",
        choices=("auto", "bf16", "fp16", "fp32"),
        source="ours",
    )
    compile: str = knob(
        "auto",
        "torch.compile: 1 insists on it, 0 runs eagerly, auto compiles where that works.",
        choices=("auto", "0", "1"),
        role="place",
        source="ours",
    )
    deterministic: str = knob(
        "auto",
        "Deterministic kernels alone, so that the same seed gives the same bits; auto is 1 on CPUs, else 0.",
        choices=("auto", "0", "1"),
        role="place",
        source="ours",
    )

    def check(self) -> None:
        """RunError (2) if RUN_ID could not name a file."""
        if not re.fullmatch(r"[\w.+-]*", self.run_id):
            raise RunError(f"RUN_ID={self.run_id!r} may hold only letters, digits and . _ + -")


# -- This file and its neighbours ------------------------------------------------------------------------


@lru_cache(maxsize=1)  # as it was when the run began, whatever an editor does to the file meanwhile
def own_source() -> bytes:
    """The bytes of the file that was started: they ship with the model and count."""
    return Path(__file__).read_bytes()


def readable_sha256() -> str:
    """sha256 of the readable source that a packed script holds; '' where the script is readable itself.

    The loader that records/pack_script.py writes sets the global name.
    """
    return globals().get("READABLE_SHA256", "")


def load_tool(path: str) -> dict:
    """The names in a file of the repository that no record needs; RunError (2) if it is not there."""
    folders = Path(__file__).resolve().parents  # a packed script may stand in runs/RUN_ID
    scripts = [folder / path for folder in folders if (folder / path).is_file()]
    if not scripts:
        raise RunError(f"{path} is not beside this script or above; use the one in the repository")
    script = scripts[0]
    sys.modules.setdefault("train_gpt", sys.modules[__name__])  # what it imports is this very program
    return runpy.run_path(str(script))


# -- Which process this is, and what it runs on ----------------------------------------------------------


@dataclass(frozen=True)
class ProcessRank:
    """Which of torchrun's processes this is; a process on its own is rank 0 of 1."""

    local_rank: int  # on its machine: the number of its GPU
    rank: int
    world_size: int

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> ProcessRank:
        """As torchrun's variables say; RunError (2) if they contradict each other or name no meeting.

        Some schedulers set WORLD_SIZE and the address alone: then nothing says which rank this is.
        """
        world_text = env.get("WORLD_SIZE", "1")
        default_rank = "0" if world_text == "1" else "unset"
        texts = (env.get("LOCAL_RANK", "0"), env.get("RANK", default_rank), world_text)
        local_rank, rank, world_size = (int(text) if text.isdecimal() else -1 for text in texts)
        port = env.get("MASTER_PORT", "")
        has_address = bool(env.get("MASTER_ADDR")) and port.isdecimal() and 0 < int(port) < 2**16
        can_meet = world_size == 1 or has_address
        if not 0 <= local_rank < world_size or not 0 <= rank < world_size or not can_meet:
            raise RunError(
                f"LOCAL_RANK, RANK, WORLD_SIZE={','.join(texts)} or MASTER_ADDR, MASTER_PORT are unsound; "
                "unset them all, or let torchrun set them",
                lone_rank=True,
            )
        return cls(local_rank, rank, world_size)


def pick_device_type(wanted: str, env: Mapping[str, str]) -> str:
    """'cuda', 'mps' or 'cpu'; RunError (2) if torch sees no device of the wanted type, or cannot use a GPU
    that is there: a run for 8 GPUs must not start on their CPU in silence."""
    is_available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if wanted in ("auto", "cuda") and not is_available["cuda"]:
        refuse_unused_gpu(*nvidia_gpu(env))
    device_type = wanted
    if wanted == "auto":
        device_type = "cuda" if is_available["cuda"] else "cpu"
    if not is_available[device_type]:
        raise RunError(f"DEVICE={device_type} but torch sees none here; set DEVICE=cpu or DEVICE=auto")
    return device_type


def nvidia_gpu(env: Mapping[str, str]) -> tuple[str, str]:
    """(name, driver version) of the first NVIDIA GPU that the driver's own tool sees; ('', '') without one.

    An empty CUDA_VISIBLE_DEVICES hides GPUs on purpose: there is none then.
    """
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if env.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "", ""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    name, _, driver = answer.stdout.partition("\n")[0].rpartition(", ")
    return (name, driver) if answer.returncode == 0 else ("", "")


# The oldest driver for each CUDA that PyTorch has wheels of, the newest first. CUDA 12 needs 525 by its rule
# of minor versions (docs.nvidia.com/deploy/cuda-compatibility).
WHEEL_DRIVERS = (("cu130", 580), ("cu128", 570), ("cu126", 525))


def refuse_unused_gpu(name: str, driver: str) -> None:
    """RunError (2) if there is an NVIDIA GPU of this name, since torch sees none; it says how to mend it."""
    if not name:
        return
    major = int(driver.partition(".")[0] or 0)
    wheels = [wheel for wheel, oldest in WHEEL_DRIVERS if major >= oldest]
    mend = "install NVIDIA driver 580 or newer"
    if wheels:
        mend = f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{wheels[0]}"
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    raise RunError(
        f"there is a {name} (driver {driver}), but torch {torch.__version__}, built for {built_for}, cannot "
        f"use it: {mend}; or set DEVICE=cpu"
    )


def serves_capability(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether a torch built for these (sm_90, compute_120, ...) has kernels for a GPU of this capability.

    Compiled kernels (sm) run on later GPUs of their major version, PTX (compute) on all later ones.
    """
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")  # sm_90a, sm_120f
        built_for = (int(digits[:-1]), int(digits[-1]))
        is_same_major = built_for[0] == capability[0]
        if built_for <= capability and (is_same_major or kind == "compute"):
            return True
    return False


def pick_device(device_type: str, local_rank: int) -> torch.device:
    """The rank's own GPU, or the CPU or MPS that all share; RunError (2) if there is no GPU left for it, or
    if this torch has no kernels for it."""
    if device_type != "cuda":
        return torch.device(device_type)
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RunError(
            f"rank {local_rank} has no GPU: torch sees {count}; lower --nproc_per_node", lone_rank=True
        )
    major, minor = torch.cuda.get_device_capability(local_rank)
    architectures = torch.cuda.get_arch_list()
    if not serves_capability(architectures, (major, minor)):
        raise RunError(
            f"{torch.cuda.get_device_name(local_rank)} has compute capability {major}.{minor},"
            f" but torch {torch.__version__} was built for {' '.join(architectures)}; install a wheel that "
            "has it (V100 and older: cu126, Blackwell: cu128 or cu130), or set DEVICE=cpu"
        )
    return torch.device("cuda", local_rank)


def pick_dtype(wanted: str, device: torch.device) -> str:
    """'bf16', 'fp16' or 'fp32', by what the device can do.

    It is never picked by a race, which load could turn: two runs of one command must compute in one type.
    GPUs from sm_80 on have bf16 products, T4 and V100 fp16 ones alone, 5 times as fast as fp32's; CPUs have
    bf16 if Linux names one of BF16_CPU_FLAGS.
    """
    if wanted != "auto":
        return wanted
    has_bf16 = False
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        has_bf16 = capability >= (8, 0)
        if not has_bf16 and capability >= (7, 0):
            return "fp16"
    elif device.type == "cpu":
        has_bf16 = not BF16_CPU_FLAGS.isdisjoint(cpu_flags())
    return "bf16" if has_bf16 else "fp32"


def pick_compile(wanted: str, device: torch.device, cache_fault: str = "") -> tuple[bool, str]:
    """(whether to compile, why not if that is news to the user); RunError (2) if COMPILE=1 cannot be done.

    torch 2.5.1 drops repeated tokens' gradients silently on CPUs; 2.13 does not.
    """
    if wanted == "1" and cache_fault:
        raise RunError(f"COMPILE=1 but {cache_fault}", lone_rank=True)
    if wanted != "auto":
        return wanted == "1", ""
    if device.type == "cpu" and torch.__version__ < (2, 6):  # a TorchVersion, which compares with tuples
        return False, f"torch {torch.__version__}'s CPU compiler gives wrong gradients"
    return device.type != "mps" and not cache_fault, cache_fault


COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # names the folder in which torch.compile keeps what it makes


def compile_cache_fault(env: Mapping[str, str], device_type: str) -> str:
    """Why torch.compile cannot keep its files, with the variable that names the folder; '' if it can."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in many containers
        user = f"uid_{os.getuid()}"
    names = [COMPILE_CACHE]
    if device_type == "cuda" and "TRITON_CACHE_DIR" in env:
        names.append("TRITON_CACHE_DIR")
    for name in names:
        folder = env.get(name)
        try:
            if folder is None:
                folder = os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")  # torch's own default
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
        except OSError as error:
            return f"{name}={folder or ''} cannot be written ({error.strerror}); set another folder"
    return ""


def import_compiler(env: MutableMapping[str, str]) -> None:
    """Import torch's compiler now, if its folder cannot be made; env: the process's own.

    An eager run imports it too. It makes the folder as it is imported, and needs it only to compile.
    """
    if not compile_cache_fault(env, "cpu"):
        return
    earlier = {name: env[name] for name in (COMPILE_CACHE,) if name in env}
    env[COMPILE_CACHE] = "/"  # is there on every machine
    importlib.import_module("torch._inductor")
    del env[COMPILE_CACHE]
    env.update(earlier)


def pick_deterministic(wanted: str, device: torch.device) -> bool:
    """Whether torch uses deterministic kernels alone."""
    if wanted == "auto":
        return device.type == "cpu"
    return wanted == "1"


def use_deterministic_kernels(wanted: bool) -> bool:
    """Let torch use deterministic kernels alone, or all; returns what it was before.

    Without it the compiler for CPUs adds up the embedding's gradient by atomic additions from several
    threads, in any order: two runs of one command part after 3 to 14 steps (torch 2.13).
    """
    earlier = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read at first use
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it fills what is overwritten anyway
    return earlier


def use_fused_attention(device: torch.device, deterministic: bool) -> tuple[bool, bool]:
    """Let CUDA's attention take fused kernels alone; returns the earlier (math, cuDNN) settings.

    Never the unfused "math" one, which writes out all scores: without it an input that no fused kernel takes
    is an error. cuDNN's is the fastest on Hopper, has no deterministic backward pass, and is torch's first
    choice or its last on others, by version; FlashAttention-2 is the choice there.
    """
    backends = torch.backends.cuda
    earlier = (backends.math_sdp_enabled(), backends.cudnn_sdp_enabled())
    if device.type == "cuda":
        backends.enable_math_sdp(False)
        is_hopper = torch.cuda.get_device_capability(device)[0] == 9
        backends.enable_cudnn_sdp(is_hopper and not deterministic)
    return earlier


def optional_function(module: str, name: str) -> Callable | None:
    """A function of a package that a run can do without, or None where it does not import."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


flash_attention_3 = optional_function("flash_attn_interface", "flash_attn_func")
flash_attention_3_of_documents = optional_function("flash_attn_interface", "flash_attn_varlen_func")


def has_flash_attention_3(device: torch.device) -> bool:
    """Whether FlashAttention-3 (Shah et al. 2407.08608) is installed and this is a GPU for it, a Hopper."""
    has_package = flash_attention_3 is not None and device.type == "cuda"
    return has_package and torch.cuda.get_device_capability(device)[0] == 9


def is_ampere_or_newer(device: torch.device) -> bool:
    """Whether it is a GPU from sm_80 on: its half-precision attention kernels take fewer key heads than query
    heads, and torch compiles FlexAttention for it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def is_slow_float32(runtime: Runtime) -> bool:
    """Whether the GPU could multiply float32 by TF32, in 19 bits, as the official script lets it, and does
    not: from sm_80 on, unless torch is told to."""
    is_float32 = runtime.is_cuda and runtime.dtype == torch.float32
    has_tf32 = is_float32 and torch.cuda.get_device_capability(runtime.device) >= (8, 0)
    return has_tf32 and not torch.backends.cuda.matmul.allow_tf32


def missing_kernel(error: BaseException) -> str:
    """The operation that DETERMINISTIC=1 asks for and torch lacks on this device, or ''."""
    match = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    if match and isinstance(error, RuntimeError):
        return match[1]
    return ""


# -- CPU only --------------------------------------------------------------------------------------------


def cpu_flags() -> list[str]:
    """The instruction sets of this CPU by Linux's names; none where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return line[1].split() if line else []


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: new pages take time (records/benchmarks/cpu_memory.json)."""
    trim_threshold = -1  # M_TRIM_THRESHOLD in malloc.h
    mmap_threshold = -3  # M_MMAP_THRESHOLD
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**28)


# -- The runtime -----------------------------------------------------------------------------------------


@dataclass
class Runtime:
    """Where the run happens; every method is a no-op or the identity on one CPU process."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    compiles: bool = False
    backend: str | Callable = "inductor"
    eager_reason: str = ""  # why nothing is compiled, if that is news to the user
    deterministic: bool = False  # torch's deterministic kernels alone: same seed, same bits
    defers_stop: bool = False  # a signal waits, so that all ranks stop between the same two steps
    stop_signal: str = ""  # name of the signal that asked for an end, or ''

    @property
    def is_cuda(self) -> bool:
        """Whether this rank has a GPU of CUDA's."""
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        """The compute type as DTYPE spells it."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return names[self.dtype]

    @classmethod
    @contextmanager
    def launch(cls, cfg: Config, env: Mapping[str, str]) -> Iterator[Runtime]:
        """One process, or one of torchrun's, for the body of a `with`; then all is as it was before.

        RunError (2) if the device or torchrun's variables cannot be used.
        """
        device_type = pick_device_type(cfg.device, env)
        process = ProcessRank.from_env(env)
        device = pick_device(device_type, process.local_rank)
        runtime = cls(device, process.rank, process.world_size)
        cache_fault = compile_cache_fault(env, device_type)
        runtime.compiles, runtime.eager_reason = pick_compile(cfg.compile, device, cache_fault)
        runtime.deterministic = pick_deterministic(cfg.deterministic, device)
        earlier_kernels = use_deterministic_kernels(runtime.deterministic)
        math_attention, cudnn_attention = use_fused_attention(device, runtime.deterministic)
        runtime.claim_device()
        if device.type == "cpu":
            keep_freed_memory()
        earlier_handlers = runtime.catch_signals()
        try:
            if runtime.world_size > 1:
                runtime.join_ranks(env)
            runtime.dtype = DTYPES[runtime.main_decides(partial(pick_dtype, cfg.dtype, device))]
            yield runtime
            # After an error this could wait for a rank that is gone: then `main` just leaves.
            if dist.is_initialized():
                dist.destroy_process_group()
        finally:
            for number, handler in earlier_handlers.items():
                signal.signal(number, handler)
            use_deterministic_kernels(earlier_kernels)
            torch.backends.cuda.enable_math_sdp(math_attention)
            torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)

    def claim_device(self) -> None:
        """Make this rank's GPU the thread's own; a new thread would open a context on the first one."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)

    def catch_signals(self) -> dict[signal.Signals, object]:
        """Let signals stop the run; returns the handlers that they had before."""
        earlier = {}
        for number in STOP_SIGNALS + STOP_UNLESS_IGNORED:
            if number in STOP_UNLESS_IGNORED and signal.getsignal(number) == signal.SIG_IGN:
                continue
            earlier[number] = signal.signal(number, self.stop)
        return earlier

    def stop(self, number: int, _frame) -> None:
        """Handler of signals: end now, or, while `defers_stop`, where the run looks at `stop_signal`.

        The first signal is enough: torchrun doubles Ctrl-C.
        """
        is_first = not self.stop_signal
        self.stop_signal = signal.Signals(number).name
        if is_first and not self.defers_stop:
            raise KeyboardInterrupt

    def join_ranks(self, env: Mapping[str, str]) -> None:
        """Meet the other ranks: over nccl between GPUs, over gloo else, so that no GPU is waited for.

        RunError (2) if the port where they meet is taken.
        """
        # torchrun's store still has the addresses of ranks before a restart, so that each start takes a
        # prefix of its own. Nodes count their restarts apart: with several the count is no common prefix.
        prefix = ""
        if env.get("GROUP_WORLD_SIZE") == "1":
            prefix = env.get("TORCHELASTIC_RESTART_COUNT", "")
            # Ranks of one machine need no network; a host name that leads elsewhere would stop them.
            if Path("/sys/class/net/lo").exists():
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            shared_store = next(dist.rendezvous("env://"))[0]
        except RuntimeError as error:
            if "address already in use" not in str(error).lower():
                raise
            raise RunError(
                f"MASTER_PORT={env['MASTER_PORT']} is taken by another program on this machine; set another, "
                "or let torchrun --standalone choose one",
                lone_rank=True,
            ) from None
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.is_cuda else "gloo",
            store=dist.PrefixStore(prefix, shared_store),
            rank=self.rank,
            world_size=self.world_size,
        )

    def compile(self, function: Callable) -> Callable:
        """The function compiled, one graph for each shape, or as it is where nothing is compiled."""
        if not self.compiles:
            return function
        torch._dynamo.config.cache_size_limit = 128  # a graph for each depth and shape; 8 would be an error
        if self.is_cuda and self.deterministic and hasattr(torch._inductor.config, "deterministic"):
            torch._inductor.config.deterministic = True  # torch 2.9 on: chooses no kernel by timing it
        return torch.compile(function, dynamic=False, fullgraph=True, backend=self.backend)

    def synchronize(self) -> None:
        """Wait until the GPU has done all that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Give the GPU back what torch has freed and keeps."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def sum(self, tensor: Tensor) -> Tensor:
        """In-place sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """Every rank's value, by rank, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, make: Callable):
        """Call `make` on every rank and return its result there; a RunError of one is raised on all."""
        result = None
        failure = None
        try:
            result = make()
        except RunError as error:
            failure = (str(error), error.code)
        for rank_failure in filter(None, self.gather(failure)):
            message, code = rank_failure
            raise RunError(message, code, lone_rank=False)
        return result

    def on_main(self, act: Callable):
        """Call `act` on rank 0 and return its result there, None elsewhere; its RunError is raised on all."""

        def act_if_main():
            return act() if self.rank == 0 else None

        return self.agree(act_if_main)

    def main_decides(self, decide: Callable):
        """Call `decide` on rank 0 and give its result, or its RunError, to every rank."""
        decision = [self.on_main(decide)]
        if self.world_size > 1:
            dist.broadcast_object_list(decision, device=torch.device("cpu"))
        return decision[0]

    def main_number(self, value: float) -> float:
        """Rank 0's number on every rank, over the host network: no device is waited for."""
        summand = value if self.rank == 0 else 0.0
        return self.sum(torch.tensor(summand, dtype=torch.float64)).item()

    def share(self, count: int) -> range:
        """This rank's contiguous part of `count` items."""
        first = count * self.rank // self.world_size
        stop = count * (self.rank + 1) // self.world_size
        return range(first, stop)

    def peak_memory_mib(self) -> tuple[int, int]:
        """Most memory (allocated, reserved) on CUDA; elsewhere the peak resident set, given for both."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return resident, resident


# -- Logs and files --------------------------------------------------------------------------------------


ERASE_LINE = "\r\033[K"  # of a terminal: to the start of the line, and clear it


def duration_text(seconds: float) -> str:
    """A duration for a reader: seconds, minutes or hours."""
    if seconds < 599.5:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


class RunLog:
    """Rank 0's two logs: logs/RUN_ID.txt in the official line formats, logs/RUN_ID.jsonl as typed events.

    Other ranks have a log as well, with no folder: it writes and prints nothing. goes_on: append to the logs
    of a run that was cut off, perhaps within a line.
    """

    def __init__(self, folder: Path | None, run_id: str, goes_on: bool = False):
        self.goes_on = False
        self.text_file = None
        self.event_file = None
        self.told_at: dict[str, float] = {}  # phase -> when `status` last told of it
        self.shows_status = False  # on a terminal, in a line that the next one replaces
        if folder is None:
            return
        text_path = folder / f"{run_id}.txt"
        event_path = folder / f"{run_id}.jsonl"
        earlier = [path for path in (text_path, event_path) if path.exists()]
        if goes_on and earlier:
            self.goes_on = True
            for path in earlier:
                end_of_last_line = path.read_bytes().rfind(b"\n") + 1
                os.truncate(path, end_of_last_line)
        mode = "a" if self.goes_on else "x"
        # A path from the environment may hold bytes that are no UTF-8: they are written as escapes.
        self.text_file = text_path.open(mode, encoding="utf-8", errors="backslashreplace")
        self.event_file = event_path.open(mode, encoding="utf-8")

    def line(self, text: str, echo: bool = True) -> None:
        """Write a line to the text log and, with echo, to stdout."""
        if self.text_file is None:
            return
        print(text, file=self.text_file, flush=True)
        if echo:
            self.show(text)

    def show(self, text: str, is_status: bool = False) -> None:
        """Print to stdout alone; a status has no end of line and goes when the next line comes."""
        erase = ERASE_LINE if self.shows_status else ""
        self.shows_status = is_status
        try:
            print(erase + text, end="" if is_status else "\n", flush=True)
        except OSError:  # its reader is gone, as `| head` is after ten lines; the run goes on, in the log
            mute(sys.stdout)

    def say(self, text: str) -> None:
        """Tell whoever watches, and not the log, what is waited for and how long that usually takes."""
        if self.text_file is not None:
            self.show(text)

    def is_status_due(self, phase: str) -> bool:
        """Whether to tell how far a phase is: twice a second on a terminal, else after 3 s and each 60 s."""
        if self.text_file is None:
            return False
        now = time.monotonic()
        interval = 0.5
        delay = 0.0
        if not sys.stdout.isatty():
            interval = 60.0
            delay = 3.0
        return now - self.told_at.setdefault(phase, now + delay - interval) >= interval

    def status(self, phase: str, text: str) -> None:
        """Tell whoever watches, and not the log, how far a phase is, if `is_status_due`."""
        self.told_at[phase] = time.monotonic()
        text = f"{phase}: {text}"
        if sys.stdout.isatty():
            self.show(text[: shutil.get_terminal_size().columns - 1], is_status=True)
        else:
            self.show(text)

    def report_wait(self, phase: str, share: float, seconds: float) -> None:
        """Say, if it is time, how much of a wait is done after so many seconds."""
        if share >= 1:
            self.told_at.pop(phase, None)
        elif self.is_status_due(phase):
            self.status(phase, f"{share:.0%} done, about {duration_text(seconds / share - seconds)} left")

    def warn(self, text: str) -> None:
        """Write a line that says what the user may want to change."""
        self.line(f"warning: {text}")

    def event(self, event: str, **values) -> None:
        """Write a typed event, a JSON object, to the event log."""
        if self.event_file is None:
            return
        record = dict(event=event, time=time.time(), **values)
        print(json.dumps(record), file=self.event_file, flush=True)

    def close(self) -> None:
        """Close both files."""
        if self.shows_status:
            self.show("", is_status=True)
        for file in (self.text_file, self.event_file):
            if file is None:
                continue
            with suppress(OSError):  # a full disk, which has been said
                file.close()


def mute(stream: TextIO) -> None:
    """Let a console that is gone swallow what is still written to it, or that would change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def write_atomic(path: Path, data: bytes | Callable) -> None:
    """Write a file whole or not at all, by a temporary file, fsync and rename.

    data: the bytes, or a function that writes them to the open file it is given. OSError, with the file's
    name, if that fails.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except (OSError, RuntimeError) as error:  # a full disk's names no file; torch.save's is a RuntimeError
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or "it could not be written whole; is the disk full?"
        raise OSError(number, reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


# How a file begins that was taken for another: what it is and, where that helps, what to do.
FILE_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer, which `git lfs pull` replaces by the file",
    b"\x1f\x8b": "packed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it first",
    b"PK\x03\x04": "a zip archive or what torch.save wrote",
    b"\x93NUMPY": "a NumPy array",
    b"PAR1": "a Parquet table",
    b"<": "a web page; was it downloaded without a login?",
    b"{": "JSON",
    b"\x80": "a pickle; save it with today's torch.save",
}


def describe_kind(head: bytes) -> str:
    """A phrase that says what a file is, by its first bytes, if it is of a well-known other kind; else ''."""
    if head[8:9] == b"{":
        return "; it is a safetensors file: load it and torch.save its tensors"
    for start, kind in FILE_KINDS.items():
        if head.lstrip().startswith(start):
            return f"; it is {kind}"
    return ""


@dataclass(frozen=True)
class Outputs:
    """The files that a run is going to write, without its checkpoints."""

    folder: Path
    logs: list[Path]
    models: list[Path]  # none if an artifact is scored
    dumps: list[Path]  # SCORE_DUMP, if asked for

    @classmethod
    def of_run(cls, cfg: Config, run_id: str) -> Outputs:
        """As the config and the run's name say."""
        folder = Path(cfg.out_dir)
        logs = [folder / "logs" / f"{run_id}.txt", folder / "logs" / f"{run_id}.jsonl"]
        models = [] if cfg.eval_only else [folder / WEIGHTS_FILE, folder / MODEL_FILE]
        dumps = [Path(cfg.score_dump)] if cfg.score_dump else []
        return cls(folder, logs, models, dumps)


def claim_outputs(cfg: Config, run_id: str) -> list[TextIO]:
    """Refuse to write where another run has written or is writing; what that run left stays.

    With RESUME, what an unfinished run of this name left is this run's own. Returns locks, which hold that
    name until the run is finished: hold them. RunError (2) if a place is taken or cannot be written.
    """
    outputs = Outputs.of_run(cfg, run_id)
    owners = lock_outputs(outputs)
    is_own = {lock: cfg.resume != "0" and owner == run_id for lock, owner in owners.items()}
    log_lock = next(iter(owners))
    for path in outputs.dumps:
        if not os.access(path.parent, os.W_OK):
            raise RunError(
                f"cannot write SCORE_DUMP={cfg.score_dump}: no such folder, or no right to; set another"
            )
    forbidden = []
    if not is_own[log_lock]:
        forbidden += outputs.logs
    if not all(is_own.values()):
        forbidden += outputs.models + outputs.dumps
    for path in forbidden:
        if path.exists():
            mend = "RUN_ID" if path in outputs.logs else "OUT_DIR, e.g. OUT_DIR=runs/2"
            raise RunError(f"{path} is there from an earlier run; move it away or set another {mend}")
    if outputs.models:
        remove_temporary_files(outputs.folder)
    for lock in owners:
        if not is_own[lock]:  # a lock is never empty when a run is resumed
            Path(lock.name).write_text(run_id)
    return list(owners)


# What flock says where a file system has no locks, as some network file systems have none.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def try_lock(file: TextIO) -> bool:
    """Lock an open file for this process without waiting; False if its file system has no locks.

    BlockingIOError if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def lock_outputs(outputs: Outputs) -> dict[TextIO, str]:
    """Lock the name of the logs and, if there will be models, of these.

    Returns each lock, that of the logs first, with the RUN_ID in it, '' if no unfinished run left one.
    One warning where the file system has no locks. RunError (2) if another run holds a lock, or if nothing
    can be written there.
    """
    try:
        (outputs.folder / "logs").mkdir(parents=True, exist_ok=True)
        locked_paths = outputs.logs[:1] + outputs.models[:1]
        locks = [path.with_name(f".{path.name}.lock").open("a+") for path in locked_paths]
        has_locks = [try_lock(lock) for lock in locks]
        if not all(has_locks):
            print(
                f"warning: the file system of OUT_DIR={outputs.folder} has no locks: give no other run this "
                "OUT_DIR, it would not be noticed",
                file=sys.stderr,
            )
        return {lock: Path(lock.name).read_text() for lock in locks}
    except BlockingIOError:
        raise RunError(f"another run is writing to OUT_DIR={outputs.folder}; set another OUT_DIR") from None
    except OSError as error:
        raise RunError(
            f"cannot write to OUT_DIR={outputs.folder} ({error.strerror}); set another OUT_DIR"
        ) from None


def remove_temporary_files(folder: Path) -> None:
    """Remove what a run that was killed as it wrote a model or a checkpoint has left in its OUT_DIR."""
    for pattern in ("final_model.*.tmp-*", "checkpoints/*.tmp-*"):
        for path in folder.glob(pattern):
            path.unlink()


# ----------------------------------------------------------------------------------------------------------
# 4. SCHEDULES: what the next step does, decided before it
#
# In: the config, how many steps are done, the training seconds so far and the pace of recent steps. Out of
# `plan_step`: a StepPlan with learning rate, momentum, phase and random seeds, a pure function of these and
# so equal on every rank. `Clock` measures the seconds; `train` (section 15) asks both before each step.
# A learning-rate curve is a hook of the point "schedule"; the official warmdown runs when none is on.
# ----------------------------------------------------------------------------------------------------------
GOLDEN_FLOOR = 0.382  # 1 - 1 / golden ratio: where GOLDEN_LR ends
PACE_STEPS = 15  # recent steps whose median is the pace: a slow one among them does not bend a schedule
# The last step is foretold by this quantile of so many recent ones: all but one of 50 were no slower.
LAST_STEP_STEPS = 50
LAST_STEP_QUANTILE = 0.98


@dataclass(frozen=True)
class ScheduleKnobs:
    """How long the run is, and its learning rate over that time."""

    iterations: int = knob(
        20_000,
        "Most optimiser steps; 0 trains nothing and only validates, packs and scores.",
        low=0,
        source="official",
    )
    max_wallclock_seconds: float = knob(
        600.0,
        "Seconds of training that the run may take, warm-up and validations left out; 0 sets no clock.",
        low=0,
        source="official",
    )
    gptq_reserve_seconds: float = knob(
        0.0,
        "Seconds of that clock that are kept for quantising: training ends so much earlier; 0 = none.",
        low=0,
        needs="MAX_WALLCLOCK_SECONDS!=0",
        source="#1394",
    )
    warmdown_iters: int = knob(
        1200,
        "Last steps, over which the learning rate falls linearly to LR_FLOOR; 0 keeps it constant.",
        low=0,
        needs=f"WARMDOWN_FRAC=0,{NO_OTHER_SCHEDULE}",
        source="official",
    )
    warmdown_frac: float = knob(
        0.0,
        "Length of that linear fall as a share of the run; 0 goes by the steps of WARMDOWN_ITERS.",
        low=0,
        high=1,
        needs=NO_OTHER_SCHEDULE,
        source="ours",
    )
    lr_floor: float = knob(
        0.0,
        "Learning-rate multiplier at which the linear fall ends; 0 falls to nothing.",
        low=0,
        high=1,
        needs=NO_OTHER_SCHEDULE,
        source="ours",
    )
    seq_change_warmup_steps: int = knob(
        0,
        "Steps over which the learning rate rises linearly to its schedule's again, each time that "
        "TRAIN_SEQ_SCHEDULE changes the length; published with 32; 0 = none.",
        low=0,
        needs="TRAIN_SEQ_SCHEDULE!=",
        source="PR #2014",
    )
    min_lr: float = knob(
        0.0,
        "Least learning-rate multiplier of the linear fall, which stays there once it is reached; 0 = none. "
        "LR_FLOOR bends the whole fall instead, to end there.",
        low=0,
        high=1,
        needs=NO_OTHER_SCHEDULE,
        source="#1394",
    )
    tidal_lr: bool = knob(
        False,
        "Raise the learning rate from 0.1 to 1 until progress TIDAL_WARMUP, then fall by a cosine to 0.1.",
        source="PR #1434",
        effect="-0.034 bpb at 300 steps, 3 seeds, wave15",
        fate="works",
    )
    tidal_warmup: float = knob(
        0.382,
        "Share of the run over which Tidal raises the learning rate; 0 starts at the full rate.",
        low=0,
        high=0.999,
        needs="TIDAL_LR=1",
        source="PR #1434",
        effect="0.1 instead of 0.382: -0.015 bpb, 3 seeds, 120 steps",
        fate="broken",
    )
    cosine_lr: bool = knob(
        False,
        "Let the learning rate fall by half a cosine from 1 to 0.1 over the run.",
        source="PR #1434",
        effect="-0.025 bpb against the warmdown, 3 seeds, 120 steps",
        fate="works",
    )
    cosine_cycles: float = knob(
        1.0,
        "Number of cosine falls in the run, each from the top; 1 has no restart.",
        low=0.01,
        needs="COSINE_LR=1",
        source="PR #1434",
        effect="2 falls: +0.022 bpb, 3 seeds, 120 steps",
        fate="rejected",
    )
    golden_lr: bool = knob(
        False,
        "Let the cosine end at 0.382 of the learning rate instead of 0.1.",
        needs="COSINE_LR=1",
        source="PR #1434",
        effect="-0.005 bpb, 3 seeds, 120 steps: inside noise",
        fate="broken",
    )

    def check(self) -> None:
        """RunError if two curves are switched on, or if no time is left to train."""
        switched_on = []
        for knob_name, _ in HOOKS["schedule"]:
            if self.is_changed(knob_name):
                switched_on.append(knob_name.upper())
        if len(switched_on) > 1:
            raise RunError(f"two schedules at once: {', '.join(switched_on)}; set one to 0")
        if self.cap <= 0:
            raise RunError(
                f"GPTQ_RESERVE_SECONDS={self.gptq_reserve_seconds} leaves nothing of "
                f"MAX_WALLCLOCK_SECONDS={self.max_wallclock_seconds} to train"
            )

    @property
    def schedule(self) -> str:
        """Name of the knob whose curve the learning rate follows, or "warmdown"."""
        for knob_name, _ in HOOKS["schedule"]:
            if self.is_changed(knob_name):
                return knob_name
        return "warmdown"

    @property
    def cap(self) -> float:
        """Seconds that training may take; infinite without a clock."""
        return (self.max_wallclock_seconds or math.inf) - self.gptq_reserve_seconds


def predict_steps_left(cfg: Config, step: int, elapsed: float, step_seconds: float) -> float:
    """Steps until the step limit or, at `step_seconds` a step, until the clock; at least 0."""
    steps_by_limit = cfg.iterations - step
    steps_by_clock = math.inf
    if step_seconds > 0:
        steps_by_clock = (cfg.cap - elapsed) / step_seconds
    return max(0.0, min(steps_by_limit, steps_by_clock))


def is_finished(cfg: Config, step: int, elapsed: float, foretold_seconds: float) -> bool:
    """True when the next step might pass a limit. One step always runs, so that a slow machine trains.

    foretold_seconds: what that step may well take, `Clock.foretell_step`.
    """
    if step >= cfg.iterations:
        return True
    return step > 0 and cfg.cap < elapsed + foretold_seconds


def is_due(step: int, every: int) -> bool:
    """Whether `step` is one of every so many; never if `every` is 0."""
    return every > 0 and step % every == 0


def cosine_fall(progress: float, floor: float = 0.1, cycles: float = 1.0) -> float:
    """Half a cosine from 1 down to `floor` in each cycle: floor + (1 - floor) / 2 (1 + cos(pi phase)).

    Where the end of the run ends a cycle, it does not begin a new one.
    """
    phase = cycles * progress % 1.0
    if phase == 0.0 and progress >= 1.0:
        phase = 1.0
    return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * phase))


def rise_and_fall(progress: float, rise_until: float, fall_from: float) -> float:
    """Linear from 0.1 to 1 until `rise_until`, 1 until `fall_from`, then half a cosine back to 0.1."""
    if progress < rise_until:
        return 0.1 + 0.9 * progress / rise_until
    share_of_fall = max(0.0, progress - fall_from) / (1 - fall_from)
    return cosine_fall(share_of_fall)


def warmdown(cfg: Config, progress: float, steps_left: float) -> float:
    """The official schedule: 1, then linear over the last WARMDOWN_ITERS steps, or a share of the run."""
    if cfg.warmdown_frac:
        share = (1 - progress) / cfg.warmdown_frac
    elif cfg.warmdown_iters:
        share = steps_left / cfg.warmdown_iters
    else:
        share = 1.0
    return max(cfg.min_lr, cfg.lr_floor + (1 - cfg.lr_floor) * min(1.0, share))


@hook("schedule", knob="tidal_lr")
def tidal(cfg: Config, progress: float, steps_left: float) -> float:
    """Rise until TIDAL_WARMUP, then fall, with nothing flat between (PR #1434)."""
    return rise_and_fall(progress, cfg.tidal_warmup, cfg.tidal_warmup)


@hook("schedule", knob="cosine_lr")
def cosine(cfg: Config, progress: float, steps_left: float) -> float:
    """Cosine, in one or several cycles (Loshchilov and Hutter, arXiv 1608.03983; PR #1434)."""
    floor = GOLDEN_FLOOR if cfg.golden_lr else 0.1
    return cosine_fall(progress, floor, cfg.cosine_cycles)


def lr_scale_at(cfg: Config, progress: float, steps_left: float) -> float:
    """The number that every learning rate is multiplied by, from the one curve that is on."""
    curves = active(cfg, "schedule")
    curve = curves[0] if curves else warmdown
    return curve(cfg, progress, steps_left)


def muon_momentum_at(cfg: Config, step: int) -> float:
    """Muon's momentum: linear in steps from its start to its value, as in the official script."""
    share = 1.0
    if cfg.muon_momentum_warmup_steps:
        share = min(1.0, step / cfg.muon_momentum_warmup_steps)
    start = cfg.muon_momentum_warmup_start
    return start + share * (cfg.muon_momentum - start)


def phase_at(cfg: Config, progress: float) -> int:
    """Number of the phase at this progress, from the end: -1 is the last, whose layers are scored."""
    phases_to_come = sum(progress < phase.until for phase in cfg.phases)
    return -max(1, phases_to_come)


def draw_seed(*key) -> int:
    """A seed below 2^24 (exact in float32) for anything random; the same key gives the same on every rank."""
    text = "/".join(map(str, key))
    return zlib.crc32(text.encode()) % 2**24


def kept_layers(cfg: Config, step: int) -> tuple[bool, ...]:
    """LAYER_DROP: whether each effective layer runs in a step; the first of each U-Net half always does."""
    generator = random.Random(draw_seed(cfg.seed, "layers", step))
    always_kept = (0, cfg.encoders)
    kept = []
    for layer in range(cfg.depth):
        kept.append(layer in always_kept or generator.random() >= cfg.layer_drop)
    return tuple(kept)


class Dials(NamedTuple):
    """What compiled code sees of a step: views of the tensor that `StepPlan.dials` makes.

    A NamedTuple, since torch.compile follows those from torch 2.5 on. A Python number in place of the
    tensor would compile the graph again at each step.
    """

    noise: Tensor  # scalar: seed of the step's draws
    progress: Tensor  # scalar
    layers: Tensor  # [effective layers]: 1 runs, 0 is dropped

    @classmethod
    def of(cls, tensor: Tensor) -> Dials:
        """Name the parts of StepPlan.dials' tensor."""
        return cls(tensor[0], tensor[1], tensor[2:])


@dataclass(frozen=True)
class StepPlan:
    """Everything that changes from step to step, decided before it and equal on every rank."""

    progress: float  # 0 at the start, 1 at the end of the run
    lr_scale: float  # every learning rate is multiplied by it
    muon_momentum: float
    step: int = 0  # steps completed before this one
    phase: int = -1  # whose layers train, by its number from the end
    layers: tuple[bool, ...] = ()  # LAYER_DROP: whether each runs
    noise: int = 0  # seed of the step's draws inside compiled code

    def dials(self, device: torch.device) -> Tensor:
        """What compiled code sees of the plan, float32: [noise, progress, 1 or 0 for each layer]."""
        values = torch.tensor([self.noise, self.progress, *self.layers], dtype=torch.float32)
        if device.type != "cuda":
            return values.to(device)
        return values.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait


def plan_step(cfg: Config, step: int, elapsed: float, step_seconds: float) -> StepPlan:
    """Decide the step after `step` completed ones.

    elapsed: rank 0's training seconds; step_seconds: median of its recent steps, 0 if unknown.
    """
    # The further of steps and clock, so that a schedule ends with the run whichever limit ends it; by steps
    # alone, PR #1434 stopped at 8 % of its curve.
    progress = min(1.0, max(step / max(cfg.iterations, 1), elapsed / cfg.cap))
    steps_left = predict_steps_left(cfg, step, elapsed, step_seconds)
    return StepPlan(
        progress=progress,
        lr_scale=lr_scale_at(cfg, progress, steps_left),
        muon_momentum=muon_momentum_at(cfg, step),
        step=step,
        phase=phase_at(cfg, progress),
        layers=kept_layers(cfg, step),
        noise=draw_seed(cfg.seed, "noise", step),
    )


class Clock:
    """Rank 0's training seconds, pauses left out.

    On CUDA its reading is at most two steps late, and in return the device never waits for it: each tick
    waits for the event that was recorded two ticks before.
    """

    def __init__(self, runtime: Runtime, step_seconds: float = 0.0):
        """step_seconds: the pace that a warm-up measured, 0 if unknown."""
        self.runtime = runtime
        self.total = 0.0  # seconds before the latest start
        self.started = 0.0  # time.perf_counter() then
        self.previous_tick: float | None = None  # the last reading that a step can be measured from
        self.recent_steps: deque[float] = deque(maxlen=LAST_STEP_STEPS)  # their seconds
        if step_seconds:
            self.recent_steps.append(step_seconds)
        self.pending_events = deque()  # CUDA events of steps that the device may not have done yet
        self.stop_requested = False  # by a signal, on any rank
        self.data_failed = False  # the next batch could not be read, on any rank

    def start(self) -> None:
        """Begin, or go on, once the device has done what it was given."""
        self.runtime.synchronize()
        self.started = time.perf_counter()
        self.previous_tick = None

    @contextmanager
    def paused(self, ticked: float | None = None) -> Iterator[None]:
        """Stand still while something other than training runs.

        ticked: what `tick` gave just now. A device that runs behind has not done its steps by then.
        """
        self.runtime.synchronize()
        is_exact = ticked is not None and not self.runtime.is_cuda
        self.total = ticked if is_exact else self.seconds()
        self.pending_events.clear()
        yield
        self.start()

    def tick(self, data_failed: bool = False) -> float:
        """Seconds trained by rank 0's clock, the same on every rank; call once before each step.

        data_failed: this rank has no batch for that step.
        """
        is_cuda = self.runtime.is_cuda
        # A host that runs ahead of its device measures nothing: a tick measures only if it waits for an
        # event, as each does from the third on.
        is_paced = not is_cuda or len(self.pending_events) == 2
        if is_cuda:
            event = torch.cuda.Event()
            event.record()
            self.pending_events.append(event)
        if len(self.pending_events) > 2:
            self.pending_events.popleft().synchronize()

        reading = self.seconds() if self.runtime.rank == 0 else 0.0
        is_stopping = bool(self.runtime.stop_signal)
        # The sum over ranks is rank 0's reading, and how many ranks have had a signal or have no batch.
        totals = self.runtime.sum(torch.tensor([reading, is_stopping, data_failed], dtype=torch.float64))
        now, stopping_ranks, failed_ranks = totals.tolist()
        self.stop_requested = stopping_ranks > 0
        self.data_failed = failed_ranks > 0

        if self.previous_tick is not None and is_paced:
            self.recent_steps.append(now - self.previous_tick)
        self.previous_tick = now if is_paced else None
        return now

    def seconds(self) -> float:
        """This rank's reading, for logs."""
        return self.total + time.perf_counter() - self.started

    def step_seconds(self) -> float:
        """Median of the recent steps' seconds, 0 if there are none: one slow step does not bend it."""
        latest = list(self.recent_steps)[-PACE_STEPS:]
        return median_low(latest) if latest else 0.0

    def foretell_step(self) -> float:
        """Seconds to keep free for the next step: a high quantile of the recent ones, or the one before if
        that was slower; 0 if there are none. On a busy machine a step may still take longer."""
        if not self.recent_steps:
            return 0.0
        by_length = sorted(self.recent_steps)
        index = math.ceil(LAST_STEP_QUANTILE * len(by_length)) - 1
        return max(by_length[index], self.recent_steps[-1])


# ----------------------------------------------------------------------------------------------------------
# 5. DATA: official shards -> the same global batches at any world size
#
# In: a folder of token shards. `TokenStream` reads those of one split as one long sequence; `batches` cuts it
# into windows of TRAIN_SEQ_LEN targets and gives each rank its part of every step's; `prefetch` makes the
# next batch on a thread. The windows of a step depend on the seed and the step alone, so that a resumed run,
# or one on other ranks, reads the same text. The validation split (section 6) is a TokenStream too.
# ----------------------------------------------------------------------------------------------------------
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256  # int32: magic, version, count of tokens, zeros
SHARD_HEADER_BYTES = 4 * SHARD_HEADER_INTS
LLAMA_MAGIC = 20240801  # of llm.c's shards of uint32 tokens
# Under PACK_DOCUMENTS FlashAttention-3 is given room for T / 16 documents a row of T tokens: with their true
# count the graph would be compiled anew.
SHORTEST_DOCUMENT = 16
BOS_ID = 1  # the piece that begins a document in official shards of any vocabulary
MAKE_SHARDS = "make shards from the text with `python data/tokenize_docs.py`"


@dataclass(frozen=True)
class DataKnobs:
    """Which tokens the run trains on, and in what portions."""

    data_path: str = knob(
        "./data/datasets/fineweb10B_sp1024",
        "Folder that holds the token shards, *_train_*.bin and *_val_*.bin.",
        role="place",
        source="official",
    )
    data_shuffle: bool = knob(
        False,
        "Visit the training windows in an order drawn from SEED, anew each epoch; 0 keeps the shards' order.",
        source="ours",
    )
    train_batch_tokens: int = knob(
        524_288,
        "Tokens of one optimiser step, over all ranks; a multiple of TRAIN_SEQ_LEN.",
        low=1,
        source="official",
    )
    train_seq_len: int = knob(
        1024,
        "Tokens of context that a training or validation window holds.",
        low=2,
        most=2**20,
        role="model",
        source="official",
    )
    train_seq_schedule: str = knob(
        "",
        "Lengths of the training windows until each progress, e.g. 1024@0.1,2048@0.7,3072@1.0, with as many "
        "tokens a step; the last one is TRAIN_SEQ_LEN and none is longer; empty = that throughout.",
        source="PR #2014",
    )

    def check(self) -> None:
        """RunError if a step is not a whole number of windows, or the lengths are no schedule."""
        if self.eval_only:
            return
        lengths = [length for _, length in self.window_lengths]
        ends = [0.0, *[until for until, _ in self.window_lengths]]
        is_rising = all(before < until for before, until in itertools.pairwise(ends))
        if not is_rising or ends[-1] != 1 or min(lengths) < 2:
            self.refuse_lengths()
        if not lengths[-1] == max(lengths) == self.train_seq_len:
            self.refuse_lengths()
        for length in lengths:
            if self.train_batch_tokens % length:
                name = "TRAIN_SEQ_LEN" if length == self.train_seq_len else "TRAIN_SEQ_SCHEDULE's"
                raise RunError(
                    f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} is not a multiple of {name}={length}"
                )

    def refuse_lengths(self) -> None:
        """Raise the RunError (2) of a TRAIN_SEQ_SCHEDULE that is none."""
        raise RunError(
            f"TRAIN_SEQ_SCHEDULE={self.train_seq_schedule} needs progress that rises to 1.0, lengths of 2 or "
            f"more, and the longest as its last, TRAIN_SEQ_LEN={self.train_seq_len}"
        )

    @property
    def window_lengths(self) -> list[tuple[float, int]]:
        """TRAIN_SEQ_SCHEDULE as (until this progress, tokens of a window); RunError if it is no such list."""
        if not self.train_seq_schedule:
            return [(1.0, self.train_seq_len)]
        lengths = []
        try:
            for entry in self.train_seq_schedule.split(","):
                length, _, until = entry.partition("@")
                lengths.append((float(until), int(length)))
        except ValueError:
            text = repr(self.train_seq_schedule)
            message = f"TRAIN_SEQ_SCHEDULE={text} is not like 1024@0.1,2048@1.0 (tokens@progress)"
            raise RunError(message) from None
        return lengths

    @property
    def sequences(self) -> int:
        """Windows of one step, over all ranks."""
        return self.train_batch_tokens // self.train_seq_len


def describe_magic(header: np.ndarray) -> str:
    """A phrase that says whose header [256] a foreign shard's is, and what to do."""
    magic = header[0]
    if magic == LLAMA_MAGIC:
        return f"; llm.c wrote it for Llama 3, 4 bytes a token; this reads 2; {MAKE_SHARDS}"
    if magic.byteswap() == SHARD_MAGIC:
        return f"; its bytes are in the other order (big-endian); {MAKE_SHARDS}"
    return f"; another tool's, or bare tokens without a header, as nanoGPT's; {MAKE_SHARDS}"


def refuse_copies(paths: list[Path]) -> None:
    """RunError (2) on a file like `x_train_000000 (1).bin` beside x_train_000000.bin: tokens read twice."""
    stems = {path.stem for path in paths}
    for path in paths:
        numbered = re.match(r"(.*_\d+)\D", path.stem)
        if numbered and numbered[1] in stems:
            raise RunError(f"{path} seems a copy of {numbered[1]}.bin beside it; move one of them away")


def open_shard(path: Path) -> np.ndarray:
    """Memory-map the uint16 tokens [count] of an official shard.

    RunError (2) on a file that is not one, or is not as long as its header says.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    if len(header) != SHARD_HEADER_INTS:
        mend = describe_kind(header.tobytes()) or "; fetch it again"
        raise RunError(f"{path} is no token shard: {size} bytes do not hold a header{mend}")
    magic, version, count = map(int, header[:3])
    if magic != SHARD_MAGIC:
        kind = describe_kind(header.tobytes()) or describe_magic(header)
        raise RunError(f"{path} is no token shard: magic {magic}, not {SHARD_MAGIC}{kind}")
    if version != SHARD_VERSION:
        raise RunError(f"{path} has shard version {version}; this reads {SHARD_VERSION}; {MAKE_SHARDS}")
    if count == 0:
        room = (size - SHARD_HEADER_BYTES) // 2
        fault = f"its header says 0, {room} follow (was its writer stopped?)" if room else "remove it"
        raise RunError(f"{path} holds no tokens; {fault}; {MAKE_SHARDS}")
    expected = SHARD_HEADER_BYTES + 2 * count
    if size == SHARD_HEADER_BYTES + 4 * count:
        raise RunError(f"{path} holds 4 bytes a token (uint32); this reads 2; {MAKE_SHARDS}")
    if size != expected:
        raise RunError(f"{path} is damaged: {size} bytes, its header says {expected}; fetch it again")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)
    return np.asarray(tokens)  # a plain array over the same map: its slices are made faster


class TokenStream:
    """The shards of one split as one sequence of tokens, read from the disk as they are needed."""

    def __init__(self, folder: str, split: str, vocab_size: int):
        """RunError (2) if the folder has no shards of that split, or those of two datasets."""
        # "._x.bin" is what macOS leaves beside x.bin on other disks.
        shards = [path for path in Path(folder).glob(f"*_{split}_*.bin") if path.name[0] != "."]
        sidecar = f"_{split}_bytes_"  # not tokens, but how many bytes each adds: see `sidecar_bytes`
        self.paths = sorted(path for path in shards if sidecar not in path.name)
        if not self.paths:
            raise RunError(
                f"no *_{split}_*.bin in DATA_PATH={folder}; "
                "make some with `python data/pydocs.py` or `python data/fineweb.py`, or set DATA_PATH"
            )
        datasets = {path.name.partition(f"_{split}_")[0] for path in self.paths}
        if len(datasets) != 1:
            raise RunError(f"DATA_PATH={folder} mixes datasets {sorted(datasets)}; keep one a folder")
        refuse_copies(self.paths)
        counts = [len(open_shard(path)) for path in self.paths]
        # Read as files: a map of one that is cut short meanwhile would kill the process (SIGBUS).
        self.files = [path.open("rb", buffering=0) for path in self.paths]
        self.vocab_size = vocab_size
        self.bounds = np.cumsum([0, *counts])  # where each shard begins; then the total

    def __len__(self) -> int:
        """Count of tokens."""
        return int(self.bounds[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), uint16; RunError (2) if one cannot be read or is no token."""
        end = start + count
        first_shard = np.searchsorted(self.bounds, start, side="right") - 1
        end_shard = np.searchsorted(self.bounds, end - 1, side="right")
        pieces = []
        for index in range(first_shard, end_shard):
            begin, stop = self.bounds[index : index + 2].tolist()
            pieces.append(self.read_shard(index, max(start, begin) - begin, min(end, stop) - begin))
        return np.concatenate(pieces)

    def read_shard(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one shard; RunError (2), with the position, as `read`."""
        path = self.paths[index]
        size = 2 * (stop - start)
        data = b""
        descriptor = self.files[index].fileno()
        try:
            while len(data) < size:  # Linux gives at most 2 GiB at a time
                offset = SHARD_HEADER_BYTES + 2 * start + len(data)
                part = os.pread(descriptor, size - len(data), offset)
                if not part:
                    break
                data += part
        except OSError as error:
            raise RunError(f"cannot read {path} at position {start}: {error.strerror}") from None
        if len(data) < size:
            left = (os.fstat(descriptor).st_size - SHARD_HEADER_BYTES) // 2
            raise RunError(f"{path} was cut short while it was read: {left} tokens are left; fetch it again")
        tokens = np.frombuffer(data, "<u2")
        if int(tokens.max()) >= self.vocab_size:
            offset = int(np.argmax(tokens >= self.vocab_size))
            raise RunError(
                f"{path} holds token {tokens[offset]} at position {start + offset}, beyond "
                f"VOCAB_SIZE={self.vocab_size}: made with another tokenizer?"
            )
        return tokens

    def count_windows(self, length: int) -> int:
        """How many training windows of `length` targets it holds; RunError (2) if none."""
        if len(self) <= length:
            raise RunError(f"the shards hold {len(self)} tokens, TRAIN_SEQ_LEN={length} needs more")
        return (len(self) - 1) // length

    def epoch(self, cfg: Config, step: int, length: int = 0) -> int:
        """Which pass over the training windows a step starts in, from 1; length: as in `window_order`."""
        length = length or cfg.train_seq_len
        windows_before = cfg.train_batch_tokens // length * max(step, 0)
        return windows_before // self.count_windows(length) + 1


def window_order(cfg: Config, window_count: int, step: int, length: int = 0) -> np.ndarray:
    """Indices of the training windows of one step: a pure function of seed, step and length.

    length: tokens of a window, 0 for TRAIN_SEQ_LEN; all windows of a step hold TRAIN_BATCH_TOKENS.
    """
    sequences = cfg.train_batch_tokens // (length or cfg.train_seq_len)
    first = step * sequences
    epochs, indices = np.divmod(np.arange(first, first + sequences), window_count)
    if not cfg.data_shuffle:
        return indices
    order = []
    for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
        order.append(epoch_order(cfg.seed, epoch, window_count)[index])
    return np.array(order)


# 80 shards have 7.8 M windows, which take 0.8 s to permute: too long for every step. A step meets two epochs.
@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, window_count: int) -> np.ndarray:
    """The order [window_count] in which DATA_SHUFFLE visits the windows in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(window_count)


def batches(
    cfg: Config, stream: TokenStream, runtime: Runtime, first_step: int = 0, length: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's (input ids, target ids) of each step from `first_step` on, without end.

    Both are int64 [the rank's sequences, T], where T is `length`, by default TRAIN_SEQ_LEN; targets are the
    inputs one token on, so that neighbouring windows share a token.
    """
    length = length or cfg.train_seq_len
    window_count = stream.count_windows(length)
    for step in itertools.count(first_step):
        step_windows = window_order(cfg, window_count, step, length)
        rank_windows = step_windows[list(runtime.share(len(step_windows)))]
        rows = [stream.read(window * length, length + 1) for window in rank_windows.tolist()]
        block = torch.from_numpy(np.array(rows, np.int64).reshape(-1, length + 1))
        input_ids = block[:, :-1]
        target_ids = block[:, 1:]
        if cfg.pack_documents and has_flash_attention_3(runtime.device):
            refuse_short_documents(input_ids)
        if runtime.is_cuda:  # which waits for the copy unless its source is contiguous and pinned
            input_ids = input_ids.contiguous().pin_memory()
            target_ids = target_ids.contiguous().pin_memory()
        yield input_ids, target_ids


def refuse_short_documents(ids: Tensor) -> None:
    """RunError (2) if a row of ids [B, T] begins more documents than FlashAttention-3 is given room for."""
    most = ids.size(1) // SHORTEST_DOCUMENT
    if (ids == BOS_ID).sum(1).gt(most).any():
        raise RunError(
            f"a training window of {ids.size(1)} tokens begins more than {most} documents, too many for "
            "PACK_DOCUMENTS=1 with FlashAttention-3; unset it"
        )


def prefetch(items: Iterator, runtime: Runtime) -> Iterator:
    """Yield the same endless items, each made on a thread while the one before is used.

    An error that making an item raised is raised here. Closing the generator ends the thread.
    """
    with ThreadPoolExecutor(1, initializer=runtime.claim_device) as pool:
        ahead = pool.submit(next, items)
        while True:
            item = ahead.result()
            ahead = pool.submit(next, items)
            yield item


# ----------------------------------------------------------------------------------------------------------
# 6. BYTES: the denominator of bits per byte, checked against decoded text
#
# In: a SentencePiece tokenizer and the validation shards. `ByteTable` counts the bytes of text that each
# token adds; `decoded_bytes` counts those of the text that the tokens decode to. `load_validation` demands
# that both agree, to the byte, before anything is trained, and gives the Validation that section 12 scores.
# Where *_val_bytes_*.bin lie beside the shards, they say what each token adds, and must agree as well.
# CaseOps (#1729; data/caseops.py) is a text whose capitals are marks before small letters: the bytes are
# those of the text that the marks stand for.
# ----------------------------------------------------------------------------------------------------------
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
DECODE_BATCH = 1000  # documents decoded at a time
SLOW_TO_DECODE = 10_000_000  # tokens
DECODED_PER_SECOND = 3_000_000  # tokens: the embedded corpus on one core gave 3.7 M
REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no UTF-8, three bytes itself
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # CaseOps: title, all capitals, next letter, literal mark follows
# In UTF-8, a mark and, after the last of them, the literal one that stays.
CASE_MARK_BYTES = re.compile(rb"\xee\x80\x84(\xee\x80[\x81-\x84])?|\xee\x80[\x81-\x83]")


@dataclass(frozen=True)
class BytesKnobs:
    """The tokenizer, which ties tokens to bytes."""

    tokenizer_path: str = knob(
        "./data/tokenizers/fineweb_1024_bpe.model",
        "SentencePiece model that the shards in DATA_PATH were made with.",
        role="place",
        source="official",
    )
    vocab_size: int = knob(
        1024,
        "Number of tokens, and rows of the embedding; it must equal the tokenizer's.",
        low=2,
        high=65_536,
        role="model",
        source="official",
    )


class ByteTable:
    """What each token of a vocabulary adds to the text, as arrays [V] by token id."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        pieces = []
        is_boundary = []
        for token in range(tokenizer.vocab_size()):
            prints_nothing = (
                tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token)
            )
            if prints_nothing:
                piece = ""
            elif tokenizer.is_byte(token):
                piece = "?"  # any one byte
            else:
                piece = tokenizer.id_to_piece(token)
            is_boundary.append(prints_nothing)
            pieces.append(piece)
        self.is_boundary = np.array(is_boundary)
        self.starts_with_space = np.array([piece.startswith(SPACE_MARK) for piece in pieces])
        # Bytes without a leading space mark, which counts by what stands before it; marks inside a piece
        # are plain spaces.
        sizes = [len(piece.removeprefix(SPACE_MARK).replace(SPACE_MARK, " ").encode()) for piece in pieces]
        self.piece_bytes = np.array(sizes, np.int16)
        # The byte tokens that spell the mark, where the vocabulary has no piece for it.
        self.mark_tokens = []
        for byte in SPACE_MARK.encode():
            token = tokenizer.piece_to_id(byte_piece(byte))
            if tokenizer.is_byte(token):
                self.mark_tokens.append(token)
        case_tokens = [tokenizer.piece_to_id(mark) for mark in CASE_MARKS]
        self.has_case_marks = tokenizer.unk_id() not in case_tokens
        self.case_tokens = case_tokens if self.has_case_marks else []

    def count_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes [N], int16, that each of the tokens [N] adds to the text.

        A leading space mark counts 1 unless it follows a boundary or the start, where decoding drops it.
        """
        follows_boundary = np.concatenate(([True], self.is_boundary[tokens[:-1]]))
        adds_space = self.starts_with_space[tokens] & ~follows_boundary
        counts = self.piece_bytes[tokens] + adds_space.astype(np.int16)
        if len(self.mark_tokens) == 3 and len(tokens) > 2:
            # A mark spelt in three byte tokens is one space too. Counting it as three bytes made a published
            # score a fifth too good (parameter-golf #897).
            starts = len(tokens) - 2
            matches = [tokens[at : starts + at] == token for at, token in enumerate(self.mark_tokens)]
            positions = np.flatnonzero(np.logical_and.reduce(matches))
            counts[positions] = 0
            counts[positions + 1] = 0
        if self.has_case_marks:
            counts[np.isin(tokens, self.case_tokens) & ~self.find_literals(tokens)] = 0
        return counts

    def find_literals(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each of the tokens [N] follows a CaseOps escape: of escapes in a row, each second does."""
        is_escape = tokens == self.case_tokens[-1]
        places = np.arange(len(tokens))
        last_other = np.maximum.accumulate(np.where(is_escape, -1, places))
        acts = is_escape & ((places - last_other) % 2 == 1)
        return np.concatenate(([False], acts[:-1]))


def byte_piece(byte: int) -> str:
    """SentencePiece's name for the token of one byte."""
    return f"<0x{byte:02X}>"


def load_tokenizer(cfg: Config) -> sentencepiece.SentencePieceProcessor:
    """Read TOKENIZER_PATH; RunError (2) unless it is a SentencePiece model of VOCAB_SIZE pieces."""
    path = Path(cfg.tokenizer_path)
    if not path.is_file():
        raise RunError(
            f"no tokenizer at TOKENIZER_PATH={cfg.tokenizer_path}; "
            "it comes with the dataset (see data/README.md)"
        )
    try:
        content = path.read_bytes()  # sentencepiece itself opens no path that is not UTF-8
        tokenizer = sentencepiece.SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(content)
    except Exception as error:  # sentencepiece raises RuntimeError, OSError or its own, by version
        kind = "" if isinstance(error, OSError) else describe_kind(content)
        raise RunError(
            f"TOKENIZER_PATH={cfg.tokenizer_path} is not a SentencePiece model ({type(error).__name__}){kind}"
        ) from None
    size = tokenizer.vocab_size()
    if size != cfg.vocab_size:
        raise RunError(f"VOCAB_SIZE={cfg.vocab_size} but {path} has {size} pieces")
    for name in ("smear_gate_enabled", "pack_documents"):
        if getattr(cfg, name) and tokenizer.bos_id() != BOS_ID:
            raise RunError(
                f"{name.upper()}=1 stops at BOS, which must be piece {BOS_ID}; in {path} it is "
                f"{tokenizer.bos_id()} (-1: it has none)"
            )
    return tokenizer


class TextSize(NamedTuple):
    """How much text some tokens are."""

    documents: int
    bytes: int  # of UTF-8


def decoded_bytes(
    tokenizer: sentencepiece.SentencePieceProcessor, table: ByteTable, tokens: np.ndarray
) -> TextSize:
    """Measure the text that `tokens` [N] decode to, document by document: the oracle of count_bytes.

    A space at the start of a document adds no byte, nor does a mark of CaseOps.
    """
    spans = document_spans(table, tokens)
    keeps_space = decode_keeps_space(tokenizer, table)
    byte_of_token = {tokenizer.piece_to_id(byte_piece(byte)): bytes([byte]) for byte in range(256)}
    letter = tokenizer.piece_to_id(byte_piece(ord("a")))
    total = 0
    for begin in range(0, len(spans), DECODE_BATCH):
        documents = [tokens[start:stop].tolist() for start, stop in spans[begin : begin + DECODE_BATCH]]
        for token_ids, text in zip(documents, tokenizer.decode(documents), strict=True):
            raw = text.encode()
            # A replacement character may be three bytes of the source or one broken byte token: then each
            # token is decoded by itself, after a letter that keeps `decode` from dropping a leading space.
            is_broken = REPLACEMENT in text and any(map(tokenizer.is_byte, token_ids))
            if is_broken:
                parts = []
                for token in token_ids:
                    parts.append(byte_of_token.get(token) or tokenizer.decode([letter, token]).encode()[1:])
                raw = b"".join(parts)
            if table.has_case_marks:
                raw = CASE_MARK_BYTES.sub(rb"\1", raw)
            total += len(raw.replace(SPACE_MARK.encode(), b" "))
            if table.starts_with_space[token_ids[0]] and (is_broken or keeps_space):
                total -= 1
    return TextSize(len(spans), total)


def document_spans(table: ByteTable, tokens: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of every run of tokens between boundaries that is not empty."""
    boundaries = np.flatnonzero(table.is_boundary[tokens])
    edges = np.concatenate(([-1], boundaries, [len(tokens)])).tolist()
    return [(before + 1, after) for before, after in itertools.pairwise(edges) if after > before + 1]


def decode_keeps_space(tokenizer: sentencepiece.SentencePieceProcessor, table: ByteTable) -> bool:
    """Whether `decode` prints the space mark that a text starts with: tokenizers differ in that."""
    marked_tokens = np.flatnonzero(table.starts_with_space).tolist()
    return bool(marked_tokens) and tokenizer.decode(marked_tokens[:1]).startswith(" ")


@dataclass(frozen=True)
class Validation:
    """The held-out split, as it is scored: every token but the first is a target."""

    tokens: np.ndarray  # [N] uint16
    target_bytes: np.ndarray  # [N - 1] int16, of tokens[1:]
    documents: int  # 0 where its bytes were not proved
    sha256: str  # of the tokens
    starts: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))  # targets that open a document
    hints: np.ndarray | None = None  # [N - 1] int64: of each target by the tilt, -1 where it has none

    @property
    def targets(self) -> int:
        """Count of tokens that are scored."""
        return len(self.tokens) - 1

    @property
    def bytes(self) -> int:
        """Bytes of the text of all targets."""
        return int(self.target_bytes.sum(dtype=np.int64))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first target, end) of each document, in the order of the text. A document's last target is the
        boundary that opens the next one."""
        return list(itertools.pairwise([0, *self.starts.tolist(), self.targets]))


# That treat each document by itself.
DOCUMENT_KNOBS = ("EVAL_DOC_ISOLATED", "TTT_RESET", "TTT_BATCH_SIZE", "HEDGE_DOCUMENT_ORDER")


def load_validation(
    cfg: Config, tokenizer: sentencepiece.SentencePieceProcessor, prove: bool = True
) -> Validation:
    """Read the validation shards and count their bytes.

    prove: RunError (2) unless the pieces' bytes equal the decoded text's; one rank's proof is enough.
    """
    check_manifest(cfg)
    stream = TokenStream(cfg.data_path, "val", cfg.vocab_size)
    table = ByteTable(tokenizer)
    tokens = stream.read(0, len(stream))
    if len(tokens) < 2:
        raise RunError(f"the validation shards in {cfg.data_path} hold fewer than two tokens")
    refuse_lost_text(tokenizer, table, tokens)
    needing = [name for name in DOCUMENT_KNOBS if getattr(cfg, name.lower())]
    if needing and not table.is_boundary[tokens].any():
        raise RunError(
            f"{needing[0]} needs documents, but no BOS or EOS opens one among the {len(tokens)} validation "
            f"tokens in {cfg.data_path}; unset it, or make the shards with one before each document"
        )
    token_bytes = sidecar_bytes(cfg, len(tokens))
    has_sidecar = token_bytes is not None
    if token_bytes is None:
        token_bytes = table.count_bytes(tokens)
    data = Validation(
        tokens=tokens,
        target_bytes=token_bytes[1:],
        documents=0,
        sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
        # Target i is read off token i: it opens a document where that is a boundary.
        starts=1 + np.flatnonzero(table.is_boundary[tokens[1:-1]]),
    )
    if not prove:
        return data
    if data.bytes <= 0:
        raise RunError(f"the validation shards in {cfg.data_path} decode to no text")
    decoded = measure_text(cfg, tokenizer, table, data)
    counted = int(token_bytes.sum(dtype=np.int64))
    if counted != decoded.bytes:
        raise RunError(
            f"wrong byte count: {counted} by {'*_val_bytes_*.bin' if has_sidecar else 'pieces'}, "
            f"{decoded.bytes} by decoding the validation text; "
            + explain_byte_count(cfg, tokenizer, table, tokens)
        )
    return replace(data, documents=decoded.documents)


def sidecar_bytes(cfg: Config, count: int) -> np.ndarray | None:
    """Bytes [count], int16, of each validation token as *_val_bytes_*.bin have them; None without these.

    RunError (2) if they are of another number of tokens.
    """
    if not any(Path(cfg.data_path).glob("*_val_bytes_*.bin")):
        return None
    sidecar = TokenStream(cfg.data_path, "val_bytes", 2**16)
    if len(sidecar) != count:
        raise RunError(
            f"{sidecar.paths[0]} and those after it hold the bytes of {len(sidecar)} tokens, but the "
            f"validation shards have {count}; fetch both again"
        )
    return sidecar.read(0, count).astype(np.int16)


def check_manifest(cfg: Config) -> None:
    """RunError (2) if the manifest beside the shards, where there is one, names another tokenizer.

    Another one of the same size decodes the tokens too, to another text: 8 % off, in one case, and no proof
    of the bytes can see it.
    """
    manifest = Path(cfg.data_path, "manifest.json")
    expected = None
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or of another tool
        expected = json.loads(manifest.read_bytes())["tokenizer"]["sha256"]
    found = hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest()
    if isinstance(expected, str) and expected != found:
        raise RunError(
            f"TOKENIZER_PATH={cfg.tokenizer_path} did not make DATA_PATH={cfg.data_path}: its sha256 is "
            f"{found[:16]}, {manifest} says {expected[:16]}"
        )


def refuse_lost_text(
    tokenizer: sentencepiece.SentencePieceProcessor, table: ByteTable, tokens: np.ndarray
) -> None:
    """RunError (2) if a token stands where text was and has none: the score would leave that text out.

    Such are unknown and unused pieces, and control pieces within a document: not BOS, EOS or padding, and
    with text on both sides, where BOS or EOS tell where documents end.
    """
    is_present = np.zeros(len(table.is_boundary), bool)
    is_present[tokens] = True
    markers = [tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()]
    has_documents = any(token >= 0 and is_present[token] for token in markers[:2])
    for token in np.flatnonzero(table.is_boundary & is_present).tolist():
        is_lost = tokens == token
        if tokenizer.is_control(token):
            if token in markers or not has_documents:
                continue
            is_text = ~table.is_boundary[tokens]
            is_lost = is_lost[1:-1] & is_text[:-2] & is_text[2:]
        count = np.count_nonzero(is_lost)
        if count:
            piece = tokenizer.id_to_piece(token)
            raise RunError(
                f"{count} of {len(tokens)} validation tokens are {piece!r}, which stands for text and gives "
                "none back: a score would leave its bytes out. Tokenize with byte fallback "
                "(data/tokenize_docs.py trains such a model), or make it a user-defined piece"
            )


def explain_byte_count(
    cfg: Config, tokenizer: sentencepiece.SentencePieceProcessor, table: ByteTable, tokens: np.ndarray
) -> str:
    """Why pieces and text differ: the first document in which they do."""
    for number, (start, stop) in enumerate(document_spans(table, tokens), 1):
        document = tokens[start:stop]
        counted = int(table.count_bytes(document).sum(dtype=np.int64))
        if counted == decoded_bytes(tokenizer, table, document).bytes:
            continue
        pieces = [tokenizer.id_to_piece(token) for token in document[:2].tolist()]
        if pieces[0] == SPACE_MARK and pieces[-1].startswith(SPACE_MARK):
            return (
                f"document {number} begins with several space marks (U+2581), which {cfg.tokenizer_path} "
                "drops in decoding: its text had that character; replace it (data/tokenize_docs.py does)"
            )
        return f"first in document {number}; does {cfg.tokenizer_path} belong to {cfg.data_path}?"
    return f"does {cfg.tokenizer_path} belong to {cfg.data_path}?"


def measure_text(
    cfg: Config, tokenizer: sentencepiece.SentencePieceProcessor, table: ByteTable, data: Validation
) -> TextSize:
    """`decoded_bytes` of the validation text, kept beside the shards by hash of tokens and tokenizer."""
    key = data.sha256 + hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest()
    cache = Path(cfg.data_path) / f".bytes-{key[:16]}.json"
    cached = read_text_size(cache, key)
    if cached is not None:
        return cached
    if len(data.tokens) > SLOW_TO_DECODE:
        seconds = len(data.tokens) / DECODED_PER_SECOND
        print(f"decoding the validation text to prove its bytes, once: usually {seconds:.0f} s", flush=True)
    measured = decoded_bytes(tokenizer, table, data.tokens)
    content = json.dumps(dict(key=key, documents=measured.documents, bytes=measured.bytes))
    with suppress(OSError):  # a read-only dataset only costs the count again next time
        write_atomic(cache, content.encode())
    return measured


def read_text_size(cache: Path, key: str) -> TextSize | None:
    """What an earlier run measured under this key; None if that is absent, damaged or of other files."""
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        saved = json.loads(cache.read_text())
        size = TextSize(int(saved["documents"]), int(saved["bytes"]))
        if saved["key"] == key and size.documents > 0:
            return size
    return None


# ----------------------------------------------------------------------------------------------------------
# 7. MODEL
#
# Token ids go in, softcapped logits come out. `plan_layers` decides once what each effective layer does;
# the forward pass walks that plan. Shapes: B sequences, T tokens, d MODEL_DIM, V VOCAB_SIZE, H query heads,
# Hkv key heads, D the width of a head, S the positions that are scored. Names and shapes in the state dict
# are the official script's and #1855's, so that their checkpoints load. Each parameter says, where it is
# made, which optimiser trains it (`with_role`).
# ----------------------------------------------------------------------------------------------------------
MLP_ACTS = ("relu2", "leaky_relu2", "gelu2", "silu2", "swiglu")
REPEATED = "NUM_REPEATS!=1"
NOT_REPEATED = "NUM_REPEATS=1"
LOOPED = "NUM_LOOPS!=0"


@dataclass(frozen=True)
class ModelKnobs:
    """The shape of the model: what an artifact must say to be scored elsewhere, and how deep it trains."""

    num_layers: int = knob(
        9,
        "Transformer blocks with weights of their own.",
        low=1,
        most=999,
        role="model",
        source="official",
    )
    model_dim: int = knob(
        512,
        "Width of the residual stream; a multiple of NUM_HEADS.",
        low=2,
        most=2**16,
        role="model",
        source="official",
    )
    num_heads: int = knob(
        8,
        "Query heads of each attention; MODEL_DIM / NUM_HEADS must be even.",
        low=1,
        role="model",
        source="official",
    )
    num_kv_heads: int = knob(
        4,
        "Key and value heads; each serves NUM_HEADS / NUM_KV_HEADS query heads.",
        low=1,
        role="model",
        source="official",
    )
    mlp_mult: float = knob(
        2.0,
        "Hidden width of the MLP as a multiple of MODEL_DIM; swiglu uses 2/3 of it, for as many parameters.",
        low=0.01,
        most=999,
        role="model",
        source="official",
    )
    mlp_act: str = knob(
        "relu2",
        "Nonlinearity of the MLP: relu2, leaky_relu2, gelu2 and silu2 are squared, swiglu is gated.",
        choices=MLP_ACTS,
        role="model",
        source="PR #1434",
        fate="works",
    )
    leaky_slope: float = knob(
        0.01,
        "Slope of leaky_relu2 for negative inputs, before squaring; PR #895 has 0.5.",
        needs="MLP_ACT=leaky_relu2",
        role="model",
        source="PR #1434",
    )
    fused_mlp: bool = knob(
        False,
        "Train the MLP with a Triton kernel that squares its (leaky) ReLU in the product before it, forward "
        "and backward; compiled, half precision, GPUs from sm_80 on. No card has timed it.",
        needs="COMPILE!=0,DEVICE!=cpu,DTYPE!=fp32,REPEAT_LORA_RANK=0,MLP_ACT=relu2|MLP_ACT=leaky_relu2",
        role="place",
        source="ours",
    )
    tie_embeddings: bool = knob(
        True,
        "Use the embedding table as the output head; 0 gives the head a matrix of its own.",
        role="model",
        source="official",
    )
    tied_embed_init_std: float = knob(
        0.005,
        "Standard deviation of the embedding's initial values.",
        low=0,
        needs="TIE_EMBEDDINGS=1",
        source="official",
    )
    rope_base: float = knob(
        10_000.0,
        "Base of the rotary positions' wavelengths.",
        low=1,
        role="model",
        source="official",
    )
    logit_softcap: float = knob(
        30.0,
        "Bound c of the logits: c * tanh(z / c).",
        low=1e-3,
        role="model",
        source="official",
    )
    qk_gain_init: float = knob(
        1.5,
        "Initial value of the learned gain of each query head.",
        source="official",
    )
    encoder_layers: int = knob(
        -1,
        "First layers, whose outputs feed U-Net skips into later ones; -1 = half, 0 = no skips.",
        low=-1,
        needs=NOT_REPEATED,
        role="model",
        source="PR #1434",
        fate="works",
    )
    parallel_block: bool = knob(
        False,
        "Let attention and MLP of a block read the same input and add their outputs together.",
        role="model",
        source="PR #1434",
        fate="works",
    )
    num_repeats: int = knob(
        1,
        "Times that the blocks run in turn with the same weights; above 1 there are no U-Net skips.",
        low=1,
        most=999,
        role="model",
        source="PR #895",
    )
    prog_depth: str = knob(
        "",
        "Repeats that train until each progress, e.g. 0.4:2,0.65:3,1.0:4; empty = all of them throughout.",
        needs=REPEATED,
        source="PR #895",
    )
    cross_repeat_skip: bool = knob(
        True,
        "Add to a repeated block's input its output of the repeat before, times a learned scale.",
        needs=REPEATED,
        role="model",
        source="PR #895",
    )
    repeat_lora_rank: int = knob(
        0,
        "Rank of a low-rank change of the output projections for each repeat; 0 = none.",
        low=0,
        needs=REPEATED,
        role="model",
        source="PR #895",
    )
    num_value_embeds: int = knob(
        0,
        "Token tables whose rows are added, scaled, to the input of each layer; 0 = none.",
        low=0,
        most=999,
        role="model",
        source="PR #895",
        effect="2 tables: -0.046 bpb on the baseline after 600 steps, wave20; within noise on best, wave21",
    )
    value_residual: bool = knob(
        False,
        "Attend to a learned mixture of the first layer's values and the layer's own.",
        role="model",
        source="PR #895",
        effect="-0.042 bpb on progressive depth after 400 steps, wave19; within noise on best, wave21",
    )
    xsa_last_n: int = knob(
        0,
        "Last layers whose heads leave out the part along their own value (XSA); -1 = all, 0 = none.",
        low=-1,
        role="model",
        source="PR #895",
    )
    weight_share: int = knob(
        0,
        "Layer i runs block i mod this, so that only so many blocks have weights; 0 = each its own.",
        low=0,
        role="model",
        source="PR #1434",
        fate="broken",
    )
    sandwich_norm: bool = knob(
        False,
        "Also RMS-norm what the attention gives.",
        needs="PARALLEL_BLOCK=0",
        role="model",
        source="PR #1434",
        fate="rejected",
    )
    attn_recycle: bool = knob(
        False,
        "Run each attention twice, in training and in evaluation (as published: in training only).",
        role="model",
        source="PR #1434",
        fate="broken",
    )
    ortho_init: bool = knob(
        False,
        "Start matrices of at least 64 x 64 orthogonal, but for those that start at zero.",
        source="PR #1394",
        effect="with the rest of its group (wave23) left out of #1855 at 4 x 96: -0.026 bpb, 3 seeds",
    )
    rope_dims: int = knob(
        0,
        "Dimensions of each head that rotary positions turn, the first ones; even, 0 = all.",
        low=0,
        role="model",
        source="PR #1394",
        effect="with the rest of its group (wave23) left out of #1855 at 4 x 96: -0.026 bpb, 3 seeds",
    )
    residual_fp32: bool = knob(
        False,
        "Keep the residual stream in float32 while products stay in DTYPE, as autocast does in the official "
        "script since its list of float32 functions has rms_norm; moves more bytes a step.",
        role="model",
        source="official",
        effect="-0.004 bpb at 4 x 96 after 500 steps, within noise, 5 seeds, wave24",
    )
    ln_scale: bool = knob(
        False,
        "Divide what the norms of block i give, counted from 0, by the square root of i + 1.",
        role="model",
        source="PR #1394",
        effect="with the rest of its group (wave23) left out of #1855 at 4 x 96: -0.026 bpb, 3 seeds",
    )
    skip_gates_enabled: bool = knob(
        False,
        "Blend a U-Net skip with the stream by a learned gate, half and half at first, instead of adding it.",
        role="model",
        source="PR #1394",
        effect="with the rest of its group (wave23) left out of #1855 at 4 x 96: -0.026 bpb, 3 seeds",
    )
    parallel_residual_start: int = knob(
        -1,
        "First block whose attention and MLP read the same input, as all do by PARALLEL_BLOCK; -1 = none.",
        low=-1,
        role="model",
        source="PR #1493",
    )
    parallel_start_layer: int = knob(
        0,
        "First block after the encoder with two residual lanes, one that attention reads, one that the MLP "
        "reads, mixed by learned weights to the end; 0 = none.",
        low=0,
        role="model",
        source="PR #1855",
        effect="left out of #1855 at 4 x 96: +0.004 bpb, within noise, 3 seeds, wave23",
    )
    parallel_final_lane: str = knob(
        "mean",
        "What the head reads of two lanes: their mean, the attention's or the MLP's.",
        choices=("mean", "attn", "mlp"),
        needs="PARALLEL_START_LAYER!=0",
        role="model",
        source="PR #1855",
    )
    sparse_attn_gate_enabled: bool = knob(
        False,
        "Multiply each head's output by a sigmoid gate that reads GATE_WINDOW dimensions of the input.",
        role="model",
        source="PR #1787",
        effect="both gates left out of #1855 at 4 x 96: +0.032 bpb at 95 %, 3 seeds, wave23",
    )
    sparse_attn_gate_scale: float = knob(
        1.0,
        "Factor of what that gate reads, before its sigmoid.",
        needs="SPARSE_ATTN_GATE_ENABLED=1",
        role="model",
        source="PR #1787",
    )
    smear_gate_enabled: bool = knob(
        False,
        "Add a gated share of the previous token's embedding to each token's, but not across documents.",
        role="model",
        source="PR #1667",
        effect="both gates left out of #1855 at 4 x 96: +0.032 bpb at 95 %, 3 seeds, wave23",
    )
    gate_window: int = knob(
        12,
        "First dimensions that SPARSE_ATTN_GATE_ENABLED and SMEAR_GATE_ENABLED read.",
        low=1,
        needs="SPARSE_ATTN_GATE_ENABLED=1|SMEAR_GATE_ENABLED=1",
        role="model",
        source="PR #1667",
    )
    num_loops: int = knob(
        0,
        "Times that blocks LOOP_START to LOOP_END run once more, with the same weights; 0 = none.",
        low=0,
        most=999,
        needs=NOT_REPEATED,
        role="model",
        source="PR #1394",
        effect="left out of #1855 at 4 x 96: -0.003 bpb, within noise, 3 seeds, wave23",
    )
    loop_start: int = knob(
        3,
        "First block of the loop, counted from 0.",
        low=0,
        needs=LOOPED,
        role="model",
        source="PR #1394",
    )
    loop_end: int = knob(
        5,
        "Last block of the loop.",
        low=0,
        needs=LOOPED,
        role="model",
        source="PR #1394",
    )
    enable_looping_at: float = knob(
        0.35,
        "Progress from which the loop trains; before it each block runs once. 0 loops from the start.",
        low=0,
        high=1,
        needs=LOOPED,
        source="PR #1394",
    )
    bigram_vocab_size: int = knob(
        0,
        "Rows of a table that is read by a hash of each token and the one before; 0 = none.",
        low=0,
        role="model",
        source="PR #135",
    )
    bigram_dim: int = knob(
        128,
        "Width of that table; a matrix projects it to MODEL_DIM where the two differ.",
        low=1,
        most=2**16,
        needs="BIGRAM_VOCAB_SIZE!=0",
        role="model",
        source="PR #135",
    )
    embed_scale: float = knob(
        0.0,
        "Factor of the embeddings, which their norm cancels again; 0 = off.",
        role="model",
        source="PR #1434",
        fate="broken",
    )
    layer_drop: float = knob(
        0.0,
        "Chance that a layer is passed over in a step, which saves no time; the first layer and the first "
        "after the encoder always run.",
        low=0,
        high=0.999,
        source="PR #1434",
        fate="broken",
    )
    progressive_grow: bool = knob(
        False,
        "Train the first max(3, 0.3 NUM_LAYERS) layers at first, one more at a time, all from progress 0.9.",
        needs=f"{NOT_REPEATED},NUM_LOOPS=0",
        source="PR #1434",
        fate="broken",
    )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.model_dim // self.num_heads

    @property
    def depth(self) -> int:
        """Effective layers: blocks times repeats."""
        return self.num_layers * self.num_repeats

    @property
    def encoders(self) -> int:
        """Layers that feed U-Net skips: the first half unless said, none where blocks repeat."""
        if self.num_repeats > 1:
            return 0
        return self.num_layers // 2 if self.encoder_layers < 0 else self.encoder_layers

    @property
    def depth_phases(self) -> list[tuple[float, int]]:
        """PROG_DEPTH as (until this progress, repeats), in order; RunError if it is no such list."""
        if not self.prog_depth or self.num_repeats == 1:
            return []
        turns = []
        try:
            for entry in self.prog_depth.split(","):
                until, _, repeats = entry.partition(":")
                turns.append((float(until), int(repeats)))
        except ValueError:
            message = f"PROG_DEPTH={self.prog_depth!r} is not like 0.4:2,0.65:3,1.0:4 (progress:repeats)"
            raise RunError(message) from None
        return sorted(turns)

    @cached_property
    def phases(self) -> list[Phase]:
        """What the run trains in turn: plans of layers, the last of which is scored, and window lengths."""
        return join_phases(self.layer_plans(), self.window_lengths)

    def layer_plans(self) -> list[tuple[float, LayerPlan]]:
        """(until this progress, which layers run), in order."""
        if self.num_loops and self.num_repeats == 1:
            return looping_plans(self)
        if self.progressive_grow and self.num_repeats == 1:
            return growing_plans(self)
        plans = []
        for until, repeats in self.depth_phases:
            plans.append((until, plan_layers(self, repeats * self.num_layers)))
        return plans or [(1.0, plan_layers(self))]

    def last_alike(self, phase: int) -> int:
        """Number of the last phase that runs the same layers, and with that scores the same; from the end."""
        plans = [phase.plan for phase in reversed(self.phases)]
        return -1 - plans.index(plans[-1 - phase])

    def check(self) -> None:
        """RunError where shapes do not fit each other."""
        if self.model_dim % self.num_heads:
            message = f"MODEL_DIM={self.model_dim} is not a multiple of NUM_HEADS={self.num_heads}"
            raise RunError(message)
        if self.num_heads % self.num_kv_heads:
            message = f"NUM_HEADS={self.num_heads} is not a multiple of NUM_KV_HEADS={self.num_kv_heads}"
            raise RunError(message)
        if self.head_dim % 2:
            raise RunError(f"MODEL_DIM/NUM_HEADS={self.head_dim} must be even for rotation")
        if self.encoder_layers > self.num_layers:
            raise RunError("ENCODER_LAYERS must not exceed NUM_LAYERS")
        self.check_frontier()
        for until, repeats in self.depth_phases:
            if not (0 < until <= 1 and 0 < repeats <= self.num_repeats):
                self.refuse_prog_depth()
        if self.depth_phases and self.depth_phases[-1][1] != self.num_repeats:
            self.refuse_prog_depth()

    def check_frontier(self) -> None:
        """RunError where partial rotation, gates, loops or lanes do not fit the layers."""
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            raise RunError(f"ROPE_DIMS={self.rope_dims} must be even and at most a head's {self.head_dim}")
        if self.gate_window > self.model_dim and (self.sparse_attn_gate_enabled or self.smear_gate_enabled):
            raise RunError(f"GATE_WINDOW={self.gate_window} is beyond MODEL_DIM={self.model_dim}")
        if self.bigram_vocab_size == 1:
            raise RunError("BIGRAM_VOCAB_SIZE=1 leaves no row for a pair of tokens; 2 is the least")
        if self.num_loops and not self.loop_start <= self.loop_end < self.num_layers:
            raise RunError(
                f"LOOP_START={self.loop_start} to LOOP_END={self.loop_end} is no part of the blocks "
                f"0 to {self.num_layers - 1} of NUM_LAYERS={self.num_layers}"
            )
        if self.parallel_residual_start >= self.num_layers:
            start = self.parallel_residual_start
            raise RunError(f"PARALLEL_RESIDUAL_START={start} is beyond NUM_LAYERS={self.num_layers}")
        if self.parallel_start_layer and not self.phases[-1].plan[-1].has_lanes:
            raise RunError(
                f"PARALLEL_START_LAYER={self.parallel_start_layer} leaves no layer with two lanes: of "
                f"NUM_LAYERS={self.num_layers} those from there on that are no encoder have them"
            )
        if self.parallel_start_layer and self.attn_recycle:
            raise RunError("ATTN_RECYCLE=1 does not go with two lanes; unset it or PARALLEL_START_LAYER")

    def refuse_prog_depth(self) -> None:
        """Raise the RunError (2) of a PROG_DEPTH that does not fit the repeats."""
        raise RunError(
            f"PROG_DEPTH={self.prog_depth} needs progress in (0, 1], repeats of 1 to "
            f"NUM_REPEATS={self.num_repeats} and these last: they are scored"
        )


def with_role(parameter: nn.Parameter, name: str) -> nn.Parameter:
    """Say which optimiser settings train a parameter; the table is `role_settings` in section 9.

    "matrix": Muon; "embed", "head", "scalar": Adam, each with a learning rate of its own.
    """
    parameter.role = name
    return parameter


def norm(x: Tensor) -> Tensor:
    """Parameter-free RMS norm over the last dimension; its epsilon is that of float32 for every dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)


class Linear(nn.Linear):
    """No bias; float32 weights [outputs, inputs], used in the dtype of the input.

    rank > 0: repeat r of the block uses W + B_r A_r (PR #895), with `repeats` pairs of factors.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        zero_init: bool = False,
        repeats: int = 0,
        rank: int = 0,
        trained_as: str = "matrix",
    ):
        super().__init__(inputs, outputs, bias=False)
        with_role(self.weight, trained_as)
        self.starts_at_zero = zero_init
        if zero_init:
            nn.init.zeros_(self.weight)
        self.lora_a = None
        self.lora_b = None
        if rank:
            self.lora_a = with_role(nn.Parameter(torch.randn(repeats, rank, inputs) / inputs**0.5), "scalar")
            self.lora_b = with_role(nn.Parameter(torch.zeros(repeats, outputs, rank)), "scalar")

    def make_orthogonal(self) -> None:
        """ORTHO_INIT: start orthogonal, unless from zero or smaller than 64 x 64 (PR #1394)."""
        if not self.starts_at_zero and min(self.weight.shape) >= 64:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor, repeat: int = 0, gain: Tensor | None = None) -> Tensor:
        """x [..., inputs] -> [..., outputs], for the block's run number `repeat`.

        gain [outputs]: a factor of each row of W, for a matrix without factors of its own.
        """
        weight = self.weight if gain is None else gain[:, None] * self.weight
        y = F.linear(x, weight.to(x.dtype))
        if self.lora_a is None:
            return y
        inner = F.linear(x, self.lora_a[repeat].to(x.dtype))
        return y + F.linear(inner, self.lora_b[repeat].to(x.dtype))


def folds_gains(device: torch.device) -> bool:
    """Whether gains of a layer's outputs go into its weights: on GPUs, where the gain's own gradient would
    read all outputs again (records/benchmarks/NOTES.md). It rounds otherwise; CPUs keep their numbers."""
    return device.type == "cuda"


# -- Attention on a CPU: speed only. A reader who runs on a GPU can skip to `attend`. --------------------
QUERY_BLOCK = 128  # queries that are scored together
LONGEST_BLOCKED = (
    2048  # tokens; beyond, scaled_dot_product_attention is as fast (records/benchmarks/NOTES.md)
)


def custom_op_once(name: str, mutates: list[str], schema: str) -> Callable:
    """A decorator: torch.library.custom_op, or the operation of that name that this process has already.

    Registered again, by a second copy of this file in the process, it would destroy the first one, and what
    was compiled with that would read freed memory (torch 2.13: bad_alloc, or a crash much later).
    """

    def decorate(function: Callable) -> Callable:
        namespace, operation = name.split("::")
        known = getattr(torch.ops, namespace)
        if hasattr(known, operation):
            return getattr(known, operation).default
        return torch.library.custom_op(name, mutates_args=mutates, schema=schema)(function)

    return decorate


def causal_softmax_(scores: Tensor) -> None:
    """Softmax in place over the last dimension of scores [..., rows, past], last rows of a causal square."""
    rows = scores.size(-2)
    scores[..., -rows:].add_(scores.new_full((rows, rows), -torch.inf).triu_(1))
    torch.softmax(scores, dim=-1, out=scores)


# One piece to torch.compile, which would take each exponential twice (records/benchmarks/NOTES.md).
causal_softmax_piece = custom_op_once(
    "golf::causal_softmax_", mutates=["scores"], schema="(Tensor(a!) scores) -> ()"
)(causal_softmax_)


class BlockedAttention(torch.autograd.Function):
    """`attend` by blocks of queries. The G query heads that share a key head go into one product.

    Keeps the softmax's probabilities p for the backward pass, where the gradient of the scores is
    ds = p (dp - sum(dy y)), as in FlashAttention (Dao et al. 2205.14135). Below, N is batch * key heads.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        """q [B, H, T, D]; k, v [B, Hkv, T, D] -> [B, H, T, D]; documents [B, T]: their numbers, or None."""
        key_heads = k.size(1)
        keys = k.flatten(0, 1)  # [N, T, D]
        values = v.flatten(0, 1)
        queries = (q * q.size(-1) ** -0.5).unflatten(1, (key_heads, -1)).flatten(0, 1)  # [N, G, T, D]
        past = 0
        outputs = []
        probabilities = []
        for block in queries.split(QUERY_BLOCK, dim=2):  # [N, G, rows, D]
            past += block.size(2)
            scores = block.flatten(1, 2) @ keys[:, :past].mT  # [N, G * rows, past]
            scores = scores.view(*block.shape[:3], past)
            if documents is not None:
                numbers = documents[:, None, None, :past]
                is_other = numbers[..., -block.size(2) :, None] != numbers[..., None, :]
                scores.unflatten(0, (-1, key_heads)).masked_fill_(is_other, -torch.inf)
            softmax_in_place = causal_softmax_piece if torch.compiler.is_compiling() else causal_softmax_
            softmax_in_place(scores)
            p = scores.flatten(1, 2)
            probabilities.append(p)
            outputs.append((p @ values[:, :past]).view_as(block))
        y = torch.cat(outputs, dim=2).view(q.shape)
        ctx.save_for_backward(q, k, v, y, *probabilities)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v, each of its own shape; the documents have none."""
        q, k, v, y, *probabilities = ctx.saved_tensors
        scale = q.size(-1) ** -0.5
        key_heads = k.size(1)
        keys = k.flatten(0, 1)  # [N, T, D]
        values = v.flatten(0, 1)
        dy = dy.unflatten(1, (key_heads, -1)).flatten(0, 1)  # [N, G, T, D]
        y = y.unflatten(1, (key_heads, -1)).flatten(0, 1)
        queries = (q * scale).unflatten(1, (key_heads, -1)).flatten(0, 1)
        row_sums = (dy * y).sum(-1, keepdim=True)  # [N, G, T, 1]
        dk = torch.zeros_like(keys)
        dv = torch.zeros_like(values)
        dq_blocks = []
        blocks = zip(
            probabilities,
            dy.split(QUERY_BLOCK, dim=2),
            row_sums.split(QUERY_BLOCK, dim=2),
            queries.split(QUERY_BLOCK, dim=2),
            strict=True,
        )
        for p, dy_block, sum_block, query_block in blocks:
            past = p.size(2)
            dy_rows = dy_block.flatten(1, 2)  # [N, G * rows, D]
            ds = (dy_rows @ values[:, :past].mT).sub_(sum_block.flatten(1, 2)).mul_(p)
            dv[:, :past].baddbmm_(p.mT, dy_rows)
            dk[:, :past].baddbmm_(ds.mT, query_block.flatten(1, 2))
            dq_blocks.append((ds @ keys[:, :past]).view_as(dy_block))
        dq = (torch.cat(dq_blocks, dim=2) * scale).view(q.shape)
        return dq, dk.view(k.shape), dv.view(v.shape), None


# -- The model -------------------------------------------------------------------------------------------

FLEX_BLOCK = 128  # queries, and keys, of a block of FlexAttention
FLEX_HEAD_SIZES = (16, 32, 64, 128)  # that it takes in every torch from 2.5 on


class Documents(NamedTuple):
    """Which document each token of B rows belongs to, for attention that stays within documents."""

    numbers: Tensor  # [B, T]: counted from the row's start
    bounds: Tensor | None  # int32: where each begins in the B * T tokens, then B * T; FlashAttention-3's form
    blocks: BlockMask | None = None  # the blocks of queries and keys that hold a pair; FlexAttention's form

    @classmethod
    def of(cls, ids: Tensor) -> Documents:
        """Those of ids [B, T]: each BOS begins a document, and each row, which may begin within one."""
        numbers = (ids == BOS_ID).cumsum(1)
        if not has_flash_attention_3(ids.device):
            return cls(numbers, None, blocks_of_documents(numbers))
        begins = numbers.diff(dim=1, prepend=numbers[:, :1] - 1) > 0
        places = torch.arange(ids.numel(), device=ids.device)
        begins_first = torch.where(begins.flatten(), places, ids.numel()).sort().values
        most = ids.size(0) * (ids.size(1) // SHORTEST_DOCUMENT + 1)
        return cls(numbers, F.pad(begins_first[:most], (0, 1), value=ids.numel()).int())

    def mask(self) -> Tensor:
        """[B, 1, T, T]: True where a query (row) may read a key (column)."""
        is_same = self.numbers[:, None, :, None] == self.numbers[:, None, None]
        return is_same.tril()


def blocks_of_documents(numbers: Tensor) -> BlockMask | None:
    """The blocks of 128 queries and keys that join two tokens of one document, for FlexAttention (Dong et al.
    2412.05496). numbers: as in Documents. None where it has no kernel: uncompiled, on a CPU, below sm_80."""
    batch, length = numbers.shape
    is_compiled = torch.compiler.is_compiling() and is_ampere_or_newer(numbers.device)
    if not is_compiled or length % FLEX_BLOCK:
        return None

    def is_readable(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (numbers[row, query] == numbers[row, key]) & (query >= key)

    return create_block_mask(is_readable, batch, None, length, length, device=numbers.device)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Causal attention with grouped queries. q [B, H, T, D]; k, v [B, Hkv, T, D] -> [B, H, T, D].

    documents: no token reads one of another document; None: all rows are whole.
    """
    if q.device.type == "cpu" and q.size(2) <= LONGEST_BLOCKED:
        return BlockedAttention.apply(q, k, v, None if documents is None else documents.numbers)
    is_half = q.dtype != torch.float32
    if is_half and has_flash_attention_3(q.device):
        return attend_by_flash_attention_3(q, k, v, documents)
    groups = q.size(1) // k.size(1)
    if documents is not None and documents.blocks is not None and q.size(-1) in FLEX_HEAD_SIZES:
        return flex_attention(q, k, v, block_mask=documents.blocks, enable_gqa=groups > 1)
    # No other fused kernel takes a mask and fewer key heads.
    takes_groups = is_half and is_ampere_or_newer(q.device) and documents is None
    if groups > 1 and not takes_groups:
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    if documents is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask())
    enable_gqa = takes_groups and groups > 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)


def attend_by_flash_attention_3(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """As `attend`; its functions take [B, T, H, D], or for documents all rows in one, [B * T, H, D]."""
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    how = dict(causal=True, deterministic=torch.are_deterministic_algorithms_enabled())
    if documents is not None:
        bounds = dict(cu_seqlens_q=documents.bounds, cu_seqlens_k=documents.bounds)
        longest = dict(max_seqlen_q=q.size(2), max_seqlen_k=q.size(2))
        y = flash_attention_3_of_documents(*[x.flatten(0, 1) for x in rows], **bounds, **longest, **how)
    else:
        y = flash_attention_3(*rows, **how)
    y = y[0] if isinstance(y, tuple) else y  # its first versions return the softmax's sums as well
    return y.view(rows[0].shape).transpose(1, 2)


def omit_own_value(y: Tensor, v: Tensor) -> Tensor:
    """y [B, H, T, D] less its part along the token's own value v [B, Hkv, T, D]: XSA (Zhai 2603.09078)."""
    direction = F.normalize(v, dim=-1, eps=1e-12)[:, :, None]
    y = y.unflatten(1, (v.size(1), -1))
    return (y - (y * direction).sum(dim=-1, keepdim=True) * direction).flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: of the first R of x [B, H, T, D], pairs (a, b) of halves turn by angles [T, R/2]."""
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def window_gate(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """sigmoid(scale * W x) of the first `window` dimensions: x [..., d], weight [n, window] -> [..., n]."""
    return torch.sigmoid(scale * F.linear(x[..., : weight.size(1)], weight.to(x.dtype)))


# What test-time training adds to one layer: the factors (A [B, r, in], B [B, out, r]) of each text in the
# batch, by place: "q", "k", "v", "o", "mlp", "head".
Adapters = dict[str, tuple[Tensor, Tensor]]
NO_ADAPTERS: Adapters = {}


def adapted(y: Tensor, x: Tensor, adapters: Adapters, place: str) -> Tensor:
    """y [B, T, out] plus B A x of the place's factors, x [B, T, in]; y itself where there are none."""
    if place not in adapters:
        return y
    a, b = adapters[place]
    return y + x @ a.mT.to(x.dtype) @ b.mT.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention: QK RMS norm, rotary positions, a learned gain per query head."""

    def __init__(self, cfg: Config):
        super().__init__()
        width = cfg.model_dim
        self.c_q = Linear(width, width)
        self.c_k = Linear(width, cfg.num_kv_heads * cfg.head_dim)
        self.c_v = Linear(width, cfg.num_kv_heads * cfg.head_dim)
        self.proj = Linear(width, width, zero_init=True, repeats=cfg.num_repeats, rank=cfg.repeat_lora_rank)
        self.q_gain = with_role(nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init)), "scalar")
        self.head_dim = cfg.head_dim
        self.gate_scale = cfg.sparse_attn_gate_scale
        self.attn_gate_w = None
        if cfg.sparse_attn_gate_enabled:
            gates = torch.zeros(cfg.num_heads, cfg.gate_window)
            self.attn_gate_w = with_role(nn.Parameter(gates), "scalar")

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        repeat: int = 0,
        omits_own_value: bool = False,
        value_mix: Tensor | None = None,
        first_values: Tensor | None = None,
        documents: Documents | None = None,
        adapters: Adapters = NO_ADAPTERS,
        gain: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, d], rotary cos, sin [T, R/2] -> (output [B, T, d], the layer's values [B, Hkv, T, D]).

        value_mix [2] = (a, b): attend to a * first_values + b * own values; first_values None: this layer is
        the first, and its own serve as both. documents: as in `attend`. gain: of `proj`.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = adapted(self.c_q(x), x, adapters, "q").view(heads).transpose(1, 2)  # [B, H, T, D]
        k = adapted(self.c_k(x), x, adapters, "k").view(heads).transpose(1, 2)
        own_values = adapted(self.c_v(x), x, adapters, "v").view(heads).transpose(1, 2)
        v = own_values
        if value_mix is not None:
            first_values = own_values if first_values is None else first_values
            v = value_mix[0].to(v.dtype) * first_values + value_mix[1].to(v.dtype) * own_values
        q = rotate(norm(q), cos, sin)
        k = rotate(norm(k), cos, sin)
        y = attend(q * self.q_gain.to(x.dtype)[:, None, None], k, v, documents)
        if omits_own_value:
            y = omit_own_value(y, v)
        if self.attn_gate_w is not None:
            y = y * window_gate(x, self.attn_gate_w, self.gate_scale).mT[..., None]
        output = self.proj(y.transpose(1, 2).flatten(2), repeat, gain)
        return adapted(output, x, adapters, "o"), own_values


# -- The squared ReLU inside its product's kernel: FUSED_MLP, on GPUs alone --------------------------------

tl = optional_function("triton", "language")  # by the name that inductor knows it by
triton_jit = optional_function("triton", "jit")
TILE = tl and tl.constexpr(128)  # rows, and columns, of the product that one program makes
TILE_DEPTH = tl and tl.constexpr(64)  # how far it goes along rows of a, columns of b at a time


def squared_product_kernel(a, b, out, product, seen, slope, rows, columns, depth):
    """One tile of a b, summed in float32, and what is made of it before it is written; in Triton.

    a [rows, depth], b [depth, columns]; out, product, seen [rows, columns], all contiguous.
    f(c) = c^2 where c > 0, else (slope c)^2. Forward, `seen` is None: product = a b, out = f(a b).
    Backward, where a b is the gradient of f(seen): out = a b f'(seen).
    """
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)  # neighbours read the same rows of a
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, depth, TILE_DEPTH):
        across = start + tl.arange(0, TILE_DEPTH)
        down = across[:, None]
        a_tile = tl.load(a + row * depth + across, (row < rows) & (across < depth), 0)
        b_tile = tl.load(b + down * columns + column, (down < depth) & (column < columns), 0)
        total = tl.dot(a_tile, b_tile, total)
    place = row * columns + column
    is_inside = (row < rows) & (column < columns)
    if seen is None:
        tl.store(product + place, total, is_inside)
        total *= tl.where(total > 0, total, slope * slope * total)
    else:
        c = tl.load(seen + place, is_inside, 0).to(tl.float32)
        total *= 2 * tl.where(c > 0, c, slope * slope * c)
    tl.store(out + place, total, is_inside)


squared_product = triton_jit and triton_jit(squared_product_kernel)


def launch_squared_product(
    a: Tensor, b: Tensor, product: Tensor | None, seen: Tensor | None, slope: float
) -> Tensor:
    """`out` of squared_product_kernel. All is given by name, so that packing leaves its parameters their
    names: Triton reads them in the lines of the readable script."""
    rows, depth = a.shape
    columns = b.size(1)
    out = a.new_empty(rows, columns)
    squared_product[-(-columns // TILE.value), -(-rows // TILE.value)](
        a=a.contiguous(),
        b=b,
        out=out,
        product=product,
        seen=seen,
        slope=slope,
        rows=rows,
        columns=columns,
        depth=depth,
    )
    return out


class SquaredMLP(torch.autograd.Function):
    """f(x F) P with f as in squared_product_kernel; the gradient of what f gives is never written."""

    @staticmethod
    def forward(ctx, x: Tensor, fc: Tensor, proj: Tensor, slope: float) -> Tensor:
        """x [N, d], fc [d, H], proj [d, H], both contiguous -> [N, d]: f(x fc) proj^T."""
        product = x.new_empty(len(x), fc.size(1))
        hidden = launch_squared_product(x, fc, product, None, slope)
        ctx.save_for_backward(x, fc, proj, product, hidden)
        ctx.slope = slope
        return hidden @ proj.T

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of x, fc and proj."""
        x, fc, proj, product, hidden = ctx.saved_tensors
        d_proj = dy.T @ hidden  # first: else inductor makes dy twice, once for each reader
        d_product = launch_squared_product(dy, proj, None, product, ctx.slope)
        return d_product @ fc.T, x.T @ d_product, d_proj, None


def can_fuse_mlp(device: torch.device, dtype: torch.dtype, is_compiled: bool) -> bool:
    """Whether that kernel serves here: in compiled half precision on a GPU from sm_80 on, with Triton."""
    return tl is not None and is_compiled and dtype != torch.float32 and is_ampere_or_newer(device)


class MLP(nn.Module):
    """f(F x)^2, or SwiGLU: silu(G x) * (F x) of 2/3 of the width, so that the parameters match (PR #1434)."""

    def __init__(self, cfg: Config):
        super().__init__()
        activations = dict(
            relu2=F.relu,
            leaky_relu2=partial(F.leaky_relu, negative_slope=cfg.leaky_slope),
            gelu2=F.gelu,
            silu2=F.silu,
        )
        self.activation = activations.get(cfg.mlp_act)  # None: swiglu
        slopes = dict(relu2=0.0, leaky_relu2=cfg.leaky_slope)
        self.fused_slope = slopes.get(cfg.mlp_act) if cfg.fused_mlp else None
        hidden = cfg.mlp_mult * cfg.model_dim
        hidden = int(hidden if self.activation else 2 * hidden / 3)
        self.gate = None if self.activation else Linear(cfg.model_dim, hidden)
        self.fc = Linear(cfg.model_dim, hidden)
        self.proj = Linear(
            hidden, cfg.model_dim, zero_init=True, repeats=cfg.num_repeats, rank=cfg.repeat_lora_rank
        )

    def forward(self, x: Tensor, repeat: int = 0, gain: Tensor | None = None) -> Tensor:
        """[B, T, d] -> [B, T, d]; gain: of `proj`."""
        is_training = torch.compiler.is_compiling() and torch.is_grad_enabled()
        if gain is not None and self.fused_slope is not None and can_fuse_mlp(x.device, x.dtype, is_training):
            fc = self.fc.weight.T.to(x.dtype).contiguous()
            proj = (gain[:, None] * self.proj.weight).to(x.dtype)
            return SquaredMLP.apply(x.flatten(0, -2), fc, proj, self.fused_slope).view_as(x)
        if self.gate is None:
            hidden = self.activation(self.fc(x)).square()
        else:
            hidden = F.silu(self.gate(x)) * self.fc(x)
        return self.proj(hidden, repeat, gain)


class SmearGate(nn.Module):
    """Adds strength * sigmoid(w . e_t[:GATE_WINDOW]) * e_{t-1} to e_t, unless t is a BOS (PR #1667)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.weight = with_role(nn.Parameter(torch.zeros(1, cfg.gate_window)), "scalar")

    def forward(self, x: Tensor, ids: Tensor, strength: Tensor) -> Tensor:
        """Embeddings x [B, T, d] of ids [B, T], strength [1] -> [B, T, d]."""
        share = strength.to(x.dtype) * window_gate(x[:, 1:], self.weight)
        share = share * (ids[:, 1:, None] != BOS_ID)
        return torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), dim=1)


class Head(nn.Module):
    """The product of the last norm and the head's table; a module, so that GPTQ can watch what it reads."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., d], weight [V, d] -> [..., V] in the dtype of x."""
        return F.linear(x, weight.to(x.dtype))


class BigramHash(nn.Module):
    """A learned row for each pair of neighbouring tokens, found by a hash (PR #135).

    The table starts at zero and its projection does not: with both at zero, as published, neither learns.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.embed = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        nn.init.zeros_(with_role(self.embed.weight, "embed"))
        self.proj = None
        if cfg.bigram_dim != cfg.model_dim:
            self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = with_role(nn.Parameter(torch.tensor(0.05)), "scalar")

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, d]; the last row is that of the first position, which has no token before."""
        last = self.embed.num_embeddings - 1
        hashes = (36313 * ids[:, 1:] ^ 27191 * ids[:, :-1]) % last
        x = self.embed(F.pad(hashes, (1, 0), value=last))
        if self.proj is not None:
            x = self.proj(x)
        return self.scale * x


@dataclass(frozen=True)
class Layer:
    """What one effective layer does; its number is its row in loop_embed, value_scales and value_mix."""

    number: int
    block: int  # whose weights it runs
    repeat: int = 0  # which run through the blocks this is, from 0
    position: int = 0  # its number within that run
    skip: int | None = None  # row of skip_weights that scales what is added to its input; None: no U-Net skip
    skip_from: int | None = None  # the place in the plan of the layer whose output that is
    repeat_from: int | None = None  # the layer of the block's run before, for CROSS_REPEAT_SKIP
    omits_own_value: bool = False  # XSA
    norm_scale: float = 1.0  # LN_SCALE: factor of what its norms give
    is_parallel: bool = False  # attention and MLP read the same input
    has_lanes: bool = False  # attention and MLP have residual streams of their own
    runs: bool = True  # False: beyond the depth that trains: passed over, but its U-Net skip is added


def plan_layers(cfg: Config, depth: int | None = None, loops: int = 0) -> tuple[Layer, ...]:
    """The layers in order, when the first `depth` of them run (None: all). Nothing else decides this.

    loops: how often blocks LOOP_START to LOOP_END run once more. U-Net skips join the latest encoder layer to
    the first decoder layer, and so on outwards. Two lanes, once begun, go on to the end.
    """
    depth = cfg.depth if depth is None else depth
    order = list(range(cfg.depth))
    encoders = cfg.encoders
    if loops:
        looped = order[cfg.loop_start : cfg.loop_end + 1]
        order[cfg.loop_start : cfg.loop_end + 1] = looped * (loops + 1)
        if cfg.encoder_layers < 0:
            encoders = len(order) // 2
    blocks = cfg.weight_share or cfg.num_layers
    exclusive_layers = cfg.depth if cfg.xsa_last_n < 0 else cfg.xsa_last_n
    has_lanes = False
    plan = []
    for place, number in enumerate(order):
        repeat, position = divmod(number, cfg.num_layers)
        has_skip = encoders <= place < 2 * encoders
        is_joined = repeat > 0 and cfg.cross_repeat_skip
        if place >= encoders and 0 < cfg.parallel_start_layer <= position:
            has_lanes = True
        layer = Layer(
            number=number,
            block=position % blocks,
            repeat=repeat,
            position=position,
            skip=place - encoders if has_skip else None,
            skip_from=2 * encoders - 1 - place if has_skip else None,
            repeat_from=number - cfg.num_layers if is_joined else None,
            omits_own_value=number >= depth - exclusive_layers,
            norm_scale=(position + 1) ** -0.5 if cfg.ln_scale else 1.0,
            is_parallel=cfg.parallel_block or 0 <= cfg.parallel_residual_start <= position,
            has_lanes=has_lanes,
            runs=number < depth,
        )
        plan.append(layer)
    return tuple(plan)


LayerPlan = tuple[Layer, ...]


class Phase(NamedTuple):
    """A stretch of the run that trains one plan of layers on windows of one length: one compiled graph."""

    until: float  # progress at which it ends
    plan: LayerPlan
    length: int  # tokens of a training window

    @property
    def depth(self) -> int:
        """How many layers run."""
        return sum(layer.runs for layer in self.plan)


def join_phases(plans: list[tuple[float, LayerPlan]], lengths: list[tuple[float, int]]) -> list[Phase]:
    """One phase for each stretch between two changes of the one or the other; the last ones go to the end."""
    changes = {until for until, _ in [*plans[:-1], *lengths[:-1]]}
    phases = []
    for change in sorted(changes):
        plan = next((plan for until, plan in plans if until >= change), plans[-1][1])
        length = next((length for until, length in lengths if until >= change), lengths[-1][1])
        phases.append(Phase(change, plan, length))
    return [*phases, Phase(1.0, plans[-1][1], lengths[-1][1])]


def looping_plans(cfg: Config) -> list[tuple[float, LayerPlan]]:
    """NUM_LOOPS: each block once until ENABLE_LOOPING_AT, then with the loop."""
    plain = (cfg.enable_looping_at, plan_layers(cfg))
    looped = (1.0, plan_layers(cfg, loops=cfg.num_loops))
    return [plain, looped] if cfg.enable_looping_at else [looped]


def growing_plans(cfg: Config) -> list[tuple[float, LayerPlan]]:
    """PROGRESSIVE_GROW: from max(3, 0.3 L) layers evenly to L, one more at a time, all by progress 0.9."""
    shallowest = min(cfg.num_layers, max(3, int(0.3 * cfg.num_layers)))
    depths = range(shallowest, cfg.num_layers + 1)
    growths = max(len(depths) - 1, 1)
    return [(0.9 * number / growths, plan_layers(cfg, depth)) for number, depth in enumerate(depths, 1)]


class Block(nn.Module):
    """x <- m0*x + m1*x0, then attention and MLP (parallel: of the same x, PR #1434), each with its gains."""

    def __init__(self, cfg: Config, dtype: torch.dtype):
        super().__init__()
        width = cfg.model_dim
        self.dtype = dtype  # of the products
        self.attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.attn_scale = with_role(nn.Parameter(torch.ones(width)), "scalar")
        self.mlp_scale = with_role(nn.Parameter(torch.ones(width)), "scalar")
        self.resid_mix = with_role(
            nn.Parameter(torch.stack((torch.ones(width), torch.zeros(width)))), "scalar"
        )
        self.norms_attention = cfg.sandwich_norm
        self.attentions = 2 if cfg.attn_recycle else 1

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        layer: Layer,
        cos: Tensor,
        sin: Tensor,
        value_mix: Tensor | None = None,
        first_values: Tensor | None = None,
        documents: Documents | None = None,
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[Tensor, Tensor]:
        """x, x0 [B, T, d] -> (x after the block, the values of the first layer, which may be this one).

        x0 is what the first layer was given; the rest is as in Attention.forward.
        """
        x = self.remix(x, x0)
        block_input = x
        for _ in range(self.attentions):
            attended, first_values = self.attention(
                x, layer, cos, sin, value_mix, first_values, documents, adapters
            )
            x = x + attended
        return x + self.feed(block_input if layer.is_parallel else x, layer, adapters), first_values

    def run_lanes(
        self,
        attention_lane: Tensor,
        mlp_lane: Tensor,
        x0: Tensor,
        layer: Layer,
        cos: Tensor,
        sin: Tensor,
        value_mix: Tensor | None = None,
        first_values: Tensor | None = None,
        documents: Documents | None = None,
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Two lanes [B, T, d] -> (what attention gives of the one, the MLP of the other, first values)."""
        mixed = self.remix(attention_lane, x0)
        attended, first_values = self.attention(
            mixed, layer, cos, sin, value_mix, first_values, documents, adapters
        )
        return attended, self.feed(mlp_lane, layer, adapters), first_values

    def remix(self, x: Tensor, x0: Tensor) -> Tensor:
        """m0*x + m1*x0."""
        keep, again = self.resid_mix.to(x.dtype)
        return keep * x + again * x0

    def attention(
        self,
        x: Tensor,
        layer: Layer,
        cos: Tensor,
        sin: Tensor,
        value_mix: Tensor | None,
        first_values: Tensor | None,
        documents: Documents | None,
        adapters: Adapters,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, d] -> (what the attention adds to it, the values of the first layer)."""
        norms = self.norms_attention and not layer.is_parallel
        gain = None if norms else self.folded(self.attn_scale, self.attn.proj, "o", adapters)
        attended, own_values = self.attn(
            scaled_norm(x, layer).to(self.dtype),
            cos,
            sin,
            repeat=layer.repeat,
            omits_own_value=layer.omits_own_value,
            value_mix=value_mix,
            first_values=first_values,
            documents=documents,
            adapters=adapters,
            gain=gain,
        )
        if norms:
            attended = norm(attended)
        first_values = own_values if first_values is None else first_values
        if gain is None:
            attended = self.attn_scale.to(x.dtype) * attended
        return attended, first_values

    def feed(self, x: Tensor, layer: Layer, adapters: Adapters) -> Tensor:
        """x [B, T, d] -> what the MLP adds to it."""
        read = scaled_norm(x, layer).to(self.dtype)
        gain = self.folded(self.mlp_scale, self.mlp.proj, "mlp", adapters)
        fed = adapted(self.mlp(read, layer.repeat, gain), read, adapters, "mlp")
        return self.mlp_scale.to(x.dtype) * fed if gain is None else fed

    def folded(self, gain: Tensor, matrix: Linear, place: str, adapters: Adapters) -> Tensor | None:
        """The gain, if it is to go into the matrix: not where something else is added to what that gives."""
        is_alone = matrix.lora_a is None and place not in adapters
        return gain if is_alone and folds_gains(gain.device) else None


def scaled_norm(x: Tensor, layer: Layer) -> Tensor:
    """The norm of x, times the layer's factor."""
    return norm(x) if layer.norm_scale == 1 else norm(x) * layer.norm_scale


class GPT(nn.Module):
    """Token ids [B, T] -> softcapped float32 logits [B, T, V]. dtype: that of the products."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        width = cfg.model_dim
        self.cfg = cfg
        self.dtype = dtype
        self.residual_dtype = torch.float32 if cfg.residual_fp32 else dtype
        self.softcap = cfg.logit_softcap
        self.embed_scale = cfg.embed_scale or 1.0
        # One plan for each phase of the run; the graph of each is compiled before the clock.
        self.plans = [phase.plan for phase in cfg.phases]
        layers = self.plans[-1]
        skips = sum(layer.skip is not None for layer in layers)
        blocks = 1 + max(layer.block for layer in layers)

        # The order in which weights are made is part of what a seed means.
        self.tok_emb = nn.Embedding(cfg.vocab_size, width)
        with_role(self.tok_emb.weight, "embed")
        self.skip_weights = with_role(nn.Parameter(torch.ones(skips, width)), "scalar")
        self.blocks = nn.ModuleList(Block(cfg, dtype) for _ in range(blocks))
        self.lm_head = None
        if cfg.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=cfg.tied_embed_init_std)
        else:
            self.lm_head = Linear(width, cfg.vocab_size, zero_init=True, trained_as="head")
        self.head = Head()
        self.register_rotation(cfg)

        self.value_embeds = nn.ModuleList(
            nn.Embedding(cfg.vocab_size, width) for _ in range(cfg.num_value_embeds)
        )
        for table in self.value_embeds:
            with_role(table.weight, "embed")
        self.value_scales = None
        if cfg.num_value_embeds:
            scales = torch.zeros(cfg.depth, cfg.num_value_embeds, width)
            self.value_scales = with_role(nn.Parameter(scales), "scalar")
        self.loop_embed = None
        self.cross_repeat_scales = None
        if cfg.num_repeats > 1:
            self.loop_embed = with_role(nn.Parameter(torch.zeros(cfg.depth, width)), "scalar")
            if cfg.cross_repeat_skip:
                scales = torch.zeros(cfg.num_layers, cfg.num_repeats - 1, width)
                self.cross_repeat_scales = with_role(nn.Parameter(scales), "scalar")
        self.value_mix = None
        if cfg.value_residual:
            self.value_mix = with_role(nn.Parameter(torch.full((cfg.depth, 2), 0.5)), "scalar")
        self.skip_gates = None
        if cfg.skip_gates_enabled:
            self.skip_gates = with_role(nn.Parameter(torch.zeros(skips, width)), "scalar")
        self.parallel_resid_lambdas = None
        self.parallel_post_lambdas = None
        if cfg.parallel_start_layer:
            kept_shares = torch.full((cfg.num_layers, 2), 1.1)  # [block, lane]
            added_shares = torch.ones(cfg.num_layers, 2, 2)  # [block, attention or MLP, lane]
            self.parallel_resid_lambdas = with_role(nn.Parameter(kept_shares), "scalar")
            self.parallel_post_lambdas = with_role(nn.Parameter(added_shares), "scalar")
        self.smear_gate = SmearGate(cfg) if cfg.smear_gate_enabled else None
        self.smear_lambda = None
        if cfg.smear_gate_enabled:
            self.smear_lambda = with_role(nn.Parameter(torch.zeros(1)), "scalar")
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        if cfg.ortho_init:
            for module in self.modules():
                if isinstance(module, Linear):
                    module.make_orthogonal()

    def register_rotation(self, cfg: Config) -> None:
        """Buffers of the rotary positions, cos and sin [T, R/2], for the longest context used."""
        dims = cfg.rope_dims or cfg.head_dim  # R
        frequency = cfg.rope_base ** (-torch.arange(0.0, dims, 2) / dims)
        longest = max(cfg.train_seq_len, cfg.eval_length, cfg.ttt_eval_seq_len)
        positions = torch.arange(float(longest))
        angle = torch.outer(positions, frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> embeddings [B, T, d], before their norm."""
        x = self.tok_emb(ids) * self.embed_scale
        if self.bigram is not None:
            x = x + self.bigram(ids)
        if self.smear_gate is not None:
            x = self.smear_gate(x, ids, self.smear_lambda)
        return x

    def forward(
        self,
        ids: Tensor,
        phase: int = -1,
        positions: Tensor | None = None,
        adapters: list[Adapters] | None = None,
    ) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; what `phase`, `positions` and `adapters` do, `logits` says.

        The path of evaluation. Training takes `training_loss`, which has hooks before and after the norm.
        """
        x0 = norm(self.embed(ids))
        return self.logits(x0, ids, phase=phase, positions=positions, adapters=adapters)

    def logits(
        self,
        x0: Tensor,
        ids: Tensor,
        keep: Tensor | None = None,
        phase: int = -1,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        adapters: list[Adapters] | None = None,
    ) -> Tensor:
        """From normed embeddings x0 [B, T, d] of ids [B, T] to logits [B, T, V], float32.

        keep [layers]: 0 for the layers that LAYER_DROP skips this step. phase: the one whose plan runs,
        by its number from the end. positions [B, S]: give the logits of these alone, [B, S, V].
        documents: as in `attend`.
        adapters: what is added to each layer of the plan, and at last to the head; None: nothing.
        """
        x0 = x0.to(self.residual_dtype)
        x = x0
        cos = self.cos[: x.size(1)].to(self.dtype)
        sin = self.sin[: x.size(1)].to(self.dtype)
        token_values = [table(ids).to(x.dtype) for table in self.value_embeds]
        first_values = None
        mlp_lane = None  # beside x, which is then the attention's lane
        outputs = []
        adapters = adapters or [NO_ADAPTERS] * (len(self.plans[phase]) + 1)
        for layer, layer_adapters in zip(self.plans[phase], adapters[:-1], strict=True):
            if layer.has_lanes and mlp_lane is None:
                mlp_lane = x
            if layer.skip is not None:
                x = self.join_skip(x, layer.skip, outputs[layer.skip_from])
            if layer.runs:
                y = self.layer_input(x, layer, token_values, outputs)
                value_mix = None if self.value_mix is None else self.value_mix[layer.number]
                block = self.blocks[layer.block]
                if layer.has_lanes:
                    attended, fed, first_values = block.run_lanes(
                        y, mlp_lane, x0, layer, cos, sin, value_mix, first_values, documents, layer_adapters
                    )
                    y, new_lane = self.mix_lanes(y, mlp_lane, attended, fed, layer.position)
                    mlp_lane = (
                        new_lane if keep is None else torch.where(keep[layer.number] > 0, new_lane, mlp_lane)
                    )
                else:
                    y, first_values = block(
                        y, x0, layer, cos, sin, value_mix, first_values, documents, layer_adapters
                    )
                x = y if keep is None else torch.where(keep[layer.number] > 0, y, x)
            outputs.append(x)
        x = self.join_lanes(x, mlp_lane)
        if positions is not None:
            x = x.take_along_dim(positions[..., None], dim=1)
        table = self.tok_emb if self.lm_head is None else self.lm_head
        x = norm(x).to(self.dtype)
        z = adapted(self.head(x, table.weight), x, adapters[-1], "head").float()
        return self.softcap * torch.tanh(z / self.softcap)

    def join_skip(self, x: Tensor, row: int, output: Tensor) -> Tensor:
        """x [B, T, d] and an encoder layer's output: x + skip, or gated g x + (1 - g) skip."""
        skip = self.skip_weights[row].to(x.dtype) * output
        if self.skip_gates is None:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[row].to(x.dtype)))

    def mix_lanes(
        self, attention_lane: Tensor, mlp_lane: Tensor, attended: Tensor, fed: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        """Each lane [B, T, d] keeps a share of itself and adds shares of what both parts of a block gave."""
        kept = self.parallel_resid_lambdas[block].to(fed.dtype)
        added = self.parallel_post_lambdas[block].to(fed.dtype)
        attention_lane = kept[0] * attention_lane + added[0, 0] * attended + added[1, 0] * fed
        mlp_lane = kept[1] * mlp_lane + added[0, 1] * attended + added[1, 1] * fed
        return attention_lane, mlp_lane

    def join_lanes(self, x: Tensor, mlp_lane: Tensor | None) -> Tensor:
        """What the head reads of the lanes: PARALLEL_FINAL_LANE; x where there is but one."""
        if mlp_lane is None or self.cfg.parallel_final_lane == "attn":
            return x
        if self.cfg.parallel_final_lane == "mlp":
            return mlp_lane
        return (x + mlp_lane) / 2

    def layer_input(
        self, x: Tensor, layer: Layer, token_values: list[Tensor], outputs: list[Tensor]
    ) -> Tensor:
        """x [B, T, d] plus the layer's loop embedding, token values and the block's output a repeat ago."""
        if self.loop_embed is not None:
            x = x + self.loop_embed[layer.number].to(x.dtype)
        if token_values:
            for scale, values in zip(self.value_scales[layer.number], token_values, strict=True):
                x = x + scale.to(x.dtype) * values
        if layer.repeat_from is not None:
            scale = self.cross_repeat_scales[layer.position, layer.repeat - 1]
            x = x + scale.to(x.dtype) * outputs[layer.repeat_from]
        return x


def cross_entropy(logits: Tensor, target_ids: Tensor) -> Tensor:
    """-log p(target) in nats, float32, of the shape of `target_ids`; logits have one more dimension, V."""
    nats = F.cross_entropy(logits.flatten(0, -2), target_ids.flatten(), reduction="none")
    return nats.view_as(target_ids)


def token_nats(
    model: GPT,
    ids: Tensor,
    target_ids: Tensor,
    positions: Tensor | None = None,
    phase: int = -1,
    adapters: list[Adapters] | None = None,
) -> Tensor:
    """-log p(target) at all positions [B, T], or at those given [B, S]. All that evaluation uses."""
    return cross_entropy(model(ids, phase, positions, adapters), target_ids)


# ----------------------------------------------------------------------------------------------------------
# 8. LOSS AND HOOKS
#
# `training_loss` turns (ids, targets) into the scalar that is minimised. Terms and edits of the input hang on
# the points "embedding", "input" and "loss" of HOOK_POINTS (section 2); evaluation sees none of them.
# Everything random in here is drawn from the tokens and the step's noise, so that it is the same at any
# world size and micro-batch size, and inside compiled code.
# ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LossKnobs:
    """Changes of what training sees that no hook fits."""

    pack_documents: bool = knob(
        False,
        "Let no token of a training window read another document of it; scores are made as without. The "
        "records also pack whole documents, into rows as long as a step: ours cuts them where windows end.",
        needs="MIRROR_TRAIN=0",
        source="PR #1530",
    )
    mirror_train: float = knob(
        0.0,
        "Share of the training sequences that are read backwards, their targets too; 0 = off.",
        low=0,
        high=1,
        source="PR #1434",
        fate="broken",
    )


class Seen(NamedTuple):
    """What a term of the loss may read, of one micro-batch of B sequences."""

    logits: Tensor  # [B, T, V], softcapped, float32
    target_ids: Tensor  # [B, T]
    nats: Tensor  # [B, T]: -log p(target)
    progress: Tensor  # scalar, 0 to 1
    model: GPT


MIRROR_SALT = 0


def scramble(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers in int64 (Thomas Mueller's, two multiplications)."""
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return x ^ (x >> 16)


def uniform(ids: Tensor, noise: Tensor, salt: int, count: int) -> Tensor:
    """Draws in [0, 1), float32 [B, count], from each sequence's ids [B, T], the step's noise and a salt.

    The noise is below 2^24, which leaves 8 bits for the salt: each use has one of its own.
    """
    positions = torch.arange(ids.size(1), device=ids.device)
    draws = torch.arange(count, device=ids.device)
    # Below 2^59 to 4,096 tokens of a vocabulary of 65,536; beyond, int64 wraps, the same on every device.
    content = (ids * (scramble(positions + 1) >> 1)).sum(dim=1, keepdim=True)
    sequence = scramble((content + (noise.long() << 8) + salt) & 0xFFFFFFFF)
    return (scramble(sequence ^ scramble(draws)) >> 8).float() / 2**24


def mirror(cfg: Config, ids: Tensor, target_ids: Tensor, dials: Dials) -> tuple[Tensor, Tensor]:
    """Turn a share MIRROR_TRAIN of the sequences [B, T] around as a whole.

    The target of a position is still the token that is read next.
    """
    is_mirrored = uniform(ids, dials.noise, MIRROR_SALT, 1) < cfg.mirror_train  # [B, 1]
    mirrored_ids = torch.where(is_mirrored, target_ids.flip(1), ids)
    mirrored_targets = torch.where(is_mirrored, ids.flip(1), target_ids)
    return mirrored_ids, mirrored_targets


def training_loss(cfg: Config, model: GPT) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that training minimises, to be compiled.

    It takes ids and target_ids [B, T], what `StepPlan.dials` gives (None: of step 0) and the phase; it gives
    (what is minimised, the mean nats per token alone), both scalars.
    """
    embedding_hooks = active(cfg, "embedding")
    input_hooks = active(cfg, "input")
    loss_hooks = active(cfg, "loss")

    def loss(
        ids: Tensor, target_ids: Tensor, step_dials: Tensor | None = None, phase: int = -1
    ) -> tuple[Tensor, Tensor]:
        """See training_loss."""
        if step_dials is None:
            step_dials = plan_step(cfg, 0, 0.0, 0.0).dials(ids.device)
        dials = Dials.of(step_dials)
        if cfg.mirror_train:
            ids, target_ids = mirror(cfg, ids, target_ids, dials)
        x = model.embed(ids)  # [B, T, d]
        for embedding_hook in embedding_hooks:
            x = embedding_hook(cfg, x, ids, dials)
        x = norm(x)
        for input_hook in input_hooks:
            x = input_hook(cfg, x, ids, dials)
        keep = dials.layers if cfg.layer_drop else None
        documents = Documents.of(ids) if cfg.pack_documents else None
        logits = model.logits(x, ids, keep=keep, phase=phase, documents=documents)
        nats = cross_entropy(logits, target_ids)
        objective = nats.mean()
        seen = Seen(logits, target_ids, nats, dials.progress, model)
        for loss_hook in loss_hooks:
            objective = objective + loss_hook(cfg, seen)
        return objective, nats.detach().mean()

    return loss


# ----------------------------------------------------------------------------------------------------------
# 9. OPTIMISERS
#
# Muon trains the blocks' matrices, Adam the rest. `role_settings` is the one table from a parameter's role to
# its optimiser and learning rate. All gradients live in one flat buffer: backward adds into it, one
# all-reduce sums it. `Optimisers.step` is the whole update, in order.
# ----------------------------------------------------------------------------------------------------------
# The official control tensors, then those of PR #895: trained by Adam with SCALAR_LR, packed as float32.
CONTROL_NAMES = (
    "attn_scale",
    "attn_scales",
    "mlp_scale",
    "mlp_scales",
    "resid_mix",
    "resid_mixes",
    "q_gain",
    "skip_weight",
    "skip_weights",
    "loop_embed",
    "value_scales",
    "cross_repeat_scales",
    "value_mix",
)
# Those of PR #1855, which are control tensors whatever patterns a command line lists.
GATE_NAMES = ("skip_gates", "parallel_resid", "parallel_post", "attn_gate_w", "smear_gate", "smear_lambda")


@dataclass(frozen=True)
class OptimiserKnobs:
    """Learning rates by role, and the constants of Muon and Adam."""

    embed_lr: float = knob(
        0.6,
        "Adam's learning rate of the embedding and of value embeddings, beside a head of its own.",
        low=0,
        needs="TIE_EMBEDDINGS=0",
        source="official",
    )
    head_lr: float = knob(
        0.008,
        "Adam's learning rate of a separate output head.",
        low=0,
        needs="TIE_EMBEDDINGS=0",
        source="official",
    )
    tied_embed_lr: float = knob(
        0.05,
        "Adam's learning rate of the embedding that is the output head too, and of value embeddings.",
        low=0,
        needs="TIE_EMBEDDINGS=1",
        source="official",
    )
    matrix_lr: float = knob(0.04, "Muon's learning rate of the blocks' matrices.", low=0, source="official")
    scalar_lr: float = knob(
        0.04,
        "Adam's learning rate of vectors, gains and other control tensors.",
        low=0,
        source="official",
    )
    muon_momentum: float = knob(
        0.95, "Muon's Nesterov momentum once its warm-up is over.", low=0, high=1, source="official"
    )
    muon_momentum_warmup_start: float = knob(
        0.85, "Muon's momentum at step 0.", low=0, high=1, source="official"
    )
    muon_momentum_warmup_steps: int = knob(
        500, "Steps over which Muon's momentum rises linearly; 0 = none.", low=0, source="official"
    )
    muon_backend_steps: int = knob(
        5, "Newton-Schulz iterations that orthogonalise Muon's update.", low=0, most=999, source="official"
    )
    polar_express: bool = knob(
        False,
        "Orthogonalise Muon's update by Polar Express: other coefficients at each of its five iterations.",
        source="#1344, arXiv 2505.16932",
        effect="with BETA2=0.99 left out of #1855 at 4 x 96: +0.025 bpb, 3 seeds, wave23",
    )
    muon_row_normalize: bool = knob(
        False,
        "Give each row of Muon's update the norm 1 before it is orthogonalised (MuonEq-R).",
        source="#1394",
        effect="with BETA2=0.99 left out of #1855 at 4 x 96: +0.025 bpb, 3 seeds, wave23",
    )
    muon_beta2: float = knob(
        0.0,
        "NorMuon: decay a step of the mean square of each row of the orthogonalised update, by whose root "
        "the row is divided; published with 0.95; 0 = off.",
        low=0,
        high=0.999999,
        source="arXiv 2510.05491",
    )
    soap_beta2: float = knob(
        0.0,
        "SOAP-Muon: decay a step of the second moments by which Muon's update is scaled, in the eigenbasis "
        "of the gradients' covariance, before it is orthogonalised; published with 0.9; 0 = off.",
        low=0,
        high=0.999999,
        source="modded-nanogpt #278",
    )
    soap_every: int = knob(
        10,
        "Steps between two computations of that eigenbasis.",
        low=1,
        needs="SOAP_BETA2!=0",
        source="modded-nanogpt #278",
    )
    muon_wd: float = knob(
        0.0,
        "Decoupled weight decay of the blocks' matrices, times their learning rate, before a step; 0 = off.",
        low=0,
        source="PR #895",
    )
    cautious_wd: bool = knob(
        False,
        "Let weight decay pull only those weights of the blocks' matrices that Muon's update makes smaller.",
        needs="MUON_WD!=0",
        source="arXiv 2510.12402",
    )
    embed_wd: float = knob(
        0.0,
        "Decoupled weight decay of embeddings, times their learning rate, before a step; 0 = off.",
        low=0,
        source="#1394",
    )
    adam_wd: float = knob(
        0.0,
        "Decoupled weight decay of vectors, gains and other control tensors, times SCALAR_LR; 0 = off.",
        low=0,
        source="#1394",
    )
    beta1: float = knob(0.9, "Decay of Adam's first moment a step.", low=0, high=0.999999, source="official")
    beta2: float = knob(
        0.95, "Decay of Adam's second moment a step.", low=0, high=0.999999, source="official"
    )
    adam_eps: float = knob(1e-8, "Adam's epsilon.", low=0, source="official")
    grad_clip_norm: float = knob(
        0.0,
        "Largest L2 norm of the whole gradient, scaled down to it beyond; 0 = off.",
        low=0,
        source="official",
    )
    control_tensor_name_patterns: tuple[str, ...] = knob(
        CONTROL_NAMES,
        "Off its default: Muon trains a block's two-dimensional tensors whose names contain none of these, "
        "SCALAR_LR all else but embeddings and head. At its default the model says which is which.",
        source="official",
    )
    sam_rho: float = knob(
        0.0,
        "Radius of sharpness-aware minimisation: gradients are taken that far uphill; 0 = off.",
        low=0,
        source="PR #1434",
        fate="broken",
    )

    def check(self) -> None:
        """RunError if Polar Express is asked for more iterations than it has coefficients."""
        if self.polar_express and self.muon_backend_steps > len(POLAR_EXPRESS):
            raise RunError(
                f"MUON_BACKEND_STEPS={self.muon_backend_steps} but POLAR_EXPRESS=1 has "
                f"{len(POLAR_EXPRESS)} iterations"
            )


@dataclass(frozen=True)
class RoleSettings:
    """How the parameters of a role are trained. Muon has the matrices, Adam every other role."""

    learning_rate: float
    weight_decay: float = 0.0  # decoupled; of the matrices the hooks of "decay" say it


def role_settings(cfg: Config) -> dict[str, RoleSettings]:
    """The settings of each role, which says where a parameter is made (`with_role`).

    The learning rate here is multiplied at each step by the schedule (`plan_step`). Muon's update of a tall
    matrix is larger (`Muon.fill_updates`); hooks of "lr_share" let some weights make a part of their step.
    """
    embed_lr = cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr
    return {
        "embed": RoleSettings(embed_lr, cfg.embed_wd),
        "head": RoleSettings(cfg.head_lr),
        "scalar": RoleSettings(cfg.scalar_lr, cfg.adam_wd),
        "matrix": RoleSettings(cfg.matrix_lr),
    }


@dataclass(frozen=True)
class Weight:
    """A parameter, its name and its role."""

    name: str
    param: nn.Parameter
    role: str  # a key of role_settings
    memory: dict[str, Tensor] = field(default_factory=dict)  # what a hook must remember of it

    @property
    def is_dense(self) -> bool:
        """Whether it is a matrix or table: no gain, gate or other control tensor."""
        return self.role != "scalar"

    @property
    def block(self) -> int | None:
        """The number of its block; None outside the blocks."""
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None


def weights_of(cfg: Config, model: GPT) -> list[Weight]:
    """Every parameter with its role, in the order of the model; empty tensors are left out."""
    weights = []
    for name, parameter in model.named_parameters():
        if parameter.numel():
            weights.append(Weight(name, parameter, role_of(cfg, name, parameter)))
    return weights


def role_of(cfg: Config, name: str, parameter: nn.Parameter) -> str:
    """The role declared where the parameter is made.

    With CONTROL_TENSOR_NAME_PATTERNS of a user's own it is the official rule: a block's two-dimensional
    tensor is a matrix unless a pattern is in its name.
    """
    has_own_patterns = cfg.is_changed("control_tensor_name_patterns")
    if not has_own_patterns or parameter.role in ("embed", "head"):
        return parameter.role
    is_control = any(pattern in name for pattern in cfg.control_tensor_name_patterns + GATE_NAMES)
    is_matrix = parameter.ndim == 2 and name.startswith("blocks.") and not is_control
    return "matrix" if is_matrix else "scalar"


def blocks_of(weights: list[Weight]) -> list[dict[str, Weight]]:
    """The blocks in order, each as its weights by their name inside the block."""
    blocks: dict[int, dict[str, Weight]] = {}
    for weight in weights:
        if weight.block is not None:
            inner_name = weight.name.split(".", 2)[2]
            blocks.setdefault(weight.block, {})[inner_name] = weight
    return list(blocks.values())


Quintic = tuple[float, float, float]  # (a, b, c) of one iteration of `orthogonalise`
# Keller Jordan's: steep at 0, all within 0.7..1.2 after 5 steps.
NEWTON_SCHULZ: Quintic = (3.4445, -4.7750, 2.0315)
# The best five in a row for singular values from 1e-3 to 1 (Amsel and others, arXiv 2505.16932), as the
# records from #1344 on have them.
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(matrices: Tensor, quintics: list[Quintic], dtype: torch.dtype) -> Tensor:
    """Move all singular values of each matrix of a stack [n, r, c] near 1, by an iteration for each quintic.

    x <- a x + (b A + c A^2) x with A = x x^T, after scaling to a Frobenius norm of 1.
    """
    if dtype == torch.float16:  # which has no number below 6e-8: scaled before it is rounded
        matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-30)
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    is_tall = x.size(1) > x.size(2)
    if is_tall:
        x = x.mT
    for a, b, c in quintics:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Orthogonalise a stack [n, r, c] by the same quintic `steps` times (Muon)."""
    return orthogonalise(matrices, [NEWTON_SCHULZ] * steps, dtype)


def polar_express(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Orthogonalise a stack [n, r, c] by the first `steps` quintics of POLAR_EXPRESS."""
    return orthogonalise(matrices, list(POLAR_EXPRESS[:steps]), dtype)


def normalise_rows(updates: Tensor) -> Tensor:
    """Give each row of a stack [n, r, c] the norm 1 (MuonEq-R, #1394): no output gets the whole step."""
    return updates / updates.norm(dim=2, keepdim=True).clamp(min=1e-7)


def even_rows(updates: Tensor, row_squares: list[Tensor], beta2: float) -> Tensor:
    """Divide the rows of a stack [n, r, c] by the root of their running mean squares (NorMuon, 2510.05491).

    row_squares: v [r, 1] of each matrix, updated here: v <- beta2 v + (1 - beta2) mean(u^2), then
    u <- u / sqrt(v), at the Frobenius norm that u had, so that v needs no correction of its start.
    """
    updates = updates.float()
    norm_before = updates.norm(dim=(1, 2), keepdim=True)
    squares = torch.stack(row_squares).lerp(updates.square().mean(dim=2, keepdim=True), 1 - beta2)
    torch._foreach_copy_(row_squares, squares.unbind())
    updates = updates / (squares.sqrt() + 1e-10)
    return updates * (norm_before / (updates.norm(dim=(1, 2), keepdim=True) + 1e-10))


def whiten(update: Tensor, grad: Tensor, state: dict[str, Tensor], beta2: float, renews: bool) -> Tensor:
    """Scale an update u [r, c] by its second moments, taken in the eigenbasis of the gradients' covariance.

    With the smaller side first: y = Q^T u; v <- beta2 v + (1 - beta2) y^2; u <- Q (y / sqrt(v)), at the norm
    that u had. Then, for the steps to come, C <- beta2 C + (1 - beta2) g g^T, and the columns of Q become the
    eigenvectors of C if this step `renews` them. SOAP-Muon (modded-nanogpt #278) rotates both sides; one, as
    in SOAP's own cheap form (arXiv 2409.11321), spares the eigenvectors of the wide side.
    """
    if update.size(0) > update.size(1):
        return whiten(update.mT, grad.mT, state, beta2, renews).mT
    basis = state["basis"]
    rotated = basis.mT @ update
    state["squares"].lerp_(rotated.square(), 1 - beta2)
    scaled = basis @ (rotated / (state["squares"].sqrt() + 1e-8))
    state["covariance"].lerp_(grad @ grad.mT, 1 - beta2)
    if renews:  # a gradient that is not finite must reach the check of the weights, and not fail here
        basis.copy_(torch.linalg.eigh(state["covariance"].nan_to_num(0.0, 0.0, 0.0)).eigenvectors)
    return scaled * (update.norm() / (scaled.norm() + 1e-8))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then an orthogonalised step (Keller Jordan, modded-nanogpt).

    Each rank updates every world_size-th matrix; the sum over ranks of a buffer that holds zeros elsewhere
    gives all ranks all updates, in the type in which they were orthogonalised: nothing is lost by that.
    """

    def __init__(self, params: list[nn.Parameter], cfg: Config, runtime: Runtime):
        lr = role_settings(cfg)["matrix"].learning_rate
        group = dict(params=params, base_lr=lr)
        super().__init__([group], dict(lr=lr, momentum=cfg.muon_momentum, weight_decay=0.0, step=0))
        self.cfg = cfg
        self.runtime = runtime
        self.matrices = self.param_groups[0]["params"]
        self.rank_share = slice(runtime.rank, None, runtime.world_size)
        is_float32 = cfg.muon_beta2 > 0 or runtime.world_size == 1  # `even_rows` gives float32
        self.sent_dtype = torch.float32 if is_float32 else runtime.dtype
        for parameter in self.matrices[self.rank_share]:
            self.state[parameter] = self.initial_state(parameter)

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What it remembers of a matrix [r, c], s the smaller of both, before the first step."""
        rows, columns = parameter.shape
        smaller = min(rows, columns)
        state = dict(momentum_buffer=torch.zeros_like(parameter))
        if self.cfg.muon_beta2:
            state["row_squares"] = parameter.new_zeros(rows, 1)
        if self.cfg.soap_beta2:
            state["basis"] = torch.eye(smaller, device=parameter.device)
            state["covariance"] = parameter.new_zeros(smaller, smaller)
            state["squares"] = parameter.new_zeros(smaller, max(rows, columns))
        return state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every matrix by its group's learning rate, momentum and weight decay."""
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            flat = torch.zeros(sum(map(Tensor.numel, params)), dtype=self.sent_dtype, device=params[0].device)
            updates = views_of(flat, params)
            self.fill_updates(params[self.rank_share], updates[self.rank_share], group)
            updates = views_of(self.runtime.sum(flat).float(), params)
            is_cautious = self.cfg.cautious_wd and self.cfg.muon_wd > 0
            shrink(params, group["lr"] * group["weight_decay"], updates if is_cautious else None)
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    def fill_updates(self, params: list[nn.Parameter], updates: list[Tensor], group: Mapping) -> None:
        """Write the update of each parameter into its tensor; those of one shape go through together."""
        cfg = self.cfg
        by_shape: dict[torch.Size, list[int]] = {}
        for index, parameter in enumerate(params):
            by_shape.setdefault(parameter.shape, []).append(index)
        for shape, indices in by_shape.items():
            grads = [params[index].grad for index in indices]
            states = [self.state[params[index]] for index in indices]
            averages = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(averages, group["momentum"])
            torch._foreach_add_(averages, grads)
            nesterov = torch._foreach_add(grads, averages, alpha=group["momentum"])
            if cfg.soap_beta2:
                renews = is_due(group["step"], cfg.soap_every)
                triples = zip(nesterov, grads, states, strict=True)
                nesterov = [whiten(*triple, cfg.soap_beta2, renews) for triple in triples]
            stack = torch.stack(nesterov)
            if cfg.muon_row_normalize:
                stack = normalise_rows(stack)
            update_rule = polar_express if cfg.polar_express else newton_schulz
            stack = update_rule(stack, cfg.muon_backend_steps, self.runtime.dtype)
            if cfg.muon_beta2:
                stack = even_rows(stack, [state["row_squares"] for state in states], cfg.muon_beta2)
            # Tall matrices step further, so that the root mean square of their outputs changes as much.
            stack = stack * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_copy_([updates[index] for index in indices], stack.unbind())


def views_of(flat: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    """The pieces of a flat tensor, one after the other, in the parameters' shapes."""
    pieces = flat.split([parameter.numel() for parameter in params])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, params, strict=True)]


def shrink(params: list[nn.Parameter], share: float, updates: list[Tensor] | None = None) -> None:
    """Decoupled weight decay, before the update, as PR #895: w <- (1 - share) w.

    updates: what will be subtracted; given, only those w shrink that it makes smaller too, w u >= 0 (Chen
    and others, arXiv 2510.12402).
    """
    if share and updates is not None:
        for parameter, update in zip(params, updates, strict=True):
            parameter.mul_(1 - share * (parameter * update >= 0))
    elif share:
        torch._foreach_mul_(params, 1 - share)


@hook("decay", knob="muon_wd")
def muon_weight_decay(cfg: Config, progress: float) -> float:
    """MUON_WD is the same throughout the run (PR #895)."""
    return cfg.muon_wd


class LossScale:
    """What the loss is multiplied by before a float16 backward pass, whose gradients would vanish else.

    Halved, and the step left out, when a gradient overflows; doubled after 2,000 sound steps (Micikevicius et
    al. 1710.03740). The other types have the range of float32: 1 for them, for good.
    """

    FIRST = 2.0**15
    SOUND_STEPS = 2_000

    def __init__(self, dtype: torch.dtype):
        self.is_used = dtype == torch.float16
        self.value = self.FIRST if self.is_used else 1.0
        self.sound_steps = 0  # since it last changed
        self.skipped_steps = 0

    def take_off(self, gradient: Tensor) -> bool:
        """Divide the summed gradient by the scale, in place; False if the step must be left out.

        At a scale of 1 it is left in, so that a run that diverges is found out. It waits for the device,
        which the types without a scale do not. Equal on every rank.
        """
        if not self.is_used:
            return True
        if self.value > 1 and not gradient.isfinite().all().item():
            self.value /= 2
            self.sound_steps = 0
            self.skipped_steps += 1
            return False
        gradient.div_(self.value)
        self.sound_steps += 1
        if self.sound_steps == self.SOUND_STEPS:
            self.value *= 2
            self.sound_steps = 0
        return True

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.value, self.sound_steps, self.skipped_steps]

    def load(self, state: list[float]) -> None:
        """Go back to a state."""
        self.value, self.sound_steps, self.skipped_steps = state


class Optimisers:
    """Muon and Adam over one flat gradient buffer, stepped together."""

    def __init__(self, cfg: Config, model: GPT, runtime: Runtime):
        self.cfg = cfg
        self.runtime = runtime
        self.blocks = len(model.blocks)
        self.weights = weights_of(cfg, model)
        settings = role_settings(cfg)
        params_of_role: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
        for weight in self.weights:
            params_of_role[weight.role].append(weight.param)
        matrices = params_of_role.pop("matrix")
        adam_groups = []
        for name, params in params_of_role.items():
            if params:
                rate = settings[name].learning_rate
                decay = settings[name].weight_decay
                adam_groups.append(dict(params=params, lr=rate, base_lr=rate, decoupled_decay=decay))
        self.adam = torch.optim.Adam(
            adam_groups,
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            fused=runtime.device.type in ("cuda", "cpu"),
        )
        self.muon = Muon(matrices, cfg, runtime)
        self.both = (self.adam, self.muon)
        self.trained: list[nn.Parameter] = []
        for group in self.adam.param_groups + self.muon.param_groups:
            self.trained += group["params"]
        self.flat = self.make_gradient_buffer()
        self.loss_scale = LossScale(runtime.dtype)
        self.norm = torch.zeros((), device=runtime.device)  # of the last step's gradient, before the clip
        self.gradient_edits = active(cfg, "edit_gradients")
        self.weight_edits = active(cfg, "edit_weights")
        self.lr_shares = active(cfg, "lr_share")
        self.decays = active(cfg, "decay")

    def make_gradient_buffer(self) -> Tensor:
        """One flat tensor, every gradient a view of it: backward adds into it, one all-reduce, no copies."""
        flat = torch.zeros(sum(map(Tensor.numel, self.trained)), device=self.runtime.device)
        for parameter, piece in zip(self.trained, views_of(flat, self.trained), strict=True):
            parameter.grad = piece
        return flat

    @torch.no_grad()
    def step(self, plan: StepPlan) -> None:
        """Sum gradients over ranks, edit, clip, update by the plan's learning rate and momentum, edit.

        In float16 a step whose gradient has overflown changes nothing but the loss scale.
        """
        self.runtime.sum(self.flat)
        if not self.loss_scale.take_off(self.flat):
            return
        for edit in self.gradient_edits:
            edit(self.cfg, self.weights, plan)
        self.norm = self.flat.norm()
        if self.cfg.grad_clip_norm:
            self.flat.mul_((self.cfg.grad_clip_norm / (self.norm + 1e-6)).clamp(max=1.0))
        decay = sum(weight_decay(self.cfg, plan.progress) for weight_decay in self.decays)
        self.muon.param_groups[0].update(momentum=plan.muon_momentum, weight_decay=decay, step=plan.step)
        partial_steps = self.plan_partial_steps(plan)
        for group in self.adam.param_groups + self.muon.param_groups:
            group["lr"] = group["base_lr"] * plan.lr_scale
        for group in self.adam.param_groups:  # AdamW's: Adam's own weight_decay is part of the gradient
            shrink(group["params"], group["lr"] * group["decoupled_decay"])
        for optimiser in self.both:
            optimiser.step()
        for parameter, before, share in partial_steps:
            parameter.lerp_(before, 1 - share)  # before + share * (what the step added)
        for edit in self.weight_edits:
            edit(self.cfg, self.weights, plan)

    def plan_partial_steps(self, plan: StepPlan) -> list[tuple[nn.Parameter, Tensor, float]]:
        """(parameter, its values before the step, its lr_share) of the weights whose lr_share is not 1.

        The share is of the step, since Muon and Adam both cancel a factor of the gradient.
        """
        partial_steps = []
        if self.lr_shares:
            for weight in self.weights:
                shares = [
                    lr_share(self.cfg, weight, plan.progress, self.blocks) for lr_share in self.lr_shares
                ]
                share = math.prod(shares)
                if share != 1:
                    partial_steps.append((weight.param, weight.param.clone(), share))
        return partial_steps

    @contextmanager
    @torch.no_grad()  # its own code alone, not what is run inside it
    def uphill(self, rho: float) -> Iterator[None]:
        """Weights moved by `rho` along the summed gradient, put back at the end (SAM, Foret 2010.01412)."""
        self.runtime.sum(self.flat)
        params = [weight.param for weight in self.weights]
        before = [parameter.detach().clone() for parameter in params]
        scale = rho / (self.flat.norm() + 1e-12)
        torch._foreach_add_(params, torch._foreach_mul([parameter.grad for parameter in params], scale))
        yield
        torch._foreach_copy_(params, before)

    def state(self) -> dict[str, object]:
        """What it remembers, whole on every rank: Muon's state is gathered from the ranks that hold it."""
        pieces = [torch.zeros(0, device=self.runtime.device)]
        for parameter in self.muon.matrices:
            is_held = parameter in self.muon.state
            for name, initial in self.muon.initial_state(parameter).items():
                held = self.muon.state[parameter][name] if is_held else torch.zeros_like(initial)
                pieces.append(held.flatten())
        muon = self.runtime.sum(torch.cat(pieces))
        memory = {weight.name: dict(weight.memory) for weight in self.weights if weight.memory}
        state = dict(adam=self.adam.state_dict(), muon=muon, memory=memory)
        if self.loss_scale.is_used:
            state["loss_scale"] = self.loss_scale.state()
        return state

    def load(self, state: Mapping) -> None:
        """Go back to a state, at any world size."""
        self.adam.load_state_dict(state["adam"])
        if self.loss_scale.is_used:
            self.loss_scale.load(state["loss_scale"])
        rest = state["muon"].to(self.runtime.device)
        for parameter in self.muon.matrices:
            for name, initial in self.muon.initial_state(parameter).items():
                piece, rest = rest.split([initial.numel(), rest.numel() - initial.numel()])
                if parameter in self.muon.state:
                    self.muon.state[parameter][name] = piece.view_as(initial).clone()
        for weight in self.weights:
            weight.memory.clear()
            for key, tensor in state["memory"].get(weight.name, {}).items():
                weight.memory[key] = tensor.to(weight.param.device)


# ----------------------------------------------------------------------------------------------------------
# 10. AVERAGES
#
# SWA or EMA of the weights, in float32, taken after each step. If one is on, it is what is packed and scored.
# ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AverageKnobs:
    """Which average of the weights is packed."""

    swa_enabled: bool = knob(
        False,
        "Pack the mean of snapshots of the weights, taken at full depth and low learning rate.",
        source="PR #895",
    )
    swa_start_frac: float = knob(
        0.4,
        "Learning-rate multiplier below which snapshots are taken.",
        low=0,
        needs="SWA_ENABLED=1",
        source="PR #895",
    )
    swa_every: int = knob(50, "Steps between snapshots.", low=1, needs="SWA_ENABLED=1", source="PR #895")
    ema_decay: float = knob(
        0.0,
        "Pack an exponential moving average of the weights that keeps this share a step; 0 = off.",
        low=0,
        high=0.99999,
        needs="SWA_ENABLED=0",
        source="ours",
    )


class Average:
    """Running average of the weights in float32: SWA's uniform mean (PR #895), or EMA without its bias."""

    def __init__(self, cfg: Config, model: GPT):
        self.cfg = cfg
        self.live = [parameter.detach() for parameter in model.parameters() if parameter.numel()]
        if cfg.swa_enabled:
            self.kind = "swa"
        elif cfg.ema_decay:
            self.kind = "ema"
        else:
            self.kind = ""
        self.total = [torch.zeros_like(tensor) for tensor in self.live] if self.kind else []
        self.weight = 0.0  # what `total` must be divided by
        self.count = 0  # snapshots taken
        self.newest = 0  # steps trained at the latest snapshot

    def add(self, step: int) -> None:
        """Take the weights as they are after `step` steps."""
        if self.kind == "swa":
            keep, new = 1.0, 1.0
        else:
            keep, new = self.cfg.ema_decay, 1 - self.cfg.ema_decay
        torch._foreach_mul_(self.total, keep)
        torch._foreach_add_(self.total, self.live, alpha=new)
        self.weight = keep * self.weight + new
        self.count += 1
        self.newest = step

    def update(self, plan: StepPlan) -> None:
        """Take what is due after a step. SWA: at full depth and low learning rate, each SWA_EVERY steps."""
        if self.kind == "ema":
            self.add(plan.step + 1)
        elif self.kind == "swa":
            is_whole_model = self.cfg.last_alike(plan.phase) == -1
            is_low_rate = plan.lr_scale < self.cfg.swa_start_frac
            if is_whole_model and is_low_rate and is_due(plan.step + 1, self.cfg.swa_every):
                self.add(plan.step + 1)

    def copy_into_model(self, step: int) -> None:
        """Put the average into the model. SWA counts the final weights once (PR #895: at times twice)."""
        if self.newest != step:  # never so of EMA
            self.add(step)
        torch._foreach_copy_(self.live, torch._foreach_div(self.total, self.weight))


# ----------------------------------------------------------------------------------------------------------
# 11. QUANTISE AND PACK
#
# A state dict goes in, one compressed file of checked bytes comes out (`pack`), and back again (`unpack`).
# `plan_tensor` is the only place that decides how a tensor is stored. A new way to clip rows is a function
# and its line in CLIPS, a new compressor two functions and their line in CODECS, a new rounding another
# choice of `pick_quantiser`. `predict_size` knows the packed size from shapes alone, before any training.
# ----------------------------------------------------------------------------------------------------------
# The file is PREFIX and a compressed body. The body is the header's length in four bytes, the header as JSON,
# and all arrays in the order of PLANES: arrays of one type compress better together.
# trellis: integers of TRELLIS=1; walked: 1 for each column that goes through the trellis.
PLANES = {
    "int8": "<i1",
    "trellis": "<i1",
    "walked": "<u1",
    "step": "<f2",
    "column": "<f2",
    "fp16": "<f2",
    "fp32": "<f4",
}
INTEGER_PLANES = ("int8", "trellis")
MAGIC = b"PGOLFQ"
FORMAT_VERSION = 1
PREFIX = struct.Struct("<6sB4s8sQQ")  # magic, version, codec, sha256[:8] of all else, raw and packed length
RAW_LIMIT = 1 << 29  # no artifact within the limit unpacks to more; a prefix that says so is forged
HEADER_LIMIT = 1 << 22  # a tensor takes about 100 bytes of it
NATS_PER_BIT = math.log(2)
SDCLIP = "sdclip"
BALANCE_TOKENS = 8192  # of training text, on which STEP_BALANCE_ROUNDS measures
CLIP_MARGIN = 1.2  # of the levels, since GPTQ moves weights and factors are rounded
GPTQ_BLOCK = 128  # columns whose errors are passed on one by one; the rest get them by the block
GPTQ_DAMPING = 0.01  # of the Hessian's mean diagonal, added to it
LEAST_STEP = 2.0**-24  # the least positive float16
RATE_VARIANCE = 0.3  # of 0 to 0.3 the best or nearly so at 1.3 to 5 bits: sweeps/results/study_quant_curve.md
TRELLIS_STATES = 8
TRELLIS_VARIANCE = 0.2  # of the weights of a column, in squares of its steps; finer ones are walked
TRELLIS_ROWS = 512  # are searched together, so that their survivors stay in the cache
TRELLIS_COLUMNS = 1 << 17  # of all tensors together: the reader walks them one by one
TRAINED_RATIO = 0.92  # packed / raw bytes of int8 rows: 0.9165 in PR #895, 0.92 in the LowerLR record
LEAST_SIGMAS = 4.0  # deviations that the levels span at SIZE_TARGET's finest steps
SIZE_MARGIN = 2_000  # bytes that SIZE_TARGET=auto leaves free
SIZE_SLACK = 1.03  # a prediction this far over the limit stops the run before training

# The module that a tensor belongs to decides its group, and with that its levels.
GROUP_OF_MODULE = {
    "tok_emb": "embed",
    "value_embeds": "embed",
    "bigram": "embed",
    "lm_head": "embed",
    "mlp": "mlp",
    "attn": "attention",
}


# -- Clips: sizes |w| [r, c] -> candidates [n, r]; a row keeps the one that loses least ------------------
# NumPy takes the quantiles, since torch.quantile stops at 16 million numbers.


def clip_official(sizes: np.ndarray) -> np.ndarray:
    """The official script's one percentile of each row."""
    return np.quantile(sizes, [0.9999984], axis=1)


def clip_max(sizes: np.ndarray) -> np.ndarray:
    """The largest weight of each row, so that none is clipped."""
    return sizes.max(axis=1)[None]


def clip_gptq_lite(sizes: np.ndarray) -> np.ndarray:
    """Five percentiles of each row (PR #895's "GPTQ-lite")."""
    return np.quantile(sizes, (0.9999, 0.99995, 0.99999, 0.999995, 0.999999), axis=1)


def clip_grid(sizes: np.ndarray) -> np.ndarray:
    """36 shares of each row's largest weight, from all of it down to 0.3."""
    return np.linspace(1, 0.3, 36)[:, None] * sizes.max(axis=1)


CLIPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "official": clip_official,
    "max": clip_max,
    "gptq_lite": clip_gptq_lite,
    "grid": clip_grid,
}


# -- Codecs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codec:
    """A compressor of the artifact's body."""

    tag: bytes  # four bytes that name it in the prefix
    compress: Callable[[bytes, Config], bytes]
    # (body, raw length) -> the raw bytes, or one more than that length: a bomb must not be unpacked.
    decompress: Callable[[bytes, int], bytes]


def zstandard_module():
    """The library of CODEC=zstd; RunError (2) if it is missing.

    A silent fall-back to zlib put 30 of 59 published runs over the limit.
    """
    try:
        import zstandard
    except ImportError:
        raise RunError("CODEC=zstd needs zstandard: pip install zstandard, or set CODEC=zlib") from None
    return zstandard


def compress_zstd(raw: bytes, cfg: Config) -> bytes:
    return zstandard_module().ZstdCompressor(level=cfg.zstd_level).compress(raw)


def decompress_zstd(body: bytes, raw_length: int) -> bytes:
    return zstandard_module().ZstdDecompressor().stream_reader(body).read(raw_length + 1)


def compress_zlib(raw: bytes, cfg: Config) -> bytes:
    return zlib.compress(raw, 9)


def decompress_zlib(body: bytes, raw_length: int) -> bytes:
    return zlib.decompressobj().decompress(body, raw_length + 1)


def brotli_module():
    """The library of CODEC=brotli; RunError (2) if it is missing or too old to unpack safely."""
    try:
        import brotli
    except ImportError:
        raise RunError("CODEC=brotli needs brotli: pip install brotli, or set CODEC=rans") from None
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise RunError("CODEC=brotli needs brotli 1.2 or newer: pip install --upgrade brotli")
    return brotli


def compress_brotli(raw: bytes, cfg: Config) -> bytes:
    return brotli_module().compress(raw, quality=11, lgwin=24)


def decompress_brotli(body: bytes, raw_length: int) -> bytes:
    reader = brotli_module().Decompressor()
    raw = reader.process(body, output_buffer_limit=raw_length + 1)
    if not reader.is_finished():
        raise RunError("a stream that does not end where it says")
    return raw


# -- CODEC=rans: our own entropy coder -------------------------------------------------------------------
# Interleaved rANS (Duda, arXiv 1311.2540; Giesen, arXiv 1402.3392): a symbol of frequency f / 2^14 in its
# context's table costs as many bits as 2^14 / f has doublings, and NumPy codes one symbol of each lane at a
# time. A matrix of integers has a scale for each row and each column, found by the writer and sent as a class
# of a quarter of an octave; the classes' sum and the group of the tensor are a number's context. Float bytes
# have theirs by type and place. The body: RANS_HEAD, then packed by zlib (the raw file's header, the tables),
# then two streams: float bytes with the classes, and the integers. A stream: a uint32 state for each lane,
# then uint16 words.
# Version 2 has integers of TRELLIS=1. In columns that go through the trellis even and odd are about as
# frequent, so lowest bits stand as they are, eight a byte, before the second stream. They say the states, and
# with that which of four sets of values an integer is of: the rest of it has a table for its context and set.
# One table serves two sets that are mirror images.
RANS_TABLES = {1: (12, 1), 2: (13, 4)}  # version -> tables of stream one, and for a context of stream two
RANS_HEAD = struct.Struct("<BBII")  # version, contexts of integers, bytes of the packed part and stream one
RANS_BITS = 14  # the frequencies of a context add up to 2^14
RANS_LEAST = 1 << 16  # states lie in [2^16, 2^32): 16 bits come in or go out at a time
SYMBOLS_PER_LANE = 8192
SCALE_CLASSES = 48  # of a group: 12 octaves of the mean size of the integers, from 2^-6 on
CODED_GROUPS = ("attention", "control", "embed", "mlp")
FIRST_CONTEXT = {"step": 0, "column": 2, "fp16": 4, "fp32": 6, "walked": 12}  # of a number's first byte
CLASS_CONTEXTS = np.array([10, 11], np.uint8)  # of the classes of rows and columns


def frequency_tables(symbols: np.ndarray, contexts: np.ndarray, count: int) -> np.ndarray:
    """uint32 [count, 256]: how frequent each symbol is in each context, of 2^14; at least 1 if it occurs."""
    counts = np.zeros((count, 256), np.int64)
    for begin in range(0, len(symbols), 1 << 22):  # in parts, since the keys take eight bytes each
        part = slice(begin, begin + (1 << 22))
        keys = contexts[part].astype(np.int64) << 8 | symbols[part]
        counts += np.bincount(keys, minlength=count << 8).reshape(count, 256)
    totals = counts.sum(axis=1, keepdims=True)
    occurs = counts > 0
    free = (1 << RANS_BITS) - occurs.sum(axis=1, keepdims=True)
    tables = occurs + counts * free // totals.clip(1)
    missing = np.where(totals[:, 0] > 0, (1 << RANS_BITS) - tables.sum(axis=1), 0)
    tables[np.arange(count), tables.argmax(axis=1)] += missing
    return tables.astype(np.uint32)


def first_slots(tables: np.ndarray) -> np.ndarray:
    """Where each symbol's slots begin among the 2^14 of its context; flat, uint32."""
    return (tables.cumsum(axis=1) - tables).astype(np.uint32).ravel()


def rans_encode(symbols: np.ndarray, contexts: np.ndarray, tables: np.ndarray) -> bytes:
    """A stream of uint8 symbols [n] in unsigned contexts [n]; the last is coded first, as rANS is a stack."""
    lanes = len(symbols) // SYMBOLS_PER_LANE + 1
    states = np.full(lanes, RANS_LEAST, np.uint32)
    frequencies = tables.ravel()
    starts = first_slots(tables)
    words = []
    for begin in reversed(range(0, len(symbols), lanes)):
        row = slice(begin, begin + lanes)
        keys = contexts[row].astype(np.uint32) << 8 | symbols[row]
        share = frequencies[keys]
        x = states[: len(keys)]  # a view
        is_full = x >> (32 - RANS_BITS) >= share
        full = x[is_full]
        words.append(full.astype("<u2"))
        x[is_full] = full >> 16
        times = x // share
        x += times * ((1 << RANS_BITS) - share) + starts[keys]
    return states.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


def rans_decode(stream: bytes, contexts: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """The uint8 symbols [n] of a stream whose contexts [n] are known; RunError on a forged one."""
    count = len(contexts)
    lanes = lanes_of(count, len(stream))
    if not np.isin(tables.sum(axis=1), (0, 1 << RANS_BITS)).all():
        raise RunError("a table of frequencies that is none")
    states = np.frombuffer(stream, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(stream, "<u2", offset=4 * lanes).astype(np.uint32)
    symbol_of_slot = np.zeros((len(tables), 1 << RANS_BITS), np.uint8)
    for context in np.flatnonzero(tables.any(axis=1)):
        symbol_of_slot[context] = np.repeat(np.arange(256), tables[context])
    symbol_of_slot = symbol_of_slot.ravel()
    frequencies = tables.ravel()
    starts = first_slots(tables)
    symbols = np.empty(count, np.uint8)
    read = 0
    for begin in range(0, count, lanes):
        row = slice(begin, begin + lanes)
        context = contexts[row].astype(np.uint32)
        x = states[: len(context)]
        slots = x & ((1 << RANS_BITS) - 1)
        found = symbol_of_slot[context << RANS_BITS | slots]
        symbols[row] = found
        keys = context << 8 | found
        x = frequencies[keys] * (x >> RANS_BITS) + slots - starts[keys]
        is_low = x < RANS_LEAST
        low = x[is_low]
        if read + len(low) > len(words):
            raise RunError("a stream that ends too early")
        x[is_low] = low << 16 | words[read : read + len(low)]
        read += len(low)
        states[: len(x)] = x
    if read != len(words) or (states != RANS_LEAST).any():
        raise RunError("a stream that does not end where its symbols do")
    return symbols


def lanes_of(count: int, length: int) -> int:
    """Lanes of a stream of `length` bytes that is to hold so many symbols; RunError if it cannot.

    As every lane has a state, a short stream cannot claim to hold more than 2,048 symbols a byte.
    """
    lanes = count // SYMBOLS_PER_LANE + 1
    if 4 * lanes > length or (length - 4 * lanes) % 2:
        raise RunError("a stream that is too short for its symbols")
    return lanes


def integer_shapes(table: list, planes: tuple[str, ...] = INTEGER_PLANES) -> list[tuple[int, int, int]]:
    """(group, rows, columns) of each tensor with such integers, in the file's order; an error if one is no
    matrix."""
    found = []
    for plane in planes:
        for name, shape, own_planes in table:
            if plane in own_planes:
                rows, columns = shape
                found.append((CODED_GROUPS.index(weight_group(name)), rows, columns))
    return found


def scale_classes(integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes of rows and columns of integers [r, c], uint8 around 128, in quarters of an octave.

    |integers| is about rows x columns; three rounds of means find both.
    """
    if not integers.size:
        return np.zeros(len(integers), np.uint8), np.zeros(integers.shape[1], np.uint8)
    sizes = np.abs(integers.astype(np.float32))
    columns = np.ones(sizes.shape[1], np.float32)
    for _ in range(3):
        rows = (sizes / columns).mean(axis=1).clip(2.0**-8)
        columns = (sizes / rows[:, None]).mean(axis=0).clip(2.0**-8)
    classes = [np.rint(4 / NATS_PER_BIT * np.log(scales)) for scales in (rows, columns)]
    return tuple((128 + part.clip(-64, 64)).astype(np.uint8) for part in classes)


def integer_contexts(shapes: list[tuple[int, int, int]], classes: np.ndarray) -> np.ndarray:
    """The context of every integer, uint8, in the file's order; classes: of rows and columns, by tensor."""
    contexts = []
    for group, rows, columns in shapes:
        own, classes = classes[: rows + columns].astype(np.int16), classes[rows + columns :]
        sums = own[:rows, None] + own[None, rows:] - 256 + SCALE_CLASSES // 2
        contexts.append((sums.clip(0, SCALE_CLASSES - 1) + group * SCALE_CLASSES).astype(np.uint8).ravel())
    return np.concatenate(contexts) if contexts else np.empty(0, np.uint8)


def trellis_halves(odd: np.ndarray, walked: np.ndarray) -> np.ndarray:
    """uint8 [r, c]: which integers mean half a step more, by lowest bits [r, c] and walked columns [c]."""
    halves = np.zeros(odd.shape[::-1], np.uint8)  # columns first, since each is written at once
    states = np.zeros(len(odd), np.uint8)
    for column in np.flatnonzero(walked):
        halves[column] = states & 1
        states = NEXT_STATE[2 * states + odd[:, column]]
    return halves.T


def walked_integers(shapes: list[tuple[int, int, int]], walked: np.ndarray) -> np.ndarray:
    """bool: which integers of these tensors, flat, are in columns that are walked; walked: of all columns."""
    parts = []
    for _, rows, columns in shapes:
        parts.append(np.tile(walked[:columns] != 0, rows))
        walked = walked[columns:]
    return np.concatenate(parts)


def trellis_sets(
    shapes: list[tuple[int, int, int]], walked: np.ndarray, odd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(which table of its context, whether it is mirrored) of each integer, flat, from the lowest bits.

    Table 0 has the integers of columns that are not walked, whole; their lowest bits do not count.
    """
    sets = walked_integers(shapes, walked) * (1 + odd)
    mirrored = np.zeros_like(odd)
    begin = 0
    for _, rows, columns in shapes:
        part = slice(begin, begin + rows * columns)
        halves = trellis_halves(odd[part].reshape(rows, columns), walked[:columns]).ravel()
        sets[part][halves > 0] = 3
        mirrored[part] = halves & odd[part]
        begin = part.stop
        walked = walked[columns:]
    return sets, mirrored


def side_contexts(table: list, shapes: list[tuple[int, int, int]]) -> np.ndarray:
    """The contexts of the bytes beside the integers, in the file's order, and of the classes of rows and
    columns after."""
    contexts = []
    for plane, number_type in PLANES.items():
        if plane in INTEGER_PLANES:
            continue
        values = 0
        for _, shape, planes in table:
            if plane in planes:
                values += math.prod(plane_shape(plane, shape))
        first = FIRST_CONTEXT[plane]
        width = np.dtype(number_type).itemsize
        contexts.append(np.tile(np.arange(first, first + width, dtype=np.uint8), values))
    for _, rows, columns in shapes:
        contexts.append(np.repeat(CLASS_CONTEXTS, (rows, columns)))
    return np.concatenate(contexts)


def compress_rans(raw: bytes, cfg: Config) -> bytes:
    """RANS_HEAD, what zlib packs, and two streams, as the banner of this part says."""
    if not raw:
        return b""
    header, start = decode_header(raw)
    shapes = integer_shapes(header["tensors"])
    integers = []
    classes = []
    stop = start
    for _, rows, columns in shapes:
        values = np.frombuffer(raw, np.int8, rows * columns, stop).reshape(rows, columns)
        classes += scale_classes(values)
        integers.append(values.ravel().view(np.uint8))
        stop += values.size
    side = np.concatenate([np.frombuffer(raw, np.uint8, offset=stop), *classes])
    side_places = side_contexts(header["tensors"], shapes)
    symbols = np.concatenate([np.empty(0, np.uint8), *integers])
    places = integer_contexts(shapes, np.concatenate([np.empty(0, np.uint8), *classes]))
    used = len(CODED_GROUPS) * SCALE_CLASSES
    lowest = b""
    trellis_shapes = integer_shapes(header["tensors"], ("trellis",))
    version = 1 + bool(trellis_shapes)
    if trellis_shapes:
        whole = symbols[-sum(rows * columns for _, rows, columns in trellis_shapes) :]  # a view
        odd = whole & 1
        sets, mirrored = trellis_sets(trellis_shapes, side, odd)
        lowest = np.packbits(odd[sets > 0]).tobytes()
        places = places.astype(np.uint16)
        places[-len(sets) :] += used * sets.astype(np.uint16)
        whole[:] = np.where(sets, (whole.view(np.int8) >> 1).view(np.uint8) ^ -mirrored, whole)
    side_count, tables_each = RANS_TABLES[version]
    side_tables = frequency_tables(side, side_places, side_count)
    tables = frequency_tables(symbols, places, used * tables_each)
    text = raw[:start] + pack_tables(np.concatenate([side_tables, tables]))
    packed_text = zlib.compress(text, 9)
    first = rans_encode(side, side_places, side_tables)
    head = RANS_HEAD.pack(version, used, len(packed_text), len(first))
    return head + packed_text + first + lowest + rans_encode(symbols, places, tables)


def pack_tables(tables: np.ndarray) -> bytes:
    """Frequencies [contexts, 256] as uint16: all low bytes, then all high ones."""
    return tables.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()


def unpack_tables(packed: bytes) -> np.ndarray:
    """The reverse of `pack_tables`: uint32 [contexts, 256]."""
    low, high = np.frombuffer(packed, np.uint8).reshape(2, -1).astype(np.uint32)
    return (high << 8 | low).reshape(-1, 256)


def decompress_rans(body: bytes, raw_length: int) -> bytes:
    """The reverse of `compress_rans`; RunError, or another error, on a forged body."""
    version, used, text_length, first_length = RANS_HEAD.unpack_from(body)
    if version not in RANS_TABLES:
        raise RunError(f"version {version} of the coder; this reads {max(RANS_TABLES)} and older ones")
    side_count, tables_each = RANS_TABLES[version]
    begin = RANS_HEAD.size + text_length
    table_bytes = 512 * (side_count + used * tables_each)
    longest = min(raw_length, HEADER_LIMIT) + table_bytes + 1
    text = zlib.decompressobj().decompress(body[RANS_HEAD.size : begin], longest)
    header, start = decode_header(text)
    if len(text) != start + table_bytes:
        raise RunError("tables that do not fill their part")
    side_tables, tables = np.split(unpack_tables(text[start:]), [side_count])
    table = header["tensors"]
    shapes = integer_shapes(table)
    trellis_shapes = integer_shapes(table, ("trellis",))
    if sum(TensorPlan(*row, 0).payload_bytes for row in table) != raw_length - start:
        raise RunError("tensors of another size than it says")
    # The streams' lengths bound what they hold, before anything of that size is made.
    integers = sum(rows * columns for _, rows, columns in shapes)
    classes = sum(rows + columns for _, rows, columns in shapes)
    floats = raw_length - start - integers
    second = begin + first_length
    lanes_of(integers, len(body) - second & ~1)  # bare lowest bits may stand before it, an odd count of bytes
    lanes_of(max(floats, 0) + classes, first_length)
    side_places = side_contexts(table, shapes)
    if len(side_places) != floats + classes:
        raise RunError("streams of other lengths than its tensors")
    side = rans_decode(body[begin:second], side_places, side_tables)
    places = integer_contexts(shapes, side[floats:])
    if len(places) and places.max() >= used:
        raise RunError("a context without a table")
    if trellis_shapes:
        is_walked = walked_integers(trellis_shapes, side)
        odd = np.zeros(len(is_walked), np.uint8)
        bits = int(is_walked.sum())
        lowest = np.frombuffer(body, np.uint8, (bits + 7) // 8, second)
        odd[is_walked] = np.unpackbits(lowest, count=bits)
        second += len(lowest)
        sets, mirrored = trellis_sets(trellis_shapes, side, odd)
        places = places.astype(np.uint16)
        places[-len(sets) :] += used * sets.astype(np.uint16)
    symbols = rans_decode(body[second:], places, tables)
    if trellis_shapes:
        rest = symbols[-len(sets) :]  # a view
        rest[:] = np.where(sets, (rest ^ -mirrored) << 1 | odd, rest)
    return text[:start] + symbols.tobytes() + side[:floats].tobytes()


CODECS = {
    "zstd": Codec(b"zstd", compress_zstd, decompress_zstd),
    "zlib": Codec(b"zlib", compress_zlib, decompress_zlib),
    "brotli": Codec(b"brot", compress_brotli, decompress_brotli),
    "rans": Codec(b"rans", compress_rans, decompress_rans),
}


def check_codec(cfg: Config) -> None:
    """RunError (2) if the codec's library is missing: said before the training, not after it."""
    CODECS[cfg.codec].compress(b"", cfg)


@dataclass(frozen=True)
class QuantiseKnobs:
    """How weights become integers and bytes."""

    quant_levels: int = knob(
        127,
        "Largest integer that a matrix is rounded to, up and down: 127 is int8, 63 int7, 31 int6.",
        low=1,
        high=127,
        role="pack",
        source="PR #1453",
        effect="63, MLP 16: -22 % bytes, +0.0011 bpb; 31, MLP 16: -30 %, +0.0040; one young model",
    )
    mlp_quant_levels: int = knob(
        0,
        "Largest integer for the matrices of the MLPs; 0 = as QUANT_LEVELS.",
        low=0,
        high=127,
        role="pack",
        source="PR #1453",
    )
    embed_quant_levels: int = knob(
        0,
        "Largest integer for the embedding tables and the output head; 0 = as QUANT_LEVELS.",
        low=0,
        high=127,
        role="pack",
        source="PR #1453",
        effect="63: -5 % bytes, +0.0012 bpb; one young model",
    )
    quant_clip: str = knob(
        "official",
        "Where weights of a row are clipped before rounding: official = at one percentile, max = nowhere, "
        "gptq_lite = at the best of five percentiles, grid = at the best of 36 shares of the row's maximum, "
        "sdclip = at QUANT_CLIP_SIGMAS standard deviations of the row.",
        choices=(*CLIPS, SDCLIP),
        role="pack",
        source="PR #895",
        effect="max, gptq_lite and grid within 0.001 bpb at int8 and int7/int5; one young model",
    )
    quant_clip_sigmas: float = knob(
        12.85,
        "Standard deviations of a row that its largest integer stands for; more is coarser and smaller.",
        low=0.01,
        needs="QUANT_CLIP=sdclip",
        role="pack",
        source="#1394",
    )
    mlp_quant_clip_sigmas: float = knob(
        0.0,
        "The same for the matrices of the MLPs; 0 = as QUANT_CLIP_SIGMAS.",
        low=0,
        needs="QUANT_CLIP=sdclip",
        role="pack",
        source="#1855",
    )
    embed_quant_clip_sigmas: float = knob(
        0.0,
        "The same for the embedding tables and the output head; 0 = as QUANT_CLIP_SIGMAS.",
        low=0,
        needs="QUANT_CLIP=sdclip",
        role="pack",
        source="#1394",
    )
    row_step_power: float = knob(
        1.0,
        "Power of a row's standard deviation in its step: 1 is SDClip, 0 gives a matrix one step for all, "
        "which spends more bits on large rows.",
        low=0,
        high=1,
        needs="QUANT_CLIP=sdclip",
        role="pack",
        source="ours",
        effect="0.5: 0.178 -> 0.140 nats lost at 3.3 bits; one young model",
    )
    gptq_calibration_batches: int = knob(
        0,
        "Training batches whose activations say which rounding errors matter (GPTQ, arXiv 2210.17323), read "
        "within the training clock, for which GPTQ_RESERVE_SECONDS keeps time; 0 rounds to the nearest.",
        low=0,
        needs="ITERATIONS!=0",
        role="pack",
        source="#535",
        effect="200 windows of 256: 0.300 -> 0.178 nats lost at 3.3 bits; one young model",
    )
    column_step_power: float = knob(
        0.0,
        "How far the step of a column follows what GPTQ cannot repair of its error: 1 makes all columns cost "
        "the same (water-filling), 0 gives all the same step.",
        low=0,
        high=1,
        needs="GPTQ_CALIBRATION_BATCHES!=0",
        role="pack",
        source="ours",
        effect="1: 0.178 -> 0.009 nats lost at 3.4 bits; one young model",
    )
    step_balance_rounds: int = knob(
        0,
        "Rounds that weigh the matrices' steps against each other: where rounding one alone moves the "
        "model's output more (KL divergence, on training text) its steps shrink, elsewhere they grow.",
        low=0,
        needs="GPTQ_CALIBRATION_BATCHES!=0,QUANT_CLIP=sdclip",
        role="pack",
        source="ours",
        effect="1: 0.0092 -> 0.0035 nats lost at 3.0 bits; one young model",
    )
    steps_per_octave: int = knob(
        0,
        "Round steps to so many values an octave, so that they take fewer bytes; 0 = as float16 holds them.",
        low=0,
        high=1024,
        role="pack",
        source="ours",
    )
    size_target: str = knob(
        "",
        "Bytes of code and packed model to fill, by scaling all QUANT_CLIP_SIGMAS; auto = the limit of "
        "16,000,000 less a margin; empty or 0 = take the knobs as they are.",
        needs="QUANT_CLIP=sdclip",
        role="pack",
        source="ours",
    )
    trellis: bool = knob(
        False,
        "Round a row by the best path through a trellis: it gives values half a step apart for the bits of "
        "whole steps. Made for CODEC=rans; takes two seconds a million weights on one core.",
        role="pack",
        source="JPEG 2000 part 2",
        effect="with RATE_LAMBDA=0.1: 7 to 9 % fewer bytes at the same KL divergence; 10 M weights",
    )
    rate_lambda: float = knob(
        0.0,
        "Round towards 0 where that saves bits: what a bit is worth, in squares of a step; by theory 0.115 "
        "for fine steps; 0 = only the error counts.",
        low=0,
        high=1,
        needs="GPTQ_CALIBRATION_BATCHES!=0",
        role="pack",
        source="ours",
        effect="0.1: 0.4 to 1.3 % fewer bytes at the same KL divergence; 10 M weights",
    )
    codec: str = knob(
        "zstd",
        "Compressor of the packed model: rans is our own entropy coder, which knows rows and columns; zstd "
        "needs the package zstandard, brotli the package brotli.",
        choices=tuple(CODECS),
        role="pack",
        source="PR #1434",
        effect="rans: -1.4 % bytes against brotli, the same integers; one young model",
    )
    zstd_level: int = knob(
        22,
        "Effort of zstd: a higher level packs smaller and slower.",
        low=1,
        high=22,
        needs="CODEC=zstd",
        role="pack",
        source="PR #1434",
    )
    quant_scale_floor: float = knob(
        0.0,
        "Least step between two integers of a row; the official script has 1/127 = 0.00787; 0 = no floor.",
        low=0,
        role="pack",
        source="official",
    )
    int8_keep_float_fp32_name_patterns: tuple[str, ...] = knob(
        CONTROL_NAMES,
        "Parts of names, comma-separated, instead of the default's: what has one in its name is packed as "
        "float32.",
        role="pack",
        source="official",
    )
    int8_keep_float_max_numel: int = knob(
        65_536,
        "Matrices of at most so many values are packed as float16, larger ones as integers. At the default a "
        "model of width 128 has hardly any integers.",
        low=0,
        role="pack",
        source="official",
    )
    control_float16: bool = knob(
        False,
        "Pack the control tensors (gains, scales, gates) as float16, half of their bytes.",
        role="pack",
        source="#1394",
    )
    eval_only: str = knob(
        "",
        "Path of a packed model to score instead of training one; empty = train.",
        role="place",
        source="ours",
    )

    @property
    def size_target_bytes(self) -> int:
        """SIZE_TARGET in bytes; 0 = none, RunError if it is no such number."""
        if self.size_target == "auto":
            return SIZE_LIMIT - SIZE_MARGIN
        try:
            return int(self.size_target or 0)
        except ValueError:
            raise RunError(
                f"SIZE_TARGET={self.size_target!r} is neither auto nor a number of bytes"
            ) from None

    def check(self) -> None:
        """RunError if GPTQ reads training data in time that nobody kept for it, or SIZE_TARGET is no size."""
        if not 0 <= self.size_target_bytes <= SIZE_LIMIT:
            raise RunError(f"SIZE_TARGET={self.size_target} is not within the limit of {SIZE_LIMIT} bytes")
        if self.gptq_calibration_batches and self.max_wallclock_seconds and not self.gptq_reserve_seconds:
            raise RunError(
                f"GPTQ_CALIBRATION_BATCHES={self.gptq_calibration_batches} are read after the last step, but "
                "within MAX_WALLCLOCK_SECONDS: set GPTQ_RESERVE_SECONDS, e.g. to the seconds of so many steps"
            )


# -- How each tensor is stored ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the model is stored; made by `plan_tensor` alone."""

    name: str
    shape: tuple[int, ...]
    planes: tuple[str, ...]  # the types of its arrays, keys of PLANES
    levels: int  # its integers lie in -levels..levels; 0: it is stored as floats

    @property
    def count(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def payload_bytes(self) -> int:
        """Bytes of its arrays before compression."""
        total = 0
        for plane in self.planes:
            total += np.dtype(PLANES[plane]).itemsize * math.prod(plane_shape(plane, self.shape))
        return total


def plane_shape(plane: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one array of a tensor: steps stand beside its rows, column factors above its columns."""
    if plane == "step":
        return (shape[0], 1)
    if plane in ("walked", "column"):
        return (1, shape[1])
    return tuple(shape)


def plan_tensor(cfg: Config, name: str, shape: tuple[int, ...]) -> TensorPlan:
    """Matrices of more than INT8_KEEP_FLOAT_MAX_NUMEL values become rows of integers, control tensors stay
    float32 unless CONTROL_FLOAT16, all others are float16."""
    shape = tuple(shape)
    if any(pattern in name for pattern in cfg.int8_keep_float_fp32_name_patterns + GATE_NAMES):
        return TensorPlan(name, shape, ("fp16" if cfg.control_float16 else "fp32",), 0)
    if len(shape) == 2 and math.prod(shape) > cfg.int8_keep_float_max_numel:
        planes = ("trellis", "walked", "step") if cfg.trellis else ("int8", "step")
        if cfg.column_step_power:
            planes += ("column",)
        return TensorPlan(name, shape, planes, levels_of(cfg, name))
    return TensorPlan(name, shape, ("fp16",), 0)


def plan_tensors(cfg: Config, state: Mapping[str, Tensor]) -> list[TensorPlan]:
    """The plan of each tensor, in the order of the state dict."""
    return [plan_tensor(cfg, name, tensor.shape) for name, tensor in state.items()]


def weight_group(name: str) -> str:
    """The group of a tensor, by its name: embed, mlp, attention or control."""
    for module in name.split("."):
        if module in GROUP_OF_MODULE:
            return GROUP_OF_MODULE[module]
    return "control"


def levels_of(cfg: Config, name: str) -> int:
    """The largest integer of a tensor that is stored as integers."""
    return of_group(name, cfg.quant_levels, cfg.mlp_quant_levels, cfg.embed_quant_levels)


def sigmas_of(cfg: Config, name: str) -> float:
    """The standard deviations that the largest integer of a tensor stands for with QUANT_CLIP=sdclip."""
    return of_group(name, cfg.quant_clip_sigmas, cfg.mlp_quant_clip_sigmas, cfg.embed_quant_clip_sigmas)


def of_group(name: str, default: float, mlp: float, embed: float) -> float:
    """The value for a tensor of this name: the default, unless its group has one of its own."""
    return dict(mlp=mlp, embed=embed).get(weight_group(name)) or default


def quant_name(cfg: Config) -> str:
    """int8, or the levels of attention, MLP and embeddings: 16 levels up and down are no int5."""
    levels = [levels_of(cfg, module) for module in ("attn", "mlp", "tok_emb")]
    if set(levels) == {127}:
        return "int8"
    return "q" + "-".join(map(str, levels))


# -- Weights to integers ---------------------------------------------------------------------------------


@dataclass
class Calibration:
    """What training text says about the tensors of these names, after training."""

    hessians: dict[str, Tensor] = field(default_factory=dict)  # X^T X [c, c] of the inputs of some
    scales: dict[str, float] = field(default_factory=dict)  # factors of SDClip's steps, 1 if not named


def pick_quantiser(cfg: Config, name: str, scale: float = 1.0) -> Callable[..., tuple[Tensor, ...]]:
    """quantise(weight [r, c], levels, hessian=None) -> (integers [r, c], steps [r]), as the knobs ask.

    With COLUMN_STEP_POWER there are also column factors [c]; without a Hessian they are all 1. scale: of
    SDClip's steps.
    """
    return partial(
        quantise_rows,
        clip=cfg.quant_clip,
        floor=cfg.quant_scale_floor,
        sigmas=scale * sigmas_of(cfg, name),
        row_power=cfg.row_step_power,
        column_power=cfg.column_step_power,
        per_octave=cfg.steps_per_octave,
        rate=cfg.rate_lambda,
        has_trellis=cfg.trellis,
    )


def quantise_rows(
    weight: Tensor,
    levels: int = 127,
    hessian: Tensor | None = None,
    *,
    clip: str = "official",
    floor: float = 0.0,
    sigmas: float = 0.0,
    row_power: float = 1.0,
    column_power: float = 0.0,
    per_octave: int = 0,
    rate: float = 0.0,
    has_trellis: bool = False,
    is_draft: bool = False,
) -> tuple[Tensor, ...]:
    """Round each row to multiples of a step of its own: weight ~ integers * steps[:, None] (* columns).

    Returns int8 [r, c] in -levels..levels and float16 steps [r] >= floor, with column_power also float16
    columns [c]. hessian [c, c]: X^T X of the inputs X that the weight meets, for `Gptq`. Without one all
    weights go to the nearest integer, or with has_trellis all count the same. rate: RATE_LAMBDA. is_draft: in
    the integers' place is what GPTQ's repairs would add to the variance of a column's weights [c].
    """
    if clip == SDCLIP:
        steps = sdclip_steps(weight, levels, sigmas, row_power)
    else:
        steps = best_steps(weight, levels, clip, floor)
    steps = round_octaves(steps, per_octave).clamp_min(max(floor, LEAST_STEP)).half()
    if has_trellis and hessian is None:
        hessian = torch.eye(weight.size(1))
    if hessian is None:
        integers = round_to_steps(weight, steps.float()[:, None], levels)
        columns = torch.ones(weight.size(1))
        repairs = torch.zeros(weight.size(1))
    else:
        weight = weight.to(hessian.device)
        solver = Gptq(hessian, column_power, per_octave, rate, has_trellis)
        given = (weight, steps.float().to(hessian.device), levels)
        if is_draft:
            repairs = solver.repair_variances(weight / solver.fit_columns(*given)).cpu()
        else:
            integers = solver.best(*given).cpu()
        columns = solver.columns.cpu()
    if is_draft:
        return repairs, steps, columns.half()
    arrays = (integers.to(torch.int8), steps)
    if has_trellis:
        arrays = (arrays[0], solver.is_walked.cpu().to(torch.uint8), steps)
    return (*arrays, columns.half()) if column_power else arrays


def sdclip_steps(weight: Tensor, levels: int, sigmas: float, row_power: float) -> Tensor:
    """SDClip (#1394): `levels` steps are so many standard deviations of the row; [r].

    row_power < 1 moves each row's deviation towards the geometric mean of all.
    """
    deviations = weight.std(dim=1).clamp_min(1e-10)
    if row_power < 1:
        logs = deviations.clamp_min(1e-4 * deviations.max()).log()
        deviations = (logs.mean() + row_power * (logs - logs.mean())).exp()
    return sigmas * deviations / levels


def best_steps(weight: Tensor, levels: int, clip: str, floor: float) -> Tensor:
    """Of the clip's candidates each row's of least squared error, as float16 stores them; [r]."""
    clips = torch.from_numpy(CLIPS[clip](weight.abs().numpy()))
    candidates = (clips / levels).clamp_min(max(floor, LEAST_STEP)).half().float()  # [n, r]
    errors = []
    for steps in candidates:
        restored = round_to_steps(weight, steps[:, None], levels) * steps[:, None]
        errors.append((restored - weight).square().sum(dim=1))
    # A step beyond float16 is inf, and its error nan.
    best = torch.stack(errors).nan_to_num(torch.inf).argmin(dim=0, keepdim=True)
    return candidates.gather(0, best)[0]


def share_variances(weight: Tensor, grid: Tensor) -> Tensor:
    """The variance of each weight in squares of its step, a row's share times a column's; [r, c]."""
    powers = (weight / grid).square()
    return powers.mean(dim=1, keepdim=True) * powers.mean(dim=0) / powers.mean().clamp_min(1e-30)


def square_price(rate, variances):
    """What v^2 costs, for numbers v of these variances, where a bit costs `rate`; all in squares of a step.
    With it they are divided by 1 + the price before they are rounded."""
    return rate / (2 * NATS_PER_BIT * (variances + RATE_VARIANCE))


def round_octaves(steps: Tensor, per_octave: int) -> Tensor:
    """The nearest of so many values an octave; 0 leaves the steps as they are."""
    if not per_octave:
        return steps
    gap = NATS_PER_BIT / per_octave
    return ((steps.log() / gap).round() * gap).exp()


class Gptq:
    """GPTQ (Frantar et al., arXiv 2210.17323) for one matrix, given the Hessian [c, c] of its inputs.

    Columns go by descending diagonal. U is the upper Cholesky factor of the damped inverse, so that an error
    e of column j, once later columns made up for it as well as they can, costs (e / U_jj)^2. With
    column_power, steps go by U_jj^power, of geometric mean 1: at 1 each column costs the same. No factor is
    so small that the levels would clip a weight of its column.

    rate: what a bit may cost, in squares of the mean step; it pulls weights towards 0 before they are
    rounded. has_trellis: integers by `search_trellis`, columns in the order in which the reader walks them.
    """

    def __init__(
        self,
        hessian: Tensor,
        column_power: float = 0.0,
        per_octave: int = 0,
        rate: float = 0.0,
        has_trellis: bool = False,
    ):
        damped = hessian.double()
        self.is_dead = damped.diagonal() == 0
        damped = damped + torch.diag(self.is_dead.double())
        damped.diagonal().add_(GPTQ_DAMPING * damped.diagonal().mean())
        self.hessian = damped
        self.order = damped.diagonal().argsort(descending=True, stable=True)
        if has_trellis:
            self.order = self.order.sort().values
        ordered = damped[self.order][:, self.order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        factor = torch.linalg.cholesky(inverse, upper=True)
        logs = torch.empty_like(factor.diagonal())
        logs[self.order] = factor.diagonal().log()
        logs -= logs[~self.is_dead].mean()
        logs[self.is_dead] = 0
        self.columns = (column_power * logs).clamp(-4, 4).exp().float()
        self.column_power = column_power
        self.per_octave = per_octave
        self.factor = factor.float()
        self.rate = rate
        self.has_trellis = has_trellis

    def fit_columns(self, weight: Tensor, steps: Tensor, levels: int) -> Tensor:
        """Make no column's factor so small that the levels would clip a weight; returns the steps [r, c]."""
        if self.column_power:
            least = CLIP_MARGIN * (weight.abs() / (levels * steps[:, None])).amax(dim=0)
            self.columns = round_octaves(self.columns.maximum(least), self.per_octave).half().float()
        return steps[:, None] * self.columns

    def repair_variances(self, values: Tensor) -> Tensor:
        """What repairs of earlier columns add to the variance of a column's weights, in squares of its step;
        [c]. values: the weights [r, c] in steps. An error of rounding has a variance of 1/12, or its
        weight's own where that is less."""
        variances = values[:, self.order].square().mean(dim=0)
        pulled = 1 - 1 / (1 + square_price(self.rate, variances))  # share of a weight that its price takes
        errors = variances.clamp_max(1 / 12) + variances * pulled.square()
        columns = self.columns[self.order].square()
        shares = (self.factor / self.factor.diagonal()[:, None]).triu(1).square()
        repairs = torch.empty_like(errors)
        repairs[self.order] = (errors * columns) @ shares / columns
        return repairs

    def best(self, weight: Tensor, steps: Tensor, levels: int) -> Tensor:
        """Integers [r, c] as floats: each row as `solve` gives it, or the nearest where these are better."""
        weight = weight.masked_fill(self.is_dead, 0.0)
        grid = self.fit_columns(weight, steps, levels)
        if self.has_trellis:
            self.is_walked = (weight / grid).square().mean(dim=0) > TRELLIS_VARIANCE
        solved = self.solve(weight, grid, levels)
        if self.has_trellis or self.rate:  # these know better than errors alone
            return solved
        nearest = round_to_steps(weight, grid, levels)
        is_better = self.errors(weight, solved * grid) <= self.errors(weight, nearest * grid)
        return torch.where(is_better[:, None], solved, nearest)

    def errors(self, weight: Tensor, restored: Tensor) -> Tensor:
        """What each row's output loses, squared and summed over the inputs; float64 [r]."""
        error = (weight - restored).double()
        return (error @ self.hessian * error).sum(dim=1)

    def bit_costs(self, weight: Tensor, grid: Tensor) -> Tensor:
        """What v^2 costs where v steps are taken of a weight; [r, c], ordered as the arguments are.

        A Gaussian number of variance s, in steps, takes v^2 / 2s nats more than 0 does. s is a row's share
        times a column's, and RATE_VARIANCE for the tails of real weights.
        """
        variances = share_variances(weight, grid)
        live = ~self.is_dead[self.order]
        unit = (grid / self.factor.diagonal())[:, live].log().mean(dim=1, keepdim=True).exp().square()
        return square_price(self.rate * unit, variances)

    def solve(self, weight: Tensor, grid: Tensor, levels: int) -> Tensor:
        """Round column by column, the error of each made up for by those after it; integers as floats."""
        weight = weight[:, self.order]
        grid = grid[:, self.order]
        costs = self.bit_costs(weight, grid) if self.rate else torch.zeros_like(weight)
        # The share of a weight at which its error and its bits cost least together.
        shares = 1 / (1 + costs * (self.factor.diagonal() / grid).square())
        states = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
        integers = torch.empty_like(weight)
        errors = torch.empty_like(weight)
        for begin in range(0, weight.size(1), GPTQ_BLOCK):
            block = slice(begin, begin + GPTQ_BLOCK)
            factor = self.factor[block, block]
            if self.has_trellis:
                walked = self.is_walked[block].tolist()
                for first in range(0, len(weight), TRELLIS_ROWS):
                    rows = slice(first, first + TRELLIS_ROWS)
                    tensors = (part[rows, block] for part in (weight, grid, costs, shares))
                    found = search_trellis(*tensors, factor, levels, states[rows], walked)
                    integers[rows, block], errors[rows, block], states[rows] = found
            else:
                tensors = (part[:, block] for part in (weight, grid, shares))
                integers[:, block], errors[:, block] = round_columns(*tensors, factor, levels)
            weight[:, block.stop :] -= errors[:, block] @ self.factor[block, block.stop :]
        unordered = torch.empty_like(integers)
        unordered[:, self.order] = integers
        return unordered


def round_columns(
    weight: Tensor, grid: Tensor, shares: Tensor, factor: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """(integers, errors / U_jj) of a block [r, n] of `Gptq`: each column to the nearest, when it is its turn.

    The weight is changed; shares of it [r, n] are what is rounded.
    """
    integers = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    for column in range(weight.size(1)):
        own = weight[:, column]
        integers[:, column] = round_to_steps(own * shares[:, column], grid[:, column], levels)
        error = (own - integers[:, column] * grid[:, column]) / factor[column, column]
        errors[:, column] = error
        weight[:, column + 1 :].addr_(error, factor[column, column + 1 :], alpha=-1)
    return integers, errors


# Trellis-coded quantisation with an entropy coder, as in JPEG 2000 part 2 (Fischer and Wang, IEEE Trans. Inf.
# Theory 1992), inside of GPTQ. An integer k stands for k steps where the state is even, for k + 1/2 where it
# is odd. The state goes on by Ungerboeck's 8-state code: its lower bits shift up, and the lowest bit of k,
# flipped in states 2 to 5, moves in. So a row picks from values half a step apart and pays for whole steps.
# States s and s + 4 are followed by the same two, 2s and 2s + 1 modulo 8.
STATE_FLIPS = np.array([0, 0, 1, 1, 1, 1, 0, 0], np.uint8)
NEXT_STATE = (2 * np.arange(8)[:, None] % 8 + (np.arange(2) ^ STATE_FLIPS[:, None])).astype(np.uint8).ravel()


def search_trellis(
    weight: Tensor,
    grid: Tensor,
    costs: Tensor,
    shares: Tensor,
    factor: Tensor,
    levels: int,
    states: Tensor,
    walked: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(integers, errors / U_jj, last states) of a block [r, n] of `Gptq`, by the path of least cost.

    A path costs its squared errors / U_jj, and costs * v^2 for its values v in steps. Of all paths to a state
    the best survives, with the weights as its own errors have moved them, and shares of these are rounded.
    states: where the rows [r] begin. Columns that are not walked leave them as they are and take the nearest
    integer.
    """
    rows, width = weight.shape
    device = weight.device
    state = torch.arange(TRELLIS_STATES, device=device)[:, None, None]
    flips = torch.from_numpy(STATE_FLIPS).to(device)[:, None, None]
    odd = torch.arange(2, device=device)[:, None] ^ flips  # [state, lowest bit of the next, 1]
    half = state % 2 / 2
    low = -((levels + odd) // 2)
    high = (levels - odd) // 2
    stay = state[:, 0].expand(-1, rows)
    total = torch.full((TRELLIS_STATES, rows), torch.inf, device=device)
    total.scatter_(0, states[None], 0.0)
    survivors = weight.T.expand(TRELLIS_STATES, width, rows)  # weights of the columns still to come
    chosen = []
    for column in range(width):
        x = survivors[:, :1] / grid[:, column]  # [8, 1, r]; [8, 2, r] are the ways on
        if walked[column]:
            k = ((x * shares[:, column] - half - odd) / 2).round().clamp(low, high) * 2 + odd
            v = k + half
        else:
            k = v = (x * shares[:, column]).round().clamp(-levels, levels)
        error = (x - v) * (grid[:, column] / factor[column, column])
        cost = total[:, None] + error.square() + costs[:, column] * v.square()
        later = survivors[:, 1:]
        before = stay
        if walked[column]:
            # Of the two states that lead to one, s and s + 4, the better.
            cost, error, k = (tensor.view(2, TRELLIS_STATES, rows) for tensor in (cost, error, k))
            is_upper = cost[1] < cost[0]
            cost, error, k = (torch.where(is_upper, tensor[1], tensor[0]) for tensor in (cost, error, k))
            before = stay // 2 + TRELLIS_STATES // 2 * is_upper
            later = later.view(2, TRELLIS_STATES // 2, 1, -1, rows)
            later = torch.where(is_upper.view(TRELLIS_STATES // 2, 2, 1, rows), later[1], later[0])
        total, error, k = (tensor.view(TRELLIS_STATES, rows) for tensor in (cost, error, k))
        chosen.append((k, error, before))
        survivors = later.view(TRELLIS_STATES, -1, rows)
        survivors = survivors.addcmul(factor[column, column + 1 :, None], error[:, None], value=-1)
    last = total.argmin(dim=0)
    integers = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    state = last[None]
    for column in reversed(range(width)):
        k, error, state = (tensor.gather(0, state) for tensor in chosen[column])
        integers[:, column] = k[0]
        errors[:, column] = error[0]
    return integers, errors, last


@contextmanager
def watched_inputs(model: GPT, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Sums of X^T X [c, c], float32, of all inputs X that the matrices of these names meet meanwhile.

    A matrix that several layers or repeats run meets the inputs of all. Embedding tables meet none, but for
    a tied one, which is the head.
    """
    modules = {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, Linear)}
    modules["tok_emb.weight" if model.lm_head is None else "lm_head.weight"] = model.head
    sums = {}
    hooks = []
    for name in names:
        if name in modules:
            width = model.get_parameter(name).size(1)
            sums[name] = torch.zeros(width, width, device=model.tok_emb.weight.device)
            hooks.append(modules[name].register_forward_pre_hook(partial(add_products, sums[name])))
    yield sums
    for hook_handle in hooks:
        hook_handle.remove()


def add_products(total: Tensor, module: nn.Module, inputs: tuple) -> None:
    """A forward pre-hook that adds X^T X of the module's inputs X to a sum."""
    x = inputs[0].flatten(0, -2).float()
    total.addmm_(x.T, x)


def decode_matrix(arrays: tuple[Tensor, ...]) -> Tensor:
    """The float32 matrix [r, c] of integers, steps and, where they are, column factors."""
    integers, steps, *columns = arrays
    weight = integers.float() * steps.float()[:, None]
    return weight * columns[0].float() if columns else weight


def round_to_steps(weight: Tensor, steps: Tensor, levels: int) -> Tensor:
    """The nearest integers within the levels, as floats; steps of the weight's shape, or one that fits."""
    return (weight / steps).round().clamp(-levels, levels)


# -- The file --------------------------------------------------------------------------------------------


def pack(
    cfg: Config,
    state: Mapping[str, Tensor],
    about: Mapping[str, object],
    calibration: Calibration | None = None,
) -> bytes:
    """The artifact: a checked prefix and a body. The same input gives the same bytes, in any order of names.

    about: what its header says beside codec, shape of the model and table of tensors. RunError (5) if a
    weight is not finite, or too large for its type.
    """
    return pack_arrays(cfg, encode_tensors(cfg, state, calibration or Calibration()), about)


def encode_tensors(
    cfg: Config, state: Mapping[str, Tensor], calibration: Calibration
) -> dict[TensorPlan, tuple[Tensor, ...]]:
    """The arrays of each tensor, one for each plane of its plan, by name; RunError (5) as `pack`."""
    encoded = {}
    for plan in plan_tensors(cfg, dict(sorted(state.items()))):
        weight = state[plan.name].detach().float().cpu().contiguous()
        if plan.levels:
            arrays = encode_matrix(cfg, plan, weight, calibration)
        else:
            arrays = (weight.half(),) if plan.planes == ("fp16",) else (weight,)
        if not all(torch.isfinite(array).all() for array in (weight, *arrays)):
            raise RunError(f"diverged: {plan.name} is not finite, or too large for the artifact", DIVERGED)
        encoded[plan] = arrays
    return encoded


def encode_matrix(
    cfg: Config, plan: TensorPlan, weight: Tensor, calibration: Calibration, is_draft: bool = False
) -> tuple[Tensor, ...]:
    """The arrays of a float32 matrix that is stored as integers; is_draft: as in `quantise_rows`."""
    quantise = pick_quantiser(cfg, plan.name, calibration.scales.get(plan.name, 1.0))
    return quantise(weight, plan.levels, calibration.hessians.get(plan.name), is_draft=is_draft)


def pack_arrays(
    cfg: Config, encoded: Mapping[TensorPlan, tuple[Tensor, ...]], about: Mapping[str, object]
) -> bytes:
    """The artifact of tensors as `encode_tensors` gives them."""
    planes: dict[str, list[bytes]] = {plane: [] for plane in PLANES}
    for plan, arrays in encoded.items():
        for plane, array in zip(plan.planes, arrays, strict=True):
            planes[plane].append(array.numpy().astype(PLANES[plane]).tobytes())
    table = [[plan.name, plan.shape, plan.planes] for plan in encoded]
    header = dict(about, codec=cfg.codec, model=cfg.shape(), tensors=table)
    header_text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    arrays_bytes = b"".join(itertools.chain(*planes.values()))
    raw = struct.pack("<I", len(header_text)) + header_text + arrays_bytes
    codec = CODECS[cfg.codec]
    return seal(codec.tag, len(raw), codec.compress(raw, cfg))


def seal(tag: bytes, raw_length: int, body: bytes) -> bytes:
    """The body behind its prefix, whose checksum covers both."""
    unchecked = PREFIX.pack(MAGIC, FORMAT_VERSION, tag, bytes(8), raw_length, len(body))
    checksum = hashlib.sha256(unchecked + body).digest()[:8]
    return PREFIX.pack(MAGIC, FORMAT_VERSION, tag, checksum, raw_length, len(body)) + body


def unpack(blob: bytes, source: str) -> tuple[dict[str, Tensor], dict]:
    """(float32 state dict, header) of an artifact. Nothing in it is executed.

    RunError (2), with `source` in it, on a file that is damaged, forged or of another kind.
    """
    codec, raw_length, body = open_seal(blob, source)
    try:
        raw = codec.decompress(body, raw_length)
        if len(raw) != raw_length:
            raise RunError("another length than it says")
        header, start = decode_header(raw)
        return decode_tensors(raw, start, header["tensors"]), header
    except Exception as error:  # a forged body: whatever breaks, the file is to blame
        raise RunError(f"{source} cannot be unpacked ({type(error).__name__}: {error})") from None


def open_seal(blob: bytes, source: str) -> tuple[Codec, int, bytes]:
    """(codec, raw length, body) of an artifact; RunError (2) if a byte of it is not as it was written."""
    if len(blob) < PREFIX.size or not blob.startswith(MAGIC):
        raise RunError(f"{source} is not an artifact of this script{describe_kind(blob)}")
    _, version, tag, _, raw_length, _ = PREFIX.unpack_from(blob)
    if version != FORMAT_VERSION:
        raise RunError(f"{source} has format version {version}; this reads {FORMAT_VERSION}")
    codecs = {codec.tag: codec for codec in CODECS.values()}
    if tag not in codecs:
        raise RunError(f"{source} is packed with an unknown codec {tag!r}")
    body = blob[PREFIX.size :]
    if seal(tag, raw_length, body) != blob or raw_length > RAW_LIMIT:
        raise RunError(f"{source} is damaged: its checksum or length is wrong; copy it again")
    return codecs[tag], raw_length, body


def decode_header(raw: bytes) -> tuple[dict, int]:
    """(header, where the arrays begin) of an unpacked body; raises something on a forged one."""
    stop = 4 + struct.unpack_from("<I", raw)[0]
    if stop >= HEADER_LIMIT:
        raise RunError("a longer header than any")
    header = json.loads(raw[4:stop])
    columns = 0
    for _, shape, planes in header["tensors"]:
        # Below 9 axes and with no number below 0, as NumPy would take -1 for "the rest".
        if len(shape) > 8 or not all(type(length) is int and length >= 0 for length in shape):
            raise RunError("a shape that is none")
        columns += shape[-1] if "trellis" in planes else 0
    if columns > TRELLIS_COLUMNS:
        raise RunError(f"TRELLIS=1 for {columns} columns; this reads {TRELLIS_COLUMNS}")
    return header, stop


def decode_tensors(raw: bytes, start: int, table: list) -> dict[str, Tensor]:
    """The float32 tensors of an unpacked body, its arrays from `start` on; raises something on a forged one.

    table: (name, shape, planes) of each. The arrays must fill the body.
    """
    state: dict[str, Tensor] = {}
    for plane, number_type in PLANES.items():
        for name, shape, planes in table:
            if plane not in planes:
                continue
            own_shape = plane_shape(plane, shape)
            values = np.frombuffer(raw, number_type, math.prod(own_shape), start)
            array = torch.from_numpy(values.astype(np.float32).reshape(own_shape))
            if plane in ("step", "column"):
                state[name].mul_(array)
            elif plane == "walked":
                odd = state[name].to(torch.int8).numpy().view(np.uint8) & 1
                state[name] += torch.from_numpy(trellis_halves(odd, values)) / 2
            else:
                state[name] = array
            start += values.nbytes
    if start != len(raw):
        raise RunError("planes that do not fill it")
    return {name: state[name] for name, *_ in table}


# -- Sizes -----------------------------------------------------------------------------------------------


def payload_bytes(cfg: Config, state: Mapping[str, Tensor]) -> int:
    """Bytes of all arrays before compression, from shapes alone."""
    return sum(plan.payload_bytes for plan in plan_tensors(cfg, state))


# Bytes over what they would take alone, in trained models: integers over their expected entropy, floats and
# steps over two or four bytes each. What rans spends on classes of rows and columns is among the steps.
CODED_RATIO = {
    "rans": (1.002, 0.83, 1.1),
    "brotli": (1.02, 0.9, 0.9),
    "zstd": (1.02, 0.9, 0.9),
    "zlib": (1.16, 0.93, 0.93),
}
ROUND_STEPS_RATIO = 0.65  # of the steps' bytes, where STEPS_PER_OCTAVE leaves them few values
LOG_VARIANCES = np.linspace(-16, 12, 113)  # at which the entropy is tabled


def predict_size(cfg: Config, model: GPT, calibration: Calibration | None = None) -> int:
    """Expected bytes of the packed model: from shapes alone, or of a trained model with its calibration.

    The latter is within 1.5 % with QUANT_CLIP=sdclip, down to 1.8 bits a weight. Shapes do not say
    how unlike each other rows and columns will be, which takes off up to 5 %, or what STEP_BALANCE_ROUNDS
    will find, up to 26 % more bytes. Of other clips 127 / levels saves its log_256 bytes a weight.
    SIZE_TARGET takes what the finest steps can fill; RunError (2) if it is too small for what does not become
    integers.
    """
    state = model.state_dict()
    plans = plan_tensors(cfg, state)
    quantised = [plan for plan in plans if plan.levels]
    if cfg.quant_clip != SDCLIP:
        saved_bytes = sum(plan.count * math.log(127 / plan.levels, 256) for plan in quantised)
        return int(TRAINED_RATIO * payload_bytes(cfg, state) - saved_bytes)
    integer_ratio, float_ratio, step_ratio = CODED_RATIO[cfg.codec]
    if cfg.steps_per_octave:
        step_ratio *= ROUND_STEPS_RATIO
    other_bytes = sum(float_ratio * plan.payload_bytes for plan in plans if not plan.levels)
    integer_bytes = 0.0
    finest = scale_sigmas(cfg, finest_scale(cfg) if cfg.size_target_bytes else 1.0)
    for plan in quantised:
        other_bytes += step_ratio * (plan.payload_bytes - plan.count)
        variances = np.array((plan.levels / sigmas_of(finest, plan.name)) ** 2)
        if calibration:
            variances = rounded_variances(finest, plan, state[plan.name].float().cpu(), calibration)
        integer_bytes += integer_ratio * plan.count / 8 * expected_bits(cfg, variances, plan.levels)
    predicted = int(integer_bytes + other_bytes)
    if not cfg.size_target_bytes:
        return predicted
    room = model_room(cfg)
    if other_bytes > room:
        raise RunError(
            f"SIZE_TARGET={cfg.size_target} leaves {room} bytes to the model, but what is not packed as "
            f"integers takes about {other_bytes:.0f}; set more, or lower "
            f"INT8_KEEP_FLOAT_MAX_NUMEL={cfg.int8_keep_float_max_numel}"
        )
    return min(predicted, room)


def rounded_variances(cfg: Config, plan: TensorPlan, weight: Tensor, calibration: Calibration) -> np.ndarray:
    """Variances of what becomes integers of a matrix, in squares of the steps that SDClip gives; [r, c]."""
    repairs, *steps = encode_matrix(cfg, plan, weight, calibration, is_draft=True)
    variances = share_variances(weight, decode_matrix((torch.ones_like(weight), *steps)))
    return (variances + repairs).numpy()


def expected_bits(cfg: Config, variances: np.ndarray, levels: int) -> float:
    """The entropy of Gaussian numbers of these variances, in squares of a step, rounded; a mean."""
    variances = variances / (1 + square_price(cfg.rate_lambda, variances)) ** 2
    table = [rounded_entropy(levels / math.exp(log / 2), levels) for log in LOG_VARIANCES]
    return float(np.interp(np.log(variances.clip(1e-9)), LOG_VARIANCES, table).mean())


def model_room(cfg: Config) -> int:
    """Bytes that SIZE_TARGET leaves to the packed model; RunError (2) if the script alone takes them all."""
    code_bytes = len(own_source())
    if cfg.size_target_bytes <= code_bytes:
        raise RunError(
            f"SIZE_TARGET={cfg.size_target} leaves nothing to the model: the script alone takes {code_bytes} "
            "bytes; set more, or start a packed one with PACKED=1"
        )
    return cfg.size_target_bytes - code_bytes


SIGMA_KNOBS = ("quant_clip_sigmas", "mlp_quant_clip_sigmas", "embed_quant_clip_sigmas")


def scale_sigmas(cfg: Config, scale: float) -> Config:
    """The config with SDClip's steps so many times as large."""
    return replace(cfg, **{name: scale * getattr(cfg, name) for name in SIGMA_KNOBS})


def finest_scale(cfg: Config) -> float:
    """The least factor of SDClip's steps that SIZE_TARGET tries: finer ones would clip."""
    return LEAST_SIGMAS / min(filter(None, [getattr(cfg, name) for name in SIGMA_KNOBS]))


def rounded_entropy(sigmas: float, levels: int) -> float:
    """Bits of a Gaussian number whose deviation is levels / sigmas, rounded to integers within the levels."""
    edges = (np.arange(-levels, levels) + 0.5) * sigmas / levels
    below = [0.0, *(0.5 * math.erfc(-edge / 2**0.5) for edge in edges), 1.0]
    shares = np.diff(below)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum() / NATS_PER_BIT)


# ----------------------------------------------------------------------------------------------------------
# 12. SCORE: windows, test-time training
#
# A model and the Validation of section 6 flow in, a Score flows out: the nats of every target, each counted
# once, divided by the bytes of the text. Target i is token i + 1 of the text; a model may read the tokens up
# to i for it. `evaluate` scores a model, in training and at the end: it plans the turns of all ranks, scores
# the windows of each, and lets test-time training learn from a chunk once all its targets have a score.
# The scorers that a run ends with stand after the Hedge mixer, the last of them, in section 13.
# ----------------------------------------------------------------------------------------------------------


def sgd_with_momentum(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


TTT_OPTIMISERS = {"sgd": sgd_with_momentum, "adam": torch.optim.Adam}
# Most tokens a pass through the model: for each thread of a CPU what its cache takes, and what fills a GPU.
CPU_PASS_TOKENS = 2_048
GPU_PASS_TOKENS = 65_536
# Lengths of passes as shares of the longest, and the shortest one in tokens: each is a graph to compile.
PASS_SHARES = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)
SHORTEST_PASS = 64
FEWEST_ROWS = 4  # documents; passes of fewer save no time
LORA_PLACES = ("q", "k", "v", "o", "mlp", "head")


@dataclass(frozen=True)
class ScoreKnobs:
    """How the model is scored, and what it may learn from the text that has its scores."""

    max_eval_seconds: float = knob(
        600.0,
        "Seconds that all final scores may take together: a score that would pass them is cut short and the "
        "run exits with 4; 0 = no limit.",
        source="ours",
        role="place",
        low=0,
    )
    val_batch_size: int = knob(
        524_288,
        "Validation tokens of eight official passes: a pass takes an eighth of them, at most 65,536 on a GPU "
        "and 16,384 on a CPU.",
        source="official",
        role="place",
        low=8,
    )
    eval_stride: int = knob(
        0,
        "Add a score by sliding windows, which move on by this many tokens and score that many targets each: "
        "the smaller, the more context a target has and the longer it takes; 0 = no such score.",
        source="PR #895",
        effect="-0.020 bpb at stride 64, 1 seed, records/benchmarks/cpu_hedge.json",
        role="pack",
        low=0,
    )
    eval_seq_len: int = knob(
        0,
        "Tokens in each sliding window, which may be longer than in training; 0 = TRAIN_SEQ_LEN.",
        source="PR #895",
        role="pack",
        low=0,
        needs="EVAL_STRIDE!=0",
    )
    eval_doc_isolated: bool = knob(
        False,
        "Add a score by windows that read one document each: the first scores all that it holds, later ones "
        "EVAL_STRIDE targets, or as many as they hold without a stride; 0 = no such score.",
        source="parameter-golf #77",
        role="pack",
    )
    eval_batch_seqs: int = knob(
        32,
        "Sliding windows that each rank puts through the model in one pass.",
        source="PR #895",
        role="place",
        low=1,
        needs="EVAL_STRIDE!=0",
    )
    ttt_steps: int = knob(
        0,
        "Add a score by test-time training: take this many gradient steps on each chunk of the validation "
        "text once the chunk has its scores; 0 = no such score.",
        source="parameter-golf #461, #549",
        effect="-0.004 bpb, 1 seed, records/benchmarks/cpu_hedge.json",
        role="pack",
        low=0,
    )
    ttt_lr: float = knob(
        1e-4,
        "Learning rate of test-time training.",
        source="ours",
        role="pack",
        low=0,
        needs="TTT_STEPS!=0",
    )
    ttt_chunk_tokens: int = knob(
        32_768,
        "Targets of a chunk: all are scored with the same weights, then test-time training learns from them.",
        source="ours",
        role="pack",
        low=1,
        needs="TTT_STEPS!=0,TTT_BATCH_SIZE=0",
    )
    ttt_optimizer: str = knob(
        "sgd",
        "Optimiser of test-time training; sgd has momentum 0.9.",
        source="ours",
        role="pack",
        choices=tuple(TTT_OPTIMISERS),
        needs="TTT_STEPS!=0,TTT_BATCH_SIZE=0",
    )
    ttt_cosine_chunks: int = knob(
        0,
        "Chunks over which TTT_LR falls to zero along a half cosine; the number is part of the score, not "
        "the text's own, which would tell where it ends; 0 = TTT_LR stays.",
        source="parameter-golf #1493",
        role="pack",
        low=0,
        needs="TTT_STEPS!=0,TTT_BATCH_SIZE=0",
    )
    ttt_grad_clip: float = knob(
        0.0,
        "Norm that the gradient of test-time training is cut to; 0 = none.",
        source="parameter-golf #1493",
        role="pack",
        low=0,
        needs="TTT_STEPS!=0,TTT_BATCH_SIZE=0",
    )
    ttt_lora_rank: int = knob(
        0,
        "Rank r of the low-rank matrices B A (LoRA) that test-time training adds to the blocks' matrices and "
        "trains in their stead; 0 = it trains all weights themselves.",
        source="arXiv 2106.09685",
        role="pack",
        low=0,
        most=2**16,
        needs="TTT_STEPS!=0",
    )
    ttt_reset: bool = knob(
        False,
        "Score each document by itself: test-time training begins it with the packed weights, and no window "
        "reads the text before it; 0 = go on learning through the whole text.",
        source="ours",
        role="pack",
        needs="TTT_STEPS!=0,TTT_BATCH_SIZE=0",
    )
    ttt_batch_size: int = knob(
        0,
        "Documents that are scored by themselves and learnt from at once, each with a LoRA of its own, after "
        "every TTT_CHUNK_SIZE targets, by AdamW; 0 = the whole text, one chunk after another.",
        source="parameter-golf #77, #1530, #1855",
        role="pack",
        low=0,
        most=2**16,
        needs="TTT_STEPS!=0,TTT_LORA_RANK!=0",
    )
    ttt_chunk_size: int = knob(
        48,
        "Targets of a document's chunk: scored together, then learnt from.",
        source="parameter-golf #1855",
        role="pack",
        low=1,
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_eval_seq_len: int = knob(
        0,
        "Most tokens of the window that a document's chunk ends; 0 = as a sliding window.",
        source="parameter-golf #1855",
        role="pack",
        low=0,
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_lora_alpha: float = knob(
        144.0,
        "A document's LoRA adds TTT_LORA_ALPHA / TTT_LORA_RANK times B A.",
        source="parameter-golf #1767",
        role="pack",
        low=0,
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_beta1: float = knob(
        0.0,
        "Momentum of AdamW in a document's LoRA.",
        source="parameter-golf #1855",
        role="pack",
        low=0,
        high=0.9999,
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_beta2: float = knob(
        0.99,
        "Momentum of AdamW's squared gradients there.",
        source="parameter-golf #1855",
        role="pack",
        low=0,
        high=0.9999,
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_weight_decay: float = knob(
        0.5,
        "Weight decay of AdamW there, times the learning rate.",
        source="parameter-golf #1855",
        role="pack",
        low=0,
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_warm_start_a: bool = knob(
        True,
        "Let A begin later documents at the mean of those before: it moves after the first TTT_BATCH_SIZE "
        "documents, after 4 times as many, 16 times ...; 0 = it begins each as random as the first.",
        source="parameter-golf #1767",
        role="pack",
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_q_lora: bool = knob(
        True,
        "A LoRA beside the queries' matrix.",
        source="parameter-golf #2014",
        role="pack",
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_k_lora: bool = knob(
        True,
        "A LoRA beside the keys' matrix.",
        source="parameter-golf #2135",
        role="pack",
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_v_lora: bool = knob(
        True,
        "A LoRA beside the values' matrix.",
        source="parameter-golf #2014",
        role="pack",
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_o_lora: bool = knob(
        True,
        "A LoRA from the input of the attention to its output.",
        source="parameter-golf #1855",
        role="pack",
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_mlp_lora: bool = knob(
        True,
        "A LoRA from the input of the MLP to its output.",
        source="parameter-golf #1855",
        role="pack",
        needs="TTT_BATCH_SIZE!=0",
    )
    ttt_head_lora: bool = knob(
        True,
        "A LoRA beside the head.",
        source="parameter-golf #1855",
        role="pack",
        needs="TTT_BATCH_SIZE!=0",
    )
    phased_ttt_prefix_docs: int = knob(
        0,
        "Documents at the beginning of the text after which, once they have their scores, all weights have "
        "trained on them by SGD: the end of the last of PHASED_TTT_NUM_PHASES phases; 0 = no phases.",
        source="parameter-golf #1610, #1855",
        role="pack",
        low=0,
        needs="TTT_BATCH_SIZE!=0",
    )
    phased_ttt_num_phases: int = knob(
        1,
        "Phases, at equal shares of PHASED_TTT_PREFIX_DOCS; each goes once over all documents before it.",
        source="parameter-golf #1626, #1855",
        role="pack",
        low=1,
        needs="PHASED_TTT_PREFIX_DOCS!=0",
    )
    global_ttt_lr: float = knob(
        0.001,
        "Learning rate at the beginning of a phase; it falls along a half cosine. SGD has momentum 0.9.",
        source="parameter-golf #1855",
        role="pack",
        low=0,
        needs="PHASED_TTT_PREFIX_DOCS!=0",
    )
    global_ttt_chunk_tokens: int = knob(
        32_768,
        "Targets of a phase's step, at most: whole windows of TRAIN_SEQ_LEN that read one document each.",
        source="parameter-golf #1855",
        role="pack",
        low=1,
        needs="PHASED_TTT_PREFIX_DOCS!=0",
    )
    global_ttt_grad_clip: float = knob(
        1.0,
        "Norm that the gradient of a phase's step is cut to; 0 = none.",
        source="parameter-golf #1855",
        role="pack",
        low=0,
        needs="PHASED_TTT_PREFIX_DOCS!=0",
    )
    score_dump: str = knob(
        "",
        "Path of an .npz file that receives each target's position, bytes and log-probability by every "
        "score; empty = none.",
        source="ours",
        role="place",
    )
    score_check: bool = knob(
        False,
        "Try every score against the four conditions of a legal one (parameter-golf #1017) before any is "
        "made, for about a minute in all, and exit with 7 if one breaks them; 0 = do not try.",
        source="ours",
        role="place",
    )

    @property
    def eval_length(self) -> int:
        """Tokens that a sliding window reads."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def ttt_length(self) -> int:
        """Most tokens that the window of a document's chunk reads."""
        return self.ttt_eval_seq_len or self.eval_length

    def check(self) -> None:
        """RunError if windows would leave gaps between them, or a document's LoRA has no place."""
        if self.eval_stride > self.eval_length:
            raise RunError(
                f"EVAL_STRIDE={self.eval_stride} is longer than its window of {self.eval_length} tokens; "
                "set EVAL_SEQ_LEN"
            )
        if self.ttt_batch_size and self.ttt_chunk_size > self.ttt_length:
            raise RunError(
                f"TTT_CHUNK_SIZE={self.ttt_chunk_size} is longer than its window of {self.ttt_length} "
                "tokens; set TTT_EVAL_SEQ_LEN"
            )
        if self.ttt_batch_size and not lora_places(self):
            raise RunError(
                "TTT_BATCH_SIZE needs a place for its LoRA: set one of "
                + " ".join(f"TTT_{place.upper()}_LORA=1" for place in LORA_PLACES)
            )


def lora_places(cfg: ScoreKnobs) -> list[str]:
    """Where each document has a LoRA of its own: the names of `Adapters`."""
    is_wanted = dict(
        q=cfg.ttt_q_lora,
        k=cfg.ttt_k_lora,
        v=cfg.ttt_v_lora,
        o=cfg.ttt_o_lora,
        mlp=cfg.ttt_mlp_lora,
        head=cfg.ttt_head_lora,
    )
    return [place for place, wanted in is_wanted.items() if wanted]


@dataclass(frozen=True)
class Score:
    """What a model needs for the validation text, or for a part of it. Checkpoints store the fields."""

    nats: float  # of all scored targets, on all ranks
    tokens: int
    bytes: int
    seconds: float
    target_nats: Tensor | None = None  # [targets]: of what this rank scored, 0 elsewhere
    unscored: int = 0  # targets that the clock left without a score: then this is a partial one
    hint_nats: Tensor | None = None  # [targets]: of the tilt's hints, where it is switched on

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of the text. This is the only place where nats become bits."""
        return self.nats / NATS_PER_BIT / self.bytes

    @property
    def text(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f}"


# -- The plan: which windows are scored in which turn, on which rank -------------------------------------


class Window(NamedTuple):
    """Tokens start .. stop-1, which the model reads at once to score the targets first .. stop-1."""

    start: int
    first: int
    stop: int


class Chunk(NamedTuple):
    """Targets first .. stop-1, which all have their scores and may now be learnt from."""

    first: int
    stop: int
    ends_text: bool  # the document, or all text, ends with it, so that nothing can profit from it


class PassShape(NamedTuple):
    """The shape of a pass through the model; for each shape a graph is compiled."""

    batch: int  # windows
    length: int  # tokens that each window reads
    width: int  # targets that each window scores, the last ones of what it reads
    slides: bool = False  # whether the model is told which positions these are; else it scores all it reads

    @property
    def tokens(self) -> int:
        """Tokens that a pass reads, padding included: about what it costs."""
        return self.batch * self.length


@dataclass(frozen=True)
class ScoreTurn:
    """What a rank does in one turn: score these windows, then learn with all ranks from the chunk, if any."""

    shape: PassShape
    windows: list[Window]
    chunk: Chunk | None = None


def pass_shape(cfg: Config, device: torch.device, stride: int, learns: bool = False) -> PassShape:
    """Choose the shape of a pass, the same at any world size. stride 0 stands for the official windows; a
    score that learns takes no more windows at once than a chunk of TTT_CHUNK_TOKENS holds."""
    if stride:
        batch = cfg.eval_batch_seqs
        length = cfg.eval_length
        width = stride
    else:
        batch = pass_tokens(cfg, device) // cfg.train_seq_len
        length = cfg.train_seq_len
        width = cfg.train_seq_len
    if learns:
        batch = min(batch, cfg.ttt_chunk_tokens // width)
    return PassShape(max(1, batch), length, width, stride > 0)


def pass_tokens(cfg: Config, device: torch.device) -> int:
    """Most tokens of a pass of official or whole-document windows."""
    is_cpu = device.type == "cpu"
    most = CPU_PASS_TOKENS * torch.get_num_threads() if is_cpu else GPU_PASS_TOKENS
    return min(cfg.val_batch_size // 8, most)


def pass_lengths(longest: int) -> list[int]:
    """The lengths that windows of up to `longest` tokens are padded to, the shortest first.

    Each is a graph to compile. A pass is longer than its window by an eighth on average, at most a half.
    """
    lengths = [int(share * longest) for share in PASS_SHARES]
    return [length for length in lengths if length >= SHORTEST_PASS] or [longest]


def isolated_shapes(cfg: Config, device: torch.device) -> list[PassShape]:
    """The shapes of EVAL_DOC_ISOLATED: whole windows from a document's beginning, and the one that slides."""
    shapes = []
    for length in pass_lengths(cfg.eval_length):
        shapes.append(PassShape(max(1, pass_tokens(cfg, device) // length), length, length))
    if 0 < cfg.eval_stride < cfg.eval_length:
        shapes.append(pass_shape(cfg, device, cfg.eval_stride))
    return shapes


def plan_windows(targets: int, length: int, stride: int, begin: int = 0) -> list[Window]:
    """Cut the targets begin .. targets-1 into windows that score each of them once.

    A window scores `stride` targets, the last of its at most `length` tokens, and reads no token before
    `begin`. With stride = length they are the official windows and their tail.
    The last window stands as if the text went on. It could begin earlier by what its stride lacks, but the
    context of its targets would then hang on where the text ends, which no target may know.
    """
    planned = []
    for first in range(begin, targets, stride):
        start = max(begin, first + stride - length)
        stop = min(first + stride, targets)
        planned.append(Window(start, first, stop))
    return planned


def isolated_windows(begin: int, end: int, length: int, stride: int) -> list[Window]:
    """Cut the targets begin .. end-1, a document, into windows that score each of them once.

    The first scores all of its up to `length` targets, each later one `stride`, the last ones of `length`
    tokens. As in `plan_windows`, no target's context hangs on where the document ends.
    """
    planned = [Window(begin, begin, min(begin + length, end))]
    for first in range(begin + length, end, stride):
        planned.append(Window(first + stride - length, first, min(first + stride, end)))
    return planned


def share_windows(windows: list[Window], runtime: Runtime, shape: PassShape) -> list[ScoreTurn]:
    """Give this rank its contiguous share of the windows, one pass a turn. Every rank has as many turns as
    the busiest one, so that all meet at the end of each; its last ones may have no window."""
    rank_windows = [windows[i] for i in runtime.share(len(windows))]
    busiest = -(-len(windows) // runtime.world_size)
    starts = range(0, busiest, shape.batch)
    return [ScoreTurn(shape, rank_windows[at : at + shape.batch]) for at in starts]


def plan_isolated_turns(cfg: Config, data: Validation, runtime: Runtime) -> list[ScoreTurn]:
    """Plan the turns of EVAL_DOC_ISOLATED on this rank; every rank has as many, of the same shapes.

    Windows of like length share a pass, so that little of it is padding; no score hangs on the order.
    """
    shapes = isolated_shapes(cfg, runtime.device)
    windows_of = {shape: [] for shape in shapes}
    for begin, end in data.spans:
        for window in isolated_windows(begin, end, cfg.eval_length, cfg.eval_stride or cfg.eval_length):
            slides = window.start < window.first
            fitting = [s for s in shapes if s.slides == slides and window.stop - window.start <= s.length]
            windows_of[fitting[0]].append(window)
    planned = []
    for shape, windows in windows_of.items():
        planned += share_windows(windows, runtime, shape)
    return planned


def plan_turns(cfg: Config, data: Validation, runtime: Runtime, stride: int, learns: bool) -> list[ScoreTurn]:
    """Plan all turns of a score on this rank; every rank has as many.

    A score that learns takes the text chunk by chunk, and the last turn of each chunk names it; with
    TTT_RESET no chunk and no window crosses the border between two documents.
    """
    shape = pass_shape(cfg, runtime.device, stride, learns)
    planned = []
    for begin, end in data.spans if learns and cfg.ttt_reset else [(0, data.targets)]:
        windows = plan_windows(end, shape.length, shape.width, begin)
        chunk_size = max(1, cfg.ttt_chunk_tokens // shape.width) if learns else len(windows)
        for at in range(0, len(windows), chunk_size):
            chunk_windows = windows[at : at + chunk_size]
            turns = share_windows(chunk_windows, runtime, shape)
            if learns:
                stop = chunk_windows[-1].stop
                chunk = Chunk(chunk_windows[0].first, stop, ends_text=stop == end)
                turns[-1] = replace(turns[-1], chunk=chunk)
            planned += turns
    return planned


@dataclass(frozen=True)
class DocumentTurn(ScoreTurn):
    """A turn of TTT_BATCH_SIZE: the next chunk of each document of a group, the longest documents first."""

    begins: bool = False  # the group
    learning: int = 0  # the first so many documents go on after this chunk, and learn from it before


def document_shapes(cfg: Config) -> list[PassShape]:
    """The shapes of TTT_BATCH_SIZE, the smallest first. Where windows are whole and few documents of a group
    are left, passes of a sixteenth and a quarter of its rows: a long document alone would fill 64."""
    width = cfg.ttt_chunk_size
    *shorter, longest = pass_lengths(cfg.ttt_length)
    sizes = [(cfg.ttt_batch_size, length) for length in shorter if length >= width]
    for rows in (cfg.ttt_batch_size // 16, cfg.ttt_batch_size // 4, cfg.ttt_batch_size):
        if rows >= FEWEST_ROWS or rows == cfg.ttt_batch_size:
            sizes.append((rows, longest))
    return [PassShape(rows, length, width, slides=True) for rows, length in sizes]


def document_turns(cfg: Config, group: list[tuple[int, int]]) -> list[DocumentTurn]:
    """The turns of one group of documents, (first target, end) each, the longest first.

    A chunk has TTT_CHUNK_SIZE targets and stands where it would if its document went on. A window reads up
    to TTT_EVAL_SEQ_LEN tokens and ends with its chunk.
    """
    width = cfg.ttt_chunk_size
    longest = group[0][1] - group[0][0]
    planned = []
    for offset in range(0, longest, width):
        reach = min(offset + width, cfg.ttt_length)
        rows = sum(begin + offset < end for begin, end in group)
        fitting = [shape for shape in document_shapes(cfg) if shape.length >= reach and shape.batch >= rows]
        windows = []
        learning = 0
        for begin, end in group:
            stop = begin + offset + width
            if begin + offset < end:
                windows.append(Window(stop - reach, begin + offset, min(stop, end)))
            if stop < end:
                learning += 1
        planned.append(DocumentTurn(fitting[0], windows, begins=offset == 0, learning=learning))
    return planned


def share_groups(turns_of_groups: list[list[DocumentTurn]], ranks: int) -> list[list[DocumentTurn]]:
    """All turns of each rank: the longest group goes to the rank that has the least so far, and so on. It
    depends on the lengths alone, and no score depends on it."""
    shares = [[] for _ in range(ranks)]
    costs = [0] * ranks
    for turns in sorted(turns_of_groups, key=len, reverse=True):
        chosen = costs.index(min(costs))
        shares[chosen] += turns
        costs[chosen] += sum(turn.shape.tokens for turn in turns)
    return shares


def plan_document_turns(cfg: Config, data: Validation, runtime: Runtime) -> list[DocumentTurn]:
    """Plan all turns of TTT_BATCH_SIZE on this rank; every rank has as many.

    The documents come in blocks of the file's order. With a warm A they end after the first TTT_BATCH_SIZE
    documents, then each time after four times as many; and one ends where PHASED_TTT_PREFIX_DOCS has a phase.
    A block's last turn names it as a chunk: what it taught begins the next one, and so tells of earlier
    documents alone. Within a block documents of like length share a group; none learns from another, so
    their order there changes no score.
    """
    spans = data.spans
    edges = {0, *phase_edges(cfg)}
    edge = cfg.ttt_batch_size
    while cfg.ttt_warm_start_a and edge < len(spans):
        edges.add(edge)
        edge *= 4
    edges = sorted(edge for edge in edges if edge < len(spans))
    planned = []
    for low, high in itertools.pairwise([*edges, len(spans)]):
        documents = sorted(spans[low:high], key=document_length, reverse=True)
        groups = [documents[at : at + cfg.ttt_batch_size] for at in range(0, high - low, cfg.ttt_batch_size)]
        shares = share_groups([document_turns(cfg, group) for group in groups], runtime.world_size)
        turns = shares[runtime.rank]
        for _ in range(max(map(len, shares)) - len(turns)):
            turns.append(DocumentTurn(turns[-1].shape if turns else shares[0][0].shape, []))
        block = Chunk(spans[low][0], spans[high - 1][1], ends_text=high == len(spans))
        turns[-1] = replace(turns[-1], chunk=block)
        planned += turns
    return planned


def document_length(span: tuple[int, int]) -> int:
    """Targets of a document, (first target, end)."""
    return span[1] - span[0]


def phase_edges(cfg: Config) -> list[int]:
    """How many documents have their scores when each phase of PHASED_TTT_PREFIX_DOCS trains. None hangs on
    how many there are in all: a text too short for a phase has none."""
    shares = range(1, cfg.phased_ttt_num_phases + 1)
    edges = [cfg.phased_ttt_prefix_docs * share // cfg.phased_ttt_num_phases for share in shares]
    return [edge for edge in dict.fromkeys(edges) if edge]


def phase_shape(cfg: Config, runtime: Runtime) -> PassShape:
    """The shape of a phase's passes: about this rank's share of a step."""
    tokens = min(pass_tokens(cfg, runtime.device), cfg.global_ttt_chunk_tokens // runtime.world_size)
    return PassShape(max(1, tokens // cfg.train_seq_len), cfg.train_seq_len, cfg.train_seq_len)


def phase_steps(cfg: Config, spans: list[tuple[int, int]]) -> list[list[Window]]:
    """The windows of each step of a phase over these documents: as training has them, each within one
    document, in the order of the text, as many as GLOBAL_TTT_CHUNK_TOKENS targets hold, but at least one."""
    steps = []
    room = 0
    for begin, end in spans:
        for window in plan_windows(end, cfg.train_seq_len, cfg.train_seq_len, begin):
            count = window.stop - window.first
            if count > room:
                steps.append([])
                room = max(count, cfg.global_ttt_chunk_tokens)
            steps[-1].append(window)
            room -= count
    return steps


# -- The pass: windows -> nats ---------------------------------------------------------------------------


class PaddedWindows(NamedTuple):
    """Windows as tensors of one PassShape."""

    ids: Tensor  # [batch, length] int64: the tokens that are read
    targets: Tensor  # [batch, width] int64
    positions: Tensor  # [batch, width] int64: each target's place in its row of ids
    is_scored: Tensor  # [batch, width] bool: false where there is only padding
    hints: Tensor  # [batch, width] int64: ids that the tilt hints at, 0 where it has none


def pad_windows(
    data: Validation, windows: list[Window], shape: PassShape, device: torch.device
) -> PaddedWindows:
    """Fill windows into tensors of the shape, at most shape.batch of them. All padding is on the right,
    where causal attention lets no scored position see it."""
    ids = np.zeros((shape.batch, shape.length), np.int64)
    targets = np.zeros((shape.batch, shape.width), np.int64)
    positions = np.zeros((shape.batch, shape.width), np.int64)
    is_scored = np.zeros((shape.batch, shape.width), np.bool_)
    hints = np.zeros((shape.batch, shape.width), np.int64)
    for row, window in enumerate(windows):
        count = window.stop - window.first
        ids[row, : window.stop - window.start] = data.tokens[window.start : window.stop]
        targets[row, :count] = data.tokens[window.first + 1 : window.stop + 1]
        positions[row] = window.first - window.start + np.arange(shape.width)
        is_scored[row, :count] = True
        if data.hints is not None:
            hints[row, :count] = data.hints[window.first : window.stop].clip(0)
    arrays = (ids, targets, positions, is_scored, hints)
    return PaddedWindows(*[torch.from_numpy(array).to(device) for array in arrays])


def window_nats(
    nats_of: Callable[..., Tensor], padded: PaddedWindows, slides: bool, has_hints: bool
) -> list[Tensor]:
    """Nats [batch, width] of all targets, and with the tilt a second tensor: those of its hints."""
    if has_hints:
        targets = torch.cat((padded.targets, padded.hints), 1)
        positions = torch.cat((padded.positions, padded.positions), 1)
        return list(nats_of(padded.ids, targets, positions).chunk(2, 1))
    if slides:
        return [nats_of(padded.ids, padded.targets, padded.positions)]
    # Windows that score all that they read: the model needs no positions.
    return [nats_of(padded.ids, padded.targets)]


def scored_nats(nats: list[Tensor], padded: PaddedWindows) -> Tensor:
    """What `window_nats` gives, without the padding: float64 [scored] or, with hints after all targets,
    [2 * scored], on the CPU, window by window."""
    return torch.cat([some.detach()[padded.is_scored] for some in nats]).cpu().double()


@torch.no_grad()
def score_windows(
    nats_of: Callable[..., Tensor], data: Validation, turn: ScoreTurn, device: torch.device
) -> Tensor:
    """Nats of the targets of a turn's windows, as `scored_nats` gives them."""
    padded = pad_windows(data, turn.windows, turn.shape, device)
    return scored_nats(window_nats(nats_of, padded, turn.shape.slides, data.hints is not None), padded)


def evaluate(
    cfg: Config,
    nats_of: Callable[..., Tensor],
    data: Validation,
    runtime: Runtime,
    stride: int = 0,
    limit: float = math.inf,
    announce: Callable[[float], None] | None = None,
    learn: Callable[[Chunk], None] | None = None,
    watch: Callable[[float, float], None] | None = None,
    isolated: bool = False,
) -> Score:
    """Score the validation text, its windows shared out over the ranks; all ranks call it together.

    nats_of: gives the nats of targets, as token_nats does.
    stride: 0 for the official windows, else sliding ones move on by so many targets.
    isolated: score each document by itself instead.
    The rest is as in `take_turns`.
    """
    if isolated:
        turns = plan_isolated_turns(cfg, data, runtime)
    else:
        turns = plan_turns(cfg, data, runtime, stride, learn is not None)
    score_turn = partial(score_windows, nats_of, data, device=runtime.device)
    return take_turns(turns, score_turn, data, runtime, limit, announce, learn, watch)


def take_turns(
    turns: list[ScoreTurn],
    score_turn: Callable[[ScoreTurn], Tensor],
    data: Validation,
    runtime: Runtime,
    limit: float = math.inf,
    announce: Callable[[float], None] | None = None,
    learn: Callable[[Chunk], None] | None = None,
    watch: Callable[[float, float], None] | None = None,
    spent: float = 0.0,
) -> Score:
    """Score this rank's turns and add up what all ranks have scored.

    score_turn: gives the nats of the turn's targets, as `scored_nats` does.
    limit: seconds by rank 0's clock. No turn starts that would pass them: then the score is a partial one.
    announce(seconds): is told early how long all turns will take, if there is a limit.
    learn(chunk): is called when all targets of a chunk have their scores.
    watch(share, seconds): is told after each turn what share of them is done, and since when.
    spent: seconds that the score took before it was cut off; they count.
    Raises RunError (5) if the nats are not finite.
    """
    began = time.perf_counter() - spent
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens and bytes that this rank has scored
    target_nats = torch.zeros(data.targets)
    hint_nats = None if data.hints is None else torch.zeros(data.targets)
    all_cost = sum(turn.shape.tokens for turn in turns)
    done_cost = 0
    is_cut = False
    for done, turn in enumerate(turns):
        cost = done_cost + turn.shape.tokens
        # The first turn always runs: of nothing there is no partial score.
        if limit < math.inf and done:
            so_far = time.perf_counter() - began
            seconds = runtime.main_number(so_far * cost / done_cost)  # when this turn will be over
            if announce and done == max(3, len(turns) // 8):
                announce(seconds * all_cost / cost)
            is_cut = seconds > limit
            if is_cut:
                break
        done_cost = cost
        if turn.windows:
            scored = np.concatenate([np.arange(window.first, window.stop) for window in turn.windows])
            scored_bytes = int(data.target_bytes[scored].sum(dtype=np.int64))
            nats, *hinted = score_turn(turn).split(len(scored))
            target_nats[scored] = nats.float()
            if hinted:
                hint_nats[scored] = hinted[0].float()
            totals += torch.tensor((nats.sum().item(), len(nats), scored_bytes), dtype=torch.float64)
        if turn.chunk:
            learn(turn.chunk)
        if watch:
            watch(done_cost / all_cost, time.perf_counter() - began)
    nats, tokens, size = runtime.sum(totals).tolist()
    if tokens != data.targets and not is_cut:
        raise RunError(f"a bug: {tokens:.0f} of {data.targets} targets have a score")
    if not math.isfinite(nats):
        raise RunError("diverged: validation loss is not finite; lower learning rates", DIVERGED)
    seconds = time.perf_counter() - began
    return Score(nats, int(tokens), int(size), seconds, target_nats, int(data.targets - tokens), hint_nats)


class TestTimeTraining:
    """Gradient steps on targets whose scores are final (score first: parameter-golf #461, #549).

    They move all weights W or, with TTT_LORA_RANK = r, only low-rank factors of the blocks' matrices, which
    become W + B A with A [r, in] and B [out, r] (LoRA, arXiv 2106.09685). The model computes with the sum
    written into W, so the factors' gradients follow from that of W: dA = B^T dW and dB = dW A^T.
    """

    def __init__(self, run: Run):
        self.run = run
        trains_all = not run.cfg.ttt_lora_rank
        weights = weights_of(run.cfg, run.model)
        self.params = [weight.param for weight in weights if trains_all or weight.role == "matrix"]
        self.packed_weights = [param.detach().clone() for param in self.params]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the packed weights, without gradients, with new factors and a new optimiser."""
        cfg = self.run.cfg
        torch._foreach_copy_(self.params, self.packed_weights)
        self.run.model.zero_grad()
        self.factors = self.new_factors() if cfg.ttt_lora_rank else []  # (A, B) of each parameter, or none
        self.trained = list(itertools.chain.from_iterable(self.factors)) or self.params
        self.optimiser = TTT_OPTIMISERS[cfg.ttt_optimizer](self.trained, lr=cfg.ttt_lr)
        self.chunks = 0  # that it has learnt from

    def new_factors(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each matrix: A random by SEED, B zero, so that their product is zero."""
        rank = self.run.cfg.ttt_lora_rank
        rng = torch.Generator().manual_seed(self.run.cfg.seed)
        factors = []
        for param in self.params:
            a = torch.randn(rank, param.size(1), generator=rng) / param.size(1) ** 0.5
            b = torch.zeros(len(param), rank, device=param.device)
            factors.append((a.to(param.device), b))
        return factors

    def learn(self, chunk: Chunk) -> None:
        """Take TTT_STEPS steps on the mean nats of the chunk's targets, or reset where its text ends. All
        ranks call it together, each with its share of the chunk's windows."""
        if chunk.ends_text:
            self.reset()
            return
        cfg = self.run.cfg
        # Steps are taken on the windows that training has, which do not overlap, however it is scored.
        windows = plan_windows(chunk.stop, cfg.train_seq_len, cfg.train_seq_len, chunk.first)
        rank_windows = [windows[i] for i in self.run.runtime.share(len(windows))]
        if cfg.ttt_cosine_chunks:
            progress = min(1.0, self.chunks / cfg.ttt_cosine_chunks)
            self.optimiser.param_groups[0]["lr"] = cfg.ttt_lr / 2 * (1 + math.cos(math.pi * progress))
        self.chunks += 1
        shape = pass_shape(cfg, self.run.runtime.device, 0, learns=True)
        for _ in range(cfg.ttt_steps):
            fill_gradients(self.run, self.params, rank_windows, shape, chunk.stop - chunk.first)
            if self.factors:
                self.fill_factor_gradients()
            if cfg.ttt_grad_clip:
                nn.utils.clip_grad_norm_(self.trained, cfg.ttt_grad_clip)
            self.optimiser.step()
            if self.factors:
                self.write_products()

    def fill_factor_gradients(self) -> None:
        """dA = B^T dW, dB = dW A^T."""
        for param, (a, b) in zip(self.params, self.factors, strict=True):
            a.grad = b.mT @ param.grad
            b.grad = param.grad @ a.mT

    def write_products(self) -> None:
        """Put W + B A into the model."""
        for param, packed, (a, b) in zip(self.params, self.packed_weights, self.factors, strict=True):
            param.data.copy_(packed + b @ a)


def fill_gradients(
    run: Run, params: list[Tensor], rank_windows: list[Window], shape: PassShape, step_targets: int
) -> None:
    """Set each parameter's gradient to that of the mean nats of a step's targets, summed over the ranks."""
    for param in params:
        param.grad = torch.zeros_like(param)
    for at in range(0, len(rank_windows), shape.batch):
        padded = pad_windows(run.data, rank_windows[at : at + shape.batch], shape, run.runtime.device)
        nats = run.nats(padded.ids, padded.targets)
        loss = (nats * padded.is_scored).sum().div(step_targets)
        loss.backward(inputs=params)
    for param in params:
        run.runtime.sum(param.grad)


class DocumentLora:
    """A LoRA for each document of a group, trained by AdamW on the chunks that have their scores (#1855).

    Place p of layer l adds alpha/r B A x to what the layer makes of x. Each document begins with the same A
    and with B = 0, and learns from itself alone. A begins random by SEED; with TTT_WARM_START_A it moves
    after each block by the mean of what the block's documents made of it, weighed by the steps they took.
    Published code keeps A from one group to the next on each GPU, so that a score depends on which GPU was
    free first, and takes the longest documents first, an order that nobody can read the text in.
    """

    def __init__(self, run: Run):
        self.run = run
        rng = torch.Generator().manual_seed(run.cfg.seed)
        rank = run.cfg.ttt_lora_rank
        self.sizes = adapter_sizes(run.cfg, run.model)
        self.first_a = {}  # (layer, place): A [r, in] that documents begin with
        for key, (inputs, _) in self.sizes.items():
            bound = inputs**-0.5
            a = torch.rand(rank, inputs, generator=rng) * (2 * bound) - bound
            self.first_a[key] = a.to(run.runtime.device)
        self.forget_block()

    def forget_block(self) -> None:
        """Begin a block: no document has taken a step."""
        self.moves = {key: torch.zeros_like(a) for key, a in self.first_a.items()}
        self.steps = torch.zeros(1)

    def learnt(self) -> tuple[dict[tuple[int, str], Tensor], Tensor]:
        """(moves, steps) of the block so far, copied to the CPU."""
        return {key: move.to("cpu", copy=True) for key, move in self.moves.items()}, self.steps.clone()

    def take_up(self, first_a: Mapping, learnt: tuple[Mapping, Tensor]) -> None:
        """Stand where another stood: its A, and what `learnt` gave there."""
        device = self.run.runtime.device
        moves, self.steps = learnt
        self.first_a = {key: a.to(device) for key, a in first_a.items()}
        self.moves = {key: move.to(device) for key, move in moves.items()}

    def begin_group(self, rows: int) -> None:
        """Give each document of the next group its A and B, and a new optimiser."""
        self.factors = {}
        for key, a in self.first_a.items():
            many_a = a.expand(rows, -1, -1).clone()
            many_b = a.new_zeros(rows, self.sizes[key][1], len(a))
            self.factors[key] = (many_a.requires_grad_(), many_b.requires_grad_())
        self.make_optimiser()
        self.rows = rows
        self.group_steps = 0

    def keep_rows(self, rows: int) -> None:
        """Go on with the group's first documents alone, their factors and moments as they are."""
        earlier_factors = self.factors
        earlier_moments = self.optimiser.state
        self.factors = {}
        for key, pair in earlier_factors.items():
            self.factors[key] = tuple(factor.detach()[:rows].clone().requires_grad_() for factor in pair)
        self.make_optimiser()
        self.rows = rows
        for key, pair in earlier_factors.items():
            for earlier, factor in zip(pair, self.factors[key], strict=True):
                for name, moment in earlier_moments[earlier].items():
                    self.optimiser.state[factor][name] = moment[:rows].clone() if moment.ndim else moment

    def make_optimiser(self) -> None:
        """A new AdamW of all factors."""
        cfg = self.run.cfg
        self.optimiser = torch.optim.AdamW(
            itertools.chain.from_iterable(self.factors.values()),
            lr=cfg.ttt_lr,
            betas=(cfg.ttt_beta1, cfg.ttt_beta2),
            eps=1e-10,
            weight_decay=cfg.ttt_weight_decay,
        )

    def adapters(self) -> list[Adapters]:
        """What the model adds to each layer of its plan and to the head."""
        cfg = self.run.cfg
        layers = [{} for _ in range(len(self.run.model.plans[-1]) + 1)]
        for (layer, place), (a, b) in self.factors.items():
            layers[layer][place] = (a, cfg.ttt_lora_alpha / cfg.ttt_lora_rank * b)
        return layers

    def score(self, turn: DocumentTurn) -> Tensor:
        """Nats of the turn's targets, as `scored_nats` gives them; then the documents that go on learn from
        their chunks, TTT_STEPS steps on the mean nats of each.

        The first step takes the gradient of the very pass that made the score.
        """
        if turn.begins:
            self.begin_group(turn.shape.batch)
        elif turn.shape.batch < self.rows:
            self.keep_rows(turn.shape.batch)
        run = self.run
        padded = pad_windows(run.data, turn.windows, turn.shape, run.runtime.device)
        for step in range(run.cfg.ttt_steps):
            with frozen_weights(run.model):
                nats_of = partial(run.document_nats, adapters=self.adapters())
                nats, *hinted = window_nats(
                    nats_of, padded, slides=True, has_hints=run.data.hints is not None
                )
            if step == 0:
                scored = scored_nats([nats, *hinted], padded)
                self.note_finished(turn.learning, len(turn.windows))
            if not turn.learning:
                break
            self.optimiser.zero_grad()
            trained = self.optimiser.param_groups[0]["params"]
            nats[: turn.learning].mean(1).sum().backward(inputs=trained)
            self.optimiser.step()
            self.group_steps += 1
        return scored

    @torch.no_grad()
    def note_finished(self, first: int, stop: int) -> None:
        """Keep what documents first .. stop-1 of the group made of A: they have their last scores. What the
        optimiser does to their factors from now on is seen by nobody."""
        for key, (a, _) in self.factors.items():
            self.moves[key] += self.group_steps * (a[first:stop] - self.first_a[key]).sum(0)
        self.steps += self.group_steps * (stop - first)

    @torch.no_grad()
    def learn(self, block: Chunk) -> None:
        """Move the A that the next block's documents begin with. All ranks call it together."""
        if self.run.cfg.ttt_warm_start_a and not block.ends_text:
            steps = self.run.runtime.sum(self.steps.double()).item()
            for key, move in self.moves.items():
                self.first_a[key] += self.run.runtime.sum(move) / max(1.0, steps)
        self.forget_block()


class WeightPhases:
    """Phases of SGD on all weights over the documents that have their scores (#1610, #1855).

    A phase goes once over all documents before it, in the order of the file, so that later ones are scored
    by weights that tell of earlier ones alone. Published code takes the longest documents first: there the
    phases learn from documents that stand later in the file.
    """

    def __init__(self, run: Run):
        self.run = run
        self.params = list(run.model.parameters())
        self.packed_weights = [param.detach().clone() for param in self.params]

    def learn(self, block: Chunk) -> None:
        """Train if a phase ends with this block; have the packed weights again where the text ends. All ranks
        call it together."""
        spans = self.run.data.spans
        if block.ends_text:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.packed_weights)
            self.run.model.zero_grad()
        for edge in phase_edges(self.run.cfg):
            if edge < len(spans) and block.stop == spans[edge][0]:
                self.train(spans[:edge])

    def train(self, spans: list[tuple[int, int]]) -> None:
        """One epoch over these documents by an optimiser of its own."""
        cfg = self.run.cfg
        runtime = self.run.runtime
        optimiser = sgd_with_momentum(self.params, cfg.global_ttt_lr)
        steps = phase_steps(cfg, spans)
        for number, windows in enumerate(steps):
            rank_windows = [windows[i] for i in runtime.share(len(windows))]
            targets = sum(window.stop - window.first for window in windows)
            fill_gradients(self.run, self.params, rank_windows, phase_shape(cfg, runtime), targets)
            if cfg.global_ttt_grad_clip:
                nn.utils.clip_grad_norm_(self.params, cfg.global_ttt_grad_clip)
            progress = number / len(steps)
            optimiser.param_groups[0]["lr"] = cfg.global_ttt_lr / 2 * (1 + math.cos(math.pi * progress))
            optimiser.step()


class DocumentScore:
    """The score by TTT_BATCH_SIZE; with CHECKPOINT_SECONDS it is kept on the way, between groups.

    Kept are the nats of all whole groups and what each rank needs to begin its next one; all ranks are in the
    same block then. A score that goes on takes all turns again, but for whole groups it has the nats, and
    what their blocks taught: so the sums come in the same order, and no bit differs.
    """

    def __init__(self, run: Run):
        self.run = run
        self.lora = DocumentLora(run)
        self.phases = WeightPhases(run) if run.cfg.phased_ttt_prefix_docs else None
        self.done = 0  # turns
        # Of the targets in this rank's whole groups, and with the tilt of its hints.
        self.nats = torch.zeros(1 + (run.data.hints is not None), run.data.targets)
        self.group: list[tuple[np.ndarray, Tensor]] = []  # targets and nats of each turn of the group at hand
        # Where it was cut off: turns of this rank in whole groups, turns of all, seconds.
        self.whole = self.cut_off = 0
        self.kept_at = 0.0
        self.before = run.checkpoints.begun
        if self.before:
            self.go_on(self.before)
        self.mark_start(0)

    def go_on(self, before: Mapping) -> None:
        """Stand where the score was cut off; with another number of ranks, begin anew."""
        runtime = self.run.runtime
        ranks = len(before["ranks"])
        if ranks != runtime.world_size:
            self.run.log.line(f"ttt: begins anew, as it was begun by {ranks} ranks, not {runtime.world_size}")
            return
        self.whole, learnt = before["ranks"][runtime.rank]
        self.cut_off = before["done"]
        self.kept_at = before["seconds"]
        self.lora.take_up(before["first_a"], learnt)
        if self.phases:
            with torch.no_grad():
                torch._foreach_copy_(self.phases.params, before["weights"])
        self.run.log.line(f"ttt: goes on after {self.kept_at:.0f} s, turns:{self.cut_off}")

    def mark_start(self, turn: int) -> None:
        """Note that the groups before this turn are whole, and what the next one begins with."""
        if self.run.cfg.checkpoint_seconds:  # else nothing is kept
            for targets, nats in self.group:
                self.nats[:, targets] = nats.view(-1, len(targets)).float()
            self.start = turn, self.lora.learnt()
        self.group = []

    def score(self, limit: float, announce: Callable[[float], None]) -> Score:
        """Score all documents; as `take_turns`."""
        run = self.run
        turns = plan_document_turns(run.cfg, run.data, run.runtime)
        watched = (self.learn, self.watch, self.kept_at)
        return take_turns(turns, self.score_turn, run.data, run.runtime, limit, announce, *watched)

    def score_turn(self, turn: DocumentTurn) -> Tensor:
        """Nats of the turn's targets, as `scored_nats` gives them."""
        if turn.begins:
            self.mark_start(self.done)
        targets = np.concatenate([np.arange(window.first, window.stop) for window in turn.windows])
        if self.done < self.whole:
            nats = self.before["nats"][:, targets].double().flatten()
        else:
            nats = self.lora.score(turn)
        self.group.append((targets, nats))
        return nats

    def learn(self, block: Chunk) -> None:
        """Learn from a block, unless the checkpoint has what it taught."""
        if self.done >= self.cut_off:
            self.lora.learn(block)
            if self.phases:
                self.phases.learn(block)
        self.mark_start(self.done + 1)

    def watch(self, share: float, seconds: float) -> None:
        """After each turn: count it, say how long all take, and keep the score if it is time."""
        self.done += 1
        self.run.log.report_wait("scoring the validation text, learning from each document", share, seconds)
        every = self.run.cfg.checkpoint_seconds
        if every and share < 1 and self.done > self.cut_off:
            seconds = self.run.runtime.main_number(seconds)  # by one clock, since all ranks keep it together
            if seconds - self.kept_at >= every:
                self.kept_at = seconds
                self.keep()

    def keep(self) -> None:
        """Have rank 0 write a checkpoint of the score so far."""
        runtime = self.run.runtime
        begun = dict(
            done=self.done,
            seconds=self.kept_at,
            nats=runtime.sum(self.nats.clone()),
            ranks=runtime.gather(self.start),
            first_a={key: a.cpu() for key, a in self.lora.first_a.items()},
            weights=[param.detach().cpu() for param in self.phases.params] if self.phases else [],
        )
        runtime.on_main(partial(self.run.checkpoints.add_begun, begun, self.run.log))


@contextmanager
def frozen_weights(model: GPT) -> Iterator[None]:
    """Meanwhile no weight of the model has a gradient: compiled code would take them all."""
    trained = [param for param in model.parameters() if param.requires_grad]
    for param in trained:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)


def adapter_sizes(cfg: Config, model: GPT) -> dict[tuple[int, str], tuple[int, int]]:
    """{(layer of the plan, place): (inputs, outputs)} of each LoRA of a document; the head is the last."""
    width = cfg.model_dim
    key_width = cfg.num_kv_heads * cfg.head_dim
    outputs = dict(q=width, k=key_width, v=key_width, o=width, mlp=width)
    plan = model.plans[-1]
    sizes = {}
    for place in lora_places(cfg):
        if place == "head":
            sizes[len(plan), place] = (width, cfg.vocab_size)
            continue
        for number, layer in enumerate(plan):
            if layer.runs:
                sizes[number, place] = (width, outputs[place])
    return sizes


# ----------------------------------------------------------------------------------------------------------
# 13. HEDGE MIXER: the last score, mixed with n-grams of the text read so far
#
# The validation tokens and their nats by the neural model flow in, their nats by the mixture flow out, all on
# rank 0. `context_counts` counts exactly what followed each context before each token; `ngram_probabilities`
# makes probabilities of the counts; `gate_shares` learns on the way how much of them to take;
# `hedge_mixture` weighs that expert and the six of EXPERT_SHARES by how each has fared in like contexts.
# What a token is charged depends on earlier tokens only, and every expert is a true distribution.
# Memory: of 62 M tokens an int64 or float64 tensor takes half a GB, and the peak is 14 GiB
# (sweeps/results/study_hedge.md). So a large tensor is dropped at its last use, by `del` or because the
# function that holds it returns.
# The list of all scorers closes the section, since this is the last of them.
# ----------------------------------------------------------------------------------------------------------

EXPERT_SHARES = (
    0.0,
    0.05,
    0.15,
    0.4,
    0.7,
    0.95,
)  # of the n-gram in the fixed experts; the first is neural alone
NEURAL_LOG_PRIOR = 2.0  # the neural expert starts with e^2 times the weight of any other (PR #895)
DISCOUNT = 0.6  # taken off each n-gram count; best on English, 0.5 on code (sweeps/results/study_hedge.md)
# Targets that are mixed first, to foretell how long all take. Smaller samples foretell too little, since a
# CPU's caches hold them: 1.3 us a target between 25 and 100 K, 1.8 between these, 2.1 for 1.6 M of pydocs.
SAMPLE_TARGETS = (100_000, 400_000)
# Counts are kept as bytes: round(11.5 ln(1 + count)) is 8 for one, and 255 for 2^32.
COUNT_CODE_SCALE = 11.5
CODE_OF_ONE = 8
# The gate: a network with so many hidden units, that reads how the n-gram did over so many last tokens, and
# learns from blocks that grow from the first size to the last.
GATE_HIDDEN = 32
GATE_SPANS = (16, 256)
GATE_FIRST_BLOCK = 32
GATE_LAST_BLOCK = 4096


@dataclass(frozen=True)
class HedgeKnobs:
    """The Hedge mixer of neural model and n-grams."""

    use_hedge: bool = knob(
        False,
        "Add a score that mixes the last one with n-grams of the text read so far; 0 = no such score.",
        source="PR #895",
        effect="-0.49 bpb on a weak model and a repetitive text, 1 seed, records/benchmarks/cpu_hedge.json",
        role="pack",
    )
    hedge_eta: float = knob(
        0.1,
        "Learning rate of the mixer: an expert weighs exp(this * its log-likelihood in nats); 0 = the prior "
        "weights stay.",
        source="PR #895",
        role="pack",
        low=0,
        needs="USE_HEDGE=1",
    )
    hedge_order: int = knob(
        6,
        "Most tokens of context that the n-grams look at; 0 = they count single tokens only.",
        source="ours",
        effect="-0.002 bpb against 5, -0.001 against 8, on English, records/benchmarks/cpu_hedge_study.json",
        role="pack",
        low=0,
        high=99,
        needs="USE_HEDGE=1",
    )
    hedge_window: int = knob(
        1000,
        "Weigh the experts by their log-likelihood on this many last tokens of like context; 0 = on all.",
        source="ours",
        effect="-0.0006 to -0.002 bpb against 0, 4 models, records/benchmarks/cpu_hedge_study.json",
        role="pack",
        low=0,
        needs="USE_HEDGE=1",
    )
    hedge_document_order: int = knob(
        0,
        "Most tokens of context of n-grams that count one document alone; they are mixed in first, and the "
        "result with those of the whole text; 0 = none.",
        source="ours",
        role="pack",
        low=0,
        high=99,
        needs="USE_HEDGE=1",
    )
    ngram_tilt_enabled: bool = knob(
        False,
        "Add a score that tilts the last one towards the token that most often followed the last tokens, for "
        "comparison with USE_HEDGE, which mixes the score before the tilt; 0 = no such score.",
        source="parameter-golf #1514, #2135",
        role="pack",
    )
    token_order: int = knob(
        16,
        "Tokens of the tilt's n-gram: its context is one fewer.",
        source="parameter-golf #2135",
        role="pack",
        low=1,
        high=100,
        needs="NGRAM_TILT_ENABLED=1",
    )
    token_threshold: float = knob(
        0.8,
        "Share of the context's followers that the most frequent one must have made up for a tilt.",
        source="parameter-golf #2135",
        role="pack",
        low=0,
        high=1,
        needs="NGRAM_TILT_ENABLED=1",
    )
    token_boost: float = knob(
        2.625,
        "What the tilt adds to that token's logit.",
        source="parameter-golf #2135",
        role="pack",
        low=0,
        high=50,
        needs="NGRAM_TILT_ENABLED=1",
    )


WHOLE_TEXT = torch.zeros(1, dtype=torch.int64)  # where the document of each token begins, if it is one


# -- Exact counts and sums -------------------------------------------------------------------------------


class Groups(NamedTuple):
    """Where equal keys stand among M sorted ones; G groups of equals."""

    numbers: Tensor  # [M] int64: the number of each key's group, from 0
    sizes: Tensor  # [G] int64
    begins: Tensor  # [M] int64: where each key's group begins


def group_equal(sorted_keys: Tensor) -> Groups:
    """Find the groups of equals among sorted keys [M]."""
    _, numbers, sizes = torch.unique_consecutive(sorted_keys, return_inverse=True, return_counts=True)
    return Groups(numbers, sizes, begins=(sizes.cumsum(0) - sizes)[numbers])


def scatter(index: Tensor, values: Tensor) -> Tensor:
    """Undo a sort: the result has result[index] = values, for a permutation `index` [N]."""
    return torch.empty_like(values).index_copy_(0, index, values)


def exact_prefix_sums(x: Tensor) -> tuple[Tensor, float]:
    """Sums of the first 0 .. N of x [N], as int64 [N + 1], and the scale by which they are too large.

    The values are cut to +-128 and rounded to integers, whose sums are exact whatever their order; the scale
    is a power of two, small enough that no sum overflows.
    """
    scale = 2.0 ** (54 - len(x).bit_length())
    sums = (x.double().clamp(-128, 128) * scale).round().long()
    sums = sums.cumsum(0)
    return F.pad(sums, (1, 0)), scale


class ContextCounts(NamedTuple):
    """What is counted before each of M positions, whose contexts are the `order` tokens in front of them."""

    order: int
    positions: Tensor  # [M] int64: all positions whose context can recur, and perhaps more
    uses: Tensor  # [M] int64: how often the context came earlier
    followers: Tensor  # [M] int64: how many distinct tokens followed it then
    matches: Tensor  # [M] int64: how often the token at the position did
    by_context: Tensor  # [M] int64: their rows sorted by context, then by position
    context_begins: Tensor  # [M] int64: of each sorted row the first one of its context


def context_counts(
    tokens: Tensor, vocab: int, highest_order: int, begins: Tensor = WHOLE_TEXT
) -> Iterator[ContextCounts]:
    """Yield the exact counts for contexts of 0 .. highest_order tokens, by one stable sort an order.

    A gram is a context and the token that follows it. A stable sort brings equal grams together in the order
    of the text, so that a gram's rank among its equals is the number of earlier ones. A gram that ends at
    position i is the context of position i + 1 in the next order; if it stands there once only, that context
    cannot recur, and the position is dropped.
    tokens: int64 [T], below `vocab`. begins: int64 [T], where each token's document begins, if every document
    is to be counted by itself: its number is then the context of no token.
    """
    positions = torch.arange(len(tokens), device=tokens.device)
    context_numbers = begins.to(tokens.device).expand(len(tokens))
    uses = positions - context_numbers
    # Row r of the lists sorted by context, then by position, is row by_context[r] of the lists above; its
    # context begins at row context_begins[r].
    by_context = positions
    context_begins = context_numbers
    for order in range(highest_order + 1):
        keys = context_numbers * vocab + tokens[positions]  # below 2^43: 100 M contexts x 65,536 tokens
        keys, by_gram = torch.sort(keys, stable=True)
        grams = group_equal(keys)
        del keys
        matches = scatter(by_gram, torch.arange(len(by_gram), device=tokens.device) - grams.begins)
        followers = distinct_followers(matches, by_context, context_begins)
        yield ContextCounts(order, positions, uses, followers, matches, by_context, context_begins)
        del followers
        # The next order's lists: the position after each gram that stands more than once.
        recurs = scatter(by_gram, (grams.sizes > 1)[grams.numbers]) & (positions + 1 < len(tokens))
        rows = recurs.nonzero()[:, 0]
        positions = positions[rows] + 1
        uses = matches[rows]
        context_numbers = scatter(by_gram, grams.numbers)[rows]
        # The sort by gram is a sort by the next order's contexts: only the dropped rows have to go.
        new_rows = recurs.cumsum(0) - 1
        rows = recurs[by_gram].nonzero()[:, 0]
        by_context = new_rows[by_gram[rows]]
        context_begins = group_equal(grams.numbers[rows]).begins
        del by_gram, grams, matches, recurs, rows, new_rows


def distinct_followers(matches: Tensor, by_context: Tensor, context_begins: Tensor) -> Tensor:
    """How many distinct tokens followed each position's context before it, int64 [M]: among its context's
    earlier positions, those whose token was the first of its kind there."""
    is_new = (matches == 0)[by_context].long()
    earlier_new = is_new.cumsum(0) - is_new
    return scatter(by_context, earlier_new - earlier_new[context_begins])


# -- The n-gram model ------------------------------------------------------------------------------------


def ngram_probabilities(
    tokens: Tensor, vocab: int, highest_order: int, begins: Tensor = WHOLE_TEXT
) -> tuple[Tensor, Tensor]:
    """Predict each of tokens[1:] by counts of what stands before it; begins: as in `context_counts`.

    Returns the probabilities, float64 [N], and codes of the counts of its contexts, uint8 [2, orders, N]: how
    often each was used, and by how many distinct tokens it was followed.
    Interpolated absolute discounting, as in Kneser-Ney smoothing, but with plain counts in all orders:
    P_k(w) = (max(n(w) - D, 0) + D t P_(k-1)(w)) / n for n uses of the context of k tokens, n(w) of them
    followed by w, t distinct followers. It is P_(k-1) where n = 0, and 1 / vocab below order 0.
    """
    probabilities = torch.full((len(tokens),), 1 / vocab, dtype=torch.float64, device=tokens.device)
    codes = torch.zeros(2, highest_order + 1, len(tokens), dtype=torch.uint8, device=tokens.device)
    for counts in context_counts(tokens, vocab, highest_order, begins):
        # In pieces of 4 M, or the terms of the formula would take more than the counts do.
        for rows in counts.uses.nonzero()[:, 0].split(2**22):
            positions = counts.positions[rows]
            uses = counts.uses[rows]
            followers = counts.followers[rows]
            discounted = (counts.matches[rows].double() - DISCOUNT).clamp_min_(0)
            backed_off = DISCOUNT * followers.double() * probabilities[positions]
            probabilities[positions] = (discounted + backed_off) / uses
            codes[:, counts.order, positions] = count_codes(torch.stack((uses, followers)))
        # Before the next order is counted.
        del counts, rows, positions, uses, followers, discounted, backed_off
    return probabilities[1:], codes[..., 1:]


def count_codes(counts: Tensor) -> Tensor:
    """Write counts as uint8 by their logarithm, so that small ones keep their value."""
    return counts.double().log1p().mul(COUNT_CODE_SCALE).round().to(torch.uint8)


def context_bins(codes: Tensor) -> Tensor:
    """Number the kind of each token's context, int64 [N]: the longest one that was seen before, how often it
    was, and by how many distinct tokens it was followed, these two in steps of a factor 2."""
    longest = (codes[0] > 0).sum(0, keepdim=True).sub_(1).clamp_min_(0)  # [1, N]; no longer one was seen
    uses = codes[0].gather(0, longest)[0].long() // CODE_OF_ONE
    followers = codes[1].gather(0, longest)[0].long() // CODE_OF_ONE
    return (longest[0] * 11 + uses.clamp(max=10)) * 7 + followers.clamp(max=6)


# -- The gate: a share of the n-gram for each token, learnt on the way -----------------------------------


class ShareGate:
    """A network from F facts of each token to the logit of the n-gram's share: 32 hidden units beside a
    direct linear part. It starts at the share sigmoid(-2) = 0.12 for all."""

    def __init__(self, facts: int, device: torch.device):
        rng = torch.Generator().manual_seed(0)  # the same gate in every run
        initial = [
            torch.randn(GATE_HIDDEN, facts, generator=rng) / facts**0.5,
            torch.zeros(GATE_HIDDEN),
            torch.zeros(1, GATE_HIDDEN),
            torch.full((1,), -2.0),
            torch.zeros(1, facts),
        ]
        self.parameters = [tensor.to(device).requires_grad_() for tensor in initial]

    def logits(self, facts: Tensor) -> Tensor:
        """[n, F] -> [n]."""
        hidden_weight, hidden_bias, output_weight, output_bias, direct_weight = self.parameters
        hidden = F.linear(facts, hidden_weight, hidden_bias).relu()
        return (F.linear(hidden, output_weight, output_bias) + F.linear(facts, direct_weight))[:, 0]


def gate_shares(odds: Tensor, codes: Tensor) -> Tensor:
    """The n-gram's share in the gate's mixture, float32 [N], from what is known before each token.

    The gate learns from each block once that has its shares, by one step of Adam.
    odds: log P(n-gram) - log P(neural) of each token, float32 [N]. codes: as ngram_probabilities gives them.
    """
    recent = recent_odds(odds)
    gate = ShareGate(4 * codes.size(1) + len(GATE_SPANS), odds.device)
    optimiser = torch.optim.Adam(gate.parameters, lr=0.02, betas=(0.9, 0.99))
    shares = torch.empty_like(odds)
    begin = 0
    size = GATE_FIRST_BLOCK
    while begin < len(odds):
        block = slice(begin, begin + size)
        logits = gate.logits(gate_facts(codes[..., block], recent[:, block]))
        shares[block] = logits.detach().sigmoid()
        optimiser.zero_grad()
        # The mixture's nats, less the neural model's, which the gate does not change.
        loss = -torch.logaddexp(F.logsigmoid(-logits), F.logsigmoid(logits) + odds[block]).mean()
        loss.backward()
        optimiser.step()
        begin += size
        size = min(GATE_LAST_BLOCK, 2 * size)
    return shares


def recent_odds(odds: Tensor) -> Tensor:
    """Mean of the odds, cut to +-5, over the last tokens before each, float32 [spans, N]."""
    sums, scale = exact_prefix_sums(odds.clamp(-5, 5))
    ends = torch.arange(len(odds), device=odds.device)
    means = []
    for span in GATE_SPANS:
        means.append((sums[:-1] - sums[(ends - span).clamp(0)]) / scale / ends.clamp(1, span))
    return torch.stack(means)


def gate_facts(codes: Tensor, recent: Tensor) -> Tensor:
    """What the gate reads of each token, float32 [n, F]: of each order the two codes, whether the context had
    one follower only, and whether it is the longest one that was seen; and the recent odds."""
    uses, followers = codes
    was_seen = uses > 0
    is_longest = was_seen & ~F.pad(was_seen[1:], (0, 0, 0, 1))
    return torch.cat((uses / 32, followers / 32, followers == CODE_OF_ONE, is_longest, recent)).T


# -- Hedge -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    """A mixture that Hedge weighs: (1 - share) neural + share n-gram."""

    name: float | str  # in the logs: its share, or "gate"
    share: float | Tensor  # of the n-gram; of each token [N] if they differ
    log_prior: float = 0.0  # log of its weight before it has seen a token


@dataclass(frozen=True)
class WeighedExpert:
    """How an expert fared."""

    name: float | str
    log_likelihood: float  # nats, of all tokens
    weight: float  # after the last token, a mean over all bins


@dataclass(frozen=True)
class Mixture:
    """What Hedge made of its experts."""

    log_probs: Tensor  # [N] float64
    experts: list[WeighedExpert]


def fixed_experts(shares: tuple[float, ...]) -> list[Expert]:
    """The experts whose share is the same for all tokens."""
    experts = []
    for share in shares:
        log_prior = 0.0 if share else NEURAL_LOG_PRIOR
        experts.append(Expert(share, share, log_prior))
    return experts


class BinHistory(NamedTuple):
    """The N tokens sorted by bin, in each of G bins by their order in the text; ranks are places there."""

    order: Tensor  # [N]: the token at each rank
    since: Tensor  # [N]: the first rank that counts for the token at a rank; the last is the one before it
    stops: Tensor  # [G]: one past each bin's last rank
    final_since: Tensor  # [G]: the first rank that counts for the bin's final weights
    sizes: Tensor  # [G]


def sort_by_bin(bins: Tensor, window: int) -> BinHistory:
    """Find what counts for each token: the last `window` ones of its bin, or all of them if that is 0."""
    window = window or len(bins)
    sorted_bins, order = torch.sort(bins, stable=True)
    groups = group_equal(sorted_bins)
    ranks = torch.arange(len(bins), device=bins.device)
    stops = groups.sizes.cumsum(0)
    final_since = stops - groups.sizes.clamp_max(window)
    return BinHistory(order, groups.begins.maximum(ranks - window), stops, final_since, groups.sizes)


def hedge_mixture(
    neural: Tensor, ngram: Tensor, experts: list[Expert], bins: Tensor, eta: float, window: int
) -> Mixture:
    """Mix the experts by Hedge (Freund and Schapire 1997), each bin of tokens for itself.

    An expert's weight at a token is exp(log_prior + eta * its log-likelihood on the earlier tokens of the
    bin, the last `window` ones or all if that is 0), over the sum of all weights.
    neural, ngram: probabilities of the tokens, float64 [N]; bins: int64 [N].
    """
    history = sort_by_bin(bins, window)
    log_mixed = torch.full_like(neural, -torch.inf)
    log_norm = log_mixed
    final_log_weights = []
    log_likelihoods = []
    # Only exact steps go by the order of the bins: the last bit of a log would depend on its rank there, and
    # with that on later tokens.
    for expert in experts:
        logs = torch.log(neural + expert.share * (ngram - neural))
        sums, scale = exact_prefix_sums(logs[history.order])
        log_weight = (
            expert.log_prior + eta / scale * scatter(history.order, sums[:-1] - sums[history.since]).double()
        )
        log_mixed = torch.logaddexp(log_mixed, log_weight + logs)
        log_norm = torch.logaddexp(log_norm, log_weight)
        final_sums = sums[history.stops] - sums[history.final_since]
        final_log_weights.append(expert.log_prior + eta / scale * final_sums.double())
        log_likelihoods.append(logs.sum().item())
    weights = torch.stack(final_log_weights).softmax(0) * (history.sizes.double() / len(bins))
    weighed = []
    for expert, total, weight in zip(experts, log_likelihoods, weights.sum(1).tolist(), strict=True):
        weighed.append(WeighedExpert(expert.name, total, weight))
    return Mixture(log_mixed - log_norm, weighed)


def document_begins(data: Validation) -> Tensor:
    """Where the document of each token begins, int64 [T]; a boundary belongs to the one that it ends."""
    firsts = np.concatenate(([0], data.starts + 1))
    return torch.from_numpy(np.repeat(firsts, np.diff(firsts, append=len(data.tokens))))


def mix_with_ngrams(cfg: Config, tokens: Tensor, nats: Tensor, begins: Tensor = WHOLE_TEXT) -> Mixture:
    """Mix a neural score, nats float64 [N] of tokens[1:], with exact n-grams of the tokens so far.

    With HEDGE_DOCUMENT_ORDER it is mixed with those of the document alone before.
    begins: int64 [N + 1], where each token's document begins.
    """
    if cfg.hedge_document_order:
        nats = -mix_with_counts(cfg, tokens, nats, cfg.hedge_document_order, begins).log_probs
    return mix_with_counts(cfg, tokens, nats, cfg.hedge_order)


def mix_with_counts(
    cfg: Config, tokens: Tensor, nats: Tensor, order: int, begins: Tensor = WHOLE_TEXT
) -> Mixture:
    """Mix a score, nats float64 [N] of tokens[1:], with n-grams of the whole text or of each document."""
    ngram, codes = ngram_probabilities(tokens, cfg.vocab_size, order, begins)
    shares = gate_shares((ngram.log() + nats).float(), codes)
    bins = context_bins(codes)
    del codes
    experts = [*fixed_experts(EXPERT_SHARES), Expert("gate", shares)]
    return hedge_mixture((-nats).exp(), ngram, experts, bins, cfg.hedge_eta, cfg.hedge_window)


# -- The tilt, for comparison ----------------------------------------------------------------------------


def top_followers(tokens: Tensor, vocab: int, order: int) -> Tensor:
    """What most often followed the `order` tokens before each of tokens[1:], int64 [3, N]: the token, how
    often it did, and how often any did. Of several it is the first to reach the count; where that is 0, none.

    Contexts go on from one document to the next.
    """
    for counts in context_counts(tokens, vocab, order):
        last_counts = counts
    rows = last_counts.by_context
    positions = last_counts.positions[rows]
    # In each context the highest count so far: sums of a row's count and a base that rises with the context.
    bases = last_counts.context_begins * (len(tokens) + 1)
    counts_after = last_counts.matches[rows] + 1
    highest = (bases + counts_after).cummax(0).values
    highest_before = (F.pad(highest, (1, 0))[:-1] - bases).clamp_min(0)
    numbers = torch.arange(len(rows), device=tokens.device)
    leads = torch.where(counts_after > highest_before, numbers, 0).cummax(0).values
    leaders = F.pad(tokens[positions[leads]], (1, 0))[:-1]
    top = tokens.new_zeros(3, len(tokens))
    top[:, positions] = torch.stack((leaders, highest_before, last_counts.uses[rows]))
    return top[:, 1:]


def ngram_hints(cfg: Config, tokens: Tensor) -> Tensor:
    """The token that most often followed the last TOKEN_ORDER - 1 ones before, int64 [N] for tokens[1:]; -1
    where it made up less than TOKEN_THRESHOLD of the followers, or there were none (parameter-golf #2135)."""
    leaders, counts, uses = top_followers(tokens, cfg.vocab_size, cfg.token_order - 1)
    return torch.where((counts > 0) & (counts / uses >= cfg.token_threshold), leaders, -1)


def tilt(cfg: Config, nats: Tensor, hint_nats: Tensor, hints: Tensor, targets: Tensor) -> Tensor:
    """Nats of the targets where the hint h has e^b times its odds, b = TOKEN_BOOST; all tensors are [N].

    -log p(y) - b [y = h] + log(1 + p(h) (e^b - 1)), and -log p(y) where there is no hint (hints is -1).
    """
    log_mass = torch.log1p((-hint_nats).exp() * math.expm1(cfg.token_boost))
    return torch.where(hints < 0, nats, nats - cfg.token_boost * (hints == targets) + log_mass)


# The scorers of a run, each by (run, the score before it or None, seconds that are left, announce).
# announce(seconds) says how long the score will take, as soon as that is known.

Scorer = Callable[..., Score]


def score_roundtrip(
    run: Run, previous: Score | None, limit: float, announce: Callable[[float], None]
) -> Score:
    """Score the packed weights by the official windows."""
    return run.score(0, limit, announce)


def score_sliding(run: Run, previous: Score | None, limit: float, announce: Callable[[float], None]) -> Score:
    """Score by windows that slide by EVAL_STRIDE."""
    return run.score(run.cfg.eval_stride, limit, announce)


def score_isolated(
    run: Run, previous: Score | None, limit: float, announce: Callable[[float], None]
) -> Score:
    """Score each document by itself, the long ones by windows that slide by EVAL_STRIDE."""
    return run.score(run.cfg.eval_stride, limit, announce, isolated=True)


def score_ttt(run: Run, previous: Score | None, limit: float, announce: Callable[[float], None]) -> Score:
    """Score by the same windows, or the official ones without a stride, and learn from each chunk after it is
    scored. The weights are the packed ones again in the end."""
    if run.cfg.ttt_batch_size:
        return DocumentScore(run).score(limit, announce)
    return run.score(run.cfg.eval_stride, limit, announce, TestTimeTraining(run).learn)


def score_tilt(run: Run, previous: Score, limit: float, announce: Callable[[float], None]) -> Score:
    """Tilt the previous score, which has the nats of all targets and hints; every rank does the same."""
    began = time.perf_counter()
    hints = torch.from_numpy(run.data.hints)
    targets = torch.from_numpy(run.data.tokens[1:].astype(np.int64))
    nats = tilt(run.cfg, previous.target_nats.double(), previous.hint_nats.double(), hints, targets)
    seconds = time.perf_counter() - began
    return replace(previous, nats=nats.sum().item(), seconds=seconds, target_nats=nats, hint_nats=None)


def score_hedge(run: Run, previous: Score, limit: float, announce: Callable[[float], None]) -> Score:
    """Mix the previous score, which has the nats of all targets, with n-grams. Rank 0 does it alone."""
    began = time.perf_counter()
    target_nats = previous.target_nats.double()
    mix = partial(mix_where_memory_lasts, run, target_nats, limit, announce, began)
    # The other ranks receive the sums only: half a GB of nats for 62 M targets is of no use to them.
    score = run.runtime.main_decides(mix)
    return replace(score, target_nats=target_nats)


def mix_where_memory_lasts(
    run: Run, target_nats: Tensor, limit: float, announce: Callable[[float], None], began: float
) -> Score:
    """`overwrite_with_mixture` on the GPU, if there is one, or on the CPU where the GPU's memory is short."""
    if run.runtime.is_cuda:
        try:
            return overwrite_with_mixture(run, run.runtime.device, target_nats, limit, announce, began)
        except torch.OutOfMemoryError:
            run.log.warn("hedge: out of memory on the GPU; mixing on the CPU, which takes longer")
        run.runtime.free_memory()  # here, where the error no longer holds the mixer's tensors
    return overwrite_with_mixture(run, torch.device("cpu"), target_nats, limit, announce, began)


def foretell_mixture(
    cfg: Config, tokens: Tensor, nats: Tensor, begins: Tensor = WHOLE_TEXT
) -> tuple[float, float]:
    """Seconds that mixing takes: the fixed ones, and those of each target.

    They follow from two samples: on a GPU nearly all of a sample's time is fixed. A first call, in which the
    device loads its code, is not counted.
    """
    few, many = SAMPLE_TARGETS
    seconds = []
    for count in (few, few, many):
        began = time.perf_counter()
        mix_with_ngrams(cfg, tokens[: count + 1], nats[:count], begins[: count + 1])
        seconds.append(time.perf_counter() - began)
    of_each = max(0.0, (seconds[2] - seconds[1]) / (many - few))
    return max(0.0, seconds[2] - many * of_each), of_each


def overwrite_with_mixture(
    run: Run,
    device: torch.device,
    target_nats: Tensor,
    limit: float,
    announce: Callable[[float], None],
    began: float,
) -> Score:
    """Replace the neural nats of each target, float64 [targets], by the mixture's, in place to save memory.

    Where all targets would take longer than `limit` seconds after `began`, only the first ones are mixed, or
    none. Returns the score without its nats.
    """
    data = run.data
    tokens = torch.from_numpy(data.tokens.astype(np.int64)).to(device)
    neural_nats = target_nats.to(device)
    begins = document_begins(data) if run.cfg.hedge_document_order else WHOLE_TEXT
    count = data.targets if limit > 0 else 0
    if count > SAMPLE_TARGETS[1]:
        run.log.say(f"hedge: mixes {count} targets with n-grams: usually 2 to 4 s a million on a CPU")
    if count > SAMPLE_TARGETS[1] and limit < math.inf:
        fixed_seconds, seconds_of_each = foretell_mixture(run.cfg, tokens, neural_nats, begins)
        spent = time.perf_counter() - began
        seconds = fixed_seconds + count * seconds_of_each
        announce(seconds)
        if spent + seconds > limit:
            usable_seconds = 0.8 * (limit - spent) - fixed_seconds
            count = max(0, int(usable_seconds / (seconds_of_each or 1.0)))
    if count == 0:
        return not_made(data, time.perf_counter() - began)
    mixture = mix_with_ngrams(run.cfg, tokens[: count + 1], neural_nats[:count], begins[: count + 1])
    target_nats[:count] = -mixture.log_probs.cpu()
    size = int(data.target_bytes[:count].sum(dtype=np.int64))
    report_experts(run.log, mixture.experts, count, size)
    seconds = time.perf_counter() - began
    return Score(target_nats[:count].sum().item(), count, size, seconds, unscored=data.targets - count)


def report_experts(log: RunLog, experts: list[WeighedExpert], tokens: int, size: int) -> None:
    """Log what each expert would score alone on so many tokens and bytes, and its final weight."""
    scores = [Score(-expert.log_likelihood, tokens, size, 0.0) for expert in experts]
    for expert, score in zip(experts, scores, strict=True):
        saved = scores[0].bpb - score.bpb
        log.line(
            f"hedge_expert ngram_share:{expert.name} {score.text} "
            f"saved:{saved:.4f} weight:{expert.weight:.4f}"
        )
    log.event(
        "hedge",
        shares=[expert.name for expert in experts],
        val_bpb=[score.bpb for score in scores],
        weights=[expert.weight for expert in experts],
    )


def not_made(data: Validation, seconds: float = 0.0) -> Score:
    """The Score of no target: nothing was left of the clock when its turn came, or after so many seconds."""
    return Score(0.0, 0, 0, seconds, unscored=data.targets)


# What the final lines of a log call a score, if not by its own name; the roundtrip goes by the artifact's.
OFFICIAL_SCORE_NAMES = {"sliding": "sliding_window", "hedge": "hedge_mixer"}


def scorers(cfg: Config) -> Iterator[tuple[str, Scorer]]:
    """Yield name and function of each score that is switched on, in the order in which they are made."""
    yield "roundtrip", score_roundtrip
    if cfg.eval_stride:
        yield "sliding", score_sliding
    if cfg.eval_doc_isolated:
        yield "isolated", score_isolated
    if cfg.ttt_steps:
        yield "ttt", score_ttt
    if cfg.ngram_tilt_enabled:
        yield "tilt", score_tilt
    if cfg.use_hedge:
        yield "hedge", score_hedge


MIXTURES = ("tilt", "hedge")  # scores that are made of the last one by the model


def score_all(run: Run) -> Iterator[tuple[str, Score]]:
    """Yield name and Score of each score that is switched on, all within MAX_EVAL_SECONDS: after a partial
    one, or when no time is left, the others are not started. What a checkpoint has kept from before is not
    made again."""
    seconds_left = run.cfg.max_eval_seconds or math.inf
    needs_all_targets = run.cfg.use_hedge or run.cfg.ngram_tilt_enabled or run.cfg.score_dump
    is_over = False
    previous = None
    if run.cfg.ngram_tilt_enabled:
        began = time.perf_counter()
        tokens = torch.from_numpy(run.data.tokens.astype(np.int64)).to(run.runtime.device)
        run.data = replace(run.data, hints=ngram_hints(run.cfg, tokens).cpu().numpy())
        seconds_left -= run.runtime.main_number(time.perf_counter() - began)
    for name, scorer in scorers(run.cfg):
        stored = run.checkpoints.scores.get(name)
        if stored and (stored.target_nats is not None or not needs_all_targets):
            score = stored
        elif is_over:
            score = not_made(run.data)
        else:
            announce = partial(announce_duration, run.log, name, seconds_left)
            score = scorer(run, previous, seconds_left, announce)
            # Each rank has the nats of its own windows; of a mixture rank 0 has them all.
            if needs_all_targets and name not in MIXTURES:
                score = gather_targets(run.runtime, score)
            elif run.runtime.world_size > 1 and name not in MIXTURES:
                # Else a resumed run that asks for them would take a part for all.
                score = replace(score, target_nats=None)
        # By one clock, or the ranks would part.
        seconds_left -= run.runtime.main_number(score.seconds)
        is_over = score.unscored > 0 or seconds_left <= 0
        if name not in MIXTURES:
            previous = score
        yield name, score


def gather_targets(runtime: Runtime, score: Score) -> Score:
    """The score with the nats of all ranks' targets and hints; the seconds that gathering takes, of half a
    GB for 62 M targets, count as its own."""
    began = time.perf_counter()
    runtime.sum(score.target_nats)
    if score.hint_nats is not None:
        runtime.sum(score.hint_nats)
    return replace(score, seconds=score.seconds + time.perf_counter() - began)


def announce_duration(log: RunLog, name: str, seconds_left: float, seconds: float) -> None:
    log.line(f"{name}: takes about {seconds:.0f} s, {seconds_left:.0f} s are left")


# ----------------------------------------------------------------------------------------------------------
# 14. CHECKPOINTS
#
# Everything that a run needs to go on as if it had not been stopped, in one file that is written whole or not
# at all. `find_checkpoint` reads the one that RESUME asks for, `Training` (section 15) takes it up, and
# `Checkpoints` writes new ones and keeps the last two until the RESULT. INIT_FROM is read here too.
# ----------------------------------------------------------------------------------------------------------
CHECKPOINT = "parameter golf checkpoint 1"  # what a checkpoint calls itself; another number, another format


@dataclass(frozen=True)
class CheckpointKnobs:
    """When the state of a run is saved, and what a run starts from."""

    checkpoint_seconds: float = knob(
        0.0,
        "Seconds of training, or of a score by TTT_BATCH_SIZE, between two checkpoints; 0 = one only, at the "
        "end of the training.",
        low=0,
        role="place",
        source="ours",
    )
    resume: str = knob(
        "0",
        "Checkpoint to go on from: auto = the newest in OUT_DIR, if there is one; or a path; 0 = start anew.",
        role="place",
        source="ours",
    )
    init_from: str = knob(
        "",
        "Path of a state dict to start the weights from, e.g. the official script's final_model.pt; "
        "empty = initial weights from SEED.",
        source="ours",
    )


class CheckpointState(TypedDict):
    """What a checkpoint holds. `Checkpoints` adds the first seven, `Training` writes and reads the rest."""

    kind: str  # CHECKPOINT
    run_id: str
    same: dict[str, object]  # what must not change when a run goes on: knobs, SEED, hashes of data and script
    dtype: str  # compute type, a key of DTYPES
    resumed: list[int]  # the steps from which the run has gone on so far
    scores: dict[str, list]  # scores of the packed model that are done: the values of each Score
    begun: dict  # the score that was being made, by `DocumentScore`; {} if there is none
    step: int  # steps done
    scales: float  # sum of the learning-rate multipliers so far
    seconds: float  # of the training clock
    recent: list[float]  # seconds of the latest steps, for the pace
    random: list[Tensor]  # the state of torch's generator on each rank
    model: dict[str, Tensor]
    optimisers: dict
    total: list[Tensor]  # this and the next three: the running average of the weights
    weight: float
    count: int
    newest: int
    path: str  # where it was read from; not in the file


# What is checked of a file before the run trusts it.
CHECKED_TYPES = {
    "same": dict,
    "dtype": str,
    "resumed": list,
    "scores": dict,
    "begun": dict,
    "step": int,
    "scales": float,
    "seconds": float,
    "recent": list,
    "random": list,
    "model": dict,
    "optimisers": dict,
    "total": list,
}


# -- Reading what torch.save wrote -----------------------------------------------------------------------


WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def read_saved(path: Path | str, knob_name: str = "") -> object:
    """What torch.save wrote, on the CPU. Nothing in the file is executed.

    RunError (2), with `knob_name` before the path, if there is no such file or if it is damaged or foreign.
    """
    if not Path(path).is_file():
        raise RunError(f"no checkpoint at {knob_name}{path}")
    try:
        with zipfile.ZipFile(path) as file:
            # torch.load ignores the checksums, and would unpack a bomb.
            is_compressed = sum(entry.file_size for entry in file.infolist()) > Path(path).stat().st_size
            if is_compressed or file.testzip():
                raise RunError("damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile have many kinds for a damaged or foreign file
        kind = ""
        with suppress(OSError), open(path, "rb") as file:
            head = file.read(100)
            kind = "" if head.startswith(b"PK") else describe_kind(head)  # torch.save writes a zip archive
        raise RunError(f"{knob_name}{path} is no whole checkpoint ({type(error).__name__}){kind}") from None


def load_initial_weights(path: str) -> dict[str, Tensor]:
    """The state dict that INIT_FROM names, as float32, without the prefixes of torch's wrappers.

    RunError (2) if the file holds anything else; it names the entry at fault, or the one that would do.
    """
    state = read_saved(path, "INIT_FROM=")
    if not is_state_dict(state):
        raise RunError(f"INIT_FROM={path} is not a state dict of tensors{describe_entries(state)}")
    weights = {bare_name(name): tensor.float() for name, tensor in state.items()}
    if len(weights) < len(state):
        raise RunError(f"INIT_FROM={path} holds weights twice, with and without a prefix like module.")
    return weights


def bare_name(name: str) -> str:
    """A parameter's name without what torch.compile, DistributedDataParallel and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def describe_entries(state: object) -> str:
    """A phrase on what of a saved object could be a state dict, or else on what spoils it."""
    if not isinstance(state, dict):
        return f", but a {type(state).__name__}"
    for name, entry in state.items():
        if isinstance(entry, dict) and entry and is_state_dict(entry):
            return f"; its entry {name!r} is one: torch.save that alone"
    for name, entry in state.items():
        if not is_state_dict({name: entry}):
            kind = f"{entry.dtype} tensor" if isinstance(entry, Tensor) else type(entry).__name__
            return f" of floats: its entry {name!r} is a {kind}"
    return ""


def is_state_dict(state: object) -> bool:
    """Whether it is a dict of plain CPU tensors of floats, none larger than what is stored of it."""
    try:
        tensors = list(state.values())
        if not all(tensor.is_cpu and tensor.is_floating_point() for tensor in tensors):
            return False
        return all(tensor.nbytes <= tensor.untyped_storage().nbytes() for tensor in tensors)
    except (AttributeError, RuntimeError):  # it has no values, or they are no plain tensors
        return False


def load_weights(model: GPT, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into the model; RunError (2) that names the first differences if it does not fit."""
    model_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state_shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = [name for name in model_shapes | state_shapes if model_shapes.get(name) != state_shapes.get(name)]
    if names:
        phrases = []
        for name in dict.fromkeys([*names[:2], names[-1]]):  # the last is the file's, if it has other names
            stored = state_shapes.get(name, "missing")
            wanted = model_shapes.get(name, "unknown")
            phrases.append(f"{name} is {stored} there, {wanted} here")
        raise RunError(f"{source} does not fit this model ({len(names)} tensors): {'; '.join(phrases)}")
    model.load_state_dict(state)


# -- Checkpoints of a run --------------------------------------------------------------------------------


@dataclass
class Checkpoints:
    """A run's files OUT_DIR/checkpoints/RUN_ID-STEP.pt on rank 0's disk: the last two, until the RESULT."""

    folder: Path | None = None  # None: nothing is written
    header: dict[str, object] = field(default_factory=dict)  # kind, run_id, same, dtype, resumed
    before: CheckpointState | None = None  # the one that this run goes on from
    paths: list[Path] = field(default_factory=list)  # those written whole, the newest last
    scores: dict[str, Score] = field(default_factory=dict)  # made since the training ended
    begun: dict = field(default_factory=dict)  # the score being made, as `DocumentScore` keeps it

    def __post_init__(self) -> None:
        if self.before:
            self.header["resumed"] = [*self.before["resumed"], self.before["step"]]
            self.paths.append(Path(self.before["path"]))
            self.scores = {name: Score(*values) for name, values in self.before["scores"].items()}
            self.begun = self.before["begun"]

    def write(self, state: Mapping, log: RunLog) -> None:
        """Add a checkpoint, or warn that it cannot be written: the earlier ones stay, the run goes on."""
        run_id = self.header["run_id"]
        path = self.folder / f"{run_id}-{state['step']:08d}.pt"
        scores = {name: list(vars(score).values()) for name, score in self.scores.items()}
        content = self.header | state | dict(scores=scores, begun=self.begun)
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomic(path, partial(torch.save, content))
            earlier = [other_path for other_path in self.paths if other_path != path]
            self.paths = [*earlier, path][-2:]
            for old_path in checkpoint_files(self.folder, run_id):
                if old_path not in self.paths:
                    old_path.unlink()
        except OSError as error:
            log.warn(f"no checkpoint: {error.filename}: {error.strerror}")

    def add_score(self, name: str, score: Score, log: RunLog) -> None:
        """Keep a score, so that it is not made twice."""
        if name not in self.scores:  # else it is one of before, and the score that was begun comes after it
            self.begun = {}
        self.scores[name] = score
        self.write_again(f"the {name} score", log)

    def add_begun(self, begun: dict, log: RunLog) -> None:
        """Keep a score that is being made, so that it goes on from here."""
        self.begun = begun
        self.write_again("the score so far", log)

    def write_again(self, what: str, log: RunLog) -> None:
        """Write the last checkpoint with the scores of now; the rest of it is the end of the training's.

        A damaged one is left as it is, with a warning: the run needs none to come to its end.
        """
        if self.folder and self.paths and self.paths[-1].exists():
            try:
                state = read_checkpoint(self.paths[-1])
            except RunError as error:
                log.warn(f"no checkpoint of {what}: {error}")
            else:
                self.write(state, log)

    def clear(self) -> None:
        """Remove the checkpoints of a finished run, and their folder unless others' are in it."""
        if self.folder is None:
            return
        for path in checkpoint_files(self.folder, self.header["run_id"]):
            path.unlink()
        with suppress(OSError):
            self.folder.rmdir()


def checkpoint_files(folder: Path, run_id: str = "") -> list[Path]:
    """The checkpoints of a run, that of the most steps first; without run_id, of the folder's latest run.

    A copy to another disk loses the times of files, so these decide only between runs, and only where the
    lock of OUT_DIR's models does not name the one that wrote there last.
    """
    found = folder.glob(f"{run_id or '*'}-{'[0-9]' * 8}.pt")
    paths = sorted((path for path in found if path.name[0] != "."), reverse=True)
    if run_id or not paths:
        return paths
    with suppress(OSError, ValueError):
        owner = (folder.parent / f".{WEIGHTS_FILE}.lock").read_text(encoding="utf-8")
        if owner and checkpoint_files(folder, owner):
            return checkpoint_files(folder, owner)
    newest = max(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))
    return checkpoint_files(folder, newest.stem[: -len("-00000000")])


def read_checkpoint(path: Path) -> CheckpointState:
    """The state in a whole checkpoint; RunError (2) on any other file."""
    state = read_saved(path)
    if not is_checkpoint(state):
        raise RunError(f"{path} is no checkpoint of this version of the script")
    return state


def is_checkpoint(state: object) -> bool:
    """Whether what a file holds is a checkpoint of this version of the script."""
    if not isinstance(state, dict) or state.get("kind") != CHECKPOINT:
        return False
    if not all(isinstance(state.get(name), wanted) for name, wanted in CHECKED_TYPES.items()):
        return False
    return state["dtype"] in DTYPES


def find_checkpoint(
    cfg: Config, identity: Mapping[str, object], is_restart: bool = False
) -> CheckpointState | None:
    """The checkpoint that RESUME asks for, if any, and its `path`.

    A damaged file is passed over for the one before, with a warning. RunError (2) if none is whole, or if it
    was made with another identity: the knobs that shape the result, the seed, the data, the script.
    """
    errors = []
    for path in checkpoint_choices(cfg, is_restart):
        try:
            state = read_checkpoint(path) | dict(path=str(path))
        except RunError as error:
            errors.append(str(error))
            continue
        if errors:
            print(f"warning: {'; '.join(errors)}; going on from {path}", file=sys.stderr)
        differences = describe_differences(cfg, state["same"], identity)
        if differences:
            raise RunError(f"{path} was made with {differences}; set that back, or start anew with RESUME=0")
        return state
    if errors:
        hint = "" if cfg.resume == "auto" else "RESUME=auto goes on from the newest in OUT_DIR, "
        raise RunError(f"RESUME={cfg.resume}: {'; '.join(errors)}; {hint}RESUME=0 starts anew")
    return None


def checkpoint_choices(cfg: Config, is_restart: bool) -> list[Path]:
    """The files that RESUME allows, the one to try first at the front.

    is_restart: torchrun starts the run once more; one that began from a named file goes on from its latest.
    """
    folder = Path(cfg.out_dir) / "checkpoints"
    if cfg.resume == "0":
        return []
    if cfg.resume == "auto":
        return checkpoint_files(folder, cfg.run_id)
    named = Path(cfg.resume)
    return [*(successors(folder, named) if is_restart else []), named]


def successors(folder: Path, named: Path) -> list[Path]:
    """The checkpoints in a folder that were written after a run had gone on from the named one."""
    found = []
    with suppress(RunError):
        before = read_checkpoint(named)
        for path in checkpoint_files(folder, before["run_id"]):
            if before["step"] in read_checkpoint(path)["resumed"]:
                found.append(path)
    return found


def describe_differences(cfg: Config, stored: Mapping[str, object], current: Mapping[str, object]) -> str:
    """What differs between two identities, as "NAME=1 there, 2 here; ...", or "".

    A knob that one of them does not list is at its default there, or has no effect.
    """
    defaults = {knob_field.name.upper(): knob_field.default for knob_field in fields(cfg)}
    phrases = []
    for name in dict(stored) | dict(current):
        value_there = stored.get(name, defaults.get(name))
        value_here = current.get(name, defaults.get(name))
        if value_there != value_here:
            phrases.append(f"{name}={value_there} there, {value_here} here")
    return "; ".join(phrases)


# ----------------------------------------------------------------------------------------------------------
# 15. TRAIN
#
# `train` is the loop: warm up (untimed), say what the run will reach, then step by step until the step limit
# or the clock. `Run` holds what every phase of a run needs, `Training` what changes from step to step.
# ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainKnobs:
    """The loop: its micro-batches, its warm-up and what it logs."""

    micro_batch_tokens: int = knob(
        0,
        "Most tokens of a pass on a rank; 0 = 65,536 on a GPU, 4,096 on a CPU. The warm-up halves it until a "
        "pass fits the memory.",
        low=0,
        role="place",
        source="ours",
    )
    warmup_steps: int = knob(
        20,
        "Untimed steps that compile every graph before the clock starts, and are then undone.",
        low=0,
        role="place",
        source="official",
    )
    max_warmup_seconds: float = knob(
        600.0,
        "Seconds of warm-up, foretold by an uncompiled pass, above which a CPU refuses the run; 0 = never.",
        low=0,
        role="place",
        source="ours",
    )
    val_loss_every: int = knob(
        1000,
        "Steps between validations of the live weights; 0 = only at the end, -1 = never: the packed weights "
        "alone are scored.",
        low=-1,
        role="place",
        source="official",
    )
    train_log_every: int = knob(
        200,
        "Steps between lines of the training log, after the first ten steps; 0 = none.",
        low=0,
        role="place",
        source="official",
    )


@dataclass
class Run:
    """What every phase of a run needs."""

    cfg: Config
    runtime: Runtime
    log: RunLog
    model: GPT
    data: Validation
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    loss: Callable = field(init=False)  # (ids, target_ids, dials, phase) -> (objective, mean nats): training
    nats: Callable = field(init=False)  # (ids, target_ids, positions, phase) -> nats of each: evaluation
    document_nats: Callable = field(init=False)  # the same, for passes that hold single documents

    def __post_init__(self) -> None:
        self.make_graphs()

    def make_graphs(self) -> None:
        """Make the two functions that run the model, `loss` and `nats`, compiled if the runtime compiles."""
        self.loss = self.runtime.compile(training_loss(self.cfg, self.model))
        model = self.model

        def nats(ids, target_ids, positions=None, phase=-1, adapters=None):
            if adapters is None:
                return token_nats(model, ids, target_ids, positions, phase=phase)
            return token_nats(model, ids, target_ids, positions, phase=phase, adapters=adapters)

        self.nats = self.runtime.compile(nats)
        self.document_nats = self.nats if compiles_documents(self.cfg, self.runtime.device) else nats

    def settle(self, warm: Callable):
        """Call `warm`, which runs the graphs for the first time and so compiles them; returns its result.

        If that fails on a CPU (no C++ compiler, torch 2.5's bf16) on any rank, nothing is compiled on all of
        them from now on and it is called again, unless COMPILE=1 insists. On a GPU it is a RunError (2):
        eager code would waste the clock, and after some errors CUDA can do nothing more. `warm` may call no
        collective operation.
        """
        result = None
        failure = ""
        try:
            result = warm()
        except Exception as error:
            is_known = isinstance(error, torch.OutOfMemoryError | RunError) or missing_kernel(error)
            if is_known or not self.runtime.compiles or self.cfg.compile == "1":
                raise
            failure = " ".join([f"{type(error).__name__}:", *str(error).split()])[:200]
        failures = [text for text in self.runtime.gather(failure) if text] if self.runtime.compiles else []
        if not failures:
            return result
        if self.runtime.is_cuda:
            raise RunError(
                f"torch.compile failed: {failures[0]}. Is there a C compiler (gcc) on the PATH? "
                "`python train_gpt.py --doctor` tries it; COMPILE=0 runs eagerly, slower"
            )
        self.log.warn(f"no torch.compile ({failures[0]}); running eagerly, slower")
        self.runtime.compiles = False
        self.make_graphs()
        return warm()

    def score(
        self,
        stride: int = 0,
        limit: float = math.inf,
        announce: Callable[[float], None] | None = None,
        learn: Callable[[Chunk], None] | None = None,
        phase: int = -1,
        isolated: bool = False,
    ) -> Score:
        """Score the validation text by official windows, or ones that slide by `stride`; as `evaluate`.

        phase: the one whose layers run.
        """
        nats = partial(self.document_nats if isolated else self.nats, phase=self.cfg.last_alike(phase))
        wait = "scoring the validation text"
        if stride:
            wait += f" by windows that slide by {stride}"
        if isolated:
            wait += ", each document by itself"
        if learn:
            wait += ", learning from it"
        watch = partial(self.log.report_wait, wait)
        return evaluate(
            self.cfg, nats, self.data, self.runtime, stride, limit, announce, learn, watch, isolated
        )


def micro_batch_limit(cfg: Config, device: torch.device) -> int:
    """Most sequences of a pass: 64 K tokens on a GPU, as officially, 4 K on a CPU (records/benchmarks)."""
    tokens = cfg.micro_batch_tokens or (65_536 if device.type == "cuda" else 4_096)
    return max(1, tokens // cfg.train_seq_len)


def micro_batches(batch: tuple[Tensor, Tensor], max_sequences: int) -> list[tuple[Tensor, Tensor]]:
    """Split a rank's (ids, targets) [sequences, T] into the fewest near-equal parts of at most so many rows.

    They have at most two shapes, so that there are at most two graphs.
    """
    ids, target_ids = batch
    count = -(-len(ids) // max_sequences)
    if count == 0:
        return []
    return list(zip(ids.tensor_split(count), target_ids.tensor_split(count), strict=True))


def accumulate_gradient(
    run: Run, optimisers: Optimisers, batch: tuple[Tensor, Tensor], plan: StepPlan, max_sequences: int
) -> Tensor:
    """Leave this rank's share of the gradient in the buffer; returns its share of the mean nats per token."""
    device = run.runtime.device
    optimisers.flat.zero_()
    nats_share = torch.zeros((), device=device)
    dials = plan.dials(device)
    rows = max_sequences * run.cfg.train_seq_len // batch[0].size(1)  # more of them if they are shorter
    for ids, target_ids in micro_batches(batch, rows):
        ids = ids.to(device, non_blocking=True)
        target_ids = target_ids.to(device, non_blocking=True)
        share = ids.numel() / run.cfg.train_batch_tokens
        objective, nats = run.loss(ids, target_ids, dials, plan.phase)
        (objective * (share * optimisers.loss_scale.value)).backward()
        nats_share += nats * share
    return nats_share


def train_step(
    run: Run, optimisers: Optimisers, batch: tuple[Tensor, Tensor], plan: StepPlan, max_sequences: int
) -> Tensor:
    """One optimiser step; returns this rank's share of the mean nats per token."""
    nats_share = accumulate_gradient(run, optimisers, batch, plan, max_sequences)
    if run.cfg.sam_rho:
        with optimisers.uphill(run.cfg.sam_rho):
            accumulate_gradient(run, optimisers, batch, plan, max_sequences)
    optimisers.step(plan)
    return nats_share


# -- Before the clock ------------------------------------------------------------------------------------


def time_step(cfg: Config, model: GPT, runtime: Runtime) -> float:
    """Seconds of an eager step of one process: from the best of up to three passes over blank tokens.

    The model, on the runtime's device, and the random state are left as they were.
    """
    sequences = min(micro_batch_limit(cfg, runtime.device), cfg.sequences)
    ids = torch.zeros(sequences, cfg.train_seq_len, dtype=torch.int64, device=runtime.device)
    loss = training_loss(cfg, model)
    random_before = torch.get_rng_state()
    passes = []
    while len(passes) < 3 and sum(passes) < 1.0:
        began = time.perf_counter()
        loss(ids, ids)[0].backward()
        runtime.synchronize()
        passes.append(time.perf_counter() - began)
    model.zero_grad()
    torch.set_rng_state(random_before)
    return min(passes) * cfg.sequences / sequences


def warm_up_seconds(cfg: Config, step_seconds: float) -> float:
    """What the warm-up takes without compiling, at most: some steps are of a shallower model."""
    if not cfg.warmup_steps:
        return 0.0
    return (cfg.warmup_steps + 2 * len(cfg.phases) - 2) * step_seconds


def foretell_warm_up(cfg: Config, model: GPT, runtime: Runtime) -> None:
    """Say on a CPU how long steps and warm-up will take, before anything is waited for.

    RunError (2) if the warm-up would take longer than MAX_WARMUP_SECONDS.
    """
    if runtime.device.type != "cpu" or not cfg.warmup_steps:
        return
    try:
        step_seconds = time_step(cfg, model, runtime)
    except (
        RuntimeError
    ):  # out of memory, or a kernel is missing: the warm-up deals with it, and the log has it
        return
    seconds = warm_up_seconds(cfg, step_seconds)
    if seconds > 3:
        steps = max(1.0, predict_steps_left(cfg, 0, 0.0, step_seconds))
        print(
            f"first forecast: {step_seconds:.3g} s a step on this CPU, uncompiled; "
            f"warm-up {duration_text(seconds)}, training {duration_text(steps * step_seconds)}, "
            f"steps: {steps:.0f}",
            flush=True,
        )
    if 0 < cfg.max_warmup_seconds < seconds:
        raise RunError(
            f"the warm-up alone would take {duration_text(seconds)} here: {cfg.warmup_steps} steps of "
            f"{step_seconds:.0f} s; `bash run_best.sh` chooses sizes for this machine, "
            "MAX_WARMUP_SECONDS=0 starts all the same"
        )


def fit_micro_batch(run: Run, batch: tuple[Tensor, Tensor]) -> int:
    """Sequences of a pass that fit the device: halved on out-of-memory, by each rank. Leaves gradients."""
    cfg = run.cfg
    device = run.runtime.device
    plan = plan_step(cfg, 0, 0.0, 0.0)
    max_sequences = min(micro_batch_limit(cfg, device), max(1, len(batch[0])))

    def fits() -> bool:
        try:
            for ids, target_ids in micro_batches(batch, max_sequences)[:1]:
                objective, _ = run.loss(ids.to(device), target_ids.to(device), plan.dials(device), -1)
                objective.backward()
        except torch.OutOfMemoryError:
            if max_sequences == 1:
                raise
            return False
        return True

    while not fits():
        max_sequences //= 2
        run.runtime.free_memory()  # here, where the error no longer holds the failed pass's tensors
        print(f"warning: out of memory, micro-batch is now {max_sequences} sequences", file=sys.stderr)
    return max_sequences


def warm_up(run: Run, optimisers: Optimisers, stream: TokenStream) -> tuple[int, list[float]]:
    """Compile every graph, untimed, then undo it all.

    Returns the most sequences of a pass and the seconds of a step in each phase.
    """
    cfg = run.cfg
    runtime = run.runtime
    run.settle(partial(warm_evaluation, run))
    if not cfg.warmup_steps:
        return micro_batch_limit(cfg, runtime.device), [0.0] * len(cfg.phases)
    weights_before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    optimisers_before = optimisers.state()  # empty as yet
    random_before = torch.get_rng_state()
    if runtime.compiles:
        graphs = len(cfg.phases)
        run.log.say(f"compiling the model for training: usually 30 to 80 s a graph, graphs: {graphs}")
    max_sequences = run.settle(partial(fit_micro_batch, run, next(batches(cfg, stream, runtime))))
    seconds_of_phase = []
    for phase in range(-len(cfg.phases), 0):
        first_batch = 1 + 2 * (len(cfg.phases) + phase)
        source = batches(cfg, stream, runtime, first_batch, cfg.phases[phase].length)
        plan = replace(plan_step(cfg, 0, 0.0, 0.0), phase=phase)
        is_last = phase == -1
        steps = cfg.warmup_steps if is_last else 2  # of an earlier phase the second is timed
        for step in range(steps):
            seconds = timed_step(run, optimisers, next(source), plan, max_sequences)
            if is_last:
                run.log.line(f"warmup_step:{step + 1}/{cfg.warmup_steps}")
        seconds_of_phase.append(runtime.main_number(seconds))
    run.model.load_state_dict(weights_before)
    optimisers.load(optimisers_before)
    torch.set_rng_state(random_before)
    return max_sequences, seconds_of_phase


def timed_step(
    run: Run, optimisers: Optimisers, batch: tuple[Tensor, Tensor], plan: StepPlan, max_sequences: int
) -> float:
    """Seconds of one step on this rank, the device waited for."""
    clock = Clock(run.runtime)
    clock.start()
    train_step(run, optimisers, batch, plan, max_sequences)
    run.runtime.synchronize()
    return clock.seconds()


# A sweep's run on a CPU spends 0.6 of its 20 s on a blank pass (records/benchmarks/NOTES.md).
SMALL_LOGITS = 2**26  # numbers that a machine which trains has room for: 256 MiB of float32


def is_small_pass(cfg: Config, runtime: Runtime, shape: PassShape) -> bool:
    """Whether a pass of evaluation needs no trial: it is not compiled, and its logits fit the memory."""
    is_eager_on_cpu = runtime.device.type == "cpu" and not runtime.compiles
    return is_eager_on_cpu and shape.batch * shape.width * cfg.vocab_size <= SMALL_LOGITS


def warm_evaluation(run: Run) -> None:
    """Try evaluation on blank tokens, each shape and each phase that will be validated, with the tilt those
    too that price its hints: what compiles is compiled, and what does not fit the memory is known before the
    training, not after it."""
    cfg = run.cfg
    device = run.runtime.device
    graphs = evaluation_graphs(cfg, run.runtime)
    has_adapters = cfg.ttt_batch_size > 0 and compiles_documents(cfg, device)
    count = len(graphs) + (len(document_shapes(cfg)) if has_adapters else 0)
    count *= 1 + cfg.ngram_tilt_enabled
    if run.runtime.compiles:
        run.log.say(f"compiling the model for scoring: usually 10 to 40 s a graph, graphs: {count}")
    for shape, phase, learns in graphs:
        if not learns and is_small_pass(cfg, run.runtime, shape):
            continue
        padded = pad_windows(run.data, [], shape, device)
        for has_hints in (False, True)[: 1 + cfg.ngram_tilt_enabled]:
            with torch.no_grad():
                window_nats(partial(run.nats, phase=phase), padded, shape.slides, has_hints)
        if learns and not shape.slides:
            run.nats(padded.ids, padded.targets, phase=phase).sum().backward()
    if has_adapters:
        warm_document_lora(run)


def warm_document_lora(run: Run) -> None:
    """Compile the passes of TTT_BATCH_SIZE on blank tokens, forward and backward."""
    lora = DocumentLora(run)
    data = run.data
    for hints in (None, np.zeros(0, np.int64))[: 1 + run.cfg.ngram_tilt_enabled]:
        run.data = replace(data, hints=hints)
        for shape in document_shapes(run.cfg):
            lora.score(DocumentTurn(shape, [], begins=True, learning=1))
    run.data = data


def compiles_documents(cfg: Config, device: torch.device) -> bool:
    """Whether passes of single documents are compiled where the others are.

    They come in up to 17 shapes, each a graph. A CPU compiles one for 10 to 40 s and would win back a quarter
    of the few minutes that the score takes eagerly; COMPILE=1 insists on it.
    """
    return device.type != "cpu" or cfg.compile == "1"


def evaluation_graphs(cfg: Config, runtime: Runtime) -> list[tuple[PassShape, int, bool]]:
    """(shape, phase, learns) of every graph that evaluation runs."""
    device = runtime.device
    official = pass_shape(cfg, device, 0)
    graphs = [(official, -1, False), (pass_shape(cfg, device, cfg.eval_stride), -1, False)]
    if cfg.eval_doc_isolated and compiles_documents(cfg, device):
        graphs += [(shape, -1, False) for shape in isolated_shapes(cfg, device)]
    if cfg.ttt_steps > 0 and not cfg.ttt_batch_size:
        graphs += [(pass_shape(cfg, device, stride, True), -1, True) for stride in (0, cfg.eval_stride)]
    if cfg.phased_ttt_prefix_docs:
        graphs.append((phase_shape(cfg, runtime), -1, True))
    if cfg.val_loss_every > 0 and not cfg.eval_only:
        graphs += [(official, cfg.last_alike(phase), False) for phase in range(-len(cfg.phases), -1)]
    return list(dict.fromkeys(graphs))


def forecast(run: Run, stream: TokenStream, max_sequences: int, seconds_of_phase: list[float]) -> None:
    """Say before the clock starts what the run will reach, given the seconds of a step in each phase."""
    cfg = run.cfg
    log = run.log
    cap = cfg.cap
    size = predict_size(cfg, run.model) + len(own_source())
    # What a step adds to the progress in each phase, and the progress each phase takes.
    step_progress = [max(1 / cfg.iterations, s / cap) for s in seconds_of_phase]
    phase_ends = [min(phase.until, 1.0) for phase in cfg.phases[:-1]]
    step_counts = np.diff([0.0, *phase_ends, 1.0]) / step_progress
    steps = step_counts.sum()
    seconds = step_counts @ seconds_of_phase
    epochs = steps * cfg.train_batch_tokens / len(stream)
    step_ms = ",".join(f"{1000 * s:.0f}" for s in seconds_of_phase)
    most_sequences = max(run.runtime.gather(max_sequences))  # rank 0 may have none
    micro_batch_tokens = most_sequences * cfg.train_seq_len
    log.line(
        f"forecast: steps:{steps:.0f} step_ms:{step_ms} micro_batch_tokens:{micro_batch_tokens} "
        f"epochs:{epochs:.2f} bytes:{size}"
    )
    if size > SIZE_LIMIT:
        log.warn(f"code and model may pass the limit of {SIZE_LIMIT} bytes")
    warmdown_steps = cfg.warmdown_iters
    if warmdown_steps > steps and cfg.schedule == "warmdown" and not cfg.warmdown_frac:
        start = steps / max(warmdown_steps, 1)
        log.warn(f"WARMDOWN_ITERS={warmdown_steps} is longer than the run: LR starts at {start:.2f}")
    if 0 < seconds < 0.5 * cap < math.inf:
        log.warn(f"ITERATIONS={cfg.iterations} ends the run after about {seconds:.0f} of {cap:.0f} s")
    if epochs > 1:
        tokens = len(stream)
        log.warn(f"{tokens} training tokens will be read {epochs:.1f} times; get more shards")


# -- The loop --------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """How training ended."""

    score: Score | None = None  # of the live weights
    averaged: Score | None = None  # of their average, if that is what is packed
    step: int = 0
    seconds: float = 0.0
    progress: float = 0.0
    mean_lr_scale: float = 0.0
    late_graphs: int = 0  # compiled inside the clock, in spite of the warm-up
    phase: int = -1  # of the last step
    max_sequences: int = 1  # of a pass

    @property
    def is_truncated(self) -> bool:
        """The schedule did not come to its end."""
        return self.step > 0 and self.progress < 0.98


class Training:
    """All that changes from step to step, and with that what a checkpoint holds."""

    def __init__(self, run: Run, optimisers: Optimisers, step_seconds: float):
        self.run = run
        self.optimisers = optimisers
        self.average = Average(run.cfg, run.model)
        self.clock = Clock(run.runtime, step_seconds)
        self.step = 0  # steps done
        self.lr_scale_sum = 0.0  # of all steps so far
        self.length = run.cfg.phases[0].length  # tokens of a training window
        self.length_since = -math.inf  # the step that began it; none where the run did
        self.saved_at = 0.0  # training seconds at the last checkpoint
        self.logged_loss = math.nan  # the last one that the log has; reading each would wait for a GPU
        # [steps that were finite, loss and gradient norm of the last of them], on the device: see `check`.
        # float32, since MPS has no float64; it counts exactly to 16 M steps.
        self.sound = torch.zeros(3, device=run.runtime.device)

    def notice_length(self, plan: StepPlan) -> StepPlan:
        """The plan with its learning rate as SEQ_CHANGE_WARMUP_STEPS has it after a change of the length."""
        length = self.run.cfg.phases[plan.phase].length
        if length != self.length:
            self.length = length
            self.length_since = plan.step
        steps = plan.step - self.length_since + 1
        share = min(1.0, steps / max(1, self.run.cfg.seq_change_warmup_steps))
        return replace(plan, lr_scale=plan.lr_scale * share)

    def count_step(self, plan: StepPlan, loss: Tensor) -> None:
        """Average the weights and note whether the step was finite. Nothing here waits for the device."""
        gradient_norm = self.optimisers.norm
        self.average.update(plan)
        new = torch.stack([self.sound[0] + 1, loss.float(), gradient_norm.float()])
        is_finite = (self.sound[0] == self.step) & gradient_norm.isfinite()
        self.sound = torch.where(is_finite, new, self.sound)
        self.step += 1
        self.lr_scale_sum += plan.lr_scale
        # If a disk was full, scores may stand beside earlier weights.
        self.run.checkpoints.scores.clear()

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """RunError (5) if a weight, or a gradient so far, is not finite.

        A loss that is not finite leaves no finite gradient, so that losses need no check of their own.
        """
        finite_steps, loss, gradient_norm = self.sound.tolist()
        broken = ""
        for name, weight in weights.items():
            if not weight.isfinite().all():
                broken = name
                break
        if finite_steps == self.step and not broken:
            return
        mean_loss = self.run.runtime.sum(torch.tensor(loss)).item()
        message = (
            f"diverged: {broken or 'loss or gradient'} is not finite at step {finite_steps + 1:.0f} "
            f"(the step before: loss {mean_loss:.4f}, gradient norm {gradient_norm:.4g}); "
            f"lower the learning rates"
        )
        if self.run.checkpoints.paths:
            message += f"; {self.run.checkpoints.paths[-1]} is from before"
        raise RunError(message, DIVERGED)

    def save(self, elapsed: float) -> None:
        """Write a checkpoint; all ranks call it, the clock paused, and each brings what it alone holds.

        elapsed: rank 0's seconds, or the ranks would differ in when the next is due.
        """
        run = self.run
        average = self.average
        weights = run.model.state_dict()
        self.check(weights)
        state = dict(
            total=average.total,
            weight=average.weight,
            count=average.count,
            newest=average.newest,
            step=self.step,
            scales=self.lr_scale_sum,
            length=self.length,
            length_since=self.length_since,
            seconds=self.clock.total,
            recent=list(self.clock.recent_steps),
            random=run.runtime.gather(torch.get_rng_state()),
            optimisers=self.optimisers.state(),
            model=weights,
        )
        if run.checkpoints.folder:
            run.checkpoints.write(state, run.log)
        self.saved_at = elapsed

    def resume(self) -> StepPlan | None:
        """Go to the checkpoint's state, if there is one; returns the plan of the step before it."""
        run = self.run
        average = self.average
        clock = self.clock
        state = run.checkpoints.before
        if not state:
            return None
        load_weights(run.model, state["model"], state["path"])
        self.optimisers.load(state["optimisers"])
        average.total = [total.to(run.runtime.device) for total in state["total"]]
        average.weight = state["weight"]
        average.count = state["count"]
        average.newest = state["newest"]
        self.step = state["step"]
        self.lr_scale_sum = state["scales"]
        self.length = state["length"]
        self.length_since = state["length_since"]
        clock.total = state["seconds"]
        clock.recent_steps = deque(state["recent"], maxlen=clock.recent_steps.maxlen)
        self.saved_at = clock.total
        self.sound[0] = self.step
        torch.set_rng_state(state["random"][run.runtime.rank % len(state["random"])])
        if not self.step:
            return None
        return plan_step(run.cfg, self.step - 1, clock.total, clock.step_seconds())


def train(run: Run, optimisers: Optimisers, stream: TokenStream) -> Trained:
    """Train until the step limit or the clock; validates at the end unless VAL_LOSS_EVERY=-1.

    After a signal it saves the state between two steps and raises KeyboardInterrupt. So it does where the
    data of the next step cannot be read, with RunError (2).
    """
    cfg = run.cfg
    runtime = run.runtime
    max_sequences, seconds_of_phase = warm_up(run, optimisers, stream)
    forecast(run, stream, max_sequences, seconds_of_phase)
    graphs_before = compiled_graphs()
    if runtime.world_size > 1:  # or one rank collects the warm-up's garbage in a step that all wait for
        gc.collect()
        gc.freeze()
    training = Training(run, optimisers, seconds_of_phase[0])
    clock = training.clock
    plan = training.resume()
    score = None
    runtime.defers_stop = True
    loader = prefetch(batches(cfg, stream, runtime, training.step, training.length), runtime)
    clock.start()
    for step in itertools.count(training.step):
        batch, data_error = next_batch(loader)
        elapsed = clock.tick(data_error is not None)
        plan_before, plan = plan, plan_step(cfg, step, elapsed, clock.step_seconds())
        length_before = training.length
        plan = training.notice_length(plan)
        foretold = clock.foretell_step()
        pending_seconds = len(clock.pending_events) * foretold  # two steps that a GPU is behind the host
        is_done = is_finished(cfg, step, elapsed + pending_seconds, foretold)
        lacks_data = clock.data_failed and not is_done
        validates = is_due(step, cfg.val_loss_every) or (is_done and cfg.val_loss_every >= 0)
        checkpoint_is_due = 0 < cfg.checkpoint_seconds <= elapsed - training.saved_at
        saves = clock.stop_requested or is_done or checkpoint_is_due or lacks_data
        if saves or validates:
            with clock.paused(elapsed):
                if saves:
                    training.save(elapsed)
                if clock.stop_requested:
                    raise KeyboardInterrupt
                if lacks_data:
                    runtime.agree(partial(raise_error, data_error))
                if validates:
                    score = validate(run, step, clock.total, -1 if is_done else plan.phase)
        if is_done:
            break
        if training.length != length_before:
            loader.close()
            loader = prefetch(batches(cfg, stream, runtime, step, training.length), runtime)
            batch = runtime.agree(partial(next, loader))
        loss = train_step(run, optimisers, batch, plan, max_sequences)
        training.count_step(plan, loss)
        logged_loss = report_step(run, stream, plan_before, plan, loss, 1000 * clock.seconds())
        training.logged_loss = logged_loss or training.logged_loss
        report_progress(run.log, cfg, training)
        if not runtime.is_cuda or is_due(step + 1, 50):  # a GPU would be waited for
            training.check({})
    loader.close()
    gc.unfreeze()
    runtime.defers_stop = False
    if runtime.stop_signal:  # during the validation: the state is saved
        raise KeyboardInterrupt
    late_graphs = max(runtime.gather(compiled_graphs() - graphs_before))
    last_phase = plan_before.phase if plan_before else -1
    return end_training(training, score, plan.progress, late_graphs, last_phase, max_sequences)


def end_training(
    training: Training,
    score: Score | None,
    progress: float,
    late_graphs: int,
    phase: int,
    max_sequences: int,
) -> Trained:
    """Say how training ended and put the average, where one is kept, into the model.

    The facts are those of `Trained`; score: of the live weights, None where VAL_LOSS_EVERY=-1 leaves it out.
    """
    run = training.run
    trained = Trained(
        score=score,
        step=training.step,
        seconds=training.clock.total,
        progress=progress,
        mean_lr_scale=training.lr_scale_sum / max(training.step, 1),
        late_graphs=late_graphs,
        phase=phase,
        max_sequences=max_sequences,
    )
    report_end_of_training(run, trained)
    loss_scale = training.optimisers.loss_scale
    if loss_scale.is_used:
        skipped, scale = loss_scale.skipped_steps, loss_scale.value
        run.log.line(f"loss_scale:{scale:.0f} steps_left_out:{skipped}")
        run.log.event("loss_scale", scale=scale, skipped_steps=skipped)
    if training.average.kind:
        trained.averaged = use_average(run, training.average, trained)
    return trained


def next_batch(loader: Iterator) -> tuple[tuple[Tensor, Tensor] | None, RunError | None]:
    """(the next batch, None), or (None, why it cannot be read), which all ranks must hear of."""
    try:
        return next(loader), None
    except RunError as error:
        return None, error


def raise_error(error: RunError | None) -> None:
    """Raise the error, if there is one."""
    if error:
        raise error


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def use_average(run: Run, average: Average, trained: Trained) -> Score | None:
    """Put the average into the model, to be packed, and score it beside the live weights, if those are."""
    average.copy_into_model(trained.step)
    run.log.line(f"{average.kind}: averaging {average.count} checkpoints")
    if trained.score is None:
        return None
    score = run.score()
    run.log.line(f"averaged {score.text} live {trained.score.text}")
    run.log.event(
        "average",
        kind=average.kind,
        count=average.count,
        live_val_bpb=trained.score.bpb,
        val_loss=score.loss,
        val_bpb=score.bpb,
    )
    return score


def calibrate(run: Run, stream: TokenStream | None, trained: Trained) -> Calibration:
    """GPTQ_CALIBRATION_BATCHES: what the first training batches say of the model as it will be packed.

    All ranks call it and get the same. Its seconds count as training: they are added to the trained ones.
    """
    cfg = run.cfg
    runtime = run.runtime
    if not stream or not cfg.gptq_calibration_batches:
        return Calibration()
    began = time.perf_counter()
    plans = [plan for plan in plan_tensors(cfg, run.model.state_dict()) if plan.levels]
    names = [plan.name for plan in plans]
    source = batches(cfg, stream, runtime)
    with watched_inputs(run.model, names) as sums, torch.no_grad():
        for ids, target_ids in itertools.islice(source, cfg.gptq_calibration_batches):
            for part, _ in micro_batches((ids, target_ids), trained.max_sequences):
                run.model(part.to(runtime.device))
    for name, total in sums.items():
        if not runtime.sum(total).isfinite().all():
            raise RunError(f"diverged: the inputs of {name} are not finite", DIVERGED)
    calibration = Calibration(sums)
    if cfg.step_balance_rounds:
        windows = window_order(cfg, stream.count_windows(cfg.train_seq_len), 0)
        windows = windows[: max(1, BALANCE_TOKENS // cfg.train_seq_len)] * cfg.train_seq_len
        rows = [stream.read(start, cfg.train_seq_len) for start in windows.tolist()]
        balance_steps(run, plans, calibration, torch.from_numpy(np.array(rows, np.int64)))
    runtime.synchronize()
    seconds = runtime.main_number(time.perf_counter() - began)
    trained.seconds += seconds
    tokens = cfg.gptq_calibration_batches * cfg.train_batch_tokens
    run.log.line(f"gptq: hessians:{len(sums)} tokens:{tokens} time:{1000 * seconds:.0f}ms")
    run.log.event("gptq", hessians=len(sums), tokens=tokens, seconds=seconds, scales=calibration.scales)
    for name in names:
        if name not in sums:
            run.log.line(f"gptq: {name} is read by rows, it has no inputs: rounded to the nearest")
    return calibration


@torch.no_grad()
def balance_steps(run: Run, plans: list[TensorPlan], calibration: Calibration, ids: Tensor) -> None:
    """STEP_BALANCE_ROUNDS: set the calibration's scales by what rounding each matrix alone costs.

    A cost is the KL divergence of the model's output on ids [B, T], mean nats a token. As costs go by the
    square of the steps and bytes by their logarithm, the least cost at the same bytes has the same cost for
    each weight of all matrices. A round goes half of the way there: farther off, steps are too coarse for the
    square. Each rank measures its share of the matrices.
    """
    cfg = run.cfg
    runtime = run.runtime
    ids = ids.to(runtime.device)
    cfg = replace(cfg, trellis=False)  # it takes the same share of all errors off, for much time
    reference = run.model(ids).log_softmax(dim=-1)
    counts = torch.tensor([plan.count for plan in plans], dtype=torch.float64)
    logs = torch.zeros(len(plans), dtype=torch.float64)  # of the scales
    for _ in range(cfg.step_balance_rounds):
        costs = torch.zeros(len(plans), dtype=torch.float64)
        for index in range(runtime.rank, len(plans), runtime.world_size):
            weight = run.model.get_parameter(plans[index].name)
            before = weight.detach().clone()
            weight.copy_(decode_matrix(encode_matrix(cfg, plans[index], before.cpu(), calibration)))
            output = run.model(ids).log_softmax(dim=-1)
            costs[index] = F.kl_div(output, reference, log_target=True, reduction="sum") / ids.numel()
            weight.copy_(before)
        gaps = 0.5 * (runtime.sum(costs).clamp_min(1e-9) / counts).log()
        gaps -= (gaps * counts).sum() / counts.sum()
        logs -= 0.5 * gaps.clamp(-3, 3)
        for plan, scale in zip(plans, logs.exp().tolist(), strict=True):
            calibration.scales[plan.name] = scale


# -- What the loop says ----------------------------------------------------------------------------------


def validate(run: Run, step: int, seconds: float, phase: int = -1) -> Score:
    """Score the live weights after `step` steps and log it in the official line format."""
    score = run.score(phase=phase)
    ms = 1000 * seconds
    progress = f"step:{step}/{run.cfg.iterations}"
    run.log.line(f"{progress} {score.text} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")
    run.log.event("val", step=step, val_loss=score.loss, val_bpb=score.bpb, train_ms=ms)
    return score


def report_step(
    run: Run, stream: TokenStream, plan_before: StepPlan | None, plan: StepPlan, loss: Tensor, ms: float
) -> float | None:
    """Log an epoch or phase that began with this step and, if due, its end. ms: trained so far.

    Returns the loss over all ranks if it was logged.
    """
    cfg = run.cfg
    log = run.log
    length = cfg.phases[plan.phase].length
    epoch = stream.epoch(cfg, plan.step, length)
    if epoch > stream.epoch(cfg, plan.step - 1, length):
        log.line(f"epoch:{epoch} step:{plan.step}")
    if plan_before and plan_before.phase != plan.phase:
        report_switch(cfg, log, cfg.phases[plan_before.phase], plan)
    steps = plan.step + 1
    if not cfg.train_log_every or (plan.step >= 10 and not is_due(steps, cfg.train_log_every)):
        return None
    value = run.runtime.sum(loss).item()
    log.line(
        f"step:{steps}/{cfg.iterations} train_loss:{value:.4f} train_time:{ms:.0f}ms "
        f"step_avg:{ms / steps:.2f}ms lr_scale:{plan.lr_scale:.4f} progress:{plan.progress:.4f}"
    )
    log.event(
        "step",
        step=steps,
        train_loss=value if math.isfinite(value) else None,
        lr_scale=plan.lr_scale,
        progress=plan.progress,
        tokens=steps * cfg.train_batch_tokens,
        train_ms=ms,
    )
    return value


def report_switch(cfg: Config, log: RunLog, phase_before: Phase, plan: StepPlan) -> None:
    """Log that this step began a phase: which layers run now, how long its windows are."""
    phase = cfg.phases[plan.phase]
    switches = []
    if phase.plan != phase_before.plan:
        if cfg.depth_phases:
            switches.append(f"prog_depth: switched to {phase.depth // cfg.num_layers} repeats")
        elif cfg.num_loops:
            switches.append(f"layer_loop: switched to {phase.depth} layers")
        else:
            switches.append(f"progressive_grow: switched to {phase.depth} layers")
    if phase.length != phase_before.length:
        switches.append(f"train_seq_len: switched to {phase.length} tokens")
    for switch in switches:
        log.line(f"{switch} at step:{plan.step} frac:{plan.progress:.2f}")
    log.event("phase", step=plan.step, depth=phase.depth, length=phase.length, progress=plan.progress)


def report_progress(log: RunLog, cfg: Config, training: Training) -> None:
    """Say, if it is time, how far training is and when it will end, by progress: the clock may end it."""
    if not log.is_status_due("training"):
        return
    seconds = training.clock.seconds()
    progress = min(1.0, max(training.step / cfg.iterations, seconds / cfg.cap))
    tokens_per_second = training.step * cfg.train_batch_tokens / seconds
    seconds_left = seconds / progress - seconds
    log.status(
        "training",
        f"{progress:.0%} of the run, loss {training.logged_loss:.4f}, {tokens_per_second:,.0f} tokens/s, "
        f"about {duration_text(seconds_left)} left",
    )


def report_end_of_training(run: Run, trained: Trained) -> None:
    """Say how training ended."""
    if trained.step < run.cfg.iterations:
        ms = 1000 * trained.seconds
        progress = f"{trained.step}/{run.cfg.iterations}"
        run.log.line(f"stopping_early: wallclock_cap train_time:{ms:.0f}ms step:{progress}")
    if trained.is_truncated:
        run.log.warn(f"schedule_truncated at progress {trained.progress:.3f}: steps too long for the clock")
    if run.cfg.last_alike(trained.phase) != -1:
        trained_layers = run.cfg.phases[trained.phase].depth
        run.log.warn(
            f"the run ended before its last switch of layers: what is scored runs "
            f"{run.cfg.phases[-1].depth} layers, the last step trained {trained_layers}"
        )
    if trained.late_graphs:
        run.log.warn(f"{trained.late_graphs} graphs were compiled inside the clock; set WARMUP_STEPS >= 1")


# ----------------------------------------------------------------------------------------------------------
# 16. REPORT: log head, official final lines, RESULT, exit code
#
# What a run tells its user, in the order of its life: `log_header` opens the log with the source and the
# settings, `save_model` packs and says the sizes, `score_artifact` reads the packed file back and prints
# the official final lines, `finish` judges the run by all limits and prints RESULT. `explain` turns what
# can go wrong into one line and an exit code, `recorded` writes that into the logs. It has no knobs.
# ----------------------------------------------------------------------------------------------------------
SLOW_TO_PACK = 5_000_000  # weights
PACKED_PER_SECOND = 1_700_000  # weights, packed twice: measured with zstd on one core, 17 M int8
STATUS_OF_CODE = {DIVERGED: "diverged", PREEMPTED: "preempted", LOST_RANK: "lost_rank"}


# -- The log's head --------------------------------------------------------------------------------------


def describe_machine(runtime: Runtime) -> dict[str, object]:
    """The `env` event: device, settings and versions. A CPU goes by its name and its threads."""
    if runtime.is_cuda:
        device_name = torch.cuda.get_device_name()
        attention = f"sdpa, cuDNN {torch.backends.cudnn.version()}"
        if torch.backends.cuda.cudnn_sdp_enabled():
            attention = "cudnn or " + attention
        if runtime.compiles and is_ampere_or_newer(runtime.device):
            attention += ", within documents FlexAttention"
        if has_flash_attention_3(runtime.device) and runtime.dtype != torch.float32:
            attention = "FlashAttention-3"
    elif runtime.device.type == "mps":
        device_name = f"MPS of {cpu_name()}"
        attention = "sdpa"
    else:
        device_name = f"{cpu_name()}, {torch.get_num_threads()} threads"
        attention = f"blocked to {LONGEST_BLOCKED}, then sdpa"
    return dict(
        device=device_name,
        world_size=runtime.world_size,
        dtype=runtime.dtype_name,
        compile=runtime.compiles,
        attention=attention,
        deterministic=runtime.deterministic,
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
    )


def cpu_name() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    with suppress(OSError):
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def log_header(run: Run, run_id: str, stream: TokenStream | None) -> None:
    """Write the official head of a log, or, where the log goes on and has one, from where it goes on."""
    machine = describe_machine(run.runtime)
    before = run.checkpoints.before
    if before or run.log.goes_on:
        log_resumption(run.log, before, machine)
    if before and run.log.goes_on:
        return
    source = own_source()
    log_source(run.log, source, run.runtime)
    log_inputs(run, run_id, len(stream.paths) if stream else 0)
    log_settings(run, machine)
    log_start_warnings(run)
    code = dict(code_sha256=hashlib.sha256(source).hexdigest(), code_bytes=len(source))
    if readable_sha256():
        code["readable_sha256"] = readable_sha256()
        run.log.line(" ".join(f"{name}:{value}" for name, value in code.items()))
    run.log.event("config", config=asdict(run.cfg), config_hash=run.cfg.hash, version=VERSION, **code)
    run.log.event(
        "env",
        **machine,
        val_tokens=run.data.targets,
        val_bytes=run.data.bytes,
        val_sha256=run.data.sha256,
    )


def log_resumption(log: RunLog, before: Mapping | None, machine: Mapping) -> None:
    """Say from which checkpoint the run goes on; none was left if it was cut off before its first."""
    step, path = (before["step"], before["path"]) if before else (0, "no checkpoint")
    log.line(f"resumed: step:{step} from {path}")
    log.event("resumed", step=step, path=path, **machine)


def log_source(log: RunLog, source: bytes, runtime: Runtime) -> None:
    """Write, to the log alone, the script, the versions of Python and torch, and what nvidia-smi says."""
    cards = "nvidia-smi: no GPU in use"
    if runtime.is_cuda and shutil.which("nvidia-smi"):
        cards = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    rule = "=" * 100
    text = source.decode("latin-1" if readable_sha256() else "utf-8")  # a packed script is in latin-1
    if readable_sha256():  # a terminal would obey its control codes
        text = text.translate({code: 256 + code for code in (*range(10), *range(11, 32), *range(127, 160))})
    log.line(
        f"{text}\n{rule}\nRunning Python {sys.version}\nRunning PyTorch {torch.__version__}\n{cards}\n{rule}",
        echo=False,
    )


def log_inputs(run: Run, run_id: str, train_shards: int) -> None:
    """Name the run, its tokenizer, its shards and its validation text."""
    cfg = run.cfg
    data = run.data
    folder = Path(cfg.data_path)
    log = run.log
    log.line(f"run_id:{run_id} config_hash:{cfg.hash} overrides:{json.dumps(cfg.overrides())}")
    log.line(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.tokenizer_path}")
    log.line(f"train_loader:dataset:{folder.resolve().name} train_shards:{train_shards}")
    log.line(f"val_loader:shards pattern={folder / '*_val_*.bin'} tokens:{data.targets}")
    log.line(f"val: tokens:{data.targets} bytes:{data.bytes} docs:{data.documents} sha256:{data.sha256}")


def log_settings(run: Run, machine: Mapping) -> None:
    """Say what is trained, on what, and at which rates, in the official line formats."""
    cfg = run.cfg
    log = run.log
    log.line(f"model_params:{sum(param.numel() for param in run.model.parameters())}")
    largest_share = -(-cfg.sequences // run.runtime.world_size)  # of a rank; that of rank 0 may be none
    accumulation_steps = -(-largest_share // micro_batch_limit(cfg, run.runtime.device))
    log.line(f"world_size:{run.runtime.world_size} grad_accum_steps:{accumulation_steps}")
    log.line(" ".join(f"{name}:{value}" for name, value in machine.items()))
    log.line(f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads}")
    embed_lr = role_settings(cfg)["embed"].learning_rate
    head_lr = 0.0 if cfg.tie_embeddings else cfg.head_lr
    log.line(
        f"tie_embeddings:{cfg.tie_embeddings} embed_lr:{embed_lr} head_lr:{head_lr} "
        f"matrix_lr:{cfg.matrix_lr} scalar_lr:{cfg.scalar_lr}"
    )
    if cfg.depth_phases:
        repeats = cfg.depth_phases[0][1]
        log.line(f"prog_depth: schedule={cfg.depth_phases} starting_repeats={repeats}")
    elif cfg.num_loops:
        blocks = " ".join(str(layer.block) for layer in cfg.phases[-1].plan)
        log.line(f"layer_loop: blocks {blocks} from progress {cfg.enable_looping_at}")
    log.line(
        f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} "
        f"iterations:{cfg.iterations} warmup_steps:{cfg.warmup_steps} "
        f"max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}\n"
        f"seed:{cfg.seed}"
    )


UNIX_LINE_ENDS = "sed -i 's/\\r$//' train_gpt.py removes them"


def log_start_warnings(run: Run) -> None:
    """Warn of knobs that ALLOW_INERT lets pass, of a compiler not used, and of bytes that say nothing."""
    for phrase in run.cfg.inert():
        run.log.warn(phrase)
    if run.runtime.eager_reason:
        run.log.warn(f"no torch.compile ({run.runtime.eager_reason}); running eagerly, slower")
    if is_slow_float32(run.runtime):
        run.log.warn("DTYPE=fp32 is exact on this GPU, without TF32, and much slower than DTYPE=bf16")
    if run.cfg.fused_mlp and not can_fuse_mlp(run.runtime.device, run.runtime.dtype, run.runtime.compiles):
        run.log.warn("FUSED_MLP=1 is idle: it needs Triton, torch.compile, bf16 or fp16, a GPU from sm_80 on")
    line_ends = own_source().count(b"\r\n")
    if line_ends:
        run.log.warn(f"this script has Windows line ends, which count {line_ends} bytes; {UNIX_LINE_ENDS}")


# -- The artifact ----------------------------------------------------------------------------------------
SIZE_ROUNDS = 8  # of SIZE_TARGET's search, which usually takes 3
COARSEST_SCALE = 256.0  # of SIZE_TARGET: every integer is 0 then, and larger steps pass float16's range


@dataclass(frozen=True)
class Artifact:
    """The packed model and the code that unpacks it: what is submitted and what of it counts."""

    path: str
    quant: str  # e.g. "int8", by `quant_name`
    codec: str  # "zstd" or "zlib"
    model_bytes: int
    code_bytes: int

    @property
    def total_bytes(self) -> int:
        """What the challenge limits: code and packed model."""
        return self.model_bytes + self.code_bytes

    def facts(self) -> dict[str, object]:
        """By name, as the `artifact` event and RESULT tell them."""
        return asdict(self) | dict(total_bytes=self.total_bytes)


def save_model(run: Run, path: Path, calibration: Calibration) -> int:
    """Write both model files, or neither, on rank 0; returns the packed bytes.

    RunError (5) if a weight is not finite.
    """
    cfg = run.cfg
    log = run.log
    state = {name: tensor.detach().cpu() for name, tensor in run.model.state_dict().items()}
    quant = quant_name(cfg)
    header = dict(
        dtype=run.runtime.dtype_name, compile=run.runtime.compiles, config_hash=cfg.hash, quant=quant
    )
    weights = sum(tensor.numel() for tensor in state.values())
    if weights > SLOW_TO_PACK:
        seconds = weights / PACKED_PER_SECOND
        log.say(f"packing {weights / 1e6:.0f} M weights: usually {seconds:.0f} s, with some clips longer")
    encoded, blob = pack_to_size(run, state, calibration, header)
    weights_path = path.with_name(WEIGHTS_FILE)
    write_atomic(weights_path, partial(torch.save, state))
    write_atomic(path, blob)
    weights_bytes = weights_path.stat().st_size
    code_bytes = len(own_source())
    payload = payload_bytes(cfg, state)
    float32_bytes = sum(4 * tensor.numel() for tensor in state.values())
    label = f"{quant}+{cfg.codec}"
    log.line(f"Serialized model: {weights_bytes} bytes\nCode size: {code_bytes} bytes")
    log.line(f"Total submission size: {weights_bytes + code_bytes} bytes")
    log.line(
        f"Serialized model {label}: {len(blob)} bytes "
        f"(payload:{payload} payload_ratio:{float32_bytes / payload:.2f}x)"
    )
    log.line(f"Total submission size {label}: {len(blob) + code_bytes} bytes")
    report_packing(run, state, encoded, blob)
    return len(blob)


def pack_to_size(
    run: Run, state: Mapping[str, Tensor], calibration: Calibration, header: Mapping[str, object]
) -> tuple[dict[TensorPlan, tuple[Tensor, ...]], bytes]:
    """(arrays, artifact) of the model: with SIZE_TARGET the largest found that fits.

    One factor scales every step; twice the step saves up to a bit a weight. It stays where the levels reach
    LEAST_SIGMAS, beyond which finer steps would clip. RunError (3) if nothing fits.
    """
    cfg = run.cfg
    room = model_room(cfg) if cfg.size_target_bytes else 0
    least_scale = finest_scale(cfg)
    scale = 1.0
    best = None
    for _ in range(SIZE_ROUNDS if cfg.size_target_bytes else 1):
        encoded = encode_tensors(scale_sigmas(cfg, scale), state, calibration)
        blob = pack_arrays(cfg, encoded, header)
        if not cfg.size_target_bytes:
            return encoded, blob
        run.log.line(f"size_target: sigmas x {scale:.4f}, packed {len(blob)} of {room} bytes")
        fits = len(blob) <= room
        if fits and (best is None or len(blob) > len(best[1])):
            best = encoded, blob
        if fits and len(blob) > 0.999 * room:
            break
        weights = sum(plan.count for plan in encoded if plan.levels)
        wanted = scale * 2 ** min(8 * (len(blob) - 0.9995 * room) / max(weights, 1), 8.0)
        next_scale = min(max(wanted, least_scale), COARSEST_SCALE)
        if next_scale == scale:  # as fine or as coarse as steps may be
            break
        scale = next_scale
    if best is None:
        raise RunError(
            f"SIZE_TARGET={cfg.size_target}: no steps were found that fit; lower the model's size", OVER_SIZE
        )
    run.log.line(f"size_target: {room - len(best[1])} bytes unused")
    return best


def report_packing(
    run: Run, state: Mapping[str, Tensor], encoded: Mapping[TensorPlan, tuple[Tensor, ...]], blob: bytes
) -> None:
    """Log what packing cost: each tensor's error, relative to its norm, and each group's bytes and error.

    The errors are those of the tensors as read back; a group's bytes are those that it takes packed alone.
    """
    cfg = run.cfg
    restored = unpack(blob, "the artifact")[0]
    error_norms = {name: (restored[name] - tensor).norm().item() for name, tensor in state.items()}
    norms = {name: tensor.norm().item() for name, tensor in state.items()}
    groups = {}
    for group in dict.fromkeys(map(weight_group, state)):
        tensors = {name: tensor for name, tensor in state.items() if weight_group(name) == group}
        group_error = math.hypot(*(error_norms[name] for name in tensors))
        group_norm = math.hypot(*(norms[name] for name in tensors))
        error = group_error / max(group_norm, 1e-30)
        own = {plan: arrays for plan, arrays in encoded.items() if plan.name in tensors}
        packed_bytes = len(pack_arrays(cfg, own, {}))
        groups[group] = dict(tensors=len(tensors), bytes=packed_bytes, error=error)
        run.log.line(f"packed {group}: tensors:{len(tensors)} bytes:{packed_bytes} error:{error:.5f}")
    errors = {name: error_norms[name] / max(norms[name], 1e-30) for name in state}
    run.log.event("quantise", quant=quant_name(cfg), clip=cfg.quant_clip, groups=groups, errors=errors)


def score_artifact(run: Run, artifact: Artifact) -> dict[str, Score]:
    """Read the artifact from disk into the model and score that; each score is logged as soon as it is made.

    RunError (2) if the file cannot be read; (7) if SCORE_CHECK finds that a score breaks a condition.
    """
    state = run.runtime.main_decides(partial(read_artifact, artifact.path))
    load_weights(run.model, state, artifact.path)
    if run.cfg.score_check:
        check_scores(run)
    scores = {}
    for name, score in score_all(run):
        scores[name] = score
        report_score(run, artifact, name, score)
        if score.tokens:
            run.checkpoints.add_score(name, score, run.log)
    if run.cfg.score_dump and run.runtime.rank == 0:
        dump_scores(Path(run.cfg.score_dump), run.data, scores)
    return scores


def read_artifact(path: str) -> dict[str, Tensor]:
    """The weights in a packed model; RunError (2) if it is none."""
    return unpack(Path(path).read_bytes(), path)[0]


def check_scores(run: Run) -> None:
    """SCORE_CHECK: RunError (7) if a score breaks one of the four conditions, tried on short texts that all
    ranks score together."""
    check_own_scores = load_tool("records/legality.py")["check_own_scores"]
    check_own_scores(run)


def report_score(run: Run, artifact: Artifact, name: str, score: Score) -> None:
    """Log the two official final lines of a score; of a partial one, or one that was not made for want of
    time, a line of another name."""
    cfg = run.cfg
    official_name = OFFICIAL_SCORE_NAMES.get(name, name)
    if name == "roundtrip":
        official_name = f"{artifact.quant}_{artifact.codec}_roundtrip"
    timing = f"eval_time:{1000 * score.seconds:.0f}ms"
    if name == "sliding":
        timing = f"window:{cfg.eval_length} stride:{cfg.eval_stride} {timing}"
    count = f"tokens:{score.tokens}/{run.data.targets}"
    if not score.tokens:
        run.log.line(f"not_made_{official_name} {count} {timing}")
        return
    if score.unscored:
        run.log.line(f"partial_{official_name} {score.text} {count} {timing}")
    else:
        run.log.line(f"final_{official_name} {score.text} {timing}")
        run.log.line(f"final_{official_name}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    run.log.event(
        "score",
        name=name,
        val_loss=score.loss,
        val_bpb=score.bpb,
        tokens=score.tokens,
        bytes=score.bytes,
        seconds=score.seconds,
        left=score.unscored,
    )


def dump_scores(path: Path, data: Validation, scores: Mapping[str, Score]) -> None:
    """Write position, id, bytes and each whole score's log-probability of every target as an .npz file.

    The log-probabilities are float64, so that NumPy adds them up in that: their float32 sum would differ from
    the printed score in the eighth digit.
    """
    arrays = dict(position=np.arange(data.targets), target=data.tokens[1:], bytes=data.target_bytes)
    for name, score in scores.items():
        if not score.unscored:
            arrays[f"{name}_logprob"] = -score.target_nats.double().numpy()
    write_atomic(path, partial(np.savez, **arrays))


# -- The end ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How the limits judge a finished run."""

    status: str = "ok"
    exit_code: int = 0
    message: str = ""  # what to say on stderr


def broken_limits(
    cfg: Config, trained: Trained, artifact: Artifact, scores: Mapping[str, Score]
) -> list[Verdict]:
    """A verdict for each limit that the run broke, the gravest first."""
    broken = []
    if artifact.total_bytes > SIZE_LIMIT:
        message = f"code and model take {artifact.total_bytes} bytes, the limit is {SIZE_LIMIT}"
        broken.append(Verdict("over_size", OVER_SIZE, message))
    calibrates = cfg.gptq_calibration_batches > 0
    limit = cfg.max_wallclock_seconds or math.inf if calibrates else cfg.cap
    if round(trained.seconds, 3) > limit:  # as RESULT has them
        message = f"training took {trained.seconds:.3f} s, the limit is {limit:g}: "
        if calibrates:
            message += "raise GPTQ_RESERVE_SECONDS or lower GPTQ_CALIBRATION_BATCHES"
        else:
            message += "its last step was slower than those before it"
        broken.append(Verdict("over_train_time", OVER_TRAIN_TIME, message))
    seconds = evaluation_seconds(scores)
    partial_scores = ""
    for name, score in scores.items():
        if not score.tokens:
            partial_scores += f" and {name} was not made"
        elif score.unscored:
            partial_scores += f" and {name} is a part, {score.tokens} tokens, only"
    if partial_scores or 0 < cfg.max_eval_seconds < seconds:
        limit = f"the limit is {cfg.max_eval_seconds:.0f}"
        message = f"evaluation took {seconds:.0f} s{partial_scores}, {limit}"
        broken.append(Verdict("over_eval_time", OVER_EVAL_TIME, message))
    if trained.late_graphs and cfg.warmup_steps:
        graphs = f"{trained.late_graphs} graphs compiled in the training clock"
        message = f"{graphs} despite the warm-up; COMPILE=0 avoids it"
        broken.append(Verdict("recompiled", RECOMPILED, message))
    return broken


def evaluation_seconds(scores: Mapping[str, Score]) -> float:
    """What all scores took together."""
    return sum(score.seconds for score in scores.values())


def finish(run: Run, trained: Trained, artifact: Artifact, scores: Mapping[str, Score], run_id: str) -> int:
    """Write the `end` event and the RESULT line, the last of stdout; returns the exit code, by all limits."""
    run.runtime.defers_stop = True  # it is over: from here a signal changes nothing
    log = run.log
    # Rank 0 judges: each rank has measured its own seconds, and all must end with one exit code.
    broken = run.runtime.main_decides(partial(broken_limits, run.cfg, trained, artifact, scores))
    verdict = broken[0] if broken else Verdict()
    allocated, reserved = run.runtime.peak_memory_mib()
    log.line(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
    if verdict.message and run.runtime.rank == 0:
        log.line(f"error: {verdict.message}", echo=False)
        print(f"error: {verdict.message}", file=sys.stderr)
    end = dict(
        status=verdict.status,
        exit_code=verdict.exit_code,
        train_seconds=round(trained.seconds, 3),
        progress=trained.progress,
        mean_lr_scale=trained.mean_lr_scale,
        truncated=trained.is_truncated,
    )
    log.event("end", step=trained.step, **end)
    identity = dict(
        run_id=run_id,
        version=VERSION,
        seed=run.cfg.seed,
        config_hash=run.cfg.hash,
        eval_seconds=round(evaluation_seconds(scores), 3),
        resumed=run.checkpoints.header.get("resumed", []),
    )
    result = result_scores(trained, scores)
    unmade = [name for name, score in scores.items() if not score.tokens]
    if unmade:
        result["not_made"] = unmade
    result |= end
    result |= dict(steps=trained.step, tokens=trained.step * run.cfg.train_batch_tokens)
    result |= artifact.facts()
    result |= identity
    result |= describe_machine(run.runtime)
    result |= dict(val_sha256=run.data.sha256, overrides=run.cfg.overrides())
    log.line("RESULT " + json.dumps(result))
    return verdict.exit_code


def result_scores(trained: Trained, scores: Mapping[str, Score]) -> dict[str, float | None]:
    """RESULT's numbers, val_loss in nats a token, val_bpb in bits a byte, to 8 decimals.

    val_*: the official score, null if the clock cut it; NAME_val_* and partial_NAME_val_*: each score; then
    live_val_bpb, of the weights as trained, and prequant_val_bpb, of what was packed, before it was.
    """
    main_score = scores["roundtrip"]
    numbers = dict(val_loss=None, val_bpb=None)
    if not main_score.unscored:
        numbers = dict(val_loss=round(main_score.loss, 8), val_bpb=round(main_score.bpb, 8))
    for name, score in scores.items():
        if not score.tokens:
            continue
        label = f"partial_{name}" if score.unscored else name
        numbers[f"{label}_val_loss"] = round(score.loss, 8)
        numbers[f"{label}_val_bpb"] = round(score.bpb, 8)
    prequant = trained.averaged or trained.score
    numbers["live_val_bpb"] = round(trained.score.bpb, 8) if trained.score else None
    numbers["prequant_val_bpb"] = round(prequant.bpb, 8) if prequant else None
    return numbers


def explain(error: BaseException) -> RunError | None:
    """What a user can meet, as one line and its exit code; None for a bug, whose traceback is shown."""
    if isinstance(error, KeyboardInterrupt):
        return RunError("stopped by a signal before there was anything to save", PREEMPTED)
    is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if is_out_of_memory or "t allocate memory" in str(error):
        return RunError("out of memory; lower MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or other sizes of a batch")
    if operation := missing_kernel(error):
        return RunError(f"torch has no deterministic kernel for {operation} here; set DETERMINISTIC=0")
    if isinstance(error, OSError):
        file = error.filename or "log or console"
        return RunError(f"{file}: {error.strerror}; mend that or set another")
    if isinstance(error, RuntimeError) and is_from_distributed(error):
        return RunError(f"another rank was lost: {str(error).splitlines()[0]}", LOST_RANK)
    return error if isinstance(error, RunError) else None


def is_from_distributed(error: BaseException) -> bool:
    """Whether a call of torch.distributed failed, as it does where another rank is gone."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/distributed" in frame.filename for frame in frames)


@contextmanager
def recorded(run: Run, run_id: str, env: Mapping[str, str]) -> Iterator[None]:
    """Write to the logs how the run ended, if the body of the `with` raises before its RESULT.

    env: as the run was started with, for the command that goes on.
    """
    try:
        yield
    except BaseException as error:
        run.runtime.defers_stop = True  # torchrun signals what is left of a run that lost a rank
        explained = explain(error)
        if explained:
            explained = with_way_on(run, run_id, env, explained)
        record_failure(run.log, run_id, error, explained)
        if explained and explained.lone_rank is None:
            explained.lone_rank = explained.code == BAD_INPUT
        raise explained or error from None
    finally:
        run.log.close()


def with_way_on(run: Run, run_id: str, env: Mapping[str, str], explained: RunError) -> RunError:
    """The error with the checkpoint that is left and the command that goes on from it, where there is a way.

    After a signal the command goes on without a checkpoint too: the run then begins anew in the same logs.
    """
    is_stopped = bool(run.runtime.stop_signal) and explained.code in (PREEMPTED, LOST_RANK)
    is_saved = bool(run.checkpoints.paths) and explained.code in (PREEMPTED, LOST_RANK, BAD_INPUT)
    if not is_stopped and not is_saved:
        return explained
    if is_saved:
        what = f"stopped by {run.runtime.stop_signal}" if is_stopped else str(explained)
        code = PREEMPTED if is_stopped else explained.code
        message = f"{what}; {run.checkpoints.paths[-1]} is saved, to go on:"
        explained = RunError(message, code, explained.lone_rank)
    explained.command = command_to_go_on(run.cfg, run_id, env)
    return explained


def command_to_go_on(cfg: Config, run_id: str, env: Mapping[str, str]) -> str:
    """The command, for a shell, that goes on with a run: its knobs as they were set, and the same program.

    run_best.sh puts its own command into STARTED_BY and the names that it sets itself into SET_BY_PRESET. How
    ranks were started elsewhere than under torchrun on one machine is not known: then the knobs alone.
    """
    settings = dict(RESUME="auto", RUN_ID=run_id, OUT_DIR=cfg.out_dir)
    repeated = [knob_field.name.upper() for knob_field in fields(cfg)]
    repeated += ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]  # which the bits, or the machine, depend on
    for name in repeated:
        if name in env and name not in env.get("SET_BY_PRESET", "").split():
            settings.setdefault(name, env[name])
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    if "STARTED_BY" in env:
        return " ".join([env["STARTED_BY"], *words])
    script = [sys.executable, sys.argv[0]]
    if env.get("GROUP_WORLD_SIZE") == "1" and "LOCAL_WORLD_SIZE" in env:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher.append(f"--nproc_per_node={env['LOCAL_WORLD_SIZE']}")
        launcher.append(f"--max-restarts={env.get('TORCHELASTIC_MAX_RESTARTS', '0')}")
        script[1:1] = launcher
    elif env.get("WORLD_SIZE", "1") != "1":
        return " ".join(["export", *words])
    return " ".join(["cd", shlex.quote(os.getcwd()), "&&", *words, shlex.join(script)])


def record_failure(log: RunLog, run_id: str, error: BaseException, explained: RunError | None) -> None:
    """Write the `end` event and the RESULT line of a run that failed; explained: None for a bug."""
    if explained:
        exit_code = explained.code
        status = STATUS_OF_CODE.get(exit_code, "error")
    else:
        exit_code = 1
        status = "crashed"
    end = dict(status=status, exit_code=exit_code)
    if explained and explained.command:
        end["command"] = explained.command
    with suppress(OSError):  # a full disk may be what ended it
        log.event("end", step=None, **end)
        log.line("RESULT " + json.dumps(dict(run_id=run_id, **end, message=str(explained or error))))


# ----------------------------------------------------------------------------------------------------------
# 17. MUSEUM
#
# Published ideas that did not pay: knobs and hooks, nothing else. Each docstring says the idea, where it
# comes from and its verdict. Nothing above names anything in here: cut this section and its base of Config
# (section 18), and the baseline trains to the same bits. Below, x is the embedding, z a logit, p the
# progress, g a gradient, w a weight, n the number of blocks.
# ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MuseumKnobs:
    """Published ideas that did not pay."""

    breathing_lr: bool = knob(
        False,
        "Raise the learning rate from 0.1 to 1 until progress 4/19, keep it to 11/19, then fall to 0.1.",
        source="PR #1434",
        effect="-0.012 bpb against cosine, 3 seeds, 120 steps: inside noise",
        fate="rejected",
    )
    whale_lr: bool = knob(
        False,
        "Let the learning rate dive three times, each a steep rise and a long cosine fall to 0.05.",
        source="PR #1434",
        effect="+0.061 bpb against cosine, 3 seeds, 120 steps",
        fate="rejected",
    )
    circadian_lr: bool = knob(
        False,
        "Add a sine of eight periods to the cosine fall, of height 0.15 (1 - progress), and stay above 0.1.",
        source="PR #1434",
        effect="+0.002 bpb against cosine, 3 seeds, 120 steps: inside noise",
        fate="rejected",
    )
    cosmo_lr: bool = knob(
        False,
        "Raise the learning rate from 0.05 to 1 until progress 0.05, then fall as (1 + 20 progress)^(-1/2).",
        source="PR #1434",
        effect="+0.023 bpb against cosine, 3 seeds, 120 steps",
        fate="rejected",
    )
    punctuated_lr: bool = knob(
        False,
        "Keep the learning rate at 0.1 but for bursts up to 1 around progress 1/4, 1/2 and 3/4.",
        source="PR #1434",
        effect="+0.066 bpb against cosine, 3 seeds, 120 steps",
        fate="rejected",
    )
    root_first: bool = knob(
        False,
        "Follow the cosine, and let all but the embedding rise from 0.1 to 1 of it until progress 0.2.",
        source="PR #1434",
        effect="+0.006 bpb against cosine, 3 seeds, 120 steps: inside noise",
        fate="broken",
    )
    coral_lr: bool = knob(
        False,
        "Follow the cosine, and freeze block i of n, from 0, at progress (1 + (i + 1) / n) / 2.",
        source="PR #1434",
        effect="+0.031 bpb against cosine, 3 seeds, 120 steps",
        fate="broken",
    )
    embed_mixup: float = knob(
        0.0,
        "Most that a token's embedding moves towards the one before it, as a share drawn for each; 0 = off.",
        low=0,
        high=0.999,
        source="PR #1434",
        fate="rejected",
    )
    token_drop: float = knob(
        0.0,
        "Share of positions whose embedding is zeroed in training, the rest scaled up; 0 = off.",
        low=0,
        high=0.999,
        source="PR #1434",
        fate="rejected",
    )
    metamorphosis: float = knob(
        0.0,
        "Dropout rate of the embeddings at the start of training, falling to 0 at half of it; 0 = off.",
        low=0,
        high=0.999,
        source="PR #1434",
        fate="broken",
    )
    focal_gamma: float = knob(
        0.0,
        "Exponent of the focal loss (1 - P(target))^gamma; 0 = plain cross entropy.",
        low=0,
        source="PR #1380",
        fate="rejected",
    )
    gamma_anneal: bool = knob(
        False,
        "Let FOCAL_GAMMA fall linearly to 0 over the run.",
        needs="FOCAL_GAMMA!=0",
        source="PR #1434",
        fate="broken",
    )
    label_smooth: float = knob(
        0.0,
        "Share of the loss that goes to all tokens alike (label smoothing); 0 = off.",
        low=0,
        high=1,
        source="PR #1434",
        fate="rejected",
    )
    z_loss: float = knob(
        0.0,
        "Weight of the mean squared log-partition in the loss; 0 = off.",
        low=0,
        source="PR #1434",
        fate="rejected",
    )
    logit_penalty: float = knob(
        0.0,
        "Weight of the mean squared logit in the loss; 0 = off.",
        low=0,
        source="PR #1434",
        fate="rejected",
    )
    logit_temp: float = knob(
        1.0,
        "Temperature that divides the logits in the training loss; 1 = off.",
        low=0.01,
        source="PR #1434",
        fate="not run",
    )
    entropy_bonus: float = knob(
        0.0,
        "Weight of the predictions' mean entropy, added to the loss: it rewards confidence; 0 = off.",
        source="PR #1434",
        fate="not run",
    )
    multi_token: float = knob(
        0.0,
        "Weight of predicting the token after next with the same logits; 0 = off.",
        low=0,
        source="PR #1434",
        fate="broken",
    )
    head_diversity: float = knob(
        0.0,
        "Weight of the mean squared cosine between the heads' parts of the output projections; 0 = off.",
        low=0,
        source="PR #1434",
        fate="broken",
    )
    grad_central: bool = knob(
        False,
        "Take the mean over all axes but the first off each matrix's gradient.",
        source="PR #1434",
        fate="not run",
    )
    mycorrhizal: float = knob(
        0.0,
        "Share of their gradients that blocks three apart exchange, from progress 0.025; 0 = off.",
        source="PR #1434",
        fate="rejected",
    )
    thermal_vent: float = knob(
        0.0,
        "Extra share of the gradients of two random blocks each step, from progress 0.025; 0 = off.",
        source="PR #1434",
        fate="rejected",
    )
    canopy_lr: bool = knob(
        False,
        "Scale the steps of block i of n by 0.3 + 0.7 i / (n - 1).",
        source="PR #1434",
        fate="broken",
    )
    wd_schedule: float = knob(
        0.0,
        "Weight decay of the blocks' matrices at the end of the run, rising from 0; 0 = off.",
        low=0,
        source="PR #1434",
        fate="broken",
    )
    predprey_lr: bool = knob(
        False,
        "Weight decay of the blocks' matrices that swings around 0.01, six times a run, ever less.",
        source="PR #1434",
        fate="broken",
    )
    controlled_burn: float = knob(
        0.0,
        "Share of each matrix's smallest weights that is zeroed every BURN_INTERVAL steps; 0 = off.",
        low=0,
        high=0.999,
        source="PR #1434",
        fate="rejected",
    )
    burn_interval: int = knob(
        50, "Steps between burns.", low=1, needs="CONTROLLED_BURN!=0", source="PR #1434", fate="rejected"
    )
    synaptic_scale: bool = knob(
        False,
        "Draw each matrix's norm back to what it was at progress 0.05, by at most 5 % a step.",
        source="PR #1434",
        fate="broken",
    )
    weight_perturb: float = knob(
        0.0,
        "Noise added to matrices every PERTURB_INTERVAL steps, as a share of their mean magnitude; 0 = off.",
        low=0,
        source="PR #1434",
        fate="rejected",
    )
    perturb_interval: int = knob(
        100,
        "Steps between perturbations.",
        low=1,
        needs="WEIGHT_PERTURB!=0",
        source="PR #1434",
        fate="rejected",
    )
    mutation_decay: float = knob(
        0.0,
        "Noise added to matrices each step from progress 0.05, as a share of their mean magnitude, falling "
        "as exp(-5 progress); 0 = off.",
        low=0,
        source="PR #1434",
        fate="rejected",
    )
    head_prune: float = knob(
        0.0,
        "Share of each block's heads that is zeroed, least norm of the output projection first; 0 = off.",
        low=0,
        high=0.999,
        source="PR #1434",
        fate="not run",
    )
    head_prune_at: float = knob(
        0.25,
        "Progress at which the heads are chosen.",
        low=0,
        high=1,
        needs="HEAD_PRUNE!=0",
        source="PR #1434",
        fate="not run",
    )


# -- Learning-rate curves --------------------------------------------------------------------------------
# Effects are those of 120 steps of a 0.6 M parameter model against COSINE_LR=1, three seeds
# (sweeps/results/study_ideas.md). ROOT_FIRST and CORAL_LR have a hook of the point "lr_share" besides.


@hook("schedule", knob="breathing_lr")
def breathing(cfg: Config, progress: float, steps_left: float) -> float:
    """Breathe in, hold and out as 4 : 7 : 8 (PR #1434). Rejected there; inside noise here."""
    return rise_and_fall(progress, 4 / 19, 11 / 19)


@hook("schedule", knob="whale_lr")
def whale(cfg: Config, progress: float, steps_left: float) -> float:
    """Three dives, each lower than the one before (PR #1434). Rejected there; much worse than cosine here.

    A dive rises in its first tenth and falls by a cosine; the last tenth of the run fades out; 0.05 is the
    least.
    """
    dive_progress = 3 * progress % 1.0
    peak = 0.95 * (1 - 0.3 * progress)
    if dive_progress < 0.1:
        scale = 0.05 + peak * dive_progress / 0.1
    else:
        scale = 0.05 + 0.5 * peak * (1 + math.cos(math.pi * (dive_progress - 0.1) / 0.9))
    fade_out = min(1.0, (1 - progress) / 0.1)
    return max(0.05, scale * fade_out)


@hook("schedule", knob="circadian_lr")
def circadian(cfg: Config, progress: float, steps_left: float) -> float:
    """Days and nights upon the cosine (PR #1434, there by steps: sin(2 pi s / 50) of 400).

    Rejected there; inside noise here.
    """
    wave = 0.15 * (1 - progress) * math.sin(16 * math.pi * progress)
    return max(0.1, cosine_fall(progress) + wave)


@hook("schedule", knob="cosmo_lr")
def cosmo(cfg: Config, progress: float, steps_left: float) -> float:
    """Inflation, then a slow cooling (PR #1434). Rejected there; worse than cosine here."""
    if progress < 0.05:
        return 0.05 + 19 * progress
    return (1 + 20 * progress) ** -0.5


@hook("schedule", knob="punctuated_lr")
def punctuated(cfg: Config, progress: float, steps_left: float) -> float:
    """Stasis and three bursts: 0.1 + 0.9 exp(-(p - c)^2 / 0.005), c the nearest of 1/4, 1/2, 3/4.

    PR #1434, whose code is lost. Rejected there; the worst of the curves here.
    """
    bursts = [math.exp(-200 * (progress - centre) ** 2) for centre in (1 / 4, 2 / 4, 3 / 4)]
    return 0.1 + 0.9 * max(bursts)


@hook("schedule", knob="root_first")
def root_first(cfg: Config, progress: float, steps_left: float) -> float:
    """Root before the shoot: the cosine that the embedding follows from the start, the rest from 0.2 on.

    PR #1434, whose code was the plain cosine. Inside noise here.
    """
    return cosine_fall(progress)


@hook("schedule", knob="coral_lr")
def coral(cfg: Config, progress: float, steps_left: float) -> float:
    """Grow upon a skeleton: the cosine, while the blocks freeze from the first to the last.

    PR #1434, whose code was the plain cosine. Worse than cosine here.
    """
    return cosine_fall(progress)


# -- What training sees ----------------------------------------------------------------------------------


MIXUP_SALT = 1  # of `uniform`; MIRROR_SALT is 0
TOKEN_DROP_SALT = 2
METAMORPHOSIS_SALT = 3


@hook("embedding", knob="embed_mixup")
def embed_mixup(cfg: Config, x: Tensor, ids: Tensor, dials: Dials) -> Tensor:
    """x_t + r (x_(t-1) - x_t) with r ~ U(0, EMBED_MIXUP); the first token has none before it.

    PR #1434: rejected; its first token was mixed with the last one.
    """
    r = (cfg.embed_mixup * uniform(ids, dials.noise, MIXUP_SALT, ids.size(1)))[:, 1:, None]
    return torch.cat((x[:, :1], (1 - r) * x[:, 1:] + r * x[:, :-1]), dim=1)


def dropout(x: Tensor, draws: Tensor, rate: float | Tensor) -> Tensor:
    """x [B, T, d] zeroed where its draw is below the rate, and scaled up to the same mean elsewhere."""
    is_kept = draws.view(*x.shape[:2], -1) >= rate
    return x * (is_kept / (1 - rate)).to(x.dtype)


@hook("input", knob="token_drop")
def token_drop(cfg: Config, x: Tensor, ids: Tensor, dials: Dials) -> Tensor:
    """Dropout of whole positions. PR #1434: rejected."""
    return dropout(x, uniform(ids, dials.noise, TOKEN_DROP_SALT, ids.size(1)), cfg.token_drop)


@hook("input", knob="metamorphosis")
def metamorphosis(cfg: Config, x: Tensor, ids: Tensor, dials: Dials) -> Tensor:
    """Dropout of single numbers, METAMORPHOSIS (1 - 2p), none from p = 1/2. PR #1434: its code is lost."""
    rate = cfg.metamorphosis * (1 - 2 * dials.progress).clamp_min(0)
    return dropout(x, uniform(ids, dials.noise, METAMORPHOSIS_SALT, x[0].numel()), rate)


# -- Terms of the loss -----------------------------------------------------------------------------------


@hook("loss", knob="focal_gamma")
def focal_loss(cfg: Config, seen: Seen) -> Tensor:
    """(1 - P(y))^gamma nats, less the nats (Lin et al. 1708.02002). PR #1380: rejected.

    GAMMA_ANNEAL: gamma (1 - p).
    """
    gamma = cfg.focal_gamma * (1 - cfg.gamma_anneal * seen.progress)
    miss = (-torch.expm1(-seen.nats)).clamp_min(1e-7)
    return ((miss**gamma - 1) * seen.nats).mean()


@hook("loss", knob="label_smooth")
def label_smoothing(cfg: Config, seen: Seen) -> Tensor:
    """(1-e) nats + e mean over v of -log P(v), less the nats. PR #1434: rejected."""
    z = seen.logits
    return cfg.label_smooth * (z.logsumexp(-1) - z.mean(-1) - seen.nats).mean()


@hook("loss", knob="z_loss")
def z_loss(cfg: Config, seen: Seen) -> Tensor:
    """Keep the log-partition near zero (PaLM, arXiv 2204.02311). PR #1434: rejected."""
    return cfg.z_loss * seen.logits.logsumexp(-1).square().mean()


@hook("loss", knob="logit_penalty")
def logit_penalty(cfg: Config, seen: Seen) -> Tensor:
    """Keep all logits small. PR #1434: rejected."""
    return cfg.logit_penalty * seen.logits.square().mean()


@hook("loss", knob="logit_temp")
def logit_temperature(cfg: Config, seen: Seen) -> Tensor:
    """Nats of the logits over a temperature, less the nats; other terms see the logits. PR #1434: not run."""
    return (cross_entropy(seen.logits / cfg.logit_temp, seen.target_ids) - seen.nats).mean()


@hook("loss", knob="entropy_bonus")
def entropy_bonus(cfg: Config, seen: Seen) -> Tensor:
    """Reward confident predictions; negative, uncertain ones. PR #1434: not run; its text is the reverse."""
    z = seen.logits
    return -cfg.entropy_bonus * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


@hook("loss", knob="multi_token")
def multi_token(cfg: Config, seen: Seen) -> Tensor:
    """Nats of the token after next. PR #1434: broken, the last target was counted twice."""
    return cfg.multi_token * cross_entropy(seen.logits[:, :-1], seen.target_ids[:, 1:]).mean()


@hook("loss", knob="head_diversity")
def head_diversity(cfg: Config, seen: Seen) -> Tensor:
    """Mean squared cosine between the heads' input columns of each output projection. PR #1434: broken."""
    total = 0.0
    pairs = max(cfg.num_heads * (cfg.num_heads - 1), 1)
    for block in seen.model.blocks:
        heads = block.attn.proj.weight.unflatten(1, (cfg.num_heads, -1)).transpose(0, 1).flatten(1)
        directions = F.normalize(heads, dim=1)
        cosines = directions @ directions.T
        total = total + (cosines - cosines.diag().diag()).square().sum() / pairs
    return cfg.head_diversity * total / len(seen.model.blocks)


# -- Edits of gradients and weights ----------------------------------------------------------------------


@hook("edit_gradients", knob="grad_central")
def centralise_gradients(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """g - its mean over all axes but the first, of matrices (Yong et al. 2004.01461). PR #1434: not run."""
    for weight in weights:
        if weight.is_dense:
            weight.param.grad.sub_(weight.param.grad.mean(1, True))


@hook("edit_gradients", knob="mycorrhizal")
def exchange_gradients(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """g_i += c g_(i+3) and g_(i+3) += c g_i from p = 0.025, first block to last, so that it cascades.

    PR #1434: rejected.
    """
    if plan.progress < 0.025:
        return
    blocks = blocks_of(weights)
    for near, far in zip(blocks, blocks[3:], strict=False):
        for name in near:
            a = near[name].param.grad
            b = far[name].param.grad
            torch._foreach_add_([a, b], [b.clone(), a.clone()], alpha=cfg.mycorrhizal)


@hook("edit_gradients", knob="thermal_vent")
def heat_random_blocks(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """g (1 + THERMAL_VENT) in two blocks drawn each step, from p = 0.025. PR #1434: rejected."""
    if plan.progress < 0.025:
        return
    blocks = blocks_of(weights)
    for block in random.Random(plan.noise).sample(blocks, min(2, len(blocks))):
        for weight in block.values():
            weight.param.grad.mul_(1 + cfg.thermal_vent)


def kept_heads(cfg: Config, weight: Weight) -> Tensor:
    """[heads] 1 or 0 for a block's output projection: those of least norm are out, from the first call on."""
    if "kept" not in weight.memory:
        size = weight.param.unflatten(1, (cfg.num_heads, -1)).norm(dim=(0, 2))
        least = size.topk(int(cfg.head_prune * cfg.num_heads), largest=False).indices
        weight.memory["kept"] = torch.ones_like(size).index_fill_(0, least, 0)
    return weight.memory["kept"]


def prune_heads(cfg: Config, weights: list[Weight], plan: StepPlan, of_gradients: bool) -> None:
    """Zero the pruned heads' columns of the output projections, or of their gradients."""
    if plan.progress < cfg.head_prune_at:
        return
    for block in blocks_of(weights):
        weight = block["attn.proj.weight"]
        kept = kept_heads(cfg, weight)
        tensor = weight.param.grad if of_gradients else weight.param
        tensor.unflatten(1, (cfg.num_heads, -1)).mul_(kept[:, None])


@hook("edit_gradients", knob="head_prune")
def prune_heads_gradients(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """So that Muon's step does not spread over pruned heads. PR #1434: not run, its code is lost."""
    prune_heads(cfg, weights, plan, of_gradients=True)


@hook("edit_weights", knob="controlled_burn")
def burn_small_weights(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """Zero the smallest weights of each matrix every BURN_INTERVAL steps. PR #1434: rejected."""
    if not is_due(plan.step + 1, cfg.burn_interval):
        return
    for weight in weights:
        if weight.is_dense:
            flat = weight.param.view(-1)
            count = int(cfg.controlled_burn * len(flat))
            flat.index_fill_(0, flat.abs().topk(count, largest=False).indices, 0)


@hook("edit_weights", knob="synaptic_scale")
def hold_norms(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """Pull each matrix's norm to its value at p = 0.05. PR #1434: broken, it cancelled the learning rate."""
    if plan.progress < 0.05:
        return
    for weight in weights:
        if weight.is_dense:
            size = weight.param.norm().clamp_min(1e-12)
            wanted = weight.memory.setdefault("size", size)
            weight.param.mul_((wanted / size).clamp(0.95, 1.05))


def shake(cfg: Config, weights: list[Weight], plan: StepPlan, share: float) -> None:
    """Add share * mean(abs w) * N(0, 1) to each matrix, the same on every rank."""
    if share <= 1e-6:
        return
    for weight in weights:
        if weight.is_dense:
            p = weight.param
            generator = torch.Generator(p.device).manual_seed(draw_seed(cfg.seed, plan.step, weight.name))
            noise = torch.randn(p.shape, generator=generator, device=p.device)
            p.add_(noise * (share * p.abs().mean()))


@hook("edit_weights", knob="weight_perturb")
def perturb_weights(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """Shake every PERTURB_INTERVAL steps. PR #1434: rejected."""
    if is_due(plan.step + 1, cfg.perturb_interval):
        shake(cfg, weights, plan, cfg.weight_perturb)


@hook("edit_weights", knob="mutation_decay")
def mutate_weights(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """Shake by MUTATION_DECAY exp(-5p) from p = 0.05. PR #1434: rejected."""
    if plan.progress >= 0.05:
        shake(cfg, weights, plan, cfg.mutation_decay * math.exp(-5 * plan.progress))


@hook("edit_weights", knob="head_prune")
def prune_heads_weights(cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """Keep pruned heads at zero after the step. PR #1434: not run, its code is lost."""
    prune_heads(cfg, weights, plan, of_gradients=False)


# -- Learning rates and weight decay ---------------------------------------------------------------------


@hook("lr_share", knob="canopy_lr")
def canopy_share(cfg: Config, weight: Weight, progress: float, blocks: int) -> float:
    """Early blocks step less. PR #1434: broken, it scaled the gradient, which Muon ignores."""
    if weight.block is None:
        return 1.0
    return 0.3 + 0.7 * weight.block / max(blocks - 1, 1)


@hook("lr_share", knob="root_first")
def root_first_share(cfg: Config, weight: Weight, progress: float, blocks: int) -> float:
    """All but the embedding rise 0.1 -> 1 until p = 0.2. PR #1434: broken, it was a plain cosine."""
    return 1.0 if weight.role == "embed" else min(1.0, 0.1 + 4.5 * progress)


@hook("lr_share", knob="coral_lr")
def coral_share(cfg: Config, weight: Weight, progress: float, blocks: int) -> float:
    """Block i of n freezes at p = (1 + (i+1)/n) / 2. PR #1434: broken, it was a plain cosine."""
    if weight.block is None:
        return 1.0
    return float(progress < (1 + (weight.block + 1) / blocks) / 2)


@hook("decay", knob="wd_schedule")
def rising_weight_decay(cfg: Config, progress: float) -> float:
    """WD_SCHEDULE p. PR #1434: broken, it left out the learning rate and was far too strong."""
    return cfg.wd_schedule * progress


@hook("decay", knob="predprey_lr")
def swinging_weight_decay(cfg: Config, progress: float) -> float:
    """(1 - (1-p)/2 sin(12 pi p)) / 100. PR #1434: broken, it left out the learning rate."""
    return 0.01 - 0.005 * (1 - progress) * math.sin(12 * math.pi * progress)


# ----------------------------------------------------------------------------------------------------------
# 18. CONFIG AND MAIN
#
# `Config` joins the knobs of all sections; `execute` is a whole run, `main` the command line.
# ----------------------------------------------------------------------------------------------------------
# First words of many programs' variables, as in MAX_JOBS: not taken for a knob of ours misspelt.
COMMON_WORDS = {"DATA", "MAX", "NUM", "OUT", "RUN", "ALLOW", "MODEL", "INIT", "PARALLEL", "LOOP"}
# Words of clusters, as in HEAD_NODE_IP and MLP_WORKER_0_HOST: with one a first word of ours is no family.
CLUSTER_WORDS = {
    "DIR", "FILE", "SCRIPT", "IMAGE", "CONFIG", "JOB", "TASK", "NODE", "WORKER", "ROLE", "GPU", "IP",
    "HOST", "HOSTNAME", "PORT", "ADDR", "ADDRESS", "URL", "URI", "NAME", "ID", "USER", "PROJECT",
    "BUCKET", "REF", "SHA", "BRANCH", "COMMIT",
}  # fmt: skip
FOREIGN = {"MODEL_DIR", "COMPILER"}  # other programs' variables, though a letter from a knob


@dataclass(frozen=True)
class EnvironmentKnobs:
    """How the environment is read."""

    allow_inert: bool = knob(
        False,
        "Warn of a knob that has no effect instead of refusing it.",
        role="place",
        source="ours",
    )
    allow_env: tuple[str, ...] = knob(
        (),
        "Environment variables that look like knobs, comma-separated, to be ignored.",
        role="place",
        source="ours",
    )


@dataclass(frozen=True)
class Config(
    # Bases in reverse: dataclasses take the fields of the last base first.
    EnvironmentKnobs,
    MuseumKnobs,
    TrainKnobs,
    CheckpointKnobs,
    HedgeKnobs,
    ScoreKnobs,
    QuantiseKnobs,
    AverageKnobs,
    OptimiserKnobs,
    LossKnobs,
    ModelKnobs,
    BytesKnobs,
    DataKnobs,
    ScheduleKnobs,
    RuntimeKnobs,
):
    """All knobs of a run.

    Defaults are the official baseline's (openai/parameter-golf train_gpt.py), but for QUANT_SCALE_FLOOR and
    CODEC.
    """

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Read every knob; RunError on a bad value, a clash, a knob without effect or a name that is none."""
        values = {}
        for knob_field in fields(cls):
            name = knob_field.name.upper()
            if name in env:
                values[knob_field.name] = parse_knob(knob_field, env[name])
        cfg = cls(**values)
        refuse_strangers(cfg, env)
        inert = "; ".join(cfg.inert())
        if inert and not cfg.allow_inert:
            raise RunError(f"{inert} (ALLOW_INERT=1 makes this a warning)")
        return cfg

    def __post_init__(self) -> None:
        for knob_field in fields(self):
            check_limits(knob_field, getattr(self, knob_field.name))
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                group.check(self)

    @property
    def changed(self) -> list[Field]:
        """The knobs that are off their default."""
        return [f for f in fields(self) if self.is_changed(f.name)]

    def is_changed(self, name: str) -> bool:
        """Whether a knob, by its field's name, is off its default."""
        return getattr(self, name) != type(self).__dataclass_fields__[name].default

    def overrides(self) -> dict[str, object]:
        """The knobs that are off their defaults, by environment name."""
        return {f.name.upper(): getattr(self, f.name) for f in self.changed}

    def inert(self) -> list[str]:
        """One phrase for each knob off its default that cannot have an effect."""
        phrases = []
        for knob_field in self.changed:
            unmet = self.unmet(knob_field)
            if unmet:
                phrases.append(f"{knob_field.name.upper()} has no effect without {unmet[0]}")
        return phrases

    def unmet(self, knob_field: Field) -> list[Need]:
        """The conditions in a knob's `needs` that do not hold."""
        return unmet_needs(knob_field, vars(self), type(self).__dataclass_fields__)

    def effective(self) -> dict[str, object]:
        """What shapes the result: knobs off their default that act, without seed, paths and so on ("place").

        Defaults are left out, so that a new knob changes no old hash.
        """
        acting = {}
        for knob_field in self.changed:
            if knob_field.metadata["role"] != "place" and not self.unmet(knob_field):
                acting[knob_field.name.upper()] = getattr(self, knob_field.name)
        return acting

    @property
    def hash(self) -> str:
        """Same hash = same experiment, apart from seed, data and machine."""
        text = json.dumps(self.effective(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def shape(self) -> dict[str, object]:
        """The "model" knobs off their default: what an artifact must say to be scored elsewhere."""
        return {f.name: getattr(self, f.name) for f in self.changed if f.metadata["role"] == "model"}


def refuse_strangers(cfg: Config, env: Mapping[str, str]) -> None:
    """RunError on a variable close to a knob's name (difflib ratio >= 0.88) or that begins as two knobs do.

    So JEPA_PRETRAIN_FRAC, which nothing read, was set for JEPA_PURE_FRAC in a published run.
    """
    known = [f.name.upper() for f in fields(cfg)]
    first_words = Counter(name.partition("_")[0] for name in known if "_" in name)
    families = {word for word, count in first_words.items() if count > 1} - COMMON_WORDS
    for name in env:
        if name in known or name in cfg.allow_env or not re.fullmatch(r"[A-Z0-9_]+", name):
            continue
        if name in FOREIGN:
            continue
        near = get_close_matches(name, known, n=1, cutoff=0.88)
        first_word, *other_words = name.split("_")
        is_of_a_family = first_word in families and other_words and CLUSTER_WORDS.isdisjoint(other_words)
        if near or is_of_a_family:
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise RunError(f"{name} is not a knob; {hint} (ALLOW_ENV={name} ignores it)")


def help_text() -> str:
    """The head of this file and all knobs, by the section that declares them."""
    lines = [__doc__]
    if readable_sha256():
        lines.append("This script is packed: train_gpt_readable.py --help says what each knob does.")
    group = ""
    for row in knob_rows(Config):
        if row.group != group:
            group = row.group
            lines.append(f"\n{group}")
        default = row.default if len(row.default) < 42 else "(names)"
        allowed = f" ({row.allowed})" if row.allowed else ""
        lines.append(f"{row.name:36} {default:42} {row.doc}{allowed}")
    return "\n".join(lines)


# -- A run, from knobs to exit code (section 18) ---------------------------------------------------------


def execute(cfg: Config, env: Mapping[str, str]) -> int:
    """One whole run: train, pack, read back from disk, score what was read; or score a given artifact.

    Returns the exit code. What a user may get wrong is checked before the log opens, and raises RunError.
    """
    header = read_header(cfg.eval_only) if cfg.eval_only else None
    if header:
        cfg = artifact_config(cfg, env, header)
    is_restart = env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun --max-restarts
    if is_restart and cfg.resume == "0":
        cfg = replace(cfg, resume="auto")
    if not header:
        check_codec(cfg)
    trains = not header and cfg.iterations > 0
    with Runtime.launch(cfg, env) as runtime:
        inputs = runtime.agree(partial(load_inputs, cfg, runtime.rank, trains))
        before = None
        if trains:
            before = runtime.main_decides(partial(find_checkpoint, cfg, inputs.identity, is_restart))
        if before:
            runtime.dtype = DTYPES[before["dtype"]]
        check_shapes(cfg, header)
        model = make_model(cfg, runtime)
        if trains:
            runtime.on_main(partial(foretell_warm_up, cfg, model, runtime))
        run_id = runtime.main_decides(partial(pick_run_id, cfg, before))
        locks = runtime.on_main(partial(claim_outputs, cfg, run_id))
        run = open_run(cfg, runtime, model, inputs, before, run_id)
        with recorded(run, run_id, env):
            log_header(run, run_id, inputs.training)
            exit_code = complete(run, inputs.training, header, run_id)
        run.checkpoints.clear()
        for lock in locks or []:
            lock.truncate(0)  # the run is finished: what it left is no longer its own
        return exit_code


def read_header(path: str) -> dict:
    """The header of a packed model; RunError (2) if it is none."""
    return unpack(Path(path).read_bytes(), path)[1]


def artifact_config(cfg: Config, env: Mapping[str, str], header: Mapping) -> Config:
    """The config with the artifact's shape; RunError (2) if the environment asks for another one.

    The header lists the shape's knobs off their default, so that a knob added later is at its default there.
    Older artifacts list all knobs of their time.
    """
    source = f"EVAL_ONLY={cfg.eval_only}"
    defaults = {f.name: f.default for f in fields(cfg) if f.metadata["role"] == "model"}
    if not is_own_header(header, defaults):
        raise RunError(f"{source} was made by another version of this script")
    trained = defaults | header["model"]
    for name, value in trained.items():
        asked = getattr(cfg, name)
        if name.upper() in env and asked != value:
            raise RunError(f"{name.upper()}={asked} but {source} was trained with {value}; unset it")
    # Its dtype and whether it was compiled hold too, unless set: either moves the score's fourth digit.
    compiled = cfg.compile if header.get("compile") or "COMPILE" in env else "0"
    dtype = cfg.dtype if "DTYPE" in env else header["dtype"]
    return replace(cfg, **trained, compile=compiled, dtype=dtype)


def is_own_header(header: Mapping, defaults: Mapping[str, object]) -> bool:
    """Whether a packed model's header holds what this version writes, in the same types; it may be forged.

    defaults: of the knobs of a model's shape. A header may lack some of them, and must hold no others.
    """
    stored = header.get("model")
    if not isinstance(stored, dict) or not stored.keys() <= defaults.keys():
        return False
    if any(type(value) is not type(defaults[name]) for name, value in stored.items()):
        return False
    if not all(isinstance(header.get(name), str) for name in ("quant", "codec", "dtype")):
        return False
    return header["codec"] in CODECS and header["dtype"] in DTYPES


@dataclass(frozen=True)
class Inputs:
    """What a run reads, loaded and checked."""

    validation: Validation
    training: TokenStream | None  # None: nothing is trained
    identity: dict[str, object]  # what must be the same when a run goes on: knobs, and hashes of the rest


def load_inputs(cfg: Config, rank: int, trains: bool) -> Inputs:
    """Open the validation text, its bytes proved on rank 0, and, to train, the training shards.

    RunError (2) if they, or the tokenizer, do not fit the knobs.
    """
    validation = load_validation(cfg, load_tokenizer(cfg), prove=rank == 0)
    contents = {"validation text": validation.sha256.encode(), "train_gpt.py": own_source()}
    training = None
    if trains:
        training = TokenStream(cfg.data_path, "train", cfg.vocab_size)
        training.count_windows(cfg.train_seq_len)  # RunError if there are too few tokens for one
        names_and_bounds = [path.name for path in training.paths] + training.bounds.tolist()
        contents["training shards"] = repr(names_and_bounds).encode()
    hashes = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in contents.items()}
    return Inputs(validation, training, cfg.effective() | dict(SEED=cfg.seed) | hashes)


def check_shapes(cfg: Config, header: Mapping | None) -> None:
    """Stop before anything large is made.

    RunError (2) if the artifact's tensors are not the model's, (3) if the model would be far too large.
    """
    with torch.device("meta"):  # takes no memory: knobs, or a forged header, may ask for any amount
        model = GPT(cfg)
        predicted = predict_size(cfg, model) + len(own_source())
        if header:
            stored = {name: torch.empty(shape) for name, shape, _ in header["tensors"]}
            load_weights(model, stored, cfg.eval_only)
    if predicted > SIZE_SLACK * SIZE_LIMIT and not header:
        raise RunError(f"code and model need about {predicted} bytes, the limit is {SIZE_LIMIT}", OVER_SIZE)


def make_model(cfg: Config, runtime: Runtime) -> GPT:
    """The model in host memory, from SEED or INIT_FROM, the same on every rank.

    RunError (2) if INIT_FROM cannot be read or does not fit.
    """
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, runtime.dtype)
    if cfg.init_from:
        state = runtime.agree(partial(load_initial_weights, cfg.init_from))
        load_weights(model, state, f"INIT_FROM={cfg.init_from}")
    return model


def pick_run_id(cfg: Config, before: Mapping | None) -> str:
    """RUN_ID, else that of the run which goes on, else a new one."""
    new_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"
    earlier_id = before.get("run_id", new_id) if before else new_id
    return cfg.run_id or earlier_id


def open_run(
    cfg: Config, runtime: Runtime, model: GPT, inputs: Inputs, before: dict | None, run_id: str
) -> Run:
    """Open the logs and join all that the phases of a run need; only rank 0 writes logs and checkpoints."""
    out = Path(cfg.out_dir)
    is_main = runtime.rank == 0
    log = RunLog(out / "logs" if is_main else None, run_id, goes_on=cfg.resume != "0")
    checkpoint_header = dict(
        kind=CHECKPOINT, run_id=run_id, same=inputs.identity, dtype=runtime.dtype_name, resumed=[]
    )
    has_checkpoints = inputs.training is not None and is_main
    checkpoints = Checkpoints(out / "checkpoints" if has_checkpoints else None, checkpoint_header, before)
    return Run(cfg, runtime, log, model.to(runtime.device), inputs.validation, checkpoints)


def complete(run: Run, stream: TokenStream | None, header: Mapping | None, run_id: str) -> int:
    """Train, pack and score, or what of it is asked for; returns the exit code.

    stream: None to train nothing. header: that of the artifact to score, None to pack the model.
    """
    if stream:
        trained = train(run, Optimisers(run.cfg, run.model, run.runtime), stream)
    else:
        run.settle(partial(warm_evaluation, run))
        trained = Trained() if header else Trained(score=validate(run, 0, 0.0))
    calibration = calibrate(run, stream, trained)
    artifact = packed_before(run.cfg, header) if header else pack_artifact(run, calibration)
    scores = score_artifact(run, artifact)
    return finish(run, trained, artifact, scores, run_id)


def packed_before(cfg: Config, header: Mapping) -> Artifact:
    """The artifact that EVAL_ONLY names."""
    path = Path(cfg.eval_only)
    return Artifact(str(path), header["quant"], header["codec"], path.stat().st_size, len(own_source()))


def pack_artifact(run: Run, calibration: Calibration) -> Artifact:
    """Pack the model into OUT_DIR, on rank 0, and log what came of it."""
    cfg = run.cfg
    code_bytes = len(own_source())
    path = Path(cfg.out_dir, MODEL_FILE)
    model_bytes = run.runtime.main_decides(partial(save_model, run, path, calibration))
    artifact = Artifact(str(path), quant_name(cfg), cfg.codec, model_bytes, code_bytes)
    run.log.event("artifact", **artifact.facts())
    return artifact


REPORTS = ("--dry-run", "--doctor", "--list-ideas", "--knob-table")  # made by sweeps/lab/show.py


def describe_version() -> str:
    """This script's version and the hash of its bytes, as the `config` event and RESULT have them."""
    return f"train_gpt.py {VERSION} sha256:{hashlib.sha256(own_source()).hexdigest()}"


def run_command(arguments: list[str], env: Mapping[str, str]) -> int:
    """Do what the command line asks for; returns the exit code. RunError on an argument that is none."""
    if not arguments:
        return execute(Config.from_env(env), env)
    if arguments in (["--help"], ["-h"]):
        print(help_text())
        return 0
    if arguments == ["--version"]:
        print(describe_version())
        return 0
    if len(arguments) == 1 and arguments[0] in REPORTS:
        report = arguments[0].removeprefix("--").replace("-", "_")
        return load_tool("sweeps/lab/show.py")[report](env)
    raise RunError(f"unknown argument {arguments}: knobs are environment variables; --help")


def main() -> None:
    """Run the command line; an error that a user can meet is one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what an ASCII console lacks is no error
    is_rank = "LOCAL_RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        import_compiler(os.environ)
        code = run_command(sys.argv[1:], os.environ)
        print(end="", flush=True)
    except BrokenPipeError:
        mute(sys.stdout)
        code = CLOSED_PIPE
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None and not is_rank:
            raise
        if explained is None:
            sys.excepthook(type(error), error, error.__traceback__)
        elif explained.lone_rank or os.environ.get("RANK", "0") == "0":
            print_error(explained)
        code = explained.code if explained else 1
    if is_rank:
        # At a plain exit a thread of gloo's can abort (pytorch PR #179291), or wait for a rank that is gone.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def print_error(error: RunError) -> None:
    """Say on stderr, in one line, what ended the run; the command that goes on, if any, is the last line."""
    lines = ["error: " + " ".join(str(error).splitlines())]
    if error.command:
        lines.append(error.command)
    try:
        print("\n".join(lines), file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone, as after SIGHUP
        mute(sys.stderr)


if __name__ == "__main__":
    main()
