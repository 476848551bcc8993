"""Tell inner widths (of feed-forward layers, of experts) from the residual stream.

No name decides it. The residual stream is in many layers, and its field sets tensors outside of all
layers too (embeddings, the last norm). A group of an inner width is in one layer, and weights join
it to the residual stream on both sides.
"""

from __future__ import annotations

from torch import nn

from ..fieldmap.model_view import ModelView
from ..graph.full_size import Group
from ..graph.prunable import Width, widths_of
from ..model.config_json import FieldPath
from ..model.tensors import tensor


def inner_widths_of(view: ModelView) -> tuple[Width, ...]:
    """Return the proved inner widths of a model."""
    layers = _Layers(view)
    widths = widths_of(view.model, view.field_map)
    local = [width for width in widths if width.groups and all(map(layers.hold, width.groups))]
    streams = layers.fields_outside() - {field for width in local for field in width.fields}
    inside = view.inner_widths()  # no heads
    return tuple(
        width
        for width in local
        if inside >= set(width.fields)
        and all(_is_joined(view, group, streams) for group in width.groups)
    )


class _Layers:
    """The layers of a model: elements of lists that have parts."""

    def __init__(self, view: ModelView):
        self._view = view
        self._names = {
            f"{name}.{key}"
            for name, module in view.model.named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for key, layer in module.named_children()
            if any(True for _ in layer.children())
        }

    def hold(self, group: Group) -> bool:
        """True if all tensors of a group are in one layer, or side by side outside of layers."""
        return len({self._of(dim.name) or _around(dim.name) for dim in group.dims}) == 1

    def fields_outside(self) -> set[FieldPath]:
        """Return the fields that set a dimension outside of all layers."""
        return {
            field
            for name, parameter in self._view.model.named_parameters()
            if not self._of(name)
            for dim in range(parameter.ndim)
            for field in self._view.field_map.fields_of(name, dim)
        }

    def _of(self, name: str) -> str:
        """Return the innermost layer that a tensor is in; empty: it is in none."""
        while name and name not in self._names:
            name = name.rpartition(".")[0]
        return name


def _around(name: str) -> str:
    """Return the module around a tensor's own."""
    return ".".join(name.split(".")[:-2])


def _is_joined(view: ModelView, group: Group, streams: set[FieldPath]) -> bool:
    """True if weights join a group to the streams on two sides, and it is no multiple of them."""
    joined: set[str] = set()
    for dim in group.dims:
        axes = range(tensor(view.model, dim.name).ndim)
        fields = [view.field_map.fields_of(dim.name, axis) for axis in axes]
        if fields.pop(dim.dim) & streams:
            return False
        if any(each & streams for each in fields):
            joined.add(dim.name)
    return len(joined) > 1
