"""What can be chosen by name: where its code is, how reports call and draw it, and which flags it has of its own.

Beside the names in these tables a name may be MODULE:ATTRIBUTE, of code outside of this package. Such code says of
itself what a card says, by attributes: `title`, `marker`, `colour`, and a frozen dataclass `Settings` of its flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastbd.base.errors import UserError
from fastbd.config.fields import flags_of, is_flag_type, typed, types_of
from fastbd.config.imports import check_call, check_unedited, imported, source
from fastbd.config.method_flags import DeepClusterSettings, ParSettings, ShrinkPerturbSettings, UnlearnSettings


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a thing without importing it."""

    code: str = ""
    """MODULE:ATTRIBUTE; empty where it is only an entry in a table of its module."""
    title: str = ""
    """Its name in reports, as papers write it."""
    marker: str = ""
    """Of a cleaning method in plots, one of Matplotlib's."""
    colour: str = ""
    """Of an objective in plots."""
    settings: type | None = None
    """Dataclass of the flags that it has of its own."""
    patch: bool = False
    """A trigger has a size and a place."""
    blend: float | None = None
    """Published share of a trigger that is mixed into the whole image; None for other triggers."""
    needs: tuple[str, ...] = ()
    """Modules that it imports, of the extra of its name."""


METHODS = {
    "finetune": Card(code="fastbd.methods.finetune:Finetune", title="Finetuning", marker="^"),
    "cleanclip": Card(code="fastbd.methods.cleanclip:CleanClip", title="CleanCLIP", marker="o"),
    "par": Card(code="fastbd.methods.par:Par", title="PAR", marker="s", settings=ParSettings),
    "shrink_perturb": Card(
        code="fastbd.methods.shrink_perturb:ShrinkPerturb",
        title="Shrink and perturb",
        marker="v",
        settings=ShrinkPerturbSettings,
    ),
    "deep_cluster": Card(
        code="fastbd.methods.deep_cluster:DeepCluster",
        title="Deep clustering",
        marker="P",
        settings=DeepClusterSettings,
    ),
    "unlearn": Card(code="fastbd.methods.unlearn:Unlearn", title="Unlearning", marker="X", settings=UnlearnSettings),
    "supervised": Card(code="fastbd.methods.supervised:Supervised", title="Supervised fine-tuning", marker="p"),
}
ROBUST = {
    "roclip": Card(code="fastbd.methods.roclip:RoClip", title="RoCLIP"),
    "safeclip": Card(code="fastbd.methods.safeclip:SafeClip", title="SafeCLIP"),
    "progressive": Card(code="fastbd.methods.progressive:Progressive", title="progressive removal"),
}
OBJECTIVES = {  # in the order of reports; Okabe and Ito's colours, safe for the colour-blind
    "mmcl": Card(code="fastbd.methods.objectives:mmcl", title="MMCL", colour="#0072B2"),
    "mmcl_ssl": Card(code="fastbd.methods.objectives:mmcl_ssl", title="MMCL+SSL", colour="#D55E00"),
    "ssl": Card(code="fastbd.methods.objectives:ssl", title="SSL", colour="#009E73"),
    "siglip": Card(code="fastbd.methods.objectives:siglip", title="SigLIP", colour="#CC79A7"),
    "siglip_ssl": Card(code="fastbd.methods.objectives:siglip_ssl", title="SigLIP+SSL", colour="#E69F00"),
    "cyclip": Card(code="fastbd.methods.objectives:cyclip", title="CyCLIP", colour="#56B4E9"),
}
TRIGGERS = {
    "badnet": Card(code="fastbd.poison.triggers:badnet", patch=True),
    "badnet_fixed": Card(code="fastbd.poison.triggers:kept_patch", patch=True),
    "badnet_stripes": Card(code="fastbd.poison.triggers:badnet_stripes", patch=True),
    "yellow": Card(code="fastbd.poison.triggers:yellow", patch=True),
    "patch": Card(code="fastbd.poison.triggers:kept_patch", patch=True),
    "blended": Card(code="fastbd.poison.triggers:blended", blend=0.2),
    "blended_stripes": Card(code="fastbd.poison.triggers:blended_stripes", blend=0.03),
    "blended_triangles": Card(code="fastbd.poison.triggers:blended_triangles", blend=0.15),
    "blended_text": Card(code="fastbd.poison.triggers:blended_text", blend=0.5),
    "blended_image": Card(code="fastbd.poison.triggers:blended_image", blend=0.2),
    "sig": Card(code="fastbd.poison.triggers:sig", blend=0.2),
    "wanet": Card(code="fastbd.poison.triggers:wanet"),
    "nashville": Card(code="fastbd.poison.triggers:nashville"),
}
MODELS = dict.fromkeys(
    ("demo", "small-rn10", "rn50", "rn101", "rn50x4", "vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336", "tiny-rn",
     "tiny-vit"), Card(),
)  # fmt: skip
VIEWS = dict.fromkeys(("cleanclip", "randaugment", "slip", "par"), Card())
EVALUATORS: dict[str, Card] = {}  # what is measured in any case is no choice
TRACKERS = {
    "tensorboard": Card(code="fastbd.track.trackers:TensorBoard", needs=("tensorboard",)),
    "wandb": Card(code="fastbd.track.trackers:Wandb", needs=("wandb",)),
    "mlflow": Card(code="fastbd.track.trackers:Mlflow", needs=("mlflow", "sqlalchemy", "alembic")),
}
KINDS = {
    "method": METHODS, "robust": ROBUST, "objective": OBJECTIVES, "trigger": TRIGGERS, "model": MODELS, "views": VIEWS,
    "evaluator": EVALUATORS, "tracker": TRACKERS,
}  # fmt: skip
"""The tables by the flag that chooses from them."""
CALLED = {
    "method": ("config",), "robust": ("config",), "objective": ("config",), "model": ("activation",),
    "trigger": ("spec", "seed", "ids", "images"), "evaluator": ("towers", "data"),
    "tracker": ("run", "kept"),
}  # fmt: skip
"""What each is called with, by place; views are a tuple."""
FACTS = ("title", "marker", "colour")  # that outside code may tell of itself
DRAWN = {
    "title": (r"[^$]+", "a text without $, which Matplotlib takes for a formula"),
    "marker": (r"[.,ov^<>12348spP*hH+xXDd|_]", "one of Matplotlib's markers of one character, such as D"),
    "colour": (r"#[0-9a-fA-F]{6}", "a colour such as #882255"),
}
"""What they may be, and in words."""
MARKERS = "*DhH<>8d"
COLOURS = ("#882255", "#44AA99", "#999933", "#332288", "#AA4499", "#117733")
_recorded: dict[str, Card] = {}


def is_outside(name: str) -> bool:
    """Whether the name is that of code outside of this package."""
    return ":" in name


def short(name: str) -> str:
    """Return the attribute in an outside name; another name as it is."""
    return name.rpartition(":")[2]


def load(kind: str, name: str) -> Any:
    """Return the code that a name stands for. UserError where there is none, or where it cannot be imported."""
    table = KINDS[kind]
    if name not in table and not is_outside(name):
        near = difflib.get_close_matches(name, table, 1)
        meant = f"; did you mean {near[0]}?" if near else "."
        known = f"There are {', '.join(map(repr, table))}; one" if table else "One"
        raise UserError(f"there is no {kind} '{name}'{meant} {known} of your own is named MODULE:NAME.")
    if name in table:
        module, _, attribute = table[name].code.partition(":")
        return getattr(importlib.import_module(module), attribute)
    found, file = imported(kind, name), source(name)
    if kind in CALLED:
        said = f", in {file.file}," if file and not callable(found) else ""
        check_call(f"the {kind} {name}{said}", found, *CALLED[kind])
    return found


def check(kind: str, name: str) -> None:
    """UserError where there is no such thing: the name is not in the table, and cannot be imported.

    Or where it needs what is not installed.
    """
    if name not in KINDS[kind]:
        load(kind, name)
    elif missing := [module for module in KINDS[kind][name].needs if not _is_installed(module)]:
        raise UserError(f"the {kind} {name} needs {' and '.join(missing)}: pip install 'fastbd[{name}]'.")


def _is_installed(module: str) -> bool:
    """Return whether a module can be imported; a folder of that name, as wandb makes, is none."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def chosen(config: Any) -> list[tuple[str, str]]:
    """Return (kind, name) of all that a verb's flags choose by name."""
    flags = ((flag.choice, getattr(config, name)) for name, flag in flags_of(type(config)).items() if flag.choice)
    named = ((kind, each) for kind, name in flags for each in (name if isinstance(name, tuple) else (name,)))
    return [(kind, name) for kind, name in named if name not in (None, "none")]


def check_chosen(config: Any) -> None:
    """UserError where a flag names what is not there, or what this process has imported before it was edited."""
    for kind, name in chosen(config):
        check(kind, name)
        if is_outside(name):
            check_unedited(name)


def card(kind: str, name: str) -> Card:
    """Return the card of a thing that can be imported. UserError where it cannot."""
    if name in KINDS[kind]:
        return KINDS[kind][name]
    found = load(kind, name)
    told = {fact: getattr(found, fact, None) for fact in FACTS}
    for fact, value in told.items():
        if value is not None and not _can_be_drawn(fact, value):
            raise UserError(f"the {kind} {name} has the {fact} {value!r}: give {DRAWN[fact][1]}.")
    return _outside(name, told, _checked_settings(name, getattr(found, "Settings", None)))


def _outside(name: str, told: Mapping[str, Any], settings: type | None = None) -> Card:
    """Return the card of an outside thing, with what it does not tell drawn from its name."""
    number = zlib.crc32(name.encode())
    said = {fact: value for fact, value in told.items() if fact in FACTS and _can_be_drawn(fact, value)}
    return Card(
        code=name,
        settings=settings,
        title=said.get("title", name),
        marker=said.get("marker", MARKERS[number % len(MARKERS)]),
        colour=said.get("colour", COLOURS[number % len(COLOURS)]),
    )


def _can_be_drawn(fact: str, value: Any) -> bool:
    """Return whether a report can show what outside code, or a run folder, says of itself."""
    return isinstance(value, str) and bool(re.fullmatch(DRAWN[fact][0], value))


def _checked_settings(name: str, settings: Any) -> type | None:
    if settings is None:
        return None
    made = getattr(settings, "__dataclass_params__", None)
    if not isinstance(settings, type) or made is None or not made.frozen:
        raise UserError(f"the Settings of {name} hold its flags: make them a class with @dataclass(frozen=True).")
    try:
        hints = types_of(settings)
    except (NameError, TypeError) as error:  # annotations may be texts
        raise UserError(f"the Settings of {name} have a type that is not there ({error}): import it.") from None
    for field in dataclasses.fields(settings):
        _check_setting(f"the Settings of {name}", field, hints[field.name])
    return settings


def _check_setting(where: str, field: dataclasses.Field, hint: Any) -> None:
    """Raise a UserError where the field cannot be a flag, whose value config.json records."""
    made = field.default_factory
    default = field.default if made is dataclasses.MISSING else made()
    if default is dataclasses.MISSING:
        raise UserError(f"{where} have no default for '{field.name}': give one.")
    if not field.init:
        raise UserError(
            f"{where} have the field '{field.name}' with init=False, which no flag could set: leave that out."
        )
    if not is_flag_type(hint):
        raise UserError(
            f"{where} have the field '{field.name}' of type {inspect.formatannotation(hint)}, which no flag can have: "
            "make it int, float, bool, str, Path, a Literal, a tuple such as tuple[int, ...], or one of these or None."
        )
    try:
        typed(hint, default)
    except TypeError as error:
        raise UserError(f"{where} have the default {default!r:.80} for '{field.name}': it must be {error}.") from None


def recorded(named: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return what a run folder keeps of the outside ones of {name: kind}: what reports need, and which code they were.

    Reports do not import that code.
    """
    found = {}
    for name, kind in named.items():
        if is_outside(name):
            own, file = card(kind, name), source(name)
            found[name] = {fact: getattr(own, fact) for fact in FACTS} | ({"sha256": file.sha256} if file else {})
    return found


def remember(told: Mapping[str, Mapping[str, str]]) -> None:
    """Take over what a run folder has recorded of outside things."""
    _recorded.update({name: _outside(name, known) for name, known in told.items()})


def facts(kind: str, name: str) -> Card:
    """Return the card as reports have it, without importing: of the table, of a run folder, or drawn from the name."""
    if is_outside(name):
        return _recorded.get(name) or _outside(name, {})
    return KINDS[kind].get(name) or Card(title=name, marker="D", colour="#7F7F7F")


def owners(kind: str, flag: str) -> list[str]:
    """Return the names in a table that have a flag of their own."""
    with_flags = ((name, c.settings) for name, c in KINDS[kind].items() if c.settings)
    return [name for name, settings in with_flags if flag in {f.name for f in dataclasses.fields(settings)}]
