"""What a benchmark is made of: a case is one piece of work, a provider one way to do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fastbd.training.roofline import Rates

Output = dict[str, Tensor]
Call = Callable[[], Output]


class Unavailable(Exception):
    """A provider that cannot run here, and why."""


@dataclass(frozen=True)
class Provider:
    """One way to do the work of a case.

    `build` returns the call that is timed, or raises Unavailable. `tolerance` bounds the relative error of each
    output, by name, "" standing for the rest. `no_worse_than` names a provider whose largest error bounds this one's.
    `compared` turns what a call returns into the outputs of the other providers; its time does not count. `memory`
    tells where the peak is found: in the tensors of one "call", in what a CUDA "graph" keeps, or nowhere. `slow` is
    why --quick leaves this provider out unless it is named in full. One that is not `timed` has no row: others are
    compared with it, and timed in turns with it.
    """

    build: Callable[[], Call]
    tolerance: dict[str, float]
    no_worse_than: str | None = None
    ours: bool = False
    rate: str = ""  # number format whose matmul rate limits it; the case's when empty
    compared: Callable[[Output], Output] = dict
    memory: Literal["call", "graph", ""] = "call"
    slow: str = ""
    timed: bool = True
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Providers that do the same `units` of work; ratios refer to the first one that is timed.

    `truth` computes the outputs for the gate, mostly in float64; without it the first provider is the truth. `flops`
    and `bytes` are the fewest that the work needs; 0 means not counted. `least` takes their place where the work has
    many parts: the fewest seconds at some rates in a number format. `sizes` says below which norm an output's error is
    not taken relative to the output itself. `clock` times a call in the place of the device's.
    """

    name: str
    unit: str
    units: int
    device: str
    providers: dict[str, Provider]
    truth: Callable[[], Output] | None = None
    truth_flops: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    least: Callable[[Rates, str], float] | None = None
    rate: str = "fp32"
    sizes: dict[str, float] = field(default_factory=dict)
    clock: Callable[[Any], float] | None = None


Cases = Iterator[tuple[str, Callable[[], Case]]]  # each case's name, and what makes its data when it is wanted


def errors(output: Output, truth: Output, sizes: dict[str, float]) -> dict[str, float]:
    """Relative L2 error of each output; NaN where either has NaN. ValueError when the names differ."""
    if output.keys() != truth.keys():
        raise ValueError(f"outputs {sorted(output)} instead of {sorted(truth)}")
    found = {}
    for name, want in truth.items():
        difference = (output[name].double() - want.double()).norm().item()
        size = max(want.double().norm().item(), sizes.get(name, 0.0))
        found[name] = difference / size if difference else 0.0
    return found


def objection(found: dict[str, float], tolerance: dict[str, float], rival: dict[str, float] | None = None) -> str:
    """Why these errors are too large, "" when they are not. The largest of a rival's bounds the largest of these."""
    for name, error in found.items():
        limit = tolerance.get(name, tolerance[""])
        if not error <= limit:  # NaN too
            return f"{name} is off by {error:.1e}; {limit:.0e} is allowed"
    worst = max(found, key=found.__getitem__)
    if rival and found[worst] > max(rival.values()):
        return f"{worst} is off by {found[worst]:.1e}, more than the plain formula's {max(rival.values()):.1e}"
    return ""
