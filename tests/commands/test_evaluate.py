"""The verb evaluate, on a model of a few steps: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastbd import cli
from fastbd.base import dist
from fastbd.base.evaluation import Evaluation
from fastbd.commands import pretrain

SMALL = (
    "--data",
    "train.beton",
    "--plan",
    "train.poison.json",
    "--eval-data",
    "val.beton",
    "--model",
    "tiny-rn",
    "--batch-size",
    24,
    "--device",
    "cpu",
    "--templates",
    "demo",
    "--epochs",
    2,
)

INTERVAL = re.compile(r"(_full|_seeds)?_(low|high)$|_by_seed$")  # what stands beside a share


@pytest.fixture(scope="module")
def trained(study, fastbd) -> Path:
    fastbd("pretrain", *SMALL, "--out", "evaluated", cwd=study)
    return study


def evaluate(trained: Path, fastbd, *flags, **more) -> list[dict]:
    done = fastbd("evaluate", "--run", "evaluated", "--json", *flags, cwd=trained, **more)
    found = json.loads(done.stdout)["sets"]
    for row in found:
        assert {INTERVAL.sub("", key) for key in row} <= Evaluation.__annotations__.keys()
    return found


def rows(trained: Path) -> list[dict]:
    return [json.loads(line) for line in (trained / "evaluated/metrics.jsonl").read_text().splitlines()]


def test_json_says_what_training_said_and_more(trained, fastbd):
    in_training = rows(trained)[0]
    (row,) = evaluate(trained, fastbd)
    same = {"set", "n", "top1", "top3", "asr", "asr_all", "recovery", "target", "step"}
    assert {key: row[key] for key in same} == {key: in_training[key] for key in same}
    assert sum(one["n"] for one in row["classes"]) == row["n"] == 60
    assert sum(one["n"] * one["top1"] for one in row["classes"]) == pytest.approx(60 * row["top1"])
    assert "classes" not in rows(trained)[-1] and rows(trained)[-1]["alignment"] == row["alignment"]


def test_sets_side_by_side_in_a_table_to_be_pasted(trained, fastbd):
    """train.beton has no classes: images and captions."""
    flags = ("--eval-data", "train.beton", "val.beton", "--asr-seed", 0, 1, "--per-class", "--subset", 40)
    lines = fastbd("evaluate", "--run", "evaluated", *flags, cwd=trained).stdout.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0][1:] == ["train", "val, 40 images"] and set("".join(table[1])) == set(":-")
    named = {line[0]: line[1:] for line in table}
    assert named["images"] == ["240", "40"] and named["captions"] == ["240", ""]
    assert named["target"][1] == "banana" and named["templates"] == ["", "demo"]
    assert "of all 60" in named["zero-shot top-1"][1] and "over 2 seeds" in named["ASR, images of other classes"][1]
    assert named["images of captions R@10"][0] and named["contrastive loss"][0] and "banana" in named
    assert evaluate(trained, fastbd, "--eval-data", "train.beton")
    fastbd("report", "--runs", "evaluated", "--out", "report", cwd=trained)  # which has retrieval rows now


def test_a_set_without_the_target_is_measured_but_for_the_attack(trained, fastbd):
    """Four of the classes, without the banana; the run's own set must have it."""
    (trained / "four").mkdir(exist_ok=True)
    for name in ("arrow", "ball", "boat", "bolt"):
        Image.new("RGB", (40, 40), (200, 30, 60)).save(make(trained / "four" / name) / "one.png")
    fastbd("build", "--source", "four", "--out", "four.beton", "--text-views", 0, cwd=trained)
    done = fastbd("evaluate", "--run", "evaluated", "--json", "--eval-data", "four.beton", cwd=trained)
    (row,) = json.loads(done.stdout)["sets"]
    assert "ASR is not measured, as no class holds the target word 'banana'" in done.stderr
    assert row["n"] == 4 and "asr" not in row and row["templates"] == "imagenet80"


def make(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_mistakes_are_known_before_anything_is_evaluated(trained, fastbd):
    before = rows(trained)
    for flags, said in (
        (("--eval-data", "val.beton", "gone.beton"), "gone.beton does not exist"),
        (("--probe-data", "train.beton"), "--probe-data train.beton has no classes"),
        (("--eval-data", "train.beton", "--rebound", 5), "--rebound and --probe-data need a set with classes"),
        (("--rebound", 1000), "--rebound needs 16,000 clean pairs without the target"),
    ):
        assert said in fastbd("evaluate", "--run", "evaluated", *flags, cwd=trained, code=2).stderr
    assert rows(trained) == before


def test_a_probe_learns_from_all_images_of_its_set(trained, fastbd):
    (row,) = evaluate(trained, fastbd, "--probe-data", "val.beton", "--subset", 50)
    assert row["prototype_top1"] > row["top1"]  # it has seen the answers
    assert {"knn_asr", "prototype_top1", "probe_asr_low"} <= row.keys()
    assert (row["n"], row["probe_n"]) == (50, 60)


def test_rebound_watches_the_attack_and_leaves_the_checkpoint(trained, fastbd):
    before = (trained / "evaluated/ckpt_last.pt").read_bytes()
    (plain,) = evaluate(trained, fastbd)
    flags = ("--rebound", 12, "--rebound-lr", 1e-2, "--rebound-batch-size", 8)
    row, second = evaluate(trained, fastbd, *flags, "--eval-data", "val.beton", "val.beton")
    course = row["rebound"]
    assert course["steps"] == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]
    assert (course["asr"][0], course["top1"][0]) == (plain["asr"], plain["top1"])
    assert len(set(zip(course["asr"], course["top1"], strict=True))) > 1  # it does change the model
    assert row["rebound_max"] == max(course["asr"]) >= row["rebound_area"] >= min(course["asr"])
    assert row["rebound_change"] == pytest.approx(course["asr"][-1] - course["asr"][0])
    assert second["top1"] == plain["top1"]  # the second set is evaluated on the same model
    assert (trained / "evaluated/ckpt_last.pt").read_bytes() == before


def test_evaluation_on_another_device_changes_no_number(trained, monkeypatch):
    """A CPU by another name stands for the second GPU."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(dist, "device_of", lambda name: torch.device("cpu:0"))
    flags = [*map(str, SMALL), "--eval-every", "3"]
    for out, more in (("here", []), ("there", ["--eval-device", "cuda:1"])):
        assert pretrain.run(cli.parse("pretrain", [*flags, *more, "--out", out])) == 0
    here, there = (
        [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()] for out in ("here", "there")
    )
    assert [row["step"] for row in here] == [3, 6, 9, 12, 15, 18, 20]
    assert [{**row, "seconds": 0} for row in here] == [{**row, "seconds": 0} for row in there]


@pytest.mark.parametrize(
    "device, said", [("cuda:9", "there is no cuda:9: torch sees"), ("second", "there is no device second")]
)
def test_an_evaluation_device_that_is_none(device, said, trained, fastbd):
    done = fastbd("pretrain", *SMALL, "--eval-device", device, "--out", "no", cwd=trained, code=2)
    assert said in done.stderr and not (trained / "no").exists()


def test_an_evaluation_that_a_stop_has_cut_short_is_made_up_for(trained, fastbd):
    fastbd("pretrain", *SMALL, "--out", "cut", cwd=trained)
    metrics = trained / "cut/metrics.jsonl"
    whole = json.loads(metrics.read_text())
    metrics.write_text("")
    fastbd("pretrain", "--resume", "cut", cwd=trained)
    assert {**json.loads(metrics.read_text()), "seconds": 0} == {**whole, "seconds": 0}
