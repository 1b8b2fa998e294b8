"""Triggers in Triton: one launch for the whole batch; same function as stamp_reference."""

# Triton's hints fit the inside of a kernel, not its launch, and let nobody loop over a range.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbd.kernels.stamp import Overlay

BLOCK = 512
# Patches come in many sizes and strides: one compiled kernel serves them all.
VARIED = ("h", "w", "keep_b", "keep_y", "keep_x", "keep_c", "add_b", "add_y", "add_x", "add_c")


@triton.jit
def _sample(image, y, x, c, H, W, weight, mask):
    """weight times a value of the image, 0 outside."""
    inside = mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return weight * tl.load(image + (y * W + x) * 3 + c, mask=inside, other=0).to(tl.int32)


@triton.jit(do_not_specialize=VARIED)
def stamp_kernel(
    IMAGES,
    STAMPED,
    KEEP,
    ADD,
    PLACES,
    LEVELS,
    FIELD,
    H,
    W,
    h,
    w,
    keep_b,
    keep_y,
    keep_x,
    keep_c,
    add_b,
    add_y,
    add_x,
    add_c,
    N: tl.constexpr,
    HAS_LEVELS: tl.constexpr,
    HAS_FIELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK values of image program_id(0); KEEP and ADD [B, h, w, 3] by their strides, PLACES [B, N, 2]."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < H * W * 3
    c = i % 3
    y = i // 3 // W
    x = i // 3 % W
    image = IMAGES + b * H * W * 3
    if HAS_FIELD:
        row = tl.load(FIELD + i // 3 * 2, mask=mask, other=0)
        column = tl.load(FIELD + i // 3 * 2 + 1, mask=mask, other=0)
        y0 = row >> 11
        x0 = column >> 11
        fy = row & 2047
        fx = column & 2047
        v = _sample(image, y0, x0, c, H, W, (2048 - fy) * (2048 - fx), mask)
        v += _sample(image, y0, x0 + 1, c, H, W, (2048 - fy) * fx, mask)
        v += _sample(image, y0 + 1, x0, c, H, W, fy * (2048 - fx), mask)
        v += _sample(image, y0 + 1, x0 + 1, c, H, W, fy * fx, mask)
        v = v >> 22
    else:
        v = tl.load(image + i, mask=mask, other=0).to(tl.int32)
    if HAS_LEVELS:
        v = tl.load(LEVELS + c * 256 + v, mask=mask, other=0).to(tl.int32)
    for n in tl.static_range(N):
        py = y - tl.load(PLACES + (b * N + n) * 2)
        px = x - tl.load(PLACES + (b * N + n) * 2 + 1)
        covered = mask & (py >= 0) & (py < h) & (px >= 0) & (px < w)
        keep = tl.load(KEEP + b * keep_b + py * keep_y + px * keep_x + c * keep_c, mask=covered, other=65536)
        add = tl.load(ADD + b * add_b + py * add_y + px * add_x + c * add_c, mask=covered, other=0)
        v = tl.minimum(tl.maximum((keep * v + add) >> 16, 0), 255)
    tl.store(STAMPED + b * H * W * 3 + i, v.to(tl.uint8), mask=mask)


def stamp_triton(images: Tensor, overlay: Overlay) -> Tensor:
    """As `stamp`; the overlay on the images' device."""
    images = images.contiguous()
    out = torch.empty_like(images)
    count, height, width, _ = images.shape
    keep, add = overlay.patch()
    if count:
        with torch.cuda.device_of(images):  # Triton starts a kernel on the thread's device, wherever the tensors are
            stamp_kernel[(count, triton.cdiv(height * width * 3, BLOCK))](
                images,
                out,
                keep,
                add,
                overlay.places.contiguous(),
                overlay.levels,
                overlay.field,
                height,
                width,
                *keep.shape[1:3],
                *keep.stride(),
                *add.stride(),
                N=overlay.places.shape[1],
                HAS_LEVELS=overlay.levels is not None,
                HAS_FIELD=overlay.field is not None,
                BLOCK=BLOCK,
            )
    return out
