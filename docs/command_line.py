"""A hook of mkdocs: the reference of the command line, out of the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tp_hf_config.cli.main import COMMANDS, parser_of

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every command's arguments where the page asks for them."""
    return markdown.replace(MARK, "\n".join(_reference())) if MARK in markdown else markdown


def _reference() -> Iterator[str]:
    (commands,) = (
        action.choices
        for action in parser_of()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name in COMMANDS:
        parser: argparse.ArgumentParser = commands[name]
        usage = " ".join(parser.format_usage().removeprefix("usage:").split())
        yield f"## {name}\n\n{parser.description}\n\n```text\n{_broken(usage)}\n```\n"
        yield "| argument | | default |\n| --- | --- | --- |"
        yield from (_row(action) for action in parser._actions if action.dest != "help")
        yield ""


def _broken(usage: str, width: int = 88) -> str:
    """The usage in lines; its width is not the terminal's of whoever builds the page."""
    lines = [""]
    for part in usage.replace(" [", "\n[").replace(" --out DIR", "\n--out DIR").split("\n"):
        joined = f"{lines[-1]} {part}".strip() if lines[-1].strip() else part
        if len(joined) > width:
            lines.append(f"    {part}")
        else:
            lines[-1] = joined if len(lines) == 1 else f"    {joined.strip()}"
    return "\n".join(lines)


def _row(action: argparse.Action) -> str:
    name = action.metavar or action.dest
    choices = "" if action.choices is None else f" (`{'`, `'.join(action.choices)}`)"
    if action.option_strings:
        values = "" if action.nargs == 0 else f" {name if action.choices is None else 'WHICH'}"
        both = isinstance(action, argparse.BooleanOptionalAction)  # --stream and --no-stream
        flags = action.option_strings if both else action.option_strings[-1:]
        shown = ", ".join(f"`{flag}{values}`" for flag in flags)
    else:
        shown = f"`{name}`"
    unsaid = action.default in (None, argparse.SUPPRESS) or action.nargs == 0  # a flag
    plain = unsaid or not action.option_strings
    default = "required" if action.required else "" if plain else f"`{action.default}`"
    return f"| {shown} | {action.help}{choices} | {default} |"
