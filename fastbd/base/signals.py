"""Signals that ask a process to stop: Ctrl-C, those of schedulers, and that of a terminal that is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastbd.base.errors import chain

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
INSISTING = (signal.SIGINT, signal.SIGTERM)
"""Those that mean more when they come again. A lost terminal sends SIGHUP twice, through the shell and by itself."""


class Stopped(BaseException):
    """A signal asked to stop; what can be is saved. Like KeyboardInterrupt it is no error, nor caught as one."""

    def __init__(self, signum: int):
        self.exit_code = 128 + signum


@contextmanager
def stoppable() -> Iterator[None]:
    """A signal that asks to stop raises Stopped within the block, where the work stands."""

    def stop(signum: int, before: Any) -> None:
        raise Stopped(signum)

    with handled(stop):
        yield


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """Call handler(signum, the handler before) for STOPPING within the block; yields all the handlers before.

    Of what is ignored, as SIGHUP under nohup, the handler does not hear. Handlers before come back at the end. In
    another thread than the main one, where Python lets nobody handle signals, it hears of none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    previous: dict[int, Any] = {}
    told: set[int] = set()

    def handle(signum: int, frame: FrameType | None) -> None:
        if _in_destructor(frame):
            threading.Timer(0.1, os.kill, (os.getpid(), signum)).start()
            return
        if signum == signal.SIGHUP:
            _leave_terminal()
        if signum in INSISTING or signum not in told:
            told.add(signum)
            handler(signum, previous[signum])

    try:
        for signum in STOPPING:
            if (before := signal.getsignal(signum)) is not signal.SIG_IGN:
                previous[signum] = before
                signal.signal(signum, handle)
        yield previous
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)


def _in_destructor(frame: FrameType | None) -> bool:
    """Whether the frame is within a __del__, where Python drops what a handler raises."""
    while frame and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@contextmanager
def held_back() -> Iterator[None]:
    """Delay signals that ask to stop until the block has ended, which is not to be left half way."""
    came: list[int] = []
    try:
        with handled(lambda signum, before: came.append(signum)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def stop_behind(error: BaseException) -> Stopped | None:
    """Return the Stopped that was being handled when the error was raised, as by a save that failed, or None."""
    return next((one for one in chain(error) if isinstance(one, Stopped)), None)


def end_with_parent() -> None:
    """Send this process SIGTERM when the process that started it, through multiprocessing, ends, however that ends."""
    parent, own = multiprocessing.parent_process(), threading.main_thread().ident
    assert parent is not None and own is not None, "multiprocessing has started this process"

    def wait() -> None:
        parent.join()
        signal.pthread_kill(own, signal.SIGTERM)  # which a sleep of that thread ends with

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


def _leave_terminal() -> None:
    """Say nothing more to a terminal that is lost: each write would be an error, instead of a checkpoint saved."""
    null = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if _is_lost(output):
            os.dup2(null, output)
    os.close(null)


def _is_lost(output: int) -> bool:
    try:
        os.write(output, b"")  # asks only a terminal whether it is there
    except OSError as error:
        return error.errno == errno.EIO
    return False
