"""Work beside training: evaluations on another device, checkpoints that are written."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """start(work) runs it: at once, or `aside`, in a thread, whose error is raised by the next call. One at a time."""

    def __init__(self, aside: bool):
        self.aside = aside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        self.wait()
        if self.aside:
            self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
            self._thread.start()
        else:
            work()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until nothing runs."""
        if self._thread:
            self._thread.join()
        error, self._error = self._error, None
        if error:
            raise error
