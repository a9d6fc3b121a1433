"""One training step of two or more versions of the script, in turn: is the new one faster?

    git show HEAD~1:train_gpt.py > /tmp/old.py
    python tests/bench/bench_step.py /tmp/old.py train_gpt.py NUM_LAYERS=4 MODEL_DIM=256 DEVICE=cpu
    python tests/bench/bench_step.py train_gpt.py COMPILE=0 DEVICE=cpu --threads 1,2,4
    python tests/bench/bench_step.py train_gpt.py --presets baseline,frontier --progress 0,0.9 DEVICE=cpu

All versions are built in one process, on the same random tokens, from the same knobs, which win over a
preset's (its CPU sizes unless there is a GPU); --progress says how far the run is, as the layers may be
others then. Each round takes one step of every version, so that a drift of the machine touches all alike.
Speed is the median of the rounds' ratios to the first version. Also printed: the seconds that the first two
steps take, with what they compile, and the loss of the second, which tells a change of the maths from a
change of speed.
Not a test: pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import torch  # noqa: E402

import train_gpt  # noqa: E402
from sweeps.lab.wave_spec import Sizes, preset_env  # noqa: E402
from tests.bench.bench_throughput import commit  # noqa: E402


def load(path: Path, name: str) -> ModuleType:
    """The script as a module of its own, beside other versions of it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Version:
    """One script, preset and part of the run at one number of threads, built and ready to step."""

    path: Path
    threads: int
    module: ModuleType
    knobs: dict[str, str]
    preset: str = ""
    progress: float = 0.0
    times: list[float] = field(default_factory=list)  # milliseconds

    def build(self) -> None:
        m, began = self.module, time.perf_counter()
        cfg = m.Config.from_env(self.knobs)
        device = torch.device("cuda" if torch.cuda.is_available() and cfg.device != "cpu" else "cpu")
        setting = getattr(cfg, "deterministic", "0")  # older versions have no such knob
        self.deterministic = setting == "1" or setting == "auto" and device.type == "cpu"
        compiles = m.pick_compile(cfg.compile, device)[0]
        runtime = m.Runtime(device, dtype=m.DTYPES[m.pick_dtype(cfg.dtype, device)], compiles=compiles)
        torch.manual_seed(cfg.seed)
        model = m.GPT(cfg, runtime.dtype).to(device)
        self.run, self.optimisers = m.Run(cfg, runtime, None, model, None), m.Optimisers(cfg, model, runtime)
        shape = cfg.sequences, cfg.train_seq_len + 1
        tokens = torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        # Half a step on, or rounding could leave it at the end of the phase before.
        first_step = int(self.progress * cfg.iterations + 0.5)
        self.plan, self.limit = m.plan_step(cfg, first_step, 0.0, 0.0), m.micro_batch_limit(cfg, device)
        self.step()
        self.loss = self.step()
        self.built, self.times = time.perf_counter() - began, []

    def step(self) -> float:
        """Take one step, note its milliseconds; returns the loss."""
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(self.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False
        self.run.runtime.synchronize()
        began = time.perf_counter()
        loss = self.module.train_step(self.run, self.optimisers, self.batch, self.plan, self.limit)
        self.run.runtime.synchronize()
        self.times.append(1000 * (time.perf_counter() - began))
        return loss.item()

    def describe_machine(self) -> dict[str, object]:
        """The device and the setting; of a version whose Runtime knows less, too."""
        runtime = self.run.runtime
        known = train_gpt.Runtime(runtime.device, dtype=runtime.dtype, compiles=runtime.compiles)
        return train_gpt.describe_machine(known)

    def row(self, first: Version) -> dict[str, object]:
        """What is printed and kept; quartiles in brackets in the text, all times in the JSON."""
        ratios = [a / b for a, b in zip(first.times, self.times, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        found = dict(script=self.path.name, threads=self.threads, deterministic=self.deterministic)
        if self.preset:
            found |= dict(preset=self.preset, progress=self.progress)
        found |= dict(ms=round(median(self.times), 1))
        found |= dict(speed=round(median(ratios), 3), quartiles=[round(low, 3), round(high, 3)])
        found |= dict(first_two_steps_seconds=round(self.built, 1), second_loss=self.loss)
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return found | dict(sha256=digest[:16], all_ms=[round(ms, 1) for ms in self.times])


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("words", nargs="+", metavar="SCRIPT|KNOB=VALUE", help="the first script is the base")
    parser.add_argument("--threads", default=str(torch.get_num_threads()), metavar="A,B", help="CPU threads")
    parser.add_argument("--presets", default="", metavar="A,B", help="each script with each of them")
    parser.add_argument("--progress", default="0", metavar="A,B", help="parts of the run, 0 to 1")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_intermixed_args()
    paths = [Path(word) for word in options.words if "=" not in word]
    knobs = dict(word.split("=", 1) for word in options.words if "=" in word)
    modules = {path: load(path, f"version{i}") for i, path in enumerate(dict.fromkeys(paths))}
    threads = [int(n) for n in options.threads.split(",")]
    versions = []
    for path, module in modules.items():
        for preset in options.presets.split(","):
            sizes = Sizes(cpu=not torch.cuda.is_available())
            preset_knobs = preset_env(preset, sizes) | knobs if preset else knobs
            for progress in map(float, options.progress.split(",")):
                versions += [Version(path, n, module, preset_knobs, preset, progress) for n in threads]
    for version in versions:
        version.build()
    for _ in range(options.rounds):
        for version in versions:
            version.step()
    rows = [version.row(versions[0]) for version in versions]
    for row in rows:
        low, high = row["quartiles"]
        pace = f"{row['ms']} ms, {row['speed']} ({low} to {high}) times the first"
        start = f"first two steps {row['first_two_steps_seconds']} s, loss {row['second_loss']:.6f}"
        name = f"{row['preset']} progress:{row['progress']}" if options.presets else row["script"]
        print(f"{name} threads:{row['threads']} {pace}; {start}")
    torch.set_num_threads(threads[0])  # the device is described with the first version's threads
    machine = versions[0].describe_machine()
    machine.pop("deterministic")  # each version has its own
    report = dict(benchmark="steps in turn", commit=commit(), knobs=knobs, rounds=options.rounds)
    text = json.dumps(report | dict(machine=machine, versions=rows), indent=1)
    if options.out:
        train_gpt.write_atomic(options.out, text.encode() + b"\n")


if __name__ == "__main__":
    main()
