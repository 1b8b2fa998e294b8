from __future__ import annotations

import threading

import pytest

from fastbd.base.background import Background
from fastbd.base.errors import UserError


def test_one_at_a_time_and_in_order():
    background, done, gate = Background(aside=True), [], threading.Event()
    background.start(lambda: (gate.wait(10), done.append(1)))
    assert not done  # start does not wait
    gate.set()
    background.start(lambda: done.append(2))
    background.wait()
    assert done == [1, 2]
    background.wait()


def test_an_error_comes_out_once():
    def fail():
        raise UserError("not finite")

    background = Background(aside=True)
    background.start(fail)
    with pytest.raises(UserError, match="not finite"):
        background.wait()
    background.wait()


def test_without_another_device_the_work_is_done_at_once():
    done = []
    Background(aside=False).start(lambda: done.append(threading.current_thread()))
    assert done == [threading.main_thread()]
