"""The transformer of CLIP's text tower, shared with the vision transformer (Radford et al. 2021, arXiv 2103.00020).

Parameter names are those of OpenAI's published weights, so that these load without a table of names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbd.kernels.text_pack import PackedText
from fastbd.kernels.text_tree import TextTree
from fastbd.models.blocks import Blocks


class Attention(nn.Module):
    """Multi-head self-attention; parameters as in torch.nn.MultiheadAttention.

    [B, L, width] -> the same; or the tokens of a text [T, width] -> the same, causal within each caption.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, text: PackedText | TextTree | None = None) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if text is not None:
            return self.out_proj(text.attention(qkv, self.heads))
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)  # [B, heads, L, width / heads] each
        return self.out_proj(y.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}
"""OpenAI's models have QuickGELU, most of open_clip's the exact GELU; weights of either fit both."""


class MLP(nn.Module):
    def __init__(self, width: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, text: PackedText | TextTree | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), text)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Pre-norm transformer on [B, L, width], or causal on the tokens of a text [T, width]; one of ACTIVATIONS."""

    def __init__(self, width: int, layers: int, heads: int, activation: str):
        super().__init__()
        self.resblocks = Blocks(*(Block(width, heads, activation) for _ in range(layers)))

    def forward(self, x: Tensor, text: PackedText | TextTree | None = None) -> Tensor:
        return self.resblocks(x, text)


def init_text_transformer(transformer: Transformer) -> None:
    """OpenAI's initialisation: residual branches shrink with depth, as in GPT-2. Vision keeps PyTorch's defaults."""
    for block in transformer.resblocks:
        assert isinstance(block, Block), "a Transformer has no others"
        width = block.ln_1.normalized_shape[0]
        residual = (2 * width * len(transformer.resblocks)) ** -0.5
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=residual)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=residual)
