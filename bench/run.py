"""One case, provider by provider: build it, let the gate look at what it computes, and time it against the first.

Each result is there before the next provider is built, and only the first one's memory stays: a run that is killed
loses no more than the provider it was at.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.case import Call, Case, Output, Unavailable, errors, objection
from bench.limits import Limits
from bench.measure import Clock, Share, Spread, clock_of, graph_bytes, largest, measure, peak_bytes, spread

TRUTH_SECONDS = 10.0  # as much as float64 may take by the measured rate; larger cases trust their first provider


@dataclass(frozen=True)
class Effort:
    """How much is measured: providers whose names begin with one of `only` (all when there is none), with the slow
    ones or without; `seconds` of timing for each, in `rounds` at least; and so many of its largest `kernels`."""

    seconds: float = 0.0
    rounds: int = 3
    only: Sequence[str] = ()
    slow: bool = True
    kernels: int = 0

    def takes(self, name: str) -> bool:
        return not self.only or name.startswith(tuple(self.only))

    def takes_slow(self, name: str) -> bool:
        return self.slow or name in self.only


@dataclass(frozen=True)
class Result:
    """What one provider gave: a row where it was timed, else why it was skipped or refused, with its traceback."""

    provider: str
    row: dict | None = None
    kernels: Sequence[Share] = ()
    skipped: str = ""
    refused: str = ""
    trace: str = ""


class Refused(Exception):
    """A provider whose outputs are wrong, and how far off."""


@dataclass(frozen=True)
class Ready:
    """A provider that passed the gate: its call, the seconds until the first one was done, its largest error."""

    call: Call
    seconds: float
    error: float


class Gate:
    """Builds the providers of a case and compares what they compute with its truth."""

    def __init__(self, case: Case, limits: Limits):
        self.case, self.found = case, {}
        self.truth: Output | None = None
        if case.truth and case.truth_flops / limits.matmul["fp64"] < TRUTH_SECONDS:
            self.truth = case.truth()

    def build(self, name: str) -> Ready:
        """The provider's call, once it has computed what it should. Raises Refused, or whatever the provider raises.

        Without a truth the first provider's outputs are it.
        """
        provider, began = self.case.providers[name], time.perf_counter()
        call = provider.build()
        output = call()
        synchronize(self.case.device)
        seconds = time.perf_counter() - began
        output = {key: value.clone() for key, value in provider.compared(output).items()}
        self.truth = self.truth or output
        found = self.found[name] = errors(output, self.truth, self.case.sizes)
        if why := objection(found, provider.tolerance, self.found.get(provider.no_worse_than)):
            raise Refused(why)
        return Ready(call, seconds, max(found.values()))


def run(case: Case, limits: Limits, effort: Effort) -> Iterator[Result]:
    """Check and time the providers one after the other, each in turns with the first of those that passed."""
    gate, clock = Gate(case, limits), case.clock or clock_of(case.device)
    first: dict[str, Call] = {}
    for name, provider in case.providers.items():
        if not effort.takes(name):
            continue
        if provider.slow and not effort.takes_slow(name):
            yield Result(name, skipped=f"{provider.slow}, too long for --quick unless --providers names it in full")
            continue
        result, call = attempt(gate, limits, name, first, clock, effort)
        if result != Result(name):
            yield result
        if call and effort.kernels:
            yield profiled(case, name, call, effort.kernels)
        if call and not first:
            first[name] = call
        call = None
        release(case.device)


def attempt(
    gate: Gate, limits: Limits, name: str, first: dict[str, Call], clock: Clock, effort: Effort
) -> tuple[Result, Call | None]:
    """The result of one provider, and its call where it was timed."""
    provider = gate.case.providers[name]
    try:
        before = graph_bytes(gate.case.device)
        ready = gate.build(name)
        row = timed(gate.case, limits, name, ready, first, clock, effort, before) if provider.timed else None
        return Result(name, row), ready.call
    except Refused as error:
        return Result(name, refused=str(error)), None
    except Exception as error:
        if not provider.ours or isinstance(error, (Unavailable, ImportError, torch.OutOfMemoryError)):
            return Result(name, skipped=reason(error)), None
        return Result(name, refused=reason(error), trace=traceback.format_exc()), None


def timed(
    case: Case,
    limits: Limits,
    name: str,
    ready: Ready,
    first: dict[str, Call],
    clock: Clock,
    effort: Effort,
    graphs_before: int,
) -> dict:
    """The row of a provider, timed in turns with the first one."""
    provider, calls = case.providers[name], first | {name: ready.call}
    peak = peak_bytes(ready.call, case.device) if provider.memory == "call" else None
    times = measure(calls, clock, effort.seconds, effort.rounds)
    if provider.memory == "graph":  # after the timing: some are captured only at their second call
        peak = graph_bytes(case.device) - graphs_before
    baseline = next(iter(calls))
    ratios = spread([a / b for a, b in zip(times[baseline].each, times[name].each, strict=True)])
    return row(case, name, times[name], limits.seconds(case, provider)) | {
        "baseline": baseline,
        "ratio": ratios.median,
        "ratio_p20": ratios.low,
        "ratio_p80": ratios.high,
        "peak_bytes": peak,
        "build_seconds": ready.seconds,
        "error": ready.error,
    }


def profiled(case: Case, name: str, call: Call, count: int) -> Result:
    """The largest kernels of a call. A profiler that fails costs no row."""
    try:
        return Result(name, kernels=largest(call, case.device, count))
    except Exception as error:
        return Result(f"{name}: kernels", skipped=reason(error))


def reason(error: Exception) -> str:
    """One line that says why a provider did not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"[:160]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def row(case: Case, name: str, time: Spread, least: float | None) -> dict:
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
