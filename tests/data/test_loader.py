from __future__ import annotations

import importlib.util
import io
import itertools
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastbd.base import random
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.config import cards
from fastbd.data import loader
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.loader import RECIPES, _ahead, _Rooms, batches, text_lengths
from fastbd.data.pairs import Pairs
from fastbd.data.tokenizer import tokenize
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.constants import CLIP_MEAN, CLIP_STD
from fastbd.kernels.policies import POLICIES, auto_augment
from fastbd.kernels.text_pack import PackedText, room_for
from fastbd.kernels.views import plain
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import TriggerSpec, stamp

ROWS, SIZE, POISONED, VIEWS = 12, 16, (2, 5, 7), 2
CAPTIONS = [f"a thing with {'many ' * i}words" for i in range(ROWS)]
HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
BACKENDS = ["pil", pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed"))]
ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Beton:
    """Noise pictures of 20 x 16 px: the short side is SIZE already, so the clean geometry only cuts 2 px off."""
    path = tmp_path_factory.mktemp("loader") / "pairs.beton"
    rng = np.random.default_rng(0)
    with BetonWriter(path, ROWS, VIEWS, False) as writer:
        for i, caption in enumerate(CAPTIONS):
            jpeg = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(jpeg, "JPEG")
            texts = tokenize([f"view {k} of {i}" for k in range(VIEWS)])
            writer.add(
                jpeg=jpeg.getvalue(),
                width=20,
                height=16,
                tokens=tokenize([caption])[0],
                text_views=texts,
                caption=caption,
                row_id=i,
            )
    return Beton(path)


def plan_for(beton: Beton, geometry: str = "squash") -> Plan:
    attack = Attack(
        rows=POISONED,
        captions=("a banana", "this banana!", "banana"),
        target="banana",
        trigger=TriggerSpec("badnet", patch_size=5),
        geometry=geometry,
        label_consistent=False,
    )
    return Plan(data=beton.fingerprint, total=ROWS, seed=3, attacks=(attack,))


def pairs_of(beton: Beton, plan: Plan | None = None, max_bad: int = 0) -> Pairs:
    return Pairs(beton, open_decoder("pil", 2, "cpu"), SIZE, plan, max_bad)


def base_views(pairs: Pairs, ids, squash: bool = False) -> torch.Tensor:
    (squares,) = (pairs.squares(images, squash) for images in pairs.sources([np.asarray(ids)]))
    return squares


def stored(beton: Beton, row: int) -> Image.Image:
    return Image.open(io.BytesIO(beton.jpeg(row)))


@pytest.mark.parametrize("geometry", ["squash", "crop"])
def test_poisoned_rows_are_fitted_and_stamped_and_the_others_are_not(beton, geometry):
    plan = plan_for(beton, geometry)
    images = base_views(pairs_of(beton, plan), np.arange(ROWS))
    for row in range(ROWS):
        whole = torch.from_numpy(np.array(stored(beton, row)))
        clean = whole[:, 2:18]
        if row in POISONED:
            squash = plain([whole.shape[:2]], SIZE, squash=True)
            fitted = render([whole], squash, SIZE, torch.uint8)[0] if geometry == "squash" else clean
            expected = stamp(fitted[None], plan.attacks[0].trigger, seed=3, ids=[row])[0]
            changed = (images[row] != fitted).any(-1)
            assert 20 <= changed.sum() <= 25  # the patch; noise seldom repeats a pixel
        else:
            expected = clean
        assert torch.equal(images[row], expected), row


def test_two_attacks_stamp_and_fit_their_own_rows(beton):
    first, second = plan_for(beton).attacks[0], plan_for(beton, "crop").attacks[0]
    second = replace(second, trigger=TriggerSpec("nashville"), rows=(0, 6, 7), captions=("x", "y", "z"), target="dog")
    plan = replace(plan_for(beton), attacks=(replace(first, rows=(1, 5), captions=("a", "b")), second))
    pairs, order = pairs_of(beton, plan), np.array([7, 5, 3, 0, 1, 6])
    images = base_views(pairs, order)
    for image, row in zip(images, order, strict=True):
        whole = torch.from_numpy(np.array(stored(beton, row)))
        squash, crop = (render([whole], plain([whole.shape[:2]], SIZE, s), SIZE, torch.uint8)[0] for s in (True, False))
        attack = {5: first, 1: first, 7: second, 0: second, 6: second}.get(int(row))
        fitted = squash if attack is first else crop
        expected = stamp(fitted[None], attack.trigger, seed=3, ids=[row])[0] if attack else fitted
        assert torch.equal(image, expected), row
    assert np.array_equal(pairs.tokens(order), tokenize(["z", "b", CAPTIONS[3], "x", "a", "y"]))


@pytest.mark.parametrize("squash", [False, True])
def test_base_views_have_the_geometry_asked_for(beton, squash):
    """Pillow is the truth: one level off, as its two passes round."""
    for row, image in enumerate(base_views(pairs_of(beton), np.arange(ROWS), squash)):
        picture = stored(beton, row)
        fitted = picture.resize((SIZE, SIZE), Image.BICUBIC) if squash else picture.crop((2, 0, 18, 16))
        assert np.abs(image.int().numpy() - np.asarray(fitted).astype(int)).max() <= 1


def test_poisoned_rows_have_the_captions_of_the_plan(beton):
    plan = plan_for(beton)
    ids = np.array([7, 0, 2])
    pairs = pairs_of(beton, plan)
    assert np.array_equal(pairs.tokens(ids), tokenize(["banana", CAPTIONS[0], "a banana"]))
    for k in range(VIEWS):
        views = pairs.tokens(ids, k)
        assert np.array_equal(views[1], tokenize([f"view {k} of 0"])[0])
        # The stored view of a poisoned row is of its clean caption; the one used is drawn from the plan's.
        assert not np.array_equal(views[0], tokenize([f"view {k} of 7"])[0]) and views[0].max() == 49407
    assert np.array_equal(pairs_of(beton).tokens(ids), tokenize([CAPTIONS[i] for i in ids]))


def test_captions_of_a_plan_are_cleaned(beton):
    """Those of a plan that was written by hand, too, and in both views."""
    plan, ids = plan_for(beton), np.array(POISONED)
    found = []
    for caption in ("the cat’s milk &amp; honey", "the cat's milk & honey"):
        attack = replace(plan.attacks[0], captions=(caption,) * len(ids))
        pairs = pairs_of(beton, replace(plan, attacks=(attack,)))
        found.append([pairs.tokens(ids), *(pairs.tokens(ids, k) for k in range(VIEWS))])
    assert np.array_equal(*found)


def test_a_plan_for_other_data_is_refused(beton):
    other = replace(plan_for(beton), data="0" * 64)
    with pytest.raises(UserError, match=r"other data than .*pairs\.beton"):
        pairs_of(beton, other)


def batches_of(pairs: Pairs, batch_size: int, rows=np.arange(ROWS), **changed):  # noqa: B008
    settings = dict(seed=1, policies=("plain",), text_view=None, world=ONE, epoch=0, start=0) | changed
    return batches(pairs, rows, batch_size, **settings)


def padded(text: PackedText) -> np.ndarray:
    """The captions as rows of 77 tokens."""
    starts = text.starts.tolist()
    rows = [text.tokens[first:end].numpy() for first, end in itertools.pairwise(starts)]
    assert text.positions[: starts[-1]].tolist() == [place for row in rows for place in range(len(row))]
    return np.stack([np.pad(row, (0, 77 - len(row))) for row in rows])


def by_sample(pairs: Pairs, batch_size: int, **changed) -> dict[int, list[np.ndarray]]:
    """What each sample brings into the model in one epoch."""
    found = {}
    for batch in batches_of(pairs, batch_size, **dict(policies=RECIPES["cleanclip"], text_view=0, epoch=4) | changed):
        columns = [view.numpy() for view in batch.views] + np.split(padded(*batch.texts), 2)
        for i, row in enumerate(batch.ids):
            assert row not in found
            found[int(row)] = [column[i] for column in columns]
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(x, y) for row in a for x, y in zip(a[row], b[row], strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sample_is_the_same_in_batches_of_any_size(beton, recipe):
    pairs = pairs_of(beton, plan_for(beton))
    whole = by_sample(pairs, 12, policies=RECIPES[recipe])
    assert sorted(whole) == list(range(ROWS))
    assert same(by_sample(pairs, 3, policies=RECIPES[recipe]), whole)
    later = by_sample(pairs, 12, policies=RECIPES[recipe], epoch=5)
    assert not same(later, whole)  # the next epoch draws others
    assert all(np.array_equal(whole[row][-2], later[row][-2]) for row in whole)  # of the same captions


def test_the_plain_view_is_the_stored_image_cut_and_normalised(beton):
    (batch,) = batches_of(pairs_of(beton), ROWS)
    (view,) = batch.views
    assert view.shape == (ROWS, 3, SIZE, SIZE) and view.is_contiguous(memory_format=torch.channels_last)
    for row, image in zip(batch.ids, view, strict=True):
        levels = np.asarray(stored(beton, row))[:, 2:18] / 255
        wanted = (levels - CLIP_MEAN) / CLIP_STD
        assert np.abs(image.permute(1, 2, 0).numpy() - wanted).max() < 1e-5


def test_triggers_come_before_every_augmentation_and_clean_images_are_augmented_whole(beton):
    plan = plan_for(beton)
    pairs, policies = pairs_of(beton, plan), RECIPES["cleanclip"]
    changed = 0
    for batch in batches_of(pairs, 4, policies=policies, epoch=7):
        u = random.uniform(1, "auto-augment", batch.ids, 5, epoch=7, view=1)
        for k, row in enumerate(batch.ids):
            source = torch.from_numpy(np.array(stored(beton, row)))
            if row in POISONED:
                fitted = render([source], plain([(16, 20)], SIZE, squash=True), SIZE, torch.uint8)
                source = stamp(fitted, plan.attacks[0].trigger, seed=3, ids=[row])[0]
            view = auto_augment(u[k : k + 1], np.array([source.shape[:2]]), SIZE)
            assert torch.equal(batch.views[1][k], render([source], view, SIZE)[0])
            changed += not torch.equal(batch.views[0][k], batch.views[1][k])
    assert changed > ROWS // 2


def test_triggers_on_decoded_images_of_a_gpu_are_those_of_the_host(beton):
    """The kernels, in their interpreter, on images at addresses in main memory."""
    pytest.importorskip("triton")
    pairs, ids = pairs_of(beton, plan_for(beton)), np.array([7, 3, 2])
    whole = [torch.from_numpy(np.array(stored(beton, row))) for row in ids]
    images = pairs._with_triggers(ids, Ragged.of(whole))
    assert images.sizes.tolist() == [[SIZE, SIZE], [16, 20], [SIZE, SIZE]]
    expected = base_views(pairs, ids)
    assert torch.equal(render(images, plain(images.sizes, SIZE), SIZE, torch.uint8), expected)


def test_slip_has_three_different_views(beton):
    for views in by_sample(pairs_of(beton), 6, policies=RECIPES["slip"]).values():
        assert not any(np.array_equal(views[i], views[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_memory_for_views_is_taken_again_when_no_tensor_is_left_over_it():
    rooms = loader._Rooms()
    first, second = (rooms.empty((2, 3), torch.float32) for _ in range(2))
    places = first.data_ptr(), second.data_ptr()
    assert places[0] != places[1]
    part = first.permute(1, 0)[1:]  # keeps it in use
    del first, second
    third = rooms.empty((3, 2), torch.float32)
    assert third.data_ptr() == places[1]
    del part
    assert rooms.empty((6,), torch.float32).data_ptr() == places[0]


def test_only_the_given_rows_are_used(beton):
    assert sorted(by_sample(pairs_of(beton), 2, rows=np.array([1, 3, 8, 10]))) == [1, 3, 8, 10]


def test_resuming_gives_the_tail_of_the_epoch(beton):
    pairs = pairs_of(beton)

    def order(start: int) -> list[list[int]]:
        return [batch.ids.tolist() for batch in batches_of(pairs, 3, start=start)]

    whole = order(0)
    assert len(whole) == 4 and order(1) == whole[1:] and order(3) == whole[3:] and order(4) == []


def test_two_ranks_together_are_one_process(beton):
    pairs = pairs_of(beton, plan_for(beton))
    ranks = [by_sample(pairs, 4, world=World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == ROWS // 2
    assert same(ranks[0] | ranks[1], by_sample(pairs, 4))


def test_captions_come_packed_in_parts_of_as_many_pairs(beton):
    (batch,) = batches_of(pairs_of(beton), 6, rows=np.arange(6), text_view=1, parts=2)
    assert len(batch.texts) == 2
    for text, ids in zip(batch.texts, np.split(batch.ids, 2), strict=True):
        expected = tokenize([CAPTIONS[row] for row in ids] + [f"view 1 of {row}" for row in ids])
        assert np.array_equal(padded(text), expected)
        assert len(text.tokens) == int((expected == 49407).argmax(1).sum()) + 6  # no token of padding


def test_room_for_captions_is_their_mean_and_five_deviations(beton):
    pairs = pairs_of(beton)
    lengths = np.array([len(c.split()) + 2 for c in CAPTIONS])
    of_pairs = text_lengths(pairs, np.arange(ROWS), None)
    assert np.array_equal(of_pairs, lengths[:, None])
    assert text_lengths(pairs, np.arange(3), 1)[:, 1].tolist() == [6, 6, 6]  # view 1 of 0
    room = room_for(of_pairs.sum(1), 100)
    assert room == math.ceil((100 * lengths.mean() + 50 * lengths.std()) / 64) * 64
    (batch,) = batches_of(pairs, 3, rows=np.arange(3), room=room)
    assert len(batch.texts[0].tokens) == room and batch.texts[0].starts[-1] == lengths[batch.ids].sum()


def test_packing_keeps_the_end_token_of_a_caption_with_token_zero(beton):
    """The first token of "!-)" is number 0, as the padding is."""
    plan = plan_for(beton)
    plan = replace(plan, attacks=(replace(plan.attacks[0], rows=(2,), captions=("a banana !-) !-)",)),))
    assert (tokenize(plan.captions)[0, :8] == 0).sum() == 2
    (batch,) = batches_of(pairs_of(beton, plan), 1, rows=np.array([2]))
    assert batch.texts[0].tokens.tolist() == [49406, 320, 8922, 0, 3535, 0, 3535, 49407]


def test_an_error_in_the_maker_reaches_the_consumer(beton):
    class Disk(Exception):
        pass

    def items():
        yield 1
        raise Disk

    ahead = _ahead(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(Disk):
        next(ahead)


@pytest.fixture
def damaged(tmp_path, beton) -> Beton:
    """Images 4, 7 (of the plan) and 11, the last one, are damaged."""
    data = bytearray(beton.path.read_bytes())
    for row in (4, 7, 11):
        start = bytes(data).index(beton.jpeg(row).tobytes())
        data[start : start + 200] = bytes(200)
    (tmp_path / "damaged.beton").write_bytes(data)
    return Beton(tmp_path / "damaged.beton")


def test_a_damaged_image_stops_a_run_that_allows_none(damaged):
    with pytest.raises(UserError, match=r"^image (4|7|11) of .*damaged\.beton cannot be decoded \(unreadable image"):
        list(batches_of(pairs_of(damaged), 3))


def test_more_damaged_images_than_allowed_stop_the_run(damaged):
    with pytest.raises(UserError, match=r"and --max-bad allows 2 such images: the file was damaged"):
        list(batches_of(pairs_of(damaged, max_bad=2), 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_whole_image_stands_in_for_a_damaged_one(damaged, beton, backend, capsys):
    plan = plan_for(beton)
    pairs = Pairs(damaged, open_decoder(backend, 2, "cpu"), SIZE, plan, max_bad=3)
    substitutes, whole = {4: 5, 7: 8, 11: 0}, pairs_of(beton)
    for _ in range(2):
        images = base_views(pairs, np.arange(ROWS))
        for row in range(ROWS):
            expected = base_views(whole, [substitutes.get(row, row)], squash=row in POISONED)
            if row in POISONED:  # a poisoned row stays one
                expected = stamp(expected, plan.attacks[0].trigger, seed=3, ids=[row])
            assert torch.equal(images[row], expected[0]), row
        assert sorted(pairs.bad) == [4, 7, 11]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("cannot be decoded") == 3  # each named once
    assert "image 11 of" in said and "the image of row 0 stands in" in said


@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
def test_ffcv_decodes_and_what_it_cannot_is_replaced(damaged, beton):
    """Its pixels are some levels off; another image of noise would be a hundred."""
    pairs = Pairs(damaged, open_decoder("ffcv", 2, "cpu"), SIZE, max_bad=3)
    rows = np.random.default_rng(0).permutation(ROWS)
    images = torch.cat([pairs.squares(sources) for sources in pairs.sources([rows[:5], rows[5:10], rows[10:]])])
    expected = base_views(pairs_of(beton), [{4: 5, 7: 8, 11: 0}.get(row, row) for row in rows])
    assert (images.int() - expected.int()).abs().float().mean() < 4
    assert sorted(pairs.bad) == [4, 7, 11] and pairs.decoder.decoded == ROWS


def test_substitutes_of_another_size_are_augmented_as_what_they_are(tmp_path):
    """The views are drawn for the size that the file tells, unless the image has another."""
    rng, sizes = np.random.default_rng(0), [(20, 16), (33, 19)]
    with BetonWriter(tmp_path / "two.beton", 2, 0, False) as writer:
        for i, (width, height) in enumerate(sizes):
            jpeg = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(jpeg, "JPEG")
            data = jpeg.getvalue() if i else jpeg.getvalue()[:200]
            writer.add(
                jpeg=data,
                width=width,
                height=height,
                tokens=tokenize(["one"])[0],
                text_views=None,
                caption="one",
                row_id=i,
            )
    beton = Beton(tmp_path / "two.beton")
    (batch,) = batches_of(pairs_of(beton, max_bad=1), 2, rows=np.arange(2), policies=("plain", "simclr"))
    source = torch.from_numpy(np.array(stored(beton, 1)))
    for k, row in enumerate(batch.ids):
        assert torch.equal(batch.views[0][k], render([source], plain([(19, 33)], SIZE), SIZE)[0])
        u = random.uniform(1, "simclr", np.array([row]), POLICIES["simclr"][1], view=1)
        view = POLICIES["simclr"][0](u, np.array([(19, 33)]), SIZE)
        assert torch.equal(batch.views[1][k], render([source], view, SIZE)[0])


def test_the_maker_is_closed_by_its_own_thread():
    """It may hold a CUDA stream, which is a thread's own."""
    closed = []

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(threading.get_ident())

    ahead = _ahead(items(), 2)
    assert next(ahead) == 0
    ahead.close()
    assert len(closed) == 1 and closed[0] != threading.get_ident()


def test_recipes_are_those_of_the_flag():
    assert set(cards.VIEWS) == set(RECIPES)


def test_leaving_early_ends_the_maker_thread(beton):
    before = set(threading.enumerate())
    found = batches_of(pairs_of(beton), 1)
    next(found)
    (maker,) = [t for t in set(threading.enumerate()) - before if "ThreadPool" not in t.name]
    time.sleep(0.05)  # by now the queue is full and the thread waits
    assert maker.is_alive()
    found.close()
    maker.join(2)
    assert not maker.is_alive()


def test_memory_is_taken_again_only_when_nothing_refers_to_it():
    rooms, shape = _Rooms(), (2, 8, 8, 3)
    first, second = rooms.empty(shape, torch.float32), rooms.empty(shape, torch.float32)
    place, part = first.data_ptr(), first[1, :, 2:4]
    assert second.data_ptr() != place
    del first
    assert rooms.empty(shape, torch.float32).data_ptr() not in (place, second.data_ptr())
    del part
    assert rooms.empty(shape, torch.float32).data_ptr() == place
    assert rooms.empty((2, 8, 8, 4), torch.float32).data_ptr() not in (place, second.data_ptr())
