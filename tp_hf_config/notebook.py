"""Plans, widths and reports in a notebook: HTML where shown alone, else one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

Rows = Sequence[Sequence[object]]
_LEFT = ' style="text-align: left"'  # notebooks set numbers and text flush right


def page(title: str, *parts: str) -> str:
    """A title and what :func:`table`, :func:`lines` and :func:`verbatim` made, below each other."""
    return "".join((f"<p><b>{escape(title)}</b></p>", *parts))


def table(head: Sequence[str], rows: Rows) -> str:
    """A table with one row of column names; empty where it has no other row."""
    if not rows:
        return ""
    above = _row("th", head)
    below = "".join(_row("td", row) for row in rows)
    return f"<table><thead>{above}</thead><tbody>{below}</tbody></table>"


def lines(texts: Iterable[str]) -> str:
    """Lines of text, each a paragraph."""
    return "".join(f"<p>{escape(text.strip())}</p>" for text in texts)


def verbatim(text: str) -> str:
    """Text whose spaces and line ends count, such as a difference of two files."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def _row(cell: str, values: Sequence[object]) -> str:
    cells = "".join(f"<{cell}{_LEFT}>{escape(str(value))}</{cell}>" for value in values)
    return f"<tr>{cells}</tr>"


def short(shown: object, text: str, most: int = 100) -> str:
    """A ``repr``: the object's class, and the first line of a text, cut to ``most`` letters."""
    line = text.split("\n", 1)[0]
    line = line if len(line) <= most else f"{line[: most - 3]}..."
    return f"{type(shown).__name__}({line})"
