"""Run a wave: all its arms and seeds, each in a process group of its own, one row of results a run.

    bash sweeps/WAVE.sh --plan                     what it would run, how long that takes; runs nothing
    bash sweeps/WAVE.sh                            run it, or go on where it was stopped or killed
    bash sweeps/WAVE.sh --proxy --jobs 2           at the small sizes for one CPU core a run
    python -m sweeps.lab.wave_engine --held-out RUN_ID ...
                                                   score finished runs on the text no choice has seen

Finished runs are never repeated. Ctrl-C or SIGTERM lets the runs save their state; the same command goes on
from it. Rows go to sweeps/results/WAVE.jsonl, the runs' own files to runs/waves/WAVE/RUN_ID.
Exit codes: 0 done, 1 a run crashed, 2 a fault in the wave or the command, 75 stopped, to go on later.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from data.user_error import UserError, tell, tell_os_error
from sweeps.lab import run_process as process
from sweeps.lab import run_rows as rows
from sweeps.lab import validation_halves as halves
from sweeps.lab.paths import RESULTS, ROOT
from sweeps.lab.run_rows import Results, Row
from sweeps.lab.run_state import FINISHED, RunState
from sweeps.lab.wave_spec import CONTROL, KNOBS, Env, Run, Sizes, expand, parse_wave, warnings_of
from train_gpt import write_atomic

TICK, PATIENCE = 0.1, 90.0  # seconds between looks at the runs, and until a stopped run is killed
STOPPED = 75
HERE = "DATA_PATH", "TOKENIZER_PATH", "DEVICE"  # knobs that may come from the environment
MODEL = "final_model.int8.ptz"
PLAIN_CODES = 0, 3, 4, 5, 6, 7  # of a run that will not end otherwise if it is run again


# ------------------------------------------------------------------------------------- the command


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="WAVE.sh", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--plan", action="store_true", help="print the arms, the predicted time and cost; run nothing")
    add("--dry", action="store_true", help="check everything and print every run; run nothing")
    add("--proxy", action="store_true", help="sizes for one CPU core a run; PROXY=1 does the same")
    add("--jobs", type=int, help="runs at once (default: the GPUs, or what the cores allow)")
    add("--threads", type=int, help="CPU threads a run (default: proxy 1, else the cores shared out)")
    add("--engine", choices=("local", "ray"), default="local", help="ray: RAY_ADDRESS, or one of its own")
    add("--out", type=Path, default=ROOT / "runs/waves", help="the runs' files (default runs/waves)")
    add("--results", type=Path, default=RESULTS, help="default sweeps/results")
    add("--data", type=Path, help="folder of shards (default as run_best.sh: FineWeb, else pydocs)")
    add("--tokenizer", type=Path, help="its SentencePiece model")
    add("--val-tokens", type=int, help="select on so many validation tokens, hold out as many more; 0: all")
    add("--only", nargs="+", metavar="ARM", default=[], help="these arms and the control")
    add("--early-kill", metavar="MARGIN[@PROGRESS]", help="end an arm that is worse by so many bpb by then")
    add("--finalists", type=int, default=0, metavar="N", help="then score the N best arms on held-out text")
    add("--again", action="store_true", help="run crashed runs once more")
    add("--usd-per-hour", type=float, help="of the machine, for --plan")
    add("--seconds-per-run", type=float, help="for --plan, where no earlier run tells")
    add("--script", type=Path, default=ROOT / "train_gpt.py", help=argparse.SUPPRESS)
    add("--held-out", nargs="+", metavar="RUN_ID", default=[], help="only score these runs' packed models")
    return parser.parse_args(arguments)


def early_kill_of(text: str | None) -> tuple[float, float] | None:
    """(margin, progress from which it holds); 0.3 unless said."""
    if not text:
        return None
    margin, _, since = text.partition("@")
    try:
        found = float(margin), float(since or 0.3)
    except ValueError:
        found = 0.0, 0.0
    if not (found[0] > 0 and 0 < found[1] < 1):
        raise UserError(f"--early-kill wants MARGIN[@PROGRESS], e.g. 0.05@0.4, not {text}")
    return found


def gpus_here() -> list[str]:
    """The GPUs that runs may have, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return visible[:count] if visible else [str(i) for i in range(count)]


def find_gpus(options: argparse.Namespace) -> list[str]:
    """Of this machine, or of the cluster."""
    if options.engine == "local":
        return gpus_here()
    from sweeps.lab.ray_backend import cluster_gpus

    return [str(i) for i in range(cluster_gpus())]


def find_data(options: argparse.Namespace) -> tuple[Path, Path]:
    """(dataset, tokenizer): as given, else FineWeb, else the embedded corpus, built if need be."""
    data, tokenizer = options.data, options.tokenizer
    data = data or (Path(os.environ["DATA_PATH"]) if os.environ.get("DATA_PATH") else None)
    tokenizer = tokenizer or (
        Path(os.environ["TOKENIZER_PATH"]) if os.environ.get("TOKENIZER_PATH") else None
    )
    if (data is None) != (tokenizer is None):
        raise UserError("--data and --tokenizer go together")
    if data is None or tokenizer is None:
        home = ROOT / "data"
        data, tokenizer = home / "datasets/fineweb10B_sp1024", home / "tokenizers/fineweb_1024_bpe.model"
        if not (tokenizer.is_file() and all(any(data.glob(f"*_{s}_*.bin")) for s in ("train", "val"))):
            data, tokenizer = home / "datasets/pydocs_sp1024", home / "tokenizers/pydocs_1024_bpe.model"
            if subprocess.run([sys.executable, str(home / "pydocs.py")]).returncode:
                raise UserError("no data: data/pydocs.py failed (above)")
    for split in ("train", "val"):
        if not any(data.glob(f"*_{split}_*.bin")):
            raise UserError(f"no {split} shards, *_{split}_*.bin, in {data}")
    if not tokenizer.is_file():
        raise UserError(f"no tokenizer {tokenizer}")
    return data.resolve(), tokenizer.resolve()


def check_environment() -> None:
    """Knobs in the environment would be lost, or worse, reach the runs unseen."""
    stray = [name for name in os.environ if name in KNOBS and name not in HERE]
    if stray:
        raise UserError(
            f"{stray[0]} is set in the environment; a wave takes its knobs from its base line only"
        )


# ------------------------------------------------------------------------------------------- plan


def size_of(config: dict) -> tuple:
    """What decides how long a run takes, on one machine."""
    names = [f.name for f in KNOBS.values() if f.metadata["role"] == "model"]
    names += ["iterations", "max_wallclock_seconds", "train_batch_tokens", "eval_stride", "device"]
    return tuple(config.get(name) for name in names)


def earlier_seconds(folder: Path) -> dict[tuple, list[float]]:
    """Seconds of every whole run in the results, by size."""
    found: dict[tuple, list[float]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in Results(folder, path.stem).latest().values():
            if row.get("state") == RunState.OK and row.get("run_seconds") and not row.get("resumed"):
                found.setdefault(size_of(row["config"]), []).append(row["run_seconds"])
    return found


def predicted(todo: list[Run], options: argparse.Namespace) -> tuple[float | None, str]:
    """(seconds of all runs one after another, where that is from)."""
    if not todo:
        return 0.0, "nothing is left to do"
    known = earlier_seconds(options.results)
    sizes = [size_of(vars(run.cfg)) for run in todo]
    if any(size in known for size in sizes):
        every = median(s for seconds in known.values() for s in seconds)
        times = [median(known.get(size, [every])) for size in sizes]
        runs = sum(len(known.get(size, ())) for size in set(sizes))
        return sum(times), f"from {runs} earlier runs of the same sizes"
    if options.seconds_per_run:
        return options.seconds_per_run * len(todo), f"at {options.seconds_per_run:g} s a run, as given"
    clocks = [run.cfg.max_wallclock_seconds for run in todo]
    if all(clocks):
        return sum(clocks), "the training clocks alone; compiling and scoring come on top"
    return None, "unknown: no earlier run of this size (--seconds-per-run says how long one takes)"


def clock_text(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else (
        f"{minutes / 60:.1f} h"
    )  # fmt: skip


def diff_text(run: Run) -> str:
    return " ".join(f"{name}={value}" for name, value in run.arm.change.items())


def print_plan(runs: list[Run], todo: list[Run], jobs: int, options: argparse.Namespace) -> None:
    """One line an arm, then the numbers."""
    wave = runs[0].wave
    print(f"question  {wave.question}\nbase      {wave.preset} {' '.join(f'{k}={v}' for k, v in wave.own)}")
    print(f"decide    {wave.decide or '-'}\nseeds     {' '.join(map(str, wave.seeds))}")
    first = [run for run in runs if run.seed == run.wave.seeds[0] and not run.rerun]
    width = max(len(run.arm.name) for run in first)
    for name in dict.fromkeys(run.wave.name for run in runs):
        print(f"\n{name}")
        for run in (run for run in first if run.wave.name == name):
            twin = f"  DUPLICATE of {run.duplicate_of}, not run" if run.duplicate_of else ""
            about = f"{diff_text(run)}  # {run.arm.hypothesis}" if run.arm.change else ""
            print(f"  {run.arm.name:{width}}  {about}{twin}")
    twins = sum(bool(run.duplicate_of) for run in runs)
    reruns = sum(run.rerun > 0 for run in runs)
    print(f"\nruns      {len(runs) - twins} ({reruns} reruns of the control), {twins} duplicates not run")
    seconds, source = predicted(todo, options)
    print(f"to do     {len(todo)}, {jobs} at once")
    if seconds is None:
        print(f"time      {source}")
        return
    wall = seconds / max(1, min(jobs, len(todo)))
    print(f"time      {clock_text(wall)} ({source})")
    if options.usd_per_hour:
        print(f"cost      {wall / 3600 * options.usd_per_hour:.2f} USD at {options.usd_per_hour:g} an hour")


# ---------------------------------------------------------------------------------------- backend


class Local:
    """Runs on this machine: one GPU each, or a share of the cores."""

    def __init__(self, gpus: list[str], jobs: int, threads: int):
        cores = process.share_cores(jobs, threads) if not gpus else [()] * jobs
        self.threads = threads
        self.slots = [(gpus[i % len(gpus)] if gpus else None, cores[i]) for i in range(jobs)]
        self.free = list(self.slots)

    def start(self, spec: process.Spec):
        """A handle with poll() and signal(); its place is free again after give_back. A run that is alive
        there already keeps the GPU it has, and counts even where there is no room."""
        there = process.running_on(spec)
        mine = [slot for slot in self.free if there is None or slot[0] in (None, there)]
        slot = mine[0] if mine else None
        gpu, cores = slot or (there, ())
        if slot:
            self.free.remove(slot)
        env = dict(spec.env) | dict(OMP_NUM_THREADS=str(self.threads))
        env |= dict(CUDA_VISIBLE_DEVICES=gpu) if gpu is not None else {}
        handle = process.start(replace(spec, env=env, cores=cores))
        handle.slot = slot
        return handle

    def room(self) -> bool:
        return bool(self.free)

    def width(self) -> int:
        return len(self.slots)

    def give_back(self, handle) -> None:
        self.free += [handle.slot] if handle.slot else []

    def close(self) -> None:
        """Nothing is held beyond the runs."""


# ----------------------------------------------------------------------------------------- engine


@dataclass
class Job:
    """A run that is under way."""

    run: Run
    out_dir: Path
    about: Row
    handle: object
    began: float
    past: bool  # it found files of an earlier attempt
    verdict: str = ""  # why it is being killed early
    looked: float = 0.0


class Engine:
    """Starts runs as there is room, attends them until each has its final row."""

    def __init__(self, runs: list[Run], results: dict[str, Results], backend, options, data):
        self.runs, self.results, self.backend, self.options = runs, results, backend, options
        self.data, self.tokenizer = data
        self.known = {run_id: row for each in results.values() for run_id, row in each.latest().items()}
        self.todo, self.jobs, self.stopping, self.asked = deque(), [], 0.0, 0
        self.crashes, self.seconds, self.limit = Counter(), [], early_kill_of(options.early_kill)
        self.told: set[str] = set()

    # -- rows --

    def out_dir(self, run: Run) -> Path:
        return self.options.out / run.wave.name / run.run_id

    def knobs(self, run: Run) -> Env:
        """Everything that is set for a run."""
        place = dict(
            DATA_PATH=str(self.data), TOKENIZER_PATH=str(self.tokenizer), RUN_ID=run.run_id, RESUME="auto",
            OUT_DIR=str(self.out_dir(run)),
        )  # fmt: skip
        return dict(CHECKPOINT_SECONDS="120") | run.env | place

    def about(self, run: Run) -> Row:
        """The part of a run's row that is known before it starts."""
        wave, arm = run.wave, run.arm
        return dict(
            wave=wave.name, arm=arm.name, seed=run.seed, rerun=run.rerun, run_id=run.run_id,
            hypothesis=arm.hypothesis, question=wave.question, decide=wave.decide, parent=wave.preset,
            change=arm.change, env=rows.portable(self.knobs(run)), config_hash=run.cfg.hash, attempts=0,
            out_dir=os.path.relpath(self.out_dir(run), ROOT),
        )  # fmt: skip

    def write(self, run: Run, row: Row) -> None:
        row = dict.fromkeys(rows.FIELDS) | row
        self.known[run.run_id] = row
        self.results[run.wave.name].append(row)

    def prepare(self) -> None:
        """Refuse results made with other knobs; state duplicates and plans; queue what is left to do."""
        again = (RunState.CRASHED,) if self.options.again else ()
        planned = []
        for run in self.runs:
            row, about = self.known.get(run.run_id), self.about(run)
            state = row["state"] if row else None
            if state in FINISHED and state not in (RunState.DUPLICATE, *again):
                check_same(run, row, about)
            elif run.duplicate_of:
                message = f"the same experiment as {run.duplicate_of}"
                planned.append(
                    (run, about | dict(state=RunState.DUPLICATE, status=RunState.DUPLICATE, message=message))
                )
            else:
                if row and self.changed(run, row) and process.is_alive(self.out_dir(run)):
                    raise UserError(f"{run.run_id} still runs with other knobs; wait for it, then try again")
                self.todo.append(run)
                if state in (None, RunState.DUPLICATE):
                    planned.append((run, about | dict(state=RunState.PLANNED)))
        for run, row in planned:
            self.known[run.run_id] = dict.fromkeys(rows.FIELDS) | row
        for wave in self.results:
            mine = [self.known[run.run_id] for run, _ in planned if run.wave.name == wave]
            self.results[wave].append(*mine)
        for wave in self.results:
            self.script(wave)

    def script(self, wave: str) -> Path:
        """The wave's own copy of the script: one edited meanwhile would make runs that do not compare. What
        the script looks for beside it is there by links."""
        source, home = self.options.script.resolve(), self.options.out / wave / "code"
        copy = home / source.name
        if not copy.exists():
            home.mkdir(parents=True, exist_ok=True)
            for folder in ("sweeps", "records"):
                if not (home / folder).is_symlink():
                    (home / folder).symlink_to(source.parent / folder)
            write_atomic(copy, source.read_bytes())
        elif copy.read_bytes() != source.read_bytes() and wave not in self.told:
            self.told.add(wave)
            where = os.path.relpath(copy)
            self.say(f"warning: {wave} goes on with its own {source.name}, as it was at its start: {where}")
        return copy

    # -- console --

    def say(self, text: str) -> None:
        try:
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
        except OSError:  # its reader is gone; the rows are what counts
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process

    def counts(self) -> str:
        states = Counter(self.known[run.run_id]["state"] for run in self.runs)
        planned, started = (
            len(self.runs) - states[RunState.DUPLICATE],
            sum(states.values()) - states[RunState.PLANNED],
        )
        finished = sum(states[state] for state in FINISHED) - states[RunState.DUPLICATE]
        left, eta = len(self.todo) + len(self.jobs), ""
        if left and self.seconds:
            waits = mean(self.seconds) * (len(self.todo) + 0.5 * len(self.jobs)) / self.backend.width()
            eta = f" | about {clock_text(waits)} left"
        begun = started - states[RunState.DUPLICATE]
        return f"planned {planned} started {begun} finished {finished} valid {states[RunState.OK]}{eta}"

    def delta(self, run: Run, row: Row) -> str:
        """Against the control of the same seed."""
        twin = self.known.get(f"{run.wave.name}.{CONTROL}.{run.seed}")
        same = run.is_control and not run.rerun
        if same or not twin or twin["state"] != RunState.OK or row["state"] != RunState.OK:
            return ""
        return f" ({row['val_bpb'] - twin['val_bpb']:+.4f})"

    # -- one run --

    def begin(self, run: Run) -> None:
        """Start it, or read it if it ended while no engine looked, or wait for it if it is still running."""
        out, before = self.out_dir(run), self.known[run.run_id]
        if self.changed(run, before):  # the wave was edited since; what is there is of another experiment
            shutil.rmtree(out, ignore_errors=True)
        about = self.about(run) | dict(started=before["started"] or time.time())
        about["attempts"] = (before["attempts"] or 0) + 1
        end = rows.ended(rows.read_events(out, run.run_id))
        if end and end.get("exit_code") in PLAIN_CODES and self.crashes[run.run_id] == 0:
            self.settle(run, rows.row_of(about | dict(attempts=before["attempts"]), out))
            return
        past = out.is_dir()
        spec = process.Spec(
            (sys.executable, str(self.script(run.wave.name))), self.knobs(run), str(out), tuple(KNOBS)
        )
        handle = self.backend.start(spec)
        adopted = isinstance(handle, process.Orphan)
        about["attempts"] -= adopted
        began = (out / "run.json").stat().st_mtime if adopted else time.time()
        self.jobs.append(Job(run, out, about, handle, began, past))
        self.write(run, about | dict(state=RunState.RUNNING))
        how = "found running" if adopted else "resume" if past else "start"
        self.say(f"{how:12} {run.run_id}  {diff_text(run)}")

    def changed(self, run: Run, before: Row) -> bool:
        return bool(differences(before["env"] or {}, self.about(run)["env"]))

    def attend(self, job: Job) -> None:
        code = job.handle.poll()
        if code is not None:
            self.jobs.remove(job)
            self.backend.give_back(job.handle)
            self.finish(job, code)
        elif self.limit and not job.verdict and time.time() > job.looked + 1:
            job.looked = time.time()
            self.look(job)

    def look(self, job: Job) -> None:
        """End an arm that is too far behind its control."""
        run, (margin, since) = job.run, self.limit
        control = self.known.get(f"{run.wave.name}.{CONTROL}.{run.seed}")
        if run.is_control or not control or control["state"] != RunState.OK:
            return
        arm = rows.measured(rows.read_events(job.out_dir, run.run_id), {})
        found = rows.behind(control, arm, since)
        if found and found[0] > margin:
            gap, at = found
            job.verdict = (
                f"worse than the control by {gap:.4f} bpb at progress {at:.2f}; the margin is {margin}"
            )
            job.handle.signal(signal.SIGTERM)

    def finish(self, job: Job, code: int) -> None:
        """Judge a run that ended: its final row, or another attempt."""
        run, run_id = job.run, job.run.run_id
        row = rows.row_of(job.about, job.out_dir, code)
        if row["state"] == RunState.OK and (strange := unknown_knobs(run, row)):
            row |= dict(state=RunState.CRASHED, message=f"the wave's copy of the script has no {strange[0]}")
        row["attempts"] += getattr(job.handle, "moves", int)()  # by Ray, when a machine died
        row["run_seconds"] = (self.known[run_id]["run_seconds"] or 0.0) + time.time() - job.began
        if job.verdict and row["state"] in (RunState.PREEMPTED, RunState.CRASHED):
            shutil.rmtree(job.out_dir / "checkpoints", ignore_errors=True)
            return self.settle(run, row | dict(state=RunState.KILLED_EARLY, message=job.verdict))
        if self.stopping and row["state"] in (RunState.PREEMPTED, RunState.CRASHED):
            return self.settle(run, row | dict(state=RunState.PREEMPTED))
        if row["state"] == RunState.PREEMPTED:  # someone else stopped it
            self.write(run, row)
            self.say(f"{RunState.PREEMPTED:12} {run_id}  goes on at once")
            return self.todo.appendleft(run)
        if (
            row["state"] == RunState.CRASHED
            and row["exit_code"] not in PLAIN_CODES
            and not self.crashes[run_id]
        ):
            stale = row["exit_code"] == 2 and job.past
            if stale or row["exit_code"] != 2:
                self.crashes[run_id] += 1
                self.write(run, row | dict(state=RunState.RUNNING))
                self.say(f"{RunState.CRASHED:12} {run_id}  once more, after: {row['message']}")
                if stale:  # left by other code or another setting, so it cannot be gone on with
                    shutil.rmtree(job.out_dir, ignore_errors=True)
                return self.todo.appendleft(run)
        return self.settle(run, row)

    def settle(self, run: Run, row: Row) -> None:
        """A run's last row of this session."""
        row["ended"] = time.time()
        self.write(run, row)
        if row["state"] in FINISHED:
            (self.out_dir(run) / "final_model.pt").unlink(missing_ok=True)  # the packed one stays
            self.seconds += (
                [row["run_seconds"] or 0.0] if row["state"] == RunState.OK and not row["resumed"] else []
            )
        score = (
            f"bpb {row['val_bpb']:.4f}{self.delta(run, row)}"
            if row["state"] == RunState.OK
            else row["message"]
        )
        took = f" {row['run_seconds']:.0f} s" if row.get("run_seconds") else ""
        self.say(f"{row['state']:12} {run.run_id}  {score}{took} | {self.counts()}")

    # -- all --

    def stop(self, number: int, _frame) -> None:
        """Handler of signals: pass it to the runs; the second one kills them."""
        self.asked += 1
        self.stopping = self.stopping or time.time()
        for job in self.jobs:
            job.handle.signal(signal.SIGTERM if self.asked == 1 else signal.SIGKILL)

    def work(self) -> int:
        """Until all is done or a signal stops it. Returns the exit code."""
        numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
        before = {number: signal.signal(number, self.stop) for number in numbers}
        told = False
        try:
            for run in [run for run in self.todo if process.is_alive(self.out_dir(run))]:
                self.todo.remove(run)  # of an engine that was killed: they come first, since they are there
                self.begin(run)
            while self.jobs or self.todo and not self.stopping:
                while self.todo and not self.stopping and self.backend.room():
                    self.begin(self.todo.popleft())
                for job in list(self.jobs):
                    self.attend(job)
                if self.stopping and not told:
                    told = True
                    self.asked = max(1, self.asked)
                    for job in self.jobs:  # one may have begun while the signal came
                        job.handle.signal(signal.SIGTERM)
                    self.say(f"stopping: {len(self.jobs)} runs save their state")
                if self.stopping and time.time() > self.stopping + PATIENCE:
                    for job in self.jobs:
                        job.handle.signal(signal.SIGKILL)
                time.sleep(TICK)
        finally:
            for job in self.jobs:  # an error of the engine's own: leave nothing unattended
                job.handle.signal(signal.SIGTERM)
            self.backend.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if not self.stopping:
            for each in self.results.values():
                each.compact()
        self.say(f"{'stopped' if self.stopping else 'done'}: {self.counts()}")
        crashed = any(self.known[run.run_id]["state"] == RunState.CRASHED for run in self.runs)
        return STOPPED if self.stopping else int(crashed)


def differences(old: Env, new: Env) -> list[str]:
    """Knobs that shape the result and are not the same in two environments, as rows hold them."""
    shaping = [name for name, f in KNOBS.items() if f.metadata["role"] != "place"]
    apart = [name for name in shaping if old.get(name) != new.get(name)]
    return [f"{name}={old.get(name, '(unset)')}, now {new.get(name, '(unset)')}" for name in apart]


def unknown_knobs(run: Run, row: Row) -> list[str]:
    """Knobs of a run that its script did not report: it is older than the wave's arms."""
    return [name for name in run.env if row["config"] and name.lower() not in row["config"]]


def check_same(run: Run, row: Row, about: Row) -> None:
    """Refuse to take a result for this run's that was made with other knobs."""
    apart = differences(row["env"] or {}, about["env"])
    if apart and row["state"] != RunState.DUPLICATE:
        mend = "rename the arm, or move the wave's results away"
        raise UserError(f"{run.run_id} has a result made with {apart[0]}; {mend}")


# --------------------------------------------------------------------------------------- held out


def score_one(row: Row, options: argparse.Namespace) -> float:
    """Bits per byte of a run's packed model on the half of the text that no choice has seen."""
    out = (ROOT / row["out_dir"]).resolve()
    about = json.loads((out / "run.json").read_text())
    env, other = dict(about["env"]), out / "held_out"
    data = Path(env["DATA_PATH"])
    if data.name != halves.SELECTION:
        raise UserError(f"{row['run_id']} was selected on all of the text; --val-tokens holds a part out")
    shutil.rmtree(other, ignore_errors=True)
    env |= dict(
        EVAL_ONLY=str(out / MODEL), DATA_PATH=str(data.with_name(halves.HELD_OUT)), OUT_DIR=str(other),
        RUN_ID=f"{row['run_id']}.held_out", RESUME="0",
    )  # fmt: skip
    hidden = {name: value for name, value in os.environ.items() if name not in KNOBS}
    other.mkdir()
    with (other / "stdout.txt").open("wb") as stdout, (other / "stderr.txt").open("wb") as stderr:
        code = subprocess.run(about["command"], env=hidden | env, stdout=stdout, stderr=stderr).returncode
    result = rows.read_result(other, env["RUN_ID"])
    if code or result.get("val_bpb") is None:
        raise UserError(f"{row['run_id']}: no held-out score, exit code {code}: {rows.last_error(other)}")
    return result["val_bpb"]


def score_held_out(chosen: list[Row], results: dict[str, Results], jobs: int, options) -> None:
    """Score these runs, a few at once, and write it into their rows."""
    fresh = [row for row in chosen if row["held_out_val_bpb"] is None]
    with ThreadPoolExecutor(jobs) as pool:
        for row, bpb in zip(fresh, pool.map(lambda row: score_one(row, options), fresh), strict=True):
            results[row["wave"]].append(row | dict(held_out_val_bpb=bpb))
            print(f"held out     {row['run_id']}  bpb {bpb:.4f} (selection {row['val_bpb']:.4f})", flush=True)


def finalists(known: dict[str, Row], runs: list[Run], count: int) -> list[Row]:
    """The rows of the best arms, by their mean difference to the control of the same seed, and of the control
    itself; only arms whose every seed is valid."""
    chosen: list[Row] = []
    for wave in {run.wave.name: run.wave for run in runs}.values():
        mine = [run for run in runs if run.wave.name == wave.name and not run.rerun and not run.duplicate_of]
        own = {(run.arm.name, run.seed): known[run.run_id] for run in mine}
        means = {}
        for name in dict.fromkeys(run.arm.name for run in mine):
            pairs = [(own[name, seed], own[CONTROL, seed]) for seed in wave.seeds]
            if all(row["state"] == RunState.OK for pair in pairs for row in pair):
                means[name] = mean(a["val_bpb"] - b["val_bpb"] for a, b in pairs)
        best = sorted((name for name in means if name != CONTROL), key=means.get)[:count]
        chosen += [own[name, seed] for name in (CONTROL, *best) if name in means for seed in wave.seeds]
    return chosen


def held_out_only(options: argparse.Namespace) -> int:
    """`--held-out RUN_ID ...` without a wave."""
    waves = {run_id.split(".")[0] for run_id in options.held_out}
    results = claim_results(options.results, waves)
    known = {run_id: row for each in results.values() for run_id, row in each.latest().items()}
    for run_id in options.held_out:
        if run_id not in known or known[run_id]["state"] != RunState.OK:
            raise UserError(f"{run_id} has no valid result in {options.results}")
    score_held_out([known[run_id] for run_id in options.held_out], results, options.jobs or 1, options)
    for each in results.values():
        each.compact()
    return 0


# ------------------------------------------------------------------------------------------- main


def claim_results(folder: Path, waves) -> dict[str, Results]:
    results = {name: Results(folder, name) for name in waves}
    for name, each in results.items():
        if not each.claim():
            raise UserError(f"another engine is running the wave {name}")
    return results


def widths(options: argparse.Namespace, gpus: list[str]) -> tuple[int, int]:
    """(runs at once, CPU threads of each)."""
    cores = process.core_count()
    if min(n for n in (1, options.jobs, options.threads) if n is not None) < 1:
        raise UserError("--jobs and --threads want at least 1")
    usual = options.threads or (1 if options.proxy else None)
    jobs = options.jobs or len(gpus) or max(1, cores // (usual or cores))
    return jobs, usual or max(1, cores // jobs)


def selected(runs: list[Run], only: list[str]) -> list[Run]:
    names = {run.arm.name for run in runs}
    if strange := [name for name in only if name not in names]:
        raise UserError(f"--only {strange[0]}: no such arm ({' '.join(sorted(names - {CONTROL}))})")
    return [run for run in runs if not only or run.arm.name in only or run.is_control]


def run_wave(name: str, words: list[str], options: argparse.Namespace) -> int:
    """Check all of it, then show it or run it."""
    check_environment()
    early_kill_of(options.early_kill)
    gpus = [] if options.proxy or os.environ.get("DEVICE") == "cpu" else find_gpus(options)
    wave = parse_wave(name, words)
    sizes = Sizes(cpu=not gpus, proxy=options.proxy)
    runs = selected(expand(wave, sizes), options.only)
    for line in warnings_of(runs, wave, sizes):
        print(f"warning: {line}", file=sys.stderr)
    jobs, threads = widths(options, gpus)
    names = dict.fromkeys(run.wave.name for run in runs)
    if options.plan or options.dry:
        known = {i: row for name in names for i, row in Results(options.results, name).latest().items()}
        done = {i for i, row in known.items() if row["state"] in FINISHED}
        todo = [run for run in runs if not run.duplicate_of and run.run_id not in done]
        if options.dry:
            for run in runs:
                print(f"{run.run_id}  {diff_text(run)}{'  DUPLICATE' if run.duplicate_of else ''}")
        else:
            print_plan(runs, todo, jobs, options)
        return 0
    data, tokenizer = find_data(options)
    tokens = options.val_tokens if options.val_tokens is not None else halves.HALF_TOKENS * options.proxy
    if options.finalists and not tokens:
        raise UserError("--finalists wants text that is held out: --val-tokens N, or --proxy")
    results = claim_results(options.results, names)
    if tokens:
        data = halves.cut(data, options.out, tokens) / halves.SELECTION
    if options.engine == "ray":
        from sweeps.lab.ray_backend import Ray

        backend = Ray(bool(gpus), options.jobs, threads)
    else:
        backend = Local(gpus, jobs, threads)
    engine = Engine(runs, results, backend, options, (data, tokenizer))
    engine.prepare()
    code = engine.work()
    if options.finalists and code != STOPPED:
        score_held_out(finalists(engine.known, runs, options.finalists), results, jobs, options)
        for each in results.values():
            each.compact()
    return code


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else None
    words, rest = (arguments[:split], arguments[split + 1 :]) if split is not None else ([], arguments)
    options = options_of(rest)
    options.proxy = options.proxy or os.environ.get("PROXY", "0") not in ("", "0")
    options.out, options.results = options.out.resolve(), options.results.resolve()
    try:
        if options.held_out:
            return held_out_only(options)
        if not words:
            raise UserError("run a wave by its script: bash sweeps/WAVE.sh --plan")
        return run_wave(words[0], words[1:], options)
    except UserError as error:
        return tell(error)
    except OSError as error:
        tell_os_error(error)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
