"""The number format in which a CPU trains a model the fastest, as it is measured for --precision auto."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastbd.base import files
from fastbd.kernels.text_pack import END, PackedText, pack
from fastbd.models import CLIP
from fastbd.models.memory_format import channels_last
from fastbd.models.precision import autocast

WORTH = 1.15  # times as fast as fp32: for less no digits are given up
ENOUGH = 0.2  # seconds of a pass, from which more images tell nothing more; a tiny model's very first takes less
TRIES = 3  # of each format in turns, the first of which warms up
LIMIT = 1.0  # seconds, after which nothing is tried again
CAPTION = 12  # tokens: the mean of CC3M
FILE = "precision.json"  # in a study's folder


def choice(seconds: dict[str, float]) -> str:
    """Return fp32 or bf16, by the seconds that each takes for the same work."""
    return "bf16" if seconds["fp32"] >= WORTH * seconds["bf16"] else "fp32"


def sentence(seconds: dict[str, float]) -> str:
    """Return a line that says what was chosen, and why."""
    times = seconds["fp32"] / seconds["bf16"]
    return f"{choice(seconds)}: bf16 is {times:.2f} times as fast as fp32 on this CPU for this model (--precision)"


def measure(model: CLIP, images: int) -> dict[str, float]:
    """Return the seconds that a pass through the towers and back takes in fp32 and in bf16, on a CPU.

    It has as many captions as images: up to `images`, and no more than make it long enough to be timed. Weights,
    gradients, buffers (running statistics are some) and torch's random state are as before after it.
    """
    channels_last(model).train()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        size = 1
        while True:
            size = min(2 * size, images)
            batch = _drawn(model.image_size, size)
            if size == images or _seconds(model, *batch, "fp32") > ENOUGH:
                break
        taken: dict[str, list[float]] = {"fp32": [], "bf16": []}
        while len(taken["bf16"]) < TRIES and sum(map(sum, taken.values())) < LIMIT:
            for precision, seconds in taken.items():
                seconds.append(_seconds(model, *batch, precision))
    for buffer, before in buffers:
        buffer.copy_(before)
    return {precision: min(seconds) for precision, seconds in taken.items()}


def _drawn(side: int, count: int) -> tuple[Tensor, PackedText]:
    """Return random normalised pixels [count, 3, side, side], and as many captions."""
    pixels = torch.randn(count, 3, side, side).contiguous(memory_format=torch.channels_last)
    tokens = np.random.default_rng(0).integers(END, size=(count, CAPTION))
    tokens[:, -1] = END
    return pixels, pack(tokens)


def _seconds(model: CLIP, pixels: Tensor, text: PackedText, precision: str) -> float:
    """Return the seconds in which the towers' embeddings and gradients are computed, which are put nowhere."""
    began = time.perf_counter()
    with autocast(precision, pixels.device):
        images, captions, _ = model(pixels, text)
    loss = images.float().square().mean() + captions.float().square().mean()
    torch.autograd.grad(loss, [x for x in model.parameters() if x.requires_grad], allow_unused=True)
    return time.perf_counter() - began


def shared(folder: Path, name: str, measured: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the seconds that FILE in a study's folder holds of the model `name`; who asks first measures them."""
    path = folder / FILE
    with files.locked(path):  # which makes an empty one
        known = files.read_json(path, "remove it, and they are measured again") if path.stat().st_size else {}
        if name not in known:
            known[name] = measured()
            files.write_json(path, known)
    return known[name]
