"""Functions of ours as operators of PyTorch, which torch.compile takes as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def operator(name: str, is_gradient: bool = False) -> Callable[[Function], Function]:
    """Register a function that changes none of its arguments and returns none of them as torch.ops.fastbd.`name`.

    As torch.library.custom_op does it, whose operators load the whole compiler when they are first called, although
    eager code has no use for it: 2.5 s of a start, and 100 MB (findings/torch_eager_loads_compiler.sh). An operator
    that is the gradient of another has none itself.
    """

    def register(function: Function) -> Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"fastbd::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"fastbd::{name}", "default", function)
        if is_gradient:
            torch.library.register_autograd(f"fastbd::{name}", _refuse)
        return function

    return register


def _refuse(ctx, *_):
    raise RuntimeError("the second derivative is asked for, and there is none")
