"""Worker processes: the server that they are forked from, and a map over some of them, in order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from itertools import cycle
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import TypeVar

from fastbd.base.errors import UserError
from fastbd.base.signals import STOPPING, end_with_parent

T = TypeVar("T")
R = TypeVar("R")
_preloaded: list[str] = []


class WorkerDied(UserError):
    """A worker process ended before its work did: exit code `code`, or signal -`code`."""

    def __init__(self, code: int):
        memory = code == -signal.SIGKILL
        how = f"of {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        why = ", most likely for want of memory: run with fewer --workers" if memory else ": run the same command again"
        super().__init__(f"a worker process died {how}{why}")


def preload(module: str) -> None:
    """Let the server, where it is not started yet, import a module that its processes need: once for all of them."""
    if module not in _preloaded:
        _preloaded.append(module)
    multiprocessing.get_context("forkserver").set_forkserver_preload(_preloaded)


def forking() -> ForkServerContext:
    """Return the way to make processes that a server forks, and start the server; this process may have threads.

    It is deaf to Ctrl-C, at which it would show a traceback while it imports; and it imports from where this process
    does, not first from the working folder.
    """
    resource_tracker.ensure_running()  # first: having started it, Python lets Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING) - {signal.SIGTERM})
    found = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    own = {name: os.environ[name] for name in found if name in os.environ}
    os.environ |= found
    try:
        forkserver.ensure_running()
    finally:
        for name in found:
            del os.environ[name]
        os.environ |= own
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return multiprocessing.get_context("forkserver")


def map_in_order(work: Callable[[T], R], tasks: Sequence[T], workers: int) -> Generator[R, None, None]:
    """Yield work(task) for each task, in their order, done by `workers` processes (0: one a core) that take turns.

    Each worker sends through a pipe of its own and waits while the pipe is full: that bounds the memory, and a worker
    that is killed, even while it sends, ends its pipe. A shared queue, as concurrent.futures has it, would hang.
    Close the iterator to end the processes early; they end with this one, too. Raises WorkerDied, and what work raises.
    Where one worker is enough this process is that worker, and does a task when its result is asked for: starting
    another takes seconds.
    """
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    if workers < 2:
        yield from map(work, tasks)
        return
    context = forking()
    processes, pipes = [], []
    try:
        for worker in range(workers):
            results, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(work, tasks[worker::workers], send), daemon=True)
            process.start()
            send.close()
            processes.append(process)
            pipes.append(results)
        for _, (results, process) in zip(tasks, cycle(zip(pipes, processes, strict=True)), strict=False):
            yield _receive(results, process)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _receive(results: Connection, process: BaseProcess):
    try:
        result, error = results.recv()
    except (EOFError, OSError):
        process.join()
        assert process.exitcode is not None, "it has ended"
        killed = MemoryError() if process.exitcode == -signal.SIGKILL else None  # see errors.machine_fault
        raise WorkerDied(process.exitcode) from killed
    if error:
        raise error
    return result


def _work(work: Callable, tasks: Sequence, send: Connection) -> None:
    for signum in set(STOPPING) - {signal.SIGTERM}:  # Ctrl-C reaches the whole group; the parent ends the work
        signal.signal(signum, signal.SIG_IGN)
    end_with_parent()
    with suppress(BrokenPipeError):  # the parent is gone: nobody is left to tell
        for task in tasks:
            try:
                result, error = work(task), None
            except Exception as raised:
                result, error = None, _portable(raised)
            send.send((result, error))
            if error:
                return


def _portable(error: Exception) -> Exception:
    """The error, or where it cannot be sent a RuntimeError that names it, with the worker's traceback as a note."""
    note = f"in a worker process:\n{traceback.format_exc()}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error
