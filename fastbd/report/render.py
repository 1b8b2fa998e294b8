"""Pages made from the templates of this folder, *.j2."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """The page that `template`, the name of a file, makes of the values.

    Every text in them is escaped, so that none of a run can become a tag; a value that the template asks for and that
    is not given raises jinja2.UndefinedError.
    """
    return _environment().get_template(template).render(values)


def embedded(png: bytes) -> str:
    """The picture as an address that holds it all, so that a page needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # --help is to answer without

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
