"""Many ranks train as one: the same batches, the same losses; and when one is lost, none is left behind.

Ranks are forks (forkserver.py) but in the last three tests, which are real runs of torchrun, some 10 s each.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from signal import SIGKILL, SIGTERM

import pytest

import train_gpt
from tests.conftest import ROOT, env_of
from tests.support.stops import Folder, dies, in_step

STOPPED, LOST = train_gpt.PREEMPTED, train_gpt.LOST_RANK
FEW = dict(iterations=4, train_batch_tokens=480)  # 15 sequences a step, which few world sizes divide
# The loop begins at the third of four steps.
LOOP = dict(num_layers=3, num_loops=2, loop_start=1, loop_end=1, enable_looping_at=0.5, smear_gate_enabled=1)
LANES = LOOP | dict(parallel_start_layer=2, sparse_attn_gate_enabled=1, skip_gates_enabled=1)
SWA = dict(swa_enabled=1, swa_every=2, swa_start_frac=2.0, data_shuffle=1)

# Each rank keeps the inputs of its training batches in the file RANK.batches.
BATCHES = """
import json
inside = train_gpt.batches
def noted(cfg, stream, runtime, *which, **named):
    for ids, targets in inside(cfg, stream, runtime, *which, **named):
        if runtime.defers_stop:
            with open(f"{rank}.batches", "a") as file:
                print(json.dumps([ids.tolist(), targets.tolist()]), file=file)
        yield ids, targets
train_gpt.batches = noted
"""


def losses(folder: Folder) -> list[float]:
    """By step; of a step done twice, the last."""
    return list({event["step"]: event["train_loss"] for event in folder.events("step")}.values())


def global_batches(folder: Folder) -> list:
    """For each step of FEW, the (inputs, targets) of all ranks in turn."""
    lines = [folder.text(f"{rank}.batches").splitlines()[: FEW["iterations"]] for rank in range(folder.ranks)]
    steps = [[json.loads(part) for part in parts] for parts in zip(*lines, strict=True)]
    return [[sum((part[kind] for part in parts), []) for kind in (0, 1)] for parts in steps]


@pytest.fixture(scope="module")
def alone(new):
    """alone(knobs) -> a finished run of one process with its batches; made once."""
    made = {}

    def get(**knobs) -> Folder:
        key = json.dumps(knobs)
        if key not in made:
            made[key] = new(knobs)
            assert made[key].start(BATCHES) == [0], made[key].text("0.err")
        return made[key]

    return get


@pytest.mark.parametrize("ranks, knobs", [
    (2, {}), (3, dict(data_shuffle=1)), pytest.param(5, {}, marks=pytest.mark.slow), (8, {}),
    (5, dict(train_batch_tokens=96)), pytest.param(2, LANES, marks=pytest.mark.slow), (3, LANES),
], ids=["2", "3", "5", "8", "5_with_3_sequences", "2_with_a_loop", "3_with_a_loop"])  # fmt: skip
def test_any_number_of_ranks_trains_on_the_same_batches_to_the_same_losses(new, alone, ranks, knobs):
    one, many = alone(**FEW | knobs), new(FEW | knobs, ranks)
    assert many.start(BATCHES) == [0] * ranks, many.text("0.err")
    found = global_batches(many)
    assert found == global_batches(one) and len(found[0][0]) == (FEW | knobs)["train_batch_tokens"] // 32
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    scores = [folder.result()["val_bpb"] for folder in (one, many)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3) and many.result()["world_size"] == ranks


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1), (3, 2)])
def test_a_run_goes_on_at_another_world_size(new, alone, first, then):
    one, folder = alone(**SWA), new(SWA)
    assert folder.start(in_step(3, SIGTERM), ranks=first) == [STOPPED] * first
    assert folder.resume(ranks=then) == [0] * then, folder.text("0.err")
    assert losses(folder) == pytest.approx(losses(one), rel=1e-5) and len(losses(folder)) == 8
    assert folder.result()["val_bpb"] == pytest.approx(one.result()["val_bpb"], rel=1e-3)
    worlds = [event["world_size"] for kind in ("env", "resumed") for event in folder.events(kind)]
    assert worlds == [first, then]


def test_checkpoints_are_due_on_all_ranks_at_once_whatever_their_clocks_say(new, alone):
    """Rank 1's clock runs three times too fast."""
    folder = new(dict(checkpoint_seconds=0.05, iterations=40, warmdown_iters=9), 2)
    fast = "seconds = train_gpt.Clock.seconds\nif rank == 1:\n    "
    fast += "train_gpt.Clock.seconds = lambda self: 3 * seconds(self)"
    assert folder.start(fast) == [0, 0], folder.text("0.err")
    assert len(losses(folder)) >= 8


# --- a rank that is lost ---


@pytest.mark.parametrize("ranks, lost", [(2, 1), (2, 0), (3, 1)])
def test_a_killed_rank_ends_the_others_with_one_line(new, ranks, lost):
    folder = new({}, ranks)
    codes = folder.start(in_step(3, SIGKILL, only=lost))
    assert codes == [-SIGKILL if rank == lost else LOST for rank in range(ranks)]
    if lost:
        assert folder.error().startswith("error: another rank was lost: ")
        (end,), result = folder.events("end"), folder.result()
        assert end["status"] == result["status"] == "lost_rank" and end["exit_code"] == LOST
        assert result["message"] == folder.error().removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("place", [dies("evaluate", only=1), dies("evaluate", call=2, only=1)])
def test_a_rank_lost_while_scoring_ends_the_other(new, place):
    folder = new({}, 2)
    assert folder.start(place) == [LOST, -SIGKILL] and "another rank was lost" in folder.error()


RAISES = """
if rank == 1:
    inside = train_gpt.train_step
    def raises(run, optimisers, batch, plan, limit):
        if run.runtime.defers_stop and plan.step == 2:
            raise {error}
        return inside(run, optimisers, batch, plan, limit)
    train_gpt.train_step = raises
"""


def test_an_error_of_one_rank_ends_all(new):
    folder = new({}, 2)
    assert folder.start(RAISES.format(error="train_gpt.RunError('shard 7 is damaged')")) == [LOST, 2]
    assert folder.error(1) == "error: shard 7 is damaged\n"
    assert folder.error(0).startswith("error: another rank was lost: ")


def test_running_out_of_memory_on_one_rank_ends_all(new):
    folder = new({}, 2)
    assert folder.start(RAISES.format(error="train_gpt.torch.OutOfMemoryError")) == [LOST, 2]
    assert folder.error(1).startswith("error: out of memory; lower MICRO_BATCH_TOKENS")


def test_a_bug_on_one_rank_shows_its_traceback_and_ends_all(new):
    folder = new({}, 2)
    assert folder.start(RAISES.format(error="ZeroDivisionError('a bug')")) == [LOST, 1]
    assert "Traceback" in folder.text("1.err") and "a bug" in folder.text("1.err")
    assert folder.error(0).startswith("error: another rank was lost: ")


def test_an_error_before_training_is_every_ranks_and_said_once(new):
    folder = new({}, 2)
    patch = "if rank == 1:\n    def fails(*_):\n        raise train_gpt.RunError('no tokenizer here')\n"
    assert folder.start(patch + "    train_gpt.load_tokenizer = fails") == [2, 2]
    assert folder.error(0) == "error: no tokenizer here\n" and folder.text("1.err") == ""


# --- what all ranks must agree on ---

DRAWS = """
opens = train_gpt.open_run
def opened(cfg, runtime, model, inputs, before, run_id):
    with open(f"{rank}.opened", "w") as file:
        file.write(run_id)
    return opens(cfg, runtime, model, inputs, before, run_id)
train_gpt.open_run = opened
"""


def test_the_run_has_one_name_on_all_ranks(new):
    folder = new(FEW | dict(run_id=""), 2)
    assert folder.start(DRAWS) == [0, 0]
    (log,) = folder.path.glob("logs/*.jsonl")
    assert folder.text("0.opened") == folder.text("1.opened") == log.stem


SLOW_RANK = """
if rank == 1:
    inside = train_gpt.evaluation_seconds
    train_gpt.evaluation_seconds = lambda scores: inside(scores) + 1000
"""
LATE_GRAPH = """
if rank == 1:
    counts = iter([0, 3])
    train_gpt.compiled_graphs = lambda: next(counts)
"""


def test_ranks_end_with_one_exit_code_whatever_their_clocks_say(new):
    folder = new(FEW | dict(max_eval_seconds=500), 2)
    assert folder.start(SLOW_RANK) == [0, 0]


def test_a_graph_that_one_rank_compiled_late_is_told_by_all(new):
    folder = new(FEW, 2)
    assert folder.start(LATE_GRAPH) == [train_gpt.RECOMPILED] * 2, folder.text("0.err")
    assert folder.result()["status"] == "recompiled"


def test_an_idle_rank_0_tells_what_the_others_do(new):
    """One sequence a step for two ranks: rank 0 has none of it."""
    folder = new(FEW | dict(train_batch_tokens=32), 2)
    assert folder.start() == [0, 0]
    log = folder.text("logs/r.txt")
    assert "\nworld_size:2 grad_accum_steps:1\n" in log and " micro_batch_tokens:32 " in log


def test_the_busiest_rank_counts_its_micro_batches(new):
    """Nine sequences: four for rank 0, five for rank 1, in passes of two."""
    folder = new(FEW | dict(train_batch_tokens=288, micro_batch_tokens=64), 2)
    assert folder.start() == [0, 0]
    assert "\nworld_size:2 grad_accum_steps:3\n" in folder.text("logs/r.txt")


HANGS = """
def hangs(*given):
    import time
    time.sleep(60)
train_gpt.dist.destroy_process_group = hangs
"""


def test_after_an_error_no_rank_waits_for_the_others_to_leave(new):
    folder = new({}, 2)
    began = time.monotonic()
    assert folder.start(HANGS + in_step(3, SIGKILL, only=1)) == [LOST, -SIGKILL]
    assert time.monotonic() - began < 30


# --- torchrun itself ---

# The script with a patch in its first start. In a restart rank 0 is late: rank 1 could meet its old address.
WRAPPER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train_gpt
def die(number):
    os.kill(os.getpid(), number)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    exec({patch!r}, dict(train_gpt=train_gpt, rank=int(os.environ["RANK"]), die=die))
elif os.environ["RANK"] == "0":
    time.sleep(2)
train_gpt.main()
"""


def torchrun(folder: Folder, *options: str, patch: str = "", **knobs) -> subprocess.Popen:
    """Started in the folder, with the script wrapped; its output is in the file `torchrun`."""
    (folder.path / "wrapped.py").write_text(WRAPPER.format(root=str(ROOT), patch=patch))
    command = [sys.executable, "-m", "torch.distributed.run", *options, "wrapped.py"]
    env = env_of(folder.dataset, **folder.knobs | knobs)
    with (folder.path / "torchrun").open("a") as out:
        return subprocess.Popen(command, cwd=folder.path, env=env, stdout=out, stderr=out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def same_run(folder: Folder, new, knobs: dict) -> None:
    """As two forked ranks make it, bit for bit."""
    other = new(knobs, 2)
    assert other.start() == [0, 0]
    found, expected = folder.left(), other.left()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_torchrun_restarts_go_on_from_the_checkpoint(new):
    knobs = SWA | dict(checkpoint_seconds=1e-9)
    folder = new(knobs, 2)
    options = ("--standalone", "--nproc_per_node=2", "--max-restarts=1")
    agent = torchrun(folder, *options, patch=in_step(5, SIGKILL, only=1))
    assert agent.wait(150) == 0, folder.text("torchrun")[-3000:]
    assert folder.result()["resumed"] == [5] and folder.result()["status"] == "ok"
    same_run(folder, new, knobs)


def test_torchrun_on_two_nodes_makes_one_run(new):
    """Two agents on the loopback, each with one rank, each in a folder of its own."""
    nodes = [new(SWA), new(SWA)]
    meet = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test")
    meet += (f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1")
    agents = [torchrun(node, *meet) for node in nodes]
    codes = [agent.wait(150) for agent in agents]
    assert codes == [0, 0], nodes[0].text("torchrun")[-2000:] + nodes[1].text("torchrun")[-2000:]
    (main,) = [node for node in nodes if (node.path / "final_model.pt").exists()]
    assert main.result()["world_size"] == 2 and sum((node.path / "logs").exists() for node in nodes) == 1
    same_run(main, new, SWA)


def test_a_signal_to_torchrun_stops_all_ranks_and_the_run_goes_on(new):
    """As a cluster's scheduler does it; torchrun hands the signal on to its ranks."""
    folder = new(SWA | dict(iterations=100_000), 2)
    agent = torchrun(folder, "--standalone", "--nproc_per_node=2")
    log, late = folder.path / "logs/r.jsonl", time.monotonic() + 100
    while not (log.exists() and '"step": 3,' in log.read_text()):
        assert time.monotonic() < late and agent.poll() is None, folder.text("torchrun")[-2000:]
        time.sleep(0.05)
    os.kill(agent.pid, signal.SIGTERM)
    assert agent.wait(100) != 0
    (end,), (name,) = folder.events("end"), folder.checkpoints()
    assert end["status"] == "preempted" and end["exit_code"] == STOPPED
    assert folder.text("torchrun").count("error: stopped by SIGTERM; checkpoints/r-0") == 1
    steps = folder.steps()
    assert int(name[2:10]) == steps[-1]
    assert folder.resume(in_step(steps[-1] + 2, SIGTERM)) == [STOPPED] * 2
    assert folder.steps() == [*range(1, steps[-1] + 4)]
