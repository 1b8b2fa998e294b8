"""Losses brought from the device to the host without letting either wait for the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from fastbd.base.errors import UserError

AHEAD = 1  # steps that the host may be ahead of a GPU: each keeps a batch in its memory


class NotFinite(Exception):
    """The loss of a step, counted from 1, is infinite or not a number; `losses` has its terms too, by name."""

    def __init__(self, step: int, losses: dict[str, float]):
        super().__init__(f"the loss is {losses['loss']} at step {step}")
        self.step, self.losses = step, losses


class Readback:
    """A ring of the losses of the last `room` steps, on their device; the first is of the step after `start`."""

    def __init__(self, room: int, start: int = 0):
        self.room, self.step, self.count = room, start, 0
        self.names: tuple[str, ...] = ()
        self.sent: deque[tuple[dict, Tensor, torch.cuda.Event | None]] = deque()
        self.running: deque[torch.cuda.Event] = deque()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Keep a step's losses, scalars; waits while the device is more than AHEAD steps behind."""
        if not self.names:
            self.names = tuple(losses)
            self.ring = torch.empty(self.room, len(losses), device=losses["loss"].device)
        if losses.keys() != set(self.names):
            raise UserError(
                f"a step has the losses {', '.join(losses)}, and those before it {', '.join(self.names)}: an objective "
                "must return the same parts in each step."
            )
        torch.stack([losses[name] for name in self.names], out=self.ring[self.count % self.room])
        self.step += 1
        self.count += 1
        if self.ring.is_cuda:
            self.running.append(_event())
            if len(self.running) > AHEAD:
                self.running.popleft().synchronize()

    def send(self, row: dict) -> None:
        """Begin to fetch the means of the steps since the last send, at most `room`; the row comes back with them."""
        digest = self._digest()
        row = {**row, "step": self.step, "steps": min(self.count, self.room)}
        self.count = 0
        if not digest.is_cuda:
            self.sent.append((row, digest, None))
            return
        host = torch.empty(digest.shape, pin_memory=True)
        host.copy_(digest, non_blocking=True)
        self.sent.append((row, host, _event()))

    def arrived(self, wait: bool = False) -> Iterator[dict]:
        """Rows whose losses have come, in order; or all that were sent.

        Each has the number of its last `step`, of how many `steps` it tells, and the means of their losses. Raises
        NotFinite after the row of the step that it names.
        """
        while self.sent and (wait or self.sent[0][2] is None or self.sent[0][2].query()):
            row, digest, event = self.sent.popleft()
            if event:
                event.synchronize()
            values = digest.tolist()
            yield row | dict(zip(self.names, values, strict=False))
            self._check(values, row["step"], row["steps"])

    def check(self) -> None:
        """Raise NotFinite where the loss of a step since the last send is not; waits for the device."""
        if self.count:
            self._check(self._digest().tolist(), self.step, min(self.count, self.room))

    def _digest(self) -> Tensor:
        """Return 2 x L + 1 numbers, on the device, of the L losses of each step since the last send.

        Their means; those of the first step whose loss is not finite, or of the last; how many steps are before it.
        """
        kept = self.ring.roll(-self.count, 0)[-min(self.count, self.room) :]  # the oldest first
        before = kept[:, self.names.index("loss")].isfinite().long().cumprod(0).sum()
        first = kept.index_select(0, before.clamp(max=len(kept) - 1)[None])[0]
        return torch.cat([kept.mean(0), first, before[None]])

    def _check(self, digest: list[float], last: int, steps: int) -> None:
        *values, before = digest
        if before < steps:
            losses = dict(zip(self.names, values[len(self.names) :], strict=True))
            raise NotFinite(last - steps + 1 + int(before), losses)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
