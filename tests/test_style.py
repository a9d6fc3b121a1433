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
RUNTIME, MAIN, MUSEUM = "3", "18", "17"

# Uses of devices and ranks outside section RUNTIME, each for a reason.
EXCEPTIONS = {
    "tick: torch.cuda.Event",  # how far the device is, without waiting for it
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
    announced = re.search(r"Sections follow .*?: (1 .*?)\.\n", train_gpt.__doc__, re.S)[1]
    promised = [re.match(r"(\d+) (.*)", " ".join(entry.split())).groups() for entry in announced.split(",")]
    assert [number for number, _ in promised] == [str(number) for number in range(1, 19)]
    assert list(SECTIONS.values()) == [number for number, _ in promised[1:]]
    for number, title in promised[1:]:
        assert any(line.startswith(f"# {number}. {title.upper()}") for line in LINES), title


def used_names(node: ast.AST) -> set[tuple[str, int]]:
    """(name, line) of what code reads, without annotations, which are not evaluated."""
    found = set()
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
                found.add((child.id, child.lineno))
            elif isinstance(child, ast.AST):
                found |= used_names(child)
    return found


def test_a_section_names_only_sections_above_it():
    home = {}
    for node in TREE.body:
        names = [node.name] if hasattr(node, "name") else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        for name in names:
            home[name] = int(section(node.lineno))
    ahead = {
        f"line {line}, section {section(line)}: {name} of section {home[name]}"
        for name, line in used_names(TREE)
        if home.get(name, 0) > int(section(line))
    }
    assert ahead == set()


def test_nothing_above_the_museum_names_its_knobs():
    museum = {f.name for f in train_gpt.fields(train_gpt.MuseumKnobs)}
    start = next(number for number, name in SECTIONS.items() if name == MUSEUM)
    code = "\n".join(ast.unparse(node) for node in TREE.body if 1 < node.lineno < start)
    assert {name for name in museum if re.search(rf"\bcfg\.{name}\b|[\"']{name}[\"']", code)} == set()


def test_nothing_runs_on_import():
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign
    imports = [node for node in TREE.body if isinstance(node, ast.Try)]
    assert len(imports) == 1 and all(
        isinstance(node, ast.Import | ast.ImportFrom) for node in imports[0].body
    )
    rest = [ast.unparse(node) for node in TREE.body if not isinstance(node, kinds) and node not in imports]
    assert rest[0].startswith(("'", '"'))
    assert rest[1:] == ["if __name__ == '__main__':\n    main()"]


def test_it_imports_only_the_standard_library_and_the_five_packages():
    modules = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
    assert modules - set(sys.stdlib_module_names) == {
        "torch",
        "numpy",
        "sentencepiece",
        "zstandard",
        "brotli",
    }


def test_it_is_python_3_10():
    assert ast.parse(SOURCE, feature_version=(3, 10))


def test_only_main_reads_the_environment():
    """But for the two variables that torch needs set, for deterministic kernels and for gloo."""
    lines = []
    for number in lines_with(r"\bos\.(environ|getenv|putenv)"):
        if not re.search("CUBLAS_WORKSPACE_CONFIG|GLOO_SOCKET_IFNAME", LINES[number - 1]):
            lines.append(number)
    assert {section(number) for number in lines} == {MAIN}


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
    """Fields of Config that the code reads: as an attribute of a config, or by name in a hook."""
    read = {name for hooks in train_gpt.HOOKS.values() for name, _ in hooks}
    groups = [
        n
        for n in TREE.body
        if isinstance(n, ast.ClassDef) and (n.name.endswith("Knobs") or n.name == "Config")
    ]
    for node in ast.walk(TREE):
        owner = dotted(node.value).split(".")[-1] if isinstance(node, ast.Attribute) else ""
        in_group = owner == "self" and any(g.lineno <= node.lineno <= g.end_lineno for g in groups)
        if owner in ("cfg", "config") or in_group:
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
