from __future__ import annotations

from pathlib import Path

import pytest

from fastbd.base.errors import UserError
from fastbd.config.presets import PRESETS
from fastbd.study.grid import Study, expand, with_overrides
from fastbd.study.studies import STUDIES, load

TOML = """
about = "what a user wants to know"
seeds = [0, 1]

[[pretrain]]
objective = ["mmcl", "mmcl_ssl"]

[[clean]]
method = "cleanclip"
lr = [1e-4, 1]
"""
PYTHON = """
from fastbd.study.grid import Study

study = Study(name="mine", about="", pretrain=({},), clean=({"lr": (1e-4, 1e-3)},))
"""


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_works_on_every_data_set(name, preset):
    study = load(name, preset)
    assert study.name == name and study.about.endswith("?")
    if preset != "demo":
        plan = None if study.attacks else Path("pairs.poison.json")
        study = with_overrides(study, eval_data=Path("val.beton"), plan=plan)
    runs = expand(study, Path("S"))
    models = [run for run in runs if run.verb == "pretrain"]
    cleanings = [run for run in runs if run.verb == "clean"]
    assert len(cleanings) % len(models) == 0 and len(cleanings) >= 3 * len(models)
    assert max(len(run.name) for run in runs) <= 80


def count(study: Study) -> int:
    runs = expand(with_overrides(study, eval_data=Path("val.beton")), Path("S"))
    return sum(run.verb == "clean" for run in runs)


def test_the_paper_is_cleaned_as_often_as_published():
    assert count(load("paper")) == 68  # 13 + 8 + 13 runs for each of two models
    assert load("paper").preset == "paper-cc3m" and load("paper-200k").preset == "paper-cc6m"


def test_the_demo_is_small():
    assert count(load("demo")) == 26


def test_a_file_gives_a_study(tmp_path):
    toml, python = tmp_path / "mine.toml", tmp_path / "mine.py"
    toml.write_text(TOML)
    python.write_text(PYTHON)
    study = load(toml)
    assert (study.name, study.preset, study.seeds) == ("mine", "demo", (0, 1))
    assert len(expand(study, Path("S"))) == 4 + 4 * 2
    assert load(str(python)).clean == ({"lr": (1e-4, 1e-3)},)
    assert load(toml, "paper-cc3m").preset == "paper-cc3m"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "x = " + 9000 * "[", "a.toml: it is nested too deeply"),
        ("a.toml", "preset = 1", "a.toml: 'preset' of the study must be a text"),
        ("a.toml", "seeds = 1 2", "a.toml: this is not TOML: .*line 1"),
        (
            "a.toml",
            TOML.replace("lr", "lrr"),
            "a.toml: entry 1 of clean in the study 'a' has the flag 'lrr'.* mean lr?",
        ),
        ("a.toml", TOML.replace("seeds", "seed"), "a.toml: a study has no 'seed'; did you mean seeds?"),
        ("a.toml", TOML.replace("[[clean]]", "[clean]"), "a.toml: 'clean' of the study must be a list"),
        ("a.py", "\n\nx = 1 / 0", "a.py: line 3 fails with ZeroDivisionError: division by zero"),
        ("a.py", "\nx = (", "a.py: line 2 fails with SyntaxError"),
        ("a.py", PYTHON.replace("lr", "lrr"), "a.py: entry 1 of clean in the study 'mine' has the flag 'lrr'"),
        ("a.py", "x = 1", "a.py: it must hold `study = Study"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "preset", "said"),
    [
        ("papr", None, "no study 'papr'; did you mean paper?"),
        ("mine.toml", None, "no file mine.toml"),
        ("paper", "cc3m", "no preset 'cc3m'; there are demo, paper-cc3m, paper-cc6m"),
    ],
)
def test_what_there_is_not_is_told(name, preset, said):
    with pytest.raises(UserError, match=said):
        load(name, preset)


def test_the_study_that_the_docs_tell_of():
    study = load(Path(__file__).parents[2] / "docs/real-images.toml")
    verbs = [run.verb for run in expand(study, Path("S"))]
    assert (verbs.count("pretrain"), verbs.count("clean")) == (6, 132)
