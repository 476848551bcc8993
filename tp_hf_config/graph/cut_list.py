"""What a step of a pruner comes to: which positions of every parameter stay, and the configs.

A cut list is made from a live model, or from one without weights.  Whoever holds the weights makes
the pruned model, or the pruned folder, of them by it (:func:`~tp_hf_config.apply_cuts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..arguments import check_arguments
from ..checkpoint.writing import write_whole
from ..errors import CheckpointError, in_one_line
from ..model.config_json import changed_values, field_name
from ..model.shapes import Shapes
from ..model.tensors import parameter_names
from ..reports import short
from .edits import REFITTED, Edit, NotKept, RefitInPlace, Selection, edited

FORMAT = "tp_hf_config cut list 1"
_TABLE, _CHECKSUM = "cut_list", "sha256"


@dataclass(frozen=True)
class CutList:
    """What was cut from a model; ``str`` gives a line.

    Attributes:
        model: the name of the class.
        before: the config before, as JSON.
        after: the config afterwards, as JSON.
        edits: name of a parameter or saved buffer -> what is done to it, in order. A tied weight
            has the first of its names.
    """

    model: str
    before: dict[str, Any]
    after: dict[str, Any]
    edits: Mapping[str, tuple[Edit, ...]]

    def __str__(self) -> str:
        changes = ", ".join(
            f"{field_name(field)} {old} -> {new}" for field, old, new in self.changes()
        )
        refitted = sum(
            any(not isinstance(edit, Selection) for edit in edits) for edits in self.edits.values()
        )
        text = f"{self.model}: {changes or 'the config stays'}; {len(self.edits)} tensors are cut"
        text += f", {refitted} refitted" if refitted else ""
        return text

    def __repr__(self) -> str:
        return short(self, str(self))

    @property
    def is_complete(self) -> bool:
        """True if it can be saved and carried out: no weight was refitted."""
        edits = (edit for edits in self.edits.values() for edit in edits)
        return not any(isinstance(edit, NotKept) for edit in edits)

    def check_complete(self) -> None:
        """Raise if it cannot be saved and carried out.

        Raises:
            ValueError: weights were refitted: a cut list holds cuts alone.
        """
        if not self.is_complete:
            raise ValueError(REFITTED)

    def changes(self) -> list[tuple[tuple[Any, ...], Any, Any]]:
        """Return the config fields that change: path, old value, new value."""
        new = dict(changed_values(self.before, self.after))
        old = dict(changed_values(self.after, self.before))
        return [(field, old.get(field), new.get(field)) for field in dict.fromkeys((*new, *old))]

    def of(self, name: str, values: Tensor) -> Tensor:
        """Return the values that a tensor has after all cuts and refits.

        Args:
            name: the name of a parameter or saved buffer.
            values: its values before, all of them.
        """
        return edited(values, self.edits.get(name, ()))

    def kept(self, name: str) -> dict[int, Tensor]:
        """Return, for each dimension of a tensor that is cut, the positions that stay.

        Dimensions that are not cut are left out. Positions are whole numbers, 1-D.
        """
        total: dict[int, Tensor] = {}
        for edit in self.edits.get(name, ()):
            for dim, kept in edit.positions.items() if isinstance(edit, Selection) else ():
                total[dim] = total[dim][kept] if dim in total else kept
        return total

    @check_arguments
    def then(self, other: CutList) -> CutList:
        """Return this cut list followed by that of the next step.

        Raises:
            ValueError: the other one starts from another config.
        """
        if other.model != self.model or list(changed_values(self.after, other.before)):
            raise ValueError(f"{other} does not start where {self} ends")
        return self.followed_by(other)

    def followed_by(self, other: CutList) -> CutList:
        """Return this cut list followed by one of the same model, which is not asked."""
        edits = {
            name: _joined(self.edits.get(name, ()), other.edits.get(name, ()))
            for name in dict.fromkeys((*self.edits, *other.edits))
        }
        return CutList(self.model, self.before, other.after, edits)

    @check_arguments
    def save(self, path: str | PathLike[str]) -> None:
        """Write the cut list as one safetensors file; its header says what is what, in JSON.

        Raises:
            ValueError: see :meth:`check_complete`.
        """
        self.check_complete()
        tensors: dict[str, Tensor] = {}
        table = {
            "model": self.model,
            "before": self.before,
            "after": self.after,
            "edits": {
                name: [_described(edit, tensors) for edit in edits]
                for name, edits in self.edits.items()
            },
        }
        head = {"format": FORMAT, _TABLE: json.dumps(table), _CHECKSUM: _digest(table, tensors)}
        write_whole(Path(path), lambda part: save_file(tensors, part, head))

    @classmethod
    @check_arguments
    def load(cls, path: str | PathLike[str]) -> CutList:
        """Read a cut list that :meth:`save` wrote, and check all of it; no code is run.

        Raises:
            CheckpointError: the file cannot be read, is no cut list, or is not as it was saved.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CheckpointError(f"{path}: expected a cut list ({FORMAT})")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            table = json.loads(metadata.get(_TABLE, "null"))
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {in_one_line(error)}") from error
        fault = _not_as_saved(table, tensors, metadata.get(_CHECKSUM)) or _fault(table, tensors)
        if fault is not None:
            raise CheckpointError(f"{path}: {fault}. Save it anew: hook.cuts.save(path)")
        edits = {
            name: tuple(_edit_of(entry, tensors) for entry in entries)
            for name, entries in table["edits"].items()
        }
        return cls(table["model"], table["before"], table["after"], edits)

    def misfit(self, shapes: Shapes) -> str | None:
        """Return why it cannot be carried out on tensors of these shapes; ``None``: it can."""
        for name, edits in self.edits.items():
            if name not in shapes:
                return f"it cuts {name}, which the model does not have"
            sizes = list(shapes[name])
            for edit in edits:
                for dim, kept in edit.positions.items() if isinstance(edit, Selection) else ():
                    needed = int(kept[-1]) + 1
                    if dim >= len(sizes) or needed > sizes[dim]:
                        return (
                            f"it needs {needed} positions along dimension {dim} of {name}: {sizes}"
                        )
                    sizes[dim] = len(kept)
        return None


def _digest(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of what is what, as canonical JSON, and of the tensors in their order."""
    plain = json.loads(json.dumps(table))  # keys are texts
    total = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors, key=lambda key: (len(key), key)):
        values = tensors[name].contiguous()
        total.update(values.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _not_as_saved(table: Any, tensors: Mapping[str, Tensor], checksum: str | None) -> str | None:
    """Return why a file is not as :meth:`CutList.save` wrote it; ``None``: it is."""
    if checksum is None:
        return f"it has no checksum ({_CHECKSUM}), which every cut list is saved with"
    found = _digest(table, tensors)
    if found != checksum:
        return (
            f"it was changed after it was saved: its {_CHECKSUM} is {found[:12]}..., and it says "
            f"{checksum[:12]}..."
        )
    return None


def _fault(table: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with a cut list's JSON or with the tensors it names; ``None``: none."""
    kinds = {"model": str, "before": dict, "after": dict, "edits": dict}
    if not _has(table, kinds):
        return f"expected an object of {', '.join(kinds)}"
    for name, entries in table["edits"].items():
        if not isinstance(entries, list):
            return f"{name}: expected a list of what is done to it"
        for entry in entries:
            fault = _fault_of(entry, tensors)
            if fault is not None:
                return f"{name}: {fault}"
    return None


def _fault_of(entry: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the JSON of one edit."""
    if _has(entry, {"keep": dict}):
        positions = entry["keep"]
        if not positions or not all(dim.isdecimal() for dim in positions):
            return "expected the dimensions of which positions are kept"
        return next(filter(None, (_not_rising(key, tensors) for key in positions.values())), None)
    return "expected what is kept"


def _has(data: Any, kinds: Mapping[str, Any]) -> bool:
    """True if data is an object of these keys with values of these types."""
    return (
        isinstance(data, dict)
        and data.keys() == kinds.keys()
        and all(isinstance(data[key], kind) for key, kind in kinds.items())
    )


def _not_rising(key: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """Return why a tensor does not hold positions: whole numbers from 0 on, each once, rising."""
    values = tensors.get(key) if isinstance(key, str) else None
    if values is None or values.ndim != 1 or values.dtype != torch.int64 or not len(values):
        return "expected positions, a list of whole numbers"
    if int(values[0]) < 0 or not bool((values.diff() > 0).all()):
        return "positions have to rise from 0 on, each there once"
    return None


def _joined(first: tuple[Edit, ...], second: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """Return edits one after the other; selections of positions become one."""
    edits: list[Edit] = []
    for edit in (*first, *second):
        if edits and isinstance(edit, Selection) and isinstance(edits[-1], Selection):
            edits[-1] = edits[-1].then(edit)
        elif not isinstance(edit, NotKept) or edit not in edits:
            edits.append(edit)
    return tuple(edits)


def _described(edit: Edit, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return an edit as JSON; its tensors are added to ``tensors``, equal positions once."""

    def stored(values: Tensor) -> str:
        values = values.detach().cpu().contiguous()
        for name, other in tensors.items():
            if torch.equal(other, values):
                return name
        tensors[str(len(tensors))] = values
        return str(len(tensors) - 1)

    assert isinstance(edit, Selection)  # check_complete
    return {"keep": {str(dim): stored(kept) for dim, kept in edit.positions.items()}}


def _edit_of(entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    """Return the edit that :func:`_described` described."""
    return Selection({int(dim): tensors[key] for dim, key in entry["keep"].items()})


def edits_of(
    model: nn.Module,
    refits: Mapping[str, Iterable[RefitInPlace]],
    kept: Mapping[tuple[str, int], Tensor],
) -> dict[str, tuple[Edit, ...]]:
    """Return what is done to each parameter and saved buffer of a model, by its first name.

    Args:
        model: the model.
        refits: the refits of parameters, by their first names.
        kept: name and dimension -> the positions that stay; tied names lose the same.
    """
    first = {alias: names[0] for names in parameter_names(model).values() for alias in names}
    positions: dict[str, dict[int, Tensor]] = {}
    for (name, dim), stays in kept.items():
        positions.setdefault(first.get(name, name), {})[dim] = stays
    return {name: (*refits.get(name, ()), Selection(dims)) for name, dims in positions.items()}


def explained(
    model: nn.Module, edits: Mapping[str, Iterable[Edit]], before: Shapes, after: Shapes
) -> bool:
    """True if every tensor of a model has the shape that the edits leave.

    Args:
        model: the model after its step.
        edits: what was done, by name.
        before: the shapes before the step.
        after: the shapes afterwards.
    """
    others = {name for _, *tied in parameter_names(model).values() for name in tied}
    for name in after.keys() - others:
        expected = list(before.get(name, ()))
        for edit in edits.get(name, ()):
            for dim, kept in edit.positions.items() if isinstance(edit, Selection) else ():
                expected[dim] = len(kept)
        if tuple(expected) != after[name]:
            return False
    return True
