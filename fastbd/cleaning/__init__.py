"""Cleaning methods, and defences of pre-training, by their names on the command line."""

from __future__ import annotations

from fastbd.cleaning.cleanclip import CleanClip
from fastbd.cleaning.deep_cluster import DeepCluster
from fastbd.cleaning.finetune import Finetune
from fastbd.cleaning.par import Par
from fastbd.cleaning.progressive import Progressive
from fastbd.cleaning.roclip import RoClip
from fastbd.cleaning.safeclip import SafeClip
from fastbd.cleaning.shrink_perturb import ShrinkPerturb
from fastbd.cleaning.supervised import Supervised
from fastbd.cleaning.unlearn import Unlearn

METHODS = {
    "finetune": Finetune,
    "cleanclip": CleanClip,
    "par": Par,
    "shrink_perturb": ShrinkPerturb,
    "deep_cluster": DeepCluster,
    "unlearn": Unlearn,
    "supervised": Supervised,
}
ROBUST = {"roclip": RoClip, "safeclip": SafeClip, "progressive": Progressive}
