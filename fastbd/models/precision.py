"""How the towers compute: number format, compilation, capture."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from shutil import which

import torch

from fastbd.base.dist import World
from fastbd.base.errors import UserError


def set_precision(name: str, device: torch.device) -> str:
    """Resolve `auto`, switch TF32, and let cuDNN try its algorithms; returns fp32, tf32 or bf16.

    On a CPU `auto` is fp32; a training may then find bf16 to be faster, which needs no other switches.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    torch.backends.cudnn.benchmark = True
    return name


def has_bf16() -> bool:
    """Whether the CPU has instructions for products in bf16: AVX-512's or AMX's on x86, those of the name on ARM."""
    found = getattr(torch.cpu, "get_capabilities", dict)()  # one that has no such function: none
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(precision: str, device: torch.device):
    """bf16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def is_compiled(choice: str, world: World) -> bool:
    """Whether --compile asks for it; UserError where it cannot be."""
    asked = choice in ("on", "fused")
    if asked and not has_compiler():
        raise UserError(
            f"--compile {choice} needs a C++ compiler, and there is neither g++ nor clang++: install one, or give "
            "--compile off."
        )
    return asked or (choice == "auto" and world.device.type == "cuda" and find_spec("triton") is not None)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(map(which, ("g++", "c++", "clang++")))


def is_captured(choice: str, world: World) -> bool:
    """Whether --graph asks for it; UserError where it cannot be."""
    able = world.device.type == "cuda" and world.size == 1 and find_spec("triton") is not None
    if choice == "on" and not able:
        raise UserError("--graph on captures the step of one process on a GPU, with Triton; give --graph off here.")
    return choice != "off" and able
