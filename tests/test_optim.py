"""Muon against float64, roles and rates of every parameter, the flat gradient buffer, ranks, liveness."""

import threading
from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from tests.conftest import random_model
from tests.support import reference
from train_gpt import (
    GPT,
    Config,
    Muon,
    Optimisers,
    Run,
    RunError,
    RunLog,
    Runtime,
    StepPlan,
    TokenStream,
    newton_schulz,
    plan_step,
    polar_express,
    train,
    train_step,
    training_loss,
    warm_up,
    weights_of,
)

SHAPES = {"tall": (24, 8), "wide": (8, 24), "square": (16, 16)}
CONFIGS = {
    "tied": {},
    "untied": dict(tie_embeddings=False),
    "swiglu": dict(mlp_act="swiglu"),
    "no_skips": dict(encoder_layers=0),
    "parallel": dict(parallel_block=True, tie_embeddings=False, encoder_layers=2),
    "one_layer": dict(num_layers=1),
    "no_control_names": dict(control_tensor_name_patterns=()),
    "own_control_names": dict(control_tensor_name_patterns=("mlp", "q_gain")),
}


def make(cfg: Config, runtime=None) -> tuple[Run, Optimisers]:
    """A randomised model with its optimisers, ready for train_step; logs nothing."""
    runtime = runtime or Runtime()
    run = Run(cfg, runtime, RunLog(None, "x"), random_model(cfg), data=None)
    return run, Optimisers(cfg, run.model, runtime)


def batch_of(cfg: Config, step: int = 0, sequences: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(
        cfg.vocab_size, (sequences or cfg.sequences, cfg.train_seq_len + 1), generator=generator
    )
    return tokens[:, :-1], tokens[:, 1:]


def named_groups(cfg: Config) -> dict[str, dict]:
    """Parameter name -> the optimiser group that holds it."""
    run, optimisers = make(cfg)
    names = {id(p): name for name, p in run.model.named_parameters()}
    groups = [group for optimiser in optimisers.both for group in optimiser.param_groups]
    return {names[id(p)]: group for group in groups for p in group["params"]}


# --- Muon ---


def stepped(weights: list[torch.Tensor], grads: list[list[torch.Tensor]], decay=0.0, runtime=None, **knobs):
    """The weights after one Muon step per entry of `grads`, at learning rate 0.1 and momentum 0.9."""
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    cfg = replace(Config(), **dict(matrix_lr=0.1, muon_momentum=0.9) | knobs)
    muon = Muon(params, cfg, runtime or Runtime())
    muon.param_groups[0]["weight_decay"] = decay
    for step, step_grads in enumerate(grads):
        for p, grad in zip(params, step_grads, strict=True):
            p.grad = grad.clone()
        muon.param_groups[0]["step"] = step
        muon.step()
    return [p.detach() for p in params]


def random_stack(shapes, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# name -> (knobs of ours, decay, what the reference calls them)
RULES = dict(
    plain=({}, 0.0, {}),
    no_momentum=(dict(muon_momentum=0.0), 0.0, dict(momentum=0.0)),
    decay=({}, 0.2, dict(decay=0.2)),
    rows=(dict(muon_row_normalize=True), 0.0, dict(rows=True)),
    polar=(dict(polar_express=True), 0.0, dict(polar=True)),
    polar_three=(dict(polar_express=True, muon_backend_steps=3), 0.0, dict(polar=True, steps=3)),
    frontier=(
        dict(polar_express=True, muon_row_normalize=True, muon_momentum=0.97),
        0.095,
        dict(polar=True, rows=True, momentum=0.97, decay=0.095),
    ),
    cautious=(dict(cautious_wd=True, muon_wd=0.2), 0.2, dict(decay=0.2, cautious=True)),
    normuon=(dict(muon_beta2=0.7), 0.0, dict(normuon=0.7)),
    soap=(dict(soap_beta2=0.8, soap_every=2), 0.0, dict(soap=0.8, every=2)),
    soap_once=(dict(soap_beta2=0.8), 0.0, dict(soap=0.8)),
    all=(
        dict(polar_express=True, muon_row_normalize=True, muon_beta2=0.7, soap_beta2=0.8, soap_every=1)
        | dict(cautious_wd=True, muon_wd=0.2),
        0.2,
        dict(polar=True, rows=True, normuon=0.7, soap=0.8, every=1, decay=0.2, cautious=True),
    ),
)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_five_steps_are_the_reference(shape, rule):
    knobs, decay, reference_knobs = RULES[rule]
    (weight,), grads = random_stack([shape], 0), [random_stack([shape], seed) for seed in range(1, 6)]
    expected = reference.MuonReference(weight.double().numpy(), **reference_knobs)
    for (grad,) in grads:
        expected.step(grad.double().numpy())
    ours = stepped([weight], grads, decay, **knobs)[0]
    np.testing.assert_allclose(ours.numpy(), expected.weight, atol=1e-3)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("plain", "polar_three")])
def test_the_references_differ_by_more_than_the_tolerance(rule):
    """Or the test above could not tell one rule from another."""
    (weight,), grads = random_stack([(24, 8)], 0), [random_stack([(24, 8)], seed) for seed in range(1, 6)]
    ends = []
    for knobs in ({}, RULES[rule][2]):
        one = reference.MuonReference(weight.double().numpy(), **knobs)
        ends.append([one.step(grad.double().numpy()) for (grad,) in grads][-1])
    assert np.abs(ends[1] - ends[0]).max() > 0.01


@pytest.mark.parametrize("steps", range(6))
def test_polar_express_has_the_published_triples(steps):
    """To 1e-6, in float64: beside these the two differ in nothing but how the product is taken."""
    (matrix,) = random_stack([(12, 20)], 7)
    ours = polar_express(matrix[None].double(), steps, torch.float64)[0]
    expected = reference.polar_express(matrix.double().numpy(), steps)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6, rtol=1e-6)


def test_polar_express_brings_small_singular_values_nearer_to_one_than_newton_schulz():
    left, right = (torch.linalg.qr(x.double())[0] for x in random_stack([(32, 32), (32, 32)], 5))
    matrix = left @ torch.diag(torch.logspace(-3, 0, 32, dtype=torch.float64)) @ right
    errors = []
    for rule in (newton_schulz, polar_express):
        values = torch.linalg.svdvals(rule(matrix[None], 5, torch.float64)[0])
        errors.append((values - 1).abs().max().item())
    assert errors[1] < errors[0]


def test_more_iterations_than_polar_express_has_are_refused(tiny):
    with pytest.raises(RunError, match="MUON_BACKEND_STEPS=6 but POLAR_EXPRESS=1 has 5 iterations"):
        tiny(polar_express=True, muon_backend_steps=6)
    assert tiny(muon_backend_steps=6).muon_backend_steps == 6


@pytest.mark.parametrize("steps", [0, 1, 3, 10])
def test_the_iteration_count_is_the_knobs(steps):
    (matrix,) = random_stack([(12, 20)], 7)
    ours = newton_schulz(matrix[None], steps, torch.float32)[0]
    expected = reference.newton_schulz(matrix.double().numpy(), steps)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-3)


def test_a_stack_steps_as_its_matrices_one_by_one():
    shapes = [*SHAPES.values()] * 3
    weights, grads = random_stack(shapes, 0), [random_stack(shapes, seed) for seed in (1, 2)]
    together = stepped(weights, grads)
    alone = [stepped([weights[i]], [[step[i]] for step in grads])[0] for i in range(len(shapes))]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (40, 60)])
def test_singular_values_come_near_one(shape):
    (matrix,) = random_stack([shape], 4)
    values = torch.linalg.svdvals(newton_schulz(matrix[None], 5, torch.float32)[0])
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    (matrix,) = random_stack([(16, 24)], 4)
    small, usual = (newton_schulz(x[None], 5, torch.float32) for x in (scale * matrix, matrix))
    torch.testing.assert_close(small, usual, rtol=2e-2, atol=2e-2)


def test_bf16_orthogonalises_nearly_as_well():
    (matrix,) = random_stack([(16, 64)], 4)
    values = torch.linalg.svdvals(newton_schulz(matrix[None], 5, torch.bfloat16)[0].float())
    assert values.min() > 0.55 and values.max() < 1.35


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_gradient_moves_nothing_but_by_decay(rule):
    knobs, decay, _ = RULES[rule]
    weights = random_stack(SHAPES.values(), 0)
    zeros = [torch.zeros_like(weight) for weight in weights]
    left = [(1 - 0.1 * decay) * weight for weight in weights]
    torch.testing.assert_close(stepped(weights, [zeros], decay, **knobs), left)


def test_a_gradient_that_is_not_finite_shows_in_the_weights():
    """Instead of ending the run inside an eigenvector routine, before the check that names the step."""
    weights = random_stack([(8, 24)], 0)
    ours = stepped(weights, [[torch.full((8, 24), torch.nan)]] * 2, soap_beta2=0.9, soap_every=1)
    assert ours[0].isnan().all()


# --- decay of Adam's roles ---


def test_adams_decay_is_the_reference(tiny):
    """Three steps of embedding, head and scalars, with gradients of our own."""
    cfg = tiny(tie_embeddings=False, embed_wd=0.3, adam_wd=0.2, beta2=0.99, scalar_lr=0.03, embed_lr=0.07)
    decays = dict(embed=(0.07, 0.3), head=(cfg.head_lr, 0.0), scalar=(0.03, 0.2))
    _, optimisers = make(cfg)
    weights = [weight for weight in optimisers.weights if weight.role != "matrix"]
    expected = {weight.name: (weight.param.detach().double().numpy(), 0.0, 0.0) for weight in weights}
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        for weight in weights:
            weight.param.grad.copy_(torch.randn(weight.param.shape, generator=generator))
            lr, decay = decays[weight.role]
            expected[weight.name] = reference.adamw_step(
                expected[weight.name][0], weight.param.grad.double().numpy(), *expected[weight.name][1:],
                step + 1, 0.5 * lr, (0.9, 0.99), 1e-8, decay,
            )  # fmt: skip
        optimisers.step(StepPlan(0.0, 0.5, 0.9, step))
    assert {weight.role for weight in weights} == set(decays)
    for weight in weights:
        np.testing.assert_allclose(weight.param.detach().numpy(), expected[weight.name][0], atol=1e-5)


# --- roles and rates ---


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_exactly_one_role(tiny, name):
    cfg = tiny(**CONFIGS[name])
    model = random_model(cfg)
    held = [id(w.param) for w in weights_of(cfg, model)]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.numel())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_stepped_once_and_moves(tiny, name):
    cfg = tiny(**CONFIGS[name])
    run, optimisers = make(cfg)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    train_step(run, optimisers, batch_of(cfg), StepPlan(0.0, 1.0, 0.9), 99)
    still = [n for n, p in run.model.named_parameters() if p.numel() and torch.equal(p, before[n])]
    assert still == []


def test_without_matrices_everything_is_adams(tiny):
    cfg = tiny(control_tensor_name_patterns=("blocks",))
    run, optimisers = make(cfg)
    before = run.model.blocks[0].mlp.fc.weight.detach().clone()
    train_step(run, optimisers, batch_of(cfg), StepPlan(0.0, 1.0, 0.9), 99)
    assert (run.model.blocks[0].mlp.fc.weight - before).abs().max() > 0


RATES = dict(embed_lr=0.11, head_lr=0.22, tied_embed_lr=0.33, matrix_lr=0.44, scalar_lr=0.55)


@pytest.mark.parametrize("tied, name, rate", [
    (True, "tok_emb.weight", 0.33), (False, "tok_emb.weight", 0.11), (False, "lm_head.weight", 0.22),
    (True, "blocks.0.attn.c_k.weight", 0.44), (True, "blocks.1.mlp.proj.weight", 0.44),
    (True, "blocks.0.resid_mix", 0.55), (True, "blocks.0.attn.q_gain", 0.55), (True, "skip_weights", 0.55),
    (False, "blocks.1.mlp_scale", 0.55),
])  # fmt: skip
def test_the_rate_of_each_role(tiny, tied, name, rate):
    group = named_groups(tiny(tie_embeddings=tied, **RATES))[name]
    assert group["lr"] == group["base_lr"] == rate


def test_the_gate_of_swiglu_is_muons(tiny):
    assert named_groups(tiny(mlp_act="swiglu", **RATES))["blocks.0.mlp.gate.weight"]["base_lr"] == 0.44


def test_adam_has_the_knobs_constants(tiny):
    group = named_groups(tiny(beta1=0.8, beta2=0.7, adam_eps=1e-5))["tok_emb.weight"]
    assert group["betas"] == (0.8, 0.7) and group["eps"] == 1e-5 and group["weight_decay"] == 0


def test_the_plan_sets_every_rate_and_the_momentum(tiny):
    cfg = tiny(tie_embeddings=False)
    run, optimisers = make(cfg)
    train_step(run, optimisers, batch_of(cfg), StepPlan(0.5, 0.25, 0.61), 99)
    groups = [group for optimiser in optimisers.both for group in optimiser.param_groups]
    assert [group["lr"] for group in groups] == [0.25 * group["base_lr"] for group in groups]
    assert optimisers.muon.param_groups[0]["momentum"] == 0.61


def test_at_lr_scale_zero_nothing_moves(tiny):
    cfg = tiny()
    run, optimisers = make(cfg)
    before = deepcopy(run.model.state_dict())
    train_step(run, optimisers, batch_of(cfg), StepPlan(1.0, 0.0, 0.9), 99)
    torch.testing.assert_close(run.model.state_dict(), before, rtol=0, atol=0)


# --- gradients ---


def plain_gradients(cfg: Config, batch) -> list[torch.Tensor]:
    model = random_model(cfg)
    objective, _ = training_loss(cfg, model)(*batch)
    return torch.autograd.grad(objective, [p for p in model.parameters() if p.numel()])


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_gradients_do_not_depend_on_the_micro_batch(tiny, limit):
    cfg = tiny(train_batch_tokens=160)  # 5 sequences, so parts of unequal size
    run, optimisers = make(cfg)
    loss = train_step(run, optimisers, batch_of(cfg), StepPlan(0.0, 0.0, 0.9), limit)
    ours = [p.grad for p in run.model.parameters() if p.numel()]
    torch.testing.assert_close(tuple(ours), plain_gradients(cfg, batch_of(cfg)), rtol=1e-3, atol=1e-6)
    expected = training_loss(cfg, run.model)(*batch_of(cfg))[1]
    torch.testing.assert_close(loss, expected)


def test_the_flat_buffer_is_what_backward_fills(tiny):
    cfg = tiny()
    run, optimisers = make(cfg)
    run.loss(*batch_of(cfg))[0].backward()
    held = [p for o in optimisers.both for group in o.param_groups for p in group["params"]]
    torch.testing.assert_close(optimisers.flat, torch.cat([p.grad.flatten() for p in held]), rtol=0, atol=0)
    optimisers.flat.fill_(7.0)
    assert all((p.grad == 7).all() for p in held)


def test_the_buffer_is_cleared_between_steps(tiny):
    cfg = tiny()
    run, optimisers = make(cfg)
    for _ in range(2):
        train_step(run, optimisers, batch_of(cfg), StepPlan(0.0, 0.0, 0.9), 99)
    ours = [p.grad for p in run.model.parameters() if p.numel()]
    torch.testing.assert_close(tuple(ours), plain_gradients(cfg, batch_of(cfg)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip, shrinks", [(0.01, True), (1e6, False), (0.0, False)])
def test_the_gradient_is_clipped_as_a_whole(tiny, clip, shrinks):
    cfg = tiny(grad_clip_norm=clip)
    run, optimisers = make(cfg)
    train_step(run, optimisers, batch_of(cfg), StepPlan(0.0, 0.0, 0.9), 99)
    whole = torch.cat([g.flatten() for g in plain_gradients(cfg, batch_of(cfg))]).norm().item()
    assert whole > 0.1
    assert optimisers.flat.norm().item() == pytest.approx(clip if shrinks else whole, rel=1e-3)


# --- state ---

MUON_RULES = dict(
    polar_express=True, muon_row_normalize=True, muon_beta2=0.95, cautious_wd=True, muon_wd=0.1, embed_wd=0.1,
    adam_wd=0.1,
)  # fmt: skip


def run_steps(run: Run, optimisers: Optimisers, steps: range) -> None:
    for step in steps:
        plan = plan_step(run.cfg, step, 0.0, 0.0)
        train_step(run, optimisers, batch_of(run.cfg, step), plan, 99)


@pytest.mark.parametrize("knobs", [{}, MUON_RULES, dict(soap_beta2=0.9, soap_every=2)])
def test_saved_state_continues_the_same_run(tiny, knobs):
    cfg = tiny(**knobs)
    run, optimisers = make(cfg)
    run_steps(run, optimisers, range(3))
    weights, state = deepcopy((run.model.state_dict(), optimisers.state()))
    run_steps(run, optimisers, range(3, 5))
    again, fresh = make(cfg)
    again.model.load_state_dict(weights)
    fresh.load(state)
    run_steps(again, fresh, range(3, 5))
    torch.testing.assert_close(again.model.state_dict(), run.model.state_dict(), rtol=0, atol=0)


def test_warm_up_leaves_no_trace(tiny, dataset):
    cfg = tiny(warmup_steps=3, data_path=str(dataset))
    run, optimisers = make(cfg)
    weights, random_state = deepcopy(run.model.state_dict()), torch.get_rng_state()
    warm_up(run, optimisers, TokenStream(cfg.data_path, "train", cfg.vocab_size))
    torch.testing.assert_close(run.model.state_dict(), weights, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not optimisers.adam.state
    assert all(not state["momentum_buffer"].any() for state in optimisers.muon.state.values())


@pytest.mark.parametrize(
    "knobs", [{}, MUON_RULES | dict(soap_beta2=0.9, soap_every=2)], ids=["plain", "rules"]
)
def test_warm_up_does_not_change_the_training(tiny, dataset, knobs):
    finals = []
    for warmup_steps in (0, 2):
        cfg = tiny(warmup_steps=warmup_steps, data_path=str(dataset), iterations=4, **knobs)
        run, optimisers = make(cfg)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train_gpt.validate", lambda *_: None)
            train(run, optimisers, TokenStream(cfg.data_path, "train", cfg.vocab_size))
        finals.append(run.model.state_dict())
    torch.testing.assert_close(finals[1], finals[0], rtol=0, atol=0)


# --- ranks ---


class Exchange:
    """What a collective does for threads that each play a rank."""

    def __init__(self, ranks: int):
        self.parts: list = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)


class Rank(Runtime):
    """A rank whose `sum` meets the other threads instead of a process group."""

    def __init__(self, rank: int, exchange: Exchange):
        super().__init__(rank=rank, world_size=len(exchange.parts))
        self.exchange = exchange

    def sum(self, tensor):
        self.exchange.parts[self.rank] = tensor.clone()
        self.exchange.barrier.wait()
        total = torch.stack(self.exchange.parts).sum(0)
        self.exchange.barrier.wait()
        return tensor.copy_(total)


def train_on(ranks: int, cfg: Config, steps: int) -> list[tuple[Run, Optimisers]]:
    """Train the same steps on `ranks` threads, each with its share of every batch."""
    exchange = Exchange(ranks)
    made = [make(cfg, Rank(rank, exchange)) for rank in range(ranks)]

    def work(run: Run, optimisers: Optimisers) -> None:
        mine = list(run.runtime.share(cfg.sequences))
        for step in range(steps):
            batch = tuple(part[mine] for part in batch_of(cfg, step))
            train_step(run, optimisers, batch, plan_step(cfg, step, 0.0, 0.0), 2)

    threads = [threading.Thread(target=work, args=pair) for pair in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


RANK_CASES = [
    (2, {}), (3, {}), (2, dict(grad_clip_norm=0.1)), (4, dict(train_batch_tokens=96)), (2, MUON_RULES),
]  # fmt: skip


@pytest.mark.parametrize(
    "ranks, knobs", RANK_CASES, ids=["two", "three", "clipped", "more_than_sequences", "rules"]
)
def test_any_number_of_ranks_makes_the_same_update(tiny, ranks, knobs):
    cfg = tiny(tie_embeddings=False, **knobs)
    (one, _), *_ = train_on(1, cfg, 2)
    (many, _), *_ = train_on(ranks, cfg, 2)
    torch.testing.assert_close(many.model.state_dict(), one.model.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", ["frontier", "normuon", "soap", "all"])
def test_ranks_share_the_matrices_and_what_is_remembered_of_them(rule):
    """From the same summed gradients. Eigenvectors enlarge what the order of that sum changes."""
    knobs, decay, _ = RULES[rule]
    shapes = [*SHAPES.values(), (8, 24)]
    weights, grads = random_stack(shapes, 0), [random_stack(shapes, seed) for seed in range(1, 4)]
    alone = stepped(weights, grads, decay, **knobs)
    exchange, ends = Exchange(2), {}

    def work(rank: int) -> None:
        ends[rank] = stepped(weights, grads, decay, Rank(rank, exchange), **knobs)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    torch.testing.assert_close(ends[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("knobs, sent", [({}, torch.bfloat16), (dict(muon_beta2=0.9), torch.float32)])
def test_updates_lose_nothing_on_their_way_to_other_ranks(knobs, sent):
    """Where they are made in 16 bits they are sent so; each shape once, or stacks would differ in size."""
    shapes = [(8, 24), (24, 8), (16, 16), (4, 12)]
    weights, grads = random_stack(shapes, 0), [random_stack(shapes, seed) for seed in range(1, 4)]
    alone = stepped(weights, grads, 0.1, Runtime(dtype=torch.bfloat16), **knobs)
    exchange, ends = Exchange(2), {}
    ranks = [Rank(rank, exchange) for rank in range(2)]

    def work(rank: Rank) -> None:
        rank.dtype = torch.bfloat16
        ends[rank.rank] = stepped(weights, grads, 0.1, rank, **knobs)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {part.dtype for part in exchange.parts} == {sent}
    torch.testing.assert_close(ends[0], alone, rtol=0, atol=0)
    torch.testing.assert_close(ends[1], alone, rtol=0, atol=0)


def test_all_ranks_hold_the_same_weights(tiny):
    (first, _), *others = train_on(3, tiny(), 2)
    for other, _ in others:
        torch.testing.assert_close(other.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)


def test_each_matrix_is_orthogonalised_by_one_rank(tiny):
    made = train_on(3, tiny(), 1)
    matrices = len(made[0][1].muon.param_groups[0]["params"])
    counts = [len(optimisers.muon.state) for _, optimisers in made]
    assert sum(counts) == matrices and max(counts) - min(counts) <= 1


# --- each training knob acts ---


def trajectory(cfg: Config, steps: int = 4) -> torch.Tensor:
    """All weights after a few steps from a seeded, not randomised, model."""
    torch.manual_seed(0)
    runtime = Runtime()
    run = Run(cfg, runtime, RunLog(None, "x"), GPT(cfg), data=None)
    run_steps(run, Optimisers(cfg, run.model, runtime), range(steps))
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


# knob -> (base, what differs)
UNTIED, COSINE = dict(tie_embeddings=False), dict(cosine_lr=True)
ACTS = dict(
    embed_lr=(UNTIED, 0.3),
    head_lr=(UNTIED, 0.004),
    tied_embed_lr=({}, 0.03),
    tied_embed_init_std=({}, 0.01),
    qk_gain_init=({}, 2.0),
    matrix_lr=({}, 0.02),
    scalar_lr=({}, 0.02),
    muon_momentum=({}, 0.9),
    muon_backend_steps=({}, 4),
    muon_momentum_warmup_start=({}, 0.8),
    muon_momentum_warmup_steps=({}, 7),
    beta1=({}, 0.8),
    beta2=({}, 0.9),
    adam_eps=({}, 1e-3),
    grad_clip_norm=({}, 0.05),
    control_tensor_name_patterns=({}, ("q_gain",)),
    head_diversity=({}, 1.0),
    warmdown_iters=({}, 18),
    tidal_lr=({}, True),
    tidal_warmup=(dict(tidal_lr=True), 0.2),
    cosine_lr=({}, True),
    cosine_cycles=(COSINE, 2.0),
    golden_lr=(COSINE, True),
    iterations=({}, 5),
    train_batch_tokens=({}, 256),
    muon_wd=({}, 0.5),
    warmdown_frac=({}, 1.0),
    lr_floor=(dict(warmdown_iters=18), 0.5),
    min_lr=(dict(warmdown_iters=18), 0.97),
    polar_express=({}, True),
    muon_row_normalize=({}, True),
    muon_beta2=({}, 0.95),
    soap_beta2=({}, 0.9),
    soap_every=(dict(soap_beta2=0.9), 2),
    cautious_wd=(dict(muon_wd=0.5), True),
    embed_wd=({}, 0.5),
    adam_wd=({}, 0.5),
    prog_depth=(dict(num_repeats=2), "0.5:1,1:2"),
)
# How long, on what and in which arithmetic: other tests.
AVERAGES = {"swa_enabled", "swa_start_frac", "swa_every", "ema_decay"}
ACT_ELSEWHERE = {
    "data_shuffle",
    "max_wallclock_seconds",
    "gptq_reserve_seconds",
    "init_from",
    "dtype",
    "ortho_init",  # test_frontier.py, as the next
    "enable_looping_at",
    "train_seq_schedule",  # test_context.py, as the next
    "seq_change_warmup_steps",
    "pack_documents",  # test_packing.py
    *AVERAGES,
}


@pytest.fixture(scope="module")
def trajectories():
    """A cache: many knobs share a base."""
    return {}


@pytest.mark.parametrize("name", ACTS)
def test_a_training_knob_changes_the_trajectory(tiny, trajectories, name):
    base, value = ACTS[name]
    assert getattr(tiny(**base), name) != value
    key = str(base)
    if key not in trajectories:
        trajectories[key] = trajectory(tiny(**base))
    assert (trajectory(tiny(**base | {name: value})) - trajectories[key]).abs().max() > 1e-6


def test_the_same_knobs_give_the_same_trajectory(tiny):
    torch.testing.assert_close(trajectory(tiny()), trajectory(tiny()), rtol=0, atol=0)


def test_no_training_knob_is_left_untested():
    known = {f.name for f in fields(Config) if f.metadata["role"] == "train"}
    ideas = {f.name for f in fields(Config) if f.metadata["fate"]}  # test_ideas.py
    assert known - ideas == (set(ACTS) | ACT_ELSEWHERE) - ideas
