"""Reasons to end a cleaning run early. All are asked for: a study otherwise has every evaluation of every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastbd.base.evaluation import Evaluation
from fastbd.base.run_folder import on_all_images, read_metrics
from fastbd.base.tradeoff import CEILINGS, best

Rule = Callable[[Sequence[Evaluation]], str | None]  # all evaluations of a run so far -> why it shall end
SHARE, PATIENCE = 0.5, 2.0


def collapsed(rows: Sequence[Evaluation]) -> str | None:
    """ "collapsed" when top-1 has been below SHARE of the start's for PATIENCE epochs."""
    rows = on_all_images(rows)
    start, last = rows[0], rows[-1]
    low = [row["top1"] < SHARE * start["top1"] for row in rows if row["epoch"] >= last["epoch"] - PATIENCE]
    return "collapsed" if last["epoch"] > PATIENCE and all(low) else None


def asha(peers: Iterable[Path], eta: int, first: float = 2.0) -> Rule:
    """Asynchronous successive halving (Li et al., arXiv 1810.05934), by its rule of stopping.

    At `first` epochs, and at each `eta` times as many, a run goes on when its score is among the best 1 / eta of those
    that have come there, of the runs in the folders `peers` and its own. The score is the best top-1 at ASR <= 5 %, and
    below all of those the lowest ASR.
    """
    peers = list(peers)

    def rule(rows: Sequence[Evaluation]) -> str | None:
        if rows[-1].get("subset"):
            return None
        rows, rung = on_all_images(rows), first
        while rung * eta <= rows[-1]["epoch"]:
            rung *= eta
        if not any(row["epoch"] < rung for row in rows[-2:-1]) or rows[-1]["epoch"] < rung:
            return None  # it has been judged at this rung, or is not there
        own = score(rows, rung)
        others = [found for path in peers if (found := score(read_metrics(path), rung)) is not None]
        better = sum(other > own for other in others)
        return "pruned" if better >= max(1, (len(others) + 1) // eta) else None

    return rule


def score(rows: Sequence[Evaluation], rung: float) -> tuple[float, float] | None:
    """Of the evaluations up to `rung` epochs, with the one that ends them; None where the run has not come so far."""
    rows = on_all_images(rows)
    if not rows or rows[-1]["epoch"] < rung:
        return None
    end = next(k for k, row in enumerate(rows) if row["epoch"] >= rung)
    made = [row for row in rows[1 : end + 1] if row.get("asr") is not None]
    chosen = best(made, CEILINGS[0])
    if chosen:
        return 1.0, chosen["top1"]
    return 0.0, -min((row["asr"] for row in made), default=1.0)
