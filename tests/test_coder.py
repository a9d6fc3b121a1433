"""CODEC=rans: every byte comes back, at the entropy of its tables, and no forged stream hurts the reader."""

import json
import random
import struct
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from records.artifact_head import read_head
from tests import test_artifact
from tests.test_artifact import ABOUT, BY_CODEC, LARGE, trained_like
from train_gpt import (
    CODECS,
    RANS_HEAD,
    Config,
    RunError,
    frequency_tables,
    integer_contexts,
    pack,
    pack_tables,
    rans_decode,
    rans_encode,
    scale_classes,
    unpack,
    unpack_tables,
)


def entropy_bytes(symbols: np.ndarray, contexts: np.ndarray, tables: np.ndarray) -> float:
    """What the symbols cost with these tables, by the definition, float64."""
    shares = tables[contexts, symbols].astype(np.float64) / tables.sum(axis=1)[contexts]
    return float(-np.log2(shares).sum() / 8)


def gaussian(shape: tuple[int, int], spread: float, scale: float = 2.5) -> np.ndarray:
    """Integers [r, c] of rows and columns of different scales."""
    rng = np.random.default_rng(3)
    rows = np.exp(spread * rng.standard_normal((shape[0], 1)))
    columns = np.exp(spread * rng.standard_normal(shape[1]))
    return np.rint(scale * rows * columns * rng.standard_normal(shape)).clip(-127, 127).astype(np.int8)


def raw_file(integers: np.ndarray, name: str = "blocks.0.attn.c_q.weight") -> bytes:
    """An artifact before compression that holds one matrix of integers and its steps."""
    header = dict(ABOUT, codec="rans", model={}, tensors=[[name, integers.shape, ["int8", "step"]]])
    text = json.dumps(header).encode()
    steps = np.full(len(integers), 0.01, "<f2")
    return struct.pack("<I", len(text)) + text + integers.tobytes() + steps.tobytes()


def refused(blob: bytes) -> None:
    """Check that a bad artifact is refused by one line, quickly and with little memory."""
    assert "cannot be unpacked" in test_artifact.refused(blob)


def coded(integers: np.ndarray) -> bytes:
    return train_gpt.compress_rans(raw_file(integers), Config())


# --- streams ---


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_symbols_come_back(data):
    count = data.draw(st.sampled_from([0, 1, 2, 255, 1000, 8192, 40_000]))
    contexts_count = data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    alphabet = data.draw(st.sampled_from([1, 2, 30, 256]))
    symbols = (rng.integers(0, alphabet, count) ** 3 % 256).astype(np.uint8)
    contexts = rng.integers(0, contexts_count, count).astype(np.uint8)
    tables = frequency_tables(symbols, contexts, contexts_count)
    stream = rans_encode(symbols, contexts, tables)
    assert np.array_equal(rans_decode(stream, contexts, tables), symbols)


@pytest.mark.parametrize("seed", range(4))
def test_tables_add_up_and_miss_no_symbol(seed):
    rng = np.random.default_rng(seed)
    symbols = (255 * rng.random(50_000) ** (1 + 9 * seed)).astype(np.uint8)
    contexts = rng.integers(0, 3, 50_000).astype(np.uint8)
    tables = frequency_tables(symbols, contexts, 4)
    assert tables.sum(axis=1).tolist() == [1 << 14] * 3 + [0]
    assert (tables[contexts, symbols] > 0).all() and np.array_equal(
        unpack_tables(pack_tables(tables)), tables
    )


def test_a_table_with_every_symbol_rare_but_one_adds_up():
    symbols = np.concatenate([np.zeros(10_000_000, np.uint8), np.arange(256, dtype=np.uint8)])
    tables = frequency_tables(symbols, np.zeros_like(symbols), 1)
    assert tables.sum() == 1 << 14 and (tables > 0).all()


@pytest.mark.parametrize("scale", [0.3, 2.5, 20.0])
def test_a_stream_is_within_half_a_percent_of_its_tables_entropy(scale):
    integers = gaussian((600, 500), 0.3, scale)
    contexts = integer_contexts([(0, *integers.shape)], np.concatenate(scale_classes(integers)))
    symbols = integers.ravel().view(np.uint8)
    tables = frequency_tables(symbols, contexts, 192)
    least = entropy_bytes(symbols, contexts, tables)
    # The tables themselves are near the counts: their entropy is that of the data in its contexts.
    assert least <= len(rans_encode(symbols, contexts, tables)) <= 1.005 * least
    counts = np.zeros((192, 256))
    np.add.at(counts, (contexts, symbols), 1)
    shares = (counts / counts.sum(axis=1, keepdims=True).clip(1))[contexts, symbols]
    assert least <= 1.002 * -np.log2(shares).sum() / 8


def test_scales_of_rows_and_columns_are_worth_what_theory_says():
    """sigma_i tau_j Gaussians cost the mean of their own entropies, not the mixture's: 0.5 bit less here."""
    integers = gaussian((700, 600), 0.6)
    symbols = integers.ravel().view(np.uint8)
    alone = np.zeros_like(symbols)
    plain = entropy_bytes(symbols, alone, frequency_tables(symbols, alone, 1))
    assert len(coded(integers)) < 0.92 * plain


def test_without_scales_the_classes_cost_next_to_nothing():
    integers = gaussian((700, 600), 0.0)
    symbols = integers.ravel().view(np.uint8)
    alone = np.zeros_like(symbols)
    plain = entropy_bytes(symbols, alone, frequency_tables(symbols, alone, 1))
    assert len(coded(integers)) < 1.015 * plain


# --- bodies ---


@pytest.mark.parametrize("integers", [
    gaussian((64, 300), 0.3), np.zeros((300, 40), np.int8), np.full((1, 9000), -127, np.int8),
    np.empty((0, 5), np.int8),
], ids=["gaussian", "zeros", "constant", "empty"])  # fmt: skip
def test_any_matrix_comes_back(integers):
    raw = raw_file(integers)
    assert train_gpt.decompress_rans(coded(integers), len(raw)) == raw


def test_rans_is_smaller_than_zstd_and_zlib(tiny):
    state = trained_like(tiny(**LARGE, quant_levels=31))
    sizes = {}
    for codec in ("rans", "zstd", "zlib"):
        knobs = LARGE | dict(quant_levels=31, codec=codec, zstd_level=22 if codec == "zstd" else 3)
        sizes[codec] = len(pack(tiny(**knobs), state, ABOUT))
    assert sizes["rans"] < 0.97 * min(sizes["zstd"], sizes["zlib"])


def forge(text: bytes, streams: bytes, raw_length: int, changes: dict | None = None) -> bytes:
    """A rans artifact with a valid checksum around any text (what zlib packs) and streams."""
    packed = zlib.compress(text)
    head = dict(version=1, used=192, text=len(packed), first=4) | (changes or {})
    body = RANS_HEAD.pack(*head.values()) + packed + streams
    return train_gpt.seal(CODECS["rans"].tag, raw_length, body)


def text_of(tensors: list, tables: bytes = bytes(512 * 204)) -> bytes:
    header = json.dumps(dict(ABOUT, codec="rans", model={}, tensors=tensors)).encode()
    return struct.pack("<I", len(header)) + header + tables


EMPTY_STATE = struct.pack("<I", 1 << 16)
NAME = "blocks.0.attn.c_q.weight"


def test_the_forgers_tools_make_a_valid_artifact():
    text = text_of([])
    blob = forge(text, 2 * EMPTY_STATE, len(text) - 512 * 204)
    assert unpack(blob, "x")[0] == {}


@pytest.mark.parametrize(
    "shape", [[1 << 14, 1 << 14], [1 << 40, 2], [1 << 31, 1 << 31], [3, 5], [8, 9, 2], [7]]
)
def test_counts_beyond_what_a_stream_can_hold_are_refused(shape):
    text = text_of([[NAME, shape, ["int8", "step"]]])
    for raw_length in (100, len(text), 1 << 28, 1 << 29):
        refused(forge(text, 2 * EMPTY_STATE, raw_length))


@pytest.mark.parametrize("planes", [["fp32"], ["fp16"], ["step"], ["column"], ["fp32", "fp16", "step"]])
@pytest.mark.parametrize(
    "shape", [[1 << 26, 1 << 10], [1 << 28, 1], [1, 1 << 28], [1 << 40, 0], [1 << 60, 1 << 60]]
)
def test_floats_beyond_what_a_stream_can_hold_are_refused(shape, planes):
    text = text_of([[NAME, shape, planes]])
    for raw_length in (100, len(text), 1 << 28, 1 << 29, len(text) - 512 * 204 + (1 << 29)):
        refused(forge(text, 2 * EMPTY_STATE, min(raw_length, 1 << 29)))


@pytest.mark.parametrize("changes", [
    dict(version=0), dict(version=2), dict(used=0), dict(used=7), dict(used=255), dict(text=0),
    dict(text=1 << 31), dict(first=0), dict(first=3), dict(first=1 << 31),
])  # fmt: skip
def test_a_forged_head_is_refused(changes):
    text = text_of([])
    refused(forge(text, 2 * EMPTY_STATE, len(text) - 512 * 204, changes))


@pytest.mark.parametrize("value", [1, 255, 65535])
def test_forged_tables_are_refused(value):
    tables = np.full(256 * 204, value, "<u2").view(np.uint8).reshape(-1, 2).T.tobytes()
    text = text_of([[NAME, [40, 30], ["int8", "step"]]], tables)
    refused(forge(text, bytes(400), len(text) - 512 * 204 + 1280))


def test_text_that_unpacks_to_far_more_than_any_is_refused_unread():
    refused(forge(text_of([], bytes(60_000_000)), 2 * EMPTY_STATE, 100))


def test_a_changed_byte_of_a_body_never_breaks_the_reader():
    """Behind a valid checksum a change may give other weights, or one line; never another error."""
    integers = gaussian((30, 70), 0.3)
    raw, body = raw_file(integers), bytearray(coded(integers))
    rng = random.Random(4)
    refusals = 0
    for _ in range(100):
        damaged = bytearray(body)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(len(body))] = rng.randrange(256)
        try:
            unpack(train_gpt.seal(CODECS["rans"].tag, len(raw), bytes(damaged)), "some.ptz")
        except RunError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 80


@pytest.mark.parametrize("length", [0, 1, 9, 40, 200])
def test_a_body_that_is_cut_is_refused(length):
    integers = gaussian((30, 70), 0.3)
    refused(train_gpt.seal(CODECS["rans"].tag, len(raw_file(integers)), coded(integers)[:length]))


@pytest.mark.parametrize("codec", BY_CODEC)
def test_the_linter_reads_the_head_of_every_codec(tiny, codec):
    cfg = tiny(**LARGE, codec=codec)
    blob = pack(cfg, trained_like(cfg), ABOUT)
    assert read_head(blob) == unpack(blob, "x")[1]


# --- brotli is optional, and control tensors may be float16 ---


def test_packing_without_brotli_is_one_line(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "brotli", None)
    cfg = tiny(codec="brotli")
    with pytest.raises(RunError, match="CODEC=brotli needs brotli: pip install brotli, or set CODEC=rans"):
        pack(cfg, trained_like(cfg), ABOUT)


def test_an_old_brotli_is_refused(tiny, monkeypatch):
    """Before 1.2 it cannot stop at a length, so that a forged file would fill the memory."""
    old = type(sys)("brotli")
    old.Decompressor = object
    monkeypatch.setitem(sys.modules, "brotli", old)
    with pytest.raises(RunError, match=r"brotli 1\.2 or newer"):
        train_gpt.check_codec(tiny(codec="brotli"))


def test_control_tensors_as_float16(tiny):
    cfg = tiny(**LARGE, control_float16=True)
    state = trained_like(cfg)
    restored = unpack(pack(cfg, state, ABOUT), "x")[0]
    name = "blocks.0.attn_scale"
    assert restored[name].equal(state[name].half().float()) and not restored[name].equal(state[name])
    exact = pack(tiny(**LARGE), state, ABOUT)
    assert len(pack(cfg, state, ABOUT)) < len(exact) and unpack(exact, "x")[0][name].equal(state[name])
