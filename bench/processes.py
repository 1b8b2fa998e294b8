"""What a process and those that it starts take: seconds, CPU seconds, memory."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
LOOK = 0.02, 0.25  # seconds between looks whether it is done, and at least between those at its memory
SHARE = 0.01  # of the time that these may take: the system goes through all pages, 0.05 s for a gigabyte


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock; CPU seconds, user and system, of the process and of those that it starts; the most bytes of
    their memory, as it was looked at; the exit code, None for a process that was not waited for."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int | None


def run(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], done: Callable[[], bool] = lambda: False
) -> Taken:
    """Run a command in a folder, its output in the file `output` there, until it ends or is `done`; then it is killed.

    The memory is not asked of the system at the end: that would say this process's if it is more.
    """
    adopt()
    with open(folder / "output", "w") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    peak, look, ended = 0, began, False
    try:
        while not (ended or done()):
            if time.perf_counter() > look:
                at = time.thread_time()
                peak = max(peak, memory_of(process.pid))
                look = time.perf_counter() + max(LOOK[1], (time.thread_time() - at) / SHARE)
            time.sleep(LOOK[0])
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        seconds = time.perf_counter() - began
        peak = max(peak, memory_of(process.pid))
    finally:
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime + waited_for(process.pid)
    return Taken(seconds, cpu, peak, process.returncode if ended else None)


def adopt() -> None:
    """Become the parent of processes whose own ends, as by then the server that others are forked from may live."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def waited_for(session: int) -> float:
    """Kill what is left of a session; return the CPU seconds of all that it was, and of what they have waited for."""
    seconds = 0.0
    while found := members(session):
        for pid in found:
            with suppress(ProcessLookupError, ChildProcessError):  # its parent, who waits for it, has not ended yet
                os.kill(pid, signal.SIGKILL)
                _, _, usage = os.wait4(pid, 0)
                seconds += usage.ru_utime + usage.ru_stime
    return seconds


def members(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            if int(path.read_text().rpartition(")")[2].split()[3]) == session:  # behind the name, which may hold any
                found.append(int(path.parent.name))
    return found


def memory_of(session: int) -> int:
    """Bytes of memory of the processes of a session; pages that several share are shared out."""
    total = 0
    for pid in members(session):
        with suppress(OSError):  # it has ended
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total
