"""A model in the device's memory and what trains it: made once, used again by runs that follow one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.methods.method import Method
from fastbd.models import CLIP
from fastbd.models.batchnorm import batch_norms, share_statistics
from fastbd.models.blocks import recompute
from fastbd.models.memory_format import channels_last
from fastbd.models.precision import is_captured, is_compiled, set_precision
from fastbd.training.optim import make_optimizer, restore
from fastbd.training.shares import Shares
from fastbd.training.step import Step
from fastbd.training.task import Config, Task


@dataclass(frozen=True)
class Numerics:
    """How a step computes: its number format, whether the towers are compiled, whether it is one CUDA graph."""

    precision: str
    compiled: bool
    captured: bool


def numerics_of(config: Config, world: World, faster: Callable[[], str]) -> Numerics:
    """Return what the flags ask for on this machine; sets the precision of PyTorch's matrix products.

    On a CPU --precision auto is what `faster` says; of several processes, the main one's.
    """
    precision = set_precision(config.precision, world.device)
    if config.precision == "auto" and world.device.type == "cpu":
        narrow = torch.tensor(faster() == "bf16")
        world.share([narrow])
        precision = "bf16" if narrow else "fp32"
    return Numerics(precision, is_compiled(config.compile, world), is_captured(config.graph, world))


@dataclass(frozen=True)
class Setup:
    """A model and a method on the device, the step that trains them, and the size of the step's text part."""

    model: CLIP
    method: Method
    room: int
    """Tokens that a part of a batch has room for; 1 where its captions need no fixed shape."""
    step: Step


def place(found: Setup | None, config: Config, task: Task, shares: Shares, world: World) -> tuple[CLIP, Method]:
    """Return the task's model and method on the device: in the memory of `found`, or in new memory."""
    if found:
        found.model.load_state_dict(task.model.state_dict())
        found.method.objective = task.method.objective
        return found.model.train(), found.method
    model = channels_last(task.model, world.device).train()
    if config.grad_checkpointing:
        recompute(model)
    if shares.group:
        share_statistics(model, shares.group)
    return model, task.method.to(world.device)


def make_step(model: CLIP, method: Method, rates: Tensor, config: Config, numerics: Numerics, world: World) -> Step:
    """Return a step that trains the model at learning rates float32 [steps]."""
    if config.bn_group == "sync" and world.size > 1:  # after all that copies the model: a process group has no copy
        share_statistics(model, 0, world.group)
    betas = (config.beta1, config.beta2)
    optimizer = make_optimizer(
        model,
        method,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=betas,
        eps=config.eps,
        exempt=config.exempt,
    )
    return Step(
        model,
        method,
        optimizer,
        rates,
        precision=numerics.precision,
        world=world,
        parts=config.accumulate,
        compiled=numerics.compiled,
        fused=config.compile == "fused",
        captured=numerics.captured,
        falls_back=config.graph == "auto",
    )


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict, config: Config, task: Task) -> None:
    """Load the optimizer's state: that of the run itself when it resumes, else that of the run that is cleaned."""
    try:
        restore(optimizer, state)
    except (KeyError, ValueError):
        if config.resume:
            raise UserError(
                f"the checkpoint in {config.resume} holds the optimizer's state of other parameters than "
                f"{task.model_name} has: put back what was changed, or start the run again."
            ) from None
        raise UserError(
            f"--keep-optimizer: {task.start} and --method {task.method_name} do not train the same parameters, as one "
            "has a head of its own; leave it out."
        ) from None


def shares_of(config: Config, task: Task, world: World, views: int) -> Shares:
    """Return how a batch is shared out, of pairs with `views` images each. UserError where it cannot be."""
    norms = bool(batch_norms(task.model)) and not task.method.frozen_norms
    group = config.bn_group if norms and isinstance(config.bn_group, int) else 0
    shares = Shares(world.size, config.accumulate, group, views, norms)
    batch_size, rows = config.batch_size, len(task.rows)
    if min(batch_size, rows) < 2 and task.method.contrasts and config.epochs:
        raise UserError(
            "the loss tells the pairs of a batch from one another, so a batch needs 2 or more: --batch-size is "
            f"{batch_size}, and {rows:,} of the data's pairs are trained on."
        )
    shares.check(batch_size, rows)
    synchronised = config.bn_group == "sync" and world.size > 1
    if norms and shares.part(batch_size) * shares.views == 1 and config.epochs and not synchronised:
        raise UserError(
            "batch norm needs the statistics of more than the 1 image that a process embeds at a time: give a "
            "larger --batch-size, or a smaller --accumulate."
        )
    return shares
