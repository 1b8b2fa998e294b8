"""Work shared out to processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from multiprocessing.connection import Connection
from typing import TypeVar

from fastbd.errors import UserError

T, R = TypeVar("T"), TypeVar("R")


class WorkerDied(UserError):
    """A worker process ended before its work did."""

    def __init__(self):
        super().__init__("a worker process died, most likely for want of memory: run with fewer --workers")


def map_in_order(work: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """work(task) for each task, in their order, done by `workers` processes (0: one a core) that take turns.

    Each worker sends through a pipe of its own and waits while the pipe is full: that bounds the memory, and a worker
    that is killed, even while it sends, ends its pipe. A shared queue, as concurrent.futures has it, would hang.
    Close the iterator to end the processes early. Raises WorkerDied.
    """
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    context = multiprocessing.get_context("forkserver")  # not forked from this process, which may have threads
    processes, pipes = [], []
    try:
        for worker in range(workers):
            results, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(work, tasks[worker::workers], send), daemon=True)
            process.start()
            send.close()
            processes.append(process)
            pipes.append(results)
        for _, results in zip(tasks, cycle(pipes), strict=False):
            yield _receive(results)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _receive(results: Connection):
    try:
        return results.recv()
    except (EOFError, OSError):
        raise WorkerDied from None


def _work(work: Callable, tasks: Sequence, send: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    with suppress(BrokenPipeError):  # the parent is gone: nobody is left to tell
        for task in tasks:
            send.send(work(task))
