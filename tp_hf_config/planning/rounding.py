"""Which numbers a width may have: what the class takes, and what the target's tools take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import gcd, lcm

from torch import nn

from ..fieldmap.field_map import multiple_of
from ..fieldmap.model_view import ModelView
from ..graph.full_size import Group
from ..graph.prunable import Width
from ..graph.sides import layer_side
from ..graph.unit_count import EXACT, MULTIPLES, NEAR_HEAD_DIM, Grid, multiple_for_round_to
from ..model.config_json import FieldPath
from ..model.layer_entries import name_in_all_layers
from ..model.tensors import is_matrix_stack, tensor
from ..twin.layout import TensorDim
from .targets import Rule, Target

ANY = Target()


def in_multiples(view: ModelView, width: Width, target: Target = ANY) -> Width:
    """Return a width in the multiples that class, kernels and channel groups demand.

    Its grid is the target's, or the default.
    """
    multiple = 1  # in units of its fields
    for group in width.groups:
        own = group.count.channel_groups  # all groups of a width lose the same number
        for dim in group.dims:
            if dim.dim > 0 and is_matrix_stack(view.model, dim.name):
                # stacked experts' grouped matrix product takes only rows of whole 16 bytes
                own = lcm(own, 16 // tensor(view.model, dim.name).element_size())
        multiple = lcm(multiple, own // gcd(own, group.count.per_field_unit))
    field = width.fields[0]
    if len(width.fields) == 1 and field not in view.field_map.count_fields():
        own = multiple_of(view.field_map, field)
        multiple = lcm(multiple, own // gcd(own, view.field_map.values[field] // width.units))
    grid = _grid(view, width, multiple, target)
    counts = (group.count.in_multiples_of(multiple, grid) for group in width.groups)
    groups = zip(width.groups, counts, strict=True)
    return replace(width, groups=tuple(replace(group, count=count) for group, count in groups))


def _grid(view: ModelView, width: Width, multiple: int, target: Target) -> Grid:
    """Return where a width goes unless ``round_to`` says it; ``multiple``: what the class takes."""
    needed = _needed(view, width, target) if target.name else 1
    if needed > 1:
        return Grid((lcm(multiple, needed),), 1, target.name)
    counts = view.field_map.count_fields()
    if counts & set(width.fields) or _counts_matrices(view, width):
        return EXACT  # whole heads or experts
    if (view.head_fields() - counts) & set(width.fields):
        return Grid((lcm(multiple, MULTIPLES[-1]),), NEAR_HEAD_DIM)
    each = {group.count.per_field_unit * group.count.run for group in width.groups}

    def accepted(number: int) -> int:
        return lcm(multiple, *(multiple_for_round_to(number, channels) for channels in each))

    return Grid(tuple(map(accepted, MULTIPLES)))


def _counts_matrices(view: ModelView, width: Width) -> bool:
    """True if a width is a number of stacked matrices: of experts."""
    dims = (dim for group in width.groups for dim in group.dims)
    return any(dim.dim == 0 and is_matrix_stack(view.model, dim.name) for dim in dims)


def _needed(view: ModelView, width: Width, target: Target) -> int:
    """Return what a target needs the units of a width's fields to be a multiple of."""
    fields, counts = set(width.fields), view.field_map.count_fields()
    if _counts_matrices(view, width):
        return 1
    heads, ffn = view.head_fields(), target.least("ffn")
    if fields & (heads - counts):
        each_rank, needed = 1, target.least("head_dim")
    else:
        # tensor parallelism divides heads and inner widths among the ranks, not the hidden size
        inside = (target.ranks > 1 or ffn > 1) and all(map(Layers(view).hold, width.groups))
        each_rank = target.ranks if inside else 1
        needed = lcm(each_rank, ffn) if inside and not fields & counts else each_rank
    for group in width.groups:
        for dim in group.dims:
            channels = group.count.per_field_unit * dim.layout.run
            number = each_rank * _of_side(view.model, dim, target)
            needed = lcm(needed, multiple_for_round_to(number, channels))
    return needed


def _of_side(model: nn.Module, dim: TensorDim, target: Target) -> int:
    """Return what channels of one side of a weight have to be a multiple of."""
    if tensor(model, dim.name).ndim < 2:
        return 1
    layer = model.get_submodule(dim.layer)
    out = layer_side(layer, dim.dim)
    if out is None and type(layer).__name__ == "Conv1D":
        out = dim.dim == 1  # its weight is transposed
    if out is None:  # stacked experts, of which some classes transpose the weights
        return lcm(target.least("columns"), target.least("rows"))
    return target.least("rows" if out else "columns")


def unmet(
    view: ModelView, widths: Iterable[Width], values: Mapping[FieldPath, int], target: Target
) -> Iterator[str]:
    """Yield a line for each tool whose rule some width does not keep, with near ones that do."""
    named: set[str] = set()  # by a line of another tool
    found, largest = {**view.field_map.values, **values}, _largest(widths)
    parts = sorted(target.parts.items(), key=lambda part: part[1] is None)  # ranks last
    for part, of_tool in parts:
        rule = of_tool or Rule(else_="these cannot be divided among the ranks")
        if rule == Rule():
            continue  # a format that takes every width
        lines: dict[str, None] = {}
        for width in largest:
            said = _unmet(view, width, found, rule, target.ranks)
            if said is not None and (of_tool or width.name not in named):
                lines[said] = None
                named.add(width.name)
        if lines:
            yield f"{part}: {', '.join(lines)}: {rule.else_}"


def _largest(widths: Iterable[Width]) -> list[Width]:
    """Return the widths whose fields are not among those of another one."""
    every = [width for width in widths if width.groups or len(width.fields) == 1]
    together = [set(width.fields) for width in every if width.groups]
    return [width for width in every if not any(set(width.fields) < other for other in together)]


def _unmet(
    view: ModelView, width: Width, values: Mapping[FieldPath, int], rule: Rule, ranks: int
) -> str | None:
    """Return what a rule demands of a width, with near numbers; ``None``: it is so."""
    field, shared = width.fields[0], name_in_all_layers(width.name)
    value, most = values[field], view.field_map.values[field]
    of_head = field in view.head_fields() - view.field_map.count_fields()
    if of_head and rule.head_dims and value not in rule.head_dims:
        return f"{shared} {value:,} is none of {', '.join(map(str, rule.head_dims))}"
    if not width.groups or (rule.source and _needed(view, width, Target(rules=(rule,))) == 1):
        return None
    each = most // width.units
    needed = _needed(view, width, Target(rules=(rule,), ranks=ranks)) * each
    # key/value heads fewer than the ranks are copied
    if value % needed == 0 or (rule.columns == rule.rows == 1 and ranks % value == 0):
        return None
    count = in_multiples(view, width).groups[0].count
    accepted = lcm(needed, count.multiple // count.per_field_unit * each)  # by the class too
    below = value // accepted * accepted
    near = " or ".join(f"{n:,}" for n in (below, below + accepted) if 0 < n <= most)
    near = f"near: {near}" if near else "the class takes none that is"
    return f"{shared} {value:,} is no multiple of {needed} ({near})"


class Layers:
    """The layers of a model: elements of module lists that have submodules."""

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
        """True if all tensors of a group are in one layer, or are siblings outside of layers."""
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
        while name and name not in self._names:
            name = name.rpartition(".")[0]
        return name


def _around(name: str) -> str:
    return ".".join(name.split(".")[:-2])
