"""``tp-hf-config plan``: say what pruning will give, without weights."""

from __future__ import annotations

import argparse

from .arguments import add_model, add_widths, check_model, read_config, widths_of
from .console import quiet_libraries
from .outcome import DONE, FAILED, Outcome

HELP = "say what pruning will give, from the config alone"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_widths(parser)


def check(options: argparse.Namespace) -> None:
    """Raise if the arguments for the widths contradict each other, or if there is no such model."""
    widths_of(options)
    check_model(options)


def run(options: argparse.Namespace) -> Outcome:
    """Make the plan from the config; the exit code is 1 if the class refuses the widths, else 0."""
    settings = widths_of(options)
    from ..pipeline.checks import plan_for

    with quiet_libraries():
        plan = plan_for(*read_config(options), settings)
    code = DONE if plan.refusal is None else FAILED
    return Outcome(code, str(plan), plan.to_dict(), plan)
