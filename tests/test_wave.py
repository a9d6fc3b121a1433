"""Waves: their words, what is refused before anything runs, the arms made by rule, the order of the runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt
from data.user_error import UserError
from sweeps.lab import wave_spec as wave
from sweeps.lab.wave_plan import expand, warnings_of
from sweeps.lab.wave_spec import CONTROL, PLACES, Sizes, parse_wave
from tests.conftest import ROOT
from tests.support.lab_rows import row, write_rows

PROXY = Sizes(cpu=True, proxy=True)
HEAD = "@question Why? @base tidal_1434"


def words(text: str) -> list[str]:
    """Words of a wave; an underscore stands for a space in a sentence."""
    return text.split()


def runs_of(text: str, sizes: Sizes = PROXY):
    return expand(parse_wave("w", words(text)), sizes)


def arms_of(text: str, sizes: Sizes = PROXY) -> dict[str, dict]:
    """Arm -> change, of the first seed."""
    return {run.arm.name: run.arm.change for run in runs_of(text, sizes) if run.arm.name != CONTROL}


def test_words_become_a_wave():
    arm = "@arm a because MLP_ACT=relu2 QK_GAIN_INIT=2"
    text = f"{HEAD} ITERATIONS=300 {arm} @control_every 5 @seeds 1 2 @decide so"
    found = parse_wave("w", words(text))
    assert (found.question, found.preset, found.base_changes) == (
        "Why?",
        "tidal_1434",
        (("ITERATIONS", "300"),),
    )
    assert found.arms == (wave.Arm("a", "because", dict(MLP_ACT="relu2", QK_GAIN_INIT="2")),)
    assert (found.control_every, found.seeds, found.decide) == (5, (1, 2), "so")


@pytest.mark.parametrize(
    "text, what",
    [
        ("@base baseline", "has no question"),
        ("@question q", "has no base"),
        ("stray @question q @base baseline", "not a word of a wave: stray"),
        (f"{HEAD} @arm a why MLP_ACT", "arm a: not KNOB=VALUE: MLP_ACT"),
        (f"{HEAD} @arm a MLP_ACT=relu2 QK_GAIN_INIT=2", "arm a: no hypothesis"),
        (f"{HEAD} @arm control why MLP_ACT=relu2", "arm 'control'"),
        (f"{HEAD} @arm a.b why MLP_ACT=relu2", "arm 'a.b'"),
        (f"{HEAD} @arm a why", "arm has 2 arguments"),
        (f"{HEAD} @arm a why SEED=3", "SEED is set by the engine"),
        (f"{HEAD} @arm a why MLP_ACT=relu2 MLP_ACT=gelu2", "MLP_ACT is set twice"),
        (f"{HEAD} @seeds 1 x", "seeds wants whole numbers"),
        (f"{HEAD} @seeds 1 1", "names a number twice"),
        (f"{HEAD} @seeds 1 @seeds 2", "seeds is said twice"),
        (f"{HEAD} @horizons 0 5", "horizons wants whole numbers of at least 1"),
    ],
)
def test_wrong_words_are_named(text, what):
    with pytest.raises(UserError, match=re.escape(what)) as error:
        parse_wave("w", words(text))
    assert all(len(line) < 160 for line in error.value.lines)


@pytest.mark.parametrize(
    "text, what",
    [
        ("@question q @base nothing", "unknown preset: nothing"),
        ("@question q @base proxy", "unknown preset: proxy"),
        (f"{HEAD} MATRX_LR=1", "base tidal_1434: MATRX_LR is not a knob; did you mean MATRIX_LR?"),
        (f"{HEAD} JOBS=1", "base tidal_1434: JOBS is not a knob"),
        (f"{HEAD} TRAIN_LOG_EVERY=0", "TRAIN_LOG_EVERY=0 hides the training loss"),
        (f"{HEAD} @arm a why MLP_ACT=silu3", "arm a: MLP_ACT='silu3' is not one of"),
        (f"{HEAD} @arm a why MATRIX_LR=x", "arm a: MATRIX_LR='x' is not a finite number"),
        (f"{HEAD} @arm a why COSINE_CYCLES=2", "arm a: COSINE_CYCLES has no effect without COSINE_LR=1"),
        (f"{HEAD} @arm a why COSINE_LR=1", "arm a: two schedules at once"),
        (f"{HEAD} @arm a why MODEL_DIM=100", "arm a: MODEL_DIM=100 is not a multiple of NUM_HEADS=8"),
        (f"{HEAD} @arm a why QK_GAIN_INIT=2 @arm a why QK_GAIN_INIT=3", "two arms are named a"),
        (f"{HEAD} @leave_one_out ROPE_BAS", "leave_one_out: ROPE_BAS is no knob that tidal_1434 sets"),
        (f"{HEAD} @leave_one_out @add_one_in", "wants a wave of its own"),
        ("@question q @base baseline @leave_one_out", "baseline sets nothing"),
        ("@question q @base baseline @add_one_in baseline", "baseline sets nothing"),
        (f"{HEAD} ITERATIONS=50 @horizons 50 100", "horizons sets ITERATIONS"),
    ],
)
def test_what_cannot_run_is_refused(text, what):
    with pytest.raises(UserError, match=re.escape(what)):
        runs_of(text)


def test_all_faults_of_all_arms_are_told_at_once_a_line_each():
    text = f"{HEAD} @arm a why MLP_ACT=no @arm b why QK_GAIN_INIT=2 @arm c why MATRX_LR=1"
    with pytest.raises(UserError) as error:
        runs_of(text)
    assert [line.split(":")[1].strip() for line in error.value.lines] == ["arm a", "arm c"]


def test_arms_that_are_the_same_experiment_are_found():
    twins = "@arm a why ROPE_BASE=5000.0 @arm b why MLP_ACT=relu2 @arm c why MLP_ACT=relu2"
    text = f"{HEAD} {twins} @arm d why EMA_DECAY=.9"
    assert {run.arm.name: run.duplicate_of for run in runs_of(text)} == dict(
        control="", a="control", b="", c="b", d=""
    )
    how = dict(VAL_LOSS_EVERY="7", COMPILE="0")
    place = " ".join(f"{name}={value}" for name, value in how.items())
    assert runs_of(f"{HEAD} @arm a why {place}")[1].duplicate_of == "control", "it changes no result"


def test_arms_that_do_not_fit_a_small_machine_are_named_and_not_run():
    arms = "@arm wide why MODEL_DIM=576 @arm deep why ENCODER_LAYERS=5 @arm kept why MLP_ACT=relu2"
    text = f"@question Why? @base baseline TIDAL_LR=1 {arms}"
    assert arms_of(text) == dict(kept=dict(MLP_ACT="relu2"))
    said = warnings_of(runs_of(text), parse_wave("w", words(text)), PROXY)
    assert said == [
        "w.wide: not run: MODEL_DIM is not the preset's at these sizes",
        "w.deep: not run: ENCODER_LAYERS must not exceed NUM_LAYERS",
    ]
    assert set(arms_of(text, Sizes())) == {"wide", "deep", "kept"}


def test_a_presets_knob_that_a_wave_leaves_idle_is_left_out():
    """proxy/baseline.env has WARMDOWN_FRAC, idle under Tidal; an idle knob of the wave itself is told."""
    assert (
        "WARMDOWN_FRAC"
        not in runs_of("@question Why? @base baseline TIDAL_LR=1 @arm a why QK_GAIN_INIT=2")[0].env
    )
    with pytest.raises(UserError, match="WARMDOWN_FRAC has no effect"):
        runs_of("@question Why? @base baseline TIDAL_LR=1 WARMDOWN_FRAC=0.2 @arm a why QK_GAIN_INIT=2")


def test_seeds_are_outer_and_the_control_comes_first_and_again():
    arms = " ".join(f"@arm a{i} why QK_GAIN_INIT={i}" for i in range(2, 7))
    order = [run.run_id for run in runs_of(f"{HEAD} {arms} @control_every 2 @seeds 9 8")]
    one = "control.{} a2.{} a3.{} control.{}.r1 a4.{} a5.{} control.{}.r2 a6.{}"
    assert order == [f"w.{name}" for seed in "98" for name in one.replace("{}", seed).split()]
    for run in runs_of(f"{HEAD} @seeds 9"):
        assert run.env["SEED"] == "9" and not run.env.keys() & (set(PLACES) - {"SEED"})


@pytest.mark.parametrize("preset", wave.preset_names())
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(cpu=True), PROXY], ids=["gpu", "cpu", "proxy"])
def test_every_preset_makes_a_wave_and_every_arm_made_by_rule_is_another_experiment(preset, sizes):
    """configured() refuses a knob without effect, so each arm acts whole."""
    text = f"@question q @base {preset}"
    base = runs_of(text, sizes)[0]
    made = []
    if preset != "baseline":
        made = [run for run in runs_of(f"{text} @leave_one_out", sizes) if not run.is_control]
        assert len(made) >= 2
        if preset != "best":  # there the base is at another length than the preset
            made += [r for r in runs_of(f"@question q @base baseline @add_one_in {preset}", sizes)[1:]]
    for run in made:
        kind, _, knob = run.arm.name.partition("_")
        changed = getattr(run.cfg, knob) != getattr(base.cfg, knob)
        assert changed == (kind == "no") and knob.upper() in run.arm.change and not run.duplicate_of


def test_leave_one_out_takes_what_acts_only_together():
    arms = arms_of(f"{HEAD} @leave_one_out")
    assert arms["no_mlp_act"] == dict(MLP_ACT="relu2")
    assert arms["no_tie_embeddings"] == dict(TIE_EMBEDDINGS="1", EMBED_LR="0.6"), "its rate goes with it"
    assert arms["no_tidal_lr"] == dict(TIDAL_LR="0", WARMDOWN_FRAC="0.087"), "the baseline's warm-down comes"
    assert not {"no_iterations", "no_model_dim", "no_warmdown_frac"} & arms.keys()
    deep = arms_of("@question q @base progressive_depth @leave_one_out")
    assert deep["no_num_repeats"] == dict(NUM_REPEATS="1", PROG_DEPTH="")
    assert deep["no_mlp_act"] == dict(MLP_ACT="relu2", LEAKY_SLOPE="0.01")


def test_leave_one_out_leaves_the_base_line_and_what_is_written_by_hand():
    text = f"{HEAD} MATRIX_LR=0.05 @arm no_mlp_act mine MLP_ACT=gelu2 @leave_one_out"
    arms = arms_of(text)
    assert arms["no_mlp_act"] == dict(MLP_ACT="gelu2") and "no_matrix_lr" not in arms
    assert list(arms_of(f"{HEAD} @leave_one_out ROPE_BASE MLP_ACT")) == ["no_mlp_act", "no_rope_base"]


def test_add_one_in_brings_what_a_knob_needs_and_no_more():
    turned, named = (
        arms_of(f"{HEAD} @add_one_in"),
        arms_of("@question q @base baseline @add_one_in tidal_1434"),
    )
    assert turned == named
    assert turned["with_tie_embeddings"] == dict(TIE_EMBEDDINGS="0")
    assert turned["with_embed_lr"] == dict(EMBED_LR="0.8", TIE_EMBEDDINGS="0")
    assert turned["with_tidal_lr"] == dict(TIDAL_LR="1", WARMDOWN_FRAC="0")
    assert runs_of(f"{HEAD} @add_one_in")[0].wave.preset == "baseline"


def test_horizons_are_waves_of_their_own():
    runs = runs_of(f"{HEAD} @arm a why MLP_ACT=relu2 @horizons 400 100 @seeds 5")
    assert [run.run_id for run in runs] == [
        "w_h100.control.5",
        "w_h100.a.5",
        "w_h400.control.5",
        "w_h400.a.5",
    ]
    assert [run.cfg.iterations for run in runs] == [100, 100, 400, 400]
    shares = {run.cfg.train_log_every / run.cfg.iterations for run in runs}
    assert len(shares) == 1, "logged as often in the run"
    validating = runs_of("@question Why? @base lower_lr @horizons 400 100 @seeds 5", Sizes())
    assert [run.cfg.val_loss_every for run in validating] == [1, 4], "validated as often in the run"


def test_sizes_are_laid_as_run_best_lays_them():
    gpu, cpu, proxy = (
        runs_of("@question q @base progressive_depth", s)[0].cfg for s in (Sizes(), Sizes(cpu=True), PROXY)
    )
    assert (gpu.model_dim, gpu.num_layers) == (832, 3)
    assert (cpu.model_dim, cpu.num_layers, cpu.warmdown_iters) == (256, 2, 45), "a preset's own sizes win"
    assert (proxy.model_dim, proxy.num_layers, proxy.num_repeats) == (96, 2, 4)
    assert proxy.max_wallclock_seconds == 0 and proxy.data_shuffle and proxy.device == "cpu"


def test_a_warm_down_longer_than_the_run_is_warned_of():
    text = f"{HEAD} @arm a why TIDAL_LR=0"
    assert re.search(r"^w\.a: WARMDOWN_ITERS=1200 is longer", *warnings_of(runs_of(text)))
    assert not warnings_of(runs_of(f"{HEAD} @arm a why TIDAL_LR=0 WARMDOWN_FRAC=0.2"))


def test_every_wave_in_the_repository_is_valid():
    """The words a script collects, with a Python that prints them in place of the engine."""
    for path in sorted((ROOT / "sweeps").glob("*.sh")):
        if "run_wave" not in path.read_text() or path.name == "lib.sh":
            continue
        fake = 'use_python() { PYTHON=printf; }; set -- ; run_wave() { printf "%s\\0" "${words[@]}"; }'
        text = path.read_text().replace('source "$(dirname "$0")/lib.sh"', f"source sweeps/lib.sh; {fake}")
        run = subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
        found = parse_wave(path.stem, run.stdout.split("\0")[:-1])
        for sizes in (Sizes(), PROXY):
            assert expand(found, sizes)


def script_of(folder: Path, *lines: str) -> Path:
    """A wave's script in a folder of its own."""
    script = folder / "w.sh"
    script.write_text("\n".join([f'source "{ROOT}/sweeps/lib.sh"', *lines]) + "\n")
    return script


def test_a_misused_word_ends_the_script(tmp_path):
    script = script_of(tmp_path, "arm only_a_name")
    run = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == 'w.sh: usage: arm NAME "HYPOTHESIS" KNOB=VALUE ...\n'


@pytest.mark.parametrize(
    "word, said",
    [
        ("armm", "did you mean arm?"),
        ("sedes", "did you mean seeds?"),
        ("leave_one_in", "did you mean leave_one_out?"),
        ("xyzzy", "the words: question base arm"),
    ],
)
def test_a_misspelt_word_ends_the_script_with_a_suggestion(word, said, tmp_path):
    script = script_of(tmp_path, f'{word} a "b" MLP_ACT=relu2', "echo went on")
    run = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"w.sh: {word} is no word of a wave; {said}") and run.stderr.count("\n") == 1


def test_a_misspelt_word_of_the_engine_has_a_suggestion_too():
    with pytest.raises(UserError, match="not a word of a wave: @armm; did you mean arm"):
        parse_wave("w", ["@armm", "a"])


def wave_environment() -> dict[str, str]:
    """An environment without knobs, whose first Python is this one."""
    env = {name: value for name, value in os.environ.items() if name not in wave.KNOBS}
    return env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def test_a_wave_outside_of_the_project_works_and_paths_mean_what_they_mean_there(tmp_path):
    here = tmp_path / "a place"
    here.mkdir()
    write_rows(here / "mine/w.jsonl", [row("control", 1, 2.0, wave="w")])
    script_of(here, 'question "Why?"', "base baseline", "seeds 1 2", 'run_wave "$@"')
    command = ["bash", "w.sh", "--plan", "--proxy", "--results", "mine"]
    run = subprocess.run(command, cwd=here, env=wave_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "to do     1, " in run.stdout, "a finished run is in the results beside the script"


def test_the_worked_example_of_the_page_is_a_wave(tmp_path):
    """README.md of sweeps/ shows a wave of two arms, and what its plan says."""
    page = (ROOT / "sweeps/README.md").read_text(encoding="utf-8")
    example = re.search(r"```\n(#!/usr/bin/env bash\n.*?)```", page, re.S)[1]
    assert example.count("\narm ") == 2 and "source sweeps/lib.sh" in example
    script = tmp_path / "rates.sh"
    script.write_text(example)
    command = ["bash", str(script), "--plan", "--proxy", "--results", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=wave_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    plan = run.stdout[run.stdout.index("question  ") :]
    planned = plan.partition("\nto do")[0]
    assert planned in page, planned


def test_the_proxy_is_of_whole_knobs():
    env = wave.read_preset(wave.PRESETS / "proxy.env")
    assert set(train_gpt.Config.from_env(env).overrides()) <= env.keys()
