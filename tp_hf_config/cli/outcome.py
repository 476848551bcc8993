"""What a command of the shell ends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DONE, FAILED, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        code: exit code: 0 sound or done, 1 not sound or refused, 2 could not tell, or wrong usage.
        text: for people; plain text without markup.
        data: for ``--json``.
    """

    code: int
    text: str
    data: dict[str, Any]
