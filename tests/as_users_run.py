"""The same seed gives the same bits, the way people run it: compiled, in the default type, on all threads.

    bash tests/as_users_run.sh                                  # every family
    bash tests/as_users_run.sh plain depth                      # these
    bash tests/as_users_run.sh plain --script OLD/train_gpt.py  # of another version of the script

The other tests run eagerly, in float32, on one thread: quick, and blind to what only several threads of
compiled code do. Here each family of knobs is run four times, each time as new processes on the embedded
corpus: twice from start to end, once stopped by SIGTERM in the middle and resumed, once killed by SIGKILL
and resumed from a checkpoint. Two of the families run under torchrun with two ranks as well. All losses,
all scores (as the event log has them, unrounded) and the packed model must be equal.

Prints one line a family. Exit codes: 0 all is equal, 1 something differs or failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402

from train_gpt import PREEMPTED, Config, fields  # noqa: E402

# Small enough for a step in 50 ms, large enough for every operation to be split over the threads.
BASE = """
    NUM_LAYERS=2 MODEL_DIM=64 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=4096
    ITERATIONS=30 WARMDOWN_ITERS=8 MUON_MOMENTUM_WARMUP_STEPS=10 WARMUP_STEPS=2 MAX_WALLCLOCK_SECONDS=0
    VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=1 RUN_ID=r
"""

FAMILIES = {
    "plain": "",
    "tidal_1434": """
        TIDAL_LR=1 LOGIT_SOFTCAP=15 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 HEAD_DIVERSITY=1e-4
        EMBED_LR=0.8 MATRIX_LR=0.11 ENCODER_LAYERS=0 TIE_EMBEDDINGS=0 ALLOW_INERT=1
    """,
    "depth": "NUM_REPEATS=3 PROG_DEPTH=0.35:1,0.65:2,1.0:3",
    "swa": "SWA_ENABLED=1 SWA_EVERY=2 SWA_START_FRAC=0.9",
    "values_xsa": "NUM_VALUE_EMBEDS=2 XSA_LAST_N=-1",
    "accumulation": "MICRO_BATCH_TOKENS=1024",
    "sliding_hedge": "EVAL_STRIDE=64 USE_HEDGE=1 SCORE_CHECK=1",
    "ttt": "TTT_STEPS=1 TTT_CHUNK_TOKENS=4096",
    "drop_sam_shuffle": "LAYER_DROP=0.3 SAM_RHO=0.05 DATA_SHUFFLE=1",
}
TWO_RANKS = ("depth", "sliding_hedge")  # run with one rank and with two
WAYS = ("first", "again", "SIGTERM", "SIGKILL")  # of running a family: twice undisturbed, and stopped so

VALIDATION_TOKENS = 16_384  # of the corpus's 362,211: the scores take a second, not ten
STOP_AFTER = 12  # steps; a checkpoint is there by then, and the first change of depth is over
PATIENCE = 1200  # seconds that a run may take; on idle cores it takes 10 to 30


class Failed(Exception):
    """A run ended otherwise than it should."""


def knobs_of(words: str) -> dict[str, str]:
    """The knobs in a line of KNOB=VALUE."""
    return dict(word.split("=", 1) for word in words.split())


def embedded_corpus(folder: Path) -> dict[str, str]:
    """DATA_PATH and TOKENIZER_PATH of the corpus that run_best.sh makes, its validation text cut short."""
    made, tokenizer = ROOT / "data/datasets/pydocs_sp1024", ROOT / "data/tokenizers/pydocs_1024_bpe.model"
    subprocess.run([sys.executable, ROOT / "data/pydocs.py"], check=True, stdout=subprocess.DEVNULL)
    for shard in made.glob("*_train_*.bin"):
        (folder / shard.name).symlink_to(shard)
    for shard in made.glob("*_val_*.bin"):
        header = np.fromfile(shard, dtype="<i4", count=256)
        tokens = np.fromfile(shard, dtype="<u2", offset=header.nbytes, count=VALIDATION_TOKENS)
        header[2] = len(tokens)
        (folder / shard.name).write_bytes(header.tobytes() + tokens.tobytes())
    return dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(tokenizer))


@dataclass(frozen=True)
class Trace:
    """What a finished run left that must not depend on how often it was started."""

    losses: list[tuple[int, float]]  # by step; a step that was done twice and differs is there twice
    scores: list[tuple[str, float, float]]  # name, nats a token, bits a byte
    artifact: str  # sha256
    resumed: list[int] = field(compare=False)  # the steps it went on from

    def difference(self, other: Trace) -> str:
        """Where the other one leaves this one first, or ''."""
        apart = [step for step, _ in set(self.losses) ^ set(other.losses)]
        if apart:
            return f"step {min(apart)}"
        if self.scores != other.scores:
            return " and ".join(sorted({score[0] for score in set(self.scores) ^ set(other.scores)}))
        return "the packed model" if self.artifact != other.artifact else ""


def read_events(out: Path) -> list[dict]:
    """The events that a run has logged by now; it may be within a line."""
    path = out / "logs/r.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_trace(out: Path) -> Trace:
    """What the run in this folder left."""
    losses, scores, resumed = set(), set(), []
    for event in read_events(out):
        if event["event"] == "step":
            losses.add((event["step"], event["train_loss"]))
        elif event["event"] in ("val", "average", "score"):
            name = event.get("name") or event["event"]
            scores.add((name, event["val_loss"], event["val_bpb"]))
        elif event["event"] == "resumed":
            resumed.append(event["step"])
    artifact = hashlib.sha256((out / "final_model.int8.ptz").read_bytes()).hexdigest()
    return Trace(sorted(losses), sorted(scores), artifact, resumed)


@dataclass
class Family:
    """A set of knobs and the processes that run it."""

    script: Path
    env: dict[str, str]  # the knobs, the data and what a process needs
    folder: Path  # each of its runs gets one below
    ranks: int = 1
    ways: tuple[str, ...] = WAYS

    def start(self, out: Path, **more: str) -> subprocess.Popen:
        """A run of the script in processes of its own; its output goes beside its logs."""
        out.mkdir(parents=True, exist_ok=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        command = [sys.executable, *(torchrun if self.ranks > 1 else []), str(self.script)]
        env = self.env | dict(OUT_DIR=str(out)) | more
        with (out / "output").open("a") as output:
            return subprocess.Popen(command, cwd=out, env=env, stdout=output, stderr=subprocess.STDOUT)

    def finish(self, out: Path, process: subprocess.Popen, expected: int = 0) -> None:
        """Wait for a run; Failed unless it ends with this exit code."""
        code = process.wait(PATIENCE)
        if code != expected:
            last = (out / "output").read_text().strip().splitlines()[-1:]
            raise Failed(f"exit code {code}, not {expected}: {' '.join(last)}; see {out}")

    def uninterrupted(self, name: str) -> Trace:
        """A run from start to end."""
        out = self.folder / name
        self.finish(out, self.start(out))
        return read_trace(out)

    def stopped(self, name: str, stop: Callable[[subprocess.Popen], int], **more: str) -> Trace:
        """A run that is stopped in the middle of its training and goes on."""
        out = self.folder / name
        process = self.start(out, **more)
        self.wait_for_step(out, process)
        self.finish(out, process, expected=stop(process))
        self.finish(out, self.start(out, RESUME="auto", **more))
        trace = read_trace(out)
        last = int(self.env["ITERATIONS"])
        if len(trace.resumed) != 1 or not 0 < trace.resumed[0] < last:
            raise Failed(f"it was to be stopped in the middle, and resumed from {trace.resumed}; see {out}")
        return trace

    def wait_for_step(self, out: Path, process: subprocess.Popen) -> None:
        """Until the log has the step after which it is stopped."""
        deadline = time.monotonic() + PATIENCE
        while not any(e["event"] == "step" and e["step"] >= STOP_AFTER for e in read_events(out)):
            if process.poll() is not None or time.monotonic() > deadline:
                self.finish(out, process, expected=PREEMPTED)
                raise Failed(f"it ended before step {STOP_AFTER}; see {out}")
            time.sleep(0.01)

    def terminate(self, process: subprocess.Popen) -> int:
        """SIGTERM, to torchrun where there is one; returns the exit code that must follow."""
        process.send_signal(signal.SIGTERM)
        return PREEMPTED if self.ranks == 1 else 1

    def kill(self, process: subprocess.Popen) -> int:
        """SIGKILL, to the last rank under torchrun, which ends the others; returns the exit code."""
        if self.ranks == 1:
            process.kill()
            return -signal.SIGKILL
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        return 1

    def trace(self, way: str) -> Trace:
        """What one way of running it leaves."""
        if way == "SIGTERM":
            return self.stopped(way, self.terminate)
        if way == "SIGKILL":
            # A checkpoint after each step: all steps of a small family may take less than 0.2 s.
            return self.stopped(way, self.kill, CHECKPOINT_SECONDS="0.001")
        return self.uninterrupted(way)

    def traces(self) -> dict[str, Trace]:
        """What each way of running it leaves."""
        return {way: self.trace(way) for way in self.ways}


def environment(words: str, data: dict[str, str]) -> dict[str, str]:
    """Of a run with these knobs: this process's own without any knob, nor a number of threads.

    Threads that wait sleep instead of spinning: the bits are the same, and where other work shares the
    cores a step takes 60 ms and not 600."""
    left_out = {f.name.upper() for f in fields(Config)} | {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env | knobs_of(BASE) | knobs_of(words) | data


def try_family(title: str, family: Family) -> bool:
    """Run a family and print its line; whether all was equal."""
    began = time.monotonic()
    try:
        traces = family.traces()
    except (Failed, subprocess.TimeoutExpired) as error:
        print(f"{title:<24} FAILED   {error}", flush=True)
        return False
    first, seconds = traces["first"], f"{time.monotonic() - began:.0f} s"
    apart = {name: first.difference(trace) for name, trace in traces.items()}
    if any(apart.values()):
        places = ", ".join(f"{name} at {place}" for name, place in apart.items() if place)
        print(f"{title:<24} DIFFERS  {places}; {seconds}", flush=True)
        return False
    counts = f"{len(first.losses)} losses, {len(first.scores)} scores"
    steps = " and ".join(str(trace.resumed[0]) for trace in traces.values() if trace.resumed)
    print(f"{title:<24} equal    {counts}; resumed from steps {steps}; {seconds}", flush=True)
    return True


def try_families(titles: list[str], options: argparse.Namespace, folder: Path) -> bool:
    """Run these families, some at once; whether all was equal in all of them."""
    (folder / "data").mkdir()
    data = embedded_corpus(folder / "data")
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = []
        for title in titles:
            for ranks in (1, 2) if title in TWO_RANKS else (1,):
                if options.ranks in (None, ranks):
                    env, where = environment(FAMILIES[title], data), folder / f"{title}-{ranks}"
                    family = Family(options.script.resolve(), env, where, ranks)
                    label = title if ranks == 1 else f"{title}, {ranks} ranks"
                    verdicts.append(pool.submit(try_family, label, family))
        return all([verdict.result() for verdict in verdicts])


def parse_arguments() -> argparse.Namespace:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"default all: {' '.join(FAMILIES)}")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="a version of the script")
    parser.add_argument(
        "--jobs", type=int, default=2, help="families at once: half of each run is one thread"
    )
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="only with so many ranks")
    options = parser.parse_args()
    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown:
        parser.error(f"no family {' '.join(unknown)}; there are {' '.join(FAMILIES)}")
    if not options.script.is_file():
        parser.error(f"--script {options.script} is no file")
    return options


def main() -> int:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="as_users_run-") as name:
        all_equal = try_families(options.families or list(FAMILIES), options, Path(name))
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
