"""Depth recurrence (PR #895): repeated blocks, value embeddings, XSA, depths that grow while training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from tests.conftest import Traced, env_of, random_ids, random_model
from tests.support import reference
from train_gpt import (
    GPT,
    Config,
    Optimisers,
    Run,
    RunError,
    RunLog,
    Runtime,
    StepPlan,
    TokenStream,
    Trained,
    log_header,
    omit_own_value,
    plan_layers,
    plan_step,
    token_nats,
    train,
    train_step,
    weights_of,
)

LEAKY = dict(mlp_act="leaky_relu2", leaky_slope=0.5)
PUBLISHED = dict(num_layers=3, num_repeats=4, num_value_embeds=2, xsa_last_n=4, **LEAKY)
EVERYTHING = dict(
    num_repeats=3, num_value_embeds=2, value_residual=True, repeat_lora_rank=2, xsa_last_n=3, **LEAKY
)
CONFIGS = {
    "repeats": dict(num_repeats=3),
    "one_block": dict(num_layers=1, num_repeats=4),
    "odd_blocks": dict(num_layers=3, num_repeats=2),
    "no_cross_repeat": dict(num_repeats=3, cross_repeat_skip=False),
    "encoders_ignored": dict(num_repeats=2, encoder_layers=1),
    "value_embeds_flat": dict(num_layers=4, num_value_embeds=2),
    "value_embed_repeated": dict(num_repeats=2, num_value_embeds=1),
    "xsa_flat": dict(num_layers=4, xsa_last_n=1),
    "xsa_all": dict(num_layers=3, xsa_last_n=-1),
    "xsa_more_than_all": dict(num_repeats=2, xsa_last_n=99),
    "xsa_across_repeats": dict(num_repeats=3, xsa_last_n=3),
    "xsa_one_kv_head": dict(xsa_last_n=-1, num_kv_heads=1),
    "xsa_equal_heads": dict(xsa_last_n=-1, num_kv_heads=4),
    "value_residual_flat": dict(num_layers=4, value_residual=True),
    "value_residual_xsa": dict(num_repeats=2, value_residual=True, xsa_last_n=-1),
    "lora": dict(num_repeats=3, repeat_lora_rank=2),
    "lora_swiglu": dict(num_repeats=2, repeat_lora_rank=1, mlp_act="swiglu"),
    "shared": dict(num_layers=3, num_repeats=2, weight_share=2),
    "published": PUBLISHED,
    "everything": EVERYTHING,
    "everything_one_kv_head": EVERYTHING | dict(num_kv_heads=1),
    "everything_equal_heads": EVERYTHING | dict(num_kv_heads=4),
    "everything_parallel": EVERYTHING | dict(parallel_block=True),
    "everything_untied": EVERYTHING | dict(tie_embeddings=False),
    "everything_shared": EVERYTHING | dict(num_layers=3, weight_share=2),
    "everything_flat": EVERYTHING | dict(num_layers=4, num_repeats=1, repeat_lora_rank=0),
}
SHALLOW = [
    (name, repeats)
    for name, knobs in CONFIGS.items()
    for repeats in range(1, knobs.get("num_repeats", 1))
    if name.startswith(("xsa", "value", "published", "everything"))
]
NEW_NAMES = ("loop_embed", "cross_repeat_scales", "value_embeds", "value_scales", "value_mix", "lora_")


def is_new(name: str) -> bool:
    return any(new in name for new in NEW_NAMES)


def at_depth(model: GPT, depth: int | None) -> GPT:
    """The model, with only its first layers running in every phase."""
    model.plans = [plan_layers(model.cfg, depth)]
    return model


# --- the forward pass ---


def matches_the_reference(cfg: Config, depth: int | None) -> None:
    """In float64: nine random layers in float32 come near the tolerance."""
    model, ids = random_model(cfg, torch.float64), random_ids(cfg, 2, 32)
    state = reference.as_float64(model.state_dict())
    expected = np.stack([reference.logits(state, row, cfg, depth) for row in ids])
    with torch.no_grad():
        np.testing.assert_allclose(at_depth(model, depth)(ids).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_reference(tiny, name, path):
    matches_the_reference(tiny(**CONFIGS[name]), None)


@pytest.mark.parametrize("name, repeats", SHALLOW)
def test_logits_of_fewer_repeats_are_the_reference(tiny, name, repeats, path):
    cfg = tiny(**CONFIGS[name])
    matches_the_reference(cfg, repeats * cfg.num_layers)


@pytest.mark.parametrize("last, same", [(2, True), (1, False), (0, False)])
def test_the_last_layers_are_those_of_the_current_depth(tiny, last, same):
    """At one repeat of two blocks, the last two layers are all of them."""
    ids, models = random_ids(tiny(), 2, 32), []
    for count in (last, -1):
        models.append(random_model(tiny(num_repeats=3, xsa_last_n=count)))
    a, b = (at_depth(model, 2)(ids) for model in models)
    assert torch.equal(a, b) == same


@pytest.mark.parametrize("depth", [None, 4, 2])
def test_future_tokens_never_move_past_logits(tiny, depth, path):
    cfg = tiny(**EVERYTHING)
    model, ids = at_depth(random_model(cfg), depth), random_ids(cfg, 2, 32)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % cfg.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=1e-5)
    assert (after[:, 20:] - before[:, 20:]).abs().amax(dim=-1).min() > 0.01, "the change must be visible"


def test_logits_at_places_are_those_of_the_whole_sequence(tiny):
    cfg = tiny(**EVERYTHING)
    model, ids = at_depth(random_model(cfg), 4), random_ids(cfg, 2, 32)
    places = torch.tensor([[3, 31, 0], [7, 7, 20]])
    expected = model(ids).take_along_dim(places[..., None], dim=1)
    torch.testing.assert_close(model(ids, positions=places), expected)


def test_bf16_logits_are_float32_and_near(tiny):
    cfg = tiny(**EVERYTHING)
    ids = random_ids(cfg, 2, 32)
    exact, rounded = random_model(cfg)(ids), random_model(cfg, torch.bfloat16)(ids)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


# --- how the new tensors start, and their sizes ---


def published_model(**knobs) -> GPT:
    """Without memory: names and shapes only."""
    sizes = dict(vocab_size=1024, model_dim=832, num_heads=8, num_kv_heads=4, mlp_mult=2.0)
    with torch.device("meta"):
        return GPT(replace(Config(), **PUBLISHED | sizes | knobs))


@pytest.mark.parametrize("knobs, count", [
    (dict(num_repeats=4), 17_140_056), (dict(num_repeats=5), 17_150_040), (dict(num_repeats=6), 17_160_024),
    (dict(model_dim=880, mlp_mult=3.0), 23_662_344),
])  # fmt: skip
def test_the_published_models_have_their_published_parameters(knobs, count):
    assert sum(p.numel() for p in published_model(**knobs).parameters()) == count


def test_names_and_shapes_of_the_new_tensors_are_the_published_ones():
    shapes = {name: tuple(p.shape) for name, p in published_model().state_dict().items() if is_new(name)}
    tables = {f"value_embeds.{number}.weight": (1024, 832) for number in range(2)}
    scales = {"loop_embed": (12, 832), "value_scales": (12, 2, 832), "cross_repeat_scales": (3, 3, 832)}
    assert shapes == tables | scales


def test_a_default_model_has_none_of_the_new_tensors(tiny):
    assert [name for name in GPT(tiny()).state_dict() if is_new(name)] == []


@pytest.mark.parametrize("repeats, skips", [(1, 2), (2, 0)])
def test_repeats_replace_the_unet(tiny, repeats, skips):
    cfg = tiny(num_layers=4, num_repeats=repeats)
    assert GPT(cfg).skip_weights.shape == (skips, cfg.model_dim)


@pytest.mark.parametrize("pattern, value", [
    ("loop_embed", 0.0), ("value_scales", 0.0), ("cross_repeat_scales", 0.0), ("lora_b", 0.0),
    ("value_mix", 0.5),
])  # fmt: skip
def test_a_new_tensor_starts_at_its_published_value(tiny, pattern, value):
    found = [p for name, p in GPT(tiny(**EVERYTHING)).named_parameters() if pattern in name]
    assert found and all(bool((p == value).all()) for p in found)


def test_value_tables_start_normal_and_differ(tiny):
    torch.manual_seed(0)
    tables = [table.weight for table in GPT(tiny(num_value_embeds=2)).value_embeds]
    for table in tables:
        shares = [(table.abs() < z).float().mean().item() for z in (0.5, 1, 2)]
        assert shares == pytest.approx([0.3829, 0.6827, 0.9545], abs=0.02)
        assert table.mean().item() == pytest.approx(0, abs=0.05)
    assert not torch.equal(*tables)


def test_one_lora_factor_starts_random_or_neither_would_learn(tiny):
    model = GPT(tiny(num_repeats=2, repeat_lora_rank=2))
    factors = [p for name, p in model.named_parameters() if name.endswith("lora_a")]
    assert len(factors) == 2 * len(model.blocks) and all(p.std() > 0.05 for p in factors)


R3 = dict(num_repeats=3, cross_repeat_skip=False)
# feature -> (base, what it adds to the base)
NOTHING_AT_FIRST = dict(
    value_embeds=({}, dict(num_value_embeds=2)),
    value_embeds_repeated=(R3, dict(num_value_embeds=2)),
    cross_repeat=(R3, dict(cross_repeat_skip=True)),
    lora=(R3, dict(repeat_lora_rank=2)),
    residual_of_the_first_layer=(dict(num_layers=1), dict(value_residual=True)),
)


@pytest.mark.parametrize("name", NOTHING_AT_FIRST)
def test_a_feature_changes_nothing_until_it_is_trained(tiny, name):
    base, added = NOTHING_AT_FIRST[name]
    plain, model = random_model(tiny(**base)), GPT(tiny(**base | added))
    new, unknown = model.load_state_dict(plain.state_dict(), strict=False)
    assert new and all(map(is_new, new)) and not unknown
    ids = random_ids(tiny(), 2, 32)
    torch.testing.assert_close(model(ids), plain(ids))


def test_untrained_repeats_are_layers_that_share_their_weights(tiny):
    """With the loop embedding at zero, repeats are as many layers that share blocks, without a U-Net."""
    shared = random_model(tiny(num_layers=6, weight_share=2, encoder_layers=0))
    model = GPT(tiny(num_repeats=3))
    state = {name: tensor for name, tensor in shared.state_dict().items() if name != "skip_weights"}
    new, unknown = model.load_state_dict(state, strict=False)
    assert {*new} == {"loop_embed", "cross_repeat_scales", "skip_weights"} and not unknown
    ids = random_ids(tiny(), 2, 32)
    torch.testing.assert_close(model(ids), shared(ids))


# --- roles, gradients, rows of repeats that have not begun ---


@pytest.mark.parametrize("patterns", [Config.control_tensor_name_patterns, ()])
def test_new_tensors_have_their_roles_and_are_float32(tiny, patterns):
    cfg = tiny(**EVERYTHING, control_tensor_name_patterns=patterns)
    weights = [w for w in weights_of(cfg, GPT(cfg, torch.bfloat16)) if is_new(w.name)]
    assert len(weights) == 2 + 4 + 2 * 2 * cfg.num_layers
    for w in weights:
        assert w.role == ("embed" if "value_embeds" in w.name else "scalar"), w.name
        assert w.param.dtype == torch.float32, w.name


def by_repeats(name: str, tensor: torch.Tensor, cfg: Config, repeats: int) -> list[torch.Tensor]:
    """[what the first `repeats` repeats use, what they do not] of a parameter."""
    axis, rows = 0, len(tensor)
    if name in ("loop_embed", "value_scales", "value_mix"):
        rows = repeats * cfg.num_layers
    elif name == "cross_repeat_scales":
        axis, rows = 1, repeats - 1
    elif "lora_" in name:
        rows = repeats
    return list(tensor.split((rows, tensor.size(axis) - rows), axis))


def batch_of(cfg: Config, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(cfg.vocab_size, (cfg.sequences, cfg.train_seq_len + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def stepped(cfg: Config, model: GPT, depth: int | None, steps: int) -> list[float]:
    """Train the model at one depth; the losses."""
    run = Run(cfg, Runtime(), RunLog(None, "x"), at_depth(model, depth), data=None)
    optimisers = Optimisers(cfg, model, run.runtime)
    plans = [StepPlan(0.1, 1.0, 0.9, step=step) for step in range(steps)]
    return [train_step(run, optimisers, batch_of(cfg, plan.step), plan, 99).item() for plan in plans]


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_step_moves_the_rows_of_its_depth_alone(tiny, repeats):
    cfg = tiny(**EVERYTHING, train_batch_tokens=128)
    model = random_model(cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped(cfg, model, repeats * cfg.num_layers, steps=2)
    for name, p in model.named_parameters():
        if not is_new(name):
            continue
        grads = by_repeats(name, p.grad, cfg, repeats)
        moves = by_repeats(name, (p - before[name]).detach(), cfg, repeats)
        for used, unused in (grads, moves):
            assert not unused.any(), name
            rows = used.any(-1)
            assert bool(rows.any() if "value_embeds" in name else rows.all()), name


@pytest.mark.parametrize("repeats", [2, 3])
def test_shallow_training_is_that_of_a_shallow_model(tiny, repeats):
    cfg = tiny(**EVERYTHING | dict(num_repeats=4), train_batch_tokens=128, muon_wd=0.04)
    small = replace(cfg, num_repeats=repeats)
    deep, shallow = random_model(cfg), GPT(small)
    state = {name: by_repeats(name, p, cfg, repeats)[0] for name, p in deep.state_dict().items()}
    shallow.load_state_dict(state)
    losses = [stepped(cfg, deep, repeats * cfg.num_layers, 3), stepped(small, shallow, None, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    trained = {name: by_repeats(name, p, cfg, repeats)[0] for name, p in deep.state_dict().items()}
    torch.testing.assert_close(trained, dict(shallow.state_dict()), rtol=1e-6, atol=1e-6)


# --- XSA alone ---

CASES = st.fixed_dictionaries(
    dict(kv=st.sampled_from([1, 2, 4]), group=st.integers(1, 3), length=st.integers(1, 5),
         size=st.integers(1, 8), seed=st.integers(0, 999))
)  # fmt: skip
FEW = settings(max_examples=25, deadline=None)


def outputs_and_values(kv: int, group: int, length: int, size: int, seed: int) -> tuple[torch.Tensor, ...]:
    """y [2, kv * group, length, size] and v [2, kv, length, size], float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, kv * group, length, size), (2, kv, length, size)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@FEW
@given(case=CASES)
def test_nothing_is_left_along_the_own_value(case):
    y, v = outputs_and_values(**case)
    products = omit_own_value(y, v) * v.repeat_interleave(case["group"], dim=1)
    torch.testing.assert_close(products.sum(-1), torch.zeros(y.shape[:-1], dtype=y.dtype))


@FEW
@given(case=CASES)
def test_what_is_taken_is_a_multiple_of_the_own_value(case):
    y, v = outputs_and_values(**case)
    taken, own = y - omit_own_value(y, v), v.repeat_interleave(case["group"], dim=1)
    cosine = torch.nn.functional.cosine_similarity(taken, own, dim=-1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine))


@FEW
@given(case=CASES)
def test_omitting_twice_is_omitting_once(case):
    y, v = outputs_and_values(**case)
    once = omit_own_value(y, v)
    torch.testing.assert_close(omit_own_value(once, v), once)


@FEW
@given(case=CASES, scale=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]))
def test_the_length_of_the_value_does_not_matter(case, scale, sign):
    y, v = outputs_and_values(**case)
    torch.testing.assert_close(omit_own_value(y, sign * scale * v), omit_own_value(y, v))


@FEW
@given(case=CASES)
def test_a_query_head_omits_the_value_of_its_group(case):
    y, v = outputs_and_values(**case)
    together = omit_own_value(y, v)
    for head in range(y.size(1)):
        group = head // (y.size(1) // v.size(1))
        alone = omit_own_value(y[:, head : head + 1], v[:, group : group + 1])
        torch.testing.assert_close(together[:, head : head + 1], alone)


def test_a_zero_value_takes_nothing_and_has_a_finite_gradient():
    y, v = torch.randn(1, 4, 3, 8), torch.zeros(1, 2, 3, 8, requires_grad=True)
    left = omit_own_value(y, v)
    left.square().sum().backward()
    assert torch.equal(left, y) and torch.isfinite(v.grad).all()


# --- depths that grow: the schedule ---

GROWING = dict(num_repeats=3, prog_depth="0.4:1,0.65:2,1.0:3")
BY_STEPS = dict(max_wallclock_seconds=0.0, iterations=100)
BY_CLOCK = dict(max_wallclock_seconds=100.0, iterations=10**6)


@pytest.mark.parametrize("limits, step, seconds, repeats", [
    (BY_STEPS, 0, 0, 1), (BY_STEPS, 39, 1e6, 1), (BY_STEPS, 40, 0, 2), (BY_STEPS, 64, 0, 2),
    (BY_STEPS, 65, 0, 3), (BY_STEPS, 99, 0, 3), (BY_STEPS, 100, 0, 3),
    (BY_CLOCK, 9, 0, 1), (BY_CLOCK, 9, 39.999, 1), (BY_CLOCK, 9, 40, 2), (BY_CLOCK, 9, 64.999, 2),
    (BY_CLOCK, 9, 65, 3), (BY_CLOCK, 9, 100, 3), (BY_CLOCK, 9, 120, 3),
    (BY_CLOCK | dict(iterations=10), 4, 1, 2), (BY_CLOCK | dict(iterations=10), 1, 65, 3),
])  # fmt: skip
def test_a_phase_ends_just_before_its_progress(tiny, limits, step, seconds, repeats):
    cfg = tiny(num_layers=3, **GROWING, **limits)
    assert cfg.phases[plan_step(cfg, step, seconds, 0.0).phase].depth == 3 * repeats


@pytest.mark.parametrize("text, expected", [
    ("0.4:1,0.65:2,1.0:3", [(0.4, 2), (0.65, 4), (1.0, 6)]),
    ("1.0:3,0.4:1,0.65:2", [(0.4, 2), (0.65, 4), (1.0, 6)]),
    ("1:3", [(1.0, 6)]), ("0.5:3", [(1.0, 6)]), ("", [(1.0, 6)]),
])  # fmt: skip
def test_phases_are_effective_layers_in_order_of_progress(tiny, text, expected):
    phases = tiny(num_repeats=3, prog_depth=text).phases
    assert [(phase.until, phase.depth) for phase in phases] == expected


def test_after_the_last_phase_its_depth_stays(tiny):
    cfg = tiny(num_repeats=3, prog_depth="0.2:1,0.5:3", **BY_STEPS)
    depths = [cfg.phases[plan_step(cfg, step, 0.0, 0.0).phase].depth for step in (19, 20, 50, 99)]
    assert depths == [2, 6, 6, 6]


@pytest.mark.parametrize("text", [
    "x", "0.4", "0.4:", ":3", "0.4:x,1:3", "0.4:1.5,1:3", "0.4:0,1:3", "0.4:-1,1:3", "0.4:5,1:3", "0.4:2",
    "0.4:1,1.0:2", "0.4:3,1.0:2", "nan:2,1:3", "inf:3", "0:1,1:3", "-0.1:1,1:3", "1.2:3",
])  # fmt: skip
def test_a_bad_schedule_is_refused_in_one_line(text):
    with pytest.raises(RunError) as refusal:
        Config.from_env(dict(NUM_REPEATS="3", PROG_DEPTH=text))
    message = str(refusal.value)
    assert refusal.value.code == 2 and message.startswith("PROG_DEPTH=") and "\n" not in message


def test_a_schedule_without_repeats_is_refused():
    with pytest.raises(RunError, match="PROG_DEPTH has no effect without NUM_REPEATS!=1"):
        Config.from_env(dict(PROG_DEPTH="1.0:1"))


# --- depths that grow: runs ---


class Kept(RunLog):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(None, "x")
        self.lines, self.events_kept = [], []

    def line(self, text, echo=True):
        self.lines.append(text)

    def event(self, event, **values):
        self.events_kept.append((event, values))

    def of(self, words: str) -> list[str]:
        return [line for line in self.lines if line.startswith(words)]


def grown(dataset, runtime: Runtime | None = None, **knobs) -> tuple[Run, Trained]:
    """A growing run of one block that has ended."""
    chosen = GROWING | dict(num_layers=1, iterations=10, train_batch_tokens=256) | knobs
    env = env_of(dataset, **chosen)
    names = {f.name.upper() for f in train_gpt.fields(Config)}
    cfg = Config.from_env({name: value for name, value in env.items() if name in names})
    data = train_gpt.load_validation(cfg, train_gpt.load_tokenizer(cfg))
    run = Run(cfg, runtime or Runtime(), Kept(), random_model(cfg), data)
    stream = TokenStream(cfg.data_path, "train", cfg.vocab_size)
    log_header(run, "x", stream)
    return run, train(run, Optimisers(cfg, run.model, run.runtime), stream)


# Of the two depths: training, validation; then the sliding windows, which only the end needs.
@pytest.mark.parametrize("warm_up, validate_every, late, graphs", [
    (1, 5, 0, 5), pytest.param(0, 5, 2, 5, marks=pytest.mark.slow),
    pytest.param(1, 0, 0, 4, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_growing_run_compiles_nothing_inside_the_clock(dataset, warm_up, validate_every, late, graphs):
    """Without a warm-up the training graphs must be, and the log must say so."""
    knobs = dict(num_repeats=2, prog_depth="0.5:1,1.0:2", eval_stride=8, train_batch_tokens=64)
    average = dict(swa_enabled=1, swa_every=1, swa_start_frac=2)
    cadence = dict(warmup_steps=warm_up, val_loss_every=validate_every)
    run, trained = grown(dataset, Traced(), **knobs, **average, **cadence)
    assert trained.late_graphs == late
    warned = [line for line in run.log.of("warning: ") if "graphs were compiled inside the clock" in line]
    assert len(warned) == (late > 0)
    run.score(run.cfg.eval_stride)
    assert run.runtime.graphs == graphs


def test_the_log_says_the_schedule_and_each_switch_once(dataset):
    log = grown(dataset)[0].log
    assert log.of("prog_depth:") == [
        "prog_depth: schedule=[(0.4, 1), (0.65, 2), (1.0, 3)] starting_repeats=1",
        "prog_depth: switched to 2 repeats at step:4 frac:0.40",
        "prog_depth: switched to 3 repeats at step:7 frac:0.70",
    ]
    switches = [values for event, values in log.events_kept if event == "phase"]
    steps = [dict(step=4, depth=2, progress=0.4), dict(step=7, depth=3, progress=0.7)]
    assert switches == [step | dict(length=32) for step in steps]


def test_a_run_of_one_depth_logs_no_schedule(dataset):
    log = grown(dataset, prog_depth="", iterations=3)[0].log
    assert log.of("prog_depth:") == [] and not [event for event, _ in log.events_kept if event == "phase"]


@pytest.mark.parametrize("stop, phases", [(10, [-3, -3, -2, -2, -1, -1]), (3, [-3, -3, -1])])
def test_validation_uses_the_current_depth_and_the_final_one_all(dataset, monkeypatch, stop, phases):
    """Also where the run is stopped early."""
    seen = []

    def spy(model, ids, targets, places=None, phase=-1):
        seen.append(phase)
        return token_nats(model, ids, targets, places, phase)

    monkeypatch.setattr(train_gpt, "token_nats", spy)
    monkeypatch.setattr(train_gpt, "is_finished", lambda cfg, step, *_: step == stop)
    monkeypatch.setattr(train_gpt, "warm_evaluation", lambda run: None)
    grown(dataset, val_loss_every=2, warmup_steps=0)
    passes = len(seen) // len(phases)
    assert passes and seen == [phase for phase in phases for _ in range(passes)]


@pytest.mark.parametrize("iterations, snapshots", [(10, 3), (20, 7)])
def test_snapshots_are_of_the_last_phase_alone(dataset, iterations, snapshots):
    knobs = dict(swa_enabled=1, swa_every=1, swa_start_frac=2)
    log = grown(dataset, iterations=iterations, **knobs)[0].log
    assert log.of("swa: averaging") == [f"swa: averaging {snapshots} checkpoints"]


def same_weights(runs: list[Run], **tolerance) -> None:
    torch.testing.assert_close(*(dict(run.model.state_dict()) for run in runs), **tolerance)


def test_the_micro_batch_does_not_change_a_growing_run(dataset):
    runs = [grown(dataset, micro_batch_tokens=tokens)[0] for tokens in (0, 96)]
    same_weights(runs, rtol=1e-3, atol=2e-4)


def test_the_warm_up_of_every_depth_is_undone(dataset):
    runs = [grown(dataset, warmup_steps=steps)[0] for steps in (0, 2)]
    same_weights(runs, rtol=0, atol=0)
