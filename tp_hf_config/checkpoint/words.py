"""Put names from files, field values and layer numbers into the form that messages show."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_LONGEST = 200


def printable(text: str) -> str:
    """Replace what is not printable with spaces: a name in a file could move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def short(text: object) -> str:
    """Return one printable line of at most 200 characters, and ``...`` if that cuts the text."""
    line = " ".join(printable(str(text)[: 2 * _LONGEST]).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def and_more(names: Collection[object], shown: int = 1) -> str:
    """Return how many names are not shown, such as `` (and 3 more)``; empty if all are."""
    return f" (and {len(names) - shown} more)" if len(names) > shown else ""


def number(value: Any) -> str:
    """Return a field's value as text: ``1,536``, ``true``, ``not set``."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**18 else f"about 2**{abs(value).bit_length()}"
    return short(value)


def how_to_give(name: str, value: int | None = None) -> str:
    """Return how a user says a field's value, in Python and in the shell; None: any value."""
    typed = shlex.quote(f"{name}={'N' if value is None else value}")
    return f"given={{{name!r}: {'...' if value is None else value}}} or --given {typed}"


def list_and_layer(name: str) -> tuple[str, int] | None:
    """Return the list of layers that a tensor is in and the layer's number; None: in no list."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal() and len(part) < 10 and index:
            return ".".join(parts[:index]), int(part)
    return None


def layers(names: Iterable[str]) -> str:
    """Return where tensors are (``layers 0-29``), or their names if none of them is in a layer."""
    numbers: dict[str, set[int]] = {}
    alone: list[str] = []
    for name in names:
        place = list_and_layer(name)
        if place is None:
            alone.append(name)
        else:
            numbers.setdefault(place[0], set()).add(place[1])
    kinds = [
        f"{'layer' if len(in_list) == 1 else 'layers'} {_ranges(sorted(in_list))}"
        + (f" of {short(where)}" if len(numbers) > 1 else "")
        for where, in_list in numbers.items()
    ]
    listed = [short(name) for name in alone[:2]]
    more = and_more(alone, 2)
    return " and ".join([*kinds, *([", ".join(listed) + more] if listed and not kinds else [])])


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as text, the first five ranges of them: ``0-3, 7``."""
    parts: list[list[int]] = []
    for value in numbers:
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts[:5]]
    return ", ".join(shown) + (", ..." if len(parts) > 5 else "")
