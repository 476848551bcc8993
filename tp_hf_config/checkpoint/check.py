"""Compare a folder's config.json with its weights, from the headers of the weights files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..model.build import Refusal
from ..model.surroundings import quiet_transformers
from .assess import Assessment, assess
from .building import Classes, Unknown, classes_of, said_too_large, too_large
from .causes import of_misplaced, of_solution, of_unsolved
from .folder import Config, Weights, existing, read_config, read_weights
from .heads import untold
from .loading import MAJOR
from .reports import Cause, CheckReport
from .rotary import for_transformers_4
from .solving import Solution, Task, Unsolved, learned, solution
from .ties import apart
from .words import and_more, short


@dataclass(frozen=True)
class Folder:
    """A folder that was read.

    Attributes:
        path: the folder.
        config: what config.json says.
        weights: what the headers of the weights files say.
        classes: the classes of the model, or the reason (a string) why they are not known.
    """

    path: Path
    config: Config
    weights: Weights
    classes: Classes | str


@dataclass(frozen=True)
class Known:
    """A folder that can be solved: its config, weights and classes are known.

    Attributes:
        path: the folder.
        data: config.json.
        weights: what the headers of the weights files say; they have no fault.
        classes: the classes of the model.
    """

    path: Path
    data: dict[str, Any]
    weights: Weights
    classes: Classes


def check_checkpoint(
    folder: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> CheckReport:
    """Compare a folder's config with its weights; load no weights and write nothing.

    The class that config.json names is built without data. Transformers' own loading code matches
    it with the tensors in the safetensors headers (or in a ``.bin`` file's metadata). Data are read
    only of tensors that the config ties, and only samples.

    Args:
        folder: a folder with config.json and weights.
        trust_remote_code: run the folder's own code if its class needs it.

    Returns:
        A report that says whether the folder is sound (``None``: could not tell) and, if not, why:
        one cause for all tensors that share it.

    Raises:
        CheckpointError: the folder, its config.json or its weights do not exist or cannot be read,
            or the class is code in the folder and ``trust_remote_code`` is not set.
    """
    read = read_folder(Path(folder), trust_remote_code)
    report = checked_alone(read)
    if not report.sound or isinstance(read.classes, str):
        return report
    with quiet_transformers():
        field_map = learned(read.classes, read.config.data or {})
        open_heads = () if isinstance(field_map, Refusal) else tuple(untold(field_map))
    return replace(
        report,
        undecided=tuple(name for heads in open_heads for name in heads.names),
        notes=(*report.notes, *map(str, open_heads)),
    )


def checked_alone(read: Folder) -> CheckReport:
    """Return the report on a folder, without looking for head counts that no shape shows."""
    if isinstance(read.classes, str) or read.weights.unsure or read.config.unsure:
        return _untold(read)
    return _told(read, read.classes)


def read_folder(path: Path, trust_remote_code: bool) -> Folder:
    """Read a folder's config and the headers of its weights, and find its classes.

    Raises:
        CheckpointError: as :func:`check_checkpoint`.
    """
    try:
        existing(path)
        config, weights = read_config(path), read_weights(path)
    except (OSError, ValueError) as error:  # no permission; a name that no file can have
        raise CheckpointError(f"{short(path)} cannot be read: {short(error)}") from error
    if config.data is None or config.unsure is not None:
        return Folder(path, config, weights, config.unsure or "config.json cannot be read")
    if "quantization_config" in config.data:
        why = "the weights are quantised (quantization_config), and packed shapes say no widths"
        return Folder(path, config, weights, why)
    try:
        classes = classes_of(config.data, path, len(weights.tensors), trust_remote_code)
    except (ImportError, RuntimeError) as error:  # a class whose libraries are not installed
        classes = Unknown(f"the class cannot be loaded: {short(error)}")
    return Folder(
        path, config, weights, classes.reason if isinstance(classes, Unknown) else classes
    )


def _untold(read: Folder) -> CheckReport:
    """Return the report on a folder whose class is not known or which cannot be judged.

    It holds the faults of the files or, if there are none, the reason (``why_not``).
    """
    causes = tuple(_faults(read))
    why_not = None
    if not causes:
        unsure = read.weights.unsure or read.config.unsure
        why_not = unsure or (read.classes if isinstance(read.classes, str) else None)
    return replace(_report(read), sound=False if causes else None, causes=causes, why_not=why_not)


def _faults(read: Folder) -> Iterator[Cause]:
    """Yield a cause for each fault of config.json and of the weights files."""
    if read.config.fault is not None:
        yield Cause("config", read.config.fault)
    for fault in read.weights.faults:
        yield Cause("files", fault)


def _report(read: Folder) -> CheckReport:
    """Return a report without a verdict: the class, and what the weights files hold."""
    classes = read.classes if isinstance(read.classes, Classes) else None
    return CheckReport(
        folder=str(read.path),
        model=classes.model.__name__ if classes else None,
        sound=None,
        notes=(classes.note,) if classes and classes.note else (),
        files=read.weights.files,
        tensors=len(read.weights.tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in read.weights.tensors.values()),
    )


def _told(read: Folder, classes: Classes) -> CheckReport:
    """Return the report on a folder whose class is known."""
    report, faults = _report(read), tuple(_faults(read))
    data: dict[str, Any] = read.config.data or {}
    if not read.weights.complete and not read.weights.tensors:
        return replace(report, sound=False, causes=faults)
    if too_large(data, read.weights.tensors):
        return _absurd(report, faults, read, classes)
    assessment = assess(classes, data, read.weights.tensors)
    if isinstance(assessment, Assessment) and assessment.unused:
        listed = f"{short(assessment.unused[0])}{and_more(assessment.unused)}"
        report = replace(report, notes=(*report.notes, f"not used by this class: {listed}"))
    if isinstance(assessment, Assessment) and assessment.fits:
        report = _with_ties(report, read, assessment, classes)
        rotary = for_transformers_4(classes, data)
        alone = () if rotary.alone is None else (rotary.alone,)
        report = replace(report, notes=(*report.notes, *alone, *rotary.left))
        return replace(
            report, sound=not (faults or report.causes), causes=(*faults, *report.causes)
        )
    if not read.weights.complete:
        return replace(report, sound=False, causes=(*faults, *_partly(assessment)))
    solved = solution(Task(classes, data, read.weights.tensors))
    return _explained(report, faults, assessment, solved, classes)


def _with_ties(
    report: CheckReport, read: Folder, found: Assessment, classes: Classes
) -> CheckReport:
    """Add a note or a cause to the report if tensors that the config ties hold different numbers.

    Transformers 5 leaves such tensors apart, with a warning: the report gets a note. Transformers 4
    drops one of them: the report gets a cause.
    """
    names = apart(read.path, found, read.weights.tensors, classes.model.base_model_prefix)
    if names is None:
        return report
    text = f"the config ties {names[0]} and {names[1]}, which hold different numbers"
    if MAJOR >= 5:
        text = f"{text}: Transformers leaves them apart; repair says so in the config"
        return replace(report, notes=(*report.notes, text))
    return replace(report, causes=(Cause("field", text, tensors=names),))


def _absurd(
    report: CheckReport, faults: tuple[Cause, ...], read: Folder, classes: Classes
) -> CheckReport:
    """Return the report on a config with numbers too large to build the class from it.

    Without a solution, ``why_not`` says which number is too large.
    """
    data, tensors = read.config.data or {}, read.weights.tensors
    solved = solution(Task(classes, data, tensors))
    if isinstance(solved, Solution):
        return replace(report, sound=False, causes=(*faults, *of_solution(solved)))
    text = said_too_large(too_large(data, tensors), tensors)
    sound = False if faults else None
    return replace(report, sound=sound, causes=faults, why_not=f"{text}: not built")


def _partly(found: Assessment | Refusal) -> Iterator[Cause]:
    """Yield the class's refusal, if any: all that is known while some weights are missing."""
    if isinstance(found, Refusal):
        yield Cause("config", f"the class refuses config.json: {found.reason}")


def _explained(
    report: CheckReport,
    faults: tuple[Cause, ...],
    found: Assessment | Refusal,
    solved: Solution | Unsolved,
    classes: Classes,
) -> CheckReport:
    """Return the report on a config that does not fit, with the causes that solving found.

    Args:
        report: the report so far.
        faults: the faults of the files.
        found: how the tensors load with the folder's own config, or the class's refusal of it.
        solved: the config that fits the weights, or why none is known.
        classes: the classes of the folder.
    """
    causes = list(faults)
    name = classes.config.__name__
    if isinstance(found, Refusal):
        causes.append(Cause("config", f"{name} refuses config.json: {found.reason}"))
    if isinstance(solved, Solution):
        causes += of_solution(solved)
        undecided: tuple[str, ...] = solved.undecided
        return replace(report, sound=False, causes=tuple(causes), undecided=undecided)
    if isinstance(found, Assessment):
        unsolved_causes = list(of_unsolved(solved, found, classes))
        causes += unsolved_causes or list(of_misplaced(found, classes))
        causes += [] if len(causes) > len(faults) else [Cause("config", solved.reason)]
    return replace(report, sound=False, causes=tuple(causes), candidates=solved.candidates)


def checked(folder: Path, trust_remote_code: bool) -> Known:
    """Return the folder if it can be solved: its classes are known and no file has a fault.

    Raises:
        CheckpointError: the folder cannot be solved; the message says why.
    """
    read = read_folder(folder, trust_remote_code)
    fault = read.config.fault or next(iter(read.weights.faults), None)
    if fault is not None:
        raise CheckpointError(
            f"{folder}: {fault}. No config mends that: get the file anew, or correct it by hand."
        )
    unsure = read.weights.unsure or read.classes
    if isinstance(unsure, str) or isinstance(read.classes, str) or read.config.data is None:
        raise CheckpointError(f"{folder}: {unsure}.")
    return Known(folder, read.config.data, read.weights, read.classes)
