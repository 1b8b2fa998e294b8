"""Losses brought from the device to the host without letting either wait for the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

AHEAD = 1  # steps that the host may be ahead of a GPU: each keeps a batch in its memory


class Readback:
    """A ring of the losses of the last `room` steps, on their device."""

    def __init__(self, room: int):
        self.room, self.count = room, 0
        self.names: tuple[str, ...] = ()
        self.sent: deque[tuple[dict, Tensor, torch.cuda.Event | None]] = deque()
        self.running: deque[torch.cuda.Event] = deque()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Keep a step's losses, scalars; waits while the device is more than AHEAD steps behind."""
        if not self.names:
            self.names = tuple(losses)
            self.ring = torch.empty(self.room, len(losses), device=losses["loss"].device)
        torch.stack(tuple(losses.values()), out=self.ring[self.count % self.room])
        self.count += 1
        if self.ring.is_cuda:
            self.running.append(_event())
            if len(self.running) > AHEAD:
                self.running.popleft().synchronize()

    def send(self, row: dict) -> None:
        """Begin to fetch the means since the last send, at most `room` steps; the row will come back with them."""
        means = self.ring[: min(self.count, self.room)].mean(0)
        self.count = 0
        if not means.is_cuda:
            self.sent.append((row, means, None))
            return
        host = torch.empty(means.shape, pin_memory=True)
        host.copy_(means, non_blocking=True)
        self.sent.append((row, host, _event()))

    def arrived(self, wait: bool = False) -> Iterator[dict]:
        """Rows whose losses have come, in order; or all that were sent."""
        while self.sent and (wait or self.sent[0][2] is None or self.sent[0][2].query()):
            row, means, event = self.sent.popleft()
            if event:
                event.synchronize()
            yield row | dict(zip(self.names, means.tolist(), strict=True))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
