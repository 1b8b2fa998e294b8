from __future__ import annotations

from pathlib import Path

import pytest

import fastbd
from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.commands import demo_data, poison
from fastbd.data.beton import Beton
from fastbd.poison.plan import Plan
from fastbd.study.grid import expand
from fastbd.study.studies import load


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache, in which the demo set is a small one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_data, "PAIRS", 100)
    monkeypatch.setattr(demo_data, "HELD_OUT", 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache/fastbd" / f"demo-{fastbd.__version__}"


def test_the_cache_is_where_the_specification_has_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for given in ("", "relative"):  # "all paths must be absolute; ... relative ... should be ignored"
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert demo_data.folder() == Path("/home/someone/.cache/fastbd") / f"demo-{fastbd.__version__}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert demo_data.folder().parent == Path("/fast/fastbd")


def fastbd_main(words: str) -> int:
    return cli.main(words.split())


def test_the_demo_set_is_made_once_for_all_folders(cache, monkeypatch, tmp_path):
    assert fastbd_main("poison --data demo --rate 0.05") == 0
    made = (cache / "train.beton").stat().st_mtime_ns
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert fastbd_main("poison --data demo --rate 0.1 --trigger sig") == 0
    assert (cache / "train.beton").stat().st_mtime_ns == made and not Path("data").exists()
    train, val = map(Beton, demo_data.demo_data())
    assert (len(train), len(val)) == (100, 20)
    plan = Plan.load(Path("demo.poison.json"))
    plan.check(train.fingerprint, 100, cache / "train.beton")
    assert len(plan.rows) == 10


def test_a_target_that_is_no_class_is_refused_when_it_is_planned(cache, capsys):
    assert fastbd_main("poison --data demo --target dog") == 2
    assert "no class holds the target word 'dog'" in capsys.readouterr().err
    assert not Path("demo.poison.json").exists()
    Path("classes.txt").write_text("dog\ncat\n")
    assert fastbd_main("poison --data demo --target dog --classes classes.txt --rate 0.05") == 0
    assert fastbd_main("poison --data demo --target banana --classes classes.txt --out b.json") == 2


@pytest.mark.parametrize("study", ["trigger", "par"])
def test_attacks_of_shipped_studies_are_planned_in_a_fresh_folder(study, cache):
    """The first and the last of each stand for those between."""
    plans = [run for run in expand(load(study, "demo"), Path("study")) if run.verb == "poison"]
    for run in (plans[0], plans[-1]):
        assert poison.run(run.config) == 0
        assert len(Plan.load(run.product).rows) == 8


def test_without_a_home_the_place_is_asked_for(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        demo_data.folder()
