"""One process or several (started by torchrun): who am I, and who are the others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.base.memory import keep_freed

T = TypeVar("T")


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

    @property
    def group(self) -> td.ProcessGroup | None:
        """All processes, where there are several."""
        return td.group.WORLD if self.size > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.least(int(not flag)) == 0

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        td.all_reduce(value, td.ReduceOp.MIN)
        return int(value)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's."""
        if self.size > 1:
            for tensor in tensors:
                td.broadcast(tensor, 0)

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` gives, which the main rank does before the others; where it fails there, all end at once.

        The main rank raises its own error, the others a UserError that says the same.
        """
        if self.size == 1:
            return work()
        done: list[T] = []
        error = None
        if self.main:
            try:
                done.append(work())
            except Exception as caught:
                error = caught
        said = [error and (str(error) or type(error).__name__)]
        td.broadcast_object_list(said, 0)
        if error:
            raise error
        if said[0] is not None:
            raise UserError(said[0])
        return done[0] if self.main else work()

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.size > 1:
            td.barrier()


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
    else:
        keep_freed()
    if size > 1 and not td.is_initialized():
        # The other ranks wait while the first one evaluates; the default of ten minutes is too short for that.
        td.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=4))
    return World(rank, size, torch.device(device))


def device_of(name: str) -> torch.device:
    """The device of this machine that is called cpu or cuda:N. UserError where there is none."""
    found = re.fullmatch(r"cpu|cuda:(\d+)", name)
    if not found:
        raise UserError(f"there is no device {name}; give one of several GPUs by its number, such as cuda:1.")
    if found[1] and int(found[1]) >= torch.cuda.device_count():
        raise UserError(f"there is no {name}: torch sees {torch.cuda.device_count()} GPUs, counted from 0.")
    return torch.device(name)


def leave() -> None:
    """Take down the process group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()
