"""The trade-off of accuracy (more is better) against ASR (less is better), and what cleaning made of each model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbd.study.runs import Evaluation, Run

CEILINGS = (0.05, 0.10)  # ASR up to which a model counts as cleaned: as in arXiv 2311.14948, and a looser one
LANDED = 0.5  # ASR from which the attack counts as landed


def best(evaluations: Iterable[Evaluation], ceiling: float) -> Evaluation | None:
    """The evaluation of highest top-1 among those of ASR <= ceiling (a fraction); on a tie, the one of lower ASR."""
    within = [e for e in evaluations if e["asr"] <= ceiling]
    return max(within, key=lambda e: (e["top1"], -e["asr"]), default=None)


def front(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """The Pareto front: evaluations that no other beats in both top-1 and ASR, by rising ASR and so rising top-1."""
    chosen: list[Evaluation] = []
    for evaluation in sorted(evaluations, key=lambda e: (e["asr"], -e["top1"])):
        if not chosen or evaluation["top1"] > chosen[-1]["top1"]:
            chosen.append(evaluation)
    return chosen


def area(evaluations: Iterable[Evaluation]) -> float:
    """Area under the front: the best top-1 within an ASR ceiling, averaged over ceilings from 0 to 1."""
    corners = front(evaluations)
    ends = [e["asr"] for e in corners[1:]] + [1.0]
    return sum((end - e["asr"]) * e["top1"] for e, end in zip(corners, ends, strict=False))


@dataclass(frozen=True)
class Outcome:
    """One pre-trained model under one cleaning method (None: never cleaned), over all runs of that pair."""

    objective: str
    model: str
    method: str | None
    runs: int
    start: Evaluation | None  # the model before cleaning
    last: Evaluation | None  # of the run that gave best[0], or else of the one that ends at the lowest ASR
    best: tuple[Evaluation | None, ...]  # for each of CEILINGS, over all evaluations of all runs
    lowest: Evaluation | None  # lowest ASR over all evaluations
    area: float


def outcomes(runs: Sequence[Run]) -> list[Outcome]:
    """An outcome for each (pre-trained model, cleaning method), and one for each model that no run cleans."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.verb == "clean":
            groups.setdefault((run.model, run.method), []).append(run)
    starts = {run.start.name for run in runs if run.start}  # by name, so that a study may be moved
    for run in runs:
        if run.verb != "clean" and run.path.resolve().name not in starts:
            groups[(run.model, None)] = [run]
    return [_outcome(*key, group) for key, group in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1] or ""))]


def _outcome(model: tuple[str, str, str], method: str | None, runs: list[Run]) -> Outcome:
    objective, folder, checkpoint = model
    name = Path(folder).name + ("" if checkpoint == "last" else f" epoch {checkpoint}")
    if method is None:
        start = runs[0].metrics[-1] if runs[0].metrics else None
        return Outcome(objective, name, None, 1, start, None, (None,) * len(CEILINGS), None, 0.0)
    start = next((e for run in runs for e in run.metrics if e["step"] == 0), None)
    points = [e for run in runs for e in run.cleaned]
    bests = tuple(best(points, ceiling) for ceiling in CEILINGS)
    ended = [run for run in runs if run.cleaned]
    winner = next((run for run in ended if bests[0] in run.cleaned), None)
    winner = winner or min(ended, key=lambda run: run.cleaned[-1]["asr"], default=None)
    last = winner.cleaned[-1] if winner else None
    lowest = min(points, key=lambda e: (e["asr"], -e["top1"]), default=None)
    return Outcome(objective, name, method, len(runs), start, last, bests, lowest, area(points))
