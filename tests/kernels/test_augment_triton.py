"""The kernels against the reference, bit for bit; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tables import table
from torch.utils._python_dispatch import TorchDispatchMode

from fastbd.base import random
from fastbd.kernels import augment_reference as reference
from fastbd.kernels import augment_triton, views
from fastbd.kernels.augment import Ragged, render
from fastbd.kernels.policies import POLICIES
from fastbd.kernels.views import View, operation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(23, 31), (16, 16), (29, 13), (3, 45), (1, 1)]  # of several blocks of pixels, of one, and of part of one
COSINE, SINE = int(65536 * np.cos(0.4)), int(65536 * np.sin(0.4))
OPERATIONS = {
    "nothing": operation(views.NONE),
    "posterize": operation(views.POSTERIZE, 0b11110000),
    "solarize": operation(views.SOLARIZE, 100),
    "invert": operation(views.SOLARIZE, 0),
    "brighter": operation(views.BRIGHTNESS, 1.37),
    "darker": operation(views.BRIGHTNESS, 0.21),
    "color": operation(views.COLOR, 0.43),
    "more color": operation(views.COLOR, 1.9),
    "grey": operation(views.COLOR, 0.0),
    "contrast": operation(views.CONTRAST, 1.83),
    "less contrast": operation(views.CONTRAST, 0.28),
    "sharper": operation(views.SHARPNESS, 1.72),
    "smoother": operation(views.SHARPNESS, 0.1),
    "equalize": operation(views.EQUALIZE),
    "autocontrast": operation(views.AUTOCONTRAST),
    "hue": operation(views.HUE, 219),
    "blur": operation(views.BLUR, *views.blur_args(np.array([1.63]))[0].tolist()),
    "blur less": operation(views.BLUR, *views.blur_args(np.array([0.4]))[0].tolist()),
    "rotate": operation(views.AFFINE, COSINE, SINE, -500_000, -SINE, COSINE, 300_000),
    "far away": operation(views.AFFINE, 65536, 0, 1 << 28, 0, 65536, 0),
}


def pictures(sizes: list[tuple[int, int]], seed: int = 0) -> list[torch.Tensor]:
    """Random, low-contrast, two-levelled, one-coloured and smooth images in turn, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    made = []
    for i, (height, width) in enumerate(sizes):
        shape = height, width, 3
        y, x, c = np.mgrid[:height, :width, :3]
        kinds = (
            rng.integers(0, 256, shape),
            rng.integers(90, 131, shape),
            255 * rng.integers(0, 2, shape),
            np.full(shape, rng.integers(256)),
            (5 * x + 3 * y * (c + 1)) % 256,
        )
        made.append(torch.from_numpy(kinds[i % 5].astype(np.uint8)))
    return made


def assert_same(images: list[torch.Tensor], view: View, size: int, *dtypes: torch.dtype) -> None:
    given = [image.to(DEVICE) for image in images]
    for dtype in dtypes:
        want = reference.render(images, view, size, dtype)
        got = augment_triton.render(Ragged.of(given), view, size, dtype)
        assert got.dtype == dtype and got.shape == want.shape and got.stride() == want.stride()
        off = (got.cpu().float() - want.float()).abs().amax(dim=(1, 2, 3))
        assert torch.equal(got.cpu(), want), f"{dtype}: images are off by {off.tolist()}"
    for image, kept in zip(images, given, strict=True):
        assert torch.equal(image, kept.cpu()), "a source was changed"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, images of a few pixels are those of many programs, tiles and blocks, the last ones short."""
    blocks = dict(PIXELS=32, COUNTED_PIXELS=16, COUNTED_TILES=2, LINES=2, OUTPUTS=4)
    blocks |= dict(TILE_ROWS=4, TILE_COLUMNS=4, BYTES=16, ROWS=4)
    for name, value in blocks.items():
        if DEVICE == "cpu":
            monkeypatch.setattr(augment_triton, name, value)


PLAIN = list(itertools.product(("cubic", "linear"), ("crop", "squash"), (torch.uint8, torch.float32, torch.bfloat16)))
USUAL = ("cubic", "crop", torch.float32), ("cubic", "squash", torch.uint8), ("linear", "crop", torch.bfloat16)


@pytest.mark.parametrize("kernel, shape, dtype", table(PLAIN, *USUAL), ids=str)
def test_plain_views(kernel: str, shape: str, dtype: torch.dtype) -> None:
    params = views.plain(np.array(SIZES), 12, shape == "squash").params
    assert_same(pictures(SIZES), View(params, kernel == "cubic"), 12, dtype)


@pytest.mark.parametrize("cubic", [True, False], ids=["cubic", "linear"])
def test_resize_is_pytorchs(cubic: bool) -> None:
    """Up and down, by whole numbers and others, to one pixel and from one; weights have ties at whole ratios."""
    sizes = [(8, 8), (1, 1), (2, 3), (4, 16), (16, 24), (40, 7), (9, 8), (8, 9), (33, 60), (5, 60)]
    images = pictures(sizes)
    params = views.plain(np.array(sizes), 8, squash=True).params
    got = augment_triton.render(Ragged.of([i.to(DEVICE) for i in images]), View(params, cubic), 8, torch.uint8).cpu()
    for image, ours in zip(images, got, strict=True):
        mode = "bicubic" if cubic else "bilinear"
        want = F.interpolate(image.permute(2, 0, 1)[None], (8, 8), mode=mode, antialias=True)[0].permute(1, 2, 0)
        assert torch.equal(ours, want), tuple(image.shape)


def test_boxes_windows_flips() -> None:
    params = views.plain(np.array(SIZES), 12).params
    params["box"][:4] = [(3, 7, 18, 20), (15, 15, 1, 1), (0, 9, 29, 4), (2, 0, 1, 45)]
    params["resized"][:4] = [(12, 12), (12, 31), (25, 12), (14, 19)]
    params["window"][:4] = [(0, 0), (0, 19), (13, 0), (1, 6)]
    params["flip"] = [1, 0, 1, 1, 1]
    assert_same(pictures(SIZES), View(params, cubic=True), 12, torch.uint8)
    assert_same(pictures(SIZES), View(params, cubic=False), 12, torch.float32)


def test_noise_and_erasing() -> None:
    params = views.plain(np.array(SIZES), 16).params
    amplitude = np.float32(0.2).view(np.int32)
    params["noise"] = [
        (amplitude, 17, -5),
        (0, 17, -5),
        (amplitude, -1, 1 << 30),
        (amplitude, 0, 0),
        (amplitude, 17, -5),
    ]
    params["erase"] = [(0, 0, 3, 3), (13, 13, 3, 3), (5, 2, 4, 4), (0, 0, 0, 0), (0, 0, 16, 16)]
    params["flip"] = [1, 0, 0, 1, 0]
    assert_same(pictures(SIZES), View(params, cubic=False), 16, torch.float32, torch.bfloat16)


def test_every_operation() -> None:
    """Each before the resize of one image, and after that of another, of another kind and size."""
    made = np.array(list(OPERATIONS.values()))
    sizes = [SIZES[(i + i // 5) % 5] for i in range(len(made))]
    params = views.plain(np.array(sizes), 9).params
    params["before"][:, 0] = made
    params["after"][:, 3] = np.roll(made, 7)
    assert_same(pictures(sizes), View(params, cubic=False), 9, torch.uint8)


@pytest.mark.full
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    """Before the resize on images of all kinds and sizes, and after it, where the images are square."""
    params = views.plain(np.array(SIZES), 9).params
    params["before"][:, 0] = OPERATIONS[name]
    params["after"][::2, 3] = OPERATIONS[name]
    assert_same(pictures(SIZES), View(params, cubic=False), 9, torch.uint8)


def test_operations_follow_one_another() -> None:
    """Each image draws others; the second is counted on what the first one left."""
    rng = np.random.default_rng(5)
    images = pictures([(int(h), int(w)) for h, w in rng.integers(1, 16, (12, 2))], seed=3)
    params = views.plain(np.array([image.shape[:2] for image in images]), 10).params
    made = np.array(list(OPERATIONS.values()))
    for name in ("before", "after"):
        params[name] = rng.choice(made, params[name].shape)
    params["flip"] = rng.integers(0, 2, len(params))
    assert_same(images, View(params), 10, torch.float32)


def test_addresses_need_not_be_aligned() -> None:
    """As in a decoder's buffer, where one image begins where the other ends."""
    images = pictures([(3, 5), (7, 3), (5, 5)])
    flat = torch.cat([image.flatten() for image in images]).to(DEVICE)
    starts = np.cumsum([0, *(image.numel() for image in images)])[:-1]
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    ragged = Ragged(flat.data_ptr() + starts, sizes, flat.device, flat)
    params = views.plain(sizes, 6).params
    params["before"][:, 0] = OPERATIONS["sharper"]
    got = render(ragged, View(params), 6)
    assert torch.equal(got.cpu(), reference.render(images, View(params), 6, torch.float32))


def test_views_of_images_that_have_their_size() -> None:
    """Nothing is resized, but pieces are cut out and mirrored."""
    sizes = [(12, 12), (12, 40), (31, 12), (20, 20), (12, 13)]
    params = views.plain(np.array(sizes), 12).params
    params["box"][3], params["resized"][3], params["window"][3] = (1, 2, 17, 15), (17, 15), (5, 3)
    params["flip"] = [0, 1, 1, 1, 0]
    params["noise"][1] = np.float32(0.2).view(np.int32), 17, -5
    params["before"][2, 0] = OPERATIONS["equalize"]
    assert_same(pictures(sizes), View(params), 12, torch.uint8, torch.float32)


@pytest.mark.parametrize("cubic", [True, False], ids=["cubic", "linear"])
def test_an_image_far_larger_than_the_others(cubic: bool, small_blocks) -> None:
    """Its programs, few as the others need few, work off many tiles each."""
    sizes = [(5, 5), (6, 4), (4, 4), (21, 13), (4, 7)]
    params = views.plain(np.array(sizes), 7).params
    params["before"][2:, 0] = OPERATIONS["equalize"]
    params["before"][3:, 1] = OPERATIONS["blur less"]
    assert_same(pictures(sizes), View(params, cubic), 7, torch.uint8)


def test_images_of_many_blocks(small_blocks) -> None:
    """Each tile has a program of its own; those of an image count what they have seen in one histogram."""
    sizes = [(9, 12), (8, 8), (11, 7), (10, 10)]
    params = views.plain(np.array(sizes), 11).params
    for i, name in enumerate(("equalize", "contrast", "sharper", "blur")):
        params["before"][i, 0] = OPERATIONS[name]
    params["after"][:, 0], params["flip"] = OPERATIONS["rotate"], [1, 0, 0, 1]
    params["erase"] = 2, 3, 7, 7
    assert_same(pictures(sizes), View(params), 11, torch.float32)


def test_tables_are_the_references() -> None:
    """Of histograms of up to 50 million pixels, with levels that are missing, alone, or one beside the other."""
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 200_000, (24, 3, 256)) * (rng.random((24, 3, 256)) < rng.random((24, 3, 1)))
    counts[:6] //= 1000
    counts[0], counts[1], counts[2] = 0, 0, 0
    counts[0, :, 7], counts[1, :, 99:101], counts[2, :, [0, 255]] = 3, 2, 1
    params = np.zeros(24, views.PARAMS)
    params["before"]["code"][:, 1] = np.resize([views.EQUALIZE, views.AUTOCONTRAST, views.CONTRAST], 24)
    passes, *_ = augment_triton._passes(
        np.zeros(24, np.int64), np.ones((24, 2)), params, "before", 0, torch.device(DEVICE)
    )
    (one,) = passes
    assert one.counted == 24
    words, jobs = augment_triton._upload([params.view(np.int32), one.jobs], torch.device(DEVICE))
    tables = torch.zeros(24, 3, 256, dtype=torch.uint8, device=DEVICE)
    means = torch.zeros(24, dtype=torch.int32, device=DEVICE)
    histograms = torch.from_numpy(counts)
    augment_triton.tables_kernel[(3, 24)](
        jobs, words, histograms.int().to(DEVICE), tables, means, **augment_triton.FUSION
    )
    assert torch.equal(tables[0::3].cpu(), reference.equalize_tables(histograms[0::3]))
    assert torch.equal(tables[1::3].cpu(), reference.autocontrast_tables(histograms[1::3]))
    luma = counts[2::3, 0]
    assert means[2::3].tolist() == [int(mean + 0.5) for mean in (luma * np.arange(256)).sum(1) / luma.sum(1)]


def test_operations_share_a_pass_unless_one_looks_at_other_pixels() -> None:
    turns = [
        ([views.AFFINE, views.EQUALIZE, views.HUE], [0, 0, 0]),
        ([views.EQUALIZE, views.AFFINE, views.HUE], [0, 2, 2]),
        ([views.EQUALIZE, views.COLOR, views.CONTRAST], [0, 0, 2]),
        ([views.BLUR, views.BLUR, views.COLOR], [1, 3, 4]),
        ([views.NONE, views.SHARPNESS, views.BLUR], [0, 0, 1]),
        ([views.AFFINE, views.BLUR, views.AFFINE], [0, 1, 2]),
        ([views.CONTRAST, views.SHARPNESS, views.EQUALIZE], [0, 2, 2]),
    ]
    codes, phases = zip(*turns, strict=True)
    assert augment_triton._phases(np.array(codes)).tolist() == list(phases)


class Started(TorchDispatchMode):
    """What a GPU would start: Triton's kernels, PyTorch's operations but for FREE ones, and the copy to the GPU."""

    FREE = {
        "aten.empty.memory_format",
        "aten.slice.Tensor",
        "aten.view.dtype",
        "aten.permute.default",
        "aten.detach.default",
    }  # these allocate, or look at the same memory in another way

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: bool = True) -> None:
        super().__init__()
        self.names: list[str] = []
        self.variants: set[tuple] = set()
        self.bytes = 0
        kind, upload = type(augment_triton.finish_kernel), augment_triton._upload
        run = kind.run

        def started(kernel, *args, **kwargs):
            self.names.append(kernel.fn.__name__)
            self.variants.add(self.variant(kernel, args, kwargs))
            names, total = list(self.names), self.bytes
            if launch:
                run(kernel, *args, **kwargs)
            self.names, self.bytes = names, total  # an interpreted kernel's own operations do not count

        def uploaded(*args):
            if DEVICE == "cpu":
                self.names.append("copy")
            return upload(*args)

        monkeypatch.setattr(kind, "run", started)
        monkeypatch.setattr(augment_triton, "_upload", uploaded)

    def variant(self, kernel, args: tuple, kwargs: dict) -> tuple:
        """The kernel, and all of its arguments that are compiled into it."""
        parameters = inspect.signature(kernel.fn).parameters
        bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in parameters})
        made = [kernel.fn.__name__]
        for name, value in bound.arguments.items():
            if isinstance(value, torch.Tensor):
                made.append((value.dtype, value.data_ptr() % 16 == 0))
            else:
                compiled = "constexpr" in str(parameters[name].annotation)
                # Triton compiles anew for integers that are 1 and for those that 16 divides.
                made.append(value if compiled or value is None else (value == 1, value % 16 == 0))
        return tuple(made)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if str(function) not in self.FREE and out.numel():
            self.names.append(str(function))
        if str(function).startswith(("aten.empty", "aten.zeros")):
            self.bytes += out.nbytes
        return out


def constants(device: torch.device, size: int) -> None:
    """Make what a process makes once, before anything is counted."""
    augment_triton.noise_levels(device)
    augment_triton.normalisation(device, size)


@pytest.mark.parametrize("policy", ["plain", *POLICIES])
def test_policies_start_few_kernels(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's bytes, from images of odd sizes, of one pixel, and smaller than the view."""
    sizes = np.array([(1, 1), (3, 21), (1, 7), (9, 9), (11, 6), (4, 13), (13, 12), (9, 10)])
    images = pictures([(int(h), int(w)) for h, w in sizes])
    view = views.plain(sizes, 9)
    if policy != "plain":
        draw, count = POLICIES[policy]
        view = draw(random.uniform(5, "started", np.arange(len(sizes)), count), sizes, 9)
    given = Ragged.of([image.to(DEVICE) for image in images])
    constants(given.device, 9)
    with Started(monkeypatch) as started:
        got = augment_triton.render(given, view, 9, torch.float32)
    assert torch.equal(got.cpu(), reference.render(images, view, 9, torch.float32))
    resize = ["weights_kernel", "columns_kernel", "finish_kernel"]
    operate = ["statistics_kernel", "tables_kernel", "operate_kernel"]
    expected = {
        "auto_augment": ["copy", "aten.zeros.default", *operate, *operate, *resize],
        "rand_augment": ["copy", "aten.zeros.default", *operate, *operate, *resize],
        "simclr": ["copy", "aten.zeros.default", *resize, *operate, "blur_kernel", "blur_kernel", "finish_kernel"],
    }.get(policy, ["copy", *resize])
    if DEVICE == "cpu":
        assert started.names == expected
    assert len(started.names) <= 12


def test_kept_images_take_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.stack(pictures([(16, 16)] * 4)).to(DEVICE)
    constants(images.device, 16)
    with Started(monkeypatch) as started:
        augment_triton.render(Ragged.of(images), views.plain(np.full((4, 2), 16), 16), 16, torch.bfloat16)
    assert len(started.names) == 2


def test_a_huge_image_costs_its_own_memory_and_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched here. An int16 weight for each of 2 x 224 rows and columns takes a byte for half a tap."""
    usual = np.tile([[256, 341], [384, 256]], (128, 1))
    constants(torch.device(DEVICE), 224)
    made = []
    for sizes in (usual, np.concatenate([usual[:-1], [[4000, 6000]]])):
        with monkeypatch.context() as patched, Started(patched, launch=False) as started:
            images = Ragged(np.arange(256) << 32, sizes.astype(np.int32), torch.device(DEVICE), None)
            policy, count = POLICIES["rand_augment"]
            view = policy(random.uniform(0, "huge", np.arange(256), count), sizes, 224)
            view.params["before"]["code"][-1] = views.NONE
            augment_triton.render(images, view, 224, torch.bfloat16)
        made.append(started)
    without, huge = made
    assert huge.variants == without.variants
    taps = 2 * 2 * 4000 / 224 + 2  # at most, each way
    rows = 4000 * 224 * 3
    assert huge.bytes - without.bytes < 2 * 224 * taps * 2 + rows


def test_one_image_is_the_same_in_any_batch(small_blocks) -> None:
    sizes = [(9, 14), (5, 5), (1, 1)]
    images, params = pictures(sizes), views.plain(np.array(sizes), 6).params
    params["before"][:, 1] = OPERATIONS["equalize"]
    ragged = Ragged.of([image.to(DEVICE) for image in images])
    whole = augment_triton.render(ragged, View(params), 6, torch.uint8)
    for i, image in enumerate(images):
        alone = augment_triton.render(Ragged.of([image.to(DEVICE)]), View(params[i : i + 1]), 6, torch.uint8)
        assert torch.equal(whole[i], alone[0])
