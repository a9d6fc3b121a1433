"""The score: every target once on any number of ranks, nats over bytes of a true distribution."""

import itertools
import math
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TINY, random_model, write_shard
from tests.support import reference
from train_gpt import (
    GPT,
    Config,
    Run,
    RunError,
    RunLog,
    Runtime,
    Score,
    Validation,
    Window,
    evaluate,
    load_tokenizer,
    load_validation,
    plan_isolated_turns,
    plan_turns,
    plan_windows,
    score_windows,
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


def nats_of(model: GPT):
    return partial(token_nats, model)


class Part(Runtime):
    """One rank of many, alone: keeps what it would have summed."""

    def sum(self, tensor):
        self.own = tensor.clone()
        return tensor


def parts(cfg: Config, nats_of, data: Validation, ranks: int, stride: int = 0) -> np.ndarray:
    """[ranks, (nats, tokens, bytes)] that each rank would bring to the sum."""
    totals = []
    for rank in range(ranks):
        runtime = Part(rank=rank, world_size=ranks)
        with suppress(RunError):  # alone, a rank misses the others' targets
            evaluate(cfg, nats_of, data, runtime, stride)
        totals.append(runtime.own.tolist())
    return np.array(totals)


# --- every target once ---


@settings(max_examples=200, deadline=None)
@given(targets=st.integers(1, 400), length=st.integers(1, 60))
def test_windows_cover_every_target_once(targets, length):
    scored = np.zeros(targets, int)
    for start, first, stop in plan_windows(targets, length, length):
        assert start == first < stop <= start + length and start % length == 0
        scored[first:stop] += 1
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
    monkeypatch.setattr("train_gpt.plan_windows", lambda targets, length, stride, begin: [Window(0, 0, 16)])
    with pytest.raises(RunError, match="16 of 20"):
        evaluate(cfg, marks, marks.data, Runtime())


def test_the_tail_is_scored():
    cfg, data = config(), validation(3 * 16 + 5)
    whole = evaluate(cfg, nats_of(random_model(cfg)), data, Runtime())
    cut = Validation(data.tokens[:49], data.target_bytes[:48], 1, "")
    without = evaluate(cfg, nats_of(random_model(cfg)), cut, Runtime())
    assert (whole.tokens, without.tokens) == (53, 48) and whole.nats > without.nats


def test_a_stream_shorter_than_a_window_is_scored():
    cfg, data = config(), validation(3)
    score = evaluate(cfg, nats_of(random_model(cfg)), data, Runtime())
    assert score.tokens == 3 and score.bytes == data.bytes


# --- the number itself ---


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    cfg, data = config(), validation(100)
    model = random_model(cfg)
    torch.nn.init.zeros_(model.tok_emb.weight)
    score = evaluate(cfg, nats_of(model), data, Runtime())
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
    score = evaluate(cfg, nats_of(model), data, Runtime())
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
    whole = evaluate(cfg, model, data, Runtime())
    nats, tokens, size = parts(cfg, model, data, ranks).sum(0)
    assert nats == pytest.approx(whole.nats, rel=1e-6) and (tokens, size) == (whole.tokens, whole.bytes)


@pytest.mark.parametrize("val_batch_size", [8, 256, 400, 1280, 524_288])
def test_the_batch_size_and_its_padding_do_not_matter(val_batch_size):
    data = validation(75)
    expected = evaluate(config(), nats_of(random_model(config())), data, Runtime())
    cfg = config(val_batch_size=val_batch_size)
    score = evaluate(cfg, nats_of(random_model(cfg)), data, Runtime())
    assert score.nats == pytest.approx(expected.nats, rel=1e-6)


def test_padding_is_never_added():
    cfg, data = config(), validation(75, low=1)  # token 0 stands in the padding only

    def nan_on_padding(ids, targets):
        return torch.where(targets == 0, torch.nan, 1.0)

    assert evaluate(cfg, nan_on_padding, data, Runtime()).nats == 75


def test_every_pass_has_one_shape():
    cfg, shapes = config(val_batch_size=3 * 16 * 8), set()

    def note(ids, targets):
        shapes.add((tuple(ids.shape), tuple(targets.shape)))
        return torch.ones(targets.shape)

    evaluate(cfg, note, validation(16 * 7 + 3), Runtime())
    assert shapes == {((3, 16), (3, 16))}


def test_scoring_changes_no_weight_and_keeps_no_graph():
    cfg = config()
    model = random_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(cfg, nats_of(model), validation(75), Runtime())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_scoring_twice_gives_the_same_bits():
    cfg, data = config(), validation(75)
    model = nats_of(random_model(cfg))
    assert evaluate(cfg, model, data, Runtime()).nats == evaluate(cfg, model, data, Runtime()).nats


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
        evaluate(cfg, lambda ids, targets: torch.full(targets.shape, torch.nan), validation(75), Runtime())


# --- sliding windows ---


def sliding(stride: int, **knobs) -> Config:
    return config(**dict(eval_stride=stride, eval_batch_seqs=4) | knobs)


def counts_for(length: int, stride: int) -> list[int]:
    """Numbers of targets around every edge: one, a stride, a window, and tails of several."""
    edges = (stride, length, length + stride, 2 * length + stride, 5 * length)
    return sorted({1, 2, *(edge + off for edge in edges for off in (-1, 0, 1))} - {0})


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 12, 16])
def test_sliding_windows_score_every_target_once(length):
    for stride in range(1, length + 1):
        for targets in counts_for(length, stride):
            scored = np.zeros(targets, int)
            for start, first, stop in plan_windows(targets, length, stride):
                assert 0 <= start <= first < stop <= start + length and stop - first <= stride
                scored[first:stop] += 1
            assert (scored == 1).all(), (stride, targets)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 1100), stride=st.integers(1, 1100), targets=st.integers(1, 5000))
def test_a_target_has_nearly_a_window_of_context(length, stride, targets):
    stride = min(stride, length)
    for start, first, stop in plan_windows(targets, length, stride):
        assert stop - start <= length
        assert start == 0 or start + length == first + stride, "no window is shorter than it could be"
        if first >= length:
            assert first - start >= length - stride, "tokens before the first target's own input"


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
def test_windows_start_at_whole_strides(stride):
    for targets in counts_for(16, stride):
        starts = list(dict.fromkeys(start for start, *_ in plan_windows(targets, 16, stride)))
        assert starts == list(range(0, max(1, targets - 16 + stride), stride))


def test_the_published_windows():
    """1024 tokens every 256; the published script scores the first window whole, and its tail four times."""
    first = [(0, at, at + 256) for at in (0, 256, 512, 768)]
    later = [(256, 1024, 1280), (512, 1280, 1536), (768, 1536, 1792), (1024, 1792, 2000)]
    assert plan_windows(2000, 1024, 256) == first + later


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 60), stride=st.integers(1, 60), targets=st.integers(2, 200), data=st.data())
def test_no_window_knows_where_the_text_ends(length, stride, targets, data):
    """A target has the same context in a text that ends earlier, also where the last stride is short."""
    stride, shorter = min(stride, length), data.draw(st.integers(1, targets))
    whole, part = [], []
    for count, starts in ((targets, whole), (shorter, part)):
        for start, first, stop in plan_windows(count, length, stride):
            starts += [start] * (stop - first)
    assert part == whole[:shorter]


@pytest.mark.parametrize("targets", [1, 15, 16, 17, 75, 96])
def test_a_stride_of_a_window_is_the_official_windows(targets):
    starts = range(0, targets, 16)
    assert plan_windows(targets, 16, 16) == [(start, start, min(start + 16, targets)) for start in starts]
    data, model = validation(targets), random_model(config())
    official = evaluate(config(), nats_of(model), data, Runtime())
    slid = evaluate(sliding(16), nats_of(model), data, Runtime(), 16)
    assert slid.nats == pytest.approx(official.nats, rel=1e-6)
    assert (slid.tokens, slid.bytes) == (official.tokens, official.bytes)


class Context:
    """Stands in for nats: an exact number for each target, made of all that its window lets it see.

    Token i of the stream has the id i + 1, so 0 is padding; each target also counts how often it came.
    """

    def __init__(self, targets: int):
        tokens = np.arange(1, targets + 2, dtype=np.uint16)
        self.data = Validation(tokens, np.ones(targets, np.int16), 1, "")
        self.scored = np.zeros(targets, int)

    def __call__(self, ids, targets, places):
        own = targets > 0
        seen = torch.where(ids > 0, ids.double().sqrt(), 0).cumsum(1).take_along_dim(places, 1)
        inputs = ids.take_along_dim(places, 1)
        assert (inputs + 1 == targets)[own].all(), "a target is the token after its input"
        np.add.at(self.scored, targets[own].numpy() - 2, 1)
        return torch.where(own, seen, torch.nan)


def context(length: int, stride: int, targets: int) -> float:
    """The sum of a Context over all targets, each with its own window."""
    total = 0.0
    for target in range(targets):
        start = max(0, (target // stride + 1) * stride - length)
        total += np.sqrt(np.arange(start + 1, target + 2)).sum()
    return total


@pytest.mark.parametrize("length", [2, 5, 8])
def test_ranks_score_every_target_once_and_add_up_to_the_same(length):
    for stride in range(1, length + 1):
        cfg = Config(train_seq_len=length, train_batch_tokens=length, eval_stride=stride, eval_batch_seqs=3)
        for targets in counts_for(length, stride):
            expected = context(length, stride, targets)
            for ranks in (1, 2, 3, 5, 8):
                seen = Context(targets)
                nats, tokens, _ = parts(cfg, seen, seen.data, ranks, stride).sum(0)
                assert (seen.scored == 1).all() and tokens == targets, (stride, targets, ranks)
                assert nats == pytest.approx(expected, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(2, 40),
    stride=st.integers(1, 40),
    targets=st.integers(1, 300),
    ranks=st.integers(1, 8),
    eval_batch_seqs=st.integers(1, 50),
)
def test_the_sliding_score_depends_on_no_batch_and_no_rank(length, stride, targets, ranks, eval_batch_seqs):
    stride, seen = min(stride, length), Context(targets)
    how = dict(eval_stride=stride, eval_seq_len=length, eval_batch_seqs=eval_batch_seqs)
    nats, tokens, _ = parts(Config(**how), seen, seen.data, ranks, stride).sum(0)
    assert nats == pytest.approx(context(length, stride, targets), rel=1e-9)
    assert (seen.scored == 1).all() and tokens == targets


def one_by_one(model: GPT, data: Validation, length: int, stride: int) -> float:
    """Every target with its own window, by the whole window's logits, summed in float64."""
    total = 0.0
    for target in range(data.targets):
        start = max(0, (target // stride + 1) * stride - length)
        ids = torch.from_numpy(data.tokens[start : target + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None])[0, -1].double()
        total += (logits.logsumexp(0) - logits[int(data.tokens[target + 1])]).item()
    return total


FEATURES = dict(num_repeats=2, num_value_embeds=1, value_residual=True, xsa_last_n=2)


@pytest.mark.parametrize("stride, knobs", [
    (1, {}), (3, {}), (4, dict(eval_batch_seqs=1)), (4, dict(eval_batch_seqs=7)), (5, FEATURES), (16, {}),
    (4, dict(eval_seq_len=24)), (7, dict(eval_seq_len=33)), (4, dict(eval_seq_len=8)),
    (1, dict(eval_seq_len=1)),
])  # fmt: skip
def test_the_sliding_score_is_the_slow_one(stride, knobs):
    cfg, data = sliding(stride, **knobs), validation(75)
    model = random_model(cfg)
    expected = one_by_one(model, data, cfg.eval_length, stride)
    score = evaluate(cfg, nats_of(model), data, Runtime(), stride)
    assert score.nats == pytest.approx(expected, rel=2e-6)
    assert (score.tokens, score.bytes) == (75, data.bytes)


@pytest.mark.parametrize("targets", [1, 3, 4, 5, 15, 16, 17])
def test_short_texts_slide_too(targets):
    cfg, data = sliding(4), validation(targets)
    model = random_model(cfg)
    score = evaluate(cfg, nats_of(model), data, Runtime(), 4)
    assert score.nats == pytest.approx(one_by_one(model, data, 16, 4), rel=2e-6)


def test_batches_and_ranks_move_the_sliding_score_by_rounding_only():
    data, model = validation(75), random_model(config())
    scores = [evaluate(sliding(4, eval_batch_seqs=n), nats_of(model), data, Runtime(), 4) for n in (1, 3, 32)]
    sums = [parts(sliding(4), nats_of(model), data, ranks, 4)[:, 0].sum() for ranks in (2, 3, 5, 8)]
    assert [score.nats for score in scores] + sums == pytest.approx([scores[0].nats] * 7, rel=1e-7)


def test_padding_does_not_reach_a_sliding_score():
    cfg, data = sliding(4, eval_batch_seqs=7), validation(73, low=1)  # token 0 stands in the padding only
    nats = nats_of(random_model(cfg))

    def other_padding(ids, targets, places):
        return nats(ids.masked_fill(ids == 0, 5), targets.masked_fill(targets == 0, 9), places)

    plain, other = (evaluate(cfg, fn, data, Runtime(), 4).nats for fn in (nats, other_padding))
    assert other == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("knobs", [{}, dict(tie_embeddings=False), FEATURES])
def test_logits_at_places_are_rows_of_all_logits(knobs):
    cfg = config(**knobs)
    model = random_model(cfg)
    ids = torch.from_numpy(validation(47).tokens.astype(np.int64)).view(3, 16)
    places = torch.tensor([[0, 1, 2, 3, 15], [11, 12, 13, 14, 15], [7, 7, 0, 3, 1]])
    with torch.no_grad():
        some, whole = model(ids, positions=places), model(ids)
    assert some.shape == (3, 5, VOCAB)
    torch.testing.assert_close(some, whole.take_along_dim(places[..., None], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("knobs", [{}, dict(tie_embeddings=False)])
def test_only_scored_places_reach_the_head(monkeypatch, knobs):
    cfg, linear = sliding(4, eval_seq_len=24, **knobs), torch.nn.functional.linear
    model, shapes = random_model(cfg), []
    head = model.tok_emb.weight if model.lm_head is None else model.lm_head.weight

    def spy(x, weight, *bias):
        if weight is head:
            shapes.append(tuple(x.shape))
        return linear(x, weight, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    evaluate(cfg, nats_of(model), validation(75), Runtime(), 4)
    assert shapes == [(4, 4, 32)] * 5, "75 targets are 19 windows: 5 passes of 4 windows of 4 targets"


def test_every_sliding_pass_has_one_shape():
    cfg, shapes = sliding(5, eval_seq_len=24, eval_batch_seqs=3), set()

    def note(*given):
        shapes.add(tuple(tuple(part.shape) for part in given))
        return torch.ones(given[1].shape)

    evaluate(cfg, note, validation(16 * 7 + 3), Runtime(), 5)
    assert shapes == {((3, 24), (3, 5), (3, 5))}


@pytest.mark.parametrize("stride, blind", [(1, 1), (4, 1), (15, 1), (16, 5)])
def test_only_windows_that_do_not_overlap_start_blind(stride, blind):
    def no_context(ids, targets, places):
        return (places == 0).double()

    assert evaluate(sliding(stride), no_context, validation(79), Runtime(), stride).nats == blind


REFUSED = {
    "longer_than_the_context": dict(eval_stride=17),
    "longer_than_a_short_window": dict(eval_stride=9, eval_seq_len=8),
    "longer_than_a_long_window": dict(eval_stride=33, eval_seq_len=32),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_stride_longer_than_its_window_is_refused(case):
    with pytest.raises(RunError, match=f"EVAL_STRIDE={REFUSED[case]['eval_stride']} is longer"):
        config(**REFUSED[case])
    shorter = REFUSED[case] | dict(eval_stride=REFUSED[case]["eval_stride"] - 1)
    assert config(**shorter).eval_length == shorter["eval_stride"]


@pytest.mark.parametrize("name", ["EVAL_SEQ_LEN", "EVAL_BATCH_SEQS"])
def test_a_window_without_a_stride_is_refused(name):
    with pytest.raises(RunError, match=f"{name} has no effect without EVAL_STRIDE"):
        Config.from_env({name: "512"})


# --- each document by itself ---


@settings(max_examples=200, deadline=None)
@given(
    edges=st.lists(st.integers(1, 400), max_size=12, unique=True),
    length=st.integers(1, 90),
    stride=st.integers(1, 90),
    ranks=st.integers(1, 4),
    val_batch_size=st.sampled_from([8, 900, 524_288]),
)
def test_isolated_windows_score_every_target_once_and_cross_no_border(
    edges, length, stride, ranks, val_batch_size
):
    targets = 1 + max(edges, default=9)
    data = replace(validation(targets), starts=np.sort(np.array(edges, np.int64)))
    cfg = config(eval_seq_len=length, eval_stride=min(stride, length), val_batch_size=val_batch_size)
    document_of = np.searchsorted(data.starts, np.arange(targets), side="right")
    scored = np.zeros(targets, int)
    plans = [plan_isolated_turns(cfg, data, Runtime(rank=r, world_size=ranks)) for r in range(ranks)]
    assert len({tuple(turn.shape for turn in plan) for plan in plans}) == 1, "ranks meet after each turn"
    for turn in itertools.chain(*plans):
        assert len(turn.windows) <= turn.shape.batch
        for window in turn.windows:
            assert document_of[window.start] == document_of[window.stop - 1]
            assert window.stop - window.start <= turn.shape.length
            assert window.stop - window.first <= turn.shape.width
            assert turn.shape.slides or window.start == window.first
            scored[window.first : window.stop] += 1
    assert (scored == 1).all()


def isolated_reference(model: GPT, data: Validation, cfg: Config) -> np.ndarray:
    """Nats [targets] by float64, one target after another, each from what its document's window holds."""
    state, length = reference.as_float64(model.state_dict()), cfg.eval_length
    stride, tokens = cfg.eval_stride or length, data.tokens.astype(int)
    nats = []
    for begin, end in itertools.pairwise([0, *data.starts.tolist(), data.targets]):
        for target in range(begin, end):
            strides = max(0, -(-(target + 1 - begin - length) // stride))
            start = begin + strides * stride
            piece = tokens[start : target + 2]
            nats.append(reference.nats(state, piece[:-1], piece[1:], cfg)[-1].item())
    return np.array(nats)


ISOLATED = {"slides": dict(eval_stride=8, eval_seq_len=24), "no_stride": {}, "short": dict(eval_stride=3)}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", ISOLATED)
def test_isolated_each_document_is_scored_as_if_alone(name, ranks):
    cfg = config(**ISOLATED[name], val_batch_size=600)
    data = replace(validation(140), starts=np.array([1, 3, 40, 41, 55, 105]))
    model = random_model(cfg)
    expected = isolated_reference(model, data, cfg)
    found = np.zeros(140)
    for rank in range(ranks):
        for turn in plan_isolated_turns(cfg, data, Runtime(rank=rank, world_size=ranks)):
            if turn.windows:
                nats = score_windows(nats_of(model), data, turn, torch.device("cpu"))
                found[np.concatenate([np.arange(w.first, w.stop) for w in turn.windows])] += nats.numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    whole = evaluate(cfg, nats_of(model), data, Runtime(), isolated=True)
    np.testing.assert_allclose(whole.target_nats.numpy(), expected, rtol=2e-5, atol=1e-6)
    assert whole.nats == pytest.approx(expected.sum(), rel=1e-6) and whole.bytes == data.bytes


def test_isolated_documents_cost_less_than_sliding_over_all():
    """Tokens that the passes read, padding included, for documents as long as those of web text."""
    lengths = np.random.default_rng(3).lognormal(6.3, 0.9, 2000).astype(int) + 2
    data = replace(validation(int(lengths.sum())), starts=np.cumsum(lengths)[:-1])
    cfg = config(eval_seq_len=1024, eval_stride=256)
    isolated = sum(turn.shape.tokens for turn in plan_isolated_turns(cfg, data, Runtime()))
    slid = sum(turn.shape.tokens for turn in plan_turns(cfg, data, Runtime(), 256, learns=False))
    assert isolated < 0.6 * slid


@pytest.mark.parametrize("knob", ["eval_doc_isolated", "ttt_reset"])
def test_a_text_without_documents_is_refused(knob, tmp_path, dataset):
    bare = tmp_path / "bare"
    shutil.copytree(dataset, bare)
    for path in bare.glob("*_val_*.bin"):
        write_shard(path, np.full(400, 300, np.uint16))
    knobs = dict({knob: True}, data_path=str(bare), tokenizer_path=str(bare / "tokenizer.model"))
    cfg = Config(ttt_steps=int(knob == "ttt_reset"), vocab_size=TINY["vocab_size"], **knobs)
    with pytest.raises(RunError, match=f"{knob.upper()} needs documents, but no BOS or EOS"):
        load_validation(cfg, load_tokenizer(cfg))


# --- whole runs that slide ---


@pytest.fixture(scope="module")
def slid(tmp_path_factory, launch_forks, dataset):
    """(folder, outcome) of a short run that also scores by sliding windows."""
    folder = tmp_path_factory.mktemp("slid")
    outcome = launch_forks(folder, dataset, iterations=15, eval_stride=8)
    assert outcome.code == 0, outcome.stderr
    return folder, outcome


def test_a_run_prints_the_sliding_score(slid):
    (plain, score), log = slid[1].of("score"), slid[1].log
    assert (plain["name"], score["name"]) == ("roundtrip", "sliding")
    rounded = f"val_loss:{score['val_loss']:.4f} val_bpb:{score['val_bpb']:.4f}"
    line = rf"^final_sliding_window {rounded} window:32 stride:8 eval_time:\d+ms$"
    assert len(re.findall(line, log, re.M)) == 1
    exact = f"val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}"
    assert re.findall(r"^final_sliding_window_exact (.*)$", log, re.M) == [exact]


def test_the_result_has_the_sliding_score_beside_the_official_one(slid):
    (plain, score), result = slid[1].of("score"), slid[1].result
    assert result["sliding_val_bpb"] == round(score["val_bpb"], 8)
    assert result["sliding_val_loss"] == round(score["val_loss"], 8)
    assert result["val_bpb"] == result["roundtrip_val_bpb"] == round(plain["val_bpb"], 8)
    assert (score["tokens"], score["bytes"]) == (plain["tokens"], plain["bytes"])
    assert score["val_bpb"] != plain["val_bpb"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_artifact_slides_to_the_same_score_again(slid, dataset, launch_forks, tmp_path, ranks):
    """In a fresh process, which a fork is: of one that has made no score."""
    how = dict(device="cpu", eval_only=str(slid[0] / "final_model.int8.ptz"), eval_stride=8)
    again = launch_forks(tmp_path, dataset, ranks=ranks, **dict.fromkeys(TINY) | how)
    assert again.result and again.result["world_size"] == ranks, again.stderr[-3000:]
    keys = ("val_loss", "val_bpb", "tokens", "bytes")
    first, second = ([o.of("score")[1][key] for key in keys] for o in (slid[1], again))
    assert second == (first if ranks == 1 else pytest.approx(first, rel=1e-6))
