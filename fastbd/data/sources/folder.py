"""Folders of image files: pairs, class folders, or images alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

from fastbd.base.errors import UserError
from fastbd.config.flags import BuildConfig
from fastbd.data.sources.item import IMAGE_SUFFIXES, Item
from fastbd.data.sources.record import parse
from fastbd.data.sources.samples import JSON_LIMIT, Member, items_of, key_of, sample_items

CHUNK = 1000  # files a worker handles at a time
NOT_DATA = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "lost+found", "@eadir", "$recycle.bin", "system volume information")
)
"""Names, in lower case, that operating systems give to files and folders of their own."""
SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing|dev)[-_]?\d*", re.IGNORECASE)


def is_data(name: str) -> bool:
    """Whether a file or folder is a user's; those that begin with a dot are not, as .DS_Store, ._0.jpg or .git."""
    return name in (".", "..") or not (name.startswith(".") or name.lower() in NOT_DATA)


def folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(path below root, names of its files, sorted) of root, "", and of the folders below it that are_data.

    Links are followed, except those to a folder that they are in. Raises UserError for a folder that cannot be read.
    """
    left = [("", frozenset())]
    while left:
        inside, above = left.pop()
        here = os.path.join(root, inside)
        above |= {os.path.realpath(here)}
        try:
            with os.scandir(here) as entries:
                found = sorted((entry.name, entry.is_dir()) for entry in entries if is_data(entry.name))
        except OSError as error:
            raise UserError(f"the folder {here} cannot be read ({error.strerror}): mend it, or take it out.") from None
        yield inside, [name for name, is_folder in found if not is_folder]
        below = [os.path.join(inside, name) for name, is_folder in found if is_folder]
        left += [(path, above) for path in reversed(below) if os.path.realpath(os.path.join(root, path)) not in above]


def kind_of_folder(root: Path, caption_key: str | None) -> Literal["tars", "pairs", "classes"]:
    """How a folder is to be read, by what is in it; UserError where there are two ways.

    Pairs: there are captions beside images, and these are all in root itself or in img2dataset's shard folders.
    """
    tar, image, captioned, in_folder = None, None, None, None
    for inside, names in folders(root):
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        tar = tar or next((os.path.join(inside, name) for name in names if is_tar(name)), None)
        if images:
            image = image or os.path.join(inside, images[0])
            if not captioned and (name := _captioned(os.path.join(root, inside), images, names, caption_key)):
                captioned = os.path.join(inside, name)
            if inside and not _is_shard(inside, images):
                in_folder = in_folder or os.path.join(inside, images[0])
    if tar and image:
        raise UserError(f"{root} holds tars ({tar}) and images ({image}): say with --layout which of them to read.")
    if captioned and in_folder:
        raise UserError(
            f"{root} could be pairs ({captioned} has a caption beside it) or class folders ({in_folder} is in one): "
            "give --layout pairs or --layout classes."
        )
    return "tars" if tar else "pairs" if captioned else "classes"


def is_tar(name: str) -> bool:
    """Whether a file is a tar, packed or not, by its name."""
    return name.lower().endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def _is_shard(inside: str, images: list[str]) -> bool:
    """Whether a folder is one of img2dataset's: its name is digits, with which those of its images begin."""
    name = os.path.basename(inside)
    return name.isdecimal() and all(image.startswith(name) and len(image) > len(name) + 1 for image in images)


def _captioned(folder: str, images: list[str], names: list[str], caption_key: str | None) -> str | None:
    """An image that has a .txt of its name, or a .json with an entry for a caption; only some are opened."""
    stems = {os.path.splitext(name)[0]: name for name in images}
    there = {stem + suffix.lower(): name for name in names for stem, suffix in [os.path.splitext(name)]}
    if stem := next((stem for stem in stems if stem + ".txt" in there), None):
        return stems[stem]
    for stem in [stem for stem in stems if stem + ".json" in there][:10]:
        try:
            with open(os.path.join(folder, there[stem + ".json"]), "rb") as file:
                values = parse(file.read(JSON_LIMIT))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and (caption_key or "caption") in values:
            return stems[stem]
    return None


def pair_items(config: BuildConfig) -> Iterator[Item]:
    """The samples in a folder and those below it: an image, and a .txt or .json of its name with the caption.

    Of other files img2dataset's own (.parquet, _stats.json) are passed over.
    """
    return items_of(list(_chunks(config.source)), partial(_pairs, config=config), "reading captions", config.workers)


def _chunks(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder below root, names of files in it) in parts; a sample's files are in one."""
    for inside, names in folders(root):
        chunk: list[str] = []
        for _, of_a_key in groupby(sorted(names, key=lambda name: (key_of(name), name)), key_of):
            chunk += (name for name in of_a_key if not name.endswith((".parquet", "_stats.json")))
            if len(chunk) >= CHUNK:
                yield inside, chunk
                chunk = []
        if chunk:
            yield inside, chunk


def _pairs(task: tuple[str, list[str]], config: BuildConfig) -> list[Item]:
    inside, names = task
    paths = [os.path.join(inside, name) for name in names]
    return list(sample_items((Member(path, os.path.join(config.source, path)) for path in paths), config))


def class_folder_items(config: BuildConfig) -> Iterator[Item]:
    """Every file below the class folders, by class; the folders' names are the classes'.

    An image that is in no class folder, and a class folder without files, are items with a problem. Raises UserError
    for folders that may not be of classes, unless --layout says that they are.
    """
    paths: dict[str, list[str]] = {}
    for inside, names in folders(config.source):
        of_class = paths.setdefault(inside.partition("/")[0], [])
        of_class += (os.path.join(inside, name) for name in names)
    loose = [path for path in paths.pop("") if path.lower().endswith(IMAGE_SUFFIXES)]
    items = [_file_item(config.source, path, None, "in no class folder") for path in loose if paths]
    if config.layout is None:
        _check_classes(config.source, paths)
    for name, of_class in paths.items():
        problem = None if _is_unicode(name) else "the folder's name is not UTF-8"
        items += [_file_item(config.source, path, name, problem) for path in sorted(of_class, key=_parts)]
        if not of_class:
            items.append(_file_item(config.source, name, name, "empty class folder"))
    yield from (item._replace(row_id=row_id) for row_id, item in enumerate(items))


def _check_classes(root: Path, paths: dict[str, list[str]]) -> None:
    """Raise UserError where the folders in root may hold the class folders, or be splits, or be of all images."""
    for name, of_class in paths.items():
        images = [path for path in of_class if path.lower().endswith(IMAGE_SUFFIXES)]
        if images and all(path.count("/") > 1 for path in images):
            raise UserError(
                f"the folder {name} of {root} holds no images but in folders of its own ({images[0]}): give "
                f"--source {root / name} if these are the classes, or --layout classes if {name} is one."
            )
    if len(paths) == 1 or (paths and all(map(SPLIT.fullmatch, paths))):
        raise UserError(
            f"the only folders of images in {root} are {', '.join(paths)}: give --layout classes if these are classes, "
            "else as --source the file that has the captions, or --labels."
        )


def _parts(path: str) -> list[str]:
    return path.split("/")


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _file_item(root: Path, path: str, class_name: str | None = None, problem: str | None = None) -> Item:
    return Item(-1, path, os.path.join(root, path), "", class_name, problem=problem)


def image_items(config: BuildConfig) -> Iterator[Item]:
    """Every image below the folder; other files are passed over."""
    for inside, names in folders(config.source):
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield _file_item(config.source, os.path.join(inside, name))
