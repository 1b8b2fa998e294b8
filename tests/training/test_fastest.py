"""What --precision auto chooses on a CPU, and that measuring leaves no trace."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cleanings import WORLD
from torch import nn

from fastbd.config.flags import CleanConfig
from fastbd.models import create
from fastbd.models.precision import has_bf16, set_precision
from fastbd.training import fastest
from fastbd.training.setup import numerics_of


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"),
    [(1.0, 1.0, "fp32"), (1.14, 1.0, "fp32"), (1.15, 1.0, "bf16"), (3.0, 1.0, "bf16"), (1.0, 9.0, "fp32")],
)
def test_digits_are_given_up_for_speed_alone(fp32, bf16, chosen):
    seconds = {"fp32": fp32, "bf16": bf16}
    assert fastest.choice(seconds) == chosen
    assert fastest.sentence(seconds).startswith(f"{chosen}: bf16 is {fp32 / bf16:.2f} times as fast as fp32")


class Outside(nn.Sequential):
    """A tower with what code from outside may have: chance, and a batch norm of PyTorch's."""

    def __init__(self, tower: nn.Module):
        super().__init__(nn.BatchNorm2d(3), nn.Dropout(0.1), tower)


@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_measuring_leaves_no_trace(name):
    model = create(name, 0)
    model.visual = Outside(model.visual)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)

    def trace() -> list[torch.Tensor]:
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        return [x.clone() for x in (*model.state_dict().values(), *gradients, torch.get_rng_state())]

    before = trace()
    seconds = fastest.measure(model, 6)
    after = trace()
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    assert min(seconds.values()) > 0
    if not has_bf16():
        assert fastest.choice(seconds) == "fp32"


@pytest.mark.parametrize("named", ["fp32", "tf32", "bf16"])
def test_what_is_named_is_taken(named):
    config = CleanConfig(run=Path("run"), precision=named, device="cpu")
    try:
        assert numerics_of(config, WORLD, lambda: pytest.fail("it was asked for another")).precision == named
    finally:
        set_precision("fp32", WORLD.device)


def test_those_who_ask_at_once_measure_once(tmp_path):
    """Threads here; each opens the file that is locked for itself, as processes do."""
    made = []

    def measured() -> dict[str, float]:
        made.append(float(len(made)))
        time.sleep(0.05)
        return {"fp32": made[-1], "bf16": 1.0}

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fastest.shared(tmp_path, "a", measured), range(4)))
    assert made == [0.0] and found == [{"fp32": 0.0, "bf16": 1.0}] * 4
    assert fastest.shared(tmp_path, "b", measured) == {"fp32": 1.0, "bf16": 1.0}
    assert set(json.loads((tmp_path / fastest.FILE).read_text())) == {"a", "b"}
