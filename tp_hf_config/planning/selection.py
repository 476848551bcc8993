"""Choose the widths that one pruner prunes, and the numbers that they may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm

from torch import nn

from ..errors import UnknownFieldError, UnsupportedModelError, closest
from ..fieldmap.field_map import multiple_of
from ..fieldmap.model_view import ModelView
from ..graph.experiments import experiments_of
from ..graph.full_size import Group
from ..graph.prunable import Width, widths_of
from ..graph.sides import layer_side
from ..graph.unit_count import EXACT, MULTIPLES, NEAR_HEAD_DIM, Grid, multiple_for_round_to
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.layer_entries import name_in_all_layers
from ..model.tensors import is_matrix_stack, tensor
from ..twin.layout import TensorDim
from .settings import Gqa, Rule, Target

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
    heads, ffn, ranks = view.head_fields(), target.least("ffn"), target.least("ranks")
    if fields & (heads - counts):
        each_rank, needed = 1, target.least("head_dim")
    else:
        # tensor parallelism divides heads and inner widths among the ranks, not the hidden size
        inside = (ranks > 1 or ffn > 1) and all(map(Layers(view).hold, width.groups))
        each_rank = ranks if inside else 1
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
    ranks = target.least("ranks")
    parts = sorted(target.rules.items(), key=lambda part: part[1].ranks > 1)  # ranks last
    for part, rule in parts:
        if not rule.else_:
            continue  # a format that takes every width
        lines: dict[str, None] = {}
        for width in largest:
            said = _unmet(view, width, found, rule, ranks)
            if said is not None and (rule.ranks == 1 or width.name not in named):
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
    if not width.groups or (rule.source and _needed(view, width, Target(rules={"": rule})) == 1):
        return None
    each = most // width.units
    needed = _needed(view, width, Target(rules={"": replace(rule, ranks=ranks)})) * each
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


@dataclass(frozen=True)
class Wanted:
    """What the user asks to prune."""

    # names of config fields; None: see cheapest
    fields: tuple[str, ...] | None = None
    heads: bool = False  # prune whole attention heads, by Torch-Pruning's head ratios
    gqa: Gqa | None = None  # None: whichever suits the model
    head_dims: bool = False  # also prune the same number of dimensions of every head
    stays: Collection[tuple[FieldPath, ...]] = ()  # fields of widths that arguments keep
    # If no field is named: prune only inner widths, if there are any. False: every width inside the
    # model, as Torch-Pruning's own arguments mean.
    cheapest: bool = True
    target: Target = ANY  # tools that the widths have to suit

    def free(self, widths: Iterable[Width]) -> list[Width]:
        return [width for width in widths if width.fields not in self.stays]


@dataclass(frozen=True)
class Chosen:
    """The widths that one pruner prunes."""

    widths: tuple[Width, ...]  # no two share a tensor dim
    heads: tuple[Width, ...] = ()  # those of them that follow the head ratios
    how: str = ""  # how the heads are pruned, in words
    # name of a default width -> why it is left out: it shares a tensor dim with another
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)


def choose(view: ModelView, wanted: Wanted) -> Chosen:
    """Return the widths to prune; raise if nothing is asked for or it cannot be pruned."""
    if wanted.fields == () and not wanted.heads and not wanted.head_dims:
        raise ValueError(
            "prune=() names no field, and no heads are pruned either, so nothing would be pruned. "
            "Name a field, or pass prune='inner' (the widths of feed-forward layers and experts)"
        )
    asked = _asked_alone(view, wanted)
    _check_tried(view, asked)
    heads = _heads(view, wanted) if wanted.heads else []
    dims = _head_dims(view, wanted) if wanted.head_dims else []
    head_fields = {field for width in heads + dims for field in width.fields}
    if wanted.fields is None:
        others = _default(view, wanted, alone=not head_fields)
    else:
        others = _named(view, wanted, asked)
    rest = [width for width in others if not head_fields & set(width.fields)]
    left_out: dict[str, str] = {}
    if wanted.fields is None:
        rest, left_out = _sharing_nothing(rest, heads + dims)
    widths = tuple(dict.fromkeys(heads + dims + rest))
    adapted = {width: in_multiples(view, width, wanted.target) for width in widths}
    of_heads = tuple(adapted[width] for width in heads)
    return Chosen(tuple(adapted.values()), of_heads, _in_words(view, heads), left_out)


def _asked_alone(view: ModelView, wanted: Wanted) -> tuple[FieldPath, ...]:
    """Return the fields that are asked for, if no other width has to be examined; else none."""
    if wanted.heads or wanted.head_dims or wanted.stays:
        return ()
    by_name = {field_name(field): field for field in view.field_map.values}
    names = dict.fromkeys(wanted.fields or ())
    return tuple(by_name[name] for name in names) if names.keys() <= by_name.keys() else ()


def _check_tried(view: ModelView, asked: tuple[FieldPath, ...]) -> None:
    tiny = experiments_of(view.field_map, fields=asked).tiny
    if not isinstance(tiny, Refusal):
        return
    cls, inner = type(view.model), type(view.model.base_model)
    way_out = "tp_hf_config.prunable(config) shows whether the class runs with another config."
    if inner is not cls:
        way_out = f"Load the weights into a class that does: {inner.__name__}.from_pretrained(...)."
    raise UnsupportedModelError(
        f"{cls.__name__} cannot be pruned: {tiny.reason.rstrip('.')}. To find the channels that "
        "belong together, a tiny model of the class has to run forward and backward in float64. "
        f"{way_out}"
    )


def check_ratios(chosen: Chosen, ratios: Mapping[str, float]) -> None:
    """Raise unless each ratio belongs to a pruned width, and each width has at most one ratio."""
    heads = {name for width in chosen.heads for name in width.names}
    free = {name for width in chosen.widths for name in width.names} - heads
    for name in ratios:
        if name in heads:
            raise UnsupportedModelError(
                f"ratios={dict(ratios)}: {name} is pruned by head_pruning_ratio. Leave it out of "
                "ratios=, or leave out prune_num_heads and name the field in prune=."
            )
        if name not in free:
            raise UnsupportedModelError(
                f"ratios={dict(ratios)}: {name} is not among the fields to prune "
                f"({', '.join(sorted(free))}){closest(name, free)}."
            )
    for width in chosen.widths:
        own = {name: ratios[name] for name in width.names if name in ratios}
        if len(set(own.values())) > 1:
            raise UnsupportedModelError(
                f"ratios={dict(ratios)}: {' and '.join(own)} can only be pruned together "
                f"({width.name}). Give one of them a ratio."
            )


def _widths(view: ModelView) -> tuple[Width, ...]:
    return widths_of(view.model, view.field_map)


def _disjoint(widths: Iterable[Width]) -> list[Width]:
    chosen: list[Width] = []
    for width in widths:
        if not any(set(width.fields) & set(other.fields) for other in chosen):
            chosen.append(width)
    return chosen


def _default(view: ModelView, wanted: Wanted, alone: bool) -> list[Width]:
    """Return the proved widths that are pruned if none is named; if ``alone``, at least one.

    These are the cheapest, the inner widths; in a class without them, all inside the model.
    """
    default = _inside(view)
    proved = [width for width in default if width.reason is None]
    if not proved and alone:
        reason = "; ".join(f"{w.name}: {w.reason}" for w in default) or "no width inside the model"
        raise UnsupportedModelError(f"{type(view.model).__name__}: no width is proved. {reason}.")
    inner = inner_widths_of(view) if wanted.cheapest else ()
    proved = [width for width in proved if width in inner] or proved
    return _disjoint(wanted.free(proved))


def _inside(view: ModelView) -> list[Width]:
    inner = view.inner_widths()
    widths = [width for width in _widths(view) if inner >= set(width.fields)]
    # a module around the model reads its outputs, so their width is kept
    return [w for w in widths if not (view.prefix and (w.outward or w.encoder_states))]


def _named(view: ModelView, wanted: Wanted, asked: tuple[FieldPath, ...]) -> list[Width]:
    """Return the widths with the named fields, except for those that the arguments keep."""
    widths = widths_of(view.model, view.field_map, fields=asked)
    if any(width.reason for width in widths):  # others may hold the field
        widths = _widths(view)
    chosen: list[Width] = []
    named = set(wanted.fields or ())
    for name in wanted.fields or ():
        candidates = [width for width in widths if name in width.names]
        proved = [width for width in candidates if width.reason is None]
        free = wanted.free(proved)
        # first those whose fields are all named, then those that hold most of the named fields
        free.sort(key=lambda w: (not named >= set(w.names), -len(named & set(w.names))))
        if proved:
            chosen += [width for width in free[:1] if width not in chosen]
            continue
        others = [other for width in widths for other in width.names]
        reasons = "; ".join(sorted({str(width.reason) for width in candidates}))
        reason = f"{name}: {reasons or f'no such width{closest(name, others)}'}"
        raise _cannot(view, reason, UnsupportedModelError if candidates else UnknownFieldError)
    return chosen


def _heads(view: ModelView, wanted: Wanted) -> list[Width]:
    """Return the widths that count attention heads, preferring those that match ``wanted.gqa``."""
    counts = view.field_map.count_fields()
    candidates = [width for width in _widths(view) if set(width.fields) & counts]
    proved = [width for width in candidates if width.reason is None]

    def rank(width: Width) -> tuple[int, ...]:
        several = (
            sum(view.field_map.moves_shapes(field) for field in set(width.fields) & counts) > 1
        )
        can_move = all(group.count.units > group.count.channel_groups for group in width.groups)
        return (not can_move, several is not (wanted.gqa == "group"), len(width.fields))

    if proved and wanted.gqa:  # disjoint first: the other mode must not replace a kept width
        return wanted.free(_disjoint(sorted(proved, key=rank)))
    if proved:
        return _disjoint(sorted(wanted.free(proved), key=rank))
    reason = "; ".join(f"{w.name}: {w.reason}" for w in candidates) or (
        "no attention heads were found"
    )
    raise _cannot(view, f"attention heads: {reason}")


def _head_dims(view: ModelView, wanted: Wanted) -> list[Width]:
    fields = view.head_fields() - view.field_map.count_fields()
    candidates = [width for width in _widths(view) if set(width.fields) & fields]
    proved = [width for width in candidates if width.reason is None]
    alone = [width for width in proved if len(width.fields) == 1]
    if alone:
        return wanted.free(alone)
    reason = "; ".join(f"{w.name}: {w.reason}" for w in candidates) or "no head dims were found"
    if view.rotates_head_dims():
        reason = (
            "it encodes positions in its head dims (its position tables are as wide as a head), so "
            f"they are not interchangeable ({reason}). Leave prune_head_dims out, or prune whole "
            "heads (prune_num_heads=True)"
        )
    raise _cannot(view, f"head dims: {reason}")


def _cannot(
    view: ModelView, reason: str, kind: type[UnsupportedModelError] = UnsupportedModelError
) -> UnsupportedModelError:
    """Return the error for what cannot be pruned; it names the widths that can."""
    offered = ", ".join(width.name for width in _widths(view) if width.reason is None) or "none"
    return kind(
        f"{type(view.model).__name__} cannot prune {reason}. Widths that can be pruned: {offered}."
    )


def _in_words(view: ModelView, heads: Sequence[Width]) -> str:
    counts = view.field_map.count_fields()
    parts: list[str] = []
    for width in heads:
        moving = [field for field in width.fields if field in counts]
        channel_groups = width.groups[0].count.channel_groups
        if len(moving) > 1 and all(view.field_map.moves_shapes(field) for field in moving):
            parts.append(f"whole key/value groups ({width.name})")
        elif channel_groups > 1:
            parts.append(f"{moving[0][-1]} out of each of {channel_groups} key/value groups")
        elif set(width.fields) - set(moving):
            alike = len({view.field_map.values[field] for field in moving}) == 1
            what = "whole heads" if alike else "whole key/value groups"
            parts.append(f"{what}, and {', '.join(width.names[len(moving) :])} with them")
        else:
            parts.append(f"whole heads ({field_name(moving[0])})")
    return "; ".join(parts)


def _sharing_nothing(
    default: Sequence[Width], asked_for: Sequence[Width]
) -> tuple[list[Width], dict[str, str]]:
    """Return the default widths that share no tensor dim, and why each other one is left out.

    Of those that share one, the width with most parameters is kept: the residual stream, then
    feed-forward widths. A feed-forward width that is a multiple of the hidden size shrinks with it
    anyway.
    """
    left_out: dict[str, str] = {}
    largest_first = sorted(default, key=lambda width: -width.units * width.parameters)
    for width, other, (parameter, dim) in _sharing((*asked_for, *largest_first)):
        named = ", ".join(f'"{name}"' for name in width.names)
        left_out[width.name] = (
            f"it sets dimension {dim} of {parameter} together with {other.name}. To prune it too, "
            f"make another pruner afterwards: prune=({named},)"
        )
    return [width for width in default if width.name not in left_out], left_out


def _sharing(widths: Iterable[Width]) -> Iterator[tuple[Width, Width, tuple[str, int]]]:
    """Yield each width that shares a tensor dim with an earlier one, with that one and the dim."""
    owner: dict[tuple[str, int], Width] = {}
    for width in widths:
        places = {dim.place: width for group in width.groups for dim in group.dims}
        shared = next((place for place in places if place in owner), None)
        if shared is None:
            owner |= places
        else:
            yield width, owner[shared], shared


def check_apart(view: ModelView, chosen: Chosen) -> None:
    """Raise if two widths share a tensor dim (heads times head dim): no pruner can do both."""
    for width, other, (name, dim) in _sharing(chosen.widths):
        raise UnsupportedModelError(
            f"{type(view.model).__name__}: {other.name} and {width.name} both set dimension {dim} "
            f"of {name}. Prune them one after the other, each with a pruner of its own."
        )


def inner_widths_of(view: ModelView) -> tuple[Width, ...]:
    """Return the proved widths inside single layers, of feed-forward layers and experts."""
    layers = Layers(view)
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


def _is_joined(view: ModelView, group: Group, streams: set[FieldPath]) -> bool:
    """True if several weights join a group to the streams, and no stream field sets its width."""
    joined: set[str] = set()
    for dim in group.dims:
        axes = range(tensor(view.model, dim.name).ndim)
        fields = [view.field_map.fields_of(dim.name, axis) for axis in axes]
        if fields.pop(dim.dim) & streams:
            return False
        if any(each & streams for each in fields):
            joined.add(dim.name)
    return len(joined) > 1
