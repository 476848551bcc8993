"""Guess the layouts in which the units of a width can stand; experiments decide among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from ..fieldmap.unit_shares import Share
from ..forward.head_splits import heads_of
from .layout import TensorDim, UnitLayout, share_positions
from .tiny.tiny_model import TinyModel


def layouts_of(
    tiny: TinyModel, name: str, dim: int, share: Share, units: int, heads: bool
) -> list[tuple[int, UnitLayout]]:
    """Return the layouts in which units can stand along a tensor dim, with scores; 0 is likeliest.

    Heads are runs. The dimensions of a head, and the units of gate and up, stand in every part.
    """
    width = share.per_unit
    pieces = tiny.field_map.splits.pieces.get(name.rpartition(".")[0], ())
    counts = {split[0] for splits in tiny.field_map.splits.heads.values() for split in splits}
    parts = [n for n in range(1, width + 1) if width % n == 0]
    parts.sort(reverse=not heads)
    parts.sort(key=lambda n: n != len(pieces))
    blocks = [b for b in sorted(counts) if b > 1 and units % b == 0 and width > 1 and dim == 0]
    ranked = [
        (rank + place + far, UnitLayout(n, width // n, block, offset, gap))
        for place, block in ((0, 1), *((len(parts), block) for block in blocks))
        for rank, n in enumerate(parts)
        for far, (offset, gap) in enumerate(_between(share.rest, n * block, n in counts))
        if n > 1 or block == 1
    ]
    may_hold = [_may_hold(tiny, name, piece, share) for piece in range(len(pieces))]
    likeliest = _filling_pieces(pieces, may_hold, width * units, share.rest)
    scored = [
        (0 if (layout.parts, layout.offset, layout.gap) in likeliest else 1 + score, layout)
        for score, layout in ranked
    ]
    return sorted(scored, key=lambda pair: pair[0])


def _may_hold(tiny: TinyModel, name: str, piece: int, share: Share) -> bool:
    """True if a piece of a layer's output can be heads of the field of a share.

    With twice as many query heads as key/value heads, queries are as wide as keys and values
    together.
    """
    fields = tiny.field_map.fields_of(name.rpartition(".")[0], heads_of(piece))
    return share.field is None or not fields or share.field in fields


def _filling_pieces(
    pieces: Sequence[int], may_hold: Sequence[bool], size: int, rest: int
) -> set[tuple[int, int, int]]:
    """Return parts, offset and gap of the layouts that fill neighbouring pieces of equal size.

    The units take ``size`` positions, and ``rest`` belong to something else.
    """
    layouts: set[tuple[int, int, int]] = set()
    for start, end in combinations(range(len(pieces) + 1), 2):
        window, offset = pieces[start:end], sum(pieces[:start])
        fills = sum(window) == size and len(set(window)) == 1 and offset in (0, rest)
        if fills and all(may_hold[start:end]):
            layouts.add((len(window), offset, 0))
    return layouts


def _between(rest: int, parts: int, heads: bool) -> list[tuple[int, int]]:
    """Return where the rest of a dimension can stand: after or before the units, or in every part.

    Each is the offset of the first unit and the gap behind each part; likely ones come first.
    """
    if not rest:
        return [(0, 0)]
    outside = [(0, 0), (rest, 0)]
    if parts == 1 or rest % parts:
        return outside
    inside = [(0, rest // parts), (rest // parts, rest // parts)]
    return inside + outside if heads else outside + inside


def likely_first(
    choices: Sequence[Sequence[tuple[int, UnitLayout]]],
) -> Iterator[tuple[UnitLayout, ...]]:
    """Yield combinations of one layout for each style, the lowest sums of scores first."""

    def adding_up(total: int, rest: Sequence[Sequence[tuple[int, UnitLayout]]]) -> Iterator[Any]:
        """Yield the combinations whose scores have this sum."""
        if not rest:
            yield from [()] * (total == 0)
            return
        for score, layout in rest[0]:
            if score <= total:
                for others in adding_up(total - score, rest[1:]):
                    yield (layout, *others)

    for total in range(sum(max(score for score, _ in layouts) for layouts in choices) + 1):
        yield from adding_up(total, choices)


def overlap(dims: Iterable[TensorDim], units: int) -> bool:
    """True if two widths along one tensor dim (query heads, key/value heads) claim one position.

    A tensor dim that is there in several layouts holds several widths.
    """
    by_place: dict[tuple[str, int], set[UnitLayout]] = {}
    for dim in dims:
        by_place.setdefault(dim.place, set()).add(dim.layout)
    several = (layouts for layouts in by_place.values() if len(layouts) > 1)
    return any(share_positions((layout, units) for layout in layouts) for layouts in several)
