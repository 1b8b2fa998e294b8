"""Triton's interpreter, which runs kernels where there is no GPU: its bf16 mended, and several times as fast."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend_bfloat16() -> None:
    """The interpreter keeps bf16 as bits: tl.dot multiplies the bits, narrowing truncates. Widen and round instead."""
    builder = type(interpreter.interpreter_builder)
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def narrowed(values):
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    def mended(original):
        def cast(self, source, target, *rest):
            kinds = source.dtype.scalar, target.scalar
            if kinds == (tl.float32, tl.bfloat16):
                return interpreter.TensorHandle(narrowed(source.data).reshape(source.data.shape), tl.bfloat16)
            return widened(source) if kinds == (tl.bfloat16, tl.float32) else original(self, source, target, *rest)

        return cast

    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.cast_impl, builder.create_fp_to_fp = mended(cast), mended(convert)


def hasten() -> None:
    """Leave out what the interpreter makes again at each step of a kernel; what it computes stays the same."""
    _ignore_overflow()
    _patch_once()
    _remember_types()


def _ignore_overflow() -> None:
    """Every +, - and * of integers is done in 64 bits too, for an assertion that only a debugger's run looks at."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once() -> None:
    """Each launch, and each call of one kernel by another, puts the interpreted language in place of the compiled."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def _remember_types() -> None:
    """Types, and shapes of tensors, are few; they are made and checked anew for each value."""
    numpy_type, numpy_types = interpreter._get_np_dtype, {}
    make_block, blocks = tl.block_type.__init__, {}
    make_tensor, tensors = tl.tensor.__init__, {}

    def _get_np_dtype(kind):
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    def block(self, element_ty, shape):
        key = element_ty.name, *(getattr(side, "value", side) for side in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, None, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle)

    interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__ = _get_np_dtype, block, tensor
