"""``tp-hf-config verify``: load and run a folder in a fresh process."""

from __future__ import annotations

import argparse

from .arguments import UsageError, add_folder, path
from .outcome import DONE, FAILED, Outcome

HELP = "load and run a folder in a fresh process, and compare it with another"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_folder(parser)
    parser.add_argument(
        "other",
        metavar="OTHER",
        nargs="?",
        type=path,
        help="a folder to compare it with: both run on the same made-up inputs",
    )
    parser.add_argument("--against", metavar="OTHER", type=path, help="the same, by name")


def check(options: argparse.Namespace) -> None:
    """Raise if one of the folders is not a model folder.

    Raises:
        UsageError: the user gave two folders to compare with.
    """
    from ..checkpoint.folder import check_model_folder

    if options.other is not None and options.against is not None:
        raise UsageError(
            f"OTHER and --against name the same: say it once: verify {options.folder} "
            f"{options.other}"
        )
    for folder in (options.folder, options.other, options.against):
        if folder is not None:
            check_model_folder(folder)


def run(options: argparse.Namespace) -> Outcome:
    """Verify the folder; exit code 0: it loads, runs and computes the same; 1: it does not."""
    from ..checkpoint.verify import verify_checkpoint

    report = verify_checkpoint(
        options.folder,
        options.other or options.against,
        trust_remote_code=options.trust_remote_code,
    )
    return Outcome(DONE if report.same else FAILED, str(report), report.to_dict())
