"""Progressive removal, an option of CleanCLIP's program (arXiv 2303.03323, --progressive): now and then drop the pairs
that fit best.

Poisoned pairs are learned first, as in anti-backdoor learning (Li et al., arXiv 2110.11571).
"""

from __future__ import annotations

import numpy as np
import torch

from fastbd.base import random
from fastbd.base.errors import UserError
from fastbd.config.flags import PretrainConfig
from fastbd.methods.method import Method, Training, cosines
from fastbd.methods.objectives import make_objective


class Progressive(Method):
    """After --remove-epochs the remove_fraction of the remaining pairs with the highest cosines is dropped for good.

    Epochs keep their length: some of the remaining pairs, drawn anew each time, come twice.
    """

    remaining: torch.Tensor

    def __init__(self, config: PretrainConfig):
        if not config.remove_epochs:
            raise UserError("--robust progressive has nothing to do: give --remove-epochs, such as 3 6 9.")
        super().__init__(make_objective(config.objective, config), config.objective)
        self.epochs, self.fraction = config.remove_epochs, config.remove_fraction

    def attach(self, training: Training) -> None:
        self.seed = training.seed
        self.hold("remaining", torch.ones(len(training.rows), dtype=torch.bool, device=training.device))

    def begin(self, epoch: int, training: Training) -> None:
        if epoch in self.epochs:
            remaining = self.remaining.nonzero()[:, 0]
            cosine = cosines(training, training.rows[remaining.cpu().numpy()])
            self.remaining[remaining[cosine.topk(int(self.fraction * len(remaining))).indices]] = False

    def rows(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        remaining = rows[self.remaining.cpu().numpy()]
        order = random.generator(self.seed, f"progressive-{epoch}").permutation(remaining)
        return np.sort(np.concatenate([remaining, np.resize(order, len(rows) - len(remaining))]))
