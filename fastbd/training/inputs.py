"""The pairs that a run trains on: their views, their decoder, and where decoded images are kept."""

from __future__ import annotations

import json

from fastbd.base.console import console
from fastbd.base.dist import World
from fastbd.base.errors import UserError
from fastbd.data import resident
from fastbd.data.decode import HOSTS, ON_GPU, Decoder, has_dali, open_decoder
from fastbd.data.loader import recipe
from fastbd.data.pairs import Pairs
from fastbd.data.shards import open_beton
from fastbd.methods.objectives import Objective
from fastbd.training.reuse import Kept
from fastbd.training.task import Config, Task


def policies_of(views: str, objective: Objective) -> tuple[str, ...]:
    """Return the augmentation policies of a step, one per image view. UserError where --views has too few."""
    policies = recipe(views)
    if not objective.augments_images:
        return policies[:1]
    if len(policies) == 1:
        raise UserError(
            f"--views {views} has no second view for the self-supervised loss: give other --views, or --no-ssl-image."
        )
    return policies


def decoder_of(config: Config, world: World, decode: str | None = None, threads: int = 0) -> Decoder:
    """Open a decoder: by `decode` in place of --decode, with `threads` where --workers gives no number."""
    return open_decoder(decode or config.decode, config.workers or threads, str(world.device), config.hw_decoder_load)


def open_pairs(
    config: Config, task: Task, world: World, kept: Kept, policies: tuple[str, ...], began: str | None, quiet: bool
) -> Pairs:
    """Return the training pairs, decoded to where --resident says; those of an earlier run where they are the same.

    `began` names the decoder with which a resumed run began.
    """
    beton = open_beton(task.data)
    if task.method.objective.augments_texts and beton.num_text_views == 0:
        raise UserError(
            f"{task.data} holds no second text views: build it with --text-views 1, or train with --no-ssl-text."
        )
    plan = task.plan if task.poisoned else None
    base = set(policies) <= {"plain", "light"}  # which begin with the base view
    decode, where = _decoder_and_place(config, world, began, quiet)

    def opened() -> Pairs:
        most_bad = int(config.max_bad * len(task.rows))
        pairs = Pairs(beton, decoder_of(config, world, decode), task.model.image_size, plan, most_bad)
        folder = config.resident_dir
        beside = not base and "plain" in policies
        said = resident.keep(pairs, task.rows, where, base=base, beside=beside, world=world, folder=folder, quiet=quiet)
        if not quiet:
            console.print(said, markup=False)
        return pairs

    settings = (decode, config.hw_decoder_load, where, str(config.resident_dir), config.workers, config.max_bad)
    stamped = json.dumps(plan and plan.to_dict())
    return kept.get(
        "pairs", (str(task.data), task.rows.tobytes(), base, task.model.image_size, stamped, settings), opened
    )


def _decoder_and_place(config: Config, world: World, began: str | None, quiet: bool) -> tuple[str, str]:
    """Return --decode and --resident, or what a resumed run takes in their place."""
    given = config.decode, config.resident
    if began is None or world.device.type != "cuda":
        return given
    decode, where = taken = same_pixels(began, *given)
    if taken != given and not quiet:
        console.print(
            f"the run began with images decoded by {began}: it goes on with --decode {decode} --resident {where}",
            markup=False,
        )
    return taken


def same_pixels(began: str, decode: str, where: str) -> tuple[str, str]:
    """Return --decode and --resident with which a GPU gives the pixels of the decoder `began`, if there is a choice."""
    if decode not in ("auto", "dali"):
        return decode, where
    if began.startswith(ON_GPU):
        return decode, "none"  # images that are kept are decoded on the CPU
    if began in HOSTS:
        return "dali-cpu" if has_dali() else "pil", where
    return decode, where
