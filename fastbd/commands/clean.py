"""fastbd clean"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from fastbd import checkpoint, draws
from fastbd.cleaning import METHODS
from fastbd.config import CleanConfig
from fastbd.data.beton import Beton
from fastbd.data.shards import Shards, open_beton
from fastbd.dist import World
from fastbd.errors import UserError
from fastbd.models import create
from fastbd.poison.plan import Plan
from fastbd.run import Task, allowed_rows, execute


def run(config: CleanConfig) -> int:
    """Clean a run's model into a run folder of its own; exit code 0, or 128 + signal when stopped."""
    if config.run is None:
        raise UserError("clean needs --run, the folder of the run to clean; for example --run runs/mmcl.")
    return execute(config, partial(task, config))


def task(config: CleanConfig, world: World) -> Task:
    """The cleaning that the flags ask for."""
    saved = checkpoint.load(checkpoint.path_of(config.run, config.checkpoint))
    source, plan = saved["about"], saved["plan"] and Plan.from_dict(saved["plan"])
    method = METHODS[config.method]
    model = create(source["model"], seed=0)
    model.load_state_dict(saved["model"])
    method.prepare(model)
    data = config.data or Path(source["data"])
    beton = open_beton(data)
    if plan and not config.data:
        plan.check(beton.fingerprint, data)  # else its rows would mean others now
    return Task(
        name=f"{config.run.resolve().name}-{config.method}",
        model=model,
        model_name=source["model"],
        objective=method.objective(config),
        objective_name=config.objective if config.method == "finetune" else "mmcl_ssl",
        pretrain_objective=source["pretrain_objective"],
        method=config.method,
        start=config.run,
        data=data,
        rows=clean_rows(beton, allowed_rows(config, beton), plan, config.rows, config.seed),
        plan=plan,
        poisoned=False,
        eval_data=config.eval_data or (Path(source["eval_data"]) if source["eval_data"] else None),
        classes=config.classes or (None if config.eval_data else source["classes"]),
        templates=config.templates or source["templates"],
        optimizer=saved["optimizer"] if config.keep_optimizer else None,
    )


def clean_rows(beton: Beton | Shards, rows: np.ndarray, plan: Plan | None, count: int, seed: int) -> np.ndarray:
    """`count` of the rows drawn from the seed, ascending, or all where there are fewer; none that the plan poisons."""
    if plan and plan.data == beton.fingerprint:
        rows = np.setdiff1d(rows, plan.rows)
    picked = draws.generator(seed, "clean-rows").permutation(len(rows))[:count]
    return rows[np.sort(picked)]
