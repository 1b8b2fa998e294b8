import signal
from types import SimpleNamespace

import pytest
import torch

from fastbd.dist import World
from fastbd.loop import Stopped, Timetable, every, train

WORLD = World(0, 1, torch.device("cpu"))


def test_every_marks_the_ends_of_parts_and_the_end():
    assert every(1, 10, 30) == {10, 20, 30}
    assert every(1 / 3, 10, 20) == {3, 7, 10, 13, 17, 20}
    assert every(0, 10, 30) == {30}
    assert every(5, 10, 30) == {30}


def run(step, start=0, total=10):
    """Train on numbered batches, five an epoch; returns what was called, in order."""
    calls = []

    def batches(epoch, offset):
        calls.append(("epoch", epoch, offset))
        return [SimpleNamespace(ids=[epoch * 5 + i]) for i in range(offset, 5)]

    train(
        step,
        batches,
        Timetable(5, total, {5, 10}, {4, 10}, 3),
        start=start,
        label="test",
        world=WORLD,
        evaluate=lambda at: calls.append(("evaluate", at)),
        save=lambda at: calls.append(("save", at)),
        record=lambda row: calls.append(("record", row["step"])),
    )
    return calls


def test_the_loop_calls_its_parts_when_the_timetable_says():
    seen = []
    calls = run(lambda batch, at: seen.append((batch.ids[0], at)) or {"loss": torch.tensor(1.0)}, start=2)
    assert seen == [(i, i) for i in range(2, 10)]
    assert calls == [
        ("epoch", 0, 2), ("record", 3), ("save", 4), ("evaluate", 5), ("epoch", 1, 0), ("record", 6), ("record", 9),
        ("record", 10), ("evaluate", 10), ("save", 10),
    ]  # fmt: skip


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_gives_the_handlers_back(signum):
    before = signal.getsignal(signum)
    saved = []

    def step(batch, at):
        if at == 6:
            signal.raise_signal(signum)
        return {"loss": torch.tensor(1.0)}

    with pytest.raises(Stopped) as stopped:
        train(
            step, lambda epoch, offset: [SimpleNamespace(ids=[0])] * 5, Timetable(5, 10, set(), {10}, 3),
            start=0, label="", world=WORLD, evaluate=lambda at: None, save=saved.append, record=lambda row: None,
        )  # fmt: skip
    assert stopped.value.exit_code == 128 + signum
    assert saved == [7]
    assert signal.getsignal(signum) is before
