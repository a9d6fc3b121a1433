"""A compiler that fails costs speed, not the run; and a score is taken again the way it was taken first."""

import re

import pytest
import torch
from torch.torch_version import TorchVersion

import train_gpt
from train_gpt import GPT, Run, RunLog, Runtime, artifact_config, pick_compile


class CompilerFailed(Exception):
    pass


class Unlucky(Runtime):
    """Its compiled functions fail when called, as a missing C++ compiler makes them."""

    def compile(self, fn):
        def fails(*inputs, **settings):
            raise CompilerFailed

        return fails if self.compiles else fn


@pytest.fixture
def unlucky(tiny):
    """unlucky(compile=...) -> a run whose compiler fails."""

    def make(**knobs) -> Run:
        cfg = tiny(**knobs)
        return Run(cfg, Unlucky(compiles=True), RunLog(None, ""), GPT(cfg), None)

    return make


def test_a_failing_compiler_is_done_without(unlucky, tiny):
    run = unlucky(compile="auto")
    run.settle(lambda: train_gpt.warm_evaluation(run))
    ids = torch.randint(tiny().vocab_size, (2, 8))
    assert not run.runtime.compiles
    assert torch.equal(run.nats(ids, ids), train_gpt.token_nats(run.model, ids, ids))
    assert torch.isfinite(run.loss(ids, ids)[0])


@pytest.mark.parametrize("compile, graphs", [("auto", 2), ("1", 4)])
def test_a_cpu_compiles_the_many_shapes_of_single_documents_only_when_told_to(tiny, compile, graphs):
    cfg = tiny(compile=compile, train_seq_len=128, eval_stride=32, eval_doc_isolated=True)
    run = Run(cfg, Runtime(compiles=True), RunLog(None, ""), GPT(cfg), None)
    assert len(train_gpt.evaluation_graphs(cfg, run.runtime)) == graphs
    assert (run.document_nats is run.nats) == (compile == "1")
    assert len(train_gpt.evaluation_graphs(cfg, Runtime(torch.device("cuda")))) == 4


@pytest.mark.parametrize("compiles, device, limit, is_tried", [
    (False, "cpu", 2**26, False),
    (False, "cpu", 2**10, True),
    (True, "cpu", 2**26, True),
    (False, "meta", 2**26, True),
])  # fmt: skip
def test_a_pass_that_is_eager_and_small_is_not_tried_on_a_cpu(
    tiny, monkeypatch, compiles, device, limit, is_tried
):
    monkeypatch.setattr(train_gpt, "SMALL_LOGITS", limit)
    runtime = Runtime(torch.device(device), compiles=compiles, backend="eager")
    run = Run(tiny(), runtime, RunLog(None, ""), GPT(tiny()).to(device), None)
    tried = []
    run.nats = lambda *given, **settings: tried.append(given)
    train_gpt.warm_evaluation(run)
    assert bool(tried) == is_tried


def test_the_warning_says_why_the_compiler_failed(tiny, tmp_path):
    run = Run(tiny(compile="auto"), Unlucky(compiles=True), RunLog(tmp_path, "r"), GPT(tiny()), None)

    def full():
        if run.runtime.compiles:
            raise CompilerFailed("OSError: no space left\non /cache")

    run.settle(full)
    run.log.close()
    told = "no torch.compile (CompilerFailed: OSError: no space left on /cache); running eagerly, slower"
    assert told in (tmp_path / "r.txt").read_text()


def test_compile_1_insists(unlucky):
    run = unlucky(compile="1")
    with pytest.raises(CompilerFailed):
        run.settle(lambda: train_gpt.warm_evaluation(run))


def test_an_error_of_the_model_itself_is_raised(unlucky):
    run = unlucky(compile="auto")

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.settle(broken)


def test_running_out_of_memory_is_not_the_compilers_fault(unlucky):
    run = unlucky(compile="auto")

    def too_large():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run.settle(too_large)
    assert run.runtime.compiles


@pytest.mark.parametrize(
    "compiled, env, expected",
    [(False, {}, "0"), (True, {}, "auto"), (False, {"COMPILE": "1"}, "1"), (True, {"COMPILE": "0"}, "0")],
)
def test_an_artifact_is_scored_as_it_was(tiny, compiled, env, expected):
    cfg = tiny(compile=env.get("COMPILE", "auto"), eval_only="x")
    header = dict(model=cfg.shape(), dtype="fp32", quant="int8", codec="zstd", compile=compiled)
    assert artifact_config(cfg, env, header).compile == expected


@pytest.mark.parametrize(
    "version, right",
    [
        ("1.13.1", False),
        ("2.4.0", False),
        ("2.5.1+cpu", False),
        ("2.6.0", True),
        ("2.10.0+cu128", True),
        ("2.13.0+cpu", True),
        ("3.0.0", True),
    ],
)
def test_a_compiler_that_is_wrong_is_not_used(monkeypatch, version, right):
    """Only on CPUs, and only where the choice is ours."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    why = "" if right else f"torch {version}'s CPU compiler gives wrong gradients"
    assert pick_compile("auto", torch.device("cpu")) == (right, why)
    assert pick_compile("auto", torch.device("cuda")) == pick_compile("1", torch.device("cpu")) == (True, "")
    assert pick_compile("0", torch.device("cpu")) == (False, "")


@pytest.mark.parametrize(
    "wanted, kind, expected",
    [
        ("1", "cpu", True),
        ("0", "cpu", False),
        ("0", "cuda", False),
        ("auto", "cuda", True),
        ("auto", "mps", False),
    ],
)
def test_compile_is_as_wanted_and_auto_trusts_cuda(wanted, kind, expected):
    assert pick_compile(wanted, torch.device(kind)) == (expected, "")


# --- the folder for what is compiled ---


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/x"))


@pytest.mark.parametrize("wanted", ["0", "auto"])
def test_without_a_folder_to_compile_in_a_run_is_eager(run_main, no_cache, wanted):
    code, out, err = run_main(compile=wanted, iterations=0)
    told = "warning: no torch.compile (TORCHINDUCTOR_CACHE_DIR="
    assert (code, err) == (0, "") and '"compile": false' in out.splitlines()[-1]
    assert (told in out) == (wanted == "auto")


def test_compile_1_names_the_folder_that_it_lacks(run_main, no_cache):
    code, _, err = run_main(compile="1")
    line = r"error: COMPILE=1 but TORCHINDUCTOR_CACHE_DIR=\S+ cannot be written \(.*set another"
    assert code == 2 and re.match(line, err)


def test_the_folder_for_what_is_compiled_is_tried_as_torch_would_use_it(tmp_path, monkeypatch):
    env = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "made/of/parts"), TRITON_CACHE_DIR="/proc/none")
    fault_of = train_gpt.compile_cache_fault
    assert fault_of(env, "cpu") == "" and list((tmp_path / "made/of/parts").iterdir()) == []
    assert fault_of(env, "cuda").startswith("TRITON_CACHE_DIR=/proc/none cannot be written (")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train_gpt.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    monkeypatch.setattr(train_gpt.getpass, "getuser", lambda: {}["no name"])
    assert f"TORCHINDUCTOR_CACHE_DIR={tmp_path}/file/torchinductor_uid_" in fault_of({}, "cpu")
