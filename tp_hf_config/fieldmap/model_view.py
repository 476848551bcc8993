"""A live model together with the field map of its class."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..forward.head_splits import heads_of
from ..forward.run_recipe import MakeInputs
from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..model.locate import check_followable, find_pretrained
from ..model.shapes import shapes
from .completeness import build_live
from .field_map import FieldMap
from .layer_map import by_layers
from .learn_field_map import map_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Conv = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class ModelView:
    model: PreTrainedModel
    field_map: FieldMap
    prefix: str  # the model's name in the module that contains it; empty if it is that module
    reference: nn.Module  # built from the config on the meta device; its buffers hold values

    def producers(self) -> Iterable[tuple[str, nn.Module, frozenset[FieldPath]]]:
        """Yield linear layers, convolutions and embeddings with their output width's fields."""
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, Conv, nn.Embedding)):
                dim = 1 if isinstance(module, nn.Embedding) else 0
                dim = 1 if getattr(module, "transposed", False) else dim
                if weight is not None:
                    yield name, module, self.field_map.fields_of(f"{name}.weight", dim)

    def head_layers(
        self, values: Mapping[FieldPath, int] | None = None
    ) -> Iterable[tuple[str, nn.Module, int]]:
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
        dims = {
            field
            for name, _, fields in self.producers()
            if self.field_map.splits_of(name)
            for field in fields
            if fields & counts
        }
        return frozenset(counts | dims)

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
    pruner's arguments and the hook share it. With ``weights``, the weights have to hold data.
    Raises UnsupportedModelError if there is not one such model or its config does not build it.
    """
    prefix, model = find_pretrained(module)
    check_followable(model, weights)
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
