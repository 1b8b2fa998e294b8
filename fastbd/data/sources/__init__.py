"""Where pairs come from: a module for each layout of files, and the table that chooses among them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastbd.base.errors import UserError
from fastbd.base.prompts import labels_of, read_classes
from fastbd.config.flags import BuildConfig
from fastbd.data.sources.folder import class_folder_items, folders, image_items, is_tar, kind_of_folder, pair_items
from fastbd.data.sources.item import IMAGE_KEYS, Item, with_sound_caption
from fastbd.data.sources.json_file import coco_items, json_kind, json_line_items, karpathy_items, list_items
from fastbd.data.sources.labels import labelled
from fastbd.data.sources.lines import numbered_lines
from fastbd.data.sources.parquet import parquet_files, parquet_items
from fastbd.data.sources.record import parse
from fastbd.data.sources.table import table_items
from fastbd.data.sources.tars import is_pattern, tar_items

FLAGS = ("layout", "image_key", "caption_key", "class_key", "separator", "labels", "images", "split")
"""Flags of build that only some layouts use."""


@dataclass(frozen=True)
class Layout:
    """A way in which people keep pairs, or labelled images, in files."""

    name: str  # as in "the source x is NAME"
    flags: frozenset[str]  # those of FLAGS that it uses
    read: Callable[..., Iterable[Item]]  # of the BuildConfig; a JSON file's also of its `content`
    repeats: bool = False  # may hold a pair twice, as published retrieval sets do


RECORD_FLAGS = frozenset({"image_key", "caption_key", "class_key", "images"})
TABLE = Layout("a table", RECORD_FLAGS | {"separator"}, table_items)
JSON_LINES = Layout("JSON lines", RECORD_FLAGS, json_line_items)
JSON_LIST = Layout("a JSON list", RECORD_FLAGS, list_items)
COCO = Layout("a JSON file of COCO's", frozenset({"images"}), coco_items, repeats=True)
KARPATHY = Layout("a JSON file of Karpathy's", frozenset({"images", "split"}), karpathy_items, repeats=True)
PARQUET = Layout("parquet", frozenset({"image_key", "caption_key", "class_key", "images", "split"}), parquet_items)
TARS = Layout("tars", frozenset({"layout", "labels", "image_key", "caption_key"}), tar_items)
PAIRS = Layout("a folder of pairs", frozenset({"layout", "image_key", "caption_key"}), pair_items)
CLASS_FOLDERS = Layout("a folder of class folders", frozenset({"layout"}), class_folder_items)
LABELLED_IMAGES = Layout("a folder of images with --labels", frozenset({"labels"}), image_items)
BY_SUFFIX = {
    ".csv": TABLE,
    ".tsv": TABLE,
    ".txt": TABLE,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".parquet": PARQUET,
}
LAYOUTS = (TABLE, JSON_LINES, JSON_LIST, COCO, KARPATHY, PARQUET, TARS, PAIRS, CLASS_FOLDERS, LABELLED_IMAGES)


def read_items(config: BuildConfig) -> list[Item]:
    """All rows of the source, in order; tars are read by config.workers processes (0: one a core).

    A row whose caption is missing, or that repeats one before it where the layout does not allow that, has a problem;
    captions are cut to CAPTION_LIMIT. Raises UserError for a source that is missing, empty, of an unknown layout, or
    given a flag that its layout does not use; WorkerDied.
    """
    source, layout = config.source, layout_of(config)
    _check_flags(config, layout)
    items = layout.read(config)
    items = list(items if config.labels else map(with_sound_caption, items))
    if not items and layout is CLASS_FOLDERS and any(image_items(config)):
        raise UserError(
            f"the images of {source} have no captions beside them and are in no class folders: give --labels, a file "
            "with their classes."
        )
    if not items:
        raise UserError(f"the source {source} holds no rows: there is nothing to build.")
    if config.labels:
        items = labelled(items, config, config.labels)
    if config.classes:
        items = _in_list(items, config.classes, source)
    return items if layout.repeats else _repeats_marked(items)


def layout_of(config: BuildConfig) -> Layout:
    """The layout of config.source, by its name and what is in it; UserError where there is none."""
    source, kind = config.source, config.source.suffix.lower()
    if source.is_dir():
        return _layout_of_folder(config)
    if is_pattern(source) or (source.is_file() and is_tar(source.name)):
        return TARS
    if source.is_file() and kind == ".json":
        return _json_layout(config)
    if source.is_file() and kind in BY_SUFFIX:
        return BY_SUFFIX[kind]
    what = f"is not a {', '.join(BY_SUFFIX)}, .json or .tar file or a folder" if source.exists() else "does not exist"
    raise UserError(f"the source {source} {what}: give a table, tars, a folder of pairs, or one of class folders.")


def _layout_of_folder(config: BuildConfig) -> Layout:
    if config.labels and not config.layout:
        return TARS if any(is_tar(name) for _, names in folders(config.source) for name in names) else LABELLED_IMAGES
    kind = config.layout or kind_of_folder(config.source, config.caption_key)
    # img2dataset writes .parquet beside tars and images too; without captions only the .parquet can be meant.
    if kind == "classes" and not config.layout and parquet_files(config.source):
        return PARQUET
    if kind == "classes" and not config.layout and (path := _list_of_images(config)):
        raise UserError(
            f"{config.source} could be class folders, or images that {path} lists: give --source {path}, or "
            "--layout classes to take the names of the folders for classes."
        )
    return {"tars": TARS, "pairs": PAIRS, "classes": CLASS_FOLDERS}[kind]


def _list_of_images(config: BuildConfig) -> Path | None:
    """A file in the folder or below it that could be a source, as captions.txt beside Images; some are opened."""
    for inside, names in folders(config.source):
        found = [name for name in names if os.path.splitext(name)[1].lower() in (*BY_SUFFIX, ".json")]
        for path in (config.source / inside / name for name in found[:10]):
            if _lists_images(path, config):
                return path
    return None


def _lists_images(path: Path, config: BuildConfig) -> bool:
    """Whether a table, JSON lines or .json file names images, by its first line or by what it holds."""
    try:
        if path.suffix.lower() == ".json":
            return bool(json_kind(replace(config, source=path)))
        _, text = next(numbered_lines(path), (1, None))
        if BY_SUFFIX[path.suffix.lower()] is JSON_LINES:
            names = parse(text or "null")
        else:
            names = [name.strip('" \r\n') for name in re.split("[\t;|,]", text or "")]
        return isinstance(names, list | dict) and len(names) > 1 and any(key in names for key in IMAGE_KEYS)
    except (UserError, OSError, ValueError):
        return False


def _json_layout(config: BuildConfig) -> Layout:
    """The layout of a .json file, which is read here once."""
    kind, content = json_kind(config)
    if kind == "lines":
        return JSON_LINES
    layout = {"list": JSON_LIST, "coco": COCO, "karpathy": KARPATHY}[kind]
    return replace(layout, read=partial(layout.read, content=content))


def _check_flags(config: BuildConfig, layout: Layout) -> None:
    """Raise UserError for a flag that the layout does not use."""
    for flag in FLAGS:
        if getattr(config, flag) is not None and flag not in layout.flags:
            users = " or ".join(other.name for other in LAYOUTS if flag in other.flags)
            raise UserError(
                f"--{flag.replace('_', '-')} is for {users}, and the source {config.source} is {layout.name}: "
                "leave it out."
            )
    if config.images and not config.images.is_dir():
        raise UserError(
            f"--images {config.images} is not a folder: give that of the images that {config.source} names."
        )


def _in_list(items: list[Item], name: str, source: Path) -> list[Item]:
    """The items with their classes by the codes of the list of classes `name`; others are marked as not in it."""
    if all(item.class_name is None for item in items):
        raise UserError(f"--classes is for labelled images, and {source} names no classes: leave it out.")
    classes, reason = read_classes(name), f"class not in {name}"
    labels = labels_of(classes, {item.class_name for item in items if item.class_name})

    def marked(item: Item) -> Item:
        if item.class_name in labels:
            return item._replace(class_name=classes.codes[labels[item.class_name]])
        return item._replace(class_name=None, problem=item.problem or reason)

    return list(map(marked, items))


def _repeats_marked(items: list[Item]) -> list[Item]:
    """The items, with a problem on each that repeats an earlier (path, caption, class) without one."""
    first: dict[tuple, int] = {}

    def marked(item: Item) -> Item:
        row = item.problem or first.setdefault((item.name, item.caption, item.class_name), item.row_id)
        return item if item.problem or row == item.row_id else item._replace(problem=f"duplicate of row {row}")

    return list(map(marked, items))
