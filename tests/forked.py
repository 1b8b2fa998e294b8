"""Processes of their own, forked from a server that has loaded all of fastbd.

Starting Python with torch would take each of them 5 seconds of CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

LOADED = ["torch._dynamo", *(f"fastbd.commands.{verb}" for verb in ("build", "pretrain", "clean", "sweep"))]
multiprocessing.get_context("forkserver").set_forkserver_preload(LOADED)
forkserver.set_forkserver_preload = lambda names: None  # a build, which may start the server, asks for less


def forked(work: Callable[..., Any], *arguments: Any, cwd: Path, said: Path | None = None) -> BaseProcess:
    """Start work(*arguments) in a process and a session of its own, which ends with what it returns as exit code.

    It works in `cwd`, with today's environment; what it and its children say goes to the file `said`.
    """
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_alone, args=(work, arguments, cwd, said, dict(os.environ)))
    process.start()
    return process


def command(*words: Any, cwd: Path, said: Path | None = None) -> BaseProcess:
    """Start the command line `python -m fastbd *words` in a process and a session of its own."""
    return forked(run_command, *map(str, words), cwd=cwd, said=said)


def ran(*words: Any, cwd: Path) -> str:
    """Return what a command line says that ends well in a process of its own."""
    with TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        process = command(*words, cwd=cwd, said=said)
        process.join()
        assert process.exitcode == 0, said.read_text()
        return said.read_text()


def end(process: BaseProcess) -> None:
    """Kill the process, if it lives, with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def fork_children(patch: pytest.MonkeyPatch) -> None:
    """Have sweeps and builds fork their processes from this one, which has loaded all that they need."""
    from fastbd.base import workers

    patch.setattr(workers, "forking", lambda: multiprocessing.get_context("fork"))


def _alone(work: Callable[..., Any], arguments: tuple, cwd: Path, said: Path | None, environment: dict) -> None:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # of which the server may have blocked some
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    with open(said or os.devnull, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    _measure_little()
    sys.exit(work(*arguments))


def _measure_little() -> None:
    """Each training measures the machine, for a second: how fast it is does not matter here."""
    from fastbd.training import roofline

    roofline.SIDES["cpu"], roofline.COPIED["cpu"] = (64,), 1 << 16


def run_command(*words: str) -> int:
    """Run a command line in this process, which is a forked one, and in others that are forked from it."""
    import torch

    from fastbd import cli

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    fork_children(pytest.MonkeyPatch())
    sys.argv[1:] = words
    return cli.program()
