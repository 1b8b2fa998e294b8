"""A linear classifier of image embeddings, for the methods that learn labels of the training images."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Head(nn.Module):
    """Linear layer [D] -> [C], and the labels, int64 [N] in 0..C-1, of the N training rows."""

    labels: Tensor

    def __init__(self, rows: int, dim: int, classes: int, device: torch.device):
        super().__init__()
        self.linear = nn.Linear(dim, classes, device=device)
        self.register_buffer("labels", torch.zeros(rows, dtype=torch.int64, device=device))

    @torch.no_grad()
    def learn(self, labels: np.ndarray) -> None:
        """Take other labels [N]."""
        self.labels.copy_(torch.from_numpy(labels))

    @torch.no_grad()
    def renew(self, noise: np.random.Generator, std: float = 0.01) -> None:
        """Weights N(0, std), biases 0."""
        weight = noise.normal(0, std, self.linear.weight.shape)
        self.linear.weight.copy_(torch.from_numpy(weight))
        self.linear.bias.zero_()

    def forward(self, embeddings: Tensor, places: Tensor, group: td.ProcessGroup | None = None) -> Tensor:
        """Mean cross-entropy [] of the labels at `places` [B] by embeddings [B, D]; of all processes with a group."""
        loss = cross_entropy(self.linear(embeddings.float()), self.labels[places])
        if group is not None:  # gradients are averaged elsewhere
            mean = loss.detach().clone()
            td.all_reduce(mean, group=group)
            loss = loss + (mean / group.size() - loss.detach())
        return loss
