"""Report what was found in a folder and what was done to it, as text, HTML and JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from .. import notebook
from ..schema import dated
from .words import number, printable

Kind = Literal["files", "config", "field", "tensors"]


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
        return notebook.short(self, self.text)


@dataclass(frozen=True)
class CheckReport:
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

    def __str__(self) -> str:
        verdict = {True: "sound", False: "not sound", None: "could not tell"}[self.sound]
        size = f"{self.tensors:,} tensors, {self.parameters:,} parameters, "
        count = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        lines = [f"{self.folder}: {verdict}", f"  {self.model or 'no class'}: {size}{count}"]
        if self.why_not is not None:
            lines.append(f"  {self.why_not}")
        lines += [f"  {cause.text}" for cause in self.causes]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(map(printable, lines))

    def __repr__(self) -> str:
        return notebook.short(self, str(self))

    def _repr_html_(self) -> str:
        head = ("config field", "config says", "weights hold", "cause")
        return notebook.report(
            str(replace(self, causes=())), notebook.table(head, list(map(_row, self.causes)))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report for ``json.dumps``."""
        return dated(asdict(self))


@dataclass(frozen=True)
class RepairReport:
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

    def __str__(self) -> str:
        if not self.difference:
            head = "config.json says what the weights are; nothing to repair"
        else:
            head = "repaired" if self.written else "not written (dry run)"
        lines = [f"{self.folder}: {head}"]
        lines += [
            f"  {printable(name)}: {number(old)} -> {number(new)}"
            for name, (old, new) in self.fields.items()
        ]
        lines += [
            f"  {printable(name)}: {number(value)}, for readers that stand on Transformers 4"
            for name, value in self.added.items()
        ]
        if self.backup is not None:
            lines.append(f"  the old config is in {self.backup}")
        if self.undecided and self.difference:
            lines.append(f"  no shape shows {', '.join(self.undecided)}: left as it is")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines + ([self.difference] if self.difference else []))

    def __repr__(self) -> str:
        return notebook.short(self, str(self))

    def _repr_html_(self) -> str:
        rows = [(name, number(old), number(new)) for name, (old, new) in self.fields.items()]
        fields = notebook.table(("config field", "old", "new"), rows)
        rest = str(replace(self, fields={})).removesuffix(self.difference)
        return notebook.report(rest, fields) + notebook.verbatim(self.difference)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for ``json.dumps``."""
        report = asdict(self)
        report["fields"] = {n: {"old": old, "new": new} for n, (old, new) in self.fields.items()}
        return dated(report)


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

    def to_dict(self) -> dict[str, Any]:
        """Return the difference for ``json.dumps``: JSON has no NaN and no infinity."""
        data = asdict(self)
        for name in ("largest", "relative"):
            if data[name] is not None and not math.isfinite(data[name]):
                data[name] = None
        return data


@dataclass(frozen=True)
class RoundtripReport:
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

    def __str__(self) -> str:
        done = "loads and runs" if self.against is None else f"same outputs as {self.against}"
        runs = self.error is None and not self.loading
        bad = "computes nothing" if runs else "does not load or run"
        bad = bad if self.against is None else f"not the same as {self.against}"
        lines = [f"{self.what}: {done if self.same else bad} ({self.model}, fresh process)"]
        lines += [f"  {problem}" for problem in (*self.loading, *self.differences)]
        if self.error is not None:
            lines.append(f"  {self.error}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return notebook.short(self, str(self))

    def _repr_html_(self) -> str:
        head = ("output", "numbers that differ", "of", "by at most", "of the largest")
        rows = [
            (d.output, f"{d.elements:,}", f"{d.of:,}", _digits(d.largest), _digits(d.relative))
            for d in self.differences
        ]
        return notebook.report(str(replace(self, differences=())), notebook.table(head, rows))

    def to_dict(self) -> dict[str, Any]:
        """Return the report for ``json.dumps``."""
        return dated({**asdict(self), "differences": [one.to_dict() for one in self.differences]})


def _row(cause: Cause) -> tuple[str, ...]:
    """Return a cause as a row of the table of causes."""
    if cause.field is None:
        return "", "", "", printable(cause.text)
    holds = "" if cause.holds is None else number(cause.holds)
    return printable(cause.field), number(cause.says), holds, printable(cause.text)


def _digits(value: float | None) -> str:
    """Return a difference with three digits, or what ``None`` stands for."""
    if value is None:
        return "another shape or type"
    return f"{value:.3g}" if math.isfinite(value) else "NaN or infinity"
