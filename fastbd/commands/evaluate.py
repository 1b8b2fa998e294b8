"""fastbd evaluate"""

from __future__ import annotations

from pathlib import Path

import torch

from fastbd import checkpoint, dist, log
from fastbd.config import EvaluateConfig
from fastbd.data.decode import open_decoder
from fastbd.errors import UserError
from fastbd.evals.zeroshot import evaluate, open_set
from fastbd.models import create
from fastbd.poison.plan import Plan
from fastbd.precision import set_precision
from fastbd.run import result_table
from fastbd.study.runs import read_config


def run(config: EvaluateConfig) -> int:
    """Evaluate a checkpoint, print the table, add a line to the run's metrics.jsonl."""
    world = dist.join(config.device)
    if world.size > 1:
        raise UserError("evaluate runs in one process: start it without torchrun.")
    recorded = read_config(config.run)
    state = checkpoint.load(checkpoint.path_of(config.run, config.checkpoint))
    data = config.eval_data or (recorded["eval_data"] and Path(recorded["eval_data"]))
    if data is None:
        raise UserError(f"{config.run} was trained without an evaluation set; name a labelled .beton with --eval-data.")
    saved = Plan.from_dict(state["plan"]) if state["plan"] else None
    plan = Plan.load(config.plan) if config.plan else saved
    model = create(recorded["model"], seed=None)
    model.load_state_dict(state["model"])
    model.to(world.device, memory_format=torch.channels_last)
    precision = set_precision(config.precision, world.device)
    evaluation = open_set(
        data,
        open_decoder("auto", 0, str(world.device)),
        model.image_size,
        classes=config.classes or (None if config.eval_data else recorded["classes"]),
        templates=config.templates or recorded["templates"],
        plan=plan,
        subset=config.eval_subset,
        asr_seed=config.asr_seed,
    )
    row = evaluate(model, evaluation, precision=precision, device=world.device)
    row = {
        "step": state["step"],
        "epoch": state["epoch"],
        "checkpoint": config.checkpoint,
        "asr_seed": config.asr_seed,
        **row,
    }
    log.append(config.run / "metrics.jsonl", row)
    log.console.print(result_table(config.run, row))
    return 0
