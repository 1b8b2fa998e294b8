"""--help of a verb: its flags in groups, one for each class that has a part of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from fastbd.config.fields import types_of


def grouped(kind: type, defaults: Mapping[str, Any]) -> type:
    """Return a dataclass of dataclasses, one for each class that `kind` is made of, for tyro to show as groups.

    `defaults`: those that are not the fields' own, by name.
    """
    parts = [(part, _group(part, names, kind, defaults)) for part, names in _parts(kind)]
    if len(parts) == 1:
        return parts[0][1]
    titled = {}
    for part, group in parts:
        title = _title(part, kind)
        titled[f"{title}_of_{len(titled)}" if title in titled else title] = group
    return make_dataclass(kind.__name__, list(titled.items()), kw_only=True)


def _parts(kind: type) -> Iterator[tuple[type, list[str]]]:
    """Yield each class that `kind` is made of, with the names of the fields that it defines, in their order."""
    for part in reversed(kind.__mro__):
        if names := [name for name in inspect.get_annotations(part) if name in kind.__dataclass_fields__]:
            yield part, names


def _group(part: type, names: list[str], kind: type, defaults: Mapping[str, Any]) -> type:
    told = _described(part)
    made = make_dataclass(part.__name__, [_shown(name, kind, defaults, told) for name in names], kw_only=True)
    made.__doc__ = part.__doc__ if part is not kind else None  # that stands above all groups
    return made


def _shown(name: str, kind: type, defaults: Mapping[str, Any], told: dict[str, str]) -> tuple:
    """Return the field as --help is to show it: without a default that says nothing, and "or None"."""
    from tyro.conf import arg

    plain = kind.__dataclass_fields__[name]
    value = defaults.get(name, plain.default)
    hint = types_of(kind)[name]
    shown = arg(help=told.get(name), help_behavior_hint=_default, metavar=_placeholder(hint))
    return (name, Annotated[hint, shown]) + (() if value is dataclasses.MISSING else (field(default=value),))


def _placeholder(hint: Any) -> str | None:
    """Return what stands for the value of a flag that may be None; None where tyro's own word is as good."""
    if type(None) not in (choices := typing.get_args(hint)):
        return None
    (first, *others) = [choice for choice in choices if choice is not type(None)]
    if typing.get_origin(first) is tuple:
        first = typing.get_args(first)[0]
        return f"{WORDS.get(first)} [{WORDS.get(first)} ...]"
    if typing.get_origin(first) is typing.Literal:
        return "|".join(["{" + ",".join(map(str, typing.get_args(first))) + "}", *(WORDS[other] for other in others)])
    return None if others else WORDS.get(first)


def _default(value: str) -> str:
    """Return what stands behind a flag's text: nothing for None, which the text explains in brackets, or for ()."""
    return "" if value in ("None", "") else f"(default: {value})"


def _described(part: type) -> dict[str, str]:
    """Return the text below each field in the source of a class, as one line."""
    from docstring_parser import parse_from_object

    found = parse_from_object(part).params
    return {each.args[1]: " ".join((each.description or "").split()) for each in found if each.args[0] == "attribute"}


def _title(part: type, kind: type) -> str:
    """Return the name of a group, before tyro's word "options": schedule of class Schedule, par of ParSettings.

    That of PoisonTrigger, a part of PoisonConfig, is trigger.
    """
    name = re.sub("(?<=.)(Inputs|Settings)$", "", part.__name__)
    name = name.removeprefix(kind.__name__.removesuffix("Config")) or name
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


WORDS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
