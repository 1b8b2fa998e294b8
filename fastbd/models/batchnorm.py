"""Batch norm over the whole batch, over groups of its images, or over the batches of all processes.

The published programs ran on 8 GPUs without SyncBN: their statistics were those of the images of one GPU, a group.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as td
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from fastbd.kernels.batchnorm import Norm, batch_norm, followed

_recording = True  # whether running statistics are kept; process-wide, as backward passes have threads of their own


class BatchNorm(nn.BatchNorm2d):
    """Group k of a batch is its images k * group to (k + 1) * group; 0: one group. Statistics are float32.

    With `processes` the groups are those of a batch that these processes share. Running statistics take in the mean
    over the groups, `rate` of it: the same expectation as one group's, and less noise.
    """

    group: int = 0
    processes: td.ProcessGroup | None = None
    rate: Tensor | None = None
    momentum: float
    running_mean: Tensor
    running_var: Tensor

    def forward(
        self, x: Tensor, shortcut: Tensor | None = None, relu: bool = False, pool: nn.AvgPool2d | None = None
    ) -> Tensor:
        """pool(relu(norm(x) + shortcut)) of x [N, C, H, W], each of them where it is asked for."""
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        elif self.group or self.processes:
            y = self._by_groups(x)
        else:
            momentum = self.momentum if _recording else 0.0
            norm = Norm(self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps)
            return batch_norm(x, norm, shortcut, relu, pool)
        return followed(y, shortcut, relu, pool)

    def _by_groups(self, x: Tensor) -> Tensor:
        """norm(x), with the statistics of groups, which may lie on several processes."""
        y = x.unflatten(0, (-1, self.group or len(x)))
        y = y.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(y, (1, 3, 4), correction=0)
        count = y[0].numel() // y.shape[2]
        if self.processes:
            own, count = mean, count * self.processes.size()
            mean = _average(mean, self.processes)
            var = _average(var + (own - mean) ** 2, self.processes)
        if _recording:
            assert self.rate is not None, "share_statistics() sets it with the groups"
            with torch.no_grad():
                self.running_mean.lerp_(mean.mean(0), self.rate)
                self.running_var.lerp_(var.mean(0) * (count / max(1, count - 1)), self.rate)
        scale = self.weight * (var + self.eps).rsqrt()
        y = torch.addcmul((self.bias - mean * scale)[:, None, :, None, None], y, scale[:, None, :, None, None])
        return y.flatten(0, 1).to(x.dtype)


def _average(x: Tensor, processes: td.ProcessGroup) -> Tensor:
    return collectives.all_reduce(x, "sum", processes) / processes.size()


@contextmanager
def unrecorded():
    """Forward passes that leave running statistics alone, as they see images that another pass sees too."""
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """All of a model's."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def share_statistics(model: nn.Module, images: int, processes: td.ProcessGroup | None = None) -> None:
    """Let a model's batch norms use groups of `images` (0: all there are), over `processes` together."""
    norms = batch_norms(model)
    rate = torch.tensor(norms[0].momentum, device=norms[0].weight.device) if norms else None
    for norm in norms:
        norm.group, norm.processes, norm.rate = images, processes, rate
