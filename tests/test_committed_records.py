"""The records in records/: made by real runs on a CPU, linted here; scored again on demand."""

import json
import re
import subprocess
import sys

import pytest

from records import lint, rescore
from tests.conftest import ROOT

RECORDS = sorted(path.parent for path in (ROOT / "records").glob("*/submission.json"))
NAMES = [path.name.partition("_")[2] for path in RECORDS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of the embedded corpus: the one of run_best.sh, or one that is made for these tests."""
    for out in (ROOT / "data", tmp_path_factory.mktemp("data")):
        command = [sys.executable, "data/pydocs.py", "--out", out, "--workers", "2"]
        if out != ROOT / "data" or (out / "datasets/pydocs_sp1024/manifest.json").is_file():
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            return out


def test_the_records_of_the_issue_are_there():
    assert sorted(NAMES) == ["cpu_baseline", "cpu_best", "cpu_lower_lr", "cpu_progressive_depth"]


@pytest.mark.parametrize("folder", RECORDS, ids=NAMES)
def test_the_linter_finds_nothing_wrong(folder):
    bad = [finding for finding in lint.check_folder(folder) if finding.severity != "info"]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize("folder", RECORDS, ids=NAMES)
def test_it_says_that_it_is_of_a_cpu(folder):
    claim = json.loads((folder / "submission.json").read_text())
    assert "CPU" in claim["name"] and "cpu" in claim["track"] and len(claim["seeds"]) == 3
    assert "No leaderboard claim is made" in (folder / "README.md").read_text()


def python_of(folder) -> str:
    """Major and minor version of the Python that a record was made with."""
    (log, *_) = sorted(folder.glob("train_seed*.log"))
    return re.search(r"^Running Python (\d+\.\d+)", log.read_text(encoding="utf-8"), re.M)[1]


# Slow: test_records.py shows that a packed model scores again to its claim, test_artifact.py that these load.
@pytest.mark.slow
@pytest.mark.parametrize("folder", RECORDS, ids=NAMES)
def test_a_seed_scores_again(folder, request, capsys):
    claim = json.loads((folder / "submission.json").read_text())
    if python_of(folder) != "{}.{}".format(*sys.version_info):
        pytest.skip(f"another validation text: it is the documentation of Python {python_of(folder)}")
    corpus = request.getfixturevalue("corpus")  # made only where it can be the record's
    shard = corpus / "datasets/pydocs_sp1024"
    options = ["--data", shard, "--tokenizer", corpus / "tokenizers/pydocs_1024_bpe.model"]
    try:
        code = rescore.main([str(folder), *map(str, options), "--seed", str(claim["seeds"][0])])
    except rescore.UserError as refusal:
        if "validation text" in str(refusal):
            made = json.loads((shard / "manifest.json").read_text())
            pytest.skip(f"another validation text: Python {made['python']} has other documentation")
        raise
    assert code == 0, capsys.readouterr().out
