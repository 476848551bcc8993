"""Try the layouts in which a width's units may stand, until they are told apart nowhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from math import gcd

from ..model.config_json import FieldPath
from .layout import Places, TensorDim, UnitLayout, places_of
from .layout_guesses import likely_first, overlap
from .twin_test import Links, TwinTest

_MAX_LAYOUTS = 10
"""How many layouts a step of the search tries at most: of all styles, of one, or of mixtures."""
_MOST_RUNS = 4
"""How many lengths of runs are tried in all styles together."""
_MAX_IN_VAIN = 4 * _MAX_LAYOUTS
"""After this many attempts in a row without a better one the search ends: thousands may be left."""
Style = tuple[tuple[tuple[int, UnitLayout], ...], FieldPath | None]
"""What tensor dims have in common: possible layouts with scores, and the field that sets them."""
Sources = dict[TensorDim, FieldPath | None]
"""Tensor dims in one layout each, with the field that sets them; ``None``: the joint fields."""


@dataclass(frozen=True)
class _Attempt:
    """Layouts that were tried, and what the twin test found.

    Attributes:
        sources: the tensor dims in these layouts.
        links: the result of the twin test.
        chosen: one layout for each style; empty: the tensor dims of a style have several.
    """

    sources: Sources
    links: Links
    chosen: tuple[UnitLayout, ...] = ()

    @property
    def apart(self) -> Places:
        """Return the tensor dims in which units are told apart."""
        return places_of(self.links.unequal)

    @property
    def failures(self) -> int:
        """Return in how many tensor dims units are told apart."""
        return len(self.links.unequal)


def searched(
    test: TwinTest,
    styles: Mapping[Style, Sequence[TensorDim]],
    strides: Mapping[int, Collection[int]],
    alone: Sequence[Sequence[TensorDim]] = (),
    apart_alone: Places = frozenset(),
    split: Collection[str] = (),
) -> tuple[Sources, tuple[Sources, Links]]:
    """Return the likeliest layouts, and those with the fewest tensor dims that tell units apart.

    The search tries, until units are told apart nowhere:

    1. likely layouts of all styles together;
    2. whole heads in the groups of ``alone`` that have a layer in ``split``;
    3. runs of one length in all styles;
    4. from the best attempt, other layouts for one style at a time, where units are told apart;
    5. if there are groups of ``alone``, another layout for a single tensor dim;
    6. the layouts that ``strides`` name, then mixtures of two attempts, each where the other fails.

    Units of joint fields that are told apart wherever units of a single one are (``apart_alone``)
    have nothing to do with each other: no more than likely layouts are tried.

    Args:
        test: the twin test of the width.
        styles: the tensor dims of each style; their own layouts do not count.
        strides: number of positions of a unit -> in how many parts they may stand.
        alone: the tensor dims of each group that one of the fields sets alone.
        apart_alone: the tensor dims in which units of each of the fields alone are told apart.
        split: the parameters of layers whose output is split into heads.

    Returns:
        The likeliest layouts; and the best ones, with the result of their twin test.
    """
    search = _Search(test, styles)
    search.likely_together()
    best = search.best()
    if best.failures and not (apart_alone and best.apart >= apart_alone):
        if not search.whole_heads(alone, split) and not search.runs_together():
            search.style_by_style()
        best = search.best()
        if best.failures and alone and search.one_otherwise():
            best = search.best()
        elif best.failures:
            best = search.strided(strides) or best
    return search.tried[0].sources, (best.sources, best.links)


class _Search:
    """The attempts for one width.

    Attributes:
        test: the twin test.
        styles: the tensor dims of each style.
        options: the possible layouts of each style, the likeliest first.
        tried: the attempts so far.
    """

    def __init__(self, test: TwinTest, styles: Mapping[Style, Sequence[TensorDim]]):
        self.test, self.styles = test, styles
        self.options = [[layout for _, layout in layouts] for layouts, _ in styles]
        self.tried: list[_Attempt] = []

    def best(self) -> _Attempt:
        """Return the first of the attempts with the fewest failures."""
        return min(self.tried, key=lambda one: one.failures)

    def likely_together(self) -> None:
        """Try likely layouts of all styles together, until an attempt fits."""
        for chosen in likely_first([layouts for layouts, _ in self.styles]):
            if self._fits(chosen) or len(self.tried) == _MAX_LAYOUTS:
                break

    def runs_together(self) -> bool:
        """True if runs of one length fit in all styles, or in some styles runs that divide it.

        This finds heads that no run without data came to (JetMoE's, behind experts).
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
        """True if an attempt fits in which one tensor dim, alone in its style, has another layout.

        All others have the likeliest. The attention maps of all layers side by side (ESM's
        contacts) are such a dim, beside heads in runs.
        """
        asked = {attempt.chosen for attempt in self.tried}
        first = self.tried[0].chosen
        several = [
            (*first[:place], layout, *first[place + 1 :])
            for place, alike in enumerate(self.styles.values())
            for layout in (self.options[place][:_MAX_LAYOUTS] if len(alike) == 1 else ())
        ]
        return any(self._fits(chosen) for chosen in several if chosen not in asked)

    def style_by_style(self) -> None:
        """From the best attempt, try other layouts of one style at a time, while that helps."""
        better = True
        while better:
            now = self.best()
            for chosen in self._others(now):
                self._fits(chosen)
                if self._in_vain() >= _MAX_IN_VAIN:
                    return
            least = self.best().failures
            better = 0 < least < now.failures and len(self.tried) < 4 * _MAX_LAYOUTS

    def _others(self, now: _Attempt) -> Iterator[tuple[UnitLayout, ...]]:
        """Yield an attempt's layouts, with another for one style in which units are told apart.

        After a style that made a better attempt, no other follows.
        """
        asked = {attempt.chosen for attempt in self.tried}
        for place, alike in enumerate(self.styles.values()):
            if self.best().failures < now.failures:
                break
            if any((dim.name, dim.dim) in now.apart for dim in alike):
                for layout in self.options[place][:_MAX_LAYOUTS]:
                    chosen = (*now.chosen[:place], layout, *now.chosen[place + 1 :])
                    if chosen not in asked:
                        yield chosen

    def _in_vain(self) -> int:
        """Return how many attempts there were since the best."""
        return len(self.tried) - 1 - self.tried.index(self.best())

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

    def whole_heads(self, alone: Sequence[Sequence[TensorDim]], split: Collection[str]) -> bool:
        """True if runs fit in groups whose layers are split into heads, others as they are alone.

        Every stage of Swin has another number of heads. There, units of its attention stand in
        fewer parts and longer runs than those of the stream beside it.

        Args:
            alone: the tensor dims of each group that one of the fields sets alone.
            split: the parameters of layers whose output is split into heads.
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
        del self.tried[before:]  # without a layout for each style, no other can go on from it
        return False

    def _fits(self, chosen: tuple[UnitLayout, ...]) -> bool:
        """Try one layout for each style; True if units are told apart nowhere."""
        return self._tries(_sources(self.styles, chosen), chosen)

    def _tries(self, sources: Sources, chosen: tuple[UnitLayout, ...] = ()) -> bool:
        """Try these layouts; True if no two overlap and units are told apart nowhere."""
        if overlap(sources, self.test.units):
            return False
        self.tried.append(_Attempt(sources, self.test.links(list(sources)), chosen))
        return not self.tried[-1].failures


def in_other_layouts(
    test: TwinTest, styles: Mapping[Style, Sequence[TensorDim]], sources: Sources, places: Places
) -> Iterator[tuple[Sources, Links]]:
    """Yield layouts that tell no units apart, with one style at a time in another layout.

    Twins may be interchangeable in several layouts, and a permutation neutral in only one of them
    (the upsampling of SEW, which has two time steps in a row).

    Args:
        test: the twin test of the width.
        styles: the tensor dims of each style.
        sources: the layouts to start from.
        places: tensor dims; only styles that have one of them get another layout.
    """
    for style, alike in styles.items():
        (layouts, source), own_places = style, places_of(alike)
        if not own_places & places:
            continue
        beside = {
            dim: field
            for dim, field in sources.items()
            if (dim.name, dim.dim) not in own_places or field != source
        }
        for _, layout in layouts[:_MAX_LAYOUTS]:
            trial = beside | _sources({style: alike}, [layout])
            if trial != sources and not overlap(trial, test.units):
                links = test.links(list(trial))
                if not links.unequal:
                    yield trial, links


def _is_plain(layout: UnitLayout) -> bool:
    """True if a layout is one block without offset and gaps."""
    return layout == UnitLayout(layout.parts, layout.run)


def _in_parts(likely: Sources, parts: Mapping[tuple[str, int], int], test: TwinTest) -> Sources:
    """Return the likeliest layouts, but with another number of parts where ``parts`` has one."""
    sources: Sources = {}
    for dim, field in likely.items():
        several = parts.get((dim.name, dim.dim))
        if several is not None:
            size = test.parameters[dim.name].shape[dim.dim]
            dim = TensorDim(dim.name, dim.dim, UnitLayout(several, size // (test.units * several)))
        sources[dim] = field
    return sources


def _strided(
    options: Sequence[Sequence[UnitLayout]], strides: Mapping[int, Collection[int]]
) -> Iterator[tuple[UnitLayout, ...]]:
    """Yield one layout for each style: units of a stride's size in one of its numbers of parts.

    Units of a multiple of that size stand in as many times more parts. Styles for which this layout
    is not possible keep the likeliest.

    Args:
        options: the possible layouts of each style, the likeliest first.
        strides: number of positions of a unit -> in how many parts they may stand.
    """
    for size, several in strides.items():
        for parts in several:
            layouts = [
                UnitLayout(parts * (every[0].parts * every[0].run) // size, size // parts)
                for every in options
            ]
            pairs = zip(layouts, options, strict=True)
            yield tuple(layout if layout in every else every[0] for layout, every in pairs)


def _mixed(tried: Sequence[_Attempt]) -> Iterator[Sources]:
    """Yield mixtures of two attempts: the layouts of each where the other tells units apart.

    A width may set the channels of a stream, of which every group of a convolution holds one, and
    beside it heads, which are runs.
    """
    for one, other in permutations(sorted(tried, key=lambda one: one.failures), 2):
        mixed = _with_layouts_of(other, one, one.apart) if not one.apart & other.apart else {}
        if mixed and mixed not in (one.sources, other.sources):
            yield mixed


def _no_more_than_needed(found: _Attempt, likely: _Attempt) -> Sources:
    """Return the layouts found, but the likelier ones in groups where those tell no units apart."""
    places = [{(dim.name, dim.dim) for dim in group} for group in found.links.groups]
    fine = [group for group in places if not group & likely.apart]
    return _with_layouts_of(likely, found, set().union(*fine))


def _with_layouts_of(
    other: _Attempt, one: _Attempt, places: Collection[tuple[str, int]]
) -> Sources:
    """Return the layouts of one attempt, with those of another in some places.

    An unobserved tensor dim goes with dimension 0 of its layer.
    """
    layers = {name.rpartition(".")[0] for name, dim in places if dim == 0}
    silent = {(dim.name, dim.dim) for dim in one.links.silent}
    places = {*places} | {place for place in silent if place[0].rpartition(".")[0] in layers}
    theirs = {(dim.name, dim.dim, field): dim for dim, field in other.sources.items()}
    return {
        theirs[dim.name, dim.dim, field] if (dim.name, dim.dim) in places else dim: field
        for dim, field in one.sources.items()
    }


def _sources(styles: Mapping[Style, Sequence[TensorDim]], chosen: Sequence[UnitLayout]) -> Sources:
    """Return the tensor dims with one layout for each style, and the fields that set them."""
    return {
        TensorDim(dim.name, dim.dim, layout): field
        for layout, ((_, field), alike) in zip(chosen, styles.items(), strict=True)
        for dim in alike
    }
