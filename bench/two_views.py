"""JPEG files to a plain and an augmented view: decoded for each, as published programs do, against decoded once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import repeat

import numpy as np
import torch

from bench.case import Case, Output, Provider
from fastbd import draws
from fastbd.data.decode import open_decoder, read
from fastbd.data.demo import SHAPES, picture
from fastbd.kernels.augment import render
from fastbd.kernels.policies import POLICIES, auto_augment
from fastbd.kernels.views import plain

SAME = {"": 0.0}


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


def cases(device: str, quick: bool) -> Iterator[Case]:
    """256 pictures of 64 pixels, on the CPU whatever the device."""
    files, _ = demo_pictures(256)
    pool = open_decoder("pil", 0, "cpu").pool
    u = draws.uniform(0, "bench", np.arange(len(files)), POLICIES["auto_augment"][1])

    def views_of(k: int, decoded: Iterator[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (torch.from_numpy(image) for image in decoded)
        sizes = np.array([first.shape[:2]])
        drawn = plain(sizes, 64), auto_augment(u[k : k + 1], sizes, 64)
        return tuple(render([x], view, 64, torch.uint8)[0] for x, view in zip((first, second), drawn, strict=True))

    def output(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Output:
        return {
            name: torch.stack(views)
            for name, views in zip(("plain", "augmented"), zip(*pairs, strict=True), strict=True)
        }

    def twice() -> Output:
        return output(pool.map(lambda k: views_of(k, (read(files[k]) for _ in range(2))), range(len(files))))

    def once() -> Output:
        return output(pool.map(lambda k: views_of(k, repeat(read(files[k]), 2)), range(len(files))))

    yield Case(
        name="two_views",
        unit="pairs/s",
        units=len(files),
        device="cpu",
        providers={
            "decoded twice": Provider(lambda: twice, SAME, ours=True),
            "decoded once": Provider(lambda: once, SAME, ours=True),
        },
    )
