"""Do the tests see a broken line? Breaks one at a time in a copy of the tree and runs the tests of its place.

    python tests/mutation.py --count 120 --seed 1 --out FILE.json [--only train_gpt.py ...]
    python tests/mutation.py --again FILE.json --out NEWER.json      # the survivors alone, by newer tests

A break is a small one that a hand could make: < for <=, + for -, `and` for `or`, a number off by one, True
for False, a condition turned round, min for max; in statements that run, not in defaults, knobs or messages.
It counts as caught if a test fails that passes without the break, or hangs for HANG seconds. Tests that took
longer than --longest seconds by the file --times are left out; it grows as they run. `pytest --durations=200`
of an earlier run can be given as --durations. Opt-in: about 20 seconds each on one core. Results are written
as they come: the same command goes on where it was cut off.

There are three rounds. A fork of this process, which has imported all tests, gets the broken function and
runs the quick tests that name it. What these let pass is tried by all tests of its place; and what they let
pass once more in a process that reads the broken file afresh, for functions that run on import.
Prints one line a break, the survivors again at the end.
Exit codes: 0 all were caught, 1 some survived, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import ast
import gc
import inspect
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import pytest  # noqa: E402

HANG = 600  # seconds in one test; if it then takes a third of that without the break, the machine is busy
PATIENCE = 3600  # seconds for all tests of one break; who needs longer is neither caught nor a survivor
QUICK = 0.3  # seconds; such tests go first
NEAR_LONGEST = 1.0  # seconds of the longest test of the first, quick round
NO_TESTS = 5  # pytest's exit code where it ran none

# The tests that look at a section of train_gpt.py, by its number.
SECTION_TESTS = {
    1: "config style waits",
    2: "config docs show",
    3: "settle gpu_path waits bad_input deterministic ranks run",
    4: "schedules depth frontier run",
    5: "stream data_tools caseops ranks run",
    6: "bytes caseops data_tools bad_input score",
    7: "model depth frontier ideas artifact",
    8: "model optim ideas legality",
    9: "optim ranks ideas frontier run",
    10: "average resume",
    11: "artifact bad_input bench",
    12: "score legality bad_input",
    13: "hedge legality",
    14: "resume bad_input ranks",
    15: "settle schedules waits average run resume ranks",
    16: "schedules waits bad_input run records lint",
    17: "ideas museum effects",
    18: "config bad_input run resume",
}
FILE_TESTS = {
    "data/caseops.py": "caseops",
    "data/file_locks.py": "data_tools engine",
    "data/fineweb.py": "data_fineweb",
    "data/missing_packages.py": "missing_packages",
    "data/pydocs.py": "data_pydocs",
    "data/shards.py": "data_tools caseops stream data_pydocs",
    "data/tokenize_docs.py": "data_tools caseops",
    "data/user_error.py": "closed_pipe bad_input",
    "data/verify.py": "data_tools caseops",
    "records/artifact_head.py": "lint_statements lint",
    "records/finished.py": "lint records",
    "records/legality.py": "legality",
    "records/lint.py": "lint lint_statements records",
    "records/lint_folder.py": "lint lint_statements",
    "records/lint_log.py": "lint lint_statements",
    "records/lint_readme.py": "lint lint_statements",
    "records/lint_statements.py": "lint lint_statements",
    "records/make.py": "records",
    "records/pack_script.py": "pack_script",
    "records/page.py": "records",
    "records/pr895_mixer.py": "pr895_mixer",
    "records/rescore.py": "records",
    "records/significance.py": "significance records",
    "records/unpack_script.py": "pack_script",
    "sweeps/lab/depth_switches.py": "bench",
    "sweeps/lab/forked_runs.py": "engine",
    "sweeps/lab/gains_by_length.py": "effects report docs",
    "sweeps/lab/gpu_scaling.py": "scale",
    "sweeps/lab/hedge_frontier.py": "hedge_frontier docs",
    "sweeps/lab/hedge_study.py": "hedge docs",
    "sweeps/lab/held_out.py": "engine effects",
    "sweeps/lab/local_backend.py": "engine",
    "sweeps/lab/null_study.py": "effects",
    "sweeps/lab/ray_backend.py": "engine",
    "sweeps/lab/rekey_results.py": "rekey",
    "sweeps/lab/report.py": "report",
    "sweeps/lab/report_figures.py": "report",
    "sweeps/lab/report_page.py": "report",
    "sweeps/lab/report_tables.py": "report",
    "sweeps/lab/run_process.py": "engine",
    "sweeps/lab/run_rows.py": "rekey effects report engine",
    "sweeps/lab/run_summary.py": "run_best report",
    "sweeps/lab/show.py": "show docs config",
    "sweeps/lab/size_limit.py": "run_best report",
    "sweeps/lab/statistics.py": "significance effects",
    "sweeps/lab/validation_halves.py": "report engine",
    "sweeps/lab/verdicts.py": "effects report",
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
PRINTERS = {"print", "add", "add_argument", "ArgumentParser"}  # what stands in their calls is a message
# Imported before the first break, so that no break waits for them.
HEAVY_PACKAGES = ("numpy", "torch", "torch._dynamo", "sentencepiece", "scipy.stats", "hypothesis", "xdist")


@dataclass(frozen=True)
class Round:
    """A way to try the breaks that an earlier one let pass: by the quick tests that name the broken
    function or by all of its place, in a fork with that function broken or that reads the file afresh."""

    tries: str  # the verdict of the breaks that it takes
    passes: str  # the verdict of those that it lets pass
    only_near: bool
    is_hot: bool


ROUNDS = (
    Round("not run", "not seen near", only_near=True, is_hot=True),
    Round("not seen near", "not seen hot", only_near=False, is_hot=True),
    Round("not seen hot", "survived", only_near=False, is_hot=False),
)


@dataclass(frozen=True)
class Break:
    """One broken line, and what became of it: caught, hangs, unfinished, gone, or a verdict of ROUNDS."""

    file: str
    line: int
    before: str
    after: str
    inside: tuple[str, ...]  # names of the function and of what it stands in
    tests: tuple[str, ...]
    verdict: str = "not run"
    caught_by: str = ""
    seconds: float = 0.0
    note: str = ""  # by a reader of the table: why it does not matter, or what was done


@dataclass
class Times:
    """What is known of the tests without a break: seconds of each, and which ones passed and failed there."""

    seconds: dict[str, float] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def our_files() -> list[str]:
    """The Python files with functions in them, beside train_gpt.py; no tests, no committed records."""
    found = []
    for folder in ("data", "records", "sweeps"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("records/20") and places(ast.parse(path.read_text())):
                found.append(name)
    return found


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


def is_text(node: ast.AST) -> bool:
    """Whether an operand is a string or a list, which cannot be subtracted."""
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_string or isinstance(node, ast.JoinedStr | ast.List)


def altered(node: ast.AST) -> ast.AST | None:
    """A copy of an expression with one thing changed, or None where there is nothing to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        return ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        if is_text(node.left) or is_text(node.right):
            return None
        return ast.BinOp(node.left, SIGNS[type(node.op)](), node.right)
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


def is_message(node: ast.AST) -> bool:
    """Whether what stands inside is only said: an f-string, an error, a printed line, a usage text."""
    if isinstance(node, ast.Call):
        function = node.func
        # `add` is what the tools call a parser's add_argument; a set's is a method.
        return getattr(function, "id", "") in PRINTERS or getattr(function, "attr", "") in PRINTERS - {"add"}
    return isinstance(node, ast.JoinedStr | ast.Raise)


def places(tree: ast.Module) -> list[tuple[ast.AST, tuple[str, ...]]]:
    """The expressions inside functions that can be altered, each with the names of the functions and classes
    that it stands in, the inmost first; not annotations, defaults, messages."""
    found = []

    def visit(node: ast.AST, inside: tuple[str, ...], runs: bool) -> None:
        if is_message(node) or isinstance(node, ast.arguments | ast.AnnAssign):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inside = (node.name, *inside)
            runs = isinstance(node, ast.FunctionDef)
        is_on_one_line = hasattr(node, "end_col_offset") and node.lineno == node.end_lineno
        if runs and is_on_one_line and altered(node) is not None:
            found.append((node, inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside, runs)

    visit(tree, (), False)
    return found


def sample_breaks(files: list[str], count: int, rng: random.Random) -> list[Break]:
    """So many breaks, over the files by their share of all places that can be broken."""
    candidates = []
    for file in files:
        for node, inside in places(ast.parse((ROOT / file).read_text())):
            candidates.append((file, node, inside))
    breaks = []
    for file, node, inside in rng.sample(candidates, min(count, len(candidates))):
        source = (ROOT / file).read_text()
        line = source.splitlines()[node.lineno - 1]
        raw = line.encode()
        new = raw[: node.col_offset] + ast.unparse(altered(node)).encode() + raw[node.end_col_offset :]
        names = FILE_TESTS.get(file) or SECTION_TESTS[section_of(source, node.lineno)]
        tests = tuple(f"tests/test_{name}.py" for name in names.split())
        breaks.append(Break(file, node.lineno, line.strip(), new.decode().strip(), inside, tests))
    return breaks


def copy_tree(folder: Path) -> None:
    """The tracked files, and an index of them: some tests ask git for its list."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=folder, check=True, stderr=subprocess.DEVNULL)


class Watch:
    """A pytest plugin: which tests run, in which order, and a line of JSON for each that ended.

    First come those that name the broken function or its class, then the others, each time the quick ones
    before the slow ones.
    """

    def __init__(self, report: Path, inside: tuple[str, ...], times: Times, longest: float):
        self.report = report
        self.inside = inside
        self.names = re.compile("|".join(rf"\b{name}\b" for name in inside) or "$.")
        self.times = times
        self.longest = longest
        self.only_near = False
        self.seconds: dict[str, float] = {}

    def is_near(self, item: pytest.Item) -> bool:
        is_named = any(name in item.nodeid for name in self.inside)
        return is_named or bool(self.names.search(inspect.getsource(item.function)))

    def is_wanted(self, item: pytest.Item) -> bool:
        is_short = self.times.seconds.get(item.nodeid, 0.0) <= self.longest
        is_sound = item.nodeid not in self.times.failed
        return is_short and is_sound and (not self.only_near or self.is_near(item))

    def turn(self, item: pytest.Item) -> tuple[bool, bool, bool]:
        is_in_near_file = bool(self.names.search(inspect.getsource(item.module)))
        is_slow = self.times.seconds.get(item.nodeid, 0.0) > QUICK
        return not self.is_near(item), not is_in_near_file, is_slow

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(filter(self.is_wanted, items), key=self.turn)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = self.seconds.get(report.nodeid, 0.0) + report.duration
        self.seconds[report.nodeid] = seconds
        hangs = report.failed and "Timeout >" in str(report.longrepr)
        told = dict(test=report.nodeid, failed=report.failed, hangs=hangs, seconds=round(seconds, 2))
        with self.report.open("a") as lines:
            lines.write(json.dumps(told) + "\n")


class Collect:
    """A pytest plugin: the text of every test function, by file."""

    def __init__(self):
        self.sources: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            file = item.nodeid.partition("::")[0]
            self.sources[file] = self.sources.get(file, "") + inspect.getsource(item.function)


def code_objects(code: CodeType) -> Iterator[CodeType]:
    """A compiled file and all functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_objects(constant)


def break_functions(functions: list[FunctionType], path: Path, source: str) -> None:
    """Give the functions of a file that was imported the code of another source of the same lines."""
    codes = {}
    for code in code_objects(compile(source, str(path), "exec", dont_inherit=True)):
        codes[code.co_name, code.co_firstlineno] = code
    for function in functions:
        old = function.__code__
        new = codes.get((old.co_name, old.co_firstlineno), old)
        if new != old and new.co_freevars == old.co_freevars:
            function.__code__ = new


@dataclass
class Tree:
    """A copy of the tree in which lines are broken, and what its tests do while none is."""

    folder: Path
    times: Times
    longest: float
    writes: int = 0
    sources: dict[str, str] = field(default_factory=dict)  # of the tests in each file
    functions: dict[str, list[FunctionType]] = field(default_factory=dict)  # of each of our files

    def import_tests(self, files: list[str]) -> None:
        """Import tests and all they need into this process, and note the functions of our files."""
        collect = Collect()
        os.chdir(self.folder)
        sys.path[0] = str(self.folder)
        with open(self.folder.parent / "output.txt", "w") as output, redirect_stdout(output):
            pytest.main(["--collect-only", "-qq", "-n0", "-p", "no:cacheprovider", *files], plugins=[collect])
        self.sources = collect.sources
        for function in gc.get_objects():
            if type(function) is FunctionType:  # isinstance asks the object, and some warn
                path = Path(function.__code__.co_filename)
                if path.is_relative_to(self.folder):
                    name = path.relative_to(self.folder).as_posix()
                    self.functions.setdefault(name, []).append(function)
        gc.freeze()

    def run_tests(
        self,
        tests: list[str],
        inside: tuple[str, ...] = (),
        of_round: Round | None = None,
        broken: tuple[str, str] | None = None,
    ) -> tuple[int | None, list[dict]]:
        """Run them up to the first failure: pytest's exit code, None after PATIENCE seconds; what they told.

        broken: a file and its broken source, which is on the disk already.
        """
        report = self.folder.parent / "report.jsonl"
        report.write_text("")
        words = ["-q", "-x", "-n0", "-p", "no:cacheprovider", f"--timeout={HANG}"]
        words.append(f"--basetemp={self.folder.parent / 'scratch'}")
        child = os.fork()
        if child == 0:
            # A group of its own, so that what hangs can be ended with all that it started.
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            output = os.open(self.folder.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            watch = Watch(report, inside, self.times, self.longest)
            if of_round and of_round.only_near:
                watch.only_near = True
                watch.longest = min(self.longest, NEAR_LONGEST)
            if of_round and of_round.is_hot:
                break_functions(self.functions.get(broken[0], []), self.folder / broken[0], broken[1])
            elif of_round:
                self.forget_modules()
            code = 3
            try:
                code = int(pytest.main([*words, *tests], plugins=[watch]))
            finally:
                os._exit(code)
        code = wait(child, PATIENCE)
        return code, [json.loads(line) for line in report.read_text().splitlines()]

    def forget_modules(self) -> None:
        """Let every module of the tree be imported again."""
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(self.folder)):
                del sys.modules[name]

    def passes_without_break(self, test: str) -> bool:
        """Whether one test passes in the sound tree; asked once."""
        if test not in self.times.passed + self.times.failed:
            code, told = self.run_tests([test])
            is_sound = code == 0 and bool(told)
            (self.times.passed if is_sound else self.times.failed).append(test)
        return test in self.times.passed

    def try_break(self, broken: Break, of_round: Round) -> Break:
        """The break with its verdict in a round."""
        lines = (self.folder / broken.file).read_text().split("\n")
        number = find_line(lines, broken)
        if number is None:
            return replace(broken, verdict="gone")
        lines[number - 1] = lines[number - 1].replace(broken.before, broken.after)
        tests = [name for name in broken.tests if (self.folder / name).is_file()]
        if of_round.only_near:
            names = re.compile("|".join(rf"\b{name}\b" for name in broken.inside))
            tests = [name for name in tests if names.search(self.sources.get(name, ""))]
        began = time.monotonic()
        code = NO_TESTS
        told = []
        if tests:
            code, told = self.run_broken(broken, "\n".join(lines), tests, of_round)
        failed = [test for test in told if test["failed"]]
        caught_by = failed[0]["test"] if failed else ""
        verdict = "caught"
        if code is None:
            verdict = "unfinished"
        elif code in (0, NO_TESTS):
            verdict = of_round.passes
            self.times.seconds |= {test["test"]: test["seconds"] for test in told}
        elif failed and failed[0]["hangs"]:
            _, told = self.run_tests([caught_by])
            verdict = "hangs" if sum(test["seconds"] for test in told) < HANG / 3 else "unfinished"
        seconds = round(broken.seconds + time.monotonic() - began, 1)
        return replace(broken, line=number, verdict=verdict, caught_by=caught_by, seconds=seconds)

    def run_broken(
        self, broken: Break, source: str, tests: list[str], of_round: Round
    ) -> tuple[int | None, list[dict]]:
        """Run tests with the break until none is the first to fail that fails without it too."""
        path = self.folder / broken.file
        sound = path.read_text()
        while True:
            self.write(path, source)
            try:
                code, told = self.run_tests(tests, broken.inside, of_round, (broken.file, source))
            finally:
                self.write(path, sound)
            failed = [test for test in told if test["failed"]]
            if not failed or self.passes_without_break(failed[0]["test"]):
                return code, told

    def write(self, path: Path, source: str) -> None:
        """Write a source file with a time of its own: Python takes compiled code of equal size and second."""
        path.write_text(source)
        self.writes += 1
        os.utime(path, (self.writes, self.writes))


def find_line(lines: list[str], broken: Break) -> int | None:
    """The number of the line to break, the nearest equal one if the file has changed; None if it is gone."""
    equal = [number for number, line in enumerate(lines, start=1) if line.strip() == broken.before]
    return min(equal, key=lambda number: abs(number - broken.line), default=None)


def wait(child: int, seconds: float) -> int | None:
    """The exit code of a child; None if it had to be ended. What it started is ended in any case."""
    deadline = time.monotonic() + seconds
    code = None
    try:
        while code is None and time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code


def read_breaks(path: Path) -> list[Break]:
    """The breaks of an --out file."""
    stored = json.loads(path.read_text())["breaks"]
    found = []
    for entry in stored:
        lists = dict(inside=tuple(entry["inside"]), tests=tuple(entry["tests"]))
        found.append(Break(**entry | lists))
    return found


def write_breaks(path: Path, seed: int, breaks: list[Break]) -> None:
    """The --out file, whole at any time."""
    counts = {}
    for broken in breaks:
        counts[broken.verdict] = counts.get(broken.verdict, 0) + 1
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = dict(
        benchmark="mutation",
        commit=described.stdout.strip(),
        python=platform.python_version(),
        seed=seed,
        count=len(breaks),
        verdicts=counts,
        breaks=[asdict(broken) for broken in breaks],
    )
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(page, indent=1) + "\n")
    part.replace(path)


def describe(broken: Break) -> str:
    return f"{broken.file}:{broken.line}  {broken.before}  ->  {broken.after}"


def is_caught(broken: Break) -> bool:
    return broken.verdict in ("caught", "hangs")


def breaks_to_run(wanted: argparse.Namespace) -> list[Break]:
    """Those of --out if it is there, else the survivors of --again, else a new sample."""
    if wanted.out.is_file():
        return read_breaks(wanted.out)
    if wanted.again:
        left = [broken for broken in read_breaks(wanted.again) if not is_caught(broken)]
        return [replace(broken, verdict="not run") for broken in left]
    return sample_breaks(wanted.only, wanted.count, random.Random(wanted.seed))


def read_durations(path: Path) -> dict[str, float]:
    """Seconds of each test, set-up and end included, of pytest's list of the slowest."""
    seconds = {}
    for line in path.read_text().splitlines():
        timed = re.fullmatch(r"([\d.]+)s (?:setup|call|teardown) +(tests/\S+::.*)", line.strip())
        if timed:
            seconds[timed[2]] = seconds.get(timed[2], 0.0) + float(timed[1])
    return seconds


def run_rounds(tree: Tree, breaks: list[Break], wanted: argparse.Namespace) -> None:
    """Try the breaks round by round; their verdicts replace them in the list and are written at once."""
    for of_round in ROUNDS:
        for index, broken in enumerate(breaks):
            if broken.verdict != of_round.tries:
                continue
            breaks[index] = done = tree.try_break(broken, of_round)
            write_breaks(wanted.out, wanted.seed, breaks)
            if wanted.times:
                wanted.times.write_text(json.dumps(asdict(tree.times), indent=1) + "\n")
            took = f"{done.seconds:4.0f} s"
            print(f"{done.verdict:13} {took}  {describe(done)}  {done.caught_by}", flush=True)


def main() -> int:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON of every break and what became of it")
    parser.add_argument("--only", nargs="+", default=["train_gpt.py", *FILE_TESTS], metavar="FILE")
    parser.add_argument("--again", type=Path, metavar="FILE", help="an earlier --out: its survivors")
    parser.add_argument("--longest", type=float, default=5.0, help="seconds (5); longer tests are left out")
    parser.add_argument("--times", type=Path, help="JSON: keeps what is known of the tests for the next time")
    parser.add_argument("--durations", type=Path, help="what pytest --durations=200 printed")
    wanted = parser.parse_args()
    unknown = [file for file in wanted.only if file != "train_gpt.py" and file not in FILE_TESTS]
    if unknown:
        parser.error(f"no tests are named for {unknown[0]}")
    breaks = breaks_to_run(wanted)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing that runs is left behind
    wanted.out = wanted.out.resolve()
    wanted.times = wanted.times and wanted.times.resolve()
    # Before the packages are imported, which read it.
    os.environ |= dict(OMP_NUM_THREADS="1")
    for package in HEAVY_PACKAGES:
        if find_spec(package.split(".")[0]):
            import_module(package)
    times = Times()
    if wanted.times and wanted.times.is_file():
        times = Times(**json.loads(wanted.times.read_text()))
    if wanted.durations:
        times.seconds |= read_durations(wanted.durations)
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name) / "tree"
        folder.mkdir()
        copy_tree(folder)
        tree = Tree(folder, times, wanted.longest)
        tests: dict[str, None] = {}
        for broken in breaks:
            if broken.verdict in [of_round.tries for of_round in ROUNDS]:
                tests |= dict.fromkeys(broken.tests)
        if tests:
            tree.import_tests([test for test in tests if (folder / test).is_file()])
        with suppress(KeyboardInterrupt):
            run_rounds(tree, breaks, wanted)
    survivors = [broken for broken in breaks if not is_caught(broken)]
    print(f"{len(breaks) - len(survivors)} of {len(breaks)} caught")
    for broken in survivors:
        print(f"{broken.verdict}: {describe(broken)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
