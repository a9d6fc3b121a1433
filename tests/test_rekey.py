"""Rows of older scripts get today's config hash, one to one; the committed ones have it."""

import json
from pathlib import Path

import pytest

from sweeps.lab import rekey_results
from sweeps.lab.paths import SHIPPED_RESULTS
from sweeps.lab.run_rows import Results, read_lines
from tests.support.lab_rows import write_rows
from train_gpt import Config, asdict, fields

LATER = "z_loss"  # stands for a knob that came after the row: the first definition never saw it
COMMITTED = sorted(SHIPPED_RESULTS.glob("*.jsonl"))


def old_row(name: str, **knobs) -> dict:
    """A row by an older script: its config lacks a later knob, its hash is by the first definition."""
    cfg = Config(**knobs)
    config = json.loads(json.dumps(asdict(cfg)))
    del config[LATER]
    first = rekey_results.first_hash(cfg, config)
    env = {knob.upper(): str(value) for knob, value in knobs.items()}
    return dict(run_id=name, env=env, config_hash=first, code_sha256="ab", config=config, val_bpb=2.5)


def new_row(name: str, **knobs) -> dict:
    """A row by today's script."""
    cfg = Config(**knobs)
    return old_row(name, **knobs) | dict(config_hash=cfg.hash, config=json.loads(json.dumps(asdict(cfg))))


def rekey(folder: Path) -> int:
    return rekey_results.main(["--results", str(folder)])


def test_a_row_gets_todays_hash_and_keeps_its_first(tmp_path, capsys):
    rows = [old_row("a", matrix_lr=0.1, seed=1), old_row("b", matrix_lr=0.1, seed=2), old_row("c")]
    path = write_rows(tmp_path / "wave.jsonl", rows)
    assert rekey(tmp_path) == 0
    after = read_lines(path)
    assert [row["config_hash"] for row in after] == [
        Config(matrix_lr=0.1).hash,
        Config(matrix_lr=0.1).hash,
        Config().hash,
    ]
    for before, row in zip(rows, after, strict=True):
        assert row.pop("config_hash_v1") == before["config_hash"] != row["config_hash"]
        assert row | dict(config_hash=before["config_hash"]) == before
    assert "2 hashes of the first definition, 2 of today's: one to one" in capsys.readouterr().out


def test_a_second_run_changes_nothing(tmp_path, capsys):
    path = write_rows(tmp_path / "wave.jsonl", [old_row("a", matrix_lr=0.1), old_row("b")])
    assert rekey(tmp_path) == 0
    once, when = path.read_bytes(), path.stat().st_mtime_ns
    assert rekey(tmp_path) == 0
    assert path.read_bytes() == once and path.stat().st_mtime_ns == when
    assert "rewrote 0 rows in 0 files" in capsys.readouterr().out


def test_half_a_folder_is_finished(tmp_path):
    """A kill between two files leaves one re-keyed."""
    done, open_file = (write_rows(tmp_path / f"{name}.jsonl", [old_row(name)]) for name in "ab")
    (tmp_path / "apart").mkdir()
    done.rename(tmp_path / "apart" / done.name)
    assert rekey(tmp_path / "apart") == 0
    (tmp_path / "apart" / done.name).rename(done)
    kept = done.read_bytes()
    assert rekey(tmp_path) == 0
    assert done.read_bytes() == kept
    assert read_lines(open_file)[0]["config_hash"] == Config().hash


@pytest.mark.parametrize("kind", ["one becomes two", "two become one"])
def test_a_map_that_is_not_one_to_one_is_refused(tmp_path, capsys, kind):
    first, second = old_row("a", matrix_lr=0.1), old_row("b", matrix_lr=0.1)
    if kind == "one becomes two":
        second = old_row("b", matrix_lr=0.2) | dict(config_hash=first["config_hash"])
    else:
        second["config_hash"] = "0" * 16
    paths = [
        write_rows(tmp_path / "one.jsonl", [first]),
        write_rows(tmp_path / "two.jsonl", [old_row("c"), second]),
    ]
    before = [path.read_bytes() for path in paths]
    assert rekey(tmp_path) == 1
    told = capsys.readouterr().err
    assert "a and b were" in told and "nothing was written" in told
    assert [path.read_bytes() for path in paths] == before


def test_the_proof_holds_for_rows_that_are_rekeyed(tmp_path, capsys):
    path = write_rows(tmp_path / "wave.jsonl", [old_row("a", matrix_lr=0.1), old_row("b")])
    assert rekey(tmp_path) == 0
    write_rows(path, [*read_lines(path), old_row("c", matrix_lr=0.1) | dict(config_hash="0" * 16)])
    assert rekey(tmp_path) == 1
    assert "a and c were two experiments" in capsys.readouterr().err


def test_rows_of_todays_script_stay_and_are_no_clash(tmp_path):
    todays = new_row("b", matrix_lr=0.1)
    path = write_rows(tmp_path / "wave.jsonl", [old_row("a", matrix_lr=0.1), todays])
    assert rekey(tmp_path) == 0
    after = read_lines(path)
    assert after[1] == todays and after[0]["config_hash"] == todays["config_hash"]


def test_rows_without_a_log(tmp_path):
    """A planned run has its env only; a run that crashed at its start has no hash."""
    planned = old_row("planned", matrix_lr=0.1) | dict(config=None)
    crashed = old_row("crashed") | dict(config=None, config_hash=None)
    path = write_rows(tmp_path / "wave.jsonl", [planned, crashed])
    assert rekey(tmp_path) == 0
    after = read_lines(path)
    assert after[0]["config_hash"] == Config(matrix_lr=0.1).hash
    assert after[1] == crashed


def test_a_hash_that_the_first_definition_does_not_give_is_told(tmp_path, capsys):
    odd = old_row("odd", iterations=7) | dict(config_hash="f" * 16)
    write_rows(tmp_path / "wave.jsonl", [old_row("a"), odd])
    assert rekey(tmp_path) == 0
    told = capsys.readouterr().out
    assert "gives 1 of 2 stored hashes again\n  not that of odd\n" in told


UNREADABLE = ['{"run_id": "a", "conf', '{"config_hash": "a", "config": {"gone": 1}}', "3"]


@pytest.mark.parametrize("line", UNREADABLE, ids=["cut", "a knob that is gone", "no row"])
def test_a_row_that_cannot_be_read_is_named(tmp_path, capsys, line):
    path = write_rows(tmp_path / "wave.jsonl", [old_row("a")])
    path.write_text(path.read_text() + line + "\n")
    before = path.read_bytes()
    assert rekey(tmp_path) == 2
    assert f"{path}:2: no config hash" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_file_that_a_wave_writes_is_left_alone(tmp_path, capsys):
    path = write_rows(tmp_path / "wave.jsonl", [old_row("a")])
    engine = Results(tmp_path, "wave")
    assert engine.claim()
    before = path.read_bytes()
    assert rekey(tmp_path) == 2
    assert "a wave is writing to it" in capsys.readouterr().err and path.read_bytes() == before
    engine.lock.close()
    assert rekey(tmp_path) == 0


def test_a_folder_without_results_is_told(tmp_path, capsys):
    assert rekey(tmp_path) == 2
    assert "holds no results" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ what is committed


@pytest.mark.parametrize("path", COMMITTED, ids=[path.stem for path in COMMITTED])
def test_the_committed_results_have_todays_hash(path):
    rows = read_lines(path)
    assert rows
    for row in rows:
        assert Config.from_env(row["env"]).hash == row["config_hash"], row["run_id"]
        one = rekey_results.rekey(row)
        assert not one.is_changed and one.row is row, row["run_id"]


def test_the_committed_hashes_map_one_to_one():
    rows = []
    for path in COMMITTED:
        rows.extend(rekey_results.read_rows(path))
    assert rekey_results.clashes(rows) == []
    assert len({one.first for one in rows} - {None}) > 100


def test_the_first_definition_covers_defaults_and_todays_does_not():
    """A knob more changes each first hash and none of today's; else nothing needed a new key."""
    cfg = Config(matrix_lr=0.1)
    names = [f.name for f in fields(cfg)]
    without = [name for name in names if name != "scalar_lr"]
    assert rekey_results.first_hash(cfg, names) != rekey_results.first_hash(cfg, without)
    assert set(cfg.effective()) == {"MATRIX_LR"}
