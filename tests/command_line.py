"""The command line `python -m fastbd`, within this process or in one of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

from fastbd import cli

SHOWN = {"COLUMNS": "200"}  # no line of what is printed is broken
IGNORED = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # by Python, too


def fastbd(*arguments, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    """Run a command line within this process and check its exit code; returns what it would be as a process.

    An error with a traceback has exit code 1, as it has there.
    """
    words = list(map(str, arguments))
    with caught("stdout") as out, caught("stderr") as err, as_alone(), contextlib.chdir(cwd):
        found = _code_of(lambda: cli.main(words))
    done = subprocess.CompletedProcess(["fastbd", *words], found, out(), err())
    assert done.returncode == code, f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}"
    return done


def fastbd_process(*arguments, cwd: Path, code: int = 0, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run a command line in a process of its own and check its exit code."""
    command = [sys.executable, *launcher, "-m", "fastbd", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | SHOWN)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def _code_of(run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else bool(ended.code)
    except Exception:
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def caught(name: str) -> Iterator[Callable[[], str]]:
    """Catch all that is written to stdout or stderr, by libraries and other processes too; yields how to read it."""
    stream: TextIO = getattr(sys, name)
    stream.flush()
    number = {"stdout": 1, "stderr": 2}[name]
    before = os.dup(number)
    with tempfile.TemporaryFile("w+", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
        said: list[str] = []
        try:
            yield lambda: said[0]
        finally:
            setattr(sys, name, stream)
            os.dup2(before, number)
            os.close(before)
            file.flush()
            file.seek(0)
            said.append(file.read())


@contextlib.contextmanager
def as_alone() -> Iterator[None]:
    """Print warnings as a process of its own would, where pytest would collect them; put the environment back."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    with warnings.catch_warnings(), patch.dict(os.environ, SHOWN):
        warnings.simplefilter("default")
        for category in IGNORED:
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show
        yield
