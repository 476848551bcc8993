"""Carry what experiments with a stock class found over to a class whose layers have own fields.

A group that lies in one layer was proved there, whatever the other layers are.  Where the stock
class has one field for all layers, the generated class has one for each, with that layer's group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ..errors import UnsupportedModelError
from ..fieldmap.field_map import FieldMap, learn, map_at
from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, changed_values, value_at, with_values
from ..model.layer_class import layer_lists, stock_class
from ..model.layer_entries import layer_number, shared_field, uniform_json
from ..twin.group import Finding, TinyGroup
from ..twin.layout import TensorDim
from ..twin.tiny.tiny_model import TinyModel, built_tiny_model
from .full_size import instances


def uniform_map(builder: Builder, data: dict[str, Any], make_inputs: Any = None) -> FieldMap:
    """Return the field map of the stock class at a config in which all layers are as the first.

    Args:
        builder: builds a class, stock or generated.
        data: the config's JSON.
        make_inputs: the user's function that makes inputs, if there is one.
    """
    stock = builder.of_class(stock_class(builder.model_class))
    return map_at(stock, uniform_json(data), make_inputs)


class LayerFindings:
    """What is found of a class whose layers have fields of their own.

    Args:
        field_map: the field map of the generated class.
        uniform: that of the stock class, with all layers as the first.
        tiny: the tiny model of the stock class.
    """

    def __init__(self, field_map: FieldMap, uniform: FieldMap, tiny: TinyModel):
        self.field_map, self.uniform, self.stock_tiny = field_map, uniform, tiny
        self._own: dict[tuple[FieldPath, int], FieldPath] = {}
        for field in field_map.values:
            number = layer_number(field)
            if number is not None:
                self._own[shared_field(field), number] = field
        self._names = {name: [name] for name in field_map.shapes}
        lists = "|".join(map(re.escape, layer_lists(field_map.builder.model_class)))
        self._in_list = re.compile(rf"(?:^|\.)(?:{lists})\.(\d+)\.")

    def tiny_model(self) -> TinyModel:
        """Return the generated class at the stock class's tiny widths, with all its layers.

        Raises:
            UnsupportedModelError: the class does not build it.
        """
        field_map, tiny_data = self.field_map, self.stock_tiny.field_map.data
        of_depth = {
            field for field, _ in changed_values(self.uniform.depth.data, self.uniform.data)
        }
        values: dict[FieldPath, Any] = {
            field: value
            for field, value in changed_values(self.uniform.depth.data, tiny_data)
            if field not in of_depth
        }
        for (shared, _), field in self._own.items():
            value = self.stock_tiny.field_map.values.get(shared, value_at(tiny_data, shared))
            values[shared] = values[field] = value
        data = with_values(field_map.data, values)
        recipe = self.stock_tiny.recipe
        builder = field_map.builder.with_attention(recipe.attention)
        full = builder.build(data)
        if isinstance(full, Refusal):
            raise UnsupportedModelError(
                f"{builder.model_class.__name__} does not build at tiny widths: {full.reason}"
            )
        tiny_map = learn(builder, builder.config(data), full, tiny=True, recipe=recipe)

        def build() -> Any:
            tiny = built_tiny_model(field_map, data)
            assert isinstance(tiny, TinyModel)  # the stock class runs with these values
            return tiny.run

        return TinyModel(tiny_map, field_map, build)

    def carried_over(self, finding: Finding) -> Iterator[Finding]:
        """Yield what is found of a width in a class whose layers have own fields.

        One finding for each layer if they have fields of their own for it; else one for all.
        """
        of_layers = {shared for shared, _ in self._own}
        own = [field for field in finding.fields if field in of_layers]
        if not own:
            groups = tuple(group for group, _ in self._groups(finding, finding.fields))
            yield replace(finding, groups=groups)
        elif len(own) < len(finding.fields):
            yield Finding(
                finding.fields, reason="some of them are set for each layer, others are not"
            )
        else:
            by_layer: dict[int | None, list[TinyGroup]] = {}
            for group, layer in self._groups(finding, finding.fields):
                by_layer.setdefault(layer, []).append(group)
            for number in sorted(n for shared, n in self._own if shared == finding.fields[0]):
                fields = tuple(self._own[shared, number] for shared in finding.fields)
                groups = tuple(
                    _with_fields(group, dict(zip(finding.fields, fields, strict=True)))
                    for group in by_layer.get(number, ())
                )
                if groups or finding.reason is not None:
                    yield replace(finding, fields=fields, groups=groups)

    def _groups(
        self, finding: Finding, fields: Iterable[FieldPath]
    ) -> Iterator[tuple[TinyGroup, int | None]]:
        """Yield each group at full depth, and the layer that it lies in; ``None``: in several."""
        for group in finding.groups:
            sources = dict(zip(group.dims, group.sources, strict=True))
            for instance in instances(group, self.uniform, self._names):
                pairs = [
                    (TensorDim(key.rpartition("#")[0], dim.dim, dim.layout), sources[dim])
                    for key, dim in instance.items()
                ]
                dims, of_dims = zip(*pairs, strict=True)
                layers = {self._layer(dim.name) for dim in dims}
                alone = layers.pop() if len(layers) == 1 else None
                yield replace(group, dims=dims, sources=of_dims), alone

    def _layer(self, name: str) -> int | None:
        """Return the number of the layer that a tensor is in."""
        match = self._in_list.search(name)
        return int(match[1]) if match else None


def _with_fields(group: TinyGroup, own: dict[FieldPath, FieldPath]) -> TinyGroup:
    """Return a group with other fields, by the fields that it has."""
    return replace(
        group,
        fields=tuple(own[field] for field in group.fields),
        sources=tuple(None if source is None else own[source] for source in group.sources),
    )
