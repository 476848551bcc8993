"""The code blocks of a page of the documentation, and running them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tp_hf_config.cli.main import PROGRAM, main

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PROMPT = re.compile(r"^\$ ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: what stands behind the fence.
        code: what is in it.
        where: page and line, as tracebacks say it.
        reason: why it is not run; ``None``: it is.
    """

    language: str
    code: str
    where: str
    reason: str | None


def blocks(text: str, page: str) -> list[Block]:
    """The blocks of a page in their order."""
    return [
        Block(
            found["language"],
            found["code"],
            f"{page}, line {text.count(chr(10), 0, found.start('code'))}",
            found["reason"],
        )
        for found in _BLOCK.finditer(text)
    ]


def run_python(block: Block, names: dict[str, Any]) -> str:
    """Run a block among names that it may use and add to; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block.code, block.where, "exec"), names)
    return printed.getvalue()


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a block of the shell, each with what the page shows below it."""
    for part in _PROMPT.split(block.code)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def run_command(command: str) -> str:
    """Run ``tp-hf-config ...`` in this process; what a terminal would show."""
    program, *arguments = shlex.split(command)
    assert program == PROGRAM, command
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        main(arguments)
    return shown.getvalue()
