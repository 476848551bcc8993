"""The commands: each is a function whose signature is its arguments, and which returns a report.

The report becomes text or JSON, an exception a message and an exit code. A command imports torch
and Transformers inside its function, after the checks that need neither.
"""

from __future__ import annotations

import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Context, Exit, Option, Typer, echo
from typer.core import TyperCommand
from typer.main import get_command

from .. import __version__
from ..checkpoint.folder import check_model_folder
from ..errors import CalibrationWarning, PrunerSettingsWarning, TPHFConfigError, UnknownFieldError
from ..model.surroundings import is_out_of_memory, quiet_transformers
from ..pipeline.job import Format, Importance, Job, Ranking, calibration_text
from ..pipeline.output import check_target
from ..pipeline.source import Source, check_reachable, class_for, config_of, find_source
from ..planning.settings import Gqa
from ..reports import dated
from . import values
from .output import DONE, FAILED, INTERRUPTED, PROGRAM, UNKNOWN, say
from .values import UsageError

Outcome = tuple[str, int]  # what a command prints on standard output, and its exit code
_dumps = partial(dumps, indent=2, default=str)
_NO_MEMORY = "Memory ran out. Use a machine or a --device with more memory, or prune with --stream."
_UNFORESEEN = "This error was not expected: --debug shows where it happened."


class CouldNotTellError(Exception):
    """The library refused in a place where that means exit code 2; its error is the cause."""


@contextmanager
def could_not_tell() -> Iterator[None]:
    """End the command with code 2 (wrong usage, or could not tell) if the library refuses."""
    try:
        yield
    except TPHFConfigError as error:
        raise CouldNotTellError from error


class Command(TyperCommand):
    """A command whose function returns a report and an exit code."""

    def invoke(self, ctx: Any) -> Outcome:
        try:
            with redirect_stdout(sys.stderr), _few_warnings():  # standard output is for the report
                report, code = super().invoke(ctx)
        except KeyboardInterrupt as error:
            return _failed(ctx, error, INTERRUPTED, "interrupted")
        except UsageError as error:
            return _wrong_usage(error, ctx)
        except CouldNotTellError as error:
            return _failed(ctx, error.__cause__ or error, UNKNOWN, str(error.__cause__))
        except TPHFConfigError as error:
            code = UNKNOWN if isinstance(error, UnknownFieldError) else FAILED
            return _failed(ctx, error, code, str(error))
        except Exception as error:
            hint = _NO_MEMORY if is_out_of_memory(error) else _UNFORESEEN
            return _failed(ctx, error, UNKNOWN, f"{type(error).__name__}: {error}\n{hint}")
        return _dumps(report.to_dict()) if ctx.params["json"] else str(report), code


def _wrong_usage(error: Any, ctx: Any) -> Outcome:
    say(f"{ctx.get_usage()}\nTry '{ctx.command_path} --help' for help.\n")
    return _failed(ctx, error, UNKNOWN, error.format_message())


def _failed(ctx: Any, error: BaseException, code: int, text: str) -> Outcome:
    for parameter in ctx.command.params:  # Python's arguments become options
        if parameter.opts[0].startswith("--"):
            argument = rf"\b{parameter.name}=(True\b|(?=[\s,:;)]|\.?$|\.\s))"
            text = re.sub(argument, parameter.opts[0], text)
    if ctx.params.get("debug"):
        say("".join(traceback.format_exception(error)))
    say(f"{ctx.command_path}: {text}")
    data = dated({"error": text, "type": type(error).__name__, "code": code})
    return _dumps(data) if ctx.params.get("json") else "", code


@contextmanager
def _few_warnings() -> Iterator[None]:
    """Print this library's warnings as lines; hide those of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", PrunerSettingsWarning)
        warnings.simplefilter("default", CalibrationWarning)  # once, not for every ranked layer
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        yield


app = Typer(
    epilog="Exit codes: 0 done or sound, 1 refused or not sound, 2 wrong usage or could not tell",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # its boxes cut the names of options off
    pretty_exceptions_enable=False,
)
command = partial(app.command, cls=Command)
Answer = tuple[Any, int]  # a report, and the exit code


def _value(help: str, metavar: str, parser: Any) -> Any:
    return Option(metavar=metavar, parser=parser, help=help)


def _number(help: str, least: int = 1) -> Any:
    return Option(metavar="N", min=least, help=help)


def _place(help: str, metavar: str, parser: Any = values.path) -> Any:
    return Argument(metavar=metavar, parser=parser, help=help)


Folder = Annotated[Path, _place("a folder with config.json and the weights", "FOLDER")]
Other = Annotated[Path | None, _place("a folder to compare it with", "OTHER")]
Model = Annotated[str, _place("a folder, a GGUF file or a Hub id", "MODEL", values.place)]
Layered = Annotated[
    str, _place("a folder with a model whose layers differ", "FOLDER", values.place)
]
Out = Annotated[Path, _value("the folder to write", "DIR", values.path)]
Overwrite = Annotated[
    bool, Option("--overwrite", help="replace a model in DIR, once the new one is proved")
]
Trust = Annotated[bool, Option("--trust-remote-code", help="run the model's own Python files")]
AsJson = Annotated[bool, Option("--json", help="print JSON")]
Debug = Annotated[bool, Option("--debug", help="show the traceback of an error")]

Ratio = Annotated[float | None, _value("the share of every width to prune", "R", values.share)]
Fields = Annotated[
    Any, _value("config fields to prune: a,b; default: inner widths", "FIELDS", values.names)
]
Ratios = Annotated[Any, _value("a share for each field", "FIELD=R,...", values.ratios)]
HeadRatio = Annotated[float | None, _value("the share of heads to prune", "R", values.share)]
OfHeads = Annotated[Gqa | None, Option(help="prune query heads in each key/value group, or groups")]
PerLayer = Annotated[bool, Option("--per-layer", help="each layer may get widths of its own")]
Target = Annotated[
    float | None, _value("parameters to keep (100M), or a share (0.8)", "N", values.amount)
]
Steps = Annotated[int, _number("pruning steps")]
RoundTo = Annotated[
    int | None, _number("make widths multiples of N; default: 64, 32, 16 or 8, if near; 1: exact")
]
For = Annotated[
    str | None,
    Option(
        "--for",
        metavar="TARGET,...",
        help="make widths that tools take: gguf-k, gguf-32, w4a16, marlin, fp8, tp=2, ...",
    ),
]
MaxRatio = Annotated[
    float | None, _value("the largest share to prune in a layer", "R", values.share)
]

Together = Annotated[
    Ranking, Option(help="rank units within each layer, over all or over similar layers")
]
Allocate = Annotated[bool, Option("--allocate", help="find each layer's width for --target-params")]
Drop = Annotated[
    Any, _value("first drop the N layers of least influence, or LIST=N", "N", values.layers)
]
First = Annotated[
    Importance | None, Option(help="how units are ranked; default: auto on a text, else magnitude")
]
Text = Annotated[
    Any,
    _value(
        "plain text to run the model on, or own: a text that a causal language model writes "
        "itself; default for these models: a text that comes with tp-hf-config",
        "FILE|own",
        values.calibration,
    ),
]
OnlyCut = Annotated[bool, Option("--no-refit", help="do not refit the remaining weights")]
Dtypes = Literal["float32", "float16", "bfloat16", "float64"]
Stream = Annotated[
    bool | None,
    Option(
        help="keep pruned weights in mapped files beside --out, not in memory; default: if the "
        "model would take more than half of the free memory",
    ),
]
Shards = Annotated[str | None, _value("largest size of a weight file (5GB)", "S", values.file_size)]

Given = Annotated[Any, _value("fields no shape shows: head_dim=64", "FIELD=N,...", values.sizes)]
To = Annotated[
    Format, Option(help="padded: the stock class, with zeros; decilm: vLLM; gguf: llama.cpp")
]


MultipleOf = Annotated[
    int | None, _number("with padded: pad the widths of feed-forward layers to multiples of N")
]


def _version(asked: bool) -> None:
    if asked:
        echo(f"{PROGRAM} {__version__}")
        raise Exit


@app.callback()
def _program(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prune Hugging Face models and keep config.json correct."""


@command()
def check(
    folder: Folder, trust_remote_code: Trust = False, json: AsJson = False, debug: Debug = False
) -> Answer:
    """Compare a folder's config.json with its weights, without loading them."""
    _check_folders(folder)
    from ..checkpoint.check import check_checkpoint

    with could_not_tell():
        report = check_checkpoint(folder, trust_remote_code=trust_remote_code)
    return report, {True: DONE, False: FAILED, None: UNKNOWN}[report.sound]


@command()
def repair(
    folder: Folder,
    dry_run: Annotated[bool, Option("--dry-run", help="only show what would be written")] = False,
    given: Given = None,
    trust_remote_code: Trust = False,
    json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Write the config.json that a folder's weights need, if there is exactly one."""
    _check_folders(folder)
    from ..checkpoint.check import repair_checkpoint

    trust = {"trust_remote_code": trust_remote_code}
    return repair_checkpoint(folder, dry_run=dry_run, given=given or {}, **trust), DONE


@command()
def verify(
    folder: Folder,
    other: Other = None,
    trust_remote_code: Trust = False,
    json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Load and run a folder in a fresh process, and compare it with another."""
    _check_folders(folder, *([] if other is None else [other]))
    from ..checkpoint.verify import verify_checkpoint

    report = verify_checkpoint(folder, other, trust_remote_code=trust_remote_code)
    return report, DONE if report.same else FAILED


@command()
def plan(
    ctx: Context,
    model: Model,
    pruning_ratio: Ratio = None,
    prune: Fields = None,
    ratios: Ratios = None,
    head_pruning_ratio: HeadRatio = None,
    gqa: OfHeads = None,
    per_layer: PerLayer = False,
    target_params: Target = None,
    steps: Steps = 1,
    round_to: RoundTo = None,
    target: For = None,
    max_pruning_ratio: MaxRatio = None,
    trust_remote_code: Trust = False,
    json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Show what pruning will do, from the config alone."""
    widths = values.widths_of(ctx.params)
    source = _found(model, trust_remote_code)
    from ..pipeline.prune import plan_for

    with quiet_transformers():
        config = config_of(source)
        planned = plan_for(source, config, class_for(source, config), widths)
    return planned, DONE if planned.refusal is None else FAILED


@command()
def prunable(
    model: Model, trust_remote_code: Trust = False, json: AsJson = False, debug: Debug = False
) -> Answer:
    """List the widths that can be pruned, with the proof of each."""
    source = _found(model, trust_remote_code)
    from ..graph.prunable import prunable

    with quiet_transformers():
        config = config_of(source)
        return prunable(config, model_class=class_for(source, config)), DONE


@command()
def prune(
    ctx: Context,
    model: Model,
    out: Out,
    overwrite: Overwrite = False,
    pruning_ratio: Ratio = None,
    prune: Fields = None,
    ratios: Ratios = None,
    head_pruning_ratio: HeadRatio = None,
    gqa: OfHeads = None,
    per_layer: PerLayer = False,
    target_params: Target = None,
    steps: Steps = 1,
    round_to: RoundTo = None,
    target: For = None,
    max_pruning_ratio: MaxRatio = None,
    ranking: Together = "local",
    allocate: Allocate = False,
    drop_layers: Drop = None,
    importance: First = None,
    calibration: Text = None,
    tokens: Annotated[int | None, _number("tokens of that text to use; default: 12,288")] = None,
    no_refit: OnlyCut = False,
    recover: Annotated[int, _number("updates of distillation from the unpruned model", 0)] = 0,
    device: Annotated[str, Option(metavar="D", help="where to compute (cpu, cuda)")] = "cpu",
    dtype: Annotated[Dtypes | None, Option(help="dtype of the weights; default: as stored")] = None,
    stream: Stream = None,
    measure_speed: Annotated[
        bool, Option("--measure-speed", help="tokens per second and memory, before and after")
    ] = False,
    seed: Annotated[int, _number("random seed", 0)] = 0,
    max_shard_size: Shards = None,
    trust_remote_code: Trust = False,
    json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Prune a model, and write it once it is proved to load again."""
    given = {part.name: ctx.params[part.name] for part in fields(Job) if part.name in ctx.params}
    drop_from, dropped = drop_layers or (None, 0)
    given |= {"drop_layers": dropped, "drop_from": drop_from, "refit": not no_refit}
    given |= {"widths": values.widths_of(ctx.params), "command": shlex.join([PROGRAM, *ctx.obj])}
    job = Job(source=_found(model, trust_remote_code), **given)
    with could_not_tell():
        check_target(out, source=job.source.folder, overwrite=overwrite)
        if isinstance(calibration, Path) and not calibration.is_fifo():
            calibration_text(job)  # a pipe can be read once
    from ..pipeline.prune import prune_checkpoint

    with quiet_transformers():  # its progress bars and ours would overwrite each other
        return prune_checkpoint(job), DONE


@command()
def export(
    folder: Layered,
    to: To,
    out: Out,
    multiple_of: MultipleOf = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: AsJson = False,
    debug: Debug = False,
) -> Answer:
    """Write a model whose layers differ without code of its own, or pad any model's widths."""
    source = _found(folder, trust_remote_code)
    with could_not_tell():
        check_target(out, source=source.folder, overwrite=overwrite)
    from ..pipeline.export import export

    may: Any = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
    may |= {"multiple_of": multiple_of}
    with quiet_transformers():
        return export(folder, out, to=to, **may), DONE


def _check_folders(*places: Path) -> None:
    with could_not_tell():
        for folder in places:
            check_model_folder(folder)


def _found(model: str, trust_remote_code: bool) -> Source:
    with could_not_tell():
        source = find_source(model, trust_remote_code)
        check_reachable(source)
    return source


def outcome_of(typed: list[str]) -> Outcome:
    """Run one command."""
    group = get_command(app)
    try:
        found = group.main(typed, PROGRAM, standalone_mode=False, obj=typed)
    except UsageError as error:
        return _wrong_usage(error, error.ctx)
    return found if isinstance(found, tuple) else ("", found or DONE)  # --help, --version
