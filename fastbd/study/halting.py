"""Reasons to end a cleaning run early. All are asked for: a study otherwise has every evaluation of every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastbd.base.evaluation import RecordedEvaluation, measures_asr
from fastbd.base.run_folder import on_all_images, read_metrics
from fastbd.base.tradeoff import CEILINGS, best

Rule = Callable[[Sequence[RecordedEvaluation]], str | None]  # all evaluations of a run so far -> why it shall end
SHARE, PATIENCE = 0.5, 2.0


def collapsed(rows: Sequence[RecordedEvaluation]) -> str | None:
    """ "collapsed" when top-1 has been below SHARE of the start's for PATIENCE epochs."""
    rows = on_all_images(rows)
    measured = [(row["epoch"], top1) for row in rows if (top1 := row.get("top1")) is not None]
    start, end = measured[0][1], measured[-1][0]
    low = [top1 < SHARE * start for epoch, top1 in measured if epoch >= end - PATIENCE]
    return "collapsed" if end > PATIENCE and all(low) else None


def asha(peers: Iterable[Path], eta: int, first: float = 2.0) -> Rule:
    """Asynchronous successive halving (Li et al., arXiv 1810.05934), by its rule of stopping.

    At `first` epochs, and at each `eta` times as many, a run goes on when its score is among the best 1 / eta of those
    that have come there, of the runs in the folders `peers` and its own. The score is the best top-1 at ASR <= 5 %, and
    below all of those the lowest ASR.
    """
    peers = list(peers)

    def rule(rows: Sequence[RecordedEvaluation]) -> str | None:
        if rows[-1].get("subset"):
            return None
        rows, rung = on_all_images(rows), first
        while rung * eta <= rows[-1]["epoch"]:
            rung *= eta
        own = score(rows, rung)
        if own is None or not any(row["epoch"] < rung for row in rows[-2:-1]):
            return None  # it is not at this rung, or has been judged there
        others = [found for path in peers if (found := score(read_metrics(path), rung)) is not None]
        better = sum(other > own for other in others)
        return "pruned" if better >= max(1, (len(others) + 1) // eta) else None

    return rule


def score(rows: Sequence[RecordedEvaluation], rung: float) -> tuple[float, float] | None:
    """Of the evaluations up to `rung` epochs, with the one that ends them; None where the run has not come so far."""
    rows = on_all_images(rows)
    if not rows or rows[-1]["epoch"] < rung:
        return None
    end = next(k for k, row in enumerate(rows) if row["epoch"] >= rung)
    made = [row for row in rows[1 : end + 1] if measures_asr(row)]
    chosen = best(made, CEILINGS[0])
    if chosen:
        return 1.0, chosen["top1"]
    return 0.0, -min((row["asr"] for row in made), default=1.0)
