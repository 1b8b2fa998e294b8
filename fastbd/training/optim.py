"""AdamW with CLIP's two groups, and the temperature's bounds."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

MAX_LOG_SCALE = math.log(100)
TORCH = torch.optim.AdamW


class AdamW(TORCH):
    """torch's, without the decorators that load its compiler only to keep these methods out of it: 2.5 s of a start.

    findings/torch_eager_loads_compiler.sh
    """

    add_param_group = inspect.unwrap(TORCH.add_param_group)
    load_state_dict = inspect.unwrap(TORCH.load_state_dict)
    state_dict = inspect.unwrap(TORCH.state_dict)
    zero_grad = inspect.unwrap(TORCH.zero_grad)
    _update = inspect.unwrap(TORCH.step)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self._update()


def _has_name(name: str) -> bool:
    """As CleanCLIP and Verma et al. group a model's parameters; the latter's heads of clusters are exempt too."""
    return any(part in name for part in ("bn", "ln", "bias", "logit_scale")) or name.startswith(f"{METHOD}.")


METHOD = "method"
EXEMPT: dict[str, Callable[[str, Tensor], bool]] = {
    "vectors": lambda name, parameter: parameter.ndim < 2,
    "names": lambda name, parameter: _has_name(name),
    "biases": lambda name, parameter: "bias" in name,
}
"""Whether a parameter is not decayed, by its name, which is METHOD.NAME for those of a method."""


def make_optimizer(
    model: nn.Module,
    method: nn.Module | None = None,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    exempt: str = "vectors",
) -> AdamW:
    """AdamW of a model and of what a method has beside it; `exempt` is not decayed, a key of EXEMPT.

    Its learning rate is a tensor beside the parameters, which both groups share.
    """
    named = [*model.named_parameters(), *(method.named_parameters(METHOD) if method else ())]
    spared = {name for name, parameter in named if EXEMPT[exempt](name, parameter)}
    groups = [
        {"params": [p for name, p in named if name not in spared], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
    ]
    rate = torch.tensor(lr, device=named[0][1].device)
    return AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True, capturable=rate.is_cuda)


def moments_of(model: nn.Module, state: dict, exempt: str = "vectors") -> dict[str, dict[str, Tensor]]:
    """Return what the saved state of a make_optimizer() holds of each parameter, by the names of the model's.

    Nothing where it was made of others too, as those of a method's head.
    """
    named = list(model.named_parameters())
    spared = {name for name, parameter in named if EXEMPT[exempt](name, parameter)}
    names = [name for name, _ in named if name not in spared], [name for name, _ in named if name in spared]
    places = [group["params"] for group in state["param_groups"]]
    if list(map(len, places)) != list(map(len, names)):
        return {}
    found = zip(itertools.chain(*names), itertools.chain(*places), strict=True)
    return {name: state["state"][place] for name, place in found if place in state["state"]}


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the state of an optimizer of any device, and its settings but the learning rate.

    ValueError where it is of other parameters.
    """
    rate = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        if moments["exp_avg"].shape != parameter.shape or moments["exp_avg_sq"].shape != parameter.shape:
            raise ValueError("a parameter of another shape")
    for group in optimizer.param_groups:
        group |= {"lr": rate, "fused": True, "capturable": rate.is_cuda}


@torch.no_grad()
def clamp_log_scale(log_scale: Tensor) -> None:
    """Keep the temperature's factor within 1 and 100, as CLIP does."""
    log_scale.clamp_(0, MAX_LOG_SCALE)
