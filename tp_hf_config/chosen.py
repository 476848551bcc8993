"""Which widths a pruner is going to prune: by field, by default, or heads in one of two modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm

from torch import nn

from .amounts import Amount
from .choice import Gqa, closest
from .errors import UnknownFieldError, UnsupportedModelError
from .limits import multiple_of
from .offers import Width, widths_of
from .reference import FieldPath, field_name
from .ties import stacks, tensor
from .widths import WidthView


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        fields: config fields by name; ``None``: every width inside the model.
        heads: whole attention heads, by Torch-Pruning's head ratios.
        gqa: how grouped-query heads go; ``None``: what suits the model.
        head_dims: the same number of dimensions of every head too.
        wrapped: another module reads the model's outputs, so by default their width stays.
        stays: the fields of a width -> why it has to stay, of those that the pruner's arguments
            keep.
    """

    fields: tuple[str, ...] | None = None
    heads: bool = False
    gqa: Gqa | None = None
    head_dims: bool = False
    wrapped: bool = False
    stays: Mapping[tuple[FieldPath, ...], str] = field(default_factory=dict)

    def free(self, widths: Iterable[Width]) -> list[Width]:
        """Those widths that need not stay."""
        return [width for width in widths if width.fields not in self.stays]


@dataclass(frozen=True)
class Chosen:
    """The widths of one pruner.

    Attributes:
        widths: all of them; no two share a dimension.
        heads: those of them that follow the head ratios.
        how: how the heads go, in words.
        left: a width that is pruned by default -> why it is not here: it shares a dimension with
            one of these.
        kept: what would be pruned as well, but for the pruner's arguments, and why it is not.
    """

    widths: tuple[Width, ...]
    heads: tuple[Width, ...] = ()
    how: str = ""
    left: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


def choose(view: WidthView, wanted: Wanted, must: bool) -> Chosen | str:
    """The widths to prune by the config graph, or why it is left to the trace.

    Args:
        view: the model.
        wanted: what is asked for.
        must: there is no trace to leave it to.

    Raises:
        UnsupportedModelError: a width cannot be pruned by any graph.
    """
    heads: list[Width] = []
    if wanted.heads:
        found = _heads(view, wanted, must)
        if isinstance(found, str):
            return found
        heads = found
    dims = _head_dims(view, wanted, must) if wanted.head_dims else []
    if isinstance(dims, str):
        return dims
    apart = {path for width in heads + dims for path in width.fields}
    others: list[Width] | str = []
    if wanted.fields is None:
        others = _default(view, wanted, must, alone=not apart)
    elif wanted.fields:
        others = _named(view, wanted, wanted.fields, must)
    if isinstance(others, str):
        return others
    rest = [width for width in others if not apart & set(width.fields)]
    left: dict[str, str] = {}
    if wanted.fields is None:
        rest, left = _that_go_together(rest, heads + dims)
    widths = tuple(dict.fromkeys(heads + dims + rest))
    _check_apart(view, widths)
    kept = tuple(_kept(view, wanted, widths))
    return Chosen(widths, tuple(heads), _in_words(view, heads), left, kept)


def _kept(view: WidthView, wanted: Wanted, chosen: Sequence[Width]) -> Iterator[str]:
    """The widths that are asked for, and stay."""
    going = {path for width in chosen for path in width.fields}
    counts, dims = view.known.count_fields(), view.head_fields() - view.known.count_fields()
    inner, named = view.inner_widths(), set(wanted.fields or ())
    for width in _widths(view):
        fields = set(width.fields)
        if width.fields not in wanted.stays or fields <= going:
            continue
        default = wanted.fields is None and inner >= fields
        heads = wanted.heads and fields & counts
        if default or heads or (wanted.head_dims and fields & dims) or named & set(width.names):
            values = " + ".join(str(view.known.values[path]) for path in width.fields)
            yield f"{width.name} stays at {values}: {wanted.stays[width.fields]}"


def check_ratios(chosen: Chosen, ratios: Mapping[str, float]) -> None:
    """Ratios of fields are for widths that are pruned, one for each, where no head ratio decides.

    Raises:
        UnsupportedModelError: one is not.
    """
    heads = {name for width in chosen.heads for name in width.names}
    free = {name for width in chosen.widths for name in width.names} - heads
    for name in ratios:
        if name in heads:
            raise UnsupportedModelError(
                f"ratios={dict(ratios)}: {name} follows head_pruning_ratio here. Leave one of them "
                "out: the ratio, or prune_num_heads (and name the field in prune=)."
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


def multiples_of(view: WidthView, chosen: Chosen) -> dict[tuple[FieldPath, ...], int]:
    """What each width stays a multiple of: the class asks for it, or kernels and classes do."""
    counts = view.known.count_fields()
    multiples: dict[tuple[FieldPath, ...], int] = {}
    for width in chosen.widths:
        multiple = _multiple_in(view, width)
        if len(width.fields) == 1 and not set(width.fields) & counts:
            own = multiple_of(view.known, width.fields[0])
            multiple = lcm(
                multiple, own // gcd(own, view.known.values[width.fields[0]] // width.units)
            )
        multiples[width.fields] = multiple
    return multiples


def amounts_of(width: Width, multiple: int, model: nn.Module) -> tuple[Amount, ...]:
    """The numbers of a width's groups; groups that are alike in them stand once."""
    together: dict[tuple[str, int], int] = {}
    for member in (member for group in width.groups for member in group.members):
        key = (member.name, member.dim)
        together[key] = together.get(key, 0) + member.layout.parts * member.layout.run
    found: dict[Amount, None] = {}
    for group in width.groups:
        layers = {
            (tensor(model, m.name).shape[m.dim], together[m.name, m.dim]) for m in group.members
        }
        amount = Amount(
            group.units,
            group.classes,
            multiple * group.grain,
            tuple(sorted(layers)),
            group.grain,
            group.least,
            group.run,
        )
        found[amount] = None
    return tuple(found)


def _multiple_in(view: WidthView, width: Width) -> int:
    """What a width has to stay a multiple of for the kernels, and to lose the same everywhere.

    Stacked experts run in a grouped matrix product that takes rows of whole 16 bytes only.
    """
    multiple = 1
    for group in width.groups:
        own = group.classes  # all groups of one width lose the same number
        for member in group.members:
            if member.dim > 0 and stacks(view.model, member.name):
                own = lcm(own, 16 // tensor(view.model, member.name).element_size())
        multiple = lcm(multiple, own // gcd(own, group.grain))
    return multiple


def _widths(view: WidthView) -> tuple[Width, ...]:
    return widths_of(view.model, view.known)


def _disjoint(widths: Iterable[Width]) -> list[Width]:
    """Those that share no field with one before them."""
    chosen: list[Width] = []
    for width in widths:
        if not any(set(width.fields) & set(other.fields) for other in chosen):
            chosen.append(width)
    return chosen


def _default(view: WidthView, wanted: Wanted, must: bool, alone: bool) -> list[Width] | str:
    """Every width inside the model that is proved; there need be none but where they go alone."""
    wrapped = wanted.wrapped
    inner = view.inner_widths()
    default = [width for width in _widths(view) if inner >= set(width.fields)]
    default = [width for width in default if not (wrapped and (width.outward or width.handed))]
    proved = [width for width in default if width.reason is None]
    if proved or not alone:
        return _disjoint(wanted.free(proved))
    reason = "; ".join(f"{w.name}: {w.reason}" for w in default) or "no width inside the model"
    if must or any(width.tried for width in default):
        raise UnsupportedModelError(f"{type(view.model).__name__}: nothing is proved. {reason}.")
    return reason


def _named(view: WidthView, wanted: Wanted, fields: Sequence[str], must: bool) -> list[Width] | str:
    """The widths that hold the named fields."""
    widths = _widths(view)
    chosen: list[Width] = []
    named = set(fields)
    for name in fields:
        candidates = [width for width in widths if name in width.names]
        proved = [width for width in candidates if width.reason is None]
        found = wanted.free(proved)
        # of several, one whose fields are all named, and the one that holds most of those
        found.sort(key=lambda one: (not named >= set(one.names), -len(named & set(one.names))))
        if proved:
            chosen += [width for width in found[:1] if width not in chosen]
            continue
        reasons = sorted({str(width.reason) for width in candidates}) or [_no_such(name, widths)]
        reason = f"{name}: {'; '.join(reasons)}"
        if not must and not any(width.tried for width in candidates):
            return reason
        raise _cannot(view, reason, UnsupportedModelError if candidates else UnknownFieldError)
    return chosen


def _no_such(name: str, widths: Sequence[Width]) -> str:
    """That there is no width of this name, and the one that is spelled most like it."""
    known = [other for width in widths for other in width.names]
    return f"no such width{closest(name, known)}"


def _heads(view: WidthView, wanted: Wanted, must: bool) -> list[Width] | str:
    """The widths that count attention heads, in the mode that is asked for."""
    counts = view.known.count_fields()
    candidates = [width for width in _widths(view) if set(width.fields) & counts]
    proved = [width for width in candidates if width.reason is None]

    def rank(width: Width) -> tuple[int, ...]:
        several = sum(view.known.moves_shapes(path) for path in set(width.fields) & counts) > 1
        can_move = all(group.units > group.classes for group in width.groups)
        return (not can_move, several is not (wanted.gqa == "group"), len(width.fields))

    if proved:
        return _disjoint(sorted(wanted.free(proved), key=rank))
    reason = "; ".join(f"{w.name}: {w.reason}" for w in candidates) or "no heads were seen"
    if must or any(width.disproved for width in candidates):
        raise _cannot(view, f"attention heads: {reason}")
    return reason


def _head_dims(view: WidthView, wanted: Wanted, must: bool) -> list[Width] | str:
    """The widths that are head dims, where the class lets them move."""
    fields = view.head_fields() - view.known.count_fields()
    candidates = [width for width in _widths(view) if set(width.fields) & fields]
    proved = [width for width in candidates if width.reason is None]
    alone = [width for width in proved if len(width.fields) == 1]
    if alone:
        return wanted.free(alone)
    reason = "; ".join(f"{w.name}: {w.reason}" for w in candidates) or "no head dims were seen"
    if view.rotates_head_dims():
        reason = (
            "it encodes positions in its head dims (its position tables are as wide as a head), so "
            f"they are not interchangeable ({reason}). Leave prune_head_dims out, or prune whole "
            "heads (prune_num_heads=True)"
        )
    if must or view.rotates_head_dims() or any(width.disproved for width in candidates):
        raise _cannot(view, f"head dims: {reason}")
    return reason


def _cannot(
    view: WidthView, reason: str, kind: type[UnsupportedModelError] = UnsupportedModelError
) -> UnsupportedModelError:
    offered = ", ".join(width.name for width in _widths(view) if width.reason is None) or "none"
    return kind(f"{type(view.model).__name__} cannot prune {reason}. Widths that can: {offered}.")


def _in_words(view: WidthView, heads: Sequence[Width]) -> str:
    """How heads go: for the report."""
    counts = view.known.count_fields()
    parts: list[str] = []
    for width in heads:
        moving = [path for path in width.fields if path in counts]
        classes = width.groups[0].classes
        if len(moving) > 1 and all(view.known.moves_shapes(path) for path in moving):
            parts.append(f"whole key/value groups ({width.name})")
        elif classes > 1:
            parts.append(f"{moving[0][-1]} out of each of {classes} key/value groups")
        elif set(width.fields) - set(moving):
            alike = len({view.known.values[path] for path in moving}) == 1
            what = "whole heads" if alike else "whole key/value groups"
            parts.append(f"{what}, and {', '.join(width.names[len(moving) :])} with them")
        else:
            parts.append(f"whole heads ({field_name(moving[0])})")
    return "; ".join(parts)


def _that_go_together(
    default: Sequence[Width], asked_for: Sequence[Width]
) -> tuple[list[Width], dict[str, str]]:
    """The default widths that share no dimension with one another or with what was asked for.

    Those that hold most of the model come first, which is the residual stream, then feed-forward
    widths.  Where a class makes a feed-forward width as a multiple of the hidden size, that is
    smaller anyway.

    Returns:
        The widths, and why each of the others stays.
    """
    owner = {place: width for width in asked_for for place in _places(width)}
    left: dict[str, str] = {}
    for width in sorted(default, key=lambda width: -width.units * width.parameters):
        shared = next((place for place in _places(width) if place in owner), None)
        if shared is None:
            owner |= dict.fromkeys(_places(width), width)
            continue
        name, dim = shared
        named = ", ".join(f'"{one}"' for one in width.names)
        left[width.name] = (
            f"it sets dimension {dim} of {name} with {owner[shared].name}. To prune it as well, "
            f"give it a pruner of its own afterwards: prune=({named},)"
        )
    return [width for width in default if width.name not in left], left


def _places(width: Width) -> dict[tuple[str, int], None]:
    """The dimensions of parameters that a width sets."""
    return {(member.name, member.dim): None for group in width.groups for member in group.members}


def _check_apart(view: WidthView, chosen: Sequence[Width]) -> None:
    """Two widths that share a dimension (heads times head dim) cannot go in one pruner."""
    owner: dict[tuple[str, int], Width] = {}
    for width in chosen:
        for name, dim in _places(width):
            other = owner.setdefault((name, dim), width)
            if other is not width:
                raise UnsupportedModelError(
                    f"{type(view.model).__name__}: {other.name} and {width.name} both set "
                    f"dimension {dim} of {name}. Prune them one after the other, "
                    "each with a pruner of its own."
                )
