"""``tp-hf-config repair``: write the config that a folder's weights need."""

from __future__ import annotations

import argparse

from .arguments import UsageError, add_folder, count, path, sizes
from .outcome import DONE, Outcome

HELP = "write the config.json that a folder's weights need, where there is exactly one"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_folder(parser)
    parser.add_argument(
        "--out", metavar="DIR", type=path, help="write a new folder, leave FOLDER as it is"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be written")
    parser.add_argument(
        "--head-dim", type=count, metavar="N", help="the size of a head, where no shape shows it"
    )
    parser.add_argument(
        "--heads",
        type=count,
        metavar="N",
        help="the number of query heads, where no shape shows it",
    )
    parser.add_argument(
        "--given",
        type=sizes,
        metavar="FIELD=N,...",
        default={},
        help="what any config fields are, where no shape shows it: text_config.head_dim=64",
    )


def check(options: argparse.Namespace) -> None:
    """Raise if the folder is not a model folder, or if the new folder cannot be made.

    Raises:
        UsageError: two arguments give one field different values.
    """
    from ..checkpoint.folder import check_model_folder
    from ..checkpoint.writing import check_target

    for name, (argument, value) in _by_name(options).items():
        given = options.given.get(name, value)
        if given != value:
            raise UsageError(
                f"{name}: {argument} says {value}, --given says {given}. Leave one of them out"
            )
    check_model_folder(options.folder)
    if options.out is not None and not options.dry_run:
        check_target(options.folder, options.out)


def run(options: argparse.Namespace) -> Outcome:
    """Repair the folder; exit code 0: it is sound now, or would be without ``--dry-run``."""
    from ..checkpoint.repair import repair_checkpoint

    report = repair_checkpoint(
        options.folder,
        out=options.out,
        dry_run=options.dry_run,
        given={**options.given, **{name: value for name, (_, value) in _by_name(options).items()}},
        trust_remote_code=options.trust_remote_code,
    )
    return Outcome(DONE, str(report), report.to_dict())


def _by_name(options: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """Return the config fields that have an argument of their own: field -> (argument, value)."""
    fields = {
        "head_dim": ("--head-dim", options.head_dim),
        "num_attention_heads": ("--heads", options.heads),
    }
    return {name: given for name, given in fields.items() if given[1] is not None}
