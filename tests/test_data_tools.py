"""data/shards.py, tokenize_docs.py and verify.py: files that are right or absent, and plain errors."""

import errno
import fcntl
import gzip
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from data import file_locks, shards, verify
from data import tokenize_docs as tools
from data.user_error import UserError
from tests import conftest

DATA = Path(__file__).resolve().parents[1] / "data"

RNG = random.Random(11)
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "en", "i", "or", "u")]


def sentence(words: int = 40) -> str:
    return (
        " ".join("".join(RNG.choices(SYLLABLES, k=RNG.randint(1, 4))) for _ in range(words)).capitalize()
        + "."
    )


TEXTS = [sentence() + "\n  caf\u00e9 \U0001f600 " + sentence(9) for _ in range(150)]


@pytest.fixture(scope="module")
def tokenizer():
    return tools.sentencepiece.SentencePieceProcessor(model_proto=tools.train_tokenizer(TEXTS, 400))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def run(tool: str, *arguments, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(DATA / f"{tool}.py"), *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **env}, timeout=60,
    )  # fmt: skip


def tokenize(monkeypatch, *arguments) -> None:
    """`tokenize_docs.py` in this process."""
    monkeypatch.setattr(sys, "argv", ["tokenize_docs.py", *map(str, arguments)])
    tools.main()


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    options = ("--name", "t", "--vocab-size", 400, "--val-fraction", 0.2, "--shard-tokens", 1500)
    result = run("tokenize_docs", inputs, "--out", out, *options, PYTHONHASHSEED="1")
    assert result.returncode == 0, result.stderr
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- shards --------------------------------------------------------------------------------------


def test_shard_has_the_official_layout(tmp_path):
    path = tmp_path / "x_train_000000.bin"
    shards.write_shard(path, np.array([1, 7, 65535], dtype=np.uint16))
    raw = path.read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 3] + [0] * 253
    assert raw[1024:] == b"\x01\x00\x07\x00\xff\xff"
    assert shards.read_tokens(path).tolist() == [1, 7, 65535]


@pytest.mark.parametrize("tokens", [[], [-1], [65536], [[1, 2]]])
def test_shard_refuses_what_it_cannot_hold(tmp_path, tokens):
    with pytest.raises(ValueError, match="a shard holds|16 bits"):
        shards.write_shard(tmp_path / "x.bin", np.array(tokens, dtype=np.int64))
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), shards.atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert contents(tmp_path) == {"file": b"old"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 25))
def test_split_writer_loses_nothing(tmp_path_factory, sizes, shard_tokens):
    folder = tmp_path_factory.mktemp("split")
    stream = np.arange(sum(sizes), dtype=np.uint16)
    writer = shards.SplitWriter(folder, "x", "train", shard_tokens)
    for part in np.split(stream, np.cumsum(sizes)[:-1]):
        writer.add(part, 1, 2 * part.size)
    entry = writer.close()
    parts = [shards.read_tokens(path) for path in sorted(folder.glob("*.bin"))]
    assert np.array_equal(np.concatenate(parts), stream)
    assert all(part.size == shard_tokens for part in parts[:-1]) and len(entry["files"]) == len(parts)
    assert (entry["tokens"], entry["documents"], entry["bytes"]) == (stream.size, len(sizes), 2 * stream.size)


def test_publish_removes_shards_of_a_longer_build(tmp_path):
    dataset, scratch = tmp_path / "d", tmp_path / "s"
    dataset.mkdir()
    (dataset / "x_train_000007.bin").write_bytes(b"old")
    scratch.mkdir()
    writer = shards.SplitWriter(scratch, "x", "train")
    writer.add(np.ones(3, dtype=np.uint16), 3, 0)
    (scratch / "t.model").write_bytes(b"model")
    manifest = {"splits": {"train": writer.close()}, "tokenizer": {"path": "t.model", "size": 5}}
    shards.publish(scratch, dataset, tmp_path / "t.model", manifest)
    assert sorted(p.name for p in dataset.iterdir()) == ["manifest.json", "x_train_000000.bin"]
    assert shards.is_complete(dataset, tmp_path)
    (tmp_path / "t.model").write_bytes(b"mode")
    assert not shards.is_complete(dataset, tmp_path)


# --- tokenizer -----------------------------------------------------------------------------------


def test_tokenizer_has_the_challenge_layout(tokenizer):
    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [tokenizer.id_to_piece(4 + i) for i in range(256)] == [f"<0x{i:02X}>" for i in range(256)]
    assert tokenizer.vocab_size() == 400
    assert "".join(tokenizer.encode("ba ben", out_type=str)) == f"ba{tools.SPACE_MARK}ben"


def test_only_the_first_character_of_a_piece_is_a_space_mark(tokenizer):
    # The trainer counts one leading mark as one byte; a mark inside would be counted as three.
    pieces = [tokenizer.id_to_piece(i) for i in range(260, tokenizer.vocab_size())]
    assert any(piece.startswith(tools.SPACE_MARK) for piece in pieces)
    assert not [piece for piece in pieces if tools.SPACE_MARK in piece[1:]]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet=" \u2581\n\r\t<s>a\u00e9\ud800\0", max_size=30))
def test_tidy_text_survives_encoding(tokenizer, text):
    text = tools.tidy(text)
    tokens, size, inexact, _ = tools.encode_documents(tokenizer, [text])
    assert tokens[0] == shards.BOS and tokenizer.decode(tokens[1:].tolist()) == text
    assert (size, inexact) == (len(text.encode()), 0)


def test_byte_count_from_pieces_equals_decoding(tokenizer):
    tokens, size, *_ = tools.encode_documents(tokenizer, TEXTS)
    count, previous = 0, shards.BOS
    for token in tokens.tolist():
        piece = tokenizer.id_to_piece(token)
        if tokenizer.is_byte(token):
            count += 1
        elif not tokenizer.is_control(token):
            bare = piece.removeprefix(tools.SPACE_MARK)
            count += len(bare.encode()) + (bare != piece and previous != shards.BOS)
        previous = token
    assert count == size == sum(len(text.encode()) for text in TEXTS)


def test_held_out_share_follows_the_fraction():
    held = sum(tools.is_held_out(tools.text_digest(str(i)), 0.1) for i in range(5000))
    assert 430 < held < 570


def test_ordered_map_keeps_order_and_ends_on_error():
    assert list(tools.ordered_map(abs, range(-20, 0), 2)) == list(range(20, 0, -1))
    with pytest.raises(TypeError):
        list(tools.ordered_map(abs, [1, None, 2], 2))


# --- tokenize_docs -------------------------------------------------------------------------------


def test_second_build_gives_the_same_bytes(inputs, built, tmp_path):
    options = ("--name", "t", "--vocab-size", 400, "--val-fraction", 0.2, "--shard-tokens", 1500)
    result = run("tokenize_docs", inputs, "--out", tmp_path, *options, "--workers", 1, PYTHONHASHSEED="2")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == contents(built)


def test_every_document_is_on_exactly_one_side(built):
    manifest = shards.read_manifest(built / "datasets" / "t_sp400" / "manifest.json")
    splits = manifest["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == len(TEXTS)
    assert splits["train"]["bytes"] + splits["val"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert len(splits["train"]["files"]) > 2 and manifest["documents_not_reproduced_exactly"] == 0


def test_compressed_input_and_reused_tokenizer(inputs, built, tmp_path, monkeypatch):
    packed = tmp_path / "docs.jsonl.zst"
    packed.write_bytes(zstandard.compress(inputs.read_bytes()))
    model = built / "tokenizers" / "t_400_bpe.model"
    tokenize(
        monkeypatch, packed, "--name", "z", "--out", tmp_path, "--tokenizer", model,
        "--val-fraction", 0.2, "--workers", 1,
    )  # fmt: skip
    ours = shards.read_manifest(tmp_path / "datasets" / "z_sp400" / "manifest.json")["splits"]
    theirs = shards.read_manifest(built / "datasets" / "t_sp400" / "manifest.json")["splits"]
    for split in ("train", "val"):
        assert (ours[split]["tokens"], ours[split]["bytes"]) == (
            theirs[split]["tokens"],
            theirs[split]["bytes"],
        )


def test_text_files_split_at_blank_lines_or_not(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\n  three\n \nfour\n")
    assert list(tools.read_documents(path, "blank")) == ["one\ntwo", "three", "four"]
    assert list(tools.read_documents(path, "file")) == ["one\ntwo\n\n\n  three\n \nfour"]


def test_same_call_again_does_nothing_other_input_is_refused(inputs, tmp_path, monkeypatch, capsys):
    arguments = (inputs, "--name", "n", "--out", tmp_path, "--vocab-size", 400, "--workers", 1)
    tokenize(monkeypatch, *arguments, "--val-fraction", 0.2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    tokenize(monkeypatch, *arguments, "--val-fraction", 0.2)
    assert capsys.readouterr().out.startswith("already there\n")
    with pytest.raises(UserError, match="holds something else"):
        tokenize(monkeypatch, *arguments, "--val-fraction", 0.3)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    tokenize(monkeypatch, *arguments, "--val-fraction", 0.3, "--force")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} != before


BAD_INPUTS = {
    "a.jsonl": (b'{"text": "fine"}\n{"txt": "no"}\n', 'a.jsonl:2: not an object with a "text" string'),
    "b.jsonl": (b'{"text": "fine"\n', "b.jsonl:1: not an object"),
    "c.jsonl": (b'{"text": 3}\n', "c.jsonl:1: not an object"),
    "d.txt": (b"fine\n\xff\xfe\n", "d.txt:2: not UTF-8"),
    "e.jsonl.zst": (b"not zstandard", "e.jsonl.zst: damaged zstandard file"),
    "f.csv": (b"text\n", "f.csv: unknown kind of file"),
    "g.txt": (b"\n \n", "no document is left for training"),
    "h.jsonl": ('{"text": "fine"}\n'.encode("utf-16"), "h.jsonl: UTF-16 text; convert it: iconv"),
    "i.jsonl": ('{"text": "fine"}\n'.encode("utf-16-be"), "i.jsonl: UTF-16 or UTF-32 text without a mark"),
    "j.jsonl": (gzip.compress(b'{"text": "fine"}\n'), "j.jsonl: packed with gzip; unpack it first"),
    "k.jsonl": (
        zstandard.compress(b'{"text": "fine"}\n'),
        r"k.jsonl: packed with zstd; .* end in \.jsonl\.zst",
    ),
    "l.txt": (b"PAR1....", "l.txt: a Parquet table"),
    "m.jsonl": (b'[{"text": "fine"}]\n', "m.jsonl:1: .*one JSON document; write one object a line"),
    "n.jsonl": (b'{"content": "fine"}\n', "n.jsonl:1: not an object with a .*, it has 'content'"),
    "o.jsonl.zst": (b'{"text": "fine"}\n', "damaged zstandard file .* drop .zst if it is plain text"),
    "p.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "p.jsonl: a Git LFS pointer"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, monkeypatch, name):
    body, message = BAD_INPUTS[name]
    (tmp_path / name).write_bytes(body)
    with pytest.raises(UserError, match=message):
        tokenize(monkeypatch, tmp_path / name, "--name", "n", "--out", tmp_path / "out", "--workers", 1)
    assert contents(tmp_path) == {name: body}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.txt"])
def test_a_byte_order_mark_is_read_as_editors_write_it(tmp_path, name):
    body = b"fine\r\n" if name == "a.txt" else b'{"text": "fine\\n"}\r\n{"text": "\xef\xbb\xbf2"}\r\n'
    body = b"\xef\xbb\xbf" + body
    (tmp_path / name).write_bytes(zstandard.compress(body) if name.endswith("zst") else body)
    found = [text.rstrip("\r\n") for text in tools.read_documents(tmp_path / name, "blank")]
    assert found == (["fine"] if name == "a.txt" else ["fine", "\ufeff2"])


@pytest.mark.parametrize("how, told", [
    (dict(magic=20240801, tokens=4), "llm.c's shard for Llama 3"),
    (dict(tokens=4), "4 bytes a token"),
    (dict(tokens=0), "says 0 tokens, but some follow"),
    (dict(magic=7), "not a token shard; make shards from the text"),
])  # fmt: skip
def test_a_shard_of_another_tool_is_named(tmp_path, how, told):
    shards.write_shard(tmp_path / "x_train_000000.bin", np.arange(8, dtype=np.uint16))
    blob = bytearray((tmp_path / "x_train_000000.bin").read_bytes())
    for place, name in ((0, "magic"), (8, "tokens")):
        if name in how:
            blob[place : place + 4] = how[name].to_bytes(4, "little")
    (tmp_path / "x_train_000000.bin").write_bytes(blob)
    with pytest.raises(UserError, match=told):
        shards.read_tokens(tmp_path / "x_train_000000.bin")


def test_verify_passes_over_what_macos_leaves(copy, capsys, monkeypatch):
    (copy / "._t_train_000000.bin").write_bytes(b"\0\5\x16\7")
    assert check(capsys, monkeypatch, copy)[0] == 0


def test_a_name_that_the_console_lacks_is_escaped(tmp_path):
    shards.write_shard(tmp_path / "\xe4_train_000000.bin", np.arange(1, 8, dtype=np.uint16))
    result = run("verify", tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and r"\xe4_train_000000.bin: tokens 7" in result.stdout


def test_too_little_text_for_the_vocabulary(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("tiny\n\ntext\n")
    with pytest.raises(UserError, match="pieces, not 5000; give more text"):
        tokenize(
            monkeypatch, tmp_path / "a.txt", "--name", "n", "--out", tmp_path / "out",
            "--vocab-size", 5000, "--val-fraction", 0,
        )  # fmt: skip
    assert list((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "datasets"]


def training_environment(printed: str) -> dict[str, str]:
    """What the last line of the tool sets for the run that it names."""
    last = printed.strip().splitlines()[-1]
    words = shlex.split(last.removeprefix("train on it: "))
    assert words[:3] == ["bash", "run_best.sh", "best"], last
    return dict(word.split("=", 1) for word in words[3:])


def test_the_last_line_is_the_command_that_trains_on_it(tmp_path, monkeypatch, capsys):
    text = tmp_path / "my text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence()}) + "\n" for _ in range(300)))
    out = tmp_path / "a folder"
    options = ["--name", "mine", "--vocab-size", 300, "--val-fraction", 0.2, "--workers", 1]
    tokenize(monkeypatch, text, "--out", out, *options)
    printed = capsys.readouterr().out
    env = training_environment(printed)
    cfg = train_gpt.Config.from_env(env)
    inputs = train_gpt.load_inputs(cfg, 0, trains=True)
    assert cfg.vocab_size == 300 and len(inputs.training) > 0
    assert "warning: " in printed and "validation tokens are few" in printed
    tokenize(monkeypatch, text, "--out", out, *options)
    assert training_environment(capsys.readouterr().out) == env, "the second call says it again"
    assert inputs.validation.targets < tools.FEW_VAL_TOKENS


def test_paths_in_the_command_count_from_the_projects_folder(monkeypatch):
    project = Path(tools.__file__).resolve().parents[1]
    monkeypatch.chdir(project / "data")
    assert tools.path_for_run(Path("datasets/mine")) == "data/datasets/mine"
    assert tools.path_for_run(Path("/elsewhere/mine")) == "/elsewhere/mine"


def test_enough_validation_text_is_not_warned_of(capsys):
    split = dict(documents=9, bytes=400_000, bytes_per_token=2.0, files={"a": {}})
    manifest = dict(
        splits=dict(train=dict(split, tokens=9), val=dict(split, tokens=200_000)),
        documents_not_reproduced_exactly=0,
        tokenizer=dict(path="tokenizers/x.model", vocab_size=512),
    )
    tools.report(manifest, Path("/out/datasets/mine"), Path("/out"))
    assert "warning" not in capsys.readouterr().out
    manifest["splits"]["val"] |= dict(tokens=2_000, bytes=4_000)
    tools.report(manifest, Path("/out/datasets/mine"), Path("/out"))
    printed = capsys.readouterr().out
    # 2.5 nats are 3.6 bits; by the root of 2,000 tokens, at 2 bytes a token.
    assert "2,000 validation tokens are few" in printed and "about 0.040 bpb" in printed


def test_without_validation_text_no_command_is_promised(capsys):
    split = dict(documents=9, bytes=40, bytes_per_token=2.0, files={"a": {}}, tokens=9)
    manifest = dict(
        splits=dict(train=split),
        documents_not_reproduced_exactly=0,
        tokenizer=dict(path="tokenizers/x.model", vocab_size=512),
    )
    tools.report(manifest, Path("/out/datasets/mine"), Path("/out"))
    printed = capsys.readouterr().out
    assert "--val-fraction" in printed and "run_best.sh" not in printed


def test_errors_are_one_line_and_exit_2(tmp_path):
    result = run("tokenize_docs", tmp_path / "absent.jsonl", "--name", "n", "--out", tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'absent.jsonl'}: No such file or directory\n"


# --- verify --------------------------------------------------------------------------------------


def check(capsys, monkeypatch, *arguments) -> tuple[int, str, list[str]]:
    monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, arguments)])
    code = verify.main()
    output = capsys.readouterr()
    return code, output.out, output.err.splitlines()


@pytest.fixture
def copy(built, tmp_path) -> Path:
    for name, body in contents(built).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(body)
    return tmp_path / "datasets" / "t_sp400"


def test_verify_accepts_a_build_and_counts_its_bytes(copy, capsys, monkeypatch):
    model = copy.parents[1] / "tokenizers" / "t_400_bpe.model"
    # Small steps, so that documents span reads as well as shards.
    monkeypatch.setattr(verify, "DECODE_TOKENS", 700)
    code, output, errors = check(capsys, monkeypatch, copy, "--tokenizer", model)
    assert (code, errors) == (0, [])
    for split, entry in shards.read_manifest(copy / "manifest.json")["splits"].items():
        counts = f"tokens {entry['tokens']:,} documents {entry['documents']:,} bytes {entry['bytes']:,}"
        assert f"{split}: {counts}" in output


def patch(path: Path, offset: int, value: bytes) -> None:
    body = bytearray(path.read_bytes())
    body[offset : offset + len(value)] = value
    path.write_bytes(body)


FAULTS = {
    "magic": (lambda p: patch(p, 0, b"\1"), "magic"),
    "version": (lambda p: patch(p, 4, b"\2"), "version 2, not 1"),
    "count": (lambda p: patch(p, 8, b"\0\0\0\0"), "header says 0 tokens"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-2]), "its header asks for"),
    "empty": (lambda p: p.write_bytes(b""), "shorter than a shard header"),
    "token": (lambda p: patch(p, 1024 + 20, b"\xff\xff"), "token 65535 at 10 is not below 400"),
    "flipped": (lambda p: patch(p, 1024 + 20, b"\5\0"), "is not the manifest's"),
    "missing": (lambda p: p.unlink(), "in the manifest but not there"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_the_bad_shard(copy, capsys, monkeypatch, fault):
    damage, message = FAULTS[fault]
    path = copy / "t_train_000001.bin"
    damage(path)
    code, _, errors = check(capsys, monkeypatch, copy)
    assert code == 1 and len(errors) == 1
    assert str(path) in errors[0] and message in errors[0]


def test_verify_sees_strangers_and_wrong_tokenizers(copy, capsys, monkeypatch):
    (copy / "t_train_000099.bin").write_bytes((copy / "t_train_000000.bin").read_bytes())
    other = copy / "other.model"
    other.write_bytes(tools.train_tokenizer(TEXTS, 390))
    code, _, errors = check(capsys, monkeypatch, copy, "--tokenizer", other)
    assert code == 1
    assert any("000099.bin: not in the manifest" in line for line in errors)
    assert any("not the tokenizer the manifest names" in line for line in errors)


def test_verify_compares_totals_with_the_manifest(copy, capsys, monkeypatch):
    manifest = shards.read_manifest(copy / "manifest.json")
    manifest["splits"]["val"]["documents"] += 1
    shards.write_manifest(copy / "manifest.json", manifest)
    code, _, errors = check(capsys, monkeypatch, copy)
    assert code == 1 and "the manifest says" in errors[0]


def test_verify_audits_text_and_tokenizer(copy, capsys, monkeypatch):
    """By decoding, by pieces, by the official table; and the documents encode to their tokens again."""
    model = copy.parents[1] / "tokenizers" / "t_400_bpe.model"
    code, output, errors = check(capsys, monkeypatch, copy, "--tokenizer", model)
    held = shards.read_manifest(copy / "manifest.json")["splits"]["val"]
    count = f"{held['bytes']:,}"
    assert (code, errors) == (0, [])
    assert f"val: bytes {count} by decoding, {count} by pieces, {count} by the official table" in output
    assert (
        f"val: {held['documents']:,} of {held['documents']:,} documents give the same tokens again" in output
    )


def foreign(copy: Path, model: bytes) -> Path:
    """The folder without its manifest, and another tokenizer for it."""
    (copy / "manifest.json").unlink()
    path = copy / "other.model"
    path.write_bytes(model)
    return path


def test_verify_finds_that_another_tokenizer_of_the_size_made_the_tokens(copy, capsys, monkeypatch):
    """Without a manifest, too: 8 % wrong bpb, which no count of bytes sees."""
    other = foreign(copy, tools.train_tokenizer([text[::-1] for text in TEXTS], 400))
    code, _, errors = check(capsys, monkeypatch, copy, "--tokenizer", other)
    assert code == 1 and len(errors) == 1
    assert re.search(
        r"val: only \d+ of \d+ documents give the same tokens again; another tokenizer", errors[0]
    )


def test_verify_finds_marks_inside_pieces_that_the_official_table_counts_three_times(
    copy, capsys, monkeypatch
):
    texts = [f"{text}  two  spaces" for text in TEXTS]
    model = conftest.train_tokenizer(texts, 400, split_by_whitespace=False)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    path = foreign(copy, model)
    for old in copy.glob("*.bin"):
        old.unlink()
    tokens = np.array([token for text in texts for token in (1, *tokenizer.encode(text))], np.uint16)
    shards.write_shard(copy / "t_val_000000.bin", tokens)
    code, output, errors = check(capsys, monkeypatch, copy, "--tokenizer", path)
    marks = sum(tokenizer.id_to_piece(token).lstrip("\u2581").count("\u2581") for token in tokens.tolist())
    assert marks and code == 1 and len(errors) == 1
    assert re.search(r"official table counts \d+\.\d\d % more bytes than the text has", errors[0])


def test_verify_names_tokens_without_text(copy, capsys, monkeypatch):
    model = conftest.train_tokenizer(TEXTS, 400, byte_fallback=False, character_coverage=0.98)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    path = foreign(copy, model)
    for old in copy.glob("*.bin"):
        old.unlink()
    tokens = np.array([1, *tokenizer.encode("a \u6f22 b \u2603 the end")], np.uint16)
    shards.write_shard(copy / "t_val_000000.bin", tokens)
    code, _, errors = check(capsys, monkeypatch, copy, "--tokenizer", path)
    assert code == 1 and any("tokens are '<unk>', which stands for text" in line for line in errors)


def test_verify_without_shards_exits_2(tmp_path):
    result = run("verify", tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "data/pydocs.py" in result.stderr


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EBADF"])
def test_a_folder_that_cannot_be_locked_is_built_in_after_one_warning(name, tmp_path, monkeypatch, capsys):
    """Network file systems; those that have locks take none on a folder (EBADF)."""

    def flock(*_):
        raise OSError(getattr(errno, name), "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(file_locks, "has_warned", False)
    for place in ("a", "b"):
        with shards.exclusive(tmp_path / place):
            (tmp_path / place / "built").touch()
    assert (tmp_path / "b/built").exists()
    said = capsys.readouterr().err
    assert said.startswith("warning: this file system has no locks") and said.count("\n") == 1


@pytest.mark.parametrize("more, is_audited", [(-1, True), (0, False), (5, False)])
def test_tokens_beyond_the_tokenizer_are_not_audited(tokenizer, tmp_path, capsys, more, is_audited):
    """They were reported when the shard was read; no piece says what they weigh."""
    path = tmp_path / "x_val_000000.bin"
    text = tokenizer.encode("Seven lamps at dawn.")
    tokens = [shards.BOS, *text, shards.BOS, *text, tokenizer.vocab_size() + more]
    shards.write_shard(path, np.array(tokens, np.uint16))
    verify.audit(tokenizer, [path], "val")
    assert ("by decoding" in capsys.readouterr().out) is is_audited


def test_batches_are_closed_when_they_are_large_enough_each_split_for_itself(monkeypatch):
    """The workers get so much at once; a text of many gigabytes is never held whole."""
    monkeypatch.setattr(tools, "BATCH_BYTES", 10)
    documents = [("train", "aaaa"), ("val", "b"), ("train", "cccccc"), ("train", "ddd"), ("val", "e" * 20)]
    assert list(tools.batches(documents)) == [
        ("train", ["aaaa", "cccccc"]), ("val", ["b", "e" * 20]), ("train", ["ddd"]),
    ]  # fmt: skip
