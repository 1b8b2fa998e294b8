"""fastbd pretrain"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbd import checkpoint, dist, log
from fastbd import run as runs
from fastbd.commands.demo import demo_set
from fastbd.config import PretrainConfig
from fastbd.data.beton import Beton
from fastbd.errors import UserError
from fastbd.loop import Stopped
from fastbd.models import create
from fastbd.models.weights import load_weights
from fastbd.objectives import make_objective
from fastbd.poison.plan import Plan


def run(config: PretrainConfig) -> int:
    """Train a model into a run folder; exit code 0, or 128 + signal when stopped."""
    world = dist.join(config.device)
    try:
        data, plan, eval_data = inputs(config, world)
        model = create(config.model, config.seed)
        if config.weights:
            load_weights(model, config.weights)
        resumed = checkpoint.load(config.resume / "ckpt_last.pt") if config.resume else None
        if resumed:
            model.load_state_dict(resumed["model"])
        start = runs.Start(
            model,
            make_objective(config.objective, config),
            data,
            plan,
            eval_data,
            np.arange(len(Beton(data))),
            poisoned=config.poison,
            optimizer=resumed and resumed["optimizer"],
            resumed=resumed,
        )
        about = {
            "verb": "pretrain",
            "objective": config.objective,
            "pretrain_objective": config.objective,
            "method": None,
            "start": None,
            "model": config.model,
            "data": str(data.absolute()),
            "eval_data": eval_data and str(eval_data.absolute()),
        }
        folder = runs.make_folder(config, config.objective, world)
        if world.main and not config.resume:
            runs.describe(folder, config, plan, **about)
            log.console.print(
                f"[bold]{folder}[/]: {config.objective} pre-training of {config.model} "
                f"on {len(start.rows):,} pairs of {data}"
            )
        runs.train_in(folder, start, config, world, about)
    except Stopped as stopped:
        if world.main:
            log.console.print(f"stopped and saved; go on with: python -m fastbd pretrain --resume {folder}")
        return stopped.exit_code
    finally:
        dist.leave()
    return 0


def inputs(config: PretrainConfig, world: dist.World) -> tuple[Path, Plan | None, Path | None]:
    """(training .beton, plan, evaluation .beton), the demo set's where --data says so."""
    if config.data != "demo":
        if not Path(config.data).is_file():
            raise UserError(
                f"there is no data file {config.data}; make it with 'python -m fastbd build', or give --data demo."
            )
        return Path(config.data), Plan.load(config.plan) if config.plan else None, config.eval_data
    if world.main:
        demo_set()
    world.barrier()
    train, val, plan = demo_set()
    return train, Plan.load(config.plan or plan), config.eval_data or val
