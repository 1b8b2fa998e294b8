"""Losses on their way to the log."""

from __future__ import annotations

import math

import pytest
import torch

from fastbd.readback import Readback


def losses(value: float) -> dict:
    return {"loss": torch.tensor(value), "scale": torch.tensor(10 * value)}


def test_rows_come_back_with_the_means_since_the_last_one():
    readback = Readback(4)
    for value in (1.0, 2.0, 6.0):
        readback.add(losses(value))
    readback.send({"step": 3})
    readback.add(losses(7.0))
    assert list(readback.arrived()) == [{"step": 3, "loss": 3.0, "scale": 30.0}]
    readback.send({"step": 4})
    assert list(readback.arrived(wait=True)) == [{"step": 4, "loss": 7.0, "scale": 70.0}]
    assert list(readback.arrived()) == []


def test_the_ring_keeps_the_last_steps():
    readback = Readback(2)
    for value in (100.0, 2.0, 6.0):
        readback.add(losses(value))
    readback.send({})
    assert next(readback.arrived())["loss"] == 4.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_step_that_is_not_finite_shows(bad):
    readback = Readback(4)
    for value in (1.0, bad, 2.0):
        readback.add(losses(value))
    readback.send({})
    assert not math.isfinite(next(readback.arrived())["loss"])
