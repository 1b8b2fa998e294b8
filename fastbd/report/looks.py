"""How runs are drawn, in every figure alike.

The pre-training objective has a colour, and for grey print a filling of its marks and a dash of its lines. The way of
cleaning has a mark. The learning rate has a shade of the colour: the higher, the darker.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbd.base.run_folder import Run
from fastbd.config.cards import OBJECTIVES, facts
from fastbd.report.groups import cleaned_groups


@dataclass(frozen=True)
class Looks:
    """Those of the runs of one report."""

    names: Mapping[Path, str]
    """Of each cleaning run by its folder: the method with the settings that are compared, as Group.method."""
    markers: Mapping[str, str]
    """Of each of these names."""
    rates: tuple[float, ...]
    """Learning rates of the cleaning runs, in order; of all runs where none cleans."""

    def name(self, run: Run) -> str:
        return self.names.get(run.path, "")

    def marker(self, run: Run) -> str:
        return self.markers.get(self.name(run), "o")

    def colour(self, run: Run) -> str:
        """That of the objective, in the shade of the run's learning rate."""
        return shade(colour(run.pretrain_objective), self.depth(run.config.get("lr")))

    def depth(self, rate: float | None) -> float:
        """Of the shade of a learning rate: from 0, the lightest, to 1."""
        if rate not in self.rates or len(self.rates) < 2:
            return 1.0
        return self.rates.index(rate) / (len(self.rates) - 1)


def looks(runs: Sequence[Run]) -> Looks:
    """Those of the runs; of several ways of one method the first has the method's mark, the others spare ones."""
    groups = cleaned_groups(runs)
    markers: dict[str, str] = {}
    spare = list(SPARE)
    for group in groups:
        if group.method not in markers:
            usual = facts("method", group.runs[0].method or "").marker
            taken = usual in markers.values()
            markers[group.method] = spare.pop(0) if taken and spare else usual
    shaded = [run for group in groups for run in group.runs] or runs
    rates = {run.config["lr"] for run in shaded if isinstance(run.config.get("lr"), int | float)}
    return Looks({run.path: g.method for g in groups for run in g.runs}, markers, tuple(sorted(rates)))


def colour(objective: str) -> str:
    return facts("objective", objective).colour


def fill(objective: str) -> str:
    """The filling of an objective's marks, one of Matplotlib's fillstyles."""
    return FILLS[_place(objective) % len(FILLS)]


def dash(objective: str) -> str | tuple[int, tuple[int, ...]]:
    """The dash of an objective's lines, as Matplotlib takes it."""
    return DASHES[_place(objective) % len(DASHES)]


def shade(colour: str, depth: float) -> str:
    """A colour #RRGGBB mixed with white: at depth 0 mostly white, at 1 as it is."""
    share = LIGHTEST * (1 - depth)
    parts = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return "#" + "".join(f"{round(part + share * (255 - part)):02x}" for part in parts)


def _place(objective: str) -> int:
    names = list(OBJECTIVES)
    return names.index(objective) if objective in names else zlib.crc32(objective.encode())


LIGHTEST = 0.6  # white in the shade of the lowest rate
SPARE = ("D", "<", ">", "h", "d", "8", "H")  # no method's own
FILLS = ("full", "none", "left", "bottom", "right", "top")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
