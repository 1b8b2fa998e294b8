from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastbd
from fastbd import cli
from fastbd.base.errors import UserError
from fastbd.base.run_folder import read_config
from fastbd.commands import demo_data, poison, sweep
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


def test_every_verb_takes_it_by_its_name(cache, capsys):
    train, val = demo_data.demo_data()
    small = "--batch-size 24 --device cpu --epochs 0"
    assert fastbd_main(f"pretrain --data {train} --eval-data demo --model tiny-rn {small} --out start") == 0
    assert read_config(Path("start"))["eval_data"] == str(val)
    assert fastbd_main(f"clean --run start --force --data demo --eval-data demo {small} --out cleaned") == 0
    recorded = read_config(Path("cleaned"))
    assert (recorded["data"], recorded["eval_data"]) == (str(train), str(val))
    assert (recorded["config"]["data"], recorded["config"]["eval_data"]) == (str(train), str(val))
    assert fastbd_main("clean --resume cleaned") == 0
    capsys.readouterr()
    assert fastbd_main("evaluate --run start --device cpu --eval-data demo demo --json") == 0
    assert [row["n"] for row in json.loads(capsys.readouterr().out)["sets"]] == [20, 20]
    assert fastbd_main("label --run start --data demo --classes imagenet1k --device cpu --out labels.npy") == 0
    assert fastbd_main("detect --run start --data demo --device cpu --drop 0.05 --out kept.rows") == 0
    assert fastbd_main("doctor --data demo") == 0
    assert f"100 images of {train}" in capsys.readouterr().out
    Path("study.toml").write_text("pretrain = [{}]\nclean = [{force = true, epochs = 0, batch_size = 24}]\n")
    flags = "--study study.toml --pretrained start --data demo --eval-data demo --device cpu --out study"
    config = cli.parse("sweep", flags.split())
    sweep.work(sweep.open_ledger(config), config)
    assert read_config(Path("study/runs/start-s0-cleanclip"))["data"] == str(train)


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
