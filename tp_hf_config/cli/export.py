"""``tp-hf-config export``: write a model whose layers differ in a form that others load."""

from __future__ import annotations

import argparse

from ..pipeline.exported import FORMATS
from .arguments import add_out, count, place
from .console import quiet_libraries
from .outcome import DONE, Outcome

HELP = "write a model whose layers differ in a form that needs no code of its own"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "folder", metavar="FOLDER", type=place, help="holds a model whose layers differ"
    )
    parser.add_argument(
        "--to",
        choices=FORMATS,
        required=True,
        help="padded: the stock class, every layer padded with zeros to the widest; decilm: a "
        "Llama whose layers differ, for vLLM; gguf: the same for llama.cpp, with the tokenizer; "
        "stock classes too",
    )
    add_out(parser)
    parser.add_argument(
        "--multiple-of",
        metavar="N",
        type=count,
        help="pad to multiples of this; heads stay whole; decilm: 256, for engines that read "
        "widths as ratios",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python file in the folder, from which its layers are built",
    )


def check(options: argparse.Namespace) -> None:
    """Raise if the folder is not a model folder, or the new folder cannot be written to."""
    from ..pipeline.output import check_target
    from ..pipeline.source import check_reachable, find_source

    source = find_source(options.folder, options.trust_remote_code)
    check_reachable(source)
    check_target(options.out, source=source.folder, overwrite=options.overwrite)


def run(options: argparse.Namespace) -> Outcome:
    """Export the model; exit code 0."""
    from ..pipeline.export import export

    with quiet_libraries():
        exported = export(
            options.folder,
            options.out,
            to=options.to,
            multiple_of=options.multiple_of,
            overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code,
        )
    return Outcome(DONE, str(exported), exported.to_dict())
