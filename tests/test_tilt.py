"""#2135's tilt: hints by exact counts of what came before, a distribution, and the formula as published."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_document_lora import BOS, LENGTHS, LORA, nats_of_all, scoring, text_of
from train_gpt import Config, RunError, ngram_hints, tilt

SMALL = dict(ngram_tilt_enabled=True, token_order=3, token_threshold=0.5, token_boost=2.625)
PLAIN = dict.fromkeys(LORA, 0) | dict(ttt_chunk_size=4, ttt_eval_seq_len=12)


def slow_hints(tokens: list[int], order: int, threshold: float) -> list[int]:
    """A dictionary from each context to its followers' counts and the first follower that had the most."""
    counts, leader, hints = defaultdict(lambda: defaultdict(int)), {}, []
    for at, token in enumerate(tokens):
        context = tuple(tokens[at - order + 1 : at])
        if at < order - 1:
            hints.append(-1)
            continue
        followers = counts[context]
        top = leader.get(context)
        sure = top is not None and followers[top] / sum(followers.values()) >= threshold
        hints.append(top if sure else -1)
        followers[token] += 1
        if top is None or followers[token] > followers[top]:
            leader[context] = token
    return hints[1:]


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=2, max_size=120),
    order=st.integers(1, 6),
    threshold=st.sampled_from([0.0, 0.4, 0.5, 2 / 3, 0.8, 1.0]),
)
def test_hints_are_those_of_a_dictionary(tokens, order, threshold):
    cfg = Config(vocab_size=4, ngram_tilt_enabled=True, token_order=order, token_threshold=threshold)
    assert ngram_hints(cfg, torch.tensor(tokens)).tolist() == slow_hints(tokens, order, threshold)


def test_the_first_to_reach_a_count_keeps_it():
    """After 0 came 1, 2, 2, 1: two each, and 2 was there first."""
    tokens = torch.tensor([0, 1, 0, 2, 0, 2, 0, 1, 0, 3])
    cfg = Config(vocab_size=4, ngram_tilt_enabled=True, token_order=2, token_threshold=0.0)
    assert ngram_hints(cfg, tokens)[[2, 4, 6, 8]].tolist() == [1, 1, 2, 2]


def test_later_tokens_move_no_hint():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, 3, 200))
    cfg = Config(vocab_size=3, **SMALL)
    for cut in (2, 3, 50, 120, 199):
        other = tokens.clone()
        other[cut:] = (other[cut:] + 1) % 3
        assert torch.equal(ngram_hints(cfg, other)[:cut], ngram_hints(cfg, tokens)[:cut])


@pytest.mark.parametrize("boost", [0.0, 2.625, 9.0])
def test_a_tilt_is_a_distribution_with_the_odds_of_the_hint_raised(boost):
    logs = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    cfg = Config(vocab_size=7, **SMALL | dict(token_boost=boost))
    hint, values = torch.tensor(4), torch.arange(7)
    found = -tilt(cfg, -logs, -logs[hint].expand(7), hint, values)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    expected = (logs + boost * (values == 4)).log_softmax(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tilt(cfg, -logs, -logs, torch.tensor(-1), values), -logs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["official", "isolated"])
def test_the_score_is_the_published_formula(kind):
    """By float64 softmax of all logits, one document or official window after another."""
    knobs = PLAIN | (dict(eval_doc_isolated=True) if kind == "isolated" else {})
    run = scoring(text_of(LENGTHS), **knobs, **SMALL)
    scores = nats_of_all(run)
    tokens = torch.from_numpy(run.data.tokens.astype(np.int64))
    hints = slow_hints(tokens.tolist(), 3, 0.5)
    expected = []
    spans = run.data.spans if kind == "isolated" else [(0, run.data.targets)]
    pieces = [(at, min(at + 16, end)) for begin, end in spans for at in range(begin, end, 16)]
    with torch.no_grad():
        for first, stop in pieces:
            logs = run.model(tokens[None, first:stop])[0].double().log_softmax(-1)
            for at in range(first, stop):
                p, target, hint = logs[at - first].exp(), tokens[at + 1].item(), hints[at]
                nats = -math.log(p[target])
                if hint >= 0:
                    nats += -2.625 * (target == hint) + math.log(1 + p[hint].item() * (math.exp(2.625) - 1))
                expected.append(nats)
    torch.testing.assert_close(scores["tilt"], torch.tensor(expected).double(), rtol=2e-5, atol=2e-5)
    base = scores["isolated" if kind == "isolated" else "roundtrip"]
    assert (scores["tilt"] - base.double()).abs().max() > 0.1 and min(hints) == -1 < max(hints)


def test_the_tilt_leaves_the_other_scores_as_they_are():
    """Hedge mixes the score before the tilt, and test-time training learns untilted. Small steps: AdamW gives
    the rounding of gradients near zero their full size, and passes with hints round otherwise."""
    knobs = dict(use_hedge=True, hedge_order=2, eval_doc_isolated=True, eval_stride=4, ttt_lr=3e-4)
    plain = nats_of_all(scoring(text_of(LENGTHS), **knobs))
    tilted = nats_of_all(scoring(text_of(LENGTHS), **knobs, **SMALL))
    assert tilted.keys() - plain.keys() == {"tilt"}
    for name, nats in plain.items():
        torch.testing.assert_close(tilted[name], nats, rtol=1e-5, atol=1e-5)


def test_a_tilt_gains_where_the_text_repeats():
    """Nearly all of its boost, from the second time on that 15 tokens went before."""
    phrase = [BOS, 5, 9, 3, 8, 4, 2, 6, 7, 10, 12, 11, 14, 13, 16, 15, 18, 17, 20, 19]
    scores = nats_of_all(scoring(np.array(10 * phrase, np.uint16), **PLAIN, ngram_tilt_enabled=True))
    gain = scores["roundtrip"].double() - scores["tilt"]
    assert (gain[:34] == 0).all() and 0.95 * 2.625 < gain[34:].mean() <= 2.625


@pytest.mark.parametrize("knob", ["TOKEN_ORDER=8", "TOKEN_THRESHOLD=0.9", "TOKEN_BOOST=2"])
def test_a_setting_without_the_tilt_is_refused(knob):
    with pytest.raises(RunError, match="has no effect without NGRAM_TILT_ENABLED=1"):
        Config.from_env(dict([knob.split("=")]))
