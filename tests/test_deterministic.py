"""DETERMINISTIC: when it is on, what it leaves behind, what it says where torch has no such kernel; and the
type that a run computes in, which no timing may choose. That the bits are equal is test_as_users_run.py."""

import json
import subprocess
import sys

import pytest
import torch

import train_gpt
from tests.conftest import ROOT, env_of
from train_gpt import Config, Runtime, pick_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- the knob ---


@pytest.mark.parametrize("setting, on", [(None, True), ("auto", True), ("1", True), ("0", False)])
def test_the_log_and_the_result_say_which_it_was(run_main, tmp_path, setting, on):
    code, stdout, stderr = run_main(iterations=1, warmdown_iters=0, run_id="r", deterministic=setting)
    assert (code, stderr) == (0, "")
    assert json.loads(stdout.splitlines()[-1].removeprefix("RESULT "))["deterministic"] is on
    assert f" deterministic:{on} " in (tmp_path / "logs/r.txt").read_text()
    events = map(json.loads, (tmp_path / "logs/r.jsonl").read_text().splitlines())
    assert [event["deterministic"] for event in events if event["event"] == "env"] == [on]


def test_another_value_is_refused(run_main):
    code, _, stderr = run_main(deterministic="yes")
    assert code == 2 and stderr.startswith("error: DETERMINISTIC") and stderr.count("\n") == 1


def test_it_is_no_part_of_what_a_run_computes():
    """A hash of before it was there stays, and a run may be resumed, or its model scored, with another."""
    assert Config(deterministic="0").hash == Config(deterministic="1").hash == Config().hash


@pytest.fixture(params=[False, True], ids=["off", "on"])
def before(request):
    """What torch was set to by the program around us."""
    earlier = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(earlier)


@pytest.mark.parametrize("setting, on", [("auto", True), ("1", True), ("0", False)])
def test_torch_is_left_as_it_was(before, setting, on):
    with Runtime.launch(Config(device="cpu", compile="0", deterministic=setting), {}) as runtime:
        assert runtime.deterministic is torch.are_deterministic_algorithms_enabled() is on
    assert torch.are_deterministic_algorithms_enabled() is before


def test_torch_is_left_as_it_was_after_an_error(before):
    cfg = Config(device="cpu", compile="0", deterministic="0" if before else "1")
    with pytest.raises(ZeroDivisionError), Runtime.launch(cfg, {}):
        raise ZeroDivisionError
    assert torch.are_deterministic_algorithms_enabled() is before


# --- no such kernel ---

# torch has no deterministic put_ without accumulate on a CPU. Here the loss needs one, in an operation of our
# own: the compiler would write a plain put_ as something else, and does not look into this one.
PUT = """
import torch

@torch.library.custom_op("test_deterministic::add_nothing", mutates_args=())
def add_nothing(x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(1).put_(torch.zeros(1, dtype=torch.int64), torch.zeros(1))

add_nothing.register_fake(torch.empty_like)
inside = train_gpt.cross_entropy
train_gpt.cross_entropy = lambda logits, targets: inside(logits, targets) + add_nothing(torch.zeros(1))
"""
# In a process of its own, which compiles, but to eager kernels: no C++ compiler.
PROGRAM = f"""
import sys, train_gpt
{PUT}
train_gpt.Runtime.backend = "aot_eager"
sys.argv = ["train_gpt.py"]
train_gpt.main()
"""
LINE = "error: torch has no deterministic kernel for put_ here; set DETERMINISTIC=0"


SHORTEST = dict(iterations=1, warmdown_iters=0, num_layers=1, run_id="r")


def test_without_a_deterministic_kernel_one_line_names_the_operation(new):
    folder = new(SHORTEST)
    assert folder.start(PUT) == [2] and folder.error() == f"{LINE}\n"
    assert folder.result()["exit_code"] == 2
    assert new(SHORTEST).start(PUT, deterministic=0) == [0]


def test_without_a_deterministic_kernel_a_compiled_run_does_not_go_on_eagerly(tmp_path, dataset):
    """With COMPILE=auto: that lacks the kernel too."""
    env = env_of(dataset, compile="auto", **SHORTEST) | dict(PYTHONPATH=str(ROOT))
    env["PYTHONWARNINGS"] = "ignore"  # torch has one for Python 3.13.0
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    # torch may say before it that there is a CUDA compiler and no card.
    errors = [text for text in run.stderr.splitlines() if "No CUDA runtime is found" not in text]
    assert (run.returncode, errors) == (2, [LINE])
    assert json.loads((tmp_path / "logs/r.txt").read_text().splitlines()[-1][7:])["exit_code"] == 2


# --- the type ---


@pytest.mark.parametrize("flags, name", [
    (["avx2", "avx512f"], "fp32"),
    (["avx2", "avx512_bf16"], "bf16"),
    (["amx_tile", "amx_bf16"], "bf16"),
    (["asimd", "bf16"], "bf16"),
    ([], "fp32"),
])  # fmt: skip
def test_a_cpu_computes_in_bf16_if_it_has_the_instructions(monkeypatch, flags, name):
    monkeypatch.setattr(train_gpt, "cpu_flags", lambda: flags)
    assert pick_dtype("auto", CPU) == name
    assert pick_dtype("bf16", CPU) == "bf16" and pick_dtype("fp32", CPU) == "fp32"


@pytest.mark.parametrize(
    "capability, name",
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_a_gpu_computes_in_bf16_from_sm_80_on(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", CUDA) == name


def test_no_race_chooses_the_type(monkeypatch):
    """Neither a clock nor a product of matrices is asked: on a busy machine they answered this or that."""

    def asked(*given, **named):
        raise AssertionError("the type was chosen by timing")

    for owner, name in [
        (train_gpt.time, "perf_counter"),
        (train_gpt.time, "monotonic"),
        (torch, "mm"),
        (torch, "matmul"),
    ]:
        monkeypatch.setattr(owner, name, asked)
    assert pick_dtype("auto", CPU) in ("bf16", "fp32")


X86 = (
    "processor\t: 0\nmodel name\t: some\nflags\t\t: fpu avx2 avx512_bf16\nbugs\t\t: none\n\nprocessor\t: 1\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize("text, flags", [
    (X86, ["fpu", "avx2", "avx512_bf16"]),
    (ARM, ["fp", "asimd", "bf16", "i8mm"]),
    ("processor: 0\n", []),
    (None, []),
])  # fmt: skip
def test_the_instruction_sets_are_those_that_linux_names(monkeypatch, text, flags):
    def read_text(path):
        assert str(path) == "/proc/cpuinfo"
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(train_gpt.Path, "read_text", read_text)
    assert train_gpt.cpu_flags() == flags
