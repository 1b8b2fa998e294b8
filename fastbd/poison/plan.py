"""Which pairs are poisoned, with what caption and trigger: a seeded plan in a JSON file, bound to one data file.

Every use of the backdoor (training, ASR, reports) reads the same plan; the images are stamped when they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import Tensor

from fastbd.base import random
from fastbd.base.errors import UserError
from fastbd.base.files import crc_of, read_json, write_json
from fastbd.base.text import clean, holds
from fastbd.poison.triggers import TriggerSpec, stamp

FORMAT = "fastbd poison plan"
VERSION = 2  # 1 held one attack, its fields beside the plan's
RATE = 0.0005  # CleanCLIP: 1,500 of CC3M
GEOMETRIES = ("squash", "crop")
_PLAN = {"data": str, "total": int, "seed": int}
_ATTACK = {"target": str, "geometry": str, "label_consistent": bool}


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A trigger that is to be taken for a target. UserError when the fields contradict each other."""

    target: str
    trigger: TriggerSpec
    geometry: str
    """How a triggered image is fitted to the model's input: squashed, or cropped like the clean ones."""
    label_consistent: bool
    """The pairs held the target before, and keep their captions."""
    rows: tuple[int, ...]
    """Positions of the poisoned pairs, ascending."""
    captions: tuple[str, ...]
    """Caption of each of `rows`."""

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.captions):
            raise UserError(
                f"a plan needs a caption for each row, at least one; it has {len(self.rows)} rows, "
                f"{len(self.captions)} captions."
            )
        if not self.target.strip():
            raise UserError("the target word is empty; name one of the evaluation classes with --target.")
        if self.geometry not in GEOMETRIES:
            raise UserError(f"the geometry {self.geometry!r} does not exist; choose one of {', '.join(GEOMETRIES)}.")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Backdoors in one data file of `total` pairs. UserError when the attacks contradict each other."""

    data: str
    """Fingerprint of the data file: it covers the content where the file has checksums, else only its tables."""
    total: int
    seed: int
    attacks: tuple[Attack, ...]

    def __post_init__(self) -> None:
        if not self.attacks:
            raise UserError("the plan has no attack; make it again with fastbd poison.")
        for attack in self.attacks:
            if attack.rows[0] < 0 or attack.rows[-1] >= self.total or (np.diff(attack.rows) <= 0).any():
                raise UserError(f"the rows of a plan must ascend within 0..{self.total - 1}.")
        if len(np.unique(self.rows)) < len(self.rows):
            raise UserError("two attacks of the plan poison the same row; make the plan again.")
        looks = [(attack.trigger, attack.geometry) for attack in self.attacks]
        if len(set(looks)) < len(looks):
            raise UserError(
                "two attacks of the plan have the same trigger, so nobody could tell them apart; "
                "give another --trigger, or other parameters."
            )

    @property
    def rows(self) -> tuple[int, ...]:
        """Positions of all poisoned pairs, attack by attack."""
        return tuple(row for attack in self.attacks for row in attack.rows)

    @property
    def captions(self) -> tuple[str, ...]:
        """Caption of each of `rows`."""
        return tuple(caption for attack in self.attacks for caption in attack.captions)

    @cached_property
    def attack_of(self) -> np.ndarray:
        """int16 [total]: which attack poisons a row, or -1."""
        found = np.full(self.total, -1, np.int16)
        for k, attack in enumerate(self.attacks):
            found[list(attack.rows)] = k
        return found

    def squashed(self, rows: np.ndarray) -> np.ndarray:
        """bool [B]: whether the image of a row is poisoned, and squashed for it."""
        squash = np.array([attack.geometry == "squash" for attack in self.attacks] + [False])
        return squash[self.attack_of[rows]]  # -1 is the last

    def stamp(self, images: Tensor, rows: np.ndarray) -> None:
        """Put the triggers on those of the fitted images uint8 [B, S, S, 3] of `rows` that are poisoned, in place."""
        which = self.attack_of[rows]
        for k in np.unique(which[which >= 0]):
            hit = np.flatnonzero(which == k)
            # A slice where it can be: uploading an index waits for the GPU.
            places = slice(None) if len(hit) == len(rows) else torch.from_numpy(hit).to(images.device)
            images[places] = stamp(images[places], self.attacks[k].trigger, seed=self.seed, ids=rows[hit])

    def save(self, path: Path | str) -> None:
        value = self.to_dict()
        write_json(Path(path), {"crc32": crc_of(value), **value})

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """UserError, with the path, when there is no such file or it holds no valid plan."""
        try:
            value = read_json(Path(path), "name a plan, which python -m fastbd poison makes")
            if isinstance(value, dict) and value.pop("crc32", None) not in (None, crc_of(value)):
                raise UserError(
                    "the plan is not as it was written: make it again, or, where you have changed it, take "
                    "its entry crc32 out."
                )
            return cls.from_dict(value)
        except OSError as error:
            raise UserError(
                f"the plan {path} cannot be read ({error.strerror}); make one with: python -m fastbd poison."
            ) from None
        except UserError as error:
            said = str(error)
            raise UserError(said if str(path) in said else f"{path}: {said}") from None

    def to_dict(self) -> dict:
        """What the file holds; json turns it into a line for each pair."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _PLAN},
            "attacks": [
                {
                    **{name: getattr(attack, name) for name in _ATTACK},
                    "trigger": asdict(attack.trigger),
                    "pairs": {str(row): text for row, text in zip(attack.rows, attack.captions, strict=True)},
                }
                for attack in self.attacks
            ],
        }

    @classmethod
    def from_dict(cls, value: dict) -> Plan:
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError("this is not a poison plan; make one with: python -m fastbd poison.")
        if value.get("version") not in (1, VERSION):
            raise UserError(
                f"this plan has version {value.get('version')}, but this fastbd reads up to {VERSION}; "
                "make the plan again."
            )
        try:
            attacks = [value] if value["version"] == 1 else value["attacks"]
            return cls(**_typed(value, _PLAN), attacks=tuple(map(_attack, attacks)))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"this poison plan is damaged ({error!r}); make it again.") from None

    def check(self, fingerprint: str, total: int, path: Path | str) -> None:
        """UserError unless the plan is of the data of `total` pairs with this fingerprint; `path` names the data."""
        if (fingerprint, total) != (self.data, self.total):
            raise UserError(
                f"the poison plan was made for other data than {path}; make one for it with: "
                f"python -m fastbd poison --data {quote(str(path))}."
            )


def _attack(value: dict) -> Attack:
    rows, captions = tuple(map(int, value["pairs"])), tuple(value["pairs"].values())
    if not all(isinstance(caption, str) for caption in captions):
        raise TypeError("a caption that is no text")
    return Attack(**_typed(value, _ATTACK), trigger=TriggerSpec(**value["trigger"]), rows=rows, captions=captions)


def _typed(value: dict, kinds: dict[str, type]) -> dict:
    """The entries that `kinds` names. TypeError for one of another type."""
    if wrong := [name for name, kind in kinds.items() if type(value[name]) is not kind]:
        raise TypeError(f"type of {', '.join(wrong)}")
    return {name: value[name] for name in kinds}


def make_plan(
    data: str,
    total: int,
    *,
    target: str,
    trigger: TriggerSpec,
    geometry: str,
    seed: int,
    templates: Sequence[str] = (),
    captions: Callable[[int], str] | None = None,
    count: int | None = None,
    rate: float | None = None,
    after: Plan | None = None,
) -> Plan:
    """Choose `count` pairs (or `rate` of all) from the seed, among those that the plan `after` leaves clean.

    The new attack comes after those of that plan, whose data and seed are the same. With `captions` (row to caption)
    it is label-consistent: only pairs whose caption holds the target, in whatever case, and they keep it. Otherwise
    each caption is one of the `templates`, uniformly, about the target.
    """
    count = _count(total, count, rate)
    earlier = after.attacks if after else ()
    rows = np.setdiff1d(np.arange(total), after.rows) if after else np.arange(total)
    if len(rows) < count:
        raise UserError(f"{len(rows)} pairs are clean yet, fewer than the {count} to poison; lower --count.")
    if captions is not None:
        rows = np.array([row for row in rows.tolist() if holds(captions(row), target)], np.int64)
        if len(rows) < count:
            raise UserError(
                f"{len(rows)} captions hold the target {target!r}, fewer than the {count} to poison; "
                "lower --count, choose another --target, or leave --label-consistent out."
            )
    stream = f"poison-rows-{len(earlier)}" if earlier else "poison-rows"
    rows = np.sort(random.generator(seed, stream).choice(rows, count, replace=False))
    if captions is not None:
        chosen = [captions(row) for row in rows]
    else:
        u = random.uniform(seed, "poison-caption", rows, 1)[:, 0]
        chosen = [clean(templates[int(v * len(templates))].replace("{}", target)) for v in u]
    attack = Attack(
        target=target,
        trigger=trigger,
        geometry=geometry,
        label_consistent=captions is not None,
        rows=tuple(rows.tolist()),
        captions=tuple(chosen),
    )
    return Plan(data=data, total=total, seed=seed, attacks=(*earlier, attack))


def _count(total: int, count: int | None, rate: float | None) -> int:
    """The number of pairs to poison, 1 to total."""
    if count is not None and rate is not None:
        raise UserError("--count and --rate say the same thing; give one of them.")
    if count is None:
        rate = RATE if rate is None else rate
        if not 0 < rate <= 1:
            raise UserError(f"--rate {rate} is not a share; give a number above 0 and at most 1.")
        count = round(rate * total)
        if count == 0:
            raise UserError(f"--rate {rate} of {total} pairs is less than one pair; give --count.")
    if not 1 <= count <= total:
        raise UserError(f"--count {count} is not possible with {total} pairs; give 1 to {total}.")
    return count
