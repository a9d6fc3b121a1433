"""A wait says what it is and how long it takes; a CPU foretells its warm-up and refuses one of hours."""

import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from tests.conftest import ROOT, env_of, random_model
from train_gpt import Config, RunLog, Runtime, duration_text, foretell_warm_up, report_progress

FORECAST = re.compile(
    r"^first forecast: (\S+) s a step on this CPU, uncompiled; "
    r"warm-up (.+), training (.+), steps: (\d+)$",
    re.M,
)
STATUS = re.compile(r"training: (\d+)% of the run, loss [\d.]+, [\d,]+ tokens/s, about \d+ s left")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A log whose console the test holds; `log.clock[0]` is the time."""
    clock = [1000.0]
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: clock[0])
    run_log = RunLog(tmp_path, "x")
    run_log.clock = clock
    yield run_log
    run_log.close()


def on_a_terminal(monkeypatch, answer: bool = True) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: answer)


# ---------------------------------------------------------------- the console


def test_a_status_elsewhere_comes_after_three_seconds_and_then_by_the_minute(log, capsys, tmp_path):
    told = []
    for second in range(200):
        log.clock[0] = 1000.0 + second
        if log.is_status_due("training"):
            log.status("training", "5% of the run")
            told.append(second)
    assert told == [3, 63, 123, 183]
    assert capsys.readouterr().out == "training: 5% of the run\n" * 4
    assert (tmp_path / "x.txt").read_text() == "", "the official log stays as it was"


def test_a_status_on_a_terminal_is_redrawn_and_makes_room_for_lines(log, capsys, monkeypatch, tmp_path):
    on_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "20")
    assert log.is_status_due("training")
    log.status("training", "a text that is wider than the window")
    assert not log.is_status_due("training")
    log.clock[0] += 0.6
    assert log.is_status_due("training")
    log.status("training", "b")
    log.line("step:1/2")
    log.line("step:2/2")
    erase = train_gpt.ERASE_LINE
    assert capsys.readouterr().out == (f"training: a text th{erase}training: b{erase}step:1/2\nstep:2/2\n")
    assert (tmp_path / "x.txt").read_text() == "step:1/2\nstep:2/2\n"


def test_what_closes_the_log_clears_the_status(tmp_path, capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    log = RunLog(tmp_path, "x")
    log.status("training", "b")
    log.close()
    assert capsys.readouterr().out == f"training: b{train_gpt.ERASE_LINE}"


def test_other_ranks_say_nothing(capsys):
    log = RunLog(None, "x")
    log.say("compiling")
    assert not log.is_status_due("training") and capsys.readouterr().out == ""


def test_what_is_said_is_not_logged(log, capsys, tmp_path):
    log.say("compiling")
    assert capsys.readouterr().out == "compiling\n" and (tmp_path / "x.txt").read_text() == ""


def test_a_wait_tells_its_share_and_what_is_left(log, capsys):
    log.report_wait("scoring", 0.1, 1.0)
    log.clock[0] += 4
    log.report_wait("scoring", 0.25, 5.0)
    log.report_wait("scoring", 0.5, 10.0)
    log.report_wait("scoring", 1.0, 20.0)
    log.clock[0] += 1
    log.report_wait("scoring", 0.1, 1.0)
    log.clock[0] += 3
    log.report_wait("scoring", 0.2, 4.0)
    assert capsys.readouterr().out.splitlines() == [
        "scoring: 25% done, about 15 s left",
        "scoring: 20% done, about 16 s left",
    ], "each wait that is longer than three seconds has its line, and none says that nothing is left"


@pytest.mark.parametrize(
    "knobs, steps, seconds, share, left",
    [
        (dict(iterations=20_000, max_wallclock_seconds=240.0), 60, 60.0, "25%", "180 s"),  # the clock ends it
        (dict(iterations=100, max_wallclock_seconds=240.0), 60, 60.0, "60%", "40 s"),  # the steps do
        (dict(iterations=100, max_wallclock_seconds=0.0), 10, 900.0, "10%", "2.2 hours"),  # no clock
    ],
)
def test_the_time_left_follows_the_progress(log, capsys, knobs, steps, seconds, share, left):
    cfg = Config(train_batch_tokens=8192, train_seq_len=256, **knobs)
    clock = SimpleNamespace(seconds=lambda: seconds)
    training = SimpleNamespace(clock=clock, step=steps, logged_loss=3.25)
    assert not log.is_status_due("training")
    log.clock[0] += 4
    report_progress(log, cfg, training)
    pace = f"{steps * 8192 / seconds:,.0f}"
    said = f"training: {share} of the run, loss 3.2500, {pace} tokens/s, about {left} left\n"
    assert capsys.readouterr().out == said


def test_durations_are_for_readers():
    assert [duration_text(s) for s in (0.4, 38, 599, 599.9999, 601, 7100, 23_880)] == [
        "0 s",
        "38 s",
        "599 s",
        "10 minutes",
        "10 minutes",
        "118 minutes",
        "6.6 hours",
    ]


# ---------------------------------------------------------------- the forecast before the warm-up


def slow(monkeypatch, step_seconds: float) -> None:
    monkeypatch.setattr(train_gpt, "time_step", lambda cfg, model, runtime: step_seconds)


def test_a_warm_up_of_hours_is_refused_with_the_mend(tiny, capsys, monkeypatch):
    slow(monkeypatch, 1194.0)
    cfg = tiny(warmup_steps=20, max_wallclock_seconds=600.0)
    with pytest.raises(train_gpt.RunError) as error:
        foretell_warm_up(cfg, None, Runtime())
    assert error.value.code == 2 and "6.6 hours" in str(error.value)
    assert "bash run_best.sh" in str(error.value) and "MAX_WARMUP_SECONDS=0" in str(error.value)
    said = FORECAST.search(capsys.readouterr().out).groups()
    assert said == ("1.19e+03", "6.6 hours", "20 minutes", "1"), "the forecast comes first"


@pytest.mark.parametrize(
    "limit, step_seconds, is_refused", [(600, 29, False), (600, 31, True), (0, 1e6, False)]
)
def test_the_limit_is_a_knob(tiny, monkeypatch, limit, step_seconds, is_refused):
    slow(monkeypatch, step_seconds)
    cfg = tiny(warmup_steps=20, max_warmup_seconds=float(limit))
    if is_refused:
        with pytest.raises(train_gpt.RunError, match="MAX_WARMUP_SECONDS"):
            foretell_warm_up(cfg, None, Runtime())
    else:
        assert foretell_warm_up(cfg, None, Runtime()) is None


def test_no_warm_up_and_a_gpu_are_not_timed(tiny, monkeypatch):
    monkeypatch.delattr(train_gpt, "time_step")
    assert foretell_warm_up(tiny(warmup_steps=0), None, Runtime()) is None
    assert foretell_warm_up(tiny(warmup_steps=20), None, Runtime(device=torch.device("cuda"))) is None


def test_the_pass_that_is_timed_leaves_no_trace(tiny):
    cfg = tiny(layer_drop=0.2)
    model = random_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_before = torch.get_rng_state()
    assert 0 < train_gpt.time_step(cfg, model, Runtime()) < 60
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_before)


def test_a_refused_run_leaves_nothing_behind(run_main, tmp_path, monkeypatch):
    slow(monkeypatch, 1e4)
    code, out, err = run_main(run_id="mine")
    assert code == 2 and err.count("\n") == 1 and "run_best.sh" in err
    assert "first forecast" in out and "warmup_step" not in out
    assert not list(tmp_path.iterdir()), "the name is free for the next try"


# ---------------------------------------------------------------- runs


def test_a_compiled_run_says_that_it_compiles_and_its_log_does_not(run_main, tmp_path, graphs_alone):
    code, out, err = run_main(compile="1", run_id="x", iterations=2, num_layers=1)
    assert code == 0, err
    said = [line for line in out.splitlines() if line.startswith("compiling the model for ")]
    assert [line.split()[4].strip(":") for line in said] == ["scoring", "training"]
    assert all("usually" in line for line in said)
    assert out.index("scoring: usually") < out.index("training: usually") < out.index("warmup_step:1/1")
    assert "compiling" not in (tmp_path / "logs/x.txt").read_text().rpartition("=" * 100)[2]


def read_terminal(command: list[str], cwd, env) -> str:
    """What a command prints where stdout is a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=slave, stderr=subprocess.PIPE)
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 1 << 16)
        except OSError:  # Linux's end of a terminal
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    assert process.wait(timeout=60) == 0, process.stderr.read()
    return b"".join(chunks).decode()


def test_a_run_on_a_terminal_shows_how_far_it_is(tmp_path, dataset):
    env = env_of(dataset, iterations=10**6, max_wallclock_seconds=2.0, warmup_steps=1, run_id="x")
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    shown = read_terminal(command, tmp_path, env | {"COLUMNS": "100"})
    shares = [int(share) for share in STATUS.findall(shown)]
    assert len(shares) >= 2 and shares == sorted(shares)
    assert shares[-1] > 40, "by the clock, not by a million steps"
    assert train_gpt.ERASE_LINE in shown
    log = (tmp_path / "logs/x.txt").read_text().rpartition("=" * 100)[2]
    assert "of the run" not in log and train_gpt.ERASE_LINE not in log and "step:1/1000000" in log


def test_a_run_elsewhere_prints_lines_alone(run_main):
    code, out, _ = run_main(iterations=3)
    assert code == 0 and "step:3/3" in out and "\r" not in out and "\033" not in out


def test_the_limit_may_be_below_a_second(tiny, monkeypatch):
    slow(monkeypatch, 1.0)
    with pytest.raises(train_gpt.RunError, match="MAX_WARMUP_SECONDS"):
        foretell_warm_up(tiny(warmup_steps=20, max_warmup_seconds=0.5), None, Runtime())
