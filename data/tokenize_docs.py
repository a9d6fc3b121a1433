"""Turn your own text into shards: train or reuse a tokenizer, encode in parallel, hold some out.

    python data/tokenize_docs.py docs.jsonl --name mine                train a tokenizer of 1,024 pieces
    python data/tokenize_docs.py a.jsonl.zst b.jsonl.zst --name mine --vocab 8192 --caseops
    python data/tokenize_docs.py book.txt --name book --txt file --tokenizer data/tokenizers/X.model

Input: `.jsonl` or `.jsonl.zst` with one {"text": ...} a line, or `.txt`. Output: shards and
manifest in OUT/datasets/NAME_spV, tokenizer in OUT/tokenizers. The same input gives the same bytes.
With --caseops (data/caseops.py) the folder is NAME_spV_caseops, and *_val_bytes_*.bin beside the validation
shards say how many bytes of your text each token adds.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import zstandard  # noqa: E402

from data import caseops  # noqa: E402
from data.shards import (  # noqa: E402
    BOS,
    FEW_VAL_TOKENS,
    MAX_SHARD_TOKENS,
    Progress,
    SplitWriter,
    atomic_file,
    command,
    describe_file,
    exclusive,
    is_complete,
    publish,
    read_manifest,
    scratch_folder,
    val_bpb_doubt,
)
from data.user_error import UserError  # noqa: E402

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
BATCH_BYTES = 1 << 20  # text sent to a worker at a time
# Part of what a tokenizer file records, so it is a constant: the bytes must not depend on the machine.
TRAINER_THREADS = 2


def tidy(text: str) -> str:
    """The text a tokenizer of ours reproduces exactly.

    Four things cannot survive a round trip through SentencePiece or through UTF-8: lone
    surrogates, the space mark itself (it decodes to a space), Windows line ends next to Unix ones,
    and spaces at the very start (a mark after BOS is scored as no byte).
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace(SPACE_MARK, "_").replace("\r\n", "\n").lstrip(" ")


def text_digest(text: str) -> bytes:
    """sha256 of a document: what orders documents and decides which are held out."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether a document with this digest belongs to validation. Copies always agree."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def train_tokenizer(texts: Iterable[str], vocab_size: int, marks: str = "") -> bytes:
    """Train a byte-fallback BPE on `texts` and return the model file. `marks` become single pieces.

    The layout is the challenge's: pad 0, bos 1, eos 2, unk 3, the 256 bytes at 4..259, digits
    split, coverage 0.999, no dummy prefix. Unlike the challenge's it normalises nothing, so that
    decoding gives back the document's bytes. No random choice is made: all text is used.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=list(marks),
            character_coverage=0.999,
            split_digits=True,
            byte_fallback=True,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"no tokenizer from this text: {reason}; give more text") from None
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if found != vocab_size:
        raise UserError(
            f"the text yields {found} pieces, not {vocab_size}; give more text or --vocab {found}"
        )
    return model.getvalue()


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a tokenizer. Raises UserError if it is none, or cannot be used in a uint16 shard."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(f"{path}: not a SentencePiece model; pass a .model file") from None
    if tokenizer.vocab_size() > 65536:
        raise UserError(f"{path}: {tokenizer.vocab_size()} pieces do not fit in uint16; use 65536 or fewer")
    if tokenizer.bos_id() != BOS:
        raise UserError(
            f"{path}: BOS id is {tokenizer.bos_id()}, shards need {BOS}; train one with this tool"
        )
    return tokenizer


class Encoded(NamedTuple):
    """Some documents as tokens."""

    tokens: np.ndarray  # [n] uint16, a BOS before each document
    text_bytes: int  # of the text that they decode to
    inexact: int  # documents that do not decode to themselves
    token_bytes: np.ndarray | None = None  # [n] uint16, what each token adds to text_bytes; CaseOps only


def encode_documents(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> Encoded:
    """Encode documents, each with a BOS before it, and check what they decode to.

    Raises UserError where the tokenizer has no way to spell a character.
    """
    rows = encode_rows(tokenizer, texts)
    decoded = tokenizer.decode(rows)
    inexact = sum(text != back for text, back in zip(texts, decoded, strict=True))
    return Encoded(join_rows(rows, BOS), sum(len(back.encode("utf-8")) for back in decoded), inexact)


def encode_caseops(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> Encoded:
    """The same by way of CaseOps: bytes and exactness are those of the texts, not of their marks.

    Raises UserError, too, where the tokens' bytes are not those of the text that they decode to.
    """
    rows = encode_rows(tokenizer, [caseops.encode(text) for text in texts])
    counter = caseops.ByteCounts(tokenizer)
    counts = []
    text_bytes = 0
    inexact = 0
    for text, row, coded in zip(texts, rows, tokenizer.decode(rows), strict=True):
        back = caseops.decode(coded)
        size = len(back.encode("utf-8"))
        counts.append(counter.of_document(row))
        if int(counts[-1].sum()) != size:
            raise UserError(
                f"{text[:40]!r}...: {counts[-1].sum()} bytes by token, {size} by decoding; "
                "use another tokenizer"
            )
        text_bytes += size
        inexact += text != back
    return Encoded(join_rows(rows, BOS), text_bytes, inexact, join_rows(counts, 0))


def encode_rows(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    """The tokens of each text. Raises UserError where a character cannot be spelt."""
    rows = tokenizer.encode(texts, out_type=int)
    unknown = tokenizer.unk_id()
    for text, row in zip(texts, rows, strict=True):
        if unknown in row:
            raise UserError(f"the tokenizer cannot spell part of {text[:40]!r}; use one with byte fallback")
    return rows


def join_rows(rows: Iterable, first: int) -> np.ndarray:
    """The rows one after the other, [n] uint16, with `first` before each."""
    return np.fromiter(itertools.chain.from_iterable((first, *row) for row in rows), dtype=np.uint16)


_worker_tokenizer: sentencepiece.SentencePieceProcessor | None = None
_worker_encode: Callable = encode_documents


def _start_encoder(model: bytes, uses_caseops: bool) -> None:
    """Give a worker process its tokenizer."""
    global _worker_tokenizer, _worker_encode
    _worker_tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    _worker_encode = encode_caseops if uses_caseops else encode_documents


def _encode_batch(batch: tuple[str, list[str]]):
    """Encode a batch in a worker; the split's name travels along."""
    split, texts = batch
    return split, len(texts), sum(map(len, texts)), _worker_encode(_worker_tokenizer, texts)


def _start_worker(initializer: Callable | None, arguments: tuple) -> None:
    # The parent alone reacts to Ctrl-C; otherwise every worker prints a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if initializer:
        initializer(*arguments)


def ordered_map(
    function: Callable, items: Iterable, workers: int, initializer=None, arguments=()
) -> Iterator:
    """`map` over processes: results in order, at most a few items per worker in memory."""
    if workers <= 1:
        if initializer:
            initializer(*arguments)
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(initializer, arguments))
    try:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Group (split, text) into (split, [text, ...]) of about BATCH_BYTES; order within a split stays."""
    open_batches: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for split, text in documents:
        open_batches.setdefault(split, []).append(text)
        sizes[split] = sizes.get(split, 0) + len(text)
        if sizes[split] >= BATCH_BYTES:
            yield split, open_batches.pop(split)
            sizes[split] = 0
    yield from open_batches.items()


def encode_splits(
    documents: Iterable[tuple[str, str]],
    model: bytes,
    writers: dict[str, SplitWriter],
    workers: int,
    progress: Progress | None = None,
    uses_caseops: bool = False,
) -> tuple[dict, int]:
    """Encode (split, text) documents into each split's shards; with CaseOps, a sidecar for "val".

    Returns the manifest's "splits" and the number of documents that do not decode to themselves.
    """
    inexact = 0
    work = ordered_map(_encode_batch, batches(documents), workers, _start_encoder, (model, uses_caseops))
    with contextlib.closing(work):
        for split, count, characters, encoded in work:
            token_bytes = encoded.token_bytes if split == "val" else None
            writers[split].add(encoded.tokens, count, encoded.text_bytes, token_bytes)
            inexact += encoded.inexact
            if progress:
                progress.add(characters)
    return {split: writer.close() for split, writer in writers.items()}, inexact


# --- reading ---------------------------------------------------------------------------------------


def read_documents(path: Path, txt: str) -> Iterator[str]:
    """The documents of one file, tidied, empty ones left out. Raises UserError at the line at fault."""
    if path.name.endswith((".jsonl", ".jsonl.zst")):
        raw = json_texts(path)
    elif path.name.endswith(".txt"):
        raw = plain_texts(path, txt)
    else:
        raise UserError(f"{path}: unknown kind of file; give .jsonl, .jsonl.zst or .txt")
    return (text for text in map(tidy, raw) if text.strip())


def open_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file, decompressed where its name ends in .zst."""
    with open(path, "rb") as file:
        source = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        try:
            for number, line in enumerate(io.BufferedReader(source, 1 << 20), 1):
                if number == 1:
                    refuse_other_kinds(path, line)
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file") from None
        except zstandard.ZstdError as error:
            raise UserError(
                f"{path}: damaged zstandard file ({error}); fetch it again, or drop .zst if it is plain text"
            ) from None


# How a file begins that is no UTF-8 text: what it is and what to do.
OTHER_KINDS = {
    codecs.BOM_UTF16_LE: "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "packed with gzip; unpack it first: gunzip",
    b"\x28\xb5\x2f\xfd": "packed with zstd; let its name end in .jsonl.zst",
    b"BZh": "packed with bzip2; unpack it first",
    b"\xfd7zXZ": "packed with xz; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet table; write its text column as .jsonl",
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the file",
}


def refuse_other_kinds(path: Path, line: bytes) -> None:
    """UserError if a file begins as one of another kind does; line: its first."""
    for start, kind in OTHER_KINDS.items():
        if line.startswith(start):
            raise UserError(f"{path}: {kind}")
    if b"\0" in line[:4]:
        raise UserError(f"{path}: UTF-16 or UTF-32 text without a mark, or binary; convert it to UTF-8")


def json_texts(path: Path) -> Iterator[str]:
    """The "text" of each line of a .jsonl file; blank lines are skipped."""
    for number, line in open_lines(path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f'{path}:{number}: not an object with a "text" string{describe_entry(line, entry)}; '
                "mend or drop the line"
            )
        yield text


def describe_entry(line: str, entry: object) -> str:
    """What a line of a .jsonl file is instead, if that is worth a phrase."""
    if isinstance(entry, dict):
        return f", it has {', '.join(map(repr, list(entry)[:5])) or 'nothing'}"
    if isinstance(entry, list) or line.strip() in ("[", "{"):
        return ", but part of one JSON document; write one object a line: jq -c '.[]'"
    return ""


def plain_texts(path: Path, txt: str) -> Iterator[str]:
    """Documents of a .txt file: runs of lines between blank ones, or the file as one document."""
    lines: list[str] = []
    for _, line in open_lines(path):
        if txt == "blank" and not line.strip():
            yield "".join(lines).rstrip("\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines).rstrip("\n")


def split_stream(paths: list[Path], txt: str, val_fraction: float) -> Iterator[tuple[str, str, bytes]]:
    """(split, text, digest) of every document, in the order of the files."""
    for path in paths:
        for text in read_documents(path, txt):
            digest = text_digest(text)
            yield "val" if is_held_out(digest, val_fraction) else "train", text, digest


# --- the build -------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Counter[str]:
    """Read everything once, so that a bad line stops us before anything is written.

    Returns documents and characters by split, under "train docs", "train chars" and so on.
    """
    counts: Counter[str] = Counter()
    for split, text, _ in split_stream(options.inputs, options.txt, options.val_fraction):
        counts[f"{split} docs"] += 1
        counts[f"{split} chars"] += len(text)
    if not counts["train docs"]:
        raise UserError("no document is left for training; give more text or a smaller --val-fraction")
    if options.val_fraction and not counts["val docs"]:
        raise UserError(
            f"none of {counts['train docs']} documents is held out; give more documents, a larger "
            "--val-fraction, or --val-fraction 0"
        )
    return counts


def tokenizer_model(options: argparse.Namespace, train_chars: int) -> bytes:
    """The model file to encode with: the one given, or one trained on the training side.

    Of a large text only a part is used, chosen by the documents' digests.
    """
    if options.tokenizer:
        if options.caseops and not caseops.has_marks(load_tokenizer(options.tokenizer)):
            raise UserError(
                f"{options.tokenizer}: has no pieces for the marks of --caseops; train one with it"
            )
        return options.tokenizer.read_bytes()
    share = min(1.0, options.tokenizer_megabytes * 1e6 / train_chars)
    stream = split_stream(options.inputs, options.txt, options.val_fraction)
    # Bytes 8.. of the digest: the first eight already chose the side.
    texts = (text for split, text, digest in stream if split == "train" and is_held_out(digest[8:], share))
    if options.caseops:
        return train_tokenizer(map(caseops.encode, texts), options.vocab_size, caseops.MARKS)
    return train_tokenizer(texts, options.vocab_size)


def recipe(options: argparse.Namespace) -> dict:
    """All that decides the output: the inputs' hashes and the options."""
    made_from = {
        "inputs": [{"name": path.name, **describe_file(path)} for path in options.inputs],
        "txt": options.txt,
        "val_fraction": options.val_fraction,
        "tokenizer_megabytes": options.tokenizer_megabytes,
        "reused_tokenizer": describe_file(options.tokenizer)["sha256"] if options.tokenizer else None,
    }
    if options.caseops:
        made_from["caseops"] = True
    return made_from


def build(options: argparse.Namespace, dataset: Path, tokenizer: Path, made_from: dict) -> dict:
    """Write shards, tokenizer and manifest; returns the manifest."""
    counts = measure(options)
    characters = counts["train chars"] + counts["val chars"]
    with scratch_folder(dataset) as scratch:
        model = tokenizer_model(options, counts["train chars"])
        if tokenizer.exists() and tokenizer.read_bytes() != model and not options.force:
            raise UserError(
                f"{tokenizer} is another tokenizer; choose another --name, or --force to replace it"
            )
        with atomic_file(scratch / tokenizer.name) as file:
            file.write(model)
        vocab_size = load_tokenizer(scratch / tokenizer.name).vocab_size()
        used = ["train", "val"] if options.val_fraction else ["train"]
        writers = {split: SplitWriter(scratch, options.name, split, options.shard_tokens) for split in used}
        documents = (
            (split, text)
            for split, text, _ in split_stream(options.inputs, options.txt, options.val_fraction)
        )
        progress = Progress("encoding", characters, "characters")
        splits, inexact = encode_splits(documents, model, writers, options.workers, progress, options.caseops)
        progress.close()
        manifest = {
            "name": dataset.name,
            "splits": splits,
            "tokenizer": {
                "path": f"tokenizers/{tokenizer.name}",
                "vocab_size": vocab_size,
                **describe_file(scratch / tokenizer.name),
            },
            "documents_not_reproduced_exactly": inexact,
            "made_from": made_from,
        }
        publish(scratch, dataset, tokenizer, manifest)
    return manifest


def report(manifest: dict, dataset: Path, out: Path) -> None:
    """Print one line a split, what to be careful about, and last the command that trains on the text."""
    for split, entry in manifest["splits"].items():
        print(
            f"{dataset} {split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
            f"{entry['bytes']:,} bytes, {entry['bytes_per_token']} bytes a token, {len(entry['files'])} files"
        )
    if changed := manifest["documents_not_reproduced_exactly"]:
        print(f"note: the tokenizer rewrites {changed:,} documents; bytes are counted in its text, not yours")
    val = manifest["splits"].get("val")
    if not val:
        print("nothing is held out, so nothing can be scored: train_gpt.py needs --val-fraction above 0")
        return
    if val["tokens"] < FEW_VAL_TOKENS:
        doubt = val_bpb_doubt(val["tokens"], val["bytes"])
        print(
            f"warning: {val['tokens']:,} validation tokens are few: a score on them is sure to about "
            f"{doubt:.3f} bpb; give more text or a larger --val-fraction"
        )
    print(f"train on it: {training_command(manifest, dataset, out)}")


def training_command(manifest: dict, dataset: Path, out: Path) -> str:
    """The command line that trains on a finished dataset, to be pasted in the project's folder."""
    tokenizer = manifest["tokenizer"]
    words = [
        f"DATA_PATH={path_for_run(dataset)}",
        f"TOKENIZER_PATH={path_for_run(out / tokenizer['path'])}",
        f"VOCAB_SIZE={tokenizer['vocab_size']}",
    ]
    return "bash run_best.sh best " + " ".join(map(shlex.quote, words))


def path_for_run(path: Path) -> str:
    """A path as run_best.sh reads it: relative to the project's folder, or absolute if it is elsewhere."""
    project = Path(__file__).resolve().parents[1]
    absolute = path.resolve()
    return str(absolute.relative_to(project) if absolute.is_relative_to(project) else absolute)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help=".jsonl, .jsonl.zst or .txt")
    parser.add_argument("--name", required=True, help="names the dataset and the shards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: this folder")
    parser.add_argument("--tokenizer", type=Path, help="reuse this SentencePiece model")
    parser.add_argument(
        "--vocab",
        "--vocab-size",
        dest="vocab_size",
        type=int,
        default=1024,
        help="pieces to train; default 1024",
    )
    parser.add_argument(
        "--caseops",
        action="store_true",
        help="write capitals as marks before small letters (data/caseops.py)",
    )
    parser.add_argument(
        "--tokenizer-megabytes", type=float, default=100, help="most text to train pieces on; default 100"
    )
    parser.add_argument(
        "--txt",
        choices=("blank", "file"),
        default="blank",
        help=".txt: documents end at a blank line (default), or each file is one",
    )
    parser.add_argument("--val-fraction", type=float, default=0.02, help="held out by hash; default 0.02")
    parser.add_argument("--shard-tokens", type=int, default=MAX_SHARD_TOKENS, help="default 100,000,000")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default all")
    parser.add_argument("--force", action="store_true", help="replace a dataset of that name")
    options = parser.parse_args()
    if not 0 <= options.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    if not 1 <= options.shard_tokens <= MAX_SHARD_TOKENS:
        parser.error(f"--shard-tokens must be 1 to {MAX_SHARD_TOKENS}")
    marks = len(caseops.MARKS) if options.caseops else 0
    if not 264 + marks <= options.vocab_size <= 65536:
        parser.error(
            f"--vocab must be {264 + marks} to 65536: 4 control pieces, 256 bytes, {marks} marks, some text"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        parser.error("--name may hold letters, digits, dot, dash and underscore")
    return options


def main() -> None:
    options = parse_arguments()
    made_from = recipe(options)
    size = load_tokenizer(options.tokenizer).vocab_size() if options.tokenizer else options.vocab_size
    ending = "_caseops" if options.caseops else ""
    dataset = options.out / "datasets" / f"{options.name}_sp{size}{ending}"
    file_name = f"{options.name}_{size}_bpe{ending}.model"
    if options.tokenizer:
        file_name = options.tokenizer.name
    with exclusive(dataset.parent):
        manifest = read_manifest(dataset / "manifest.json")
        same = manifest is not None and manifest.get("made_from") == made_from
        if dataset.exists() and not same and not options.force:
            raise UserError(
                f"{dataset} holds something else; choose another --name, or --force to replace it"
            )
        if same and is_complete(dataset, options.out) and not options.force:
            print("already there")
        else:
            manifest = build(options, dataset, options.out / "tokenizers" / file_name, made_from)
    report(manifest, dataset, options.out)


if __name__ == "__main__":
    command(main)
