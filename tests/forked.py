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
from types import SimpleNamespace
from typing import Any

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
    return forked(_command, *map(str, words), cwd=cwd, said=said)


def end(process: BaseProcess) -> None:
    """Kill the process, if it lives, with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


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
    sys.exit(work(*arguments))


def _command(*words: str) -> int:
    import torch

    from fastbd import cli
    from fastbd.study import engines

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    fork = multiprocessing.get_context("fork")  # which can be, as this process has but one thread
    engines.multiprocessing = SimpleNamespace(get_context=lambda method: fork)
    sys.argv[1:] = words
    return cli.program()
