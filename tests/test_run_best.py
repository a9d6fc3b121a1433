"""run_best.sh, its presets, .venv handling and sweeps/summary.py, with stubs in place of torch and training.

Each test runs the real scripts in a copy of the project. `python3` on PATH is the real interpreter without
its site-packages, and `stubs/` holds the packages it may import, so nothing is installed or trained.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweeps.lab import run_summary as summary

ROOT = Path(__file__).resolve().parents[1]
RUN_TIME = ["torch", "numpy", "sentencepiece", "zstandard"]
TIDAL = (
    "ITERATIONS=400 TIDAL_LR=1 LOGIT_SOFTCAP=15 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 "
    "HEAD_DIVERSITY=1e-4 EMBED_LR=0.8 MATRIX_LR=0.11 ENCODER_LAYERS=0 NUM_KV_HEADS=2 TIE_EMBEDDINGS=0"
)
# PR #895's line.
FOUR_HOURS = (
    "MAX_WALLCLOCK_SECONDS=14400 ITERATIONS=200000 NUM_REPEATS=5 PROG_DEPTH=0.3:2,0.5:3,0.75:4,1.0:5 "
    "WARMDOWN_ITERS=15000 SWA_EVERY=100 MATRIX_LR=0.015 SCALAR_LR=0.015 TIED_EMBED_LR=0.018 "
    "VAL_LOSS_EVERY=5000 TRAIN_LOG_EVERY=1000 USE_HEDGE=1"
)
LOWER_LR = "MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 VAL_LOSS_EVERY=200 TRAIN_LOG_EVERY=50"

TORCH = """
import os
class cuda:
    device_count = staticmethod(lambda: int(os.environ.get("STUB_GPUS", "1")))
    is_available = staticmethod(lambda: os.environ.get("STUB_GPUS", "1") != "0")
"""
TORCHRUN = """
import subprocess, sys
print("TORCHRUN", *sys.argv[1:])
script = next(i for i, word in enumerate(sys.argv) if word.endswith(".py") and i)
sys.exit(1 if subprocess.run([sys.executable, "-S", *sys.argv[script:]]).returncode else 0)
"""
TRAIN = """
SIZE_LIMIT = 16_000_000
import json, os, signal, sys, time
code = int(os.environ.get("STUB_EXIT", "0"))
print("ARGS", *sys.argv[1:])
print("ENV", json.dumps(dict(os.environ)), flush=True)
if "--dry-run" in sys.argv:
    sys.exit(code)
def stop(number, frame):
    print("SAVED", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if os.environ.get("STUB_WAIT"):
    open("started", "w").close()
    time.sleep(20)
logs = os.environ["OUT_DIR"] + "/logs"
os.makedirs(logs)
with open(f"{logs}/{os.environ['RUN_ID']}.jsonl", "w") as log:
    log.write(json.dumps({"event": "val", "step": 7, "val_bpb": 1.25, "train_ms": 1500}) + chr(10))
    log.write(json.dumps({"event": "end", "status": "stub", "step": 7, "exit_code": code}) + chr(10))
sys.exit(code)
"""
PYDOCS = """
print("PYDOCS built")
"""
# Stands for the venv module: makes .venv with an interpreter that also sees .venv/packages.
VENV = """
import os, sys
if __name__ == "__main__":
    here = os.path.abspath(sys.argv[1])
    os.makedirs(here + "/bin", exist_ok=True)
    with open(here + "/bin/python", "w") as f:
        f.write("#!/bin/bash" + chr(10))
        f.write(f'PYTHONPATH="{here}/packages:$PYTHONPATH" exec "{sys.executable}" -S "$@"' + chr(10))
    os.chmod(here + "/bin/python", 0o755)
"""
# Stands for pip: notes the call, then provides the packages unless told to fail half way.
PIP = """
import os, sys
with open("pip_calls", "a") as f:
    f.write(" ".join(sys.argv[1:]) + chr(10))
os.makedirs(".venv/packages", exist_ok=True)
for name in os.environ["STUB_PACKAGES"].split():
    if name == "numpy" and os.environ.get("STUB_PIP_FAILS"):
        sys.exit(1)
    with open(f".venv/packages/{name}.py", "w") as f:
        f.write(os.environ["STUB_TORCH"] if name == "torch" else "")
"""


def write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


class Project:
    """A copy of the project's launch files, and a way to run them among stubs."""

    def __init__(self, root: Path):
        self.root = root / "a copy"
        shutil.copytree(ROOT / "sweeps", self.root / "sweeps", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("run_best.sh", "requirements.txt", "requirements-lab.txt"):
            shutil.copy(ROOT / name, self.root / name)
        write(self.root / "train_gpt.py", TRAIN)
        write(self.root / "data/pydocs.py", PYDOCS)
        for name in ("data/__init__.py", "data/user_error.py", "data/missing_packages.py"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin, self.stubs = root / "bin", root / "stubs"
        self.python("python3")
        write(self.bin / "nvidia-smi", "#!/bin/bash\n", 0o755)  # keeps the wheel choice off the network
        write(self.stubs / "venv.py", VENV)
        write(self.stubs / "ensurepip.py", "")
        write(self.stubs / "pip.py", PIP)
        self.provide(RUN_TIME)

    def python(self, name: str) -> None:
        real = os.path.realpath(sys.executable)
        write(self.bin / name, f'#!/bin/bash\nexec "{real}" -S "$@"\n', 0o755)

    def provide(self, names: list[str]) -> None:
        for name in names:
            write(self.stubs / f"{name}.py", "")
        if "torch" in names:
            (self.stubs / "torch.py").unlink()
            write(self.stubs / "torch/__init__.py", TORCH)
            write(self.stubs / "torch/distributed/__init__.py", "")
            write(self.stubs / "torch/distributed/run.py", TORCHRUN)

    def withdraw(self, names: list[str]) -> None:
        for name in names:
            shutil.rmtree(self.stubs / name, ignore_errors=True)
            (self.stubs / f"{name}.py").unlink(missing_ok=True)

    def environment(self, **env: str) -> dict[str, str]:
        base = {"PATH": f"{self.bin}:/usr/bin:/bin", "PYTHONPATH": str(self.stubs), "HOME": str(self.root)}
        stubs = {"STUB_PACKAGES": " ".join(RUN_TIME), "STUB_TORCH": TORCH, "PYTHONDONTWRITEBYTECODE": "1"}
        return {**base, **stubs, **env}

    def run(self, *arguments: str, cwd: str = "/", **env: str) -> "Result":
        command = ["bash", str(self.root / "run_best.sh"), *arguments]
        return Result(
            subprocess.run(
                command, cwd=cwd, env=self.environment(**env), capture_output=True, text=True, timeout=30
            )
        )


class Result:
    def __init__(self, done: subprocess.CompletedProcess[str]):
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        found = re.search(r"^ENV (.*)$", self.out, re.M)
        self.trained = found is not None
        self.env: dict[str, str] = json.loads(found[1]) if found else {}

    def knobs(self, words: str) -> str:
        """What training got for the names in `words`, in the same form."""
        names = [word.partition("=")[0] for word in words.split()]
        return " ".join(f"{name}={self.env.get(name)}" for name in names)

    def line(self, start: str) -> str:
        """The one line of the output that begins so."""
        found = [line for line in self.out.splitlines() if line.startswith(start)]
        assert len(found) == 1, f"{start!r} {len(found)} times in:\n{self.out}\n{self.err}"
        return found[0]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def assignments(preset: str) -> list[str]:
    lines = (ROOT / f"sweeps/presets/{preset}.env").read_text().splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


# ---------------------------------------------------------------- presets


def test_presets_hold_the_published_lines_verbatim():
    lines = {p.stem: p.read_text().splitlines() for p in (ROOT / "sweeps/presets").glob("*.env")}
    assert TIDAL in lines["tidal_1434"] and assignments("tidal_1434") == TIDAL.split()
    assert TIDAL in lines["best"] and assignments("best") == [*TIDAL.split(), "ITERATIONS=20000"]
    assert LOWER_LR in lines["lower_lr"] and assignments("lower_lr") == LOWER_LR.split()
    assert assignments("baseline") == []
    assert FOUR_HOURS in lines["progressive_depth_4h"]
    both = [dict(word.split("=") for word in assignments(f"progressive_depth{end}")) for end in ("", "_4h")]
    assert float(both[1].pop("CHECKPOINT_SECONDS")) > 0, "four hours are worth a checkpoint"
    assert {k: v for k, v in both[0].items() if k not in FOUR_HOURS} == {
        k: v for k, v in both[1].items() if k not in FOUR_HOURS
    }, "the 4-hour run sets its line over the defaults of the other"


def test_every_preset_is_made_of_knobs_and_says_what_it_is():
    for path in (ROOT / "sweeps/presets").glob("*.env"):
        assert path.read_text().startswith("# "), path.name
        for word in assignments(path.stem):
            assert re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", word), (path.name, word)


def test_cpu_overlay_keeps_heads_divisible_and_leaves_the_recipe_alone():
    overlay = dict(word.split("=") for word in assignments("cpu"))
    assert int(overlay["MODEL_DIM"]) % (2 * 8) == 0, "eight heads, the default, of an even size"
    assert int(overlay["TRAIN_BATCH_TOKENS"]) % int(overlay["TRAIN_SEQ_LEN"]) == 0
    recipe = {word.split("=")[0] for word in TIDAL.split()}
    assert not recipe & overlay.keys()


def test_training_understands_every_preset_with_and_without_the_overlay(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    config = importlib.import_module("train_gpt").Config
    cpu = dict(word.split("=") for word in assignments("cpu"))
    for path in (ROOT / "sweeps/presets").glob("*.env"):
        preset = dict(word.split("=") for word in assignments(path.stem))
        own = (path.parent / "cpu" / path.name).is_file()
        scaled = dict(word.split("=") for word in assignments(f"cpu/{path.stem}")) if own else {}
        for env in (preset, {**preset, **cpu, **scaled}):
            cfg = config.from_env(env)
            for name, text in env.items():
                value = getattr(cfg, name.lower())
                assert value == (text if isinstance(value, str) else float(text)), (path.name, name)


# ---------------------------------------------------------------- what training gets


def test_default_preset_is_best_and_its_last_line_wins(project: Project):
    run = project.run()
    expected = TIDAL.replace("ITERATIONS=400", "ITERATIONS=20000")
    assert run.code == 0 and run.knobs(TIDAL) == expected
    assert run.line("ARGS") == "ARGS"
    assert re.fullmatch(r"best-\d{8}-\d{6}-[0-9a-f]{6}", run.env["RUN_ID"])
    assert run.env["OUT_DIR"] == f"runs/{run.env['RUN_ID']}"
    assert run.line("logs").endswith(f"{run.env['OUT_DIR']}/logs/{run.env['RUN_ID']}.jsonl")


def test_a_gpu_run_gets_the_preset_and_no_more(project: Project):
    run = project.run("tidal_1434")
    paths = {"RUN_ID", "OUT_DIR", "DATA_PATH", "TOKENIZER_PATH", "STARTED_BY", "SET_BY_PRESET"}
    shell = {"PYTHON", "PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
    names = {word.split("=")[0] for word in TIDAL.split()}
    assert run.knobs(TIDAL) == TIDAL
    assert run.env.keys() - project.environment().keys() - shell == names | paths


def test_precedence_argument_environment_overlay_preset(project: Project):
    preset_only = project.run("best", STUB_GPUS="0")
    assert preset_only.env["MODEL_DIM"] == dict(w.split("=") for w in assignments("cpu"))["MODEL_DIM"]
    # A copy in which all four levels disagree on one knob.
    write(project.root / "sweeps/presets/cpu.env", "NUM_KV_HEADS=3 NUM_LAYERS=5\n")
    assert project.run("best").env["NUM_KV_HEADS"] == "2"
    assert project.run("best", STUB_GPUS="0").env["NUM_KV_HEADS"] == "3"
    assert project.run("best", STUB_GPUS="0", NUM_KV_HEADS="4").env["NUM_KV_HEADS"] == "4"
    argued = project.run("best", "NUM_KV_HEADS=8", STUB_GPUS="0", NUM_KV_HEADS="4")
    assert argued.env["NUM_KV_HEADS"] == "8"
    assert argued.env["NUM_LAYERS"] == "5" and argued.env["ENCODER_LAYERS"] == "0"


def test_cpu_line_names_the_knobs_it_set_and_only_those(project: Project):
    run = project.run("baseline", "NUM_LAYERS=3", STUB_GPUS="0", TRAIN_SEQ_LEN="64")
    sizing = assignments("cpu/baseline") + assignments("cpu")
    set_here = [w for w in sizing if w.split("=")[0] not in ("NUM_LAYERS", "TRAIN_SEQ_LEN")]
    line = run.line("run_best.sh: no CUDA GPU to use")
    assert re.findall(r"[A-Z_]+=\S+", line) == set_here
    assert run.knobs(" ".join(set_here)) == " ".join(set_here)
    assert run.env["NUM_LAYERS"] == "3" and run.env["TRAIN_SEQ_LEN"] == "64"
    assert "TORCHRUN" not in run.out


def test_a_gpu_gets_no_overlay(project: Project):
    run = project.run("baseline")
    assert "no CUDA" not in run.out and "NUM_LAYERS" not in run.env and "TORCHRUN" not in run.out


def test_a_run_told_to_use_the_cpu_is_sized_for_it(project: Project):
    run = project.run("baseline", "DEVICE=cpu", STUB_GPUS="4")
    assert run.knobs("NUM_LAYERS=") == next(w for w in assignments("cpu") if w.startswith("NUM_LAYERS"))
    assert "TORCHRUN" not in run.out


def test_many_gpus_run_under_torchrun(project: Project):
    run = project.run("lower_lr", "SEED=3", STUB_GPUS="4")
    assert run.line("TORCHRUN") == "TORCHRUN --standalone --nproc_per_node=4 train_gpt.py"
    assert run.env["SEED"] == "3" and run.knobs(LOWER_LR) == LOWER_LR


# ---------------------------------------------------------------- PACKED=1


@pytest.fixture
def packing(project: Project) -> Project:
    """The project with what packs, and a script that is worth it."""
    shutil.copytree(
        ROOT / "records", project.root / "records", ignore=shutil.ignore_patterns("20*", "bench*")
    )
    write(project.root / "train_gpt.py", f'print("SCRIPT", __file__)\n{TRAIN}' + "# A comment.\n" * 300)
    return project


def test_packed_runs_the_packed_script_in_the_folder_of_the_run(packing: Project):
    run = packing.run("baseline", "PACKED=1", "SEED=3")
    out = packing.root / run.env["OUT_DIR"]
    assert run.code == 0 and "PACKED" not in run.env and run.env["SEED"] == "3"
    assert (out / "train_gpt_readable.py").read_text() == (packing.root / "train_gpt.py").read_text()
    assert run.line("SCRIPT").endswith(f"{out}/train_gpt.py")
    packed = (out / "train_gpt.py").read_bytes()
    assert packed.startswith(b"# coding: latin-1; packed by") and run.line(
        f"{run.env['OUT_DIR']}/train_gpt.py: {len(packed)} bytes"
    )
    many = packing.run("baseline", STUB_GPUS="4", PACKED="1", OUT_DIR="there")
    assert many.line("TORCHRUN") == "TORCHRUN --standalone --nproc_per_node=4 there/train_gpt.py"
    assert "PACKED" not in many.env and (packing.root / "there/train_gpt.py").read_bytes() == packed
    plain = packing.run("baseline", "PACKED=0")
    assert plain.code == 0 and not (packing.root / plain.env["OUT_DIR"] / "train_gpt.py").exists()


def test_a_packed_run_goes_on_with_its_own_script(packing: Project):
    how = dict(RUN_ID="mine", OUT_DIR="here", PACKED="1", STUB_EXIT="75")
    assert packing.run("baseline", **how).code == 75
    packed = (packing.root / "here/train_gpt.py").read_bytes()
    with (packing.root / "train_gpt.py").open("a") as file:
        file.write("number = 1\n")
    shutil.rmtree(packing.root / "here/logs")
    again = packing.run("baseline", "RESUME=auto", **how)
    assert again.code == 75 and again.line("run_best.sh: goes on with the packed script in here")
    assert (packing.root / "here/train_gpt.py").read_bytes() == packed
    refused = packing.run("baseline", **how)
    assert refused.code == 2 and not refused.trained and "is there already" in refused.err
    assert (packing.root / "here/train_gpt.py").read_bytes() == packed


def test_packed_is_0_or_1_and_a_dry_run_leaves_nothing(packing: Project):
    wrong = packing.run("baseline", "PACKED=yes")
    assert wrong.code == 2 and "PACKED=yes is neither 0 nor 1" in wrong.err and not wrong.trained
    dry = packing.run("baseline", "PACKED=1", "--dry-run")
    assert dry.code == 0 and dry.line("ARGS") == "ARGS --dry-run"
    assert list((packing.root / "runs").iterdir()) == []
    assert packing.run("baseline", "PACKED=1", "--dry-run", STUB_EXIT="2").code == 2


def test_values_reach_training_as_they_were_typed(project: Project):
    value = "a b*; $(touch x) = 'q'"
    run = project.run("baseline", f"NOTE={value}", "EMPTY=", RUN_ID="mine", OUT_DIR="here")
    assert run.env["NOTE"] == value and run.env["EMPTY"] == ""
    assert run.env["RUN_ID"] == "mine" and run.env["OUT_DIR"] == "here"


def test_a_preset_with_a_malformed_word_stops_the_run(project: Project):
    write(project.root / "sweeps/presets/best.env", "SEED=1 matrix_lr\n")
    run = project.run()
    assert run.code == 1 and "best.env" in run.err and "matrix_lr" in run.err and not run.trained


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["nosuch"], "unknown preset: nosuch"),
        (["cpu"], "unknown preset: cpu"),
        (["bes"], "unknown preset: bes"),
        (["best", "baseline"], "two presets"),
        (["matrix_lr=1"], "matrix_lr=1"),
        (["--iterations=5"], "--iterations=5"),
        (["../best"], "../best"),
        (["=5"], "=5"),
        ([""], "neither a preset"),
    ],
)
def test_a_wrong_argument_is_one_line_with_the_presets_and_exit_2(project: Project, arguments, what):
    run = project.run(*arguments)
    assert run.code == 2 and run.out == "" and len(run.err.splitlines()) == 1
    frontier = "frontier frontier_1394 frontier_1493"
    older = "lower_lr progressive_depth progressive_depth_4h tidal_1434"
    assert what in run.err and f"(presets: baseline best {frontier} {older};" in run.err


def test_help_lists_presets_and_runs_nothing(project: Project):
    run = project.run("--help")
    assert run.code == 0 and not run.trained and run.out.startswith("usage: bash run_best.sh")
    for name in ("best", "baseline", "frontier", "lower_lr", "tidal_1434"):
        first = (ROOT / f"sweeps/presets/{name}.env").read_text().splitlines()[0].removeprefix("# ")
        assert re.search(rf"^  {name} +{re.escape(first)}$", run.out, re.M)


@pytest.mark.parametrize("flag", ["--check", "--dry-run"])
def test_check_is_a_dry_run_in_one_process(project: Project, flag):
    run = project.run("tidal_1434", flag, STUB_GPUS="4", STUB_EXIT="2")
    assert run.line("ARGS") == "ARGS --dry-run" and run.code == 2
    assert "TORCHRUN" not in run.out and "quantisation" not in run.out and run.knobs(TIDAL) == TIDAL


# ---------------------------------------------------------------- data


def put_fineweb(root: Path, leave_out: str = "", pieces: int = 1024) -> None:
    folder = f"data/datasets/fineweb10B_sp{pieces}"
    names = [f"{folder}/fineweb_train_000000.bin", f"{folder}/fineweb_val_000000.bin"]
    for name in [*names, f"data/tokenizers/fineweb_{pieces}_bpe.model"]:
        if not leave_out or leave_out not in name:
            write(root / name, "")


def test_data_embedded_corpus_where_there_is_no_fineweb(project: Project):
    run = project.run("baseline")
    assert "pydocs_sp1024" in run.line("run_best.sh: data:") and run.line("PYDOCS")
    assert run.env["DATA_PATH"] == "data/datasets/pydocs_sp1024"
    assert run.env["TOKENIZER_PATH"] == "data/tokenizers/pydocs_1024_bpe.model"


def test_data_fineweb_when_it_is_there(project: Project):
    put_fineweb(project.root)
    run = project.run("baseline")
    assert "FineWeb" in run.line("run_best.sh: data:") and "PYDOCS" not in run.out
    assert run.env["DATA_PATH"] == "data/datasets/fineweb10B_sp1024"
    assert run.env["TOKENIZER_PATH"] == "data/tokenizers/fineweb_1024_bpe.model"


def test_data_is_of_the_presets_vocabulary(project: Project):
    """On a GPU 8,192 pieces, which must be fetched; on a CPU the embedded corpus."""
    put_fineweb(project.root)
    missing = project.run("frontier")
    assert missing.code == 2 and not missing.trained and len(missing.err.splitlines()) == 1
    assert "VOCAB_SIZE=8192" in missing.err and "data/fineweb.py --variant sp8192`" in missing.err
    dry = project.run("frontier", "--dry-run")
    assert dry.code == 0 and "DATA_PATH" not in dry.env and dry.env["VOCAB_SIZE"] == "8192"
    small = project.run("frontier", STUB_GPUS="0")
    assert small.env["VOCAB_SIZE"] == "1024" and small.env["DATA_PATH"].endswith("fineweb10B_sp1024")
    put_fineweb(project.root, pieces=8192)
    whole = project.run("frontier")
    assert whole.env["DATA_PATH"] == "data/datasets/fineweb10B_sp8192"
    assert whole.env["TOKENIZER_PATH"] == "data/tokenizers/fineweb_8192_bpe.model"


@pytest.mark.parametrize("missing", ["train", "val", "model"])
def test_data_part_of_fineweb_is_not_fineweb(project: Project, missing):
    put_fineweb(project.root, leave_out=missing)
    assert project.run("baseline").env["DATA_PATH"] == "data/datasets/pydocs_sp1024"


def test_data_given_by_the_user_wins(project: Project):
    put_fineweb(project.root)
    run = project.run("baseline", "DATA_PATH=d")
    assert run.env["DATA_PATH"] == "d" and "TOKENIZER_PATH" not in run.env and "PYDOCS" not in run.out
    assert "as given, DATA_PATH=d" in run.line("run_best.sh: data:")


def test_data_that_cannot_be_built_stops_the_run(project: Project):
    write(project.root / "data/pydocs.py", "import sys; sys.exit(9)")
    run = project.run("baseline")
    assert run.code == 9 and not run.trained


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("gpus", ["1", "2"])
@pytest.mark.parametrize("code", [0, 3, 75])
def test_exit_code_is_trainings_own_and_the_table_follows(project: Project, code, gpus):
    run = project.run("baseline", STUB_EXIT=str(code), STUB_GPUS=gpus)
    assert run.code == code, run.err
    assert run.line("status").split(maxsplit=1)[1] == f"stub (exit code {code})"
    assert run.line("bpb before quantisation").endswith("1.2500")


def test_a_run_that_left_no_log_keeps_its_exit_code(project: Project):
    write(project.root / "train_gpt.py", "SIZE_LIMIT = 16_000_000\nimport sys; sys.exit(5)")
    for gpus, code in (("1", 5), ("2", 1)):
        run = project.run("baseline", STUB_GPUS=gpus, RUN_ID="gone")
        assert run.code == code and run.err == "" and "no summary" not in run.out + run.err
        assert "\nstatus" not in run.out  # and no table


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_a_refusal_over_the_log_of_an_earlier_run_shows_none_of_it(project: Project, gpus):
    """Nor does it end with that run's exit code."""
    assert project.run("baseline", RUN_ID="twice").code == 0
    write(project.root / "train_gpt.py", "import sys; sys.exit(2)")
    again = project.run("baseline", RUN_ID="twice", STUB_GPUS=gpus)
    assert again.code == (2 if gpus == "1" else 1) and "status" not in again.out


def test_a_run_that_was_refused_after_its_log_began_has_no_table_of_dashes(tmp_path: Path, capsys):
    log = tmp_path / "x.jsonl"
    table(log, [EVENTS[0], EVENTS[1], {"event": "end", "status": "error", "step": None, "exit_code": 2}])
    assert summary.main([str(log)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["status", "machine", "logs"]


def test_the_summary_of_a_stopped_run_ends_with_the_command_that_goes_on(tmp_path: Path, capsys):
    log, command = tmp_path / "x.jsonl", "bash '/a b/run_best.sh' best RESUME=auto"
    end = {"event": "end", "status": "preempted", "exit_code": 75, "command": command}
    table(log, [*EVENTS[:4], end])
    assert summary.main([str(log)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == command


def test_runs_started_in_one_second_have_names_of_their_own(project: Project):
    """As `for s in 1 2 3; do bash run_best.sh baseline SEED=$s & done` starts them."""
    command = ["bash", str(project.root / "run_best.sh"), "baseline"]
    loop = [
        subprocess.Popen(command, env=project.environment(SEED=seed), stdout=subprocess.PIPE, text=True)
        for seed in "1234"
    ]
    outputs = [process.communicate(timeout=30)[0] for process in loop]
    assert [process.returncode for process in loop] == [0] * 4
    names = {re.search(r"^run_best.sh: run (\S+) on", out, re.M)[1] for out in outputs}
    assert len(names) == 4 and len(list((project.root / "runs").iterdir())) == 4


def test_training_is_told_how_it_was_started(project: Project):
    run = project.run("baseline", "SEED=3", STUB_GPUS="0", MATRIX_LR="0.02", PACKED="0")
    assert shlex.split(run.env["STARTED_BY"]) == ["bash", str(project.root / "run_best.sh"), "baseline"]
    preset = run.env["SET_BY_PRESET"].split()
    overlay = {word.partition("=")[0] for word in assignments("cpu")} - {"MATRIX_LR"}
    assert overlay and overlay <= set(preset)
    assert not {"SEED", "MATRIX_LR", "DATA_PATH", "RUN_ID"} & set(preset)


def test_resume_without_a_name_is_the_presets_newest_unfinished_run(project: Project):
    for age, name in enumerate(["best-1", "best-2", "best-3", "lower_lr-9"]):
        (project.root / "runs" / name).mkdir(parents=True)
        if name != "best-3":  # that one is finished
            (project.root / "runs" / name / "checkpoints").mkdir()
            os.utime(project.root / "runs" / name / "checkpoints", (1e9 + age, 1e9 + age))
    assert project.run("RESUME=auto").knobs("RUN_ID OUT_DIR") == "RUN_ID=best-2 OUT_DIR=runs/best-2"
    assert project.run("RESUME=auto", "RUN_ID=mine").knobs("OUT_DIR") == "OUT_DIR=runs/mine"
    fresh = project.run("baseline", "RESUME=auto")
    assert re.fullmatch(r"RUN_ID=baseline-\d{8}-\d{6}-[0-9a-f]{6}", fresh.knobs("RUN_ID"))


def test_the_newest_unfinished_run_is_known_after_a_copy_and_beside_litter(project: Project):
    """Times of folders say nothing; what a file browser left keeps the folder of a finished run."""
    for age, (name, files, second) in enumerate([
        ("best-x", ["best-x-00000005.pt"], 300),
        ("best-1", ["best-1-00000001.pt"], 200),
        ("best-3", [".DS_Store"], 400),
    ]):  # fmt: skip
        folder = project.root / "runs" / name
        for file in files:
            write(folder / "checkpoints" / file, "")
        write(folder / f"logs/{name}.jsonl", f'{{"event": "step", "time": {second}.5}}\n{{"event": "st')
        os.utime(folder / "checkpoints", (2e9 + age, 2e9 - age))
    assert project.run("RESUME=auto").knobs("RUN_ID") == "RUN_ID=best-x"


def with_line_ends(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def test_a_preset_with_windows_line_ends_or_a_mark_is_read(project: Project):
    plain = project.run("best").env
    preset = project.root / "sweeps/presets/best.env"
    with_line_ends(preset)
    preset.write_bytes(b"\xef\xbb\xbf" + preset.read_bytes())
    with_line_ends(project.root / "sweeps/presets/cpu.env")
    run = project.run("best", "RUN_ID=again")
    assert run.code == 0 and run.env == plain | dict(RUN_ID="again", OUT_DIR="runs/again")


def test_an_invisible_character_in_a_preset_is_shown(project: Project):
    write(project.root / "sweeps/presets/baseline.env", "# mine\nSEED=1 MATRIX_LR\u00a0=0.1\n")
    run = project.run("baseline")
    assert not run.trained and r"not KNOB=VALUE: $'MATRIX_LR\302\240=0.1'" in run.err


@pytest.mark.parametrize("name", ["run_best.sh", "tests/run.sh", "tests/as_users_run.sh"])
def test_a_checkout_with_windows_line_ends_is_one_line(project: Project, name):
    write(project.root / name, (ROOT / name).read_text().replace("\n", "\r\n"))
    command = ["bash", str(project.root / name), "--help"]
    done = subprocess.run(command, env=project.environment(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "has Windows line ends (CRLF)" in done.stderr and "git reset" in done.stderr


def test_a_clone_with_autocrlf_has_the_same_bytes(tmp_path: Path):
    """What a clone gets is what .gitattributes says; so a repository of the launch files alone will do."""
    names = [".gitattributes", "run_best.sh", "train_gpt.py", "sweeps/presets/best.env", "tests/run.sh"]
    for name in names:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "a" / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path / "a", check=True)
    subprocess.run([*git, "add", "."], cwd=tmp_path / "a", check=True)
    subprocess.run([*git, "commit", "-qm", "a"], cwd=tmp_path / "a", check=True)
    clone = [*git, "clone", "-q", "-c", "core.autocrlf=true", "a", "b"]
    subprocess.run(clone, cwd=tmp_path, check=True)
    for name in names:
        assert (tmp_path / "b" / name).read_bytes() == (ROOT / name).read_bytes(), name


def waiting(project: Project) -> subprocess.Popen:
    """A run whose training has started and waits."""
    process = subprocess.Popen(
        ["bash", str(project.root / "run_best.sh"), "baseline"],
        env=project.environment(STUB_WAIT="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 15
    while not (project.root / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2", "XCPU"])
def test_a_signal_is_handed_to_training_which_saves(project: Project, name):
    """To the wrapper alone, as a scheduler sends it. Training gets SIGTERM, which torchrun hands on too."""
    process = waiting(project)
    process.send_signal(getattr(signal, f"SIG{name}"))
    out, _ = process.communicate(timeout=15)
    assert process.returncode == 75 and "SAVED" in out


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here, which ties training to its wrapper")
def test_training_does_not_outlive_a_wrapper_that_is_killed(project: Project):
    process = waiting(project)
    process.kill()
    out, _ = process.communicate(timeout=15)  # it would wait for 20 s
    assert process.returncode == -signal.SIGKILL and "SAVED" in out


# ---------------------------------------------------------------- Python and .venv


def stamp(project: Project) -> Path:
    return project.root / ".venv/requirements.txt.sha256"


def pip_calls(project: Project) -> list[str]:
    path = project.root / "pip_calls"
    return path.read_text().splitlines() if path.exists() else []


def test_an_active_python_with_the_packages_is_used_as_it_is(project: Project):
    assert project.run("baseline").code == 0
    assert not (project.root / ".venv").exists() and pip_calls(project) == []


def test_a_broken_python3_gives_way_to_python(project: Project):
    write(project.bin / "python3", "#!/bin/bash\nexit 1\n", 0o755)
    project.python("python")
    assert project.run("baseline").code == 0 and not (project.root / ".venv").exists()


def test_no_usable_python_is_one_line(project: Project):
    for name in ("python3", "python"):
        write(project.bin / name, "#!/bin/bash\nexit 1\n", 0o755)
    run = project.run("baseline")
    assert run.code == 1 and len(run.err.splitlines()) == 1 and "Python 3.10" in run.err


def test_venv_is_made_once_and_again_when_requirements_change(project: Project):
    project.withdraw(RUN_TIME)
    first = project.run("baseline", STUB_GPUS="0")
    assert first.code == 0 and first.trained and "about" in first.line("run_best.sh: installs")
    assert len(pip_calls(project)) == 1 and "-r requirements.txt" in pip_calls(project)[0]
    again = project.run("baseline", STUB_GPUS="0")
    assert again.trained and "installs" not in again.out and len(pip_calls(project)) == 1
    with (project.root / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert project.run("baseline", STUB_GPUS="0").trained and len(pip_calls(project)) == 2


def test_an_interrupted_install_does_not_look_complete(project: Project):
    project.withdraw(RUN_TIME)
    broken = project.run("baseline", STUB_PIP_FAILS="1")
    assert broken.code == 1 and not broken.trained and "pip could not install" in broken.err
    assert not stamp(project).exists()
    assert project.run("baseline", STUB_GPUS="0").trained and len(pip_calls(project)) == 2
    assert stamp(project).exists()
    # And one that breaks while it replaces a complete environment.
    with (project.root / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert project.run("baseline", STUB_PIP_FAILS="1").code == 1 and not stamp(project).exists()


def test_an_install_without_its_packages_is_refused(project: Project):
    project.withdraw(RUN_TIME)
    run = project.run("baseline", STUB_PACKAGES="torch numpy")
    assert run.code == 1 and "damaged" in run.err and not stamp(project).exists()


def test_python_without_venv_names_the_cure_in_one_line(project: Project):
    project.withdraw(RUN_TIME)
    write(project.stubs / "ensurepip.py", "raise ImportError")
    run = project.run("baseline")
    assert run.code == 1 and len(run.err.splitlines()) == 1 and "apt install python3-venv" in run.err


def sourced(project: Project, code: str, **env: str) -> str:
    command = ["bash", "-c", f"set -euo pipefail; source sweeps/python_env.sh; {code}"]
    done = subprocess.run(
        command, cwd=project.root, env=project.environment(**env), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_names_are_read_from_the_requirements(project: Project):
    assert sourced(project, "package_names requirements.txt").split(",") == sorted(RUN_TIME)
    write(
        project.root / "x.txt",
        "# note\nhuggingface-hub==1; sys_platform == 'x'\n\nb[extra]>=2  # why\n"
        "pytest-xdist==3\npytest-timeout==2\n",
    )
    assert sourced(project, "package_names x.txt") == "b,huggingface_hub,pytest_timeout,xdist"


def test_cpu_wheels_only_on_linux_without_a_gpu_driver_and_when_reachable(project: Project):
    write(project.bin / "uname", "#!/bin/bash\necho ${STUB_SYSTEM:-Linux}\n", 0o755)
    write(project.root / ".venv/bin/python", "#!/bin/bash\nexit 0\n", 0o755)
    assert sourced(project, "torch_wheels") == ""
    (project.bin / "nvidia-smi").unlink()
    if shutil.which("nvidia-smi", path="/usr/bin:/bin") is None:
        assert sourced(project, "torch_wheels").startswith("--extra-index-url=https://download.pytorch.org/")
    assert sourced(project, "torch_wheels", STUB_SYSTEM="Darwin") == ""
    write(project.root / ".venv/bin/python", "#!/bin/bash\nexit 1\n", 0o755)
    assert sourced(project, "torch_wheels") == ""


@pytest.mark.parametrize("answer, build", [
    ("580.65.06, 9.0", ""),
    ("570.124.06, 9.0", "cu128"),
    ("550.54.15, 8.9", "cu126"),
    ("580.65.06, 7.0", "cu126"),  # V100
    ("580.65.06, 7.5", ""),  # T4
    ("580.65.06, 12.0", ""),
    ("NVIDIA-SMI has failed because it could not communicate with the driver", ""),
])  # fmt: skip
def test_the_build_of_torch_fits_driver_and_gpu(project: Project, answer, build):
    write(project.bin / "nvidia-smi", f"#!/bin/bash\necho '{answer}'\n", 0o755)
    assert sourced(project, "torch_build") == build


# ---------------------------------------------------------------- summary


CONFIG = {"max_wallclock_seconds": 270.0, "train_batch_tokens": 8192}
EVENTS = [
    {"event": "config", "config": CONFIG, "config_hash": "c", "code_bytes": 60_000},
    {"event": "env", "device": "cpu", "torch": "2.13.0", "world_size": 1},
    {"event": "val", "step": 0, "val_loss": 6.9, "val_bpb": 4.1, "train_ms": 0},
    {"event": "step", "step": 1200, "train_loss": 3.2, "tokens": 9_830_400, "train_ms": 268_000},
    {"event": "val", "step": 1234, "val_loss": 3.1, "val_bpb": 1.9012, "train_ms": 270_500},
    {
        "event": "artifact",
        "path": "runs/x/final_model.pgz",
        "quant": "int8",
        "codec": "zstd",
        "model_bytes": 3_940_000,
        "code_bytes": 60_000,
        "total_bytes": 4_000_000,
    },
    {"event": "score", "name": "roundtrip", "val_loss": 3.11, "val_bpb": 1.9047, "seconds": 20.5},
    {"event": "score", "name": "sliding", "val_loss": 3.05, "val_bpb": 1.87, "seconds": 100.0},
    {"event": "end", "status": "ok", "step": 1234, "exit_code": 0},
]


def table(path: Path, events: list[dict], tail: str = "") -> dict[str, str]:
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    found, _ = summary.read_events(path)
    return dict(summary.summarise(found, path))


def test_summary_of_a_whole_run(tmp_path: Path):
    log = tmp_path / "x.jsonl"
    log.with_suffix(".txt").write_text("")
    assert table(log, EVENTS) == {
        "status": "ok (exit code 0)",
        "machine": "1 x cpu",
        "bpb before quantisation": "1.9012",
        "bpb after quantisation": "1.9047 (int8 zstd)",
        "quantisation cost": "+0.0035",
        "bpb, sliding": "1.8700",
        "size": "4,000,000 of 16,000,000 bytes (25.0%; code 60,000 + model 3,940,000)",
        "training": "270.5 of 270.0 s  OVER THE LIMIT",
        "evaluation": "120.5 of 600.0 s",
        "steps": "1,234",
        "tokens trained": "10,108,928",  # of step 1,234, after the last one logged
        "packed model": "runs/x/final_model.pgz",
        "logs": f"{tmp_path}/x.txt {tmp_path}/x.jsonl",
    }


def test_summary_shouts_when_a_limit_is_broken(tmp_path: Path):
    def changed(**values):
        return [{**event, **{k: v for k, v in values.items() if k in event}} for event in EVENTS]

    rows = table(tmp_path / "x.jsonl", changed(total_bytes=16_000_001, seconds=300.1))
    assert "OVER THE LIMIT" in rows["size"] and "OVER THE LIMIT" in rows["evaluation"]
    rows = table(tmp_path / "x.jsonl", changed(total_bytes=16_000_000, seconds=300.0))
    assert "OVER" not in rows["size"] and "OVER" not in rows["evaluation"]
    assert rows["training"] == "270.5 of 270.0 s  OVER THE LIMIT"
    rows = table(tmp_path / "x.jsonl", changed(train_ms=270_000))
    assert rows["training"] == "270.0 of 270.0 s"
    rows = table(tmp_path / "x.jsonl", changed(config={"MAX_EVAL_SECONDS": 100, "MAX_WALLCLOCK_SECONDS": 0}))
    assert rows["evaluation"] == "120.5 of 100.0 s  OVER THE LIMIT" and rows["training"] == "270.5 of - s"


@pytest.mark.parametrize("gone", ["config", "env", "val", "artifact", "score", "end"])
def test_summary_shows_a_dash_for_what_a_missing_event_would_say(tmp_path: Path, gone):
    whole = table(tmp_path / "x.jsonl", EVENTS)
    rows = table(tmp_path / "x.jsonl", [event for event in EVENTS if event["event"] != gone])
    row, expected = {
        "config": ("training", "270.5 of - s"),
        "env": ("machine", "- x -"),
        "val": ("bpb before quantisation", "-"),
        "artifact": ("size", "- of 16,000,000 bytes (-; code 60,000 + model -)"),
        "score": ("bpb after quantisation", "- (int8 zstd)"),
        "end": ("status", "- (exit code -)"),
    }[gone]
    assert rows[row] == expected != whole[row]
    if gone in ("val", "score"):
        assert rows["quantisation cost"] == "-"
    if gone in ("config", "end"):  # what the last logged step says
        assert rows["tokens trained"] == "9,830,400"
    if gone == "end":
        assert rows["steps"] == "1,200"


def test_summary_of_a_run_that_ended_before_its_first_logged_step(tmp_path: Path):
    events = [event for event in EVENTS if event["event"] in ("config", "env")]
    end = {"event": "end", "status": "diverged", "step": None, "exit_code": 5, "truncated": True}
    rows = table(tmp_path / "x.jsonl", [*events, end])
    assert rows["status"] == "diverged (exit code 5)  SCHEDULE TRUNCATED"
    assert rows["steps"] == rows["tokens trained"] == "-" and rows["training"] == "- of 270.0 s"


def test_summary_of_an_empty_log_is_all_dashes(tmp_path: Path):
    rows = table(tmp_path / "x.jsonl", [])
    assert rows.pop("logs") == f"{tmp_path}/x.jsonl"
    assert all("-" in value for value in rows.values()) and rows["steps"] == "-"


def test_summary_counts_the_total_when_the_log_does_not(tmp_path: Path):
    events = [{k: v for k, v in event.items() if k != "total_bytes"} for event in EVENTS]
    assert table(tmp_path / "x.jsonl", events)["size"].startswith("4,000,000 of")


def test_summary_reads_past_a_truncated_last_line(tmp_path: Path, capsys):
    log = tmp_path / "x.jsonl"
    assert table(log, EVENTS[:-1], tail='{"event": "end", "sta')["status"] == "- (exit code -)"
    assert summary.main([str(log)]) == 0
    printed = capsys.readouterr().out
    assert "1.9047" in printed and "1 unreadable line(s)" in printed


def test_summary_exit_code_option(tmp_path: Path, capsys):
    log = tmp_path / "x.jsonl"
    table(log, [*EVENTS[:-1], {"event": "end", "status": "over_size", "exit_code": 3}])
    assert summary.main(["--exit-code", str(log)]) == 0 and capsys.readouterr().out == "3\n"
    table(log, EVENTS[:-1])
    assert summary.main(["--exit-code", str(log)]) == 1 and capsys.readouterr().out == ""
    assert summary.main([str(tmp_path / "none.jsonl")]) == 2


def test_the_values_of_the_summary_stand_under_each_other(tmp_path: Path, capsys):
    log = tmp_path / "x.jsonl"
    table(log, EVENTS)
    assert summary.main([str(log)]) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = [re.match(r"(\S+(?: \S+)*) {2,}", line) for line in lines]
    assert all(labels) and {label.end() for label in labels} == {max(len(label[1]) for label in labels) + 2}
