"""One case: build the providers, let the gate look at what they compute, time those that pass."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import torch

from bench.case import Call, Case, Unavailable, errors, objection
from bench.limits import Limits
from bench.measure import Seconds, clock_of, measure, peak_bytes

TRUTH_SECONDS = 10.0  # as much as float64 may take by the measured rate; larger cases trust their first provider


@dataclass
class Outcome:
    """What one case gave: rows of those that were timed, and why the others were not."""

    rows: list[dict] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def run(case: Case, limits: Limits, seconds: float) -> Outcome:
    """Check and time the providers of a case for about `seconds`."""
    outcome = Outcome()
    calls, found = prepare(case, limits, outcome)
    if not calls:
        return outcome
    memory = {name: peak_bytes(calls[name], case.device) for name in calls if case.providers[name].own_memory}
    times = measure(calls, clock_of(case.device), seconds)
    first = next(iter(times))
    for name, time in times.items():
        about = {"baseline": first, "ratio": times[first].median / time.median, "peak_bytes": memory.get(name)}
        about["error"] = max(found[name].values())
        outcome.rows.append(row(case, name, time, limits.seconds(case, case.providers[name])) | about)
    return outcome


def prepare(case: Case, limits: Limits, outcome: Outcome) -> tuple[dict[str, Call], dict[str, dict[str, float]]]:
    """Calls that passed the gate, and their errors. The others go into the outcome with the reason."""
    calls, found, truth = {}, {}, None
    if case.truth and case.truth_flops / limits.matmul["fp64"] < TRUTH_SECONDS:
        truth = case.truth()
    for name, provider in case.providers.items():
        try:
            call = provider.build()
            output = {key: value.clone() for key, value in call().items()}
        except Exception as error:
            expected = not provider.ours or isinstance(error, (Unavailable, ImportError, torch.OutOfMemoryError))
            (outcome.skipped if expected else outcome.refused)[name] = reason(error)
            output = None
        if output is None:
            release(case.device)  # only here, where the exception no longer holds what it passed through
            continue
        truth = truth or output
        found[name] = errors(output, truth, case.sizes)
        if why := objection(found[name], provider.tolerance, found.get(provider.no_worse_than)):
            outcome.refused[name] = why
        else:
            calls[name] = call
    return calls, found


def reason(error: Exception) -> str:
    """One line that says why a provider did not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"[:160]


def release(device: str) -> None:
    """Give back what a failed provider held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def row(case: Case, name: str, time: Seconds, least: float | None) -> dict:
    """One line of the results; rates in the case's unit, seconds a call."""
    return {
        "name": case.name,
        "provider": name,
        "unit": case.unit,
        "rate": case.units / time.median,
        "rate_p20": case.units / time.high,
        "rate_p80": case.units / time.low,
        "seconds": time.median,
        "limit_share": least / time.median if least else None,
        "note": case.providers[name].note,
    }
