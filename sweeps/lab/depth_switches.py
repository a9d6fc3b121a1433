"""What a change of depth costs in a run with PROG_DEPTH: its first step less the median of the ten after it.

    python -m sweeps.lab.depth_switches runs/waves/wave_depth_clock/*/logs/*.jsonl

The run must log every step (TRAIN_LOG_EVERY=1).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from data.user_error import UserError, run_tool, tell
from sweeps.lab.run_summary import read_events

LATER_STEPS = 10  # that tell what a step costs once the new depth has settled


@dataclass(frozen=True)
class DepthSwitch:
    """A change of depth: after how many steps, to how many layers; ms of its first and later steps."""

    step: int
    layers: int
    first_ms: float
    later_ms: float


def depth_switches(log: Path) -> list[DepthSwitch]:
    """Every change of depth in a run's event log. Raises UserError where steps around one are not logged."""
    events, _ = read_events(log)
    clock = {event["step"]: event["train_ms"] for event in events if event["event"] == "step"}
    switches = []
    for event in events:
        if event["event"] != "phase":
            continue
        first_step = event["step"] + 1  # the event counts completed steps
        numbers = range(first_step, first_step + LATER_STEPS + 1)
        durations = [clock[n] - clock[n - 1] for n in numbers if n in clock and n - 1 in clock]
        if len(durations) < 2:
            raise UserError(f"{log} does not log the steps after step {event['step']}; set TRAIN_LOG_EVERY=1")
        switches.append(DepthSwitch(event["step"], event["depth"], durations[0], median(durations[1:])))
    return switches


def print_switches(logs: list[Path]) -> None:
    """A Markdown table of all runs."""
    print("| run | switch to | at step | first step | the ten after | extra |\n|---|--:|--:|--:|--:|--:|")
    for log in logs:
        for switch in depth_switches(log):
            extra_ms = switch.first_ms - switch.later_ms
            print(
                f"| {log.stem} | {switch.layers} layers | {switch.step} | {switch.first_ms:.0f} ms "
                f"| {switch.later_ms:.0f} ms | {extra_ms:+.0f} ms |"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("logs", nargs="+", type=Path, help="event logs of runs, logs/RUN_ID.jsonl")
    options = parser.parse_args()
    try:
        print_switches(options.logs)
    except UserError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    run_tool(main)
