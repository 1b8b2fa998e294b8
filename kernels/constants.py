"""Small tables that kernels read."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def table(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values`, nested tuples, on the device: made once, because a copy from the host cannot be captured in a graph."""
    return torch.tensor(values, dtype=dtype, device=device)
