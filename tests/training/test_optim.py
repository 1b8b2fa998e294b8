import itertools
import math
import subprocess
import sys

import pytest
import torch

from fastbd.base.learning_rates import learning_rates
from fastbd.models import CLIP, create
from fastbd.models.clip import MODELS
from fastbd.models.resnet import ModifiedResNet
from fastbd.training.optim import clamp_log_scale, make_optimizer, restore


def test_schedule_is_warmup_then_cosine_to_zero():
    rate = learning_rates(2.0, warmup=4, total=20).tolist()
    assert rate[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and len(rate) == 20
    assert rate[12] == pytest.approx(1.0)
    assert rate[19] == pytest.approx(1 + math.cos(math.pi * 15 / 16))
    assert all(a > b for a, b in itertools.pairwise(rate[4:]))
    assert learning_rates(2.0, warmup=0, total=2).tolist() == [2.0, 1.0]


def test_the_published_schedule_is_an_epoch_ahead():
    """Of three epochs of three steps: the counter begins at 3, and in the last epoch the cosine rises again."""
    rate = learning_rates(2.0, warmup=5, total=9, ahead=3).tolist()
    half = 2**-0.5
    assert rate == pytest.approx([1.6, 2.0, 2.0, 1 + half, 1.0, 1 - half, 0.0, 1 - half, 1.0])
    longer = learning_rates(2.0, warmup=100, total=9, ahead=3).tolist()
    assert longer[:3] == pytest.approx([0.08, 0.1, 0.12])
    assert all(map(math.isfinite, learning_rates(2.0, warmup=9, total=9, ahead=3).tolist()))


def test_the_published_schedule_of_cleaning_skips_its_warm_up():
    """100,000 pairs by 64 in 20 epochs, warm-up 50: docs/published.md tells of these."""
    shifted, exact = (learning_rates(1.0, warmup=50, total=20 * 1562, ahead=ahead) for ahead in (1562, 0))
    assert (round(shifted[0].item(), 3), exact[0].item()) == (0.994, pytest.approx(0.02))
    assert (round(shifted[-1].item(), 3), round(exact[-1].item(), 3)) == (0.006, 0.0)


def decayed(model, exempt: str, method=None) -> set[str]:
    """Names of the parameters of fewer than two dimensions, and of all that a method has, that are decayed."""
    optimizer = make_optimizer(model, method, lr=0.1, weight_decay=0.3, betas=(0.9, 0.999), eps=1e-8, exempt=exempt)
    of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = [*model.named_parameters(), *(method.named_parameters("method") if method else ())]
    assert len(of) == len(named) and set(of.values()) <= {0.0, 0.3}
    assert all(of[id(p)] for name, p in named if p.ndim >= 2 and not name.startswith("method"))
    return {name for name, p in named if of[id(p)] and (p.ndim < 2 or name.startswith("method"))}


@pytest.fixture(scope="module", params=["rn50", "vit-b-32"])
def large(request) -> CLIP:
    """Its weights are not drawn, which would take seconds."""
    with torch.device("meta"):
        model = CLIP(MODELS[request.param])
    return model.to_empty(device="cpu")


def test_what_is_decayed_by_the_published_names(large):
    convolutional = isinstance(large.visual, ModifiedResNet)
    shortcuts = {f"visual.layer{k}.0.downsample.1.weight" for k in (1, 2, 3, 4)}
    odd = shortcuts if convolutional else {"visual.class_embedding"}
    assert decayed(large, "vectors") == set() and decayed(large, "names") == odd
    numbers = sum(p.numel() for name, p in large.named_parameters() if name in odd)
    assert numbers == (3840 if convolutional else 768)


def test_what_is_decayed_where_only_biases_are_exempt(large):
    odd = decayed(large, "biases")
    gains = {name: p.numel() for name, p in large.named_parameters() if name in odd}
    assert not any("bias" in name for name in gains) and "logit_scale" in gains
    seen = [number for name, number in gains.items() if name.startswith("visual.")]
    assert (len(seen), sum(seen)) == ((55, 26_624) if isinstance(large.visual, ModifiedResNet) else (27, 20_736))


def test_a_head_of_clusters_is_not_decayed_by_the_published_names():
    model, method = create("tiny-rn", 0), torch.nn.Linear(4, 3)
    assert {name for name in decayed(model, "vectors", method) if "method" in name} == {"method.weight"}
    assert not any("method" in name for name in decayed(model, "names", method))
    assert {name for name in decayed(model, "biases", method) if "method" in name} == {"method.weight"}


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
