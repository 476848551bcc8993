"""The cut list: which positions of every parameter remain, and the config before and after.

It is made from a live model or from one on the meta device. :func:`~tp_hf_config.apply_cuts`
applies it where the weights are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
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
from ..model.paging import copied
from ..model.shapes import Shapes
from ..model.tensors import parameter_names, select
from ..reports import short


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


def matrix_of(values: Tensor, dim: int, part: int | None) -> tuple[Tensor, int]:
    """Return a view of one matrix of a stack, and the channel dimension in that matrix."""
    if part is None:
        return values, dim
    stacked = stack_dim(values, dim)
    return values.select(stacked, part), dim - (stacked < dim)


def stack_dim(values: Tensor, dim: int) -> int:
    """Return the stacking dimension of a stack whose matrices have their channels along ``dim``."""
    return next(d for d in range(values.ndim) if d != dim)


_REFITTED = (
    "weights were refitted, but a cut list stores only which channels were removed. Save the "
    "pruned model (save_pretrained), or prune without refit= if you need a cut list"
)


@dataclass(frozen=True)
class Edit:
    """What is done to one tensor: weights are refitted, then positions are removed.

    Attributes:
        kept: dimension -> kept positions (int64, 1-D, increasing), for each dimension that is cut.
        refits: ``None``: weights were refitted, but with what values is not stored, because the
            values are as large as the weights.
    """

    kept: Mapping[int, Tensor]
    refits: tuple[RefitInPlace, ...] | None = ()

    def of(self, values: Tensor) -> Tensor:
        if self.refits is None:
            raise ValueError(_REFITTED)
        if self.refits:
            values = copied(values)
        for refit in self.refits:
            refit.apply(values)
        return select(values, self.kept)

    def shape_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(len(self.kept[d]) if d in self.kept else size for d, size in enumerate(shape))

    def then(self, later: Edit) -> Edit:
        """Combine two edits that store no refits; the later one's positions index the result."""
        kept = dict(self.kept)
        for dim, positions in later.kept.items():
            kept[dim] = kept[dim][positions] if dim in kept else positions
        return Edit(kept, None if None in (self.refits, later.refits) else ())


_NOTHING = Edit({})
_FORMAT = "tp_hf_config cut list 1"
_TABLE, _CHECKSUM = "cut_list", "sha256"


@dataclass(frozen=True)
class CutList:
    """What pruning removed from a model; ``str`` gives one line.

    Attributes:
        model: name of the model class.
        before: config before the cuts, as JSON.
        after: config after the cuts, as JSON.
        edits: name of a parameter or saved buffer -> what is done to it. A tied weight is listed
            under the first of its names.
    """

    model: str
    before: dict[str, Any]
    after: dict[str, Any]
    edits: Mapping[str, Edit]

    def __str__(self) -> str:
        changes = ", ".join(
            f"{field_name(field)} {old} -> {new}" for field, old, new in self.changes()
        )
        refitted = sum(edit.refits != () for edit in self.edits.values())
        return (
            f"{self.model}: {changes or 'the config is unchanged'}; {len(self.edits)} tensors are "
            f"cut{f', {refitted} refitted' if refitted else ''}"
        )

    def __repr__(self) -> str:
        return short(self, str(self))

    @property
    def is_complete(self) -> bool:
        """True if the cut list can be saved and applied: no weight was refitted."""
        return all(edit.refits is not None for edit in self.edits.values())

    def check_complete(self) -> None:
        """Raise if the cut list cannot be saved and applied.

        Raises:
            ValueError: weights were refitted; a cut list stores no refits.
        """
        if not self.is_complete:
            raise ValueError(_REFITTED)

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
        return self.edits[name].of(values) if name in self.edits else values

    def kept(self, name: str) -> dict[int, Tensor]:
        """Return dimension -> kept positions (int64, 1-D) for each dimension that is cut."""
        return dict(self.edits.get(name, _NOTHING).kept)

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
            name: self.edits.get(name, _NOTHING).then(other.edits.get(name, _NOTHING))
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
        keys: dict[bytes, str] = {}

        def stored(positions: Tensor) -> str:  # equal ones once
            positions = positions.cpu().contiguous()
            key = keys.setdefault(positions.numpy().tobytes(), str(len(keys)))
            tensors[key] = positions
            return key

        table = {
            "model": self.model,
            "before": self.before,
            "after": self.after,
            "edits": {
                name: [{"keep": {str(dim): stored(kept) for dim, kept in edit.kept.items()}}]
                for name, edit in self.edits.items()
            },
        }
        head = {"format": _FORMAT, _TABLE: json.dumps(table), _CHECKSUM: _digest(table, tensors)}
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
                if metadata.get("format") != _FORMAT:
                    raise CheckpointError(f"{path}: expected a cut list ({_FORMAT})")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            table = json.loads(metadata.get(_TABLE, "null"))
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {in_one_line(error)}") from error
        try:
            _check_unchanged(table, tensors, metadata.get(_CHECKSUM))
            edits = dict(_edits_in(table, tensors))
        except ValueError as fault:
            raise CheckpointError(
                f"{path}: {fault}. Save it again: hook.cuts.save(path)"
            ) from fault
        return cls(table["model"], table["before"], table["after"], edits)

    def misfit(self, shapes: Shapes) -> str | None:
        """Return why the edits do not fit tensors of these shapes; ``None`` if they do."""
        for name, edit in self.edits.items():
            if name not in shapes:
                return f"it cuts {name}, which the model does not have"
            sizes = shapes[name]
            for dim, kept in edit.kept.items():
                needed = int(kept[-1]) + 1
                if dim >= len(sizes) or needed > sizes[dim]:
                    return (
                        f"it needs {needed} positions along dimension {dim} of {name}, which "
                        f"has shape {list(sizes)}"
                    )
        return None


def _digest(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the table, as canonical JSON, and of all tensors."""
    plain = json.loads(json.dumps(table))  # makes all keys strings
    total = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors, key=lambda key: (len(key), key)):
        values = tensors[name].contiguous()
        total.update(values.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _check_unchanged(table: Any, tensors: Mapping[str, Tensor], checksum: str | None) -> None:
    if checksum is None:
        raise ValueError(f"it has no checksum ({_CHECKSUM}), which every cut list is saved with")
    found = _digest(table, tensors)
    if found != checksum:
        raise ValueError(
            f"it was changed after it was saved: its {_CHECKSUM} is {found[:12]}..., expected "
            f"{checksum[:12]}..."
        )


def _edits_in(table: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Edit]]:
    """Yield the edits of a file's table; raise ``ValueError`` if it does not hold a cut list."""
    kinds = {"model": str, "before": dict, "after": dict, "edits": dict}
    values = table if isinstance(table, dict) else {}
    if values.keys() != kinds.keys() or not all(isinstance(values[k], kinds[k]) for k in kinds):
        raise ValueError(f"expected an object of {', '.join(kinds)}")
    for name, cuts in values["edits"].items():
        try:
            [cut] = cuts
            kept = {int(dim): tensors[key] for dim, key in cut["keep"].items()}
            valid = bool(kept) and min(kept) >= 0 and all(map(_are_positions, kept.values()))
        except (AttributeError, KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(
                f"{name}: expected a list of one cut, dimension numbers with the positions that "
                "are kept: a list of whole numbers, 0 or more, increasing, without duplicates"
            )
        yield name, Edit(kept)


def _are_positions(values: Tensor) -> bool:
    flat = values.ndim == 1 and values.dtype == torch.int64 and len(values) > 0
    return flat and int(values[0]) >= 0 and bool((values.diff() > 0).all())


def edits_of(
    model: nn.Module,
    refits: Mapping[str, Sequence[RefitInPlace]],  # by first name
    kept: Mapping[tuple[str, int], Tensor],  # kept positions
) -> dict[str, Edit]:
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
    return {name: Edit(dims, tuple(refits.get(name, ()))) for name, dims in positions.items()}


def explained(model: nn.Module, edits: Mapping[str, Edit], before: Shapes, after: Shapes) -> bool:
    """True if every tensor of a model has the shape that the edits of a step give."""
    others = {name for _, *tied in parameter_names(model).values() for name in tied}
    return all(
        edits.get(name, _NOTHING).shape_of(before.get(name, ())) == after[name]
        for name in after.keys() - others
    )
