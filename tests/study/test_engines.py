"""Processes side by side: what one's end means for the others."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import fork_children, forked
from tables import table

from fastbd.base.errors import UserError
from fastbd.base.signals import Stopped, stoppable
from fastbd.study import engines
from fastbd.study.engines import ENGINES

pytestmark = pytest.mark.process


def fails_once(folder: Path, device: str) -> None:
    """The first to come ends with an error at once; the others say later that they have come to their end."""
    try:
        (folder / "first").mkdir()
    except FileExistsError:
        time.sleep(1)
        (folder / "ended").touch()
    else:
        raise KeyError("first")


@pytest.mark.parametrize("engine", table(["local", "ray"], "local"))
def test_the_error_of_one_is_told_when_the_others_have_ended(engine, tmp_path, monkeypatch):
    if engine == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # its processes import this file
    with pytest.raises(UserError, match="a process of the sweep has died: .*worker"):
        ENGINES[engine](partial(fails_once, tmp_path), tmp_path, 2, "cpu")
    assert (tmp_path / "ended").exists()
    assert any("KeyError: 'first'" in path.read_text() for path in tmp_path.glob("worker-*.log"))


@pytest.mark.parametrize("engine", table(["local", "ray"], "local"))
def test_a_signal_is_told_rather_than_an_error(engine, tmp_path, monkeypatch):
    if engine == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # its processes import this file

    def send() -> None:
        while not (tmp_path / "first").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    if engine == "local":
        fork_children(monkeypatch)
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Stopped):
        ENGINES[engine](partial(fails_once, tmp_path), tmp_path, 2, "cpu")


def mistaken(device: str) -> None:
    raise UserError("the study is damaged: mend it.")


def test_the_sentence_of_a_process_is_told_without_a_traceback(tmp_path, capfd, monkeypatch):
    fork_children(monkeypatch)
    with pytest.raises(UserError) as raised:
        ENGINES["local"](mistaken, tmp_path, 2, "cpu")
    log = tmp_path / "worker-0.log"
    assert str(raised.value) == (
        f"a process of the sweep has died: error: the study is damaged: mend it; see {log}; "
        f"resume with python -m fastbd sweep --out {tmp_path}"
    )
    assert log.read_text() == "error: the study is damaged: mend it.\n" and "Traceback" not in capfd.readouterr().err


def write_threads(folder: Path, device: str) -> None:
    (folder / str(os.getpid())).write_text(str(torch.get_num_threads()))


@pytest.mark.parametrize(("asked", "threads"), [(None, 3), ("2,1", 1)])
def test_cores_are_shared_out_unless_the_user_has_said_how_many(asked, threads, tmp_path, monkeypatch):
    """OMP_NUM_THREADS may be a list, which torch has read when it was loaded: here by this process, to one thread."""
    fork_children(monkeypatch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ENGINES["local"](partial(write_threads, tmp_path), tmp_path, 2, "cpu")
    finally:
        torch.set_num_threads(before)
    found = [path.read_text() for path in tmp_path.iterdir() if path.name.isdigit()]
    assert found == 2 * [str(threads)]


def test_how_a_process_ended_in_words(tmp_path):
    log = tmp_path / "worker-0.log"
    assert engines._why(1, log) == "exit code 1"
    log.write_text("a\nKeyError: 'x'\n")
    assert engines._why(1, log) == "KeyError: 'x'"
    assert engines._why(255, log) == "exit code 255"  # of one that said nothing of its end
    assert engines._why(-signal.SIGKILL, log) == "SIGKILL, most likely for want of memory"
    assert engines._why(-signal.SIGSEGV, log) == "SIGSEGV"


def test_a_log_for_which_there_is_no_room_ends_no_work():
    with open("/dev/full", "w", buffering=1) as usual, pytest.raises(OSError, match="No space"):
        try:
            print("a line", file=usual)
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), usual.fileno())  # so that it can be closed
    with engines._open_log(Path("/dev/full")) as log:
        print("a line", file=log)


def waits(folder: Path, device: str) -> None:
    """Says its process id, and when it was asked to stop."""
    (folder / f"{os.getpid()}.began").touch()
    try:
        with stoppable():
            time.sleep(600)
    except Stopped:
        (folder / f"{os.getpid()}.saved").touch()
        raise


def two_that_wait() -> None:
    with pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        ENGINES["local"](partial(waits, Path.cwd()), Path.cwd(), 2, "cpu")


def test_processes_end_with_the_first_one_that_is_killed(tmp_path):
    first = forked(two_that_wait, cwd=tmp_path)
    until = time.monotonic() + 60
    while len(began := list(tmp_path.glob("*.began"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    first.kill()
    first.join()
    while len(list(tmp_path.glob("*.saved"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert sorted(path.stem for path in tmp_path.glob("*.saved")) == sorted(path.stem for path in began)
