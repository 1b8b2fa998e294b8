"""A run that is resumed: its checkpoint, and that all else in its folder is of the same run."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastbd.base.console import console
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.run_folder import read_config
from fastbd.config.fields import marked, to_dict
from fastbd.config.flags import IMMATERIAL, TRAINING
from fastbd.config.imports import source
from fastbd.data.shards import open_beton
from fastbd.poison.plan import Plan
from fastbd.training import checkpoint
from fastbd.training.task import Config, Task

_INPUTS = {
    "data": "other content of --data",
    "eval_data": "other content of --eval-data",
    "rows": "other rows of the data to train on (by kept.rows, spared.rows, or what they are drawn from)",
    "start": "another model to clean in the folder of --run",
    "classes": "other content of the file --classes",
    "templates": "other content of the file --templates",
    "cluster_labels": "other content of the file --cluster-labels",
}

FREE_ON_RESUME = IMMATERIAL | marked("free_on_resume", *TRAINING) | {"start", "cards"}
"""Settings that may be others when a run is resumed; what moved files hold is compared by inputs().

The last two stand beside the flags in config.json.
"""
_PARTS = {"about": dict, "config": dict, "model": dict, "optimizer": dict, "step": int, "random": dict,
          "plan": dict | None}  # fmt: skip
_ABSENT = "not there"
_START_AGAIN = "put back what was changed, or start the run again"


def resumed(config: Config, world: World) -> dict | None:
    """Return the state of the run to resume; None for a new run.

    UserError where config.json or plan.json is not the one that the state was saved beside. Where the last checkpoint
    is not whole, the state is that of an epoch before; that is said. `from` in it is the file.
    """
    if config.resume is None:
        return None
    path, state, wrong = checkpoint.load_newest(config.resume)
    _check_parts(path, state)
    _check(config, path, state)
    if world.main:
        _put_plan_back(path, state)
    world.barrier()
    if wrong and world.main:
        said = f"{wrong}: the run resumes from {path}, and the steps after that are done again"
        console.print(said, markup=False)
    return {**state, "from": path}


def say_what_code_changed(folder: Path) -> None:
    """Tell of code from outside that is not what the run in `folder` began with, as far as the run names it."""
    for name, card in read_config(folder).get("cards", {}).items():
        found, was = source(name), card.get("sha256")
        if found and found.sha256 and was and found.sha256 != was:
            console.print(f"{name} is not what the run began with: {found.file} has changed", markup=False)


def _check_parts(path: Path, state: dict) -> None:
    for part, kind in _PARTS.items():
        if not isinstance(state.get(part), kind) or state.get(part) == {}:
            raise UserError(f"{path} has no {part}, so that it is not a checkpoint of a run: {_START_AGAIN}.")


def _put_plan_back(path: Path, state: dict) -> None:
    """Write plan.json as the checkpoint `path` holds it, where it is missing, and say so."""
    plan = path.parent / "plan.json"
    if state.get("plan") and not plan.exists():
        Plan.from_dict(state["plan"]).save(plan)
        console.print(f"{plan} was missing: written anew from {path.name}", markup=False)


def _check(config: Config, path: Path, state: dict) -> None:
    folder, plan = path.parent, state.get("plan") and Plan.from_dict(state["plan"]).to_dict()
    settings = to_dict(config)
    for name, was, now in (
        ("config.json", state["about"], read_config(folder)),
        ("plan.json", {"the plan": plan}, {"the plan": _plan(folder, plan)}),
        ("config.json", {key: value for key, value in state["config"].items() if key in settings}, settings),
    ):
        if found := difference(was, now):
            raise _other(folder / name, path, found)


def _plan(folder: Path, default: dict | None) -> dict | None:
    path = folder / "plan.json"
    try:
        return Plan.load(path).to_dict() if path.exists() else default
    except UserError:
        raise UserError(f"{path} is damaged or was changed: remove it, and --resume writes it anew.") from None


def check_inputs(folder: Path, state: dict, now: dict) -> None:
    """Raise a UserError where what the run in `folder` reads is not what it read when the state was saved.

    A state that an older version saved does not say what that was.
    """
    for name, digest in state.get("inputs", {}).items():
        if name in now and now[name] != digest:
            raise UserError(f"the checkpoint in {folder} was saved by a run with {_INPUTS[name]}: {_START_AGAIN}.")


def inputs(config: Config, task: Task) -> dict[str, str | None]:
    """Return digests of all that a run reads and its numbers depend on: _INPUTS says what each is of."""
    labels = getattr(config, "cluster_labels", None)
    files = {"classes": task.classes, "templates": task.templates, "cluster_labels": labels}
    return {
        "data": open_beton(task.data).fingerprint,
        "eval_data": task.eval_data and open_beton(task.eval_data).fingerprint,
        "rows": _digest(*(rows.tobytes() for rows in (task.rows, task.held_out, task.flagged) if rows is not None)),
        "start": _digest_of(task.model) if task.start else None,
        **{name: _digest(Path(path).read_bytes()) for name, path in files.items() if path and os.path.isfile(path)},
    }


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"|".join(contents)).hexdigest()


def _digest_of(model: torch.nn.Module) -> str:
    """Return a digest of the weights, of CRCs, as there are gigabytes of them."""
    values = (value.detach().cpu().contiguous().view(-1) for value in model.state_dict().values())
    return _digest(*(zlib.crc32(value.view(torch.uint8).numpy()).to_bytes(4, "big") for value in values))


def _other(file: Path, path: Path, found: tuple[str, Any, Any]) -> UserError:
    field, was, now = found
    return UserError(
        f"{file} does not belong to {path}: {field} was {_short(was)} when that was saved, is now {_short(now)}; "
        f"{_START_AGAIN}."
    )


def _short(value: Any) -> str:
    said = repr(value) if value is not _ABSENT else _ABSENT
    return said if len(said) <= 80 else said[:77] + "..."


def difference(was: Mapping, now: Mapping) -> tuple[str, Any, Any] | None:
    """Return (name, was, is) of the first setting of `was` that is another one in `now`; None where none is.

    Those of FREE_ON_RESUME may differ. A path counts as its last part.
    """
    for name in (name for name in was if name not in FREE_ON_RESUME):
        if found := _difference(name, was[name], now.get(name, _ABSENT)):
            return found
    return None


def _difference(name: str, was: Any, now: Any) -> tuple[str, Any, Any] | None:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        parts = [(f"{name}, {key}", was.get(key, _ABSENT), now.get(key, _ABSENT)) for key in {**was, **now}]
    elif isinstance(was, list | tuple) and isinstance(now, list | tuple) and len(was) == len(now):
        parts = [(f"{name}[{k}]", *pair) for k, pair in enumerate(zip(was, now, strict=True))]
    else:
        return None if type(was) is type(now) and _last_part(was) == _last_part(now) else (name, was, now)
    return next(filter(None, (_difference(*part) for part in parts)), None)


def _last_part(value: Any) -> Any:
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
