"""Cleanings beyond the grid, which Optuna chooses in the light of those that have been made.

The ledger is all the memory of the search: Optuna's study is made anew from it for each choice. So any number of
processes search together, the grid's runs count too, and a process that is killed leaves no trial open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation
from fastbd.base.run_folder import on_all_images, read_metrics
from fastbd.base.tradeoff import CEILINGS, best
from fastbd.study.grid import Config, Entry, Planned, material
from fastbd.study.ledger import Ledger, Row

TRIES = 20  # draws until one is new
DIGITS = 3  # of a number that is drawn
STATES = {"finished": "COMPLETE", "failed": "FAIL", "blocked": "FAIL"}  # others count as running: they keep draws apart


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
    def config(self) -> Config:
        return self.grid[0].config

    def holds(self, run: Planned) -> bool:
        """Whether the run differs from those of the grid only in where its learning rate is in the range."""
        return (
            run.verb == "clean"
            and _model_and_rest(run.config) == _model_and_rest(self.config)
            and self.low <= run.config.lr <= self.high
        )

    def entry(self, lr: float) -> Entry:
        """As Study.searched has it."""
        given = {flag: getattr(self.config, flag) for flag in self.flags}
        return {**given, "lr": lr, "model": self.config.run.resolve().name, "seed": self.config.seed}


def spaces(ledger: Ledger) -> list[Space]:
    """Of all models, and all entries with two or more learning rates."""
    found = []
    for entry in ledger.study.clean:
        rates = entry.get("lr")
        grids: dict[tuple, list[Planned]] = {}
        for run in ledger.of(entry) if isinstance(rates, tuple | list) and len(rates) > 1 else ():
            grids.setdefault(_model_and_rest(run.config), []).append(run)
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
        lr = _draw(space, past) if len(past) - len(space.grid) < trials else None
        if lr is not None:
            return space.entry(lr)
    return None


def _draw(space: Space, past: Sequence[Row]) -> float | None:
    """The learning rate to try next; None where nothing new is found."""
    optuna = load()
    axes = {"lr": optuna.distributions.FloatDistribution(space.low, space.high, log=space.low > 0)}
    taken = [row.run.config.lr for row in past]
    sampler = optuna.samplers.TPESampler(seed=len(past), constant_liar=True)
    study = optuna.create_study(directions=("maximize", "minimize"), sampler=sampler)
    for row, lr in zip(past, taken, strict=True):
        state = optuna.trial.TrialState[STATES.get(row.status.state, "RUNNING")]
        values = scores(read_metrics(row.run.config.out)) if state.name == "COMPLETE" else None
        study.add_trial(optuna.trial.create_trial(params={"lr": lr}, distributions=axes, values=values, state=state))
    for _ in range(TRIES):
        lr = float(f"{study.ask(axes).params['lr']:.{DIGITS}g}")
        if lr not in taken and space.low <= lr <= space.high:
            return lr
    return None


def scores(rows: Sequence[Evaluation]) -> tuple[float, float]:
    """(top-1, ASR) of a cleaning's best evaluation at ASR <= 5 %, or else of that of the lowest ASR."""
    made = [row for row in on_all_images(rows)[1:] if row.get("asr") is not None]
    chosen = best(made, CEILINGS[0]) or min(made, key=lambda row: (row["asr"], -row["top1"]), default=None)
    return (chosen["top1"], chosen["asr"]) if chosen else (0.0, 1.0)


def load():
    """Optuna. UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("--search needs Optuna: pip install 'fastbd[cluster]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _model_and_rest(config: Config) -> tuple:
    """What must be the same in two runs of a space."""
    rest = {flag: value for flag, value in material(config).items() if flag != "lr"}
    return config.run, json.dumps(rest, sort_keys=True, default=str)
