"""What a run may take over from an earlier one in the same process: its step, its decoded images, its evaluator."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastbd.config.cards import is_outside
from fastbd.config.fields import marked, to_dict
from fastbd.config.flags import TRAINING
from fastbd.training.task import Config, Task

if TYPE_CHECKING:
    from fastbd.training.setup import Setup

REUSE = marked("reuse", *TRAINING)
"""Settings in which two runs may differ and still be trained by the same step, and graph, in the same memory."""
LOOKING = "zeroshot", "partly", "monitor"  # what is kept of these has hold of a model and of a set


class Kept:
    """The latest of each kind, with a key that says what it depends on. An older one goes before a new one is made.

    `study`: the folder of the study whose runs they are, if they are one's.
    """

    def __init__(self, study: Path | None = None):
        self.study = study
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    def held(self, kind: str, key: Hashable) -> Any | None:
        """It, or None where there is none with this key; one with another key is dropped."""
        if kind in self._kept and self._kept[kind][0] != key:
            self.drop(kind)
        return self._kept[kind][1] if kind in self._kept else None

    def drop(self, *kinds: str) -> None:
        """Let go of those that there are, and of their memory at once: models and steps refer to themselves."""
        if [kind for kind in kinds if self._kept.pop(kind, None)]:
            gc.collect()

    def clear(self) -> None:
        """Let go of all."""
        self.drop(*list(self._kept))

    def put(self, kind: str, key: Hashable, thing: Any) -> Any:
        self._kept[kind] = key, thing
        return thing

    def get(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """It, made where there is none with this key."""
        found = self.held(kind, key)
        return self.put(kind, key, make()) if found is None else found


def structure(config: Config, task: Task, precision: str) -> str:
    """Return a key of all that a step in memory depends on: every setting that is not in REUSE."""
    settings = {name: value for name, value in to_dict(config).items() if name not in REUSE}
    terms = [weight > 0 for weight in task.method.objective.weights]
    model = [task.model_name, task.model.spec.activation]
    return json.dumps([*model, str(task.data), len(task.rows), settings, terms, precision])


def reusable(kept: Kept, key: str, task: Task, compiled: bool, resumed: bool) -> Setup | None:
    """Return the Setup of an earlier run if this run fits in it; else free that, before new memory is taken.

    None for code from outside: it may have kept any setting of the earlier run, and any state.
    """
    found = kept.held("setup", key)
    names = (task.method_name, task.method.objective_name)
    outside = any(is_outside(part) for name in names if name for part in name.split("+"))
    if found and not outside and not resumed and task.optimizer is None:  # optimizer states that are read lie elsewhere
        return found
    kept.drop("setup", *LOOKING)
    if compiled:
        torch.compiler.reset()  # which compiles a function for so many models, and no more
    return None
