import pytest
import torch

from fastbd.evals.metrics import accuracy, attack, mean_by_class, topk_hits, wilson

# Four images, three classes; the largest entry of each row is the prediction.
LOGITS = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8], [0.7, 0.6, 0.1], [0.1, 0.9, 0.4]])


def test_topk_on_a_matrix_done_by_hand():
    labels = torch.tensor([0, 1, 1, 0])
    # predictions 0, 2, 0, 1: one right; in the first two: rows 0, 1, 2
    assert topk_hits(LOGITS, labels, (1, 2, 5)) == {1: 1, 2: 3, 5: 4}
    row = accuracy(LOGITS, labels)
    assert (row["n"], row["top1"], row["top5"]) == (4, 0.25, 1.0)


def test_attack_leaves_out_the_target_class():
    labels = torch.tensor([0, 1, 1, 2])
    row = attack(LOGITS, labels, target=0)
    # images 1, 2, 3 are not of class 0; image 2 is taken for it; none keeps its class; images 0 and 2 are predicted 0
    assert (row["n_asr"], row["asr"], row["recovery"], row["asr_all"]) == (3, pytest.approx(1 / 3), 0.0, 0.5)
    assert attack(LOGITS, labels, target=1)["recovery"] == 0.5  # images 0 and 3 count; 0 keeps its class


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(0, 0) == (0.0, 1.0)


def test_classifier_normalises_before_and_after_the_mean():
    prompts = torch.tensor([[2.0, 0.0], [0.0, 7.0], [3.0, 0.0], [5.0, 0.0]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]])
    assert torch.allclose(mean_by_class(prompts, 2), expected)
