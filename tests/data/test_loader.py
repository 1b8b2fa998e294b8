from __future__ import annotations

import io
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.loader import Pairs, _ahead, batches
from fastbd.data.tokenizer import tokenize
from fastbd.dist import World
from fastbd.errors import UserError
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import TriggerSpec, stamp

ROWS, SIZE, POISONED = 12, 16, (2, 5, 7)
CAPTIONS = [f"a thing with {'many ' * i}words" for i in range(ROWS)]
ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Beton:
    """Noise pictures of 20 x 16 px: the short side is SIZE already, so the clean geometry only cuts 2 px off."""
    path = tmp_path_factory.mktemp("loader") / "pairs.beton"
    rng = np.random.default_rng(0)
    with BetonWriter(path, ROWS, 1, False) as writer:
        for i, caption in enumerate(CAPTIONS):
            jpeg = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(jpeg, "JPEG")
            view = tokenize([f"view {i}"])
            writer.add(jpeg=jpeg.getvalue(), width=20, height=16, tokens=tokenize([caption])[0], text_views=view,
                       caption=caption, row_id=i)  # fmt: skip
    return Beton(path)


def plan_for(beton: Beton, geometry: str = "squash") -> Plan:
    attack = Attack(rows=POISONED, captions=("a banana", "this banana!", "banana"), target="banana",
                    trigger=TriggerSpec("badnet", patch_size=5), geometry=geometry, label_consistent=False)  # fmt: skip
    return Plan(data=beton.fingerprint, total=ROWS, seed=3, attacks=(attack,))


def pairs_of(beton: Beton, plan: Plan | None = None) -> Pairs:
    return Pairs(beton, open_decoder("pil", 1, "cpu"), SIZE, plan)


def stored(beton: Beton, row: int) -> Image.Image:
    return Image.open(io.BytesIO(beton.jpeg(row)))


@pytest.mark.parametrize("geometry", ["squash", "crop"])
def test_poisoned_rows_are_fitted_and_stamped_and_the_others_are_not(beton, geometry):
    plan = plan_for(beton, geometry)
    images = pairs_of(beton, plan).images(np.arange(ROWS))
    for row in range(ROWS):
        clean = torch.from_numpy(np.array(stored(beton, row))[:, 2:18])
        squashed = torch.from_numpy(np.array(stored(beton, row).resize((SIZE, SIZE), Image.BICUBIC)))
        if row in POISONED:
            fitted = squashed if geometry == "squash" else clean
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
    images = pairs.images(order)
    for image, row in zip(images, order, strict=True):
        squash = torch.from_numpy(np.array(stored(beton, row).resize((SIZE, SIZE), Image.BICUBIC)))
        crop = torch.from_numpy(np.array(stored(beton, row))[:, 2:18])
        attack = {5: first, 1: first, 7: second, 0: second, 6: second}.get(int(row))
        fitted = squash if attack is first else crop
        expected = stamp(fitted[None], attack.trigger, seed=3, ids=[row])[0] if attack else fitted
        assert torch.equal(image, expected), row
    assert np.array_equal(pairs.tokens(order), tokenize(["z", "b", CAPTIONS[3], "x", "a", "y"]))


def test_poisoned_rows_have_the_captions_of_the_plan(beton):
    plan = plan_for(beton)
    ids = np.array([7, 0, 2])
    pairs = pairs_of(beton, plan)
    assert np.array_equal(pairs.tokens(ids), tokenize(["banana", CAPTIONS[0], "a banana"]))
    views = pairs.tokens(ids, augmented=True)
    assert np.array_equal(views[1], tokenize(["view 0"])[0])
    # The stored view of a poisoned row is of its clean caption; the one used is drawn from the plan's.
    assert not np.array_equal(views[0], tokenize(["view 7"])[0]) and views[0].max() == 49407
    assert np.array_equal(pairs_of(beton).tokens(ids), tokenize([CAPTIONS[i] for i in ids]))


def test_a_plan_for_other_data_is_refused(beton):
    other = replace(plan_for(beton), data="0" * 64)
    with pytest.raises(UserError, match=r"other data than .*pairs\.beton"):
        pairs_of(beton, other)


def test_resident_images_are_those_that_streaming_gives(beton):
    streaming, resident = pairs_of(beton, plan_for(beton)), pairs_of(beton, plan_for(beton))
    rows = np.array([9, 2, 5, 0, 11])
    resident.keep_in_memory(rows, quiet=True)
    picked = np.array([5, 11, 2, 5])
    kept = resident.images(picked)
    assert torch.equal(kept, streaming.images(picked))
    kept.zero_()  # what a step does to its batch does not reach the memory
    assert torch.equal(resident.images(picked), streaming.images(picked))


def padded(tokens: torch.Tensor) -> np.ndarray:
    return np.pad(tokens.numpy(), ((0, 0), (0, 77 - tokens.shape[1])))


def by_sample(pairs: Pairs, batch_size: int, rows=np.arange(ROWS), **changed) -> dict[int, list[np.ndarray]]:  # noqa: B008
    """What each sample brings into the model in one epoch."""
    settings = dict(seed=1, second_images=True, second_texts=True, world=ONE, epoch=4, start=0) | changed
    found = {}
    for batch in batches(pairs, rows, batch_size, **settings):
        columns = (batch.images.numpy(), padded(batch.tokens), padded(batch.tokens_aug), batch.augment.operation,
                   batch.augment.magnitude)  # fmt: skip
        for i, row in enumerate(batch.ids):
            assert row not in found
            found[int(row)] = [column[i] for column in columns]
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(x, y) for row in a for x, y in zip(a[row], b[row], strict=True))


def test_a_sample_is_the_same_in_batches_of_any_size(beton):
    pairs = pairs_of(beton, plan_for(beton))
    whole = by_sample(pairs, 12)
    assert sorted(whole) == list(range(ROWS))
    assert same(by_sample(pairs, 3), whole)
    later = by_sample(pairs, 12, epoch=5)
    # The next epoch draws other augmentations of the same images and captions.
    assert all(np.array_equal(x, y) for row in whole for x, y in zip(whole[row][:3], later[row][:3], strict=True))
    assert not same(later, whole)


def test_only_the_given_rows_are_used(beton):
    assert sorted(by_sample(pairs_of(beton), 2, rows=np.array([1, 3, 8, 10]))) == [1, 3, 8, 10]


def test_resuming_gives_the_tail_of_the_epoch(beton):
    pairs = pairs_of(beton)

    def order(start: int) -> list[list[int]]:
        found = batches(
            pairs, np.arange(ROWS), 3, seed=1, second_images=False, second_texts=False, world=ONE, epoch=0, start=start
        )
        return [batch.ids.tolist() for batch in found]

    whole = order(0)
    assert len(whole) == 4 and order(1) == whole[1:] and order(3) == whole[3:] and order(4) == []


def test_two_ranks_together_are_one_process(beton):
    pairs = pairs_of(beton, plan_for(beton))
    ranks = [by_sample(pairs, 4, world=World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == ROWS // 2
    assert same(ranks[0] | ranks[1], by_sample(pairs, 4))


def test_trimming_keeps_the_end_token_and_both_views_of_one_length(beton):
    (batch,) = batches(
        pairs_of(beton), np.arange(3), 3, seed=0, second_images=True, second_texts=True, world=ONE, epoch=0, start=0
    )
    # "a thing with many many words" has 6 words; with start and end, 8 tokens.
    assert batch.tokens.shape == batch.tokens_aug.shape == (3, 8)
    assert (batch.tokens == 49407).sum(1).tolist() == [1, 1, 1] == (batch.tokens_aug == 49407).sum(1).tolist()


def test_trimming_keeps_the_end_token_of_a_caption_with_token_zero(beton):
    """The first token of "!-)" is number 0, as the padding is."""
    plan = plan_for(beton)
    plan = replace(plan, attacks=(replace(plan.attacks[0], rows=(2,), captions=("a banana !-) !-)",)),))
    assert (tokenize(plan.captions)[0, :8] == 0).sum() == 2
    pairs = pairs_of(beton, plan)
    (batch,) = batches(
        pairs, np.array([2]), 1, seed=0, second_images=False, second_texts=False, world=ONE, epoch=0, start=0
    )
    assert batch.tokens.tolist() == [[49406, 320, 8922, 0, 3535, 0, 3535, 49407]]


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


def test_a_damaged_image_is_named(tmp_path, beton):
    data = bytearray(beton.path.read_bytes())
    start = bytes(data).index(beton.jpeg(4).tobytes())
    data[start : start + 200] = bytes(200)
    (tmp_path / "damaged.beton").write_bytes(data)
    pairs = pairs_of(Beton(tmp_path / "damaged.beton"))
    with pytest.raises(UserError, match=r"image 4 of .*damaged\.beton"):
        list(
            batches(
                pairs, np.arange(ROWS), 3, seed=1, second_images=False, second_texts=False, world=ONE, epoch=0, start=0
            )
        )


def test_leaving_early_ends_the_maker_thread(beton):
    before = set(threading.enumerate())
    found = batches(
        pairs_of(beton),
        np.arange(ROWS),
        1,
        seed=0,
        second_images=False,
        second_texts=False,
        world=ONE,
        epoch=0,
        start=0,
    )
    next(found)
    (maker,) = [t for t in set(threading.enumerate()) - before if "ThreadPool" not in t.name]
    time.sleep(0.05)  # by now the queue is full and the thread waits
    assert maker.is_alive()
    found.close()
    maker.join(2)
    assert not maker.is_alive()
