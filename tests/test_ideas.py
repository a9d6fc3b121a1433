"""The published ideas: each acts, is its formula, compiles once, keeps causality, leaves the score alone."""

import math
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

import train_gpt
from tests.conftest import Traced, env_of, show
from tests.support import reference
from train_gpt import (
    FATES,
    GPT,
    HOOKS,
    Config,
    Dials,
    Muon,
    Optimisers,
    Run,
    RunLog,
    Runtime,
    StepPlan,
    cross_entropy,
    kept_layers,
    plan_layers,
    plan_step,
    token_nats,
    train_step,
    training_loss,
    uniform,
)

SCHEDULES = dict(HOOKS["schedule"])
GRADIENT_EDITS = dict(HOOKS["edit_gradients"])
WEIGHT_EDITS = dict(HOOKS["edit_weights"])
STEPS, LAYERS = 12, 4
TIDAL, COSINE, FOCAL = dict(tidal_lr=True), dict(cosine_lr=True), dict(focal_gamma=2.0)
BURN, PERTURB, PRUNE = dict(controlled_burn=0.1), dict(weight_perturb=0.1), dict(head_prune=0.5)

# idea -> (base, value): what must change the weights after STEPS steps.
OUTSIDE = dict(
    tidal_lr=({}, True), tidal_warmup=(TIDAL, 0.2), cosine_lr=({}, True), cosine_cycles=(COSINE, 2.0),
    golden_lr=(COSINE, True), breathing_lr=({}, True), whale_lr=({}, True), circadian_lr=({}, True),
    cosmo_lr=({}, True), punctuated_lr=({}, True), root_first=({}, True), coral_lr=({}, True),
    grad_central=({}, True), mycorrhizal=({}, 0.1), thermal_vent=({}, 1.0), sam_rho=({}, 0.05),
    canopy_lr=({}, True), wd_schedule=({}, 0.1), predprey_lr=({}, True),
    controlled_burn=(dict(burn_interval=3), 0.05),
    burn_interval=(BURN, 4), synaptic_scale=({}, True), weight_perturb=(dict(perturb_interval=3), 0.01),
    perturb_interval=(PERTURB, 4), mutation_decay=({}, 0.01), head_prune=({}, 0.5),
    head_prune_at=(PRUNE, 0.6),
)  # fmt: skip
# Inside what is compiled.
INSIDE = dict(
    encoder_layers=({}, 1), weight_share=({}, 2), mlp_act=({}, "silu2"), parallel_block=({}, True),
    sandwich_norm=({}, True), attn_recycle=({}, True), embed_scale=({}, 3.0), mirror_train=({}, 0.5),
    embed_mixup=({}, 0.5), token_drop=({}, 0.2), metamorphosis=({}, 0.2), focal_gamma=({}, 2.0),
    gamma_anneal=(FOCAL, True), label_smooth=({}, 0.1), z_loss=({}, 1e-2), logit_penalty=({}, 1e-2),
    logit_temp=({}, 1.5), entropy_bonus=({}, -0.1), multi_token=({}, 0.3), head_diversity=({}, 1.0),
    layer_drop=({}, 0.3), progressive_grow=({}, True),
)  # fmt: skip
SHAPE = {f.name for f in fields(Config) if f.metadata["role"] == "model"}
TRAINING_ONLY = {name: case for name, case in (OUTSIDE | INSIDE).items() if name not in SHAPE}


def test_every_idea_has_a_case():
    assert {f.name for f in fields(Config) if f.metadata["fate"]} == set(OUTSIDE | INSIDE)


def batch_of(cfg: Config, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    shape = cfg.sequences, cfg.train_seq_len + 1
    tokens = torch.randint(cfg.vocab_size, shape, generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def make(cfg: Config, runtime: Runtime | None = None) -> tuple[Run, Optimisers]:
    torch.manual_seed(0)
    runtime, model = runtime or Runtime(), reference.randomise(GPT(cfg))
    return Run(cfg, runtime, RunLog(None, "x"), model, data=None), Optimisers(cfg, model, runtime)


def trajectory(
    cfg: Config, runtime: Runtime | None = None, steps: int = STEPS, limit: int = 99
) -> torch.Tensor:
    """The tied table after a few steps: every change of any step reaches it."""
    run, optimisers = make(cfg, runtime)
    for step in range(steps):
        train_step(run, optimisers, batch_of(cfg, step), plan_step(cfg, step, 0.0, 0.0), limit)
    return run.model.tok_emb.weight.detach().clone()


def config(tiny, **knobs) -> Config:
    return tiny(**dict(num_layers=LAYERS, iterations=STEPS, train_batch_tokens=128) | knobs)


@pytest.fixture(scope="module")
def known(tiny):
    """Cached trajectories: many ideas share a base."""
    cache: dict[str, torch.Tensor] = {}

    def get(**knobs) -> torch.Tensor:
        if str(knobs) not in cache:
            cache[str(knobs)] = trajectory(config(tiny, **knobs))
        return cache[str(knobs)]

    return get


# --- liveness, eager and compiled ---


@pytest.mark.parametrize("name", OUTSIDE | INSIDE)
def test_an_idea_changes_the_trajectory(known, name):
    base, value = (OUTSIDE | INSIDE)[name]
    assert (known(**base, **{name: value}) - known(**base)).abs().max() > 1e-6


@pytest.mark.parametrize("name", INSIDE)
def test_an_idea_compiles_once_for_each_structure_and_trains_the_same(tiny, known, name):
    base, value = INSIDE[name]
    knobs = base | {name: value}
    if name not in ("encoder_layers", "weight_share", "layer_drop", "progressive_grow"):
        knobs["num_layers"] = 2  # enough to show it, and half as long to trace
    runtime, cfg = Traced(), config(tiny, **knobs)
    compiled = trajectory(cfg, runtime)
    torch.testing.assert_close(compiled, known(**knobs), rtol=1e-3, atol=1e-4)
    assert runtime.graphs == len(cfg.phases)


TOGETHER = dict(
    mirror_train=0.5, embed_mixup=0.5, token_drop=0.2, metamorphosis=0.2, focal_gamma=2.0, gamma_anneal=True,
    label_smooth=0.1, z_loss=1e-2, logit_penalty=1e-2, logit_temp=1.5, entropy_bonus=0.1, multi_token=0.3,
    head_diversity=1.0, layer_drop=0.3, weight_share=3, attn_recycle=True,
)  # fmt: skip


@pytest.mark.slow  # each as graphs above; a compiled run in test_run.py
def test_all_of_them_together_train_the_same_when_really_compiled(tiny):
    right, why_not = train_gpt.pick_compile("auto", torch.device("cpu"))
    if not right or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip(f"no torch.compile here: {why_not or 'no C++ compiler'}")
    torch._dynamo.reset()
    cfg = config(tiny, **TOGETHER | dict(num_layers=2, weight_share=1))
    compiled, eager = trajectory(cfg, Runtime(compiles=True), 3), trajectory(cfg, None, 3)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


def data_config(dataset, **knobs) -> Config:
    """A tiny config that reads the toy dataset."""
    env = env_of(dataset, **knobs)
    return Config.from_env(
        {f.name.upper(): env[f.name.upper()] for f in fields(Config) if f.name.upper() in env}
    )


class Lines(RunLog):
    def __init__(self):
        super().__init__(None, "x")
        self.lines = []

    def line(self, text, echo=True):
        self.lines.append(text)


def test_a_model_may_grow_through_more_graphs_than_torch_allows_by_default(tiny, monkeypatch):
    """Here through two, where one is allowed; a run raises what torch allows to far more."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    runtime, cfg = Traced(), config(tiny, num_layers=4, progressive_grow=True)
    trajectory(cfg, runtime)
    assert runtime.graphs == len(cfg.phases) == 2
    assert torch._dynamo.config.recompile_limit > 4 * len(Config(num_layers=32, progressive_grow=True).phases)


@pytest.mark.slow  # the graphs of each of these above, all of them before the clock in test_depth.py
@pytest.mark.parametrize("warm_up", [1, 0])
def test_a_growing_run_compiles_nothing_inside_the_clock(dataset, warm_up):
    """Without a warm-up it must, and the log must say so."""
    knobs = dict(num_layers=4, progressive_grow=1, layer_drop=0.2, gamma_anneal=1, focal_gamma=1.0)
    cfg = data_config(dataset, iterations=6, warmup_steps=warm_up, **knobs)
    data = train_gpt.load_validation(cfg, train_gpt.load_tokenizer(cfg))
    run = Run(cfg, Traced(), Lines(), GPT(cfg), data)
    stream = train_gpt.TokenStream(cfg.data_path, "train", cfg.vocab_size)
    train_gpt.train(run, Optimisers(cfg, run.model, run.runtime), stream)
    late = [line for line in run.log.lines if "graphs were compiled inside the clock" in line]
    assert len(late) == (not warm_up)


# --- schedules ---


def cos_down(p, floor=0.1):
    return floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * p))


def breath(p, rise, fall):
    down = 0.1 + 0.45 * (1 + np.cos(np.pi * (p - fall) / (1 - fall)))
    return np.select([p < rise, p < fall], [0.1 + 0.9 * p / rise, np.ones_like(p)], down)


def whale(p):
    u, k = (3 * p) % 1, 0.95 * (1 - 0.3 * np.minimum(1, p))
    m = np.where(u < 0.1, 0.05 + k * u / 0.1, 0.05 + 0.5 * k * (1 + np.cos(np.pi * (u - 0.1) / 0.9)))
    return np.maximum(0.05, np.where(p > 0.9, m * (1 - p) / 0.1, m))


# The published formulas (PR #1434); 50 of 400 steps are an eighth of the run.
CURVES = dict(
    tidal_lr=lambda p: breath(p, 0.382, 0.382),
    cosine_lr=cos_down,
    breathing_lr=lambda p: breath(p, 4 / 19, 11 / 19),
    whale_lr=whale,
    circadian_lr=lambda p: np.maximum(0.1, cos_down(p) + 0.15 * (1 - p) * np.sin(2 * np.pi * p / 0.125)),
    cosmo_lr=lambda p: np.where(p < 0.05, 0.05 + 0.95 * p / 0.05, np.maximum(0.05, 1 / np.sqrt(1 + 20 * p))),
    punctuated_lr=lambda p: 0.1 + 0.9 * np.exp(-(np.abs(p[:, None] - [0.25, 0.5, 0.75]).min(1) ** 2) / 0.005),
    root_first=cos_down,
    coral_lr=cos_down,
)


@pytest.mark.parametrize("name", CURVES)
def test_a_schedule_is_its_published_curve(name):
    p = (
        np.concatenate((np.linspace(0, 1, 1001)[:-1], [1 - 1e-9, 1.0]))
        if name != "whale_lr"
        else np.linspace(0, 1, 998)
    )
    curve = dict(HOOKS["schedule"])[name]
    ours = [curve(Config(), x, 0.0) for x in p.tolist()]
    np.testing.assert_allclose(ours, CURVES[name](p), rtol=1e-6, atol=1e-6)


def test_every_schedule_has_a_curve_and_refuses_company():
    assert set(SCHEDULES) == {*CURVES}
    for name in CURVES:
        other = "TIDAL_LR" if name != "tidal_lr" else "COSINE_LR"
        with pytest.raises(train_gpt.RunError, match="two schedules at once"):
            Config.from_env({name.upper(): "1", other: "1"})


# --- loss terms ---


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def nats_of(z, y):
    return -np.take_along_axis(log_softmax(z), y[..., None], -1)[..., 0]


def entropy(z):
    return -(np.exp(log_softmax(z)) * log_softmax(z)).sum(-1)


# (logits, targets) -> the whole objective, in the words of the papers and of the published code.
OBJECTIVES = dict(
    focal_gamma=lambda z, y: ((1 - np.exp(-nats_of(z, y))) ** 2 * nats_of(z, y)).mean(),
    label_smooth=lambda z, y: (0.9 * nats_of(z, y) - 0.1 * log_softmax(z).mean(-1)).mean(),
    z_loss=lambda z, y: (nats_of(z, y) + 1e-2 * np.log(np.exp(z).sum(-1)) ** 2).mean(),
    logit_penalty=lambda z, y: nats_of(z, y).mean() + 1e-2 * (z**2).mean(),
    logit_temp=lambda z, y: nats_of(z / 1.5, y).mean(),
    entropy_bonus=lambda z, y: (nats_of(z, y) - 0.1 * entropy(z)).mean(),
    multi_token=lambda z, y: nats_of(z, y).mean() + 0.3 * nats_of(z[:, :-1], y[:, 1:]).mean(),
)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_term_is_its_formula(tiny, name):
    cfg = config(tiny, **{name: INSIDE[name][1]})
    model = make(cfg)[0].model
    ids, targets = batch_of(cfg)
    with torch.no_grad():
        objective, nats = training_loss(cfg, model)(ids, targets)
        logits = model(ids).double().numpy()
    assert objective.item() == pytest.approx(OBJECTIVES[name](logits, targets.numpy()), rel=1e-5)
    assert nats.item() == pytest.approx(nats_of(logits, targets.numpy()).mean(), rel=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_the_annealed_gamma_falls_to_zero(tiny, p):
    cfg = config(tiny, focal_gamma=2.0, gamma_anneal=True)
    model, (ids, targets) = make(cfg)[0].model, batch_of(cfg)
    plan = StepPlan(p, 1.0, 0.9, layers=(True,) * LAYERS)
    objective = training_loss(cfg, model)(ids, targets, plan.dials(ids.device))[0]
    nats = nats_of(model(ids).detach().double().numpy(), targets.numpy())
    assert objective.item() == pytest.approx(((1 - np.exp(-nats)) ** (2 * (1 - p)) * nats).mean(), rel=1e-5)


# --- input terms ---


def test_draws_are_uniform_and_independent():
    ids = torch.randint(1024, (64, 48), generator=torch.Generator().manual_seed(0))
    draws = {(n, s): uniform(ids, torch.tensor(float(n)), s, 256).double() for n in (5, 6) for s in (1, 2)}
    x = draws[5, 1]
    assert x.min() >= 0 and x.max() < 1
    counts = torch.histc(x.float(), 64, 0, 1)
    assert ((counts - 256) ** 2 / 256).sum() < 63 + 4 * math.sqrt(2 * 63)
    others = [draws[6, 1], draws[5, 2], x.roll(1, 0), x.roll(1, 1)]
    for other in others:  # another step, another use, another sequence, another place
        correlation = torch.corrcoef(torch.stack((x.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(x.numel())


def test_draws_belong_to_the_sequence_not_to_its_place_in_the_batch():
    ids, noise = torch.randint(1024, (8, 48)), torch.tensor(77.0)
    order = torch.tensor([3, 1, 7])
    assert torch.equal(uniform(ids, noise, 1, 10)[order], uniform(ids[order], noise, 1, 10))


def dials(cfg: Config, p: float = 0.0, noise: int = 3) -> torch.Tensor:
    return StepPlan(p, 1.0, 0.9, layers=(True,) * cfg.num_layers, noise=noise).dials(torch.device("cpu"))


def test_the_dials_name_what_compiled_code_sees():
    plan = StepPlan(0.25, 1.0, 0.9, layers=(True, False, True), noise=2**24 - 1)

    def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen = Dials.of(tensor)
        return seen.noise + 0, seen.progress + 0, seen.layers + 0

    runtime, tensor = Traced(), plan.dials(torch.device("cpu"))
    for noise, progress, layers in (parts(tensor), runtime.compile(parts)(tensor)):
        assert (noise.item(), progress.item(), layers.tolist()) == (2**24 - 1, 0.25, [1.0, 0.0, 1.0])
    assert runtime.graphs == 1 and Dials.of(tensor)._fields == ("noise", "progress", "layers")


def test_mirrored_sequences_predict_what_is_read_next(tiny, monkeypatch):
    cfg, seen = tiny(mirror_train=0.5), []
    model = GPT(cfg)
    model.tok_emb.register_forward_pre_hook(lambda _, given: seen.extend(given))
    monkeypatch.setattr(train_gpt, "cross_entropy", lambda z, y: (seen.append(y), cross_entropy(z, y))[1])
    tokens = torch.arange(40).view(8, 5) + 100
    training_loss(cfg, model)(tokens[:, :-1], tokens[:, 1:], dials(cfg, noise=1))
    ids, targets = seen
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    whole = torch.cat((ids, targets[:, -1:]), 1)
    backwards = (whole == tokens.flip(1)).all(1)
    assert torch.equal(torch.where(backwards[:, None], tokens.flip(1), tokens), whole)
    assert 0 < backwards.sum() < 8


def test_mixup_moves_towards_the_token_before_and_leaves_the_first(tiny):
    cfg, x = Config(embed_mixup=0.5), torch.randn(3, 7, 4)
    ids = torch.randint(99, (3, 7))
    mixed = train_gpt.embed_mixup(cfg, x, ids, Dials.of(dials(cfg)))
    assert torch.equal(mixed[:, 0], x[:, 0])
    r = ((mixed - x)[:, 1:] / (x[:, :-1] - x[:, 1:])).double()
    assert (r.std(-1) < 1e-4).all() and r.min() >= 0 and r.max() <= 0.5 and r.mean(-1).std() > 0.05


@pytest.mark.parametrize(
    "name, p, share", [("token_drop", 0.5, 0.3), ("metamorphosis", 0.25, 0.15), ("metamorphosis", 0.5, 0)]
)
def test_dropped_inputs_are_zero_and_the_others_made_up_for(name, p, share):
    cfg, x = Config(**{name: 0.3}), torch.ones(16, 32, 24)
    out = dict(HOOKS["input"])[name](cfg, x, torch.randint(99, (16, 32)), Dials.of(dials(cfg, p)))
    values, counts = out.unique(return_counts=True)
    assert values.tolist() == pytest.approx([0, 1 / (1 - share)] if share else [1])
    by_place = (out == 0).float().mean(-1)
    assert by_place.mean().item() == pytest.approx(share, abs=0.05)
    assert bool(((by_place == 0) | (by_place == 1)).all()) == (name == "token_drop" or not share)


# --- structure ---


def test_dropped_layers_are_blocks_left_out_skips_kept(tiny):
    cfg = config(tiny)
    model, (ids, _) = make(cfg)[0].model, batch_of(cfg)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    x0 = train_gpt.norm(model.tok_emb(ids) * model.embed_scale)
    x, outputs, cos, sin = x0, [], model.cos[:32], model.sin[:32]
    for layer in model.plans[-1]:
        if layer.skip is not None:
            x = x + model.skip_weights[layer.skip] * outputs[layer.skip_from]
        x = model.blocks[layer.block](x, x0, layer, cos, sin)[0] if keep[layer.number] else x
        outputs.append(x)
    z = torch.nn.functional.linear(train_gpt.norm(x), model.tok_emb.weight)
    torch.testing.assert_close(model.logits(x0, ids, keep), 30 * torch.tanh(z / 30), rtol=1e-5, atol=1e-5)


def test_layers_drop_at_their_rate_but_for_the_first_of_each_half():
    cfg = Config(layer_drop=0.2, num_layers=6)
    kept = np.array([kept_layers(cfg, step) for step in range(2000)])
    assert kept[:, [0, 3]].all()
    assert kept[:, [1, 2, 4, 5]].mean(0) == pytest.approx(0.8, abs=0.04)
    assert kept_layers(cfg, 5) == kept_layers(cfg, 5)


def test_a_grown_layer_goes_on_where_the_shallow_model_was(tiny):
    cfg = config(tiny, num_layers=6, progressive_grow=True)
    torch.manual_seed(0)
    model, (ids, _) = reference.randomise(GPT(cfg)), batch_of(cfg)
    new = GPT(cfg)
    for index in (4, 5):
        model.blocks[index].load_state_dict(new.blocks[index].state_dict())
    x0 = train_gpt.norm(model.tok_emb(ids) * model.embed_scale)
    whole = model(ids)
    model.plans = [plan_layers(cfg, 4)]
    torch.testing.assert_close(model.logits(x0, ids), whole, rtol=1e-5, atol=1e-5)


def test_growth_is_even_and_over_by_nine_tenths(tiny):
    cfg = tiny(num_layers=9, progressive_grow=True, iterations=1000)
    grown = [cfg.phases[plan_step(cfg, step, 0.0, 0.0).phase].depth for step in range(1000)]
    assert grown == sorted(grown) and grown[0] == 3 and grown[899] == 8 and grown[900] == 9
    assert all(130 < grown.count(depth) < 170 for depth in range(3, 9))


def test_shared_weights_are_a_full_model_of_copies(tiny):
    shared, full = (make(config(tiny, weight_share=period))[0] for period in (2, 0))
    state = dict(full.model.state_dict())
    own = shared.model.state_dict()
    for name in state:
        part = name.split(".")
        if part[0] == "blocks":
            part[1] = str(int(part[1]) % 2)
        state[name] = own[".".join(part)]
    full.model.load_state_dict(state)
    (ids, targets) = batch_of(full.cfg)
    losses = [run.loss(ids, targets)[0] for run in (shared, full)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert len(shared.model.blocks) == 2
    for a, b, c in zip(
        shared.model.blocks[0].parameters(),
        full.model.blocks[0].parameters(),
        full.model.blocks[2].parameters(),
        strict=True,
    ):
        torch.testing.assert_close(a.grad, b.grad + c.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parallel", [False, True])
def test_recycled_attention_reads_its_own_result(tiny, parallel):
    cfg = config(tiny, attn_recycle=True, parallel_block=parallel, num_layers=1)
    model = make(cfg)[0].model
    block, x, x0 = model.blocks[0], torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    cos, sin = model.cos[:8], model.sin[:8]
    keep, again = block.resid_mix
    mixed = keep * x + again * x0
    once = mixed + block.attn_scale * block.attn(train_gpt.norm(mixed), cos, sin)[0]
    twice = once + block.attn_scale * block.attn(train_gpt.norm(once), cos, sin)[0]
    expected = twice + block.mlp_scale * block.mlp(train_gpt.norm(mixed if parallel else twice))
    torch.testing.assert_close(block(x, x0, model.plans[-1][0], cos, sin)[0], expected)


CAUSAL = dict(
    weight_share=2, attn_recycle=True, encoder_layers=1, parallel_block=True, sandwich_norm=True,
    mlp_act="swiglu",
)  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_future_tokens_never_move_past_logits(tiny, name):
    cfg = config(tiny, **{name: CAUSAL[name]})
    model, (ids, _) = make(cfg)[0].model, batch_of(cfg)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 7) % cfg.vocab_size
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])


@pytest.mark.parametrize("name", ["embed_mixup", "token_drop", "metamorphosis", "layer_drop"])
def test_future_inputs_never_move_past_training_logits(tiny, monkeypatch, name):
    """With the draws held: they come from the whole sequence by design."""
    cfg = config(tiny, **{name: 0.3})
    model, (ids, targets) = make(cfg)[0].model, batch_of(cfg)
    fixed = uniform(ids, torch.tensor(9.0), 1, 32 * 32)
    monkeypatch.setattr(train_gpt, "uniform", lambda ids, noise, salt, count: fixed[:, :count])
    seen = []
    monkeypatch.setattr(
        train_gpt, "cross_entropy", lambda z, y: (seen.append(z.detach()), cross_entropy(z, y))[1]
    )
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 7) % cfg.vocab_size
    plan = StepPlan(0.1, 1.0, 0.9, layers=(True, False, True, True))
    for tokens in (ids, changed):
        training_loss(cfg, model)(tokens, targets, plan.dials(ids.device))
    assert torch.equal(seen[0][:, :20], seen[1][:, :20]) and not torch.equal(seen[0][:, 20:], seen[1][:, 20:])


@pytest.mark.parametrize("name", TRAINING_ONLY)
def test_no_training_switch_changes_the_evaluation(tiny, name):
    base, value = TRAINING_ONLY[name]
    scores = []
    for knobs in (base, {**base, name: value}):
        run, _ = make(config(tiny, **knobs))
        with torch.no_grad():
            scores.append(run.nats(*batch_of(run.cfg)))
    assert torch.equal(*scores)
    assert torch.equal(scores[0], token_nats(run.model, *batch_of(run.cfg)))


@pytest.mark.parametrize("limit", [1, 3])
def test_the_micro_batch_does_not_change_the_draws(tiny, limit):
    knobs = {name: v for name, v in TOGETHER.items() if name != "head_diversity"}
    cfg = config(tiny, **knobs)
    torch.testing.assert_close(
        trajectory(cfg, limit=limit, steps=4), trajectory(cfg, steps=4), rtol=1e-3, atol=2e-4
    )


# --- interventions ---


def weights_with_gradients(tiny, **knobs) -> tuple[Config, Optimisers]:
    cfg = config(tiny, num_layers=5, **knobs)
    _, optimisers = make(cfg)
    generator = torch.Generator().manual_seed(1)
    optimisers.flat.copy_(torch.randn(optimisers.flat.shape, generator=generator))
    return cfg, optimisers


def arrays(optimisers: Optimisers, grads: bool = False) -> dict[str, np.ndarray]:
    pick = (lambda w: w.param.grad) if grads else (lambda w: w.param.detach())
    return {w.name: pick(w).double().numpy().copy() for w in optimisers.weights}


def edited(tiny, table, name: str, plan: StepPlan, **knobs):
    """(optimisers, weights before, gradients before) of one edit, which may write only what it should."""
    cfg, optimisers = weights_with_gradients(tiny, **knobs)
    before, grads = arrays(optimisers), arrays(optimisers, grads=True)
    with torch.no_grad():
        table[name](cfg, optimisers.weights, plan)
    untouched = before if table is GRADIENT_EDITS else grads
    for key, value in arrays(optimisers, grads=table is not GRADIENT_EDITS).items():
        np.testing.assert_array_equal(value, untouched[key])
    return optimisers, before, grads


def plan_at(p: float, step: int = 0, lr_scale: float = 1.0) -> StepPlan:
    return StepPlan(p, lr_scale, 0.9, step=step, noise=5)


def is_matrix(name: str, value: np.ndarray) -> bool:
    return value.ndim == 2 and "resid_mix" not in name and "skip_weights" not in name


def test_centred_gradients_have_no_mean_along_a_row(tiny):
    optimisers, _, grads = edited(tiny, GRADIENT_EDITS, "grad_central", plan_at(0.5), grad_central=True)
    for name, grad in arrays(optimisers, grads=True).items():
        expected = grads[name] - grads[name].mean(1, keepdims=True) if is_matrix(name, grad) else grads[name]
        np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_mycorrhizal_blocks_exchange_gradients_in_order(tiny):
    optimisers, _, g = edited(tiny, GRADIENT_EDITS, "mycorrhizal", plan_at(0.5), mycorrhizal=0.1)
    for i in (0, 1):
        for name in [n for n in g if n.startswith(f"blocks.{i}.")]:
            far = name.replace(f"blocks.{i}.", f"blocks.{i + 3}.", 1)
            g[name], g[far] = g[name] + 0.1 * g[far], g[far] + 0.1 * g[name]
    for name, grad in arrays(optimisers, grads=True).items():
        np.testing.assert_allclose(grad, g[name], atol=1e-6)


def test_two_blocks_are_vented(tiny):
    optimisers, _, g = edited(tiny, GRADIENT_EDITS, "thermal_vent", plan_at(0.5), thermal_vent=1.5)
    factors = {name: (grad / g[name]).mean() for name, grad in arrays(optimisers, grads=True).items()}
    hot = {name.split(".")[1] for name, factor in factors.items() if factor == pytest.approx(2.5)}
    assert len(hot) == 2
    for name, factor in factors.items():
        inside = name.startswith("blocks.") and name.split(".")[1] in hot
        assert factor == pytest.approx(2.5 if inside else 1.0)


@pytest.mark.parametrize(
    "name, p",
    [("mycorrhizal", 0.024), ("thermal_vent", 0.024), ("synaptic_scale", 0.049), ("mutation_decay", 0.049)],
)
def test_an_intervention_waits_for_its_start(tiny, name, p):
    table = GRADIENT_EDITS if name in GRADIENT_EDITS else WEIGHT_EDITS
    optimisers, before, grads = edited(tiny, table, name, plan_at(p), **{name: 1})
    for grad, old in ((True, grads), (False, before)):
        for key, value in arrays(optimisers, grads=grad).items():
            np.testing.assert_array_equal(value, old[key])


DECAYS = dict(
    muon_wd=(0.5, lambda p: 0.5),
    wd_schedule=(0.5, lambda p: 0.5 * p),
    predprey_lr=(True, lambda p: 0.01 * (1 - 0.5 * (1 - p) * math.sin(12 * math.pi * p))),
)


@pytest.mark.parametrize("name", DECAYS)
def test_decay_is_the_product_of_scaled_factors_on_block_matrices_alone(tiny, name):
    """Gradients of zero leave nothing but the decay in a step."""
    value, rate = DECAYS[name]
    cfg, optimisers = weights_with_gradients(tiny, **{name: value})
    before, factor = arrays(optimisers), 1.0
    optimisers.flat.zero_()
    for step in range(8):
        p, lr = step / 8, cfg.matrix_lr * (1 - step / 10)
        factor *= 1 - lr * rate(p)
        optimisers.step(plan_at(p, step, 1 - step / 10))
    for key, value in arrays(optimisers).items():
        block_matrix = is_matrix(key, value) and key.startswith("blocks.")
        np.testing.assert_allclose(value, before[key] * (factor if block_matrix else 1), rtol=1e-5)


@pytest.mark.parametrize("step, burns", [(8, True), (9, False), (7, False), (17, True)])
def test_a_burn_zeroes_exactly_the_smallest_share(tiny, step, burns):
    knobs = dict(controlled_burn=0.1, burn_interval=9)
    optimisers, before, _ = edited(tiny, WEIGHT_EDITS, "controlled_burn", plan_at(0.5, step), **knobs)
    for name, value in arrays(optimisers).items():
        expected = before[name].copy()
        if burns and is_matrix(name, value):
            smallest = np.argsort(np.abs(expected), axis=None)[: int(0.1 * expected.size)]
            expected.reshape(-1)[smallest] = 0
        np.testing.assert_array_equal(value, expected)


def test_synaptic_scaling_pulls_norms_back_by_five_percent_at_most(tiny):
    cfg, optimisers = weights_with_gradients(tiny, synaptic_scale=True)
    start = arrays(optimisers)
    with torch.no_grad():
        WEIGHT_EDITS["synaptic_scale"](cfg, optimisers.weights, plan_at(0.05))
        for w, factor in zip(optimisers.weights, [1.02, 1.5, 0.5] * 99, strict=False):
            w.param.mul_(factor)
        WEIGHT_EDITS["synaptic_scale"](cfg, optimisers.weights, plan_at(0.06))
    for w, factor in zip(optimisers.weights, [1.02, 1.5, 0.5] * 99, strict=False):
        pulled = {1.02: 1.0, 1.5: 1.5 * 0.95, 0.5: 0.5 * 1.05}[factor] if w.role != "scalar" else factor
        np.testing.assert_allclose(w.param.detach().double().numpy(), pulled * start[w.name], rtol=1e-5)


@pytest.mark.parametrize("name, p, step, amount", [
    ("weight_perturb", 0.5, 8, 0.1), ("weight_perturb", 0.5, 7, 0.0),
    ("mutation_decay", 0.5, 7, 0.1 * math.exp(-2.5)), ("mutation_decay", 0.05, 7, 0.1 * math.exp(-0.25)),
])  # fmt: skip
def test_noise_has_the_published_size_and_repeats(tiny, name, p, step, amount):
    knobs = {name: 0.1} | (dict(perturb_interval=9) if name == "weight_perturb" else {})
    runs = [edited(tiny, WEIGHT_EDITS, name, plan_at(p, step), **knobs) for _ in range(2)]
    after = [arrays(optimisers) for optimisers, _, _ in runs]
    for key, old in runs[0][1].items():
        np.testing.assert_array_equal(after[0][key], after[1][key])
        noise = after[0][key] - old
        expected = amount * np.abs(old).mean() if is_matrix(key, old) else 0
        assert noise.std() == pytest.approx(expected, rel=5 / math.sqrt(old.size), abs=1e-9)


def test_mutations_end_when_they_are_tiny(tiny):
    optimisers, before, _ = edited(tiny, WEIGHT_EDITS, "mutation_decay", plan_at(1.0), mutation_decay=1.4e-4)
    assert all(np.array_equal(value, before[key]) for key, value in arrays(optimisers).items())


def test_pruned_heads_are_the_weakest_and_stay_zero(tiny):
    cfg = config(tiny, head_prune=0.5, head_prune_at=0.5)
    run, optimisers = make(cfg)
    gone = None
    for step in range(STEPS):
        heads = [b.attn.proj.weight.detach().unflatten(1, (4, -1)).norm(dim=(0, 2)) for b in run.model.blocks]
        if step in (5, 6):
            assert all((norms > 0).all() for norms in heads)
        if step >= 7:
            now = [(norms == 0).nonzero().flatten().tolist() for norms in heads]
            assert all(len(zero) == 2 for zero in now) and now == (gone or now)
            gone = now
        if step == 6:
            weakest = [sorted(norms.argsort()[:2].tolist()) for norms in heads]
        train_step(run, optimisers, batch_of(cfg, step), plan_step(cfg, step, 0.0, 0.0), 99)
    assert gone == weakest


# --- learning rates by place, SAM ---


def layer_steps(tiny, p: float, **knobs) -> dict[str, float]:
    """The share of its plain step that each weight makes at p."""
    moved = []
    for chosen in (knobs, dict(cosine_lr=True)):
        cfg, optimisers = weights_with_gradients(tiny, **chosen)
        before = arrays(optimisers)
        optimisers.step(StepPlan(p, 1.0, 0.9, step=1))
        moved.append({name: value - before[name] for name, value in arrays(optimisers).items()})
    return {
        name: float((moved[0][name] * moved[1][name]).sum() / (moved[1][name] ** 2).sum())
        for name in moved[0]
    }


EXPECTED_SHARES = dict(
    canopy_lr=(0.3, lambda block, embed: 0.3 + 0.7 * block / 4 if block is not None else 1.0),
    root_first=(0.1, lambda block, embed: 1.0 if embed else 0.55),
    coral_lr=(0.75, lambda block, embed: 0.0 if block in (0, 1) else 1.0),
)


@pytest.mark.parametrize("name", EXPECTED_SHARES)
def test_rates_by_place_scale_the_step(tiny, name):
    p, share = EXPECTED_SHARES[name]
    base = dict(cosine_lr=True) if name == "canopy_lr" else {}
    for key, value in layer_steps(tiny, p, **base, **{name: True}).items():
        block = int(key.split(".")[1]) if key.startswith("blocks.") else None
        assert value == pytest.approx(share(block, key == "tok_emb.weight"), abs=2e-3), key


def test_frozen_weights_do_not_change_a_bit(tiny):
    cfg, optimisers = weights_with_gradients(tiny, coral_lr=True)
    before = arrays(optimisers)
    optimisers.step(StepPlan(0.75, 1.0, 0.9))
    after = arrays(optimisers)
    assert all(np.array_equal(after[n], before[n]) for n in after if n.startswith(("blocks.0.", "blocks.1.")))


def test_sam_takes_the_gradient_uphill_and_puts_the_weights_back(tiny):
    cfg = config(tiny, sam_rho=0.1)
    run, optimisers = make(cfg)
    batch, plan = batch_of(cfg), StepPlan(0.0, 0.0, 0.9, layers=(True,) * LAYERS)  # no step: lr is 0
    params = [w.param for w in optimisers.weights]
    before = [p.detach().clone() for p in params]
    loss = training_loss(cfg, run.model)
    first = torch.autograd.grad(loss(*batch)[0], params)
    size = torch.sqrt(sum(g.double().square().sum() for g in first)).float()
    with torch.no_grad():
        for p, g in zip(params, first, strict=True):
            p.add_(0.1 * g / size)
    expected = torch.autograd.grad(loss(*batch)[0], params)
    with torch.no_grad():
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
    train_step(run, optimisers, batch, plan, 99)
    for p, old, grad in zip(params, before, expected, strict=True):
        assert torch.equal(p.detach(), old)
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-6)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(expected, first, strict=True))


# --- what the optimisers cannot feel ---


def felt(transform, optimiser: str, steps: int = 120) -> float:
    """Relative change that a gradient transform makes to the last update, once the start is forgotten."""
    updates = []
    for change in (lambda grad, step: grad, transform):
        generator = torch.Generator().manual_seed(3)
        p = torch.nn.Parameter(torch.zeros(16, 24))
        kinds = dict(
            muon=lambda p=p: Muon([p], Config(matrix_lr=0.1, muon_momentum=0.9), Runtime()),
            adam=lambda p=p: torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.95), eps=1e-8),
        )
        stepper = kinds[optimiser]()
        for step in range(steps):
            before = p.detach().clone()
            grad = torch.randn(p.shape, generator=generator) + torch.linspace(-1, 2, 24)
            p.grad = change(grad, step)
            stepper.step()
        updates.append(p.detach() - before)
    return ((updates[1] - updates[0]).norm() / updates[0].norm()).item()


# transform of a gradient -> whether Muon and Adam feel it
FELT = dict(
    canopy_as_published=(lambda g, step: 0.3 * g, dict(muon=False, adam=False)),
    loss_times_ten=(lambda g, step: 10 * g, dict(muon=False, adam=False)),
    grad_central=(lambda g, step: g - g.mean(1, keepdim=True), dict(muon=True, adam=True)),
    mycorrhizal=(lambda g, step: g + 0.1 * g.roll(3, 0), dict(muon=True, adam=True)),
    # Only by the contrast between hot steps and the others: always hot, it would vanish like canopy.
    thermal_vent=(lambda g, step: g * (1 + (step % 3 == 0)), dict(muon=True, adam=True)),
    always_vented=(lambda g, step: 2 * g, dict(muon=False, adam=False)),
    head_prune=(lambda g, step: g * (torch.arange(24) >= 12), dict(muon=True, adam=True)),
)


@pytest.mark.parametrize("optimiser", ["muon", "adam"])
def test_the_transforms_no_optimiser_feels_are_named(optimiser):
    assert set(GRADIENT_EDITS) <= set(FELT)
    unfelt = {name for name, (transform, _) in FELT.items() if felt(transform, optimiser) < 1e-3}
    assert unfelt == {name for name, (_, expected) in FELT.items() if not expected[optimiser]}


# --- the command line and whole runs ---


def test_the_list_names_every_idea_with_its_state_source_and_meaning():
    lines = show("--list-ideas").splitlines()
    rows = {}
    for line in lines:
        if line[:1].isupper():
            name = line.split()[0]
            rows[name] = (line, "")
        elif line.strip():  # the meaning may take several lines
            rows[name] = (rows[name][0], f"{rows[name][1]} {line.strip()}")
    ideas = {f.name.upper(): f.metadata for f in fields(Config) if f.metadata["fate"]}
    assert set(rows) - {"How"} == set(ideas)
    for name, about in ideas.items():
        head, meaning = rows[name]
        assert about["fate"] in FATES and about["fate"] in head and about["source"] in head
        assert meaning.strip().startswith(about["doc"])


def test_every_table_entry_is_an_idea():
    entries = {name for hooks in HOOKS.values() for name, _ in hooks}
    assert entries - {"muon_wd"} <= {f.name for f in fields(Config) if f.metadata["fate"]}


def test_the_list_is_printed(run_main):
    code, out, err = run_main("--list-ideas")
    assert (code, err) == (0, "") and "MYCORRHIZAL" in out and "PR #1434" in out


EVERYTHING = TOGETHER | dict(
    breathing_lr=True, grad_central=True, mycorrhizal=0.1, thermal_vent=1.0, sam_rho=0.02, canopy_lr=True,
    wd_schedule=0.1, predprey_lr=True, controlled_burn=0.05, burn_interval=3, synaptic_scale=True,
    weight_perturb=1e-3, perturb_interval=2, mutation_decay=1e-3, head_prune=0.5, progressive_grow=True,
    num_layers=5, weight_share=0, iterations=8, warmdown_iters=None,
)  # fmt: skip


def test_all_at_once_give_the_same_run_on_one_rank_and_two(launch_forks, tmp_path, dataset):
    results = []
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        outcome = launch_forks(tmp_path / str(ranks), dataset, ranks, **EVERYTHING)
        assert outcome.result and outcome.result["world_size"] == ranks, outcome.stderr[-3000:]
        results.append(outcome.result["prequant_val_bpb"])
    assert results[0] == pytest.approx(results[1], rel=2e-4)


def test_a_started_run_forgets_what_the_warm_up_remembered(tiny, dataset):
    """HEAD_PRUNE chooses in its first step; a choice made in the undone warm-up would be of other weights."""
    cfg = data_config(dataset, head_prune=0.5, head_prune_at=0)
    run, optimisers = make(cfg)
    train_gpt.warm_up(run, optimisers, train_gpt.TokenStream(cfg.data_path, "train", cfg.vocab_size))
    assert all(not w.memory for w in optimisers.weights)
