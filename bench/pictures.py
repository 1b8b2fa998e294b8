"""Pictures to measure with: the demo's, and some that cost a JPEG decoder what photographs do."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image

from fastbd.data.demo import SHAPES, picture


def demo_pictures(n: int) -> tuple[list[np.ndarray], list[str]]:
    """JPEG files and captions of n demo pictures."""
    things, files, captions = list(SHAPES), [], []
    for i in range(n):
        image, caption = picture(0, i, things[i % len(things)])
        files.append(_jpeg(image))
        captions.append(caption)
    return files, captions


@cache
def photographs(n: int) -> list[np.ndarray]:
    """JPEG files (quality 90, 4:2:0) of 256 x 341 px, as image downloaders store them.

    Noise whose amplitude falls with the frequency, a little faster than in photographs as it has no flat parts, and
    faster still in its colours: 31 KB a file, where photographs of this size have 29.
    """
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        shape = (256, 341) if i % 2 else (341, 256)
        fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
        frequency = np.maximum(np.hypot(fy, fx), 1 / 400)
        planes = []
        for power in (1.4, 2, 2):
            plane = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) / frequency**power, shape)
            planes.append((plane - plane.mean()) / plane.std())
        luma, red, blue = planes
        pixels = 120 + 50 * np.stack([luma + red / 3, luma - (red + blue) / 6, luma + blue / 3], -1)
        made.append(_jpeg(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))))
    return made


def repeated(count: int) -> list[np.ndarray]:
    """`count` photographs, 256 of which differ."""
    made = photographs(min(count, 256))
    return [made[i % len(made)] for i in range(count)]


def _jpeg(image: Image.Image) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return np.frombuffer(file.getvalue(), np.uint8)
