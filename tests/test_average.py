"""Weight averages: what SWA and EMA take in and when, against float64; then whole runs that pack them."""

import json
import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from tests.conftest import env_of
from tests.support import reference
from train_gpt import GPT, Average, Config, RunError, StepPlan, plan_step

SHAPES = {"weight": (2, 3), "bias": (2,)}
PLAN = StepPlan(progress=0.5, lr_scale=0.1, muon_momentum=0.9)


def config(**knobs) -> Config:
    return replace(Config(), max_wallclock_seconds=0.0, num_layers=2, **knobs)


def history(steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Weights of a small model after each step, in float32; they wander far from their start."""
    rng = np.random.default_rng(seed)
    moves = {name: rng.normal(0, 3, (steps, *shape)).cumsum(0) for name, shape in SHAPES.items()}
    return [{name: move[i].astype(np.float32) for name, move in moves.items()} for i in range(steps)]


def averaged(
    cfg: Config, weights: list[dict], plans: list[StepPlan]
) -> tuple[dict[str, np.ndarray], Average]:
    """What Average puts into the model after steps that left these weights."""
    model = torch.nn.Linear(3, 2)
    average = Average(cfg, model)
    for after, plan in zip(weights, plans, strict=True):
        model.load_state_dict({name: torch.from_numpy(value) for name, value in after.items()})
        average.update(plan)
        assert all(np.array_equal(value, model.state_dict()[name]) for name, value in after.items())
    average.copy_into_model(len(plans))
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}, average


def mean(weights: list[dict], shares: list[float]) -> dict[str, np.ndarray]:
    """Weighted by `shares`, which need not add up to 1."""
    pairs, total = list(zip(shares, weights, strict=True)), sum(shares)
    return {name: sum(share * np.float64(w[name]) for share, w in pairs) / total for name in weights[0]}


def close(ours: dict, expected: dict, **tolerance) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, **(dict(rtol=1e-5, atol=1e-4) | tolerance))


def plans_of(cfg: Config) -> list[StepPlan]:
    return [plan_step(cfg, step, 0.0, 0.0) for step in range(cfg.iterations)]


# --- SWA ---


@settings(max_examples=150, deadline=None)
@given(
    iterations=st.integers(1, 40),
    warmdown=st.integers(1, 50),
    start=st.sampled_from([0.0, 0.15, 0.4, 0.5, 1.0, 1.5]),
    every=st.integers(1, 12),
    half_shallow=st.booleans(),
)
def test_swa_is_the_mean_of_its_snapshots(iterations, warmdown, start, every, half_shallow):
    deep = dict(num_repeats=2, prog_depth="0.5:1,1.0:2") if half_shallow else {}
    swa = dict(swa_enabled=True, swa_start_frac=start, swa_every=every)
    cfg = config(iterations=iterations, warmdown_iters=warmdown, **swa, **deep)
    taken = {iterations}  # the final weights, once
    for done in range(1, iterations + 1):
        before = done - 1
        full, scale = not half_shallow or before / iterations >= 0.5, min(1, (iterations - before) / warmdown)
        taken |= {done} if full and scale < start and done % every == 0 else set()
    weights = history(iterations)
    ours, average = averaged(cfg, weights, plans_of(cfg))
    close(ours, mean([weights[done - 1] for done in sorted(taken)], [1.0] * len(taken)))
    assert average.count == len(taken)


@pytest.mark.parametrize("phase, count", [(-1, 1), (-2, 0), (-3, 0)])
def test_swa_waits_for_the_last_phase(phase, count):
    cfg = config(num_repeats=3, prog_depth="0.3:1,0.6:2,1:3", swa_enabled=True, swa_every=1)
    average = Average(cfg, torch.nn.Linear(3, 2))
    average.update(replace(PLAN, phase=phase))
    assert average.count == count


@pytest.mark.parametrize("scale, count", [(0.39, 1), (0.4, 0), (0.41, 0), (0.0, 1)])
def test_swa_waits_until_the_rate_is_below_the_start(scale, count):
    average = Average(config(swa_enabled=True, swa_every=1), torch.nn.Linear(3, 2))
    average.update(replace(PLAN, lr_scale=scale))
    assert average.count == count


def test_swa_counts_completed_steps():
    average = Average(config(swa_enabled=True, swa_every=5), torch.nn.Linear(3, 2))
    counts = []
    for step in range(12):
        average.update(replace(PLAN, step=step))
        counts.append(average.count)
    assert counts == [0] * 4 + [1] * 5 + [2] * 3


@pytest.mark.parametrize("steps, every, count", [(6, 3, 2), (7, 3, 3), (8, 3, 3), (2, 3, 1)])
def test_the_final_weights_count_once(steps, every, count):
    cfg, weights = config(swa_enabled=True, swa_every=every), history(steps)
    ours, average = averaged(cfg, weights, [replace(PLAN, step=step) for step in range(steps)])
    taken = sorted({*range(every, steps + 1, every), steps})
    close(ours, mean([weights[done - 1] for done in taken], [1.0] * len(taken)))
    assert average.count == len(taken) == count


def test_without_a_snapshot_swa_gives_the_final_weights():
    cfg, weights = config(swa_enabled=True, swa_start_frac=0.0), history(9)
    ours, average = averaged(cfg, weights, [replace(PLAN, step=step) for step in range(9)])
    close(ours, weights[-1], rtol=0, atol=0)
    assert average.count == 1


# --- EMA ---


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 40), decay=st.floats(1e-3, 0.99999), shallow=st.booleans())
def test_ema_is_the_mean_without_its_bias(steps, decay, shallow):
    cfg, weights = config(ema_decay=decay, num_repeats=3), history(steps, seed=steps)
    plans = [replace(PLAN, step=step, lr_scale=1.0, phase=-2 if shallow else -1) for step in range(steps)]
    ours, average = averaged(cfg, weights, plans)
    shares = [(1 - decay) * decay ** (steps - 1 - i) / (1 - decay**steps) for i in range(steps)]
    assert sum(shares) == pytest.approx(1)
    close(ours, mean(weights, shares), rtol=1e-4, atol=1e-4)
    assert average.count == steps


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999])
def test_the_first_ema_is_the_weights(decay):
    (weights,) = history(1)
    close(averaged(config(ema_decay=decay), [weights], [PLAN])[0], weights, rtol=1e-6, atol=0)


# --- both ---

KINDS = {
    "swa": dict(swa_enabled=True, swa_every=3),
    "ema_short": dict(ema_decay=0.3),
    "ema_long": dict(ema_decay=0.9999),
}


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), steps=st.integers(1, 30), seed=st.integers(0, 99))
def test_the_mean_of_equal_weights_is_those_weights(kind, steps, seed):
    (weights,) = history(1, seed)
    plans = [replace(PLAN, step=step) for step in range(steps)]
    close(averaged(config(**KINDS[kind]), [weights] * steps, plans)[0], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, expected", [("swa", 3.0), ("ema_short", (0.3 * 2 + 4) / 1.3)])
def test_every_weight_of_the_model_is_averaged(tiny, kind, expected):
    features = dict(num_repeats=2, num_value_embeds=1, value_residual=True, tie_embeddings=False)
    cfg = tiny(**features, **KINDS[kind] | (dict(swa_every=1) if kind == "swa" else {}))
    model = reference.randomise(GPT(cfg))
    average = Average(cfg, model)
    for step, value in enumerate((2.0, 4.0)):
        model.load_state_dict({n: torch.full_like(t, value) for n, t in model.state_dict().items()})
        average.update(replace(PLAN, step=step))
    average.copy_into_model(2)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert all((t - expected).abs().lt(1e-5).all() for t in model.state_dict().values())


def test_no_average_takes_no_memory_and_no_snapshot():
    average = Average(config(), torch.nn.Linear(3, 2))
    for step in range(100):
        average.update(replace(PLAN, step=step))
    assert (average.kind, average.total, average.count) == ("", [], 0)


REFUSED = {
    "both": dict(SWA_ENABLED="1", EMA_DECAY="0.8"),
    "start_alone": dict(SWA_START_FRAC="0.3"),
    "cadence_alone": dict(SWA_EVERY="10"),
    "endless": dict(EMA_DECAY="1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_average_that_would_do_nothing_is_refused(case):
    with pytest.raises(RunError, match=list(REFUSED[case])[-1]):
        Config.from_env(REFUSED[case])


# --- whole runs ---

# The rate is below 0.65 from the step with 6 left: snapshots after steps 15 to 20 only.
SCHEDULE = dict(iterations=20, warmdown_iters=10)
RUNS = {
    "swa_and_the_last": (dict(swa_enabled=1, swa_start_frac=0.65, swa_every=3), [15, 18, 20], [1, 1, 1]),
    "swa_with_the_last": (dict(swa_enabled=1, swa_start_frac=0.65, swa_every=4), [16, 20], [1, 1]),
    "ema": (dict(ema_decay=0.8), range(1, 21), [0.8 ** (20 - step) for step in range(1, 21)]),
}


@pytest.fixture
def traced(monkeypatch, capfd, tmp_path, dataset):
    """traced(knob=value, ...) -> (weights after each step, outcome) of main() in tmp_path / "one"."""
    folder, seen, step = tmp_path / "one", [], train_gpt.train_step
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])

    def noting(run, *given):
        loss = step(run, *given)
        seen.append({name: tensor.numpy().copy() for name, tensor in run.model.state_dict().items()})
        return loss

    def call(**knobs) -> tuple[list[dict], str]:
        monkeypatch.setattr(os, "environ", env_of(dataset, **knobs))
        monkeypatch.setattr(train_gpt, "train_step", noting)
        with pytest.raises(SystemExit) as end:
            train_gpt.main()
        assert end.value.code == 0
        return seen[-knobs["iterations"] :], capfd.readouterr().out  # without the warm-up's

    return call


def saved(folder) -> dict[str, np.ndarray]:
    return {n: t.numpy() for n, t in torch.load(folder / "final_model.pt", weights_only=True).items()}


def events_of(folder, kind: str) -> list[dict]:
    (path,) = folder.glob("logs/*.jsonl")
    return [found for line in path.read_text().splitlines() if (found := json.loads(line))["event"] == kind]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_packs_the_average(traced, tmp_path, name):
    knobs, steps, shares = RUNS[name]
    weights, out = traced(**SCHEDULE, **knobs)
    close(saved(tmp_path / "one"), mean([weights[step - 1] for step in steps], shares), rtol=1e-4, atol=1e-6)
    kind = name[:3]
    assert len(re.findall(rf"^{kind}: averaging {len(steps)} checkpoints$", out, re.M)) == 1
    (average,), live = (
        events_of(tmp_path / "one", "average"),
        events_of(tmp_path / "one", "val")[-1]["val_bpb"],
    )
    assert (average["kind"], average["count"], average["live_val_bpb"]) == (kind, len(steps), live)
    result = json.loads(out.rpartition("RESULT ")[2])
    assert result["live_val_bpb"] == round(live, 8) != result["prequant_val_bpb"]
    assert result["prequant_val_bpb"] == round(average["val_bpb"], 8)
    assert result["val_bpb"] == pytest.approx(average["val_bpb"], abs=0.01)


def test_two_ranks_deepen_and_average_as_one(traced, launch_forks, tmp_path, dataset):
    deep = dict(num_repeats=2, prog_depth="0.5:1,1:2", xsa_last_n=2, num_value_embeds=1, muon_wd=0.1)
    knobs = SCHEDULE | RUNS["swa_and_the_last"][0] | deep
    (tmp_path / "two").mkdir()
    two = launch_forks(tmp_path / "two", dataset, ranks=2, **knobs)
    traced(**knobs)
    assert two.result and two.result["world_size"] == 2, two.stderr[-3000:]
    close(saved(tmp_path / "two"), saved(tmp_path / "one"), rtol=1e-3, atol=1e-4)
    (ours,), (theirs,) = two.of("average"), events_of(tmp_path / "one", "average")
    assert ours["count"] == theirs["count"] == 3
    turns = [
        [event["step"] for event in events]
        for events in (two.of("phase"), events_of(tmp_path / "one", "phase"))
    ]
    assert turns == [[10], [10]]
    assert ours["val_bpb"] == pytest.approx(theirs["val_bpb"], rel=1e-4)


def test_a_run_without_an_average_says_nothing_of_one(traced, tmp_path):
    weights, out = traced(**SCHEDULE)
    close(saved(tmp_path / "one"), weights[-1], rtol=0, atol=0)
    result = json.loads(out.rpartition("RESULT ")[2])
    assert result["live_val_bpb"] == result["prequant_val_bpb"] and "averag" not in out
    assert events_of(tmp_path / "one", "average") == []


@pytest.mark.parametrize("knobs", [dict(), dict(ema_decay=0.8)], ids=["live", "ema"])
def test_without_validations_the_same_weights_are_packed_and_they_alone_are_scored(traced, tmp_path, knobs):
    """VAL_LOSS_EVERY=-1, as in proxy waves."""
    results = {}
    for every in (0, -1):
        _, out = traced(**SCHEDULE, **knobs, val_loss_every=every, out_dir=f"every{every}")
        results[every] = json.loads(out.rpartition("RESULT ")[2])
        assert ("ema: averaging 20 checkpoints" in out) == bool(knobs)
    validated, silent = tmp_path / "one/every0", tmp_path / "one/every-1"
    close(saved(silent), saved(validated), rtol=0, atol=0)
    assert results[-1]["val_bpb"] == results[0]["val_bpb"] and results[0]["prequant_val_bpb"] is not None
    assert (results[-1]["live_val_bpb"], results[-1]["prequant_val_bpb"]) == (None, None)
    assert events_of(validated, "val") != [] == events_of(silent, "val") + events_of(silent, "average")
