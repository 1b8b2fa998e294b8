"""Zero-shot accuracy and attack success."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastbd.base.evaluation import Evaluation, evaluation_of
from fastbd.base.prompts import target_index
from fastbd.evals import metrics
from fastbd.evals.classifier import Classifier
from fastbd.evals.sets import Attacked, Labelled
from fastbd.evals.towers import Towers


class ZeroShot:
    """zeroshot() evaluates the towers as they are; one classifier for clean and triggered images."""

    def __init__(self, towers: Towers, data: Labelled):
        self.towers, self.data = towers, data
        self.classifier = Classifier(data.prompts, len(data.classes), towers.device)
        self._built: tuple[int, Tensor] | None = None

    def __call__(self, details: bool = False) -> Evaluation:
        """One row of metrics.jsonl, without step and epoch.

        With several attacks the row has the numbers of the most successful one, and under "attacks" those of each;
        with several seeds their means. `details` add the classes one by one and the geometry of the embeddings.
        """
        began, data = time.perf_counter(), self.data
        images = self.towers.images(data.clean)
        label_ranks = metrics.ranks(self.cosines(images), data.labels)
        about = {"set": data.name, **data.about, "n_classes": len(data.classes)}
        row = {**about, **metrics.accuracy(label_ranks, data.population)}
        attacks = [self._attack(group) for group in data.by_attack()]
        row |= metrics.most_successful([numbers for numbers, _ in attacks])
        if details:
            taken = next((t for numbers, t in attacks if numbers.items() <= row.items()), None)
            row |= metrics.geometry(images, self.weights()[data.labels])
            row["classes"] = metrics.per_class(data.labels, label_ranks == 0, data.classes, taken)
        return evaluation_of({**row, "seconds": round(time.perf_counter() - began, 3)})

    def weights(self) -> Tensor:
        """The classifier, float32 [C, D]: built again when the text tower has changed."""
        version = self.towers.text_version
        if self._built is None or self._built[0] != version:
            self._built = version, self.classifier(self.towers.text)
        return self._built[1]

    def cosines(self, images: Tensor) -> Tensor:
        """Of embeddings [N, D] with the classifier, float32 [N, C]: in bf16 one image in ten would tie."""
        return normalize(images, dim=-1) @ self.weights().T

    def _attack(self, group: Sequence[Attacked]) -> tuple[dict[str, Any], Tensor]:
        """One attack: what it aims at and its success; how many of the seeds make each image the target's, in 0..1."""
        attack, labels = group[0].attack, self.data.labels
        target = target_index(self.data.classes, attack.target)
        rows, taken = [], []
        for one in group:
            cosines = self.cosines(self.towers.images(one.images))
            label_ranks, target_ranks = metrics.ranks(cosines, labels), metrics.ranks(cosines, target)
            rows.append(metrics.attack(label_ranks, target_ranks, labels, target, self.data.population))
            taken.append(target_ranks == 0)
        numbers = {"target": attack.target, "trigger": attack.trigger.name, **metrics.averaged(rows, "asr")}
        return numbers, torch.stack(taken).double().mean(0)
