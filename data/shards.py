"""Token shards and their manifest: what every tool in this folder reads and writes.

A shard is the challenge's own format: 256 little-endian int32 (magic, version, number of tokens,
zeros), then that many little-endian uint16 tokens, at most 100,000,000 of them. A document starts
with the BOS token. `train_gpt.py` never imports this file: it has its own reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from data.file_locks import lock
from data.user_error import UserError, run_tool, tell, tell_os_error

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MAX_SHARD_TOKENS = 100_000_000
BOS = 1
LLAMA_MAGIC = 20240801  # of llm.c's shards of uint32 tokens
MAKE_SHARDS = "make shards from the text with data/tokenize_docs.py"

# Below this many a score says little: one standard deviation of its sampling is more than 0.006 bpb.
FEW_VAL_TOKENS = 100_000
NATS_DEVIATION = 2.5  # of one token's loss, standard deviation


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's `main` and exit: 0 or its result, 2 for bad input, 130 when interrupted.

    A termination signal ends it like Ctrl-C, so that temporary files go there too.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_tool(partial(code_of, main))


def code_of(main: Callable[[], int | None]) -> int | None:
    """main's result, or the exit code of what ended it."""
    try:
        return main()
    except UserError as error:
        return tell(error)
    except OSError as error:
        return tell_os_error(error)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was kept", file=sys.stderr)
        return 130


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` complete or not at all.

    The bytes go to a temporary file in the same folder (so that the rename cannot cross a file
    system), reach the disk, and only then take the name. On any exception the temporary file goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write one shard. `tokens`: 1-D, every value in 0..65535. Raises ValueError otherwise."""
    if tokens.ndim != 1 or not 0 < tokens.size <= MAX_SHARD_TOKENS:
        raise ValueError(f"a shard holds 1 to {MAX_SHARD_TOKENS} tokens, not shape {tokens.shape}")
    if tokens.dtype != np.uint16 and (int(tokens.min()) < 0 or int(tokens.max()) > 0xFFFF):
        raise ValueError("token ids must fit in 16 bits")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic_file(path) as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2", copy=False).tobytes())


def read_header(path: Path) -> int:
    """Number of tokens in a shard. Raises UserError unless magic, version and file size agree."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes is shorter than a shard header; fetch or build it again")
    header = np.fromfile(path, dtype="<i4", count=256)
    magic, version, tokens = (int(value) for value in header[:3])
    if magic == LLAMA_MAGIC:
        raise UserError(f"{path}: llm.c's shard for Llama 3, 4 bytes a token; this reads 2; {MAKE_SHARDS}")
    if magic != MAGIC:
        raise UserError(f"{path}: magic {magic}, not {MAGIC}; this is not a token shard; {MAKE_SHARDS}")
    if version != VERSION:
        raise UserError(f"{path}: version {version}, not {VERSION}; made by another tool, build it again")
    if tokens == 0 and size > HEADER_BYTES:
        raise UserError(f"{path}: its header says 0 tokens, but some follow; {MAKE_SHARDS}")
    if size == HEADER_BYTES + 4 * tokens and tokens:
        raise UserError(f"{path}: 4 bytes a token (uint32); this reads 2; {MAKE_SHARDS}")
    if not 0 < tokens <= MAX_SHARD_TOKENS:
        raise UserError(f"{path}: header says {tokens} tokens, allowed are 1 to {MAX_SHARD_TOKENS}")
    expected = HEADER_BYTES + TOKEN_BYTES * tokens
    if size != expected:
        raise UserError(f"{path}: {size} bytes, its header asks for {expected}; fetch or build it again")
    return tokens


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped, [tokens] uint16. Raises UserError on a bad shard."""
    tokens = read_header(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def val_bpb_doubt(tokens: int, text_bytes: int) -> float:
    """One standard deviation of a score in bits a byte, from the choice of its text: sd / sqrt(n), in bpb."""
    bits_per_token = NATS_DEVIATION / math.sqrt(max(tokens, 1)) / math.log(2)
    return bits_per_token * tokens / max(text_bytes, 1)


def shard_name(prefix: str, split: str, index: int) -> str:
    """The official name of a shard; `split` is "train" or "val"."""
    return f"{prefix}_{split}_{index:06d}.bin"


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The token shards of a split, in order, without the hidden `._x.bin` that macOS leaves beside x.bin.

    The sidecar's, *_val_bytes_*.bin, are the split "val_bytes".
    """
    paths = [path for path in folder.glob(f"*_{split}_*.bin") if path.name[0] != "."]
    return sorted(path for path in paths if f"_{split}_bytes_" not in path.name)


class SplitWriter:
    """Cuts a stream of documents into the shards of one split.

    Only the open shard is in memory. `files` lists what was written, as the manifest wants it. Documents that
    come with the bytes of each token get a sidecar: shards of the same layout that hold these bytes.
    """

    def __init__(self, folder: Path, prefix: str, split: str, shard_tokens: int = MAX_SHARD_TOKENS):
        self.folder, self.prefix, self.split, self.shard_tokens = folder, prefix, split, shard_tokens
        self.parts: list[np.ndarray] = []
        self.pending = self.tokens = self.documents = self.bytes = 0
        self.files: dict[str, dict] = {}
        self.sidecar: SplitWriter | None = None

    def add(
        self, tokens: np.ndarray, documents: int, text_bytes: int, token_bytes: np.ndarray | None = None
    ) -> None:
        """Append whole documents: [n] uint16 with a BOS before each, and the bytes they decode to.

        token_bytes: [n] uint16, what each token adds to these; for a sidecar, of all documents or of none.
        """
        if token_bytes is not None:
            if self.sidecar is None:
                self.sidecar = SplitWriter(self.folder, self.prefix, f"{self.split}_bytes", self.shard_tokens)
            self.sidecar.add(token_bytes, 0, 0)
        self.documents += documents
        self.tokens += tokens.size
        self.bytes += text_bytes
        while self.pending + tokens.size >= self.shard_tokens:
            cut = self.shard_tokens - self.pending
            self.parts.append(tokens[:cut])
            tokens = tokens[cut:]
            self.flush()
        self.parts.append(tokens)
        self.pending += tokens.size

    def flush(self) -> None:
        """Write the open shard, if it holds anything."""
        tokens = np.concatenate(self.parts) if self.parts else np.empty(0, dtype=np.uint16)
        if tokens.size:
            path = self.folder / shard_name(self.prefix, self.split, len(self.files))
            write_shard(path, tokens)
            self.files[path.name] = {"tokens": int(tokens.size), **describe_file(path)}
        self.parts, self.pending = [], 0

    def close(self) -> dict:
        """Write what is left; the split's entry for the manifest."""
        self.flush()
        if self.sidecar:
            self.files.update(self.sidecar.close()["files"])
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": round(self.bytes / max(self.tokens, 1), 4),
            "files": self.files,
        }


def describe_file(path: Path) -> dict:
    """Size and sha256 of a file, as manifests store them."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def write_manifest(path: Path, manifest: dict) -> None:
    """Write a manifest. The same content always gives the same bytes."""
    with atomic_file(path) as file:
        file.write((json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(path: Path) -> dict | None:
    """The manifest at `path`, or None where there is none or it is not a JSON object."""
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def manifest_files(manifest: dict) -> dict[str, dict]:
    """Every shard a manifest names: file name to its {tokens, size, sha256}."""
    splits = manifest.get("splits", {})
    return {name: entry for split in splits.values() for name, entry in split.get("files", {}).items()}


class Progress:
    """One line on a terminal that counts up; nothing at all when stderr is not a terminal."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit = label, max(total, 1), unit
        self.done, self.start, self.drawn = 0, time.monotonic(), 0.0
        self.shown = sys.stderr.isatty()

    def add(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if self.shown and (now - self.drawn > 0.1 or self.done >= self.total):
            self.drawn = now
            share = min(self.done / self.total, 1.0)
            left = (now - self.start) * (1 - share) / max(share, 1e-9)
            bar = "#" * int(30 * share)
            text = f"{self.label} [{bar:30}] {self.done:,}/{self.total:,} {self.unit}, {left:.0f} s left"
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for one builder; a second one waits here. The kernel drops it if we die.

    Where the system has no such lock (Windows, some network file systems) nothing is held, which one warning
    says: two builders then repeat each other's work, which is slow but harmless, as files appear whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A hidden folder next to `target` to build in; gone afterwards, whatever happens.

    Leftovers of builders that were killed outright are swept first.
    """
    for stale in target.parent.glob(f".{target.name}.tmp-*"):
        process_id = stale.name.rpartition("-")[2]
        if process_id.isdecimal() and not process_alive(int(process_id)):
            shutil.rmtree(stale, ignore_errors=True)
    folder = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def process_alive(pid: int) -> bool:
    """Whether a process of this machine has that id. A foreign user's process counts as alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def publish(scratch: Path, dataset: Path, tokenizer: Path, manifest: dict) -> None:
    """Move a finished build into place: shards and tokenizer first, the manifest last.

    A manifest therefore always describes files that are really there. Shards of an older, longer
    build are removed, since a reader would take them for part of this one.
    """
    dataset.mkdir(parents=True, exist_ok=True)
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    (dataset / "manifest.json").unlink(missing_ok=True)
    names = manifest_files(manifest)
    for old in dataset.glob("*.bin"):
        if old.name not in names:
            old.unlink()
    for name in names:
        os.replace(scratch / name, dataset / name)
    if (scratch / tokenizer.name).exists():
        os.replace(scratch / tokenizer.name, tokenizer)
    write_manifest(dataset / "manifest.json", manifest)


def is_complete(dataset: Path, out: Path) -> bool:
    """Whether a finished build is there: its manifest, and every file it names with that size."""
    manifest = read_manifest(dataset / "manifest.json")
    if manifest is None or not manifest_files(manifest):
        return False
    wanted = {dataset / name: entry["size"] for name, entry in manifest_files(manifest).items()}
    wanted[out / manifest["tokenizer"]["path"]] = manifest["tokenizer"]["size"]
    return all(path.is_file() and path.stat().st_size == size for path, size in wanted.items())
