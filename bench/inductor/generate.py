"""python -m bench.inductor.generate FOLDER MODEL PAIRS VIEWS GROUP FUSED: write what Inductor makes of a step's towers.

The code for an H200 goes to FOLDER/forward.py and FOLDER/backward.py. Nothing is run; see bench/inductor/device.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.captions import lengths
from bench.inductor import device
from fastbd.base.dist import World
from fastbd.kernels.text_pack import PackedText, room_for
from fastbd.methods.method import Method
from fastbd.methods.objectives import Objective
from fastbd.models import CLIP, create
from fastbd.models.batchnorm import share_statistics
from fastbd.models.precision import set_precision
from fastbd.training.step import Step

CUDA = torch.device("cuda", 0)


class Written(Exception):
    """The code is there, and would be called now."""


def generate(folder: Path, call: Callable[[], object]) -> None:
    """Write what Inductor generates while `call` runs its compiled functions, forward and backward."""
    from torch._functorch import config as functorch
    from torch._inductor.graph import GraphLowering

    def write(graph: GraphLowering):
        code, _ = graph.codegen()
        name = "backward" if graph.is_backward else "forward"
        (folder / f"{name}.py").write_text(code.value)
        return Module(folder / f"{name}.py")

    functorch.force_non_lazy_backward_lowering = True  # not only when a backward pass has begun
    with patch.object(GraphLowering, "compile_to_module", write):
        try:
            call()
        except Written:
            return
    raise RuntimeError("the compiled function was never called")


class Module:
    """Stands for the imported code."""

    def __init__(self, path: Path):
        self.__file__ = self.key = str(path)

    @staticmethod
    def call(inputs):
        raise Written


def embed(model_name: str, pairs: int, views: int, group: int, fused: bool) -> None:
    """Embed a batch as a compiled step in bf16 does. To be called in a FakeTensorMode."""
    with CUDA:
        model = channels_last(create(model_name, 0)).train()
        pixels, text = batch(pairs, views, model.image_size)
    if group:
        share_statistics(model, group)
    unused = torch.optim.SGD(model.parameters())
    step = Step(
        model,
        Method(Objective()),
        unused,
        torch.empty(1),
        precision=set_precision("bf16", CUDA),
        world=World(0, 1, CUDA),
        compiled=True,
        fused=fused,
    )
    step._embed(pixels, text, step.towers)


def channels_last(model: CLIP) -> CLIP:
    """As model.to(memory_format=torch.channels_last), which cannot exchange parameters in a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 4:
                setattr(module, name, nn.Parameter(parameter.detach().to(memory_format=torch.channels_last)))
    return model


def batch(pairs: int, views: int, side: int) -> tuple[list[Tensor], PackedText]:
    """Pixels of each view and as many captions, in the formats of the loader."""
    texts, room = pairs * views, room_for(lengths(), pairs * views)
    pixels = [
        torch.empty(pairs, 3, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for _ in range(views)
    ]
    tokens, positions = (torch.empty(room, dtype=torch.int64) for _ in range(2))
    return pixels, PackedText(tokens, positions, torch.empty(texts + 1, dtype=torch.int32))


def main(folder: str, model: str, *numbers: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    pairs, views, group, fused = map(int, numbers)
    os.environ.pop("LD_PRELOAD", None)  # this process has it, and compilers that it starts need none
    device.pretend()
    with FakeTensorMode(allow_non_fake_inputs=True):
        generate(Path(folder), lambda: embed(model, pairs, views, group, fused=bool(fused)))


if __name__ == "__main__":
    main(*sys.argv[1:])
