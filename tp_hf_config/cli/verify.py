"""``tp-hf-config verify``: a folder loaded and run in a fresh process."""

from __future__ import annotations

import argparse

from .outcome import DONE, FAILED, Outcome

HELP = "load and run a folder in a fresh process, and compare it with another"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="holds config.json and the weights")
    parser.add_argument("--against", metavar="FOLDER", help="whose outputs should be the same")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the folder's own code, if it has any"
    )


def run(options: argparse.Namespace) -> Outcome:
    """Verify the folder; exit code 0: it loads, runs and computes the same, 1: it does not."""
    from ..checkpoint.verify import verify_checkpoint

    report = verify_checkpoint(
        options.folder, options.against, trust_remote_code=options.trust_remote_code
    )
    return Outcome(DONE if report.same else FAILED, str(report), report.to_dict())
