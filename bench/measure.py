"""Seconds and bytes of calls, on a CPU and on a GPU."""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST = 200  # rounds


@dataclass(frozen=True)
class Spread:
    """Median and the 20 % and 80 % quantiles over the rounds, and what each of them gave."""

    median: float
    low: float
    high: float
    each: Sequence[float]


Clock = Callable[[Callable[[], object]], float]


def cpu_clock(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cuda_clock() -> Clock:
    """A clock of events on the GPU's stream.

    The L2 cache is overwritten before each call: a training step would have done so. While that runs the host gets
    a head start of some 50 us; a call whose launches take longer is timed with the gaps between its kernels.
    """
    cache = getattr(torch.cuda.get_device_properties("cuda"), "L2_cache_size", 0)
    rubbish = torch.empty(max(256 << 20, 4 * cache), dtype=torch.int8, device="cuda")

    def clock(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        rubbish.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def clock_of(device: str) -> Clock:
    return cuda_clock() if device == "cuda" else cpu_clock


def measure(calls: Mapping[str, Callable[[], object]], clock: Clock, seconds: float, least: int) -> dict[str, Spread]:
    """Time the calls in turn, round after round, after a round of warm-up.

    Rounds follow for so many `seconds` by the clock; `least` and MOST bound them. A drift of the machine then meets
    all calls alike.
    """
    for call in calls.values():
        call()
    times, spent = {name: [] for name in calls}, 0.0
    for done in range(MOST):
        if done >= least and spent >= seconds:
            break
        for name, call in calls.items():
            times[name].append(clock(call))
            spent += times[name][-1]
    return {name: spread(values) for name, values in times.items()}


def spread(values: Sequence[float]) -> Spread:
    """The quantiles of values; one alone is all of them."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [*values] * 4
    return Spread(statistics.median(values), fifths[0], fifths[3], values)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that one call has in use at once, what it returns included and its inputs not."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with silence(), TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = call()
        del kept
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return most_in_use([event for event in events if event.get("name") == "[memory]"])


def most_in_use(events: list[dict]) -> int:
    """Largest sum of bytes between allocations and releases (negative bytes) of a profiler's trace.

    What is released without having been allocated in the trace was there before. Only the profiler sees the memory
    that compiled code takes for itself.
    """
    live: dict[int, int] = {}
    peak = total = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        address, count = event["args"]["Addr"], event["args"]["Bytes"]
        if count > 0:
            live[address] = count
            total += count
        else:
            total -= live.pop(address, 0)
        peak = max(peak, total)
    return peak


def graph_bytes(device: str) -> int:
    """Bytes that captured graphs keep from all others, in pools of their own: their tensors and the gaps between."""
    if device == "cpu":
        return 0
    segments = torch.cuda.memory_snapshot(include_traces=False)
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))


@dataclass(frozen=True)
class Share:
    """A kernel of a GPU, or an operation of a CPU: how often one call starts it, its seconds, its share of all."""

    name: str
    count: int
    seconds: float
    share: float


def largest(call: Callable[[], object], device: str, count: int) -> list[Share]:
    """The `count` kernels that take most of one call's time, by the profiler; on a CPU the operations."""
    cuda = device == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with silence(), profile(activities=[activity]) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    # A GPU's own events only, without the ranges that the program has named: they hold kernels that are there already.
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    found = [event for event in profiler.key_averages() if event.device_type == kind and not event.is_user_annotation]
    of = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) for event in found}
    total = sum(of.values()) or 1.0
    ranked = sorted(found, key=lambda event: -of[event.key])[:count]
    return [Share(e.key, e.count, of[e.key] / 1e6, of[e.key] / total) for e in ranked]


@contextmanager
def silence():
    """Drop what libraries below Python write to the error output; the profiler says that it starts and stops."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    stacks = faulthandler.is_enabled()
    if stacks:  # those of a process that is ended meanwhile are still wanted
        faulthandler.enable(before)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        if stacks:
            faulthandler.enable()
        os.close(before)
        os.close(nowhere)
