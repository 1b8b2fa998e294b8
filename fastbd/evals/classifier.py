"""The zero-shot classifier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastbd.evals.metrics import mean_by_class
from fastbd.kernels.text_tree import TextTree, tree

NODES = 1 << 15  # about as many in a forward, which bounds its memory; ImageNet's 80,000 prompts take 11


class Classifier:
    """classifier(embed_text) -> float32 [classes, D] on the device: the mean direction of a class's prompts.

    `prompts`: uint16 [classes * T, 77], the T prompts of a class in a row. `embed_text` gives raw embeddings [P, D].
    `tokens` that all prompts are: as trees, packed, and padded.
    """

    def __init__(self, prompts: np.ndarray, classes: int, device: torch.device):
        parts = min(classes, -(-len(tree(prompts).tokens) // NODES))
        chunks = np.array_split(prompts.reshape(classes, -1, prompts.shape[1]), parts)
        self.sizes = [len(chunk) for chunk in chunks]
        self.trees = [TextTree(*(x.to(device) for x in tree(np.concatenate(chunk)))) for chunk in chunks]
        self.tokens = sum(len(t.tokens) for t in self.trees), sum(len(t.nodes) for t in self.trees), prompts.size

    def __call__(self, embed_text: Callable[[TextTree], Tensor]) -> Tensor:
        parts = zip(self.trees, self.sizes, strict=True)
        return torch.cat([mean_by_class(embed_text(text), size) for text, size in parts])
