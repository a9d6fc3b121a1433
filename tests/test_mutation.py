"""The sampler of broken lines knows all files of ours and their tests, and breaks what runs, not messages."""

import ast
import random

import pytest

from tests import mutation
from tests.conftest import ROOT


def test_every_file_of_ours_has_its_tests_and_they_are_there():
    assert set(mutation.our_files()) == set(mutation.FILE_TESTS)
    for names in (*mutation.FILE_TESTS.values(), *mutation.SECTION_TESTS.values()):
        assert [name for name in names.split() if not (ROOT / f"tests/test_{name}.py").is_file()] == []


def test_every_section_of_the_script_has_its_tests():
    source = (ROOT / "train_gpt.py").read_text()
    lines = source.count("\n")
    assert {mutation.section_of(source, line) for line in range(1, lines, 50)} == set(mutation.SECTION_TESTS)


BROKEN = {
    "a < b": "a <= b",
    "a == b": "a != b",
    "a + 1": "a - 1",
    "a * b": "a // b",
    "a and b": "a or b",
    "not a": "a",
    "True": "False",
    "0.8": "1.8",
    "min": "max",
}


@pytest.mark.parametrize("source", BROKEN)
def test_an_expression_is_broken_as_a_hand_could(source):
    (statement,) = ast.parse(source).body
    assert ast.unparse(mutation.altered(statement.value)) == BROKEN[source]


@pytest.mark.parametrize("source", ["a", "f(a)", "'text'", "'a' + b", "[1] + a", "a in b", "None"])
def test_what_a_hand_would_not_break_is_left(source):
    (statement,) = ast.parse(source).body
    assert mutation.altered(statement.value) is None


def test_only_what_runs_is_broken():
    source = '''
LIMIT = 3

class Knobs:
    size: int = 4

    def method(self, width=5):
        """Six: 6."""
        count: int = 7
        print(8)
        if self.size > 9:
            raise ValueError(f"{10}", 11)
        return f"{12}"
'''
    found = [(ast.unparse(node), inside) for node, inside in mutation.places(ast.parse(source))]
    assert found == [("self.size > 9", ("method", "Knobs")), ("9", ("method", "Knobs"))]


def test_a_sample_is_the_same_for_a_seed_and_each_break_is_one_line_of_sound_python():
    files = ["sweeps/lab/statistics.py", "data/caseops.py"]
    breaks = mutation.sample_breaks(files, 30, random.Random(1))
    assert breaks == mutation.sample_breaks(files, 30, random.Random(1))
    for broken in breaks:
        lines = (ROOT / broken.file).read_text().split("\n")
        assert lines[broken.line - 1].strip() == broken.before != broken.after
        lines[broken.line - 1] = lines[broken.line - 1].replace(broken.before, broken.after)
        ast.parse("\n".join(lines))


def test_a_broken_line_is_found_again_where_it_moved_to():
    broken = mutation.Break("x.py", 3, "a = 1", "a = 2", (), ())
    assert mutation.find_line(["", "", "    a = 1"], broken) == 3
    assert mutation.find_line(["a = 1", "", "", "  a = 1"], broken) == 4
    assert mutation.find_line(["b = 1"], broken) is None


def test_an_imported_function_gets_the_broken_code(tmp_path):
    path = tmp_path / "module.py"
    source = "def outer(x):\n    def inner():\n        return x + 1\n    return inner()\n"
    names = {}
    exec(compile(source, str(path), "exec"), names)
    assert names["outer"](1) == 2
    mutation.break_functions([names["outer"]], path, source.replace("+", "-"))
    assert names["outer"](1) == 0
