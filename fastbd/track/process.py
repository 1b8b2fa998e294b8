"""The processes that tell trackers of a run, beside its training."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastbd.base.console import console

WAIT = 60.0  # seconds that the end of a training waits for its trackers


def state_of(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the paths, in the run's folder, of a tracker's log and of what is kept of it."""
    return folder / "tracking" / f"{name}.log", folder / "tracking" / f"{name}.json"


@contextmanager
def tracked(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Let trackers of these names tell of the run within the block, and the rest when it has ended.

    What goes wrong with one of them is said once, and is no error.
    """
    followers = [Follower(folder, name) for name in dict.fromkeys(names)]
    try:
        yield
    finally:
        for follower in followers:
            follower.end()
        deadline = time.monotonic() + WAIT
        for follower in followers:
            follower.wait(deadline)


class Follower:
    """A process that tells one tracker of a run."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._log, _ = state_of(folder, name)
        self._process: subprocess.Popen | None = None
        try:
            self._log.parent.mkdir(exist_ok=True)
            self._process = self._started()
        except OSError as error:
            self._say(str(error))
            return
        self._watcher = threading.Thread(target=self._watch, args=(self._process,), daemon=True)
        self._watcher.start()

    def _started(self) -> subprocess.Popen:
        # It imports from where this process does, not first from the working folder.
        env = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "fastbd.track", self._name, str(self._folder)]
        with open(self._log, "ab") as log:
            # In a session of its own: Ctrl-C is not for it, nor for the processes that libraries start.
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
            )

    def _watch(self, process: subprocess.Popen) -> None:
        code = process.wait()
        if code:
            lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
            why = lines[-1] if code > 0 and lines else f"its process has ended with {code}"
            self._say(f"{why}; see {self._log}")

    def _say(self, why: str) -> None:
        console.print(f"{self._folder} goes on without --track {self._name}: {why}", markup=False)

    def end(self) -> None:
        """Let it know that the training has ended."""
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        """Wait until it has told the rest, or until the deadline, of time.monotonic()."""
        if self._process is None:
            return
        self._watcher.join(max(0.0, deadline - time.monotonic()))
        if self._watcher.is_alive():
            which = f"--track {self._name}: process {self._process.pid}"
            console.print(f"{which} still tells of {self._folder}, and ends by itself", markup=False)
