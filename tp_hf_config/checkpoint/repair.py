"""Find the config that a folder's weights need, show it and write it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import Count, check_arguments
from ..errors import CheckpointError
from ..model.build import Refusal
from ..model.config_json import field_name
from .assess import Assessment, assess
from .causes import unsolved_causes
from .check import Folder, SolvableFolder, check_checkpoint, checked, place, solvable_folder
from .folder import CONFIG, Config
from .large import too_large
from .reports import RepairReport
from .rotary import for_transformers_4
from .solving import Unsolved, solve
from .structure import Task
from .ties import differing_tie, not_untied
from .words import how_to_give, printable, short
from .writing import check_target, locked, new_folder, replace_config

_GENERATION = "generation_config.json"
_MOST_BYTES = 2**20


@check_arguments
def repair_checkpoint(
    folder: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    given: Mapping[str, Count] | None = None,
    trust_remote_code: bool = False,
) -> RepairReport:
    """Write the config whose shapes the weights have, if there is exactly one.

    The config is solved from the weights' headers and proved by building the class from it, before
    anything is written. The old config stays beside the new one as ``config.json.bak``.

    Args:
        folder: a folder with config.json and weights.
        out: a new folder to write to, with the weights copied; ``folder`` is not touched.
        dry_run: only report what would be written.
        given: fields whose value is known although no shape shows it: ``{"head_dim": 64}``.
        trust_remote_code: run the folder's own code if its class needs it.

    Returns:
        A report of the fields that changed; ``written`` is False for a dry run, and if there was
        nothing to change.

    Raises:
        CheckpointError: no config, or several, fit (``error.candidates``); the weights are damaged;
            ``out`` exists or is inside ``folder``; or the folder cannot be written or is being
            repaired already. The folder is as it was.
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
            f"{where} cannot be written: {error.strerror or error}. {path} is as it was. Write to "
            "another folder: out=."
        ) from error


def _planned(
    path: Path, given: Mapping[str, int] | None, trust_remote_code: bool
) -> tuple[SolvableFolder, RepairReport, bytes]:
    """Return the folder, the report and the new config.json, proved; nothing is written.

    The report lacks what the folder will be like.

    Raises:
        CheckpointError: the folder cannot be solved, or not exactly one config fits.
    """
    read = solvable_folder(path, trust_remote_code)
    task = _task(read, given)
    solved = solve(task)
    if isinstance(solved, Unsolved):
        raise CheckpointError(_unsolved(read, solved), solved.candidates)
    old = (path / CONFIG).read_bytes()
    rotary = for_transformers_4(read.classes, solved.data)
    new = old if rotary.data == read.data else (json.dumps(rotary.data, indent=2) + "\n").encode()
    proof = assess(read.classes, json.loads(new), read.weights.tensors)
    if isinstance(proof, Refusal) or not proof.fits:
        raise CheckpointError(f"{path}: the config that was found does not load what is there.")
    fields = {field_name(change.path): (change.says, change.holds) for change in solved.changed}
    report = RepairReport(
        str(path),
        fields,
        _difference(old, new),
        undecided=solved.undecided,
        added={field_name(path): value for path, value in rotary.added.items()},
        notes=(
            *_tie_notes(task, proof),
            *_generation_notes(path, solved.data),
            *rotary.unwritable,
        ),
    )
    return read, report, new


def _unwritten(read: SolvableFolder, report: RepairReport, new: bytes) -> RepairReport:
    """Return the report on a folder that is not written, with what it would be like."""
    after = checked(Folder(read.path, Config(json.loads(new)), read.weights, read.classes))
    return replace(report, after=after)


def _task(read: SolvableFolder, given: Mapping[str, int] | None) -> Task:
    """Return what is to be solved, with the names of two tied tensors whose data differ, if any."""
    tensors = read.weights.tensors
    names = None
    absurd = bool(too_large(read.classes, read.data, tensors))
    assessment = Refusal("") if absurd else assess(read.classes, read.data, tensors)
    if isinstance(assessment, Assessment) and assessment.tied:
        names = differing_tie(read.path, read.classes, assessment, tensors)
    return Task(read.classes, read.data, tensors, given or {}, names)


def _tie_notes(task: Task, assessment: Assessment) -> Iterator[str]:
    """Yield a note if tensors whose data differ stay tied.

    ``assessment``: how the tensors load with the new config.
    """
    first, second = task.differing_tie or ("", "")
    if second in assessment.tied.get(first, frozenset()):
        yield not_untied((first, second), task.classes)


def _unsolved(read: SolvableFolder, unsolved: Unsolved) -> str:
    """Return why there is no single config, and what the user can say next."""
    text = f"{read.path}: {printable(unsolved.reason)}."
    if unsolved.needs:
        assessment = assess(read.classes, read.data, read.weights.tensors)
        listed = ""
        if isinstance(assessment, Assessment):
            causes = unsolved_causes(unsolved, assessment, read.classes)
            listed = " ".join(f"{cause.text}." for cause in causes)
        return f"{read.path}: {listed} No config says that: prune these layers alike."
    if unsolved.candidates:
        name, value = next(iter(unsolved.candidates[0].items()))
        argument = how_to_give(name, value)
        return f"{text} Nothing tells which; say it: {argument}. Nothing was written."
    return f"{text} Nothing was written."


def _difference(old: bytes, new: bytes) -> str:
    """Return the unified diff of two files, the old one formatted as the new; empty if equal."""
    if old == new:
        return ""
    before = json.dumps(json.loads(old), indent=2) + "\n"
    lines = difflib.unified_diff(
        before.splitlines(), new.decode().splitlines(), CONFIG, f"{CONFIG} (new)", lineterm="", n=1
    )
    return "\n".join(lines)


def _in_place(path: Path, given: Mapping[str, int] | None, trust: bool) -> RepairReport:
    """Repair a folder in place and check it again; the folder is locked."""
    read, report, new = _planned(path, given, trust)
    if not report.difference:
        return _unwritten(read, report, new)
    backup = replace_config(path, new)
    after = check_checkpoint(path, trust_remote_code=trust)
    if not after.sound:
        raise CheckpointError(f"{path} was changed meanwhile: {after} The old config: {backup}")
    return replace(report, written=True, backup=backup.name, after=after)


def _into_new(path: Path, out: Path, given: Mapping[str, int] | None, trust: bool) -> RepairReport:
    """Write the repaired folder as a new one; check it before it gets its name."""
    _, report, new = _planned(path, given, trust)
    with new_folder(path, out, new) as (work, left_out):
        after = check_checkpoint(work, trust_remote_code=trust)
        if not after.sound:
            raise CheckpointError(f"{path} was changed meanwhile: {after} Nothing was written.")
    notes = report.notes
    if left_out:
        notes = (*notes, f"left out, as no plain files: {', '.join(map(short, left_out[:8]))}")
    after = replace(after, folder=str(out))
    return replace(report, folder=str(out), written=True, notes=notes, after=after)


def _generation_notes(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note for each entry of a folder's generation_config.json that a config rules out."""
    path = folder / _GENERATION
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        yield f"{_GENERATION} is not JSON: Transformers makes one from config.json instead"
        return
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    for name, value in data.items() if isinstance(data, dict) else ():
        if not name.endswith("_token_id") or type(size) is not int:
            continue
        tokens = value if isinstance(value, list) else [value]
        if any(type(token) is int and token >= size for token in tokens):
            yield f"{_GENERATION}: {name} {value} is no token of {size:,}; correct it by hand"
