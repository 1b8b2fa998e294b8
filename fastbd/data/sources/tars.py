"""WebDataset tars, as img2dataset writes them."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from fastbd.config import BuildConfig
from fastbd.data.sources.item import IMAGE_SUFFIXES, Item
from fastbd.data.workers import map_in_order
from fastbd.log import progress


def tar_items(config: BuildConfig) -> Iterator[Item]:
    """Samples of WebDataset shards as img2dataset writes them: the members of one sample share a key, and follow."""
    shards = sorted(config.source.glob("*.tar")) if config.source.is_dir() else [config.source]
    row_id = 0
    with (
        progress("reading tars", len(shards)) as advance,
        closing(map_in_order(_items_in, shards, config.workers)) as tars,
    ):
        for items in tars:
            for item in items:
                yield item._replace(row_id=row_id)
                row_id += 1
            advance()


def _items_in(shard: Path) -> list[Item]:
    """The samples of a shard, their rows not numbered yet."""
    items = []
    for key, image, caption, problem in _samples(shard):
        name = f"{shard.name}/{image.name if image else key}"
        offset, size = (image.offset_data, image.size) if image else (0, None)
        items.append(Item(-1, name, str(shard), caption, offset=offset, size=size, problem=problem))
    return items


def _samples(shard: Path) -> Iterator[tuple[str, tarfile.TarInfo | None, str, str | None]]:
    """(key, member of the image, caption, problem) of each sample; a damaged shard ends with a sample that says so."""
    key, members = "", {}

    def sample():
        image = next((members[suffix] for suffix in reversed(members) if suffix in IMAGE_SUFFIXES), None)
        caption = read(".txt") or _json_caption(read(".json"))
        return key, image, caption, None if image else "no image in the sample"

    def read(suffix: str) -> str:
        return tar.extractfile(members[suffix]).read().decode(errors="replace") if suffix in members else ""

    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                stem, suffix = os.path.splitext(member.name)
                if members and stem != key:
                    yield sample()
                    members = {}
                key = stem
                members[suffix.lower()] = member
            if members:
                yield sample()
    except (tarfile.TarError, OSError) as error:
        yield key, None, "", f"damaged tar: {error}"


def _json_caption(text: str) -> str:
    try:
        caption = json.loads(text)["caption"]
    except (ValueError, KeyError, TypeError):
        return ""
    return caption if isinstance(caption, str) else ""
