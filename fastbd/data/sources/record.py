"""Records of named values: objects of a JSON file, rows of a parquet file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator

from fastbd.config.flags import BuildConfig
from fastbd.data.sources.item import Item, class_problem, image_key


def parse(text: str | bytes):
    """The value of a JSON text; ValueError, with one line, for one that is damaged or gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{error.msg} in {line}column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason}, byte {error.start})") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def _object(pairs: list[tuple]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object gives a key twice")
    return made


def image_item(path: object, config: BuildConfig) -> Item:
    """The item of an image file, which the source gives by its path from config.images or its own folder."""
    if not isinstance(path, str):
        return Item(-1, "", "", "", problem=f"path is not text: {shown(path)}")
    folder = str(config.images or config.source.parent)
    return Item(-1, path, os.path.join(folder, path), "", problem=None if path.strip() else "empty path")


def record_items(record: object, config: BuildConfig) -> Iterator[Item]:
    """The pairs of a record {image, caption}; a record with a list of captions is as many pairs."""
    if not isinstance(record, dict):
        yield Item(-1, "", "", "", problem=f"not an object: {shown(record)}")
        return
    key = image_key(record, config)
    yield from captioned(image_item(record[key], config) if key in record else _without(key, record), record, config)


def captioned(image: Item, record: dict, config: BuildConfig) -> Iterator[Item]:
    """The image once for each caption of its record, with its class."""
    key, class_key = config.caption_key or "caption", config.class_key
    class_name, problem = _class_name(record, class_key) if class_key else (None, None)
    captions = record.get(key, "")
    if key not in record and (config.caption_key or not class_key):
        problem = _without(key, record).problem
    elif captions == []:
        problem = f"no captions in the list '{key}'"
    for caption in captions if isinstance(captions, list) and captions else [captions]:
        yield with_caption(image._replace(class_name=class_name, problem=image.problem or problem), caption)


def with_caption(item: Item, caption: object) -> Item:
    """The item with a caption, which has to be text; null and NaN stand for a missing one."""
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        caption = "null" if caption is None else "nan"
    if isinstance(caption, str):
        return item._replace(caption=caption)
    return item._replace(problem=item.problem or f"caption is not text: {shown(caption)}")


def _class_name(record: dict, key: str) -> tuple[str | None, str | None]:
    """(name, problem); whole numbers are names too."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        return None, f"class is not text: {shown(value)}"
    name = (value or "").strip()
    return name, class_problem(name)


def _without(key: str, record: dict) -> Item:
    return Item(-1, "", "", "", problem=f"no '{key}': its keys are {', '.join(record):.200}")


def shown(value: object) -> str:
    """A number as it is, else the type of the value: what is nested without end has no text."""
    return repr(value) if isinstance(value, int | float) else type(value).__name__
