"""Sizes of a step's batch: what divides it, and the largest that fits in a GPU's memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch

from fastbd.base.dist import World
from fastbd.base.errors import UserError, is_short_of_memory
from fastbd.base.schedule import learning_rates
from fastbd.data.loader import Batch
from fastbd.kernels.text_pack import END, PackedText, pack
from fastbd.methods.method import Method
from fastbd.models import CLIP
from fastbd.training.optim import make_optimizer
from fastbd.training.step import Step

WAITING = 6  # batches in memory: two wait, one is made, one used, one has just been; and the graph's own
FINENESS = 32  # pairs by which to try
SPARE = 0.95  # of what was found: memory gets into pieces


@dataclass(frozen=True)
class Shares:
    """Who takes what of a batch: `processes`, each its part after part; batch norm, `group` images at a time (0: all).

    A pair is `views` images. `norms`: whether the model has a batch norm.
    """

    processes: int
    parts: int
    group: int
    views: int
    norms: bool

    @property
    def unit(self) -> int:
        """A process's pairs are a multiple of this."""
        return self.parts * max(1, self.group // self.views)

    def part(self, batch_size: int) -> int:
        """Pairs of a part of a process's share."""
        return batch_size // self.processes // self.parts

    def check(self, batch_size: int, rows: int) -> None:
        """UserError when a batch of so many of the `rows` pairs cannot be shared out so."""
        if batch_size % (self.processes * self.parts):
            takers = [(self.processes, "processes"), (self.parts, "parts of --accumulate")]
            asked = " times ".join(f"{count} {name}" for count, name in takers if count > 1)
            raise UserError(f"--batch-size {batch_size} is no multiple of the {asked}: choose one that is.")
        if rows < batch_size:
            raise UserError(f"--batch-size {batch_size} is larger than the {rows} pairs there are: make it smaller.")
        images = self.part(batch_size) * self.views
        if self.group and (images % self.group or self.group % self.views):
            raise UserError(
                f"--bn-group {self.group} does not share out the {images} images, {self.views} of a pair, that are "
                f"embedded together: choose a divisor of {images} that is a multiple of {self.views}."
            )
        if self.parts > 1 and self.norms and not self.group:
            raise UserError(
                f"--accumulate {self.parts} needs a number for --bn-group, as batch norm sees one part at a time: a "
                f"divisor of {images} that is a multiple of {self.views}."
            )


def largest(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` that fits, 0 if none: doubled until it does not, then halved gaps."""
    low, high = 0, most // unit + 1  # low fits, high does not
    while high - low > 1:
        middle = min(2 * low or 1, (low + high) // 2)
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit


def batch_that_fits(
    model: CLIP, method: Method, shares: Shares, *, texts: int, tokens: float, most: int, precision: str,
    world: World,
) -> int:  # fmt: skip
    """The largest batch size up to `most`; a pair has `texts` captions of so many `tokens` each.

    The model is left alone. UserError when nothing fits.
    """
    alone = World(0, 1, world.device)
    narrow = torch.bfloat16 if precision == "bf16" else torch.float32

    def made(count: int) -> Batch:
        side, length = model.image_size, math.ceil(tokens)
        images = torch.zeros(count, side, side, 3, dtype=narrow, device=world.device).permute(0, 3, 1, 2)
        captions = np.full((texts * count // shares.parts, length), END, np.uint16)
        captions[:, :-1] = 1
        text = PackedText(*(x.to(world.device) for x in pack(captions)))
        ids = torch.arange(count, device=world.device)
        return Batch(ids, tuple(images + k for k in range(shares.views)), (text,) * shares.parts)

    @torch.compiler.set_stance("force_eager")  # compiling for each size would take longer than trying it
    def fits(count: int) -> bool:
        copy = trained_by = None
        try:
            copy, trained_by = deepcopy((model, method))
            optimizer = make_optimizer(copy, trained_by, lr=0.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
            step = Step(
                copy, trained_by, optimizer, learning_rates(0, warmup=0, total=2), precision=precision, world=alone
            )
            waiting = [made(count) for _ in range(WAITING)]
            for batch in waiting[:2]:
                step(batch)["loss"].item()  # which waits for the device
        except RuntimeError as error:
            if not is_short_of_memory(error):
                raise
            return False
        finally:
            copy = trained_by = optimizer = step = waiting = batch = None
            gc.collect()
            torch.cuda.empty_cache()
        return True

    most //= world.size
    coarse = shares.unit * max(1, min(FINENESS, most) // shares.unit)
    found = largest(fits, coarse, most)
    if found + coarse <= most:
        found = max(shares.unit, int(SPARE * found) // shares.unit * shares.unit) if found or fits(shares.unit) else 0
    if not (found := world.least(found)):
        raise UserError(
            f"not even {shares.unit} pairs fit in the memory of {world.device}: try --grad-checkpointing, or a larger "
            "--accumulate."
        )
    return found * world.size
