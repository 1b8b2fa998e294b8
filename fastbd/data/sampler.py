"""The order of the data, as a pure function of (seed, epoch): nothing to save, the same on any number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastbd.base.errors import UserError
from fastbd.base.random import words


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n], the order of one epoch."""
    # The words of one epoch are all different (a bijection of the id), so any sort gives the same order.
    return np.argsort(words(seed, "order", np.arange(n), 1, epoch=epoch)[:, 0])


def batches(
    n: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0
) -> Iterator[np.ndarray]:
    """int64 [batch_size // world], this rank's share of each global batch from step `start` on.

    `batch_size` counts the pairs over all ranks; the last n % batch_size pairs of the epoch are left out. Raises
    UserError when the ranks cannot share a batch evenly.
    """
    if batch_size % world:
        raise UserError(f"the batch size {batch_size} cannot be shared by {world} GPUs: give a multiple of {world}.")
    order = permutation(n, seed, epoch)
    share = batch_size // world
    for step in range(start, n // batch_size):
        first = step * batch_size + rank * share
        yield order[first : first + share]
