"""Carry what experiments with a stock class found over to a class whose layers have own fields.

A group that lies in one layer was proved there, whatever the other layers are.  Where the stock
class has one field for all layers, the generated class has one for each, with that layer's group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import UnsupportedModelError
from ..fieldmap.field_map import FieldMap
from ..fieldmap.layer_map import LayerFields, layer_map
from ..fieldmap.learn_field_map import learn
from ..model.build import Refusal
from ..model.config_json import FieldPath, changed_values, config_json, value_at, with_values
from ..model.layer_entries import KEY
from ..twin.group import Finding, TinyGroup
from ..twin.layout import TensorDim
from ..twin.tiny.tiny_model import TinyModel, built_tiny_model
from .full_size import instances


class LayerFindings:
    """What is found of a class whose layers have fields of their own.

    Args:
        field_map: the field map of the generated class.
        uniform: that of the stock class, with all layers alike.
        tiny: the tiny model of the stock class.
    """

    def __init__(self, field_map: FieldMap, uniform: FieldMap, tiny: TinyModel):
        self.field_map, self.uniform, self.stock_tiny = field_map, uniform, tiny
        self._layers = LayerFields(field_map.builder, field_map.data)
        self._own = self._layers.own
        self._names = {name: [name] for name in field_map.shapes}

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
            if field not in of_depth and KEY not in field
        }
        for (shared, number), field in self._own.items():
            value = self.stock_tiny.field_map.values.get(shared, value_at(tiny_data, shared))
            values[shared] = value
            # the stock class may have entries of its own (Gemma 4)
            entries = value_at(tiny_data, (*shared[:-1], KEY)) or {}
            like = self._like(number)
            of_layer: dict[Any, Any] = next((e for n, e in entries.items() if int(n) == like), {})
            values[field] = of_layer.get(shared[-1], value)
        data = with_values(field_map.data, values)
        recipe = self.stock_tiny.recipe
        builder = field_map.builder.with_attention(recipe.attention)
        full = builder.build(data)
        if isinstance(full, Refusal):
            raise UnsupportedModelError(
                f"{builder.model_class.__name__} does not build at tiny widths: {full.reason}"
            )
        data = config_json(builder.config(data), use_diff=False)
        alike = replace(self.stock_tiny.field_map, recipe=recipe)
        tiny_map = layer_map(builder, data, alike, self.uniform.depth)
        if tiny_map is None:
            tiny_map = learn(builder, builder.config(data), full, tiny=True, recipe=recipe)

        def build() -> Any:
            tiny = built_tiny_model(field_map, data)
            assert isinstance(tiny, TinyModel)  # the stock class runs with these values
            return tiny.run

        return TinyModel(lambda: tiny_map, field_map, build)

    def _like(self, number: int) -> int | None:
        """Return the layer of the stock class's tiny model that a layer is like."""
        names = (name for name in self.field_map.shapes if self._layers.layer_of(name) == number)
        return self._layers.layer_of(self.uniform.depth.canonical(next(names, "")))

    def carried_over(self, finding: Finding) -> Iterator[Finding]:
        """Yield what is found of a width in a class whose layers have own fields.

        One finding for each layer if they have fields of their own for it; else one for all.
        """
        own = [field for field in finding.fields if field in self._layers.shared]
        if not own:
            groups = tuple(group for group, _ in self._groups(finding))
            yield replace(finding, groups=groups)
        elif len(own) < len(finding.fields):
            yield Finding(
                finding.fields, reason="some of them are set for each layer, others are not"
            )
        else:
            by_layer: dict[int | None, list[TinyGroup]] = {}
            for group, layer in self._groups(finding):
                by_layer.setdefault(layer, []).append(group)
            for number in sorted(n for shared, n in self._own if shared == finding.fields[0]):
                fields = tuple(self._own[shared, number] for shared in finding.fields)
                groups = tuple(
                    _with_fields(group, dict(zip(finding.fields, fields, strict=True)))
                    for group in by_layer.get(number, ())
                )
                if groups or finding.reason is not None:
                    yield replace(finding, fields=fields, groups=groups)

    def _groups(self, finding: Finding) -> Iterator[tuple[TinyGroup, int | None]]:
        """Yield each group at full depth, and the layer that it lies in; ``None``: in several."""
        for group in finding.groups:
            sources = dict(zip(group.dims, group.sources, strict=True))
            for instance in instances(group, self.uniform, self._names):
                pairs = [
                    (TensorDim(key.rpartition("#")[0], dim.dim, dim.layout), sources[dim])
                    for key, dim in instance.items()
                ]
                dims, of_dims = zip(*pairs, strict=True)
                layers = {self._layers.layer_of(dim.name) for dim in dims}
                alone = layers.pop() if len(layers) == 1 else None
                yield replace(group, dims=dims, sources=of_dims), alone


def _with_fields(group: TinyGroup, own: dict[FieldPath, FieldPath]) -> TinyGroup:
    """Return a group with other fields, by the fields that it has."""
    return replace(
        group,
        fields=tuple(own[field] for field in group.fields),
        sources=tuple(None if source is None else own[source] for source in group.sources),
    )
