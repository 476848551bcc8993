"""The result of a shell command, with its exit codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DONE, FAILED, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Outcome:
    """The result of one command.

    Attributes:
        code: the exit code: 0 sound or done, 1 not sound or refused, 2 could not tell or wrong
            usage.
        text: plain text for people, without markup.
        data: the JSON data that ``--json`` prints.
        drawing: an object that rich prints on a terminal; ``None``: the text is printed.
    """

    code: int
    text: str
    data: dict[str, Any]
    drawing: Any = None
