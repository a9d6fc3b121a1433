"""The n-gram and Hedge mixer: exact counts, true distributions, no look ahead, what Hedge promises."""

import itertools
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from sweeps.lab import hedge_study
from tests.conftest import TINY
from train_gpt import (
    DISCOUNT,
    EXPERT_SHARES,
    Config,
    Expert,
    Mixture,
    context_bins,
    context_counts,
    fixed_experts,
    gate_shares,
    hedge_mixture,
    mix_with_ngrams,
    ngram_probabilities,
)

VOCAB = 12
EXPERTS = [*EXPERT_SHARES, "gate"]


def phrases(length: int, vocab: int = VOCAB, seed: int = 0) -> list[int]:
    """A text of six phrases in random order: contexts of every order recur, with one follower or several."""
    rng, text = np.random.default_rng(seed), []
    known = [rng.integers(vocab, size=rng.integers(1, 9)).tolist() for _ in range(6)]
    while len(text) < length:
        text += known[rng.integers(6)]
    return text[:length]


def changed(values: torch.Tensor, cut: int, low: float, high: float) -> torch.Tensor:
    """The same up to `cut`, then random numbers."""
    rng = torch.Generator().manual_seed(cut)
    other = low + (high - low) * torch.rand(values.shape, generator=rng, dtype=torch.float64)
    return torch.cat((values[..., :cut], other[..., cut:].to(values.dtype)), -1)


# --- context_counts ---


def counted(tokens: list[int], highest: int) -> list[dict]:
    """By order: {place: (earlier uses of its context, their distinct tokens, those equal to this one)}."""
    orders = []
    for order in range(highest + 1):
        followers, seen = defaultdict(Counter), {}
        for place in range(order, len(tokens)):
            known = followers[tuple(tokens[place - order : place])]
            if known:
                seen[place] = known.total(), len(known), known[tokens[place]]
            known[tokens[place]] += 1
        orders.append(seen)
    return orders


def listed(tokens: list[int], vocab: int, highest: int) -> list[dict]:
    """The same by `context_counts`, with the places it lists although their context is new."""
    orders = []
    for order, parts in enumerate(context_counts(torch.tensor(tokens), vocab, highest)):
        assert parts.order == order
        places, *numbers = (part.tolist() for part in parts[1:5])
        assert len(set(places)) == len(places), "a place is listed twice"
        orders.append(dict(zip(places, zip(*numbers, strict=True), strict=True)))
    return orders


def assert_exact(tokens: list[int], vocab: int, highest: int) -> None:
    orders = listed(tokens, vocab, highest)
    known = [{place: counts for place, counts in order.items() if counts[0]} for order in orders]
    assert known == counted(tokens, highest)
    new = {counts for order in orders for counts in order.values() if not counts[0]}
    assert new <= {(0, 0, 0)}, "a context that is new has no followers yet"


@settings(max_examples=150, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 3, 10, 100, 1024]),
    length=st.integers(2, 300),
    highest=st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_contexts_are_counted_exactly(vocab, length, highest, seed):
    rng = np.random.default_rng(seed)
    assert_exact(rng.integers(vocab, size=length).tolist(), vocab, highest)
    assert_exact(phrases(length, vocab, seed), vocab, highest)


STREAMS = {
    "one": [3],
    "two": [3, 5],
    "two_equal": [3, 3],
    "three_equal": [3, 3, 3],
    "constant": [3] * 40,
    "different": list(range(40)),
    "alternating": [3, 5] * 20,
    "its_end_is_its_beginning": [1, 2, 3, 4, 1, 2, 3],
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("highest", [0, 1, 6, 45])
def test_odd_streams_are_counted_exactly(name, highest):
    assert_exact(STREAMS[name], 40, highest)


def test_orders_come_from_the_shortest_to_the_highest_though_none_recurs():
    orders = listed([7, 1, 2, 1, 2], 10, 9)
    known = [[place for place, counts in order.items() if counts[0]] for order in orders]
    assert known == [[1, 2, 3, 4], [4]] + [[]] * 8


def test_contexts_that_differ_in_their_oldest_token_only_stay_apart():
    """Keys of vocab^k would overflow from order 4 on, and forget it."""
    low, high = 1, 65_535
    tail = [high, high - 1, 0, high, high]
    tokens = [t for first in (low, high, low, low, high) for t in (first, *tail, (first + 9) % 65_536)]
    assert_exact(tokens, 65_536, 8)
    p, _ = ngram_probabilities(torch.tensor(tokens), 65_536, 6)
    assert p.tolist() == pytest.approx([p for p, _ in interpolated(tokens, 65_536, 6)][1:], rel=1e-12)


def test_large_tokens_do_not_collide_with_small_ones():
    extremes = np.random.default_rng(0).choice([*range(20), *range(65_516, 65_536)], 1500)
    assert_exact(extremes.tolist(), 65_536, 3)


def test_the_largest_key_fits():
    grams = torch.tensor([100_000_000 - 1])
    assert (grams * 65_536 + 65_535).item() == 100_000_000 * 65_536 - 1 < 2**43


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    vocab=st.sampled_from([1, 2, 4]),
    highest=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_each_document_is_counted_by_itself(sizes, vocab, highest, seed):
    """As by counts of its own; a context that begins in the document before is a new one."""
    tokens = np.random.default_rng(seed).integers(0, vocab, sum(sizes)).tolist()
    edges = np.cumsum([0, *sizes]).tolist()
    begins = torch.tensor(np.repeat(edges[:-1], sizes))
    for order, parts in enumerate(context_counts(torch.tensor(tokens), vocab, highest, begins)):
        known = {}
        for place, *numbers in zip(*(part.tolist() for part in parts[1:5]), strict=True):
            if numbers[0]:
                known[place] = tuple(numbers)
        expected = {}
        for begin, end in itertools.pairwise(edges):
            alone = counted(tokens[begin:end], highest)[order]
            expected |= {begin + place: counts for place, counts in alone.items()}
        within = {place: counts for place, counts in known.items() if place - order >= begins[place]}
        assert within == expected


def test_documents_begin_after_their_boundaries():
    """Token 3 is the last target of the first document, which begins the second."""
    data = train_gpt.Validation(np.array([1, 5, 6, 1, 7, 1, 8, 9]), np.ones(7), 3, "", np.array([3, 5]))
    assert train_gpt.document_begins(data).tolist() == [0, 0, 0, 0, 4, 4, 6, 6]


# --- ngram_probabilities ---


def interpolated(tokens: list[int], vocab: int, highest: int) -> list[tuple[float, list]]:
    """Of each token: P by interpolated absolute discounting, and (uses, followers) of its contexts."""
    followers, all_counts = defaultdict(Counter), []
    for place, token in enumerate(tokens):
        p, counts = 1 / vocab, [(0, 0)] * (highest + 1)
        before = [tuple(tokens[place - order : place]) for order in range(min(place, highest) + 1)]
        for order, context in enumerate(before):
            known = followers[context]
            if uses := known.total():
                counts[order] = uses, len(known)
                p = (max(known[token] - DISCOUNT, 0) + DISCOUNT * len(known) * p) / uses
            known[token] += 1
        all_counts.append((p, counts))
    return all_counts


CASES = [(2, 1), (2, 3), (150, 0), (150, 1), (300, 6), (60, 70)]


@pytest.mark.parametrize("length, highest", CASES)
def test_the_ngram_is_interpolated_absolute_discounting(length, highest):
    tokens = phrases(length)
    p, _ = ngram_probabilities(torch.tensor(tokens), VOCAB, highest)
    assert p.dtype == torch.float64 and len(p) == length - 1
    expected = [p for p, _ in interpolated(tokens, VOCAB, highest)][1:]
    assert p.tolist() == pytest.approx(expected, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("length, highest", CASES)
def test_codes_are_eleven_and_a_half_times_the_log_of_one_plus_a_count(length, highest):
    tokens = phrases(length)
    _, codes = ngram_probabilities(torch.tensor(tokens), VOCAB, highest)
    counts = np.array([counts for _, counts in interpolated(tokens, VOCAB, highest)][1:])  # [N, orders, 2]
    assert codes.dtype == torch.uint8 and codes.shape == (2, highest + 1, length - 1)
    assert (codes.numpy() == np.round(11.5 * np.log(1 + counts.transpose(2, 1, 0)))).all()


@pytest.mark.parametrize("highest", [0, 2, 6])
@pytest.mark.parametrize("place", [1, 2, 7, 40, 199])
def test_the_ngram_sums_to_one(place, highest):
    text = phrases(place, seed=3)
    mass = [
        ngram_probabilities(torch.tensor([*text, last]), VOCAB, highest)[0][-1].item()
        for last in range(VOCAB)
    ]
    assert sum(mass) == pytest.approx(1, abs=1e-12) and min(mass) > 0


# --- nothing of the future moves the past ---

CUTS = [1, 2, 33, 97, 150, 298, 299]


@pytest.mark.parametrize("cut", CUTS)
def test_later_tokens_do_not_move_the_ngram(cut):
    tokens = torch.tensor(phrases(300))
    (p, codes), (q, others) = (
        ngram_probabilities(x, VOCAB, 6) for x in (tokens, changed(tokens, cut, 0, VOCAB))
    )
    assert torch.equal(p[: cut - 1], q[: cut - 1])
    assert torch.equal(codes[..., :cut], others[..., :cut]), "of the changed token too: what stands before it"


@pytest.mark.parametrize("cut", CUTS)
def test_later_odds_and_contexts_do_not_move_the_gate(cut):
    odds, codes = gate_inputs(300)
    later = changed(odds, cut, -9, 9), changed(codes, cut + 1, 0, 99)
    assert torch.equal(gate_shares(odds, codes)[: cut + 1], gate_shares(*later)[: cut + 1])


@pytest.mark.parametrize("window", [0, 7])
@settings(max_examples=80, deadline=None)
@given(length=st.integers(2, 120), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_later_probabilities_and_bins_do_not_move_hedge(window, length, share, seed):
    given, cut = hedge_inputs(length, seed), max(1, int(share * length))
    bounds = (0.001, 0.999), (0.001, 0.999), (0.001, 0.999), (0, 9)
    later = [changed(part, cut, *bound) for part, bound in zip(given, bounds, strict=True)]
    one, other = (mixture(*x, eta=0.5, window=window)[0][:cut] for x in (given, later))
    assert torch.equal(one, other), f"by up to {(one - other).abs().max():.1e}"


def test_a_token_keeps_its_last_digit_when_later_ones_leave_its_bin():
    """Its place among the sorted tokens moves then: no float may be computed differently for that."""
    for length in range(20, 60):
        neural, other, share, bins = hedge_inputs(length, length)
        cut = length // 2
        last, first = bins.clone(), bins.clone()
        last[cut:], first[cut:] = 9, -1
        one, two = (mixture(neural, other, share, b, eta=0.5)[0][:cut] for b in (last, first))
        assert torch.equal(one, two), f"{length} tokens: by up to {(one - two).abs().max():.1e}"


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 400), share=st.floats(0.01, 0.99), window=st.sampled_from([0, 0, 9]))
def test_later_tokens_do_not_move_the_mixture(length, share, window):
    cfg, cut = config(hedge_window=window, hedge_eta=0.5), max(1, int(share * length))
    tokens, nats = torch.tensor(phrases(length, seed=length)), 8 * torch.rand(length - 1).double()
    later = changed(tokens, cut, 0, VOCAB), changed(nats, cut - 1, 0, 9)
    one, other = (mix(cfg, *x)[0][: cut - 1] for x in ((tokens, nats), later))
    assert torch.equal(one, other), f"by up to {(one - other).abs().max():.1e}"


# --- hedge_mixture ---


def hedge_inputs(length: int, seed: int = 0) -> list[torch.Tensor]:
    """Neural and other probabilities, a share for each token, and bins 0, 2, 4, 6."""
    rng = torch.Generator().manual_seed(seed)
    parts = [0.02 + 0.96 * torch.rand(length, generator=rng, dtype=torch.float64) for _ in range(3)]
    return [*parts[:2], parts[2].float(), 2 * torch.randint(4, (length,), generator=rng)]


def in_parts(mixture: Mixture) -> tuple[torch.Tensor, list[float], list[float]]:
    """(log of the mixture [N], final weights, each expert's log-likelihood)."""
    weights = [expert.weight for expert in mixture.experts]
    return mixture.log_probs, weights, [expert.log_likelihood for expert in mixture.experts]


def mixture(neural, other, share, bins, eta=0.1, window=0):
    experts = [*fixed_experts(EXPERT_SHARES), Expert("gate", share)]
    return in_parts(hedge_mixture(neural, other, experts, bins, eta, window))


def mix(cfg: Config, tokens: torch.Tensor, nats: torch.Tensor) -> tuple:
    return in_parts(mix_with_ngrams(cfg, tokens, nats))


def logsumexp(values) -> float:
    return max(values) + math.log(sum(math.exp(v - max(values)) for v in values))


def slow_hedge(neural, other, shares, bins, eta, window) -> tuple[list, list, list]:
    """What `mixture` returns, token by token, each expert's log-likelihoods in a list for each bin."""
    neural, other = neural.tolist(), other.tolist()
    shares = [s.tolist() if isinstance(s, torch.Tensor) else [s] * len(neural) for s in shares]
    past = defaultdict(lambda: [[] for _ in shares])

    def weights(seen: list) -> list[float]:
        sums = [sum(logs[-window:]) for logs in seen]
        return [2 * (expert == 0) + eta * total for expert, total in enumerate(sums)]

    mixed, totals = [], [0.0] * len(shares)
    for place, key in enumerate(bins):
        logs = [math.log((1 - s[place]) * neural[place] + s[place] * other[place]) for s in shares]
        now = weights(past[key])
        mixed.append(logsumexp([w + log for w, log in zip(now, logs, strict=True)]) - logsumexp(now))
        for expert, log in enumerate(logs):
            past[key][expert].append(log)
            totals[expert] += log
    final = [0.0] * len(shares)
    for seen in past.values():
        now = weights(seen)
        for expert, weight in enumerate(now):
            final[expert] += math.exp(weight - logsumexp(now)) * len(seen[0]) / len(neural)
    return mixed, final, totals


@pytest.mark.parametrize("window", [0, 1, 5, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("length", [1, 2, 300])
def test_hedge_is_the_slow_one(length, eta, window):
    neural, other, share, bins = hedge_inputs(length)
    mixed, _, totals = mixture(neural, other, share, bins, eta, window)
    expected, _, sums = slow_hedge(neural, other, [*EXPERT_SHARES, share], bins.tolist(), eta, window)
    assert mixed.tolist() == pytest.approx(expected, abs=1e-9)
    assert totals == pytest.approx(sums, abs=1e-9)


@pytest.mark.parametrize("window", [0, 1, 5, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_the_final_weights_are_the_slow_ones(eta, window):
    neural, other, share, bins = hedge_inputs(300)
    final = mixture(neural, other, share, bins, eta, window)[1]
    expected = slow_hedge(neural, other, [*EXPERT_SHARES, share], bins.tolist(), eta, window)[1]
    assert final == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("bins", ["one", "four", "each_token_its_own"])
def test_final_weights_sum_to_one(bins, eta):
    neural, other, share, four = hedge_inputs(200)
    kinds = dict(one=torch.zeros(200, dtype=torch.int64), four=four, each_token_its_own=torch.arange(200))
    assert sum(mixture(neural, other, share, kinds[bins], eta)[1]) == pytest.approx(1, abs=1e-12)


def test_without_a_learning_rate_the_weights_are_the_prior():
    neural, other, share, bins = hedge_inputs(200)
    mixed, final, _ = mixture(neural, other, share, bins, eta=0.0)
    prior = np.array([math.exp(2)] + [1.0] * len(EXPERT_SHARES))
    prior /= prior.sum()
    assert final == pytest.approx(prior.tolist(), abs=1e-12)
    shares = np.stack([np.full(200, s) for s in EXPERT_SHARES] + [share.numpy()]).astype(np.float64)
    experts = (1 - shares) * neural.numpy() + shares * other.numpy()
    assert mixed.exp().tolist() == pytest.approx((prior @ experts).tolist(), abs=1e-12)


@pytest.mark.parametrize("best", range(len(EXPERTS)))
def test_each_bin_loses_no_more_than_its_best_expert_and_the_prior(best):
    neural, other, share, bins = hedge_inputs(400, best)
    experts = torch.stack([neural + s * (other - neural) for s in (*EXPERT_SHARES, share.double())])
    bins[experts.argmax(0) == best] = 7  # a bin where this one is often the best
    mixed, prior = mixture(neural, other, share, bins, eta=1.0)[0], [2.0] + [0.0] * len(EXPERT_SHARES)
    for key in bins.unique():
        losses = -experts[:, bins == key].log().sum(1)
        bound = min(loss - w for loss, w in zip(losses.tolist(), prior, strict=True)) + logsumexp(prior)
        assert -mixed[bins == key].sum().item() <= bound + 1e-9


def test_a_bin_of_one_token_has_the_prior_and_touches_no_other():
    neural, other, share, bins = hedge_inputs(50)
    bins[20] = 99
    alone = mixture(neural, other, share, bins, eta=1.0)[0]
    single = mixture(*(part[20:21] for part in (neural, other, share, bins)), eta=1.0)[0]
    assert alone[20].item() == pytest.approx(single.item(), abs=1e-12)
    rest = torch.arange(50) != 20
    without = mixture(*(part[rest] for part in (neural, other, share, bins)), eta=1.0)[0]
    torch.testing.assert_close(alone[rest], without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, "each its own"])
def test_one_expert_is_itself(share):
    neural, other, each, bins = hedge_inputs(200)
    share = each if isinstance(share, str) else share
    mixed, final, totals = in_parts(hedge_mixture(neural, other, [Expert("one", share)], bins, 0.7, 0))
    share = each.double() if isinstance(share, torch.Tensor) else share
    expected = ((1 - share) * neural + share * other).log()
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)
    assert final == pytest.approx([1], abs=1e-12) and totals == pytest.approx([expected.sum().item()])


def test_a_probability_of_almost_nothing_does_not_break_the_sums():
    neural, other, share, bins = hedge_inputs(100)
    neural[10], other[20] = 1e-300, 1e-300
    mixed, final, _ = mixture(neural, other, share, bins, eta=1.0)
    assert mixed.isfinite().all() and sum(final) == pytest.approx(1, abs=1e-12)
    assert (mixed <= torch.maximum(neural, other).log() + 1e-12).all()


# --- gate_shares ---


def gate_inputs(length: int, better: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Odds about `better`, and codes of seven orders that shrink with the order."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 200, (1, 1, length)) // 3 ** np.arange(7)[None, :, None]
    counts = np.concatenate((counts, np.minimum(counts, rng.integers(1, 9, counts.shape))))
    codes = np.round(11.5 * np.log(1 + counts)).astype(np.uint8)
    odds = (better + rng.normal(0, 0.5, length)).astype(np.float32)
    return torch.from_numpy(odds), torch.from_numpy(codes)


@pytest.mark.parametrize("better", [-9.0, 0.0, 9.0])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 500])
def test_shares_lie_between_nothing_and_all(length, better):
    shares = gate_shares(*gate_inputs(length, better))
    assert shares.dtype == torch.float32 and shares.shape == (length,)
    assert (shares > 0).all() and (shares < 1).all()


def test_the_gate_gives_all_to_an_ngram_that_is_always_better():
    shares = gate_shares(*gate_inputs(20_000, 3.0))
    assert shares[0] < 0.2 and shares[-2000:].min() > 0.9


def test_the_gate_gives_nothing_to_an_ngram_that_is_always_worse():
    assert gate_shares(*gate_inputs(20_000, -3.0))[-2000:].max() < 0.1


def test_the_gate_learns_which_contexts_to_trust():
    odds, codes = gate_inputs(100_000)
    known = codes[0, 4] > 0  # half of the tokens
    shares = gate_shares(torch.where(known, odds + 2, odds - 2), codes)[-9000:]
    assert shares[known[-9000:]].mean() > 0.8 and shares[~known[-9000:]].mean() < 0.2


def test_the_gate_learns_from_how_the_ngram_fared_of_late():
    """Where it is better for 400 tokens, then worse for 400, only the odds before a token tell which."""
    odds, codes = gate_inputs(40_000)
    good = torch.arange(40_000) // 400 % 2 == 0
    shares = gate_shares(torch.where(good, odds + 2, odds - 2), torch.zeros_like(codes))[-4000:]
    assert shares[good[-4000:]].mean() > shares[~good[-4000:]].mean() + 0.5


def test_the_gate_is_the_same_twice_whatever_the_random_state():
    shares = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        shares.append(gate_shares(*gate_inputs(3000, 1.0)))
    assert torch.equal(*shares)


# --- mix_with_ngrams ---


def config(**knobs) -> Config:
    return Config(**dict(vocab_size=VOCAB, use_hedge=True) | knobs)


def conditional(seed: int = 0) -> np.ndarray:
    """A made-up neural model: P(v | previous token)."""
    return np.random.default_rng(seed).dirichlet(np.full(VOCAB, 0.5), VOCAB)


def neural_nats(table: np.ndarray, tokens: list[int]) -> torch.Tensor:
    return torch.from_numpy(-np.log(table[tokens[:-1], tokens[1:]]))


@pytest.mark.parametrize("order", [0, 6])
@pytest.mark.parametrize("place", [1, 2, 32, 33, 150, 400])
def test_the_mixture_sums_to_one(place, order):
    table, text, mass = conditional(), phrases(place, seed=place), 0.0
    for last in range(VOCAB):
        tokens = [*text, last]
        cfg = config(hedge_order=order, hedge_eta=0.5)
        mass += mix(cfg, torch.tensor(tokens), neural_nats(table, tokens))[0][-1].exp().item()
    assert mass == pytest.approx(1, abs=1e-9)


def test_the_mixture_costs_little_where_the_neural_model_is_the_source():
    source = np.random.default_rng(0).dirichlet(np.ones(VOCAB))
    tokens = np.random.default_rng(1).choice(VOCAB, 20_000, p=source).tolist()
    nats = neural_nats(np.tile(source, (VOCAB, 1)), tokens)
    mixed, _, totals = mix(config(), torch.tensor(tokens), nats)
    assert totals[0] == pytest.approx(-nats.sum().item())
    assert -0.001 < (-mixed - nats).mean() < 0.004


def test_the_mixture_gains_on_a_text_that_repeats():
    tokens, table = phrases(3000), np.full((VOCAB, VOCAB), 1 / VOCAB)
    nats = neural_nats(table, tokens)
    mixed, weights, totals = mix(config(hedge_eta=1.0), torch.tensor(tokens), nats)
    assert -mixed.sum() < 0.3 * nats.sum() and weights[0] < 0.1
    assert -mixed.sum() < 1.05 * -max(totals), "about as good as its best expert"


def slow_mix(cfg: Config, tokens: list[int], nats: torch.Tensor, share: torch.Tensor) -> tuple:
    """`mix`, but for the shares that the gate gave, by dictionaries and loops."""
    other = interpolated(tokens, cfg.vocab_size, cfg.hedge_order)[1:]
    bins = []
    for _, counts in other:
        longest = max((order for order, (uses, _) in enumerate(counts) if uses), default=0)
        seen, kinds = (round(11.5 * math.log(1 + count)) // 8 for count in counts[longest])
        bins.append((longest, min(seen, 10), min(kinds, 6)))
    p = torch.tensor([p for p, _ in other], dtype=torch.float64)
    return slow_hedge((-nats).exp(), p, [*EXPERT_SHARES, share], bins, cfg.hedge_eta, cfg.hedge_window)


def both_mixtures(monkeypatch, cfg: Config, tokens: list[int]) -> tuple[list, list, list, list]:
    """Log-probabilities and the experts' totals, by `mix` and by `slow_mix`."""
    given = []

    def noted(*args):
        given.append(gate_shares(*args))
        return given[-1]

    monkeypatch.setattr(train_gpt, "gate_shares", noted)
    nats = torch.rand(len(tokens) - 1, generator=torch.Generator().manual_seed(0)).double() * 8
    mixed, _, totals = mix(cfg, torch.tensor(tokens), nats)
    expected, _, sums = slow_mix(cfg, tokens, nats, given[0])
    return mixed.tolist(), totals, expected, sums


@pytest.mark.parametrize("knobs", [
    {}, dict(hedge_eta=1.0), dict(hedge_eta=1.0, hedge_window=20), dict(hedge_order=0, hedge_eta=0.5),
    dict(hedge_order=1), dict(hedge_order=12, hedge_eta=0.5),
])  # fmt: skip
def test_the_mixture_is_the_slow_one(monkeypatch, knobs):
    mixed, totals, expected, sums = both_mixtures(monkeypatch, config(**knobs), phrases(1500))
    assert mixed == pytest.approx(expected, abs=1e-9)
    assert totals == pytest.approx(sums, abs=1e-9)


def test_with_documents_it_is_two_mixtures_one_after_the_other():
    tokens = phrases(300)
    nats = neural_nats(conditional(), tokens)
    text = torch.tensor(tokens)
    begins = torch.tensor(np.repeat([0, 100, 160], [100, 60, 140]))
    cfg = config(hedge_order=3, hedge_document_order=2)
    first = train_gpt.mix_with_counts(cfg, text, nats, 2, begins)
    second = train_gpt.mix_with_counts(cfg, text, -first.log_probs, 3)
    found = mix_with_ngrams(cfg, text, nats, begins)
    assert torch.equal(found.log_probs, second.log_probs)
    plain = mix_with_ngrams(config(hedge_order=3), text, nats)
    assert (found.log_probs - plain.log_probs).abs().max() > 0.1


def test_contexts_with_many_followers_share_a_bin(monkeypatch):
    """Of 31 to 400 followers: 63 and more are one bin, as are 1023 uses and more."""
    tokens = np.random.default_rng(0).integers(400, size=2500).tolist()
    mixed, _, expected, _ = both_mixtures(
        monkeypatch, config(vocab_size=400, hedge_order=0, hedge_eta=1.0), tokens
    )
    assert mixed == pytest.approx(expected, abs=1e-9)


def test_the_gate_sees_the_odds_of_the_ngram_against_the_neural_model(monkeypatch):
    tokens, given = phrases(300), []
    monkeypatch.setattr(train_gpt, "gate_shares", lambda *args: given.extend(args) or torch.full((299,), 0.5))
    nats = neural_nats(conditional(), tokens)
    mix(config(), torch.tensor(tokens), nats)
    p, codes = ngram_probabilities(torch.tensor(tokens), VOCAB, 6)
    torch.testing.assert_close(given[0].double(), p.log() + nats, rtol=1e-6, atol=1e-6)
    assert torch.equal(given[1], codes)


# --- whole runs that mix ---


@pytest.fixture(scope="module")
def hedged(tmp_path_factory, launch_forks, dataset):
    """(folder, outcome) of a short run that mixes its sliding score, with its dump."""
    folder = tmp_path_factory.mktemp("hedged")
    knobs = dict(eval_stride=8, use_hedge=True, score_dump=str(folder / "scores.npz"))
    outcome = launch_forks(folder, dataset, iterations=15, **knobs)
    assert outcome.code == 0, outcome.stderr
    return folder, outcome


def scores_of(outcome) -> dict[str, dict]:
    return {score["name"]: score for score in outcome.of("score")}


def test_a_run_prints_the_hedge_score(hedged):
    score, log = scores_of(hedged[1])["hedge"], hedged[1].log
    rounded = f"val_loss:{score['val_loss']:.4f} val_bpb:{score['val_bpb']:.4f}"
    assert len(re.findall(rf"^final_hedge_mixer {rounded} eval_time:\d+ms$", log, re.M)) == 1
    exact = f"val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}"
    assert re.findall(r"^final_hedge_mixer_exact (.*)$", log, re.M) == [exact]


def test_the_result_has_the_hedge_score_beside_the_official_one(hedged):
    scores, result = scores_of(hedged[1]), hedged[1].result
    assert result["hedge_val_bpb"] == round(scores["hedge"]["val_bpb"], 8)
    assert result["val_bpb"] == pytest.approx(scores["roundtrip"]["val_bpb"], abs=1e-8)
    assert scores["hedge"]["val_bpb"] < scores["sliding"]["val_bpb"], "its text repeats: n-grams help"
    assert [scores["hedge"][key] == scores["sliding"][key] for key in ("tokens", "bytes")] == [True, True]


def test_each_expert_has_a_line_with_its_weight(hedged):
    form = r"^hedge_expert ngram_share:(\S+) val_loss:\S+ val_bpb:(\S+) saved:(\S+) weight:(\S+)$"
    lines = re.findall(form, hedged[1].log, re.M)
    assert [line[0] for line in lines] == list(map(str, EXPERTS))
    assert sum(float(line[3]) for line in lines) == pytest.approx(1, abs=1e-3)
    neural = float(lines[0][1])
    assert [float(line[2]) for line in lines] == pytest.approx(
        [neural - float(x[1]) for x in lines], abs=2e-4
    )


def test_the_hedge_event_says_the_same(hedged):
    (event,), sliding = hedged[1].of("hedge"), scores_of(hedged[1])["sliding"]
    assert event["shares"] == EXPERTS and sum(event["weights"]) == pytest.approx(1, abs=1e-9)
    assert event["val_bpb"][0] == pytest.approx(sliding["val_bpb"], rel=1e-7), "the first expert: no n-gram"


def dump_of(hedged) -> dict[str, np.ndarray]:
    with np.load(hedged[0] / "scores.npz") as dump:
        return dict(dump)


FINAL = dict(roundtrip="int8_zstd_roundtrip", sliding="sliding_window", hedge="hedge_mixer")


@pytest.mark.parametrize("name", FINAL)
def test_the_dump_recomputes_the_score(hedged, name):
    dump = dump_of(hedged)
    ((loss, bpb),) = re.findall(
        rf"^final_{FINAL[name]}_exact val_loss:(\S+) val_bpb:(\S+)$", hedged[1].log, re.M
    )
    logprob, size = dump[f"{name}_logprob"], dump["bytes"]
    # The formula of records/SCORING.md, to the eighth digit.
    assert f"{-logprob.sum() / math.log(2) / size.sum():.8f}" == bpb
    assert f"{-logprob.mean():.8f}" == loss
    assert logprob.dtype == np.float64


def test_the_dump_has_every_target_once(hedged, dataset):
    dump = dump_of(hedged)
    tokens = np.fromfile(dataset / "toy_val_000000.bin", dtype="<u2", offset=1024)
    assert (dump["target"] == tokens[1:]).all()
    assert (dump["position"] == np.arange(len(tokens) - 1)).all()
    scorers = {key for key in dump if key.endswith("_logprob")}
    assert scorers == {f"{name}_logprob" for name in FINAL}
    assert all(dump[key].shape == dump["target"].shape for key in scorers)


def test_the_dump_mixes_to_the_hedge_score(hedged, dataset):
    """By `mix` on what the dump says of the sliding score: the right targets beside the right nats."""
    dump = dump_of(hedged)
    tokens = np.fromfile(dataset / "toy_val_000000.bin", dtype="<u2", offset=1024).astype(np.int64)
    cfg = Config(vocab_size=TINY["vocab_size"], use_hedge=True)
    mixed = mix(cfg, torch.from_numpy(tokens), -torch.from_numpy(dump["sliding_logprob"]).double())[0]
    assert mixed.tolist() == pytest.approx(dump["hedge_logprob"].tolist(), abs=1e-9)


@pytest.fixture
def mix_again(launch_forks, hedged, dataset, tmp_path):
    """mix_again(knob=value, ..., ranks=1) -> the outcome of scoring the hedged run's model again."""

    def run(**knobs):
        artifact = str(hedged[0] / "final_model.int8.ptz")
        how = dict(device="cpu", eval_only=artifact, use_hedge=True) | knobs
        again = launch_forks(tmp_path, dataset, **dict.fromkeys(TINY) | how)
        assert again.result, again.stderr[-3000:]
        return again

    return run


def test_two_ranks_mix_to_the_same_score(hedged, mix_again):
    again = mix_again(eval_stride=8, ranks=2)
    assert again.result["world_size"] == 2
    keys = ("val_loss", "val_bpb", "tokens", "bytes")
    one, two = ([scores_of(outcome)["hedge"][key] for key in keys] for outcome in (hedged[1], again))
    assert two == pytest.approx(one, rel=1e-6)


def test_contexts_of_no_token_mix_the_official_score(hedged, mix_again):
    again = mix_again(hedge_order=0)
    scores = scores_of(again)
    assert again.result["hedge_val_bpb"] == round(scores["hedge"]["val_bpb"], 8)
    assert list(scores) == ["roundtrip", "hedge"]
    assert scores["hedge"]["val_bpb"] < scores["roundtrip"]["val_bpb"] + 0.01
    assert scores["hedge"]["val_bpb"] > hedged[1].result["hedge_val_bpb"]


# --- the bins ---


def codes_of(uses: list[int], followers: list[int]) -> torch.Tensor:
    """Codes [2, orders, 1] of a token, whose contexts of 0, 1, ... tokens were seen and followed so often."""
    counts = np.array([uses, followers])[:, :, None]
    return torch.from_numpy(np.round(11.5 * np.log(1 + counts)).astype(np.uint8))


def test_kinds_of_context_have_bins_of_their_own():
    """None seen; then the longest one seen of 0 to 12 tokens, its uses and its followers by factors of 2."""
    kinds = {context_bins(codes_of([0] * 13, [0] * 13)).item()}
    number = 1
    for longest in range(13):
        for doublings in range(1, 11):
            for fewer in range(1, min(doublings, 6) + 1):
                shorter = [2**doublings] * longest
                missing = [0] * (12 - longest)
                codes = codes_of([*shorter, 2**doublings - 1, *missing], [*shorter, 2**fewer - 1, *missing])
                kinds.add(context_bins(codes).item())
                number += 1
    assert len(kinds) == number


@pytest.mark.parametrize("uses, followers", [(1023, 63), (5000, 63), (1023, 700), (5000, 4000)])
def test_beyond_1023_uses_and_63_followers_all_are_one_kind(uses, followers):
    last = context_bins(codes_of([5000, 1023, 0], [9, 63, 0]))
    assert torch.equal(context_bins(codes_of([5000, uses, 0], [9, followers, 0])), last)
    assert not torch.equal(context_bins(codes_of([5000, 500, 0], [9, followers, 0])), last)
    assert not torch.equal(context_bins(codes_of([5000, uses, 0], [9, 30, 0])), last)


# --- the study of its parts ---


def test_the_study_changes_one_part_of_the_mixer_at_a_time(monkeypatch, tmp_path):
    """Each line is the mixer with that part replaced, here by hand; the dump's first token is taken as 0."""
    tokens, size = [0, *phrases(300)[1:]], 700
    nats = neural_nats(conditional(), tokens)
    np.savez(
        tmp_path / "a.npz",
        target=np.array(tokens[1:]),
        bytes=np.full(299, size / 299),
        sliding_logprob=-nats.numpy(),
        roundtrip_logprob=np.full(299, -9.0),
    )
    names = ("as it stands", "pure experts", "gate alone", "one bin", "order 1", "discount 0.5")
    monkeypatch.setattr(hedge_study, "VARIANTS", {name: hedge_study.VARIANTS[name] for name in names})
    found = hedge_study.study(tmp_path / "a.npz", VOCAB)
    assert (found["tokens"], found["base"]) == (299, "sliding")
    bits = math.log(2) * found["bytes"]
    assert found["dumped"]["sliding"] == pytest.approx(nats.sum().item() / bits)

    text = torch.tensor(tokens)
    p, codes = ngram_probabilities(text, VOCAB, 6)
    share = gate_shares((p.log() + nats).float(), codes).double()
    alone = torch.log((1 - share) * (-nats).exp() + share * p)
    bins = context_bins(codes)
    pure = hedge_mixture((-nats).exp(), p, fixed_experts((0.0, 1.0)), bins, 0.1, 1000).log_probs
    every = [*fixed_experts(EXPERT_SHARES), Expert("gate", share.float())]
    one = hedge_mixture((-nats).exp(), p, every, torch.zeros_like(bins), 0.1, 1000).log_probs
    expected = {
        "as it stands": mix(config(), text, nats)[0],
        "pure experts": pure,
        "gate alone": alone,
        "one bin": one,
        "order 1": mix(config(hedge_order=1), text, nats)[0],
    }
    for name, logs in expected.items():
        assert found["variants"][name]["bpb"] == pytest.approx(-logs.sum().item() / bits, rel=1e-6), name
    assert found["variants"]["discount 0.5"]["bpb"] != found["variants"]["as it stands"]["bpb"]
    assert train_gpt.DISCOUNT == DISCOUNT and train_gpt.hedge_mixture is hedge_mixture, "all is put back"
