"""The one error of everything around train_gpt.py that is the user's to mend, and how it is told.

train_gpt.py runs with nothing beside it, so it has its own, RunError; where one of its functions is called,
that may come too. This file imports next to nothing, so that every tool can use it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_CODE = 2
CLOSED_PIPE = 141  # as a shell says of a program that SIGPIPE ended


class UserError(Exception):
    """A fault in the command or in an input: what is wrong, where, and how to mend it. Exit code 2.

    `lines` holds one line for each fault, mostly a single one.
    """

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


def use_any_console() -> None:
    """Print what the console cannot show, as in a path on an ASCII terminal, as an escape: no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's `main` and exit with its code.

    Where nobody reads on, as after `| head`, it ends without a word and with 141.
    """
    use_any_console()
    try:
        try:
            code = main() or 0
        finally:
            print(end="", flush=True)  # what fails at Python's own exit cannot be caught
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)  # which takes what is still buffered
        code = CLOSED_PIPE
    raise SystemExit(code)


def tell(error: object) -> int:
    """Print each line of an error to stderr, marked as one; returns the exit code for it."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return EXIT_CODE


def tell_os_error(error: OSError) -> int:
    """The same for a file that cannot be read or written; a closed pipe is left to run_tool."""
    if isinstance(error, BrokenPipeError):
        raise error
    return tell(f"{error.filename or 'file system'}: {error.strerror or error}")
