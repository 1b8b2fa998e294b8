"""The loop. Pre-training and cleaning differ only in the parts they hand in."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fastbd.base import signals
from fastbd.base.console import progress
from fastbd.base.dist import World
from fastbd.base.signals import Stopped
from fastbd.data.loader import Batch
from fastbd.training.readback import Readback
from fastbd.training.timetable import Timetable


class Enough(Exception):
    """An evaluation has shown that going on is of no use; the message says why."""


def train(
    step: Callable[[Batch], dict[str, Tensor]],
    batches: Callable[[int, int], Iterable[Batch]],
    table: Timetable,
    *,
    start: int,
    label: str,
    pairs_limit: float,
    world: World,
    evaluate: Callable[[int], None],
    save: Callable[[int], None],
    record: Callable[[dict], None],
) -> None:
    """Do steps start .. table.total - 1.

    batches(epoch, offset) gives an epoch's batches from its step `offset` on; save(step) and evaluate(step) are called
    after a step, record(row) gets a log line every table.log_every steps, with the mean losses of the `steps` since the
    last one or since `start`, and the share of `pairs_limit`, the pairs a second that the hardware allows. Raises
    Stopped after a signal that asks for it, saved; NotFinite for a loss that is not, before anything is saved after it.
    """
    at, losses = start, Readback(max(1, min(table.log_every, table.total - start)), start)
    with _caught() as caught, progress(label, table.total, start, quiet=not world.main) as advance:

        def tell(wait: bool) -> None:
            for row in losses.arrived(wait):
                record(row)
                advance(0, _line(row))
            if wait:
                losses.check()

        while at < table.total:
            epoch, offset = divmod(at, table.steps_per_epoch)
            clock, before = _Clock(), at
            for batch in clock.waiting(batches(epoch, offset)):
                losses.add(step(batch))
                at += 1
                clock.pairs += len(batch.ids) * world.size
                if at % table.log_every == 0 or at == table.total:
                    losses.send({"epoch": at / table.steps_per_epoch, **clock.read(pairs_limit)})
                # Several processes agree only now and then: asking each step would cost a wait for the GPU.
                asked = at < table.total and (world.size == 1 or at % table.log_every == 0) and _asked(caught, world)
                milestone = at in table.evaluate_at or at in table.save_at
                tell(wait=bool(asked) or milestone)
                advance(1)
                if at in table.save_at or asked:
                    save(at)  # first, so that an evaluation that fails costs no training
                if at in table.evaluate_at:
                    evaluate(at)
                if asked:
                    raise Stopped(asked)
                if milestone:
                    clock.start()  # neither counts as training time
            if at == before:
                raise RuntimeError(f"epoch {epoch} has no batch from step {offset} on")


def _line(row: dict) -> str:
    share = f"{row['of_limit']:.0%} of the roofline"
    return f"loss {row['loss']:.3f}  {row['pairs_per_s']:,.0f} pairs/s ({share})  wait {row['data_wait']:.0%}"


class _Clock:
    """Pairs a second and the share of the time spent waiting for data, since the last reading."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.since, self.waited, self.pairs = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterable[Batch]):
        batches = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def read(self, pairs_limit: float) -> dict:
        seconds = max(1e-9, time.perf_counter() - self.since)
        rate = self.pairs / seconds
        row = {"pairs_per_s": rate, "of_limit": rate / pairs_limit, "data_wait": self.waited / seconds}
        self.start()
        return row


def _asked(caught: list[int], world: World) -> int:
    """The first signal that was caught, of several ranks' the one with the highest number; 0 for none."""
    return -world.least(-caught[0] if caught else 0)


@contextmanager
def _caught() -> Iterator[list[int]]:
    """Collect the signals that ask to stop instead of dying of them; a second Ctrl-C or SIGTERM kills as usual.

    One that has not stopped the loop, as it came too late or as an error came first, is handed on to what listened
    before, if that was of our making.
    """
    caught: list[int] = []

    def note(signum: int, before) -> None:
        caught.append(signum)
        if signum in signals.INSISTING:
            signal.signal(signum, before)

    previous: dict = {}
    try:
        with signals.handled(note) as previous:
            yield caught
    except Stopped:
        caught.clear()
        raise
    finally:
        for signum in caught:
            if previous[signum] not in (signal.SIG_DFL, signal.default_int_handler):
                previous[signum](signum, None)
