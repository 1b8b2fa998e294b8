"""What the machine can do, measured in the same run: matmul rates and memory bandwidth."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.case import Case, Provider
from fastbd.training.roofline import Rates, copy_rate, matmul_rate

FORMATS = {"cpu": ("bf16", "fp32", "fp64"), "cuda": ("bf16", "tf32", "fp32", "fp64")}


@dataclass(frozen=True)
class Limits:
    """Rates of one device: FLOP/s by number format, and bytes/s read plus written by a copy."""

    device: str
    matmul: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0

    def seconds(self, case: Case, provider: Provider) -> float | None:
        """The least time in which this machine can do the work of a case; None when that was not counted."""
        number_format = provider.rate or case.rate
        rates = Rates(self.matmul[number_format], self.bandwidth)
        if case.least:
            return case.least(rates, number_format)
        if not case.flops:
            return None
        return max(case.flops / rates.matmul, case.bytes / rates.bandwidth)


def measure_limits(device: str) -> Limits:
    where = torch.device(device)
    return Limits(device, {name: matmul_rate(where, name) for name in FORMATS[device]}, copy_rate(where))


@contextmanager
def float32_precision(name: str):
    """Whether matmuls of float32 may take TF32 ("high") or not ("highest")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
