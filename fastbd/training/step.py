"""One training step: forward, loss, backward, schedule, update, clamp.

All that it reads and counts lies on the device, so that nothing waits for the host and the whole can be captured in a
CUDA graph, which then serves any learning rate and any weights of the losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.base.run_folder import LOGGED
from fastbd.data.loader import Batch
from fastbd.kernels.text_pack import PackedText
from fastbd.methods.method import Embedded, Losses, Method, name_of
from fastbd.models import CLIP
from fastbd.models.batchnorm import batch_norms, unrecorded
from fastbd.models.blocks import fuse_pools
from fastbd.models.clip import tower_of
from fastbd.models.precision import autocast
from fastbd.training.capture import Captured
from fastbd.training.optim import clamp_log_scale

Towers = Callable[[Tensor, PackedText], tuple[Tensor, Tensor, Tensor]]


class Step:
    """step(batch) does one optimiser step and returns the loss, its parts and the temperature, scalars on the device.

    `rates` [steps] are the learning rates, `start` the number of the first step. A batch comes in `parts`, by its
    captions, and is embedded in as many, with the gradient of the whole. The `weights` of the objective's terms may be
    written between steps. The towers can be `compiled`, and average pools `fused` with the layers around them. A step
    that cannot be `captured` is a UserError, or it `falls_back` to what it does without.
    """

    def __init__(
        self,
        model: CLIP,
        method: Method,
        optimizer: torch.optim.Optimizer,
        rates: Tensor,
        *,
        precision: str,
        world: World,
        start: int = 0,
        parts: int = 1,
        compiled: bool = False,
        fused: bool = False,
        captured: bool = False,
        falls_back: bool = False,
    ):
        self.model, self.method, self.optimizer = model, method, optimizer
        self.precision, self.world = precision, world
        self.rates, self.at = rates.to(world.device, copy=True), torch.tensor(start, device=world.device)
        self.lr = optimizer.param_groups[0]["lr"]
        self.weights = torch.tensor(method.objective.weights, device=world.device)
        self.norms = batch_norms(model)
        self._choose_trained()
        if fused:
            fuse_pools(model)
        self.alone: Towers = _compile(model) if compiled else model
        self.towers: Towers = self.alone
        if world.size > 1:
            ddp = _parallel(model, static=parts == 1)
            self.towers = _compile(ddp) if compiled else ddp
        self.variant, self.call = None, self._step
        if captured:
            self.call = Captured(self._step, world.device, lambda: self.variant, falls_back)

    @property
    def uncaptured(self) -> str | None:
        """Why the step runs without the CUDA graph that it was to be captured in; None where that has not failed."""
        return self.call.failure if isinstance(self.call, Captured) else None

    def begin(self, epoch: int) -> None:
        """Before the steps of an epoch."""
        self.variant = self.method.variant(epoch)

    def restart(self, rates: Tensor) -> None:
        """Back to the first step, with other learning rates and no momentum: for a new run in the same memory."""
        self.rates.copy_(rates)
        self.at.zero_()
        self._choose_trained()
        self.weights.copy_(torch.tensor(self.method.objective.weights))
        self.forget(self.optimizer.state)

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Back to no momentum, for these parameters."""
        for parameter in parameters:
            for value in self.optimizer.state.get(parameter, {}).values():
                value.zero_()

    def __call__(self, batch: Batch) -> Losses:
        return self.call(batch.ids, batch.views, batch.texts)

    def _choose_trained(self) -> None:
        for name, parameter in self.model.named_parameters():  # an idle tower is left alone, by weight decay too
            parameter.requires_grad_(tower_of(name) != self.method.objective.idle)
        self.model.logit_scale.requires_grad_(not self.method.fixed_scale)
        for norm in self.norms:
            norm.train(self.model.training and not self.method.frozen_norms)

    def _step(self, ids: Tensor, views: Sequence[Tensor], texts: Sequence[PackedText]) -> Losses:
        self.optimizer.zero_grad(set_to_none=True)
        gradients = self._gradients if len(texts) == 1 else self._gradients_by_parts
        losses = gradients(ids, views, texts)
        self._average_own()
        self.lr.copy_(self.rates.take(self.at))
        self.optimizer.step()
        clamp_log_scale(self.model.logit_scale)
        self.at += 1
        return losses

    def _gradients(self, ids: Tensor, views: Sequence[Tensor], texts: Sequence[PackedText]) -> Losses:
        self._take_in(1.0)
        images, captions, log_scale = self._embed(views, texts[0], self.towers)
        loss, losses = self._loss(Embedded(images, captions, log_scale, ids, views))
        loss.backward()
        return losses

    def _gradients_by_parts(self, ids: Tensor, views: Sequence[Tensor], texts: Sequence[PackedText]) -> Losses:
        """GradCache (Gao et al., arXiv 2101.06983): embed all, then the gradients of the embeddings part by part."""
        count = len(texts)
        parts = list(zip(zip(*(view.chunk(count) for view in views), strict=True), texts, strict=True))
        with torch.no_grad(), unrecorded():
            images, captions, scales = zip(*(self._embed(*part, self.alone) for part in parts), strict=True)
        images, captions = ([torch.cat(x).requires_grad_() for x in zip(*y, strict=True)] for y in (images, captions))
        log_scale = scales[0].detach().clone().requires_grad_()
        loss, losses = self._loss(Embedded(images, captions, log_scale, ids, views))
        loss.backward()  # the method's own parameters have their whole gradient now
        of_rows = [x.grad for x in (*images, *captions)]
        of_scale = torch.zeros_like(log_scale) if log_scale.grad is None else log_scale.grad
        for k, part in enumerate(parts):
            last = k == count - 1
            # The statistics of all parts count alike in the end, as if taken in at once.
            self._take_in(1 / count, behind=count - 1 - k)
            # The processes' gradients are averaged with the last part's, and are then those of all parts.
            images, captions, scale = self._embed(*part, self.towers if last else self.alone)
            rows = [None if g is None else g.chunk(count)[k] for g in of_rows]  # None: no term has this view
            outputs = [*zip([*images, *captions], rows, strict=True), (scale, of_scale if last else 0 * of_scale)]
            used = [(output, g) for output, g in outputs if g is not None and output.requires_grad]
            reached, by_reached = zip(*used, strict=True)
            torch.autograd.backward(reached, by_reached)
        return losses

    def _embed(
        self, views: Sequence[Tensor], text: PackedText, towers: Towers
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Embeddings of each view and of each version of the captions. One forward, so batch norm sees all views."""
        pixels, per_group = self._in_groups(views)
        with autocast(self.precision, self.world.device):
            images, captions, log_scale = towers(pixels, text)
        images = images.unflatten(0, (-1, len(views), per_group)).unbind(1)
        return tuple(x.flatten(0, 1) for x in images), captions.split(len(views[0])), log_scale

    def _in_groups(self, views: Sequence[Tensor]) -> tuple[Tensor, int]:
        """The views joined, those of a batch norm's group side by side; and pairs in a group."""
        group = self.norms[0].group if self.norms else 0
        pairs = group // len(views) or len(views[0])
        if len(views) == 1:
            return views[0], pairs
        rows = [view.permute(0, 2, 3, 1).unflatten(0, (-1, pairs)) for view in views]  # keeps channels_last
        return torch.stack(rows, 1).flatten(0, 2).permute(0, 3, 1, 2), pairs

    def _loss(self, embedded: Embedded) -> tuple[Tensor, Losses]:
        made = self.method(embedded, self.world.group, self.weights)
        _check_loss(self.method, made)
        loss, parts = made
        if taken := parts.keys() & (LOGGED | {"loss"}):
            raise UserError(f"a part of the loss is called '{min(taken)}', as another number of log.jsonl: rename it.")
        return loss, {"loss": loss.detach(), **parts, "scale": embedded.log_scale.detach().exp()}

    def _average_own(self) -> None:
        """The gradients of the method's parameters, over all processes; those of the model are averaged by DDP."""
        if self.world.size > 1:
            for parameter in self.method.parameters():
                if parameter.grad is not None:
                    td.all_reduce(parameter.grad.div_(self.world.size))

    def _take_in(self, share: float, behind: int = 0) -> None:
        """How much of the running statistics the next forward replaces: `share` of the momentum in the end, when as
        many forwards as are `behind` have replaced theirs."""
        if self.norms and self.norms[0].rate is not None:
            part = share * self.norms[0].momentum
            self.norms[0].rate.fill_(part / (1 - behind * part))  # one tensor, which all share


def _check_loss(method: Method, made: Any) -> None:
    """Raise a UserError where code from outside returned something else than a loss and its parts."""
    loss, parts = made if isinstance(made, tuple) and len(made) == 2 else (None, None)
    scalars = [loss, *parts.values()] if isinstance(parts, dict) else [None]
    if not (isinstance(loss, Tensor) and loss.requires_grad and all(map(_is_scalar, scalars))):
        by = f"{name_of(method)}, or {type(method.objective).__qualname__} in it,"
        said = " ".join(repr(made).split())[:80]  # a tensor takes lines
        raise UserError(
            f"{by} returned {said}: a step needs (loss, parts), a scalar that depends on the embeddings, and a dict of "
            "scalars by name, all tensors."
        )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()


def _parallel(model: nn.Module, static: bool) -> nn.Module:
    """The model, its gradients averaged over all processes.

    Not `static` where parts leave gradients behind, which a static graph takes for its own without a word.
    """
    for harmless in ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides"):
        warnings.filterwarnings("ignore", harmless)  # newer PyTorch's name; strides of 1 x 1 kernels
    # Of the buffers only running statistics change, and only the first process evaluates and saves.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=static, broadcast_buffers=False)


def _compile(towers: nn.Module) -> Towers:
    """For each shape by itself: one batch with longer captions is not to slow down all that follow."""
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # left off on purpose
    return torch.compile(towers, dynamic=False)
