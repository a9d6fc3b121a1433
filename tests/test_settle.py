"""A compiler that fails costs speed, not the run; and a score is taken again the way it was taken first."""

import pytest
import torch

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


@pytest.mark.parametrize("factor, expected", [(1, (True, "")), (2, (False, "its gradients are wrong"))])
def test_a_compiler_that_is_wrong_is_not_used(monkeypatch, factor, expected):
    monkeypatch.setattr(torch, "compile", lambda fn: lambda table: factor * fn(table))
    assert pick_compile("auto", torch.device("cpu")) == expected


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
