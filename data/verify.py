"""Check a folder of shards and say what is in it.

    python data/verify.py data/datasets/pydocs_sp1024
    python data/verify.py data/datasets/mine_sp1024 --tokenizer data/tokenizers/mine_1024_bpe.model

Prints tokens, documents and sha256 of each shard and split. With a tokenizer it also audits the two
together, whoever made them: is it the one in the manifest, do the tokens come from it, has every token its
text, and how many bytes has the text that is scored, by decoding, by train_gpt.py's pieces, and by the
official script's table. With a sidecar of bytes, *_val_bytes_*.bin, it checks that instead: as many tokens
as the validation split, and the bytes its text decodes to, of CaseOps those that the marks stand for.
Exit codes: 0 all good, 1 with one line for each fault found, 2 nothing to check.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402

from data import caseops  # noqa: E402
from data.shards import (  # noqa: E402
    BOS,
    Progress,
    command,
    manifest_files,
    read_manifest,
    read_tokens,
    sha256_file,
    shard_paths,
)
from data.tokenize_docs import SPACE_MARK, load_tokenizer  # noqa: E402
from data.user_error import UserError  # noqa: E402

DECODE_TOKENS = 1 << 20  # ids turned into Python lists at a time
AUDITED_DOCUMENTS = 2000  # that are encoded again, evenly spread
LEAST_SAME = 0.5  # share of them that a tokenizer gives the same tokens again; another one none


class ByteCounter:
    """Counts the bytes a split decodes to, document by document, across its shards."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.tokenizer, self.bytes = tokenizer, 0
        self.has_marks = caseops.has_marks(tokenizer)
        self.open = np.empty(0, dtype=np.uint16)  # a document that the next shard may continue

    def add(self, tokens: np.ndarray) -> None:
        """Take the next shard's tokens, [n] uint16."""
        for start in range(0, tokens.size, DECODE_TOKENS):
            joined = np.concatenate((self.open, tokens[start : start + DECODE_TOKENS]))
            edges = np.flatnonzero(joined == BOS)
            cut = int(edges[-1]) if edges.size else 0
            self.decode(joined[:cut], edges[:-1])
            self.open = joined[cut:]

    def decode(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        rows = [row[row != BOS].tolist() for row in np.split(tokens, starts) if row.size]
        for text in self.tokenizer.decode(rows) if rows else []:
            self.bytes += len(self.original(text).encode("utf-8"))

    def original(self, text: str) -> str:
        """What a decoded document stands for. Raises UserError where its marks make no sense."""
        try:
            return caseops.decode(text) if self.has_marks else text
        except ValueError as problem:
            raise UserError(f"a document is no CaseOps text: {problem}; build it again") from None

    def close(self) -> int:
        """Decode the last document; bytes of the whole split."""
        self.decode(self.open, np.flatnonzero(self.open == BOS))
        return self.bytes


def check_shard(path: Path, vocab_size: int | None, known: dict | None) -> tuple[np.ndarray, str]:
    """Read one shard. Returns its tokens and sha256; raises UserError at the first fault."""
    tokens = read_tokens(path)
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{path}: token {tokens[at]} at {at} is not below {vocab_size}; wrong tokenizer or damage"
        )
    digest = sha256_file(path)
    if known and digest != known["sha256"]:
        raise UserError(
            f"{path}: sha256 {digest[:16]}... is not the manifest's {known['sha256'][:16]}...; rebuild it"
        )
    return tokens, digest


def check_split(
    folder: Path,
    paths: list[Path],
    split: str,
    vocab_size: int | None,
    manifest: dict,
    counter: ByteCounter | None,
    sidecar: list[Path],
) -> list[str]:
    """Check one split's shards in order, print its lines, return its faults.

    sidecar: the shards that hold the bytes of each token, if any.
    """
    files, expected = manifest_files(manifest), manifest.get("splits", {}).get(split)
    total, documents = 0, 0
    faults = [
        f"{folder / name}: in the manifest but not there; build or fetch it again"
        for name in (expected or {}).get("files", {})
        if not (folder / name).is_file()
    ]
    whole = hashlib.sha256()
    progress = Progress(split, len(paths), "shards")
    for index, path in enumerate(paths):
        try:
            if files and path.name not in files:
                raise UserError(f"{path}: not in the manifest; a leftover, remove it")
            tokens, digest = check_shard(path, vocab_size, files.get(path.name))
        except UserError as problem:
            faults.append(str(problem))
            continue
        if index == 0 and tokens[0] != BOS:
            faults.append(
                f"{path}: starts with token {tokens[0]}, not BOS {BOS}; the split lacks its beginning"
            )
        found = int(np.count_nonzero(tokens == BOS))
        print(f"{path.name}: tokens {tokens.size:,} docs {found:,} sha256 {digest}")
        whole.update(digest.encode())
        total, documents = total + tokens.size, documents + found
        if counter:
            counter.add(tokens)
        progress.add(1)
    progress.close()
    facts = {"tokens": total, "documents": documents, **({"bytes": counter.close()} if counter else {})}
    text = " ".join(f"{name} {value:,}" for name, value in facts.items())
    print(f"{split}: {text} files {len(paths)} sha256-of-sha256s {whole.hexdigest()}")
    if sidecar:
        faults += check_sidecar(sidecar, files, total, facts.get("bytes"))
    if expected and not faults:
        faults += [
            f"{split}: {value:,} {name}, the manifest says {expected[name]:,}; build it again"
            for name, value in facts.items()
            if name in expected and expected[name] != value
        ]
    return faults


def check_sidecar(paths: list[Path], files: dict, tokens: int, text_bytes: int | None) -> list[str]:
    """Check the shards of a split's bytes by token, print their line, return their faults.

    tokens, text_bytes: of the split; text_bytes is None where no tokenizer was given.
    """
    faults = []
    found = 0
    total = 0
    for path in paths:
        try:
            if files and path.name not in files:
                raise UserError(f"{path}: not in the manifest; a leftover, remove it")
            counts, _ = check_shard(path, None, files.get(path.name))
        except UserError as problem:
            faults.append(str(problem))
            continue
        found += counts.size
        total += int(counts.sum(dtype=np.int64))
    print(f"bytes by token: tokens {found:,} bytes {total:,} files {len(paths)}")
    if not faults and found != tokens:
        faults.append(f"{paths[0]}: bytes of {found:,} tokens, the split has {tokens:,}; build both again")
    if not faults and text_bytes not in (None, total):
        faults.append(f"{paths[0]}: {total:,} bytes, the text has {text_bytes:,}; build both again")
    return faults


# --- the audit of tokens and tokenizer ----------------------------------------------------------------


def official_bytes(tokenizer: sentencepiece.SentencePieceProcessor, tokens: np.ndarray) -> int:
    """Bytes of the tokens by the official script's table: a space mark inside a piece is three of them.

    So are the three byte tokens that spell a mark. That made published scores too good by up to a fifth.
    """
    sizes = np.zeros(tokenizer.vocab_size(), np.int64)
    starts_with_space = np.zeros(len(sizes), bool)
    is_boundary = np.ones(len(sizes), bool)
    for token in range(len(sizes)):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            continue
        is_boundary[token] = False
        if tokenizer.is_byte(token):
            sizes[token] = 1
            continue
        piece = tokenizer.id_to_piece(token)
        starts_with_space[token] = piece.startswith(SPACE_MARK)
        sizes[token] = len(piece.removeprefix(SPACE_MARK).encode())
    total = int(sizes[tokens].sum())
    return total + int((starts_with_space[tokens[1:]] & ~is_boundary[tokens[:-1]]).sum())


def encoded_again(
    tokenizer: sentencepiece.SentencePieceProcessor, tokens: np.ndarray, spans: list[tuple[int, int]]
) -> tuple[int, int]:
    """(documents whose text gives the same tokens again, documents tried)."""
    chosen = spans[:: max(1, len(spans) // AUDITED_DOCUMENTS)]
    same = 0
    for start, stop in chosen:
        document = tokens[start:stop].tolist()
        same += tokenizer.encode(tokenizer.decode(document)) == document
    return same, len(chosen)


def audit(tokenizer: sentencepiece.SentencePieceProcessor, paths: list[Path], split: str) -> list[str]:
    """Print what the text of a split weighs by three counts, and return what is wrong with it."""
    import train_gpt  # only here: it imports torch, which takes a second

    shards = []
    for path in paths:
        with suppress(UserError):  # said before
            shards.append(read_tokens(path))
    if not shards or max(int(shard.max()) for shard in shards) >= tokenizer.vocab_size():
        return []
    tokens = np.concatenate(shards)
    table = train_gpt.ByteTable(tokenizer)
    faults = []
    try:
        train_gpt.refuse_lost_text(tokenizer, table, tokens)
    except train_gpt.RunError as error:
        faults.append(f"{split}: {str(error).replace('validation tokens', 'tokens')}")
    decoded = train_gpt.decoded_bytes(tokenizer, table, tokens).bytes
    counted = int(table.count_bytes(tokens).sum(dtype=np.int64))
    official = official_bytes(tokenizer, tokens)
    print(
        f"{split}: bytes {decoded:,} by decoding, {counted:,} by pieces, {official:,} by the official table"
    )
    if counted != decoded:
        faults.append(
            f"{split}: {counted:,} bytes by pieces, {decoded:,} by decoding; train_gpt.py refuses it"
        )
    if official > decoded > 0:
        share = 100 * (official / decoded - 1)
        faults.append(
            f"{split}: the official table counts {share:.2f} % more bytes than the text has; "
            "a bpb that was made with it is too low by as much"
        )
    same, tried = encoded_again(tokenizer, tokens, train_gpt.document_spans(table, tokens))
    print(f"{split}: {same:,} of {tried:,} documents give the same tokens again")
    if same < LEAST_SAME * tried:
        faults.append(
            f"{split}: only {same:,} of {tried:,} documents give the same tokens again; another tokenizer "
            "made them, and bytes and bpb by this one are wrong"
        )
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, help="folder of *_train_*.bin and *_val_*.bin")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model: audit both")
    options = parser.parse_args()
    if not options.dataset.is_dir():
        raise UserError(f"{options.dataset}: no such folder; build one with data/pydocs.py")
    splits = {split: shard_paths(options.dataset, split) for split in ("train", "val")}
    if not any(splits.values()):
        raise UserError(f"{options.dataset}: no *_train_*.bin or *_val_*.bin; build them with data/pydocs.py")
    manifest = read_manifest(options.dataset / "manifest.json") or {}
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    vocab_size = tokenizer.vocab_size() if tokenizer else manifest.get("tokenizer", {}).get("vocab_size")
    faults = []
    if options.tokenizer and "sha256" in manifest.get("tokenizer", {}):
        digest = sha256_file(options.tokenizer)
        if digest != manifest["tokenizer"]["sha256"]:
            faults.append(f"{options.tokenizer}: not the tokenizer the manifest names; use that one")
    scored = "val" if splits["val"] else "train"
    for split, paths in splits.items():
        if paths or manifest.get("splits", {}).get(split, {}).get("files"):
            counter = ByteCounter(tokenizer) if tokenizer else None
            sidecar = shard_paths(options.dataset, f"{split}_bytes")
            faults += check_split(options.dataset, paths, split, vocab_size, manifest, counter, sidecar)
    if tokenizer and splits[scored] and not shard_paths(options.dataset, f"{scored}_bytes"):
        faults += audit(tokenizer, splits[scored], scored)
    if not manifest:
        print("no manifest: hashes not compared")
    if vocab_size is None:
        print("no tokenizer given: token ids not bounded, bytes not counted")
    for fault in faults:
        print(f"bad: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    command(main)
