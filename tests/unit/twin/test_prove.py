"""What the twin test linked, and what a second look makes of groups that are not proved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from tp_hf_config.fieldmap.unit_shares import Share
from tp_hf_config.twin.find_groups import _without_twins
from tp_hf_config.twin.layout import TensorDim
from tp_hf_config.twin.layout_search import layouts_of
from tp_hf_config.twin.prove import second_look
from tp_hf_config.twin.twin_test import Links, TwinTest

ROWS, COLUMNS, OTHER = TensorDim("0.weight", 0), TensorDim("1.weight", 1), TensorDim("2.weight", 0)
FIELD = ("hidden_size",)


class Faint:
    """Experiments in which ``whole`` groups alone may change places, and links hardly show."""

    units = 4
    model = torch.nn.Module()

    def __init__(
        self, whole: Collection[frozenset[TensorDim]], linked: Sequence[Sequence[TensorDim]]
    ):
        self.whole, self.linked = whole, linked
        self.asked: list[set[TensorDim]] = []
        self.parameters = {dim.name: torch.zeros(4, 4) for dim in (ROWS, COLUMNS, OTHER)}

    def proves(self, dims: Iterable[TensorDim], order: Any) -> bool:
        left = set(dims)
        for group in self.whole:
            if group <= left:
                left -= group
        return not left

    def alike(self, dims: Iterable[TensorDim], classes: int) -> bool:
        return True

    def unused(self, names: Iterable[str]) -> bool:
        return False

    def links(
        self, dims: Sequence[TensorDim], doubted: Collection[TensorDim], still_doubted: Any
    ) -> Links:
        self.asked.append({*doubted})
        return Links(tuple(map(tuple, self.linked)), (), ())


def looked(test: Any, *groups: Sequence[TensorDim]) -> Any:
    sources = {dim: FIELD for group in groups for dim in group}
    return second_look(test, sources, (FIELD,), Links(tuple(map(tuple, groups)), (), ()))


def test_dimensions_that_are_linked_after_all_are_one_group() -> None:
    test = Faint([frozenset({ROWS, COLUMNS}), frozenset({OTHER})], [(ROWS, COLUMNS), (OTHER,)])
    found = looked(test, [ROWS], [COLUMNS], [OTHER])
    assert found.reason is None
    assert [group.dims for group in found.groups] == [(ROWS, COLUMNS), (OTHER,)]
    assert test.asked == [{ROWS, COLUMNS}]


def test_what_is_never_seen_linked_and_changes_places_together_is_one_group() -> None:
    """RT-DETR's decoder: what its last layers hand on is too faint to show."""
    test = Faint([frozenset({ROWS, COLUMNS}), frozenset({OTHER})], [(ROWS,), (COLUMNS,), (OTHER,)])
    found = looked(test, [ROWS], [COLUMNS], [OTHER])
    assert found.reason is None
    assert [group.dims for group in found.groups] == [(OTHER,), (ROWS, COLUMNS)]


def test_what_does_not_even_change_places_together_is_not_looked_at_again() -> None:
    test = Faint([frozenset({OTHER})], [])
    assert looked(test, [ROWS], [COLUMNS], [OTHER]) is None
    assert test.asked == []


def test_units_stand_nowhere_but_in_their_dimension() -> None:
    """Mistral Large 4: a key and its turned part for every head, and 24 positions beside them."""
    layout = SimpleNamespace(pieces={}, heads={"q": ((2, 18),)})
    known = SimpleNamespace(splits=layout, fields_of=lambda *_: frozenset())
    tiny: Any = SimpleNamespace(field_map=known)
    found = [one for _, one in layouts_of(tiny, "k.weight", 0, Share(FIELD, 2, 24), 6, False)]
    assert max(int(layout.table(6).max()) for layout in found) == 35
    assert any(layout.blocks == 2 and layout.gap == 6 for layout in found)


def test_parts_that_no_token_goes_to_do_not_make_the_others_idle() -> None:
    """First and last of many experts may both have nothing to do: where they stand shows nothing.

    What the others do shows as all change places.
    """

    class Competing:
        units = 4

        def proves(self, dims: Collection[TensorDim], order: Sequence[int]) -> bool:
            return len(dims) == 2 or list(order) == [3, 1, 2, 0]

    dims = {TensorDim("layers.0.experts.up", 0): FIELD, TensorDim("layers.0.gate.weight", 0): FIELD}
    found = _without_twins(cast(TwinTest, Competing()), cast(Any, dims), (FIELD,))
    assert found is not None
    assert [group.dims for group in found.groups] == [tuple(dims)]
