"""A training, from the opening of its inputs to its end: what pre-training and cleaning share."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbd import __version__
from fastbd.base import dist, files
from fastbd.base.console import console
from fastbd.base.dist import World
from fastbd.base.environment import environment
from fastbd.base.errors import Diverged, UserError
from fastbd.base.evaluation import Evaluation, RecordedEvaluation
from fastbd.base.run_folder import read
from fastbd.base.signals import Stopped
from fastbd.config.fields import portable, to_dict
from fastbd.config.flags import CleanConfig, PretrainConfig
from fastbd.data import eda, sampler, sheet
from fastbd.data.loader import Batch, batches, text_lengths
from fastbd.data.pairs import Pairs
from fastbd.data.shards import open_beton
from fastbd.data.verify import check_whole
from fastbd.evals.embedding import embed_images, embed_texts
from fastbd.evals.towers import Towers
from fastbd.kernels.text_pack import room_for
from fastbd.methods.method import Training
from fastbd.training import checkpoint, divergence, setup
from fastbd.training.folder import RunFolder, check_place, free_folder
from fastbd.training.inputs import decoder_of, open_pairs, policies_of
from fastbd.training.loop import Enough, train
from fastbd.training.readback import NotFinite
from fastbd.training.rebound import clean_pairs, rebound
from fastbd.training.resume import check_inputs, inputs
from fastbd.training.reuse import Kept, reusable, structure
from fastbd.training.roofline import measure_rates, step_seconds
from fastbd.training.setup import Setup
from fastbd.training.task import ROWS, SPARED, Config, Task
from fastbd.training.timetable import Timetable, every
from fastbd.training.watch import Watch

REBOUND_BATCH, REBOUND_LR = 16, 1e-6


def execute(config: Config, make_task: Callable[[World], Task]) -> tuple[int, Path]:
    """Do the task that make_task gives; returns an exit code and the run's folder.

    The code is 0, or 128 + signal when the training was stopped (and saved).
    """
    world = dist.join(config.device)
    if world.main:
        check_place(config)
    run = Run(config, make_task(world), world)
    try:
        run.train()
        exit_code = 0
    except Stopped as stopped:
        if world.main:
            go_on = f"python -m fastbd {run.verb} --resume {run.folder.path}"
            console.print(f"stopped and saved; go on with: {go_on}", markup=False)
        exit_code = stopped.exit_code
    # Not after an error: the other ranks may be waiting for this one, and only its death lets torchrun end them.
    dist.leave()
    return exit_code, run.folder.path


class Run:
    """One training: everything is opened and checked before the folder is made.

    What `kept` holds of earlier runs is used again. `extra` goes into config.json. `enough` is asked after each
    evaluation, with all of them, whether the run shall end, and why. `guard` is called before anything is written; it
    is the judge of whose the run is, where it is given, and else the lock of the folder.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        world: World,
        kept: Kept | None = None,
        extra: dict | None = None,
        enough: Callable[[tuple[RecordedEvaluation, ...]], str | None] = lambda rows: None,
        guard: Callable[[], None] | None = None,
        quiet: bool = False,
    ):
        if config.out and config.out.exists() and not config.resume:
            raise UserError(f"{config.out} exists already: choose another --out, or go on with --resume {config.out}.")
        self.began = time.perf_counter()
        resumed, task = task.resumed, replace(task, resumed=None)
        self.config, self.task, self.world = config, task, world
        self.kept, self.extra, self.enough = kept or Kept(), extra or {}, enough
        self.quiet = quiet or not world.main
        self.verb = "pretrain" if isinstance(config, PretrainConfig) else "clean"
        torch.manual_seed(config.seed)  # which torch draws for each process; checkpoints hold its state
        self.folder = RunFolder(world, guard)
        if config.resume:
            self.folder.resume(config.resume)
        self.numerics = setup.numerics_of(config, world)
        self.policies = policies_of(config.views, task.method.objective)
        self.shares = setup.shares_of(config, task, world, len(self.policies))
        self._check_weights(resumed)
        if config.verify:
            world.main_first(self._verify)
        self._open(resumed)
        self._begin(resumed)
        if resumed:
            self.folder.rewind(resumed["from"], self.done)
            if resumed["config"].get("log_every") == config.log_every:
                self.folder.tell_of_lost_rows(self.done, config.log_every)
        else:
            self._make_folder()

    def _check_weights(self, resumed: dict | None) -> None:
        """Raise a UserError where a resumed run's inputs are not what they were, or the weights are not finite."""
        config, task = self.config, self.task
        self.inputs = inputs(config, task)
        if resumed:
            check_inputs(self.folder.path, resumed, self.inputs)
        if resumed and self.verb == "pretrain":  # --weights have been taken in already
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
        self.rebound = self._ready_to_rebound(steps) if steps else None

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
            self.began -= resumed["seconds"]
            if resumed["decode"] != self.decoded_by:
                self._say(f"images were decoded by {resumed['decode']}, now by {self.decoded_by}: pixels may differ")

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
        rates = self.method.rates(config.lr, warmup=min(config.warmup, self.total // 2), total=self.total)
        if self._reused:
            self.room, self.step = self._reused.room, self._reused.step
            self.step.restart(rates)
            return
        fixed = self.numerics.compiled or self.numerics.captured
        self.room = room_for(lengths.sum(1), self.shares.part(config.batch_size)) if fixed else 1
        self.step = setup.make_step(self.model, self.method, rates, config, self.numerics, self.world)
        self.kept.put("setup", self._key, Setup(self.model, self.method, self.room, self.step))

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
        """Evaluate the model that is to be cleaned. UserError when there is no backdoor in it to be removed."""
        config = self.config
        if self.watch is None or (self.verb == "pretrain" and config.epochs):
            return None
        row = self.watch.start()
        asr = row.get("asr")
        if isinstance(config, CleanConfig) and asr is not None and asr < config.landed and not config.force:
            raise UserError(
                f"the attack on {self.task.start} has not landed: ASR {asr:.1%} is below {config.landed:.0%} "
                "(--landed), so a low ASR after cleaning would show nothing; clean it all the same with --force."
            )
        return row

    def _make_folder(self) -> None:
        """Make --out, or the first free runs/NAME."""
        config, task = self.config, self.task
        path = config.out or free_folder(Path("runs") / task.name)
        samples = sheet.samples(self.pairs, task.rows, self.policies, seed=config.seed, text_view=self.text_view(0))
        about = {"name": path.name, "fastbd": __version__, **task.about(self.verb), **self.extra}
        about |= {"start_step": task.start_step, "start_weights": self.inputs["start"], "config": to_dict(config)}

        def write(folder: Path) -> None:
            pixels = {"decode": self.decoded_by, "resident": self.pairs.where}
            synonyms = {"plan_eda_synonyms": eda.synonyms_source()}
            files.write_json(folder / "env.json", environment() | synonyms | pixels)
            if task.plan:
                task.plan.save(folder / "plan.json")
            for name, rows in ((ROWS, config.rows_file), (SPARED, getattr(config, "flagged_by", None))):
                if rows:
                    shutil.copyfile(rows, folder / name)
            samples.save(folder / "samples.png")

        self.folder.make(path, write, about, self._state(0))

    def train(self) -> str:
        """Train from where the run stands to its end, and return how it ended. Others may resume it then."""
        try:
            return self._train()
        finally:
            self.folder.release()

    def _train(self) -> str:
        config, task = self.config, self.task
        planned = int((task.plan.attack_of[task.rows] >= 0).sum()) if task.plan and task.poisoned else 0
        self._say(
            f"{self.folder.path}: {task.method_name or 'pre-training'} of {task.model_name} with "
            f"{task.method.objective_name}, {len(task.rows):,} pairs of {task.data} ({planned:,} poisoned), "
            f"{self.total:,} steps, evaluated on {self.watch or 'nothing: no --eval-data'}"
        )
        if self.start:
            self._report(0, self.start)
        evaluations = every(config.eval_every, self.steps_per_epoch, self.total)
        table = Timetable(
            self.steps_per_epoch,
            self.total,
            evaluations,
            evaluations | every("epoch", self.steps_per_epoch, self.total),
            config.log_every,
        )
        if self.watch and self.done in table.evaluate_at and self.done not in self._measured():
            self._evaluate(self.watch, self.done)  # on another device, it had not ended when the run was stopped
        began, reason = time.perf_counter(), "finished"
        try:
            if self.done:  # it may have been killed before it ended
                self._ask_whether_to_end()
            train(
                self.step,
                self.batches,
                table,
                start=self.done,
                label="" if self.quiet else self.folder.path.name,
                pairs_limit=self.pairs_limit(),
                world=self.world,
                evaluate=self.measure,
                save=self.save,
                record=self.record,
            )
            self._wait()
        except Enough as enough:
            reason = str(enough)
        except NotFinite as broken:
            said = self._diverged(broken)
            self._end("diverged")
            raise Diverged(said) from None
        except Diverged as error:  # of an evaluation
            self._end("diverged")
            raise Diverged(f"{str(error).removesuffix('.')}: the run diverged; lower --lr ({config.lr:g}).") from None
        finally:
            self._wait()
            self.folder.wait()
        how = f"done: {self.total - self.done:,} steps" if reason == "finished" else f"ended early ({reason})"
        self._say(f"{how} in {time.perf_counter() - began:.0f} s, evaluations included; {self.folder.path}")
        self._say_whether_they_landed()
        self._end(reason)
        return reason

    def _diverged(self, broken: NotFinite) -> str:
        """Write diverged.json, and return the sentence that tells of the step."""
        rates = self.step.rates[: broken.step].tolist()
        epoch, path = broken.step / self.steps_per_epoch, self.folder.path / divergence.FILE
        if self.world.main:
            self.folder.guard()
            data, rows = portable(self.task.data), self._rows_of(broken.step)
            divergence.record(self.folder.path, broken, epoch=epoch, lr=rates[-1], data=data, rows=rows)
        return divergence.sentence(broken, moved=any(rates[:-1]), lr=self.config.lr, path=path)

    def _rows_of(self, step: int) -> np.ndarray:
        """The rows of a step, counted from 1, of its whole batch: all parts of all processes."""
        epoch, offset = divmod(step - 1, self.steps_per_epoch)
        rows = self.method.rows(epoch, self.task.rows)
        return rows[next(sampler.batches(len(rows), self.config.batch_size, self.config.seed, epoch, start=offset))]

    def _end(self, reason: str) -> None:
        """Write result.json, which says that nothing is left to be done here."""
        if not self.world.main:
            return
        seconds = time.perf_counter() - self.began
        evaluating = sum(row["seconds"] for row in self.folder.evaluations())
        gpu = self.world.device.type == "cuda"
        result = {
            "reason": reason,
            "seconds": seconds,
            "train_seconds": seconds - evaluating,
            "evaluate_seconds": evaluating,
            "device": torch.cuda.get_device_name(self.world.device) if gpu else "CPU",
            "devices": self.world.size,
        }
        if self.rebound and reason == "finished":
            with suppress(Diverged):  # the cleaning itself has not
                result["rebound"] = self.rebound()
        self.folder.end(result)

    def _ready_to_rebound(self, steps: int) -> Callable[[], Evaluation]:
        """Return what measures the rebound, which leaves other weights behind; UserError where it could not."""
        watch, plan = self.watch, self.task.plan
        if watch is None or plan is None or not watch.data.measures_asr or self.world.size > 1:
            raise UserError(
                "--rebound watches ASR, in one process: it needs a plan, and --eval-data with its target and with "
                "images of other classes."
            )
        if self.shares.group and REBOUND_BATCH % self.shares.group:
            raise UserError(f"--rebound takes {REBOUND_BATCH} pairs a step: give a --bn-group that divides it.")
        rows = clean_pairs(self.pairs, plan, steps * REBOUND_BATCH)

        def measured() -> Evaluation:
            pairs = Pairs(self.pairs.beton, self.pairs.decoder, self.pairs.size, max_bad=self.pairs.max_bad)
            return rebound(
                self.model,
                watch.zeroshot,
                pairs,
                rows,
                steps=steps,
                lr=REBOUND_LR,
                precision=self.numerics.precision,
                world=self.world,
            )

        return measured

    def _measured(self) -> set[int]:
        """Steps that have been evaluated."""
        return {row["step"] for row in self.folder.evaluations()}

    def _say_whether_they_landed(self) -> None:
        """Each attack, by the last evaluation of pre-training."""
        rows = (
            read(self.folder.path).attacks if self.world.main and self.verb == "pretrain" and self.task.poisoned else ()
        )
        for attack in rows[-1].get("attacks", [rows[-1]]) if rows else ():
            asr, name = attack.get("asr"), f"{attack.get('trigger')} to '{attack.get('target')}'"
            if asr is None:
                continue  # all images are of its target class
            landed = asr >= self.config.landed
            no = "" if landed else "not "
            self._say(
                f"the attack, {name}, has {no}landed: ASR {asr:.1%} is {no}at least {self.config.landed:.0%} (--landed)"
                + ("" if landed else "; poison more pairs (poison --rate) or train longer (--epochs)")
            )

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
            f"{rates.matmul / 1e12:.3g} TFLOP/s and {rates.bandwidth / 1e9:.3g} GB/s allow {limit:,.0f} pairs/s with "
            "compiled ops"
        )
        return limit

    def batches(self, epoch: int, offset: int) -> Iterator[Batch]:
        """This rank's batches of an epoch, from its step `offset` on."""
        if offset == 0:
            if self.world.main:
                self.method.begin(epoch, self.training)
            self.world.share(self.method.state_dict().values())
            self.step.forget(self.method.renewed)
        self.step.begin(epoch)
        narrow = self.numerics.precision == "bf16" and self.world.device.type == "cuda"
        rows, seed = self.method.rows(epoch, self.task.rows), self.config.seed
        return batches(
            self.pairs,
            rows,
            self.config.batch_size,
            seed=seed,
            policies=self.policies,
            text_view=self.text_view(epoch),
            world=self.world,
            epoch=epoch,
            start=offset,
            dtype=torch.bfloat16 if narrow else torch.float32,
            parts=self.config.accumulate,
            room=self.room,
        )

    def measure(self, step: int) -> None:
        """Evaluate, and add a line to metrics.jsonl; on another device later, while training goes on."""
        if self.watch:
            self._evaluate(self.watch, step)
            self._ask_whether_to_end()
        self.world.barrier()

    def _ask_whether_to_end(self) -> None:
        """Raises Enough where the evaluations so far are."""
        if reason := self.watch and self.enough(self.folder.evaluations()):
            raise Enough(reason)

    def _evaluate(self, watch: Watch, step: int) -> None:
        between = bool(step % self.steps_per_epoch) and step < self.total
        watch.evaluate(partial(self._report, step), between=between)

    def _wait(self) -> None:
        """Until the evaluations that were asked for are written."""
        if self.watch:
            self.watch.wait()

    def _report(self, step: int, row: Evaluation) -> None:
        row = {"step": step, "epoch": step / self.steps_per_epoch, "precision": self.numerics.precision, **row}
        self.folder.add_evaluation(row)
        self._say(result_line(row))

    def save(self, step: int) -> None:
        """Write ckpt_last.pt, and the one to be kept where --save-every ends an epoch, while training goes on."""
        if self.world.main:
            self._wait()  # an evaluation that is due is made up for only at the last checkpoint
            steps = self.config.save_every * self.steps_per_epoch
            kept = [str(step // self.steps_per_epoch)] if steps and step % steps == 0 else []
            self.folder.save([*kept, "last"], self._state(step))
        self.world.barrier()

    def _state(self, step: int) -> dict:
        """What a checkpoint holds."""
        return {
            "fastbd": __version__,
            "about": self.task.about(self.verb),
            "config": to_dict(self.config),
            "model": self.model.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "seconds": time.perf_counter() - self.began,
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "random": checkpoint.random_state(),
            "plan": self.task.plan and self.task.plan.to_dict(),
            "inputs": self.inputs,
            "decode": self.decoded_by,
        }

    def record(self, row: dict) -> None:
        """Add a line to log.jsonl; `uncaptured` in it says why --graph auto has come to nothing."""
        if self.world.main:
            failed = {"uncaptured": self.step.uncaptured} if self.step.uncaptured else {}
            self.folder.add_losses({**row, "bad_images": len(self.pairs.bad), **failed})

    def _say(self, line: str) -> None:
        if not self.quiet:
            console.print(line, markup=False)


def result_line(row: Mapping[str, Any]) -> str:
    """One evaluation as a line of text."""
    line = f"epoch {row['epoch']:5.1f}  top-1 {row['top1']:6.1%}"
    if row.get("asr") is not None:
        line += f"  ASR {row['asr']:6.1%}  recovery {row['recovery']:6.1%}"
    return f"{line}  ({row['set']}, {row['seconds']:.1f} s)"
