"""One process of several: makes the CHECKS that are named, of its share against the whole batch in one process."""

from __future__ import annotations

import os
import sys

import interpreted
import torch
import torch.distributed as td
import torch.nn.functional as F
from test_contrastive import NAMES, embeddings, formula
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastbd.kernels.contrastive import contrastive_loss, sigmoid_loss

ROWS, DIM = 21, 24
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = ("reference", "tile", "hybrid", "small") if INTERPRETED else ("reference",)
TILE = WAYS[1 % len(WAYS)]  # the way with the most steps of its own


def close(found: torch.Tensor, expected: torch.Tensor, what: str, limit: float = 1e-4) -> None:
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-3)
    assert error < limit, f"{what}: {error:.1e}\n{found}\n{expected}"


def check_losses(rank: int, size: int) -> None:
    """The mean of the processes' gradients is what data-parallel training uses."""
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    whole = embeddings(ROWS * size, DIM)
    for way in WAYS:
        for gather, symmetric in (("exact", False), ("exact", True), ("local-grad", False)):
            truth = {name: x.double().requires_grad_() for name, x in whole.items()}
            true_scale = torch.tensor(3.5, dtype=torch.float64, requires_grad=True)
            expected = formula(truth, true_scale, 0.7, 1.3, symmetric)
            expected.backward()

            towers = {name: x[own].clone().requires_grad_() for name, x in whole.items()}
            scale = torch.tensor(3.5, requires_grad=True)
            loss, _ = contrastive_loss(
                **towers,
                log_scale=scale,
                mmcl_weight=0.7,
                ssl_weight=1.3,
                ssl_symmetric=symmetric,
                gather=gather,
                group=td.group.WORLD,
                way=way,
            )
            loss.backward()
            close(loss.detach(), expected.detach(), f"{way} loss", 1e-5)
            # exact: `size` times the gradient, so that the mean over the processes is the whole one
            factor = size if gather == "exact" else 1
            for name in NAMES:
                close(towers[name].grad, factor * truth[name].grad[own], f"{way} {gather} {name}")
            mean = scale.grad.clone()
            td.all_reduce(mean)
            close(mean / size, true_scale.grad, f"{way} {gather} scale")
            print(way, gather, "loss", loss.item().hex())


def check_sigmoid(rank: int, size: int) -> None:
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    whole = list(embeddings(ROWS * size, DIM, 2).values())
    found = []
    for group, rows in ((None, slice(None)), (td.group.WORLD, own)):
        leaves = [x[rows].clone().requires_grad_() for x in whole]
        leaves += [torch.tensor(v, requires_grad=True) for v in (2.3, -8.0)]
        loss = sigmoid_loss(*leaves[:2], log_scale=leaves[2], bias=leaves[3], group=group, way=TILE)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    (loss, image, text, scale, bias), ours = found
    for gradient in ours[3:]:
        td.all_reduce(gradient)
    for a, b in zip(ours, (loss, size * image[own], size * text[own], size * scale, size * bias), strict=True):
        close(a, b.double(), "sigmoid")
    print("sigmoid loss", ours[0].item().hex())


class Towers(nn.Module):
    """Two linear towers and a temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(DIM, 16), nn.Linear(DIM, 16)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, image, text):
        return self.image(image), self.text(text), self.log_scale.clone()


def check_compiled_ddp(rank: int, size: int) -> None:
    """A compiled step of a DDP model has the gradients of one process with the whole batch."""
    whole = embeddings(ROWS * size, DIM, 2)
    alone = Towers().double()
    image, text, log_scale = alone(whole["image"].double(), whole["text"].double())
    formula({"image": image, "text": text}, log_scale).backward()

    model = Towers()
    parallel, group = DistributedDataParallel(model), td.group.WORLD

    @torch.compile(backend="aot_eager")
    def loss_of(image, text):
        image, text, log_scale = parallel(image, text)
        return contrastive_loss(F.relu(image) - F.relu(-image), text, log_scale=log_scale, group=group, way=TILE)[0]

    own = slice(rank * ROWS, (rank + 1) * ROWS)
    loss_of(whole["image"][own], whole["text"][own]).backward()
    for (name, parameter), true in zip(model.named_parameters(), alone.parameters(), strict=True):
        close(parameter.grad, true.grad, f"DDP {name}")


CHECKS = {"losses": check_losses, "sigmoid": check_sigmoid, "compiled": check_compiled_ddp}

if __name__ == "__main__":
    if INTERPRETED:
        interpreted.hasten()
    torch.set_num_threads(1)
    td.init_process_group("gloo")
    for name in sys.argv[1:]:
        CHECKS[name](td.get_rank(), td.get_world_size())
    td.destroy_process_group()
    print("done", flush=True)
    os._exit(0)  # dynamo keeps hold of the group, and Python must not end before the group's threads
