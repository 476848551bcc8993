"""How the names and sizes of a model with few layers map onto those of the full one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, reduce
from typing import Any

from ..model.config_json import EntryOfKind, FieldPath, field_name
from ..model.shapes import Shapes

Numbers = Mapping[str, tuple[int, ...]]
"""Name of a list of layers -> for each of its layers, the number of another layer."""


@dataclass(frozen=True)
class Depth:
    """A config with the fewest layers that contain every kind, and how names map onto it.

    Attributes:
        data: the shallow config's JSON.
        steps: for each change that removed layers: for each layer before it, the number of the
            first remaining layer of its kind.
        first_of_kind: for each layer of the shallow model's lists, the number of the first layer
            of its kind.
        stands_for: for each change: for each remaining layer, the number that a layer of its kind
            had before; a different one for each while there are enough.
        pieces: for each tensor dim around the layers that holds an equal piece for every layer
            (Gemma 4's embedding): how many times as long it is in the full model.
        entries: for each list of numbers with an entry for each layer: the keys of its entries for
            each kind of layer.
    """

    data: dict[str, Any]
    steps: tuple[Numbers, ...] = ()
    first_of_kind: Numbers = dataclasses.field(default_factory=dict)
    stands_for: tuple[Numbers, ...] = ()
    pieces: Mapping[tuple[str, int], Fraction] = dataclasses.field(default_factory=dict)
    entries: Mapping[FieldPath, tuple[EntryOfKind, ...]] = dataclasses.field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def canonical(self, name: str) -> str:
        """Return the shallow model's name for a tensor or module of the full model."""
        if name not in self._canonical:
            self._canonical[name] = reduce(renumbered, self.steps, name)
        return self._canonical[name]

    @cached_property
    def _canonical(self) -> dict[str, str]:
        """Cache: a deep model's names are asked for often."""
        return {}

    @property
    def entry_names(self) -> list[str]:
        """The fields in ``entries`` as people write them: ``intermediate_size[0-3]``."""
        return [field_name((*field, key)) for field, keys in self.entries.items() for key in keys]

    def by_kinds(self, values: Mapping[FieldPath, int]) -> dict[FieldPath, int]:
        """Return fields with their values, with one field for all entries of each kind of layer."""
        result: dict[FieldPath, int] = {}
        for field, value in values.items():
            keys = self.entries.get(field[:-1], field[-1:])
            result.update({(*field[:-1], key): value for key in keys if key == field[-1]})
        return result

    def times(self, name: str, which: int | str) -> Fraction:
        """Return how many times a quantity of the full model is what it is in the shallow one."""
        if isinstance(which, str) or not self.pieces:
            return Fraction(1)
        return self.pieces.get((self.canonical(name), which), Fraction(1))

    def times_outputs(self, shallow_name: str, outputs: int, shallow_shapes: Shapes) -> Fraction:
        """Return how many times as many outputs a layer has in the full model.

        ``shallow_name`` is its name in the shallow model, where it has so many ``outputs``; those
        of an embedding are its weight's last dimension.
        """
        weight = f"{shallow_name}.weight"
        ratios = (
            self.pieces.get((weight, dim))
            for dim, size in enumerate(shallow_shapes.get(weight, ()))
            if size == outputs
        )
        return next((ratio for ratio in ratios if ratio is not None), Fraction(1))

    def with_all_pieces(self, shallow_shapes: Shapes) -> Shapes:
        """Return shapes of the shallow model with the sizes that they have in the full one."""
        full = dict(shallow_shapes)
        for (name, dim), ratio in self.pieces.items():
            if name in full:
                shape = full[name]
                full[name] = (*shape[:dim], int(shape[dim] * ratio), *shape[dim + 1 :])
        return full

    def first(self, name: str) -> str:
        """Return a shallow model's name as it is in the first layer of the same kind.

        A layer of the shallow model need not have the number that it has in the full one.
        """
        return renumbered(name, self.first_of_kind)

    def origin(self, name: str) -> str:
        """Return the full model's name for a tensor or module of the shallow model."""
        for step in reversed(self.stands_for):
            name = renumbered(name, step, new=True)
        return name


def renumbered(name: str, numbers: Numbers, new: bool = False) -> str:
    """Return a name with other numbers of layers.

    ``numbers`` names lists as ``name`` does if ``new``, otherwise as the returned name does.
    """
    if not numbers:
        return name
    parts: list[str] = []
    prefix: list[str] = []
    for part in name.split("."):
        list_numbers = numbers.get(".".join(prefix))
        number = (
            str(list_numbers[int(part)]) if list_numbers is not None and part.isdigit() else part
        )
        parts.append(number)
        prefix.append(part if new else number)
    return ".".join(parts)
