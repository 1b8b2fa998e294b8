"""Fine-tuning on clean pairs with the loss of --objective: the baseline of every cleaning study."""

from __future__ import annotations

from torch import nn

from fastbd.objectives import Objective, make_objective


def prepare(model: nn.Module) -> None:
    """Nothing: the poisoned weights are the start."""


def objective(config) -> Objective:
    """The plain objective."""
    return make_objective(config.objective, config)
