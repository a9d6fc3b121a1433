"""A run that was stopped and goes on ends as one that was not, bit for bit; and what of that is refused.

Runs are forks of a process that has the imports (forkserver.py). Uninterrupted ones are made once for each
set of knobs. A patch makes a rank send itself a signal at a place of the script, so nothing here is a race.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import numpy as np
import pytest
import torch

import train_gpt
from tests.conftest import ROOT, write_shard
from tests.support.forkserver import left_behind
from tests.support.stops import COUNTS, STEPS, Folder, dies, in_step, steady
from train_gpt import Config, Run, RunLog, Runtime

EACH_STEP = dict(checkpoint_seconds=1e-9)
DEPTH = dict(num_repeats=3, prog_depth="0.35:2,1.0:3")
LOOP = dict(num_layers=3, num_loops=2, loop_start=1, loop_end=1, skip_gates_enabled=1, smear_gate_enabled=1)
SWA = dict(swa_enabled=1, swa_every=2, swa_start_frac=2.0)
SLIDES = dict(eval_stride=16, eval_batch_seqs=16)
SCORES = dict(SLIDES, use_hedge=1)
MANY = DEPTH | SWA | SCORES | dict(data_shuffle=1)
# The windows change at the third and the sixth of eight steps, the layers at the third and the fifth.
LENGTHS = dict(train_seq_schedule="8@0.25,16@0.6,32@1.0", seq_change_warmup_steps=2, pack_documents=1)
LONGER = LOOP | LENGTHS | dict(enable_looping_at=0.5, data_shuffle=1)
MEMORY = dict(ema_decay=0.8, head_prune=0.5, head_prune_at=0.3, synaptic_scale=1)
# Documents are scored and learnt from in groups of four; a block of four, then one of all others.
DOCUMENTS = dict(ttt_steps=1, ttt_batch_size=4, ttt_lora_rank=2, ttt_chunk_size=16, ttt_eval_seq_len=32)
STOPPED, LOST = train_gpt.PREEMPTED, train_gpt.LOST_RANK


@pytest.fixture(scope="module")
def whole(new):
    """whole(knobs, ranks) -> what an uninterrupted run leaves; made once."""
    made = {}

    def get(knobs: dict, ranks: int = 1) -> dict:
        key = json.dumps(knobs), ranks
        if key not in made:
            folder = new(knobs, ranks)
            assert folder.start() == [0] * ranks, folder.text("0.err")
            made[key] = folder.left()
        return made[key]

    return get


def same(found: dict, expected: dict) -> None:
    """Key by key: the whole would be a screenful of bytes."""
    assert [name for name in expected if found[name] != expected[name]] == []


# --- one stop at every place ---

# knobs, what stops it, more knobs of the stopped run. One with SIGKILL and no checkpoints begins anew.
PLACES = {
    "step_term": (MANY, in_step(5, SIGTERM), {}),
    "step_int": (MANY, in_step(2, SIGINT), {}),
    "step_kill": (MANY, in_step(6, SIGKILL), EACH_STEP),
    "step_kill_no_checkpoint": (MANY, in_step(6, SIGKILL), {}),
    "before_the_switch_of_depth": (MANY, in_step(2, SIGTERM), {}),
    "at_the_switch_of_depth": (MANY, in_step(3, SIGTERM), {}),
    "at_the_switch_of_depth_kill": (MANY, in_step(3, SIGKILL), EACH_STEP),
    "before_the_loop": (LOOP, in_step(2, SIGTERM), {}),
    "at_the_switch_to_the_loop": (LOOP, in_step(3, SIGTERM), {}),
    "in_the_loop_kill": (LOOP, in_step(5, SIGKILL), EACH_STEP),
    "at_a_change_of_length": (LONGER, in_step(2, SIGTERM), {}),
    "while_the_rate_rises": (LONGER, in_step(3, SIGTERM), {}),
    "at_the_last_length_kill": (LONGER, in_step(5, SIGKILL), EACH_STEP),
    "write_of_a_checkpoint": (MANY, dies("os.fsync", call=5), EACH_STEP),
    "write_of_the_first_checkpoint": (MANY, dies("os.fsync"), EACH_STEP),
    "rename_of_a_checkpoint": (MANY, dies("Path.rename", call=5), EACH_STEP),
    "after_that_rename": (MANY, dies("Path.rename", call=5, after=True), EACH_STEP),
    "memory_before_pruning": (MEMORY, in_step(2, SIGTERM), {}),
    "memory_after_pruning": (MEMORY, in_step(4, SIGTERM), {}),
    "memory_kill": (MEMORY, in_step(5, SIGKILL), EACH_STEP),
    "last_validation": (MANY, dies("validate", SIGTERM), {}),
    "averaging": (MANY, dies("Average.copy_into_model", SIGKILL), {}),
    "averaging_ema": (MEMORY, dies("Average.copy_into_model", SIGTERM, after=True), {}),
    "packing": (MANY, dies("seal", SIGKILL), {}),
    "packing_term": (MANY, dies("seal", SIGTERM), {}),
    "between_the_models": (MANY, dies("Path.rename", SIGKILL, call=2, after=True), {}),
    "between_the_models_term": (MANY, dies("Path.rename", SIGTERM, call=2, after=True), {}),
    "write_of_the_artifact": (MANY, dies("os.fsync", SIGKILL, call=3), {}),
    "after_the_artifact": (MANY, dies("Path.rename", SIGKILL, call=3, after=True), {}),
    "roundtrip": (MANY, dies("token_nats", SIGTERM, call=6), {}),
    "before_sliding": (MANY, dies("evaluate", SIGKILL, call=4), {}),
    "sliding": (MANY, dies("evaluate", SIGTERM, call=4), {}),
    "hedge": (MANY, dies("ngram_probabilities", SIGTERM), {}),
    "hedge_kill": (MANY, dies("ngram_probabilities", SIGKILL), {}),
    "before_the_result": (MANY, dies("finish", SIGKILL), {}),
    "before_the_end": (MANY, dies("Checkpoints.clear", SIGKILL), {}),
}

SCORED = dict(roundtrip=0, before_sliding=1, sliding=1, hedge=2, hedge_kill=2, before_the_result=3)  # by then


def cases(places: dict, slow: str) -> list:
    """All places; of those at which both signals, or two kinds of run, are tried, the second is slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow.split() else []) for name in places]


SLOW_PLACES = """at_the_switch_of_depth_kill in_the_loop_kill at_the_last_length_kill memory_kill
averaging_ema packing_term between_the_models_term hedge_kill"""


@pytest.mark.parametrize("place", cases(PLACES, SLOW_PLACES))
def test_a_stopped_run_goes_on_as_if_it_had_not_been(new, whole, place):
    knobs, patch, more = PLACES[place]
    expected, folder = whole(knobs), new(knobs)
    killed = f", {int(SIGKILL)}, " in patch
    assert folder.start(patch, **more) == [-SIGKILL if killed else STOPPED], folder.text("0.err")
    assert killed or re.search(r"checkpoints/r-0000000\d\.pt is saved, to go on:$", folder.error())
    assert len(folder.events("score")) == SCORED.get(place, len(folder.events("score")))
    assert folder.resume(**more) == [0] and folder.text("0.err") == ""
    same(folder.left(), expected)
    assert folder.steps() == [*range(1, STEPS + 1)] or killed
    assert len(folder.result()["resumed"]) == (
        0 if place.endswith(("no_checkpoint", "first_checkpoint")) else 1
    )


TWO = {
    "step_term_one": (in_step(4, SIGTERM, only=1), {}, [STOPPED, STOPPED]),
    "step_term_both": (in_step(3, SIGTERM), {}, [STOPPED, STOPPED]),
    "step_kill_one": (in_step(6, SIGKILL, only=1), EACH_STEP, [LOST, -SIGKILL]),
    "step_kill_main": (in_step(6, SIGKILL, only=0), EACH_STEP, [-SIGKILL, LOST]),
    "write_of_a_checkpoint": (dies("os.fsync", call=5), EACH_STEP, [-SIGKILL, LOST]),
    "packing": (dies("seal", SIGKILL), {}, [-SIGKILL, LOST]),
    "sliding_term_both": (dies("evaluate", SIGTERM, call=4), {}, [STOPPED, STOPPED]),
    "hedge": (dies("ngram_probabilities", SIGKILL), {}, [-SIGKILL, LOST]),
}


@pytest.mark.parametrize("place", cases(TWO, "step_term_both write_of_a_checkpoint hedge"))
def test_a_stopped_run_of_two_ranks_goes_on_as_if_it_had_not_been(new, whole, place):
    patch, more, codes = TWO[place]
    expected, folder = whole(MANY, 2), new(MANY, 2)
    assert folder.start(patch, **more) == codes, folder.text("0.err") + folder.text("1.err")
    errors = [folder.text(f"{rank}.err") for rank, code in enumerate(codes) if code > 0]
    lines = [[line for line in text.splitlines() if " RESUME=auto RUN_ID=" not in line] for text in errors]
    assert all(
        len(told) <= 1 and told == [line for line in told if line.startswith("error: ")] for told in lines
    )
    assert folder.resume(**more) == [0, 0]
    same(folder.left(), expected)


def test_a_score_by_documents_goes_on_between_groups(new, short_dataset, tmp_path):
    data = shutil.copytree(short_dataset, tmp_path / "data")
    (path,) = data.glob("*_val_*")
    tokens = np.array(train_gpt.open_shard(path))
    tokens[::40] = train_gpt.BOS_ID
    write_shard(path, tokens)
    uninterrupted, folder = new(DOCUMENTS, 2), new(DOCUMENTS | EACH_STEP, 2)
    assert uninterrupted.start(data=data) == [0, 0]
    codes = folder.start(dies("DocumentLora.begin_group", SIGKILL, call=2, only=1), data=data)
    assert codes == [LOST, -SIGKILL], folder.text("0.err")
    assert folder.resume(data=data) == [0, 0]
    same(folder.left(), uninterrupted.left())
    assert re.search(r"^ttt: goes on after \d+ s, turns:\d+$", folder.text("logs/r.txt"), re.M)


def test_a_chain_of_stops_in_one_run(new, whole):
    """Stops of all kinds, one after the other; the log is one, and says where each piece began."""
    expected, folder = whole(MANY), new(MANY | EACH_STEP)
    assert folder.start(in_step(1, SIGTERM)) == [STOPPED]
    assert folder.resume(in_step(3, SIGKILL)) == [-SIGKILL]
    assert folder.resume(dies("os.fsync", call=2)) == [-SIGKILL]
    assert folder.resume(in_step(5, SIGINT)) == [STOPPED]
    assert folder.resume(dies("seal", SIGTERM)) == [STOPPED]
    assert folder.resume(dies("ngram_probabilities", SIGKILL)) == [-SIGKILL]
    assert folder.resume() == [0]
    same(folder.left(), expected)
    marks, result = [event["step"] for event in folder.events("resumed")], folder.result()
    assert result["resumed"] == marks == [2, 3, 3, 6, 8, 8]
    assert sorted(path.name for path in folder.path.glob("logs/r.*")) == ["r.jsonl", "r.txt"]
    text = folder.text("logs/r.txt")
    assert [
        int(step) for step in re.findall(r"^resumed: step:(\d+) from checkpoints/r-", text, re.M)
    ] == marks
    assert text.count("\nRunning Python ") == 1 and len(folder.events("config")) == 1


def test_random_stops(new, whole):
    """As the benchmark of kills, some of them: moments by the clock, so each run of the test has its own."""
    expected, folder = whole(MANY), new(MANY | EACH_STEP)
    for number, seconds in ((SIGTERM, 0.25), (SIGKILL, 0.4), (SIGTERM, 0.3), (SIGKILL, 0.5)):
        if folder.resume(kill=[seconds, int(number), 0]) == [0]:
            break
    else:
        assert folder.resume() == [0]
    same(folder.left(), expected)


# --- the clock ---


def test_the_training_clock_goes_on_from_where_it_was(new):
    knobs = dict(iterations=1_000_000, max_wallclock_seconds=1.2, warmdown_iters=None, warmdown_frac=0.5)
    folder = new(knobs)
    assert folder.start(steady() + in_step(12, SIGTERM)) == [STOPPED]
    before = folder.events("step")[-1]
    assert before["step"] == 13 and 0 < before["train_ms"] < 1100
    assert folder.resume(steady(start=100_000)) == [0]
    events, result = folder.events("step"), folder.result()
    times, shares = ([event[name] for event in events] for name in ("train_ms", "progress"))
    assert times == sorted(times) and shares == sorted(shares)
    assert 1.0 < result["train_seconds"] <= 1.2
    # A busy machine may leave more than 2 % of this short clock to a step that would not fit.
    assert result["truncated"] == (result["train_seconds"] < 0.98 * 1.2)
    assert times[13] - times[12] < 500  # what lay between is not counted


# --- logs, files, what is kept ---


def test_a_torn_line_is_cut_and_nothing_else(new, whole):
    folder = new(MANY)
    assert folder.start(in_step(3, SIGTERM)) == [STOPPED]
    for name in ("logs/r.txt", "logs/r.jsonl"):
        with (folder.path / name).open("a") as file:
            file.write('{"event": "st')
    before = {name: folder.text(name) for name in ("logs/r.txt", "logs/r.jsonl")}
    assert folder.resume() == [0]
    for name, text in before.items():
        assert folder.text(name).startswith(
            text.removesuffix('{"event": "st') + ("" if "txt" in name else "{")
        )
    same(folder.left(), whole(MANY))


def test_the_last_two_checkpoints_are_kept_until_the_result(new):
    folder = new(EACH_STEP)
    assert folder.start(in_step(5, SIGTERM)) == [STOPPED]
    assert folder.checkpoints() == ["r-00000005.pt", "r-00000006.pt"]
    assert folder.resume(dies("finish", SIGTERM)) == [STOPPED]
    assert folder.checkpoints() == ["r-00000007.pt", "r-00000008.pt"]
    assert folder.resume() == [0] and not (folder.path / "checkpoints").exists()
    assert folder.resume() == [2] and "logs/r.txt" in folder.error()  # it is finished


def test_the_checkpoints_of_another_run_are_left_alone(new):
    folder = new({})
    (folder.path / "checkpoints").mkdir()
    for name in ("other-00000003.pt", "r-2-00000003.pt"):
        (folder.path / "checkpoints" / name).write_text("mine")
    assert folder.start(in_step(2, SIGTERM)) == [STOPPED]
    assert folder.resume() == [0]
    assert folder.checkpoints() == ["other-00000003.pt", "r-2-00000003.pt"]


def test_a_checkpoint_can_be_named(new, whole):
    folder = new(EACH_STEP)
    assert folder.start(in_step(5, SIGTERM)) == [STOPPED]
    assert folder.start(resume="checkpoints/r-00000005.pt") == [0]
    assert folder.result()["resumed"] == [5]
    same(folder.left(), whole({}))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    torch.save({"tok_emb.weight": torch.zeros(3)}, path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def stopped(new):
    """A run stopped after six steps, with two checkpoints; copied by who changes it."""
    folder = new(EACH_STEP)
    assert folder.start(in_step(5, SIGTERM)) == [STOPPED]
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped.path, tmp_path / "copy")  # with its times
    return Folder(tmp_path / "copy", stopped.server, stopped.dataset, EACH_STEP)


@pytest.mark.parametrize("spoil", [cut, flip, foreign, empty])
def test_a_damaged_checkpoint_is_passed_over(copy, whole, spoil):
    spoil(copy.path / "checkpoints/r-00000006.pt")
    assert copy.resume() == [0]
    assert re.fullmatch(r"warning: .*r-00000006\.pt .*going on from .*r-00000005\.pt\n", copy.text("0.err"))
    same(copy.left(), whole({}))


@pytest.mark.parametrize("spoil", [cut, flip, foreign, empty])
def test_without_a_whole_checkpoint_it_is_refused(copy, spoil):
    for name in ("r-00000005.pt", "r-00000006.pt"):
        spoil(copy.path / "checkpoints" / name)
    log = copy.text("logs/r.txt")
    assert copy.resume() == [2] and copy.text("logs/r.txt") == log
    assert all(f"r-0000000{step}.pt" in copy.error() for step in (5, 6)) and "RESUME=0" in copy.error()


def test_a_copy_to_another_disk_loses_times_and_not_the_order(copy, whole):
    """The older checkpoint is the newer file; macOS has left a file beside each."""
    folder = copy.path / "checkpoints"
    for age, name in enumerate(["r-00000006.pt", "r-00000005.pt", "._r-00000007.pt", ".DS_Store"]):
        path = folder / name
        if not path.exists():
            path.write_bytes(b"\0\5\x16\7")
        os.utime(path, (2e9 + age, 2e9 + age))
    assert copy.resume(run_id="") == [0], copy.text("0.err")
    assert "resumed: step:6 from" in copy.text("logs/r.txt") and copy.text("0.err") == ""
    for path in folder.iterdir():
        path.unlink()  # what macOS left is still there, and nothing else
        assert path.name in ("._r-00000007.pt", ".DS_Store")
    folder.rmdir()
    same(copy.left(), whole({}))


def test_of_two_runs_the_one_that_claimed_the_folder_last_goes_on(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for age, name in enumerate(["b-00000003.pt", "b-00000002.pt", "a-00000009.pt"]):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (1e9 + age, 1e9 + age))
    names = {owner: [] for owner in ("", "a", "b", "gone", "b\xff")}
    for owner in names:
        (tmp_path / ".final_model.pt.lock").write_bytes(owner.encode("latin-1"))
        names[owner] = [path.name for path in train_gpt.checkpoint_files(folder)]
    first, second = ["a-00000009.pt"], ["b-00000003.pt", "b-00000002.pt"]
    assert names == {"": first, "a": first, "b": second, "gone": first, "b\xff": first}


def test_an_absent_checkpoint_is_refused(copy):
    assert copy.start(resume="checkpoints/none.pt") == [2] and "checkpoints/none.pt" in copy.error()


def test_without_resume_the_same_run_id_is_refused(copy):
    assert copy.start() == [2] and "logs/r.txt is there" in copy.error()


def test_another_run_id_does_not_go_on(copy):
    before = copy.checkpoints()
    assert copy.resume(run_id="other") == [0] and copy.checkpoints() == before
    assert left_behind(copy.path, "other")["losses"][0][0] == 1  # it has its own first step


@pytest.mark.parametrize("knobs, named", [
    (dict(matrix_lr=0.02), ["MATRIX_LR=0.04 there, 0.02 here"]),
    (dict(seed=7), ["SEED=1337 there, 7 here"]),
    (dict(iterations=9, model_dim=16), ["ITERATIONS=8 there, 9 here", "MODEL_DIM=32 there, 16 here"]),
    (dict(ema_decay=0.5), ["EMA_DECAY=0.0 there, 0.5 here"]),
])  # fmt: skip
def test_other_knobs_are_refused_and_named(copy, knobs, named):
    assert copy.resume(**knobs) == [2]
    assert all(name in copy.error() for name in named) and copy.error().count(" there, ") == len(named)


@pytest.mark.parametrize("stored, current, told", [
    (dict(SEED=1), dict(SEED=1), ""),
    (dict(EMA_DECAY=0.5), {}, "EMA_DECAY=0.5 there, 0.0 here"),
    ({}, dict(TIE_EMBEDDINGS=False, MATRIX_LR=0.1),
     "TIE_EMBEDDINGS=True there, False here; MATRIX_LR=0.04 there, 0.1 here"),
    (dict(MATRIX_LR=0.04, WARMDOWN_ITERS=1200), {}, ""),
    ({"train_gpt.py": "ab", "NUM_LAYERS": 4}, {"train_gpt.py": "cd"},
     "train_gpt.py=ab there, cd here; NUM_LAYERS=4 there, 9 here"),
])  # fmt: skip
def test_a_knob_that_a_checkpoint_lacks_is_at_its_default(stored, current, told):
    assert train_gpt.describe_differences(Config(), stored, current) == told


def test_other_data_is_refused_and_named(copy, short_dataset, tmp_path):
    data = shutil.copytree(short_dataset, tmp_path / "data")
    (data / "toy_train_000001.bin").unlink()
    assert copy.resume(data=data) == [2] and "training shards=" in copy.error()
    shutil.copy(short_dataset / "toy_train_000000.bin", data / "toy_val_000000.bin")
    assert copy.resume(data=data) == [2] and "validation text=" in copy.error()


def test_another_script_is_refused_and_named(copy):
    patch = "source = train_gpt.own_source(); train_gpt.own_source = lambda: source + b'#'"
    assert copy.resume(patch) == [2] and "train_gpt.py=" in copy.error() and "there, " in copy.error()


def test_the_place_may_change(copy, whole, short_dataset, tmp_path):
    data = shutil.copytree(short_dataset, tmp_path / "moved")
    assert copy.resume(data=data, val_loss_every=3, checkpoint_seconds=0) == [0]
    found, expected = copy.left(), whole({})
    same(found, expected)


# --- signals ---

IGNORED = "import signal\nsignal.signal(signal.SIG{name}, signal.SIG_IGN)\n"


@pytest.mark.parametrize("name", ["HUP", "USR1", "USR2", "XCPU"])
def test_other_signals_stop_a_run_as_sigterm_does(new, whole, name):
    """A terminal that closes, Slurm's warnings, a limit of processor time; unless ignored, as under nohup."""
    number = getattr(signal, f"SIG{name}")
    folder = new({})
    assert folder.start(in_step(3, number)) == [STOPPED], folder.text("0.err")
    assert folder.error() == f"error: stopped by SIG{name}; checkpoints/r-00000004.pt is saved, to go on:\n"
    assert folder.events("end")[0]["status"] == "preempted"
    assert folder.resume(IGNORED.format(name=name) + in_step(5, number)) == [0]
    same(folder.left(), whole({}))


def test_one_of_two_ranks_that_is_warned_stops_both(new, whole):
    folder = new({}, 2)
    assert folder.start(in_step(3, signal.SIGUSR1, only=1)) == [STOPPED, STOPPED]
    assert folder.resume() == [0, 0]
    same(folder.left(), whole({}, 2))


def test_a_terminal_that_closes_takes_nothing_with_it(new):
    """It sends SIGHUP, and whatever is written to it from then on fails."""
    gone = "import os\nmaster, slave = os.openpty()\nos.dup2(slave, 1)\nos.dup2(slave, 2)\nos.close(slave)\n"
    closes = """
inside = train_gpt.train_step
def closing(run, optimisers, batch, plan, limit):
    if run.runtime.defers_stop and plan.step == 3:
        os.close(master)
        die(1)
    return inside(run, optimisers, batch, plan, limit)
train_gpt.train_step = closing
"""
    folder = new({})
    assert folder.start(gone + closes) == [STOPPED]
    assert folder.events("end")[0]["status"] == "preempted" and folder.checkpoints() == ["r-00000004.pt"]


def pasted(command: str) -> list[str]:
    """Exit code and output of a command that a user pastes into a new terminal."""
    env = dict(PATH="/usr/bin:/bin", HOME="/nonexistent", PYTHONPATH=str(ROOT))
    run = subprocess.run(
        ["bash", "-c", command], cwd="/", env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def test_the_last_line_goes_on_when_it_is_pasted(new, whole, short_dataset, tmp_path):
    """From another folder, in an empty environment; there are spaces and quotes in its paths."""
    data = shutil.copytree(short_dataset, tmp_path / "the user's data")
    folder = new(dict(out_dir="an out's", num_layers=1, matrix_lr=0.03))
    (folder.path / "train_gpt.py").symlink_to(ROOT / "train_gpt.py")
    assert folder.start(in_step(3, SIGTERM), data=data) == [STOPPED]
    lines = pasted(folder.command())
    assert lines[0].startswith("resumed: step:4 from an out's/checkpoints/r-00000004.pt")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    other = new(dict(num_layers=1, matrix_lr=0.03))
    assert other.start() == [0]
    assert result["status"] == "ok" and result["val_bpb"] == other.result()["val_bpb"]


GOES_ON = "RESUME=auto RUN_ID=r OUT_DIR=. SEED=7"
LAUNCHED = [
    ({}, f"cd '/a b' && {GOES_ON} /py x.py"),
    (dict(RESUME="0", RUN_ID="old", OUT_DIR="o"), f"cd '/a b' && {GOES_ON} /py x.py"),
    (dict(OMP_NUM_THREADS="2", SHELL="x"), f"cd '/a b' && {GOES_ON} OMP_NUM_THREADS=2 /py x.py"),
    (
        dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_WORLD_SIZE="1", TORCHELASTIC_MAX_RESTARTS="3"),
        f"cd '/a b' && {GOES_ON} /py -m torch.distributed.run --standalone --nproc_per_node=2 "
        "--max-restarts=3 x.py",
    ),
    (dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", GROUP_WORLD_SIZE="2"), f"export {GOES_ON}"),
    (dict(WORLD_SIZE="2"), f"export {GOES_ON}"),
    (
        dict(STARTED_BY="bash '/a b/run_best.sh' best", SET_BY_PRESET=" MATRIX_LR X", MATRIX_LR="1"),
        f"bash '/a b/run_best.sh' best {GOES_ON}",
    ),
]


@pytest.mark.parametrize("env, command", LAUNCHED)
def test_the_command_is_that_which_began_the_run(monkeypatch, env, command):
    monkeypatch.setattr("os.getcwd", lambda: "/a b")
    monkeypatch.setattr("sys.argv", ["x.py"])
    monkeypatch.setattr("sys.executable", "/py")
    assert train_gpt.command_to_go_on(Config(seed=7), "r", dict(SEED="7", **env)) == command


@pytest.mark.parametrize("word", ["1", "true", "yes"])
def test_a_word_for_resume_that_is_no_path_is_told_what_is_meant(new, word):
    folder = new({})
    assert folder.start(resume=word) == [2]
    assert f"RESUME={word}: no checkpoint at {word}; RESUME=auto goes on from the newest" in folder.error()


def test_a_restart_goes_on_from_its_newest_checkpoint_not_from_the_named_one(copy, whole):
    """torchrun --max-restarts starts the same command again, RESUME=path with it."""
    named = "checkpoints/r-00000005.pt"
    assert copy.start(in_step(6, SIGKILL), resume=named) == [-SIGKILL]
    again = "import os\nos.environ['TORCHELASTIC_RESTART_COUNT'] = '1'\n"
    assert copy.start(again, resume=named) == [0]
    assert copy.result()["resumed"] == [5, 6]
    same(copy.left(), whole({}))


def test_a_restart_before_the_first_new_checkpoint_goes_back_to_the_named_one(copy):
    again = "import os\nos.environ['TORCHELASTIC_RESTART_COUNT'] = '1'\n"
    assert copy.start(again, resume="checkpoints/r-00000005.pt") == [0]
    assert copy.result()["resumed"] == [5]  # not from 6, which was written before it was named


def test_a_second_signal_does_not_break_the_save(new, whole):
    folder = new({})
    again = dies("os.fsync", SIGTERM) + dies("torch.save", SIGINT) + dies("Path.rename", SIGTERM)
    assert folder.start(in_step(3, SIGTERM) + again) == [STOPPED]
    assert folder.checkpoints() == ["r-00000004.pt"]
    assert folder.resume() == [0]
    same(folder.left(), whole({}))


def test_the_line_says_how_to_go_on(stopped):
    line = "error: stopped by SIGTERM; checkpoints/r-00000006.pt is saved, to go on:\n"
    assert stopped.error() == line
    (end,), result = stopped.events("end"), stopped.result()
    assert end["command"] == result["command"] == stopped.command()
    assert (end["status"], end["exit_code"]) == (result["status"], result["exit_code"]) == ("preempted", 75)


def test_a_stop_in_the_warm_up_has_nothing_to_save(new, whole):
    folder = new({})
    assert folder.start(dies("train_step", SIGTERM)) == [STOPPED]
    assert folder.error() == "error: stopped by a signal before there was anything to save\n"
    assert "RESUME=auto RUN_ID=r OUT_DIR=. " in folder.command()
    assert folder.checkpoints() == []
    assert folder.resume() == [0]
    same(folder.left(), whole({}))
    assert "\nresumed: step:0 from no checkpoint\n" in folder.text("logs/r.txt")


def test_a_stop_in_the_warm_up_of_a_resumed_run_keeps_its_checkpoint(copy, whole):
    assert copy.resume(dies("train_step", SIGTERM)) == [STOPPED] and "r-00000006.pt" in copy.error()
    assert copy.resume() == [0]
    same(copy.left(), whole({}))


def test_finished_scores_are_not_made_twice(new, whole):
    """Nor after a second stop, as early as the first validation of the resumed run."""
    folder = new(MANY)
    assert folder.start(dies("ngram_probabilities", SIGKILL)) == [-SIGKILL]
    assert folder.resume(dies("validate", SIGKILL)) == [-SIGKILL]
    assert folder.resume(COUNTS.format(names="evaluate score_hedge")) == [0]
    assert folder.text("calls").split() == ["evaluate", "evaluate", "score_hedge"]  # live, average, hedge
    same(folder.left(), whole(MANY))
    assert [event["name"] for event in folder.events("score")][-3:] == ["roundtrip", "sliding", "hedge"]


def test_a_checkpoint_that_cannot_be_written_is_a_warning(new, whole):
    folder = new(EACH_STEP)
    full = """
import errno, os
inside = os.fsync
def fsync(file):
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{file}"):
        raise OSError(errno.ENOSPC, "No space left on device")
    return inside(file)
os.fsync = fsync
"""
    assert folder.start(full) == [0]
    assert "\nwarning: no checkpoint: checkpoints/r-00000003.pt: No space left" in folder.text("logs/r.txt")
    same(folder.left(), whole({}))


# --- out of memory ---

SMALL_DEVICE = """
inside = train_gpt.training_loss
def small(cfg, model):
    loss = inside(cfg, model)
    def limited(ids, *rest):
        if len(ids) > {limit}:
            raise train_gpt.torch.OutOfMemoryError
        return loss(ids, *rest)
    return limited
train_gpt.training_loss = small
"""


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(new, whole):
    folder = new({})
    assert folder.start(SMALL_DEVICE.format(limit=5)) == [0]
    assert re.findall(r"micro-batch is now (\d+) sequences", folder.text("0.err")) == ["4"]
    losses, expected = (dict(left["losses"]) for left in (folder.left(), whole({})))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert f"micro_batch_tokens:{4 * 32} " in folder.text("logs/r.txt")


def test_one_sequence_that_does_not_fit_is_one_line(new):
    folder = new({})
    assert folder.start(SMALL_DEVICE.format(limit=0)) == [2]
    *warnings, last = folder.text("0.err").splitlines()
    assert all(line.startswith("warning: out of memory") for line in warnings) and len(warnings) == 3
    assert last.startswith("error: out of memory; lower MICRO_BATCH_TOKENS")


@pytest.mark.parametrize("fits, expected", [(16, 16), (15, 8), (8, 8), (3, 2), (1, 1), (0, None)])
def test_the_micro_batch_is_halved_until_it_fits(tiny, fits, expected):
    cfg = tiny()
    run = Run(cfg, Runtime(), RunLog(None, ""), train_gpt.GPT(cfg), None)
    inside, batch = run.loss, (torch.zeros(16, 32, dtype=torch.int64),) * 2

    def loss(ids, *rest):
        if len(ids) > fits:
            raise torch.OutOfMemoryError
        return inside(ids, *rest)

    run.loss = loss
    if expected:
        assert train_gpt.fit_micro_batch(run, batch) == expected
    else:
        with pytest.raises(torch.OutOfMemoryError):
            train_gpt.fit_micro_batch(run, batch)


def test_exit_codes_are_those_of_the_head():
    text = re.search(r"Exit codes: (.*?)\n\n", train_gpt.__doc__, re.S)[1]
    assert f"{STOPPED} stopped by a signal (SIGTERM," in text and f"{LOST} another rank was lost" in text
    assert Config().resume == "0" and signal.Signals(SIGTERM).name in text


# --- what is left of an unlucky end ---

FULL_FOR_ONE = """
import errno, os
inside, full = os.fsync, [True]
def fsync(file):
    if full[0] and "/r-00000008.pt" in os.readlink(f"/proc/self/fd/{file}"):
        full[0] = False
        raise OSError(errno.ENOSPC, "No space left on device")
    return inside(file)
os.fsync = fsync
"""


def test_scores_do_not_outlive_the_weights_they_are_of(new, whole):
    """The last checkpoint finds the disk full, so the scores that follow stand in the one before."""
    folder = new(MANY | EACH_STEP)
    assert folder.start(FULL_FOR_ONE + dies("ngram_probabilities", SIGKILL)) == [-SIGKILL]
    assert folder.checkpoints()[-1] == "r-00000007.pt"
    assert folder.resume(COUNTS.format(names="evaluate score_hedge")) == [0]
    assert folder.text("calls").split() == ["evaluate"] * 4 + ["score_hedge"]
    same(folder.left(), whole(MANY))


def test_a_checkpoint_damaged_while_scores_are_made_does_not_end_the_run(new, whole):
    folder = new(MANY)
    damage = """
inside = train_gpt.Checkpoints.add_score
def add_score(self, *given):
    self.paths[-1].write_bytes(self.paths[-1].read_bytes()[:5000])
    return inside(self, *given)
train_gpt.Checkpoints.add_score = add_score
"""
    assert folder.start(damage) == [0]
    same(folder.left(), whole(MANY))
    warnings = re.findall(
        r"^warning: no checkpoint of the (\w+) score: .*r-00000008\.pt", folder.text("logs/r.txt"), re.M
    )
    assert warnings == ["roundtrip", "sliding", "hedge"]


def test_a_dump_that_a_resumed_run_asks_for_has_the_targets_of_all_ranks(new):
    """The ranks kept the sum only. What goes on makes the scores again, and with one rank it need not."""
    two, one = new(SLIDES, 2), new(SLIDES)
    assert two.start(dies("score_sliding", SIGTERM, only=0)) == [STOPPED, LOST]
    assert two.resume(score_dump="x.npz") == [0, 0]
    assert one.start(score_dump="x.npz") == [0]
    (expected, found) = (np.load(folder.path / "x.npz") for folder in (one, two))
    for name in ("roundtrip_logprob", "sliding_logprob"):
        assert found[name].max() < 0
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=0.1)
        loss = two.result()[name.replace("logprob", "val_loss")]
        assert -found[name].mean() == pytest.approx(loss, abs=1e-8)


def test_checkpoints_deleted_during_the_run_do_not_end_it(new, whole):
    folder = new(MANY)
    assert folder.start("import shutil\nmake = train_gpt.pack\ndef pack(*given):\n"
                        "    shutil.rmtree('checkpoints', ignore_errors=True)\n    return make(*given)\n"
                        "train_gpt.pack = pack") == [0]  # fmt: skip
    same(folder.left(), whole(MANY))


def test_a_kill_while_the_outputs_are_claimed_again_does_not_lose_the_claim(new, whole):
    folder = new({})
    assert folder.start(in_step(3, SIGTERM)) == [STOPPED]
    assert folder.resume("train_gpt.print = print" + dies("print")) == [-SIGKILL]  # the first it writes
    assert folder.resume() == [0]
    same(folder.left(), whole({}))


@pytest.mark.parametrize(
    "place", [dies("Checkpoints.clear", SIGTERM), dies("describe_machine", SIGTERM, call=2)]
)
def test_a_signal_after_the_end_changes_nothing(new, whole, place):
    folder = new({})
    assert folder.start(place) == [0] and folder.text("0.err") == ""
    same(folder.left(), whole({}))
    assert folder.text("logs/r.txt").count("\nRESULT ") == 1


def test_a_signal_to_what_is_left_of_a_run_that_lost_a_rank(new, whole):
    """As torchrun sends it. The line still says how to go on."""
    folder = new(MANY, 2)
    patch = dies("evaluate", SIGKILL, call=4, only=1) + dies("explain", SIGTERM, only=0)
    assert folder.start(patch) == [STOPPED, -SIGKILL]
    assert folder.error().startswith("error: stopped by SIGTERM; checkpoints/r-00000008.pt is saved")
    assert folder.result()["status"] == folder.events("end")[0]["status"] == "preempted"
    assert folder.resume() == [0, 0]
    same(folder.left(), whole(MANY, 2))
