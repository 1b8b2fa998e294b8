"""What a field of a verb's flags may hold, and how it is written to JSON and read back."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Range(NamedTuple):
    """Numbers from `least` to `most`, but for those in `without`."""

    least: float
    most: float
    without: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and value not in self.without  # not-a-number is in none

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"a finite number {'above' if self.least in self.without else 'from'} {self.least}"
        but = " or ".join(map(str, self.without))
        return f"{self.least} to {self.most}" + (f", but not {but}" if but else "")


LARGEST = 2**31 - 1  # of what is counted
COUNT, POSITIVE, SEVERAL = Range(0, LARGEST), Range(1, LARGEST), Range(2, LARGEST)
SEED = Range(-(2**63), 2**63 - 1)
SHARE, BELOW_1 = Range(0, 1), Range(0, 1, (1,))
FINITE, ABOVE_0 = Range(0, math.inf, (math.inf,)), Range(0, math.inf, (0, math.inf))


class File(NamedTuple):
    """A kind of file that a flag names, where a folder would be a mistake."""

    what: str
    pattern: str
    """Of the names of such files."""


BETON = File(".beton file", "*.beton")
BETON_OF_BUILD = File(".beton file, which python -m fastbd build makes", "*.beton")
PLAN = File("plan file, which python -m fastbd poison makes", "*.poison.json")
ROWS = File("row list, which python -m fastbd detect makes", "*.rows")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What is known of a flag besides its type and its help: a mark on its field, `lr: Annotated[float, Flag(...)]`.

    Each default is the safe one: a flag without marks makes another run, another step, and another group in a report.
    """

    range: Range | None = None
    """Numbers that it may be; words, such as auto, and None aside."""
    file: File | None = None
    """What it names is such a file."""
    choice: str = ""
    """It chooses by name from this table of cards.KINDS, or names code outside of the package."""
    immaterial: bool = False
    """Another value makes no other run: its numbers stay the same up to rounding. It says where a run is and what it
    starts from, how much memory it takes, what machine it runs on, what it keeps, or when it is refused."""
    reuse: bool = False
    """Two runs may differ in it and still be trained by the same step in the same memory, with the same graph."""
    free_on_resume: bool = False
    """It may be another when a run is resumed: the place of a file that is compared by its content, or what is told."""
    set_by_study: tuple[str, ...] = ()
    """Verbs of a study whose entries may not give it, as the study itself does."""
    same_kind: bool = False
    """Another value makes no other kind of model in a report: seeds, how a run is watched, and what is compared by
    itself (architecture, data, attack)."""
    searched: bool = False
    """A group of cleanings in a report is searched over its values, or they are told elsewhere."""
    place: bool = False
    """It says where a run was made, which a report does not list among what its runs differ in."""
    column: int = 0
    """Its place among the flags in the tables of a report; 0: it is in none."""


@cache
def types_of(kind: type) -> Mapping[str, Any]:
    """Return the type of each field of a dataclass, by name, without the marks."""
    return typing.get_type_hints(kind)


@cache
def flags_of(kind: type) -> Mapping[str, Flag]:
    """Return the mark of each field of a dataclass, by name; a Flag of defaults where it has none."""
    hints = typing.get_type_hints(kind, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: next((m for m in found if isinstance(m, Flag)), Flag()) for name, found in marks.items()}


def marked(mark: str, *kinds: type) -> frozenset[str]:
    """Return the names of the fields that have the mark, one of the names of Flag, in any of the dataclasses."""
    return frozenset(name for kind in kinds for name, flag in flags_of(kind).items() if getattr(flag, mark))


def outside(kind: type, flag: str, value: Any) -> Range | None:
    """Return the range of a flag of `kind` where the value, or one in a tuple, is a number outside of it; else None."""
    allowed = flags_of(kind)[flag].range
    values = value if isinstance(value, tuple) else (value,)
    numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
    return allowed if allowed and any(each not in allowed for each in numbers) else None


def to_dict(config) -> dict:
    """The config as JSON values; files are named by absolute paths, so that a run folder can be used from anywhere."""
    values = dataclasses.asdict(config).items()
    return {k: list(v) if isinstance(v, tuple) else portable(v) for k, v in values}


def portable(value):
    """A path as an absolute string; so too a string that names a file, which the names of built-in things do not."""
    is_file = isinstance(value, str) and Path(value).suffix and Path(value).is_file()
    return str(Path(value).absolute()) if is_file or isinstance(value, Path) else value


def from_dict(kind: type, values: dict):
    """The inverse of to_dict; keys that `kind` no longer has are dropped. TypeError for a value of another type."""
    return kind(**typed_fields(kind, {k: v for k, v in values.items() if k in types_of(kind)}))


def typed_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names of fields of `kind`, each as the type of its field. TypeError that tells of one."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = typed(types_of(kind)[name], value)
        except TypeError as error:
            raise TypeError(f"{name} is {value!r:.80}, and must be {error}") from None
    return found


def as_told(hint: Any, value: Any) -> Any:
    """Return a value of Python as a command line gives the flag of type `hint`: a number as text, one as a list."""
    parts = {hint, *typing.get_args(hint)}
    if lists := [part for part in parts if typing.get_origin(part) is tuple]:
        items = (value,) if isinstance(value, str | Path | int | float) else value
        return tuple(as_told(typing.get_args(lists[0])[0], item) for item in items) if _is_list(items) else value
    return str(value) if str in parts and not parts & {int, float} and type(value) is int else value


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _plain(value: Any) -> Any:
    """Return a text or a number of a class of its own, such as an enumeration's, as one of Python's."""
    if isinstance(value, str):
        return str.__str__(value)
    return next((kind(value) for kind in (bool, int, float) if isinstance(value, kind)), value)


def typed(hint: Any, value: Any) -> Any:
    """Return the value as the type `hint` of a flag. TypeError, of which the message is what it must be."""
    value = _plain(value)
    if typing.get_origin(hint) is Literal:
        for part in typing.get_args(hint):
            if type(part) is type(value) and part == value:  # True == 1 == 1.0
                return part
        raise TypeError(f"one of {', '.join(map(str, typing.get_args(hint)))}")
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        wanted = []
        for part in typing.get_args(hint):
            try:
                return typed(part, value)
            except TypeError as error:
                wanted.append(str(error))
        raise TypeError(" or ".join(wanted))
    if typing.get_origin(hint) is tuple:
        if _is_list(value):
            return tuple(typed(typing.get_args(hint)[0], item) for item in value)
        raise TypeError("a list")
    if type(value) is hint or (hint is Path and isinstance(value, Path)):
        return value
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    raise TypeError(WORDS.get(hint, "nothing"))


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
"""The plain types of flags."""


def is_flag_type(hint: Any) -> bool:
    """Return whether a flag can have this type, so that `typed` reads its values."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return all(type(part) in WORDS for part in parts)
    if kind in (types.UnionType, typing.Union):
        return all(map(is_flag_type, parts))
    if kind is tuple:
        return parts[1:] == (...,) and is_flag_type(parts[0])
    return hint in (*WORDS, type(None))
