"""Classifiers on frozen features: train_x [N, D] of labels train_y int64 [N] -> predicted labels of test_x [M, D]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbd.base.evaluation import Evaluation, evaluation_of
from fastbd.base.learning_rates import learning_rates
from fastbd.base.prompts import target_index
from fastbd.evals.metrics import averaged, blocks, rate, unit
from fastbd.evals.sets import Attacked, Labelled
from fastbd.evals.towers import Towers


@torch.enable_grad()
def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    classes: int,
    *,
    epochs: int = 10,
    batch: int = 80,
    lr: float = 0.005,
    seed: int = 0,
) -> Tensor:
    """Multinomial regression as in CleanCLIP's code: AdamW with decay 0.01, but for the bias, and a cosine to 0.

    The features are not normalised, and a last incomplete batch is kept. CleanCLIP's options are 10 epochs and batch
    80, Verma et al.'s 32 and 16; the code of both takes the batch of its training instead, by default 128.
    """
    train_x, drawn = train_x.float(), torch.Generator().manual_seed(seed)
    bound = train_x.shape[1] ** -0.5  # torch.nn.Linear's
    weight, bias = (
        torch.empty(shape).uniform_(-bound, bound, generator=drawn).to(train_x.device).requires_grad_()
        for shape in ((classes, train_x.shape[1]), (classes,))
    )
    groups = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    schedule = learning_rates(lr, warmup=0, total=epochs * math.ceil(len(train_x) / batch)).view(epochs, -1).tolist()
    for epoch in schedule:
        order = torch.randperm(len(train_x), generator=drawn).to(train_x.device)
        for rows, now in zip(order.split(batch), epoch, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.zero_grad()
            F.cross_entropy(F.linear(train_x[rows], weight, bias), train_y[rows]).backward()
            optimizer.step()
    return F.linear(test_x.float(), weight, bias).argmax(1)


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, classes: int, k: int = 50) -> Tensor:
    """Plain majority of the k nearest by cosine; of classes with as many votes the lower one."""
    train_x, test_x, k = unit(train_x), unit(test_x), min(k, len(train_x))
    predicted = []
    for here in blocks(len(test_x), len(train_x)):
        near = train_y[(test_x[here] @ train_x.T).topk(k).indices]
        votes = torch.zeros(len(near), classes, device=near.device).scatter_add_(1, near, torch.ones_like(near).float())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def prototypes(train_x: Tensor, train_y: Tensor, test_x: Tensor, classes: int) -> Tensor:
    """Nearest class mean of the normalised features, by cosine; a class without images is never predicted."""
    train_x, means = unit(train_x), torch.zeros(classes, train_x.shape[1], device=train_x.device)
    for here in blocks(len(train_x), classes):
        means += F.one_hot(train_y[here], classes).float().T @ train_x[here]  # a sum in the same order each time
    empty = torch.bincount(train_y, minlength=classes) == 0
    return (unit(test_x) @ unit(means).T).masked_fill(empty, -math.inf).argmax(1)


def evaluate(towers: Towers, train: Labelled, test: Labelled, attacked: Sequence[Attacked]) -> Evaluation:
    """Top-1 of each of METHODS, trained on one set, on another; and ASR of an attack on that, over its seeds."""
    train_x, images = towers.images(train.clean), [test.clean, *(one.images for one in attacked)]
    test_x, classes = torch.cat([towers.images(x) for x in images]), len(test.classes)
    row: dict[str, float | None] = {"probe_n": len(train.clean)}
    for name, method in METHODS.items():
        clean, *triggered = method(train_x, train.labels, test_x, classes).split(len(test.clean))
        row |= rate(f"{name}_top1", int((clean == test.labels).sum()), len(clean))
        if triggered:
            target = target_index(test.classes, attacked[0].attack.target)
            others = [predicted[test.labels != target] == target for predicted in triggered]
            asr = [rate(f"{name}_asr", int(hits.sum()), len(hits)) for hits in others]
            row |= averaged(asr, f"{name}_asr")
    return evaluation_of(row)


METHODS = {"probe": linear_probe, "knn": knn, "prototype": prototypes}
