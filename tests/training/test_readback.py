"""Losses on their way to the log."""

from __future__ import annotations

import math

import pytest
import torch

from fastbd.base.errors import UserError
from fastbd.training.readback import NotFinite, Readback


def losses(value: float) -> dict:
    return {"loss": torch.tensor(value), "scale": torch.tensor(10 * value)}


def test_rows_come_back_with_the_means_since_the_last_one():
    readback = Readback(4)
    for value in (1.0, 2.0, 6.0):
        readback.add(losses(value))
    readback.send({"epoch": 1})
    readback.add(losses(7.0))
    assert list(readback.arrived()) == [{"epoch": 1, "step": 3, "steps": 3, "loss": 3.0, "scale": 30.0}]
    readback.send({"epoch": 2})
    assert list(readback.arrived(wait=True)) == [{"epoch": 2, "step": 4, "steps": 1, "loss": 7.0, "scale": 70.0}]
    assert list(readback.arrived()) == []


def test_the_ring_keeps_the_last_steps():
    readback = Readback(2)
    for value in (100.0, 2.0, 6.0):
        readback.add(losses(value))
    readback.send({})
    row = next(readback.arrived())
    assert (row["loss"], row["step"], row["steps"]) == (4.0, 3, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_step_that_is_not_finite_shows(bad):
    readback = Readback(4)
    for value in (1.0, bad, 2.0):
        readback.add(losses(value))
    readback.send({})
    assert not math.isfinite(next(readback.arrived())["loss"])


@pytest.mark.parametrize("room", [3, 4, 10])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite_is_named_with_its_losses(bad, room):
    """Steps 6 to 9 after 5; the seventh and the ninth are bad. Also where the ring has come round: step 6 is gone."""
    readback = Readback(room, start=5)
    for value in (1.0, bad, 3.0, bad):
        readback.add(losses(value) | {"scale": torch.tensor(2.0)})
    with pytest.raises(NotFinite, match=f"the loss is {bad} at step 7") as said:
        readback.check()
    assert said.value.step == 7 and str(said.value.losses) == str({"loss": bad, "scale": 2.0})
    readback.send({})
    readback.add(losses(1.0))
    rows = readback.arrived()
    assert next(rows)["step"] == 9  # the row comes first
    with pytest.raises(NotFinite) as said:
        next(rows)
    assert said.value.step == 7
    readback.check()  # what came after the send is finite


def test_a_mean_that_is_too_large_is_not_a_step_that_is_not_finite():
    readback = Readback(4)
    for value in (3e38, 3e38):
        readback.add({"loss": torch.tensor(value), "scale": torch.tensor(1.0)})
    readback.send({})
    assert next(readback.arrived())["loss"] == math.inf
    assert list(readback.arrived()) == []


def test_parts_are_told_apart_by_their_names():
    ring = Readback(4)
    ring.add({"loss": torch.tensor(3.0), "a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    ring.add({"loss": torch.tensor(3.0), "b": torch.tensor(2.0), "a": torch.tensor(1.0)})
    ring.send({})
    (row,) = ring.arrived(wait=True)
    assert (row["a"], row["b"]) == (1, 2)
    with pytest.raises(UserError, match="a step has the losses loss, a, and those before it loss, a, b"):
        ring.add({"loss": torch.tensor(3.0), "a": torch.tensor(1.0)})
