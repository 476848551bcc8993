"""Find the config that a folder's weights need; show it or write it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..arguments import Count, check_arguments
from ..errors import CheckpointError
from ..model.build import Refusal
from ..model.config_json import field_name
from .building import too_large
from .check import (
    Folder,
    SolvableFolder,
    check_checkpoint,
    checked,
    not_untied,
    place,
    solvable_folder,
)
from .folder import CONFIG, Config
from .loading import Assessment, assess, differing_tie
from .reports import RepairReport, how_to_give, printable, short
from .rotary import for_transformers_4
from .solving import Task, Unsolved, solve
from .writing import check_target, copied_folder, locked, replace_config


@check_arguments
def repair_checkpoint(
    folder: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    given: Mapping[str, Count] | None = None,
    trust_remote_code: bool = False,
) -> RepairReport:
    """Write the config that has the shapes of the weights, if there is exactly one.

    The config is solved from the headers of the weights, and proved by building the class, before
    anything is written. The old config is kept as ``config.json.bak``.

    Args:
        folder: a folder with config.json and weights.
        out: a new folder for the result, with the weights copied; ``folder`` does not change.
        dry_run: only report what would be written.
        given: known values of fields that no shape shows: ``{"head_dim": 64}``.
        trust_remote_code: run the folder's own code if its class needs it.

    Returns:
        A report of the changed fields; ``written`` is False for a dry run, or if nothing had to
        change.

    Raises:
        CheckpointError: no config fits, or several do (``error.candidates``); the weights are
            damaged; ``out`` exists or is inside ``folder``; or the folder cannot be written or is
            being repaired by another process. The folder is unchanged.
    """
    path = place(folder)
    target = None if out is None else place(out)
    if target is not None and not dry_run:
        check_target(path, target)
    if dry_run:
        return _unwritten(*_planned(path, given, trust_remote_code))
    try:
        if target is not None:
            return _into_new(path, target, given, trust_remote_code)
        solvable_folder(path, trust_remote_code)
        with locked(path):
            return _in_place(path, given, trust_remote_code)
    except OSError as error:
        where = target or path
        raise CheckpointError(
            f"{where} cannot be written: {error.strerror or error}. {path} was not changed. Write "
            "to another folder: out=."
        ) from error


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
    ties = [not_untied(names, classes)] if names is not None and still_tied else []
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


def _unwritten(read: SolvableFolder, report: RepairReport, new: bytes) -> RepairReport:
    """Complete a report with the check of the folder as it would be."""
    after = checked(Folder(read.path, Config(json.loads(new)), read.weights, read.classes))
    return replace(report, after=after)


def _in_place(path: Path, given: Mapping[str, int] | None, trust: bool) -> RepairReport:
    """Repair a locked folder in place, and check it again."""
    read, report, new = _planned(path, given, trust)
    if not report.difference:
        return _unwritten(read, report, new)
    backup = replace_config(path, new)
    after = check_checkpoint(path, trust_remote_code=trust)
    if not after.sound:
        raise CheckpointError(
            f"{path} was changed during the repair:\n{after}\nThe old config is in {backup}."
        )
    return replace(report, written=True, backup=backup.name, after=after)


def _into_new(path: Path, out: Path, given: Mapping[str, int] | None, trust: bool) -> RepairReport:
    """Write the repaired folder as a new one; it is checked before it gets its name."""
    _, report, new = _planned(path, given, trust)
    with copied_folder(path, out, new) as (work, left_out):
        after = check_checkpoint(work, trust_remote_code=trust)
        if not after.sound:
            raise CheckpointError(
                f"{path} was changed during the repair:\n{after}\nNothing was written."
            )
    notes = report.notes
    if left_out:
        notes = (
            *notes,
            f"not copied, because not regular files: {', '.join(map(short, left_out[:8]))}",
        )
    after = replace(after, folder=str(out))
    return replace(report, folder=str(out), written=True, notes=notes, after=after)
