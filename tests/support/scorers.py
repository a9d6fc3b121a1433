"""Scorers of all kinds, legal and illegal, for the check that tells them apart.

Each is a function from tokens [N + 1], ids below V, to the log-probabilities [N] of tokens[1:]. The illegal
ones are legal ones with one thing wrong.
"""

import math
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import torch

from train_gpt import Config, mix_with_ngrams

V = 12
TABLE = (
    np.random.default_rng(8).dirichlet(np.full(V, 0.5), V) * 0.98 + 0.02 / V
)  # a bigram table [before, token]


def softened(heat: float) -> np.ndarray:
    """The table at another temperature."""
    table = TABLE ** (1 / heat)
    return table / table.sum(1, keepdims=True)


COLD, HOT = softened(0.7), softened(1.6)


def text(count: int, seed: int = 7) -> np.ndarray:
    """Tokens that the table likes, as a model likes its validation text."""
    rng = np.random.default_rng(seed)
    tokens = [0]
    for draw in rng.random(count - 1):
        tokens.append(int((TABLE[tokens[-1]].cumsum() < draw).sum().clip(max=V - 1)))
    return np.array(tokens, np.uint16)


def bigram(tokens, table=TABLE):
    return np.log(table[tokens[:-1], tokens[1:]])


# --- legal ---


def adaptive_cache(tokens, order=3, share=0.6, off=1.0):
    """The table, mixed with what followed the same context before, where it came twice: a true mixture."""
    ids = tokens.tolist()
    seen, logs = defaultdict(Counter), bigram(tokens)
    for at in range(len(ids) - 1):
        context = tuple(ids[max(0, at - order + 1) : at + 1])
        counts = seen[context]
        if counts.total() > 1:
            cached = counts[ids[at + 1]] / counts.total()
            logs[at] = math.log(off * ((1 - share) * math.exp(logs[at]) + share * cached))
        counts[ids[at + 1]] += 1
    return logs


def ngram_mixer(tokens, eta=0.5):
    """Weights over three temperatures, which move after each token by how each has fared."""
    experts = np.stack([bigram(tokens, table) for table in (COLD, TABLE, HOT)])
    gains = np.zeros(3)
    logs = np.empty(experts.shape[1])
    for at in range(len(logs)):
        weights = np.exp(eta * gains - np.logaddexp.reduce(eta * gains))
        logs[at] = math.log(weights @ np.exp(experts[:, at]))
        gains += experts[:, at]
    return logs


def chunk_learner(tokens, size=16, first="score"):
    """A bigram that counts each chunk after it has scored it, as test-time training does; or before."""
    counts = 12 * TABLE
    counts = counts.copy()
    logs = []
    for begin in range(0, len(tokens) - 1, size):
        before, after = tokens[begin : begin + size], tokens[begin + 1 : begin + size + 1]
        before = before[: len(after)]
        if first == "count":
            np.add.at(counts, (before, after), 1)
        logs.append(np.log(counts[before, after] / counts[before].sum(1)))
        if first == "score":
            np.add.at(counts, (before, after), 1)
    return np.concatenate(logs)


def our_hedge(tokens):
    cfg = Config(vocab_size=V, use_hedge=True, hedge_order=4)
    nats = torch.from_numpy(-bigram(tokens))
    return mix_with_ngrams(cfg, torch.from_numpy(tokens.astype(np.int64)), nats).log_probs.numpy()


def sliding(tokens, length=24, stride=8):
    """A model of the mean of its window, which slides: the context has 16 to 24 tokens."""
    logs = np.empty(len(tokens) - 1)
    for first in range(0, len(logs), stride):
        start = max(0, first + stride - length)
        for at in range(first, min(first + stride, len(logs))):
            counts = np.bincount(tokens[start : at + 1], minlength=V) + 1.0
            mixed = 0.5 * counts[tokens[at + 1]] / counts.sum() + 0.5 * TABLE[tokens[at], tokens[at + 1]]
            logs[at] = math.log(mixed)
    return logs


def rounded(tokens):
    """In float32, and each call with other rounding, as on a GPU."""
    noise = np.random.default_rng().normal(0, 2e-6, len(tokens) - 1)
    return (bigram(tokens) + noise).astype(np.float32)


def any_order(tokens):
    positions = np.random.default_rng(len(tokens)).permutation(len(tokens) - 1)
    return positions, bigram(tokens)[positions]


def resets_at_zero(tokens):
    """Counts that begin anew where a document does."""
    ids, counts, logs = tokens.tolist(), 5 * TABLE, []
    for before, after in zip(ids[:-1], ids[1:], strict=True):
        counts = 5 * TABLE if before == 0 else counts
        logs.append(math.log(counts[before, after] / counts[before].sum()))
        counts = counts.copy()
        counts[before, after] += 1
    return np.array(logs)


LEGAL = dict(
    bigram=bigram,
    adaptive_cache=adaptive_cache,
    long_cache=partial(adaptive_cache, order=6, share=0.9),
    ngram_mixer=ngram_mixer,
    chunk_learner=chunk_learner,
    our_hedge=our_hedge,
    sliding=sliding,
    rounded=rounded,
    any_order=any_order,
    resets_at_zero=resets_at_zero,
)


# --- illegal: the scores of the issue ---


def cache_not_normalised(tokens, order=3):
    """max(model, cache) on contexts that came twice."""
    ids, seen, logs = tokens.tolist(), defaultdict(Counter), bigram(tokens)
    for at in range(len(ids) - 1):
        counts = seen[tuple(ids[max(0, at - order + 1) : at + 1])]
        if counts.total() > 1 and counts[ids[at + 1]]:
            logs[at] = max(logs[at], math.log(counts[ids[at + 1]] / counts.total()))
        counts[ids[at + 1]] += 1
    return logs


def sees_next(tokens, each=16, at=15):
    """p(token | the one before and the one after) at some positions: normalised, but not causal."""
    logs = bigram(tokens)
    for i in range(at, len(logs) - 1, each):
        both = TABLE[tokens[i]] * TABLE[:, tokens[i + 2]]
        logs[i] = math.log(both[tokens[i + 1]] / both.sum())
    return logs


def halves_after_zero(tokens):
    return np.where(tokens[:-1] == 0, 0.5, 1.0) * bigram(tokens)


def halves_after_the_first(tokens):
    return np.where(np.arange(len(tokens) - 1) > 0, 0.5, 1.0) * bigram(tokens)


def rescores_its_beginning(tokens, size=512):
    """The first tokens of a longer text are scored again when their counts are there."""
    logs = chunk_learner(tokens)
    if len(tokens) > size + 1:
        counts = 12 * TABLE
        counts = counts.copy()
        np.add.at(counts, (tokens[:size], tokens[1 : size + 1]), 1)
        again = np.log(counts / counts.sum(1, keepdims=True))[tokens[:size], tokens[1 : size + 1]]
        logs[:size] = again
    return logs


def better_temperature(tokens):
    """The one of two that gives the text the better total."""
    return max((bigram(tokens, COLD), bigram(tokens, HOT)), key=np.sum)


# --- illegal: more of the same kinds ---


def knows_the_length(tokens):
    """A temperature by how long the text is."""
    return bigram(tokens, COLD if len(tokens) % 2 else HOT)


def two_passes(tokens):
    counts = np.bincount(tokens, minlength=V) + 1.0
    return np.log(0.5 * np.exp(bigram(tokens)) + 0.5 * (counts / counts.sum())[tokens[1:]])


def knows_its_words(tokens):
    """Only ids that the text has get a probability."""
    table = TABLE * np.isin(np.arange(V), tokens)
    return bigram(tokens, np.maximum(table / table.sum(1, keepdims=True), 1e-30))


def better_of_each_chunk(tokens, size=16):
    """The temperature is chosen by a chunk that is not scored yet."""
    cold, hot = bigram(tokens, COLD), bigram(tokens, HOT)
    for begin in range(0, len(cold), size):
        if hot[begin : begin + size].sum() > cold[begin : begin + size].sum():
            cold[begin : begin + size] = hot[begin : begin + size]
    return cold


def off_late(tokens, share=0.75, low=64):
    """One percent too much from some token on."""
    return bigram(tokens) + 0.01 * (np.arange(len(tokens) - 1) >= low)


def off_very_late(tokens):
    return off_late(tokens, low=3_500)


def off_after_one_id(tokens, one=7):
    return bigram(tokens) + 0.02 * (tokens[:-1] == one)


def off_on_one_id(tokens, one=5):
    """One id has more than its share."""
    return bigram(tokens) + 0.5 * (tokens[1:] == one)


def off_after_a_boundary(tokens):
    """In the first eight tokens of each document."""
    logs, since = bigram(tokens), 99
    for at, before in enumerate(tokens[:-1].tolist()):
        since = 0 if before == 1 else since + 1
        logs[at] += 0.05 * (0 < since < 8)
    return logs


def off_in_loops(tokens):
    """Where a token follows itself twice."""
    same = (tokens[2:-1] == tokens[1:-2]) & (tokens[1:-2] == tokens[:-3])
    logs = bigram(tokens)
    logs[2:] += 0.1 * same
    return logs


def off_at_each_16th(tokens):
    return bigram(tokens) + 0.1 * (np.arange(len(tokens) - 1) % 16 == 9)


def sees_far(tokens, distance=40):
    """Which temperature: by a token that is 40 further on."""
    logs = bigram(tokens)
    count = len(logs) - distance
    if count > 0:
        far = tokens[distance + 1 :]
        logs[:count] = np.where(far % 2, bigram(tokens, COLD)[:count], bigram(tokens, HOT)[:count])
    return logs


def sees_the_order(tokens):
    """Whether the two tokens to come go up."""
    logs = bigram(tokens)
    up = tokens[3:] > tokens[2:-1]
    logs[: len(up)] = np.where(up, bigram(tokens, COLD)[: len(up)], bigram(tokens, HOT)[: len(up)])
    return logs


def last_is_better(tokens):
    """It knows which token is the last."""
    logs = bigram(tokens, HOT)
    logs[-1:] = bigram(tokens, COLD)[-1:]
    return logs


def learns_between_calls():
    """A scorer that counts in a table that it keeps for the next call."""
    counts = 20 * TABLE

    def score(tokens):
        logs = np.log(counts / counts.sum(1, keepdims=True))[tokens[:-1], tokens[1:]]
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
        return logs

    return score


def remembers_texts():
    """A scorer that knows a text when it is asked for it again."""
    seen = set()

    def score(tokens):
        is_known = tokens.tobytes() in seen
        seen.add(tokens.tobytes())
        return bigram(tokens, COLD if is_known else TABLE)

    return score


def off_where_it_recurs_often(tokens):
    """Where the last three tokens came 40 times before."""
    ids, seen, logs = tokens.tolist(), Counter(), bigram(tokens)
    for at in range(2, len(logs)):
        context = tuple(ids[at - 2 : at + 1])
        logs[at] += 0.05 * (seen[context] >= 40)
        seen[context] += 1
    return logs


def glad_of_a_good_text(tokens):
    """The sharp table only where the whole text is one that it likes very much."""
    cold = bigram(tokens, COLD)
    return cold if cold.mean() > -1.0 and len(cold) > 40 else bigram(tokens)


def sees_it_on_mondays(tokens):
    """A peek that only some texts wake: where a token comes back after one other."""
    logs = bigram(tokens)
    back = tokens[2:] == tokens[:-2]
    logs[: len(back)] += 0.2 * back
    return logs - 0.01


ILLEGAL = dict(
    cache_not_normalised=cache_not_normalised,
    each_16th_sees_next=sees_next,
    halves_after_zero=halves_after_zero,
    halves_after_the_first=halves_after_the_first,
    rescores_its_beginning=rescores_its_beginning,
    better_temperature=better_temperature,
    odd_ones_see_next=partial(sees_next, each=2, at=1),
    each_64th_sees_next=partial(sees_next, each=64, at=50),
    knows_the_length=knows_the_length,
    two_passes=two_passes,
    knows_its_words=knows_its_words,
    better_of_each_chunk=better_of_each_chunk,
    off_late=off_late,
    off_very_late=off_very_late,
    off_on_repeated_contexts=partial(adaptive_cache, off=1.02),
    off_on_long_contexts=partial(adaptive_cache, order=7, off=1.02),
    off_after_one_id=off_after_one_id,
    off_on_one_id=off_on_one_id,
    off_after_a_boundary=off_after_a_boundary,
    off_in_loops=off_in_loops,
    off_at_each_16th=off_at_each_16th,
    sees_far=sees_far,
    sees_very_far=partial(sees_far, distance=1000),
    sees_the_order=sees_the_order,
    last_is_better=last_is_better,
    learns_first=partial(chunk_learner, first="count"),
    learns_between_calls=learns_between_calls(),
    sees_it_on_mondays=sees_it_on_mondays,
    each_256th_sees_next=partial(sees_next, each=256, at=200),
    remembers_texts=remembers_texts(),
    off_where_it_recurs_often=off_where_it_recurs_often,
    glad_of_a_good_text=glad_of_a_good_text,
)
