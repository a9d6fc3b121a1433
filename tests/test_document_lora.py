"""Test-time training by document: a batch of LoRAs is each document's own, in an order that can be read; and
phases of SGD on all weights between the documents."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from records.legality import (
    Trial,
    TriedText,
    check_own_scores,
    check_score,
    cuts_to_try,
    many_documents,
    own_logs,
)
from tests.conftest import random_model
from tests.support.ranks import on_ranks
from train_gpt import (
    Config,
    DocumentLora,
    DocumentScore,
    Run,
    RunError,
    RunLog,
    Runtime,
    Validation,
    WeightPhases,
    phase_edges,
    phase_steps,
    plan_document_turns,
    score_all,
)

VOCAB = 24
BOS = 1
SIZES = dict(
    vocab_size=VOCAB, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=16,
    train_batch_tokens=64, val_batch_size=256, tie_embeddings=False,
)  # fmt: skip
LORA = dict(
    ttt_steps=1, ttt_lr=0.02, ttt_lora_rank=3, ttt_lora_alpha=6.0, ttt_batch_size=3, ttt_chunk_size=4,
    ttt_eval_seq_len=12,
)  # fmt: skip
LENGTHS = [3, 30, 4, 17, 1, 8, 9, 25, 12, 5, 2, 40]  # of documents, with the BOS that opens each


def text_of(lengths, seed=0) -> np.ndarray:
    """Documents of random tokens, each behind a BOS, and a last token to be scored."""
    rng = np.random.default_rng(seed)
    pieces = [np.append(BOS, rng.integers(2, VOCAB, length - 1)) for length in lengths]
    return np.append(np.concatenate(pieces), 5).astype(np.uint16)


def scoring(tokens, **knobs) -> Run:
    """A Run of a random model on a text whose documents begin with a BOS."""
    cfg = Config(**SIZES | LORA | knobs)
    starts = 1 + np.flatnonzero(tokens[1:-1] == BOS)
    data = Validation(tokens, np.ones(len(tokens) - 1, np.int16), 1, "", starts)
    return Run(cfg, Runtime(), RunLog(None, ""), random_model(cfg), data)


def nats_of_all(run: Run) -> dict[str, torch.Tensor]:
    return {name: score.target_nats for name, score in score_all(run)}


# --- the reference: one document after another, without padding, by hooks on the model's modules ---


class OneByOne:
    """The score of the documents, each alone; its LoRAs hang on the modules as forward hooks."""

    def __init__(self, run: Run):
        self.run = run
        self.first = {key: a.clone() for key, a in DocumentLora(run).first_a.items()}
        self.scale = run.cfg.ttt_lora_alpha / run.cfg.ttt_lora_rank
        self.calls = {}
        for number, block in enumerate(run.model.blocks):
            places = dict(q=block.attn.c_q, k=block.attn.c_k, v=block.attn.c_v, o=block.attn, mlp=block.mlp)
            for place, module in places.items():
                module.register_forward_hook(partial(self.add, number, place))

    def add(self, block, place, module, inputs, output):
        """Add what the LoRA of this call of the block makes of the input."""
        layers = [at for at, layer in enumerate(self.run.model.plans[-1]) if layer.block == block]
        call = self.calls.get((block, place), 0)
        self.calls[block, place] = call + 1
        pair = self.factors.get((layers[call % len(layers)], place))
        if pair is None:
            return output
        extra = self.scale * inputs[0] @ pair[0].mT.to(inputs[0].dtype) @ pair[1].mT.to(inputs[0].dtype)
        return (output[0] + extra, *output[1:]) if place == "o" else output + extra

    def nats(self, start: int, first: int, stop: int) -> torch.Tensor:
        tokens = torch.from_numpy(self.run.data.tokens.astype(np.int64))
        head = self.run.model.lm_head.weight
        pair = self.factors.get((len(self.run.model.plans[-1]), "head"))
        if pair is not None:
            head = head + (self.scale * pair[1] @ pair[0]).to(head.dtype)
        logits = torch.func.functional_call(
            self.run.model, {"lm_head.weight": head}, (tokens[None, start:stop],)
        )[0, first - start :]
        return -logits.log_softmax(-1).gather(1, tokens[first + 1 : stop + 1, None])[:, 0]

    def document(self, begin: int, end: int) -> tuple[torch.Tensor, int]:
        """(nats of the document, steps taken); `factors` is left as learnt."""
        cfg = self.run.cfg
        outputs = train_gpt.adapter_sizes(cfg, self.run.model)
        self.factors = {
            key: (a.clone().requires_grad_(), torch.zeros(outputs[key][1], len(a), requires_grad=True))
            for key, a in self.first.items()
        }
        optimiser = torch.optim.AdamW(
            itertools.chain(*self.factors.values()), lr=cfg.ttt_lr, betas=(cfg.ttt_beta1, cfg.ttt_beta2),
            eps=1e-10, weight_decay=cfg.ttt_weight_decay,
        )  # fmt: skip
        found, steps = [], 0
        for first in range(begin, end, cfg.ttt_chunk_size):
            stop = first + cfg.ttt_chunk_size
            window = (max(begin, stop - cfg.ttt_eval_seq_len), first, min(stop, end))
            found.append(self.nats(*window).detach())
            if stop >= end:
                break
            for _ in range(cfg.ttt_steps):
                optimiser.zero_grad()
                self.nats(*window).mean().backward()
                optimiser.step()
                steps += 1
        return torch.cat(found), steps

    def phase(self, spans) -> None:
        """SGD on all weights; a step ends where the next window would overflow it."""
        cfg, self.factors = self.run.cfg, {}
        windows = [
            (first, min(first + cfg.train_seq_len, end))
            for begin, end in spans
            for first in range(begin, end, cfg.train_seq_len)
        ]
        steps = [[]]
        for window in windows:
            targets = sum(stop - first for first, stop in [*steps[-1], window])
            if steps[-1] and targets > cfg.global_ttt_chunk_tokens:
                steps.append([])
            steps[-1].append(window)
        params = list(self.run.model.parameters())
        velocity = [torch.zeros_like(param) for param in params]
        for number, step in enumerate(steps):
            nats = torch.cat([self.nats(first, first, stop) for first, stop in step])
            gradients = torch.autograd.grad(nats.mean(), params, allow_unused=True)
            gradients = [
                torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)
            ]
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
            rate = cfg.global_ttt_lr * (0.5 + 0.5 * math.cos(math.pi * number / len(steps)))
            with torch.no_grad():
                for param, gradient, speed in zip(params, gradients, velocity, strict=True):
                    speed.mul_(0.9).add_(gradient * min(1.0, cfg.global_ttt_grad_clip / norm))
                    param.sub_(rate * speed)

    def score(self) -> torch.Tensor:
        cfg, spans = self.run.cfg, self.run.data.spans
        moves, total, found, edge = {}, 0, [], cfg.ttt_batch_size
        ends = [n * cfg.phased_ttt_prefix_docs // cfg.phased_ttt_num_phases for n in (1, 2, 3)]
        ends = [end for end in ends[: cfg.phased_ttt_num_phases] if end]
        for number, span in enumerate(spans):
            if (number == edge or number in ends) and cfg.ttt_warm_start_a:
                for key, move in moves.items():
                    self.first[key] = self.first[key] + move / max(1, total)
                moves, total, edge = {}, 0, 4 * edge if number == edge else edge
            if number in ends:
                self.phase(spans[:number])
            nats, steps = self.document(*span)
            found.append(nats)
            total += steps
            for key, (a, _) in self.factors.items():
                moves[key] = moves.get(key, 0) + steps * (a.detach() - self.first[key])
        return torch.cat(found)


PHASES = dict(
    phased_ttt_prefix_docs=7, phased_ttt_num_phases=2, global_ttt_lr=0.5, global_ttt_chunk_tokens=20,
    global_ttt_grad_clip=0.3,
)  # fmt: skip
KINDS = {
    "phases": PHASES,
    "phases_cold": dict(PHASES, ttt_warm_start_a=False, phased_ttt_num_phases=1),
    "warm": {},
    "fresh": dict(ttt_warm_start_a=False, ttt_beta1=0.9),
    "two_steps": dict(ttt_steps=2, ttt_batch_size=5),
    "few_are_left": dict(ttt_batch_size=16, ttt_beta1=0.8),
    "some_places": dict(ttt_q_lora=False, ttt_v_lora=False, ttt_head_lora=False, ttt_batch_size=1),
    "loop": dict(num_layers=3, num_loops=2, loop_start=1, loop_end=1, enable_looping_at=0.0),
    "lanes": dict(num_layers=3, encoder_layers=1, parallel_start_layer=2),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_documents_is_each_document_by_itself(name):
    run = scoring(text_of(LENGTHS), **KINDS[name])
    run.model = random_model(run.cfg, torch.float64).double()
    run.make_graphs()
    found = nats_of_all(run)["ttt"]
    expected = OneByOne(run).score()
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-5)
    plain = nats_of_all(scoring(text_of(LENGTHS), **KINDS[name], ttt_lr=0.0))["ttt"]
    assert (found - plain).abs().max() > 0.01, "it has learnt nothing"


def test_the_factors_are_those_of_each_document_alone():
    """After five chunks, A and B of each row are what its document alone makes of them."""
    run = scoring(text_of([19, 19, 18]))
    lora, alone = DocumentLora(run), OneByOne(run)
    alone.factors = {}
    for turn in plan_document_turns(run.cfg, run.data, run.runtime):
        lora.score(turn)
    for row, span in enumerate(run.data.spans):
        assert alone.document(*span)[1] == lora.group_steps == 4
        for key, (a, b) in alone.factors.items():
            many_a, many_b = lora.factors[key]
            assert b.abs().max() > 1e-3 and (a - alone.first[key]).abs().max() > 1e-3
            torch.testing.assert_close(many_a[row], a, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(many_b[row], b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("knobs", [dict(ttt_lr=0.0), dict(ttt_lora_alpha=0.0)])
def test_without_learning_it_is_the_isolated_score(knobs):
    run = scoring(
        text_of(LENGTHS),
        **knobs,
        eval_doc_isolated=True,
        eval_stride=4,
        eval_seq_len=12,
        ttt_weight_decay=0.0,
    )
    scores = nats_of_all(run)
    torch.testing.assert_close(scores["ttt"], scores["isolated"], rtol=1e-5, atol=1e-5)


def test_phases_change_what_comes_after_them_alone():
    """Here they end after the third and the seventh document."""
    plain = nats_of_all(scoring(text_of(LENGTHS), ttt_warm_start_a=False))["ttt"]
    found = nats_of_all(scoring(text_of(LENGTHS), ttt_warm_start_a=False, **PHASES))["ttt"]
    edge = sum(LENGTHS[:3])
    assert torch.equal(found[:edge], plain[:edge])
    assert ((found - plain)[edge:].abs() > 1e-3).float().mean() > 0.9


# --- the order ---


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=25),
    prefix=st.integers(1, 30),
    phases=st.integers(1, 5),
    chunk=st.integers(1, 90),
)
def test_a_phase_takes_each_target_of_its_documents_once(lengths, prefix, phases, chunk):
    run = scoring(
        text_of(lengths), phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=phases,
        global_ttt_chunk_tokens=chunk,
    )  # fmt: skip
    spans = run.data.spans
    ends = phase_edges(run.cfg)
    assert ends == sorted(set(ends)) and ends[-1] == prefix and ends[0] > 0
    document_of = np.searchsorted(run.data.starts, np.arange(run.data.targets), side="right")
    for end in [end for end in ends if end < len(spans)]:
        steps = phase_steps(run.cfg, spans[:end])
        windows = [window for step in steps for window in step]
        taken = np.concatenate([np.arange(window.first, window.stop) for window in windows])
        assert np.array_equal(taken, np.arange(spans[end][0]))
        for start, first, stop in windows:
            assert start == first and stop - start <= 16
            assert document_of[start] == document_of[stop - 1]
        sizes = [sum(window.stop - window.first for window in step) for step in steps]
        assert all(size <= chunk or len(step) == 1 for size, step in zip(sizes, steps, strict=True))
    plan = plan_document_turns(run.cfg, run.data, run.runtime)
    stops = {turn.chunk.stop for turn in plan if turn.chunk}
    assert all(spans[end][0] in stops for end in ends if end < len(spans))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=25),
    ranks=st.integers(1, 5),
    batch=st.integers(1, 6),
    width=st.integers(1, 12),
    is_warm=st.booleans(),
)
def test_every_target_is_scored_once_and_all_ranks_meet(lengths, ranks, batch, width, is_warm):
    run = scoring(text_of(lengths), ttt_batch_size=batch, ttt_chunk_size=width, ttt_warm_start_a=is_warm)
    document_of = np.searchsorted(run.data.starts, np.arange(run.data.targets), side="right")
    scored = np.zeros(run.data.targets, int)
    plans = []
    for rank in range(ranks):
        plans.append(plan_document_turns(run.cfg, run.data, Runtime(rank=rank, world_size=ranks)))
        for turn in plans[-1]:
            assert len(turn.windows) <= batch and turn.learning <= len(turn.windows)
            for start, first, stop in turn.windows:
                assert document_of[start] == document_of[stop - 1]
                assert start == max(first + width - 12, first - (first - start)) and stop - start <= 12
                scored[first:stop] += 1
    assert (scored == 1).all()
    blocks = [[(at, turn.chunk) for at, turn in enumerate(plan) if turn.chunk] for plan in plans]
    assert all(found == blocks[0] for found in blocks) and len({len(plan) for plan in plans}) == 1
    edges = [document_of[chunk.first] for _, chunk in blocks[0]]
    doubling = [0, *(batch * 4**k for k in range(5))] if is_warm else [0]
    assert edges == [edge for edge in doubling if edge < len(lengths)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["warm", "phases"])
def test_the_score_is_the_same_on_any_number_of_ranks(name, ranks):
    run = scoring(
        text_of(LENGTHS), **KINDS[name], use_hedge=True, hedge_order=2, ngram_tilt_enabled=True, token_order=3
    )
    one = nats_of_all(run)
    for scores in on_ranks(ranks, run, nats_of_all)[:1]:
        for score in ("ttt", "tilt", "hedge"):
            torch.testing.assert_close(scores[score], one[score], rtol=2e-5, atol=2e-5)


def test_after_each_phase_all_ranks_have_the_same_weights():
    def weights_after(run):
        phases = WeightPhases(run)
        phases.train(run.data.spans[:5])
        return [param.detach().clone() for param in phases.params]

    one, two, three = on_ranks(3, scoring(text_of(LENGTHS), **PHASES), weights_after)
    assert all(map(torch.equal, one, two)) and all(map(torch.equal, one, three))


@pytest.mark.parametrize("name", ["warm", "two_steps", "phases"])
def test_a_chunk_is_scored_before_it_is_learnt(name):
    """Other targets from any place on leave all scores before it, to the bit."""
    text = text_of(LENGTHS)
    whole = nats_of_all(scoring(text, **KINDS[name]))["ttt"]
    for edge in (1, 4, 33, 40, 90, len(text) - 2):
        other = text.copy()
        other[edge + 1 :] = np.random.default_rng(edge).integers(0, VOCAB, len(text) - edge - 1)
        changed = nats_of_all(scoring(other, **KINDS[name]))["ttt"]
        assert torch.equal(changed[:edge], whole[:edge])
        assert not torch.equal(changed[edge:], whole[edge:])


# --- the check from outside, on texts of many documents and several ranks ---


def log_probs(score: str, ranks: int, knobs: dict, tokens: np.ndarray) -> np.ndarray:
    """The log-probabilities of tokens[1:] by one of the scores, made on several ranks."""
    run = scoring(tokens.astype(np.uint16), **knobs, score_dump="kept")  # so that it keeps all nats
    return -on_ranks(ranks, run, nats_of_all)[0][score].double().numpy()


OUTSIDE = {
    "isolated": ("isolated", dict(ttt_steps=0, eval_doc_isolated=True, eval_stride=4)),
    "documents": ("ttt", {}),
    "phases": ("ttt", PHASES),
    "tilt": ("tilt", dict(ngram_tilt_enabled=True, token_order=3, token_threshold=0.5)),
    "hedge": ("hedge", dict(use_hedge=True, hedge_order=3)),
    "hedge_isolated": (
        "hedge",
        dict(ttt_steps=0, eval_doc_isolated=True, eval_stride=4, use_hedge=True, hedge_order=3),
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_on_two_ranks_the_scores_are_legal_from_outside(name):
    score, knobs = OUTSIDE[name]
    text, scorer = text_of(LENGTHS[:8]), partial(log_probs, score, 2, knobs)
    found = check_score(scorer, text, VOCAB, seconds=1, longest=100, boundary=BOS)
    assert not found, str(found)
    assert found.cuts >= 6 and found.sums >= 1


def longest_first(cfg, data, runtime):
    """The published order: the longest documents of the whole text teach the others."""
    spans = sorted(data.spans, key=train_gpt.document_length, reverse=True)
    turns = []
    for at in range(0, len(spans), cfg.ttt_batch_size):
        turns += train_gpt.document_turns(cfg, spans[at : at + cfg.ttt_batch_size])
        chunk = train_gpt.Chunk(0, 1, ends_text=False)
        turns[-1] = replace(turns[-1], chunk=chunk)
    return turns


def learnt_first(self, turn):
    """The score of a chunk by the weights that have learnt from it."""
    self.begin_group(turn.shape.batch) if turn.begins else None
    padded = train_gpt.pad_windows(self.run.data, turn.windows, turn.shape, torch.device("cpu"))
    for _ in range(2):
        nats = self.run.nats(padded.ids, padded.targets, padded.positions, adapters=self.adapters())
        self.optimiser.zero_grad()
        nats.mean(1).sum().backward(inputs=self.optimiser.param_groups[0]["params"])
        self.optimiser.step()
    return nats.detach()[padded.is_scored].cpu().double()


def phase_over_all(self, spans):
    """A phase that learns from documents that have no score yet."""
    TRAIN(self, self.run.data.spans)


def shares_of_all_documents(cfg):
    """Phases that end at shares of the whole text, so that their places tell how long it is."""
    return EDGES(replace(cfg, phased_ttt_prefix_docs=ALL_DOCUMENTS[0]))


def count_documents(cfg, data, runtime):
    ALL_DOCUMENTS[0] = len(data.spans)
    return PLAN(cfg, data, runtime)


TRAIN, EDGES, PLAN = WeightPhases.train, phase_edges, plan_document_turns
ALL_DOCUMENTS = [1]
SABOTAGE = {
    "longest_first": (train_gpt, dict(plan_document_turns=longest_first)),
    "learnt_first": (DocumentLora, dict(score=learnt_first)),
    "phase_over_all": (WeightPhases, dict(train=phase_over_all)),
    "phases_by_the_length_of_the_text": (
        train_gpt,
        dict(phase_edges=shares_of_all_documents, plan_document_turns=count_documents),
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_published_order_and_a_peek_are_illegal(name, monkeypatch):
    """Within forty changes of later tokens, by the check's own trials."""
    holder, replacements = SABOTAGE[name]
    for what, replacement in replacements.items():
        monkeypatch.setattr(holder, what, replacement)
    phases = PHASES if "phase" in name else {}
    run = scoring(text_of(LENGTHS), ttt_lr=0.1, **phases)
    trial = Trial(partial(own_logs, run, "ttt"), VOCAB, 60.0, 1e-5, None)
    text = TriedText(trial, "", many_documents(text_of(LENGTHS), BOS, trial.rng), 300)
    for cut in cuts_to_try(text.tokens, text.base, text.rng)[:40]:
        text.trial.try_cut(text, cut)
        if trial.found:
            break
    assert "C1" in trial.found


def learnt_first_by_several(self, turn):
    """Ours on one rank, a peek on several."""
    return (SCORE if self.run.runtime.world_size == 1 else learnt_first)(self, turn)


SCORE = DocumentLora.score


def test_the_check_sees_what_only_several_ranks_do(monkeypatch):
    monkeypatch.setattr(DocumentLora, "score", learnt_first_by_several)
    run = scoring(text_of(LENGTHS), ttt_lr=0.1)
    check_own_scores(run, seconds=1)
    with pytest.raises(RunError, match="SCORE_CHECK: ttt breaks C1"):
        on_ranks(2, run, partial(check_own_scores, seconds=1))


def test_the_check_passes_ours_on_several_ranks():
    run = scoring(
        text_of(LENGTHS), **PHASES, eval_doc_isolated=True, use_hedge=True, hedge_order=2,
        ngram_tilt_enabled=True, token_order=3,
    )  # fmt: skip
    lines = on_ranks(2, run, checked_lines)
    assert [line.split()[1] for line in lines[0]] == ["roundtrip", "isolated", "ttt", "tilt", "hedge"]
    assert all("breaks none" in line for line in lines[0]) and not any(lines[1:])


def checked_lines(run: Run) -> list[str]:
    """What rank 0 logs of a check of two seconds."""
    lines = []
    run.log.line = lines.append
    check_own_scores(run, seconds=2)
    return lines


@pytest.mark.parametrize("knobs", [{}, PHASES])
def test_neither_the_score_nor_the_check_changes_the_model(knobs):
    run = scoring(text_of(LENGTHS), **knobs)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    first = nats_of_all(run)
    check_own_scores(run, seconds=0)
    torch.testing.assert_close(run.model.state_dict(), before, rtol=0, atol=0)
    assert all(param.requires_grad and param.grad is None for param in run.model.parameters())
    assert all(torch.equal(nats, first[name]) for name, nats in nats_of_all(run).items())


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [PHASES, dict(ngram_tilt_enabled=True, token_order=3)])
def test_compiled_it_is_the_same_score_and_nothing_is_compiled_late(knobs):
    places = dict(ttt_q_lora=False, ttt_k_lora=False, ttt_v_lora=False, ttt_head_lora=False)
    knobs = knobs | places | dict(num_layers=1)
    eager = nats_of_all(scoring(text_of(LENGTHS), **knobs))
    run = scoring(text_of(LENGTHS), **knobs)
    run.runtime.compiles = True
    run.make_graphs()
    train_gpt.warm_evaluation(run)
    graphs = train_gpt.compiled_graphs()
    compiled = nats_of_all(run)
    assert train_gpt.compiled_graphs() == graphs > 2
    for name, nats in eager.items():
        torch.testing.assert_close(compiled[name], nats, rtol=2e-4, atol=2e-4)


# --- a score that was cut off ---

KEPT = dict(checkpoint_seconds=1e-9)  # after every turn


def score_from(run: Run, begun: dict | None = None) -> tuple:
    """(score, what was kept on the way, turns through the model, lines); begun: where it was cut off."""
    kept = []
    scored = []
    lines = []
    run.checkpoints.begun = copy.deepcopy(begun or {})
    run.checkpoints.add_begun = lambda begun, log: kept.append(copy.deepcopy(begun))
    run.log.line = lines.append
    whole = DocumentScore(run)
    score_turn = whole.lora.score
    whole.lora.score = lambda turn: scored.append(turn) or score_turn(turn)
    return whole.score(math.inf, None), kept, scored, lines


@pytest.mark.parametrize("knobs", [{}, PHASES, dict(ngram_tilt_enabled=True, token_order=3)])
def test_a_score_that_was_cut_off_goes_on_between_groups_to_the_bit(knobs):
    def make():
        run = scoring(text_of(LENGTHS), **knobs, **KEPT)
        if run.cfg.ngram_tilt_enabled:
            run.data = replace(run.data, hints=(run.data.tokens[1:] % VOCAB).astype(np.int64))
        return run

    expected, kept, turns, _ = score_from(make())
    begins = [at for at, turn in enumerate(turns) if turn.begins]
    assert len(kept) == len(turns) - 1 and len(begins) > 3
    for begun in kept[:: len(kept) // 5]:
        score, _, scored, lines = score_from(make(), begun)
        assert score.nats == expected.nats and score.tokens == expected.tokens
        assert torch.equal(score.target_nats, expected.target_nats)
        if knobs.get("ngram_tilt_enabled"):
            assert torch.equal(score.hint_nats, expected.hint_nats)
        # Those of whole groups are not scored again; a group is known to be whole when the next begins.
        ends_block = turns[begun["done"] - 1].chunk is not None
        whole_groups = begun["done"] if ends_block else max(at for at in begins if at < begun["done"])
        assert len(turns) - len(scored) == whole_groups
        assert lines == [f"ttt: goes on after {begun['seconds']:.0f} s, turns:{begun['done']}"]


def test_ranks_go_on_together_and_other_ranks_begin_anew():
    run = scoring(text_of(LENGTHS * 2), **PHASES, **KEPT)
    found = on_ranks(2, run, score_from)
    kept = found[0][1]
    assert not found[1][1]
    apart = [begun for begun in kept if begun["ranks"][0][0] != begun["ranks"][1][0]]
    for begun in [apart[0], apart[-1], kept[-1]]:
        for expected, again in zip(found, on_ranks(2, run, partial(score_from, begun=begun)), strict=True):
            assert again[0].nats == expected[0].nats
        nats = sum(score.target_nats for score, *_ in on_ranks(2, run, partial(score_from, begun=begun)))
        assert torch.equal(nats, sum(score.target_nats for score, *_ in found))
    score, _, _, lines = score_from(scoring(text_of(LENGTHS * 2), **PHASES, **KEPT), kept[-1])
    assert lines == ["ttt: begins anew, as it was begun by 2 ranks, not 1"]
    assert score.nats == pytest.approx(found[0][0].nats, rel=1e-6)


def test_a_score_that_goes_on_counts_the_seconds_before():
    _, kept, *_ = score_from(scoring(text_of(LENGTHS), **KEPT))
    begun = kept[0] | dict(seconds=5000.0)
    score = score_from(scoring(text_of(LENGTHS), **KEPT), begun)[0]
    assert 5000 < score.seconds < 5100


# --- bad input ---

REFUSED = {
    "chunk_beyond_its_window": (dict(ttt_chunk_size=13), "TTT_CHUNK_SIZE=13 is longer than its window of 12"),
    "no_place": (
        {f"ttt_{place}_lora": False for place in train_gpt.LORA_PLACES},
        "TTT_BATCH_SIZE needs a place for its LoRA: set one of TTT_Q_LORA=1 ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_knobs_are_refused(name):
    knobs, message = REFUSED[name]
    with pytest.raises(RunError, match=message):
        Config(**SIZES | LORA | knobs)


@pytest.mark.parametrize("missing", ["TTT_LORA_RANK", "TTT_STEPS", "TTT_BATCH_SIZE"])
def test_knobs_without_what_they_need_are_refused(missing):
    env = dict(TTT_STEPS="1", TTT_LORA_RANK="4", TTT_BATCH_SIZE="8", TTT_CHUNK_SIZE="16")
    del env[missing]
    with pytest.raises(RunError, match=f"has no effect without {missing}!=0"):
        Config.from_env(env)


def test_a_rank_beyond_any_use_is_refused():
    with pytest.raises(RunError, match="TTT_LORA_RANK=100000 is beyond any use"):
        Config.from_env(dict(TTT_STEPS="1", TTT_LORA_RANK="100000"))
