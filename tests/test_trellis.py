"""TRELLIS=1 and RATE_LAMBDA: the path of least cost, what the reader makes of it, and what it saves."""

import itertools
import json
import math
import random
import struct

import numpy as np
import pytest
import torch

import train_gpt
from tests.test_artifact import ABOUT, refused
from tests.test_coder import EMPTY_STATE, forge
from tests.test_gptq import correlated, lost_under, weights
from train_gpt import Calibration, Gptq, RunError, pack, quantise_rows, search_trellis, trellis_halves, unpack

# Ungerboeck's 8-state trellis as JPEG 2000 part 2 prints it: after each state and lowest bit, the next state.
NEXT = [[0, 1], [2, 3], [5, 4], [7, 6], [1, 0], [3, 2], [4, 5], [6, 7]]
NAME = "blocks.0.attn.c_q.weight"
KNOBS = dict(quant_clip="sdclip", quant_clip_sigmas=60.0, codec="rans", trellis=True)
KNOBS |= dict(
    gptq_calibration_batches=1, column_step_power=0.75, row_step_power=0.5, max_wallclock_seconds=0.0
)


def best_path(weight, grid, costs, diagonal, levels, state, walked) -> float:
    """The least cost of a row [n] over all paths, by trying every one; float64."""
    least = math.inf
    for bits in itertools.product(*[(0, 1) if flag else (0,) for flag in walked]):
        at = state
        total = 0.0
        for column, bit in enumerate(bits):
            integers = np.arange(-levels, levels + 1)
            values = integers.astype(float)
            if walked[column]:
                values = (integers + (at & 1) / 2)[integers % 2 == bit]
                at = NEXT[at][bit]
            errors = (weight[column] - values * grid[column]) / diagonal[column]
            total += (errors**2 + costs[column] * values**2).min()
        least = min(least, total)
    return least


def path_cost(weight, grid, costs, diagonal, integers, state, walked) -> float:
    """What a row's integers cost, walked from their first state; float64."""
    total = 0.0
    for column, k in enumerate(integers.tolist()):
        value = float(k)
        if walked[column]:
            value += (state & 1) / 2
            state = NEXT[state][int(k) % 2]
        error = (weight[column] - value * grid[column]) / diagonal[column]
        total += error**2 + costs[column] * value**2
    return total


@pytest.mark.parametrize("levels", [1, 2, 127])
@pytest.mark.parametrize("price", [0.0, 0.1])
@pytest.mark.parametrize("walked", [[True] * 7, [True, False, True, True, False, False, True]])
def test_without_feedback_the_search_finds_the_best_of_all_paths(levels, price, walked):
    rng = np.random.default_rng(levels)
    weight = 3 * rng.standard_normal((12, 7))
    grid = np.exp(0.3 * rng.standard_normal((12, 7)))
    costs = price * rng.random((12, 7))
    diagonal = np.exp(0.3 * rng.standard_normal(7))
    states = rng.integers(0, 8, 12)
    shares = 1 / (1 + costs * (diagonal / grid) ** 2)
    tensors = (torch.from_numpy(part) for part in (weight, grid, costs, shares, np.diag(diagonal)))
    found, errors, _ = search_trellis(*tensors, levels, torch.tensor(states), walked)
    assert found.abs().max() <= levels
    for row, integers in enumerate(found.numpy()):
        given = weight[row], grid[row], costs[row], diagonal
        cost = path_cost(*given, integers, states[row], walked)
        assert cost == pytest.approx(best_path(*given, levels, states[row], walked), rel=1e-9)
        if not price:
            assert cost == pytest.approx(float(errors[row].square().sum()), rel=1e-9)


def test_the_reader_walks_the_published_trellis():
    rng = np.random.default_rng(0)
    odd = rng.integers(0, 2, (50, 40)).astype(np.uint8)
    walked = rng.random(40) < 0.8
    halves = trellis_halves(odd, walked)
    for row in range(50):
        state = 0
        for column in range(40):
            assert halves[row, column] == (state & 1 if walked[column] else 0)
            state = NEXT[state][odd[row, column]] if walked[column] else state


def restore(arrays) -> torch.Tensor:
    """The weights of (integers, walked, steps, columns) as the reader takes them; float64."""
    integers, walked, steps, columns = arrays
    halves = trellis_halves(integers.numpy().view(np.uint8) & 1, walked.numpy())
    values = integers.double() + torch.from_numpy(halves).double() / 2
    return values * steps.double()[:, None] * columns.double()


@pytest.mark.parametrize("columns", [100, 300])
def test_errors_fed_back_are_those_of_the_weights_as_read(columns):
    """With feedback over several blocks, the paths' own account is the error under the Hessian.

    (w - v) H (w - v) is the sum of (e / U_jj)^2 only if each survivor carries what its own path did.
    """
    inputs, weight = correlated(columns), weights(columns=columns)
    hessian = inputs.T @ inputs
    accounts = []

    def watch(*given):
        found = search_trellis(*given)
        accounts.append(found[1].double().square().sum().item())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "search_trellis", watch)
        knobs = dict(clip="sdclip", sigmas=60.0, column_power=0.75, has_trellis=True)
        arrays = quantise_rows(weight, 127, hessian, **knobs)
    assert len(accounts) == math.ceil(columns / 128)
    lost = lost_under(Gptq(hessian).hessian, weight, restore(arrays).float()).sum().item()
    assert sum(accounts) == pytest.approx(lost, rel=0.01)


def gain(knobs: dict) -> float:
    """Bits a weight that the knobs save on a correlated matrix at the same error, of the artifact's bytes."""
    inputs, weight = correlated(256, tokens=4000), weights(1200, 256)
    inputs = inputs.flip(1)  # large ones first, which is GPTQ's order, so that only the trellis counts
    hessian = inputs.T @ inputs
    worth = []
    for own in (dict(trellis=False), knobs):
        cfg = train_gpt.Config(**(KNOBS | own))
        blob = pack(cfg, {NAME: weight}, {}, Calibration({NAME: hessian}))
        lost = lost_under(Gptq(hessian).hessian, weight, unpack(blob, "x")[0][NAME]).sum().item()
        worth.append(8 * len(blob) / weight.numel() + 0.5 * math.log2(lost))
    return worth[0] - worth[1]


def test_the_trellis_saves_a_tenth_of_a_bit_at_the_same_error():
    """0.15 in theory, less the tables, which count in so small a matrix."""
    assert gain(dict(trellis=True)) > 0.1


@pytest.mark.parametrize("trellis", [False, True])
def test_a_price_of_bits_saves_some_at_the_same_error(trellis):
    own = dict(trellis=trellis, quant_clip_sigmas=140.0)
    assert gain(own | dict(rate_lambda=0.1)) > gain(own) + 0.015


# --- files ---


TABLE = "value_embeds.0.weight"  # read by rows: it has no Hessian


def small_state() -> dict[str, torch.Tensor]:
    """Two matrices just large enough for integers; every third column of one is too small to be walked."""
    state = {NAME: weights(260, 256), TABLE: weights(330, 200)}
    state[NAME][:, ::3] *= 0.01
    return state


@pytest.mark.parametrize("power, codec", [(0.75, "rans"), (0.0, "rans"), (0.75, "zlib")])
def test_weights_come_back_as_they_were_rounded(power, codec):
    cfg = train_gpt.Config(**KNOBS | dict(codec=codec, column_step_power=power))
    state = small_state()
    inputs = correlated(256)
    calibration = Calibration({NAME: inputs.T @ inputs})
    blob = pack(cfg, state, ABOUT, calibration)
    restored = unpack(blob, "x")[0]
    for name, weight in state.items():
        quantise = train_gpt.pick_quantiser(cfg, name)
        arrays = quantise(weight, 127, calibration.hessians.get(name))
        if not power:
            arrays = (*arrays, torch.ones(weight.size(1)))
        assert torch.allclose(restored[name], restore(arrays).float(), rtol=1e-6), name
        assert 0 < arrays[1].sum() < arrays[1].numel() if name == NAME else arrays[1].all()
    assert blob == pack(cfg, dict(reversed(state.items())), ABOUT, calibration)


def test_without_a_trellis_the_coder_is_of_version_1():
    """Files of today's settings stay what earlier readers read."""
    versions = []
    for trellis in (False, True):
        cfg = train_gpt.Config(**KNOBS | dict(trellis=trellis))
        versions.append(pack(cfg, small_state(), ABOUT)[train_gpt.PREFIX.size])
    assert versions == [1, 2]


def test_the_predicted_size_knows_what_a_price_saves():
    """What a price takes off the integers at coarse steps is predicted to an eighth."""
    knobs = dict(vocab_size=1024, num_layers=1, model_dim=128, num_heads=4, num_kv_heads=2, trellis=False)
    sizes = []
    for price in (0.0, 0.2):
        cfg = train_gpt.Config(**KNOBS | knobs | dict(rate_lambda=price, quant_clip_sigmas=140.0))
        model = train_gpt.GPT(cfg)
        generator = torch.Generator().manual_seed(0)
        state = {}
        for name, tensor in model.state_dict().items():
            state[name] = torch.randn(tensor.shape, generator=generator)
        hessians = {name: torch.eye(128) for name, tensor in state.items() if tensor.shape[-1:] == (128,)}
        sizes.append((train_gpt.predict_size(cfg, model), len(pack(cfg, state, {}, Calibration(hessians)))))
    (plain_guess, plain), (guess, size) = sizes
    assert size < plain - 2000
    assert (plain_guess - guess) / (plain - size) == pytest.approx(1, abs=0.125)


def test_a_changed_byte_of_a_body_never_breaks_the_reader():
    """Behind a valid checksum a change may give other weights, or one line; never another error."""
    cfg = train_gpt.Config(**KNOBS)
    blob = pack(cfg, {TABLE: weights(330, 200)}, {})
    body = blob[train_gpt.PREFIX.size :]
    raw_length = train_gpt.PREFIX.unpack_from(blob)[4]
    rng = random.Random(4)
    refusals = 0
    for _ in range(25):
        damaged = bytearray(body)
        damaged[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        try:
            unpack(train_gpt.seal(b"rans", raw_length, bytes(damaged)), "some.ptz")
        except RunError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 15


def text_of(shape: list, planes: list) -> bytes:
    """What zlib packs of a version 2 body that says it holds one tensor."""
    header = json.dumps(dict(ABOUT, codec="rans", model={}, tensors=[[NAME, shape, planes]])).encode()
    return struct.pack("<I", len(header)) + header + bytes(512 * (13 + 4 * 192))


@pytest.mark.parametrize("planes", [["trellis", "walked", "step"], ["trellis"], ["walked"], ["int8", "step"]])
@pytest.mark.parametrize(
    "shape", [[1 << 14, 1 << 14], [1, 1 << 28], [0, 1 << 40], [1 << 31, 1 << 31], [3, 5], [8, 9, 2], [7]]
)
def test_counts_that_no_stream_holds_are_refused(shape, planes):
    text = text_of(shape, planes)
    for raw_length in (100, len(text), 1 << 28, 1 << 29):
        forged = forge(text, 2 * EMPTY_STATE, raw_length, dict(version=2))
        assert "cannot be unpacked" in refused(forged)


def test_columns_without_end_are_refused_at_once():
    """The reader walks columns one by one, so that half a billion of them would take an hour."""
    header = json.dumps(dict(tensors=[[NAME, [1, 1 << 18], ["trellis", "walked"]]])).encode()
    raw = struct.pack("<I", len(header)) + header + bytes(1 << 19)
    forged = train_gpt.seal(b"zlib", len(raw), train_gpt.compress_zlib(raw, None))
    assert "this reads 131072" in refused(forged)
