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
from ..model.files import write_whole
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
from .reports import RepairReport, how_to_give, printable
from .rotary import for_transformers_4
from .solving import Task, Unsolved, solve


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
