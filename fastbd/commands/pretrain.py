"""fastbd pretrain"""

from __future__ import annotations

import glob
from functools import partial
from pathlib import Path

from fastbd.base.console import console
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.run_folder import read_config
from fastbd.commands.demo import demo_set
from fastbd.commands.demo_data import located
from fastbd.config.cards import short
from fastbd.config.flags import PretrainConfig
from fastbd.data.shards import open_beton
from fastbd.methods.method import Method, make_method
from fastbd.methods.objectives import make_objective
from fastbd.models import CLIP, create, read_weights
from fastbd.models.clip import create_like
from fastbd.poison.plan import Plan
from fastbd.training.resume import resumed
from fastbd.training.run import execute
from fastbd.training.task import Task, allowed_rows


def run(config: PretrainConfig) -> int:
    """Train a model into a run folder; exit code 0, or 128 + signal when stopped."""
    return train(config)[0]


def train(config: PretrainConfig) -> tuple[int, Path]:
    """Train a model into a run folder; returns the exit code and the folder."""
    config = located(config)
    return execute(config, partial(task, config))


def task(config: PretrainConfig, world: World) -> Task:
    """The pre-training that the flags ask for."""
    state = resumed(config, world)
    data, plan, eval_data = inputs(config, world)
    model = _model(config, world)
    name = config.objective if config.robust == "none" else f"{config.objective}+{config.robust}"
    return Task(
        name="+".join(map(short, name.split("+"))),
        model=model,
        model_name=config.model,
        method=method(config),
        pretrain_objective=name,
        data=data,
        rows=allowed_rows(config, open_beton(data)),
        plan=plan,
        poisoned=config.poison,
        eval_data=eval_data,
        classes=config.classes,
        templates=config.templates or ("demo" if config.data == "demo" else None),
        resumed=state,
    )


def _model(config: PretrainConfig, world: World) -> CLIP:
    """Return the model with fresh weights or those of --weights, and say of these which activation was taken.

    That of a run to resume has the activation that the run recorded; its weights are in the checkpoint.
    """
    if config.resume:
        return create_like(read_config(config.resume), config.seed)
    if config.weights is None:
        return create(config.model, config.seed, config.activation or "quickgelu")
    weights = read_weights(config.weights)
    model = create(config.model, config.seed, config.activation or weights.origin.activation)
    weights.load_into(model)
    if world.main:
        console.print(weights.said(config.activation), markup=False)
    return model


def method(config: PretrainConfig) -> Method:
    """The plain objective, or a defence around it."""
    if config.robust == "none":
        return Method(make_objective(config.objective, config), config.objective)
    return make_method("robust", config.robust, config)


def inputs(config: PretrainConfig, world: World) -> tuple[Path, Plan | None, Path | None]:
    """(training .beton, plan, evaluation .beton): the run's own when resuming, the demo set's where --data says so."""
    if config.resume:
        recorded, plan = read_config(config.resume), config.resume / "plan.json"
        eval_data = recorded["eval_data"] and Path(recorded["eval_data"])
        return Path(recorded["data"]), Plan.load(plan) if plan.exists() else None, eval_data
    if config.data != "demo":
        if not Path(config.data).is_file() and not glob.has_magic(config.data):
            raise UserError(
                f"there is no file {config.data}: make it with 'python -m fastbd build', or give --data demo."
            )
        return Path(config.data), Plan.load(config.plan) if config.plan else None, config.eval_data
    if world.main:
        demo_set()
    world.barrier()
    train, val, plan = demo_set()
    return train, Plan.load(config.plan or plan), config.eval_data or val
