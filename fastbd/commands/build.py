"""The verb build: pack images and captions into one .beton file, checking every image."""

from __future__ import annotations

import csv
import errno
import multiprocessing
import os
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from fastbd import draws
from fastbd.config import BuildConfig
from fastbd.data.beton import BetonWriter
from fastbd.data.decode import BadImage, to_jpeg
from fastbd.data.eda import N_DRAWS, eda, synonyms_source
from fastbd.data.sources import Item, read_items
from fastbd.data.tokenizer import clean, tokenize
from fastbd.errors import UserError
from fastbd.log import console, progress
from fastbd.prompts import read_templates

CHUNK = 32  # rows a worker handles at a time


@dataclass(frozen=True)
class Row:
    """What a worker makes of an item that it accepts; the fields of a sample."""

    jpeg: bytes
    width: int
    height: int
    caption: str
    tokens: np.ndarray  # uint16 [77]
    text_views: np.ndarray  # uint16 [K, 77]


def run(config: BuildConfig) -> int:
    """Write config.out (.beton) and, beside it, .rejects.csv (row_id, path, reason) with every row that is not in it.

    Rows of classes with an empty caption get one from the templates, drawn by (seed, row). Pairs are kept when only
    their path repeats; a repeated (path, caption, class) is rejected. Raises UserError when no row, or no row of some
    class, is left, when the disk is full, or when a worker process dies; then there is no new .beton file.
    """
    items = read_items(config.source, config.image_key, config.caption_key, config.class_key)
    templates = read_templates(config.templates)
    out, rejects_path = config.out, config.out.with_suffix(".rejects.csv")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of the .beton file to write.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept, rejects = _pack(items, templates, config, rejects_path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"there is no room for {out} ({error.strerror}): free some space.") from None
        if isinstance(error, PermissionError):
            raise UserError(f"{out} cannot be written ({error.strerror}): give --out another place.") from None
        raise
    _report(config, len(items), kept, rejects, rejects_path)
    return 0


def _pack(
    items: list[Item], templates: list[str], config: BuildConfig, rejects_path: Path
) -> tuple[int, list[tuple[Item, str]]]:
    """Write the .beton file; returns the number of rows kept, and the rejected with their reasons."""
    usable, rejects = _split(items)
    classes = sorted({item.class_name for item in usable if item.class_name})
    labels = {name: label for label, name in enumerate(classes)}
    kept: Counter[str | None] = Counter()
    pack = partial(_pack_chunk, templates=templates, config=config)
    started = time.monotonic()
    with (
        BetonWriter(config.out, len(usable), config.text_views, bool(classes)) as writer,
        closing(_pack_in_order(usable, pack, config.workers)) as packed,
        progress("build", len(usable)) as advance,
    ):
        for item, row in packed:
            if isinstance(row, Row):
                try:
                    writer.add(
                        **vars(row), row_id=item.row_id, label=labels.get(item.class_name), class_name=item.class_name
                    )
                    kept[item.class_name] += 1
                except ValueError as error:
                    rejects.append((item, f"cannot be stored: {error}; try --store short256"))
            else:
                rejects.append((item, row))
            done = kept.total() + len(rejects) - (len(items) - len(usable))
            advance(1, f"{done / (time.monotonic() - started):,.0f} images/s")
        rejects.sort(key=lambda reject: reject[0].row_id)
        _write_rejects(rejects_path, rejects)
        _check(config.source, kept, classes, rejects, rejects_path)
    return kept.total(), rejects


def _split(items: list[Item]) -> tuple[list[Item], list[tuple[Item, str]]]:
    """(usable, rejected): what shows before any file is read."""
    usable, rejects, first = [], [], {}
    for item in items:
        row = first.setdefault((item.name, item.caption, item.class_name), item.row_id)
        reason = item.problem or (f"duplicate of row {row}" if row != item.row_id else None)
        if reason:
            rejects.append((item, reason))
        else:
            usable.append(item)
    return usable, rejects


def _pack_in_order(items: list[Item], pack, workers: int) -> Iterator[tuple[Item, Row | str]]:
    """(item, its row or the reason against it) in the items' order; chunks go to the worker processes in turn.

    Each worker sends through a pipe of its own and waits while the pipe is full: that bounds the memory, and a worker
    that is killed, even while it sends, ends its pipe. A shared queue, as concurrent.futures has it, would hang.
    """
    chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    # Not forked from this process, which may have threads; the server is forked when all is imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes, pipes = [], []
    try:
        for worker in range(workers):
            results, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(chunks[worker::workers], pack, send), daemon=True)
            process.start()
            send.close()
            processes.append(process)
            pipes.append(results)
        for chunk, results in zip(chunks, cycle(pipes), strict=False):
            yield from zip(chunk, _receive(results), strict=True)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _receive(results: Connection) -> list[Row | str]:
    try:
        return results.recv()
    except (EOFError, OSError):
        raise UserError(
            "a worker process died, most likely for want of memory, and nothing was written: run with fewer --workers."
        ) from None


def _work(chunks: list[list[Item]], pack, send: Connection) -> None:
    """A worker process: pack its chunks, and send what comes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the work
    warnings.simplefilter("ignore")  # what PIL warns of is either accepted or rejected with a reason
    Image.MAX_IMAGE_PIXELS = None  # --max-pixels is checked before the pixels are read
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with suppress(BrokenPipeError):  # the parent is gone: nobody is left to tell
        for chunk in chunks:
            send.send(pack(chunk))


def _pack_chunk(items: Sequence[Item], *, templates: list[str], config: BuildConfig) -> list[Row | str]:
    """Read, check and convert the items, in a worker process; a string says why an item is rejected."""
    ids = [item.row_id for item in items]
    choices = draws.uniform(config.seed, "template", ids, 1)[:, 0]
    captions = [clean(item.caption) for item in items]
    for i, item in enumerate(items):
        if item.class_name and not captions[i]:
            captions[i] = clean(templates[int(choices[i] * len(templates))].replace("{}", item.class_name))
    tokens = tokenize(captions)
    text_views = np.zeros((len(items), config.text_views, tokens.shape[1]), np.uint16)
    for k in range(config.text_views):
        u = draws.uniform(config.seed, "eda", ids, N_DRAWS, view=k)
        text_views[:, k] = tokenize([eda(caption, draw) for caption, draw in zip(captions, u, strict=True)])

    rows: list[Row | str] = []
    for i, item in enumerate(items):
        try:
            if not captions[i]:
                raise BadImage("empty caption")
            jpeg, width, height = to_jpeg(_read(item), config.store, config.max_pixels)
            rows.append(Row(jpeg, width, height, captions[i], tokens[i], text_views[i]))
        except BadImage as error:
            rows.append(error.reason)
    return rows


def _read(item: Item) -> bytes:
    try:
        if not item.file.is_file():  # a pipe or a device could hold a worker for ever
            raise BadImage("not a file" if item.file.exists() else "missing file")
        with item.file.open("rb") as file:
            file.seek(item.offset)
            data = file.read(-1 if item.size is None else item.size)
    except (OSError, ValueError) as error:
        raise BadImage(f"unreadable file: {error}") from None
    if not data:
        raise BadImage("empty file")
    return data


def _write_rejects(path: Path, rejects: list[tuple[Item, str]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(["row_id", "path", "reason"])
            rows.writerows((item.row_id, item.name, reason) for item, reason in rejects)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _kinds(rejects: list[tuple[Item, str]]) -> list[tuple[str, int]]:
    """Reasons without their details, most frequent first."""
    return Counter(re.sub(r":.*| of row \d+", "", reason, flags=re.DOTALL) for _, reason in rejects).most_common()


def _check(source: Path, kept: Counter, classes: list[str], rejects: list[tuple[Item, str]], path: Path) -> None:
    if not kept:
        reason = _kinds(rejects)[0][0]
        raise UserError(f"all {len(rejects):,} rows of {source} were rejected, most for: {reason}; see {path}.")
    if empty := [name for name in classes if not kept[name]]:
        raise UserError(f"no image of class '{empty[0]}' of {source} can be used: see {path} and mend them.")


def _report(config: BuildConfig, rows: int, kept: int, rejects: list[tuple[Item, str]], rejects_path: Path) -> None:
    lines = [("rows", f"{rows:,}"), ("kept", f"{kept:,}")]
    lines += [("rejected", f"{count:,}  {kind}") for kind, count in _kinds(rejects)]
    if rejects:
        lines.append(("rejects", str(rejects_path)))
    lines.append(("file", f"{config.out}  {config.out.stat().st_size / 1e6:,.1f} MB"))
    if config.text_views:
        source = synonyms_source()
        lines.append(("EDA synonyms", source if source != "none" else "none: no WordNet, only swaps and deletions"))
    for name, value in lines:
        console.print(f"{name:<14}{value}", markup=False)
