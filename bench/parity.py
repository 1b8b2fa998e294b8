"""python -m bench.parity: losses of the training steps of tiny models, captured and compiled, against the eager ones.

The eager step is compared with that of the CPU in float32, a batch in parts with the whole one. One line for each as
soon as it is known; an error ends that one only. Exit code 1 when one is off or fails.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from bench.captions import captions, lengths
from bench.step import OBJECTIVES
from fastbd.base.dist import World
from fastbd.base.learning_rates import learning_rates
from fastbd.data.loader import Batch
from fastbd.kernels.text_pack import PackedText, pack, room_for
from fastbd.methods.method import Method
from fastbd.models import create
from fastbd.models.batchnorm import share_statistics
from fastbd.models.memory_format import channels_last
from fastbd.models.precision import has_compiler, set_precision
from fastbd.training.optim import make_optimizer
from fastbd.training.step import Step

PAIRS, STEPS = 16, 8  # of the steps, three run before a capture and five are replays
MODES = {
    "eager": {},
    "captured": {"captured": True},
    "compiled": {"compiled": True},
    "compiled, captured": {"compiled": True, "captured": True},
}
OF_DEVICE = {"cuda": ("eager", "captured", "compiled, captured"), "cpu": ("eager", "compiled")}
# Relative differences. Sums come in another order, and eight steps amplify that; bf16 keeps three digits.
ALLOWED = {"fp32": 1e-3, "bf16": 1e-1}


@dataclass(frozen=True)
class Setting:
    """Views of each image, parts of a batch, images in a group of batch norm (0: all that are embedded together)."""

    model: str
    views: int
    parts: int
    group: int
    precision: str

    def __str__(self) -> str:
        return f"{self.model} views={self.views} accumulate={self.parts} bn-group={self.group} {self.precision}"


# Two at a time go through all modes. The most telling come first, as there may be no time for all to be compiled.
SETTINGS = [
    Setting(model, *others)
    for others in ((1, 1, 0, "fp32"), (2, 2, 8, "fp32"), (2, 1, 0, "bf16"), (1, 2, 8, "fp32"), (2, 1, 0, "fp32"))
    for model in ("tiny-rn", "tiny-vit")
]


def main(words: list[str] | None = None, settings: Sequence[Setting] = SETTINGS) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=OF_DEVICE, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="those that the device has, without")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so long")
    parser.add_argument("--done", type=int, default=0, help="leave out so many of the first")
    parser.add_argument("--failed", type=int, default=0, help="so many of those that are left out had failed")
    options = parser.parse_args(words)
    end, failed = time.monotonic() + options.seconds, options.failed
    modes = options.modes or OF_DEVICE[options.device]
    pairs = [settings[k : k + 2] for k in range(0, len(settings), 2)]
    everything = [(mode, setting) for pair in pairs for mode in modes for setting in pair]
    for done, (mode, setting) in enumerate(everything[options.done :], options.done + 1):
        began = time.monotonic()
        if began > end:
            print(f"{failed} of {len(everything)} failed, for the last {len(everything) - done + 1} there was no time")
            return int(failed > 0 or done == 1)
        right, said = attempt(setting, mode, options.device)
        failed += not right
        print(f"{mode} {setting}: {said}; {time.monotonic() - began:.1f} s", flush=True)
        if is_lost(options.device):
            print("after this error the process cannot use the GPU any more: a new one does the rest", flush=True)
            begin_anew(options.device, modes, end - time.monotonic(), done, failed)
    print(f"{failed} of {len(everything)} failed")
    return int(failed > 0)


def attempt(setting: Setting, mode: str, device: str) -> tuple[bool, str]:
    """Whether the losses are those that they should be, and what there is to say about them."""
    if "compiled" in mode and device == "cpu" and not has_compiler():
        return True, "left out, as there is no C++ compiler"
    try:
        if mode == "eager":
            wanted = losses(replace(setting, parts=1, precision="fp32"), "eager", "cpu")
        else:
            wanted = losses(setting, "eager", device)
        found = losses(setting, mode, device)
    except Exception as error:
        traceback.print_exc(limit=-8, file=sys.stdout)
        return False, f"FAILED, {type(error).__name__}"
    off, allowed = difference(found, wanted), ALLOWED[setting.precision]
    verdict = "right" if off <= allowed else "WRONG"
    path = f"loss {found[0]['loss']:.4f} to {found[-1]['loss']:.4f}"
    return off <= allowed, f"{verdict}, {path}, off by {off:.1e} of {allowed:.0e}"


def difference(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> float:
    """The largest relative difference between two courses of losses; infinite when a number is not finite."""
    pairs = [(row[name], other[name]) for row, other in zip(found, wanted, strict=True) for name in other]
    offs = [abs(one - other) / abs(other) for one, other in pairs]
    return max(offs) if all(map(math.isfinite, offs)) else math.inf


@cache
def losses(setting: Setting, mode: str, device: str) -> list[dict[str, float]]:
    """What each step says: the loss, its parts and the temperature.

    Adam hides the scale of a gradient and blows up rounding; with a large eps its steps follow the gradient.
    """
    torch._dynamo.reset()  # what another setting has left: other sizes would be compiled for any size
    place = torch.device(device)
    set_precision(setting.precision, place)
    model = channels_last(create(setting.model, 0), place).train()
    if setting.group:
        share_statistics(model, setting.group)
    method = Method(OBJECTIVES["mmcl_ssl" if setting.views == 2 else "mmcl"])
    step = Step(
        model,
        method,
        make_optimizer(model, lr=0.0, weight_decay=0.1, betas=(0.9, 0.99), eps=0.01),
        learning_rates(0.01, warmup=2, total=STEPS + 1),
        precision=setting.precision,
        world=World(0, 1, place),
        parts=setting.parts,
        **MODES[mode],
    )
    return [{name: value.item() for name, value in step(batch(setting, seed, place)).items()} for seed in range(STEPS)]


def batch(setting: Setting, seed: int, device: torch.device) -> Batch:
    """PAIRS random pairs, in float32; with two views two captions each."""
    noise = torch.Generator().manual_seed(seed)
    images = [torch.randn(PAIRS, 3, 32, 32, generator=noise) for _ in range(setting.views)]
    split = [np.split(captions(PAIRS, 100 * seed + k), setting.parts) for k in range(setting.views)]
    room = room_for(lengths(), PAIRS * setting.views // setting.parts)
    texts = [pack(np.concatenate(part), room) for part in zip(*split, strict=True)]
    return Batch(
        torch.arange(PAIRS, device=device),
        tuple(image.to(device, memory_format=torch.channels_last) for image in images),
        tuple(PackedText(*(x.to(device) for x in text)) for text in texts),
    )


def is_lost(device: str) -> bool:
    """Whether the process cannot use its GPU any more, as after an illegal access."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def begin_anew(device: str, modes: Sequence[str], seconds: float, done: int, failed: int) -> None:
    """Let a new process take the place of this one and do the rest."""
    words = ("--device", device, "--seconds", seconds, "--done", done, "--failed", failed, "--modes", *modes)
    os.execv(sys.executable, [sys.executable, "-m", "bench.parity", *map(str, words)])


if __name__ == "__main__":
    sys.exit(main())
