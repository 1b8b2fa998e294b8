"""What a field of a verb's flags may hold, and how it is written to JSON and read back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
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
    hints = typing.get_type_hints(kind)
    fields = {k: v for k, v in values.items() if k in hints}
    for name, value in fields.items():
        try:
            fields[name] = typed(hints[name], value)
        except TypeError as error:
            raise TypeError(f"{name} is {value!r:.80}, and must be {error}") from None
    return kind(**fields)


def typed(hint: Any, value: Any) -> Any:
    """Return the value as the type `hint` of a flag. TypeError, of which the message is what it must be."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
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
        if isinstance(value, tuple | list):
            return tuple(typed(typing.get_args(hint)[0], item) for item in value)
        raise TypeError("a list")
    if type(value) is hint or (hint is Path and isinstance(value, Path)):
        return value
    if (hint is float and type(value) is int) or (hint is Path and isinstance(value, str)):
        return hint(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    raise TypeError(words.get(hint, "nothing"))
