"""Views on the CPU in compiled C++ (cpp/views.cpp): the reference's bytes, in one call without Python's lock."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastbd.kernels import native
from fastbd.kernels.constants import noise_levels, normalisation
from fastbd.kernels.views import OFFSETS, OPERATION, PARAMS, View

WAYS = ("portable", "AVX2")
"""What the C++ is compiled for, slowest first; a processor that has one has those before it."""
KINDS = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2}
CPU = torch.device("cpu")


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None. RuntimeError where it was made of another version of this package."""
    found = native.library("views")
    if found is None:
        return None
    layout = [PARAMS.itemsize, *OFFSETS.values(), OPERATION.itemsize]
    if list((ctypes.c_int32 * len(layout)).in_dll(found, "view_layout")) != layout:
        raise RuntimeError("the compiled library of views is of another version of fastbd: install fastbd again.")
    pointer, whole = ctypes.c_void_p, ctypes.c_int32
    found.render.argtypes = [pointer, pointer, pointer, ctypes.c_int64, *[whole] * 3, pointer, pointer, whole, pointer]
    found.render.restype = ctypes.c_int64
    return found


def takes(dtype: torch.dtype) -> bool:
    """Whether there is a library, and views of that dtype are made by it."""
    return dtype in KINDS and library() is not None


def ways() -> tuple[str, ...]:
    """Those of WAYS that are here, the one that is taken last."""
    found = library()
    return WAYS[: found.ways()] if found else ()


def render(
    images: Sequence[Tensor],
    view: View,
    size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
    way: str | None = None,
) -> Tensor:
    """One view of each image, as augment_reference.render makes it, of a dtype that it takes; the fastest way or `way`.

    ValueError where a view would leave its image.
    """
    found = library()
    assert found is not None, "no library was compiled"
    if out is None:
        out = torch.empty(len(images), size, size, 3, dtype=dtype)
    if out.dtype != dtype or out.shape != (len(images), size, size, 3) or not out.is_contiguous():
        raise ValueError(f"out must be {dtype} {[len(images), size, size, 3]}, contiguous")
    images = [image.contiguous() for image in images]
    addresses = np.array([image.data_ptr() for image in images], np.int64)
    sizes = np.array([(image.size(0), image.size(1)) for image in images], np.int32)
    params = np.ascontiguousarray(view.params)
    # Held until the call is over: what a cache returns to one of two threads that come first is not what it keeps.
    levels, noise = normalisation(CPU, size), noise_levels(CPU)
    failed = found.render(
        addresses.ctypes.data,
        sizes.ctypes.data,
        params.ctypes.data,
        len(images),
        size,
        view.cubic,
        KINDS[dtype],
        levels.data_ptr(),
        noise.data_ptr(),
        WAYS.index(way) + 1 if way else found.ways(),
        out.data_ptr(),
    )
    if failed >= 0:
        raise ValueError(f"a view that leaves its image of {sizes[failed].tolist()} px: {view.params[failed]}")
    if failed != -1:
        raise MemoryError
    return out if dtype == torch.uint8 else out.permute(0, 3, 1, 2)
