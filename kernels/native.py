"""Compiled C++, which does on a CPU what is slow in PyTorch there; all that it does has a plain way beside it."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


@cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the library made of cpp/`name`.cpp; None where none was, or with FASTBD_NATIVE=0 in the environment."""
    if os.environ.get("FASTBD_NATIVE") == "0":
        return None
    paths = [Path(__file__).with_name(f"_{name}{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    return ctypes.CDLL(str(path)) if path else None
