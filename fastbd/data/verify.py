"""Whether the rows of a data set are as they were written, by their checksums."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import numpy as np

from fastbd.base.console import progress
from fastbd.base.errors import UserError
from fastbd.data.beton import Beton
from fastbd.data.shards import Shards

CHUNK = 256  # rows between two moves of the progress bar


def damaged_rows(data: Beton | Shards, rows: np.ndarray, quiet: bool = False) -> np.ndarray:
    """Return those of the rows, int64 [N], whose bytes are not those that were written; the data has checksums."""
    whole = np.ones(len(rows), bool)
    with progress("verifying", len(rows), quiet=quiet) as advance:
        for start in range(0, len(rows), CHUNK):
            some = slice(start, start + CHUNK)
            whole[some] = data.is_whole(rows[some])
            advance(len(rows[some]))
    return rows[~whole]


def check_whole(data: Beton | Shards, rows: np.ndarray | None = None, quiet: bool = False) -> None:
    """Raise a UserError where one of the rows, int64 [N] [all], is damaged, or nobody can tell."""
    if not data.has_checksums:
        raise UserError(f"{data.path} holds no checksums to verify it by: build it again, or leave --verify out.")
    rows = np.arange(len(data)) if rows is None else rows
    if len(damaged := damaged_rows(data, rows, quiet)):
        raise UserError(said_of(data, damaged, len(rows)))


def said_of(data: Beton | Shards, damaged: np.ndarray, looked_at: int, whole: Path | None = None) -> str:
    """Return a sentence about the damaged rows and what to do; `whole` lists the others, where that is written."""
    listed = (
        whole or f"and the list that 'python -m fastbd doctor --data {quote(str(data.path))} --out whole.rows' writes"
    )
    return (
        f"{len(damaged):,} of {looked_at:,} rows of {data.path} are damaged, the first is "
        f"{data.whereabouts(int(damaged[0]))}: build it again, or leave them out with --rows-file {listed}."
    )
