"""records/pack_script.py: the packed script is the readable one in all that it does, and says so."""

import ast
import base64
import bz2
import hashlib
import inspect
import json
import lzma
import os
import re
import runpy
import shutil
import subprocess
import sys
import unicodedata
import zlib
from functools import cache
from pathlib import Path
from signal import SIGKILL

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from records import finished, lint, make, pack_script, rescore
from records.pack_script import is_same_program, outline, pack, source_text, strip
from records.unpack_script import (
    LIMIT,
    Reader,
    Unreadable,
    base251_decode,
    base251_encode,
    script_of_shown,
    shown_in_log,
    unpack,
)
from tests.conftest import ROOT
from tests.support.forkserver import ForkServer
from tests.support.stops import Folder, dies, in_step

SCRIPT = ROOT / "train_gpt.py"
LARGEST = 64_000  # bytes that the packed script may take of the 16,000,000
PADDING = "# A comment, which packing takes out again.\n" * 100
# What a run may not owe to the packing: sizes of the code, times, and its own names.
OWN = {"run_id", "path", "code_bytes", "total_bytes", "train_seconds", "eval_seconds"}


@pytest.fixture(scope="module", autouse=True)
def reads_each_source_once():
    """What is left of a source, and its outline, take seconds for the script; they hang on its text alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_script, "outline", cache(outline))
        patch.setattr(pack_script, "strip", cache(strip))
        patch.setattr(lint, "strip", pack_script.strip)
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A folder with the packed train_gpt.py and the readable one beside it."""
    folder = tmp_path_factory.mktemp("packed")
    assert pack_script.main(["-o", str(folder / "train_gpt.py")]) == 0
    return folder


@pytest.fixture(scope="module")
def packed_server(packed):
    server = ForkServer(packed)
    yield server
    server.close()


def stripped_script() -> str:
    """What packing leaves of the script's source."""
    return pack_script.strip(SCRIPT.read_text())


def packed_from(folder: Path, source: str) -> Path:
    """Another script, packed; longer than its packed form by comments."""
    (folder / "source.py").write_text(source + PADDING)
    assert pack_script.main([str(folder / "source.py"), "-o", str(folder / "out/script.py")]) == 0
    return folder / "out/script.py"


def python(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


# -- how much it weighs --


def test_the_packed_script_leaves_room_for_the_model(packed):
    size = (packed / "train_gpt.py").stat().st_size
    print(f"train_gpt.py: {SCRIPT.stat().st_size} bytes, packed {size}, of {LARGEST} allowed")
    assert size <= LARGEST


def arguments_of(source: str, name: str) -> list[str]:
    """The parameters of a function of the source."""
    functions = [node for node in ast.parse(source).body if getattr(node, "name", "") == name]
    return [argument.arg for argument in functions[0].args.args]


def test_a_triton_kernels_arguments_keep_their_names():
    """Triton reads them in the lines of the readable script."""
    names = arguments_of(SCRIPT.read_text(encoding="utf-8"), "squared_product_kernel")
    assert len(names) == 9 and arguments_of(stripped_script(), "squared_product_kernel") == names


def test_the_bytes_do_not_depend_on_the_python_that_packs(packed, tmp_path):
    """From 3.12 on Python reads f-strings otherwise: one on the other side of that is asked."""
    for version in ("3.10", "3.11") if sys.version_info >= (3, 12) else ("3.13", "3.12", "3.14"):
        program = shutil.which(f"python{version}")
        env = {**os.environ, "PYENV_VERSION": version}  # where python3.X is pyenv's
        if program and not subprocess.run([program, "-c", "import bz2"], env=env).returncode:
            break
    else:
        pytest.skip("no other Python here")
    out = tmp_path / "train_gpt.py"
    command = [program, ROOT / "records/pack_script.py", "-o", out]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    assert out.read_bytes() == (packed / "train_gpt.py").read_bytes()


@given(st.binary(max_size=600))
def test_base251_gives_the_bytes_back(data):
    text = base251_encode(data)
    assert base251_decode(text)[: len(data)] == data and not any(base251_decode(text)[len(data) :])
    assert len(text) == 251 * -(-len(data) // 250) and not set(text) & set('"\\\n\r\0')


@given(st.text(st.characters(max_codepoint=255, exclude_characters="\r")))
def test_a_log_shows_any_packed_script_without_control_codes_and_gives_it_back(text):
    script = f"# coding: latin-1\n{text}".encode("latin-1")
    shown = shown_in_log(script)
    assert script_of_shown(shown) == script
    assert not [sign for sign in shown if sign != "\n" and unicodedata.category(sign) == "Cc"]


# -- what is taken out --

ODD = '''#!/usr/bin/env python3
"""Of the module."""  # a comment

from __future__ import annotations

"a bare string"; number = 1  # two on a line
"""one of
several lines"""; other = 2
text = """
# no comment
    """  # a comment after a string
("in brackets"  # a comment in them
    "and more")


# before a class
class Empty(Exception):
    """Nothing but a docstring,
    of two lines."""


class Thing:
    """A thing."""
    size: int = 3
    """A field's own docstring."""

    def method(self, x="#", *, y='"""'):  # é
        "é"; return f"{x} # {y}"

    async def other(self):  # one
        # two

        """Not a docstring."""
        return [
            1,  # in a list
        ]


def empty(): """One line."""


if number: "in a branch"
value = number + \\
    other  # after a continued line
'''


def test_every_line_keeps_its_number_and_every_string_that_is_used(tmp_path):
    stripped = strip(ODD)
    assert outline(stripped) == outline(ODD) and stripped.count("\n") == ODD.count("\n")
    assert "comment, " not in stripped and "Nothing but" not in stripped and "brackets" not in stripped
    assert stripped.count("# no comment") == 1 and "before a class" not in stripped
    (tmp_path / "odd.py").write_text(stripped)
    space = runpy.run_path(str(tmp_path / "odd.py"))
    assert space["Thing"]().method() == '# # """' and space["text"] == "\n# no comment\n    "
    assert (space["number"], space["other"], space["value"]) == (1, 2, 3)
    assert inspect.getdoc(space["Empty"]) == "" and strip(stripped) == stripped


NAMED = """
size = 3

def positional(width, *, height=1):
    area = width * height
    return area

def by_keyword(depth):
    return depth

def by_dict(level):
    return level

def with_default(count=size):
    size = count + 1
    return size

class Record:
    field: int = 4

def of_record(field):
    return field

def nested(first):
    def inner(second):
        return first + second
    return inner

def shown(text):
    return f"{text}"

found = [positional(2, height=5), by_keyword(depth=6), by_dict(**{"level": 7}), with_default()]
found += [of_record(**{name: 8 for name in Record.__annotations__}), nested(4)(5), shown(10)]
"""


def test_names_that_a_call_may_give_stay_and_the_others_are_short(tmp_path):
    stripped = strip(NAMED)
    assert outline(stripped) == outline(NAMED) and strip(stripped) == stripped
    for program in (NAMED, stripped):
        (tmp_path / "named.py").write_text(program)
        assert runpy.run_path(str(tmp_path / "named.py"))["found"] == [10, 6, 7, 4, 8, 9, "10"]
    kept = "depth", "level", "height", "size", "field", "text"
    assert [name for name in kept if not re.search(rf"\b{name}\b", stripped)] == []
    renamed = "width", "area", "count", "first", "second"
    assert [name for name in renamed if re.search(rf"\b{name}\b", stripped)] == []


SPACED = """
def spaced(values, *rest, scale = 2):
    'A docstring beside other code.'
    first , second = values
    name = f"{ first + second } = { scale * 2 !r:>{ 4 + 2 }}" + "a + b"
    if first < - second or 1 .real in ( 1, ) and not rest [ : : -1 ]:
        name += r'c - d' if scale else "" ; name = name . strip ( )
    return - 1 if not name else name , [ * values , 2 ** - 1 , lambda : - scale ] [ : 2 ]

def empty ( ) :
    'All there is.'

found = spaced ( ( 1 , 2 ) ) , empty ( )
"""


def test_spaces_beside_operators_go_but_those_inside_strings_stay(tmp_path):
    stripped = strip(SPACED)
    assert outline(stripped) == outline(SPACED) and strip(stripped) == stripped
    assert "\tfirst,second=a\n" in stripped
    assert '"{ first + second } = { scale * 2 !r:>{ 4 + 2 }}"+"a + b"' in stripped
    assert "\tif first<-second or 1 .real in(1,)and not rest[::-1]:" in stripped
    lines = stripped.split("\n")
    assert lines[2] == "" and lines[9:11] == ["def empty():", '\t""']
    for program in (SPACED, stripped):
        (tmp_path / "spaced.py").write_text(program)
        assert runpy.run_path(str(tmp_path / "spaced.py"))["found"] == (
            ("3 =      4a + bc - d", [1, 2]),
            None,
        )


@pytest.mark.parametrize(
    ("reads", "kept"),
    [("", []), ("print(__doc__)", ["Of all"]), ("print(f.__doc__)", ["Of all", "Of one"])],
)
def test_a_docstring_that_the_script_reads_stays(reads, kept):
    stripped = strip(f'"""Of all."""\ndef f():\n    """Of one."""\n{reads}\n')
    assert [text for text in ("Of all", "Of one") if text in stripped] == kept


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfx = 1  # c\n", b"x = 1  # c\r\n", b"x = 1  # c\r", b"x = 1"])
def test_ends_of_lines_and_a_mark_at_the_start_are_read_as_python_does(data):
    assert strip(source_text(data, "x.py")).strip() == "x=1"


def test_two_sources_are_one_program_but_for_comments_and_docstrings():
    assert is_same_program(ODD, strip(ODD)) and is_same_program("x = 1", "x  =  1 # one")
    assert not is_same_program("x = 1", "x = 2") and not is_same_program("x = 1", "x = ")


# -- what runs --


def compared(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in OWN}


def forecast_bytes(log: str) -> int:
    return int(re.search(r"^forecast: .* bytes:(\d+)$", log, re.M)[1])


def test_a_packed_run_gives_the_result_of_the_readable_one(
    packed, packed_server, fork_server, launch_forks, tmp_path, short_dataset
):
    """As two forks; it is a process in test_a_record_of_a_packed_run_scores_again."""
    found = {}
    for name, server in dict(plain=fork_server, packed=packed_server).items():
        (tmp_path / name).mkdir()
        about = dict(iterations=4, eval_stride=16, use_hedge=True, swa_enabled=True, swa_every=1)
        found[name] = launch_forks(tmp_path / name, short_dataset, 2, server, **about)
    plain, own = found["plain"], found["packed"]
    assert plain.result and own.result, plain.stderr + own.stderr
    assert compared(plain.result) == compared(own.result) and own.result["steps"] == 4
    model = "final_model.int8.ptz"
    assert (tmp_path / "plain" / model).read_bytes() == (tmp_path / "packed" / model).read_bytes()

    source = (packed / "train_gpt.py").read_bytes()
    size = len(source)
    sha = hashlib.sha256(source).hexdigest()
    readable = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert own.result["code_bytes"] == size and f"Code size: {size} bytes" in own.log
    assert own.result["total_bytes"] == size + own.result["model_bytes"]
    assert forecast_bytes(plain.log) - forecast_bytes(own.log) == SCRIPT.stat().st_size - size
    assert own.log.startswith(shown_in_log(source) + "\n" + "=" * 100)
    assert f"\ncode_sha256:{sha} code_bytes:{size} readable_sha256:{readable}\n" in own.log
    (config,) = own.of("config")
    assert (config["code_sha256"], config["readable_sha256"]) == (sha, readable)
    assert "readable_sha256" not in plain.of("config")[0] and "\ncode_sha256:" not in plain.log


@pytest.mark.parametrize(
    ("ranks", "stop", "more"),
    [
        pytest.param(1, in_step(5, SIGKILL), dict(checkpoint_seconds=1e-9), marks=pytest.mark.slow),
        (2, in_step(5, SIGKILL), dict(checkpoint_seconds=1e-9)),
        (1, dies("Path.rename", SIGKILL, call=3, after=True), {}),  # after the artifact
    ],
)
def test_a_packed_run_that_was_killed_ends_as_a_readable_one_that_was_not(
    new, packed_server, tmp_path, short_dataset, ranks, stop, more
):
    knobs = dict(num_repeats=3, prog_depth="0.35:2,1.0:3", eval_stride=16, eval_batch_seqs=16)
    whole = new(knobs, ranks)
    assert whole.start() == [0] * ranks
    cut = Folder(tmp_path / "cut", packed_server, short_dataset, knobs, ranks)
    assert -SIGKILL in cut.start(stop, **more)
    assert cut.resume(**more) == [0] * ranks, cut.text("0.err")
    expected, found = whole.left(), cut.left()
    for left in (expected, found):
        left["scores"].pop("total_bytes")
    assert [name for name in expected if found[name] != expected[name]] == []
    scored = Folder(tmp_path / "scored", packed_server, short_dataset, knobs, ranks)
    assert scored.start(eval_only=str(whole.path / "final_model.int8.ptz")) == [0] * ranks
    for name in ("val_bpb", "sliding_val_bpb"):
        assert scored.result()[name] == whole.result()[name]


def test_the_packed_script_has_its_pages_and_compiles(packed):
    page = python(packed / "train_gpt.py", "--help", cwd=packed).stdout
    assert (
        page.startswith(train_gpt.__doc__) and "train_gpt_readable.py --help says what each knob does" in page
    )
    for row in train_gpt.knob_rows(train_gpt.Config):
        assert re.search(rf"^{row.name} ", page, re.MULTILINE), row.name
    assert python("-m", "py_compile", packed / "train_gpt.py", cwd=packed).returncode == 0


FAULTY = """# Calls it.
def main():
    '''Fail.

    In line 7.
    '''
    raise ZeroDivisionError("a fault")  # of the test


main()
"""


@pytest.mark.parametrize("beside", ["the readable file", "nothing", "another file"])
def test_a_traceback_names_function_and_line_of_the_readable_source(tmp_path, beside):
    """In a small script. Of any script `pack` itself checks that each line keeps its number."""
    script = packed_from(tmp_path, FAULTY)
    readable = script.with_name("script_readable.py")
    shown = script.with_name("script_readable.py" if beside == "the readable file" else "script_unpacked.py")
    if beside == "nothing":
        readable.unlink()
    if beside == "another file":
        readable.write_text("x = 1\n" * 9999)
    run = python(script, "--help", cwd=tmp_path)
    assert run.returncode == 1 and f'File "{shown}", line 7, in main' in run.stderr
    assert run.stderr.endswith("\nZeroDivisionError: a fault\n")
    assert ("# of the test" in run.stderr) == (beside == "the readable file")


INSPECTED = '''
import dataclasses, inspect, multiprocessing, sys, traceback

@dataclasses.dataclass
class Pair:
    """A pair."""
    x: float = 1.0

def double(x):
    """Twice as much."""
    print("a graph break")  # dynamo stops here
    return x * 2

def fork(number):
    return number + Pair().x

if __name__ == "__main__":
    import torch  # here, since each new process would import it too
    assert torch.compile(double, backend="eager")(torch.ones(2)).tolist() == [2, 2]
    print(inspect.getsource(double))
    for kind in sys.argv[1:]:
        with multiprocessing.get_context(kind).Pool(1) as pool:
            assert pool.map(fork, [1]) == [2.0]
    try:
        double(None)
    except TypeError:
        traceback.print_exc(file=sys.stdout)
'''


OPERANDS = "TypeError: unsupported operand type(s) for *: 'NoneType' and 'int'\n"


@pytest.mark.parametrize("beside", [True, False])
def test_source_is_found_by_inspect_dynamo_and_new_processes(tmp_path, beside):
    script = packed_from(tmp_path, INSPECTED)
    if not beside:
        script.with_name("script_readable.py").unlink()
    run = python(script, *(("fork", "forkserver", "spawn") if beside else ("fork",)), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert 'print("a graph break")' in run.stdout and run.stdout.endswith(OPERANDS)
    assert ("Twice as much" in run.stdout) == beside
    assert re.search(r" return x \* 2\n " if beside else r" return x\*2\n ", run.stdout)
    asked = "import script, inspect; print(inspect.getsource(script.fork), script.__file__)"
    run = python("-c", asked, cwd=script.parent)
    # The stripped source is what there is without the file to read.
    function = (
        "def fork(number):\n    return number + Pair().x\n"
        if beside
        else "def fork(a):\n\treturn a+Pair().x\n"
    )
    assert run.stdout == f"{function} {script}\n", run.stderr


# -- the tool --


def test_unpack_gives_the_stripped_source(packed, capfdbinary, tmp_path):
    assert pack_script.main(["--unpack", str(packed / "train_gpt.py")]) == 0
    assert capfdbinary.readouterr().out.decode() == stripped_script()
    assert pack_script.main(["--unpack", str(packed / "train_gpt.py"), "-o", str(tmp_path / "x.py")]) == 0
    assert (tmp_path / "x.py").read_text() == stripped_script()


BAD = {
    "text": ("Not a script.", "is no Python script: invalid syntax"),
    "bytes": (b"\x00\xff\xfe", "is no Python script"),
    "syntax": ("def f(:\n" + PADDING, "is no Python script: invalid syntax"),
    "encoding": (b"# coding: latin-1\nx = 1\n", "save it as UTF-8"),
    "small": ("x = 1\n", "would be larger packed"),
    "packed": (lambda: pack(FAULTY.encode() + PADDING.encode()), "is packed already"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(name, tmp_path, capsys):
    data, what = BAD[name]
    data = data() if callable(data) else data
    path = tmp_path / "in.py"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    assert what in refusal(capsys, path, "-o", tmp_path / "out.py")
    assert [path.name for path in tmp_path.iterdir()] == ["in.py"]


def refusal(capsys, *arguments) -> str:
    assert finished.guarded(pack_script.main, list(map(str, arguments))) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_no_file_is_overwritten_but_the_same_may_be_there(tmp_path, capsys):
    out, readable = tmp_path / "train_gpt.py", tmp_path / "train_gpt_readable.py"
    script = tmp_path / "in.py"
    script.write_text("x = 1\n" + PADDING)
    for path in (readable, out):
        path.write_text("mine")
        assert f"{path} is there already" in refusal(capsys, script, "-o", out)
        assert path.read_text() == "mine" and {*tmp_path.iterdir()} == {path, script}
        path.unlink()
    for _ in range(2):
        assert pack_script.main([str(script), "-o", str(out)]) == 0
    assert "no file" in refusal(capsys, tmp_path / "none.py")
    assert "name a .py file" in refusal(capsys, "-o", tmp_path)
    assert "is not self-extracting" in refusal(capsys, "--unpack", SCRIPT)


# -- self-extracting scripts of others --

INNER = 'import os\nprint("the inner script", os.getpid())\n'
DATA = INNER.encode()
RAW = [{"id": lzma.FILTER_LZMA2}]
B85 = base64.b85encode(lzma.compress(DATA)).decode()
B64 = base64.b64encode(zlib.compress(DATA)).decode()
B85_RAW = base64.b85encode(lzma.compress(DATA, lzma.FORMAT_RAW, filters=RAW)).decode()
A85 = base64.a85encode(bz2.compress(DATA)).decode()
TWICE = f"import base64\nexec(base64.b64decode({base64.b64encode(DATA)!r}))"
FOREIGN = {
    "lzma": f'import lzma,base64\nexec(lzma.decompress(base64.b85decode("{B85}")))',
    "raw": "import lzma as L,base64 as B\n"
    f'exec(L.decompress(B.b85decode("{B85_RAW}"),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))',
    "from": f"from zlib import decompress as d\nfrom base64 import b64decode\nexec(d(b64decode(b'{B64}')))",
    "variable": f"import zlib, base64\ncode = '{B64}'\n"
    "exec(zlib.decompress(base64.b64decode(code.encode())).decode(), globals())",
    "import": f"exec(__import__('zlib').decompress(__import__('base64').b64decode('{B64}')))",
    "compile": f"import bz2, base64\nexec(compile(bz2.decompress(base64.a85decode({A85!r})), 'x', 'exec'))",
    "sum": f"import zlib, base64\na = {B64[:9]!r}\na = a + {B64[9:]!r}\n"
    "exec(zlib.decompress(base64.b64decode(a)))",
    "join": f"import zlib, base64\na = ''.join([{B64[:9]!r}, {B64[9:]!r}])\n"
    "exec(zlib.decompress(base64.b64decode(a)))",
    "twice": f"import zlib, bz2\nexec(bz2.decompress({bz2.compress(TWICE.encode())!r}))",
    "latin": f"# coding: latin-1\nimport zlib\nexec(zlib.decompress({zlib.compress(DATA).decode('latin-1')!r}"
    ".encode('latin1')))",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_script_that_extracts_itself_is_read_without_running_it(name):
    coding = "latin-1" if name == "latin" else "utf-8"
    found = unpack(FOREIGN[name].encode(coding))
    assert found.source == INNER and found.codecs and not found.readable_sha256


@pytest.mark.parametrize(("package", "method"), [("brotli", "decompress"), ("zstandard", "decompress")])
def test_packages_that_may_be_missing_are_named(package, method, monkeypatch):
    script = f"import {package}, base64\nexec({package}.{method}(base64.b85decode('{{}}')))"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unreadable, match=f"pip install {package}"):
        unpack(script.format("00").encode())
    monkeypatch.undo()
    blob = base64.b85encode(pytest.importorskip(package).compress(DATA)).decode()
    assert unpack(script.format(blob).encode()).source == INNER
    blob = base64.b85encode(sys.modules[package].compress(bytes(2 * LIMIT))).decode()
    with pytest.raises(Unreadable, match="gives over"):
        unpack(script.format(blob).encode())


BOMB = base64.b85encode(lzma.compress(bytes(LIMIT + 1))).decode()
UNREAD = {
    "import marshal\nexec(marshal.loads(b'x'))": r"marshal.loads\(...\) is not followed",
    "exec(open('x').read())": r"open\(...\).read\(...\) is not followed",
    "import urllib.request as u\nexec(u.urlopen('x').read())": "is not followed",
    f"import lzma,base64\nexec(lzma.decompress(base64.b85decode('{BOMB}')))": "gives over",
    f"import lzma,base64\nexec(lzma.decompress(base64.b85decode('{B85[:-9]}')))": "too early|Error",
    "import zlib\nexec(zlib.decompress(b'no'))": "zlib.decompress.*error",
    "x = 'ab' * 9\nexec(x)": "BinOp is not followed",
    "exec(7)": "is no text",
    "exec()": "without an argument",
    "def f(:": "not Python",
    "import lzma\nexec(lzma.decompress(b'x', format=lzma.FORMAT_RAW,"
    " filters=[{'id': lzma.FILTER_LZMA2, 'dict_size': 2**31}]))": "not followed|too much memory",
    "a = 'x'\n" + "a = a + a\n" * 40 + "exec(a)": "is not followed",
}


@pytest.mark.parametrize("script", UNREAD)
def test_what_cannot_be_read_is_said_in_one_line(script):
    with pytest.raises(Unreadable, match=UNREAD[script]) as told:
        unpack(script.encode())
    assert "\n" not in str(told.value)


def test_a_decoder_of_the_same_name_is_not_taken_for_ours(packed):
    script = (packed / "train_gpt.py").read_bytes().replace(b"number * 251", b"number * 250")
    with pytest.raises(Unreadable, match="base251_decode"):
        unpack(script)


def test_a_script_that_extracts_nothing_is_left_alone():
    assert unpack(SCRIPT.read_bytes()) is None and unpack(b"def f():\n    exec(x)\n") is None


# -- records --

ABOUT = "--name", "A toy", "--author", "A. Person", "--github-id", "aperson", "--track", "cpu_toy"


@pytest.fixture(scope="module")
def record(packed, packed_server, short_dataset, tmp_path_factory) -> Path:
    """A record folder of a packed run, as records/make.py makes it."""
    folder = tmp_path_factory.mktemp("record")
    run = Folder(folder / "run", packed_server, short_dataset, dict(eval_stride=16))
    assert run.start() == [0], run.text("0.err")
    shutil.copy(packed / "train_gpt_readable.py", run.path)
    options = ["--runs", run.path, "--out", folder / "made", "--artifact"]
    assert make.main(["r", *ABOUT, *map(str, options)]) == 0
    return folder / "made"


@pytest.fixture
def copy(record, tmp_path) -> Path:
    return shutil.copytree(record, tmp_path / "copy")


def findings(folder: Path) -> list[tuple[str, str]]:
    found = [(finding.severity, finding.code) for finding in lint.check_folder(folder)]
    return [pair for pair in found if pair[0] != "info" or pair[1].startswith("packed")]


def test_a_record_of_a_packed_run_has_both_scripts(record, packed):
    claim = json.loads((record / "submission.json").read_text())
    page = (record / "README.md").read_text()
    for name, key in (("train_gpt.py", "code_sha256"), ("train_gpt_readable.py", "readable_sha256")):
        data = (packed / name).read_bytes()
        assert (record / name).read_bytes() == data and f"`{name}`" in page
        assert claim[key] == hashlib.sha256(data).hexdigest()
    assert claim["bytes_code"] == (record / "train_gpt.py").stat().st_size
    assert findings(record) == [("info", "packed")]


def test_a_record_of_a_packed_run_scores_again(record, short_dataset):
    options = ["--data", short_dataset, "--tokenizer", short_dataset / "tokenizer.model"]
    assert rescore.main([str(record), *map(str, options)]) == 0


def test_the_linter_finds_a_readable_script_that_is_not_the_packed_one(copy):
    readable = copy / "train_gpt_readable.py"
    text = readable.read_text()
    readable.write_text(text + "# one more\n")
    expected = {("error", "readable_differs"), ("error", "code_hash"), ("info", "packed")}
    assert set(findings(copy)) == expected
    readable.unlink()
    assert findings(copy) == [("warn", "no_readable"), ("info", "packed")]
    forged = text.replace("SIZE_LIMIT = 16_000_000", "SIZE_LIMIT = 16_000_001", 1)
    assert forged != text
    readable.write_text(forged)
    sha = [hashlib.sha256(part.encode()).hexdigest() for part in (text, forged)]
    for path in (copy / "train_gpt.py", copy / "train.log"):
        path.write_bytes(path.read_bytes().replace(*[text.encode() for text in sha]))
    assert expected <= set(findings(copy))


def test_the_linter_compares_the_scripts_of_others_by_what_they_do(copy):
    source = stripped_script()
    blob = base64.b85encode(lzma.compress(source.encode())).decode()
    (copy / "train_gpt.py").write_text(FOREIGN["lzma"].replace(B85, blob))
    assert ("warn", "readable_differs") not in findings(copy)
    (copy / "train_gpt_readable.py").write_text("x = 1\n")
    assert ("warn", "readable_differs") in findings(copy)
    (copy / "train_gpt.py").write_text("exec(open('train_gpt_readable.py').read())\n")
    assert ("info", "packed_unread") in findings(copy)


def test_make_refuses_a_packed_run_without_its_readable_source(record, tmp_path, capsys):
    run = shutil.copytree(record.parent / "run", tmp_path / "run")
    (run / "train_gpt_readable.py").write_text("x = 1\n")
    other = tmp_path / "other.py"
    other.write_text("x = 2\n")
    arguments = ["r", *ABOUT, "--runs", str(run), "--out", str(tmp_path / "made"), "--readable"]
    assert finished.guarded(make.main, [*arguments, str(other)]) == 2
    assert "name the train_gpt_readable.py" in capsys.readouterr().err and not (tmp_path / "made").exists()
    assert make.main([*arguments, str(SCRIPT)]) == 0


@pytest.mark.parametrize("text", ["{('b',): 1}", "{'a': 1, ('b',): 2}", "{'a': 1, 3: 2}", "{'a': 1, **b}"])
def test_a_dictionary_with_other_keys_than_texts_is_not_followed(text):
    reader = Reader(ast.parse(""))
    assert reader.value(ast.parse("{'a': 1, 'b': b'x'}", mode="eval").body) == dict(a=1, b=b"x")
    with pytest.raises(Unreadable):
        reader.value(ast.parse(text, mode="eval").body)
