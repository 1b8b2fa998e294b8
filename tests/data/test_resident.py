from __future__ import annotations

import ctypes
import io
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.data import resident
from fastbd.data.beton import Beton, BetonWriter
from fastbd.data.decode import open_decoder
from fastbd.data.loader import RECIPES, batches
from fastbd.data.pairs import Pairs
from fastbd.data.tokenizer import tokenize
from fastbd.poison.plan import Attack, Plan
from fastbd.poison.triggers import TriggerSpec

ROWS, SIZE = 9, 16
ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def beton(tmp_path) -> Beton:
    """Noise pictures, each of another size."""
    rng = np.random.default_rng(0)
    with BetonWriter(tmp_path / "pairs.beton", ROWS, 1, False) as writer:
        for i in range(ROWS):
            jpeg, width, height = io.BytesIO(), 20 + i, 30 - i
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(jpeg, "JPEG")
            writer.add(
                jpeg=jpeg.getvalue(),
                width=width,
                height=height,
                tokens=tokenize(["one"])[0],
                text_views=tokenize(["two"]),
                caption="one",
                row_id=i,
            )
    return Beton(tmp_path / "pairs.beton")


def base_views(pairs: Pairs, ids, squash: bool = False) -> torch.Tensor:
    (squares,) = (pairs.squares(images, squash) for images in pairs.sources([np.asarray(ids)]))
    return squares


def pairs_of(beton: Beton, max_bad: int = 0, seed: int = 3) -> Pairs:
    attack = Attack(
        rows=(2, 5),
        captions=("a banana", "banana"),
        target="banana",
        geometry="squash",
        trigger=TriggerSpec("badnet", patch_size=5),
        label_consistent=False,
    )
    plan = Plan(data=beton.fingerprint, total=ROWS, seed=seed, attacks=(attack,))
    return Pairs(beton, open_decoder("pil", 2, "cpu"), SIZE, plan, max_bad)


def epoch(pairs: Pairs, rows: np.ndarray, policies, number: int) -> list[torch.Tensor]:
    settings = dict(seed=1, policies=policies, text_view=0, world=ONE, epoch=number, start=0)
    return [x for batch in batches(pairs, rows, 3, **settings) for x in (*batch.views, *batch.texts[0])]


def alike(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("policies", [("plain",), *RECIPES.values()])
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_epochs_decode_nothing_and_are_those_of_streaming(beton, policies, where):
    rows = np.array([0, 2, 3, 5, 6, 8])
    kept, streaming = pairs_of(beton), pairs_of(beton)
    base = set(policies) <= {"plain", "light"}
    said = resident.keep(kept, rows, where, base=base, world=ONE, quiet=True)
    assert f"--resident {where}" in said and kept.decoder.decoded == len(rows)
    for number in (3, 4):
        assert alike(epoch(kept, rows, policies, number), epoch(streaming, rows, policies, number))
        base_views(kept, rows)
    assert kept.decoder.decoded == len(rows) and streaming.decoder.decoded == 2 * len(rows)
    # Only what the views are made from, and nothing else.
    sizes = [SIZE * SIZE if base or row in (2, 5) else (20 + row) * (30 - row) for row in rows]
    assert kept.resident.pixels.numel() == 3 * sum(sizes)
    with pytest.raises(IndexError):
        base_views(kept, [2, 4])


@pytest.mark.parametrize("policies", [RECIPES["cleanclip"], ("auto_augment", "plain", "light")], ids=str)
def test_plain_views_beside_whole_images_are_those_of_streaming(beton, monkeypatch, policies):
    data = bytearray(beton.path.read_bytes())
    start = bytes(data).index(beton.jpeg(4).tobytes())
    data[start : start + 200] = bytes(200)
    beton.path.write_bytes(data)
    rows = np.array([0, 2, 4, 5, 6, 8])
    kept, streaming = pairs_of(Beton(beton.path), max_bad=1), pairs_of(Beton(beton.path), max_bad=1)
    resident.keep(kept, rows, "ram", base=False, beside=True, world=ONE, quiet=True)
    for number in (3, 4):
        assert alike(epoch(kept, rows, policies, number), epoch(streaming, rows, policies, number))
    assert torch.equal(kept.resident_squares.pixels.view(-1, SIZE, SIZE, 3), base_views(streaming, rows))
    before = epoch(kept, rows, policies, 5)
    kept.resident_squares.pixels.zero_()
    changed = [not torch.equal(old, new) for old, new in zip(before, epoch(kept, rows, policies, 5), strict=True)]
    views = len(policies)
    assert np.array(changed).reshape(2, -1)[:, :views].tolist() == 2 * [[policy == "plain" for policy in policies]]


@pytest.mark.parametrize(("where", "times", "kept"), [("auto", 4, True), ("ram", 4, True), ("ram", 3.9, False)])
def test_plain_views_are_kept_where_all_fills_a_quarter_of_the_free_memory(beton, monkeypatch, where, times, kept):
    rows = np.array([0, 1, 3])
    need = sum(3 * (20 + row) * (30 - row) for row in rows.tolist()) + 3 * len(rows) * SIZE**2
    monkeypatch.setattr(resident, "free_memory", lambda: int(times * need))
    pairs = pairs_of(beton)
    said = resident.keep(pairs, rows, where, base=False, beside=True, world=ONE, quiet=True)
    assert pairs.where == "ram" and (pairs.resident_squares is not None) == kept
    assert said.endswith("GB of base views") == kept
    without = pairs_of(beton)
    resident.keep(without, rows, where, base=False, world=ONE, quiet=True)
    assert without.resident is not None and without.resident_squares is None


def test_addresses_are_those_of_the_images(beton):
    """As a GPU reads them; here in main memory."""
    data = bytearray(beton.path.read_bytes())
    start = bytes(data).index(beton.jpeg(4).tobytes())
    data[start : start + 200] = bytes(200)
    beton.path.write_bytes(data)
    pairs, rows = pairs_of(Beton(beton.path), max_bad=1), np.arange(1, ROWS)
    resident.keep(pairs, rows, "ram", base=False, world=ONE, quiet=True)
    places = np.array([3, 0, 7, 1, 4])
    ragged = pairs.resident._ragged(places)
    copies = []
    if not torch.cuda.is_available():  # where kernels are interpreted
        copies = [pytest.importorskip("fastbd.kernels.gather_triton").gathered(ragged, ONE.device)]
    for found in (ragged, *copies):
        for address, (height, width), image in zip(
            found.addresses, found.sizes, pairs.resident.images(rows[places]), strict=True
        ):
            there = np.ctypeslib.as_array((ctypes.c_uint8 * (height * width * 3)).from_address(int(address)))
            assert np.array_equal(there.reshape(height, width, 3), image)


def test_what_a_step_does_to_its_batch_does_not_reach_what_is_kept(beton):
    pairs, rows = pairs_of(beton), np.arange(ROWS)
    resident.keep(pairs, rows, "ram", base=True, world=ONE, quiet=True)
    before = [x.clone() for x in epoch(pairs, rows, ("plain",), 0)]
    for x in (*epoch(pairs, rows, ("plain",), 0), base_views(pairs, rows)):
        x.zero_()
    assert alike(before, epoch(pairs, rows, ("plain",), 0))


def test_the_file_is_used_again_for_the_same_images_only(beton):
    rows, path = np.arange(ROWS), beton.path.with_name("pairs.16.pixels")

    def decoded(pairs: Pairs, rows: np.ndarray = rows, base: bool = True) -> int:
        resident.keep(pairs, rows, "disk", base=base, world=ONE, quiet=True)
        return pairs.decoder.decoded

    assert decoded(pairs_of(beton)) == ROWS
    assert sorted(p.name for p in beton.path.parent.iterdir()) == ["pairs.16.pixels", "pairs.beton"]
    assert path.stat().st_size == 64 + ROWS * (SIZE * SIZE * 3 + 4)
    again = pairs_of(beton)
    assert decoded(again) == 0 and torch.equal(base_views(again, rows), base_views(pairs_of(beton), rows))
    assert decoded(pairs_of(beton, seed=4)) == ROWS  # other triggers
    assert decoded(pairs_of(beton)) == ROWS  # their file took its place
    assert decoded(pairs_of(beton), rows[1:]) == ROWS - 1
    assert decoded(pairs_of(beton), rows[:-1]) == ROWS - 1  # as many, but other rows
    assert decoded(pairs_of(beton), base=False) == ROWS and beton.path.with_name("pairs.whole.pixels").exists()
    assert decoded(pairs_of(beton), rows[:-1]) == 0
    os.truncate(path, 500)
    assert decoded(pairs_of(beton), rows[:-1]) == ROWS - 1


@pytest.mark.parametrize("base", [True, False])
def test_a_damaged_file_is_told_when_the_image_is_first_read(beton, base):
    rows = np.array([0, 3, 4, 8])
    resident.keep(pairs_of(beton), rows, "disk", base=base, world=ONE, quiet=True)
    (path,) = beton.path.parent.glob("*.pixels")
    whole = path.read_bytes()
    again = pairs_of(beton)
    resident.keep(again, rows, "disk", base=base, world=ONE, quiet=True)
    end = int(again.resident._ends[2])  # of row 4
    for byte in (64 + end - 1, len(whole) - 6):  # one of its pixels, one of its checksum
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
        pairs = pairs_of(beton)
        resident.keep(pairs, rows, "disk", base=base, world=ONE, quiet=True)
        assert pairs.decoder.decoded == 0
        for row in (0, 3, 8):
            base_views(pairs, [row])
        with pytest.raises(UserError, match=r"pixels is damaged, as the image of row 4 is not .*: remove the file"):
            base_views(pairs, [4])


def test_an_image_is_compared_with_its_checksum_once(beton, monkeypatch):
    rows, compared = np.arange(ROWS), []
    resident.keep(pairs_of(beton), rows, "disk", base=True, world=ONE, quiet=True)
    check = resident.PixelFile.check
    monkeypatch.setattr(resident.PixelFile, "check", lambda *args: (compared.append(args[1]), check(*args)))
    pairs = pairs_of(beton)
    resident.keep(pairs, rows, "disk", base=True, world=ONE, quiet=True)
    for _ in range(3):
        base_views(pairs, rows)
    assert sorted(compared) == rows.tolist()


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("base", [True, False])
def test_a_substitute_is_kept_but_not_for_other_runs(beton, where, base):
    data = bytearray(beton.path.read_bytes())
    start = bytes(data).index(beton.jpeg(4).tobytes())
    data[start : start + 200] = bytes(200)
    beton.path.write_bytes(data)
    rows, policies = np.arange(ROWS), ("plain",) if base else RECIPES["cleanclip"]
    kept, streaming = pairs_of(Beton(beton.path), max_bad=1), pairs_of(Beton(beton.path), max_bad=1)
    resident.keep(kept, rows, where, base=base, world=ONE, quiet=True)
    assert alike(epoch(kept, rows, policies, 0), epoch(streaming, rows, policies, 0))
    assert list(kept.bad) == [4]
    assert not list(beton.path.parent.glob("*.pixels*"))
    with pytest.raises(UserError, match="image 4 of"):
        resident.keep(pairs_of(Beton(beton.path)), rows, where, base=base, world=ONE, quiet=True)
    assert not list(beton.path.parent.glob("*.pixels*"))


def test_what_cannot_be_is_refused(beton, monkeypatch):
    rows = np.arange(ROWS)

    def refused(where: str, pairs: Pairs, message: str) -> None:
        with pytest.raises(UserError, match=message):
            resident.keep(pairs, rows, where, base=True, world=ONE, quiet=True)
        assert pairs.resident is None and not list(beton.path.parent.glob("*.pixels*"))

    refused("gpu", pairs_of(beton), "--resident gpu, but the run is on the CPU")
    ffcv = pairs_of(beton)
    ffcv.decoder.name = "ffcv"
    refused("disk", ffcv, "FFCV's are not the same in each: give --decode dali or pil")
    monkeypatch.setattr(resident, "free_memory", lambda: 6000)
    refused("ram", pairs_of(beton), r"--resident ram needs 0\.00 GB")


def test_a_full_disk_shows_at_once_and_leaves_nothing(beton):
    """A process that may write 1,000 bytes to a file stands for one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    pairs = pairs_of(beton)
    try:
        with pytest.raises(
            UserError, match=r"pairs\.16\.pixels has no room on its disk for 0\.00 GB: give another --resident-dir"
        ):
            resident.keep(pairs, np.arange(ROWS), "disk", base=True, world=ONE, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pairs.decoder.decoded == 0
    assert [p.name for p in beton.path.parent.iterdir()] == ["pairs.beton"]


def test_processes_agree_on_a_place_and_all_end_where_the_first_one_cannot_write(beton, together, monkeypatch):
    path = beton.path.with_suffix(".16.pixels")
    monkeypatch.setenv("BETON", str(beton.path))
    first, second = map(json.loads, together(Path(__file__).with_name("resident_worker.py"), 2))
    assert first.pop("seconds") < 20 and second.pop("seconds") < 20
    assert (first.pop("decoded"), second.pop("decoded")) == (ROWS, 0)  # the second one read the file
    assert (
        first
        == second
        == {
            "both": "ram",
            "one": "none",
            "other": "none",
            "too much": "--resident ram needs 0.00 GB, of 0.00 GB free in memory: give --resident disk or none.",
            "no room": f"{path} has no room on its disk for 0.00 GB: give another --resident-dir, or "
            "--resident ram or none.",
            "left": ["pairs.beton"],
        }
    )


@pytest.mark.parametrize(("times", "processes", "kept"), [(4, 1, True), (3.9, 1, False), (8, 2, True), (7, 2, False)])
def test_auto_keeps_what_fills_a_quarter_of_the_free_memory(beton, monkeypatch, times, processes, kept):
    need = ROWS * SIZE * SIZE * 3
    monkeypatch.setattr(resident, "free_memory", lambda: int(times * need))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    pairs = pairs_of(beton)
    said = resident.keep(pairs, np.arange(ROWS), "auto", base=True, world=ONE, quiet=True)
    assert (pairs.resident is not None) == kept
    said_first = "images are decoded once by pil, --resident ram" if kept else "images are decoded in each epoch by pil"
    assert said.startswith(said_first) and pairs.where == ("ram" if kept else "none")


def test_auto_prefers_a_gpu_half_of_which_is_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(resident, "free_memory", lambda: 2100)
    gpu = World(0, 1, torch.device("cuda"))
    assert [resident._choose("auto", need, gpu)[0] for need in (500, 501, 525, 526)] == ["gpu", "ram", "ram", "none"]
    assert resident._choose("gpu", 1000, gpu)[0] == "gpu"
    with pytest.raises(UserError, match="--resident gpu needs"):
        resident._choose("gpu", 1001, gpu)


def test_free_memory_is_the_machines_or_what_the_container_may_still_take(tmp_path):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: 500 kB\n")
    assert resident.free_memory(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    assert resident.free_memory(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/memory.max", "300000\n")
    write("sys/fs/cgroup/memory.current", "200000\n")
    write("sys/fs/cgroup/memory.stat", "anon 130000\ninactive_file 60000\nactive_file 9000\n")
    assert resident.free_memory(tmp_path) == 160_000
    (tmp_path / "sys/fs/cgroup/memory.max").unlink()  # version 1
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "300000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "200000\n")
    write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50000\n")
    assert resident.free_memory(tmp_path) == 150_000


def test_the_file_goes_where_it_is_told_to(beton, tmp_path):
    """And the folder of the data is left alone, which may be read-only."""
    folder = tmp_path / "deep" / "scratch"
    for decoded in (ROWS, 0):
        pairs = pairs_of(beton)
        said = resident.keep(pairs, np.arange(ROWS), "disk", base=True, world=ONE, folder=folder, quiet=True)
        assert pairs.decoder.decoded == decoded and str(folder / "pairs.16.pixels") in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "pairs.beton"]
    assert [path.name for path in folder.iterdir()] == ["pairs.16.pixels"]


@pytest.mark.parametrize("folder", ["pairs.beton", "pairs.beton/deep", "/proc/fastbd"])
def test_where_the_file_cannot_go(beton, tmp_path, folder):
    match = r"pairs\.16\.pixels cannot be written \(.*\): give another --resident-dir, or --resident ram or none\.$"
    with pytest.raises(UserError, match=match):
        rows = np.arange(ROWS)
        resident.keep(pairs_of(beton), rows, "disk", base=True, world=ONE, folder=tmp_path / folder, quiet=True)
