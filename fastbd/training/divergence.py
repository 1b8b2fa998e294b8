"""What is said and kept of a training whose loss is no longer finite, so that it can be looked into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastbd.base import files
from fastbd.base.errors import UserError
from fastbd.training.readback import NotFinite

FILE = "diverged.json"  # in the run's folder


def check_weights(weights: Mapping[str, Tensor], source: object) -> None:
    """Raise a UserError that names the first tensor of the weights, which `source` gave, that is not finite."""
    numbers = {name: value for name, value in weights.items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in numbers.values()]).tolist()
    if bad := [name for name, good in zip(numbers, finite, strict=True) if not good]:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"the weights of {source} are not finite ({bad[0]}{more}), so nothing can be trained from them: take other "
            "ones, such as an earlier checkpoint."
        )


def record(folder: Path, broken: NotFinite, *, epoch: float, lr: float, data: str, rows: np.ndarray) -> Path:
    """Write what is known of the step to a file and return its path; the resumed run comes to the same step again.

    `rows` are those of the step's whole batch, places in `data`.
    """
    losses = {name: value if math.isfinite(value) else str(value) for name, value in broken.losses.items()}
    about = {"step": broken.step, "epoch": epoch, "lr": lr, "losses": losses, "not_finite": _not_finite(broken)}
    files.write_json(folder / FILE, {**about, "data": data, "rows": rows.tolist()})
    return folder / FILE


def sentence(broken: NotFinite, *, moved: bool, lr: float, path: Path) -> str:
    """Return a sentence of what happened, its likely cause and the file; `moved`: an update has changed the weights."""
    terms = ", ".join(_not_finite(broken))
    said = f"{broken}" + (f" (not finite: {terms})" if terms else "")
    if moved:
        return f"{said}: the run diverged; lower --lr ({lr:g}), or look at the batch's rows, in {path}."
    return (
        f"{said}, and no update has changed the weights yet, which are finite: look at the factors of the loss, such "
        f"as --mmcl-weight, and at the batch's rows, in {path}."
    )


def _not_finite(broken: NotFinite) -> list[str]:
    """The terms of the loss, or the temperature's factor, that are not finite."""
    return [name for name, value in broken.losses.items() if name != "loss" and not math.isfinite(value)]
