"""Thirty steps of cleaning with --recipe published are those of the published programs, as bench has them, to rounding.

Theirs get the images of our batches, and captions that are tokenized here in their way; towers, losses, optimizer,
groups of parameters, decay and learning rates are their own.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from command_line import fastbd
from torch import Tensor

from bench.published_step import Hyper, cleanclip, cleanclip_rates, nchw_copy, par, par_rates
from fastbd import cli
from fastbd.base.dist import World
from fastbd.base.run_folder import read
from fastbd.commands import clean, pretrain
from fastbd.data.demo import write_demo_set
from fastbd.data.shards import open_beton
from fastbd.data.tokenizer import tokenize
from fastbd.models import CLIP, create
from fastbd.training.run import Run

WORLD = World(0, 1, torch.device("cpu"))
PAIRS, BATCH = 72, 24
BATCHES = PAIRS // BATCH
BEFORE, EPOCHS = 2, 10  # of pre-training and of cleaning: 6 and 30 steps
LONG = "and then a red bird sat down by the old lake "  # ten tokens
LR, WARMUP = 1e-4, 5
# The gradient of the keys' biases is rounding alone, from which Adam would make whole steps with its usual eps.
HYPER = Hyper(betas=(0.9, 0.98), eps=1e-4)
# Largest relative difference of a step's loss, and of a parameter's values (root mean square) in steps of size LR. In a
# ResNet rounding decides now and then whether a ReLU's input is above 0, so that a pixel has its gradient or has none.
CLOSE_LOSS = {"tiny-rn": 3e-4, "tiny-vit": 1e-6}
CLOSE_PARAMETER = {"tiny-rn": 0.3, "tiny-vit": 0.01}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder with published.beton, of --recipe published, and kept.beton; a third of the captions is too long."""
    folder = tmp_path_factory.mktemp("published")
    list(write_demo_set(folder, PAIRS, 20, seed=1))
    with (folder / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows[::3]:
        row["caption"] += " " + 12 * LONG
    with (folder / "pairs.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    build = ("build", "--source", "pairs.csv", "--text-views", 2, "--workers", 1, "--recipe", "published", "--out")
    fastbd(*build, "published.beton", cwd=folder)
    fastbd(*build, "kept.beton", "--end-token", "keep", cwd=folder)
    return folder


def ours(verb: ModuleType, *flags) -> Run:
    """A run of the verb, to be trained, with --recipe published; in the folder of the pairs."""
    given = ("--recipe", "published", "--batch-size", BATCH, "--device", "cpu", "--precision", "fp32", "--log-every", 1,
             "--lr", LR, "--warmup", WARMUP, "--eps", HYPER.eps, *flags)  # fmt: skip
    config = cli.parse(verb.__name__.rpartition(".")[2], list(map(str, given)))
    return Run(config, verb.task(config, WORLD), WORLD)


def batches_of(run: Run, epochs: int) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
    """Images of each view, captions and their second view, of all steps; that view is in each epoch the first drawn."""
    beton = open_beton(run.task.data)
    cut = run.task.data.name == "published.beton"
    tokens = torch.tensor([ids_of(beton.caption(i), cut) for i in range(len(beton))])
    drawn = torch.from_numpy(beton.text_view(np.arange(len(beton)), 0).astype(np.int64))
    for epoch in range(epochs):
        for batch in run.opened.batches(epoch, 0):
            images = [view.contiguous().clone() for view in batch.views]
            yield images, tokens[batch.ids], drawn[batch.ids] if len(images) == 2 else None


def ids_of(caption: str, cut: bool) -> list[int]:
    """77 ids of a caption; of a longer one CleanCLIP cuts the end token off, and open_clip, for PAR, puts it back."""
    end = 49_407
    whole = tokenize([caption], 300)[0].tolist()
    ids = whole[: whole.index(end) + 1][:77]
    ids += [0] * (77 - len(ids))
    return ids if cut or end in ids else [*ids[:76], end]


class Cleaned:
    """A model pre-trained and cleaned by ours, in runs start-MODEL and run-MODEL, and by CleanCLIP's steps."""

    def __init__(self, name: str, folder: Path):
        self.start_path = folder / f"start-{name}"
        rates = (cleanclip_rates(LR, warmup=WARMUP, epochs=n, batches=BATCHES) for n in (BEFORE, EPOCHS))
        self.theirs = nchw_copy(create(name, 0))
        step = cleanclip(self.theirs, HYPER, chain(*rates))  # one optimizer: cleaning loads that of the checkpoint
        flags = ("--data", "published.beton", "--model", name, "--epochs", BEFORE, "--out", self.start_path)
        self.start = ours(pretrain, *flags)
        wanted = [float(step(*batch)["loss"]) for batch in batches_of(self.start, BEFORE)]
        self.start.train()
        self.run = self.clean(folder / f"run-{name}", "--weight-decay", 10)  # in vain
        self.wanted = [float(step(*batch)["loss"]) for batch in batches_of(self.run, EPOCHS)]
        self.run.train()
        self.off = apart(self.start, wanted), apart(self.run, self.wanted)

    def clean(self, out: Path, *flags) -> Run:
        return ours(clean, "--run", self.start_path, "--force", "--epochs", EPOCHS, *flags, "--out", out)


@pytest.fixture(scope="module")
def cleaned(pairs) -> Callable[[str], Cleaned]:
    """Cleaned by the name of the model, made once."""
    return cache(partial(Cleaned, folder=pairs))


@pytest.fixture(autouse=True)
def _here(pairs, monkeypatch) -> None:
    monkeypatch.chdir(pairs)


def apart(run: Run, wanted: list[float]) -> float:
    """The largest relative difference of the losses of the run's steps from those that are wanted."""
    found = [row["loss"] for row in read(run.folder.path).log]
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))


def steps_apart(found: CLIP, wanted: CLIP) -> float:
    """The largest difference of a parameter's values (root mean square), in steps of size LR."""
    own = dict(found.named_parameters())
    return max((own[name] - p).square().mean().sqrt().item() for name, p in wanted.named_parameters()) / LR


@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_cleanclip(cleaned, name):
    found = cleaned(name)
    assert max(found.off) < CLOSE_LOSS[name]
    assert steps_apart(found.run.opened.model, found.theirs) < CLOSE_PARAMETER[name]


@pytest.mark.parametrize(("name", "tau"), [("tiny-rn", 0.2), ("tiny-vit", 0.02)])
def test_par(cleaned, name, tau, tmp_path):
    """The learning rate rises from PAR's 3e-5."""
    flags = ("--method", "par", "--tau", tau, "--data", "kept.beton")
    run = cleaned(name).clean(tmp_path / "run", *flags)
    theirs, poisoned = (nchw_copy(cleaned(name).start.opened.model).eval() for _ in range(2))
    rates = par_rates(LR, start=3e-5, end=1e-9, epochs=EPOCHS, batches=BATCHES)
    hyper = Hyper(weight_decay=1e-4, betas=(0.9, 0.98), eps=HYPER.eps)
    step = par(theirs, poisoned, hyper, rates, tau)
    wanted = [float(step(*batch)["loss"]) for batch in batches_of(run, EPOCHS)]
    run.train()
    distances = [row["distance_text"] for row in read(run.folder.path).log]
    assert apart(run, wanted) < CLOSE_LOSS[name]
    assert steps_apart(run.opened.model, theirs) < CLOSE_PARAMETER[name]
    assert max(distances) > tau  # so that a gate has closed


@pytest.mark.parametrize(
    "flags",
    [
        ("--schedule", "exact"),
        ("--no-keep-optimizer",),
        ("--eda", "epoch"),
        ("--data", "kept.beton"),
        ("--recipe", "corrected"),
    ],
    ids=" ".join,
)
def test_without_one_of_the_behaviours_it_is_another_course(cleaned, flags, tmp_path):
    run = cleaned("tiny-vit").clean(tmp_path / "run", *flags)
    run.train()
    assert apart(run, cleaned("tiny-vit").wanted) > 1000 * CLOSE_LOSS["tiny-vit"]
