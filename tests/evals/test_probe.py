import math

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastbd.evals import metrics
from fastbd.evals.probe import knn, linear_probe, prototypes


@pytest.fixture(params=[metrics.CELLS, 100, 1])
def cells(request, monkeypatch):
    monkeypatch.setattr(metrics, "CELLS", request.param)


@pytest.fixture
def features():
    """Training and test features of three classes that overlap, with labels: [60, 5], [60], [40, 5]."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (60,), generator=random)
    train, test = torch.randn(60, 5, generator=random), torch.randn(40, 5, generator=random)
    return train + 0.5 * torch.eye(5)[labels], labels, test


def numpy_units(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1)[:, None] for x in tensors]


@torch.no_grad()
def test_linear_probe_separates_by_length_alone():
    """As the features are not normalised: two clusters in the same direction."""
    length = torch.cat([torch.linspace(1, 2, 40), torch.linspace(3, 4, 40)])
    labels = torch.arange(80) // 40
    x = length[:, None] * torch.tensor([[0.6, 0.8]])
    assert torch.equal(linear_probe(x, labels, x, 2, epochs=60, batch=16, lr=0.05, seed=0), labels)


def test_linear_probe_has_the_published_settings(features):
    steps = []

    def record(optimizer, *_):
        weight, bias = ((g["params"][0].shape, g["weight_decay"], g["lr"]) for g in optimizer.param_groups)
        assert isinstance(optimizer, torch.optim.AdamW) and weight[:2] == ((3, 5), 0.01) and bias[:2] == ((3,), 0)
        assert weight[2] == bias[2]
        steps.append(weight[2])

    with register_optimizer_step_pre_hook(record):
        linear_probe(*features, 3, epochs=2, batch=25)
    # 60 rows are 3 batches, the last of 10.
    assert steps == pytest.approx([0.0025 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


def test_linear_probe_goes_through_all_rows_in_each_epoch(features, monkeypatch):
    seen, loss = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda x, y: (seen.append(y), loss(x, y))[1])
    train, _, test = features
    linear_probe(train, torch.arange(60), test, 60, epochs=2, batch=25)
    assert [len(y) for y in seen] == [25, 25, 10] * 2
    first, second = torch.cat(seen[:3]).tolist(), torch.cat(seen[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(60)) and first != second


def test_linear_probe_depends_on_its_seed_alone(features):
    short = dict(epochs=1, batch=40)
    state = torch.get_rng_state()
    assert torch.equal(linear_probe(*features, 3, **short, seed=1), linear_probe(*features, 3, **short, seed=1))
    assert not torch.equal(linear_probe(*features, 3, **short, seed=1), linear_probe(*features, 3, **short, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("k", [1, 2, 7, 50, 1000])
def test_knn_is_that_of_a_full_sort(features, cells, k):
    (train, test), labels = numpy_units(features[0], features[2]), features[1].numpy()
    near = labels[np.argsort(-test @ train.T, axis=1)[:, :k]]
    expected = [np.bincount(row, minlength=4).argmax() for row in near]  # equal votes: the lower class
    assert knn(*features, 4, k).tolist() == expected


def test_prototypes_are_class_means(features, cells):
    (train, test), labels = numpy_units(features[0], features[2]), features[1].numpy()
    (means,) = numpy_units(torch.from_numpy(np.stack([train[labels == c].mean(0) for c in range(3)])))
    assert prototypes(*features, 3).tolist() == (test @ means.T).argmax(1).tolist()


def test_a_class_without_images_is_never_predicted():
    one = torch.tensor([[1.0, 0.0]])
    assert prototypes(one, torch.tensor([1]), -one, 3).tolist() == [1]
