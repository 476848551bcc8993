"""A hook of mkdocs: the reference of the command line, from the commands' own help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from tp_hf_config.cli.commands import app
from tp_hf_config.cli.main import PROGRAM

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every command's arguments where the page asks for them."""
    return markdown.replace(MARK, "\n".join(_reference())) if MARK in markdown else markdown


def _reference() -> Iterator[str]:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        context = command.make_context(f"{PROGRAM} {name}", [], resilient_parsing=True)
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        yield f"## {name}\n\n{command.help}\n\n```text\n{usage}\n```\n"
        yield "| argument | |\n| --- | --- |"
        for parameter in command.params:
            argument, text = parameter.get_help_record(context)
            yield f"| `{argument.replace('|', ' ')}` | {text} |"
        yield ""
