"""JSON files that list captions of images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from fastbd.config import BuildConfig
from fastbd.data.sources.item import Item
from fastbd.errors import UserError


def karpathy_items(config: BuildConfig) -> Iterator[Item]:
    """The sentences of dataset_coco.json and its like (Karpathy and Fei-Fei 2015), those of an image in a row."""
    source, split = config.source, config.split
    images = config.images or source.parent
    try:
        entries = json.loads(source.read_bytes())["images"]
        splits = {entry["split"] for entry in entries}
        if split and split not in splits:
            raise UserError(f"{source} has no split '{split}'; its splits are: {', '.join(sorted(splits))}.")
        row_id = 0
        for entry in entries:
            name = os.path.join(entry.get("filepath", ""), entry["filename"])
            for sentence in entry["sentences"] if split in (None, entry["split"]) else ():
                yield Item(row_id, name, os.path.join(images, name), sentence["raw"])
                row_id += 1
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is no file of Karpathy's ({error!r}): give one such as dataset_coco.json.") from None
