"""CLIP's modified ResNet (Radford et al. 2021, section 2.4): three-conv stem, pooled strides, attention pool.

And a ResNet for small images, whose first stages still see them: the modified one has 8 x 8 positions left of 32 px.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbd.models.batchnorm import BatchNorm
from fastbd.models.blocks import AvgPool, Blocks


class Conv1x1(nn.Conv2d):
    """Convolution without a kernel: [N, inputs, H, W] -> [N, outputs, H, W], without a bias until it is folded.

    With the channels last it is a matrix product, whose gradients take two thirds of a convolution's time on a CPU.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if not self._is_product(input):
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def _is_product(self, x: Tensor) -> bool:
        eager_on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        return eager_on_cpu and x.is_contiguous(memory_format=torch.channels_last)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; a stride is an average pool after the second one, and on the shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = Conv1x1(inputs, planes)
        self.bn1 = BatchNorm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(planes)
        self.avgpool = AvgPool(stride) if stride > 1 else None
        self.conv3 = Conv1x1(planes, 4 * planes)
        self.bn3 = BatchNorm(4 * planes)
        self.downsample = None
        if stride > 1 or inputs != 4 * planes:
            self.downsample = nn.Sequential()
            if stride > 1:
                self.downsample.add_module("-1", AvgPool(stride))
            self.downsample.add_module("0", Conv1x1(inputs, 4 * planes))
            self.downsample.add_module("1", BatchNorm(4 * planes))
        nn.init.zeros_(self.bn3.weight)  # the block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True, pool=self.avgpool)
        return self.bn3(self.conv3(y), shortcut, relu=True)


class AttentionPool(nn.Module):
    """Attention with one query, the mean of all positions: [B, width, side, side] -> [B, embed_dim]."""

    def __init__(self, side: int, width: int, heads: int, embed_dim: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side * side + 1, width) * width**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Keys and values are made for no position: with one query, q . (K x) = (K' q) . x, and the mean of the values
        is the value of the mean. For 50 positions that is a sixth of the work.
        """
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        query = self._by_heads(self.q_proj(x[:, 0]))
        key, value = (y.weight.unflatten(0, (self.heads, -1)) for y in (self.k_proj, self.v_proj))
        by_input = (query @ key).transpose(0, 1)  # [B, heads, width], with which the inputs' products are the scores
        by_bias = (query @ self._by_heads(self.k_proj.bias)[..., None]).transpose(0, 1)  # alike for all positions
        scores = by_input @ x.mT + by_bias
        mean = (scores * query.shape[-1] ** -0.5).softmax(-1) @ x  # [B, heads, width]
        y = (mean.transpose(0, 1) @ value.mT).transpose(0, 1).flatten(1)
        return self.c_proj(y + self.v_proj.bias)

    def _by_heads(self, x: Tensor) -> Tensor:
        """[..., width] -> [heads, ..., width / heads]"""
        return x.unflatten(-1, (self.heads, -1)).movedim(-2, 0)


class ModifiedResNet(nn.Module):
    """Pixels [B, 3, image_size, image_size] -> embeddings [B, embed_dim]; `layers`: blocks of the four stages."""

    layer1: Blocks
    layer2: Blocks
    layer3: Blocks
    layer4: Blocks

    def __init__(self, image_size: int, layers: tuple[int, ...], width: int, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = BatchNorm(width)
        self.avgpool = AvgPool(2)
        for stage, blocks in enumerate(layers):
            planes = width << stage
            inputs = width if stage == 0 else 2 * planes
            first = Bottleneck(inputs, planes, stride=1 if stage == 0 else 2)
            rest = (Bottleneck(4 * planes, planes, stride=1) for _ in range(blocks - 1))
            self.add_module(f"layer{stage + 1}", Blocks(first, *rest))
        self.attnpool = AttentionPool(image_size // 32, 32 * width, width // 2, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x), relu=True)
        x = self.bn2(self.conv2(x), relu=True)
        x = self.bn3(self.conv3(x), relu=True, pool=self.avgpool)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (He et al. 2016, arXiv 1512.03385, section 3.3); the shortcut is pooled where it shrinks."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(planes)
        self.downsample = None
        if stride > 1 or inputs != planes:
            convolution = Conv1x1(inputs, planes)
            self.downsample = nn.Sequential(AvgPool(stride), convolution, BatchNorm(planes))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(y), shortcut, relu=True)


class SmallResNet(nn.Module):
    """Pixels [B, 3, H, W] -> embeddings [B, embed_dim]: a stem that keeps the size, `layers` blocks a stage, mean.

    Every stage but the last halves the size; every stage but the first doubles the width.
    """

    def __init__(self, layers: tuple[int, ...], width: int, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = BatchNorm(width)
        self.stages = Blocks()
        inputs = width
        for stage, blocks in enumerate(layers):
            planes = width << stage
            for block in range(blocks):
                stride = 2 if block == 0 and stage < len(layers) - 1 else 1
                self.stages.append(BasicBlock(inputs, planes, stride))
                inputs = planes
        self.projection = nn.Linear(inputs, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.bn1(self.conv1(x), relu=True))
        return self.projection(x.mean((2, 3)))
