"""``tp-hf-config plan``: say what pruning will give, without weights."""

from __future__ import annotations

import argparse

from .arguments import add_model, add_widths, widths_of
from .console import quiet_libraries
from .outcome import DONE, FAILED, Outcome

HELP = "say what pruning will give, from the config alone"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_widths(parser)


def check(options: argparse.Namespace) -> None:
    """Raise if the arguments for the widths contradict each other, or if there is no such model."""
    from ..pipeline.source import check_reachable, find_source

    widths_of(options)
    check_reachable(find_source(options.model, options.trust_remote_code))


def run(options: argparse.Namespace) -> Outcome:
    """Make the plan from the config; the exit code is 1 if the class refuses the widths, else 0."""
    settings = widths_of(options)
    from ..pipeline.checks import plan_for
    from ..pipeline.source import class_for, config_of, find_source

    with quiet_libraries():
        source = find_source(options.model, options.trust_remote_code)
        config = config_of(source)
        plan = plan_for(source, config, class_for(source, config), settings)
    code = DONE if plan.refusal is None else FAILED
    return Outcome(code, str(plan), plan.to_dict(), plan)
