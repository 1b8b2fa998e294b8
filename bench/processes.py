"""What a process and those that it starts take: seconds, CPU seconds, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")  # a second
LOOK = 0.02, 0.25  # seconds between looks whether it is done, and at least between those at its memory
SHARE = 0.01  # of the time that these may take: the system goes through all pages, 0.05 s for a gigabyte


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock; CPU seconds, user and system, and the most bytes of memory, as they were looked at, of the
    process and of those that it starts; the exit code, None for a process that was not waited for."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int | None


def run(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], done: Callable[[], bool] = lambda: False
) -> Taken:
    """Run a command in a folder, its output in the file `output` there, until it ends or is `done`; then it is killed.

    What it takes is not asked of the system at the end: that would say the memory of this process if it is more, and
    nothing of processes that others have waited for.
    """
    with open(folder / "output", "w") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    peak, cpu, look, ended = 0, {}, began, False
    try:
        while not (ended or done()):
            if time.perf_counter() > look:
                at = time.perf_counter()
                seen = looked_at(process.pid)
                look = time.perf_counter() + max(LOOK[1], (time.perf_counter() - at) / SHARE)
                peak = max(peak, sum(memory for _, memory in seen.values()))
                cpu |= {pid: seconds for pid, (seconds, _) in seen.items()}
            time.sleep(LOOK[0])
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        seconds = time.perf_counter() - began
    finally:
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    cpu[process.pid] = usage.ru_utime + usage.ru_stime
    return Taken(seconds, sum(cpu.values()), peak, process.returncode if ended else None)


def looked_at(session: int) -> dict[int, tuple[float, int]]:
    """CPU seconds and bytes of memory of the processes of a session; pages that several share are shared out."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()  # behind the name, which may hold anything
            if int(fields[3]) == session:
                lines = (path / "smaps_rollup").read_text().splitlines()
                memory = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
                found[int(path.name)] = (int(fields[11]) + int(fields[12])) / TICKS, memory
        except (OSError, StopIteration):
            continue  # it has ended
    return found
