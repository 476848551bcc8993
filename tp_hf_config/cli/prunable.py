"""``prunable``: what can be pruned, and how that is known."""

from __future__ import annotations

import argparse

from .arguments import add_model
from .console import Drawn, quiet_libraries
from .outcome import DONE, Outcome

HELP = "list what can be pruned, and the proof of it"


def add(parser: argparse.ArgumentParser) -> None:
    """The model."""
    add_model(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse a model that is not there."""
    from ..pipeline.source import check_reachable, find_source

    check_reachable(find_source(options.model, options.trust_remote_code))


def run(options: argparse.Namespace) -> Outcome:
    """The library's table."""
    from ..offers import prunable
    from ..pipeline.source import class_for, config_of, find_source

    with quiet_libraries():
        source = find_source(options.model, options.trust_remote_code)
        config = config_of(source)
        found = prunable(config, model_class=class_for(source, config))
    return Drawn(DONE, str(found), found.to_dict(), found)
