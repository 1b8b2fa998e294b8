"""Class names and prompt templates: shipped lists by name, or text files.

A line that holds {} is a template; any other is a class, `name` or `code = name`, where the code is what the data set's
folders are called. # starts a comment.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path

from fastbd.base.errors import UserError
from fastbd.base.text import clean

SHIPPED = Path(__file__).parents[1] / "evals" / "classes"
DEFAULT_TEMPLATES = "imagenet80"


class ClassList(list):
    """Class names in the order of their labels.

    `codes`: what the data calls them, each another; `templates`: those that the same file holds, if any.
    """

    def __init__(self, names: Iterable[str], codes: Iterable[str] | None = None, templates: Iterable[str] = ()):
        super().__init__(names)
        self.codes = list(self if codes is None else codes)
        self.templates = list(templates)


def read_classes(name: str) -> ClassList:
    """A shipped list, or one of the user's. UserError where two classes have one code, or one name and no codes."""
    lines = _lines(name, "class")
    if strange := next((line for line in lines if "{}" not in line and re.search("[{}]", line)), None):
        raise UserError(f"'{strange}' in {name} is neither a class nor a template: write {{}} for the class name.")
    classes = [line.partition(" = ") for line in lines if "{}" not in line]
    if not classes:
        raise UserError(f"the class list {name} is empty: write one class a line.")
    codes = [code.strip() for code, _, _ in classes]
    code, times = Counter(codes).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"the class list {name} holds '{code}' {times} times: give each a code of its own: n02012849 = crane."
        )
    names = [name.strip() or code for code, _, name in classes]
    return ClassList(names, codes, [line for line in lines if "{}" in line])


def read_templates(name: str | None, classes: list[str] | None = None) -> list[str]:
    """Prompt templates, each with {} for the class name; without a name those of the class list, else imagenet80."""
    if name is None and (own := getattr(classes, "templates", None)):
        return own
    name = name or DEFAULT_TEMPLATES
    lines = _lines(name, "template")
    templates = [line for line in lines if "{}" in line]
    # A shipped class list may stand for its templates; in a list of the user's a line without {} is a mistake.
    if not templates or (len(templates) < len(lines) and not _shipped(name)):
        strange = next(line for line in lines if "{}" not in line)
        raise UserError(f"the template '{strange}' in {name} has no {{}} for the class name: add it.")
    return templates


def set_of(stored: Collection[str]) -> str | None:
    """The shipped class list that has exactly these codes or names; None where none or several have."""
    found = []
    for name in _shipped_with("class"):
        classes = read_classes(name)
        if set(stored) in (set(classes.codes), set(classes)) and len(stored) == len(classes):
            found.append(name)
    return found[0] if len(found) == 1 else None


def _shipped(name: str) -> Path | None:
    path = SHIPPED / f"{name}.txt"
    return path if path.is_file() else None


def _shipped_with(kind: str) -> list[str]:
    """Shipped lists that hold classes, or templates."""
    names = sorted(path.stem for path in SHIPPED.glob("*.txt"))
    return [name for name in names if any(("{}" in line) == (kind == "template") for line in _lines(name, kind))]


def _lines(name: str, kind: str) -> list[str]:
    try:
        text = (_shipped(name) or Path(name)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the {kind} list {name} cannot be read ({error}): give a text file with one {kind} a line, "
            f"or one of {', '.join(_shipped_with(kind))}."
        ) from None
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise UserError(f"the {kind} list {name} is empty: write one {kind} a line.")
    return lines


def target_index(classes: list[str], target: str) -> int:
    """Index of the one class that is called `target`, or else whose name holds that word, in whatever case.

    UserError when there is none, or more than one.
    """
    word, names = re.compile(rf"\b{re.escape(clean(target))}\b", re.IGNORECASE), list(map(clean, classes))
    found = [i for i, name in enumerate(names) if word.fullmatch(name)]
    found = found or [i for i, name in enumerate(names) if word.search(name)]
    if len(found) == 1:
        return found[0]
    listed = [classes[i] for i in found] or classes[:20]
    more = ", ..." if len(classes) > len(listed) and not found else ""
    problem = "several classes hold" if found else "no class holds"
    near = [] if found else get_close_matches(clean(target).lower(), [name.lower() for name in names], 1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(
        f"{problem} the target word '{target}'{meant}, and exactly one must: choose another target or class list; "
        f"classes: {', '.join(listed)}{more}."
    )


def labels_of(classes: list[str], stored: Collection[str]) -> dict[str, int]:
    """Label in `classes` of each stored class that has one: by code or name, or where none has, by number from 0."""
    codes = getattr(classes, "codes", classes)
    label = {name: i for i, name in enumerate(classes)} | {code: i for i, code in enumerate(codes)}
    found = {name: label[name] for name in stored if name in label}
    times = Counter(classes)
    if twice := next((name for name in found if times[name] > 1 and codes.count(name) != 1), None):
        raise UserError(f"the class list holds '{twice}' more than once, so names decide nothing: use folders by code.")
    if not found and numbered(stored) and max(map(int, stored)) < len(classes):
        return {name: int(name) for name in stored}
    return found


def numbered(stored: Collection[str]) -> bool:
    """Whether the classes are named by numbers."""
    return all(name.isdecimal() for name in stored)


def labels_in(classes: list[str], stored: list[str]) -> list[int]:
    """For each class of a data file its label in `classes`, by code, name or number; UserError where one has none."""
    labels = labels_of(classes, stored)
    if len(labels) == len(set(stored)):
        return [labels[name] for name in stored]
    strange = next(name for name in stored if name not in labels)
    if labels:
        problem = f"'{strange}' is not in the list of {len(classes)}"
        remedy = "add it to the list, or build the data with --classes and this list to leave its images out"
    else:  # by place, a list in another order would go unnoticed
        problem = f"none of them, such as '{strange}', is in the list of {len(classes)}"
        remedy = "write the names as the data has them, or lines `code = name`, such as 'n01440764 = tench'"
    raise UserError(f"the data has {len(stored)} classes, and {problem}: {remedy}.")
