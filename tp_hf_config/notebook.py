"""Build what a notebook shows for plans, widths and reports: HTML pages and one-line reprs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

Rows = Sequence[Sequence[object]]
_LEFT = ' style="text-align: left"'  # notebooks align cells to the right


def page(title: str, *parts: str) -> str:
    """Return HTML with the title in bold and the parts below it.

    Args:
        title: plain text.
        parts: HTML from :func:`table`, :func:`lines` and :func:`verbatim`.
    """
    return "".join((f"<p><b>{escape(title)}</b></p>", *parts))


def report(text: str, *tables: str) -> str:
    """Return HTML with tables between the first line of a text and the others."""
    title, *rest = text.strip().split("\n")
    return page(title, *tables, lines(rest))


def table(head: Sequence[str], rows: Rows) -> str:
    """Return an HTML table with ``head`` as column names, or an empty text if there are no rows."""
    if not rows:
        return ""
    header = _row("th", head)
    body = "".join(_row("td", row) for row in rows)
    return f"<table><thead>{header}</thead><tbody>{body}</tbody></table>"


def lines(texts: Iterable[str]) -> str:
    """Return HTML with each text as one paragraph."""
    return "".join(f"<p>{escape(text.strip())}</p>" for text in texts)


def verbatim(text: str) -> str:
    """Return HTML that keeps the spaces and line ends of a text, such as a diff of two files."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def _row(cell: str, values: Sequence[object]) -> str:
    cells = "".join(f"<{cell}{_LEFT}>{escape(str(value))}</{cell}>" for value in values)
    return f"<tr>{cells}</tr>"


def short(shown: object, text: str, most: int = 100) -> str:
    """Return a ``repr``: the class of ``shown`` with the first line of ``text`` in parentheses.

    Args:
        shown: the object.
        text: what to say about it; only the first line is used.
        most: the number of characters to which the line is cut.
    """
    line = text.split("\n", 1)[0]
    line = line if len(line) <= most else f"{line[: most - 3]}..."
    return f"{type(shown).__name__}({line})"
