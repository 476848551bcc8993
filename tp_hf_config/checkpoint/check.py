"""Compare a folder's config.json with its weights, and find the config that they need."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..arguments import Count, check_arguments
from ..errors import CheckpointError
from ..model.build import Refusal
from ..model.config_json import field_name
from ..model.files import write_whole
from .building import Classes, classes_of, quantisation, too_large
from .folder import ADAPTER, CONFIG, Config, Weights, check_exists, read_config, read_weights
from .loading import MAJOR, Assessment, assess, differing_tie, for_transformers_4
from .reports import Cause, CheckReport, RepairReport, and_more, how_to_give, printable, short
from .solving import Solution, Task, Unsolved, retied, solve


@dataclass(frozen=True)
class Folder:
    path: Path
    config: Config  # content of config.json
    weights: Weights  # headers of the weights files
    classes: Classes | Refusal  # or why they are not known

    @property
    def unsure(self) -> str | None:
        """Why the config cannot be compared with the weights; ``None`` if it can."""
        refused = self.classes.reason if isinstance(self.classes, Refusal) else None
        return self.weights.unsure or refused


@dataclass(frozen=True)
class SolvableFolder:
    """A folder whose config and classes are known, and whose weights have no fault."""

    path: Path
    data: dict[str, Any]
    weights: Weights
    classes: Classes


@check_arguments
def check_checkpoint(
    folder: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> CheckReport:
    """Compare a folder's config with its weights; load no weights and write nothing.

    Builds the class that config.json names, without data. Transformers' own loading code matches it
    with the tensors in the safetensors headers. Data are read only of tensors that the config ties,
    and only a few rows.

    Args:
        folder: a folder with config.json and weights.
        trust_remote_code: run the folder's own code if its class needs it.

    Returns:
        A report: whether the folder is sound (``None``: not known) and, if not, one cause for all
        tensors that share it.

    Raises:
        CheckpointError: the folder, its config.json or its weights are missing or cannot be read,
            or the class is code in the folder and ``trust_remote_code`` is not set.
    """
    return checked(_read_folder(place(folder), trust_remote_code))


def place(folder: str | os.PathLike[str]) -> Path:
    """Return a folder's path, with a leading ``~`` expanded."""
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{short(folder)}: this home folder does not exist") from error


def checked(read: Folder) -> CheckReport:
    report = _report(read)
    if read.unsure is None and isinstance(read.classes, Classes):
        return _judged(report, read, read.classes)
    return replace(report, sound=False) if report.causes else replace(report, why_not=read.unsure)


def _read_folder(path: Path, trust_remote_code: bool) -> Folder:
    try:
        check_exists(path)
        config, weights = read_config(path), read_weights(path)
    except (OSError, ValueError) as error:  # no permission; an impossible file name
        raise CheckpointError(f"{short(path)} cannot be read: {short(error)}") from error
    if config.data is None:
        return Folder(path, config, weights, Refusal("config.json cannot be read"))
    if quantisation(config.data) is not None:
        why = "the weights are quantised (quantization_config), and packed shapes show no widths"
        return Folder(path, config, weights, Refusal(why))
    try:
        classes = classes_of(config.data, path, len(weights.tensors), trust_remote_code)
    except (ImportError, RuntimeError) as error:  # a class whose libraries are not installed
        classes = Refusal(f"the class cannot be loaded: {short(error)}")
    return Folder(path, config, weights, classes)


def _report(read: Folder) -> CheckReport:
    classes = read.classes if isinstance(read.classes, Classes) else None
    config = () if read.config.fault is None else (Cause("config", read.config.fault),)
    notes = [classes.note] if classes and classes.note else []
    if (read.path / ADAPTER).is_file():
        notes.append(
            f"the folder contains an adapter ({ADAPTER}), which was not checked; from_pretrained "
            "adds it to the model if peft is installed"
        )
    return CheckReport(
        folder=str(read.path),
        model=classes.model.__name__ if classes else None,
        sound=None,
        causes=(*config, *(Cause("files", fault) for fault in read.weights.faults)),
        notes=tuple(notes),
        files=read.weights.files,
        tensors=len(read.weights.tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in read.weights.tensors.values()),
    )


def _judged(report: CheckReport, read: Folder, classes: Classes) -> CheckReport:
    """Add a verdict to the report on a folder whose class is known."""
    data, tensors = read.config.data or {}, read.weights.tensors
    if not read.weights.complete and not tensors:
        return replace(report, sound=False)
    large = too_large(classes, data, tensors)
    if large is not None:
        return replace(
            report,
            sound=False if report.causes else None,
            why_not=f"{large}; the model was not built",
        )
    assessment = assess(classes, data, tensors)
    if isinstance(assessment, Refusal):
        name = classes.config.__name__ if read.weights.complete else "the class"
        return _unsound(report, Cause("config", f"{name} refuses config.json: {assessment.reason}"))
    if assessment.unused:
        listed = f"{short(assessment.unused[0])}{and_more(assessment.unused)}"
        report = _noted(report, f"not used by this class: {listed}")
    if assessment.fits:
        report = _with_ties(report, read, assessment, classes)
        return replace(report, sound=not report.causes)
    if not read.weights.complete:
        return _unsound(report)
    solved = solve(Task(classes, data, tensors))
    if isinstance(solved, Solution):
        return _unsound(replace(report, undecided=solved.undecided), *solved.changes)
    report = replace(report, candidates=solved.candidates)
    return _unsound(report, *(solved.causes or [Cause("config", solved.reason)]))


def _noted(report: CheckReport, note: str) -> CheckReport:
    return replace(report, notes=(*report.notes, note))


def _unsound(report: CheckReport, *causes: Cause) -> CheckReport:
    return replace(report, sound=False, causes=(*report.causes, *causes))


def _with_ties(
    report: CheckReport, read: Folder, assessment: Assessment, classes: Classes
) -> CheckReport:
    """Add a note or a cause if tensors that the config ties hold different numbers."""
    data, tensors = read.config.data or {}, read.weights.tensors
    names = differing_tie(read.path, classes, assessment, tensors)
    if names is None:
        return report
    text = f"the config ties {names[0]} and {names[1]}, which hold different numbers"
    # Transformers 4 drops one of the two; Transformers 5 keeps both untied, with a warning
    if MAJOR < 5:
        return _unsound(report, Cause("field", text, tensors=names))
    task = Task(classes, data, tensors, differing_tie=names)
    flipped, _, _ = retied(task, data, assessment)
    if not flipped:
        return _noted(report, f"{_not_untied(names, classes)}; Transformers loads them untied")
    return _noted(report, f"{text}; Transformers loads them untied, and repair corrects the config")


def _not_untied(names: tuple[str, str], classes: Classes) -> str:
    """A sentence on two tensors that differ, and that the class ties with any config."""
    return (
        f"the config ties {names[0]} and {names[1]}, which hold different numbers, and no setting "
        f"of {classes.config.__name__} unties them"
    )


def solvable_folder(folder: Path, trust_remote_code: bool) -> SolvableFolder:
    """Read a folder; raise CheckpointError, with the reason, if it cannot be solved."""
    read = _read_folder(folder, trust_remote_code)
    fault = read.config.fault or next(iter(read.weights.faults), None)
    if fault is not None:
        raise CheckpointError(
            f"{folder}: {fault}. No other config can fix that: download the file again, or correct "
            "it by hand."
        )
    if read.unsure or isinstance(read.classes, Refusal) or read.config.data is None:
        raise CheckpointError(f"{folder}: {read.unsure}.")
    return SolvableFolder(folder, read.config.data, read.weights, read.classes)


@check_arguments
def repair_checkpoint(
    folder: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    given: Mapping[str, Count] | None = None,
    trust_remote_code: bool = False,
) -> RepairReport:
    """Write the config that has the shapes of the weights, if there is exactly one.

    The config is solved from the headers of the weights, and proved by building the class, before
    anything is written. The old config is kept as ``config.json.bak``.

    Args:
        folder: a folder with config.json and weights.
        dry_run: only report what would be written.
        given: known values of fields that no shape shows: ``{"head_dim": 64}``.
        trust_remote_code: run the folder's own code if its class needs it.

    Returns:
        A report of the changed fields; ``written`` is False for a dry run, or if nothing had to
        change.

    Raises:
        CheckpointError: no config fits, or several do (``error.candidates``); the weights are
            damaged; or the folder cannot be written. The folder is unchanged.
    """
    path = place(folder)
    read, report, new = _planned(path, given, trust_remote_code)
    if dry_run or not report.difference:
        after = checked(Folder(path, Config(json.loads(new)), read.weights, read.classes))
        return replace(report, after=after)
    try:
        backup = _replace_config(path, new)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. It was not changed. Copy the "
            "folder, and repair the copy."
        ) from error
    after = check_checkpoint(path, trust_remote_code=trust_remote_code)
    if not after.sound:
        raise CheckpointError(
            f"{path} was changed during the repair:\n{after}\nThe old config is in {backup}."
        )
    return replace(report, written=True, backup=backup.name, after=after)


def _planned(
    path: Path, given: Mapping[str, int] | None, trust_remote_code: bool
) -> tuple[SolvableFolder, RepairReport, bytes]:
    """Return the folder, the report without ``after``, and the new config.json, proved."""
    read = solvable_folder(path, trust_remote_code)
    classes, tensors = read.classes, read.weights.tensors
    names = None
    if too_large(classes, read.data, tensors) is None:
        assessment = assess(classes, read.data, tensors)
        if isinstance(assessment, Assessment):
            names = differing_tie(path, classes, assessment, tensors)
    solved = solve(Task(classes, read.data, tensors, given or {}, names))
    if isinstance(solved, Unsolved):
        raise CheckpointError(_unsolved(path, solved), solved.candidates)
    old = (path / CONFIG).read_bytes()
    rotary = for_transformers_4(classes, solved.data)
    new = old if rotary.data == read.data else (json.dumps(rotary.data, indent=2) + "\n").encode()
    proof = assess(classes, json.loads(new), tensors)
    if isinstance(proof, Refusal) or not proof.fits:
        raise CheckpointError(
            f"{path}: the weights do not load with the config that was found. Nothing was written."
        )
    still_tied = names is not None and names[1] in proof.tied.get(names[0], ())
    ties = [_not_untied(names, classes)] if names is not None and still_tied else []
    report = RepairReport(
        str(path),
        {str(change.field): (change.says, change.holds) for change in solved.changes},
        _difference(old, new),
        undecided=solved.undecided,
        added={field_name(path): value for path, value in rotary.added.items()},
        notes=(*ties, *rotary.unwritable),
    )
    return read, report, new


def _unsolved(path: Path, unsolved: Unsolved) -> str:
    text = f"{path}: {printable(unsolved.reason)}."
    if unsolved.candidates:
        name, value = next(iter(unsolved.candidates[0].items()))
        argument = how_to_give(name, value)
        return (
            f"{text} No shape shows which one is right; choose one: {argument}. Nothing was "
            "written."
        )
    return f"{text} Nothing was written."


def _difference(old: bytes, new: bytes) -> str:
    if old == new:
        return ""
    before = json.dumps(json.loads(old), indent=2) + "\n"
    lines = difflib.unified_diff(
        before.splitlines(), new.decode().splitlines(), CONFIG, f"{CONFIG} (new)", lineterm="", n=1
    )
    return "\n".join(lines)


def _replace_config(folder: Path, text: bytes) -> Path:
    """Replace config.json of a folder, undone on errors; return the path of its backup."""
    target = folder / CONFIG
    old, count = target.read_bytes(), 0
    while os.path.lexists(backup := folder / f"{CONFIG}.bak{f'.{count}' if count else ''}"):
        count += 1
    try:
        write_whole(backup, lambda part: part.write_bytes(old))
        write_whole(target, lambda part: part.write_bytes(text))
    except BaseException:
        if target.read_bytes() == old:
            backup.unlink(missing_ok=True)
        raise
    return backup
