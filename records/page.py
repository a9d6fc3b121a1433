"""The README.md of a record folder, written from the runs' own facts."""

import re
import shlex
import statistics
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from records.finished import Finished

# Knobs of one machine or one process; the command has its own.
LOCAL = {"DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "OUT_DIR", "SEED", "EVAL_ONLY", "SCORE_DUMP", "SCORE_CHECK"}
LOCAL |= {"RESUME", "CHECKPOINT_SECONDS"}
CLOCK = 600  # seconds, of the 10-minute track: for training, and for evaluation again
TITLES = dict(ttt="test-time training", hedge="hedge mixer")


@dataclass(frozen=True)
class Bar:
    """One-sided t-tests: is the seeds' mean below `bpb`, and is it by `gain` nats? Each has t and p."""

    bpb: float
    gain: float
    below: NamedTuple
    by_gain: NamedTuple


@dataclass(frozen=True)
class Knob:
    """A knob that was set: its environment text, its default's, and what it may change."""

    name: str
    value: str
    default: str
    shapes: bool  # part of the config hash
    idle: str  # why it had no effect, or ''

    text = property(lambda self: f"{self.name}={shlex.quote(self.value)}")


def as_text(value: object) -> str:
    """A knob's value as the environment spells it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def knobs_of(script: ModuleType, config: Mapping[str, object]) -> list[Knob]:
    """The knobs of a run that differ from the defaults of the script that ran."""
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()}
    cfg, knobs = script.Config(**given), []
    for f in cfg.changed:
        value, shapes = as_text(getattr(cfg, f.name)), f.metadata["role"] != "place"
        value = value.rpartition("/")[2] if f.name == "init_from" else value  # the rest is this machine's
        knobs.append(Knob(f.name.upper(), value, as_text(f.default), shapes, cfg.unmet(f)))
    return [knob for knob in knobs if knob.name not in LOCAL]


def mean_row(values: list[float]) -> tuple[str, str]:
    return f"{statistics.mean(values):.8f}", f"{statistics.stdev(values):.8f}"


def table(rows: list[list[str]]) -> str:
    head, *rest = rows
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rest])


def bullets(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


@dataclass(frozen=True)
class Page:
    """What the page is made of; `text` is the page."""

    runs: list[Finished]
    claim: Mapping[str, object]
    knobs: list[Knob]
    bar: Bar | None
    files: list[str]
    blurb: str  # as given, or ''

    first = property(lambda self: self.runs[0])
    several = property(lambda self: len(self.runs) > 1)
    cards = property(lambda self: self.claim["hardware"])

    @property
    def on_cpu(self) -> bool:
        """A CPU is logged with its threads, a GPU is not."""
        return any(re.search(r", \d+ threads$", run.result["device"]) for run in self.runs)

    @property
    def on_track(self) -> bool:
        """Eight H100 and both clocks of the 10-minute track."""
        slow = [r for r in self.runs if max(r.result["train_seconds"], r.result["eval_seconds"]) > CLOCK]
        cards = {(run.result["world_size"], "H100" in run.result["device"]) for run in self.runs}
        return cards == {(8, True)} and not slow

    def text(self) -> str:
        parts = {
            "Summary": self.summary(),
            "Changes from baseline": self.changes(),
            "Configuration": self.configuration(),
            "Command": self.command(),
            f"Key metrics (from `{'train_seed*.log' if self.several else 'train.log'}`)": self.metrics(),
            "Training volume": self.volume(),
            "Hardware note": self.hardware(),
            "Included files": self.included(),
        }
        opening = f"This record captures the `{self.claim['name']}` submission.\n"
        return "\n".join([opening, *(f"## {head}\n\n{body}\n" for head, body in parts.items())])

    def summary(self) -> str:
        kind, bpb = self.claim["score"], self.claim["val_bpb"]
        spread = f", sample standard deviation {self.claim['val_bpb_std']:.8f}" if self.several else ""
        seeds = f"mean of {len(self.runs)} seeds{spread}" if self.several else "one seed"
        lines = [self.blurb, f"val_bpb **{bpb:.8f}** (score `{kind}`; {seeds})."]
        if self.on_cpu:
            lines.append("**CPU-scale: trained and scored on a CPU. No leaderboard claim is made.**")
        return "\n\n".join(filter(None, lines))

    def changes(self) -> str:
        acting = [knob for knob in self.knobs if knob.shapes and not knob.idle]
        rows = [f"`{knob.text}` ({knob.default or 'empty'})" for knob in acting]
        idle = [f"`{knob.text}` was set without effect: {knob.idle}" for knob in self.knobs if knob.idle]
        rest = "No other knob that shapes the result differs from the script's default."
        none = "None: every knob that shapes the result has the script's default."
        about = "The defaults are the official baseline's, packing aside. In brackets: the default."
        parts = [bullets(rows + idle), rest if rows else none, about if rows else ""]
        return "\n\n".join(filter(None, parts))

    def configuration(self) -> str:
        cfg = self.first.config
        layers, heads = f"{cfg['num_layers']} blocks", f"{cfg['num_heads']}/{cfg['num_kv_heads']}"
        turns = f" run {cfg['num_repeats']} times" if cfg["num_repeats"] > 1 else ""
        width = f"width {cfg['model_dim']}, {heads} query/key-value heads, MLP x{as_text(cfg['mlp_mult'])}"
        tied, own = cfg["tie_embeddings"], as_text
        names = ("tied_embed_lr",) if tied else ("embed_lr", "head_lr")
        rates = [f"{n.upper()}={own(cfg[n])}" for n in (*names, "matrix_lr", "scalar_lr")]
        batch = f"{cfg['train_batch_tokens']:,} tokens a step in sequences of {cfg['train_seq_len']:,}"
        limit = f"{cfg['iterations']:,} steps or {own(cfg['max_wallclock_seconds'])} s (0: no clock)"
        length, stride = cfg["eval_seq_len"] or cfg["train_seq_len"], cfg["eval_stride"]
        window = f"; sliding windows of {length:,} tokens, stride {stride:,}" if stride else ""
        return bullets([
            f"Layout: vocabulary {cfg['vocab_size']:,}, {layers}{turns}, {width}, {cfg['mlp_act']}",
            f"Embeddings: {'tied' if tied else 'untied'}",
            f"Learning rates: {' '.join(rates)}",
            f"Batching: {batch}",
            f"Limit: {limit}",
            f"Scores: {', '.join(self.first.scores)}{window}",
            f"Packing: {self.first.result['quant']}, {self.first.result['codec']}",
            f"Config hash: `{self.claim['config_hash']}`",
        ])  # fmt: skip

    def command(self) -> str:
        """What makes the runs again from a folder with the challenge's data layout."""
        cfg, ranks = self.first.config, self.first.result["world_size"]
        dataset = self.first.log.find(r"^train_loader:dataset:(\S*)")
        tokenizer = cfg["tokenizer_path"].rpartition("/")[2]
        words = [f"DATA_PATH=./data/datasets/{shlex.quote(dataset)}"]
        words += [f"TOKENIZER_PATH=./data/tokenizers/{shlex.quote(tokenizer)}"]
        words += [knob.text for knob in self.knobs]
        runner = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
        seeds, indent = " ".join(str(run.seed) for run in self.runs), "  " if self.several else ""
        words.insert(0, "SEED=$seed OUT_DIR=runs/$seed" if self.several else f"SEED={seeds}")
        rows = textwrap.wrap(" ".join(words), 100, break_long_words=False, break_on_hyphens=False)
        lines = [*(f"{indent}{row} \\" for row in rows), f"{indent}{runner} train_gpt.py"]
        if self.several:
            lines = [f"for seed in {seeds}; do", *lines, "done"]
        return "\n".join(["```bash", *lines, "```"])

    def metrics(self) -> str:
        return self.seed_table() if self.several else self.single()

    def single(self) -> str:
        run, claim = self.first, self.claim
        end, result = run.last("end"), run.result
        memory = "Peak memory " + run.log.find(r"^peak memory (allocated: .*)$")
        ended = f"stopped at step {result['steps']:,} of {run.config['iterations']:,}"
        before = claim.get("pre_quant_val_bpb")
        lines = [f"Training {ended}, progress {end['progress']:.3f} of the schedule"]
        lines += [] if before is None else [f"Before packing: val_bpb:{before:.8f}"]
        for name in run.scores:
            values = " ".join(f"{key}:{result[f'{name}_{key}']:.8f}" for key in ("val_loss", "val_bpb"))
            lines.append(f"{TITLES.get(name, name).capitalize()}, from the packed file: {values}")
        seconds = f"Train time: {result['train_seconds']:.1f} s; evaluation: {result['eval_seconds']:.1f} s"
        sizes = [("Packed model", "model_bytes"), ("Code", "code_bytes"), ("Total", "total_bytes")]
        lines += [seconds, memory, *(f"{what}: {result[key]:,} bytes" for what, key in sizes)]
        return bullets([*lines, f"Parameters: {int(run.log.find(r'^model_params:([0-9]+)')):,}"])

    def seed_table(self) -> str:
        """A row a seed, then mean and sample standard deviation; and the test against the bar."""
        claims = self.claim["seed_results"]
        names = [name for name in ("pre_quant", *self.first.scores) if f"{name}_val_bpb" in self.claim]
        head = ["seed", "steps", "train s", "eval s", *(f"{n} val_bpb" for n in names), "total bytes"]
        rows, scores = [head], []
        for seed, row in claims.items():
            scores.append([row[f"{name}_val_bpb"] for name in names])
            fixed = [seed, f"{row['step_stop']:,}", f"{row['wallclock_seconds']:.1f}"]
            shown = [f"{value:.8f}" for value in scores[-1]]
            rows.append([*fixed, f"{row['eval_seconds']:.1f}", *shown, f"{row['bytes_total']:,}"])
        means, spreads = zip(*map(mean_row, map(list, zip(*scores, strict=True))), strict=True)
        rows += [["mean", "", "", "", *means, ""], ["sample std", "", "", "", *spreads, ""]]
        return "\n\n".join([table(rows), *([self.test()] if self.bar else [])])

    def test(self) -> str:
        bar, gap = self.bar, self.claim["val_bpb"] - self.bar.bpb
        nats = gap * self.claim["val_loss"] / self.claim["val_bpb"]
        tests = {"it is lower": bar.below, f"it is lower by {bar.gain} nats": bar.by_gain}
        told = [f"that {what}: t({test.df}) = {test.t:.4f}, p = {test.p:.6f}" for what, test in tests.items()]
        mean = f"The mean `{self.claim['score']}` val_bpb is {gap:+.8f} bpb ({nats:+.8f} nats) from the bar"
        return f"{mean} {bar.bpb:.8f}. One-sided t-tests, the bar taken as exact, {'; '.join(told)}."

    def volume(self) -> str:
        cfg, lines = self.first.config, []
        for run in self.runs:
            seed = f", seed {run.seed}" if self.several else ""
            steps, tokens = run.result["steps"], run.result["tokens"]
            lines.append(f"Total tokens trained: {tokens:,} in {steps:,} steps{seed}")
        shards = self.first.log.find(r"^train_loader:.*train_shards:([0-9]+)")
        return bullets([f"Global batch: {cfg['train_batch_tokens']:,} tokens", *lines, f"Shards: {shards}"])

    def hardware(self) -> str:
        versions = ", ".join(f"{name} {self.first.result[name]}" for name in ("python", "torch"))
        lines = [f"{self.cards}; {versions}; compute type {self.first.result['dtype']}."]
        if self.on_cpu:
            lines.append("Run on a CPU: compare its numbers only with runs of the same size, clock and text.")
        elif not self.on_track:
            why = f"eight H100, {CLOCK} s of training and {CLOCK} s of evaluation"
            lines.append(
                f"That is not the 10-minute track's setting ({why}): no claim is made on that track."
            )
        for run in self.runs:
            if resumed := run.result.get("resumed"):
                steps = ", ".join(f"{step:,}" for step in resumed)
                lines.append(f"The run of seed {run.seed} was cut off and went on from step {steps}.")
        text = self.claim["val_sha256"]
        env = self.first.last("env")
        where = f"{env['val_tokens']:,} tokens, {env['val_bytes']:,} bytes, sha256 `{text}`"
        return "\n\n".join([*lines, f"Validation text: {where}."])

    def included(self) -> str:
        what = {
            "README.md": "this page",
            "train_gpt.py": f"the script that ran, sha256 `{self.claim['code_sha256']}`",
            "train_gpt_readable.py": "the same script to read; what ran was packed from it",
            "submission.json": "the claim",
        }
        rest = {"log": "the whole log; it begins with the source", "ptz": "the packed model"}
        told = [f"`{name}` - {what.get(name) or rest[name.rpartition('.')[2]]}" for name in self.files]
        return bullets(told)
