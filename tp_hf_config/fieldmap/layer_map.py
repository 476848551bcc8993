"""The field map of a class whose layers differ in width, computed from that of its stock class.

Nothing is probed again: a layer has the sizes that the stock class gives to all layers at this
layer's values. A class that this does not explain is learned like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError
from ..forward.head_splits import counts_of, observe
from ..forward.run_recipe import MakeInputs
from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, config_json
from ..model.layer_class import layer_lists, stock_class
from ..model.layer_entries import KEY, uniform_json
from ..model.shapes import shapes
from .expressions import Expression, Quantity
from .field_map import Depth, FieldMap, nonlinear_fields
from .learn_field_map import map_at, stored_or_learned

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MOST_MAPS = 2  # configs with all layers alike that are learned of a class that runs with none


def entangled_fields(field_map: FieldMap) -> set[FieldPath]:
    fields = {*field_map.must_equal, *field_map.must_equal.values(), *field_map.ratio_partners}
    return fields | nonlinear_fields(field_map)


class LayerFields:
    """The fields of single layers in a config (``per_layer_config``)."""

    def __init__(self, builder: Builder, data: Mapping[str, Any]):
        # (field of the stock class, layer) -> the layer's own field
        self.own: dict[tuple[FieldPath, int], FieldPath] = {}
        self.values: dict[FieldPath, int] = {}  # of the layers' own fields
        self._collect(data, ())
        lists = "|".join(map(re.escape, layer_lists(builder.model_class)))
        self._in_list = re.compile(rf"(?:^|\.)(?:{lists})\.(\d+)(?:\.|$)")

    def _collect(self, data: Mapping[str, Any], path: FieldPath) -> None:
        for number, entry in (data.get(KEY) or {}).items():
            for key, value in entry.items():
                if type(value) is int:
                    field = (*path, KEY, number, key)
                    self.own[(*path, key), int(number)] = field
                    self.values[field] = value
        for key, value in data.items():
            if isinstance(value, dict) and key != KEY:
                self._collect(value, (*path, key))

    @property
    def shared(self) -> frozenset[FieldPath]:
        return frozenset(field for field, _ in self.own)

    def layer_of(self, name: str) -> int | None:
        match = self._in_list.search(name)
        return int(match[1]) if match else None

    def within(
        self, expression: Expression, name: str, values: Mapping[FieldPath, int]
    ) -> Expression:
        """Return the stock class's expression, learned at ``values``, in the layer's own fields."""
        layer = self.layer_of(name)
        fields = {
            f: self.own[f, layer]
            for f in expression.fields
            if layer is not None
            if (f, layer) in self.own
        }
        steps = {field: self.values[own] - values[field] for field, own in fields.items()}
        terms: dict[frozenset[FieldPath], Fraction] = {}
        for names, coefficient in expression.terms.items():
            for size in range(1, len(names) + 1):
                for chosen in map(frozenset, combinations(names, size)):
                    rest = prod(steps.get(field, 0) for field in names - chosen)
                    moved = frozenset(fields.get(field, field) for field in chosen)
                    terms[moved] = terms.get(moved, Fraction(0)) + coefficient * rest
        base = int(expression.evaluate(steps))
        return Expression(base, {names: value for names, value in terms.items() if value})


def uniform_map(
    builder: Builder, data: dict[str, Any], make_inputs: MakeInputs | None = None
) -> FieldMap:
    """Return the field map of the stock class at a config whose layers are all alike.

    That is the config without entries, which does not change from step to step. If the class does
    not run there (three key/value heads in every layer, eight in the config), all layers get the
    values of the first layer with which it does.
    """
    stock = builder.of_class(stock_class(builder.model_class))
    layers = sorted({number for _, number in LayerFields(builder, data).own})
    maps: list[FieldMap] = []
    refusals: list[Refusal] = []
    for like in (None, *layers):
        result = map_at(stock, uniform_json(data, like), make_inputs)
        if isinstance(result, Refusal):
            refusals.append(result)
            continue
        maps.append(result)
        if result.runs or len(maps) == _MOST_MAPS:
            break
    if not maps:
        raise UnsupportedModelError(f"{stock.model_class.__name__}: {refusals[0].reason}")
    return maps[-1] if maps[-1].runs else maps[0]


def by_layers(
    builder: Builder, config: PreTrainedConfig, full: nn.Module, make_inputs: MakeInputs | None
) -> FieldMap:
    result = None
    if layer_lists(builder.model_class):
        data = config_json(config, use_diff=False)
        uniform = uniform_map(builder, data, make_inputs)
        result = layer_map(builder, data, uniform, uniform.depth)
    return result or stored_or_learned(builder, config, full, make_inputs)


def layer_map(
    builder: Builder, data: dict[str, Any], uniform: FieldMap, depth: Depth
) -> FieldMap | None:
    """Return the field map of a class whose layers have own fields; None: sizes are unexplained.

    ``depth`` maps names to those in ``uniform``, the stock class's field map.
    """
    layers = LayerFields(builder, data)
    shared = layers.shared
    model = builder.build(data)
    if (
        isinstance(model, Refusal)
        or shared & entangled_fields(uniform)
        or not shared <= uniform.values.keys()
    ):
        return None
    sizes: dict[Quantity, int] = {
        (name, dim): size for name, shape in shapes(model).items() for dim, size in enumerate(shape)
    }
    splits = observe(model, uniform.recipe)
    for name, pieces in splits.heads.items():
        sizes.update({(name, which): count for which, count in counts_of(pieces).items()})
    expressions = {
        (name, which): layers.within(
            expression.times(depth.times(name, which)), name, uniform.values
        )
        for name, which in sizes
        if (expression := uniform.expressions.get((depth.canonical(name), which))) is not None
    }
    if any(expression.base != sizes[key] for key, expression in expressions.items()):
        return None
    moving = {field for expression in expressions.values() for field in expression.fields}
    own = {field: value for field, value in layers.values.items() if field in moving}
    no_effect = {field: v for field, v in layers.values.items() if field not in moving}
    remaining = {field: v for field, v in uniform.values.items() if field not in shared}
    return replace(
        uniform,
        builder=builder.with_attention(uniform.recipe.attention),
        data=data,
        values=remaining | own,
        unset=uniform.unset - shared,
        expressions=expressions,
        depth=Depth(data),
        splits=splits,
        sizes={f: v for f, v in uniform.sizes.items() if f not in shared} | own,
        powers={
            key: power.times(depth.times(*key))
            for key in sizes
            if (power := uniform.powers.get((depth.canonical(key[0]), key[1])))
        },
        unfitted={
            key: fields
            for key in sizes
            if (fields := uniform.unfitted.get((depth.canonical(key[0]), key[1])))
        },
        non_size_fields=uniform.non_size_fields | no_effect,
        digest=None,
    )
