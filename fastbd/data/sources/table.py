"""Tables: text files with a line for each pair, and a first line that names the columns.

Fields are quoted as in RFC 4180: a field that begins with a quote ends at the next one that is not doubled, and may
hold separators and line ends. Elsewhere a quote is a character of the text. Tab-separated files are mostly written
without quoting: there a quote is always a character of the text, unless the header is quoted, or a field is in quotes
and holds doubled ones, as csv.writer and pandas write it.

What can be read in two ways is not read: within a line it is a reject, and where quotes enclose line ends the file is
refused, for then nobody knows where its rows begin.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastbd.base.errors import UserError
from fastbd.config.flags import BuildConfig
from fastbd.data.sources.item import IMAGE_SUFFIXES, Item, class_problem, image_key
from fastbd.data.sources.lines import LINE_LIMIT, TOO_LONG, numbered_lines

SEPARATORS = ("\t", ";", "|", ",")
IN_QUOTES = re.compile(r'[^"]*+(?:""[^"]*+)*+')  # up to the closing quote, or to the end
CARRIAGE_RETURN = "a carriage return within the line"
BACKSLASH = "a backslash before a quote or the end of the line"  # with some exports it escapes them


def table_items(config: BuildConfig) -> Iterator[Item]:
    """The rows of a table; UserError for a file without the columns, or whose quotes leave its rows in doubt."""
    table = _open(config)
    image, caption, class_ = table.places
    folder, width = str(config.images or config.source.parent), len(table.columns)
    for row_id, (line, fields) in enumerate(table.rows()):
        problem, name, text, class_name = None, "", "", None
        if isinstance(fields, str):
            problem = fields
        elif len(fields) != width:
            name = fields[image].strip() if image < len(fields) else ""
            problem = f"wrong number of fields: {len(fields)}, and {width} in the header"
        else:
            name = fields[image].strip()
            text = "" if caption is None else fields[caption]
            class_name = None if class_ is None else fields[class_].strip()
            problem = "empty path" if not name else None if class_name is None else class_problem(class_name)
        yield Item(row_id, name, os.path.join(folder, name), text, class_name, problem=problem, line=line)


@dataclass(frozen=True)
class _Table:
    source: Path
    separator: str
    quoted: bool  # whether a quote at the beginning of a field always encloses it
    columns: list[str]
    places: tuple[int, int | None, int | None]  # of the columns of images, captions, classes

    def rows(self) -> Iterator[tuple[int, list[str] | str]]:
        """(line where it begins, fields) of each row below the header; a string says why there are no fields."""
        lines = numbered_lines(self.source)
        next(lines)
        for number, text in lines:
            if text is None:
                yield number, TOO_LONG
            elif '"' in text:
                yield number, self._quoted_fields(number, text, lines) if self.quoted else self._tab_fields(text)
            elif text.rstrip("\r\n"):
                yield number, self._plain_fields(text)

    def _plain_fields(self, text: str) -> list[str] | str:
        """Fields of a row of one line in which quotes enclose nothing."""
        row = text.rstrip("\r\n")
        if "\r" in row:
            return CARRIAGE_RETURN
        return BACKSLASH if row.endswith("\\") else row.split(self.separator)

    def _tab_fields(self, text: str) -> list[str] | str:
        """Fields of a row of a table whose fields are in quotes only where these hold doubled ones."""
        fields = self._plain_fields(text)
        if isinstance(fields, str):
            return fields
        for place, field in enumerate(fields):
            if field.startswith('"'):
                end = _in_quotes(field, 1).end()
                if end == len(field):
                    return "a quote that is not closed"
                if end == len(field) - 1 and '""' in field:
                    fields[place] = field[1:-1].replace('""', '"')
        return fields

    def _quoted_fields(self, begin: int, text: str, lines: Iterator) -> list[str] | str:
        """Fields of the row that begins with this line; takes from `lines` those that its quotes enclose."""
        number, place, fields, problem = begin, 0, [], None
        while True:
            if text.startswith('"', place):
                field, number, text, place = self._enclosed(number, text, place + 1, lines)
            else:
                end = text.find(self.separator, place)
                field = text[place : end if end >= 0 else None].rstrip("\r\n")
                place += len(field)
                if "\r" in field:
                    problem = CARRIAGE_RETURN
                elif field.lstrip().startswith('"'):
                    problem = "a space before a quote"
                elif '\\"' in field or (end < 0 and field.endswith("\\")):
                    problem = BACKSLASH
            fields.append(field)
            if not text.startswith(self.separator, place):
                break
            place += 1
        if text[place:].strip("\r\n"):
            problem = "text after a closing quote"
        if number > begin and (problem := problem or self._in_doubt(fields)):
            raise self._astray(begin, f"closes in line {number}, and leaves {problem}")
        return problem or fields

    def _enclosed(self, number: int, text: str, place: int, lines: Iterator) -> tuple[str, int, str, int]:
        """(field, number and text of the line where it ends, place after its closing quote) of one in quotes."""
        begin, parts, size = number, [], 0
        while (match := _in_quotes(text, place)).end() == len(text):
            parts.append(match[0])
            size += len(match[0])
            number, line = next(lines, (number, None))
            if line is None or size > LINE_LIMIT:
                raise self._astray(begin, "is not closed")
            text, place = line, 0
        return "".join([*parts, match[0]]).replace('""', '"'), number, text, match.end() + 1

    def _in_doubt(self, fields: list[str]) -> str | None:
        """Why the quotes of a row of several lines may enclose other rows; None: they do not seem to."""
        if len(fields) != len(self.columns):
            return f"a row of {len(fields)} fields, and {len(self.columns)} are in the header"
        image = self.places[0]
        kind = os.path.splitext(fields[image].strip())[1].lower()
        for field in fields:
            for line in field.split("\n") if "\n" in field else ():
                parts = [part.strip(' "\r') for part in line.split(self.separator)]
                if kind and len(parts) > 1:
                    files = [part for part in parts if part.lower().endswith((kind, *IMAGE_SUFFIXES))]
                else:
                    files = [parts[image]] if len(parts) == len(fields) and " " not in parts[image] else []
                if files:
                    return f"a caption that looks like rows: it holds the file {files[0]}"
        return None

    def _astray(self, line: int, what: str) -> UserError:
        return UserError(
            f"the quote that opens in line {line} of {self.source} {what}: "
            "close it there, or put its field in quotes and double those of the text."
        )


def _in_quotes(text: str, place: int) -> re.Match[str]:
    """From `place` up to the closing quote, or to the end of the text."""
    match = IN_QUOTES.match(text, place)
    assert match is not None, "it may be empty"
    return match


def _open(config: BuildConfig) -> _Table:
    """The table with its separator: the one under which the first line names all columns that are needed."""
    source = config.source
    _, header = next(numbered_lines(source), (1, ""))
    if header is None or "\r" in header.rstrip("\r\n"):
        raise UserError(f"the first line of {source} does not end: save it with line ends of Unix or Windows.")
    header = header.rstrip("\r\n")
    given = {"tab": "\t", None: None}.get(config.separator, config.separator)
    if given and (len(given) > 1 or given in '"\r\n'):
        raise UserError(f"--separator {config.separator} is not one character, nor the word tab.")
    read = {separator: _columns(header, separator) for separator in ([given] if given else SEPARATORS)}
    fits = [separator for separator, columns in read.items() if not _missing(columns, config)]
    if len(fits) > 1:
        raise UserError(f"the first line of {source} names the columns with several separators: give --separator.")
    separator = fits[0] if fits else max(read, key=lambda separator: len(read[separator]))
    columns = read[separator]
    if missing := _missing(columns, config):
        flag, key = missing
        raise UserError(
            f"{source} has no column '{key}'; its columns are: {', '.join(columns)[:300] or 'none'}: "
            f"name one of them with {flag}, or add a first line with names if it has none."
        )
    if twice := next((column for column in columns if column and columns.count(column) > 1), None):
        raise UserError(f"{source} has two columns '{twice}': rename one.")
    image, caption = image_key(columns, config), config.caption_key or "caption"
    caption_at, class_at = (columns.index(key) if key in columns else None for key in (caption, config.class_key))
    quoted = separator != "\t" or any(name.startswith('"') for name in header.split("\t"))
    return _Table(source, separator, quoted, columns, (columns.index(image), caption_at, class_at))


def _columns(header: str, separator: str) -> list[str]:
    """Names of the columns; none where the line is not whole under this separator."""
    try:
        return [name.strip() for name in next(csv.reader([header], delimiter=separator, strict=True), [])]
    except csv.Error:
        return []


def _missing(columns: list[str], config: BuildConfig) -> tuple[str, str] | None:
    """(flag, name) of a column that is needed and not there."""
    caption = config.caption_key or (None if config.class_key else "caption")
    needed = {"--image-key": image_key(columns, config), "--class-key": config.class_key, "--caption-key": caption}
    return next(((flag, key) for flag, key in needed.items() if key and key not in columns), None)
