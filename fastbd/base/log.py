"""What a run writes and shows: .jsonl lines, the circumstances, the progress line."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastbd.base.errors import UserError
from fastbd.base.files import json_object, locked, name_in, read_jsonl, replacing, sync

console = Console(highlight=False, soft_wrap=True)


def append(path: Path, row: dict) -> None:
    """Add one line to a .jsonl file, or nothing where the disk is full; one process at a time.

    A last line that was cut short, as by a loss of power, goes first.
    """
    line = json.dumps(row).encode() + b"\n"
    with locked(path) as file:
        missing = _mend(file)
        before = file.seek(0, os.SEEK_END)
        try:
            rest = missing + line
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException as error:
            file.truncate(before)
            name_in(error, path)
            raise


def _mend(file: FileIO) -> bytes:
    """Cut off an unfinished last line; return the newline where it is all that the line lacks."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return b""
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if json_object(last) is not None:
        return b"\n"
    file.truncate(size - len(last))
    return b""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder that is called `path`, and is on the disk, when the block is done; after an error it is gone."""
    mark = secrets.token_hex(4)
    new, temporary = (path.with_name(f"{path.name}.{began}{mark}.tmp") for began in ("", UNFINISHED))
    new.mkdir(parents=True)
    try:
        with _opened(new) as held:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            new.rename(temporary)  # locked before it can be found
            yield temporary
            for made in (*temporary.rglob("*"), temporary):
                sync(made)
            temporary.rename(path)
            sync(path.parent)
    except OSError as error:
        name_in(error, path)
        raise
    finally:
        for left in (new, temporary):
            shutil.rmtree(left, ignore_errors=True)


UNFINISHED = "unfinished-"


def remove_unfinished(path: Path) -> None:
    """Remove what processes have left that were killed while they made a new_folder(path)."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.{UNFINISHED}{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError), _opened(temporary) as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where a process that lives is making it
            shutil.rmtree(temporary)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Yield the descriptor of a folder, on which a lock can hang, as long as this process lives at the most."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def rewind(path: Path, step: int) -> None:
    """Keep the lines of a .jsonl file, if there is one, up to a step; not a last one that was cut short.

    UserError where a line is damaged: the row that it held is not lost in silence.
    """
    if not path.exists():
        return
    with locked(path):
        rows = read_jsonl(path, "put its line back from a copy, or remove it and go without it")
        if wrong := [k for k, row in enumerate(rows, 1) if not isinstance(row.get("step"), int)]:
            raise UserError(f"line {wrong[0]} of {path} has no number of a step: put it back, or remove it.")
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def write_json(path: Path, value: dict) -> None:
    """Write a .json file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def environment() -> dict:
    """Versions, machine and commit: the circumstances of a number."""
    import numpy
    import PIL
    import torch

    from fastbd import __version__

    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists() and shutil.which("git"):  # an installed copy may lie inside somebody else's repository
        git = ["git", "-C", root, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "fastbd": __version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def progress(label: str, total: int, done: int = 0, quiet: bool = False):
    """A progress bar; yields advance(n, text)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done, text="")

        def advance(n: int = 1, text: str | None = None) -> None:
            bar.update(task, advance=n, **({} if text is None else {"text": text}))

        yield advance


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, to be pasted: the first column to the left, the others to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    return "\n".join(map(line, [cells[0], rule, *cells[1:]]))
