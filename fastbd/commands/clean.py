"""fastbd clean"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np

from fastbd.base import random
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.run_folder import read_config
from fastbd.commands.demo_data import located
from fastbd.config.cards import short
from fastbd.config.flags import CleanConfig
from fastbd.config.method_flags import FlaggedSettings
from fastbd.config.recipes import check_carried
from fastbd.data.beton import Beton
from fastbd.data.rows import read_rows
from fastbd.data.shards import Shards, open_beton
from fastbd.methods.method import make_method
from fastbd.models.clip import create_like
from fastbd.poison.plan import Plan
from fastbd.training import checkpoint
from fastbd.training.resume import resumed
from fastbd.training.run import execute
from fastbd.training.task import SPARED, Task, allowed_rows, check_trained_on


def run(config: CleanConfig) -> int:
    """Clean a run's model into a run folder of its own; exit code 0, or 128 + signal when stopped."""
    return train(config)[0]


def train(config: CleanConfig) -> tuple[int, Path]:
    """Clean a run's model into a run folder of its own; returns the exit code and the folder."""
    if config.run is None:
        raise UserError("clean needs --run, the folder of the run to clean; for example --run runs/mmcl.")
    config = located(config)
    return execute(config, partial(task, config))


def task(config: CleanConfig, world: World) -> Task:
    """The cleaning that the flags ask for, which name a run."""
    assert config.run is not None, "train and a study see to it"
    state = resumed(config, world)
    if not state:
        check_carried(config, config.run, read_config(config.run)["config"])
    path = checkpoint.path_of(config.run, config.checkpoint)
    saved = checkpoint.load(path)
    if config.checkpoint == "last" and not (state or config.force):
        _check_ended(config.run, saved)
    source, plan = saved["about"], saved["plan"] and Plan.from_dict(saved["plan"])
    model = create_like(source, seed=0)
    checkpoint.load_into(model, saved["model"], path, source["model"])
    data = config.data or Path(source["data"])
    for flag, count in (("--poison-left", config.poison_left), ("--flagged", getattr(config, "flagged", 0))):
        if count and (config.data or not plan):
            raise UserError(f"{flag} takes pairs that the run's plan poisons: leave --data out, and clean such a run.")
    beton = open_beton(data)
    if plan and not config.data:
        plan.check(beton.fingerprint, len(beton), data)  # else its rows would mean others now
    if not (config.data or state):
        remedy = f"put that back, or clean on what it is now with --data {data}"
        check_trained_on(config.run, saved, beton, remedy)
    allowed = allowed_rows(config, beton)
    flagged = flagged_rows(config, beton, allowed, plan)
    others, count = np.setdiff1d(allowed, flagged), config.rows - len(flagged)
    rows, held_out = cleaning_rows(beton, others, plan, count, config.seed, left=config.poison_left, watch=config.watch)
    return Task(
        name=f"{config.run.resolve().name}-{short(config.method)}",
        model=model,
        model_name=source["model"],
        method=make_method("method", config.method, config),
        pretrain_objective=source["pretrain_objective"],
        method_name=config.method,
        start=config.run,
        start_step=saved["step"],
        cards=source.get("cards", {}),
        data=data,
        rows=np.union1d(rows, flagged),
        flagged=flagged,
        held_out=held_out,
        plan=plan,
        poisoned=bool(config.poison_left or len(flagged)) and plan is not None and plan.data == beton.fingerprint,
        eval_data=config.eval_data or (Path(source["eval_data"]) if source["eval_data"] else None),
        classes=config.classes or (None if config.eval_data else source["classes"]),
        templates=config.templates or source["templates"],
        optimizer=saved["optimizer"] if config.keep_optimizer else None,
        resumed=state,
    )


def _check_ended(run: Path, saved: dict) -> None:
    """Raise a UserError where the last checkpoint is that of a run that is not at its end: another will take its place.

    What starts from either would be taken for cleanings of one model.
    """
    if not (run / "result.json").exists():
        raise UserError(
            f"{run} is not at its end (step {saved['step']:,}, no result.json): go on with it by python -m "
            f"fastbd {saved['about']['verb']} --resume {quote(str(run))}, or clean the model as it is with --force."
        )


def cleaning_rows(
    beton: Beton | Shards, rows: np.ndarray, plan: Plan | None, count: int, seed: int, *, left: int, watch: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the rows drawn from the seed, or all if there are fewer, `left` of them poisoned; and `watch` others
    that are clean, or as many as there are. Both ascending."""
    poisoned = np.intersect1d(rows, plan.rows) if plan and plan.data == beton.fingerprint else rows[:0]
    if left > (most := min(count, len(poisoned))):
        raise UserError(f"--poison-left {left} is more than the {most:,} poisoned pairs there can be: give fewer.")
    clean = np.setdiff1d(rows, poisoned)
    overlooked = random.generator(seed, "poison-left").permutation(len(poisoned))[:left]
    picked, others = np.split(random.generator(seed, "clean-rows").permutation(len(clean)), [count - left])
    return np.sort(np.concatenate([clean[picked], poisoned[overlooked]])), np.sort(clean[others[:watch]])


def flagged_rows(config: CleanConfig, beton: Beton | Shards, rows: np.ndarray, plan: Plan | None) -> np.ndarray:
    """Those of the rows that are known to be poisoned, int64, ascending."""
    if not isinstance(config, FlaggedSettings):
        return rows[:0]
    if config.flagged_by:
        path = config.resume / SPARED if config.resume else config.flagged_by
        found = np.setdiff1d(rows, read_rows(path, beton.fingerprint, len(beton)))
    else:
        poisoned = np.intersect1d(rows, plan.rows) if plan and config.flagged else rows[:0]
        if config.flagged > len(poisoned):
            raise UserError(
                f"--flagged {config.flagged} is more than the {len(poisoned):,} poisoned pairs: give fewer."
            )
        found = np.sort(random.generator(config.seed, "flagged").permutation(poisoned)[: config.flagged])
    if len(found) >= config.rows:
        raise UserError(f"--rows {config.rows} has no room beside the {len(found):,} flagged pairs: give more.")
    return found
