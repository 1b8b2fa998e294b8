from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import forked, run_command

from fastbd.base.signals import STOPPING, Stopped, handled, stoppable

TRAIN = (
    "pretrain",
    "--data",
    "train.beton",
    "--model",
    "tiny-rn",
    "--batch-size",
    24,
    "--epochs",
    40,
    "--device",
    "cpu",
    "--decode",
    "pil",
    "--log-every",
    1,
    "--save-every",
    0,
)
pytestmark = pytest.mark.process


@pytest.fixture
def caught():
    """What a handler of a test before has heard."""
    heard = []
    previous = {signum: signal.signal(signum, lambda signum, frame: heard.append(signum)) for signum in STOPPING}
    yield heard
    for signum, handler in previous.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", STOPPING)
def test_a_block_hears_of_signals_and_leaves_the_handlers_as_they_were(signum, caught):
    heard = []
    with handled(lambda signum, before: heard.append((signum, before))) as previous:
        signal.raise_signal(signum)
    assert heard == [(signum, previous[signum])] and not caught
    signal.raise_signal(signum)
    assert caught == [signum]


def test_what_is_ignored_is_not_heard(caught):
    """As SIGHUP under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard = []
    with handled(lambda signum, before: heard.append(signum)) as previous:
        signal.raise_signal(signal.SIGHUP)
    assert not heard and signal.SIGHUP not in previous and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_in_another_thread_none_is_heard(caught):
    """Where Python lets nobody handle them: a training in a thread of a notebook goes on without."""
    found = []

    def work() -> None:
        with handled(lambda signum, before: found.append(signum)) as previous:
            found.append(previous)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [{}]


def test_only_a_second_that_a_user_sends_is_heard_again(caught):
    """A terminal that is lost sends two: one by way of the shell."""
    heard = []
    with handled(lambda signum, before: heard.append(signum)):
        for signum in STOPPING * 2:
            signal.raise_signal(signum)
    assert heard == [*STOPPING, signal.SIGINT, signal.SIGTERM]


def on_terminal(name: str) -> int:
    """Train with this terminal as the one of the session."""
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for stream in range(3):
        os.dup2(terminal, stream)
    os.close(terminal)
    return run_command(*map(str, TRAIN), "--out", "lost")


def saved_step(run: Path) -> int:
    return torch.load(run / "ckpt_last.pt", weights_only=True)["step"]


def test_a_terminal_that_is_lost_costs_no_step(study):
    """Every write to it is an error from then on, and SIGHUP comes."""
    master, slave = pty.openpty()
    process, log = forked(on_terminal, os.ttyname(slave), cwd=study), study / "lost/log.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.01)
    os.close(slave)
    os.close(master)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP
    logged = [json.loads(line)["step"] for line in (study / "lost/log.jsonl").read_text().splitlines()]
    assert saved_step(study / "lost") == logged[-1] > 0


def test_ctrl_c_after_the_work_gives_no_traceback(tmp_path):
    """As while torch takes itself to pieces: here a library's last words wait for it."""
    code = (
        "import atexit, os, signal, sys; from fastbd import cli;"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); sys.exit(cli.program())"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_while_torch_loads_numpy_is_not_lost(tmp_path):
    """It was: torch takes any exception there for NumPy not being installed, and a training went on, or broke later."""
    (tmp_path / "ctrl_c.py").write_text(
        "import signal\nimport sys\nfrom importlib.abc import MetaPathFinder\n"
        "class CtrlC(MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'numpy._core':\n"
        "            sys.meta_path.remove(self)\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "from fastbd import cli\n"
        "sys.exit(cli.program())\n"
    )
    command = [sys.executable, "ctrl_c.py", "pretrain", "--data", "nowhere.beton"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (128 + signal.SIGINT, "stopped.\n", "")


def test_a_signal_within_a_destructor_is_answered_after_it():
    class Gone:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped), stoppable():
        Gone()
        time.sleep(30)
