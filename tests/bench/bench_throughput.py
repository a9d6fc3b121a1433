"""Training throughput of a preset on this machine: where a step's time goes, and what another script does.

    python tests/bench/bench_throughput.py baseline NUM_LAYERS=4 MODEL_DIM=256
    python tests/bench/bench_throughput.py baseline --vary COMPILE=0,1 --vary DTYPE=bf16,fp32 --out bench.json
    torchrun --nproc_per_node=8 tests/bench/bench_throughput.py baseline
    python tests/bench/bench_throughput.py baseline --ranks 1,2        on one machine, the cores shared out
    python tests/bench/bench_throughput.py baseline --against ../parameter-golf/train_gpt.py

The program's own training loop is run on random tokens, without validation and clock, at full depth. Every
combination of --vary is one variant. They take turns, a block of steps each (A B C A B C ...), so that a
drift of the machine touches all alike; the first steps of a block are left out. On CUDA the parts are timed
in blocks of their own, which wait for the device. --ranks and --against let whole processes take turns;
--against gives both scripts the same shards and environment, and on a CPU runs a copy that needs no CUDA.
Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train_gpt  # noqa: E402
from data.user_error import UserError  # noqa: E402
from sweeps.lab.show import step_flops  # noqa: E402
from sweeps.lab.wave_spec import Sizes, preset_env  # noqa: E402
from tests.bench import official  # noqa: E402
from tests.bench.step_parts import PARTS, train_block  # noqa: E402

PLAN = train_gpt.StepPlan(progress=0.0, lr_scale=1.0, muon_momentum=0.95)
# Dense bf16 FLOP/s of NVIDIA's data sheets, by a part of the card's name.
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def measured_peak(runtime: train_gpt.Runtime) -> float:
    """FLOP/s of a large square product in the run's dtype: what this device gives at best, today."""
    size = 8192 if runtime.is_cuda else 2048
    a = torch.randn(size, size, device=runtime.device).to(runtime.dtype)
    times = []
    for _ in range(8):
        runtime.synchronize()
        start = time.perf_counter()
        torch.mm(a, a)
        runtime.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def compiler_counts() -> Counter:
    """Graphs compiled so far, and how often a cache on disk had them; 0 where this torch does not count."""
    if "torch._dynamo.utils" not in sys.modules:
        return Counter()
    counters = sys.modules["torch._dynamo.utils"].counters
    found = Counter(graphs=counters["stats"]["unique_graphs"])
    for group, names in dict(inductor="fxgraph_cache", aot_autograd="autograd_cache").items():
        for kind in ("hit", "miss", "bypass"):
            found[f"{names}_{kind}"] = counters[group][f"{names}_{kind}"]
    return found


def part_rows(steps: list[Counter]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each part of a step, and its share of all the time."""
    total = sum(sum(step.values()) for step in steps)
    return {
        part: dict(
            ms=round(1000 * median(step[part] for step in steps), 3),
            share=round(sum(step[part] for step in steps) / total, 4),
        )
        for part in PARTS
    }


@dataclass
class Variant:
    """One configuration, built and ready to step."""

    knobs: dict[str, str]
    env: dict[str, str] = field(default_factory=dict)  # torchrun's, where there are several ranks
    steps: list[Counter] = field(default_factory=list)  # timed ones, seconds by part
    times: list[float] = field(
        default_factory=list
    )  # seconds of timed steps; on CUDA of blocks without parts

    def build(self) -> None:
        self.stack = ExitStack()  # closed with the process: the ranks are one group until then
        self.cfg = replace(train_gpt.Config.from_env(self.knobs), prog_depth="", warmup_steps=0)
        self.runtime = self.stack.enter_context(train_gpt.Runtime.launch(self.cfg, self.env))
        torch.manual_seed(self.cfg.seed)
        model = train_gpt.GPT(self.cfg, self.runtime.dtype).to(self.runtime.device)
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.stream = self.random_shard(folder)
        log = train_gpt.RunLog(folder if self.runtime.rank == 0 else None, "bench")
        self.run = train_gpt.Run(self.cfg, self.runtime, log, model, None)
        self.optimisers = train_gpt.Optimisers(self.cfg, model, self.runtime)
        self.batch = next(train_gpt.batches(self.cfg, self.stream, self.runtime))
        self.limit = self.run.settle(lambda: train_gpt.fit_micro_batch(self.run, self.batch))
        self.first = self.step()
        self.step()
        self.built, self.peak_memory = compiler_counts(), 0

    def random_shard(self, folder: Path) -> train_gpt.TokenStream:
        """Random tokens for four steps, which are then read again."""
        tokens = np.random.default_rng(0).integers(self.cfg.vocab_size, size=4 * self.cfg.train_batch_tokens)
        official.write_shard(folder / "random_train_000000.bin", np.append(tokens, 0).astype(np.uint16))
        return train_gpt.TokenStream(str(folder), "train", self.cfg.vocab_size)

    def step(self) -> float:
        """Seconds of one optimiser step outside the loop, of the same batch each time."""
        self.runtime.synchronize()
        start = time.perf_counter()
        train_gpt.train_step(self.run, self.optimisers, self.batch, PLAN, self.limit)
        self.runtime.synchronize()
        return time.perf_counter() - start

    def block(self, steps: int) -> None:
        """So many timed steps of the real loop, after those that are not: the first waits for a batch, and on
        CUDA the first ten are all logged and the clock is not yet paced by the device."""
        cuda, skip = self.runtime.is_cuda, 12 if self.runtime.is_cuda else 1
        for split in (False, True) if cuda else (True,):
            timed = train_block(self.run, self.optimisers, self.stream, self.limit, skip + steps, split)[
                skip:
            ]
            self.steps += timed if split else []
            self.times += [] if cuda and split else [sum(step.values()) for step in timed]
        self.peak_memory = max(self.peak_memory, self.runtime.peak_memory_mib()[0])

    def counted_flops(self) -> float:
        """FLOPs of the products that torch counts in an eager pass of one sequence, times the sequences."""
        ids, targets = (part[:1].to(self.runtime.device) for part in self.batch)
        with FlopCounterMode(display=False) as counter:
            train_gpt.training_loss(self.cfg, self.run.model)(ids, targets)[0].backward()
        return counter.get_total_flops() * self.cfg.sequences

    def report(self, peak: float) -> dict[str, object]:
        """The JSON row. Peak memory is the process's on a CPU, so with several variants that of all."""
        seconds, machine = median(self.times), train_gpt.describe_machine(self.runtime)
        flops, ranks = step_flops(self.cfg, self.run.model), self.runtime.world_size
        sheet = next((rate for name, rate in DATASHEET.items() if name in machine["device"]), None)
        now = compiler_counts()
        return dict(
            knobs=self.knobs,
            **machine,
            params=sum(p.numel() for p in self.run.model.parameters()),
            micro_batch_tokens=self.limit * self.cfg.train_seq_len,
            tokens_per_second=round(self.cfg.train_batch_tokens / seconds),
            ms_per_step=round(1000 * seconds, 2),
            ms_per_step_p95=round(1000 * quantiles(self.times, n=20, method="inclusive")[-1], 2),
            steps=len(self.times),
            parts=part_rows(self.steps),
            first_step_seconds=round(self.first, 2),
            recompiles=now["graphs"] - self.built["graphs"],
            flops_per_step=round(flops),
            counted_flops_per_step=round(self.counted_flops()),
            flops_per_second=round(flops / seconds),
            peak_flops_per_second=round(peak * ranks),
            share_of_peak=round(flops / seconds / (peak * ranks), 4),
            mfu_datasheet=round(flops / seconds / (sheet * ranks), 4) if sheet else None,
            peak_memory_mib=self.peak_memory,
        )


def commit() -> str:
    """The checkout's commit, with a + if files differ from it; '' outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def variants(base: dict[str, str], vary: list[str], env: dict[str, str]) -> list[Variant]:
    """Every combination of the --vary lists over the base knobs."""
    axes = [
        [(name, value) for value in values.split(",")] for name, values in (v.split("=", 1) for v in vary)
    ]
    return [Variant({**base, **dict(choice)}, env) for choice in itertools.product(*axes)]


def here(options: argparse.Namespace, base: dict[str, str]) -> dict[str, object]:
    """The variants in this process; with torchrun's environment its ranks train together."""
    env = {name: os.environ[name] for name in os.environ if "RANK" in os.environ and name not in KNOBS}
    rows = variants(base, options.vary, env)
    if len(rows) != 1 and env:
        raise train_gpt.RunError("--vary needs one process: ranks join only once")
    for row in rows:
        row.build()
    for _ in range(options.rounds):
        for row in rows:
            row.block(options.steps)
    peaks = {row.runtime.dtype: measured_peak(row.runtime) for row in rows}
    report = dict(rows=[row.report(peaks[row.runtime.dtype]) for row in rows])
    for row in rows:
        row.stack.close()
    return report


def over_ranks(options: argparse.Namespace, base: dict[str, str]) -> dict[str, object]:
    """Whole processes of 1, 2, ... ranks in turn; each round's speed-up over the first number."""
    counts = [int(count) for count in options.ranks.split(",")]
    found: dict[int, list[dict]] = {count: [] for count in counts}
    knobs, cores = [f"{name}={value}" for name, value in base.items()], os.cpu_count() or 1
    for _ in range(options.rounds):
        for count in counts:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={count}", __file__, options.preset, *knobs]
            command += ["--rounds", "1", "--steps", str(options.steps)]
            env = dict(os.environ, OMP_NUM_THREADS=str(max(1, cores // count)))
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            last = " ".join(done.stderr.strip().splitlines()[-1:])
            if "{" not in done.stdout:
                raise train_gpt.RunError(f"{count} ranks ended with {done.returncode}: {last}")
            found[count].append(json.loads(done.stdout[done.stdout.index("{") :])["rows"][0])
    speed = {n: [row["tokens_per_second"] for row in rows] for n, rows in found.items()}
    return dict(
        tokens_per_second={n: round(median(values)) for n, values in speed.items()},
        speedup={
            n: summary([a / b for a, b in zip(speed[n], speed[counts[0]], strict=True)]) for n in counts
        },
        communication_ms={
            n: summary([row["parts"]["communication"]["ms"] for row in rows]) for n, rows in found.items()
        },
        rows=[row for rows in zip(*found.values(), strict=True) for row in rows],
    )


def summary(values: list[float]) -> dict[str, object]:
    """Median and all of them, so that the spread is seen."""
    return dict(median=round(median(values), 3), all=[round(value, 3) for value in values])


def against(options: argparse.Namespace, base: dict[str, str]) -> dict[str, object]:
    """Our script and another, whole runs in turn: milliseconds a step after the first two, their ratio."""
    first, last, length = 2, 10, int(base.get("TRAIN_SEQ_LEN", 1024))
    cfg = train_gpt.Config.from_env(base)
    source = Path(base.get("DATA_PATH", ROOT / "data/datasets/pydocs_sp1024"))
    tokenizer = base.get("TOKENIZER_PATH", str(ROOT / "data/tokenizers/pydocs_1024_bpe.model"))
    text = options.against.read_text(encoding="utf-8")
    found: dict[str, list[dict]] = dict(ours=[], theirs=[])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = official.official_names(source, folder / "data", 32 * length)
        knobs = dict(base, DATA_PATH=str(data), TOKENIZER_PATH=tokenizer, ITERATIONS=str(last))
        knobs |= dict(WARMUP_STEPS="2", MAX_WALLCLOCK_SECONDS="0", VAL_LOSS_EVERY="0")
        knobs |= dict(VAL_BATCH_SIZE=str(8 * 8 * length))  # eight sequences a pass
        scripts = dict(ours=ROOT / "train_gpt.py", theirs=folder / "their_train_gpt.py")
        on_cpu = cfg.device == "cpu" or not torch.cuda.is_available()
        scripts["theirs"].write_text(official.for_cpu(text, options.against.name) if on_cpu else text)
        for turn in range(options.rounds):
            for name, script in scripts.items():
                found[name].append(official.run_script(script, knobs, folder / f"{name}_{turn}"))
    for row in itertools.chain(*found.values()):
        row["ms_per_step"] = official.step_ms(row["train_ms"], first)
    ms = {name: [row["ms_per_step"] for row in rows] for name, rows in found.items()}
    speed = {name: round(1000 * cfg.train_batch_tokens / median(values)) for name, values in ms.items()}
    machine = train_gpt.describe_machine(train_gpt.Runtime(torch.device("cpu" if on_cpu else "cuda")))
    return dict(
        against=options.against.name,
        against_sha256=hashlib.sha256(text.encode()).hexdigest(),
        knobs=knobs | dict(DATA_PATH=source.name, TOKENIZER_PATH=Path(tokenizer).name),
        **{name: machine[name] for name in ("device", "python", "torch", "numpy")},
        timed_steps=f"{first + 1} to {last}",
        tokens_per_second=speed,
        ms_per_step={name: summary(values) for name, values in ms.items()},
        ratio=summary([b / a for a, b in zip(ms["ours"], ms["theirs"], strict=True)]),
        runs=found,
    )


KNOBS = {f.name.upper() for f in train_gpt.fields(train_gpt.Config)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("preset")
    add("knobs", nargs="*", metavar="KNOB=VALUE")
    add("--vary", action="append", default=[], metavar="KNOB=A,B", help="let these values take turns")
    add("--ranks", metavar="A,B", help="let so many ranks take turns")
    add("--against", type=Path, metavar="SCRIPT", help="let another script and ours take turns")
    add("--steps", type=int, default=5, help="timed steps of a block (default 5)")
    add("--rounds", type=int, default=4, help="turns of each (default 4)")
    add("--out", type=Path, help="write the JSON here too")
    options = parser.parse_intermixed_args()
    base = preset_env(options.preset, Sizes()) | dict(pair.split("=", 1) for pair in options.knobs)
    measure = over_ranks if options.ranks else against if options.against else here
    try:
        found = measure(options, base)
    except (train_gpt.RunError, UserError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    if os.environ.get("RANK", "0") != "0":
        return
    threads = dict(threads=torch.get_num_threads(), cores=os.cpu_count())
    head = dict(benchmark="throughput", preset=options.preset, commit=commit(), **threads)
    text = json.dumps(dict(head, rounds=options.rounds, **found), indent=1)
    print(text)
    if options.out:
        train_gpt.write_atomic(options.out, text.encode() + b"\n")


if __name__ == "__main__":
    main()
