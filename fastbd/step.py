"""One training step on one screen: forward, loss, backward, schedule, update, clamp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastbd.data.loader import Batch
from fastbd.dist import World
from fastbd.objectives import Objective
from fastbd.optim import clamp_log_scale
from fastbd.precision import autocast

Step = Callable[[Batch, int], dict[str, Tensor]]


def make_step(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    *,
    precision: str,
    world: World,
) -> Step:
    """The function that does one optimiser step and returns the loss and its parts as scalars on the device."""
    towers = model
    if world.size > 1:
        one_tower = objective.mmcl_weight == 0 and not (objective.ssl_image and objective.ssl_text)
        towers = DistributedDataParallel(model, find_unused_parameters=one_tower)

    def step(batch: Batch, at: int) -> dict[str, Tensor]:
        texts = batch.tokens if batch.tokens_aug is None else torch.cat([batch.tokens, batch.tokens_aug])
        with autocast(precision, world.device):
            # All views in one forward, so batch norm sees them together, as published.
            image, text, log_scale = towers(torch.cat(batch.views), texts)
        images, texts = image.split(len(batch.ids)), text.split(len(batch.ids))
        loss, parts = objective(images, texts, log_scale, world.group)

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = schedule(at)
        optimizer.step()
        clamp_log_scale(model.logit_scale)
        return {"loss": loss.detach(), **parts, "scale": log_scale.detach().exp()}

    return step
