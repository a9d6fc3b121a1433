"""data/pydocs.py on a small made-up package tree: what it reads, how it splits, what it leaves behind."""

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import pydocs, shards

DATA = Path(__file__).resolve().parents[1] / "data"

WORDS = [a + b + c for a in "bcdfghjklm" for b in "aeiou" for c in ("nt", "rs", "st", "ra", "lo")]


MODULE = '''"""Module {index}."""

class Box:
    """{text}

        Indented {index}.

    Not so {index}.
    """

    def open(self, *lids, **keys):
        """Open the box {index} and look inside."""
'''


def prose(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def make_tree(root: Path, modules: int = 60) -> None:
    """A package `alpha` and an empty standard library; every third module repeats its predecessor's prose."""
    rng = random.Random(5)
    package = root / "alpha"
    package.mkdir(parents=True)
    (root / "library").mkdir()
    (package / "__init__.py").write_text('"""The alpha package, r\u00e9sum\u00e9 \u2581 and all."""\n')
    text = ""
    for index in range(modules):
        if index % 3 or not text:
            text = prose(rng, 150)
        words = text.split()
        words[7] = f"changed{index}"
        (package / f"m{index:02d}.py").write_text(MODULE.format(index=index, text=" ".join(words)))


DRIVER = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from data import pydocs, shards
pydocs.VOCAB_SIZE = 400
pydocs.TOKENIZER = "small.model"
if sys.argv[4:] == ["hang"]:
    def hang(*_):
        print("hanging", flush=True)
        time.sleep(60)
    pydocs.train_tokenizer = hang
out, tree = Path(sys.argv[3]), Path(sys.argv[2])
def main():
    with shards.exclusive(out / "datasets"):
        pydocs.build(out, 2, {"alpha": ("alpha",), "absent": ("absent_package",)}, tree / "library")
shards.command(main)
"""


def start(tree: Path, out: Path, *extra: str, seed: str = "0") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(DATA.parent), str(tree), str(out), *extra],
        env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    make_tree(root)
    return root


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    finish(start(tree, out))
    return out


def decoded(out: Path, split: str) -> list[str]:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizers" / "small.model"))
    tokens = shards.read_tokens(out / "datasets" / pydocs.NAME / f"pydocs_{split}_000000.bin")
    assert tokens[0] == shards.BOS
    return [tokenizer.decode(row[1:].tolist()) for row in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


def documents_of(tree: Path) -> list[str]:
    files = sorted((f"alpha/{path.name}", path) for path in (tree / "alpha").glob("*.py"))
    return pydocs.make_documents(map(pydocs.read_sections, files))


def test_shards_decode_to_exactly_the_documents(tree, built):
    train, val = decoded(built, "train"), decoded(built, "val")
    assert sorted(train + val) == sorted(documents_of(tree))
    manifest = json.loads((built / "datasets" / pydocs.NAME / "manifest.json").read_text())
    for split, texts in (("train", train), ("val", val)):
        entry = manifest["splits"][split]
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["documents"] == len(texts)
    assert manifest["missing_packages"] == ["absent"]


def test_no_document_is_on_both_sides(built):
    assert not set(decoded(built, "train")) & set(decoded(built, "val"))


def test_bytes_do_not_depend_on_hash_seed_or_place(tree, built, tmp_path):
    moved = tmp_path / "elsewhere"
    make_tree(moved)
    finish(start(moved, tmp_path / "out", seed="4711"))
    assert contents(tmp_path / "out") == contents(built)


def test_file_order_does_not_matter(tree, monkeypatch):
    forward = pydocs.find_sources({}, tree)
    walk = os.walk
    visited = []

    def backward(root):
        for folder, subfolders, names in walk(root):
            subfolders.sort(reverse=True)
            visited.append(folder)
            yield folder, subfolders, sorted(names, reverse=True)

    monkeypatch.setattr(pydocs.os, "walk", backward)
    assert pydocs.find_sources({}, tree) == forward
    assert visited and len(forward[0]) == 61


def test_near_duplicates_stay_on_one_side(monkeypatch):
    monkeypatch.setattr(pydocs, "VAL_FRACTION", 0.4)
    rng = random.Random(1)
    originals = [prose(rng, 120) for _ in range(40)]
    copies = [text.replace(" ", f" edited{i} ", 1) for i, text in enumerate(originals)]
    documents = sorted(originals + copies, key=pydocs.text_digest)
    splits, facts = pydocs.split_documents(documents)
    side = dict(zip(documents, splits, strict=True))
    assert all(side[a] == side[b] for a, b in zip(originals, copies, strict=True))
    assert 10 <= list(side.values()).count("val") <= 32
    assert facts["val_shingles_also_in_train"] == 0 and facts["near_duplicate_groups"] == 40


def test_overlap_is_measured_against_a_slow_count(monkeypatch):
    monkeypatch.setattr(pydocs, "VAL_FRACTION", 0.5)
    monkeypatch.setattr(pydocs, "NEAR_SHARE", 1.1)  # nothing is kept together, so sides overlap
    rng = random.Random(2)
    shared = prose(rng, 40)
    documents = sorted((shared + " " + prose(rng, 40) for _ in range(12)), key=pydocs.text_digest)
    splits, facts = pydocs.split_documents(documents)

    def passages(side: str) -> set[tuple[str, ...]]:
        found = set()
        for text, split in zip(documents, splits, strict=True):
            words = text.lower().replace(".", "").split()
            if split == side:
                found |= {tuple(words[i : i + 13]) for i in range(len(words) - 12)}
        return found

    val, train = passages("val"), passages("train")
    assert facts["val_shingles_also_in_train"] == pytest.approx(len(val & train) / len(val), abs=1e-5)
    assert len(val & train) > 10


def test_held_out_share_is_close_to_what_was_asked():
    rng = random.Random(3)
    documents = sorted((prose(rng, rng.randint(5, 200)) for _ in range(2000)), key=pydocs.text_digest)
    held = pydocs.hold_out(list(range(2000)), documents)
    share = sum(len(d) for d, out in zip(documents, held, strict=True) if out) / sum(map(len, documents))
    assert 0.03 < share <= 0.04


SOURCE = '''
"""Module text that is long enough."""
from x import add_newdoc, add_docstr
def outer(a, /, b, *rest, c=1, **more):
    """Outer function, documented at length."""
    def inner():
        """Inner function, documented at length."""
if True:
    class Late:
        """   First line of the class.

            Indented more.

        Not so.
        """
add_newdoc("pkg", "thing", """Documented from outside, at length.""")
add_newdoc("pkg", "thing", [("member", """Member documented from outside.""")])
relu = add_docstr(torch.relu, r"""relu(input) rectifies.

{input}
Braces {{stay}}.""".format(**common) + """ And more.""")
def short():
    """Short."""
raise RuntimeError("a reader that imports would stop here")
'''


def test_reads_docstrings_without_importing(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    found = {s.title: s.text for s in pydocs.read_sections(("pkg/module.py", path))}
    assert found == {
        "pkg.module": "Module text that is long enough.",
        "outer(a, b, *rest, c, **more)": "Outer function, documented at length.",
        "outer.inner()": "Inner function, documented at length.",
        "Late": "First line of the class.\n\n    Indented more.\n\nNot so.",
        "pkg.thing": "Documented from outside, at length.",
        "pkg.thing.member": "Member documented from outside.",
        "torch.relu": "relu(input) rectifies.\n\nBraces {stay}. And more.",
    }


def test_a_file_python_cannot_parse_has_no_text(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text('"""Documentation."""\ndef (:\n')
    assert pydocs.read_sections(("broken.py", path)) == []


def test_documents_join_whole_names_and_drop_copies():
    long = "word " * 500
    section = pydocs.Section
    one = [section("m", "A", "A", long + "1"), section("m", "A", "A.f()", long + "2")]
    documents = pydocs.make_documents(
        [[*one, section("m", "B", "B", long + "3")], [section("n", "C", "C", long + "3")]]
    )
    assert len(documents) == 2
    assert sorted(d.split("\n")[0] for d in documents) == ["m.A", "m.B"]
    assert any(long + "1" in d and long + "2" in d for d in documents)


def test_topics_are_read():
    tree = ast.parse("topics = {'assert': 'The assert statement, at length.', 'del': '''Deletion.'''}")
    assert [entry[0] for entry in pydocs.topic_sections(tree)] == ["assert", "del"]


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def test_terminated_build_leaves_nothing(tree, tmp_path):
    process = start(tree, tmp_path / "out", "hang")
    wait_for(process, "hanging")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert contents(tmp_path / "out") == {}
    assert list((tmp_path / "out" / "datasets").iterdir()) == []


def test_killed_build_is_swept_by_the_next(tree, built, tmp_path):
    process = start(tree, tmp_path / "out", "hang")
    wait_for(process, "hanging")
    process.kill()
    process.wait(20)
    assert [path.name for path in (tmp_path / "out" / "datasets").iterdir()] == [
        f".{pydocs.NAME}.tmp-{process.pid}"
    ]
    finish(start(tree, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(built)
    assert [path.name for path in (tmp_path / "out" / "datasets").iterdir()] == [pydocs.NAME]


def test_scratch_folder_of_a_living_builder_is_left_alone(tmp_path):
    living = tmp_path / f".x.tmp-{os.getppid()}"
    living.mkdir()
    with shards.scratch_folder(tmp_path / "x") as folder:
        assert folder.is_dir() and living.is_dir()
    assert not folder.exists()


def test_two_builds_at_once_agree(tree, built, tmp_path):
    both = [start(tree, tmp_path / "out"), start(tree, tmp_path / "out", seed="9")]
    for process in both:
        finish(process)
    assert contents(tmp_path / "out") == contents(built)


def run_main(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["pydocs.py", *arguments])
    pydocs.main()
    return capsys.readouterr().out


def test_second_call_does_nothing_and_damage_is_repaired(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pydocs, "VOCAB_SIZE", 400)
    monkeypatch.setattr(pydocs, "PACKAGES", {"alpha": ("alpha",)})
    monkeypatch.syspath_prepend(str(tree))
    real = pydocs.build
    library = tree / "library"
    monkeypatch.setattr(pydocs, "build", lambda out, workers: real(out, 1, pydocs.PACKAGES, library))
    arguments = ("--out", str(tmp_path))
    assert "\nbuilt: " in run_main(monkeypatch, capsys, *arguments)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    time.sleep(0.02)
    assert run_main(monkeypatch, capsys, *arguments).startswith("already there: ")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    shard = tmp_path / "datasets" / pydocs.NAME / "pydocs_train_000000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert "\nbuilt: " in run_main(monkeypatch, capsys, *arguments)
    assert shard.read_bytes() == whole
