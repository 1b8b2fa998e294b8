"""Views as the published programs make them: operation after operation in Pillow, then ToTensor and Normalize."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from fastbd.kernels import views
from fastbd.kernels.constants import CLIP_MEAN, CLIP_STD

ENHANCERS = {
    views.BRIGHTNESS: ImageEnhance.Brightness,
    views.COLOR: ImageEnhance.Color,
    views.CONTRAST: ImageEnhance.Contrast,
    views.SHARPNESS: ImageEnhance.Sharpness,
}


def pillow_view(image: Image.Image, params: np.void, size: int) -> Tensor:
    """Operations before the resize, bicubic resize of the whole image, window, normalised float32 [3, S, S]."""
    for operation in params["before"]:
        image = operate(image, int(operation["code"]), operation["args"])
    height, width = params["resized"].tolist()
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = params["window"].tolist()
    return normalised(image.crop((left, top, left + size, top + size)))


def normalised(image: Image.Image | Tensor) -> Tensor:
    """torchvision's ToTensor and Normalize; of uint8 [H, W, 3]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return pixels.sub_(mean).div_(std)


def operate(image: Image.Image, code: int, args: np.ndarray) -> Image.Image:
    if code in ENHANCERS:
        return ENHANCERS[code](image).enhance(args[:1].view(np.float32).item())
    if code == views.AFFINE:
        a, b, c, d, e, f = (args / 65536).tolist()
        # Pillow takes coefficients of pixel corners; ours are of the middle of the first pixel.
        return image.transform(image.size, Image.Transform.AFFINE, (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2))
    if code == views.POSTERIZE:
        return ImageOps.posterize(image, int(args[0]).bit_count())
    if code == views.SOLARIZE:
        return ImageOps.solarize(image, int(args[0]))
    if code == views.EQUALIZE:
        return ImageOps.equalize(image)
    return ImageOps.autocontrast(image) if code == views.AUTOCONTRAST else image
