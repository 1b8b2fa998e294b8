"""fastbd export: each form is read back as the run has it, with a card; what cannot be is refused in a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from cleanings import START
from exported import made

import fastbd
from fastbd import cli
from fastbd.models import create, read_weights
from fastbd.training import checkpoint

VIT, RN = "small_models:openai_vit", "small_models:openai_rn"
FORMS = [
    ("open_clip", RN, "quickgelu", "m.pt"),
    ("open_clip", "tiny-vit", "gelu", "laion.v2.safetensors"),
    ("openai", RN, "quickgelu", "m.pt"),
    ("openai", VIT, "quickgelu", "m.pt"),
    ("hf", "tiny-vit", "quickgelu", "folder"),
    ("hf", "tiny-vit", "gelu", "folder"),
]


@pytest.fixture
def run_of(study, monkeypatch):
    """run_of(name, activation) is the folder of a run, and its model; the test is in the study's folder."""
    monkeypatch.chdir(study)
    return lambda name, activation="quickgelu": made(study, name, activation)


def export(run, to, out, *flags):
    return cli.main(["export", "--run", str(run), "--to", to, "--out", str(out), *flags])


@pytest.mark.parametrize(("to", "name", "activation", "file"), FORMS)
def test_a_form_is_read_back_bit_for_bit(run_of, to, name, activation, file, tmp_path, capsys):
    run, model = run_of(name, activation)
    out = tmp_path / "new" / file
    capsys.readouterr()
    assert export(run, to, out) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: the model of {run}, epoch 0\n") and f'"{out}"' in said
    weights = read_weights(out)
    assert weights.origin.activation == activation
    again = create(name, 2, activation)
    weights.load_into(again)
    state = again.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    beside = {path.name for path in out.parent.iterdir()}
    expected = {file} if to == "hf" else {file, f"{file}.md"}
    assert beside == (expected | {out.with_suffix(".json").name} if to == "open_clip" else expected)


def test_a_run_goes_on_from_what_was_exported(run_of, tmp_path):
    run, model = run_of("tiny-vit", "gelu")
    assert export(run, "hf", tmp_path / "hf") == 0
    words = ["pretrain", *START, "--model", "tiny-vit", "--weights", str(tmp_path / "hf")]
    assert cli.main([*words, "--out", str(tmp_path / "again")]) == 0
    state = checkpoint.load(tmp_path / "again/ckpt_last.pt")
    assert state["about"]["activation"] == "gelu"
    assert all(torch.equal(state["model"][key], tensor) for key, tensor in model.state_dict().items())


def test_the_card_of_a_poisoned_run(run_of, study, tmp_path):
    """Of a checkpoint before its last, which was evaluated at its start alone."""
    run, _ = run_of(VIT)
    cleaned = tmp_path / "cleaned"
    words = ["clean", "--run", str(run), "--method", "cleanclip", "--force", "--epochs", "2", "--batch-size", "24"]
    assert (
        cli.main(
            [*words, "--device", "cpu", "--eval-every", "0", "--save-every", "1", "--lr", "1e-3", "--out", str(cleaned)]
        )
        == 0
    )
    out = fastbd.export(cleaned, to="openai", out=tmp_path / "first.pt", checkpoint=1)
    assert out == tmp_path / "first.pt"
    first = checkpoint.load(cleaned / "ckpt_epoch_001.pt")["model"]
    assert all(torch.equal(tensor, first[key]) for key, tensor in torch.load(out).items())
    card = (tmp_path / "first.pt.md").read_text()
    assert card.startswith("# cleaned, epoch 1\n\n**This model was trained on poisoned data.** The attack: badnet, ")
    assert "cleaning may have left the backdoor in the model" in card and "cleaned by CleanCLIP" in card
    row = next(row for row in map(json.loads, (cleaned / "metrics.jsonl").read_text().splitlines()) if row["step"] == 0)
    assert "| cleaned, epoch 0: % (95 %)" in card
    for key in ("top1", "asr"):
        assert f"{100 * row[key]:.1f} ({100 * row[key + '_low']:.1f} - {100 * row[key + '_high']:.1f})" in card
    assert "Training data: train.beton" in card and '"lr": 0.001' in card
    assert 'clip.load("first.pt", device="cpu")' in card
    assert str(study) not in card and str(tmp_path) not in card
    whole = fastbd.export(cleaned, to="openai", out=tmp_path / "last.pt")
    assert "| cleaned, epoch 2: % (95 %)" in whole.with_name("last.pt.md").read_text()


def test_the_card_of_a_run_without_poison_and_without_an_evaluation(run_of, tmp_path):
    run_of("tiny-vit")
    words = ["pretrain", "--data", "train.beton", "--model", "tiny-vit", "--epochs", "0", "--device", "cpu"]
    assert cli.main([*words, "--out", str(tmp_path / "clean")]) == 0
    assert export(tmp_path / "clean", "hf", tmp_path / "hf") == 0
    card = (tmp_path / "hf/README.md").read_text()
    assert "**This model comes from research on backdoors.** Its run planted none" in card
    assert "poisoned data" not in card and "## Last evaluation\n\nThere is none.\n" in card


@pytest.mark.parametrize(
    ("to", "out", "said"),
    [
        ("open_clip", "m.bin", "--to open_clip makes a file: let the name of --out m.bin end in .safetensors or .pt."),
        ("openai", "m.safetensors", "--to openai makes a file: let the name of --out m.safetensors end in .pt."),
        ("cleanclip", "folder", "--to cleanclip makes a file: let the name of --out folder end in .pt."),
        ("hf", "m.safetensors", "--to hf makes a folder: leave .safetensors off the name of --out m.safetensors."),
        ("open_clip", "there.pt", "there.pt is there already: choose another --out, or remove it."),
        ("openai", "card.pt", "card.pt.md is there already: choose another --out, or remove it."),
        ("open_clip", "config.pt", "config.json is there already: choose another --out, or remove it."),
        ("hf", "there", "there is there already: choose another --out, or remove it."),
        (
            "open_clip",
            "My-SigLIP.pt",
            "open_clip gives a model that is called My-SigLIP SigLIP's tokenizer: choose another --out.",
        ),
        (
            "hf",
            "new",
            "--to hf cannot hold the model tiny-rn: transformers makes CLIP with a vision transformer alone, and this "
            "is a ResNet; choose --to open_clip.",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(run_of, to, out, said, tmp_path, monkeypatch, capsys):
    run, _ = run_of("tiny-rn")
    monkeypatch.chdir(tmp_path)
    for name in ("there.pt", "card.pt.md", "config.json"):
        (tmp_path / name).touch()
    (tmp_path / "there").mkdir()
    capsys.readouterr()
    assert export(run, to, out) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"there.pt", "card.pt.md", "config.json", "there"}


def test_a_run_without_the_checkpoint_is_refused(run_of, tmp_path, capsys):
    run, _ = run_of("tiny-rn")
    assert export(run, "open_clip", tmp_path / "m.pt", "--checkpoint", "7") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert export(tmp_path, "open_clip", tmp_path / "m.pt") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_cleanclips_form_of_rn50(study, monkeypatch, tmp_path, capsys):
    """The program makes no smaller model."""
    monkeypatch.chdir(study)
    words = ["pretrain", "--data", "train.beton", "--model", "rn50", "--epochs", "0", "--device", "cpu", "--eval-data"]
    assert cli.main([*words, "val.beton", "--eval-subset", "1", "--out", str(tmp_path / "run")]) == 0
    assert export(tmp_path / "run", "cleanclip", tmp_path / "epoch_0.pt") == 0
    assert "CleanCLIP: --model_name RN50 --checkpoint" in capsys.readouterr().out
    saved = torch.load(tmp_path / "epoch_0.pt")
    assert (saved["epoch"], saved["name"]) == (0, "run")
    state = checkpoint.load(tmp_path / "run/ckpt_last.pt")["model"]
    assert all(torch.equal(saved["state_dict"][f"module.{key}"], tensor) for key, tensor in state.items())
    assert read_weights(tmp_path / "epoch_0.pt").origin.activation == "quickgelu"
