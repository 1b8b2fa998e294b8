from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data.sources.mutations import mutations
from layouts import build, data_of, read, save, tar_bytes, write
from PIL import Image

from fastbd.base.errors import UserError
from fastbd.commands.build import run
from fastbd.config.flags import BuildConfig


@pytest.fixture
def flat(tmp_path) -> Path:
    """Three images, whose colours tell them apart, and a text file; sorted they are a, b, c."""
    for name in ("b", "a", "c"):
        save(tmp_path / "flat" / f"val_{name}.JPEG", (80 * "abc".index(name), 0, 0))
    (tmp_path / "flat/readme.txt").write_text("no image")
    return tmp_path / "flat"


def as_tar(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        for name in ("val_c.JPEG", "val_a.JPEG", "readme.txt", "val_b.JPEG"):
            tar.add(folder / name, name)
    return folder.with_suffix(".tar")


LOC = "ImageId,PredictionString\nval_b,n01440764 1 2 30 40 n01440764 5 5 9 9 \nval_c,n02 1\nval_a,n01440764 1 2 3 4\n"


@pytest.mark.parametrize("kind", [lambda folder: folder, as_tar])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ("great white shark\ntench\n\ngreat white shark\n", ["great white shark", "tench", "great white shark"]),
        ("val_c.JPEG 2\nval_a.JPEG 0\nval_b.JPEG 65\n", ["0", "65", "2"]),
        ('file,label\nval_c.JPEG,x\nsub/val_a.JPEG,"y, z"\nval_b.JPEG, x\n', ["y, z", "x", "x"]),
        ("val_a.JPEG cat, a\nval_b.JPEG cat, b\nval_c.JPEG cat, a\n", ["cat, a", "cat, b", "cat, a"]),
        ("val_a\tsea lion\nval_b\tcat\nval_c\tcat", ["sea lion", "cat", "cat"]),
        (LOC, ["n01440764", "n01440764", "n02 1"]),
    ],
)
def test_a_list_of_labels(tmp_path, flat, kind, labels, classes):
    (tmp_path / "labels.txt").write_text(labels)
    data, rejects = build(tmp_path, kind(flat), labels=tmp_path / "labels.txt")
    assert [data.class_names[label] for label in data.labels] == classes and rejects == []
    colours = [Image.open(io.BytesIO(data.jpeg(i))).getpixel((5, 5))[0] for i in range(3)]
    assert np.allclose(colours, [0, 80, 160], atol=3)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("cat\ndog\n", {}, r"labels.txt holds 2 labels, and .*flat 3 images, val_c.JPEG without one: give a label a"),
        ("cat\n" * 4, {}, r"holds 4 labels, and .*flat 3 images: give"),
        ("val_a x\nval_c x\n", {}, r"holds 2 labels, and .* 3 images, val_b.JPEG without one"),
        ("val_a x\nval_d x\n", {}, r"line 2 of .*labels.txt, 'val_d x', gives no image of .*flat a label: mend it"),
        ("val_d.jpeg x\nval_a x\n", {}, "line 1 of .*, 'val_d.jpeg x', gives no image"),
        ("2 val_a.JPEG\n0 val_b.JPEG\n1 val_c.JPEG\n", {}, "'2 val_a.JPEG' in .*labels.txt names an image, and is"),
        ("x_a.png cat\nx_b.png dog\nx_c.png cat\n", {}, "'x_a.png cat' in .* names an image"),
        (
            "file,label,split\nval_a,cat,val\nval_b,dog,val\nval_c,cat,val\n",
            {},
            "line 2 of .*, 'val_a,cat,val', has more",
        ),
        ("val_a\tcat\t1\nval_b\tcat\t1\nval_c\tcat\t0\n", {}, "line 1 of .* has more than `file label`"),
        (
            "1\n1000\n3\n",
            {},
            "numbers from 1, and those of the ILSVRC development kit.*WordNet ids as in imagenet_2012",
        ),
        ("1\n2\n3\n", {"classes": "imagenet1k"}, "numbers from 1"),
        ("cat\ndog\nbird", {"classes": "imagenet1k"}, "all 3 rows .* most for: class not in imagenet1k"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, flat, labels, options, message):
    (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(UserError, match=message):
        run(BuildConfig(source=flat, out=tmp_path / "set.beton", labels=tmp_path / "labels.txt", workers=1, **options))


def test_a_label_a_line_needs_names_of_one_order(tmp_path):
    """Tiny-ImageNet's names: sorted as words 10 comes before 9."""
    config = BuildConfig(source=tmp_path / "flat", out=tmp_path / "set.beton", labels=tmp_path / "l.txt", workers=1)
    for i in (8, 9, 10):
        save(tmp_path / f"flat/val_{i}.JPEG", (20 * i, 0, 0))
    config.labels.write_text("cat\ndog\nbird\n")
    with pytest.raises(UserError, match="val_10.JPEG comes before val_8.JPEG by letters.* give lines `file label`"):
        run(config)
    config.labels.write_text("val_8.JPEG cat\nval_9.JPEG dog\nval_10.JPEG bird\n")
    assert run(config) == 0
    (tmp_path / "flat/val_10.JPEG").unlink()
    config.labels.write_text("cat\ndog\n")
    assert run(config) == 0


def test_a_damaged_tar_cannot_be_labelled(tmp_path, flat):
    source = as_tar(flat)
    source.write_bytes(source.read_bytes()[:1500])
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=r"flat.tar/.* cannot be read \(damaged tar"):
        run(BuildConfig(source=source, out=tmp_path / "set.beton", labels=tmp_path / "labels.txt", workers=1))


@pytest.mark.parametrize(
    ("labels", "classes", "codes"),
    [
        ("1\n2\n1\n", "flowers102", ["1", "2", "1"]),  # codes, and so no numbers from 1
        ("0\n2\n0\n", "imagenet1k", ["n01440764", "n01484850", "n01440764"]),
        ("tench\nn01484850\ntench\n", "imagenet1k", ["n01440764", "n01484850", "n01440764"]),
    ],
)
def test_labels_are_kept_by_their_codes(tmp_path, flat, labels, classes, codes):
    (tmp_path / "labels.txt").write_text(labels)
    data, _ = build(tmp_path, flat, labels=tmp_path / "labels.txt", classes=classes)
    assert [data.class_names[label] for label in data.labels] == codes


def test_images_without_labels_captions_or_classes(flat):
    with pytest.raises(
        UserError, match="the images of .*flat have no captions .* and are in no class folders: give --l"
    ):
        read(flat)


def test_two_labels_for_one_image(tmp_path, flat):
    (tmp_path / "labels.txt").write_text("val_a cat\nval_b dog\nval_c cat\nval_a.JPEG dog\n")
    with pytest.raises(UserError, match="labels.txt gives val_a.JPEG two labels, cat and dog: mend it"):
        read(flat, labels=tmp_path / "labels.txt")


def test_links_and_holes_in_a_tar_cannot_be_labelled(tmp_path):
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
    (tmp_path / "a.tar").write_bytes(tar_bytes([("0.jpg", b"zero"), link, ("2.jpg", b"two")]))
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"a.tar/1.jpg cannot be read \(a link or device, not a file"):
        read(tmp_path / "a.tar", labels=tmp_path / "labels.txt")


NAMES = [f"val_{i:03}.JPEG" for i in range(12)]
LABELS = [f"{i:03}" * 5 for i in range(12)]  # no change makes one into another's


@pytest.mark.parametrize("form", ["{name} {label}", "{name},{label}", "{name}\t{label}"])
def test_no_damage_to_a_list_gives_a_wrong_label(tmp_path, form):
    write(tmp_path / "set", {name: name.encode() for name in [*NAMES, "notes.txt"]})
    lines = [form.format(name=name, label=label) for name, label in zip(NAMES, LABELS, strict=True)]
    others = {name: set(LABELS) - {label} for name, label in zip(NAMES, LABELS, strict=True)}
    refused = 0
    for damaged in mutations("\n".join(lines).encode(), seed=5):
        (tmp_path / "labels.txt").write_bytes(damaged)
        try:
            items = read(tmp_path / "set", labels=tmp_path / "labels.txt")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert [data_of(item).decode() for item in items] == NAMES
            assert not any(item.class_name in others[item.name] for item in items), damaged
    assert refused
