"""Layers that are alike are cut alike, also where one of them shows less than the others."""

from __future__ import annotations

import torch
from torch import nn

from tp_hf_config.model.tensors import is_matrix_stack
from tp_hf_config.twin.layout import TensorDim, TinyGroup, all_alike, as_in_like_layers
from tp_hf_config.twin.prove import _members
from tp_hf_config.twin.twin_test import Links, TwinTest

FIELD = ("hidden_size",)


def group(
    *names: str, channel_groups: int = 1, units: int = 8, dims: tuple[int, ...] = (0, 0, 1)
) -> TinyGroup:
    found = tuple(TensorDim(name, dim) for name, dim in zip(names, dims, strict=False))
    return TinyGroup((FIELD,), found, (FIELD,) * len(found), units, channel_groups)


def test_the_strictest_of_alike_layers_counts() -> None:
    free, by_head = (
        group("layers.0.v", "layers.0.o"),
        group("layers.1.v", "layers.1.o", channel_groups=4),
    )
    other = group("layers.0.up", "layers.0.down")
    found = as_in_like_layers([free, by_head, other])
    assert [one.channel_groups for one in found] == [4, 4, 1]


def test_parts_of_a_layer_that_others_have_in_one_go_together() -> None:
    whole = group("layers.1.q", "layers.1.v", "layers.1.o", channel_groups=2)
    parts = [group("layers.0.q"), group("layers.0.v", "layers.0.o", dims=(0, 1))]
    found = as_in_like_layers([*parts, whole])
    assert [{dim.name for dim in one.dims} for one in found] == [
        {"layers.1.q", "layers.1.v", "layers.1.o"},
        {"layers.0.q", "layers.0.v", "layers.0.o"},
    ]
    assert [one.channel_groups for one in found] == [2, 2]


def test_parts_of_several_layers_stay_apart() -> None:
    whole = group("layers.2.q", "layers.2.v")
    parts = [group("layers.0.q"), group("layers.1.v")]
    assert as_in_like_layers([*parts, whole]) == [*parts, whole]


def test_a_layer_is_not_cut_finer_than_one_that_is_alike() -> None:
    both = (group("layers.0.v", units=2), group("layers.1.v", units=2))
    finer = (group("layers.0.v", units=32), both[1])
    assert all_alike(both, finer) == both
    stream = (group("embed"),)
    assert all_alike(stream, (group("embed", units=32),)) == (group("embed", units=32),)


def test_a_bias_goes_with_the_rows_of_its_weight() -> None:
    """Before an activation that is all but closed its disturbance shows nowhere else."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    test = TwinTest(model, {"input": torch.ones(1, 3, dtype=torch.float64)}, 4)
    rows, columns, bias = TensorDim("0.weight", 0), TensorDim("2.weight", 1), TensorDim("0.bias", 0)
    members, homeless = _members(test, Links(((bias,), (rows, columns)), (), ()))
    assert (members, homeless) == ([[rows, columns, bias]], [])
    members, _ = _members(test, Links(((TensorDim("2.bias", 0),), (rows, columns)), (), ()))
    assert len(members) == 2


def test_scales_of_channels_are_no_experts() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(4, 1, 1))
    model.experts = nn.Parameter(torch.ones(4, 2, 3))
    assert [is_matrix_stack(model, name) for name in ("scale", "experts")] == [False, True]
