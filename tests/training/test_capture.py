"""Captures that fail, on a CPU: torch.cuda is stood in for by a device on which nothing runs during a capture."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from cleanings import cleaning, start
from steps import BOTH, EVERY, RATES, SHALLOW_RN, SHALLOW_VIT, batch_of, make_step

from fastbd.base.errors import UserError
from fastbd.base.run_folder import read
from fastbd.models import CLIP
from fastbd.models.batchnorm import share_statistics
from fastbd.models.clip import fresh
from fastbd.report import plots
from fastbd.training import capture, setup
from fastbd.training.capture import WARM, Captured
from fastbd.training.reuse import Kept


class Device:
    """A capture in it breaks off at a place, and its end then raises an error of its own."""

    def __init__(self, monkeypatch):
        self.guarded, self.tries, self.collects, self.told = lambda: (), 0, [], []
        stream = SimpleNamespace(wait_stream=lambda other: None, device_index=0)
        for name, standing_in in {
            "Stream": lambda device: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "graph_pool_handle": object,
            "CUDAGraph": object,
            "graph": lambda graph, **settings: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, standing_in)
        monkeypatch.setattr(capture, "_end", lambda *about: self.told.append(about))
        self.capturing = False

    def __enter__(self):
        self.tries += 1
        self.capturing = True
        self.collects.append(gc.isenabled())
        self.before = [(tensor, tensor.detach().clone()) for tensor in self.guarded()]

    def __exit__(self, kind, error, traceback):
        self.capturing = False
        for tensor, value in self.before:
            tensor.detach().copy_(value)
        raise RuntimeError(
            "CUDA error: operation failed due to a previous error during capture\nCUDA kernel errors ..."
        )

    def breaks(self, monkeypatch, thing, name: str) -> None:
        """At the end of this call, when all that it does has been noted down."""
        call = getattr(thing, name)

        def broken(*arguments, **settings):
            result = call(*arguments, **settings)
            if self.capturing:
                raise ValueError("operation not permitted\nmore about it")
            return result

        monkeypatch.setattr(thing, name, broken)


def state_of(step) -> list[torch.Tensor]:
    """All that a step writes and that lies where it lay."""
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    return [*step.model.state_dict().values(), *states, step.at, step.lr]


def two_runs(step, objective, parts: int) -> tuple[list[dict], list[torch.Tensor]]:
    """Five steps, and four of a run in the same memory with more room for captions: losses, and the last state."""
    losses = []
    for room, steps in ((512, 5), (1024, 4)):
        for seed in range(steps):
            batch = batch_of(2 if objective.ssl_weight else 1, seed, parts, room)
            losses.append({name: value.item() for name, value in step(batch).items()})
        if room == 512:
            step.restart(RATES)
    return losses, state_of(step)


def shared() -> CLIP:
    """A model whose batch norms share their statistics."""
    model = fresh(SHALLOW_RN, 0)
    share_statistics(model, 8)
    return model


@cache
def uncaptured(parts: int) -> tuple[list[dict], list[torch.Tensor]]:
    """What both runs give without a capture."""
    return two_runs(make_step(shared(), EVERY, parts=parts), EVERY, parts)


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


@pytest.mark.parametrize(
    ("place", "parts"), [("_loss", 1), ("_embed", 2), ("_average_own", 1), ("optimizer", 2), ("end", 1)]
)
def test_steps_after_a_failed_capture_are_the_uncaptured_ones(place, parts, device, monkeypatch, capsys):
    """To the bit, wherever it breaks off; it is tried and said once, in the next run in the same memory too."""
    plain = uncaptured(parts)
    step = make_step(shared(), EVERY, parts=parts, captured=True, falls_back=True)
    device.guarded = lambda: state_of(step)
    if place != "end":
        device.breaks(monkeypatch, *(step.optimizer, "step") if place == "optimizer" else (step, place))
    assert step.uncaptured is None
    losses, state = two_runs(step, EVERY, parts)
    assert losses == plain[0]
    assert all(torch.equal(mine, other) for mine, other in zip(state, plain[1], strict=True))
    assert device.tries == len(device.told) == 1 and not step.call.graphs
    reason = "RuntimeError: CUDA error: operation failed due to a previous error during capture"
    reason = reason if place == "end" else "ValueError: operation not permitted"
    assert step.uncaptured == reason
    said = f"the step could not be captured in a CUDA graph ({reason}): from here on it runs without one.\n"
    assert capsys.readouterr().out == said


def test_a_capture_that_has_to_be_and_fails_is_an_error(device, monkeypatch):
    step = make_step(fresh(SHALLOW_VIT, 0), BOTH, captured=True)
    device.breaks(monkeypatch, step, "_loss")
    for seed in range(WARM):
        step(batch_of(2, seed, room=512))
    said = r"could not be captured in a CUDA graph \(ValueError: operation not permitted\): give --graph auto, .*off\."
    with pytest.raises(UserError, match=said) as raised:
        step(batch_of(2, WARM, room=512))
    assert isinstance(raised.value.__cause__, ValueError) and len(device.told) == 1


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_in_a_capture(collects, device):
    """And all that there was has been, before it."""
    step = make_step(fresh(SHALLOW_VIT, 0), BOTH, captured=True, falls_back=True)
    collected = []
    gc.callbacks.append(lambda phase, about: collected.append((phase, device.tries, device.capturing)))
    try:
        gc.enable() if collects else gc.disable()
        for seed in range(WARM + 1):
            step(batch_of(2, seed, room=512))
        assert gc.isenabled() == collects
    finally:
        gc.enable()
        gc.callbacks.pop()
    assert device.collects == [False] and ("stop", 0, False) in collected
    assert not [about for about in collected if about[2]]


@pytest.mark.gpu
def test_a_gpu_is_as_before_after_a_capture_that_broke_off():
    """Memory that two streams have used is freed, the cache emptied, numbers are drawn, another step is captured."""
    gpu = torch.device("cuda", 0)
    total = torch.zeros((), device=gpu)

    def breaks(x: torch.Tensor) -> torch.Tensor:
        total.add_(x.sum())
        if torch.cuda.is_current_stream_capturing():
            total.item()  # waits for the device
        return total * 2

    def active() -> int:
        torch.cuda.synchronize()
        torch.ones(1, device=gpu)  # an allocation looks whether events have passed
        return torch.cuda.memory_stats()["active_bytes.all.current"]

    broken, whole = Captured(breaks, gpu, falls_back=True), Captured(lambda x: x * 2, gpu)
    assert [broken(torch.ones(4, device=gpu)).item() for _ in range(6)] == [8 * n for n in range(1, 7)]
    assert "captur" in broken.failure and not broken.graphs
    torch.cuda.empty_cache()
    assert len(torch.randn(3, device=gpu).unique()) == 3
    before = active()
    for _ in range(3):
        torch.ones(1 << 20, device=gpu).record_stream(torch.cuda.Stream())
    assert active() == before
    for n in range(WARM + 2):
        assert whole(torch.full((4,), n, device=gpu)).tolist() == 4 * [2 * n]
    assert len(whole.graphs) == 1


def test_a_sweeps_runs_say_and_record_it(device, study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(study)
    start(study)
    monkeypatch.setattr(setup, "is_captured", lambda choice, world: True)
    kept = Kept()
    capsys.readouterr()
    for seed in (0, 1):
        training = cleaning(tmp_path / str(seed), "--rows", 48, "--seed", seed, kept=kept)
        device.guarded = partial(state_of, training.opened.step)
        training.train()
    assert device.tries == 1
    assert capsys.readouterr().out.count("the step could not be captured in a CUDA graph (RuntimeError: CUDA") == 1
    first, second = (read(tmp_path / str(seed)) for seed in (0, 1))
    assert [row["step"] for row in first.log if "uncaptured" not in row] == list(range(1, WARM + 1))
    assert all(row["uncaptured"].startswith("RuntimeError: CUDA error: operation failed") for row in second.log)
    shown = {axes.get_title() for axes in plots.curves([first, second]).axes}
    assert not [title for title in shown if "captured" in title]
    insisting = cleaning(tmp_path / "on", "--rows", 48, "--graph", "on", kept=kept)
    device.guarded = partial(state_of, insisting.opened.step)
    with pytest.raises(UserError, match="could not be captured"):
        insisting.train()
