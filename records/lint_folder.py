"""A record folder as the linter reads it: its files, what was found, and the numbers and texts in them.

Nothing of a folder is executed or imported, links in it are not followed, and of one file at most 16 MiB
are read. records/lint.py is the command; lint_log.py reads logs, lint_statements.py compares them with what
submission.json says, lint_readme.py with the README.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import stat
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

READ_LIMIT = 2**24  # bytes that are read of a file
WHOLE_LIMIT = 2**28  # bytes that are read of all files
FILE_LIMIT = 1000
DEPTH_LIMIT = 20
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

# What turns or hides the text around it where a page or a terminal shows it.
DIRECTION_MARKS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


@dataclass(frozen=True)
class Finding:
    """One line of the report: severity is error, warn or info."""

    severity: str
    code: str
    text: str


def clean(text: str, limit: int = 300) -> str:
    """One printable line, whatever a name or a value holds."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])


def hidden_characters(text: str, spaces: str = "") -> list[str]:
    """The characters of a text that are no text: escape codes, lone surrogates, marks of direction.

    spaces: control characters that it may hold, such as line ends. Each character is named once.
    """
    found = []
    for character in dict.fromkeys(text):
        is_control = unicodedata.category(character) in ("Cc", "Cs")
        if (is_control or character in DIRECTION_MARKS) and character not in spaces:
            found.append(f"U+{ord(character):04X}")
    return found


class Folder:
    """The regular files below a folder, by their path in it, and what has been found so far."""

    def __init__(self, path: Path):
        self.path = path
        self.sizes: dict[str, int] = {}  # bytes on the disk
        self.findings: list[Finding] = []
        self.left = WHOLE_LIMIT
        # Of each self-extracting script: what it holds, and the source that it was packed from.
        self.sources: dict[str, list[str]] = {}
        self.walk()
        self.check_names()

    def add(self, severity: str, code: str, text: str) -> None:
        """Keep a finding."""
        self.findings.append(Finding(severity, code, clean(text)))

    def walk(self) -> None:
        """Find the files; hidden folders are left out."""
        unread: list[OSError] = []
        for root, folders, files in os.walk(self.path, onerror=unread.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]
            if len(Path(root).relative_to(self.path).parts) >= DEPTH_LIMIT and folders:
                self.add("warn", "too_deep", f"folders below {DEPTH_LIMIT} others are not looked at")
                folders.clear()
            for name in sorted(files) + links:
                self.take(Path(root, name))
            if len(self.sizes) > FILE_LIMIT:
                self.add("warn", "many_files", f"over {FILE_LIMIT} files; the rest is not looked at")
                break
        for error in unread:
            self.add("warn", "unreadable", f"{error.filename}: {error.strerror}")

    def take(self, path: Path) -> None:
        """Note a file and its size, or say that it is none."""
        name = str(path.relative_to(self.path))
        try:
            about = path.lstat()
        except OSError as error:
            self.add("warn", "unreadable", f"{name}: {error.strerror}")
            return
        if stat.S_ISREG(about.st_mode):
            self.sizes[name] = about.st_size
        else:
            kind = "a link" if stat.S_ISLNK(about.st_mode) else "no regular file"
            self.add("warn", "not_a_file", f"{name} is {kind}; not looked at")

    def check_names(self) -> None:
        """The names of files are text that a page can show."""
        for name in self.sizes:
            hidden = hidden_characters(name)
            if hidden:
                self.add("error", "file_name", f"the name {name!r} holds {', '.join(hidden)}")

    def top(self, pattern: str) -> list[str]:
        """Files directly in the folder."""
        return [name for name in self.sizes if os.sep not in name and re.fullmatch(pattern, name)]

    def read(self, name: str) -> bytes:
        """The file's bytes, unpacked; of a longer one the start, which is said."""
        limit = min(READ_LIMIT, self.left)
        try:
            opener = OPENERS.get(Path(name).suffix, open)
            with opener(self.path / name, "rb") as file:
                data = file.read(limit + 1)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            self.add("warn", "unreadable", f"{name}: {type(error).__name__}")
            return b""
        if len(data) > limit:
            self.add("warn", "too_long", f"only the first {limit} bytes of {name} are looked at")
        self.left -= len(data[:limit])
        return data[:limit]

    def text(self, name: str) -> str:
        """The file's text, its lines ended by a newline alone."""
        return decode(self.read(name))


def decode(data: bytes) -> str:
    """UTF-8, or UTF-16 where it says so (as PowerShell's Tee writes); lines end in a newline alone."""
    is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if is_wide else "utf-8-sig", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def unix_lines(data: bytes) -> bytes:
    """The bytes of a text as they were before a checkout on Windows."""
    return data.replace(b"\r\n", b"\n")


def sha256_forms(data: bytes) -> set[str]:
    """Hex sha256 of a text file as it is, and as it was before a checkout on Windows."""
    return {hashlib.sha256(data).hexdigest(), hashlib.sha256(unix_lines(data)).hexdigest()}


# Numbers


def number(value: object) -> Decimal | None:
    """A JSON number that a quantity can have, else None."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    value = Decimal(value)
    return value if value.is_finite() and abs(value.adjusted()) < 20 else None


def digits(value: Decimal) -> int:
    """Decimals that a score is right to: at most the eight of an exact line.

    As a JSON writer drops zeros at the end, four at least.
    """
    return min(8, max(4, -value.as_tuple().exponent))


def agrees(value: Decimal, truth: Decimal | float, units: float = 0.5) -> bool:
    """Whether the value is the truth, rounded to the decimals of the value."""
    off = abs(Decimal(value) - Decimal(truth))
    return off <= Decimal(units) * Decimal(10) ** -digits(value) + Decimal("1e-12")


# JSON


@dataclass
class Loaded:
    """A JSON text's value, with exact decimals, and what is odd about its keys."""

    value: object
    twice: list[str]  # keys that an object has twice, with one value
    contradicting: list[str]  # with two values


def load_json(text: str) -> Loaded:
    """Read JSON; ValueError if it is none, which NaN and Infinity are not either."""
    twice: list[str] = []
    contradicting: list[str] = []

    def keep_pairs(pairs: list[tuple[str, object]]) -> dict:
        values: dict[str, object] = {}
        for key, value in pairs:
            if key in values:
                (twice if values[key] == value else contradicting).append(key)
            values[key] = value
        return values

    try:
        value = json.loads(
            text, parse_float=Decimal, parse_constant=refuse_constant, object_pairs_hook=keep_pairs
        )
    except (ArithmeticError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return Loaded(value, twice, contradicting)


def refuse_constant(name: str) -> None:
    """What Python's reader takes and JSON has not."""
    raise ValueError(f"{name} is no number of JSON")


def strings_in(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield (where it stands, text) of every text and key in a JSON value."""
    waiting = [(where, value)]
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, str):
            yield name, item
        elif isinstance(item, list):
            waiting += [(name, entry) for entry in item]
        elif isinstance(item, dict):
            for key, entry in item.items():
                yield f"a key of {name}" if name else "a key", key
                waiting.append((f"{name}.{key}" if name else key, entry))
