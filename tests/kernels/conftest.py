"""Without a GPU the Triton kernels run in its interpreter, whose bf16 needs mending."""

from __future__ import annotations

import os

import numpy as np


def _mend_bfloat16() -> None:
    """The interpreter keeps bf16 as bits: tl.dot multiplies the bits, narrowing truncates. Widen and round instead."""
    import triton.language as tl
    from triton.runtime import interpreter

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


if os.environ.get("TRITON_INTERPRET") == "1":
    _mend_bfloat16()
