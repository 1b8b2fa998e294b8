"""SafeCLIP (Yang et al., arXiv 2310.05862, ICML 2024): pre-training that ties an image to its caption only where the
pair looks safe."""

from __future__ import annotations

import torch
import torch.distributed as td
from torch import Tensor

from fastbd.base.errors import UserError
from fastbd.config.flags import PretrainConfig
from fastbd.methods.losses import masked_mmcl, masked_ssl
from fastbd.methods.method import Embedded, Losses, Method, Training, cosines
from fastbd.methods.objectives import make_objective

SURE, GROWTH, MOST = 0.9, 0.01, 0.85  # as published
FLOOR = 1e-6  # of a variance
SLOW = 0.01  # of the peak rate: published 5e-6 of 5e-4


class SafeClip(Method):
    """warm_epochs of SSL; an epoch of MMCL at a low rate; then MMCL of the safe pairs and SSL of the others.

    Safe are first the pairs whose cosine belongs to the upper of two Gaussians with a posterior above 0.9, then from
    epoch to epoch 1 point more of all pairs, up to 85 %: those with the highest cosines. SSL is CleanCLIP's, where the
    paper compares a view with the nearest neighbour of the other.
    """

    safe: Tensor

    def __init__(self, config: PretrainConfig):
        objective = make_objective(config.objective, config)
        if config.objective != "mmcl_ssl" or not (objective.augments_images and objective.augments_texts):
            raise UserError("--robust safeclip needs both losses, and SSL of both sides: give --objective mmcl_ssl.")
        if 0 < config.epochs <= config.warm_epochs + 1:
            raise UserError(
                f"--epochs {config.epochs} ends before --robust safeclip has found safe pairs: give more epochs, or "
                "fewer --warm-epochs."
            )
        super().__init__(objective, "mmcl_ssl")
        self.warm, self.epochs, self.stage = config.warm_epochs, config.epochs, "ssl"

    def attach(self, training: Training) -> None:
        self.know(training.rows, training.device)
        self.hold("safe", torch.zeros_like(self.known, dtype=torch.bool))

    def variant(self, epoch: int) -> str:
        self.stage = "ssl" if epoch < self.warm else "mmcl" if epoch == self.warm else "split"
        return self.stage

    def begin(self, epoch: int, training: Training) -> None:
        if epoch <= self.warm:
            return
        cosine = cosines(training, training.rows)
        if epoch == self.warm + 1:
            safe = upper_posterior(cosine) > SURE
        else:
            before = float(self.safe.float().mean())
            share = max(before, min(before + GROWTH, MOST))
            safe = torch.zeros_like(self.safe)
            safe[cosine.topk(round(share * len(cosine))).indices] = True
        self.safe.copy_(safe)

    def rates(self, peak: float, *, warmup: int, total: int) -> Tensor:
        rates, steps = super().rates(peak, warmup=warmup, total=total), total // max(1, self.epochs)
        rates[self.warm * steps : (self.warm + 1) * steps] = SLOW * peak
        return rates

    def forward(
        self, embedded: Embedded, group: td.ProcessGroup | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Losses]:
        safe = self.safe[self.places(embedded.rows)]
        none = torch.zeros_like(safe)
        of_mmcl, of_ssl = {"ssl": (none, ~none), "mmcl": (~none, none), "split": (safe, ~safe)}[self.stage]
        gather = self.objective.gather
        (image, *_, image_aug), (text, text_aug), scale = embedded.images, embedded.texts, embedded.log_scale
        mmcl = masked_mmcl(image, text, scale, of_mmcl, gather=gather, group=group)
        ssl_image, ssl_text = (
            masked_ssl(plain, augmented, scale, of_ssl, gather=gather, group=group)
            for plain, augmented in ((image, image_aug), (text, text_aug))
        )
        mmcl_weight, ssl_weight = self.objective.weights[:2] if weights is None else weights[:2]
        loss = mmcl_weight * mmcl + ssl_weight * (ssl_image + ssl_text) / 2
        parts = {"mmcl": mmcl, "ssl_image": ssl_image, "ssl_text": ssl_text}
        return loss, {name: part.detach() for name, part in parts.items()} | {"safe": of_mmcl.float().mean()}


def upper_posterior(x: Tensor, steps: int = 500) -> Tensor:
    """Posterior, float64 [N], of the upper of two Gaussians, fitted to x [N] by expectation maximisation.

    Begins with the quartiles as means, so that it is the same each time.
    """
    x = x.double()
    means, variances = x.quantile(x.new_tensor([0.25, 0.75])), (x.var() + FLOOR).expand(2)
    shares = torch.full_like(means, 0.5)
    for _ in range(steps):
        logs = shares.log() - (x[:, None] - means).square() / (2 * variances) - variances.log() / 2
        posterior = logs.softmax(1)
        counts = posterior.sum(0).clamp(min=1e-6)
        before, means = means, (posterior * x[:, None]).sum(0) / counts
        variances = (posterior * (x[:, None] - means).square()).sum(0) / counts + FLOOR
        shares = counts / counts.sum()
        if (means - before).abs().max() < 1e-9:
            break
    return posterior[:, means.argmax()]
