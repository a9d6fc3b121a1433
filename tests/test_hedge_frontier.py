"""The study of Hedge on models of growing strength: its mixers are distributions that know no later token."""

import math

import numpy as np
import pytest
import torch

from sweeps.lab import hedge_frontier
from sweeps.lab.hedge_frontier import HINT_ORDERS, Facts, extrapolate, improvements, logit_nats, study

V = 12
COUNT = 400


def write_dump(path, tokens: np.ndarray, name="a", seed=0) -> None:
    """A dump of a made-up model that gives each token its own fixed probability."""
    logs = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(0)
    nats = -logs[torch.from_numpy(tokens[1:].astype(np.int64))]
    text = torch.from_numpy(tokens.astype(np.int64))
    hints = [hedge_frontier.train_gpt.top_followers(text, V, order)[0] for order in HINT_ORDERS]
    np.savez(
        path, name=name, tokens=tokens, bytes=np.full(len(tokens) - 1, 2), starts=np.array([90, 200]),
        nats=nats.float().numpy(), entropy=np.full(len(nats), float(-(logs.exp() * logs).sum())),
        hint_nats=torch.stack([-logs[hint] for hint in hints]).float().numpy(),
    )  # fmt: skip


def text(seed=0) -> np.ndarray:
    """Tokens that mostly follow a cycle."""
    rng = np.random.default_rng(seed)
    cycle = np.arange(COUNT + 1) * 5 % V
    return np.where(rng.random(COUNT + 1) < 0.3, rng.integers(0, V, COUNT + 1), cycle).astype(np.uint16)


def test_boosts_on_several_hints_make_a_distribution_of_logits():
    """By the softmax over all values; equal hints add up, and -1 is none."""
    rng = torch.Generator().manual_seed(1)
    logs = torch.randn(5, V, dtype=torch.float64, generator=rng).log_softmax(1)
    boosts = torch.randn(5, 4, dtype=torch.float64, generator=rng)
    hints = torch.tensor([[3, 3, 3, 3], [-1, 2, -1, 2], [0, 1, 2, 0], [-1, -1, -1, -1], [7, 0, 7, 11]])
    raised = logs.clone()
    for row in range(5):
        for hint, boost in zip(hints[row].tolist(), boosts[row], strict=True):
            if hint >= 0:
                raised[row, hint] += boost
    expected = -raised.log_softmax(1)
    hint_nats = -logs.gather(1, hints.clamp_min(0))
    for target in range(V):
        targets = torch.full((5,), target)
        found = logit_nats(boosts, -logs[:, target], hint_nats, hints, targets)
        torch.testing.assert_close(found, expected[:, target], rtol=1e-12, atol=1e-12)


def test_no_improvement_reads_later_tokens(tmp_path):
    whole, other = text(), text()
    other[301:] = (other[301:] + 1) % V
    mixed = []
    for number, tokens in enumerate((whole, other)):
        write_dump(tmp_path / f"{number}.npz", tokens)
        mixed.append(improvements(Facts(tmp_path / f"{number}.npz", V)))
    for name, nats in mixed[0].items():
        torch.testing.assert_close(mixed[1][name][:300], nats[:300], rtol=1e-5, atol=1e-5, msg=name)
        assert (mixed[1][name][300:] - nats[300:]).abs().max() > 1e-3, name


def test_a_study_reports_what_is_saved(tmp_path):
    for seed in range(3):
        write_dump(tmp_path / f"{seed}.npz", text(), f"model{seed}", seed)
    found = study([tmp_path / f"{seed}.npz" for seed in range(3)], V, 1.0)
    strengths = [row["isolated"] for row in found["models"].values()]
    assert strengths == sorted(strengths, reverse=True)
    for row in found["models"].values():
        facts = Facts(tmp_path / "0.npz", V)
        assert row["gains"]["hedge 6"] > 0.3 > row["gains"]["tilt"]
        assert row["tokens"] == COUNT == len(facts.nats)
    assert found["fits"].keys() == found["models"]["model0"]["gains"].keys()


def test_a_straight_line_is_drawn_out_exactly():
    fit = extrapolate([2.6, 2.2, 2.0, 1.8], [0.13, 0.11, 0.10, 0.09], 1.0)
    assert fit["gain"]["predicted"] == pytest.approx(0.05)
    assert fit["gain"]["high"] - fit["gain"]["low"] < 1e-6
    exact = [math.exp(0.5 * bpb - 3) for bpb in (2.6, 2.2, 2.0)]
    fit = extrapolate([2.6, 2.2, 2.0], exact, 1.0)["log_gain"]
    assert fit["predicted"] == pytest.approx(math.exp(-2.5)) and fit["slope"] == pytest.approx(0.5)


def test_the_interval_is_students():
    """Three points, one degree of freedom: t = 12.71 times the spread of a new point."""
    x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.1, 2.9])
    slope, level = np.polyfit(x, y, 1)
    sigma = math.sqrt(((y - level - slope * x) ** 2).sum())
    reach = 12.71 * sigma * math.sqrt(1 + 1 / 3 + (0 - 2) ** 2 / 2)
    fit = extrapolate(x.tolist(), y.tolist(), 0.0)["gain"]
    assert fit["high"] - fit["predicted"] == pytest.approx(reach, rel=1e-6)
