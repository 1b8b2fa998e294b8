"""Images of any sizes from locked main memory to a GPU: one launch a batch.

The GPU reads main memory itself, so that each byte crosses the bus once and the host does nothing for an image. A copy
started for each image is work for the host that grows with their number; to gather them in one piece of main memory
first is a second pass over every byte, by cores that the decoding needs.
"""

# Triton's hints fit the inside of a kernel, not its launch.
# pyright: reportArgumentType=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fastbd.kernels.augment import Ragged

CELL = 128  # bytes that a warp asks for at once, from a multiple of it on; a cell never crosses a page
WORD = 8
BLOCK = 1024  # words on their way for each program
PROGRAMS = 64  # half a megabyte on the way fills the bus; more would only take room from kernels that compute


@triton.jit
def gather_kernel(spans, out, images, BLOCK: tl.constexpr):
    """Copies `images` spans int64 [images, 3]: the address of the source, its first word in `out`, its words."""
    for k in range(tl.program_id(0), images, tl.num_programs(0)):
        span = spans + k * 3
        source, target = tl.load(span).to(tl.pointer_type(tl.int64)), out + tl.load(span + 1)
        words = tl.load(span + 2).to(tl.int32)
        for start in range(0, words, BLOCK):
            word = start + tl.arange(0, BLOCK)
            tl.store(target + word, tl.load(source + word, mask=word < words), mask=word < words)


def gathered(images: Ragged, device: torch.device) -> Ragged:
    """Copies on the device of images in main memory that it can read, made in the order of the current stream.

    Whole cells are copied, so that every read of main memory is aligned: an image keeps its place in its first cell.
    """
    first = images.addresses // CELL * CELL
    ends = images.addresses + 3 * images.sizes.astype(np.int64).prod(1)
    words = -(-(ends - first) // CELL) * CELL // WORD
    places = np.cumsum(words) - words
    spans = torch.from_numpy(np.stack([first, places, words], 1))
    if device.type == "cuda":
        spans = spans.pin_memory().to(device, non_blocking=True)
    room = torch.empty(int(words.sum()), dtype=torch.int64, device=device)
    gather_kernel[(min(PROGRAMS, len(images)),)](spans, room, len(images), BLOCK=BLOCK)
    addresses = room.data_ptr() + WORD * places + images.addresses - first
    return Ragged(addresses, images.sizes, device, (room, images.owner))
