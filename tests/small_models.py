"""Models for what takes its time even on a tiny one: compiling, and training until something is learnt."""

from __future__ import annotations

from fastbd.models.clip import ModelSpec

# The blocks of small-rn10, the first with a stride and the second with another width.
SMALL_RN = ModelSpec(32, 32, 8, (1, 1), None, 32, 1, 2, small=True)
