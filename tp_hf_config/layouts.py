"""In which layouts the units of a width can stand along a dimension: guesses, for experiment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch

from .directions import Share
from .heads import heads_of
from .miniature import Miniature
from .twins import Dim, Layout


def layouts_of(
    mini: Miniature, name: str, dim: int, share: Share, units: int, heads: bool
) -> list[tuple[int, Layout]]:
    """The ways in which units can stand along a dimension, each with how unlikely it is.

    Heads are runs; the dimensions of a head, and of gate and up, stand in every part.
    """
    width = share.per_unit
    pieces = mini.known.layout.pieces.get(name.rpartition(".")[0], ())
    counts = {split[0] for splits in mini.known.layout.heads.values() for split in splits}
    parts = [n for n in range(1, width + 1) if width % n == 0]
    parts.sort(reverse=not heads)
    parts.sort(key=lambda n: n != len(pieces))
    blocks = [b for b in sorted(counts) if b > 1 and units % b == 0 and width > 1 and dim == 0]
    ranked = [
        (rank + place + far, Layout(n, width // n, block, offset, gap))
        for place, block in ((0, 1), *((len(parts), block) for block in blocks))
        for rank, n in enumerate(parts)
        for far, (offset, gap) in enumerate(_between(share.rest, n * block, n in counts))
        if n > 1 or block == 1
    ]
    mine = [_may_hold(mini, name, piece, share) for piece in range(len(pieces))]
    seen = _as_cut(pieces, mine, width * units, share.rest)
    return sorted(
        (
            (0 if (layout.parts, layout.offset, layout.gap) in seen else 1 + score, layout)
            for score, layout in ranked
        ),
        key=lambda one: one[0],
    )


def _may_hold(mini: Miniature, name: str, piece: int, share: Share) -> bool:
    """Whether a piece of a layer's output can be heads of a share's field.

    With twice as many query heads as key/value heads, queries are as wide as keys and values.
    """
    fields = mini.known.fields_of(name.rpartition(".")[0], heads_of(piece))
    return share.field is None or not fields or share.field in fields


def _as_cut(
    pieces: Sequence[int], mine: Sequence[bool], size: int, rest: int
) -> set[tuple[int, int, int]]:
    """Parts, offset and gap of units that fill some neighbouring pieces of a layer's output."""
    found: set[tuple[int, int, int]] = set()
    for start, end in combinations(range(len(pieces) + 1), 2):
        window, offset = pieces[start:end], sum(pieces[:start])
        if not all(mine[start:end]):
            continue
        if sum(window) == size and len(set(window)) == 1 and offset in (0, rest):
            found.add((len(window), offset, 0))
    return found


def _between(rest: int, parts: int, heads: bool) -> list[tuple[int, int]]:
    """Where the rest of a dimension can stand: behind or before the units, or in every part.

    Returns:
        Offsets of the first unit and gaps between parts, likely ones first.
    """
    if not rest:
        return [(0, 0)]
    apart = [(0, 0), (rest, 0)]
    if parts == 1 or rest % parts:
        return apart
    inside = [(0, rest // parts), (rest // parts, rest // parts)]
    return inside + apart if heads else apart + inside


def likely_first(choices: Sequence[Sequence[tuple[int, Layout]]]) -> Iterator[tuple[Layout, ...]]:
    """One layout of each, by how unlikely they are together."""

    def adding_up(total: int, rest: Sequence[Sequence[tuple[int, Layout]]]) -> Iterator[Any]:
        if not rest:
            yield from [()] * (total == 0)
            return
        for unlikely, layout in rest[0]:
            if unlikely <= total:
                for others in adding_up(total - unlikely, rest[1:]):
                    yield (layout, *others)

    for total in range(sum(max(unlikely for unlikely, _ in layouts) for layouts in choices) + 1):
        yield from adding_up(total, choices)


def overlap(dims: Iterable[Dim], units: int) -> bool:
    """Whether two widths in one dimension (query heads, key/value heads) claim one position."""
    taken: dict[tuple[str, int], set[Layout]] = {}
    for dim in dims:
        taken.setdefault((dim.name, dim.dim), set()).add(dim.layout)
    for layouts in taken.values():
        if len(layouts) > 1:
            positions = torch.cat([layout.table(units).flatten() for layout in layouts]).tolist()
            if len(set(positions)) < len(positions):
                return True
    return False
