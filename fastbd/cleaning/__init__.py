"""Cleaning methods, by their names on the command line."""

from __future__ import annotations

from fastbd.cleaning.cleanclip import CleanClip
from fastbd.cleaning.deep_cluster import DeepCluster
from fastbd.cleaning.finetune import Finetune
from fastbd.cleaning.shrink_perturb import ShrinkPerturb
from fastbd.cleaning.supervised import Supervised

METHODS = {
    "finetune": Finetune,
    "cleanclip": CleanClip,
    "shrink_perturb": ShrinkPerturb,
    "deep_cluster": DeepCluster,
    "supervised": Supervised,
}
