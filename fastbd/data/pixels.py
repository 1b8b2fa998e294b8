"""Decoded images that are kept: on the GPU, in main memory, or mapped from a file."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.data.decode import OnDemand
from fastbd.kernels.augment import Ragged


def bytes_of(sizes: np.ndarray) -> np.ndarray:
    """Bytes of RGB images of these sizes, int [N, 2] -> int64 [N]."""
    return 3 * sizes.astype(np.int64).prod(1)


class Pixels:
    """Images uint8 [H, W, 3] of `rows`, of sizes int [N, 2], one after another in `pixels`, uint8 [bytes].

    `file` is where pixels lie that are mapped from one: each image is compared with its checksum when it is first read.
    """

    def __init__(self, rows: np.ndarray, total: int, sizes: np.ndarray, pixels: Tensor, file: PixelFile | None = None):
        self.rows, self.sizes, self.pixels = rows, sizes.astype(np.int32), pixels
        self._locked = pixels.is_pinned()
        self._ends = np.cumsum(bytes_of(sizes))
        self.place = np.full(total, -1)
        self.place[rows] = np.arange(len(rows))
        self._file, self._trusted = file, np.full(len(rows), file is None)
        self._substitutes: dict[int, Tensor] = {}  # by place: those of another size than the file tells

    def put(self, place: int, image: Tensor) -> None:
        """Keep the image of rows[place]."""
        if np.array_equal(image.shape[:2], self.sizes[place]):
            self._kept(place).copy_(image)
            if self._file:
                self._file.checksums[place] = zlib.crc32(np.ascontiguousarray(image.numpy()).data)
                self._trusted[place] = True
        else:
            image = image.to(self.pixels.device).contiguous()
            self._substitutes[place] = image.pin_memory() if self._locked else image

    def images(self, ids: np.ndarray, host: bool = True) -> Sequence[Tensor] | Ragged:
        """Images of rows int64 [B]. IndexError for a row that is not kept.

        A Ragged on the GPU where the pixels are there, or are locked in main memory and not for the `host`.
        """
        places = self.place[ids]
        if (places < 0).any():
            raise IndexError("a row that is not kept")
        if self.pixels.is_cuda:
            return self._ragged(places)
        if self._locked and not host:
            from fastbd.kernels.gather_triton import gathered

            return gathered(self._ragged(places), torch.device("cuda", torch.cuda.current_device()))
        return OnDemand(len(places), lambda k: self._image(int(places[k])))

    def _ragged(self, places: np.ndarray) -> Ragged:
        """Where the images lie in memory that is not a file's."""
        sizes = self.sizes[places]
        addresses = self.pixels.data_ptr() + self._ends[places] - bytes_of(sizes)
        for k, place in enumerate(places.tolist()):
            if place in self._substitutes:
                image = self._substitutes[place]
                addresses[k], sizes[k] = image.data_ptr(), image.shape[:2]
        return Ragged(addresses, sizes, self.pixels.device, self)

    def _image(self, place: int) -> Tensor:
        if place in self._substitutes:
            return self._substitutes[place]
        image = self._kept(place)
        if self._file and not self._trusted[place]:
            self._file.check(int(self.rows[place]), place, image)
            self._trusted[place] = True
        return image

    def _kept(self, place: int) -> Tensor:
        height, width = self.sizes[place].tolist()
        end = int(self._ends[place])
        return self.pixels[end - 3 * height * width : end].view(height, width, 3)


class PixelFile(NamedTuple):
    """A file of pixels: a digest of all that they depend on, the pixels, and the CRC-32 of each image."""

    path: Path
    checksums: np.ndarray
    """uint32 [N]"""

    def check(self, row: int, place: int, image: Tensor) -> None:
        """Raise a UserError where the image is not the one that was written."""
        if zlib.crc32(image.numpy().data) != self.checksums[place]:
            raise UserError(
                f"{self.path} is damaged, as the image of row {row} is not the one that was written: remove the file, "
                "and the next run makes it again."
            )
