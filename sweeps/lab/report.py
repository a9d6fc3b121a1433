"""What waves found, for people: a page of tables for each wave, figures, and one offline HTML page.

    python sweeps/report.py                      all results of your own, runs/results
    python sweeps/report.py stack loo            the pages and figures of these waves only
    python sweeps/report.py --shipped            the HTML page of the results that came with the project
    python sweeps/report.py --watch 30           rewrite the HTML page alone every 30 s while waves run
    python sweeps/report.py --publish            the pages and figures of the shipped results, and the list of
                                                 all waves in experiment_log.md

The tables of WAVE.jsonl go to WAVE.md beside it, those of all waves together to all_waves.md. Each is written
as a whole; a page by another hand is never overwritten. Files that git knows, sweeps/results, sweeps/figures
and experiment_log.md, are written with `--publish` alone. The log is written by hand: `--publish` fills in
what stands between its two markers `waves` and touches nothing else. All numbers are computed by verdicts.py
from the result rows, and runs of different regimes never share a table.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.user_error import UserError, tell
from sweeps.lab import report_figures, report_page
from sweeps.lab.paths import OWN_PAGE, OWN_RESULTS, ROOT, SHIPPED_FIGURES, SHIPPED_RESULTS
from sweeps.lab.report_tables import (
    ALL_WAVES,
    GENERATED,
    Wave,
    across_page,
    all_ladders,
    index_block,
    read_waves,
    wave_page,
)

OPENING, CLOSING = "<!-- waves -->", "<!-- /waves -->"
LOG_HEAD = "# Experiment log\n"
INDEX_HEAD = "## All waves\n\n"


# Files


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


def refuse_hand_written(paths: Iterable[Path]) -> None:
    """Raise UserError if a page that is to be written holds what somebody wrote by hand."""
    for path in paths:
        if path.exists() and not path.read_bytes().startswith(GENERATED.encode()):
            raise UserError(
                f"{path} was not written by this program; move it away, or delete it, "
                "so that the tables can stand there"
            )


def write_pages(
    folder: Path, waves: Sequence[Wave], chosen: Iterable[str], figures: dict[str, list[str]]
) -> int:
    """The pages of the chosen waves and the one of all waves; how many there are."""
    texts = {}
    names = set(chosen)
    for wave in waves:
        if wave.name in names:
            texts[folder / f"{wave.name}.md"] = wave_page(wave, figures.get(wave.name, ()))
    if waves:
        texts[folder / f"{ALL_WAVES}.md"] = across_page(waves, figures.get("", ()))
    for path, text in texts.items():
        replace(path, text.encode())
    return len(texts)


# The list in the log


def place_block(text: str, block: str) -> str:
    """The log with `block` between its markers; where it has none, they are added at its end.

    All that stands outside of the markers stays as it is, byte for byte."""
    newline = "\r\n" if "\r\n" in text else "\n"
    if text.count(OPENING) > 1 or text.count(CLOSING) > 1 or (OPENING in text) != (CLOSING in text):
        raise UserError(f"the log must hold {OPENING} and {CLOSING} once each, or neither")
    if OPENING not in text:
        text += (newline if text.endswith("\n") else 2 * newline) + INDEX_HEAD.replace("\n", newline)
        text += OPENING + newline + CLOSING + newline
    before, _, rest = text.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not closing:
        raise UserError(f"{CLOSING} stands before {OPENING} in the log")
    return before + OPENING + newline + block.replace("\n", newline) + closing + after


def publish(log: Path, waves: Sequence[Wave], folder: Path) -> None:
    """Write the list of all waves into the log, with links to their pages in `folder`."""
    text = log.read_bytes().decode() if log.exists() else LOG_HEAD  # bytes: the line ends stay as they are
    pages = Path(os.path.relpath(folder, log.parent)).as_posix()
    replace(log, place_block(text, index_block(waves, pages)).encode())


# Command line


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    add = parser.add_argument
    add("waves", nargs="*", metavar="WAVE", help="write these pages only; default all")
    add("--results", type=Path, help="folder of WAVE.jsonl and WAVE.md; default runs/results, your own")
    add("--shipped", action="store_true", help="the results that came with the project, sweeps/results")
    add("--publish", action="store_true", help="write what git knows: the shipped pages and the log's list")
    add("--log", type=Path, default=ROOT / "experiment_log.md")
    add("--figures", type=Path, help="folder for the PNGs; default figures/ in the folder of results")
    add("--html", type=Path, default=OWN_PAGE)
    add("--only-html", action="store_true", help="leave all other files alone")
    add("--watch", type=float, metavar="S", help="rewrite the HTML page every S seconds; only it")
    asked = parser.parse_args(arguments)
    if asked.watch is not None and asked.watch <= 0:
        parser.error("--watch takes a number of seconds above zero")
    if asked.shipped and asked.results:
        parser.error("--shipped is a folder of results already; leave --results out")
    choose_folders(asked)
    return asked


def choose_folders(asked: argparse.Namespace) -> None:
    """Fill in the folders that were not named; what git knows is for `--publish`."""
    if asked.results is None:
        asked.results = SHIPPED_RESULTS if asked.shipped or asked.publish else OWN_RESULTS
    are_shipped = asked.results.resolve() == SHIPPED_RESULTS
    if asked.figures is None:
        asked.figures = SHIPPED_FIGURES if are_shipped else asked.results / "figures"
    if are_shipped and not asked.publish:
        asked.only_html = True


def write_html(asked: argparse.Namespace) -> list[Wave]:
    """Write the HTML page; returns all waves of the results, asked for or not."""
    if not asked.watch:
        print(f"judges the waves in {asked.results}: the shipped ones take about 5 s", flush=True)
    waves = read_waves(asked.results)
    shown = [wave for wave in waves if not asked.waves or wave.name in asked.waves]
    replace(asked.html, report_page.page(shown, asked.watch).encode())
    return waves


def write_rest(asked: argparse.Namespace, waves: Sequence[Wave]) -> None:
    """Draw the figures, write the pages, and the list in the log if that was asked for."""
    chosen = asked.waves or [wave.name for wave in waves]
    refuse_hand_written(asked.results / f"{name}.md" for name in [*chosen, ALL_WAVES])
    print("draws the figures: about 10 s for the shipped waves", flush=True)
    figures = report_figures.draw(waves, all_ladders(waves), chosen, asked.figures, asked.results)
    written = write_pages(asked.results, waves, chosen, figures)
    drawn = sum(len(paths) for paths in figures.values())
    print(f"wrote {written} pages in {asked.results} and {drawn} figures in {asked.figures}")
    if asked.publish and waves:
        publish(asked.log, waves, asked.results)
        print(f"wrote the list of waves in {asked.log}")


def unknown_waves(asked: argparse.Namespace) -> list[str]:
    return [name for name in asked.waves if not (asked.results / f"{name}.jsonl").is_file()]


def main(arguments: Sequence[str] | None = None) -> int:
    asked = options(arguments)
    unknown = unknown_waves(asked)
    if unknown:
        print(f"no results of {', '.join(unknown)} in {asked.results}", file=sys.stderr)
        for name in unknown:
            if (SHIPPED_RESULTS / f"{name}.jsonl").is_file():
                print(f"those of {name} that came with the project: --shipped {name}", file=sys.stderr)
        return 2
    waves = write_html(asked)
    print(f"wrote {asked.html}")
    if not waves and asked.results == OWN_RESULTS:
        print("no wave was run here yet; --shipped shows the results that came with the project")
    while asked.watch:
        time.sleep(asked.watch)
        write_html(asked)
    if asked.only_html:
        return 0
    try:
        write_rest(asked, waves)
    except UserError as error:
        return tell(error)
    return 0
