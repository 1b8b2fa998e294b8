"""What is compared: each entry builds its inputs and says which ways do the same work."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastbd import draws
from fastbd.data.decode import open_decoder
from fastbd.data.demo import SHAPES, picture
from fastbd.data.tokenizer import longest, tokenize
from fastbd.kernels.augment import N_DRAWS, auto_augment, draw_auto_augment
from fastbd.models import create


@dataclass(frozen=True)
class Comparison:
    """`ways` do the same `units` of work; equal() checks that before anything is timed."""

    unit: str
    units: int
    ways: dict[str, Callable[[], object]]
    equal: Callable[[], bool]


def demo_pictures(n: int) -> tuple[list[np.ndarray], list[str]]:
    """JPEG files and captions of n demo pictures."""
    things, files, captions = list(SHAPES), [], []
    for i in range(n):
        image, caption = picture(0, i, things[i % len(things)])
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
        captions.append(caption)
    return files, captions


def text_tower() -> Comparison:
    """Text tower forward and backward: all 77 tokens, as published programs do, against trimmed captions."""
    model = create("demo", 0)
    padded = torch.from_numpy(tokenize(demo_pictures(128)[1]).astype(np.int64))
    trimmed = padded[:, : longest(padded.numpy())]

    def gradients(tokens: Tensor) -> list[Tensor]:
        model.zero_grad()
        embedded = model.encode_text(tokens)
        embedded.square().mean().backward()
        return [embedded.detach(), model.token_embedding.weight.grad, model.text_projection.grad]

    def equal() -> bool:
        ways = [[t.clone() for t in gradients(tokens)] for tokens in (padded, trimmed)]
        # Another order of sums: a rounding of the largest value is allowed anywhere.
        return all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(*ways, strict=True))

    ways = {"77 tokens": lambda: gradients(padded), "trimmed": lambda: gradients(trimmed)}
    return Comparison("captions/s", len(padded), ways, equal)


def two_views() -> Comparison:
    """JPEG files to a plain and an augmented view: decoded for each, as published programs do, against decoded once."""
    files, _ = demo_pictures(256)
    decoder = open_decoder("pil", 0, "cpu")
    crop = np.zeros(len(files), bool)
    params = draw_auto_augment(draws.uniform(0, "bench", np.arange(len(files)), N_DRAWS))

    def twice() -> tuple[Tensor, Tensor]:
        plain = torch.from_numpy(decoder(files, 64, crop))
        return plain, auto_augment(torch.from_numpy(decoder(files, 64, crop)), params)

    def once() -> tuple[Tensor, Tensor]:
        plain = torch.from_numpy(decoder(files, 64, crop))
        return plain, auto_augment(plain, params)

    def equal() -> bool:
        return all(torch.equal(a, b) for a, b in zip(twice(), once(), strict=True))

    return Comparison("pairs/s", len(files), {"decoded twice": twice, "decoded once": once}, equal)


COMPARISONS = {"text_tower": text_tower, "two_views": two_views}
