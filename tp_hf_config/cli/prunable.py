"""``tp-hf-config prunable``: list what can be pruned, and how that is known."""

from __future__ import annotations

import argparse

from .arguments import add_model, check_model, read_config
from .console import quiet_libraries
from .outcome import DONE, Outcome

HELP = "list what can be pruned, and the proof of it"
check = check_model


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)


def run(options: argparse.Namespace) -> Outcome:
    """List the widths of the model; exit code 0."""
    from ..graph.prunable import prunable

    with quiet_libraries():
        _, config, model_class = read_config(options)
        report = prunable(config, model_class=model_class)
    return Outcome(DONE, str(report), report.to_dict(), report)
