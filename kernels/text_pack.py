"""Captions packed one behind the other, without padding, and attention within each of them.

Padding to 77 tokens is 84 % of a text tower's work on CC3M. Packing is exact: a token sees only those before it in its
own caption, and all else in a transformer is done token by token.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbd.kernels import attention_native
from fastbd.kernels.operator import operator

TRITON = find_spec("triton") is not None
NATIVE = attention_native.library() is not None
WAYS = ("auto", "triton", "native", "reference")
END = 49_407  # the end token, CLIP's highest id


class PackedText(NamedTuple):
    """B captions: ids of their tokens and their places in the caption, int64 [T]; where each begins, int32 [B + 1].

    What lies behind the last start belongs to no caption: room that keeps T, and with it compiled shapes, the same.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor

    @property
    def ends(self) -> Tensor:
        """Places of the captions' last tokens [B]."""
        return self.starts[1:] - 1

    def attention(self, qkv: Tensor, heads: int) -> Tensor:
        return packed_attention(qkv, self.starts, heads)


def lengths_of(tokens: np.ndarray) -> np.ndarray:
    """Tokens of each row [B, L], its end token included. Zeros do not tell padding from text: token 0 is "!".

    A row without an end token has 1: CLIP reads it at the largest of its ids, its start token.
    """
    return (tokens == END).argmax(1) + 1


def pack(tokens: np.ndarray, room: int = 1) -> PackedText:
    """Rows of padded tokens, integers [B, L], up to their end tokens; T is the next multiple of `room`."""
    lengths = lengths_of(tokens)
    places = np.arange(tokens.shape[1])
    inside = places < lengths[:, None]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    packed = np.zeros((2, -(-int(starts[-1]) // room) * room), np.int64)
    packed[0, : starts[-1]] = tokens[inside]
    packed[1, : starts[-1]] = np.broadcast_to(places, inside.shape)[inside]
    ids, positions = torch.from_numpy(packed)
    return PackedText(ids, positions, torch.from_numpy(starts))


def room_for(lengths: np.ndarray, count: int) -> int:
    """Room that `count` texts of such lengths hardly ever exceed: once in 3 million times, for sums that are normal."""
    tokens = count * lengths.mean() + 5 * lengths.std() * math.sqrt(count)
    return -(-math.ceil(tokens) // 64) * 64


def packed_attention(qkv: Tensor, starts: Tensor, heads: int, way: str = "auto") -> Tensor:
    """Causal attention within each caption: qkv [T, 3 * width], starts int32 [B + 1] -> [T, width].

    The columns of qkv are queries, keys and values, each by heads. Tokens of no caption get zeros. ValueError for an
    unknown way, and for columns that the heads do not divide.
    """
    if qkv.shape[1] % (3 * heads):
        raise ValueError(f"{qkv.shape[1]} columns are no queries, keys and values of {heads} heads")
    if way not in WAYS:
        raise ValueError(f"way is one of {WAYS}, not {way!r}")
    if way == "auto":
        native = qkv.device.type == "cpu" and qkv.dtype != torch.float64 and NATIVE
        way = "triton" if qkv.is_cuda and TRITON else "native" if native else "reference"
    return torch.ops.fastbd.packed_attention(qkv, starts, heads, way)[0]


@operator("packed_attention")
def _attention(qkv: Tensor, starts: Tensor, heads: int, way: str) -> tuple[Tensor, Tensor]:
    """-> the output, and what the backward of a way needs beside it."""
    if way == "triton":
        from fastbd.kernels import text_pack_triton  # triton is loaded only where it is used

        return text_pack_triton.attention(qkv, starts, heads)
    if way == "native":
        return attention_native.attention(qkv, starts, heads), qkv.new_empty(0)
    padded, inside = _by_caption(qkv, starts, heads)
    with torch.autocast(qkv.device.type, enabled=False):
        query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    out = qkv.new_zeros(len(qkv), qkv.shape[1] // 3)
    out[: starts[-1]] = y.transpose(1, 2).flatten(2)[inside]
    return out, qkv.new_empty(0)


@torch.library.register_fake("fastbd::packed_attention")
def _(qkv, starts, heads, way):
    saved = qkv.new_empty(qkv.shape[0], heads, dtype=torch.float32) if way == "triton" else qkv.new_empty(0)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), saved


@operator("packed_attention_backward", is_gradient=True)
def _attention_backward(
    gradient: Tensor, qkv: Tensor, starts: Tensor, out: Tensor, saved: Tensor, heads: int, way: str
) -> Tensor:
    if way == "triton":
        from fastbd.kernels import text_pack_triton

        return text_pack_triton.attention_backward(gradient, qkv, starts, out, saved, heads)
    if way == "native":
        return attention_native.attention_backward(gradient, qkv, starts, heads)
    wide = torch.promote_types(qkv.dtype, torch.float32)  # large scores in bf16 would be wrong by factors of e
    padded, inside = _by_caption(qkv.to(wide), starts, heads)
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, L, d] each
    of_y = padded.new_zeros(*inside.shape, gradient.shape[1])
    of_y[inside] = gradient[: starts[-1]].to(wide)
    of_y = of_y.unflatten(2, (heads, -1)).transpose(1, 2)
    scale, length = query.shape[-1] ** -0.5, query.shape[2]
    ahead = torch.ones(length, length, dtype=torch.bool, device=qkv.device).triu(1)
    with torch.autocast(qkv.device.type, enabled=False):
        p = (query @ key.mT * scale).masked_fill_(ahead, -torch.inf).softmax(-1)
        of_p = of_y @ value.mT
        of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * scale
        of_padded = torch.stack([of_scores @ key, of_scores.mT @ query, p.mT @ of_y])
    of_qkv = qkv.new_zeros(qkv.shape)
    of_qkv[: starts[-1]] = of_padded.permute(1, 3, 0, 2, 4)[inside].flatten(1).to(qkv.dtype)
    return of_qkv


@torch.library.register_fake("fastbd::packed_attention_backward")
def _(gradient, qkv, starts, out, saved, heads, way):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, starts, *ctx.settings = inputs
    ctx.save_for_backward(qkv, starts, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient, _):
    if gradient is None:  # of an output that no loss has used
        return None, None, None, None
    return torch.ops.fastbd.packed_attention_backward(gradient, *ctx.saved_tensors, *ctx.settings), None, None, None


torch.library.register_autograd("fastbd::packed_attention", _backward, setup_context=_save)


def _by_caption(qkv: Tensor, starts: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Captions as rows [B, L, 3, heads, d] of the longest's length L, and which places are theirs [B, L].

    Behind a caption's end are tokens of others; under the causal mask none of its own sees them.
    """
    lengths, places = starts.diff(), torch.arange(int(starts.diff().max()), device=qkv.device)
    rows = (starts[:-1, None] + places).clamp_(max=len(qkv) - 1)
    return qkv.unflatten(1, (3, heads, -1))[rows], places < lengths[:, None]
