"""Table 1, and what else is counted for each group of runs: instability, rebound, cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

from fastbd.base.evaluation import AttackedEvaluation, Evaluation, RecordedEvaluation
from fastbd.base.run_folder import Run, slug
from fastbd.base.stats import Estimate, over
from fastbd.base.tradeoff import CEILINGS, area, best
from fastbd.report.groups import Group, by_seed, cleaned_groups, groups, models, place_of, replicates

Point = tuple[Run, AttackedEvaluation]


@dataclass(frozen=True)
class Best:
    """The best evaluation of each replicate within an ASR ceiling, and their means over seeds."""

    points: tuple[Point | None, ...]
    """One for each replicate; None where no evaluation is within the ceiling."""
    top1: Estimate | None
    """Of those that have one."""
    asr: Estimate | None
    shares: tuple[float, ...]
    """Of the start's top-1, by seed; a replicate without any counts as 0, for none of it could be kept."""
    kept: Estimate | None
    """Their mean."""
    reached: int
    """Replicates that have one."""


@dataclass(frozen=True)
class Row:
    """A row of Table 1."""

    group: Group
    replicates: int
    models: int
    top1: Estimate | None
    """Before cleaning."""
    asr: Estimate | None
    best: tuple[Best, ...]
    """For each of CEILINGS."""
    lowest: AttackedEvaluation | None
    """The evaluation of lowest ASR over all runs."""
    area: Estimate | None
    """Area under the Pareto front."""


def table(runs: Sequence[Run]) -> list[Row]:
    """Table 1: a row for each group of runs."""
    return [_row(group) for group in groups(runs)]


def best_of(runs: Sequence[Run]) -> dict[str, dict[str, float] | None]:
    """{"objective/method": {"top1", "asr"}}: best accuracy at ASR <= 5 %, mean over seeds; None where there is none."""
    rows = [row for row in table(runs) if row.group.method]
    names = [f"{row.group.objective}/{slug(row.group.runs[0])}" for row in rows]
    among = [row.group for row in rows]
    found = {}
    for row, name in zip(rows, names, strict=True):
        alone = names.count(name) == 1
        settings = row.group.method.partition(", ")[2]
        more = ", ".join(filter(None, (place_of(row.group, among), row.group.variant, settings)))
        first = row.best[0]
        value = {"top1": first.top1.mean, "asr": first.asr.mean} if first.top1 and first.asr else None
        found[name if alone else f"{name} ({more})"] = value
    return found


def _row(group: Group) -> Row:
    drawn = replicates(group)
    points = [e for run in group.runs for e in run.cleaned]
    fronts = [(runs, area(e for run in runs for e in run.cleaned)) for runs in drawn if any(r.cleaned for r in runs)]
    starts = {runs[0].model: (runs, e) for runs in drawn if (e := _start(runs))}.values()
    return Row(
        group=group,
        replicates=len(drawn),
        models=models(group),
        top1=_estimate(list(starts), "top1"),
        asr=_estimate([(runs, e) for runs, e in starts if e.get("asr") is not None], "asr"),
        best=tuple(_best(drawn, ceiling) for ceiling in CEILINGS),
        lowest=min(points, key=lambda e: (e["asr"], -e["top1"]), default=None),
        area=over(by_seed(fronts)) if fronts else None,
    )


def _start(runs: Sequence[Run]) -> RecordedEvaluation | None:
    """The model before cleaning; of pre-training runs its end."""
    if runs[0].verb != "clean":
        return runs[0].attacks[-1] if runs[0].attacks else next(iter(runs[0].metrics[::-1]), None)
    return next((run.before for run in runs if run.before), None)


def _best(drawn: Sequence[tuple[Run, ...]], ceiling: float) -> Best:
    points = [_winner(runs, ceiling) for runs in drawn]
    found = [(runs, point[1]) for runs, point in zip(drawn, points, strict=True) if point]
    kept = []
    for runs, point in zip(drawn, points, strict=True):
        start = _start(runs)
        top1 = start.get("top1") if start else None
        if top1 and any(run.cleaned for run in runs):
            kept.append((runs, point[1]["top1"] / top1 if point else 0.0))
    shares = by_seed(kept)
    return Best(
        points=tuple(points),
        top1=_estimate(found, "top1"),
        asr=_estimate(found, "asr"),
        shares=tuple(shares),
        kept=over(shares) if shares else None,
        reached=len(found),
    )


def _winner(runs: Sequence[Run], ceiling: float) -> Point | None:
    found = best((e for run in runs for e in run.cleaned), ceiling)
    return next(((run, found) for run in runs if any(e is found for e in run.cleaned)), None) if found else None


def _estimate(found: Sequence[tuple[tuple[Run, ...], Evaluation]], key: str) -> Estimate | None:
    """The mean over seeds; of a single one with the interval that the evaluation has from its number of images."""
    if not found:
        return None
    values = by_seed((runs, e[key]) for runs, e in found)
    if len(values) > 1:
        mean, low, high, n = over(values)
        return Estimate(mean, max(low, 0.0), min(high, 1.0), n)  # a share; Student's interval knows nothing of that
    evaluation = found[0][1]
    return Estimate(values[0], evaluation.get(f"{key}_low", -math.inf), evaluation.get(f"{key}_high", math.inf), 1)


# ---- along a run ----


class Instability(NamedTuple):
    """How unsteady a run was, over the evaluations from its start to its end."""

    fell: float
    """Share of the steps between two evaluations in which accuracy fell while ASR rose."""
    rise: float
    """The largest rise of ASR from any evaluation to a later one."""
    clear: bool
    """Whether the intervals of these two do not overlap."""


def instability(run: Run) -> Instability | None:
    """None with fewer than two evaluations."""
    path = [e for e in run.attacks if run.verb == "clean" and not e.get("subset")]
    if len(path) < 2:
        return None
    worse = [b["top1"] < a["top1"] and b["asr"] > a["asr"] for a, b in pairwise(path)]
    lowest = accumulate(path, lambda a, b: min(a, b, key=itemgetter("asr")))
    low, high = max(zip(lowest, path, strict=True), key=lambda ends: ends[1]["asr"] - ends[0]["asr"])
    clear = high.get("asr_low", high["asr"]) > low.get("asr_high", low["asr"])
    return Instability(statistics.fmean(worse), high["asr"] - low["asr"], clear)


def rebounds(run: Run) -> list[dict[str, Any]]:
    """{first, max, change, mean (of ASR), steps, lr} for each time that rebound was measured on the run's models."""
    measured: list[Mapping[str, Any]] = [row for row in run.rows if "rebound_max" in row]
    measured += [run.result["rebound"]] if run.result.get("rebound") else []
    return [
        {
            "first": row["rebound"]["asr"][0],
            "max": row["rebound_max"],
            "change": row["rebound_change"],
            "mean": row["rebound_area"],
            "steps": row["rebound"]["steps"][-1],
            "lr": row.get("rebound_lr"),
        }
        for row in measured
    ]


# ---- cost ----


@dataclass(frozen=True)
class Cost:
    """What runs took."""

    runs: int
    device: str
    hours: float
    """Of the devices, added up."""
    evaluating: float
    """Share of the time."""
    pairs_per_s: float | None
    """Median over the runs of the median over the log."""
    of_limit: float | None
    estimated: bool
    """Some run has no result.json, so that its time is taken from its log."""


def costs(runs: Sequence[Run]) -> list[tuple[str, str, Cost]]:
    """(pre-training, cleaning, cost) of each group and of all pre-training runs; the totals by device come last."""
    found = []
    parts: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.verb != "clean":
            parts.setdefault(("Pre-training", run.pretrain_objective), []).append(run)
    for (verb, objective), some in sorted(parts.items()):
        found += [(objective, verb, cost) for cost in _by_device(some)]
    for group in cleaned_groups(runs):
        found += [(group.objective, group.method, cost) for cost in _by_device(group.runs)]
    return found + [("", "Total", cost) for cost in _by_device(runs)]


def seconds(run: Run) -> tuple[float, float]:
    """(training, evaluation): as result.json has them, or else from the lines of its log."""
    if "seconds" in run.result:
        evaluating = run.result.get("evaluate_seconds", 0.0)
        return run.result.get("train_seconds", run.result["seconds"] - evaluating), evaluating
    batch, training = run.config.get("batch_size"), 0.0
    if isinstance(batch, int):
        steps = [0, *(line["step"] for line in run.log)]
        rates = [line.get("pairs_per_s") for line in run.log]
        training = sum((b - a) * batch / rate for (a, b), rate in zip(pairwise(steps), rates, strict=True) if rate)
    return training, sum(e.get("seconds", 0.0) for e in run.metrics)


def device(run: Run) -> str:
    return run.result.get("device") or run.env.get("gpu") or "CPU"


def cores(run: Run) -> str:
    """Return how many of its machine's cores a run used, in words; empty where that was not recorded.

    A run of several processes on CPUs has as many times the threads of each.
    """
    there, threads = run.env.get("cpu_cores"), run.env.get("threads")
    if not there:
        return ""
    used = min(there, threads * run.result.get("devices", 1)) if threads else there
    return f"{used} of {there} cores" if used < there else f"{there} core{'s' * (there != 1)}"


def speed(run: Run, key: str) -> float | None:
    """Median of a number of the log, such as pairs_per_s."""
    values = [line[key] for line in run.log if line.get(key) is not None]
    return statistics.median(values) if values else None


def _by_device(runs: Sequence[Run]) -> list[Cost]:
    return [_cost([run for run in runs if device(run) == name], name) for name in sorted({device(r) for r in runs})]


def _cost(runs: list[Run], name: str) -> Cost:
    took = [[part * run.result.get("devices", 1) for part in seconds(run)] for run in runs]
    evaluating, total = sum(e for _, e in took), sum(map(sum, took))
    return Cost(
        runs=len(runs),
        device=name,
        hours=total / 3600,
        evaluating=evaluating / total if total else 0.0,
        pairs_per_s=_median(speed, runs, "pairs_per_s"),
        of_limit=_median(speed, runs, "of_limit"),
        estimated=any("seconds" not in run.result for run in runs),
    )


def _median(of: Callable[[Run, str], float | None], runs: list[Run], key: str) -> float | None:
    values = [value for run in runs if (value := of(run, key)) is not None]
    return statistics.median(values) if values else None
