"""Run a wave: all its arms and seeds, each in a process group of its own, one row of results a run.

    bash sweeps/WAVE.sh --plan                     what it would run, how long that takes; runs nothing
    bash sweeps/WAVE.sh                            run it, or go on where it was stopped or killed
    bash sweeps/WAVE.sh --proxy --jobs 2           at the small sizes for one CPU core a run
    python -m sweeps.lab.wave_engine --held-out RUN_ID ...
                                                   score finished runs on the text no choice has seen

Finished runs are never repeated. Ctrl-C or SIGTERM lets the runs save their state; the same command goes on
from it. Rows go to runs/results/WAVE.jsonl, the runs' own files to runs/waves/WAVE/RUN_ID. The results that
came with the project, in sweeps/results, are not touched.
Exit codes: 0 done, 1 a run crashed, 2 a fault in the wave or the command, 75 stopped, to go on later.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from data.user_error import UserError, run_tool, tell, tell_os_error
from sweeps.lab.held_out import finalists, score_by_id, score_rows
from sweeps.lab.local_backend import LocalBackend
from sweeps.lab.paths import OWN_RESULTS, OWN_RUNS, ROOT, SHIPPED_RESULTS
from sweeps.lab.run_process import Orphan, Spec, core_count, is_alive
from sweeps.lab.run_rows import (
    FIELDS,
    Results,
    Row,
    behind,
    ended,
    measured,
    portable,
    read_events,
    row_of,
)
from sweeps.lab.run_state import FINISHED, RunState
from sweeps.lab.validation_halves import HALF_TOKENS, SELECTION, cut
from sweeps.lab.wave_plan import (
    Run,
    change_text,
    clock_text,
    expand,
    print_plan,
    print_runs,
    select_arms,
    warnings_of,
    without_exact_reruns,
)
from sweeps.lab.wave_spec import CONTROL, KNOBS, Env, Sizes, parse_wave
from train_gpt import write_atomic

TICK = 0.1  # seconds between looks at the runs
PATIENCE = 90.0  # seconds until a run that was asked to stop is killed
LOOK_EVERY = 1.0  # seconds between comparisons of a run with its control, for --early-kill
STOPPED = 75  # exit code
ENVIRONMENT_KNOBS = "DATA_PATH", "TOKENIZER_PATH", "DEVICE"  # that may come from the environment
FINAL_EXIT_CODES = 0, 3, 4, 5, 6, 7  # of a run that will not end otherwise if it is run again
BAD_INPUT = 2  # the exit code of a run that refused its knobs or its files


# ------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class EarlyKill:
    """End an arm that is worse than its control by `margin` bpb, once it is past this progress."""

    margin: float
    since_progress: float


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="WAVE.sh", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--plan", action="store_true", help="print the arms, the predicted time and cost; run nothing")
    add("--dry", action="store_true", help="check everything and print every run; run nothing")
    add("--proxy", action="store_true", help="sizes for one CPU core a run; PROXY=1 does the same")
    add("--jobs", type=int, help="runs at once (default: the GPUs, or what the cores allow)")
    add("--threads", type=int, help="CPU threads a run (default: proxy 1, else the cores shared out)")
    add("--fork", action="store_true", help="on CPUs, fork runs from a process that has their imports")
    add("--engine", choices=("local", "ray"), default="local", help="ray: RAY_ADDRESS, or one of its own")
    add("--out", type=Path, default=OWN_RUNS, help="the runs' files (default runs/waves)")
    add("--results", type=Path, default=OWN_RESULTS, help="default runs/results")
    add("--data", type=Path, help="folder of shards (default as run_best.sh: FineWeb, else pydocs)")
    add("--tokenizer", type=Path, help="its SentencePiece model")
    add("--val-tokens", type=int, help="select on so many validation tokens, hold out as many more; 0: all")
    add("--only", nargs="+", metavar="ARM", default=[], help="these arms and the control")
    add("--reruns", action="store_true", help="run the control again even where that gives the same bits")
    add("--early-kill", metavar="MARGIN[@PROGRESS]", help="end an arm that is worse by so many bpb by then")
    add("--finalists", type=int, default=0, metavar="N", help="then score the N best arms on held-out text")
    add("--again", action="store_true", help="run crashed runs once more")
    add("--usd-per-hour", type=float, help="of the machine, for --plan")
    add("--seconds-per-run", type=float, help="for --plan, where no earlier run tells")
    add("--script", type=Path, default=ROOT / "train_gpt.py", help=argparse.SUPPRESS)
    add("--held-out", nargs="+", metavar="RUN_ID", default=[], help="only score these runs' packed models")
    options = parser.parse_args(arguments)
    options.proxy = options.proxy or os.environ.get("PROXY", "0") not in ("", "0")
    options.out = options.out.resolve()
    options.results = options.results.resolve()
    return options


def parse_early_kill(text: str | None) -> EarlyKill | None:
    """MARGIN[@PROGRESS]; the progress is 0.3 unless said. Raises UserError on anything else."""
    if not text:
        return None
    margin_text, _, progress_text = text.partition("@")
    try:
        rule = EarlyKill(float(margin_text), float(progress_text or 0.3))
    except ValueError:
        rule = EarlyKill(0.0, 0.0)
    if not (rule.margin > 0 and 0 < rule.since_progress < 1):
        raise UserError(f"--early-kill wants MARGIN[@PROGRESS], e.g. 0.05@0.4, not {text}")
    return rule


def local_gpus() -> list[str]:
    """The GPUs that runs may have, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return visible[:count] if visible else [str(number) for number in range(count)]


def find_gpus(options: argparse.Namespace) -> list[str]:
    """The GPUs of this machine, or of the cluster; none for runs that are to be on a CPU."""
    if options.proxy or os.environ.get("DEVICE") == "cpu":
        return []
    if options.engine == "local":
        return local_gpus()
    from sweeps.lab.ray_backend import cluster_gpus

    return [str(number) for number in range(cluster_gpus())]


def has_shards(dataset: Path, split: str) -> bool:
    return any(dataset.glob(f"*_{split}_*.bin"))


def default_data() -> tuple[Path, Path]:
    """(dataset, tokenizer): FineWeb if it is here, else the embedded corpus, built if need be."""
    folder = ROOT / "data"
    dataset = folder / "datasets/fineweb10B_sp1024"
    tokenizer = folder / "tokenizers/fineweb_1024_bpe.model"
    if tokenizer.is_file() and has_shards(dataset, "train") and has_shards(dataset, "val"):
        return dataset, tokenizer
    if subprocess.run([sys.executable, str(folder / "pydocs.py")]).returncode:
        raise UserError("no data: data/pydocs.py failed (above)")
    return folder / "datasets/pydocs_sp1024", folder / "tokenizers/pydocs_1024_bpe.model"


def find_data(options: argparse.Namespace) -> tuple[Path, Path]:
    """(dataset, tokenizer), from the command line, the environment, or default_data; both are there."""
    dataset = options.data
    tokenizer = options.tokenizer
    if dataset is None and os.environ.get("DATA_PATH"):
        dataset = Path(os.environ["DATA_PATH"])
    if tokenizer is None and os.environ.get("TOKENIZER_PATH"):
        tokenizer = Path(os.environ["TOKENIZER_PATH"])
    if (dataset is None) != (tokenizer is None):
        raise UserError("--data and --tokenizer go together")
    if dataset is None:
        dataset, tokenizer = default_data()
    for split in ("train", "val"):
        if not has_shards(dataset, split):
            raise UserError(f"no {split} shards, *_{split}_*.bin, in {dataset}")
    if not tokenizer.is_file():
        raise UserError(f"no tokenizer {tokenizer}")
    return dataset.resolve(), tokenizer.resolve()


def check_environment() -> None:
    """Knobs in the environment would be lost, or worse, reach the runs unseen."""
    for name in os.environ:
        if name in KNOBS and name not in ENVIRONMENT_KNOBS:
            raise UserError(
                f"{name} is set in the environment; a wave takes its knobs from its base line only"
            )


# ----------------------------------------------------------------------------------------- engine


@dataclass
class Job:
    """A run that is under way."""

    run: Run
    out_dir: Path
    about: Row
    handle: object  # of the backend: poll() and signal()
    began: float
    had_files: bool  # it found files of an earlier attempt
    verdict: str = ""  # why it is being killed early
    looked_at: float = 0.0


class Engine:
    """Starts runs as there is room, and attends them until each has its final row."""

    def __init__(
        self,
        runs: list[Run],
        results: dict[str, Results],
        backend,
        dataset: Path,
        tokenizer: Path,
        options: argparse.Namespace,
    ):
        self.runs = runs
        self.results = results  # by wave
        self.backend = backend
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.out = options.out
        self.script_source = options.script.resolve()
        self.repeats_crashed = options.again
        self.early_kill = parse_early_kill(options.early_kill)
        self.rows: dict[str, Row] = {}  # the newest of every run that is known, by run id
        for wave_results in results.values():
            self.rows |= wave_results.latest()
        self.todo: deque[Run] = deque()
        self.jobs: list[Job] = []
        self.crash_counts: Counter[str] = Counter()  # by run id, in this session
        self.ok_seconds: list[float] = []  # of each run that finished in this session
        self.waves_with_old_script: set[str] = set()
        self.stopping_since = 0.0
        self.stop_requests = 0
        self.stop_is_told = False

    # -- rows --

    def out_dir(self, run: Run) -> Path:
        return self.out / run.wave.name / run.run_id

    def knobs(self, run: Run) -> Env:
        """Everything that is set for a run."""
        env = {"CHECKPOINT_SECONDS": "120"} | run.env
        env["DATA_PATH"] = str(self.dataset)
        env["TOKENIZER_PATH"] = str(self.tokenizer)
        env["RUN_ID"] = run.run_id
        env["RESUME"] = "auto"
        env["OUT_DIR"] = str(self.out_dir(run))
        return env

    def about(self, run: Run) -> Row:
        """The part of a run's row that is known before it starts."""
        return {
            "wave": run.wave.name,
            "arm": run.arm.name,
            "seed": run.seed,
            "rerun": run.rerun,
            "run_id": run.run_id,
            "hypothesis": run.arm.hypothesis,
            "question": run.wave.question,
            "decide": run.wave.decide,
            "parent": run.wave.preset,
            "change": run.arm.change,
            "env": portable(self.knobs(run)),
            "config_hash": run.cfg.hash,
            "attempts": 0,
            "out_dir": os.path.relpath(self.out_dir(run), ROOT),
        }

    def write_row(self, run: Run, row: Row) -> None:
        row = dict.fromkeys(FIELDS) | row
        self.rows[run.run_id] = row
        self.results[run.wave.name].append(row)

    def has_changed(self, run: Run, row: Row) -> bool:
        """Whether the wave was edited since this row was written, so that it is of another experiment."""
        return bool(knob_differences(row["env"] or {}, self.about(run)["env"]))

    def prepare(self) -> None:
        """Queue what is left to do, and write rows of what is planned or a duplicate.

        Raises UserError where a run has a result that was made with other knobs, or still runs with them.
        """
        planned_rows: dict[str, list[Row]] = {wave: [] for wave in self.results}
        for run in self.runs:
            row = self.planned_row(run)
            if row is not None:
                planned_rows[run.wave.name].append(dict.fromkeys(FIELDS) | row)
        for wave, rows in planned_rows.items():
            for row in rows:
                self.rows[row["run_id"]] = row
            self.results[wave].append(*rows)
        for wave in self.results:
            self.script(wave)

    def planned_row(self, run: Run) -> Row | None:
        """Queue the run if it is left to do; the row to write about that, if it says anything new."""
        row = self.rows.get(run.run_id)
        about = self.about(run)
        state = row["state"] if row else None
        is_repeated = state == RunState.CRASHED and self.repeats_crashed
        if state in FINISHED and state != RunState.DUPLICATE and not is_repeated:
            check_same_knobs(run, row, about)
            return None
        if run.duplicate_of:
            message = f"the same experiment as {run.duplicate_of}"
            return about | {"state": RunState.DUPLICATE, "status": RunState.DUPLICATE, "message": message}
        if row and self.has_changed(run, row) and is_alive(self.out_dir(run)):
            raise UserError(f"{run.run_id} still runs with other knobs; wait for it, then try again")
        self.todo.append(run)
        if state in (None, RunState.DUPLICATE):
            return about | {"state": RunState.PLANNED}
        return None

    def script(self, wave: str) -> Path:
        """The wave's own copy of the script: one edited meanwhile would make runs that do not compare.

        What the script looks for beside it is there by links.
        """
        source = self.script_source
        code_dir = self.out / wave / "code"
        copy = code_dir / source.name
        if not copy.exists():
            code_dir.mkdir(parents=True, exist_ok=True)
            for folder in ("sweeps", "records"):
                if not (code_dir / folder).is_symlink():
                    (code_dir / folder).symlink_to(source.parent / folder)
            write_atomic(copy, source.read_bytes())
        elif copy.read_bytes() != source.read_bytes() and wave not in self.waves_with_old_script:
            self.waves_with_old_script.add(wave)
            self.say(
                f"warning: {wave} goes on with its own {source.name}, as it was at its start: "
                f"{os.path.relpath(copy)}"
            )
        return copy

    # -- console --

    def say(self, text: str) -> None:
        try:
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
        except OSError:  # its reader is gone; the rows are what counts
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process

    def count_text(self) -> str:
        """How many runs came how far, and how long the rest may take."""
        states = Counter(self.rows[run.run_id]["state"] for run in self.runs)
        duplicates = states[RunState.DUPLICATE]
        planned = len(self.runs) - duplicates
        started = planned - states[RunState.PLANNED]
        finished = sum(states[state] for state in FINISHED) - duplicates
        text = f"planned {planned} started {started} finished {finished} valid {states[RunState.OK]}"
        if self.ok_seconds and (self.todo or self.jobs):
            runs_left = len(self.todo) + 0.5 * len(self.jobs)  # half of each job is done, on average
            seconds_left = mean(self.ok_seconds) * runs_left / self.backend.width()
            text += f" | about {clock_text(seconds_left)} left"
        return text

    def result_text(self, run: Run, row: Row) -> str:
        """A finished run's score, with its difference to the control of the same seed; or what went wrong."""
        if row["state"] != RunState.OK:
            return row["message"]
        text = f"bpb {row['val_bpb']:.4f}"
        control = self.rows.get(control_id(run))
        is_control_itself = run.is_control and not run.rerun
        if control and control["state"] == RunState.OK and not is_control_itself:
            text += f" ({row['val_bpb'] - control['val_bpb']:+.4f})"
        return text

    # -- one run --

    def begin(self, run: Run) -> None:
        """Start a run; or read it if it ended while no engine looked; or wait for it if it still runs."""
        out_dir = self.out_dir(run)
        earlier_row = self.rows[run.run_id]
        earlier_attempts = earlier_row["attempts"] or 0
        if self.has_changed(run, earlier_row):
            shutil.rmtree(out_dir, ignore_errors=True)
        about = self.about(run)
        about["started"] = earlier_row["started"] or time.time()
        end = ended(read_events(out_dir, run.run_id))
        if end and end.get("exit_code") in FINAL_EXIT_CODES and self.crash_counts[run.run_id] == 0:
            self.settle(run, row_of(about | {"attempts": earlier_row["attempts"]}, out_dir))
            return
        had_files = out_dir.is_dir()
        command = (sys.executable, str(self.script(run.wave.name)))
        handle = self.backend.start(Spec(command, self.knobs(run), str(out_dir), hidden=tuple(KNOBS)))
        is_adopted = isinstance(handle, Orphan)
        about["attempts"] = earlier_attempts if is_adopted else earlier_attempts + 1
        began = (out_dir / "run.json").stat().st_mtime if is_adopted else time.time()
        self.jobs.append(Job(run, out_dir, about, handle, began, had_files))
        self.write_row(run, about | {"state": RunState.RUNNING})
        if is_adopted:
            event = "found running"
        elif had_files:
            event = "resume"
        else:
            event = "start"
        self.say(f"{event:12} {run.run_id}  {change_text(run)}")

    def attend(self, job: Job) -> None:
        """See whether a run has ended, or should be ended."""
        exit_code = job.handle.poll()
        if exit_code is not None:
            self.jobs.remove(job)
            self.backend.give_back(job.handle)
            self.finish(job, exit_code)
        elif self.early_kill and not job.verdict and time.time() > job.looked_at + LOOK_EVERY:
            job.looked_at = time.time()
            self.end_if_behind(job)

    def end_if_behind(self, job: Job) -> None:
        """End an arm that is too far behind its control."""
        run = job.run
        control = self.rows.get(control_id(run))
        if run.is_control or not control or control["state"] != RunState.OK:
            return
        row = measured(read_events(job.out_dir, run.run_id), {})
        comparison = behind(control, row, self.early_kill.since_progress)
        if comparison is None:
            return
        gap, progress = comparison
        if gap > self.early_kill.margin:
            job.verdict = (
                f"worse than the control by {gap:.4f} bpb at progress {progress:.2f}; "
                f"the margin is {self.early_kill.margin}"
            )
            job.handle.signal(signal.SIGTERM)

    def finish(self, job: Job, exit_code: int) -> None:
        """Judge a run that ended: its final row, or another attempt."""
        run = job.run
        row = row_of(job.about, job.out_dir, exit_code)
        unknown = unknown_knobs(run, row)
        if row["state"] == RunState.OK and unknown:
            row["state"] = RunState.CRASHED
            row["message"] = f"the wave's copy of the script has no {unknown[0]}"
        if hasattr(job.handle, "moves"):
            row["attempts"] += job.handle.moves()  # made by Ray, when a machine died
        row["run_seconds"] = (self.rows[run.run_id]["run_seconds"] or 0.0) + time.time() - job.began
        was_cut_short = row["state"] in (RunState.PREEMPTED, RunState.CRASHED)
        if job.verdict and was_cut_short:
            shutil.rmtree(job.out_dir / "checkpoints", ignore_errors=True)
            self.settle(run, row | {"state": RunState.KILLED_EARLY, "message": job.verdict})
        elif self.stopping_since and was_cut_short:
            self.settle(run, row | {"state": RunState.PREEMPTED})
        elif row["state"] == RunState.PREEMPTED:  # someone else stopped it
            self.write_row(run, row)
            self.say(f"{RunState.PREEMPTED:12} {run.run_id}  goes on at once")
            self.todo.appendleft(run)
        elif row["state"] == RunState.CRASHED and self.may_try_again(job, row):
            self.try_again(job, row)
        else:
            self.settle(run, row)

    def may_try_again(self, job: Job, row: Row) -> bool:
        """Whether a crashed run may do better: once, if it was no final end.

        A run refuses its input for good, unless what it refused are files of an earlier attempt.
        """
        if row["exit_code"] in FINAL_EXIT_CODES or self.crash_counts[job.run.run_id]:
            return False
        return row["exit_code"] != BAD_INPUT or job.had_files

    def try_again(self, job: Job, row: Row) -> None:
        run = job.run
        self.crash_counts[run.run_id] += 1
        self.write_row(run, row | {"state": RunState.RUNNING})
        self.say(f"{RunState.CRASHED:12} {run.run_id}  once more, after: {row['message']}")
        if row["exit_code"] == BAD_INPUT:  # left by other code or another setting: it cannot be gone on with
            shutil.rmtree(job.out_dir, ignore_errors=True)
        self.todo.appendleft(run)

    def settle(self, run: Run, row: Row) -> None:
        """Write a run's last row of this session."""
        row["ended"] = time.time()
        self.write_row(run, row)
        if row["state"] in FINISHED:
            (self.out_dir(run) / "final_model.pt").unlink(missing_ok=True)  # the packed one stays
        if row["state"] == RunState.OK and not row["resumed"]:
            self.ok_seconds.append(row["run_seconds"] or 0.0)
        seconds = f" {row['run_seconds']:.0f} s" if row.get("run_seconds") else ""
        self.say(
            f"{row['state']:12} {run.run_id}  {self.result_text(run, row)}{seconds} | {self.count_text()}"
        )

    # -- all runs --

    def signal_jobs(self, number: int) -> None:
        for job in self.jobs:
            job.handle.signal(number)

    def stop(self, _number: int, _frame) -> None:
        """Handler of signals: pass it to the runs; the second one kills them."""
        self.stop_requests += 1
        self.stopping_since = self.stopping_since or time.time()
        self.signal_jobs(signal.SIGTERM if self.stop_requests == 1 else signal.SIGKILL)

    def adopt_running(self) -> None:
        """Take over the runs of an engine that was killed: they come first, since they are there."""
        for run in list(self.todo):
            if is_alive(self.out_dir(run)):
                self.todo.remove(run)
                self.begin(run)

    def look_after_stop(self) -> None:
        """Tell that the wave is stopping, and kill what does not."""
        if not self.stop_is_told:
            self.stop_is_told = True
            self.stop_requests = max(1, self.stop_requests)
            self.signal_jobs(signal.SIGTERM)  # one may have begun while the signal came
            self.say(f"stopping: {len(self.jobs)} runs save their state")
        if time.time() > self.stopping_since + PATIENCE:
            self.signal_jobs(signal.SIGKILL)

    def run_all(self) -> None:
        """Until all is done, or what was under way has ended after a signal."""
        self.adopt_running()
        while self.jobs or (self.todo and not self.stopping_since):
            while self.todo and not self.stopping_since and self.backend.room():
                self.begin(self.todo.popleft())
            for job in list(self.jobs):
                self.attend(job)
            if self.stopping_since:
                self.look_after_stop()
            time.sleep(TICK)

    def work(self) -> int:
        """Run until all is done or a signal stops it. Returns the exit code."""
        handlers_before = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            handlers_before[number] = signal.signal(number, self.stop)
        try:
            self.run_all()
        finally:
            self.signal_jobs(signal.SIGTERM)  # after an error of the engine's own: leave nothing unattended
            self.backend.close()
            for number, handler in handlers_before.items():
                signal.signal(number, handler)
        if self.stopping_since:
            self.say(f"stopped: {self.count_text()}")
            return STOPPED
        for wave_results in self.results.values():
            wave_results.compact()
        self.say(f"done: {self.count_text()}")
        has_crashed = any(self.rows[run.run_id]["state"] == RunState.CRASHED for run in self.runs)
        return int(has_crashed)


def control_id(run: Run) -> str:
    """The run of the control that has this run's seed."""
    return f"{run.wave.name}.{CONTROL}.{run.seed}"


def knob_differences(old: Env, new: Env) -> list[str]:
    """Knobs that shape the result and are not the same in two environments, as rows hold them."""
    differences = []
    for name, knob in KNOBS.items():
        if knob.metadata["role"] != "place" and old.get(name) != new.get(name):
            differences.append(f"{name}={old.get(name, '(unset)')}, now {new.get(name, '(unset)')}")
    return differences


def unknown_knobs(run: Run, row: Row) -> list[str]:
    """Knobs of a run that its script did not report: it is older than the wave's arms."""
    if not row["config"]:
        return []
    return [name for name in run.env if name.lower() not in row["config"]]


def check_same_knobs(run: Run, row: Row, about: Row) -> None:
    """Refuse to take a result for this run's that was made with other knobs."""
    differences = knob_differences(row["env"] or {}, about["env"])
    if differences:
        raise UserError(
            f"{run.run_id} has a result made with {differences[0]}; "
            "rename the arm, or move the wave's results away"
        )


# ------------------------------------------------------------------------------------------- main


def claim_results(folder: Path, waves: Iterable[str]) -> dict[str, Results]:
    """The results of these waves, which nobody else may write until this process ends."""
    results = {wave: Results(folder, wave) for wave in waves}
    for wave, wave_results in results.items():
        if not wave_results.claim():
            raise UserError(f"another engine is running the wave {wave}")
    return results


def choose_widths(options: argparse.Namespace, gpus: list[str]) -> tuple[int, int]:
    """(runs at once, CPU threads of each)."""
    for number in (options.jobs, options.threads):
        if number is not None and number < 1:
            raise UserError("--jobs and --threads want at least 1")
    cores = core_count()
    threads = options.threads
    if threads is None and options.proxy:
        threads = 1
    jobs = options.jobs or len(gpus) or max(1, cores // (threads or cores))
    return jobs, threads or max(1, cores // jobs)


def show_plan(runs: list[Run], jobs: int, options: argparse.Namespace) -> None:
    """What the wave would run, for --plan and --dry."""
    finished_ids = set()
    for wave in {run.wave.name for run in runs}:
        for run_id, row in Results(options.results, wave).latest().items():
            if row["state"] in FINISHED:
                finished_ids.add(run_id)
    if options.dry:
        print_runs(runs)
        return
    todo = [run for run in runs if not run.duplicate_of and run.run_id not in finished_ids]
    print_plan(runs, todo, jobs, options.results, options.seconds_per_run, options.usd_per_hour)


def notes_on(all_runs: list[Run], runs: list[Run], results: Path) -> list[str]:
    """What is there already, and what is left out because it would say nothing, a line each."""
    lines = []
    for name in dict.fromkeys(run.wave.name for run in runs):
        shipped = count_finished(SHIPPED_RESULTS, name)
        if shipped and results != SHIPPED_RESULTS:
            lines.append(
                f"{shipped} results of {name} came with the project, tables in sweeps/results/{name}.md; "
                f"this makes your own, in {os.path.relpath(results)}"
            )
    left_out = len(all_runs) - len(runs)
    if left_out:
        reruns = "1 rerun of the control is" if left_out == 1 else f"{left_out} reruns of the control are"
        lines.append(f"{reruns} left out: on this CPU the same bits would come again (--reruns runs them)")
    return lines


def count_finished(folder: Path, wave: str) -> int:
    """How many runs of a wave have a final result there."""
    return sum(row.get("state") in FINISHED for row in Results(folder, wave).latest().values())


def make_backend(options: argparse.Namespace, gpus: list[str], jobs: int, threads: int):
    """Where the runs are started."""
    if options.engine == "local":
        return LocalBackend(gpus, jobs, threads, options.fork)
    from sweeps.lab.ray_backend import RayBackend

    return RayBackend(bool(gpus), options.jobs, threads)


def run_wave(name: str, words: list[str], options: argparse.Namespace) -> int:
    """Check all of a wave, then show it or run it."""
    check_environment()
    parse_early_kill(options.early_kill)
    gpus = find_gpus(options)
    wave = parse_wave(name, words)
    sizes = Sizes(cpu=not gpus, proxy=options.proxy)
    all_runs = select_arms(expand(wave, sizes), options.only)
    runs = all_runs
    if options.engine == "local" and not gpus and not options.reruns:
        runs = without_exact_reruns(all_runs)
    for line in warnings_of(runs, wave, sizes):
        print(f"warning: {line}", file=sys.stderr)
    for line in notes_on(all_runs, runs, options.results):
        print(f"note: {line}", file=sys.stderr)
    jobs, threads = choose_widths(options, gpus)
    if options.plan or options.dry:
        show_plan(runs, jobs, options)
        return 0
    dataset, tokenizer = find_data(options)
    val_tokens = options.val_tokens
    if val_tokens is None:
        val_tokens = HALF_TOKENS if options.proxy else 0
    if options.finalists and not val_tokens:
        raise UserError("--finalists wants text that is held out: --val-tokens N, or --proxy")
    results = claim_results(options.results, dict.fromkeys(run.wave.name for run in runs))
    if val_tokens:
        dataset = cut(dataset, options.out, val_tokens) / SELECTION
    backend = make_backend(options, gpus, jobs, threads)
    engine = Engine(runs, results, backend, dataset, tokenizer, options)
    engine.prepare()
    exit_code = engine.work()
    if options.finalists and exit_code != STOPPED:
        score_rows(finalists(engine.rows, runs, options.finalists), results, jobs)
    return exit_code


def score_held_out(options: argparse.Namespace) -> int:
    """`--held-out RUN_ID ...`, without a wave."""
    waves = {run_id.split(".")[0] for run_id in options.held_out}
    score_by_id(options.held_out, claim_results(options.results, waves), options.jobs or 1)
    return 0


def main(arguments: list[str]) -> int:
    """WAVE @WORD ... -- OPTION ..., as sweeps/lib.sh calls it; or options alone. Returns the exit code."""
    words: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        words = arguments[:split]
        arguments = arguments[split + 1 :]
    options = parse_options(arguments)
    try:
        if options.held_out:
            return score_held_out(options)
        if not words:
            raise UserError("run a wave by its script: bash sweeps/WAVE.sh --plan")
        return run_wave(words[0], words[1:], options)
    except UserError as error:
        return tell(error)
    except OSError as error:
        tell_os_error(error)
        return 1


if __name__ == "__main__":
    run_tool(partial(main, sys.argv[1:]))
