"""Stands for train_gpt.py in the tests of the engine: the same files, exit codes, checkpoints and signals,
and no training. STUB in the environment is a folder: STUB/plan.json says what happens to an arm, and
STUB/journal gets a line for each step that was really made."""

import json
import os
import signal
import sys
import time
from pathlib import Path

env, out, run_id = os.environ, Path(os.environ["OUT_DIR"]), os.environ["RUN_ID"]
stub, arm, seed = Path(env["STUB"]), run_id.split(".")[1], int(env["SEED"])
plan = dict(steps=10, seconds=0.01, bpb=2.0, end="ok")
plan |= json.loads((stub / "plan.json").read_text()).get(arm, {})
stopping = []
signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))


def first_time(what: str) -> bool:
    """Whether this happens to the run for the first time."""
    try:
        (stub / f"{run_id}.{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if plan["end"] == "bad_input":
    sys.exit(print("error: no such thing", file=sys.stderr) or 2)
checkpoint = out / "checkpoints" / f"{run_id}.json"
try:
    step = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
except ValueError:
    sys.exit(print("error: the checkpoint was made with another script", file=sys.stderr) or 2)
(out / "logs").mkdir(parents=True, exist_ok=True)
log, text = ((out / "logs" / f"{run_id}{end}").open("a") for end in (".jsonl", ".txt"))


def event(kind: str, **values) -> None:
    print(json.dumps(dict(event=kind, time=time.time(), **values)), file=log, flush=True)


def finish(code: int, status: str, **numbers) -> None:
    progress = numbers.pop("progress", 1.0)
    known = dict(progress=progress, mean_lr_scale=0.5, train_seconds=step / 10, truncated=progress < 0.98)
    event("end", step=step, status=status, exit_code=code, **known)
    result = dict(run_id=run_id, status=status, exit_code=code, steps=step, tokens=step * 512, **numbers)
    line = "RESULT " + json.dumps(result)
    print(line, file=text, flush=True)
    print(line, flush=True)
    sys.exit(code)


def save() -> None:
    checkpoint.parent.mkdir(exist_ok=True)
    temporary = checkpoint.with_suffix(".tmp")
    temporary.write_text(json.dumps(step))
    temporary.rename(checkpoint)


if step:
    event("resumed", step=step, path=str(checkpoint))
config = {} if plan["end"] == "old_script" else dict.fromkeys(name.lower() for name in env)
config |= dict(vocab_size=1024, iterations=plan["steps"], data_path=env["DATA_PATH"])
event("config", config=config, code_bytes=9)
event("env", device="stub", world_size=1, val_tokens=1000, val_bytes=2500, val_sha256="5e1f")
while step < plan["steps"]:
    time.sleep(plan["seconds"])
    step += 1
    with (stub / "journal").open("a") as journal:
        print(f"{run_id} {step}", file=journal)
    where = dict(progress=step / plan["steps"], lr_scale=1.0, tokens=step * 512, train_ms=100.0 * step)
    loss = 0.0 if plan["end"] == "no_loss" else 5.0 - 0.1 * step + plan["bpb"] - 2.0
    event("step", step=step, train_loss=loss, **where)
    if step == plan["steps"] // 2:
        event("val", step=step, val_bpb=plan["bpb"] + 0.5, train_ms=100.0 * step)
        save()
        if plan["end"] == "crash_once" and first_time("crash"):
            raise ValueError("a bug in step 5")
        if plan["end"] == "kill_once" and first_time("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
    if plan["end"] == "crash" and step >= plan["steps"] // 2:
        raise ValueError("a bug in step 5")
    if stopping:
        save()
        finish(75, "preempted", message="stopped by SIGTERM")
bpb = 4.0 if plan["end"] == "untrained" else plan["bpb"] + seed / 1e6
event("val", step=step, val_bpb=bpb, train_ms=100.0 * step)
if plan["end"] == "diverged":
    finish(5, "diverged", message="diverged: loss is not finite")
event("quantise", quant="int8", groups=dict(mlp=dict(bytes=5, tensors=1, error=0.1)))
event("artifact", model_bytes=100, code_bytes=9, total_bytes=109)
event("score", name="roundtrip", val_bpb=bpb, left=0)
(out / "final_model.int8.ptz").write_bytes(b"packed")
checkpoint.unlink(missing_ok=True)
print("peak memory allocated: 12 MiB reserved: 34 MiB", file=text, flush=True)
numbers = dict(val_bpb=bpb, live_val_bpb=bpb, prequant_val_bpb=bpb)
if plan["end"] == "over_size":
    finish(3, "over_size", **numbers)
finish(0, "ok", progress=0.5 if plan["end"] == "truncated" else 1.0, **numbers)
