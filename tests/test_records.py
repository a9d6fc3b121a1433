"""Record folders made of real tiny runs: what is in them, what is refused, and that they score again."""

import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest

from records import finished, lint, make, rescore
from tests.conftest import ROOT, env_of, write_shard

SEEDS = 1, 2, 3
ABOUT = "--name", "A toy", "--author", "A. Person", "--github-id", "aperson", "--track", "cpu_toy"
NUMBER = r"-?\d+\.\d{8}"


STOP = """
real = train_gpt.report_step
def report(run, stream, before, plan, *rest):
    real(run, stream, before, plan, *rest)
    if plan.step == 3:
        die(15)
train_gpt.report_step = report
"""


@pytest.fixture(scope="module")
def train(fork_server, dataset):
    """train(folder, seed, ...) -> exit code of a run toy-SEED in the folder's runs/toy-SEED."""

    def run(folder, seed, patch="", **knobs):
        place = dict(seed=seed, run_id=f"toy-{seed}", out_dir=folder / f"runs/toy-{seed}")
        scores = dict(eval_stride=16, use_hedge=True, iterations=6, swa_enabled=True, swa_every=1)
        (folder / "scratch").mkdir(exist_ok=True)
        env = env_of(dataset, **place, **scores, **knobs)
        return fork_server.run(folder / "scratch", env, patch=patch)[0]

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train):
    """A folder with runs/toy-1, runs/toy-2, runs/toy-3: three seeds of one experiment."""
    folder = tmp_path_factory.mktemp("runs")
    assert [train(folder, seed) for seed in SEEDS] == [0, 0, 0]
    return folder


@pytest.fixture
def own(runs, tmp_path, monkeypatch):
    """The same in a folder that a test may spoil, as the current directory."""
    shutil.copytree(runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(runs):
    """(record of one seed, record of three seeds), with packed models."""
    folders = [runs / "made" / name for name in ("one", "three")]
    for folder, seeds in zip(folders, (SEEDS[:1], SEEDS), strict=True):
        where = [runs / "runs" / f"toy-{seed}" for seed in seeds]
        options = ["--out", folder, "--artifact", "--runs", *where]
        assert make.main([*(f"toy-{s}" for s in seeds), *ABOUT, *map(str, options)]) == 0
    return folders


@pytest.fixture
def record(made, tmp_path):
    """copy(0 or 1) -> a copy of a made record that a test may spoil."""
    return lambda which: shutil.copytree(made[which], tmp_path / "record")


def events_of(runs, seed):
    lines = (runs / f"runs/toy-{seed}/logs/toy-{seed}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def claim_of(folder):
    return json.loads((folder / "submission.json").read_text())


def refusal(capsys, program, *arguments):
    """The one line a tool refuses with; exit code 2."""
    assert finished.guarded(program.main, list(map(str, arguments))) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


# -- what a folder holds --


def test_a_folder_of_one_seed(made, runs):
    log = (runs / "runs/toy-1/logs/toy-1.txt").read_bytes()
    assert {path.name for path in made[0].iterdir()} == {
        "README.md", "train_gpt.py", "train.log", "submission.json", "final_model.int8.ptz"
    }  # fmt: skip
    assert (made[0] / "train.log").read_bytes() == log
    assert (made[0] / "final_model.int8.ptz").stat().st_size == claim_of(made[0])["bytes_model_int8_zstd"]


@pytest.mark.parametrize("which", [0, 1])
def test_the_script_is_the_one_that_ran(made, runs, which):
    script = (made[which] / "train_gpt.py").read_bytes()
    sha = next(event for event in events_of(runs, 1) if event["event"] == "config")["code_sha256"]
    assert script == (ROOT / "train_gpt.py").read_bytes()
    assert hashlib.sha256(script).hexdigest() == sha == claim_of(made[which])["code_sha256"]


def test_the_claim_of_one_seed_is_the_logs(made, runs):
    claim, log = claim_of(made[0]), (made[0] / "train.log").read_text()
    official = ["author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "bytes_total"]
    assert [key for key in claim if key in official] == official
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", claim["date"])
    final = {
        "": r"^final_hedge_mixer_exact",
        "roundtrip_": r"^final_int8_zstd_roundtrip_exact",
        "sliding_": r"^final_sliding_window_exact",
        "hedge_": r"^final_hedge_mixer_exact",
    }
    for prefix, line in final.items():
        loss, bpb = re.search(rf"{line} val_loss:({NUMBER}) val_bpb:({NUMBER})$", log, re.M).groups()
        shown = f"{claim[f'{prefix}val_loss']:.8f}", f"{claim[f'{prefix}val_bpb']:.8f}"
        assert shown == (loss, bpb)
    averaged = next(event for event in events_of(runs, 1) if event["event"] == "average")
    assert claim["pre_quant_val_bpb"] == round(averaged["val_bpb"], 8)
    assert f"Total submission size int8+zstd: {claim['bytes_total']} bytes" in log
    assert f"Code size: {claim['bytes_code']} bytes" in log and claim["step_stop"] == 6
    assert claim["seeds"] == [1] and claim["score"] == "hedge" and claim["resumed"] == []


def test_the_claim_of_three_seeds_is_their_mean(made, runs):
    claim = claim_of(made[1])
    assert claim["seeds"] == list(SEEDS) and list(claim["seed_results"]) == ["1", "2", "3"]
    for name in ("roundtrip", "sliding", "hedge"):
        told = [next(e for e in events_of(runs, s)[::-1] if e.get("name") == name) for s in SEEDS]
        for key in ("val_loss", "val_bpb"):
            values = [round(event[key], 8) for event in told]
            assert [row[f"{name}_{key}"] for row in claim["seed_results"].values()] == values
            assert claim[f"{name}_{key}"] == round(statistics.mean(values), 8)
    bpb = [row["val_bpb"] for row in claim["seed_results"].values()]
    assert claim["val_bpb_std"] == round(statistics.stdev(bpb), 8)
    assert claim["bytes_total"] == max(row["bytes_total"] for row in claim["seed_results"].values())


def test_the_table_of_three_seeds(made):
    claim, page = claim_of(made[1]), (made[1] / "README.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    head, _, *rows = lines
    for name in ("pre_quant", "roundtrip", "sliding", "hedge"):
        *values, mean, spread = (float(row[head.index(f"{name} val_bpb")].strip("| ")) for row in rows)
        assert values == [row[f"{name}_val_bpb"] for row in claim["seed_results"].values()]
        assert [mean, spread] == [round(f(values), 8) for f in (statistics.mean, statistics.stdev)]
    assert [row[0] for row in rows] == ["1", "2", "3", "mean", "sample std"]


@pytest.mark.parametrize("which", [0, 1])
def test_the_page_says_what_was_run_and_that_it_was_a_cpu(made, which):
    page, claim = (made[which] / "README.md").read_text(), claim_of(made[which])
    assert "CPU-scale" in page and "No leaderboard claim is made" in page
    assert "- `ITERATIONS=6` (20000)" in page and "- `USE_HEDGE=1` (0)" in page
    assert f"{claim['val_bpb']:.8f}" in page and "6 steps" in page
    assert "cut off" not in page and "t-test" not in page
    included = re.findall(r"^- `([\w.]+)` - ", page.partition("## Included files")[2], re.M)
    assert set(included) == {path.name for path in made[which].iterdir()}
    heads = ["Summary", "Changes from baseline", "Configuration", "Command", "Key metrics", "Training volume"]
    assert re.findall(r"^## ([\w ]+\w)", page, re.M)[:6] == heads


def test_the_command_of_the_page_is_the_run(made):
    page = (made[0] / "README.md").read_text()
    block = re.search(r"```bash\n(.*?)```", page, re.S)[1].replace("\\\n", " ").split()
    script = make.import_script((made[0] / "train_gpt.py").read_bytes(), made[0])
    cfg = script.Config.from_env(dict(word.split("=", 1) for word in block if "=" in word))
    assert cfg.hash == claim_of(made[0])["config_hash"] and cfg.seed == 1
    assert cfg.data_path.startswith("./data/datasets/")


@pytest.mark.parametrize("which", [0, 1])
def test_the_linter_finds_no_error(made, which):
    findings = lint.check_folder(made[which], 0.0)
    assert {finding.code for finding in findings if finding.severity == "error"} == set()


def test_no_path_of_the_machine_on_the_page(made, dataset):
    for folder in made:
        for name in ("README.md", "submission.json"):
            assert str(dataset.parent) not in (folder / name).read_text()


def test_another_score_can_be_the_one_that_counts(own, capsys):
    assert make.main(["toy-1", *ABOUT, "--out", "x", "--score", "sliding"]) == 0
    claim = claim_of(own / "x")
    assert claim["val_bpb"] == claim["sliding_val_bpb"] != claim["hedge_val_bpb"]
    found = lint.check_folder(own / "x")
    assert [f.code for f in found if f.severity != "info"] == [] and "score_chosen" in [f.code for f in found]
    (own / "x" / "submission.json").write_text(json.dumps(claim | dict(val_bpb=claim["hedge_val_bpb"])))
    assert "other_score" in [f.code for f in lint.check_folder(own / "x") if f.severity == "warn"]
    assert "ttt" in refusal(capsys, make, "toy-1", *ABOUT, "--out", "y", "--score", "ttt")


def test_a_blurb_and_the_default_name(own, monkeypatch):
    monkeypatch.setattr(make, "__file__", str(own / "records" / "make.py"))
    assert make.main(["toy-1", *ABOUT, "--blurb", "Half the steps, twice the fun."]) == 0
    (folder,) = (own / "records").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_a_toy", folder.name)
    assert claim_of(folder)["blurb"] == "Half the steps, twice the fun."
    assert "Half the steps, twice the fun." in (folder / "README.md").read_text()
    assert not list(folder.glob("*.ptz"))


def test_a_test_against_a_bar(own):
    stats = pytest.importorskip("scipy.stats")
    assert make.main(["toy-1", "toy-2", "toy-3", *ABOUT, "--out", "x", "--bar", "4.5"]) == 0
    values = [row["val_bpb"] for row in claim_of(own / "x")["seed_results"].values()]
    page, claim = (own / "x" / "README.md").read_text(), claim_of(own / "x")
    for bar in (4.5, 4.5 - 0.005 * claim["val_bpb"] / claim["val_loss"]):
        test = stats.ttest_1samp(values, bar, alternative="less")
        assert f"t(2) = {test.statistic:.4f}, p = {test.pvalue:.6f}" in page
    assert f"{statistics.mean(values) - 4.5:+.8f} bpb" in page


def test_without_scipy_a_bar_is_refused(own, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "records.significance", None)
    said = refusal(capsys, make, "toy-1", "toy-2", *ABOUT, "--out", "x", "--bar", "4.5")
    assert "requirements-lab.txt" in said and not (own / "x").exists()


def test_a_resumed_run_is_said_to_be_one(own, train, capsys):
    assert train(own, 4, STOP) == 75
    command = "toy-4", *ABOUT, "--out", "x"
    assert "ended as preempted" in refusal(capsys, make, *command)
    assert train(own, 4, resume="auto") == 0
    assert make.main(command) == 0
    page, claim = (own / "x" / "README.md").read_text(), claim_of(own / "x")
    assert "seed 4 was cut off and went on from step 4." in page and claim["resumed"] == [4]
    assert claim["step_stop"] == 6 and "RESUME" not in page.partition("## Command")[2].partition("##")[0]


CARDS = [("H100", 599.9, True), ("A100", 599.9, False), ("H100", 900.0, False)]


@pytest.mark.parametrize("card, seconds, claims", CARDS)
def test_the_page_of_a_run_on_gpus(own, card, seconds, claims):
    gpus = dict(world_size=8, device=f"NVIDIA {card} 80GB HBM3", train_seconds=seconds)
    edit(own, 1, result=lambda result: result.update(gpus))
    assert make.main(["toy-1", *ABOUT, "--out", "x"]) == 0
    page = (own / "x" / "README.md").read_text()
    assert "CPU" not in page and f"8x NVIDIA {card} 80GB HBM3;" in page
    assert ("no claim is made on that track" not in page) == claims
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in page


def test_a_log_that_went_on_elsewhere(own):
    """A run that goes on under another RUN_ID says so before the source."""
    path = own / "runs/toy-1/logs/toy-1.txt"
    path.write_bytes(b"resumed: step:2 from checkpoints/toy-0-00000002.pt\n" + path.read_bytes())
    assert make.main(["toy-1", *ABOUT, "--out", "x"]) == 0
    assert (own / "x" / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()


# -- what is refused --


def edit(own, seed, event=None, change=None, result=None, text=None):
    """Change the events of a kind, the RESULT or the .txt log of a run; False of change() drops one."""
    log = own / f"runs/toy-{seed}/logs/toy-{seed}.txt"
    if event:
        events = events_of(own, seed)
        kept = [e for e in events if e["event"] != event or change(e) is not False]
        log.with_suffix(".jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
    if result:
        head, _, line = log.read_text().rpartition("\nRESULT ")
        told = json.loads(line)
        result(told)
        log.write_text(f"{head}\nRESULT {json.dumps(told)}\n")
    if text:
        log.write_bytes(text(log.read_bytes()))


SPOILED = {
    "unfinished": (dict(event="end", change=lambda e: False), "not finished"),
    "over_size": (dict(event="end", change=lambda e: e.update(status="over_size")), "ended as over_size"),
    "over_time": (dict(event="end", change=lambda e: e.update(status="over_train_time")), "over_train_time"),
    "overrun": (
        dict(event="config", change=lambda e: e["config"].update(max_wallclock_seconds=1e-3)),
        "s, its cap was 0.001",
    ),
    "crashed": (dict(event="end", change=lambda e: e.update(status="crashed")), "ended as crashed"),
    "truncated": (dict(event="end", change=lambda e: e.update(truncated=True)), "of its schedule"),
    "partial": (dict(event="score", change=lambda e: e.update(left=7)), "7 tokens have no roundtrip score"),
    "eval only": (dict(event="artifact", change=lambda e: False), "trained nothing"),
    "no config": (dict(event="config", change=lambda e: False), "no config event"),
    "other sha": (dict(event="config", change=lambda e: e.update(code_sha256="0" * 64)), "has sha256"),
    "other code": (dict(text=lambda log: log.replace(b"small GPT", b"large GPT", 1)), "sha256"),
    "other score": (dict(event="score", change=lambda e: e.update(val_bpb=1.0)), "roundtrip_val_bpb is 1.0"),
    "other RESULT": (dict(result=lambda r: r.update(sliding_val_bpb=1.0)), "in the RESULT"),
    "other line": (dict(text=lambda log: re.sub(rb"(trip_exact.*bpb:)\d", rb"\g<1>0", log)), "final line"),
    "other run": (dict(result=lambda r: r.update(run_id="toy-9")), "the log of toy-9"),
    "no RESULT": (dict(text=lambda log: log.replace(b"\nRESULT", b"\nR")), "no RESULT line"),
    "cut RESULT": (dict(text=lambda log: log[:-20]), "not JSON"),
    "no seed": (dict(result=lambda r: r.pop("seed")), "RESULT has no seed"),
    "no bpb": (dict(event="score", change=lambda e: e.pop("val_bpb")), "an event has no 'val_bpb'"),
    "no source": (dict(text=lambda log: b"hello\n"), "no RESULT line"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_run_that_is_not_whole_is_refused(own, capsys, case):
    how, what = SPOILED[case]
    edit(own, 1, **how)
    said = refusal(capsys, make, "toy-1", *ABOUT, "--out", "new/x")
    assert what in said and "toy-1" in said
    assert [path.name for path in own.iterdir()] == ["runs"]


def test_runs_of_different_code_are_refused(own, capsys):
    log = own / "runs/toy-2/logs/toy-2.txt"
    source = (ROOT / "train_gpt.py").read_bytes()
    other = source.replace(b"Train a small GPT", b"Train a large GPT", 1)
    log.write_bytes(log.read_bytes().replace(source, other))
    sha = hashlib.sha256(other).hexdigest()
    edit(own, 2, "config", lambda e: e.update(code_sha256=sha))
    said = refusal(capsys, make, "toy-1", "toy-2", *ABOUT, "--out", "x")
    assert "different code" in said and sha[:12] in said and not (own / "x").exists()


def test_runs_of_different_configs_are_refused(own, capsys):
    edit(own, 2, "config", lambda e: e.update(config_hash="0" * 16), lambda r: r.update(config_hash="0" * 16))
    said = refusal(capsys, make, "toy-1", "toy-2", *ABOUT, "--out", "x")
    assert "different config" in said and "toy-2" in said and not (own / "x").exists()


@pytest.mark.parametrize(
    "how, what",
    [
        (dict(result=lambda r: r.update(val_sha256="0" * 64)), "different validation text"),
        (dict(text=lambda log: log.replace(b"train_shards:2", b"train_shards:1")), "different training data"),
    ],
)
def test_runs_on_different_data_are_refused(own, capsys, how, what):
    edit(own, 2, **how)
    assert what in refusal(capsys, make, "toy-1", "toy-2", *ABOUT, "--out", "x")


def test_one_seed_twice_is_refused(own, capsys):
    assert "SEED=1" in refusal(capsys, make, "toy-1", "toy-2", "toy-1", *ABOUT, "--out", "x")
    edit(own, 2, "config", lambda e: e["config"].update(seed=1))
    said = refusal(capsys, make, "toy-1", "toy-2", *ABOUT, "--out", "x")
    assert "toy-1 and toy-2 both have SEED=1" in said


def test_missing_files_are_refused(own, capsys):
    command = "toy-1", *ABOUT, "--out", "x"
    (own / "runs/toy-1/final_model.int8.ptz").rename(own / "moved")
    assert "final_model.int8.ptz is missing" in refusal(capsys, make, *command, "--artifact")
    shutil.copy(own / "runs/toy-2/final_model.int8.ptz", own / "runs/toy-1")
    assert "not the model of toy-1" in refusal(capsys, make, *command, "--artifact")
    (own / "runs/toy-1/final_model.int8.ptz").write_bytes(b"no model")
    assert "put back the file" in refusal(capsys, make, *command, "--artifact")
    (own / "runs/toy-1/logs/toy-1.txt").unlink()
    assert "toy-1.txt is missing" in refusal(capsys, make, *command)
    (own / "runs/toy-1/logs/toy-1.jsonl").unlink()
    assert "--runs" in refusal(capsys, make, *command) and not (own / "x").exists()
    shutil.copytree(own / "runs/toy-2", own / "runs/again")
    assert "is there twice" in refusal(capsys, make, "toy-2", *ABOUT, "--out", "x")


def test_bad_arguments_are_refused(own, capsys):
    assert "--name" in refusal(capsys, make, "toy-1", *ABOUT, "--name", " ")
    assert "required" in refusal(capsys, make, "toy-1")
    assert "several seeds" in refusal(capsys, make, "toy-1", *ABOUT, "--out", "x", "--bar", "1")
    assert "--bar" in refusal(capsys, make, "toy-1", "toy-2", *ABOUT, "--out", "x", "--bar", "nan")
    assert [path.name for path in own.iterdir()] == ["runs"]


def test_a_folder_that_exists_is_left_alone(own, capsys):
    (own / "x").mkdir()
    assert "is there already" in refusal(capsys, make, "toy-1", *ABOUT, "--out", "x")
    assert not list((own / "x").iterdir())


def test_nothing_stays_of_a_folder_that_cannot_be_written(own, capsys, monkeypatch):
    def full(files, name=None):
        raise OSError(28, "No space left on device", "train.log")

    monkeypatch.setattr(make.Path, "write_bytes", full)
    files = {"a": b"1"}
    with pytest.raises(OSError, match="No space"):
        make.write_folder(own / "new" / "x", files)
    assert [path.name for path in own.iterdir()] == ["runs"]


def test_the_command_line(own):
    script = [sys.executable, str(ROOT / "records/make.py"), "toy-1", *ABOUT, "--out", "x"]
    for code, said in ((0, "x: README.md"), (2, "error: x is there already")):
        run = subprocess.run(script, cwd=own, capture_output=True, text=True, check=False)
        assert (run.returncode, (run.stdout + run.stderr).startswith(said)) == (code, True)


# -- scoring again --


def again(dataset, folder, *more):
    return [
        str(folder),
        "--data",
        str(dataset),
        "--tokenizer",
        str(dataset / "tokenizer.model"),
        *map(str, more),
    ]


@pytest.fixture
def remembered(made, dataset, monkeypatch):
    """Scoring again gives at once what the log has, for tests of the comparison."""

    def recall(record, seed, artifact, options):
        return dict(record.logs[seed].result)

    monkeypatch.setattr(rescore, "score_again", recall)


def test_a_record_scores_again_to_eight_decimals(made, dataset, tmp_path):
    """From the command line, in another folder, with knobs in the environment that must not reach the run."""
    script = [sys.executable, str(ROOT / "records/rescore.py"), *again(dataset, made[0], "--tolerance", 0)]
    env = dict(MODEL_DIM="64", EVAL_STRIDE="3", PATH="/usr/bin:/bin")
    run = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" equal\n") == 8 and "verdict: equal" in run.stdout
    for name in ("val_bpb", "sliding_val_bpb", "hedge_val_bpb"):
        shown = f"{claim_of(made[0])[name]:.8f}"
        assert re.search(rf"^  {name} +{shown} +{shown} +{shown} ", run.stdout, re.M), name
    assert not list(tmp_path.iterdir())


def test_the_model_of_another_seed_is_found_out(record, runs, dataset, capsys):
    other = runs / "runs/toy-2/final_model.int8.ptz"
    assert rescore.main(again(dataset, record(0), "--artifact", other)) == 1
    told = capsys.readouterr().out
    assert "changed: " in told and "verdict: differs" in told and told.count(" differs\n") >= 6


def test_a_damaged_model_is_refused(record, dataset, capsys):
    folder = record(0)
    blob = bytearray((folder / "final_model.int8.ptz").read_bytes())
    blob[len(blob) // 2] ^= 1
    (folder / "final_model.int8.ptz").write_bytes(blob)
    assert "cannot be scored" in refusal(capsys, rescore, *again(dataset, folder))


def test_three_seeds_and_their_mean(record, dataset, remembered, capsys):
    folder = record(1)
    assert rescore.main(again(dataset, folder)) == 0
    told = capsys.readouterr().out
    assert "mean of 3 seeds" in told and told.count(" equal\n") == 4 * 8
    (folder / "final_model_seed2.int8.ptz").unlink()
    assert rescore.main(again(dataset, folder)) == 0
    assert "seed 2 was not scored again" in capsys.readouterr().out
    model = folder / "final_model_seed1.int8.ptz"
    assert "--seed" in refusal(capsys, rescore, *again(dataset, folder, "--artifact", model))
    assert rescore.main(again(dataset, folder, "--artifact", model, "--seed", 1)) == 0


CHANGES = [
    (0, lambda c: c.update(val_bpb=c["val_bpb"] - 0.001), "differs", 1),
    (0, lambda c: c.update(val_bpb=c["val_bpb"] - 0.00001), "within tolerance", 0),
    (0, lambda c: c.update(sliding_val_loss=c["sliding_val_loss"] - 0.01), "differs", 1),
    (0, lambda c: c.pop("hedge_val_bpb"), "equal", 0),
    (0, lambda c: c.update(artifact_sha256="0" * 64), "differs", 1),
    (1, lambda c: c.update(val_bpb=c["val_bpb"] - 0.001), "differs", 1),
    (1, lambda c: c["seed_results"]["3"].update(sliding_val_bpb=1.0), "differs", 1),
]


@pytest.mark.parametrize("which, change, verdict, code", CHANGES)
def test_a_changed_claim_is_found_out(record, dataset, remembered, capsys, which, change, verdict, code):
    folder = record(which)
    claim = claim_of(folder)
    change(claim)
    (folder / "submission.json").write_text(json.dumps(claim))
    assert rescore.main(again(dataset, folder)) == code
    assert f"verdict: {verdict}" in capsys.readouterr().out


BAD = {
    "no claim": (lambda f: (f / "submission.json").unlink(), "submission.json is missing"),
    "no JSON": (lambda f: (f / "submission.json").write_text("{"), "is not JSON"),
    "no number": (lambda f: reclaim(f, val_bpb="1.2"), "is not a number"),
    "no val_bpb": (lambda f: reclaim(f, val_bpb=None), "has no val_bpb"),
    "a score more": (lambda f: reclaim(f, ttt_val_bpb=1.0), "a score ttt"),
    "no such score": (lambda f: reclaim(f, score="best"), "none of roundtrip"),
    "no log": (lambda f: (f / "train.log").unlink(), "neither train.log nor"),
    "other script": (lambda f: (f / "train_gpt.py").write_text("print(1)\n"), "not the script at the head"),
    "no model": (lambda f: (f / "final_model.int8.ptz").unlink(), "--artifact"),
}


def reclaim(folder, **values):
    (folder / "submission.json").write_text(json.dumps(claim_of(folder) | values))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_refused(record, dataset, remembered, capsys, case):
    spoil, what = BAD[case]
    folder = record(0)
    spoil(folder)
    assert what in refusal(capsys, rescore, *again(dataset, folder))


def test_bad_input_to_rescoring_is_refused(record, dataset, tmp_path, capsys):
    folder, model = record(0), dataset / "tokenizer.model"
    assert "no folder" in refusal(capsys, rescore, *again(dataset, tmp_path / "none"))
    assert "--data" in refusal(capsys, rescore, folder, "--data", "none", "--tokenizer", model)
    assert "--tokenizer" in refusal(capsys, rescore, folder, "--data", dataset, "--tokenizer", "none")
    assert "--tolerance" in refusal(capsys, rescore, *again(dataset, folder, "--tolerance", -1))
    assert "--seed 9" in refusal(capsys, rescore, *again(dataset, folder, "--seed", 9))


def test_another_tokenizer_than_the_datas_is_refused(record, dataset, tmp_path, capsys):
    """Scripts of records from before train_gpt.py looked into the manifest would score the text wrongly."""
    data = shutil.copytree(dataset, tmp_path / "data")
    (data / "manifest.json").write_text(json.dumps(dict(tokenizer=dict(sha256="0" * 64))))
    options = record(0), "--data", data, "--tokenizer", data / "tokenizer.model"
    line = refusal(capsys, rescore, *options)
    assert "did not make" in line and "the manifest says 0000000000000000" in line


def test_another_validation_text_is_refused(record, dataset, tmp_path, capsys):
    other = shutil.copytree(dataset, tmp_path / "other")
    shard = other / "toy_val_000000.bin"
    write_shard(shard, np.fromfile(shard, dtype="<u2")[512:1512])
    said = refusal(capsys, rescore, *again(other, record(0)))
    assert "validation text" in said and "it was made with" in said
