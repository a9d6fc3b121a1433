"""The engine of the waves, with a stub in place of training (stub_train.py) and one real wave of tiny runs.

An engine that is to be killed runs in a fork of this process, which has the imports already.
"""

import argparse
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import file_locks
from sweeps.lab import forked_runs
from sweeps.lab import run_process as process
from sweeps.lab import run_rows as rows
from sweeps.lab import validation_halves as halves
from sweeps.lab import wave_engine as engine
from sweeps.lab.run_rows import Results
from tests.conftest import ROOT, VOCAB, write_shard

WORDS = ["w", "@question", "Why?", "@base", "baseline"]
ARMS = dict(
    a="QK_GAIN_INIT=2", b="QK_GAIN_INIT=3", c="QK_GAIN_INIT=4", d="QK_GAIN_INIT=5", e="QK_GAIN_INIT=6"
)
TINY = """VOCAB_SIZE=320 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=32 ITERATIONS=12
TRAIN_BATCH_TOKENS=512 VAL_LOSS_EVERY=6 TRAIN_LOG_EVERY=2"""


class Bench:
    """A folder with a plan for the stub, and an engine to run its waves."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.results, self.out = folder, folder / "results", folder / "out"
        self.options = [
            "--proxy", "--results", str(self.results), "--out", str(self.out), "--data", str(data),
            "--tokenizer", str(data / "tokenizer.model"),
            "--script", str(ROOT / "tests/support/stub_train.py"),
        ]  # fmt: skip
        self.plan({})

    def plan(self, arms: dict[str, dict]) -> None:
        (self.folder / "plan.json").write_text(json.dumps(arms))

    def command(self, arms: str, *options: str, seeds: str = "1 2", every: int = 0) -> list[str]:
        words = [*WORDS]
        for name in arms.split():
            words += ["@arm", name, f"why {name}", ARMS.get(name, f"QK_GAIN_INIT={10 + len(words)}")]
        words += ["@seeds", *seeds.split(), "@control_every", str(every)]
        return [*words, "--", *self.options, *options]

    def run(self, arms: str, *options: str, **how) -> int:
        return engine.main(self.command(arms, *options, **how))

    def fork(self, arms: str, *options: str, **how) -> int:
        """An engine in a process of its own; its number. Its console goes to engine.txt."""
        command = self.command(arms, *options, **how)
        number = os.fork()
        if number == 0:
            code = 70
            try:
                for stream in (1, 2):
                    os.dup2(
                        os.open(self.folder / "engine.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream
                    )
                sys.stdout = os.fdopen(1, "w")
                code = engine.main(command)
            finally:
                os._exit(code)
        return number

    def rows(self) -> dict[str, dict]:
        return Results(self.results, "w").latest()

    def states(self) -> dict[str, str]:
        return {run_id.removeprefix("w."): row["state"] for run_id, row in self.rows().items()}

    def journal(self) -> list[str]:
        path = self.folder / "journal"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, what, seconds: float = 15.0) -> None:
        end = time.time() + seconds
        while not what():
            assert time.time() < end, (self.states(), (self.folder / "engine.txt").read_text()[-2000:])
            time.sleep(0.02)


@pytest.fixture
def bench(tmp_path, dataset, monkeypatch):
    monkeypatch.setenv("STUB", str(tmp_path))
    monkeypatch.setattr(engine, "TICK", 0.01)
    return Bench(tmp_path, dataset)


@pytest.fixture(params=["processes", "forks"])
def any_bench(bench, request, monkeypatch):
    """A bench whose runs are processes of their own, or forks of a helper, which imports nothing here."""
    if request.param == "forks":
        monkeypatch.setattr(forked_runs, "PRELOADED", ())
        bench.options.append("--fork")
    return bench


def ended(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


# ------------------------------------------------------------------------------------------ states


def test_every_ending_has_its_state_and_the_wave_goes_on(any_bench, capfd):
    bench = any_bench
    ends = "crash crash_once kill_once bad_input untrained no_loss truncated diverged over_size"
    bench.plan({end: dict(end=end) for end in ends.split()})
    assert bench.run(f"{ends} fine", "--jobs", "4", "--reruns", seeds="1", every=5) == 1, "one crashed"
    states = bench.states()
    expected = dict.fromkeys(("crash", "bad_input"), "crashed") | dict.fromkeys(
        ("untrained", "no_loss"), "untrained"
    )
    expected |= dict.fromkeys(("crash_once", "kill_once", "fine", "control"), "ok")
    expected |= {state: state for state in ("truncated", "diverged", "over_size")}
    assert {run.partition(".")[0]: state for run, state in states.items()} == expected
    rows_of = {row["arm"]: row for row in bench.rows().values() if not row["rerun"]}
    assert rows_of["crash"]["attempts"] == 2 and rows_of["crash"]["message"] == "ValueError: a bug in step 5"
    assert rows_of["bad_input"]["attempts"] == 1 and rows_of["bad_input"]["message"] == "no such thing"
    for arm in ("crash_once", "kill_once"):
        assert rows_of[arm]["attempts"] == 2 and rows_of[arm]["resumed"] == [5]
        assert [step for step, *_ in rows_of[arm]["loss_curve"]] == list(range(1, 11)), "each step once"
    assert states["control.1.r1"] == states["control.1.r2"] == "ok"
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.endswith("done: planned 13 started 13 finished 13 valid 6")


def test_a_row_holds_all_that_the_reports_need(bench, capfd):
    bench.plan(dict(a=dict(bpb=1.5)))
    assert bench.run("a", "--jobs", "1", seeds="0") == 0
    row = bench.rows()["w.a.0"]
    assert row.keys() >= set(rows.FIELDS)
    known = dict(
        wave="w", arm="a", seed=0, rerun=0, hypothesis="why a", question="Why?", parent="baseline",
        change=dict(QK_GAIN_INIT="2"), state="ok", exit_code=0, attempts=1, steps=10, tokens=5120,
        step_ms=dict(median=100.0, p95=100.0), progress=1.0, mean_lr_scale=0.5, train_loss=3.5,
        curve=[[5, 500.0, 2.0], [10, 1000.0, 1.5]], val_bpb=1.5, scores=dict(roundtrip=1.5),
        model_bytes=100, total_bytes=109, peak_memory_mib=12, device="stub", val_tokens=1000,
        held_out_val_bpb=None,
    )  # fmt: skip
    assert {name: row[name] for name in known} == known, row
    assert row["env"]["QK_GAIN_INIT"] == "2" and row["env"]["SEED"] == "0"
    assert row["lr_trace"][-1] == [1.0, 1.0] and row["ended"] > row["started"] > 1.7e9
    assert "(-0.5000)" in capfd.readouterr().out, "the difference to the control"
    assert str(bench.folder) not in json.dumps([row["env"], row["config"]]), "no folders of this machine"


def test_finished_runs_are_never_repeated_and_crashed_ones_only_if_asked(bench):
    bench.plan(dict(a=dict(end="crash")))
    assert bench.run("a b", seeds="1") == 1
    before = bench.journal()
    assert bench.run("a b", seeds="1") == 1 and bench.journal() == before
    bench.plan({})
    assert bench.run("a b", "--again", seeds="1") == 0
    assert set(bench.states().values()) == {"ok"} and len(bench.journal()) == len(before) + 5, (
        "went on from 5"
    )


def test_a_result_of_other_knobs_is_not_taken_for_this_arms(bench, capfd, monkeypatch):
    assert bench.run("a", seeds="1") == 0
    monkeypatch.setitem(ARMS, "a", "QK_GAIN_INIT=9")
    assert bench.run("a", seeds="1") == 2
    assert "w.a.1 has a result made with QK_GAIN_INIT=2, now 9; rename the arm" in capfd.readouterr().err


def test_duplicates_are_stated_and_not_run(bench, monkeypatch):
    monkeypatch.setitem(ARMS, "b", ARMS["a"])
    assert bench.run("a b", seeds="1") == 0
    row = bench.rows()["w.b.1"]
    assert (row["state"], row["message"]) == ("duplicate", "the same experiment as a")
    assert not [line for line in bench.journal() if line.startswith("w.b.")]


def test_an_arm_far_behind_its_control_is_ended_early(bench, capfd):
    bench.plan(dict(a=dict(bpb=2.3, steps=10, seconds=0.4), b=dict(bpb=2.01)))
    assert bench.run("a b", "--early-kill", "0.1@0.4", "--jobs", "1", seeds="1") == 0
    assert bench.states() == {"control.1": "ok", "a.1": "killed_early", "b.1": "ok"}
    row = bench.rows()["w.a.1"]
    assert row["message"].startswith("worse than the control by 0.") and row["val_bpb"] is None
    assert 4 <= row["steps"] < 10 and not (bench.out / "w/w.a.1/checkpoints").exists()
    steps = len(bench.journal())
    assert bench.run("a b", "--jobs", "1", seeds="1") == 0 and len(bench.journal()) == steps


# ---------------------------------------------------------------------------- killed, stopped, resumed


def test_a_killed_engine_loses_nothing_and_repeats_nothing(any_bench):
    """Its runs live on; the next engine waits for those, goes on from what one that was killed too had saved,
    and starts the rest."""
    bench = any_bench
    bench.plan(dict.fromkeys(("control", "a", "b", "c"), dict(seconds=0.08)))
    number = bench.fork("a b c", "--jobs", "2")
    bench.wait_for(lambda: sum(state == "ok" for state in bench.states().values()) >= 2)
    bench.wait_for(lambda: any(line.endswith(".1 6") for line in bench.journal()[20:]))
    os.kill(number, signal.SIGKILL)
    assert ended(number) == -signal.SIGKILL
    running = [run_id for run_id, row in bench.rows().items() if row["state"] == "running"]
    alive = [run_id for run_id in running if process.is_alive(bench.out / "w" / run_id)]
    assert alive, "they do not end with their engine"
    victim = alive[0]
    os.killpg(int((bench.out / "w" / victim / "run.lock").read_text()), signal.SIGKILL)
    assert bench.run("a b c", "--jobs", "2") == 0
    assert set(bench.states().values()) == {"ok"} and len(bench.states()) == 8
    repeated = {line: n for line, n in Counter(bench.journal()).items() if n > 1}
    assert all(line.startswith(f"{victim} ") for line in repeated), "only what was not saved"
    assert len(set(bench.journal())) == 80
    assert all(bench.rows()[run_id]["attempts"] == 1 for run_id in running if run_id != victim), "waited for"
    assert bench.rows()[victim]["resumed"] in ([5], [])
    lines = (bench.results / "w.jsonl").read_text().splitlines()
    assert len(lines) == 8, "one row a run in the end"


def test_an_engine_killed_before_it_wrote_the_row_reads_the_run_instead(bench):
    assert bench.run("a", seeds="1") == 0
    path = bench.results / "w.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"arm": "a"' not in line]
    path.write_text("\n".join(kept) + "\n" + '{"wave": "w", "run_id": "w.a.1", "sta')
    steps = len(bench.journal())
    assert bench.run("a", seeds="1") == 0
    assert bench.states()["a.1"] == "ok" and len(bench.journal()) == steps


def test_stopped_runs_save_and_go_on(any_bench):
    bench = any_bench
    bench.plan(dict.fromkeys(("control", "a"), dict(seconds=0.1)))
    number = bench.fork("a", "--jobs", "2", seeds="1 2")
    bench.wait_for(lambda: len(bench.journal()) >= 4)
    os.kill(number, signal.SIGTERM)
    assert ended(number) == 75
    assert sorted(bench.states().values()) == ["planned", "planned", "preempted", "preempted"]
    assert bench.run("a", "--jobs", "2", seeds="1 2") == 0
    assert set(bench.states().values()) == {"ok"}
    assert len(bench.journal()) == len(set(bench.journal())) == 40, "every step once"
    row = bench.rows()["w.control.1"]
    assert len(row["resumed"]) == 1 and row["attempts"] == 2


def test_a_second_engine_is_refused(bench, capfd):
    bench.plan(dict(control=dict(seconds=0.2)))
    number = bench.fork("", "--jobs", "1", seeds="1")
    bench.wait_for(lambda: "running" in bench.states().values())
    assert bench.run("", seeds="1") == 2
    assert capfd.readouterr().err == "error: another engine is running the wave w\n"
    assert ended(number) == 0


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def no_locks(request, monkeypatch):
    """A file system that has no locks, as some network file systems."""

    def flock(*_):
        raise OSError(getattr(errno, request.param), "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(file_locks, "has_warned", False)


def test_a_wave_runs_on_a_file_system_without_locks(bench, capfd, no_locks):
    assert bench.run("a", seeds="1") == 0
    assert bench.states() == {"control.1": "ok", "a.1": "ok"}
    assert re.fullmatch(r"warning: this file system has no locks: .*\n", capfd.readouterr().err)


def test_a_run_is_found_again_without_locks(bench, no_locks):
    """Its number has to do: the next engine waits for the run and starts no second one."""
    bench.plan(dict(control=dict(seconds=0.1)))
    number = bench.fork("", seeds="1")
    bench.wait_for(lambda: len(bench.journal()) >= 2)
    os.kill(number, signal.SIGKILL)
    assert ended(number) == -signal.SIGKILL
    assert process.is_alive(bench.out / "w/w.control.1")
    assert bench.run("", seeds="1") == 0 and bench.states() == {"control.1": "ok"}
    assert len(bench.journal()) == 10 and not process.is_alive(bench.out / "w/w.control.1")


def test_what_another_version_left_is_started_anew(bench):
    """A checkpoint of other code is refused by the run with exit 2."""
    left = bench.out / "w/w.control.1/checkpoints"
    left.mkdir(parents=True)
    (left / "w.control.1.json").write_text("not json")
    assert bench.run("", seeds="1") == 0 and bench.states() == {"control.1": "ok"}


def test_an_edited_script_does_not_reach_a_wave_that_has_begun(bench, capfd):
    """Its runs must compare; the copy says what they were made with."""
    script = bench.folder / "train.py"
    script.write_bytes((ROOT / "tests/support/stub_train.py").read_bytes())
    bench.options[-1] = str(script)
    assert bench.run("a", seeds="1") == 0
    script.write_text("raise SystemExit(1)")
    assert bench.run("a b", seeds="1") == 0 and bench.states()["b.1"] == "ok"
    assert "warning: w goes on with its own train.py" in capfd.readouterr().out


def test_a_knob_that_the_script_does_not_know_makes_no_result(bench):
    bench.plan(dict(a=dict(end="old_script")))
    assert bench.run("a", seeds="1") == 1
    row = bench.rows()["w.a.1"]
    assert row["state"] == "crashed" and "copy of the script has no " in row["message"]


def test_an_arm_that_is_no_duplicate_any_more_is_run(bench, monkeypatch):
    monkeypatch.setitem(ARMS, "b", ARMS["a"])
    assert bench.run("a b", seeds="1") == 0 and bench.states()["b.1"] == "duplicate"
    monkeypatch.setitem(ARMS, "b", "QK_GAIN_INIT=9")
    assert bench.run("a b", seeds="1") == 0 and bench.states()["b.1"] == "ok"


def test_an_unfinished_arm_that_was_edited_starts_anew(bench, monkeypatch):
    """Its checkpoint is of another experiment."""
    bench.plan(dict(a=dict(end="crash")))
    assert bench.run("a", seeds="1") == 1
    bench.plan({})
    monkeypatch.setitem(ARMS, "a", "QK_GAIN_INIT=9")
    assert bench.run("a", "--again", seeds="1") == 0
    row = bench.rows()["w.a.1"]
    assert (row["resumed"], row["steps"], row["change"]) == ([], 10, dict(QK_GAIN_INIT="9"))


# ------------------------------------------------------------------------------------------ plans


def test_a_plan_runs_nothing(bench, capfd):
    cost = ["--seconds-per-run", "60", "--usd-per-hour", "3", "--jobs", "2"]
    assert bench.run("a b", "--plan", "--reruns", *cost, every=1) == 0
    shown = capfd.readouterr().out
    assert "a        QK_GAIN_INIT=2  # why a" in shown
    assert "runs      10 (4 reruns of the control), 0 duplicates not run" in shown
    assert "time      5 min (at 60 s a run, as given)" in shown and "cost      0.25 USD" in shown
    assert not bench.results.exists() and not bench.out.exists()
    assert bench.run("a b", "--dry") == 0
    assert capfd.readouterr().out.splitlines()[1] == "w.a.1  QK_GAIN_INIT=2"


def test_a_control_that_gives_the_same_bits_is_not_run_again_unless_asked(bench, capfd):
    assert bench.run("a b", "--plan", every=1) == 0
    shown = capfd.readouterr()
    assert "runs      6 (0 reruns of the control)" in shown.out
    assert (
        "note: 4 reruns of the control are left out: on this CPU the same bits would come again" in shown.err
    )
    assert bench.run("a", seeds="1", every=1) == 0 and bench.states() == {"control.1": "ok", "a.1": "ok"}
    assert bench.run("a", "--reruns", seeds="1", every=1) == 0 and bench.states()["control.1.r1"] == "ok"


@pytest.mark.parametrize("knob", ["MAX_WALLCLOCK_SECONDS=5", "DETERMINISTIC=0"])
def test_a_control_that_a_clock_ends_or_that_may_vary_is_run_again(knob):
    arm = ["@arm", "a", "why", "QK_GAIN_INIT=2", "@control_every", "1"]
    wave = engine.parse_wave("w", [*WORDS[1:], knob, *arm])
    for changed, count in ((wave, 3), (dataclasses.replace(wave, base_changes=()), 2)):
        assert len(engine.without_exact_reruns(engine.expand(changed, engine.Sizes(True, True)))) == count


def test_the_results_that_came_with_the_project_are_told_and_left_alone(bench, capfd):
    """A wave of that name makes results of one's own, and says where both are."""
    assert engine.parse_options([]).results == ROOT / "runs/results"
    shipped = ROOT / "sweeps/results/wave08_asymmetry.jsonl"
    before = shipped.read_bytes(), shipped.stat().st_mtime_ns
    command = bench.command("a", seeds="1")
    assert engine.main(["wave08_asymmetry", *command[1:]]) == 0
    said = capfd.readouterr()
    assert "note: 24 results of wave08_asymmetry came with the project, tables in sweeps/results/" in said.err
    assert "done: planned 2 started 2 finished 2 valid 2" in said.out and len(bench.journal()) == 20
    assert (shipped.read_bytes(), shipped.stat().st_mtime_ns) == before
    assert engine.main(["wave08_asymmetry", *command[1:], "--plan"]) == 0
    assert "to do     0, " in capfd.readouterr().out, "those of one's own count"


def test_a_plan_is_timed_by_own_runs_first_then_by_what_was_given_then_by_the_shipped_ones(bench, capfd):
    def time_line(*options) -> str:
        words = ["w", "@question", "Why?", "@base", "baseline", "@seeds", "1", "--", *bench.options]
        assert engine.main([*words, "--plan", *options]) == 0
        return capfd.readouterr().out.partition("time ")[2]

    assert "runs of the same sizes that came with the project, made on another machine" in time_line()
    assert "at 7 s a run, as given" in time_line("--seconds-per-run", "7")


@pytest.mark.parametrize(
    "options, what",
    [
        (["--early-kill", "x"], "--early-kill wants MARGIN[@PROGRESS]"),
        (["--only", "z"], "--only z: no such arm (a)"),
        (["--finalists", "1", "--val-tokens", "0"], "--finalists wants text that is held out"),
        (["--jobs", "0"], "--jobs and --threads want at least 1"),
        (["--data", "/nowhere"], "no train shards"),
        (["--tokenizer", "/nowhere"], "no tokenizer /nowhere"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_2(bench, capfd, options, what):
    assert bench.run("a", *options) == 2
    error = capfd.readouterr().err
    assert what in error and error.count("\n") == 1 and not bench.journal()


def test_knobs_in_the_environment_are_refused(bench, capfd, monkeypatch):
    monkeypatch.setenv("MATRIX_LR", "0.1")
    assert bench.run("a") == 2
    assert "MATRIX_LR is set in the environment" in capfd.readouterr().err


def test_only_some_arms(bench):
    assert bench.run("a b c", "--only", "b", seeds="1") == 0
    assert bench.states() == {"control.1": "ok", "b.1": "ok"}


# ------------------------------------------------------------------------------------------- parts


def row_with(losses, vals, iterations=100) -> dict:
    return dict(
        config=dict(iterations=iterations), curve=[[step, 1.0, bpb] for step, bpb in vals],
        val_tokens=2, val_bytes=5, lr_trace=[[step / iterations, 1.0] for step, _ in losses],
        loss_curve=[[step, 1.0, loss] for step, loss in losses],
    )  # fmt: skip


def test_behind_compares_at_the_same_progress():
    steps = range(10, 101, 10)
    control = row_with([(s, 5 - s / 100) for s in steps], [(0, 9.0), (50, 3.0), (100, 2.0)])
    arm = row_with([(s, 5.5 - s / 100) for s in steps[:6]], [(0, 1.0), (50, 3.4)])
    assert rows.behind(control, arm, 0.3) == (pytest.approx(0.4), 0.5), "by its validation"
    assert rows.behind(control, arm, 0.7) is None, "not yet"
    arm = row_with([(s, 5.5 - s / 100) for s in steps[:9]], [(0, 1.0), (50, 3.4)])
    found, at = rows.behind(control, arm, 0.3)
    assert at == 0.9 and found == pytest.approx(0.5 / np.log(2) * 2 / 5), "the validation is too old"
    longer = row_with([(2 * s, 5 - s / 100) for s in steps[:6]], [(100, 3.1)], iterations=200)
    assert rows.behind(control, longer, 0.3) == (pytest.approx(0.1), 0.5), "progress, not steps"


def test_paths_of_this_machine_stay_here():
    there = f"{ROOT}/runs/waves/data/x/selection"
    assert rows.portable(there) == "runs/waves/data/x/selection"
    assert rows.portable(dict(a="/home/me/t.model", b=3, c="1/2 and 0.4:2")) == dict(
        a="t.model", b=3, c="1/2 and 0.4:2"
    )


def test_rows_survive_a_cut_line_and_compact_to_the_newest(tmp_path):
    results = Results(tmp_path, "w")
    results.append(dict(run_id="a", state="running"), dict(run_id="b", state="ok"))
    with results.path.open("a") as file:
        file.write('{"run_id": "c", "st')
    results.append(dict(run_id="a", state="ok"))
    assert results.latest() == dict(a=dict(run_id="a", state="ok"), b=dict(run_id="b", state="ok"))
    assert len(results.path.read_text().splitlines()) == 3, "the cut line is gone"
    results.compact()
    assert len(results.path.read_text().splitlines()) == 2 and len(list(tmp_path.iterdir())) == 1


def test_the_text_is_cut_in_two_halves_that_share_nothing(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    write_shard(source / "t_train_000000.bin", range(50))
    write_shard(source / "t_val_000000.bin", range(100, 130))
    write_shard(source / "t_val_000001.bin", range(130, 160))
    folder = halves.cut(source, tmp_path / "out", 20)
    parts = [
        halves.read_tokens(folder / name / "wave_val_000000.bin").tolist()
        for name in ("selection", "held_out")
    ]
    assert parts == [list(range(100, 120)), list(range(120, 140))]
    assert (folder / "held_out/t_train_000000.bin").resolve() == (source / "t_train_000000.bin").resolve()
    assert halves.cut(source, tmp_path / "out", 20) == folder != halves.cut(source, tmp_path / "out", 99)


def test_cores_are_shared_out_without_overlap(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert process.share_cores(2, 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert process.share_cores(3, 4) == [()] * 3 and process.share_cores(8, 1) == [()] * 8


# -------------------------------------------------------------------------------------------- whole


def test_a_real_wave_from_its_script_to_the_held_out_score(tmp_path, dataset):
    script = tmp_path / "tiny.sh"
    script.write_text(
        f'source "{ROOT}/sweeps/lib.sh"\nquestion "Is more rate better?"\n'
        f"base baseline {' '.join(TINY.split())}\n"
        'arm high "it is" MATRIX_LR=0.08\nseeds 3\ndecide "by the score"\nrun_wave "$@"\n'
    )
    place = ["--data", str(dataset), "--tokenizer", str(dataset / "tokenizer.model"), "--proxy"]
    place += ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--finalists", "1"]
    env = {name: value for name, value in os.environ.items() if name not in engine.KNOBS}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    run = subprocess.run(["bash", str(script), *place], capture_output=True, text=True, env=env, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    found = Results(tmp_path / "results", "tiny").latest()
    assert {row["state"] for row in found.values()} == {"ok"} and len(found) == 2
    for row in found.values():
        assert row["config"]["vocab_size"] == VOCAB and row["steps"] == 12 and row["total_bytes"] > 1000
        assert row["held_out_val_bpb"] != row["val_bpb"] and 1 < row["held_out_val_bpb"] < 10
        assert [step for step, *_ in row["curve"]] == [0, 6, 12] and row["groups"]["mlp"]["bytes"] > 0
        assert len(row["code_sha256"]) == 64 and row["peak_memory_mib"] > 50 and row["step_ms"]["median"] > 0
    assert found["tiny.high.3"]["val_bpb"] != found["tiny.control.3"]["val_bpb"]
    assert "(" in run.stdout and "held out     tiny.high.3" in run.stdout


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "core.autocrlf=false"]
    return subprocess.run(
        ["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def copied_project(folder: Path) -> Path:
    """What git knows of this project, and what is new in it, without the large records; committed."""
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in listed.split("\0")[:-1]:
        if (ROOT / name).is_file() and not name.startswith("records/20"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "as it came")
    return folder


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_a_scratch_wave_and_its_report_leave_git_status_clean(tmp_path, dataset):
    project = copied_project(tmp_path / "project")
    script = tmp_path / "scratch.sh"
    script.write_text(
        f'source "{project}/sweeps/lib.sh"\nquestion "Why?"\nbase baseline\n'
        'arm a "it is" QK_GAIN_INIT=2\nseeds 1 2\nrun_wave "$@"\n'
    )
    options = ["--proxy", "--data", str(dataset), "--tokenizer", str(dataset / "tokenizer.model")]
    options += ["--script", str(project / "tests/support/stub_train.py")]
    env = {name: value for name, value in os.environ.items() if name not in engine.KNOBS}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "STUB": str(tmp_path)}
    (tmp_path / "plan.json").write_text("{}")
    commands = (["bash", str(script), *options], [sys.executable, "sweeps/report.py"])
    for command in commands:
        subprocess.run(command, cwd=project, env=env, check=True, timeout=120, capture_output=True)
    assert git(project, "status", "--porcelain", "--untracked-files=all") == ""
    assert len(Results(project / "runs/results", "scratch").latest()) == 4
    assert (project / "runs/results/scratch.md").is_file() and (project / "runs/report.html").is_file()
    assert list((project / "runs/results").glob(".*.lock")), "a lock was there to be seen"
    (project / ".final_model.pt.lock").touch()  # beside the models of a run in the project's folder
    assert git(project, "status", "--porcelain", "--untracked-files=all") == ""


def test_an_early_kill_waits_for_three_tenths_of_the_run_unless_said():
    assert engine.parse_early_kill("0.05") == engine.EarlyKill(0.05, 0.3)
    assert engine.parse_early_kill("0.05@0.4") == engine.EarlyKill(0.05, 0.4)


@pytest.mark.parametrize(
    "jobs, threads, is_proxy, gpus, widths",
    [
        (None, None, True, 0, (4, 1)), (None, None, False, 0, (1, 4)), (None, None, False, 2, (2, 2)),
        (None, 3, True, 0, (1, 3)), (3, None, False, 0, (3, 1)), (None, 8, False, 0, (1, 8)),
    ],
)  # fmt: skip
def test_runs_at_once_share_the_cores(monkeypatch, jobs, threads, is_proxy, gpus, widths):
    """On four cores."""
    monkeypatch.setattr(engine, "core_count", lambda: 4)
    options = argparse.Namespace(jobs=jobs, threads=threads, proxy=is_proxy)
    assert engine.choose_widths(options, [str(gpu) for gpu in range(gpus)]) == widths


def test_the_times_of_steps_are_those_between_logged_steps_after_the_tenth():
    logged = [
        (0, 0.0),
        (5, 5_000.0),
        (10, 6_000.0),
        (12, 6_200.0),
        (13, 6_290.0),
        (13, 6_290.0),
        (15, 6_530.0),
    ]
    events = [dict(event="step", step=step, train_ms=ms) for step, ms in logged]
    assert rows.step_times(events) == dict(median=100.0, p95=120.0)
    assert rows.step_times(events[:3]) == dict(median=600.0, p95=1000.0), "none is after the tenth"
    assert rows.step_times(events[:1]) is None
    many = [
        dict(event="step", step=10 + n, train_ms=n * (n - 1) / 2) for n in range(1, 42)
    ]  # 1, 2, ... 40 ms
    assert rows.step_times(many) == dict(median=20.5, p95=38.0)


def test_the_data_of_the_command_line_win_over_those_of_the_environment(tmp_path, monkeypatch):
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            write_shard(tmp_path / name / f"x_{split}_000000.bin", [1, 2, 3])
        (tmp_path / name / "t.model").write_bytes(b"")
    mine, other = tmp_path / "mine", tmp_path / "other"
    given = argparse.Namespace(data=mine, tokenizer=mine / "t.model")
    nothing = argparse.Namespace(data=None, tokenizer=None)
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engine, "default_data", lambda: (other, other / "t.model"))
    assert engine.find_data(given) == (mine, mine / "t.model")
    assert engine.find_data(nothing) == (other, other / "t.model")
    monkeypatch.setenv("DATA_PATH", str(other))
    with pytest.raises(engine.UserError, match="go together"):
        engine.find_data(nothing)
    monkeypatch.setenv("TOKENIZER_PATH", str(other / "t.model"))
    assert engine.find_data(given) == (mine, mine / "t.model")
    monkeypatch.setattr(engine, "default_data", None)
    assert engine.find_data(nothing) == (other, other / "t.model")
