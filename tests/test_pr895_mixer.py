"""PR #895's mixer, kept for comparison: it is what it is said to be, and its number is no code length."""

import json
import math
import sys

import numpy as np
import pytest

from records import pr895_mixer

VOCAB = 12


@pytest.fixture
def short(monkeypatch):
    """Batches of 16 and segments of 4, so that a literal reference stays quick."""
    for name, value in dict(BATCH=16, SEGMENT=4, WARM_UP=20).items():
        monkeypatch.setattr(pr895_mixer, name, value)


def predictions(count: int, vocab: int = VOCAB, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities [N, V], tokens [N+1]) of a calibrated predictor: the tokens are drawn from them."""
    rng = np.random.default_rng(seed)
    p = np.exp(2.5 * rng.standard_normal((count, vocab)))
    p /= p.sum(1, keepdims=True)
    drawn = (p.cumsum(1) < rng.random((count, 1))).sum(1).clip(max=vocab - 1)
    return p, np.concatenate(([3], drawn))


def nats_and_entropy(p: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return -np.log(p[np.arange(len(p)), tokens[1:]]), -(p * np.log(p)).sum(1)


def literal(p: np.ndarray, tokens: np.ndarray, vocab: int, eta: float) -> tuple:
    """(log of what each target is charged [N], charges of the whole vocabulary [N, V], last weights), one
    token after another, from dense tables."""
    uni, bi, tri = np.zeros(vocab), np.zeros((vocab, vocab)), np.zeros((65536, vocab))
    log_weights, count, logs, charges = np.array([2.0, 0, 0, 0, 0]), len(p), [], []
    for begin in range(0, count, 16):
        batch, losses = range(begin, min(begin + 16, count)), []
        for i in batch:
            x, before, y = tokens[i], tokens[i - 1] if i else 0, tokens[i + 1]
            h = ((before * 36313) ^ (x * 27191)) % 65536
            experts = np.stack((
                p[i],
                (uni + 0.1) / (uni.sum() + 0.1 * vocab),
                (bi[x] + 0.1) / (bi[x].sum() + 0.1 * vocab),
                (tri[h] + 0.01) / (max(tri[h].sum(), 1) + 0.01 * vocab),
                np.full(vocab, np.exp((p[i] * np.log(p[i])).sum())),
            ))  # fmt: skip
            weights = np.exp(log_weights) / np.exp(log_weights).sum()
            charges.append(weights @ experts if begin >= 20 else p[i])
            logs.append(math.log(charges[-1][y]))
            losses.append(-np.log(experts[:, y]))
        if begin >= 20:
            log_weights = log_weights - eta * np.mean(losses, axis=0)
        for first in range(batch.start, batch.stop, 4):
            segment = tokens[first + 1 : min(first + 4, count) + 1]
            for j, y in enumerate(segment):
                uni[y] += 1
                if j >= 1:
                    bi[segment[j - 1], y] += 1
                if j >= 2:
                    tri[((segment[j - 2] * 36313) ^ (segment[j - 1] * 27191)) % 65536, y] += 1
    weights = np.exp(log_weights) / np.exp(log_weights).sum()
    return np.array(logs), np.array(charges), weights


@pytest.mark.parametrize("count, eta", [(15, 0.1), (203, 0.1), (203, 1.5)])
def test_it_is_the_literal_mixer_and_its_mass_that_of_the_whole_vocabulary(short, count, eta):
    p, tokens = predictions(count)
    logs, charges, weights = literal(p, tokens, VOCAB, eta)
    final: list = []
    found, mass = pr895_mixer.pr895_mix(tokens, *nats_and_entropy(p, tokens), VOCAB, eta, final)
    np.testing.assert_allclose(found, logs, rtol=1e-9)
    np.testing.assert_allclose(mass, charges.sum(1), rtol=1e-9)
    np.testing.assert_allclose(final, weights, rtol=1e-9)
    assert (mass[:32] == 1).all() and (count < 32 or (mass[32:] > 1.1).any())


def test_the_first_three_experts_are_distributions_and_an_empty_bucket_is_none(short):
    """Each target in turn replaced by every token: what the counts say before it is not touched."""
    p, tokens = predictions(40, VOCAB)
    for end in (1, 17, 40):
        head, rows = p[:end], []
        for value in range(VOCAB):
            other = np.concatenate((tokens[:end], [value]))
            nats, entropy = nats_and_entropy(head, other)
            charged, trigram = pr895_mixer.expert_nats(other, nats, entropy, VOCAB)
            rows.append(np.exp(-charged[:, -1]))
        sums = np.sum(rows, axis=0)
        np.testing.assert_allclose(sums[:3], 1, rtol=1e-12)
        np.testing.assert_allclose(sums[3:], (trigram[-1], VOCAB * np.exp(-entropy[-1])), rtol=1e-12)
    _, trigram = pr895_mixer.expert_nats(np.zeros(2), np.ones(1), np.ones(1), 1024)
    assert trigram[0] == pytest.approx(10.24 / 11.24) == pytest.approx(0.911, abs=1e-4)


def test_keys_of_a_large_vocabulary_do_not_collide():
    rng = np.random.default_rng(1)
    tokens, ones = rng.choice([0, 1, 65534, 65535], 20_001), np.ones(20_000)
    charged, _ = pr895_mixer.expert_nats(tokens, ones, ones, 65_536)
    small, _ = pr895_mixer.expert_nats(np.unique(tokens, return_inverse=True)[1], ones, ones, 4)
    bigram = np.stack((np.exp(-charged[2, -1]), np.exp(-small[2, -1])))
    entered = [i for i in range(16384) if i % 256 and tokens[i] == tokens[-2]]
    hits = sum(tokens[i + 1] == tokens[-1] for i in entered)
    expected = [(hits + 0.1) / (len(entered) + 0.1 * vocab) for vocab in (65_536, 4)]
    np.testing.assert_allclose(bigram, expected, rtol=1e-9)


def test_it_improves_a_calibrated_predictor_that_nothing_can_improve(monkeypatch):
    monkeypatch.setattr(pr895_mixer, "BATCH", 512)  # 98 updates of the weights, not 5
    p, tokens = predictions(60_000, 64)
    nats, entropy = nats_and_entropy(p, tokens)
    scores, mass = pr895_mixer.pr895_mix(tokens, nats, entropy, 64)
    assert -scores.mean() < nats.mean() - 0.01
    assert (np.log(mass) - scores).mean() > nats.mean() + 0.01 and mass.mean() > 1.1


# --- the command ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory, launch_forks, dataset):
    folder = tmp_path_factory.mktemp("pr895")
    outcome = launch_forks(folder, dataset, iterations=5, eval_stride=8)
    assert outcome.code == 0, outcome.stderr
    return folder / "final_model.int8.ptz", outcome


def command(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["pr895_mixer.py", *map(str, args)])
    try:
        pr895_mixer.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_command_says_its_number_and_its_mass(trained, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pr895_mixer, "BATCH", 512)
    monkeypatch.setattr(pr895_mixer, "WARM_UP", 600)
    where = ("--data", dataset, "--tokenizer", dataset / "tokenizer.model")
    out = tmp_path / "numbers.json"
    code, printed, _ = command(monkeypatch, capsys, trained[0], *where, "--stride", 8, "--json", out)
    found, result = json.loads(out.read_text()), trained[1].result
    assert code == 0 and found["neural_bpb"] == pytest.approx(result["sliding_val_bpb"], rel=1e-5)
    assert found["mixed_tokens"] == found["tokens"] - 1024 > 2000
    assert found["mass_max"] >= found["mass_mean"] > 1 and found["renormalised_bpb"] > found["pr895_bpb"]
    assert sum(found["final_weights"].values()) == pytest.approx(1)
    assert [line.split()[0] for line in printed.splitlines()] == [
        "tokens:", "neural", "PR", "mass", "renormalised", "final",
    ]  # fmt: skip
    for key in ("neural_bpb", "pr895_bpb", "renormalised_bpb"):
        assert f" {found[key]:.4f} bpb" in printed


def test_bad_input_is_one_line(trained, dataset, tmp_path, monkeypatch, capsys):
    artifact, tokenizer = trained[0], dataset / "tokenizer.model"
    where = ("--data", dataset, "--tokenizer", tokenizer)
    (tmp_path / "torn").write_bytes(artifact.read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    cases = {
        (): "arguments are required",
        (tmp_path / "none", *where): "No such file",
        (tmp_path / "torn", *where): "is damaged",
        (artifact, "--data", tmp_path / "empty", "--tokenizer", tokenizer, "--stride", 8): "no *_val_*.bin",
        (artifact, "--data", dataset, "--tokenizer", tmp_path / "none", "--stride", 8): "no tokenizer",
        (artifact, *where): "--stride 64 is not in 1 .. 32",
        (artifact, *where, "--stride", 0): "--stride 0 is not in 1 .. 32",
        (artifact, *where, "--stride", 33): "--stride 33 is not in 1 .. 32",
        (artifact, *where, "--stride", "x"): "invalid int value",
        (artifact, *where, "--stride", 32, "--json", tmp_path / "no" / "folder"): "No such file",
    }
    for args, words in cases.items():
        code, _, errors = command(monkeypatch, capsys, *args)
        assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
        assert words in errors, errors
