"""Zip archives, as torch.save writes them: their members compared with their checksums, which torch leaves alone."""

from __future__ import annotations

import errno
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

CHUNK = 1 << 20  # bytes
FOLDER = 0x10  # an attribute of DOS; torch leaves such a member's memory as it finds it


class DamagedArchive(Exception):
    """A member that is not as it was written; the message says which, and what is wrong with it."""


def verify(file: BinaryIO, required: bool = True) -> None:
    """Raise DamagedArchive unless each member of the archive has the CRC that the archive records of it.

    Code of TorchScript, which nobody here reads, is left out. Without `required` an archive passes that records no
    CRC, as torch.save writes with set_crc32_options(False).
    """
    with _read("its directory"):
        archive = zipfile.ZipFile(file)
        members = [entry for entry in archive.infolist() if "/code/" not in entry.filename]
    if not required and not any(entry.CRC for entry in members):
        return
    twice = [name for name, count in Counter(archive.namelist()).items() if count > 1]
    if twice:
        raise DamagedArchive(f"member {_short(twice[0])}: it is there twice")
    for entry in members:
        if entry.external_attr & FOLDER:
            raise DamagedArchive(f"member {_short(entry.filename)}: it is marked as a folder")
        with _read(f"member {_short(entry.filename)}"), archive.open(entry) as member:
            while member.read(CHUNK):
                pass


@contextmanager
def _read(part: str) -> Iterator[None]:
    """Raise DamagedArchive for what a reader of damaged bytes raises, which can be anything; not for a bad disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise  # EINVAL: a place before the file's beginning
        checksum = "Bad CRC" in str(error)
        said = "its content does not have its checksum" if checksum else str(error) or type(error).__name__
        raise DamagedArchive(f"{part}: {said}") from None


def _short(name: str) -> str:
    """Return the name without the folder that torch puts all members in."""
    return name.partition("/")[2] or name
