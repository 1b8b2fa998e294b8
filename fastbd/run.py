"""A run folder and the training that fills it: what pre-training and cleaning share."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from fastbd import __version__, checkpoint, log
from fastbd.config import CleanConfig, PretrainConfig, to_dict
from fastbd.data import eda, sheet
from fastbd.data.beton import Beton
from fastbd.data.decode import open_decoder
from fastbd.data.loader import Pairs, batches
from fastbd.dist import World
from fastbd.errors import UserError
from fastbd.evals.zeroshot import EvalSet, evaluate, open_set
from fastbd.loop import Timetable, every, train
from fastbd.models import CLIP
from fastbd.objectives import Objective
from fastbd.optim import learning_rate, make_optimizer
from fastbd.poison.plan import Plan
from fastbd.precision import set_precision
from fastbd.step import make_step


@dataclass(frozen=True)
class Start:
    """Where training begins: the model, what it is trained with, and, when resuming or keeping, the saved state."""

    model: CLIP
    objective: Objective
    data: Path
    plan: Plan | None
    eval_data: Path | None
    rows: np.ndarray
    poisoned: bool = True
    """Whether the plan's triggers and captions are in the data; in any case it is what evaluation attacks with."""
    optimizer: dict | None = None
    resumed: dict | None = None


def free_folder(path: Path) -> Path:
    """`path`, or path-2, path-3, ... when it is taken."""
    candidates = (path if k == 1 else path.with_name(f"{path.name}-{k}") for k in range(1, 10_000))
    return next(p for p in candidates if not p.exists())


def make_folder(config: PretrainConfig | CleanConfig, name: str, world: World) -> Path:
    """The run's folder: the resumed one, --out (which must be new), or the first free runs/NAME."""
    if config.resume:
        return config.resume
    if config.out and config.out.exists():
        raise UserError(f"{config.out} exists already; choose another --out, or go on with --resume {config.out}.")
    folder = config.out or free_folder(Path("runs") / name)
    world.barrier()  # every rank has looked before one makes it
    if world.main:
        folder.mkdir(parents=True)
    return folder


def describe(folder: Path, config: PretrainConfig | CleanConfig, plan: Plan | None, **about) -> None:
    """Write config.json, env.json and plan.json."""
    log.write_json(
        folder / "config.json", {"name": folder.name, "fastbd": __version__, **about, "config": to_dict(config)}
    )
    log.write_json(folder / "env.json", {**log.environment(), "eda_synonyms": eda.synonyms_source()})
    if plan:
        plan.save(folder / "plan.json")


def open_pairs(beton: Beton, start: Start, config: PretrainConfig | CleanConfig, world: World) -> Pairs:
    """The training pairs, decoded into memory where --resident says so or they fit."""
    if start.objective.augments and start.objective.ssl_text and beton.num_text_views == 0:
        raise UserError(
            f"{start.data} holds no second text views; build it with --text-views 1, or train with --no-ssl-text."
        )
    decoder = open_decoder(config.decode, config.workers or os.cpu_count(), world.device.type)
    pairs = Pairs(beton, decoder, start.model.image_size, start.plan if start.poisoned else None)
    if config.resident == "ram" or (config.resident == "auto" and pairs.fits_in_memory(len(start.rows))):
        pairs.keep_in_memory(start.rows, quiet=not world.main)
    return pairs


def open_evaluation(start: Start, config: PretrainConfig | CleanConfig, world: World) -> EvalSet | None:
    """The evaluation set on the main rank, if there is one."""
    if start.eval_data is None or not world.main:
        return None
    decoder = open_decoder(config.decode, config.workers or os.cpu_count(), world.device.type)
    return open_set(
        start.eval_data,
        decoder,
        start.model.image_size,
        classes=config.classes,
        templates=config.templates,
        plan=start.plan,
        subset=config.eval_subset,
        seed=config.seed,
    )


def train_in(folder: Path, start: Start, config: PretrainConfig | CleanConfig, world: World, about: dict) -> None:
    """Train as configured, writing everything into `folder`."""
    if config.batch_size % world.size:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide by the {world.size} processes; choose a multiple."
        )
    steps_per_epoch = len(start.rows) // config.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"--batch-size {config.batch_size} is larger than the {len(start.rows)} pairs there are; make it smaller."
        )
    precision = set_precision(config.precision, world.device)
    total = round(config.epochs * steps_per_epoch)
    model = start.model.to(world.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(
        model, lr=config.lr, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2), eps=config.eps
    )
    if start.optimizer:
        optimizer.load_state_dict(start.optimizer)
    schedule = partial(learning_rate, peak=config.lr, warmup=min(config.warmup, total // 10), total=total)
    at = 0
    if start.resumed:
        at = start.resumed["step"]
        checkpoint.set_random_state(start.resumed["random"])
    beton = Beton(start.data)
    pairs = open_pairs(beton, start, config, world)
    evaluation = open_evaluation(start, config, world)

    def measure(step: int) -> None:
        if evaluation:
            row = evaluate(model, evaluation, precision=precision, device=world.device)
            row = {"step": step, "epoch": step / steps_per_epoch, **row}
            log.append(folder / "metrics.jsonl", row)
            log.console.print(result_line(row))
        world.barrier()

    def save(step: int) -> None:
        if world.main:
            state = {
                "fastbd": __version__,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "epoch": step / steps_per_epoch,
                "random": checkpoint.random_state(),
                "precision": precision,
                "decode": pairs.decoder.name,
                "plan": start.plan.to_dict() if start.plan else None,
                "config": to_dict(config),
                "about": about,
            }
            checkpoint.save(folder / "ckpt_last.pt", state)
            if config.save_every and step % (config.save_every * steps_per_epoch) == 0:
                keep = folder / f"ckpt_epoch_{step // steps_per_epoch:03d}.pt"
                keep.unlink(missing_ok=True)
                os.link(folder / "ckpt_last.pt", keep)
        world.barrier()

    def make_batches(epoch: int, offset: int):
        return batches(
            pairs,
            start.rows,
            config.batch_size,
            seed=config.seed,
            augmented=start.objective.augments,
            world=world,
            epoch=epoch,
            start=offset,
        )

    if world.main and at == 0:
        sheet.samples(pairs, start.rows, config.seed).save(folder / "samples.png")
    if about["verb"] == "clean" and at == 0:
        measure(0)
    evaluate_at = every(config.eval_every, steps_per_epoch, total) if start.eval_data else set()
    table = Timetable(
        steps_per_epoch, total, evaluate_at, every(config.save_every, steps_per_epoch, total), config.log_every
    )
    step = make_step(model, start.objective, optimizer, schedule, precision=precision, world=world)
    began = time.perf_counter()
    train(
        step,
        make_batches,
        table,
        start=at,
        label=folder.name,
        world=world,
        evaluate=measure,
        save=save,
        record=partial(log.append, folder / "log.jsonl") if world.main else lambda row: None,
    )
    if world.main:
        log.console.print(f"[green]done[/] {folder}  {total - at} steps in {time.perf_counter() - began:.0f} s")


def result_line(row: dict) -> str:
    """One evaluation as a line of text."""
    line = f"epoch {row['epoch']:5.1f}  top-1 {row['top1']:6.1%}"
    if "asr" in row:
        line += f"  ASR {row['asr']:6.1%}  recovery {row['recovery']:6.1%}"
    return f"{line}  ({row['set']}, {row['seconds']:.1f} s)"


def result_table(folder: Path, row: dict) -> Table:
    """One evaluation as a table with intervals."""
    table = Table(
        "measure", "share", "95 % interval", "images", title=f"{folder} at epoch {row['epoch']:g} on {row['set']}"
    )
    names = {
        "top1": "zero-shot top-1",
        "top5": "top-5",
        "top10": "top-10",
        "asr": f"ASR to '{row.get('target')}'",
        "asr_all": "ASR, target-class images too",
        "recovery": "triggered, true class found",
    }
    for key, name in names.items():
        if key in row:
            interval = f"{row[f'{key}_low']:.1%} - {row[f'{key}_high']:.1%}" if f"{key}_low" in row else ""
            table.add_row(
                name, f"{row[key]:.2%}", interval, str(row["n_asr"] if key in ("asr", "recovery") else row["n"])
            )
    return table
