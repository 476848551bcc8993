"""Several fields in one build, where they cannot be taken for each other: learning costs builds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import permutations
from typing import TYPE_CHECKING

from .reference import FieldPath, Refusal

if TYPE_CHECKING:
    from .moves import Move, Sizes
    from .solve import Observable
    from .study import Study


def without_effect(study: Study, probes: Mapping[FieldPath, int]) -> set[FieldPath]:
    """The fields that change nothing at these values, or that can be no number.

    Halves are asked until all are told apart; a name that is no number in one config is none in
    those inside it either.
    """
    no_numbers: set[str | int] = set()

    def in_vain(paths: Sequence[FieldPath]) -> bool:
        left = [path for path in paths if path[-1] not in no_numbers]
        seen = not left or study.quiet({path: probes[path] for path in left})
        if len(left) == 1 and isinstance(seen, Refusal) and "'int' object" in seen.reason:
            no_numbers.add(left[0][-1])  # Python's words
        return seen is True

    matter = set(may_matter(list(probes), in_vain))
    return {path for path in probes if path not in matter or path[-1] in no_numbers}


def may_matter(
    paths: Sequence[FieldPath], in_vain: Callable[[Sequence[FieldPath]], bool]
) -> Iterator[FieldPath]:
    """The fields, in their order, without those that are in vain together with others."""
    if not paths or in_vain(paths):
        return
    if len(paths) == 1:
        yield paths[0]
        return
    half = len(paths) // 2
    yield from may_matter(paths[:half], in_vain)
    yield from may_matter(paths[half:], in_vain)


def each_of(
    study: Study, probes: Mapping[FieldPath, int], moved: Mapping[FieldPath, Sizes]
) -> Iterator[tuple[FieldPath, int, Sizes]]:
    """What each field moves at its probe: fields that moved nothing in common go in one build.

    Args:
        study: builds.
        probes: a value for each field.
        moved: what the field moved at another value.
    """
    groups: list[list[FieldPath]] = []
    for path in probes:
        for group in groups:
            if all(moved[path].keys().isdisjoint(moved[other]) for other in group):
                group.append(path)
                break
        else:
            groups.append([path])
    for group in groups:
        yield from _told_apart(study, group, probes, moved)


def _told_apart(
    study: Study,
    group: Sequence[FieldPath],
    probes: Mapping[FieldPath, int],
    moved: Mapping[FieldPath, Sizes],
) -> Iterator[tuple[FieldPath, int, Sizes]]:
    """What is seen of each field of a group; nothing of a field that has to be asked alone."""
    if len(group) < 2:
        return
    heads = any(isinstance(which, str) for path in group for _, which in moved[path])
    sizes = study.at({path: probes[path] for path in group}, watch=heads)
    known = {key for path in group for key in moved[path]}
    if not isinstance(sizes, dict) or any(size and key not in known for key, size in sizes.items()):
        half = len(group) // 2
        yield from _told_apart(study, group[:half], probes, moved)
        yield from _told_apart(study, group[half:], probes, moved)
        return
    for path in group:
        mine = {key: size for key, size in sizes.items() if key in moved[path]}
        if mine:
            yield path, probes[path], mine


def show_heads(
    study: Study, values: Mapping[FieldPath, int], moves: Mapping[FieldPath, Sequence[Move]]
) -> None:
    """Add to the moves the numbers of heads that only show where the head dim stays as it is.

    Qwen2-VL's rotary sections add up to a head's dimensions: with other numbers of heads alone, as
    with another hidden size alone, the forward pass stops before the queries are split.
    """
    hidden = _hidden_heads(study, moves)
    blind = {
        path: mine
        for path, points in moves.items()
        if (mine := {key for key in hidden if all(point.sizes.get(key) == 0 for point in points)})
    }
    moved = {
        path: {key for point in points for key in point.sizes} for path, points in moves.items()
    }
    for count, width in permutations(blind, 2):
        keys = {
            key
            for key in hidden & blind[count] & blind[width]
            if (f"{key[0]}.weight", 0) in moved[width]
            and not {(f"{key[0]}.weight", 0), (f"{key[0]}.weight", 1)} & moved[count]
        }
        sizes = study.at({count: 2 * values[count], width: 2 * values[width]}) if keys else None
        if not isinstance(sizes, dict):
            continue
        for key in (key for key in keys if sizes.get(key) == 2 * study.base[key]):
            hidden.discard(key)
            for point in moves[count]:
                share = Fraction(point.value * study.base[key], values[count])
                point.sizes[key] = int(share) if share.denominator == 1 else 0
            for point in moves[width]:
                del point.sizes[key]


def _hidden_heads(study: Study, moves: Mapping[FieldPath, Sequence[Move]]) -> set[Observable]:
    """The numbers of heads that no move of a field was seen to change."""
    sizes = [point.sizes for points in moves.values() for point in points]
    return {
        key
        for key in study.base
        if isinstance(key[1], str) and not any(one.get(key) for one in sizes)
    }
