"""What a command says on a Python that lacks the packages it needs: one line, with the mend, and exit code 2.

This file imports only the standard library. train_gpt.py loads it by its path where the repository is there;
the packages data, records, sweeps and tests turn it on for whatever imports them.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_TIME, LAB = "requirements.txt", "requirements-lab.txt"
EXIT_CODE = 2
MOST_NAMES = 4  # that the line holds
OLDEST = (3, 10)
IMPORTED_AS = {"pytest-xdist": "xdist"}
# Exits with 0 if this Python is recent and finds the modules named. It imports none: torch takes 2 s.
PROBE = (
    "import importlib.util, sys; "
    "sys.exit(sys.version_info < (3, 10) or not all(map(importlib.util.find_spec, sys.argv[1:])))"
)


def module_names(requirements: str) -> "list[str]":
    """The import names of the packages in one of our requirements files, in its order; none without it."""
    names: list = []
    path = ROOT / requirements
    if not path.is_file():  # a copy of a part of the project
        return names
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.match(r"[A-Za-z0-9_-]+", line)
        if found:
            names.append(IMPORTED_AS.get(found[0], found[0].replace("-", "_")))
    return list(dict.fromkeys(names))  # a package may have a line for each Python


def needed_files(module: str) -> "list[str]":
    """The requirements files of a command that lacks a module; none if it is no package of ours."""
    for files in ([RUN_TIME], [RUN_TIME, LAB]):
        if module in module_names(files[-1]):
            return files
    return []


def has_modules(python: Path, names: "list[str]") -> bool:
    """Whether that interpreter starts, is recent enough and finds all of the modules."""
    command = [str(python), "-c", PROBE, *names]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_python(names: "list[str]") -> "Path | None":
    """An interpreter that has the modules: that of .venv, else one on PATH."""
    versions = [f"python3.{minor}" for minor in range(20, OLDEST[1] - 1, -1)]
    on_path = [shutil.which(name) for name in ("python3", "python", *versions)]
    candidates = [ROOT / ".venv/bin/python", *map(Path, filter(None, on_path))]
    for python in candidates:
        if python.is_file() and has_modules(python, names):
            return python
    return None


def describe_mend(names: "list[str]", files: "list[str]") -> str:
    """What the user can do: enter .venv, take another interpreter, or have the packages installed."""
    python = find_python(names)
    if python == ROOT / ".venv/bin/python":
        return f"{python} has them: source {python.parent}/activate"
    if python:
        return f"{python} has them"
    if sys.prefix != sys.base_prefix:
        wanted = " ".join(f"-r {name}" for name in files)
        return f"in {ROOT}: pip install -c constraints.txt {wanted}"
    command = "run_best.sh --dry-run" if files == [RUN_TIME] else "tests/run.sh fast"
    return f"no Python here has them; bash {command} in {ROOT} makes .venv and installs them there"


def describe_missing(module: str) -> str:
    """One line on what is missing here and which interpreter has it; '' if `module` is no package of ours."""
    files = needed_files(module)
    if not files:
        return ""
    names = [name for file in files for name in module_names(file)]
    missing = [module] + [name for name in names if name != module and not importlib.util.find_spec(name)]
    told = ", ".join(missing[:MOST_NAMES])
    if len(missing) > MOST_NAMES:
        told += f" and {len(missing) - MOST_NAMES} more of {files[-1]}"
    version = ".".join(map(str, sys.version_info[:3]))
    age = "" if sys.version_info >= OLDEST else ", too old"
    return f"not installed for {sys.executable} ({version}{age}): {told}; {describe_mend(names, files)}"


def tell_uncaught(kind, error, trace) -> None:
    """sys.excepthook: one line instead of the traceback where a package of ours is missing."""
    line = describe_missing(error.name.partition(".")[0]) if is_missing_module(error) else ""
    if not line:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {line}", file=sys.stderr)
    sys.exit(EXIT_CODE)


def is_missing_module(error: BaseException) -> bool:
    """Whether an import failed because there is no such module."""
    return isinstance(error, ModuleNotFoundError) and bool(error.name)


def explain_missing_packages() -> None:
    """From now on, end with one line and exit code 2 where an import of ours finds no package."""
    sys.excepthook = tell_uncaught
