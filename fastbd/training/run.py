"""A run folder and the training that fills it: what pre-training and cleaning share."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from fastbd import __version__
from fastbd.base import dist, files
from fastbd.base.background import Background
from fastbd.base.console import console
from fastbd.base.dist import World
from fastbd.base.environment import environment
from fastbd.base.errors import Diverged, UserError
from fastbd.base.run_folder import read, read_metrics, study_folder_of
from fastbd.base.signals import Stopped
from fastbd.config.fields import portable, to_dict
from fastbd.config.flags import PretrainConfig
from fastbd.data import eda, resident, sampler, sheet
from fastbd.data.beton import Beton
from fastbd.data.decode import HOSTS, ON_GPU, Decoder, has_dali, open_decoder
from fastbd.data.loader import RECIPES, Batch, batches, text_lengths
from fastbd.data.pairs import Pairs
from fastbd.data.shards import Shards as BetonShards
from fastbd.data.shards import open_beton
from fastbd.data.verify import check_whole
from fastbd.evals.embedding import embed
from fastbd.evals.towers import Towers
from fastbd.kernels.text_pack import room_for
from fastbd.methods.method import Method
from fastbd.models import CLIP
from fastbd.models.batchnorm import batch_norms, share_statistics
from fastbd.models.blocks import recompute
from fastbd.models.precision import is_captured, is_compiled, set_precision
from fastbd.poison.plan import Plan
from fastbd.training import checkpoint, divergence
from fastbd.training.fit import Shares, batch_that_fits
from fastbd.training.kept import Kept
from fastbd.training.loop import Enough, Timetable, every, train
from fastbd.training.optim import make_optimizer, restore
from fastbd.training.readback import NotFinite
from fastbd.training.rebound import clean_pairs, rebound
from fastbd.training.resume import check_inputs, inputs
from fastbd.training.roofline import measure_rates, step_seconds
from fastbd.training.step import Step
from fastbd.training.task import ROWS, SPARED, Config, Task
from fastbd.training.watch import LOOKING, Watch

REBOUND_BATCH, REBOUND_LR = 16, 1e-6
FREE = {
    "run", "checkpoint", "lr", "warmup", "seed", "mmcl_weight", "ssl_weight", "siglip_weight", "cyclic_weight",
    "poison_left", "flagged", "flagged_by",
    "force", "landed", "weights", "resume", "out", "save_every", "log_every", "rebound", "plan", "poison", "eval_data",
    "classes", "templates", "eval_every", "eval_subset", "eval_between", "rows_file", "max_bad", "workers", "decode",
    "hw_decoder_load", "resident", "resident_dir", "verify",
}  # fmt: skip
"""Settings in which two runs may differ and still be trained by the same step in the same memory."""


def execute(config: Config, make_task: Callable[[World], Task]) -> int:
    """Do the task that make_task gives in a run folder; exit code 0, or 128 + signal when stopped (and saved)."""
    world = dist.join(config.device)
    if world.main:
        _check_place(config)
    run = Run(config, make_task(world), world)
    try:
        run.train()
        exit_code = 0
    except Stopped as stopped:
        if world.main:
            go_on = f"python -m fastbd {run.verb} --resume {run.folder}"
            console.print(f"stopped and saved; go on with: {go_on}", markup=False)
        exit_code = stopped.exit_code
    # Not after an error: the other ranks may be waiting for this one, and only its death lets torchrun end them.
    dist.leave()
    return exit_code


def _check_place(config: Config) -> None:
    if config.resume:
        if study := study_folder_of(config.resume):  # two would train it: a claim is the judge there
            raise UserError(
                f"{config.resume} is part of the study in {study}: go on with python -m fastbd sweep --out {study}, or "
                "copy the run to another place."
            )
        files.check_out(config.resume, "--resume", instead="copy the run to where that is possible")
    else:
        files.check_out(config.out or Path("runs"))


@dataclass(frozen=True)
class Setup:
    """A model in the device's memory, and what trains it: made once for runs that follow one another."""

    model: CLIP
    method: Method
    batch_size: int
    room: int
    """Tokens that a part of a batch has room for; 1 where its captions need no fixed shape."""
    step: Step


class Run:
    """One training: everything is opened and checked before the folder is made.

    What `kept` holds of earlier runs is used again. `extra` goes into config.json. `enough` is asked after each
    evaluation, with all of them, whether the run shall end, and why. `guard` is called before anything is written; it
    is the judge of whose the run is, where it is given, and else the lock of the folder, until release().
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        world: World,
        kept: Kept | None = None,
        extra: dict | None = None,
        enough: Callable[[tuple[dict, ...]], str | None] = lambda rows: None,
        guard: Callable[[], None] | None = None,
        quiet: bool = False,
    ):
        if config.out and config.out.exists() and not config.resume:
            raise UserError(f"{config.out} exists already: choose another --out, or go on with --resume {config.out}.")
        self.began = time.perf_counter()
        self.config = self.given = config
        resumed, self.task, self.world = task.resumed, replace(task, resumed=None), world
        self.kept, self.extra, self.enough, self.guard = kept or Kept(), extra or {}, enough, guard or (lambda: None)
        self.quiet = quiet or not world.main
        self.verb = "pretrain" if isinstance(config, PretrainConfig) else "clean"
        torch.manual_seed(config.seed)  # which torch draws for each process; checkpoints hold its state
        self.lock: TextIO | None = None
        if config.resume:
            world.main_first(partial(self._hold, config.resume, alone=guard is None))
        self.precision = set_precision(config.precision, world.device)
        self.compiled, self.captured = is_compiled(config.compile, world), is_captured(config.graph, world)
        self.shares = self._shares()
        self.inputs = inputs(config, task)
        if resumed:
            check_inputs(config.resume, resumed, self.inputs)
        if resumed and self.verb == "pretrain":  # --weights have been taken in already
            checkpoint.load_into(task.model, resumed["model"], config.resume, task.model_name)
        divergence.check_weights(resumed["model"] if resumed else task.model.state_dict(), self._source())

        if config.verify:
            world.main_first(self._verify)
        in_place = self._found(resumed)
        self.watch = self._watch()
        self.pairs = self._open_pairs(resumed)
        self.writer = Background(aside=True)
        self._place(in_place)
        if self.watch:
            self.watch.look_at(self.model, self.pairs, precision=self.precision, compiled=self.compiled)
        self.rebound_rows = self._rebound_rows() if self.verb == "clean" and config.rebound else None
        self.method.attach(self)
        self.start = None if resumed and read_metrics(config.resume) else self._checked_start()
        if resumed:
            checkpoint.load_into(self.model, resumed["model"], config.resume, task.model_name)
            checkpoint.load_into(self.method, resumed["method"], config.resume, f"the method {task.name}")
        else:
            self.method.prepare(self.model)
        self._set_up(in_place)
        if state := resumed["optimizer"] if resumed else task.optimizer:
            self._restore(state)
        self.done = resumed["step"] if resumed else 0
        if not 0 <= self.done <= self.total:
            raise UserError(f"the checkpoint in {config.resume} is of step {self.done}, and its run has {self.total:,} "
                            "steps: put back what was changed, or start the run again.")  # fmt: skip
        if resumed:
            self.step.at.fill_(self.done)
            checkpoint.set_random_state(resumed["random"])
            self.began -= resumed["seconds"]
            if resumed["decode"] != self.decoded_by:
                self._say(f"images were decoded by {resumed['decode']}, now by {self.decoded_by}: pixels may differ")
        self.folder = config.resume or self._make_folder()
        if resumed:
            self._rewind(resumed["from"])
            if world.main and resumed["config"].get("log_every") == config.log_every:
                self._tell_of_lost_rows()

    def _hold(self, folder: Path, alone: bool = True) -> None:
        """Keep others from resuming the run while this process trains it."""
        if self.world.main:
            self.lock = files.lock(folder)
            if alone and self.lock is None:
                raise UserError(f"{folder} is being trained by {files.holder(folder)}: wait for it to end, or stop it.")

    def release(self) -> None:
        """Let others resume the run."""
        if self.lock:
            self.lock.close()

    def _verify(self) -> None:
        """Raise a UserError where the rows to train on, or what is evaluated on, are damaged."""
        task = self.task
        if self.world.main:
            check_whole(open_beton(task.data), np.union1d(task.rows, task.held_out), self.quiet)
            if task.eval_data:
                check_whole(open_beton(task.eval_data), quiet=self.quiet)

    def _shares(self) -> Shares:
        """How a batch is shared out, checked before anything is opened."""
        config, world = self.config, self.world
        norms = bool(batch_norms(self.task.model)) and not self.task.method.frozen_norms
        group = config.bn_group if norms and isinstance(config.bn_group, int) else 0
        shares = Shares(world.size, config.accumulate, group, len(self.policies), norms)
        batch_size = config.batch_size
        if batch_size == "auto":
            if world.device.type != "cuda":
                raise UserError("--batch-size auto finds what fits in a GPU's memory; without a GPU give a number.")
            batch_size = world.size * shares.unit
        rows = len(self.task.rows)
        self._check_contrast(rows if config.batch_size == "auto" else min(batch_size, rows))
        shares.check(batch_size, rows)
        synchronised = config.bn_group == "sync" and world.size > 1
        if norms and shares.part(batch_size) * shares.views == 1 and config.epochs and not synchronised:
            raise UserError(
                "batch norm needs the statistics of more than the 1 image that a process embeds at a time: give a "
                "larger --batch-size, or a smaller --accumulate."
            )
        return shares

    def _check_contrast(self, batch_size: int) -> None:
        """Raise a UserError where a batch of one is to be trained by telling its pairs apart: it teaches nothing."""
        if batch_size < 2 and self.task.method.contrasts and self.config.epochs:
            raise UserError(
                "the loss tells the pairs of a batch from one another, so a batch needs 2 or more: --batch-size is "
                f"{self.config.batch_size}, and {len(self.task.rows):,} of the data's pairs are trained on."
            )

    def _source(self) -> Path | str:
        """Where the weights to begin with come from."""
        config = self.config
        if config.resume:
            return checkpoint.path_of(config.resume, "last")
        given = checkpoint.path_of(config.run, config.checkpoint) if self.verb == "clean" else config.weights
        return given or "the new model"

    def _found(self, resumed: dict | None) -> Setup | None:
        """That of an earlier run whose memory fits; else the earlier one goes, before anything takes its room."""
        found = self.kept.held("setup", self._structure())
        if found and resumed is None and self.task.optimizer is None:  # optimizer states that are read lie elsewhere
            return found
        self.kept.drop("setup", *LOOKING)
        if self.compiled:
            torch.compiler.reset()  # which compiles a function for so many models, and no more
        return None

    def _place(self, found: Setup | None) -> None:
        """Put the task's model and method on the device."""
        task, world = self.task, self.world
        if found:
            self.model, self.method = found.model, found.method
            self.model.load_state_dict(task.model.state_dict())
            self.model.train()
            self.method.objective = task.method.objective
            return
        self.model = task.model.to(world.device, memory_format=torch.channels_last).train()
        self.method = task.method.to(world.device)
        if self.config.grad_checkpointing:
            recompute(self.model)
        if self.shares.group:
            share_statistics(self.model, self.shares.group)

    def _restore(self, state: dict) -> None:
        """The optimizer's state, of this run or of the one that is cleaned."""
        try:
            restore(self.step.optimizer, state)
        except (KeyError, ValueError):
            if self.config.resume:
                raise UserError(
                    f"the checkpoint in {self.config.resume} holds the optimizer's state of other parameters than "
                    f"{self.task.model_name} has: put back what was changed, or start the run again."
                ) from None
            raise UserError(
                f"--keep-optimizer: {self.task.start} and --method {self.task.method_name} do not train the same "
                "parameters, as one has a head of its own; leave it out."
            ) from None

    def _set_up(self, found: Setup | None) -> None:
        """The step, and the length of the run."""
        config, task = self.config, self.task
        lengths = text_lengths(self.pairs, task.rows, self.text_view(0))
        self.tokens = float(lengths.mean())
        batch_size, self.room = (found.batch_size, found.room) if found else self._layout(lengths)
        config = self.config = replace(config, batch_size=batch_size)
        self.steps_per_epoch = len(task.rows) // batch_size
        self.total = config.epochs * self.steps_per_epoch
        rates = self.method.rates(config.lr, warmup=min(config.warmup, self.total // 2), total=self.total)
        if found:
            self.step = found.step
            self.step.restart(rates)
            return
        betas = (config.beta1, config.beta2)
        optimizer = make_optimizer(
            self.model, self.method, lr=config.lr, weight_decay=config.weight_decay, betas=betas, eps=config.eps
        )
        self.step = Step(
            self.model, self.method, optimizer, rates, precision=self.precision, world=self.world,
            parts=config.accumulate, compiled=self.compiled, fused=config.compile == "fused", captured=self.captured,
            falls_back=config.graph == "auto",
        )  # fmt: skip
        setup = Setup(self.model, self.method, batch_size, self.room, self.step)
        self.kept.put("setup", self._structure(), setup)

    def _structure(self) -> str:
        """All that a step in memory depends on: every setting that is not known to be free."""
        task, settings = self.task, to_dict(self.given)
        settings = {name: value for name, value in settings.items() if name not in FREE}
        terms = [weight > 0 for weight in task.method.objective.weights]
        model = [task.model_name, task.model.spec.activation]
        return json.dumps([*model, str(task.data), len(task.rows), settings, terms, self.precision])

    def _layout(self, lengths: np.ndarray) -> tuple[int, int]:
        """The size of a batch, and room for the captions of a part of it."""
        config, task, world = self.config, self.task, self.world
        batch_size = config.batch_size
        if batch_size == "auto":
            batch_size = batch_that_fits(
                self.model, self.method, self.shares, texts=self.texts, tokens=self.tokens, most=len(task.rows),
                precision=self.precision, world=world,
            )  # fmt: skip
            self._say(f"--batch-size {batch_size} fits")
            self._check_contrast(batch_size)
        if config.bn_group == "sync" and world.size > 1:
            share_statistics(self.model, 0, world.group)
        fixed = self.compiled or self.captured
        return batch_size, room_for(lengths.sum(1), self.shares.part(batch_size)) if fixed else 1

    @property
    def rows(self) -> np.ndarray:
        return self.task.rows

    @property
    def flagged(self) -> np.ndarray:
        return self.task.rows[:0] if self.task.flagged is None else self.task.flagged

    @property
    def data_size(self) -> int:
        return len(self.pairs.beton)

    @property
    def labels(self) -> np.ndarray | None:
        return self.pairs.beton.labels

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def device(self) -> torch.device:
        return self.world.device

    def embed(self, rows: np.ndarray, images: bool = True, texts: bool = True) -> tuple:
        """Raw embeddings, float32 [N, D], of the base views and of the captions, by the model as it is."""
        if self.watch is None or self.watch.aside:
            towers = Towers(self.model, precision=self.precision, device=self.device)
        else:
            towers = self.watch.zeroshot.towers
            towers.refresh()
        return embed(towers, self.pairs, rows, images=images, texts=texts)

    def _open_pairs(self, resumed: dict | None) -> Pairs:
        """The training pairs, decoded to where --resident says."""
        config, task = self.config, self.task
        beton = open_beton(task.data)
        if task.method.objective.augments_texts and beton.num_text_views == 0:
            raise UserError(
                f"{task.data} holds no second text views: build it with --text-views 1, or train with --no-ssl-text."
            )
        plan = task.plan if task.poisoned else None
        base = set(self.policies) <= {"plain", "light"}  # which begin with the base view
        decode, where = self._decoder_and_place(resumed)
        settings = (decode, config.hw_decoder_load, where, str(config.resident_dir), config.workers, config.max_bad)
        stamped = plan and plan.to_dict()
        key = (str(task.data), task.rows.tobytes(), base, task.model.image_size, json.dumps(stamped), settings)
        return self.kept.get("pairs", key, partial(self._decoded_pairs, beton, plan, base, decode, where))

    def _decoder_and_place(self, resumed: dict | None) -> tuple[str, str]:
        """--decode and --resident, or what a resumed run takes in their place."""
        given = self.config.decode, self.config.resident
        if resumed is None or self.device.type != "cuda":
            return given
        decode, where = taken = same_pixels(resumed["decode"], *given)
        if taken != given:
            began = f"the run began with images decoded by {resumed['decode']}"
            self._say(f"{began}: it goes on with --decode {decode} --resident {where}")
        return taken

    def _decoded_pairs(
        self, beton: Beton | BetonShards, plan: Plan | None, base: bool, decode: str, where: str
    ) -> Pairs:
        task, most_bad = self.task, int(self.config.max_bad * len(self.task.rows))
        pairs = Pairs(beton, self._decoder(decode), task.model.image_size, plan, most_bad)
        folder = self.config.resident_dir
        said = resident.keep(pairs, task.rows, where, base=base, world=self.world, folder=folder, quiet=self.quiet)
        self._say(said)
        return pairs

    @property
    def decoded_by(self) -> str:
        """What the pixels of the images depend on."""
        return self.pairs.decoder.about

    @property
    def policies(self) -> tuple[str, ...]:
        """Those that draw the image views of a step."""
        policies = RECIPES[self.config.views]
        if not self.task.method.objective.augments_images:
            return policies[:1]
        if len(policies) == 1:
            raise UserError(
                f"--views {self.config.views} has no second view for the self-supervised loss: "
                "give other --views, or --no-ssl-image."
            )
        return policies

    def text_view(self, epoch: int) -> int | None:
        """The number of the captions' second view in an epoch; None where a step has none."""
        if not self.task.method.objective.augments_texts:
            return None
        return epoch % self.pairs.beton.num_text_views if self.config.eda == "epoch" else 0

    @property
    def texts(self) -> int:
        """Captions of a pair in a step."""
        return 2 if self.task.method.objective.augments_texts else 1

    def _decoder(self, decode: str, threads: int = 0) -> Decoder:
        config = self.config
        return open_decoder(decode, config.workers or threads, str(self.world.device), config.hw_decoder_load)

    def _watch(self) -> Watch | None:
        """What evaluates, on the main rank, where there is something to evaluate on."""
        config, task, trains = self.config, self.task, self.world.device
        every(config.eval_every, 1, 1)  # what it cannot read is to be known before training
        device = dist.device_of(config.eval_device) if config.eval_device else trains
        if task.eval_data is None or not self.world.main:
            return None
        cores = os.cpu_count() or 1  # the other processes have nothing to decode meanwhile
        decoder = partial(self._decoder, config.decode, cores)
        return Watch(config, task, device, aside=device != trains, kept=self.kept, decoder=decoder)

    def _checked_start(self) -> dict | None:
        """The model that is to be cleaned, evaluated. UserError when there is no backdoor in it to be removed."""
        config = self.config
        if self.watch is None or (self.verb == "pretrain" and config.epochs):
            return None
        row = self.watch.start()
        if self.verb == "clean" and row.get("asr") is not None and row["asr"] < config.landed and not config.force:
            raise UserError(
                f"the attack on {self.task.start} has not landed: ASR {row['asr']:.1%} is below {config.landed:.0%} "
                "(--landed), so a low ASR after cleaning would show nothing; clean it all the same with --force."
            )
        return row

    def _rewind(self, path: Path) -> None:
        """Drop what was written after the checkpoint `path`: those steps come again. It takes the last one's place."""
        if self.world.main:
            for name in ("log.jsonl", "metrics.jsonl"):
                files.rewind(self.folder / name, self.done)
            for made_again in (divergence.FILE, "result.json"):
                files.discard(self.folder / made_again)
            last = checkpoint.path_of(self.folder, "last")
            if path != last:  # nothing may be left to be done that would write it
                with files.replacing(last) as temporary:
                    shutil.copyfile(path, temporary)

    def _tell_of_lost_rows(self) -> None:
        """Say how many rows of log.jsonl are missing up to the checkpoint, as after a loss of power."""
        path, every_so_many = self.folder / "log.jsonl", self.config.log_every
        there = {row["step"] for row in read(self.folder).log}
        lost = [step for step in range(every_so_many, self.done + 1, every_so_many) if step not in there]
        if lost:
            said = f"{path} has lost {len(lost):,} rows, the first of step {lost[0]:,}: the run goes on without them"
            console.print(said, markup=False)

    def _make_folder(self) -> Path:
        """--out, or the first free runs/NAME; with a checkpoint, samples.png, plan.json, and so on.

        All at once, so that there is no run folder which --resume could not go on from.
        """
        config, task = self.config, self.task
        folder = config.out or free_folder(Path("runs") / task.name)
        samples = sheet.samples(self.pairs, task.rows, self.policies, seed=config.seed, text_view=self.text_view(0))
        self.world.barrier()  # every rank has looked before one makes it
        if self.world.main:
            about = {"name": folder.name, "fastbd": __version__, **task.about(self.verb), **self.extra}
            about |= {"start_step": task.start_step, "start_weights": self.inputs["start"], "config": to_dict(config)}
            with _new_folder(folder) as new:
                pixels = {"decode": self.decoded_by, "resident": self.pairs.where}
                synonyms = {"plan_eda_synonyms": eda.synonyms_source()}
                files.write_json(new / "env.json", environment() | synonyms | pixels)
                if task.plan:
                    task.plan.save(new / "plan.json")
                for name, rows in ((ROWS, config.rows_file), (SPARED, getattr(config, "flagged_by", None))):
                    if rows:
                        shutil.copyfile(rows, new / name)
                samples.save(new / "samples.png")
                checkpoint.save(checkpoint.path_of(new, "last"), self._state(0))
                files.write_json(new / "config.json", about)
                self._hold(new)
        return folder

    def train(self) -> str:
        """From where the run stands to its end; returns how it ended. Others may resume it then."""
        try:
            return self._train()
        finally:
            self.release()

    def _train(self) -> str:
        config, task = self.config, self.task
        planned = int((task.plan.attack_of[task.rows] >= 0).sum()) if task.plan and task.poisoned else 0
        self._say(
            f"{self.folder}: {task.method_name or 'pre-training'} of {task.model_name} with "
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
            self._evaluate(self.done)  # on another device, it had not ended when the run was stopped
        began, reason = time.perf_counter(), "finished"
        try:
            if self.done:  # it may have been killed before it ended
                self._ask_whether_to_end()
            train(
                self.step, self.batches, table, start=self.done, label="" if self.quiet else self.folder.name,
                pairs_limit=self.pairs_limit(), world=self.world, evaluate=self.measure, save=self.save,
                record=self.record,
            )  # fmt: skip
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
            self.writer.wait()
        how = f"done: {self.total - self.done:,} steps" if reason == "finished" else f"ended early ({reason})"
        self._say(f"{how} in {time.perf_counter() - began:.0f} s, evaluations included; {self.folder}")
        self._say_whether_they_landed()
        self._end(reason)
        return reason

    def _diverged(self, broken: NotFinite) -> str:
        """Write diverged.json, and return the sentence that tells of the step."""
        rates = self.step.rates[: broken.step].tolist()
        epoch, path = broken.step / self.steps_per_epoch, self.folder / divergence.FILE
        if self.world.main:
            self.guard()
            rows = self._rows_of(broken.step)
            divergence.record(self.folder, broken, epoch=epoch, lr=rates[-1], data=portable(self.task.data), rows=rows)
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
        evaluating = sum(row["seconds"] for row in read_metrics(self.folder))
        gpu = self.device.type == "cuda"
        result = {
            "reason": reason,
            "seconds": seconds,
            "train_seconds": seconds - evaluating,
            "evaluate_seconds": evaluating,
            "device": torch.cuda.get_device_name(self.device) if gpu else "CPU",
            "devices": self.world.size,
        }
        if self.rebound_rows is not None and reason == "finished":
            with suppress(Diverged):  # the cleaning itself has not
                result["rebound"] = self._rebound()
        self.guard()
        files.write_json(self.folder / "result.json", result)

    def _rebound(self) -> dict:
        """Which leaves other weights behind: the last thing that is done with them."""
        pairs = Pairs(self.pairs.beton, self.pairs.decoder, self.pairs.size, max_bad=self.pairs.max_bad)
        return rebound(
            self.model, self.watch.zeroshot, pairs, self.rebound_rows, steps=self.config.rebound, lr=REBOUND_LR,
            precision=self.precision, world=self.world,
        )  # fmt: skip

    def _rebound_rows(self) -> np.ndarray:
        if self.watch is None or not self.watch.data.measures_asr or self.world.size > 1:
            raise UserError(
                "--rebound watches ASR, in one process: it needs a plan, and --eval-data with its target and with "
                "images of other classes."
            )
        if self.shares.group and REBOUND_BATCH % self.shares.group:
            raise UserError(f"--rebound takes {REBOUND_BATCH} pairs a step: give a --bn-group that divides it.")
        return clean_pairs(self.pairs, self.task.plan, self.config.rebound * REBOUND_BATCH)

    def _measured(self) -> set[int]:
        """Steps that have been evaluated."""
        return {row["step"] for row in read_metrics(self.folder)}

    def _say_whether_they_landed(self) -> None:
        """Each attack, by the last evaluation of pre-training."""
        rows = read(self.folder).attacks if self.world.main and self.verb == "pretrain" and self.task.poisoned else ()
        for attack in rows[-1].get("attacks", [rows[-1]]) if rows else ():
            if attack["asr"] is None:
                continue  # all images are of its target class
            landed = attack["asr"] >= self.config.landed
            self._say(
                f"the attack, {attack['trigger']} to '{attack['target']}', has {'' if landed else 'not '}landed: ASR "
                f"{attack['asr']:.1%} is {'' if landed else 'not '}at least {self.config.landed:.0%} (--landed)"
                + ("" if landed else "; poison more pairs (poison --rate) or train longer (--epochs)")
            )

    def pairs_limit(self) -> float:
        """Pairs a second of all GPUs by the compiled roofline."""
        rates = self.kept.get("rates", self.precision, lambda: measure_rates(self.world.device, self.precision))
        batch = self.config.batch_size // self.world.size
        least = step_seconds(
            self.model, rates, batch=batch, views=len(self.policies), texts=self.texts, tokens=self.tokens,
            precision=self.precision,
        )  # fmt: skip
        limits = {way: batch * self.world.size / seconds for way, seconds in least.items()}
        self._say(
            f"{rates.matmul / 1e12:.3g} TFLOP/s and {rates.bandwidth / 1e9:.3g} GB/s allow {limits['compiled']:,.0f} "
            f"pairs/s with compiled ops (eager {limits['eager']:,.0f}, fused {limits['fused']:,.0f})"
        )
        return limits["compiled"]

    def batches(self, epoch: int, offset: int) -> Iterator[Batch]:
        """This rank's batches of an epoch, from its step `offset` on."""
        if offset == 0:
            if self.world.main:
                self.method.begin(epoch, self)
            self.world.share(self.method.state_dict().values())
            self.step.forget(self.method.renewed)
        self.step.begin(epoch)
        narrow = self.precision == "bf16" and self.world.device.type == "cuda"
        rows, seed = self.method.rows(epoch, self.task.rows), self.config.seed
        return batches(
            self.pairs, rows, self.config.batch_size, seed=seed, policies=self.policies,
            text_view=self.text_view(epoch), world=self.world, epoch=epoch, start=offset,
            dtype=torch.bfloat16 if narrow else torch.float32, parts=self.config.accumulate, room=self.room,
        )  # fmt: skip

    def measure(self, step: int) -> None:
        """Evaluate, and add a line to metrics.jsonl; on another device later, while training goes on."""
        if self.watch:
            self._evaluate(step)
            self._ask_whether_to_end()
        self.world.barrier()

    def _ask_whether_to_end(self) -> None:
        """Raises Enough where the evaluations so far are."""
        if reason := self.watch and self.enough(read_metrics(self.folder)):
            raise Enough(reason)

    def _evaluate(self, step: int) -> None:
        between = bool(step % self.steps_per_epoch) and step < self.total
        self.watch.evaluate(partial(self._report, step), between=between)

    def _wait(self) -> None:
        """Until the evaluations that were asked for are written."""
        if self.watch:
            self.watch.wait()

    def _report(self, step: int, row: dict) -> None:
        self.guard()
        row = {"step": step, "epoch": step / self.steps_per_epoch, "precision": self.precision, **row}
        files.append(self.folder / "metrics.jsonl", row)
        self._say(result_line(row))

    def save(self, step: int) -> None:
        """Write ckpt_last.pt, and the one to be kept where --save-every ends an epoch, while training goes on."""
        if self.world.main:
            self._wait()  # an evaluation that is due is made up for only at the last checkpoint
            self.guard()
            steps = self.config.save_every * self.steps_per_epoch
            kept = [str(step // self.steps_per_epoch)] if steps and step % steps == 0 else []
            self.writer.wait()  # there is memory for one snapshot
            snapshot = checkpoint.Snapshot(self._state(step))
            self.writer.start(partial(self._write, [*kept, "last"], snapshot))
        self.world.barrier()

    def _write(self, names: list[str], snapshot: checkpoint.Snapshot) -> None:
        state = snapshot.wait()
        for told in ("log.jsonl", "metrics.jsonl"):  # on the disk before it: what it is past is not told again
            if (path := self.folder / told).exists():
                files.sync(path)
        for name in names:  # the last one last: what it is past is not done again
            checkpoint.save(checkpoint.path_of(self.folder, name), state)

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
            files.append(self.folder / "log.jsonl", {**row, "bad_images": len(self.pairs.bad), **failed})

    def _say(self, line: str) -> None:
        if not self.quiet:
            console.print(line, markup=False)


def same_pixels(began: str, decode: str, where: str) -> tuple[str, str]:
    """--decode and --resident with which a GPU gives the pixels of the decoder `began`, where there is a choice."""
    if decode not in ("auto", "dali"):
        return decode, where
    if began.startswith(ON_GPU):
        return decode, "none"  # images that are kept are decoded on the CPU
    if began in HOSTS:
        return "dali-cpu" if has_dali() else "pil", where
    return decode, where


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield files.new_folder(folder), without what killed runs left of it. UserError where another has the name."""
    files.remove_unfinished(folder)
    try:
        with files.new_folder(folder) as new:
            yield new
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"another run has just made {folder}: choose another --out, or run this again.") from None


def free_folder(path: Path) -> Path:
    """`path`, or path-2, path-3, ... when it is taken."""
    candidates = (path if k == 1 else path.with_name(f"{path.name}-{k}") for k in range(1, 10_000))
    return next(p for p in candidates if not p.exists())


def result_line(row: dict) -> str:
    """One evaluation as a line of text."""
    line = f"epoch {row['epoch']:5.1f}  top-1 {row['top1']:6.1%}"
    if row.get("asr") is not None:
        line += f"  ASR {row['asr']:6.1%}  recovery {row['recovery']:6.1%}"
    return f"{line}  ({row['set']}, {row['seconds']:.1f} s)"
