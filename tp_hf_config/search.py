"""Try the layouts in which the units of a width may stand, until units are told apart nowhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from math import gcd

from .layouts import likely_first, overlap
from .reference import FieldPath
from .twins import Dim, Layout, Links, TwinTest

_MAX_LAYOUTS = 10
_MOST_RUNS = 4
_MAX_IN_VAIN = 4 * _MAX_LAYOUTS
"""Attempts in a row of which none is better: it stays at that, there may be thousands more."""

Style = tuple[tuple[tuple[int, Layout], ...], FieldPath | None]
"""Dimensions alike in how their units may stand, and the field that sets them."""

Sources = dict[Dim, FieldPath | None]
"""Dimensions in one layout, each with the field that sets it."""

Places = frozenset[tuple[str, int]]
"""Dimensions in any layout."""


@dataclass(frozen=True)
class _Attempt:
    """Layouts that were tried, and what the twin test found."""

    sources: Sources
    links: Links
    chosen: tuple[Layout, ...] = ()

    @property
    def apart(self) -> Places:
        """The dimensions in which units are told apart."""
        return places_of(self.links.unequal)

    @property
    def failures(self) -> int:
        """In how many dimensions units are told apart."""
        return len(self.links.unequal)


def searched(
    test: TwinTest,
    styles: Mapping[Style, Sequence[Dim]],
    strides: Mapping[int, Collection[int]],
    alone: Sequence[Sequence[Dim]] = (),
    apart_alone: Places = frozenset(),
    split: Collection[str] = (),
) -> tuple[Sources, tuple[Sources, Links]]:
    """The likeliest layouts, and those in which the fewest dimensions tell units apart.

    First likely layouts together; then whole heads in the groups that a field sets ``alone`` of
    layers that are ``split`` into some; then runs as long in all styles; then, from the best of
    those, others for one style at a time, where units are told apart; then, beside heads, others
    for a single dimension; then those that ``strides`` name, of so many positions of a unit in so
    many parts; then two of what was tried, each where the other fails.

    Units of several fields that are told apart together wherever those of one are (``apart_alone``)
    have nothing to do with each other: no more than likely layouts are tried.
    """
    search = _Search(test, styles)
    search.likely_together()
    found = search.best()
    if found.failures and not (apart_alone and found.apart >= apart_alone):
        if not search.whole_heads(alone, split) and not search.runs_together():
            search.style_by_style()
        found = search.best()
        if found.failures and alone and search.one_otherwise():
            found = search.best()
        elif found.failures:
            found = search.strided(strides) or found
    return search.tried[0].sources, (found.sources, found.links)


class _Search:
    """What was tried so far for one width."""

    def __init__(self, test: TwinTest, styles: Mapping[Style, Sequence[Dim]]):
        self.test, self.styles = test, styles
        self.options = [[layout for _, layout in layouts] for layouts, _ in styles]
        self.tried: list[_Attempt] = []

    def best(self) -> _Attempt:
        """The first of what fails least."""
        return min(self.tried, key=lambda one: one.failures)

    def likely_together(self) -> None:
        """Likely layouts of all styles, until one fits."""
        for chosen in likely_first([layouts for layouts, _ in self.styles]):
            if self._fits(chosen) or len(self.tried) == _MAX_LAYOUTS:
                break

    def runs_together(self) -> bool:
        """Whether runs fit that are as long in all styles, or as long as goes into one.

        Heads that no run without data came to (JetMoE's, behind experts).
        """
        plain = [{one.run: one for one in some if _is_plain(one)} for some in self.options]
        runs = sorted({run for some in plain for run in some if run > 1}, reverse=True)
        several = [
            tuple(some[max(n for n in some if run % n == 0)] for some in plain)
            for run in runs
            if all(any(run % n == 0 for n in some) for some in plain)
        ]
        asked = {one.chosen for one in self.tried}
        new = [chosen for chosen in dict.fromkeys(several) if chosen not in asked]
        return any(self._fits(chosen) for chosen in new[:_MOST_RUNS])

    def one_otherwise(self) -> bool:
        """Whether a single dimension of its style fits in another layout, beside what is likeliest.

        The maps of attention of all layers side by side (ESM's contacts), beside heads in runs.
        """
        asked = {one.chosen for one in self.tried}
        first = self.tried[0].chosen
        several = [
            (*first[:place], layout, *first[place + 1 :])
            for place, alike in enumerate(self.styles.values())
            for layout in (self.options[place][:_MAX_LAYOUTS] if len(alike) == 1 else ())
        ]
        return any(self._fits(chosen) for chosen in several if chosen not in asked)

    def style_by_style(self) -> None:
        """Other layouts for one style at a time, from the best, as long as that gets better."""
        better = True
        while better:
            now = self.best()
            for chosen in self._others(now):
                self._fits(chosen)
                if self._in_vain() >= _MAX_IN_VAIN:
                    return
            least = self.best().failures
            better = 0 < least < now.failures and len(self.tried) < 4 * _MAX_LAYOUTS

    def _others(self, now: _Attempt) -> Iterator[tuple[Layout, ...]]:
        """Other layouts for each style in which units are told apart, until one is better."""
        asked = {one.chosen for one in self.tried}
        for place, alike in enumerate(self.styles.values()):
            if self.best().failures < now.failures:
                break
            if any((dim.name, dim.dim) in now.apart for dim in alike):
                for layout in self.options[place][:_MAX_LAYOUTS]:
                    chosen = (*now.chosen[:place], layout, *now.chosen[place + 1 :])
                    if chosen not in asked:
                        yield chosen

    def _in_vain(self) -> int:
        """How many attempts there were since the best."""
        return len(self.tried) - 1 - self.tried.index(self.best())

    def strided(self, strides: Mapping[int, Collection[int]]) -> _Attempt | None:
        """Units in several places, and two attempts in one; ``None`` where nothing fits."""
        likely = self.best()
        for layouts in _strided(self.options, strides):
            self._fits(layouts)
        mixed = islice(_mixed(self.tried), _MAX_LAYOUTS) if self.best().failures else ()
        for sources in mixed:
            if self._tries(sources):
                break
        found = self.best()
        if found.failures:
            return None
        return self.tried[-1] if self._tries(_no_more_than_needed(found, likely)) else found

    def whole_heads(self, alone: Sequence[Sequence[Dim]], split: Collection[str]) -> bool:
        """Runs in the groups of layers that are split into heads, the rest as it is alone.

        Every stage of Swin has another number of heads: there, units of its attention stand in
        fewer parts and longer runs than those of the stream beside it.
        """
        heads = [group for group in alone if any(d.name in split and d.dim == 0 for d in group)]
        if not heads or not all(_is_plain(dim.layout) for group in alone for dim in group):
            return False
        parts = {(dim.name, dim.dim): dim.layout.parts for group in alone for dim in group}
        for group in heads:
            common = gcd(*(dim.layout.parts for dim in group))
            parts |= {(dim.name, dim.dim): dim.layout.parts // common for dim in group}
        likely = _sources(self.styles, [options[0] for options in self.options])
        before = len(self.tried)
        if self._tries(_in_parts(likely, parts, self.test)):
            return True
        del self.tried[before:]  # its styles have no layout each, from which others could go on
        return False

    def _fits(self, chosen: tuple[Layout, ...]) -> bool:
        """Try a layout for each style; whether units are told apart nowhere."""
        return self._tries(_sources(self.styles, chosen), chosen)

    def _tries(self, sources: Sources, chosen: tuple[Layout, ...] = ()) -> bool:
        if overlap(sources, self.test.units):
            return False
        self.tried.append(_Attempt(sources, self.test.links(list(sources)), chosen))
        return not self.tried[-1].failures


def places_of(dims: Collection[Dim]) -> Places:
    """Dimensions without their layouts."""
    return frozenset((dim.name, dim.dim) for dim in dims)


def in_other_layouts(
    test: TwinTest, styles: Mapping[Style, Sequence[Dim]], sources: Sources, places: Places
) -> Iterator[tuple[Sources, Links]]:
    """Units of some places in another layout, one style at a time, where none are told apart.

    Twins may be alike in several layouts, and a permutation be neutral in one (the upsampling of
    SEW, of two time steps in a row).
    """
    for style, alike in styles.items():
        (layouts, path), here = style, places_of(alike)
        if not here & places:
            continue
        beside = {
            dim: field
            for dim, field in sources.items()
            if (dim.name, dim.dim) not in here or field != path
        }
        for _, layout in layouts[:_MAX_LAYOUTS]:
            trial = beside | _sources({style: alike}, [layout])
            if trial != sources and not overlap(trial, test.units):
                links = test.links(list(trial))
                if not links.unequal:
                    yield trial, links


def _is_plain(layout: Layout) -> bool:
    """Whether nothing stands between the parts of a layout."""
    return layout == Layout(layout.parts, layout.run)


def _in_parts(likely: Sources, parts: Mapping[tuple[str, int], int], test: TwinTest) -> Sources:
    """The likeliest layouts, but for places of which the number of parts is known."""
    found: Sources = {}
    for dim, path in likely.items():
        several = parts.get((dim.name, dim.dim))
        if several is not None:
            size = test.parameters[dim.name].shape[dim.dim]
            dim = Dim(dim.name, dim.dim, Layout(several, size // (test.units * several)))
        found[dim] = path
    return found


def _strided(
    options: Sequence[Sequence[Layout]], strides: Mapping[int, Collection[int]]
) -> Iterator[tuple[Layout, ...]]:
    """Units of some size in so many parts, those of a multiple in as many times more.

    What holds no such units stays as is likeliest.
    """
    for size, several in strides.items():
        for parts in several:
            layouts = [
                Layout(parts * (every[0].parts * every[0].run) // size, size // parts)
                for every in options
            ]
            pairs = zip(layouts, options, strict=True)
            yield tuple(layout if layout in every else every[0] for layout, every in pairs)


def _mixed(tried: Sequence[_Attempt]) -> Iterator[Sources]:
    """Two of what was tried, each where the other tells units apart.

    A width may set the channels of a stream, one in every group of a convolution, and the heads
    beside it, which are runs.
    """
    for one, other in permutations(sorted(tried, key=lambda one: one.failures), 2):
        mixed = _with_layouts_of(other, one, one.apart) if not one.apart & other.apart else {}
        if mixed and mixed not in (one.sources, other.sources):
            yield mixed


def _no_more_than_needed(found: _Attempt, likely: _Attempt) -> Sources:
    """What was found, in likelier layouts in groups where those tell no units apart."""
    places = [{(dim.name, dim.dim) for dim in group} for group in found.links.groups]
    fine = [group for group in places if not group & likely.apart]
    return _with_layouts_of(likely, found, set().union(*fine))


def _with_layouts_of(
    other: _Attempt, one: _Attempt, places: Collection[tuple[str, int]]
) -> Sources:
    """One attempt with another's layouts in some places; what is silent goes with its layer."""
    layers = {name.rpartition(".")[0] for name, dim in places if dim == 0}
    silent = {(dim.name, dim.dim) for dim in one.links.silent}
    places = {*places} | {place for place in silent if place[0].rpartition(".")[0] in layers}
    theirs = {(dim.name, dim.dim, path): dim for dim, path in other.sources.items()}
    return {
        theirs[dim.name, dim.dim, path] if (dim.name, dim.dim) in places else dim: path
        for dim, path in one.sources.items()
    }


def _sources(styles: Mapping[Style, Sequence[Dim]], chosen: Sequence[Layout]) -> Sources:
    """The dimensions with one layout for each style of them, and the fields that set them."""
    return {
        Dim(dim.name, dim.dim, layout): path
        for layout, ((_, path), alike) in zip(chosen, styles.items(), strict=True)
        for dim in alike
    }
