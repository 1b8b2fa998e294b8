"""Weights that other programs have published, taken into a model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.models.clip import CLIP, MODELS, tower_of
from fastbd.models.layouts import weights_in
from fastbd.models.origin import Origin, origin, other_mean
from fastbd.models.weight_files import damaged, read_file, weights_file

_PARTS = {"image": "the image tower", "text": "the text tower", "both": "the temperature logit_scale"}


class Weights(NamedTuple):
    """Weights in a file, by the names of CLIP's parameters and buffers."""

    path: Path
    tensors: dict[str, Tensor]
    origin: Origin
    notes: tuple[str, ...]
    """Choices that were made, and doubts, each a clause."""

    def said(self, activation: str | None) -> str:
        """Return a line on the activation that is taken, choices and doubts; `activation`: the one asked for."""
        taken, why = (activation, "as asked for") if activation else self.origin[:2]
        other = {"quickgelu": "gelu", "gelu": "quickgelu"}[taken]
        return "; ".join(
            [f"{self.path}: activation {taken}, {why}; --activation {other} takes the other one", *self.notes]
        )

    def load_into(self, model: CLIP) -> None:
        """Copy the weights into the model, cast to its dtype. UserError, and no change, if they are of another one."""
        if difference := self._difference(model):
            fit = _fitting(self.tensors)
            hint = f"give --model {fit}" if fit else "give --model with the one it was made with"
            raise UserError(f"{self.path} is a checkpoint of another model: {difference}; {hint}.")
        for name, tensor in self.tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"{self.path} has NaN or infinite numbers in {name}: take an earlier checkpoint.")
        model.load_state_dict(self.tensors)

    def _difference(self, model: CLIP) -> str | None:
        if difference := _difference(self.tensors, model):
            return difference
        if (heads := self.origin.heads) and heads[1] != model.spec.text_heads:
            return f"its config.json says {heads[1]} heads of the text tower, the model has {model.spec.text_heads}"
        own = model.spec.vision_width // 64
        if heads and heads[0] != own:
            return f"its config.json says {heads[0]} heads of the image tower, the model has {own}"
        return None


def read_weights(path: str | Path) -> Weights:
    """Return the weights in `path`, a file or a folder with one; UserError if they are not readable or not safe.

    Layouts: OpenAI (TorchScript archive or state dict), open_clip (also its CustomTextCLIP), Hugging Face's CLIPModel,
    CleanCLIP and its forks, PAR, and this project's own checkpoints; within the wrappers of DDP, torch.compile,
    Lightning and averaging.
    """
    path = weights_file(Path(path))
    tree = read_file(path)
    try:
        found = weights_in(tree)
    except UserError as error:
        raise UserError(f"{path} {error}.") from None
    except Exception as error:  # a damaged file can hold anything by any name
        raise damaged(path, error) from error
    try:
        known, mean = origin(path, tree, found), other_mean(path)
    except UserError as error:
        raise UserError(f"{path} {error}.") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"a config beside {path}, or its own record, is not as it should be ({error}): mend it, or move the "
            "weights into a folder of their own."
        ) from None
    doubt = (f"its images were normalised by the mean {mean}, here by OpenAI's: expect lower accuracy",) if mean else ()
    return Weights(path, found.tensors, known, (*found.notes, *doubt))


def _fitting(weights: dict[str, Tensor]) -> str | None:
    """Return the name of the model that the weights fit."""
    projection = weights.get("text_projection")
    for name, spec in MODELS.items():
        if projection is not None and projection.shape == (spec.text_width, spec.embed_dim):
            with torch.device("meta"):
                model = CLIP(spec)
            if not _difference(weights, model):
                return name
    return None


def _difference(weights: dict[str, Tensor], model: CLIP) -> str | None:
    """Return the first difference between weights and a model's, in words; of a tower that is not there, only that."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    present = {tower_of(name) for name in expected if name in weights}
    towers = [part for tower, part in _PARTS.items() if tower not in present]
    extra = next((f"the file holds {name}, which the model lacks" for name in weights if name not in expected), None)
    if towers:
        return f"the file lacks {' and '.join(towers)}" + (f"; {extra}" if extra else "")
    if missing:
        return f"the file lacks {missing[0]}"
    for name, tensor in expected.items():
        given = weights[name]
        if given.shape != tensor.shape:
            return f"{name} has shape {tuple(given.shape)} in the file, {tuple(tensor.shape)} in the model"
        if given.is_floating_point() != tensor.is_floating_point():
            return f"{name} is {str(given.dtype).removeprefix('torch.')} in the file"
    return extra
