"""Made-up rows of sweeps/results/*.jsonl, as the lab's engine writes them, for tests of what reads them."""

import json
import math
from pathlib import Path

from sweeps.lab.run_rows import FIELDS

MACHINE = dict(
    device="test device", world_size=1, dtype="fp32", compile=False, torch="2.13.0", python="3.11.7",
    numpy="2.4.6", val_sha256="ab" * 32, val_tokens=65536, code_sha256="cd" * 32,
)  # fmt: skip
CONFIG = dict(
    iterations=300, max_wallclock_seconds=0.0, train_batch_tokens=2048, train_seq_len=128, vocab_size=1024,
    num_layers=6, model_dim=96, num_heads=4, num_kv_heads=2, matrix_lr=0.04, mlp_act="silu2",
)  # fmt: skip


def row(arm: str, seed: int, bpb: float | None, wave: str = "demo", **more) -> dict:
    """A finished run that scored `bpb`; `more` overrides any field."""
    rerun, changed = more.get("rerun", 0), more.get("change", {})
    name = f"{wave}.{arm}.{seed}" + (f".r{rerun}" if rerun else "")
    config = CONFIG | {knob.lower(): value for knob, value in changed.items()} | more.pop("config", {})
    plain = dict(
        wave=wave, arm=arm, seed=seed, rerun=rerun, run_id=name, hypothesis=f"what {arm} should do",
        question="Does it hold?", parent="tidal_1434", change=changed, env=dict(SEED=str(seed)), state="ok",
        status="ok", exit_code=0, attempts=1, resumed=[], message="", config_hash=f"{hash(name) & 0xFFFF:x}",
        config=config, val_bpb=bpb, steps=300, tokens=614400, step_ms=dict(median=50.0, p95=60.0),
        train_seconds=15.0, progress=1.0, mean_lr_scale=0.6, started=1000.0, ended=1020.0,
        out_dir=f"runs/waves/{wave}/{name}", **MACHINE,
    )  # fmt: skip
    if bpb is not None:
        plain |= finished(bpb)
    made = dict.fromkeys(FIELDS) | plain | more
    assert list(made) == FIELDS, "a field that the engine does not write"
    return made


def finished(bpb: float) -> dict:
    """What a run that was scored has besides; its curves end at the score."""
    steps = range(0, 301, 30)
    curve = [[s, 50.0 * s, bpb + 1.2 * math.exp(-s / 60) - 1.2 * math.exp(-5)] for s in steps]
    part = dict(tensors=4, error=1e-5)
    return dict(
        curve=curve, loss_curve=[[s, ms, 1.7 * value] for s, ms, value in curve], train_loss=1.7 * bpb,
        lr_trace=[[s / 300, 1 - s / 330] for s in steps], live_val_bpb=bpb, prequant_val_bpb=bpb - 0.001,
        scores=dict(roundtrip=bpb), code_bytes=154_244, model_bytes=700_000, total_bytes=854_244,
        groups=dict(attention=dict(bytes=300_000, **part), mlp=dict(bytes=400_000, **part)),
        peak_memory_mib=[900, 1000],
    )  # fmt: skip


def broken_rows(wave: str = "demo") -> list[dict]:
    """One run of every state that is no result, with what such a run has."""
    nothing = dict(steps=None, tokens=None, started=None, ended=None, config=None, code_sha256=None)
    nothing |= dict(device=None, torch=None, step_ms=None, progress=None, mean_lr_scale=None)
    return [
        row("crasher", 1, None, wave, state="crashed", exit_code=1, message="<b>boom</b> & </script>"),
        row("idler", 1, 4.1069, wave, state="untrained"),
        row("cutter", 1, 2.5, wave, state="truncated", progress=0.7),
        row("nanner", 1, None, wave, state="diverged", curve=[[0, 0.0, 4.1], [30, 1500.0, None]]),
        row("fatter", 1, 1.2, wave, state="over_size", total_bytes=16_000_001),
        row("twin", 1, None, wave, state="duplicate", message="same config as control") | nothing,
        row("taken", 1, None, wave, state="preempted", steps=100),
        row(
            "slow", 1, None, wave, state="killed_early", steps=150, curve=[[0, 0.0, 4.1], [150, 7500.0, 3.0]]
        ),
        row("now", 1, None, wave, state="running") | nothing | dict(started=1000.0),
        row("later", 1, None, wave, state="planned") | nothing,
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
