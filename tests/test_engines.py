"""Processes side by side: what one's end means for the others."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from fastbd.engines import ENGINES
from fastbd.errors import UserError
from fastbd.signals import Stopped


def fails_once(folder: Path, device: str) -> None:
    """The first to come ends with an error at once; the others say later that they have come to their end."""
    try:
        (folder / "first").mkdir()
    except FileExistsError:
        time.sleep(3)
        (folder / "ended").touch()
    else:
        raise KeyError("first")


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_error_of_one_is_told_when_the_others_have_ended(engine, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    with pytest.raises(UserError, match="a process of the sweep has died: .*worker"):
        ENGINES[engine](partial(fails_once, tmp_path), tmp_path, 2, "cpu")
    assert (tmp_path / "ended").exists()
    assert any("KeyError: 'first'" in path.read_text() for path in tmp_path.glob("worker-*.log"))


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_signal_is_told_rather_than_an_error(engine, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")

    def send() -> None:
        while not (tmp_path / "first").exists():
            time.sleep(0.05)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Stopped):
        ENGINES[engine](partial(fails_once, tmp_path), tmp_path, 2, "cpu")
