"""A trial of the Ray engine: a wave on two nodes, one of which dies in the middle. Not collected by pytest.

    python tests/bench/ray_trial.py [--out FOLDER] [--json FILE]

wants `pip install ray==2.60.0`. It makes a cluster of two nodes of one CPU each out of processes on this
machine, starts a wave of tiny real runs through the engine, kills every process of the second node with
SIGKILL once a run there has left a checkpoint, and adds a third node later. Then it runs the same wave with
the local engine and compares every score: training in float32 on one thread is exact, so nothing may differ.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt  # noqa: E402
from sweeps.lab.ray_backend import NODES  # noqa: E402
from sweeps.lab.run_rows import Results  # noqa: E402
from tests.conftest import ROOT, encode_documents, make_texts, train_tokenizer, write_shard  # noqa: E402

KNOBS = """VOCAB_SIZE=320 NUM_LAYERS=2 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=64 ITERATIONS=300
TRAIN_BATCH_TOKENS=1024 VAL_LOSS_EVERY=100 TRAIN_LOG_EVERY=10 CHECKPOINT_SECONDS=1 WARMDOWN_FRAC=0.1"""
WAVE = """@question Is_anything_lost? @arm high why MATRIX_LR=0.08 @arm low why MATRIX_LR=0.02 @seeds 1 2"""


def make_dataset(folder: Path) -> list[str]:
    """A small corpus; the engine's options that name it."""
    import sentencepiece

    folder.mkdir(parents=True)
    train, val = make_texts(400, seed=1), make_texts(40, seed=2)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(train))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    write_shard(folder / "toy_train_000000.bin", encode_documents(tokenizer, train))
    write_shard(folder / "toy_val_000000.bin", encode_documents(tokenizer, val))
    return ["--data", str(folder), "--tokenizer", str(folder / "tokenizer.model")]


def engine(folder: Path, data: list[str], *options: str, **env: str) -> subprocess.Popen:
    """The wave `trial`, with its files and rows under `folder`."""
    words = ["trial", *WAVE.split(), "@base", "baseline", *KNOBS.split()]
    place = ["--proxy", "--out", str(folder / "out"), "--results", str(folder / "results"), *data]
    command = [sys.executable, "-m", "sweeps.lab.wave_engine", *words, "--", *place, *options]
    return subprocess.Popen(command, env=os.environ | env, cwd=ROOT)


def descendants(number: int) -> list[int]:
    """A process and all that come from it, in whatever sessions they are; by Linux' /proc."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [number]
    for one in found:
        found += parents.get(one, [])
    return found


def runs_on(node_id: str, folder: Path) -> list[str]:
    """Runs that were last started on this node, are not finished, and have left a checkpoint."""
    rows, found = Results(folder / "results", "trial").latest(), []
    for path in (folder / "out/trial").glob(f"*/{NODES}"):
        here = path.read_text().splitlines()[-1].split()[-1] == node_id
        saved = any((path.parent / "checkpoints").glob("*.pt"))
        if here and saved and rows.get(path.parent.name, {}).get("state") == "running":
            found.append(path.parent.name)
    return found


def kill_node(node) -> int:
    """What a power cut does: every process of the node ends at once. Their number."""
    processes = node.all_processes["raylet"]
    victims = [number for each in processes for number in descendants(each.process.pid)]
    for number in victims:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(victims)


def trial(folder: Path, data: list[str]) -> dict:
    """The wave with Ray and a death; what happened."""
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    began = time.time()
    try:
        second = cluster.add_node(num_cpus=1)
        wave = engine(folder, data, "--engine", "ray", RAY_ADDRESS=cluster.address)
        while not (struck := runs_on(second.node_id, folder)) or time.time() < began + 25:
            assert wave.poll() is None and time.time() < began + 240, "no run on the second node"
            time.sleep(0.2)
        killed, when = kill_node(second), time.time() - began
        print(f"killed the second node: {killed} processes, running there: {struck}", flush=True)
        time.sleep(10)
        third = cluster.add_node(num_cpus=1)
        code = wave.wait(400)
    finally:
        ray.shutdown()
        cluster.shutdown()
    later = [path.parent.name for path in (folder / "out/trial").glob(f"*/{NODES}")
             if third.node_id in path.read_text()]  # fmt: skip
    return dict(exit_code=code, killed_processes=killed, killed_after_seconds=round(when, 1), struck=struck,
                on_third_node=sorted(later), seconds=round(time.time() - began, 1))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "ray_trial")
    parser.add_argument("--json", type=Path, help="write the outcome here")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    data = make_dataset(options.out / "data")
    found = trial(options.out / "ray", data)
    assert engine(options.out / "local", data, "--jobs", "2").wait() == 0
    with_ray, without = (
        Results(options.out / kind / "results", "trial").latest() for kind in ("ray", "local")
    )
    runs = {
        run_id: dict(
            state=row["state"], attempts=row["attempts"], resumed=row["resumed"], steps=row["steps"],
            val_bpb=row["val_bpb"], without_ray=without[run_id]["val_bpb"],
        )
        for run_id, row in with_ray.items()
    }  # fmt: skip
    found["runs"], found["planned"] = runs, len(without)
    found["nothing_lost"] = with_ray.keys() == without.keys() and all(
        run["state"] == "ok" and run["val_bpb"] == run["without_ray"] for run in runs.values()
    )
    found["went_on_from_checkpoint"] = [run for run in found["struck"] if runs[run]["resumed"]]
    found["versions"] = dict(
        ray=ray.__version__, torch=train_gpt.torch.__version__, python=platform.python_version()
    )
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if options.json:
        options.json.write_text(text)
    return 0 if found["nothing_lost"] and found["went_on_from_checkpoint"] else 1


if __name__ == "__main__":
    sys.exit(main())
