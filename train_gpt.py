"""Train a small GPT under a clock, pack it under 16,000,000 bytes, report its bits per byte.

    python train_gpt.py                                    one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py  the same run on eight GPUs
    SEED=7 MATRIX_LR=0.03 python train_gpt.py              every knob is an environment variable
    python train_gpt.py --help                             all knobs: default, range, meaning
    python train_gpt.py --list-ideas                       the published ideas: state, source, formula
    python train_gpt.py --dry-run                          what this run would be; trains nothing
    python train_gpt.py --doctor                           is all that it needs here?
    EVAL_ONLY=final_model.int8.ptz python train_gpt.py     score a packed model again

Exit codes: 0 ok, 2 bad knob or input, 3 over 16,000,000 bytes, 4 over the evaluation budget, 5 diverged,
6 a graph was compiled inside the training clock, 7 a score fails SCORE_CHECK, 8 another rank was lost,
75 stopped by SIGTERM or SIGINT, to go on from a checkpoint with RESUME=auto.

Sections: 1 Knobs, 2 Runtime and logs, 3 Progress and schedules, 4 Data, 5 Bytes, 6 Model, 7 Optimisers,
8 Quantise and pack, 9 Score, 10 Train, 11 Main.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from statistics import median_low
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

OVER_SIZE, OVER_EVAL_TIME, DIVERGED, RECOMPILED, ILLEGAL_SCORE, LOST_RANK, PREEMPTED = 3, 4, 5, 6, 7, 8, 75
SIZE_LIMIT = 16_000_000  # decimal bytes of code + packed model, the challenge's rule


class RunError(Exception):  # ends the run with one line for the user; exit code 2, a bad input, unless said
    def __init__(self, message: str, code: int = 2, alone: bool | None = None):
        super().__init__(message)
        self.code, self.alone = code, alone  # alone: other ranks do not know it


def require(condition: object, message: str, code: int = 2, alone: bool | None = None) -> None:
    if not condition:
        raise RunError(message, code, alone)


# 1. KNOBS: everything a run can be told, declared once
# The official control tensors, then those of PR #895: they too are float32 wherever they are kept.
OFFICIAL = "attn_scale attn_scales mlp_scale mlp_scales resid_mix resid_mixes q_gain skip_weight skip_weights"
CONTROL_NAMES = (*OFFICIAL.split(), "loop_embed", "value_scales", "cross_repeat_scales", "value_mix")
MLP_ACTS = ("relu2", "leaky_relu2", "gelu2", "silu2", "swiglu")
CLIP_CHOICES = ("official", "max", "gptq_lite", "grid")
CURVES = "TIDAL_LR COSINE_LR BREATHING_LR WHALE_LR CIRCADIAN_LR COSMO_LR PUNCTUATED_LR ROOT_FIRST CORAL_LR"
NO_SCHEDULE = ",".join(f"{name}=0" for name in CURVES.split())


def sgd_with_momentum(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


TTT_OPTIMISERS = {"sgd": sgd_with_momentum, "adam": torch.optim.Adam}

NOT_BUILT = "BIGRAM_VOCAB_SIZE BIGRAM_DIM"  # published switches that are not here: refused unless off
COMMON_WORDS = {"DATA", "MAX", "NUM", "OUT", "RUN", "ALLOW", "MODEL", "INIT"}  # others' too, as in MAX_JOBS
# Far beyond any use: a typo, or a forged artifact, cannot ask for endless layers or overflow in torch.
FEW = dict.fromkeys(["num_layers", "num_repeats", "num_value_embeds", "mlp_mult", "muon_backend_steps"], 999)
MOST = FEW | dict(model_dim=2**16, train_seq_len=2**20, eval_seq_len=2**20, int=2**32, float=2.0**100)
# broken: it did something else than its description, nothing, or crashed; ours does what was described.
STATES = "works", "rejected", "broken", "not run"


def knob(default, doc: str, *, low=None, high=None, choices=(), needs="", role="train", **about):
    """A Config field, set by the environment variable of its name in capitals. needs: comma list of
    `NAME=VALUE` / `NAME!=VALUE` without which it does nothing. role: "train" and "pack" shape the result, so
    does "model", stored in the artifact; "place" stays out of the config hash. idea: its fate, of STATES."""
    limits = dict(low=low, high=high, choices=choices, needs=needs, role=role)
    return field(default=default, metadata=dict(doc=doc, idea="", source="PR #1434") | limits | about)


shape_knob, place, pack_knob = (partial(knob, role=role) for role in ("model", "place", "pack"))
works, rejected, broken, not_run = (partial(knob, idea=state) for state in STATES)
SHARE, TTT, HEDGE = dict(low=0, high=0.999), dict(needs="TTT_STEPS!=0"), dict(needs="USE_HEDGE=1")
FLAT, FLAT_WON = dict(needs="NUM_REPEATS=1"), dict(needs="NUM_REPEATS=1", idea="works")
linear, REPEATS = partial(knob, low=0, needs=NO_SCHEDULE), "NUM_REPEATS!=1"


@dataclass(frozen=True)
class Config:
    """All knobs of a run. Defaults are the official baseline's (openai/parameter-golf train_gpt.py)."""

    # -- data and length --
    data_path: str = place("./data/datasets/fineweb10B_sp1024", "folder of *_{train,val}_*.bin shards")
    tokenizer_path: str = place("./data/tokenizers/fineweb_1024_bpe.model", "its SentencePiece model")
    data_shuffle: bool = knob(False, "visit training windows in an order drawn from SEED; 0 = shard order")
    iterations: int = knob(20_000, "most optimiser steps; 0 = validate, pack and score only", low=0)
    max_wallclock_seconds: float = knob(600.0, "training clock; 0 = none", low=0)
    max_eval_seconds: float = place(600.0, "clock of the final scores; 0 = none", low=0)
    checkpoint_seconds: float = place(0.0, "training seconds between checkpoints; 0 = at its end", low=0)
    resume: str = place("0", "auto = go on from OUT_DIR's newest checkpoint, if any; or a checkpoint's path")
    warmup_steps: int = place(20, "untimed steps that compile, then are undone", low=0)
    train_batch_tokens: int = knob(524_288, "tokens per step over all ranks", low=1)
    train_seq_len: int = shape_knob(1024, "training and validation context", low=2)
    micro_batch_tokens: int = place(0, "tokens per forward pass and rank; 0 = fit the device", low=0)
    val_batch_size: int = place(524_288, "validation tokens per pass, over eight devices", low=8)
    # -- schedule --
    warmdown_iters: int = linear(1200, "last steps of linear decay", needs=f"WARMDOWN_FRAC=0,{NO_SCHEDULE}")
    warmdown_frac: float = linear(0.0, "the same as a share of the run; 0 = by steps", high=1)
    lr_floor: float = linear(0.0, "where the linear decay ends", high=1)
    tidal_lr: bool = works(False, "LR 0.1 -> 1 until p = TIDAL_WARMUP, then cosine back to 0.1")
    tidal_warmup: float = broken(0.382, "share of the run Tidal rises; unread", **SHARE, needs="TIDAL_LR=1")
    cosine_lr: bool = works(False, "LR f + (1-f)/2 (1 + cos(pi frac(COSINE_CYCLES p))), f = 0.1")
    cosine_cycles: float = rejected(1.0, "cosine periods, each from the top", low=0.01, needs="COSINE_LR=1")
    golden_lr: bool = broken(False, "cosine floor f = 0.382; its one run never trained", needs="COSINE_LR=1")
    breathing_lr: bool = rejected(False, "LR 0.1 -> 1 until p = 4/19, 1 until 11/19, cosine back to 0.1")
    whale_lr: bool = rejected(False, "3 dives: LR peaks at 1 - 0.285 p, each a tenth rise, cosine to 0.05")
    circadian_lr: bool = rejected(False, "LR cosine + 0.15 (1-p) sin(16 pi p), >= 0.1; there sin(2 pi s/50)")
    cosmo_lr: bool = rejected(False, "LR 0.05 -> 1 until p = 0.05, then (1 + 20 p)^-1/2")
    punctuated_lr: bool = rejected(False, "LR 0.1 + 0.9 exp(-(p-c)^2 / 0.005), c = 1/4 1/2 3/4; code lost")
    root_first: bool = broken(False, "cosine; all but the embedding rise 0.1 -> 1 until p = 0.2; was cosine")
    coral_lr: bool = broken(False, "cosine; block i of n freezes at p = (1 + (i+1)/n) / 2; was plain cosine")
    # -- model --
    vocab_size: int = shape_knob(1024, "must equal the tokenizer's size", low=2, high=65_536)
    num_layers: int = shape_knob(9, "transformer blocks", low=1)
    num_repeats: int = shape_knob(1, "times the blocks run in turn, PR #895; above 1: no U-Net", low=1)
    prog_depth: str = knob("", "progress:repeats,... e.g. 0.4:2,0.65:3,1.0:4; empty = off", needs=REPEATS)
    cross_repeat_skip: bool = shape_knob(True, "+ scales * the block's output a repeat ago", needs=REPEATS)
    repeat_lora_rank: int = shape_knob(0, "W + B_r A_r of proj in repeat r; lost there", low=0, needs=REPEATS)
    num_value_embeds: int = shape_knob(0, "token tables added before each layer, scaled", low=0)
    value_residual: bool = shape_knob(False, "values: a * the first layer's + b * own; lost there")
    xsa_last_n: int = shape_knob(0, "last layers whose heads omit their own value; -1 all", low=-1)
    encoder_layers: int = shape_knob(-1, "layers that feed U-Net skips; -1 half; 0 won", low=-1, **FLAT_WON)
    weight_share: int = shape_knob(0, "layer i runs block i mod this; 0 off; crashed", low=0, idea="broken")
    model_dim: int = shape_knob(512, "residual width", low=2)
    num_heads: int = shape_knob(8, "query heads", low=1)
    num_kv_heads: int = shape_knob(4, "key/value heads", low=1)
    mlp_mult: float = shape_knob(2.0, "MLP hidden width / MODEL_DIM", low=0.01)
    mlp_act: str = shape_knob("relu2", "MLP nonlinearity; silu2 won there", choices=MLP_ACTS, idea="works")
    leaky_slope: float = shape_knob(0.01, "negative slope before squaring", needs="MLP_ACT=leaky_relu2")
    parallel_block: bool = shape_knob(False, "attention and MLP read one norm, add together", idea="works")
    sandwich_norm: bool = shape_knob(False, "RMS-normed attention", needs="PARALLEL_BLOCK=0", idea="rejected")
    attn_recycle: bool = shape_knob(False, "attentions run twice; there one, in training only", idea="broken")
    embed_scale: float = shape_knob(0.0, "embedding factor, but its norm cancels it; 0 off", idea="broken")
    tie_embeddings: bool = shape_knob(True, "the output head is the embedding table")
    tied_embed_init_std: float = knob(0.005, "embedding init", low=0, needs="TIE_EMBEDDINGS=1")
    rope_base: float = shape_knob(10_000.0, "rotary wavelength base", low=1)
    logit_softcap: float = shape_knob(30.0, "logits are c*tanh(z/c)", low=1e-3)
    qk_gain_init: float = knob(1.5, "initial per-head gain of queries")
    init_from: str = knob("", "start from this state dict, e.g. the official script's final_model.pt")
    # -- optimisers --
    embed_lr: float = knob(0.6, "Adam, embedding", low=0, needs="TIE_EMBEDDINGS=0")
    head_lr: float = knob(0.008, "Adam, output head", low=0, needs="TIE_EMBEDDINGS=0")
    tied_embed_lr: float = knob(0.05, "Adam, shared embedding", low=0, needs="TIE_EMBEDDINGS=1")
    matrix_lr: float = knob(0.04, "Muon, matrices of the blocks", low=0)
    scalar_lr: float = knob(0.04, "Adam, vectors and control tensors", low=0)
    muon_momentum: float = knob(0.95, "Nesterov momentum after its warm-up", low=0, high=1)
    muon_wd: float = knob(0.0, "block matrices w (1 - lr this) before the step, PR #895", low=0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=0)
    muon_momentum_warmup_start: float = knob(0.85, "Muon momentum at step 0", low=0, high=1)
    muon_momentum_warmup_steps: int = knob(500, "steps of linear momentum warm-up", low=0)
    beta1: float = knob(0.9, "Adam first moment", low=0, high=0.999999)
    beta2: float = knob(0.95, "Adam second moment", low=0, high=0.999999)
    adam_eps: float = knob(1e-8, "Adam epsilon", low=0)
    grad_clip_norm: float = knob(0.0, "global L2 clip of the gradient; 0 = off", low=0)
    control_tensor_name_patterns: tuple[str, ...] = knob(CONTROL_NAMES, "names that SCALAR_LR trains")
    # -- ideas: what the training sees (x embedding, z logits, y target, p progress) --
    mirror_train: float = broken(0.0, "share of sequences read backwards; targets were not", low=0, high=1)
    embed_mixup: float = rejected(0.0, "x_t += r (x_(t-1) - x_t), r ~ U(0, this); x_0 was mixed too", **SHARE)
    token_drop: float = rejected(0.0, "share of positions whose input is 0, the rest / (1 - share)", **SHARE)
    metamorphosis: float = broken(0.0, "input dropout, falling to 0 at p = 1/2; code lost", **SHARE)
    focal_gamma: float = rejected(0.0, "loss (1 - P(y))^gamma CE", low=0, source="PR #1380")
    gamma_anneal: bool = broken(False, "gamma (1-p)", needs="FOCAL_GAMMA!=0")
    label_smooth: float = rejected(0.0, "loss (1-e) CE + e mean over v of -log P(v)", low=0, high=1)
    z_loss: float = rejected(0.0, "+ this * mean of (log sum exp z)^2", low=0)
    logit_penalty: float = rejected(0.0, "+ this * mean of z^2", low=0)
    logit_temp: float = not_run(1.0, "loss CE(z / this); the terms above and below see z", low=0.01)
    entropy_bonus: float = not_run(0.0, "+ this * mean entropy of P; negative rewards confidence")
    multi_token: float = broken(0.0, "+ this * CE of z and the target after next; last one repeated", low=0)
    head_diversity: float = broken(0.0, "+ this * mean squared cosine of heads' parts of proj, all blocks")
    # -- ideas: gradients g, weights w, structure; "matrices" leave out control tensors --
    grad_central: bool = not_run(False, "g - its mean over all axes but the first, matrices")
    mycorrhizal: float = rejected(0.0, "from p = 0.025 g_i += c g_(i+3), g_(i+3) += c g_i, blocks in order")
    thermal_vent: float = rejected(0.0, "from p = 0.025 two random blocks a step: g (1 + this)")
    sam_rho: float = broken(0.0, "g taken at w + rho g/norm(g), twice the cost; there a step uphill", low=0)
    canopy_lr: bool = broken(False, "LR of block i of n times 0.3 + 0.7 i/(n-1); there g, which Muon ignores")
    wd_schedule: float = broken(0.0, "block matrices w (1 - lr p this); without lr there: too strong", low=0)
    predprey_lr: bool = broken(False, "block matrices w (1 - lr (1 - (1-p)/2 sin(12 pi p)) / 100); no lr")
    controlled_burn: float = rejected(0.0, "share of smallest w zeroed each BURN_INTERVAL, matrices", **SHARE)
    burn_interval: int = rejected(50, "steps between burns", low=1, needs="CONTROLLED_BURN!=0")
    synaptic_scale: bool = broken(False, "norm(w) drawn to that at p = 0.05, 5 % a step; lost the LR")
    weight_perturb: float = rejected(0.0, "w += this mean(abs w) N(0,1) each PERTURB_INTERVAL", low=0)
    perturb_interval: int = rejected(100, "steps between perturbations", low=1, needs="WEIGHT_PERTURB!=0")
    mutation_decay: float = rejected(0.0, "from p = 0.05 w += this exp(-5p) mean(abs w) N(0,1)", low=0)
    layer_drop: float = broken(0.0, "chance a step skips a layer, but each half's first; crashed", **SHARE)
    progressive_grow: bool = broken(False, "train max(3, 0.3 L) layers, L from p = 0.9; unused there", **FLAT)
    head_prune: float = not_run(0.0, "share of heads, least norm(proj) first, zeroed; code lost", **SHARE)
    head_prune_at: float = not_run(0.25, "progress p of that", low=0, high=1, needs="HEAD_PRUNE!=0")
    # -- weight averages: what is packed is the average --
    swa_enabled: bool = knob(False, "mean of snapshots at full depth and low LR, PR #895")
    swa_start_frac: float = knob(0.4, "LR multiplier they are taken below", low=0, needs="SWA_ENABLED=1")
    swa_every: int = knob(50, "steps between snapshots", low=1, needs="SWA_ENABLED=1")
    ema_decay: float = knob(0.0, "exponential mean; 0 off", low=0, high=0.99999, needs="SWA_ENABLED=0")
    # -- artifact --
    quant_levels: int = pack_knob(127, "largest integer: 127 int8, 63 int7, 31 int6", low=1, high=127)
    mlp_quant_levels: int = pack_knob(0, "the same for MLP matrices; 0 = QUANT_LEVELS", low=0, high=127)
    embed_quant_levels: int = pack_knob(0, "for embeddings and head; 0 = QUANT_LEVELS", low=0, high=127)
    quant_clip: str = pack_knob("official", "how rows are clipped", choices=CLIP_CHOICES)
    codec: str = pack_knob("zstd", "compressor of the artifact", choices=("zstd", "zlib"))
    zstd_level: int = pack_knob(22, "zstd effort", low=1, high=22, needs="CODEC=zstd")
    quant_scale_floor: float = pack_knob(0.0, "least int8 step; official scripts have 1/127 = 0.00787", low=0)
    int8_keep_float_fp32_name_patterns: tuple[str, ...] = pack_knob(CONTROL_NAMES, "names packed as float32")
    eval_only: str = place("", "score this artifact instead of training")
    eval_stride: int = pack_knob(0, "targets scored by each sliding window; 0 = no such score", low=0)
    eval_seq_len: int = pack_knob(0, "its length; 0 = TRAIN_SEQ_LEN", low=0, needs="EVAL_STRIDE!=0")
    eval_batch_seqs: int = place(32, "sliding windows per pass and rank", low=1, needs="EVAL_STRIDE!=0")
    ttt_steps: int = pack_knob(0, "gradient steps on each chunk of the text once it is scored", low=0)
    ttt_lr: float = pack_knob(1e-4, "their learning rate", low=0, needs="TTT_STEPS!=0")
    ttt_chunk_tokens: int = pack_knob(32_768, "targets of a chunk", low=1, needs="TTT_STEPS!=0")
    ttt_optimizer: str = pack_knob("sgd", "sgd has momentum 0.9", choices=tuple(TTT_OPTIMISERS), **TTT)
    ttt_lora_rank: int = pack_knob(0, "train B A beside the blocks' matrices; 0 = all weights", low=0, **TTT)
    ttt_reset: bool = pack_knob(False, "each document alone: packed weights, no text before it", **TTT)
    use_hedge: bool = pack_knob(False, "also mix the last score with n-grams of the text read so far")
    hedge_eta: float = pack_knob(0.1, "weight of an expert ~ exp(this * its log-likelihood)", low=0, **HEDGE)
    hedge_order: int = pack_knob(6, "longest context of the n-grams", low=0, high=99, **HEDGE)
    hedge_window: int = pack_knob(1000, "only a bin's last so many tokens count; 0 = all", low=0, **HEDGE)
    score_dump: str = place("", "write each target's position, bytes and log-probs to this .npz")
    score_check: bool = place(False, "first try every score against the four conditions; exit 7 if one fails")
    # -- reports, place --
    val_loss_every: int = place(1000, "validate every so many steps; 0 = only at the end", low=0)
    train_log_every: int = place(200, "log the first ten steps, then one in so many; 0 = none", low=0)
    run_id: str = place("", "names the logs; empty = a new id")
    out_dir: str = place(".", "holds logs/ and the model files")
    seed: int = place(1337, "seeds weights and every random choice", low=0, high=2**32 - 1)
    device: str = place("auto", "where to run; mps is untested", choices=("auto", "cuda", "cpu", "mps"))
    dtype: str = knob("auto", "compute type; auto = bf16 where faster", choices=("auto", "bf16", "fp32"))
    compile: str = place("auto", "torch.compile; auto = where it works", choices=("auto", "0", "1"))
    deterministic: str = place("auto", "same seed, same bits; auto = on CPUs", choices=("auto", "0", "1"))
    allow_inert: bool = place(False, "a knob without effect is a warning, not an error")
    allow_env: tuple[str, ...] = place((), "variables that look like knobs but are not ours")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Read every knob; RunError on a bad value, a clash, a knob without effect, or a name close to a knob
        (difflib ratio >= 0.88) or that starts like two: JEPA_PRETRAIN_FRAC, unread, for JEPA_PURE_FRAC."""
        known = {f.name.upper(): f for f in fields(cls)}
        cfg = cls(**{f.name: parse(f, env[name]) for name, f in known.items() if name in env})
        words = Counter(name.partition("_")[0] for name in known if "_" in name)
        families = {word for word, count in words.items() if count > 1} - COMMON_WORDS
        others = [name for name in env if name not in known and name not in cfg.allow_env]
        for name in filter(re.compile(r"[A-Z0-9_]+").fullmatch, others):
            built, off = name not in NOT_BUILT.split(), env[name] in ("", "0", "0.0")
            require(built or off, f"{name}={env[name]} is a published switch that is not built yet; unset it")
            near = get_close_matches(name, known, n=1, cutoff=0.88) if built else []
            stranger = built and "_" in name and name.partition("_")[0] in families
            hint = f"did you mean {near[0]}?" if near else "see --help"
            require(not (near or stranger), f"{name} is not a knob; {hint} (ALLOW_ENV={name} ignores it)")
        inert = "; ".join(cfg.inert())
        require(not inert or cfg.allow_inert, f"{inert} (ALLOW_INERT=1 makes this a warning)")
        return cfg

    def __post_init__(self) -> None:
        for f in fields(self):
            name, value = f.name.upper(), getattr(self, f.name)
            low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
            most = MOST.get(f.name) or MOST.get(f.type)
            require(not most or abs(value) <= most, f"{name}={value} is beyond any use; {most} is the most")
            require(low is None or value >= low, f"{name}={value} is below {low}")
            require(high is None or value <= high, f"{name}={value} is above {high}")
            require(not choices or value in choices, f"{name}={value!r} is not one of {', '.join(choices)}")
        schedules = [name.upper() for name in SCHEDULES if getattr(self, name, False)]
        require(len(schedules) < 2, f"two schedules at once: {', '.join(schedules)}; set one to 0")
        sizes = ("model_dim num_heads", "num_heads num_kv_heads", "train_batch_tokens train_seq_len")
        for whole, part in map(str.split, sizes):
            a, b = getattr(self, whole), getattr(self, part)
            require(a % b == 0, f"{whole.upper()}={a} is not a multiple of {part.upper()}={b}")
        require(self.head_dim % 2 == 0, f"MODEL_DIM/NUM_HEADS={self.head_dim} must be even for rotation")
        require(self.encoder_layers <= self.num_layers, "ENCODER_LAYERS must not exceed NUM_LAYERS")
        turns, whole, hop, own = self.depth_phases, self.num_repeats, self.eval_stride, self.eval_length
        require(hop <= own, f"EVAL_STRIDE={hop} is longer than its window of {own} tokens; set EVAL_SEQ_LEN")
        fits = all(0 < until <= 1 and 0 < repeats <= whole for until, repeats in turns)
        wrong = f"PROG_DEPTH={self.prog_depth} needs progress in (0, 1], repeats of 1 to NUM_REPEATS={whole}"
        require(fits and (not turns or turns[-1][1] == whole), f"{wrong} and these last: they are scored")
        named = bool(re.fullmatch(r"[\w.+-]*", self.run_id))
        require(named, f"RUN_ID={self.run_id!r} may hold only letters, digits and . _ + -")

    schedule = property(lambda self: next((n for n in SCHEDULES if getattr(self, n, False)), "warmdown"))
    cap = property(lambda self: self.max_wallclock_seconds or math.inf)  # of the training clock
    head_dim = property(lambda self: self.model_dim // self.num_heads)
    depth = property(lambda self: self.num_layers * self.num_repeats)  # effective layers
    half = property(lambda self: self.num_layers // 2 if self.encoder_layers < 0 else self.encoder_layers)
    encoders = property(lambda self: self.half if self.num_repeats == 1 else 0)
    eval_length = property(lambda self: self.eval_seq_len or self.train_seq_len)
    changed = property(lambda self: [f for f in fields(self) if getattr(self, f.name) != f.default])
    sequences = property(lambda self: self.train_batch_tokens // self.train_seq_len)  # of a step, all ranks

    @property
    def depth_phases(self) -> list[tuple[float, int]]:
        """PROG_DEPTH as (until this progress, repeats), in order of progress."""
        parts = self.prog_depth.split(",") if self.prog_depth and self.num_repeats > 1 else []
        with suppress(ValueError):
            return sorted((float(until), int(n)) for until, _, n in (part.partition(":") for part in parts))
        raise RunError(f"PROG_DEPTH={self.prog_depth!r} is not like 0.4:2,0.65:3,1.0:4 (progress:repeats)")

    def overrides(self) -> dict[str, object]:
        """The knobs that differ from their defaults, by environment name."""
        return {f.name.upper(): getattr(self, f.name) for f in self.changed}

    def unmet(self, f: Field) -> str:
        """Says which condition in the knob's `needs` does not hold, the first, or ''."""
        known, needs = self.__dataclass_fields__, f.metadata["needs"]
        for need, name, differs, value in re.findall(r"((\w+)(!?)=([^,]*))", needs):
            if (getattr(self, name.lower()) == parse(known[name.lower()], value)) == bool(differs):
                return f"{f.name.upper()} has no effect without {need}"
        return ""

    def inert(self) -> list[str]:
        """One phrase for each changed knob that cannot have an effect."""
        return list(filter(None, map(self.unmet, self.changed)))

    def effective(self) -> dict[str, object]:
        """What shapes the result: knobs that act, without seed, paths and other `place` knobs."""
        acting = [f for f in fields(self) if f.metadata["role"] != "place" and not self.unmet(f)]
        return {f.name.upper(): getattr(self, f.name) for f in acting}

    @property
    def hash(self) -> str:
        """Same hash = same experiment, apart from seed, data and machine."""
        return hashlib.sha256(json.dumps(self.effective(), sort_keys=True).encode()).hexdigest()[:16]

    def shape(self) -> dict[str, object]:
        """The `model` knobs: what an artifact must say to be scored elsewhere."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["role"] == "model"}


def parse(f: Field, text: str):
    """The knob's value; RunError if the text does not fit its type."""
    wanted = dict(bool="0 or 1", int="a whole number", float="a finite number").get(f.type)
    reader = {"0": False, "1": True}.__getitem__ if f.type == "bool" else type(f.default)
    with suppress(KeyError, ValueError):
        value = tuple(filter(None, text.split(","))) if reader is tuple else reader(text)
        if f.type != "float" or math.isfinite(value):
            return value
    raise RunError(f"{f.name.upper()}={text!r} is not {wanted}")


def knob_rows() -> Iterator[tuple[str, str, str, str, str, str]]:
    """(name, default, allowed, meaning, how the idea fared, its source) of every knob."""
    for f in fields(Config):
        low, high, choices, needs = (f.metadata[key] for key in ("low", "high", "choices", "needs"))
        limits = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
        allowed = " ".join(choices) or " ".join(limits) or ("0 1" if f.type == "bool" else "")
        default = str({"bool": int, "tuple[str, ...]": ",".join}.get(f.type, str)(f.default))
        doc = f.metadata["doc"] + (f" [needs {needs}]" if needs else "")
        yield f.name.upper(), default, allowed, doc, f.metadata["idea"], f.metadata["source"]


def help_text() -> str:
    rows = [(n, d if len(d) < 42 else "(names)", doc, a and f"({a})") for n, d, a, doc, *_ in knob_rows()]
    return "\n".join([__doc__, *(f"{n:36} {d:42} {doc} {a}" for n, d, doc, a in rows)])


# 2. RUNTIME AND LOGS: the only code that knows about devices, ranks and files
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM: 4 times float32's products on an EPYC


@dataclass
class Runtime:  # where the run happens; every method is a no-op or the identity on one CPU process
    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    compiles: bool = False
    backend: str | Callable = "inductor"
    uncompiled: str = ""  # why not, if that is news to the user
    deterministic: bool = False  # torch's deterministic kernels alone: same seed, same bits
    patient: bool = False  # a signal waits, so that all ranks stop between the same two steps
    stopping: str = ""  # the signal that asked for an end
    is_cuda = property(lambda self: self.device.type == "cuda")
    dtype_name = property(lambda self: next(name for name, dtype in DTYPES.items() if dtype == self.dtype))

    @classmethod
    @contextmanager
    def launch(cls, cfg: Config, env: Mapping[str, str]) -> Iterator[Runtime]:
        """One process, or one of torchrun's: nccl between GPUs, gloo else, so that no GPU is waited for."""
        there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
        kind = cfg.device if cfg.device != "auto" else "cuda" if there["cuda"] else "cpu"
        require(there[kind], f"DEVICE={kind} but torch sees none here; set DEVICE=cpu or DEVICE=auto")
        place = env.get("LOCAL_RANK", "0"), env.get("RANK", "0"), env.get("WORLD_SIZE", "1")
        local, rank, size = (int(n) if n.isdecimal() else -1 for n in place)
        found = size == 1 or env.get("MASTER_ADDR") and env.get("MASTER_PORT", "").isdecimal()
        wrong = f"LOCAL_RANK, RANK, WORLD_SIZE={','.join(place)} or MASTER_ADDR, MASTER_PORT are unsound"
        sound, count = local >= 0 <= rank < size and found, torch.cuda.device_count()
        require(sound, f"{wrong}; unset them all, or let torchrun set them", alone=True)
        missing = f"rank {local} has no GPU: torch sees {count}; lower --nproc_per_node"
        require(kind != "cuda" or local < count, missing, alone=True)
        device = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
        runtime = cls(device, rank, size)
        runtime.compiles, runtime.uncompiled = pick_compile(cfg.compile, device)
        runtime.deterministic = cfg.deterministic == "1" or cfg.deterministic == "auto" and kind == "cpu"
        earlier_kernels = use_deterministic_kernels(runtime.deterministic)
        runtime.claim_device()
        with suppress(OSError, AttributeError):  # glibc alone: new pages take time (cpu_memory.json)
            if device.type == "cpu":
                libc = ctypes.CDLL(None)
                libc.mallopt(-1, 2**31 - 1), libc.mallopt(-3, 2**28)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        before = {number: signal.signal(number, runtime.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if runtime.world_size > 1:  # torchrun's store still has the addresses of ranks before a restart
                turn = env.get("TORCHELASTIC_RESTART_COUNT", "") if env.get("GROUP_WORLD_SIZE") == "1" else ""
                store = dist.PrefixStore(turn, next(dist.rendezvous("env://"))[0])  # "": nodes count apart
                where = dict(store=store, rank=runtime.rank, world_size=runtime.world_size)
                dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", **where)
            runtime.dtype = DTYPES[runtime.main_decides(lambda: pick_dtype(cfg.dtype, device))]
            yield runtime
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for number, handler in before.items():
                signal.signal(number, handler)
            use_deterministic_kernels(earlier_kernels)

    def stop(self, number: int, _frame) -> None:
        """Handler of signals: end now, or where patience ends. One is enough: torchrun doubles Ctrl-C."""
        known, self.stopping = self.stopping, signal.Signals(number).name
        if not (known or self.patient):
            raise KeyboardInterrupt

    def claim_device(self) -> None:
        """Make this rank's GPU the thread's own; a new thread would open a context on the first one."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)

    def compile(self, fn: Callable) -> Callable:
        if not self.compiles:
            return fn
        torch._dynamo.config.cache_size_limit = 128  # a graph for each depth and shape; 8 would be an error
        if self.is_cuda and self.deterministic and hasattr(torch._inductor.config, "deterministic"):
            torch._inductor.config.deterministic = True  # torch 2.9 on: chooses no kernel by timing it
        return torch.compile(fn, dynamic=False, fullgraph=True, backend=self.backend)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def sum(self, tensor: Tensor) -> Tensor:
        """In-place sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing) -> list:
        """Every rank's thing, on every rank."""
        things = [thing] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(things, thing)
        return things

    def agree(self, make: Callable):
        """make() on every rank; a RunError of one is raised on all."""
        made, error = None, None
        try:
            made = make()
        except RunError as raised:
            error = str(raised), raised.code
        for other in filter(None, self.gather(error)):
            raise RunError(*other, alone=False)
        return made

    def main_decides(self, decide: Callable):
        """Call `decide` on rank 0 and give its result, or its RunError, to every rank."""
        message = [self.agree(lambda: decide() if self.rank == 0 else None)]
        if self.world_size > 1:
            dist.broadcast_object_list(message, device=torch.device("cpu"))
        return message[0]

    def main_number(self, value: float) -> float:
        """Rank 0's number on every rank, over the host network: no device is waited for."""
        return self.sum(torch.tensor(value if self.rank == 0 else 0.0, dtype=torch.float64)).item()

    def share(self, count: int) -> range:
        """This rank's contiguous part of `count` items."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def peak_memory_mib(self) -> tuple[int, int]:
        """Most memory (allocated, reserved) on CUDA; elsewhere twice the process's resident set."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,) * 2


def pick_dtype(wanted: str, device: torch.device) -> str:
    """'bf16' or 'fp32', by what the device can do and never by a race, which load could turn: two runs of
    one command must compute in one type. GPUs from sm_80 on have bf16 products (T4 and V100 do not), CPUs
    if Linux names one of BF16_CPU_FLAGS."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bf16 = device.type == "cpu" and not BF16_CPU_FLAGS.isdisjoint(cpu_flags())
    return "bf16" if has_bf16 else "fp32"


def cpu_flags() -> list[str]:
    """The instruction sets of this CPU by Linux's names; none where there is no /proc/cpuinfo."""
    with suppress(OSError):
        line = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return line[1].split() if line else []
    return []


def use_deterministic_kernels(wanted: bool) -> bool:
    """Let torch use deterministic kernels alone, or all; returns what it was before.

    Without it the compiler for CPUs adds up the embedding's gradient by atomic additions from several
    threads, in any order: two runs of one command part after 3 to 14 steps (torch 2.13)."""
    earlier = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read at first use
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it fills what is overwritten anyway
    return earlier


def pick_compile(wanted: str, device: torch.device) -> tuple[bool, str]:
    """(compile or not, why not). torch 2.5.1 drops repeated tokens' gradients silently on CPUs, 2.13 not."""
    if wanted == "auto" and device.type == "cpu" and torch.__version__ < (2, 6):  # a TorchVersion
        return False, f"torch {torch.__version__}'s CPU compiler gives wrong gradients"
    return wanted == "1" or wanted == "auto" and device.type != "mps", ""


class RunLog:
    """Rank 0's two logs: logs/RUN_ID.txt in the official line formats, logs/RUN_ID.jsonl as typed events.
    again: go on in those of a run that was cut off, perhaps within a line."""

    def __init__(self, folder: Path | None, run_id: str, again: bool = False):
        paths = [folder / f"{run_id}{end}" for end in (".txt", ".jsonl")] if folder else []
        for path in filter(Path.exists, paths if again else ()):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self.again = again and any(path.exists() for path in paths)
        files = [path.open("a" if again else "x", encoding="utf-8") for path in paths]
        self.text, self.events = files or [None, None]

    def line(self, text: str, echo: bool = True) -> None:
        if self.text:
            print(text, file=self.text, flush=True)
        try:
            print(text, flush=True) if self.text and echo else None
        except OSError:  # its reader is gone, as `| head` is after ten lines; the run goes on, in the log
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def warn(self, when: bool, text: str) -> None:
        if when:
            self.line(f"warning: {text}")

    def event(self, event: str, **values) -> None:
        if self.events:
            print(json.dumps(dict(event=event, time=time.time(), **values)), file=self.events, flush=True)

    def close(self) -> None:
        for file in filter(None, (self.text, self.events)):
            with suppress(OSError):  # a full disk, which has been said
                file.close()


def write_atomic(path: Path, data: bytes | Callable) -> None:
    """Whole or not at all: temporary file, fsync, rename. data: bytes, or what writes them to a file."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except (OSError, RuntimeError) as error:  # a full disk's names no file; torch.save's is a RuntimeError
        why = getattr(error, "strerror", None) or "it could not be written whole; is the disk full?"
        raise OSError(getattr(error, "errno", None) or 5, why, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def claim_outputs(cfg: Config, run_id: str) -> list:
    """Refuse to write where another run has written or is writing; with RESUME, what an unfinished RUN_ID
    left is its own. Returns locks, which hold that name until the run is finished: hold them."""
    out, dumps = Path(cfg.out_dir), [Path(cfg.score_dump)] if cfg.score_dump else []
    logs = [out / "logs" / f"{run_id}{end}" for end in (".txt", ".jsonl")]
    models = [] if cfg.eval_only else [out / "final_model.pt", out / MODEL_FILE]
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        locks = [path.with_name(f".{path.name}.lock").open("a+") for path in logs[:1] + models[:1]]
        for lock in locks:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        own = [cfg.resume != "0" and Path(lock.name).read_text() == run_id for lock in locks]
    except BlockingIOError:
        raise RunError(f"another run is writing to OUT_DIR={out}; set another OUT_DIR") from None
    except OSError as error:
        raise RunError(f"cannot write to OUT_DIR={out} ({error.strerror}); set another OUT_DIR") from None
    reached = all(os.access(path.parent, os.W_OK) for path in dumps)
    require(reached, f"cannot write SCORE_DUMP={cfg.score_dump}: no such folder, or no right to; set another")
    for path in filter(Path.exists, logs * (not own[0]) + (models + dumps) * (not all(own))):
        mend = "RUN_ID" if path in logs else "OUT_DIR, e.g. OUT_DIR=runs/2"
        raise RunError(f"{path} is there from an earlier run; move it away or set another {mend}")
    for part in [*out.glob("final_model.*.tmp-*"), *out.glob("checkpoints/*.tmp-*")] if models else ():
        part.unlink()  # of a run that was killed as it wrote
    for lock in (lock for lock, mine in zip(locks, own, strict=True) if not mine):  # never empty when resumed
        Path(lock.name).write_text(run_id)
    return locks


# 3. PROGRESS AND SCHEDULES: pure functions of how far the run is
SCHEDULES: dict[str, Callable[[Config, float, float], float]] = dict(  # of the LR; the last if none is on
    tidal_lr=lambda cfg, p, left: tide(p, cfg.tidal_warmup, cfg.tidal_warmup),
    cosine_lr=lambda cfg, p, left: cosine(p, 0.382 if cfg.golden_lr else 0.1, cfg.cosine_cycles),
    breathing_lr=lambda cfg, p, left: tide(p, 4 / 19, 11 / 19),
    whale_lr=lambda cfg, p, left: whale(p),
    circadian_lr=lambda cfg, p, left: max(0.1, cosine(p) + 0.15 * (1 - p) * math.sin(16 * math.pi * p)),
    cosmo_lr=lambda cfg, p, left: 0.05 + 19 * p if p < 0.05 else (1 + 20 * p) ** -0.5,
    punctuated_lr=lambda cfg, p, left: 0.1 + 0.9 * max(math.exp(-200 * (p - c / 4) ** 2) for c in (1, 2, 3)),
    root_first=lambda cfg, p, left: cosine(p),
    coral_lr=lambda cfg, p, left: cosine(p),
    warmdown=lambda cfg, p, left: warmdown(cfg, p, left),
)


def steps_left(cfg: Config, step: int, elapsed: float, step_seconds: float) -> float:
    """Steps until the step limit or, at `step_seconds` a step, until the clock; at least 0."""
    by_clock = (cfg.cap - elapsed) / step_seconds if step_seconds > 0 else math.inf
    return max(0.0, min(cfg.iterations - step, by_clock))


def finished(cfg: Config, step: int, elapsed: float, step_seconds: float) -> bool:
    """True when the next step would pass a limit. One step always runs, so that a slow machine trains."""
    return step >= cfg.iterations or (step > 0 and cfg.cap < elapsed + step_seconds)


def warmdown(cfg: Config, p: float, left: float) -> float:
    """Official: 1, then linear over the last WARMDOWN_ITERS steps, here also over a share of the run."""
    share = left / cfg.warmdown_iters if cfg.warmdown_iters else 1.0
    share = (1 - p) / cfg.warmdown_frac if cfg.warmdown_frac else share
    return cfg.lr_floor + (1 - cfg.lr_floor) * min(1.0, share)


def cosine(p: float, floor: float = 0.1, cycles: float = 1.0) -> float:
    """From 1 down to `floor` in each cycle; the end of the run is the end of a cycle, not a new one."""
    return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * (cycles * p % 1.0 or float(p >= 1.0))))


def tide(p: float, rise: float, fall: float) -> float:
    """Linear 0.1 -> 1 until p = rise, 1 until p = fall, cosine back to 0.1."""
    return 0.1 + 0.9 * p / rise if p < rise else cosine(max(0.0, p - fall) / (1 - fall))


def whale(p: float) -> float:
    """Three dives, each a steep rise and a long cosine fall; the last tenth fades out; at least 0.05."""
    u, peak = 3 * p % 1.0, 0.95 * (1 - 0.3 * p)
    dive = 0.05 + (peak * u / 0.1 if u < 0.1 else 0.5 * peak * (1 + math.cos(math.pi * (u - 0.1) / 0.9)))
    return max(0.05, dive * min(1.0, (1 - p) / 0.1))


@dataclass(frozen=True)
class StepPlan:  # everything that changes from step to step, decided before it, equal on every rank
    progress: float
    lr_scale: float
    muon_momentum: float
    step: int = 0  # completed before this one
    depth: int | None = None  # effective layers that train, from the first; None = all
    layers: tuple[bool, ...] = ()  # LAYER_DROP: whether each runs
    noise: int = 0  # seed of the step's draws inside compiled code

    def dials(self, device: torch.device) -> Tensor:
        """What compiled code sees of the plan, float32: [noise, progress, 1 or 0 for each layer]."""
        return torch.tensor([self.noise, self.progress, *self.layers], dtype=torch.float32).to(device)


def draw(*key) -> int:
    """A seed below 2^24 (exact in float32) for anything random, the same on every rank."""
    return zlib.crc32("/".join(map(str, key)).encode()) % 2**24


def phases(cfg: Config) -> list[tuple[float, int | None]]:
    """(until this progress, effective layers) of the depths the run trains in turn; each is a graph."""
    if cfg.progressive_grow and cfg.num_repeats == 1:
        depths = range(min(cfg.num_layers, max(3, int(0.3 * cfg.num_layers))), cfg.num_layers + 1)
        return [(0.9 * i / max(len(depths) - 1, 1), depth) for i, depth in enumerate(depths, 1)]  # all by 0.9
    return [(until, repeats * cfg.num_layers) for until, repeats in cfg.depth_phases] or [(1.0, None)]


def kept_layers(cfg: Config, step: int) -> tuple[bool, ...]:
    """LAYER_DROP: whether each layer runs this step; the first encoder and the first decoder always do."""
    rng, always = random.Random(draw(cfg.seed, "layers", step)), (0, cfg.encoders)
    return tuple(i in always or rng.random() >= cfg.layer_drop for i in range(cfg.depth))


def plan_step(cfg: Config, step: int, elapsed: float, step_seconds: float) -> StepPlan:
    """elapsed: rank 0's training seconds; step_seconds: median of its recent steps, 0 if unknown."""
    p = min(1.0, max(step / max(cfg.iterations, 1), elapsed / cfg.cap))  # the further (PR #1434 review, R1)
    scale = SCHEDULES[cfg.schedule](cfg, p, steps_left(cfg, step, elapsed, step_seconds))
    start, warm_up = cfg.muon_momentum_warmup_start, cfg.muon_momentum_warmup_steps  # as officially
    momentum = start + (min(1.0, step / warm_up) if warm_up else 1.0) * (cfg.muon_momentum - start)
    depth = next((depth for until, depth in phases(cfg) if p < until), phases(cfg)[-1][1])
    return StepPlan(p, scale, momentum, step, depth, kept_layers(cfg, step), draw(cfg.seed, "noise", step))


class Clock:  # rank 0's training seconds; on CUDA at most two steps late, and the device never waits for it
    def __init__(self, runtime: Runtime, step_seconds: float = 0.0):
        self.runtime, self.total, self.started, self.last = runtime, 0.0, 0.0, None
        self.recent, self.pending = deque([step_seconds] if step_seconds else [], maxlen=15), deque()
        self.asked = False  # by a signal, on any rank, to stop

    def start(self) -> None:
        self.runtime.synchronize()
        self.started, self.last = time.perf_counter(), None

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.runtime.synchronize()
        self.total = self.seconds()
        self.pending.clear()
        yield
        self.start()

    def tick(self) -> float:
        """Seconds trained by rank 0's clock, the same on every rank; call once before each step."""
        paced = not self.runtime.is_cuda or len(self.pending) == 2  # a host that runs ahead measures nothing
        if self.runtime.is_cuda:
            self.pending.append(torch.cuda.Event())
            self.pending[-1].record()
        if len(self.pending) > 2:
            self.pending.popleft().synchronize()
        mine = self.seconds() if self.runtime.rank == 0 else 0.0, bool(self.runtime.stopping)
        now, self.asked = self.runtime.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        if self.last is not None and paced:
            self.recent.append(now - self.last)
        self.last = now if paced else None
        return now

    def seconds(self) -> float:
        """This rank's reading, for logs."""
        return self.total + time.perf_counter() - self.started

    def step_seconds(self) -> float:
        """Median of recent steps: one slow step (a compile, a hiccup) does not bend the schedule."""
        return median_low(self.recent) if self.recent else 0.0


# 4. DATA: official shards -> the same global batches at any world size
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens [count] of an official shard; RunError on anything but a whole one."""
    try:
        size, head = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    require(len(head) == 256, f"{path} is no token shard: {size} bytes do not hold a header; fetch it again")
    magic, version, count = head[:3]
    require(magic == SHARD_MAGIC, f"{path} is no token shard: magic {magic}, not {SHARD_MAGIC}")
    require(version == SHARD_VERSION, f"{path} has shard version {version}; this reads {SHARD_VERSION}")
    expected = SHARD_HEADER_BYTES + 2 * int(count)
    require(size == expected, f"{path} is damaged: {size} bytes, its header says {expected}; fetch it again")
    require(count > 0, f"{path} holds no tokens")
    return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES))  # slices faster


class TokenStream:  # the shards of one split as one sequence of tokens
    def __init__(self, folder: str, split: str, vocab_size: int):
        self.paths = sorted(Path(folder).glob(f"*_{split}_*.bin"))
        make = "make some with `python data/pydocs.py` or `python data/fineweb.py`, or set DATA_PATH"
        require(bool(self.paths), f"no *_{split}_*.bin in DATA_PATH={folder}; {make}")
        kinds = {path.name.partition(f"_{split}_")[0] for path in self.paths}
        require(len(kinds) == 1, f"DATA_PATH={folder} mixes datasets {sorted(kinds)}; keep one a folder")
        self.shards = [open_shard(path) for path in self.paths]
        self.vocab_size, self.bounds = vocab_size, np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), uint16; RunError if one is outside the vocabulary."""
        first, stop = np.searchsorted(self.bounds, (start, start + count - 1), side="right") - (1, 0)
        parts, here = [], slice(first, stop)
        for path, shard, begin in zip(self.paths[here], self.shards[here], self.bounds[here], strict=True):
            parts.append(shard[max(0, start - begin) : start + count - begin])
            wrong = f"{path} holds token {parts[-1].max()}, beyond VOCAB_SIZE={self.vocab_size}"
            require(int(parts[-1].max()) < self.vocab_size, f"{wrong}: made with another tokenizer?")
        return np.concatenate(parts)

    def windows(self, length: int) -> int:
        """How many training windows of `length` targets it holds; RunError if none."""
        require(len(self) > length, f"the shards hold {len(self)} tokens, TRAIN_SEQ_LEN={length} needs more")
        return (len(self) - 1) // length

    def epoch(self, cfg: Config, step: int) -> int:
        """Which pass over the training windows a step starts in, from 1."""
        return cfg.sequences * max(step, 0) // self.windows(cfg.train_seq_len) + 1


def window_order(cfg: Config, windows: int, step: int) -> np.ndarray:
    """Indices [sequences] of the training windows of one step: a pure function of (seed, step)."""
    epochs, places = np.divmod(np.arange(step * cfg.sequences, (step + 1) * cfg.sequences), windows)
    if not cfg.data_shuffle:
        return places
    return np.array([epoch_order(cfg.seed, int(e), windows)[p] for e, p in zip(epochs, places, strict=True)])


@lru_cache(maxsize=2)  # 80 shards have 7.8 M windows: 0.8 s to permute, too long for every step
def epoch_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def batches(cfg: Config, stream: TokenStream, runtime: Runtime, first=0) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (inputs, targets) from a step on, [sequences here, T] int64; windows share a token."""
    length, windows = cfg.train_seq_len, stream.windows(cfg.train_seq_len)
    for step in itertools.count(first):
        order = window_order(cfg, windows, step)[list(runtime.share(cfg.sequences))]
        rows = [stream.read(window * length, length + 1) for window in order.tolist()]
        block = torch.from_numpy(np.array(rows, np.int64).reshape(-1, length + 1))
        pair = block[:, :-1], block[:, 1:]  # a GPU waits for the copy unless it is contiguous and pinned
        yield tuple(part.contiguous().pin_memory() for part in pair) if runtime.is_cuda else pair


def prefetch(items: Iterator, runtime: Runtime) -> Iterator:
    """The same endless items, each made on a thread while the one before is used; errors are raised here."""
    with ThreadPoolExecutor(1, initializer=runtime.claim_device) as pool:  # closing the generator ends it
        ahead = pool.submit(next, items)
        while True:
            item, ahead = ahead.result(), pool.submit(next, items)
            yield item


# 5. BYTES: the denominator of bits per byte, checked against decoded text
MARK = "\u2581"  # SentencePiece's space


class ByteTable:  # by token id: bytes of its own, whether a space mark starts it, whether it is a boundary
    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        ids, is_byte = range(tokenizer.vocab_size()), tokenizer.is_byte
        kinds = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused)
        self.boundary = np.array([any(kind(i) for kind in kinds) for i in ids])
        pieces = ["" if self.boundary[i] else "?" if is_byte(i) else tokenizer.id_to_piece(i) for i in ids]
        self.space = np.array([p.startswith(MARK) for p in pieces])  # marks inside a piece are plain spaces
        self.own = np.array([len(p.removeprefix(MARK).replace(MARK, " ").encode()) for p in pieces], np.int16)
        self.mark_bytes = [i for b in MARK.encode() if is_byte(i := tokenizer.piece_to_id(f"<0x{b:02X}>"))]

    def weigh(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes [N] that each token adds: a space mark counts 1 unless it follows a boundary or the start."""
        begins = np.concatenate(([True], self.boundary[tokens[:-1]]))
        weights = self.own[tokens] + (self.space[tokens] & ~begins).astype(np.int16)
        if len(self.mark_bytes) == 3 and len(tokens) > 2:
            runs = [tokens[k : len(tokens) - 2 + k] == byte for k, byte in enumerate(self.mark_bytes)]
            at = np.flatnonzero(np.logical_and.reduce(runs))
            weights[at] = weights[at + 1] = 0  # one space; as 3 bytes: a fifth too good (parameter-golf #897)
        return weights


def load_tokenizer(cfg: Config) -> sentencepiece.SentencePieceProcessor:
    path, where = Path(cfg.tokenizer_path), f"TOKENIZER_PATH={cfg.tokenizer_path}"
    require(path.is_file(), f"no tokenizer at {where}; it comes with the dataset (see data/README.md)")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # sentencepiece raises RuntimeError, OSError or its own, by version
        raise RunError(f"{where} is not a SentencePiece model ({type(error).__name__})") from None
    size = tokenizer.vocab_size()
    require(size == cfg.vocab_size, f"VOCAB_SIZE={cfg.vocab_size} but {path} has {size} pieces")
    return tokenizer


def decoded_bytes(tokenizer, table: ByteTable, tokens: np.ndarray) -> tuple[int, int]:
    """(documents, bytes) of the text that `tokens` decode to: the oracle. A leading space adds no byte."""
    keeps_mark = any(tokenizer.decode([i]).startswith(" ") for i in np.flatnonzero(table.space)[:1].tolist())
    edges = np.concatenate(([-1], np.flatnonzero(table.boundary[tokens]), [len(tokens)]))
    spans = [(start + 1, stop) for start, stop in itertools.pairwise(edges.tolist()) if stop > start + 1]
    bytes_of = {tokenizer.piece_to_id(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}
    anchor, total = tokenizer.piece_to_id("<0x61>"), 0  # an 'a' in front keeps decode from dropping a space
    for at in range(0, len(spans), 1000):
        documents = [tokens[start:stop].tolist() for start, stop in spans[at : at + 1000]]
        for ids, text in zip(documents, tokenizer.decode(documents), strict=True):
            # A U+FFFD may be three bytes of the source or one broken byte token: decode byte tokens apart.
            broken, raw = "\ufffd" in text and any(map(tokenizer.is_byte, ids)), text.encode()
            if broken:
                raw = b"".join(bytes_of.get(i) or tokenizer.decode([anchor, i]).encode()[1:] for i in ids)
            total += len(raw.replace(MARK.encode(), b" "))
            total -= bool(table.space[ids[0]]) and (broken or keeps_mark)
    return len(spans), total


@dataclass(frozen=True)
class Validation:  # the held-out split
    tokens: np.ndarray  # [N] uint16
    target_bytes: np.ndarray  # [N - 1] int16, of tokens[1:]
    documents: int
    sha256: str
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # targets that open a document
    targets = property(lambda self: len(self.tokens) - 1)
    bytes = property(lambda self: int(self.target_bytes.sum(dtype=np.int64)))


def load_validation(cfg: Config, tokenizer, prove: bool = True) -> Validation:
    """Read the validation shards. prove: RunError unless the pieces' bytes equal the decoded text's."""
    where, stream = cfg.data_path, TokenStream(cfg.data_path, "val", cfg.vocab_size)
    table, tokens = ByteTable(tokenizer), stream.read(0, len(stream))
    require(len(tokens) > 1, f"the validation shards in {where} hold fewer than two tokens")
    weights = table.weigh(tokens)
    starts = 1 + np.flatnonzero(table.boundary[tokens[1:-1]])  # the token read there is a boundary
    data = Validation(tokens, weights[1:], 0, hashlib.sha256(tokens.tobytes()).hexdigest(), starts)
    if not prove:
        return data
    require(data.bytes > 0, f"the validation shards in {where} decode to no text")
    key = data.sha256 + hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest()
    cache, documents = Path(where) / f".bytes-{key[:16]}.json", 0
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged: count again
        saved = json.loads(cache.read_text())
        if saved["key"] == key:
            documents, decoded = int(saved["documents"]), int(saved["bytes"])
    if not documents:
        documents, decoded = decoded_bytes(tokenizer, table, tokens)
        with suppress(OSError):  # a read-only dataset only costs the count again next time
            write_atomic(cache, json.dumps(dict(key=key, documents=documents, bytes=decoded)).encode())
    counted = int(weights.sum(dtype=np.int64))
    wrong = f"wrong byte count: {counted} by pieces, {decoded} by decoding the validation text"
    require(counted == decoded, f"{wrong}; does {cfg.tokenizer_path} belong to {where}?")
    return replace(data, documents=documents)


# 6. MODEL: official names and shapes, so official checkpoints load
BLOCK, LONGEST_BLOCKED = 128, 2048  # queries of a block, and the longest sequence, of attention on a CPU
# Training only, by the knob that switches it on: changes of the input before and after its norm; loss terms.
EMBEDDING_TERMS: dict[str, Callable[..., Tensor]] = dict(embed_mixup=lambda *given: embed_mixup(*given))
INPUT_TERMS: dict[str, Callable[..., Tensor]] = dict(
    token_drop=lambda cfg, x, ids, dials: dropout(x, uniform(ids, dials[0], 2, len(ids[0])), cfg.token_drop),
    metamorphosis=lambda cfg, x, ids, dials: dropout(
        x, uniform(ids, dials[0], 3, x[0].numel()), cfg.metamorphosis * (1 - 2 * dials[1]).clamp_min(0)
    ),
)
LOSS_TERMS: dict[str, Callable[..., Tensor]] = dict(  # softcapped logits z, targets y, their nats, progress p
    focal_gamma=lambda cfg, z, y, nats, p, _: (  # (1 - P(y))^gamma nats, less nats (Lin et al. 1708.02002)
        ((-torch.expm1(-nats)).clamp_min(1e-7) ** (cfg.focal_gamma * (1 - cfg.gamma_anneal * p)) - 1) * nats
    ).mean(),
    label_smooth=lambda cfg, z, y, nats, *_: cfg.label_smooth * (z.logsumexp(-1) - z.mean(-1) - nats).mean(),
    z_loss=lambda cfg, z, *_: cfg.z_loss * z.logsumexp(-1).square().mean(),
    logit_penalty=lambda cfg, z, *_: cfg.logit_penalty * z.square().mean(),
    logit_temp=lambda cfg, z, y, nats, *_: (cross_entropy(z / cfg.logit_temp, y) - nats).mean(),
    entropy_bonus=lambda cfg, z, *_: -cfg.entropy_bonus * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    multi_token=lambda cfg, z, y, *_: cfg.multi_token * cross_entropy(z[:, :-1], y[:, 1:]).mean(),
    head_diversity=lambda cfg, z, y, nats, p, model: head_diversity(cfg, model),
)


def norm(x: Tensor) -> Tensor:
    """Parameter-free RMS norm over the last dimension; its epsilon is that of float32 for every dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)


class Linear(nn.Linear):
    """No bias; float32 weights, used in the dtype of the input. With a rank, repeat r uses W + B_r A_r."""

    def __init__(self, inputs: int, outputs: int, zero: bool = False, repeats: int = 0, rank: int = 0):
        super().__init__(inputs, outputs, bias=False)
        if zero:
            nn.init.zeros_(self.weight)
        self.lora_a = nn.Parameter(torch.randn(repeats, rank, inputs) / inputs**0.5) if rank else None
        self.lora_b = nn.Parameter(torch.zeros(repeats, outputs, rank)) if rank else None

    def forward(self, x: Tensor, repeat: int = 0) -> Tensor:
        y, a, b = F.linear(x, self.weight.to(x.dtype)), self.lora_a, self.lora_b
        return y if a is None else y + F.linear(F.linear(x, a[repeat].to(x.dtype)), b[repeat].to(x.dtype))


@torch.library.custom_op("golf::causal_softmax_", mutates_args=["scores"], schema="(Tensor(a!) scores) -> ()")
def causal_softmax_(scores: Tensor) -> None:
    """In place, over the last dimension; scores [..., rows, past]: the last rows of a causal square. One
    piece to torch.compile, which would take each exponential twice (benchmarks/NOTES.md)."""
    rows = scores.size(-2)
    scores[..., -rows:].add_(scores.new_full((rows, rows), -torch.inf).triu_(1))
    torch.softmax(scores, dim=-1, out=scores)


class BlockedAttention(torch.autograd.Function):
    """`attend` by blocks of queries, for CPUs; heads that share k and v go into one product. Keeps what the
    softmax gives for the backward pass: ds = p (dp - sum(dy y)), as FlashAttention (Dao 2205.14135)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaled, keys, values, ys, ps = q * q.size(-1) ** -0.5, k.flatten(0, 1), v.flatten(0, 1), [], []
        for part in scaled.unflatten(1, (k.size(1), -1)).flatten(0, 1).split(BLOCK, dim=2):
            past = part.size(2) + sum(y.size(2) for y in ys)
            scores = (part.flatten(1, 2) @ keys[:, :past].mT).view(*part.shape[:3], past)
            causal_softmax_(scores)
            ps.append(scores.flatten(1, 2))
            ys.append((ps[-1] @ values[:, :past]).view_as(part))
        y = torch.cat(ys, dim=2).view(q.shape)
        ctx.save_for_backward(q, k, v, y, *ps)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, *ps = ctx.saved_tensors
        scale, keys, values, dqs = q.size(-1) ** -0.5, k.flatten(0, 1), v.flatten(0, 1), []
        dy, y, parts = (x.unflatten(1, (k.size(1), -1)).flatten(0, 1) for x in (dy, y, q * scale))
        dk, dv, means = torch.zeros_like(keys), torch.zeros_like(values), (dy * y).sum(-1, keepdim=True)
        for p, *blocks in zip(ps, *(x.split(BLOCK, dim=2) for x in (dy, means, parts)), strict=True):
            past, (g, mean, part) = p.size(2), (x.flatten(1, 2) for x in blocks)
            ds = (g @ values[:, :past].mT).sub_(mean).mul_(p)
            dv[:, :past].baddbmm_(p.mT, g)
            dk[:, :past].baddbmm_(ds.mT, part)
            dqs.append((ds @ keys[:, :past]).view_as(blocks[0]))
        return (torch.cat(dqs, dim=2) * scale).view(q.shape), dk.view(k.shape), dv.view(v.shape)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, grouped queries. q [B, H, T, D]; k, v [B, Hkv, T, D] -> [B, H, T, D]."""
    groups, native = q.size(1) // k.size(1), q.is_cuda and q.dtype != torch.float32
    if q.device.type == "cpu" and q.size(2) <= LONGEST_BLOCKED:
        return BlockedAttention.apply(q, k, v)
    if groups > 1 and not native:  # only the half-precision CUDA kernels take grouped heads as they are
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=native and groups > 1)


def omit_own(y: Tensor, v: Tensor) -> Tensor:
    """y [B, H, T, D] less its part along the own value v [B, Hkv, T, D]: XSA (Zhai 2603.09078; PR #895)."""
    own, y = F.normalize(v, dim=-1, eps=1e-12)[:, :, None], y.unflatten(1, (v.size(1), -1))
    return (y - (y * own).sum(dim=-1, keepdim=True) * own).flatten(1, 2)


class Attention(nn.Module):
    """Causal self-attention: QK RMS norm, rotary positions, a learned gain per query head."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.c_q = Linear(cfg.model_dim, cfg.model_dim)
        self.c_k, self.c_v = (Linear(cfg.model_dim, cfg.num_kv_heads * cfg.head_dim) for _ in range(2))
        self.proj = Linear(cfg.model_dim, cfg.model_dim, True, cfg.num_repeats, cfg.repeat_lora_rank)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, repeat=0, exclusive=False, mix=None, first=()):
        """[B, T, d] -> same. mix (a, b), first [the first layer's values]: attend to a * first + b * own."""
        shape = (*x.shape[:2], -1, 2 * cos.size(1))  # to [B, heads, T, D]; rotary cos and sin are [T, D/2]
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.c_q, self.c_k, self.c_v))
        if mix is not None:
            first += [] if first else [v]
            v = mix[0].to(v.dtype) * first[0] + mix[1].to(v.dtype) * v
        halves = (norm(part).chunk(2, dim=-1) for part in (q, k))
        q, k = (torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1) for a, b in halves)
        y = attend(q * self.q_gain.to(x.dtype)[:, None, None], k, v)
        y = omit_own(y, v) if exclusive else y
        return self.proj(y.transpose(1, 2).flatten(2), repeat)


class MLP(nn.Module):
    """f(F x)^2, or SwiGLU: silu(G x) * (F x) of 2/3 of the width, so that the parameters match (PR #1434)."""

    def __init__(self, cfg: Config):
        super().__init__()
        leaky, wide = partial(F.leaky_relu, negative_slope=cfg.leaky_slope), cfg.mlp_mult * cfg.model_dim
        self.activation = dict(relu2=F.relu, leaky_relu2=leaky, gelu2=F.gelu, silu2=F.silu).get(cfg.mlp_act)
        hidden = int(wide if self.activation else 2 * wide / 3)
        self.gate = None if self.activation else Linear(cfg.model_dim, hidden)
        self.fc = Linear(cfg.model_dim, hidden)
        self.proj = Linear(hidden, cfg.model_dim, True, cfg.num_repeats, cfg.repeat_lora_rank)

    def forward(self, x: Tensor, repeat: int = 0) -> Tensor:
        hidden = F.silu(self.gate(x)) * self.fc(x) if self.gate else self.activation(self.fc(x)).square()
        return self.proj(hidden, repeat)


class Block(nn.Module):
    """x <- m0*x + m1*x0, then attention and MLP (parallel: of the same x, PR #1434), each with its gains."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.attn, self.mlp = Attention(cfg), MLP(cfg)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(cfg.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.after = norm if cfg.sandwich_norm and not cfg.parallel_block else nn.Identity()
        self.parallel, self.passes = cfg.parallel_block, 1 + cfg.attn_recycle

    def forward(self, x: Tensor, x0: Tensor, repeat: int = 0, **how) -> Tensor:
        """how: what Attention.forward takes."""
        keep, again = self.resid_mix.to(x.dtype)
        x = entered = keep * x + again * x0
        for _ in range(self.passes):
            x = x + self.attn_scale.to(x.dtype) * self.after(self.attn(norm(x), repeat=repeat, **how))
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(entered if self.parallel else x), repeat)


def layer_plan(cfg: Config) -> list[tuple[int, int | None, int | None]]:
    """(block, row of skip_weights, layer whose output times that is added: U-Net, latest first) of layers."""
    half, shared = cfg.encoders, cfg.weight_share or cfg.num_layers
    joins = [(i - half, 2 * half - 1 - i) if half <= i < 2 * half else (None, None) for i in range(cfg.depth)]
    return [(i % cfg.num_layers % shared, *join) for i, join in enumerate(joins)]


class GPT(nn.Module):
    """Token ids [B, T] -> softcapped float32 logits [B, T, V]."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype, self.softcap, self.embed_scale = dtype, cfg.logit_softcap, cfg.embed_scale or 1.0
        self.layers, width = layer_plan(cfg), cfg.model_dim
        self.tok_emb = nn.Embedding(cfg.vocab_size, width)
        self.skip_weights = nn.Parameter(torch.ones(sum(at is not None for *_, at in self.layers), width))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(1 + max(block for block, *_ in self.layers)))
        self.lm_head = None if cfg.tie_embeddings else Linear(width, cfg.vocab_size, zero=True)
        if cfg.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=cfg.tied_embed_init_std)
        frequency = cfg.rope_base ** (-torch.arange(0.0, cfg.head_dim, 2) / cfg.head_dim)
        angle = torch.outer(torch.arange(float(max(cfg.train_seq_len, cfg.eval_length))), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)  # [T, head_dim/2]
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.exclusive, self.period = cfg.depth if cfg.xsa_last_n < 0 else cfg.xsa_last_n, cfg.num_layers
        embeds, again = cfg.num_value_embeds, cfg.num_repeats - 1
        self.value_embeds = nn.ModuleList(nn.Embedding(cfg.vocab_size, width) for _ in range(embeds))
        self.value_scales = nn.Parameter(torch.zeros(cfg.depth, embeds, width)) if embeds else None
        self.loop_embed = nn.Parameter(torch.zeros(cfg.depth, width)) if again else None
        scales = torch.zeros(cfg.num_layers, again, width)
        self.cross_repeat_scales = nn.Parameter(scales) if again and cfg.cross_repeat_skip else None
        self.value_mix = nn.Parameter(torch.full((cfg.depth, 2), 0.5)) if cfg.value_residual else None

    def forward(self, ids: Tensor, depth: int | None = None, places: Tensor | None = None) -> Tensor:
        return self.logits(norm(self.tok_emb(ids) * self.embed_scale), depth=depth, ids=ids, places=places)

    def logits(self, x0: Tensor, keep: Tensor | None = None, depth=None, ids=None, places=None) -> Tensor:
        """From normed embeddings [B, T, d] and ids to logits [B, T, V], or [B, S, V] at places [B, S]."""
        x = x0 = x0.to(self.dtype)
        depth, outputs = len(self.layers) if depth is None else depth, []
        how = dict(cos=self.cos[: x.size(1)].to(x.dtype), sin=self.sin[: x.size(1)].to(x.dtype), first=[])
        values = [table(ids).to(x.dtype) for table in self.value_embeds]
        for i, (block, skip, source) in enumerate(self.layers):
            repeat, place = divmod(i, self.period)
            if skip is not None:
                x = x + self.skip_weights[skip].to(x.dtype) * outputs[source]
            if i < depth:  # later ones, and those of keep 0, add but their U-Net skip
                mix = None if self.value_mix is None else self.value_mix[i]
                y = x if self.loop_embed is None else x + self.loop_embed[i].to(x.dtype)  # as PR #895
                for scale, value in zip(self.value_scales[i] if values else (), values, strict=True):
                    y = y + scale.to(x.dtype) * value
                if repeat and self.cross_repeat_scales is not None:  # the output of the block's last run
                    y = y + self.cross_repeat_scales[place, repeat - 1].to(x.dtype) * outputs[-self.period]
                y = self.blocks[block](y, x0, repeat, exclusive=i >= depth - self.exclusive, mix=mix, **how)
                x = y if keep is None else torch.where(keep[i] > 0, y, x)
            outputs.append(x)
        x = x if places is None else x.take_along_dim(places[..., None], dim=1)
        z = F.linear(norm(x), (self.lm_head or self.tok_emb).weight.to(x.dtype)).float()
        return self.softcap * torch.tanh(z / self.softcap)


def token_nats(model: GPT, ids: Tensor, targets: Tensor, places=None, depth=None) -> Tensor:
    """-log p(target), float32, at all places [B, T] or those given [B, S]. All that evaluation uses."""
    return cross_entropy(model(ids, depth, places), targets)


def scramble(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers in int64 (Thomas Mueller's, two multiplications)."""
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return x ^ (x >> 16)


def uniform(ids: Tensor, noise: Tensor, salt: int, count: int) -> Tensor:
    """Draws in [0, 1), float32 [B, count], of each sequence's tokens, step and salt, however it is run."""
    places = [torch.arange(n, device=ids.device) for n in (ids.size(1), count)]
    content = (ids * (scramble(places[0] + 1) >> 1)).sum(dim=1, keepdim=True)  # below 2^59: no overflow
    sequence = scramble((content + (noise.long() << 8) + salt) & 0xFFFFFFFF)
    return (scramble(sequence ^ scramble(places[1])) >> 8).float() / 2**24


def embed_mixup(cfg: Config, x: Tensor, ids: Tensor, dials: Tensor) -> Tensor:
    """Move each embedding [B, T, d] a random part of the way to the one before it; the first has none."""
    r = (cfg.embed_mixup * uniform(ids, dials[0], 1, ids.size(1)))[:, 1:, None]
    return torch.cat((x[:, :1], (1 - r) * x[:, 1:] + r * x[:, :-1]), dim=1)


def dropout(x: Tensor, draws: Tensor, rate: float | Tensor) -> Tensor:
    return x * ((draws.view(*x.shape[:2], -1) >= rate) / (1 - rate)).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), float32, of the shape of `targets`."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


def head_diversity(cfg: Config, model: GPT) -> Tensor:
    """Mean squared cosine between the heads' input columns of each output projection, over all blocks."""
    total, pairs = 0.0, max(cfg.num_heads * (cfg.num_heads - 1), 1)
    for block in model.blocks:
        heads = block.attn.proj.weight.unflatten(1, (cfg.num_heads, -1)).transpose(0, 1).flatten(1)
        cosine = (unit := F.normalize(heads, dim=1)) @ unit.T
        total = total + (cosine - cosine.diag().diag()).square().sum() / pairs
    return cfg.head_diversity * total / len(model.blocks)


def switched_on(cfg: Config, table: Mapping[str, Callable]) -> list[Callable]:
    """The entries whose knob is not at its default."""
    return [entry for name, entry in table.items() if name in {f.name for f in cfg.changed}]


def training_loss(cfg: Config, model: GPT) -> Callable[..., tuple[Tensor, Tensor]]:
    """(ids, targets, StepPlan.dials or step 0's, depth) -> (what is minimised, mean nats per token alone)."""
    mixes, drops, terms = (switched_on(cfg, t) for t in (EMBEDDING_TERMS, INPUT_TERMS, LOSS_TERMS))
    changes = [*mixes, lambda cfg, x, *_: norm(x), *drops]

    def loss(ids: Tensor, targets: Tensor, dials=None, depth=None) -> tuple[Tensor, Tensor]:
        dials = plan_step(cfg, 0, 0.0, 0.0).dials(ids.device) if dials is None else dials
        if cfg.mirror_train:  # some sequences as a whole: the target is still the token read next
            back = uniform(ids, dials[0], 0, 1) < cfg.mirror_train
            ids, targets = torch.where(back, targets.flip(1), ids), torch.where(back, ids.flip(1), targets)
        x = model.tok_emb(ids) * model.embed_scale
        for change in changes:
            x = change(cfg, x, ids, dials)
        logits = model.logits(x, dials[2:] if cfg.layer_drop else None, depth, ids)
        nats = cross_entropy(logits, targets)
        added = (term(cfg, logits, targets, nats, dials[1], model) for term in terms)
        return sum(added, nats.mean()), nats.detach().mean()

    return loss


def load_checkpoint(path: str) -> dict[str, Tensor]:
    """A state dict saved by torch.save, as float32. A tensor may not be larger than what is stored of it."""
    state, whole = read_saved(path, "INIT_FROM="), False
    with suppress(AttributeError, RuntimeError):  # of what has no values, or values that are no plain tensors
        plain = all(t.is_cpu and t.is_floating_point() for t in state.values())
        whole = plain and all(t.nbytes <= t.untyped_storage().nbytes() for t in state.values())
    require(whole, f"INIT_FROM={path} is not a state dict of tensors")
    return {name: tensor.float() for name, tensor in state.items()}


def read_saved(path: Path | str, knob_name=""):
    """What torch.save wrote, whole and on the CPU, or RunError. Nothing in the file is executed."""
    require(Path(path).is_file(), f"no checkpoint at {knob_name}{path}")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load ignores its checksums, and would unpack a bomb
            packed = sum(part.file_size for part in file.infolist()) > Path(path).stat().st_size
            require(not packed and not file.testzip(), "damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile have many kinds for a damaged or foreign file
        raise RunError(f"{knob_name}{path} is no whole checkpoint ({type(error).__name__})") from None


def load_weights(model: GPT, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into the model; RunError naming the first differences if it does not fit."""
    own, given = ({name: tuple(t.shape) for name, t in s.items()} for s in (model.state_dict(), state))
    names = [name for name in own | given if own.get(name) != given.get(name)]
    wrong = [f"{n} is {given.get(n, 'missing')} there, {own.get(n, 'unknown')} here" for n in names[:3]]
    require(not wrong, f"{source} does not fit this model ({len(names)} tensors): {'; '.join(wrong)}")
    model.load_state_dict(state)


# 7. OPTIMISERS: Muon for the blocks' matrices, Adam for the rest


def orthogonalise(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Move all singular values of each matrix of a stack [n, r, c] near 1 (quintic Newton-Schulz, Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan's: steep at 0, all within 0.7..1.2 after 5 steps
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if (tall := x.size(1) > x.size(2)) else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then an orthogonalised step (Keller Jordan) of each rank's share of the matrices."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, steps: int, runtime: Runtime):
        super().__init__([dict(params=params, base_lr=lr)], dict(lr=lr, momentum=momentum, weight_decay=0.0))
        self.steps, self.runtime, self.matrices = steps, runtime, self.param_groups[0]["params"]
        self.own = slice(runtime.rank, None, runtime.world_size)  # this rank's share of them
        self.state.update({p: dict(momentum_buffer=torch.zeros_like(p)) for p in self.matrices[self.own]})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in (group for group in self.param_groups if group["params"]):
            params, momentum, sizes = group["params"], group["momentum"], [p.numel() for p in group["params"]]
            flat = torch.zeros(sum(sizes), device=params[0].device)
            updates = [part.view_as(p) for part, p in zip(flat.split(sizes), params, strict=True)]
            pairs = [*zip(params, updates, strict=True)][self.own]
            for shape in dict.fromkeys(p.shape for p, _ in pairs):
                alike, results = zip(*((p, update) for p, update in pairs if p.shape == shape), strict=True)
                grads, averages = [p.grad for p in alike], [self.state[p]["momentum_buffer"] for p in alike]
                torch._foreach_mul_(averages, momentum)
                torch._foreach_add_(averages, grads)
                nesterov = torch.stack(torch._foreach_add(grads, averages, alpha=momentum))
                turned = orthogonalise(nesterov, self.steps, self.runtime.dtype)
                torch._foreach_copy_(results, (turned * max(1.0, shape[0] / shape[1]) ** 0.5).unbind())
            self.runtime.sum(flat)
            if group["weight_decay"]:  # decoupled, and before the update, as PR #895
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])


@dataclass(frozen=True)
class Weight:  # a parameter and its place; memory: what an intervention must remember of it
    name: str
    param: nn.Parameter
    role: str  # "matrix": Muon trains it; "embed", "head", "scalar": Adam
    memory: dict[str, Tensor] = field(default_factory=dict)
    dense = property(lambda self: self.role != "scalar")  # no gain, gate or other control tensor
    block = property(lambda self: int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None)


def weights_of(cfg: Config, model: GPT) -> list[Weight]:
    """Every parameter, with its one role as in the official script; empty tensors are left out."""
    weights, own = [], dict(tok_emb="embed", value_embeds="embed", lm_head="head")
    for name, p in model.named_parameters():
        control = any(pattern in name for pattern in cfg.control_tensor_name_patterns)
        other = "matrix" if p.ndim == 2 and name.startswith("blocks.") and not control else "scalar"
        weights += [Weight(name, p, own.get(name.partition(".")[0], other))] if p.numel() else []
    return weights


def blocks_of(weights: list[Weight]) -> list[dict[str, Weight]]:
    """The blocks in order, each by the name inside the block."""
    blocks = itertools.groupby((w for w in weights if w.block is not None), key=lambda w: w.block)
    return [{w.name.split(".", 2)[2]: w for w in block} for _, block in blocks]


def shake(amount: Callable[..., float], cfg: Config, weights: list[Weight], plan: StepPlan) -> None:
    """Add amount(cfg, step, p) times a matrix's mean magnitude times N(0, 1), the same on every rank."""
    size = amount(cfg, plan.step + 1, plan.progress)
    for name, p in ((w.name, w.param) for w in weights if w.dense and size > 1e-6):
        generator = torch.Generator(p.device).manual_seed(draw(cfg.seed, plan.step, name))
        p.add_(torch.randn(p.shape, generator=generator, device=p.device) * (size * p.abs().mean()))


def head_prune(cfg: Config, weights: list[Weight], plan: StepPlan, grads: bool = False) -> None:
    """Zero the heads whose input columns of proj have the least norm, chosen once, and keep them so."""
    for w in (b["attn.proj.weight"] for b in blocks_of(weights) if plan.progress >= cfg.head_prune_at):
        size = w.param.unflatten(1, (cfg.num_heads, -1)).norm(dim=(0, 2))
        least = size.topk(int(cfg.head_prune * cfg.num_heads), largest=False).indices
        kept = w.memory.setdefault("kept", torch.ones_like(size).index_fill_(0, least, 0))
        (w.param.grad if grads else w.param).unflatten(1, (cfg.num_heads, -1)).mul_(kept[:, None])


# Interventions by knob: of the summed gradients, before the clip and the step; of the weights after the step.
GRADIENT_EDITS: dict[str, Callable[..., object]] = dict(
    grad_central=lambda cfg, ws, plan: [w.param.grad.sub_(w.param.grad.mean(1, True)) for w in ws if w.dense],
    mycorrhizal=lambda cfg, ws, plan: [  # blocks three apart exchange a share, first to last: so it cascades
        torch._foreach_add_([a, b], [b.clone(), a.clone()], alpha=cfg.mycorrhizal)
        for near, far in zip(blocks_of(ws), blocks_of(ws)[3:], strict=False)
        for a, b in ((near[n].param.grad, far[n].param.grad) for n in near if plan.progress >= 0.025)
    ],
    thermal_vent=lambda cfg, ws, plan: [
        w.param.grad.mul_(1 + cfg.thermal_vent)
        for block in random.Random(plan.noise).sample(blocks_of(ws), min(2, len(blocks_of(ws))))
        for w in (block.values() if plan.progress >= 0.025 else [])
    ],
    head_prune=partial(head_prune, grads=True),
)
WEIGHT_EDITS: dict[str, Callable[..., object]] = dict(
    controlled_burn=lambda cfg, ws, plan: [
        x.index_fill_(0, x.abs().topk(int(cfg.controlled_burn * len(x)), largest=False).indices, 0)
        for x in (w.param.view(-1) for w in ws if w.dense and due(plan.step + 1, cfg.burn_interval))
    ],
    synaptic_scale=lambda cfg, ws, plan: [
        w.param.mul_((w.memory.setdefault("size", size) / size).clamp(0.95, 1.05))
        for w, size in ((w, w.param.norm().clamp_min(1e-12)) for w in ws if w.dense and plan.progress >= 0.05)
    ],
    weight_perturb=partial(shake, lambda cfg, step, p: cfg.weight_perturb * due(step, cfg.perturb_interval)),
    mutation_decay=partial(shake, lambda cfg, step, p: cfg.mutation_decay * math.exp(-5 * p) * (p >= 0.05)),
    head_prune=head_prune,
)
# LR multiplier of a weight at p, with n blocks: of the step, since Muon and Adam cancel it on the gradient.
LAYER_RATES: dict[str, Callable[[Weight, float, int], float]] = dict(
    canopy_lr=lambda w, p, n: 1.0 if w.block is None else 0.3 + 0.7 * w.block / max(n - 1, 1),
    root_first=lambda w, p, n: 1.0 if w.role == "embed" else min(1.0, 0.1 + 4.5 * p),
    coral_lr=lambda w, p, n: 1.0 if w.block is None else float(p < (1 + (w.block + 1) / n) / 2),
)
DECAYS: dict[str, Callable[[Config, float], float]] = dict(  # of the blocks' matrices, times their LR
    muon_wd=lambda cfg, p: cfg.muon_wd,
    wd_schedule=lambda cfg, p: cfg.wd_schedule * p,
    predprey_lr=lambda cfg, p: 0.01 - 0.005 * (1 - p) * math.sin(12 * math.pi * p),
)


class Optimisers:
    """Muon and Adam over one flat gradient buffer, stepped together."""

    def __init__(self, cfg: Config, model: GPT, runtime: Runtime):
        self.cfg, self.runtime, self.blocks = cfg, runtime, len(model.blocks)
        self.weights = weights_of(cfg, model)
        embed_lr = cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr
        rates = dict(embed=embed_lr, head=cfg.head_lr, scalar=cfg.scalar_lr)
        roles = {role: [w.param for w in self.weights if w.role == role] for role in [*rates, "matrix"]}
        groups = [dict(params=roles[role], lr=lr, base_lr=lr) for role, lr in rates.items() if roles[role]]
        betas, fused = (cfg.beta1, cfg.beta2), runtime.device.type in ("cuda", "cpu")
        self.adam = torch.optim.Adam(groups, betas=betas, eps=cfg.adam_eps, fused=fused)
        self.muon = Muon(roles["matrix"], cfg.matrix_lr, cfg.muon_momentum, cfg.muon_backend_steps, runtime)
        self.all = self.adam, self.muon
        held = [p for optimiser in self.all for group in optimiser.param_groups for p in group["params"]]
        self.flat = torch.zeros(sum(sizes := [p.numel() for p in held]), device=runtime.device)
        for p, part in zip(held, self.flat.split(sizes), strict=True):
            p.grad = part.view_as(p)  # backward adds into the buffer: one all-reduce, no copies
        tables = GRADIENT_EDITS, WEIGHT_EDITS, LAYER_RATES, DECAYS
        *self.edits, self.rates, self.decays = (switched_on(cfg, table) for table in tables)

    def state(self) -> dict[str, object]:
        """What it remembers, whole on every rank: Muon's momentum is gathered from the ranks that hold it."""
        none, muon = torch.zeros(0, device=self.runtime.device), self.muon
        shares = [muon.state.get(p, {}).get("momentum_buffer", torch.zeros_like(p)) for p in muon.matrices]
        momentum = self.runtime.sum(torch.cat([none, *(share.flatten() for share in shares)]))
        memory = {w.name: dict(w.memory) for w in self.weights if w.memory}
        return dict(adam=self.adam.state_dict(), muon=momentum, memory=memory)

    def load(self, state: Mapping) -> None:
        """Back to a state, at any world size."""
        self.adam.load_state_dict(state["adam"])
        parts = state["muon"].to(self.runtime.device).split([p.numel() for p in self.muon.matrices])
        for p, part in [*zip(self.muon.matrices, parts, strict=True)][self.muon.own]:
            self.muon.state[p]["momentum_buffer"] = part.view_as(p).clone()
        for w in self.weights:
            w.memory.clear()
            w.memory.update({key: t.to(w.param.device) for key, t in state["memory"].get(w.name, {}).items()})

    @contextmanager
    @torch.no_grad()  # its own code alone, not what is run inside it
    def uphill(self, rho: float) -> Iterator[None]:
        """Weights moved by `rho` along the summed gradient, put back at the end (SAM, Foret 2010.01412)."""
        self.runtime.sum(self.flat)
        held = [w.param for w in self.weights]
        before, scale = [p.detach().clone() for p in held], rho / (self.flat.norm() + 1e-12)
        torch._foreach_add_(held, torch._foreach_mul([p.grad for p in held], scale))
        yield
        torch._foreach_copy_(held, before)

    @torch.no_grad()
    def step(self, plan: StepPlan) -> None:
        """Sum gradients over ranks, edit, clip, update by the plan's learning rate and momentum, edit."""
        self.runtime.sum(self.flat)
        for edit in self.edits[0]:
            edit(self.cfg, self.weights, plan)
        self.norm = self.flat.norm()
        if self.cfg.grad_clip_norm:
            self.flat.mul_((self.cfg.grad_clip_norm / (self.norm + 1e-6)).clamp(max=1.0))
        decay = sum(rate(self.cfg, plan.progress) for rate in self.decays)
        self.muon.param_groups[0].update(momentum=plan.muon_momentum, weight_decay=decay)
        shares = [math.prod(rate(w, plan.progress, self.blocks) for rate in self.rates) for w in self.weights]
        slowed = [(w.param, w.param.clone(), s) for w, s in zip(self.weights, shares, strict=True) if s != 1]
        for optimiser in self.all:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * plan.lr_scale
            optimiser.step()
        for p, before, share in slowed:
            p.lerp_(before, 1 - share)  # the share of the step it makes
        for edit in self.edits[1]:
            edit(self.cfg, self.weights, plan)


class Average:
    """Running average of the weights in float32: SWA's uniform mean (PR #895), or EMA without its bias."""

    def __init__(self, cfg: Config, model: GPT):
        self.cfg, self.live = cfg, [p.detach() for p in model.parameters() if p.numel()]
        self.kind = "swa" if cfg.swa_enabled else "ema" if cfg.ema_decay else ""
        self.total = [torch.zeros_like(p) for p in self.live] if self.kind else []
        self.weight, self.count, self.newest = 0.0, 0, 0  # newest: the step of the latest snapshot

    def add(self, step: int) -> None:
        """Take the weights as they are after `step` steps."""
        keep, new = (1.0, 1.0) if self.kind == "swa" else (self.cfg.ema_decay, 1 - self.cfg.ema_decay)
        torch._foreach_mul_(self.total, keep)
        torch._foreach_add_(self.total, self.live, alpha=new)
        self.weight, self.count, self.newest = keep * self.weight + new, self.count + 1, step

    def update(self, plan: StepPlan) -> None:
        """After a plan's step. SWA: at full depth and low learning rate, each SWA_EVERY steps."""
        low = plan.depth in (None, self.cfg.depth) and plan.lr_scale < self.cfg.swa_start_frac
        if self.kind == "ema" or self.kind == "swa" and low and due(plan.step + 1, self.cfg.swa_every):
            self.add(plan.step + 1)

    def load(self, step: int) -> None:
        """Put the average into the model. SWA counts the final weights once (PR #895: at times twice)."""
        if self.newest != step:  # never so of EMA
            self.add(step)
        torch._foreach_copy_(self.live, torch._foreach_div(self.total, self.weight))


# 8. QUANTISE AND PACK: weights -> integer rows -> one compressed file, and back
MODEL_FILE = "final_model.int8.ptz"  # the official name; its integers may have fewer levels
PLANES = {"int8": "<i1", "step": "<f2", "fp16": "<f2", "fp32": "<f4"}  # kinds of array in the file
MAGIC, FORMAT_VERSION = b"PGOLFQ", 1
PREFIX = struct.Struct("<6sB4s8sQQ")  # magic, version, codec, sha256[:8] of all else, raw and packed length
RAW_LIMIT = 1 << 29  # no artifact within the limit unpacks to more; a header that says so is forged
TRAINED_RATIO = 0.92  # packed / raw bytes of int8 rows: 0.9165 in PR #895, 0.92 in LowerLR
SIZE_SLACK = 1.03  # a prediction this far over the limit stops the run before training
# |w| [r, c] -> clips [n, r], a row keeps the best; gptq_lite: PR #895. torch.quantile stops at 16 M numbers.
CLIPS: dict[str, Callable[[np.ndarray], np.ndarray]] = dict(
    official=lambda size: np.quantile(size, [0.9999984], axis=1),
    max=lambda size: size.max(axis=1)[None],
    gptq_lite=lambda size: np.quantile(size, (0.9999, 0.99995, 0.99999, 0.999995, 0.999999), axis=1),
    grid=lambda size: np.linspace(1, 0.3, 36)[:, None] * size.max(axis=1),
)
CODECS: dict[str, tuple[Callable, Callable]] = {  # (compress(raw, cfg), decompress(body, raw length))
    "zstd": (
        lambda raw, cfg: zstandard_module().ZstdCompressor(level=cfg.zstd_level).compress(raw),
        lambda body, size: zstandard_module().ZstdDecompressor().stream_reader(body).read(size + 1),
    ),
    "zlib": (lambda raw, cfg: zlib.compress(raw, 9), lambda b, n: zlib.decompressobj().decompress(b, n + 1)),
}


def quantise_rows(weight: Tensor, floor: float, levels=127, clip="official") -> tuple[Tensor, Tensor]:
    """Integers [r, c] in -levels..levels, as int8, float16 steps [r] >= floor: weight = integer * step."""
    least = max(floor, 2.0**-24)  # the least positive float16
    steps = (torch.from_numpy(CLIPS[clip](weight.abs().numpy())) / levels).clamp_min(least).half()
    stored = steps.float()[..., None]  # [n, r, 1]; a step beyond float16 is inf, its error nan
    errors = [((weight / s).round().clamp(-levels, levels) * s - weight).square().sum(dim=1) for s in stored]
    step = steps.gather(0, torch.stack(errors).nan_to_num(torch.inf).argmin(dim=0, keepdim=True))[0]
    return (weight / step.float()[:, None]).round().clamp(-levels, levels).to(torch.int8), step


def weight_group(name: str) -> str:
    """The kind of tensor, for its number of levels and the size report."""
    marks = dict(tok_emb="embed", value_embeds="embed", lm_head="embed", mlp="mlp", attn="attention")
    return next((marks[part] for part in name.split(".") if part in marks), "control")


def levels_of(cfg: Config, name: str) -> int:
    """The largest integer of a tensor."""
    own = dict(mlp=cfg.mlp_quant_levels, embed=cfg.embed_quant_levels)
    return own.get(weight_group(name)) or cfg.quant_levels


def quant_name(cfg: Config) -> str:
    """int8, or the levels of attention, MLP and embeddings: 16 levels up and down are no int5."""
    levels = [levels_of(cfg, name) for name in ("attn", "mlp", "tok_emb")]
    return "int8" if set(levels) == {127} else "q" + "-".join(map(str, levels))


def plane_kinds(cfg: Config, name: str, shape: tuple[int, ...]) -> list[str]:
    """Control tensors stay float32, matrices of over 65,536 values (official) become rows, others float16."""
    if any(part in name for part in cfg.int8_keep_float_fp32_name_patterns):
        return ["fp32"]
    return ["int8", "step"] if len(shape) == 2 and math.prod(shape) > 65_536 else ["fp16"]


def pack(cfg: Config, state: Mapping[str, Tensor], about: Mapping[str, object]) -> bytes:
    """The artifact: a checked prefix and a body. Same input, same bytes. RunError (5): inf or nan in it."""
    table = [[name, list(t.shape), plane_kinds(cfg, name, t.shape)] for name, t in sorted(state.items())]
    planes: dict[str, list[bytes]] = {kind: [] for kind in PLANES}  # one kind together compresses better
    for name, _, kinds in table:
        weight = state[name].detach().float().cpu().contiguous()
        arrays = (weight.half() if "fp16" in kinds else weight,)
        if "int8" in kinds:
            arrays = quantise_rows(weight, cfg.quant_scale_floor, levels_of(cfg, name), cfg.quant_clip)
        if not all(torch.isfinite(array).all() for array in (weight, *arrays)):
            raise RunError(f"diverged: {name} is not finite, or too large for the artifact", DIVERGED)
        for kind, array in zip(kinds, arrays, strict=True):
            planes[kind].append(array.numpy().astype(PLANES[kind]).tobytes())
    header = dict(about, codec=cfg.codec, model=cfg.shape(), tensors=table)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    raw = struct.pack("<I", len(text)) + text + b"".join(itertools.chain(*planes.values()))
    return sealed(cfg.codec.encode(), len(raw), CODECS[cfg.codec][0](raw, cfg))


def sealed(codec: bytes, raw_length: int, body: bytes) -> bytes:
    """The body behind its prefix, whose checksum covers both."""
    unchecked = PREFIX.pack(MAGIC, FORMAT_VERSION, codec, bytes(8), raw_length, len(body))
    check = hashlib.sha256(unchecked + body).digest()[:8]
    return PREFIX.pack(MAGIC, FORMAT_VERSION, codec, check, raw_length, len(body)) + body


def unpack(blob: bytes, source: str) -> tuple[dict[str, Tensor], dict]:
    """(float32 state dict, header) of an artifact; RunError on anything damaged. Nothing is executed."""
    require(len(blob) >= PREFIX.size and blob[:6] == MAGIC, f"{source} is not an artifact of this script")
    _, version, codec, _, raw_length, _ = PREFIX.unpack_from(blob)
    require(version == FORMAT_VERSION, f"{source} has format version {version}; this reads {FORMAT_VERSION}")
    require(codec.decode("latin1") in CODECS, f"{source} is packed with an unknown codec {codec!r}")
    body = blob[PREFIX.size :]
    whole = sealed(codec, raw_length, body) == blob and raw_length <= RAW_LIMIT
    require(whole, f"{source} is damaged: its checksum or length is wrong; copy it again")
    try:
        raw = CODECS[codec.decode()][1](body, raw_length)
        require(len(raw) == raw_length, "another length than it says")
        at = 4 + struct.unpack_from("<I", raw)[0]
        require(at < 2**22, "a longer header than any")  # 100 bytes a tensor
        header, state = json.loads(raw[4:at]), {}
        table = header["tensors"]
        shaped = all(len(s) < 9 and all(type(n) is int and n >= 0 for n in s) for _, s, _ in table)
        require(shaped, "a shape that is none")
        for kind, code in PLANES.items():
            for name, shape, _ in (row for row in table if kind in row[2]):
                shape = [shape[0], 1] if kind == "step" else shape
                values = np.frombuffer(raw, code, math.prod(shape), at)
                plane = torch.from_numpy(values.astype(np.float32).reshape(shape))
                state[name], at = state[name].mul_(plane) if kind == "step" else plane, at + values.nbytes
        require(at == len(raw), "planes that do not fill it")
        return {name: state[name] for name, *_ in table}, header
    except Exception as error:  # a forged body: whatever breaks, the file is to blame
        raise RunError(f"{source} cannot be unpacked ({type(error).__name__}: {error})") from None


def zstandard_module():
    """RunError if it is missing: a silent fall-back to zlib put 30 of 59 published runs over the limit."""
    try:
        import zstandard
    except ImportError:
        raise RunError("CODEC=zstd needs zstandard: pip install zstandard, or set CODEC=zlib") from None
    return zstandard


def payload_bytes(cfg: Config, state: Mapping[str, Tensor]) -> int:
    """Bytes of the planes before compression, from shapes alone."""
    planes = [(kind, t) for name, t in state.items() for kind in plane_kinds(cfg, name, t.shape)]
    return sum(np.dtype(PLANES[k]).itemsize * (len(t) if k == "step" else t.numel()) for k, t in planes)


def predict_size(cfg: Config, model: GPT) -> int:
    """Expected bytes of the trained, packed model; fewer levels take log2 of them less, as PR #1453's did."""
    state = model.state_dict()
    coded = [(n, t.numel()) for n, t in state.items() if "int8" in plane_kinds(cfg, n, t.shape)]
    fewer = sum(count * math.log(127 / levels_of(cfg, name), 256) for name, count in coded)
    return int(TRAINED_RATIO * payload_bytes(cfg, state) - fewer)


# 9. SCORE: nats of every validation token, once, divided by the bytes of its text
# Most tokens a pass through the model: what fits a CPU's cache, and what fills a GPU.
CPU_PASS_TOKENS = 16_384
GPU_PASS_TOKENS = 65_536


@dataclass(frozen=True)
class Score:
    """What a model needs for the validation text, or for a part of it. Checkpoints store the fields."""

    nats: float  # of all scored targets, on all ranks
    tokens: int
    bytes: int
    seconds: float
    target_nats: Tensor | None = None  # [targets]: of what this rank scored, 0 elsewhere
    unscored: int = 0  # targets that the clock left without a score: then this is a partial one

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of the text. This is the only place where nats become bits."""
        return self.nats / math.log(2) / self.bytes

    @property
    def text(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f}"


# The plan: which windows are scored in which turn, on which rank.


class Window(NamedTuple):
    """Tokens start .. stop-1, which the model reads at once to score the targets first .. stop-1."""

    start: int
    first: int
    stop: int


class Chunk(NamedTuple):
    """Targets first .. stop-1, which all have their scores and may now be learnt from."""

    first: int
    stop: int
    ends_text: bool  # the document, or all text, ends with it, so that nothing can profit from it


@dataclass(frozen=True)
class ScoreTurn:
    """What a rank does in one turn: score these windows, then learn with all ranks from the chunk, if any."""

    windows: list[Window]
    chunk: Chunk | None = None


class PassShape(NamedTuple):
    """The shape of every pass of one score; with one shape, one graph is compiled."""

    batch: int  # windows
    length: int  # tokens that each window reads
    width: int  # targets that each window scores, the last ones of what it reads


def pass_shape(cfg: Config, device: torch.device, stride: int, learns: bool = False) -> PassShape:
    """Choose the shape of a pass, the same at any world size. stride 0 stands for the official windows; a
    score that learns takes no more windows at once than a chunk of TTT_CHUNK_TOKENS holds."""
    if stride:
        batch = cfg.eval_batch_seqs
        length = cfg.eval_length
        width = stride
    else:
        device_tokens = CPU_PASS_TOKENS if device.type == "cpu" else GPU_PASS_TOKENS
        batch = min(cfg.val_batch_size // 8, device_tokens) // cfg.train_seq_len
        length = cfg.train_seq_len
        width = cfg.train_seq_len
    if learns:
        batch = min(batch, cfg.ttt_chunk_tokens // width)
    return PassShape(max(1, batch), length, width)


def plan_windows(targets: int, length: int, stride: int, begin: int = 0) -> list[Window]:
    """Cut the targets begin .. targets-1 into windows that score each of them once.

    A window scores `stride` targets, the last of its at most `length` tokens, and reads no token before
    `begin`. With stride = length they are the official windows and their tail.
    """
    planned = []
    for first in range(begin, targets, stride):
        start = max(begin, first + stride - length)
        stop = min(first + stride, targets)
        planned.append(Window(start, first, stop))
    return planned


def share_windows(windows: list[Window], runtime: Runtime, batch: int) -> list[ScoreTurn]:
    """Give this rank its contiguous share of the windows, at most `batch` a turn. Every rank has as many
    turns as the busiest one, so that all meet at the end of each; its last ones may have no window."""
    rank_windows = [windows[i] for i in runtime.share(len(windows))]
    busiest = -(-len(windows) // runtime.world_size)
    return [ScoreTurn(rank_windows[at : at + batch]) for at in range(0, busiest, batch)]


def plan_turns(cfg: Config, data: Validation, runtime: Runtime, stride: int, learns: bool) -> list[ScoreTurn]:
    """Plan all turns of a score on this rank; every rank has as many.

    A score that learns takes the text chunk by chunk, and the last turn of each chunk names it; with
    TTT_RESET no chunk and no window crosses the border between two documents.
    """
    shape = pass_shape(cfg, runtime.device, stride, learns)
    borders = data.starts.tolist() if learns and cfg.ttt_reset else []
    planned = []
    for begin, end in itertools.pairwise([0, *borders, data.targets]):
        windows = plan_windows(end, shape.length, shape.width, begin)
        chunk_size = max(1, cfg.ttt_chunk_tokens // shape.width) if learns else len(windows)
        for at in range(0, len(windows), chunk_size):
            chunk_windows = windows[at : at + chunk_size]
            turns = share_windows(chunk_windows, runtime, shape.batch)
            if learns:
                stop = chunk_windows[-1].stop
                chunk = Chunk(chunk_windows[0].first, stop, ends_text=stop == end)
                turns[-1] = replace(turns[-1], chunk=chunk)
            planned += turns
    return planned


# The pass: windows -> nats.


class PaddedWindows(NamedTuple):
    """Windows as tensors of one PassShape."""

    ids: Tensor  # [batch, length] int64: the tokens that are read
    targets: Tensor  # [batch, width] int64
    positions: Tensor  # [batch, width] int64: each target's place in its row of ids
    is_scored: Tensor  # [batch, width] bool: false where there is only padding


def pad_windows(
    data: Validation, windows: list[Window], shape: PassShape, device: torch.device
) -> PaddedWindows:
    """Fill windows into tensors of the shape, at most shape.batch of them. All padding is on the right,
    where causal attention lets no scored position see it."""
    ids = np.zeros((shape.batch, shape.length), np.int64)
    targets = np.zeros((shape.batch, shape.width), np.int64)
    positions = np.zeros((shape.batch, shape.width), np.int64)
    is_scored = np.zeros((shape.batch, shape.width), np.bool_)
    for row, window in enumerate(windows):
        count = window.stop - window.first
        ids[row, : window.stop - window.start] = data.tokens[window.start : window.stop]
        targets[row, :count] = data.tokens[window.first + 1 : window.stop + 1]
        positions[row] = window.first - window.start + np.arange(shape.width)
        is_scored[row, :count] = True
    arrays = (ids, targets, positions, is_scored)
    return PaddedWindows(*[torch.from_numpy(array).to(device) for array in arrays])


@torch.no_grad()
def score_windows(nats_of: Callable[..., Tensor], padded: PaddedWindows, slides: bool) -> Tensor:
    """Nats of the windows' targets, float64 [scored], on the CPU, in the order of the text."""
    if slides:
        nats = nats_of(padded.ids, padded.targets, padded.positions)
    else:
        # The official windows score all that they read: the model needs no positions.
        nats = nats_of(padded.ids, padded.targets)
    return nats[padded.is_scored].cpu().double()


def evaluate(
    cfg: Config,
    nats_of: Callable[..., Tensor],
    data: Validation,
    runtime: Runtime,
    stride: int = 0,
    limit: float = math.inf,
    announce: Callable[[float], None] | None = None,
    learn: Callable[[Chunk], None] | None = None,
) -> Score:
    """Score the validation text, its windows shared out over the ranks; all ranks call it together.

    nats_of: gives the nats of targets, as token_nats does.
    stride: 0 for the official windows, else sliding ones move on by so many targets.
    limit: seconds by rank 0's clock. No turn starts that would pass them: then the score is a partial one.
    announce(seconds): is told early how long all turns will take, if there is a limit.
    learn(chunk): is called when all targets of a chunk have their scores.
    Raises RunError (5) if the nats are not finite.
    """
    began = time.perf_counter()
    learns = learn is not None
    shape = pass_shape(cfg, runtime.device, stride, learns)
    turns = plan_turns(cfg, data, runtime, stride, learns)
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens and bytes that this rank has scored
    target_nats = torch.zeros(data.targets)
    is_cut = False
    for done, turn in enumerate(turns):
        if limit < math.inf:
            spent = runtime.main_number(time.perf_counter() - began)
            if announce and done == max(3, len(turns) // 8):
                announce(spent / done * len(turns))
            # The first turn always runs: of nothing there is no partial score.
            is_cut = done > 0 and spent * (done + 1) / done > limit
            if is_cut:
                break
        if turn.windows:
            padded = pad_windows(data, turn.windows, shape, runtime.device)
            nats = score_windows(nats_of, padded, stride > 0)
            scored = slice(turn.windows[0].first, turn.windows[-1].stop)
            scored_bytes = int(data.target_bytes[scored].sum(dtype=np.int64))
            target_nats[scored] = nats.float()
            totals += torch.tensor((nats.sum().item(), len(nats), scored_bytes), dtype=torch.float64)
        if turn.chunk:
            learn(turn.chunk)
    nats, tokens, size = runtime.sum(totals).tolist()
    if tokens != data.targets and not is_cut:
        raise RunError(f"a bug: {tokens:.0f} of {data.targets} targets have a score")
    if not math.isfinite(nats):
        raise RunError("diverged: validation loss is not finite; lower learning rates", DIVERGED)
    seconds = time.perf_counter() - began
    return Score(nats, int(tokens), int(size), seconds, target_nats, int(data.targets - tokens))


class TestTimeTraining:
    """Gradient steps on targets whose scores are final (score first: parameter-golf #461, #549).

    They move all weights W or, with TTT_LORA_RANK = r, only low-rank factors of the blocks' matrices, which
    become W + B A with A [r, in] and B [out, r] (LoRA, arXiv 2106.09685). The model computes with the sum
    written into W, so the factors' gradients follow from that of W: dA = B^T dW and dB = dW A^T.
    """

    def __init__(self, run: Run):
        self.run = run
        trains_all = not run.cfg.ttt_lora_rank
        weights = weights_of(run.cfg, run.model)
        self.params = [weight.param for weight in weights if trains_all or weight.role == "matrix"]
        self.packed_weights = [param.detach().clone() for param in self.params]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the packed weights, with new factors and a new optimiser."""
        cfg = self.run.cfg
        torch._foreach_copy_(self.params, self.packed_weights)
        self.factors = self.new_factors() if cfg.ttt_lora_rank else []  # (A, B) of each parameter, or none
        trained = list(itertools.chain.from_iterable(self.factors)) or self.params
        self.optimiser = TTT_OPTIMISERS[cfg.ttt_optimizer](trained, lr=cfg.ttt_lr)

    def new_factors(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each matrix: A random by SEED, B zero, so that their product is zero."""
        rank = self.run.cfg.ttt_lora_rank
        rng = torch.Generator().manual_seed(self.run.cfg.seed)
        factors = []
        for param in self.params:
            a = torch.randn(rank, param.size(1), generator=rng) / param.size(1) ** 0.5
            b = torch.zeros(len(param), rank, device=param.device)
            factors.append((a.to(param.device), b))
        return factors

    def learn(self, chunk: Chunk) -> None:
        """Take TTT_STEPS steps on the mean nats of the chunk's targets, or reset where its text ends. All
        ranks call it together, each with its share of the chunk's windows."""
        if chunk.ends_text:
            self.reset()
            return
        cfg = self.run.cfg
        # Steps are taken on the windows that training has, which do not overlap, however it is scored.
        windows = plan_windows(chunk.stop, cfg.train_seq_len, cfg.train_seq_len, chunk.first)
        rank_windows = [windows[i] for i in self.run.runtime.share(len(windows))]
        for _ in range(cfg.ttt_steps):
            self.fill_gradients(rank_windows, chunk.stop - chunk.first)
            if self.factors:
                self.fill_factor_gradients()
            self.optimiser.step()
            if self.factors:
                self.write_products()

    def fill_gradients(self, rank_windows: list[Window], chunk_targets: int) -> None:
        """Set each parameter's gradient to that of the chunk's mean nats, summed over the ranks."""
        run = self.run
        depth = phases(run.cfg)[-1][1]
        shape = pass_shape(run.cfg, run.runtime.device, 0, learns=True)
        for param in self.params:
            param.grad = torch.zeros_like(param)
        for at in range(0, len(rank_windows), shape.batch):
            padded = pad_windows(run.data, rank_windows[at : at + shape.batch], shape, run.runtime.device)
            nats = run.nats(padded.ids, padded.targets, depth=depth)
            loss = (nats * padded.is_scored).sum().div(chunk_targets)
            loss.backward()
        for param in self.params:
            run.runtime.sum(param.grad)

    def fill_factor_gradients(self) -> None:
        """dA = B^T dW, dB = dW A^T."""
        for param, (a, b) in zip(self.params, self.factors, strict=True):
            a.grad = b.mT @ param.grad
            b.grad = param.grad @ a.mT

    def write_products(self) -> None:
        """Put W + B A into the model."""
        for param, packed, (a, b) in zip(self.params, self.packed_weights, self.factors, strict=True):
            param.data.copy_(packed + b @ a)


# The Hedge mixer.

EXPERT_SHARES = (
    0.0,
    0.05,
    0.15,
    0.4,
    0.7,
    0.95,
)  # of the n-gram in the fixed experts; the first is neural alone
NEURAL_LOG_PRIOR = 2.0  # the neural expert starts with e^2 times the weight of any other (PR #895)
DISCOUNT = 0.6  # taken off each n-gram count; best on English, 0.5 on code (experiment_log.md)
SAMPLE_TARGETS = 100_000  # mixed first, to foretell how long all take
# Counts are kept as bytes: round(11.5 ln(1 + count)) is 8 for one, and 255 for 2^32.
COUNT_CODE_SCALE = 11.5
CODE_OF_ONE = 8
# The gate: a network with so many hidden units, that reads how the n-gram did over so many last tokens, and
# learns from blocks that grow from the first size to the last.
GATE_HIDDEN = 32
GATE_SPANS = (16, 256)
GATE_FIRST_BLOCK = 32
GATE_LAST_BLOCK = 4096


# Exact counts and sums.


class Groups(NamedTuple):
    """Where equal keys stand among M sorted ones; G groups of equals."""

    numbers: Tensor  # [M] int64: the number of each key's group, from 0
    sizes: Tensor  # [G] int64
    begins: Tensor  # [M] int64: where each key's group begins


def group_equal(sorted_keys: Tensor) -> Groups:
    """Find the groups of equals among sorted keys [M]."""
    _, numbers, sizes = torch.unique_consecutive(sorted_keys, return_inverse=True, return_counts=True)
    return Groups(numbers, sizes, begins=(sizes.cumsum(0) - sizes)[numbers])


def scatter(index: Tensor, values: Tensor) -> Tensor:
    """Undo a sort: the result has result[index] = values, for a permutation `index` [N]."""
    return torch.empty_like(values).index_copy_(0, index, values)


def exact_prefix_sums(x: Tensor) -> tuple[Tensor, float]:
    """Sums of the first 0 .. N of x [N], as int64 [N + 1], and the scale by which they are too large.

    The values are cut to +-128 and rounded to integers, whose sums are exact whatever their order; the scale
    is a power of two, small enough that no sum overflows.
    """
    scale = 2.0 ** (54 - len(x).bit_length())
    sums = (x.double().clamp(-128, 128) * scale).round().long()
    sums = sums.cumsum(0)
    return F.pad(sums, (1, 0)), scale


class ContextCounts(NamedTuple):
    """What is counted before each of M positions, whose contexts are the `order` tokens in front of them."""

    order: int
    positions: Tensor  # [M] int64: all positions whose context can recur, and perhaps more
    uses: Tensor  # [M] int64: how often the context came earlier
    followers: Tensor  # [M] int64: how many distinct tokens followed it then
    matches: Tensor  # [M] int64: how often the token at the position did


def context_counts(tokens: Tensor, vocab: int, highest_order: int) -> Iterator[ContextCounts]:
    """Yield the exact counts for contexts of 0 .. highest_order tokens, by one stable sort an order.

    A gram is a context and the token that follows it. A stable sort brings equal grams together in the order
    of the text, so that a gram's rank among its equals is the number of earlier ones. A gram that ends at
    position i is the context of position i + 1 in the next order; if it stands there once only, that context
    cannot recur, and the position is dropped.
    tokens: int64 [T], below `vocab`.
    """
    positions = torch.arange(len(tokens), device=tokens.device)
    uses = positions
    context_numbers = torch.zeros_like(positions)
    # Row r of the lists sorted by context, then by position, is row by_context[r] of the lists above; its
    # context begins at row context_begins[r].
    by_context = positions
    context_begins = context_numbers
    for order in range(highest_order + 1):
        keys = context_numbers * vocab + tokens[positions]  # below 2^43: 100 M contexts x 65,536 tokens
        keys, by_gram = torch.sort(keys, stable=True)
        grams = group_equal(keys)
        del keys
        matches = scatter(by_gram, torch.arange(len(by_gram), device=tokens.device) - grams.begins)
        followers = distinct_followers(matches, by_context, context_begins)
        yield ContextCounts(order, positions, uses, followers, matches)
        del followers
        # The next order's lists: the position after each gram that stands more than once.
        recurs = scatter(by_gram, (grams.sizes > 1)[grams.numbers]) & (positions + 1 < len(tokens))
        rows = recurs.nonzero()[:, 0]
        positions = positions[rows] + 1
        uses = matches[rows]
        context_numbers = scatter(by_gram, grams.numbers)[rows]
        # The sort by gram is a sort by the next order's contexts: only the dropped rows have to go.
        new_rows = recurs.cumsum(0) - 1
        rows = recurs[by_gram].nonzero()[:, 0]
        by_context = new_rows[by_gram[rows]]
        context_begins = group_equal(grams.numbers[rows]).begins
        del by_gram, grams, matches, recurs, rows, new_rows


def distinct_followers(matches: Tensor, by_context: Tensor, context_begins: Tensor) -> Tensor:
    """How many distinct tokens followed each position's context before it, int64 [M]: among its context's
    earlier positions, those whose token was the first of its kind there."""
    is_new = (matches == 0)[by_context].long()
    earlier_new = is_new.cumsum(0) - is_new
    return scatter(by_context, earlier_new - earlier_new[context_begins])


# The n-gram model.


def ngram_probabilities(tokens: Tensor, vocab: int, highest_order: int) -> tuple[Tensor, Tensor]:
    """Predict each of tokens[1:] by counts of what stands before it.

    Returns the probabilities, float64 [N], and codes of the counts of its contexts, uint8 [2, orders, N]: how
    often each was used, and by how many distinct tokens it was followed.
    Interpolated absolute discounting, as in Kneser-Ney smoothing, but with plain counts in all orders:
    P_k(w) = (max(n(w) - D, 0) + D t P_(k-1)(w)) / n for n uses of the context of k tokens, n(w) of them
    followed by w, t distinct followers. It is P_(k-1) where n = 0, and 1 / vocab below order 0.
    """
    probabilities = torch.full((len(tokens),), 1 / vocab, dtype=torch.float64, device=tokens.device)
    codes = torch.zeros(2, highest_order + 1, len(tokens), dtype=torch.uint8, device=tokens.device)
    for counts in context_counts(tokens, vocab, highest_order):
        # In pieces of 4 M, or the terms of the formula would take more than the counts do.
        for rows in counts.uses.nonzero()[:, 0].split(2**22):
            positions = counts.positions[rows]
            uses = counts.uses[rows]
            followers = counts.followers[rows]
            discounted = (counts.matches[rows].double() - DISCOUNT).clamp_min_(0)
            backed_off = DISCOUNT * followers.double() * probabilities[positions]
            probabilities[positions] = (discounted + backed_off) / uses
            codes[:, counts.order, positions] = count_codes(torch.stack((uses, followers)))
        # Before the next order is counted.
        del counts, rows, positions, uses, followers, discounted, backed_off
    return probabilities[1:], codes[..., 1:]


def count_codes(counts: Tensor) -> Tensor:
    """Write counts as uint8 by their logarithm, so that small ones keep their value."""
    return counts.double().log1p().mul(COUNT_CODE_SCALE).round().to(torch.uint8)


def context_bins(codes: Tensor) -> Tensor:
    """Number the kind of each token's context, int64 [N]: the longest one that was seen before, how often it
    was, and by how many distinct tokens it was followed, these two in steps of a factor 2."""
    longest = (codes[0] > 0).sum(0, keepdim=True).sub_(1).clamp_min_(0)  # [1, N]; no longer one was seen
    uses = codes[0].gather(0, longest)[0].long() // CODE_OF_ONE
    followers = codes[1].gather(0, longest)[0].long() // CODE_OF_ONE
    return (longest[0] * 11 + uses.clamp(max=10)) * 7 + followers.clamp(max=6)


# The gate: a share of the n-gram for each token, learnt on the way.


class ShareGate:
    """A network from F facts of each token to the logit of the n-gram's share: 32 hidden units beside a
    direct linear part. It starts at the share sigmoid(-2) = 0.12 for all."""

    def __init__(self, facts: int, device: torch.device):
        rng = torch.Generator().manual_seed(0)  # the same gate in every run
        initial = [
            torch.randn(GATE_HIDDEN, facts, generator=rng) / facts**0.5,
            torch.zeros(GATE_HIDDEN),
            torch.zeros(1, GATE_HIDDEN),
            torch.full((1,), -2.0),
            torch.zeros(1, facts),
        ]
        self.parameters = [tensor.to(device).requires_grad_() for tensor in initial]

    def logits(self, facts: Tensor) -> Tensor:
        """[n, F] -> [n]."""
        hidden_weight, hidden_bias, output_weight, output_bias, direct_weight = self.parameters
        hidden = F.linear(facts, hidden_weight, hidden_bias).relu()
        return (F.linear(hidden, output_weight, output_bias) + F.linear(facts, direct_weight))[:, 0]


def gate_shares(odds: Tensor, codes: Tensor) -> Tensor:
    """The n-gram's share in the gate's mixture, float32 [N], from what is known before each token.

    The gate learns from each block once that has its shares, by one step of Adam.
    odds: log P(n-gram) - log P(neural) of each token, float32 [N]. codes: as ngram_probabilities gives them.
    """
    recent = recent_odds(odds)
    gate = ShareGate(4 * codes.size(1) + len(GATE_SPANS), odds.device)
    optimiser = torch.optim.Adam(gate.parameters, lr=0.02, betas=(0.9, 0.99))
    shares = torch.empty_like(odds)
    begin = 0
    size = GATE_FIRST_BLOCK
    while begin < len(odds):
        block = slice(begin, begin + size)
        logits = gate.logits(gate_facts(codes[..., block], recent[:, block]))
        shares[block] = logits.detach().sigmoid()
        optimiser.zero_grad()
        # The mixture's nats, less the neural model's, which the gate does not change.
        loss = -torch.logaddexp(F.logsigmoid(-logits), F.logsigmoid(logits) + odds[block]).mean()
        loss.backward()
        optimiser.step()
        begin += size
        size = min(GATE_LAST_BLOCK, 2 * size)
    return shares


def recent_odds(odds: Tensor) -> Tensor:
    """Mean of the odds, cut to +-5, over the last tokens before each, float32 [spans, N]."""
    sums, scale = exact_prefix_sums(odds.clamp(-5, 5))
    ends = torch.arange(len(odds), device=odds.device)
    means = []
    for span in GATE_SPANS:
        means.append((sums[:-1] - sums[(ends - span).clamp(0)]) / scale / ends.clamp(1, span))
    return torch.stack(means)


def gate_facts(codes: Tensor, recent: Tensor) -> Tensor:
    """What the gate reads of each token, float32 [n, F]: of each order the two codes, whether the context had
    one follower only, and whether it is the longest one that was seen; and the recent odds."""
    uses, followers = codes
    was_seen = uses > 0
    is_longest = was_seen & ~F.pad(was_seen[1:], (0, 0, 0, 1))
    return torch.cat((uses / 32, followers / 32, followers == CODE_OF_ONE, is_longest, recent)).T


# Hedge.


@dataclass(frozen=True)
class Expert:
    """A mixture that Hedge weighs: (1 - share) neural + share n-gram."""

    name: float | str  # in the logs: its share, or "gate"
    share: float | Tensor  # of the n-gram; of each token [N] if they differ
    log_prior: float = 0.0  # log of its weight before it has seen a token


@dataclass(frozen=True)
class WeighedExpert:
    """How an expert fared."""

    name: float | str
    log_likelihood: float  # nats, of all tokens
    weight: float  # after the last token, a mean over all bins


@dataclass(frozen=True)
class Mixture:
    """What Hedge made of its experts."""

    log_probs: Tensor  # [N] float64
    experts: list[WeighedExpert]


def fixed_experts(shares: tuple[float, ...]) -> list[Expert]:
    """The experts whose share is the same for all tokens."""
    experts = []
    for share in shares:
        log_prior = 0.0 if share else NEURAL_LOG_PRIOR
        experts.append(Expert(share, share, log_prior))
    return experts


class BinHistory(NamedTuple):
    """The N tokens sorted by bin, in each of G bins by their order in the text; ranks are places there."""

    order: Tensor  # [N]: the token at each rank
    since: Tensor  # [N]: the first rank that counts for the token at a rank; the last is the one before it
    stops: Tensor  # [G]: one past each bin's last rank
    final_since: Tensor  # [G]: the first rank that counts for the bin's final weights
    sizes: Tensor  # [G]


def sort_by_bin(bins: Tensor, window: int) -> BinHistory:
    """Find what counts for each token: the last `window` ones of its bin, or all of them if that is 0."""
    window = window or len(bins)
    sorted_bins, order = torch.sort(bins, stable=True)
    groups = group_equal(sorted_bins)
    ranks = torch.arange(len(bins), device=bins.device)
    stops = groups.sizes.cumsum(0)
    final_since = stops - groups.sizes.clamp_max(window)
    return BinHistory(order, groups.begins.maximum(ranks - window), stops, final_since, groups.sizes)


def hedge_mixture(
    neural: Tensor, ngram: Tensor, experts: list[Expert], bins: Tensor, eta: float, window: int
) -> Mixture:
    """Mix the experts by Hedge (Freund and Schapire 1997), each bin of tokens for itself.

    An expert's weight at a token is exp(log_prior + eta * its log-likelihood on the earlier tokens of the
    bin, the last `window` ones or all if that is 0), over the sum of all weights.
    neural, ngram: probabilities of the tokens, float64 [N]; bins: int64 [N].
    """
    history = sort_by_bin(bins, window)
    log_mixed = torch.full_like(neural, -torch.inf)
    log_norm = log_mixed
    final_log_weights = []
    log_likelihoods = []
    # Only exact steps go by the order of the bins: the last bit of a log would depend on its rank there, and
    # with that on later tokens.
    for expert in experts:
        logs = torch.log(neural + expert.share * (ngram - neural))
        sums, scale = exact_prefix_sums(logs[history.order])
        log_weight = (
            expert.log_prior + eta / scale * scatter(history.order, sums[:-1] - sums[history.since]).double()
        )
        log_mixed = torch.logaddexp(log_mixed, log_weight + logs)
        log_norm = torch.logaddexp(log_norm, log_weight)
        final_sums = sums[history.stops] - sums[history.final_since]
        final_log_weights.append(expert.log_prior + eta / scale * final_sums.double())
        log_likelihoods.append(logs.sum().item())
    weights = torch.stack(final_log_weights).softmax(0) * (history.sizes.double() / len(bins))
    weighed = []
    for expert, total, weight in zip(experts, log_likelihoods, weights.sum(1).tolist(), strict=True):
        weighed.append(WeighedExpert(expert.name, total, weight))
    return Mixture(log_mixed - log_norm, weighed)


def mix_with_ngrams(cfg: Config, tokens: Tensor, nats: Tensor) -> Mixture:
    """Mix a neural score, nats float64 [N] of tokens[1:], with exact n-grams of the tokens so far."""
    ngram, codes = ngram_probabilities(tokens, cfg.vocab_size, cfg.hedge_order)
    shares = gate_shares((ngram.log() + nats).float(), codes)
    bins = context_bins(codes)
    del codes
    experts = [*fixed_experts(EXPERT_SHARES), Expert("gate", shares)]
    return hedge_mixture((-nats).exp(), ngram, experts, bins, cfg.hedge_eta, cfg.hedge_window)


# The scorers of a run, each by (run, the score before it or None, seconds that are left, announce).
# announce(seconds) says how long the score will take, as soon as that is known.

Scorer = Callable[..., Score]


def score_roundtrip(
    run: Run, previous: Score | None, limit: float, announce: Callable[[float], None]
) -> Score:
    """Score the packed weights by the official windows."""
    return run.score(0, limit, announce)


def score_sliding(run: Run, previous: Score | None, limit: float, announce: Callable[[float], None]) -> Score:
    """Score by windows that slide by EVAL_STRIDE."""
    return run.score(run.cfg.eval_stride, limit, announce)


def score_ttt(run: Run, previous: Score | None, limit: float, announce: Callable[[float], None]) -> Score:
    """Score by the same windows, or the official ones without a stride, and learn from each chunk after it is
    scored. The weights are the packed ones again in the end."""
    return run.score(run.cfg.eval_stride, limit, announce, TestTimeTraining(run).learn)


def score_hedge(run: Run, previous: Score, limit: float, announce: Callable[[float], None]) -> Score:
    """Mix the previous score, which has the nats of all targets, with n-grams. Rank 0 does it alone."""
    began = time.perf_counter()
    target_nats = previous.target_nats.double()
    mix = partial(overwrite_with_mixture, run, target_nats, limit, announce, began)
    # The other ranks receive the sums only: half a GB of nats for 62 M targets is of no use to them.
    score = run.runtime.main_decides(mix)
    return replace(score, target_nats=target_nats)


def overwrite_with_mixture(
    run: Run, target_nats: Tensor, limit: float, announce: Callable[[float], None], began: float
) -> Score:
    """Replace the neural nats of each target, float64 [targets], by the mixture's, in place to save memory.

    Where all targets would take longer than `limit` seconds after `began`, only the first ones are mixed.
    Returns the score without its nats.
    """
    data = run.data
    device = run.runtime.device if run.runtime.is_cuda else torch.device("cpu")
    tokens = torch.from_numpy(data.tokens.astype(np.int64)).to(device)
    neural_nats = target_nats.to(device)
    count = data.targets
    if limit < math.inf and data.targets > SAMPLE_TARGETS:
        mix_with_ngrams(run.cfg, tokens[: SAMPLE_TARGETS + 1], neural_nats[:SAMPLE_TARGETS])
        seconds = (time.perf_counter() - began) * data.targets / SAMPLE_TARGETS
        announce(seconds)
        if seconds > limit:
            count = int(0.8 * data.targets * limit / seconds)
    mixture = mix_with_ngrams(run.cfg, tokens[: count + 1], neural_nats[:count])
    target_nats[:count] = -mixture.log_probs.cpu()
    size = int(data.target_bytes[:count].sum(dtype=np.int64))
    report_experts(run.log, mixture.experts, count, size)
    seconds = time.perf_counter() - began
    return Score(target_nats[:count].sum().item(), count, size, seconds, unscored=data.targets - count)


def report_experts(log: RunLog, experts: list[WeighedExpert], tokens: int, size: int) -> None:
    """Log what each expert would score alone on so many tokens and bytes, and its final weight."""
    scores = [Score(-expert.log_likelihood, tokens, size, 0.0) for expert in experts]
    for expert, score in zip(experts, scores, strict=True):
        saved = scores[0].bpb - score.bpb
        log.line(
            f"hedge_expert ngram_share:{expert.name} {score.text} "
            f"saved:{saved:.4f} weight:{expert.weight:.4f}"
        )
    log.event(
        "hedge",
        shares=[expert.name for expert in experts],
        val_bpb=[score.bpb for score in scores],
        weights=[expert.weight for expert in experts],
    )


def scorers(cfg: Config) -> Iterator[tuple[str, Scorer]]:
    """Yield name and function of each score that is switched on, in the order in which they are made."""
    yield "roundtrip", score_roundtrip
    if cfg.eval_stride:
        yield "sliding", score_sliding
    if cfg.ttt_steps:
        yield "ttt", score_ttt
    if cfg.use_hedge:
        yield "hedge", score_hedge


def score_all(run: Run) -> Iterator[tuple[str, Score]]:
    """Yield name and Score of each score that is switched on, all within MAX_EVAL_SECONDS: none after a
    partial one. What a checkpoint has kept from before is not made again."""
    seconds_left = run.cfg.max_eval_seconds or math.inf
    needs_all_targets = run.cfg.use_hedge or run.cfg.score_dump
    score = None
    for name, scorer in scorers(run.cfg):
        stored = run.checkpoints.scores.get(name)
        if stored:
            score = stored
        else:
            announce = partial(announce_duration, run.log, name, seconds_left)
            score = scorer(run, score, seconds_left, announce)
            # Each rank has the nats of its own windows; of the mixer rank 0 has them all.
            if needs_all_targets and name != "hedge":
                run.runtime.sum(score.target_nats)
        # By one clock, or the ranks would part.
        seconds_left -= run.runtime.main_number(score.seconds)
        yield name, score
        if score.unscored:
            return


def announce_duration(log: RunLog, name: str, seconds_left: float, seconds: float) -> None:
    log.line(f"{name}: takes about {seconds:.0f} s, {seconds_left:.0f} s are left")


# 10. TRAIN
CHECKPOINT = "parameter golf checkpoint 1"
PARTS = {dict: "same model optimisers scores", list: "resumed total recent random", float: "scales seconds"}


@dataclass
class Run:  # what every phase of a run needs
    cfg: Config
    runtime: Runtime
    log: RunLog
    model: GPT
    data: Validation
    checkpoints: Checkpoints = field(default_factory=lambda: Checkpoints())

    def __post_init__(self) -> None:
        """The two functions that run the model, compiled if the runtime compiles."""
        self.loss = self.runtime.compile(training_loss(self.cfg, self.model))
        nats = partial(token_nats, self.model)
        self.nats = self.runtime.compile(lambda *given, depth=None: nats(*given, depth=depth))

    def settle(self, warm: Callable):
        """warm() compiled; if that fails (no C++ compiler, torch 2.5's bf16), eager unless COMPILE=1."""
        try:
            return warm()
        except Exception as error:
            known = isinstance(error, torch.OutOfMemoryError | RunError) or kernel_missing(error)
            if known or not self.runtime.compiles or self.cfg.compile == "1":
                raise
            self.log.warn(True, f"no torch.compile ({type(error).__name__}); running eagerly, slower")
            self.runtime.compiles = False
            self.__post_init__()
            return warm()

    def score(self, stride: int = 0, *how, depth: int | None = None) -> Score:
        """By official or sliding windows; at the last training depth, unless said. how: as `evaluate`'s."""
        nats = partial(self.nats, depth=depth or phases(self.cfg)[-1][1])
        return evaluate(self.cfg, nats, self.data, self.runtime, stride, *how)


def micro_batch_limit(cfg: Config, device: torch.device) -> int:
    """Most sequences a pass: 64 K tokens on a GPU, as officially; 4 K on a CPU, by benchmarks/NOTES.md."""
    tokens = cfg.micro_batch_tokens or (65_536 if device.type == "cuda" else 4_096)
    return max(1, tokens // cfg.train_seq_len)


def micro_batches(batch: tuple[Tensor, Tensor], limit: int) -> list[tuple[Tensor, Tensor]]:
    """Split a rank's sequences into the fewest near-equal parts of at most `limit`: at most two shapes."""
    count = -(-len(batch[0]) // limit)
    return list(zip(*(part.tensor_split(count) for part in batch), strict=True)) if count else []


def gradient(run: Run, optimisers: Optimisers, batch, plan: StepPlan, limit: int) -> Tensor:
    """Leave this rank's share of the gradient in the buffer; returns its share of the mean nats per token."""
    optimisers.flat.zero_()
    total, dials = torch.zeros((), device=run.runtime.device), plan.dials(run.runtime.device)
    for ids, targets in micro_batches(batch, limit):
        ids, targets = (part.to(dials.device, non_blocking=True) for part in (ids, targets))
        share = len(ids) / run.cfg.sequences
        objective, nats = run.loss(ids, targets, dials, plan.depth)
        (objective * share).backward()
        total += nats * share
    return total


def train_step(run: Run, optimisers: Optimisers, batch, plan: StepPlan, limit: int) -> Tensor:
    """One optimiser step; returns this rank's share of the mean nats per token."""
    nats = gradient(run, optimisers, batch, plan, limit)
    if run.cfg.sam_rho:
        with optimisers.uphill(run.cfg.sam_rho):
            gradient(run, optimisers, batch, plan, limit)
    optimisers.step(plan)
    return nats


def fit_micro_batch(run: Run, batch) -> int:
    """Sequences a pass that fit the device: halved on out-of-memory, by each rank. Leaves gradients."""
    device, plan, depth = run.runtime.device, plan_step(run.cfg, 0, 0.0, 0.0), phases(run.cfg)[-1][1]
    limit = min(micro_batch_limit(run.cfg, device), max(1, len(batch[0])))
    while True:
        try:
            for ids, targets in micro_batches(batch, limit)[:1]:
                run.loss(ids.to(device), targets.to(device), plan.dials(device), depth)[0].backward()
            return limit
        except torch.OutOfMemoryError:
            if limit == 1:
                raise
            limit //= 2
            torch.cuda.empty_cache()
            print(f"warning: out of memory, micro-batch is now {limit} sequences", file=sys.stderr)


def warm_up(run: Run, optimisers: Optimisers, stream: TokenStream) -> tuple[int, list[float]]:
    """Compile every graph, untimed, then undo it all. (micro-batch limit, seconds of a step in each phase)"""
    cfg, runtime, turns, seconds = run.cfg, run.runtime, phases(run.cfg), []
    run.settle(lambda: warm_evaluation(run))
    if not cfg.warmup_steps:
        return micro_batch_limit(cfg, runtime.device), [0.0] * len(turns)
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    states, random_state = optimisers.state(), torch.get_rng_state()  # empty as yet
    source, clock = batches(cfg, stream, runtime), Clock(runtime)
    limit = run.settle(lambda: fit_micro_batch(run, next(source)))
    for _, depth in turns:
        plan, last = replace(plan_step(cfg, 0, 0.0, 0.0), depth=depth), depth == turns[-1][1]
        for step in range(cfg.warmup_steps if last else 2):  # of a shallow depth the second is timed
            clock.start()
            train_step(run, optimisers, next(source), plan, limit)
            runtime.synchronize()
            taken = clock.seconds()
            if last:
                run.log.line(f"warmup_step:{step + 1}/{cfg.warmup_steps}")
        seconds.append(runtime.main_number(taken))
    run.model.load_state_dict(weights)
    optimisers.load(states)
    torch.set_rng_state(random_state)
    return limit, seconds


def warm_evaluation(run: Run) -> None:
    """Compile the evaluation graphs on blank tokens: each shape, and each depth that will be validated."""
    cfg, device, turns = run.cfg, run.runtime.device, [depth for _, depth in phases(run.cfg)]
    early = [(0, depth, False) for depth in turns[:-1] if cfg.val_loss_every]
    late = [(n, turns[-1], learns) for learns in (False, cfg.ttt_steps > 0) for n in (0, cfg.eval_stride)]
    for stride, depth, learns in dict.fromkeys([*late, *early]):
        batch, length, width = pass_shape(cfg, device, stride, learns)
        blank = [torch.zeros(batch, n, dtype=torch.int64, device=device) for n in (length, width, width)]
        with torch.no_grad():
            run.nats(*blank[: 3 if stride else 2], depth=depth)
        if learns and not stride:
            run.nats(*blank[:2], depth=depth).sum().backward()


def forecast(run: Run, stream: TokenStream, limit: int, step_seconds: list[float]) -> None:
    """Say before the clock starts what the run will reach, given the seconds of a step in each phase."""
    cfg, log, cap, last = run.cfg, run.log, run.cfg.max_wallclock_seconds, run.cfg.warmdown_iters
    size = predict_size(cfg, run.model) + len(own_source())
    paces = [max(1 / cfg.iterations, s / cap if cap else 0.0) for s in step_seconds]  # progress of a step
    counts = np.diff([0.0, *(min(until, 1.0) for until, _ in phases(cfg)[:-1]), 1.0]) / paces
    steps, seconds = counts.sum(), counts @ step_seconds
    epochs = steps * cfg.train_batch_tokens / len(stream)
    speed = "step_ms:" + ",".join(f"{1000 * s:.0f}" for s in step_seconds)
    batch = f"micro_batch_tokens:{limit * cfg.train_seq_len} epochs:{epochs:.2f}"
    log.line(f"forecast: steps:{steps:.0f} {speed} {batch} bytes:{size}")
    log.warn(size > SIZE_LIMIT, f"code and model may pass the limit of {SIZE_LIMIT} bytes")
    late = last > steps and cfg.schedule == "warmdown" and not cfg.warmdown_frac
    log.warn(late, f"WARMDOWN_ITERS={last} is longer than the run: LR starts at {steps / max(last, 1):.2f}")
    ends = f"ITERATIONS={cfg.iterations} ends the run after about {seconds:.0f} of {cap:.0f} s"
    log.warn(0 < seconds < 0.5 * cap, ends)
    log.warn(epochs > 1, f"{len(stream)} training tokens will be read {epochs:.1f} times; get more shards")


@dataclass
class Trained:  # how training ended
    score: Score | None = None  # of the live weights
    averaged: Score | None = None  # of their average, if that is what is packed
    step: int = 0
    seconds: float = 0.0
    progress: float = 0.0
    mean_lr_scale: float = 0.0
    late_graphs: int = 0  # compiled inside the clock, in spite of the warm-up
    truncated = property(lambda self: self.step > 0 and self.progress < 0.98)


@dataclass
class Checkpoints:  # OUT_DIR/checkpoints/RUN_ID-STEP.pt on rank 0's disk: the last two, until the RESULT
    folder: Path | None = None  # none: nothing is written
    about: dict[str, object] = field(default_factory=dict)  # kind, run_id, same, dtype, resumed
    before: dict | None = None  # the one this run goes on from
    kept: list[Path] = field(default_factory=list)  # whole ones, the newest last
    scores: dict[str, Score] = field(default_factory=dict)  # made since the training ended

    def __post_init__(self) -> None:
        if self.before:
            self.about["resumed"] = [*self.before["resumed"], self.before["step"]]
            self.kept.append(Path(self.before["path"]))
            self.scores = {name: Score(*values) for name, values in self.before["scores"].items()}

    def write(self, state: Mapping, log: RunLog) -> None:
        """Add a checkpoint, or warn that it cannot be written: the earlier ones stay, the run goes on."""
        path = self.folder / f"{self.about['run_id']}-{state['step']:08d}.pt"
        scores = {name: list(vars(score).values()) for name, score in self.scores.items()}
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomic(path, partial(torch.save, self.about | state | dict(scores=scores)))
            self.kept = [*(other for other in self.kept if other != path), path][-2:]
            for old in {*checkpoint_files(self.folder, self.about["run_id"])} - {*self.kept}:
                old.unlink()
        except OSError as error:
            log.warn(True, f"no checkpoint: {error.filename}: {error.strerror}")

    def add_score(self, name: str, score: Score, log: RunLog) -> None:
        """So that a score is not made twice; the state is that of the end of the training."""
        self.scores[name] = score
        if self.folder and self.kept and self.kept[-1].exists():
            self.write(read_checkpoint(self.kept[-1]), log)

    def clear(self) -> None:
        """The run is finished: its checkpoints go, and their folder unless others' are there."""
        for path in checkpoint_files(self.folder, self.about["run_id"]) if self.folder else ():
            path.unlink()
        with suppress(OSError, AttributeError):
            self.folder.rmdir()


def checkpoint_files(folder: Path, run_id: str = "") -> list[Path]:
    """Newest first, of the run named or else of the one that wrote the newest."""
    names = folder.glob(f"{run_id or '*'}-{'[0-9]' * 8}.pt")
    files = sorted(names, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    return files if run_id or not files else checkpoint_files(folder, files[0].stem[:-9])


def read_checkpoint(path: Path) -> dict:
    """The state in a whole one; RunError on any other file."""
    state = read_saved(path)
    own = isinstance(state, dict) and state.get("kind") == CHECKPOINT and state.get("dtype") in DTYPES
    own = own and isinstance(state.get("step"), int)
    own = own and all(isinstance(state.get(n), kind) for kind, names in PARTS.items() for n in names.split())
    require(own, f"{path} is no checkpoint of this version of the script")
    return state


def find_checkpoint(cfg: Config, same: Mapping[str, object]) -> dict | None:
    """The one RESUME asks for, if any, and its `path`: a damaged file is passed over for the one before.
    RunError if none is whole, or if it was made with another config, seed, data or script than `same`."""
    files = checkpoint_files(Path(cfg.out_dir) / "checkpoints", cfg.run_id)
    errors, paths = [], files if cfg.resume == "auto" else [Path(cfg.resume)] if cfg.resume != "0" else []
    for path in paths:
        try:
            state = read_checkpoint(path) | dict(path=str(path))
        except RunError as error:
            errors.append(str(error))
            continue
        if errors:
            print(f"warning: {'; '.join(errors)}; going on from {path}", file=sys.stderr)
        there = state["same"]
        names = [name for name in there | same if there.get(name) != same.get(name)]
        differ = "; ".join(f"{name}={there.get(name)} there, {same.get(name)} here" for name in names)
        require(not names, f"{path} was made with {differ}; set that back, or start anew with RESUME=0")
        return state
    require(not errors, f"RESUME={cfg.resume}: {'; '.join(errors)}; RESUME=0 starts anew")
    return None


class Training:  # all that changes from step to step, and with that what a checkpoint holds
    def __init__(self, run: Run, optimisers: Optimisers, step_seconds: float):
        self.run, self.optimisers, self.average = run, optimisers, Average(run.cfg, run.model)
        self.clock, self.step, self.scales, self.saved = Clock(run.runtime, step_seconds), 0, 0.0, 0.0
        self.sound = torch.zeros(3, dtype=torch.float64, device=run.runtime.device)  # as `check` reads it

    def stepped(self, plan: StepPlan, loss: Tensor) -> None:
        """Count a step. Nothing here waits for the device."""
        self.average.update(plan)
        new = torch.stack([part.double() for part in (self.sound[0] + 1, loss, self.optimisers.norm)])
        whole = (self.sound[0] == self.step) & self.optimisers.norm.isfinite()
        self.sound = torch.where(whole, new, self.sound)
        self.step, self.scales = self.step + 1, self.scales + plan.lr_scale
        self.run.checkpoints.scores.clear()  # if a disk was full they may stand beside earlier weights

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """RunError (5) if a weight, or a gradient so far, is not finite; no gradient is after such a loss."""
        steps, loss, norm = self.sound.tolist()
        bad = next((name for name, weight in weights.items() if not weight.isfinite().all()), "")
        if steps < self.step or bad:
            last = f"loss {self.run.runtime.sum(torch.tensor(loss)).item():.4f}, gradient norm {norm:.4g}"
            kept = "".join(f"; {path} is from before" for path in self.run.checkpoints.kept[-1:])
            what = f"diverged: {bad or 'loss or gradient'} is not finite at step {steps + 1:.0f}"
            raise RunError(f"{what} (the step before: {last}); lower the learning rates{kept}", DIVERGED)

    def save(self, elapsed: float) -> None:
        """Write the state; all ranks call it, the clock paused, and each brings what it alone holds."""
        run, average, clock, weights = self.run, vars(self.average), self.clock, self.run.model.state_dict()
        self.check(weights)
        state = {name: average[name] for name in ("total", "weight", "count", "newest")}
        state |= dict(step=self.step, scales=self.scales, seconds=clock.total, recent=list(clock.recent))
        state |= dict(random=run.runtime.gather(torch.get_rng_state()), optimisers=self.optimisers.state())
        if run.checkpoints.folder:
            run.checkpoints.write(state | dict(model=weights), run.log)
        self.saved = elapsed  # rank 0's, or the ranks would differ in when the next is due

    def resume(self) -> StepPlan | None:
        """Set to the checkpoint's state, if there is one; returns the plan of the step before it."""
        run, state, average, clock = self.run, self.run.checkpoints.before, self.average, self.clock
        if not state:
            return None
        load_weights(run.model, state["model"], state["path"])
        self.optimisers.load(state["optimisers"])
        average.total = [total.to(run.runtime.device) for total in state["total"]]
        average.weight, average.count, average.newest = map(state.get, ("weight", "count", "newest"))
        self.step, self.scales, clock.total = state["step"], state["scales"], state["seconds"]
        clock.recent, self.saved = deque(state["recent"], maxlen=clock.recent.maxlen), clock.total
        self.sound[0] = self.step
        torch.set_rng_state(state["random"][run.runtime.rank % len(state["random"])])
        return plan_step(run.cfg, self.step - 1, clock.total, clock.step_seconds()) if self.step else None


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def validate(run: Run, step: int, seconds: float, depth: int | None = None) -> Score:
    """Score the live weights, log it in the official line format."""
    score, ms, head = run.score(depth=depth), 1000 * seconds, f"step:{step}/{run.cfg.iterations}"
    run.log.line(f"{head} {score.text} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")
    run.log.event("val", step=step, val_loss=score.loss, val_bpb=score.bpb, train_ms=ms)
    return score


def report_step(run: Run, stream, before: StepPlan | None, plan: StepPlan, loss: Tensor, ms: float) -> None:
    """Log an epoch or depth that began with this step and, if due, its end."""
    cfg, log, step = run.cfg, run.log, plan.step
    if stream.epoch(cfg, step) > stream.epoch(cfg, step - 1):
        log.line(f"epoch:{stream.epoch(cfg, step)} step:{step}")
    if before and before.depth != plan.depth:
        repeats = f"prog_depth: switched to {plan.depth // cfg.num_layers} repeats"
        turn = repeats if cfg.depth_phases else f"progressive_grow: switched to {plan.depth} layers"
        log.line(f"{turn} at step:{step} frac:{plan.progress:.2f}")
        log.event("phase", step=step, depth=plan.depth, progress=plan.progress)
    if cfg.train_log_every and (step < 10 or due(step + 1, cfg.train_log_every)):
        step, value = step + 1, run.runtime.sum(loss).item()
        rest = f"step_avg:{ms / step:.2f}ms lr_scale:{plan.lr_scale:.4f} progress:{plan.progress:.4f}"
        log.line(f"step:{step}/{cfg.iterations} train_loss:{value:.4f} train_time:{ms:.0f}ms {rest}")
        where = dict(lr_scale=plan.lr_scale, progress=plan.progress, tokens=step * cfg.train_batch_tokens)
        log.event("step", step=step, train_loss=value if math.isfinite(value) else None, **where, train_ms=ms)


def train(run: Run, optimisers: Optimisers, stream: TokenStream) -> Trained:
    """Train until the step limit or the clock; validates at the end whatever the cadence. After a signal it
    saves the state between two steps and raises KeyboardInterrupt."""
    cfg, runtime, result = run.cfg, run.runtime, Trained()
    limit, seconds = warm_up(run, optimisers, stream)
    forecast(run, stream, limit, seconds)
    stats = torch._dynamo.utils.counters["stats"] if "torch._dynamo" in sys.modules else Counter()
    now, graphs = Training(run, optimisers, seconds[0]), stats["unique_graphs"]
    clock, plan, runtime.patient = now.clock, now.resume(), True
    loader = prefetch(batches(cfg, stream, runtime, now.step), runtime)
    clock.start()
    for step in itertools.count(now.step):
        elapsed, before, pace = clock.tick(), plan, clock.step_seconds()
        plan = plan_step(cfg, step, elapsed, pace)
        done = finished(cfg, step, elapsed + len(clock.pending) * pace, pace)  # pending: two steps on a GPU
        saves = clock.asked or done or 0 < cfg.checkpoint_seconds <= elapsed - now.saved
        if saves or due(step, cfg.val_loss_every):
            with clock.paused():
                if saves:
                    now.save(elapsed)
                if clock.asked:
                    raise KeyboardInterrupt
                if done or due(step, cfg.val_loss_every):
                    result.score = validate(run, step, clock.total, None if done else plan.depth)
        if done:
            break
        loss = train_step(run, optimisers, next(loader), plan, limit)
        now.stepped(plan, loss)
        report_step(run, stream, before, plan, loss, 1000 * clock.seconds())
        if not runtime.is_cuda or due(step + 1, 50):  # a GPU would be waited for
            now.check({})
    loader.close()
    runtime.patient = False
    if runtime.stopping:  # during the validation: the state is saved
        raise KeyboardInterrupt
    result.step, result.seconds, result.progress = step, clock.total, plan.progress
    result.mean_lr_scale, result.late_graphs = now.scales / max(step, 1), stats["unique_graphs"] - graphs
    report_end(run, now.average, result)
    return result


def report_end(run: Run, average: Average, result: Trained) -> None:
    """Say how training ended. An average is put into the model and scored beside the live weights."""
    log, late, p, end = run.log, result.late_graphs, result.progress, f"{result.step}/{run.cfg.iterations}"
    if result.step < run.cfg.iterations:
        log.line(f"stopping_early: wallclock_cap train_time:{1000 * result.seconds:.0f}ms step:{end}")
    log.warn(result.truncated, f"schedule_truncated at progress {p:.3f}: steps too long for the clock")
    log.warn(late > 0, f"{late} graphs were compiled inside the clock; set WARMUP_STEPS >= 1")
    if average.kind:
        average.load(result.step)
        score = result.averaged = run.score()
        log.line(f"{average.kind}: averaging {average.count} checkpoints")
        log.line(f"averaged {score.text} live {result.score.text}")
        values = dict(live_val_bpb=result.score.bpb, val_loss=score.loss, val_bpb=score.bpb)
        log.event("average", kind=average.kind, count=average.count, **values)


# 11. MAIN
own_source = Path(__file__).read_bytes  # this file, as it ships and counts


def describe_machine(runtime: Runtime) -> dict[str, object]:
    """The `env` event: device and versions. A CPU has its name where Linux tells it, and its threads."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, TypeError):
        name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].strip()
    name = torch.cuda.get_device_name() if runtime.is_cuda else f"{name}, {torch.get_num_threads()} threads"
    attention = "sdpa" if runtime.is_cuda else f"blocked to {LONGEST_BLOCKED}, then sdpa"
    setting = dict(dtype=runtime.dtype_name, compile=runtime.compiles, attention=attention)
    setting["deterministic"] = runtime.deterministic
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    return dict(device=name, world_size=runtime.world_size, **setting, **versions)


def log_header(run: Run, run_id: str, stream: TokenStream | None) -> None:
    """The official head of a log: source, versions, setting; and the `config` and `env` events. A log that
    goes on has it, and says from where."""
    cfg, log, runtime, data, source = run.cfg, run.log, run.runtime, run.data, own_source()
    machine, rule, sha = describe_machine(runtime), "=" * 100, hashlib.sha256(source).hexdigest()
    before = run.checkpoints.before
    if before or log.again:
        at, path = (before["step"], before["path"]) if before else (0, "no checkpoint")
        log.line(f"resumed: step:{at} from {path}")
        log.event("resumed", step=at, path=path, **machine)
    if before and log.again:
        return
    folder, shards, tied = Path(cfg.data_path), len(stream.paths) if stream else 0, cfg.tie_embeddings
    cards = "nvidia-smi: no GPU in use"
    if runtime.is_cuda and shutil.which("nvidia-smi"):
        cards = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    versions = f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}\n{cards}"
    log.line(f"{source.decode()}\n{rule}\n{versions}\n{rule}", echo=False)
    rates = f"embed_lr:{cfg.tied_embed_lr if tied else cfg.embed_lr} head_lr:{0.0 if tied else cfg.head_lr}"
    batch = f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len}"
    length = f"iterations:{cfg.iterations} warmup_steps:{cfg.warmup_steps}"
    log.line(f"run_id:{run_id} config_hash:{cfg.hash} overrides:{json.dumps(cfg.overrides())}")
    log.line(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.tokenizer_path}")
    log.line(f"train_loader:dataset:{folder.resolve().name} train_shards:{shards}")
    log.line(f"val_loader:shards pattern={folder / '*_val_*.bin'} tokens:{data.targets}")
    log.line(f"val: tokens:{data.targets} bytes:{data.bytes} docs:{data.documents} sha256:{data.sha256}")
    log.line(f"model_params:{sum(p.numel() for p in run.model.parameters())}")
    accumulate = -(-len(runtime.share(cfg.sequences)) // micro_batch_limit(cfg, runtime.device))
    log.line(f"world_size:{runtime.world_size} grad_accum_steps:{accumulate}")
    log.line(" ".join(f"{name}:{value}" for name, value in machine.items()))
    log.line(f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads}")
    log.line(f"tie_embeddings:{tied} {rates} matrix_lr:{cfg.matrix_lr} scalar_lr:{cfg.scalar_lr}")
    for _, repeats in cfg.depth_phases[:1]:
        log.line(f"prog_depth: schedule={cfg.depth_phases} starting_repeats={repeats}")
    log.line(f"{batch} {length} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}\nseed:{cfg.seed}")
    for phrase in cfg.inert():
        log.warn(True, phrase)
    log.warn(bool(runtime.uncompiled), f"no torch.compile ({runtime.uncompiled}); running eagerly, slower")
    log.event("config", config=asdict(cfg), config_hash=cfg.hash, code_sha256=sha, code_bytes=len(source))
    log.event("env", **machine, val_tokens=data.targets, val_bytes=data.bytes, val_sha256=data.sha256)


def save_model(run: Run, path: Path) -> int:
    """Rank 0 writes both model files, or neither: RunError (5), as `pack`'s. Returns the packed bytes."""
    cfg, log, state = run.cfg, run.log, {n: t.detach().cpu() for n, t in run.model.state_dict().items()}
    quant, official = quant_name(cfg), path.with_name("final_model.pt")
    about = dict(dtype=run.runtime.dtype_name, compile=run.runtime.compiles)
    blob = pack(cfg, state, dict(about, config_hash=cfg.hash, quant=quant))
    write_atomic(official, partial(torch.save, state))
    write_atomic(path, blob)
    raw, code, payload = official.stat().st_size, len(own_source()), payload_bytes(cfg, state)
    label, ratio = f"{quant}+{cfg.codec}", sum(4 * tensor.numel() for tensor in state.values()) / payload
    log.line(f"Serialized model: {raw} bytes\nCode size: {code} bytes")
    log.line(f"Total submission size: {raw + code} bytes")
    log.line(f"Serialized model {label}: {len(blob)} bytes (payload:{payload} payload_ratio:{ratio:.2f}x)")
    log.line(f"Total submission size {label}: {len(blob) + code} bytes")
    report_packing(run, state, blob)
    return len(blob)


def report_packing(run: Run, state: Mapping[str, Tensor], blob: bytes) -> None:
    """Log the relative error of each tensor as read back, and what each group takes, packed by itself."""
    cfg, restored, groups = run.cfg, unpack(blob, "the artifact")[0], {}
    off = {name: ((restored[name] - t).norm().item(), t.norm().item()) for name, t in state.items()}
    for group in dict.fromkeys(map(weight_group, state)):
        part = {name: tensor for name, tensor in state.items() if weight_group(name) == group}
        error, size = (math.hypot(*norms) for norms in zip(*(off[name] for name in part), strict=True))
        packed, relative = len(pack(cfg, part, {})), error / max(size, 1e-30)
        groups[group] = dict(tensors=len(part), bytes=packed, error=relative)
        run.log.line(f"packed {group}: tensors:{len(part)} bytes:{packed} error:{relative:.5f}")
    errors = {name: error / max(size, 1e-30) for name, (error, size) in off.items()}
    run.log.event("quantise", quant=quant_name(cfg), clip=cfg.quant_clip, groups=groups, errors=errors)


def score_artifact(run: Run, artifact: Mapping) -> dict[str, Score]:
    """Read the artifact from disk into the model and score it; prints two official final lines a score."""
    source, cfg, log, data, scores = artifact["path"], run.cfg, run.log, run.data, {}
    state = run.runtime.main_decides(lambda: unpack(Path(source).read_bytes(), source)[0])
    load_weights(run.model, state, source)
    if cfg.score_check:
        run.runtime.main_decides(lambda: tool("records/legality.py")["check_own_scores"](run))
    names = dict(sliding="sliding_window", hedge="hedge_mixer", ttt="ttt")
    names["roundtrip"] = f"{artifact['quant']}_{artifact['codec']}_roundtrip"
    shape = dict(sliding=f"window:{cfg.eval_length} stride:{cfg.eval_stride} ")
    for name, score in score_all(run):
        scores[name], ms = score, f"{shape.get(name, '')}eval_time:{1000 * score.seconds:.0f}ms"
        if score.unscored:
            log.line(f"partial_{names[name]} {score.text} tokens:{score.tokens}/{data.targets} {ms}")
        else:
            log.line(f"final_{names[name]} {score.text} {ms}")
            log.line(f"final_{names[name]}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
        values = dict(val_loss=score.loss, val_bpb=score.bpb, tokens=score.tokens, bytes=score.bytes)
        log.event("score", name=name, **values, seconds=score.seconds, left=score.unscored)
        run.checkpoints.add_score(name, score, log)
    if cfg.score_dump and run.runtime.rank == 0:
        dump = dict(position=np.arange(data.targets), target=data.tokens[1:], bytes=data.target_bytes)
        dump |= {
            f"{name}_logprob": -score.target_nats.numpy()
            for name, score in scores.items()
            if not score.unscored
        }
        write_atomic(Path(cfg.score_dump), lambda file: np.savez(file, **dump))
    return scores


def finish(run: Run, trained: Trained, artifact: dict, scores: dict[str, Score], run_id: str) -> int:
    """The `end` event and the RESULT line, the last of stdout; returns the exit code, by all limits."""
    run.runtime.patient = True  # it is over: from here a signal changes nothing
    cfg, log, score, seconds = run.cfg, run.log, scores["roundtrip"], sum(s.seconds for s in scores.values())
    cut = "".join(f" and {n} is a part, {s.tokens} tokens, only" for n, s in scores.items() if s.unscored)
    total, late, slow = artifact["total_bytes"], trained.late_graphs, 0 < cfg.max_eval_seconds < seconds
    size = f"code and model take {total} bytes, the limit is {SIZE_LIMIT}"
    clock = f"evaluation took {seconds:.0f} s{cut}, the limit is {cfg.max_eval_seconds:.0f}"
    graphs = f"{late} graphs compiled in the training clock despite the warm-up; COMPILE=0 avoids it"
    broken = [("over_size", OVER_SIZE, size)] if total > SIZE_LIMIT else []
    broken += [("over_eval_time", OVER_EVAL_TIME, clock)] if cut or slow else []
    broken += [("recompiled", RECOMPILED, graphs)] if late and cfg.warmup_steps else []
    status, code, message = [*broken, ("ok", 0, "")][0]
    log.line("peak memory allocated: {} MiB reserved: {} MiB".format(*run.runtime.peak_memory_mib()))
    if message and run.runtime.rank == 0:
        log.line(f"error: {message}", echo=False)
        print(f"error: {message}", file=sys.stderr)
    how = dict(status=status, exit_code=code, train_seconds=round(trained.seconds, 3))
    how |= dict(progress=trained.progress, mean_lr_scale=trained.mean_lr_scale, truncated=trained.truncated)
    log.event("end", step=trained.step, **how)
    named = [(f"{'partial_' * (s.unscored > 0)}{n}", s) for n, s in scores.items()]
    numbers = {f"val_{k}": None if score.unscored else round(getattr(score, k), 8) for k in ("loss", "bpb")}
    numbers |= {f"{n}_val_{k}": round(getattr(s, k), 8) for n, s in named for k in ("loss", "bpb")}
    before = dict(live=trained.score, prequant=trained.averaged or trained.score)
    numbers |= {f"{name}_val_bpb": round(s.bpb, 8) if s else None for name, s in before.items()}
    size = dict(steps=trained.step, tokens=trained.step * cfg.train_batch_tokens, **artifact)
    where = dict(**describe_machine(run.runtime), val_sha256=run.data.sha256, overrides=cfg.overrides())
    whole = dict(run_id=run_id, seed=cfg.seed, config_hash=cfg.hash, eval_seconds=round(seconds, 3))
    whole["resumed"] = run.checkpoints.about.get("resumed", [])
    log.line("RESULT " + json.dumps(numbers | how | size | whole | where))
    return code


def artifact_config(cfg: Config, env: Mapping[str, str], header: Mapping) -> Config:
    """The config with the artifact's shape; RunError if the environment asks for another one."""
    made, own, source = header.get("model"), cfg.shape(), f"EVAL_ONLY={cfg.eval_only}"
    known = isinstance(made, dict) and made.keys() == own.keys() and isinstance(header.get("quant"), str)
    known = known and all(type(made[name]) is type(value) for name, value in own.items())
    known = known and header.get("codec") in CODECS and header.get("dtype") in DTYPES
    require(known, f"{source} was made by another version of this script")
    for name, value in own.items():
        same = name.upper() not in env or value == made[name]
        require(same, f"{name.upper()}={value} but {source} was trained with {made[name]}; unset it")
    # Its dtype and whether it was compiled hold too, unless set: either moves the score's fourth digit.
    compiled = cfg.compile if header.get("compile") or "COMPILE" in env else "0"
    dtype = cfg.dtype if "DTYPE" in env else header["dtype"]
    return replace(cfg, **made, compile=compiled, dtype=dtype, train_batch_tokens=made["train_seq_len"])


def kernel_missing(error: BaseException) -> str:
    """The operation that DETERMINISTIC=1 asks for and torch lacks on this device, or ''."""
    found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    return found[1] if found and isinstance(error, RuntimeError) else ""


def explained(error: BaseException) -> RunError | None:
    """What a user can meet, as one line and its exit code; None for a bug, whose traceback is shown."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, KeyboardInterrupt):
        return RunError("stopped by a signal before there was anything to save", PREEMPTED)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "t allocate memory" in str(error):
        return RunError("out of memory; lower MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or other sizes of a batch")
    if operation := kernel_missing(error):
        return RunError(f"torch has no deterministic kernel for {operation} here; set DETERMINISTIC=0")
    if isinstance(error, OSError):
        return RunError(f"{error.filename or 'log or console'}: {error.strerror}; mend that or set another")
    if isinstance(error, RuntimeError) and any("torch/distributed" in file for file in files):
        return RunError(f"another rank was lost: {str(error).splitlines()[0]}", LOST_RANK)
    return error if isinstance(error, RunError) else None


@contextmanager
def recorded(run: Run, run_id: str) -> Iterator[None]:
    """Write to the logs how it ended, if that is before its RESULT."""
    names = {DIVERGED: "diverged", PREEMPTED: "preempted", LOST_RANK: "lost_rank"}
    try:
        yield
    except BaseException as error:
        run.runtime.patient = True  # torchrun signals what is left of a run that lost a rank
        known, kept = explained(error), run.checkpoints.kept
        if known and known.code in (PREEMPTED, LOST_RANK) and run.runtime.stopping and kept:
            how = f"RESUME=auto RUN_ID={run_id} OUT_DIR={run.cfg.out_dir} goes on from {kept[-1]}"
            known = RunError(f"stopped by {run.runtime.stopping}; {how}", PREEMPTED)
        code = known.code if known else 1
        end = dict(status=names.get(code, "error" if known else "crashed"), exit_code=code)
        with suppress(OSError):  # a full disk may be what ended it
            run.log.event("end", step=None, **end)
            run.log.line("RESULT " + json.dumps(dict(run_id=run_id, **end, message=str(known or error))))
        if known and known.alone is None:
            known.alone = code == 2
        raise known or error from None
    finally:
        run.log.close()


def execute(cfg: Config, env: Mapping[str, str]) -> int:
    """One run, whole: train, pack, read back from disk, score what was read; or score a given artifact.
    Returns the exit code. What a user may get wrong is checked before the log opens."""
    header = unpack(Path(cfg.eval_only).read_bytes(), cfg.eval_only)[1] if cfg.eval_only else None
    cfg = artifact_config(cfg, env, header) if header else cfg
    restarted = cfg.resume == "0" and env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # --max-restarts
    cfg = replace(cfg, resume="auto") if restarted else cfg
    if cfg.codec == "zstd" and not header:
        zstandard_module()
    with Runtime.launch(cfg, env) as runtime:
        trains = not header and cfg.iterations > 0
        data, stream, same = runtime.agree(lambda: load_inputs(cfg, runtime.rank, trains))
        before = runtime.main_decides(lambda: find_checkpoint(cfg, same)) if trains else None
        runtime.dtype = DTYPES[before["dtype"]] if before else runtime.dtype
        with torch.device("meta"):  # takes no memory: knobs, or a forged header, may ask for any amount
            size = predict_size(cfg, blank := GPT(cfg)) + len(own_source())
            if header:
                stored = {name: torch.empty(shape) for name, shape, _ in header["tensors"]}
                load_weights(blank, stored, cfg.eval_only)
        if size > SIZE_SLACK * SIZE_LIMIT and not header:
            raise RunError(f"code and model need about {size} bytes, the limit is {SIZE_LIMIT}", OVER_SIZE)
        random.seed(cfg.seed), np.random.seed(cfg.seed), torch.manual_seed(cfg.seed)
        model = GPT(cfg, runtime.dtype)
        if cfg.init_from:
            given = runtime.agree(lambda: load_checkpoint(cfg.init_from))
            load_weights(model, given, f"INIT_FROM={cfg.init_from}")
        new = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"
        run_id, out, locks = cfg.run_id or (before or {}).get("run_id", new), Path(cfg.out_dir), []
        runtime.main_decides(lambda: locks.extend(claim_outputs(cfg, run_id)))
        log = RunLog(out / "logs" if runtime.rank == 0 else None, run_id, cfg.resume != "0")
        about = dict(kind=CHECKPOINT, run_id=run_id, same=same, dtype=runtime.dtype_name, resumed=[])
        kept = Checkpoints(out / "checkpoints" if trains and runtime.rank == 0 else None, about, before)
        run = Run(cfg, runtime, log, model.to(runtime.device), data, kept)
        with recorded(run, run_id):
            log_header(run, run_id, stream)
            code = complete(run, stream, header, run_id)
        kept.clear()
        for lock in locks:
            lock.truncate(0)
        return code


def load_inputs(cfg: Config, rank: int, trains: bool) -> tuple:
    """(Validation, its bytes proved on rank 0; training shards, or None; what is the same after a resume)."""
    data, stream = load_validation(cfg, load_tokenizer(cfg), prove=rank == 0), None
    parts = {"validation text": data.sha256.encode(), "train_gpt.py": own_source()}
    if trains:
        stream = TokenStream(cfg.data_path, "train", cfg.vocab_size)
        stream.windows(cfg.train_seq_len)
        parts["training shards"] = repr([p.name for p in stream.paths] + stream.bounds.tolist()).encode()
    hashes = {name: hashlib.sha256(part).hexdigest()[:16] for name, part in parts.items()}
    return data, stream, cfg.effective() | dict(SEED=cfg.seed) | hashes


def complete(run: Run, stream: TokenStream | None, header: Mapping | None, run_id: str) -> int:
    """Train, pack and score, or what of it is asked for. Returns the exit code."""
    cfg, runtime = run.cfg, run.runtime
    if stream:
        trained = train(run, Optimisers(cfg, run.model, runtime), stream)
    else:
        run.settle(lambda: warm_evaluation(run))
        trained = Trained(None if header else validate(run, 0, 0.0))
    own, path = len(own_source()), Path(cfg.eval_only or Path(cfg.out_dir, MODEL_FILE))
    size = path.stat().st_size if header else runtime.main_decides(lambda: save_model(run, path))
    quant, codec = (header["quant"], header["codec"]) if header else (quant_name(cfg), cfg.codec)
    artifact = dict(path=str(path), quant=quant, codec=codec, model_bytes=size)
    artifact |= dict(code_bytes=own, total_bytes=size + own)
    if not header:
        run.log.event("artifact", **artifact)
    return finish(run, trained, artifact, score_artifact(run, artifact), run_id)


def tool(path: str) -> dict:
    """The names in a file of the repository that no record needs."""
    where = Path(__file__).resolve().parent / path
    require(where.is_file(), f"{path} is not beside this script; use the one in the repository")
    sys.modules.setdefault("train_gpt", sys.modules[__name__])  # what it imports is this very program
    return runpy.run_path(str(where))


def main() -> None:
    arguments, code = sys.argv[1:], 0
    try:
        if arguments in (["--help"], ["-h"]):
            print(help_text())
        elif arguments in (["--dry-run"], ["--doctor"], ["--list-ideas"], ["--knob-table"]):
            code = tool("sweeps/show.py")[arguments[0][2:].replace("-", "_")](os.environ)
        else:
            require(not arguments, f"unknown argument {arguments}: knobs are environment variables; --help")
            code = execute(Config.from_env(os.environ), os.environ)
    except (Exception, KeyboardInterrupt) as error:
        known = explained(error)
        if not known:
            raise
        if known.alone or os.environ.get("RANK", "0") == "0":
            print("error:", " ".join(str(known).splitlines()), file=sys.stderr)
        code = known.code
    if "LOCAL_RANK" in os.environ:  # at a plain exit a thread of gloo's can abort (pytorch PR #179291)
        sys.stdout.flush(), os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
