"""Dual encoders and the layouts of their published weights."""

from fastbd.models.clip import CLIP, create
from fastbd.models.weights import read_weights

__all__ = ["CLIP", "create", "read_weights"]
