"""The small study in whose files faults are injected: 240 pairs, a tenth of them poisoned, and 60 labelled images."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import command_line

from fastbd.data.demo import write_demo_set
from fastbd.training import roofline


def write_data(folder: Path) -> None:
    """Write train.beton, train.poison.json and val.beton, and the images that they are made of."""
    list(write_demo_set(folder, 240, 60, seed=1))
    fastbd(
        folder,
        "build --source train.csv --out train.beton --workers 1",
        "build --source val.csv --out val.beton --class-key class --text-views 0 --workers 1",
        "poison --data train.beton --patch-size 6 --rate 0.1 --templates demo",
    )


def fastbd(folder: Path, *lines: str) -> None:
    """Run command lines in the folder, within this process; AssertionError where one fails."""
    # how fast the machine is does not matter here
    with patch.dict(roofline.SIDES, cpu=(64,)), patch.dict(roofline.COPIED, cpu=1 << 16):
        for line in lines:
            command_line.fastbd(*line.split(), cwd=folder)
