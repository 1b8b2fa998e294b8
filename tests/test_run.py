from __future__ import annotations

import importlib.util
import os

import pytest
from cleanings import WORLD, cleaning, start

from fastbd import cli
from fastbd.commands import clean
from fastbd.dist import World
from fastbd.errors import UserError
from fastbd.run import Run, same_pixels

HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")


@pytest.mark.parametrize("began", ["dali on a CPU", "pil"])
@pytest.mark.parametrize("where", ["auto", "gpu", "none"])
def test_a_run_that_began_with_the_cpus_pixels_keeps_them_on_a_gpu(began, where):
    """Kept images are the CPU's; and where auto no longer keeps them, the stream is."""
    for decode in ("auto", "dali"):
        assert same_pixels(began, decode, where) == ("dali-cpu" if HAS_DALI else "pil", where)
    for decode in ("dali-cpu", "pil", "ffcv"):
        assert same_pixels(began, decode, where) == (decode, where)


def test_a_run_that_began_with_a_gpus_pixels_keeps_none_that_the_cpu_decodes():
    for began in ("dali on a GPU, hw_decoder_load 0", "dali on a GPU, hw_decoder_load 1"):
        assert same_pixels(began, "pil", "ram") == ("pil", "ram")  # they cannot be the same
        assert same_pixels(began, "auto", "auto") == ("auto", "none")
        assert same_pixels(began, "dali", "none") == ("dali", "none")


def test_a_run_that_began_with_ffcvs_pixels_stays_as_it_was_told():
    assert same_pixels("ffcv", "ffcv", "auto") == ("ffcv", "auto")


def test_a_run_that_another_process_trains_is_not_resumed(study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)
    first = cleaning(tmp_path / "run")
    config = cli.parse("clean", ["--resume", str(tmp_path / "run")])
    with pytest.raises(UserError, match=rf"run is being trained by process {os.getpid()} on .*: wait for it to end"):
        Run(config, clean.task(config, WORLD), WORLD)
    # A sweep's claim decides whose a run is, not the lock of a process that has stalled.
    Run(config, clean.task(config, WORLD), WORLD, guard=lambda: None)
    first.release()
    assert Run(config, clean.task(config, WORLD), WORLD).lock


def test_of_two_runs_that_make_one_folder_the_second_is_told(study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)

    class Overtaken(World):
        def barrier(self) -> None:
            cleaning(tmp_path / "run").release()

    config = cli.parse("clean", ["--run", "runs/start", "--force", "--device", "cpu", "--out", str(tmp_path / "run")])
    world = Overtaken(0, 1, WORLD.device)
    with pytest.raises(UserError, match=r"another run has just made .*run: choose another --out, or run this again\.$"):
        Run(config, clean.task(config, world), world)
    assert os.listdir(tmp_path) == ["run"]
