from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from saved import write_safetensors

import fastbd
from fastbd import cli
from fastbd.base.dist import World
from fastbd.commands import clean, pretrain
from fastbd.commands.evaluate import open_model
from fastbd.config.flags import CleanConfig, PretrainConfig
from fastbd.models import create
from fastbd.training import opened, run, setup
from fastbd.training.reuse import Kept
from fastbd.training.run import Run

START = (
    "pretrain", "--data", "train.beton", "--plan", "train.poison.json", "--eval-data", "val.beton", "--templates",
    "demo", "--model", "tiny-vit", "--batch-size", "24", "--epochs", "0", "--device", "cpu", "--decode", "pil",
)  # fmt: skip
CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def place(study, tmp_path_factory) -> Path:
    """A folder with weights that were trained with GELU, and a run of them."""
    folder = tmp_path_factory.mktemp("pretrain")
    for path in study.iterdir():
        if path.suffix in (".beton", ".json"):
            (folder / path.name).symlink_to(path)
    torch.save(create("tiny-vit", 3, "gelu").state_dict(), folder / "vit-laion2b.pt")
    return folder


@pytest.fixture(scope="module")
def started(place, fastbd):
    fastbd(*START, "--weights", "vit-laion2b.pt", "--out", "runs/gelu", cwd=place)
    return place / "runs/gelu"


@pytest.mark.parametrize(
    ("flags", "taken", "said"),
    [
        ((), "gelu", "activation gelu, as its name says laion; --activation quickgelu takes the other one"),
        (
            ("--activation", "quickgelu"),
            "quickgelu",
            "activation quickgelu, as asked for; --activation gelu takes the other one",
        ),
    ],
)
def test_the_activation_of_weights_is_said_and_recorded(flags, taken, said, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    out = f"runs/said-{taken}"
    assert cli.main([*START, "--weights", "vit-laion2b.pt", *flags, "--out", out]) == 0
    assert f"vit-laion2b.pt: {said}" in capsys.readouterr().out
    assert json.loads((place / out / "config.json").read_text())["activation"] == taken
    _, model = open_model(place / out, "last", torch.device("cpu"))
    assert model.spec.activation == taken


def test_what_follows_a_run_has_its_activation(started, place, monkeypatch):
    """Resuming and cleaning; and cleaning the run itself as weights, as it records."""
    monkeypatch.chdir(place)
    weights = torch.load("vit-laion2b.pt", weights_only=True)
    config = dict(data="train.beton", model="tiny-vit", device="cpu", decode="pil")
    for made in (
        pretrain.task(cli.parse("pretrain", ["--resume", str(started)]), CPU),
        clean.task(CleanConfig(run=started, device="cpu", decode="pil"), CPU),
        pretrain.task(PretrainConfig(**config, weights=started), CPU),
    ):
        assert (
            made.model.spec.activation == "gelu" and made.about("x", PretrainConfig(**config))["activation"] == "gelu"
        )
        if made.method_name or made.poisoned is False:
            assert torch.equal(made.model.ln_final.weight, weights["ln_final.weight"])
    fresh = pretrain.task(PretrainConfig(**config), CPU)
    assert fresh.model.spec.activation == "quickgelu"
    assert pretrain.task(PretrainConfig(**config, activation="gelu"), CPU).model.spec.activation == "gelu"


def test_a_run_from_before_activations_were_recorded_has_openais(started, place, monkeypatch, tmp_path):
    state = torch.load(started / "ckpt_last.pt", weights_only=True)
    del state["about"]["activation"]
    torch.save(state, tmp_path / "ckpt_last.pt")
    assert open_model(tmp_path, "last", torch.device("cpu"))[1].spec.activation == "quickgelu"


def test_a_step_in_memory_is_not_used_for_another_activation(started, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    torch.save(torch.load("vit-laion2b.pt", weights_only=True), "vit.pt")
    assert cli.main([*START, "--weights", "vit.pt", "--out", "runs/quickgelu"]) == 0
    kept, models = Kept(), []
    for name in ("gelu", "quickgelu"):
        flags = ["--run", f"runs/{name}", "--rows", "48", "--batch-size", "24", "--epochs", "1", "--device", "cpu"]
        config = cli.parse("clean", [*flags, "--decode", "pil", "--force", "--out", str(tmp_path / name)])
        made = Run(config, clean.task(config, CPU), CPU, kept=kept, quiet=True)
        models.append((made.opened.model, made.opened.step))
    (first, one), (second, other) = models
    assert (first.spec.activation, second.spec.activation) == ("gelu", "quickgelu") and one is not other


@pytest.mark.parametrize("kind", ["cut", "page", "folder", "header", "object", "nothing"])
def test_weights_that_cannot_be_read_are_one_sentence(kind, place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {"a": torch.zeros(2)})
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif kind == "page":
        path.write_text("<!DOCTYPE html><html>Sign in</html>")
    elif kind == "folder":
        path = tmp_path / "hub"
        path.mkdir()
    elif kind == "header":
        path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    elif kind == "object":
        torch.save({"model": create}, path := tmp_path / "weights.pt")
    else:
        path.unlink()
    assert cli.main([*START, "--weights", str(path), "--out", "runs/none"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(path) in said
    assert not (place / "runs/none").exists()


def interrupt(*_, **__) -> None:
    """What Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("opening", ["task", "inputs", "place", "make_step", "samples"])
def test_ctrl_c_while_a_training_opens_leaves_nothing(opening, place, monkeypatch, capsys):
    """There is nothing to go on with yet."""
    where = {
        "task": (pretrain, "open_beton"),
        "inputs": (opened, "inputs"),
        "place": (setup, "place"),
        "make_step": (setup, "make_step"),
        "samples": (run.sheet, "samples"),
    }
    monkeypatch.chdir(place)
    monkeypatch.setattr(*where[opening], interrupt)
    before = sorted(Path("runs").glob("*"))
    assert cli.main([*START, "--out", "runs/stopped"]) == 130
    assert capsys.readouterr().err == "stopped.\n" and sorted(Path("runs").glob("*")) == before


def test_ctrl_c_before_the_first_step_says_how_to_go_on(place, monkeypatch, capsys):
    """The folder is there, and the loop, which saves what it has done, has not begun."""

    def make(*given) -> None:
        made(*given)
        interrupt()

    monkeypatch.chdir(place)
    made, goes_on = run.RunFolder.make, "stopped; go on with: python -m fastbd pretrain --resume 'runs/so early'"
    with monkeypatch.context() as patch:
        patch.setattr(run.RunFolder, "make", make)
        assert cli.main([*START, "--epochs", "1", "--out", "runs/so early"]) == 130
        assert capsys.readouterr().out.splitlines()[-1] == goes_on
    for patched in ((setup, "place"), (opened.Opened, "pairs_limit")):
        with monkeypatch.context() as patch:
            patch.setattr(*patched, interrupt)
            assert cli.main(["pretrain", "--resume", "runs/so early"]) == 130
            assert capsys.readouterr().out.splitlines()[-1] == goes_on
            with pytest.raises(KeyboardInterrupt, match=r"go on with fastbd\.pretrain\(resume='runs/so early'\)"):
                fastbd.pretrain(resume="runs/so early")
    assert fastbd.pretrain(resume="runs/so early").result["reason"] == "finished"
