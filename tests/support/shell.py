"""The shell command, run in this process."""

from __future__ import annotations

import io
from typing import Any

from tp_hf_config.cli.main import main


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shell(capsys: Any, *typed: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    code = main([str(word) for word in typed])
    return (code, *capsys.readouterr())
