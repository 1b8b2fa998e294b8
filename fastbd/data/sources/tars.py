"""WebDataset tars, as img2dataset and webdataset write them, and tars of images."""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import BinaryIO

from fastbd.base.errors import UserError
from fastbd.config.flags import BuildConfig
from fastbd.data.sources.folder import folders, is_data, is_tar
from fastbd.data.sources.item import Item
from fastbd.data.sources.samples import Member, items_of, sample_items

BLOCK = tarfile.BLOCKSIZE
HEADER_LIMIT = 1 << 15  # bytes of a long name, or of attributes
PADDING_LIMIT = 1 << 20  # bytes of zeros that may stand between tars that were put together
MOST_TARS = 1_000_000  # that a pattern may name
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def tar_items(config: BuildConfig) -> Iterator[Item]:
    """The samples of one tar, of the tars in a folder and below it, or of those that a pattern names.

    Raises UserError for tars that a pattern names and that are missing, and for compressed ones.
    """
    tars = _tars(config.source)
    for path, _ in tars:
        if packed := _packed(path):
            raise UserError(
                f"{path} is compressed ({packed}), and its images are read in place: unpack it to a .tar first."
            )
    return items_of(tars, partial(_items_in, config=config), "reading tars", config.workers)


def is_pattern(source: Path) -> bool:
    """Whether a source is a pattern of tars: shards/{00000..00331}.tar or shards/*.tar."""
    return not source.exists() and is_tar(source.name) and re.search(r"[{*?[]", str(source)) is not None


def _tars(source: Path) -> list[tuple[str, str]]:
    """(path, name in the list of rejects) of each tar."""
    if source.is_dir():
        inside = (os.path.join(folder, name) for folder, names in folders(source) for name in names if is_tar(name))
        return [(os.path.join(source, name), name) for name in inside]
    if source.is_file():
        return [(str(source), source.name)]
    paths = list(_expanded(str(source)))
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise UserError(f"{source} names {len(paths):,} tars, and {len(missing):,} are missing, first {missing[0]}.")
    return [(path, path) for path in paths]


def _expanded(pattern: str) -> Iterator[str]:
    """The paths that a pattern names: {a,b} and {00..99} each, then *, ? and [ those that are there, sorted."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part, pattern) if i % 2 else [part] for i, part in enumerate(parts)]
    for words in product(*choices):
        path = "".join(words)
        found = sorted(glob.glob(path)) if re.search(r"[*?[]", path) else []
        yield from found or [path]


def _choices(text: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not numbers:
        return text.split(",")
    first, last = map(int, numbers.groups())
    if not 0 <= last - first < MOST_TARS:
        raise UserError(f"the range {{{text}}} in {pattern} is empty or too long: write {{00000..00331}}.")
    return [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]


def _packed(path: str) -> str | None:
    """The program that a file was compressed with; UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return _packer(file.read(6))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def _packer(head: bytes) -> str | None:
    return next((name for magic, name in PACKED.items() if head.startswith(magic)), None)


def _items_in(tar: tuple[str, str], config: BuildConfig) -> list[Item]:
    """The samples of a tar, and of the tars in it, their rows not numbered yet."""
    path, name = tar
    with io.BufferedReader(io.FileIO(path)) as file:
        return _items_between(file, path, name, 0, os.fstat(file.fileno()).st_size, config)


def _items_between(
    file: BinaryIO, path: str, name: str, start: int, end: int, config: BuildConfig, outer: bool = True
) -> list[Item]:
    """The samples of the tar that is the bytes from start to end of a file.

    The images of a tar that is named by a WordNet id, as ImageNet's are, have it as their class.
    """
    members, items, damage = [], [], None
    try:
        for info in _headers(file, start, end):
            if info.isdir() or not all(map(is_data, info.name.split("/"))):
                continue
            member = _member(info, path, name, end)
            if outer and is_tar(info.name) and not member.problem:
                inner_end = info.offset_data + info.size
                items += _items_between(file, path, member.name, info.offset_data, inner_end, config, outer=False)
            else:
                members.append(member)
    except (tarfile.TarError, OSError) as error:
        damage = f"damaged tar: {error}"
    stem = os.path.basename(name).partition(".")[0]
    class_name = stem if re.fullmatch(r"n\d{8}", stem) else None
    items += sample_items(members, config, class_name)
    if damage or not items:
        items.append(Item(-1, f"{name}/", path, "", class_name, problem=damage or "empty tar"))
    return items


def _member(info: tarfile.TarInfo, path: str, tar_name: str, end: int) -> Member:
    name = f"{tar_name}/{info.name}"
    problem = None
    if not info.isreg():
        problem = f"a link or device, not a file: {info.name}"
    elif info.issparse():
        problem = f"a sparse file: {info.name}"
    elif _is_cut(info, end):
        problem = f"cut off by the end of the tar: {info.name}"
    return Member(name, path, info.offset_data, info.size, problem)


def _is_cut(info: tarfile.TarInfo, end: int) -> bool:
    return not info.issparse() and info.offset_data + info.size > end


class _Headers(io.BufferedIOBase):
    """The bytes of a file up to `end`, for the headers in them: nobody may read much at once."""

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.end = file, end

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(min(size, max(0, self.end - self.file.tell())))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _headers(file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The members of the tar from start to end, and of those that were put behind it; TarError where it is damaged.

    tarfile's own iteration takes a damaged header in the middle, and a tar cut short, for the end.
    """
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(BLOCK)))  # an empty one, to hold what headers say of all that follow
    tar.fileobj = _Headers(file, end)
    file.seek(start)
    if packed := _packer(file.read(6)):
        raise tarfile.ReadError(f"it is compressed ({packed}); unpack it to a .tar first")
    at = start
    while at < end:
        file.seek(at)
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue] - not in its hints
            at = _after_zeros(file, at, end)
            if at is None:
                return
            continue
        except tarfile.TarError:
            raise
        except Exception as error:  # tarfile raises nearly anything for a damaged header
            raise tarfile.ReadError(f"{type(error).__name__}: {error}") from None
        if info.size < 0 or tar.offset <= at:
            raise tarfile.ReadError("a member of negative size")
        yield info
        at = tar.offset
        if _is_cut(info, end):
            return  # which its own problem says
    raise tarfile.ReadError("its end is missing")


def _after_zeros(file: BinaryIO, at: int, end: int) -> int | None:
    """Where data follows the zeros that end a tar, as when tars were put together with cat; None where none does."""
    file.seek(at)
    tail = file.read(min(PADDING_LIMIT, end - at))
    zeros = len(tail) - len(tail.lstrip(b"\0"))
    return at + zeros // BLOCK * BLOCK if zeros < len(tail) else None
