"""The cut list: which positions of every parameter remain, and the config before and after.

It is made from a live model or from one on the meta device. :func:`~tp_hf_config.apply_cuts`
applies it where the weights are.

Two kinds of edits are made to a parameter: positions are selected, or a weight is refitted.
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
from ..errors import CheckpointError, ConfigSyncError, in_one_line
from ..model.config_json import changed_values, field_name
from ..model.files import write_whole
from ..model.paging import in_file
from ..model.shapes import Shapes
from ..model.tensors import parameter_names, select
from ..reports import short


@dataclass(frozen=True)
class Selection:
    """Keeps some positions along some dimensions."""

    positions: Mapping[int, Tensor]  # dimension -> kept positions, 1-D

    def of(self, values: Tensor) -> Tensor:
        return select(values, self.positions)

    def then(self, other: Selection) -> Selection:
        """Combine this selection with a later one, whose positions index this one's result."""
        positions = dict(self.positions)
        for dim, kept in other.positions.items():
            positions[dim] = positions[dim][kept] if dim in positions else kept
        return Selection(positions)


@dataclass(frozen=True)
class Refit:
    """How a weight that reads channels makes up for the removed ones."""

    kept: Tensor  # kept channels, 1-D
    targets: Tensor  # channels that are estimated from the kept ones, 1-D
    share: Tensor  # weight of each kept channel in each target, ``(kept, targets)``
    size: int  # number of channels before the cut

    def estimate(self, rows: Tensor) -> Tensor:
        """Estimate all channels from the kept ones: ``(tokens, kept)`` -> ``(tokens, size)``."""
        full = plain_cut(rows, self.kept, self.size)
        share = self.share.to(rows)
        full.index_add_(1, self.targets.to(rows.device), rows @ share)
        return full

    def of(self, weight: Tensor, dim: int) -> Tensor:
        """Return the refitted weight, which reads the kept channels along ``dim`` only."""
        last = weight.movedim(dim, -1)
        exact = torch.promote_types(weight.dtype, torch.float32)
        kept = last.index_select(-1, self.kept.to(weight.device)).to(exact)
        gone = last.index_select(-1, self.targets.to(weight.device)).to(exact)
        kept = kept + gone @ self.share.to(kept).T
        return kept.to(weight.dtype).movedim(-1, dim).contiguous()


def plain_cut(rows: Tensor, kept: Tensor, size: int) -> Tensor:
    """Set the removed channels to zero: ``(tokens, kept)`` -> ``(tokens, size)``."""
    full = rows.new_zeros(len(rows), size)
    full[:, kept.to(rows.device)] = rows
    return full


@dataclass(frozen=True)
class RefitInPlace:
    """Writes refitted weights to the kept channels; the parameter's shape does not change."""

    dim: int  # dimension of the channels
    part: int | None  # index of the matrix in a stack (an expert); None: no stack
    refit: Refit

    def apply(self, values: Tensor) -> None:
        matrix, dim = matrix_of(values, self.dim, self.part)
        kept = self.refit.kept.to(values.device)
        matrix.index_copy_(dim, kept, self.refit.of(matrix, dim))


@dataclass(frozen=True)
class NotKept:
    """Marks a refit whose values are not stored, because they are as large as the weight."""

    def of(self, values: Tensor) -> Tensor:
        raise ValueError(REFITTED)


REFITTED = (
    "weights were refitted, but a cut list stores only which channels were removed. Save the "
    "pruned model (save_pretrained), or prune without refit= if you need a cut list"
)
Edit = Selection | RefitInPlace | NotKept


def edited(values: Tensor, edits: Iterable[Edit]) -> Tensor:
    own = False  # a stack is copied once for all of its matrices
    for edit in edits:
        if isinstance(edit, RefitInPlace):
            values = values if own else _copy(values)
            edit.apply(values)
        else:
            values = edit.of(values)
        own = True
    return values


def _copy(values: Tensor) -> Tensor:
    paged = in_file(values)  # a new file-backed tensor while paging, else ``values`` itself
    return values.clone() if paged is values else paged


def matrix_of(values: Tensor, dim: int, part: int | None) -> tuple[Tensor, int]:
    """Return a view of one matrix of a stack, and the channel dimension in that matrix."""
    if part is None:
        return values, dim
    stacked = stack_dim(values, dim)
    return values.select(stacked, part), dim - (stacked < dim)


def stack_dim(values: Tensor, dim: int) -> int:
    """Return the stacking dimension of a stack whose matrices have their channels along ``dim``."""
    return next(d for d in range(values.ndim) if d != dim)


FORMAT = "tp_hf_config cut list 1"
_TABLE, _CHECKSUM = "cut_list", "sha256"


@dataclass(frozen=True)
class CutList:
    """What pruning removed from a model; ``str`` gives one line.

    Attributes:
        model: name of the model class.
        before: config before the cuts, as JSON.
        after: config after the cuts, as JSON.
        edits: name of a parameter or saved buffer -> its edits, in order. A tied weight is listed
            under the first of its names.
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
        text = (
            f"{self.model}: {changes or 'the config is unchanged'}; {len(self.edits)} tensors are "
            "cut"
        )
        text += f", {refitted} refitted" if refitted else ""
        return text

    def __repr__(self) -> str:
        return short(self, str(self))

    @property
    def is_complete(self) -> bool:
        """True if the cut list can be saved and applied: no weight was refitted."""
        edits = (edit for edits in self.edits.values() for edit in edits)
        return not any(isinstance(edit, NotKept) for edit in edits)

    def check_complete(self) -> None:
        """Raise if the cut list cannot be saved and applied.

        Raises:
            ValueError: weights were refitted; a cut list stores no refits.
        """
        if not self.is_complete:
            raise ValueError(REFITTED)

    def changes(self) -> list[tuple[tuple[Any, ...], Any, Any]]:
        """Return the changed config fields: path, old value, new value."""
        new = dict(changed_values(self.before, self.after))
        old = dict(changed_values(self.after, self.before))
        return [(field, old.get(field), new.get(field)) for field in dict.fromkeys((*new, *old))]

    def of(self, name: str, values: Tensor) -> Tensor:
        """Return a tensor's values after all cuts and refits.

        Args:
            name: name of a parameter or saved buffer.
            values: its values before the cuts, in full.
        """
        return edited(values, self.edits.get(name, ()))

    def kept(self, name: str) -> dict[int, Tensor]:
        """Return dimension -> kept positions (int64, 1-D) for each dimension that is cut."""
        total: dict[int, Tensor] = {}
        for edit in self.edits.get(name, ()):
            for dim, kept in edit.positions.items() if isinstance(edit, Selection) else ():
                total[dim] = total[dim][kept] if dim in total else kept
        return total

    @check_arguments
    def then(self, other: CutList) -> CutList:
        """Return this cut list followed by that of the next step.

        Raises:
            ValueError: the other one is for another class or starts from another config.
        """
        if other.model != self.model or list(changed_values(self.after, other.before)):
            raise ValueError(
                f"the second cut list ({other}) does not start from the class and config with "
                f"which the first one ends ({self})"
            )
        return self.followed_by(other)

    def followed_by(self, other: CutList) -> CutList:
        """Return this cut list followed by another one of the same model, without a check."""
        edits = {
            name: _joined(self.edits.get(name, ()), other.edits.get(name, ()))
            for name in dict.fromkeys((*self.edits, *other.edits))
        }
        return CutList(self.model, self.before, other.after, edits)

    @check_arguments
    def save(self, path: str | PathLike[str]) -> None:
        """Write the cut list to one safetensors file, whose header describes it in JSON.

        Raises:
            ValueError: weights were refitted (:meth:`check_complete`).
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
        """Read a file that :meth:`save` wrote, and check it completely; no code is run.

        Raises:
            CheckpointError: the file cannot be read, is no cut list, or was changed since it was
                saved.
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
            raise CheckpointError(f"{path}: {fault}. Save it again: hook.cuts.save(path)")
        edits = {
            name: tuple(_edit_of(entry, tensors) for entry in entries)
            for name, entries in table["edits"].items()
        }
        return cls(table["model"], table["before"], table["after"], edits)

    def misfit(self, shapes: Shapes) -> str | None:
        """Return why the edits do not fit tensors of these shapes; ``None`` if they do."""
        for name, edits in self.edits.items():
            if name not in shapes:
                return f"it cuts {name}, which the model does not have"
            sizes = list(shapes[name])
            for edit in edits:
                for dim, kept in edit.positions.items() if isinstance(edit, Selection) else ():
                    needed = int(kept[-1]) + 1
                    if dim >= len(sizes) or needed > sizes[dim]:
                        return (
                            f"it needs {needed} positions along dimension {dim} of {name}, which "
                            f"has shape {sizes}"
                        )
                    sizes[dim] = len(kept)
        return None


def _digest(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the table, as canonical JSON, and of all tensors."""
    plain = json.loads(json.dumps(table))  # makes all keys strings
    total = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors, key=lambda key: (len(key), key)):
        values = tensors[name].contiguous()
        total.update(values.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _not_as_saved(table: Any, tensors: Mapping[str, Tensor], checksum: str | None) -> str | None:
    if checksum is None:
        return f"it has no checksum ({_CHECKSUM}), which every cut list is saved with"
    found = _digest(table, tensors)
    if found != checksum:
        return (
            f"it was changed after it was saved: its {_CHECKSUM} is {found[:12]}..., expected "
            f"{checksum[:12]}..."
        )
    return None


def _fault(table: Any, tensors: Mapping[str, Tensor]) -> str | None:
    kinds = {"model": str, "before": dict, "after": dict, "edits": dict}
    if not _has(table, kinds):
        return f"expected an object of {', '.join(kinds)}"
    for name, entries in table["edits"].items():
        if not isinstance(entries, list):
            return f"{name}: expected a list of cuts"
        for entry in entries:
            fault = _fault_of(entry, tensors)
            if fault is not None:
                return f"{name}: {fault}"
    return None


def _fault_of(entry: Any, tensors: Mapping[str, Tensor]) -> str | None:
    if _has(entry, {"keep": dict}):
        positions = entry["keep"]
        if not positions or not all(dim.isdecimal() for dim in positions):
            return "expected dimension numbers with the positions that are kept"
        return next(filter(None, (_not_rising(key, tensors) for key in positions.values())), None)
    return "expected the positions that are kept"


def _has(data: Any, kinds: Mapping[str, Any]) -> bool:
    return (
        isinstance(data, dict)
        and data.keys() == kinds.keys()
        and all(isinstance(data[key], kind) for key, kind in kinds.items())
    )


def _not_rising(key: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """Return why a tensor is not a list of positions: int64, rising, from 0 on."""
    values = tensors.get(key) if isinstance(key, str) else None
    if values is None or values.ndim != 1 or values.dtype != torch.int64 or not len(values):
        return "expected positions, a list of whole numbers"
    if int(values[0]) < 0 or not bool((values.diff() > 0).all()):
        return "positions have to increase, without duplicates, and be 0 or more"
    return None


def _joined(first: tuple[Edit, ...], second: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """Concatenate edits; merge neighbouring selections into one."""
    edits: list[Edit] = []
    for edit in (*first, *second):
        if edits and isinstance(edit, Selection) and isinstance(edits[-1], Selection):
            edits[-1] = edits[-1].then(edit)
        elif not isinstance(edit, NotKept) or edit not in edits:
            edits.append(edit)
    return tuple(edits)


def _described(edit: Edit, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return an edit as JSON; add its tensors to ``tensors``, equal ones once."""

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
    return Selection({int(dim): tensors[key] for dim, key in entry["keep"].items()})


def edits_of(
    model: nn.Module,
    refits: Mapping[str, Iterable[RefitInPlace]],  # by first name
    kept: Mapping[tuple[str, int], Tensor],  # kept positions
) -> dict[str, tuple[Edit, ...]]:
    """Return the edits of each parameter and saved buffer, by its first name."""
    first = {alias: names[0] for names in parameter_names(model).values() for alias in names}
    positions: dict[str, dict[int, Tensor]] = {}
    for (name, dim), stays in kept.items():
        of_first = positions.setdefault(first.get(name, name), {}).setdefault(dim, stays)
        if of_first is not stays and not of_first.equal(stays):
            raise ConfigSyncError(
                f"{name} and {first[name]} are tied, one weight under two names, but would lose "
                "different channels. Nothing is pruned."
            )
    return {name: (*refits.get(name, ()), Selection(dims)) for name, dims in positions.items()}


def explained(
    model: nn.Module, edits: Mapping[str, Iterable[Edit]], before: Shapes, after: Shapes
) -> bool:
    """True if every tensor of a model has the shape that the edits of a step give."""
    others = {name for _, *tied in parameter_names(model).values() for name in tied}
    for name in after.keys() - others:
        expected = list(before.get(name, ()))
        for edit in edits.get(name, ()):
            for dim, kept in edit.positions.items() if isinstance(edit, Selection) else ():
                expected[dim] = len(kept)
        if tuple(expected) != after[name]:
            return False
    return True
