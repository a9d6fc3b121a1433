"""Is a score legal? The four conditions of parameter-golf issue #1017, tried from outside on any scorer.

SCORE_CHECK=1 python train_gpt.py           every score of a run, before it is made; exit 7 if one fails
EVAL_ONLY=final_model.int8.ptz SCORE_CHECK=1 python train_gpt.py   those of a packed model

from records.legality import check_score    for a scorer of your own: a function from tokens to log-probs
print(check_score(my_log_probs, tokens, vocab=1024))
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import (  # noqa: E402
    BOS_ID,
    ILLEGAL_SCORE,
    MIXTURES,
    Run,
    RunError,
    RunLog,
    Score,
    Validation,
    ngram_hints,
    score_all,
    score_hedge,
    scorers,
    tilt,
)

SECONDS = 30.0
SHORT = 97  # tokens of most texts: on these every position is tried if the time allows
LONG = 4_000  # tokens of the long text, if the given one is shorter
MOST_CUTS = 400  # of one text
MOST_SUMS = 200
TOLERANCE = 1e-4  # nats that a score may move by rounding, and by which a sum may miss 1
STOP = object()  # what an empty queue gives
REPEATED = 3  # tokens of a context that is looked for again
ROWS_AT_ONCE = 128  # values that one pass of the model takes
OWN_SECONDS = 60.0  # that SCORE_CHECK takes for all scores of a run together
OWN_TOLERANCE = 1e-5
OWN_LONG = 400  # tokens, of which a run's own scores read at most 32 at a time here


# -- What is said of a scorer ----------------------------------------------------------------------------


class Breaches(dict[str, str]):
    """{condition: how it was broken}, empty if nothing was found. As text it also says how much was tried."""

    cuts = 0  # texts that were changed from some token on
    sums = 0  # positions at which the probabilities of all values were added up
    vocab = 0
    longest = 0  # tokens of the longest text

    def __str__(self) -> str:
        tried = (
            f"{self.cuts} changes of later tokens and all {self.vocab} values of {self.sums} tokens tried, "
            f"on texts of up to {self.longest} tokens"
        )
        if self:
            found = "; ".join(f"{condition}: {breach}" for condition, breach in sorted(self.items()))
            return f"breaks {found} ({tried})"
        return f"breaks none of the four conditions where it was tried: {tried}; this is evidence, no proof"


# -- The texts that are tried ----------------------------------------------------------------------------


def texts_to_try(
    tokens: np.ndarray, vocab: int, longest: int, boundary: int, rng: np.random.Generator
) -> dict:
    """{name: ids}: the beginning of the given text, a long one, and four that are made to wake what sleeps
    in a scorer: caches, counts, special ids, documents. The names are for messages."""
    return {
        "": tokens[:SHORT],
        "in a text of repeated pieces, ": repeating_text(tokens, vocab, rng),
        "in a text of loops, ": looping_text(tokens, rng),
        "in a text of many documents, ": many_documents(tokens, min(boundary, vocab - 1), rng),
        "in a random text, ": rng.integers(0, vocab, SHORT).astype(tokens.dtype),
        "in a long text, ": long_text(tokens, vocab, longest, rng),
    }


def special_ids(vocab: int) -> list[int]:
    """Ids that often mean something: a boundary, an unknown token, padding."""
    return sorted({0, 1, 2, 3, vocab - 2, vocab - 1} & set(range(vocab)))


def piece(tokens: np.ndarray | list, low: int, high: int, rng: np.random.Generator) -> list[int]:
    """A random piece of low .. high-1 tokens, or fewer at the end."""
    begin = int(rng.integers(0, len(tokens)))
    return [int(token) for token in tokens[begin : begin + int(rng.integers(low, high))]]


def repeating_text(tokens: np.ndarray, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Pieces of the text, special ids, and mostly copies of earlier pieces of its own: contexts of many
    lengths recur in it once, twice and often, and go on in different ways."""
    text = [int(token) for token in tokens[:8]]
    while len(text) < 2 * SHORT:
        kind = rng.random()
        if kind < 0.65:
            text += piece(text, 3, 17, rng)
        elif kind < 0.9:
            text += piece(tokens, 1, 7, rng)
        else:
            text.append(int(rng.choice(special_ids(vocab))))
    return np.array(text, tokens.dtype)


def looping_text(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pieces of 1, 2, 3 and 5 tokens, each many times in a row."""
    text = []
    for size, times in ((1, 60), (2, 20), (3, 12), (5, 12)):
        begin = int(rng.integers(0, max(1, len(tokens) - size)))
        text += times * [int(token) for token in tokens[begin : begin + size]]
    return np.array(text, tokens.dtype)


def many_documents(tokens: np.ndarray, boundary: int, rng: np.random.Generator) -> np.ndarray:
    """Pieces of the text, of 1 to 40 tokens and not in the order of their lengths, each after a boundary."""
    text = []
    while len(text) < 3 * SHORT:
        text += [boundary, *piece(tokens, 1, int(rng.choice([4, 12, 41])), rng)]
    return np.array(text, tokens.dtype)


def long_text(tokens: np.ndarray, vocab: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """The given text, with pieces of itself and a few random tokens after it if it is shorter than that."""
    text = [int(token) for token in tokens]
    while len(text) < longest:
        text += piece(tokens, 5, 60, rng)
        text.append(int(rng.integers(0, vocab)))
    return np.array(text, tokens.dtype)


# -- Which positions are tried, the most telling ones first ----------------------------------------------


def take_turns(lists: list[list[int]]) -> list[int]:
    """The first of each list, then the second of each, and so on; each number once."""
    merged = {}
    for rank in range(max(map(len, lists))):
        for one in lists:
            if rank < len(one):
                merged[one[rank]] = None
    return list(merged)


def edges(count: int) -> list[int]:
    """Numbers of 1 .. count where a scorer may change its ways: the ends, and beside powers of two."""
    found = [count, 1, 2, count - 1, count // 2 + 1]
    power = 4
    while power <= count:
        found += [power + 1, power, power + 2]
        power *= 2
    return [number for number in dict.fromkeys(found) if 1 <= number <= count]


def shuffled(numbers, rng: np.random.Generator) -> list[int]:
    return [int(number) for number in rng.permutation(list(numbers))]


def best_scored(base: np.ndarray) -> np.ndarray:
    """The tenth of the positions that the scorer does best, where a breach pays."""
    return np.argsort(-np.nan_to_num(base, nan=-math.inf))[: max(4, len(base) // 10)] + 1


def cuts_to_try(text: np.ndarray, base: np.ndarray, rng: np.random.Generator) -> list[int]:
    """First changed tokens: edges, neighbours in a row (against a peek at each n-th token), right after those
    that the scorer does best, random ones."""
    last = len(text) - 1
    begin = int(rng.integers(2, max(3, last - 64)))
    in_a_row = list(range(begin, min(begin + 64, last + 1)))
    after_best = shuffled(best_scored(base) + 1, rng)
    order = take_turns([edges(last), in_a_row, after_best, shuffled(range(2, last + 1), rng)])
    cuts = [cut for cut in order if 1 < cut <= last]
    # Every cut of a short text has its turn with several changes.
    return ((MOST_CUTS // max(1, len(cuts)) + 1) * cuts)[:MOST_CUTS]


def repeated_contexts(text: np.ndarray) -> list[int]:
    """Positions after contexts that have come twice before."""
    seen = {}
    found = []
    for position in range(REPEATED, len(text)):
        context = text[position - REPEATED : position].tobytes()
        seen[context] = seen.get(context, 0) + 1
        if seen[context] > 2:
            found.append(position)
    return found


def new_neighbours(text: np.ndarray) -> list[int]:
    """Positions after the first of each id, the lowest ids first, which are often special ones."""
    ids, first = np.unique(text[:-1], return_index=True)
    return [int(position) + 1 for position in first[np.argsort(ids)]]


def near_special_ids(text: np.ndarray, vocab: int) -> list[int]:
    """Positions up to eight tokens after a special id."""
    is_special = np.isin(text, special_ids(vocab))
    return [at for at in range(1, len(text)) if is_special[max(0, at - 8) : at].any()]


def sums_to_try(text: np.ndarray, base: np.ndarray, vocab: int, rng: np.random.Generator) -> list[int]:
    """Positions whose values are all tried: where contexts recur, where the scorer does best, after each id,
    soon after special ones, edges, random ones. The first is rather early, where a sum costs less."""
    last = len(text) - 1
    recurring = repeated_contexts(text)
    early = recurring[len(recurring) // 4 :][:1]
    groups = [
        early + shuffled(recurring, rng),
        shuffled(best_scored(base), rng),
        new_neighbours(text),
        shuffled(near_special_ids(text, vocab), rng),
        edges(last),
        shuffled(range(1, last + 1), rng),
    ]
    return take_turns(groups)[:MOST_SUMS]


# -- Trying ----------------------------------------------------------------------------------------------


class Trial:
    """One scorer and what was found of it."""

    def __init__(
        self,
        score: Callable,
        vocab: int,
        seconds: float,
        tolerance: float,
        values: Callable | None,
        watch: Callable[[float], None] | None = None,
    ):
        self.score = score
        self.watch = watch
        self.values = values
        self.vocab = vocab
        self.tolerance = tolerance
        self.seconds = seconds
        self.began = time.perf_counter()
        self.rng = np.random.default_rng(0)
        self.found = Breaches()
        self.found.vocab = vocab

    @property
    def seconds_spent(self) -> float:
        return time.perf_counter() - self.began

    def note(self, condition: str, breach: str) -> None:
        """Keep the first breach of each condition."""
        self.found.setdefault(condition, breach)

    def logs(self, text: np.ndarray) -> np.ndarray:
        """The scorer's log-probabilities of text[1:], float64; NaN where there is none."""
        count = len(text) - 1
        scored = self.score(text.copy())
        positions, values = scored if isinstance(scored, tuple) else (np.arange(len(scored)), scored)
        positions = np.asarray(positions)
        if len(positions) != len(values) or not np.array_equal(np.sort(positions), np.arange(count)):
            self.note("C4", f"{count} tokens have {len(positions)} scores, not one each")
        found = dict(zip(positions.tolist(), np.asarray(values, np.float64).tolist(), strict=False))
        logs = np.array([found.get(position, math.nan) for position in range(count)])
        if np.isnan(logs).any():
            self.note("C4", f"token {np.flatnonzero(np.isnan(logs))[0] + 1} has no number for a score")
        above = np.flatnonzero(logs > self.tolerance)
        if len(above):
            self.note("C2", f"token {above[0] + 1} has a log-probability of {logs[above[0]]:.6f}, above 0")
        self.found.longest = max(self.found.longest, len(text))
        return logs

    def moved(self, logs: np.ndarray, base: np.ndarray, count: int) -> np.ndarray:
        """Which of the first `count` scores differ by more than rounding."""
        return np.flatnonzero(~np.isclose(logs[:count], base[:count], 0, self.tolerance, equal_nan=True))

    def try_again(self, text: "TriedText") -> None:
        """C4: a scorer that learns from being asked has read the text before."""
        moved = self.moved(self.logs(text.tokens), text.base, len(text.base))
        if len(moved):
            self.note("C4", f"{text.name}token {moved[0] + 1} has another score when it is asked for again")

    def try_cut(self, text: "TriedText", cut: int) -> None:
        """C1: scores of the tokens before `cut` stay when those from `cut` on are others, more, or none.
        C4: the last token alone tells whether the text was read to its end before its beginning was scored.
        """
        last = len(text.tokens) - 1
        suffix = text.next_suffix(cut)
        moved = self.moved(self.logs(np.concatenate((text.tokens[:cut], suffix))), text.base, cut - 1)
        self.found.cuts += 1
        if not len(moved):
            return
        self.note("C1", f"{text.name}the score of token {moved[0] + 1} changes with the tokens from {cut} on")
        if cut == last and len(suffix) == 1 and moved[0] < last // 2:
            self.note("C4", f"{text.name}token {moved[0] + 1} is scored after a pass to the last one, {last}")

    def try_sum(self, text: "TriedText", position: int) -> None:
        """C2: the probabilities of all values of one token add up to 1, whatever follows it."""
        rest = len(text.tokens) - position - 1
        tokens = text.tokens[: position + 1 + min(rest, (0, 1, 40, 100)[position % 4])]
        if self.values:
            logs = self.values(tokens, position)
            self.compare_value(text, tokens, position, logs)
        else:
            logs = self.each_value(tokens, position)
        if logs is None:
            return
        mass = float(np.exp(np.minimum(logs, 700.0)).sum())
        self.found.sums += 1
        if not abs(mass - 1) <= self.tolerance:
            breach = f"over the {self.vocab} values of token {position} its probabilities sum to {mass:.6f}"
            self.note("C2", text.name + breach)

    def each_value(self, tokens: np.ndarray, position: int) -> np.ndarray | None:
        """The log-probabilities [vocab] of all values of one token; None if the time is up before."""
        tokens = tokens.copy()
        found = np.empty(self.vocab)
        for value in range(self.vocab):
            if self.seconds_spent > self.seconds and self.found.sums:
                return None
            tokens[position] = value
            found[value] = self.logs(tokens)[position - 1]
        return found

    def compare_value(self, text: "TriedText", tokens: np.ndarray, position: int, logs: np.ndarray) -> None:
        """C3: what `values` says of one value, by the position, is what the scorer says of it. Else what
        is done before the token, which the values share, knows the token."""
        tokens = tokens.copy()
        tokens[position] = position * 7919 % self.vocab
        alone = self.logs(tokens)[position - 1]
        if not abs(alone - logs[tokens[position]]) <= self.tolerance:
            breach = (
                f"token {position} has a log-probability of {alone:.6f}, not {logs[tokens[position]]:.6f}"
            )
            self.note("C3", f"{text.name}{breach} as among all values")


class TriedText:
    """A text, its scores, and the ways in which what follows a cut is changed."""

    def __init__(self, trial: Trial, name: str, tokens: np.ndarray, longest: int):
        self.trial = trial
        self.longest = longest
        self.name = name
        self.tokens = tokens
        self.rng = np.random.default_rng(len(tokens))
        self.changes = []

    @cached_property
    def base(self) -> np.ndarray:
        """Its scores as it stands."""
        return self.trial.logs(self.tokens)

    def next_suffix(self, cut: int) -> np.ndarray:
        """Other tokens for those from `cut` on. The last token alone is changed first; then the kinds take
        turns, each time in another order."""
        last = len(self.tokens) - 1
        if cut == last and not self.changes:
            return self.other_tokens(cut)
        if not self.changes:
            kinds = [self.other_tokens, self.one_other, self.permuted, self.random_few, self.random_many]
            kinds += [
                self.nothing,
                self.nothing,
                self.recent_again,
                self.begins_again,
                self.liked,
                self.disliked,
            ]
            self.changes = [kinds[i] for i in self.rng.permutation(len(kinds))]
        return self.changes.pop()(cut).astype(self.tokens.dtype)

    def nothing(self, cut: int) -> np.ndarray:
        return self.tokens[:0]

    def other_tokens(self, cut: int) -> np.ndarray:
        """As many, none of them the same."""
        rest = self.tokens[cut:].astype(np.int64)
        return (rest + self.rng.integers(1, self.trial.vocab, len(rest))) % self.trial.vocab

    def one_other(self, cut: int) -> np.ndarray:
        """Only the first of them is another."""
        rest = self.tokens[cut:].astype(np.int64)
        rest[0] = (rest[0] + self.rng.integers(1, self.trial.vocab)) % self.trial.vocab
        return rest

    def permuted(self, cut: int) -> np.ndarray:
        return self.rng.permutation(self.tokens[cut:])

    def random_few(self, cut: int) -> np.ndarray:
        return self.rng.integers(0, self.trial.vocab, self.rng.integers(1, 40))

    def random_many(self, cut: int) -> np.ndarray:
        """So many that a short text becomes a long one."""
        return self.rng.integers(0, self.trial.vocab, min(600, self.longest))

    def recent_again(self, cut: int) -> np.ndarray:
        """The tokens before the cut, in a loop."""
        size = int(self.rng.integers(1, 9))
        return np.resize(self.tokens[max(0, cut - size) : cut], 40)

    def begins_again(self, cut: int) -> np.ndarray:
        return self.tokens[:cut]

    def liked(self, cut: int) -> np.ndarray:
        """A loop of what it scores best: a choice by the total of all scores falls out another way."""
        return self.loop(np.argmax, cut)

    def disliked(self, cut: int) -> np.ndarray:
        return self.loop(np.argmin, cut)

    def loop(self, choose: Callable, cut: int) -> np.ndarray:
        """A few tokens with the highest or lowest scores, over and over, mostly longer than the rest."""
        size = min(int(self.rng.integers(1, 7)), len(self.base))
        means = np.convolve(np.nan_to_num(self.base, neginf=-100.0), np.full(size, 1 / size), "valid")
        at = int(choose(means))
        return np.resize(self.tokens[at + 1 : at + 1 + size], min(2 * cut + 100, self.longest // 4))


def check_score(
    score: Callable,
    tokens: np.ndarray,
    vocab: int,
    seconds: float = SECONDS,
    longest: int = LONG,
    tolerance: float = TOLERANCE,
    values: Callable | None = None,
    watch: Callable[[float], None] | None = None,
    boundary: int = BOS_ID,
) -> Breaches:
    """Try the four conditions of a score (parameter-golf issue #1017) from outside: {condition: breach}.

    score(tokens [N+1]) -> log-probs [N] of tokens[1:], or (positions 0..N-1, log-probs) as they were scored.
    It must take any ids below vocab and any N from 1 on. values(tokens, position) -> log-probs [vocab] of all
    values of that token, for a scorer that can give them faster than by as many calls; it is compared.
    watch(seconds), if given, is told again and again how long it has taken so far.
    boundary: the id that opens a document.
    C1 causal: later tokens change no earlier score, and neither does where the text ends. C2 normalised: the
    probabilities of all values of a token add up to 1. C3 score before update: not both fail. C4 single pass:
    each token has one score, the same when asked again, and none knows the end.

    They are tried on the beginning of `tokens`, on a text of at least `longest` tokens, and on made ones that
    repeat themselves; most positions of the short ones, some of the long one, until `seconds` have passed.
    At least one sum is made, which calls the scorer `vocab` times. The result as text says how much it was.

    No breach is evidence, no proof. What cannot be seen from here:
    - less than `tolerance` nats a token: as much can be gained by rounding or on purpose;
    - a breach that is rare: k sums miss one at each n-th position with probability (1 - 1/n)^k, k cuts a peek
      at each n-th; the positions of the best scores are tried first, since it pays there;
    - one that only wakes at a context, an id, a length or a text that was not tried, such as more tokens than
      `longest`, or exactly the validation text;
    - what the scorer has learnt before, from the validation text too: that is what the limit of bytes is for;
    - a scorer that notices that it is tried, by the texts, the number of calls or the clock, and behaves.
    """
    trial = Trial(score, vocab, seconds, tolerance, values, watch)
    tokens = np.asarray(tokens)
    named = texts_to_try(tokens, vocab, longest, boundary, trial.rng)
    texts = [TriedText(trial, name, text, longest) for name, text in named.items()]
    # Half of the time for the cuts, and what they leave of it for the sums.
    take_tasks(trial, [cut_tasks(text) for text in texts], seconds / 2, is_enough=all)
    trial.try_again(texts[0])
    take_tasks(trial, [sum_tasks(text) for text in texts], seconds, is_enough=any)
    if "C1" in trial.found and "C2" in trial.found:
        trial.found.setdefault("C3", trial.found.pop("C2"))
    return trial.found


def cut_tasks(text: TriedText) -> Iterator[None]:
    """Try one cut each time."""
    for cut in cuts_to_try(text.tokens, text.base, text.rng):
        yield text.trial.try_cut(text, cut)


def sum_tasks(text: TriedText) -> Iterator[None]:
    """Try one sum each time."""
    for position in sums_to_try(text.tokens, text.base, text.trial.vocab, text.rng):
        yield text.trial.try_sum(text, position)


def take_tasks(
    trial: Trial, queues: list[Iterator[None]], seconds: float, is_enough: Callable[[list[int]], bool]
) -> None:
    """Take tasks from the queues, always from the one that has had the least time, until all are empty or
    `seconds` have passed since the trial began; after a breach only the first of each.

    is_enough: whether the counts of tasks that were taken from each queue allow to stop for want of time.
    """
    spent = [0.0] * len(queues)
    taken = [0] * len(queues)
    is_empty = [False] * len(queues)
    while not all(is_empty):
        if trial.seconds_spent > seconds and is_enough(taken):
            return
        if trial.found and all(taken):
            return
        chosen = min(range(len(queues)), key=lambda number: (is_empty[number], spent[number]))
        began = time.perf_counter()
        is_empty[chosen] = next(queues[chosen], STOP) is STOP
        spent[chosen] += time.perf_counter() - began
        taken[chosen] += 1
        if trial.watch:
            trial.watch(trial.seconds_spent)


# -- A run's own scores ----------------------------------------------------------------------------------


def check_own_scores(run: Run, seconds: float = OWN_SECONDS) -> None:
    """SCORE_CHECK: check_score of every score of a run, uncompiled, on all its ranks, in windows of at most
    32 tokens; RunError (7) if one is broken.

    All ranks call it together: rank 0 chooses the texts, and all score each of them. It takes about `seconds`
    for all scores together; on a slow machine more, since each has at least one change on each text and one
    sum.
    """
    if run.runtime.rank == 0:
        breach = check_with_helpers(run, seconds)
        run.runtime.main_decides(lambda: ("end", breach))
    else:
        breach = help_rank_0(run)
    if breach:
        raise RunError(breach, ILLEGAL_SCORE, lone_rank=False)


def check_with_helpers(run: Run, seconds: float) -> str:
    """Rank 0's part: what SCORE_CHECK says of the first score that breaks a condition, or ''."""
    names = [name for name, _ in scorers(run.cfg)]
    run.log.say(f"SCORE_CHECK: trying {', '.join(names)}: usually {seconds:.0f} s, more on a slow machine")
    boundaries = run.data.tokens[run.data.starts]
    for done, name in enumerate(names):
        found = check_score(
            partial(on_all_ranks, run, "logs", name),
            run.data.tokens[:OWN_LONG].astype(np.int64),
            run.cfg.vocab_size,
            seconds / len(names),
            OWN_LONG,
            OWN_TOLERANCE,
            partial(on_all_ranks, run, "values", name),
            partial(report_trial, run.log, name, done / len(names), seconds),
            int(boundaries[0]) if len(boundaries) else BOS_ID,
        )
        if found:
            return f"SCORE_CHECK: {name} {found}"
        run.log.line(f"score_check: {name} {found}")
    return ""


def on_all_ranks(run: Run, task: str, *given) -> np.ndarray:
    """On rank 0: what a task gives that all ranks do together; its name, not its function, can be sent."""
    task, given = run.runtime.main_decides(lambda: (task, given))
    return TASKS[task](run, *given)


def help_rank_0(run: Run) -> str:
    """Do with rank 0 the tasks that it names, until it ends; returns the breach that it found, or ''."""
    task, given = run.runtime.main_decides(None)
    while task != "end":
        TASKS[task](run, *given)
        task, given = run.runtime.main_decides(None)
    return given


def report_trial(log: RunLog, name: str, share_before: float, limit: float, seconds: float) -> None:
    """Say, if it is time, how much of `limit` is over, `seconds` after the trial of this score began."""
    spent = share_before * limit + seconds
    if spent < limit:
        log.report_wait(f"SCORE_CHECK of {name}", spent / limit, spent)


def small_run(run: Run, tokens: np.ndarray) -> Run:
    """The run as it scores, on as many ranks, but on these tokens, in small windows and chunks."""
    cfg = run.cfg
    length = min(32, cfg.train_seq_len)
    small_cfg = replace(
        cfg,
        train_seq_len=length,
        train_batch_tokens=length,
        eval_seq_len=length,
        val_batch_size=8 * 4 * length,
        ttt_chunk_tokens=length,
        ttt_chunk_size=max(1, min(cfg.ttt_chunk_size, length // 4)),
        ttt_batch_size=min(cfg.ttt_batch_size, 2),
        ttt_eval_seq_len=0,
        phased_ttt_prefix_docs=min(cfg.phased_ttt_prefix_docs, 5),
        phased_ttt_num_phases=min(cfg.phased_ttt_num_phases, 2),
        global_ttt_chunk_tokens=length,
        eval_batch_seqs=4,
        eval_stride=min(cfg.eval_stride, length // 2),
        max_eval_seconds=0.0,
    )
    # Documents open where an id stands that opens them in the run's text.
    boundaries = np.unique(run.data.tokens[run.data.starts])
    starts = 1 + np.flatnonzero(np.isin(tokens[1:-1], boundaries))
    data = Validation(tokens, np.ones(len(tokens) - 1, np.int16), 1, "", starts)
    runtime = copy(run.runtime)
    runtime.compiles = False
    return Run(small_cfg, runtime, RunLog(None, ""), run.model, data)


def neural_score_of(small: Run, name: str) -> str:
    """The score that this one mixes or tilts; itself if it is the model's own."""
    if name not in MIXTURES:
        return name
    return [made for made, _ in scorers(small.cfg) if made not in MIXTURES][-1]


def own_score(small: Run, name: str) -> Score:
    """One of the run's scores, made as the run makes it. Those that it does not need are taken as made."""
    nothing = torch.zeros(small.data.targets)
    for made, _ in scorers(small.cfg):
        if made not in (name, neural_score_of(small, name)):
            small.checkpoints.scores[made] = Score(0.0, 1, 1, 0.0, nothing, hint_nats=nothing)
    # All are asked for: with several ranks none may leave before the others.
    return dict(score_all(small))[name]


def own_logs(run: Run, name: str, tokens: np.ndarray) -> np.ndarray:
    """The log-probabilities of tokens[1:] by one of the run's scores."""
    small = small_run(run, tokens)
    # So that every rank has the nats of all targets.
    small.cfg = replace(small.cfg, score_dump="kept")
    return -own_score(small, name).target_nats.double().numpy()


def own_values(run: Run, name: str, tokens: np.ndarray, position: int) -> np.ndarray:
    """The log-probabilities [vocab] of all values of tokens[position] by one of the run's scores.

    They share what is done before the token: a mark stands there, and each pass of the model that meets it is
    made for all values at once.
    """
    marked = tokens.copy()
    marked[position] = run.cfg.vocab_size
    small = small_run(run, marked)
    small.cfg = replace(small.cfg, ngram_tilt_enabled=False, score_dump="kept")
    found = np.full(run.cfg.vocab_size, math.nan)
    small.nats = NatsOfAllValues(small.nats, found)
    small.document_nats = NatsOfAllValues(small.document_nats, found)
    neural = own_score(small, neural_score_of(small, name))
    # One rank has scored the mark.
    found_by_ranks = small.runtime.gather(found)
    nats = next((one for one in found_by_ranks if not np.isnan(one).all()), found_by_ranks[0])
    if name == "tilt":
        return -tilted_values(run, marked, position, nats)
    if name != "hedge":
        return -nats
    mixed = np.empty(len(nats))
    for value in range(len(nats)):
        marked[position] = value
        given = replace(neural, target_nats=neural.target_nats.clone())
        given.target_nats[position - 1] = nats[value]
        mixed[value] = score_hedge(small_run(run, marked), given, math.inf, print).target_nats[position - 1]
    return -mixed


def tilted_values(run: Run, tokens: np.ndarray, position: int, nats: np.ndarray) -> np.ndarray:
    """The nats [vocab] of all values of tokens[position] after the tilt; nats: by the model."""
    before = torch.from_numpy(np.append(tokens[:position], 0).astype(np.int64))
    hint = ngram_hints(run.cfg, before)[-1]
    values = torch.arange(len(nats))
    nats = torch.from_numpy(nats)
    return tilt(run.cfg, nats, nats[hint].expand_as(nats), hint, values).numpy()


TASKS = dict(logs=own_logs, values=own_values)


class NatsOfAllValues:
    """Stands in for a run's `nats`: where the mark is a target, `found` [vocab] gets the nats of each value
    that could stand in its stead, there and wherever else the pass reads it."""

    def __init__(self, nats: Callable, found: np.ndarray):
        self.nats = nats
        self.mark = len(found)
        self.found = found

    def __call__(self, ids, targets, positions=None, phase=-1, adapters=None):
        at = (targets == self.mark).nonzero().tolist()
        # The first pass that has the mark as a target is the one that scores it, unless another rank does.
        # Others learn from it, and as that is after its score, from any value; those that learn whole weights
        # have gradients without adapters.
        scores = adapters is not None or not torch.is_grad_enabled()
        if at and scores and np.isnan(self.found).all():
            ((row, column),) = at
            rows = slice(row, row + 1)
            of_row = None if positions is None else positions[rows]
            for values in torch.arange(self.mark, device=ids.device).split(ROWS_AT_ONCE):
                size = (len(values), -1)
                many_ids = self.filled(ids[rows].expand(size), values)
                many_targets = self.filled(targets[rows].expand(size), values)
                many_positions = None if of_row is None else of_row.expand(size)
                more = {} if adapters is None else dict(adapters=adapters_of_row(adapters, rows, len(values)))
                with torch.no_grad():
                    nats = self.nats(many_ids, many_targets, many_positions, phase=phase, **more)
                self.found[values.cpu().numpy()] = nats[:, column].double().cpu().numpy()
        zero = torch.zeros(1, dtype=torch.int64, device=ids.device)
        more = {} if adapters is None else dict(adapters=adapters)
        return self.nats(self.filled(ids, zero), self.filled(targets, zero), positions, phase=phase, **more)

    def filled(self, ids, values):
        """The ids with values [rows] or [1] in the stead of the mark."""
        return torch.where(ids == self.mark, values[:, None], ids)


def adapters_of_row(adapters: list[dict], rows: slice, count: int) -> list[dict]:
    """One text's adapters for `count` texts."""
    many = []
    for layer in adapters:
        many.append(
            {place: tuple(f[rows].expand(count, -1, -1) for f in pair) for place, pair in layer.items()}
        )
    return many
