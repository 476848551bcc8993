"""``tp-hf-config``: find the command, run it, print its outcome and report errors.

Exit codes: 0 done or sound; 1 refused or not sound; 2 wrong usage, or could not tell; 129 hung up;
130 Ctrl-C; 143 terminated; 141 nobody reads the output, or it cannot be written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TextIO

from .. import __version__
from ..errors import CalibrationWarning, PrunerSettingsWarning, TPHFConfigError, UnknownFieldError
from ..model.shortage import is_out_of_memory
from ..schema import dated
from .arguments import UsageError
from .console import show
from .outcome import FAILED, UNKNOWN, Outcome
from .stopping import HungUp, Terminated, asked_to_stop, stoppable

PROGRAM = "tp-hf-config"
COMMANDS = ("check", "repair", "verify", "plan", "prunable", "prune", "export", "completion")
INTERRUPTED, UNREAD = (130, "interrupted"), 141
STOPPED: dict[type[BaseException], tuple[int, str]] = {
    HungUp: (129, "hung up"),
    Terminated: (143, "terminated"),
}


def run() -> int:
    """Run one command as the main function of a process; Ctrl-C never ends in a traceback.

    Returns:
        The exit code.
    """
    try:
        return main()
    except KeyboardInterrupt:  # before the command starts, or while its outcome is shown
        code, text = INTERRUPTED
        _say(f"{PROGRAM}: {text}")
        return code
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a late Ctrl-C must not change the exit code
        _say("", end="")  # nor must what standard error could not take


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    ``argv``: the command line without the program's name; default: that of the process.

    Returns:
        The exit code.
    """
    typed = sys.argv[1:] if argv is None else argv
    _open_closed_streams()
    try:
        code = _answer(typed)
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _say(f"{PROGRAM}: the output cannot be written: {error}")
        return UNREAD
    return code


def _answer(typed: list[str]) -> int:
    """Run one command, or show its help, and print what comes of it; return the exit code."""
    try:
        options, unknown = parser_of().parse_known_args(typed)
        if unknown:
            options.parser.error(_unknown(options.parser, unknown))
    except SystemExit as ended:  # argparse has printed its message
        return ended.code if isinstance(ended.code, int) else UNKNOWN
    options.typed = shlex.join([PROGRAM, *typed])
    outcome = _run(options)
    if options.json:
        print(json.dumps(outcome.data, indent=2, default=str))
    else:
        show(outcome)
    return outcome.code


def _open_closed_streams() -> None:
    """Send nowhere what goes to a standard stream that is closed (``>&-``)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8"))


def _discard(stream: TextIO) -> None:
    """Send nowhere what a stream could not write, and all that is still to come."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str, end: str = "\n") -> None:
    """Print a text on standard error, if that takes it."""
    try:
        print(text, file=sys.stderr, end=end, flush=True)
    except OSError:  # a full disk, a terminal that is gone
        _discard(sys.stderr)


def parser_of() -> argparse.ArgumentParser:
    """Build the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Prune Hugging Face models, and keep their configs true to their weights.",
        epilog="Exit codes: 0 done or sound, 1 refused or not sound, 2 could not tell or wrong "
        "usage, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module: Any = import_module(f".{name}", __package__)
        command_parser = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[:1].upper()}{module.HELP[1:]}.",
            allow_abbrev=False,
        )
        command_parser.set_defaults(refused=FAILED)
        module.add(command_parser)
        command_parser.add_argument("--json", action="store_true", help="print JSON")
        command_parser.add_argument(
            "--debug", action="store_true", help="show the trace of an error"
        )
        command_parser.set_defaults(
            check=module.check, run=module.run, parser=command_parser, checked=False
        )
    return parser


def _unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> str:
    """Return the message for arguments that the command does not have, with a suggestion."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    if not flags:
        names = [str(a.metavar or a.dest) for a in parser._actions if not a.option_strings]
        return f"found {shlex.join(unknown)}, expected nothing after {' and '.join(names)}"
    if flags[0] in parser._option_string_actions:
        return f"{flags[0]} is typed before the command: put it behind, {parser.prog} {flags[0]}"
    near = get_close_matches(flags[0], parser._option_string_actions, 1)
    hint = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists what it takes"
    return f"there is no option {flags[0]}: {hint}"


def _run(options: argparse.Namespace) -> Outcome:
    """Run the command; turn an exception into an outcome and report it on standard error."""
    try:
        with redirect_stdout(sys.stderr), _few_warnings(), stoppable():
            options.check(options)
            options.checked = True
            outcome: Outcome = options.run(options)
            return outcome
    except BaseException as error:
        stop = asked_to_stop(error)
        if stop is not None:
            return _wrong(options, stop, *STOPPED.get(type(stop), INTERRUPTED))
        if not isinstance(error, Exception):
            raise
        return _failed(options, error)


def _failed(options: argparse.Namespace, error: Exception) -> Outcome:
    if isinstance(error, UsageError):
        _say(options.parser.format_usage(), end="")
        return _wrong(options, error, UNKNOWN, str(error))
    if isinstance(error, TPHFConfigError):
        usage = not options.checked or isinstance(error, UnknownFieldError)
        code = UNKNOWN if usage else options.refused
        return _wrong(options, error, code, str(error))
    text = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        text += (
            "\nMemory ran out. Use a machine or a --device with more; prune --stream reads weights "
            "only when they are needed."
        )
    elif not options.debug:
        text += "\nThis is not foreseen: --debug shows where it happened."
    return _wrong(options, error, UNKNOWN, text)


def _as_typed(text: str, parser: argparse.ArgumentParser) -> str:
    """Return a message with the command's options in the place of Python's arguments."""
    for action in parser._actions:
        if action.option_strings and "--no-" not in action.option_strings[-1]:
            argument = rf"\b{action.dest}=(True\b|(?=[\s,:;)]|\.?$|\.\s))"
            text = re.sub(argument, action.option_strings[-1], text)
    return text


def _wrong(options: argparse.Namespace, error: BaseException, code: int, text: str) -> Outcome:
    text = _as_typed(text, options.parser)
    if options.debug:
        _say("".join(traceback.format_exception(error)), end="")
    _say(f"{PROGRAM} {options.command}: {text}")
    return Outcome(code, "", dated({"error": text, "type": type(error).__name__, "code": code}))


@contextmanager
def _few_warnings() -> Iterator[None]:
    """Print this library's warnings as lines, and hide all others.

    The warnings of other libraries are meant for programmers who call them.
    """

    def line(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", PrunerSettingsWarning)
        warnings.simplefilter(
            "default", CalibrationWarning
        )  # not again each time a layer is ranked
        warnings.showwarning = line
        yield
