"""CleanCLIP (Bansal et al., arXiv 2303.03323): fine-tune on clean pairs with MMCL + SSL.

The SSL terms realign each modality by itself, which breaks what ties the trigger to the target.
"""

from __future__ import annotations

from fastbd.config.flags import CleanConfig
from fastbd.methods.method import Method
from fastbd.methods.objectives import make_objective


class CleanClip(Method):
    """Both losses, with the config's weights."""

    def __init__(self, config: CleanConfig):
        super().__init__(make_objective("mmcl_ssl", config), "mmcl_ssl")
