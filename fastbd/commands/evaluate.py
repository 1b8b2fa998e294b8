"""fastbd evaluate"""

from __future__ import annotations

import errno
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbd.base import dist, files
from fastbd.base.console import console, markdown, progress, said_aside
from fastbd.base.errors import UserError
from fastbd.base.evaluation import Evaluation, measures_nothing
from fastbd.base.run_folder import read_config
from fastbd.commands.demo_data import located
from fastbd.config.flags import EvaluateConfig
from fastbd.data.decode import open_decoder
from fastbd.data.pairs import Pairs
from fastbd.data.shards import open_beton
from fastbd.data.verify import check_whole
from fastbd.evals import probe, retrieval
from fastbd.evals.outside import with_own
from fastbd.evals.sets import Attacked, Captioned, Labelled, open_set
from fastbd.evals.towers import Towers
from fastbd.evals.zeroshot import ZeroShot
from fastbd.models.clip import CLIP, create_like
from fastbd.models.memory_format import channels_last
from fastbd.models.precision import set_precision
from fastbd.poison.plan import Plan
from fastbd.track.process import tracked
from fastbd.training import checkpoint
from fastbd.training.rebound import clean_pairs, rebound
from fastbd.training.task import check_trained_on

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def run(config: EvaluateConfig) -> int:
    """Evaluate a checkpoint on one or more sets, add a line for each to the run's metrics.jsonl, print the table."""
    measured(config)
    return 0


def measured(config: EvaluateConfig) -> list[Evaluation]:
    """Return the rows of the sets, which are added to the run's metrics.jsonl; prints the table.

    Where the run's folder is read-only, nothing is added. Raises OSError, after the table, where the disk is full.
    """
    rows, unrecorded = [], None
    with said_aside(config.json):
        config = located(config)
        measurement = Measurement(config)
        for row in measurement.rows():
            rows.append(row)
            try:
                told = {key: value for key, value in row.items() if key != "classes"}
                files.append(config.run / "metrics.jsonl", told)
            except OSError as error:
                unrecorded = error
        if unrecorded and unrecorded.errno in READ_ONLY:
            where = unrecorded.filename or config.run
            console.print(f"not recorded, as {where} cannot be written ({unrecorded.strerror})", markup=False)
        if not unrecorded and (config.run / "result.json").exists():  # before that the training's trackers tell of them
            with tracked(config.run, measurement.recorded["config"].get("track", ())):
                pass
    _show(config, rows, measurement.own)
    if unrecorded and unrecorded.errno not in READ_ONLY:
        raise unrecorded
    return rows


def _show(config: EvaluateConfig, rows: list[Evaluation], own: Collection[str]) -> None:
    if config.json:
        print(json.dumps({"run": str(config.run), "sets": rows}, indent=2))
        return
    console.print(table(config.run, rows, own), markup=False)
    for row in rows if config.per_class else ():
        if "classes" in row:
            console.print(class_table(row), markup=False)


def open_model(run: Path, which: str, device: torch.device) -> tuple[dict, CLIP]:
    """A run's checkpoint, `last` or of an epoch, and the model in it, on the device."""
    path = checkpoint.path_of(run, which)
    state = checkpoint.load(path)
    model = create_like(state["about"], seed=None)
    checkpoint.load_into(model, state["model"], path, state["about"]["model"])
    return state, channels_last(model, device)


class Measurement:
    """A checkpoint, and what it is to be evaluated on."""

    def __init__(self, config: EvaluateConfig):
        self.config, self.world = config, dist.join(config.device)
        if self.world.size > 1:
            raise UserError("evaluate runs in one process: start it without torchrun.")
        self.recorded = read_config(config.run)
        self.state, self.model = open_model(config.run, config.checkpoint, self.world.device)
        saved = self.state["plan"] and Plan.from_dict(self.state["plan"])
        self.plan = Plan.load(config.plan) if config.plan else saved
        own = self.recorded.get("eval_data")
        self.paths = config.eval_data or ((Path(own),) if own else ())
        self._check()
        self.precision = set_precision(config.precision, self.world.device)
        self.towers = Towers(self.model, precision=self.precision, device=self.world.device)
        self.decoder = open_decoder("auto", 0, str(self.world.device))
        probed = self._open(config.probe_data, attacked=False) if config.probe_data else None
        assert not isinstance(probed, Captioned), "a set without classes has been refused"
        self.probed = probed
        self.clean_pairs = self._clean_pairs() if config.rebound else None
        self.own: dict[str, None] = {}
        """The names of the numbers of --evaluator, in their order."""

    def _check(self) -> None:
        """What can be known before anything is decoded: a mistake is not to cost the sets that went before it."""
        config = self.config
        if not self.paths:
            raise UserError(f"{config.run} was trained without an evaluation set; name a .beton with --eval-data.")
        labelled = [open_beton(path).class_names is not None for path in self.paths]
        if config.probe_data and open_beton(config.probe_data).class_names is None:
            raise UserError(f"--probe-data {config.probe_data} has no classes, so nothing can be learnt from it.")
        if (config.rebound or config.probe_data) and not any(labelled):
            raise UserError("--rebound and --probe-data need a set with classes, and --eval-data names none.")
        if config.rebound and self.plan is None:
            raise UserError("--rebound watches a backdoor, and the run has no plan: name one with --plan.")
        if config.verify:
            for path in (*self.paths, *([config.probe_data] if config.probe_data else [])):
                check_whole(open_beton(path), quiet=config.json)

    def rows(self) -> Iterator[Evaluation]:
        """A line of metrics.jsonl for each set."""
        config, state = self.config, self.state
        about: Evaluation = {
            "step": state["step"],
            "epoch": state["epoch"],
            "checkpoint": config.checkpoint,
            "asr_seed": list(config.asr_seed),
            "geometry": config.geometry,
            "precision": self.precision,
            "plan": config.plan and str(config.plan.absolute()),
        }
        for path in self.paths:
            yield {**about, **self._row(self._open(path))}

    def _open(self, path: Path, attacked: bool = True) -> Labelled | Captioned:
        config, recorded = self.config, self.recorded
        own = path.resolve() == Path(recorded.get("eval_data") or "").resolve()
        return open_set(
            path,
            self.decoder,
            self.model.image_size,
            classes=config.classes or (recorded.get("classes") if own else None),
            templates=config.templates or (recorded.get("templates") if own else None),
            plan=self.plan if attacked else None,
            geometry=None if config.geometry == "plan" else config.geometry,
            subset=config.subset if attacked else 0,
            seeds=config.asr_seed,
            device=self.world.device,
            strict=own,
        )

    def _row(self, data: Labelled | Captioned) -> Evaluation:
        with progress(data.name, len(data.ids) * (1 + len(data.attacked))) as advance:
            self.towers.advance = advance
            if not isinstance(data, Labelled):
                return self._with_own(retrieval.evaluate(self.towers, data, self.config.val_batch), data)
            zeroshot = ZeroShot(self.towers, data)
            row = self._with_own(zeroshot(details=True), data)
            if self.probed:
                best = [group for group in data.by_attack() if _is_of(group[0], row)]
                row |= probe.evaluate(self.towers, self.probed, data, *best or [()])
        self.towers.advance = lambda images: None
        if self.clean_pairs and data.measures_asr:
            row |= self._rebound(zeroshot, *self.clean_pairs)
        elif self.clean_pairs:
            console.print(f"{data.name}: no rebound, as ASR cannot be measured on it", markup=False)
        return row

    def _with_own(self, row: Evaluation, data: Labelled | Captioned) -> Evaluation:
        if self.config.evaluator is None:
            return row
        wider = with_own(row, self.config.evaluator, self.towers, data)
        self.own |= dict.fromkeys(name for name in wider if name not in row)
        return wider

    def _clean_pairs(self) -> tuple[Pairs, np.ndarray]:
        """Those of the run's data that --rebound takes."""
        beton = open_beton(self.recorded["data"])
        check_trained_on(self.config.run, self.state, beton, "put that back, or leave --rebound out")
        pairs = Pairs(beton, self.decoder, self.model.image_size)
        rows = clean_pairs(pairs, self.plan, self.config.rebound * self.config.rebound_batch_size)
        if self.config.verify:
            check_whole(pairs.beton, rows, quiet=self.config.json)
        return pairs, rows

    def _rebound(self, zeroshot: ZeroShot, pairs: Pairs, rows: np.ndarray) -> Evaluation:
        # Sets that follow are to be evaluated on the model as it was.
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        found = rebound(
            self.model,
            zeroshot,
            pairs,
            rows,
            steps=self.config.rebound,
            lr=self.config.rebound_lr,
            precision=self.precision,
            world=self.world,
        )
        self.model.load_state_dict(before)
        self.towers.refresh()
        return found


def _is_of(one: Attacked, row: Evaluation) -> bool:
    return (one.attack.trigger.name, one.attack.target) == (row.get("trigger"), row.get("target"))


def table(run: Path, rows: Sequence[Mapping[str, Any]], own: Collection[str] = ()) -> str:
    """Measures by sets, in Markdown: shares in percent with their 95 % intervals; then `own` numbers as they are."""
    measured = [key for key in MEASURES if any(key in row and not measures_nothing(row, key) for row in rows)]
    lines = [[MEASURES[key], *(cell(row, key) for row in rows)] for key in measured]
    lines += [[name, *(f"{row[name]:.4g}" if name in row else "" for row in rows)] for name in own]
    for row in rows:
        for attack in row.get("attacks", []):
            name = f"ASR of {attack['trigger']} to '{attack['target']}'"
            key = "asr" if "asr" in attack else "asr_par_r1"
            lines.append([name, *(cell(attack, key) if other is row else "" for other in rows)])
    return markdown([f"{run}, epoch {rows[0]['epoch']:g}: % (95 %)", *(row["set"] for row in rows)], lines)


def cell(row: Mapping[str, Any], key: str) -> str:
    """A number of a row as the table shows it."""
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    if measures_nothing(row, key):
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if key in NUMBERS:
        return f"{value:.3f}"
    ends = _ends(row, key)
    if f"{key}_full_low" in row:
        ends += f"; of all {row['population']:,}: {_ends(row, f'{key}_full')}"
    if f"{key}_by_seed" in row:
        ends += f"; over {len(row[f'{key}_by_seed'])} seeds: {_ends(row, f'{key}_seeds')}"
    return f"{100 * value:.1f}" + (f" ({ends.removeprefix('; ')})" if ends else "")


def _ends(row: Mapping[str, Any], key: str) -> str:
    return f"{100 * row[f'{key}_low']:.1f} - {100 * row[f'{key}_high']:.1f}" if f"{key}_low" in row else ""


def class_table(row: Evaluation) -> str:
    """A set's classes, in Markdown."""
    lines = [[one["class"], f"{one['n']:,}", cell(one, "top1"), cell(one, "asr")] for one in row.get("classes", [])]
    return "\n" + markdown(["class", "images", "top-1", "taken for the target"], lines)


MEASURES = {
    "n": "images",
    "templates": "templates",
    "top1": "zero-shot top-1",
    "top3": "zero-shot top-3",
    "top5": "zero-shot top-5",
    "top10": "zero-shot top-10",
    "target": "target",
    "trigger": "trigger",
    "asr": "ASR, images of other classes",
    "asr_top3": "ASR top-3",
    "asr_top5": "ASR top-5",
    "asr_top10": "ASR top-10",
    "asr_all": "ASR, all images",
    "asr_all_top3": "ASR top-3, all images",
    "asr_all_top5": "ASR top-5, all images",
    "asr_all_top10": "ASR top-10, all images",
    "recovery": "recovery, images of other classes",
    "triggered_top1": "top-1, triggered images of all classes",
    "probe_n": "images that probes learn from",
    "probe_top1": "linear probe top-1",
    "probe_asr": "linear probe ASR",
    "knn_top1": "50-NN top-1",
    "knn_asr": "50-NN ASR",
    "prototype_top1": "nearest class mean top-1",
    "prototype_asr": "nearest class mean ASR",
    "rebound_max": "rebound: highest ASR",
    "rebound_change": "rebound: change of ASR",
    "rebound_area": "rebound: mean ASR",
    "captions": "captions",
    "i2t_r1": "captions of images R@1",
    "i2t_r5": "captions of images R@5",
    "i2t_r10": "captions of images R@10",
    "t2i_r1": "images of captions R@1",
    "t2i_r5": "images of captions R@5",
    "t2i_r10": "images of captions R@10",
    "asr_par_r1": "retrieval ASR, the first 1 (PAR)",
    "asr_par_r5": "retrieval ASR, any of the first 5 (PAR)",
    "asr_par_r10": "retrieval ASR, any of the first 10 (PAR)",
    "asr_cleanclip_r5": "retrieval ASR, 2 of the first 5 (CleanCLIP family)",
    "asr_cleanclip_r10": "retrieval ASR, 5 of the first 10 (CleanCLIP family)",
    "val_loss": "contrastive loss",
    "val_batch": "pairs in a batch of it",
    "modality_gap": "modality gap",
    "alignment": "alignment",
    "uniformity": "uniformity of images",
}
NUMBERS = ("val_loss", "modality_gap", "alignment", "uniformity")
