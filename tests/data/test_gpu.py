"""The input path on a GPU against the CPU's: the same views to the bit where the same decoder made the pixels."""

from __future__ import annotations

import importlib.util
import io
import os
import tarfile

import numpy as np
import pytest
import torch
from damage import damaged
from PIL import Image

from fastbd.base.dist import World
from fastbd.data import resident
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import BadImage, open_decoder, read
from fastbd.data.decode_dali import is_like
from fastbd.data.loader import RECIPES, batches
from fastbd.data.pairs import Pairs
from fastbd.data.tokenizer import tokenize
from fastbd.kernels import views
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.views import plain
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import TriggerSpec

pytestmark = pytest.mark.gpu
HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
ROWS, SIZE, BATCH = 48, 64, 8
SIZES = [(64, 64), (90, 70), (48, 200), (257, 131), (33, 65), (400, 300)]  # height, width


def smooth(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Few frequencies: what a JPEG keeps whole, whichever decoder reads it."""
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """4:2:0, 4:4:4, progressive and grey files in turn."""
    rng = np.random.default_rng(0)
    kinds = ({}, {"subsampling": 0}, {"progressive": True})
    made = []
    for i in range(ROWS):
        image = smooth(*SIZES[i % len(SIZES)], rng)
        made.append(jpeg(image.convert("L")) if i % 8 == 7 else jpeg(image, **kinds[i % 3]))
    return made


@pytest.fixture(scope="module")
def beton(tmp_path_factory, files) -> Beton:
    path = tmp_path_factory.mktemp("gpu") / "pairs.beton"
    with BetonWriter(path, ROWS, 1, labelled=False) as writer:
        for i, file in enumerate(files):
            height, width = SIZES[i % len(SIZES)]
            writer.add(
                jpeg=file,
                width=width,
                height=height,
                tokens=tokenize([f"thing {i}"])[0],
                text_views=tokenize([f"view {i}"]),
                caption=f"thing {i}",
                row_id=i,
            )
    return Beton(path)


def pairs_of(beton: Beton, decode: str, device: str) -> Pairs:
    attacks = (
        Attack(
            rows=(2, 5, 11),
            captions=("a", "b", "c"),
            target="banana",
            trigger=TriggerSpec("badnet"),
            geometry="squash",
            label_consistent=False,
        ),
        Attack(
            rows=(3, 4),
            captions=("d", "e"),
            target="dog",
            trigger=TriggerSpec("blended"),
            geometry="crop",
            label_consistent=False,
        ),
    )
    plan = Plan(data=beton.fingerprint, total=ROWS, seed=1, attacks=attacks)
    return Pairs(beton, open_decoder(decode, 4, device), SIZE, plan)


def epoch(pairs: Pairs, device: str, policies, dtype=torch.float32) -> list[torch.Tensor]:
    world = World(0, 1, torch.device(device))
    made = batches(
        pairs,
        np.arange(ROWS),
        BATCH,
        seed=2,
        policies=policies,
        text_view=0,
        world=world,
        epoch=3,
        start=0,
        dtype=dtype,
    )
    return [tensor for batch in made for tensor in (*batch.views, *batch.texts[0])]


def views_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of an epoch's tensors that are views of images; token ids are whole numbers."""
    found = [tensor for tensor in tensors if tensor.is_floating_point()]
    assert len(found) == ROWS // BATCH
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_are_the_cpus(beton, recipe):
    want = epoch(pairs_of(beton, "pil", "cpu"), "cpu", RECIPES[recipe])
    got = epoch(pairs_of(beton, "pil", "cuda"), "cuda", RECIPES[recipe])
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.is_cuda and torch.equal(ours.cpu(), theirs)


def test_bf16_views_are_the_rounded_ones(beton):
    want = epoch(pairs_of(beton, "pil", "cpu"), "cpu", ("plain",))
    got = epoch(pairs_of(beton, "pil", "cuda"), "cuda", ("plain",), torch.bfloat16)
    for ours, theirs in zip(views_of(got), views_of(want), strict=True):
        assert torch.equal(ours.cpu(), theirs.to(torch.bfloat16))


@pytest.mark.parametrize("where", ["gpu", "ram"])
@pytest.mark.parametrize("recipe", ["cleanclip", "slip"])
def test_resident_images_give_the_same_views(beton, where, recipe):
    pairs = pairs_of(beton, "pil", "cuda")
    want = epoch(pairs, "cuda", RECIPES[recipe])
    resident.keep(pairs, np.arange(ROWS), where, base=False, world=World(0, 1, torch.device("cuda")), quiet=True)
    decoded = pairs.decoder.decoded
    assert all(torch.equal(a, b) for a, b in zip(epoch(pairs, "cuda", RECIPES[recipe]), want, strict=True))
    assert pairs.decoder.decoded == decoded


def test_batches_are_whole_while_the_gpu_is_busy(beton):
    """The loader's stream and the step's: nothing is read before it is there, or given away while it is read."""
    want = epoch(pairs_of(beton, "pil", "cpu"), "cpu", ("plain",))
    world, load = World(0, 1, torch.device("cuda")), torch.rand(4096, 4096, device="cuda")
    made = batches(
        pairs_of(beton, "pil", "cuda"),
        np.arange(ROWS),
        BATCH,
        seed=2,
        policies=("plain",),
        text_view=0,
        world=world,
        epoch=3,
        start=0,
    )
    kept = []
    for batch in made:
        for _ in range(20):
            load = (load @ load).clamp(-1, 1)
        kept.append(batch.views[0].clone())
        del batch
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(kept, views_of(want), strict=True))


@needs_dali
@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_dali_decodes_on_the_gpu_nearly_what_pillow_does(beton, files, load):
    decoder = open_decoder("dali", 4, "cuda", load)
    order = np.random.default_rng(1).permutation(ROWS)
    streams = [order[first : first + BATCH] for first in range(0, ROWS, BATCH)]

    def one(row: int):
        pytest.fail(f"row {row} went to Pillow")

    for _ in range(2):  # the pipeline is used again
        for ids, images in zip(streams, decoder.stream(beton, streams, one, host=False), strict=True):
            assert isinstance(images, Ragged)
            for k, row in enumerate(ids):
                want = read(np.frombuffer(files[row], np.uint8)).astype(int)
                assert tuple(images.sizes[k]) == want.shape[:2]
                got = pixels(images, k).astype(int)
                assert np.abs(got - want).mean() < 1.5 and np.abs(got - want).max() <= 24, row
    assert decoder.decoded == 2 * ROWS


@needs_dali
@pytest.mark.parametrize("load", [0.0, 1.0])
def test_an_image_does_not_depend_on_its_batch(beton, load):
    """Between these loads the JPEG engines and CUDA share a batch, and which of them takes an image shows in it."""
    decoder, seen = open_decoder("dali", 4, "cuda", load), []
    for order in (np.arange(ROWS), np.random.default_rng(2).permutation(ROWS)):
        streams, found = [order[first : first + BATCH] for first in range(0, ROWS, BATCH)], {}
        for ids, images in zip(streams, decoder.stream(beton, streams, None, host=False), strict=True):
            found |= {int(row): pixels(images, k) for k, row in enumerate(ids)}
        seen.append(found)
    assert all(np.array_equal(seen[0][row], seen[1][row]) for row in range(ROWS))


@needs_dali
@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
@pytest.mark.parametrize("kind", [{}, {"progressive": True}])
def test_pillow_says_which_files_are_damaged_and_the_others_come_to_no_harm(tmp_path, load, kind):
    """Each damaged file has whole ones beside it; what Pillow can read comes from the engines with about its pixels."""
    rng, path = np.random.default_rng(4), tmp_path / "damaged.beton"
    whole = [jpeg(smooth(60, 200 + i, rng), **kind) for i in range(80)]
    broken = [file for file, _ in damaged(whole[0]).values()]
    files = [broken[i // 2] if i % 2 and i // 2 < len(broken) else whole[i] for i in range(80)]
    with BetonWriter(path, len(files), 0, labelled=False) as writer:
        for i, file in enumerate(files):
            writer.add(
                jpeg=file, width=200 + i, height=60, tokens=tokenize([""])[0], text_views=None, caption="a", row_id=i
            )
    bad, refused, beton = set(), set(), Beton(path)

    def one(row: int) -> torch.Tensor:
        try:
            return torch.from_numpy(read(beton.jpeg(row)))
        except BadImage:
            bad.add(row)
            return torch.zeros(1, 1, 3, dtype=torch.uint8)

    decoder, order = open_decoder("dali", 4, "cuda", load), np.split(np.arange(80), 10)
    for ids, images in zip(order, decoder.stream(beton, order, one, host=False), strict=True):
        for k, row in enumerate(ids.tolist()):
            got = pixels(images, k)
            try:
                read(beton.jpeg(row))
            except BadImage:
                refused.add(row)
                continue
            if files[row] is whole[row] or load:
                assert is_like(got, beton.jpeg(row)), row
    assert bad == refused


def test_memory_does_not_grow_with_the_epochs(beton):
    pairs, reserved = pairs_of(beton, "pil", "cuda"), []
    for _ in range(5):
        epoch(pairs, "cuda", RECIPES["cleanclip"])
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]


def test_images_of_many_pixels():
    """More blocks than the second axis of a grid could have."""
    image = torch.randint(0, 256, (4200, 4100, 3), dtype=torch.uint8)
    view = plain(np.array([image.shape[:2]]), SIZE)
    for turn, code in enumerate((views.EQUALIZE, views.SHARPNESS)):
        view.params["before"][:, turn] = views.operation(code, *([1.5] if turn else []))
    assert torch.equal(render([image.cuda()], view, SIZE).cpu(), render([image], view, SIZE))


def pixels(images: Ragged, k: int) -> np.ndarray:
    """Image k of a Ragged: the plain view of its own size is the image."""
    height, width = images.sizes[k].tolist()
    side = max(height, width)
    view = plain(images.sizes[k : k + 1], side)
    view.params["resized"], view.params["window"] = (height, width), 0
    one = Ragged(images.addresses[k : k + 1], images.sizes[k : k + 1], images.device, images.owner)
    return render(one, view, side, torch.uint8)[0, :height, :width].cpu().numpy()


@needs_dali
def test_dali_views_are_near_those_of_pillow(beton):
    """Plain views and triggers: the mean level of a batch moves by less than two; a badnet patch may wrap."""
    near = epoch(pairs_of(beton, "dali", "cuda"), "cuda", ("plain",))
    want = epoch(pairs_of(beton, "pil", "cpu"), "cpu", ("plain",))
    for ours, theirs in zip(views_of(near), views_of(want), strict=True):
        assert (ours.cpu() - theirs).abs().median() < 0.04  # levels are 0.015 apart


@pytest.mark.skipif("FASTBD_JPEGS" not in os.environ, reason="FASTBD_JPEGS names no .tar of image files")
@needs_dali
def test_the_users_files_are_read_or_refused_as_pillow_does(tmp_path):
    """Each file alone: DALI on the GPU gives nearly Pillow's pixels, or the image goes to Pillow."""
    with tarfile.open(os.environ["FASTBD_JPEGS"]) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    checked = 0
    for name, file in found.items():
        try:
            want = read(np.frombuffer(file, np.uint8))
        except BadImage:
            continue
        path = tmp_path / f"{checked}.beton"
        with BetonWriter(path, 1, 0, labelled=False) as writer:
            writer.add(
                jpeg=file,
                width=want.shape[1],
                height=want.shape[0],
                tokens=tokenize([""])[0],
                text_views=None,
                caption="",
                row_id=0,
            )
        decoder = open_decoder("dali", 2, "cuda")
        (images,) = decoder.stream(Beton(path), [np.array([0])], lambda row, w=want: torch.from_numpy(w), host=False)
        got = pixels(images, 0) if isinstance(images, Ragged) else images[0].numpy()
        assert got.shape == want.shape and np.abs(got.astype(int) - want).mean() < 4, name
        checked += 1
    assert checked
