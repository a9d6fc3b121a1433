"""The comparison of two versions of the script finds a changed number, and only that."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import golden

SCRIPT = golden.ROOT / "train_gpt.py"
ONE = "lr_tidal"  # the shortest of the configurations


def compare(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(golden.ROOT / "tests" / "golden.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=golden.ROOT, capture_output=True, text=True, timeout=240)


def changed_copy(folder: Path, before: str, after: str) -> Path:
    """The script with one text replaced."""
    source = SCRIPT.read_text(encoding="utf-8")
    assert source.count(before) == 1
    path = folder / "changed.py"
    path.write_text(source.replace(before, after), encoding="utf-8")
    return path


def test_a_version_equals_itself_when_both_are_run_afresh():
    run = compare(".", SCRIPT, "--only", ONE, "--fresh")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(f"{ONE}: equal\n1 of 1 configurations are equal; 2 were run")


def test_a_changed_number_is_found_with_its_step_and_both_values(tmp_path):
    changed = changed_copy(tmp_path, "3.4445", "3.4446")  # the first coefficient of Newton-Schulz
    run = compare(".", changed, "--only", ONE, "--fresh")
    assert run.returncode == 1, run.stdout + run.stderr
    values = r"([\d.]+) in OLD, ([\d.]+) in NEW"
    told = re.match(
        rf"{ONE}: DIFFERS at step \d+ train_loss: {values}; rank 0, .* Adam #\d+ \w+: ", run.stdout
    )
    assert told, run.stdout
    assert 0 < abs(float(told[1]) - float(told[2])) < 0.01


def test_a_version_that_fails_is_no_equal_even_of_itself(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text("raise SystemExit(9)\n", encoding="utf-8")
    run = compare(tmp_path, script, "--only", ONE, "--fresh")
    assert run.returncode == 1
    assert "exit codes: [9] in both, not 0" in run.stdout


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((".",), "two versions are needed"),
        ((".", "no-such-revision"), "no-such-revision is no script, no folder"),
        ((".", ".", "--only", "lr_tidal,lr_lunar"), "lr_lunar is no configuration"),
    ],
)
def test_bad_use_is_said_in_a_line(arguments, told):
    run = compare(*arguments)
    assert run.returncode == 2
    assert told in run.stderr.splitlines()[-1]


def part_found(**changed) -> dict:
    """What a run left behind, in short."""
    artifact = dict(tensors=["w"], numbers_sha256="n", header_sha256="h", file_sha256="f")
    found = {
        "exit codes": [0],
        "last words": [[]],
        "step": [dict(step=1, train_loss=5.5), dict(step=2, train_loss=0.1 + 0.2)],
        "RESULT": dict(val_bpb=1.25, overrides=dict(SEED=7)),
        "log": ["seed:7", "step:1/2"],
        "final_model.int8.ptz": artifact,
    }
    return found | {name.replace("_", " "): value for name, value in changed.items()}


def other_artifact(**changed) -> dict:
    return part_found() | {
        "final_model.int8.ptz": part_found()["final_model.int8.ptz"] | dict(file_sha256="g") | changed
    }


@pytest.mark.parametrize(
    "new, told",
    [
        (part_found(), ""),
        (part_found(RESULT=dict(version="1.0", val_bpb=1.25, overrides=dict(SEED=7))), ""),
        (part_found(log=["sha256:00", "seed:7", "step:1/2"]), ""),
        (part_found(log=["seed:7", "warning: slow", "step:1/2"]), "log: 'warning: slow' only in NEW"),
        (part_found(log=["step:1/2", "seed:7"]), "log: 'step:1/2' in OLD, '(end)' in NEW"),
        (part_found(RESULT=dict(val_bpb=1.25)), "RESULT overrides: {'SEED': 7} is missing in NEW"),
        (part_found(RESULT=dict(val_bpb=1.25, overrides=dict(SEED=7.0))), "RESULT overrides SEED: 7 in OLD"),
        (
            part_found(step=[dict(step=1, train_loss=5.5), dict(step=2, train_loss=0.3)]),
            "step 2 train_loss: 0.30000000000000004 in OLD, 0.3 in NEW",
        ),
        (part_found(step=[dict(step=1, train_loss=5.5)]), "step: 2 in OLD, 1 in NEW"),
        (part_found(exit_codes=[5]), "exit codes: [0] in OLD, [5] in NEW"),
        (other_artifact(), "final_model.int8.ptz file_sha256: 'f' in OLD, 'g' in NEW"),
        (other_artifact(header_sha256="i"), ""),
        (other_artifact(header_sha256="i", numbers_sha256="m"), "final_model.int8.ptz numbers_sha256: 'n'"),
        (other_artifact(header_sha256="i", tensors=["v"]), "final_model.int8.ptz tensors #1: 'w' in OLD"),
    ],
)
def test_what_counts_as_a_difference(new, told):
    found, _remarks = golden.compare_part(part_found(), new, expect=0)
    assert found.startswith(told) and bool(found) == bool(told)


def test_times_and_sizes_of_code_are_left_out_and_nothing_else():
    head = "source\n" + "=" * 100 + "\nRunning Python 3\n" + "=" * 100 + "\n"
    lines = [
        "run_id:golden config_hash:0a1b overrides:{\"B\": 1, \"A\": 2}",
        "step:1/20 val_loss:5.7713 val_bpb:5.5821 train_time:12ms step_avg:12.34ms",
        "forecast: steps:20 step_ms:15,20 micro_batch_tokens:512 epochs:0.77 bytes:197101",
        "packed mlp: tensors:6 bytes:20345 error:0.00021",
        "Code size: 158914 bytes",
    ]  # fmt: skip
    assert golden.log_lines(head + "\n".join(lines)) == [
        'run_id:golden config_hash:* overrides:{"A": 2, "B": 1}',
        "step:1/20 val_loss:5.7713 val_bpb:5.5821 train_time:* step_avg:*",
        "forecast: steps:20 step_ms:* micro_batch_tokens:512 epochs:0.77 bytes:*",
        "packed mlp: tensors:6 bytes:* error:0.00021",
    ]


def test_a_command_is_compared_without_its_folder_and_script():
    old, new, other = (
        golden.without_excluded(
            dict(command=f"cd /tmp/golden-{name} && SEED={seed} /{name}/python {name}.py")
        )
        for name, seed in (("a", 1), ("b", 1), ("b", 2))
    )
    assert old == new != other
