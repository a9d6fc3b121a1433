"""PACK_DOCUMENTS: what a row of several documents gives is what each of them gives alone."""

import itertools
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

import train_gpt
from tests.conftest import BOS, Traced, random_ids, random_model
from tests.test_frontier import PR_1394, PR_1855
from train_gpt import (
    GPT,
    Config,
    Documents,
    Optimisers,
    Run,
    RunError,
    RunLog,
    Runtime,
    attend,
    cross_entropy,
    norm,
    plan_step,
    token_nats,
    train_step,
    training_loss,
)

PACKED = dict(pack_documents=True, train_seq_len=40, train_batch_tokens=400)
STARTS = [0, 5, 13, 14, 15, 31]  # of the documents in a row of 40 tokens; the first is the rest of one
MODELS = {
    "1394": PR_1394,
    "1855": PR_1855,
    "repeats": dict(num_repeats=2, num_value_embeds=1, value_residual=True),
    "recycled": dict(attn_recycle=True, xsa_last_n=1),
}


def row_of(cfg: Config) -> torch.Tensor:
    """ids [1, 40]."""
    ids = random_ids(cfg, 1, 40)
    ids[ids == BOS] = BOS + 5
    ids[0, STARTS[1:]] = BOS
    return ids


def packed_logits(model: GPT, ids: torch.Tensor, phase: int = -1) -> torch.Tensor:
    return model.logits(norm(model.embed(ids)), ids, phase=phase, documents=Documents.of(ids))


@pytest.mark.parametrize("name", MODELS)
def test_a_row_gives_what_each_document_gives_alone(tiny, path, name):
    """Logits and gradients, on both attention paths."""
    cfg = tiny(**MODELS[name], **PACKED)
    model = random_model(cfg, torch.float64).double()
    ids = row_of(cfg)
    targets = ids.roll(-1, 1)
    together = packed_logits(model, ids)
    cross_entropy(together, targets).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for start, end in itertools.pairwise([*STARTS, ids.size(1)]):
        alone = model(ids[:, start:end])
        torch.testing.assert_close(together[:, start:end], alone, rtol=0, atol=2e-5)
        cross_entropy(alone, targets[:, start:end]).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_no_token_sees_another_document(tiny, path):
    cfg = tiny(**PR_1855, **PACKED)
    model = random_model(cfg)
    ids = row_of(cfg)
    changed = ids.clone()
    changed[0, 6:13] = (changed[0, 6:13] + 7) % 300 + 4
    with torch.no_grad():
        before, after = packed_logits(model, ids), packed_logits(model, changed)
        across = (model(ids) - model(changed))[0].abs().amax(-1)
    moved = (before - after)[0].abs().amax(-1) > 0
    assert moved[6:13].all() and not moved[:6].any() and not moved[13:].any()
    assert across[13:].min() > 1e-4  # as it is without


def test_training_packs_and_scores_do_not(tiny):
    cfg = tiny(**PR_1855, **PACKED)
    model = random_model(cfg)
    ids = row_of(cfg)
    targets = ids.roll(-1, 1)
    with torch.no_grad():
        packed = training_loss(cfg, model)(ids, targets)[0]
        whole = training_loss(replace(cfg, pack_documents=False), model)(ids, targets)[0]
        expected = cross_entropy(packed_logits(model, ids), targets).mean()
        scored = token_nats(model, ids, targets).mean()
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole, scored, rtol=1e-6, atol=0)
    assert abs(packed - whole) > 1e-3


def test_borders_are_those_of_each_row(tiny):
    ids = torch.tensor([[7, BOS, BOS, 8], [9, 9, 9, 9]])
    assert Documents.of(ids).numbers.tolist() == [[0, 1, 2, 2], [0, 0, 0, 0]]


def test_micro_batches_of_any_size_train_the_same(tiny):
    """One row at a time, and all eight."""
    weights = []
    for rows in (1, 8):
        cfg = tiny(**PR_1855, pack_documents=True, train_batch_tokens=256)
        run = Run(cfg, Runtime(), RunLog(None, ""), random_model(cfg), None)
        ids = random_ids(cfg, 8, 33)
        ids[:, [0, 9, 20]] = BOS
        optimisers = Optimisers(cfg, run.model, run.runtime)
        train_step(run, optimisers, (ids[:, :-1], ids[:, 1:]), plan_step(cfg, 0, 0.0, 0.0), rows)
        weights.append(run.model.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_rows_of_any_documents_are_one_graph(tiny):
    cfg = tiny(**PR_1394, pack_documents=True)
    runtime = Traced()
    loss = runtime.compile(training_loss(cfg, random_model(cfg)))
    dials = plan_step(cfg, 0, 0.0, 0.0).dials(torch.device("cpu"))
    for starts in ([3], [3, 4, 30], []):
        ids = random_ids(cfg, 2, 32)
        ids[:, starts] = BOS
        loss(ids, ids.roll(-1, 1), dials)[0].backward()
    assert runtime.graphs == 1


# --- FlashAttention-3, which is not here ---


@pytest.mark.parametrize("returns_sums", [False, True])
def test_flash_attention_3_gets_the_bounds_of_documents(monkeypatch, returns_sums):
    """Its function for documents takes and gives [tokens, H, D]; played document by document."""
    calls = []

    def of_documents(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic):
        assert causal and not deterministic and max_seqlen_q == max_seqlen_k == 32
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        calls.append(cu_seqlens_q.tolist())
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        pieces = []
        for begin, end in zip(calls[-1], calls[-1][1:], strict=False):
            rows = (x[begin:end].transpose(0, 1) for x in (q, k, v))
            pieces.append(F.scaled_dot_product_attention(*rows, is_causal=True).transpose(0, 1))
        y = torch.cat(pieces)
        return (y, None) if returns_sums else y

    q = torch.randn(2, 4, 32, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 32, 8, dtype=torch.float64).unbind()
    ids = torch.full((2, 32), 9)
    ids[0, [0, 7]] = BOS
    ids[1, [20]] = BOS
    expected = attend(q, k, v, Documents.of(ids))
    monkeypatch.setattr(train_gpt, "flash_attention_3_of_documents", of_documents)
    monkeypatch.setattr(train_gpt, "has_flash_attention_3", lambda device: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(train_gpt, "LONGEST_BLOCKED", 0)
    torch.testing.assert_close(attend(q, k, v, Documents.of(ids)), expected)
    # Room for 32 / 16 + 1 documents a row, the last two empty.
    assert calls == [[0, 7, 32, 52, 64, 64, 64]]


def test_more_documents_than_flash_attention_3_has_room_for_are_refused():
    ids = torch.full((2, 64), 9)
    ids[1, :4] = BOS
    train_gpt.refuse_short_documents(ids)
    ids[1, 4] = BOS
    with pytest.raises(RunError, match="64 tokens begins more than 4 documents.*PACK_DOCUMENTS=1.*unset it"):
        train_gpt.refuse_short_documents(ids)


# --- FlexAttention, whose kernels are for GPUs; its own float64 code runs here ---


@pytest.fixture
def as_on_ampere(monkeypatch):
    """Code takes the CPU for a GPU from sm_80 on, and itself for compiled."""
    monkeypatch.setattr(train_gpt, "is_ampere_or_newer", lambda device: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(train_gpt, "LONGEST_BLOCKED", 0)


def two_rows_of_documents() -> torch.Tensor:
    """Ids [2, 384]: documents shorter than a block of FlexAttention, and longer ones."""
    ids = torch.full((2, 384), 9)
    ids[0, [0, 7, 130, 131]] = BOS
    ids[1, [20, 256]] = BOS
    return ids


def test_flex_attention_reads_what_the_mask_lets_it_read(as_on_ampere):
    documents = Documents.of(two_rows_of_documents())
    blocks = documents.blocks
    shown = create_mask(blocks.mask_mod, 2, 1, 384, 384, device="cpu")
    assert torch.equal(shown, documents.mask())
    by_block = documents.mask().view(2, 1, 3, 128, 3, 128).any(dim=(3, 5))
    assert torch.equal(blocks.to_dense().bool(), by_block)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_what_the_mask_gives(as_on_ampere, monkeypatch, key_heads):
    """In float64, the heads grouped too. Its gradients are its own affair: on a CPU it has none."""
    documents = Documents.of(two_rows_of_documents())
    torch.manual_seed(5)
    q = torch.randn(2, 4, 384, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, key_heads, 384, 16, dtype=torch.float64)
    asked = []
    flex = train_gpt.flex_attention
    monkeypatch.setattr(train_gpt, "flex_attention", lambda *x, **how: asked.append(how) or flex(*x, **how))
    found, expected = (attend(q, k, v, documents._replace(blocks=b)) for b in (documents.blocks, None))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert [how["block_mask"] for how in asked] == [documents.blocks]


def test_flex_attention_is_left_out_where_it_has_no_kernel(as_on_ampere, monkeypatch):
    ids = two_rows_of_documents()
    assert Documents.of(ids).blocks is not None
    assert Documents.of(ids[:, :200]).blocks is None  # no whole blocks of 128
    odd = torch.zeros(2, 1, 384, 24)  # a head size that torch 2.5 does not take
    monkeypatch.setattr(train_gpt, "flex_attention", None)
    assert attend(odd, odd, odd, Documents.of(ids)).shape == odd.shape
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert Documents.of(ids).blocks is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(train_gpt, "is_ampere_or_newer", lambda device: False)
    assert Documents.of(ids).blocks is None


# --- #1855's own model ---


@pytest.mark.skipif(
    "FRONTIER_REFERENCE" not in os.environ,
    reason="FRONTIER_REFERENCE: a file with the weights, tokens, losses and gradients of #1855's model",
)
@pytest.mark.parametrize("name", ["plain dense", "plain packed", "looped dense", "looped packed"])
def test_losses_and_gradients_are_those_of_the_record(name):
    """Its rows are longer than its windows: a document longer than 16 tokens is cut there."""
    given = torch.load(os.environ["FRONTIER_REFERENCE"], weights_only=True)
    sizes = dict(vocab_size=256, num_layers=11, model_dim=64, num_heads=4, num_kv_heads=2, train_seq_len=64)
    cfg = Config(**PR_1855 | sizes | dict(rope_dims=8, gate_window=12, parallel_start_layer=8, loop_start=3,
                 loop_end=5, train_batch_tokens=64))  # fmt: skip
    model = GPT(cfg)
    model.load_state_dict(given["state"])
    ids = given["ids"]
    documents = None
    if "packed" in name:
        places = torch.arange(ids.size(1))
        documents = Documents(torch.bucketize(places, given["segments"].long(), right=True)[None], None)
    x0 = norm(model.embed(ids))
    logits = model.logits(x0, ids, phase=-1 if "looped" in name else -2, documents=documents)
    loss = cross_entropy(logits, given["targets"]).mean()
    loss.backward()
    expected = given["results"][name]
    assert loss.item() == pytest.approx(expected["loss"], abs=2e-6)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for weight, gradient in expected["grads"].items():
        found = gradients.get(weight, torch.zeros_like(gradient))
        torch.testing.assert_close(found, gradient, rtol=0, atol=3e-7, msg=weight)
