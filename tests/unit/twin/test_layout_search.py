"""How long layouts are tried, with experiments whose results are given."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import transformers as hf

from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.twin import find_groups as finding
from tp_hf_config.twin.find_groups import find_groups
from tp_hf_config.twin.layout import Finding, TensorDim, UnitLayout, places_of
from tp_hf_config.twin.layout_search import Style, searched
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model
from tp_hf_config.twin.twin_test import Links, TwinTest

STYLES = 12
LAYOUTS = [(number, UnitLayout(run=1 + number)) for number in range(10)]


class Given:
    """Units are told apart in every dimension whose layout is not the one that is right."""

    units = 4

    def __init__(self, right: Sequence[int], always: Collection[str] = ()) -> None:
        self.right = {f"layer{place}": LAYOUTS[number][1] for place, number in enumerate(right)}
        self.always = always
        self.asked: list[tuple[TensorDim, ...]] = []
        self.parameters: dict[str, torch.Tensor] = {}

    def links(self, dims: Sequence[TensorDim]) -> Links:
        self.asked.append(tuple(dims))
        wrong = (
            dim
            for dim in dims
            if dim.name in self.always or dim.layout != self.right.get(dim.name, dim.layout)
        )
        return Links((), tuple(wrong), ())


def styles(count: int = STYLES) -> dict[Style, list[TensorDim]]:
    """So many, each of one dimension."""
    return {
        (tuple(LAYOUTS), (f"field{place}",)): [TensorDim(f"layer{place}", 0)]
        for place in range(count)
    }


def tries(given: Given, apart_alone: Collection[TensorDim] = (), count: int = STYLES) -> Links:
    apart = places_of(apart_alone)
    return searched(cast(TwinTest, given), styles(count), {}, (), apart)[1][1]


def test_styles_one_after_the_other() -> None:
    """As long as that gets better it goes on, and nothing is asked twice."""
    given = Given([0, 9, 0, 9, 9, 0])
    assert not tries(given, count=6).unequal
    assert len(set(given.asked)) == len(given.asked)


def test_what_gets_no_better_comes_to_an_end() -> None:
    given = Given([0] * STYLES, always={f"layer{place}" for place in range(STYLES)})
    assert len(tries(given).unequal) == STYLES
    assert len(given.asked) < 60  # of 10 likely ones and 9 more for each of 12 styles


def test_fields_that_have_nothing_to_do_with_each_other_get_likely_layouts_only() -> None:
    """All that is told apart alone is told apart together too."""
    always = {"layer0", "layer1"}
    given = Given([0, 0], always)
    tries(given, [TensorDim(name, 0) for name in always], count=2)
    assert len(given.asked) == 10
    other = Given([0, 0], {"layer0"})
    tries(other, [TensorDim(name, 0) for name in always], count=2)
    assert len(other.asked) > 10  # one of the two is better off


def test_heads_go_whole_in_layers_that_are_split_into_some() -> None:
    """Where each stage has another number of heads, units are runs there, and parts beside it."""
    given = Given([])
    parts, run = UnitLayout(parts=4), UnitLayout(run=4)
    given.right = {"layer0": parts, "layer1": run}
    given.parameters = {name: torch.empty(16) for name in given.right}
    alone = [[TensorDim(name, 0, parts)] for name in given.right]
    for split in ({"layer1"}, set[str]()):
        given.asked.clear()
        found = searched(cast(TwinTest, given), styles(2), {}, alone, frozenset(), split)[1]
        assert bool(found[1].unequal) is not bool(split)
        if split:
            assert set(found[0]) == {TensorDim("layer0", 0, parts), TensorDim("layer1", 0, run)}
            assert len(given.asked) == 11  # ten likely ones before


def test_a_single_dimension_may_stand_otherwise_beside_heads() -> None:
    """What is likeliest is right but for one, though another layout of the rest fails less."""

    class GraphGroup(Given):
        def links(self, dims: Sequence[TensorDim]) -> Links:
            found = super().links(dims)
            told = found.unequal
            if not any(dim.name == "layer0" for dim in told):
                told *= 4  # where heads are right, all of them are told apart by that one
            return replace(found, unequal=told[:4] if len(told) > 3 else told[:1])

    several = {(tuple(LAYOUTS), ("other",)): [TensorDim("layer0", 0), TensorDim("layer0", 1)]}
    several[tuple(LAYOUTS), ("one",)] = [TensorDim("layer1", 0)]
    for alone in ([[TensorDim("layer2", 0)]], []):
        given = GraphGroup([0, 9])
        found = searched(cast(TwinTest, given), several, {}, alone)[1]
        assert bool(found[1].unequal) is not bool(alone)
    assert TensorDim("layer1", 0, LAYOUTS[9][1]) not in found[0]


def test_fields_are_tried_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal widths that count heads are both equal fields and grouped heads, either way round."""
    config = hf.SwinConfig(
        image_size=32, patch_size=4, window_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2]
    )
    tiny = tiny_model(map_of(hf.SwinModel(config)))
    assert isinstance(tiny, TinyModel)
    asked: list[frozenset[Any]] = []

    def nothing(_: TinyModel, fields: tuple[Any, ...], *__: Any) -> Finding:
        asked.append(frozenset(fields))
        return Finding(fields, reason="nothing was tried")

    monkeypatch.setattr(finding, "_find", nothing)
    find_groups(tiny)
    assert asked.count(frozenset({("num_heads", 0), ("num_heads", 1)})) == 1


def test_numbers_of_heads_of_several_stages_are_found_without_a_long_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What scales the heads of Swin v2 stands in a module of queries, keys and values alone."""
    config = hf.Swinv2Config(
        image_size=32, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=2
    )
    tiny = tiny_model(map_of(hf.Swinv2Model(config)))
    assert isinstance(tiny, TinyModel)
    asked: list[Sequence[TensorDim]] = []
    links = TwinTest.links

    def counted(self: TwinTest, dims: Sequence[TensorDim], *args: Any, **kwargs: Any) -> Links:
        asked.append(dims)
        return links(self, dims, *args, **kwargs)

    fields = (("num_heads", 0), ("num_heads", 1), ("embed_dim",))
    alone = finding._find(tiny, fields[-1:])
    monkeypatch.setattr(TwinTest, "links", counted)
    found = finding._find(tiny, fields, alone.groups)
    assert found.reason is None
    assert len(asked) == 11  # ten likely ones, then whole heads
    attention = "encoder.layers.1.blocks.0.attention.self."
    units = {dim: group.units for group in found.groups for dim in group.dims}
    assert units[TensorDim(f"{attention}logit_scale", 0)] == tiny.field_map.values["num_heads", 1]
