"""What nobody reads on, as after `| head`, ends a tool without a word and with the exit code of SIGPIPE."""

import ast
import os
import subprocess
import sys

import pytest

from data.user_error import CLOSED_PIPE, tell_os_error
from tests.conftest import ROOT
from tests.test_missing_packages import TOOLS

NO_READER = "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w); "


@pytest.mark.parametrize("page", ["--help", "--list-ideas"])
def test_a_page_of_the_script_ends_quietly(new, page):
    folder = new({})
    assert folder.start(NO_READER + f"sys.argv.append({page!r})") == [CLOSED_PIPE]
    assert folder.text("0.err") == "" and not (folder.path / "logs").exists()


@pytest.mark.parametrize("main", ["lambda: print('a line')", "lambda: sys.exit(print('a line'))"])
def test_a_tool_ends_quietly(main):
    """Its output waits for the end, which may be an exit of its own."""
    reader, writer = os.pipe()
    os.close(reader)
    tool = f"import sys; from data.user_error import run_tool; run_tool({main})"
    command = [sys.executable, "-c", tool]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, b"")


def test_the_error_of_a_closed_pipe_is_not_told_as_one_of_a_file(capsys):
    assert tell_os_error(OSError(28, "No space left on device", "x.bin")) == 2
    assert capsys.readouterr().err == "error: x.bin: No space left on device\n"
    with pytest.raises(BrokenPipeError):
        tell_os_error(BrokenPipeError(32, "Broken pipe"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if not tool.startswith("tests/")])
def test_every_tool_is_run_in_the_one_place_that_knows_of_closed_pipes(tool):
    tree = ast.parse((ROOT / tool).read_text(encoding="utf-8"))
    (entry,) = [
        node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    ]
    called = {
        node.func.id for node in ast.walk(entry) if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert called & {"run_tool", "command"}, ast.unparse(entry)
