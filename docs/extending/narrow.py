"""A model: a small ResNet beside a text tower of one layer."""

from fastbd.models.clip import CLIP, ModelSpec


def build(activation):
    """Return a CLIP, or a class derived from it, with new weights at each call.

    What is drawn from the global random state of torch, NumPy or Python is drawn from --seed; a generator of your own
    has to be made anew at each call for two runs of a process to be the same.
    """
    return CLIP(
        ModelSpec(
            image_size=32, embed_dim=48, vision_width=4, vision_layers=(1, 1, 1, 1), patch=None, text_width=32,
            text_layers=1, text_heads=2, activation=activation,
        )
    )  # fmt: skip
