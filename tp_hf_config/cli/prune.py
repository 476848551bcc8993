"""``tp-hf-config prune``: read a model, prune it and write the result."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .arguments import (
    UsageError,
    add_model,
    add_out,
    add_widths,
    count,
    names_no_width,
    natural,
    path,
    widths_of,
)
from .console import progress, quiet_libraries
from .outcome import DONE, Outcome

if TYPE_CHECKING:
    from ..pipeline.job import Job

HELP = "prune a model and write it, once it is proved to load again"
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "mlu", "musa", "xla")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_out(parser)
    what = add_widths(parser)
    what.add_argument(
        "--ranking",
        choices=("local", "global", "isomorphic"),
        default="local",
        help="which units are ranked together: those of each layer alone, of all layers "
        "(Torch-Pruning's global_pruning) or of layers of one structure (isomorphic); the last two "
        "with --layers differ",
    )
    what.add_argument(
        "--allocate",
        action="store_true",
        help="find the width of every layer for --target-params: each is cut and refitted alone, "
        "the model's answers on the text are compared, and what it misses least goes; layers "
        "differ then",
    )
    what.add_argument(
        "--drop-layers",
        metavar="[LIST=]N",
        type=layers,
        help="drop the layers that change least on the calibration text, before widths are "
        "pruned; of a model with several lists of layers, say which: decoder=2",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--importance",
        choices=("wanda", "activation", "flap", "obs", "magnitude", "taylor", "random"),
        help="what goes first; default: wanda for a causal language model, and for other models "
        "with a --calibration file; else magnitude",
    )
    how.add_argument(
        "--calibration",
        metavar="FILE|own",
        type=calibration,
        help="plain text to run the model on, or what a causal language model writes itself; "
        "default for those: a text that comes with tp-hf-config",
    )
    how.add_argument(
        "--tokens",
        metavar="N",
        type=count,
        help="how many tokens of that text the model is measured on; default: 12,288, as far as "
        "the text goes",
    )
    how.add_argument(
        "--no-compensate",
        action="store_false",
        dest="compensate",
        help="cut only: do not refit the weights that read what is pruned",
    )
    how.add_argument(
        "--recover",
        metavar="N",
        type=natural,
        default=0,
        help="updates of distillation from the unpruned model, spread over the steps",
    )
    how.add_argument(
        "--device", metavar="D", type=device, default="cpu", help="where to compute (cpu, cuda)"
    )
    how.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "float64"),
        help="of the weights; default: as they are stored, float32 from a GGUF file",
    )
    how.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="put weights that are cut into mapped files beside --out, which the system pages; "
        "default: where the model would take more than half of the free memory",
    )
    how.add_argument("--seed", metavar="N", type=natural, default=0, help="of all that is random")
    how.add_argument(
        "--max-shard-size", metavar="S", type=size, help="of each weight file, such as 5GB"
    )


def check(options: argparse.Namespace) -> None:
    """Raise if a path is unusable, arguments contradict each other, or there is no such model."""
    from ..pipeline.job import calibration_text, check_job
    from ..pipeline.source import check_reachable

    job = _job(options)
    check_job(job)
    if isinstance(job.calibration, Path) and not job.calibration.expanduser().is_fifo():
        calibration_text(job)  # a pipe can be read once
    check_reachable(job.source)


def run(options: argparse.Namespace) -> Outcome:
    """Prune the model and write it; exit code 0."""
    from ..pipeline.prune import prune_checkpoint

    with quiet_libraries(), progress() as shown:
        pruned = prune_checkpoint(_job(options), shown)
    return Outcome(DONE, str(pruned), pruned.to_dict())


def _job(options: argparse.Namespace) -> Job:
    """Return the job that the options of its fields' names describe."""
    from ..pipeline.job import Job
    from ..pipeline.source import find_source

    reason = _contradiction(options)
    if reason is not None:
        raise UsageError(reason)
    widths = widths_of(options)
    if options.allocate:
        widths["layers"] = "differ"
    same = {part.name for part in fields(Job)} & vars(options).keys()
    given = {name: getattr(options, name) for name in same}
    given["drop_from"], given["drop_layers"] = options.drop_layers or (None, 0)
    source = find_source(options.model, options.trust_remote_code)
    return Job(**{**given, "source": source, "widths": widths, "command": options.typed})


def _contradiction(options: argparse.Namespace) -> str | None:
    """Return why the arguments do not fit together, or ``None``."""
    target, ranking = options.target_params, options.ranking
    if options.allocate:
        decided = {
            "--pruning-ratio": options.pruning_ratio,
            "--ratios": options.ratios,
            "--head-pruning-ratio": options.head_pruning_ratio,
            "--gqa": options.gqa,
            "--max-pruning-ratio": options.max_pruning_ratio,
            f"--ranking {ranking}": ranking != "local",
            "--layers uniform": options.layers == "uniform",
            "--no-compensate": not options.compensate,
        }
        given = [name for name, value in decided.items() if value]
        if given:
            return f"--allocate finds the width of every layer, and refits: leave {given[0]} out"
        if target is None:
            return "--allocate finds widths for a size: add --target-params 0.8"
    elif ranking != "local" and target is not None:
        return (
            f"--target-params finds the ratio at which all layers lose the same, and --ranking "
            f"{ranking} gives each its own: say --pruning-ratio 0.2, or --allocate for --ranking"
        )
    elif ranking != "local" and names_no_width(options):
        return f"--ranking {ranking} says which units go, not how many: add --pruning-ratio 0.2"
    return None


def calibration(text: str) -> Path | Literal["own"]:
    """Parse the path of a text file, or the word ``own``; a file of this name is ``./own``."""
    return "own" if text == "own" else path(text)


def layers(text: str) -> tuple[str | None, int]:
    """Parse how many layers to drop, and from which list of layers: ``2``, ``decoder=2``."""
    name, _, number = text.rpartition("=")
    return name.strip() or None, count(number.strip())


def device(text: str) -> str:
    """Parse torch's name of a device; whether this machine has the device is checked later."""
    if not re.fullmatch(rf"({'|'.join(_DEVICES)})(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a device such as cpu, cuda or cuda:1")
    return text


def size(text: str) -> str:
    """Parse a file size such as ``5GB`` into the form that ``save_pretrained`` takes."""
    if not re.fullmatch(r"[1-9]\d*[KMG]B", text.upper()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500MB or 5GB")
    return text.upper()
