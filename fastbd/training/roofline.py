"""The least time that a training step can take on a machine: an op-by-op roofline (Williams et al. 2009).

An op takes the longer of FLOPs / matmul rate and bytes / bandwidth, and a step the sum over its ops. An op reads its
inputs from memory once and writes its outputs once. A network is cut into ops as torch.compile does it: every layer is
one, but for elementwise layers, which merge with the norm beside them.

Left out: reading weights and writing their gradients (8 bytes a parameter in bf16: 1 % of RN50's step of 128 pairs);
looking up tokens, adding positions and the loss (below 1 %).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbd.models import CLIP
from fastbd.models.resnet import AttentionPool
from fastbd.models.text import Transformer
from fastbd.models.vit import VisionTransformer

ADAMW_BYTES = 28  # a parameter, in float32: reads it, its gradient and two moments, writes all but the gradient
FORMATS = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (8192,)}  # of the matrices
ENOUGH = 0.01  # seconds of a product, from which a larger one tells nothing more
COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes: far more than a cache holds
TRIES = 4


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a large matmul; bytes/s that a copy reads and writes."""

    matmul: float
    bandwidth: float


class Op(NamedTuple):
    """The elements that an op reads and writes, and its FLOPs."""

    elements: float
    flops: float = 0


def step_seconds(
    model: CLIP, rates: Rates, *, batch: int, views: int, texts: int, tokens: float, precision: str
) -> float:
    """The least seconds of a training step.

    A pair is `views` images and `texts` captions of `tokens` tokens on average, without padding;
    `precision`: fp32, tf32 or bf16.
    """
    towers = [(views, list(image_ops(model.visual, model.image_size))), (texts, list(text_ops(model, tokens)))]
    size = 2 if precision == "bf16" else 4
    update = ADAMW_BYTES * sum(p.numel() for p in model.parameters()) / rates.bandwidth
    pair = sum(
        count * max(op.flops / rates.matmul, size * op.elements / rates.bandwidth)
        for count, ops in towers
        for op in ops
    )
    return batch * pair + update


def image_ops(visual: nn.Module, image_size: int) -> Iterator[Op]:
    """Forward and backward of one image through an image tower."""
    if not isinstance(visual, VisionTransformer):
        yield from _convolutional(visual, 3, image_size)
        return
    width, side = yield from _convolutional(visual.conv1, 3, image_size)
    positions = side**2 + 1  # the class token's too
    yield _layer_norm(positions * width)
    yield from _blocks(visual.transformer, width, positions, attended=positions**2)
    yield _layer_norm(width)
    yield from _linear(1, *visual.proj.shape)


def text_ops(model: CLIP, tokens: float) -> Iterator[Op]:
    """Forward and backward of one caption; a token attends to itself and to those before it."""
    width, embed_dim = model.text_projection.shape
    yield from _blocks(model.transformer, width, tokens, attended=tokens * (tokens + 1) / 2)
    yield _layer_norm(width)
    yield from _linear(1, width, embed_dim)


def _convolutional(module: nn.Module, channels: int, side: int) -> Iterator[Op]:
    """Ops of a module that gets [channels, side, side]; returns channels and side of what it gives."""
    x = channels * side**2
    match module:
        case nn.Conv2d(kernel_size=(kernel, _), stride=(stride, _), padding=(padding, _)):
            side = (side + 2 * padding - kernel) // stride + 1
            y = module.out_channels * side**2
            passes = 2 if channels == 3 else 3  # forward, gradient of the weight, and of inputs that are not pixels
            yield from passes * [Op(x + y, 2 * y * channels * kernel**2)]
            return module.out_channels, side
        case _BatchNorm():  # statistics 1, normalise 2; backward: sums 2, gradient 3
            yield Op(8 * x)
        case nn.AvgPool2d(kernel_size=int(stride)):
            side //= stride
            yield Op(2 * (x + channels * side**2))
        case nn.Linear():  # of the mean over all positions
            yield Op(2 * x)
            yield from _linear(1, channels, module.out_features)
        case AttentionPool():
            yield from _attention_pool(module)
        case nn.Identity():
            pass
        case _:
            return (yield from _in_turn(module, channels, side))
    return channels, side


def _in_turn(module: nn.Module, channels: int, side: int) -> Iterator[Op]:
    """Children run in the order in which they are registered, but for a block's shortcut."""
    inputs, children = (channels, side), dict(module.named_children())
    if not children:
        raise TypeError(f"the work of a {type(module).__name__} is unknown here")
    shortcut = children.pop("downsample", None)
    for child in children.values():
        channels, side = yield from _convolutional(child, channels, side)
    if shortcut is not None:
        yield from _convolutional(shortcut, *inputs)
    if hasattr(module, "downsample"):
        # For the sum with the shortcut the norm before reads that too, forward, and in both passes backward the second
        # gradient and the output, whose sign is the ReLU's mask.
        yield Op(5 * channels * side**2)
    return channels, side


def _attention_pool(pool: AttentionPool) -> Iterator[Op]:
    """The one query, what its scores are the inputs' products with, their means, and the value of these."""
    positions, width = pool.positional_embedding.shape
    by_head = pool.heads * width
    yield from _linear(1, width, width)
    yield from 3 * [Op(0, 2 * width)]  # the keys' bias
    yield from 2 * 3 * [Op(width + by_head, 2 * width**2)]  # the keys' matrix, and the values'
    yield from 2 * 3 * [Op(positions * width + by_head, 2 * positions * by_head)]  # the scores, and the means
    yield from _linear(1, width, pool.c_proj.out_features)


def _blocks(transformer: Transformer, width: int, tokens: float, attended: float) -> Iterator[Op]:
    """A transformer's blocks; `attended`: pairs of query and key that count."""
    x = tokens * width
    for _ in transformer.resblocks:
        for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            yield from _linear(tokens, inputs, outputs)
        yield from _attention(width, tokens, tokens, attended)
        yield Op(5 * 4 * x)  # GELU: 2 forward, 3 backward
        # For each sum the norm behind reads the other summand and writes the sum, and reads the second gradient.
        yield from 2 * [_layer_norm(x), Op(3 * x)]


def _linear(rows: float, inputs: int, outputs: int) -> list[Op]:
    """Forward, gradient of the input, gradient of the weight."""
    return 3 * [Op(rows * (inputs + outputs), 2 * rows * inputs * outputs)]


def _attention(width: int, queries: float, keys: float, attended: float) -> list[Op]:
    """Scores stay on the chip (FlashAttention, arXiv 2205.14135); that they are computed twice is not counted."""
    x = (queries + keys) * width
    return [Op(2 * x, 4 * attended * width), Op(4 * x, 8 * attended * width)]


def _layer_norm(x: float) -> Op:
    """A row stays on the chip: 2 forward, 3 backward."""
    return Op(5 * x)


def measure_rates(device: torch.device, precision: str) -> Rates:
    """What `device` reaches at fp32, tf32 or bf16: half a second of work."""
    return Rates(matmul_rate(device, precision), copy_rate(device))


def matmul_rate(device: torch.device, number_format: str) -> float:
    """FLOP/s, on random data: zeros multiply faster than numbers. A run's random state stays as it is."""
    before, rate = torch.get_float32_matmul_precision(), 0.0
    torch.set_float32_matmul_precision("high" if number_format == "tf32" else "highest")
    try:
        for side in SIDES[device.type]:
            side //= 2 if number_format == "fp64" else 1  # few GPUs are fast at fp64
            drawn = torch.Generator(device).manual_seed(0)
            a, b = (torch.randn(side, side, device=device, generator=drawn).to(FORMATS[number_format]) for _ in "ab")
            seconds = _shortest(device, lambda a=a, b=b: a @ b)
            rate = max(rate, 2 * side**3 / seconds)
            if seconds > ENOUGH:
                break
        return rate
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written."""
    source = torch.full((COPIED[device.type],), 7, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _shortest(device, lambda: target.copy_(source))


def _shortest(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of the shortest of TRIES calls in a row, after one to warm up; on a GPU by its own clock."""
    cuda = device.type == "cuda"
    marks = []
    for _ in range(1 + TRIES):
        call()
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
    if not cuda:
        return min(after - before for before, after in pairwise(marks))
    marks[-1].synchronize()
    return min(before.elapsed_time(after) for before, after in pairwise(marks)) / 1e3
