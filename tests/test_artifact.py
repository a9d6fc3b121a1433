"""The packed model: what comes back, the same bytes every time, and no file that can hurt the reader."""

import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import reference
import torch
import zstandard
from conftest import ROOT

import train_gpt
from train_gpt import (
    CODECS,
    GPT,
    PREFIX,
    Config,
    RunError,
    load_weights,
    pack,
    payload_bytes,
    predict_size,
    quantise_rows,
    unpack,
)

ABOUT = dict(quant="int8", dtype="fp32", config_hash="0123456789abcdef")
# Its embedding and MLP matrices pass 65,536 values, so they are stored as int8; the rest as floats.
LARGE = dict(model_dim=256, vocab_size=320, zstd_level=3)


def trained_like(cfg: Config) -> dict[str, torch.Tensor]:
    """A state dict with Gaussian matrices, as trained ones nearly are."""
    torch.manual_seed(0)
    return reference.randomise(GPT(cfg)).state_dict()


@pytest.fixture
def large(tiny):
    """(config, state dict) with every kind of storage in it."""
    cfg = tiny(**LARGE)
    return cfg, trained_like(cfg)


def body_of(blob: bytes, cfg: Config) -> bytes:
    """The decompressed body."""
    *_, raw_length, _ = PREFIX.unpack_from(blob)
    return CODECS[cfg.codec][1](blob[PREFIX.size :], raw_length)


def sealed(codec: str, body: bytes, raw_length: int) -> bytes:
    """An artifact around any body, with a valid checksum and length."""
    return train_gpt.sealed(codec.encode(), raw_length, body)


def forged(header, planes: bytes = b"", codec: str = "zlib") -> bytes:
    """An artifact that is valid but for its header (bytes, or JSON data) and planes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = struct.pack("<I", len(text)) + text + planes
    body = zlib.compress(raw) if codec == "zlib" else zstandard.ZstdCompressor().compress(raw)
    return sealed(codec, body, len(raw))


def refused(blob: bytes) -> str:
    """The one-line refusal of a bad artifact, which must be quick and small in memory."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(RunError) as refusal:
            unpack(blob, "some.ptz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refusal.value.code == 2 and "some.ptz" in str(refusal.value) and "\n" not in str(refusal.value)
    assert time.perf_counter() - began < 2 and peak < 8 * len(blob) + 4_000_000
    return str(refusal.value)


# --- there and back ---


@pytest.mark.parametrize("codec", CODECS)
def test_names_shapes_and_header_come_back(large, tiny, codec):
    cfg, state = tiny(**LARGE, codec=codec), large[1]
    restored, header = unpack(pack(cfg, state, ABOUT), "x")
    assert {n: t.shape for n, t in restored.items()} == {n: t.shape for n, t in state.items()}
    assert {t.dtype for t in restored.values()} == {torch.float32}
    assert header["model"] == cfg.shape() and header["codec"] == codec
    assert {key: header[key] for key in ABOUT} == ABOUT


def test_what_comes_back_loads(large):
    cfg, state = large
    model, restored = GPT(cfg), unpack(pack(cfg, state, ABOUT), "x")[0]
    load_weights(model, restored, "x")
    assert all(torch.equal(tensor, restored[name]) for name, tensor in model.state_dict().items())


def test_int8_rows_are_off_by_at_most_half_a_step(large):
    cfg, state = large
    restored, int8 = unpack(pack(cfg, state, ABOUT), "x")[0], 0
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.numel() > 65_536:
            step = (tensor.abs().amax(dim=1, keepdim=True) / 127) * (1 + 2**-10)
            assert ((restored[name] - tensor).abs() <= step / 2).all(), name
            int8 += 1
    assert int8 == 1 + 2 * 2, "the embedding and the two MLP matrices of each block"


def test_control_tensors_come_back_exactly(large):
    cfg, state = large
    restored = unpack(pack(cfg, state, ABOUT), "x")[0]
    control = ["skip_weights"] + [n for n in state if n.endswith(("q_gain", "_scale", "resid_mix"))]
    assert len(control) == 1 + 2 * 4
    assert all(torch.equal(restored[name], state[name]) for name in control)


def test_other_small_tensors_come_back_as_float16(large):
    cfg, state = large
    restored = unpack(pack(cfg, state, ABOUT), "x")[0]
    small = [n for n in state if n.endswith(("c_q.weight", "c_k.weight"))]
    assert all(torch.equal(restored[name], state[name].half().float()) for name in small) and small


def test_the_names_to_keep_are_a_knob(tiny, large):
    cfg = tiny(**LARGE, int8_keep_float_fp32_name_patterns=("c_q",))
    restored, state = unpack(pack(cfg, large[1], ABOUT), "x")[0], large[1]
    assert torch.equal(restored["blocks.0.attn.c_q.weight"], state["blocks.0.attn.c_q.weight"])
    assert not torch.equal(restored["blocks.0.attn_scale"], state["blocks.0.attn_scale"])


def test_a_model_without_skips_comes_back(tiny):
    cfg = tiny(encoder_layers=0)
    assert unpack(pack(cfg, trained_like(cfg), ABOUT), "x")[0]["skip_weights"].shape == (0, cfg.model_dim)


def test_packing_does_not_touch_the_weights(large):
    cfg, state = large
    before = {name: tensor.clone() for name, tensor in state.items()}
    pack(cfg, state, ABOUT)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [1e5, -1e30, 6e4])
def test_a_large_finite_weight_is_packed_or_refused_never_made_infinite(tiny, value):
    cfg = tiny()
    state = trained_like(cfg)
    state["blocks.0.mlp.fc.weight"][3, 5] = value
    try:
        restored = unpack(pack(cfg, state, ABOUT), "x")[0]
    except RunError:
        return
    assert restored["blocks.0.mlp.fc.weight"][3, 5] == pytest.approx(value, rel=1e-3)


def test_a_large_finite_row_is_packed_or_refused_never_made_infinite(large):
    cfg, state = large
    state["tok_emb.weight"][7] *= 1e9
    try:
        restored = unpack(pack(cfg, state, ABOUT), "x")[0]
    except RunError:
        return
    assert torch.isfinite(restored["tok_emb.weight"]).all()


# --- rows of int8 ---


def rows(kind: str) -> torch.Tensor:
    """[16, 300] of weights."""
    weight = torch.randn(16, 300, generator=torch.Generator().manual_seed(1))
    if kind == "scales":
        weight *= torch.logspace(-2, 3, 16)[:, None]
    elif kind == "outliers":
        weight[:, 7] *= 60
    elif kind == "constant":
        weight = weight.sign()
    elif kind == "zeros":
        weight[3:9] = 0
    return weight


KINDS = ["normal", "scales", "outliers", "constant", "zeros"]


@pytest.mark.parametrize("floor", [0.0, 1 / 127])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_reference(kind, floor):
    weight = rows(kind)
    expected = reference.row_steps(weight.double().numpy(), floor)
    np.testing.assert_allclose(quantise_rows(weight, floor)[1].numpy(), expected, rtol=2**-10)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_best_of_all(kind):
    weight = rows(kind)
    codes, steps = quantise_rows(weight, 0.0)
    ours = (codes.double() * steps.double()[:, None] - weight.double()).abs().numpy()
    best = reference.least_error(weight.double().numpy(), steps.numpy())
    np.testing.assert_allclose(ours, best, atol=1e-5 * float(steps.max()))


def test_the_official_floor_is_the_official_clamp():
    weight = 0.05 * rows("normal")
    codes, steps = quantise_rows(weight, 1 / 127)
    assert (steps == torch.tensor(1 / 127).half()).all()
    assert (codes == (weight * 127).round()).float().mean() > 0.99  # the stored step is float16's 1/127
    assert codes.abs().max() < 40, "the clamp wastes most of the codes"


def test_without_the_floor_all_codes_are_used():
    codes, _ = quantise_rows(0.05 * rows("normal"), 0.0)
    assert (codes.abs().amax(dim=1) == 127).all()


def test_a_higher_floor_makes_a_smaller_artifact(tiny, large):
    plain, floored = (len(pack(tiny(**LARGE, quant_scale_floor=f), large[1], ABOUT)) for f in (0.0, 0.5))
    assert floored < 0.8 * plain


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-9])
def test_tiny_rows_come_back_no_worse_than_zero(scale):
    weight = scale * rows("normal")
    codes, steps = quantise_rows(weight, 0.0)
    restored = codes.float() * steps.float()[:, None]
    assert torch.isfinite(restored).all()
    assert ((restored - weight).norm(dim=1) <= weight.norm(dim=1) * 1.01).all()


# --- bytes and sizes ---


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_input_gives_the_same_bytes(large, tiny, codec):
    cfg, state = tiny(**LARGE, codec=codec), large[1]
    backwards = dict(reversed(state.items()))
    assert pack(cfg, state, ABOUT) == pack(cfg, backwards, dict(reversed(ABOUT.items())))


PACK_ELSEWHERE = """
import hashlib
from dataclasses import replace
import torch
from train_gpt import GPT, Config, pack
torch.manual_seed(3)
cfg = replace(Config(), vocab_size=64, num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1)
print(hashlib.sha256(pack(cfg, GPT(cfg).state_dict(), dict(a=1, b="two"))).hexdigest())
"""


def test_the_bytes_do_not_depend_on_the_hash_seed():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", PACK_ELSEWHERE], env={**env, "PYTHONHASHSEED": seed},
                         stdout=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    ]  # fmt: skip
    first, second = (run.communicate(timeout=120)[0] for run in runs)
    assert len(first) == 65 and first == second


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("knobs", [{}, LARGE, dict(encoder_layers=0), dict(tie_embeddings=False)])
def test_the_payload_is_counted_exactly(tiny, knobs, codec):
    cfg = tiny(**knobs, codec=codec)
    state = trained_like(cfg)
    raw = body_of(pack(cfg, state, ABOUT), cfg)
    header = 4 + struct.unpack_from("<I", raw)[0]
    assert payload_bytes(cfg, state) == len(raw) - header


@pytest.mark.parametrize("codec", CODECS)
def test_the_predicted_size_is_near_the_real_one(tiny, codec):
    cfg = tiny(model_dim=384, num_heads=6, num_kv_heads=3, num_layers=2, vocab_size=1024, codec=codec)
    torch.manual_seed(0)
    model = reference.randomise(GPT(cfg))
    assert predict_size(cfg, model) == pytest.approx(len(pack(cfg, model.state_dict(), ABOUT)), rel=0.1)


def test_zstd_beats_no_compression_at_every_level(tiny, large):
    sizes = [len(pack(tiny(**LARGE | dict(zstd_level=level)), large[1], ABOUT)) for level in (1, 22)]
    assert max(sizes) < payload_bytes(*large) and sizes[0] != sizes[1]


# --- damaged files ---


@pytest.fixture(scope="module", params=CODECS)
def blob(request):
    """A small artifact of each codec."""
    cfg = Config(vocab_size=64, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1, codec=request.param)
    return pack(cfg, trained_like(cfg), ABOUT)


def flip(blob: bytes, bit: int) -> bytes:
    damaged = bytearray(blob)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def accepted(blob: bytes) -> bool:
    try:
        unpack(blob, "some.ptz")
    except RunError:
        return False
    return True


def test_a_flipped_bit_of_the_body_is_noticed(blob):
    rng = random.Random(0)
    bits = [rng.randrange(8 * PREFIX.size, 8 * len(blob)) for _ in range(200)]
    assert [bit for bit in bits if accepted(flip(blob, bit))] == []


def test_a_flipped_bit_of_the_prefix_is_noticed(blob):
    assert [bit for bit in range(8 * PREFIX.size) if accepted(flip(blob, bit))] == []


def test_a_truncated_file_is_noticed(blob):
    rng = random.Random(1)
    lengths = [0, 1, PREFIX.size - 1, PREFIX.size, len(blob) - 1] + rng.sample(range(len(blob)), 50)
    assert [length for length in lengths if accepted(blob[:length])] == []


def test_appended_bytes_are_noticed(blob):
    assert not accepted(blob + b"\0")


WRONG = {
    "magic": lambda b: b"PGOLFZ" + b[6:],
    "version": lambda b: b[:6] + b"\x02" + b[7:],
    "codec": lambda b: b[:7] + b"lzma" + b[11:],
    "codec_no_text": lambda b: b[:7] + b"\xff\xfe\x00\x80" + b[11:],
    "pickle": lambda b: b"\x80\x04K\x01." + b[5:],
    "zlib_of_the_official_script": lambda b: zlib.compress(b * 9),
    "text": lambda b: b"hello\n" * 50,
    "nothing": lambda b: b"",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_of_another_kind_is_refused(blob, kind):
    refused(WRONG[kind](blob))


@pytest.mark.parametrize("place, value", [
    ("raw", 0), ("raw", 1), ("raw", 1 << 30), ("raw", (1 << 30) + 1), ("raw", (1 << 64) - 1),
    ("body", 0), ("body", 1 << 40), ("body", (1 << 64) - 1),
])  # fmt: skip
def test_a_wrong_length_is_refused(blob, place, value):
    *head, raw, body = PREFIX.unpack_from(blob)
    lengths = (value, body) if place == "raw" else (raw, value)
    refused(PREFIX.pack(*head, *lengths) + blob[PREFIX.size :])


def table(*rows) -> dict:
    return dict(ABOUT, codec="zlib", model={}, tensors=list(rows))


FORGED = {
    "no_header": b"",
    "bad_json": b'{"tensors": [',
    "no_text": b"\xff\xfe\xfd",
    "not_an_object": [1, 2, 3],
    "null": None,
    "no_tensors": dict(ABOUT),
    "tensors_null": dict(tensors=None),
    "deep": b"[" * 50_000,
    "short_row": table(["a"]),
    "unknown_kind": table(["a", [2], ["fp64"]]),
    "no_kind": table(["a", [2], []]),
    "shape_null": table(["a", None, ["fp32"]]),
    "shape_text": table(["a", ["2"], ["fp32"]]),
    "shape_float": table(["a", [2.0], ["fp32"]]),
    "shape_huge": table(["a", [1 << 40], ["fp32"]]),
    "shape_overflow": table(["a", [1 << 62, 1 << 62], ["fp32"]]),
    "shape_negative": table(["a", [-2], ["fp32"]]),
    "shape_all": table(["a", [-1], ["fp32"]]),
    "shape_negatives": table(["a", [-1, -2], ["fp32"]]),
    "shape_more": table(["a", [3], ["fp32"]]),
    "shape_less": table(["a", [1], ["fp32"]]),
    "int8_without_shape": table(["a", [], ["int8", "step"]]),
    "name_list": table([["a"], [2], ["fp32"]]),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_header_with_a_valid_checksum_is_refused(kind, codec):
    refused(forged(FORGED[kind], planes=struct.pack("<2f", 1, 2), codec=codec))


def test_the_forgers_tools_make_a_valid_artifact():
    state, _ = unpack(forged(table(["a", [2], ["fp32"]]), planes=struct.pack("<2f", 1, 2)), "x")
    assert state["a"].tolist() == [1, 2]


@pytest.mark.parametrize("size", [0, 1, 5_000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_header_longer_or_shorter_than_it_says_is_refused(size):
    raw = (
        struct.pack("<I", size) + json.dumps(table(["a", [2], ["fp32"]])).encode() + struct.pack("<2f", 1, 2)
    )
    refused(sealed("zlib", zlib.compress(raw), len(raw)))


BOMB = bytes(64_000_000)


@pytest.mark.parametrize("raw_length", [0, 100])
@pytest.mark.parametrize("codec", CODECS)
def test_a_body_that_unpacks_to_more_than_it_says_is_refused_unread(codec, raw_length):
    body = zlib.compress(BOMB, 1) if codec == "zlib" else zstandard.ZstdCompressor().compress(BOMB)
    refused(sealed(codec, body, raw_length))


def test_a_zstd_frame_that_claims_to_be_huge_is_refused_unread():
    # A frame header of one segment, with an eight-byte content size of 2^40; then an empty last block.
    frame = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"
    refused(sealed("zstd", frame, 1000))


def test_a_body_of_another_codec_is_refused():
    refused(sealed("zlib", zstandard.ZstdCompressor().compress(b"x" * 99), 99))
    refused(sealed("zstd", zlib.compress(b"x" * 99), 99))


# --- zstandard is optional only when it is not asked for ---


@pytest.fixture
def no_zstandard(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)


def test_packing_without_zstandard_is_an_error_not_zlib(tiny, no_zstandard):
    cfg = tiny()
    with pytest.raises(RunError, match="pip install zstandard"):
        pack(cfg, trained_like(cfg), ABOUT)


def test_reading_zstd_without_zstandard_says_what_is_missing(tiny, monkeypatch):
    cfg = tiny()
    blob = pack(cfg, trained_like(cfg), ABOUT)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(RunError, match="pip install zstandard"):
        unpack(blob, "x")


def test_zlib_needs_no_zstandard(tiny, no_zstandard):
    cfg = tiny(codec="zlib")
    assert unpack(pack(cfg, trained_like(cfg), ABOUT), "x")[1]["codec"] == "zlib"


def test_half_a_step_is_what_uniform_rounding_costs(large):
    """The rounding error of int8 rows is uniform: its root mean square is step / sqrt(12)."""
    cfg, state = large
    error = unpack(pack(cfg, state, ABOUT), "x")[0]["tok_emb.weight"] - state["tok_emb.weight"]
    step = state["tok_emb.weight"].abs().amax(dim=1, keepdim=True) / 127
    assert (error / step).square().mean().sqrt().item() == pytest.approx(1 / math.sqrt(12), rel=0.02)
