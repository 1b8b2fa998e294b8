"""What a long job has finished, in a file that survives a kill or a loss of power."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Journal:
    """Lines of JSON, the first of which names the job.

    `entries`: what earlier runs of the same `job` appended, and this one; `stale`: there was one of another job.
    """

    def __init__(self, path: Path, job: str):
        self.path, self._job = path, job
        lines, self._end = _whole_lines(path)
        ours = lines[:1] == [{"job": job}]
        self.entries = lines[1:] if ours else []
        self.stale = bool(lines) and not ours

    def append(self, entry: dict) -> None:
        """The entry is on the disk when this returns."""
        lines = [entry] if self.entries else [{"job": self._job}, entry]
        with self.path.open("r+b" if self.entries else "wb") as file:
            file.seek(self._end if self.entries else 0)
            file.truncate()  # what a kill has torn
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            self._end = file.tell()
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def clear(self) -> None:
        """Forget all, also another job's."""
        self.entries.clear()
        self.path.unlink(missing_ok=True)


def _whole_lines(path: Path) -> tuple[list, int]:
    """(the lines before the first that is torn, where they end)."""
    lines, end = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            del lines[-1]
            break
        end += len(line)
    return lines, end
