"""Copies of models for inference: in the package's own layers each batch norm is part of the convolution before it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from fastbd.models.batchnorm import BatchNorm

M = TypeVar("M", bound=nn.Module)


class Folded(nn.Module, Generic[M]):
    """A copy of `live` on a device, as it was at the last refresh().

    refresh() writes into the same memory, so that what was compiled or captured stays good. In the package's own
    modules a batch norm follows the convolution that is registered before it, and in a sequence the layer before it; of
    another module from outside nobody knows in which order it calls what it holds, so its norms stay.
    """

    def __init__(self, live: M, device: torch.device):
        super().__init__()
        pairs = [
            (f"{path}.{name}", convolution, norm)
            for path, parent in live.named_modules()
            for name, convolution, norm in _norms(parent)
        ]
        self.model = copy.deepcopy(live, {id(norm): _FoldedNorm() for _, _, norm in pairs})
        self.model.to(device).eval().requires_grad_(False)
        self._folds, folded = [], set()
        for path, convolution, norm in pairs:
            own = self.model.get_submodule(path)
            assert isinstance(own, nn.Conv2d), "it is the convolution's copy"
            own.bias = nn.Parameter(own.weight.new_empty(own.out_channels), requires_grad=False)
            self._folds.append((own, convolution, norm))
            folded |= {id(own.weight), id(own.bias)}
        given = dict([*live.named_parameters(), *live.named_buffers()])
        copied = [*self.model.named_parameters(), *self.model.named_buffers()]
        self._plain = {name: (own, given[name]) for name, own in copied if id(own) not in folded}

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
            bias = 0 if convolution.bias is None else convolution.bias
            own.bias.copy_(norm.bias + (bias - norm.running_mean) * scale)


class _FoldedNorm(nn.Module):
    """The copy of a batch norm that the convolution before it has taken in: what followed it is left.

    In place, as nothing else has hold of what a convolution gave.
    """

    def forward(
        self, x: Tensor, shortcut: Tensor | None = None, relu: bool = False, pool: nn.AvgPool2d | None = None
    ) -> Tensor:
        x = x if shortcut is None else x.add_(shortcut)
        x = x.relu_() if relu else x
        return x if pool is None else pool(x)


def _norms(parent: nn.Module) -> Iterator[tuple[str, nn.Conv2d, BatchNorm]]:
    """(name of the convolution, the convolution, norm) for each batch norm that a module calls right after it."""
    sequence, own = isinstance(parent, nn.Sequential), type(parent).__module__.startswith("fastbd.")
    before: tuple[str, nn.Conv2d] | None = None
    for name, child in parent.named_children():
        if isinstance(child, BatchNorm) and before and (sequence or own):
            yield *before, child
        if isinstance(child, nn.Conv2d):
            before = name, child
        elif sequence:
            before = None
