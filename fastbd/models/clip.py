"""The dual encoder (Radford et al. 2021, arXiv 2103.00020) and the table of its sizes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbd.base.errors import UserError
from fastbd.config.cards import load
from fastbd.config.imports import check_like
from fastbd.kernels.text_pack import PackedText
from fastbd.kernels.text_tree import TextTree
from fastbd.models.resnet import ModifiedResNet, SmallResNet
from fastbd.models.text import Transformer, init_text_transformer
from fastbd.models.vit import VisionTransformer

CONTEXT = 77
VOCABULARY = 49_408
_handed_out: WeakSet[nn.Module] = WeakSet()  # of models from outside, and with weights


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a dual encoder, and the activation of its transformers: one of ACTIVATIONS.

    A ResNet has no `patch`, and its `vision_layers` are the blocks of its four stages; `small`: that for small images.
    """

    image_size: int
    embed_dim: int
    vision_width: int
    vision_layers: tuple[int, ...]
    patch: int | None
    text_width: int
    text_layers: int
    text_heads: int
    small: bool = False
    activation: str = "quickgelu"


class CLIP(nn.Module):
    """Embeddings are raw: normalising them is the objective's part. Parameter names and initialisation are OpenAI's."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec, self.image_size, self.embed_dim = spec, spec.image_size, spec.embed_dim
        self.visual = _vision_tower(spec)
        self.transformer = Transformer(spec.text_width, spec.text_layers, spec.text_heads, spec.activation)
        self.token_embedding = nn.Embedding(VOCABULARY, spec.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT, spec.text_width))
        self.ln_final = nn.LayerNorm(spec.text_width)
        self.text_projection = nn.Parameter(torch.empty(spec.text_width, spec.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        init_text_transformer(self.transformer)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=spec.text_width**-0.5)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, image_size, image_size] -> [B, embed_dim]."""
        return self.visual(pixels)

    def encode_text(self, text: PackedText | TextTree) -> Tensor:
        """B captions, packed or as a tree -> [B, embed_dim]."""
        x = self.token_embedding(text.tokens) + F.embedding(text.positions, self.positional_embedding)
        ends = self.transformer(x, text).index_select(0, text.ends)
        return self.ln_final(ends) @ self.text_projection

    def forward(self, pixels: Tensor, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        """-> embeddings of images and of captions, [B, embed_dim] each, and the log of the logit scale []."""
        # A copy: DDP loses count of a parameter that comes out as it is, and the optimizer would change it in place.
        return self.encode_image(pixels), self.encode_text(text), self.logit_scale.clone()


def tower_of(parameter: str) -> str:
    """The tower, image or text, that a parameter of CLIP belongs to; "both" for the temperature."""
    return "both" if parameter == "logit_scale" else "image" if parameter.startswith("visual.") else "text"


def _vision_tower(spec: ModelSpec) -> nn.Module:
    if spec.small:
        return SmallResNet(spec.vision_layers, spec.vision_width, spec.embed_dim)
    if spec.patch is None:
        return ModifiedResNet(spec.image_size, spec.vision_layers, spec.vision_width, spec.embed_dim)
    (layers,) = spec.vision_layers
    heads = spec.vision_width // 64
    return VisionTransformer(
        spec.image_size, spec.patch, spec.vision_width, layers, heads, spec.embed_dim, spec.activation
    )


def create(name: str, seed: int | None, activation: str = "quickgelu") -> CLIP:
    """The model of that name with fresh weights. UserError where one from outside is no CLIP, or not new.

    The same for a seed, also from outside, where it is drawn from the global random state of torch, NumPy or Python.
    """
    if name in MODELS:
        return fresh(replace(MODELS[name], activation=activation), seed)
    build = load("model", name)
    with _seeded(seed):
        model = build(activation)
    if not isinstance(model, CLIP):
        raise UserError(f"the model {name} makes a {type(model).__name__}: it must return a CLIP of fastbd.models.")
    if not isinstance(getattr(model, "spec", None), ModelSpec) or not hasattr(model, "image_size"):
        raise UserError(f"the model {name} has no spec: let its __init__ call super().__init__(ModelSpec(...)).")
    if kinds := {str(weight.dtype) for weight in model.parameters()} - {"torch.float32"}:
        raise UserError(f"the model {name} has weights of {min(kinds)}: let them be torch.float32.")
    for asked in ("encode_image", "encode_text", "forward"):
        check_like(f"{asked} of the model {name}", getattr(model, asked), getattr(CLIP, asked))
    parts = [part for part in model.modules() if next(part.parameters(), None) is not None]
    if not _handed_out.isdisjoint(parts):
        raise UserError(f"the model {name} has weights that it has given before: it must make new ones at each call.")
    _handed_out.update(parts)
    return model


def create_like(about: Mapping[str, Any], seed: int | None) -> CLIP:
    """The model that a checkpoint's `about`, or config.json, records, with fresh weights."""
    return create(about["model"], seed, about.get("activation", "quickgelu"))  # not recorded up to version 0.1.0


def fresh(spec: ModelSpec, seed: int | None) -> CLIP:
    """A model with fresh weights, on the CPU: the same for a seed, whatever was drawn before.

    The global random state stays as it was; only seed None draws from it.
    """
    with _seeded(seed):
        return CLIP(spec)


def fresh_like(model: CLIP, seed: int) -> CLIP:
    """A model of the same class and sizes with fresh weights, on the CPU, as `fresh` makes it."""
    with _seeded(seed):
        return type(model)(model.spec)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed the global random states of torch, NumPy and Python for the block; they are as before after it."""
    if seed is None:
        yield
        return
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def image_size_of(name: str) -> int:
    """The side, in px, of the images that the model of that name takes."""
    return MODELS[name].image_size if name in MODELS else create(name, 0).image_size


MODELS = {
    "demo": ModelSpec(64, 128, 16, (1, 1, 1, 1), None, 64, 2, 2),
    "small-rn10": ModelSpec(32, 128, 32, (1, 1, 1, 1), None, 64, 2, 2, small=True),
    "rn50": ModelSpec(224, 1024, 64, (3, 4, 6, 3), None, 512, 12, 8),
    "rn101": ModelSpec(224, 512, 64, (3, 4, 23, 3), None, 512, 12, 8),
    "rn50x4": ModelSpec(288, 640, 80, (4, 6, 10, 6), None, 640, 12, 10),
    "vit-b-32": ModelSpec(224, 512, 768, (12,), 32, 512, 12, 8),
    "vit-b-16": ModelSpec(224, 512, 768, (12,), 16, 512, 12, 8),
    "vit-l-14": ModelSpec(224, 768, 1024, (24,), 14, 768, 12, 12),
    "vit-l-14-336": ModelSpec(336, 768, 1024, (24,), 14, 768, 12, 12),
    "tiny-rn": ModelSpec(32, 32, 4, (1, 1, 1, 1), None, 32, 1, 2),
    "tiny-vit": ModelSpec(32, 32, 64, (2,), 8, 32, 1, 2),
}
