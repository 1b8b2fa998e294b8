"""Checkpoints: written atomically, read without running anything that is in them."""

from __future__ import annotations

import contextlib
import difflib
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from fastbd.base import archive
from fastbd.base.errors import UserError, machine_fault
from fastbd.base.files import replacing
from fastbd.base.signals import held_back


def save(path: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to a temporary name, then rename it.

    A signal is answered after it: within, torch puts an error of its own in the place of what a handler raises, or
    ends the process, as it goes on to write to a file that is closed.
    """
    try:
        with held_back(), replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError of its own after that of a full disk
        why = getattr(machine_fault(error) or error, "strerror", None) or str(error).splitlines()[0]
        with contextlib.suppress(OSError):
            why += f"; {shutil.disk_usage(path.parent).free // 2**20} MiB free there"
        raise UserError(
            f"the checkpoint {path} could not be written ({why}): make room, then go on with --resume, or begin again "
            "if the run has no folder yet."
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
    """Return a checkpoint of ours, on the CPU. UserError where it is not whole, with those beside it that are."""
    try:
        return _read(path)
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.exists():
            raise UserError(_no_folder(path.parent)) from None
        found = ", ".join(sorted(p.name for p in path.parent.glob("ckpt_*.pt"))) or "none; name the folder of a run"
        raise UserError(f"there is no checkpoint {path}; checkpoints there: {found}.") from None
    except _Unfit as error:
        others = [_name(other) for other in _newest_first(path.parent) if other != path and _is_whole(other)]
        remedy = "no other checkpoint there is whole, so give another run"
        if others:
            remedy = f"name another with --checkpoint (whole ones there: {', '.join(others)})"
        raise UserError(f"{path} {error}: {remedy}.") from None


def load_newest(run: Path) -> tuple[Path, dict, str]:
    """Return (file, state, what is wrong with a newer one or "") of the checkpoint from which a run can be resumed.

    That is the last one; where it is not whole, the newest whole one of an epoch. UserError where there is none.
    """
    wrong = ""
    for path in _newest_first(run):
        try:
            return path, _read(path), wrong
        except FileNotFoundError:
            wrong = wrong or f"there is no {path}"
        except _Unfit as error:
            wrong = wrong or f"{path} {error}"
    raise UserError(
        f"{wrong}, and {run} has no whole checkpoint of an epoch: move the folder away and start the run again."
    )


class _Unfit(Exception):
    """Why a file is not a checkpoint that can be used, as the end of a sentence that begins with its path."""


def _read(path: Path) -> dict:
    """Return the state in the file. Each member has had its checksum compared before torch is to read it."""
    try:
        with open(path, "rb") as file:
            archive.verify(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except archive.DamagedArchive as error:
        raise _Unfit(f"is damaged ({error})") from None
    except Exception as error:  # what is whole, and holds something else, can fail anywhere in the reader
        fault = error if isinstance(error, OSError) else machine_fault(error)
        if fault:  # which says nothing about the file: one before it must not take its place
            why = getattr(fault, "strerror", None) or "memory is short"
            raise UserError(f"{path} cannot be read ({why}): see to that, and run this again.") from error
        raise _Unfit(f"is not a checkpoint of fastbd ({type(error).__name__})") from error
    if not isinstance(state, dict) or "fastbd" not in state:
        raise _Unfit("is not a checkpoint of fastbd (give other weights to pretrain --weights)")
    return state


def _is_whole(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            archive.verify(file)
    except (OSError, archive.DamagedArchive):
        return False
    return True


def _newest_first(run: Path) -> list[Path]:
    """Return the files of a run's checkpoints: the last one, whether it is there or not, then those of epochs."""
    epochs = [path for path in run.glob("ckpt_epoch_*.pt") if _name(path).isdigit()]
    return [path_of(run, "last"), *sorted(epochs, key=lambda path: int(_name(path)), reverse=True)]


def _name(path: Path) -> str:
    """Return what --checkpoint calls a file: last, or the number of an epoch."""
    found = re.fullmatch(r"ckpt_epoch_0*(\d+)\.pt", path.name)
    return found[1] if found else path.stem.removeprefix("ckpt_")


def load_into(module: torch.nn.Module, state: dict, path: Path, whose: str) -> None:
    """Copy the state of a module, out of the file `path`, into it. UserError where its names or shapes are others."""
    expected = module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    given = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    for name in [*shapes, *(name for name in given if name not in shapes)]:
        if shapes.get(name) != given.get(name):
            was, now = (f"of shape {found[name]}" if name in found else "missing" for found in (given, shapes))
            raise UserError(
                f"{path} does not fit {whose} that it is said to hold: {name} is {was} in the file, {now} in the "
                "model: take the checkpoint and the config.json of one run."
            )
    module.load_state_dict(state)


def _no_folder(folder: Path) -> str:
    """Return the sentence about a run folder that does not exist, with a run beside it whose name is like it."""
    beside = [path.parent.name for path in folder.parent.glob("*/config.json")]
    near = difflib.get_close_matches(folder.name, beside, 1) or beside
    such = f", such as {folder.parent / near[0]}" if near else ""
    return f"there is no folder {folder}: give that of a run{such}."


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
