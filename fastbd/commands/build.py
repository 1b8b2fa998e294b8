"""The verb build: pack images and captions into one .beton file, checking every image."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from fastbd import __version__
from fastbd.base import random
from fastbd.base.console import console, progress
from fastbd.base.errors import UserError
from fastbd.base.files import check_out, discard, locked, replacing
from fastbd.base.journal import Journal
from fastbd.base.prompts import numbered, read_classes, read_templates
from fastbd.base.signals import Stopped, stoppable
from fastbd.base.text import clean
from fastbd.base.workers import WorkerDied, map_in_order, preload
from fastbd.config.fields import to_dict
from fastbd.config.flags import BuildConfig
from fastbd.config.recipes import published
from fastbd.data.beton import BetonWriter, begins_as_beton, holds, temporary
from fastbd.data.decode import BadImage, to_stored
from fastbd.data.eda import N_DRAWS, eda, synonyms_source
from fastbd.data.sources import read_items
from fastbd.data.sources.item import Item
from fastbd.data.sources.parquet import read_image
from fastbd.data.tokenizer import CONTEXT, tokenize

LAYOUT = 2  # of what BetonWriter writes: raised when that changes, so that no build resumes what another one began
CHUNK = 32  # rows a worker handles at a time
SAVE_EVERY = 5.0  # seconds of work that a kill may cost


@dataclass(frozen=True)
class Row:
    """What a worker makes of an item that it accepts; the fields of a sample."""

    jpeg: bytes
    width: int
    height: int
    jpeg_crc: int  # made here, where there are many processes
    caption: str
    tokens: np.ndarray  # uint16 [77]
    text_views: np.ndarray  # uint16 [K, 77]


@stoppable()
def run(config: BuildConfig) -> int:
    """Write config.out (.beton) and, beside it, .rejects.csv (row_id, line, path, reason) with any rows not in it.

    Rows of classes with an empty caption get one from the templates, drawn by (seed, row). Pairs are kept when only
    their path repeats; a repeated (path, caption, class) is rejected. Raises UserError when no row, or no row of some
    class, is left, when the disk is full, or when a worker process dies, and Stopped after a signal; then there is no
    new .beton file. A build that was cut short resumes from its last save when it is run again, to the same bytes.
    """
    began = time.time_ns()
    out, rejects_path = config.out, config.out.with_suffix(".rejects.csv")
    check_out(out, name="pairs.beton")
    _check_overwritten(out, rejects_path, config.source)
    classes = read_classes(config.classes) if config.classes else None
    templates = read_templates(config.templates, classes)
    names = dict(zip(classes.codes, classes, strict=True)) if classes else {}
    preload(__name__)
    preload("ftfy")  # which clean() imports for the first caption that is not plain
    items = read_items(config)
    pack = partial(_pack_chunk, templates=templates, names=names, config=config)
    job, journal = _job(items, [templates, names], config), None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            journal = Journal(out.with_name(out.name + ".journal"), job)
            kept, rejects = _pack(items, pack, config, rejects_path, journal, began)
    except Stopped:
        console.print(f"{out} is not finished: {_left(journal)}", markup=False)
        raise
    except WorkerDied as error:
        raise UserError(f"{error}; {_left(journal)}.") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"there is no room for {out} ({error.strerror}): free some space; {_left(journal)}."
            ) from None
        if isinstance(error, PermissionError):
            raise UserError(f"{out} cannot be written ({error.strerror}): give --out another place.") from None
        raise
    _report(config, len(items), kept, rejects, rejects_path)
    if not classes and numbered({item.class_name for item in items if item.class_name} or {""}):
        console.print("The classes are numbers, also in captions made of them: name them with --classes.")
    return 0


def _check_overwritten(out: Path, rejects_path: Path, source: Path) -> None:
    """Raise a UserError where the build would write over its source, or over a file that is not a .beton."""
    if out.is_file() and out.stat().st_size and not begins_as_beton(out):
        raise UserError(f"--out {out} exists and is not a .beton file: give another name, such as pairs.beton.")
    if any(path.exists() and source.exists() and path.samefile(source) for path in (out, rejects_path)):
        raise UserError(f"the build would write over its source {source}: give another --out.")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from building the same file meanwhile; UserError where one does."""
    part = temporary(out)
    try:
        with locked(part, wait=False) as held:
            try:
                yield
            finally:
                status = os.fstat(held.fileno())
                if status.st_nlink and not status.st_size:  # neither renamed, removed nor written to
                    discard(part)
    except BlockingIOError:
        raise UserError(f"another process is building {out}: wait for it to end, or give another --out.") from None


def _job(items: list[Item], wording: list, config: BuildConfig) -> str:
    """sha256 of what decides the bytes of the file: settings, rows, and the versions of what works on them."""
    settings = to_dict(config) | {"out": None, "workers": None, "recipe": None}
    made_by = [__version__, LAYOUT, *map(version, ("ftfy", "tokenizers", "pillow")), synonyms_source()]
    digest = hashlib.sha256(json.dumps([made_by, settings, wording]).encode())
    for item in items:
        digest.update(
            repr((item.name, item.caption, item.class_name, item.offset, item.size, item.problem, item.column)).encode()
        )
    return digest.hexdigest()


def _left(journal: Journal | None) -> str:
    if not journal or not journal.entries:
        return "nothing was written"
    return f"the same command goes on after the {journal.entries[-1]['done']:,} images that are done"


def _pack(
    items: list[Item],
    pack: Callable[[Sequence[Item]], list[Row | str]],
    config: BuildConfig,
    rejects_path: Path,
    journal: Journal,
    began: int,
) -> tuple[int, list[tuple[Item, str]]]:
    """Write the .beton file; returns the number of rows kept, and the rejected with their reasons."""
    usable = [item for item in items if not item.problem]
    rejects = [(item, item.problem) for item in items if item.problem]
    done, rejected = _done_before(journal, usable, config.out)
    began = journal.entries[0]["began"] if done else began
    rejects += [(usable[i], reason) for i, reason in rejected.items()]
    kept = Counter(item.class_name for i, item in enumerate(usable[:done]) if i not in rejected)
    classes = sorted({item.class_name for item in items if item.class_name})
    labels = {name: label for label, name in enumerate(classes)}
    before = next((usable[i] for i in reversed(range(done)) if i not in rejected), None)  # the last that was kept
    started = saved = time.monotonic()
    unsaved: list[tuple[int, str]] = []  # rejects since the last save
    with (
        BetonWriter(config.out, len(usable), config.text_views, bool(classes), journal, _published(config)) as writer,
        closing(_pack_in_order(usable[done:], pack, config.workers)) as packed,
        progress("build", len(usable), done) as advance,
    ):
        for i, (item, row) in enumerate(packed, done):
            reason = row if isinstance(row, str) else _add(writer, item, row, labels, before)
            if reason:
                rejects.append((item, reason))
                unsaved.append((i, reason))
            else:
                kept[item.class_name] += 1
                before = item
            now = time.monotonic()
            advance(1, f"{(i + 1 - done) / (now - started):,.0f} images/s")
            if now - saved > SAVE_EVERY:
                writer.save(done=i + 1, rejected=unsaved, began=began)
                unsaved, saved = [], now
        rejects.sort(key=lambda reject: reject[0].row_id)
        _write_rejects(rejects_path, rejects)
        if problem := _problem(config.source, kept, classes, rejects, rejects_path):
            journal.clear()  # going on would come to the same end
            raise UserError(problem)
    return kept.total(), rejects


def _published(config: BuildConfig) -> dict[str, Any]:
    """Return the flags of --recipe published that are not at their defaults: runs on the data record them."""
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    return {flag: getattr(config, flag) for flag in published("build") if getattr(config, flag) != usual[flag]}


def _add(writer: BetonWriter, item: Item, row: Row, labels: dict[str, int], before: Item | None) -> str | None:
    """Store a row, its image only where that is not the one of the row before; a string says why it is not possible."""
    values: dict[str, Any] = vars(row) | ({"jpeg": None} if _same_image(item, before) else {})
    label = labels[item.class_name] if item.class_name else None
    try:
        writer.add(**values, row_id=item.row_id, label=label, class_name=item.class_name)
    except ValueError as error:
        return f"cannot be stored: {error}; try --store short256"


def _same_image(item: Item, before: Item | None) -> bool:
    return before is not None and (item.file, item.offset) == (before.file, before.offset)


def _done_before(journal: Journal, usable: list[Item], out: Path) -> tuple[int, dict[int, str]]:
    """(number of usable rows, those rejected among them with their reasons) that an earlier build left in the journal.

    None of them, and a cleared journal, when that was a build of something else or its images have changed since.
    """
    why = "its source, settings or fastbd were others" if journal.stale else ""
    done, rejected = 0, {}
    if journal.entries:
        done, began = journal.entries[-1]["done"], journal.entries[0]["began"]
        rejected = {i: reason for entry in journal.entries for i, reason in entry["rejected"]}
        if name := _changed(usable[:done], rejected, began):
            why = f"{name} has changed since"
        elif not holds(temporary(out), **journal.entries[-1]["writer"]):
            why = f"{temporary(out)} is gone or cut short"
    if why:
        done, rejected = 0, {}
        journal.clear()
        console.print(f"an unfinished build of {out} is there, but {why}: starting over", markup=False)
    elif done:
        console.print(f"going on with {out} after the {done:,} images that are done", markup=False)
    return done, rejected


def _changed(items: list[Item], rejected: Container[int], since: int) -> str | None:
    """The first file of the items that was written, moved or removed after `since` (ns since 1970), or came then."""
    changed_at: dict[str, float] = {}
    for i, item in enumerate(items):
        if item.file not in changed_at:
            try:
                changed_at[item.file] = os.stat(item.file).st_ctime_ns
            except (OSError, ValueError):  # missing, as it was before if the item was rejected
                changed_at[item.file] = 0 if i in rejected else math.inf
        if changed_at[item.file] > since:
            return item.name
    return None


def _pack_in_order(
    items: list[Item], pack: Callable[[Sequence[Item]], list[Row | str]], workers: int
) -> Generator[tuple[Item, Row | str], None, None]:
    """(item, its row or the reason against it) in the items' order."""
    chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
    with closing(map_in_order(pack, chunks, workers)) as packed:
        for chunk, rows in zip(chunks, packed, strict=True):
            yield from zip(chunk, rows, strict=True)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Let Pillow open images of any size, whole ones alone, and say nothing; its settings are put back at the end."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS = None  # --max-pixels is checked before the pixels are read
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is either accepted or rejected with a reason
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


@_strict_pillow()
def _pack_chunk(
    items: Sequence[Item], *, templates: list[str], names: dict[str, str], config: BuildConfig
) -> list[Row | str]:
    """Read, check and convert the items; a string says why an item is rejected.

    `names`: what templates are to call a class, where that is not its own name.
    """
    ids = [item.row_id for item in items]
    choices = random.uniform(config.seed, "template", ids, 1)[:, 0]
    captions = [clean(item.caption) for item in items]
    for i, item in enumerate(items):
        if item.class_name and not captions[i]:
            name = names.get(item.class_name, item.class_name)
            captions[i] = clean(templates[int(choices[i] * len(templates))].replace("{}", name))
    tokens = _tokens(captions, config)
    text_views = np.zeros((len(items), config.text_views, tokens.shape[1]), np.uint16)
    for k in range(config.text_views):
        u = random.uniform(config.seed, "eda", ids, N_DRAWS, view=k)
        drawn = [eda(text, draw, insertion=config.eda_insertion) for text, draw in zip(captions, u, strict=True)]
        text_views[:, k] = _tokens(drawn, config)

    rows: list[Row | str] = []
    image = None
    for i, item in enumerate(items):
        if image is None or not _same_image(item, items[i - 1]):
            image = _image(item, config)
        if not captions[i]:
            rows.append("empty caption")
        elif isinstance(image, str):
            rows.append(image)
        else:
            rows.append(Row(*image, captions[i], tokens[i], text_views[i]))
    return rows


def _tokens(texts: list[str], config: BuildConfig) -> np.ndarray:
    """uint16 [B, 77]; with --end-token cut, a text that has more keeps the first 77, of which the end token is none."""
    if config.end_token == "cut":
        return tokenize(texts, CONTEXT + 1, cleaned=True)[:, :CONTEXT]
    return tokenize(texts, cleaned=True)


def _image(item: Item, config: BuildConfig) -> tuple[bytes, int, int, int] | str:
    """(bytes to store, width, height, CRC-32 of the bytes); a string says what is wrong."""
    try:
        stored, width, height = to_stored(_read(item), config.store, config.max_pixels, config.exif)
        return stored, width, height, zlib.crc32(stored)
    except BadImage as error:
        return error.reason


def _read(item: Item) -> bytes:
    if item.column:
        return read_image(item)
    try:
        if not os.path.isfile(item.file):  # a pipe or a device could hold a worker for ever
            raise BadImage(_why_no_file(item))
        with open(item.file, "rb") as file:
            file.seek(item.offset)
            data = file.read(-1 if item.size is None else item.size)
    except (OSError, ValueError) as error:
        raise BadImage(f"unreadable file: {error}") from None
    if not data:
        raise BadImage("empty file")
    return data


def _why_no_file(item: Item) -> str:
    if os.path.exists(item.file):
        return "not a file"
    if re.match("https?://", item.name):
        return "an address, not a file: download the images first, as with img2dataset"
    return "missing file"


def _write_rejects(path: Path, rejects: list[tuple[Item, str]]) -> None:
    """Write row_id, line (where the source is a text file), path and reason of each row that is not taken.

    Where all are, there is no such file, not one of an earlier build either.
    """
    if not rejects:
        path.unlink(missing_ok=True)
        return
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(["row_id", "line", "path", "reason"])
        rows.writerows((item.row_id, item.line, item.name, reason) for item, reason in rejects)


def _kinds(rejects: list[tuple[Item, str]]) -> list[tuple[str, int]]:
    """Reasons without their details, most frequent first."""
    return Counter(re.sub(r":.*| of row \d+", "", reason, flags=re.DOTALL) for _, reason in rejects).most_common()


def _problem(
    source: Path, kept: Counter, classes: list[str], rejects: list[tuple[Item, str]], path: Path
) -> str | None:
    """Why there can be no data set of the rows that are left."""
    if not kept:
        reason = _kinds(rejects)[0][0]
        return f"all {len(rejects):,} rows of {source} were rejected, most for: {reason}; see {path}."
    if empty := [name for name in classes if not kept[name]]:
        return f"no image of class '{empty[0]}' of {source} can be used: see {path} and mend them."
    return None


def _report(config: BuildConfig, rows: int, kept: int, rejects: list[tuple[Item, str]], rejects_path: Path) -> None:
    lines = [("rows", f"{rows:,}"), ("kept", f"{kept:,}" + ("" if rejects else ", all of them"))]
    lines += [("rejected", f"{count:,}  {kind}") for kind, count in _kinds(rejects)]
    if rejects:
        lines.append(("rejects", str(rejects_path)))
    lines.append(("file", f"{config.out}  {config.out.stat().st_size / 1e6:,.1f} MB"))
    if config.text_views:
        source = synonyms_source()
        lines.append(("EDA synonyms", source if source != "none" else "none: no WordNet, only swaps and deletions"))
    for name, value in lines:
        console.print(f"{name:<14}{value}", markup=False)
