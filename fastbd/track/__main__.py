"""The process that tells a tracker of a run: python -m fastbd.track NAME RUN. It ends when its stdin does.

It follows log.jsonl and metrics.jsonl, in which the training writes what there is to tell: so a tracker can neither
slow a training nor end it, and is told the rest when the training has been killed. What the library says goes to
RUN/tracking/NAME.log; what was told is kept in RUN/tracking/NAME.json, so that a resumed run tells nothing twice.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fastbd.base import files
from fastbd.base.errors import UserError
from fastbd.base.run_folder import read
from fastbd.base.signals import STOPPING
from fastbd.config.cards import load
from fastbd.track.process import state_of

POLL = 1.0  # seconds between looks for new rows
LAST = 600  # seconds for what is left, when the training has ended
SOURCES = {"train": "log.jsonl", "eval": "metrics.jsonl"}
"""Files of rows by what stands before the names of their numbers."""
REMEDY = "remove it, and a new tracked run is begun"


def main(name: str, folder: Path) -> int:
    """Tell the tracker of the run until stdin ends, and then the rest. Exit code 1 after an error, said in one line."""
    for signum in STOPPING:  # they reach all, and the training decides what becomes of them
        signal.signal(signum, signal.SIG_IGN)
    os.nice(10)  # where cores are few, the training comes first
    log, _ = state_of(folder, name)
    with files.locked(log):  # of a run that was just resumed another process may be telling the rest
        try:
            follow(name, folder, _ended)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            said = (str(error).strip().splitlines() or [""])[0]
            print(said if isinstance(error, UserError) else f"{type(error).__name__}: {said}", file=sys.stderr)
            return 1
    return 0


def _ended() -> bool:
    """Wait until it is time to look again; returns whether the training has ended, after which the time is limited."""
    ended = bool(select.select([sys.stdin], [], [], POLL)[0])
    if ended:
        signal.alarm(LAST)  # which ends this process
    return ended


def follow(name: str, folder: Path, ended: Callable[[], bool]) -> None:
    """Tell the tracker what was not told yet, and what comes, until ended() is true; then how the run has ended."""
    _, path = state_of(folder, name)
    kept = files.read_json(path, REMEDY) if path.exists() else {}
    tracker = load("tracker", name)(read(folder), kept)
    files.write_json(path, kept)
    tails = [Tail(kind, folder / file, kept) for kind, file in SOURCES.items()]
    over = False
    while not over:
        over = ended()
        new = [told for tail in tails for told in tail.new()]
        for kind, row in new:
            found = numbers(kind, row)
            if settings := _new_settings(found, kept):
                tracker.settings(settings)
            told = kept["settings"]
            tracker.add(row["step"], row["epoch"], {name: v for name, v in found.items() if told.get(name) != v})
        if new:
            tracker.flush()
            files.write_json(path, kept)
    result = folder / "result.json"
    tracker.end(files.read_json(result, REMEDY) if result.exists() else {})
    files.write_json(path, kept)


class Tail:
    """The rows of a .jsonl file that is being written, of which `kept` says what was told.

    It stays with the file that it has opened, whatever comes to have that name: another process that takes the run over
    writes another one.
    """

    def __init__(self, kind: str, path: Path, kept: dict[str, Any]):
        self._kind, self._path, self._kept = kind, path, kept
        self._file: BinaryIO | None = None
        self._at = self._evaluated = 0

    def new(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows that were not told yet, each after the name of what it tells of, and keep that they are."""
        for row in self._added():
            kind, told = self._kind, row["step"]
            if "checkpoint" in row:  # fastbd evaluate has added it, of any step
                self._evaluated += 1
                kind, told = f"evaluate/{row['set']}", self._evaluated
            key = kind.partition("/")[0]
            if told > self._kept.get(key, -1):
                self._kept[key] = told
                yield kind, row

    def _added(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that were added since they were asked for last."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = open(self._path, "rb")  # noqa: SIM115 - it stays open
        self._file.seek(self._at)
        lines, newline, _ = self._file.read().rpartition(b"\n")  # what is unfinished may be taken back
        self._at += len(lines + newline)
        yield from filter(None, map(files.json_object, lines.splitlines()))


def numbers(kind: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by names such as eval/asr; of several attacks eval/attack_1/asr, and so on, too."""
    found = {f"{kind}/{name}": value for name, value in row.items() if _is_number(value) and name not in PLACE}
    for number, attack in enumerate(row.get("attacks", ()), 1):
        found |= numbers(f"{kind}/attack_{number}", attack)
    return found


def _new_settings(found: Mapping[str, float], kept: dict[str, Any]) -> dict[str, float]:
    """Return the counts that were not told yet, and keep that they are: they stay as they are, and make no curve."""
    told = kept.setdefault("settings", {})
    new = {name: value for name, value in found.items() if name.rpartition("/")[2] in COUNTS and name not in told}
    told |= new
    return new


PLACE = ("step", "epoch")
COUNTS = ("n", "n_asr", "n_classes", "population", "captions", "val_batch")
"""Numbers that say on how many images, classes and so on the others were measured."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
