"""PR #895's Hedge mixer on our own artifact: its number, and why that number is no code length.

    python records/pr895_mixer.py final_model.int8.ptz --data FOLDER --tokenizer FILE

For comparison only; nothing in train_gpt.py uses it. The mixer (parameter-golf #688, #745, #856, #895)
weighs five experts: the model, a unigram, a bigram, a hashed trigram, and the model's entropy H, which
"predicts" every token with the same exp(-H). That is no distribution: over V tokens it has the mass
V exp(-H), far over 1, and so has the mixture. A code spends -log2 p bits on a token only if the p of all
tokens sum to at most 1. This prints what the mixer charges, the mass it hands out, and what remains of its
number once every step is divided by its mass.

As described, but for: counts are exact integers, of any vocabulary, by sorting (no table of 65,536 x V);
the weights learn from the newly scored places only, where the original also counted the overlap again; a
batch is always 8,192 targets in text order, entered 256 at a time, so that as there a bigram is lost where
256 targets end, and two trigrams.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.missing_packages import explain_missing_packages  # noqa: E402
from data.user_error import run_tool  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt as ours  # noqa: E402

EXPERTS = "neural", "unigram", "bigram", "trigram", "entropy"
BATCH, SEGMENT = 8192, 256  # targets scored with the same weights and tables; entered at a time
WARM_UP = 10_000  # the model alone until so many are scored; until then no weight learns either
PLACES = 2**24  # logits at once


def counts_before(keys: np.ndarray, entered: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """How often each key [N] was entered in the batches before its own."""
    order = np.argsort(keys, kind="stable")  # batches ascend within a key
    key, group = keys[order], batch[order]
    so_far = np.concatenate(([0], np.cumsum(entered[order])))
    new_key = np.concatenate(([True], key[1:] != key[:-1]))
    new_group = new_key | np.concatenate(([True], group[1:] != group[:-1]))
    key_start, group_start = (
        np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0)) for new in (new_key, new_group)
    )
    counts = np.empty(len(keys), np.int64)
    counts[order] = so_far[group_start] - so_far[key_start]
    return counts


def expert_nats(tokens: np.ndarray, nats: np.ndarray, entropy: np.ndarray, vocab: int) -> tuple:
    """(-log of what each expert gives each target [5, N], the trigram's mass [N])."""
    tokens = np.asarray(tokens, np.int64)
    here, targets, place = tokens[:-1], tokens[1:], np.arange(len(tokens) - 1)
    before, batch = np.concatenate(([0], here[:-1])), place // BATCH
    bucket = (before * 36313 ^ here * 27191) % 65536
    orders = ((0 * here, 0.1, 0), (here, 0.1, 1), (bucket, 0.01, 2))
    found = [nats]
    for context, add, tokens_before in orders:
        entered = place % SEGMENT >= tokens_before  # what stands across the border of a segment is lost
        count = counts_before(context * vocab + targets, entered, batch)
        total = counts_before(context, entered, batch)
        below = (np.maximum(total, 1) if tokens_before == 2 else total) + add * vocab
        found.append(-np.log((count + add) / below))
    return np.stack([*found, entropy]), (total + add * vocab) / below


def softmax(logs: np.ndarray) -> np.ndarray:
    return np.exp(logs - np.logaddexp.reduce(logs))


def pr895_mix(tokens, nats, entropy, vocab: int, eta: float = 0.1, final: list | None = None) -> tuple:
    """(log of the mixer's 'probability' of each of tokens[1:] [N], its sum over the vocabulary [N]).
    nats, entropy: the model's, [N]. `final` receives the last weights."""
    nats, entropy = np.asarray(nats, np.float64), np.asarray(entropy, np.float64)
    charged, trigram_mass = expert_nats(tokens, nats, entropy, vocab)
    one = np.ones_like(nats)
    masses = np.stack((one, one, one, trigram_mass, vocab * np.exp(-entropy)))
    log_weights, scores, mass = np.array([2.0, 0.0, 0.0, 0.0, 0.0]), -nats, one.copy()
    for begin in range(0, len(nats), BATCH):
        here = slice(begin, begin + BATCH)
        if begin >= WARM_UP:
            weights = softmax(log_weights)
            with np.errstate(divide="ignore"):  # a weight of 1e-400 is 0
                scores[here] = np.logaddexp.reduce(np.log(weights)[:, None] - charged[:, here])
            mass[here] = weights @ masses[:, here]
            log_weights = log_weights - eta * charged[:, here].mean(1)
    if final is not None:
        final[:] = softmax(log_weights).tolist()
    return scores, mass


def batches(windows: list[ours.Window], size: int) -> Iterator[list[ours.Window]]:
    return (windows[at : at + size] for at in range(0, len(windows), size))


def neural(cfg, runtime, state, data, source: str, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(nats, entropy) [N] float64 of the model at each target, by windows that slide by `stride`."""
    model = ours.GPT(cfg, runtime.dtype).to(runtime.device)
    ours.load_weights(model, state, source)
    nats, entropy = np.zeros(data.targets), np.zeros(data.targets)
    length = cfg.eval_length
    size = max(1, min(32, PLACES // (stride * cfg.vocab_size)))
    for windows in batches(ours.plan_windows(data.targets, length, stride), size):
        shape = ours.PassShape(len(windows), length, stride)
        padded = ours.pad_windows(data, windows, shape, runtime.device)
        with torch.no_grad():
            logs = model(padded.ids, positions=padded.positions).log_softmax(-1)
            target_nats = -logs.gather(-1, padded.targets[..., None])[..., 0]
            target_entropy = -(logs.exp() * logs).sum(-1)
        scored = slice(windows[0].first, windows[-1].stop)
        nats[scored] = target_nats[padded.is_scored].cpu().double().numpy()
        entropy[scored] = target_entropy[padded.is_scored].cpu().double().numpy()
    return nats, entropy


def compare(artifact: str, folder: str, tokenizer_path: str, stride: int) -> dict:
    state, header = ours.unpack(Path(artifact).read_bytes(), artifact)
    asked = replace(ours.Config(), data_path=folder, tokenizer_path=tokenizer_path, eval_only=artifact)
    cfg = replace(ours.artifact_config(asked, {}, header), compile="0")
    if not 1 <= stride <= cfg.eval_length:
        raise ours.RunError(f"--stride {stride} is not in 1 .. {cfg.eval_length}")
    data = ours.load_validation(cfg, ours.load_tokenizer(cfg))
    with ours.Runtime.launch(cfg, {}) as runtime:
        nats, entropy = neural(cfg, runtime, state, data, artifact, stride)
    weights: list[float] = []
    scores, mass = pr895_mix(data.tokens, nats, entropy, cfg.vocab_size, final=weights)

    def bpb(total: float) -> float:
        return ours.Score(float(total), data.targets, data.bytes, 0.0).bpb

    return dict(
        tokens=data.targets,
        bytes=data.bytes,
        stride=stride,
        mixed_tokens=max(0, data.targets - -(-WARM_UP // BATCH) * BATCH),
        neural_bpb=bpb(nats.sum()),
        pr895_bpb=bpb(-scores.sum()),
        mass_mean=float(mass.mean()),
        mass_median=float(np.median(mass)),
        mass_max=float(mass.max()),
        renormalised_bpb=bpb((np.log(mass) - scores).sum()),
        final_weights=dict(zip(EXPERTS, weights, strict=True)),
    )


def report(found: dict) -> str:
    return "\n".join((
        f"tokens: {found['tokens']} bytes: {found['bytes']} stride: {found['stride']}; "
        f"mixed: {found['mixed_tokens']}, the model alone before",
        f"neural            {found['neural_bpb']:.4f} bpb",
        f"PR #895's number  {found['pr895_bpb']:.4f} bpb, but what it hands out sums over the vocabulary to",
        f"mass              mean:{found['mass_mean']:.4g} median:{found['mass_median']:.4g} "
        f"max:{found['mass_max']:.4g}; a distribution has 1",
        f"renormalised      {found['renormalised_bpb']:.4f} bpb: what a code by these probabilities needs",
        "final weights     " + " ".join(f"{k}:{v:.4g}" for k, v in found["final_weights"].items()),
    ))  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Bad arguments end in one line."""

    def error(self, message: str):
        raise ours.RunError(message)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", help="final_model.int8.ptz of a run")
    parser.add_argument("--data", required=True, help="folder with *_val_*.bin")
    parser.add_argument("--tokenizer", required=True, help="its SentencePiece model")
    parser.add_argument("--stride", type=int, default=64, help="targets scored by each window")
    parser.add_argument("--json", help="also write the numbers here")
    try:
        args = parser.parse_args()
        found = compare(args.artifact, args.data, args.tokenizer, args.stride)
        print(report(found))
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    except (ours.RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_tool(main)
