"""Shrink the widths of a class as far as it lets them, for a tiny model with every mechanism."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from ...fieldmap.field_map import FieldMap
from ...model.build import Refusal
from ...model.config_json import FieldPath, value_at, with_values
from ...model.shapes import Shapes, shapes
from ...model.tensors import is_matrix_stack
from .compute_budget import (
    PARTS,
    cheaper,
    crops,
    in_proportion,
    is_side,
    lighter,
    smaller_images,
    with_equal_values,
    with_few_objects,
)
from .requirements import HEAD_DIM, Requirements

_FEW = 8  # values up to this are small: they count something
_SPLIT = 16 * HEAD_DIM  # a width of 16 heads, if the class fixes their number itself (timm's)
_ROWS = 2048  # embeddings with no more rows than this look up positions, not tokens
_EXPERTS = (4, 8, 16, 32)  # numbers of experts to try
_TOKEN = ("_token_id", "_token_index")  # ends of names of special tokens
_MEDIA = ("image", "video", "audio", "vision")  # starts of token names for media
# values to try, for fields up to a limit; None: without limit
_LADDERS: tuple[tuple[int | None, tuple[int, ...]], ...] = (
    (_FEW, (4, 2, 3, 6, 8)),
    (63, (4, 6, 8, 12, 16)),
    (None, (16, 24, 32, 40, 48, 64, 96, 128)),
)


def shrunken(field_map: FieldMap, data: dict[str, Any], together: bool) -> dict[str, Any]:
    """Lower one field after the other (``together``: equal ones together) as far as required."""
    base = field_map.builder.build(data)
    if isinstance(base, Refusal):
        return data
    required = Requirements(field_map, base)
    data = with_values(data, {field: field_map.sizes[field] for field in field_map.unset})
    counts = {split[0] for splits in required.layout.heads.values() for split in splits}
    parts = {_part(field) for field in field_map.count_fields()}
    splitting = sorted(field_map.count_fields(), key=str)
    splitting += [p for p, n in field_map.sizes.items() if n in counts and p not in splitting]
    heads = field_map.count_fields() | {field for field in splitting if _part(field) not in parts}

    def runs(trial: dict[str, Any]) -> bool:
        return required.observed(trial) is not None

    def router_can_choose(trial: dict[str, Any], field: FieldPath) -> bool:
        return runs(with_values(trial, {field: value_at(trial, field) // 2}))

    data = next(filter(runs, smaller_images(field_map, data)), data)
    free = [field for field in field_map.sizes if field not in field_map.ratio_partners]
    for field in sorted(free, key=lambda field: field_map.sizes[field]):
        changes = _smaller(field_map, data, field, heads, splitting, together)
        trials = (with_values(data, {**option, **crops(data, option)}) for option in changes)
        fitting: Iterator[dict[str, Any]] = filter(runs, trials)
        if _has_experts(field_map, field):
            if router_can_choose(data, field):
                fitting = (option for option in fitting if router_can_choose(option, field))
        elif field not in heads:
            fitting = _unchanged_at_half_first(field_map, field, fitting, required.shapes)
        data = next(fitting, data)
    data = in_proportion(field_map, data, required.observed)
    rows = [field for field in field_map.sizes if _is_position_count(field_map, data, field)]
    most = _most_experts(field_map)
    data = with_few_objects(field_map, data, most, required, rows)
    data = lighter(field_map, data, most, required.observed, rows)
    data = cheaper(field_map, data, most, required.observed, rows)

    def lower(data: dict[str, Any], field: FieldPath) -> Iterator[dict[FieldPath, int]]:
        return _smaller(field_map, data, field, heads, splitting, together, any_value=True)

    widths = [field for field in free if field not in heads and not _has_experts(field_map, field)]
    return with_equal_values(data, widths, lower, required)


def _most_experts(field_map: FieldMap) -> int:
    stacks = (
        shape[0]
        for name, shape in field_map.shapes.items()
        if len(shape) == 3 and 1 not in shape and _is_stacked(field_map, name)
    )
    return max(stacks, default=0)


def _unchanged_at_half_first(
    field_map: FieldMap, field: FieldPath, fitting: Iterator[dict[str, Any]], before: Shapes
) -> Iterator[dict[str, Any]]:
    """Yield fitting configs, last those that build other layers when half of the field is cut."""
    # Electra has a projection between two widths only if they differ
    postponed = []
    for trial in fitting:
        half = value_at(trial, field) // 2
        if half in {value_at(trial, other) for other in field_map.sizes}:
            built = field_map.builder.build(with_values(trial, {field: half}))
            if not isinstance(built, Refusal) and shapes(built).keys() != before.keys():
                postponed.append(trial)
                continue
        yield trial
    yield from postponed


def _smaller(
    field_map: FieldMap,
    data: dict[str, Any],
    field: FieldPath,
    counts: Collection[FieldPath],  # fields that count heads
    splitting: Sequence[FieldPath],  # fields that may count heads
    together: bool,
    any_value: bool = False,  # values may equal those of other fields: the smallest are first
) -> Iterator[dict[FieldPath, int]]:
    """Yield changes to smaller values of a field: of the field alone, and of all equal fields.

    Values that no other field has are first, so that fields remain distinct. Widths may also take
    values of other fields, and head counts those of no other head count of the same part: query
    heads have to outnumber key/value heads. The last changes are fewer heads together with the
    width that they split, and ``_SPLIT``.
    """
    if field in field_map.must_equal:
        return
    value = value_at(data, field)
    if _is_position_count(field_map, data, field):
        return  # positions or distances: a forward pass may look up any of them
    heads = field in counts
    stacked = _has_experts(field_map, field)
    few = value <= _FEW or heads
    ladder = next(steps for limit, steps in _LADDERS if few or limit is None or value <= limit)
    if stacked:  # a router would take all of fewer experts
        ladder = _EXPERTS
    elif heads and value % 2 == 0:  # even: in proportion (Whisper's encoder, decoder)
        ladder = tuple(step for step in ladder if step % 2 == 0)
    followers = [other for other, leader in field_map.must_equal.items() if leader == field]
    current = {
        other: value_at(data, other)
        for other in field_map.sizes
        if other not in field_map.ratio_partners
    }
    equals = [
        other
        for other, size in current.items()
        if size == value
        and (other in counts) == heads
        and _has_experts(field_map, other) == stacked
    ]
    taken = {size for size in current.values() if size != value}
    least = max((current[other] for other in current if _pads(field_map, field, other)), default=0)
    ladder = tuple(step for step in ladder if least <= step < value)
    reusable = set() if few else taken
    if heads:
        reusable = taken - _other_counts(data, field, counts)
    if any_value:
        ladder, taken = tuple(sorted(ladder)), set()
    free = [step for step in ladder if step not in taken]
    for step in free + [step for step in ladder if step in reusable]:
        alone = dict.fromkeys([field, *followers], step)
        with_equals = dict.fromkeys([field, *followers, *equals], step)
        if heads and len(equals) > 1:  # equal query and key/value heads remain equal
            yield with_equals
        if not together or len(equals) == 1:
            yield alone
        if not heads and len(equals) > 1:
            yield with_equals
    if not heads and not stacked:
        widths = [field, *followers, *equals]
        yield from _with_heads(data, widths, value, splitting)
        yield from _divided(field_map, data, widths, value, alone=[field, *followers])


def _divided(
    field_map: FieldMap,
    data: dict[str, Any],
    widths: list[FieldPath],
    value: int,
    alone: list[FieldPath],
) -> Iterator[dict[FieldPath, int]]:
    """Yield changes that divide a width and numbers beside it by one number.

    A forward pass may need the proportion, though the class builds without it: Zamba's attention
    reads two hidden states side by side, each stage of FastViT is twice as wide as the one before.
    Numbers beside a large width may be shown by no shape (the size of Zamba 2's Mamba heads) or
    equal it (D-FINE's ``d_model``).
    """
    large = value > _SPLIT
    stage = not isinstance(widths[0][-1], str) and not is_side(widths[0])
    others = {field: value_at(data, field) for field in field_map.sizes if field not in widths}
    multiples = {field: size for field, size in others.items() if size % value == 0}
    beside = {f: n for f, n in field_map.non_size_fields.items() if _part(f) == _part(widths[0])}
    if multiples and (stage or large):
        yield from _by_parts(widths, value, [multiples])
    for field, number in beside.items() if large else ():
        if value % number == 0:
            both = [{field: number}, {field: number, **multiples}]
            yield from _by_parts(widths, value, both if multiples else both[:1])
    if large:
        yield dict.fromkeys(alone, _SPLIT)
    numbers = {f: n for f in beside if type(n := value_at(data, f)) is int}
    equals = {field: n for field, n in numbers.items() if n == value}
    divisors = {f: n for f, n in numbers.items() if 1 < n < value and value % n == 0}
    if equals and value >= _SPLIT:
        with_divisor = [{**equals, field: n} for field, n in divisors.items()]
        yield from _by_parts(widths, value, [equals, *with_divisor])


def _by_parts(
    widths: Sequence[FieldPath], value: int, beside: Sequence[dict[FieldPath, int]]
) -> Iterator[dict[FieldPath, int]]:
    for part in PARTS:
        if value % part or value // part < HEAD_DIM:
            continue
        for numbers in beside:
            if all(n % part == 0 and n // part > 1 for n in numbers.values()):
                narrower = {field: n // part for field, n in numbers.items()}
                yield {**dict.fromkeys(widths, value // part), **narrower}


def _pads(field_map: FieldMap, field: FieldPath, other: FieldPath) -> bool:
    """True if a field may be another one rounded up: a vocabulary padded to some multiple."""
    more = field_map.sizes[field] - field_map.sizes[other]
    return 0 < more < field_map.sizes[field] // 16 and field_map.sizes[other] > _ROWS


def _part(field: FieldPath) -> FieldPath:
    return field[:-1] if isinstance(field[-1], str) else field[:-2]


def _other_counts(
    data: dict[str, Any], field: FieldPath, counts: Collection[FieldPath]
) -> set[int]:
    """Return the other head counts in the same part of the config, or of the stages before."""
    others = {value_at(data, other) for other in counts if _part(other) == _part(field)}
    if not isinstance(field[-1], str):  # one entry for each stage
        others |= {value_at(data, (*field[:-1], stage)) for stage in range(int(field[-1]) + 1)}
    return others - {value_at(data, field)}


def _with_heads(
    data: dict[str, Any], widths: list[FieldPath], value: int, counts: Sequence[FieldPath]
) -> Iterator[dict[FieldPath, int]]:
    """Yield changes to fewer heads of the same head dim, with all widths in proportion."""
    for field in counts:  # rotary sections may fix the head dim
        number = value_at(data, field)
        if value % number or field in widths:
            continue
        taken = _other_counts(data, field, counts)
        equals = [
            other
            for other in counts
            if value_at(data, other) == number and _part(other) == _part(field)
        ]
        for step in sorted(_LADDERS[0][1]):
            if step < number and step % 2 <= number % 2 and step not in taken:
                fewer = dict.fromkeys(widths, value * step // number)
                yield {**fewer, field: step}
                if len(equals) > 1:  # key/value heads have to be as many (ESM C)
                    yield {**fewer, **dict.fromkeys(equals, step)}


def _is_position_count(field_map: FieldMap, data: dict[str, Any], field: FieldPath) -> bool:
    """True if a field only counts the positions that embeddings have rows for."""
    model = field_map.unpruned
    if value_at(data, field) > _ROWS or isinstance(model, Refusal):
        return False
    set_by = [
        key for key, expression in field_map.expressions.items() if field in expression.fields
    ]
    return bool(set_by) and all(
        dim == 0 and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        for name, dim in set_by
    )


def _has_experts(field_map: FieldMap, field: FieldPath) -> bool:
    """True if a field counts matrices that are stacked in one tensor (experts)."""
    return any(
        field in expression.fields and dim == 0 and _is_stacked(field_map, name)
        for (name, dim), expression in field_map.expressions.items()
    )


def _is_stacked(field_map: FieldMap, name: str) -> bool:
    model = field_map.unpruned
    return not isinstance(model, Refusal) and is_matrix_stack(model, name)


def small_tokens(field_map: FieldMap) -> dict[str, Any]:
    """Return the shallow config with small ids of special tokens, so that vocabularies can shrink.

    Tokens for images, videos and sounds get a different id each, from 3 on (in nested configs only
    if their id is large). Other large ids become 1.
    """
    data = field_map.depth.data
    other_names = getattr(field_map.builder.config(data), "attribute_map", {})
    tokens = {own for name, own in other_names.items() if name.endswith(_TOKEN)}

    def is_token(key: str) -> bool:
        return key.endswith(_TOKEN) or key in tokens

    media_ids: dict[str, int] = {}

    def number(key: str, value: Any, outermost: bool) -> Any:
        if is_token(key) and key.startswith(_MEDIA) and (outermost or _is_large(value)):
            return media_ids.setdefault(key, 3 + len(media_ids))  # a different id each
        return 1 if is_token(key) and _is_large(value) else value

    def visit(node: dict[str, Any], outermost: bool = False) -> dict[str, Any]:
        own = {key: number(key, value, outermost) for key, value in node.items()}
        parts = {key: visit(value) for key, value in node.items() if isinstance(value, dict)}
        return {**own, **parts}

    return visit(data, outermost=True)


def _is_large(value: Any) -> bool:
    return isinstance(value, int) and value > 2
