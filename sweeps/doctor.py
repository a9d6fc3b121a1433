"""`python train_gpt.py --doctor`: what a run with this environment needs, and what this machine has."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from train_gpt import CODECS, GPT, Config, Runtime, attend, describe_machine, load_inputs, require


def examine(cfg: Config, runtime: Runtime) -> Iterator[tuple[str, bool, Callable[[], str]]]:
    """(what a run needs, whether it cannot do without, function that says what is here or raises)."""

    def ask(good: bool, found: object, mend: str) -> str:
        require(good, f"{found}; {mend}")
        return str(found)

    def attention() -> str:
        heads, like = (cfg.num_heads, cfg.num_kv_heads), dict(device=runtime.device, dtype=runtime.dtype)
        q, k = (torch.randn(2, count, 256, cfg.head_dim, **like) for count in heads)
        off = (attend(q, k, k).cpu().double() - attend(*(x.cpu().double() for x in (q, k, k)))).abs().max()
        return ask(off < 0.05, f"{machine['attention']}, off by {off:.0e}", "update torch or the driver")

    def folder() -> str:
        out = Path(cfg.out_dir).absolute()
        there = next(path for path in (out, *out.parents) if path.exists())
        need, free = 60 * sum(p.numel() for p in GPT(cfg).parameters()), shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there):
            return ask(free > need, f"{free / 1e9:.1f} GB free at {there}", f"a run takes {need / 1e9:.1f}")

    machine, version, inputs = describe_machine(runtime), torch.__version__, []
    gpu, backends = runtime.is_cuda, [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")), "no C++ compiler")
    yield "python", True, lambda: ask(sys.version_info >= (3, 10), machine["python"], "needs 3.10 or newer")
    yield "torch", False, lambda: ask((2, 5) <= version < (2, 14), version, "written for 2.5 to 2.13")
    yield "device", False, lambda: ask(gpu, machine["device"], "a GPU is far faster")
    yield "compute", False, lambda: ask(machine["dtype"] == "bf16", machine["dtype"], "bf16 is faster")
    yield "attention", True, attention
    yield "compile", False, lambda: ask(gpu or compiler[:3] != "no ", compiler, "runs are eager, slower")
    yield "codec", True, lambda: CODECS[cfg.codec][1](CODECS[cfg.codec][0](b"works", cfg), 5).decode()
    yield "data", True, lambda: inputs.extend(load_inputs(cfg, 0, False)) or f"{inputs[0].targets} targets"
    yield "disk", True, folder
    yield "ranks", gpu, lambda: ask("nccl" in backends or not gpu, " ".join(backends), "no nccl: one GPU")


def doctor(cfg: Config) -> int:
    """Print what a run needs and what is here: ok, warn, or fail, with the mend. Returns the exit code."""
    worst = 0
    with Runtime.launch(replace(cfg, compile="0"), {}) as runtime:
        for what, needed, look in examine(cfg, runtime):
            try:
                verdict, found = "ok", look()
            except Exception as error:  # whatever breaks is what it looks for
                verdict, found = "fail" if needed else "warn", str(error) or type(error).__name__
            worst = max(worst, 2 * (verdict == "fail"))
            print(f"{verdict:5}{what:10}{found}")
    return worst
