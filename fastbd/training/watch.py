"""What a run's model is evaluated on while it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

import torch

from fastbd.base.background import Background
from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation
from fastbd.data.decode import Decoder
from fastbd.data.pairs import Pairs
from fastbd.data.shards import open_beton
from fastbd.evals.monitor import Monitor
from fastbd.evals.outside import with_own
from fastbd.evals.sets import Labelled, open_set, part_of
from fastbd.evals.towers import Towers
from fastbd.evals.zeroshot import ZeroShot
from fastbd.models import CLIP
from fastbd.training.reuse import LOOKING, Kept
from fastbd.training.task import Config, Task


class Watch:
    """The evaluations of a run, in its main process, on `device`; what `kept` holds of earlier runs is used again.

    The set is opened before the training pairs are, which take what memory is left; `look_at` names the model.
    """

    def __init__(
        self, config: Config, task: Task, device: torch.device, *, aside: bool, kept: Kept, decoder: partial[Decoder]
    ):
        assert task.eval_data is not None, "there is nothing to evaluate on"
        if open_beton(task.eval_data).class_names is None:
            raise UserError(
                f"{task.eval_data} has no classes and cannot be evaluated while training; build it from class folders "
                "or with --class-key."
            )
        self.config, self.task, self.device, self.kept = config, task, device, kept
        self.eval_data = task.eval_data
        self.aside = aside
        """Whether `device` is not the one that trains, and evaluates while that goes on."""
        self.background = Background(aside)
        if kept.held("evaluation", self.key) is None:
            kept.drop(*LOOKING)
        self.data = kept.get("evaluation", self.key, partial(self._open, decoder))

    @property
    def key(self) -> tuple:
        """All that the set depends on."""
        task, plan = self.task, self.task.plan and json.dumps(self.task.plan.to_dict())
        texts = (str(task.classes), str(task.templates))
        return str(task.eval_data), task.model.image_size, *texts, plan, self.config.eval_subset, self.device

    def _open(self, decoder: partial[Decoder]) -> Labelled:
        config, task = self.config, self.task
        data = open_set(
            self.eval_data,
            decoder(),
            task.model.image_size,
            classes=task.classes,
            templates=task.templates,
            plan=task.plan,
            subset=config.eval_subset,
            device=self.device,
        )
        assert isinstance(data, Labelled)  # as it has classes
        return data

    def look_at(self, model: CLIP, pairs: Pairs, *, precision: str, compiled: bool) -> None:
        """Evaluate this model; drift is measured from what it is now."""
        config, task, kept = self.config, self.task, self.kept
        self.precision = precision

        def zeroshot() -> ZeroShot:
            # Not compiled on another device: compilation is no work for a second thread.
            towers = Towers(model, precision=precision, device=self.device, compiled=compiled and not self.aside)
            return ZeroShot(towers, self.data)

        self.zeroshot = kept.get("zeroshot", self.key, zeroshot)
        self.zeroshot.towers.refresh()
        self.partly = self.monitor = None
        if config.eval_between:
            self.partly = kept.get("partly", (self.key, config.eval_between), self._of_part)
        if len(task.held_out) > 1:
            about = (self.key, str(task.data), task.held_out.tobytes())
            self.monitor = kept.get("monitor", about, partial(Monitor, self.zeroshot.towers, pairs, task.held_out))
            self.monitor.start()

    def _of_part(self) -> ZeroShot:
        return ZeroShot(self.zeroshot.towers, part_of(self.data, self.config.eval_between))

    def start(self) -> Evaluation:
        """The line of the model that is to be cleaned, which runs that begin with the same one share."""
        task = self.task
        evaluator = self.config.evaluator
        of = (str(task.start), getattr(self.config, "checkpoint", None), self.key, self.precision, evaluator)
        known = self.kept.held("start", of) if task.start else None
        row = known | {"seconds": 0.0} if known else self._measured(self.zeroshot)
        self.kept.put("start", of, row)
        return row | self._monitored()

    def try_evaluator(self) -> None:
        """Raise what --evaluator raises on the model as it is: its mistakes are to be known before training."""
        if name := self.config.evaluator:
            with_own({}, name, self.zeroshot.towers, self.data)

    def _measured(self, zeroshot: ZeroShot) -> Evaluation:
        """Return the row of the towers as they are, with the numbers of --evaluator."""
        row, name = zeroshot(), self.config.evaluator
        return with_own(row, name, zeroshot.towers, zeroshot.data) if name else row

    def _monitored(self) -> Evaluation:
        return self.monitor() if self.monitor else {}

    def evaluate(self, report: Callable[[Evaluation], None], *, between: bool) -> None:
        """Give `report` the line of the model as it is: at once, or from another device later.

        `between` epochs it may be of part of the images.
        """

        def work() -> None:
            began = time.perf_counter()
            part = self.partly if between else None
            row = self._measured(part or self.zeroshot) | ({"subset": True} if part else {})
            row |= self._monitored()
            report(row | {"seconds": round(time.perf_counter() - began, 3)})

        self.background.wait()
        self.zeroshot.towers.refresh()
        self.background.start(work)

    def wait(self) -> None:
        """Until all that was asked for has been reported."""
        self.background.wait()

    def __str__(self) -> str:
        seen = " (which it also trains on)" if self.eval_data.resolve() == self.task.data.resolve() else ""
        return f"{self.eval_data}{seen}, templates {self.data.about['templates']}"
