"""What the pages say must be so: their knob table, commands, links and numbers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import train_gpt
from sweeps.lab.gains_by_length import CURVES, points_of
from tests.conftest import ROOT, show
from train_gpt import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
KNOB_PAGE = ROOT / "sweeps/KNOBS.md"
ROOMS = ("data", "records", "sweeps", "tests")
ROOM_PAGES = [page for room in ROOMS for page in sorted((ROOT / room).glob("*.md"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOM_PAGES]
EVERY_PAGE = [*ROOT.glob("*.md"), *ROOM_PAGES, *ROOT.glob("records/*/*.md"), *ROOT.glob("sweeps/*/*.md")]
WORKFLOW = ROOT / ".github/workflows/checks.yml"
KNOBS = {f.name.upper() for f in train_gpt.fields(Config)}
# Assignments in our pages that are no knobs of train_gpt.py.
OTHERS = {"KNOB", "PACKED"}
# What pages name and nobody commits: mostly of records/pack_script.py and a packed script.
MADE = {
    "rates.sh",
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
    page = KNOB_PAGE.read_text(encoding="utf-8")
    table = re.search(r"<!-- knobs -->\n(.*?)\n?<!-- /knobs -->", page, re.S)[1]
    assert table.strip() == show("--knob-table")


def test_the_printed_knob_table_is_the_one_of_its_page(tmp_path):
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


def test_the_training_commands_of_the_pages_parse():
    lines = []
    for page in PAGES:
        found = commands(page.read_text(encoding="utf-8"))
        lines += [line for line in found if "train_gpt.py" in line and "=" in line]
    assert len(lines) >= 2
    for line in lines:
        words = [word for word in line.split() if re.match(r"[A-Z][A-Z0-9_]+=", word)]
        assert set(Config.from_env(dict(word.split("=", 1) for word in words)).overrides()) <= KNOBS


def test_paths_in_the_table_of_what_is_where_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("## What is where")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|", section, re.M)
    paths = [path for row in rows for path in re.findall(r"`([^`]+)`", row)]
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def without_code(text: str) -> str:
    """A page without its fenced blocks and `inline code`, where brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The links and pictures of a page, web addresses left out, that lead to no file or to no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One head\n[a](page.md#one-head) [b](gone.md) [c](page.md#two) ![d](d.png) [e](#one-head)\n"
        "[f](https://example.org/gone) `[g](code.md)`\n```\n[h](block.md)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "page.md#two", "d.png"]


def test_every_page_of_a_room_can_be_reached_from_the_readme():
    seen = set()
    to_read = [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        if page.suffix == ".md":
            links = re.findall(r"\]\(([^)#\s]+)", without_code(page.read_text(encoding="utf-8")))
            to_read += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert [page for page in PAGES if page not in seen] == []


def test_what_the_readme_says_of_its_figure_is_so():
    curves = {curve.arm: points_of(curve) for curve in CURVES}
    costs = [point.mean for point in curves.pop("lr11")]
    assert len(costs) == 3 and 0 < costs[0] < costs[1] < costs[2]
    kept = {arm: points[-1].mean / min(point.mean for point in points) for arm, points in curves.items()}
    assert len(kept) == 5 and all(len(points) == 3 for points in curves.values())
    assert kept.pop("value_embeds") > 0.75
    assert all(0 < share <= 0.5 for share in kept.values())


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_000


def test_the_workflow_runs_the_oldest_and_the_newest_python_of_the_readme():
    named = re.search(r"Python (3\.\d+) to (3\.\d+)", README).groups()
    workflow = WORKFLOW.read_text(encoding="utf-8")
    assert tuple(re.findall(r'"(3\.\d+)"', re.search(r"python-version: \[(.*)\]", workflow)[1])) == named
    assert "run: bash .ci/run" in workflow


def named_pythons() -> list[str]:
    """Every version from the oldest to the newest that the README names."""
    oldest, newest = re.search(r"Python 3\.(\d+) to 3\.(\d+)", README).groups()
    return [f"3.{minor}" for minor in range(int(oldest), int(newest) + 1)]


@pytest.mark.parametrize("version", named_pythons())
def test_each_package_has_one_pin_for_each_python(version):
    """A marker that leaves a version out would let pip take any release there."""
    lines = []
    for name in ("requirements.txt", "requirements-lab.txt", "constraints.txt"):
        lines += re.sub(r"#.*", "", (ROOT / name).read_text()).splitlines()
    pins = [Requirement(line) for line in lines if line.strip()]
    on_this = [pin.name for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": version})]
    assert sorted(on_this) == sorted({pin.name for pin in pins})


GLOSSARY = ROOT / "sweeps/GLOSSARY.md"


def test_the_glossary_explains_the_words_in_half_a_screen_and_is_linked_from_the_readme():
    text = GLOSSARY.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text, re.M))
    wanted = {
        "bpb",
        "Tidal",
        "Muon",
        "live, packed",
        "U-Net skip",
        "Hedge",
        "wave",
        "arm",
        "control",
        "regime",
    }
    assert wanted <= rows.keys() and all(len(rows[word]) > 15 for word in wanted)
    assert len(text.splitlines()) <= 30
    assert "](sweeps/GLOSSARY.md)" in README


def test_the_readme_says_how_to_enter_the_environment_before_its_python_lines():
    entered = README.index("\nsource .venv/bin/activate\n")
    assert entered < min(found.start() for found in re.finditer(r"^python ", README, re.M))


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
        train_gpt.OVER_TRAIN_TIME: "training",
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
