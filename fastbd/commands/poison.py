"""Plan a backdoor."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from rich.text import Text

from fastbd.config import PoisonConfig
from fastbd.data.shards import open_beton
from fastbd.errors import UserError
from fastbd.log import console
from fastbd.poison.plan import Plan, make_plan
from fastbd.poison.triggers import TriggerSpec
from fastbd.prompts import read_templates

CAPTIONS_SHOWN = 3


def run(config: PoisonConfig) -> int:
    """Write the plan file and show what is in it."""
    beton = open_beton(config.data)
    plan = make_plan(
        beton.fingerprint,
        len(beton),
        target=config.target,
        trigger=TriggerSpec(config.trigger, config.patch_size, config.location, config.blend),
        geometry=config.geometry,
        seed=config.seed,
        templates=read_templates(config.templates),
        captions=beton.caption if config.label_consistent else None,
        count=config.count,
        rate=config.rate,
    )
    out = config.out or _beside(config.data)
    if out.exists() and not _holds(out, plan):
        raise UserError(f"{out} exists and holds something else; name another file with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    plan.save(out)
    console.print(_summary(plan, out))
    return 0


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


def _summary(plan: Plan, out: Path) -> Text:
    trigger = plan.trigger
    shape = f"blend {trigger.blend:g}" if trigger.name == "blended" else f"{trigger.patch_size} px, {trigger.location}"
    kept = "label-consistent, captions kept" if plan.label_consistent else "captions from templates"
    lines = [
        ("pairs", f"{len(plan.rows):,} of {plan.total:,} ({len(plan.rows) / plan.total:.3%}), {kept}"),
        ("target", plan.target),
        ("trigger", f"{trigger.name}, {shape}, images fitted by {plan.geometry}, seed {plan.seed}"),
        *((f"row {row}", caption) for row, caption in zip(plan.rows[:CAPTIONS_SHOWN], plan.captions, strict=False)),
        ("plan", str(out)),
    ]
    return Text("\n".join(f"{name:<12}{value}" for name, value in lines))  # Text: a caption may look like rich's markup
