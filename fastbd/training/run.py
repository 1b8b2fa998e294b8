"""A training, from the opening of its inputs to its end: what pre-training and cleaning share."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
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
from fastbd.base.tradeoff import is_near_chance
from fastbd.config.fields import portable, to_dict
from fastbd.config.flags import PretrainConfig
from fastbd.data import eda, sheet
from fastbd.kernels import native
from fastbd.track.process import tracked
from fastbd.training import checkpoint, divergence
from fastbd.training.folder import RunFolder, check_place, free_folder
from fastbd.training.loop import Enough, train
from fastbd.training.opened import Opened
from fastbd.training.readback import NotFinite
from fastbd.training.resume import say_what_code_changed
from fastbd.training.reuse import Kept
from fastbd.training.task import ROWS, SPARED, Config, Task
from fastbd.training.timetable import Timetable, every
from fastbd.training.watch import Watch


def execute(config: Config, make_task: Callable[[World], Task]) -> tuple[int, Path]:
    """Do the task that make_task gives; returns an exit code and the run's folder.

    The code is 0, or 128 + signal when the training was stopped (and saved), or by Ctrl-C before its first step.
    KeyboardInterrupt where that came before there was a folder.
    """
    world = dist.join(config.device)
    if world.main:
        check_place(config)
    folder, exit_code, saved = RunFolder(world), 0, True
    try:
        Run(config, make_task(world), world, folder=folder).train()
    except Stopped as stopped:
        exit_code = stopped.exit_code
    except KeyboardInterrupt:  # while the training opens; or a second one, while it saves
        if not (config.resume or folder.exists):
            raise
        exit_code, saved = 128 + signal.SIGINT, False
    finally:
        folder.release()
    path = config.resume or folder.path
    if exit_code and world.main:
        how = "stopped and saved" if saved else "stopped"
        console.print(
            f"{how}; go on with: python -m fastbd {verb_of(config)} --resume {quote(str(path))}", markup=False
        )
    # Not after an error: the other ranks may be waiting for this one, and only its death lets torchrun end them.
    if saved:
        dist.leave()
    return exit_code, path


def verb_of(config: Config) -> str:
    """Return the verb of a training."""
    return "pretrain" if isinstance(config, PretrainConfig) else "clean"


class Run:
    """One training: everything is opened and checked before the folder is made.

    What `kept` holds of earlier runs is used again. `extra` goes into config.json. `enough` is asked after each
    evaluation, with all of them, whether the run shall end, and why. `folder` is where the run is written.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        world: World,
        kept: Kept | None = None,
        extra: dict | None = None,
        enough: Callable[[tuple[RecordedEvaluation, ...]], str | None] = lambda rows: None,
        folder: RunFolder | None = None,
        quiet: bool = False,
    ):
        if config.out and config.out.exists() and not config.resume:
            raise UserError(
                f"{config.out} exists already: choose another --out, or go on with --resume {quote(str(config.out))}."
            )
        self.began = self.called = time.perf_counter()
        resumed, task = task.resumed, replace(task, resumed=None)
        self.config, self.task, self.world = config, task, world
        self.extra, self.enough = extra or {}, enough
        self.quiet = quiet or not world.main
        self.verb = verb_of(config)
        torch.manual_seed(config.seed)  # which torch draws for each process; checkpoints hold its state
        self.folder = folder or RunFolder(world)
        if config.resume:
            self.folder.resume(config.resume)
        self.opened = Opened(config, task, world, kept or Kept(), self.folder, resumed, self.quiet)
        if resumed:
            if world.main:
                say_what_code_changed(self.folder.path)
            self.began -= resumed["seconds"]
            self.folder.rewind(resumed["from"], self.opened.done)
            if resumed["config"].get("log_every") == config.log_every:
                self.folder.tell_of_lost_rows(self.opened.done, config.log_every)
        else:
            self._make_folder()

    def _make_folder(self) -> None:
        """Make --out, or the first free runs/NAME."""
        config, task, opened = self.config, self.task, self.opened
        path = config.out or free_folder(Path("runs") / task.name)
        shown = {"seed": config.seed, "text_view": opened.text_view(0)}
        samples = sheet.samples(opened.pairs, task.rows, opened.policies, **shown)
        about = {"name": path.name, "fastbd": __version__, **task.about(self.verb, config), **self.extra}
        about |= {
            "start_step": task.start_step,
            "start_weights": opened.inputs["start"],
            "warmup_steps": opened.warmup,
            "pairs": len(task.rows),
            "built": opened.pairs.beton.built,
            "config": to_dict(config),
        }

        def write(folder: Path) -> None:
            pixels = {"decode": opened.decoded_by, "resident": opened.pairs.where}
            numerics = {"precision": opened.numerics.precision, "libraries": native.found()}
            synonyms = {"plan_eda_synonyms": eda.synonyms_source()}
            files.write_json(folder / "env.json", environment() | synonyms | pixels | numerics)
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
            with tracked(self.folder.path, self.config.track if self.world.main else ()):
                return self._train()
        finally:
            self.folder.release()

    def _train(self) -> str:
        config, task, opened = self.config, self.task, self.opened
        fewer, unwatched = _fewer(task.rows, config, "rows"), _fewer(task.held_out, config, "watch")
        some = f"{len(task.held_out):,}" if len(task.held_out) else "no"
        watched = f", {some} held-out pairs watched{unwatched}" if opened.watch and unwatched else ""
        other = opened.total and opened.warmup not in (None, config.warmup)
        cut = f" ({opened.warmup:,} of warm-up; --warmup {config.warmup:,})" if other else ""
        planned = int((task.plan.attack_of[task.rows] >= 0).sum()) if task.plan and task.poisoned else 0
        self._say(
            f"{self.folder.path}: {task.method_name or 'pre-training'} of {task.model_name} with "
            f"{task.method.objective_name}, {len(task.rows):,} pairs{fewer} of {task.data} ({planned:,} poisoned), "
            f"{opened.total:,} step{'s' * (opened.total != 1)}{cut}, "
            f"evaluated on {opened.watch or 'nothing: no --eval-data'}{watched}"
        )
        if opened.start:
            self._report(0, opened.start)
        evaluations = every(config.eval_every, opened.steps_per_epoch, opened.total)
        table = Timetable(
            opened.steps_per_epoch,
            opened.total,
            evaluations,
            evaluations | every("epoch", opened.steps_per_epoch, opened.total),
            config.log_every,
        )
        if opened.watch and opened.done in table.evaluate_at and opened.done not in self._measured():
            self._evaluate(opened.watch, opened.done)  # on another device, it had not ended when the run was stopped
        reason = "finished"
        try:
            if opened.done:  # it may have been killed before it ended
                self._ask_whether_to_end()
            train(
                opened.step,
                opened.batches,
                table,
                start=opened.done,
                label="" if self.quiet else self.folder.path.name,
                pairs_limit=opened.pairs_limit(),
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
        left = opened.total - opened.done
        how = f"done: {left:,} step{'s' * (left != 1)}" if reason == "finished" else f"ended early ({reason})"
        self._say(f"{how} in {time.perf_counter() - self.called:.0f} s, evaluations included; {self.folder.path}")
        self._say_whether_they_landed()
        self._end(reason)
        return reason

    def _diverged(self, broken: NotFinite) -> str:
        """Write diverged.json, and return the sentence that tells of the step."""
        rates = self.opened.step.rates[: broken.step].tolist()
        epoch, path = broken.step / self.opened.steps_per_epoch, self.folder.path / divergence.FILE
        if self.world.main:
            self.folder.guard()
            data, rows = portable(self.task.data), self.opened.rows_of(broken.step)
            divergence.record(self.folder.path, broken, epoch=epoch, lr=rates[-1], data=data, rows=rows)
        return divergence.sentence(broken, moved=any(rates[:-1]), lr=self.config.lr, path=path)

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
        if self.opened.rebound and reason == "finished":
            with suppress(Diverged):  # the cleaning itself has not
                result["rebound"] = self.opened.rebound()
        self.folder.end(result)

    def _measured(self) -> set[int]:
        """Steps that have been evaluated."""
        return {row["step"] for row in self.folder.evaluations()}

    def _say_whether_they_landed(self) -> None:
        """Each attack, by the last evaluation of pre-training."""
        rows = (
            read(self.folder.path).attacks if self.world.main and self.verb == "pretrain" and self.task.poisoned else ()
        )
        if rows and (classes := rows[-1].get("n_classes")):
            least = rows[-1].get("top1_low", rows[-1]["top1"])
            if is_near_chance(least, 1 / classes):
                told = f"top-1 {rows[-1]['top1']:.1%}, and guessing among {classes:,} classes gives {1 / classes:.1%}"
                self._say(f"the model is near chance ({told}): cleaning it shows nothing; train longer (--epochs)")
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

    def measure(self, step: int) -> None:
        """Evaluate, and add a line to metrics.jsonl; on another device later, while training goes on."""
        if self.opened.watch:
            self._evaluate(self.opened.watch, step)
            self._ask_whether_to_end()
        self.world.barrier()

    def _ask_whether_to_end(self) -> None:
        """Raises Enough where the evaluations so far are."""
        if reason := self.opened.watch and self.enough(self.folder.evaluations()):
            raise Enough(reason)

    def _evaluate(self, watch: Watch, step: int) -> None:
        between = bool(step % self.opened.steps_per_epoch) and step < self.opened.total
        watch.evaluate(partial(self._report, step), between=between)

    def _wait(self) -> None:
        """Until the evaluations that were asked for are written."""
        if self.opened.watch:
            self.opened.watch.wait()

    def _report(self, step: int, row: Evaluation) -> None:
        row = {
            "step": step,
            "epoch": step / self.opened.steps_per_epoch,
            "precision": self.opened.numerics.precision,
            **row,
        }
        self.folder.add_evaluation(row)
        self._say(result_line(row))

    def save(self, step: int) -> None:
        """Write ckpt_last.pt, and the one to be kept where --save-every ends an epoch, while training goes on."""
        if self.world.main:
            self._wait()  # an evaluation that is due is made up for only at the last checkpoint
            steps = self.config.save_every * self.opened.steps_per_epoch
            kept = [str(step // self.opened.steps_per_epoch)] if steps and step % steps == 0 else []
            self.folder.save([*kept, "last"], self._state(step))
        self.world.barrier()

    def _state(self, step: int) -> dict:
        """What a checkpoint holds."""
        opened = self.opened
        return {
            "fastbd": __version__,
            "about": self.task.about(self.verb, self.config),
            "config": to_dict(self.config),
            "model": opened.model.state_dict(),
            "method": opened.method.state_dict(),
            "optimizer": opened.step.optimizer.state_dict(),
            "seconds": time.perf_counter() - self.began,
            "step": step,
            "epoch": step / opened.steps_per_epoch,
            "random": checkpoint.random_state(),
            "plan": self.task.plan and self.task.plan.to_dict(),
            "inputs": opened.inputs,
            "decode": opened.decoded_by,
            "precision": opened.numerics.precision,
            "libraries": native.found(),
        }

    def record(self, row: dict) -> None:
        """Add a line to log.jsonl; `uncaptured` in it says why --graph auto has come to nothing."""
        if self.world.main:
            failed = {"uncaptured": self.opened.step.uncaptured} if self.opened.step.uncaptured else {}
            about = {"lr": self.opened.rates[row["step"] - 1], "bad_images": len(self.opened.pairs.bad)}
            self.folder.add_losses({**row, **about, **failed})

    def _say(self, line: str) -> None:
        if not self.quiet:
            console.print(line, markup=False)


def _fewer(rows: np.ndarray, config: Config, flag: str) -> str:
    """Return a bracket that says so where there are fewer rows than a flag of `clean` asks for; else nothing."""
    asked = getattr(config, flag, 0)
    there = "all there are" if len(rows) else "none is left over"
    return f" ({there}; --{flag} {asked:,})" if len(rows) < asked else ""


def result_line(row: Mapping[str, Any]) -> str:
    """One evaluation as a line of text."""
    line = f"epoch {row['epoch']:5.1f}  top-1 {row['top1']:6.1%}"
    if row.get("asr") is not None:
        line += f"  ASR {row['asr']:6.1%}  recovery {row['recovery']:6.1%}"
    return f"{line}  ({row['set']}, {row['seconds']:.1f} s)"
