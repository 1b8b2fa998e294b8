"""Images gathered by the kernel: the bytes that were there, wherever they lay."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from fastbd.kernels.augment import Ragged

gather = pytest.importorskip("fastbd.kernels.gather_triton")


def there(images: Ragged, k: int) -> np.ndarray:
    """Image k as it lies in main memory."""
    height, width = images.sizes[k].tolist()
    found = (ctypes.c_uint8 * (3 * height * width)).from_address(int(images.addresses[k]))
    return np.ctypeslib.as_array(found).reshape(height, width, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel reads memory that is not locked")
@pytest.mark.parametrize("count", [1, 5, 2 * gather.PROGRAMS + 3])
def test_images_are_gathered_from_any_address(count: int) -> None:
    """Of one pixel, of many blocks, at multiples of nothing, in any order, the same one twice."""
    rng = np.random.default_rng(count)
    sizes = rng.integers(1, 20, (count, 2)).astype(np.int32)
    sizes[0], sizes[-1] = (1, 1), (90, 101)
    ends = np.cumsum(3 * sizes.astype(np.int64).prod(1))
    pixels = torch.from_numpy(rng.integers(0, 256, int(ends[-1]), np.uint8))
    addresses = pixels.data_ptr() + ends - 3 * sizes.astype(np.int64).prod(1)
    order = rng.permutation(np.append(np.arange(count), 0))
    images = Ragged(addresses[order], sizes[order], pixels.device, pixels)
    truth = [there(images, k).copy() for k in range(len(images))]
    found = gather.gathered(images, torch.device("cpu"))
    pixels.zero_()  # copies, then
    for k, image in enumerate(truth):
        assert np.array_equal(there(found, k), image), k


@pytest.mark.gpu
def test_a_gpu_reads_locked_memory() -> None:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, 3_000_000, np.uint8)).pin_memory()
    sizes = rng.integers(1, 99, (200, 2)).astype(np.int32)
    starts = rng.integers(0, len(pixels) - 3 * 99 * 99, 200)
    found = gather.gathered(Ragged(pixels.data_ptr() + starts, sizes, pixels.device, pixels), torch.device("cuda"))
    room, _ = found.owner
    room = room.view(torch.uint8)
    for start, address, size in zip(starts, found.addresses, sizes.astype(int).prod(1) * 3, strict=True):
        place = int(address) - room.data_ptr()
        assert torch.equal(room[place : place + size].cpu(), pixels[start : start + size])
