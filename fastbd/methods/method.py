"""What a method changes about a training: the weights that it begins with, the loss, the pairs of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn

from fastbd.base.errors import UserError
from fastbd.base.learning_rates import learning_rates
from fastbd.config.cards import load
from fastbd.config.imports import check_like
from fastbd.methods.objectives import Objective
from fastbd.models import CLIP

Losses = dict[str, Tensor]
CHUNK = 1 << 18  # pairs embedded at once
ASKED = ("attach", "prepare", "begin", "variant", "rows", "rates", "forward")
"""What a training calls of a method."""


class Embedded(NamedTuple):
    """The pairs of a step: raw embeddings [B, D] of each view of the images and of each version of the captions, the
    logarithm of the temperature's factor, their rows int64 [B], and the views themselves, [B, 3, S, S] each."""

    images: Sequence[Tensor]
    texts: Sequence[Tensor]
    log_scale: Tensor
    rows: Tensor
    views: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a method can learn of the training around it."""

    model: CLIP
    rows: np.ndarray
    """Pairs to train on, int64 [N], ascending."""
    flagged: np.ndarray
    """Those of them that are known to be poisoned, int64, ascending."""
    data_size: int
    """Pairs in the data, of which they are some."""
    labels: np.ndarray | None
    """Classes of all pairs in the data, int64 [data_size] from 0; None where it has none."""
    seed: int
    device: torch.device
    precision: str
    compiled: bool
    """The towers are compiled."""
    policies: tuple[str, ...]
    """Those that draw the image views of a step; the views of plain are always the same."""
    embed_images: Callable[[np.ndarray], Tensor]
    """Raw embeddings, float32 [N, D], of the base views of rows int64 [N], by the model as it is."""
    embed_texts: Callable[[np.ndarray], Tensor]
    """Those of the captions."""


class Method(nn.Module):
    """Trains with an objective, and changes nothing else.

    Parameters that a method has are trained with the model's; they and its buffers are saved with the model. What is
    neither must follow from the run's settings and the epoch.
    """

    known: Tensor
    frozen_norms = False
    """Batch norm keeps to the running statistics that the model came with."""
    fixed_scale = False
    """The temperature is not trained."""
    contrasts = True
    """The loss tells the pairs of a batch from one another, so that it needs two."""
    ahead = 0
    """Steps that the usual learning rates are ahead of the run, which sets it: an epoch's with --schedule shifted."""

    def __init__(self, objective: Objective, objective_name: str = "mmcl"):
        super().__init__()
        self.objective, self.objective_name = objective, objective_name

    def attach(self, training: Training) -> None:
        """Look at the model that a run starts from, before any of its weights is changed; again on each resume.

        A second training may follow in the same memory: everything is set anew, in place where it has been made.
        """

    def hold(self, name: str, value: Tensor, saved: bool = True) -> None:
        """A buffer with this value: a new one, or the one there is, written in place."""
        if (there := self._buffers.get(name)) is not None:
            there.copy_(value)
        else:
            self.register_buffer(name, value, persistent=saved)

    def know(self, rows: np.ndarray, device: torch.device) -> None:
        """The training's rows, int64 [N], ascending: what the N of a table belong to."""
        self.hold("known", torch.tensor(rows, device=device), saved=False)

    def places(self, rows: Tensor) -> Tensor:
        """Where among the known rows each of these is, int64 [B]."""
        return torch.searchsorted(self.known, rows)

    def prepare(self, model: CLIP) -> None:
        """Change the weights that a fresh run begins with."""

    def begin(self, epoch: int, training: Training) -> None:
        """Before an epoch, counted from 0: change parameters and buffers in place. Only the main process is asked."""

    @property
    def renewed(self) -> Sequence[nn.Parameter]:
        """Parameters that begin each epoch anew: the optimizer forgets them then."""
        return ()

    def variant(self, epoch: int) -> Hashable:
        """Epochs of one variant have the same kernels in their steps; asked before an epoch's first step."""

    def rows(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Those of an epoch, as many as there are in all."""
        return rows

    def rates(self, peak: float, *, warmup: int, total: int) -> Tensor:
        """Learning rates of all steps, float32 [total]."""
        return learning_rates(peak, warmup=warmup, total=total, ahead=self.ahead)

    def forward(
        self, embedded: Embedded, group: td.ProcessGroup | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Losses]:
        """(loss, parts), all scalars; `weights` as for Objective."""
        return self.objective(embedded.images, embedded.texts, embedded.log_scale, group, weights)


def make_method(kind: str, name: str, config) -> Method:
    """Return the method, or the defence where `kind` is robust, called `name`, with the flags of its verb.

    UserError where one from outside is not derived from Method, or a training could not call it.
    """
    made = load(kind, name)(config)
    if not isinstance(made, Method):
        said = f"makes a {type(made).__name__}: make it a class derived from fastbd.methods.method.Method."
        raise UserError(f"the {kind} {name} {said}")
    if not isinstance(getattr(made, "objective", None), Objective):
        said = 'let its __init__ call super().__init__(make_objective("mmcl", config), "mmcl"), or with another one.'
        raise UserError(f"the {kind} {name} has no objective: {said}")
    for asked in ASKED:
        check_like(f"{asked} of the {kind} {name}", getattr(made, asked), getattr(Method, asked))
    return made


def name_of(method: Method) -> str:
    """Return MODULE:NAME of a method's class, for messages."""
    return f"{type(method).__module__}:{type(method).__qualname__}"


def check_returned(method: Method, asked: str, value: Any, kind: type, count: int) -> None:
    """Raise a UserError where what a method from outside returned is not one of `kind` with so many numbers."""
    if not isinstance(value, kind) or value.shape != (count,) or (kind is Tensor and not value.isfinite().all()):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
        said = (
            f"returned a {type(value).__name__}{shape}: it must return a {kind.__name__} of shape ({count},), of finite"
        )
        raise UserError(f"{asked} of {name_of(method)} {said} numbers.")


def cosines(training: Training, rows: np.ndarray) -> Tensor:
    """Of the image and the caption of each pair, float32 [N], by the model as it is."""
    parts = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]
    return torch.cat([F.cosine_similarity(training.embed_images(x), training.embed_texts(x)) for x in parts])
