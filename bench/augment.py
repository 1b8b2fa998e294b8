"""Decoded images to a plain and an AutoAugment view, normalised: fused, against operation after operation."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.case import Case, Cases, Output, Provider
from bench.pictures import photographs
from bench.pillow_views import pillow_view
from bench.torch_views import two_views
from fastbd.base import random
from fastbd.kernels import augment_reference, policies, views
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.views import View

SIZE = 224
COMPARED = 32  # images: the reference is slow
# A level is 1.5 % of a standard deviation of the pixels; the ways round in different places.
TOLERANCE = {"": 0.02}


def cases(device: str, quick: bool) -> Cases:
    batch = 256 if device == "cuda" else 32
    name = f"augment {batch} images"
    yield name, partial(augment_case, name, batch, device)


def augment_case(name: str, batch: int, device: str) -> Case:
    """Photographs of 256 x 341 px to two views of 224 px, in bf16 on a GPU."""
    pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(file.tobytes())))) for file in photographs(batch)]
    lying = [x if x.shape[0] < x.shape[1] else x.transpose(0, 1).contiguous() for x in pixels]  # for dense batches
    images = [x.to(device) for x in lying]
    sizes = np.array([x.shape[:2] for x in lying])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plain = views.plain(sizes, SIZE)
    policy, n = policies.POLICIES["auto_augment"]
    second = policy(random.uniform(0, "bench", np.arange(batch), n), sizes, SIZE)

    def on_gpu() -> Callable[[], Output]:
        ragged = Ragged.of(images)
        return lambda: named(render(ragged, view, SIZE, dtype) for view in (plain, second))

    def in_threads(make: Callable[[int, View, Tensor], None]) -> Callable[[], Output]:
        """As a loader does it: a thread for each core, each at an image of its own. make(image, view, where to)."""
        pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))

        def call() -> Output:
            out = torch.empty(2, batch, SIZE, SIZE, 3)
            jobs = [(i, view, place[i]) for i in range(batch) for view, place in zip((plain, second), out, strict=True)]
            list(pool.map(make, *zip(*jobs, strict=True)))
            return named(out.permute(0, 1, 4, 2, 3))

        return call

    def fused(i: int, view: View, out: Tensor) -> None:
        render(lying[i : i + 1], view[i : i + 1], SIZE, out=out[None])

    def in_pytorch(i: int, view: View, out: Tensor) -> None:
        augment_reference.render(lying[i : i + 1], view[i : i + 1], SIZE, dtype, out[None])

    def in_torch(compiled: bool) -> Callable[[], Callable[[], Output]]:
        def build() -> Callable[[], Output]:
            call = two_views(torch.stack(images), second, SIZE, dtype, compiled)
            return lambda: named(call())

        return build

    def pillow(i: int, view: View, out: Tensor) -> None:
        out.copy_(pillow_view(opened[i], view.params[i], SIZE).permute(1, 2, 0))

    def truth() -> Output:
        some = (augment_reference.render(lying[:COMPARED], view[:COMPARED], SIZE, dtype) for view in (plain, second))
        return named(views.to(device) for views in some)

    def provider(build: Callable[[], Callable[[], Output]], tolerance: dict[str, float], **about) -> Provider:
        return Provider(build, tolerance, compared=first_images, **about)

    if device == "cuda":
        providers = {
            "torch operations": provider(in_torch(False), TOLERANCE),
            "fastbd": provider(on_gpu, {"": 0.0}, ours=True),
            "torch operations, compiled": provider(in_torch(True), TOLERANCE, slow="it takes a minute to compile"),
        }
    else:
        opened = [Image.fromarray(x.numpy()) for x in lying]
        providers = {
            "Pillow, as published": provider(partial(in_threads, pillow), TOLERANCE),
            "torch operations": provider(in_torch(False), TOLERANCE),
            "reference in PyTorch": provider(partial(in_threads, in_pytorch), {"": 0.0}),
            "fastbd": provider(partial(in_threads, fused), {"": 0.0}, ours=True),
        }
    read_once, written = sum(x.numel() for x in lying), 2 * batch * SIZE * SIZE * 3 * dtype.itemsize
    return Case(
        name=name,
        unit="images/s",
        units=batch,
        device=device,
        providers=providers,
        truth=truth,
        bytes=float(read_once + written),
    )


def first_images(output: Output) -> Output:
    """The views of COMPARED images."""
    return {name: views[:COMPARED] for name, views in output.items()}


def named(pair) -> dict[str, Tensor]:
    return dict(zip(("plain", "augmented"), pair, strict=True))
