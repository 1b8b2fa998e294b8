"""Views on a GPU, bit for bit those of the reference.

Three launches make a view of a batch whose images need no operation: none for the operations, one for the weights of
the resize, one for all the rest (crop, resize, window, flip, noise, normalisation, erasing), from addresses of
decoded images to channels_last. Each turn of operations is a launch over the images that drew one, and another over
those of them that must be counted first.

Operations go over the stored image once, into scratch memory, and not into the taps of the resize: at 256 px to 224
a bicubic resize looks at each stored pixel fifteen times.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbd.kernels import augment_reference as reference
from fastbd.kernels import views
from fastbd.kernels.augment import Ragged
from fastbd.kernels.constants import noise_levels, normalisation
from fastbd.kernels.views import PARAMS, View

BLOCK = 256  # pixels a program works on; the first axis of a grid, as the others end at 65,535
FUSION = dict(enable_fp_fusion=False)  # a fused multiply-add rounds once where the reference rounds twice

AFFINE, POSTERIZE, SOLARIZE = (tl.constexpr(c) for c in (views.AFFINE, views.POSTERIZE, views.SOLARIZE))
BRIGHTNESS, COLOR, CONTRAST = (tl.constexpr(c) for c in (views.BRIGHTNESS, views.COLOR, views.CONTRAST))
SHARPNESS, HUE = tl.constexpr(views.SHARPNESS), tl.constexpr(views.HUE)
EQUALIZE, AUTOCONTRAST = tl.constexpr(views.EQUALIZE), tl.constexpr(views.AUTOCONTRAST)

# Where a field begins in a sample's words of the packed parameters.
WORDS = tl.constexpr(PARAMS.itemsize // 4)
BOX, RESIZED, WINDOW, FLIP, NOISE, ERASE = (
    tl.constexpr(PARAMS.fields[name][1] // 4) for name in ("box", "resized", "window", "flip", "noise", "erase")
)
# An image to operate on, int64: address of the source, of the result, height, width, code, six arguments.
JOB = tl.constexpr(11)


@triton.jit
def weights_kernel(params, weights, first, shape, size, CUBIC: tl.constexpr, K: tl.constexpr, BO: tl.constexpr):
    """Weights int32 [B, 2, S, K] of the taps of each row (axis 0) and column (axis 1) of the window, the first taps
    [B, 2, S], and (number of taps, bits after the point) [B, 2, 2]: PyTorch's 16-bit arithmetic for uint8."""
    b, axis = tl.program_id(0), tl.program_id(1)
    sample = params + b * WORDS
    n_in, n_out = tl.load(sample + BOX + 2 + axis), tl.load(sample + RESIZED + axis)
    start = tl.load(sample + WINDOW + axis)
    place = b * 2 + axis
    scale = n_in.to(tl.float64) / n_out.to(tl.float64)
    o, k = tl.arange(0, BO), tl.arange(0, K)[None, :]
    if n_in == n_out:
        for at in range(0, size, BO):
            inside = at + o < size
            tl.store(first + place * size + at + o, start + at + o, mask=inside)
            tl.store(
                weights + (place * size + at + o[:, None]) * K + k,
                (k == 0) * 16384 + o[:, None] * 0,
                mask=inside[:, None],
            )
        tl.store(shape + place * 2, 1)
        tl.store(shape + place * 2 + 1, 14)
    else:
        # The largest weight of the whole axis, not only of the window, sets how many bits there can be.
        largest = tl.zeros([BO], tl.float64)
        for at in range(0, n_out, BO):
            low, count, w = _weights(tl.minimum(at + o, n_out - 1), n_in, scale, k, CUBIC)
            largest = tl.maximum(largest, tl.max(w, 1))
        top = tl.max(largest, 0)
        bits, power = 0, top
        for _ in range(0, 22):
            power = power * 2
            bits = bits + (power + 0.5 < 32768).to(tl.int32)
        unit = tl.full([1, 1], 1, tl.int32) << bits
        most = 0
        for at in range(0, size, BO):
            inside = at + o < size
            low, count, w = _weights(tl.minimum(start + at + o, n_out - 1), n_in, scale, k, CUBIC)
            scaled = w * unit.to(tl.float64)
            rounded = tl.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(tl.int32)
            tl.store(first + place * size + at + o, low, mask=inside)
            tl.store(weights + (place * size + at + o[:, None]) * K + k, rounded, mask=inside[:, None])
            most = tl.maximum(most, tl.max(count, 0))
        tl.store(shape + place * 2, most)
        tl.store(shape + place * 2 + 1, bits)


@triton.jit
def _weights(o, n_in, scale, k, CUBIC: tl.constexpr):
    """(first tap [BO], number of taps [BO], weights float64 [BO, K]) of the outputs o [BO]."""
    reach = tl.maximum(scale, 1.0)
    support = reach * 2 if CUBIC else reach
    centre = scale * (o.to(tl.float64) + 0.5)
    low = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((centre + support + 0.5).to(tl.int32), n_in) - low
    x = tl.abs(((low[:, None] + k).to(tl.float64) - centre[:, None] + 0.5) / reach)
    if CUBIC:  # Keys' filter with a = -0.5
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        w = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    else:
        w = tl.maximum(1 - x, 0.0)
    w = tl.where(k < count[:, None], w, 0.0)
    return low, count, w / tl.sum(w, 1)[:, None]


@triton.jit
def resample_kernel(
    addresses, widths, params, weights, first, shape, levels, scale_shift, out,
    size, K: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From decoded (or operated) images to a view, [B, S, S, 3]; one program makes BLOCK pixels of one image."""
    b = tl.program_id(0)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < size * size
    oy, ox = p // size, p % size
    sample = params + b * WORDS
    source = tl.load(addresses + b).to(tl.pointer_type(tl.uint8))
    width = tl.load(widths + b)
    flipped = tl.where(tl.load(sample + FLIP) != 0, size - 1 - ox, ox)
    rows, columns = (b * 2 * size + oy), (b * 2 * size + size + flipped)
    y0, x0 = tl.load(first + rows, mask=inside, other=0), tl.load(first + columns, mask=inside, other=0)
    source += (tl.load(sample + BOX) * width + tl.load(sample + BOX + 1)) * 3
    last_y, last_x = tl.load(sample + BOX + 2) - 1, tl.load(sample + BOX + 3) - 1
    taps_y, bits_y = tl.load(shape + b * 4), tl.load(shape + b * 4 + 1)
    taps_x, bits_x = tl.load(shape + b * 4 + 2), tl.load(shape + b * 4 + 3)
    half_y, half_x = (1 << bits_y) >> 1, (1 << bits_x) >> 1

    red = tl.zeros([BLOCK], tl.int32)
    green, blue = red, red
    for i in range(0, taps_y):
        # A weight beyond the last tap is 0; its pixel is only kept within the image.
        line = tl.minimum(y0 + i, last_y) * width
        r, g, c = half_x + red * 0, half_x + red * 0, half_x + red * 0
        for j in range(0, taps_x):
            w = tl.load(weights + columns * K + j, mask=inside, other=0)
            pixel = source + (line + tl.minimum(x0 + j, last_x)) * 3
            r += w * tl.load(pixel, mask=inside, other=0).to(tl.int32)
            g += w * tl.load(pixel + 1, mask=inside, other=0).to(tl.int32)
            c += w * tl.load(pixel + 2, mask=inside, other=0).to(tl.int32)
        w = tl.load(weights + rows * K + i, mask=inside, other=0)
        red += w * _level(r >> bits_x)
        green += w * _level(g >> bits_x)
        blue += w * _level(c >> bits_x)
    red, green, blue = (
        _level((red + half_y) >> bits_y),
        _level((green + half_y) >> bits_y),
        _level((blue + half_y) >> bits_y),
    )

    place = out + (b.to(tl.int64) * size * size + p) * 3
    if NORMALISE:
        top, left = tl.load(sample + ERASE), tl.load(sample + ERASE + 1)
        height, breadth = tl.load(sample + ERASE + 2), tl.load(sample + ERASE + 3)
        kept = (oy < top) | (oy >= top + height) | (ox < left) | (ox >= left + breadth)
        amplitude = tl.load(sample + NOISE).to(tl.float32, bitcast=True)
        keys = sample + NOISE + 1
        _store(place, red, 0, p, amplitude, keys, levels, scale_shift, kept, inside)
        _store(place, green, 1, p, amplitude, keys, levels, scale_shift, kept, inside)
        _store(place, blue, 2, p, amplitude, keys, levels, scale_shift, kept, inside)
    else:
        tl.store(place, red.to(tl.uint8), mask=inside)
        tl.store(place + 1, green.to(tl.uint8), mask=inside)
        tl.store(place + 2, blue.to(tl.uint8), mask=inside)


@triton.jit
def _level(x):
    return tl.minimum(tl.maximum(x, 0), 255)


@triton.jit
def _store(place, level, c: tl.constexpr, p, amplitude, keys, levels, scale_shift, kept, inside):
    """Noise, normalisation, erasing and store of one channel."""
    x = level.to(tl.float32)
    if amplitude != 0:
        word = (p * 3 + c).to(tl.uint32) ^ tl.load(keys).to(tl.uint32, bitcast=True)
        word = _mix(_mix(word) + tl.load(keys + 1).to(tl.uint32, bitcast=True))
        x = tl.minimum(x + tl.load(levels + (word >> 16).to(tl.int32), mask=inside, other=0) * amplitude, 255)
    x = x * tl.load(scale_shift + c) + tl.load(scale_shift + 3 + c)
    tl.store(place + c, tl.where(kept, x, 0).to(place.dtype.element_ty), mask=inside)


@triton.jit
def _mix(x):
    """lowbias32, as in the reference."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def operate_kernel(jobs, tables, means, BLOCK: tl.constexpr):
    """One operation on each image, from its source to its result; `tables` uint8 [R, 3, 256], `means` int32 [R]."""
    r = tl.program_id(1)
    job = jobs + r * JOB
    height, width = tl.load(job + 2).to(tl.int32), tl.load(job + 3).to(tl.int32)
    start = tl.program_id(0) * BLOCK
    if start < height * width:
        p = start + tl.arange(0, BLOCK)
        inside = p < height * width
        source = tl.load(job).to(tl.pointer_type(tl.uint8))
        code, first = tl.load(job + 4).to(tl.int32), tl.load(job + 5).to(tl.int32)
        y, x = p // width, p % width
        from_p, seen = p, inside
        if code == AFFINE:
            column = (tl.load(job + 7).to(tl.int32) + tl.load(job + 6).to(tl.int32) * y + first * x) >> 16
            row = (
                tl.load(job + 10).to(tl.int32) + tl.load(job + 9).to(tl.int32) * y + tl.load(job + 8).to(tl.int32) * x
            ) >> 16
            seen = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            from_p = row * width + column
        red, green, blue = _pixel(source, from_p, seen)
        if code == POSTERIZE:
            red, green, blue = red & first, green & first, blue & first
        if code == SOLARIZE:
            red = tl.where(red >= first, 255 - red, red)
            green = tl.where(green >= first, 255 - green, green)
            blue = tl.where(blue >= first, 255 - blue, blue)
        if (code == EQUALIZE) | (code == AUTOCONTRAST):
            table = tables + r * 768
            red = tl.load(table + red).to(tl.int32)
            green = tl.load(table + 256 + green).to(tl.int32)
            blue = tl.load(table + 512 + blue).to(tl.int32)
        if code == HUE:
            red, green, blue = _hue(red, green, blue, first)
        if (code == BRIGHTNESS) | (code == COLOR) | (code == CONTRAST):
            factor = first.to(tl.float32, bitcast=True)
            other = _grey(red, green, blue)
            if code != COLOR:
                other = tl.load(means + r) + other * 0  # 0 for brightness
            red, green, blue = _blend(other, red, factor), _blend(other, green, factor), _blend(other, blue, factor)
        if code == SHARPNESS:
            factor = first.to(tl.float32, bitcast=True)
            inner = inside & (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
            s, t, u = 4 * red, 4 * green, 4 * blue
            for k in range(0, 9):
                near_r, near_g, near_b = _pixel(source, p + (k // 3 - 1) * width + k % 3 - 1, inner)
                s, t, u = s + near_r, t + near_g, u + near_b
            red = _blend(tl.where(inner, _thirteenth(s), red), red, factor)
            green = _blend(tl.where(inner, _thirteenth(t), green), green, factor)
            blue = _blend(tl.where(inner, _thirteenth(u), blue), blue, factor)
        place = tl.load(job + 1).to(tl.pointer_type(tl.uint8)) + p * 3
        tl.store(place, red.to(tl.uint8), mask=inside)
        tl.store(place + 1, green.to(tl.uint8), mask=inside)
        tl.store(place + 2, blue.to(tl.uint8), mask=inside)


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
    h = tl.where(green == value, (2 + r.to(tl.float64) - b.to(tl.float64)).to(tl.float32),
                 (4 + g.to(tl.float64) - r.to(tl.float64)).to(tl.float32))  # fmt: skip
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
def blur_kernel(jobs, ACROSS: tl.constexpr, BLOCK: tl.constexpr):
    """One box blur of each image along its rows, or its columns."""
    job = jobs + tl.program_id(1) * JOB
    height, width = tl.load(job + 2).to(tl.int32), tl.load(job + 3).to(tl.int32)
    start = tl.program_id(0) * BLOCK
    if start < height * width:
        p = start + tl.arange(0, BLOCK)
        inside = p < height * width
        source = tl.load(job).to(tl.pointer_type(tl.uint8))
        radius = tl.load(job + 5).to(tl.int32)
        box, ends = tl.load(job + 6).to(tl.int64), tl.load(job + 7).to(tl.int64)
        step, last = (1, width - 1) if ACROSS else (width, height - 1)
        along = p % width if ACROSS else p // width
        line = p - along * step
        red = tl.full([BLOCK], 1 << 23, tl.int64)
        green, blue = red, red
        for by in range(-radius - 1, radius + 2):
            weight = box
            if (by < -radius) | (by > radius):
                weight = ends
            r, g, b = _pixel(source, line + tl.minimum(tl.maximum(along + by, 0), last) * step, inside)
            red, green, blue = red + r * weight, green + g * weight, blue + b * weight
        place = tl.load(job + 1).to(tl.pointer_type(tl.uint8)) + p * 3
        tl.store(place, (red >> 24).to(tl.uint8), mask=inside)
        tl.store(place + 1, (green >> 24).to(tl.uint8), mask=inside)
        tl.store(place + 2, (blue >> 24).to(tl.uint8), mask=inside)


@triton.jit
def statistics_kernel(jobs, histograms, BLOCK: tl.constexpr):
    """Counts int32 [R, 4, 256] of red, green, blue and luma: whole numbers, so any order gives the same."""
    r = tl.program_id(1)
    job = jobs + r * JOB
    pixels = (tl.load(job + 2) * tl.load(job + 3)).to(tl.int32)
    start = tl.program_id(0) * BLOCK
    if start < pixels:
        p = start + tl.arange(0, BLOCK)
        inside = p < pixels
        red, green, blue = _pixel(tl.load(job).to(tl.pointer_type(tl.uint8)), p, inside)
        bins = histograms + r * 1024 + tl.arange(0, 256)
        tl.atomic_add(bins, tl.histogram(red, 256, mask=inside))
        tl.atomic_add(bins + 256, tl.histogram(green, 256, mask=inside))
        tl.atomic_add(bins + 512, tl.histogram(blue, 256, mask=inside))
        tl.atomic_add(bins + 768, tl.histogram(_grey(red, green, blue), 256, mask=inside))


def render(images: Ragged, view: View, size: int, dtype: torch.dtype) -> Tensor:
    """As augment.render."""
    params = view.params
    images = operate(images, params["before"])
    if params["after"]["code"].any():
        square = params.copy()
        square["flip"] = 0
        pixels = _resample(images, View(square, view.cubic), size, torch.uint8)
        images = operate(Ragged.of(pixels), params["after"])
        finish = views.plain(images.sizes, size).params
        for name in ("flip", "noise", "erase"):
            finish[name] = params[name]
        view = View(finish)
    out = _resample(images, view, size, dtype)
    return out if dtype == torch.uint8 else out.permute(0, 3, 1, 2)


def _resample(images: Ragged, view: View, size: int, dtype: torch.dtype) -> Tensor:
    """[B, S, S, 3]"""
    device, batch = images.device, len(images)
    params = _upload(view.params.view(np.int32).reshape(batch, -1), device)
    shrink = np.maximum(view.params["box"][:, 2:] / view.params["resized"], 1)
    taps = triton.next_power_of_2(int(np.ceil(2 * shrink.max() * (2 if view.cubic else 1))) + 1)
    weights = torch.empty(batch, 2, size, taps, dtype=torch.int32, device=device)
    first = torch.empty(batch, 2, size, dtype=torch.int32, device=device)
    shape = torch.empty(batch, 2, 2, dtype=torch.int32, device=device)
    out = torch.empty(batch, size, size, 3, dtype=dtype, device=device)
    outputs = max(1, 512 // taps)
    weights_kernel[(batch, 2)](params, weights, first, shape, size, CUBIC=view.cubic, K=taps, BO=outputs, **FUSION)
    resample_kernel[(batch, triton.cdiv(size * size, BLOCK))](
        _upload(images.addresses, device), _upload(images.sizes[:, 1], device), params, weights, first, shape,
        noise_levels(device), normalisation(device), out,
        size, K=taps, NORMALISE=dtype != torch.uint8, BLOCK=BLOCK, **FUSION,
    )  # fmt: skip
    return out


def operate(images: Ragged, operations: np.ndarray) -> Ragged:
    """The images after OPERATIONs [B, turns], one turn after the other; those that drew none stay where they are."""
    for turn in operations.T:
        rows = np.flatnonzero(turn["code"])
        blurred = rows[turn["code"][rows] == views.BLUR]
        rows = rows[turn["code"][rows] != views.BLUR]
        if len(rows):
            images = _operate(images, rows, turn[rows])
        if len(blurred):
            for across in (True, True, True, False, False, False):
                images, jobs, blocks = _jobs(images, blurred, turn[blurred])
                blur_kernel[(blocks, len(blurred))](jobs, ACROSS=across, BLOCK=BLOCK)
    return images


def _operate(images: Ragged, rows: np.ndarray, operations: np.ndarray) -> Ragged:
    """One operation, none of them a blur, on each of the images `rows`."""
    sizes = images.sizes[rows].astype(np.int64)
    images, jobs, blocks = _jobs(images, rows, operations)
    tables = torch.empty(len(rows), 3, 256, dtype=torch.uint8, device=images.device)
    means = torch.zeros(len(rows), dtype=torch.int32, device=images.device)
    code = operations["code"]
    if (counted := np.flatnonzero(np.isin(code, (views.CONTRAST, views.EQUALIZE, views.AUTOCONTRAST)))).size:
        histograms = torch.zeros(len(counted), 4, 256, dtype=torch.int32, device=images.device)
        picked = _upload(counted, images.device)
        statistics_kernel[(triton.cdiv(int(sizes[counted].prod(1).max()), 4 * BLOCK), len(counted))](
            jobs[picked], histograms, BLOCK=4 * BLOCK
        )
        counts = histograms.long()
        pixels, levels = counts[:, 3].sum(1), torch.arange(256, device=images.device)
        # Rounded half up. Rows that are not contrasts get a mean, and all get tables, that nobody reads.
        means[picked] = ((2 * (counts[:, 3] * levels).sum(1) + pixels) // (2 * pixels)).int()
        equalised = _upload(code[counted] == views.EQUALIZE, images.device).view(-1, 1, 1)
        counts = counts[:, :3]
        tables[picked] = torch.where(
            equalised, reference.equalize_tables(counts), reference.autocontrast_tables(counts)
        )
    operate_kernel[(blocks, len(rows))](jobs, tables, means, BLOCK=BLOCK, **FUSION)
    return images


def _jobs(images: Ragged, rows: np.ndarray, operations: np.ndarray) -> tuple[Ragged, Tensor, int]:
    """(the images with room for the results of `rows`, their JOBs on the device, blocks of pixels of the largest)."""
    sizes = images.sizes[rows].astype(np.int64)
    room = -(-3 * sizes.prod(1) // 16) * 16
    scratch = torch.empty(int(room.sum()), dtype=torch.uint8, device=images.device)
    jobs = np.empty((len(rows), JOB.value), np.int64)
    jobs[:, 0] = images.addresses[rows]
    jobs[:, 1] = scratch.data_ptr() + np.cumsum(room) - room
    jobs[:, 2:4] = sizes
    jobs[:, 4], jobs[:, 5:] = operations["code"], operations["args"]
    addresses = images.addresses.copy()
    addresses[rows] = jobs[:, 1]
    moved = Ragged(addresses, images.sizes, images.device, (images.owner, scratch))
    return moved, _upload(jobs, images.device), triton.cdiv(int(sizes.prod(1).max()), BLOCK)


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
