"""Cleaning methods, and defences of pre-training, by their names on the command line."""

from __future__ import annotations

from fastbd.methods.cleanclip import CleanClip
from fastbd.methods.deep_cluster import DeepCluster
from fastbd.methods.finetune import Finetune
from fastbd.methods.par import Par
from fastbd.methods.progressive import Progressive
from fastbd.methods.roclip import RoClip
from fastbd.methods.safeclip import SafeClip
from fastbd.methods.shrink_perturb import ShrinkPerturb
from fastbd.methods.supervised import Supervised
from fastbd.methods.unlearn import Unlearn

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
