"""What a process and those that it starts take: seconds, CPU seconds, resident memory."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
LOOK = 0.02, 0.25  # seconds between looks whether it is done, and between those at its memory


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock, and of the CPU, user and system; the most resident bytes, as they were looked at; the exit
    code, None for a process that was not waited for."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int | None


def run(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], done: Callable[[], bool] = lambda: False
) -> Taken:
    """Run a command in a folder, its output in the file `output` there, until it ends or is `done`; then it is killed.

    Its memory is not asked of the system at the end, which would say that of this process if it is more.
    """
    with open(folder / "output", "w") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    peak, look, ended = 0, began, False
    try:
        while not (ended or done()):
            if time.perf_counter() > look:
                peak, look = max(peak, resident_bytes(process.pid)), look + LOOK[1]
            time.sleep(LOOK[0])
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        seconds = time.perf_counter() - began
    finally:
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Taken(seconds, usage.ru_utime + usage.ru_stime, peak, process.returncode if ended else None)


def resident_bytes(session: int) -> int:
    """Resident memory of all processes of a session; pages that two of them share count twice."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # behind the name, which may hold anything
        except OSError:
            continue  # it has ended
        if int(fields[3]) == session:
            total += int(fields[21]) * PAGE
    return total
