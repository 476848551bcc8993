"""A live model with the field map of its class, also if its layers differ in width.

If layers differ, nothing is probed again: a layer has the sizes that the stock class gives to all
layers at this layer's values. A class that this does not explain is learned like any other.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError
from ..forward.head_splits import counts_of, heads_of, observe
from ..forward.run_recipe import MakeInputs
from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, config_json, plain_fields
from ..model.layer_class import layer_lists, stock_class
from ..model.layer_entries import KEY, uniform_json
from ..model.locate import check_followable, find_pretrained, has_no_data
from ..model.shapes import shapes
from .field_map import Depth, Expression, FieldMap, Quantity, Values, nonlinear_fields
from .learn_field_map import build_live, map_at, map_of, stored_or_learned

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
        for field, value in plain_fields(data):
            if KEY in field[-3:-2] and type(value) is int:
                self.own[(*field[:-3], field[-1]), int(field[-2])] = field
                self.values[field] = value
        lists = "|".join(map(re.escape, layer_lists(builder.model_class)))
        self._in_list = re.compile(rf"(?:^|\.)(?:{lists})\.(\d+)(?:\.|$)")

    @property
    def shared(self) -> frozenset[FieldPath]:
        return frozenset(field for field, _ in self.own)

    def layer_of(self, name: str) -> int | None:
        match = self._in_list.search(name)
        return int(match[1]) if match else None

    def within(self, expression: Expression, name: str, values: Values) -> Expression:
        """Return the stock class's expression, learned at ``values``, in the layer's own fields."""
        layer = self.layer_of(name)
        fields = {
            f: self.own[f, layer]
            for f in expression.fields
            if layer is not None
            if (f, layer) in self.own
        }
        steps = {field: self.values[own] - values[field] for field, own in fields.items()}
        return expression.around(steps, fields)


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


Conv = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class ModelView:
    model: PreTrainedModel
    field_map: FieldMap
    prefix: str  # the model's name in the module that contains it; empty if it is that module
    reference: nn.Module  # built from the config on the meta device; its buffers hold values

    def head_layers(self, values: Values | None = None) -> Iterable[tuple[str, nn.Module, int]]:
        """Yield linear layers whose output is split into heads: name, layer, head count."""
        values = values or self.field_map.values  # those of the config now
        for name, module in self.model.named_modules():
            splits = self.field_map.splits_of(name)
            if splits is not None and isinstance(module, nn.Linear):
                # Falcon's one key/value head is among the query heads of its projection
                fields = self.field_map.fields_of(name, heads_of(0))
                if len(fields) > 1:  # of a field at 1, no head can be removed
                    fields = frozenset(
                        field for field in fields if self.field_map.values[field] > 1
                    )
                yield name, module, values[min(fields)] if len(fields) == 1 else splits[0][0]

    def inner_widths(self) -> frozenset[FieldPath]:
        """Return the fields pruned by default: no heads, experts, vocabulary, kernels, outputs."""
        field_map = self.field_map
        inner: set[FieldPath] = set()
        excluded = set(self.head_fields())
        for name, parameter in self.model.named_parameters():
            module_name = name.rpartition(".")[0]
            module = self.model.get_submodule(module_name)
            for dim in range(parameter.ndim):
                fields = field_map.fields_of(name, dim)
                if isinstance(module, nn.Embedding) and dim == 0:
                    excluded |= fields  # a number of entries
                elif parameter.ndim > 2 and dim == 0 and not isinstance(module, Conv):
                    excluded |= fields if parameter.shape[0] > 1 else set()  # a number of experts
                elif isinstance(module, Conv) and dim > 1:
                    excluded |= fields  # a kernel's size
                elif field_map.depth.canonical(module_name) in field_map.splits.outputs:
                    continue  # the model returns this output
                elif dim != 1 or not isinstance(module, (nn.Linear, Conv)):
                    inner |= fields
        return frozenset(inner - excluded)

    def head_fields(self) -> frozenset[FieldPath]:
        """Return the fields that set the number of heads or head_dim."""
        counts = self.field_map.count_fields()
        result = set(counts)
        for name, module in self.model.named_modules():
            splits = self.field_map.splits_of(name)
            if splits and isinstance(module, (nn.Linear, Conv, nn.Embedding)):
                last = isinstance(module, nn.Embedding) or getattr(module, "transposed", False)
                fields = self.field_map.fields_of(f"{name}.weight", 1 if last else 0)
                result |= fields if fields & counts else set()
        return frozenset(result)

    def rotates_head_dims(self) -> bool:
        """True if a non-persistent buffer's last dim is head_dim or half of it: position tables."""
        dims = {split[-1] for splits in self.field_map.splits.heads.values() for split in splits}
        return any(
            buffer is not None and buffer.ndim and {buffer.shape[-1], 2 * buffer.shape[-1]} & dims
            for module in self.model.modules()
            for key, buffer in module._buffers.items()
            if key in module._non_persistent_buffers_set
        )


# the state of a module, and the field map and reference build that belong to it
_Cached = tuple[tuple[Any, ...], FieldMap, nn.Module]
_cached_views: weakref.WeakKeyDictionary[nn.Module, _Cached] = weakref.WeakKeyDictionary()


def view_of(
    module: nn.Module, make_inputs: MakeInputs | None = None, weights: bool = True
) -> ModelView:
    """Return the one Hugging Face model in a module, with its field map.

    The reference build is cached until the config, a module or a shape changes, so a plan, the
    pruner's arguments and the hook share it. With ``weights``, all weights have to hold data, or
    none: a cut list can be made of a model on the meta device.
    Raises UnsupportedModelError if there is not one such model or its config does not build it.
    """
    prefix, model = find_pretrained(module)
    check_followable(model, weights and not has_no_data(model))
    data = model.config.to_json_string(use_diff=False)
    parts = tuple(map(id, module.modules()))
    state = (data, parts, tuple(shapes(model).items()), model.dtype, id(make_inputs))
    cached = _cached_views.get(module)
    if cached is None or cached[0] != state:
        builder, reference = build_live(model, buffers=True)
        field_map = map_of(model, (builder, reference), make_inputs, by_layers)
        assert not isinstance(reference, Refusal)  # map_of raises then
        cached = _cached_views[module] = (state, field_map, reference)
    return ModelView(model, cached[1], prefix, cached[2])
