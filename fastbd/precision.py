"""Arithmetic of the towers."""

from __future__ import annotations

from contextlib import nullcontext

import torch


def set_precision(name: str, device: torch.device) -> str:
    """Resolve `auto` and switch TF32; returns fp32, tf32 or bf16."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def autocast(precision: str, device: torch.device):
    """bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
