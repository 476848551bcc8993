"""Reports on folders, and helpers that print names and values from untrusted files."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ..reports import Report
from ..reports import short as short_repr

Kind = Literal["files", "config", "field", "tensors"]
_LONGEST = 200  # characters of a text from a file in a message


def printable(text: str) -> str:
    """Replace unprintable characters: a name in a file could move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def short(text: object) -> str:
    """Return one printable line of at most 200 characters, with ``...`` if it is cut."""
    line = " ".join(printable(str(text)[: 2 * _LONGEST]).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def and_more(names: Collection[object], shown: int = 1) -> str:
    """Return `` (and 3 more)`` for names that are not shown; empty if all are."""
    return f" (and {len(names) - shown} more)" if len(names) > shown else ""


def number(value: Any) -> str:
    """Return a field's value as text: ``1,536``, ``true``, ``not set``."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**18 else f"about 2**{abs(value).bit_length()}"
    return short(value)


def how_to_give(name: str, value: int | None = None) -> str:
    """How to give a field's value in Python and in the shell; ``None``: any value."""
    typed = shlex.quote(f"{name}={'N' if value is None else value}")
    return f"given={{{name!r}: {'...' if value is None else value}}} or --given {typed}"


@dataclass(frozen=True)
class Cause:
    """One thing that is wrong with a folder.

    Attributes:
        kind: ``files``: the weights or their index; ``config``: config.json cannot be loaded;
            ``field``: a config field has another value than the weights need; ``tensors``: tensors
            are missing, unknown or of shapes that no field sets.
        text: the cause, in one sentence.
        field: name of the config field, for ``kind="field"``.
        says: the field's value; ``None``: not set.
        holds: the value that the weights need; ``None``: several, or not known.
        tensors: names of the tensors that show it.
    """

    kind: Kind
    text: str
    field: str | None = None
    says: Any = None
    holds: Any = None
    tensors: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return short_repr(self, self.text)


@dataclass(frozen=True, repr=False)
class CheckReport(Report):
    """Result of comparing a folder's config with its weights.

    Attributes:
        folder: path of the folder.
        model: name of the class; ``None``: not known.
        sound: True if ``from_pretrained`` loads every weight of the class; ``None``: not known.
        causes: what is wrong.
        why_not: why ``sound`` is not known.
        undecided: names of fields that no shape shows.
        candidates: configs that fit the weights equally well, as field name -> value.
        notes: further remarks.
        files: names of the weights files.
        tensors: number of tensors in them.
        parameters: number of elements of these tensors.
    """

    folder: str
    model: str | None
    sound: bool | None
    causes: tuple[Cause, ...] = ()
    why_not: str | None = None
    undecided: tuple[str, ...] = ()
    candidates: tuple[dict[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    tensors: int = 0
    parameters: int = 0

    def title(self) -> str:
        """Return the folder and the verdict."""
        verdict = {True: "sound", False: "not sound", None: "could not tell"}[self.sound]
        return printable(f"{self.folder}: {verdict}")

    def lines(self) -> Iterator[str]:
        """Yield the contents of the folder, the causes and the notes."""
        size = f"{self.tensors:,} tensors, {self.parameters:,} parameters, "
        count = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        yield printable(f"  {self.model or 'unknown class'}: {size}{count}")
        if self.why_not is not None:
            yield printable(f"  {self.why_not}")
        yield from (printable(f"  {cause.text}") for cause in self.causes)
        yield from (printable(f"  note: {note}") for note in self.notes)


@dataclass(frozen=True, repr=False)
class RepairReport(Report):
    """Result of repairing a folder's config.

    Attributes:
        folder: the folder with the repaired config; for a dry run, the folder that was read.
        fields: config field -> (old value, new value); ``None``: not set.
        difference: unified diff of the two files; empty if nothing has to change.
        written: True if a config was written.
        backup: file name of the old config, if it was kept.
        undecided: names of fields that no shape shows; they are unchanged.
        notes: further remarks.
        after: check of the folder after the repair, or as it would be.
        added: field -> value of the fields written for readers based on Transformers 4.
    """

    folder: str
    fields: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    difference: str = ""
    written: bool = False
    backup: str | None = None
    undecided: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    after: CheckReport | None = None
    added: dict[str, Any] = field(default_factory=dict)

    def title(self) -> str:
        """Return the folder and what was done."""
        done = "repaired" if self.written else "not written (dry run)"
        if not self.difference:
            done = "config.json fits the weights; nothing to repair"
        return f"{self.folder}: {done}"

    def lines(self) -> Iterator[str]:
        """Yield the changed fields, the notes, and the diff."""
        for name, (old, new) in self.fields.items():
            yield f"  {printable(name)}: {number(old)} -> {number(new)}"
        for name, value in self.added.items():
            yield (
                f"  {printable(name)}: {number(value)}, added for software based on Transformers 4"
            )
        if self.backup is not None:
            yield f"  the old config is in {self.backup}"
        if self.undecided and self.difference:
            yield f"  not changed, because no shape shows it: {', '.join(self.undecided)}"
        yield from (f"  note: {note}" for note in self.notes)
        if self.difference:
            yield self.difference


@dataclass(frozen=True)
class Difference:
    """One output that differs between two runs.

    Attributes:
        output: name of the output.
        elements: number of elements that differ; all of them if the shapes differ.
        of: number of elements.
        largest: largest absolute difference, not finite if an element is NaN or infinite in one
            output; ``None`` if the shapes differ, or dtypes that are not floating point.
        relative: ``largest`` over the largest finite element of the reference.
        dtypes: dtypes of the output and the reference, if they differ and are floating point.
    """

    output: str
    elements: int
    of: int
    largest: float | None = None
    relative: float | None = None
    dtypes: tuple[str, str] | None = None

    def __str__(self) -> str:
        if self.largest is None or self.relative is None:
            return f"{self.output}: different shapes or dtypes"
        by = f"by at most {self.largest:.3g} ({self.relative:.3g} of the largest)"
        if not math.isfinite(self.largest):
            by = "some by NaN or infinity"
        dtypes = ""
        if self.dtypes is not None:
            dtypes = f"; its dtype is {self.dtypes[0]}, that of the reference {self.dtypes[1]}"
        return f"{self.output}: {self.elements:,} of {self.of:,} numbers differ, {by}{dtypes}"


@dataclass(frozen=True, repr=False)
class RoundtripReport(Report):
    """Result of loading and running a saved model or a folder in a fresh process.

    Attributes:
        what: the folder, or the class that was saved.
        model: name of the class.
        same: True if all weights load and every output is the same bit for bit, with at least one
            finite number. With nothing to compare: it loads, runs and computes finite numbers.
        loading: problems with loading.
        outputs: names of the outputs.
        differences: outputs that differ.
        error: why it does not load or run.
        against: what it was compared with; ``None``: nothing.
        notes: further remarks.
        numbers: number of compared elements.
    """

    what: str
    model: str
    same: bool
    loading: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    error: str | None = None
    against: str | None = None
    notes: tuple[str, ...] = ()
    numbers: int = 0

    def title(self) -> str:
        """Return what was run, and the verdict."""
        done = "loads and runs" if self.against is None else f"same outputs as {self.against}"
        runs = self.error is None and not self.loading
        bad = "runs, but an output has no finite number" if runs else "does not load or run"
        bad = bad if self.against is None else f"not the same as {self.against}"
        return f"{self.what}: {done if self.same else bad} ({self.model}, fresh process)"

    def lines(self) -> Iterator[str]:
        """Yield the problems and the notes."""
        yield from (f"  {problem}" for problem in (*self.loading, *self.differences))
        if self.error is not None:
            yield f"  {self.error}"
        yield from (f"  note: {note}" for note in self.notes)
