"""Views in plain PyTorch, image by image: what the kernels and the C++ are held to, bit for bit, and the way without.

Every operation on uint8 [H, W, 3] gives the bytes that Pillow gives, its rounding included. Resizing is PyTorch's own
antialiased uint8 one, five times as fast as Pillow's: 99.5 % of the bytes are the same as there, the others one level
off, very few two. It takes rows before columns, as Pillow does up to version 12; 13 turns that around for some shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbd.kernels import views
from fastbd.kernels.constants import noise_levels, normalisation
from fastbd.kernels.views import View


def render(images: Sequence[Tensor], view: View, size: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """One view of each image: [B, 3, S, S] channels_last, normalised; for dtype uint8 the pixels [B, S, S, 3].

    Into `out`, [B, S, S, 3], where it is given.
    """
    if out is None:
        out = torch.empty(len(images), size, size, 3, dtype=dtype)
    if dtype != torch.uint8 and _only_normalised(images, view, size):
        for image, place in zip(images, out, strict=True):
            normalise(image, place)
        return out.permute(0, 3, 1, 2)
    for image, params, place in zip(images, view.params, out, strict=True):
        square = _square(image, params, size, view.cubic)
        if dtype == torch.uint8:
            place.copy_(square)
        else:
            _finish(square, params, place)
    return out if dtype == torch.uint8 else out.permute(0, 3, 1, 2)


def _only_normalised(images: Sequence[Tensor], view: View, size: int) -> bool:
    """Whether the images are their views already, as base views that are kept."""
    fit = all(image.shape[:2] == (size, size) for image in images)
    return fit and view.params.tobytes() == _plain(size) * len(images)


@cache
def _plain(size: int) -> bytes:
    """The parameters of the plain view of an image that has the view's size."""
    return views.plain([(size, size)], size).params.tobytes()


def normalise(images: Tensor, out: Tensor, noise: Tensor | None = None) -> None:
    """With CLIP's mean and std: uint8 [..., S, S, 3] into `out` of the same shape, computed in float32.

    `noise`, levels [..., S, 3 S], is added before.
    """
    scale, shift = normalisation(images.device, images.shape[-2])
    rows = images.flatten(-2)
    levels = out.flatten(-2) if out.dtype == torch.float32 else torch.empty_like(rows, dtype=torch.float32)
    levels.copy_(rows)
    if noise is not None:
        levels.add_(noise).clamp_(max=255)
    levels.mul_(scale).add_(shift)
    if out.dtype != torch.float32:
        out.copy_(levels.view(out.shape))


def _square(image: Tensor, params: np.void, size: int, cubic: bool) -> Tensor:
    """The view's pixels, uint8 [S, S, 3]."""
    image = _operated(image, params["before"])
    height, width = image.shape[:2]
    if (box := params["box"].tolist()) != [0, 0, height, width]:
        top, left, height, width = box
        image = image[top : top + height, left : left + width]
    image = resize(image, tuple(params["resized"].tolist()), cubic)
    if image.shape[:2] != (size, size):
        top, left = params["window"].tolist()
        image = image[top : top + size, left : left + size]
    image = _operated(image, params["after"])
    return image.flip(1) if params["flip"] else image


def _operated(image: Tensor, operations: np.ndarray) -> Tensor:
    for k in np.flatnonzero(operations["code"]):
        image = operate(image, operations[k])
    return image


def resize(image: Tensor, shape: tuple[int, int], cubic: bool) -> Tensor:
    """uint8 [H, W, 3] to [*shape, 3], antialiased: first the rows, then the columns, each rounded to a level."""
    if image.shape[:2] == shape:
        return image
    mode = "bicubic" if cubic else "bilinear"
    # Only what is channels_last in every stride, the batch's too, takes PyTorch's way for interleaved channels: half
    # the time.
    channels_last = image.contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(channels_last, size=shape, mode=mode, antialias=True).permute(0, 2, 3, 1)[0]


def _finish(image: Tensor, params: np.void, out: Tensor) -> None:
    """Noise, normalisation in float32, erasing; from uint8 [S, S, 3] into `out`."""
    normalise(image, out, _noise(params["noise"], len(image)) if params["noise"][0] else None)
    if params["erase"][2]:
        top, left, height, width = params["erase"].tolist()
        out[top : top + height, left : left + width] = 0


def _noise(noise: np.ndarray, size: int) -> Tensor:
    """Normal noise without its negative half, in levels, float32 [S, 3 S]."""
    amplitude = noise[:1].view(np.float32).item()
    key, other = noise[1:].tolist()
    words = torch.arange(3 * size * size, dtype=torch.int32) ^ key
    words = _mix(_mix(words).add_(other))
    return noise_levels(words.device).index_select(0, _shift(words, 16)).view(size, 3 * size).mul_(amplitude)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words with small bias (C. Wellons' lowbias32), in int32 that wraps around."""
    x = (x ^ _shift(x, 16)).mul_(0x7FEB352D)
    x = (x ^ _shift(x, 15)).mul_(0x846CA68B - (1 << 32))
    return x ^ _shift(x, 16)


def _shift(x: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def operate(image: Tensor, operation: np.void) -> Tensor:
    """uint8 [H, W, 3] to a new one of the same shape."""
    apply = OPERATIONS.get(int(operation["code"]))
    return apply(image, operation["args"]) if apply else image


def affine(image: Tensor, args: np.ndarray) -> Tensor:
    """Each pixel from the nearest one at x' = a x + b y + c and y' likewise, in Pillow's 16.16 fixed point."""
    height, width, channels = image.shape
    row = torch.arange(width, dtype=torch.int32, device=image.device)
    column = torch.arange(height, dtype=torch.int32, device=image.device)[:, None]
    a, b, c, d, e, f = args.tolist()
    x, y = (c + b * column + a * row) >> 16, (f + e * column + d * row) >> 16
    # With a black border, places outside need no mask: comparing takes longer than all else here.
    bordered = image.new_zeros(height + 2, width + 2, channels)
    bordered[1:-1, 1:-1] = image
    index = y.clamp_(-1, height).add_(1).mul_(width + 2).add_(x.clamp_(-1, width).add_(1))
    return bordered.view(-1, channels).index_select(0, index.flatten()).view(image.shape)


def posterize(image: Tensor, args: np.ndarray) -> Tensor:
    return image & int(args[0])


def solarize(image: Tensor, args: np.ndarray) -> Tensor:
    below = (image.short() - int(args[0])) >> 15  # all bits or none; six times as fast as comparing
    return image ^ below.bitwise_not_().to(torch.uint8)


def brightness(image: Tensor, args: np.ndarray) -> Tensor:
    return _blend(0, image, args)


def color(image: Tensor, args: np.ndarray) -> Tensor:
    grey = _grey(image).to(torch.uint8)
    return _blend(torch.stack([grey, grey, grey], -1).float(), image, args)  # broadcasting is slower


def contrast(image: Tensor, args: np.ndarray) -> Tensor:
    grey = _grey(image)
    mean = (2 * int(grey.sum()) + grey.numel()) // (2 * grey.numel())  # rounded half up
    return _blend(mean, image, args)


def sharpness(image: Tensor, args: np.ndarray) -> Tensor:
    smooth = image.clone()  # the border stays as it is
    if min(image.shape[:2]) >= 3:
        x = image.short()
        columns = x[:-2] + x[1:-1] + x[2:]
        weighted = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * x[1:-1, 1:-1]
        smooth[1:-1, 1:-1] = (weighted / 13).add_(0.5).int()
    return _blend(smooth.float(), image, args)


def equalize(image: Tensor, _: np.ndarray) -> Tensor:
    return _look_up(equalize_tables(_histogram(image)), image)


def autocontrast(image: Tensor, _: np.ndarray) -> Tensor:
    return _look_up(autocontrast_tables(_histogram(image)), image)


def hue(image: Tensor, args: np.ndarray) -> Tensor:
    """Through Pillow's 8-bit HSV and back."""
    planes = _planes(image)
    value, spread = planes.amax(0), planes.amax(0) - planes.amin(0)
    # Where grey, dividing by 1 instead of 0 leaves hue and saturation 0, as they must be.
    red, green, blue = (value - planes).float() / spread.clamp(min=1)
    x = torch.where(planes[1] == value, (2 + red.double()).sub_(blue).float(), (4 + green.double()).sub_(red).float())
    x = torch.where(planes[0] == value, blue - green, x)
    x = x.double().div_(6).add_(1).frac_().float()
    hues = x.double().mul_(255).int().add_(int(args[0])).to(torch.uint8)
    saturation = (spread.float() / value.clamp(min=1)).double().mul_(255).int().to(torch.uint8)
    return _from_hsv(hues, saturation, value)


def _from_hsv(hues: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """uint8 [H, W] each to [H, W, 3]."""
    sixth = hues.double().mul_(6).div_(255)
    sector = sixth.int()
    fraction = sixth.sub_(sector).float().double()
    s, v = saturation.double().div_(255).float().double(), value.double()
    low, down, up = ((1 - k).mul_(v).add_(0.5).int().to(torch.uint8) for k in (s, s * fraction, s * (1 - fraction)))
    levels = torch.stack([value, down, low, up]).flatten()
    place = torch.arange(value.numel(), dtype=torch.int32, device=value.device)

    def channel(*which: int) -> Tensor:
        """Which of the four levels it has in each sector; the seventh (hue 255) is the first again."""
        starts = torch.tensor(which, dtype=torch.int32, device=value.device) * value.numel()
        return levels.index_select(0, starts.index_select(0, sector.flatten()).add_(place))

    red, green, blue = channel(0, 1, 2, 2, 3, 0, 0), channel(3, 0, 0, 1, 2, 2, 3), channel(2, 2, 3, 0, 0, 1, 2)
    return torch.stack([red, green, blue], -1).view(*value.shape, 3)


def blur(image: Tensor, args: np.ndarray) -> Tensor:
    """Pillow's GaussianBlur: three box blurs along the rows, then three along the columns. The edge goes on outside."""
    radius, box, ends = args[:3].tolist()
    for axis in (1, 1, 1, 0, 0, 0):
        length = image.shape[axis]
        before, after = (image.narrow(axis, at, 1) for at in (0, length - 1))
        lines = torch.cat([*[before] * (radius + 1), image, *[after] * (radius + 1)], axis).int()
        first, *middle, last = (lines.narrow(axis, by, length) for by in range(2 * radius + 3))
        inner, outer = sum(middle[1:], start=middle[0]), first + last
        # Sums of 2^31 and more wrap around, and the byte at the top is right all the same.
        image = (inner.mul(box).add_(outer.mul_(ends)).add_(1 << 23) >> 24).to(torch.uint8)
    return image


OPERATIONS = {
    views.AFFINE: affine,
    views.POSTERIZE: posterize,
    views.SOLARIZE: solarize,
    views.BRIGHTNESS: brightness,
    views.COLOR: color,
    views.CONTRAST: contrast,
    views.SHARPNESS: sharpness,
    views.EQUALIZE: equalize,
    views.AUTOCONTRAST: autocontrast,
    views.HUE: hue,
    views.BLUR: blur,
}


def equalize_tables(histogram: Tensor) -> Tensor:
    """uint8 [..., 256] that makes each histogram int64 [..., 256] as flat as Pillow's equalize does."""
    below = histogram.cumsum(-1) - histogram
    levels = torch.arange(256, device=histogram.device)
    brightest = (levels * (histogram > 0)).amax(-1, keepdim=True)
    step = below.gather(-1, brightest) // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table, levels).to(torch.uint8)


def autocontrast_tables(histogram: Tensor) -> Tensor:
    """uint8 [..., 256] that stretches the levels in use, of histogram int64 [..., 256], over all."""
    levels = torch.arange(256, device=histogram.device)
    there = histogram > 0
    low = torch.where(there, levels, 255).amin(-1, keepdim=True).double()
    high = torch.where(there, levels, 0).amax(-1, keepdim=True).double()
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # `255 / x` would be 255 * (1 / x), rounded twice
    table = (levels * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, table, levels).to(torch.uint8)


def _grey(image: Tensor) -> Tensor:
    """Pillow's luma (ITU-R 601 in 16-bit fixed point), int32 [H, W]."""
    red, green, blue = _planes(image).int()
    return red.mul_(19595).add_(green.mul_(38470)).add_(blue.mul_(7471)).add_(32768) >> 16


def _planes(image: Tensor) -> Tensor:
    """[3, H, W], contiguous: arithmetic on single channels is slow where they lie side by side."""
    return image.permute(2, 0, 1).contiguous()


def _blend(degenerate: Tensor | int, image: Tensor, args: np.ndarray) -> Tensor:
    """degenerate + factor (image - degenerate) in float32, clipped and truncated like Pillow's blend."""
    factor = args[:1].view(np.float32).item()
    blended = image.float().sub_(degenerate).mul_(factor).add_(degenerate).clamp_(0, 255)
    return blended.int().to(torch.uint8)  # straight to uint8 takes three times as long


def _histogram(image: Tensor) -> Tensor:
    """int64 [3, 256]"""
    return torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in _planes(image)])


def _look_up(tables: Tensor, image: Tensor) -> Tensor:
    """Each value's entry in its channel's table, of [3, 256]."""
    height, width, channels = image.shape
    channel = torch.arange(channels, dtype=torch.int32, device=image.device).repeat(width) * 256
    index = image.reshape(height, width * channels).int().add_(channel)
    return tables.flatten().index_select(0, index.flatten()).view(image.shape)
