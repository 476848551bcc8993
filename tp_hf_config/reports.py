"""The base class of reports: text, HTML for notebooks, and JSON with the versions that made it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from textwrap import wrap
from typing import Any, ClassVar

SCHEMA_VERSION = 1  # of every written report
Rows = Sequence[Sequence[object]]
MOST_LINES = 8  # of the reports that people read after every call
_SHOWN = 200  # longest ``repr``, in characters


class Report:
    """A dataclass that prints as a title, a table and lines.

    ``to_dict`` returns its public fields, for ``json.dumps``.
    """

    most_lines: ClassVar[int | None] = None  # that ``print`` shows
    columns: ClassVar[int | None] = None  # in which lines are wrapped; tables are not

    def title(self) -> str:
        """Return the first line."""
        raise NotImplementedError

    def rows(self) -> Rows:
        """Return a table whose first row is its header; empty if there is none."""
        return ()

    def lines(self) -> Iterable[str]:
        """Return the lines below the table, the most important first."""
        return ()

    def details(self) -> Iterable[str]:
        """Return the lines that are left out first."""
        return ()

    def text(self, full: bool = False) -> str:
        """Return the lines that ``print`` shows; ``full=True``: all lines."""
        below = [
            wrap(line, self.columns, subsequent_indent="  ", break_long_words=False)
            if self.columns
            else [line]
            for several in (*self.lines(), *self.details())
            for line in several.split("\n")
        ]
        lines = [*self.title().split("\n"), *aligned(self.rows()), *chain(*below)]
        if self.most_lines and len(lines) > self.most_lines and not full:
            more = len(lines) - self.most_lines + 1
            lines[-more:] = [f"... {more} more lines: text(full=True), or --json in the shell"]
        return "\n".join(lines)

    __str__ = text

    def __repr__(self) -> str:
        return short(self, self.title())

    def _repr_html_(self) -> str:
        below = (
            f"<pre>{escape(line)}</pre>" if "\n" in line else f"<p>{escape(line.strip())}</p>"
            for line in (*self.lines(), *self.details())
        )
        return f"<p><b>{escape(self.title())}</b></p>{html_table(self.rows())}{''.join(below)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report for ``json.dumps``, with the versions that made it."""
        return dated(fields_as_json(self))


def short(shown: object, text: str) -> str:
    """Return a ``repr``: class name, and the first line of ``text`` in parentheses."""
    line = text.split("\n", 1)[0]
    line = line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
    return f"{type(shown).__name__}({line})"


def aligned(rows: Rows) -> list[str]:
    """Return a table's rows as lines of aligned columns; numbers are right-aligned."""
    columns = [[str(cell) for cell in column] for column in zip(*rows, strict=True)]
    for column in columns:
        is_number = all(set(cell) <= set("0123456789,.") for cell in column[1:])
        width = max(map(len, column))
        column[:] = (cell.rjust(width) if is_number else cell.ljust(width) for cell in column)
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def html_table(rows: Rows) -> str:
    """Return an HTML table whose first row is its header; ``""`` without other rows."""
    if len(rows) < 2:
        return ""
    head, *body = (
        "".join(f'<{tag} style="text-align: left">{escape(str(cell))}</{tag}>' for cell in row)
        for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
    )
    below = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{below}</tbody></table>"


def fields_as_json(value: Any) -> dict[str, Any]:
    """Return a dataclass's public fields for ``json.dumps``."""
    names = (part.name for part in fields(value) if not part.name.startswith("_"))
    return {name: _field(name, getattr(value, name)) for name in names}


def as_json(value: Any) -> Any:
    """Return a value that ``json.dumps`` accepts."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return fields_as_json(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN and no infinity
    return str(value) if isinstance(value, Path) else value


def _field(name: str, value: Any) -> Any:
    if name == "fields" and isinstance(value, Mapping):
        return old_and_new(value)
    if name in ("parameters", "speed") and isinstance(value, tuple):
        return dict(zip(("before", "after"), map(as_json, value), strict=True))
    return as_json(value)


def old_and_new(changes: Mapping[str, tuple[Any, Any]]) -> dict[str, dict[str, Any]]:
    """Return name -> old and new value, for ``json.dumps``."""
    return {
        name: {"old": as_json(old), "new": as_json(new)} for name, (old, new) in changes.items()
    }


def dated(data: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "versions": versions(), **data}


def versions() -> dict[str, str]:
    installed: dict[str, str] = {}
    for package in ("tp-hf-config", "torch", "transformers", "torch-pruning"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed
