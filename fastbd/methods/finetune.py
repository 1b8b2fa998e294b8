"""Fine-tuning on clean pairs with the loss of --objective: the baseline of every cleaning study."""

from __future__ import annotations

from fastbd.config.flags import CleanConfig
from fastbd.methods.method import Method
from fastbd.methods.objectives import make_objective


class Finetune(Method):
    """The plain objective; --no-ssl-image or --no-ssl-text leaves only one modality to the self-supervised one."""

    def __init__(self, config: CleanConfig):
        super().__init__(make_objective(config.objective, config), config.objective)
