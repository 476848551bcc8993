"""Try the layouts that a width's units may have, until its units are interchangeable everywhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice, permutations
from math import gcd
from typing import Any

from ..fieldmap.unit_shares import Share
from ..forward.head_splits import heads_of
from ..model.config_json import FieldPath
from .layout import Places, Sources, TensorDim, UnitLayout, places_of, share_positions
from .tiny.tiny_model import TinyModel
from .twin_test import Links, TwinTest

_MAX_LAYOUTS = 10  # layouts that a step of the search tries: of all styles, of one, or mixtures
_MOST_RUNS = 4  # lengths of runs that are tried in all styles together
_MAX_IN_VAIN = 4 * _MAX_LAYOUTS  # attempts in a row without a better one; there may be thousands
# what tensor dims have in common: possible layouts with scores, and the field that sets them
Style = tuple[tuple[tuple[int, UnitLayout], ...], FieldPath | None]


@dataclass(frozen=True)
class _Attempt:
    sources: Sources
    links: Links
    chosen: tuple[UnitLayout, ...] = ()  # for each style; empty: the dims of a style have several

    @property
    def told_apart(self) -> Places:
        return places_of(self.links.unequal)

    @property
    def failures(self) -> int:
        return len(self.links.unequal)


def searched(
    test: TwinTest,
    styles: Mapping[Style, Sequence[TensorDim]],
    strides: Mapping[int, Collection[int]],
    single_field_groups: Sequence[Sequence[TensorDim]] = (),
    apart_alone: Places = frozenset(),
    split: Collection[str] = (),
) -> tuple[Sources, tuple[Sources, Links]]:
    """Return the likeliest layouts, and those with the fewest tensor dims that distinguish units.

    The search ends when no tensor dim does. It tries likely layouts of all styles; then whole heads
    in ``single_field_groups`` with a layer in ``split``, or runs of one length; then, from the best
    attempt, other layouts for one style or one tensor dim; at last ``strides`` and mixtures of two
    attempts.
    """
    search = _Search(test, styles)
    search.likely_together()
    best = search.best()
    # joint fields that fail wherever each fails alone (``apart_alone``) are not related
    if best.failures and not (apart_alone and best.told_apart >= apart_alone):
        if not search.whole_heads(single_field_groups, split) and not search.runs_together():
            search.style_by_style()
        best = search.best()
        if best.failures and single_field_groups and search.one_dim_changed():
            best = search.best()
        elif best.failures:
            best = search.strided(strides) or best
    return search.tried[0].sources, (best.sources, best.links)


class _Search:
    """The attempts for one width; ``options`` are the layouts of each style, likeliest first."""

    def __init__(self, test: TwinTest, styles: Mapping[Style, Sequence[TensorDim]]):
        self.test, self.styles = test, styles
        self.options = [[layout for _, layout in layouts] for layouts, _ in styles]
        self.tried: list[_Attempt] = []

    def best(self) -> _Attempt:
        return min(self.tried, key=lambda attempt: attempt.failures)

    def likely_together(self) -> None:
        for chosen in likely_first([layouts for layouts, _ in self.styles]):
            if self._fits(chosen) or len(self.tried) == _MAX_LAYOUTS:
                break

    def runs_together(self) -> bool:
        """True if runs of one length fit in all styles, or in some styles runs that divide it."""
        # heads that no pass on the meta device reaches (JetMoE's, behind experts)
        by_run = [
            {layout.run: layout for layout in layouts if layout.is_plain}
            for layouts in self.options
        ]
        runs = sorted({run for plain in by_run for run in plain if run > 1}, reverse=True)
        choices = [
            tuple(plain[max(n for n in plain if run % n == 0)] for plain in by_run)
            for run in runs
            if all(any(run % n == 0 for n in plain) for plain in by_run)
        ]
        tried = {attempt.chosen for attempt in self.tried}
        new = [chosen for chosen in dict.fromkeys(choices) if chosen not in tried]
        return any(self._fits(chosen) for chosen in new[:_MOST_RUNS])

    def one_dim_changed(self) -> bool:
        """True if an attempt fits with another layout for one tensor dim, alone in its style."""
        return any(  # the attention maps of all layers side by side (ESM's contacts), beside heads
            self._fits(chosen)
            for style, dims in enumerate(self.styles.values())
            if len(dims) == 1
            for chosen in self._with_another_layout(self.tried[0], style)
        )

    def _with_another_layout(
        self, attempt: _Attempt, style: int
    ) -> Iterator[tuple[UnitLayout, ...]]:
        """Yield an attempt's layouts with other untried ones for the style of this index."""
        tried = {other.chosen for other in self.tried}
        for layout in self.options[style][:_MAX_LAYOUTS]:
            chosen = (*attempt.chosen[:style], layout, *attempt.chosen[style + 1 :])
            if chosen not in tried:
                yield chosen

    def style_by_style(self) -> None:
        """From the best attempt, try other layouts of one style at a time, while that helps."""
        better = True
        while better:
            start = self.best()
            for chosen in self._one_style_changed(start):
                self._fits(chosen)
                if len(self.tried) - 1 - self.tried.index(self.best()) >= _MAX_IN_VAIN:
                    return
            fewest = self.best().failures
            better = 0 < fewest < start.failures and len(self.tried) < 4 * _MAX_LAYOUTS

    def _one_style_changed(self, start: _Attempt) -> Iterator[tuple[UnitLayout, ...]]:
        """Yield an attempt's layouts with others for a style that fails, until one is better."""
        for style, dims in enumerate(self.styles.values()):
            if self.best().failures < start.failures:
                break
            if not start.told_apart.isdisjoint(places_of(dims)):
                yield from self._with_another_layout(start, style)

    def strided(self, strides: Mapping[int, Collection[int]]) -> _Attempt | None:
        """Try layouts with strides, and mixtures; return the best attempt if it fits, else None."""
        likely = self.best()
        for layouts in _strided(self.options, strides):
            self._fits(layouts)
        mixed = islice(_mixed(self.tried), _MAX_LAYOUTS) if self.best().failures else ()
        for sources in mixed:
            if self._tries(sources):
                break
        best = self.best()
        if best.failures:
            return None
        return self.tried[-1] if self._tries(_no_more_than_needed(best, likely)) else best

    def whole_heads(self, groups: Sequence[Sequence[TensorDim]], split: Collection[str]) -> bool:
        """True if runs fit in groups whose layers are split into heads, and others unchanged."""
        # Swin's stages differ in heads: units of attention have fewer parts than the stream's
        head_groups = [g for g in groups if any(d.name in split and d.dim == 0 for d in g)]
        if not head_groups or not all(dim.layout.is_plain for group in groups for dim in group):
            return False
        parts = {dim.place: dim.layout.parts for group in groups for dim in group}
        for group in head_groups:
            common = gcd(*(dim.layout.parts for dim in group))
            parts |= {dim.place: dim.layout.parts // common for dim in group}
        likely = _sources(self.styles, [options[0] for options in self.options])
        before = len(self.tried)
        if self._tries(_in_parts(likely, parts, self.test)):
            return True
        del self.tried[before:]  # the next steps need attempts with a layout for each style
        return False

    def _fits(self, chosen: tuple[UnitLayout, ...]) -> bool:
        return self._tries(_sources(self.styles, chosen), chosen)

    def _tries(self, sources: Sources, chosen: tuple[UnitLayout, ...] = ()) -> bool:
        """Try these layouts; True if no two overlap and no tensor dim distinguishes units."""
        if overlap(sources, self.test.units):
            return False
        self.tried.append(_Attempt(sources, self.test.links(list(sources)), chosen))
        return not self.tried[-1].failures


def _in_parts(likely: Sources, parts: Mapping[tuple[str, int], int], test: TwinTest) -> Sources:
    sources: dict[TensorDim, FieldPath | None] = {}
    for dim, field in likely.items():
        count = parts.get(dim.place)
        if count is not None:
            size = test.parameters[dim.name].shape[dim.dim]
            dim = replace(dim, layout=UnitLayout(count, size // (test.units * count)))
        sources[dim] = field
    return sources


def _strided(
    options: Sequence[Sequence[UnitLayout]], strides: Mapping[int, Collection[int]]
) -> Iterator[tuple[UnitLayout, ...]]:
    """Yield one layout for each style: units of a stride's size in one of its numbers of parts."""
    for size, part_counts in strides.items():
        for parts in part_counts:
            strided = [
                UnitLayout(parts * (layouts[0].parts * layouts[0].run) // size, size // parts)
                for layouts in options
            ]
            pairs = zip(strided, options, strict=True)
            yield tuple(layout if layout in layouts else layouts[0] for layout, layouts in pairs)


def _mixed(tried: Sequence[_Attempt]) -> Iterator[Sources]:
    """Yield mixtures of two attempts: the layouts of each where the other distinguishes units."""
    # a stream's channels, one in every group of a convolution, and heads, which are runs
    best_first = sorted(tried, key=lambda attempt: attempt.failures)
    for attempt, other in permutations(best_first, 2):
        if attempt.told_apart.isdisjoint(other.told_apart):
            mixed = _with_layouts_of(other, attempt, attempt.told_apart)
            if mixed and mixed not in (attempt.sources, other.sources):
                yield mixed


def _no_more_than_needed(best: _Attempt, likely: _Attempt) -> Sources:
    """Return the best layouts, but likelier ones in groups where those distinguish no units."""
    places = map(places_of, best.links.groups)
    fine = [group for group in places if group.isdisjoint(likely.told_apart)]
    return _with_layouts_of(likely, best, frozenset().union(*fine))


def _with_layouts_of(other: _Attempt, attempt: _Attempt, places: Places) -> Sources:
    """Return the layouts of an attempt, with those of another in some places."""
    # an unobserved tensor dim has the layout of its layer's dimension 0
    layers = {name.rpartition(".")[0] for name, dim in places if dim == 0}
    places |= places_of([dim for dim in attempt.links.unobserved if dim.layer in layers])
    others = {(dim.place, field): dim for dim, field in other.sources.items()}
    return {
        others[dim.place, field] if dim.place in places else dim: field
        for dim, field in attempt.sources.items()
    }


def _sources(styles: Mapping[Style, Sequence[TensorDim]], chosen: Sequence[UnitLayout]) -> Sources:
    return {
        replace(dim, layout=layout): field
        for layout, ((_, field), dims) in zip(chosen, styles.items(), strict=True)
        for dim in dims
    }


def layouts_of(
    tiny: TinyModel, name: str, dim: int, share: Share, units: int, heads: bool
) -> list[tuple[int, UnitLayout]]:
    """Return the layouts that units can have along a tensor dim, with scores; 0 is likeliest.

    Heads are runs. The dimensions of a head, and the units of gate and up, are in every part.
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
    """True if a piece of a layer's output can be heads of the field of a share."""
    # with two query heads for each key/value head, queries are as wide as keys and values together
    fields = tiny.field_map.fields_of(name.rpartition(".")[0], heads_of(piece))
    return share.field is None or not fields or share.field in fields


def _filling_pieces(
    pieces: Sequence[int], may_hold: Sequence[bool], size: int, rest: int
) -> set[tuple[int, int, int]]:
    """Return (parts, offset, gap) of layouts that fill neighbouring pieces of equal size."""
    layouts: set[tuple[int, int, int]] = set()
    for start, end in combinations(range(len(pieces) + 1), 2):
        window, offset = pieces[start:end], sum(pieces[:start])
        fills = sum(window) == size and len(set(window)) == 1 and offset in (0, rest)
        if fills and all(may_hold[start:end]):
            layouts.add((len(window), offset, 0))
    return layouts


def _between(rest: int, parts: int, heads: bool) -> list[tuple[int, int]]:
    """Return likely (offset, gap): the rest may be after or before the units, or in every part."""
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
    """True if two widths along one tensor dim (query and key/value heads) claim one position."""
    by_place: dict[tuple[str, int], set[UnitLayout]] = {}
    for dim in dims:
        by_place.setdefault(dim.place, set()).add(dim.layout)
    several = (layouts for layouts in by_place.values() if len(layouts) > 1)
    return any(share_positions((layout, units) for layout in layouts) for layouts in several)
