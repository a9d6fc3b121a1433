"""The denominator of bits per byte: what the pieces count is what the text weighs."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

import train_gpt
from tests.conftest import (
    BOS,
    EOS,
    PAD,
    UNK,
    VOCAB,
    encode_documents,
    make_texts,
    train_tokenizer,
    write_shard,
)
from train_gpt import ByteTable, RunError, decoded_bytes, load_tokenizer, load_validation

MARK = "\u2581"
TEXTS = make_texts(200, seed=3)
ODD = [
    "caf\u00e9 \u6f22\u5b57 \U0001f600 \u0928\u092e\u0938\u094d\u0924\u0947\n\ttabs  and   runs ",
    " leading space",
    "   three leading spaces",
    "broken \ufffd mark \ufffd\ufffd",
    "\ufffd",
    "<sep>right<sep> <sep>here",
    "12 345,67",
    "\u0000\u007f\u00ad\u200b\ufeff",
    " ",
    "\n",
    "a" * 300,
]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=MARK), max_size=40)
LIKELY = st.text(st.sampled_from(" \n abet\u00e9\u6f22\ufffd1<>."), max_size=40)


def patched(model: bytes, old: bytes, new: bytes) -> bytes:
    """The model file with one field of one piece changed in place."""
    assert model.count(old) == 1 and len(old) == len(new)
    return model.replace(old, new)


def field_of(piece: str) -> bytes:
    """How the file spells a piece: tag, length, text, and the tag of its score."""
    return b"\x0a" + bytes([len(piece.encode())]) + piece.encode() + b"\x15"


def without_space_piece() -> bytes:
    """A lone space is then three byte tokens (parameter-golf #897)."""
    return patched(train_tokenizer(TEXTS), field_of(MARK), field_of("\u2603"))


def with_unused_piece() -> bytes:
    """The piece <unused> is of the kind that encoding never gives."""
    model = train_tokenizer(TEXTS, user_defined_symbols=["<sep>", "<unused>"])
    at = model.index(field_of("<unused>")) + len(field_of("<unused>")) + 4
    assert model[at : at + 2] == b"\x18\x04"
    return model[:at] + b"\x18\x05" + model[at + 2 :]


# Tokenizers that give every byte of a text back.
FAITHFUL = dict(
    ours=lambda: train_tokenizer(TEXTS),
    no_space_piece=without_space_piece,
    dummy_prefix=lambda: train_tokenizer(TEXTS, add_dummy_prefix=True),
    special_pieces=lambda: train_tokenizer(
        TEXTS, control_symbols=["<ctl>"], user_defined_symbols=["<sep>", "\n"]
    ),
    unused_piece=with_unused_piece,
    unigram=lambda: train_tokenizer(TEXTS, model_type="unigram"),
    spaces_inside=lambda: train_tokenizer(TEXTS, split_by_whitespace=False, vocab_size=340),
)
# Tokenizers that rewrite it, so that only decoding says what was kept.
REWRITING = dict(
    challenge=lambda: train_tokenizer(
        TEXTS, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    ),
    sentencepiece_defaults=lambda: train_tokenizer(
        TEXTS, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, add_dummy_prefix=True
    ),
)
MADE: dict[str, SentencePieceProcessor] = {}


def tokenizer_named(name: str) -> SentencePieceProcessor:
    if name not in MADE:
        MADE[name] = SentencePieceProcessor(model_proto=(FAITHFUL | REWRITING)[name]())
    return MADE[name]


def counted(tokenizer, tokens) -> int:
    """Bytes of all targets of a stream that starts with BOS."""
    assert tokens[0] == BOS
    return int(ByteTable(tokenizer).count_bytes(np.array(tokens, np.uint16))[1:].sum(dtype=np.int64))


def decoded(tokenizer, tokens) -> int:
    return decoded_bytes(tokenizer, ByteTable(tokenizer), np.array(tokens, np.uint16))[1]


def weight_of(name, texts) -> int:
    """UTF-8 bytes of the documents. A document's own first space is lost where no prefix stands before it."""
    tokenizer = tokenizer_named(name)
    firsts = [] if name == "dummy_prefix" else [ids[0] for ids in map(tokenizer.encode, texts) if ids]
    lost = sum(tokenizer.id_to_piece(token).startswith(MARK) for token in firsts)
    return sum(len(text.encode()) for text in texts) - lost


# --- counting by pieces against the text ---------------------------------------------------------


@pytest.mark.parametrize("name", FAITHFUL)
def test_pieces_weigh_what_the_text_weighs(name):
    tokenizer, texts = tokenizer_named(name), [*TEXTS[:40], *ODD]
    tokens = encode_documents(tokenizer, texts)
    assert counted(tokenizer, tokens) == weight_of(name, texts) == decoded(tokenizer, tokens)


@pytest.mark.parametrize("name", FAITHFUL)
@settings(max_examples=60, deadline=None)
@example(texts=[" a", "  b", ""])
@given(texts=st.lists(st.one_of(TEXT, LIKELY), min_size=1, max_size=4))
def test_any_text_weighs_its_utf8(name, texts):
    tokenizer = tokenizer_named(name)
    tokens = encode_documents(tokenizer, texts)
    assert counted(tokenizer, tokens) == weight_of(name, texts) == decoded(tokenizer, tokens)


@pytest.mark.parametrize("name", REWRITING)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(TEXT, LIKELY), min_size=1, max_size=4))
def test_a_rewriting_tokenizer_weighs_what_it_kept(name, texts):
    tokenizer = tokenizer_named(name)
    tokens = encode_documents(tokenizer, texts)
    kept = sum(len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in texts)
    assert counted(tokenizer, tokens) == kept == decoded(tokenizer, tokens)


@pytest.mark.parametrize("name", [*FAITHFUL, "challenge"])
@settings(max_examples=40, deadline=None)
@given(st.one_of(TEXT, LIKELY), st.data())
def test_a_document_may_be_cut_anywhere_even_inside_a_character(name, text, data):
    tokenizer = tokenizer_named(name)
    tokens = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(tokens)))
    stream = [BOS, *tokens[:cut], BOS, *tokens[cut:]]
    assert counted(tokenizer, stream) == decoded(tokenizer, stream)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=60))
def test_the_oracle_agrees_on_any_tokens_whatsoever(tokenizer, tokens):
    """Not only on what encoding gives: broken characters, controls in the middle, spaces everywhere."""
    assert counted(tokenizer, [BOS, *tokens]) == decoded(tokenizer, [BOS, *tokens])


def test_a_replacement_character_may_be_a_piece_of_its_own():
    texts = [*TEXTS, "lost \ufffd\ufffd and \ufffdfound\n" * 9]
    model = train_tokenizer(texts, byte_fallback=False, vocab_size=120, character_coverage=1.0)
    tokenizer = SentencePieceProcessor(model_proto=model)
    tokens = encode_documents(tokenizer, texts)
    assert UNK not in tokens and len(tokenizer.encode("\ufffd")) == 1
    assert (
        counted(tokenizer, tokens) == sum(len(text.encode()) for text in texts) == decoded(tokenizer, tokens)
    )


def test_bytes_of_single_tokens(tokenizer):
    own = dict(zip(range(VOCAB), ByteTable(tokenizer).piece_bytes.tolist(), strict=True))
    assert [own[token] for token in (PAD, BOS, EOS, UNK)] == [0, 0, 0, 0]
    assert all(own[tokenizer.piece_to_id(f"<0x{byte:02X}>")] == 1 for byte in range(256))
    for token in range(260, VOCAB):
        assert own[token] == len(tokenizer.id_to_piece(token).removeprefix(MARK).encode())


@pytest.mark.parametrize("boundary, weight", [(BOS, 3), (EOS, 3), (PAD, 3), (UNK, 3), (None, 4)])
def test_a_space_counts_unless_it_starts_a_document(tokenizer, boundary, weight):
    """'the' with its space mark, after a boundary or after the letter 'a'."""
    the, letter = tokenizer.encode(" the"), tokenizer.piece_to_id("<0x61>")
    assert tokenizer.decode(the) == " the"
    before = letter if boundary is None else boundary
    assert counted(tokenizer, [BOS, before, *the]) - counted(tokenizer, [BOS, before]) == weight


def test_special_pieces_weigh_what_they_print():
    tokenizer = tokenizer_named("special_pieces")
    table, id_of = ByteTable(tokenizer), tokenizer.piece_to_id
    assert (
        table.piece_bytes[id_of("<ctl>")],
        table.piece_bytes[id_of("<sep>")],
        table.piece_bytes[id_of("\n")],
    ) == (0, 5, 1)
    stream = [BOS, *tokenizer.encode("a"), id_of("<ctl>"), *tokenizer.encode(" b<sep>")]
    assert counted(tokenizer, stream) == decoded(tokenizer, stream) == len("ab<sep>")


def test_an_unused_piece_weighs_nothing():
    tokenizer = tokenizer_named("unused_piece")
    unused = tokenizer.piece_to_id("<unused>")
    assert tokenizer.is_unused(unused)
    stream = [BOS, *tokenizer.encode("ab"), unused, *tokenizer.encode("cd")]
    assert counted(tokenizer, stream) == decoded(tokenizer, stream) == 4


def test_a_space_without_a_piece_weighs_one_byte():
    """It is the three byte tokens of U+2581; three bytes for it made a score a fifth too good (#897)."""
    tokenizer = tokenizer_named("no_space_piece")
    assert tokenizer.piece_to_id(MARK) == UNK
    tokens = tokenizer.encode("a  b")
    assert sum(map(tokenizer.is_byte, tokens)) >= 3
    assert counted(tokenizer, [BOS, *tokens]) == 4


# --- the validation split ------------------------------------------------------------------------


@pytest.fixture
def split(tiny, dataset, tmp_path):
    """A copy of the data that a test may spoil: its config, and the shard's path."""
    for name in ("toy_val_000000.bin", "tokenizer.model"):
        shutil.copy(dataset / name, tmp_path)
    cfg = tiny(data_path=str(tmp_path), tokenizer_path=str(tmp_path / "tokenizer.model"))
    return SimpleNamespace(cfg=cfg, folder=tmp_path, shard=tmp_path / "toy_val_000000.bin")


def load(cfg):
    return load_validation(cfg, load_tokenizer(cfg))


def test_the_validation_split_is_counted_whole(split):
    data, texts = load(split.cfg), make_texts(40, seed=2)
    assert data.documents == len(texts) and data.bytes == sum(len(text.encode()) for text in texts)
    assert data.targets == len(data.tokens) - 1 == (split.shard.stat().st_size - 1024) // 2 - 1
    assert data.target_bytes.shape == (data.targets,)


def test_other_ranks_count_the_same_without_the_proof(split):
    proved = load(split.cfg)
    taken = load_validation(split.cfg, load_tokenizer(split.cfg), prove=False)
    assert (taken.bytes, taken.sha256) == (proved.bytes, proved.sha256)


def test_the_split_is_identified_by_its_tokens_not_its_files(split):
    before = load(split.cfg)
    for index, part in enumerate(np.array_split(before.tokens, 3)):
        write_shard(split.folder / f"toy_val_{index:06d}.bin", part)
    after = load(split.cfg)
    assert (after.sha256, after.bytes, after.documents) == (before.sha256, before.bytes, before.documents)


@pytest.mark.parametrize("vocab", [VOCAB - 1, VOCAB + 1, 1024])
def test_a_tokenizer_of_another_size_is_refused(split, tiny, vocab):
    cfg = tiny(vocab_size=vocab, tokenizer_path=split.cfg.tokenizer_path)
    with pytest.raises(RunError, match=rf"VOCAB_SIZE={vocab} but .*tokenizer\.model has {VOCAB} pieces"):
        load_tokenizer(cfg)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 500])
def test_a_file_that_is_no_tokenizer_is_refused(split, content):
    (split.folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(RunError, match="tokenizer.model") as caught:
        load_tokenizer(split.cfg)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_refused(split):
    (split.folder / "tokenizer.model").unlink()
    with pytest.raises(RunError, match="no tokenizer at TOKENIZER_PATH="):
        load_tokenizer(split.cfg)


def test_a_split_of_a_larger_vocabulary_is_refused(split):
    write_shard(split.shard, [BOS, 300, VOCAB + 700])
    with pytest.raises(
        RunError, match=rf"toy_val_000000\.bin holds token {VOCAB + 700} at position 2, beyond"
    ):
        load(split.cfg)


def test_a_stream_that_its_tokenizer_cannot_have_made_is_refused(split):
    """Two leading spaces: this tokenizer removes them when encoding, and again when decoding."""
    model = train_tokenizer(TEXTS, remove_extra_whitespaces=True, add_dummy_prefix=True)
    (split.folder / "tokenizer.model").write_bytes(model)
    space = SentencePieceProcessor(model_proto=model).piece_to_id(MARK)
    write_shard(split.shard, [BOS, space, space, space, 270, BOS, 271])
    with pytest.raises(RunError, match=r"wrong byte count: \d+ by pieces, \d+ by decoding .*tokenizer.model"):
        load(split.cfg)


def test_marks_that_decoding_drops_are_named_as_the_cause(split):
    """A literal U+2581 at a document's start is encoded, and decoding drops it (sentencepiece #459)."""
    model = train_tokenizer(TEXTS, remove_extra_whitespaces=True, add_dummy_prefix=True)
    (split.folder / "tokenizer.model").write_bytes(model)
    tokenizer = SentencePieceProcessor(model_proto=model)
    write_shard(split.shard, encode_documents(tokenizer, [*TEXTS[:3], MARK + TEXTS[3], TEXTS[4]]))
    with pytest.raises(
        RunError, match=r"document 4 begins with several space marks \(U\+2581\).* replace it"
    ) as told:
        load(split.cfg)
    assert "belong to" not in str(told.value)


# --- text that no token gives back ---------------------------------------------------------------


def write_split(split, model: bytes, tokens) -> None:
    """The fixture's data by another tokenizer."""
    (split.folder / "tokenizer.model").write_bytes(model)
    write_shard(split.shard, tokens)


def test_a_text_with_unknown_pieces_is_refused(split):
    """3,517 of 40,393 tokens were unknown in a published case; their bytes were left out of the score."""
    model = train_tokenizer(TEXTS, byte_fallback=False, character_coverage=0.98)
    tokenizer = SentencePieceProcessor(model_proto=model)
    tokens = encode_documents(tokenizer, [*TEXTS[:20], "a \u6f22\u5b57 b \u2603"])
    unknown = tokens.count(UNK)
    assert unknown >= 2
    cfg = split.cfg if tokenizer.vocab_size() == VOCAB else None
    assert cfg is not None
    write_split(split, model, tokens)
    for prove in (True, False):
        with pytest.raises(
            RunError, match=rf"^{unknown} of {len(tokens)} validation tokens are '<unk>'.*byte fallback"
        ):
            load_validation(cfg, load_tokenizer(cfg), prove)


def test_a_text_with_an_unused_piece_is_refused(split):
    model = with_unused_piece()
    tokenizer = SentencePieceProcessor(model_proto=model)
    unused = tokenizer.piece_to_id("<unused>")
    write_split(split, model, [BOS, *tokenizer.encode(TEXTS[0]), unused, *tokenizer.encode(TEXTS[1])])
    with pytest.raises(RunError, match="^1 of .* are '<unused>'"):
        load(split.cfg)


def with_controls(split) -> SimpleNamespace:
    """A tokenizer with the control piece <ctl>, its id, and two encoded texts."""
    model = FAITHFUL["special_pieces"]()
    tokenizer = SentencePieceProcessor(model_proto=model)
    texts = [tokenizer.encode(text) for text in TEXTS[:2]]
    return SimpleNamespace(model=model, id=tokenizer.piece_to_id("<ctl>"), texts=texts)


def test_a_control_piece_within_a_document_is_refused(split):
    made = with_controls(split)
    one, other = made.texts
    write_split(split, made.model, [BOS, *one, made.id, *other, BOS, *one, made.id, *other])
    with pytest.raises(RunError, match="^2 of .* are '<ctl>'.*user-defined piece"):
        load(split.cfg)


@pytest.mark.parametrize("place", ["alone", "before BOS", "after BOS", "last", "BOS and EOS", "padding"])
def test_a_control_piece_between_documents_is_a_boundary(split, place):
    made = with_controls(split)
    one, other = made.texts
    streams = {
        "alone": [made.id, *one, made.id, *other],
        "before BOS": [BOS, *one, made.id, BOS, *other],
        "after BOS": [BOS, made.id, *one, BOS, made.id, *other],
        "last": [BOS, *one, BOS, *other, made.id],
        "BOS and EOS": [BOS, *one, EOS, BOS, *other, EOS],
        "padding": [BOS, *one, EOS, PAD, PAD, BOS, *other, EOS],
    }
    write_split(split, made.model, streams[place])
    assert load(split.cfg).documents == 2


# --- the manifest --------------------------------------------------------------------------------


def manifest_of(split, sha256) -> None:
    content = dict(tokenizer=dict(path="tokenizer.model", sha256=sha256))
    (split.folder / "manifest.json").write_text(json.dumps(content))


def test_another_tokenizer_than_the_manifests_is_refused(split):
    """Of the same size, and its bytes are proved: only the manifest knows better."""
    own = hashlib.sha256((split.folder / "tokenizer.model").read_bytes()).hexdigest()
    before = load(split.cfg)
    other = train_tokenizer(make_texts(200, seed=9))
    (split.folder / "tokenizer.model").write_bytes(other)
    wrong = load(split.cfg)
    assert wrong.targets == before.targets and wrong.bytes != before.bytes
    manifest_of(split, own)
    with pytest.raises(RunError, match=rf"did not make DATA_PATH=.* {own[:16]}$"):
        load(split.cfg)
    manifest_of(split, hashlib.sha256(other).hexdigest())
    assert load(split.cfg).bytes == wrong.bytes


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{",
        '{"tokenizer": 3}',
        '{"tokenizer": {}}',
        '{"tokenizer": {"sha256": null}}',
        "\xff",
    ],
)
def test_a_manifest_of_another_kind_says_nothing(split, content):
    (split.folder / "manifest.json").write_bytes(content.encode("latin-1"))
    assert load(split.cfg).documents == 40


@pytest.mark.parametrize(
    "tokens, reason", [([BOS], "fewer than two tokens"), ([BOS, EOS], "decode to no text")]
)
def test_a_split_without_text_is_refused(split, tokens, reason):
    write_shard(split.shard, tokens)
    with pytest.raises(RunError, match=reason):
        load(split.cfg)


# --- the oracle's cache --------------------------------------------------------------------------


@pytest.fixture
def oracle(monkeypatch):
    """How often the text was decoded."""
    calls, real = [], train_gpt.decoded_bytes
    monkeypatch.setattr(train_gpt, "decoded_bytes", lambda *args: calls.append(1) or real(*args))
    return calls


def cache_of(split):
    return next(split.folder.glob(".bytes-*.json"))


def test_the_text_is_decoded_once(split, oracle):
    first, second = load(split.cfg), load(split.cfg)
    assert len(oracle) == 1 and (first.bytes, first.documents) == (second.bytes, second.documents)


DAMAGED = [
    b"",
    b"{",
    b"null",
    b"[1, 2]",
    b"\xff\xfe",
    b'{"key": 1}',
    b'{"key": "x", "documents": 1, "bytes": 2}',
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_cache_is_counted_again_and_mended(split, oracle, damage):
    load(split.cfg)
    path, good = cache_of(split), cache_of(split).read_bytes()
    path.write_bytes(damage)
    assert load(split.cfg).documents == 40 and len(oracle) == 2
    assert path.read_bytes() == good


@pytest.mark.parametrize("value", ["null", '"x"', "[]", "Infinity", "-Infinity", "NaN", "1e999"])
def test_a_cache_with_a_wrong_value_is_counted_again(split, oracle, value):
    load(split.cfg)
    saved = json.loads(cache_of(split).read_text())
    cache_of(split).write_text(json.dumps(saved | dict(bytes=json.loads(value))))
    assert load(split.cfg).documents == 40 and len(oracle) == 2


def test_another_tokenizer_is_counted_again(split, oracle):
    load(split.cfg)
    (split.folder / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, control_symbols=["<ctl>"]))
    load(split.cfg)
    assert len(oracle) == 2


def test_a_read_only_dataset_only_costs_the_count_again(split, oracle, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train_gpt, "write_atomic", refuse)
    assert load(split.cfg).documents == load(split.cfg).documents == 40
    assert len(oracle) == 2 and not list(split.folder.glob(".bytes-*"))


@pytest.mark.parametrize("stream, starts", [
    ([BOS, "a", "b", BOS, "a", EOS, BOS, "b", "b", BOS], [3, 5, 6]),  # after the last one nothing comes
    ([BOS, "a", EOS, "b"], [2]), (["a", BOS, "b"], [1]), ([BOS, "a", "b"], []), ([BOS, "a"], []),
])  # fmt: skip
def test_the_targets_that_open_a_document_are_those_read_off_its_boundary(split, stream, starts):
    """Target i is token i + 1, read off token i: one off, and a window would see the document before."""
    tokenizer = load_tokenizer(split.cfg)
    tokens = [token if isinstance(token, int) else tokenizer.encode(token)[-1] for token in stream]
    write_shard(split.shard, tokens)
    assert load(split.cfg).starts.tolist() == starts


def test_a_control_piece_within_a_document_is_refused_where_bos_is_the_token_zero_too(split):
    model = train_tokenizer(TEXTS, control_symbols=["<ctl>"], bos_id=0, pad_id=1)
    tokenizer = SentencePieceProcessor(model_proto=model)
    text = tokenizer.encode(TEXTS[0])
    write_split(split, model, [0, *text, tokenizer.piece_to_id("<ctl>"), *text])
    with pytest.raises(RunError, match="^1 of .* are '<ctl>'"):
        load(split.cfg)
