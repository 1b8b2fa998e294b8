"""A model's towers for evaluation: batch norms folded, large batches, compiled where training is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastbd.base.errors import Diverged, is_short_of_memory
from fastbd.kernels.constants import normalisation
from fastbd.kernels.text_pack import PackedText, pack
from fastbd.kernels.text_tree import TextTree
from fastbd.models.clip import CLIP, tower_of
from fastbd.models.folded import Folded
from fastbd.models.precision import autocast

PIXELS = {"cuda": 1024 * 224 * 224, "cpu": 128 * 64 * 64}  # of a batch; on a CPU its activations stay in the cache
CAPTIONS = 512  # of a batch
SMALLEST = 64  # part of such a batch that is tried where memory is short

Source = Callable[[slice], Tensor]


class Towers:
    """The towers of `model` as they were at the last refresh(), on a device that need not be the model's.

    `advance` is told how many images have been embedded.
    """

    def __init__(self, model: CLIP, *, precision: str, device: torch.device, compiled: bool = False):
        self.precision, self.device = precision, device
        self.folded = Folded(model, device)
        self.of_text = [name for name, _ in model.named_parameters() if tower_of(name) == "text"]
        self.text_version = 0
        self.advance: Callable[[int], None] = lambda images: None
        self._scale, self._shift = normalisation(device, self.folded.model.image_size)
        self._share = 1  # of the usual batch, as a denominator
        # Not captured: so large a batch outlasts the start of its kernels, and a graph would keep its memory.
        self._call = torch.compile(self._embed, dynamic=False) if compiled else self._embed
        self._map: Callable[[Callable[[int], Tensor], Iterable[int]], Iterable[Tensor]] = map
        if device.type == "cpu" and not compiled and (threads := torch.get_num_threads()) > 1:
            # A batch for each thread takes less time than all threads at each layer of a batch.
            self._map = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)).map
        self.folded.refresh()

    def refresh(self) -> None:
        """Take in the model's weights as they are now; text_version counts changes of the text tower."""
        self.text_version += not self.folded.is_fresh(self.of_text)
        self.folded.refresh()

    @property
    def log_scale(self) -> Tensor:
        return self.folded.model.logit_scale

    @torch.no_grad()
    def images(self, source: Tensor | Source, count: int = 0) -> Tensor:
        """Embeddings float32 [N, D] of images uint8 [N, S, S, 3], anywhere in memory, or N = `count` by their places.

        Diverged when one is not finite.
        """
        get, count = (source.__getitem__, len(source)) if isinstance(source, Tensor) else (source, count)
        while (embeddings := self._images(get, count)) is None:
            self._share *= 2
        return _finite(embeddings)

    def _images(self, get: Source, count: int) -> Tensor | None:
        """None where memory is too short for such batches: training has taken its part."""
        pixels = PIXELS[self.device.type] // self._share
        batch = min(count, max(1, pixels // self.folded.model.image_size**2))
        out, starts = None, [min(start, count - batch) for start in range(0, count, batch)]

        @torch.no_grad()  # which each thread has for itself
        def embed(first: int) -> Tensor:
            return self._call(get(slice(first, first + batch)).to(self.device, non_blocking=True))

        try:
            # The last batch reaches back, so that all have one shape.
            for first, embedded in zip(starts, self._map(embed, starts), strict=True):
                out = embedded.new_empty(count, embedded.shape[1]) if out is None else out
                out[first : first + batch] = embedded
                self.advance(min(batch, count - batch * (-(-first // batch))))
        except RuntimeError as error:
            if self._share >= SMALLEST or not is_short_of_memory(error):
                raise
            return None
        return out

    def _embed(self, images: Tensor) -> Tensor:
        pixels = (images.flatten(2) * self._scale + self._shift).view(images.shape).permute(0, 3, 1, 2)
        with autocast(self.precision, self.device):
            return self.folded.model.encode_image(pixels).float()

    @torch.no_grad()
    def captions(self, tokens: np.ndarray) -> Tensor:
        """Embeddings float32 [T, D] of captions uint16 [T, 77]."""
        return torch.cat([self.text(part) for part in self.packed(tokens)])

    def packed(self, tokens: np.ndarray) -> list[PackedText]:
        """Captions uint16 [T, 77] as text() takes them, on the device, a batch each."""
        parts = [tokens[first : first + CAPTIONS] for first in range(0, len(tokens), CAPTIONS)]
        return [PackedText(*(x.to(self.device) for x in pack(part))) for part in parts]

    @torch.no_grad()
    def text(self, text: PackedText | TextTree) -> Tensor:
        """Embeddings float32 [B, D]. Diverged when one is not finite."""
        with autocast(self.precision, self.device):
            return _finite(self.folded.model.encode_text(text).float())


def _finite(embeddings: Tensor) -> Tensor:
    if not embeddings.isfinite().all():  # which would look like a model that is perfectly cleaned
        raise Diverged("the model gives numbers that are not finite, so there is nothing to evaluate.")
    return embeddings
