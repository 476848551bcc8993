"""Reports on folders as text, HTML and JSON; names and values from files as messages show them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ..reports import Report
from ..reports import short as short_repr

Kind = Literal["files", "config", "field", "tensors"]
_LONGEST = 200
"""Characters of a text from a file that a message shows."""


def printable(text: str) -> str:
    """Replace what is not printable with spaces: a name in a file could move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def short(text: object) -> str:
    """Return one printable line of at most 200 characters, and ``...`` if that cuts the text."""
    line = " ".join(printable(str(text)[: 2 * _LONGEST]).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def and_more(names: Collection[object], shown: int = 1) -> str:
    """Return how many names are not shown, such as `` (and 3 more)``; empty if all are."""
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
    """Return how a user says a field's value, in Python and in the shell; None: any value."""
    typed = shlex.quote(f"{name}={'N' if value is None else value}")
    return f"given={{{name!r}: {'...' if value is None else value}}} or --given {typed}"


@dataclass(frozen=True)
class Cause:
    """One thing that is wrong with a folder.

    Attributes:
        kind: ``files``: the weights or their index; ``config``: config.json cannot be loaded;
            ``field``: a config field whose value is not the one that the weights hold;
            ``tensors``: tensors are missing, unknown or of shapes that no field sets.
        text: the cause, in one sentence.
        field: the name of the config field, if the cause is one.
        says: the field's value; ``None``: not set.
        holds: the value that the weights need; ``None``: several, or not known.
        tensors: the tensors that show it.
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
    """How a folder's config compares with its weights.

    Attributes:
        folder: the folder.
        model: the name of the class; ``None``: not known.
        sound: True if ``from_pretrained`` loads every weight that the class has; ``None``: could
            not tell.
        causes: what is wrong.
        why_not: why it could not tell.
        undecided: names of the fields that no shape shows.
        candidates: the configs that fit the weights equally well, each as field name -> value.
        notes: what else the user should know.
        files: the weights files.
        tensors: how many tensors they hold.
        parameters: how many numbers these tensors have.
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
        """Return the folder with the verdict."""
        verdict = {True: "sound", False: "not sound", None: "could not tell"}[self.sound]
        return printable(f"{self.folder}: {verdict}")

    def lines(self) -> Iterator[str]:
        """Yield what is in the folder, what is wrong with it, and notes."""
        size = f"{self.tensors:,} tensors, {self.parameters:,} parameters, "
        count = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        yield printable(f"  {self.model or 'no class'}: {size}{count}")
        if self.why_not is not None:
            yield printable(f"  {self.why_not}")
        yield from (printable(f"  {cause.text}") for cause in self.causes)
        yield from (printable(f"  note: {note}") for note in self.notes)


@dataclass(frozen=True, repr=False)
class RepairReport(Report):
    """What repairing a folder's config did.

    Attributes:
        folder: the folder with the repaired config; for a dry run the one that was looked at.
        fields: config field -> (old value, new value); ``None`` stands for not set.
        difference: the unified diff of the two files; empty: nothing to change.
        written: True if a config was written.
        backup: the name of the old config's file; ``None``: none was needed.
        undecided: names of the fields that no shape shows; they were left as they are.
        notes: what else the user should know.
        after: the report on the folder as it is now or, if nothing was written, would be.
        added: field -> value; fields that repeat others where Transformers 4 reads them.
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
        """Return the folder with what was done."""
        done = "repaired" if self.written else "not written (dry run)"
        if not self.difference:
            done = "config.json says what the weights are; nothing to repair"
        return f"{self.folder}: {done}"

    def lines(self) -> Iterator[str]:
        """Yield the fields that change, notes, and the difference of the two files."""
        for name, (old, new) in self.fields.items():
            yield f"  {printable(name)}: {number(old)} -> {number(new)}"
        for name, value in self.added.items():
            yield (
                f"  {printable(name)}: {number(value)}, for readers that stand on Transformers 4"
            )
        if self.backup is not None:
            yield f"  the old config is in {self.backup}"
        if self.undecided and self.difference:
            yield f"  no shape shows {', '.join(self.undecided)}: left as it is"
        yield from (f"  note: {note}" for note in self.notes)
        if self.difference:
            yield self.difference


@dataclass(frozen=True)
class Difference:
    """One output that is not the same in both runs.

    Attributes:
        output: the name of the output.
        elements: how many numbers differ; all of them if the shapes differ.
        of: how many numbers there are.
        largest: the largest absolute difference, not finite if a number is NaN or infinite in one
            of the outputs; ``None``: the shapes differ, or dtypes that are not floating.
        relative: ``largest`` over the largest finite number in the reference output.
        dtypes: the dtypes of the output and of the reference, where they differ and are floating.
    """

    output: str
    elements: int
    of: int
    largest: float | None = None
    relative: float | None = None
    dtypes: tuple[str, str] | None = None

    def __str__(self) -> str:
        if self.largest is None or self.relative is None:
            return f"{self.output}: another shape or type"
        by = f"by at most {self.largest:.3g} ({self.relative:.3g} of the largest)"
        if not math.isfinite(self.largest):
            by = "some by NaN or infinity"
        dtypes = "" if self.dtypes is None else f"; {self.dtypes[0]}, there {self.dtypes[1]}"
        return f"{self.output}: {self.elements:,} of {self.of:,} numbers differ, {by}{dtypes}"


@dataclass(frozen=True, repr=False)
class RoundtripReport(Report):
    """What loading and running a saved model or a folder in a fresh process showed.

    Attributes:
        what: the folder, or the class that was saved.
        model: the name of the class.
        same: True if it loads without a missing or mismatched weight and computes the same bits, in
            every output some finite number; if there is nothing to compare with: if it loads, runs
            and computes finite numbers.
        loading: what was wrong with loading.
        outputs: the names of the outputs that were looked at.
        differences: the outputs that differ.
        error: why it does not load or run.
        against: what it was compared with; ``None``: nothing.
        notes: what else the user should know.
        numbers: how many numbers were compared.
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
        """Return what was run, with the verdict."""
        done = "loads and runs" if self.against is None else f"same outputs as {self.against}"
        runs = self.error is None and not self.loading
        bad = "computes nothing" if runs else "does not load or run"
        bad = bad if self.against is None else f"not the same as {self.against}"
        return f"{self.what}: {done if self.same else bad} ({self.model}, fresh process)"

    def lines(self) -> Iterator[str]:
        """Yield what is wrong, and notes."""
        yield from (f"  {problem}" for problem in (*self.loading, *self.differences))
        if self.error is not None:
            yield f"  {self.error}"
        yield from (f"  note: {note}" for note in self.notes)
