"""Compare a folder's config.json with its weights, and find the config that they need."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..arguments import Count, check_arguments
from ..errors import CheckpointError
from ..model.build import Refusal
from ..model.config_json import field_name
from ..model.files import write_whole
from .building import Checkpoint, Classes, TooLarge, classes_of, quantisation
from .folder import ADAPTER, CONFIG, Config, Weights, check_exists, read_config, read_weights
from .loading import MAJOR, assess, differing_tie, for_transformers_4
from .reports import Cause, CheckReport, RepairReport, and_more, how_to_give, printable, short
from .solving import Solution, Unsolved, solve


@dataclass(frozen=True)
class Folder:
    path: Path
    config: Config  # content of config.json
    weights: Weights  # headers of the weights files
    classes: Classes | Refusal  # or why they are not known

    def checkpoint(self) -> Checkpoint | Refusal:
        """The folder to compare with its weights, or why that is impossible."""
        if self.weights.unsure is not None:
            return Refusal(self.weights.unsure)
        if isinstance(self.classes, Refusal):
            return self.classes
        return Checkpoint(self.path, self.config.data or {}, self.weights, self.classes)


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


def checked(folder: Folder) -> CheckReport:
    report, checkpoint = _report(folder), folder.checkpoint()
    if isinstance(checkpoint, Checkpoint):
        return _judged(report, checkpoint)
    if report.causes:
        return replace(report, sound=False)
    return replace(report, why_not=checkpoint.reason)


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


def _judged(report: CheckReport, checkpoint: Checkpoint) -> CheckReport:
    """Add a verdict to the report on a folder whose class is known."""
    classes, weights = checkpoint.classes, checkpoint.weights
    if not weights.complete and not weights.tensors:
        return _unsound(report)
    assessment = assess(checkpoint, checkpoint.data)
    if isinstance(assessment, TooLarge):
        sound = False if report.causes else None
        return replace(report, sound=sound, why_not=f"{assessment.reason}; the model was not built")
    if isinstance(assessment, Refusal):
        name = classes.config.__name__ if weights.complete else "the class"
        return _unsound(report, Cause("config", f"{name} refuses config.json: {assessment.reason}"))
    if assessment.unused:
        listed = f"{short(assessment.unused[0])}{and_more(assessment.unused)}"
        report = _noted(report, f"not used by this class: {listed}")
    if assessment.fits:
        names = differing_tie(checkpoint, assessment)
        report = report if names is None else _with_tie(report, checkpoint, names)
        return replace(report, sound=not report.causes)
    if not weights.complete:
        return _unsound(report)
    solved = solve(checkpoint)
    if isinstance(solved, Solution):
        return _unsound(replace(report, undecided=solved.undecided), *solved.changes)
    report = replace(report, candidates=solved.candidates)
    return _unsound(report, *(solved.causes or [Cause("config", solved.reason)]))


def _noted(report: CheckReport, note: str) -> CheckReport:
    return replace(report, notes=(*report.notes, note))


def _unsound(report: CheckReport, *causes: Cause) -> CheckReport:
    return replace(report, sound=False, causes=(*report.causes, *causes))


def _with_tie(report: CheckReport, checkpoint: Checkpoint, names: tuple[str, str]) -> CheckReport:
    """Add a note or a cause on two tensors that the config ties, and that differ."""
    text = f"the config ties {names[0]} and {names[1]}, which hold different numbers"
    # Transformers 4 drops one of the two; Transformers 5 keeps both untied, with a warning
    if MAJOR < 5:
        return _unsound(report, Cause("field", text, tensors=names))
    solved = solve(checkpoint)
    if isinstance(solved, Unsolved) or solved.still_tied:
        text = _not_untied(names, checkpoint.classes)
        return _noted(report, f"{text}; Transformers loads them untied")
    return _noted(report, f"{text}; Transformers loads them untied, and repair corrects the config")


def _not_untied(names: tuple[str, str], classes: Classes) -> str:
    """A sentence on two tensors that differ, and that the class ties with any config."""
    return (
        f"the config ties {names[0]} and {names[1]}, which hold different numbers, and no setting "
        f"of {classes.config.__name__} unties them"
    )


def solvable_folder(path: Path, trust_remote_code: bool) -> Checkpoint:
    """Read a folder; raise CheckpointError, with the reason, if it cannot be solved."""
    folder = _read_folder(path, trust_remote_code)
    fault = folder.config.fault or next(iter(folder.weights.faults), None)
    if fault is not None:
        raise CheckpointError(
            f"{path}: {fault}. No other config can fix that: download the file again, or correct "
            "it by hand."
        )
    checkpoint = folder.checkpoint()
    if isinstance(checkpoint, Refusal):
        raise CheckpointError(f"{path}: {checkpoint.reason}.")
    return checkpoint


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
    checkpoint = solvable_folder(path, trust_remote_code)
    report, new = _planned(checkpoint, given or {})
    if dry_run or not report.difference:
        config = Config(json.loads(new))
        after = checked(Folder(path, config, checkpoint.weights, checkpoint.classes))
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


def _planned(checkpoint: Checkpoint, given: Mapping[str, int]) -> tuple[RepairReport, bytes]:
    """Return the report without ``after``, and the new config.json, proved."""
    path, classes = checkpoint.path, checkpoint.classes
    solved = solve(checkpoint, given)
    if isinstance(solved, Unsolved):
        raise CheckpointError(_unsolved(path, solved), solved.candidates)
    old = (path / CONFIG).read_bytes()
    rotary = for_transformers_4(classes, solved.data)  # loads as the same config, which is proved
    same = rotary.data == checkpoint.data
    new = old if same else (json.dumps(rotary.data, indent=2) + "\n").encode()
    ties = [_not_untied(solved.still_tied, classes)] if solved.still_tied else []
    report = RepairReport(
        str(path),
        {str(change.field): (change.says, change.holds) for change in solved.changes},
        _difference(old, new),
        undecided=solved.undecided,
        added={field_name(path): value for path, value in rotary.added.items()},
        notes=(*ties, *rotary.unwritable),
    )
    return report, new


def _unsolved(path: Path, unsolved: Unsolved) -> str:
    text = f"{path}: {printable(unsolved.reason)}."
    if unsolved.candidates:
        argument = how_to_give(*next(iter(unsolved.candidates[0].items())))
        text += f" No shape shows which one is right; choose one: {argument}."
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
