"""records/lint.py: a good folder passes, each defect gives its own finding, and nothing makes it crash."""

import base64
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from records import lint, lint_folder, lint_log, lint_readme, lint_statements
from records.pack_script import pack
from records.significance import against_bar
from records.unpack_script import shown_in_log
from tests.conftest import ROOT
from tests.test_lint_statements import FALSIFICATIONS

SCRIPT = '"""A script."""\nimport sys\n\nsys.exit("the linter ran me")\n'
RULE = "=" * 100
LOSSES = {1: "2.06012347", 2: "2.06098761", 3: "2.06054323"}
MEAN = dict(val_loss=2.06055144, val_bpb=1.22055144)
MODEL = 15_000_000
TOTAL = MODEL + len(SCRIPT)


def bpb(loss: str) -> str:
    """The toy's text has a fixed number of bytes a token; 8 decimals."""
    return f"{float(loss) * MEAN['val_bpb'] / MEAN['val_loss']:.8f}"


def roundtrip(loss: str) -> str:
    """The loss of the other score, without a sliding window."""
    return f"{float(loss) + 0.0159:.8f}"


def log_text(seed: int, source: str = SCRIPT, loss: str = "") -> str:
    """An official log; `loss`: of its last exact line."""
    loss = loss or LOSSES[seed]
    other = roundtrip(loss)
    code = len(SCRIPT)
    return f"""{source}
{RULE}
Running Python 3.12.3
Running PyTorch 2.9.1
{RULE}
world_size:8 grad_accum_steps:1
seed:{seed}
step:0/20000 val_loss:6.9357 val_bpb:4.1083 train_time:0ms step_avg:0.02ms
step:9000/20000 val_loss:2.0400 val_bpb:1.2084 train_time:599900ms step_avg:66.66ms
stopping_early: wallclock_cap train_time:599900ms step:9000/20000
Serialized model: 67224983 bytes
Code size: {code} bytes
Total submission size: {67224983 + code} bytes
Serialized model int8+zlib: {MODEL} bytes (payload:17178912 payload_ratio:3.91x)
Total submission size int8+zlib: {TOTAL} bytes
final_int8_zlib_roundtrip val_loss:{float(other):.4f} val_bpb:{float(bpb(other)):.4f} eval_time:1284ms
final_int8_zlib_roundtrip_exact val_loss:{other} val_bpb:{bpb(other)}
final_sliding_window val_loss:{float(loss):.4f} val_bpb:{float(bpb(loss)):.4f} stride:64 eval_time:70000ms
final_sliding_window_exact val_loss:{loss} val_bpb:{bpb(loss)}
"""


def record_text(**changes) -> str:
    """submission.json; a change to None leaves the key out. A number as text keeps its digits."""
    entries = {
        str(seed): dict(val_loss=float(loss), val_bpb=float(bpb(loss)), artifact_bytes=TOTAL)
        for seed, loss in LOSSES.items()
    }
    about = dict(author="A", github_id="a", name="Toy", blurb="A toy.", date="2026-01-02T03:04:05Z")
    about |= dict(track="10min_16mb", **MEAN)
    about |= dict(bytes_total=TOTAL, bytes_code=len(SCRIPT), seeds=[1, 2, 3], seed_results=entries)
    return json.dumps({key: value for key, value in (about | changes).items() if value is not None}, indent=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    return good(tmp_path / "track_10min_16mb" / "2026-01-02_toy")


def good(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "README.md").write_text("# Toy\n\nval_bpb 1.2206, mean of three.\n")
    (path / "train_gpt.py").write_text(SCRIPT)
    (path / "submission.json").write_text(record_text())
    for seed in LOSSES:
        (path / f"train_seed{seed}.log").write_text(log_text(seed))
    return path


def codes(path: Path, **options) -> list[tuple[str, str]]:
    return [(found.severity, found.code) for found in lint.check_folder(path, **options)]


def test_a_good_folder_has_only_its_spread(folder):
    assert codes(folder) == [("info", "spread")]


@pytest.mark.parametrize("clock, seconds", [(240.0, 240.0), (0.0, 9999.0), (9999.0, 700.0)])
def test_a_run_within_its_own_clock_passes(folder, clock, seconds):
    """Without a clock, MAX_WALLCLOCK_SECONDS=0, any time is."""
    (path, *_) = sorted(folder.glob("*.log"))
    told = dict(status="ok", train_seconds=seconds, overrides=dict(MAX_WALLCLOCK_SECONDS=clock))
    with path.open("a") as file:
        file.write(f"RESULT {json.dumps(told)}\n")
    assert not [code for _, code in codes(folder) if code == "own_clock"]


def test_a_folder_with_one_log_is_judged_by_its_last_exact_line(folder):
    for seed in (2, 3):
        (folder / f"train_seed{seed}.log").unlink()
    (folder / "train_seed1.log").rename(folder / "train.log")
    exact = dict(val_loss=float(LOSSES[1]), val_bpb=float(bpb(LOSSES[1])), seeds=None, seed_results=None)
    (folder / "submission.json").write_text(record_text(**exact))
    assert codes(folder) == [("warn", "readme_score"), ("warn", "few_seeds")]
    exact["val_loss"] += 1e-8  # one unit of the last decimal is another number
    (folder / "submission.json").write_text(record_text(**exact))
    assert codes(folder)[0] == ("error", "score_differs")


# Each defect: what it does to the good folder, and all that is found then besides the spread.
DEFECTS = {}


def defect(*expected: str):
    def keep(change):
        DEFECTS[change.__name__] = change, sorted(expected)
        return change

    return keep


def edit(path: Path, old: str, new: str, count: int = -1) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, count))


def each_log(folder: Path):
    return sorted(folder.glob("train_seed*.log"))


def rewrite(folder: Path, **changes) -> None:
    (folder / "submission.json").write_text(record_text(**changes))


@defect("error no_json")
def no_submission_json(folder):
    (folder / "submission.json").unlink()


@defect("warn json_name")
def submission_of_another_name(folder):
    (folder / "submission.json").rename(folder / "submission_toy.json")


@defect("error json_invalid")
def broken_json(folder):
    edit(folder / "submission.json", "}", "", 1)


@defect("error json_invalid")
def a_list_for_an_object(folder):
    (folder / "submission.json").write_text("[1, 2]")


@defect("warn json_key_twice")
def a_key_twice(folder):
    edit(folder / "submission.json", '"author": "A",', '"author": "A", "author": "A",')


@defect("error key_missing", "warn key_missing")
def keys_left_out(folder):
    rewrite(folder, github_id=None, blurb="")


@defect("error key_type", "error key_type")
def keys_of_another_type(folder):
    rewrite(folder, author=["A"], bytes_code="60")


@defect("error json_invalid")
def a_score_that_is_no_number(folder):
    rewrite(folder, val_bpb=float("nan"))


@defect("error key_value", "error code_bytes_differ")
def half_a_byte(folder):
    rewrite(folder, bytes_code=59.5)


@defect("error json_key_differs")
def a_key_with_two_values(folder):
    edit(folder / "submission.json", '"author": "A",', '"author": "A", "author": "B",')


@defect("warn readme_seed")
def a_table_of_other_scores(folder):
    with (folder / "README.md").open("a") as file:
        file.write("\n| Seed | Sliding BPB | steps |\n|---|---|---|\n")
        file.write(f"| 1 | **{float(bpb(LOSSES[1])):.5f}** | 9,000 |\n| 2 | 1.2108 | 9,000 |\n")


@defect("error step_avg")
def a_step_average_of_another_clock(folder):
    edit(each_log(folder)[0], "step_avg:66.66ms", "step_avg:43.54ms")


@defect("error final_lines", "error loss_and_bpb", "error seed_result")
def an_exact_line_of_another_score(folder):
    edit(each_log(folder)[0], f" val_bpb:{bpb(LOSSES[1])}\n", " val_bpb:1.12029794\n")


@defect("warn loss_and_bpb")
def a_validation_of_another_text(folder):
    edit(each_log(folder)[0], "val_loss:2.0400 val_bpb:1.2084", "val_loss:2.0400 val_bpb:1.2050")


@defect("error run_copied", "error run_copied", "error run_copied", "warn std")
def one_run_as_three(folder):
    """Only the seed differs, in the name of the log and in it."""
    for path in each_log(folder):
        path.write_text(log_text(int(path.stem[-1]), loss=LOSSES[1]))
    entries = {seed: dict(val_loss=float(LOSSES[1]), val_bpb=float(bpb(LOSSES[1]))) for seed in "123"}
    rewrite(folder, val_loss=float(LOSSES[1]), val_bpb=float(bpb(LOSSES[1])), seed_results=entries,
            val_bpb_std=0.0004)  # fmt: skip
    (folder / "README.md").write_text("val_bpb 1.2203")


@defect("error claim_differs", "error claim_differs", "error claim_differs")
def official_keys_that_the_logs_contradict(folder):
    rewrite(folder, step_stop=9500, wallclock_seconds=480.5, pre_quant_val_bpb=1.1984)


@defect("error text_varies")
def a_log_of_another_validation_text(folder):
    for tokens, path in zip((62021632, 62021632, 31010816), each_log(folder), strict=True):
        edit(path, "seed:", f"val_loader:shards pattern=data/*_val_*.bin tokens:{tokens}\nseed:", 1)


@defect("error artifact_size", "error artifact_size")
def artifacts_of_each_other(folder):
    """Each has the size of the other seed's model."""
    for seed, size in ((1, MODEL), (2, MODEL + 10), (3, MODEL)):
        path = folder / f"train_seed{seed}.log"
        edit(path, f"zlib: {TOTAL} ", f"zlib: {size + len(SCRIPT)} ")
        edit(path, f"zlib: {MODEL} ", f"zlib: {size} ")
    rewrite(folder, bytes_total=TOTAL + 10, seed_results=None)
    for seed, size in ((1, MODEL + 10), (2, MODEL)):
        with (folder / f"final_model_seed{seed}.int8.ptz").open("wb") as file:
            file.truncate(size)


@defect("error artifact_copied")
def one_artifact_of_two_seeds(folder):
    for seed in (1, 2):
        (folder / f"final_model_seed{seed}.int8.ptz").write_bytes(b"")
        with (folder / f"final_model_seed{seed}.int8.ptz").open("wb") as file:
            file.truncate(MODEL)


@defect("warn date")
def a_date_of_no_format(folder):
    rewrite(folder, date="last Tuesday")


@defect("error no_readme")
def no_readme(folder):
    (folder / "README.md").unlink()


@defect("warn readme_score")
def a_readme_of_another_run(folder):
    (folder / "README.md").write_text("val_bpb 1.2154")


@defect("error no_script")
def no_script(folder):
    (folder / "train_gpt.py").unlink()


@defect("warn script_name")
def script_of_another_name(folder):
    (folder / "train_gpt.py").rename(folder / "train_toy.py")


@defect("error script_empty")
def an_empty_script(folder):
    (folder / "train_gpt.py").write_text("")


@defect("error script_syntax")
def a_script_with_an_error(folder):
    bad = SCRIPT.replace("sys.exit(", "sys.exit[")
    (folder / "train_gpt.py").write_text(bad)
    for path in each_log(folder):
        edit(path, SCRIPT, bad)


@defect("error no_log")
def no_logs(folder):
    for path in each_log(folder):
        path.unlink()


@defect("error no_score", "error no_score", "error no_score")
def logs_that_end_before_the_score(folder):
    for path in each_log(folder):
        path.write_text(path.read_text().partition("final_")[0])


@defect("error source_differs", "error code_varies")
def another_script_than_the_logs(folder):
    edit(folder / "train_gpt.py", "ran me", "RAN ME")
    for path in each_log(folder)[1:]:
        edit(path, "ran me", "RAN ME")
    edit(each_log(folder)[0], "ran me", "ran Me")


@defect("error code_size", "error source_differs", "error source_differs", "error source_differs")
def a_longer_script_than_the_logs(folder):
    edit(folder / "train_gpt.py", "ran me", "ran me again")


@defect("error code_size", *["info no_source"] * 3)
def a_longer_script_than_logs_without_source(folder):
    strip_sources(folder)
    edit(folder / "train_gpt.py", "ran me", "ran me again")


def strip_sources(folder: Path) -> None:
    for path in each_log(folder):
        edit(path, SCRIPT, "W0322 torch/distributed/run.py:803]\n")


@defect(*["info no_source"] * 3)
def logs_without_the_source(folder):
    strip_sources(folder)


@defect("error log_source_size", "error source_differs", "error code_varies")
def a_source_put_into_a_log_later(folder):
    edit(each_log(folder)[0], "ran me", "ran me, which it should not have done")


@defect("warn other_script", "error code_varies")
def a_log_of_the_other_script(folder):
    (folder / "train_other.py").write_text(SCRIPT.replace("ran me", "RAN ME"))
    edit(each_log(folder)[0], "ran me", "RAN ME")


@defect("info several_runs")
def a_log_of_two_runs(folder):
    path = each_log(folder)[0]
    path.write_text(log_text(7, loss="2.50000000") + path.read_text())


@defect("error bytes_differ", *["error over_cap", "error seed_bytes"] * 3)
def a_log_over_the_cap(folder):
    for path in each_log(folder):
        edit(path, f"zlib: {TOTAL} ", "zlib: 16000001 ")
        edit(path, f"zlib: {MODEL} ", f"zlib: {16_000_001 - len(SCRIPT)} ")


@defect("error over_cap", "error bytes_differ")
def a_total_over_the_cap(folder):
    rewrite(folder, bytes_total=16_000_001)


@defect("error sum_wrong")
def a_sum_that_is_wrong(folder):
    edit(each_log(folder)[0], f"zlib: {MODEL} ", f"zlib: {MODEL - 1} ")


@defect("error bytes_differ")
def another_total(folder):
    rewrite(folder, bytes_total=TOTAL - 1)


@defect("warn bytes_rounded")
def a_rounded_total(folder):
    rewrite(folder, bytes_total=15_010_000)


@defect("error code_bytes_differ")
def another_code_size(folder):
    rewrite(folder, bytes_code=len(SCRIPT) + 1)


@defect("error artifact_size")
def another_artifact(folder):
    (folder / "final_model.int8.ptz").write_bytes(b"x" * 1000)


@defect("error artifact_size", "error over_cap")
def an_artifact_over_the_cap(folder):
    with (folder / "final_model.int8.ptz").open("wb") as file:
        file.truncate(lint.SIZE_LIMIT)


def counted(folder: Path, model: int, code: str) -> None:
    """Logs with a model close to the cap and other code sizes, without the source."""
    strip_sources(folder)
    total = model + 20
    for path in each_log(folder):
        edit(path, f"zlib: {TOTAL} ", f"zlib: {total} ")
        edit(path, f"zlib: {MODEL} ", f"zlib: {model} ")
        edit(path, f"Code size: {len(SCRIPT)} bytes", code)
    rewrite(folder, bytes_total=total, seed_results=None)


@defect("warn over_cap_unpacked", *["info no_source"] * 3)
def code_that_was_counted_compressed(folder):
    counted(
        folder, 15_999_970, f"Code size (uncompressed): {len(SCRIPT)} bytes\nCode size (compressed): 20 bytes"
    )


@defect("error over_cap_shipped", "error code_size", *["info no_source"] * 3)
def more_code_than_was_counted(folder):
    counted(folder, 15_999_970, "Code size: 20 bytes")


def train_for(path: Path, ms: int) -> None:
    """A log of a run of so many milliseconds."""
    edit(path, "599900ms", f"{ms}ms")
    edit(path, "step_avg:66.66ms", f"step_avg:{ms / 9000:.2f}ms")


@defect("error train_time")
def training_of_eleven_minutes(folder):
    train_for(each_log(folder)[0], 660_000)


@defect("info train_overshoot")
def a_last_step_over_the_limit(folder):
    train_for(each_log(folder)[0], 600_038)


@defect("error eval_time")
def an_evaluation_of_eleven_minutes(folder):
    edit(each_log(folder)[0], "70000ms", "660000ms")


@defect("error eval_time")
def an_evaluation_that_only_the_json_tells(folder):
    rewrite(folder, eval_time_seconds=695.6)


@defect("warn eval_time_sum")
def evaluations_of_eleven_minutes_in_all(folder):
    edit(each_log(folder)[0], "70000ms", "599000ms")
    edit(each_log(folder)[0], "eval_time:1284ms", "eval_time:61000ms")


@defect("error run_failed")
def a_run_that_failed(folder):
    with each_log(folder)[0].open("a") as file:
        file.write('RESULT {"status": "over_eval_time", "exit_code": 4}\n')


@defect("error own_clock")
def a_run_that_passed_its_own_clock_and_calls_itself_ok(folder):
    with each_log(folder)[0].open("a") as file:
        overrides = '{"MAX_WALLCLOCK_SECONDS": 240.0}'
        file.write(f'RESULT {{"status": "ok", "train_seconds": 245.003, "overrides": {overrides}}}\n')


@defect("error own_clock")
def a_run_that_passed_the_default_clock_and_calls_itself_ok(folder):
    with each_log(folder)[0].open("a") as file:
        file.write('RESULT {"status": "ok", "train_seconds": 600.4, "overrides": {}}\n')


@defect("error seed_name", "error seed_without_log", "warn few_seeds", "warn seed_twice")
def a_log_of_another_seed(folder):
    edit(each_log(folder)[2], "seed:3", "seed:2")


@defect("error seed_twice", "error seed_without_log", "warn few_seeds")
def logs_of_one_seed(folder):
    for path in each_log(folder):
        edit(path, f"seed:{path.stem[-1]}\n", "seed:1\n")
        path.rename(path.with_name(f"run{path.stem[-1]}.log"))


@defect("error seed_without_log", "warn few_seeds", *["error score_differs"] * 2)
def a_seed_without_a_log(folder):
    each_log(folder)[2].unlink()


@defect("info same_log")
def the_same_log_twice(folder):
    shutil.copy(each_log(folder)[0], folder / "train.log")


@defect("info logs_below")
def logs_of_a_side_experiment(folder):
    (folder / "ablation").mkdir()
    (folder / "ablation" / "run.log").write_text(log_text(7, loss="2.30000000"))


@defect("warn best_seed")
def the_best_seed(folder):
    rewrite(folder, val_bpb=float(bpb(LOSSES[1])), val_loss=float(LOSSES[1]))
    (folder / "README.md").write_text("val_bpb 1.2203")


@defect("info score_rounded")
def a_rounded_score(folder):
    rewrite(folder, val_bpb=1.22055)


@defect("info mean_rounded")
def a_mean_of_rounded_scores(folder):
    rewrite(folder, val_bpb=1.22057)


@defect("error score_differs")
def another_score(folder):
    rewrite(folder, val_loss=2.06065144)


@defect("warn other_score")
def the_score_of_another_line(folder):
    rewrite(folder, val_loss=float(roundtrip(LOSSES[1])))


@defect("info score_chosen", "info score_chosen", "info score_chosen")
def another_score_that_is_named(folder):
    entries = {}
    for seed, loss in LOSSES.items():
        other = roundtrip(loss)
        entries[str(seed)] = dict(val_loss=float(other), val_bpb=float(bpb(other)), artifact_bytes=TOTAL)
    means = {}
    for key in ("val_loss", "val_bpb"):
        means[key] = round(sum(entry[key] for entry in entries.values()) / 3, 8)
    rewrite(folder, **means, seed_results=entries, score="roundtrip")
    (folder / "README.md").write_text(f"val_bpb {means['val_bpb']:.4f}")


@defect("error seed_result")
def another_score_of_a_seed(folder):
    entries = json.loads(record_text())["seed_results"]
    entries["2"]["val_bpb"] += 0.001
    rewrite(folder, seed_results=entries)


@defect("error seed_bytes")
def another_size_of_a_seed(folder):
    entries = json.loads(record_text())["seed_results"]
    entries["2"]["artifact_bytes"] = MODEL
    rewrite(folder, seed_results=entries)


@defect("warn std")
def another_spread(folder):
    rewrite(folder, val_bpb_std=0.0009)


@defect("info gain")
def a_bar_in_the_readme(folder):
    edit(folder / "README.md", "three.", "three. SOTA (PR #1) was 1.2300.")


@defect("warn gain_not_shown")
def a_bar_in_the_readme_that_is_not_beaten(folder):
    edit(folder / "README.md", "three.", "three. SOTA (PR #1) was 1.2240.")


@defect("info track_unknown")
def a_folder_of_no_track(folder):
    rewrite(folder, track=None)
    folder.parent.rename(folder.parent.with_name("elsewhere"))
    return folder.parent.with_name("elsewhere") / folder.name


@defect("warn not_a_file", "warn not_a_file")
def links_and_pipes(folder):
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.log")


@defect("warn unreadable")
def a_log_that_is_no_gzip_file(folder):
    (folder / "more.log.gz").write_bytes(b"not gzip")


@defect("warn many_files")
def thousands_of_files(folder):
    (folder / "many").mkdir()
    for number in range(lint_folder.FILE_LIMIT + 1):
        (folder / "many" / f"{number}.dat").touch()


@defect("warn too_deep")
def a_deep_folder(folder):
    (folder / "/".join("d" * 30)).mkdir(parents=True)


@defect("warn too_long")
def an_endless_log(folder):
    with (folder / "endless.log").open("wb") as file:
        file.truncate(lint_folder.READ_LIMIT + 5)


LONG = SCRIPT + "# A comment, which packing takes out again.\n" * 100


def ship(folder: Path, script: bytes) -> None:
    """The folder as the runs of another script would have left it."""
    (folder / "train_gpt.py").write_bytes(script)
    for path in each_log(folder):
        edit(path, SCRIPT, shown_in_log(script))
        edit(path, f"Code size: {len(SCRIPT)} bytes", f"Code size: {len(script)} bytes")
        edit(path, f"{67224983 + len(SCRIPT)}", f"{67224983 + len(script)}")
        edit(path, str(TOTAL), str(MODEL + len(script)))
    edit(folder / "submission.json", str(TOTAL), str(MODEL + len(script)))
    edit(folder / "submission.json", f'"bytes_code": {len(SCRIPT)}', f'"bytes_code": {len(script)}')


@defect("info packed")
def a_packed_script_and_its_source(folder):
    (folder / "train_gpt_readable.py").write_text(LONG)
    ship(folder, pack(LONG.encode()))


@defect("info packed", "warn no_readable")
def a_packed_script_without_its_source(folder):
    ship(folder, pack(LONG.encode()))


@defect("info packed", "error readable_differs")
def a_packed_script_and_another_source(folder):
    (folder / "train_gpt_readable.py").write_text(LONG + "# and another\n")
    ship(folder, pack(LONG.encode()))


@defect("info packed", "warn packed_syntax")
def a_script_that_extracts_what_does_not_compile(folder):
    blob = base64.b85encode(lzma.compress(b"def f(:\n")).decode()
    ship(folder, f'import lzma,base64\nexec(lzma.decompress(base64.b85decode("{blob}")))\n'.encode())


@defect("info packed_unread")
def a_script_that_runs_what_cannot_be_read(folder):
    ship(folder, b"import marshal\nexec(marshal.loads(b''))\n")


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_gives_its_finding(name, folder):
    change, expected = DEFECTS[name]
    path = change(folder) or folder
    found = [" ".join(pair) for pair in codes(path)]
    assert sorted(code for code in found if code != "info spread") == DEFECTS[name][1], expected


def test_every_finding_has_a_defect():
    modules = lint, lint_folder, lint_log, lint_readme, lint_statements
    source = "".join(Path(module.__file__).read_text() for module in modules)
    calls = set(re.findall(r'(?:"(?:error|warn|info)"|add\(\s*severity), "(\w+)"', source)) - {"warn", "info"}
    known = {code.split()[1] for _, expected in DEFECTS.values() for code in expected} | {"spread"}
    known |= {code for _, code, _ in FALSIFICATIONS.values()}  # those of our own logs
    elsewhere = {"line_ends", "blurb_differs", "artifact_unread", "no_spread"}  # test_lint_statements.py
    assert calls == known | elsewhere and len(known) > 60


def test_other_tracks_have_no_clock_and_no_bar(folder):
    train_for(each_log(folder)[0], 14_400_000)
    edit(folder / "README.md", "three.", "three. SOTA was 1.2250.")
    assert ("error", "train_time") in codes(folder)
    free = folder.parent.with_name("track_non_record_16mb")
    folder.parent.rename(free)
    assert codes(free / folder.name) == [("info", "spread")]


def test_a_study_is_judged_by_the_logs_of_its_score(folder):
    """Other logs of a folder outside the record track may come from other scripts and seeds."""
    free = folder.parent.with_name("track_non_record_16mb")
    folder.parent.rename(free)
    path = free / folder.name / "variant.log"
    path.write_text(log_text(1, SCRIPT.replace("ran me", "RAN ME"), loss="2.5"))
    assert codes(free / folder.name) == [("info", "spread")]
    exact = dict(val_loss=float(LOSSES[1]), val_bpb=float(bpb(LOSSES[1])), seed_results=None)
    rewrite(free / folder.name, **exact)  # one of the seeds claimed
    assert codes(free / folder.name) == [("warn", "readme_score")]


def test_a_mean_of_several_lines_is_found(folder):
    """A failed evaluation comes last in one log: the score is the mean of the line all have."""
    with each_log(folder)[0].open("a") as file:
        file.write("final_ttt_exact val_loss:3.07421378 val_bpb:1.82098636\n")
    found = codes(folder)
    assert set(found) == {("warn", "other_score"), ("info", "spread")}
    spread = next(found.text for found in lint.check_folder(folder) if found.code == "spread")
    assert "1.22055144" in spread


@pytest.mark.parametrize("form", ["gz", "bz2", "xz", "crlf", "utf-16", "stamps", "preamble", "config"])
def test_logs_of_other_forms_say_the_same(folder, form):
    """Packed, from Windows, with times before the lines, after torchrun's or the setting's lines."""
    for path in each_log(folder):
        text = path.read_text()
        if form in ("gz", "bz2", "xz"):
            path.unlink()
            with lint_folder.OPENERS[f".{form}"](f"{path}.{form}", "wb") as file:
                file.write(text.encode())
        elif form == "crlf":
            path.write_bytes(text.replace("\n", "\r\n").encode())
        elif form == "utf-16":
            path.write_bytes(text.encode("utf-16"))
        elif form == "stamps":
            head, run = text.split(f"{RULE}\nworld", 1)
            lines = f"world{run}".splitlines()
            path.write_text(f"{head}{RULE}\n" + "".join(f"1776142348.094 {line}\n" for line in lines))
        elif form == "preamble":
            path.write_text("W0322 torch/distributed/run.py:803]\n" + text)
        else:
            path.write_text(f"{RULE}\nHyperparameters:\n  seed: 7\n{RULE}\nSource code:\n{RULE}\n{text}")
    assert codes(folder) == [("info", "spread")]


@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 30), st.integers(1, 40))
def test_the_tail_of_students_t_is_scipys(t, df):
    assert lint.t_tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-6, abs=1e-12)


def test_the_gain_is_that_of_the_statistics(folder):
    """The p of the linter, without scipy, is that of records/significance.py."""
    found = next(f for f in lint.check_folder(folder, bar=1.2260) if f.code in ("gain", "gain_not_shown"))
    losses = [float(loss) for loss in LOSSES.values()]
    nats = MEAN["val_loss"] / MEAN["val_bpb"]  # of a bpb
    p = against_bar(losses, sum(losses) / 3 + (1.2260 - MEAN["val_bpb"]) * nats, lint.GAIN).p
    assert f"{p:.2g}" == re.search(r"by chance: (\S+)$", found.text)[1] and 0.001 < p < 0.05


# Nothing makes it crash

NAMES = st.sampled_from(
    ["README.md", "submission.json", "train_gpt.py", "train_x.py", "train.log", "train_seed1.log", "run.out"]
    + ["log.gz", "train.log.gz", "train.log.xz", "final_model.int8.ptz", "logs/train0.txt", "a/b/c.log"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([*lint.OFFICIAL, "track", "seeds", "seed_results", "val_bpb_std", "base_val_bpb", "1"])
RECORDS = st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=4), max_size=9).map(json.dumps)
ODD = """RESULT {}
RESULT {"status": [1]}
RESULT {
seed:99999999999999999999
train_time:9e9ms
import os
final_exact val_loss:1.0 val_bpb:0.0
val_loss:nan val_bpb:inf
step:1/2 val_loss:1.5 val_bpb:1.5
1/2 val_loss: 1.5 val_bpb: 1.5
diagnostic val_loss:1.25 val_bpb:1.25 eval_time:9ms
Code size (uncompressed): 9 bytes
Code size: ,,, bytes
Serialized model x: 0 bytes
budget:1/16000000"""
PARTS = [*log_text(1).splitlines(), *ODD.splitlines(), "x" * 1000, "\0", ""]
LOGS = st.lists(st.sampled_from(PARTS), max_size=25).map("\n".join)
CONTENTS = st.one_of(
    st.binary(max_size=80), *(text.map(str.encode) for text in (RECORDS, LOGS, JSON.map(json.dumps)))
)
FILES = st.dictionaries(NAMES, CONTENTS, max_size=6)


@settings(max_examples=120, deadline=None)
@given(
    files=FILES,
    track=st.sampled_from(["track_10min_16mb", "track_non_record_16mb", "x"]),
    bar=st.sampled_from([0.0, 1.2]),
)
def test_no_folder_makes_it_crash(files, track, bar, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / track / "record"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    check_all_is_printable(lint.check_folder(folder, bar))


def check_all_is_printable(found):
    assert found == sorted(found, key=lambda one: lint.ORDER.index(one.severity))
    for one in found:
        assert one.text.isprintable() and re.fullmatch(r"\w+", one.code), one


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2500), st.binary(max_size=4)), min_size=1, max_size=6), st.data())
def test_no_damage_to_a_good_folder_makes_it_crash(patches, data):
    with tempfile.TemporaryDirectory() as place:
        folder = good(Path(place) / "track_10min_16mb" / "toy")
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = bytearray(path.read_bytes())
        for at, patch in patches:
            content[at : at + len(patch)] = patch
        path.write_bytes(content)
        check_all_is_printable(lint.check_folder(folder))


@pytest.mark.parametrize(
    "source",
    ["-" * 100_000 + "1", "a" + ".a" * 100_000, "(" * 5000, "9" * 6000, "a\0", "x = '\ud800'", "if 1:\n" * 9],
    ids=range(7),
)
def test_no_script_makes_it_crash(source, folder):
    (folder / "train_gpt.py").write_bytes(source.encode("utf-8", "surrogatepass"))
    assert ("error", "script_syntax") in codes(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "9" * 5000,
        '{"val_bpb": 1e999999999999}',
        '{"val_bpb": 1e99999}',
        '{"a": NaN}',
        "",
        "null",
        "\ud800",
    ],
    ids=range(8),
)
def test_no_json_makes_it_crash(text, folder):
    (folder / "submission.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert {"json_invalid", "key_missing"} & {code for _, code in codes(folder)}


def test_scores_of_zero_do_not_make_it_crash(folder):
    for path in each_log(folder):
        edit(path, f"val_bpb:{bpb(LOSSES[int(path.stem[-1])])}\n", "val_bpb:0.00000000\n")
    assert ("error", "seed_result") in codes(folder, bar=1.2)


def test_the_published_counts_are_those_of_the_list():
    published = json.loads((ROOT / "records" / "benchmarks" / "lint_public.json").read_text())
    listed = [found for folder in published["findings"].values() for found in folder]
    counts = published["findings_by_code"].values()
    assert len(listed) == sum(c["findings"] for c in counts if c["severity"] != "info")
    assert published["checked"]["folders"] == len(published["findings"])
    broken = [
        folder for folder in published["findings"].values() if any(f.startswith("error") for f in folder)
    ]
    assert published["folders_with_errors"] == len(broken)


def test_what_cannot_be_read_is_said(folder, monkeypatch):
    (folder / os.fsdecode(b"\xff\n.log")).write_text(log_text(9, loss="2.9"))
    (folder / "gone").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("gone"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = lint.check_folder(folder)
    check_all_is_printable(found)
    assert ("warn", "unreadable") in [(one.severity, one.code) for one in found]


def test_nothing_is_executed_and_nothing_written(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "statistics.py").write_text("raise SystemExit('imported')")
    run = subprocess.run(
        [sys.executable, str(ROOT / "records" / "lint.py"), "."], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0 and "linter ran me" not in run.stdout + run.stderr
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path in before}
    assert len(list(folder.iterdir())) == len(before) + 1


def test_the_command_line(folder, capsys, monkeypatch):
    def main(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lint.py", *map(str, arguments)])
        try:
            return lint.main(), capsys.readouterr().out
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err

    assert main(folder) == (
        0,
        f"info  spread            {spread_text(folder)}\n{folder}: 0 errors, 0 warnings, 1 infos\n",
    )
    (folder / "README.md").unlink()
    code, out = main("--json", folder, folder)
    objects = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and len(objects) == 2 and objects[0] == objects[1]
    assert (objects[0]["error"], objects[0]["findings"][0]["code"]) == (1, "no_readme")
    assert main()[0] == 2 and main(folder / "missing")[0] == 2 and main(folder / "train_gpt.py")[0] == 2
    assert main("--bar", "x", folder)[0] == 2


def spread_text(folder: Path) -> str:
    return next(found.text for found in lint.check_folder(folder) if found.code == "spread")


@pytest.mark.parametrize("size, is_cut", [(99, False), (100, False), (101, True), (500, True)])
def test_of_a_long_file_the_start_is_read_and_that_is_said(tmp_path, monkeypatch, size, is_cut):
    monkeypatch.setattr(lint_folder, "READ_LIMIT", 100)
    (tmp_path / "x.txt").write_bytes(bytes(range(250)) * 2)
    os.truncate(tmp_path / "x.txt", size)
    folder = lint_folder.Folder(tmp_path)
    before = folder.left
    assert folder.read("x.txt") == (bytes(range(250)) * 2)[: min(size, 100)]
    assert [finding.code for finding in folder.findings] == ["too_long"] * is_cut
    assert folder.left == before - min(size, 100)


@pytest.mark.parametrize("line_end", [0, 3])
@pytest.mark.parametrize("more, is_counted", [(-1, False), (0, True), (8, True), (9, False)])
def test_code_bytes_are_those_of_the_source_up_to_eight(line_end, more, is_counted):
    """With either kind of line ends; what a log's head adds to the source is a few bytes."""
    source = "é = 1\n" + "b = 2\n" * 20
    size = 7 + 20 * 6 + (21 if line_end else 0)
    assert lint.is_counted(source, size + more) is is_counted


@pytest.mark.parametrize(
    "one, other, agree",
    [
        (("1.25", 2), ("1.3", 1), True), (("1.25", 2), ("1.2", 1), True), (("1.245", 3), ("1.3", 1), False),
        (("1.36", 2), ("1.3", 1), False), (("1.355", 3), ("1.3", 1), False), (("1.3", 1), ("1.4", 1), False),
        (("12", 0), ("12.5", 1), True), (("12", 0), ("12.6", 1), False),
    ],
)  # fmt: skip
def test_two_numbers_agree_if_both_can_be_roundings_of_one(one, other, agree):
    first, second = (lint_log.Statement(Decimal(value), digits, "here") for value, digits in (one, other))
    assert first.agrees_with(second) is second.agrees_with(first) is agree


@pytest.mark.parametrize("off, code", [("0.000002", "mean_rounded"), ("0.0000002", "score_differs")])
def test_a_mean_may_be_rounded_twice_but_not_in_its_seventh_digit(folder, off, code):
    """1.220553 is what six digits of rounded seeds may give; with seven digits it is another number."""
    rounded = round(Decimal(str(MEAN["val_bpb"])), -Decimal(off).as_tuple().exponent)
    rewrite(folder, val_bpb=float(rounded + Decimal(off)))
    found = [name for severity, name in codes(folder) if name in ("mean_rounded", "score_differs")]
    assert found == [code]


def test_a_setting_of_the_command_may_hold_an_equals_sign():
    told = []

    def differs(*words: str) -> None:
        told.append(words)

    log = lint_log.Log("x.log", "", overrides={"INIT_FROM": "b=c.pt"})
    page = "## Command\n\n```bash\nINIT_FROM=b=c.pt python train_gpt.py\n```\n"
    lint_readme.check_command(page, log, differs)
    assert told == []
    lint_readme.check_command(page.replace("b=c", "b=d"), log, differs)
    assert told == [("INIT_FROM of the command", "b=d.pt", "b=c.pt")]


@pytest.mark.parametrize("said, is_said", [("1.22058", True), ("1.2206", True), ("1.2205", True),
                                           ("1.2204", False), ("1.2207", False), ("1.22057", True),
                                           ("1.22060", False)])  # fmt: skip
def test_a_page_may_round_a_score_or_cut_it(said, is_said):
    log = lint_log.Log("x.log", "", finals=[lint_log.Score("final", Decimal(2), Decimal("1.22058"), 0.0)])
    assert lint_readme.says_score(log, Decimal(said)) is is_said


@pytest.mark.parametrize("seconds, agree", [("1.234", True), ("1.280", True), ("1.284", True),
                                            ("1.300", False), ("1.180", False)])  # fmt: skip
def test_the_seconds_of_result_may_be_a_twentieth_off_the_last_step_line(seconds, agree):
    """What a run does between its last step's line and RESULT is counted too."""
    log = lint_log.Log("x.log", "")
    log.steps.append(lint_log.StepLine(5, 5, "train_loss:3.1 ", 1234, Decimal("246.8")))
    lint_log.state_last_step(log)
    log.say("train_seconds", Decimal(seconds), "RESULT", 3)
    line, result = log.said["train_seconds"]
    assert line.agrees_with(result) is agree
