"""records/lint.py on folders that somebody has edited by hand: whatever is said twice must be said alike.

Every falsification edits one or two files of a copy of a committed record, of which the linter says nothing
but its spread, and must give the error named, in one line.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from records import lint, lint_folder, lint_log, lint_readme, lint_statements
from tests.conftest import ROOT

RECORD = ROOT / "records" / "2026-11-25_cpu_best"
SEEDS = 7, 42, 1337
QUIET = {"track_unknown", "spread", "score_chosen", "line_ends", "no_source"}  # infos of a sound folder


@pytest.fixture(scope="module", autouse=True)
def reads_each_script_once():
    """What the linter learns of a script hangs on its bytes alone, which are the record's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("syntax_error", "unpack"):
            patch.setattr(lint, name, cache(getattr(lint, name)))
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(RECORD, tmp_path / "record"))


def found_in(folder: Path, **options) -> list[lint.Finding]:
    return [one for one in lint.check_folder(folder, **options) if one.code not in QUIET]


def log_of(folder: Path, seed: int) -> Path:
    return folder / f"train_seed{seed}.log"


def edit(path: Path, old: str, new: str, count: int = -1) -> None:
    """Replace text behind the source of a log, or anywhere in another file."""
    text = path.read_bytes().decode()
    head, rule, rest = text.rpartition("=" * 100)
    assert old in rest, old
    path.write_bytes((head + rule + rest.replace(old, new, count)).encode())


def edit_result(path: Path, **changes) -> None:
    """Change values of a log's RESULT line and nothing else."""
    text = path.read_bytes().decode()
    before, mark, line = text.rpartition("\nRESULT ")
    assert mark
    result = json.loads(line)
    assert changes.keys() <= result.keys()
    path.write_bytes(f"{before}{mark}{json.dumps(result | changes)}\n".encode())


def edit_claim(folder: Path, change: Callable[[dict], object]) -> None:
    """Let a function change the object in submission.json."""
    path = folder / "submission.json"
    claim = json.loads(path.read_bytes())
    change(claim)
    path.write_bytes((json.dumps(claim, indent=2) + "\n").encode())


def swap(one: Path, other: Path) -> None:
    """Each file under the other's name."""
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


# Each falsification: what it does to the folder, and an error that must be found.
FALSIFICATIONS: dict[str, tuple[Callable[[Path], object], str, str]] = {}


def falsification(code: str, says: str):
    """Register a change; `says`: a pattern that one error of that code must match."""

    def keep(change):
        FALSIFICATIONS[change.__name__] = change, code, says
        return change

    return keep


def lower_everything_but_result(folder: Path, shift: float = 0.1) -> None:
    """val_bpb lowered in the final lines and in submission.json; RESULT and val_loss keep the truth."""
    for seed in SEEDS:
        path = log_of(folder, seed)
        result = json.loads(path.read_text().rpartition("\nRESULT ")[2])
        bpb = result["val_bpb"]
        edit(path, f"_exact val_loss:{result['val_loss']:.8f} val_bpb:{bpb:.8f}",
             f"_exact val_loss:{result['val_loss']:.8f} val_bpb:{bpb - shift:.8f}")  # fmt: skip
        edit(path, f"roundtrip val_loss:{result['val_loss']:.4f} val_bpb:{bpb:.4f}",
             f"roundtrip val_loss:{result['val_loss']:.4f} val_bpb:{bpb - shift:.4f}")  # fmt: skip

    def change(claim):
        for row in [claim, *claim["seed_results"].values()]:
            for key in ("val_bpb", "roundtrip_val_bpb"):
                row[key] = round(row[key] - shift, 8)

    edit_claim(folder, change)


@falsification("log_contradicts", r"roundtrip val_bpb is 1\.97\d+ in the line 'final_.*', 2\.07\d+ in RESULT")
def the_score_lowered_but_in_result(folder):
    lower_everything_but_result(folder)


@falsification("loss_and_bpb", r"val_loss 3\.0\d+ and val_bpb 1\.97\d+")
def the_score_lowered_and_no_longer_its_loss(folder):
    lower_everything_but_result(folder)
    for seed in SEEDS:
        bpb = json.loads(log_of(folder, seed).read_text().rpartition("\nRESULT ")[2])["val_bpb"]
        edit_result(log_of(folder, seed), val_bpb=bpb - 0.1, roundtrip_val_bpb=bpb - 0.1)


def copy_seeds(folder: Path, **changes) -> None:
    """The run of seed 1337 as three: logs, packed models, claims; with the edits that a forger thinks of."""
    text = log_of(folder, 1337).read_bytes().decode()
    blob = (folder / "final_model_seed1337.int8.ptz").read_bytes()
    for seed in (7, 42):
        copy = text.replace("\nseed:1337\n", f"\nseed:{seed}\n")
        for old, new in changes.items():
            copy = copy.replace(old.format(seed=1337), new.format(seed=seed))
        log_of(folder, seed).write_bytes(copy.encode())
        (folder / f"final_model_seed{seed}.int8.ptz").write_bytes(blob)

    def change(claim):
        row = claim["seed_results"]["1337"]
        claim["seed_results"] = {str(seed): dict(row) for seed in SEEDS}
        claim["val_bpb_std"] = 0.0
        claim.update({key: value for key, value in row.items() if key in claim})

    edit_claim(folder, change)


@falsification("run_copied", "end with one score in every digit")
def one_run_as_three_seeds(folder):
    copy_seeds(folder)


@falsification("log_contradicts", "seed is 42 in the line 'seed:42', 1337 in RESULT")
def one_run_as_three_seeds_of_which_result_knows_one(folder):
    copy_seeds(folder)


@falsification("artifact_copied", "are one file")
def one_packed_model_as_three(folder):
    copy_seeds(folder)


@falsification("artifact_size", r"final_model_seed7.* has 624602 bytes, the model of train_seed7.log 623284")
def packed_models_swapped(folder):
    swap(folder / "final_model_seed7.int8.ptz", folder / "final_model_seed42.int8.ptz")


@falsification("artifact_hash", "final_model_seed7.* has sha256 [0-9a-f]{16}, submission.json says")
def a_packed_model_of_the_same_size(folder):
    path = folder / "final_model_seed7.int8.ptz"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)


@falsification("artifact_damaged", "its checksum is wrong")
def a_packed_model_with_a_changed_byte_and_its_new_hash(folder):
    a_packed_model_of_the_same_size(folder)
    sha = hashlib.sha256((folder / "final_model_seed7.int8.ptz").read_bytes()).hexdigest()
    edit_claim(folder, lambda claim: claim["seed_results"]["7"].update(artifact_sha256=sha))


@falsification(
    "artifact_head", "was packed with config_hash [0-9a-f]{16}, train_seed7.log says 74a37cae62fed3e3"
)
def a_packed_model_of_another_record(folder):
    name = "final_model_seed7.int8.ptz"
    shutil.copy(RECORD.with_name("2026-11-25_cpu_lower_lr") / name, folder / name)


@falsification("steps_back", "step:150 at 17503 ms comes after step:200 at 23201 ms")
def training_lines_out_of_order(folder):
    text = log_of(folder, 7).read_bytes().decode()
    line = re.search(r"step:150/1000 train.*\n", text)[0]
    text = text.replace(line, "").replace("step:250/1000 train", f"{line}step:250/1000 train")
    log_of(folder, 7).write_bytes(text.encode())


@falsification("log_contradicts", "config_hash is 0123456789abcdef in the line 'run_id:', 74a37cae62fed3e3")
def a_config_hash_that_result_contradicts(folder):
    edit(log_of(folder, 7), "config_hash:74a37cae62fed3e3", "config_hash:0123456789abcdef")


@falsification("log_contradicts", "MATRIX_LR is 0.04 in the line 'run_id:', 0.11 in RESULT")
def an_override_that_result_contradicts(folder):
    edit(log_of(folder, 7), '"MATRIX_LR": 0.11', '"MATRIX_LR": 0.04', 1)


@falsification("claim_differs", "config_hash is 0123456789abcdef in submission.json")
def a_claimed_config_hash(folder):
    edit_claim(folder, lambda claim: claim.update(config_hash="0123456789abcdef"))


@falsification("claim_differs", "^step_stop is 900 in submission.json, the largest of the logs is 1000")
def step_stop_false(folder):
    edit_claim(folder, lambda claim: claim.update(step_stop=900))


@falsification("claim_differs", "^wallclock_seconds is 111.0 in submission.json")
def wallclock_seconds_false(folder):
    edit_claim(folder, lambda claim: claim.update(wallclock_seconds=111.0))


@falsification("claim_differs", "^pre_quant_val_bpb is 2.05240206 in submission.json, the mean")
def pre_quant_val_bpb_false(folder):
    edit_claim(folder, lambda claim: claim.update(pre_quant_val_bpb=2.05240206))


@falsification("claim_differs", "^seed 42: wallclock_seconds is 111.0 in submission.json, 232.17")
def a_number_of_one_seed_false(folder):
    edit_claim(folder, lambda claim: claim["seed_results"]["42"].update(wallclock_seconds=111.0))


@falsification("readme_differs", "p of the test that it is lower is 0.000065, by the logs 0.002065")
def a_wrong_p_in_the_readme(folder):
    edit(folder / "README.md", "p = 0.002065", "p = 0.000065")


@falsification("json_invalid", "NaN is no number of JSON")
def nan_in_json(folder):
    edit(folder / "submission.json", '"eval_seconds": 33.9,', '"eval_seconds": NaN,', 1)


@falsification("text_hidden", r"name of submission.json holds U\+D83D")
def half_a_character_in_the_name(folder):
    edit(folder / "submission.json", '"name": "CPU', '"name": "\\ud83dCPU')


@falsification("text_hidden", r"author of submission.json holds U\+001B")
def an_escape_code_in_the_name(folder):
    edit(folder / "submission.json", "The maintainers", "\\u001b[2JThe maintainers")


@falsification("file_name", r"U\+001B")
def an_escape_code_in_the_name_of_a_file(folder):
    (folder / "notes\x1b[2J.md").write_text("x")


# What else somebody may think of


@falsification(
    "log_contradicts", r"live val_bpb is 2\.0021 in the line 'step:1000/1000', 2\.0720637 in RESULT"
)
def a_last_validation_lowered(folder):
    edit(log_of(folder, 7), "step:1000/1000 val_loss:3.0470 val_bpb:2.0721",
         "step:1000/1000 val_loss:2.9441 val_bpb:2.0021")  # fmt: skip


@falsification("loss_and_bpb", "'step:500' has val_loss 3.5367 and val_bpb 2.3050")
def a_validation_on_the_way_lowered(folder):
    edit(log_of(folder, 7), "val_loss:3.5367 val_bpb:2.4050", "val_loss:3.5367 val_bpb:2.3050")


@falsification("final_lines", "val_loss 3.0471 in 'final_int8_zstd_roundtrip', 3.02707496 in")
def only_the_exact_line_lowered(folder):
    edit(
        log_of(folder, 7),
        "val_loss:3.04707496 val_bpb:2.07210666\n",
        "val_loss:3.02707496 val_bpb:2.05850623\n",
    )


@falsification("run_copied", "the same losses or times at every step")
def a_copied_run_with_other_scores(folder):
    copy_seeds(folder, **{"3.04240513": "3.042{seed}", "2.06893103": "2.068{seed}"})


@falsification("run_copied", "the same losses or times at every step")
def a_copied_run_with_other_losses(folder):
    text = log_of(folder, 7).read_bytes().decode()
    head, rule, rest = text.rpartition("=" * 100)
    rest = re.sub(r"(train_loss:\d\.\d\d)\d\d", r"\g<1>77", rest)
    rest = re.sub(r"roundtrip_exact.*", "roundtrip_exact val_loss:3.04000000 val_bpb:2.06729557", rest)
    log_of(folder, 42).write_bytes((head + rule + rest.replace("\nseed:7\n", "\nseed:42\n")).encode())


@falsification("seed_left_out", "train_seed42.log is of seed 42, which is not among the seeds")
def the_worst_seed_left_out(folder):
    def change(claim):
        del claim["seed_results"]["42"]
        claim["seeds"] = [7, 1337]
        rows = claim["seed_results"].values()
        for key in ("val_bpb", "val_loss", "roundtrip_val_bpb", "roundtrip_val_loss"):
            claim[key] = round(sum(row[key] for row in rows) / 2, 8)
        del claim["val_bpb_std"]

    edit_claim(folder, change)


@falsification(
    "claim_differs", r"^val_bpb is 2.06893103 in submission.json, the mean of the logs is 2\.0724\d{4}$"
)
def the_best_seed_as_the_score(folder):
    edit_claim(folder, lambda claim: claim.update(val_bpb=2.06893103, val_loss=3.04240513))


@falsification("json_key_differs", "val_bpb is given twice, with two values")
def a_score_given_twice(folder):
    edit(folder / "submission.json", '"val_bpb": 2.0724271,', '"val_bpb": 1.9, "val_bpb": 2.0724271,')


@falsification("no_result", "train_seed7.log has no RESULT with a score")
def a_result_taken_out(folder):
    path = log_of(folder, 7)
    path.write_bytes(path.read_bytes().rpartition(b"\nRESULT ")[0] + b"\n")


@falsification("result_twice", "has 2 RESULT lines with a score")
def a_second_result(folder):
    text = log_of(folder, 7).read_text()
    log_of(folder, 7).write_text(text + "RESULT " + text.rpartition("\nRESULT ")[2])


@falsification("claim_differs", "^val_sha256 is 0{64} in submission.json")
def another_text_claimed(folder):
    edit_claim(folder, lambda claim: claim.update(val_sha256="0" * 64))


@falsification("text_varies", "of different validation texts")
def a_log_of_another_text(folder):
    path = log_of(folder, 1337)
    text = path.read_bytes().decode()
    sha = json.loads((folder / "submission.json").read_text())["val_sha256"]
    path.write_bytes(text.replace(sha, "0" * 64).encode())


@falsification("loss_and_bpb", "the text of the line 'val:'")
def more_bytes_of_text(folder):
    edit(log_of(folder, 7), "bytes:768433", "bytes:868433")


@falsification("claim_differs", "^hardware is 8x NVIDIA H100")
def better_hardware(folder):
    edit_claim(folder, lambda claim: claim.update(hardware="8x NVIDIA H100 80GB HBM3"))


@falsification("claim_differs", "^pytorch_version is 2.9.1")
def another_torch(folder):
    edit_claim(folder, lambda claim: claim.update(pytorch_version="2.9.1"))


@falsification("log_contradicts", "train_seconds is 111.659 in the line 'step:1000/1000', 91.659 in RESULT")
def a_faster_run_in_result(folder):
    edit_result(log_of(folder, 7), train_seconds=91.659)


@falsification("step_avg", "step:1000 has train_time 91659 ms and step_avg 111.66 ms")
def a_faster_run_in_the_lines(folder):
    edit(log_of(folder, 7), "train_time:111659ms", "train_time:91659ms")


@falsification("log_contradicts", "RESULT has eval_seconds 4.746, its final lines 14.746")
def a_faster_evaluation_in_result(folder):
    edit_result(log_of(folder, 7), eval_seconds=4.746)


@falsification("log_contradicts", "RESULT has 1024000 tokens, but 500 steps of 1024")
def fewer_steps_in_result(folder):
    edit_result(log_of(folder, 7), steps=500)


@falsification("sum_wrong", "RESULT has 523284 and 157589 bytes, total 780873")
def a_smaller_model_in_result(folder):
    edit_result(log_of(folder, 7), model_bytes=523284)


@falsification("log_contradicts", "model_bytes is 523284 in the line 'Serialized model int8.zstd', 623284")
def a_smaller_model_in_the_lines(folder):
    edit(log_of(folder, 7), "int8+zstd: 623284 bytes", "int8+zstd: 523284 bytes")
    edit(log_of(folder, 7), "int8+zstd: 780873 bytes", "int8+zstd: 680873 bytes")


@falsification("log_contradicts", "packing is int8.zstd in the line .*, int6.zstd in RESULT")
def another_packing_in_result(folder):
    edit_result(log_of(folder, 7), quant="int6")


@falsification("config_varies", "have MATRIX_LR 0.22 and 0.11")
def seeds_of_different_settings(folder):
    edit(log_of(folder, 1337), '"MATRIX_LR": 0.11', '"MATRIX_LR": 0.22')
    edit(log_of(folder, 1337), "matrix_lr:0.11", "matrix_lr:0.22")
    text = log_of(folder, 1337)
    assert '"MATRIX_LR": 0.11' not in text.read_bytes().decode().rpartition("=" * 100)[2]


@falsification(
    "log_contradicts", "setting matrix_lr is 0.22 in the line 'tie_embeddings:', 0.11 in the overrides"
)
def a_setting_in_the_lines(folder):
    edit(log_of(folder, 7), "matrix_lr:0.11", "matrix_lr:0.22")


@falsification("code_hash", "the code_sha256 of train_gpt.py is 0000000000000000 in submission.json")
def another_hash_of_the_code(folder):
    edit_claim(folder, lambda claim: claim.update(code_sha256="0" * 64))


@falsification("std", "val_bpb_std 0.0001")
def a_smaller_spread(folder):
    edit_claim(folder, lambda claim: claim.update(val_bpb_std=0.0001))


@falsification("claim_differs", r"^resumed is \[500\] in submission.json, \[\] in the logs")
def a_kill_that_never_was(folder):
    edit_claim(folder, lambda claim: claim.update(resumed=[500]))


@falsification("result_invalid", "NaN is no number of JSON")
def nan_in_result(folder):
    edit_result(log_of(folder, 7), train_seconds=float("nan"))


@falsification("result_invalid", "gives val_bpb twice, differently")
def result_with_a_score_twice(folder):
    edit(log_of(folder, 7), 'RESULT {"val_loss"', 'RESULT {"val_bpb": 1.9, "val_loss"')


@falsification("readme_differs", r"val_bpb is 1\.97242710, by the logs 2\.07242710")
def another_score_at_the_head_of_the_readme(folder):
    edit(folder / "README.md", "**2.07242710**", "**1.97242710**")


@falsification("readme_differs", "seed 42 has roundtrip val_bpb 2.06624360")
def a_better_seed_in_the_table_of_the_readme(folder):
    edit(folder / "README.md", "2.07624360 | 782,191", "2.06624360 | 782,191")


@falsification("readme_differs", "seed 42 has train s 132.2")
def a_faster_seed_in_the_table_of_the_readme(folder):
    edit(folder / "README.md", "| 42 | 1,000 | 232.2", "| 42 | 1,000 | 132.2")


@falsification("readme_differs", "the sample std of roundtrip val_bpb is 0.00036668")
def a_smaller_spread_in_the_table_of_the_readme(folder):
    edit(folder / "README.md", "| 0.00364221 | 0.00366680 |", "| 0.00364221 | 0.00036668 |")


@falsification("readme_differs", "the distance from the bar is")
def another_bar_in_the_readme(folder):
    edit(folder / "README.md", "from the bar 2.10527085", "from the bar 2.20527085")


@falsification("readme_differs", "MATRIX_LR of the command is 0.22, by the logs 0.11")
def another_command_in_the_readme(folder):
    edit(folder / "README.md", "MATRIX_LR=0.11 HEAD", "MATRIX_LR=0.22 HEAD")


@falsification("readme_differs", "MATRIX_LR of the changes is 0.22, by the logs 0.11")
def another_change_in_the_readme(folder):
    edit(folder / "README.md", "`MATRIX_LR=0.11`", "`MATRIX_LR=0.22`")


@falsification("readme_differs", "the sha256 of train_gpt.py is 0000000000000000")
def another_hash_in_the_readme(folder):
    sha = json.loads((folder / "submission.json").read_text())["code_sha256"]
    edit(folder / "README.md", sha, "0" * 64)


@falsification("readme_differs", "the validation text is 868,433, by the logs 768433")
def more_text_in_the_readme(folder):
    edit(folder / "README.md", "768,433 bytes", "868,433 bytes")


@falsification("readme_differs", "the volume of train_seed42.log is 512,000 in 500")
def less_training_in_the_readme(folder):
    edit(folder / "README.md", "1,024,000 in 1,000 steps, seed 42", "512,000 in 500 steps, seed 42")


@falsification("readme_differs", "the config hash is 0123456789abcdef")
def another_config_hash_in_the_readme(folder):
    edit(folder / "README.md", "Config hash: `74a37cae62fed3e3`", "Config hash: `0123456789abcdef`")


@falsification("readme_differs", "the hardware is 8x NVIDIA H100, by the logs 1x AMD EPYC, 1 threads")
def better_hardware_in_the_readme(folder):
    edit(folder / "README.md", "1x AMD EPYC, 1 threads; python", "8x NVIDIA H100; python")


@falsification("readme_differs", "the packing is int6.zstd, by the logs int8.zstd")
def another_packing_in_the_readme(folder):
    edit(folder / "README.md", "Packing: int8, zstd", "Packing: int6, zstd")


@falsification("readme_differs", "the limit of max_wallclock_seconds is 300, by the logs 600")
def another_limit_in_the_readme(folder):
    edit(folder / "README.md", "1,000 steps or 600 s", "1,000 steps or 300 s")


@falsification("readme_differs", "MATRIX_LR is 0.22, by the logs 0.11")
def another_rate_in_the_readme(folder):
    edit(folder / "README.md", "HEAD_LR=0.008 MATRIX_LR=0.11", "HEAD_LR=0.008 MATRIX_LR=0.22")


@falsification("readme_differs", "torch is 2.9.1, by the logs 2.13.0")
def another_torch_in_the_readme(folder):
    edit(folder / "README.md", "torch 2.13.0+cpu; compute", "torch 2.9.1; compute")


@falsification("readme_differs", "a row of seed 9, of which there is no log")
def a_row_of_no_seed_in_the_readme(folder):
    edit(folder / "README.md", "| 42 | 1,000 |", "| 9 | 1,000 | 1.0 | 1.0 | 2.0 | 2.0 | 7 |\n| 42 | 1,000 |")


@falsification("log_contradicts", "RESULT has status ok, a line before 'error: evaluation took 700 s")
def a_broken_limit_called_ok(folder):
    edit(log_of(folder, 7), "peak memory", "error: evaluation took 700 s, the limit is 600\npeak memory")


@falsification("log_contradicts", "RESULT has truncated false")
def a_truncated_schedule_called_whole(folder):
    warning = "warning: schedule_truncated at progress 0.512: steps too long for the clock"
    edit(log_of(folder, 7), "Serialized model: ", f"{warning}\nSerialized model: ", 1)


@falsification("artifact_head", "was packed with NUM_LAYERS 4, train_seed7.log says 8")
def a_setting_of_the_model_in_every_place_but_the_model(folder):
    for seed in SEEDS:
        edit(log_of(folder, seed), '"NUM_LAYERS": 4', '"NUM_LAYERS": 8')
    edit(folder / "README.md", "NUM_LAYERS=4", "NUM_LAYERS=8")


@pytest.mark.parametrize("name", FALSIFICATIONS)
def test_a_falsification_is_an_error_of_one_line(name, folder):
    change, code, says = FALSIFICATIONS[name]
    change(folder)
    errors = [one for one in lint.check_folder(folder) if one.severity == "error"]
    texts = [one.text for one in errors if one.code == code]
    assert any(re.search(says, text) for text in texts), [f"{one.code}: {one.text}" for one in errors]
    assert all("\n" not in text and len(text) < 300 for text in texts)


def test_copied_seeds_have_no_p(folder):
    copy_seeds(folder)
    found = lint.check_folder(folder, bar=2.2)
    assert not any("by chance" in one.text for one in found)
    assert "no_spread" in [one.code for one in found]


# Sound folders of which the linter says nothing


def one_seed(folder: Path) -> Path:
    """The folder as records/make.py makes it of the run of seed 7 alone."""
    log_of(folder, 7).rename(folder / "train.log")
    (folder / "final_model_seed7.int8.ptz").rename(folder / "final_model.int8.ptz")
    for seed in (42, 1337):
        log_of(folder, seed).unlink()
        (folder / f"final_model_seed{seed}.int8.ptz").unlink()

    def change(claim):
        claim.update(claim.pop("seed_results")["7"], seeds=[7])
        claim["blurb"] = "val_bpb 2.0721 (roundtrip), one seed, after 1,000 steps."
        del claim["val_bpb_std"]

    edit_claim(folder, change)
    (folder / "README.md").write_text(SINGLE_PAGE)
    return folder


SINGLE_PAGE = """# One seed

val_bpb **2.07210666** (score `roundtrip`; one seed).

## Key metrics (from `train.log`)

- Training stopped at step 1,000 of 1,000, progress 1.000 of the schedule
- Before packing: val_bpb:2.07206370
- Roundtrip, from the packed file: val_loss:3.04707496 val_bpb:2.07210666
- Train time: 111.7 s; evaluation: 14.7 s
- Packed model: 623,284 bytes
- Code: 157,589 bytes
- Total: 780,873 bytes
- Parameters: 437,792

## Training volume

- Global batch: 1,024 tokens
- Total tokens trained: 1,024,000 in 1,000 steps
"""


def windows_line_ends(folder: Path) -> Path:
    """The folder as `git clone -c core.autocrlf=true` writes it: every text, no packed model."""
    for path in folder.iterdir():
        if path.suffix != ".ptz":
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return folder


@pytest.mark.parametrize(
    "form", [one_seed, windows_line_ends, lambda folder: windows_line_ends(one_seed(folder))]
)
def test_a_sound_folder_of_another_form_is_not_accused(form, folder):
    assert found_in(form(folder)) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("Training stopped at step 1,000", "Training stopped at step 2,000"),
        ("Before packing: val_bpb:2.07206370", "Before packing: val_bpb:2.02206370"),
        ("val_loss:3.04707496", "val_loss:3.04007496"),
        ("Train time: 111.7", "Train time: 99.7"),
        ("evaluation: 14.7 s", "evaluation: 4.7 s"),
        ("Packed model: 623,284", "Packed model: 523,284"),
        ("Code: 157,589", "Code: 57,589"),
        ("Total: 780,873", "Total: 680,873"),
        ("Parameters: 437,792", "Parameters: 37,792"),
        ("Global batch: 1,024", "Global batch: 2,048"),
        ("1,024,000 in 1,000 steps", "512,000 in 500 steps"),
        ("**2.07210666**", "**2.07110666**"),
    ],
)
def test_a_line_of_the_page_of_one_seed_that_was_changed(folder, old, new):
    one_seed(folder)
    edit(folder / "README.md", old, new)
    assert [one.code for one in found_in(folder)][:1] == ["readme_differs"]


def test_the_blurb_that_make_writes_is_compared(folder):
    one_seed(folder)
    edit(
        folder / "submission.json",
        "val_bpb 2.0721 (roundtrip), one seed",
        "val_bpb 1.9721 (roundtrip), one seed",
    )
    assert [one.code for one in found_in(folder)] == ["blurb_differs"]


def test_a_person_may_write_around_the_page(folder):
    with (folder / "README.md").open("a") as file:
        file.write("\n## Why it works\n\nval_bpb 1.2244 is the official baseline's; p = 0.5 of nothing.\n")
    assert found_in(folder) == []


def test_a_run_that_went_on_elsewhere_is_not_accused(folder):
    """After a kill the machine, the versions and the steps may be others; what was trained may not."""
    path = log_of(folder, 7)
    edit(path, "step:500/1000 train_loss", "resumed: step:450 from runs/x.pt\nstep:500/1000 train_loss")
    edit_result(path, device="Another CPU, 2 threads", torch="2.14.0", resumed=[450])
    edit(folder / "README.md", "1x AMD EPYC, 1 threads; python 3.11.7, torch 2.13.0+cpu",
         "1x Another CPU, 2 threads; 1x AMD EPYC, 1 threads; python 3.11.7, torch 2.14.0")  # fmt: skip

    def change(claim):
        claim["hardware"] = "1x Another CPU, 2 threads; 1x AMD EPYC, 1 threads"
        claim.update(resumed=[450])

    edit_claim(folder, change)
    assert found_in(folder) == []


def test_the_text_behind_bpb_is_the_middle_score_of_those_with_many_digits():
    """One wrong score of three does not move it; short ones count where there are not three others."""

    def ratio(*scores: tuple[str, str]) -> float:
        log = lint_log.Log("x.log", "")
        listed = [lint_log.Score("final", Decimal(loss), Decimal(bpb), 0.0) for loss, bpb in scores]
        return lint_statements.text_ratio(log, listed)[0]

    full = [("2.000000", "1.000000"), ("3.000000", "1.000000"), ("2.200000", "1.100000")]
    assert ratio(*full, ("9.0", "1.0"), ("9.0", "1.0"), ("9.0", "1.0")) == 2.0
    assert ratio(*full[:2], ("9.0", "1.0"), ("9.0", "1.0"), ("9.0", "1.0")) == 9.0
    assert ratio() == 1.0


def test_before_packing_is_the_average_where_a_log_has_one():
    def pre_quant(*labels: str) -> Decimal:
        others = [lint_log.Score(label, Decimal(2), Decimal(1), 0.0) for label in labels]
        log = lint_log.Log("x.log", "", others=others)
        log.say("live val_bpb", Decimal("1.25"), "RESULT", 8)
        log.say("averaged val_bpb", Decimal("1.75"), "RESULT", 8)
        return lint_statements.truth_of(log, "pre_quant_val_bpb", "roundtrip").value

    assert pre_quant("live", "averaged") == Decimal("1.75")
    assert pre_quant("live") == pre_quant() == Decimal("1.25")


@pytest.mark.parametrize("claim, is_sound", [
    ("1.21", True), ("1.215", True), ("1.2200", True), ("1.2201", True), ("1.2099", True),
    ("1.2202", False), ("1.2098", False),
])  # fmt: skip
def test_a_score_before_packing_lies_between_those_of_the_logs(tmp_path, claim, is_sound):
    logs = [lint_log.Log("a.log", ""), lint_log.Log("b.log", "")]
    for log, bpb in zip(logs, ("1.2200", "1.2100"), strict=True):
        line = lint_log.StepLine(9, 9, f"val_loss:2.0400 val_bpb:{bpb} ", 900, Decimal(100))
        log.steps.append(line)
    folder = lint_folder.Folder(tmp_path)
    lint_statements.check_official_keys(folder, {"pre_quant_val_bpb": Decimal(claim)}, logs)
    assert [found.code for found in folder.findings] == ["claim_differs"] * (not is_sound)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("said, is_sound", [("1234abcd", True), ("1234abce", False)])
def test_the_config_hash_of_a_page_is_that_of_the_first_log(tmp_path, seeds, said, is_sound):
    log = lint_log.Log("a.log", "")
    log.say("config_hash", "1234abcd", "the line 'run_id:'")
    folder = lint_folder.Folder(tmp_path)
    logs = [log, lint_log.Log("b.log", "")][:seeds]
    lint_readme.check_page(folder, f"# A\n\n- Config hash: `{said}`\n", logs, [])
    assert [found.code for found in folder.findings] == ["readme_differs"] * (not is_sound)


@pytest.mark.parametrize(("both_ours", "severity"), [(True, "error"), (False, "warn")])
def test_a_spread_is_an_error_only_where_each_log_is_ours(both_ours, severity):
    """A log of another script may say what its author took for the spread."""
    found = []
    folder = SimpleNamespace(add=lambda *finding: found.append(finding))
    logs = [
        SimpleNamespace(seed=None, is_ours=ours, final=SimpleNamespace(bpb=Decimal(bpb)))
        for ours, bpb in ((True, "1.20"), (both_ours, "1.30"))
    ]
    lint.check_seed_results(folder, {"val_bpb_std": Decimal("0.5")}, logs)
    assert [finding[:2] for finding in found] == [(severity, "std")]
