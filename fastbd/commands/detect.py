"""fastbd detect"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbd.base import dist, random
from fastbd.base.console import console, markdown, said_aside
from fastbd.base.errors import UserError
from fastbd.base.files import check_out
from fastbd.commands.demo_data import located
from fastbd.commands.evaluate import open_model
from fastbd.config.flags import DetectConfig
from fastbd.data.decode import open_decoder
from fastbd.data.pairs import Pairs
from fastbd.data.rows import write_rows
from fastbd.data.shards import open_beton
from fastbd.evals.detection import clip_score, dao, detection, k_distance, neighbours, slof
from fastbd.evals.embedding import embed_images, embed_texts
from fastbd.evals.towers import Towers
from fastbd.models.precision import set_precision
from fastbd.poison.plan import Plan

FIGURES = {"roc_auc": "ROC-AUC", "pr_auc": "PR-AUC", "tpr_at_1_fpr": "TPR at 1 % FPR"}


def run(config: DetectConfig) -> int:
    """Score the pairs, print how well the scores tell the poisoned ones, write the row list."""
    with said_aside(config.json):
        found = _found(located(config))
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        _show(config, found)
    return 0


def _found(config: DetectConfig) -> dict[str, Any]:
    """Return what the detectors find, and what was dropped; writes the row list."""
    world = dist.join(config.device)
    if world.size > 1:
        raise UserError("detect runs in one process: start it without torchrun.")
    drop = _checked_drop(config)
    state, model = open_model(config.run, config.checkpoint, world.device)
    data = config.data or state["about"]["data"]
    beton = open_beton(data)
    plan = _plan(config, state, beton.fingerprint)
    if plan is None and drop is None:
        raise UserError(
            "there is no plan, so nothing tells which pairs are poisoned: give --plan, or --drop and --out."
        )
    precision = set_precision(config.precision, world.device)
    pairs = Pairs(beton, open_decoder("auto", 0, str(world.device)), model.image_size, plan, max_bad=len(beton))
    rows = np.arange(len(beton))
    if 0 < config.subset < len(rows):
        rows = np.sort(random.generator(0, "detect-subset").permutation(len(rows))[: config.subset])
    poisoned = torch.from_numpy(pairs.planned[rows] >= 0)
    towers = Towers(model, precision=precision, device=world.device)
    scores = _scores(config, embed_images(towers, pairs, rows), embed_texts(towers, pairs, rows))

    found = {
        "run": str(config.run),
        "checkpoint": config.checkpoint,
        "epoch": state["epoch"],
        "data": str(data),
        "pairs": len(rows),
        "poisoned": int(poisoned.sum()) if plan else None,
        "k": config.k,
        "detect_batch": config.detect_batch,
        "detectors": {name: detection(score, poisoned) for name, score in scores.items()} if plan else {},
    }
    if drop is not None:
        found["dropped"] = _drop(config.by, *drop, scores[config.by], beton.fingerprint, poisoned if plan else None)
    return found


def _checked_drop(config: DetectConfig) -> tuple[float, Path] | None:
    """Return --drop and --out, None where neither is given; raise a UserError where they cannot be followed."""
    if config.drop is None and config.out is None:
        return None
    if config.drop is None or config.out is None:
        raise UserError("--drop and --out belong together: the share to drop, and the row list to write.")
    if config.subset:
        raise UserError("--drop needs the scores of all pairs: leave --subset out.")
    if config.out.exists():
        raise UserError(f"{config.out} exists already: name another file with --out.")
    check_out(config.out, name="kept.rows")
    return config.drop, config.out


def _plan(config: DetectConfig, state: dict, fingerprint: str) -> Plan | None:
    """--plan, or the run's own, unless that is for other data than a --data that was given."""
    if config.plan or not state["plan"]:
        return Plan.load(config.plan) if config.plan else None
    plan = Plan.from_dict(state["plan"])
    return plan if plan.data == fingerprint or not config.data else None


def _scores(config: DetectConfig, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Of each detector, on the CPU."""
    torch.set_float32_matmul_precision("highest")  # TF32 would confuse neighbours
    near = neighbours(images, config.k, batch=config.detect_batch, seed=config.seed)
    scores = {
        "clip_score": clip_score(images, texts),
        "k_distance": k_distance(near),
        "slof": slof(near),
        "dao": dao(near),
    }
    return {name: score.cpu() for name, score in scores.items()}


def _drop(by: str, share: float, out: Path, scores: Tensor, fingerprint: str, poisoned: Tensor | None) -> dict:
    """Write the rows whose scores are not among the highest; say which went."""
    count = round(share * len(scores))
    worst = scores.argsort(descending=True, stable=True)[:count]
    kept = np.setdiff1d(np.arange(len(scores)), worst)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, kept, fingerprint, f"without the {share:g} that {by} finds worst")
    caught = None if poisoned is None else int(poisoned[worst].sum())
    return {"by": by, "share": share, "rows": count, "poisoned": caught, "out": str(out)}


def _show(config: DetectConfig, found: dict) -> None:
    if found["detectors"]:
        title = (
            f"{config.run} at epoch {found['epoch']:g}: {found['poisoned']:,} of {found['pairs']:,} pairs are poisoned"
        )
        lines = [
            [name, *(f"{numbers[figure]:.1%}" for figure in FIGURES)] for name, numbers in found["detectors"].items()
        ]
        console.print(f"{title}\n\n{markdown(['detector', *FIGURES.values()], lines)}", markup=False)
    if gone := found.get("dropped"):
        among = "" if gone["poisoned"] is None else f", {gone['poisoned']:,} of the {found['poisoned']:,} poisoned ones"
        line = f"dropped {gone['rows']:,} of {found['pairs']:,} rows by {gone['by']}{among}; wrote {gone['out']}"
        console.print(line, markup=False)
