import math

import pytest
import torch
import torch.nn.functional as F
from formulas import cyclic, siglip
from torch import nn

from fastbd.base.errors import UserError
from fastbd.config.flags import TrainConfig
from fastbd.methods.objectives import Objective, make_objective


def embeddings(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).float().requires_grad_()


def direct_cross_entropy(rows, columns, scale):
    """The formula written out with loops, in float64."""
    total = 0.0
    for i, row in enumerate(rows.detach().double()):
        scores = [
            scale * (row @ column).item() / (row.norm() * column.norm()).item() for column in columns.detach().double()
        ]
        total += math.log(sum(math.exp(s) for s in scores)) - scores[i]
    return total / len(rows)


def test_mmcl_ssl_is_the_formula_of_the_paper():
    image, text, image_aug, text_aug = (embeddings(5, 7, seed=k) for k in range(4))
    log_scale = torch.tensor(1.3)
    loss, parts = Objective(mmcl_weight=0.5, ssl_weight=2.0)((image, image_aug), (text, text_aug), log_scale)
    s = math.exp(1.3)
    mmcl = (direct_cross_entropy(image, text, s) + direct_cross_entropy(text, image, s)) / 2
    ssl_image, ssl_text = direct_cross_entropy(image, image_aug, s), direct_cross_entropy(text, text_aug, s)
    assert float(parts["mmcl"]) == pytest.approx(mmcl, rel=1e-5)
    assert float(parts["ssl_image"]) == pytest.approx(ssl_image, rel=1e-5)
    assert float(parts["ssl_text"]) == pytest.approx(ssl_text, rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * mmcl + 2.0 * (ssl_image + ssl_text) / 2, rel=1e-5)


def test_ssl_is_one_directional_as_published_and_symmetric_on_request():
    image, aug = embeddings(4, 6, seed=1), embeddings(4, 6, seed=2)
    log_scale = torch.tensor(0.7)
    s = math.exp(0.7)
    forward, backward = direct_cross_entropy(image, aug, s), direct_cross_entropy(aug, image, s)
    assert abs(forward - backward) > 1e-3
    one_way = Objective(0.0, 1.0, ssl_text=False)((image, aug), (image,), log_scale)[0]
    both_ways = Objective(0.0, 1.0, ssl_text=False, ssl_symmetric=True)((image, aug), (image,), log_scale)[0]
    assert one_way.item() == pytest.approx(forward, rel=1e-5)
    assert both_ways.item() == pytest.approx((forward + backward) / 2, rel=1e-5)


@pytest.mark.parametrize("ssl_text", [True, False])
@pytest.mark.parametrize("mmcl_weight", [0.5, 0.0])
def test_with_three_images_ssl_compares_the_last_two(mmcl_weight, ssl_text):
    base, first, second, text, text_aug = (embeddings(5, 7, seed=k) for k in range(5))
    objective = Objective(mmcl_weight=mmcl_weight, ssl_weight=2.0, ssl_text=ssl_text)
    loss, parts = objective((base, first, second), (text, text_aug), torch.tensor(1.3))
    s = math.exp(1.3)
    mmcl = (direct_cross_entropy(base, text, s) + direct_cross_entropy(text, base, s)) / 2
    halves = [direct_cross_entropy(first, second, s)] + [direct_cross_entropy(text, text_aug, s)] * ssl_text
    assert float(parts["ssl_image"]) == pytest.approx(halves[0], rel=1e-5)
    assert set(parts) == {"ssl_image"} | ({"mmcl"} if mmcl_weight else set()) | ({"ssl_text"} if ssl_text else set())
    assert loss.item() == pytest.approx(mmcl_weight * mmcl + 2.0 * sum(halves) / len(halves), rel=1e-5)


def test_aligned_pairs_lose_what_theory_says():
    """n orthonormal pairs at scale s: log(1 + (n - 1) exp(-s))."""
    n, s = 8, 5.0
    loss, _ = Objective()((torch.eye(n) * 3,), (torch.eye(n) * 0.2,), torch.tensor(math.log(s)))
    assert loss.item() == pytest.approx(math.log(1 + (n - 1) * math.exp(-s)), rel=1e-5)


def test_gradient_reaches_temperature_and_every_view():
    views = [embeddings(4, 6, seed=k) for k in range(4)]
    log_scale = torch.tensor(1.0, requires_grad=True)
    Objective(1.0, 1.0)(views[::2], views[1::2], log_scale)[0].backward()
    assert all(v.grad.abs().sum() > 0 for v in views) and log_scale.grad.abs() > 0


def test_names_pick_terms_and_config_weights():
    config = TrainConfig(mmcl_weight=3.0, ssl_weight=4.0, ssl_text=False)
    assert make_objective("mmcl", config) == Objective(3.0, 0.0, ssl_text=False)
    assert make_objective("ssl", config).mmcl_weight == 0
    both, mmcl = make_objective("mmcl_ssl", config), make_objective("mmcl", config)
    assert (both.augments_images, both.augments_texts) == (True, False)
    assert not mmcl.augments_images and not mmcl.augments_texts
    assert make_objective("siglip", TrainConfig()) == Objective(0.0, siglip_weight=0.1)
    assert make_objective("siglip_ssl", TrainConfig()).weights == (0, 1, 0.1, 0)
    assert make_objective("cyclip", TrainConfig()).weights == (1, 0, 0, 0.25)


@pytest.mark.parametrize(
    "change, word",
    [({"ssl_image": False, "ssl_text": False}, "--no-ssl"), ({"mmcl_weight": 0.0, "ssl_weight": 0.0}, "weight")],
)
def test_an_objective_without_any_term_is_refused(change, word):
    with pytest.raises(UserError, match=word):
        make_objective("mmcl_ssl", TrainConfig(**change))


def test_a_missing_weight_is_named_by_its_flag():
    with pytest.raises(UserError, match="positive --siglip-weight or --ssl-weight"):
        make_objective("siglip_ssl", TrainConfig(siglip_weight=0, ssl_weight=0))


@pytest.mark.parametrize("told", [False, True])
def test_siglip_and_cyclic_terms_are_their_formulas(told):
    """Loss, parts and gradients in float64; `told`: by weights on the device, where that of an absent term is idle."""
    views = [embeddings(6, 7, seed=k) for k in range(2)] + [torch.tensor(1.3, requires_grad=True)]
    truth = [x.detach().double().requires_grad_() for x in views]
    terms = {"siglip": siglip(*truth), "cyclic": cyclic(*truth[:2])}
    objective = Objective(0.0, siglip_weight=9 if told else 0.3, cyclic_weight=9 if told else 2.0)
    weights = torch.tensor([5, 5, 0.3, 2.0]) if told else None
    loss, parts = objective(views[:1], views[1:2], views[2], weights=weights)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {name: term.item() for name, term in terms.items()}, rel=1e-5
    )
    true = torch.autograd.grad(0.3 * terms["siglip"] + 2 * terms["cyclic"], truth)
    for found, wanted in zip(torch.autograd.grad(loss, views), true, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


def test_terms_add_up():
    views = [embeddings(6, 7, seed=k) for k in range(4)]
    images, texts, scale = views[::2], views[1::2], torch.tensor(1.3)
    weights = {"mmcl_weight": 0.5, "ssl_weight": 2.0, "siglip_weight": 0.3, "cyclic_weight": 0.7}
    alone = [Objective(**{"mmcl_weight": 0.0} | {name: w})(images, texts, scale)[0] for name, w in weights.items()]
    loss, parts = Objective(**weights)(images, texts, scale)
    torch.testing.assert_close(loss, sum(alone))
    assert list(parts) == ["mmcl", "ssl_image", "ssl_text", "siglip", "cyclic"]


@pytest.mark.parametrize(
    "objective, tower",
    [
        (Objective(0.0, 1.0, ssl_text=False), "text"),
        (Objective(0.0, 1.0, cyclic_weight=0.1, ssl_text=False), None),
        (Objective(0.0, 1.0, siglip_weight=0.1, ssl_image=False), None),
    ],
)
def test_terms_of_both_towers_leave_none_idle(objective, tower):
    assert objective.idle == tower


def train(objective, steps=20, rows=32):
    """Losses of a two-tower model on noise that the towers can learn by heart."""
    torch.manual_seed(0)
    towers = nn.ModuleDict({name: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 24)) for name in "it"})
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    optimizer = torch.optim.AdamW([*towers.parameters(), log_scale], lr=1e-2)
    losses = []
    for _ in range(steps):
        image, text = torch.randn(rows, 16), torch.randn(rows, 16)
        views = [towers["i"](image), towers["t"](text), towers["i"](image + 0.1), towers["t"](text - 0.1)]
        loss = objective(views[::2], views[1::2], log_scale)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_are_those_of_the_formula():
    """Losses to 1e-4 after twenty steps of Adam, which magnifies rounding."""

    def formula(images, texts, log_scale):
        i, ia, t, ta = (F.normalize(x, dim=-1) for x in (*images, *texts))
        target, s = torch.arange(len(i)), log_scale.exp()
        pairs = [(i, t), (t, i), (i, ia), (t, ta)]
        return sum(F.cross_entropy(s * a @ b.T, target) for a, b in pairs) / 2, {}

    losses = train(Objective(1.0, 1.0))
    assert losses == pytest.approx(train(formula), rel=1e-4)
    assert losses[-1] < losses[0]
