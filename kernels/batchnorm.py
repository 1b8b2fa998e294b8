"""Batch norm in training with the layers that follow it: pool(relu(norm(x) + shortcut)).

By PyTorch's layers, or on a CPU as one operation of a compiled library, which reads and writes a third less memory.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastbd.kernels import native


class Norm(NamedTuple):
    """A batch norm's parameters and running statistics, float32 [C] each."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


def followed(y: Tensor, shortcut: Tensor | None, relu: bool, pool: nn.AvgPool2d | None) -> Tensor:
    """pool(relu(y + shortcut)) of y [N, C, H, W], each of them where it is asked for."""
    y = y if shortcut is None else y + shortcut
    y = F.relu(y) if relu else y
    return y if pool is None else pool(y)


def reference(x: Tensor, norm: Norm, shortcut: Tensor | None, relu: bool, pool: nn.AvgPool2d | None) -> Tensor:
    """pool(relu(norm(x) + shortcut)) of x [N, C, H, W] with the batch's statistics, which the running ones take in."""
    y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    return followed(y, shortcut, relu, pool)


def batch_norm(x: Tensor, norm: Norm, shortcut: Tensor | None, relu: bool, pool: nn.AvgPool2d | None) -> Tensor:
    """The same as reference(), by the compiled library where it is installed and x is what it takes."""
    if not _is_native(x, norm, shortcut, pool):
        return reference(x, norm, shortcut, relu, pool)
    y, mean, variance = _Native.apply(x, shortcut, relu, pool is not None, norm.weight, norm.bias, norm.eps)
    if norm.momentum:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return y


def _is_native(x: Tensor, norm: Norm, shortcut: Tensor | None, pool: nn.AvgPool2d | None) -> bool:
    """Whether the library takes them: float32 with the channels last, in main memory; even sides, to be pooled."""
    inputs = [x] if shortcut is None else [x, shortcut]
    even = x.shape[2] % 2 == x.shape[3] % 2 == 0
    return (
        not torch.compiler.is_compiling()
        and all(y.device.type == "cpu" and y.dtype == norm.weight.dtype == torch.float32 for y in inputs)
        and all(y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last) for y in inputs)
        and (pool is None or (shortcut is None and pool.kernel_size == pool.stride == 2 and even))
        and x.numel() > x.shape[1]  # else PyTorch says what is wrong
        and _library() is not None
    )


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, shortcut, relu, pool, weight, bias, eps):
        batch, channels, height, width = x.shape
        shape = (batch, channels, height // 2, width // 2) if pool else x.shape
        y = torch.empty(shape, memory_format=torch.channels_last)
        mean, variance, rstd = (x.new_empty(channels) for _ in range(3))
        ctx.shape = (batch * height * width, channels, width if pool else 0, relu)
        _native().fastbd_batch_norm(
            _at(x), _at(shortcut), *ctx.shape, _at(weight), _at(bias), eps, torch.get_num_threads(),
            _at(mean), _at(variance), _at(rstd), _at(y),
        )  # fmt: skip
        ctx.has_shortcut = shortcut is not None
        ctx.save_for_backward(x, y if relu and ctx.has_shortcut else None, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient, *_):
        x, y, weight, bias, mean, rstd = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        # Without a ReLU the shortcut's gradient is the one that came.
        dshortcut = None if y is None else torch.empty_like(x)
        _native().fastbd_batch_norm_backward(
            _at(gradient), _at(x), _at(y), *ctx.shape, *map(_at, (weight, bias, mean, rstd)), torch.get_num_threads(),
            _at(dx), _at(dshortcut), _at(dweight), _at(dbias),
        )  # fmt: skip
        of_shortcut = (gradient if dshortcut is None else dshortcut) if ctx.has_shortcut else None
        return dx, of_shortcut, None, None, dweight, dbias, None


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@cache
def _library() -> ctypes.CDLL | None:
    found = native.library("batchnorm")
    if found is not None:
        pointer, count, flag, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
        shape = [count, count, count, flag]
        forward, backward = found.fastbd_batch_norm, found.fastbd_batch_norm_backward
        forward.argtypes = [pointer, pointer, *shape, pointer, pointer, number, flag, *[pointer] * 4]
        backward.argtypes = [*[pointer] * 3, *shape, *[pointer] * 4, flag, *[pointer] * 4]
        forward.restype = backward.restype = None
    return found


def _native() -> ctypes.CDLL:
    found = _library()
    assert found is not None, "batch_norm() has asked"
    return found
