"""What `python train_gpt.py` shows without a run: --list-ideas, --knob-table, --dry-run and --doctor.

Each is made by the function of that name, which takes the environment and returns the exit code.
"""

import os
import shutil
import sys
import tempfile
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from train_gpt import (
    CODECS,
    GPT,
    SIZE_LIMIT,
    Config,
    RunError,
    Runtime,
    attend,
    describe_machine,
    knob_rows,
    load_inputs,
    micro_batch_limit,
    own_source,
    predict_size,
    predict_steps_left,
    training_loss,
)

BYTES_PER_WEIGHT_OF_A_RUN = 60  # two checkpoints with optimiser state and averages, and both model files


def list_ideas(_: Mapping[str, str]) -> int:
    """Every published idea: how it fared at its source, what it does, and what it was measured to do here."""
    print(
        "How an idea fared where it was published, and below it what it does and was measured to do here.\n"
    )
    print(f"{'idea':17} {'there':9} source")
    for row in knob_rows(Config):
        if row.fate:
            print(f"{row.name:17} {row.fate:9} {row.source}")
            print(f"    {row.doc}")
            if row.effect:
                print(f"    here: {row.effect}")
    return 0


def knob_table(_: Mapping[str, str]) -> int:
    """The page of knobs, in Markdown: a table for each section of train_gpt.py that declares some."""
    group = ""
    for row in knob_rows(Config):
        if row.group != group:
            group = row.group
            print(f"\n### {group}\n")
            print("| knob | default | allowed | what it does | from |\n|---|---|---|---|---|")
        default = f"`{row.default}`" if row.default else ""
        effect = f" Measured here: {row.effect}." if row.effect else ""
        print(f"| {row.name} | {default} | {row.allowed} | {row.doc}{effect} | {row.source} |")
    return 0


def dry_run(env: Mapping[str, str]) -> int:
    """What the run would be. Only a backward pass on blank tokens is timed; nothing is written."""
    cfg = Config.from_env(env)
    with Runtime.launch(replace(cfg, compile="0"), {}) as runtime:
        model = GPT(cfg, runtime.dtype).to(runtime.device)
        step_seconds = time_step(cfg, model, runtime)
        machine = describe_machine(runtime)["device"]
    model_bytes = predict_size(cfg, model)
    code_bytes = len(own_source())
    steps = predict_steps_left(cfg, 0, 0.0, step_seconds)
    print(f"model_params: {sum(param.numel() for param in model.parameters())}")
    print(
        f"predicted_artifact_bytes: {model_bytes} + code {code_bytes} = {model_bytes + code_bytes} "
        f"of {SIZE_LIMIT}"
    )
    print(f"predicted_steps: {steps:.0f} at {1000 * step_seconds:.0f} ms")
    print(f"predicted_for: one eager process on {machine}")
    print(f"flops_per_step: {step_flops(cfg, model):.4g}")
    print(f"config_hash: {cfg.hash}")
    for name, value in cfg.effective().items():
        print(f"{name}={value}")
    return 0


def time_step(cfg: Config, model: GPT, runtime: Runtime) -> float:
    """Seconds of a step of one process, from the best of three backward passes on blank tokens."""
    sequences = min(micro_batch_limit(cfg, runtime.device), cfg.sequences)
    ids = torch.zeros(sequences, cfg.train_seq_len, dtype=torch.int64, device=runtime.device)
    loss = training_loss(cfg, model)

    def backward() -> None:
        loss(ids, ids)[0].backward()
        runtime.synchronize()

    return min(timeit.repeat(backward, number=1, repeat=3)) * cfg.sequences / sequences


def step_flops(cfg: Config, model: GPT) -> float:
    """Training FLOPs of a step; a token costs 6 * weights that multiply it + 12 * d * attentions * (T/2)."""
    attentions = 2 if cfg.attn_recycle else 1
    layers = model.plans[-1]
    weights = matrix_weights(model.tok_emb)  # as the output head
    for layer in layers:
        block = model.blocks[layer.block]
        weights += matrix_weights(block.mlp) + attentions * matrix_weights(block.attn)
    scores = 12 * cfg.model_dim * (cfg.train_seq_len / 2) * len(layers) * attentions
    return cfg.train_batch_tokens * (6.0 * weights + scores)


def matrix_weights(module: torch.nn.Module) -> int:
    """How many weights its matrices have."""
    return sum(param.numel() for param in module.parameters() if param.ndim == 2)


# -- The doctor ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Something that a run needs or is better with."""

    name: str
    is_needed: bool
    look: Callable[[], str]  # says what is here, or raises, with the mend


def expect(is_good: bool, what: object, mend: str) -> str:
    """What was found, as text; RunError with the mend if it will not do."""
    if not is_good:
        raise RunError(f"{what}; {mend}")
    return str(what)


class Doctor:
    """The looks of --doctor; each says what is here or raises."""

    def __init__(self, cfg: Config, runtime: Runtime):
        self.cfg = cfg
        self.runtime = runtime
        self.machine = describe_machine(runtime)

    def checks(self) -> list[Check]:
        """All of them, in the order in which they are told."""
        return [
            Check("python", True, self.python),
            Check("torch", False, self.torch),
            Check("device", False, self.device),
            Check("compute", False, self.compute),
            Check("attention", True, self.attention),
            Check("compile", False, self.compiler),
            Check("codec", True, self.codec),
            Check("data", True, self.data),
            Check("disk", True, self.disk),
            Check("ranks", self.runtime.is_cuda, self.ranks),
        ]

    def python(self) -> str:
        return expect(sys.version_info >= (3, 10), self.machine["python"], "needs 3.10 or newer")

    def torch(self) -> str:
        version = torch.__version__  # a TorchVersion, which compares with tuples
        return expect((2, 5) <= version < (2, 14), version, "written for 2.5 to 2.13")

    def device(self) -> str:
        return expect(self.runtime.is_cuda, self.machine["device"], "a GPU is far faster")

    def compute(self) -> str:
        dtype = self.machine["dtype"]
        return expect(dtype == "bf16", dtype, "bf16 is faster")

    def attention(self) -> str:
        """Attention on this device against float64 on the CPU."""
        like = dict(device=self.runtime.device, dtype=self.runtime.dtype)
        q = torch.randn(2, self.cfg.num_heads, 256, self.cfg.head_dim, **like)
        k = torch.randn(2, self.cfg.num_kv_heads, 256, self.cfg.head_dim, **like)
        exact = attend(q.cpu().double(), k.cpu().double(), k.cpu().double())
        error = (attend(q, k, k).cpu().double() - exact).abs().max()
        text = f"{self.machine['attention']}, off by {error:.0e}"
        return expect(error < 0.05, text, "update torch or the driver")

    def compiler(self) -> str:
        """A C++ compiler, which torch.compile needs on a CPU."""
        names = (os.environ.get("CXX", "g++"), "g++", "clang++")
        found = [name for name in names if shutil.which(name)]
        is_good = self.runtime.is_cuda or bool(found)
        return expect(is_good, found[0] if found else "no C++ compiler", "runs are eager, slower")

    def codec(self) -> str:
        codec = CODECS[self.cfg.codec]
        packed = codec.compress(b"works", self.cfg)
        return codec.decompress(packed, len(b"works")).decode()

    def data(self) -> str:
        inputs = load_inputs(self.cfg, 0, trains=not self.cfg.eval_only)
        val = inputs.validation
        train_tokens = len(inputs.training) if inputs.training else 0
        return f"{train_tokens} training tokens, {val.targets} scored ones of {val.bytes} bytes"

    def disk(self) -> str:
        out = Path(self.cfg.out_dir).absolute()
        existing = next(path for path in (out, *out.parents) if path.exists())
        weights = sum(param.numel() for param in GPT(self.cfg).parameters())
        need = BYTES_PER_WEIGHT_OF_A_RUN * weights
        free = shutil.disk_usage(existing).free
        with tempfile.TemporaryFile(dir=existing):  # raises where nothing may be written
            return expect(
                free > need, f"{free / 1e9:.1f} GB free at {existing}", f"a run takes {need / 1e9:.1f}"
            )

    def ranks(self) -> str:
        backends = [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
        is_good = "nccl" in backends or not self.runtime.is_cuda
        return expect(is_good, " ".join(backends), "no nccl: one GPU")


def doctor(env: Mapping[str, str]) -> int:
    """Print what a run needs and what is here: ok, warn, or fail, with the mend. Returns the exit code."""
    cfg = Config.from_env(env)
    exit_code = 0
    with Runtime.launch(replace(cfg, compile="0"), {}) as runtime:
        for check in Doctor(cfg, runtime).checks():
            try:
                verdict = "ok"
                text = check.look()
            except Exception as error:  # whatever breaks is what it looks for
                verdict = "fail" if check.is_needed else "warn"
                text = str(error) or type(error).__name__
            if verdict == "fail":
                exit_code = 2
            print(f"{verdict:5}{check.name:10}{text}")
    return exit_code
