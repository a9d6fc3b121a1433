"""Damaged and forged files against the three readers: artifacts, token shards, checkpoints.

    python tests/bench/bench_fuzz.py --seconds 60 --out records/benchmarks/fuzz.json

Each reader gets --seconds of inputs that hypothesis makes from valid files: bits flipped, bytes cut, moved
and overwritten with absurd sizes; and files whose checksums are right all the same, so that what lies behind
them is reached. Only RunError may come out, no call may take over 2 s or the process over 600 MiB more.
Prints one line a reader. Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import train_gpt  # noqa: E402
from tests.bench.bench_throughput import commit  # noqa: E402
from train_gpt import (  # noqa: E402
    CHECKPOINT,
    GPT,
    PREFIX,
    Config,
    RunError,
    TokenStream,
    open_shard,
    pack,
    unpack,
)

CFG = Config(vocab_size=64, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1, zstd_level=1)
ABOUT = dict(quant="int8", dtype="fp32", config_hash="0123456789abcdef")
ABSURD = (
    0,
    1,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**60,
    2**63 - 1,
    2**64 - 1,
    -1,
    -(2**31),
)
WHOLE_KINDS = [["int8", "step"], ["fp16"], ["fp32"], ["step"], ["fp16", "fp32"]]
WHOLE_KINDS += [["trellis", "walked", "step"], ["trellis"], ["walked"]]
SLOWEST, LARGEST = 2.0, 600.0  # seconds of a call; MiB more than before, at the peak


# --- damage: strategies of functions from bytes to bytes ---


def flip(at: float, bit: int) -> Callable:
    def change(blob: bytes) -> bytes:
        damaged = bytearray(blob or b"\0")
        damaged[int(at * len(damaged))] ^= 1 << bit
        return bytes(damaged)

    return change


def overwrite(at: float, patch: bytes) -> Callable:
    def change(blob: bytes) -> bytes:
        start = int(at * len(blob))
        return blob[:start] + patch + blob[start + len(patch) :]

    return change


def splice(start: float, stop: float, to: float) -> Callable:
    def change(blob: bytes) -> bytes:
        a, b, c = (int(share * len(blob)) for share in (start, stop, to))
        return blob[:c] + blob[min(a, b) : max(a, b)] + blob[c:]

    return change


# Headers are short and at the front, so half of the places are there.
places = st.floats(0, 0.999) | st.floats(0, 0.03)
sizes = st.sampled_from(ABSURD) | st.integers(-(2**63), 2**64 - 1)
numbers = st.builds(
    lambda n, width: (n % 2 ** (8 * width)).to_bytes(width, "little"), sizes, st.sampled_from([2, 4, 8])
)
sizes_of_bombs = st.integers(0, 2**27) | st.integers(0, 2**24)
damage = st.lists(
    st.builds(flip, places, st.integers(0, 7))
    | st.builds(overwrite, places, numbers)
    | st.builds(overwrite, places, st.binary(max_size=20))
    | st.builds(splice, places, places, places)
    | st.builds(lambda share: lambda blob: blob[: int(share * len(blob))], st.floats(0, 1)),
    min_size=1,
    max_size=4,
)


def damaged(blob: bytes, changes: list[Callable]) -> bytes:
    for change in changes:
        blob = change(blob)
    return blob


# --- artifacts ---


def artifacts() -> st.SearchStrategy[bytes]:
    """Damaged ones; ones whose body, or what is packed in it, is damaged and sealed; and forged headers."""
    torch.manual_seed(0)
    state = GPT(CFG).state_dict() | {"wide": torch.randn(300, 240)}  # so large that it is stored as integers
    whole = pack(CFG, state, ABOUT)
    raw = train_gpt.CODECS["zstd"].decompress(whole[PREFIX.size :], 10**8)
    stop = 4 + struct.unpack_from("<I", raw)[0]
    header = json.loads(raw[4:stop])
    anything = st.recursive(
        st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
    kinds = (
        st.lists(st.sampled_from(["int8", "trellis", "walked", "step", "fp16", "fp32", "fp64"]), max_size=3)
        | anything
    )
    shapes = st.lists(st.integers(0, 70_000) | sizes, max_size=10) | anything
    rows = st.tuples(st.sampled_from(sorted(state)) | anything, shapes, kinds) | anything

    small = st.lists(st.integers(0, 40), min_size=1, max_size=4) | st.lists(
        st.integers(0, 60_000), min_size=1, max_size=1
    )
    whole_kinds = st.sampled_from(WHOLE_KINDS)
    fits = st.lists(st.tuples(st.sampled_from("abc"), small, whole_kinds), max_size=3)

    def seal(body: bytes, size: int = len(raw)) -> bytes:
        return train_gpt.seal(b"zstd", size % 2**64, body)

    def packed(text: bytes, planes: bytes) -> bytes:
        inner = struct.pack("<I", len(text)) + text + planes
        return train_gpt.seal(b"zlib", len(inner), zlib.compress(inner, 1))

    def fitting(rows: list[tuple]) -> bytes:  # as many bytes as the table says
        special = dict(step=slice(1), walked=slice(1, 2))  # the others have all axes
        count = sum(np.dtype(train_gpt.PLANES[k]).itemsize * math.prod(s[special.get(k, slice(9))])
                    for _, s, kinds in rows for k in kinds)  # fmt: skip
        return packed(json.dumps(dict(tensors=rows)).encode(), bytes(min(count, 10**6)))

    def row(at: int, new) -> bytes:
        table = [*header["tensors"]]
        table[at % len(table)] = new
        return packed(json.dumps(header | dict(tensors=table)).encode(), raw[stop:])

    return (
        damage.map(lambda changes: damaged(whole, changes))
        | st.builds(lambda changes, n: seal(damaged(whole[PREFIX.size :], changes), n), damage, sizes)
        | damage.map(lambda changes: seal(damaged(whole[PREFIX.size :], changes)))
        | damage.map(lambda changes: packed(damaged(raw[4:stop], changes), raw[stop:]))
        | fits.map(fitting)
        | st.builds(lambda n: packed(b" " * n, b"") if n < 2**24 else packed(b"", bytes(n)), sizes_of_bombs)
        | st.builds(row, st.integers(0, 99), rows)
        | st.builds(lambda table: packed(json.dumps(dict(tensors=table)).encode(), bytes(90_000)), anything)
        | st.builds(
            lambda table, size: packed(json.dumps(dict(tensors=table)).encode(), bytes(size)),
            st.lists(rows, max_size=5),
            st.integers(0, 100_000),
        )
    )


def trellises() -> st.SearchStrategy[bytes]:
    """The same with integers of TRELLIS=1."""
    return streams(trellis=True)


def streams(trellis: bool = False) -> st.SearchStrategy[bytes]:
    """Artifacts of CODEC=rans under a valid seal: damaged streams, forged heads, tables and counts."""
    torch.manual_seed(0)
    cfg = replace(CFG, codec="rans", trellis=trellis)
    state = GPT(CFG).state_dict() | {"wide": torch.randn(300, 240)}
    whole = pack(cfg, state, ABOUT)
    body = whole[PREFIX.size :]
    *_, raw_length, _ = PREFIX.unpack_from(whole)
    head = train_gpt.RANS_HEAD
    version, used, text_length, first_length = head.unpack_from(body)
    text = zlib.decompress(body[head.size : head.size + text_length])
    streams_bytes = body[head.size + text_length :]

    def seal(body: bytes, size: int = raw_length) -> bytes:
        return train_gpt.seal(b"rans", size % 2**64, body)

    def forge(text: bytes, changes: tuple[int, int, int], size: int = raw_length) -> bytes:
        packed = zlib.compress(text, 1)
        more_contexts, more_text, more_stream = changes
        told = (used + more_contexts) % 256, (len(packed) + more_text) % 2**32, first_length + more_stream
        return seal(head.pack(version, *told[:2], told[2] % 2**32) + packed + streams_bytes, size)

    def tell(shape: list, size: int) -> bytes:
        planes = ["trellis", "walked", "step"] if trellis else ["int8", "step"]
        header = json.dumps(dict(tensors=[["blocks.0.attn.c_q.weight", shape, planes]])).encode()
        side_count, tables_each = train_gpt.RANS_TABLES[version]
        tables = text[-512 * (used * tables_each + side_count) :]
        return forge(struct.pack("<I", len(header)) + header + tables, (0, 0, 0), size)

    near = st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(-3, 3))
    return (
        damage.map(lambda changes: seal(damaged(body, changes)))
        | st.builds(lambda changes, size: seal(damaged(body, changes), size), damage, sizes)
        | st.builds(lambda changes, told: forge(damaged(text, changes), told), damage, near)
        | st.builds(lambda told, size: forge(text, told, size), st.tuples(sizes, sizes, sizes), sizes)
        | st.builds(tell, st.lists(st.integers(0, 70_000) | sizes, max_size=3), sizes)
    )


def read_artifact(blob: bytes, folder: Path) -> None:
    state, header = unpack(blob, "x")
    assert all(tensor.dtype == torch.float32 for tensor in state.values()) and isinstance(header, dict)


# --- shards ---


def shards() -> st.SearchStrategy[bytes]:
    """Damaged ones, any header before any tokens, and right headers before other tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, 3000
    tokens = np.random.default_rng(0).integers(64, size=3000).astype("<u2").tobytes()
    whole = header.tobytes() + tokens

    def told(count: int, body: bytes) -> bytes:
        return whole[:8] + struct.pack("<i", (count + 2**31) % 2**32 - 2**31) + whole[12:1024] + body

    bodies = st.binary(max_size=200) | damage.map(lambda changes: damaged(tokens, changes))
    return (
        damage.map(lambda changes: damaged(whole, changes))
        | st.builds(told, sizes, bodies)
        | bodies.map(lambda body: told(len(body) // 2, body))
        | st.binary(max_size=1100)
    )


def read_shard(blob: bytes, folder: Path) -> None:
    path = folder / "x_train_0.bin"
    path.write_bytes(blob)
    tokens = open_shard(path)
    stream = TokenStream(str(folder), "train", CFG.vocab_size)
    assert len(stream) == len(tokens) > 0
    middle = len(stream) // 2
    for start, count in ((0, len(stream)), (middle, 1), (middle, len(stream) - middle)):
        assert stream.read(start, count).max() < CFG.vocab_size


# --- checkpoints ---


def checkpoints() -> st.SearchStrategy[bytes]:
    """Damaged ones, and zip files whose parts are damaged but have the right checksums."""
    torch.manual_seed(0)
    model = {name: tensor.clone() for name, tensor in GPT(CFG).state_dict().items()}
    state = dict(kind=CHECKPOINT, run_id="x", same=dict(SEED=1), dtype="fp32", resumed=[], total=[])
    state |= dict(step=2, scales=1.0, seconds=1.0, recent=[0.1], random=[torch.get_rng_state()], scores={})
    saved = io.BytesIO()
    torch.save(state | dict(model=model, optimisers=dict(adam={}, muon=[])), saved)
    with zipfile.ZipFile(saved) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))

    def zipped(changes: list[Callable], name: str, method: int = zipfile.ZIP_STORED) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", method) as file:
            for other, part in parts.items():
                file.writestr(other, damaged(part, changes) if other == name else part)
        return made.getvalue()

    return (
        damage.map(lambda changes: damaged(saved.getvalue(), changes))
        | st.builds(zipped, damage, st.just(pickled))
        | st.builds(zipped, damage, st.sampled_from(sorted(parts)))
        | st.builds(zipped, damage, st.just(pickled), st.just(zipfile.ZIP_DEFLATED))
    )


def read_state(blob: bytes, folder: Path) -> None:
    path = folder / "x.pt"
    path.write_bytes(blob)
    assert train_gpt.read_checkpoint(path)["kind"] == CHECKPOINT


# --- the benchmark ---

READERS = dict(
    unpack_rans=(streams, read_artifact),
    unpack_trellis=(trellises, read_artifact),
    unpack=(artifacts, read_artifact),
    shards=(shards, read_shard),
    read_checkpoint=(checkpoints, read_state),
)


@dataclass
class Tally:
    """What a reader met."""

    tried: int = 0
    slowest: float = 0.0
    outcomes: Counter = field(default_factory=Counter)


def kind_of(error: RunError) -> str:
    """The message without what is particular to one input."""
    text = re.sub(r"\S*x(_train_0\.bin|\.pt)?(?=[ :])", "FILE", str(error), count=1)
    own = "cannot be" not in text or "(RunError" in text  # else Python's or a codec's, with the input in it
    text = re.sub(r"b'.*?'$|b\".*?\"$", "BYTES", text if own else f"{text.partition(': ')[0]})")
    return re.sub(r"-?\d+", "N", text)[:90]


def attempt(read: Callable, blob: bytes, folder: Path, tally: Tally) -> None:
    """One input. AssertionError, or whatever else escapes, ends the benchmark."""
    tally.tried, outcome = tally.tried + 1, "read"
    began = time.process_time()  # on a busy machine the clock on the wall says nothing of the reader
    try:
        read(blob, folder)
    except RunError as error:
        assert error.code == 2 and str(error)
        outcome = kind_of(error)
    taken = time.process_time() - began
    assert taken < SLOWEST, f"{taken:.1f} s for {len(blob)} bytes"
    tally.slowest = max(tally.slowest, taken)
    tally.outcomes[outcome] += 1


def peak_mib() -> float:
    """Most memory this process has held."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def fuzz(name: str, seconds: float, folder: Path) -> dict:
    """Rounds of 200 inputs, each with a seed of its own, until the time is up."""
    make, read = READERS[name]
    strategy, tally, began = make(), Tally(), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = peak_mib()
    quiet = settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=HealthCheck,
    )
    rounds = 0
    while time.perf_counter() - began < seconds:
        rounds += 1
        hypothesis.seed(rounds)(quiet(given(strategy)(lambda blob: attempt(read, blob, folder, tally))))()
    grown = peak_mib() - before
    assert grown < LARGEST, f"{name}: the process grew by {grown:.0f} MiB"
    spent = round(time.perf_counter() - began, 1)
    return dict(
        inputs=tally.tried, seconds=spent, slowest_ms=round(1000 * tally.slowest, 1),
        grown_mib=round(grown, 1), outcomes=dict(tally.outcomes.most_common()),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader")
    parser.add_argument("--readers", nargs="*", choices=READERS, default=list(READERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # zipfile's on names that come twice
    machine = train_gpt.describe_machine(train_gpt.Runtime())
    report = dict(benchmark="fuzz", commit=commit(), seconds_each=options.seconds)
    report |= {key: machine[key] for key in ("device", "python", "torch", "numpy")}
    report |= dict(
        hypothesis=hypothesis.__version__, limits=dict(seconds=SLOWEST, grown_mib=LARGEST), readers={}
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in options.readers:
            row = report["readers"][name] = fuzz(name, options.seconds, Path(folder))
            read, kinds = row["outcomes"].get("read", 0), len(row["outcomes"])
            speed = f"slowest {row['slowest_ms']} ms, grew {row['grown_mib']} MiB"
            print(f"{name}: {row['inputs']} inputs, {read} read, {kinds} outcomes, {speed}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
