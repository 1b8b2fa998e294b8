"""Compiled C++, which does on a CPU what is slow in PyTorch there; all that it does has a plain way beside it."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NAMES = "attention", "batchnorm", "views"


@cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the library made of cpp/`name`.cpp; None where none was, or with FASTBD_NATIVE=0 in the environment."""
    if is_left_out():
        return None
    paths = [Path(__file__).with_name(f"_{name}{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    return ctypes.CDLL(str(path)) if path else None


def is_left_out() -> bool:
    """Whether FASTBD_NATIVE=0 is in the environment."""
    return os.environ.get("FASTBD_NATIVE") == "0"


def found() -> list[str]:
    """Return the names of the libraries in use; without attention and batchnorm a training rounds otherwise."""
    return [name for name in NAMES if library(name)]
