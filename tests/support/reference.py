"""What train_gpt.py should compute, restated in float64 numpy from the published formulas.

Nothing here imports train_gpt. Weights come in as a state dict with the official names; the knobs come as
any object with Config's attribute names. Where two roads lead to a number, this takes the other one:
rotary positions by complex numbers, attention head by head, Newton-Schulz on singular values, rounding by
trying every code.
"""

import math
import zlib

import numpy as np
import torch

EPS = 2.0**-23  # float32's, the one of the official RMS norm
torch.set_num_threads(1)  # on a busy machine two threads mostly wait for each other: 60 s became 5


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random numbers in every tensor: the zero and one initialisations would hide most mistakes.

    A tensor's numbers depend on its name and shape alone, so two models differ only where they must.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if name in ("tok_emb.weight", "lm_head.weight"):
                p.copy_(noise)
            elif p.ndim == 2 and "resid_mix" not in name and "skip_weights" not in name:
                p.copy_(1.5 * noise / p.size(1) ** 0.5)
            else:
                p.add_(0.5 * noise)
    return model


def as_float64(state) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in state.items()}


# --- model ---


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def rotate(x: np.ndarray, base: float) -> np.ndarray:
    """[T, D]: dimensions i and i + D/2 are one complex number, turned back by t * base^(-2i/D)."""
    length, size = x.shape
    angle = np.outer(np.arange(length), base ** (-2 * np.arange(size // 2) / size))
    turned = (x[:, : size // 2] + 1j * x[:, size // 2 :]) * np.exp(-1j * angle)
    return np.concatenate((turned.real, turned.imag), axis=1)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(w: dict, x: np.ndarray, cfg, values: np.ndarray, exclusive: bool) -> np.ndarray:
    """[T, C] -> [T, C], one query head at a time; head h reads key/value head h // (heads per kv head).
    exclusive: each output loses its least-squares multiple of the value of its own place (XSA)."""
    length, width = x.shape
    size, shared = width // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
    queries, keys = (x @ w[f"attn.c_{kind}.weight"].T for kind in "qk")
    out = np.zeros((length, width))
    for head in range(cfg.num_heads):
        mine = slice(head * size, (head + 1) * size)
        theirs = slice(head // shared * size, (head // shared + 1) * size)
        q = rotate(rms(queries[:, mine]), cfg.rope_base) * w["attn.q_gain"][head]
        k, v = rotate(rms(keys[:, theirs]), cfg.rope_base), values[:, theirs]
        scores = q @ k.T / math.sqrt(size)
        scores[np.triu_indices(length, 1)] = -np.inf
        out[:, mine] = softmax(scores) @ v
        if exclusive:
            out[:, mine] -= ((out[:, mine] * v).sum(-1) / (v * v).sum(-1))[:, None] * v
    return out @ w["attn.proj.weight"].T


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def activation(name: str, slope: float, x: np.ndarray) -> np.ndarray:
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    if name == "leaky_relu2":
        return np.where(x > 0, x, slope * x) ** 2
    if name == "gelu2":
        return (x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2) ** 2
    assert name == "silu2", name
    return silu(x) ** 2


def mlp(w: dict, x: np.ndarray, cfg) -> np.ndarray:
    hidden = x @ w["mlp.fc.weight"].T
    if cfg.mlp_act == "swiglu":
        hidden = silu(x @ w["mlp.gate.weight"].T) * hidden
    else:
        hidden = activation(cfg.mlp_act, cfg.leaky_slope, hidden)
    return hidden @ w["mlp.proj.weight"].T


def remixed(w: dict, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    return w["resid_mix"][0] * x + w["resid_mix"][1] * x0


def block(w: dict, x: np.ndarray, x0: np.ndarray, cfg, values: np.ndarray, exclusive: bool) -> np.ndarray:
    x = remixed(w, x, x0)
    added = attention(w, rms(x), cfg, values, exclusive)
    if cfg.parallel_block:
        return x + w["attn_scale"] * added + w["mlp_scale"] * mlp(w, rms(x), cfg)
    x = x + w["attn_scale"] * (rms(added) if cfg.sandwich_norm else added)
    return x + w["mlp_scale"] * mlp(w, rms(x), cfg)


def block_weights(state: dict, index: int, repeat: int) -> dict:
    """The block's tensors by their names inside it; with LoRA the matrices W + B_r A_r of this repeat."""
    head = f"blocks.{index}."
    w = {name[len(head) :]: value for name, value in state.items() if name.startswith(head)}
    for part in ("attn.proj", "mlp.proj"):
        if f"{part}.lora_a" in w:
            w[f"{part}.weight"] = (
                w[f"{part}.weight"] + w[f"{part}.lora_b"][repeat] @ w[f"{part}.lora_a"][repeat]
            )
    return w


def logits(state: dict, ids, cfg, depth: int | None = None) -> np.ndarray:
    """Softcapped logits [T, V] of one sequence: the official baseline's, with the options of PR #1434 and,
    as published with PR #895, blocks that repeat. depth: how many effective layers run, all unless said."""
    depth, ids = cfg.num_layers * cfg.num_repeats if depth is None else depth, np.asarray(ids)
    table = state["tok_emb.weight"]
    x = x0 = rms(table[ids] * (cfg.embed_scale or 1.0))
    encoders = cfg.num_layers // 2 if cfg.encoder_layers < 0 else cfg.encoder_layers
    exclusive = depth if cfg.xsa_last_n < 0 else cfg.xsa_last_n
    pushed, outputs, first = [], {}, None  # U-Net stack; [repeat, place] -> residual stream after it
    for layer in range(depth):
        repeat, place = layer // cfg.num_layers, layer % cfg.num_layers
        w = block_weights(state, place % cfg.weight_share if cfg.weight_share else place, repeat)
        if cfg.num_repeats == 1 and layer >= encoders and pushed:
            x = x + state["skip_weights"][layer - encoders] * pushed.pop()
        if cfg.num_repeats > 1:
            x = x + state["loop_embed"][layer]
        for number in range(cfg.num_value_embeds):
            x = x + state["value_scales"][layer, number] * state[f"value_embeds.{number}.weight"][ids]
        if repeat > 0 and cfg.cross_repeat_skip:
            x = x + state["cross_repeat_scales"][place, repeat - 1] * outputs[repeat - 1, place]
        values = rms(remixed(w, x, x0)) @ w["attn.c_v.weight"].T
        if cfg.value_residual:
            first = values if layer == 0 else first
            values = state["value_mix"][layer, 0] * first + state["value_mix"][layer, 1] * values
        x = outputs[repeat, place] = block(w, x, x0, cfg, values, exclusive=layer >= depth - exclusive)
        if layer < encoders:
            pushed.append(x)
    z = rms(x) @ (table if cfg.tie_embeddings else state["lm_head.weight"]).T
    return cfg.logit_softcap * np.tanh(z / cfg.logit_softcap)


def nats(state: dict, ids, targets, cfg) -> np.ndarray:
    """-log p(target) of each position of one sequence."""
    z = logits(state, ids, cfg)
    top = z.max(-1)
    return top + np.log(np.exp(z - top[:, None]).sum(-1)) - z[np.arange(len(z)), np.asarray(targets)]


def head_diversity(projections: list[np.ndarray], heads: int) -> float:
    """Mean squared cosine between two heads' input columns of an output projection, over blocks."""
    squares = []
    for weight in projections:
        size = weight.shape[1] // heads
        parts = [weight[:, h * size : (h + 1) * size].ravel() for h in range(heads)]
        for one in range(heads):
            for other in range(one):
                a, b = parts[one], parts[other]
                squares.append((a @ b / np.linalg.norm(a) / np.linalg.norm(b)) ** 2)
    return float(np.mean(squares))


# --- Muon ---

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalised(matrix: np.ndarray, triples) -> np.ndarray:
    """The quintic iteration is odd in the matrix, so it acts on each singular value by itself."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (np.linalg.norm(matrix) + 1e-7)
    for a, b, c in triples:
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def newton_schulz(matrix: np.ndarray, steps: int) -> np.ndarray:
    return orthogonalised(matrix, [(3.4445, -4.7750, 2.0315)] * steps)


def polar_express(matrix: np.ndarray, steps: int) -> np.ndarray:
    return orthogonalised(matrix, POLAR_EXPRESS[:steps])


class MuonReference:
    """One matrix and what Muon remembers of it; every switch of the update is a knob of the same name."""

    def __init__(self, weight: np.ndarray, **knobs):
        self.weight = weight.copy()
        self.knobs = dict(
            lr=0.1, momentum=0.9, steps=5, polar=False, rows=False, normuon=0.0, soap=0.0, every=10,
            decay=0.0, cautious=False,
        ) | knobs  # fmt: skip
        rows, columns = weight.shape
        self.buffer = np.zeros((rows, columns))
        self.row_squares = np.zeros(rows)
        self.is_tall = rows > columns
        side = min(rows, columns)
        self.basis, self.covariance = np.eye(side), np.zeros((side, side))
        self.squares = np.zeros((side, max(rows, columns)))
        self.step_number = 0

    def step(self, grad: np.ndarray) -> np.ndarray:
        """The weight after a step."""
        k = self.knobs
        self.buffer = k["momentum"] * self.buffer + grad
        update = grad + k["momentum"] * self.buffer
        if k["soap"]:
            update = self.whitened(update, grad)
        if k["rows"]:
            update = update / np.maximum(np.sqrt((update**2).sum(1)), 1e-7)[:, None]
        update = (polar_express if k["polar"] else newton_schulz)(update, k["steps"])
        if k["normuon"]:
            size = np.linalg.norm(update)
            means = (update**2).mean(1)
            self.row_squares = k["normuon"] * self.row_squares + (1 - k["normuon"]) * means
            update = np.diag(self.row_squares**-0.5) @ update
            update *= size / np.linalg.norm(update)
        rows, columns = self.weight.shape
        update = update * math.sqrt(max(1, rows / columns))
        shrinks = np.ones_like(update)
        if k["cautious"]:
            shrinks = np.sign(update) * np.sign(self.weight) >= 0
        self.weight = self.weight - k["lr"] * (update + k["decay"] * shrinks * self.weight)
        self.step_number += 1
        return self.weight

    def whitened(self, update: np.ndarray, grad: np.ndarray) -> np.ndarray:
        beta = self.knobs["soap"]
        short = (lambda x: x.T) if self.is_tall else (lambda x: x)
        turned = np.einsum("ij,ik->jk", self.basis, short(update))
        self.squares = beta * self.squares + (1 - beta) * turned**2
        back = self.basis @ (turned / (np.sqrt(self.squares) + 1e-8))
        g = short(grad)
        self.covariance = beta * self.covariance + (1 - beta) * (g @ g.T)
        if self.step_number % self.knobs["every"] == 0:
            self.basis = np.linalg.eigh(self.covariance)[1]
        return short(back) * np.linalg.norm(update) / np.linalg.norm(back)


def adamw_step(weight, grad, first, second, step, lr, betas, eps, decay):
    """(weight, first and second moment) after step number `step`, from 1."""
    first = betas[0] * first + (1 - betas[0]) * grad
    second = betas[1] * second + (1 - betas[1]) * grad**2
    direction = first / (1 - betas[0] ** step) / (np.sqrt(second / (1 - betas[1] ** step)) + eps)
    return weight * (1 - lr * decay) - lr * direction, first, second


# --- int8 ---


def row_steps(weight: np.ndarray, floor: float) -> np.ndarray:
    """float16 steps [rows]: the row's 99.99984th percentile over 127, not below the floor."""
    clip = np.quantile(np.abs(weight), 0.9999984, axis=1)
    return np.maximum(clip / 127, max(floor, 2.0**-24)).astype(np.float16)


def least_error(weight: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Of each weight: its distance from the nearest multiple -127..127 of the row's step."""
    grid = np.arange(-127, 128) * steps.astype(np.float64)[:, None]  # [rows, 255]
    return np.abs(weight[:, :, None] - grid[:, None, :]).min(-1)
