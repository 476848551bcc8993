"""Memory that was freed is handed out again, and never while a tensor uses it."""

import gc

import pytest
import torch

from tp_hf_config.model import recycled_memory
from tp_hf_config.model.recycled_memory import recycled_empty

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_blocks(monkeypatch):
    monkeypatch.setattr(recycled_memory, "_blocks", [])


def test_a_freed_block_is_used_again():
    first = recycled_empty((3, MIB), torch.float32)
    address = first.data_ptr()
    del first
    second = recycled_empty((MIB, 5), torch.bfloat16)  # a smaller one fits into it
    assert second.shape == (MIB, 5)
    assert second.dtype == torch.bfloat16
    assert second.data_ptr() == address
    assert address % 64 == 0  # the order of sums can depend on the alignment


def test_a_view_keeps_its_block():
    whole = recycled_empty((4, MIB), torch.uint8)
    row = whole[3].fill_(7)
    address = whole.data_ptr()
    del whole
    gc.collect()
    other = recycled_empty((4, MIB), torch.uint8).fill_(1)
    assert other.data_ptr() != address
    assert row.eq(7).all()


def test_the_largest_blocks_stay():
    sizes = [5, 1, 4, 2, 3]
    tensors = [recycled_empty((size, MIB), torch.uint8) for size in sizes]
    del tensors
    assert [block.nbytes // MIB for block in recycled_memory._blocks] == [3, 4, 5]


def test_small_tensors_are_left_to_the_c_library():
    tensor = recycled_empty((MIB - 1,), torch.uint8)
    del tensor
    assert recycled_memory._blocks == []
