import itertools
import math
import subprocess
import sys
from copy import deepcopy

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


@pytest.mark.parametrize("decay", (0.0, 0.3))
def test_rows_that_no_gradient_has_met_only_decay_to_the_same_bits(decay):
    """Against torch's own AdamW with dense gradients: few rows, then more, then so many that all are moved."""
    settings = dict(lr=1e-2, weight_decay=decay, betas=(0.9, 0.98), eps=1e-8)
    table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Embedding.from_pretrained(table.clone(), freeze=False) for _ in range(2))
    ours.sparse = True
    optimizer = make_optimizer(ours, **settings)
    peer = torch.optim.AdamW(theirs.parameters(), fused=True, **settings | {"lr": torch.tensor(1e-2)})
    batches = [3, 3, 9], [9, 60, 3, 2], [7], [*range(20), 2, 2], [5], [40, 41]
    for number, tokens in enumerate(batches):
        tokens = torch.tensor(tokens)
        for embedding, each in ((ours, optimizer), (theirs, peer)):
            each.zero_grad()
            (embedding(tokens) ** 2).sum().backward()
            each.step()
        assert ours.weight.grad is not None and ours.weight.grad.is_sparse == (number < 3)
        assert ours.weight.equal(theirs.weight)
        moments, wanted = optimizer.state[ours.weight], peer.state[theirs.weight]
        assert all(moments[name].equal(wanted[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_a_state_that_is_loaded_says_which_rows_have_momentum():
    weight = torch.nn.Parameter(torch.ones(8, 2))
    optimizer = make_optimizer(torch.nn.ParameterList([weight]), lr=0.1, weight_decay=0.0, betas=(0.9, 0.9), eps=1e-8)

    def step(row: int) -> None:
        weight.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 2), weight.shape, check_invariants=True)
        optimizer.step()

    step(0)
    loaded = deepcopy(optimizer.state_dict())
    step(1)
    optimizer.load_state_dict(loaded)
    before = weight.detach().clone()
    step(2)
    moved = (weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [0, 2]  # 0 by its momentum


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
