"""Plan a backdoor."""

from __future__ import annotations

import glob
import re
from pathlib import Path

import numpy as np
import torch
from rich.text import Text

from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.files import check_out
from fastbd.base.prompts import numbered, read_classes, read_templates, set_of, target_index
from fastbd.commands.demo_data import demo_data
from fastbd.config.cards import is_outside
from fastbd.config.flags import PoisonConfig
from fastbd.config.imports import told_by_outside_code
from fastbd.data.beton import Beton
from fastbd.data.shards import Shards, open_beton
from fastbd.models.clip import MODELS
from fastbd.poison import patterns
from fastbd.poison.plan import Plan, make_plan
from fastbd.poison.triggers import BLENDS, PATCHES, TriggerSpec, stamp

CAPTIONS_SHOWN = 3
SIZES = sorted({spec.image_size for spec in MODELS.values()})


def run(config: PoisonConfig) -> int:
    """Write the plan file and show what is in it."""
    out = config.out or config.add_to or _beside(config.data)
    check_out(out, name="pairs.poison.json")
    data, evaluated = demo_data() if str(config.data) == "demo" else (config.data, None)
    beton = open_beton(data)
    _check_target(config, beton, evaluated)
    after = _earlier(config, beton)
    seed = after.seed if after else config.seed or 0
    trigger = _trigger(config, seed)
    if is_outside(trigger.name):
        _try(trigger, seed)
    plan = make_plan(
        beton.fingerprint,
        len(beton),
        target=config.target,
        trigger=trigger,
        geometry=config.geometry,
        seed=seed,
        templates=read_templates(config.templates),
        captions=beton.caption if config.label_consistent else None,
        count=config.count,
        rate=config.rate,
        after=after,
    )
    added = config.add_to and out.resolve() == config.add_to.resolve()
    there = _holds(out, plan)
    if out.exists() and not added and not there:
        raise UserError(f"{out} exists and holds something else; name another file with --out.")
    if not there:
        out.parent.mkdir(parents=True, exist_ok=True)
        plan.save(out)
    console.print(_summary(plan, f"{out}, as it was: the same plan was there already" if there else str(out)))
    return 0


def _check_target(config: PoisonConfig, beton: Beton | Shards, evaluated: Path | None) -> None:
    """Raise a UserError where the target is none of the evaluation classes, as far as these are known.

    They are those of --classes, else of the set that `evaluated` names, else of the data itself, if it has any.
    """
    stored = (open_beton(evaluated) if evaluated else beton).class_names
    chosen = config.classes or (set_of(stored) if stored else None)
    if chosen:
        target_index(read_classes(chosen), config.target)
    elif stored and not numbered(stored):
        target_index(stored, config.target)


def _earlier(config: PoisonConfig, beton: Beton | Shards) -> Plan | None:
    """The plan to add to."""
    if config.add_to is None:
        return None
    plan = Plan.load(config.add_to)
    plan.check(beton.fingerprint, len(beton), config.data)
    if config.seed not in (None, plan.seed):
        raise UserError(f"{config.add_to} was made with seed {plan.seed}, and all of a plan has one; leave --seed out.")
    return plan


def _trigger(config: PoisonConfig, seed: int) -> TriggerSpec:
    if config.blend is not None and config.trigger not in BLENDS and not is_outside(config.trigger):
        raise UserError(f"the trigger {config.trigger} is not mixed into the image; leave --blend out.")
    pattern = patterns.draw(
        config.trigger,
        seed=seed,
        patch_size=config.patch_size,
        image=config.image,
        text=config.text,
        pattern=config.pattern,
        points=config.wanet_k,
        grid=config.grid,
    )
    return TriggerSpec(config.trigger, config.patch_size, config.location, config.blend, config.wanet_s, pattern)


def _try(trigger: TriggerSpec, seed: int) -> None:
    """Raise what a trigger from outside raises on made images of every size that models take.

    One of them has to do, as a patch may be too large for the others.
    """
    errors = []
    for size in SIZES:
        images = torch.arange(2 * size * size * 3).remainder(256).to(torch.uint8).view(2, size, size, 3)
        try:
            stamp(images, trigger, seed=seed, ids=np.arange(2))
            return
        except Exception as error:
            errors.append(error)
    if isinstance(errors[-1], UserError) or told_by_outside_code(errors[-1]):
        raise errors[-1]
    said = f"{type(errors[-1]).__name__}: {errors[-1]}".splitlines()[0]
    raise UserError(f"the trigger {trigger.name} returned an Overlay that cannot be put on images ({said}): see what "
                    "fastbd.kernels.stamp says of its fields.") from errors[-1]  # fmt: skip


def _beside(data: Path) -> Path:
    """pairs.poison.json for pairs.beton, and for the pattern pairs-*.beton."""
    if data.exists():
        return data.with_suffix(".poison.json")
    if glob.has_magic(str(data.parent)):
        raise UserError(f"{data} matches files in several folders: name the plan with --out.")
    return data.with_name((re.sub(r"[-_.]*[*?\[\]]+", "", data.stem) or "plan") + ".poison.json")


def _holds(path: Path, plan: Plan) -> bool:
    try:
        return Plan.load(path) == plan
    except UserError:
        return False


def _summary(plan: Plan, where: str) -> Text:
    """The attack that came last; those before it are only named."""
    *earlier, attack = plan.attacks
    kept = "label-consistent, captions kept" if attack.label_consistent else "captions from templates"
    look = ", ".join(filter(None, (attack.trigger.name, _parameters(attack.trigger))))
    lines = [
        ("pairs", f"{len(attack.rows):,} of {plan.total:,} ({len(attack.rows) / plan.total:.3%}), {kept}"),
        ("target", attack.target),
        ("trigger", f"{look}, images fitted by {attack.geometry}, seed {plan.seed}"),
        *((f"row {row}", text) for row, text in zip(attack.rows[:CAPTIONS_SHOWN], attack.captions, strict=False)),
        *(("beside", f"{a.trigger.name} to {a.target}, {len(a.rows):,} pairs") for a in earlier),
        ("plan", where),
    ]
    return Text("\n".join(f"{name:<12}{value}" for name, value in lines))  # Text: a caption may look like rich's markup


def _parameters(trigger: TriggerSpec) -> str:
    if trigger.name in PATCHES:
        return f"{trigger.patch_size} px, {trigger.location}"
    if trigger.name in BLENDS:
        return f"blend {trigger.blend:g}"
    return f"strength {trigger.strength:g}" if trigger.name == "wanet" else ""
