"""All that a training needs, opened and checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastbd.base import dist
from fastbd.base.console import console
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation
from fastbd.config.flags import CleanConfig, PretrainConfig
from fastbd.data import sampler
from fastbd.data.loader import Batch, batches, text_lengths
from fastbd.data.shards import open_beton
from fastbd.data.verify import check_whole
from fastbd.evals.embedding import embed_images, embed_texts
from fastbd.evals.towers import Towers
from fastbd.kernels import native
from fastbd.kernels.text_pack import room_for
from fastbd.methods.method import Method, Training, check_returned, name_of
from fastbd.models.precision import has_bf16
from fastbd.training import checkpoint, divergence, fastest, rebound, setup
from fastbd.training.folder import RunFolder
from fastbd.training.inputs import decoder_of, open_pairs, policies_of
from fastbd.training.resume import check_inputs, inputs
from fastbd.training.reuse import Kept, reusable, structure
from fastbd.training.roofline import measure_rates, step_seconds
from fastbd.training.setup import Setup
from fastbd.training.task import Config, Task
from fastbd.training.timetable import every
from fastbd.training.watch import Watch


class Opened:
    """The pairs, the model on the device, the step that trains it and what evaluates it, where training starts.

    What `kept` holds of earlier runs is used again. `resumed` is the state of the run in `folder`, where it goes on.
    """

    def __init__(
        self, config: Config, task: Task, world: World, kept: Kept, folder: RunFolder, resumed: dict | None, quiet: bool
    ):
        self.config, self.task, self.world = config, task, world
        self.kept, self.folder, self.quiet = kept, folder, quiet
        self.policies = policies_of(config.views, task.method.objective)
        self.shares = setup.shares_of(config, task, world, len(self.policies))
        self.numerics = setup.numerics_of(config, world, partial(self._faster, resumed))
        self._check_weights(resumed)
        if config.verify:
            world.main_first(self._verify)
        self._open(resumed)
        self._begin(resumed)

    def _faster(self, resumed: dict | None) -> str:
        """Return fp32 or bf16: what the resumed run had, else what this CPU trains the model in faster."""
        config, task = self.config, self.task
        if not (has_bf16() and config.epochs):
            return "fp32"
        if resumed:
            return resumed.get("precision", "fp32")  # not recorded up to version 0.1.0

        def measured() -> dict[str, float]:
            seconds = fastest.measure(task.model, self.shares.part(config.batch_size) * self.shares.views)
            self._say(fastest.sentence(seconds))
            return seconds

        study, name = self.kept.study, task.model_name
        make = partial(fastest.shared, study, name, measured) if study else measured
        return fastest.choice(self.kept.get("precision", name, make))

    def _check_weights(self, resumed: dict | None) -> None:
        """Raise a UserError where a resumed run's inputs are not what they were, or the weights are not finite."""
        config, task = self.config, self.task
        self.inputs = inputs(config, task)
        if resumed:
            check_inputs(self.folder.path, resumed, self.inputs)
        if resumed and isinstance(config, PretrainConfig):  # --weights have been taken in already
            checkpoint.load_into(task.model, resumed["model"], self.folder.path, task.model_name)
        divergence.check_weights(resumed["model"] if resumed else task.model.state_dict(), self._source())

    def _source(self) -> Path | str:
        """Return the file that the weights to begin with come from, or a word for fresh ones."""
        config = self.config
        if config.resume:
            return checkpoint.path_of(config.resume, "last")
        match config:
            case CleanConfig(run=Path() as run):
                return checkpoint.path_of(run, config.checkpoint)
            case PretrainConfig(weights=Path() as weights):
                return weights
        return "the new model"

    def _verify(self) -> None:
        """Raise a UserError where the rows to train on, or what is evaluated on, are damaged."""
        task = self.task
        if self.world.main:
            check_whole(open_beton(task.data), np.union1d(task.rows, task.held_out), self.quiet)
            if task.eval_data:
                check_whole(open_beton(task.eval_data), quiet=self.quiet)

    def _open(self, resumed: dict | None) -> None:
        """Open the evaluation set and the training pairs, and put the model on the device, in memory kept if it fits.

        The evaluation set comes first, as the pairs take what memory is left.
        """
        config, task, world = self.config, self.task, self.world
        self._key = structure(config, task, self.numerics.precision)
        self._reused = reusable(self.kept, self._key, task, self.numerics.compiled, resumed is not None)
        self.watch = self._open_watch()
        began = resumed["decode"] if resumed else None
        self.pairs = open_pairs(config, task, world, self.kept, self.policies, began, self.quiet)
        self.model, self.method = setup.place(self._reused, config, task, self.shares, world)
        if self.watch:
            numerics = self.numerics
            self.watch.look_at(self.model, self.pairs, precision=numerics.precision, compiled=numerics.compiled)
        steps = config.rebound if isinstance(config, CleanConfig) else 0
        about = (self.watch, self.model, self.pairs, task.plan, self.shares, world)
        self.rebound = rebound.ready(*about, steps=steps) if steps else None

    def _open_watch(self) -> Watch | None:
        """Return the evaluator: on the main process, where there is something to evaluate on."""
        config, task, trains = self.config, self.task, self.world.device
        every(config.eval_every, 1, 1)  # what it cannot read is to be known before training
        device = dist.device_of(config.eval_device) if config.eval_device else trains
        if task.eval_data is None or not self.world.main:
            return None
        cores = os.cpu_count() or 1  # the other processes have nothing to decode meanwhile
        decoder = partial(decoder_of, config, self.world, threads=cores)
        return Watch(config, task, device, aside=device != trains, kept=self.kept, decoder=decoder)

    def _begin(self, resumed: dict | None) -> None:
        """Bring the model, the method and the optimizer to where training starts, or where it was stopped."""
        config, task = self.config, self.task
        self.training = self._as_seen_by_the_method()
        self.method.attach(self.training)
        self.start = None if resumed and self.folder.evaluations() else self._checked_start()
        if resumed:
            checkpoint.load_into(self.model, resumed["model"], self.folder.path, task.model_name)
            checkpoint.load_into(self.method, resumed["method"], self.folder.path, f"the method {task.name}")
        else:
            self.method.prepare(self.model)
        self._set_up()
        if state := resumed["optimizer"] if resumed else task.optimizer:
            setup.restore_optimizer(self.step.optimizer, state, config, task)
        self.done = resumed["step"] if resumed else 0
        if not 0 <= self.done <= self.total:
            raise UserError(
                f"the checkpoint in {config.resume} is of step {self.done}, and its run has {self.total:,} steps: put "
                "back what was changed, or start the run again."
            )
        if resumed:
            self.step.at.fill_(self.done)
            checkpoint.set_random_state(resumed["random"])
            if resumed["decode"] != self.decoded_by:
                self._say(f"images were decoded by {resumed['decode']}, now by {self.decoded_by}: pixels may differ")
            was, now = resumed.get("precision"), self.numerics.precision
            if was not in (None, now):
                self._say(f"the towers computed in {was}, now in {now}: numbers will differ")
            had, has = resumed.get("libraries"), native.found()
            if had not in (None, has) and self.world.device.type == "cpu":
                had, has = (", ".join(names) or "none" for names in (had, has))
                self._say(f"compiled libraries were {had}, now {has}: numbers will differ by rounding")

    def _as_seen_by_the_method(self) -> Training:
        task, beton = self.task, self.pairs.beton
        return Training(
            model=self.model,
            rows=task.rows,
            flagged=task.rows[:0] if task.flagged is None else task.flagged,
            data_size=len(beton),
            labels=beton.labels,
            seed=self.config.seed,
            device=self.world.device,
            precision=self.numerics.precision,
            compiled=self.numerics.compiled,
            policies=self.policies,
            embed_images=lambda rows: embed_images(self._towers(), self.pairs, rows),
            embed_texts=lambda rows: embed_texts(self._towers(), self.pairs, rows),
        )

    def _towers(self) -> Towers:
        """Return the model as it is, to embed with: that of the evaluation, where it is on the same device."""
        if self.watch is None or self.watch.aside:
            return Towers(self.model, precision=self.numerics.precision, device=self.world.device)
        towers = self.watch.zeroshot.towers
        towers.refresh()
        return towers

    def _set_up(self) -> None:
        """Set the length of the run, and make the step or take the one that is reused."""
        config, rows = self.config, self.task.rows
        lengths = text_lengths(self.pairs, rows, self.text_view(0))
        self.tokens = float(lengths.mean())
        self.steps_per_epoch = len(rows) // config.batch_size
        self.total = config.epochs * self.steps_per_epoch
        rates = self._rates()
        self.rates: list[float] = rates.tolist()
        if self._reused:
            self.room, self.step = self._reused.room, self._reused.step
            self.step.restart(rates)
            return
        fixed = self.numerics.compiled or self.numerics.captured
        self.room = room_for(lengths.sum(1), self.shares.part(config.batch_size)) if fixed else 1
        self.step = setup.make_step(self.model, self.method, rates, config, self.numerics, self.world)
        self.kept.put("setup", self._key, Setup(self.model, self.method, self.room, self.step))

    def _rates(self) -> torch.Tensor:
        """Return the learning rates of all steps. UserError where those of the method cannot be shifted."""
        config, method = self.config, self.method
        shifted, own = config.schedule == "shifted", type(method).rates is not Method.rates
        if shifted and own:
            raise UserError(
                f"{name_of(method)} has a schedule of its own, which --schedule shifted does not know: leave that out."
            )
        method.ahead = self.steps_per_epoch if shifted else 0
        warmup = config.warmup if shifted else min(config.warmup, self.total // 2)
        rates = method.rates(config.lr, warmup=warmup, total=self.total)
        check_returned(method, "rates", rates, torch.Tensor, self.total)
        self.warmup = None if own else min(max(0, warmup - method.ahead), self.total)  # steps that there are of it
        return rates

    @property
    def decoded_by(self) -> str:
        """The name of the decoder, on which the pixels of the images depend."""
        return self.pairs.decoder.about

    @property
    def texts(self) -> int:
        """Captions of a pair in a step."""
        return 2 if self.task.method.objective.augments_texts else 1

    def text_view(self, epoch: int) -> int | None:
        """Return the number of the captions' second view in an epoch; None where a step has none."""
        if not self.task.method.objective.augments_texts:
            return None
        return epoch % self.pairs.beton.num_text_views if self.config.eda == "epoch" else 0

    def _checked_start(self) -> Evaluation | None:
        """Evaluate the model that is to be cleaned; on one that is to be pre-trained the evaluator is only tried.

        UserError when there is no backdoor in it to be removed.
        """
        config = self.config
        if self.watch is None:
            return None
        if isinstance(config, PretrainConfig) and config.epochs:
            self.watch.try_evaluator()
            return None
        row = self.watch.start()
        asr = row.get("asr")
        if isinstance(config, CleanConfig) and asr is not None and asr < config.landed and not config.force:
            raise UserError(
                f"the attack on {self.task.start} has not landed: ASR {asr:.1%} is below {config.landed:.0%} "
                "(--landed), so a low ASR after cleaning would show nothing; clean it all the same with --force."
            )
        return row

    def batches(self, epoch: int, offset: int) -> Iterator[Batch]:
        """This rank's batches of an epoch, from its step `offset` on."""
        if offset == 0:
            if self.world.main:
                self.method.begin(epoch, self.training)
            self.world.share(self.method.state_dict().values())
            self.step.forget(self.method.renewed)
        self.step.begin(epoch)
        narrow = self.numerics.precision == "bf16" and self.world.device.type == "cuda"
        return batches(
            self.pairs,
            self._rows(epoch),
            self.config.batch_size,
            seed=self.config.seed,
            policies=self.policies,
            text_view=self.text_view(epoch),
            world=self.world,
            epoch=epoch,
            start=offset,
            dtype=torch.bfloat16 if narrow else torch.float32,
            parts=self.config.accumulate,
            room=self.room,
        )

    def _rows(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch, as the method has them. UserError where they are none of the run's."""
        own = self.task.rows
        rows = self.method.rows(epoch, own.copy())  # which a method from outside may write into
        check_returned(self.method, "rows", rows, np.ndarray, len(own))
        if not (np.issubdtype(rows.dtype, np.integer) and np.isin(rows, own).all()):
            said = "returned others than the run's: it must return some of those it is given."
            raise UserError(f"rows of {name_of(self.method)} {said}")
        return rows

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of a step, counted from 1, of its whole batch: all parts of all processes."""
        epoch, offset = divmod(step - 1, self.steps_per_epoch)
        rows = self._rows(epoch)
        return rows[next(sampler.batches(len(rows), self.config.batch_size, self.config.seed, epoch, start=offset))]

    def pairs_limit(self) -> float:
        """Pairs a second of all GPUs by the roofline."""
        rates = self.kept.get(
            "rates", self.numerics.precision, lambda: measure_rates(self.world.device, self.numerics.precision)
        )
        batch = self.config.batch_size // self.world.size
        seconds = step_seconds(
            self.model,
            rates,
            batch=batch,
            views=len(self.policies),
            texts=self.texts,
            tokens=self.tokens,
            precision=self.numerics.precision,
        )
        limit = batch * self.world.size / seconds
        self._say(
            f"limit of this machine: {limit:,.0f} pairs/s, by its matrix products ({rates.matmul / 1e9:,.1f} GFLOP/s) "
            f"and memory ({rates.bandwidth / 1e9:.3g} GB/s), both measured now"
        )
        return limit

    def _say(self, line: str) -> None:
        if not self.quiet:
            console.print(line, markup=False)
