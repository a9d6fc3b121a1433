"""The score: every target once on any number of ranks, nats over bytes of a true distribution."""

import math
from contextlib import suppress

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    GPT,
    Config,
    Run,
    RunError,
    RunLog,
    Runtime,
    Score,
    Validation,
    plain_windows,
    roundtrip,
    token_nats,
)

VOCAB = 96


def config(**knobs) -> Config:
    sizes = dict(vocab_size=VOCAB, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2)
    return Config(**dict(sizes, train_seq_len=16, train_batch_tokens=64, **knobs))


def validation(targets: int, low: int = 0) -> Validation:
    """Random tokens; each target has 1 to 4 bytes."""
    rng = np.random.default_rng(targets)
    tokens = rng.integers(low, VOCAB, targets + 1).astype(np.uint16)
    return Validation(tokens, rng.integers(1, 5, targets).astype(np.int16), 1, "")


def random_model(cfg: Config, dtype=torch.float32) -> GPT:
    torch.manual_seed(0)
    return reference.randomise(GPT(cfg, dtype))


def nats_of(model: GPT):
    return lambda ids, targets: token_nats(model, ids, targets)


class Part(Runtime):
    """One rank of many, alone: keeps what it would have summed."""

    def sum(self, tensor):
        self.own = tensor.clone()
        return tensor


def parts(cfg: Config, nats_of, data: Validation, ranks: int) -> np.ndarray:
    """[ranks, (nats, tokens)] that each rank would bring to the sum."""
    totals = []
    for rank in range(ranks):
        runtime = Part(rank=rank, world_size=ranks)
        with suppress(RunError):  # alone, a rank misses the others' targets
            roundtrip(cfg, nats_of, data, runtime)
        totals.append(runtime.own.tolist())
    return np.array(totals)


# --- every target once ---


@settings(max_examples=200, deadline=None)
@given(targets=st.integers(1, 400), length=st.integers(1, 60))
def test_windows_cover_every_target_once(targets, length):
    scored = np.zeros(targets, int)
    for start, count in plain_windows(targets, length):
        assert 0 < count <= length and start % length == 0
        scored[start : start + count] += 1
    assert (scored == 1).all()


class Marks:
    """Stands in for nats: target number i of the stream is worth 4^i, so a sum tells how often each came."""

    LONGEST = 24

    def __init__(self, targets: int):
        tokens = np.arange(targets + 1, dtype=np.uint16)  # a target's id is its number + 1
        self.data = Validation(tokens, np.ones(targets, np.int16), 1, "")

    def __call__(self, ids, targets):
        assert (targets - ids)[targets > 0].eq(1).all(), "a target is the token after its input"
        return 4.0 ** (targets.double() - 1)

    @staticmethod
    def counts(total: float, targets: int) -> list[int]:
        return [int(total) >> 2 * i & 3 for i in range(targets)]


@settings(max_examples=150, deadline=None)
@given(
    targets=st.integers(1, Marks.LONGEST),
    length=st.sampled_from([2, 3, 4, 8, 16, 32]),
    ranks=st.integers(1, 5),
    val_batch_size=st.sampled_from([8, 64, 300, 524_288]),
)
def test_every_target_is_scored_once_by_one_rank(targets, length, ranks, val_batch_size):
    cfg = Config(train_seq_len=length, train_batch_tokens=96 * length, val_batch_size=val_batch_size)
    marks = Marks(targets)
    totals = parts(cfg, marks, marks.data, ranks)
    assert Marks.counts(totals[:, 0].sum(), targets) == [1] * targets
    assert totals[:, 1].sum() == targets


def test_a_missed_target_is_no_score(monkeypatch):
    cfg, marks = config(), Marks(20)
    monkeypatch.setattr("train_gpt.plain_windows", lambda targets, length: [(0, 16)])
    with pytest.raises(RunError, match="16 of 20"):
        roundtrip(cfg, marks, marks.data, Runtime())


def test_the_tail_is_scored():
    cfg, data = config(), validation(3 * 16 + 5)
    whole = roundtrip(cfg, nats_of(random_model(cfg)), data, Runtime())
    cut = Validation(data.tokens[:49], data.target_bytes[:48], 1, "")
    without = roundtrip(cfg, nats_of(random_model(cfg)), cut, Runtime())
    assert (whole.tokens, without.tokens) == (53, 48) and whole.nats > without.nats


def test_a_stream_shorter_than_a_window_is_scored():
    cfg, data = config(), validation(3)
    score = roundtrip(cfg, nats_of(random_model(cfg)), data, Runtime())
    assert score.tokens == 3 and score.bytes == data.bytes


# --- the number itself ---


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    cfg, data = config(), validation(100)
    model = random_model(cfg)
    torch.nn.init.zeros_(model.tok_emb.weight)
    score = roundtrip(cfg, nats_of(model), data, Runtime())
    assert score.loss / math.log(2) == pytest.approx(math.log2(VOCAB), rel=1e-6)
    assert score.bpb == pytest.approx(math.log2(VOCAB) * 100 / data.bytes, rel=1e-6)


@pytest.mark.parametrize("knobs", [{}, dict(tie_embeddings=False, parallel_block=True, mlp_act="silu2")])
def test_the_score_is_the_reference(knobs):
    cfg, data = config(**knobs), validation(75)
    model = random_model(cfg)
    state = reference.as_float64(model.state_dict())
    expected = 0.0
    for start in range(0, 75, 16):
        piece = data.tokens[start : start + 17].astype(int)
        expected += reference.nats(state, piece[:-1], piece[1:], cfg).sum()
    score = roundtrip(cfg, nats_of(model), data, Runtime())
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.loss == pytest.approx(expected / 75, rel=1e-5)
    assert score.bpb == pytest.approx(expected / math.log(2) / data.bytes, rel=1e-5)


def test_bits_per_byte_are_nats_over_ln2_over_bytes():
    score = Score(nats=math.log(2) * 30, tokens=10, bytes=20, seconds=0.0)
    assert score.bpb == pytest.approx(1.5) and score.loss == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_add_up_to_the_whole(ranks):
    cfg, data = config(), validation(75)
    model = nats_of(random_model(cfg))
    whole = roundtrip(cfg, model, data, Runtime())
    nats, tokens = parts(cfg, model, data, ranks).sum(0)
    assert nats == pytest.approx(whole.nats, rel=1e-6) and tokens == whole.tokens


@pytest.mark.parametrize("val_batch_size", [8, 256, 400, 1280, 524_288])
def test_the_batch_size_and_its_padding_do_not_matter(val_batch_size):
    data = validation(75)
    expected = roundtrip(config(), nats_of(random_model(config())), data, Runtime())
    cfg = config(val_batch_size=val_batch_size)
    score = roundtrip(cfg, nats_of(random_model(cfg)), data, Runtime())
    assert score.nats == pytest.approx(expected.nats, rel=1e-6)


def test_padding_is_never_added():
    cfg, data = config(), validation(75, low=1)  # token 0 stands in the padding only

    def nan_on_padding(ids, targets):
        return torch.where(targets == 0, torch.nan, 1.0)

    assert roundtrip(cfg, nan_on_padding, data, Runtime()).nats == 75


def test_every_pass_has_one_shape():
    cfg, shapes = config(val_batch_size=3 * 16 * 8), set()

    def note(ids, targets):
        shapes.add((tuple(ids.shape), tuple(targets.shape)))
        return torch.ones(targets.shape)

    roundtrip(cfg, note, validation(16 * 7 + 3), Runtime())
    assert shapes == {((3, 16), (3, 16))}


def test_scoring_changes_no_weight_and_keeps_no_graph():
    cfg = config()
    model = random_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    roundtrip(cfg, nats_of(model), validation(75), Runtime())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_scoring_twice_gives_the_same_bits():
    cfg, data = config(), validation(75)
    model = nats_of(random_model(cfg))
    assert roundtrip(cfg, model, data, Runtime()).nats == roundtrip(cfg, model, data, Runtime()).nats


# --- a true distribution, with nothing of the training in it ---


def scored(cfg: Config, dtype=torch.float32) -> float:
    run = Run(cfg, Runtime(dtype=dtype), RunLog(None, "x"), random_model(cfg, dtype), validation(75))
    return run.score().nats


@pytest.mark.parametrize("knobs", [dict(head_diversity=10.0), dict(grad_clip_norm=0.1), dict(matrix_lr=9.0)])
def test_a_training_knob_never_changes_the_score(knobs):
    assert scored(config(**knobs)) == scored(config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("knobs", [{}, dict(tie_embeddings=False), dict(logit_softcap=2.0)])
def test_probabilities_over_the_vocabulary_sum_to_one(knobs, dtype):
    cfg = config(**knobs)
    model, ids = random_model(cfg, dtype), torch.from_numpy(validation(15).tokens.astype(np.int64))[None]
    with torch.no_grad():
        each = [token_nats(model, ids, torch.full_like(ids, v)) for v in range(VOCAB)]
    total = torch.stack(each).double().neg().exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)


def test_a_score_that_is_not_a_number_is_refused():
    cfg = config()
    with pytest.raises(RunError):
        roundtrip(cfg, lambda ids, targets: torch.full(targets.shape, torch.nan), validation(75), Runtime())
