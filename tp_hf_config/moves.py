"""One field at another value, what the class then builds differently, and the values to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .solve import Observable

Sizes = dict[Observable, int]

UNSET_PROBES = (24, 40, 8, 2, 4, 1)
"""Values that a field is tried at which has none."""


@dataclass(frozen=True)
class Move:
    """One field at another value, and the observables that the class then builds differently."""

    value: int
    sizes: Sizes


def probes_of(value: int) -> list[int]:
    """Other values of a field, the likeliest to be taken and to tell something first."""
    tried = [2 * value, 3 * value, value + 1, 4 * value]
    if value > 1:
        if value % 2 == 0 and value > 2:  # one head is no split
            tried.insert(1, value // 2)
        tried += [value - 1, 1]
        tried += [value // factor for factor in (3, 5, 7) if value % factor == 0]
    return list(dict.fromkeys(probe for probe in tried if probe != value and probe > 0))


def blind(sizes: Sizes) -> bool:
    """Whether a projection moved, and the forward pass stopped before it was taken apart.

    Falcon's heads stand in groups of whole numbers; twice as many groups need not divide them.
    """
    return any(
        not size and sizes.get((f"{name}.weight", 0))
        for (name, which), size in sizes.items()
        if isinstance(which, str)
    )


def on_a_line(base: Sizes, value: int, one: Move, two: Move) -> bool:
    """Whether two moves change every size by as much for one more of the field.

    Args:
        base: the sizes where the field has its own value.
        value: that value.
        one: a move.
        two: another.
    """
    return all(
        (one.sizes[key] - base[key]) * (two.value - value)
        == (two.sizes[key] - base[key]) * (one.value - value)
        for key in one.sizes.keys() & two.sizes.keys()
        if one.sizes[key] and two.sizes[key]
    )


def further(base: Sizes, value: int, points: Sequence[Move], then: int) -> Sizes | None:
    """The sizes at a value that the class does not take, on the lines through those that it does.

    ``None``: they are on no lines, or not on whole numbers there.

    Args:
        base: the sizes where the field has its own value.
        value: that value.
        points: the field's moves.
        then: the other value.
    """
    first, *others = points
    if not all(on_a_line(base, value, first, other) for other in others):
        return None
    found: Sizes = {}
    for key, size in first.sizes.items():
        more, left = divmod((size - base[key]) * (then - value), first.value - value)
        if left or not size:
            return None
        found[key] = base[key] + more
    return found


def is_rounded(base: Sizes, value: int, one: Move, two: Move) -> bool:
    """Whether a size is in proportion at one value, and at the other not (CANINE's shards)."""
    return any(
        one.sizes[key] * value == base[key] * one.value
        and two.sizes[key] * value != base[key] * two.value
        for key in one.sizes.keys() & two.sizes.keys()
        if one.sizes[key] and two.sizes[key]
    )
