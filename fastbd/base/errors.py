"""Errors that the user can fix, those of a device whose memory is too short, and those of the machine itself."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOMEM}
"""A disk that is full or out of reach, and memory that is short."""
SAID = "can(no|')t allocate memory|no space left on device|disk quota exceeded|input/output error|stale file handle"
"""What PyTorch and others put of these into an error of their own."""


class UserError(Exception):
    """A mistake in the input. The message is one sentence: what is wrong, where, and what to do. Exit code 2."""


class Diverged(UserError):
    """Training left the numbers."""


def is_short_of_memory(error: Exception) -> bool:
    """Whether a device's memory did not suffice, as PyTorch, CUDA, Triton, cuBLAS or cuDNN say it.

    PyTorch has a class for its own allocations alone; cuDNN finds no engine when there is no memory left to try one.
    """
    short = "out of memory|ALLOC_FAILED|unable to find an engine|unable to find a valid cuDNN"
    return re.search(short, str(error), re.IGNORECASE) is not None


def machine_fault(error: BaseException) -> BaseException | None:
    """Return the error in the chain of causes that lies with the machine's disks or memory; None where none does.

    It says nothing about the work that met it, which would have gone well at another time. A GPU's memory is none of
    it: what does not fit there now will not fit later.
    """
    for one in chain(error):
        if isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno in MACHINE):
            return one
        if isinstance(one, RuntimeError) and re.search(SAID, str(one), re.IGNORECASE):
            return one
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, its causes, and the errors that were being handled when it was raised, each once."""
    left, seen = [error], set()
    while left:
        one = left.pop()
        yield one
        seen.add(id(one))
        left += [other for other in (one.__context__, one.__cause__) if other and id(other) not in seen]


def lacks_memory(fault: BaseException) -> bool:
    """Whether the machine's fault is want of memory, which the work itself may cause: then it comes at every try."""
    short = isinstance(fault, MemoryError) or getattr(fault, "errno", None) == errno.ENOMEM
    return short or "allocate memory" in str(fault).lower()
