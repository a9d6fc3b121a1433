"""On a Python without packages every tool says in one line what is missing, who has it, and ends with 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import missing_packages
from tests.conftest import ROOT

# What the standard library is enough for; and what needs Ray, which no requirements file names.
NEEDS_NOTHING = {
    "tests/bench/ray_trial.py",
    "data/missing_packages.py",
    "records/make.py",
    "records/pack_script.py",
    "records/rescore.py",
    "sweeps/lab/depth_switches.py",
    "sweeps/summary.py",
    "tests/golden.py",
    "tests/pretend_gpu/device.py",  # run.py starts it, with an environment of its own
    "tests/support/forkserver.py",
}


def is_tool(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    is_ours = not path.name.startswith("test_") and not any(part.startswith("20") for part in parts)
    return is_ours and '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")


ROOMS = ("data", "records", "sweeps", "tests")
TOOLS = [
    str(path.relative_to(ROOT))
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if is_tool(path)
]
TOOLS_THAT_NEED = [tool for tool in TOOLS if tool not in NEEDS_NOTHING]


def run_bare(*arguments: str, path: str = "/nowhere", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run with this interpreter's standard library alone."""
    env = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [os.path.realpath(sys.executable), "-S", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def words_for(tool: str) -> list[str]:
    """How people start a tool: those of lab/ as modules."""
    if tool.startswith("sweeps/lab/"):
        return ["-m", tool.removesuffix(".py").replace("/", ".")]
    return [tool]


def other_python(folder: Path, has_packages: bool = True) -> Path:
    """An interpreter that answers the question for packages, and nothing else."""
    python = folder / "python3"
    python.write_text(f"#!/bin/sh\nexit {0 if has_packages else 1}\n")
    python.chmod(0o755)
    return python


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: not installed for "), done.stderr
    assert [word for word in words if word not in done.stderr] == []


@pytest.mark.parametrize("arguments", [[], ["--doctor"], ["--dry-run"], ["--list-ideas"], ["--version"]])
def test_the_script_says_what_is_missing_and_which_python_has_it(tmp_path, arguments):
    python = other_python(tmp_path)
    done = run_bare("train_gpt.py", *arguments, path=str(tmp_path))
    assert_one_line(done, "numpy", "torch", "sentencepiece", "zstandard", os.path.realpath(sys.executable))
    if not (ROOT / ".venv").exists():
        assert f"{python} has them" in done.stderr
    assert done.stdout == ""


def test_help_shows_the_head_all_the_same():
    done = run_bare("train_gpt.py", "--help")
    assert_one_line(done, "numpy")
    assert "Where to start reading" in done.stdout


def test_the_script_alone_says_it_too(tmp_path):
    shutil.copy(ROOT / "train_gpt.py", tmp_path / "train_gpt.py")
    done = run_bare("train_gpt.py", "--doctor", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "numpy is not installed for" in done.stderr and "pip install torch" in done.stderr


def test_the_tools_are_found():
    assert {"sweeps/report.py", "data/pydocs.py", "records/lint.py", "tests/as_users_run.py"} <= set(TOOLS)
    assert set(TOOLS) >= NEEDS_NOTHING - {"data/missing_packages.py"}


@pytest.mark.parametrize("tool", TOOLS_THAT_NEED)
def test_every_tool_says_what_is_missing(tool):
    done = run_bare(*words_for(tool), "--help")
    if done.returncode == 0:
        assert "usage" in done.stdout, "it starts: the packages are wanted later"
    else:
        assert_one_line(done)


def test_which_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(missing_packages, "ROOT", tmp_path)
    for name in (missing_packages.RUN_TIME, missing_packages.LAB):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    describe = missing_packages.describe_missing
    assert "bash run_best.sh --dry-run" in describe("torch") and "bash tests/run.sh" in describe("scipy")
    monkeypatch.setattr(sys, "prefix", "/an/environment")
    assert describe("scipy").endswith(
        "pip install -c constraints.txt -r requirements.txt -r requirements-lab.txt"
    )
    other_python(tmp_path, has_packages=False)
    assert "pip install" in describe("torch"), "a Python without the packages is no help"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    other_python(tmp_path / ".venv/bin").rename(tmp_path / ".venv/bin/python")
    assert describe("torch").endswith(f"has them: source {tmp_path}/.venv/bin/activate")


def test_the_probe_knows_what_an_interpreter_has():
    here = Path(sys.executable)
    assert missing_packages.has_modules(here, ["numpy", "torch"])
    assert not missing_packages.has_modules(here, ["numpy", "no_such_package"])
    assert not missing_packages.has_modules(Path("/nowhere/python"), ["numpy"])


def test_other_errors_keep_their_traceback():
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import records; import no_such_package"
    done = run_bare("-c", code)
    assert done.returncode == 1 and "Traceback" in done.stderr and "not installed" not in done.stderr
