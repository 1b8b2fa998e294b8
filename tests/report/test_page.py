from __future__ import annotations

import base64
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import fastbd.report
from fastbd.base.run_folder import find
from fastbd.report import compare
from fastbd.report.format import percent
from fastbd.report.page import TABLE_1, cells, page, statistics_of, told
from fastbd.report.render import render
from fastbd.report.tables import table
from fastbd.report.verdict import RULE

FIGURES = {name: name.encode() for name in ("scatter", "methods", "trajectories", "curves")}
VOID = {"meta", "img", "br"}
TAGS = '</pre><script>&"'


class Checker(HTMLParser):
    """Collects tags, images with their alternatives, headings and text; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.images, self.words, self.headings = [], [], [], [], []
        self.alts = []
        self.feed(text)
        assert not self.open
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [value for name, value in attrs if name == "src"]
        self.alts += [value for name, value in attrs if name == "alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def whole(large):
    return Checker(page(find([large]), FIGURES))


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
    checked = Checker(page(find([tmp_path]), FIGURES))
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
    checked = Checker(text)
    assert all(f"{word} {TAGS}" in checked.text for word in ("run", "command", "method", "target", "fruit"))
    assert checked.alts[-1] == f"run {TAGS}"  # an attribute, which a quote must not end
    assert "script" not in checked.tags and TAGS not in text


def test_tags_in_the_names_of_two_studies_stay_text(study_of_tags):
    runs = find([study_of_tags])
    text = compare.page(compare.sides((f"one {TAGS}", f"other {TAGS}"), runs, runs), b"scatter")
    checked = Checker(text)
    title = f"one {TAGS} against other {TAGS}"
    assert title in checked.text and checked.alts == [title] and f"method {TAGS}" in checked.text
    assert "script" not in checked.tags and TAGS not in text


def test_a_value_that_the_template_misses_is_an_error():
    with pytest.raises(UndefinedError, match="'rows' is undefined"):
        render("compare.html.j2", title="one against other", scatter="", differences=[], same="")


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
    old = Checker(page(find([fake_runs]), FIGURES))
    assert "Does the backdoor come back?" not in old.headings and "no choice" in old.text
    assert "top-1 53.0%" in old.text  # by the formula: 0.5704 before, 0.5704 - 0.06 + 0.02 after ten epochs at rate 1
    assert re.search(r"After MMCL\+SSL no evaluation came down to ASR ≤ 5%; the lowest ASR is 8\.5% \(", old.text)
    clean_run(write_run, tmp_path / "begun", evaluation(0, 0, 0.5, 0.9))
    begun = Checker(page(find([tmp_path / "begun"]), FIGURES))
    assert "No cleaning has been evaluated with ASR yet" in begun.text


def test_what_is_said_of_a_model_by_itself(write_run, evaluation, tmp_path):
    def said(name, *metrics):
        rows = table(find([clean_run(write_run, tmp_path / name, *metrics)]))
        return told(rows[0], rows)

    good = said("good", evaluation(0, 0, 0.5, 0.99), evaluation(9, 1, 0.51, 0.05))
    assert "it came down to ASR ≤ 5% with top-1 51.0% (47.5–54.5), 102.0% of that before" in good
    assert "the attack never landed (top-1 50.0%, ASR 49.0%" in said("weak", evaluation(0, 0, 0.5, 0.49))
    assert "no ASR was measured before cleaning" in said("blind", evaluation(0, 0, 0.5), evaluation(9, 1, 0.5))


def test_pretrained_only(fake_runs):
    rows = table(find([fake_runs / "mmcl"]))
    assert "not cleaned in these runs" in told(rows[0], rows)


def test_cells(fake_runs):
    row = dict(zip(TABLE_1, cells(table(find([fake_runs]))[0]), strict=True))
    assert row["Pre-training"] == ("MMCL", "") and row["Cleaning"] == ("CleanCLIP", "2 runs")
    assert row["ASR before"] == ("99.4%", "98.6–99.8")  # Wilson's interval of 0.994 of 760
    assert row["Accuracy kept"] == ("93.0%", "") and row["Reached by"] == "1 of 1"


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
    assert percent(0.5, {"asr_low": 0.4, "asr_high": 0.61}, "asr") == "50.0% (40.0–61.0)"
