"""Every published idea against the control, paired by seed, with the noise floor measured in the same sweep.

    python sweeps/ideas.py run --out runs/ideas          train all arms and seeds; finished ones are kept
    python sweeps/ideas.py time --out runs/ideas         milliseconds a step of each arm beside the control
    python sweeps/ideas.py table --out runs/ideas        JSON of both, and the Markdown table

--study ideas (PR #1434, the default) or depth (PR #895: recurrence and what came with it).

The runs have a fixed number of steps, so a busy machine slows them and changes nothing. Null arms differ from
the control by too little to matter. The noise of one paired difference is the spread of an arm between seeds.
"""

import argparse
import ast
import json
import math
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tests")]

import train_gpt  # noqa: E402

SEEDS = 1337, 42, 7
VAL_TOKENS = 65_536
# Six layers, since MYCORRHIZAL pairs blocks three apart. As #1434's runs, this ends after too few steps for
# Muon's momentum to warm up; unlike theirs, its schedules end.
SIZES = dict(
    MODEL_DIM=96, NUM_HEADS=4, NUM_KV_HEADS=2, TRAIN_SEQ_LEN=128, TRAIN_BATCH_TOKENS=2048,
    MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0, VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=40, DATA_SHUFFLE=1, COMPILE=0,
    DTYPE="fp32", DEVICE="cpu",
)  # fmt: skip
CONTROL = dict(SIZES, COSINE_LR=1, NUM_LAYERS=6, ITERATIONS=120)

# One line an arm: its knobs over the control's. Strengths are #1434's where its log or scripts name one;
# intervals and horizons are the same share of the run as there (400 steps).
ARMS = """
COSINE_LR=0 TIDAL_LR=1 | COSINE_LR=0 WARMDOWN_ITERS=11 | COSINE_CYCLES=2 | GOLDEN_LR=1
COSINE_LR=0 TIDAL_LR=1 TIDAL_WARMUP=0.1 | COSINE_LR=0 BREATHING_LR=1 | COSINE_LR=0 WHALE_LR=1
COSINE_LR=0 CIRCADIAN_LR=1 | COSINE_LR=0 COSMO_LR=1 | COSINE_LR=0 PUNCTUATED_LR=1 | COSINE_LR=0 ROOT_FIRST=1
COSINE_LR=0 CORAL_LR=1 | MIRROR_TRAIN=0.1 | EMBED_MIXUP=0.1 | TOKEN_DROP=0.05 | METAMORPHOSIS=0.1
FOCAL_GAMMA=2 | FOCAL_GAMMA=2 GAMMA_ANNEAL=1 | LABEL_SMOOTH=0.1 | Z_LOSS=0.0001
LOGIT_PENALTY=0.00001 | LOGIT_TEMP=1.2 | ENTROPY_BONUS=0.01
MULTI_TOKEN=0.1 | HEAD_DIVERSITY=0.0001 | GRAD_CENTRAL=1 | MYCORRHIZAL=0.1
THERMAL_VENT=1 | SAM_RHO=0.05 | CANOPY_LR=1 | WD_SCHEDULE=0.04 | WD_SCHEDULE=1 | PREDPREY_LR=1
CONTROLLED_BURN=0.05 BURN_INTERVAL=15 | SYNAPTIC_SCALE=1 | WEIGHT_PERTURB=0.0001 PERTURB_INTERVAL=30
MUTATION_DECAY=0.001 | LAYER_DROP=0.2 | PROGRESSIVE_GROW=1 | HEAD_PRUNE=0.5 | WEIGHT_SHARE=3 | ATTN_RECYCLE=1
PARALLEL_BLOCK=1 | MLP_ACT=silu2 | MLP_ACT=swiglu | SANDWICH_NORM=1 | ENCODER_LAYERS=0 | ENCODER_LAYERS=1
EMBED_SCALE=22.6
"""
NULL_ARMS = "ADAM_EPS=0.00000001001 | BETA2=0.950001 | MATRIX_LR=0.0400001"

# PR #895's whole stack at fixed depth, three blocks three times; each arm takes one piece away or adds one.
# Its learning rates were tuned for thousands of steps, so they are the baseline's here.
DEPTH_CONTROL = dict(
    SIZES, NUM_LAYERS=3, NUM_REPEATS=3, NUM_VALUE_EMBEDS=2, XSA_LAST_N=3, MLP_ACT="leaky_relu2",
    LEAKY_SLOPE=0.5, MUON_WD=0.04, GRAD_CLIP_NORM=0.3, WARMDOWN_FRAC=0.3, ITERATIONS=240,
)  # fmt: skip
DEPTH_ARMS = """
SWA_ENABLED=1 SWA_EVERY=4 | EMA_DECAY=0.95 | EMA_DECAY=0.98
XSA_LAST_N=0 | XSA_LAST_N=-1 | MLP_ACT=relu2 LEAKY_SLOPE=0.01 | NUM_VALUE_EMBEDS=0 | CROSS_REPEAT_SKIP=0
VALUE_RESIDUAL=1 | REPEAT_LORA_RANK=2 | MUON_WD=0 | GRAD_CLIP_NORM=0 | PROG_DEPTH=0.4:1,0.65:2,1.0:3
NUM_REPEATS=1 | NUM_LAYERS=9 NUM_REPEATS=1 ENCODER_LAYERS=0
"""


@dataclass(frozen=True)
class Study:
    """A control and the lines that change it; null lines change it by too little to matter."""

    control: dict[str, object]
    lines: str
    null_lines: str

    @property
    def nulls(self) -> list[str]:
        return [line.strip() for line in self.null_lines.split("|")]

    def arms(self) -> dict[str, dict[str, str]]:
        """Arm name (its line) -> knobs. The control's name is empty; null arms come right after it."""
        lines = [*self.nulls, *(line.strip() for line in self.lines.replace("\n", "|").split("|"))]
        base = {name: str(value) for name, value in self.control.items()}
        return {
            line: base | dict(word.split("=") for word in line.split()) for line in ["", *filter(None, lines)]
        }


STUDIES = dict(
    ideas=Study(CONTROL, ARMS, NULL_ARMS), depth=Study(DEPTH_CONTROL, DEPTH_ARMS, "BETA2=0.950001")
)


def short_dataset(source: Path, out: Path) -> Path:
    """The dataset with its validation cut to VAL_TOKENS: scoring all of it would take as long as training."""
    from shards import read_tokens, write_shard

    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.bin")):
        target = folder / path.name
        if target.exists():
            continue
        if "_val_" in path.name:
            write_shard(target, read_tokens(path)[:VAL_TOKENS])
        else:
            target.symlink_to(path.resolve())
    return folder


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{re.sub(r'[^A-Za-z0-9.]+', '_', arm) or 'control'}-{seed}"


def result_of(folder: Path) -> dict | None:
    """The RESULT line of a finished run."""
    path = folder / "stdout.txt"
    found = re.search(r"^RESULT (.*)$", path.read_text(), re.M) if path.exists() else None
    return json.loads(found[1]) if found else None


def run_one(out: Path, arm: str, knobs: dict[str, str], seed: int, data: dict[str, str]) -> str:
    """Train and score one arm with one seed in a folder of its own, unless it is finished there."""
    folder = folder_of(out, arm, seed)
    if result_of(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        env = knobs | data | dict(SEED=str(seed), OUT_DIR=str(folder))
        with (folder / "stdout.txt").open("w") as log, redirect_stdout(log):
            train_gpt.execute(train_gpt.Config.from_env(env), env)
    return f"{arm or 'control'} seed {seed}: {result_of(folder)['val_bpb']:.4f}"


def run(study: Study, out: Path, source: Path, tokenizer: Path, workers: int) -> None:
    """All arms and seeds, `workers` at once; an arm that fails is named and the others go on."""
    data = dict(DATA_PATH=str(short_dataset(source, out)), TOKENIZER_PATH=str(tokenizer))
    jobs = [(arm, knobs, seed) for seed in SEEDS for arm, knobs in study.arms().items()]
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(run_one, out, *job, data): job for job in jobs}
        for done in as_completed(waiting):
            arm, _, seed = waiting[done]
            error = done.exception()
            print(f"FAILED {arm} seed {seed}: {error}" if error else done.result(), flush=True)


class Stepper:
    """One arm, built and ready to step on random tokens."""

    def __init__(self, knobs: dict[str, str]):
        self.cfg = train_gpt.Config.from_env(knobs)
        runtime, log = train_gpt.Runtime(), train_gpt.RunLog(None, "")
        torch.manual_seed(0)
        self.run = train_gpt.Run(self.cfg, runtime, log, train_gpt.GPT(self.cfg), None)
        self.optimisers = train_gpt.Optimisers(self.cfg, self.run.model, runtime)
        tokens = torch.randint(self.cfg.vocab_size, (self.cfg.sequences, self.cfg.train_seq_len + 1))
        self.batch = tokens[:, :-1], tokens[:, 1:]

    def seconds(self, step: int) -> float:
        """Of one optimiser step somewhere in the run, so that ideas which start late or come and go count."""
        plan = train_gpt.plan_step(self.cfg, step, 0.0, 0.0)
        start = time.perf_counter()
        train_gpt.train_step(self.run, self.optimisers, self.batch, plan, 10**6)
        return time.perf_counter() - start


def paired_times(arm: dict[str, str], control: Stepper, pairs: int) -> tuple[float, float]:
    """Medians, in ms: of the control's steps and of the arm's step less the control's beside it."""
    other = Stepper(arm)
    steps = [round(k * (control.cfg.iterations - 1) / (pairs - 1)) for k in range(pairs)]
    times = [(control.seconds(step), other.seconds(step)) for step in [0, 0, *steps]][2:]
    return 1000 * median(a for a, _ in times), 1000 * median(b - a for a, b in times)


def time_all(study: Study, out: Path, pairs: int = 41) -> None:
    """Eager float32 steps of every arm, interleaved with the control's; written to times.json."""
    rows, control = {}, Stepper(study.arms()[""])
    for arm, knobs in study.arms().items():
        rows[arm] = paired_times(knobs, control, pairs)
        print(f"{arm or 'control'}: {rows[arm][0]:.1f} ms {rows[arm][1]:+.1f} ms", flush=True)
    (out / "times.json").write_text(json.dumps(rows, indent=1))


# The functions of an idea that its table does not name.
FUNCTIONS = dict(sam_rho=["uphill"], layer_drop=["kept_layers"], progressive_grow=["phases"])
TABLES = "EMBEDDING_TERMS INPUT_TERMS LOSS_TERMS GRADIENT_EDITS WEIGHT_EDITS LAYER_RATES DECAYS"


def lines_of(name: str, source: str) -> int:
    """Lines of train_gpt.py that exist for this knob alone: those that name it and its own functions."""
    own = set(FUNCTIONS.get(name, []))
    own |= {
        getattr(getattr(train_gpt, t)[name], "__name__", name)
        for t in TABLES.split()
        if name in getattr(train_gpt, t)
    }
    own |= {hook.__name__ for hooks in train_gpt.HOOKS.values() for knob, hook in hooks if knob == name}
    lines = {n for n, line in enumerate(source.splitlines(), 1) if re.search(rf"\b{name}\b", line)}
    for node in ast.walk(ast.parse(source)):
        named = isinstance(node, ast.keyword) and node.arg == name
        if named or isinstance(node, ast.FunctionDef) and node.name in own | {name}:
            lines |= set(range(node.value.lineno if named else node.lineno, node.end_lineno + 1))
    return len(lines)


def averaging(results: dict[int, dict | None]) -> dict[int, float] | None:
    """What averaging the weights changed, by seed: bpb of the average less that of the live weights."""
    done = {seed: r for seed, r in results.items() if r and r["live_val_bpb"] != r["prequant_val_bpb"]}
    return {seed: r["prequant_val_bpb"] - r["live_val_bpb"] for seed, r in done.items()} or None


def collect(study: Study, out: Path) -> dict:
    """Every run, the paired differences, and the noise of one difference."""
    times = json.loads((out / "times.json").read_text()) if (out / "times.json").exists() else {}
    source, rows, runs = (ROOT / "train_gpt.py").read_text(), [], {}
    for arm, knobs in study.arms().items():
        results = {seed: result_of(folder_of(out, arm, seed)) for seed in SEEDS}
        runs[arm] = {seed: result["val_bpb"] for seed, result in results.items() if result}
        deltas = [runs[arm][seed] - runs[""][seed] for seed in runs[arm]]
        names = [w.partition("=")[0] for w in arm.split() if w != "COSINE_LR=0"]
        fields = {f.name.upper(): f for f in train_gpt.fields(train_gpt.Config)}
        rows.append(dict(
            arm=arm, state=fields[names[-1]].metadata["idea"] if names else "",
            lines=lines_of(names[-1].lower(), source) if names else 0, bpb=runs[arm],
            control_ms=times.get(arm, [None, None])[0], extra_ms=times.get(arm, [None, None])[1],
            mean=mean(deltas), sd=stdev(deltas), n=len(deltas), knobs=knobs, average=averaging(results),
        ))  # fmt: skip
    tested = [row["sd"] for row in rows if row["arm"] and row["arm"] not in study.nulls]
    noise = math.sqrt(mean(sd**2 for sd in sorted(tested)[: len(tested) // 2 + 1]))
    some = result_of(folder_of(out, "", SEEDS[0]))
    machine = {k: some[k] for k in ("device", "dtype", "compile", "torch", "numpy", "python", "val_sha256")}
    return dict(noise_sd=noise, machine=machine, control_knobs=study.arms()[""], rows=rows)


def verdict(row: dict, noise: float) -> str:
    """By 3.3 standard errors: with fifty arms about one in twenty sweeps names an arm that does nothing."""
    limit = 3.3 * max(row["sd"], noise) / math.sqrt(row["n"])
    return "inside noise" if abs(row["mean"]) <= limit else "better" if row["mean"] < 0 else "worse"


def table(study: Study, out: Path, json_path: Path | None) -> None:
    found = collect(study, out)
    for row in found["rows"]:
        row["verdict"] = verdict(row, found["noise_sd"])
    if json_path:
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"noise: sd {found['noise_sd']:.4f} of one paired difference\n")
    head = "arm there lines ms extra bpb sd n verdict"
    print(f"| {' | '.join(head.split())} |\n|---|---|--:|--:|--:|--:|--:|--:|---|")
    for row in found["rows"]:
        ms = ["" if row[key] is None else f"{row[key]:+.1f}" for key in ("control_ms", "extra_ms")]
        numbers = [*ms, f"{row['mean']:+.4f}", f"{row['sd']:.4f}", str(row["n"])]
        cells = [
            f"`{row['arm'] or 'control'}`",
            row["state"],
            str(row["lines"] or ""),
            *numbers,
            row["verdict"],
        ]
        print(f"| {' | '.join(cells)} |")
    for row in (row for row in found["rows"] if row["average"]):
        changes = list(row["average"].values())
        spread = f"sd {stdev(changes):.4f}, n {len(changes)}"
        print(f"{row['arm']}: average against its own live weights {mean(changes):+.4f}, {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("run", "time", "table"))
    parser.add_argument("--study", choices=STUDIES, default="ideas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "data/datasets/pydocs_sp1024")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "data/tokenizers/pydocs_1024_bpe.model")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--json", type=Path, help="with `table`: also write everything here")
    options = parser.parse_args()
    out, study = options.out.resolve(), STUDIES[options.study]
    if options.action == "run":
        run(study, out, options.data, options.tokenizer, options.workers)
    elif options.action == "time":
        time_all(study, out)
    else:
        table(study, out, options.json)


if __name__ == "__main__":
    main()
