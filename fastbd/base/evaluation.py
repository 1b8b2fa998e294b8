"""A line of metrics.jsonl: what one evaluation measured.

Shares are fractions, not percent, and None where no image was left to measure them on. A share NAME that has an
interval has NAME_low and NAME_high beside it, the ends of its 95 % (Wilson's, from the number of images); where the
images are a sample of the set, also NAME_full_low and NAME_full_high, those of the share on the whole set. Over several
seeds of the trigger, ASR is their mean: NAME_by_seed lists it by seed, and NAME_seeds_low and NAME_seeds_high are the
ends of Student's interval over them. Only the intervals that other code reads by their names are listed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Required, TypedDict, TypeGuard, cast

if TYPE_CHECKING:
    from typing_extensions import ReadOnly  # Python 3.13 has it in typing


class AttackNumbers(TypedDict, total=False):
    """What an evaluation measured of one attack."""

    target: str
    trigger: str

    # Zero-shot classification of triggered images.
    n_asr: int
    """Triggered images that are not of the target class: those of asr and recovery."""
    asr: ReadOnly[float | None]
    """Share taken for the target, of n_asr images."""
    asr_low: float
    asr_high: float
    asr_top3: float | None
    """Share with the target among the first 3."""
    asr_top5: float | None
    asr_top10: float | None
    asr_all: float
    """Share taken for the target, of all n images."""
    asr_all_top3: float
    asr_all_top5: float
    asr_all_top10: float
    recovery: float | None
    """Share of ASR's images that are still given their true class, of n_asr images."""
    recovery_low: float
    recovery_high: float
    triggered_top1: float
    """Share that is given its class, of all n images."""

    # Retrieval of captions by triggered images: share of the images that ...
    asr_par_r1: float
    """have a caption of the target first (PAR's rule)."""
    asr_par_r5: float
    """have one among the first 5."""
    asr_par_r10: float
    asr_cleanclip_r1: float
    """have a caption of the target, or one near to it, first (the rule of CleanCLIP's family)."""
    asr_cleanclip_r5: float
    """have 2 of them among the first 5."""
    asr_cleanclip_r10: float
    """have 5 of them among the first 10."""


class Evaluation(AttackNumbers, total=False):
    """A line, or a part of one.

    Of several attacks it has the numbers of the most successful one, and in `attacks` those of each.
    """

    step: ReadOnly[int]
    """Optimizer steps of the run before it; 0 is the model that a cleaning starts from."""
    epoch: ReadOnly[float]
    """The same in epochs, also within one."""
    seconds: ReadOnly[float]
    """What the evaluation took; 0 where it was that of an earlier run."""
    precision: str
    """Of the towers: fp32, tf32 or bf16."""
    subset: bool
    """True: made between two full ones, on part of the images."""

    # The set.
    set: ReadOnly[str]
    """Its name, with the number of images where they are a sample."""
    data: str
    """Its file."""
    content: str
    """The first 16 digits of the hash of what the file holds."""
    class_list: str
    templates: str
    n_classes: int
    """Classes that the classifier chooses from: guessing is right for one image in so many."""
    n: int
    """Images that were evaluated."""
    population: int
    """Images of the whole set, where n are a sample of them."""

    # Zero-shot classification of clean images.
    top1: ReadOnly[float]
    """Share of n that is given its class."""
    top1_low: float
    top1_high: float
    top3: float
    """Share with its class among the first 3."""
    top5: float
    top10: float
    attacks: list[AttackNumbers]

    # Held-out clean pairs, and with val_batch, modality_gap, alignment and uniformity also the evaluated set.
    val_loss: float
    """Symmetric contrastive loss of a pair, in nats."""
    agreement: float
    """Mean cosine of the plain and the augmented view of an image."""
    drift_image: float
    """Mean squared distance of the normalised embeddings from those before cleaning, 0 to 4."""
    drift_text: float
    drift_image_aligned: float
    """The same after the rotation that brings both embeddings nearest to those."""
    drift_text_aligned: float

    # What `fastbd evaluate` adds.
    checkpoint: str
    """Of the run: last, or an epoch."""
    asr_seed: list[int]
    """Seeds that the triggers were drawn from."""
    geometry: str
    """Of triggered images: squash or crop, or plan where the plan said which."""
    plan: str | None
    """The file of another plan than the run's."""
    classes: list[dict[str, Any]]
    """{class, n, top1, asr} of each class that has images; not in the file."""
    modality_gap: float
    """Distance of the means of the normalised embeddings, 0 to 2."""
    alignment: float
    """Mean squared distance of the normalised pairs, 0 to 4."""
    uniformity: float
    """Log of the mean of exp(-2 d^2) over distances d of pairs of images."""
    val_batch: int
    """Pairs in a batch of val_loss."""

    # Retrieval: share of images with a caption of theirs among the first k, of captions with their image among them.
    captions: int
    i2t_r1: float
    i2t_r5: float
    i2t_r10: float
    t2i_r1: float
    t2i_r5: float
    t2i_r10: float

    # Classifiers on frozen features: top-1, and ASR of the most successful attack.
    probe_n: int
    """Images that they learn from."""
    probe_top1: float
    probe_asr: float
    knn_top1: float
    knn_asr: float
    prototype_top1: float
    prototype_asr: float

    # Rebound: ASR along some steps of fine-tuning on clean pairs.
    rebound_lr: float
    rebound_max: float
    """The highest ASR."""
    rebound_change: float
    """ASR at the end less that at the start."""
    rebound_area: float
    """Mean ASR over the steps."""
    rebound: dict[str, list[float]]
    """{steps, asr, top1}: the course."""


def evaluation_of(numbers: Mapping[str, Any]) -> Evaluation:
    """Return the numbers, which have these names, or those of intervals."""
    return cast(Evaluation, numbers)


def measures_nothing(evaluation: Mapping[str, Any], key: str) -> bool:
    """Return whether a share is 1 whatever the model does: among the first k of k classes or fewer there is each."""
    found = re.fullmatch(r"(asr_)?(all_)?top(\d+)", key)
    return bool(found) and int(found[3]) >= evaluation.get("n_classes", math.inf)


class RecordedEvaluation(Evaluation, total=False):
    """A line that a run's metrics.jsonl holds."""

    step: Required[ReadOnly[int]]
    epoch: Required[ReadOnly[float]]
    seconds: Required[ReadOnly[float]]
    set: Required[ReadOnly[str]]


class AttackedEvaluation(RecordedEvaluation, total=False):
    """One of those that measured ASR."""

    top1: Required[ReadOnly[float]]
    asr: Required[ReadOnly[float]]


def measures_asr(evaluation: RecordedEvaluation) -> TypeGuard[AttackedEvaluation]:
    """Return whether the evaluation was one of an attack, with an image to measure ASR on."""
    return evaluation.get("asr") is not None
