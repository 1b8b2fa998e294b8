"""Decoded images to a plain and an AutoAugment view, normalised: fused, against operation after operation."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.case import Case, Output, Provider
from bench.pictures import photographs
from bench.pillow_views import pillow_view
from bench.torch_views import two_views
from fastbd import draws
from fastbd.kernels import augment_reference, policies, views
from fastbd.kernels.augment import Ragged, render

SIZE = 224
# A level is 1.5 % of a standard deviation of the pixels; the ways round in different places.
TOLERANCE = {"": 0.02}


def cases(device: str, quick: bool) -> Iterator[Case]:
    """256 (on a CPU 32) photographs of 256 x 341 px to two views of 224 px, in bf16 on a GPU."""
    batch = 256 if device == "cuda" else 32
    pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(file)))) for file in photographs(batch)]
    lying = [x if x.shape[0] < x.shape[1] else x.transpose(0, 1).contiguous() for x in pixels]  # for dense batches
    images = [x.to(device) for x in lying]
    sizes = np.array([x.shape[:2] for x in lying])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plain = views.plain(sizes, SIZE)
    policy, n = policies.POLICIES["auto_augment"]
    second = policy(draws.uniform(0, "bench", np.arange(batch), n), sizes, SIZE)

    def fused() -> Callable[[], Output]:
        ragged = Ragged.of(images) if device == "cuda" else images
        return lambda: named(render(ragged, view, SIZE, dtype) for view in (plain, second))

    def in_torch(compiled: bool) -> Callable[[], Callable[[], Output]]:
        def build() -> Callable[[], Output]:
            call = two_views(torch.stack(images), second, SIZE, dtype, compiled)
            return lambda: named(call())

        return build

    def pillow() -> Callable[[], Output]:
        opened = [Image.fromarray(x.numpy()) for x in lying]
        return lambda: named(
            torch.stack([pillow_view(image, row, SIZE) for image, row in zip(opened, view.params, strict=True)])
            for view in (plain, second)
        )

    def truth() -> Output:
        return named(augment_reference.render(lying, view, SIZE, dtype).to(device) for view in (plain, second))

    providers = {
        "torch operations": Provider(in_torch(False), TOLERANCE),
        "fastbd": Provider(fused, {"": 0.0}, ours=True),
    }
    if device == "cuda":
        providers = {"compiled torch operations": Provider(in_torch(True), TOLERANCE)} | providers
    else:
        providers = {"Pillow, as published": Provider(pillow, TOLERANCE)} | providers
    read_once, written = sum(x.numel() for x in lying), 2 * batch * SIZE * SIZE * 3 * dtype.itemsize
    yield Case(
        name=f"augment {batch} images",
        unit="images/s",
        units=batch,
        device=device,
        providers=providers,
        truth=truth,
        bytes=float(read_once + written),
    )


def named(pair) -> dict[str, Tensor]:
    return dict(zip(("plain", "augmented"), pair, strict=True))
