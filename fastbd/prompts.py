"""Class names and prompt templates: shipped lists by name, or text files with one entry a line (# starts a comment)."""

from __future__ import annotations

import re
from pathlib import Path

from fastbd.errors import UserError

SHIPPED = Path(__file__).parent / "evals" / "classes"


def read_classes(name: str) -> list[str]:
    """Class names in the order of their labels."""
    return _entries(name, "class")


def read_templates(name: str) -> list[str]:
    """Prompt templates, each with {} for the class name."""
    templates = _entries(name, "template")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the template '{template}' in {name} has no {{}} for the class name: add it.")
    return templates


def _entries(name: str, kind: str) -> list[str]:
    path = SHIPPED / f"{name}.txt"
    try:
        text = (path if path.is_file() else Path(name)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.txt")))
        raise UserError(
            f"the {kind} list {name} cannot be read ({error}): give a text file with one {kind} a line, "
            f"or one of {shipped}."
        ) from None
    entries = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not entries:
        raise UserError(f"the {kind} list {name} is empty: write one {kind} a line.")
    return entries


def target_index(classes: list[str], target: str) -> int:
    """Index of the one class whose name holds the word `target`; UserError when there is none, or more than one."""
    word = re.compile(rf"\b{re.escape(target)}\b", re.IGNORECASE)
    found = [i for i, name in enumerate(classes) if word.search(name)]
    if len(found) == 1:
        return found[0]
    listed = [classes[i] for i in found] or classes[:20]
    more = ", ..." if len(classes) > len(listed) and not found else ""
    problem = "several classes hold" if found else "no class holds"
    raise UserError(
        f"{problem} the target word '{target}', and exactly one must: choose another target or class list; "
        f"classes: {', '.join(listed)}{more}."
    )


def labels_in(classes: list[str], stored: list[str]) -> list[int]:
    """For each class of a data file its label in `classes`: by name; where all have other names, by number or place.

    Classes are often named by numbers, or by codes such as ImageNet's; half a match is a mistake and a UserError.
    """
    known = [name for name in stored if name in classes]
    if twice := next((name for name in known if classes.count(name) > 1), None):
        raise UserError(f"the class list holds '{twice}' more than once, so names decide nothing: use folders by code.")
    if len(known) == len(stored):
        return [classes.index(name) for name in stored]
    if not known and all(name.isdecimal() and int(name) < len(classes) for name in stored):
        return [int(name) for name in stored]
    if not known and len(stored) == len(classes):
        return list(range(len(classes)))
    strange = next(name for name in stored if name not in classes)
    raise UserError(
        f"the data has {len(stored)} classes, and '{strange}' is not in the list of {len(classes)}: "
        "give a class list of its own with --classes."
    )
