"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of malloc.h
NEVER = (1 << 31) - 1  # bytes


def keep_freed() -> None:
    """Let the C library, where it is glibc, keep what is freed for the next that is asked for.

    Else it gives large blocks back at once, and each step of a training on a CPU has its activations' memory mapped and
    zeroed anew. The most that a process uses stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, NEVER)
        mallopt(M_TRIM_THRESHOLD, NEVER)
