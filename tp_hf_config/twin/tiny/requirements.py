"""What a tiny model has to keep of its class, so that experiments on it are valid for the class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm, prod
from typing import Any

from torch import nn

from ...fieldmap.field_map import Expression, FieldMap, Power, Quantity, product
from ...fieldmap.lower_depth import kinds_of_layers
from ...forward.head_splits import HeadSplits, heads_of, observe
from ...forward.run_recipe import RunRecipe
from ...model.build import Refusal
from ...model.config_json import FieldPath, value_at
from ...model.shapes import Shapes, shapes

HEAD_DIM = 16  # a head dim that is enough for all that a class does inside a head
_PER_PARAMETER = 4  # a parameter, read and computed with, costs as much as this many numbers


class Requirements:
    """What every smaller config is checked against.

    A smaller model needs:

    - the same tensors, tied alike, with no dimension that shrank to 1 and no norm over two numbers;
    - several positions for each unit of a field where there were several;
    - layers of all kinds;
    - at least two units of a field that dimensions divide differently (heads, groups);
    - a forward pass that runs as far, over heads of enough dimensions.
    """

    def __init__(self, field_map: FieldMap, base: nn.Module):
        self.builder = field_map.builder
        self.recipe = field_map.recipe
        self.shapes, self.layout = shapes(base), observe(base, self.recipe)
        self._kinds = kinds_of_layers(base)
        self._several, self._shared = _several_per_unit(field_map), _shared(field_map)
        self._heads, self._sizes = _head_expressions(field_map, self.layout), field_map.sizes
        self._observed: dict[str, HeadSplits | None] = {}
        self._parameters: dict[str, int] = {}

    def run_with(self, recipe: RunRecipe) -> None:
        self.recipe = recipe
        self._observed.clear()

    def observed(self, trial: dict[str, Any]) -> HeadSplits | None:
        """Return the head splits of a config's model, None if it fails; built once for each."""
        key = repr(trial)
        if key not in self._observed:
            self._observed[key] = self._observe(trial)
        return self._observed[key]

    def cost(self, trial: dict[str, Any]) -> float:
        """Return what a pass costs, in numbers computed; infinity if the config fails."""
        observed = self.observed(trial)
        if observed is None:
            return math.inf
        return observed.numbers + _PER_PARAMETER * self._parameters[repr(trial)]

    def _has_narrow_heads(self, trial: dict[str, Any]) -> bool:
        """True if expressions show that some heads would be too narrow: that needs no build."""
        values = {field: value_at(trial, field) for field in self._sizes}
        steps = {f: n - self._sizes[f] for f, n in values.items() if type(n) is int}
        return any(
            features.evaluate(steps) < least * heads.evaluate(steps)
            for features, heads, least in self._heads
            if features.fields | heads.fields <= steps.keys()
        )

    def _observe(self, trial: dict[str, Any]) -> HeadSplits | None:
        if self._has_narrow_heads(trial):
            return None
        model = self.builder.build(trial)
        if isinstance(model, Refusal):
            return None
        built = shapes(model)
        self._parameters[repr(trial)] = sum(map(prod, built.values()))
        suits = (
            built.keys() == self.shapes.keys()
            and not _has_more_ones(self.shapes, built)
            and not _keeps_order_alone(self.shapes, built)
            and _still_several(self._several, trial, built)
            and _ties_alike(model, built)
            and self._kinds.items() <= kinds_of_layers(model).items()
            and all(
                _still_shared(dims, field, trial, built) for field, dims in self._shared.items()
            )
        )
        text_alone = not self.layout.ended  # else it has to end with all inputs here too
        layout = observe(model, self.recipe, text_alone) if suits else None
        return layout if layout is not None and goes_as_far(self.layout, layout) else None


def _head_expressions(
    field_map: FieldMap, layout: HeadSplits
) -> list[tuple[Expression | Power, Expression | Power, int]]:
    """Return the output features, heads and least head dim, for a layer of each kind."""
    sizes: dict[Quantity, Expression | Power] = {**field_map.expressions, **field_map.powers}
    expressions = []
    for name, splits in layout.heads.items():
        features, heads = sizes.get((f"{name}.weight", 0)), sizes.get((name, heads_of(0)))
        if features is None or heads is None or len(splits) > 1 or len(splits[0]) > 2:
            continue
        # of other expressions, what two fields do together may not have been learned
        products = all(_is_product(size, field_map.sizes) for size in (features, heads))
        if products and features.base == prod(splits[0]):
            expressions.append((features, heads, min(splits[0][-1], HEAD_DIM)))
    return expressions


def _is_product(expression: Expression | Power, values: Mapping[FieldPath, int]) -> bool:
    if isinstance(expression, Power):
        return True
    own = {field: values[field] for field in expression.fields}
    return expression == product(expression.base, own)


def _several_per_unit(field_map: FieldMap) -> list[tuple[str, int, FieldPath]]:
    """Return the tensor dims in which a unit of a field is several positions, with the field."""
    return [
        (name, dim, field)
        for (name, dim), expression in field_map.expressions.items()
        if isinstance(dim, int)
        for field in expression.fields
        # with one position per unit, the tiny model could not show the order of these positions
        if (slope := expression.terms.get(frozenset({field}), Fraction(0))) > 1
        and slope.denominator == 1  # a fraction is rounded: patches of an image
    ]


def _still_several(
    several: Sequence[tuple[str, int, FieldPath]], data: dict[str, Any], built: Shapes
) -> bool:
    return all(
        built[name][dim] > value_at(data, field)
        for name, dim, field in several
        if name in built and dim < len(built[name])
    )


def _shared(field_map: FieldMap) -> dict[FieldPath, dict[tuple[str, int], bool]]:
    """Return the fields that several dims divide by different numbers (WavLM: heads, groups).

    For each dim, True if a unit takes several positions there; a unit is the smallest part that is
    whole in each dim.
    """
    divisors: dict[FieldPath, dict[tuple[str, int], int]] = {}
    for field, value in field_map.values.items():
        for (name, dim), expression in field_map.expressions.items():
            slope = expression.terms.get(frozenset({field}), 0)
            if isinstance(dim, int) and 0 < slope < 1 and slope * value == expression.base:
                divisors.setdefault(field, {})[name, dim] = value // expression.base
        for (name, dim), power in field_map.powers.items():
            others = {n for other, n in power.exponents.items() if other != field}
            divides = power.exponents.get(field) == 1 and others == {-1} and power.base <= value
            if isinstance(dim, int) and divides:
                divisors.setdefault(field, {})[name, dim] = value // power.base
    return {
        field: {place: lcm(*shares.values()) > share for place, share in shares.items()}
        for field, shares in divisors.items()
        # not a single unit at full size: Mimi's upsampling has as many groups as channels
        if len(set(shares.values())) > 1 and field_map.values[field] >= 2 * lcm(*shares.values())
    }


def _still_shared(
    parts: dict[tuple[str, int], bool], field: FieldPath, data: dict[str, Any], built: Shapes
) -> bool:
    """True if the field still has two units or more, each whole in all of its dims."""
    value = value_at(data, field)
    if not all(built[name][dim] for name, dim in parts):
        return False  # nothing is left of a dimension
    shares = {(name, dim): Fraction(value, built[name][dim]) for name, dim in parts}
    if any(share.denominator != 1 for share in shares.values()):
        return False
    unit = lcm(*(int(share) for share in shares.values()))
    several = all(unit > shares[place] for place, wanted in parts.items() if wanted)
    return several and value >= 2 * unit


def _has_more_ones(before: Shapes, built: Shapes) -> bool:
    """True if a dim shrank to 1: attention over one patch of an image shows nothing."""
    return any(1 in built[name] and built[name].count(1) > before[name].count(1) for name in built)


def _keeps_order_alone(before: Shapes, built: Shapes) -> bool:
    """True if a norm now runs over two numbers, so that only their order remains."""
    # all tokens are alike then, and attention shows nothing (Phi-4-multimodal's sound)
    matrices = {name.rpartition(".")[0] for name, shape in built.items() if len(shape) > 1}
    return any(
        shape == (2,) != before[name] and name.rpartition(".")[0] not in matrices
        for name, shape in built.items()
    )


def _ties_alike(model: Any, built: Shapes) -> bool:
    """True if tying weights changes no shape: Marian's decoder counts its tokens by two fields."""
    model.tie_weights()
    return shapes(model) == built


def goes_as_far(before: HeadSplits, after: HeadSplits) -> bool:
    """True if a forward pass runs as far as before, over heads that are wide enough."""
    # attention over a single token (an image that is too small) does not depend on its queries
    if after.steps < before.steps or after.ended < before.ended or after.alone > before.alone:
        return False
    pairs = [(splits, after.heads.get(layer, ())) for layer, splits in before.heads.items()]
    return all(
        len(old) == len(new)
        # a head of two dimensions has no partial rotary embedding
        and all(n[-1] >= min(o[-1], HEAD_DIM) for o, n in zip(old, new, strict=True))
        for old, new in pairs
    )
