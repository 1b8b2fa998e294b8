"""fastbd clean"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbd import checkpoint, dist, draws, log
from fastbd import run as runs
from fastbd.cleaning import METHODS
from fastbd.config import CleanConfig
from fastbd.data.beton import Beton
from fastbd.errors import UserError
from fastbd.loop import Stopped
from fastbd.models import create
from fastbd.poison.plan import Plan


def run(config: CleanConfig) -> int:
    """Clean a run's model into a run folder of its own; exit code 0, or 128 + signal when stopped."""
    if config.run is None:
        raise UserError("clean needs --run, the folder of the run to clean; for example --run runs/mmcl.")
    world = dist.join(config.device)
    try:
        source = checkpoint.load(checkpoint.path_of(config.run, config.checkpoint))
        resumed = checkpoint.load(config.resume / "ckpt_last.pt") if config.resume else None
        plan = Plan.from_dict(source["plan"]) if source["plan"] else None
        model = create(source["about"]["model"], seed=None)
        method = METHODS[config.method]
        model.load_state_dict((resumed or source)["model"])
        if not resumed:
            method.prepare(model)
        data, rows = clean_rows(config, source, plan)
        eval_data = config.eval_data or (source["about"]["eval_data"] and Path(source["about"]["eval_data"]))
        kept = source["optimizer"] if config.keep_optimizer else None
        start = runs.Start(
            model,
            method.objective(config),
            data,
            plan,
            eval_data,
            rows,
            optimizer=resumed["optimizer"] if resumed else kept,
            resumed=resumed,
            poisoned=False,
        )
        about = {
            "verb": "clean",
            "method": config.method,
            "objective": config.objective if config.method == "finetune" else "mmcl_ssl",
            "pretrain_objective": source["about"]["pretrain_objective"],
            "start": str(config.run.absolute()),
            "model": source["about"]["model"],
            "data": str(data.absolute()),
            "eval_data": eval_data and str(eval_data.absolute()),
        }
        folder = runs.make_folder(config, f"{config.run.name}-{config.method}", world)
        if world.main and not config.resume:
            runs.describe(folder, config, plan, **about)
            log.console.print(
                f"[bold]{folder}[/]: cleaning {config.run} with {config.method} on {len(rows):,} clean pairs of {data}"
            )
        runs.train_in(folder, start, config, world, about)
    except Stopped as stopped:
        if world.main:
            log.console.print(f"stopped and saved; go on with: python -m fastbd clean --resume {folder}")
        return stopped.exit_code
    finally:
        dist.leave()
    return 0


def clean_rows(config: CleanConfig, source: dict, plan: Plan | None) -> tuple[Path, np.ndarray]:
    """(.beton, rows drawn from the seed); rows that the plan poisoned are left out."""
    data = config.data or Path(source["about"]["data"])
    beton = Beton(data)
    rows = np.arange(len(beton))
    if plan and plan.data == beton.fingerprint:
        rows = np.setdiff1d(rows, plan.rows)
    picked = draws.generator(config.seed, "clean-rows").permutation(len(rows))[: config.rows]
    return data, rows[np.sort(picked)]
