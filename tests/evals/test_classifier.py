from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbd.base.prompts import read_classes, read_templates
from fastbd.data.tokenizer import tokenize
from fastbd.evals import classifier as of_classifier
from fastbd.evals.classifier import Classifier
from fastbd.evals.metrics import mean_by_class
from fastbd.kernels.text_pack import lengths_of, pack
from fastbd.models import create

CPU = torch.device("cpu")


def prompts_of(classes: int, templates: int) -> np.ndarray:
    forms = read_templates("imagenet80")[:templates]
    return tokenize([form.replace("{}", name) for name in read_classes("imagenet1k")[:classes] for form in forms])


@pytest.mark.parametrize("nodes, parts", [(161, 1), (160, 2), (1, 7)])
def test_it_is_the_mean_of_packed_embeddings(monkeypatch, nodes, parts):
    """However the classes are cut: 7 of them with 5 templates are 161 nodes in one tree."""
    monkeypatch.setattr(of_classifier, "NODES", nodes)
    model, prompts = create("tiny-rn", 0), prompts_of(7, 5)
    classifier = Classifier(prompts, 7, CPU)
    with torch.no_grad():
        found = classifier(model.encode_text)
        torch.testing.assert_close(found, mean_by_class(model.encode_text(pack(prompts)), 7))
    assert found.dtype == torch.float32 and len(classifier.trees) == parts
    assert (classifier.tokens[0] == 161) == (parts == 1)
    assert classifier.tokens[1:] == (lengths_of(prompts).sum(), 35 * 77)


def test_tokens_of_imagenets_prompts():
    """Counted once by sets of beginnings: 328,378 in one tree, 18.8 times fewer than padded."""
    classifier = Classifier(prompts_of(1000, 80), 1000, CPU)
    assert classifier.tokens == (336_561, 769_212, 6_160_000)
    assert max(len(t.tokens) for t in classifier.trees) < 1.1 * of_classifier.NODES
