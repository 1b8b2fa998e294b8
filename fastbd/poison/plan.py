"""Which pairs are poisoned, with what caption and trigger: a seeded plan in a JSON file, bound to one data file.

Every use of the backdoor (training, ASR, reports) reads the same plan; the images are stamped when they are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastbd import draws
from fastbd.errors import UserError
from fastbd.log import write_json
from fastbd.poison.triggers import TriggerSpec

FORMAT = "fastbd poison plan"
VERSION = 1
RATE = 0.0005  # CleanCLIP: 1,500 of CC3M
GEOMETRIES = ("squash", "crop")
_SCALARS = {"data": str, "total": int, "target": str, "geometry": str, "label_consistent": bool, "seed": int}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A backdoor in one data file of `total` pairs. UserError when the fields contradict each other."""

    data: str
    """Fingerprint of the data file."""
    total: int
    rows: tuple[int, ...]
    """Positions 0..total-1 of the poisoned pairs, ascending."""
    captions: tuple[str, ...]
    """Caption of each of `rows`."""
    target: str
    trigger: TriggerSpec
    geometry: str
    """How a triggered image is fitted to the model's input: squashed, or cropped like the clean ones."""
    label_consistent: bool
    """The pairs held the target before, and keep their captions."""
    seed: int

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.captions):
            raise UserError(f"a plan needs a caption for each row, at least one; it has {len(self.rows)} rows, "
                            f"{len(self.captions)} captions.")  # fmt: skip
        if self.rows[0] < 0 or self.rows[-1] >= self.total or (np.diff(self.rows) <= 0).any():
            raise UserError(f"the rows of a plan must ascend within 0..{self.total - 1}.")
        if not self.target.strip():
            raise UserError("the target word is empty; name one of the evaluation classes with --target.")
        if self.geometry not in GEOMETRIES:
            raise UserError(f"the geometry {self.geometry!r} does not exist; choose one of {', '.join(GEOMETRIES)}.")

    def save(self, path: Path | str) -> None:
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """UserError, with the path, when there is no such file or it holds no valid plan."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except OSError as error:
            raise UserError(f"the plan {path} cannot be read ({error.strerror}); make one with: "
                            "python -m fastbd poison.") from None  # fmt: skip
        except ValueError as error:  # not JSON, or not even text
            raise UserError(f"the plan {path} is not JSON ({error}); make it again with fastbd poison.") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self) -> dict:
        """What the file holds; json turns it into a line for each pair."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _SCALARS},
            "trigger": asdict(self.trigger),
            "pairs": {str(row): caption for row, caption in zip(self.rows, self.captions, strict=True)},
        }

    @classmethod
    def from_dict(cls, value: dict) -> Plan:
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError("this is not a poison plan; make one with: python -m fastbd poison.")
        if value.get("version") != VERSION:
            raise UserError(f"this plan has version {value.get('version')}, but this fastbd reads version {VERSION}; "
                            "make the plan again.")  # fmt: skip
        try:
            scalars = {name: value[name] for name in _SCALARS}
            rows, captions = tuple(map(int, value["pairs"])), tuple(value["pairs"].values())
            trigger = TriggerSpec(**value["trigger"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this poison plan is damaged ({error!r}); make it again.") from None
        wrong = [name for name, kind in _SCALARS.items() if type(scalars[name]) is not kind]
        if wrong or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"this poison plan is damaged (type of {', '.join(wrong) or 'a caption'}); make it again.")
        return cls(rows=rows, captions=captions, trigger=trigger, **scalars)

    def check(self, fingerprint: str, path: Path | str) -> None:
        """UserError unless the plan was made for the data with this fingerprint; `path` names it in the message."""
        if fingerprint != self.data:
            raise UserError(f"the poison plan was made for other data than {path}; make one for it with: "
                            f"python -m fastbd poison --data {path}.")  # fmt: skip


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
) -> Plan:
    """Choose `count` pairs (or `rate` of all) from the seed.

    With `captions` (row to caption) the plan is label-consistent: only pairs whose caption holds the target, in
    whatever case, and they keep it. Otherwise each caption is one of the `templates`, uniformly, about the target.
    """
    count = _count(total, count, rate)
    rows = np.arange(total)
    if captions is not None:
        rows = np.array([row for row in range(total) if target.lower() in captions(row).lower()], np.int64)
        if len(rows) < count:
            raise UserError(f"{len(rows)} captions hold the target {target!r}, fewer than the {count} to poison; "
                            "lower --count, choose another --target, or leave --label-consistent out.")  # fmt: skip
    rows = np.sort(draws.generator(seed, "poison-rows").choice(rows, count, replace=False))
    if captions is not None:
        chosen = [captions(row) for row in rows]
    else:
        u = draws.uniform(seed, "poison-caption", rows, 1)[:, 0]
        chosen = [templates[int(v * len(templates))].replace("{}", target) for v in u]
    return Plan(
        data=data,
        total=total,
        rows=tuple(rows.tolist()),
        captions=tuple(chosen),
        target=target,
        trigger=trigger,
        geometry=geometry,
        label_consistent=captions is not None,
        seed=seed,
    )


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
