"""Lines of text files, numbered and of bounded length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastbd.base.errors import UserError

LINE_LIMIT = 1_000_000
"""Bytes of the longest line that is read."""
TOO_LONG = f"line too long: more than {LINE_LIMIT:,} bytes"


def numbered_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    r"""(number from 1, text) of each line, which ends in \n; None for the text of one that is longer than LINE_LIMIT.

    A byte order mark is dropped. Raises UserError for a file that is not UTF-8.
    """
    number, inside = 0, False  # inside: of a long line
    with path.open("rb") as file:
        for piece in iter(partial(file.readline, LINE_LIMIT), b""):
            whole = len(piece) < LINE_LIMIT or piece.endswith(b"\n")
            if not inside:
                number += 1
                try:
                    text = piece.decode() if whole else None
                except UnicodeDecodeError as error:
                    what = f"line {number}: {error.reason}, byte {piece[error.start]:#x}"
                    raise UserError(f"{path} is not UTF-8 text ({what}): save it as UTF-8.") from None
                yield number, text.removeprefix("\ufeff") if text and number == 1 else text
            inside = not whole
