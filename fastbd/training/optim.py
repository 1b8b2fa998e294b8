"""AdamW with CLIP's two groups, quick where few rows of an embedding are trained; the temperature's bounds."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

MAX_LOG_SCALE = math.log(100)
MOMENTS = "exp_avg", "exp_avg_sq"
TORCH = torch.optim.AdamW
FEW = 1 / 4  # of a parameter's rows, up to which it is faster to take them out


class AdamW(TORCH):
    """torch's, with the same bits for less memory traffic where a parameter's gradient is sparse.

    A row that has never had a gradient has no momentum either: it only decays, and its moments are not read.
    """

    # As they are without torch's decorators, which load its compiler only to keep them out of it, 2.5 s of a start:
    # findings/torch_eager_loads_compiler.sh
    add_param_group = inspect.unwrap(TORCH.add_param_group)
    state_dict = inspect.unwrap(TORCH.state_dict)
    zero_grad = inspect.unwrap(TORCH.zero_grad)

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._met: dict[Tensor, Tensor] = {}  # by parameter, bool [rows]: those that have had a gradient

    def load_state_dict(self, state_dict: dict) -> None:
        inspect.unwrap(TORCH.load_state_dict)(self, state_dict)
        self._met.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = [
            (parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.is_sparse and self._step_of_rows(parameter, group)
        ]
        for parameter, _ in gradients:
            parameter.grad = None
        inspect.unwrap(TORCH.step)(self)
        for parameter, gradient in gradients:
            parameter.grad = gradient

    def _step_of_rows(self, parameter: Tensor, group: dict) -> bool:
        """Do the step of a parameter with a sparse gradient; or make that dense, for torch's step, and return False."""
        assert parameter.grad is not None, "it has one"
        gradient, state = parameter.grad.coalesce(), self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0), **{name: torch.zeros_like(parameter) for name in MOMENTS}}
        if parameter not in self._met:
            self._met[parameter] = torch.stack([state[name].any(1) for name in MOMENTS]).any(0)
        (new,) = gradient.indices()
        self._met[parameter][new] = True
        (rows,) = self._met[parameter].nonzero(as_tuple=True)
        if len(rows) > FEW * len(parameter):
            parameter.grad = gradient.to_dense()
            return False
        of_rows = torch.zeros_like(parameter[rows]).index_copy_(0, torch.searchsorted(rows, new), gradient.values())
        moved = {"": parameter[rows], **{name: state[name][rows] for name in MOMENTS}}
        adamw(
            [moved[""]], [of_rows], [moved["exp_avg"]], [moved["exp_avg_sq"]], [], [state["step"]], fused=True,
            amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        if group["weight_decay"]:
            parameter *= 1 - float(group["lr"]) * group["weight_decay"]
        for whole, part in ((parameter, moved[""]), *((state[name], moved[name]) for name in MOMENTS)):
            whole.index_copy_(0, rows, part)
        return True


def make_optimizer(*modules: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float):
    """AdamW; biases, norm gains and the temperature (every parameter below 2 dimensions) are not decayed.

    Its learning rate is a tensor beside the parameters, which both groups share.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    decayed, exempt = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    rate = torch.tensor(lr, device=parameters[0].device)
    return AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True, capturable=rate.is_cuda)


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
