"""Pack train_gpt.py into a self-extracting train_gpt.py, and put the source to read beside it.

    python records/pack_script.py                        packed/train_gpt.py, packed/train_gpt_readable.py
    python records/pack_script.py SCRIPT -o OUT.py       OUT.py and OUT_readable.py
    python records/pack_script.py --unpack SCRIPT        the source that a packed script holds, ours or not

Comments, bare strings (docstrings), the texts of knobs and the annotations of functions become empty, four
spaces of indentation a tab, variables and parameters of functions get short names (not those that a call in
the script gives by name), spaces around operators and brackets go, every line keeps its number, and the rest
is compressed by bz2 and written in 251 signs of latin-1. --help then says that the readable file tells of the
knobs.
What runs is the packed file; its tracebacks name the functions and lines of the readable one.
The stripped source and the packed bytes are the same for any Python from 3.10 on.
Exit code 2, one line and nothing written where the input or the output will not do.
"""

import argparse
import ast
import bz2
import hashlib
import inspect
import io
import itertools
import keyword
import os
import re
import string
import sys
import tokenize
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import filterfalse
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.user_error import run_tool  # noqa: E402
from records.finished import Parser, Refused, guarded, require  # noqa: E402
from records.unpack_script import Unreadable, base251_decode, base251_encode, unpack  # noqa: E402

QUOTES = '"' * 3
SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
# Of the loader's names only READABLE_SHA256 and packed_code are there when the source runs. The source goes
# by the readable file's name where that is the file that was packed, so that a traceback shows its lines;
# else by one of its own. Either way Python finds the lines in memory: neither file is looked at again.
LOADER = """\
# coding: latin-1; packed by records/pack_script.py, which can --unpack it; {readable} is the same script.
import bz2, hashlib, linecache, pathlib
READABLE_SHA256 = "{sha256}"
{base251_decode}
packed_text = bz2.decompress(base251_decode("{blob}")).decode()  # it has a check sum
packed_path = pathlib.Path(__file__).resolve().with_name("{readable}")
try:
    packed_shown = packed_path.read_bytes()
except OSError:
    packed_shown = b""
if hashlib.sha256(packed_shown).hexdigest() != READABLE_SHA256:
    packed_path = packed_path.with_name("{unpacked}")
    packed_shown = packed_text.encode()
packed_shown = packed_shown.decode("utf-8-sig").replace("\\r\\n", "\\n").replace("\\r", "\\n").split("\\n")
linecache.cache[str(packed_path)] = 0, None, [line + "\\n" for line in packed_shown], str(packed_path)
packed_code = compile(packed_text, str(packed_path), "exec", dont_inherit=True)
del base251_decode, bz2, hashlib, linecache, pathlib, packed_text, packed_path, packed_shown
exec(packed_code)
"""


def source_text(data: bytes, name: str) -> str:
    """The script as text, lines ending in a newline alone, as Python reads it. Refused if it is no Python."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        require(encoding in ("utf-8", "utf-8-sig"), f"{name} is in {encoding}; save it as UTF-8")
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refused(f"{name} is no Python script: {reason}") from None
    return text


def parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape in a string is the script's own affair
        return ast.parse(text)


def is_bare_string(node: ast.AST) -> bool:
    """A string that is a statement by itself: a docstring, or one that nothing reads."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def kept_strings(tree: ast.Module) -> set[ast.AST]:
    """The docstrings that the script itself reads: its own if it names `__doc__`, all if it asks others'."""
    kept: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "__doc__":
            kept.update(tree.body[:1])
        if isinstance(node, ast.Attribute) and node.attr in ("__doc__", "getdoc"):
            kept.update(part for part in ast.walk(tree) if is_bare_string(part))
    return kept


def knob_texts(tree: ast.Module) -> list[ast.Constant]:
    """The texts of knobs that only tables show: what it does, its source, its effect.

    They take 5.8 KB packed. A script has them if it defines `knob(default, doc, *, source, effect, ...)`.
    """
    declares_knobs = any(
        isinstance(node, ast.FunctionDef)
        and node.name == "knob"
        and [argument.arg for argument in node.args.args] == ["default", "doc"]
        for node in tree.body
    )
    texts = []
    for node in ast.walk(tree) if declares_knobs else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "knob":
            shown = [keyword.value for keyword in node.keywords if keyword.arg in ("source", "effect")]
            texts += [value for value in [*node.args[1:2], *shown] if isinstance(value, ast.Constant)]
    return texts


def annotations(tree: ast.Module) -> Iterator[tuple[ast.AST, str, ast.expr]]:
    """(owner, field, annotation) of each parameter and result of a function: nothing reads them as it runs.

    They take 1.8 KB packed. Those of classes stay: dataclasses are made of them.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:
            yield node, "annotation", node.annotation
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
            yield node, "returns", node.returns


def cuts(text: str) -> Iterator[tuple[tuple[int, int], tuple[int, int], str | None]]:
    """(start, end, replacement) of each comment, bare string, text of a knob and annotation of a function.

    start, end: (line from 0, column in characters). The replacement of a comment, which ends its line, is
    None.
    """
    lines = text.split("\n")

    def place(line: int, offset: int) -> tuple[int, int]:
        """ast counts columns in bytes of UTF-8."""
        return line - 1, len(lines[line - 1].encode()[:offset].decode())

    tree = parse(text)
    kept = kept_strings(tree)
    for node in ast.walk(tree):
        if is_bare_string(node) and node not in kept:
            start = place(node.lineno, node.col_offset)
            end = place(node.end_lineno, node.end_col_offset)
            yield start, end, '""'
    for node in knob_texts(tree):
        yield place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset), '""'
    for owner, field, annotation in annotations(tree):
        line, column = place(annotation.lineno, annotation.col_offset)
        end = place(annotation.end_lineno, annotation.end_col_offset)
        if field == "annotation":
            start = place(owner.lineno, owner.col_offset)
            start = (start[0], start[1] + len(owner.arg))
        else:
            start = (line, lines[line].rfind("->", 0, column))
        is_plain = (
            start[0] == line == end[0]
            and start[1] >= 0
            and re.fullmatch(r" *(:|->) *", lines[line][start[1] : column])
        )
        if is_plain:  # an odd one, over several lines or in brackets, stays
            yield start, end, ""
    for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
        if token.type == tokenize.COMMENT:
            yield (token.start[0] - 1, token.start[1]), (token.end[0] - 1, token.end[1]), None


def strip(text: str) -> str:
    """The same program without what `cuts` names, and with less indentation; each line keeps its number.

    Only positions are taken from the parser, and no code is written anew, so that the result does not depend
    on the Python that makes it.
    """
    lines = text.split("\n")
    for (first, start), (last, end), replacement in sorted(cuts(text), key=lambda cut: cut[:2], reverse=True):
        head = lines[first][:start]
        tail = lines[last][end:]
        if replacement is None:
            lines[first] = head.rstrip()
        elif not replacement:
            lines[first] = head.rstrip() + tail
        elif last > first and tail.strip():  # more follows on the string's last line
            lines[first : last + 1] = [head + QUOTES, *[""] * (last - first - 1), QUOTES + tail]
        else:
            lines[first : last + 1] = [head + replacement + tail, *[""] * (last - first)]
    return tighten(indent_by_one(shorten_locals(drop_empty_strings("\n".join(lines)))))


def drop_empty_strings(text: str) -> str:
    """The same program without the `""` that stands in a docstring's place, if its block has other code."""
    lines = text.split("\n")
    tree = parse(text)
    kept = kept_strings(tree)
    blocks = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in ast.walk(tree):
        if isinstance(node, blocks) and len(node.body) > 1 and node.body[0] not in kept:
            number = node.body[0].lineno - 1
            if lines[number].strip() == '""':
                lines[number] = ""
    return "\n".join(lines)


# What a function calls that looks at names as it runs: its own stay as they are.
READERS_OF_NAMES = {"locals", "vars", "eval", "exec", "dir", "globals"}
SHORT_NAMES = string.ascii_letters
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


NAME_FIELDS = {ast.Name: "id", ast.arg: "arg"}  # where a node of the tree holds a variable's name


def variable_of(node: ast.AST) -> str:
    """The variable that a node stands for, or declares as a parameter; "" if it is another kind of node."""
    return getattr(node, NAME_FIELDS.get(type(node), ""), "")


def parameters(function: Function) -> set[str]:
    return {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}


def names_by_text(tree: ast.Module) -> set[str]:
    """All names by which a call of the program may give an argument.

    They stand before an equals sign in a call or whole in a string (`**{"name": value}`), or are fields of a
    class (`**vars(record)`).
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.ClassDef):
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            found.update(field.id for field in fields if isinstance(field, ast.Name))
    return found


def positional_parameters(function: Function, said: set[str]) -> set[str]:
    """The parameters that no call of the program, which says the names of `said`, gives by name."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    return {argument.arg for argument in arguments} - said - {"self", "cls"}


def names_in(node: ast.AST) -> set[str]:
    """All names that stand for variables in a piece of code, those of parameters too."""
    found = set()
    named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler
    for part in ast.walk(node):
        if isinstance(part, ast.Name | ast.arg):
            found.add(variable_of(part))
        elif isinstance(part, ast.Global | ast.Nonlocal):
            found.update(part.names)
        elif isinstance(part, ast.alias):
            found.add((part.asname or part.name).partition(".")[0])
        elif isinstance(part, named) and part.name:
            found.add(part.name)
    return found


def bound_names(function: Function) -> set[str]:
    """The names that a function's own code assigns to, without what is bound in other ways."""
    stored = set()
    bound_otherwise = set()
    waiting = list(function.body) if isinstance(function.body, list) else [function.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound_otherwise.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.add(node.id)
        elif isinstance(node, ast.Global | ast.Nonlocal | ast.alias | ast.ExceptHandler):
            bound_otherwise |= names_in(node) - {
                part.id for part in ast.walk(node) if isinstance(part, ast.Name)
            }
        waiting += ast.iter_child_nodes(node)
    return stored - bound_otherwise


def plain_locals(function: Function, said: set[str]) -> list[str]:
    """The variables of a function that may have any other name, in the order in which they first stand there.

    Parameters that calls give by name are none (see `positional_parameters`), nor is what an f-string shows
    (before Python 3.12 no place inside one is known), what a function or class inside binds as well, nor what
    stands in the function's head: a default or a decorator means the variable of that name outside.
    """
    positional = positional_parameters(function, said)
    found = bound_names(function) - parameters(function) | positional
    head = [*function.args.defaults, *filter(None, function.args.kw_defaults)]
    for node in [*head, *getattr(function, "decorator_list", ())]:
        found -= names_in(node)
    for node in ast.walk(function):
        if isinstance(node, ast.JoinedStr | ast.ClassDef | ast.Match):
            found -= names_in(node)
        elif isinstance(node, Function) and node is not function:
            found -= parameters(node) | bound_names(node)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            found -= set(node.names)
    if READERS_OF_NAMES & names_in(function):
        return []
    places: dict[str, tuple[int, int]] = {}
    for node in ast.walk(function):
        name = variable_of(node)
        if name in found:
            place = (node.lineno, node.col_offset)
            places[name] = min(place, places.get(name, place))
    return sorted(places, key=places.__getitem__)


def outermost_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The functions of a module and of its classes, not those inside another function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node
        else:
            yield from outermost_functions(node)


def rename_locals(tree: ast.Module, is_canonical: bool) -> dict[tuple[int, int], tuple[str, str]]:
    """Give the plain locals of all functions other names, in the tree; {(line, column): (old, new name)}.

    Canonical names are equal for two programs that differ in such names alone; the others are short, and a
    name of one letter keeps it.
    """
    renamed = {}
    numbers = itertools.count()
    said = names_by_text(tree)
    for outermost in outermost_functions(tree):
        inner = [node for node in ast.walk(outermost) if isinstance(node, Function)]
        for function in inner:
            used = names_in(outermost) | said
            candidates = plain_locals(function, said)
            if is_canonical:
                new_names = (f"local variable {number}" for number in numbers)
            else:
                candidates = [name for name in candidates if len(name) > 1]
                pairs = map("".join, itertools.product(SHORT_NAMES, repeat=2))
                new_names = (name for name in itertools.chain(SHORT_NAMES, pairs) if name not in used)
                new_names = filterfalse(keyword.iskeyword, new_names)
            new_name = dict(zip(candidates, new_names, strict=False))
            for node in ast.walk(function):
                name = variable_of(node)
                if name in new_name:
                    renamed[node.lineno, node.col_offset] = (name, new_name[name])
                    setattr(node, NAME_FIELDS[type(node)], new_name[name])
    return renamed


def shorten_locals(text: str) -> str:
    """The same program with short names for the variables of its functions; 5.5 KB less, packed.

    As it is where that would make another program.
    """
    lines = [line.encode() for line in text.split("\n")]
    edits = rename_locals(parse(text), is_canonical=False)
    for (line, column), (old, new) in sorted(edits.items(), reverse=True):
        before = lines[line - 1]
        lines[line - 1] = before[:column] + new.encode() + before[column + len(old.encode()) :]
    shorter = "\n".join(line.decode() for line in lines)
    try:
        return shorter if outline(shorter) == outline(text) else text
    except SyntaxError:
        return text


def indent_by_one(text: str) -> str:
    """The same program with a tab for each four spaces that a line begins with; 1.5 KB less, packed.

    As it is where that would make another program, as in a script that is indented by tabs or twos.
    """
    lines = text.split("\n")
    inside_strings = set()
    for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
        inside_strings.update(range(token.start[0], token.end[0]))  # line numbers from 0, but for the first
    for number, line in enumerate(lines):
        spaces = len(line) - len(line.lstrip(" "))
        if number not in inside_strings:
            lines[number] = "\t" * -(-spaces // 4) + line[spaces:]
    return if_same("\n".join(lines), text)


def tighten(text: str) -> str:
    """The same program without the spaces beside operators and brackets; 0.3 KB less, packed.

    As it is where that would make another program. What stands inside an f-string stays: before Python 3.12
    nothing says where its parts are.
    """
    lines = text.split("\n")
    gaps = []
    inside_f_strings = 0
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
        kind = tokenize.tok_name[token.type]
        inside_f_strings -= kind.endswith("STRING_END")
        if before and before.end[0] == token.start[0] and not inside_f_strings:
            is_attribute_of_number = before.type == tokenize.NUMBER and token.string.startswith(".")
            has_operator = tokenize.OP in (before.type, token.type)
            if has_operator and not is_attribute_of_number:
                gaps.append((token.start[0] - 1, before.end[1], token.start[1]))
        inside_f_strings += kind.endswith("STRING_START")
        is_code = token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
        before = token if is_code else None
    for number, start, end in reversed(gaps):
        lines[number] = lines[number][:start] + lines[number][end:]
    return if_same("\n".join(lines), text)


def if_same(shorter: str, text: str) -> str:
    """The shorter text, if it is the same program as the other; else that one."""
    try:
        return shorter if outline(shorter) == outline(text) else text
    except SyntaxError:
        return text


def outline(text: str) -> tuple[str, list[int]]:
    """The program without what packing takes away, and the line of each statement and expression left."""
    tree = without_what_is_cut(parse(text))
    rename_locals(tree, is_canonical=True)
    numbers = [node.lineno for node in ast.walk(tree) if hasattr(node, "lineno")]
    return ast.dump(tree), numbers


def without_what_is_cut(tree: ast.Module) -> ast.Module:
    """The tree without what packing takes away: bare strings, texts of knobs, annotations of functions."""
    for owner, field, _ in list(annotations(tree)):
        setattr(owner, field, None)
    for text in knob_texts(tree):
        text.value = ""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [part for part in statements if not is_bare_string(part)])
    return tree


def is_same_program(first: str, second: str) -> bool:
    """Whether two sources differ in nothing that runs: comments, layout, annotations, names of locals."""
    try:
        return outline(first)[0] == outline(second)[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def pack(data: bytes, name: str = "train_gpt.py") -> bytes:
    """The self-extracting form of a script; `name` is that of the file that it will be in."""
    is_packed = re.search(rb"^READABLE_SHA256 = ", data, re.M)
    require(not is_packed, f"{name} is packed already; run it as it is, or --unpack it")
    text = source_text(data, name)
    try:
        stripped = strip(text)
        is_kept = outline(stripped) == outline(text)
    except (SyntaxError, RecursionError, tokenize.TokenError):
        is_kept = False
    require(is_kept, f"{name} cannot be stripped of its comments line by line; set aside its odd layout")
    stem = Path(name).stem
    blob = bz2.compress(stripped.encode())  # 4 % smaller than xz at its best
    packed = LOADER.format(
        readable=f"{stem}_readable.py",
        unpacked=f"{stem}_unpacked.py",
        sha256=hashlib.sha256(data).hexdigest(),
        base251_decode=inspect.getsource(base251_decode).strip(),
        blob=base251_encode(blob),
    ).encode("latin-1")
    larger = f"{name} would be larger packed: {len(packed)} bytes, and {len(data)} as it is"
    require(len(packed) < len(data), f"{larger}; run it as it is")
    return packed


def write_all(files: dict[Path, bytes]) -> None:
    """Write the files that are not there; Refused before anything is written if one is, and differs."""
    for path, data in files.items():
        is_free = not os.path.lexists(path) or path.is_file() and path.read_bytes() == data
        require(is_free, f"{path} is there already; move it away or choose another -o")
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            temporary.write_bytes(data)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def show_unpacked(path: Path, out: Path | None) -> None:
    """Print the source that a self-extracting script holds, or write it to `out`."""
    try:
        found = unpack(path.read_bytes())
    except Unreadable as error:
        raise Refused(f"{path} cannot be unpacked without running it: {error}") from None
    require(found, f"{path} is not self-extracting; it is readable as it is")
    if out:
        write_all({out: found.source.encode()})
    else:
        sys.stdout.buffer.write(found.source.encode())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", type=Path, default=SCRIPT, help="default: the repository's")
    parser.add_argument("-o", "--out", type=Path, help="file to write; default packed/train_gpt.py")
    parser.add_argument("--unpack", action="store_true", help="print (-o: write) what a packed script holds")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    require(options.script.is_file(), f"{options.script} is no file")
    if options.unpack:
        show_unpacked(options.script, options.out)
        return 0
    out = options.out or Path("packed/train_gpt.py")
    clear = re.fullmatch(r"[\w.-]+\.py", out.name)
    require(clear, f"-o {out}: name a .py file, with no signs but letters, digits, _, - and .")
    data = options.script.read_bytes()
    packed = pack(data, out.name)
    readable = out.with_name(f"{out.stem}_readable.py")
    write_all({readable: data, out: packed})
    share = f"{len(packed)} bytes of {len(data)} ({len(packed) / len(data):.0%})"
    print(f"{out}: {share}; to read: {readable}, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    run_tool(partial(guarded, main, None))
