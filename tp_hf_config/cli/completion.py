"""``tp-hf-config completion``: print a script with which a shell completes this command."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from ..errors import TPHFConfigError
from ..schema import dated
from .outcome import DONE, Outcome

HELP = "print a script for the shell's own completion"
_FILES = ("model", "folder", "calibration")
_FOLDERS = ("out", "against")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"), help="for which shell")


def check(options: argparse.Namespace) -> None:
    """Do nothing: the parser checks the name of the shell."""


def run(options: argparse.Namespace) -> Outcome:
    """Write the script with shtab; exit code 0.

    Raises:
        TPHFConfigError: shtab is not installed or does not know the shell.
    """
    if find_spec("shtab") is None:
        raise TPHFConfigError("completion needs shtab: pip install 'tp-hf-config[cli]'")
    import shtab

    from .main import parser_of

    if options.shell not in shtab.SUPPORTED_SHELLS:
        supported = ", ".join(shtab.SUPPORTED_SHELLS)
        raise TPHFConfigError(
            f"this shtab knows {supported}, not {options.shell}: pip install -U shtab"
        )
    parser = parser_of()
    _complete_files(parser, shtab)
    script = shtab.complete(parser, options.shell)
    return Outcome(DONE, script, dated({"shell": options.shell, "script": script}))


def _complete_files(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Let the shell complete file and folder names where an argument takes one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, shtab)
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
