"""Widths as small as a class lets them be, for a tiny copy that still has every mechanism."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from math import lcm
from typing import Any

from torch import nn

from .depth import kinds_of_layers
from .fit import value_at
from .heads import Layout, observe
from .images import crops, smaller_images
from .learn import ConfigMap
from .lighter import in_proportion, lighter
from .reference import FieldPath, Refusal, shapes, with_values
from .ties import stacks

_FEW = 8
_HEAD_DIM = 16
_SPLIT = 16 * _HEAD_DIM
"""Of a width that the class itself splits into so many heads (timm's)."""
_ROWS = 2048
_PARTS = (64, 32, 16, 8, 4, 2)
_EXPERTS = (4, 8, 16, 32)
_TOKEN = ("_token_id", "_token_index")
_PLACES = ("image", "video", "audio", "vision")
_LADDERS: tuple[tuple[int | None, tuple[int, ...]], ...] = (
    (_FEW, (4, 2, 3, 6, 8)),
    (63, (4, 6, 8, 12, 16)),
    (None, (16, 24, 32, 40, 48, 64, 96, 128)),
)


def shrunken(known: ConfigMap, data: dict[str, Any], together: bool) -> dict[str, Any]:
    """Lower one field after the other, as long as the class builds and runs as far as before."""
    base = known.builder.build(data)
    if isinstance(base, Refusal):
        return data
    unshrunken, before, repeated = shapes(base), observe(base), kinds_of_layers(base)
    several, shared = _several_per_unit(known), _shared(known)
    data = with_values(data, {path: known.sizes[path] for path in known.unset})
    counts = {split[0] for splits in before.heads.values() for split in splits}
    parts = {_part(path) for path in known.count_fields()}
    splitting = sorted(known.count_fields(), key=str)
    splitting += [p for p, n in known.sizes.items() if n in counts and p not in splitting]
    heads = known.count_fields() | {path for path in splitting if _part(path) not in parts}

    def seen(trial: dict[str, Any]) -> Layout | None:
        model = known.builder.build(trial)
        if isinstance(model, Refusal):
            return None
        built = shapes(model)
        if built.keys() != unshrunken.keys() or _single(unshrunken, built):
            return None
        if _keeps_order_alone(unshrunken, built):
            return None
        if not _still_several(several, trial, built) or not _ties_alike(model, built):
            return None
        if not repeated.items() <= kinds_of_layers(model).items():
            return None
        if not all(_still_shared(parts, path, trial, built) for path, parts in shared.items()):
            return None
        layout = observe(model)
        return layout if _alike(before, layout) else None

    def runs(trial: dict[str, Any]) -> bool:
        return seen(trial) is not None

    def leaves_room(trial: dict[str, Any], path: FieldPath) -> bool:
        """Whether a router has a choice: it runs with half of the experts too."""
        return runs(with_values(trial, {path: _get(trial, path) // 2}))

    data = next(filter(runs, smaller_images(known, data)), data)
    free = [path for path in known.sizes if path not in known.bound]
    for path in sorted(free, key=lambda path: known.sizes[path]):
        changes = _smaller(known, data, path, heads, splitting, together)
        trials = (with_values(data, {**one, **crops(data, one)}) for one in changes)
        fitting: Iterator[dict[str, Any]] = filter(runs, trials)
        if _stacked(known, path):
            if leaves_room(data, path):
                fitting = (one for one in fitting if leaves_room(one, path))
        elif path not in heads:
            fitting = _apart_at_half(known, path, fitting, unshrunken)
        data = next(fitting, data)
    data = in_proportion(known, data, seen)
    experts = [name for name, shape in known.shapes.items() if len(shape) == 3 and 1 not in shape]
    stacked = [known.shapes[name][0] for name in experts if _is_stacked(known, name)]
    rows = [path for path in known.sizes if _is_position_count(known, data, path)]
    return lighter(known, data, max(stacked, default=0), seen, rows)


def _apart_at_half(
    known: ConfigMap,
    path: FieldPath,
    fitting: Iterator[dict[str, Any]],
    before: dict[str, tuple[int, ...]],
) -> Iterator[dict[str, Any]]:
    """First those of which half is no other width's value, if the class builds other layers then.

    Electra has a projection between two widths that differ: one of them must not be twice the other
    where half of it is to go.
    """
    later = []
    for trial in fitting:
        half = _get(trial, path) // 2
        if half in {_get(trial, other) for other in known.sizes}:
            built = known.builder.build(with_values(trial, {path: half}))
            if not isinstance(built, Refusal) and shapes(built).keys() != before.keys():
                later.append(trial)
                continue
        yield trial
    yield from later


def _several_per_unit(known: ConfigMap) -> list[tuple[str, int, FieldPath]]:
    """Dimensions in which a unit of some field holds several positions, and that field.

    With one position a unit, the tiny copy could not show in which order they stand.
    """
    return [
        (name, dim, path)
        for (name, dim), expression in known.expressions.items()
        if isinstance(dim, int)
        for path in expression.fields
        if (slope := expression.terms.get(frozenset({path}), Fraction(0))) > 1
        and slope.denominator == 1  # else it is rounded: the patches of an image
    ]


def _still_several(
    several: Sequence[tuple[str, int, FieldPath]],
    data: dict[str, Any],
    built: dict[str, tuple[int, ...]],
) -> bool:
    return all(
        built[name][dim] > _get(data, path)
        for name, dim, path in several
        if name in built and dim < len(built[name])
    )


def _shared(known: ConfigMap) -> dict[FieldPath, dict[tuple[str, int], bool]]:
    """Fields that several dimensions hold different shares of: those of a head, of a group (WavLM).

    For each such dimension, whether a unit of the field takes several of its positions.
    """
    found: dict[FieldPath, dict[tuple[str, int], int]] = {}
    for path, value in known.values.items():
        for (name, dim), expression in known.expressions.items():
            slope = expression.terms.get(frozenset({path}), 0)
            if isinstance(dim, int) and 0 < slope < 1 and slope * value == expression.base:
                found.setdefault(path, {})[name, dim] = value // expression.base
        for (name, dim), power in known.powers.items():
            others = {n for other, n in power.exponents.items() if other != path}
            if isinstance(dim, int) and power.exponents.get(path) == 1 and others == {-1}:
                found.setdefault(path, {})[name, dim] = value // power.base
    return {
        path: {place: lcm(*shares.values()) > share for place, share in shares.items()}
        for path, shares in found.items()
        if len(set(shares.values())) > 1
    }


def _still_shared(
    parts: dict[tuple[str, int], bool],
    path: FieldPath,
    data: dict[str, Any],
    built: dict[str, tuple[int, ...]],
) -> bool:
    """Whether there are two units yet, each of several positions where it had several."""
    value = _get(data, path)
    shares = {(name, dim): Fraction(value, built[name][dim]) for name, dim in parts}
    if any(share.denominator != 1 for share in shares.values()):
        return False
    unit = lcm(*(int(share) for share in shares.values()))
    several = all(unit > shares[place] for place, wanted in parts.items() if wanted)
    return several and value >= 2 * unit


def _single(before: dict[str, tuple[int, ...]], built: dict[str, tuple[int, ...]]) -> bool:
    """Whether a dimension shrank to 1: attention over one patch of an image shows nothing."""
    return any(1 in built[name] and built[name].count(1) > before[name].count(1) for name in built)


def _keeps_order_alone(
    before: dict[str, tuple[int, ...]], built: dict[str, tuple[int, ...]]
) -> bool:
    """Whether a norm is over two numbers now, of which it leaves no more than which is larger.

    All tokens are alike then, and attention shows nothing (Phi-4-multimodal's sound).
    """
    matrices = {name.rpartition(".")[0] for name, shape in built.items() if len(shape) > 1}
    return any(
        shape == (2,) != before[name] and name.rpartition(".")[0] not in matrices
        for name, shape in built.items()
    )


def _ties_alike(model: Any, built: dict[str, tuple[int, ...]]) -> bool:
    """Whether tied weights are alike: Marian's decoder counts its tokens by two fields."""
    model.tie_weights()
    return shapes(model) == built


def _alike(before: Layout, after: Layout) -> bool:
    """Whether a forward pass goes as far, over heads wide enough for all that is in them.

    A head of two dimensions has no partial rotary embedding any more, and attention over a single
    token (of an image that is too small) is the same whatever its queries are.
    """
    if after.steps < before.steps or (before.ended and not after.ended):
        return False
    if after.alone > before.alone:
        return False
    for layer, splits in before.heads.items():
        now = after.heads.get(layer, ())
        if len(now) != len(splits):
            return False
        if any(new[-1] < min(old[-1], _HEAD_DIM) for new, old in zip(now, splits, strict=True)):
            return False
    return True


def _smaller(
    known: ConfigMap,
    data: dict[str, Any],
    path: FieldPath,
    counts: Collection[FieldPath],
    splitting: Sequence[FieldPath],
    together: bool,
) -> Iterator[dict[FieldPath, int]]:
    """Smaller values of a field, alone (but if ``together``) and with all fields equal to it.

    Values that no other field has come first, so that what is different stays different; small
    numbers take no others, but those of heads (``counts``), as long as there are more query heads
    than key/value heads where there were.  Last, fewer of what may count heads (``splitting``) with
    the width that they split.
    """
    if path in known.linked:
        return
    value = _get(data, path)
    if _is_position_count(known, data, path):
        return  # positions or distances: a forward pass may look up any of them
    heads = path in counts
    stacked = _stacked(known, path)
    few = value <= _FEW or heads
    ladder = next(steps for limit, steps in _LADDERS if few or limit is None or value <= limit)
    if stacked:  # of fewer experts a router would take all
        ladder = _EXPERTS
    elif heads and value % 2 == 0:  # several may go in proportion (Whisper's encoder, decoder)
        ladder = tuple(step for step in ladder if step % 2 == 0)
    followers = [other for other, leader in known.linked.items() if leader == path]
    current = {other: _get(data, other) for other in known.sizes if other not in known.bound}
    equals = [
        other
        for other, size in current.items()
        if size == value and (other in counts) == heads and _stacked(known, other) == stacked
    ]
    taken = {size for size in current.values() if size != value}
    least = max((current[other] for other in current if _pads(known, path, other)), default=0)
    ladder = tuple(step for step in ladder if step >= least)
    fresh = [step for step in ladder if step < value and step not in taken]
    if heads:
        taken_too = [step for step in ladder if step in taken - _beside(data, path, counts)]
    else:
        taken_too = [] if few else [step for step in ladder if step in taken]
    used = [step for step in taken_too if step < value]
    for step in fresh + used:
        alone = dict.fromkeys([path, *followers], step)
        with_equals = dict.fromkeys([path, *followers, *equals], step)
        if heads and len(equals) > 1:  # as many query heads as key/value heads stay as many
            yield with_equals
        if not together or len(equals) == 1:
            yield alone
        if not heads and len(equals) > 1:
            yield with_equals
    if not heads and not stacked:
        yield from _with_heads(data, [path, *followers, *equals], value, splitting)
        yield from _with_unseen(known, data, [path, *followers, *equals], value)
        if value > _SPLIT:
            yield dict.fromkeys([path, *followers], _SPLIT)


def _pads(known: ConfigMap, path: FieldPath, other: FieldPath) -> bool:
    """Whether a field may be another one rounded up: a vocabulary padded to some multiple."""
    more = known.sizes[path] - known.sizes[other]
    return 0 < more < known.sizes[path] // 16 and known.sizes[other] > _ROWS


def _part(path: FieldPath) -> FieldPath:
    """The nested config that a field stands in."""
    return path[:-2] if isinstance(path[-1], int) else path[:-1]


def _beside(data: dict[str, Any], path: FieldPath, counts: Collection[FieldPath]) -> set[int]:
    """Other numbers of heads in the same part of the config."""
    beside = {_get(data, other) for other in counts if _part(other) == _part(path)}
    if isinstance(path[-1], int):  # stages
        beside |= {_get(data, (*path[:-1], place)) for place in range(path[-1] + 1)}
    return beside - {_get(data, path)}


def _with_heads(
    data: dict[str, Any], widths: list[FieldPath], value: int, counts: Sequence[FieldPath]
) -> Iterator[dict[FieldPath, int]]:
    """Fewer heads of the same width (rotary sections may fix it), and all widths with them."""
    for path in counts:
        number = _get(data, path)
        if value % number or path in widths:
            continue
        taken = _beside(data, path, counts)
        beside = [one for one in counts if _get(data, one) == number and _part(one) == _part(path)]
        for step in sorted(_LADDERS[0][1]):
            if step < number and step % 2 <= number % 2 and step not in taken:
                fewer = dict.fromkeys(widths, value * step // number)
                yield {**fewer, path: step}
                if len(beside) > 1:  # as many key/value heads as query heads (ESM C)
                    yield {**fewer, **dict.fromkeys(beside, step)}


def _with_unseen(
    known: ConfigMap, data: dict[str, Any], widths: list[FieldPath], value: int
) -> Iterator[dict[FieldPath, int]]:
    """Less of a large width with a number that no shape shows, in proportion (Zamba 2).

    The size of Mamba's heads, of which there are as many as before; with what is as wide several
    times, where that is needed.
    """
    if value <= _SPLIT:
        return
    wider = [path for path in known.sizes if not _get(data, path) % value and path not in widths]
    for beside, number in known.silent.items():
        for part in _PARTS if _part(beside) == _part(widths[0]) and not value % number else ():
            if not number % part and number // part > 1 and value // part >= _HEAD_DIM:
                less = {**dict.fromkeys(widths, value // part), beside: number // part}
                yield less
                if wider:
                    yield {**less, **{path: _get(data, path) // part for path in wider}}


def _only_rows(known: ConfigMap, path: FieldPath) -> bool:
    """Whether a field sets nothing but the number of entries of embeddings."""
    model = known.unpruned
    places = [place for place, one in known.expressions.items() if path in one.fields]
    return (
        bool(places)
        and not isinstance(model, Refusal)
        and all(
            dim == 0 and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
            for name, dim in places
        )
    )


def _is_position_count(known: ConfigMap, data: dict[str, Any], path: FieldPath) -> bool:
    return _get(data, path) <= _ROWS and _only_rows(known, path)


def _stacked(known: ConfigMap, path: FieldPath) -> bool:
    """Whether a field counts weights that are stacked in one tensor (experts)."""
    return any(
        path in expression.fields and dim == 0 and _is_stacked(known, name)
        for (name, dim), expression in known.expressions.items()
    )


def _is_stacked(known: ConfigMap, name: str) -> bool:
    model = known.unpruned
    return not isinstance(model, Refusal) and stacks(model, name)


def _get(data: Any, path: FieldPath) -> int:
    return int(value_at(data, path))


def small_tokens(known: ConfigMap) -> dict[str, Any]:
    """Special tokens in the first few of the vocabulary, so that the vocabulary can be small."""
    data = known.depth.data
    other_names = getattr(known.builder.config(data), "attribute_map", {})
    tokens = {own for name, own in other_names.items() if name.endswith(_TOKEN)}

    def is_token(key: str) -> bool:
        return key.endswith(_TOKEN) or key in tokens

    places: dict[str, int] = {}

    def number(key: str, value: Any, outermost: bool) -> Any:
        if is_token(key) and key.startswith(_PLACES) and (outermost or _is_large(value)):
            return places.setdefault(key, 3 + len(places))  # each another
        return 1 if is_token(key) and _is_large(value) else value

    def visit(node: dict[str, Any], outermost: bool = False) -> dict[str, Any]:
        own = {key: number(key, value, outermost) for key, value in node.items()}
        parts = {key: visit(value) for key, value in node.items() if isinstance(value, dict)}
        return {**own, **parts}

    return visit(data, outermost=True)


def _is_large(value: Any) -> bool:
    return isinstance(value, int) and value > 2
