"""Sizes at values that a class does not take, from those that it does."""

from __future__ import annotations

import pytest

from tp_hf_config.fieldmap.probe import Probe, extrapolated

BASE = {("a", 0): 64, ("a", 1): 10, ("b", 0): 130}


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([Probe(65, {("a", 0): 65, ("b", 0): 132})], {("a", 0): 128, ("b", 0): 258}),
        ([Probe(65, {("a", 0): 65}), Probe(66, {("a", 0): 66})], {("a", 0): 128}),
        ([Probe(65, {("a", 0): 65}), Probe(66, {("a", 0): 68})], None),  # on no line
        ([Probe(67, {("a", 0): 65})], None),  # 64 more is no whole number of it
        ([Probe(65, {("a", 0): 65, ("b", 0): 0})], None),  # not looked at
    ],
)
def test_further_on_a_line(
    points: list[Probe], expected: dict[tuple[str, int], int] | None
) -> None:
    assert extrapolated(BASE, 64, points, 128) == expected
