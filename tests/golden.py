"""Prove that two versions of train_gpt.py compute the same numbers, bit for bit.

    python tests/golden.py OLD NEW                     each a git revision, a folder or a script's path
    python tests/golden.py 63734d8 .                   the working tree, with what is not committed
    python tests/golden.py 63734d8 . --only swa,ttt    some configurations; --list names them all
    python tests/golden.py OLD NEW --fresh             run again what an earlier call has stored

Each configuration is a tiny run on the CPU (or several in turn: train, stop, go on), started as a user
starts it, by environment variables. The tool uses no name inside the script: it reads the logs, the RESULT
line and the model files, and sees the optimisers through torch's own hook. It compares
- every training loss, validation and score, with all their digits,
- the gradients' norm and their sha256, and that of the weights, before each step of each optimiser,
- the tensors of final_model.pt and the integers, steps and table of the artifact,
- the official log lines, the events, RESULT and the exit code, without times, sizes of code and the machine.
What NEW adds (a key, an event, a log line that is no warning) is no difference; what OLD has must be there.

All runs are eager, in float32 or bf16, on one thread, since there the order of every sum is fixed. Compiled
runs are left to other tests: a compiler may fuse the same model, written another way, into other sums.

Results are stored under ~/.cache/parameter-golf-golden by the sha256 of script, configuration and this file.
Exit codes: 0 all equal, 1 a difference, 2 bad use.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("GOLDEN_CACHE", "~/.cache/parameter-golf-golden")).expanduser()
LONGEST_RUN = 300.0  # seconds; a run that takes longer hangs, and is killed
PATIENCE = 60.0  # seconds that the other ranks have once one has failed
RUN_ID = "golden"


class UsageError(Exception):
    """The tool was called wrongly; it ends with one line and exit code 2."""


class ToolError(Exception):
    """The tool itself failed and says nothing about the versions; it ends with exit code 2."""


# The configurations.


@dataclass(frozen=True)
class Part:
    """One start of the script; the parts of a configuration share a folder."""

    knobs: dict[str, object]
    ranks: int = 1
    expect: int = 0
    """The exit code that it must have, so that two versions that both fail do not pass as equal."""
    stop_after: int = 0
    """SIGTERM is sent as Adam begins this step, counted from the first of the warm-up; 0 = never."""


SIZES = dict(
    VOCAB_SIZE=320,
    NUM_LAYERS=3,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    TRAIN_SEQ_LEN=32,
    TRAIN_BATCH_TOKENS=512,
)
LENGTH = dict(
    ITERATIONS=20,
    WARMUP_STEPS=1,
    MAX_WALLCLOCK_SECONDS=0,
    MUON_MOMENTUM_WARMUP_STEPS=12,
    VAL_LOSS_EVERY=10,
    TRAIN_LOG_EVERY=1,
)
PLACE = dict(
    DATA_PATH="data",
    TOKENIZER_PATH="data/tokenizer.model",
    RUN_ID=RUN_ID,
    DEVICE="cpu",
    DTYPE="fp32",
    COMPILE=0,
)
WARMDOWN = dict(WARMDOWN_ITERS=8)
# Matrices of at most 65,536 values stay float16; at this width, one block's all become integers.
WIDE = dict(NUM_LAYERS=1, MODEL_DIM=264, NUM_KV_HEADS=4, TRAIN_BATCH_TOKENS=128, ITERATIONS=10)


def preset(name: str) -> dict[str, object]:
    """The knobs of sweeps/presets/NAME.env; a later line wins."""
    path = ROOT / "sweeps" / "presets" / f"{name}.env"
    words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    return dict(word.split("=", 1) for word in words)


def run_of(*knobs: dict[str, object], ranks: int = 1, expect: int = 0, stop_after: int = 0, **more) -> Part:
    """A tiny run; later knobs win. Its warm-down is the official one, far longer than the run."""
    chosen = SIZES | LENGTH | PLACE
    for some in [*knobs, more]:
        chosen = chosen | some
    return Part(chosen, ranks, expect, stop_after)


def flat_run(*knobs: dict[str, object], **more) -> Part:
    """A tiny run whose warm-down is shortened with it."""
    return run_of(WARMDOWN, *knobs, **more)


def scaled_preset(name: str, **more: object) -> list[Part]:
    """The preset at CPU size: its sizes and cadences give way to the tiny ones, all else stays."""
    return [Part(preset(name) | SIZES | LENGTH | PLACE | more)]


REPEATS = dict(NUM_LAYERS=2, NUM_REPEATS=3, PROG_DEPTH="0.4:1,0.65:2,1.0:3")
INPUT_IDEAS = dict(
    DATA_SHUFFLE=1,
    MIRROR_TRAIN=0.3,
    EMBED_MIXUP=0.2,
    TOKEN_DROP=0.1,
    METAMORPHOSIS=0.2,
    EMBED_SCALE=2.0,
)
LOSS_IDEAS = dict(
    FOCAL_GAMMA=0.5,
    GAMMA_ANNEAL=1,
    LABEL_SMOOTH=0.05,
    Z_LOSS=1e-3,
    LOGIT_PENALTY=1e-3,
    LOGIT_TEMP=1.1,
    ENTROPY_BONUS=0.01,
    MULTI_TOKEN=0.1,
    HEAD_DIVERSITY=1e-2,
)
GRADIENT_IDEAS = dict(GRAD_CENTRAL=1, MYCORRHIZAL=0.1, THERMAL_VENT=0.2, HEAD_PRUNE=0.25)
WEIGHT_IDEAS = dict(
    CANOPY_LR=1,
    WD_SCHEDULE=0.1,
    PREDPREY_LR=1,
    CONTROLLED_BURN=0.05,
    BURN_INTERVAL=5,
    SYNAPTIC_SCALE=1,
    WEIGHT_PERTURB=0.01,
    PERTURB_INTERVAL=4,
    MUTATION_DECAY=0.01,
)
ALL_IDEAS = INPUT_IDEAS | LOSS_IDEAS | GRADIENT_IDEAS | WEIGHT_IDEAS
SCHEDULES = dict(
    lr_warmdown_frac=dict(WARMDOWN_FRAC=0.5, LR_FLOOR=0.1),
    lr_tidal=dict(TIDAL_LR=1, TIDAL_WARMUP=0.3),
    lr_cosine=dict(COSINE_LR=1, COSINE_CYCLES=2, GOLDEN_LR=1),
    lr_breathing=dict(BREATHING_LR=1),
    lr_whale=dict(WHALE_LR=1),
    lr_circadian=dict(CIRCADIAN_LR=1),
    lr_cosmo=dict(COSMO_LR=1),
    lr_punctuated=dict(PUNCTUATED_LR=1),
    lr_root_first=dict(ROOT_FIRST=1),
    lr_coral=dict(CORAL_LR=1),
)
OTHER_KNOBS = dict(
    SEED=7,
    MICRO_BATCH_TOKENS=128,
    VAL_BATCH_SIZE=1024,
    MLP_MULT=3.0,
    QK_GAIN_INIT=1.1,
    TIED_EMBED_INIT_STD=0.01,
    ROPE_BASE=500,
    LOGIT_SOFTCAP=20,
    ENCODER_LAYERS=2,
    XSA_LAST_N=-1,
    MUON_MOMENTUM=0.9,
    MUON_MOMENTUM_WARMUP_START=0.5,
    MUON_BACKEND_STEPS=3,
    BETA1=0.8,
    BETA2=0.9,
    ADAM_EPS=1e-6,
    GRAD_CLIP_NORM=0.5,
    TIED_EMBED_LR=0.04,
    SCALAR_LR=0.03,
    HEAD_PRUNE=0.25,
    HEAD_PRUNE_AT=0.5,
    CONTROL_TENSOR_NAME_PATTERNS="attn_scale,mlp_scale,resid_mix,q_gain,skip_weights,c_k",
    INT8_KEEP_FLOAT_FP32_NAME_PATTERNS="attn_scale,proj",
    ZSTD_LEVEL=3,
    EVAL_STRIDE=12,
    EVAL_BATCH_SEQS=5,
    USE_HEDGE=1,
    HEDGE_ETA=0.3,
    HEDGE_WINDOW=0,
    SWA_EVERY=7,
    ALLOW_INERT=1,
    ALLOW_ENV="MATRIX_LRS",
    MATRIX_LRS=1,
)
SMALLEST = dict(NUM_LAYERS=2, MODEL_DIM=16, TRAIN_BATCH_TOKENS=128, VAL_LOSS_EVERY=0)
TTT = dict(TTT_STEPS=1, TTT_LR=0.01, TTT_CHUNK_TOKENS=128)


# Knobs that are refused, each with its exit code.
BAD_INPUT = list(
    enumerate(
        [
            (dict(MATRIX_LR="fast"), 2),
            (dict(MATRIX_LR=-1), 2),
            (dict(MATRIC_LR=0.1), 2),
            (dict(SWA_EVERY=7), 2),
            (dict(MODEL_DIM=18), 2),
            (dict(TIDAL_LR=1, WHALE_LR=1), 2),
            (dict(VOCAB_SIZE=321), 2),
            (dict(MODEL_DIM=8192), 3),
        ]
    )
)


def configurations() -> dict[str, list[Part]]:
    """All that is compared, by name."""
    found = dict(
        baseline=scaled_preset("baseline", **WARMDOWN),
        best=scaled_preset("best"),
        lower_lr=scaled_preset("lower_lr", **WARMDOWN),
        progressive_depth=scaled_preset(
            "progressive_depth", **WARMDOWN, NUM_LAYERS=2, SWA_EVERY=2, EVAL_STRIDE=16
        ),
        repeats=[flat_run(REPEATS, REPEAT_LORA_RANK=2, GRAD_CLIP_NORM=0.3, MUON_WD=0.1)],
        repeats_no_skip=[flat_run(NUM_LAYERS=2, NUM_REPEATS=2, CROSS_REPEAT_SKIP=0)],
        layer_drop_sam=[flat_run(NUM_LAYERS=4, LAYER_DROP=0.4, SAM_RHO=0.05)],
        untied_parallel=[
            flat_run(TIE_EMBEDDINGS=0, PARALLEL_BLOCK=1, MLP_ACT="swiglu", MICRO_BATCH_TOKENS=192)
        ],
        swa=[flat_run(SWA_ENABLED=1, SWA_START_FRAC=0.9, SWA_EVERY=2)],
        ema=[flat_run(EMA_DECAY=0.8, MLP_ACT="gelu2")],
        quant_mixed=[
            flat_run(
                WIDE, QUANT_LEVELS=31, MLP_QUANT_LEVELS=15, EMBED_QUANT_LEVELS=63, QUANT_CLIP="gptq_lite"
            )
        ],
        quant_grid=[flat_run(WIDE, QUANT_CLIP="grid", CODEC="zlib", QUANT_SCALE_FLOOR=1e-3)],
        sliding_hedge=[
            flat_run(EVAL_STRIDE=8, EVAL_SEQ_LEN=48, USE_HEDGE=1, HEDGE_ORDER=4, SCORE_DUMP="scores.npz")
        ],
        ttt=[flat_run(TTT, EVAL_STRIDE=16, SCORE_DUMP="scores.npz")],
        ttt_lora=[flat_run(TTT, TTT_OPTIMIZER="adam", TTT_LORA_RANK=2, TTT_RESET=1, SCORE_DUMP="scores.npz")],
        two_ranks=[flat_run(ranks=2, EVAL_STRIDE=16, TTT_STEPS=1, LAYER_DROP=0.3)],
        resume=[
            flat_run(stop_after=11, expect=75, RESUME="auto", EMA_DECAY=0.8, TOKEN_DROP=0.1, DATA_SHUFFLE=1),
            flat_run(RESUME="auto", EMA_DECAY=0.8, TOKEN_DROP=0.1, DATA_SHUFFLE=1),
        ],
        resume_ranks=[
            flat_run(
                ranks=2,
                stop_after=11,
                expect=75,
                RESUME="auto",
                SWA_ENABLED=1,
                SWA_START_FRAC=1.1,
                SWA_EVERY=3,
            ),
            flat_run(RESUME="auto", SWA_ENABLED=1, SWA_START_FRAC=1.1, SWA_EVERY=3),
        ],
        values=[flat_run(NUM_VALUE_EMBEDS=2, VALUE_RESIDUAL=1, XSA_LAST_N=2, MLP_ACT="silu2")],
        ideas_input=[flat_run(INPUT_IDEAS)],
        ideas_loss=[flat_run(LOSS_IDEAS)],
        ideas_gradient=[flat_run(GRADIENT_IDEAS, NUM_LAYERS=5)],
        ideas_weight=[flat_run(WEIGHT_IDEAS)],
        ideas_all=[flat_run(ALL_IDEAS, NUM_LAYERS=5)],
        progressive_grow=[flat_run(NUM_LAYERS=5, PROGRESSIVE_GROW=1)],
        weight_share=[flat_run(NUM_LAYERS=4, WEIGHT_SHARE=2)],
        attn_recycle=[flat_run(ATTN_RECYCLE=1, ENCODER_LAYERS=1)],
        sandwich_norm=[flat_run(SANDWICH_NORM=1, MLP_ACT="leaky_relu2", LEAKY_SLOPE=0.3)],
        bf16=[flat_run(DTYPE="bf16")],
        other_knobs=[flat_run(OTHER_KNOBS)],
        no_training=[run_of(ITERATIONS=0)],
        diverged=[flat_run(MATRIX_LR=1e30, expect=5)],
        bad_input=[run_of(SMALLEST, knobs, OUT_DIR=f"out{n}", expect=code) for n, (knobs, code) in BAD_INPUT],
        eval_only=[
            flat_run(OUT_DIR="trained", ITERATIONS=5),
            flat_run(OUT_DIR="scored", EVAL_ONLY="trained/final_model.int8.ptz", EVAL_STRIDE=16),
        ],
        init_from=[
            flat_run(OUT_DIR="first", ITERATIONS=5),
            flat_run(OUT_DIR="second", INIT_FROM="first/final_model.pt", ITERATIONS=10, SEED=7),
        ],
    )
    for name, knobs in SCHEDULES.items():
        found[name] = [run_of(SMALLEST, knobs)]
    return found


# The data: a small language that a tiny model learns in a few steps.

PAD, BOS, EOS, UNK = range(4)
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
SUBJECTS = ["the old miller", "a young clerk", "our neighbour", "the café owner", "Zoë", "the night train"]
VERBS = ["counts", "carries", "paints", "forgets", "repairs", "sells", "follows"]
OBJECTS = ["the bread", "seven lamps", "a letter", "the wheel", "twelve apples", "the naïve plan", "a map"]
PLACES = ["at dawn", "by the river", "in the market", "without a word", "near Ålesund", "in 漢字"]


def make_texts(count: int, seed: int) -> list[str]:
    """Documents of two to nine sentences."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        sentences = []
        for _ in range(rng.randint(2, 9)):
            words = [rng.choice(column) for column in (SUBJECTS, VERBS, OBJECTS, PLACES)]
            sentences.append(" ".join(words).capitalize() + ".")
        texts.append(" ".join(sentences) + "\n")
    return texts


def write_shard(path: Path, tokens: list[int]) -> None:
    """An official shard: 256 int32 of header, then uint16 tokens."""
    header = struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, len(tokens)).ljust(1024, b"\0")
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))


def make_dataset(folder: Path) -> None:
    """Two training shards, a validation shard and their tokenizer, the same bytes each time."""
    import sentencepiece

    folder.mkdir()
    train_texts = make_texts(400, seed=1)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(train_texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZES["VOCAB_SIZE"],
        pad_id=PAD,
        bos_id=BOS,
        eos_id=EOS,
        unk_id=UNK,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=0.999,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    shards = dict(
        toy_train_000000=train_texts[:250],
        toy_train_000001=train_texts[250:],
        toy_val_000000=make_texts(8, seed=2),
    )
    for name, texts in shards.items():
        tokens = []
        for text in texts:
            tokens.append(BOS)
            tokens.extend(tokenizer.encode(text))
        write_shard(folder / f"{name}.bin", tokens)


# One run: a fork of this process becomes the script.


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensor_digest(tensor) -> str:
    """sha256 of a tensor's type, shape and bytes."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return digest(head + plain.view(-1).view(torch.uint8).numpy().tobytes())


def watch_optimisers(trace_path: Path, stop_after: int) -> None:
    """Before each step of any optimiser, write to `trace_path` what it is given: gradients and weights.

    Neither the order of the parameters nor their groups count, so that a version may arrange them anew.
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    trace = trace_path.open("w", encoding="utf-8")
    calls: dict[str, int] = {}

    def record(optimiser, _args, _kwargs) -> None:
        kind = type(optimiser).__name__ if type(optimiser).__module__.startswith("torch.") else "own"
        calls[kind] = calls.get(kind, 0) + 1
        squares = []
        grads = []
        weights = []
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                weights.append(tensor_digest(parameter))
                if parameter.grad is not None:
                    grads.append(tensor_digest(parameter.grad))
                    squares.append(parameter.grad.double().square().sum().item())
        entry = dict(
            optimiser=kind,
            grad_norm=math.sqrt(math.fsum(squares)),
            gradients=digest("".join(sorted(grads)).encode()),
            weights_before=digest("".join(sorted(weights)).encode()),
        )
        print(json.dumps(entry), file=trace, flush=True)
        if kind == "Adam" and calls[kind] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_pre_hook(record)


def environment(knobs: dict[str, object]) -> dict[str, str]:
    """Nothing of the user's own but where programs are, so that no knob leaks in."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | {name: str(value) for name, value in knobs.items()} | dict(OMP_NUM_THREADS="1")


def become_script(script: Path, folder: Path, part: Part, number: int, rank: int, port: int) -> None:
    """In a fork: run the script as the main program, with its output in `folder`. Does not return."""
    code = 1
    try:
        os.chdir(folder)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            file = os.open(f"part{number}.rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        variables = environment(part.knobs)
        if part.ranks > 1:
            variables |= dict(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                WORLD_SIZE=str(part.ranks),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            )
        os.environ.clear()
        os.environ.update(variables)
        sys.argv = [str(script)]
        watch_optimisers(Path(f"part{number}.rank{rank}.trace"), part.stop_after if rank == 0 else 0)
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_part(script: Path, folder: Path, part: Part, number: int) -> list[int]:
    """Start every rank and wait; returns the exit codes by rank, -N for a rank ended by signal N."""
    port = free_port() if part.ranks > 1 else 0
    children = []
    for rank in range(part.ranks):
        child = os.fork()
        if child == 0:
            become_script(script, folder, part, number, rank, port)
        children.append(child)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LONGEST_RUN
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank in codes:
                continue
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank]:
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        time.sleep(0.005)
    return [codes[rank] for rank in range(len(children))]


# What a run left behind, as plain values.

# Times, sizes that hold the code or the header, and the machine: they may differ between equal versions.
EXCLUDED_KEYS = {
    "time",
    "train_ms",
    "seconds",
    "train_seconds",
    "eval_seconds",
    "config_hash",
    "code_sha256",
    "code_bytes",
    "model_bytes",
    "total_bytes",
    "device",
}
EXCLUDED_LINES = [
    r"Running (Python|PyTorch) ",
    r"nvidia-smi",
    r"device:",
    r"Code size: ",
    r"Total submission size",
    r"RESULT ",
]
VOLATILE_TEXT = [
    (r"config_hash:\w+", "config_hash:*"),
    (r"(train_time|eval_time|step_avg):[\d.]+ms", r"\1:*"),
    (r"step_ms:[\d.,]+", "step_ms:*"),
    (r"takes about \d+ s, (\d+|inf) s are left", "takes about * s, * s are left"),
    (r"after about \d+ of", "after about * of"),
    (r"(allocated|reserved): \d+ MiB", r"\1: * MiB"),
    (r"code and model need about \d+ bytes", "code and model need about * bytes"),
    (r"^(forecast: .*|packed .*)bytes:\d+", r"\1bytes:*"),
    (r"^(Serialized model \S+): \d+ bytes", r"\1: * bytes"),
]


def settled_line(line: str) -> str:
    """A log line without what changes from run to run, and with its JSON in order."""
    for pattern, replacement in VOLATILE_TEXT:
        line = re.sub(pattern, replacement, line)
    head, found, overrides = line.partition("overrides:")
    if found:
        line = head + found + json.dumps(json.loads(overrides), sort_keys=True)
    return line


def log_lines(text: str) -> list[str]:
    """The log after its head, which is the source and the versions between two rules of 100 signs."""
    rule = "\n" + "=" * 100 + "\n"
    body = text.rpartition(rule)[2]
    lines = [line for line in body.splitlines() if not any(re.match(p, line) for p in EXCLUDED_LINES)]
    return [settled_line(line) for line in lines]


def without_excluded(value):
    """The same JSON value without the keys of EXCLUDED_KEYS and the paths of a command, at any depth."""
    if isinstance(value, dict):
        return {key: without_excluded(part) for key, part in value.items() if key not in EXCLUDED_KEYS}
    if isinstance(value, list):
        return [without_excluded(part) for part in value]
    if isinstance(value, str):
        # The command that goes on: its folder is temporary, its script the version's own.
        return re.sub(r"^cd \S+ && (.*) \S+ \S+\.py$", r"\1", value)
    return value


def read_events(path: Path) -> dict[str, list]:
    """The typed events of a .jsonl log by kind."""
    events: dict[str, list] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        event = without_excluded(json.loads(line))
        for group in event.get("groups", {}).values() if event["event"] == "quantise" else ():
            group.pop("bytes", None)  # packed with a header of its own
        events.setdefault(event.pop("event"), []).append(event)
    return events


def read_trace(path: Path) -> dict[str, list]:
    """What the optimisers were given, by kind of optimiser, in the order of their steps."""
    steps: dict[str, list] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        steps.setdefault(entry.pop("optimiser"), []).append(entry)
    return steps


PREFIX = struct.Struct("<6sB4s8sQQ")  # magic, version, codec, check, raw length, packed length
OWN_HEADER_KEYS = ("config_hash", "model", "tensors")  # hashed knobs, knobs of the shape; the table is apart


def read_artifact(path: Path) -> dict:
    """The artifact's parts: its header, its table of tensors, sha256 of its numbers and of the file."""
    blob = path.read_bytes()
    _magic, version, codec, _check, raw_length, _packed = PREFIX.unpack_from(blob)
    body = blob[PREFIX.size :]
    if codec == b"zlib":
        raw = zlib.decompress(body)
    else:
        import zstandard

        raw = zstandard.ZstdDecompressor().decompress(body, max_output_size=raw_length)
    end = 4 + struct.unpack_from("<I", raw)[0]
    header = json.loads(raw[4:end])
    return dict(
        version=version,
        codec=codec.decode("latin1"),
        about={key: value for key, value in header.items() if key not in OWN_HEADER_KEYS},
        tensors=header["tensors"],
        numbers_sha256=digest(raw[end:]),
        header_sha256=digest(raw[:end]),
        file_sha256=digest(blob),
    )


def read_weights(path: Path) -> dict[str, str]:
    """sha256 of each tensor of a state dict."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor_digest(tensor) for name, tensor in state.items()}


def read_dump(path: Path) -> dict[str, str]:
    """sha256 of each array of SCORE_DUMP: every token's log-probability, whatever type of number holds it."""
    import numpy

    with numpy.load(path) as arrays:
        return {name: digest(arrays[name].astype(numpy.float64).tobytes()) for name in arrays.files}


def error_lines(text: str) -> list[str]:
    return [settled_line(line) for line in text.splitlines() if line.startswith(("error:", "warning:"))]


def read_part(folder: Path, part: Part, number: int, codes: list[int]) -> dict:
    """Everything of one part that is compared, in the order in which differences are told."""
    out = folder / str(part.knobs.get("OUT_DIR", "."))
    found: dict[str, object] = {"exit codes": codes}
    stderr = [(folder / f"part{number}.rank{rank}.stderr").read_text() for rank in range(part.ranks)]
    found["stderr"] = [error_lines(text) for text in stderr]
    found["last words"] = [text.strip().splitlines()[-1:] for text in stderr]
    events_path = out / "logs" / f"{RUN_ID}.jsonl"
    if events_path.is_file():
        events = read_events(events_path)
        for kind in ("step", "val"):
            if kind in events:
                found[kind] = events.pop(kind)
    for rank in range(part.ranks):
        trace = read_trace(folder / f"part{number}.rank{rank}.trace")
        found[f"rank {rank}, counted from the warm-up,"] = trace
    if events_path.is_file():
        found["events"] = events
        text = (out / "logs" / f"{RUN_ID}.txt").read_text(encoding="utf-8")
        found["log"] = log_lines(text)
        results = [line for line in text.splitlines() if line.startswith("RESULT ")]
        if results:
            found["RESULT"] = without_excluded(json.loads(results[-1].removeprefix("RESULT ")))
            stdout = (folder / f"part{number}.rank0.stdout").read_text(encoding="utf-8")
            found["RESULT is last on stdout"] = stdout.endswith(results[-1] + "\n")
    readers: dict[str, Callable] = {
        "final_model.pt": read_weights,
        "final_model.int8.ptz": read_artifact,
        "scores.npz": read_dump,
    }
    for name, read in readers.items():
        for path in (out / name, folder / name):
            if path.is_file():
                found[name] = read(path)
                break
    left = []
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.name.startswith((".", "part")) and not name.startswith("data"):
            left.append(name)
    found["files"] = sorted(left)
    return found


def run_configuration(script: Path, parts: list[Part], dataset: Path, folder: Path) -> list[dict]:
    """All parts of a configuration, one after the other in one folder."""
    folder.mkdir(parents=True)
    shutil.copytree(dataset, folder / "data")
    found = []
    for number, part in enumerate(parts):
        codes = run_part(script, folder, part, number)
        try:
            found.append(read_part(folder, part, number, codes))
        except (OSError, ValueError, KeyError, struct.error, RuntimeError) as error:
            found.append({"exit codes": codes, "unreadable": f"{type(error).__name__}: {error}"})
    return found


# All runs, some at a time, each in a fork of one process that has imported torch.


@dataclass(frozen=True)
class Job:
    """A configuration of one version that has to be run."""

    script: Path
    name: str
    parts: list[Part]
    result: Path
    folder: Path

    @property
    def ranks(self) -> int:
        return max(part.ranks for part in self.parts)


def write_whole(path: Path, text: str) -> None:
    """All of the file or none of it, since others may read it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def in_fork(work: Callable[[], None]) -> int:
    """Start `work` in a fork; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_job(job: Job, dataset: Path) -> None:
    """Run the configuration, write what it left behind, remove its folder."""
    found = run_configuration(job.script, job.parts, dataset, job.folder)
    write_whole(job.result, json.dumps(found))
    shutil.rmtree(job.folder)


def run_jobs(jobs: list[Job], temporary: Path, at_once: int) -> None:
    """Run all jobs, at most `at_once` ranks at a time, and write what each found to its result."""
    print(f"{len(jobs)} configurations are run", file=sys.stderr, flush=True)
    prepare_torch()
    dataset = temporary / "dataset"
    maker = in_fork(partial(make_dataset, dataset))
    if os.waitstatus_to_exitcode(os.waitpid(maker, 0)[1]):
        raise ToolError("the data could not be made: see the error above")
    waiting = list(jobs)
    running: dict[int, Job] = {}
    while waiting or running:
        busy = sum(job.ranks for job in running.values())
        if waiting and (not running or busy + waiting[0].ranks <= at_once):
            job = waiting.pop(0)
            running[in_fork(partial(run_job, job, dataset))] = job
            continue
        child, status = os.wait()
        job = running.pop(child)
        if os.waitstatus_to_exitcode(status):
            raise ToolError(f"{job.name} in {job.script.parent.name}: see the error above")


def prepare_torch() -> None:
    """Import what each run needs, once, on one thread: a fork takes no thread along."""
    import sentencepiece  # noqa: F401
    import torch
    import torch._dynamo  # the first optimiser imports it, for a second
    import torch.distributed  # noqa: F401
    import zstandard  # noqa: F401

    torch.set_num_threads(1)
    torch.arange(3.0, device="meta")  # a second of imports that every run would make


# The comparison.


def first_difference(old, new, where: str = "") -> str:
    """Where `new` first departs from what `old` has, with both values; '' where it does not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            if key not in new:
                return f"{where} {key}: {shown(value)} is missing in NEW"
            found = first_difference(value, new[key], f"{where} {key}")
            if found:
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list):
        for number, (value, other) in enumerate(zip(old, new, strict=False), 1):
            found = first_difference(value, other, f"{where} {place_in(value, number)}")
            if found:
                return found
        if len(old) != len(new):
            return f"{where}: {len(old)} in OLD, {len(new)} in NEW"
        return ""
    if type(old) is not type(new) or repr(old) != repr(new):
        return f"{where}: {shown(old)} in OLD, {shown(new)} in NEW"
    return ""


def place_in(value, number: int) -> str:
    """How a list's entry is called: by its own step, if it has one."""
    if isinstance(value, dict) and "step" in value:
        return str(value["step"])
    return f"#{number}"


def shown(value) -> str:
    """A value for a line of the report; a float with all its digits."""
    text = repr(value)
    return text if len(text) <= 300 else text[:300] + "..."


def log_difference(old: list[str], new: list[str]) -> tuple[str, int]:
    """(the first line of `old` that `new` lacks in that order, or a new warning; how many lines are new)."""
    at = 0
    added = []
    for line in old:
        if line not in new[at:]:
            there = new[at] if at < len(new) else "(end)"
            return f"log: {line!r} in OLD, {there!r} in NEW", 0
        found = new.index(line, at)
        added += new[at:found]
        at = found + 1
    added += new[at:]
    for line in added:
        if line.startswith(("warning:", "error:")):
            return f"log: {line!r} only in NEW", 0
    return "", len(added)


def earlier_step(found: str, old: dict, new: dict) -> str:
    """Where what the optimisers are given departs, which may be some steps before a loss shows it; or ''."""
    if not found.startswith(("step ", "val ")):
        return ""
    for key in old:
        if key.startswith("rank "):
            place = first_difference(old[key], new.get(key, {}), key)
            if place:
                return f"; {place}"
    return ""


def without(values: dict, key: str) -> dict:
    """A copy that lacks `key`."""
    return {name: value for name, value in values.items() if name != key}


def compare_part(old: dict, new: dict, expect: int) -> tuple[str, list[str]]:
    """(the first difference or '', remarks) of one part, whose exit code must be `expect`."""
    remarks = []
    if old["exit codes"] != new["exit codes"]:
        codes = f"{old['exit codes']} in OLD, {new['exit codes']} in NEW"
        return f"exit codes: {codes}; last on stderr: {new.get('last words')}", []
    if set(old["exit codes"]) != {expect}:
        return f"exit codes: {old['exit codes']} in both, not {expect}: {old.get('last words')}", []
    for side, part in (("OLD", old), ("NEW", new)):
        if "unreadable" in part:
            return f"what {side} left cannot be read: {part['unreadable']}", []
    old, new = without(old, "last words"), without(new, "last words")
    old_lines, new_lines = old.pop("log", []), new.pop("log", [])
    old_file, new_file = old.get("final_model.int8.ptz"), new.get("final_model.int8.ptz")
    if old_file and new_file and old_file["header_sha256"] != new_file["header_sha256"]:
        files = f"{old_file['file_sha256'][:12]} in OLD, {new_file['file_sha256'][:12]} in NEW"
        remarks.append(f"the artifact's header differs, so its sha256 does: {files}")
        hidden = ("header_sha256", "file_sha256")
        old["final_model.int8.ptz"] = {key: old_file[key] for key in old_file if key not in hidden}
    found = first_difference(old, new).strip()
    if found:
        return found + earlier_step(found, old, new), remarks
    found, added = log_difference(old_lines, new_lines)
    if added:
        remarks.append(f"{added} more log lines")
    return found, remarks


def compare_configuration(old: list[dict], new: list[dict], parts: list[Part]) -> tuple[str, list[str]]:
    """(the first difference or '', remarks) of all parts in turn."""
    remarks: list[str] = []
    for number, part in enumerate(parts):
        found, more = compare_part(old[number], new[number], part.expect)
        remarks += [remark for remark in more if remark not in remarks]
        if found:
            return (f"part {number + 1}: {found}" if len(parts) > 1 else found), remarks
    return "", remarks


def ended_as_expected(found: list[dict], parts: list[Part]) -> bool:
    """True if a result may be stored: a failure may come from the machine, as a full disk does."""
    for one, part in zip(found, parts, strict=True):
        if set(one["exit codes"]) != {part.expect} or "unreadable" in one:
            return False
    return True


# The command line.


def read_version(named: str) -> bytes:
    """train_gpt.py of a script's path, a folder or a git revision; UsageError if there is none."""
    path = Path(named)
    script = path / "train_gpt.py" if path.is_dir() else path
    if script.is_file():
        return script.read_bytes()
    command = ["git", "-C", str(ROOT), "show", f"{named}:train_gpt.py"]
    shown_file = subprocess.run(command, capture_output=True, check=False)
    if shown_file.returncode:
        reason = shown_file.stderr.decode(errors="replace").strip().splitlines()[:1]
        raise UsageError(f"{named} is no script, no folder with a train_gpt.py and no revision: {reason}")
    return shown_file.stdout


def version_key(script: bytes, parts: list[Part]) -> str:
    """Under what a result is stored: all that it depends on."""
    from importlib.metadata import version

    about = [platform_name(), sys.version, version("torch"), version("numpy"), version("sentencepiece")]
    about += [
        digest(script),
        digest(Path(__file__).read_bytes()),
        json.dumps([asdict(part) for part in parts]),
    ]
    return digest("\n".join(about).encode())


def platform_name() -> str:
    """The processor's model, where Linux tells it: another one may add in another order."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return "unknown"


def chosen_configurations(only: str) -> dict[str, list[Part]]:
    """Those that --only names, or all; UsageError on a name that is none."""
    every = configurations()
    names = only.split(",") if only else list(every)
    for name in names:
        if name not in every:
            raise UsageError(f"{name} is no configuration; --list names them all")
    return {name: every[name] for name in names}


def results_of(versions: list[bytes], chosen: dict[str, list[Part]], fresh: bool, at_once: int) -> tuple:
    """([what each version left behind, by configuration], how many configurations were run for that)."""
    results: list[dict[str, list[dict]]] = []
    jobs: dict[str, Job] = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        root = Path(temporary)
        keys = []
        for side, script in enumerate(versions):
            script_path = root / f"version{side}" / "train_gpt.py"
            script_path.parent.mkdir()
            script_path.write_bytes(script)
            keys.append({name: version_key(script, parts) for name, parts in chosen.items()})
            for name, parts in chosen.items():
                key = keys[side][name]
                if fresh:
                    key = keys[side][name] = f"{key}-{side}"
                if key not in jobs and (fresh or not (CACHE / f"{key}.json").is_file()):
                    result = root / f"{key}.json"
                    jobs[key] = Job(script_path, name, parts, result, root / f"run{side}-{name}")
        if jobs:
            run_jobs(list(jobs.values()), root, at_once)
        for side in range(len(versions)):
            found = {}
            for name, parts in chosen.items():
                key = keys[side][name]
                path = jobs[key].result if key in jobs else CACHE / f"{key}.json"
                text = path.read_text(encoding="utf-8")
                found[name] = json.loads(text)
                if not fresh and key in jobs and ended_as_expected(found[name], parts):
                    write_whole(CACHE / path.name, text)
            results.append(found)
    return results, len(jobs)


def compare(arguments: argparse.Namespace) -> int:
    """Print one line a configuration; returns the exit code."""
    chosen = chosen_configurations(arguments.only)
    versions = [read_version(arguments.old), read_version(arguments.new)]
    began = time.monotonic()
    (old, new), runs = results_of(versions, chosen, arguments.fresh, arguments.jobs)
    differing = 0
    for name, parts in chosen.items():
        found, remarks = compare_configuration(old[name], new[name], parts)
        differing += bool(found)
        verdict = f"DIFFERS at {found}" if found else "equal"
        print(f"{name}: {verdict}" + "".join(f" ({remark})" for remark in remarks))
    equal = len(chosen) - differing
    seconds = time.monotonic() - began
    print(f"{equal} of {len(chosen)} configurations are equal; {runs} were run, {seconds:.0f} s")
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", nargs="?", help="git revision, folder or script")
    parser.add_argument("new", nargs="?", help="the same; . is the working tree")
    parser.add_argument("--only", default="", metavar="NAME[,NAME]", help="some configurations")
    parser.add_argument("--list", action="store_true", help="name all configurations")
    parser.add_argument("--fresh", action="store_true", help="run both versions again, use no stored result")
    parser.add_argument("--jobs", type=int, default=2, help="ranks that run at a time")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(configurations()))
        return 0
    if not arguments.new:
        parser.error("two versions are needed: OLD NEW")
    try:
        return compare(arguments)
    except (UsageError, ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for limit in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[limit] = "1"
    sys.exit(main())
