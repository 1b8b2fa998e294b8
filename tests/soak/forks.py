"""A process that has imported all of fastbd and forks for each command line: what starts so takes no time to start."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 120.0  # seconds until what has not ended counts as hung
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SUBREAPER = 36  # prctl: the children of children that have ended become ours


@dataclass(frozen=True)
class Ended:
    """How a command line ended; `code` is -N after signal N, as in subprocess."""

    code: int
    seconds: float
    struck: bool
    """It was still there when its signal was sent."""
    hung: bool
    left: bool
    """Processes that it had started did not end with it."""
    stderr: str


class Forks:
    """Runs command lines of fastbd, each in a process of its own on one thread."""

    def __init__(self, log: Path):
        self._stderr = log.with_name(log.name + ".stderr")
        with open(log, "w") as output:
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=os.environ | ONE_THREAD,
            )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error) -> None:
        self._server.stdin.close()
        self._server.wait()

    def run(
        self,
        argv: list[str],
        cwd: Path,
        after: float | None = None,
        signum: int = 0,
        group: bool = False,
        limit: tuple[int, float | None] | None = None,
    ) -> Ended:
        """Run a command line in the folder; send it a signal `after` seconds, also to its workers where `group`.

        `limit`: (bytes beyond which no file of it gets, seconds until that ends or None).
        """
        job = {"argv": argv, "cwd": str(cwd), "stderr": str(self._stderr), "after": after, "signum": signum}
        print(json.dumps(job | {"group": group, "limit": limit}), file=self._server.stdin, flush=True)
        if not (line := self._server.stdout.readline()):
            raise RuntimeError("the forking process has died")
        return Ended(**json.loads(line), stderr=self._stderr.read_text(errors="replace"))


def serve() -> None:
    """Do the jobs that come in by stdin."""
    _import_all()
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.monotonic()
        pid = os.fork()
        if not pid:
            _child(job)
        ended = _ended(pid, job)
        print(json.dumps({**ended, "seconds": time.monotonic() - began, "left": _left(pid)}), flush=True)


def _import_all() -> None:
    """Import what any verb does, and let short runs do what long ones do."""
    import torch

    from fastbd import cli
    from fastbd.training import roofline

    late = (
        "tyro",
        "torch._dynamo",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
    )
    for name in (*late, *(f"fastbd.commands.{verb}" for verb in cli.VERBS)):
        importlib.import_module(name)
    sys.modules["fastbd.commands.build"].SAVE_EVERY = 0.02  # else no short build had anything to resume from
    roofline.SIDES["cpu"], roofline.COPIED["cpu"] = (64,), 1 << 16  # how fast the machine is does not matter here
    torch.set_num_threads(1)
    gc.freeze()  # else each child copies all of it, to look for garbage


def _child(job: dict) -> None:
    """Be the command line `python -m fastbd ...`; never returns."""
    os.setsid()
    os.chdir(job["cwd"])
    for path, number in ((os.devnull, 0), (os.devnull, 1), (job["stderr"], 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    if job["limit"]:
        _limit(*job["limit"])
    from fastbd import cli

    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv[1:] = job["argv"]
        code = cli.program()
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt:  # before or after main, where the interpreter would be starting or ending
        code = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)  # taking torch to pieces would take seconds


def _limit(size: int, seconds: float | None) -> None:
    """Let no file grow beyond `size` bytes, as on a disk that is full, for `seconds` where given."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    if seconds is not None:
        end = threading.Timer(seconds, resource.setrlimit, (resource.RLIMIT_FSIZE, (hard, hard)))
        end.daemon = True
        end.start()


def _ended(pid: int, job: dict) -> dict:
    """Send the signal when its time has come, and wait for the end."""
    struck = False
    if job["after"] is not None:
        time.sleep(job["after"])
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return {"code": os.waitstatus_to_exitcode(status), "struck": False, "hung": False}
        struck = True
        with contextlib.suppress(ProcessLookupError):  # its first moments: it has no group of its own yet
            (os.killpg if job["group"] else os.kill)(pid, job["signum"])
    status = _wait(pid)
    return {"code": -signal.SIGKILL if status is None else status, "struck": struck, "hung": status is None}


def _wait(pid: int) -> int | None:
    """The exit code; None where it did not end, and was killed."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _left(group: int) -> bool:
    """Whether processes of the group are still there after some seconds; they are killed then."""
    until, left = time.monotonic() + 20, False
    with contextlib.suppress(ChildProcessError):  # none is left
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if time.monotonic() > until:
                os.killpg(group, signal.SIGKILL)
                left = True
                until += 60
            time.sleep(0.002)
    return left


if __name__ == "__main__":
    serve()
