"""Code outside of the package, by its dotted name: the very files of docs/extending, through the command line."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
import zlib
from pathlib import Path

import pytest
import torch

from fastbd import cli, evaluate
from fastbd.base import dist
from fastbd.base.errors import UserError
from fastbd.base.run_folder import find
from fastbd.commands import clean, sweep
from fastbd.config.cards import facts, remember
from fastbd.config.flags import SweepConfig
from fastbd.data.demo import write_demo_set
from fastbd.poison.plan import Plan
from fastbd.poison.triggers import TriggerSpec, stamp
from fastbd.study.grid import Study
from fastbd.study.ledger import Ledger
from fastbd.training import roofline
from fastbd.training.reuse import Kept
from fastbd.training.run import Run

DOCS = Path(__file__).parents[1] / "docs"
MACHINE = "--batch-size 24 --device cpu --decode pil --workers 1 --log-every 1"
TRAINED = ("pretrain", "clean")
SWEPT = " --device cpu --processes 1"


def commands() -> list[str]:
    """The command lines of docs/extending.md."""
    text = (DOCS / "extending.md").read_text().replace("\\\n", " ")
    return re.findall(r"^    python -m fastbd (.*)$", text, re.MULTILINE)


def lines(verb: str) -> list[str]:
    return [line for line in commands() if line.startswith(f"{verb} ")]


def fastbd(line: str) -> None:
    extra = f" {MACHINE}" if line.startswith(TRAINED) else SWEPT if line.startswith("sweep") else ""
    assert cli.main(shlex.split(line + extra)) == 0, line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all that the page's commands make but for the sweep, and its modules, which are forgotten again."""
    folder = tmp_path_factory.mktemp("extending")
    shutil.copytree(DOCS / "extending", folder, dirs_exist_ok=True)
    list(write_demo_set(folder, 240, 60, seed=1))
    known, path = set(sys.modules), list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(roofline.SIDES, "cpu", (64,))
        patch.setitem(roofline.COPIED, "cpu", 1 << 16)
        for verb in ("build", "poison", "pretrain", "clean", "evaluate", "report"):
            for line in lines(verb):
                fastbd(line)
    yield folder
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def rows(run: str) -> list[dict]:
    return [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]


def config(run: str) -> dict:
    return json.loads(Path("runs", run, "config.json").read_text())


def test_the_page_names_each_file():
    page = (DOCS / "extending.md").read_text()
    assert all(f"extending/{path.name}" in page for path in (DOCS / "extending").iterdir() if path.is_file())


def test_names_are_recorded_with_what_reports_need():
    start, cleaned = config("start"), config("spread")
    assert start["config"]["objective"] == start["objective"] == "one_way:make"
    assert start["config"]["model"] == start["model"] == "narrow:build"
    assert cleaned["method"] == "spread:Spread" and cleaned["config"]["strength"] == 0.5
    assert "tau" not in cleaned["config"]
    assert cleaned["cards"]["spread:Spread"]["title"] == "Spreading"
    assert cleaned["cards"]["one_way:make"] == start["cards"]["one_way:make"]
    digests = {name: card["sha256"] for name, card in (start["cards"] | cleaned["cards"]).items()}
    assert digests == {
        name: hashlib.sha256(Path(f"{name.partition(':')[0]}.py").read_bytes()).hexdigest()
        for name in ("chequers:corner", "narrow:build", "one_way:make", "similarity:alike", "spread:Spread")
    }
    assert Plan.load("train.poison.json").attacks[0].trigger.name == "chequers:corner"


def test_the_trigger_is_in_the_data_that_are_evaluated():
    assert all(row["trigger"] == "chequers:corner" and 0 <= row["asr"] <= 1 for row in rows("start"))


def test_the_evaluators_numbers_are_in_each_row():
    assert all(-1 <= row["triggered_cosine"] <= 1 and "clean_cosine" in row for row in rows("start"))


def test_an_evaluation_later_gives_the_evaluators_numbers_too(capsys):
    assert cli.main(["evaluate", "--run", "runs/start", "--device", "cpu", "--evaluator", "similarity:alike"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| triggered_cosine ")]
    *_, trained, later = rows("start")
    assert later["triggered_cosine"] == pytest.approx(trained["triggered_cosine"], abs=1e-5)
    assert f"{later['triggered_cosine']:.4g}" in line


def test_the_parts_of_a_loss_are_logged():
    log = [json.loads(line) for line in Path("runs/spread/log.jsonl").read_text().splitlines()]
    assert all(row["loss"] == pytest.approx(row["mmcl"] + 0.5 * row["spread"], abs=1e-4) for row in log)


def test_a_report_shows_titles_without_the_code(monkeypatch):
    page = Path("report/index.html").read_text()
    assert "Spreading" in page and "One-way MMCL" in page
    assert {run.method for run in find([Path("runs")])} == {None, "spread:Spread"}


def test_a_run_is_resumed_by_the_recorded_name(capsys):
    settings = cli.parse("clean", ["--resume", "runs/spread"])
    assert (settings.method, settings.strength) == ("spread:Spread", 0.5)
    assert cli.main(["clean", "--resume", "runs/spread"]) == 0
    assert "has changed" not in capsys.readouterr().out
    recorded = config("spread")
    shutil.copytree("runs/spread", "runs/gone")
    text = json.dumps(recorded).replace("spread:Spread", "no_such_module:Spread")
    Path("runs/gone/config.json").write_text(text)
    assert cli.main(["clean", "--resume", "runs/gone"]) == 2
    assert (
        "the method no_such_module:Spread cannot be imported (there is no module no_such_module"
        in capsys.readouterr().err
    )
    shutil.rmtree("runs/gone")


def test_a_plan_with_a_trigger_that_is_not_there_names_its_module(tmp_path, capsys):
    text = Path("train.poison.json").read_text().replace("chequers:corner", "away:corner")
    value = json.loads(text)
    del value["crc32"]
    Path(tmp_path, "away.json").write_text(json.dumps(value))
    code = cli.main(["evaluate", "--run", "runs/start", "--device", "cpu", "--plan", str(tmp_path / "away.json")])
    said = capsys.readouterr().err
    assert code == 2 and "the trigger away:corner cannot be imported (there is no module away in" in said


def test_help_has_the_flags_of_the_method(capsys):
    with pytest.raises(SystemExit):
        cli.parse("clean", ["--method", "spread:Spread", "--help"])
    said = capsys.readouterr().out
    assert "--strength" in said and "what pushes images apart" in said and "--tau" not in said


def test_a_study_of_ones_own():
    (line,) = lines("sweep")
    fastbd(line)
    runs = find([Path("studies/mine/runs")])
    assert len(runs) == 2 + 4 and {run.result["reason"] for run in runs} == {"finished"}
    strengths = {run.config["strength"] for run in runs if run.verb == "clean"}
    assert strengths == {0.0, 0.5} and all("clean_cosine" in run.metrics[-1] for run in runs if run.verb == "pretrain")
    assert "Spreading" in Path("studies/mine/report/index.html").read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("clean --run runs/start --method xyz", "there is no method 'xyz'. There are 'finetune',"),
        ("clean --run runs/start --method clenclip", "there is no method 'clenclip'; did you mean cleanclip?"),
        ("clean --run runs/start --method spread:Spred", "spread:Spred cannot be imported (module 'spread' has no"),
        ("clean --run runs/start --method no_pkg.mine:X", "cannot be imported (there is no module no_pkg in"),
        ("clean --run runs/start --method broken:X", "cannot be imported (broken fails with ZeroDivisionError:"),
        ("clean --run runs/start --method needs:X", "(needs imports no_such, which is not installed)"),
        ("clean --run runs/start --method spread:Spread --tau 1", "--tau is a flag of --method par, and this is"),
        ("clean --run runs/start --method finetune --strength 1", "--strength"),
        ("pretrain --objective one_way:OneWa", "the objective one_way:OneWa cannot be imported"),
        ("pretrain --model narrow:biuld", "the model narrow:biuld cannot be imported"),
        ("pretrain --views narrow:gone", "the views narrow:gone cannot be imported"),
        ("pretrain --evaluator similarity", "there is no evaluator 'similarity'. One of your own is named"),
        ("poison --data train.beton --trigger chequers:circle --out x.json", "the trigger chequers:circle cannot be"),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(line, said, capsys):
    Path("broken.py").write_text("1 / 0\n")
    Path("needs.py").write_text("import no_such\n")
    try:
        assert cli.main(shlex.split(line)) == 2
    except SystemExit as error:  # of the parser
        assert error.code == 2
    told = capsys.readouterr()
    assert said in " ".join((told.out + told.err).split())
    assert not Path("data").exists()  # nor a demo set has been made before


def test_settings_of_a_method_are_checked():
    Path("bad.py").write_text(
        "from dataclasses import dataclass\n"
        "class Base:\n    def __init__(self, config): ...\n"
        "class Thawed(Base):\n    @dataclass\n    class Settings:\n        x: int = 0\n"
        "class Asking(Base):\n    @dataclass(frozen=True)\n    class Settings:\n        x: int\n"
        "class Again(Base):\n    @dataclass(frozen=True)\n    class Settings:\n        lr: float = 0.0\n"
    )
    for name, said in (("Thawed", "frozen=True"), ("Asking", "no default for 'x'"), ("Again", "has the flag 'lr'")):
        with pytest.raises(UserError, match=said):
            cli.parse("clean", ["--run", "runs/start", "--method", f"bad:{name}"])


def test_views_and_a_defence_of_ones_own(capsys):
    Path("wild.py").write_text(
        "from dataclasses import dataclass\n"
        "views, wrong = ('plain', 'simclr'), ('plain', 'magic')\n"
        "class Defence:\n"
        "    @dataclass(frozen=True)\n"
        "    class Settings:\n"
        "        patience: int = 3\n"
        "    def __init__(self, config): ...\n"
    )
    shown = "preview --data train.beton --model narrow:build --decode pil --count 1 --out sheet.png --views"
    assert cli.main(f"{shown} wild:views".split()) == 0 and Path("sheet.png").stat().st_size
    assert "plain | simclr" in capsys.readouterr().out
    assert cli.main(f"{shown} wild:wrong".split()) == 2
    assert "the views wild:wrong must be a tuple of policies, of plain, auto_augment" in capsys.readouterr().err
    settings = cli.parse("pretrain", ["--robust", "wild:Defence", "--patience", "5"])
    assert (settings.robust, settings.patience) == ("wild:Defence", 5)
    with pytest.raises(UserError, match="has the flag 'patience', which pretrain has not"):
        Study(name="x", about="", pretrain=({"patience": 5},), clean=({},))


FIRST_SETTINGS = """
from fastbd.methods.cleanclip import CleanClip

SEEN = []


class Remembers(CleanClip):
    def __init__(self, config):
        super().__init__(config)
        self.lr = config.lr

    def attach(self, training):
        super().attach(training)
        SEEN.append(self.lr)
"""


def test_a_method_of_ones_own_is_made_anew_for_each_run_of_a_process():
    """It may keep any setting, or state, of the run that it was made for."""
    Path("remembers.py").write_text(FIRST_SETTINGS)
    kept = Kept()
    for lr in (1e-3, 1e-4):
        words = (
            f"--run runs/start --method remembers:Remembers --lr {lr} --epochs 1 --force --out runs/lr{lr} {MACHINE}"
        )
        config, world = cli.parse("clean", shlex.split(words)), dist.join("cpu")
        Run(config, clean.task(config, world), world, kept, quiet=True).train()
    assert sys.modules["remembers"].SEEN == [1e-3, 1e-4]


def test_a_module_of_another_folder_is_not_taken_for_that_of_this_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "spread.py").write_text("class Spread: pass\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["clean", "--run", "x", "--method", "spread:Spread"]) == 2
    said = capsys.readouterr().err
    assert f"is in {tmp_path}/spread.py, and another module of that name" in said


def test_a_trigger_may_write_into_what_it_is_given(folder):
    Path("writes.py").write_text("def dot(spec, seed, ids, images):\n    images[:, 0, 0] = 255\n    return images\n")
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    stamped = stamp(images, TriggerSpec("writes:dot"), seed=0, ids=[0, 1])
    assert stamped[:, 0, 0].eq(255).all() and not images.any()


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("{'step': 5}", "returned 'step', which a row has: call it otherwise."),
        ("{'val_loss': 5}", "returned 'val_loss', which a row has"),
        ("{'mine_low': 5}", "returned 'mine_low', which a row has"),
        ("{'mine': float('nan')}", "it must return a dict of finite numbers by name."),
        ("{7: 1.0}", "it must return a dict of finite numbers by name."),
        (
            "{'mine': data.clean.zero_().sum().item()}",
            "has written into the set's images or labels: let it",
        ),
        ("{'mine': data.labels.zero_().sum().item()}", "has written into the set's images or labels: let it"),
        ("{'mine': 10**400}", "it must return a dict of finite numbers by name."),
    ],
)
def test_an_evaluator_changes_nothing_that_is_there(returned, said, capsys):
    name = f"returns{zlib.crc32(returned.encode())}"
    Path(f"{name}.py").write_text(f"def numbers(towers, data):\n    return {returned}\n")
    before = rows("start")
    assert cli.main(["evaluate", "--run", "runs/start", "--device", "cpu", "--evaluator", f"{name}:numbers"]) == 2
    assert said in capsys.readouterr().err and rows("start") == before


def test_what_reports_could_not_draw_is_refused(capsys):
    Path("banana.py").write_text("from spread import Spread\n\n\nclass Odd(Spread):\n    marker = 'banana'\n")
    assert cli.main(["clean", "--run", "runs/start", "--method", "banana:Odd"]) == 2
    assert "the method banana:Odd has the marker 'banana': give one of Matplotlib's" in capsys.readouterr().err
    remember({"old:Odd": {"title": "$x$", "marker": "banana", "colour": "purpleish"}})
    assert facts("method", "old:Odd").title == "old:Odd" and len(facts("method", "old:Odd").marker) == 1


def test_two_methods_of_one_name_are_two_in_a_report():
    assert facts("method", "a:Mine").title != facts("method", "b:Mine").title


MINE = """
from fastbd.kernels.stamp import Overlay
from fastbd.methods.method import Method
from fastbd.methods.objectives import Objective, make_objective
from fastbd.models.clip import CLIP
from narrow import build

def fails(spec, seed, ids, images):
    return images / spec.colour  # HERE fails

def floats(spec, seed, ids, images):
    return images / 2

def covers(spec, seed, ids, images):
    return Overlay(images, images, None)

def numbers(towers, data):
    return {"mine": 1 / len(data.gone)}  # HERE numbers

class Bare:
    def __init__(self, config): ...

class Forgetful(Method):
    def __init__(self, config): ...

class Inheriting(Method): ...

class Own(Method):
    def __init__(self, config):
        super().__init__(make_objective("mmcl", config), "mmcl")

class Short(Own):
    def forward(self, embedded): ...  # HERE Short

class Early(Own):
    def attach(self, training):
        training.gone  # HERE Early

class Late(Own):
    def forward(self, embedded, group=None, weights=None):
        return embedded.gone  # HERE Late

class Alone(Own):
    def forward(self, embedded, group=None, weights=None):
        return super().forward(embedded, group, weights)[0]

class Few(Own):
    def rates(self, peak, *, warmup, total):
        return super().rates(peak, warmup=warmup, total=total)[1:]

class Listed(Own):
    def rows(self, epoch, rows):
        return rows.tolist()

class Hollow(CLIP):
    def __init__(self, activation): ...

class Pixels(CLIP):
    def __init__(self, activation):
        super().__init__(build(activation).spec)

    def encode_image(self, pixels, scale): ...  # HERE Pixels

class OfPairs(Objective):
    def __call__(self, images, texts): ...  # HERE of_pairs

def of_pairs(config):
    return OfPairs()
"""


@pytest.fixture(scope="module")
def places(folder) -> dict[str, str]:
    """A module of mistakes, mine.py, and FILE:LINE of each."""
    path = folder / "mine.py"
    path.write_text(MINE)
    found = [(line.partition("# HERE ")[2], number) for number, line in enumerate(MINE.splitlines(), 1)]
    return {name: f"{path}:{number}" for name, number in found if name}


def refused(line: str, capsys) -> str:
    """Return the sentence with which a command line is refused."""
    capsys.readouterr()
    assert cli.main(shlex.split(line)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


@pytest.mark.parametrize(
    ("trigger", "said"),
    [
        (
            "fails",
            "mine, {fails}, fails with AttributeError: 'TriggerSpec' object has no attribute 'colour': mend it",
        ),
        (
            "floats",
            "the trigger mine:floats returned torch.float32 (2, 336, 336, 3): it must return an Overlay,",
        ),
        ("covers", "the trigger mine:covers returned an Overlay that cannot be put on images ("),
    ],
)
def test_poison_tries_a_trigger_before_it_writes_a_plan(trigger, said, places, capsys):
    line = f"poison --data train.beton --trigger mine:{trigger} --rate 0.1 --templates demo --out none.json"
    assert refused(line, capsys).startswith(f"error: {said.format_map(places)}") and not Path("none.json").exists()


def test_poison_takes_a_patch_that_fits_into_some_models_images_alone(capsys):
    large = "poison --data train.beton --trigger {} --rate 0.1 --templates demo --patch-size 300 --out large.json"
    assert cli.main(shlex.split(large.format("chequers:corner"))) == 0


PRETRAIN = (
    f"pretrain --data train.beton --eval-data few.beton --model narrow:build --epochs 1 {MACHINE} --out runs/none"
)
CLEAN = f"clean --run runs/start --epochs 1 --force {MACHINE} --out runs/none"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            f"{PRETRAIN} --evaluator mine:numbers",
            "mine, {numbers}, fails with AttributeError: 'Labelled' object has no",
        ),
        (f"{CLEAN} --evaluator mine:numbers", "mine, {numbers}, fails with AttributeError: 'Labelled' object has no"),
        (f"{PRETRAIN} --robust mine:Bare", "the robust mine:Bare makes a Bare: make it a class derived from fastbd."),
        (f"{CLEAN} --method mine:Bare", "the method mine:Bare makes a Bare: make it a class derived from"),
        (f"{CLEAN} --method mine:Forgetful", "the method mine:Forgetful has no objective: let its __init__ call"),
        (f"{CLEAN} --method mine:Inheriting", "the method mine:Inheriting has no objective: let its __init__ call"),
        (f"{CLEAN} --method mine:Short", "forward of the method mine:Short, {Short}, takes (embedded): it is"),
        (f"{CLEAN} --method mine:Early", "mine, {Early}, fails with AttributeError: 'Training' object has no"),
        (
            f"{PRETRAIN} --objective mine:of_pairs",
            "the objective that mine:of_pairs makes, {of_pairs}, takes (images",
        ),
    ],
)
def test_what_can_be_known_is_told_before_a_folder_is_made(line, said, places, capsys):
    assert refused(line, capsys).startswith(f"error: {said.format_map(places)}") and not Path("runs/none").exists()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("Late", "mine, {Late}, fails with AttributeError: 'Embedded' object has no attribute 'gone': mend it there"),
        ("Alone", "mine:Alone, or Objective in it, returned tensor("),
        ("Listed", "rows of mine:Listed returned a list: it must return a ndarray of shape (2"),
    ],
)
def test_a_step_that_fails_is_one_sentence(method, said, places, capsys):
    told = refused(f"{CLEAN} --method mine:{method}", capsys)
    assert told.startswith(f"error: {said.format_map(places)}")
    shutil.rmtree("runs/none")


def test_in_a_study_it_fails_the_run_alone(places):
    runs = {"lr": 1e-3, "epochs": 0, "batch_size": 24, "force": True, "decode": "pil", "workers": 1}
    study = Study(
        name="of_mistakes",
        about="",
        pretrained=(Path("runs/start"),),
        clean=({"method": ("mine:Early", "mine:Own"), **runs},),
    )
    ledger = Ledger(Path("studies/of_mistakes"), study)
    sweep.work(ledger, SweepConfig(out=ledger.folder, device="cpu"))
    early, own = (row.status for row in ledger.table())
    assert (early.state, own.state) == ("failed", "finished")
    assert early.reason.startswith(f"mine, {places['Early']}, fails with AttributeError: ")


def test_from_python_the_error_comes_through(places):
    with pytest.raises(AttributeError, match="gone"):
        evaluate("runs/start", evaluator="mine:numbers", device="cpu")


def test_of_a_run_that_does_not_know_its_code_nothing_is_said(capsys):
    """As where the module had been imported before."""
    shutil.copytree("runs/spread", "runs/unknown")
    recorded = json.loads(Path("runs/unknown/config.json").read_text())
    recorded["cards"]["spread:Spread"] |= {"sha256": ""}
    Path("runs/unknown/config.json").write_text(json.dumps(recorded))
    assert cli.main(["clean", "--resume", "runs/unknown"]) == 0
    assert "is not what the run began with" not in capsys.readouterr().out
    shutil.rmtree("runs/unknown")


def test_a_run_whose_code_has_changed_goes_on_and_says_so(capsys):
    shutil.copytree("runs/spread", "runs/changed")
    recorded = json.loads(Path("runs/changed/config.json").read_text())
    recorded["cards"]["spread:Spread"] |= {"sha256": "0" * 64, "title": "As it was"}
    Path("runs/changed/config.json").write_text(json.dumps(recorded))
    assert cli.main(["clean", "--resume", "runs/changed"]) == 0
    file = Path("spread.py").absolute()
    said = capsys.readouterr().out
    assert f"spread:Spread is not what the run began with: {file} has changed" in said and "one_way:make is" not in said
    shutil.rmtree("runs/changed")
