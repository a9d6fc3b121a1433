"""One family of as_users_run.py on a small data set; and that its comparison sees a difference."""

import dataclasses

import pytest

from tests import as_users_run
from tests.as_users_run import Family, Trace, environment, read_events, try_family
from tests.conftest import ROOT, VOCAB

DATA_KNOBS = f"VOCAB_SIZE={VOCAB} ITERATIONS=16 WARMDOWN_ITERS=4 NUM_LAYERS=1"


@pytest.fixture
def family(tmp_path, dataset):
    """The plain family, compiled and on two threads whatever the machine has: run twice, once with a stop.

    What as_users_run.sh does beside it, another run without a stop and one that is killed, has the same two
    parts: steps from the start in a new process, and steps from a checkpoint.
    """
    data = dict(DATA_PATH=str(dataset), TOKENIZER_PATH=str(dataset / "tokenizer.model"))
    env = environment(DATA_KNOBS, data) | dict(OMP_NUM_THREADS="2")
    return Family(ROOT / "train_gpt.py", env, tmp_path, ways=("first", "SIGTERM"))


@pytest.mark.slow
def test_compiled_runs_on_two_threads_are_equal_fresh_and_resumed(family, monkeypatch, capfd):
    """In the default type. It fails without DETERMINISTIC: two runs part after three steps or so."""
    monkeypatch.setattr(as_users_run, "STOP_AFTER", 6)
    assert try_family("plain", family), capfd.readouterr().out
    (env,) = [event for event in read_events(family.folder / "first") if event["event"] == "env"]
    assert env["compile"] and env["deterministic"] and env["device"].endswith(", 2 threads")


# --- the comparison ---

LOSSES = [(1, 5.0), (2, 4.0), (3, 3.0)]
TRACE = Trace(LOSSES, [("val", 3.0, 2.0), ("roundtrip", 3.1, 2.1)], "abc", [])


@pytest.mark.parametrize("change, place", [
    (dict(), ""),
    (dict(resumed=[2]), ""),
    (dict(losses=[(1, 5.0), (2, 4.0000001), (3, 3.1)]), "step 2"),
    (dict(losses=LOSSES[:2]), "step 3"),
    (dict(losses=[*LOSSES, (3, 3.0000001)]), "step 3"),
    (dict(scores=[("val", 3.0, 2.0), ("roundtrip", 3.1, 2.1000001)]), "roundtrip"),
    (dict(scores=[("val", 3.0, 2.0)]), "roundtrip"),
    (dict(artifact="abd"), "the packed model"),
])  # fmt: skip
def test_a_difference_is_named_by_its_first_place(change, place):
    assert TRACE.difference(dataclasses.replace(TRACE, **change)) == place
    assert dataclasses.replace(TRACE, **change).difference(TRACE) == place


class Told:
    """A family whose runs left these traces."""

    def __init__(self, **traces):
        self.traces = lambda: traces


def test_a_line_says_what_differs(capfd):
    apart = dataclasses.replace(TRACE, losses=LOSSES[:1])
    resumed = dataclasses.replace(TRACE, resumed=[2])
    assert try_family("plain", Told(first=TRACE, again=TRACE, SIGTERM=resumed))
    assert not try_family("plain", Told(first=TRACE, again=TRACE, SIGTERM=apart))
    equal, differs = capfd.readouterr().out.splitlines()
    assert equal.split()[1] == "equal" and "3 losses, 2 scores; resumed from steps 2;" in equal
    assert differs.split()[1] == "DIFFERS" and "SIGTERM at step 2;" in differs and "again" not in differs
