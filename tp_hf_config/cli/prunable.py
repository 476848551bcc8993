"""``tp-hf-config prunable``: list what can be pruned, and how that is known."""

from __future__ import annotations

import argparse

from .arguments import add_model
from .console import quiet_libraries
from .outcome import DONE, Outcome

HELP = "list what can be pruned, and the proof of it"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)


def check(options: argparse.Namespace) -> None:
    """Raise if there is no such model."""
    from ..pipeline.source import check_reachable, find_source

    check_reachable(find_source(options.model, options.trust_remote_code))


def run(options: argparse.Namespace) -> Outcome:
    """List the widths of the model; exit code 0."""
    from ..graph.prunable import prunable
    from ..pipeline.source import class_for, config_of, find_source

    with quiet_libraries():
        source = find_source(options.model, options.trust_remote_code)
        config = config_of(source)
        report = prunable(config, model_class=class_for(source, config))
    return Outcome(DONE, str(report), report.to_dict(), report)
