"""What `python train_gpt.py` shows without a run: --list-ideas, --knob-table, --dry-run and --doctor.

Each is made by the function of that name, which takes the environment and returns the exit code.
"""

import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from data.shards import FEW_VAL_TOKENS, val_bpb_doubt
from train_gpt import (
    CODECS,
    GPT,
    SIZE_LIMIT,
    Config,
    RunError,
    Runtime,
    attend,
    compile_cache_fault,
    describe_machine,
    duration_text,
    knob_rows,
    load_inputs,
    own_source,
    predict_size,
    predict_steps_left,
    time_step,
    warm_up_seconds,
)

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 80  # of a plain terminal
# What data/pydocs.py builds, which run_best.sh takes where FineWeb is not here.
EMBEDDED = ROOT / "data/datasets/pydocs_sp1024"
EMBEDDED_TOKENIZER = ROOT / "data/tokenizers/pydocs_1024_bpe.model"
BYTES_PER_WEIGHT_OF_A_RUN = 60  # two checkpoints with optimiser state and averages, and both model files


def list_ideas(_: Mapping[str, str]) -> int:
    """Every published idea: how it fared at its source, what it does, and what it was measured to do here."""
    print("How an idea fared where it was published, what it does, what it did here.\n")
    print(f"{'idea':17} {'there':9} source")
    for row in knob_rows(Config):
        if row.fate:
            print_wrapped(f"{row.name:17} {row.fate:9} {row.source}", later_indent=28)
            print_wrapped(row.doc, indent=4)
            if row.effect:
                print_wrapped(f"here: {row.effect}", indent=4)
    return 0


def print_wrapped(text: str, indent: int = 0, later_indent: int | None = None) -> None:
    """Print a text in lines that fit a plain terminal; the ones after the first may stand further in."""
    later = indent if later_indent is None else later_indent
    # A column of spaces stays as it is: only the ends of lines move.
    lines = textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=" " * indent,
        subsequent_indent=" " * later,
        break_on_hyphens=False,
    )
    print("\n".join(lines))


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
        machine = describe_machine(runtime)["device"]
        model_bytes = predict_size(cfg, model)
        code_bytes = len(own_source())
        print(f"model_params: {sum(param.numel() for param in model.parameters())}")
        print(
            f"predicted_artifact_bytes: {model_bytes} + code {code_bytes} = {model_bytes + code_bytes} "
            f"of {SIZE_LIMIT}",
            flush=True,
        )
        if sys.stderr.isatty():
            print("a pass is timed: usually 1 to 30 s", file=sys.stderr)
        step_seconds = time_step(cfg, model, runtime)
    steps = max(1.0, predict_steps_left(cfg, 0, 0.0, step_seconds))  # one always runs
    print(f"predicted_steps: {steps:.0f} at {1000 * step_seconds:.0f} ms")
    print(
        f"predicted_time: {duration_text(steps * step_seconds)} of training, after a warm-up of "
        f"{duration_text(warm_up_seconds(cfg, step_seconds))} and before the scores"
    )
    print(f"predicted_for: one eager process on {machine}")
    print(f"flops_per_step: {step_flops(cfg, model):.4g}")
    print(f"config_hash: {cfg.hash}")
    for name, value in cfg.effective().items():
        print(f"{name}={value}")
    return 0


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

    def __init__(self, cfg: Config, runtime: Runtime, env: Mapping[str, str]):
        self.cfg = cfg
        self.env = env
        self.runtime = runtime
        self.machine = describe_machine(runtime)
        self.inputs = None  # that `data` found

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
            Check("text", False, self.text),
            Check("disk", True, self.disk),
            Check("ranks", self.runtime.is_cuda, self.ranks),
        ]

    def python(self) -> str:
        return expect(sys.version_info >= (3, 10), self.machine["python"], "needs 3.10 or newer")

    def torch(self) -> str:
        version = torch.__version__  # a TorchVersion, which compares with tuples
        return expect((2, 5) <= version < (2, 14), version, "written for 2.5 to 2.13")

    def device(self) -> str:
        return expect(self.runtime.is_cuda, self.machine["device"], "a CUDA GPU is far faster")

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
        """A folder for what torch.compile makes, and a C++ compiler on a CPU; a GPU's is tried, by Triton."""
        cache_fault = compile_cache_fault(self.env, self.runtime.device.type)
        expect(not cache_fault, cache_fault, "runs are eager, slower")
        if self.runtime.is_cuda:
            ones = torch.ones(8, device=self.runtime.device)
            doubled = torch.compile(torch.add, fullgraph=True)(ones, ones)
            is_right = bool((doubled == 2).all())
            return expect(is_right, "Triton", "its kernels are wrong; update the driver")
        names = (os.environ.get("CXX", "g++"), "g++", "clang++")
        found = [name for name in names if shutil.which(name)]
        return expect(bool(found), found[0] if found else "no C++ compiler", "runs are eager, slower")

    def codec(self) -> str:
        codec = CODECS[self.cfg.codec]
        packed = codec.compress(b"works", self.cfg)
        return codec.decompress(packed, len(b"works")).decode()

    def data(self) -> str:
        """The shards that the run would read, and where run_best.sh took them from if nobody named them."""
        self.inputs = load_inputs(self.cfg, 0, trains=not self.cfg.eval_only)
        val = self.inputs.validation
        train_tokens = len(self.inputs.training) if self.inputs.training else 0
        text = f"{train_tokens} training tokens, {val.targets} scored ones of {val.bytes} bytes"
        if self.cfg.data_path == str(EMBEDDED):
            text = (
                f"the embedded corpus, as run_best.sh takes it where FineWeb is not here: {text}; for "
                f"train_gpt.py alone: DATA_PATH={EMBEDDED} TOKENIZER_PATH={EMBEDDED_TOKENIZER}"
            )
        return text

    def text(self) -> str:
        """Whether enough of it is held out: the score is a mean over its tokens."""
        if not self.inputs:
            raise RunError("no validation text to judge")
        val = self.inputs.validation
        doubt = val_bpb_doubt(val.targets, val.bytes)
        text = f"a score on it is sure to about {doubt:.4f} bpb"
        return expect(
            val.targets >= FEW_VAL_TOKENS, text, "hold more out: data/tokenize_docs.py --val-fraction"
        )

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


def choose_data(cfg: Config, env: Mapping[str, str]) -> Config:
    """The config with the data that run_best.sh takes: as named, else FineWeb if here, else the embedded."""
    if "DATA_PATH" in env or "TOKENIZER_PATH" in env:
        return cfg
    fineweb = ROOT / cfg.data_path
    tokenizer = ROOT / cfg.tokenizer_path
    shards_are_here = all(any(fineweb.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
    if not (shards_are_here and tokenizer.is_file()) and EMBEDDED.is_dir():
        return replace(cfg, data_path=str(EMBEDDED), tokenizer_path=str(EMBEDDED_TOKENIZER))
    return replace(cfg, data_path=str(fineweb), tokenizer_path=str(tokenizer))


def doctor(env: Mapping[str, str]) -> int:
    """Print what a run needs and what is here: ok, warn, or fail, with the mend. Returns the exit code."""
    cfg = choose_data(Config.from_env(env), env)
    exit_code = 0
    with Runtime.launch(replace(cfg, compile="0"), {}) as runtime:
        for check in Doctor(cfg, runtime, env).checks():
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
