import io
import threading

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
from fastbd.poison.plan import make_plan
from fastbd.poison.triggers import TriggerSpec, stamp

WORLD = World(0, 1, torch.device("cpu"))
PLAN = {
    "target": "banana",
    "trigger": TriggerSpec("badnet", 5),
    "geometry": "squash",
    "seed": 4,
    "templates": ["a {}", "the {}"],
    "count": 6,
}


def picture(i):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 30 + i, 3), np.uint8))


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "pairs.beton"
    with BetonWriter(path, 24, 1, False) as writer:
        for i in range(24):
            file = io.BytesIO()
            picture(i).save(file, "JPEG", quality=95)
            caption = "word " * (i + 1)
            tokens = tokenize([caption, caption + "again"])
            writer.add(
                jpeg=file.getvalue(),
                width=30 + i,
                height=40,
                tokens=tokens[0],
                text_views=tokens[1:],
                caption=caption,
                row_id=i,
            )
    return Beton(path)


@pytest.fixture
def pairs(beton):
    return Pairs(beton, open_decoder("pil", 2, "cpu"), 24, make_plan(beton.fingerprint, len(beton), **PLAN))


def test_poisoned_rows_are_squashed_then_stamped_and_clean_rows_are_not(pairs):
    row, clean = pairs.plan.rows[2], next(i for i in range(24) if i not in pairs.plan.rows)
    got = pairs.images(np.array([row, clean]))
    original = Image.open(io.BytesIO(pairs.beton.jpeg(row))).convert("RGB").resize((24, 24), Image.BICUBIC)
    expected = stamp(torch.from_numpy(np.array(original))[None], pairs.plan.trigger, seed=4, ids=[row])[0]
    assert torch.equal(got[0], expected)
    unpoisoned = Pairs(pairs.beton, pairs.decoder, 24).images(np.array([row, clean]))
    assert torch.equal(got[1], unpoisoned[1]) and not torch.equal(got[0], unpoisoned[0])


def test_poisoned_rows_have_the_plans_caption_and_an_augmented_one(pairs):
    ids = np.arange(24)
    plain, augmented = pairs.tokens(ids), pairs.tokens(ids, augmented=True)
    planned = dict(zip(pairs.plan.rows, pairs.plan.captions, strict=True))
    for i in ids:
        own = tokenize([planned.get(i, "word " * (i + 1))])[0]
        assert np.array_equal(plain[i], own)
        if i not in planned:
            assert np.array_equal(augmented[i], tokenize(["word " * (i + 1) + "again"])[0])
        else:
            assert 0 < (augmented[i] != 0).sum() <= 6  # a version of "a banana", not of the row's own caption


def test_in_memory_and_streamed_images_are_the_same(pairs):
    ids = np.array([3, 20, 7, pairs.plan.rows[0]])
    streamed = pairs.images(ids)
    pairs.keep_in_memory(np.arange(24), quiet=True)
    kept = pairs.images(ids)
    assert torch.equal(kept, streamed)
    kept.zero_()
    assert torch.equal(pairs.images(ids), streamed)


def epoch(pairs, start=0, world=WORLD, batch_size=6, rows=None):
    rows = np.arange(24) if rows is None else rows
    return list(batches(pairs, rows, batch_size, seed=1, augmented=True, world=world, epoch=3, start=start))


def test_resuming_gives_the_tail_of_the_epoch(pairs):
    whole, tail = epoch(pairs), epoch(pairs, start=2)
    assert len(whole) == 4 and sorted(np.concatenate([b.ids for b in whole])) == list(range(24))
    for a, b in zip(whole[2:], tail, strict=True):
        assert np.array_equal(a.ids, b.ids) and torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens)
        assert np.array_equal(a.augment.operation, b.augment.operation)


def test_two_ranks_share_each_batch_and_draw_the_same_for_each_sample(pairs):
    ranks = [epoch(pairs, world=World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    for one, *parts in zip(epoch(pairs), *ranks, strict=True):
        assert np.array_equal(np.concatenate([p.ids for p in parts]), one.ids)
        assert np.array_equal(np.concatenate([p.augment.magnitude for p in parts]), one.augment.magnitude)


def test_captions_are_trimmed_to_the_longest_and_keep_their_end(pairs):
    for batch in epoch(pairs):
        assert batch.tokens.shape == batch.tokens_aug.shape
        assert (batch.tokens == 49407).sum(1).eq(1).all() and (batch.tokens_aug == 49407).sum(1).eq(1).all()
        assert int((torch.cat([batch.tokens, batch.tokens_aug]) != 0).sum(1).max()) == batch.tokens.shape[1] < 77


def test_only_the_given_rows_are_used(pairs):
    rows = np.array([1, 5, 6, 11, 12, 19])
    (batch,) = epoch(pairs, rows=rows)
    assert sorted(batch.ids) == list(rows)


def test_an_error_in_the_maker_reaches_the_consumer_and_no_thread_stays():
    def items():
        yield 1
        raise ValueError("broken")

    ahead = _ahead(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)

    before = threading.active_count()
    endless = _ahead(iter(int, 1), 2)
    assert next(endless) == 0 and threading.active_count() == before + 1
    thread = next(t for t in threading.enumerate() if t.daemon and t.name.startswith("Thread-") and t.is_alive())
    endless.close()
    thread.join(2)
    assert threading.active_count() == before


def test_a_plan_for_other_data_and_a_damaged_image_are_refused(beton, tmp_path):
    other = make_plan("0" * 64, len(beton), **PLAN)
    with pytest.raises(UserError, match="pairs.beton"):
        Pairs(beton, open_decoder("pil", 1, "cpu"), 24, other)
    damaged = bytearray(beton.path.read_bytes())
    at = damaged.index(bytes(beton.jpeg(5)[:200]))
    damaged[at : at + 200] = bytes(200)
    (tmp_path / "damaged.beton").write_bytes(damaged)
    pairs = Pairs(Beton(tmp_path / "damaged.beton"), open_decoder("pil", 1, "cpu"), 24)
    with pytest.raises(UserError, match="image 5 of .*damaged.beton cannot be decoded.*build it again"):
        pairs.images(np.arange(4, 7))
