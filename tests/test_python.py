"""The Python entry: the example of docs/python.md, and what it says of mistakes."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastbd
from fastbd.base.run_folder import read
from fastbd.data.decode import open_decoder
from fastbd.data.pairs import Pairs
from fastbd.data.shards import open_beton
from fastbd.data.tokenizer import tokenize
from fastbd.kernels.augment import render
from fastbd.kernels.text_pack import pack
from fastbd.kernels.views import plain

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.fixture(scope="module")
def example(study, tmp_path_factory) -> dict:
    """The names that the page's example leaves behind, run beside the small study's files."""
    folder = tmp_path_factory.mktemp("example")
    for path in study.glob("*.*"):
        (folder / path.name).symlink_to(path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_runs_are_those_of_the_verbs(example):
    trained, cleaned = example["trained"], read(example["cleaned"].path)  # evaluated since
    assert (trained.verb, cleaned.verb, cleaned.method) == ("pretrain", "clean", "cleanclip")
    assert cleaned.config["lr"] == 1e-3 and cleaned.config["batch_size"] == 64  # the preset's
    assert cleaned.start.name == trained.name and cleaned.result["reason"] == "finished"
    assert [row["epoch"] for row in cleaned.metrics] == [0, 1]
    assert len(next(row for row in cleaned.rows if "asr_by_seed" in row)["asr_by_seed"]) == 2


def test_a_loaded_model_sees_what_an_evaluation_sees(example, study):
    loaded, beton = example["loaded"], open_beton(study / "val.beton")
    assert not loaded.model.training and example["similarity"].shape == (2, 2)
    image = Pairs(beton, open_decoder("pil", 1, "cpu"), loaded.model.image_size).stored(3)
    size = loaded.model.image_size
    assert torch.equal(loaded.transform(image.numpy()), render([image], plain([image.shape[:2]], size), size)[0])
    text = pack(tokenize(["a photo of a cat"]))
    with torch.no_grad():
        found = loaded.model.encode_text(loaded.tokenizer(["a  photo of a cat "]))
        assert torch.equal(found, loaded.model.encode_text(text))


def test_one_text_is_one_and_an_image_is_what_a_build_makes_of_it(example):
    loaded = example["loaded"]
    assert torch.equal(loaded.tokenizer("a cat").tokens, loaded.tokenizer(["a cat"]).tokens)
    picture = Image.effect_noise((40, 60), 90).convert("RGB")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    assert torch.equal(loaded.transform(Image.open(turned)), loaded.transform(picture))
    with pytest.raises(fastbd.UserError, match=r"the image is float64 \(40, 60, 3\): give one of Pillow, or uint8"):
        loaded.transform(np.zeros((40, 60, 3)))


def test_a_run_stays_the_same_where_the_working_directory_changes(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fastbd.load(example["cleaned"]).model.image_size == example["loaded"].model.image_size


def test_an_evaluation_in_another_thread(example, study):
    rows = []
    thread = threading.Thread(target=lambda: rows.extend(fastbd.evaluate(example["cleaned"], device="cpu")))
    thread.start()
    thread.join()
    assert rows[0]["top1"] == example["cleaned"].metrics[-1]["top1"]


def test_mistakes_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastbd.UserError, match="does not take these flags"):
        fastbd.pretrain(epoch=3)
    assert "--epoch" in capsys.readouterr().err
    with pytest.raises(fastbd.UserError, match="--lr -1.0 is out of range"):
        fastbd.pretrain(lr=-1.0)
    with pytest.raises(fastbd.UserError, match="nowhere"):
        fastbd.load("nowhere")
    assert not list(tmp_path.iterdir())
