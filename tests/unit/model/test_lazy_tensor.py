"""Tensors that are read at each use."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import storage_ptr
from torch import Tensor, nn

from tp_hf_config.model.lazy_tensor import LazyTensor, in_memory, is_lazy, values_of
from tp_hf_config.model.tensors import select

VALUES = torch.arange(24.0).view(4, 6)


class Reader:
    """Gives the values, and counts how often."""

    def __init__(self, values: Tensor = VALUES) -> None:
        self.values, self.reads = values, 0

    def __call__(self) -> Tensor:
        self.reads += 1
        return self.values.clone()


def lazy(reader: Reader) -> LazyTensor:
    return LazyTensor(reader.values.to("meta"), reader)


MOVES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.detach(),
    lambda t: t[...],
    lambda t: t.index_select(1, torch.tensor([4, 0])),
    lambda t: t.to(torch.float64),
    lambda t: t.T.contiguous(),
    lambda t: t[1],
    lambda t: t[:, 1:3],
    lambda t: t.chunk(2, dim=1)[1],
    lambda t: t.unbind(0)[2],
    lambda t: torch.stack([t, t]),
    lambda t: torch.cat([t, torch.ones(1, 6)]),
    lambda t: t.view(2, 2, 6).permute(2, 0, 1),
    lambda t: t.reshape(-1),
    lambda t: select(t, {0: torch.tensor([3, 1]), 1: torch.tensor([5, 2, 0])}),
]


@pytest.mark.parametrize("move", MOVES)
def test_what_only_moves_values_is_lazy(move: Callable[[Tensor], Tensor]) -> None:
    reader = Reader()
    moved, expected = move(lazy(reader)), move(VALUES)
    assert isinstance(moved, LazyTensor)
    assert (moved.shape, moved.dtype, moved.stride(), moved.storage_offset()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
        expected.storage_offset(),
    )
    assert reader.reads == 0
    assert torch.equal(values_of(moved), expected)
    assert reader.reads > 0


def test_whatever_computes_reads_and_forgets() -> None:
    reader = Reader()
    weight = lazy(reader)
    for reads in (1, 2):
        total = weight.abs().sum()
        assert type(total) is Tensor
        assert total == 276
        assert reader.reads == reads


def test_shapes_alone_read_nothing() -> None:
    reader = Reader()
    weight = lazy(reader)
    assert torch.empty_like(weight, device="meta").is_meta
    assert torch.equal(torch.zeros_like(weight), torch.zeros(4, 6))
    assert weight.new_empty(2).device.type == "cpu"
    assert reader.reads == 0


def test_a_layer_computes_with_it() -> None:
    layer, reader = nn.Linear(6, 4, bias=False), Reader()
    layer.weight = nn.Parameter(lazy(reader), requires_grad=False)
    assert is_lazy(layer)
    assert torch.equal(layer(torch.ones(1, 6)), VALUES.sum(1)[None])
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter)
    assert torch.equal(twin(torch.ones(1, 6)), VALUES.sum(1)[None])


def test_a_layers_own_are_read_once_within() -> None:
    layer, reader = nn.Linear(6, 4, bias=False), Reader()
    layer.weight = nn.Parameter(lazy(reader))
    with in_memory(layer):
        assert not is_lazy(layer)
        assert layer.weight.sum() + layer.weight.sum() == 552
    assert reader.reads == 1
    assert is_lazy(layer)


def test_views_have_the_storage_of_what_they_view() -> None:
    weight = lazy(Reader())
    first, second = weight.chunk(2)
    assert storage_ptr(first) == storage_ptr(second) == storage_ptr(weight.detach())
    assert storage_ptr(weight.clone()) != storage_ptr(weight)
    assert storage_ptr(lazy(Reader())) != storage_ptr(weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.zero_(),
        lambda t: torch.add(VALUES, 1, out=t),
        lambda t: t.copy_(VALUES),
        lambda t: t.mul_(2),
    ],
)
def test_it_is_not_written_to(write: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="gathered from shards when they are used"):
        write(lazy(Reader()))
