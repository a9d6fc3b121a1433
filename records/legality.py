"""Is a score legal? The four conditions of parameter-golf issue #1017, tried from outside on any scorer.

SCORE_CHECK=1 python train_gpt.py           every score of a run, before it is made; exit 7 if one fails
EVAL_ONLY=final_model.int8.ptz SCORE_CHECK=1 python train_gpt.py   those of a packed model

from records.legality import check_score   for a scorer of your own: a function from tokens to log-probs
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import ILLEGAL_SCORE, Run, RunError, RunLog, Validation, score_all  # noqa: E402


def check_score(score: Callable, tokens: np.ndarray, vocab: int, ends=(53,)) -> dict[str, str]:
    """The four conditions of a score (parameter-golf issue #1017), tried from outside: {condition: breach}.
    score(tokens [N+1]) -> log-probs [N] of tokens[1:], or (positions 0..N-1, log-probs) as they were scored.
    C1 causal: later tokens change nothing. C2 normalised: the probabilities of all values of token `end` add
    up to 1. C3 score before update: not both fail. C4 single pass: no position twice, none knows the end."""
    broken, rng, count = {}, np.random.default_rng(0), len(tokens) - 1

    def logs(place: int | slice, values) -> np.ndarray:
        given = tokens.copy()
        given[place] = values
        found = score(given)
        places, values = found if isinstance(found, tuple) else (np.arange(len(found)), found)
        if not np.array_equal(np.sort(places), np.arange(count)):
            broken["C4"] = f"{count} tokens have {len(places)} scores, not one each"
        found = dict(zip(places, values, strict=False))
        return np.array([found.get(i, math.nan) for i in range(count)])

    whole = logs(slice(None), tokens)
    for cut in (count // 3, count // 2, count - 1, count):  # the tokens from cut on are changed
        other = logs(slice(cut, None), (tokens[cut:] + rng.integers(1, vocab, count + 1 - cut)) % vocab)
        moved = np.flatnonzero(~np.isclose(other, whole, 0, 0, equal_nan=True)[: cut - 1])
        if len(moved):
            broken["C1"] = f"the score of token {moved[0] + 1} changes with the tokens from {cut} on"
        if cut == count and len(moved) and moved[0] < count // 2:
            broken["C4"] = f"token {moved[0] + 1} is scored after a pass to the last one, {count}"
    for end in {min(end, count) for end in ends}:
        mass = sum(math.exp(logs(end, value)[end - 1]) for value in range(vocab))
        if not abs(mass - 1) <= 1e-5:
            what = f"over the {vocab} values of token {end} its probabilities sum to {mass:.6f}"
            broken["C3" if "C1" in broken else "C2"] = what
    return broken


def check_own_scores(run: Run) -> None:
    """SCORE_CHECK: check_score of every score, on 97 tokens, uncompiled, one rank; RunError (7) if broken."""
    length, data, log = min(32, run.cfg.train_seq_len), run.data, run.log
    sizes = dict(train_seq_len=length, train_batch_tokens=length, eval_seq_len=length, val_batch_size=8)
    sizes |= dict(ttt_chunk_tokens=length // 2, eval_batch_seqs=4, max_eval_seconds=0.0)
    cfg = replace(run.cfg, **sizes, eval_stride=min(run.cfg.eval_stride, length // 2))
    tokens, runtime = data.tokens[:97], replace(run.runtime, rank=0, world_size=1, compiles=False)
    part = Validation(tokens, data.target_bytes[:96], 1, "", data.starts[data.starts < 96])

    @cache
    def scores(text: bytes) -> dict[str, np.ndarray]:
        given = replace(part, tokens=np.frombuffer(text, tokens.dtype))
        small = Run(cfg, runtime, RunLog(None, ""), run.model, given)
        return {name: -score.target_nats.double().numpy() for name, score in score_all(small)}

    for name in scores(tokens.tobytes()):
        found = check_score(lambda given, name=name: scores(given.tobytes())[name], tokens, cfg.vocab_size)
        if broken := "; ".join(map(": ".join, found.items())):
            raise RunError(f"SCORE_CHECK: {name} breaks {broken}", ILLEGAL_SCORE)
        log.line(f"score_check: {name} is causal, normalised, scored before it learns, in one pass")
