"""Processes that do the same work side by side: on this machine, or where Ray places them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shlex import quote
from types import ModuleType

import torch

from fastbd.base import signals, workers
from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.signals import Stopped

Work = Callable[[str], None]  # device -> None; it shares itself out, through a folder that all processes see
RESTARTS = 5  # of a process that dies, under Ray


def on_this_machine(work: Work, folder: Path, count: int, device: str) -> None:
    """`count` processes, or one for each GPU; this one where it is one. Each writes to a log in the folder.

    They end with this one: where it is killed, each is sent SIGTERM, as by a signal that this one would have passed on.
    Raises signals.Stopped after a signal, which reaches all, and UserError when one has died.
    """
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if device == "auto" else []
    count = count or max(1, len(gpus))
    if count == 1:
        return work(device)
    console.print(f"{count} processes; what they say is in {folder}/worker-*.log", markup=False)
    asked = "OMP_NUM_THREADS" in os.environ  # which torch has read, in all its forms
    threads = torch.get_num_threads() if asked else max(1, (os.cpu_count() or 1) // count)
    devices = gpus or [device]
    context = workers.forking()
    logs = [folder / f"worker-{k}.log" for k in range(count)]
    processes = [
        context.Process(target=_beside, args=(partial(work, devices[k % len(devices)]), logs[k], count, threads))
        for k in range(count)
    ]

    def pass_on() -> None:
        for process in processes:
            if process.pid and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    with _signals(pass_on) as caught:
        for process in processes:
            if not caught:
                process.start()
        for process in processes:
            if process.pid:
                process.join()
    for process, path in zip(processes, logs, strict=True):
        if process.exitcode:
            raise _died(f"{_why(process.exitcode, path)}; see {path}", folder)


def on_ray(work: Work, folder: Path, count: int, device: str) -> None:
    """`count` actors of Ray, or one for each GPU of its cluster; one that dies is started again.

    Actors, not a task for each run: what a process has compiled and decoded serves the next run too, and the runs are
    shared out already. RAY_ADDRESS names the cluster, whose machines must all have fastbd, and the folder and the data
    where they are here; without it Ray starts on this machine. Raises like on_this_machine.
    """
    ray = load_ray()
    with _joined(ray):
        there = ray.cluster_resources()
        kind = "GPU" if device == "auto" and there.get("GPU") else "CPU"
        count = count or (int(there["GPU"]) if kind == "GPU" else 1)
        if count > there.get(kind, 0):
            raise UserError(f"--processes {count} is more than Ray's {there.get(kind, 0):g} {kind}s: give fewer.")
        console.print(f"{count} processes of Ray; what they say is in {folder}/worker-*.log", markup=False)
        bell = ray.remote(num_cpus=0)(_Bell).remote()

        def worker(number: int, home: Path) -> None:
            os.chdir(home)
            threading.Thread(target=listen, daemon=True).start()
            _logged(partial(work, device), folder / f"worker-{number}.log")

        def listen() -> None:
            ray.get(bell.wait.remote())
            os.kill(os.getpid(), signal.SIGTERM)

        class Worker:
            def run(self, number: int, home: Path) -> None:
                worker(number, home)

        again = dict(max_restarts=RESTARTS, max_task_retries=RESTARTS)
        actor = ray.remote(num_cpus=1, num_gpus=int(kind == "GPU"), **again)(Worker)
        actors = [actor.remote() for _ in range(count)]  # Ray ends an actor whose handle is let go
        pending = [each.run.remote(k, Path.cwd()) for k, each in enumerate(actors)]
        errors = []
        with _signals(lambda: bell.ring.remote()):
            while pending:
                ended, pending = ray.wait(pending, timeout=1)  # and Python looks after signals in between
                for each in ended:
                    try:
                        ray.get(each)
                    except ray.exceptions.RayError as error:  # the others go on
                        errors.append(error)
    if errors:
        raise _died(f"{str(errors[0]).splitlines()[-1]}; see {folder / 'worker-*.log'}", folder)


def load_ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'fastbd[cluster]'.") from None
    return ray


@contextlib.contextmanager
def _joined(ray) -> Iterator[None]:
    """As a part of Ray's cluster; afterwards signals go where they went before, which Ray changes."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    listening = {which: signal.getsignal(which) for which in signals.STOPPING}
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="ERROR")
        yield
    except ConnectionError as error:
        raise UserError(f"{error}: see that it runs at RAY_ADDRESS, and with this machine's RAY_AUTH_MODE.") from None
    finally:
        ray.shutdown()
        for which, handler in listening.items():
            signal.signal(which, handler)


class _Bell:
    """Rings once, for all who wait for it: Ray's way to reach processes wherever they are."""

    def __init__(self):
        self.event = asyncio.Event()

    async def ring(self) -> None:
        self.event.set()

    async def wait(self) -> None:
        await self.event.wait()


@contextlib.contextmanager
def _signals(tell: Callable[[], None]) -> Iterator[list[int]]:
    """Signals that ask to stop are told, and kept in the list; at the end of the block they raise Stopped."""
    caught: list[int] = []

    def note(signum: int, before) -> None:
        caught.append(signum)
        tell()

    with signals.handled(note):
        yield caught
    if caught:
        raise Stopped(caught[0])


class _Log(io.FileIO):
    """A file of which a disk that is full, or away, gets less: what a process says ends no work."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def _open_log(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(_Log(path, "a")), encoding="utf-8", line_buffering=True)


def _beside(work: Callable[[], None], path: Path, count: int, threads: int) -> None:
    """Do the work in one of `count` processes on this machine; it ends with code 2 after a UserError."""
    signals.end_with_parent()
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(count))  # as from torchrun: cores and memory are shared out by it
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for what is loaded later; torch is already
    torch.set_num_threads(threads)
    try:
        _logged(work, path)
    except UserError:  # which the log tells
        sys.exit(2)


def _logged(work: Callable[[], None], path: Path) -> None:
    """What a process of several does; what it says goes to a log of its own."""
    for which in set(signals.STOPPING) - {signal.SIGTERM}:  # they reach all; the first process passes them on once
        signal.signal(which, signal.SIG_IGN)
    with _open_log(path) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        console.file = file
        try:
            work()
        except Stopped:
            pass
        except UserError as error:
            print(f"error: {error}")
            raise
        except Exception:
            traceback.print_exc()
            raise


def _why(exitcode: int, path: Path) -> str:
    """How a process ended, in words: the signal, or the last line that its log holds."""
    if exitcode < 0:
        memory = ", most likely for want of memory" if exitcode == -signal.SIGKILL else ""
        return f"{signal.Signals(-exitcode).name}{memory}"
    if exitcode in (1, 2):  # after an error, which the log tells
        with contextlib.suppress(OSError, IndexError):
            return path.read_text(errors="replace").splitlines()[-1].rstrip(".")
    return f"exit code {exitcode}"


def _died(how: str, folder: Path) -> UserError:
    return UserError(
        f"a process of the sweep has died: {how}; resume with python -m fastbd sweep --out {quote(str(folder))}"
    )


ENGINES = {"local": on_this_machine, "ray": on_ray}
