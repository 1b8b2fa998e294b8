"""The text tower, forward and backward: always 77 tokens, as the published programs do, against trimmed and packed.

Its attention by itself too: the kernel for packed captions against PyTorch's, which pads them or is told their ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.captions import captions
from bench.case import Call, Case, Cases, Output, Provider, Unavailable
from bench.published_step import gradient, of_kind, text_tower, trimmed
from fastbd.kernels.text_pack import PackedText, lengths_of, pack, packed_attention
from fastbd.models import CLIP, create
from fastbd.models.clip import CONTEXT
from fastbd.models.precision import autocast
from fastbd.models.text import Attention
from fastbd.training.roofline import Rates, step_seconds

LARGE = {"cpu": ("rn50", 8, "fp32"), "cuda": ("rn50", 256, "bf16")}  # model, captions, precision
WATCHED = (
    "token_embedding.weight",
    "positional_embedding",
    "text_projection",
    "transformer.resblocks.0.attn.in_proj_weight",
)
TOLERANCE = {"fp32": {"": 1e-4}, "bf16": {"": 8e-2}}  # sums in another order
ATTENTION = {"fp32": {"": 1e-5}, "bf16": {"": 1e-2}}  # of outputs and gradients that are rounded once


def cases(device: str, quick: bool) -> Cases:
    """Attention alone, then the whole tower: that of RN50 and ViT-B/32 (width 512, 12 layers), and the demo's."""
    large = LARGE[device]
    towers = [large, ("demo", 128, "fp32")]
    if device == "cuda" and not quick:
        towers.append(("rn50", 256, "fp32"))
    for make, kind, sizes in ((attention_case, "attention", [large]), (text_case, "text", towers)):
        for model, count, precision in sizes:
            name = f"{kind} {model} B={count} {precision}"
            yield name, partial(make, name, model, count, precision, device)


# ---- the whole tower ----


def text_case(name: str, model_name: str, count: int, precision: str, device: str) -> Case:
    """`count` captions as long as CC3M's."""
    model, tokens = create(model_name, 0).to(device), captions(count, seed=0)
    padded = torch.from_numpy(tokens).to(device)
    packed = PackedText(*(x.to(device) for x in pack(tokens)))
    ways = {
        "77 tokens": partial(text_tower, model, padded),
        "trimmed": partial(text_tower, model, trimmed(padded)[0]),
        "packed": partial(model.encode_text, packed),
    }
    return Case(
        name=name,
        unit="captions/s",
        units=count,
        device=device,
        providers={
            way: Provider(lambda e=embed: partial(gradients, model, precision, e), TOLERANCE[precision], ours=True)
            for way, embed in ways.items()
        },
        least=partial(least, model, lengths_of(tokens).mean().item(), count),
        rate=precision,
    )


def gradients(model: CLIP, precision: str, embed: Callable[[], Tensor]) -> Output:
    model.zero_grad()
    with autocast(precision, model.logit_scale.device):
        embedded = embed()
    embedded.float().square().mean().backward()
    return {"embedded": embedded.detach(), **{name: gradient(model.get_parameter(name)) for name in WATCHED}}


def least(model: CLIP, tokens: float, count: int, rates: Rates, precision: str) -> float:
    """Seconds by the roofline: of a step without images, and without the update that none takes here."""

    def seconds(batch: int) -> float:
        return step_seconds(model, rates, batch=batch, views=0, texts=1, tokens=tokens, precision=precision)

    return seconds(count) - seconds(0)


# ---- attention ----


@dataclass(frozen=True)
class Captions:
    """qkv [T, 3 * width] of packed captions, and where each begins, int32 [B + 1], on the device and here."""

    qkv: Tensor
    starts: Tensor
    lengths: list[int]
    heads: int

    def padded(self, length: int) -> Tensor:
        """[B, length, 3 * width], zeros behind each caption."""
        rows = [F.pad(x, (0, 0, 0, length - len(x))) for x in self.qkv.detach().split(self.lengths)]
        return torch.stack(rows).requires_grad_()

    def packed(self, output: Output) -> Output:
        """The tensors [B, L, ...] of a padded way as [T, ...]."""
        return {
            name: torch.cat([row[:n] for row, n in zip(x, self.lengths, strict=True)]) for name, x in output.items()
        }


def attention_case(name: str, model_name: str, count: int, precision: str, device: str) -> Case:
    """Causal attention of `count` captions as long as CC3M's: output, and gradient of qkv for a given one of it."""
    block, lengths = next(of_kind(Attention, create(model_name, 0).transformer)), lengths_of(captions(count, seed=0))
    heads, width = block.heads, block.out_proj.in_features
    noise = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    qkv = torch.randn(int(lengths.sum()), 3 * width, generator=noise, device=device).to(dtype).requires_grad_()
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
    data = Captions(qkv, starts, lengths.tolist(), heads)
    gradient = torch.randn(len(qkv), width, generator=noise, device=device).to(dtype)

    def provider(build: Callable[[], Call], **about) -> Provider:
        return Provider(build, ATTENTION[precision], **about)

    def padded(length: int) -> Provider:
        of_output = replace(data, qkv=gradient).padded(length).detach()
        build = partial(attended, lambda x: by_rows(x, heads), data.padded(length), of_output)
        return provider(lambda: build, compared=data.packed)

    def ours(way: str) -> Call:
        if way == "triton" and device == "cpu":
            raise Unavailable("needs a GPU")
        return partial(attended, lambda x: packed_attention(x, starts, heads, way), qkv, gradient)

    def truth() -> Output:
        wide = replace(data, qkv=qkv.detach().double())
        of_output = replace(data, qkv=gradient.double()).padded(CONTEXT).detach()
        return data.packed(attended(lambda x: by_rows(x, heads), wide.padded(CONTEXT), of_output))

    return Case(
        name=name,
        unit="captions/s",
        units=count,
        device=device,
        providers={
            "PyTorch, 77 tokens": padded(CONTEXT),
            "fastbd": provider(partial(ours, "triton"), ours=True),
            "PyTorch, trimmed": padded(max(data.lengths)),
            "PyTorch, varlen_attn": provider(partial(by_ends, data, gradient)),
            "fastbd reference": provider(partial(ours, "reference"), ours=True),
        },
        truth=truth,
        bytes=float(qkv.element_size() * width * len(qkv) * (3 + 1 + 3 + 1 + 1 + 3)),  # forward, then backward
        flops=4.0 * 3.5 * width * sum(n * (n + 1) / 2 for n in data.lengths),  # backward: five products for two
        rate=precision,
    )


def attended(attention: Callable[[Tensor], Tensor], qkv: Tensor, gradient: Tensor) -> Output:
    out = attention(qkv)
    return {"output": out.detach(), "qkv": torch.autograd.grad(out, qkv, gradient)[0]}


def by_rows(qkv: Tensor, heads: int) -> Tensor:
    """PyTorch's attention of padded captions [B, L, 3 * width] -> [B, L, width]."""
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def by_ends(data: Captions, gradient: Tensor) -> Call:
    """PyTorch's attention of packed captions. Unavailable where it has none: without a GPU, and in float32."""
    if not data.qkv.is_cuda or data.qkv.dtype == torch.float32:
        raise Unavailable("needs a GPU and bf16")
    from torch.nn.attention.varlen import varlen_attn

    longest = max(data.lengths)

    def attention(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(1, (3, data.heads, -1)).unbind(1)
        ends = data.starts, data.starts, longest, longest
        out = varlen_attn(query, key, value, *ends, window_size=(-1, 0))
        assert isinstance(out, Tensor)  # it gives more only where that is asked for
        return out.flatten(1)

    return partial(attended, attention, data.qkv, gradient)
