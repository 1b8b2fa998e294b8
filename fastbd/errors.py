"""Errors that the user can fix, and those of a device whose memory is too short."""

import re


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
