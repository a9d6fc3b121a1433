"""Give results of older scripts the config hash that today's script has for the same experiment.

    python -m sweeps.lab.rekey_results

The first definition of `config_hash` covered every knob that acts, defaults too, so that each new knob
changed every hash. The present one (`Config.hash`) covers only knobs off their default. This rewrites
`config_hash` in each row of sweeps/results/*.jsonl and keeps the first one beside it as `config_hash_v1`, by
which a row is found in its log. Exit code 1, and nothing is written, unless the hashes map one to one: runs
that were the same experiment still are, and no others have become so. A second run changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from data.user_error import UserError, run_tool, tell, tell_os_error
from sweeps.lab.paths import SHIPPED_RESULTS
from sweeps.lab.run_rows import Results, Row
from train_gpt import Config, RunError, write_atomic

NOT_ONE_TO_ONE = 1  # exit code


@dataclass(frozen=True)
class Rekeyed:
    """A row, the hash of the first definition that it has or had, and the row as it should be.

    first: None if the row never had one: a run that did not start, or one of today's script.
    is_confirmed: whether the first definition gives `first` for the row's config; None without either.
    """

    run_id: str
    first: str | None
    row: Row
    is_changed: bool
    is_confirmed: bool | None


def config_of(row: Row) -> Config:
    """The run's config: as the run logged it, or, for a run that did not start, as the wave set it.

    Raises RunError where today's script refuses the values, TypeError where it lacks one of the knobs.
    """
    if row.get("config") is None:
        return Config.from_env(row["env"])
    values = {}
    for name, value in row["config"].items():
        values[name] = tuple(value) if isinstance(value, list) else value
    return Config(**values)


def first_hash(cfg: Config, names: Iterable[str]) -> str:
    """The hash by the first definition: all acting knobs, defaults too, of the knobs that existed then.

    names: those knobs, by field name. Today's script says which of them act: a condition that is added to a
    knob's `needs` later may make this another hash than the one that was stored.
    """
    acting = {}
    for knob_field in fields(cfg):
        is_known = knob_field.name in names
        if is_known and knob_field.metadata["role"] != "place" and not cfg.unmet(knob_field):
            acting[knob_field.name.upper()] = getattr(cfg, knob_field.name)
    text = json.dumps(acting, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rekey(row: Row) -> Rekeyed:
    """The row with today's hash. Raises what `config_of` raises."""
    run_id = row.get("run_id", "?")
    stored = row.get("config_hash")
    if stored is None:
        return Rekeyed(run_id, None, row, False, None)
    cfg = config_of(row)
    first = row.get("config_hash_v1")
    if first is None and stored != cfg.hash:
        first = stored
    is_confirmed = None
    if first is not None and row.get("config") is not None:
        is_confirmed = first_hash(cfg, row["config"]) == first
    if stored == cfg.hash:
        return Rekeyed(run_id, first, row, False, is_confirmed)
    changed = {}
    for key, value in row.items():
        if key == "config_hash":
            changed["config_hash"] = cfg.hash
            changed["config_hash_v1"] = first
        elif key != "config_hash_v1":
            changed[key] = value
    return Rekeyed(run_id, first, changed, True, is_confirmed)


def read_rows(path: Path) -> list[Rekeyed]:
    """Every row of a file. UserError names a line that cannot be read or has no config in today's script."""
    rekeyed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rekeyed.append(rekey(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, RunError) as error:
            raise UserError(f"{path}:{number}: no config hash can be made of this row: {error}") from error
    return rekeyed


def clashes(rows: Iterable[Rekeyed]) -> list[str]:
    """One line for each hash, first or new, that stands for two of the other kind. One to one: none."""
    new_of: dict[str, Rekeyed] = {}
    first_of: dict[str, Rekeyed] = {}
    lines = []
    for one in rows:
        if one.first is None:
            continue
        new = one.row["config_hash"]
        twin = new_of.setdefault(one.first, one)
        if twin.row["config_hash"] != new:
            lines.append(
                f"{twin.run_id} and {one.run_id} were the same experiment ({one.first}) "
                f"and would be two: {twin.row['config_hash']} and {new}"
            )
        twin = first_of.setdefault(new, one)
        if twin.first != one.first:
            lines.append(
                f"{twin.run_id} and {one.run_id} were two experiments ({twin.first} and {one.first}) "
                f"and would be the same: {new}"
            )
    return lines


@contextmanager
def claimed(paths: Iterable[Path]) -> Iterator[None]:
    """Hold the files' locks, so that no wave adds rows meanwhile. UserError where one does."""
    with ExitStack() as locks:
        for path in paths:
            results = Results(path.parent, path.stem)
            if not results.claim():
                raise UserError(f"{path}: a wave is writing to it; wait for it, then try again")
            locks.callback(results.lock.close)
        yield


def write(path: Path, rows: Iterable[Rekeyed]) -> None:
    """Put the rows in the file's place, whole or not at all."""
    lines = []
    for one in rows:
        lines.append(json.dumps(one.row) + "\n")
    write_atomic(path, "".join(lines).encode())


def report(rows: Sequence[Rekeyed], files: int, written: int) -> None:
    """Print what was found and done."""
    with_first = [one for one in rows if one.first is not None]
    firsts = {one.first for one in with_first}
    news = {one.row["config_hash"] for one in with_first}
    confirmed = sum(one.is_confirmed is True for one in with_first)
    print(f"{len(rows)} rows in {files} files, {len(with_first)} of them by older scripts")
    print(f"{len(firsts)} hashes of the first definition, {len(news)} of today's: one to one")
    print(f"the first definition gives {confirmed} of {len(with_first)} stored hashes again")
    for one in with_first:
        if one.is_confirmed is False:
            print(f"  not that of {one.run_id}")
    changed = sum(one.is_changed for one in rows)
    print(f"rewrote {changed} rows in {written} files")


def rekey_files(paths: Sequence[Path]) -> int:
    """Re-key these files; returns the exit code. All are proven before one is written."""
    files = {path: read_rows(path) for path in paths}
    rows = []
    for part in files.values():
        rows.extend(part)
    lines = clashes(rows)
    if lines:
        tell("\n".join([*lines, "the hashes do not map one to one; nothing was written"]))
        return NOT_ONE_TO_ONE
    written = 0
    for path, part in files.items():
        if any(one.is_changed for one in part):
            write(path, part)
            written += 1
    report(rows, len(files), written)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=SHIPPED_RESULTS, help="folder of *.jsonl; default: ours"
    )
    options = parser.parse_args(arguments)
    paths = sorted(options.results.glob("*.jsonl"))
    try:
        if not paths:
            raise UserError(f"{options.results} holds no results")
        with claimed(paths):
            return rekey_files(paths)
    except UserError as error:
        return tell(error)
    except OSError as error:
        return tell_os_error(error)


if __name__ == "__main__":
    run_tool(main)
