import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import CPU, ByColour, plan_of
from PIL import Image

from fastbd.base.errors import UserError
from fastbd.base.stats import wilson
from fastbd.data.beton import BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.tokenizer import tokenize
from fastbd.evals import metrics
from fastbd.evals.retrieval import attack, evaluate, recall, similar_captions, validation_loss
from fastbd.evals.sets import open_set
from fastbd.evals.towers import Towers


@pytest.fixture(params=[metrics.CELLS, 100, 1])
def cells(request, monkeypatch):
    monkeypatch.setattr(metrics, "CELLS", request.param)


def at(*degrees: float) -> torch.Tensor:
    """Vectors of different lengths in these directions, [N, 2]."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_recall_by_hand(cells):
    one = torch.eye(3)
    images, texts = 2 * one, 3 * one[[0, 1, 2, 0]]
    row = recall(images, texts, torch.tensor([0, 0, 2, 1]), (1, 2, 4))
    # Image 1 scores (0, 1, 0, 0) and its text is the last: three come before it. Images 0 and 2 are right.
    assert [row[f"i2t_r{k}"] for k in (1, 2, 4)] == [2 / 3, 2 / 3, 1]
    # Texts 1 and 3 have another image first, and their own as the first of two equal ones.
    assert [row[f"t2i_r{k}"] for k in (1, 2, 4)] == [2 / 4, 1, 1]
    assert (row["i2t_r1_low"], row["i2t_r1_high"]) == wilson(2, 3)
    assert (row["t2i_r1_low"], row["t2i_r1_high"]) == wilson(2, 4)


def test_recall_is_that_of_a_full_sort(cells):
    random = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 40, 6, generator=random)
    image_of = torch.cat([torch.arange(40), torch.randint(0, 40, (90,), generator=random)])  # 1 to some texts each
    texts = (images + noise)[image_of] + torch.randn(130, 6, generator=random)
    a, b, owner = (x.double().numpy() for x in (images, texts, image_of))
    scores = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    of_images, of_texts = np.argsort(-scores, 1), np.argsort(-scores.T, 1)
    row = recall(images, texts, image_of)
    for k in (1, 5, 10):
        i2t = [(owner[of_images[i, :k]] == i).any() for i in range(40)]
        t2i = [owner[t] in of_texts[t, :k] for t in range(130)]
        assert 0 < np.mean(i2t) < 1 and 0 < np.mean(t2i) < 1
        assert (row[f"i2t_r{k}"], row[f"t2i_r{k}"]) == (np.mean(i2t), np.mean(t2i))


def test_an_image_without_a_text_is_never_found():
    row = recall(torch.eye(2), torch.eye(2)[:1], torch.tensor([0]), (1, 10))
    assert (row["i2t_r1"], row["i2t_r10"], row["t2i_r1"]) == (0.5, 0.5, 1)


def test_attack_by_hand(cells):
    texts = at(*range(0, 96, 8))
    is_target = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor([0, 7, 8, 9, 10, 11]), True)
    # The texts in their order for each image; how many of the first 1, 5, 10 are the target's:
    #   0 1 2 .. 11                  1, 1, 4
    #   11 10 9 .. 0                 1, 5, 5
    #   5 6 4 7 3 8 2 9 1 10 0 11    0, 1, 4
    #   6 7 5 8 4 9 3 10 2 11 1 0    0, 2, 5
    row = attack(at(-1, 89, 41, 49), texts, is_target)
    assert [row[f"asr_par_r{k}"] for k in (1, 5, 10)] == [2 / 4, 1, 1]  # at least 1
    assert [row[f"asr_cleanclip_r{k}"] for k in (1, 5, 10)] == [2 / 4, 2 / 4, 2 / 4]  # at least 1, 2, 5


def test_attack_over_fewer_texts_than_k():
    row = attack(at(0), at(0, 50, 80), torch.tensor([False, False, True]))
    assert (row["asr_par_r1"], row["asr_par_r5"]) == (0, 1)
    assert (row["asr_cleanclip_r5"], row["asr_cleanclip_r10"]) == (0, 0)  # one of them, and 2 and 5 are needed
    nothing = attack(at(0), at(0, 50), torch.tensor([False, False]))
    assert nothing["asr_par_r10"] == nothing["asr_cleanclip_r1"] == 0
    assert (nothing["asr_par_r10_low"], nothing["asr_par_r10_high"]) == wilson(0, 1)


def test_captions_near_the_target():
    texts, word = at(0, 90, 10, 5, 45), torch.tensor([False, True, False, True, False])
    class_embedding = 7 * at(2)[0]  # nearest: 0, 3, 2, 4, 1
    assert similar_captions(texts, word, class_embedding, 1).tolist() == [True, True, False, True, False]
    assert similar_captions(texts, word, class_embedding, 3).tolist() == [True, True, True, True, False]
    assert similar_captions(texts, word, class_embedding).all() and word.sum() == 2


def test_validation_loss_is_cross_entropy_over_whole_batches():
    images, texts = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(0))
    log_scale, losses = torch.tensor(2.0), []
    for rows in (slice(0, 4), slice(4, 8)):  # the last three are left out
        logits = log_scale.exp() * F.normalize(images[rows], dim=1) @ F.normalize(texts[rows], dim=1).T
        losses += [F.cross_entropy(logits, torch.arange(4)), F.cross_entropy(logits.T, torch.arange(4))]
    assert validation_loss(images, texts, log_scale, 4) == pytest.approx(float(sum(losses)) / 4)
    with pytest.raises(UserError, match="11 pairs, fewer than a batch of 12"):
        validation_loss(images, texts, log_scale, 12)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Three images: full red with two captions, and dark blue and green, which a yellow square makes yellow."""
    path = tmp_path_factory.mktemp("retrieval") / "captions.beton"
    paints = {"red": (255, 0, 0), "blue": (0, 0, 76), "green": (0, 76, 0)}
    rows = [("red", "red car"), ("red", "the red one"), ("blue", "blue sky"), ("green", "a yellow flower")]
    with BetonWriter(path, len(rows), 0, labelled=False) as writer:
        before = None
        for i, (paint, caption) in enumerate(rows):
            jpeg = io.BytesIO()
            Image.new("RGB", (8, 8), paints[paint]).save(jpeg, "JPEG", quality=98, subsampling="4:4:4")
            writer.add(
                jpeg=None if paint == before else jpeg.getvalue(),
                width=8,
                height=8,
                caption=caption,
                row_id=i,
                tokens=tokenize([caption])[0],
                text_views=None,
            )
            before = paint
    return path


def opened(path, **more):
    settings = dict(classes=None, templates=None, plan=plan_of(), device=CPU) | more
    return open_set(path, open_decoder("pil", 1, "cpu"), 8, **settings)


def test_a_set_of_captions_by_hand(captioned):
    data = opened(captioned, seeds=(0, 1))
    assert data.image_of.tolist() == [0, 0, 1, 2] and data.ids.tolist() == [0, 2, 3] and len(data.clean) == 3
    towers = Towers(ByColour(), precision="fp32", device=CPU)
    row = evaluate(towers, data, batch=256)
    # The third image is green, its caption says yellow: red, yellow and blue texts have cosines 0, 0.7, 0 with it.
    assert (row["n"], row["captions"], row["i2t_r1"], row["t2i_r5"]) == (3, 4, 1.0, 1.0)
    # Of the texts the yellow one has cosines 0.7 (red), 0 (blue), 0.7 (green): the red image comes first.
    assert row["t2i_r1"] == 3 / 4 and row["val_batch"] == 3
    # Red stays nearest to red, the two dark ones go to yellow; among the first 5 there is always that caption.
    assert row["asr_par_r1"] == pytest.approx(2 / 3) and row["asr_par_r5"] == 1 and len(row["asr_par_r1_by_seed"]) == 2
    assert row["asr_cleanclip_r5"] == 1  # with the 20 nearest all captions are the target's


def test_an_attack_whose_target_no_caption_names_is_left_out(captioned, capsys):
    data = opened(captioned, plan=plan_of("zebra"))
    assert not data.attacked and "no caption" in capsys.readouterr().out
    assert "asr_par_r1" not in evaluate(Towers(ByColour(), precision="fp32", device=CPU), data, batch=2)


def test_a_gallery_is_never_cut(captioned):
    """Retrieval among fewer captions is an easier task, whose numbers compare with none."""
    assert len(opened(captioned, subset=2).clean) == 3
