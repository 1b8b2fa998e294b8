"""Does a backdoor that was cleaned away come back when the model is fine-tuned on clean pairs?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastbd.base import random
from fastbd.base.console import progress
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation
from fastbd.base.text import holds
from fastbd.data.loader import batches
from fastbd.data.pairs import Pairs
from fastbd.evals.zeroshot import ZeroShot
from fastbd.methods.method import Method
from fastbd.methods.objectives import Objective
from fastbd.models import CLIP
from fastbd.poison.plan import Plan
from fastbd.training.optim import make_optimizer
from fastbd.training.shares import Shares
from fastbd.training.step import Step
from fastbd.training.watch import Watch

POINTS = 10  # evaluations along the way, the start not counted
BATCH_SIZE, LR = 16, 1e-6


def ready(
    watch: Watch | None, model: CLIP, pairs: Pairs, plan: Plan | None, shares: Shares, world: World, *, steps: int
) -> Callable[[], Evaluation]:
    """Return what measures the rebound of a model, and leaves other weights behind; UserError where it could not."""
    if watch is None or plan is None or not watch.data.measures_asr or world.size > 1:
        raise UserError(
            "--rebound watches ASR, in one process: it needs a plan, and --eval-data with its target and with "
            "images of other classes."
        )
    if shares.group and BATCH_SIZE % shares.group:
        raise UserError(f"--rebound takes {BATCH_SIZE} pairs a step: give a --bn-group that divides it.")
    rows = clean_pairs(pairs, plan, steps * BATCH_SIZE)

    def measured() -> Evaluation:
        clean = Pairs(pairs.beton, pairs.decoder, pairs.size, max_bad=pairs.max_bad)
        return rebound(model, watch.zeroshot, clean, rows, steps=steps, lr=LR, precision=watch.precision, world=world)

    return measured


def rebound(
    model: CLIP,
    zeroshot: ZeroShot,
    pairs: Pairs,
    rows: np.ndarray,
    *,
    steps: int,
    lr: float,
    precision: str,
    world: World,
    weight_decay: float = 0.1,
) -> Evaluation:
    """ASR and top-1 along `steps` of contrastive fine-tuning, a batch each of `rows`, which changes the model.

    Highest ASR, its change from the start to the end, the area under its course (the mean over the steps), and the
    course.
    """
    batch_size = len(rows) // steps
    optimizer = make_optimizer(model, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8)
    step = Step(
        model.train(), Method(Objective()), optimizer, torch.full((steps,), lr), precision=precision, world=world
    )
    marks = {round(k * steps / POINTS) for k in range(POINTS + 1)}
    found: dict[str, list[float]] = {"steps": [], "asr": [], "top1": []}

    def measure(at: int) -> None:
        zeroshot.towers.refresh()
        row = zeroshot()
        asr, top1 = row.get("asr"), row.get("top1")
        assert asr is not None and top1 is not None, "it is watched only where ASR can be measured"
        for key, value in (("steps", at), ("asr", asr), ("top1", top1)):
            found[key].append(value)

    measure(0)
    with progress("rebound", steps) as advance:
        made = batches(
            pairs, rows, batch_size, seed=0, policies=("plain",), text_view=None, world=world, epoch=0, start=0
        )
        for at, batch in enumerate(made, 1):
            step(batch)
            advance(1)
            if at in marks:
                measure(at)
    first, *_, last = found["asr"]
    return {
        "rebound_lr": lr,
        "rebound_max": max(found["asr"]),
        "rebound_change": last - first,
        "rebound_area": float(np.trapezoid(found["asr"], found["steps"])) / steps,
        "rebound": found,
    }


def clean_pairs(pairs: Pairs, plan: Plan, count: int) -> np.ndarray:
    """`count` rows, ascending, always the same ones, that neither the plan poisons nor name one of its targets."""
    beton = pairs.beton
    order = random.generator(0, "rebound").permutation(len(beton))
    if plan.data == beton.fingerprint:
        order = order[plan.attack_of[order] < 0]
    picked: list[int] = []
    for row in order.tolist():
        if len(picked) == count:
            break
        if not any(holds(beton.caption(row), attack.target) for attack in plan.attacks):
            picked.append(row)
    if len(picked) < count:
        raise UserError(
            f"--rebound needs {count:,} clean pairs without the target, and {beton.path} has {len(picked):,}: "
            "give fewer steps."
        )
    return np.sort(picked)
