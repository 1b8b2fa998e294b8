from __future__ import annotations

import base64
import io
import json
import re
import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from pages import Page
from rich.console import Console

import fastbd.report
from fastbd.base.console import duration
from fastbd.base.run_folder import find
from fastbd.commands.report import table_1
from fastbd.report import compare, export, write
from fastbd.report.format import percent, rate, share
from fastbd.report.head import head
from fastbd.report.page import TABLE_1, cells, page, rates, statistics_of, told
from fastbd.report.render import render
from fastbd.report.tables import table
from fastbd.report.verdict import RULE

FIGURES = {name: name.encode() for name in ("scatter", "methods", "trajectories", "curves")}
TAGS = '</pre><script>&"'


@pytest.fixture(scope="module")
def whole(large):
    return Page(page(find([large]), FIGURES))


def clean_run(write_run, folder, *metrics, **more):
    config = {"verb": "clean", "method": "cleanclip", "objective": "mmcl_ssl", "pretrain_objective": "mmcl"}
    return write_run(folder, config | {"start": "/models/base"} | more, list(metrics), [])


def test_page_is_well_formed_and_needs_nothing_else(whole, large):
    assert not {"script", "link", "iframe"} & set(whole.tags)
    pictures = [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in whole.images]
    assert pictures[:4] == list(FIGURES.values())
    assert pictures[4:] == [(large / "mmcl-s0" / "samples.png").read_bytes()]  # one attack, one contact sheet
    assert whole.headings == [
        "Does it depend on the pre-training?",
        "Table 1. The best accuracy of a cleaned model",
        "Accuracy against attack success rate",
        "The same for each cleaning method",
        "How cleaning went",
        "Stopping without knowing the trigger",
        "Does the backdoor come back?",
        "What it took",
        "Published results, for comparison only",
        "Training losses",
        "Training images",
        "To repeat it",
    ]
    assert "http" not in page(find([large]), FIGURES)


def test_tables_have_captions_and_heads_with_a_scope(whole):
    assert len(whole.tables) == 10
    assert all(one["caption"].strip() for one in whole.tables)
    assert len({one["caption"] for one in whole.tables}) >= 9
    for heads in (one["heads"] for one in whole.tables):
        assert {scope for _, scope in heads} == {"col", "row"} and all(text.strip() for text, _ in heads)


@pytest.mark.parametrize("study", ["large", "fake_runs"])
def test_no_number_is_nonsense(study, request):
    text = Page(page(find([request.getfixturevalue(study)]), FIGURES)).text
    prose = text[: text.index("To repeat it")]
    assert not re.search(r"\b(nan|inf)\b|-0\.0\b|\N{MINUS SIGN}0\.0\b", prose)
    assert not re.search(r"(?<![\w.\N{EN DASH}])-\d", prose)  # a hyphen for a minus sign


def test_alternatives_say_what_is_seen(whole, large):
    scatter, methods, trajectories, curves, sheet = whole.alts
    runs = find([large])
    points = sum(len(run.cleaned) for run in runs)
    assert scatter.startswith(f"{points:,} evaluations of cleaned models as points")
    par = [e for run in runs if run.method == "par" and run.pretrain_objective == "mmcl" for e in run.cleaned]
    low, high = (100 * f(e["asr"] for e in par) for f in (min, max))
    assert re.search(rf"PAR after MMCL: top-1 \S+ to \S+, ASR {low:.1f}% to {high:.1f}%\.", scatter)
    assert "CleanCLIP, Finetuning (MMCL), Finetuning (SSL), PAR" in methods
    assert "PAR after MMCL ends at top-1" in trajectories
    assert re.search(
        r"epochs\. MMCL: total loss from \S+ to \S+\. MMCL\+SSL: .* CleanCLIP after MMCL: total loss", curves
    )
    assert "plain and AutoAugment: clean ones, poisoned ones with the trigger (badnet" in sheet


def test_the_head_of_the_answers_is_of_what_varies(write_run, evaluation, tmp_path):
    for tau in (0.0, 2.15):
        metrics = [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.01)]
        clean_run(write_run, tmp_path / f"{tau}", *metrics, config={"lr": 1e-4, "seed": 0, "tau": tau})
    found = Page(page(find([tmp_path]), FIGURES))
    assert found.headings[0] == "What does it depend on?" and "another pre-training" not in found.text


def test_the_picture_of_two_studies_is_told(large, tmp_path):
    runs = find([large])
    compare.write(("one", "other"), runs, runs, tmp_path)
    (told_of,) = Page((tmp_path / "index.html").read_text()).alts
    assert "one: " in told_of and "other: " in told_of and "PAR after MMCL: top-1" in told_of


def test_attacks_are_told_apart_in_words_too(fake_runs):
    for run in find([fake_runs]):
        if run.name.startswith("mmcl_ssl"):
            plan = run.path / "plan.json"
            plan.write_text(plan.read_text().replace("random", "corner"))
    whole = Page(page(find([fake_runs]), FIGURES))
    for alt in (whole.alts[0], whole.alts[2]):
        assert "CleanCLIP after MMCL (16 px random)" in alt and "CleanCLIP after MMCL+SSL (16 px corner)" in alt


def test_without_a_course_there_is_no_figure_of_it(write_run, evaluation, tmp_path):
    run = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    write_run(tmp_path / "once", run, [evaluation(10, 1, 0.5, 0.9)], [{"step": 0, "epoch": 0.0, "loss": 1.0}])
    runs = find([tmp_path])
    assert [draw.__name__ for draw in write.shown(runs)] == ["scatter"]
    assert "Training losses" not in Page(page(runs, {"scatter": b"scatter"})).headings
    clean_run(write_run, tmp_path / "clean", evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.5, 0.1))
    assert [draw.__name__ for draw in write.shown(find([tmp_path]))] == ["scatter", "trajectories"]
    write_run(tmp_path / "other" / "plain", run, [evaluation(k, k, 0.5) for k in (1, 2)], [])
    assert [draw.__name__ for draw in write.shown(find([tmp_path / "other"]))] == ["trajectories"]


def test_several_learning_rates_of_the_best_points_are_told(write_run, evaluation, tmp_path):
    for seed, lr in enumerate((1e-4, 1e-4, 3e-5)):
        flags = {"config": {"seed": seed, "lr": lr}}
        rows = [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.5, 0.01)]
        clean_run(write_run, tmp_path / f"{seed}", *rows, **flags)
    row = table(find([tmp_path]))[0]
    assert rates(row.best[0]) == {1e-4: 2, 3e-5: 1}
    assert dict(zip(TABLE_1, cells(row), strict=True))["Reached by, with"] == ("3 of 3", "lr 1e-4 (2), 3e-5 (1)")


def test_time_on_a_cpu_is_told_in_minutes_and_with_its_cores(write_run, tmp_path):
    folder = write_run(tmp_path / "a", {"objective": "mmcl", "pretrain_objective": "mmcl"}, [], [], {"seconds": 73.2})
    (folder / "env.json").write_text(json.dumps({"cpu_cores": 2}))
    text = Page(page(find([tmp_path]), FIGURES)).text
    assert "73 s CPU, 2 cores" in text and "hours" not in text


def test_guessing_is_told_where_it_is_known(write_run, evaluation, tmp_path):
    rows = [evaluation(0, 0, 0.5, 0.9) | {"n_classes": 8}]
    write_run(tmp_path / "a", {"objective": "mmcl", "pretrain_objective": "mmcl"}, rows, [])
    text = " ".join(Page(page(find([tmp_path]), FIGURES, interactive="figures/interactive.html")).text.split())
    assert "Guessing gives a top-1, an ASR and a recovery of 12.5%: a value at that level is chance." in text
    assert (
        "the share of ASR's images still given their true class; at 12.5%, what guessing gives, it is chance." in text
    )


@pytest.mark.parametrize(("classes", "after"), [(20, "near chance"), (100, "")])
def test_a_top1_that_is_near_chance_says_so(classes, after, write_run, evaluation, tmp_path):
    """800 images: Wilson's interval of 6 % begins at 4.6 %, and guessing gives 5 or 1 %."""
    rows = [evaluation(0, 0, 0.5, 0.9) | {"n_classes": classes}, evaluation(9, 1, 0.06, 0.01) | {"n_classes": classes}]
    clean_run(write_run, tmp_path / "a", *rows)
    row = dict(zip(TABLE_1, cells(table(find([tmp_path]))[0]), strict=True))
    assert row["Top-1 before"][1] == "46.5–53.5"
    found = row[TABLE_1[5]][1]
    assert found == "4.6–7.9" + (f"; {after}" if after else "")


def test_contact_sheets_are_explained(whole):
    assert "the views of an image, and to the right of them its caption, in grey the augmented one" in " ".join(
        whole.text.split()
    )


def test_a_trigger_from_outside_is_called_by_its_name(write_run, evaluation, tmp_path):
    rows = [evaluation(0, 0, 0.5, 0.9) | {"trigger": "mine:dots"}]
    folder = write_run(tmp_path / "a", {"objective": "mmcl", "pretrain_objective": "mmcl"}, rows, [])
    plan = folder / "plan.json"
    plan.write_text(plan.read_text().replace("badnet", "mine:dots"))
    text = Page(page(find([tmp_path]), FIGURES)).text
    assert "dots to \N{LEFT DOUBLE QUOTATION MARK}banana" in text and "attack dots, 320 of 4,000 pairs" in text
    assert "random" not in text[: text.index("To repeat it")]


def test_the_answer_comes_first_and_its_rule_is_told(whole):
    assert whole.text.index("This study") < whole.text.index("Does it depend") < whole.text.index(RULE)
    assert "it is optimistic" in whole.text


def test_every_run_can_be_repeated(whole, large):
    for run in find([large]):
        assert run.id in whole.text and run.name in whole.text and (run.recorded.get("command") or "") in whole.text
    best = table(find([large]))[0].best[0].points[0]
    assert f"step {best[1]['step']} epoch {best[1]['epoch']:.3g}" in whole.text


def test_text_of_the_runs_is_escaped(write_run, evaluation, tmp_path):
    config = {"objective": "<b>x", "pretrain_objective": "<b>x", "name": "<script>&", "config": {"notes": "</pre><i>"}}
    write_run(tmp_path / "a<u>", config, [evaluation(0, 0, 0.5, 0.9) | {"target": "<q>", "set": "<em>"}], [])
    checked = Page(page(find([tmp_path]), FIGURES))
    assert not {"b", "script", "i", "u", "q", "em"} & set(checked.tags)
    assert all(text in checked.text for text in ("<b>x", "<script>&", "</pre><i>", "a<u>", "<q>", "<em>"))


@pytest.fixture
def study_of_tags(write_run, evaluation, tmp_path):
    """A cleaned model with tags in the name of its run, its command, its method, its target and its attack."""
    config = {"name": f"run {TAGS}", "command": f"command {TAGS}", "method": f"method {TAGS}"}
    metrics = [evaluation(k, k, 0.5, asr) | {"target": f"target {TAGS}"} for k, asr in enumerate((0.9, 0.01))]
    run = clean_run(write_run, tmp_path / "study", *metrics, **config)
    plan = json.loads((run / "plan.json").read_text())
    plan["attacks"][0]["target"] = f"fruit {TAGS}"
    (run / "plan.json").write_text(json.dumps(plan))
    return tmp_path / "study"


def test_tags_in_what_a_user_names_stay_text(study_of_tags):
    text = page(find([study_of_tags]), FIGURES)
    checked = Page(text)
    assert all(f"{word} {TAGS}" in checked.text for word in ("run", "command", "method", "target", "fruit"))
    assert f"of run {TAGS}, plain" in checked.alts[-1]  # an attribute, which a quote must not end
    assert "script" not in checked.tags and TAGS not in text


def test_tags_in_the_names_of_two_studies_stay_text(study_of_tags):
    runs = find([study_of_tags])
    compared = compare.sides((f"one {TAGS}", f"other {TAGS}"), runs, runs)
    text = compare.page(compared, b"scatter", "points", {name: head(runs) for name in compared.names})
    checked = Page(text)
    title = f"one {TAGS} against other {TAGS}"
    assert title in checked.text and checked.alts == ["points"] and f"method {TAGS}" in checked.text
    assert "script" not in checked.tags and TAGS not in text


def test_a_value_that_the_template_misses_is_an_error():
    with pytest.raises(UndefinedError, match="'rows' is undefined"):
        render("compare.html.j2", title="one against other", heads={}, scatter="", differences=[], same="")


def test_templates_are_installed():
    """Each of them is package data, as pyproject.toml has it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fastbd.report"]
    folder = Path(fastbd.report.__file__).parent
    installed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert {folder / f"{name}.html.j2" for name in ("base", "parts", "page", "compare")} <= installed


def test_older_runs_and_little_in_them(fake_runs, write_run, evaluation, tmp_path):
    for run in find([fake_runs]):
        (run.path / "plan.json").unlink()
    old = Page(page(find([fake_runs]), FIGURES))
    assert "Does the backdoor come back?" not in old.headings and "no choice" in old.text
    assert "top-1 53.0%" in old.text  # by the formula: 0.5704 before, 0.5704 - 0.06 + 0.02 after ten epochs at rate 1
    assert re.search(r"After MMCL\+SSL no evaluation came down to ASR ≤ 5%; the lowest ASR is 8\.5% \(", old.text)
    clean_run(write_run, tmp_path / "begun", evaluation(0, 0, 0.5, 0.9))
    begun = Page(page(find([tmp_path / "begun"]), FIGURES))
    assert "No cleaning has been evaluated with ASR yet" in begun.text


def test_what_is_said_of_a_model_by_itself(write_run, evaluation, tmp_path):
    def said(name, *metrics):
        rows = table(find([clean_run(write_run, tmp_path / name, *metrics)]))
        return told(rows[0], rows)

    good = said("good", evaluation(0, 0, 0.5, 0.99), evaluation(9, 1, 0.51, 0.05))
    assert "it came down to ASR ≤ 5% with top-1 51.0% (47.5–54.5), 102.0% of that before" in good
    assert "the attack never landed (top-1 50.0%, ASR 49.0%" in said("weak", evaluation(0, 0, 0.5, 0.49))
    assert "no ASR was measured before cleaning" in said("blind", evaluation(0, 0, 0.5), evaluation(9, 1, 0.5))


def test_of_an_attack_that_landed_with_some_seeds_it_is_said_with_how_many(write_run, evaluation, tmp_path):
    for seed, asr in enumerate((0.99, 0.1, 0.2)):
        pre = {"objective": "mmcl", "pretrain_objective": "mmcl", "config": {"seed": seed}}
        start = write_run(tmp_path / f"s{seed}", pre, [evaluation(9, 1, 0.5, asr)], [])
        if seed < 2:
            rows = [evaluation(0, 0, 0.5, asr), evaluation(9, 1, 0.5, 0.01)]
            clean_run(write_run, tmp_path / f"c{seed}", *rows, method="par", start=str(start))
    rows = table(find([tmp_path]))
    assert "MMCL: the attack landed with 1 of 2 seeds of the pre-training (means before cleaning" in told(
        rows[-1], rows
    )
    only = table(find([tmp_path / f"s{seed}" for seed in range(3)]))
    assert "the attack landed with 1 of 3 seeds of the pre-training" in told(only[0], only)


def test_a_pretraining_that_has_not_ended_is_not_shown_as_if(write_run, evaluation, tmp_path):
    config = {"objective": "mmcl", "pretrain_objective": "mmcl", "config": {"epochs": 12}}
    write_run(tmp_path / "a", config, [evaluation(10 * k, k, 0.1 * k, 0.3 * k) for k in (1, 2, 3)], [])
    (row,) = rows = table(find([tmp_path]))
    assert told(row, rows) == "MMCL: the pre-training has not ended (at epoch 3 of 12); so far top-1 30.0%, ASR 90.0%."
    assert (
        "not cleaned; the pre-training has not ended (at epoch 3 of 12)" in Page(page(find([tmp_path]), FIGURES)).text
    )
    shown = io.StringIO()
    Console(file=shown, width=200).print(table_1(rows))
    assert "the pre-training has not ended (at epoch 3 of 12)" in " ".join(shown.getvalue().split())


@pytest.mark.parametrize(("after", "said"), [(100, False), (70, True)])
def test_the_least_stable_is_named_only_where_a_rise_is_clear(after, said, write_run, evaluation, tmp_path):
    """From 99.6 or 60 % in two steps, the first of which goes up while accuracy falls."""
    rows = [
        evaluation(k, k, top1, asr / 100) for k, (top1, asr) in enumerate([(0.5, after - 10), (0.4, after), (0.4, 1)])
    ]
    rows[0] |= {} if said else evaluation(0, 0, 0.5, 0.996)
    clean_run(write_run, tmp_path / "a", *rows)
    text = " ".join(Page(page(find([tmp_path]), FIGURES)).text.split())
    assert (
        "Least stable: CleanCLIP after MMCL, where accuracy fell while ASR rose in 50% of the steps" in text
    ) == said
    assert f"50% {'10.0' if said else '0.4'} points a" in text


def test_pretrained_only(fake_runs):
    rows = table(find([fake_runs / "mmcl"]))
    assert "not cleaned in these runs" in told(rows[0], rows)


def test_where_no_seed_came_down_nothing_was_kept_in_every_table(fake_runs):
    """MMCL+SSL is never within 5 %: 0 kept by the rule of the verdicts, on the page as in table.csv."""
    runs = find([fake_runs])
    row = table(runs)[2]
    assert row.best[0].reached == 0
    shown = dict(zip(TABLE_1, cells(row), strict=True))
    assert shown["Accuracy kept"] == ("0.0%", "") and shown["Reached by, with"][0] == "0 of 1"
    assert export.table_rows(runs)[2]["kept_at_asr_5"] == 0
    compared = compare.lines(compare.sides(("one", "other"), runs, runs))
    assert {line["Accuracy kept"] for line in compared[6:8]} == {("0.0%", "")}


def test_cells(fake_runs):
    row = dict(zip(TABLE_1, cells(table(find([fake_runs]))[0]), strict=True))
    assert row["Pre-training"] == ("MMCL", "") and row["Cleaning"] == ("CleanCLIP", "2 runs")
    assert row["ASR before"] == ("99.4%", "98.6–99.8")  # Wilson's interval of 0.994 of 760
    assert row["Accuracy kept"] == ("93.0%", "") and row["Reached by, with"] == ("1 of 1", "lr 1e-4")


@pytest.mark.parametrize(
    ("architecture", "objective", "flags", "statistics"),
    [
        ("vit-b-32", "mmcl_ssl", {}, "no batch norm"),
        ("rn50", "mmcl_ssl", {"views": "cleanclip"}, "plain and AutoAugment views"),
        ("demo", "mmcl", {"views": "cleanclip"}, "plain views"),
        ("demo", "mmcl_ssl", {"views": "cleanclip", "ssl_image": False}, "plain views"),
        ("demo", "mmcl", {"views": "par"}, "noisy and partly erased views"),
    ],
)
def test_statistics(architecture, objective, flags, statistics, write_run, tmp_path):
    clean_run(write_run, tmp_path / "a", model=architecture, objective=objective, config=flags)
    assert statistics_of(find([tmp_path])[0]) == statistics


def test_percent():
    assert percent(None) == "–" and percent(0.16494) == "16.5%"
    assert share(-0.0004) == "0.0%" and share(-0.125) == "\N{MINUS SIGN}12.5%"
    assert [rate(lr) for lr in (0.0003, 0.001, 1.5e-5, 2.0, 0)] == ["3e-4", "1e-3", "1.5e-5", "2e0", "0"]
    assert [duration(s) for s in (0.02, 73, 130, 7200, 5e5)] == ["0.02 s", "73 s", "2 min", "2.0 h", "5.8 days"]
    assert [duration(s) for s in (99, 100, 5999, 6000)] == ["99 s", "2 min", "100 min", "1.7 h"]
    assert percent(0.5, {"asr_low": 0.4, "asr_high": 0.61}, "asr") == "50.0% (40.0–61.0)"


def test_runs_without_a_curve_of_their_losses_are_counted(write_run, evaluation, tmp_path):
    log = [{"step": k, "epoch": k / 2, "loss": 1.0} for k in (1, 2)]
    about = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    write_run(tmp_path / "base", about, [evaluation(2, 1, 0.5, 0.9)], log)
    more = {"verb": "clean", "method": "par", "start": str(tmp_path / "base")}
    for name in "ab":
        write_run(tmp_path / name, about | more, [], log[:1])
    text = Page(page(find([tmp_path]), FIGURES)).text
    assert "Not drawn: 2 cleanings whose log has a single row." in " ".join(text.split())
    assert "Not drawn" not in page(find([tmp_path / "base"]), FIGURES)
