"""Tables: CSV and TSV files with a line for each pair."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator

from fastbd.config import BuildConfig
from fastbd.data.sources.item import Item
from fastbd.errors import UserError


def table_items(config: BuildConfig) -> Iterator[Item]:
    """The rows of a .csv or .tsv file with a header line; UserError where a column is missing."""
    source, class_key = config.source, config.class_key
    image_key, caption_key = config.image_key or "path", config.caption_key or "caption"
    csv.field_size_limit(sys.maxsize)  # a row with a stray quote may swallow the rest: let it be rejected, not crash
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if source.suffix == ".tsv" else ",", restval="")
            columns = rows.fieldnames or []
            for key in (image_key, class_key, None if class_key in columns else caption_key):
                if key and key not in columns:
                    listed = ", ".join(columns) or "none"
                    raise UserError(f"{source} has no column '{key}'; its columns are: {listed}.")
            folder = str(source.parent)
            for row_id, row in enumerate(rows):
                name = row[image_key].strip()
                class_name = row[class_key].strip() if class_key else None
                problem = "empty path" if not name else "empty class" if class_name == "" else None
                caption = row.get(caption_key, "")
                yield Item(row_id, name, os.path.join(folder, name), caption, class_name, problem=problem)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text ({error}): save it as UTF-8.") from None
    except csv.Error as error:
        raise UserError(f"{source} is not a readable table ({error}): repair it.") from None
