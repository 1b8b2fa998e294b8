"""A trained model for use in a script or a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.data.tokenizer import tokenize
from fastbd.kernels.augment import render
from fastbd.kernels.text_pack import PackedText, pack
from fastbd.kernels.views import plain
from fastbd.models import CLIP


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, with the transform and the tokenizer that make what its towers take."""

    model: CLIP

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.logit_scale.device

    def transform(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return an image, of Pillow or uint8 [H, W, 3], as a clean evaluation gives it to the model.

        float32 [3, image_size, image_size] on the CPU: turned upright, short side resized, middle cut out, normalised.
        Stack them for model.encode_image(). UserError for an array of another type or shape.
        """
        if isinstance(image, Image.Image):
            image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise UserError(f"the image is {pixels.dtype} {pixels.shape}: give one of Pillow, or uint8 [H, W, 3].")
        size = self.model.image_size
        return render([torch.from_numpy(pixels)], plain([pixels.shape[:2]], size), size)[0]

    def tokenizer(self, texts: Sequence[str] | str) -> PackedText:
        """Return captions, or one, as model.encode_text() takes them, on the model's device."""
        several = [texts] if isinstance(texts, str) else texts
        packed = pack(tokenize(several))
        return PackedText(*(part.to(self.device) for part in packed))
