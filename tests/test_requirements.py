"""What README.md says of Python versions: pip can resolve the pinned packages for each of them."""

import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT
from tests.test_docs import named_pythons

REQUIREMENTS = ("requirements.txt", "requirements-lab.txt")
NO_NETWORK = re.compile(
    r"connection broken|NewConnectionError|from versions: none\)|Read timed out|No module named pip"
)


def pins(name: str, version: str) -> list[str]:
    """The pins of a requirements file that hold for a Python version, without the markers.

    pip --python-version chooses the wheels of that version, but judges markers by the Python that runs it.
    """
    found = []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if not requirement.marker or requirement.marker.evaluate({"python_version": version}):
            found.append(f"{requirement.name}{requirement.specifier}")
    return found


def resolve(tmp_path, version: str, wanted: list[str], constraints: list[str]) -> subprocess.CompletedProcess:
    """What pip says to installing those packages on that Python; nothing is installed."""
    file = tmp_path / "constraints.txt"
    file.write_text("\n".join(constraints))
    where = ["--target", str(tmp_path / "nowhere"), "--python-version", version, "--only-binary=:all:"]
    how = ["--dry-run", "--ignore-installed", "--quiet", "--retries", "1", "--timeout", "20"]
    command = [sys.executable, "-m", "pip", "install", *how, *where, "-c", str(file), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip(f"no package index can be asked: {done.stderr.strip().splitlines()[-1]}")
    return done


# Slow: what torch and CUDA weigh is fetched for the answer, half a minute's work for one core.
@pytest.mark.slow
@pytest.mark.parametrize("version", named_pythons())
def test_pip_resolves_the_pinned_packages_for_each_python_of_the_readme(tmp_path, version):
    wanted = [pin for name in REQUIREMENTS for pin in pins(name, version)]
    done = resolve(tmp_path, version, wanted, pins("constraints.txt", version))
    assert done.returncode == 0, done.stderr


def test_pip_resolves_all_but_torch_for_the_oldest_python(tmp_path):
    """With what torch brings, as constraints.txt pins it."""
    version = named_pythons()[0]
    wanted = [pin for name in (*REQUIREMENTS, "constraints.txt") for pin in pins(name, version)]
    small = [pin for pin in wanted if not pin.startswith("torch==")]
    assert len(small) == len(wanted) - 1 > 30
    done = resolve(tmp_path, version, small, [])
    assert done.returncode == 0, done.stderr


def test_a_pin_that_a_python_cannot_install_is_found(tmp_path):
    """filelock 4.2.11 needs 3.11: the fault that the test above is for."""
    done = resolve(tmp_path, "3.10", ["filelock"], ["filelock==4.2.11"])
    assert done.returncode != 0 and "filelock" in done.stderr
