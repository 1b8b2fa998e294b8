"""Files and folders that are made: where they can be, whole or not at all, and by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from fastbd.base.errors import UserError


def check_out(path: Path, flag: str = "--out", name: str | None = None, instead: str | None = None) -> None:
    """Raise a UserError where `path` could not be made, before the work whose result goes there; make nothing.

    `path` is to be a file where `name` gives one as an example, else a folder. The error names `flag`, and what to do
    `instead` of it: another one.
    """
    instead = instead or f"choose another {flag}"
    if name and os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder; name the file in it, such as {path / name}.")
    if not name and os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"{flag} {path} is not a folder: {instead}.")
    folder = Path(os.path.abspath(path))
    folder = folder if os.path.isdir(folder) else folder.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder), suppress(FileNotFoundError):
            os.lstat(f"{path}.unfinished-01234567.tmp")  # the longest name that it has meanwhile
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written in {folder} ({error.strerror}): {instead}.") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; the file takes the name `path` when the block ends well, else it goes.

    It is on the disk before it takes the name, and the name when the block has ended: a loss of power leaves the old
    file or the new one. One process at a time: another waits, and writes its own then. An error is the one that the
    block raised, also where nothing can be removed, as on a read-only file system.
    """
    temporary = path.with_name(path.name + ".tmp")
    with locked(temporary):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException as error:
            discard(temporary)
            name_in(error, path)
            raise


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[FileIO]:
    """Yield the file, made if need be and opened to append, while no other process holds its lock.

    BlockingIOError where one does, and `wait` is false. Where the file system has no locks, nobody is kept out.
    """
    while True:
        with open(path, "a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks
                pass
            if _is_at(path, file):  # not one that the other process has renamed or removed
                yield file
                return


def _is_at(path: Path, file: FileIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def name_in(error: BaseException, path: Path) -> None:
    """Give the error the path of what was written, where it has none, as that of a write to a full disk."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def sync(path: Path) -> None:
    """Wait until what was written to the file, or the names in the folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot, as some that are mounted
            raise
    finally:
        os.close(opened)


def read_json(path: Path, remedy: str) -> Any:
    """Return what the JSON file holds. UserError with the path and remedy where it is damaged; FileNotFoundError."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not JSON, no text, or nested beyond what Python follows
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is damaged, or no JSON file ({why}): {remedy}.") from None


def read_jsonl(path: Path, remedy: str) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file, none where there is no file, without a last line that was cut short.

    UserError with the path, the line and the remedy where another one is damaged.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if (row := json_object(line)) is None:
            raise UserError(f"line {number} of {path} is damaged: {remedy}.")
        rows.append(row)
    return rows + ([unfinished] if (unfinished := json_object(last)) else [])


def crc_of(value: dict[str, Any]) -> str:
    """Return the CRC-32 of an object as JSON, 8 hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def json_object(text: bytes) -> dict[str, Any] | None:
    """Return the object that a text holds; None where it is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def discard(path: Path) -> None:
    """Remove the file if it is there and can be removed."""
    with suppress(OSError):
        path.unlink()


def lock(folder: Path, wait: bool = False) -> TextIO | None:
    """An open file in the folder, on which the folder's lock hangs; None where another process holds that.

    With `wait` it is waited for instead. The lock ends when the file is closed, at the latest with the process. Where
    the file system has no locks, as some NFS servers, nobody is kept out.
    """
    file = open(folder / LOCK, "a")  # noqa: SIM115 - it stays open; "a" leaves alone what the holder has written
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        return file
    with suppress(OSError):  # a disk that is full takes the lock, and no name of its holder
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def holder(folder: Path) -> str:
    """The process that holds the folder's lock, in words."""
    return (folder / LOCK).read_text() or "another process"


LOCK = ".lock"


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
