"""CleanCLIP (Bansal et al., arXiv 2303.03323): fine-tune on clean pairs with MMCL + SSL.

The SSL terms realign each modality by itself, which breaks what ties the trigger to the target.
"""

from __future__ import annotations

from torch import nn

from fastbd.objectives import Objective, make_objective


def prepare(model: nn.Module) -> None:
    """Nothing: the poisoned weights are the start."""


def objective(config) -> Objective:
    """Both losses, with the config's weights."""
    return make_objective("mmcl_ssl", config)
