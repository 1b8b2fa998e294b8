"""The whole way through the real command line."""

from __future__ import annotations

import json
import signal
import time
from functools import partial

import pytest
import torch
from forked import command, ran
from ranks import PROGRAM

from fastbd.models import create

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
    "--warmup",
    5,
    "--device",
    "cpu",
    "--templates",
    "demo",
)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run):
    return torch.load(run / "ckpt_last.pt", weights_only=True)["model"]


def test_build_poison_pretrain_clean_evaluate_report(study, fastbd, fastbd_process):
    """Each in a process of its own, one started as a user does; the study's own files were made within this one."""
    new, forked, here = (partial(run, cwd=study) for run in (fastbd_process, ran, fastbd))
    forked("build", "--source", "train.csv", "--out", "built.beton", "--workers", 2)
    assert (study / "built.beton").read_bytes() == (study / "train.beton").read_bytes()
    forked("poison", "--data", "built.beton", "--patch-size", 6, "--rate", 0.1, "--templates", "demo")
    assert (study / "built.poison.json").read_bytes() == (study / "train.poison.json").read_bytes()
    out = ("--save-every", 2, "--out", "runs/a")
    said = new("pretrain", "--objective", "mmcl_ssl", *SMALL, "--epochs", 3, *out).stdout
    last = rows(study / "runs/a/metrics.jsonl")[-1]
    assert (last["top1_low"] < 2 / 20) == ("near chance" in said) and last["n_classes"] == 20
    clean = (
        "clean",
        "--run",
        "runs/a",
        "--epochs",
        2,
        "--batch-size",
        24,
        "--eval-every",
        "1/2epoch",
        "--out",
        "runs/b",
    )
    refused = here(*clean, "--landed", 1, code=2)
    assert "the attack on runs/a has not landed: ASR" in refused.stderr and not (study / "runs/b").exists()
    forked(*clean, "--landed", 1, "--force")
    shown = forked("evaluate", "--run", "runs/b", "--asr-seed", 5)
    forked("report", "--runs", "runs", "--out", "report")

    losses = rows(study / "runs/a/log.jsonl")
    assert losses[-1]["step"] == 30 and {"mmcl", "ssl_image", "ssl_text", "pairs_per_s"} <= set(losses[0])
    before, cleaning = rows(study / "runs/a/metrics.jsonl"), rows(study / "runs/b/metrics.jsonl")
    assert [row["epoch"] for row in cleaning] == [0.0, 0.4444444444444444, 1.0, 1.5555555555555556, 2.0, 2.0]
    # The cleaning run starts from the pre-trained model, and the evaluation does not move it.
    assert all(cleaning[0][k] == before[-1][k] for k in ("top1", "asr", "recovery"))
    assert cleaning[-1]["top1"] == cleaning[-2]["top1"] and cleaning[-1]["asr_seed"] == [5]
    assert "zero-shot top-1" in shown and "banana" in shown
    plan = json.loads((study / "train.poison.json").read_text())
    assert json.loads((study / "runs/b/plan.json").read_text()) == plan
    html = (study / "report/index.html").read_text()
    assert "data:image/png;base64" in html and (study / "report/figures/scatter.png").stat().st_size > 10_000
    assert (study / "runs/a/samples.png").is_file()
    assert sorted(p.name for p in (study / "runs/a").glob("*.pt")) == ["ckpt_epoch_002.pt", "ckpt_last.pt"]


@pytest.mark.process
def test_a_run_that_is_stopped_and_resumed_ends_bit_for_bit_the_same(study, fastbd):
    arguments = (
        "pretrain",
        "--objective",
        "mmcl_ssl",
        *SMALL,
        "--epochs",
        4,
        "--eval-every",
        0,
        "--save-every",
        0,
        "--log-every",
        1,
    )
    fastbd(*arguments, "--out", "runs/whole", cwd=study)
    said, log = study / "halves.txt", study / "runs/halves/log.jsonl"
    process = command(*arguments, "--out", "runs/halves", cwd=study, said=said)
    while process.is_alive() and not (log.exists() and len(log.read_text().splitlines()) > 12):
        time.sleep(0.02)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM and "--resume runs/halves" in said.read_text()
    stopped_at = rows(log)[-1]["step"]
    assert stopped_at < 40
    fastbd("pretrain", "--resume", "runs/halves", cwd=study)
    whole, halves = weights(study / "runs/whole"), weights(study / "runs/halves")
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    assert [r["step"] for r in rows(log)] == list(range(1, 41))
    assert [r["loss"] for r in rows(log)] == [r["loss"] for r in rows(study / "runs/whole/log.jsonl")]


def test_two_processes_train_like_one(study, fastbd, together):
    """tiny-vit has no batch norm, so the only difference left is the order of sums.

    Plain Adam would hide a wrong gradient scale and blow up rounding; a large eps makes its steps follow the gradient.
    """
    arguments = (
        "pretrain",
        "--objective",
        "mmcl_ssl",
        *SMALL,
        "--model",
        "tiny-vit",
        "--epochs",
        2,
        "--eval-every",
        0,
        "--eps",
        0.01,
    )
    fastbd(*arguments, "--resident", "none", "--out", "runs/one", cwd=study)
    # One process decodes in each epoch, of two the second reads what the first has left on the disk.
    together(PROGRAM, 2, *arguments, "--resident", "disk", "--out", "runs/two", cwd=study)
    assert [path.name for path in study.glob("*.pixels*")] == ["train.whole.pixels"]
    one, two = weights(study / "runs/one"), weights(study / "runs/two")
    start = create("tiny-vit", 0).state_dict()
    assert max(float((one[k] - start[k]).abs().max()) for k in one) > 1e-2
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5
    assert [r["loss"] for r in rows(study / "runs/one/log.jsonl")] == pytest.approx(
        [r["loss"] for r in rows(study / "runs/two/log.jsonl")], rel=1e-4
    )


def test_slips_views_kept_or_decoded_and_text_views_that_change_with_the_epoch(study, fastbd):
    fastbd("build", "--source", "train.csv", "--out", "texts.beton", "--text-views", 2, cwd=study)
    arguments = (
        "pretrain",
        "--data",
        "texts.beton",
        *SMALL[4:],
        "--objective",
        "mmcl_ssl",
        "--views",
        "slip",
        "--batch-size",
        60,
        "--epochs",
        2,
        "--eval-every",
        0,
        "--log-every",
        1,
    )
    fastbd(*arguments, "--resident", "none", "--out", "runs/slip", cwd=study)
    fastbd(*arguments, "--resident", "ram", "--eda", "frozen", "--out", "runs/frozen", cwd=study)
    changing, frozen = (rows(study / "runs" / name / "log.jsonl") for name in ("slip", "frozen"))
    assert {"mmcl", "ssl_image", "ssl_text"} <= set(changing[0]) and changing[0]["bad_images"] == 0
    assert [row["loss"] for row in changing[:4]] == [row["loss"] for row in frozen[:4]]
    assert changing[4]["mmcl"] == frozen[4]["mmcl"] and changing[4]["ssl_text"] != frozen[4]["ssl_text"]


def test_finetuning_keeps_the_optimizer_when_asked(study, fastbd):
    if not (study / "runs/a").exists():
        fastbd("pretrain", "--objective", "mmcl", *SMALL, "--epochs", 1, "--out", "runs/a", cwd=study)
    arguments = (
        "clean",
        "--run",
        "runs/a",
        "--method",
        "finetune",
        "--objective",
        "mmcl",
        "--epochs",
        1,
        "--batch-size",
        24,
        "--force",
    )
    fastbd(*arguments, "--weight-decay", 0.7, "--out", "runs/fresh", cwd=study)
    fastbd(*arguments, "--weight-decay", 0.7, "--keep-optimizer", "--out", "runs/kept", cwd=study)
    states = [
        torch.load(study / "runs" / name / "ckpt_last.pt", weights_only=True)["optimizer"] for name in ("fresh", "kept")
    ]
    # As published, the checkpoint's weight decay silently wins over the one given.
    assert [s["param_groups"][0]["weight_decay"] for s in states] == [0.7, 0.1]
    steps = [int(next(iter(s["state"].values()))["step"]) for s in states]
    assert steps[1] > steps[0] == 9


def test_weights_become_a_run_without_training(study, fastbd):
    """How a published poisoned checkpoint gets into the study: --weights and --epochs 0."""
    if not (study / "runs/a").exists():
        fastbd("pretrain", "--objective", "mmcl", *SMALL, "--epochs", 1, "--out", "runs/a", cwd=study)
    given = ("--weights", "runs/a/ckpt_last.pt", "--epochs", 0)
    fastbd("pretrain", "--objective", "mmcl", *SMALL, *given, "--out", "runs/imported", cwd=study)
    before, imported = weights(study / "runs/a"), weights(study / "runs/imported")
    assert all(torch.equal(before[k], imported[k]) for k in before)
    (row,) = rows(study / "runs/imported/metrics.jsonl")
    trained = rows(study / "runs/a/metrics.jsonl")[-1]
    assert row["step"] == 0 and all(row[k] == trained[k] for k in ("top1", "asr", "recovery"))


def test_a_batch_in_parts_with_recomputed_activations_trains_like_the_whole(study, fastbd):
    """Statistics over 12 images: a part of 12 pairs with both their views is two groups."""
    arguments = (
        "pretrain",
        "--objective",
        "mmcl_ssl",
        *SMALL,
        "--epochs",
        1,
        "--eval-every",
        0,
        "--log-every",
        1,
        "--bn-group",
        12,
        "--eps",
        0.01,
    )
    fastbd(*arguments, "--out", "runs/joined", cwd=study)
    fastbd(*arguments, "--accumulate", 2, "--grad-checkpointing", "--out", "runs/parts", cwd=study)
    one, other = (rows(study / "runs" / name / "log.jsonl") for name in ("joined", "parts"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], rel=1e-3)
    whole, parts = weights(study / "runs/joined"), weights(study / "runs/parts")
    assert max(float((whole[k] - parts[k]).abs().max()) for k in whole) < 1e-3
    assert all(0 < r["of_limit"] < 1 for r in one)
