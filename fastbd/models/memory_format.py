"""The order in which a model's weights lie in memory."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def channels_last(model: M, device: torch.device | None = None) -> M:
    """Return the model, its convolutions' weights with the channels last; on the device where one is given."""
    return laid_out(model, torch.channels_last, device)


def laid_out(model: M, memory_format: torch.memory_format, device: torch.device | None = None) -> M:
    """Return the model, its convolutions' weights in that order; on the device where one is given."""
    # PyTorch's hints leave memory_format out.
    return model.to(device, memory_format=memory_format)  # pyright: ignore[reportCallIssue]
