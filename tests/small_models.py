"""Models for what takes its time even on a tiny one, and for what asks for other sizes than those."""

from __future__ import annotations

from fastbd.models.clip import CLIP, ModelSpec

# The blocks of small-rn10, the first with a stride and the second with another width.
SMALL_RN = ModelSpec(32, 32, 8, (1, 1), None, 32, 1, 2, small=True)


def openai_vit(activation: str) -> CLIP:
    """The smallest vision transformer with the heads that OpenAI's code makes, 64 wide each."""
    return CLIP(ModelSpec(32, 32, 64, (2,), 8, 64, 1, 1, activation=activation))


def openai_rn(activation: str) -> CLIP:
    """The same with a ResNet, whose first stage has two blocks."""
    return CLIP(ModelSpec(32, 32, 4, (2, 1, 1, 1), None, 64, 1, 1, activation=activation))
