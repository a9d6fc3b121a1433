"""Whatever a user gives a run, or a machine does to it: one line that says what, where and how to mend it,
the documented exit code, nothing overwritten, no half-written file left, and no code run from data."""

import ast
import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import zstandard

import train_gpt
from tests.conftest import BOS, ROOT, TINY, env_of, make_texts, train_tokenizer, write_shard
from tests.support.forkserver import ForkServer
from train_gpt import PREFIX, RAW_LIMIT, seal

UNSET = dict.fromkeys(TINY) | dict(device="cpu")
# As little address space as a run of this size needs, beyond what is mapped already; no run may hang.
LIMITS = """
import resource, signal
signal.alarm(60)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 700_000_000,) * 2)
"""
# Root may read and write anything: give that up (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH).
NO_RIGHTS = """
import ctypes
head, caps = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget(head, caps) == 0
caps[0] &= ~6
caps[1] &= ~6
assert ctypes.CDLL(None).capset(head, caps) == 0
"""


@dataclass
class Made:
    """What a run that was killed after its packing left."""

    folder: Path
    data: Path
    server: ForkServer
    artifact = property(lambda self: self.folder / "final_model.int8.ptz")
    state = property(lambda self: self.folder / "final_model.pt")
    checkpoint = property(lambda self: next(self.folder.glob("checkpoints/*.pt")))


@pytest.fixture(scope="module")
def made(fork_server, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    patch = "train_gpt.score_artifact = lambda *given: die()"
    codes = fork_server.run(folder, env_of(dataset, iterations=2, run_id="made"), patch=LIMITS + patch)
    assert codes == [-9], (folder / "0.err").read_text()
    return Made(folder, dataset, fork_server)


@dataclass
class Case:
    """knobs and env: of the run; words: all are in its error line; spoil(folder): makes the bad input in the
    run's folder, which may have a copy of the data in data/; patch: run in the process first."""

    words: str
    knobs: dict = field(default_factory=dict)
    spoil: Callable = lambda here: None
    code: int = 2
    patch: str = ""
    env: dict = field(default_factory=dict)


def files(folder: Path) -> dict[str, str]:
    """Every file under a folder with its hash, but for locks, the cache of byte counts and the console."""
    ours = re.compile(r".*\.lock|\.bytes-\w+\.json|\d\.(out|err)")
    paths = [path for path in folder.rglob("*") if path.is_file() and not ours.fullmatch(path.name)]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)
    }


def start(made: Made, here: Path, patch="", env=(), ranks=1, **knobs) -> list[int]:
    """Exit codes of a run in `here`, with here/data as its data if there is such a folder."""
    data = here / "data" if (here / "data").exists() else made.data
    whole = {**env_of(data, **{"iterations": 2, **knobs}), **dict(env)}
    return made.server.run(here, whole, ranks, LIMITS + patch)


def error_line(here: Path, rank: int = 0) -> str:
    """The one line; where a checkpoint is left, the command that goes on from it follows."""
    text = (here / f"{rank}.err").read_text(errors="replace")
    line, *more = text.splitlines(keepends=True)
    assert line.startswith("error: ") and line.endswith("\n"), text
    assert [command for command in more if not re.search(r" RESUME=auto RUN_ID=.*\n$", command)] == [], text
    assert bool(more) == line.endswith(" is saved, to go on:\n"), text
    return line


def refused(made: Made, here: Path, case: Case, writes: str = "") -> str:
    """Run a case; its error line, after all else that it promises. writes: pattern of what it may leave."""
    case.spoil(here)
    before, given = files(here), files(made.folder)
    codes = start(made, here, case.patch, case.env, **case.knobs)
    after = files(here)
    assert codes == [case.code], (codes, (here / "0.err").read_text()[-2000:])
    line = error_line(here)
    assert [word for word in case.words.split("|") if word not in line] == [], line
    assert {name: after.get(name) for name in before} == before and files(made.folder) == given
    assert [name for name in after.keys() - before if not (writes and re.fullmatch(writes, name))] == []
    assert not [path for path in here.rglob("*.tmp-*")]
    return line


# --- knobs ---

DEEP = dict(num_repeats=4, num_layers=1)
KNOBS = {
    "no_number": Case("NUM_LAYERS='two'|whole number", dict(num_layers="two")),
    "nan": Case("MATRIX_LR='nan'|finite", dict(matrix_lr="nan")),
    "infinite": Case("SCALAR_LR='-inf'|finite", dict(scalar_lr="-inf")),
    "empty": Case("SEED=''|whole number", dict(seed="")),
    "no_switch": Case("TIDAL_LR='yes'|0 or 1", dict(tidal_lr="yes")),
    "below": Case("GRAD_CLIP_NORM=-1.0 is below 0", dict(grad_clip_norm=-1)),
    "above": Case("ZSTD_LEVEL=23 is above 22", dict(zstd_level=23)),
    "choice": Case("MLP_ACT='relu'|relu2, leaky_relu2", dict(mlp_act="relu")),
    "typo": Case("MATRX_LR|did you mean MATRIX_LR?|ALLOW_ENV=MATRX_LR", dict(matrx_lr=0.1)),
    "like_ours": Case("MUON_WEIGHT_DECAY is not a knob|--help", dict(muon_weight_decay=0.1)),
    "one_pair": Case("BIGRAM_VOCAB_SIZE=1|2 is the least", dict(bigram_vocab_size=1)),
    "odd_rotation": Case("ROPE_DIMS=3|must be even|a head's 8", dict(rope_dims=3)),
    "wide_rotation": Case("ROPE_DIMS=10|must be even|a head's 8", dict(rope_dims=10)),
    "loop_beyond": Case(
        "LOOP_START=1 to LOOP_END=2|NUM_LAYERS=2", dict(num_loops=1, loop_start=1, loop_end=2)
    ),
    "loop_backwards": Case("LOOP_START=1 to LOOP_END=0", dict(num_loops=1, loop_start=1, loop_end=0)),
    "loop_of_repeats": Case(
        "NUM_LOOPS has no effect without NUM_REPEATS=1", DEEP | dict(num_loops=1, loop_start=0, loop_end=0)
    ),
    "loop_off": Case("LOOP_START has no effect without NUM_LOOPS!=0", dict(loop_start=1)),
    "lanes_beyond": Case("PARALLEL_START_LAYER=2 leaves no layer|NUM_LAYERS=2", dict(parallel_start_layer=2)),
    "lanes_in_encoder": Case(
        "PARALLEL_START_LAYER=1 leaves no layer", dict(parallel_start_layer=1, encoder_layers=2)
    ),
    "lanes_recycled": Case("ATTN_RECYCLE=1|two lanes", dict(parallel_start_layer=1, attn_recycle=1)),
    "no_lanes": Case(
        "PARALLEL_FINAL_LANE has no effect without PARALLEL_START_LAYER!=0", dict(parallel_final_lane="mlp")
    ),
    "parallel_beyond": Case(
        "PARALLEL_RESIDUAL_START=2 is beyond NUM_LAYERS=2", dict(parallel_residual_start=2)
    ),
    "gate_of_nothing": Case(
        "GATE_WINDOW has no effect without SPARSE_ATTN_GATE_ENABLED=1 or SMEAR_GATE_ENABLED=1",
        dict(gate_window=6),
    ),
    "lengths_text": Case("TRAIN_SEQ_SCHEDULE='16:0.5'|tokens@progress", dict(train_seq_schedule="16:0.5")),
    "lengths_end": Case(
        "TRAIN_SEQ_SCHEDULE=16@0.5,32@0.9|rises to 1.0", dict(train_seq_schedule="16@0.5,32@0.9")
    ),
    "lengths_fall": Case("rises to 1.0", dict(train_seq_schedule="8@0.5,16@0.5,32@1.0")),
    "lengths_over": Case("TRAIN_SEQ_LEN=32", dict(train_seq_schedule="64@0.5,32@1.0")),
    "lengths_last": Case("its last, TRAIN_SEQ_LEN=32", dict(train_seq_schedule="32@0.5,16@1.0")),
    "lengths_none": Case("lengths of 2 or more", dict(train_seq_schedule="0@0.5,32@1.0")),
    "lengths_uneven": Case(
        "TRAIN_BATCH_TOKENS=512 is not a multiple of TRAIN_SEQ_SCHEDULE's=24",
        dict(train_seq_schedule="24@0.5,32@1.0"),
    ),
    "rise_without_lengths": Case(
        "SEQ_CHANGE_WARMUP_STEPS has no effect without TRAIN_SEQ_SCHEDULE!=",
        dict(seq_change_warmup_steps=32),
    ),
    "mirrored_documents": Case(
        "PACK_DOCUMENTS has no effect without MIRROR_TRAIN=0", dict(pack_documents=1, mirror_train=0.1)
    ),
    "wide_gate": Case("GATE_WINDOW=33 is beyond MODEL_DIM=32", dict(smear_gate_enabled=1, gate_window=33)),
    "inert": Case("EMBED_LR has no effect without TIE_EMBEDDINGS=0|ALLOW_INERT=1", dict(embed_lr=0.8)),
    "heads": Case("MODEL_DIM=32|multiple of NUM_HEADS=5", dict(num_heads=5)),
    "batch": Case("TRAIN_BATCH_TOKENS=500|multiple of TRAIN_SEQ_LEN=32", dict(train_batch_tokens=500)),
    "encoders": Case("ENCODER_LAYERS|NUM_LAYERS", dict(encoder_layers=3)),
    "stride": Case("EVAL_STRIDE=64|set EVAL_SEQ_LEN", dict(eval_stride=64)),
    "two_schedules": Case(
        "two schedules at once: TIDAL_LR, COSINE_LR|set one to 0",
        dict(tidal_lr=1, cosine_lr=1, warmdown_iters=None),
    ),
    "depth_text": Case("PROG_DEPTH='deep'|like 0.4:2,0.65:3,1.0:4", DEEP | dict(prog_depth="deep")),
    "depth_cut": Case("PROG_DEPTH='0.4:'|progress:repeats", DEEP | dict(prog_depth="0.4:")),
    "depth_over": Case("PROG_DEPTH=0.4:2,1.0:5|NUM_REPEATS=4", DEEP | dict(prog_depth="0.4:2,1.0:5")),
    "depth_late": Case("PROG_DEPTH=0.4:2,1.5:4|(0, 1]", DEEP | dict(prog_depth="0.4:2,1.5:4")),
    "depth_last": Case("PROG_DEPTH=0.4:4,1.0:2|these last", DEEP | dict(prog_depth="0.4:4,1.0:2")),
    "run_id": Case("RUN_ID='../x'|letters", dict(run_id="../x")),
    "endless_layers": Case("NUM_LAYERS=1000000000|beyond", dict(num_layers=10**9)),
    "endless_repeats": Case("NUM_REPEATS=1000000000|beyond", dict(num_repeats=10**9)),
    "overflow": Case("QK_GAIN_INIT=1e+300|beyond", dict(qk_gain_init=1e300)),
    "too_large": Case("limit is 16000000", dict(model_dim=2**16), code=3),
    "no_memory": Case("out of memory|lower", dict(eval_stride=16, eval_batch_seqs=10**9)),
    "dump_nowhere": Case("SCORE_DUMP=absent/x.npz|set another", dict(score_dump="absent/x.npz")),
    "no_zstandard": Case(
        "zstandard|pip install|CODEC=zlib", patch="import sys; sys.modules['zstandard'] = None"
    ),
}


@pytest.mark.parametrize("name", KNOBS)
def test_knobs(made, tmp_path, name):
    writes = r"logs/.*" if name == "no_memory" else ""  # that is known only once the batch is made
    refused(made, tmp_path, KNOBS[name], writes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_a_device_that_is_not_there(made, tmp_path):
    refused(made, tmp_path, Case("DEVICE=cuda|set DEVICE=cpu", dict(device="cuda")))


# --- shards ---

TRAIN, VAL = "data/toy_train_000000.bin", "data/toy_val_000000.bin"


def wrong(name: str, **header) -> Callable:
    """Writes a shard of 99 tokens with this in its header."""
    return lambda here: write_shard(here / name, [5] * 99, **header)


def cut(name: str, size: int) -> Callable:
    return lambda here: os.truncate(here / name, (here / name).stat().st_size + size if size < 0 else size)


def foreign(name: str) -> Callable:
    return lambda here: write_shard(here / name, [BOS, 5, 999] * 30_000)


SHARDS = {
    "empty": Case("toy_train_000000.bin|0 bytes|fetch it again", spoil=cut(TRAIN, 0)),
    "header_cut": Case("toy_val_000000.bin|500 bytes do not hold a header", spoil=cut(VAL, 500)),
    "only_header": Case("toy_train_000000.bin|damaged|1024 bytes", spoil=cut(TRAIN, 1024)),
    "truncated": Case("toy_train_000000.bin|damaged|fetch it again", spoil=cut(TRAIN, -3)),
    "truncated_val": Case("toy_val_000000.bin|damaged|fetch it again", spoil=cut(VAL, -2)),
    "magic": Case("toy_train_000000.bin|magic 7, not 20240520", spoil=wrong(TRAIN, magic=7)),
    "version": Case("toy_val_000000.bin|version 2; this reads 1", spoil=wrong(VAL, version=2)),
    "count_huge": Case("toy_train_000000.bin|damaged|4294968318", spoil=wrong(TRAIN, count=2**31 - 1)),
    "count_negative": Case("toy_train_000000.bin|damaged|says 1014", spoil=wrong(TRAIN, count=-5)),
    "no_tokens": Case(
        "toy_train_000000.bin holds no tokens", spoil=lambda here: write_shard(here / TRAIN, [])
    ),
    "one_token": Case("fewer than two tokens", spoil=lambda here: write_shard(here / VAL, [5])),
    "no_text": Case("decode to no text", spoil=lambda here: write_shard(here / VAL, [BOS] * 50)),
    "foreign_val": Case("toy_val_000000.bin holds token 999|VOCAB_SIZE=320", spoil=foreign(VAL)),
    "unreadable": Case(
        "toy_train_000000.bin|Permission denied", spoil=lambda here: (here / TRAIN).chmod(0), patch=NO_RIGHTS
    ),
    "a_folder": Case("x_val_0.bin", spoil=lambda here: spoil_with_folder(here)),
    "no_folder": Case(
        "TOKENIZER_PATH=|data/README.md", dict(tokenizer_path="absent/tokenizer.model", data_path="absent")
    ),
    "no_shards": Case("DATA_PATH=absent|data/pydocs.py|data/fineweb.py", dict(data_path="absent")),
    "no_training": Case("no *_train_*.bin in DATA_PATH", spoil=lambda here: remove(here, "data/*_train_*")),
    "mixed": Case("mixes datasets ['other', 'toy']|one a folder", spoil=wrong("data/other_train_000000.bin")),
    "too_short": Case(
        "TRAIN_SEQ_LEN=65536 needs more|hold 99 tokens",
        dict(train_seq_len=65_536, train_batch_tokens=65_536),
        lambda here: (remove(here, "data/*_train_*"), wrong(TRAIN)(here)),
    ),
}


def remove(here: Path, pattern: str) -> None:
    for path in here.glob(pattern):
        path.unlink()


def spoil_with_folder(here: Path) -> None:
    remove(here, "data/*_val_*")
    (here / "data/x_val_0.bin").mkdir()


@pytest.fixture
def here(dataset, tmp_path):
    """A folder for a run, with its own data."""
    shutil.copytree(dataset, tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("name", SHARDS)
def test_shards(made, here, name):
    refused(made, here, SHARDS[name])


LATE = dict(iterations=8, run_id="r", train_log_every=1, warmdown_iters=3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_foreign_token_far_inside(made, here, tmp_path_factory, ranks):
    """The state before it is saved and the place is named; mended, the run ends as one that met none."""
    place = 2_000  # in the windows of step 4 of 512 tokens each
    whole = (here / TRAIN).read_bytes()
    spoilt = bytearray(whole)
    begin = train_gpt.SHARD_HEADER_BYTES + 2 * place
    spoilt[begin : begin + 2] = (999).to_bytes(2, "little")
    (here / TRAIN).write_bytes(spoilt)
    assert start(made, here, ranks=ranks, **LATE) == [2] * ranks
    line = error_line(here)
    assert f"toy_train_000000.bin holds token 999 at position {place}, beyond VOCAB_SIZE=320" in line
    assert "checkpoints/r-00000003.pt is saved, to go on:" in line and len(files(here / "checkpoints")) == 1
    end = json.loads((here / "logs/r.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["status"], end["exit_code"]) == ("end", "error", 2)
    (here / TRAIN).write_bytes(whole)
    assert start(made, here, ranks=ranks, resume="auto", **LATE) == [0] * ranks
    other = tmp_path_factory.mktemp("unspoilt")
    assert start(made, other, ranks=ranks, **LATE) == [0] * ranks
    model = "final_model.int8.ptz"
    assert (here / model).read_bytes() == (other / model).read_bytes()


def test_a_shard_that_is_cut_short_while_it_is_read(made, here):
    """A map of it would end the process by SIGBUS, with nothing in the log."""
    cuts = """
inside = train_gpt.train_step
def cutting(run, optimisers, batch, plan, limit):
    if run.runtime.defers_stop and plan.step == 3:
        import os
        os.truncate("data/toy_train_000000.bin", 1024 + 2 * 600)
    return inside(run, optimisers, batch, plan, limit)
train_gpt.train_step = cutting
"""
    assert start(made, here, cuts, **LATE) == [2]
    line = error_line(here)
    assert "toy_train_000000.bin was cut short while it was read: 600 tokens are left" in line
    assert "fetch it again" in line and "checkpoints/r-0000000" in line
    end = json.loads((here / "logs/r.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["status"], end["exit_code"]) == ("end", "error", 2)


def test_a_foreign_token_behind_the_last_step_is_not_met(made, here):
    """The batch after the last is read ahead; the run does not need it."""
    shards = [train_gpt.open_shard(here / name).copy() for name in (TRAIN, "data/toy_train_000001.bin")]
    shards[0][8 * 512 + 1 :] = 999
    write_shard(here / TRAIN, shards[0])
    assert start(made, here, **LATE) == [0]


def test_a_foreign_token_in_training(made, here):
    """It is found when it is read, so there is a log, and it says how the run ended."""
    line = refused(made, here, Case("toy_train_000000.bin holds token 999", spoil=foreign(TRAIN)), r"logs/.*")
    (log,) = here.glob("logs/*.jsonl")
    end = json.loads(log.read_text().splitlines()[-1])
    assert (end["event"], end["status"], end["exit_code"]) == ("end", "error", 2) and "tokenizer?" in line


# --- tokenizers ---

MODEL = "data/tokenizer.model"


def another_tokenizer(here: Path) -> None:
    """As many pieces, but decoding drops all spaces at the start."""
    layout = dict(remove_extra_whitespaces=True, add_dummy_prefix=True)
    (here / MODEL).write_bytes(train_tokenizer(make_texts(400, seed=1), **layout))
    space = sentencepiece.SentencePieceProcessor(model_file=str(here / MODEL)).piece_to_id(
        train_gpt.SPACE_MARK
    )
    write_shard(here / VAL, [BOS, space, space, space, 270, BOS, 271])


TOKENIZERS = {
    "missing": Case("TOKENIZER_PATH|data/README.md", spoil=lambda here: (here / MODEL).unlink()),
    "a_folder": Case("TOKENIZER_PATH=data|data/README.md", dict(tokenizer_path="data")),
    "empty": Case("TOKENIZER_PATH|not a SentencePiece model", spoil=cut(MODEL, 0)),
    "truncated": Case("TOKENIZER_PATH|not a SentencePiece model", spoil=cut(MODEL, 900)),
    "text": Case(
        "TOKENIZER_PATH|not a SentencePiece model", spoil=lambda here: (here / MODEL).write_text("{}" * 500)
    ),
    "pickle": Case("TOKENIZER_PATH|not a SentencePiece model", spoil=lambda here: trap(here / MODEL, here)),
    "wrong_size": Case("VOCAB_SIZE=1024|has 320 pieces", dict(vocab_size=1024)),
    "other_bytes": Case("wrong byte count|tokenizer.model drops in decoding", spoil=another_tokenizer),
    "unreadable": Case(
        "TOKENIZER_PATH|not a SentencePiece model",
        spoil=lambda here: (here / MODEL).chmod(0),
        patch=NO_RIGHTS,
    ),
}


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def trap(path: Path, here: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(here / "sprung")))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(made, here, name):
    refused(made, here, TOKENIZERS[name])
    assert not (here / "sprung").exists()


# --- artifacts ---


def edit(blob: bytes, change: Callable) -> bytes:
    """The artifact after change(header) of its header, seal again."""
    raw = zstandard.ZstdDecompressor().decompress(blob[PREFIX.size :])
    stop = 4 + struct.unpack_from("<I", raw)[0]
    header = json.loads(raw[4:stop])
    change(header)
    return forged(json.dumps(header).encode(), raw[stop:])


def forged(text: bytes, planes: bytes) -> bytes:
    raw = struct.pack("<I", len(text)) + text + planes
    return seal(b"zstd", len(raw), zstandard.ZstdCompressor().compress(raw))


def lengths(blob: bytes, raw: int) -> bytes:
    """The artifact, saying it unpacks to so many bytes, and rightly seal."""
    return seal(b"zstd", raw, blob[PREFIX.size :])


def table(*rows, planes: bytes) -> bytes:
    return forged(json.dumps(dict(tensors=rows)).encode(), planes)


def model(**sizes) -> Callable:
    return partial(edit, change=lambda header: header["model"].update(sizes))


def trapped(blob: bytes) -> bytes:
    return b"cos\nmkdir\n(S'sprung'\ntR."


def zipped(blob: bytes) -> bytes:
    return b"PK\x03\x04" + blob


ARTIFACTS = {
    "empty": (lambda b: b"", "not an artifact"),
    "truncated": (lambda b: b[:-9], "damaged|copy it again"),
    "prefix_cut": (lambda b: b[: PREFIX.size - 1], "not an artifact"),
    "appended": (lambda b: b + b"\0", "damaged|copy it again"),
    "codec": (lambda b: b[:7] + b"lzma" + b[11:], "codec|lzma"),
    "future": (lambda b: b[:6] + b"\x02" + b[7:], "version 2; this reads 1"),
    "text": (lambda b: b"hello\n" * 99, "not an artifact"),
    "zip": (zipped, "not an artifact"),
    "pickle": (trapped, "not an artifact"),
    "official": (lambda b: zlib.compress(pickle.dumps(dict(a=1))), "not an artifact"),
    "length_absurd": (lambda b: lengths(b, 2**63), "damaged"),
    "length_large": (lambda b: lengths(b, RAW_LIMIT), "cannot be unpacked"),
    "length_small": (lambda b: lengths(b, 9), "cannot be unpacked"),
    "zstd_bomb": (
        lambda b: seal(b"zstd", 99, zstandard.ZstdCompressor().compress(bytes(2**28))),
        "cannot be unpacked",
    ),
    "zlib_bomb": (lambda b: seal(b"zlib", 99, zlib.compress(bytes(2**28), 1)), "cannot be unpacked"),
    "zlib_bomb_that_fits": (
        lambda b: seal(b"zlib", 2**28, zlib.compress(bytes(2**28), 1)),
        "cannot be unpacked",
    ),
    "header_bomb": (lambda b: forged(b"[" + b"0," * 2**22 + b"0]", b""), "header"),
    "deep_header": (lambda b: forged(b"[" * 100_000, b""), "cannot be unpacked|RecursionError"),
    "shape_absurd": (lambda b: table(["a", [2**60, 2**60], ["fp32"]], planes=bytes(8)), "cannot be unpacked"),
    "shape_long": (lambda b: table(["a", [1] * 99, ["fp32"]], planes=bytes(4)), "a shape that is none"),
    "broadcast": (  # 30,000 integers and steps, which would multiply to 30,000 x 30,000 numbers
        lambda b: table(["a", [30_000], ["int8", "step"]], planes=bytes(90_000)),
        "cannot be unpacked (RuntimeError: output with shape",  # no MemoryError: it was not tried
    ),
    "layers_absurd": (model(num_layers=10**9), "NUM_LAYERS=1000000000|beyond"),
    "width_absurd": (model(model_dim=2**16), "does not fit this model"),
    "width_beyond": (model(model_dim=2**40), "MODEL_DIM=1099511627776|beyond"),
    "context_absurd": (model(train_seq_len=2**40), "1099511627776|beyond"),
    "vocabulary_absurd": (model(vocab_size=2**40), "VOCAB_SIZE=1099511627776|beyond"),
    "cap_nan": (model(logit_softcap=math.nan), "LOGIT_SOFTCAP=nan"),
    "slope_huge": (model(leaky_slope=1e300), "LEAKY_SLOPE=1e+300"),
    "other_model": (model(num_layers=3), "does not fit this model|missing there"),
    "no_model": (lambda b: edit(b, lambda header: header.pop("model")), "another version"),
    "names": (
        lambda b: edit(b, lambda header: header["tensors"][0].__setitem__(0, "two\nlines")),
        "does not fit this model",
    ),
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifacts(made, tmp_path, name):
    spoil, words = ARTIFACTS[name]
    (tmp_path / "x.ptz").write_bytes(spoil(made.artifact.read_bytes()))
    beyond = words.endswith("beyond") or name in ("cap_nan", "slope_huge")  # the knob is named
    refused(made, tmp_path, Case(words if beyond else f"x.ptz|{words}", UNSET | dict(eval_only="x.ptz")))
    assert not (tmp_path / "sprung").exists()


PLACES = {
    "missing": Case("absent.ptz|No such file", UNSET | dict(eval_only="absent.ptz")),
    "a_folder": Case("data|Is a directory", UNSET | dict(eval_only="data")),
    "a_state": Case(
        "made.pt is not an artifact",
        UNSET | dict(eval_only="made.pt"),
        lambda here: (here / "made.pt").write_bytes(b"PK\x03\x04" * 99),
    ),
    "unreadable": Case(
        "x.ptz|Permission denied",
        UNSET | dict(eval_only="x.ptz"),
        lambda here: ((here / "x.ptz").write_bytes(b"mine"), (here / "x.ptz").chmod(0)),
        patch=NO_RIGHTS,
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_an_artifact_should_be(made, here, name):
    refused(made, here, PLACES[name])


def test_a_knob_that_contradicts_the_artifact(made, tmp_path):
    knobs = UNSET | dict(eval_only=str(made.artifact), num_layers=3)
    refused(made, tmp_path, Case("NUM_LAYERS=3|was trained with 2|unset it", knobs))


FLIPS = """
from pathlib import Path
blob = Path("x.ptz").read_bytes()
for bit in {bits}:
    damaged = bytearray(blob)
    damaged[bit // 8] ^= 1 << bit % 8
    Path("x.ptz").write_bytes(damaged)
    try:
        train_gpt.main()
    except SystemExit as end:
        assert end.code == 2, (bit, end.code)
    else:
        raise AssertionError(bit)
"""


def test_a_hundred_flipped_bits(made, tmp_path):
    """The checksum covers every byte, so each is refused; by one process, whose last main() is the 101st."""
    blob = made.artifact.read_bytes()
    (tmp_path / "x.ptz").write_bytes(blob)
    bits = random.Random(7).sample(range(8 * len(blob)), 100)
    codes = start(made, tmp_path, FLIPS.format(bits=bits), **UNSET, eval_only="x.ptz")
    lines = (tmp_path / "0.err").read_text().splitlines()
    assert codes == [2] and len(lines) == 101 and all(line.startswith("error: x.ptz ") for line in lines)
    assert files(tmp_path).keys() == {"x.ptz"}


# --- state dicts and checkpoints ---


def flipped(path: Path, share: float) -> None:
    """Flip a bit that far into the file."""
    blob = bytearray(path.read_bytes())
    blob[int(share * len(blob))] ^= 4
    path.write_bytes(blob)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(2**28))


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello.txt", "hello")


def changed(path: Path, change: Callable) -> None:
    """Save again after change(state), which may return another."""
    state = torch.load(path, weights_only=True)
    torch.save(change(state) or state, path)


def stretched(state: dict) -> dict:
    return dict.fromkeys(state, torch.zeros(1, dtype=torch.half).expand(2**42))


def prefixed(prefix: str) -> Callable:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


STATES = {
    "missing": (lambda p: p.unlink(), "no checkpoint at INIT_FROM=x.pt"),
    "empty": (lambda p: p.write_bytes(b""), "INIT_FROM=x.pt is no whole checkpoint"),
    "truncated": (lambda p: os.truncate(p, 20_000), "INIT_FROM=x.pt is no whole checkpoint"),
    "flipped": (lambda p: flipped(p, 0.5), "INIT_FROM=x.pt is no whole checkpoint"),
    "text": (lambda p: p.write_text("hello\n" * 99), "INIT_FROM=x.pt is no whole checkpoint"),
    "other_zip": (other_zip, "INIT_FROM=x.pt is no whole checkpoint"),
    "bomb": (bomb, "INIT_FROM=x.pt is no whole checkpoint (RunError)"),
    "pickle": (lambda p: trap(p, p.parent), "INIT_FROM=x.pt is no whole checkpoint"),
    "pickle_in_zip": (
        lambda p: torch.save(dict(a=Trap(p.parent / "sprung")), p),
        "INIT_FROM=x.pt is no whole checkpoint",
    ),
    "list": (lambda p: torch.save([1, 2], p), "INIT_FROM=x.pt is not a state dict of tensors, but a list"),
    "nested_model": (
        lambda p: changed(p, lambda state: dict(iter_num=3, optimizer={}, model=state)),
        "INIT_FROM=x.pt is not a state dict of tensors; its entry 'model' is one",
    ),
    "nested_state_dict": (
        lambda p: changed(p, lambda state: dict(state_dict=prefixed("_orig_mod.")(state), epoch=1)),
        "its entry 'state_dict' is one: torch.save that alone",
    ),
    "mask": (
        lambda p: changed(p, lambda state: state | {"attn.bias": torch.ones(2, dtype=torch.bool)}),
        "is not a state dict of tensors of floats: its entry 'attn.bias' is a torch.bool tensor",
    ),
    "number": (
        lambda p: changed(p, lambda state: state | dict(step=3)),
        "is not a state dict of tensors of floats: its entry 'step' is a int",
    ),
    "twice": (
        lambda p: changed(p, lambda state: state | prefixed("module.")(state)),
        "INIT_FROM=x.pt holds weights twice, with and without a prefix like module.",
    ),
    "foreign_prefix": (
        lambda p: changed(p, prefixed("transformer.")),
        "INIT_FROM=x.pt does not fit|is missing there|transformer.",
    ),
    "safetensors": (
        lambda p: p.write_bytes((9).to_bytes(8, "little") + b'{"a": {}}' + bytes(200)),
        "INIT_FROM=x.pt is no whole checkpoint|it is a safetensors file",
    ),
    "pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "INIT_FROM=x.pt is no whole checkpoint|git lfs pull",
    ),
    "stretched": (lambda p: changed(p, stretched), "INIT_FROM=x.pt is not a state dict"),
    "shapes": (
        lambda p: changed(p, lambda state: state.update({"skip_weights": torch.ones(9, 9)})),
        "INIT_FROM=x.pt does not fit|skip_weights is (9, 9) there, (1, 32) here",
    ),
    "names": (
        lambda p: changed(p, lambda state: {"two\nlines": torch.ones(2)}),
        "INIT_FROM=x.pt does not fit|skip_weights is missing there",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_states_to_start_from(made, tmp_path, name):
    spoil, words = STATES[name]
    shutil.copy(made.state, tmp_path / "x.pt")
    spoil(tmp_path / "x.pt")
    refused(made, tmp_path, Case(words, dict(init_from="x.pt")))
    assert not (tmp_path / "sprung").exists()


def compiled_inside(state: dict) -> dict:
    return {name.replace("blocks.0.", "module.blocks.0._orig_mod."): tensor for name, tensor in state.items()}


WRAPPED = {
    "plain": lambda state: state,
    "compiled": prefixed("_orig_mod."),
    "parallel": prefixed("module."),
    "both": prefixed("module._orig_mod."),
    "inside": compiled_inside,
}


def test_states_of_wrapped_models_are_taken_as_the_models_own(made, tmp_path):
    scores = {}
    for name, wrap in WRAPPED.items():
        here = tmp_path / name
        here.mkdir()
        shutil.copy(made.state, here / "x.pt")
        changed(here / "x.pt", wrap)
        assert start(made, here, init_from="x.pt", run_id="r") == [0], (here / "0.err").read_text()
        last = (here / "logs/r.txt").read_text().splitlines()[-1]
        scores[name] = json.loads(last.removeprefix("RESULT "))["val_bpb"]
    assert len(set(scores.values())) == 1, scores


def test_weights_that_are_no_numbers(made, tmp_path):
    shutil.copy(made.state, tmp_path / "x.pt")
    changed(tmp_path / "x.pt", lambda state: {name: t * math.nan for name, t in state.items()})
    case = Case("diverged|step 1|lower the learning rates", dict(init_from="x.pt"), code=5)
    refused(made, tmp_path, case, r"logs/.*")


def lacks(part: str) -> Callable:
    return lambda path: changed(path, lambda state: state.pop(part) and None)


SCRIPT = "own = train_gpt.own_source(); train_gpt.own_source = lambda: own + b'#'"
DAMAGED, OURS = "RESUME=x.pt|x.pt is no whole checkpoint|RESUME=0", "x.pt is no checkpoint of this version"
CHECKPOINTS = {
    "missing": (lambda p: p.unlink(), Case("RESUME=x.pt|no checkpoint at x.pt|RESUME=0")),
    "truncated": (lambda p: os.truncate(p, 50_000), Case(DAMAGED)),
    "flipped_early": (lambda p: flipped(p, 0.3), Case(DAMAGED)),
    "flipped_late": (lambda p: flipped(p, 0.7), Case(DAMAGED)),
    "text": (lambda p: p.write_text("hello\n" * 99), Case(DAMAGED)),
    "other_zip": (other_zip, Case(DAMAGED)),
    "bomb": (bomb, Case(f"{DAMAGED}|(RunError)")),
    "pickle": (lambda p: trap(p, p.parent), Case(DAMAGED)),
    "pickle_in_zip": (lambda p: torch.save(dict(a=Trap(p.parent / "sprung")), p), Case(DAMAGED)),
    "a_state_dict": (lambda p: torch.save({"a": torch.ones(2)}, p), Case(OURS)),
    "a_list": (lambda p: torch.save([1], p), Case(OURS)),
    "without_model": (lacks("model"), Case(OURS)),
    "without_same": (lacks("same"), Case(OURS)),
    "dtype": (lambda p: changed(p, lambda state: state.update(dtype="fp8")), Case(OURS)),
    "dtype_list": (lambda p: changed(p, lambda state: state.update(dtype=["fp32"])), Case(OURS)),
    "other_knob": (lambda p: None, Case("MATRIX_LR=0.04 there, 0.07 here|RESUME=0", dict(matrix_lr=0.07))),
    "other_seed": (lambda p: None, Case("SEED=1337 there, 7 here|set that back", dict(seed=7))),
    "other_script": (lambda p: None, Case("made with train_gpt.py=|RESUME=0", patch=SCRIPT)),
    "other_shape": (
        lambda p: changed(p, lambda state: state["model"].update(skip_weights=torch.ones(9, 9))),
        Case("x.pt does not fit this model|skip_weights is (9, 9) there"),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(made, tmp_path, name):
    spoil, case = CHECKPOINTS[name]
    shutil.copy(made.checkpoint, tmp_path / "x.pt")
    spoil(tmp_path / "x.pt")
    case = Case(case.words, case.knobs | dict(resume="x.pt"), patch=case.patch)
    refused(made, tmp_path, case, r"logs/.*" if name == "other_shape" else "")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("split, named", [("train", "training shards="), ("val", "validation text=")])
def test_a_checkpoint_of_other_data(made, here, split, named):
    shutil.copy(made.checkpoint, here / "x.pt")
    path = here / f"data/toy_{split}_000000.bin"
    tokens = train_gpt.open_shard(path)[:-40].copy()
    write_shard(path, tokens)
    refused(made, here, Case(f"x.pt was made with {named}|there|here|RESUME=0", dict(resume="x.pt")))


# --- where a run writes ---

OUTPUTS = {
    "a_file": Case(
        "OUT_DIR=out (|set another OUT_DIR",
        dict(out_dir="out"),
        lambda here: (here / "out").write_text("mine"),
    ),
    "below_a_file": Case(
        "OUT_DIR=out/x (|set another OUT_DIR",
        dict(out_dir="out/x"),
        lambda here: (here / "out").write_text("mine"),
    ),
    "read_only": Case(
        "OUT_DIR=out (Permission denied)|set another OUT_DIR",
        dict(out_dir="out"),
        lambda here: (here / "out").mkdir(mode=0o555),
        patch=NO_RIGHTS,
    ),
    "read_only_logs": Case(
        "OUT_DIR=. (Permission denied)|set another OUT_DIR",
        spoil=lambda here: (here / "logs").mkdir(mode=0o555),
        patch=NO_RIGHTS,
    ),
    "other_model": Case(
        "final_model.int8.ptz is there from an earlier run|OUT_DIR=runs/2",
        spoil=lambda here: (here / "final_model.int8.ptz").write_text("mine"),
    ),
    "other_state": Case(
        "final_model.pt is there from an earlier run|OUT_DIR=runs/2",
        spoil=lambda here: (here / "final_model.pt").write_text("mine"),
    ),
    "other_log": Case(
        "mine.txt is there|set another RUN_ID",
        dict(run_id="mine"),
        lambda here: ((here / "logs").mkdir(), (here / "logs/mine.txt").write_text("mine")),
    ),
    "other_dump": Case(
        "x.npz is there|move it away",
        dict(score_dump="x.npz"),
        lambda here: (here / "x.npz").write_text("mine"),
    ),
    "other_run_with_resume": Case(
        "final_model.pt is there from an earlier run",
        dict(resume="auto", run_id="new"),
        lambda here: (here / "final_model.pt").write_text("mine"),
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(made, tmp_path, name):
    refused(made, tmp_path, OUTPUTS[name])


def test_a_run_beside_another(made, tmp_path):
    with (tmp_path / ".final_model.pt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(made, tmp_path, Case("another run is writing to OUT_DIR=.|set another OUT_DIR"))


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks(made, tmp_path, name):
    """Some network file systems: the run goes on, and says once what it cannot notice."""
    patch = f"""
import errno, fcntl
def flock(*_):
    raise OSError(errno.{name}, "no locks here")
fcntl.flock = flock
"""
    assert start(made, tmp_path, patch) == [0]
    said = (tmp_path / "0.err").read_text()
    assert said.startswith("warning: the file system of OUT_DIR=. has no locks") and said.count("\n") == 1
    assert {"final_model.pt", "final_model.int8.ptz"} <= files(tmp_path).keys()


def test_an_empty_out_dir_is_the_current_folder(made, tmp_path):
    root = {path.name for path in Path("/").iterdir()}
    assert start(made, tmp_path, out_dir="") == [0]
    assert {"final_model.pt", "final_model.int8.ptz"} <= files(tmp_path).keys()
    assert {path.name for path in Path("/").iterdir()} == root


# --- a full disk: files may grow to a few kB, which fails as a full disk does (EFBIG for ENOSPC) ---

FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
whole = train_gpt.write_atomic
def full(path, data):
    limit = 5000 if "NAME" in path.name else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        whole(path, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
train_gpt.write_atomic = full
"""


@pytest.mark.parametrize("name", ["final_model.pt", "final_model.int8.ptz", "x.npz"])
def test_a_disk_that_is_full_when_a_result_is_written(made, tmp_path, name):
    """The weights are safe: the checkpoint of the end of the training is there."""
    knobs = dict(score_dump="x.npz", run_id="r")
    case = Case(name, knobs, patch=FULL.replace("NAME", name))
    line = refused(made, tmp_path, case, r"logs/r\..*|checkpoints/r-00000002\.pt|final_model\..*")
    assert "File too large" in line or "disk full" in line
    found = files(tmp_path)
    assert name not in found and "checkpoints/r-00000002.pt" in found
    assert '"status": "error", "exit_code": 2' in (tmp_path / "logs/r.txt").read_text()
    assert start(made, tmp_path, **knobs, resume="auto") == [0]  # with room again it goes on
    assert name in files(tmp_path)


def test_a_disk_that_is_full_when_a_checkpoint_is_written(made, tmp_path):
    """A warning: the run itself may still come to its end."""
    assert start(made, tmp_path, FULL.replace("NAME", "r-0000"), run_id="r") == [0]
    log = (tmp_path / "logs/r.txt").read_text()
    assert re.search(r"^warning: no checkpoint: \S*r-00000002\.pt: .+$", log, re.M)
    assert not list(tmp_path.rglob("*.tmp-*")) and (tmp_path / "0.err").read_text() == ""
    assert {name for name in files(tmp_path) if name.startswith("checkpoints")} == set()


def test_a_disk_that_is_full_when_the_log_is_written(made, tmp_path):
    """The log begins with the source, which does not fit into 100,000 bytes."""
    patch = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    patch += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)"
    refused(made, tmp_path, Case("log|File too large|mend that", patch=patch), r"logs/.*")


# --- console, ranks ---

NO_READER = "import os; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)"
FULL_CONSOLE = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"


@pytest.mark.parametrize("patch", [NO_READER, FULL_CONSOLE], ids=["no_reader", "full"])
def test_a_run_outlives_its_console(made, tmp_path, patch):
    assert start(made, tmp_path, patch, run_id="r") == [0]
    assert (tmp_path / "0.err").read_text() == ""
    result = (tmp_path / "logs/r.txt").read_text().splitlines()[-1]
    assert json.loads(result.removeprefix("RESULT "))["status"] == "ok"


DIES = """
step = train_gpt.train_step
def dying(run, optimisers, batch, plan, limit):
    if rank == 1 and plan.step == 4:
        die()
    return step(run, optimisers, batch, plan, limit)
train_gpt.train_step = dying
"""


def test_a_rank_that_dies(made, tmp_path):
    codes = start(made, tmp_path, DIES, ranks=2, iterations=20, run_id="r")
    assert codes == [8, -9] and "another rank was lost" in error_line(tmp_path)
    assert '"status": "lost_rank", "exit_code": 8' in (tmp_path / "logs/r.txt").read_text()
    assert not [name for name in files(tmp_path) if name.startswith("final_model")]


def test_a_rank_whose_input_alone_is_bad(made, here):
    """Rank 1 sees another file system: the refusal is rank 1's, told once, by the first."""
    patch = "if rank == 1: import os; os.environ['DATA_PATH'] = 'absent'"
    codes = start(made, here, patch, ranks=2)
    assert codes == [2, 2] and "DATA_PATH=absent" in error_line(here)
    assert (here / "1.err").read_text() == "" and not (here / "logs").exists()


TWO = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
RANKS = {
    "rank_text": dict(RANK="x"),
    "world_text": dict(WORLD_SIZE="two"),
    "local_text": dict(LOCAL_RANK=""),
    "rank_beyond": dict(RANK="3"),
    "rank_beyond_two": TWO | dict(RANK="2"),
    "rank_negative": dict(RANK="-1"),
    "world_none": dict(WORLD_SIZE="0"),
    "no_master": dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"),
    "port_text": TWO | dict(MASTER_PORT="x"),
    "port_beyond": TWO | dict(MASTER_PORT="65536"),
    "half": dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577"),
    "half_with_local_rank": dict(
        WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577"
    ),
    "local_rank_alone": dict(LOCAL_RANK="1"),
}


@pytest.mark.parametrize("name", RANKS)
def test_ranks(made, tmp_path, name):
    refused(made, tmp_path, Case("LOCAL_RANK, RANK, WORLD_SIZE=|torchrun", env=RANKS[name]))


def test_a_port_that_is_taken(made, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        env = TWO | dict(RANK="0", LOCAL_RANK="0", MASTER_PORT=port)
        refused(made, tmp_path, Case(f"MASTER_PORT={port} is taken|set another|--standalone", env=env))


def test_a_rank_without_its_gpu(made, tmp_path):
    """It alone knows, so it tells, whatever its number."""
    patch = "cuda = train_gpt.torch.cuda; cuda.is_available = lambda: True; cuda.device_count = lambda: 1"
    case = Case("rank 1 has no GPU: torch sees 1|--nproc_per_node", dict(device="cuda"), patch=patch, env=TWO)
    refused(made, tmp_path, case)


# --- no code from data ---


UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def calls(tree: ast.AST):
    """(dotted name, call) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe(path: Path) -> list[str]:
    """Where a file could run code that is in its data."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    options = {id(call): {k.arg: ast.unparse(k.value) for k in call.keywords} for _, call in calls(tree)}
    for name, call in calls(tree):
        given = options[id(call)]
        loads = name.rpartition(".")[2] == "load" and name.split(".")[0] in ("torch", "np", "numpy")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{name} without weights_only=True")
        if loads and given.get("allow_pickle", "False") != "False" or name in ("eval", "exec"):
            found.append(name)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if name.split(".")[0] in UNPICKLERS]
    return found


def test_no_code_from_data():
    """No pickle but to make the traps here, and no eval or exec but of a test's own patch."""
    paths = [path for path in ROOT.rglob("*.py") if not {".venv", "venv", "runs", "packed"} & {*path.parts}]
    found = {path.name: unsafe(path) for path in paths}
    assert {name: places for name, places in found.items() if places} == {
        "forkserver.py": ["exec"],
        "test_mutation.py": ["exec"],
        "test_bad_input.py": ["import pickle"],
    }
    assert len(paths) > 30 and "train_gpt.py" in found


def test_the_check_for_code_from_data_can_fail(tmp_path):
    lines = [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "import os, pickle",
        "from shelve import open",
    ]
    for line in lines:
        (tmp_path / "x.py").write_text(line)
        assert unsafe(tmp_path / "x.py"), line
    (tmp_path / "x.py").write_text("torch.load(p, weights_only=True); np.load(p); model.eval(); json.load(f)")
    assert unsafe(tmp_path / "x.py") == []


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed"), "it could not be written whole; is the disk full?"),
        (OSError("odd"), "it could not be written whole; is the disk full?"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_with_the_reason_and_leaves_nothing(tmp_path, error, reason):
    def fails(file) -> None:
        file.write(b"half")
        raise error

    path = tmp_path / "x.pt"
    path.write_bytes(b"before")
    with pytest.raises(OSError) as raised:
        train_gpt.write_atomic(path, fails)
    assert (raised.value.filename, raised.value.strerror) == (str(path), reason)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("x.pt", b"before")]


@pytest.mark.parametrize(
    "explained, status, code",
    [
        (None, "crashed", 1),
        (train_gpt.RunError("bad knob"), "error", 2),
        (train_gpt.RunError("lost", train_gpt.LOST_RANK), None, 8),
    ],
)
def test_a_failed_run_leaves_its_code_in_the_event_and_in_result(explained, status, code):
    events, lines = [], []
    log = SimpleNamespace(event=lambda kind, **facts: events.append((kind, facts)), line=lines.append)
    train_gpt.record_failure(log, "x", ZeroDivisionError("by zero"), explained)
    ((kind, facts),) = events
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert kind == "end" and facts["exit_code"] == result["exit_code"] == code
    assert result["status"] == facts["status"] == (status or facts["status"])
    assert result["message"] == str(explained or "by zero") and result["run_id"] == "x"
