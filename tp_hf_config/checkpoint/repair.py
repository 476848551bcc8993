"""The config that a folder's weights need, found, shown and written."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..reference import Refusal, field_name
from .assess import Assessment, assess
from .building import too_large
from .causes import of_unsolved
from .check import Known, check_checkpoint, checked
from .folder import CONFIG
from .generation import generation_notes
from .reports import CheckReport, RepairReport
from .rotary import for_transformers_4
from .solving import Solution, Task, Unsolved, solution
from .ties import apart
from .words import printable, short
from .writing import check_new, locked, new_folder, replace_config


def repair_checkpoint(
    folder: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    given: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> RepairReport:
    """Write the config whose shapes the weights have, where there is exactly one.

    It is solved from the weights' headers and proved by building the class from it, before
    anything is written. The old config stays beside the new one as ``config.json.bak``.

    Args:
        folder: with config.json and weights.
        out: a new folder to write to, with the weights linked or copied; ``folder`` is not touched.
        dry_run: only say what would be written.
        given: fields whose value is known and no shape shows: ``{"head_dim": 64}``.
        trust_remote_code: run the folder's own code, where its class needs that.

    Raises:
        CheckpointError: no config, or several, fit (``error.candidates``); damaged weights; the
            folder cannot be written or is being repaired already. It is as it was.
    """
    path = Path(folder)
    target = None if out is None else Path(out)
    if target is not None and not dry_run:
        check_new(target)
    if dry_run:
        return _planned(path, given, trust_remote_code)[0]
    try:
        if target is not None:
            return _into_new(path, target, given, trust_remote_code)
        checked(path, trust_remote_code)
        with locked(path):
            return _in_place(path, given, trust_remote_code)
    except OSError as error:
        where = target or path
        raise CheckpointError(
            f"{where} cannot be written: {error.strerror or error}. {path} is as it was. Write to "
            "another folder: out= (--out)."
        ) from error


def _planned(
    path: Path, given: Mapping[str, int] | None, trust_remote_code: bool
) -> tuple[RepairReport, bytes]:
    """What there is to write, proved; nothing is written."""
    read = checked(path, trust_remote_code)
    found = solution(_task(read, given))
    if isinstance(found, Unsolved):
        raise CheckpointError(_unsolved(read, found), found.candidates)
    old = (path / CONFIG).read_bytes()
    rotary = for_transformers_4(read.classes, found.data)
    new = old if rotary.data == read.data else (json.dumps(rotary.data, indent=2) + "\n").encode()
    proof = assess(read.classes, json.loads(new), read.weights.tensors)
    if isinstance(proof, Refusal) or not proof.fits:
        raise CheckpointError(f"{path}: the config that was found does not load what is there.")
    fields = {field_name(one.path): (one.says, one.holds) for one in found.changed}
    report = RepairReport(
        str(path),
        fields,
        _difference(old, new),
        undecided=found.undecided,
        added={field_name(path): value for path, value in rotary.added.items()},
        notes=(*generation_notes(path, found.data), *rotary.left),
        after=replace(_expected(read, found), notes=rotary.left),
    )
    return report, new


def _task(read: Known, given: Mapping[str, int] | None) -> Task:
    tensors = read.weights.tensors
    names = None
    absurd = bool(too_large(read.data, tensors))
    found = Refusal("") if absurd else assess(read.classes, read.data, tensors)
    if isinstance(found, Assessment) and found.tied:
        names = apart(read.path, found, tensors, read.classes.model.base_model_prefix)
    return Task(read.classes, read.data, tensors, given or {}, names)


def _expected(read: Known, found: Solution) -> CheckReport:
    """What checking the folder will say once it is written."""
    return CheckReport(
        str(read.path),
        read.classes.model.__name__,
        True,
        undecided=found.undecided,
        files=read.weights.files,
        tensors=len(read.weights.tensors),
    )


def _unsolved(read: Known, found: Unsolved) -> str:
    """Why there is no one config, and what to say next."""
    text = f"{read.path}: {printable(found.reason)}."
    if found.needs:
        seen = assess(read.classes, read.data, read.weights.tensors)
        causes = () if isinstance(seen, Refusal) else of_unsolved(found, seen, read.classes)
        listed = " ".join(f"{cause.text}." for cause in causes)
        return f"{read.path}: {listed} No config says that: prune these layers alike."
    if found.candidates:
        name, value = next(iter(found.candidates[0].items()))
        option = f" or --head-dim {value}" if name == "head_dim" else ""
        told = f"given={{{name!r}: {value}}}{option}"
        return f"{text} Nothing tells which; say it: {told}. Nothing was written."
    return f"{text} Nothing was written."


def _difference(old: bytes, new: bytes) -> str:
    """The two files as a unified diff, the old one laid out as the new one is."""
    if old == new:
        return ""
    before = json.dumps(json.loads(old), indent=2) + "\n"
    lines = difflib.unified_diff(
        before.splitlines(), new.decode().splitlines(), CONFIG, f"{CONFIG} (new)", lineterm="", n=1
    )
    return "\n".join(lines)


def _in_place(path: Path, given: Mapping[str, int] | None, trust: bool) -> RepairReport:
    report, new = _planned(path, given, trust)
    if not report.difference:
        return report
    backup = replace_config(path, new)
    after = check_checkpoint(path, trust_remote_code=trust)
    if not after.sound:
        raise CheckpointError(f"{path} was changed meanwhile: {after} The old config: {backup}")
    return replace(report, written=True, backup=backup.name, after=after)


def _into_new(path: Path, out: Path, given: Mapping[str, int] | None, trust: bool) -> RepairReport:
    report, new = _planned(path, given, trust)
    with new_folder(path, out, new) as (place, left_out):
        after = check_checkpoint(place, trust_remote_code=trust)
        if not after.sound:
            raise CheckpointError(f"{path} was changed meanwhile: {after} Nothing was written.")
    notes = report.notes
    if left_out:
        notes = (*notes, f"left out, as no plain files: {', '.join(map(short, left_out[:8]))}")
    after = replace(after, folder=str(out))
    return replace(report, folder=str(out), written=True, notes=notes, after=after)
