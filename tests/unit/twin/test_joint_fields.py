"""Which fields may only shrink together: what is proposed, and what is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tp_hf_config.fieldmap.field_map import Expression
from tp_hf_config.twin.find_groups import equal_fields, grouped_heads
from tp_hf_config.twin.tiny.tiny_model import equal_by_chance

QUERIES, GROUPS, POINTS = ("num_heads",), ("num_groups",), ("cross_num_points",)
PLACES = {
    QUERIES: ("layers.0.attention.q", "heads"),
    GROUPS: ("layers.0.attention.k.linear.weight", 0),  # Inkling's projections hold a layer
    POINTS: ("layers.0.cross_attention.k.weight", 0),
}


def field_map(**sizes: int) -> Any:
    """Head counts of an attention and of another one in the same layer, each with its number."""
    return SimpleNamespace(
        values=dict(zip((QUERIES, GROUPS, POINTS), sizes.values(), strict=True)),
        count_fields=lambda: frozenset(PLACES),
        moves_shapes=lambda field: True,
        expressions={
            place: Expression(1, {frozenset({field}): 1}) for field, place in PLACES.items()
        },
    )


def test_heads_go_with_others_of_their_attention() -> None:
    tiny = field_map(queries=4, groups=2, points=2)
    assert list(grouped_heads(tiny, set(PLACES))) == [(GROUPS, QUERIES)]


def test_numbers_that_are_equal_in_the_tiny_model_alone_are_no_pair() -> None:
    tiny = field_map(queries=4, groups=4, points=4)
    full = field_map(queries=32, groups=32, points=4)
    by_chance = equal_by_chance(tiny, full)
    assert by_chance == {frozenset({QUERIES, POINTS}), frozenset({GROUPS, POINTS})}
    assert list(equal_fields(tiny.values, set(PLACES), by_chance)) == [(QUERIES, GROUPS)]
