"""The shape of train_gpt.py is a promise to its readers; keep it by machine, not by reviewers."""

import ast
import re
import sys

import pytest

import train_gpt
from tests.conftest import ROOT

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
SECTIONS = {
    number: found[1] for number, line in enumerate(LINES, 1) if (found := re.match(r"# (\d+)\. ", line))
}
RUNTIME, MAIN = "2", "11"

# Uses of devices and ranks outside section RUNTIME, each for a reason.
EXCEPTIONS = {
    "tick: torch.cuda.Event",  # how far the device is, without waiting for it
    "fit_micro_batch: torch.cuda.empty_cache",  # frees what the failed attempt held
    "describe_machine: torch.cuda.get_device_name",  # a name for the log
}


def section(line: int) -> str:
    """Number of the section a line belongs to."""
    return next((name for number, name in reversed(SECTIONS.items()) if number <= line), "0")


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def innermost_function(line: int) -> str:
    around = [f for f in FUNCTIONS if f.lineno <= line <= f.end_lineno]
    return max(around, key=lambda f: f.lineno).name if around else ""


def lines_with(pattern: str) -> list[int]:
    return [number for number, line in enumerate(LINES, 1) if re.search(pattern, line)]


def test_sections_are_those_the_head_announces():
    promised = re.findall(
        r"(\d+) ([A-Z][a-z]+)", re.search(r"Sections: (.*?)\.\n", train_gpt.__doc__, re.S)[1]
    )
    assert [number for number, _ in promised] == list(SECTIONS.values()) == [str(n) for n in range(1, 12)]
    for number, word in promised:
        assert any(re.match(rf"# {number}\. {word.upper()}", line) for line in LINES), word


def test_nothing_runs_on_import():
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign
    rest = [ast.unparse(node) for node in TREE.body if not isinstance(node, kinds)]
    assert rest[0].startswith(("'", '"'))
    assert rest[1:] == ["if __name__ == '__main__':\n    main()"]


def test_it_imports_only_the_standard_library_and_the_four_packages():
    modules = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch", "numpy", "sentencepiece", "zstandard"}


def test_it_is_python_3_10():
    assert ast.parse(SOURCE, feature_version=(3, 10))


def test_only_main_reads_the_environment():
    assert {section(number) for number in lines_with(r"\bos\.(environ|getenv|putenv)")} == {MAIN}


def test_only_runtime_knows_devices_and_ranks():
    uses = set()
    for node in ast.walk(TREE):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        if (
            re.match(r"(torch\.cuda|dist|torch\.distributed|torch\.mps)\.\w+$", name)
            and section(node.lineno) != RUNTIME
        ):
            uses.add(f"{innermost_function(node.lineno)}: {name}")
    assert uses == EXCEPTIONS


def test_torch_compile_has_one_home():
    assert {section(number) for number in lines_with(r"torch\.compile\(")} == {RUNTIME}


def test_nats_become_bits_in_one_place():
    assert len(lines_with(r"\blog\(2(\.0)?\)|\blog2\(|\b0\.69314|\b1\.4426")) == 1


def test_no_globals_and_no_bare_excepts():
    assert not [node for node in ast.walk(TREE) if isinstance(node, ast.Global | ast.Nonlocal)]
    assert not [node for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler) and node.type is None]


def test_no_error_is_swallowed_whole():
    """`except Exception` names the error and does something with it."""
    for handler in (node for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler)):
        if dotted(handler.type) in ("Exception", "BaseException"):
            body = ast.unparse(handler)
            assert handler.name and re.search(rf"\b{handler.name}\b", body.partition(":")[2]), body


def knobs_read() -> set[str]:
    """Fields of Config that the code reads: as an attribute of a config, or by name in a table."""
    tables = "SCHEDULES EMBEDDING_TERMS INPUT_TERMS LOSS_TERMS GRADIENT_EDITS WEIGHT_EDITS LAYER_RATES DECAYS"
    read = {name for table in tables.split() for name in getattr(train_gpt, table)}
    config = next(node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    for node in ast.walk(TREE):
        owner = dotted(node.value).split(".")[-1] if isinstance(node, ast.Attribute) else ""
        own = owner == "self" and config.lineno <= node.lineno <= config.end_lineno
        if owner in ("cfg", "config") or own:
            read.add(node.attr)
    return read


@pytest.mark.parametrize("name", [f.name for f in train_gpt.fields(train_gpt.Config)])
def test_every_knob_is_read_somewhere(name):
    assert name in knobs_read() or f'"{name.upper()}" in env' in SOURCE


def asserts(node: ast.FunctionDef) -> bool:
    return bool(re.search(r"\bassert|\braises\(", "\n".join(map(ast.unparse, node.body))))


def test_every_test_asserts_something():
    """Itself, or through a helper of its own file; an exit code alone is not enough."""
    idle = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        helpers = {f.name for f in functions if asserts(f)}
        for test in (f for f in functions if f.name.startswith("test_") and not asserts(f)):
            if not helpers & {dotted(node.func) for node in ast.walk(test) if isinstance(node, ast.Call)}:
                idle.append(f"{path.name}: {test.name}")
    assert idle == []
