from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanings import cleaning, same, start, state
from layouts import save

import fastbd
from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.base.run_folder import read_config
from fastbd.commands import build
from fastbd.config.fields import typed_fields, types_of
from fastbd.config.flags import BuildConfig, CleanConfig, config_of
from fastbd.config.presets import PRESETS
from fastbd.config.recipes import PUBLISHED, Behaviour, published
from fastbd.data.beton import Beton
from fastbd.data.shards import Shards
from fastbd.kernels.text_pack import lengths_of

PAGE = (Path(__file__).parents[2] / "docs" / "published.md").read_text()


def kind_of(each: Behaviour) -> type:
    shared = cli.VERBS[each.verb].config
    return config_of(shared, each.names[0]) if each.names else shared


def test_each_behaviour_is_a_flag_of_its_verb_and_not_its_default():
    for each in PUBLISHED:
        kind = kind_of(each)
        assert typed_fields(kind, {each.flag: each.value}) == {each.flag: each.value}
        usual = {field.name: field.default for field in dataclasses.fields(kind)} | (
            PRESETS["demo"]().methods.get("par", {}) if each.names == ("par",) else {}
        )
        assert usual[each.flag] != each.value, each.flag


def test_the_page_has_every_behaviour():
    """As a row of the table of its verb, in the order of PUBLISHED."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| `--")]
    assert rows == [row(each) for each in PUBLISHED]


def row(each: Behaviour) -> str:
    flag = f"--{each.flag.replace('_', '-')}" + ("" if each.value is True else f" {each.value:g}"
            if isinstance(each.value, float) else f" {each.value}")  # fmt: skip
    of = ", ".join(each.names) + (f"; with --preset {' or '.join(each.presets)}" if each.presets else "")
    return f"| `{flag}` | {of or 'all data'} | {each.does} | {each.source} | {each.effect} |"


def test_a_recipe_gives_defaults_and_flags_win():
    usual = cli.parse("clean", ["--method", "cleanclip"])
    assert (usual.recipe, usual.schedule, usual.exempt, usual.eda) == ("corrected", "exact", "vectors", "epoch")
    found = cli.parse("clean", ["--recipe", "published", "--eda", "epoch", "--no-keep-optimizer"])
    changed = dict(recipe="published", schedule="shifted", exempt="names", gather="local-grad")
    assert found == dataclasses.replace(usual, **changed)
    assert cli.settings_of("clean", {"recipe": "published", "eda": "epoch", "keep_optimizer": False}) == found
    assert cli.parse("clean", ["--recipe", "published", "--recipe", "corrected"]) == usual


@pytest.mark.parametrize(
    ("verb", "flags", "expected"),
    [
        ("pretrain", [], dict(schedule="shifted", exempt="names", eda="frozen", gather="local-grad", bn_group="batch")),
        ("pretrain", ["--preset", "paper-cc6m"], dict(schedule="shifted", bn_group=256)),
        ("pretrain", ["--robust", "safeclip"], dict(schedule="exact", exempt="names")),
        ("clean", ["--method", "deep_cluster"], dict(schedule="shifted", keep_optimizer=False)),
        ("clean", ["--method", "supervised"], dict(schedule="exact", exempt="biases", eda="epoch")),
        ("clean", ["--method", "par"], dict(schedule="exact", exempt="vectors", lr_start=3e-5, frozen_norms=True)),
        ("clean", ["--method", "shrink_perturb"], dict(schedule="shifted", keep_optimizer=True)),
    ],
)
def test_what_is_published_depends_on_the_method(verb, flags, expected):
    found = vars(cli.parse(verb, ["--recipe", "published", *flags]))
    assert {flag: found[flag] for flag in expected} == expected


def test_a_method_that_none_has_published_is_told():
    with pytest.raises(UserError, match=r"published is of cleanclip, .*, and not of my:Own: give --recipe corrected\."):
        published("clean", "my:Own")


def test_cleaning_has_the_recipe_of_the_run_and_a_run_of_before_there_were_any_is_corrected(tmp_path):
    for name, config in (("old", {"preset": "demo"}), ("new", {"preset": "demo", "recipe": "published"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"verb": "pretrain", "config": config}))
    old, new = (cli.parse("clean", ["--run", str(tmp_path / name)]) for name in ("old", "new"))
    assert (old.recipe, old.schedule) == ("corrected", "exact")
    assert (new.recipe, new.schedule) == ("published", "shifted")
    assert cli.parse("clean", ["--run", str(tmp_path / "new"), "--recipe", "corrected"]).schedule == "exact"


NEW = {"recipe", "schedule", "exempt"}


def test_a_run_of_before_there_were_recipes_resumes_as_it_was(study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)
    whole = cleaning(tmp_path / "whole", "--epochs", 1)
    whole.train()
    assert {flag: read_config(tmp_path / "whole")["config"][flag] for flag in NEW} == dict(
        recipe="corrected", schedule="exact", exempt="vectors"
    )
    run = cleaning(tmp_path / "run", "--epochs", 1)
    run.folder.release()
    about, last = (tmp_path / "run" / name for name in ("config.json", "ckpt_last.pt"))
    recorded, saved = json.loads(about.read_text()), torch.load(last, weights_only=True)
    for place in (recorded, saved):
        place["config"] = {flag: value for flag, value in place["config"].items() if flag not in NEW}
    about.write_text(json.dumps(recorded))
    torch.save(saved, last)
    assert cli.main(["clean", "--resume", str(tmp_path / "run")]) == 0
    assert same(state(run), state(whole))


def test_an_optimizer_of_another_grouping_is_told(study, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(study)
    start(study)
    flags = ["clean", "--run", "runs/start", "--force", "--recipe", "published", "--out", str(tmp_path / "run")]
    assert cli.main([*flags, "--device", "cpu"]) == 2
    said = (
        "--recipe published keeps the optimizer's state of runs/start, which was made with --exempt vectors, and this "
        "is --exempt names: make runs/start with it too, or give --exempt vectors, or --no-keep-optimizer."
    )
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("entry", "asked", "make"),
    [
        ('recipe = "published"', "--recipe published", "make mmcl-s0 with it too, or "),
        ('keep_optimizer = true, exempt = "names"', "--keep-optimizer", ""),
    ],
)
def test_a_study_tells_of_another_grouping_before_it_trains(entry, asked, make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mixed.toml").write_text(f"pretrain = [{{}}]\nclean = [{{{entry}}}]\n")
    assert cli.main(["sweep", "--study", "mixed.toml"]) == 2
    said = f"of mmcl-s0, which was made with --exempt vectors, and this is --exempt names: {make}give --exempt vectors"
    assert capsys.readouterr().err.startswith(f"error: {asked} keeps the optimizer's state {said}, or --no-keep")
    assert not Path("studies").exists()


def test_a_schedule_of_its_own_is_not_shifted(study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)
    with pytest.raises(UserError, match=r"par:Par has a schedule of its own, which --schedule shifted does not know"):
        cleaning(tmp_path / "run", "--method", "par", "--schedule", "shifted")


def test_a_shifted_run_is_an_epoch_ahead(study, monkeypatch, tmp_path):
    """Of two epochs of nine or ten steps, with a warm-up that is longer than half of them."""
    monkeypatch.chdir(study)
    start(study)
    run = cleaning(tmp_path / "run", "--schedule", "shifted", "--warmup", 13, "--lr", 1.3)
    first = run.opened.steps_per_epoch
    assert run.opened.warmup == 13 - first  # what is left of it
    assert run.opened.step.rates[:3].tolist() == pytest.approx([min(1.3, 0.1 * (first + k + 1)) for k in range(3)])


@pytest.fixture
def source(tmp_path) -> Path:
    save(tmp_path / "a.jpg")
    words = " ".join(["red"] * 90)
    (tmp_path / "pairs.csv").write_text(f"path,caption\na.jpg,a dog\na.jpg,{words}\na.jpg,{' '.join(['red'] * 75)}\n")
    return tmp_path / "pairs.csv"


def test_the_end_token_of_a_long_caption_is_cut_and_the_build_recorded(source, tmp_path):
    for recipe in ("corrected", "published"):
        flags = [
            "--source",
            str(source),
            "--out",
            str(tmp_path / f"{recipe}.beton"),
            "--recipe",
            recipe,
            "--workers",
            "1",
        ]
        assert build.run(cli.parse("build", flags)) == 0
    kept, cut = Beton(tmp_path / "corrected.beton"), Beton(tmp_path / "published.beton")
    rows = np.arange(3)
    red = kept.tokens(rows)[1, 1]
    assert kept.tokens(rows)[1].tolist() == [49_406, *[red] * 75, 49_407]
    assert cut.tokens(rows)[1].tolist() == [49_406, *[red] * 76]
    assert cut.tokens(rows)[[0, 2]].tolist() == kept.tokens(rows)[[0, 2]].tolist()  # the last one has just 77
    assert lengths_of(cut.tokens(rows)).tolist() == [4, 1, 77]  # CLIP reads at the largest id: the start token
    assert kept.built == {}
    assert cut.built == {"end_token": "cut", "eda_insertion": "any", "exif": "ignore"}
    assert cut.is_whole(rows).all() and kept.is_whole(rows).all()
    with pytest.raises(UserError, match="differ in their flags of build"):
        Shards(tmp_path / "*.beton", [kept, cut])


@pytest.mark.parametrize("told", [b"{", b"1", b"\xff"])
def test_flags_of_a_build_that_cannot_be_are_told(source, tmp_path, told):
    flags = ["--source", str(source), "--out", str(tmp_path / "a.beton"), "--exif", "ignore", "--workers", "1"]
    assert build.run(cli.parse("build", flags)) == 0
    data, recorded = (tmp_path / "a.beton").read_bytes(), b'{"exif": "ignore"}'
    assert data.count(recorded) == 1
    (tmp_path / "a.beton").write_bytes(data.replace(recorded, told.ljust(len(recorded), b"\0")))
    with pytest.raises(UserError, match=r"a\.beton is no whole \.beton file"):
        Beton(tmp_path / "a.beton")


def test_a_build_has_its_recipe_and_flags_win():
    flags = ["--source", "a.csv", "--out", "a.beton", "--recipe", "published", "--exif", "bake"]
    found = cli.parse("build", flags)
    wanted = BuildConfig(source=Path("a.csv"), out=Path("a.beton"), recipe="published", end_token="cut",
                         eda_insertion="any")  # fmt: skip
    assert found == wanted
    given = dict(source="a.csv", out="a.beton", recipe="published", exif="bake")
    assert cli.settings_of("build", given) == wanted
    assert "recipe" in types_of(CleanConfig)


def test_a_build_of_a_recipe_still_needs_its_source(capsys):
    with pytest.raises(SystemExit):
        cli.parse("build", ["--recipe", "published", "--out", "a.beton"])
    assert "--source" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["build", "pretrain", "clean", "sweep"])
def test_a_recipe_that_is_none_is_refused(verb, capsys):
    needed = {"build": ["--source", "pairs.csv", "--out", "pairs.beton"], "sweep": ["--study", "demo"]}
    with pytest.raises(SystemExit) as ended:
        cli.parse(verb, [*needed.get(verb, []), "--recipe", "publisht"])
    assert ended.value.code == 2 and "publisht" in capsys.readouterr().err


@pytest.mark.parametrize("call", [fastbd.pretrain, fastbd.clean])
def test_a_recipe_that_is_none_is_refused_in_python(call):
    with pytest.raises(UserError, match="recipe is 'publisht', and must be one of corrected, published"):
        call(recipe="publisht")
