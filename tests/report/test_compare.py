"""Two studies are paired by their settings, and what sets them apart is said."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastbd.base.run_folder import find
from fastbd.commands.report import compared_rows
from fastbd.report.compare import Difference, lines, rows, sides, told
from fastbd.report.page import BEST_WITHIN

NAMES = ("one", "other")


@pytest.fixture
def study(write_run, evaluation, tmp_path):
    """Runs of a study of MMCL models, cleaned by PAR with each of the settings to (top-1, ASR) in %."""

    def make(name, cleanings, top1=50, model="demo", pre=None, **more):
        start_config = {"objective": "mmcl", "pretrain_objective": "mmcl", "model": model, "config": pre or {}}
        start = write_run(tmp_path / name / "start", start_config, [evaluation(9, 1, top1 / 100, 0.99) | more], [])
        for k, (settings, (after, asr)) in enumerate(cleanings):
            rows = [evaluation(0, 0, top1 / 100, 0.99), evaluation(10, 1, after / 100, asr / 100)]
            config = start_config | {"verb": "clean", "method": "par", "start": str(start), "config": settings}
            write_run(tmp_path / name / f"clean{k}", config, [row | more for row in rows], [])
        return find([tmp_path / name])

    return make


def paired(compared):
    """The best top-1 at ASR <= 5 % of both sides of each pair, in %; None for a side that is missing."""
    tops = [[row and round(100 * row.best[0].top1.mean) for row in pair] for pair in compared.pairs]
    return sorted(tops, key=str)


def test_a_setting_that_differs_is_named_above_the_table(study):
    one, other = study("one", [({"tau": 0.0}, (40, 1))]), study("other", [({"tau": 2.15}, (45, 1))])
    compared = sides(NAMES, one, other)
    assert compared.differences == (Difference("tau of PAR", "0", "2.15"),)
    assert paired(compared) == [[40, 45]] and "tau of PAR: 0 in one, 2.15 in other" in told(compared)
    assert [line["Study"] for line in lines(compared)] == ["one", "other", "difference"]


def test_runs_that_diverged_are_told_beside_their_study(study, tmp_path):
    study("one", [({"lr": 1e9}, (40, 1))]), study("other", [({"lr": 1e-3}, (45, 1))])
    (tmp_path / "one" / "clean0" / "result.json").write_text('{"reason": "diverged"}')
    compared = sides(NAMES, *(find([tmp_path / name]) for name in NAMES))
    assert [line["Study"] for line in lines(compared)] == ["one; the run diverged (lr 1e9)", "other", "difference"]


def test_brackets_in_a_name_are_shown_in_the_terminal(study):
    runs = study("one", [({"tau": 0.0}, (40, 1))])
    shown = io.StringIO()
    Console(file=shown, width=120).print(compared_rows(sides(("[bold]one", "[dim]other"), runs, runs)))
    assert "[bold]one" in shown.getvalue() and "[dim]other" in shown.getvalue()


def test_rows_are_paired_by_settings_whatever_their_labels(study):
    """One study compares two values of tau, so that its rows are labelled by it; the other has one, and no label."""
    both = [({"tau": t, "lr": lr}, (top, 1)) for t, top in ((0.0, 40), (2.15, 45)) for lr in (1e-4, 3e-4)]
    compared = sides(NAMES, study("one", both), study("other", [({"tau": 2.15, "lr": 1e-4}, (47, 1))]))
    assert paired(compared) == [[40, None], [45, 47]]
    assert compared.differences == (Difference("learning rate of PAR", "0.0001, 0.0003", "0.0001"),)
    (pair,) = [pair for pair in compared.pairs if None not in pair]
    assert [row.group.method for row in pair] == ["PAR, tau 2.15", "PAR"]


def test_architecture_and_pretraining_are_named(study):
    one = study("one", [({}, (40, 1))], model="demo", pre={"batch_size": 64})
    other = study("other", [({}, (5, 1))], model="rn50", pre={"batch_size": 128})
    compared = sides(NAMES, one, other)
    assert compared.differences == (
        Difference("architecture", "demo", "rn50"),
        Difference("batch size of MMCL pre-training", "64", "128"),
    )
    assert paired(compared) == [[5, 40]] or paired(compared) == [[40, 5]]
    assert "architecture" not in "; ".join(compared.same) and "training data pairs.beton" in compared.same


def test_numbers_of_two_evaluation_sets_are_not_subtracted(study):
    one, other = (study(name, [({}, (40, 1))], content=content) for name, content in (("one", "a1"), ("other", "b2")))
    compared = sides(NAMES, one, other)
    assert [each.setting for each in compared.differences] == ["evaluated on"] and not compared.measured_alike
    assert [line["Study"] for line in lines(compared)] == ["one", "other"]
    assert any("different images" in line for line in told(compared))


def test_what_only_one_study_recorded_tells_nothing_apart(study):
    """An older study has no `frozen_norms`: its row is paired, and where two rows would fit, none is."""
    old, new = study("one", [({}, (40, 1))]), study("other", [({"frozen_norms": True}, (45, 1))])
    assert paired(sides(NAMES, old, new)) == [[40, 45]] and sides(NAMES, old, new).differences == ()
    two = [({"frozen_norms": norms, "lr": lr}, (top, 1)) for norms, top in ((True, 45), (False, 30)) for lr in (1, 2)]
    assert paired(sides(NAMES, old, study("third", two))) == [[40, None], [None, 30], [None, 45]]


def test_a_study_is_paired_with_itself(large):
    runs = find([large])
    compared = sides(NAMES, runs, runs)
    assert all(a.group.method == b.group.method and a.group.model == b.group.model for a, b in compared.pairs)
    assert len(compared.pairs) == 8 and compared.differences == ()
    assert {line["Top-1 before"] for line in lines(compared) if line["Study"] == "difference"} == {"0.0 points"}


def test_what_was_not_recorded_before_there_was_a_flag_is_known(study):
    one = study("one", [({"tau": 2.15}, (40, 1))])
    new = {"tau": 2.15, "schedule": "exact", "exempt": "names", "lr_start": 3e-5}
    other = study("other", [(new, (45, 1))], pre={"schedule": "shifted", "exempt": "vectors"})
    compared = sides(NAMES, one, other)
    assert set(compared.differences) == {
        Difference("schedule of MMCL pre-training", "exact", "shifted"),
        Difference("exempt of PAR", "vectors", "names"),
        Difference("lr start of PAR", "not set", "3e-05"),
    }


def test_the_table_fits_80_columns_without_loss(study):
    settings = {"tau": 2.15, "gate": "sample"}, {"tau": 0.0, "gate": "sample"}
    runs = study("one", [(each, (40, 1)) for each in settings], n_classes=20)
    compared = sides(("studies/a-rather-long-name", "other"), runs, runs)
    shown = io.StringIO()
    Console(file=shown, width=80).print(compared_rows(compared))
    said = shown.getvalue()
    assert max(map(len, said.splitlines())) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in said
    wide = next(line.index("Guess") for line in said.splitlines() if "Guess" in line)
    first = "".join(line[:wide].strip() for line in said.splitlines()).replace(" ", "")
    assert "MMCL:PAR,tau2.15" in first and "studies/a-rather-long-name" in first
    assert ["other", "5.0", "50.0", "99.0", "40.0", "80.0", "40.0", "39.6"] in [
        line.split() for line in said.splitlines()
    ]
    assert ["difference", *["0.0"] * 6] in [line.split() for line in said.splitlines()]


def test_nothing_is_subtracted_of_models_near_chance_or_without_a_backdoor(study):
    """Guessing among 20 classes gives 5 %; Wilson's interval of 9 % of 800 images goes from 7.2 %."""
    one, other = (study(name, [({}, (8, 1))], top1=top1, n_classes=20) for name, top1 in (("one", 9), ("other", 50)))
    compared = sides(NAMES, one, other)
    assert [line["Study"] for line in lines(compared)] == ["one", "other"]
    assert ["near chance" in line["Top-1 before"][1] for line in lines(compared)] == [True, False]
    assert all("near chance" in line[BEST_WITHIN[0]][1] for line in lines(compared))
    assert {line["Guessing"] for line in lines(compared)} == {"5.0%"}
    why = "the accuracy was near chance, which is 5.0%"
    assert f"No differences where before cleaning {why}: MMCL in one." in told(compared)
    assert [row["not_judged"] for row in rows(compared)] == [why, None] and rows(compared)[0]["guessing"] == 0.05


def test_what_both_were_evaluated_on_is_told_in_words(study):
    about = {"content": "65118faa3932f40d", "class_list": "the data's", "templates": "demo"}
    compared = sides(NAMES, *(study(name, [({}, (40, 1))], **about) for name in NAMES))
    assert compared.same[-1] == (
        "evaluated on data set demo-val (hash of the images: 65118faa3932f40d; class names: those in the data set; "
        "prompt templates: demo)"
    )
