from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from fastbd.data import sheet
from fastbd.data.decode import open_decoder
from fastbd.data.loader import draw_views
from fastbd.data.pairs import Pairs
from fastbd.data.shards import open_beton
from fastbd.kernels.augment import render
from fastbd.poison.plan import Plan


def test_rows_are_taken_from_all_over():
    assert sheet._spread(np.arange(0, 1600, 2), 8).tolist()[::7] == [0, 1598]
    assert sheet._spread(np.arange(3), 8).tolist() == [0, 1, 2] and not len(sheet._spread(np.arange(0), 8))


def test_captions_are_wrapped_between_words():
    text = "a rather long caption of a picture with many things in it, one of them unpronounceable"
    lines = sheet._wrapped(text, 100)
    assert " ".join(lines) == text and len(lines) > 4
    assert all(sheet._font().getlength(line) <= 100 or " " not in line for line in lines)


def test_pixels_are_those_before_normalisation():
    images = torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8)
    plain = draw_views(("plain",), 9, np.arange(2), np.full((2, 2), 9), seed=0, epoch=0)[0]
    assert torch.equal(sheet._pixels(render([*images], plain, 9)), images)


def test_a_sheet_shows_every_view_of_clean_and_poisoned_pairs(study):
    """Each view is on it, pixel for pixel, enlarged to twice its size; the poisoned ones below, with their triggers."""
    beton = open_beton(study / "train.beton")
    pairs = Pairs(beton, open_decoder("pil", 1, "cpu"), 64, Plan.load(study / "train.poison.json"))
    rows, policies = np.arange(len(beton)), ("plain", "auto_augment")
    shown = np.asarray(sheet.samples(pairs, rows, policies, seed=3, text_view=0, count=3))
    clean, planned = (rows[pairs.planned[rows] < 0], rows[pairs.planned[rows] >= 0])
    step = 2 * 64 + sheet.GAP
    for ids, top in ((clean[:1], 30), (planned[:1], 30 + 2 * step + 30)):
        (sources,) = ([*images] for images in pairs.sources([ids]))
        for place, view in enumerate(draw_views(policies, 64, ids, np.array([sources[0].shape[:2]]), seed=3, epoch=0)):
            square = Image.fromarray(render(sources, view, 64, torch.uint8)[0].numpy()).resize(
                (128, 128), Image.NEAREST
            )
            left = sheet.GAP + place * step
            assert np.array_equal(shown[top : top + 128, left : left + 128], np.asarray(square)), (top, place)
    assert shown.shape[0] == 2 * (2 * step + 30) + sheet.GAP  # three pairs are two lines
