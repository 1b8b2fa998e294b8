"""Work that waits for the machine."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import time
import weakref

import pytest

from fastbd.base.console import console
from fastbd.base.errors import UserError
from fastbd.base.signals import Stopped
from fastbd.study import patience
from fastbd.study.patience import patiently


def full(path: str | None = None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The pauses so far, which take no time."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize(("outage", "at_most"), [(0.5, 1), (60, 63), (3600, 3900), (8 * 3600, 8 * 3600 + 300)])
def test_an_outage_is_outlasted_and_soon_noticed_to_have_ended(outage, at_most, clock, tmp_path):
    def action() -> str:
        if sum(clock) < outage:
            raise full()
        return "done"

    assert patiently(action, tmp_path) == "done"
    assert outage <= sum(clock) <= at_most


def test_a_limit_of_the_process_is_not_waited_for(clock, tmp_path):
    def action() -> None:
        raise OSError(errno.EFBIG, "File too large", "a.pt")

    with pytest.raises(UserError, match="^a.pt: File too large, by a limit of this process .* raise it, then resume"):
        patiently(action, tmp_path)
    assert clock == []


def test_at_last_it_says_how_to_resume(clock, tmp_path, capsys):
    def action() -> None:
        raise UserError("the checkpoint could not be written") from full("/data/ckpt.pt")

    said = "^/data/ckpt.pt: No space left on device, for 12.* h: resume with python -m fastbd sweep --out "
    with pytest.raises(UserError, match=f"{said}{tmp_path}$") as raised:
        patiently(action, tmp_path)
    assert raised.value.__context__ is None and patience.PATIENCE <= sum(clock) < patience.PATIENCE + 300
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "/data/ckpt.pt: No space left on device: nothing is lost; trying again in 1 s"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (full(), "FOLDER: No space"),
        (MemoryError(), "FOLDER met 'MemoryError'"),
        (MemoryError("Unable to allocate 9 GiB"), "FOLDER met 'Unable to"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "FOLDER met '[Errno 12] Cannot"),
        (RuntimeError("[enforce fail] can't allocate memory: 9 bytes\nstack"), "memory: 9 bytes': nothing"),
    ],
)
def test_the_sentence_names_what_is_short(error, said, clock, tmp_path, capsys):
    patiently(iter_of(error, None), tmp_path)
    assert said.replace("FOLDER", str(tmp_path)) in capsys.readouterr().out


def iter_of(*results):
    """An action that raises or gives these, one a call."""
    left = iter(results)

    def action():
        if isinstance(result := next(left), Exception):
            raise result
        return result

    return action


def test_other_errors_are_raised_at_once(clock, tmp_path):
    for error in (KeyError("x"), UserError("y"), RuntimeError("CUDA out of memory")):
        with pytest.raises(type(error)):
            patiently(iter_of(error), tmp_path)
    assert clock == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait(signum, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "FIRST", 600.0)
    threading.Timer(0.3, os.kill, (os.getpid(), signum)).start()
    with pytest.raises(Stopped):
        patiently(iter_of(full()), tmp_path)


def test_a_signal_that_comes_while_the_disk_is_full_is_no_outage(clock, tmp_path):
    """As where a training is stopped, and its last checkpoint cannot be written."""

    def action() -> None:
        try:
            raise Stopped(signal.SIGTERM)
        finally:
            try:
                raise full("run/ckpt_last.pt")
            except OSError as error:
                raise UserError("the checkpoint could not be written") from error

    with pytest.raises(Stopped) as stopped:
        patiently(action, tmp_path)
    assert stopped.value.exit_code == 143 and clock == []


def test_nothing_of_the_failed_try_is_held_meanwhile(tmp_path, monkeypatch):
    held = []

    class Big:
        pass

    def action() -> None:
        if not held:
            big = Big()
            held.append(weakref.ref(big))
            raise MemoryError

    def sleep(seconds: float) -> None:
        gc.collect()
        assert held[0]() is None

    monkeypatch.setattr(time, "sleep", sleep)
    patiently(action, tmp_path)
    assert held


def test_a_line_that_cannot_be_written_ends_no_wait(clock, tmp_path, monkeypatch):
    with open("/dev/full", "w", buffering=1) as nowhere:
        monkeypatch.setattr(console, "_file", nowhere)
        assert patiently(iter_of(full(), "done"), tmp_path) == "done"
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            nowhere.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), nowhere.fileno())  # so that it can be closed
