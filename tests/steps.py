"""Batches and steps that several tests share."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastbd.base.dist import World
from fastbd.base.learning_rates import learning_rates
from fastbd.data.loader import Batch
from fastbd.kernels.text_pack import pack
from fastbd.methods.method import Method
from fastbd.methods.objectives import Objective
from fastbd.models.clip import ModelSpec
from fastbd.training.optim import make_optimizer
from fastbd.training.step import Step

ONE = World(0, 1, torch.device("cpu"))
MMCL, BOTH = Objective(), Objective(mmcl_weight=0.7, ssl_weight=1.3)
EVERY = Objective(mmcl_weight=0.7, ssl_weight=1.3, siglip_weight=0.4, cyclic_weight=0.2)
BATCH = 16
RATES = learning_rates(0.01, warmup=2, total=8)
# The fewest layers that have all kinds in them, as compiling takes seconds for each; the second has no batch norm.
SHALLOW_RN = ModelSpec(32, 32, 4, (1,), None, 32, 1, 2, small=True)
SHALLOW_VIT = ModelSpec(32, 32, 64, (1,), 16, 32, 1, 2)
ROOM = 512  # tokens, for which any batch has room: so all have one shape


def captions_of(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = np.zeros((count, 77), np.uint16)
    for row, length in enumerate(rng.integers(3, 14, count)):
        tokens[row, :length] = rng.integers(1, 49_000, length)
        tokens[row, 0], tokens[row, length - 1] = 49_406, 49_407
    return tokens


def batch_of(views: int, seed: int = 0, parts: int = 1, room: int = 1, own: slice = slice(BATCH)) -> Batch:
    """BATCH random pairs, or the own ones of them; with two views two captions each."""
    noise = torch.Generator().manual_seed(seed)
    pixels = [torch.randn(BATCH, 3, 32, 32, generator=noise)[own] for _ in range(views)]
    captions = [captions_of(BATCH, 10 * seed + k)[own] for k in range(views)]
    texts = zip(*(np.split(view, parts) for view in captions), strict=True)
    views = tuple(x.contiguous(memory_format=torch.channels_last) for x in pixels)
    return Batch(torch.arange(BATCH)[own], views, tuple(pack(np.concatenate(text), room) for text in texts))


def make_step(model, objective: Objective | Method, world: World = ONE, **settings) -> Step:
    """Adam hides the scale of a gradient and blows up rounding; with a large eps its steps follow the gradient."""
    method = objective if isinstance(objective, Method) else Method(objective)
    optimizer = make_optimizer(model.train(), method, lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), eps=0.01)
    return Step(model, method, optimizer, RATES, world=world, **{"precision": "fp32"} | settings)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten._unique2.default,
        ):
            self.seen.append(function)
        return function(*arguments, **keywords or {})


def counting(patch: pytest.MonkeyPatch, backend: str = "aot_eager") -> CompileCounterWithBackend:
    """Have torch.compile count what it compiles from here on, for a backend; the usual one needs no C++ compiler."""
    torch._dynamo.reset()  # else a function that has been compiled often in this process would be no more
    counter = CompileCounterWithBackend(backend)
    patch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter
