"""--doctor: a row for each thing a run needs, ok, warn or fail, the mend, and an exit code to build on."""

import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from tests.conftest import launch

ROWS = ["python", "torch", "device", "compute", "attention", "compile", "codec", "data", "disk", "ranks"]


def rows(out: str) -> dict[str, tuple[str, str]]:
    """{what: (verdict, found)}"""
    words = [line.split(None, 2) for line in out.splitlines()]
    return {what: (verdict, found) for verdict, what, found in words}


def test_a_machine_that_can_run_has_no_fail(tmp_path, dataset):
    outcome = launch(tmp_path, dataset, args=("--doctor",))
    found = rows(outcome.stdout)
    assert list(found) == ROWS and outcome.stderr == ""
    assert {verdict for verdict, _ in found.values()} <= {"ok", "warn"}
    assert found["data"][1].endswith("bytes") and found["attention"][0] == "ok"
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


DAMAGE = dict(
    broken_shard=(lambda data: (data / "toy_train_000000.bin").write_bytes(b"no shard"), "fetch it again"),
    lost_validation=(lambda data: (data / "toy_val_000000.bin").unlink(), "data/pydocs.py"),
    foreign_tokenizer=(
        lambda data: (data / "tokenizer.model").write_bytes(b"?"),
        "not a SentencePiece model",
    ),
)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_fails_with_its_mend(run_main, dataset, tmp_path, name):
    damage, mend = DAMAGE[name]
    copy = shutil.copytree(dataset, tmp_path / "data")
    damage(copy)
    code, out, err = run_main("--doctor", data=copy)
    found = rows(out)
    assert code == 2 and err == "" and [what for what in found if found[what][0] == "fail"] == ["data"]
    assert mend in found["data"][1]


def test_a_full_disk_and_a_lost_codec_fail(run_main, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    code, out, _ = run_main("--doctor")
    found = rows(out)
    assert code == 2 and found["disk"][0] == found["codec"][0] == "fail"
    assert "pip install zstandard" in found["codec"][1] and "a run takes" in found["disk"][1]


def test_a_compile_cache_that_cannot_be_made_is_named(tmp_path, dataset, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/x"))
    outcome = launch(tmp_path, dataset, args=("--doctor",))
    found = rows(outcome.stdout)
    assert outcome.stderr == "" and found["attention"][0] == "ok" and found["compile"][0] == "warn"
    assert re.match(
        r"TORCHINDUCTOR_CACHE_DIR=\S+/x cannot be written \(Not a directory\)", found["compile"][1]
    )


def test_an_apple_gpu_is_not_called_a_cpu():
    machine = train_gpt.describe_machine(train_gpt.Runtime(device=torch.device("mps")))
    assert machine["device"].startswith("MPS of ") and "threads" not in machine["device"]
    assert machine["attention"] == "sdpa"


def test_a_bad_knob_is_one_line(run_main):
    code, out, err = run_main("--doctor", matrix_lr="fast")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "MATRIX_LR" in err
