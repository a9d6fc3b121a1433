"""What stopping and going on costs, and whether it is exact. Three measurements, each a JSON report:

    python tests/bench/bench_resume.py kills --count 120 --out records/benchmarks/kills.json
    python tests/bench/bench_resume.py cost --out records/benchmarks/checkpoint_cost.json
    python tests/bench/bench_resume.py exits --count 100 --out records/benchmarks/exit_codes.json

kills: tiny runs are stopped at random moments, go on with RESUME=auto until they finish, and everything
they leave is compared with an uninterrupted run's. cost: milliseconds of a checkpoint. exits: exit codes of
runs of two ranks that end as the script ends, and by a plain sys.exit, as forks or (fresh_exits) as new
interpreters. Not a test: pytest does not collect
this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  before the forks: the first optimiser imports it, for a second

import train_gpt  # noqa: E402
from tests.bench.bench_throughput import Sizes, Variant, commit, preset_env  # noqa: E402
from tests.conftest import env_of, make_dataset  # noqa: E402
from tests.support.forkserver import ForkServer, left_behind  # noqa: E402

SEQUENCE = dict(iterations=14, train_log_every=1, run_id="r")
CONFIGS = dict(
    plain=dict(),
    depth_swa=dict(
        num_repeats=3, prog_depth="0.3:2,1.0:3", swa_enabled=1, swa_every=2, swa_start_frac=0.9,
        data_shuffle=1, eval_stride=16, use_hedge=1,
    ),
    ema_memory=dict(
        ema_decay=0.8, head_prune=0.5, head_prune_at=0.3, synaptic_scale=1, grad_clip_norm=1.0,
        eval_stride=16, ttt_steps=1, ttt_chunk_tokens=2048,
    ),
    noise=dict(
        token_drop=0.1, embed_mixup=0.2, weight_perturb=0.01, perturb_interval=3, sam_rho=0.05,
        layer_drop=0.3, quant_levels=31, val_loss_every=5, data_shuffle=1,
    ),
)  # fmt: skip

# Run in every rank: rank 0 keeps the name of what it does in the file `phase`.
PHASES = """
import os
def note(name):
    os.pwrite(file, name.ljust(20).encode(), 0)
def noted(name, inside):
    def call(*given, **named):
        before = os.pread(file, 20, 0).decode().strip()
        note(name)
        made = inside(*given, **named)
        note(before)
        return made
    return call
if rank == 0:
    file = os.open("phase", os.O_RDWR | os.O_CREAT)
    note("start")
    names = dict(warm_up="warm-up", train="training", validate="validation", save_model="packing")
    names |= dict(score_artifact="evaluation", finish="end", report_end="average")
    for function, name in names.items():
        setattr(train_gpt, function, noted(name, getattr(train_gpt, function)))
    train_gpt.Checkpoints.write = noted("checkpoint write", train_gpt.Checkpoints.write)
"""


def machine() -> dict[str, object]:
    """Device and versions, and the commit."""
    about = train_gpt.describe_machine(train_gpt.Runtime())
    kept = ("device", "python", "torch", "numpy")
    load = round(os.getloadavg()[1], 1)  # before it starts: other work on the machine makes times longer
    return dict(commit=commit(), cores=os.cpu_count(), load=load, **{name: about[name] for name in kept})


class Kills:
    """Counts over chains of runs, each stopped some times."""

    def __init__(self, seed: int):
        self.random, self.server = random.Random(seed), ForkServer()
        self.data = make_dataset(Path(tempfile.mkdtemp()))
        self.signals, self.phases, self.codes = Counter(), Counter(), Counter()
        self.compared, self.resumed, self.finished = Counter(), 0, 0
        self.mismatches, self.whole = [], {}

    def once(self, folder: Path, ranks: int, kill=None, **knobs) -> list[int]:
        for name in ("phase", "killed"):
            (folder / name).unlink(missing_ok=True)
        env = env_of(self.data, **SEQUENCE, **knobs)
        return self.server.run(folder, env, ranks=ranks, patch=PHASES, kill=kill)

    def reference(self, name: str, ranks: int) -> tuple[dict, float]:
        """What an uninterrupted run leaves, and its seconds; made once."""
        if (name, ranks) not in self.whole:
            for _ in range(2):  # the first of its kind is slower
                folder, began = Path(tempfile.mkdtemp()), time.perf_counter()
                codes = self.once(folder, ranks, **CONFIGS[name])
                seconds = time.perf_counter() - began
                assert codes == [0] * ranks, (codes, (folder / "0.err").read_text())
            self.whole[name, ranks] = left_behind(folder, "r"), seconds
        return self.whole[name, ranks]

    def kill(self, folder: Path, ranks: int, seconds: float, knobs: dict) -> bool:
        """Stop a run at a random moment; whether that came before its end."""
        number = self.random.choice((signal.SIGTERM, signal.SIGKILL))
        rank = self.random.choice((*range(ranks), None))
        when = self.random.uniform(0.0, 1.05 * seconds)
        codes = self.once(folder, ranks, [when, number, rank], **knobs)
        if codes == [0] * ranks:
            return False
        phase = (folder / "killed").read_text().strip() if (folder / "killed").exists() else "start"
        self.signals[f"{number.name} at {ranks} ranks"] += 1
        self.phases[phase] += 1
        self.codes[f"{number.name}: {sorted(codes)}"] += 1
        return True

    def chain(self, number: int) -> None:
        """One run, stopped up to four times, then finished and compared."""
        name, ranks = list(CONFIGS)[number % len(CONFIGS)], 1 + number // len(CONFIGS) % 2
        expected, seconds = self.reference(name, ranks)
        folder, knobs = Path(tempfile.mkdtemp()), dict(CONFIGS[name])
        knobs["checkpoint_seconds"] = self.random.choice((0, 1e-9, 0.05))
        stops = [self.kill(folder, ranks, seconds, knobs)]
        knobs["resume"] = "auto"
        for _ in range(self.random.randrange(4)):
            stops += [self.kill(folder, ranks, seconds, knobs)] if stops[-1] else []
        if stops[-1]:
            codes = self.once(folder, ranks, **knobs)
            if codes == [2] * ranks and '"status": "ok"' in (folder / "logs/r.txt").read_text():
                self.finished += 1  # killed after its RESULT: there was nothing left to do
            elif codes != [0] * ranks:
                error = (folder / "0.err").read_text()[-1500:]
                return self.mismatches.append(dict(config=name, ranks=ranks, codes=codes, error=error))
        found = left_behind(folder, "r")
        self.compared[f"{name} at {ranks} ranks"] += any(stops)
        self.resumed += any(json.loads(line).get("path", "no c")[:4] != "no c" for line in resumes(folder))
        wrong = [key for key in expected if expected[key] != found[key]]
        if wrong:
            self.mismatches.append(dict(config=name, ranks=ranks, differ=wrong, folder=str(folder)))


def resumes(folder: Path) -> list[str]:
    """The `resumed` events of a run."""
    lines = (folder / "logs/r.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["event"] == "resumed"]


def kills(count: int) -> dict[str, object]:
    kills, number, began = Kills(seed=1), 0, time.perf_counter()
    while kills.signals.total() < count:
        kills.chain(number)
        number += 1
        done = f"kills:{kills.signals.total()} compared:{kills.compared.total()}"
        print(f"{time.perf_counter() - began:.0f}s {done} mismatches:{kills.mismatches}", flush=True)
    kills.server.close()
    return dict(
        kills=kills.signals.total(),
        by_signal=dict(sorted(kills.signals.items())),
        by_phase=dict(kills.phases.most_common()),
        by_exit_codes=dict(sorted(kills.codes.items())),
        runs_compared=kills.compared.total(),
        by_config=dict(kills.compared),
        of_them_resumed_from_a_checkpoint=kills.resumed,
        of_them_killed_after_their_result=kills.finished,
        compared=[*next(iter(kills.whole.values()))[0]],
        mismatches=kills.mismatches,
        uninterrupted_seconds={f"{n} at {r} ranks": round(s, 2) for (n, r), (_, s) in kills.whole.items()},
        config=SEQUENCE | dict(configs=CONFIGS, checkpoint_seconds=[0, 1e-9, 0.05]),
    )


COSTS = dict(
    tiny="NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=32 TRAIN_BATCH_TOKENS=512",
    small="NUM_LAYERS=4 MODEL_DIM=256 TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=8192",
    baseline="TRAIN_BATCH_TOKENS=1024",
    baseline_ema="TRAIN_BATCH_TOKENS=1024 EMA_DECAY=0.999",
)


def cost_of(knobs: dict[str, str], count: int) -> dict[str, object]:
    """One configuration: milliseconds that training stands still for a checkpoint."""
    variant, folder = Variant(knobs | dict(DEVICE="cpu", COMPILE="0", DTYPE="fp32")), Path(tempfile.mkdtemp())
    variant.build()
    run, times, sizes = variant.run, [], []
    run.checkpoints = train_gpt.Checkpoints(folder, dict(kind=train_gpt.CHECKPOINT, run_id="r", resumed=[]))
    training = train_gpt.Training(run, variant.optimisers, 0.0)
    for training.step in range(count):
        training.sound[0] = training.step
        began = time.perf_counter()
        training.save(0.0)
        times.append(1000 * (time.perf_counter() - began))
        sizes.append(run.checkpoints.paths[-1].stat().st_size)
    assert len(list(folder.iterdir())) == 2
    began = time.perf_counter()
    train_gpt.read_checkpoint(run.checkpoints.paths[-1])
    reading = 1000 * (time.perf_counter() - began)
    return dict(
        knobs=knobs,
        params=sum(p.numel() for p in run.model.parameters()),
        checkpoint_bytes=sizes[-1],
        ms_per_checkpoint=round(median(times), 2),
        ms_per_checkpoint_most=round(max(times), 2),
        ms_per_minute_of_training_at_60_s=round(median(times), 2),
        share_of_wall_time_at_60_s=round(median(times) / (60_000 + median(times)), 6),
        ms_to_read_one=round(reading, 2),
    )


def cost(count: int) -> dict[str, object]:
    base = preset_env("baseline", Sizes())
    rows = {}
    for name, words in COSTS.items():
        rows[name] = cost_of(base | dict(word.split("=") for word in words.split()), count)
        print(name, json.dumps(rows[name]), flush=True)
    note = "at CHECKPOINT_SECONDS=60 a minute of training has one; the training clock stands still for it"
    return dict(checkpoints=count, threads=torch.get_num_threads(), note=note, rows=rows)


def meeting() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]), WORLD_SIZE="2")


def forked(folder: Path, env: dict[str, str], plain: bool) -> list[int]:
    """Exit codes of two forks that become ranks of a run. Each leaves through the whole stack of this file,
    as SystemExit: what a plain exit ends with is the interpreter's own finalisation."""
    children, env = [], env | meeting()
    for rank in range(2):
        sys.stdout.flush()
        children.append(os.fork())
        if children[-1] == 0:
            os.chdir(folder)
            for name, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.clear()
            os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = ["train_gpt.py"]
            if plain:
                os._exit = sys.exit
            train_gpt.main()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def fresh(folder: Path, env: dict[str, str], plain: bool) -> list[int]:
    """The same of two new interpreters."""
    swap = "os._exit = sys.exit" if plain else ""
    code = f"import os, sys\n{swap}\nsys.argv = ['train_gpt.py']\nimport train_gpt\ntrain_gpt.main()"
    env, ranks = env | meeting() | dict(PYTHONPATH=str(Path(train_gpt.__file__).parent)), []
    for rank in range(2):
        with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
            where = dict(RANK=str(rank), LOCAL_RANK=str(rank))
            command = [sys.executable, "-c", code]
            ranks.append(subprocess.Popen(command, cwd=folder, env=env | where, stdout=out, stderr=err))
    return [rank.wait() for rank in ranks]


def exits(count: int, start: Callable = forked) -> dict[str, object]:
    torch.set_num_threads(1)
    data, rows = make_dataset(Path(tempfile.mkdtemp())), {}
    knobs = dict(iterations=2, warmdown_iters=0, run_id="r")
    for plain in (False, True):
        codes, results, began = Counter(), 0, time.perf_counter()
        for number in range(count):
            folder = Path(tempfile.mkdtemp())
            ends = start(folder, env_of(data, **knobs), plain)
            codes[str(ends)] += 1
            results += "\nRESULT " in (folder / "0.out").read_text()
            if number % 10 == 9:
                print(f"plain:{plain} {time.perf_counter() - began:.0f}s {dict(codes)}", flush=True)
        name = "plain sys.exit" if plain else "as the script does: flush, os._exit"
        aborted = sum(n for ends, n in codes.items() if "-6" in ends)
        rows[name] = dict(runs=count, with_a_result=results, aborted=aborted, by_exit_codes=dict(codes))
    return dict(ranks=2, backend="gloo", processes=start.__name__, config=knobs, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts: dict[str, Callable] = dict(kills=kills, cost=cost, exits=exits)
    parts["fresh_exits"] = partial(exits, start=fresh)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--count", type=int, default=10, help="kills, checkpoints or runs of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = dict(benchmark=f"resume_{options.part}", **machine(), **parts[options.part](options.count))
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
