"""Published results of the same kind of study: other data and other models, shown for comparison only.

published.csv has a row a point; top1 and asr are in %. point: start (before cleaning), best_asr_N (the highest top-1
among the evaluations with ASR <= N %; empty where none had it), highest_top1, lowest_asr, evaluation. cleaning: the
method, for fine-tuning with its loss. clean_pairs, poison_left: the cleaning set.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

Point = dict[str, str]
CLASS_LIST = "imagenet1k"
"""That of all the published numbers: only with it are they of the same kind as a user's."""


@lru_cache
def points() -> tuple[Point, ...]:
    """The rows of published.csv."""
    with Path(__file__).with_name("published.csv").open(newline="") as file:
        return tuple(csv.DictReader(file))


def table() -> list[tuple[Point, dict[str, Point]]]:
    """(any of its points, its points by kind) for each published cleaning, with the start that it began from."""
    starts = {_model(p): p for p in points() if p["point"] == "start"}
    found: dict[tuple, dict[str, Point]] = {}
    for point in points():
        if point["cleaning"] and point["point"] != "evaluation":
            key = (*_model(point), point["cleaning"], point["clean_pairs"], point["poison_left"])
            found.setdefault(key, {"start": starts[_model(point)]})[point["point"]] = point
    return [(next(reversed(kinds.values())), kinds) for kinds in found.values()]


def measured() -> list[Point]:
    """The points whose accuracy and ASR are both known."""
    return [point for point in points() if point["top1"] and point["asr"]]


def _model(point: Point) -> tuple[str, ...]:
    return tuple(point[key] for key in ("data", "architecture", "attack", "pretraining"))
