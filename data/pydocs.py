"""Build the default corpus from the documentation this machine already holds. No network.

    python data/pydocs.py [--out data] [--force]

The text is the docstrings and help topics of the Python standard library and of the packages that
`requirements.txt` brings. They are read from the .py files as syntax trees; nothing is imported.
It is real English about code, around 17 MB, and it stays on this machine: see data/README.md.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import os
import platform
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.missing_packages import explain_missing_packages  # noqa: E402

explain_missing_packages()
import numpy as np  # noqa: E402

from data.shards import (  # noqa: E402
    SplitWriter,
    atomic_file,
    command,
    describe_file,
    exclusive,
    is_complete,
    publish,
    read_manifest,
    scratch_folder,
)
from data.tokenize_docs import (  # noqa: E402
    encode_splits,
    ordered_map,
    text_digest,
    tidy,
    train_tokenizer,
)
from data.user_error import UserError  # noqa: E402

NAME, PREFIX, VOCAB_SIZE = "pydocs_sp1024", "pydocs", 1024
TOKENIZER = "pydocs_1024_bpe.model"
VAL_FRACTION = 0.04

# Distribution: the importable names to read. A fixed list, because what pip installs beside torch
# differs between CPU and CUDA builds (nvidia-*, triton) and the text must not.
PACKAGES = {
    "torch": ("torch", "functorch", "torchgen"),
    "numpy": ("numpy",),
    "sentencepiece": ("sentencepiece",),
    "zstandard": ("zstandard",),
    "sympy": ("sympy",),
    "mpmath": ("mpmath",),
    "networkx": ("networkx",),
    "jinja2": ("jinja2",),
    "markupsafe": ("markupsafe",),
    "fsspec": ("fsspec",),
    "filelock": ("filelock",),
    "typing_extensions": ("typing_extensions",),
    "setuptools": ("setuptools",),
}
# Tests hold little prose; `_vendor` is other people's packages; Debian ships the rest separately,
# so a standard library with them would give another corpus than one without.
SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "_vendor",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "distutils",
    "tkinter",
    "turtledemo",
    "ensurepip",
}
SKIPPED_PREFIXES = ("torch/testing/_internal/", "_sysconfigdata")
SHORTEST = 20  # characters; below that a docstring is a label, not prose
# A document closes at the next top-level name once it has this many characters. One name a document
# gave a median of 350 characters; one module a document gave too few of them to hold out 4 % fairly.
DOCUMENT_CHARS = 2000

SHINGLE = 13  # words; the usual unit for "this passage was in the training text"
# Two documents that share this many shingles, and this part of the shorter one's, stay together.
NEAR_COUNT, NEAR_SHARE = 3, 0.05
COMMON = 30  # documents; a shingle in more of them is boilerplate and ties nothing together


@dataclass(frozen=True)
class Section:
    """One docstring: its module, the top-level name it belongs to, its heading, its text."""

    module: str
    owner: str
    title: str
    text: str


# --- reading -----------------------------------------------------------------------------------


def find_sources(
    packages: dict[str, tuple[str, ...]], library: Path
) -> tuple[list[tuple[str, Path]], dict, list[str]]:
    """Locate the .py files. Returns (label, file) sorted by label, versions, missing packages.

    `library` is the folder of the standard library. A label is the path below the folder that holds
    the package, with forward slashes, so it is the same wherever Python is installed.
    """
    files = list(python_files(library, ""))
    versions, missing = {}, []
    for distribution, names in packages.items():
        roots = [root for name in names if (root := package_root(name))]
        if not roots:
            missing.append(distribution)
            continue
        versions[distribution] = installed_version(distribution)
        for root in roots:
            files += [(root.name, root)] if root.is_file() else python_files(root, f"{root.name}/")
    return sorted(files), versions, missing


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def package_root(name: str) -> Path | None:
    """Folder or single file of an importable top-level name, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def installed_version(distribution: str) -> str:
    """Version without a local suffix: torch 2.13.0+cpu and 2.13.0+cu130 hold the same text."""
    try:
        return importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def python_files(root: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """(label, file) of each .py file under `root` that is worth reading."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            label = prefix + path.relative_to(root).as_posix()
            if name.endswith(".py") and not label.startswith(SKIPPED_PREFIXES):
                yield label, path


def read_sections(file: tuple[str, Path]) -> list[Section]:
    """The docstrings of one file. A file this Python cannot parse has none."""
    label, path = file
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source and b"doc" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    module = label.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if module == "pydoc_data.topics":
        found = topic_sections(tree)
    else:
        found = [("", module, ast.get_docstring(tree, clean=False)), *definitions(tree.body, "")]
        found += attached_docs(tree.body, plain_strings=module == "mpmath.function_docs")
    return [
        Section(module, owner, title, text)
        for owner, title, raw in found
        if len(text := clean(raw or "")) >= SHORTEST
    ]


def clean(raw: str) -> str:
    """A docstring as a reader sees it: indentation and trailing spaces gone."""
    return tidy("\n".join(line.rstrip() for line in inspect.cleandoc(raw).splitlines()).strip())


def definitions(body: list[ast.stmt], outer: str) -> Iterator[tuple[str, str, str | None]]:
    """(top-level name, heading, docstring) of the classes and functions among statements.

    Only statements are walked, never expressions: that is most of a tree and holds no docstring.
    """
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{outer}.{node.name}" if outer else node.name
            heading = name if isinstance(node, ast.ClassDef) else f"{name}({argument_names(node.args)})"
            yield name.partition(".")[0], heading, ast.get_docstring(node, clean=False)
            yield from definitions(node.body, name)
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from definitions(getattr(node, field, ()), outer)
            for handler in getattr(node, "handlers", ()):
                yield from definitions(handler.body, outer)


def argument_names(arguments: ast.arguments) -> str:
    """Names of a function's arguments, as in `input, *sizes, out`."""
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    if arguments.vararg:
        names.append("*" + arguments.vararg.arg)
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append("**" + arguments.kwarg.arg)
    return ", ".join(names)


def topic_sections(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """The help topics of the language: `topics = {"assert": "...", ...}`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and (text := literal_text(value)):
                    yield str(key.value), str(key.value), text


def attached_docs(body: list[ast.stmt], plain_strings: bool) -> Iterator[tuple[str, str, str]]:
    """Documentation of compiled functions, which Python files hand over as string arguments.

    `add_newdoc("numpy", "where", "...")`, `relu = _add_docstr(torch.relu, "...")` and their kind;
    with `plain_strings` also `name = "..."`, as in mpmath's file of docstrings.
    """
    for node in body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call):
            function = ast.unparse(value.func)
            if "add_docstr" in function or "add_newdoc" in function:
                yield from call_docs(value)
        elif plain_strings and isinstance(node, ast.Assign) and (text := literal_text(value)):
            yield (name := ast.unparse(node.targets[0])), name, text


def call_docs(call: ast.Call) -> Iterator[tuple[str, str, str]]:
    """(owner, heading, text) for each documentation string in one call's arguments."""
    names = [literal_text(argument) or ast.unparse(argument) for argument in call.args[:-1]]
    if not call.args:
        return
    heading = ".".join(names[-2:]) or "unnamed"
    last = call.args[-1]
    entries = last.elts if isinstance(last, ast.List) else [last]
    for entry in entries:
        if isinstance(entry, ast.Tuple) and entry.elts:
            member = literal_text(entry.elts[0])
            title = f"{heading}.{member}" if member and len(member) < 60 else heading
            text = literal_text(entry.elts[-1])
        else:
            title, text = heading, literal_text(entry)
        if text:
            yield names[-1] if names else "", title, text


def literal_text(node: ast.expr) -> str:
    """The text an expression spells out: constants, `a + b`, and the template of `.format(...)`.

    The placeholders of a template stand for shared boilerplate; a line of only such is dropped.
    """
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal_text(node.left) + literal_text(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        template = re.sub(r"(?m)^\s*(\{\w+\}\s*)+$", "", literal_text(node.func.value))
        return template.replace("{{", "{").replace("}}", "}")
    return ""


# --- documents ---------------------------------------------------------------------------------


def make_documents(files: Iterable[list[Section]]) -> list[str]:
    """Join docstrings into documents, ordered by their sha256.

    A docstring seen before is left out. A document is a run of whole top-level names of one
    module; its first heading names the module.
    """
    seen: set[str] = set()
    documents: dict[bytes, str] = {}
    for sections in files:
        fresh = [s for s in sections if not (s.text in seen or seen.add(s.text))]
        for document in join_sections(fresh):
            documents[text_digest(document)] = document
    return [documents[digest] for digest in sorted(documents)]


def join_sections(sections: list[Section]) -> Iterator[str]:
    """Cut one module's docstrings into documents of at least DOCUMENT_CHARS where it has them."""
    parts: list[str] = []
    size, owner = 0, ""
    for section in sections:
        if parts and size >= DOCUMENT_CHARS and section.owner != owner:
            yield "\n\n".join(parts)
            parts, size = [], 0
        named = section.title.startswith(section.module)
        title = section.title if parts or named else f"{section.module}.{section.title}"
        parts += [title, section.text]
        size += len(title) + len(section.text)
        owner = section.owner
    if parts:
        yield "\n\n".join(parts)


# --- held-out documents --------------------------------------------------------------------------


def word_value(word: str) -> int:
    """A 64-bit number for a word, the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")


def shingles(documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every distinct 13-word passage of each document.

    Returns (hashes [n] uint64, document indices [n] int32). Words are runs of letters, digits and
    underscores in lower case; a shingle's hash is a polynomial in its words' hashes.
    """
    values: dict[str, int] = {}
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    for index, document in enumerate(documents):
        words = re.findall(r"\w+", document.lower())
        for word in words:
            if word not in values:
                values[word] = word_value(word)
        count = len(words) - SHINGLE + 1
        if count > 0:
            row = np.array([values[word] for word in words], dtype=np.uint64)
            hashed = np.zeros(count, dtype=np.uint64)
            for offset in range(SHINGLE):
                hashed = hashed * multiplier + row[offset : offset + count]
            hashes.append(np.unique(hashed))
            owners.append(np.full(hashes[-1].size, index, dtype=np.int32))
    return np.concatenate(hashes), np.concatenate(owners)


def shared_counts(hashes: np.ndarray, owners: np.ndarray) -> Counter[tuple[int, int]]:
    """How many shingles each pair of documents shares; shingles in over COMMON documents apart."""
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    starts = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1])))
    counts = np.diff(np.append(starts, hashes.size))
    pairs: Counter[tuple[int, int]] = Counter()
    repeated = (counts > 1) & (counts <= COMMON)
    for start, count in zip(starts[repeated].tolist(), counts[repeated].tolist(), strict=True):
        pairs.update(itertools.combinations(owners[start : start + count].tolist(), 2))
    return pairs


def cluster_documents(documents: list[str], hashes: np.ndarray, owners: np.ndarray) -> list[int]:
    """For each document the first document of its group of near-duplicates, [documents]."""
    lengths = np.bincount(owners, minlength=len(documents)).tolist()
    parent = list(range(len(documents)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for (first, second), count in shared_counts(hashes, owners).items():
        if count >= NEAR_COUNT and count >= NEAR_SHARE * min(lengths[first], lengths[second]):
            low, high = sorted((root(first), root(second)))
            parent[high] = low
    return [root(node) for node in range(len(documents))]


def hold_out(groups: list[int], documents: list[str]) -> list[bool]:
    """Choose whole groups, in the order of their hashes, until VAL_FRACTION of the bytes is reached.

    `documents` are in digest order, so a group's first has its smallest digest. That digest is
    hashed once more: unhashed it would favour big groups, since the minimum of many is low.
    """
    sizes = [len(document.encode("utf-8")) for document in documents]
    group_sizes: Counter[int] = Counter()
    for group, size in zip(groups, sizes, strict=True):
        group_sizes[group] += size
    left = VAL_FRACTION * sum(sizes)
    chosen = set()
    for group in sorted(group_sizes, key=lambda group: text_digest(documents[group] + " held out?")):
        if group_sizes[group] <= left:
            chosen.add(group)
            left -= group_sizes[group]
    return [group in chosen for group in groups]


def split_documents(documents: list[str]) -> tuple[list[str], dict]:
    """Assign each document to "train" or "val", near-duplicates together.

    Returns ([documents] of split names, what was measured about the two sides).
    """
    hashes, owners = shingles(documents)
    groups = cluster_documents(documents, hashes, owners)
    held_out = np.array(hold_out(groups, documents), dtype=bool)
    val = np.unique(hashes[held_out[owners]])
    train = np.unique(hashes[~held_out[owners]])
    overlap = float(np.isin(val, train, assume_unique=True).mean()) if val.size else 0.0
    facts = {
        "near_duplicate_groups": int(sum(size > 1 for size in Counter(groups).values())),
        "val_shingles": int(val.size),
        "val_shingle_words": SHINGLE,
        "val_shingles_also_in_train": round(overlap, 5),
    }
    return ["val" if out else "train" for out in held_out], facts


# --- the build -----------------------------------------------------------------------------------


def build(
    out: Path,
    workers: int = 2,
    packages: dict[str, tuple[str, ...]] = PACKAGES,
    library: Path | None = None,
) -> dict:
    """Build corpus and tokenizer below `out`; returns the manifest. Prints a line a stage.

    `packages` and `library` (the standard library's folder) are for tests.
    """
    dataset, tokenizer = out / "datasets" / NAME, out / "tokenizers" / TOKENIZER
    with scratch_folder(dataset) as scratch:
        clock = Clock()
        files, versions, missing = find_sources(packages, library or standard_library())
        clock.say(f"reads {len(files):,} files; in all usually 25 s on two free cores, 50 s on busy ones")
        sections = ordered_map(read_batch, file_batches(files), workers)
        documents = make_documents(itertools.chain.from_iterable(sections))
        size = sum(len(document.encode()) for document in documents)
        clock.say(f"read {len(files):,} files: {len(documents):,} documents, {size / 1e6:.1f} MB")
        clock.say("looks for near-duplicates, to hold out text that is not in training: usually 5 s")
        splits, facts = split_documents(documents)
        share = facts["val_shingles_also_in_train"]
        clock.say(f"held out {splits.count('val'):,} documents; {share:.2%} of their passages also in train")
        pairs = list(zip(splits, documents, strict=True))
        clock.say("trains a tokenizer: usually 5 s")
        model = train_tokenizer((text for split, text in pairs if split == "train"), VOCAB_SIZE)
        with atomic_file(scratch / TOKENIZER) as file:
            file.write(model)
        clock.say(f"trained a tokenizer of {VOCAB_SIZE:,} pieces")
        clock.say("encodes the text: usually 5 s")
        writers = {split: SplitWriter(scratch, PREFIX, split) for split in ("train", "val")}
        written, inexact = encode_splits(pairs, model, writers, workers)
        if inexact or not all(entry["tokens"] for entry in written.values()):
            raise UserError(
                f"{inexact} documents do not decode to themselves or a split is empty; please report this"
            )
        manifest = {
            "name": NAME,
            "splits": written,
            "tokenizer": {
                "path": f"tokenizers/{TOKENIZER}",
                "vocab_size": VOCAB_SIZE,
                **describe_file(scratch / TOKENIZER),
            },
            "corpus": facts,
            "python": platform.python_version(),
            "packages": versions,
            "missing_packages": missing,
        }
        publish(scratch, dataset, tokenizer, manifest)
        tokens = sum(entry["tokens"] for entry in written.values())
        clock.say(f"encoded {tokens:,} tokens, {written['train']['bytes_per_token']} bytes each")
    return manifest


class Clock:
    """Prints lines with the seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"pydocs {time.monotonic() - self.start:5.1f} s  {text}", flush=True)


def file_batches(files: list[tuple[str, Path]], size: int = 32) -> list[list[tuple[str, Path]]]:
    return [files[start : start + size] for start in range(0, len(files), size)]


def read_batch(files: list[tuple[str, Path]]) -> list[list[Section]]:
    """`read_sections` of several files: one message to a worker and back."""
    return [read_sections(file) for file in files]


def summary(manifest: dict, dataset: Path) -> str:
    """One line about a finished corpus."""
    parts = [
        f"{split} {entry['tokens']:,} tokens, {entry['bytes']:,} bytes, {entry['documents']:,} docs"
        for split, entry in sorted(manifest["splits"].items())
    ]
    return f"{dataset}: " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: this folder")
    parser.add_argument("--force", action="store_true", help="build again even if it is there")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes")
    options = parser.parse_args()
    dataset = options.out / "datasets" / NAME
    with exclusive(dataset.parent):
        there = is_complete(dataset, options.out) and not options.force
        manifest = read_manifest(dataset / "manifest.json") if there else build(options.out, options.workers)
    print(("already there: " if there else "built: ") + summary(manifest, dataset))
    if manifest["missing_packages"]:
        print("not installed, so not in it: " + ", ".join(manifest["missing_packages"]))


if __name__ == "__main__":
    command(main)
