"""What published programs do otherwise than fastbd does by default. --recipe published turns on all that applies.

Each is a flag by itself too. docs/published.md tells of them, and a test compares it with this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastbd.base.errors import UserError
from fastbd.config.flags import CleanConfig

PAPER = ("paper-cc3m", "paper-cc6m")
# CleanCLIP's training loop, which Verma et al., RoCLIP and SafeCLIP have taken over:
PRETRAINED = ("none", "progressive", "roclip")
CLEANED = ("finetune", "cleanclip", "shrink_perturb", "deep_cluster", "unlearn")
WITHOUT_HEAD = ("finetune", "cleanclip", "shrink_perturb", "unlearn")


class Behaviour(NamedTuple):
    """A behaviour of published programs that changes numbers, as the value of a flag."""

    verb: str
    names: tuple[str, ...]
    """Methods of clean, or defences of pretrain, whose program has it; of other verbs none."""
    flag: str
    value: Any
    source: str
    """Program, file and what to look for in it."""
    does: str
    effect: str
    presets: tuple[str, ...] = ()
    """It is a matter of these scales alone; none: of all."""


SCHEDULE = (
    "CleanCLIP `src/train.py`, `step = num_batches * epoch + index` with epochs from 1; `src/scheduler.py`",
    "learning rates of an epoch later, and a warm-up of any length",
    "20 epochs of 1,562 steps, warm-up 50: the first rate is 99.4 % of the peak and not 2 %, the last 0.6 % and not 0",
)
EXEMPT = (
    "CleanCLIP `src/main.py`, names with `bn`, `ln`, `bias`, `logit_scale` are exempt",
    "weight decay of shortcuts' batch-norm gains, and of a ViT's class embedding",
    "RN50: 4 parameters (3,840 numbers) more are decayed; ViT-B/32: 1 (768 numbers)",
)
EDA = (
    "CleanCLIP `src/data.py`, `ImageCaptionDataset.__init__`",
    "the second text view is drawn once, for all epochs",
    "1 version of each caption, not one an epoch",
)
GATHER = (
    "CleanCLIP `src/train.py`, `dist.all_gather`, which has no gradient",
    "several GPUs: no gradient through the embeddings of other GPUs",
    "the embeddings' part of the gradient is divided by the number of GPUs; nothing on one",
)
CARRIED = (
    "CleanCLIP `src/main.py`, `optimizer.load_state_dict`",
    "Adam's moments, weight decay, betas and eps of the pre-training",
    "--weight-decay, --beta1, --beta2 and --eps of clean do nothing",
)
PUBLISHED = (
    Behaviour(
        "build", (), "end_token", "cut",
        "CleanCLIP `pkgs/openai/clip.py`, `Processor.process_text`; not PAR",
        "a caption of more than 77 tokens loses its end token",
        "it is read at its start token, so that all such captions have one embedding; none of Flickr8k's 28,945 is one",
    ),
    Behaviour(
        "build", (), "eda_insertion", "any",
        "CleanCLIP `utils/eda.py`, `add_word`; not PAR",
        "EDA inserts synonyms of stop words and of inserted words too, never at the end",
        "35 % of the insertions into 5,000 captions of Flickr8k are of stop words: `angstrom` for a, `inch` for in",
    ),
    Behaviour(
        "build", (), "exif", "ignore",
        "CleanCLIP `src/data.py`, PAR `data.py`: `Image.open` alone",
        "images that a camera has marked as turned stay turned",
        "such images stand on their side or head, at evaluation too where its set is built so",
    ),
    Behaviour("pretrain", PRETRAINED, "schedule", "shifted", *SCHEDULE),
    Behaviour("pretrain", (*PRETRAINED, "safeclip"), "exempt", "names", *EXEMPT),
    Behaviour("pretrain", (*PRETRAINED, "safeclip"), "eda", "frozen", *EDA),
    Behaviour("pretrain", (*PRETRAINED, "safeclip"), "gather", "local-grad", *GATHER),
    Behaviour(
        "pretrain", PRETRAINED, "bn_group", 256,
        "Verma et al. `README.md`, batches of 2,048 and of 1,024 with two views on 8 GPUs",
        "batch norm sees the images of one of 8 GPUs at a time",
        "statistics of 256 images, and not of up to 2,048",
        PAPER,
    ),
    Behaviour("clean", CLEANED, "schedule", "shifted", *SCHEDULE),
    Behaviour("clean", CLEANED, "exempt", "names", *EXEMPT),
    Behaviour("clean", CLEANED, "eda", "frozen", *EDA),
    Behaviour("clean", CLEANED, "gather", "local-grad", *GATHER),
    Behaviour("clean", WITHOUT_HEAD, "keep_optimizer", True, *CARRIED),
    Behaviour(
        "clean", ("supervised",), "exempt", "biases",
        "CleanCLIP `src/evaluate.py`, `get_finetune_metrics`",
        "weight decay of all but biases, gains of norms with the rest",
        "RN50: the 55 gains of its image tower (26,624 numbers) are decayed",
    ),
    Behaviour(
        "clean", ("par",), "lr_start", 3e-5,
        "PAR `train.py`, `--lr-start`",
        "the first learning rate, whatever --lr is",
        "nothing at --lr 3e-6; at --lr 1e-4 the rate rises from 3e-5, and does not fall from 1e-3",
    ),
    Behaviour(
        "clean", ("par",), "frozen_norms", True,
        "PAR `train.py`, `validate_zeroshot` leaves the model in eval mode",
        "batch norm keeps its running statistics",
        "the default but in preset demo",
    ),
)  # fmt: skip


def published(verb: str, name: str | None = None, preset: str | None = None) -> dict[str, Any]:
    """Return the flags that --recipe published gives a verb, with a method or a defence, at a preset.

    UserError where no published program has that method or defence.
    """
    of_verb = [each for each in PUBLISHED if each.verb == verb]
    known = {method for each in of_verb for method in each.names}
    if known and name not in known:
        raise UserError(
            f"--recipe published is of {', '.join(sorted(known))}, and not of {name}: give --recipe corrected."
        )
    return {
        each.flag: each.value
        for each in of_verb
        if (not each.names or name in each.names) and (not each.presets or preset in each.presets)
    }


def check_carried(config: CleanConfig, start: Path | str, made: Mapping[str, Any]) -> None:
    """Raise a UserError where a cleaning keeps an optimizer's state that has other groups of weight decay than its own.

    `made`: flags of the run `start`, whose state it is.
    """
    was = made.get("exempt", "vectors")  # not recorded up to version 0.1.0
    if not config.keep_optimizer or was == config.exempt:
        return
    by_recipe = config.recipe == "published" != made.get("recipe")
    asked, make = ("--recipe published", f"make {start} with it too, or ") if by_recipe else ("--keep-optimizer", "")
    raise UserError(
        f"{asked} keeps the optimizer's state of {start}, which was made with --exempt {was}, and this is --exempt "
        f"{config.exempt}: {make}give --exempt {was}, or --no-keep-optimizer."
    )
