"""CaseOps: text whose capitals are written as marks before small letters, and back, without any loss.

A tokenizer then needs one piece for `the`, `The` and `THE`. The marks are four private-use characters, each
a piece of its own. Of a run of ASCII letters:

    small letters alone          stay                      word   -> word
    capitals alone, two or more  ALLCAPS before the run    NASA   -> <ALLCAPS>nasa
    a capital at the start       TITLE before it           Word   -> <TITLE>word
    a capital further on         CAPNEXT before it         iPhone -> i<CAPNEXT>phone

A mark that stands in the text itself gets ESC before it. All other characters stay. This is
`lossless_caps_caseops_v1` of the challenge's records from #1729 on. A small letter is as many bytes as its
capital, so that a token adds to the original text what it spells, and an acting mark adds nothing.
"""

from __future__ import annotations

import re

import numpy as np
import sentencepiece

TITLE, ALLCAPS, CAPNEXT, ESC = MARKS = "\ue001\ue002\ue003\ue004"
SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece

PLAIN = re.compile(f"[A-Za-z]+|[{MARKS}]")
CODED = re.compile(
    f"{ESC}(?P<literal>[{MARKS}])|{ALLCAPS}(?P<run>[a-z]+)|[{TITLE}{CAPNEXT}](?P<letter>[a-z])"
    f"|(?P<stray>[{MARKS}])"
)


def encode(text: str) -> str:
    """The text with marks for capitals. Any text can be encoded, and `decode` gives it back."""
    return PLAIN.sub(encode_run, text)


def encode_run(match: re.Match) -> str:
    """A run of ASCII letters, or a mark that stands in the text, encoded."""
    run = match.group()
    if run in MARKS:
        return ESC + run
    if run.islower():
        return run
    if len(run) > 1 and run.isupper():
        return ALLCAPS + run.lower()
    letters = []
    for index, letter in enumerate(run):
        if letter.isupper():
            letters.append(CAPNEXT if index else TITLE)
        letters.append(letter.lower())
    return "".join(letters)


def decode(text: str) -> str:
    """The text that `encode` was given. Raises ValueError at a mark that `encode` never writes there."""
    return CODED.sub(decode_match, text)


def decode_match(match: re.Match) -> str:
    """What one mark and that on which it acts stand for."""
    if match["stray"]:
        raise ValueError(f"the mark U+{ord(match['stray']):04X} at {match.start()} acts on nothing")
    return match["literal"] or (match["run"] or match["letter"]).upper()


def has_marks(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether each mark is a piece of the tokenizer."""
    return all(tokenizer.piece_to_id(mark) != tokenizer.unk_id() for mark in MARKS)


class ByteCounts:
    """What each token of a CaseOps tokenizer adds to the original text, in bytes."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.marks = {tokenizer.piece_to_id(mark) for mark in MARKS}
        self.escape = tokenizer.piece_to_id(ESC)
        self.sizes = [piece_bytes(tokenizer, token) for token in range(tokenizer.vocab_size())]
        self.starts_with_space = [
            tokenizer.id_to_piece(token).startswith(SPACE_MARK) for token in range(tokenizer.vocab_size())
        ]

    def of_document(self, tokens: list[int]) -> np.ndarray:
        """Bytes [n] uint16 of the tokens [n] of one document, its BOS left out.

        A space mark at its start is not printed by decoding, and adds nothing.
        """
        counts = []
        is_literal = False  # the token before was an ESC that acts
        for token in tokens:
            acts = token in self.marks and not is_literal
            counts.append(0 if acts else self.sizes[token])
            is_literal = acts and token == self.escape
        if tokens and self.starts_with_space[tokens[0]]:
            counts[0] -= 1
        return np.array(counts, np.uint16)


def piece_bytes(tokenizer: sentencepiece.SentencePieceProcessor, token: int) -> int:
    """Bytes that a token prints where it is a literal part of the text."""
    if tokenizer.is_byte(token):
        return 1
    if tokenizer.is_control(token) or tokenizer.is_unused(token) or token == tokenizer.unk_id():
        return 0
    return len(tokenizer.id_to_piece(token).replace(SPACE_MARK, " ").encode())
