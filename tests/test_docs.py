"""What the README says must be so: its knob table, its commands, its numbers."""

import re
import subprocess
import sys

import pytest

import train_gpt
from tests.conftest import ROOT, show
from train_gpt import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", *ROOT.glob("*/README.md")])
KNOBS = {f.name.upper() for f in train_gpt.fields(Config)}
# Assignments in our pages that are no knobs of train_gpt.py.
OTHERS = {"KNOB", "PACKED"}
# What records/pack_script.py and a packed script name, and nobody commits.
MADE = {
    "train_gpt_readable.py",
    "train_gpt_unpacked.py",
    "packed/train_gpt.py",
    "packed/train_gpt_readable.py",
}


def commands(text: str) -> list[str]:
    """Lines of the fenced blocks, joined where they end in a backslash, without comments."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in blocks.splitlines()) if line]


def words_of_code(text: str) -> list[str]:
    """Words of code blocks and of `inline code`."""
    return " ".join([*commands(text), *re.findall(r"`([^`\n]+)`", text)]).split()


def test_the_knob_table_is_the_programs_own():
    table = re.search(r"<!-- knobs -->\n(.*?)\n?<!-- /knobs -->", README, re.S)[1]
    assert table.strip() == show("--knob-table")


def test_the_printed_knob_table_is_the_one_of_the_readme(tmp_path):
    script = [sys.executable, str(ROOT / "train_gpt.py"), "--knob-table"]
    run = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == show("--knob-table") and not list(tmp_path.iterdir())


BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@BY_PAGE
def test_scripts_named_in_a_page_exist(page):
    words = words_of_code(page.read_text(encoding="utf-8"))
    named = {word for word in words if re.search(r"\w\.(py|sh)$", word)} - MADE
    homes = ROOT, page.parent, page.parent / "lab", ROOT / "tests", ROOT / "tests/bench"
    assert [word for word in named if not any((home / word).is_file() for home in homes)] == []


@BY_PAGE
def test_settings_named_in_a_page_are_knobs(page):
    words = words_of_code(page.read_text(encoding="utf-8"))
    named = {found[1] for word in words if (found := re.match(r"([A-Z][A-Z0-9_]+)=", word))}
    assert named - KNOBS - OTHERS == set()


def test_the_readmes_training_commands_parse():
    lines = [line for line in commands(README) if "train_gpt.py" in line and "=" in line]
    assert len(lines) >= 2
    for line in lines:
        words = [word for word in line.split() if re.match(r"[A-Z][A-Z0-9_]+=", word)]
        assert set(Config.from_env(dict(word.split("=", 1) for word in words)).overrides()) <= KNOBS


def test_the_readmes_paths_exist():
    rows = re.findall(
        r"^\| (`[^|]+`) \|", README.partition("## What is where")[2].partition("\n## ")[0], re.M
    )
    paths = [path for row in rows for path in re.findall(r"`([^`]+)`", row)]
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_two_commands_come_first():
    assert [line.split() for line in commands(README)[:2]] == [
        ["bash", "run_best.sh"],
        ["bash", "tests/run.sh"],
    ]


@pytest.mark.parametrize("text", [README, train_gpt.__doc__], ids=["README", "--help"])
def test_exit_codes_are_the_programs(text):
    codes = {
        train_gpt.OVER_SIZE: "16,000,000",
        train_gpt.OVER_EVAL_TIME: "evaluation",
        train_gpt.DIVERGED: "diverged",
    }
    for code, word in codes.items():
        assert re.search(rf"(\| |, ){code}( \||) [^|]*{word}", text), code


def test_the_size_limit_is_the_challenges():
    assert train_gpt.SIZE_LIMIT == 16_000_000 and "16,000,000 bytes" in README.replace("\n", " ")


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-lab.txt"])
def test_requirements_are_pinned(name):
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted and all(
        re.match(r"[A-Za-z0-9_.-]+==\d[\w.]*(; python_version .*)?$", line) for line in wanted
    )


def test_training_requires_the_four_packages_and_no_more():
    text = (ROOT / "requirements.txt").read_text()
    assert set(re.findall(r"^([a-z]+)==", text, re.M)) == {"torch", "numpy", "sentencepiece", "zstandard"}


def test_ruff_and_pytest_settings_only():
    text = (ROOT / "pyproject.toml").read_text()
    assert all(head.startswith(("tool.ruff", "tool.pytest")) for head in re.findall(r"^\[(.+)\]", text, re.M))
