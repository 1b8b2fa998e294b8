"""Parquet files: a row for each pair, with the path of its image or the image itself."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from fastbd.base.errors import UserError
from fastbd.config.flags import BuildConfig
from fastbd.data.decode import BadImage
from fastbd.data.sources.item import IMAGE_KEYS, Item, image_key
from fastbd.data.sources.record import captioned, image_item

ENCODED = ("jpg", "png", "webp")
"""Columns of the images in img2dataset's files, by its --encode_format."""
BATCH = 32  # images that a worker holds


def parquet_files(source: Path) -> list[Path]:
    """The parquet files of a source, by name, but for those that img2dataset puts beside a folder of the same name."""
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    return [file for file in files if not file.with_suffix("").is_dir()]


def parquet_items(config: BuildConfig) -> Iterator[Item]:
    """The rows of parquet files; images in the files are left there, for read_image."""
    row_id = 0
    for path in _of_split(parquet_files(config.source), config):
        try:
            for item in _items_in(path, config):
                yield item._replace(row_id=row_id)
                row_id += 1
        except (OSError, ValueError, _pyarrow().ArrowException) as error:
            raise UserError(f"{path} cannot be read ({_first_line(error)}): repair it, or take it out.") from None


def read_image(item: Item) -> bytes:
    """The encoded image in the column and row of the item; raises BadImage where there is none."""
    try:
        value = _rows(item.file, item.column)[item.offset]
    except (OSError, ValueError, _pyarrow().ArrowException) as error:
        raise BadImage(f"damaged parquet file: {_first_line(error)}") from None
    value = value.get("bytes") if isinstance(value, dict) else value
    if not value:
        raise BadImage("no image in the row")
    return value


def _of_split(files: list[Path], config: BuildConfig) -> list[Path]:
    """The files of config.split, in Hugging Face's naming: SPLIT-00000-of-00005.parquet, or more after it."""
    splits = {file: found[1] for file in files if (found := re.match(r"(.+)-\d{5}-of-\d{5}", file.name))}
    names = sorted(set(splits.values()))
    if config.split and config.split not in names:
        raise UserError(f"{config.source} has no split '{config.split}'; its splits are: {', '.join(names) or 'none'}.")
    if len(names) > 1 and not config.split:
        raise UserError(f"{config.source} holds the splits {', '.join(names)}: choose one with --split.")
    return [file for file in files if not config.split or splits.get(file) == config.split]


def _items_in(path: Path, config: BuildConfig) -> Iterator[Item]:
    file, types = _file(path), _pyarrow().types
    names = file.schema_arrow.names
    key = image_key(names, config, IMAGE_KEYS + ENCODED)
    caption_key = config.caption_key or ("caption" if "caption" in names or not config.class_key else None)
    keys = {"image": key, "caption": caption_key, "class": config.class_key}
    for flag, column in keys.items():
        if column and names.count(column) != 1:
            raise UserError(
                f"{path} has {'two columns' if column in names else 'no column'} '{column}'; its columns are: "
                f"{', '.join(names):.300}: name one of them with --{flag}-key."
            )
    kind = file.schema_arrow.field(key).type
    embedded = types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)
    columns = {column for column in keys.values() if column and not (embedded and column == key)}
    row = 0
    for batch in file.iter_batches(4096, columns=sorted(columns)):
        for record in batch.to_pylist():
            stored = Item(-1, f"{path.name}/{row}", str(path), "", offset=row, column=key)
            yield from captioned(stored if embedded else image_item(record[key], config), record, config)
            row += 1


class _Rows:
    """The values of a column by their rows, read forwards from the beginning of a row group, a few at a time."""

    def __init__(self, path: str, column: str):
        self.file, self.column = _file(path), column
        sizes = (self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups))
        self.starts = list(accumulate(sizes, initial=0))
        self.group, self.begin, self.values, self.batches = -1, 0, (), iter(())
        self.damaged: dict[int, tuple[int, Exception]] = {}  # row groups: the first row that cannot be read, and why

    def __getitem__(self, row: int):
        group = bisect_right(self.starts, row) - 1
        if group in self.damaged and row >= self.damaged[group][0]:
            raise self.damaged[group][1]
        if group != self.group or row < self.begin:
            self.group, self.begin, self.values = group, self.starts[group], ()
            self.batches = self.file.iter_batches(BATCH, [group], [self.column], use_threads=False)
        while row >= self.begin + len(self.values):
            self.begin += len(self.values)
            self.values = ()
            try:
                self.values = next(self.batches).column(0)
            except (OSError, ValueError, StopIteration, _pyarrow().ArrowException) as error:
                self.damaged[group] = self.begin, ValueError(_first_line(error) or "it ends before its last row")
                raise self.damaged[group][1] from None
        return self.values[row - self.begin].as_py()


_rows = lru_cache(maxsize=1)(_Rows)  # a worker's rows mostly follow one another


def _file(path: Path | str):
    """The open file, of which pages are read one by one: row groups may be larger than the memory."""
    return _pyarrow().parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need PyArrow: pip install 'fastbd[parquet]'.") from None
    return pyarrow


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
