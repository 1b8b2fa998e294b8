import itertools
import math
import subprocess
import sys

import pytest
import torch

from fastbd.base.learning_rates import learning_rates
from fastbd.models import create
from fastbd.training.optim import clamp_log_scale, make_optimizer, restore


def test_schedule_is_warmup_then_cosine_to_zero():
    rate = learning_rates(2.0, warmup=4, total=20).tolist()
    assert rate[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and len(rate) == 20
    assert rate[12] == pytest.approx(1.0)
    assert rate[19] == pytest.approx(1 + math.cos(math.pi * 15 / 16))
    assert all(a > b for a, b in itertools.pairwise(rate[4:]))
    assert learning_rates(2.0, warmup=0, total=2).tolist() == [2.0, 1.0]


def test_a_state_of_another_device_keeps_this_ones_rate_and_flags():
    """load_state_dict brings the saved settings along, among them those that only another device can have."""
    model = create("tiny-rn", 0)
    settings = dict(weight_decay=0.3, betas=(0.9, 0.999), eps=1e-8)
    optimizer = make_optimizer(model, lr=0.1, **settings)
    state = make_optimizer(model, lr=0.7, **settings | {"weight_decay": 0.5}).state_dict()
    for group in state["param_groups"]:
        group |= {"capturable": True, "fused": None, "lr": 0.7}
    restore(optimizer, state)
    one, other = optimizer.param_groups
    assert one["lr"] is other["lr"] and float(one["lr"]) == pytest.approx(0.1)
    assert one["fused"] and not one["capturable"] and (one["weight_decay"], other["weight_decay"]) == (0.5, 0.0)


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


def test_a_step_does_not_load_the_compiler():
    """Which takes 2.5 s and 100 MB: parts of torch load it only to be left alone by it."""
    program = """
import sys
from bench.step import Size, made, our_step
from fastbd.models import create
size, model = Size("tiny-rn", 4, "mmcl_ssl", "fp32"), create("tiny-rn", 0)
step = our_step(size, model, made(size, 32, "cpu"))
step(), step()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
