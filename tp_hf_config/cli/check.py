"""``tp-hf-config check``: compare a folder's config with its weights."""

from __future__ import annotations

import argparse

from .arguments import add_folder
from .outcome import DONE, FAILED, UNKNOWN, Outcome

HELP = "compare a folder's config.json with its weights, without loading them"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_folder(parser)
    parser.set_defaults(refused=UNKNOWN)  # what is refused is not judged


def check(options: argparse.Namespace) -> None:
    """Raise if the folder is not a model folder."""
    from ..checkpoint.folder import check_model_folder

    check_model_folder(options.folder)


def run(options: argparse.Namespace) -> Outcome:
    """Check the folder; the exit code is 0 if it is sound, 1 if it is not, 2 if that is unknown."""
    from ..checkpoint.check import check_checkpoint

    report = check_checkpoint(options.folder, trust_remote_code=options.trust_remote_code)
    code = {True: DONE, False: FAILED, None: UNKNOWN}[report.sound]
    return Outcome(code, str(report), report.to_dict())
