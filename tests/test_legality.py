"""The four conditions of a legal score: a check that tells fair scorers from foul ones, runs that pass it,
test-time training that scores first, and an evaluation clock that yields parts, never a false whole."""

import json
import math
import re
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt
from records import legality, pr895_mixer
from records.legality import check_own_scores, check_score
from tests.conftest import (
    TINY,
    encode_documents,
    env_of,
    random_model,
    train_tokenizer,
    write_shard,
)
from tests.support.scorers import COLD, HOT, ILLEGAL, LEGAL, TABLE, V, bigram, our_hedge, text
from train_gpt import (
    Chunk,
    Config,
    Mixture,
    PaddedWindows,
    Run,
    RunError,
    RunLog,
    Runtime,
    Score,
    Validation,
    WeighedExpert,
    evaluate,
    execute,
    mix_with_ngrams,
    score_all,
    score_hedge,
    token_nats,
)

# --- check_score on scorers of all kinds ---


@pytest.mark.parametrize("count", [97, 4001])
@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_scorer_passes(name, count):
    """Also one that rounds, forgets, learns, or looks back no further than a window."""
    found = check_score(LEGAL[name], text(count), V, seconds=0.2)
    assert found == {}
    effort = rf"(\d+) changes of later tokens and all {V} values of (\d+) tokens tried, on texts of up to \d+"
    said = re.fullmatch(rf"breaks none of .*: {effort} tokens; this is evidence, no proof", str(found))
    assert (int(said[1]), int(said[2])) == (found.cuts, found.sums) and min(found.cuts, found.sums) > 0
    assert found.longest >= 4000


FAULTY_LATE = ("off_very_late", "sees_very_far", "each_256th_sees_next", "rescores_its_beginning")


def illegal_cases() -> list:
    """Each scorer on a short text; beside it the check makes long ones of its own. On a long text those whose
    fault shows late; for the others that is slow."""
    cases = []
    for name in ILLEGAL:
        cases.append(pytest.param(name, 97))
        cases.append(pytest.param(name, 4001, marks=[] if name in FAULTY_LATE else [pytest.mark.slow]))
    return cases


@pytest.mark.parametrize("name, count", illegal_cases())
def test_an_illegal_scorer_is_rejected(name, count):
    assert check_score(ILLEGAL[name], text(count), V, seconds=60) != {}


def test_the_scorers_are_what_their_names_say():
    """The caches and mixers work, and what is illegal pays."""
    tokens = np.tile(text(300), 3)
    plain = bigram(tokens).sum()
    assert all(scorer(tokens).sum() > plain + 5 for scorer in (LEGAL["long_cache"], our_hedge))
    for name in (
        "cache_not_normalised",
        "each_16th_sees_next",
        "halves_after_zero",
        "rescores_its_beginning",
    ):
        assert ILLEGAL[name](tokens).sum() > plain + 5


def test_with_little_time_every_text_is_still_cut_and_one_sum_made():
    def slow(tokens):
        time.sleep(0.02)
        return bigram(tokens)

    found = check_score(slow, text(97), V, seconds=0)
    assert found == {} and (found.cuts, found.sums) == (6, 1)


@pytest.mark.parametrize("at", [0, 57, 95])
def test_every_token_of_a_short_text_has_its_sum(at):
    def off_at_one(tokens):
        return bigram(tokens) + 0.1 * (np.arange(len(tokens) - 1) == at)

    found = check_score(off_at_one, text(97), V)
    assert set(found) == {"C2"}
    assert f"{V} values of token {at + 1} its probabilities sum to 1.105171" in found["C2"]


def test_a_scorer_may_give_all_values_at_once():
    def values(tokens, position):
        asked.append(position)
        return np.log(TABLE[tokens[position - 1]])

    def wrong(tokens, position):
        return values(tokens, position)[::-1]

    asked = []
    assert check_score(bigram, text(97), V, seconds=5, values=values) == {} and len(set(asked)) > 96
    assert "as among all values" in check_score(bigram, text(97), V, values=wrong)["C3"]


TOKENS = text(97)


def second_pass(tokens):
    counts = np.ones((V, V))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    return np.log(counts / counts.sum(1, keepdims=True))[tokens[:-1], tokens[1:]]


def twice(tokens):
    places = np.arange(len(tokens) - 1)
    return np.concatenate((places, places[-5:])), np.concatenate((bigram(tokens), bigram(tokens)[-5:] / 2))


def counts_itself(tokens):
    """A bigram that counts a token before it scores it: no later token, but its own."""
    counts, logs = np.ones((V, V)), []
    for before, after in zip(tokens[:-1], tokens[1:], strict=True):
        counts[before, after] += 1
        logs.append(math.log(counts[before, after] / counts[before].sum()))
    return np.array(logs)


def pr895(tokens):
    entropy = -(TABLE * np.log(TABLE)).sum(1)[tokens[:-1]]
    return pr895_mixer.pr895_mix(tokens, -bigram(tokens), entropy, V)[0]


def leaves_out_some(tokens):
    kept = np.flatnonzero(tokens[1:])
    return kept, bigram(tokens)[kept]


FOUL = {  # scorer, the conditions that it must break, and all it may
    "pr895": (pr895, {"C2"}, {"C2"}),
    "trains_first": (ILLEGAL["learns_first"], {"C1", "C3"}, {"C1", "C3"}),
    "counts_itself": (counts_itself, {"C2"}, {"C2"}),
    "peeks": (ILLEGAL["odd_ones_see_next"], {"C1"}, {"C1"}),
    "scores_twice": (twice, {"C4"}, {"C2", "C4"}),
    "second_pass": (second_pass, {"C1", "C4"}, {"C1", "C3", "C4"}),
    "leaves_out": (lambda tokens: bigram(tokens)[:-1], {"C4"}, {"C2", "C4"}),
    "leaves_out_some": (leaves_out_some, {"C4"}, {"C1", "C2", "C3", "C4"}),
    "scores_nothing": (lambda tokens: np.zeros(0), {"C4"}, {"C2", "C4"}),
    "unnormalised": (lambda tokens: bigram(tokens) + 0.01, {"C2"}, {"C2"}),
    "better_of_two": (lambda tokens: np.maximum(bigram(tokens, COLD), bigram(tokens, HOT)), {"C2"}, {"C2"}),
    "last_is_better": (ILLEGAL["last_is_better"], {"C1"}, {"C1"}),
    "over_one": (lambda tokens: np.full(len(tokens) - 1, 0.1), {"C2"}, {"C2"}),
}


@pytest.mark.parametrize("name", FOUL)
def test_a_foul_scorer_is_rejected_by_name(name, monkeypatch):
    monkeypatch.setattr(pr895_mixer, "BATCH", 16)
    monkeypatch.setattr(pr895_mixer, "WARM_UP", 20)
    scorer, must, may = FOUL[name]
    assert must <= set(check_score(scorer, TOKENS, V, longest=600)) <= may


def test_the_text_of_a_breach_names_token_and_number():
    peek = check_score(ILLEGAL["odd_ones_see_next"], TOKENS, V)["C1"]
    token, cut = re.fullmatch(
        r"(?:in .*, )?the score of token (\d+) changes with the tokens from (\d+) on", peek
    ).groups()
    assert int(cut) == int(token) + 1
    few, many = r"\d+ tokens have 3 scores, not one each", r"\d+ tokens have \d+ scores, not one each"
    assert re.fullmatch(few, check_score(lambda tokens: (np.arange(3), np.zeros(3)), TOKENS, V)["C4"])
    assert re.fullmatch(many, check_score(twice, TOKENS, V)["C4"])
    over = check_score(lambda tokens: np.full(len(tokens) - 1, math.log(1.5 / V)), TOKENS, V)
    assert re.fullmatch(rf"over the {V} values of token \d+ its probabilities sum to 1.500000", over["C2"])
    assert str(over).startswith("breaks C2: over the ") and "changes of later tokens" in str(over)
    early = check_score(second_pass, TOKENS, V)["C4"]
    assert re.fullmatch(r"(in .*, )?token \d+ is scored after a pass to the last one, \d+", early)


def test_the_vocabulary_is_the_one_given():
    breach = check_score(bigram, TOKENS % 5, 5)["C2"]
    assert re.search(r"over the 5 values of token \d+ its probabilities sum to 0\.\d+", breach)


@pytest.mark.parametrize("nats", [math.nan, -math.inf])
def test_a_score_that_is_no_number_does_not_pass(nats):
    assert check_score(lambda tokens: np.full(len(tokens) - 1, nats), TOKENS, V) != {}


@pytest.mark.parametrize("count", [2, 3, 10, 60, 98, 200])
def test_a_text_of_any_length_will_do(count):
    assert check_score(bigram, text(count), V, seconds=0.5) == {}
    assert "C1" in check_score(ILLEGAL["each_16th_sees_next"], text(count), V)


# --- whole runs ---


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A dataset of few letters, so that all values of a token are soon tried; and its vocabulary."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(3)
    words = ["".join(rng.choice(list("abcdefg"), rng.integers(2, 6))) for _ in range(30)]
    texts = [" ".join(rng.choice(words, rng.integers(6, 14))) for _ in range(120)]
    model = train_tokenizer(texts, vocab_size=20, byte_fallback=False)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    write_shard(folder / "toy_train_000000.bin", encode_documents(tokenizer, texts[:60]))
    write_shard(folder / "toy_val_000000.bin", encode_documents(tokenizer, texts[60:90]))
    return folder, tokenizer.vocab_size()


def play(capsys, tmp_path, env) -> SimpleNamespace:
    """A run of the script in this process: its code, error, lines and RESULT."""
    error = ""
    try:
        code = execute(Config.from_env(env), {**env, "OUT_DIR": str(tmp_path)})
    except RunError as stop:
        code, error = stop.code, str(stop)
    out = capsys.readouterr().out
    result = json.loads(re.search(r"^RESULT (.*)$", out, re.M)[1])
    return SimpleNamespace(code=code, error=error, lines=out.splitlines(), result=result)


@pytest.fixture(scope="module")
def artifact(small, tmp_path_factory):
    folder, vocab = small
    out = tmp_path_factory.mktemp("artifact")
    env = env_of(folder, vocab_size=vocab, iterations=12, matrix_lr=0.1, out_dir=str(out))
    assert execute(Config.from_env(env), env) == 0
    return out / "final_model.int8.ptz"


@pytest.fixture
def rerun(small, artifact, tmp_path, capsys, monkeypatch):
    """rerun(knob=value, ...): score the artifact in this process. Its SCORE_CHECK takes 12 s, or as given."""

    def run(check_seconds=12, **knobs):
        tool = dict(check_own_scores=partial(check_own_scores, seconds=check_seconds))
        monkeypatch.setattr(train_gpt, "load_tool", lambda path: tool)
        place = dict(device="cpu", eval_only=str(artifact), out_dir=str(tmp_path))
        return play(capsys, tmp_path, env_of(small[0], **dict.fromkeys(TINY) | place | knobs))

    return run


def finals(outcome) -> list[str]:
    """The lines of scores, without their times."""
    return [re.sub(r"eval_time:\S+", "", line) for line in outcome.lines if line.startswith("final_")]


TTT = dict(ttt_steps=1, ttt_lr=0.05, ttt_chunk_tokens=128, val_batch_size=1024)  # four windows a pass
ADAM = dict(TTT, ttt_optimizer="adam", ttt_lr=0.01)
LEARNERS = {
    "sgd": dict(TTT, ttt_steps=2),
    "adam": dict(ADAM, eval_stride=16),
    "lora": dict(TTT, ttt_lora_rank=2, ttt_lr=0.5, eval_stride=16, use_hedge=True),
    "reset": dict(ADAM, ttt_reset=True, ttt_chunk_tokens=16, eval_stride=8, eval_batch_seqs=2),
    "documents": dict(
        ttt_steps=1,
        ttt_lr=0.01,
        ttt_lora_rank=2,
        ttt_batch_size=8,
        ttt_chunk_size=16,
        phased_ttt_prefix_docs=16,
        global_ttt_lr=0.1,
        ngram_tilt_enabled=True,
        token_order=4,
        use_hedge=True,
        hedge_document_order=2,
    ),
    "isolated": dict(eval_doc_isolated=True, eval_stride=8, use_hedge=True),
    "none": dict(eval_stride=16, use_hedge=True, hedge_order=2, hedge_window=20),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_our_scores_pass_and_the_check_changes_none(rerun, name):
    knobs = LEARNERS[name]
    plain, checked = rerun(**knobs), rerun(check_seconds=0.5, **knobs, score_check=True)
    assert (plain.code, checked.code) == (0, 0), checked.error
    switches = dict(sliding="eval_stride", isolated="eval_doc_isolated", ttt="ttt_steps")
    switches |= dict(tilt="ngram_tilt_enabled", hedge="use_hedge")
    on = ["roundtrip"] + [score for score, knob in switches.items() if knob in knobs]
    said = [line for line in checked.lines if line.startswith("score_check: ")]
    tried = (
        r"breaks none of the four conditions where it was tried: \d+ changes .*; this is evidence, no proof"
    )
    assert len(said) == len(on)
    for line, score in zip(said, on, strict=True):
        assert re.fullmatch(f"score_check: {score} {tried}", line)
    assert finals(checked) == finals(plain) and len(finals(plain)) == 2 * len(on)
    numbers = [{k: v for k, v in o.result.items() if "_val_" in f"_{k}"} for o in (plain, checked)]
    assert numbers[0] == numbers[1]
    assert len({v for k, v in numbers[0].items() if re.fullmatch(r"\w+_val_bpb", k) and v}) == len(on)


def lenient(*given, phase=-1, how=token_nats, **more):
    return 0.95 * how(*given, phase=phase, **more)


def ahead(model, ids, targets, places=None, phase=-1):
    """A hint of the next target."""
    nats = token_nats(model, ids, targets, places, phase)
    return nats * (1 + 0.01 * (targets.roll(-1, 1) % 3))


def learn_first(*given):
    """Each chunk is learnt at the end of the one before, so before it is scored."""
    turns = PLAN_TURNS(*given)
    chunks = [turn.chunk for turn in turns if turn.chunk]
    for number, turn in enumerate(turns):
        if turn.chunk and len(chunks) > 1:
            turns[number] = replace(turn, chunk=chunks.pop(1))
    return turns


PLAN_TURNS, COUNTS, PADDED = train_gpt.plan_turns, train_gpt.context_counts, train_gpt.pad_windows
HEDGE_MIXTURE = train_gpt.hedge_mixture
WATCH = dict(monotonic=time.monotonic)  # by which waits are told; not the clock of the limits


def count_itself(*given):
    for counts in COUNTS(*given):
        more = dict(uses=counts.uses + 1, followers=counts.followers.clamp_min(1), matches=counts.matches + 1)
        yield counts._replace(**more)


def weigh_itself(neural, other, experts, bins, eta, window):
    """A Hedge whose weights know the token that they weigh."""
    logs = torch.stack([torch.log(neural + expert.share * (other - neural)) for expert in experts])
    mixed = ((5 * logs.cumsum(1)).softmax(0) * logs.exp()).sum(0).log()
    totals = zip(experts, logs.sum(1).tolist(), strict=True)
    return Mixture(mixed, [WeighedExpert(expert.name, total, 1 / len(experts)) for expert, total in totals])


def ahead_at_each_16th(model, ids, targets, places=None, phase=-1):
    """A hint of the next target, at one place of each half window."""
    nats = token_nats(model, ids, targets, places, phase)
    hint = 1 + 0.01 * (targets.roll(-1, 1) % 3)
    is_hinted = torch.arange(targets.size(1)) % 16 == 7
    return torch.where(is_hinted, nats * hint, nats)


def too_sure_of_what_recurs(*given):
    """A Hedge that hands out two percent too much where three tokens were seen before."""
    mixture = HEDGE_MIXTURE(*given)
    return replace(mixture, log_probs=mixture.log_probs + 0.02 * (given[3] >= 3 * 77))


def own_input(*given) -> PaddedWindows:
    """Places one further on: there the target is an input."""
    padded = PADDED(*given)
    return padded._replace(positions=(padded.positions + 1).clamp(max=padded.ids.size(1) - 1))


def hint_at_itself(cfg, tokens):
    """Each token as its own hint."""
    return tokens[1:]


SABOTAGE = {  # what is replaced, by what, the knobs, the score and the conditions of which one must be named
    "unnormalised": ("token_nats", lenient, {}, "roundtrip", "C2"),
    "one_token_ahead": ("token_nats", ahead, {}, "roundtrip", "C1"),
    "ahead_at_each_16th": ("token_nats", ahead_at_each_16th, {}, "roundtrip", "C1"),
    "too_sure_of_what_recurs": (
        "hedge_mixture",
        too_sure_of_what_recurs,
        dict(use_hedge=True),
        "hedge",
        "C2",
    ),
    "own_input": ("pad_windows", own_input, dict(eval_stride=8), "sliding", "C[23]"),
    "learns_first": ("plan_turns", learn_first, TTT, "ttt", "C[13]"),
    "learns_first_lora": ("plan_turns", learn_first, LEARNERS["lora"], "ttt", "C[13]"),
    "counts_itself": ("context_counts", count_itself, dict(use_hedge=True), "hedge", "C[23]"),
    "hints_at_itself": ("ngram_hints", hint_at_itself, dict(ngram_tilt_enabled=True), "tilt", "C[23]"),
    "weighs_itself": ("hedge_mixture", weigh_itself, dict(use_hedge=True), "hedge", "C[23]"),
}


def sabotage_cases() -> list:
    """Each; slow where another one breaks the same condition of the same score."""
    is_slow = ("ahead_at_each_16th", "learns_first_lora", "too_sure_of_what_recurs", "weighs_itself")
    return [pytest.param(name, marks=[pytest.mark.slow] if name in is_slow else []) for name in SABOTAGE]


@pytest.mark.parametrize("name", sabotage_cases())
def test_a_sabotaged_scorer_ends_the_run_by_name(rerun, monkeypatch, name):
    what, replacement, knobs, score, condition = SABOTAGE[name]
    monkeypatch.setattr(train_gpt, what, replacement)
    run = rerun(**knobs, score_check=True)
    assert run.code == run.result["exit_code"] == 7 and run.result["status"] == "error"
    assert re.search(rf"SCORE_CHECK: {score} breaks (C\d: .*; )?{condition}: .*token", run.error), run.error
    assert not finals(run) and not any("partial_" in line for line in run.lines)


def test_a_run_takes_the_check_from_the_repository(monkeypatch):
    run = learner(60)
    check = train_gpt.load_tool("records/legality.py")["check_own_scores"]
    check(run, seconds=0)
    monkeypatch.setattr(train_gpt, "token_nats", lenient)
    with pytest.raises(RunError, match="SCORE_CHECK: roundtrip breaks C2: .*token"):
        check(run, seconds=0)


def test_unchecked_a_sabotaged_scorer_is_not_noticed(rerun, monkeypatch):
    monkeypatch.setattr(train_gpt, "token_nats", lenient)
    assert rerun().code == 0


# --- test-time training in this process ---


def learner(targets=150, starts=(), tokens=None, **knobs) -> Run:
    """A Run on random tokens with a random model; chunks of two windows of 16."""
    sizes = dict(vocab_size=24, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2)
    ttt = dict(ttt_steps=1, ttt_lr=0.05, ttt_chunk_tokens=32)
    cfg = Config(**sizes | dict(train_seq_len=16, train_batch_tokens=64, val_batch_size=256) | ttt | knobs)
    tokens = stream(targets) if tokens is None else tokens
    sized = np.ones(len(tokens) - 1, np.int16)
    data = Validation(tokens, sized, 1, "", np.array(starts, np.int64))
    return Run(cfg, Runtime(), RunLog(None, ""), random_model(cfg), data)


def stream(targets: int) -> np.ndarray:
    return np.random.default_rng(targets).integers(0, 24, targets + 1).astype(np.uint16)


def each(run: Run) -> dict[str, torch.Tensor]:
    return {name: score.target_nats for name, score in score_all(run)}


KINDS = {
    "sgd": {},
    "adam": dict(ttt_optimizer="adam", ttt_lr=0.01),
    "lora": dict(ttt_lora_rank=2, ttt_steps=3, ttt_lr=0.2),
    "adam_lora": dict(ttt_optimizer="adam", ttt_lora_rank=2, ttt_steps=2, ttt_lr=0.02),
    "cosine": dict(ttt_cosine_chunks=5, ttt_grad_clip=0.3, ttt_lr=0.3, ttt_steps=2),
}


@pytest.mark.parametrize("stride", [0, 8])
@pytest.mark.parametrize("name", KINDS)
def test_training_is_score_first(name, stride):
    knobs = dict(KINDS[name], eval_stride=stride)
    whole = each(learner(**knobs))
    plain, later = whole["sliding" if stride else "roundtrip"], (32, 64, 96, 128)
    torch.testing.assert_close(whole["ttt"][:32], plain[:32], rtol=1e-6, atol=1e-6)
    assert all((whole["ttt"] - plain)[at : at + 32].abs().max() > 1e-3 for at in later)
    for chunk in range(4):
        edge, tokens = 32 * (chunk + 1), stream(150)
        tokens[edge + 1 :] = (tokens[edge + 1 :] + 1) % 24  # the targets from `edge` on
        other = each(learner(tokens=tokens, **knobs))["ttt"]
        assert torch.equal(other[:edge], whole["ttt"][:edge])
        assert not torch.equal(other[edge:], whole["ttt"][edge:])


def literal(run: Run, reset_every: bool = False) -> torch.Tensor:
    """nats of a learning score by official windows, one after another, with autograd of W0 + B A."""
    cfg, names = run.cfg, dict(run.model.named_parameters())
    lora = train_gpt.TestTimeTraining(run).factors
    start = {name: p.detach().clone() for name, p in names.items()}
    of = {id(p): name for name, p in names.items()}
    matrices = [of[id(p)] for p in train_gpt.TestTimeTraining(run).params] if lora else []
    if lora:
        leaves = [t.clone().requires_grad_() for pair in lora for t in pair]
    else:
        leaves = [p.clone().requires_grad_() for p in start.values()]
    kind = dict(sgd=partial(torch.optim.SGD, momentum=0.9), adam=torch.optim.Adam)[cfg.ttt_optimizer]
    optimiser, tokens = kind(leaves, lr=cfg.ttt_lr), torch.from_numpy(run.data.tokens.astype(np.int64))

    def weights() -> dict:
        if not lora:
            return dict(zip(start, leaves, strict=True))
        pairs = zip(matrices, leaves[::2], leaves[1::2], strict=True)
        return start | {name: start[name] + b @ a for name, a, b in pairs}

    def nats(first: int, stop: int) -> torch.Tensor:
        found = []
        for at in range(first, stop, 16):
            end = min(at + 16, stop)
            logits = torch.func.functional_call(run.model, weights(), (tokens[None, at:end],))[0]
            found.append(-logits.log_softmax(-1).gather(1, tokens[at + 1 : end + 1, None])[:, 0])
        return torch.cat(found)

    scores = []
    for number, first in enumerate(range(0, run.data.targets, 32)):
        if cfg.ttt_cosine_chunks:
            rate = cfg.ttt_lr * (0.5 + 0.5 * math.cos(math.pi * min(1, number / cfg.ttt_cosine_chunks)))
            optimiser.param_groups[0]["lr"] = rate
        stop = min(first + 32, run.data.targets)
        scores.append(nats(first, stop).detach())
        for _ in range(cfg.ttt_steps):
            optimiser.zero_grad()
            nats(first, stop).mean().backward()
            if cfg.ttt_grad_clip:
                torch.nn.utils.clip_grad_norm_(leaves, cfg.ttt_grad_clip)
            optimiser.step()
    return torch.cat(scores)


@pytest.mark.parametrize("name", KINDS)
def test_training_is_the_literal_one(name):
    run = learner(**KINDS[name])
    torch.testing.assert_close(each(run)["ttt"], literal(run), rtol=2e-4, atol=2e-4)


def test_lora_gradients_are_those_of_w_plus_b_a():
    """One step of SGD moves A and B against autograd's gradient of the mean nats in them."""
    run = learner(ttt_lora_rank=2, ttt_lr=0.5)
    training, count = train_gpt.TestTimeTraining(run), run.cfg.train_seq_len
    names = {id(p): name for name, p in run.model.named_parameters()}
    with torch.no_grad():
        for p, start, (a, b) in zip(training.params, training.packed_weights, training.factors, strict=True):
            p.copy_(start + b.normal_() @ a)
    leaves = [[t.clone().requires_grad_() for t in pair] for pair in training.factors]
    whole = zip(training.params, training.packed_weights, leaves, strict=True)
    weights = {names[id(p)]: start + b @ a for p, start, (a, b) in whole}
    ids = torch.from_numpy(run.data.tokens[None, : count + 1].astype(np.int64))
    logits = torch.func.functional_call(run.model, weights, (ids[:, :-1],))
    train_gpt.cross_entropy(logits, ids[:, 1:]).mean().backward()
    training.learn(Chunk(0, count, ends_text=False))
    for p, start, (a, b), (old_a, old_b) in zip(
        training.params, training.packed_weights, training.factors, leaves, strict=True
    ):
        torch.testing.assert_close(a, (old_a - 0.5 * old_a.grad).detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b, (old_b - 0.5 * old_b.grad).detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(p.detach(), start + b @ a)


@pytest.mark.parametrize("name", ["adam", "lora"])
def test_neither_the_score_nor_the_check_changes_the_model(name):
    run = learner(**KINDS[name], eval_stride=8)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    for use in (each, partial(check_own_scores, seconds=0)):
        use(run)
        torch.testing.assert_close(run.model.state_dict(), before, rtol=0, atol=0)
    again, first = each(run), each(learner(**KINDS[name], eval_stride=8))
    assert all(torch.equal(again[score], first[score]) for score in first)


@pytest.mark.parametrize("name", KINDS)
def test_training_leaves_no_gradient_behind(name):
    """Nor does it make one of a weight that it does not train."""
    run = learner(**KINDS[name])
    for weight in run.model.parameters():
        weight.grad = torch.ones_like(weight)  # of the last step of a training, say
    training = train_gpt.TestTimeTraining(run)
    training.learn(Chunk(0, 32, ends_text=False))
    trained = {id(weight) for weight in training.params}
    assert all((weight.grad is not None) == (id(weight) in trained) for weight in run.model.parameters())
    training.learn(Chunk(32, 64, ends_text=True))
    assert all(weight.grad is None for weight in run.model.parameters())


@pytest.mark.parametrize("stride", [0, 8])
@pytest.mark.parametrize("name", ["sgd", "adam_lora"])
def test_with_reset_each_document_is_scored_as_if_alone(name, stride):
    edges = [0, 1, 41, 110, 150]
    knobs = dict(KINDS[name], eval_stride=stride)
    scores = each(learner(starts=edges[1:-1], ttt_reset=True, **knobs))
    for first, stop in zip(edges[:-1], edges[1:], strict=True):
        alone = each(learner(tokens=stream(150)[first : stop + 1], **knobs))["ttt"]
        torch.testing.assert_close(scores["ttt"][first:stop], alone, rtol=1e-6, atol=1e-6)
    joined = each(learner(**knobs))["ttt"]
    assert (scores["ttt"] - joined).abs().max() > 1e-3


def test_two_ranks_learn_as_one(small, artifact, rerun, launch_forks, tmp_path):
    knobs = LEARNERS["adam"] | dict(use_hedge=True)
    rerun(**knobs, score_dump=str(tmp_path / "one.npz"))
    place = dict(device="cpu", eval_only=str(artifact), score_dump="two.npz", out_dir="two")
    run = launch_forks(tmp_path, small[0], ranks=2, **dict.fromkeys(TINY) | place | knobs)
    assert run.result["world_size"] == 2 and run.result["status"] == "ok", run.stderr[-2000:]
    found = [np.load(tmp_path / f"{name}.npz") for name in ("one", "two")]
    for name in ("roundtrip", "sliding", "ttt", "hedge"):
        one, two = (scores[f"{name}_logprob"] for scores in found)
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 if name != "hedge" else 1e-4)
    assert np.abs(found[0]["ttt_logprob"] - found[0]["sliding_logprob"]).max() > 0.01


@pytest.mark.slow
def test_two_ranks_check_their_scores_together(small, artifact, launch_forks, tmp_path):
    """In a real run; rank 1 would wait for ever if it did not help."""
    knobs = LEARNERS["documents"] | dict(eval_doc_isolated=True, score_check=True)
    place = dict(device="cpu", eval_only=str(artifact), out_dir="two")
    run = launch_forks(tmp_path, small[0], ranks=2, **dict.fromkeys(TINY) | place | knobs)
    assert run.result["world_size"] == 2 and run.result["status"] == "ok", run.stderr[-2000:]
    said = re.findall(r"^score_check: (\w+) breaks none of the four conditions", run.log, re.M)
    assert said == ["roundtrip", "isolated", "ttt", "tilt", "hedge"]


def test_a_trial_says_what_it_is_and_how_far(monkeypatch, tmp_path, capsys):
    """By a clock of its own: a second more each time that it is asked."""
    run = learner(use_hedge=True, ttt_steps=0)
    run.log = train_gpt.RunLog(tmp_path, "x")
    now = [1000.0]

    def later() -> float:
        now[0] += 1.0
        return now[0]

    stand_in = SimpleNamespace(perf_counter=later, monotonic=lambda: now[0], time=time.time)
    for module in (train_gpt, legality):
        monkeypatch.setattr(module, "time", stand_in)
    check_own_scores(run, 300.0)
    run.log.close()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SCORE_CHECK")]
    assert told[0] == "SCORE_CHECK: trying roundtrip, hedge: usually 300 s, more on a slow machine"
    shares = [int(share) for share in re.findall(r"of \w+: (\d+)% done, about", " ".join(told[1:]))]
    assert len(shares) == len(told) - 1 >= 2 and shares == sorted(shares)
    assert {name for name in ("roundtrip", "hedge") if f"of {name}: " in " ".join(told)} == {
        "roundtrip",
        "hedge",
    }
    assert "SCORE_CHECK" not in (tmp_path / "x.txt").read_text(), "the log has what was found alone"


# --- the evaluation clock ---


@pytest.fixture
def one_second_a_pass(monkeypatch):
    """A clock that only moves when the model runs without gradients: one second each time."""
    now = [0.0]
    clock = {k: getattr(train_gpt.time, k) for k in ("time", "strftime")}

    def timed(*given, phase=-1):
        now[0] += not torch.is_grad_enabled()
        return token_nats(*given, phase=phase)

    def advance(seconds):
        now[0] += seconds

    stand_in = SimpleNamespace(perf_counter=lambda: now[0], advance=advance, **WATCH | clock)
    monkeypatch.setattr(train_gpt, "time", stand_in)
    monkeypatch.setattr(train_gpt, "token_nats", timed)


ALL = dict(TTT, eval_stride=8, eval_batch_seqs=4, use_hedge=True)


def targets_of(folder) -> int:
    return len(np.fromfile(folder / "toy_val_000000.bin", "<u2")) - 512 - 1


def test_a_roundtrip_that_is_cut_is_no_score(small, rerun, tmp_path, one_second_a_pass):
    exact = rerun(**ALL, score_dump=str(tmp_path / "exact.npz"))
    assert exact.code == 0 and len(finals(exact)) == 8
    run, whole = rerun(**ALL, max_eval_seconds=3.5), targets_of(small[0])
    assert run.code == run.result["exit_code"] == 4 and run.result["status"] == "over_eval_time"
    assert not finals(run)
    (line,) = [line for line in run.lines if line.startswith("partial_")]
    numbers = rf"val_loss:\d\.\d{{4}} val_bpb:\d\.\d{{4}} tokens:384/{whole} eval_time:3000ms"
    assert re.fullmatch(rf"partial_int8_zstd_roundtrip {numbers}", line), line
    dumped = np.load(tmp_path / "exact.npz")
    logs, size = dumped["roundtrip_logprob"][:384].astype(float), int(dumped["bytes"][:384].sum())
    assert run.result["partial_roundtrip_val_loss"] == pytest.approx(-logs.mean(), rel=1e-6)
    assert run.result["partial_roundtrip_val_bpb"] == pytest.approx(
        -logs.sum() / math.log(2) / size, rel=1e-6
    )
    assert run.result["val_bpb"] is None and run.result["val_loss"] is None
    assert not [key for key in run.result if re.match("(roundtrip|sliding|ttt|hedge|partial_[sth])", key)]
    assert run.result["not_made"] == ["sliding", "ttt", "hedge"]


def test_a_later_score_that_is_cut_ends_the_scores(small, rerun, tmp_path, one_second_a_pass):
    passes = -(-targets_of(small[0]) // 128)
    limit = passes + 20.5
    run, exact = rerun(**ALL, max_eval_seconds=limit), rerun(**ALL, score_dump=str(tmp_path / "exact.npz"))
    assert run.code == 4 and run.result["status"] == "over_eval_time"
    assert [line.split()[0] for line in finals(run)] == [
        f"final_int8_zstd_roundtrip{x}" for x in ("", "_exact")
    ]
    (line,) = [line for line in run.lines if line.startswith("partial_")]
    assert line.startswith("partial_sliding_window") and f" tokens:640/{targets_of(small[0])} " in line
    logs = np.load(tmp_path / "exact.npz")["sliding_logprob"][:640].astype(float)
    assert run.result["partial_sliding_val_loss"] == pytest.approx(-logs.mean(), rel=1e-6)
    assert (
        run.result["val_bpb"] == exact.result["val_bpb"] == pytest.approx(exact.result["roundtrip_val_bpb"])
    )
    assert not [key for key in run.result if re.match("sliding|ttt|hedge|partial_(ttt|hedge)", key)]
    turns = -(-targets_of(small[0]) // 32)
    assert f"sliding: takes about {turns} s, 20 s are left" in run.lines


def test_each_score_says_early_what_it_will_take(small, rerun, one_second_a_pass):
    run, whole = rerun(**ALL, max_eval_seconds=1000), targets_of(small[0])
    plain, slid = -(-whole // 128), -(-whole // 32)
    said = [line for line in run.lines if ": takes about " in line]
    assert said[:2] == [
        f"roundtrip: takes about {plain} s, 1000 s are left",
        f"sliding: takes about {slid} s, {1000 - plain} s are left",
    ]
    assert said[2].startswith("ttt: takes about ") and said[2].endswith(f" {1000 - plain - slid} s are left")
    assert run.code == 0


@pytest.mark.parametrize("enough", [0, 0.5, 1])
def test_a_score_that_just_fits_is_whole(small, rerun, one_second_a_pass, enough):
    run = rerun(val_batch_size=1024, max_eval_seconds=-(-targets_of(small[0]) // 128) + enough - 0.5)
    assert (run.code, len(finals(run))) == ((4, 0) if enough == 0 else (0, 2))


def test_without_a_limit_nothing_is_foretold(rerun):
    run = rerun(val_batch_size=256, max_eval_seconds=0)
    assert run.code == 0 and not [line for line in run.lines if "takes about" in line]


def test_two_ranks_stop_together(small, artifact, rerun, launch_forks, tmp_path):
    """Each after its first window: the first of all, and the middle one."""
    knobs = dict(val_batch_size=256, device="cpu", eval_only=str(artifact))
    rerun(val_batch_size=256, score_dump=str(tmp_path / "exact.npz"))
    (tmp_path / "two").mkdir()
    knobs = dict.fromkeys(TINY) | knobs | dict(max_eval_seconds=1e-6, eval_stride=8, use_hedge=True)
    run, whole = launch_forks(tmp_path / "two", small[0], ranks=2, **knobs), targets_of(small[0])
    assert run.result["world_size"] == 2 and run.result["status"] == "over_eval_time", run.stderr[-2000:]
    assert run.result["exit_code"] == 4 and not re.search("^final_", run.stdout, re.M)
    assert re.search(rf"^partial_int8_zstd_roundtrip .* tokens:64/{whole} ", run.stdout, re.M)
    logs, half = np.load(tmp_path / "exact.npz")["roundtrip_logprob"].astype(float), -(-whole // 32) // 2 * 32
    expected = -np.concatenate((logs[:32], logs[half : half + 32])).mean()
    assert run.result["partial_roundtrip_val_loss"] == pytest.approx(expected, rel=1e-6)


MIXED = 500_000  # targets of the text that the mixer's clock is tried on
# Three samples: 100,000 targets that are not counted, as many that are, and 400,000.
SAMPLES = 600_000


@pytest.fixture
def mixer_clock(monkeypatch):
    """A clock that the mixer alone moves: seconds for each call, and for each target. It doubles the nats."""
    now = [0.0]
    clock = SimpleNamespace(first=0.0, fixed=0.0, each=0.001, calls=[])
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: now[0], **WATCH))

    def doubled(cfg, tokens, nats, begins):
        assert len(tokens) == len(nats) + 1
        now[0] += clock.fixed + clock.each * len(nats)
        if not clock.calls:
            now[0] += clock.first
        clock.calls.append(len(nats))
        return Mixture(-2 * nats, [WeighedExpert(number, -1.0, 1 / 7) for number in range(7)])

    monkeypatch.setattr(train_gpt, "mix_with_ngrams", doubled)
    return clock


@pytest.mark.parametrize("limit, count", [(1e9, MIXED), (1100.5, MIXED), (1099.0, 399_200), (620.0, 16_000)])
def test_a_mixer_that_would_take_too_long_mixes_a_first_part(mixer_clock, limit, count):
    """Its time is foretold from samples, whose 600 seconds count too: then it keeps the limit."""
    run, told = learner(MIXED, use_hedge=True, ttt_steps=0), []
    base = Score(1.0, MIXED, MIXED, 0.0, torch.rand(MIXED))
    score = score_hedge(run, base, limit, told.append)
    assert told == [pytest.approx(500.0)] and (score.tokens, score.unscored) == (count, MIXED - count)
    assert score.nats == pytest.approx(2 * base.target_nats[:count].double().sum().item())
    assert (
        score.bytes == count and score.seconds == pytest.approx(600 + count / 1000) and score.seconds <= limit
    )
    assert torch.equal(score.target_nats[:count], 2 * base.target_nats[:count].double())


@pytest.mark.parametrize("first, fixed, each", [
    (20.0, 0.5, 4e-7),  # as on a GPU: code to load, many launches, little work
    (0.0, 0.5, 4e-7),
    (5.0, 0.0, 2e-6),  # as on a CPU
    (1.0, 30.0, 0.0),
])  # fmt: skip
def test_fixed_costs_are_no_costs_of_each_target(mixer_clock, first, fixed, each):
    """The forecast is within a factor 2 of the time that it takes, and a score for which time is left is
    whole: 62 M targets of a text that is not there."""
    mixer_clock.first, mixer_clock.fixed, mixer_clock.each = first, fixed, each
    targets = 62_021_846
    true_seconds = fixed + each * targets
    nats = torch.zeros(1).expand(targets)
    found = train_gpt.foretell_mixture(Config(), torch.zeros(1).expand(targets + 1), nats)
    foretold = found[0] + found[1] * targets
    assert true_seconds / 2 <= foretold <= 2 * true_seconds
    assert mixer_clock.calls == [100_000, 100_000, 400_000]


def test_a_fixed_cost_cuts_no_score(mixer_clock, monkeypatch):
    """A hundred thousand targets with 20 s of start took for a proof that half a million take 100 s."""
    mixer_clock.first, mixer_clock.fixed, mixer_clock.each = 20.0, 1.0, 1e-6
    run, told = learner(MIXED, use_hedge=True, ttt_steps=0), []
    base = Score(1.0, MIXED, MIXED, 0.0, torch.rand(MIXED))
    said = []
    monkeypatch.setattr(run.log, "say", said.append)
    score = score_hedge(run, base, 30.0, told.append)
    assert score.unscored == 0 and score.seconds < 30.0
    assert told == [pytest.approx(1.5)]
    assert len(said) == 1 and said[0].startswith(f"hedge: mixes {MIXED} targets"), "before it is foretold"


@pytest.mark.parametrize("limit, spent", [(610.0, 600), (1e-6, 600), (0.0, 0), (-0.5, 0), (-5.0, 0)])
def test_a_mixer_for_which_nothing_is_left_mixes_nothing(mixer_clock, limit, spent):
    run = learner(MIXED, use_hedge=True, ttt_steps=0)
    mixer_clock.fixed = 0.0 if limit < 600 else 10.0  # that is what is left, and no target fits into it
    spent += 30.0 if mixer_clock.fixed else 0.0
    base = Score(1.0, MIXED, MIXED, 0.0, torch.rand(MIXED))
    score = score_hedge(run, base, limit, lambda seconds: None)
    assert (score.tokens, score.bytes, score.nats) == (0, 0, 0.0)
    assert (score.unscored, score.seconds) == (MIXED, pytest.approx(spent))


@pytest.mark.parametrize("failing_call", [1, 3, 4])
def test_a_mixer_without_memory_on_the_gpu_mixes_on_the_cpu(mixer_clock, monkeypatch, capfd, failing_call):
    """The GPU is played by the device "meta", whose tensors hold nothing."""
    run = learner(MIXED, use_hedge=True, ttt_steps=0)
    run.runtime.device = torch.device("meta")
    monkeypatch.setattr(type(run.runtime), "is_cuda", True)
    doubled, devices = train_gpt.mix_with_ngrams, []

    def runs_out(cfg, tokens, nats, begins):
        devices.append(nats.device.type)
        if len(devices) == failing_call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return doubled(cfg, tokens, nats, begins)

    monkeypatch.setattr(train_gpt, "mix_with_ngrams", runs_out)
    base = Score(1.0, MIXED, MIXED, 0.0, torch.rand(MIXED))
    warned = []
    monkeypatch.setattr(run.log, "warn", warned.append)
    score = score_hedge(run, base, 1e6, lambda seconds: None)
    assert devices == ["meta"] * failing_call + ["cpu"] * 4
    assert score.unscored == 0 and torch.equal(score.target_nats, 2 * base.target_nats.double())
    assert score.seconds == pytest.approx(sum(mixer_clock.calls) / 1000), "what failed counts too"
    assert len(warned) == 1 and "out of memory" in warned[0]


def test_a_mixer_without_memory_on_the_cpu_is_an_error(monkeypatch):
    def runs_out(cfg, tokens, nats, begins):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_gpt, "mix_with_ngrams", runs_out)
    run = learner(400, use_hedge=True, ttt_steps=0)
    with pytest.raises(torch.OutOfMemoryError):
        score_hedge(run, Score(1.0, 400, 400, 0.0, torch.rand(400)), 1.0, lambda seconds: None)


def test_gathering_the_scores_of_all_ranks_is_on_the_clock(small, rerun, monkeypatch, one_second_a_pass):
    """Seven seconds to gather the roundtrip's targets for the mixer: they are the score's, and used up."""

    def final_line(run) -> str:
        return next(line for line in run.lines if line.startswith("final_int8_zstd_roundtrip "))

    plain = rerun(val_batch_size=1024, use_hedge=True, max_eval_seconds=1000.0)
    passes = -(-targets_of(small[0]) // 128)
    assert f"eval_time:{1000 * passes}ms" in final_line(plain)

    def slow_sum(runtime, tensor):
        if tensor.numel() == targets_of(small[0]):
            train_gpt.time.advance(7.0)
        return tensor

    monkeypatch.setattr(train_gpt.Runtime, "sum", slow_sum)
    slow = rerun(val_batch_size=1024, use_hedge=True, max_eval_seconds=1000.0)
    assert f"eval_time:{1000 * (passes + 7)}ms" in final_line(slow)
    cut = rerun(val_batch_size=1024, use_hedge=True, max_eval_seconds=passes + 5.0)
    assert cut.code == 4 and cut.result["not_made"] == ["hedge"], "no time was left for it"


@pytest.mark.parametrize("limit", [0.0, -0.5, -5.0])
def test_a_mixer_of_a_short_text_is_not_started_either(monkeypatch, limit):
    monkeypatch.setattr(train_gpt, "mix_with_ngrams", None)
    run = learner(400, use_hedge=True, ttt_steps=0)
    base = Score(1.0, 400, 400, 0.0, torch.rand(400))
    assert score_hedge(run, base, limit, lambda seconds: None).unscored == 400


def test_scores_for_which_nothing_is_left_are_not_made_and_named(small, rerun, tmp_path, one_second_a_pass):
    """The roundtrip is whole when the clock is used up."""
    first, *more = ["int8_zstd_roundtrip", "sliding_window", "ttt", "hedge_mixer"]
    passes = -(-targets_of(small[0]) // 128)
    run = rerun(**ALL, max_eval_seconds=passes, score_dump=str(tmp_path / "some.npz"))
    assert run.code == run.result["exit_code"] == 4 and run.result["status"] == "over_eval_time"
    assert [line.split()[0] for line in finals(run)] == [f"final_{first}", f"final_{first}_exact"]
    lines = [line for line in run.lines if line.startswith("not_made_")]
    count = f"tokens:0/{targets_of(small[0])} "
    assert [line.split()[0] for line in lines] == [f"not_made_{name}" for name in more]
    assert all(count in line for line in lines) and not any("partial_" in line for line in run.lines)
    assert run.result["not_made"] == ["sliding", "ttt", "hedge"] and run.result["val_bpb"] > 0
    assert not [key for key in run.result if re.match("(partial_|sliding|ttt|hedge)", key)]
    assert "roundtrip_logprob" in np.load(tmp_path / "some.npz")


def test_the_time_left_is_counted_by_the_clock_of_the_first_rank():
    """Ranks that measured their own seconds would stop at different passes, and wait for each other."""
    run, limits = learner(400, eval_stride=8, ttt_steps=0, max_eval_seconds=60.0), []

    class Second(Runtime):
        def main_number(self, value):
            return 7.0  # what rank 0 broadcasts, whatever this rank measured

    run.runtime = Second()
    run.score = lambda stride, limit, say: limits.append(limit) or Score(1.0, 1, 1, 1000.0)
    list(score_all(run))
    assert limits == [60.0, 53.0]


def test_a_part_of_a_mixture_is_the_whole_one_there():
    run = learner(400, use_hedge=True, ttt_steps=0)
    tokens, nats = torch.from_numpy(run.data.tokens.astype(np.int64)), each(run)["roundtrip"].double()
    whole = mix_with_ngrams(run.cfg, tokens, nats).log_probs
    part = mix_with_ngrams(run.cfg, tokens[:301], nats[:300]).log_probs
    torch.testing.assert_close(part, whole[:300], rtol=0, atol=1e-9)  # integers of another scale


def test_a_part_is_never_dumped_as_a_score(rerun, tmp_path, one_second_a_pass):
    rerun(val_batch_size=1024, max_eval_seconds=2, score_dump=str(tmp_path / "part.npz"))
    assert sorted(np.load(tmp_path / "part.npz").files) == ["bytes", "position", "target"]


def test_the_check_does_not_run_on_the_evaluation_clock(small, rerun, one_second_a_pass):
    limit = -(-targets_of(small[0]) // 128) + 0.5
    assert rerun(1, val_batch_size=1024, max_eval_seconds=limit, score_check=True).code == 0
    run = rerun(1, val_batch_size=1024, max_eval_seconds=0.5, score_check=True)
    assert run.code == 4 and any(line.startswith("score_check: roundtrip breaks none") for line in run.lines)


def test_every_rank_stops_by_the_clock_of_the_first(monkeypatch):
    """A rank whose own clock stands still, or runs ahead, beside a rank 0 that has a second a pass."""

    class Second(Runtime):
        def main_number(self, value):
            """When the next pass will be over, asked from the second on."""
            self.asked = getattr(self, "asked", 1) + 1
            return float(self.asked)

    for own in (0.0, 1e6):
        ticks = iter(own * n for n in range(10**6))
        monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=partial(next, ticks), **WATCH))
        run = learner(640, ttt_steps=0)
        score = evaluate(run.cfg, run.nats, run.data, Second(), limit=5.5)
        assert (score.tokens, score.unscored) == (5 * 32, 480)


def test_the_check_is_not_held_up_by_a_split_shorter_than_its_sample():
    run = learner(60, eval_stride=8)
    short = replace(run.data, tokens=run.data.tokens[:31], target_bytes=run.data.target_bytes[:30])
    check_own_scores(Run(run.cfg, run.runtime, run.log, run.model, short), seconds=0)
    assert short.targets == 30


@pytest.mark.parametrize("count, expected", [
    (1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (4, {1, 2, 3, 4}), (10, {1, 2, 4, 5, 6, 8, 9, 10}),
    (100, {1, 2, 4, 5, 6, 8, 9, 10, 16, 17, 18, 32, 33, 34, 51, 64, 65, 66, 99, 100}),
])  # fmt: skip
def test_the_ends_the_middle_and_what_lies_beside_powers_of_two_is_tried(count, expected):
    found = legality.edges(count)
    assert len(found) == len(set(found)) and set(found) == expected and found[0] == count
