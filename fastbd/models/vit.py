"""CLIP's vision transformer (Dosovitskiy et al. 2021, with a norm before the blocks)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbd.models.text import Transformer


class VisionTransformer(nn.Module):
    """Pixels [B, 3, image_size, image_size] -> embeddings [B, embed_dim]."""

    def __init__(
        self, image_size: int, patch: int, width: int, layers: int, heads: int, embed_dim: int, activation: str
    ):
        super().__init__()
        std = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn((image_size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj
