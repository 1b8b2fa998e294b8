"""JPEG files to a plain and an augmented view: decoded for each, as published programs do, against decoded once."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch

from bench.case import Case, Output, Provider
from fastbd import draws
from fastbd.data.decode import open_decoder
from fastbd.data.demo import SHAPES, picture
from fastbd.kernels.augment import N_DRAWS, auto_augment, draw_auto_augment

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
    decoder = open_decoder("pil", 0, "cpu")
    crop = np.zeros(len(files), bool)
    params = draw_auto_augment(draws.uniform(0, "bench", np.arange(len(files)), N_DRAWS))

    def twice() -> Output:
        plain = torch.from_numpy(decoder(files, 64, crop))
        return {"plain": plain, "augmented": auto_augment(torch.from_numpy(decoder(files, 64, crop)), params)}

    def once() -> Output:
        plain = torch.from_numpy(decoder(files, 64, crop))
        return {"plain": plain, "augmented": auto_augment(plain, params)}

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
