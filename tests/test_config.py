"""Knobs: what parses, what is refused in one line, what makes two runs the same experiment."""

import re
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from tests.conftest import ROOT, as_text, show
from train_gpt import Config, RunError

NAMES = [f.name.upper() for f in fields(Config)]
FIELDS = {f.name.upper(): f for f in fields(Config)}

OFFICIAL = dict(
    DATA_PATH="./data/datasets/fineweb10B_sp1024", TOKENIZER_PATH="./data/tokenizers/fineweb_1024_bpe.model",
    SEED=1337, VAL_BATCH_SIZE=524288, VAL_LOSS_EVERY=1000, TRAIN_LOG_EVERY=200, ITERATIONS=20000,
    WARMDOWN_ITERS=1200, WARMUP_STEPS=20, TRAIN_BATCH_TOKENS=524288, TRAIN_SEQ_LEN=1024,
    MAX_WALLCLOCK_SECONDS=600, QK_GAIN_INIT=1.5, VOCAB_SIZE=1024, NUM_LAYERS=9, MODEL_DIM=512, NUM_HEADS=8,
    NUM_KV_HEADS=4, MLP_MULT=2, TIE_EMBEDDINGS=True, TIED_EMBED_INIT_STD=0.005, ROPE_BASE=10000,
    LOGIT_SOFTCAP=30, EMBED_LR=0.6, HEAD_LR=0.008, TIED_EMBED_LR=0.05, MATRIX_LR=0.04, SCALAR_LR=0.04,
    MUON_MOMENTUM=0.95, MUON_MOMENTUM_WARMUP_START=0.85, MUON_MOMENTUM_WARMUP_STEPS=500,
    MUON_BACKEND_STEPS=5, BETA1=0.9, BETA2=0.95, ADAM_EPS=1e-8, GRAD_CLIP_NORM=0,
)  # fmt: skip
PR_1434 = dict(
    PARALLEL_BLOCK=False, MLP_ACT="relu2", SANDWICH_NORM=False, ENCODER_LAYERS=-1, EMBED_SCALE=0,
    HEAD_DIVERSITY=0, TIDAL_LR=False, COSINE_LR=False, COSINE_CYCLES=1, GOLDEN_LR=False, LEAKY_SLOPE=0.01,
)  # fmt: skip
OF_THE_PLACE = """
SEED DATA_PATH TOKENIZER_PATH OUT_DIR RUN_ID DEVICE COMPILE WARMUP_STEPS MICRO_BATCH_TOKENS VAL_BATCH_SIZE
VAL_LOSS_EVERY TRAIN_LOG_EVERY MAX_EVAL_SECONDS EVAL_ONLY ALLOW_INERT ALLOW_ENV"""
CONTROL_TENSORS = {"attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight"}

TORCHRUN = """
RANK=0 LOCAL_RANK=0 WORLD_SIZE=8 LOCAL_WORLD_SIZE=8 GROUP_RANK=0 GROUP_WORLD_SIZE=1 ROLE_RANK=0
ROLE_NAME=default ROLE_WORLD_SIZE=8 MASTER_ADDR=localhost MASTER_PORT=29500
TORCHELASTIC_RUN_ID=x TORCHELASTIC_MAX_RESTARTS=0
TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_ERROR_FILE=/e
TORCH_NCCL_ASYNC_ERROR_HANDLING=1"""
NVIDIA = """
NCCL_IB_DISABLE=1 NCCL_DEBUG=INFO NCCL_NET=Socket NCCL_VERSION=2.21 CUDA_VISIBLE_DEVICES=0 CUDA_HOME=/c
CUDA_VERSION=12.4 CUDA_LAUNCH_BLOCKING=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_REQUIRE_CUDA=x NVARCH=x86_64
NV_CUDA_LIB_VERSION=12 CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"""
RUNPOD = """
RUNPOD_POD_ID=x RUNPOD_GPU_COUNT=8 RUNPOD_MEM_GB=2000 RUNPOD_API_KEY=x RUNPOD_DC_ID=x RUNPOD_VOLUME_ID=x
RUNPOD_PUBLIC_IP=x RUNPOD_TCP_PORT_22=1 PUBLIC_KEY=x JUPYTER_PASSWORD=x JUPYTER_PORT=8888"""
CI = """
CI=true GITHUB_ACTIONS=true GITHUB_SHA=0 GITHUB_HEAD_REF=x GITHUB_RUN_ID=1 RUNNER_OS=Linux RUNNER_TEMP=/t
CI_JOB_ID=1 CI_COMMIT_SHA=0 BUILD_ID=1 DEBIAN_FRONTEND=noninteractive MAX_JOBS=4 NUM_WORKERS=2 CC=gcc"""
SHELL = """
PATH=/bin HOME=/root USER=root SHELL=/bin/bash PWD=/ OLDPWD=/ SHLVL=1 LANG=C LC_ALL=C TERM=xterm HOSTNAME=h
LOGNAME=root MAIL=/m EDITOR=vi TMPDIR=/t TZ=UTC DISPLAY=:0 XDG_RUNTIME_DIR=/x SSH_CONNECTION=x _=/bin/x"""
PYTHON = """
PYTHONPATH=. PYTHONHASHSEED=0 VIRTUAL_ENV=/v CONDA_PREFIX=/c PIP_INDEX_URL=u PIP_NO_CACHE_DIR=1
UV_CACHE_DIR=/u PYTEST_CURRENT_TEST=t HF_HOME=/h HF_TOKEN=x WANDB_MODE=off WANDB_PROJECT=x"""
THREADS = """
OMP_NUM_THREADS=1 OMP_PROC_BIND=close MKL_NUM_THREADS=1 KMP_AFFINITY=x TORCH_LOGS=recompiles
TORCHINDUCTOR_CACHE_DIR=/t TRITON_CACHE_DIR=/t TORCH_COMPILE_DISABLE=1 SLURM_JOB_ID=1 SLURM_NTASKS=8"""

# PR #1434, waves 5 to 12: a word without "=" stands for these.
SHORT = dict(
    Q15="TIDAL_LR=1 ROPE_BASE=5000 LOGIT_SOFTCAP=15", Q20="TIDAL_LR=1 ROPE_BASE=5000 LOGIT_SOFTCAP=20",
    Q="TIDAL_LR=1 ROPE_BASE=5000", X="HEAD_DIVERSITY=1e-4 EMBED_LR=0.8", P="PARALLEL_BLOCK=1",
    S2="MLP_ACT=silu2", LEAKY="MLP_ACT=leaky_relu2", M06="MATRIX_LR=0.06", M08="MATRIX_LR=0.08",
    M10="MATRIX_LR=0.10", M11="MATRIX_LR=0.11", E1="ENCODER_LAYERS=1", KV1="NUM_KV_HEADS=1",
    KV2="NUM_KV_HEADS=2", UNTIED="TIE_EMBEDDINGS=0",
)  # fmt: skip
WAVES = """
A1 Q20 LEAKY | A2 COSINE_LR=1 LEAKY | A3 Q20 MLP_ACT=swiglu | A4 COSINE_LR=1 MLP_ACT=swiglu
A5 Q20 MLP_ACT=gelu2 | A6 Q20 S2 | A7 Q20 P | A8 COSINE_LR=1 P | A9 Q20 SANDWICH_NORM=1 | A10 Q20 P LEAKY
A11 Q20 P MLP_ACT=swiglu | A12 Q20 LEAKY X M06 | A13 Q20 MLP_ACT=swiglu X M06 | A14 Q20 LEAKY P X M06
A15 Q20 LEAKY MLP_MULT=3 | A16 Q20 MLP_ACT=swiglu MODEL_DIM=576 NUM_LAYERS=8
A17 Q20 LEAKY KV2 | A18 Q20 LEAKY KV1
B1 Q20 P X M06 | B2 Q20 P NUM_LAYERS=10 | B3 Q20 P NUM_LAYERS=10 X M06 | B4 Q20 P S2 X M06
B5 Q20 P X M06 QK_GAIN_INIT=2.0
C1 Q20 P KV1 | C2 Q20 P S2 KV1 X M06 | C3 Q20 P S2 KV1 NUM_HEADS=16 X M06 | C4 Q15 P S2 X M06
C5 Q P S2 X M06 LOGIT_SOFTCAP=25 | C6 Q P S2 X M06 LOGIT_SOFTCAP=18
C7 TIDAL_LR=1 ROPE_BASE=3000 LOGIT_SOFTCAP=20 P S2 X M06
C8 TIDAL_LR=1 ROPE_BASE=7500 LOGIT_SOFTCAP=20 P S2 X M06
C9 Q20 P S2 HEAD_DIVERSITY=1e-4 EMBED_LR=1.0 M06 | C10 Q20 P S2 X M08
C11 Q20 P S2 HEAD_DIVERSITY=1e-4 EMBED_LR=1.0 M08 | C13 Q20 P S2 HEAD_DIVERSITY=1e-3 EMBED_LR=0.8 M06
C14 Q20 P S2 EMBED_LR=0.8 M06
D1 Q P S2 X M08 LOGIT_SOFTCAP=18 | D2 Q15 P S2 X M08 | D3 Q20 P S2 EMBED_LR=0.8 M08
D4 Q20 P S2 X M08 ENCODER_LAYERS=3 | D5 Q20 P S2 X M08 ENCODER_LAYERS=2 | D6 Q20 P S2 X M08 E1
D7 Q20 P S2 X M08 ENCODER_LAYERS=5 | D8 Q P S2 X M08 ENCODER_LAYERS=3 LOGIT_SOFTCAP=18
D9 Q P S2 X M08 ENCODER_LAYERS=2 LOGIT_SOFTCAP=18 | D10 Q20 P S2 X M08
E1 Q15 P S2 X M08 E1 | E2 Q P S2 X M08 E1 LOGIT_SOFTCAP=18 | E3 Q P S2 X M08 E1 LOGIT_SOFTCAP=12
E4 Q20 P S2 X M10 E1 | E5 Q20 P S2 X MATRIX_LR=0.12 E1 | E6 Q20 P X M08 E1
E7 Q20 P S2 X M08 E1 QK_GAIN_INIT=2.0
E8 Q15 P S2 X M10 E1 | E9 Q15 P S2 X M08 E1 QK_GAIN_INIT=2.0 | E10 Q20 P S2 X M08 E1
F1 Q P S2 X M10 E1 LOGIT_SOFTCAP=13 | F2 Q P S2 X M10 E1 LOGIT_SOFTCAP=14
F3 Q P S2 X M10 E1 LOGIT_SOFTCAP=16
F4 Q P S2 X M10 E1 LOGIT_SOFTCAP=17 | F5 Q15 P S2 X MATRIX_LR=0.09 E1 | F6 Q15 P S2 X M11 E1
F7 Q15 P S2 X M10 E1 KV2
F8 Q15 P S2 X M10 E1 TIDAL_WARMUP=0.30 | F9 Q15 P S2 X M10 E1 QK_GAIN_INIT=2.0 | F10 Q15 P S2 X M10 E1
G1 Q15 P S2 X M11 E1 UNTIED
H1 Q15 P S2 X M11 KV2 UNTIED ENCODER_LAYERS=0 | H2 Q15 P S2 X M11 KV2 UNTIED E1 MLP_MULT=3
H3 Q15 P S2 X M11 KV2 UNTIED ENCODER_LAYERS=0 MLP_MULT=3 | H6 Q15 P S2 X M11 KV2 UNTIED E1
C12 ROPE_BASE=5000 LOGIT_SOFTCAP=20 P S2 X M06 BREATHING_LR=1 | G3 Q15 P S2 X M11 E1 WD_SCHEDULE=.01
H4 Q15 P S2 X M11 KV2 UNTIED E1 WD_SCHEDULE=.04
H5 Q15 P S2 X M11 KV2 UNTIED ENCODER_LAYERS=0 MLP_MULT=3 WD_SCHEDULE=.04
"""
PUBLISHED = dict(
    run_best="ITERATIONS=400 TIDAL_LR=1 LOGIT_SOFTCAP=15 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 "
    "HEAD_DIVERSITY=1e-4 EMBED_LR=0.8 MATRIX_LR=0.11 ENCODER_LAYERS=0 NUM_KV_HEADS=2 TIE_EMBEDDINGS=0",
    lower_lr="MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 VAL_LOSS_EVERY=200 TRAIN_LOG_EVERY=50",
    readme="RUN_ID=baseline_sp1024 DATA_PATH=./data/datasets/fineweb10B_sp1024/ "
    "TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model VOCAB_SIZE=1024",
    readme_eight_gpus="NCCL_IB_DISABLE=1 RUN_ID=hf_verify_sp1024_8gpu DATA_PATH=/d TOKENIZER_PATH=/t.model "
    "VOCAB_SIZE=1024 MAX_WALLCLOCK_SECONDS=600 TRAIN_LOG_EVERY=50 VAL_LOSS_EVERY=200",
    readme_small="RUN_ID=mlx_smoke ITERATIONS=200 TRAIN_BATCH_TOKENS=8192 VAL_LOSS_EVERY=0 "
    "VAL_BATCH_SIZE=8192",
    naive_baseline="NUM_LAYERS=9 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2 TIE_EMBEDDINGS=1 "
    "TIED_EMBED_LR=0.05 ITERATIONS=20000 WARMUP_STEPS=20 TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024",
    pr895="MAX_WALLCLOCK_SECONDS=14400 ITERATIONS=200000 NUM_REPEATS=5 PROG_DEPTH=0.3:2,0.5:3,0.75:4,1.0:5 "
    "WARMDOWN_ITERS=15000 SWA_EVERY=100 SWA_ENABLED=1 MATRIX_LR=0.015 SCALAR_LR=0.015 TIED_EMBED_LR=0.018 "
    "VAL_LOSS_EVERY=5000 TRAIN_LOG_EVERY=1000",
    pr1453="QUANT_LEVELS=63 MLP_QUANT_LEVELS=16 MODEL_DIM=880 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 "
    "NUM_LAYERS=3 NUM_REPEATS=4 XSA_LAST_N=4 NUM_VALUE_EMBEDS=2 PROG_DEPTH=0.30:2,0.50:3,1.0:4 "
    "WARMDOWN_ITERS=3000 SWA_ENABLED=1 SWA_START_FRAC=0.6 SWA_EVERY=30",
    four_hours="RUN_ID=train_pgut3 ITERATIONS=500000 MAX_WALLCLOCK_SECONDS=14400 VAL_LOSS_EVERY=20000",
)


def assignments(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


def runs(waves: str) -> dict[str, dict[str, str]]:
    """Arm name -> its environment, as the wave scripts ran it."""
    arms = [arm.split() for arm in waves.strip().replace("\n", "|").split("|")]
    spell = {name: " ".join(SHORT.get(word, word) for word in words) for name, *words in arms}
    return {name: assignments(f"ITERATIONS=400 {line}") for name, line in spell.items()}


def preset(path) -> dict[str, str]:
    return assignments(" ".join(line for line in path.read_text().splitlines() if not line.startswith("#")))


def refusal(env: dict[str, str]) -> str:
    """The one line with which an environment is refused."""
    with pytest.raises(RunError) as caught:
        Config.from_env(env)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def other_value(f, value):
    """A legal value of the knob that is not `value`."""
    if f.metadata["choices"]:
        return next(choice for choice in f.metadata["choices"] if choice != value)
    if isinstance(value, bool):
        return not value
    fitting = dict(
        prog_depth="0.5:1,1:2",
        rope_dims=8,
        loop_start=4,
        loop_end=6,
        bigram_vocab_size=64,
        gptq_reserve_seconds=0.5,
        train_seq_schedule="512@0.5,1024@1.0",
        size_target="auto",
        ttt_eval_seq_len=64,
    )
    if f.name in fitting and value != fitting[f.name]:
        return fitting[f.name]  # that fits the config in which the knob acts
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, "x")
    low, high = f.metadata["low"], f.metadata["high"]
    near = [type(value)(x) for x in (2 * value, value / 2, value + 1, value + 0.25)]
    return next(x for x in near if x != value and (low is None or x >= low) and (high is None or x <= high))


def needs_of(f) -> list[tuple[str, object, object]]:
    """(field name, a value that meets it, one that does not) for each condition of a knob."""
    found = []
    for name, operator, text, _ in train_gpt.needs_of(f):
        value = train_gpt.parse_knob(FIELDS[name], text)
        pair = value, other_value(FIELDS[name], value)
        found.append((name.lower(), *(pair[::-1] if operator == "!=" else pair)))
    return found


def acting_config(f) -> Config:
    return replace(base_config(f), **{name: met for name, met, _ in needs_of(f)})


def base_config(f) -> Config:
    """All defaults; without a clock where the knob leads to GPTQ, which else asks for time to be kept."""
    names = [f.name, *(name for name, *_ in needs_of(f))]
    return Config(max_wallclock_seconds=0.0) if "gptq_calibration_batches" in names else Config()


# --- defaults and parsing ------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", {**OFFICIAL, **PR_1434}.items())
def test_defaults_are_the_published_ones(name, value):
    assert FIELDS[name].default == value


@pytest.mark.parametrize("name", ["CONTROL_TENSOR_NAME_PATTERNS", "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"])
def test_default_name_patterns_cover_the_official_control_tensors(name):
    assert set(FIELDS[name].default) >= CONTROL_TENSORS


def test_no_environment_gives_the_defaults():
    assert Config.from_env({}) == Config() and Config().overrides() == {}


def test_values_take_the_type_of_their_knob():
    env = dict(SEED="7", MATRIX_LR="3e-2", TIDAL_LR="1", TRAIN_BATCH_TOKENS="262_144", ALLOW_ENV="A,B")
    cfg = Config.from_env(env)
    assert cfg.overrides() == dict(
        SEED=7, MATRIX_LR=0.03, TIDAL_LR=True, TRAIN_BATCH_TOKENS=262144, ALLOW_ENV=("A", "B")
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_value_survives_being_written_and_read(name):
    f = FIELDS[name]
    for value in (f.default, other_value(f, f.default)):
        assert train_gpt.parse_knob(f, as_text(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_is_read_exactly(value):
    assert train_gpt.parse_knob(FIELDS["QK_GAIN_INIT"], repr(value)) == value


@pytest.mark.parametrize(
    "line, reason",
    [
        ("MATRIX_LR=nan", "MATRIX_LR='nan' is not a finite number"),
        ("MATRIX_LR=inf", "MATRIX_LR='inf' is not a finite number"),
        ("MAX_WALLCLOCK_SECONDS=-inf", "is not a finite number"),
        ("MATRIX_LR=fast", "MATRIX_LR='fast' is not a finite number"),
        ("MATRIX_LR=", "MATRIX_LR='' is not a finite number"),
        ("MATRIX_LR=0,04", "is not a finite number"),
        ("ITERATIONS=1e3", "ITERATIONS='1e3' is not a whole number"),
        ("NUM_LAYERS=nine", "NUM_LAYERS='nine' is not a whole number"),
        ("TIDAL_LR=yes", "TIDAL_LR='yes' is not 0 or 1"),
        ("TIDAL_LR=2", "TIDAL_LR='2' is not 0 or 1"),
        ("MATRIX_LR=-1", "MATRIX_LR=-1.0 is below 0"),
        ("NUM_LAYERS=0", "NUM_LAYERS=0 is below 1"),
        ("ITERATIONS=-1", "ITERATIONS=-1 is below 0"),
        ("VOCAB_SIZE=70000", "VOCAB_SIZE=70000 is above 65536"),
        ("ZSTD_LEVEL=23", "ZSTD_LEVEL=23 is above 22"),
        ("MUON_MOMENTUM=1.5", "MUON_MOMENTUM=1.5 is above 1"),
        ("TIDAL_LR=1 TIDAL_WARMUP=1", "TIDAL_WARMUP=1.0 is above"),
        ("MLP_ACT=gelu", "MLP_ACT='gelu' is not one of relu2, leaky_relu2, gelu2, silu2, swiglu"),
        ("CODEC=lzma", "CODEC='lzma' is not one of zstd, zlib, brotli, rans"),
        ("DTYPE=float16", "DTYPE='float16' is not one of"),
        ("DEVICE=tpu", "DEVICE='tpu' is not one of"),
        ("NUM_HEADS=3", "MODEL_DIM=512 is not a multiple of NUM_HEADS=3"),
        ("NUM_KV_HEADS=3", "NUM_HEADS=8 is not a multiple of NUM_KV_HEADS=3"),
        ("TRAIN_SEQ_LEN=1000", "TRAIN_BATCH_TOKENS=524288 is not a multiple of TRAIN_SEQ_LEN=1000"),
        ("MODEL_DIM=24", "MODEL_DIM/NUM_HEADS=3 must be even"),
        ("ENCODER_LAYERS=10", "ENCODER_LAYERS must not exceed NUM_LAYERS"),
        ("RUN_ID=a/b", "RUN_ID='a/b'"),
        ("TIDAL_LR=1 COSINE_LR=1", "two schedules at once: TIDAL_LR, COSINE_LR"),
        ("SEED=4294967296", "SEED=4294967296"),  # numpy takes 32 bits
        ("BETA1=1", "BETA1=1.0"),  # Adam divides by 1 - beta
        ("BETA2=1", "BETA2=1.0"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(line, reason):
    assert reason in refusal(assignments(line))


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("MATRX_LR", "MATRIX_LR"),
        ("MATRIX_LRS", "MATRIX_LR"),
        ("TIED_EMBD_LR", "TIED_EMBED_LR"),
        ("WARMDOWN_ITER", "WARMDOWN_ITERS"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("ITERATION", "ITERATIONS"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("LOGIT_SOFT_CAP", "LOGIT_SOFTCAP"),
        ("TIE_EMBEDDING", "TIE_EMBEDDINGS"),
        ("ENCODER_LAYER", "ENCODER_LAYERS"),
        ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
        ("INT8_KEEP_FLOAT_FP32_NAME_PATTERN", "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"),
    ],
)
def test_a_misspelt_knob_is_refused_with_the_right_name(wrong, right):
    assert re.match(rf"{wrong} is not a knob; did you mean {right}\?", refusal({wrong: "1"}))


@pytest.mark.parametrize("name", [name for name in NAMES if len(name) > 5])  # shorter ones leave common words
def test_a_knob_that_lacks_its_last_letter_is_not_ignored(name):
    assert refusal({name[:-1]: "1"}).startswith(name[:-1])


@pytest.mark.parametrize("name", ["MUON_MOMENTUM_WARMUP", "MUON_WEIGHT_DECAY", "TIDAL_FLOOR", "TRAIN_STEPS"])
def test_a_name_that_starts_like_our_knobs_is_refused(name):
    assert refusal({name: "1"}).startswith(f"{name} is not a knob")


@pytest.mark.parametrize(
    "env", [TORCHRUN, NVIDIA, RUNPOD, CI, SHELL, PYTHON, THREADS],
    ids=["torchrun", "nvidia", "runpod", "ci", "shell", "python", "threads"],
)  # fmt: skip
def test_other_peoples_variables_are_left_alone(env):
    assert Config.from_env({**assignments(env), "SEED": "3"}).overrides() == dict(SEED=3)


CLUSTER = """
MODEL_DIR=/m TRAIN_DIR=/t EVAL_DIR=/e HEAD_NODE_IP=10.0.0.1 HEAD_NODE=n1 HEAD_NODE_PORT=6379 COMPILER=gcc
MLP_WORKER_0_HOST=h MLP_WORKER_NUM=2 MLP_ROLE_INDEX=0 TRAIN_SCRIPT=x.py EVAL_JOB_ID=7 TRAIN_IMAGE=i
VAL_FILE=v"""


@pytest.mark.parametrize("name", assignments(CLUSTER))
def test_variables_of_clusters_are_left_alone(name):
    assert Config.from_env({name: "1"}).overrides() == {}


@pytest.mark.parametrize(
    "name", ["MODEL_DIN", "COMPILE_", "COMPIL", "TRAIN_SEQ_LENGTH", "HEAD_L", "EVAL_STEPS"]
)
def test_a_near_miss_is_not_taken_for_a_variable_of_a_cluster(name):
    assert refusal({name: "1"}).startswith(f"{name} is not a knob")


def test_allow_env_names_what_to_ignore():
    assert "ALLOW_ENV=MUON_TEAM ignores it" in refusal(dict(MUON_TEAM="x"))
    cfg = Config.from_env(dict(MUON_TEAM="x", MATRX_LR="1", ALLOW_ENV="MUON_TEAM,MATRX_LR"))
    assert cfg.matrix_lr == Config().matrix_lr
    assert refusal(dict(MUON_TEAM="x", MUON_CLUB="x", ALLOW_ENV="MUON_TEAM")).startswith("MUON_CLUB")


# --- knobs without effect ------------------------------------------------------------------------

CONDITIONAL = [name for name in NAMES if FIELDS[name].metadata["needs"]]


def unmet_config(f) -> Config:
    """A config in which the first condition of the knob does not hold, and that runs."""
    name, _, unmet = needs_of(f)[0]
    return replace(base_config(f), **{name: unmet})


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_knob_without_effect_is_an_error_or_a_warning(name):
    f = FIELDS[name]
    context = {k: as_text(v) for k, v in unmet_config(f).overrides().items()}
    env = context | {name: as_text(other_value(f, f.default))}
    need = train_gpt.needs_of(f)[0]
    assert f"{name} has no effect without {need}" in refusal(env)
    warned = Config.from_env(env | dict(ALLOW_INERT="1")).inert()
    assert f"{name} has no effect without {need}" in warned
    assert Config.from_env(context | {name: as_text(f.default)}).inert() == []


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_knob_whose_conditions_hold_is_not_inert(name):
    f = FIELDS[name]
    cfg = replace(acting_config(f), **{f.name: other_value(f, f.default)})
    assert not any(phrase.startswith(name) for phrase in cfg.inert())
    assert name in cfg.effective() or f.metadata["role"] == "place"


# --- what makes two runs the same experiment -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_hash_follows_exactly_the_knobs_that_act(name):
    f, base = FIELDS[name], acting_config(FIELDS[name])
    changed = replace(base, **{f.name: other_value(f, getattr(base, f.name))})
    acts = f.metadata["role"] != "place"
    assert (changed.hash != base.hash) == acts
    assert (name in changed.effective()) == acts


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_hash_ignores_a_knob_without_effect(name):
    f, base = FIELDS[name], unmet_config(FIELDS[name])
    assert replace(base, **{f.name: other_value(f, f.default)}).hash == base.hash


@pytest.mark.parametrize("name", OF_THE_PLACE.split())
def test_seed_paths_and_machine_do_not_make_another_experiment(name):
    assert FIELDS[name].metadata["role"] == "place"


def test_the_hash_is_of_values_not_of_spelling():
    texts = ("0.04", "4e-2", "0.0400")
    assert len({Config.from_env(dict(MATRIX_LR=text)).hash for text in texts}) == 1


def test_model_knobs_off_their_default_are_stored_with_the_artifact_and_they_only():
    shape = dict(num_layers=4, model_dim=384, mlp_act="silu2", logit_softcap=15.0, train_seq_len=512)
    others = dict(seed=7, matrix_lr=0.1, codec="zlib", data_path="/d", num_heads=8)
    assert Config(**shape, **others).shape() == shape
    assert Config().shape() == {}


# --- published command lines ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_run_unchanged(name):
    env = assignments(PUBLISHED[name])
    cfg = Config.from_env({**env, **assignments(TORCHRUN)})
    for key in env.keys() & set(NAMES):
        assert getattr(cfg, key.lower()) == train_gpt.parse_knob(FIELDS[key], env[key])


@pytest.mark.parametrize("name", runs(WAVES))
def test_the_runs_of_waves_5_to_12_parse(name):
    env = runs(WAVES)[name]
    cfg = Config.from_env(env | dict(ALLOW_INERT="1"))
    assert {key: getattr(cfg, key.lower()) for key in env} == {
        key: train_gpt.parse_knob(FIELDS[key], env[key]) for key in env
    }
    inert = {phrase.split()[0] for phrase in cfg.inert()}
    assert inert == ({"EMBED_LR"} if "EMBED_LR" in env and cfg.tie_embeddings else set())


PRESETS = {path.stem: preset(path) for path in sorted((ROOT / "sweeps/presets").glob("*.env"))}
ON_CPU = {path.stem: preset(path) for path in sorted((ROOT / "sweeps/presets/cpu").glob("*.env"))}


@pytest.mark.parametrize("overlay", ["gpu", "cpu"])
@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"cpu"}))
def test_every_preset_parses_with_and_without_the_cpu_sizes(name, overlay):
    sizes = PRESETS["cpu"] | ON_CPU.get(name, {}) if overlay == "cpu" else {}
    env = PRESETS[name] | sizes
    cfg = Config.from_env(env)
    assert cfg.overrides().keys() <= env.keys() and not cfg.inert()


# --- what is printed about knobs -----------------------------------------------------------------


def test_help_has_every_knob_with_its_default_and_a_meaning():
    text = train_gpt.help_text()
    for name, default, _, meaning, *_ in train_gpt.knob_rows(Config):
        assert len(meaning) > 8, name
        shown = default if len(default) < 42 else "(names)"
        assert re.search(rf"^{name} +{re.escape(shown)} +{re.escape(meaning)}", text, re.M), name


def test_the_knob_table_is_one_markdown_row_a_knob():
    lines = [line for line in show("--knob-table").splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not line.startswith("| knob |")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == NAMES
    assert all(len(re.split(r"(?<!\\)\|", line)) == 7 for line in lines)
