"""A trained model for use in a script or a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastbd.data.tokenizer import clean, tokenize
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

        float32 [3, image_size, image_size] on the CPU: short side resized, middle cut out, normalised. Stack them for
        model.encode_image().
        """
        pixels = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
        size = self.model.image_size
        return render([torch.from_numpy(pixels)], plain([pixels.shape[:2]], size), size)[0]

    def tokenizer(self, texts: Sequence[str]) -> PackedText:
        """Return captions as model.encode_text() takes them, on the model's device."""
        packed = pack(tokenize([clean(text) for text in texts]))
        return PackedText(*(part.to(self.device) for part in packed))
