"""The packed model: what comes back, the same bytes every time, and no file that can hurt the reader."""

import json
import math
import os
import random
import runpy
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from functools import cache

import numpy as np
import pytest
import torch
import zstandard

try:
    import brotli
except ImportError:
    brotli = None
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import train_gpt
from tests.conftest import ROOT
from tests.support import reference
from train_gpt import (
    CLIPS,
    CODECS,
    GPT,
    PREFIX,
    Config,
    Run,
    RunError,
    RunLog,
    Runtime,
    artifact_config,
    encode_tensors,
    fields,
    levels_of,
    load_weights,
    pack,
    payload_bytes,
    predict_size,
    quant_name,
    quantise_rows,
    report_packing,
    unpack,
    weight_group,
)

ABOUT = dict(quant="int8", dtype="fp32", config_hash="0123456789abcdef")
NEEDS_BROTLI = pytest.mark.skipif(brotli is None, reason="brotli is not installed")
BY_CODEC = [pytest.param(name, marks=NEEDS_BROTLI) if name == "brotli" else name for name in CODECS]
# Those that compress any bytes; what rans refuses is in test_coder.py.
BYTE_CODECS = [codec for codec in BY_CODEC if codec != "rans"]
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
    return CODECS[cfg.codec].decompress(blob[PREFIX.size :], raw_length)


def seal(codec: str, body: bytes, raw_length: int) -> bytes:
    """An artifact around any body, with a valid checksum and length."""
    return train_gpt.seal(CODECS[codec].tag, raw_length, body)


def forged(header, planes: bytes = b"", codec: str = "zlib") -> bytes:
    """An artifact that is valid but for its header (bytes, or JSON data) and planes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = struct.pack("<I", len(text)) + text + planes
    return seal(codec, CODECS[codec].compress(raw, Config()), len(raw))


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


@pytest.mark.parametrize("codec", BY_CODEC)
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
    np.testing.assert_allclose(quantise_rows(weight, floor=floor)[1].numpy(), expected, rtol=2**-10)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_best_of_all(kind):
    weight = rows(kind)
    codes, steps = quantise_rows(weight)
    ours = (codes.double() * steps.double()[:, None] - weight.double()).abs().numpy()
    best = reference.least_error(weight.double().numpy(), steps.numpy())
    np.testing.assert_allclose(ours, best, atol=1e-5 * float(steps.max()))


def test_the_official_floor_is_the_official_clamp():
    weight = 0.05 * rows("normal")
    codes, steps = quantise_rows(weight, floor=1 / 127)
    assert (steps == torch.tensor(1 / 127).half()).all()
    assert (codes == (weight * 127).round()).float().mean() > 0.99  # the stored step is float16's 1/127
    assert codes.abs().max() < 40, "the clamp wastes most of the codes"


def test_without_the_floor_all_codes_are_used():
    codes, _ = quantise_rows(0.05 * rows("normal"))
    assert (codes.abs().amax(dim=1) == 127).all()


def test_a_higher_floor_makes_a_smaller_artifact(tiny, large):
    plain, floored = (len(pack(tiny(**LARGE, quant_scale_floor=f), large[1], ABOUT)) for f in (0.0, 0.5))
    assert floored < 0.8 * plain


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-9])
def test_tiny_rows_come_back_no_worse_than_zero(scale):
    weight = scale * rows("normal")
    codes, steps = quantise_rows(weight)
    restored = codes.float() * steps.float()[:, None]
    assert torch.isfinite(restored).all()
    assert ((restored - weight).norm(dim=1) <= weight.norm(dim=1) * 1.01).all()


# --- levels and clips ---

LEVELS = [1, 16, 31, 63, 127]


def clips(weight: np.ndarray, clip: str) -> np.ndarray:
    """[n, rows] of the clips to choose from, in float64."""
    size = np.abs(weight)
    if clip == "grid":
        return np.linspace(1, 0.3, 36)[:, None] * size.max(1)
    percentiles = dict(official=[99.99984], max=[100.0])
    percentiles["gptq_lite"] = [99.99, 99.995, 99.999, 99.9995, 99.9999]
    return np.percentile(size, percentiles[clip], axis=1)


def squared_errors(weight: np.ndarray, steps: np.ndarray, levels: int) -> np.ndarray:
    """Of each row, with the nearest of the integers -levels..levels; float64."""
    grid = np.arange(-levels, levels + 1) * steps.astype(np.float64)[:, None]
    nearest = [np.abs(row[:, None] - multiples).min(1) for row, multiples in zip(weight, grid, strict=True)]
    return np.square(nearest).sum(1)


def best_errors(weight: np.ndarray, levels: int, clip: str) -> np.ndarray:
    """The least squared error of each row over all clips, each with its step as float16 stores it."""
    least = 2.0**-24
    steps = [np.maximum(part / levels, least).astype(np.float16) for part in clips(weight, clip)]
    return np.min([squared_errors(weight, step, levels) for step in steps], axis=0)


def row_errors(weight: torch.Tensor, levels: int, clip: str) -> np.ndarray:
    """What quantise_rows loses of each row, float64."""
    codes, steps = quantise_rows(weight, levels, clip=clip)
    return (codes.double() * steps.double()[:, None] - weight.double()).square().sum(1).numpy()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_integers_stay_within_the_levels(kind, clip):
    for levels in LEVELS:
        codes, steps = quantise_rows(rows(kind), levels, clip=clip)
        assert codes.dtype == torch.int8 and steps.dtype == torch.float16
        assert codes.abs().max() == levels


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("levels", [16, 31, 127])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_the_clip_of_least_error(kind, levels, clip):
    weight = rows(kind)
    best = best_errors(weight.double().numpy(), levels, clip)
    np.testing.assert_allclose(row_errors(weight, levels, clip), best, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scale", [3e-6, 2e-5, 1e-4])
def test_the_error_is_that_of_the_step_as_stored(scale):
    """Here float16 has few steps to choose from, so a step that is not rounded would mislead."""
    weight = scale * rows("normal")
    best = best_errors(weight.double().numpy(), 16, "grid")
    np.testing.assert_allclose(row_errors(weight, 16, "grid"), best, rtol=1e-4, atol=0)


def test_the_published_clips_are_five_percentiles():
    weight = rows("outliers")
    ours = CLIPS["gptq_lite"](weight.abs().numpy())
    assert ours.shape == (5, 16)
    quantiles = [0.9999, 0.99995, 0.99999, 0.999995, 0.999999]
    np.testing.assert_allclose(ours, np.quantile(weight.abs().double(), quantiles, axis=1), rtol=1e-5)


numbers = st.floats(-100, 100, width=32)


@settings(max_examples=150, deadline=None)
@given(
    weight=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 24)), elements=numbers),
    levels=st.sampled_from(LEVELS),
)
def test_the_grid_is_never_worse_than_the_maximum(weight, levels):
    largest, grid = (row_errors(torch.from_numpy(weight), levels, clip) for clip in ("max", "grid"))
    assert (grid <= largest * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("clip, levels, low, high", [
    ("grid", 16, 0.10, 0.25), ("grid", 31, 0.04, 0.12), ("grid", 127, 0.0, 0.02),
    ("gptq_lite", 16, 0.0, 0.04), ("gptq_lite", 31, 0.0, 0.04), ("gptq_lite", 127, 0.0, 0.04),
])  # fmt: skip
def test_what_a_clip_gains_on_gaussian_rows(clip, levels, low, high):
    weight = torch.randn(64, 832, generator=torch.Generator().manual_seed(5))
    ours, largest = (row_errors(weight, levels, name).sum() for name in (clip, "max"))
    assert low < 1 - ours / largest < high


@pytest.mark.parametrize("floor", [0.0, 1 / 127])
@pytest.mark.parametrize("kind", KINDS)
def test_the_official_clip_is_the_default(kind, floor):
    weight = rows(kind)
    given, default = (
        quantise_rows(weight, 127, clip="official", floor=floor),
        quantise_rows(weight, floor=floor),
    )
    assert all(map(torch.equal, given, default))
    expected = reference.row_steps(weight.double().numpy(), floor)
    np.testing.assert_allclose(given[1].numpy(), expected, rtol=2**-10)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_floor_holds_for_every_clip(clip):
    assert (quantise_rows(0.05 * rows("normal"), 16, clip=clip, floor=0.5)[1] == 0.5).all()


# Wide enough that attention, MLP and every table are stored as integers.
WIDE = dict(LARGE, model_dim=320, tie_embeddings=False, num_value_embeds=1)
RECURRENT = dict(num_repeats=2, value_residual=True, repeat_lora_rank=2)
GROUPS = {
    "attention": "attn.c_q.weight attn.c_k.weight attn.c_v.weight attn.proj.weight",
    "mlp": "mlp.fc.weight mlp.gate.weight mlp.proj.weight",
    "control": "attn_scale mlp_scale resid_mix",
}
TABLES = "tok_emb.weight lm_head.weight value_embeds.0.weight"
CONTROLS = "skip_weights loop_embed value_scales cross_repeat_scales value_mix"


def test_groups():
    found = {f"blocks.3.{name}": group for group, names in GROUPS.items() for name in names.split()}
    found |= dict.fromkeys(TABLES.split(), "embed") | dict.fromkeys(CONTROLS.split(), "control")
    assert {name: weight_group(name) for name in found} == found


@pytest.mark.parametrize("knobs, levels, name", [
    ({}, (127, 127, 127), "int8"),
    (dict(quant_levels=63), (63, 63, 63), "q63-63-63"),
    (dict(quant_levels=63, mlp_quant_levels=16), (63, 16, 63), "q63-16-63"),
    (dict(embed_quant_levels=31), (127, 127, 31), "q127-127-31"),
    (dict(quant_levels=1, mlp_quant_levels=127, embed_quant_levels=127), (1, 127, 127), "q1-127-127"),
    (dict(quant_levels=5, mlp_quant_levels=127, embed_quant_levels=2), (5, 127, 2), "q5-127-2"),
    (dict(mlp_quant_levels=127, embed_quant_levels=127), (127, 127, 127), "int8"),
])  # fmt: skip
def test_levels_and_their_name(knobs, levels, name):
    cfg = Config(**knobs)
    names = "blocks.0.attn.c_q.weight", "blocks.1.mlp.fc.weight", "tok_emb.weight"
    assert tuple(levels_of(cfg, name) for name in names) == levels
    assert {levels_of(cfg, name) for name in TABLES.split()} == {levels[2]}
    assert quant_name(cfg) == name


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("levels", [(127, 0, 0), (63, 16, 0), (31, 16, 63)])
def test_the_file_holds_integers_times_steps(tiny, levels, clip):
    names = "quant_levels", "mlp_quant_levels", "embed_quant_levels"
    cfg = tiny(**WIDE, quant_clip=clip, **dict(zip(names, levels, strict=True)))
    state, groups = trained_like(cfg), set()
    restored = unpack(pack(cfg, state, ABOUT), "x")[0]
    own = dict(attention=levels[0], mlp=levels[1] or levels[0], embed=levels[2] or levels[0])
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.numel() > 65_536:
            most = own[weight_group(name)]
            codes, steps = quantise_rows(tensor, most, clip=clip)
            assert torch.equal(restored[name], codes.float() * steps.float()[:, None]), name
            assert codes.abs().max() == most, name
            groups.add(weight_group(name))
    assert groups == own.keys()


def test_control_tensors_of_the_recurrence_come_back_exactly(tiny):
    cfg = tiny(**WIDE, **RECURRENT, quant_levels=16, quant_clip="grid")
    state = trained_like(cfg)
    restored = unpack(pack(cfg, state, ABOUT), "x")[0]
    own = [name for name in CONTROLS.split() if name != "skip_weights"]
    assert all(state[name].half().float().ne(state[name]).any() for name in own), "no float16 would hold them"
    assert all(torch.equal(restored[name], state[name]) for name in own)


def test_fewer_levels_make_a_smaller_artifact(tiny):
    state = trained_like(tiny(**WIDE))
    knobs = [dict(quant_levels=n) for n in (127, 63, 31, 16, 4, 1)]
    sizes = [len(pack(tiny(**WIDE, **knob), state, ABOUT)) for knob in knobs]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 6
    for name in ("mlp_quant_levels", "embed_quant_levels"):
        assert sizes[3] < len(pack(tiny(**WIDE, **{name: 16}), state, ABOUT)) < sizes[0], name


@pytest.mark.parametrize("clip", ["gptq_lite", "grid"])
def test_levels_and_clips_give_the_same_bytes_again(tiny, clip):
    cfg = tiny(**WIDE, quant_clip=clip, quant_levels=63, mlp_quant_levels=16)
    state = trained_like(cfg)
    assert pack(cfg, state, ABOUT) == pack(cfg, dict(reversed(state.items())), ABOUT)


@pytest.mark.parametrize("levels", [(127, 0, 0), (63, 16, 0), (31, 16, 0), (31, 16, 63)])
def test_the_predicted_size_knows_the_levels(tiny, levels):
    names = "quant_levels", "mlp_quant_levels", "embed_quant_levels"
    cfg = tiny(**WIDE | dict(vocab_size=1024), **dict(zip(names, levels, strict=True)))
    torch.manual_seed(0)
    model = reference.randomise(GPT(cfg))
    assert predict_size(cfg, model) == pytest.approx(len(pack(cfg, model.state_dict(), ABOUT)), rel=0.05)


def lost(state: dict, restored: dict, names) -> float:
    """Norm of what these tensors lost over the norm of what they were, float64."""
    was = np.concatenate([state[name].double().numpy().ravel() for name in names])
    now = np.concatenate([restored[name].double().numpy().ravel() for name in names])
    return float(np.linalg.norm(now - was) / np.linalg.norm(was))


def test_the_report_says_what_each_group_takes_and_loses(tiny, tmp_path):
    cfg = tiny(**WIDE, quant_levels=63, mlp_quant_levels=16, quant_clip="grid")
    state, log = trained_like(cfg), RunLog(tmp_path, "x")
    blob = pack(cfg, state, ABOUT)
    encoded = encode_tensors(cfg, state, train_gpt.Calibration())
    report_packing(Run(cfg, Runtime(), log, GPT(cfg), data=None), state, encoded, blob)
    log.close()
    (event,) = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert (event["event"], event["quant"], event["clip"]) == ("quantise", "q63-16-63", "grid")
    restored, groups, text = unpack(blob, "x")[0], event["groups"], (tmp_path / "x.txt").read_text()
    parts = {group: [name for name in state if weight_group(name) == group] for group in groups}
    assert parts.keys() == {"attention", "mlp", "embed", "control"}
    for group, names in parts.items():
        told = groups[group]
        assert told["tensors"] == len(names), group
        assert told["error"] == pytest.approx(lost(state, restored, names), rel=1e-4, abs=1e-12), group
        assert f"packed {group}: tensors:{len(names)} bytes:{told['bytes']} " in text
    errors = {name: lost(state, restored, [name]) for name in state}
    assert event["errors"] == pytest.approx(errors, rel=1e-4, abs=1e-12)
    assert sum(told["bytes"] for told in groups.values()) == pytest.approx(len(blob), rel=0.05)
    assert groups["mlp"]["error"] > 2 * groups["embed"]["error"] > 0 == errors["value_scales"]


# --- which model a header describes ---

HEAD = dict(quant="int8", codec="zstd", dtype="fp32")
FULL = {f.name: f.default for f in fields(Config) if f.metadata["role"] == "model"}
PACKED = sorted((ROOT / "records").glob("20*/*.ptz"))


def test_a_header_holds_only_knobs_off_their_default(large):
    cfg, state = large
    model = unpack(pack(cfg, state, ABOUT), "x")[1]["model"]
    assert model == {name: getattr(cfg, name) for name in FULL if getattr(cfg, name) != FULL[name]}
    assert model["model_dim"] == 256 and "tie_embeddings" not in model


@pytest.mark.parametrize("model", [dict(num_layers=3), FULL | dict(num_layers=3)], ids=["short", "full"])
def test_a_knob_that_a_header_lacks_is_at_its_default(model):
    """It may have come later than the artifact. Older artifacts list all knobs of their time."""
    asked = Config(eval_only="x.ptz", model_dim=256, mlp_act="silu2")
    cfg = artifact_config(asked, {}, HEAD | dict(model=model))
    assert {name: getattr(cfg, name) for name in FULL} == FULL | dict(num_layers=3)


@pytest.mark.parametrize("model", [dict(num_layers=3), FULL | dict(num_layers=3)], ids=["short", "full"])
@pytest.mark.parametrize("knobs, told", [
    (dict(num_layers=4), "NUM_LAYERS=4 but EVAL_ONLY=x.ptz was trained with 3"),
    (dict(mlp_act="silu2"), "MLP_ACT=silu2 but EVAL_ONLY=x.ptz was trained with relu2"),
])  # fmt: skip
def test_a_knob_that_contradicts_a_header_is_refused(model, knobs, told):
    env = {name.upper(): str(value) for name, value in knobs.items()}
    with pytest.raises(RunError, match=told):
        artifact_config(Config(eval_only="x.ptz", **knobs), env, HEAD | dict(model=model))


@pytest.mark.parametrize("header", [
    HEAD | dict(model=dict(later_knob=1)), HEAD | dict(model=FULL | dict(later_knob=1)),
    HEAD | dict(model=dict(num_layers=3.0)), HEAD | dict(model=dict(tie_embeddings=1)),
    HEAD | dict(model=dict(seed=7)), HEAD | dict(model={}, dtype=["fp32"]),
    HEAD | dict(model={}, codec=["zstd"]), HEAD | dict(model={}, quant=8),
])  # fmt: skip
def test_a_header_with_anything_unknown_is_of_another_version(header):
    with pytest.raises(RunError, match="EVAL_ONLY=x.ptz was made by another version of this script"):
        artifact_config(Config(eval_only="x.ptz"), {}, header)


@pytest.mark.parametrize("path", PACKED, ids=[f"{path.parent.name}/{path.name}" for path in PACKED])
def test_the_artifacts_of_the_records_load(path):
    state, header = unpack(path.read_bytes(), "x.ptz")
    model = GPT(artifact_config(Config(eval_only="x.ptz"), {}, header))
    load_weights(model, state, "x.ptz")
    name = "blocks.0.mlp.fc.weight"
    assert torch.equal(model.state_dict()[name], state[name])


# --- bytes and sizes ---


@pytest.mark.parametrize("codec", BY_CODEC)
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


def test_the_bytes_do_not_depend_on_the_hash_seed(tmp_path, capsys):
    """Those of a process with another seed than this one are these."""
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": other}
    script = tmp_path / "pack.py"
    script.write_text(PACK_ELSEWHERE)
    command = [sys.executable, script]
    there = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120).stdout
    runpy.run_path(str(script))
    here = capsys.readouterr().out
    assert len(here) == 65 and here == there


@pytest.mark.parametrize("codec", BY_CODEC)
@pytest.mark.parametrize("knobs", [{}, LARGE, dict(encoder_layers=0), dict(tie_embeddings=False)])
def test_the_payload_is_counted_exactly(tiny, knobs, codec):
    cfg = tiny(**knobs, codec=codec)
    state = trained_like(cfg)
    raw = body_of(pack(cfg, state, ABOUT), cfg)
    header = 4 + struct.unpack_from("<I", raw)[0]
    assert payload_bytes(cfg, state) == len(raw) - header


@pytest.mark.parametrize("codec", BY_CODEC)
def test_the_predicted_size_is_near_the_real_one(tiny, codec):
    cfg = tiny(model_dim=256, num_heads=4, num_kv_heads=2, num_layers=1, vocab_size=1024, codec=codec)
    torch.manual_seed(0)
    model = reference.randomise(GPT(cfg))
    assert predict_size(cfg, model) == pytest.approx(len(pack(cfg, model.state_dict(), ABOUT)), rel=0.1)


def test_zstd_beats_no_compression_at_every_level(tiny, large):
    sizes = [len(pack(tiny(**LARGE | dict(zstd_level=level)), large[1], ABOUT)) for level in (1, 22)]
    assert max(sizes) < payload_bytes(*large) and sizes[0] != sizes[1]


# --- damaged files ---


@pytest.fixture(scope="module", params=BY_CODEC)
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


@pytest.mark.parametrize("codec", BYTE_CODECS)
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
    refused(seal("zlib", zlib.compress(raw), len(raw)))


BOMB = bytes(64_000_000)


@cache  # brotli takes seconds for it
def compressed_bomb(codec: str) -> bytes:
    return CODECS[codec].compress(BOMB, Config(zstd_level=3))


@pytest.mark.parametrize("raw_length", [0, 100])
@pytest.mark.parametrize("codec", BYTE_CODECS)
def test_a_body_that_unpacks_to_more_than_it_says_is_refused_unread(codec, raw_length):
    refused(seal(codec, compressed_bomb(codec), raw_length))


def test_a_zstd_frame_that_claims_to_be_huge_is_refused_unread():
    # A frame header of one segment, with an eight-byte content size of 2^40; then an empty last block.
    frame = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"
    refused(seal("zstd", frame, 1000))


def test_a_body_of_another_codec_is_refused():
    refused(seal("zlib", zstandard.ZstdCompressor().compress(b"x" * 99), 99))
    refused(seal("zstd", zlib.compress(b"x" * 99), 99))


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
