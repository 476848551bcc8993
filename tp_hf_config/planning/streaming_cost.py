"""Foretell what it takes to prune a model from folder to folder, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from torch import nn

from ..fieldmap.field_map import FieldMap
from ..model.config_json import FieldPath

_PROCESS = 600 * 2**20  # bytes that a process with torch and Transformers has
_COPIES = 3  # of the largest tensor: as read, as cut, and as its importance is computed


@dataclass(frozen=True)
class StreamingCost:
    """What ``tp-hf-config prune --importance magnitude`` takes, in bytes.

    Attributes:
        read: read from files: for the importances, for the cut, and for the proof.
        written: written to files.
        memory: the most that the process holds.
    """

    read: int
    written: int
    memory: int

    def to_dict(self) -> dict[str, int]:
        """Return the cost as a dict for ``json.dumps``."""
        return asdict(self)


def streaming_cost(
    field_map: FieldMap,
    full: nn.Module,
    widths: Iterable[Collection[FieldPath]],
    steps: int,
    bytes_after: int,
) -> StreamingCost:
    """Return what pruning a model by magnitude takes, folder to folder.

    Args:
        field_map: the field map of the class.
        full: the class with all layers, on the meta device.
        widths: the fields of each width that is pruned.
        steps: the number of steps; each ranks anew.
        bytes_after: the bytes of the pruned model.
    """
    matrices = {
        name: parameter for name, parameter in full.named_parameters() if parameter.ndim > 1
    }
    ranked = sum(
        parameter.nbytes
        for fields in widths
        for name, parameter in matrices.items()
        for dim in range(parameter.ndim)
        if field_map.fields_of(name, dim) & set(fields)
    )
    whole = sum(parameter.nbytes for parameter in full.parameters())
    largest = max((parameter.nbytes for parameter in full.parameters()), default=0)
    return StreamingCost(
        steps * ranked + 2 * whole + bytes_after, bytes_after, _PROCESS + _COPIES * largest
    )
