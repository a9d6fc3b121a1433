"""The model of a step on several GPUs: its arithmetic, and that its one fitted number is the only one."""

import sys

import pytest

from sweeps.lab import gpu_scaling as scale

H100, HERE = scale.MACHINES["H100"], scale.PLANS["here"]


@pytest.fixture(scope="module")
def baseline():
    return scale.work_of({})


def test_the_work_of_the_baseline(baseline):
    per_token = 6 * (9 * (512 * 512 * 2 + 2 * 512 * 256 + 2 * 512 * 1024) + 1024 * 512) + 12 * 512 * 512 * 9
    assert baseline.flops == per_token * 524_288 and baseline.weights == 17_059_912
    assert baseline.matrices == 9 * (2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 1024)
    square = 5 * 6 * 512**3
    assert baseline.largest == 5 * (4 * 512 * 512 * 1024 + 2 * 512**3) > square
    assert baseline.orthogonal == 9 * (
        2 * square + 2 * baseline.largest + 2 * 5 * 4 * 256 * 256 * 512 + 20 * 256**3
    )


def test_a_ring_sends_each_byte_twice_less_a_share():
    rate, gpus, size = H100.achieved * H100.nvlink, 8, 64e6
    assert scale.all_reduce(size, 1, H100) == 0
    fixed = H100.latency + 14 * H100.hop
    assert scale.all_reduce(size, gpus, H100) == pytest.approx(fixed + 2 * 7 / 8 * size / rate)
    between = scale.all_reduce(size, 16, H100) - scale.all_reduce(size, 8, H100)
    assert between == pytest.approx(2 * H100.hop + 2 / 2 * size / 8 / (H100.achieved * H100.network))


def test_more_gpus_are_faster_and_never_more_than_in_proportion(baseline):
    times = {n: scale.step_ms(baseline, n, H100, HERE, 0.2) for n in (1, 2, 4, 8, 16, 24, 32)}
    assert sorted(times.values(), reverse=True) == list(times.values())
    assert all(times[n] >= times[1] / n for n in times)
    alone = scale.compute(baseline, 24, H100, 1.0)
    assert alone > (baseline.flops * 22 / 512) / H100.peak > baseline.flops / 24 / H100.peak, (
        "22 of 512 sequences"
    )


def test_one_number_is_fitted_and_the_errors_are_what_they_are():
    (name, ms, model), *others = scale.published_rows(scale.fraction_of_baseline())
    assert name == "NaiveBaseline, 8xH100" and model == pytest.approx(ms)
    errors = {name: model / ms - 1 for name, ms, model in others}
    assert abs(errors.pop("TrainingOptSeq4096, 8xH100")) > 0.2, "the one that is far off"
    assert max(map(abs, errors.values())) < 0.1


def test_what_is_hidden_or_halved_costs_less(baseline):
    waits = {name: scale.communication(baseline, 8, H100, plan) for name, plan in scale.PLANS.items()}
    assert 0 < waits["sharded"] < waits["official"] < waits["here"]


def test_the_command_prints_both_tables_or_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", "baseline", "NUM_LAYERS=4"])
    scale.main()
    shown = capsys.readouterr().out
    assert "fitted" in shown and shown.splitlines()[-1].split()[0] == "32"
    monkeypatch.setattr(sys, "argv", ["scale.py", "baseline", "MATRX_LR=1"])
    with pytest.raises(SystemExit, match="^error: MATRX_LR[^\n]*$"):  # which Python prints, and exits with 1
        scale.main()
