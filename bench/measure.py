"""Seconds and bytes of calls, on a CPU and on a GPU."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

LEAST, MOST = 5, 200  # rounds


@dataclass(frozen=True)
class Seconds:
    """Median and the 20 % and 80 % quantiles over the rounds."""

    median: float
    low: float
    high: float


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


def measure(calls: dict[str, Callable[[], object]], clock: Clock, seconds: float) -> dict[str, Seconds]:
    """Time the calls in turn, round after round, after two rounds of warm-up.

    As many rounds as fit into `seconds`, within LEAST and MOST. A drift of the machine then meets all calls alike.
    """
    for call in calls.values():
        call()
    once = sum(clock(call) for call in calls.values())
    rounds = min(MOST, max(LEAST, int(seconds / once)))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> Seconds:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Seconds(statistics.median(values), fifths[0], fifths[3])


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


@contextmanager
def silence():
    """Drop what libraries below Python write to the error output; the profiler says that it starts and stops."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
