"""Checkpoints: written atomically, read without running anything that is in them."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastbd.errors import UserError
from fastbd.files import replacing


def save(path: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to a temporary name, then rename it."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free // 2**20} MiB free there)"
        raise UserError(
            f"the checkpoint {path} could not be written{free}: {str(error).splitlines()[0]}; "
            "make room, then go on with --resume, or begin again if the run has no folder yet."
        ) from error


class Snapshot:
    """A copy of a state in main memory, which training leaves alone while it is written.

    What lies on a GPU is copied into locked memory behind all that its current stream has to do, and before what comes
    later, while nothing waits here: wait() does. PyTorch keeps such memory, and the next snapshot is made in it.
    """

    def __init__(self, state: Any):
        self._events: dict[torch.device, torch.cuda.Event] = {}
        self._state = self._copy(state)
        for device, event in self._events.items():
            event.record(torch.cuda.current_stream(device))

    def wait(self) -> Any:
        """The copy, as soon as it is whole; from any thread."""
        for device, event in self._events.items():
            with torch.cuda.device(device):  # a thread begins on the first GPU, and would take memory of it
                event.synchronize()
        return self._state

    def _copy(self, state: Any) -> Any:
        if isinstance(state, torch.Tensor):
            return self._begin(state.detach()) if state.is_cuda else state.detach().to("cpu", copy=True)
        if isinstance(state, dict):
            return {key: self._copy(value) for key, value in state.items()}
        return [self._copy(value) for value in state] if isinstance(state, list) else state

    def _begin(self, x: torch.Tensor) -> torch.Tensor:
        """Of a tensor on a GPU; strides stay, as others would make PyTorch wait for a copy with them."""
        self._events.setdefault(x.device, torch.cuda.Event(blocking=True))
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


def load(path: Path) -> dict:
    """A checkpoint of ours, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        found = ", ".join(sorted(p.name for p in path.parent.glob("ckpt_*.pt"))) or "none"
        raise UserError(f"there is no checkpoint {path}; checkpoints there: {found}.") from None
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise UserError(
            f"{path} is damaged or no checkpoint of fastbd ({type(error).__name__}): name another with --checkpoint."
        ) from error
    if not isinstance(state, dict) or "fastbd" not in state:
        raise UserError(f"{path} is no checkpoint of fastbd: other weights are for pretrain --weights.")
    return state


def path_of(run: Path, which: str) -> Path:
    """The file of checkpoint `last`, or of an epoch's number, in a run folder."""
    return run / (
        "ckpt_last.pt" if which == "last" else f"ckpt_epoch_{int(which):03d}.pt" if which.isdigit() else which
    )


def random_state() -> dict:
    """State of torch's global generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict) -> None:
    """Put the generators back."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
