"""Row lists: the places of a data file that training may use, one a line, bound to the file by its fingerprint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbd.errors import UserError
from fastbd.log import write_text

HEAD = "# fastbd rows of "


def write_rows(path: Path, rows: np.ndarray, fingerprint: str, about: str) -> None:
    """A text file, written atomically: a comment with the data's fingerprint and what the list is, then the rows."""
    write_text(path, "\n".join([f"{HEAD}{fingerprint}, {about}", *map(str, rows.tolist())]) + "\n")


def read_rows(path: Path, fingerprint: str, total: int) -> np.ndarray:
    """int64 [N], ascending. UserError unless the file lists rows of the data of `total` rows with this fingerprint."""
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        if not head.startswith(HEAD):
            raise ValueError
        rows = np.array(lines, np.int64)
    except OSError as error:
        raise UserError(
            f"the row list {path} cannot be read ({error.strerror}); make one with detect --drop."
        ) from None
    except ValueError:  # also of what is no text, or empty
        raise UserError(f"{path} is no row list of fastbd; make one with: python -m fastbd detect --drop.") from None
    if head.removeprefix(HEAD).split(",")[0] != fingerprint:
        raise UserError(f"the row list {path} was made for other data; make one for this with detect --drop.")
    if not len(rows) or rows[0] < 0 or rows[-1] >= total or (np.diff(rows) <= 0).any():
        raise UserError(f"the rows in {path} must ascend within 0..{total - 1}, at least one; make the list again.")
    return rows
