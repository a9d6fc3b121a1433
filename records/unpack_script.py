"""What a self-extracting script holds, read without running any of it.

Many records of the challenge ship `exec(lzma.decompress(base64.b85decode("...")))` or a relative of it. The
script is parsed, the expression that it executes is found, and the few functions it may name (decoders and
decompressors, table below) are applied to the literal. Whatever else it does is not followed: Unreadable says
what stopped the reading. A decompressed layer is at most LIMIT bytes.
"""

import ast
import base64
import binascii
import bz2
import inspect
import io
import lzma
import re
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LIMIT = 2**22  # bytes of any value met on the way; a script has some 50,000
DICTIONARY_LIMIT = 2**26  # bytes of memory that a compressed stream may ask for
LAYERS = 4  # packed scripts within packed scripts
RUNNERS = "exec", "eval"


class Unreadable(Exception):
    """Why a self-extracting script cannot be read here, in one line."""


@dataclass(frozen=True)
class Unpacked:
    """The innermost source of a self-extracting script."""

    source: str
    codecs: tuple[str, ...]  # the functions that gave it, in the order in which they were applied
    readable_sha256: str  # of the source to read, where records/pack_script.py packed it; else ""


def unpack(script: bytes) -> Unpacked | None:
    """The source that the script extracts and runs; None if it runs no such thing. Raises Unreadable."""
    found = None
    codecs: list[str] = []
    readable = ""
    for _ in range(LAYERS):
        try:
            reader = Reader(parse(script))
        except Unreadable:
            if found:  # it is shown as it is; a newer Python may take it
                return found
            raise
        inner = reader.executed()
        if inner is None:
            return found
        codecs += reader.codecs
        sha = reader.values.get("READABLE_SHA256")
        if not readable and isinstance(sha, str) and re.fullmatch("[0-9a-f]{64}", sha):
            readable = sha
        script = inner.encode() if isinstance(inner, str) else inner
        try:
            found = Unpacked(script.decode("utf-8-sig"), tuple(codecs), readable)
        except UnicodeDecodeError:
            raise Unreadable(f"what {' and '.join(codecs)} give is no UTF-8 text") from None
    raise Unreadable(f"there are over {LAYERS} packed scripts within each other")


def parse(script: bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(script)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"not Python: {error}") from None


def outer_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the script starts, in their order: not those of functions and classes."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for name in ("body", "handlers", "orelse", "finalbody"):
            for part in getattr(statement, name, []):
                inner = part.body if isinstance(part, ast.ExceptHandler) else [part]
                yield from outer_statements(inner)


def is_our_decoder(statement: ast.stmt) -> bool:
    """Whether it defines base251_decode, word for word; the name is looked at first, since that is quick."""
    is_named_so = isinstance(statement, ast.FunctionDef) and statement.name == base251_decode.__name__
    return is_named_so and ast.dump(statement) == BASE251


class Reader:
    """Follows the assignments of a script as far as they are literals, decoders and decompressors."""

    def __init__(self, tree: ast.Module):
        self.tree = tree
        self.modules: dict[str, str] = {}  # name in the script -> module or module.function
        self.values: dict[str, object] = {}  # name -> value, or the Unreadable met while it was read
        self.codecs: list[str] = []

    def executed(self) -> str | bytes | None:
        """The text that the first exec runs; None if the script has none outside its functions."""
        for statement in outer_statements(self.tree.body):
            if isinstance(statement, ast.Import):
                for name in statement.names:
                    self.modules[name.asname or name.name.partition(".")[0]] = name.name
            elif isinstance(statement, ast.ImportFrom):
                for name in statement.names:
                    self.modules[name.asname or name.name] = f"{statement.module}.{name.name}"
            elif is_our_decoder(statement):
                self.modules["base251_decode"] = "pack_script.base251_decode"
            elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                self.assign(statement.targets[0].id, statement.value)
            elif isinstance(statement, ast.Expr) and is_runner(statement.value):
                return self.text_of(statement.value)
        return None

    def assign(self, name: str, value: ast.expr) -> None:
        known = list(self.codecs)
        try:
            self.values[name] = self.value(value)
        except Unreadable as error:
            self.codecs = known
            self.values[name] = error

    def text_of(self, call: ast.Call) -> str | bytes:
        if not call.args:
            raise Unreadable(f"{call.func.id} without an argument")
        argument = call.args[0]
        if is_runner(argument):  # exec(eval(...))
            return self.text_of(argument)
        value = self.value(argument)
        if not isinstance(value, str | bytes):
            raise Unreadable(f"it runs {shown(argument)}, which is no text")
        return value

    def value(self, node: ast.expr) -> object:
        """The value of a literal, a known name, a sum of texts, or a known function of such."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Dict) and None not in node.keys:
            keys = [self.value(key) for key in node.keys]
            if all(isinstance(key, str) for key in keys):
                return dict(zip(keys, map(self.value, node.values), strict=True))
        if isinstance(node, ast.Name) and node.id in self.values:
            known = self.values[node.id]
            if isinstance(known, Unreadable):
                raise known
            return known
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.BitOr):
            return self.joined(node)
        if isinstance(node, ast.Attribute | ast.Name):
            return self.constant(node)
        if isinstance(node, ast.Call):
            return self.called(node)
        raise Unreadable(f"{shown(node)} is not followed")

    def joined(self, node: ast.BinOp) -> object:
        left = self.value(node.left)
        right = self.value(node.right)
        if isinstance(node.op, ast.BitOr) and isinstance(left, int) and isinstance(right, int):
            return left | right
        if isinstance(left, str | bytes) and type(left) is type(right) and len(left) + len(right) <= LIMIT:
            return left + right
        raise Unreadable(f"{shown(node)} is not followed")

    def constant(self, node: ast.expr) -> object:
        """A constant of lzma or zlib, such as lzma.FORMAT_RAW."""
        module, _, name = self.dotted(node).partition(".")
        if module in ("lzma", "zlib") and name.isupper():
            value = getattr({"lzma": lzma, "zlib": zlib}[module], name, None)
            if isinstance(value, int):
                return value
        raise Unreadable(f"{shown(node)} is not followed")

    def dotted(self, node: ast.expr) -> str:
        """The full name that a function is called by, as lzma.decompress; "" if it has none."""
        if isinstance(node, ast.Name):
            return self.modules.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        if isinstance(node, ast.Call):
            name = self.dotted(node.func)
            if name == "__import__" and node.args and isinstance(node.args[0], ast.Constant):
                return str(node.args[0].value)
            if name == "zstandard.ZstdDecompressor" and not node.args:
                return "zstandard"
        return ""

    def called(self, node: ast.Call) -> object:
        name = self.dotted(node.func)
        if name == "compile" and node.args:
            return self.value(node.args[0])
        if name == "bytes" or name == "bytearray":
            return self.value(node.args[0]) if node.args else b""
        if name in CODECS:
            return self.decoded(name, node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            owner = self.value(node.func.value)
            arguments = [self.value(argument) for argument in node.args]
            return self.guarded(node, METHODS[node.func.attr], owner, *arguments)
        raise Unreadable(f"{shown(node)} is not followed")

    def decoded(self, name: str, node: ast.Call) -> object:
        arguments = [self.value(argument) for argument in node.args]
        options = {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}
        result = self.guarded(node, CODECS[name], *arguments, **options)
        self.codecs.append(name)
        return result

    def guarded(self, node: ast.Call, function: Callable, *arguments, **options) -> object:
        """The function's value; Unreadable where it fails or gives too much."""
        try:
            result = function(*arguments, **options)
        except Unreadable:
            raise
        except ImportError as error:
            raise Unreadable(f"{error.name} is not installed here; pip install {error.name}") from None
        except Exception as error:  # whatever a decoder finds wrong with another's data
            raise Unreadable(f"{shown(node)}: {type(error).__name__}: {error}") from None
        if len(result) > LIMIT:
            raise Unreadable(f"{shown(node)} gives over {LIMIT} bytes")
        return result


# The loader of records/pack_script.py holds this function as it stands here: no docstring, no annotations.
# It undoes `base251_encode`: str -> bytes, 250 bytes for each 251 signs.
def base251_decode(text):
    value = {chr(code): index for index, code in enumerate(sorted({*range(256)} - {*b'\0\n\r"\\'}))}
    data = b""
    for start in range(0, len(text), 251):
        number = 0
        for sign in text[start : start + 251]:
            number = number * 251 + value[sign]
        data += number.to_bytes(250, "big")
    return data


def base251_encode(data: bytes) -> str:
    """251 signs of latin-1 for each 250 bytes, filled up with zeros; a fifth shorter than base85.

    All signs but five: NUL, which Python refuses, ends of lines, the quote and the backslash.
    """
    signs = sorted({*range(256)} - {*b'\0\n\r"\\'})
    text = ""
    for start in range(0, len(data), 250):
        number = int.from_bytes(data[start : start + 250].ljust(250, b"\0"), "big")
        block = ""
        for _ in range(251):
            number, digit = divmod(number, 251)
            block = chr(signs[digit]) + block
        text += block
    return text


def shown_in_log(script: bytes) -> str:
    """A script as the head of a log shows it, where a packed one has signs in place of control codes.

    Raises UnicodeError where the script is not in the encoding that it names.
    """
    text = script.decode(script_encoding(script))
    return text.translate(SHOWN_CONTROLS) if script_encoding(script) == "iso-8859-1" else text


def script_of_shown(text: str) -> bytes:
    """The script that `shown_in_log` shows as this text; UnicodeError where there is none."""
    encoding = script_encoding(text.encode())
    if encoding == "iso-8859-1":
        text = text.translate({shown: code for code, shown in SHOWN_CONTROLS.items()})
    return text.encode(encoding)


def script_encoding(script: bytes) -> str:
    """The encoding that Python reads the script in; utf-8 where it names one that Python does not know."""
    try:
        return tokenize.detect_encoding(io.BytesIO(script).readline)[0]
    except SyntaxError:
        return "utf-8"


def is_runner(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNNERS


def shown(node: ast.expr) -> str:
    """A few words of the expression's source."""
    if isinstance(node, ast.Call):
        return f"{shown(node.func)}(...)"
    if isinstance(node, ast.Attribute):
        return f"{shown(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id[:40]
    return type(node).__name__


def inflate(data: bytes, wbits: int = zlib.MAX_WBITS, bufsize: int = 0) -> bytes:
    return whole(zlib.decompressobj(wbits), data)


def gunzip(data: bytes) -> bytes:
    return inflate(data, 16 + zlib.MAX_WBITS)


def bunzip(data: bytes) -> bytes:
    return whole(bz2.BZ2Decompressor(), data)


def unxz(data: bytes, format: int = lzma.FORMAT_AUTO, memlimit=None, filters=None) -> bytes:
    for settings in filters or ():
        if settings.get("dict_size", 0) > DICTIONARY_LIMIT:
            raise Unreadable("its lzma filter asks for too much memory")
    limit = None if format == lzma.FORMAT_RAW else 2 * DICTIONARY_LIMIT
    return whole(lzma.LZMADecompressor(format, limit, filters), data)


def whole(decompressor, data: bytes) -> bytes:
    """All that the stream holds, or a little over LIMIT of it; ValueError if it is cut off."""
    result = decompressor.decompress(data, LIMIT + 1)
    is_raw = isinstance(decompressor, lzma.LZMADecompressor) and decompressor.check == lzma.CHECK_NONE
    if len(result) <= LIMIT and not decompressor.eof and not is_raw:  # a raw stream need not mark its end
        raise ValueError("the data ends too early")
    return result


def unbrotli(data: bytes) -> bytes:
    import brotli

    decompressor = brotli.Decompressor()
    result = b""
    for start in range(0, len(data), 64):  # a little at a time, as it gives no limit of its own
        result += decompressor.process(data[start : start + 64])
        if len(result) > LIMIT:
            return result
    if not decompressor.is_finished():
        raise ValueError("the data ends too early")
    return result


def unzstd(data: bytes, max_output_size: int = 0) -> bytes:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=DICTIONARY_LIMIT)
    return decompressor.stream_reader(io.BytesIO(data)).read(LIMIT + 1)


def without(text: str | bytes, old: str | bytes, new: str | bytes) -> str | bytes:
    if new:
        raise Unreadable("replace(...) is followed only where it takes something out")
    return text.replace(old, new)


def known_encoding(name: str) -> str:
    """Plain encodings only: some others take very long over a forged text."""
    if name.lower().replace("_", "-") not in ENCODINGS:
        raise Unreadable(f"the encoding {name[:40]} is not followed")
    return name


def as_text(data: bytes, encoding: str = "utf-8", errors: str = "strict") -> str:
    return data.decode(known_encoding(encoding), errors)


def as_bytes(text: str, encoding: str = "utf-8", errors: str = "strict") -> bytes:
    return text.encode(known_encoding(encoding), errors)


def stripped(text: str | bytes) -> str | bytes:
    return text.strip()


def joined(glue: str | bytes, parts: list) -> str | bytes:
    if sum(len(part) + len(glue) for part in parts) > LIMIT:
        raise Unreadable(f"join(...) gives over {LIMIT} bytes")
    return glue.join(parts)


# As train_gpt.py logs itself: a terminal would obey the codes.
SHOWN_CONTROLS = {code: 256 + code for code in (*range(10), *range(11, 32), *range(127, 160))}
BASE251 = ast.dump(ast.parse(inspect.getsource(base251_decode)).body[0])
ENCODINGS = {"utf-8", "utf8", "utf-8-sig", "ascii", "latin-1", "latin1", "iso-8859-1"}
CODECS: dict[str, Callable] = {
    "base64.b85decode": base64.b85decode,
    "base64.a85decode": base64.a85decode,
    "base64.b64decode": base64.b64decode,
    "base64.standard_b64decode": base64.standard_b64decode,
    "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
    "base64.b32decode": base64.b32decode,
    "base64.b16decode": base64.b16decode,
    "base64.decodebytes": base64.decodebytes,
    "pack_script.base251_decode": base251_decode,
    "binascii.a2b_base64": binascii.a2b_base64,
    "binascii.unhexlify": binascii.unhexlify,
    "bytes.fromhex": bytes.fromhex,
    "zlib.decompress": inflate,
    "gzip.decompress": gunzip,
    "bz2.decompress": bunzip,
    "lzma.decompress": unxz,
    "brotli.decompress": unbrotli,
    "zstandard.decompress": unzstd,
}
METHODS: dict[str, Callable] = {
    "decode": as_text,
    "encode": as_bytes,
    "replace": without,
    "strip": stripped,
    "join": joined,
}
