"""What the machine can do, measured in the same run: matmul rates and memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.case import Case, Provider
from bench.measure import Clock, clock_of

# number format -> (type of the operands, side of the matrices)
FORMATS = {
    "cpu": {"bf16": (torch.bfloat16, 1536), "fp32": (torch.float32, 1536), "fp64": (torch.float64, 1024)},
    "cuda": {
        "bf16": (torch.bfloat16, 8192),
        "tf32": (torch.float32, 8192),
        "fp32": (torch.float32, 8192),
        "fp64": (torch.float64, 4096),
    },
}
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes: far more than a cache holds
TRIES = 6


@dataclass(frozen=True)
class Limits:
    """Rates of one device: FLOP/s by number format, and bytes/s read plus written by a copy."""

    device: str
    matmul: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0

    def seconds(self, case: Case, provider: Provider) -> float | None:
        """The least time in which this machine can do the work of a case; None when that was not counted."""
        if not case.flops:
            return None
        return max(case.flops / self.matmul[provider.rate or case.rate], case.bytes / self.bandwidth)


def measure_limits(device: str) -> Limits:
    """The best of TRIES after a warm-up, on random data: zeros multiply faster than numbers."""
    clock, matmul = clock_of(device), {}
    for name, (dtype, side) in FORMATS[device].items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with float32_precision("high" if name == "tf32" else "highest"):
            matmul[name] = 2 * side**3 / best(clock, lambda a=a, b=b: a @ b)
    source = torch.full((COPIED[device],), 7, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Limits(device, matmul, 2 * source.numel() / best(clock, lambda: target.copy_(source)))


@contextmanager
def float32_precision(name: str):
    """Whether matmuls of float32 may take TF32 ("high") or not ("highest")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def best(clock: Clock, call: Callable[[], object]) -> float:
    """The shortest of TRIES calls, in seconds."""
    call()
    return min(clock(call) for _ in range(TRIES))
