"""What a verb gives to a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from fastbd.base.errors import UserError
from fastbd.config.cards import chosen, recorded
from fastbd.config.fields import portable
from fastbd.config.flags import CleanConfig, PretrainConfig
from fastbd.data.beton import Beton
from fastbd.data.rows import read_rows
from fastbd.data.shards import Shards
from fastbd.methods.method import Method
from fastbd.models import CLIP
from fastbd.poison.plan import Plan

Config = PretrainConfig | CleanConfig
ROWS, SPARED = "kept.rows", "spared.rows"  # copies of --rows-file and of --flagged-by


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, with what, on what."""

    name: str
    """Name of the run folder when --out gives none."""
    model: CLIP
    """With the weights to begin with, on the CPU; a run may take it for its own."""
    model_name: str
    method: Method
    data: Path
    rows: np.ndarray
    """Places in `data` to train on, int64 [N]."""
    held_out: np.ndarray = field(default_factory=partial(np.empty, 0, np.int64))
    """Clean places in `data`, none of `rows`, on which cleaning is watched."""
    plan: Plan | None
    """The backdoor that evaluation attacks with."""
    poisoned: bool
    """Whether the plan's triggers and captions are in the training data."""
    eval_data: Path | None
    classes: str | None
    templates: str | None
    pretrain_objective: str
    flagged: np.ndarray | None = None
    """Those of the rows that are known to be poisoned, int64, ascending."""
    method_name: str | None = None
    start: Path | None = None
    """The run that is cleaned."""
    start_step: int | None = None
    """The step at which its model was."""
    optimizer: dict | None = None
    """Optimizer state to begin with; its weight decay wins over the config's, as in the published program."""
    cards: dict = field(default_factory=dict)
    """What the run that is cleaned has recorded of code outside of this package."""
    resumed: dict | None = None
    """State of the run to resume, which has been compared with the files in its folder."""

    def about(self, verb: str, config: Config) -> dict:
        """What config.json says of the run beside the flags."""
        objective, *robust = self.pretrain_objective.split("+")
        before = {objective: "objective"} | dict.fromkeys(robust, "robust")
        now = {self.model_name: "model", self.method.objective_name: "objective"}
        now |= {attack.trigger.name: "trigger" for attack in (self.plan.attacks if self.plan else ())}
        now |= {name: kind for kind, name in chosen(config)}
        outside = self.cards | recorded({k: v for k, v in before.items() if k not in self.cards} | now)
        return {
            "verb": verb,
            "method": self.method_name,
            "objective": self.method.objective_name,
            "pretrain_objective": self.pretrain_objective,
            "start": portable(self.start),
            "model": self.model_name,
            "activation": self.model.spec.activation,
            "data": portable(self.data),
            "eval_data": portable(self.eval_data),
            "classes": portable(self.classes),
            "templates": portable(self.templates),
            **({"cards": outside} if outside else {}),
        }


def check_trained_on(run: Path, saved: dict, beton: Beton | Shards, remedy: str) -> None:
    """Raise a UserError, which ends with the remedy, where the run's data are not what it was trained on.

    `saved` is its checkpoint; those of older versions do not say what that was.
    """
    if saved.get("inputs", {}).get("data", beton.fingerprint) != beton.fingerprint:
        raise UserError(f"{beton.path} has other content than when {run} was trained on it: {remedy}.")


def allowed_rows(config: Config, beton: Beton | Shards) -> np.ndarray:
    """int64 [N], ascending: the rows of --rows-file, of which a run keeps a copy to go on with; all without it."""
    if config.rows_file is None:
        return np.arange(len(beton))
    path = config.resume / ROWS if config.resume else config.rows_file
    return read_rows(path, beton.fingerprint, len(beton))
