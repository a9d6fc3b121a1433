"""What the records #1394, #1493 and #1855 compute, restated token by token from their published formulas.

Nothing here imports train_gpt. Weights come as a dict of tensors with the records' flat names, knobs as any
object with Config's attribute names. All is plain torch in the dtype of the weights, so that gradients can be
taken too. Checked by hand against #1855's own model: losses to six digits, gradients to 8e-8.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BOS = 1
EPS = 2.0**-23


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def turned(x: Tensor, turns: int, base: float) -> Tensor:
    """[T, D]: of the first `turns` dimensions, j and j + turns/2 are one complex number, turned back."""
    half = turns // 2
    angle = torch.outer(torch.arange(len(x), dtype=x.dtype), base ** (-2 * torch.arange(half) / turns))
    pairs = torch.complex(x[:, :half], x[:, half:turns]) * torch.exp(-1j * angle)
    return torch.cat((pairs.real, pairs.imag, x[:, turns:]), dim=1)


def gate(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """sigmoid(scale * w . x) of the first dimensions, one number a token; weight is one row."""
    return 1 / (1 + torch.exp(-scale * (x[:, : len(weight)] * weight).sum(-1)))


def embedded(w: dict, ids: Tensor, cfg) -> Tensor:
    """[T, d]: rows of the table, pairs of tokens, a share of the token before."""
    rows = [w["tok_emb.weight"][token] for token in ids]
    if cfg.bigram_vocab_size:
        last = cfg.bigram_vocab_size - 1
        for t, token in enumerate(ids.tolist()):
            row = (36313 * token ^ 27191 * int(ids[t - 1])) % last if t else last
            pair = w["bigram.embed.weight"][row]
            if cfg.bigram_dim != cfg.model_dim:
                pair = w["bigram.proj.weight"] @ pair
            rows[t] = rows[t] + w["bigram.scale"] * pair
    if not cfg.smear_gate_enabled:
        return torch.stack(rows)
    smeared = rows[:1]
    for t in range(1, len(rows)):
        share = w["smear_lambda"] * gate(rows[t][None], w["smear_gate.weight"][0], 1.0)
        smeared.append(rows[t] if ids[t] == BOS else rows[t] + share * rows[t - 1])
    return torch.stack(smeared)


def attended(w: dict, block: int, x: Tensor, cfg) -> Tensor:
    """[T, d] -> [T, d], head by head."""
    name = f"blocks.{block}.attn."
    size = cfg.model_dim // cfg.num_heads
    turns = cfg.rope_dims or size
    outputs = []
    for head in range(cfg.num_heads):
        group = head * cfg.num_kv_heads // cfg.num_heads
        q = x @ w[name + "c_q.weight"][head * size : (head + 1) * size].T
        k = x @ w[name + "c_k.weight"][group * size : (group + 1) * size].T
        v = x @ w[name + "c_v.weight"][group * size : (group + 1) * size].T
        q = turned(rms(q), turns, cfg.rope_base) * w[name + "q_gain"][head]
        scores = q @ turned(rms(k), turns, cfg.rope_base).T / math.sqrt(size)
        is_later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        y = scores.masked_fill(is_later, -torch.inf).softmax(-1) @ v
        if cfg.xsa_last_n:
            y = y - (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v
        if cfg.sparse_attn_gate_enabled:
            y = y * gate(x, w[name + "attn_gate_w"][head], cfg.sparse_attn_gate_scale)[:, None]
        outputs.append(y)
    return torch.cat(outputs, dim=1) @ w[name + "proj.weight"].T


def fed(w: dict, block: int, x: Tensor, cfg) -> Tensor:
    hidden = x @ w[f"blocks.{block}.mlp.fc.weight"].T
    hidden = torch.where(hidden > 0, hidden, cfg.leaky_slope * hidden) ** 2
    return hidden @ w[f"blocks.{block}.mlp.proj.weight"].T


def order(cfg, looped: bool) -> tuple[list[int], list[int]]:
    """The blocks of the encoder and of the decoder."""
    blocks = list(range(cfg.num_layers))
    if looped:
        middle = blocks[cfg.loop_start : cfg.loop_end + 1]
        blocks = blocks[: cfg.loop_start] + middle * (cfg.num_loops + 1) + blocks[cfg.loop_end + 1 :]
    half = len(blocks) // 2
    return blocks[:half], blocks[half:]


def logits(w: dict, ids: Tensor, cfg, looped: bool = False) -> Tensor:
    """Softcapped logits [T, V] of one sequence."""
    encoder, decoder = order(cfg, looped)
    x0 = rms(embedded(w, ids, cfg))
    attention_lane = mlp_lane = x0  # one stream, until the lanes part
    is_parted = False
    outputs = []
    for place, block in enumerate(encoder + decoder):
        name = f"blocks.{block}."
        factor = 1 / math.sqrt(block + 1) if cfg.ln_scale else 1.0
        row = place - len(encoder)
        if row >= 0 and cfg.parallel_start_layer and block >= cfg.parallel_start_layer:
            is_parted = True
        if row >= 0 and outputs:
            skip = w["skip_weights"][row] * outputs.pop()
            if cfg.skip_gates_enabled:
                share = torch.sigmoid(w["skip_gates"][row])
                attention_lane = share * attention_lane + (1 - share) * skip
            else:
                attention_lane = attention_lane + skip
            if not is_parted:
                mlp_lane = attention_lane
        mixed = w[name + "resid_mix"][0] * attention_lane + w[name + "resid_mix"][1] * x0
        y = w[name + "attn_scale"] * attended(w, block, factor * rms(mixed), cfg)
        if is_parted:
            m = w[name + "mlp_scale"] * fed(w, block, factor * rms(mlp_lane), cfg)
            kept, added = w["parallel_resid_lambdas"][block], w["parallel_post_lambdas"][block]
            attention_lane = kept[0] * attention_lane + added[0, 0] * y + added[1, 0] * m
            mlp_lane = kept[1] * mlp_lane + added[0, 1] * y + added[1, 1] * m
            continue
        is_parallel = 0 <= cfg.parallel_residual_start <= block
        m = fed(w, block, factor * rms(mixed if is_parallel else mixed + y), cfg)
        attention_lane = mlp_lane = mixed + y + w[name + "mlp_scale"] * m
        if row < 0:
            outputs.append(attention_lane)
    lanes = dict(mean=(attention_lane + mlp_lane) / 2, attn=attention_lane, mlp=mlp_lane)
    z = rms(lanes[cfg.parallel_final_lane]) @ w["tok_emb.weight"].T
    return cfg.logit_softcap * torch.tanh(z / cfg.logit_softcap)


def loss(w: dict, ids: Tensor, targets: Tensor, cfg, looped: bool = False) -> Tensor:
    """Mean nats of the targets of sequences [B, T]."""
    rows = [logits(w, row, cfg, looped) for row in ids]
    return F.cross_entropy(torch.cat(rows), targets.flatten())
