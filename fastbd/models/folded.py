"""Copies of models for inference: each batch norm is part of the convolution before it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import nn

from fastbd.models.batchnorm import BatchNorm, batch_norms

M = TypeVar("M", bound=nn.Module)


class Folded(nn.Module, Generic[M]):
    """A copy of `live` on a device, as it was at the last refresh().

    refresh() writes into the same memory, so that what was compiled or captured stays good. A batch norm follows the
    convolution that its module has registered before it.
    """

    def __init__(self, live: M, device: torch.device):
        super().__init__()
        # A copy of a norm is this: it has nothing left to do.
        self.model = copy.deepcopy(live, {id(norm): nn.Identity() for norm in batch_norms(live)})
        self.model.to(device).eval().requires_grad_(False)
        self._folds, folded = [], set()
        for path, parent in live.named_modules():
            for name, convolution, norm in _norms(parent):
                own = self.model.get_submodule(path).get_submodule(name)
                assert isinstance(own, nn.Conv2d), "it is the convolution's copy"
                own.bias = nn.Parameter(own.weight.new_empty(own.out_channels), requires_grad=False)
                self._folds.append((own, convolution, norm))
                folded |= {id(own.weight), id(own.bias)}
        parameters = self.model.named_parameters()
        self._plain = {name: (own, live.get_parameter(name)) for name, own in parameters if id(own) not in folded}

    def is_fresh(self, names: Iterable[str]) -> bool:
        """Whether these weights, of no folded convolution, are still what they were; waits for the device."""
        pairs = (self._plain[name] for name in names)
        return all(torch.equal(own, live.to(own.device)) for own, live in pairs)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take in the weights as they are now; nothing waits for the device."""
        for own, live in self._plain.values():
            own.copy_(live)
        for own, convolution, norm in self._folds:
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            own.weight.copy_(convolution.weight * scale[:, None, None, None])
            own.bias.copy_(norm.bias - norm.running_mean * scale)


def _norms(parent: nn.Module) -> Iterator[tuple[str, nn.Conv2d, BatchNorm]]:
    """(name of the convolution, the convolution, norm) for each batch norm of a module."""
    before: tuple[str, nn.Conv2d] | None = None
    for name, child in parent.named_children():
        if isinstance(child, BatchNorm):
            assert before is not None, "a norm follows its convolution"
            yield *before, child
        elif isinstance(child, nn.Conv2d):
            before = name, child
