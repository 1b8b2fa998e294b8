"""Cleaning methods, by their names on the command line."""

from __future__ import annotations

from fastbd.cleaning.cleanclip import CleanClip
from fastbd.cleaning.finetune import Finetune
from fastbd.cleaning.par import Par

METHODS = {"finetune": Finetune, "cleanclip": CleanClip, "par": Par}
