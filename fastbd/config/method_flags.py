"""Flags of the cleaning methods, a dataclass each; they stand beside those that all cleanings share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastbd.config.fields import COUNT, FINITE, POSITIVE, ROWS, File, Flag, Range


@dataclass(frozen=True, kw_only=True)
class ParSettings:
    """Train with the image-text loss, and drive the embeddings away from those of the model that is cleaned."""

    tau: Annotated[float, Flag(range=FINITE)] = 2.15
    """Mean squared distance, 0 to 4, up to which images, and captions, are driven from where they were."""
    lr_start: Annotated[float | None, Flag(range=FINITE)] = None
    """First learning rate, from which it goes to --lr in the first half of the run [10 times --lr]; published: 3e-5."""
    gate: Literal["batch", "sample"] = "batch"
    """What is compared with --tau: the mean over a batch, as published, or each pair by itself."""
    distance: Literal["plain", "rotation"] = "plain"
    """The distance as published, or what is left of it after the best rotation of the whole batch, as rotating both
    towers alike changes nothing."""
    frozen_norms: bool = True
    """Leave batch norm its running statistics, which the published program does in effect."""
    train_scale: bool = False
    """Train the temperature too."""


@dataclass(frozen=True, kw_only=True)
class ShrinkPerturbSettings:
    """CleanCLIP from shrunk and disturbed weights."""

    shrink: Annotated[float, Flag(range=FINITE)] = 0.95
    """Factor of the weights."""
    perturb: Annotated[float, Flag(range=FINITE)] = 1e-4
    """Factor of the fresh weights that are added."""


@dataclass(frozen=True, kw_only=True)
class DeepClusterSettings:
    """CleanCLIP, and clusters of the images, or labels, are learnt."""

    clusters: Annotated[int, Flag(range=POSITIVE)] = 1000
    """Clusters of the images."""
    cluster_weight: Annotated[float, Flag(range=FINITE)] = 5.0
    """Weight of the loss that tells them."""
    cluster_labels: Annotated[Path | None, Flag(file=File("file of labels", "*.npy"))] = None
    """Labels in place of clusters, an integer from 0 for each row of the data, in a .npy file or one a line in a text
    file, such as label makes."""


@dataclass(frozen=True, kw_only=True)
class FlaggedSettings:
    """Poisoned pairs that are known: a method whose settings extend these is told of them."""

    flagged: Annotated[int, Flag(range=COUNT, reuse=True)] = 0
    """So many of the pairs to clean with are poisoned pairs of the pre-training data that are known."""
    flagged_by: Annotated[Path | None, Flag(file=ROWS, reuse=True, free_on_resume=True, searched=True)] = None
    """Those that are known are the pairs that this row list of detect --drop leaves out."""


@dataclass(frozen=True, kw_only=True)
class UnlearnSettings(FlaggedSettings):
    """Pull known poisoned pairs apart, and train on the others with the image-text loss."""

    unlearn_weight: Annotated[float, Flag(range=FINITE)] = 1.0
    """Weight of what pulls the known pairs apart."""
    unlearn_target: Annotated[float, Flag(range=Range(-1, 1))] = -1.0
    """Cosine, -1 to 1, that the known pairs are to have."""
