"""The model against a float64 restatement, official checkpoints, and what each knob promises."""

import gc
import importlib.util
import math
import os
import sys
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from tests.conftest import random_ids, random_model
from tests.support import reference
from train_gpt import (
    GPT,
    MLP_ACTS,
    BlockedAttention,
    Config,
    RunError,
    Seen,
    head_diversity,
    load_initial_weights,
    load_weights,
    plan_layers,
    token_nats,
    training_loss,
)

BEST_1434 = dict(
    logit_softcap=15.0,
    rope_base=5000.0,
    parallel_block=True,
    mlp_act="silu2",
    encoder_layers=0,
    num_kv_heads=2,
    tie_embeddings=False,
)
CONFIGS = {
    "baseline": dict(num_layers=4),
    "nine_layers": dict(num_layers=9),
    "odd_layers": dict(num_layers=5),
    "one_layer": dict(num_layers=1),
    "untied": dict(tie_embeddings=False),
    "parallel": dict(parallel_block=True, num_layers=3),
    "best_1434": BEST_1434 | dict(num_layers=3),
    "sandwich": dict(sandwich_norm=True, num_layers=3),
    "embed_scale": dict(embed_scale=22.6),
    "encoder_0": dict(encoder_layers=0, num_layers=4),
    "encoder_1": dict(encoder_layers=1, num_layers=4),
    "encoder_3_of_4": dict(encoder_layers=3, num_layers=4),
    "encoder_all": dict(encoder_layers=4, num_layers=4),
    "one_kv_head": dict(num_kv_heads=1),
    "equal_heads": dict(num_kv_heads=4),
    "one_head": dict(num_heads=1, num_kv_heads=1),
    "softcap": dict(logit_softcap=5.0),
    "rope_base": dict(rope_base=300.0),
    "mlp_mult": dict(mlp_mult=2.6),
    "leaky_slope": dict(mlp_act="leaky_relu2", leaky_slope=0.5),
    "parallel_swiglu": dict(parallel_block=True, mlp_act="swiglu"),
} | {act: dict(mlp_act=act) for act in MLP_ACTS}


# --- the forward pass ---


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_reference(tiny, name, path):
    cfg = tiny(**CONFIGS[name])
    model, ids = random_model(cfg), random_ids(cfg, 2, 32)
    state = reference.as_float64(model.state_dict())
    expected = np.stack([reference.logits(state, row, cfg) for row in ids])
    with torch.no_grad():
        np.testing.assert_allclose(model(ids).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_logits_are_the_reference_on_a_long_sequence(tiny):
    cfg = tiny(train_seq_len=600, train_batch_tokens=600)
    model, ids = random_model(cfg), random_ids(cfg, 1, 600)
    expected = reference.logits(reference.as_float64(model.state_dict()), ids[0], cfg)
    with torch.no_grad():
        np.testing.assert_allclose(model(ids)[0].numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-5, 3e-4, 0.005, 1.0, 1e4])
def test_the_norm_is_the_reference_at_any_scale(scale):
    x = scale * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    expected = reference.rms(x.double().numpy())
    np.testing.assert_allclose(train_gpt.norm(x).numpy(), expected, rtol=1e-5, atol=1e-9)


def test_a_short_input_gives_the_same_logits_as_a_prefix(tiny):
    cfg = tiny()
    model, ids = random_model(cfg), random_ids(cfg, 2, 32)
    torch.testing.assert_close(model(ids[:, :11]), model(ids)[:, :11])


def test_bf16_logits_are_float32_and_near(tiny):
    cfg = tiny(num_layers=3)
    ids = random_ids(cfg, 2, 32)
    exact, rounded = random_model(cfg)(ids), random_model(cfg, torch.bfloat16)(ids)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


def test_a_float32_residual_stream_rounds_less_and_leaves_the_products_in_bf16(tiny):
    cfg = tiny(num_layers=3, residual_fp32=True)
    ids = random_ids(cfg, 2, 32)
    exact = random_model(cfg)(ids)
    model = random_model(cfg, torch.bfloat16)
    seen = []
    model.blocks[1].register_forward_hook(lambda block, given, made: seen.append(made[0].dtype))
    model.blocks[1].mlp.register_forward_hook(lambda mlp, given, made: seen.append(made.dtype))
    model.blocks[1].attn.register_forward_hook(lambda attn, given, made: seen.append(made[0].dtype))
    kept = model(ids)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]
    rounded = random_model(tiny(num_layers=3), torch.bfloat16)(ids)
    assert (kept - exact).square().mean() < (rounded - exact).square().mean()


def test_parameters_stay_float32_in_a_bf16_model(tiny):
    model = random_model(tiny(), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_nats_are_the_reference(tiny):
    cfg = tiny()
    model, ids, targets = random_model(cfg), random_ids(cfg, 2, 32), random_ids(cfg, 2, 32).flip(1)
    state = reference.as_float64(model.state_dict())
    expected = [reference.nats(state, *rows, cfg) for rows in zip(ids, targets, strict=True)]
    with torch.no_grad():
        np.testing.assert_allclose(token_nats(model, ids, targets).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_training_loss_is_the_mean_of_the_nats(tiny):
    cfg = tiny()
    model, ids = random_model(cfg), random_ids(cfg, 2, 32)
    objective, mean = training_loss(cfg, model)(ids, ids.flip(1))
    expected = token_nats(model, ids, ids.flip(1)).mean()
    torch.testing.assert_close((objective, mean), (expected, expected.detach()))


# --- names, shapes, checkpoints ---


def official_shapes(layers=9, dim=512, heads=8, kv_heads=4, mult=2, vocab=1024) -> dict[str, tuple[int, ...]]:
    """The state dict of the official script, tied."""
    kv_dim = dim // heads * kv_heads
    shapes = {"tok_emb.weight": (vocab, dim), "skip_weights": (layers // 2, dim)}
    for i in range(layers):
        shapes |= {
            f"blocks.{i}.attn_scale": (dim,),
            f"blocks.{i}.mlp_scale": (dim,),
            f"blocks.{i}.resid_mix": (2, dim),
            f"blocks.{i}.attn.q_gain": (heads,),
            f"blocks.{i}.attn.c_q.weight": (dim, dim),
            f"blocks.{i}.attn.c_k.weight": (kv_dim, dim),
            f"blocks.{i}.attn.c_v.weight": (kv_dim, dim),
            f"blocks.{i}.attn.proj.weight": (dim, dim),
            f"blocks.{i}.mlp.fc.weight": (mult * dim, dim),
            f"blocks.{i}.mlp.proj.weight": (dim, mult * dim),
        }
    return shapes


@pytest.fixture(scope="module")
def default_model() -> GPT:
    return GPT(Config())


def test_names_and_shapes_are_the_official_ones(default_model):
    ours = {name: tuple(tensor.shape) for name, tensor in default_model.state_dict().items()}
    assert ours == official_shapes()


def test_an_untied_model_adds_only_the_head(tiny):
    tied, untied = (GPT(tiny(tie_embeddings=tied)).state_dict() for tied in (True, False))
    assert set(untied) - set(tied) == {"lm_head.weight"} and set(tied) <= set(untied)
    assert untied["lm_head.weight"].shape == untied["tok_emb.weight"].shape


def test_parameter_count_at_defaults(default_model):
    assert sum(p.numel() for p in default_model.parameters()) == 17_059_912


def test_initial_values_are_the_official_ones(default_model):
    state = default_model.state_dict()
    zero = {name for name, tensor in state.items() if not tensor.any()}
    assert zero == {name for name in state if name.endswith("proj.weight")}
    assert state["tok_emb.weight"].std() == pytest.approx(0.005, rel=0.01)
    assert (state["blocks.3.attn.q_gain"] == 1.5).all() and (state["skip_weights"] == 1).all()
    assert (state["blocks.0.resid_mix"] == torch.tensor([[1.0], [0.0]])).all()
    bound = 1 / math.sqrt(512)  # torch's default for a linear layer
    assert state["blocks.0.attn.c_q.weight"].abs().max() == pytest.approx(bound, rel=0.01)


def test_an_untied_table_starts_at_unit_variance_and_its_head_at_zero(tiny):
    state = GPT(tiny(tie_embeddings=False)).state_dict()
    assert state["tok_emb.weight"].std() == pytest.approx(1, rel=0.05) and not state["lm_head.weight"].any()


def official_checkpoint(cfg: Config) -> dict[str, torch.Tensor]:
    """As the official script saves it: the embedding in bfloat16, the rest in float32."""
    shapes = official_shapes(
        cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, int(cfg.mlp_mult), cfg.vocab_size
    )
    generator = torch.Generator().manual_seed(3)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["tok_emb.weight"] = state["tok_emb.weight"].bfloat16()
    return state


def test_an_official_checkpoint_loads_and_computes_the_same(tiny, tmp_path):
    cfg = tiny(num_layers=4)
    state, ids = official_checkpoint(cfg), random_ids(cfg, 1, 32)
    torch.save(state, tmp_path / "final_model.pt")
    model = GPT(cfg)
    load_weights(model, load_initial_weights(str(tmp_path / "final_model.pt")), "checkpoint")
    expected = reference.logits(reference.as_float64(state), ids[0], cfg)
    with torch.no_grad():
        np.testing.assert_allclose(model(ids)[0].numpy(), expected, rtol=1e-4, atol=1e-4)


def one_line(refusal) -> str:
    text = str(refusal.value)
    assert refusal.value.code == 2 and text and "\n" not in text
    return text


@pytest.mark.parametrize("spoil, named", [
    (lambda state: state.pop("blocks.1.mlp.fc.weight"), "blocks.1.mlp.fc.weight"),
    (lambda state: state.update({"blocks.0.extra": torch.ones(3)}), "blocks.0.extra"),
    (lambda state: state.update(skip_weights=torch.ones(9, 32)), "skip_weights"),
    (lambda state: state.clear(), "tok_emb.weight"),
], ids=["missing", "unknown", "shape", "empty"])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tiny, spoil, named):
    cfg = tiny()
    state = official_checkpoint(cfg)
    spoil(state)
    with pytest.raises(RunError) as refusal:
        load_weights(GPT(cfg), state, "INIT_FROM=x.pt")
    assert named in one_line(refusal)


def test_a_refused_checkpoint_leaves_the_model_alone(tiny):
    model = random_model(tiny())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del state["blocks.1.attn.proj.weight"]
    with pytest.raises(RunError):
        load_weights(model, state, "x")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


FOREIGN = {
    "text": lambda path: path.write_text("not a checkpoint\n" * 99),
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: torch.save([torch.ones(2)], path),
    "tensor": lambda path: torch.save(torch.ones(2), path),
    "nested": lambda path: torch.save({"model": {"tok_emb.weight": torch.ones(2)}}, path),
    "numbers": lambda path: torch.save({"tok_emb.weight": 1.0}, path),
    "module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "cut": lambda path: (torch.save({"a": torch.ones(999)}, path), os.truncate(path, 900)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, kind):
    FOREIGN[kind](tmp_path / "x.pt")
    with pytest.raises(RunError) as refusal:
        load_initial_weights(str(tmp_path / "x.pt"))
    assert "INIT_FROM" in one_line(refusal)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(RunError) as refusal:
        load_initial_weights(str(tmp_path / "absent.pt"))
    assert "absent.pt" in one_line(refusal)


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    torch.save({"tok_emb.weight": torch.ones(2), "trap": Trap(tmp_path / "sprung")}, tmp_path / "x.pt")
    with pytest.raises(RunError):
        load_initial_weights(str(tmp_path / "x.pt"))
    assert not (tmp_path / "sprung").exists()


# --- causality and attention ---


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_do_not_see_the_future(tiny, name, path):
    cfg = tiny(**CONFIGS[name])
    model, ids = random_model(cfg), random_ids(cfg, 2, 32)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % cfg.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=1e-5)
    assert (after[:, 20:] - before[:, 20:]).abs().amax(dim=-1).min() > 0.01, "the change must be visible"


def qkv(length: int, dtype=torch.float32, batch=2, heads=3, size=8, kv=None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    counts = heads, kv or heads, kv or heads
    return [torch.randn(batch, n, length, size, generator=generator).to(dtype) for n in counts]


def test_blocked_attention_is_torchs_at_every_length():
    for length in range(1, 301):
        q, k, v = qkv(length, batch=1, heads=2, size=4)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(
            BlockedAttention.apply(q, k, v), expected, msg=lambda m, n=length: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 200, 256, 257, 300])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_blocked_attention_has_torchs_gradients(length, dtype, kv):
    inputs, weight = qkv(length, dtype, heads=4, kv=kv), qkv(length + 1, dtype, heads=4)[0][:, :, :length]
    grads, torchs = [], partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    for attention in (BlockedAttention.apply, torchs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        grads.append(torch.autograd.grad((attention(*leaves) * weight).sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 70), block=st.integers(1, 80))
def test_blocked_attention_does_not_depend_on_the_block(length, block):
    q, k, v = qkv(length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "QUERY_BLOCK", block)
        ours = BlockedAttention.apply(q, k, v)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_blocked_attention_in_bf16_is_near_and_keeps_the_type():
    q, k, v = qkv(150)
    ours = BlockedAttention.apply(*(x.bfloat16() for x in (q, k, v)))
    assert ours.dtype == torch.bfloat16
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.03)


# --- layers ---

LAYERS = [(layers, encoders) for layers in range(1, 11) for encoders in range(-1, layers + 1)]


@pytest.fixture(params=LAYERS, ids=lambda pair: f"{pair[1]}of{pair[0]}")
def plan(request, tiny):
    """(encoders, layer plan) of every split of up to ten layers."""
    layers, encoders = request.param
    cfg = tiny(num_layers=layers, encoder_layers=encoders)
    return (layers // 2 if encoders < 0 else encoders), plan_layers(cfg)


def test_every_block_runs_once_in_order(plan):
    assert [layer.block for layer in plan[1]] == list(range(len(plan[1])))


def test_there_are_as_many_skips_as_the_smaller_half(plan):
    encoders, layers = plan
    gates = [layer.skip for layer in layers if layer.skip is not None]
    assert gates == list(range(min(encoders, len(layers) - encoders)))


def test_skips_join_encoders_to_decoders_latest_first(plan):
    encoders, layers = plan
    joined = [(layer.number, layer.skip_from) for layer in layers if layer.skip_from is not None]
    assert joined == [(encoders + j, encoders - 1 - j) for j in range(len(joined))]
    assert all((layer.skip is None) == (layer.skip_from is None) for layer in layers)


@pytest.mark.parametrize("encoders", [0, 4])
def test_a_model_without_skips_has_an_empty_gate_and_trains(tiny, encoders):
    cfg = tiny(num_layers=4, encoder_layers=encoders)
    model, ids = random_model(cfg), random_ids(cfg, 1, 32)
    assert model.state_dict()["skip_weights"].shape == (0, cfg.model_dim)
    training_loss(cfg, model)(ids, ids.flip(1))[0].backward()
    silent = {n for n, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())}
    assert silent == set()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(tiny, name):
    cfg = tiny(**CONFIGS[name])
    model, ids = random_model(cfg), random_ids(cfg, 2, 32)
    training_loss(cfg, model)(ids, ids.flip(1))[0].backward()
    silent = {n for n, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())}
    assert silent == set()


@pytest.mark.parametrize("mult, hidden", [(2.0, 682), (3.0, 1024)])
def test_swiglu_has_two_thirds_of_the_width(mult, hidden):
    mlp = GPT(Config(mlp_act="swiglu", mlp_mult=mult, num_layers=1)).blocks[0].mlp
    shapes = [tuple(part.weight.shape) for part in (mlp.gate, mlp.fc, mlp.proj)]
    assert shapes == [(hidden, 512), (hidden, 512), (512, hidden)]


# --- head diversity ---


def diversity(model: GPT) -> torch.Tensor:
    heads = model.blocks[0].attn.q_gain.numel()
    cfg = Config(head_diversity=1.0, num_heads=heads, num_kv_heads=heads, model_dim=16 * heads)
    return head_diversity(cfg, Seen(logits=None, target_ids=None, nats=None, progress=None, model=model))


def test_head_diversity_is_the_reference(tiny):
    model = random_model(tiny(num_layers=3))
    weights = [block.attn.proj.weight.detach().double().numpy() for block in model.blocks]
    ours = diversity(model).item()
    assert ours == pytest.approx(reference.head_diversity(weights, heads=4), rel=1e-4)


@pytest.mark.parametrize("name, expected", [("equal", 1.0), ("orthogonal", 0.0)])
def test_head_diversity_at_its_ends(tiny, name, expected):
    model = random_model(tiny())
    with torch.no_grad():
        for block in model.blocks:
            part = torch.randn(32, 8)
            weight = part.repeat(1, 4) if name == "equal" else torch.eye(32)
            block.attn.proj.weight.copy_(weight)
    assert diversity(model).item() == pytest.approx(expected, abs=1e-5)


def test_head_diversity_has_a_gradient(tiny):
    model = random_model(tiny())
    diversity(model).backward()
    assert all(block.attn.proj.weight.grad.abs().max() > 1e-4 for block in model.blocks)


def test_head_diversity_of_a_new_model_is_zero_with_finite_gradients(tiny):
    model = GPT(tiny())
    value = diversity(model)
    value.backward()
    assert value.item() == 0 and all(torch.isfinite(b.attn.proj.weight.grad).all() for b in model.blocks)


# --- each model knob acts ---

ACTS = dict(
    num_layers=dict(num_layers=3),
    encoder_layers=dict(encoder_layers=0),
    model_dim=dict(model_dim=48),
    num_heads=dict(num_heads=2),
    num_kv_heads=dict(num_kv_heads=4),
    mlp_mult=dict(mlp_mult=3.0),
    mlp_act=dict(mlp_act="silu2"),
    leaky_slope=dict(mlp_act="leaky_relu2", leaky_slope=0.5),
    parallel_block=dict(parallel_block=True),
    sandwich_norm=dict(sandwich_norm=True),
    tie_embeddings=dict(tie_embeddings=False),
    rope_base=dict(rope_base=5000.0),
    logit_softcap=dict(logit_softcap=15.0),
    num_repeats=dict(num_repeats=2),
    cross_repeat_skip=dict(num_repeats=2, cross_repeat_skip=False),
    repeat_lora_rank=dict(num_repeats=2, repeat_lora_rank=2),
    num_value_embeds=dict(num_value_embeds=1),
    value_residual=dict(value_residual=True),
    xsa_last_n=dict(xsa_last_n=1),
)
# Lengths and sizes of the tables, the knob that its norm cancels, and the one that acts in bf16 alone.
ACT_ELSEWHERE = {
    "vocab_size",
    "train_seq_len",
    "residual_fp32",
    "embed_scale",
    # test_frontier.py
    "bigram_dim",
    "bigram_vocab_size",
    "gate_window",
    "ln_scale",
    "loop_end",
    "loop_start",
    "num_loops",
    "parallel_final_lane",
    "parallel_residual_start",
    "parallel_start_layer",
    "rope_dims",
    "skip_gates_enabled",
    "smear_gate_enabled",
    "sparse_attn_gate_enabled",
    "sparse_attn_gate_scale",
}


@pytest.mark.parametrize("name", ACTS)
def test_a_model_knob_changes_the_logits(tiny, name):
    base = {knob: value for knob, value in ACTS[name].items() if knob != name}
    cfg, other = tiny(**base), tiny(**ACTS[name])
    assert getattr(cfg, name) != getattr(other, name)
    ids = random_ids(cfg, 2, 32)
    with torch.no_grad():
        difference = (random_model(cfg)(ids) - random_model(other)(ids)).abs().max()
    assert difference > 1e-3


def test_no_model_knob_is_left_untested():
    known = {f.name for f in fields(Config) if f.metadata["role"] == "model"}
    ideas = {f.name for f in fields(Config) if f.metadata["fate"]}  # test_ideas.py
    assert known - ideas == (set(ACTS) | ACT_ELSEWHERE) - ideas


def test_the_initial_gain_changes_the_logits(tiny):
    models = [random_model(tiny(qk_gain_init=gain)) for gain in (1.5, 2.0)]
    ids = random_ids(tiny(), 1, 32)
    assert (models[0](ids) - models[1](ids)).abs().max() > 1e-3


def test_the_initial_std_is_the_knobs(tiny):
    torch.manual_seed(0)
    assert GPT(tiny(tied_embed_init_std=0.3)).tok_emb.weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_the_vocabulary_sets_the_logits(tiny):
    cfg = tiny(vocab_size=500)
    assert GPT(cfg)(random_ids(cfg, 1, 32)).shape == (1, 32, 500)


def test_embed_scale_is_all_but_cancelled(tiny):
    outputs = []
    for scale in (0.0, 22.6):
        torch.manual_seed(0)
        cfg = tiny(embed_scale=scale)
        outputs.append(GPT(cfg)(random_ids(cfg, 2, 32)))
    change = (outputs[1] - outputs[0]).square().mean().sqrt() / outputs[0].square().mean().sqrt()
    assert 0 < change < 0.003


def test_a_softcap_bounds_the_logits(tiny):
    cfg = tiny(logit_softcap=3.0)
    assert random_model(cfg)(random_ids(cfg, 1, 32)).abs().max() <= 3


def test_a_second_copy_of_the_script_leaves_the_first_its_operation(tiny):
    """Registered again, the first one would be destroyed, and memory that is freed would be read."""
    operation = torch.ops.golf.causal_softmax_.default
    model, ids = random_model(tiny()), random_ids(tiny(), 1, 32)
    before = model(ids)
    spec = importlib.util.spec_from_file_location("second_copy", train_gpt.__file__)
    copy = importlib.util.module_from_spec(spec)
    sys.modules["second_copy"] = copy
    try:
        spec.loader.exec_module(copy)
        assert copy.causal_softmax_piece is operation and torch.ops.golf.causal_softmax_.default is operation
    finally:
        del sys.modules["second_copy"]
    del copy
    gc.collect()
    assert torch.equal(model(ids), before)
