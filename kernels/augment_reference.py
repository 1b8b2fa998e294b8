"""Views in plain PyTorch, image by image: the CPU's way, and what the kernels are held to, bit for bit.

Every operation on uint8 [H, W, 3] gives the bytes that Pillow gives, its rounding included. Resizing is PyTorch's own
antialiased uint8 one, five times as fast as Pillow's: 99.7 % of the bytes are the same, the others one level off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbd.kernels import views
from fastbd.kernels.constants import noise_levels, normalisation
from fastbd.kernels.views import View


def render(images: Sequence[Tensor], view: View, size: int, dtype: torch.dtype) -> Tensor:
    """One view of each image: [B, 3, S, S] channels_last, normalised; for dtype uint8 the pixels [B, S, S, 3]."""
    out = torch.empty(len(images), size, size, 3, dtype=dtype)
    for image, params, place in zip(images, view.params, out, strict=True):
        square = _square(image, params, size, view.cubic)
        if dtype == torch.uint8:
            place.copy_(square)
        else:
            _finish(square, params, place)
    return out if dtype == torch.uint8 else out.permute(0, 3, 1, 2)


def _square(image: Tensor, params: np.void, size: int, cubic: bool) -> Tensor:
    """The view's pixels, uint8 [S, S, 3]."""
    for operation in params["before"]:
        image = operate(image, operation)
    top, left, height, width = params["box"].tolist()
    image = resize(image[top : top + height, left : left + width], tuple(params["resized"].tolist()), cubic)
    top, left = params["window"].tolist()
    image = image[top : top + size, left : left + size]
    for operation in params["after"]:
        image = operate(image, operation)
    return image.flip(1) if params["flip"] else image


def resize(image: Tensor, shape: tuple[int, int], cubic: bool) -> Tensor:
    """uint8 [H, W, 3] to [*shape, 3], antialiased: first the rows, then the columns, each rounded to a level."""
    if image.shape[:2] == shape:
        return image
    mode = "bicubic" if cubic else "bilinear"
    resized = F.interpolate(image.permute(2, 0, 1)[None], size=shape, mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0)


def _finish(image: Tensor, params: np.void, out: Tensor) -> None:
    """Noise, normalisation in float32, erasing; from uint8 [S, S, 3] into `out`."""
    size = len(image)
    scale, shift = normalisation(image.device)
    rows = image.reshape(size, 3 * size).float()
    if params["noise"][0]:
        rows = (rows + _noise(params["noise"], size)).clamp(max=255)
    # Whole rows at a time: broadcasting over a last axis of 3 is three times slower.
    out.copy_(rows.mul_(scale.repeat(size)).add_(shift.repeat(size)).view(size, size, 3))
    top, left, height, width = params["erase"].tolist()
    out[top : top + height, left : left + width] = 0


def _noise(noise: np.ndarray, size: int) -> Tensor:
    """Normal noise without its negative half, in levels, float32 [S, 3 S]."""
    amplitude = noise[:1].view(np.float32).item()
    key, other = noise[1:].astype(np.int64) & 0xFFFFFFFF
    words = torch.arange(3 * size * size) ^ int(key)
    words = _mix((_mix(words) + int(other)) & 0xFFFFFFFF)
    return noise_levels(words.device)[words >> 16].view(size, 3 * size) * amplitude


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words with small bias (C. Wellons' lowbias32), in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


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
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = torch.where(inside, y * width + x, height * width)
    pixels = torch.cat([image.reshape(-1, channels), image.new_zeros(1, channels)])  # the last one is black
    return pixels.index_select(0, index.flatten()).view(image.shape)


def posterize(image: Tensor, args: np.ndarray) -> Tensor:
    return image & int(args[0])


def solarize(image: Tensor, args: np.ndarray) -> Tensor:
    return torch.where(image >= int(args[0]), ~image, image)


def brightness(image: Tensor, args: np.ndarray) -> Tensor:
    return _blend(torch.zeros((), device=image.device), image, args)


def color(image: Tensor, args: np.ndarray) -> Tensor:
    return _blend(_grey(image)[..., None], image, args)


def contrast(image: Tensor, args: np.ndarray) -> Tensor:
    grey = _grey(image)
    mean = (2 * grey.sum() + grey.numel()) // (2 * grey.numel())  # rounded half up
    return _blend(mean, image, args)


def sharpness(image: Tensor, args: np.ndarray) -> Tensor:
    smooth = image.clone()  # the border stays as it is
    if min(image.shape[:2]) >= 3:
        x = image.short()
        columns = x[:-2] + x[1:-1] + x[2:]
        weighted = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * x[1:-1, 1:-1]
        smooth[1:-1, 1:-1] = (weighted / 13 + 0.5).to(torch.uint8)
    return _blend(smooth, image, args)


def equalize(image: Tensor, _: np.ndarray) -> Tensor:
    index = _table_index(image)
    return equalize_tables(_histogram(index)).flatten().index_select(0, index).view(image.shape)


def autocontrast(image: Tensor, _: np.ndarray) -> Tensor:
    index = _table_index(image)
    return autocontrast_tables(_histogram(index)).flatten().index_select(0, index).view(image.shape)


def hue(image: Tensor, args: np.ndarray) -> Tensor:
    """Through Pillow's 8-bit HSV and back."""
    values = image.amax(-1)
    spread = (values - image.amin(-1)).float()
    red, green, blue = ((values[..., None] - image).float() / spread[..., None]).unbind(-1)
    x = torch.where(image[..., 1] == values, (2 + red.double() - blue).float(), (4 + green.double() - red).float())
    x = torch.where(image[..., 0] == values, blue - green, x)
    x = (x.double() / 6 + 1).remainder(1).float()
    grey = spread == 0
    hues = (x.double() * 255).masked_fill(grey, 0).clamp(0, 255).to(torch.uint8) + int(args[0])
    saturation = ((spread / values).double() * 255).masked_fill(grey, 0).clamp(0, 255).to(torch.uint8)
    return _from_hsv(hues, saturation, values)


def _from_hsv(hues: Tensor, saturation: Tensor, values: Tensor) -> Tensor:
    sixth = hues.double() * 6 / 255
    sector = sixth.floor()
    fraction = (sixth - sector).float().double()
    s, v = (saturation.double() / 255).float().double(), values.double()
    low, down, up = ((v * (1 - k) + 0.5).floor().to(torch.uint8) for k in (s, s * fraction, s * (1 - fraction)))
    channels = ((values, up, low), (down, values, low), (low, values, up), (low, down, values), (up, low, values),
                (values, low, down))  # fmt: skip
    stacked = torch.stack([torch.stack(triple, -1) for triple in channels])
    sector = (sector.long() % 6)[None, ..., None].expand(1, *values.shape, 3)
    return stacked.gather(0, sector)[0]


def blur(image: Tensor, args: np.ndarray) -> Tensor:
    """Pillow's GaussianBlur: three box blurs along the rows, then three along the columns."""
    radius, box, ends = args[:3].tolist()
    for axis in (1, 1, 1, 0, 0, 0):
        lines = image.long()
        place = torch.arange(image.shape[axis], device=image.device)

        def shifted(by: int, lines=lines, place=place, axis=axis) -> Tensor:
            return lines.index_select(axis, (place + by).clamp(0, len(place) - 1))

        inner = sum(shifted(by) for by in range(-radius, radius + 1))
        outer = shifted(-radius - 1) + shifted(radius + 1)
        image = ((inner * box + outer * ends + (1 << 23)) >> 24).to(torch.uint8)
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
    red, green, blue = image.int().unbind(-1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(degenerate: Tensor, image: Tensor, args: np.ndarray) -> Tensor:
    """degenerate + factor (image - degenerate) in float32, clipped and truncated like Pillow's blend."""
    factor = args[:1].view(np.float32).item()
    degenerate = degenerate.float()
    return (degenerate + factor * (image.float() - degenerate)).clamp(0, 255).to(torch.uint8)


def _table_index(image: Tensor) -> Tensor:
    """int32 [H * W * 3]: where each value stands in flattened tables [3, 256]."""
    height, width, channels = image.shape
    channel = torch.arange(channels, dtype=torch.int32, device=image.device).repeat(width) * 256
    return image.reshape(height, width * channels).int().add_(channel).flatten()


def _histogram(index: Tensor) -> Tensor:
    return torch.bincount(index, minlength=3 * 256).view(3, 256)
