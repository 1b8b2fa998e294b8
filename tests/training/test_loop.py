from __future__ import annotations

import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbd.base.dist import World
from fastbd.base.errors import Diverged
from fastbd.base.signals import STOPPING, Stopped
from fastbd.data.loader import Batch
from fastbd.training.loop import Enough, train
from fastbd.training.readback import NotFinite
from fastbd.training.timetable import Timetable

ONE = World(0, 1, torch.device("cpu"))


class Diary:
    """A toy training of 2 epochs of 4 steps, 3 pairs each; the sample ids are 10 * epoch + place in the epoch."""

    def __init__(self, stop_at: int | None = None, signum: int = signal.SIGTERM):
        self.entries, self.rows, self.stop_at, self.signum = [], [], stop_at, signum

    def step(self, batch):
        at = self.at
        self.at += 1
        self.entries.append(("step", at, int(batch.ids[0])))
        if at == self.stop_at:
            signal.raise_signal(self.signum)
        return {"loss": torch.tensor(at / 2), "scale": torch.tensor(1.0)}

    def batches(self, epoch, offset):
        return [Batch(np.full(3, 10 * epoch + i), (), ()) for i in range(offset, 4)]

    def evaluate(self, at):
        self.entries.append(("evaluate", at))

    def train(self, start=0, evaluate_at=(8,), save_at=(4, 8), log_every=3):
        self.at = start
        table = Timetable(4, 8, evaluate_at, save_at, log_every)
        train(
            self.step,
            self.batches,
            table,
            start=start,
            label="toy",
            pairs_limit=1e9,
            world=ONE,
            evaluate=self.evaluate,
            save=lambda at: self.entries.append(("save", at)),
            record=self.rows.append,
        )
        return self.entries


def test_steps_evaluations_and_checkpoints_follow_the_timetable():
    diary = Diary()
    assert diary.train(evaluate_at={2, 4, 8}) == [
        ("step", 0, 0),
        ("step", 1, 1),
        ("evaluate", 2),
        ("step", 2, 2),
        ("step", 3, 3),
        ("save", 4),
        ("evaluate", 4),
        ("step", 4, 10),
        ("step", 5, 11),
        ("step", 6, 12),
        ("step", 7, 13),
        ("save", 8),
        ("evaluate", 8),
    ]
    # Lines at each third step and at the end, with the mean loss since the last one; that of step k is (k - 1) / 2.
    assert [(r["step"], r["epoch"], r["loss"]) for r in diary.rows] == [(3, 0.75, 0.5), (6, 1.5, 2), (8, 2, 3.25)]
    assert [r["steps"] for r in diary.rows] == [3, 3, 2]
    assert all(r["of_limit"] == r["pairs_per_s"] / 1e9 > 0 and 0 <= r["data_wait"] <= 1 for r in diary.rows)


def test_it_starts_in_the_middle_of_an_epoch():
    assert Diary().train(start=6) == [("step", 6, 12), ("step", 7, 13), ("save", 8), ("evaluate", 8)]
    assert Diary().train(start=8) == []


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_a_signal_lets_the_step_end_saves_and_stops(signum, code):
    handlers = [signal.getsignal(s) for s in STOPPING]
    diary = Diary(stop_at=5, signum=signum)
    with pytest.raises(Stopped) as stopped:
        diary.train()
    assert stopped.value.exit_code == code
    assert diary.entries[-2:] == [("step", 5, 11), ("save", 6)]
    assert [signal.getsignal(s) for s in STOPPING] == handlers


def test_a_signal_in_the_last_step_changes_nothing():
    assert Diary(stop_at=7).train()[-3:] == [("step", 7, 13), ("save", 8), ("evaluate", 8)]


def test_a_signal_in_the_last_step_reaches_who_listened_before():
    """As a sweep does, which would else begin its next run."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        Diary(stop_at=7).train()
        with pytest.raises(Stopped):
            Diary(stop_at=5).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize("error", [Enough("pruned"), Diverged("the model gives numbers that are not finite")])
def test_a_signal_before_an_evaluation_that_ends_the_run_is_handed_on(error):
    diary, heard = Diary(stop_at=3), []

    def evaluate(at):
        raise error

    diary.evaluate = evaluate
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        with pytest.raises(type(error)):
            diary.train(evaluate_at=(4,))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_so(signum):
    """A worker leaves Ctrl-C to the process that started it, and nohup lets a terminal go."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        assert Diary(stop_at=5, signum=signum).train()[-1] == ("evaluate", 8)
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_row_after_a_start_within_its_window_says_that_it_tells_of_fewer_steps():
    diary = Diary()
    diary.train(start=4)  # steps 5 and 6, then 7 and 8, whose losses are 2, 2.5, 3, 3.5
    assert [(r["step"], r["steps"], r["loss"]) for r in diary.rows] == [(6, 2, 2.25), (8, 2, 3.25)]


class Breaking(Diary):
    """The loss of one step is not a number."""

    def __init__(self, broken: int, **how):
        super().__init__(**how)
        self.broken = broken

    def step(self, batch):
        losses = super().step(batch)
        return {"loss": torch.tensor(math.nan), "scale": torch.tensor(1.0)} if self.at == self.broken else losses


def test_a_loss_that_is_not_finite_names_its_own_step_and_not_that_of_its_row():
    diary = Breaking(broken=5)
    with pytest.raises(NotFinite, match=r"^the loss is nan at step 5$"):
        diary.train(log_every=8, save_at=(8,))
    assert [r["step"] for r in diary.rows] == [8] and ("save", 8) not in diary.entries


@pytest.mark.parametrize(("marks", "stop_at"), [((6,), None), ((8,), 5)])
def test_nothing_is_saved_after_a_loss_that_is_not_finite(marks, stop_at):
    """Within a row, whose losses nobody has looked at yet: at a checkpoint, and when a signal asks for one."""
    diary = Breaking(broken=6, stop_at=stop_at)
    with pytest.raises(NotFinite, match="at step 6"):
        diary.train(log_every=100, save_at=marks, evaluate_at=marks)
    assert [entry[0] for entry in diary.entries] == ["step"] * 6


def test_rows_further_apart_than_there_are_steps_need_no_memory():
    diary = Diary()
    diary.train(log_every=2**31 - 1)
    assert [(r["step"], r["steps"]) for r in diary.rows] == [(8, 8)]


def test_all_ranks_stop_for_the_signal_of_one(together):
    """The second is sent SIGUSR1 in step 5; they agree every third step."""
    assert together(Path(__file__).parent / "loop_worker.py", 2) == ["saved 6, exit code 138\n"] * 2


def test_an_error_in_a_step_puts_the_handlers_back():
    handlers = [signal.getsignal(s) for s in STOPPING]
    diary = Diary()
    diary.batches = lambda epoch, offset: ["no batch"]
    with pytest.raises(AttributeError):
        diary.train()
    assert [signal.getsignal(s) for s in STOPPING] == handlers
