"""Cleanings beyond the grid, at learning rates chosen in the light of the runs that have been made.

The ledger is all the memory of the search: a choice depends on nothing else. So any number of processes search
together, the grid's runs count too, and a process that is killed leaves nothing open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from fastbd.base.evaluation import measures_asr
from fastbd.base.run_folder import on_all_images, read_metrics
from fastbd.base.tradeoff import CEILINGS, Point, best
from fastbd.config.flags import CleanConfig
from fastbd.study.grid import Entry, Planned, material
from fastbd.study.ledger import Ledger, Row

DIGITS = 3  # of a rate that is chosen


class _Tried(Point):
    lr: float


class Space(NamedTuple):
    """What is searched: one model and one entry of the study's cleanings, its learning rates taken as a range.

    Each value of its other axes has a space of its own, as what they compare is to be searched for equally.
    """

    grid: tuple[Planned, ...]
    """Its runs in the grid."""
    flags: tuple[str, ...]
    """All that the entry gives."""
    low: float
    high: float

    @property
    def config(self) -> CleanConfig:
        return _cleaning(self.grid[0])

    def holds(self, run: Planned) -> bool:
        """Whether the run differs from those of the grid only in where its learning rate is in the range."""
        return (
            isinstance(run.config, CleanConfig)
            and _model_and_rest(run.config) == _model_and_rest(self.config)
            and self.low <= run.config.lr <= self.high
        )

    def entry(self, lr: float) -> Entry:
        """As Study.searched has it."""
        config = self.config
        assert config.run is not None, "a study's cleaning is planned with its model"
        given = {flag: getattr(config, flag) for flag in self.flags}
        return {**given, "lr": lr, "model": config.run.resolve().name, "seed": config.seed}


def spaces(ledger: Ledger) -> list[Space]:
    """Of all models, and all entries with two or more learning rates."""
    found = []
    for entry in ledger.study.clean:
        rates = entry.get("lr")
        if not isinstance(rates, tuple | list) or len(rates) < 2:
            continue
        grids: dict[tuple, list[Planned]] = {}
        for run in ledger.of(entry):
            grids.setdefault(_model_and_rest(_cleaning(run)), []).append(run)
        found += [Space(tuple(grid), tuple(entry), min(rates), max(rates)) for grid in grids.values()]
    return found


def extend(ledger: Ledger, trials: int) -> bool:
    """Plan one more cleaning where a model is there and has fewer than `trials` beyond the grid; False if nowhere."""
    return ledger.add(partial(_choose, ledger, spaces(ledger), trials))


def _choose(ledger: Ledger, found: Sequence[Space], trials: int) -> Entry | None:
    """A new cleaning in the space that has the fewest."""
    rows = ledger.table()
    there = {row.run.id for row in rows if row.status.state == "finished"}
    ready = [space for space in found if there.issuperset(space.grid[0].needs)]
    pasts = [(space, [row for row in rows if space.holds(row.run)]) for space in ready]
    for space, past in sorted(pasts, key=lambda pair: len(pair[1]) - len(pair[0].grid)):
        lr = _next(past) if len(past) - len(space.grid) < trials else None
        if lr is not None:
            return space.entry(lr)
    return None


def _next(past: Sequence[Row]) -> float | None:
    """The learning rate to try next: the middle, by ratio, of the wider of the two gaps beside the best rate so far.

    Gaps lie between rates that are planned, whatever has become of them, so that processes which search together
    choose different ones. Where those two are too narrow for a new number, or nothing has been evaluated, it is the
    widest gap of all; None where every gap is too narrow.
    """
    rates = sorted({_cleaning(row.run).lr for row in past})
    best_rate = _best_rate(past)
    gaps = sorted(pairwise(rates), key=lambda gap: (best_rate not in gap, -_width(*gap), -gap[1]))
    middles = [(low, float(f"{math.sqrt(low * high) or high / 2:.{DIGITS}g}"), high) for low, high in gaps]
    return next((middle for low, middle, high in middles if low < middle < high), None)


def _width(low: float, high: float) -> float:
    """The logarithm of the ratio; rounded, as that of 1e-4 to 1e-3 is that of 1e-3 to 1e-2. Infinite from 0."""
    return round(math.log(high / low), 6) if low else math.inf


def _best_rate(past: Sequence[Row]) -> float | None:
    """That of the best evaluation at ASR <= 5 %, or else of the one of the lowest ASR; None where there is none yet."""
    made: list[_Tried] = [
        {"lr": _cleaning(row.run).lr, "top1": evaluation["top1"], "asr": evaluation["asr"]}
        for row in past
        if row.status.state == "finished"
        for evaluation in on_all_images(read_metrics(row.run.out))[1:]  # the first is of the start
        if measures_asr(evaluation)
    ]
    chosen = best(made, CEILINGS[0]) or min(made, key=lambda each: (each["asr"], -each["top1"]), default=None)
    return chosen["lr"] if chosen else None


def _cleaning(run: Planned) -> CleanConfig:
    assert isinstance(run.config, CleanConfig), "a space holds only cleanings"
    return run.config


def _model_and_rest(config: CleanConfig) -> tuple:
    """What must be the same in two runs of a space."""
    rest = {flag: value for flag, value in material(config).items() if flag != "lr"}
    return config.run, json.dumps(rest, sort_keys=True, default=str)
