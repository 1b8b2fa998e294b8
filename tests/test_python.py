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


def test_values_of_python_are_taken_for_those_of_flags(example):
    run = read(example["trained"].path)
    settings = fastbd._settings("clean", {"run": run, "checkpoint": 7, "lr": np.float64(0.5), "rows": np.int64(9)})
    assert (settings.run, settings.checkpoint, settings.lr, settings.rows) == (run.path, "7", 0.5, 9)
    settings = fastbd._settings("sweep", {"pretrained": [run, str(run.path)], "seeds": range(2), "study": Path("demo")})
    assert (settings.pretrained, settings.seeds, settings.study) == ((run.path, run.path), (0, 1), "demo")
    settings = fastbd._settings("pretrain", {"remove_epochs": np.array([1, 2]), "eval_every": 5, "plan": None})
    assert (settings.remove_epochs, settings.eval_every, settings.batch_size) == ((1, 2), "5", 64)
    assert fastbd._settings("pretrain", {"resume": run}).resume == run.path
    assert fastbd._settings("evaluate", {"run": run, "eval_data": "val.beton"}).eval_data == (Path("val.beton"),)


def test_a_checkpoint_by_its_number_on_a_device_of_torch(example):
    run = example["trained"]
    epoch = run.path / "ckpt_epoch_002.pt"
    epoch.symlink_to("ckpt_last.pt")
    there = (dict(run=run, checkpoint=np.int64(2)), dict(run=str(epoch)), dict(run=run.path))
    loaded = [fastbd.load(**given, device=torch.device("cpu")).model.state_dict() for given in there]
    assert all(torch.equal(one["logit_scale"], loaded[-1]["logit_scale"]) for one in loaded)
    with pytest.raises(fastbd.UserError, match=r"there is no checkpoint .*ckpt_epoch_001\.pt"):
        fastbd.load(run, checkpoint=1)
    epoch.unlink()


def test_a_run_is_shown_in_one_short_line(example):
    last = example["cleaned"].metrics[-1]
    said = f"cleanclip, step {last['step']}, top-1 {last['top1']:.1%}, ASR {last['asr']:.1%}>"
    assert repr(example["cleaned"]) == f"<Run {example['cleaned'].name}: {said}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"epoch": 3}, r"fastbd\.pretrain\(\) has no flag 'epoch'; did you mean epochs\?"),
        ({"no_poison": True}, r"has no flag 'no_poison'; did you mean poison\?"),
        ({"xyz": 1}, r"has no flag 'xyz'; python -m fastbd pretrain --help lists them\."),
        ({"objective": "mcml"}, "there is no objective 'mcml'; did you mean mmcl"),
        ({"preset": "paper"}, "preset is 'paper', and must be one of demo, paper-cc3m,"),
        ({"epochs": "3"}, r"epochs is '3', and must be a whole number\."),
        ({"poison": 1}, r"poison is 1, and must be true or false\."),
        ({"data": ["a.beton", "b.beton"]}, "data is .*, and must be a text"),
        ({"plan": object()}, "plan is <object .*, and must be a path"),
        ({"lr": -1.0}, "--lr -1.0 is out of range"),
        ({"resume": "run", "epochs": 3}, "--resume takes every setting from the run folder"),
        ({"device": 0}, "--device 0 is unknown"),
    ],
)
def test_mistakes_are_one_error_and_nothing_else(flags, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastbd.UserError, match=said):
        fastbd.pretrain(**flags)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_mistakes_with_other_verbs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastbd.UserError, match="nowhere"):
        fastbd.load("nowhere")
    with pytest.raises(fastbd.UserError, match="run is 7, and must be a path"):
        fastbd.clean(7)
    with pytest.raises(fastbd.UserError, match="--tau is a flag of --method par"):
        fastbd.clean("runs/start", method="finetune", tau=1.0)
    with pytest.raises(fastbd.UserError, match="--pretrained has no value: give one or more, or leave it out"):
        fastbd.sweep("demo", pretrained=[])
