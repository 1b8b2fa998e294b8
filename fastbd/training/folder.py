"""The folder of a run: made, locked while it is trained, saved to, rewound and ended."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from fastbd.base import files
from fastbd.base.background import Background
from fastbd.base.console import console
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation, RecordedEvaluation
from fastbd.base.run_folder import read, read_metrics, study_folder_of
from fastbd.training import checkpoint, divergence
from fastbd.training.task import Config


def check_place(config: Config) -> None:
    """Raise a UserError where the run's folder could not be made, or is not to be resumed by this command."""
    if not config.resume:
        files.check_out(config.out or Path("runs"))
        return
    if study := study_folder_of(config.resume):  # two would train it: a claim is the judge there
        raise UserError(
            f"{config.resume} is part of the study in {study}: go on with python -m fastbd sweep "
            f"--out {quote(str(study))}, or copy the run to another place."
        )
    files.check_out(config.resume, "--resume", instead="copy the run to where that is possible")


class RunFolder:
    """The folder of a run, to which only its main process writes.

    `guard` is called before anything is written; it is the judge of whose the run is, where it is given, and else the
    folder's lock, until release().
    """

    def __init__(self, world: World, guard: Callable[[], None] | None = None):
        self._world, self._locks, self.guard = world, guard is None, guard or (lambda: None)
        self.path = Path()
        self._lock: TextIO | None = None
        self._writer = Background(aside=True)

    @property
    def exists(self) -> bool:
        """Whether it is there: made, or taken to be resumed."""
        return self.path != Path() and self.path.is_dir()

    def resume(self, path: Path) -> None:
        """Take a folder that is there. UserError on all ranks where another process trains the run."""
        self.path = path
        self._world.main_first(partial(self._hold, path, self._locks))

    def make(self, path: Path, write: Callable[[Path], None], about: Mapping[str, Any], state: dict) -> None:
        """Make the folder with what write(folder) puts there, config.json and a checkpoint of step 0.

        All at once, so that there is no run folder which --resume could not go on from.
        """
        self.path = path
        self._world.barrier()  # every rank has looked before one makes it
        if self._world.main:
            with _new_folder(path) as new:
                write(new)
                checkpoint.save(checkpoint.path_of(new, "last"), state)
                files.write_json(new / "config.json", dict(about))
                self._hold(new, alone=True)

    def _hold(self, path: Path, alone: bool) -> None:
        """Keep others from resuming the run while this process trains it."""
        if self._world.main:
            self._lock = files.lock(path)
            if alone and self._lock is None:
                raise UserError(f"{path} is being trained by {files.holder(path)}: wait for it to end, or stop it.")

    def release(self) -> None:
        """Let others resume the run."""
        if self._lock:
            self._lock.close()

    def rewind(self, resumed_from: Path, step: int) -> None:
        """Drop what was written after the checkpoint, of `step`: those steps come again. It becomes the last one."""
        if not self._world.main:
            return
        for name in ("log.jsonl", "metrics.jsonl"):
            files.rewind(self.path / name, step)
        for made_again in (divergence.FILE, "result.json"):
            files.discard(self.path / made_again)
        last = checkpoint.path_of(self.path, "last")
        if resumed_from != last:  # nothing may be left to be done that would write it
            with files.replacing(last) as temporary:
                shutil.copyfile(resumed_from, temporary)

    def tell_of_lost_rows(self, step: int, every: int) -> None:
        """Say how many rows of log.jsonl are missing up to a step, as after a loss of power."""
        path = self.path / "log.jsonl"
        there = {row["step"] for row in read(self.path).log}
        lost = [missing for missing in range(every, step + 1, every) if missing not in there]
        if lost and self._world.main:
            said = f"{path} has lost {len(lost):,} rows, the first of step {lost[0]:,}: the run goes on without them"
            console.print(said, markup=False)

    def evaluations(self) -> tuple[RecordedEvaluation, ...]:
        """Return the rows of metrics.jsonl that the run itself has added, in order of steps."""
        return read_metrics(self.path)

    def add_evaluation(self, row: Evaluation) -> None:
        """Add a row to metrics.jsonl."""
        self.guard()
        files.append(self.path / "metrics.jsonl", dict(row))

    def add_losses(self, row: dict) -> None:
        """Add a row to log.jsonl."""
        files.append(self.path / "log.jsonl", row)

    def save(self, names: Sequence[str], state: dict) -> None:
        """Write checkpoints of these names, last or the number of an epoch, while training goes on."""
        self.guard()
        self._writer.wait()  # there is memory for one snapshot
        self._writer.start(partial(self._write, names, checkpoint.Snapshot(state)))

    def _write(self, names: Sequence[str], snapshot: checkpoint.Snapshot) -> None:
        state = snapshot.wait()
        for told in ("log.jsonl", "metrics.jsonl"):  # on the disk before it: what it is past is not told again
            if (path := self.path / told).exists():
                files.sync(path)
        for name in names:  # the last one last: what it is past is not done again
            checkpoint.save(checkpoint.path_of(self.path, name), state)

    def wait(self) -> None:
        """Wait until the checkpoints that were begun are written."""
        self._writer.wait()

    def end(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which says that nothing is left to be done here."""
        self.guard()
        files.write_json(self.path / "result.json", dict(result))


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield files.new_folder(folder), without what killed runs left of it. UserError where another has the name."""
    files.remove_unfinished(folder)
    try:
        with files.new_folder(folder) as new:
            yield new
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"another run has just made {folder}: choose another --out, or run this again.") from None


def free_folder(path: Path) -> Path:
    """Return `path`, or path-2, path-3, ... when it is taken."""
    candidates = (path if k == 1 else path.with_name(f"{path.name}-{k}") for k in range(1, 10_000))
    return next(p for p in candidates if not p.exists())
