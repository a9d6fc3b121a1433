"""What `python train_gpt.py` shows without a run: --list-ideas, --knob-table, --dry-run and --doctor, each by
the function of that name. They take the environment and return the exit code."""

import os
import shutil
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from train_gpt import (
    CODECS,
    GPT,
    SIZE_LIMIT,
    Config,
    Runtime,
    attend,
    describe_machine,
    knob_rows,
    load_inputs,
    micro_batch_limit,
    own_source,
    predict_size,
    predict_steps_left,
    require,
    training_loss,
)


def list_ideas(_: Mapping[str, str]) -> int:
    """Every published idea: how it fared at its source, and what it does here."""
    print("p: progress 0..1, LR: multiplier of all learning rates, g: gradient, w: weight, z: logit.\n")
    rows = [row for row in knob_rows() if row[4]]
    for name, _, _, doc, there, source in [("idea", "", "", "here", "there", "source"), *rows]:
        print(f"{name:17} {there:9} {source:9} {doc}")
    return 0


def knob_table(_: Mapping[str, str]) -> int:
    """The README's table, in Markdown."""
    print("| knob | default | allowed | meaning |\n|---|---|---|---|")
    for name, default, allowed, doc, *_ in knob_rows():
        print(f"| {name} | {f'`{default}`' if default else ''} | {allowed} | {doc} |")
    return 0


def dry_run(env: Mapping[str, str]) -> int:
    """What the run would be. Only a backward pass on blank tokens is timed; nothing is written."""
    cfg = Config.from_env(env)
    with Runtime.launch(replace(cfg, compile="0"), {}) as runtime:
        model = GPT(cfg, runtime.dtype).to(runtime.device)
        limit = min(micro_batch_limit(cfg, runtime.device), cfg.sequences)
        ids = torch.zeros(limit, cfg.train_seq_len, dtype=torch.int64, device=runtime.device)
        loss = partial(training_loss(cfg, model), ids, ids)
        tries = timeit.repeat(lambda: (loss()[0].backward(), runtime.synchronize()), number=1, repeat=3)
        step_seconds = min(tries) * cfg.sequences / limit
        size, code = predict_size(cfg, model), len(own_source())
        facts = [*(f"{name}={value}" for name, value in cfg.effective().items()), f"config_hash: {cfg.hash}"]
        count, ms = sum(p.numel() for p in model.parameters()), 1000 * step_seconds
        facts += [f"model_params: {count}", f"flops_per_step: {step_flops(cfg, model):.4g}"]
        facts += [f"predicted_artifact_bytes: {size} + code {code} = {size + code} of {SIZE_LIMIT}"]
        facts += [f"predicted_steps: {predict_steps_left(cfg, 0, 0.0, step_seconds):.0f} at {ms:.0f} ms"]
        facts += [f"predicted_for: one eager process on {describe_machine(runtime)['device']}"]
    print("\n".join(facts))
    return 0


def step_flops(cfg: Config, model: GPT) -> float:
    """Training FLOPs of a step; a token costs 6 * weights that multiply it + 12 * d * attentions * (T/2)."""
    passes, blocks = 1 + cfg.attn_recycle, [model.blocks[block] for block, *_ in model.layers]
    parts = [model.tok_emb, *(b.mlp for b in blocks), *(b.attn for b in passes * blocks)]  # table = head
    weights = sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 2)
    attention = 12 * cfg.model_dim * (cfg.train_seq_len / 2) * len(model.layers) * passes
    return cfg.train_batch_tokens * (6.0 * weights + attention)


def examine(cfg: Config, runtime: Runtime) -> Iterator[tuple[str, bool, Callable[[], str]]]:
    """(what a run needs, whether it cannot do without, function that says what is here or raises)."""

    def ask(good: bool, found: object, mend: str) -> str:
        require(good, f"{found}; {mend}")
        return str(found)

    def attention() -> str:
        heads, like = (cfg.num_heads, cfg.num_kv_heads), dict(device=runtime.device, dtype=runtime.dtype)
        q, k = (torch.randn(2, count, 256, cfg.head_dim, **like) for count in heads)
        exact = attend(*(x.cpu().double() for x in (q, k, k)))
        off = (attend(q, k, k).cpu().double() - exact).abs().max()
        return ask(off < 0.05, f"{machine['attention']}, off by {off:.0e}", "update torch or the driver")

    def folder() -> str:
        out = Path(cfg.out_dir).absolute()
        there = next(path for path in (out, *out.parents) if path.exists())
        need, free = 60 * sum(p.numel() for p in GPT(cfg).parameters()), shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there):
            return ask(free > need, f"{free / 1e9:.1f} GB free at {there}", f"a run takes {need / 1e9:.1f}")

    def codec() -> str:
        chosen = CODECS[cfg.codec]
        return chosen.decompress(chosen.compress(b"works", cfg), 5).decode()

    def data() -> str:
        inputs = load_inputs(cfg, 0, trains=not cfg.eval_only)
        val, train = inputs.validation, inputs.training
        return f"{len(train) if train else 0} training tokens, {val.targets} scored ones of {val.bytes} bytes"

    machine, version = describe_machine(runtime), torch.__version__
    gpu, backends = runtime.is_cuda, [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")), "no C++ compiler")
    yield "python", True, lambda: ask(sys.version_info >= (3, 10), machine["python"], "needs 3.10 or newer")
    yield "torch", False, lambda: ask((2, 5) <= version < (2, 14), version, "written for 2.5 to 2.13")
    yield "device", False, lambda: ask(gpu, machine["device"], "a GPU is far faster")
    yield "compute", False, lambda: ask(machine["dtype"] == "bf16", machine["dtype"], "bf16 is faster")
    yield "attention", True, attention
    yield "compile", False, lambda: ask(gpu or compiler[:3] != "no ", compiler, "runs are eager, slower")
    yield "codec", True, codec
    yield "data", True, data
    yield "disk", True, folder
    yield "ranks", gpu, lambda: ask("nccl" in backends or not gpu, " ".join(backends), "no nccl: one GPU")


def doctor(env: Mapping[str, str]) -> int:
    """Print what a run needs and what is here: ok, warn, or fail, with the mend. Returns the exit code."""
    cfg, worst = Config.from_env(env), 0
    with Runtime.launch(replace(cfg, compile="0"), {}) as runtime:
        for what, needed, look in examine(cfg, runtime):
            try:
                verdict, found = "ok", look()
            except Exception as error:  # whatever breaks is what it looks for
                verdict, found = "fail" if needed else "warn", str(error) or type(error).__name__
            worst = max(worst, 2 * (verdict == "fail"))
            print(f"{verdict:5}{what:10}{found}")
    return worst
