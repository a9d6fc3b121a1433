"""What Hedge and #2135's tilt gain on models of growing strength, and what would improve Hedge.

    python -m sweeps.lab.hedge_frontier dump NAME WEIGHTS OUT.npz KNOB=VALUE ... --tokens 200000
    python -m sweeps.lab.hedge_frontier study A.npz B.npz ... --at 1.06 --out cpu_hedge_frontier.json

dump: scores the first tokens of the validation text once, each document by itself (EVAL_DOC_ISOLATED), and
keeps what the mixers need: the nats of each target and of the n-grams' top followers, and the entropy.
WEIGHTS is a packed model, a state dict or a checkpoint; the knobs are those of its run.
study: every mixer works on the dumps, so no model runs; each number is exact for its text. An improvement is
judged on the second half of the text, by what it saves there on top of the mixer as it stands. The gains are
fitted against the models' bpb and drawn out to --at, with a 95 % interval for one more model: an
extrapolation, since no dumped model is near it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from data.user_error import run_tool
from tests.bench.bench_throughput import commit

# Context lengths whose top followers are hints; the last is the published tilt's.
HINT_ORDERS = (1, 2, 3, 4, 6, 8, 15)
HEDGE_ORDERS = (4, 6, 8, 12, 16)
DOCUMENT_ORDERS = (1, 2, 3, 5)  # tried in two stages
DOCUMENT_ORDER = 3  # longest context of the n-grams of one document alone
T_95 = {
    1: 12.71,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
}  # by degrees of freedom


# -- Dumps -----------------------------------------------------------------------------------------------


def read_weights(path: str) -> dict[str, Tensor]:
    """The weights of a packed model, a state dict or a checkpoint."""
    if path.endswith(".ptz"):
        return train_gpt.read_artifact(path)
    saved = train_gpt.read_saved(path)
    return saved["model"] if "model" in saved and isinstance(saved["model"], dict) else saved


@torch.no_grad()
def dump(name: str, weights: str, out: Path, knobs: dict[str, str], count: int) -> None:
    """Write the .npz of one model."""
    cfg = train_gpt.Config.from_env(dict(DEVICE="cpu", COMPILE="0", EVAL_DOC_ISOLATED="1") | knobs)
    began = time.process_time()
    whole = train_gpt.load_inputs(cfg, 0, False).validation
    starts = whole.starts[whole.starts < count]
    data = replace(
        whole, tokens=whole.tokens[: count + 1], target_bytes=whole.target_bytes[:count], starts=starts
    )
    with train_gpt.Runtime.launch(cfg, {}) as runtime:
        model = train_gpt.make_model(cfg, runtime)
        train_gpt.load_weights(model, read_weights(weights), weights)
        tokens = torch.from_numpy(data.tokens.astype(np.int64))
        hints = torch.stack([train_gpt.top_followers(tokens, cfg.vocab_size, k)[0] for k in HINT_ORDERS])
        nats = torch.zeros(count)
        entropy = torch.zeros(count)
        hint_nats = torch.zeros(len(HINT_ORDERS), count)
        for turn in train_gpt.plan_isolated_turns(cfg, data, runtime):
            padded = train_gpt.pad_windows(data, turn.windows, turn.shape, runtime.device)
            positions = padded.positions if turn.shape.slides else None
            rows = len(turn.windows)
            given = None if positions is None else positions[:rows]
            logs = model(padded.ids[:rows], -1, given).float().log_softmax(-1)
            for row, window in enumerate(turn.windows):
                targets = torch.arange(window.first, window.stop)
                own = logs[row, : len(targets)]
                nats[targets] = -own.gather(1, tokens[targets + 1, None])[:, 0]
                entropy[targets] = -(own.exp() * own).sum(1)
                hint_nats[:, targets] = -own.gather(1, hints[:, targets].T).T
    seconds = time.process_time() - began
    bpb = nats.double().sum().item() / math.log(2) / int(data.target_bytes.sum(dtype=np.int64))
    np.savez(
        out,
        name=name,
        knobs=json.dumps(knobs),
        tokens=data.tokens,
        bytes=data.target_bytes,
        starts=starts,
        nats=nats.numpy(),
        entropy=entropy.numpy(),
        hint_nats=hint_nats.numpy(),
        seconds=seconds,
    )
    print(f"{name}: isolated {bpb:.4f} bpb, tokens:{count}, {seconds:.0f} CPU seconds", flush=True)


# -- Mixers ----------------------------------------------------------------------------------------------


class Facts:
    """What a dump and the counts of its text say of each of its first targets, before it."""

    def __init__(self, path: Path, vocab: int, count: int | None = None):
        with np.load(path) as stored:
            given = {key: stored[key] for key in stored.files}
        count = count or len(given["nats"])
        self.name = str(given["name"])
        self.vocab = vocab
        self.tokens = torch.from_numpy(given["tokens"][: count + 1].astype(np.int64))
        self.bytes = torch.from_numpy(given["bytes"][:count].astype(np.int64))
        self.starts = given["starts"][given["starts"] < count]
        self.nats = torch.from_numpy(given["nats"][:count]).double()
        self.entropy = torch.from_numpy(given["entropy"][:count])
        self.hint_nats = torch.from_numpy(given["hint_nats"][:, :count]).double()
        tops = torch.stack([train_gpt.top_followers(self.tokens, vocab, order) for order in HINT_ORDERS])
        # [K, N] each: how often the top follower of each order's context came, of how many, and which it is.
        self.counts = tops[:, 1]
        self.uses = tops[:, 2]
        self.hints = torch.where(self.counts > 0, tops[:, 0], -1)
        self.ngram, self.codes = train_gpt.ngram_probabilities(self.tokens, vocab, 6)
        self.half = len(self.nats) // 2

    def bpb(self, nats: Tensor, part: slice = slice(None)) -> float:
        return nats[part].sum().item() / math.log(2) / self.bytes[part].sum().item()

    def second_half_gain(self, nats: Tensor, base: Tensor) -> float:
        """bpb that `nats` saves against `base` on the second half of the text."""
        part = slice(self.half, None)
        return self.bpb(base, part) - self.bpb(nats, part)


def hedge(facts: Facts, order: int = 6) -> Tensor:
    """Nats of the mixer as it stands."""
    cfg = train_gpt.Config(vocab_size=facts.vocab, use_hedge=True, hedge_order=order)
    return -train_gpt.mix_with_ngrams(cfg, facts.tokens, facts.nats).log_probs


def published_tilt(facts: Facts, order: int = 15, threshold: float = 0.8, boost: float = 2.625) -> Tensor:
    """Nats after the tilt; the defaults are #2135's."""
    cfg = train_gpt.Config(
        vocab_size=facts.vocab, ngram_tilt_enabled=True, token_boost=boost, token_order=order + 1
    )
    number = HINT_ORDERS.index(order)
    is_sure = facts.counts[number] / facts.uses[number].clamp_min(1) >= threshold
    hints = torch.where(is_sure, facts.hints[number], -1)
    return train_gpt.tilt(cfg, facts.nats, facts.hint_nats[number], hints, facts.tokens[1:])


def best_tilt_of_first_half(facts: Facts) -> tuple[Tensor, dict]:
    """The tilt whose order, threshold and boost are the best of a grid on the first half."""
    found = []
    for order in HINT_ORDERS[1:]:
        for threshold in (0.3, 0.5, 0.8):
            for boost in (0.5, 1.0, 1.8, 2.625):
                nats = published_tilt(facts, order, threshold, boost)
                settings = dict(order=order + 1, threshold=threshold, boost=boost)
                found.append((facts.bpb(nats, slice(facts.half)), nats, settings))
    _, nats, settings = min(found, key=lambda entry: entry[0])
    return nats, settings


def learn_online(inputs: Tensor, outputs: int, nats_of: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Nats [N] of a mixer whose network learns from each block once that has its nats, as Hedge's gate does.

    inputs: what is known of each target before it, float32 [N, F].
    nats_of: (logits [n, outputs], block) -> nats [n].
    """
    rng = torch.Generator().manual_seed(0)
    features = inputs.size(1)
    parameters = [
        torch.randn(32, features, generator=rng) / features**0.5,
        torch.zeros(32),
        torch.zeros(outputs, 32),
        torch.zeros(outputs),
        torch.zeros(outputs, features),
    ]
    for parameter in parameters:
        parameter.requires_grad_()
    w1, b1, w2, b2, direct = parameters
    optimiser = torch.optim.Adam(parameters, lr=0.02, betas=(0.9, 0.99))
    found = torch.zeros(len(inputs), dtype=torch.float64)
    begin = 0
    size = train_gpt.GATE_FIRST_BLOCK
    while begin < len(inputs):
        block = slice(begin, begin + size)
        logits = F.linear(F.linear(inputs[block], w1, b1).relu(), w2, b2) + F.linear(inputs[block], direct)
        nats = nats_of(logits, block)
        found[block] = nats.detach().double()
        optimiser.zero_grad()
        nats.mean().backward()
        optimiser.step()
        begin += size
        size = min(train_gpt.GATE_LAST_BLOCK, 2 * size)
    return found


def gate_inputs(facts: Facts, ngram: Tensor, codes: Tensor) -> Tensor:
    """What Hedge's own gate reads, [N, F]."""
    odds = (ngram.log() + facts.nats).float()
    return train_gpt.gate_facts(codes, train_gpt.recent_odds(odds))


def neural_inputs(facts: Facts) -> Tensor:
    """What the model says before the target, [N, F]: its entropy, and the probability of each hint."""
    known = (facts.hints >= 0).double()
    return torch.cat((facts.entropy[None] / 5, (-facts.hint_nats).exp() * known, known)).T.float()


def hint_inputs(facts: Facts) -> Tensor:
    """How often each order's context was used, and which share its top follower has, [N, F]."""
    return torch.cat((facts.uses.log1p() / 4, facts.counts / facts.uses.clamp_min(1))).T.float()


def share_gate(facts: Facts, inputs: Tensor, experts: list[Tensor]) -> Tensor:
    """Nats of a learned mixture of experts, log-probabilities [N] each; the first begins with most."""
    logs = torch.stack(experts, 1).float()
    prior = torch.tensor([2.0] + [0.0] * (len(experts) - 1))

    def nats_of(logits: Tensor, block: slice) -> Tensor:
        return -((logits + prior).log_softmax(1) + logs[block]).logsumexp(1)

    return learn_online(inputs, len(experts), nats_of)


def document_ngrams(facts: Facts) -> tuple[Tensor, Tensor]:
    """(probabilities, codes) of n-grams that count the target's own document alone."""
    edges = [0, *facts.starts.tolist(), len(facts.nats)]
    parts = []
    for begin, end in zip(edges, edges[1:], strict=False):
        parts.append(
            train_gpt.ngram_probabilities(facts.tokens[begin : end + 1], facts.vocab, DOCUMENT_ORDER)
        )
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], -1)


def document_first(facts: Facts, order: int) -> Tensor:
    """Nats of the mixer with HEDGE_DOCUMENT_ORDER: the document's n-grams, then those of the whole text."""
    cfg = train_gpt.Config(vocab_size=facts.vocab, use_hedge=True, hedge_document_order=order)
    text = train_gpt.Validation(facts.tokens.numpy(), facts.bytes.numpy(), 0, "", facts.starts)
    begins = train_gpt.document_begins(text)
    return -train_gpt.mix_with_ngrams(cfg, facts.tokens, facts.nats, begins).log_probs


def logit_nats(boosts: Tensor, nats: Tensor, hint_nats: Tensor, hints: Tensor, targets: Tensor) -> Tensor:
    """Nats [n] where each order's hint has its boost added to its logit, boosts of equal hints together.

    boosts [n, K]; nats, targets [n]; hint_nats, hints [n, K], hints -1 where there is none.
    p'(y) = p(y) e^B(y) / (1 + sum over distinct hints u of p(u) (e^B(u) - 1)), B(u) = sum of boosts of u.
    """
    exists = hints >= 0
    is_same = (hints[:, :, None] == hints[:, None, :]) & exists[:, :, None] & exists[:, None, :]
    sums = (is_same * boosts[:, None, :]).sum(2)  # B of each hint
    earlier = torch.ones(hints.size(1), hints.size(1), dtype=torch.bool).tril(-1)
    is_first = exists & ~(is_same & earlier).any(2)
    mass = (is_first * (-hint_nats).exp() * sums.expm1()).sum(1)
    own = (boosts * (exists & (hints == targets[:, None]))).sum(1)
    return nats - own + mass.log1p()


def learned_logits(facts: Facts, inputs: Tensor) -> Tensor:
    """Nats of the model with learned boosts on the top followers of all orders: a mixture of logits."""
    hints = facts.hints.T
    targets = facts.tokens[1:]
    nats = facts.nats.float()
    hint_nats = facts.hint_nats.T.float()

    def nats_of(boosts: Tensor, block: slice) -> Tensor:
        bounded = boosts.clamp(-6, 6)
        return logit_nats(bounded, nats[block], hint_nats[block], hints[block], targets[block])

    return learn_online(inputs, len(HINT_ORDERS), nats_of)


def beside(facts: Facts, base: Tensor, other: Tensor) -> Tensor:
    """Nats of Hedge over the mixer as it stands, another one, and both in equal shares."""
    bins = train_gpt.context_bins(facts.codes)
    experts = train_gpt.fixed_experts((0.0, 0.3, 0.6, 0.9))
    mixture = train_gpt.hedge_mixture((-base).exp(), (-other).exp(), experts, bins, 0.1, 1000)
    return -mixture.log_probs


def improvements(facts: Facts) -> dict[str, Tensor]:
    """{what is tried: nats of the mixer alone}."""
    neural = -facts.nats
    ngram = facts.ngram.log()
    own, own_codes = document_ngrams(facts)
    usual = gate_inputs(facts, facts.ngram, facts.codes)
    own_facts = gate_inputs(facts, own, own_codes)
    far, far_codes = train_gpt.ngram_probabilities(facts.tokens, facts.vocab, 16)
    everything = torch.cat((usual, own_facts, neural_inputs(facts), hint_inputs(facts)), 1)
    return {
        "longer contexts, order 16": share_gate(
            facts, gate_inputs(facts, far, far_codes), [neural, far.log()]
        ),
        "gate reads the model": share_gate(
            facts, torch.cat((usual, neural_inputs(facts)), 1), [neural, ngram]
        ),
        "document's own n-grams": share_gate(
            facts, torch.cat((usual, own_facts), 1), [neural, ngram, own.log()]
        ),
        "both": share_gate(facts, everything, [neural, ngram, own.log()]),
        "logits, boosts by counts": learned_logits(facts, hint_inputs(facts)),
        "logits, boosts by counts and model": learned_logits(
            facts, torch.cat((hint_inputs(facts), neural_inputs(facts)), 1)
        ),
    }


# -- The fit ---------------------------------------------------------------------------------------------


def extrapolate(strengths: list[float], gains: list[float], at: float) -> dict:
    """Least squares of log gain on bpb, drawn out to `at`: the prediction and a 95 % interval for one more
    model (Student's t); and the straight line through the gains themselves."""
    x = np.array(strengths)
    count = len(x)
    found = {}
    for kind, y in (("log_gain", np.log(np.maximum(gains, 1e-9))), ("gain", np.array(gains))):
        slope, level = np.polyfit(x, y, 1)
        residual = y - (level + slope * x)
        variance = (residual**2).sum() / max(1, count - 2)
        spread = np.sqrt(variance * (1 + 1 / count + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()))
        reach = T_95.get(count - 2, 2.3) * spread
        values = np.array([level + slope * at, level + slope * at - reach, level + slope * at + reach])
        if kind == "log_gain":
            values = np.exp(values)
        found[kind] = dict(
            predicted=float(values[0]), low=float(values[1]), high=float(values[2]), slope=float(slope)
        )
    return found


def study_one(facts: Facts) -> dict:
    """Every mixer on one dump."""
    base = facts.bpb(facts.nats)
    quarter = slice(3 * len(facts.nats) // 4, None)
    row = dict(tokens=len(facts.nats), isolated=base, gains={}, last_quarter={}, improvements={}, seconds={})
    mixed = {}
    for order in HEDGE_ORDERS:
        began = time.process_time()
        mixed[f"hedge {order}"] = hedge(facts, order)
        row["seconds"][f"hedge {order}"] = time.process_time() - began
    for order in DOCUMENT_ORDERS:
        mixed[f"hedge 6, documents {order}"] = document_first(facts, order)
    mixed["tilt"] = published_tilt(facts)
    mixed["tilt fitted to the first half"], row["fitted_tilt"] = best_tilt_of_first_half(facts)
    for name, nats in mixed.items():
        row["gains"][name] = base - facts.bpb(nats)
        row["last_quarter"][name] = facts.bpb(facts.nats, quarter) - facts.bpb(nats, quarter)
    standing = mixed["hedge 6"]
    row["second_half"] = dict(
        isolated=facts.bpb(facts.nats, slice(facts.half, None)),
        hedge=facts.bpb(standing, slice(facts.half, None)),
        tilt_fitted=facts.second_half_gain(mixed["tilt fitted to the first half"], facts.nats),
    )
    for order in DOCUMENT_ORDERS:
        gain = facts.second_half_gain(mixed[f"hedge 6, documents {order}"], standing)
        row["improvements"][f"HEDGE_DOCUMENT_ORDER={order}"] = dict(alone=gain)
    for name, nats in improvements(facts).items():
        together = beside(facts, standing, nats)
        row["improvements"][name] = dict(
            alone=facts.second_half_gain(nats, standing), beside=facts.second_half_gain(together, standing)
        )
    row["improvements"]["hedge over the tilt"] = tilt_below(facts, mixed["tilt"], standing)
    return row


def tilt_below(facts: Facts, tilted: Tensor, standing: Tensor) -> dict:
    """What Hedge gains if it mixes the tilted score."""
    cfg = train_gpt.Config(vocab_size=facts.vocab, use_hedge=True)
    nats = -train_gpt.mix_with_ngrams(cfg, facts.tokens, tilted).log_probs
    return dict(alone=facts.second_half_gain(nats, standing))


def study(paths: list[Path], vocab: int, at: float) -> dict:
    """The report of all dumps, the weakest model first; on as many targets as the shortest dump has."""
    rows = {}
    count = min(len(np.load(path)["nats"]) for path in paths)
    for path in paths:
        facts = Facts(path, vocab, count)
        rows[facts.name] = study_one(facts)
        found = rows[facts.name]
        gains = " ".join(f"{name} {gain:.4f}" for name, gain in found["gains"].items())
        print(f"{facts.name}: isolated {found['isolated']:.4f}, saved: {gains}", flush=True)
        for name, saved in found["improvements"].items():
            print(f"    {name}: " + " ".join(f"{how} {gain:+.4f}" for how, gain in saved.items()), flush=True)
    rows = dict(sorted(rows.items(), key=lambda entry: -entry[1]["isolated"]))
    strengths = [row["isolated"] for row in rows.values()]
    fits = {}
    for name in next(iter(rows.values()))["gains"]:
        fits[name] = extrapolate(strengths, [row["gains"][name] for row in rows.values()], at)
    return dict(models=rows, at=at, fits=fits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    dumps = commands.add_parser("dump")
    dumps.add_argument("name")
    dumps.add_argument("weights")
    dumps.add_argument("out", type=Path)
    dumps.add_argument("knobs", nargs="*", metavar="KNOB=VALUE")
    dumps.add_argument("--tokens", type=int, default=200_000)
    studies = commands.add_parser("study")
    studies.add_argument("dumps", nargs="+", type=Path)
    studies.add_argument("--vocab", type=int, default=1024)
    studies.add_argument("--at", type=float, default=1.06)
    studies.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "dump":
            knobs = dict(pair.split("=", 1) for pair in options.knobs)
            return dump(options.name, options.weights, options.out, knobs, options.tokens)
    except train_gpt.RunError as error:
        raise SystemExit(f"error: {error}") from None
    found = study(options.dumps, options.vocab, options.at)
    if options.out:
        report = dict(
            benchmark="hedge_frontier", commit=commit(), torch=torch.__version__, threads=1, **found
        )
        train_gpt.write_atomic(options.out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    run_tool(main)
