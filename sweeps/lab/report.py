"""What waves found, for people: tables in experiment_log.md, figures, and one offline HTML page.

    python sweeps/report.py                      everything in sweeps/results
    python sweeps/report.py stack loo            write the log's entries of these waves only
    python sweeps/report.py --watch 30           rewrite the page every 30 s while waves run; log left alone

In the log only what stands between `<!-- wave NAME -->` and `<!-- /wave NAME -->`, and between the two
`across` markers, is written; a wave without its markers gets an entry at the top to be filled in by hand. All
numbers are computed by verdicts.py from the result rows, and runs of different regimes never share a table.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from sweeps.lab import report_figures, report_page
from sweeps.lab.paths import FIGURES, RESULTS, ROOT
from sweeps.lab.report_tables import Wave, across_block, cell, progression, read_waves, wave_block

LOG_HEAD = "# Experiment log\n\nNewest first.\n"


# The log


def day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def place_block(text: str, name: str, block: str, skeleton: str) -> str:
    """The log with `block` between the markers of `name`; `skeleton`, which has them, where there are none.

    All that stands outside of the markers stays as it is, byte for byte."""
    opening, closing = markers(name)
    newline = "\r\n" if "\r\n" in text else "\n"
    if text.count(opening) > 1 or text.count(closing) > 1 or (opening in text) != (closing in text):
        raise ValueError(f"the log must hold {opening} and {closing} once each, or neither")
    if opening not in text:
        top = text.find(markers("across")[1]) if name != "across" else 0  # entries stand below that table
        found = re.compile(r"^## ", re.M).search(text, max(0, top))
        at = found.start() if found else len(text)
        text = text[:at] + skeleton.replace("\n", newline) + text[at:]
    before, _, rest = text.partition(opening)
    _, found, after = rest.partition(closing)
    if not found:
        raise ValueError(f"{closing} stands before {opening} in the log")
    return before + opening + newline + block.replace("\n", newline) + closing + after


def wave_skeleton(wave: Wave) -> str:
    when = day(wave.began or time.time())
    opening, closing = markers(f"wave {wave.name}")
    question = cell(wave.question) or "(to be written)"
    return (
        f"## {when} · {wave.name} · (the finding, to be written)\n\nQuestion  {question}\n\n"
        f"{opening}\n{closing}\n\nConclusion  (to be written)\n\n"
    )


def across_skeleton() -> str:
    opening, closing = markers("across")
    return f"## All waves\n\n{opening}\n{closing}\n\n"


def write_log(
    path: Path, waves: Sequence[Wave], chosen: Iterable[str], figures: dict[str, list[str]]
) -> None:
    """New entries go to the top, the newest wave first; the table across waves stands above them."""
    text = read_text(path) if path.exists() else LOG_HEAD + "\n"
    names = set(chosen)
    if not waves:
        return
    for wave in waves:  # each new one lands above those before it
        if wave.name in names:
            block = wave_block(wave, figures.get(wave.name, ()))
            text = place_block(text, f"wave {wave.name}", block, wave_skeleton(wave))
    text = place_block(text, "across", across_block(waves, figures.get("", ())), across_skeleton())
    replace(path, text.encode())


def read_text(path: Path) -> str:
    """Without any change to its line ends."""
    return path.read_bytes().decode()


def replace(path: Path, content: bytes) -> None:
    """Write a file at once: a reader sees the old one or the new one."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# Command line


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("waves", nargs="*", metavar="WAVE", help="write these entries only; default all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of WAVE.jsonl")
    parser.add_argument("--log", type=Path, default=ROOT / "experiment_log.md")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for the PNGs")
    parser.add_argument("--html", type=Path, default=ROOT / "runs/report.html")
    parser.add_argument("--only-html", action="store_true", help="leave the log and the figures alone")
    parser.add_argument("--watch", type=float, metavar="S", help="rewrite the page every S seconds; only it")
    asked = parser.parse_args(arguments)
    if asked.watch is not None and asked.watch <= 0:
        parser.error("--watch takes a number of seconds above zero")
    return asked


def write_page(asked: argparse.Namespace) -> list[Wave]:
    waves = read_waves(asked.results)
    shown = [wave for wave in waves if not asked.waves or wave.name in asked.waves]
    replace(asked.html, report_page.page(shown, asked.watch).encode())
    return waves


def unknown(asked: argparse.Namespace) -> list[str]:
    return [name for name in asked.waves if not (asked.results / f"{name}.jsonl").is_file()]


def main(arguments: Sequence[str] | None = None) -> int:
    asked = options(arguments)
    if missing := unknown(asked):
        print(f"no results of {', '.join(missing)} in {asked.results}", file=sys.stderr)
        return 2
    waves = write_page(asked)
    print(f"wrote {asked.html}")
    while asked.watch:
        time.sleep(asked.watch)
        write_page(asked)
    if not asked.only_html:
        chosen = asked.waves or [wave.name for wave in waves]
        figures = report_figures.draw(waves, progression(waves), chosen, asked.figures, asked.log.parent)
        write_log(asked.log, waves, chosen, figures)
        print(f"wrote {asked.log} and {sum(map(len, figures.values()))} figures in {asked.figures}")
    return 0
