"""Do the tests see a broken line? Breaks one at a time in a copy of the tree and runs the tests of its place.

    python tests/mutation.py --count 120 --seed 1 [--out FILE.json] [--only train_gpt.py ...]

A break is a small one that a hand could make: < for <=, + for -, `and` for `or`, a number off by one, True
for False, a condition turned round, min for max. It counts as caught if a test fails or does not end.
Opt-in: on one core about 20 seconds each. Prints one line a break, the survivors again at the end.
Exit codes: 0 all were caught, 1 some survived, 2 wrong usage or the tests fail without a break.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds for the tests of one break

# The tests that look at a section of train_gpt.py, by its number, the quick ones first.
SECTION_TESTS = {
    1: "config style",
    2: "config museum docs",
    3: "settle gpu_path bad_input deterministic ranks",
    4: "schedules depth run",
    5: "stream data_tools ranks run",
    6: "bytes bad_input score",
    7: "model depth ideas artifact",
    8: "model museum ideas legality",
    9: "optim ranks ideas run",
    10: "average resume",
    11: "artifact bench",
    12: "score legality bad_input",
    13: "hedge legality",
    14: "resume bad_input ranks",
    15: "settle run resume average ranks",
    16: "run records lint",
    17: "museum ideas effects",
    18: "config bad_input run",
}
FILE_TESTS = {
    "records/finished.py": "lint records",
    "records/legality.py": "legality",
    "records/lint.py": "lint records",
    "records/make.py": "records",
    "records/page.py": "records",
    "records/rescore.py": "records",
    "records/significance.py": "significance records",
    "records/pack_script.py": "pack_script",
    "records/pr895_mixer.py": "pr895_mixer",
    "data/fineweb.py": "data_fineweb",
    "data/pydocs.py": "data_pydocs",
    "data/shards.py": "data_tools stream data_pydocs",
    "data/tokenize_docs.py": "data_tools",
    "data/verify.py": "data_tools",
    "sweeps/lab/gains_by_length.py": "effects report",
    "sweeps/lab/gpu_scaling.py": "scale",
    "sweeps/lab/held_out.py": "engine effects",
    "sweeps/lab/run_rows.py": "report effects engine",
    "sweeps/lab/run_summary.py": "run_best report",
    "sweeps/lab/show.py": "show docs",
    "sweeps/lab/statistics.py": "significance effects",
    "sweeps/lab/verdicts.py": "effects report",
    "sweeps/lab/validation_halves.py": "engine report",
    "sweeps/lab/wave_engine.py": "engine",
    "sweeps/lab/wave_plan.py": "wave engine",
    "sweeps/lab/wave_spec.py": "wave",
}

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult}
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Break:
    """One broken line."""

    file: str
    line: int
    before: str
    after: str
    tests: tuple[str, ...]


def section_of(source: str, line: int) -> int:
    """The number of train_gpt.py's section that a line stands in."""
    number = 1
    for count, text in enumerate(source.splitlines(), start=1):
        banner = re.match(r"# (\d+)\. [A-Z]", text)
        if banner:
            number = int(banner[1])
        if count == line:
            break
    return number


def altered(node: ast.AST) -> ast.AST | None:
    """A copy of an expression with one thing changed, or None where there is nothing to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        return ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        is_text = isinstance(node.left, ast.JoinedStr | ast.List) or isinstance(
            node.right, ast.JoinedStr | ast.List
        )
        return None if is_text else ast.BinOp(node.left, SIGNS[type(node.op)](), node.right)
    if isinstance(node, ast.BoolOp):
        operator = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return ast.BoolOp(operator, node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return ast.Constant(node.value + 1)
    if isinstance(node, ast.Name) and node.id in OTHER_NAMES:
        return ast.Name(OTHER_NAMES[node.id])
    return None


def places(tree: ast.Module) -> list[ast.AST]:
    """The expressions inside functions that can be altered; not annotations, defaults, messages."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.arguments | ast.AnnAssign):
            return
        if hasattr(node, "end_col_offset") and node.lineno == node.end_lineno and altered(node) is not None:
            found.append(node)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                visit(statement)
    return sorted(set(found), key=lambda node: (node.lineno, node.col_offset, node.end_col_offset))


def sample_breaks(files: list[str], count: int, rng: random.Random) -> list[Break]:
    """So many breaks, over the files by their share of all places that can be broken."""
    candidates = [(file, node) for file in files for node in places(ast.parse((ROOT / file).read_text()))]
    breaks = []
    for file, node in rng.sample(candidates, min(count, len(candidates))):
        source = (ROOT / file).read_text()
        line = source.splitlines()[node.lineno - 1]
        raw = line.encode()
        new = raw[: node.col_offset] + ast.unparse(altered(node)).encode() + raw[node.end_col_offset :]
        names = FILE_TESTS.get(file) or SECTION_TESTS[section_of(source, node.lineno)]
        tests = tuple(f"tests/test_{name}.py" for name in names.split())
        breaks.append(Break(file, node.lineno, line.strip(), new.decode().strip(), tests))
    return breaks


def copy_tree(folder: Path) -> None:
    """The tracked files, and the data that tests may find."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def tests_pass(folder: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass in a tree, within PATIENCE seconds, one file after another."""
    present = [name for name in tests if (folder / name).is_file()]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *present]
    # A place of its own in the process table, so that what hangs can be ended with all that it started.
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return False


def try_break(folder: Path, broken: Break) -> bool:
    """Whether the tests catch it."""
    path = folder / broken.file
    sound = path.read_text()
    lines = sound.split("\n")
    lines[broken.line - 1] = lines[broken.line - 1].replace(broken.before, broken.after)
    path.write_text("\n".join(lines))
    try:
        return not tests_pass(folder, broken.tests)
    finally:
        path.write_text(sound)


def main() -> int:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON of every break and what became of it")
    parser.add_argument("--only", nargs="+", default=["train_gpt.py", *FILE_TESTS], metavar="FILE")
    wanted = parser.parse_args()
    unknown = [file for file in wanted.only if file != "train_gpt.py" and file not in FILE_TESTS]
    if unknown:
        parser.error(f"no tests are named for {unknown[0]}")
    breaks = sample_breaks(wanted.only, wanted.count, random.Random(wanted.seed))
    results = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copy_tree(folder)
        for broken in breaks:
            began = time.monotonic()
            is_caught = try_break(folder, broken)
            seconds = time.monotonic() - began
            verdict = "caught  " if is_caught else "SURVIVED"
            place = f"{broken.file}:{broken.line}"
            print(f"{verdict} {place}  {broken.before}  ->  {broken.after} ({seconds:.0f} s)", flush=True)
            results.append(asdict(broken) | dict(caught=is_caught, seconds=round(seconds, 1)))
            if wanted.out:
                wanted.out.write_text(json.dumps(dict(seed=wanted.seed, breaks=results), indent=1) + "\n")
    survivors = [result for result in results if not result["caught"]]
    print(f"{len(results) - len(survivors)} of {len(results)} caught")
    for result in survivors:
        print(f"survived: {result['file']}:{result['line']}  {result['before']}  ->  {result['after']}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
