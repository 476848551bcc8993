"""Sizes at values that a class does not take, from those that it does."""

from __future__ import annotations

import pytest

from tp_hf_config.moves import Move, further

BASE = {("a", 0): 64, ("a", 1): 10, ("b", 0): 130}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([Move(65, {("a", 0): 65, ("b", 0): 132})], {("a", 0): 128, ("b", 0): 258}),
        ([Move(65, {("a", 0): 65}), Move(66, {("a", 0): 66})], {("a", 0): 128}),
        ([Move(65, {("a", 0): 65}), Move(66, {("a", 0): 68})], None),  # on no line
        ([Move(67, {("a", 0): 65})], None),  # 64 more is no whole number of it
        ([Move(65, {("a", 0): 65, ("b", 0): 0})], None),  # not looked at
    ],
)
def test_further_on_a_line(points: list[Move], expected: dict[tuple[str, int], int] | None) -> None:
    assert further(BASE, 64, points, 128) == expected
