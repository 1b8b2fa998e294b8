"""Attention within packed captions on a CPU in compiled C++ (cpp/attention.cpp), in float32: without any padding."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from fastbd.kernels import native


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None."""
    found = native.library("attention")
    if found is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        shape = [pointer, count, count, count, ctypes.c_int]  # starts, captions, heads, dim, threads
        found.fastbd_attention.argtypes = [pointer, *shape, pointer]
        found.fastbd_attention_backward.argtypes = [pointer, pointer, *shape, pointer]
        found.fastbd_attention.restype = found.fastbd_attention_backward.restype = None
    return found


def attention(qkv: Tensor, starts: Tensor, heads: int) -> Tensor:
    """As text_pack.packed_attention: qkv [T, 3 * width], starts int32 [B + 1] -> [T, width] of its type."""
    x, starts = _plain(qkv), starts.contiguous()
    out = x.new_zeros(len(x), x.shape[1] // 3)
    _library().fastbd_attention(x.data_ptr(), *_shape(starts, heads, out), out.data_ptr())
    return out.to(qkv.dtype)


def attention_backward(gradient: Tensor, qkv: Tensor, starts: Tensor, heads: int) -> Tensor:
    """Return the gradient of qkv from that of the output."""
    x, given, starts = _plain(qkv), _plain(gradient), starts.contiguous()
    of_qkv = torch.zeros_like(x)
    shape = _shape(starts, heads, given)
    _library().fastbd_attention_backward(given.data_ptr(), x.data_ptr(), *shape, of_qkv.data_ptr())
    return of_qkv.to(qkv.dtype)


def _plain(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _shape(starts: Tensor, heads: int, out: Tensor) -> tuple[int, ...]:
    return starts.data_ptr(), len(starts) - 1, heads, out.shape[1] // heads, torch.get_num_threads()


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "way native is for where there is one"
    return found
