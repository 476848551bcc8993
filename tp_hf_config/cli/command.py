"""Run a command: its report becomes text or JSON, an exception a message and an exit code."""

from __future__ import annotations

import json
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand

from ..errors import CalibrationWarning, PrunerSettingsWarning, TPHFConfigError, UnknownFieldError
from ..model.shortage import is_out_of_memory
from ..reports import dated
from .output import DONE, FAILED, INTERRUPTED, PROGRAM, UNKNOWN, say

UsageError: Any = typer.BadParameter.__base__  # click's; new versions have a copy of click
Outcome = tuple[str, int]  # what a command prints on standard output, and its exit code
_dumps = partial(json.dumps, indent=2, default=str)
_NO_MEMORY = "Memory ran out. Use a machine or a --device with more memory, or prune with --stream."
_UNFORESEEN = "This error was not expected: --debug shows where it happened."


class CouldNotTellError(Exception):
    """The library refused in a place where that means exit code 2; its error is the cause."""


@contextmanager
def could_not_tell() -> Iterator[None]:
    """End the command with code 2 (wrong usage, or could not tell) if the library refuses."""
    try:
        yield
    except TPHFConfigError as error:
        raise CouldNotTellError from error


def outcome_of(app: typer.Typer, typed: list[str]) -> Outcome:
    group = typer.main.get_command(app)
    try:
        found = group.main(typed, PROGRAM, standalone_mode=False, obj=typed)
    except UsageError as error:
        return _wrong_usage(error, error.ctx)
    return found if isinstance(found, tuple) else ("", found or DONE)  # --help, --version


class Command(TyperCommand):
    """A command whose function returns a report and an exit code."""

    def invoke(self, ctx: Any) -> Outcome:
        try:
            with redirect_stdout(sys.stderr), _few_warnings():  # standard output is for the report
                report, code = super().invoke(ctx)
        except KeyboardInterrupt as error:
            return _failed(ctx, error, INTERRUPTED, "interrupted")
        except UsageError as error:
            return _wrong_usage(error, ctx)
        except CouldNotTellError as error:
            return _failed(ctx, error.__cause__ or error, UNKNOWN, str(error.__cause__))
        except TPHFConfigError as error:
            code = UNKNOWN if isinstance(error, UnknownFieldError) else FAILED
            return _failed(ctx, error, code, str(error))
        except Exception as error:
            hint = _NO_MEMORY if is_out_of_memory(error) else _UNFORESEEN
            return _failed(ctx, error, UNKNOWN, f"{type(error).__name__}: {error}\n{hint}")
        return _dumps(report.to_dict()) if ctx.params["json"] else str(report), code


def _wrong_usage(error: Any, ctx: Any) -> Outcome:
    say(f"{ctx.get_usage()}\nTry '{ctx.command_path} --help' for help.\n")
    return _failed(ctx, error, UNKNOWN, error.format_message())


def _failed(ctx: Any, error: BaseException, code: int, text: str) -> Outcome:
    for parameter in ctx.command.params:  # Python's arguments become options
        if parameter.opts[0].startswith("--"):
            argument = rf"\b{parameter.name}=(True\b|(?=[\s,:;)]|\.?$|\.\s))"
            text = re.sub(argument, parameter.opts[0], text)
    if ctx.params.get("debug"):
        say("".join(traceback.format_exception(error)))
    say(f"{ctx.command_path}: {text}")
    data = dated({"error": text, "type": type(error).__name__, "code": code})
    return _dumps(data) if ctx.params.get("json") else "", code


@contextmanager
def _few_warnings() -> Iterator[None]:
    """Print this library's warnings as lines; hide those of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", PrunerSettingsWarning)
        warnings.simplefilter("default", CalibrationWarning)  # once, not for every ranked layer
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        yield
