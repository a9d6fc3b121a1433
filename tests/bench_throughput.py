"""Training throughput of a preset on this machine: tokens and milliseconds a step, memory, share of peak.

    python tests/bench_throughput.py baseline NUM_LAYERS=4 MODEL_DIM=256
    python tests/bench_throughput.py baseline --vary COMPILE=0,1 --vary DTYPE=bf16,fp32 --out bench.json

Random tokens, no validation, no clock. Every combination of --vary is one variant; their steps are
interleaved (A B C A B C ...), so that a drift of the machine touches all alike. Medians are reported.
Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402
from sweeps.show import step_flops  # noqa: E402

PLAN = train_gpt.StepPlan(progress=0.0, lr_scale=1.0, muon_momentum=0.95)


def preset_knobs(name: str) -> dict[str, str]:
    """The assignments of sweeps/presets/NAME.env; later ones win."""
    text = (ROOT / "sweeps" / "presets" / f"{name}.env").read_text(encoding="utf-8")
    return dict(word.split("=", 1) for word in shlex.split(text, comments=True))


def measured_peak(runtime: train_gpt.Runtime) -> float:
    """FLOP/s of a large square product in the run's dtype: what this device gives at best, today."""
    size = 8192 if runtime.is_cuda else 2048
    a = torch.randn(size, size, device=runtime.device).to(runtime.dtype)
    times = []
    for _ in range(8):
        runtime.synchronize()
        start = time.perf_counter()
        torch.mm(a, a)
        runtime.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


@dataclass
class Variant:
    """One configuration, built and ready to step."""

    knobs: dict[str, str]
    times: list[float] = field(default_factory=list)

    def build(self) -> None:
        self.cfg = train_gpt.Config.from_env(self.knobs)
        with train_gpt.Runtime.launch(self.cfg, {}) as self.runtime:
            pass
        torch.manual_seed(self.cfg.seed)
        model = train_gpt.GPT(self.cfg, self.runtime.dtype).to(self.runtime.device)
        self.run = train_gpt.Run(self.cfg, self.runtime, train_gpt.RunLog(None, ""), model, None)
        self.optimisers = train_gpt.Optimisers(self.cfg, model, self.runtime)
        shape = self.cfg.sequences, self.cfg.train_seq_len + 1
        tokens = torch.randint(self.cfg.vocab_size, shape)
        self.batch = tokens[:, :-1], tokens[:, 1:]
        self.limit = self.run.settle(lambda: train_gpt.fit_micro_batch(self.run, self.batch))
        self.first = self.step()
        self.step()

    def step(self) -> float:
        """Seconds of one optimiser step."""
        self.runtime.synchronize()
        start = time.perf_counter()
        train_gpt.train_step(self.run, self.optimisers, self.batch, PLAN, self.limit)
        self.runtime.synchronize()
        return time.perf_counter() - start

    def report(self, peak: float) -> dict[str, object]:
        """The JSON row."""
        seconds, flops = median(self.times), step_flops(self.cfg, self.run.model)
        return dict(
            knobs=self.knobs,
            **train_gpt.describe_machine(self.runtime),
            params=sum(p.numel() for p in self.run.model.parameters()),
            micro_batch_tokens=self.limit * self.cfg.train_seq_len,
            tokens_per_second=round(self.cfg.train_batch_tokens / seconds),
            ms_per_step=round(1000 * seconds, 2),
            ms_per_step_p95=round(1000 * quantiles(self.times, n=20)[-1], 2),
            steps=len(self.times),
            first_step_seconds=round(self.first, 2),
            flops_per_second=round(flops / seconds),
            peak_flops_per_second=round(peak),
            share_of_peak=round(flops / seconds / peak, 4),
            peak_memory_mib=self.runtime.peak_memory_mib()[0],
        )


def commit() -> str:
    """The checkout's commit, with a + if files differ from it; '' outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def variants(base: dict[str, str], vary: list[str]) -> list[Variant]:
    """Every combination of the --vary lists over the base knobs."""
    axes = [
        [(name, value) for value in values.split(",")] for name, values in (v.split("=", 1) for v in vary)
    ]
    return [Variant({**base, **dict(choice)}) for choice in itertools.product(*axes)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KNOB=A,B", help="interleave these values"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each variant (default 10)")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    base = {**preset_knobs(arguments.preset), **dict(pair.split("=", 1) for pair in arguments.knobs)}
    rows = variants(base, arguments.vary)
    try:
        for row in rows:
            row.build()
    except train_gpt.RunError as error:
        raise SystemExit(f"error: {error}") from None
    for _ in range(max(2, arguments.steps)):
        for row in rows:
            row.times.append(row.step())
    peaks = {row.runtime.dtype: measured_peak(row.runtime) for row in rows}
    threads = dict(threads=torch.get_num_threads(), cores=os.cpu_count())
    head = dict(benchmark="throughput", preset=arguments.preset, commit=commit(), **threads)
    text = json.dumps(dict(head, rows=[row.report(peaks[row.runtime.dtype]) for row in rows]), indent=1)
    print(text)
    if arguments.out:
        train_gpt.write_atomic(arguments.out, text.encode() + b"\n")


if __name__ == "__main__":
    main()
