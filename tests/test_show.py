"""--doctor: a row for each thing a run needs, ok, warn or fail, the mend, and an exit code to build on."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from tests.conftest import launch, show, write_shard

ROWS = [
    "python",
    "torch",
    "device",
    "compute",
    "attention",
    "compile",
    "codec",
    "data",
    "text",
    "disk",
    "ranks",
]


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


def test_few_validation_tokens_are_warned_of(run_main, dataset, tmp_path):
    verdict, text = rows(run_main("--doctor")[1])["text"]
    assert verdict == "warn" and "--val-fraction" in text and "bpb" in text
    copy = shutil.copytree(dataset, tmp_path / "data")
    (shard,) = copy.glob("*_val_*")
    few = train_gpt.open_shard(shard).tolist()
    write_shard(shard, few * (100_001 // len(few) + 1))
    code, out, _ = run_main("--doctor", data=copy)
    verdict, text = rows(out)["text"]
    assert code == 0 and verdict == "ok" and float(text.split()[-2]) < 0.01


@pytest.fixture
def project(tmp_path, dataset, monkeypatch) -> Path:
    """A copy of the project where the embedded corpus is built, and nothing in the environment names data."""
    root = tmp_path / "project"
    ours = Path(train_gpt.__file__).parent
    shutil.copytree(ours / "sweeps/lab", root / "sweeps/lab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ours / "train_gpt.py", root / "train_gpt.py")
    (root / "data").mkdir()
    for path in (ours / "data").glob("*.py"):
        shutil.copy(path, root / "data" / path.name)
    shutil.copytree(dataset, root / "data/datasets/pydocs_sp1024")
    (root / "data/tokenizers").mkdir()
    shutil.copy(dataset / "tokenizer.model", root / "data/tokenizers/pydocs_1024_bpe.model")
    return root


def test_the_doctor_finds_the_embedded_corpus_as_run_best_does(project, dataset, run_main, monkeypatch):
    monkeypatch.setattr(train_gpt, "__file__", str(project / "train_gpt.py"))

    def data_row() -> tuple[str, str]:
        return rows(run_main("--doctor", data_path=None, tokenizer_path=None)[1])["data"]

    verdict, text = data_row()
    assert verdict == "ok" and "run_best.sh" in text
    assert f"DATA_PATH={project}/data/datasets/pydocs_sp1024" in text
    fineweb = project / "data/datasets/fineweb10B_sp1024"
    shutil.copytree(dataset, fineweb)
    shutil.copy(dataset / "tokenizer.model", project / "data/tokenizers/fineweb_1024_bpe.model")
    verdict, text = data_row()
    assert verdict == "ok" and "embedded" not in text
    for shard in fineweb.glob("*_val_*"):
        shard.unlink()
    assert "embedded" in data_row()[1], "half of FineWeb is no FineWeb for run_best.sh either"


def test_the_list_of_ideas_fits_a_terminal_and_loses_no_word():
    printed = show("--list-ideas")
    assert max(map(len, printed.splitlines())) <= 80
    words = printed.split()
    for row in train_gpt.knob_rows(train_gpt.Config):
        if row.fate:
            start = next(
                at for at, line in enumerate(printed.splitlines()) if line.startswith(f"{row.name} ")
            )
            told = " ".join(" ".join(printed.splitlines()[start : start + 12]).split())
            assert " ".join(row.doc.split()) in told and row.source.split()[0] in words


def test_a_dry_run_leads_with_parameters_bytes_steps_and_time(run_main):
    out = run_main("--dry-run", max_wallclock_seconds=600.0, iterations=10**9)[1]
    names = [line.partition(":")[0] for line in out.splitlines()[:4]]
    assert names == ["model_params", "predicted_artifact_bytes", "predicted_steps", "predicted_time"]
    assert "10 minutes of training" in out.splitlines()[3] and "warm-up" in out.splitlines()[3]


def test_a_full_disk_and_a_lost_codec_fail(run_main, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    code, out, _ = run_main("--doctor")
    found = rows(out)
    assert code == 2 and found["disk"][0] == found["codec"][0] == "fail"
    assert "pip install zstandard" in found["codec"][1] and "a run takes" in found["disk"][1]


def test_a_compile_cache_that_cannot_be_made_is_named(run_main, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/x"))
    _, out, err = run_main("--doctor")
    found = rows(out)
    assert err == "" and found["attention"][0] == "ok" and found["compile"][0] == "warn"
    assert re.match(
        r"TORCHINDUCTOR_CACHE_DIR=\S+/x cannot be written \(Not a directory\)", found["compile"][1]
    )


def test_an_apple_gpu_is_not_called_a_cpu():
    machine = train_gpt.describe_machine(train_gpt.Runtime(device=torch.device("mps")))
    assert machine["device"].startswith("MPS of ") and "threads" not in machine["device"]
    assert machine["attention"] == "sdpa"


@pytest.mark.parametrize("has_package, name", [(True, "FlashAttention-3"), (False, "sdpa, cuDNN")])
def test_what_attention_runs_on_a_card_is_named(monkeypatch, has_package, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(train_gpt, "has_flash_attention_3", lambda device: has_package)
    runtime = train_gpt.Runtime(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert name in train_gpt.describe_machine(runtime)["attention"]


def test_a_bad_knob_is_one_line(run_main):
    code, out, err = run_main("--doctor", matrix_lr="fast")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "MATRIX_LR" in err
