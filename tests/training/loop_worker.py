"""A toy training of several ranks, of which the last is sent a signal in step 5."""

from __future__ import annotations

import signal

import numpy as np
import torch

from fastbd.base import dist
from fastbd.base.signals import Stopped
from fastbd.data.loader import Batch
from fastbd.training.loop import train
from fastbd.training.timetable import Timetable

world, steps, saved = dist.join("cpu"), [], []


def step(batch: Batch) -> dict[str, torch.Tensor]:
    steps.append(batch)
    if len(steps) == 5 and world.rank == world.size - 1:
        signal.raise_signal(signal.SIGUSR1)
    return {"loss": torch.tensor(1.0), "scale": torch.tensor(1.0)}


try:
    train(
        step,
        lambda epoch, offset: [Batch(np.arange(2), (), ())] * 12,
        Timetable(12, 12, (), (), 3),
        start=0,
        label="toy",
        pairs_limit=1.0,
        world=world,
        evaluate=lambda at: None,
        save=saved.append,
        record=lambda row: None,
    )
except Stopped as stopped:
    print(f"saved {saved[0]}, exit code {stopped.exit_code}", flush=True)
dist.leave()
