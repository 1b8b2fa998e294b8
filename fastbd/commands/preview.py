"""fastbd preview"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.files import check_out, replacing
from fastbd.commands.demo import demo_set
from fastbd.config.flags import PreviewConfig
from fastbd.data import sheet
from fastbd.data.decode import open_decoder
from fastbd.data.loader import recipe
from fastbd.data.pairs import Pairs
from fastbd.data.shards import open_beton
from fastbd.models.clip import image_size_of
from fastbd.poison.plan import Plan


def run(config: PreviewConfig) -> int:
    """Draw the contact sheet."""
    check_out(config.out, name="preview.png")
    if config.out.is_file() and not _is_png(config.out):
        raise UserError(f"--out {config.out} exists and is no PNG: give another name, such as preview.png.")
    data, plan = Path(config.data), config.plan
    if config.data == "demo":
        data, _, demo_plan = demo_set()
        plan = plan or demo_plan
    beton = open_beton(data)
    pairs = Pairs(
        beton,
        open_decoder(config.decode, 0, "cpu"),
        image_size_of(config.model),
        Plan.load(plan) if plan else None,
        max_bad=len(beton),
    )
    text_view = config.epoch % beton.num_text_views if beton.num_text_views else None
    picture = sheet.samples(
        pairs,
        np.arange(len(beton)),
        recipe(config.views),
        seed=config.seed,
        text_view=text_view,
        epoch=config.epoch,
        count=config.count,
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.out) as temporary:
        picture.save(temporary, "PNG")
    console.print(f"wrote {config.out}: {' | '.join(recipe(config.views))}", markup=False)
    return 0


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"
