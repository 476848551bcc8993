"""Write a folder in a run that can be interrupted, and that another run can go on with.

Beside ``out`` lies ``.out.resumable`` meanwhile: ``job.json``, the record of what the run is to do;
``decided.pt`` and ``cuts.safetensors``, what it has decided; and ``model``, which becomes ``out``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..checkpoint.writing import write_whole
from ..errors import PipelineError, in_one_line, listed
from .output import check_target, in_use, put_in_place, uninterrupted

if TYPE_CHECKING:
    from ..graph.cut_list import CutList

_RECORD, _DECIDED, _CUTS, _MODEL = "job.json", "decided.pt", "cuts.safetensors", "model"


@dataclass
class Work:
    """Where a job writes its result.

    Attributes:
        model: the folder that becomes ``out``.
        folder: what a later run can go on with; ``None``: no run can.
        kept: True if it is there still after a failure.
    """

    model: Path
    folder: Path | None = None
    kept: bool = field(default=False, init=False)

    @property
    def is_decided(self) -> bool:
        """True if it holds what a later run can go on with."""
        return self.folder is not None and is_decided(self.folder)

    def decide(self, decision: Any, cuts: CutList | None = None) -> None:
        """Keep what was decided; weight files that are written from now on are kept too.

        Args:
            decision: what ``torch.save`` takes.
            cuts: the cut list; ``None``: there is none, or it is kept already.
        """
        import torch

        if self.folder is None:
            return
        if cuts is not None:
            write_whole(self.folder / _CUTS, cuts.save)
        write_whole(self.folder / _DECIDED, lambda part: torch.save(decision, part))

    def decision(self, classes: list[Any]) -> tuple[Any, CutList | None] | None:
        """Return what a run before this one has decided, and its cut list; ``None``: nothing.

        ``classes``: the classes that what was decided is made of; no others are loaded.

        Raises:
            PipelineError: it cannot be read.
        """
        import torch

        from ..graph.cut_list import CutList

        if self.folder is None or not is_decided(self.folder):
            return None
        cuts = self.folder / _CUTS
        try:
            torch.serialization.add_safe_globals(classes)
            decision = torch.load(self.folder / _DECIDED, weights_only=True)
            return decision, CutList.load(cuts) if cuts.is_file() else None
        except Exception as error:  # a damaged file leads to any exception
            raise PipelineError(
                "resume=True: what the interrupted run decided cannot be read: "
                f"{in_one_line(error)}. {_start_anew(self.folder)}"
            ) from error


def is_decided(folder: Path) -> bool:
    """True if a folder holds what a later run can go on with."""
    return (folder / _DECIDED).is_file()


def resumable(target: Path) -> Path:
    """Return the path of the folder that holds what a run that writes ``target`` has done."""
    target = target.expanduser().resolve()
    return target.with_name(f".{target.name}.resumable")


def bytes_written(target: Path) -> int:
    """Return the size of what an interrupted run has written of a result, in bytes.

    A run that resumes keeps these files, or removes them before it writes.
    """
    files = (resumable(target) / _MODEL).glob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def check_not_unfinished(target: Path) -> None:
    """Raise if an interrupted run has left something that a run without ``--resume`` would ignore.

    Raises:
        PipelineError: it has.
        CheckpointError: another process is writing the folder.
    """
    folder = resumable(target)
    if not is_decided(folder):
        return
    with in_use(folder):
        raise PipelineError(
            f"{target}: a run that was interrupted has decided what to cut, and keeps it in "
            f"{folder}. Add resume=True to go on with it. {_start_anew(folder)}"
        )


def _start_anew(folder: Path) -> str:
    return f"To start anew, first: rm -r {quote(str(folder))}"


@contextmanager
def resumable_folder(
    target: Path,
    record: Mapping[str, Any],
    *,
    source: Path | None = None,
    overwrite: bool,
    resume: bool,
) -> Iterator[Work]:
    """Yield where to write a model folder; it becomes ``target`` at the end.

    After a failure nothing is left; with ``resume``, what was decided and written by then is.  What
    a killed process leaves is whole too: files get their names once they are complete.

    Args:
        target: the final folder; empty or not there, unless ``overwrite``.
        record: what the result depends on, for ``json.dumps``; a run with another one cannot go on.
        source: a folder that has to stay.
        overwrite: replace a model folder that is there, at the end.
        resume: go on with what an interrupted run has done, and keep what this one does.

    Raises:
        PipelineError: ``target`` cannot be written to, something would be overwritten, or the
            interrupted run was to do something else.
        CheckpointError: another process is writing the folder.
    """
    check_target(target, source=source, overwrite=overwrite)
    if not resume:
        check_not_unfinished(target)
    target, folder = target.expanduser().resolve(), resumable(target)
    try:
        folder.mkdir(exist_ok=True)
        with in_use(folder):
            _begin(folder, record)
            work = Work(folder / _MODEL, folder)
            try:
                yield work
                put_in_place(work.model, target, overwrite)
            except BaseException:
                work.kept = resume and work.is_decided
                raise
            finally:
                if not work.kept:
                    with uninterrupted():
                        _remove(folder)
    except OSError as error:
        raise PipelineError(f"{target}: cannot be written: {error}") from error


def _begin(folder: Path, record: Mapping[str, Any]) -> None:
    """Prepare a folder: of an interrupted run of this record, what it has finished stays.

    Raises:
        PipelineError: what it holds is of a run with another record, or of no run.
    """
    text = json.dumps(record, indent=2)
    model = folder / _MODEL
    if is_decided(folder):
        _check_same(folder, json.loads(text))
        model.mkdir(exist_ok=True)
        for path in model.iterdir():
            if path.suffix != ".safetensors" or path.is_dir():  # all else is quickly written anew
                _remove(path)
        return
    strange = {path.name for path in folder.iterdir()} - {_RECORD, _CUTS, _MODEL}
    strange = {name for name in strange if not name.endswith(".part")}
    if strange:
        raise PipelineError(
            f"{folder}: expected nothing, or what an interrupted run left, found "
            f"{listed(sorted(strange))}. Move it away"
        )
    for path in folder.iterdir():
        _remove(path)
    model.mkdir()
    write_whole(folder / _RECORD, lambda part: part.write_text(text, encoding="utf-8"))


def _check_same(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise if an interrupted run was to do something else than a record says.

    Raises:
        PipelineError: it was, or its record cannot be read.
    """
    try:
        other = json.loads((folder / _RECORD).read_bytes())
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"resume=True: the interrupted run's record cannot be read: {in_one_line(error)}. "
            f"{_start_anew(folder)}"
        ) from error
    differing = list(_differing(other, record))
    if differing:
        raise PipelineError(
            "resume=True: the interrupted run had other settings, another source or other "
            f"versions: {listed(differing, '; ')}. Say what it was given, or leave it. "
            f"{_start_anew(folder)}"
        )


def _differing(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Yield what differs between two records, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _differing(old.get(key), new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"{name} was {json.dumps(old)}, is {json.dumps(new)}"


def _remove(path: Path) -> None:
    """Delete a file or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
