"""Row lists: the places of a data file that training may use, one a line, bound to the file by its fingerprint."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np

from fastbd.base.errors import UserError
from fastbd.base.files import write_text

HEAD = "# fastbd rows of "
PLAIN = re.compile(r"-?[0-9]+").fullmatch  # int() takes more, as 1_0 for 10


def write_rows(path: Path, rows: np.ndarray, fingerprint: str, about: str) -> None:
    """Write the list atomically: a comment (fingerprint of the data, CRC-32 of the rows, what it is), then the rows."""
    lines = list(map(str, rows.tolist()))
    write_text(path, "\n".join([f"{HEAD}{fingerprint}, crc32 {_crc(lines)}, {about}", *lines]) + "\n")


def _crc(lines: list[str]) -> str:
    return f"{zlib.crc32(' '.join(lines).encode()):08x}"


def read_rows(path: Path, fingerprint: str, total: int) -> np.ndarray:
    """Return the rows, int64 [N], ascending.

    UserError unless the file lists rows of the data of `total` rows with this fingerprint, and, where it says their
    CRC-32, lists them as they were written.
    """
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        if not head.startswith(HEAD) or not all(map(PLAIN, lines)):
            raise ValueError
        rows = np.array(lines, np.int64)
    except OSError as error:
        raise UserError(
            f"the row list {path} cannot be read ({error.strerror}); make one with detect --drop."
        ) from None
    except (ValueError, OverflowError):  # also of what is no text, or empty, and of numbers beyond int64
        raise UserError(f"{path} is no row list of fastbd; make one with: python -m fastbd detect --drop.") from None
    made_for, *said = head.removeprefix(HEAD).split(", ")
    crc = said[0].removeprefix("crc32 ") if said and said[0].startswith("crc32 ") else None
    if crc not in (None, _crc(lines)):
        raise UserError(
            f"the rows in {path} are not those that were written: make the list again, or, where you have "
            f"changed it, take 'crc32 {crc}, ' out of its first line."
        )
    if made_for.split(",")[0] != fingerprint:
        raise UserError(f"the row list {path} was made for other data; make one for this with detect --drop.")
    if not len(rows) or rows[0] < 0 or rows[-1] >= total or (np.diff(rows) <= 0).any():
        raise UserError(f"the rows in {path} must ascend within 0..{total - 1}, at least one; make the list again.")
    return rows
