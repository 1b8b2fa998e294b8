"""Folders of image files."""

from __future__ import annotations

from collections.abc import Iterator

from fastbd.config import BuildConfig
from fastbd.data.sources.item import IMAGE_SUFFIXES, Item


def class_folder_items(config: BuildConfig) -> Iterator[Item]:
    """Every file below the class folders, by class; the folders' names are the classes'."""
    row_id, source = 0, config.source
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        for file in sorted(path for path in folder.rglob("*") if not path.is_dir()):
            yield Item(row_id, str(file.relative_to(source)), str(file), "", folder.name)
            row_id += 1


def image_items(config: BuildConfig) -> Iterator[Item]:
    """Every image below the folder, by file name; other files are passed over."""
    source = config.source
    files = (path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    for file in files:
        yield Item(-1, str(file.relative_to(source)), str(file), "")
