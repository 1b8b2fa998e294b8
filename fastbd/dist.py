"""One process or several (started by torchrun): who am I, and gathering with gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as td
from torch import Tensor

from fastbd.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among `size`."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """[B, D] of every rank, joined to [size * B, D] in rank order; differentiable."""
        return _Gather.apply(x, self) if self.size > 1 else x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        td.all_reduce(value, td.ReduceOp.MAX)
        return bool(value)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.size > 1:
            td.barrier()


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients that all ranks have for the local rows.

    Every rank computes the whole loss, so the sum is `size` times the true gradient, and DDP's mean makes it exact.
    """

    @staticmethod
    def forward(ctx, x: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, len(x)
        out = [torch.empty_like(x) for _ in range(world.size)]
        td.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        td.all_reduce(gradient)
        start = ctx.world.rank * ctx.rows
        return gradient[start : start + ctx.rows], None


def join(device: str) -> World:
    """The world that torchrun described in the environment, or a single process."""
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise UserError(f"--device {device} is unknown; give auto, cpu or cuda.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}, but torch sees no GPU here; 'python -m fastbd doctor' says why.")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and size > 1:
        raise UserError(f"--device {device} would put all {size} processes on one GPU: give --device cuda.")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if size > 1 and not td.is_initialized():
        # The other ranks wait while the first one evaluates; the default of ten minutes is too short for that.
        td.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=4))
    return World(rank, size, torch.device(device))


def leave() -> None:
    """Take down the process group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()
