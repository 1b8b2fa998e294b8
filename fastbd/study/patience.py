"""Work that waits while the machine's disks or memory keep it from its end."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import TypeVar

from fastbd.base.console import console
from fastbd.base.errors import UserError, machine_fault
from fastbd.base.signals import stop_behind, stoppable

T = TypeVar("T")
FIRST, LONGEST = 1.0, 300.0  # seconds between two tries; each pause is twice the one before
PATIENCE = 12 * 3600.0  # seconds of pauses without a success: a night


def patiently(action: Callable[[], T], folder: Path) -> T:
    """Return action(), tried again after growing pauses while an error of it is the machine's (errors.machine_fault).

    Raises UserError after PATIENCE, or at once where waiting does not help, as for a limit of the process, saying how
    the sweep in `folder` is resumed; signals.Stopped after a signal, also where it could not be saved.
    """
    pause, waited = FIRST, 0.0
    while True:
        try:
            return action()
        except Exception as error:
            if stopped := stop_behind(error):
                with suppress(OSError):
                    console.print(str(error), markup=False)  # what is not saved
                raise stopped from error
            fault = machine_fault(error)
            if fault is None:
                raise
            why, limited = _in_words(fault, folder), getattr(fault, "errno", None) == errno.EFBIG
            fault = None  # with its frames, and the memory that they hold
        again = f"resume with python -m fastbd sweep --out {quote(str(folder))}"
        if limited:
            raise UserError(f"{why}, by a limit of this process (see ulimit -f): raise it, then {again}")
        if waited >= PATIENCE:
            raise UserError(f"{why}, for {waited / 3600:.1f} h: {again}")
        with suppress(OSError):  # it may be the disk that this goes to
            console.print(f"{why}: nothing is lost; trying again in {pause:.0f} s", markup=False)
        with stoppable():
            time.sleep(pause)
        waited, pause = waited + pause, min(2 * pause, LONGEST)


def _in_words(fault: BaseException, folder: Path) -> str:
    if isinstance(fault, OSError) and fault.errno != errno.ENOMEM:
        return f"{fault.filename or folder}: {fault.strerror}"
    said = (str(fault) or type(fault).__name__).splitlines()[0]
    return f"the sweep in {folder} met '{said}'"
