"""Which config fields set which dimensions of a class, and what it builds at other values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import nn

from ..forward.find_recipe import dry_pass
from ..forward.head_splits import HeadSplits
from ..forward.run_recipe import PLAIN, RunRecipe
from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, with_values
from ..model.shapes import Shapes, shapes
from .depth import Depth
from .expressions import Expression, Power, Quantity, followed


@dataclass(frozen=True, eq=False)
class FieldMap:
    """Which config fields set which dimensions of a class, learned around one config.

    Attributes:
        builder: builds the class.
        data: the config's JSON when the field map was learned, with every default.
        values: the fields that set something, with the value that ``data`` has or implies.
        unset: the fields of ``values`` that ``data`` leaves to a default (``None`` or absent).
        expressions: for each quantity of the shallow model, how the fields make it.
        depth: the shallow config, and how names map onto it.
        splits: how the forward pass splits the shallow model's outputs into heads.
        must_equal: field -> the field whose value it has to have too (OPT's
            ``word_embed_proj_dim`` and ``hidden_size``: if they differ, the class builds other
            layers).
        ratio_partners: fields that the class accepts no other value of alone -> the fields that
            may change in proportion with each (Mamba 2: hidden size times ``expand`` is heads
            times head dim).
        ratio_rules: one field of each such proportion -> how it follows from the others.
        sizes: ``values``, and fields that set dimensions along no straight line (an image's size).
        powers: quantities along no straight line that are powers of fields (hidden over heads).
        unfitted: quantities that are neither (rounded ones) -> the fields that change them.
        non_size_fields: other whole numbers that the class reads and that set no quantity.
        recipe: how the class is run with this config.
        digest: of the class's code, the key of the cache on disk; None: it is not stored there.
    """

    builder: Builder
    data: dict[str, Any]
    values: dict[FieldPath, int]
    unset: frozenset[FieldPath]
    expressions: dict[Quantity, Expression]
    depth: Depth
    splits: HeadSplits
    must_equal: dict[FieldPath, FieldPath] = dataclasses.field(default_factory=dict)
    ratio_partners: dict[FieldPath, tuple[FieldPath, ...]] = dataclasses.field(default_factory=dict)
    ratio_rules: dict[FieldPath, Power] = dataclasses.field(default_factory=dict)
    sizes: dict[FieldPath, int] = dataclasses.field(default_factory=dict)
    powers: dict[Quantity, Power] = dataclasses.field(default_factory=dict)
    unfitted: dict[Quantity, frozenset[FieldPath]] = dataclasses.field(default_factory=dict)
    non_size_fields: dict[FieldPath, int] = dataclasses.field(default_factory=dict)
    recipe: RunRecipe = PLAIN
    digest: str | None = None

    def count_fields(self) -> frozenset[FieldPath]:
        """Return the fields that set into how many heads a layer's output is split."""
        return frozenset(
            field
            for (_, which), expression in self.expressions.items()
            if isinstance(which, str)
            for field in expression.fields
        )

    def moves_shapes(self, field: FieldPath) -> bool:
        """True if a field sets some tensor dim, so that the tensor's shape shows its value."""
        return any(
            isinstance(which, int) and field in expression.fields
            for (_, which), expression in self.expressions.items()
        )

    def config_at(self, values: Mapping[FieldPath, int], shallow: bool = True) -> dict[str, Any]:
        """Return the config's JSON with some fields at other values; fields that follow change too.

        Fields that must equal one of these follow, and so do fields in proportion. Unset fields are
        written out with the values that they imply, so that they do not follow others.
        """
        full = {field: self.values[field] for field in self.unset}
        full.update({**values, **followed(self.ratio_rules, values)})
        for follower, leader in self.must_equal.items():
            if leader in values:
                full[follower] = values[leader]
        return with_values(self.depth.data if shallow else self.data, full)

    def build_at(self, values: Mapping[FieldPath, int]) -> nn.Module | Refusal:
        """Build the shallow model on the meta device with some fields at other values."""
        return self.builder.build(self.config_at(values))

    def shapes_at(self, values: Mapping[FieldPath, int]) -> Shapes | Refusal:
        """Return the shapes of the shallow model with some fields at other values."""
        return self.builder.shapes_at(self.config_at(values))

    @cached_property
    def remembered(self) -> dict[Any, Any]:
        """What experiments with this field map found, by its kind; it is gone when the map is."""
        return {}

    @cached_property
    def unpruned(self) -> nn.Module | Refusal:
        """The shallow model as it was learned, or the class's refusal."""
        return self.build_at({})

    @cached_property
    def runs(self) -> bool:
        """True if the shallow model completes a forward pass without data, in float32."""
        model = self.build_at({})
        if isinstance(model, Refusal):
            return False
        return not isinstance(dry_pass(model.float(), self.recipe), Refusal)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the shallow model."""
        return {} if isinstance(self.unpruned, Refusal) else shapes(self.unpruned)

    def splits_of(self, name: str) -> tuple[tuple[int, ...], ...] | None:
        """Return how an output of the full model's layer is split into heads, or None if it is not.

        There is one ``(heads, head_dim)`` or ``(heads, parts, head_dim)`` for each piece of the
        output.
        """
        return self.full_splits(self.depth.canonical(name))

    def full_splits(self, shallow_name: str) -> tuple[tuple[int, ...], ...] | None:
        """Return :meth:`splits_of` the full model's layer that has this name in the shallow one.

        An output that holds a piece for each layer is split into more of them there.
        """
        splits = self.splits.heads.get(shallow_name)
        if splits is None or not self.depth.pieces:
            return splits
        ratio = self.depth.times_outputs(shallow_name, sum(map(prod, splits)), self.shapes)
        return tuple((int(heads * ratio), *sizes) for heads, *sizes in splits)

    def fields_of(self, name: str, which: int | str) -> frozenset[FieldPath]:
        """Return the fields that set one quantity of the full model; empty if none does.

        ``which`` is the dimension of a tensor, or what a layer's head count is called
        (``heads_of``).
        """
        expression = self.expressions.get((self.depth.canonical(name), which))
        return expression.fields if expression else frozenset()

    def expression_of(self, name: str, which: int | str) -> Expression | None:
        """Return how the fields make one quantity of the full model; None if none does."""
        expression = self.expressions.get((self.depth.canonical(name), which))
        return expression and expression.times(self.depth.times(name, which))

    def power_of(self, name: str, which: int | str) -> Power | None:
        """Return the power of fields that one quantity of the full model is; None: it is none."""
        power = self.powers.get((self.depth.canonical(name), which))
        return power and power.times(self.depth.times(name, which))


def nonlinear_fields(field_map: FieldMap) -> frozenset[FieldPath]:
    """Return the fields that set some size along no straight line."""
    powers = (power.fields for power in field_map.powers.values())
    return frozenset().union(*powers, *field_map.unfitted.values())


def state_of(field_map: FieldMap) -> dict[str, Any]:
    """Return the attributes of a field map that are stored on disk: all but its builder."""
    names = {field.name for field in dataclasses.fields(field_map)} - {"builder", "digest"}
    return {name: getattr(field_map, name) for name in names}


def from_state(builder: Builder, digest: str | None, state: Mapping[str, Any]) -> FieldMap:
    """Return the field map with this state, as :func:`state_of` returns it."""
    attention = state["recipe"].attention
    return FieldMap(builder=builder.with_attention(attention), digest=digest, **state)
