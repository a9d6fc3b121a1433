"""Runs of train_gpt.py without its three seconds of imports: this process has them, and each rank is a fork.

Reads one JSON object a line: cwd, env, ranks, patch (Python source run in each rank before main; it sees
`train_gpt`, `rank`, and `die(signal)`), kill ([seconds, signal, rank or null for all] or null): the file
`phase` of that moment, if there is one, is kept as `killed`. Answers with the exit codes.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST, PATIENCE = 90.0, 10.0  # seconds of a run, and of what is left of it without one rank: then -9
MODELS = "final_model.pt", "final_model.int8.ptz"


class ForkServer:
    """The caller's side."""

    def __init__(self, folder: Path = ROOT):
        """folder: that of the train_gpt.py to run."""
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def run(self, cwd: Path, env: dict[str, str], ranks: int = 1, patch: str = "", kill=None) -> list[int]:
        """Exit codes by rank, -N for signal N. Each rank's output is in cwd/RANK.out and cwd/RANK.err."""
        order = dict(cwd=str(cwd), env=env, ranks=ranks, patch=patch, kill=kill)
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def left_behind(folder: Path, run_id: str) -> dict[str, object]:
    """All of a finished run in `folder` that must not depend on how often it was stopped."""
    import torch

    events = [json.loads(line) for line in (folder / f"logs/{run_id}.jsonl").read_text().splitlines()]
    last = (folder / f"logs/{run_id}.txt").read_text().splitlines()[-1]
    result = json.loads(last.removeprefix("RESULT "))
    losses = {(event["step"], event["train_loss"]) for event in events if event["event"] == "step"}
    scores = {name: value for name, value in result.items() if name.endswith(("val_bpb", "val_loss"))}
    scores |= {name: result[name] for name in ("status", "steps", "mean_lr_scale", "total_bytes")}
    weights = torch.load(folder / MODELS[0], weights_only=True)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return dict(
        losses=sorted(losses),  # a step done twice that differs is there twice
        scores=scores,
        weights={name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        artifact=(folder / MODELS[1]).read_bytes(),
        parts=sorted(name for name in names if ".tmp-" in name or name.startswith("checkpoints/")),
    )


def rank_main(order: dict, rank: int, port: int) -> None:
    """In the fork: become one rank of a run."""
    import train_gpt

    os.chdir(order["cwd"])
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(order["env"])
    if order["ranks"] > 1:
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(order["ranks"]))
        os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = ["train_gpt.py"]

    def die(number=signal.SIGKILL):
        os.kill(os.getpid(), number)

    exec(order["patch"], dict(train_gpt=train_gpt, rank=rank, die=die))
    train_gpt.main()


def serve(order: dict) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(order["ranks"]):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                rank_main(order, rank, port)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
    if order["kill"]:
        seconds, number, rank = order["kill"]
        time.sleep(seconds)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(Path(order["cwd"], "phase"), Path(order["cwd"], "killed"))
        for child in children if rank is None else [children[rank]]:
            os.kill(child, number)  # it is not waited for yet, so it is there, at least as a zombie
    codes, late = {}, time.monotonic() + LONGEST
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            if rank not in codes:
                if time.monotonic() > late:
                    os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, os.WNOHANG)
                codes |= {rank: os.waitstatus_to_exitcode(status)} if done else {}
        if any(codes.values()):  # before they have met, one waits for another in vain; torchrun would end it
            late = min(late, time.monotonic() + PATIENCE)
        time.sleep(0.005)
    return [codes[rank] for rank in range(len(children))]


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    import torch
    import torch._dynamo  # which the first optimiser imports, for a second

    import train_gpt  # noqa: F401

    torch.arange(3.0, device="meta")  # a second of imports that every run would make
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
