from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cleanings import cleaning, resumed_after, same, start, state

from fastbd.base.errors import UserError
from fastbd.config.flags import CleanConfig, config_of
from fastbd.methods.deep_cluster import DeepCluster, read_labels
from fastbd.methods.head import Head
from fastbd.methods.method import Embedded

FLAGS = ("--method", "deep_cluster", "--clusters", 12, "--rows", 96)


@pytest.fixture
def here(study, monkeypatch):
    monkeypatch.chdir(study)
    start(study)
    return study


def published(images, texts, images_aug, texts_aug, log_scale, weight, bias, labels):
    """MMCL + SSL + 5 CE as in the program of Verma et al., on normalised embeddings."""
    unit = [x / x.norm(dim=1, keepdim=True) for x in (images, texts, images_aug, texts_aug)]

    def ce(logits, target):
        return -logits.log_softmax(1)[torch.arange(len(target)), target].mean()

    i, t, i_aug, t_aug = unit
    scale, own = log_scale.exp(), torch.arange(len(images))
    mmcl = (ce(scale * i @ t.T, own) + ce(scale * t @ i.T, own)) / 2
    ssl = (ce(scale * i @ i_aug.T, own) + ce(scale * t @ t_aug.T, own)) / 2
    return mmcl + ssl + 5 * ce(i @ weight.T + bias, labels)


def test_loss_and_gradients_are_the_published_ones():
    """The labels are those of the rows of the step, which come in any order."""
    noise = torch.Generator().manual_seed(0)
    vectors = [torch.randn(6, 8, generator=noise).requires_grad_() for _ in range(4)]
    log_scale = torch.tensor(2.0, requires_grad=True)
    method = DeepCluster(config_of(CleanConfig, "deep_cluster")(clusters=3))
    method.head = Head(7, 8, 3, torch.device("cpu"))
    method.know(np.array([2, 3, 5, 7, 11, 13, 17]), torch.device("cpu"))
    method.head.learn(np.array([0, 1, 2, 1, 2, 0, 0]))
    method.head.renew(np.random.default_rng(0), std=1.0)
    images, texts, images_aug, texts_aug = vectors
    step = Embedded([images, images_aug], [texts, texts_aug], log_scale, torch.tensor([17, 5, 2, 13, 3, 11]), [])
    loss, parts = method(step)
    inputs = [*vectors, log_scale, method.head.linear.weight, method.head.linear.bias]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = published(*doubles, torch.tensor([0, 2, 0, 0, 1, 2]))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    of_loss, of_expected = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, doubles)
    torch.testing.assert_close([g.double() for g in of_loss], list(of_expected), rtol=1e-4, atol=1e-5)
    assert set(parts) == {"mmcl", "ssl_image", "ssl_text", "cluster"}


def test_each_epoch_has_clusters_of_its_own_and_a_fresh_head(here, tmp_path):
    run = cleaning(tmp_path / "run", *FLAGS, "--epochs", 1)
    opened = run.opened
    head, optimizer, rows = opened.method.head, opened.step.optimizer, opened.training.rows
    opened.batches(0, 0)
    first = {name: value.clone() for name, value in head.state_dict().items()}
    assert len(first["labels"].unique()) == 12 and not first["linear.bias"].any()
    assert 0.008 < first["linear.weight"].std() < 0.012
    run.train()
    moments = [optimizer.state[p]["exp_avg"] for p in (head.linear.weight, opened.model.text_projection)]
    assert all(m.any() for m in moments)
    opened.batches(1, 0)
    assert [bool(m.any()) for m in moments] == [False, True]
    assert optimizer.state[head.linear.weight]["step"] == 0
    assert not torch.equal(head.linear.weight, first["linear.weight"]) and not head.linear.bias.any()
    # The nearest of their own means: what k-means ends with, here found from the embeddings anew.
    images = torch.nn.functional.normalize(opened.training.embed_images(rows), dim=1)
    means = torch.stack([images[head.labels == k].sum(0) for k in range(12)])
    own = (images @ torch.nn.functional.normalize(means, dim=1).T).argmax(1)
    assert (own == head.labels).float().mean() > 0.95 and not torch.equal(first["labels"], head.labels)


@pytest.mark.parametrize("labelled", [False, True])
def test_two_steps_and_the_rest_are_the_whole(labelled, here, tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(240) % 5)
    flags = (*FLAGS, *(("--cluster-labels", tmp_path / "labels.npy") if labelled else ()))
    whole = cleaning(tmp_path / "whole", *flags)
    whole.train()
    halves = resumed_after(cleaning(tmp_path / "halves", *flags), 2)
    assert 2 <= halves.opened.done < whole.opened.total
    halves.train()
    assert same(state(whole), state(halves))
    assert halves.opened.method.head.linear.out_features == (5 if labelled else 12)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "halves")]
    assert [json.loads(line)["cluster"] for line in logs[0]] == [json.loads(line)["cluster"] for line in logs[1]]


def test_labels_of_a_file_and_their_head_stay(here, tmp_path):
    labels = np.random.default_rng(0).integers(0, 7, 240)
    (tmp_path / "labels.txt").write_text("\n".join(map(str, labels)))
    opened = cleaning(tmp_path / "run", *FLAGS, "--cluster-labels", tmp_path / "labels.txt").opened
    head = opened.method.head
    opened.batches(0, 0)
    before = head.linear.weight.clone()
    opened.batches(1, 0)
    assert torch.equal(head.labels, torch.from_numpy(labels[opened.training.rows]))
    assert torch.equal(head.linear.weight, before) and len(before) == labels.max() + 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "0 1 2", "an integer from 0 for each of the 4 rows"),
        ("a.txt", "0 1 -1 2", "an integer from 0 for each of the 4 rows"),
        ("a.txt", "cat dog 1 2", "a .npy file, or a text file, of integers"),
        ("a.npy", "nothing", "a .npy file, or a text file, of integers"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_a_file_that_holds_no_labels_is_refused(name, content, said, tmp_path):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_labels(tmp_path / name, 4)


def test_more_clusters_than_images_are_refused(here, tmp_path):
    with pytest.raises(UserError, match="--clusters 1000 is more than the 96 images"):
        cleaning(tmp_path / "run", *FLAGS, "--clusters", 1000)
