import math

import pytest
import torch

from fastbd.models import create
from fastbd.optim import clamp_log_scale, learning_rate, make_optimizer


def test_schedule_is_warmup_then_cosine_to_zero():
    rate = [learning_rate(s, peak=2.0, warmup=4, total=20) for s in range(21)]
    assert rate[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rate[4] == 2.0
    assert rate[12] == pytest.approx(1.0)
    assert rate[20] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(rate[4:], rate[5:], strict=False))


def test_weight_decay_spares_biases_norms_and_temperature():
    model = create("tiny-rn", 0)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.3, betas=(0.9, 0.999), eps=1e-8)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = (
            name.endswith("bias") or "bn" in name or "ln_" in name or "downsample.1" in name or name == "logit_scale"
        )
        assert decay[id(parameter)] == (0.0 if exempt else 0.3), name


def test_temperature_is_kept_between_1_and_100():
    for start, end in ((-1.0, 0.0), (9.0, math.log(100)), (2.0, 2.0)):
        log_scale = torch.tensor(start)
        clamp_log_scale(log_scale)
        assert float(log_scale) == pytest.approx(end)
