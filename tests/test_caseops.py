"""CaseOps: any text comes back, and the bytes of its tokens are those of the text, in every tool."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from data import caseops, shards, verify
from data import tokenize_docs as tools
from data.user_error import UserError
from tests.conftest import BOS, make_texts, write_shard
from train_gpt import ByteTable, Config, RunError, TokenStream, decoded_bytes, load_tokenizer, load_validation

TITLE, ALLCAPS, CAPNEXT, ESC = caseops.MARKS
MARKED = st.text(st.sampled_from("aAbB .\né漢" + caseops.MARKS), max_size=40)
CASED = st.text(st.sampled_from("abzAZ '1"), max_size=40)
ODD = [
    "NASA's iPhone, the McDonald OF U.S.A. aB Ab AB A b",
    "Ünïcödé ÀÉ ß İ ı ǅ ﬁ Kelvin \u212a",
    "".join(caseops.MARKS) + "A" + ESC + ESC + TITLE + "ABC" + ESC,
    ESC,
    "A" * 50,
]
DOCUMENTS = [text for text in make_texts(120, seed=5)] + ["NASA and the USA. iPhone! McCoy " * 3] * 5 + ODD


# --- the transform -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), MARKED, CASED))
@example("".join(ODD))
@example("\ud800 A lone surrogate")
def test_any_text_comes_back(text):
    assert caseops.decode(caseops.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), MARKED, CASED), st.one_of(MARKED, CASED))
def test_two_texts_never_have_one_code(one, other):
    assert (caseops.encode(one) == caseops.encode(other)) == (one == other)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), MARKED, CASED))
def test_no_ascii_capital_is_left(text):
    assert not any("A" <= letter <= "Z" for letter in caseops.encode(text))


@pytest.mark.parametrize(
    "text, code",
    [
        ("word", "word"),
        ("Word", f"{TITLE}word"),
        ("A", f"{TITLE}a"),
        ("NASA", f"{ALLCAPS}nasa"),
        ("iPhone", f"i{CAPNEXT}phone"),
        ("McDonald", f"{TITLE}mc{CAPNEXT}donald"),
        ("NASa", f"{TITLE}n{CAPNEXT}a{CAPNEXT}sa"),
        ("U.S.", f"{TITLE}u.{TITLE}s."),
        ("É", "É"),
        (f"a{ESC}B{TITLE}", f"a{ESC}{ESC}{TITLE}b{ESC}{TITLE}"),
    ],
)
def test_the_code_is_the_published_one(text, code):
    assert caseops.encode(text) == code


@pytest.mark.parametrize("code", [TITLE, f"{TITLE}A", f"{ALLCAPS} a", f"{CAPNEXT}1", f"a{ESC}", f"{ESC}a"])
def test_a_mark_that_acts_on_nothing_is_refused(code):
    with pytest.raises(ValueError, match="acts on nothing"):
        caseops.decode(code)


# --- bytes by token ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceProcessor:
    model = tools.train_tokenizer(map(caseops.encode, DOCUMENTS), 400, caseops.MARKS)
    return SentencePieceProcessor(model_proto=model)


def test_the_marks_are_the_first_pieces_as_in_the_published_tokenizer(tokenizer):
    assert [tokenizer.id_to_piece(token) for token in range(4, 8)] == list(caseops.MARKS)
    assert tokenizer.id_to_piece(8) == "<0x00>" and caseops.has_marks(tokenizer)


def test_another_tokenizer_has_no_marks():
    plain = SentencePieceProcessor(model_proto=tools.train_tokenizer(DOCUMENTS, 400))
    assert not caseops.has_marks(plain) and not ByteTable(plain).has_case_marks


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=40), MARKED, CASED), min_size=1, max_size=4))
@example(ODD)
def test_every_count_of_bytes_is_that_of_the_text(tokenizer, texts):
    """The tool's by token, the script's by pieces and its oracle by decoding."""
    texts = [text for text in map(tools.tidy, texts) if text.strip()]
    if not texts:
        return
    encoded = tools.encode_caseops(tokenizer, texts)
    size = sum(len(text.encode()) for text in texts)
    table = ByteTable(tokenizer)
    assert (encoded.text_bytes, encoded.inexact) == (size, 0)
    assert int(encoded.token_bytes.sum()) == size
    np.testing.assert_array_equal(table.count_bytes(encoded.tokens), encoded.token_bytes)
    assert decoded_bytes(tokenizer, table, encoded.tokens).bytes == size


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(3, 399), max_size=30), st.lists(st.integers(4, 7), max_size=12))
def test_escapes_in_a_row_are_counted_as_they_are_decoded(tokenizer, tokens, marks):
    """On tokens that no encoding gives, too: the two counts of the script agree wherever marks stand."""
    stream = np.array([BOS, *tokens, *marks, *tokens, *marks], np.uint16)
    # Byte tokens may spell half a mark, which only decoding sees; the run is then refused, not miscounted.
    stream = stream[[not tokenizer.is_byte(int(token)) for token in stream]]
    table = ByteTable(tokenizer)
    counted = int(table.count_bytes(stream).sum())
    assert counted == decoded_bytes(tokenizer, table, stream).bytes


# --- the tools -----------------------------------------------------------------------------------


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    return module.main()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Where a data set was made with --caseops."""
    folder = tmp_path_factory.mktemp("made")
    source = folder / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    options = ("--vocab", 400, "--caseops", "--val-fraction", 0.3, "--shard-tokens", 900, "--workers", 1)
    with pytest.MonkeyPatch.context() as patch:
        call(tools, patch, source, "--name", "c", "--out", folder, *options)
    return folder


@pytest.fixture
def built(made, tmp_path) -> Path:
    """The data set's folder, in a copy that a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "datasets" / "c_sp400_caseops"


def config(built: Path, tiny) -> Config:
    model = built.parents[1] / "tokenizers" / "c_400_bpe_caseops.model"
    return tiny(data_path=str(built), tokenizer_path=str(model), vocab_size=400)


def held_out() -> list[str]:
    texts = map(tools.tidy, DOCUMENTS)
    return [text for text in texts if text.strip() and tools.is_held_out(tools.text_digest(text), 0.3)]


def test_the_script_reads_what_the_tool_built(built, tiny):
    cfg = config(built, tiny)
    data = load_validation(cfg, load_tokenizer(cfg))
    assert data.bytes == sum(len(text.encode()) for text in held_out())
    assert data.documents == len(held_out())
    sidecars = sorted(built.glob("*_val_bytes_*.bin"))
    assert len(sidecars) == len(shards.shard_paths(built, "val")) > 1
    stored = np.concatenate([shards.read_tokens(path) for path in sidecars])
    np.testing.assert_array_equal(data.target_bytes, stored[1:])


def test_the_sidecar_is_not_read_as_tokens(built, tiny):
    stream = TokenStream(str(built), "val", 400)
    assert not [path for path in stream.paths if "bytes" in path.name] and len(stream.paths) > 1
    assert len(TokenStream(str(built), "val_bytes", 2**16)) == len(stream)


def test_without_the_sidecar_the_bytes_are_the_same(built, tiny):
    cfg = config(built, tiny)
    with_sidecar = load_validation(cfg, load_tokenizer(cfg))
    for path in built.glob("*_val_bytes_*.bin"):
        path.unlink()
    without = load_validation(cfg, load_tokenizer(cfg))
    np.testing.assert_array_equal(without.target_bytes, with_sidecar.target_bytes)


def test_a_sidecar_is_what_is_counted_where_its_sum_is_proved(built, tiny):
    """Moved between two tokens: the same sum, so it holds, and it is the sidecar's numbers that are used."""
    cfg = config(built, tiny)
    before = load_validation(cfg, load_tokenizer(cfg)).target_bytes
    path = sorted(built.glob("*_val_bytes_*.bin"))[0]
    counts = shards.read_tokens(path).copy()
    first, second = np.flatnonzero(counts > 1)[:2]
    counts[first] -= 1
    counts[second] += 1
    write_shard(path, counts)
    after = load_validation(cfg, load_tokenizer(cfg)).target_bytes
    assert (after[first - 1], after[second - 1]) == (before[first - 1] - 1, before[second - 1] + 1)


def grown(counts: np.ndarray) -> np.ndarray:
    counts[5] += 1
    return counts


@pytest.mark.parametrize(
    "change, reason",
    [
        (grown, r"wrong byte count: \d+ by \*_val_bytes_\*\.bin, \d+ by decoding the validation text"),
        (
            lambda counts: counts[:-1],
            r"c_val_bytes_000000\.bin and those after it hold the bytes of \d+ tokens",
        ),
    ],
    ids=["sum", "length"],
)
def test_a_sidecar_that_is_not_the_texts_is_refused(built, tiny, change, reason):
    cfg = config(built, tiny)
    path = sorted(built.glob("*_val_bytes_*.bin"))[0]
    write_shard(path, change(shards.read_tokens(path).copy()))
    with pytest.raises(RunError, match=reason):
        load_validation(cfg, load_tokenizer(cfg))


def test_a_sidecar_of_other_tokens_is_refused_without_case_marks_too(tiny, dataset, tmp_path):
    for path in dataset.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cfg = tiny(data_path=str(tmp_path), tokenizer_path=str(tmp_path / "tokenizer.model"))
    data = load_validation(cfg, load_tokenizer(cfg))
    write_shard(tmp_path / "toy_val_bytes_000000.bin", [0, *data.target_bytes])
    assert load_validation(cfg, load_tokenizer(cfg)).bytes == data.bytes
    write_shard(tmp_path / "toy_val_bytes_000000.bin", [1, *data.target_bytes])
    with pytest.raises(RunError, match="wrong byte count"):
        load_validation(cfg, load_tokenizer(cfg))


def test_a_second_build_is_the_first_and_another_option_another_folder(built, monkeypatch, capsys):
    out = built.parents[1]
    before = {path.name: path.read_bytes() for path in built.iterdir()}
    options = ("--vocab", 400, "--val-fraction", 0.3, "--shard-tokens", 900, "--workers", 2, "--out", out)
    call(tools, monkeypatch, out / "docs.jsonl", "--name", "c", *options, "--caseops", "--force")
    assert {path.name: path.read_bytes() for path in built.iterdir()} == before
    call(tools, monkeypatch, out / "docs.jsonl", "--name", "c", *options)
    plain = out / "datasets" / "c_sp400"
    assert not list(plain.glob("*_bytes_*"))
    sizes = [shards.read_manifest(folder / "manifest.json")["splits"] for folder in (built, plain)]
    assert sizes[0]["val"]["bytes"] == sizes[1]["val"]["bytes"]


def test_a_tokenizer_without_marks_cannot_be_reused(built, monkeypatch, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(tools.train_tokenizer(DOCUMENTS, 400))
    arguments = (tmp_path / "docs.jsonl", "--name", "d", "--out", tmp_path, "--tokenizer", other)
    with pytest.raises(UserError, match="no pieces for the marks of --caseops"):
        call(tools, monkeypatch, *arguments, "--caseops", "--val-fraction", 0)


# --- verify --------------------------------------------------------------------------------------


def verified(built, monkeypatch, capsys) -> tuple[int, str]:
    model = built.parents[1] / "tokenizers" / "c_400_bpe_caseops.model"
    capsys.readouterr()
    code = call(verify, monkeypatch, built, "--tokenizer", model)
    output = capsys.readouterr()
    return code, output.out + output.err


def test_verify_counts_the_bytes_of_the_text(built, monkeypatch, capsys):
    code, output = verified(built, monkeypatch, capsys)
    size = sum(len(text.encode()) for text in held_out())
    assert code == 0 and output.count(f"bytes {size:,}") == 2  # by decoding, and of the sidecar


@pytest.mark.parametrize(
    "change, reason",
    [(grown, "bytes, the text has"), (lambda counts: counts[:-1], "build both again")],
    ids=["sum", "length"],
)
def test_verify_finds_a_wrong_sidecar(built, monkeypatch, capsys, change, reason):
    path = sorted(built.glob("*_val_bytes_*.bin"))[0]
    write_shard(path, change(shards.read_tokens(path).copy()))
    (built / "manifest.json").unlink()
    code, output = verified(built, monkeypatch, capsys)
    assert code == 1 and reason in output


def test_verify_finds_a_sidecar_that_was_changed(built, monkeypatch, capsys):
    path = sorted(built.glob("*_val_bytes_*.bin"))[0]
    write_shard(path, grown(shards.read_tokens(path).copy()))
    code, output = verified(built, monkeypatch, capsys)
    assert code == 1 and "c_val_bytes_000000.bin: sha256" in output
