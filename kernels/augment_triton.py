"""Views on a GPU, bit for bit those of the reference.

A view of a batch is one copy of all that the host knows about it, and a few launches, however many images there are:

    weights of the resize; sums over the columns, to bytes; sums over the rows, flip, noise, normalisation, erasing
    for each pass of operations: histograms and tables where an operation needs them; the operations
    for each pass of blurs: along the rows; along the columns

A pass takes an image through a whole run of operations, as AFFINE and SHARPNESS alone look at other pixels, and as
histograms can be counted on what the operations before them make without storing it. Operations go over the stored
image once, into scratch memory, and not into the taps of the resize, which looks at each stored pixel many times.

Nothing that differs from batch to batch is a compile-time constant, and memory is what each image needs by itself: an
image far larger than the others costs no compilation, and the others nothing.
"""

# Triton's hints fit the inside of a kernel, not its launch, and let nobody loop over a range.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbd.kernels import views
from fastbd.kernels.augment import Ragged
from fastbd.kernels.constants import noise_levels, normalisation
from fastbd.kernels.views import OFFSETS, OPERATION, PARAMS, View

PIXELS = 256  # that a program operates on at a time
COUNTED_PIXELS, COUNTED_TILES = 512, 16  # that a program counts at a time, and how often
LINES = 16  # that a program blurs
TILE_ROWS, TILE_COLUMNS = 16, 32  # of a tile of sums over the columns
OUTPUTS = 128  # whose weights a program makes at a time
BYTES, ROWS = 256, 8  # of each of so many rows of a view that a program makes
FUSION = dict(enable_fp_fusion=False)  # a fused multiply-add rounds once where the reference rounds twice

AFFINE, POSTERIZE, SOLARIZE = (tl.constexpr(c) for c in (views.AFFINE, views.POSTERIZE, views.SOLARIZE))
BRIGHTNESS, COLOR, CONTRAST = (tl.constexpr(c) for c in (views.BRIGHTNESS, views.COLOR, views.CONTRAST))
SHARPNESS, HUE = tl.constexpr(views.SHARPNESS), tl.constexpr(views.HUE)
EQUALIZE, AUTOCONTRAST = tl.constexpr(views.EQUALIZE), tl.constexpr(views.AUTOCONTRAST)
COUNTED = (views.CONTRAST, views.EQUALIZE, views.AUTOCONTRAST)  # need the whole image's histogram
GATHERED = (views.AFFINE, views.SHARPNESS)  # look at other pixels

# Where a field begins in a sample's words of the packed parameters.
WORDS, OPERATION_WORDS = tl.constexpr(PARAMS.itemsize // 4), tl.constexpr(OPERATION.itemsize // 4)
BOX, RESIZED, WINDOW, NOISE, ERASE = (
    tl.constexpr(OFFSETS[name] // 4) for name in ("box", "resized", "window", "noise", "erase")
)
# A pass over an image, int64: address of the source, of the result, height, width, word of the first operation in the
# parameters, number of operations before the counted one, number of operations, place in the tables; of a blur, the
# address of more memory instead of the place.
JOB = tl.constexpr(8)
# A resize, int64: address of the first pixel that is looked at, bytes from a row to the next, first row and number of
# rows that are looked at, places in the scratch memory and in the weights of the rows and the columns, whether to flip.
RESIZE = tl.constexpr(8)


@triton.jit
def weights_kernel(resizes, params, weights, first, shape, size, CUBIC: tl.constexpr, BLOCK: tl.constexpr):
    """Weights int16 [taps, S] of each row (axis 0) and column (axis 1) of the window, where `resizes` has them, their
    first taps [B, 2, S], and (number of taps, bits after the point) [B, 2, 2]: PyTorch's arithmetic for uint8."""
    axis, b = tl.program_id(0), tl.program_id(1)
    sample = params + b * WORDS
    n_in, n_out = tl.load(sample + BOX + 2 + axis), tl.load(sample + RESIZED + axis)
    start = tl.load(sample + WINDOW + axis)
    place = b * 2 + axis
    first += place * size
    weights += tl.load(resizes + b * RESIZE + 5 + axis)
    shape += place * 2
    lane = tl.arange(0, BLOCK)
    if n_in == n_out:
        for at in range(0, size, BLOCK):
            inside = at + lane < size
            tl.store(first + at + lane, start + at + lane, mask=inside)
            tl.store(weights + at + lane, (16384 + lane * 0).to(tl.int16), mask=inside)
        tl.store(shape, 1)
        tl.store(shape + 1, 14)
    else:
        scale = n_in.to(tl.float64) / n_out.to(tl.float64)
        # The largest weight of the whole axis, not only of the window, sets how many bits there can be.
        largest = tl.zeros([BLOCK], tl.float64)
        most = lane * 0
        for at in range(0, n_out, BLOCK):
            low, count, centre = _taps(tl.minimum(at + lane, n_out - 1), n_in, scale, CUBIC)
            most = tl.maximum(most, count)
            total, top = largest * 0, largest * 0
            for k in range(0, tl.max(count, 0)):
                w = _weight(low, count, centre, k, scale, CUBIC)
                total, top = total + w, tl.maximum(top, w)
            largest = tl.maximum(largest, top / total)
        taps = tl.max(most, 0)
        bits, power = 0, tl.max(largest, 0)
        for _ in range(0, 22):
            power = power * 2
            bits = bits + (power + 0.5 < 32768).to(tl.int32)
        unit = (tl.full([1], 1, tl.int32) << bits).to(tl.float64)
        for at in range(0, size, BLOCK):
            inside = at + lane < size
            low, count, centre = _taps(tl.minimum(start + at + lane, n_out - 1), n_in, scale, CUBIC)
            tl.store(first + at + lane, low, mask=inside)
            total = largest * 0
            for k in range(0, taps):
                total += _weight(low, count, centre, k, scale, CUBIC)
            for k in range(0, taps):
                scaled = _weight(low, count, centre, k, scale, CUBIC) / total * unit
                rounded = tl.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(tl.int32)
                tl.store(weights + k * size + at + lane, rounded.to(tl.int16), mask=inside)
        tl.store(shape, taps)
        tl.store(shape + 1, bits)


@triton.jit
def _taps(o, n_in, scale, CUBIC: tl.constexpr):
    """First tap, number of taps and centre in the source of the outputs o."""
    reach = tl.maximum(scale, 1.0)
    support = reach * 2 if CUBIC else reach
    centre = scale * (o.to(tl.float64) + 0.5)
    low = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    return low, tl.minimum((centre + support + 0.5).to(tl.int32), n_in) - low, centre


@triton.jit
def _weight(low, count, centre, k, scale, CUBIC: tl.constexpr):
    """float64 weight of the k-th tap, before they are made to sum to 1; 0 where there are fewer."""
    x = tl.abs(((low + k).to(tl.float64) - centre + 0.5) * (1.0 / tl.maximum(scale, 1.0)))
    if CUBIC:  # Keys' filter with a = -0.5
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        w = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    else:
        w = tl.maximum(1 - x, 0.0)
    return tl.where(k < count, w, 0.0)


@triton.jit
def columns_kernel(resizes, params, weights, first, shape, scratch, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the columns of the rows that are looked at, rounded to levels uint8 [rows, S, 3], flipped.

    A thread has several rows of a column, so that it loads a weight once for all of them.
    """
    b = tl.program_id(1)
    resize = resizes + b * RESIZE
    source, pitch = tl.load(resize).to(tl.pointer_type(tl.uint8)), tl.load(resize + 1)
    rows = tl.load(resize + 3).to(tl.int32)
    scratch += tl.multiple_of(tl.load(resize + 4), 16)
    weights += tl.load(resize + 6)
    flip = tl.load(resize + 7).to(tl.int32)
    last = tl.load(params + b * WORDS + BOX + 3) - 1
    taps, bits = tl.load(shape + b * 4 + 2), tl.load(shape + b * 4 + 3)
    across = tl.cdiv(size, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        y = tile // across * ROWS + tl.arange(0, ROWS)
        x = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        column = tl.minimum(x, size - 1)
        column += flip * (size - 1 - 2 * column)
        x0 = tl.load(first + (b * 2 + 1) * size + column)
        pixels = source + (tl.minimum(y, rows - 1).to(tl.int64) * pitch)[:, None] + 3 * x0[None, :]
        red = tl.full([ROWS, COLUMNS], 0, tl.int32) + ((1 << bits) >> 1)
        green, blue = red, red
        for k in range(0, taps):
            w = tl.load(weights + k * size + column).to(tl.int32)[None, :]
            red += w * tl.load(pixels).to(tl.int32)
            green += w * tl.load(pixels + 1).to(tl.int32)
            blue += w * tl.load(pixels + 2).to(tl.int32)
            # A weight beyond the last tap is 0; its pixel is only kept within the image.
            pixels += tl.where(x0 + k < last, 3, 0)[None, :]
        inside = (y < rows)[:, None] & (x < size)[None, :]
        place = scratch + (y[:, None].to(tl.int64) * size + x[None, :]) * 3
        tl.store(place, _level(red >> bits).to(tl.uint8), mask=inside)
        tl.store(place + 1, _level(green >> bits).to(tl.uint8), mask=inside)
        tl.store(place + 2, _level(blue >> bits).to(tl.uint8), mask=inside)


@triton.jit
def finish_kernel(
    resizes,
    params,
    weights,
    first,
    shape,
    scratch,
    levels,
    scale_shift,
    out,
    size,
    SUMS: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A view [B, S, S, 3]: with SUMS, of the sums over the columns in `scratch`, else of pixels of the view's size.

    Channels side by side are one long row, so that a thread loads and stores neighbouring bytes at once.
    """
    b = tl.program_id(1)
    resize, sample = resizes + b * RESIZE, params + b * WORDS
    width = 3 * size
    across = tl.cdiv(width, BLOCK)
    x = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    if SUMS:
        base, rows = tl.load(resize + 2).to(tl.int32), tl.load(resize + 3).to(tl.int32)
        scratch += tl.multiple_of(tl.load(resize + 4), 16)
        weights += tl.load(resize + 5)
        taps, bits = tl.load(shape + b * 4), tl.load(shape + b * 4 + 1)
    else:
        source, pitch = tl.load(resize).to(tl.pointer_type(tl.uint8)), tl.load(resize + 1)
        from_x = x
        if tl.load(resize + 7) != 0:
            from_x = width - 3 - x + 2 * (x % 3)
    if NORMALISE:
        scale = tl.load(scale_shift + x, mask=inside, other=0)
        shift = tl.load(scale_shift + width + x, mask=inside, other=0)
    top = tl.program_id(0) // across * ROWS
    for y in range(top, tl.minimum(top + ROWS, size)):
        if SUMS:
            row = tl.load(first + b * 2 * size + y) - base
            sums = tl.full([BLOCK], 0, tl.int32) + ((1 << bits) >> 1)
            line, weight = scratch + row * width + x, weights + y
            for _ in range(0, tl.minimum(taps, rows - row)):
                # What is behind the row's end, there is room for it, is not stored.
                sums += tl.load(weight).to(tl.int32) * tl.load(line).to(tl.int32)
                line, weight = line + width, weight + size
            level = _level(sums >> bits)
        else:
            level = tl.load(source + y * pitch + from_x, mask=inside, other=0).to(tl.int32)
        place = out + b.to(tl.int64) * size * width + y * width + x
        if NORMALISE:
            _normalise(place, level, x, y, width, sample, levels, scale, shift, inside)
        else:
            tl.store(place, level.to(tl.uint8), mask=inside)


@triton.jit
def _level(x):
    return tl.minimum(tl.maximum(x, 0), 255)


@triton.jit
def _normalise(place, level, x, y, width, sample, levels, scale, shift, inside):
    """Noise, normalisation, erasing and store of a piece of a row of a view."""
    value = level.to(tl.float32)
    amplitude = tl.load(sample + NOISE).to(tl.float32, bitcast=True)
    if amplitude != 0:
        word = (y * width + x).to(tl.uint32) ^ tl.load(sample + NOISE + 1).to(tl.uint32, bitcast=True)
        word = _mix(_mix(word) + tl.load(sample + NOISE + 2).to(tl.uint32, bitcast=True))
        noise = tl.load(levels + (word >> 16).to(tl.int32), mask=inside, other=0) * amplitude
        value = tl.minimum(value + noise, 255)
    value = value * scale + shift
    top, height = tl.load(sample + ERASE), tl.load(sample + ERASE + 2)
    if (y >= top) & (y < top + height):
        left, breadth = 3 * tl.load(sample + ERASE + 1), 3 * tl.load(sample + ERASE + 3)
        value = tl.where((x < left) | (x >= left + breadth), value, 0)
    tl.store(place, value.to(place.dtype.element_ty), mask=inside)


@triton.jit
def _mix(x):
    """lowbias32, as in the reference."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def operate_kernel(jobs, params, tables, means, BLOCK: tl.constexpr):
    """A run of operations on each image; `tables` uint8 [slots, 3, 256], `means` int32 [slots]."""
    job = jobs + tl.program_id(1) * JOB
    pixels = (tl.load(job + 2) * tl.load(job + 3)).to(tl.int32)
    result, stop, slot = tl.load(job + 1).to(tl.pointer_type(tl.uint8)), tl.load(job + 6).to(tl.int32), tl.load(job + 7)
    for start in range(tl.program_id(0) * BLOCK, pixels, tl.num_programs(0) * BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < pixels
        red, green, blue = _operated(job, params, tables + slot * 768, means + slot, stop, p, inside)
        tl.store(result + p * 3, red.to(tl.uint8), mask=inside)
        tl.store(result + p * 3 + 1, green.to(tl.uint8), mask=inside)
        tl.store(result + p * 3 + 2, blue.to(tl.uint8), mask=inside)


@triton.jit
def statistics_kernel(jobs, params, histograms, BLOCK: tl.constexpr):
    """Counts int32 [slots, 3, 256] before the counted operation, of red, green and blue, for CONTRAST of luma: whole
    numbers, so any order gives the same."""
    job = jobs + tl.program_id(1) * JOB
    pixels = (tl.load(job + 2) * tl.load(job + 3)).to(tl.int32)
    stop = tl.load(job + 5).to(tl.int32)
    code = tl.load(params + tl.load(job + 4) + stop * OPERATION_WORDS)
    reds = tl.zeros([256], tl.int32)
    greens, blues = reds, reds
    for start in range(tl.program_id(0) * BLOCK, pixels, tl.num_programs(0) * BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < pixels
        red, green, blue = _operated(job, params, histograms, histograms, stop, p, inside)
        if code == CONTRAST:
            reds += tl.histogram(_grey(red, green, blue), 256, mask=inside)
        else:
            reds += tl.histogram(red, 256, mask=inside)
            greens += tl.histogram(green, 256, mask=inside)
            blues += tl.histogram(blue, 256, mask=inside)
    bins = histograms + tl.load(job + 7) * 768 + tl.arange(0, 256)
    tl.atomic_add(bins, reds)
    if code != CONTRAST:
        tl.atomic_add(bins + 256, greens)
        tl.atomic_add(bins + 512, blues)


@triton.jit
def tables_kernel(jobs, params, histograms, tables, means):
    """The tables of EQUALIZE and AUTOCONTRAST and the mean of CONTRAST, one program a channel of a counted image."""
    job, channel = jobs + tl.program_id(1) * JOB, tl.program_id(0)
    code = tl.load(params + tl.load(job + 4) + tl.load(job + 5) * OPERATION_WORDS)
    level = tl.arange(0, 256)
    row = tl.load(job + 7) * 768 + channel * 256 + level
    counts = tl.load(histograms + row)
    if code == CONTRAST:
        if channel == 0:
            pixels = tl.sum(counts, 0).to(tl.int64)
            mean = (2 * tl.sum(counts.to(tl.int64) * level, 0) + pixels) // (2 * pixels)  # rounded half up
            tl.store(means + tl.load(job + 7), mean.to(tl.int32))
    else:
        high = tl.max(tl.where(counts > 0, level, 0), 0)
        if code == EQUALIZE:
            below = tl.cumsum(counts, 0) - counts
            step = tl.max(tl.where(level == high, below, 0), 0) // 255
            table = tl.minimum((step // 2 + below) // tl.maximum(step, 1), 255)
            table = tl.where(step > 0, table, level)
        else:
            low = tl.min(tl.where(counts > 0, level, 255), 0)
            scale = tl.full([1], 255, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
            stretched = level.to(tl.float64) * scale - low.to(tl.float64) * scale
            table = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
            table = tl.where(high > low, table, level)
        tl.store(tables + row, table.to(tl.uint8))


@triton.jit
def _operated(job, params, table, mean, stop, p, inside):
    """int32 red, green, blue of pixels p after the first `stop` operations of a pass."""
    source, operation = tl.load(job).to(tl.pointer_type(tl.uint8)), params + tl.load(job + 4)
    height, width = tl.load(job + 2).to(tl.int32), tl.load(job + 3).to(tl.int32)
    code = tl.load(operation)
    y, x = p // width, p % width
    from_p, seen = p, inside
    if code == AFFINE:
        column = _moved(operation + 1, y, x)
        row = _moved(operation + 4, y, x)
        seen = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        from_p = row * width + column
    red, green, blue = _pixel(source, from_p, seen)
    if code == SHARPNESS:
        factor = tl.load(operation + 1).to(tl.float32, bitcast=True)
        inner = inside & (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
        s, t, u = 4 * red, 4 * green, 4 * blue
        for k in range(0, 9):
            near_r, near_g, near_b = _pixel(source, p + (k // 3 - 1) * width + k % 3 - 1, inner)
            s, t, u = s + near_r, t + near_g, u + near_b
        red = _blend(tl.where(inner, _thirteenth(s), red), red, factor)
        green = _blend(tl.where(inner, _thirteenth(t), green), green, factor)
        blue = _blend(tl.where(inner, _thirteenth(u), blue), blue, factor)
    for _ in range(0, stop):
        red, green, blue = _coloured(operation, table, mean, red, green, blue)
        operation += OPERATION_WORDS
    return red, green, blue


@triton.jit
def _moved(args, y, x):
    """a x + b y + c in 16.16 fixed point, rounded down."""
    return (tl.load(args + 2) + tl.load(args + 1) * y + tl.load(args) * x) >> 16


@triton.jit
def _coloured(operation, table, mean, red, green, blue):
    """Pixels after one operation that looks at nothing else; after others they stay."""
    code, first = tl.load(operation), tl.load(operation + 1)
    if code == POSTERIZE:
        red, green, blue = red & first, green & first, blue & first
    if code == SOLARIZE:
        red = tl.where(red >= first, 255 - red, red)
        green = tl.where(green >= first, 255 - green, green)
        blue = tl.where(blue >= first, 255 - blue, blue)
    if (code == EQUALIZE) | (code == AUTOCONTRAST):
        red = tl.load(table + red).to(tl.int32)
        green = tl.load(table + 256 + green).to(tl.int32)
        blue = tl.load(table + 512 + blue).to(tl.int32)
    if code == HUE:
        red, green, blue = _hue(red, green, blue, first)
    if (code == BRIGHTNESS) | (code == COLOR) | (code == CONTRAST):
        factor = first.to(tl.float32, bitcast=True)
        other = _grey(red, green, blue)
        if code == BRIGHTNESS:
            other = other * 0
        if code == CONTRAST:
            other = tl.load(mean) + other * 0
        red, green, blue = _blend(other, red, factor), _blend(other, green, factor), _blend(other, blue, factor)
    return red, green, blue


@triton.jit
def _pixel(source, p, seen):
    """int32 red, green, blue of pixel p; black where not `seen`."""
    red = tl.load(source + p * 3, mask=seen, other=0).to(tl.int32)
    green = tl.load(source + p * 3 + 1, mask=seen, other=0).to(tl.int32)
    blue = tl.load(source + p * 3 + 2, mask=seen, other=0).to(tl.int32)
    return red, green, blue


@triton.jit
def _grey(red, green, blue):
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


@triton.jit
def _blend(other, level, factor):
    x = other.to(tl.float32) + factor * (level.to(tl.float32) - other.to(tl.float32))
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32)


@triton.jit
def _thirteenth(x):
    """Rounded; thirteenths have no halves, so that integers do what Pillow does in float32."""
    return (2 * x + 13) // 26


@triton.jit
def _hue(red, green, blue, shift):
    """Through Pillow's 8-bit HSV and back; float32 and float64 where Pillow has them."""
    value = tl.maximum(red, tl.maximum(green, blue))
    spread = value - tl.minimum(red, tl.minimum(green, blue))
    spread32 = tl.maximum(spread, 1).to(tl.float32)
    r = tl.div_rn((value - red).to(tl.float32), spread32)
    g = tl.div_rn((value - green).to(tl.float32), spread32)
    b = tl.div_rn((value - blue).to(tl.float32), spread32)
    h = tl.where(
        green == value,
        (2 + r.to(tl.float64) - b.to(tl.float64)).to(tl.float32),
        (4 + g.to(tl.float64) - r.to(tl.float64)).to(tl.float32),
    )
    h = tl.where(red == value, b - g, h)
    turn = h.to(tl.float64) / 6 + 1
    turn = (turn - tl.floor(turn)).to(tl.float32).to(tl.float64)
    hue = (tl.where(spread == 0, 0, (turn * 255).to(tl.int32)) + shift) & 255
    saturation = tl.div_rn(spread.to(tl.float32), tl.maximum(value, 1).to(tl.float32))
    saturation = (saturation.to(tl.float64) * 255).to(tl.int32)

    sixth = hue.to(tl.float64) * 6 / 255
    sector = tl.floor(sixth)
    part = (sixth - sector).to(tl.float32).to(tl.float64)
    s, v = (saturation.to(tl.float64) / 255).to(tl.float32).to(tl.float64), value.to(tl.float64)
    low = (v * (1 - s) + 0.5).to(tl.int32)
    down = (v * (1 - s * part) + 0.5).to(tl.int32)
    up = (v * (1 - s * (1 - part)) + 0.5).to(tl.int32)
    k = sector.to(tl.int32) % 6
    red = tl.where((k == 0) | (k == 5), value, tl.where(k == 1, down, tl.where(k == 4, up, low)))
    green = tl.where((k == 1) | (k == 2), value, tl.where(k == 3, down, tl.where(k == 0, up, low)))
    blue = tl.where((k == 3) | (k == 4), value, tl.where(k == 5, down, tl.where(k == 2, up, low)))
    return red, green, blue


@triton.jit
def blur_kernel(jobs, params, ACROSS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """Three box blurs of each image along its rows, from the source to the result; or along its columns, from there to
    the spare memory. A program keeps to lines of its own, so that it waits for nobody but itself."""
    job = jobs + tl.program_id(1) * JOB
    result, spare = tl.load(job + 1).to(tl.pointer_type(tl.uint8)), tl.load(job + 7).to(tl.pointer_type(tl.uint8))
    height, width = tl.load(job + 2).to(tl.int32), tl.load(job + 3).to(tl.int32)
    args = params + tl.load(job + 4) + 1
    for line in range(tl.program_id(0) * LINES, height if ACROSS else width, tl.num_programs(0) * LINES):
        if ACROSS:
            source = tl.load(job).to(tl.pointer_type(tl.uint8))
            _box(source, result, args, line, height, width, ACROSS, LINES, BLOCK)
            tl.debug_barrier()
            _box(result, spare, args, line, height, width, ACROSS, LINES, BLOCK)
            tl.debug_barrier()
            _box(spare, result, args, line, height, width, ACROSS, LINES, BLOCK)
        else:
            _box(result, spare, args, line, height, width, ACROSS, LINES, BLOCK)
            tl.debug_barrier()
            _box(spare, result, args, line, height, width, ACROSS, LINES, BLOCK)
            tl.debug_barrier()
            _box(result, spare, args, line, height, width, ACROSS, LINES, BLOCK)


@triton.jit
def _box(source, result, args, line, height, width, ACROSS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """One box blur of LINES lines from `line` on, or as many as there are. The edge goes on outside."""
    radius, box, ends = tl.load(args), tl.load(args + 1), tl.load(args + 2)
    lines = tl.minimum((height if ACROSS else width) - line, LINES)
    length, step = (width, 1) if ACROSS else (height, width)
    for start in range(0, lines * length, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < lines * length
        along = p % width if ACROSS else p // lines
        edge = (line + p // width) * width if ACROSS else line + p % lines
        # Sums of 2^31 and more wrap around, and the byte at the top is right all the same.
        red = tl.full([BLOCK], 1 << 23, tl.int32)
        green, blue = red, red
        for by in range(-radius - 1, radius + 2):
            weight = box
            if (by < -radius) | (by > radius):
                weight = ends
            r, g, b = _pixel(source, edge + tl.minimum(tl.maximum(along + by, 0), length - 1) * step, inside)
            red, green, blue = red + r * weight, green + g * weight, blue + b * weight
        place = result + (edge + along * step) * 3
        tl.store(place, (red >> 24).to(tl.uint8), mask=inside)
        tl.store(place + 1, (green >> 24).to(tl.uint8), mask=inside)
        tl.store(place + 2, (blue >> 24).to(tl.uint8), mask=inside)


@dataclass(frozen=True)
class Pass:
    """A run of operations, or a blur, over some images of a batch."""

    jobs: np.ndarray
    """JOBs int64 [R, 8], those first that need a histogram"""
    counted: int
    """how many these are"""
    blur: bool


@dataclass(frozen=True)
class Resizes:
    """How the images of a batch are resized, and the memory that this takes."""

    jobs: np.ndarray
    """RESIZEs int64 [B, 8]"""
    scratch: int
    """bytes of the sums over the columns"""
    weights: int
    needed: bool
    """whether anything is resized at all"""


def render(images: Ragged, view: View, size: int, dtype: torch.dtype) -> Tensor:
    """As augment.render."""
    params, device, batch = view.params, images.device, len(images)
    operated = params["after"]["code"].any()
    before, addresses, kept = _passes(images.addresses, images.sizes, params, "before", 0, device)
    slots = sum(one.counted for one in before)
    flip = 0 if operated else params["flip"]  # operations come before the flip
    resizes = _resizes(addresses, images.sizes[:, 1], params, flip, size, view.cubic)
    arrays, after = [*(one.jobs for one in before), resizes.jobs], []
    if operated:
        squares = torch.empty(batch, size, size, 3, dtype=torch.uint8, device=device)
        addresses, sizes = squares.data_ptr() + squares.stride(0) * np.arange(batch), np.full((batch, 2), size)
        after, addresses, more = _passes(addresses, sizes, params, "after", slots, device)
        slots, kept = slots + sum(one.counted for one in after), kept + more
        finish = np.zeros((batch, RESIZE.value), np.int64)
        finish[:, 0], finish[:, 1], finish[:, 7] = addresses, 3 * size, params["flip"]
        arrays += [*(one.jobs for one in after), finish]

    words, *jobs = _upload([params.view(np.int32), *arrays], device)
    tables = (
        torch.zeros(slots, 3, 256, dtype=torch.int32, device=device),  # the histograms
        torch.empty(slots, 3, 256, dtype=torch.uint8, device=device),
        torch.empty(slots, dtype=torch.int32, device=device),
    )
    out = torch.empty(batch, size, size, 3, dtype=dtype, device=device)
    _operate(before, jobs, words, *tables)
    _resample(resizes, jobs[len(before)], words, view.cubic, squares if operated else out)
    if operated:
        _operate(after, jobs[len(before) + 1 :], words, *tables)
        _finish(jobs[-1], words, None, out)
    return out if dtype == torch.uint8 else out.permute(0, 3, 1, 2)


def _passes(
    addresses: np.ndarray, sizes: np.ndarray, params: np.ndarray, field: str, slot: int, device: torch.device
) -> tuple[list[Pass], np.ndarray, list[Tensor]]:
    """(passes of the operations in `field`, addresses of their results int64 [B], the memory that these lie in).

    Histograms get slots from `slot` on. Images that drew nothing stay where they are.
    """
    codes, addresses, sizes = params[field]["code"], addresses.copy(), sizes.astype(np.int64)
    phases, passes, memory = _phases(codes), [], []
    for phase in np.unique(phases[codes != views.NONE]):
        blur, mine = bool(phase % 2), (phases == phase) & (codes != views.NONE)
        counts = mine & np.isin(codes, COUNTED)
        rows, counted = np.flatnonzero(mine.any(1)), int(counts.any(1).sum())
        rows = rows[np.argsort(~counts[rows].any(1), kind="stable")]
        first, stop = mine[rows].argmax(1), codes.shape[1] - mine[rows, ::-1].argmax(1)
        room = _padded(3 * sizes[rows].prod(1))
        scratch = torch.empty((1 + blur) * int(room.sum()), dtype=torch.uint8, device=device)
        jobs = np.zeros((len(rows), JOB.value), np.int64)
        jobs[:, 0], jobs[:, 1], jobs[:, 2:4] = addresses[rows], scratch.data_ptr() + _starts(room), sizes[rows]
        jobs[:, 4] = (rows * PARAMS.itemsize + OFFSETS[field] + first * OPERATION.itemsize) // 4
        jobs[:, 5], jobs[:, 6] = counts[rows].argmax(1) - first, stop - first
        jobs[:counted, 7] = slot + np.arange(counted)
        if blur:
            jobs[:, 7] = jobs[:, 1] + room.sum()
        addresses[rows] = jobs[:, 7 if blur else 1]
        slot += counted
        passes.append(Pass(jobs, counted, blur))
        memory.append(scratch)
    return passes, addresses, memory


def _phases(codes: np.ndarray) -> np.ndarray:
    """int [B, turns]: the pass that each operation of codes [B, turns] belongs to; even ones are of operations, odd
    ones of blurs.

    An operation that looks at other pixels begins a pass, and one that needs a histogram is the only such in its pass.
    """
    phases, now = np.zeros(codes.shape, np.int64), np.zeros(len(codes), np.int64)
    begun, counted = np.zeros((2, len(codes)), bool)
    for turn, code in enumerate(codes.T):
        counts = np.isin(code, COUNTED)
        full = (begun & np.isin(code, GATHERED)) | (counted & counts)
        step = np.where(code == views.BLUR, 1 + now % 2, np.where(now % 2, 1, 2 * full)) * (code != views.NONE)
        now += step
        counted = counts | (counted & (step == 0))
        begun |= code != views.NONE
        phases[:, turn] = now
    return phases


def _operate(
    passes: list[Pass], jobs: list[Tensor], words: Tensor, histograms: Tensor, tables: Tensor, means: Tensor
) -> None:
    """Start the passes; `jobs` and the views' parameters `words` are those on the device."""
    for one, there in zip(passes, jobs, strict=False):
        count, sizes = len(one.jobs), one.jobs[:, 2:4]
        if one.blur:
            for across in (True, False):
                grid = _programs(sizes[:, 0 if across else 1], LINES), count
                blur_kernel[grid](there, words, ACROSS=across, LINES=LINES, BLOCK=PIXELS)
            continue
        pixels = sizes.prod(1)
        if one.counted:
            grid = _programs(pixels[: one.counted], COUNTED_PIXELS * COUNTED_TILES), one.counted
            statistics_kernel[grid](there, words, histograms, BLOCK=COUNTED_PIXELS, **FUSION)
            tables_kernel[(3, one.counted)](there, words, histograms, tables, means, **FUSION)
        operate_kernel[(_programs(pixels, PIXELS), count)](there, words, tables, means, BLOCK=PIXELS, **FUSION)


def _resizes(
    addresses: np.ndarray, widths: np.ndarray, params: np.ndarray, flip: np.ndarray | int, size: int, cubic: bool
) -> Resizes:
    widths, box = widths.astype(np.int64), params["box"].astype(np.int64)
    sides, resized, window = box[:, 2:], params["resized"].astype(np.int64), params["window"].astype(np.int64)
    same, scale = sides == resized, sides / resized
    support = np.maximum(scale, 1) * (2 if cubic else 1)
    weights = size * np.where(same, 1, np.ceil(2 * support).astype(np.int64) + 1).ravel()
    # Rows from the first tap of the window's first one to the last tap of its last, in the kernel's own arithmetic.
    centre = scale[:, :1] * (window[:, :1] + [0.5, size - 0.5])
    first = np.maximum((centre[:, 0] - support[:, 0] + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre[:, 1] + support[:, 0] + 0.5).astype(np.int64), sides[:, 0])
    first, stop = np.where(same[:, 0], window[:, 0], first), np.where(same[:, 0], window[:, 0] + size, stop)
    scratch, left = _padded(3 * size * (stop - first)), box[:, 1] + same.all() * window[:, 1]
    jobs = np.zeros((len(params), RESIZE.value), np.int64)
    jobs[:, 0], jobs[:, 1] = addresses + 3 * ((box[:, 0] + first) * widths + left), 3 * widths
    jobs[:, 2], jobs[:, 3], jobs[:, 4] = first, stop - first, _starts(scratch)
    jobs[:, 5:7], jobs[:, 7] = _starts(weights).reshape(-1, 2), flip
    return Resizes(jobs, int(scratch.sum()), int(weights.sum()), not same.all())


def _resample(resizes: Resizes, jobs: Tensor, words: Tensor, cubic: bool, out: Tensor) -> None:
    """Resized and finished, or of type uint8 unfinished, into `out` [B, S, S, 3]."""
    if not resizes.needed:
        return _finish(jobs, words, None, out)
    batch, size, device = len(out), out.shape[1], out.device
    weights = torch.empty(resizes.weights, dtype=torch.int16, device=device)
    first = torch.empty(batch, 2, size, dtype=torch.int32, device=device)
    shape = torch.empty(batch, 2, 2, dtype=torch.int32, device=device)
    scratch = torch.empty(resizes.scratch + BYTES, dtype=torch.uint8, device=device)
    weights_kernel[(2, batch)](jobs, words, weights, first, shape, size, CUBIC=cubic, BLOCK=OUTPUTS, **FUSION)
    programs = _programs(resizes.jobs[:, 3], TILE_ROWS, triton.cdiv(size, TILE_COLUMNS))
    columns_kernel[(programs, batch)](
        jobs, words, weights, first, shape, scratch, size, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS
    )
    _finish(jobs, words, (weights, first, shape, scratch), out)


def _finish(jobs: Tensor, words: Tensor, sums: tuple[Tensor, ...] | None, out: Tensor) -> None:
    """Sums over the rows, where there are sums over the columns, and the rest of a view, into `out` [B, S, S, 3]."""
    batch, size, device = len(out), out.shape[1], out.device
    programs = triton.cdiv(size, ROWS) * triton.cdiv(3 * size, BYTES)
    finish_kernel[(programs, batch)](
        jobs,
        words,
        *(sums or [None] * 4),
        noise_levels(device),
        normalisation(device, size),
        out,
        size,
        SUMS=sums is not None,
        NORMALISE=out.dtype != torch.uint8,
        ROWS=ROWS,
        BLOCK=BYTES,
        num_warps=2,
        **FUSION,
    )


def _programs(lengths: np.ndarray, length: int, times: int = 1) -> int:
    """The programs of an image whose tiles of `length` each take one, but in images far larger than most."""
    tiles = -(-lengths // length) * times
    return int(min(tiles.max(), 2 * np.ceil(np.median(tiles)), 65535))


def _padded(lengths: np.ndarray) -> np.ndarray:
    """To whole 16 bytes, which a thread can load at once."""
    return -(-lengths // 16) * 16


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of pieces that lie side by side begins."""
    return np.cumsum(lengths) - lengths


def _upload(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """To the device in one copy, without waiting for it; flat, each at an address that 16 divides."""
    room = _padded(np.array([array.nbytes for array in arrays]))
    host = torch.empty(int(room.sum()), dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer = host.numpy()
    for array, start in zip(arrays, _starts(room), strict=True):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.int64 if array.itemsize == 8 else torch.int32)
        for array, start in zip(arrays, _starts(room), strict=True)
    ]
