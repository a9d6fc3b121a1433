"""Scales by SDClip and GPTQ: the published recurrences, what they may never lose, and who has a Hessian."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt
from tests.support import reference
from tests.test_artifact import ABOUT, WIDE, trained_like
from train_gpt import GPT, Config, Gptq, RunError, pack, quantise_rows, sdclip_steps, unpack, watched_inputs


def correlated(columns: int = 200, seed: int = 0, tokens: int = 900) -> torch.Tensor:
    """Inputs [tokens, columns] of very different sizes that depend on each other."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, columns // 4, generator=rng)
    x = hidden @ torch.randn(columns // 4, columns, generator=rng)
    return (x + 0.3 * torch.randn(tokens, columns, generator=rng)) * torch.logspace(-1, 1, columns)


def weights(rows: int = 40, columns: int = 200, seed: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=rng) * torch.logspace(-1, 0, rows)[:, None]


def output_error(weight: torch.Tensor, arrays, inputs: torch.Tensor) -> np.ndarray:
    """What each row's output loses over all inputs, float64, from the arrays as stored."""
    restored = arrays[0].double() * arrays[1].double()[:, None]
    for columns in arrays[2:]:
        restored = restored * columns.double()
    return ((weight.double() - restored) @ inputs.double().T).square().sum(dim=1).numpy()


def lost_under(hessian: torch.Tensor, weight: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    """e H e of each row's error e, float64 [r]."""
    error = (weight - restored).double()
    return ((error @ hessian) * error).sum(dim=1)


def brain_surgeon(weight: np.ndarray, grid: np.ndarray, hessian: np.ndarray, levels: int) -> np.ndarray:
    """Integers by the definition: round one column, move all later ones to their least-squares optimum.

    No Cholesky factor: after each column the optimum of the free ones is solved for anew, float64.
    """
    damped = hessian + np.diag(hessian.diagonal() == 0).astype(float)
    damped = damped + 0.01 * damped.diagonal().mean() * np.eye(len(damped))
    order = np.argsort(-damped.diagonal(), kind="stable")
    weight = weight.copy()
    integers = np.zeros_like(weight)
    for position, column in enumerate(order):
        integers[:, column] = np.clip(np.rint(weight[:, column] / grid[:, column]), -levels, levels)
        error = integers[:, column] * grid[:, column] - weight[:, column]
        later = order[position + 1 :]
        if len(later):
            among = damped[np.ix_(later, later)]
            weight[:, later] -= np.outer(error, np.linalg.solve(among, damped[later, column]))
    return integers


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("columns", [100, 300])
def test_gptq_is_the_reference(columns, power):
    inputs, weight = correlated(columns), weights(columns=columns)
    hessian = inputs.T @ inputs
    solver = Gptq(hessian, power)
    steps = sdclip_steps(weight, 31, 12.85, 1.0)
    grid = steps[:, None] * solver.columns
    expected = brain_surgeon(weight.double().numpy(), grid.double().numpy(), hessian.double().numpy(), 31)
    ours = solver.solve(weight, grid, 31).numpy()
    # One tie that falls the other way in float32 moves the rest of its row.
    assert (ours == expected).all(axis=1).mean() > 0.9 and (ours == expected).mean() > 0.98


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("levels, sigmas", [(31, 12.85), (31, 3.0), (7, 3.0), (127, 20.0), (1, 1.0)])
def test_gptq_never_loses_more_than_rounding_to_the_nearest(seed, power, levels, sigmas):
    inputs, weight = correlated(seed=seed), weights(seed=seed)
    hessian = inputs.T @ inputs
    arrays = quantise_rows(weight, levels, hessian, clip="sdclip", sigmas=sigmas, column_power=power)
    grid = arrays[1].float()[:, None] * (arrays[2].float() if power else 1.0)
    nearest = (weight / grid).round().clamp(-levels, levels) * grid
    damped = hessian.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    ours = lost_under(damped, weight, arrays[0].float() * grid)
    theirs = lost_under(damped, weight, nearest)
    assert (ours <= theirs * (1 + 1e-4)).all()
    if levels == 31 and sigmas == 12.85:
        assert ours.sum() < 0.7 * theirs.sum()


def test_steps_by_column_lose_less_at_the_same_entropy():
    """Water-filling: the error falls although the integers cost no more in their scales' contexts."""
    inputs, weight = correlated(256, tokens=4000), weights(300, 256)
    hessian = inputs.T @ inputs
    sizes, errors = [], []
    for power in (0.0, 1.0):
        arrays = quantise_rows(weight, 127, hessian, clip="sdclip", sigmas=60.0, column_power=power)
        contexts = train_gpt.integer_contexts(
            [(0, 300, 256)], np.concatenate(train_gpt.scale_classes(arrays[0].numpy()))
        )
        symbols = arrays[0].numpy().ravel().view(np.uint8)
        sizes.append(
            len(train_gpt.rans_encode(symbols, contexts, train_gpt.frequency_tables(symbols, contexts, 192)))
        )
        errors.append(output_error(weight, arrays, inputs).sum())
    bits_lost = 8 * (sizes[1] - sizes[0]) / weight.numel()
    bits_won = 0.5 * math.log2(errors[0] / errors[1])
    assert bits_won - bits_lost > 0.1


def test_fine_steps_clip_no_weight():
    """A column of large inputs and large weights would want steps that int8 cannot count."""
    inputs, weight = correlated(), weights()
    inputs[:, 7] *= 1000
    weight[:, 7] *= 30
    hessian = inputs.T @ inputs
    arrays = quantise_rows(weight, 127, hessian, clip="sdclip", sigmas=30.0, column_power=1.0)
    restored = train_gpt.decode_matrix(arrays)
    assert ((restored - weight)[:, 7].abs() < 0.6 * arrays[1].float() * arrays[2][7].float()).all()
    assert arrays[0].abs().max() < 127


def test_columns_without_inputs_become_zeros_and_change_nothing_else():
    inputs, weight = correlated(), weights()
    inputs[:, [3, 77, 199]] = 0
    hessian = inputs.T @ inputs
    for power in (0.0, 1.0):
        arrays = quantise_rows(weight, 31, hessian, clip="sdclip", sigmas=12.85, column_power=power)
        assert (arrays[0][:, [3, 77, 199]] == 0).all() and all(part.isfinite().all() for part in arrays)
        assert arrays[0].abs().sum() > 0


def test_no_input_at_all_gives_zeros():
    integers, steps = quantise_rows(weights(), 31, torch.zeros(200, 200), clip="sdclip", sigmas=12.85)
    assert (integers == 0).all() and steps.isfinite().all()


# --- scales ---


@pytest.mark.parametrize("sigmas, levels", [(12.85, 31), (20.0, 127), (3.0, 7)])
def test_sdclip_is_the_published_rule(sigmas, levels):
    weight = weights()
    weight[5] = 0
    integers, steps = quantise_rows(weight, levels, clip="sdclip", sigmas=sigmas)
    deviations = weight.double().numpy().std(axis=1, ddof=1)
    expected = np.maximum(np.maximum(sigmas * deviations, 0) / levels, 2.0**-24).astype(np.float16)
    np.testing.assert_allclose(steps.float().numpy(), expected, rtol=2**-10)
    nearest = np.clip(np.rint(weight.numpy() / steps.float().numpy()[:, None]), -levels, levels)
    assert np.array_equal(integers.numpy(), nearest) and (integers[5] == 0).all()


def test_row_power_goes_from_each_rows_deviation_to_one_for_all():
    weight = weights()
    own, half, one = (sdclip_steps(weight, 31, 10.0, power).log() for power in (1.0, 0.5, 0.0))
    assert one.std() < 1e-6 < own.std() and torch.allclose(half.std(), own.std() / 2, rtol=1e-4)
    assert torch.allclose(own.mean(), one.mean(), atol=1e-5)


def test_steps_of_an_octave_are_few():
    weight = weights(rows=200)
    _, steps = quantise_rows(weight, 31, clip="sdclip", sigmas=12.85, per_octave=4)
    exact = sdclip_steps(weight, 31, 12.85, 1.0)
    logs = 4 * steps.float().log2()
    assert torch.allclose(logs, logs.round(), atol=0.01) and len(steps.unique()) < 20
    assert ((steps.float() / exact).log2().abs() <= 0.126).all()


def test_each_group_has_its_sigmas(tiny):
    knobs = dict(quant_clip_sigmas=10.0, mlp_quant_clip_sigmas=20.0, embed_quant_clip_sigmas=5.0)
    cfg = tiny(**WIDE, quant_clip="sdclip", quant_levels=31, **knobs)
    state = trained_like(cfg)
    restored = unpack(pack(cfg, state, ABOUT), "x")[0]
    for name, sigmas in (("blocks.0.attn.c_q", 10), ("blocks.1.mlp.fc", 20), ("value_embeds.0", 5)):
        weight = state[f"{name}.weight"]
        integers, steps = quantise_rows(weight, 31, clip="sdclip", sigmas=sigmas)
        assert torch.equal(restored[f"{name}.weight"], integers.float() * steps.float()[:, None]), name


def test_column_factors_come_back(tiny):
    cfg = tiny(**WIDE, quant_clip="sdclip", column_step_power=1.0, gptq_calibration_batches=1, codec="rans")
    state = trained_like(cfg)
    inputs = correlated(cfg.model_dim)
    hessians = {"blocks.0.attn.c_q.weight": inputs.T @ inputs}
    restored = unpack(pack(cfg, state, ABOUT, train_gpt.Calibration(hessians)), "x")[0]
    for name in ("blocks.0.attn.c_q.weight", "blocks.1.attn.c_q.weight"):
        quantise = train_gpt.pick_quantiser(cfg, name)
        integers, steps, columns = quantise(state[name], 127, hessians.get(name))
        assert torch.equal(restored[name], integers.float() * steps.float()[:, None] * columns.float()), name
        assert columns.float().std() > 0.1 if name in hessians else (columns == 1).all()
    assert pack(cfg, state, ABOUT, train_gpt.Calibration(hessians)) == pack(
        cfg, dict(reversed(state.items())), ABOUT, train_gpt.Calibration(hessians)
    )


# --- Hessians ---


ARCHITECTURES = {
    "tied": dict(tie_embeddings=True),
    "head": dict(),
    "repeats": dict(num_repeats=2, repeat_lora_rank=2, value_residual=True),
    "loop": dict(num_loops=1, loop_start=0, loop_end=1, enable_looping_at=0.0),
    "swiglu": dict(mlp_act="swiglu", parallel_block=True),
    "lanes": dict(parallel_start_layer=1),
    "bigram": dict(bigram_vocab_size=640, bigram_dim=320, smear_gate_enabled=True),
    "shared": dict(weight_share=1),
}


def wide_model(tiny, knobs: dict) -> tuple[Config, GPT]:
    cfg = tiny(**WIDE | knobs)
    return cfg, reference.randomise(GPT(cfg))


def by_linear_calls(model: GPT, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """X^T X of every weight, float64, by watching torch's own F.linear instead of modules."""
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    sums: dict[str, torch.Tensor] = {}

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.linear and args[1].data_ptr() in names:
                x = args[0].detach().flatten(0, -2).double()
                name = names[args[1].data_ptr()]
                sums[name] = sums.get(name, 0) + x.T @ x
            return function(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        model(ids)
    return sums


@pytest.mark.parametrize("knobs", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_hessians_hold_the_inputs_of_all_passes(tiny, knobs):
    cfg, model = wide_model(tiny, knobs)
    names = [plan.name for plan in train_gpt.plan_tensors(cfg, model.state_dict()) if plan.levels]
    ids = torch.randint(cfg.vocab_size, (3, cfg.train_seq_len), generator=torch.Generator().manual_seed(2))
    expected = by_linear_calls(model, ids)
    with watched_inputs(model, names) as sums, torch.no_grad():
        model(ids[:1])
        model(ids[1:])
    model(ids)  # no longer watched
    tables = set(names) - expected.keys()
    assert sums.keys() == set(names) - tables
    for name, total in sums.items():
        least = 1e-3 * float(expected[name].abs().max())
        torch.testing.assert_close(total.double(), expected[name], rtol=1e-3, atol=least)
    assert all("emb" in name for name in tables)


def test_gptq_without_time_for_it_is_refused():
    env = dict(GPTQ_CALIBRATION_BATCHES="4")
    with pytest.raises(RunError, match="within MAX_WALLCLOCK_SECONDS: set GPTQ_RESERVE_SECONDS"):
        Config.from_env(env)
    Config.from_env(env | dict(GPTQ_RESERVE_SECONDS="5"))
    Config.from_env(env | dict(MAX_WALLCLOCK_SECONDS="0"))


# --- whole runs ---

# Wide enough for integers, nothing learns, so that all ranks and runs have the same weights to pack.
STILL = dict(model_dim=320, num_layers=1, iterations=1, train_batch_tokens=480, tied_embed_lr=0, matrix_lr=0)
STILL |= dict(scalar_lr=0, max_wallclock_seconds=100, gptq_reserve_seconds=20, gptq_calibration_batches=3)
STILL |= dict(quant_clip="sdclip", quant_levels=31, column_step_power=1, codec="rans")


def test_a_run_packs_with_the_hessians_of_all_ranks(new):
    """The same run, the same bytes; two ranks by rule: float32 sums in another order may turn a tie,
    so that under 0.1 % of the weights differ."""
    runs = [new(STILL, ranks) for ranks in (1, 1, 2)]
    packed = []
    for run in runs:
        assert run.start() == [0] * run.ranks, run.text("0.err")
        (event,) = run.events("gptq")
        assert (event["hessians"], event["tokens"]) == (5, 3 * 480)
        seconds = run.result()["train_seconds"]
        assert event["seconds"] < seconds <= 100
        packed.append((run.path / train_gpt.MODEL_FILE).read_bytes())
    assert packed[0] == packed[1]
    one, two = [unpack(blob, "x")[0] for blob in packed[1:]]
    changed = sum(one[name].ne(two[name]).sum().item() for name in one)
    assert changed < 1e-3 * sum(tensor.numel() for tensor in one.values())


def test_tables_that_have_no_hessian_are_named(new):
    run = new(STILL | dict(num_value_embeds=1))
    assert run.start() == [0], run.text("0.err")
    assert (
        "gptq: value_embeds.0.weight is read by rows, it has no inputs: rounded to the nearest"
        in run.text("logs/r.txt")
    )


def test_calibration_beyond_the_clock_is_over_it(new):
    slow = """
inside = train_gpt.watched_inputs
def watched(*given):
    import time
    time.sleep(3)
    return inside(*given)
train_gpt.watched_inputs = watched
"""
    run = new(STILL | dict(max_wallclock_seconds=2.5, gptq_reserve_seconds=0.5, iterations=1))
    assert run.start(slow) == [train_gpt.OVER_TRAIN_TIME], run.text("0.err")
    assert "raise GPTQ_RESERVE_SECONDS or lower GPTQ_CALIBRATION_BATCHES" in run.error()


# --- sizes ---

SDCLIP = dict(quant_clip="sdclip", quant_levels=63, quant_clip_sigmas=24.0, codec="rans")


@pytest.mark.parametrize("knobs", [
    {}, dict(quant_clip_sigmas=12.0), dict(mlp_quant_clip_sigmas=48.0, embed_quant_clip_sigmas=16.0),
    dict(row_step_power=0.5), dict(codec="zstd", zstd_level=22), dict(codec="zlib"),
    dict(quant_levels=3, quant_clip_sigmas=3.0), dict(control_float16=True, steps_per_octave=4),
])  # fmt: skip
def test_the_predicted_size_knows_sigmas_and_coder(tiny, knobs):
    cfg = tiny(**WIDE | dict(vocab_size=1024) | SDCLIP | knobs)
    model = reference.randomise(GPT(cfg))
    size = len(pack(cfg, model.state_dict(), ABOUT))
    assert train_gpt.predict_size(cfg, model) == pytest.approx(size, rel=0.015)


OWN_STEPS = dict(column_step_power=0.75, row_step_power=0.5, steps_per_octave=4, quant_levels=127)


@pytest.mark.parametrize("knobs", [
    {}, dict(quant_clip_sigmas=32.0), OWN_STEPS | dict(quant_clip_sigmas=50.0),
    OWN_STEPS | dict(quant_clip_sigmas=100.0, rate_lambda=0.1),
])  # fmt: skip
def test_with_a_calibration_the_predicted_size_knows_the_weights(tiny, knobs):
    """Rows, columns and steps are unlike each other, and inputs depend on each other."""
    cfg = tiny(**WIDE | dict(vocab_size=1024) | SDCLIP | knobs | dict(gptq_calibration_batches=1))
    model = reference.randomise(GPT(cfg))
    state = model.state_dict()
    rng = torch.Generator().manual_seed(0)
    calibration = train_gpt.Calibration()
    for plan in train_gpt.plan_tensors(cfg, state):
        if plan.levels:
            rows, columns = plan.shape
            unlike = torch.randn(rows, 1, generator=rng) + torch.randn(columns, generator=rng)
            state[plan.name].mul_((0.5 * unlike).exp())
            inputs = correlated(columns)
            calibration.hessians[plan.name] = inputs.T @ inputs
            calibration.scales[plan.name] = math.exp(torch.randn(1, generator=rng).item())
    size = len(pack(cfg, state, ABOUT, calibration))
    assert train_gpt.predict_size(cfg, model, calibration) == pytest.approx(size, rel=0.015)


@pytest.mark.parametrize("sigmas, levels", [(12.85, 31), (20, 127), (3, 7), (2, 1), (0.5, 3)])
def test_the_entropy_of_a_rounded_gaussian(sigmas, levels):
    numbers = np.random.default_rng(0).standard_normal(400_000)
    integers = np.clip(np.rint(numbers * levels / sigmas), -levels, levels).astype(int) + levels
    shares = np.bincount(integers) / len(integers)
    expected = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    assert train_gpt.rounded_entropy(sigmas, levels) == pytest.approx(expected, abs=0.005)


@pytest.fixture
def packed_to(tiny, tmp_path):
    """packed_to(SIZE_TARGET, bytes of code) -> (artifact, log) of a model with random weights."""

    def make(target: str, code: int = 1000, **knobs):
        cfg = tiny(**WIDE | SDCLIP | knobs, size_target=target)
        model = reference.randomise(GPT(cfg))
        log = train_gpt.RunLog(tmp_path, "x")
        run = train_gpt.Run(cfg, train_gpt.Runtime(), log, model, data=None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt, "own_source", lambda: bytes(code))
            encoded, blob = train_gpt.pack_to_size(run, model.state_dict(), train_gpt.Calibration(), ABOUT)
        log.close()
        return blob, (tmp_path / "x.txt").read_text()

    return make


@pytest.mark.parametrize("target", [450_000, 600_000, 800_000])
def test_a_target_is_filled_and_never_passed(packed_to, target):
    blob, log = packed_to(str(target))
    assert 0.998 * (target - 1000) <= len(blob) <= target - 1000
    assert f"size_target: {target - 1000 - len(blob)} bytes unused" in log
    assert unpack(blob, "x")[0]


def test_a_target_is_filled_by_a_trellis_too(packed_to):
    blob, _ = packed_to("500000", trellis=True, num_layers=1)
    assert 0.998 * 499_000 <= len(blob) <= 499_000
    header = unpack(blob, "x")[1]
    assert "trellis" in {plane for _, _, planes in header["tensors"] for plane in planes}


def test_a_target_beyond_what_the_levels_can_use_leaves_bytes(packed_to):
    """Finer steps than 4 deviations / levels would clip: the rest is told, not wasted."""
    blob, log = packed_to("auto")
    assert len(blob) < 2_000_000 and "bytes unused" in log and log.count("sigmas x") <= 3


def test_a_target_that_nothing_fits_is_one_line(packed_to):
    with pytest.raises(RunError, match="SIZE_TARGET=20000: no steps were found that fit") as refusal:
        packed_to("20000")
    assert refusal.value.code == train_gpt.OVER_SIZE


def test_no_target_is_written_as_nothing_or_0(tiny):
    model = reference.randomise(GPT(tiny(**WIDE, **SDCLIP)))
    sizes = {train_gpt.predict_size(tiny(**WIDE, **SDCLIP, size_target=text), model) for text in ("", "0")}
    assert len(sizes) == 1 and min(sizes) > 0


def test_a_target_below_the_scripts_own_size_is_refused_before_the_training(tiny):
    cfg = tiny(**WIDE, **SDCLIP, size_target="20000")
    with pytest.raises(
        RunError, match="SIZE_TARGET=20000 leaves nothing to the model: the script alone takes"
    ):
        train_gpt.predict_size(cfg, GPT(cfg))


def test_a_target_below_what_stays_float_is_refused_before_the_training(tiny, monkeypatch):
    """SIZE_TARGET widens the steps of integers alone: a model without any would be trained in vain."""
    monkeypatch.setattr(train_gpt, "own_source", lambda: bytes(1000))
    cfg = tiny(**WIDE, **SDCLIP, size_target="40000", int8_keep_float_max_numel=2**30)
    model = GPT(cfg)
    with pytest.raises(RunError, match="leaves 39000 bytes .* or lower INT8_KEEP_FLOAT_MAX_NUMEL"):
        train_gpt.predict_size(cfg, model)
    cfg = replace(cfg, int8_keep_float_max_numel=256)
    assert train_gpt.predict_size(cfg, model) == 39_000


def test_matrices_of_more_values_than_the_limit_become_integers(tiny):
    model = reference.randomise(GPT(tiny()))
    for limit, expected in ((65_536, 0), (512, 9), (511, 13), (0, 13)):
        plans = train_gpt.plan_tensors(tiny(int8_keep_float_max_numel=limit), model.state_dict())
        quantised = [plan for plan in plans if plan.levels]
        sizes = {plan.count for plan in quantised}
        assert all(size > limit for size in sizes)
        assert len(quantised) == expected, [(plan.name, plan.count) for plan in plans]


@pytest.mark.parametrize("target", ["600000", "auto"])
def test_the_predicted_size_is_the_targets_or_the_finest_steps(packed_to, tiny, monkeypatch, target):
    monkeypatch.setattr(train_gpt, "own_source", lambda: bytes(1000))
    cfg = tiny(**WIDE, **SDCLIP, size_target=target)
    predicted = train_gpt.predict_size(cfg, reference.randomise(GPT(cfg)))
    if target == "600000":
        assert predicted == 599_000
    else:
        assert predicted == pytest.approx(len(packed_to(target)[0]), rel=0.02)


@pytest.mark.parametrize("value, message", [
    ("much", "is neither auto nor a number of bytes"), ("16000001", "is not within the limit"),
    ("-5", "is not within the limit"),
])  # fmt: skip
def test_a_target_that_is_none_is_refused(value, message):
    with pytest.raises(RunError, match=f"SIZE_TARGET='?{value}'? {message}"):
        Config.from_env(dict(SIZE_TARGET=value, QUANT_CLIP="sdclip"))


# --- steps against each other ---


def test_balanced_steps_make_every_weight_cost_the_same(tiny):
    """By the definition, anew: each matrix rounded alone, and the KL divergence of the output in float64."""
    knobs = dict(SDCLIP, gptq_calibration_batches=1, step_balance_rounds=4, column_step_power=1.0)
    cfg = tiny(**WIDE | dict(num_layers=1), **knobs)
    model = reference.randomise(GPT(cfg))
    run = train_gpt.Run(cfg, train_gpt.Runtime(), train_gpt.RunLog(None, ""), model, data=None)
    plans = [plan for plan in train_gpt.plan_tensors(cfg, model.state_dict()) if plan.levels]
    ids = torch.randint(cfg.vocab_size, (6, cfg.train_seq_len), generator=torch.Generator().manual_seed(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def costs(scales: dict) -> dict[str, float]:
        """Nats a token that rounding each matrix alone costs, over its weights."""
        found = {}
        with torch.no_grad():
            whole = model(ids).double().log_softmax(-1)
            for plan in plans:
                calibration = train_gpt.Calibration(scales=scales)
                arrays = train_gpt.encode_matrix(cfg, plan, before[plan.name], calibration)
                restored = arrays[0].float() * arrays[1].float()[:, None] * arrays[2].float()
                model.get_parameter(plan.name).copy_(restored)
                rounded = model(ids).double().log_softmax(-1)
                model.get_parameter(plan.name).copy_(before[plan.name])
                found[plan.name] = float((whole.exp() * (whole - rounded)).sum(-1).mean()) / plan.count
        return found

    calibration = train_gpt.Calibration()
    train_gpt.balance_steps(run, plans, calibration, ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    spread = [np.log2(list(costs(scales).values())) for scales in ({}, calibration.scales)]
    assert spread[1].std() < 0.4 * spread[0].std()
    counts = np.array([plan.count for plan in plans])
    logs = np.log2([calibration.scales[plan.name] for plan in plans])
    assert abs(logs @ counts) < 1e-6 * counts.sum(), "the bytes stay, to first order"


def test_a_run_balances_on_all_ranks_alike(new):
    knobs = STILL | dict(step_balance_rounds=1, max_wallclock_seconds=300, gptq_reserve_seconds=200)
    scales = []
    for ranks in (1, 2):
        run = new(knobs, ranks)
        assert run.start() == [0] * ranks, run.text("0.err")
        scales.append(run.events("gptq")[0]["scales"])
    assert len(scales[0]) == 5 and scales[1] == pytest.approx(scales[0], rel=0.02)
