"""What an experiment writes into tensors is put back, bit for bit."""

from __future__ import annotations

import torch

from tp_hf_config.twin.layout import TensorDim
from tp_hf_config.twin.twin_test import Edits


def test_what_was_written_is_put_back_in_the_opposite_order() -> None:
    tensors = {"a": torch.rand(3, 4), "b": torch.rand(2)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    edits, rows, columns = Edits(tensors), TensorDim("a", 0), TensorDim("a", 1)
    with edits.undone():
        edits.write(rows, torch.tensor([1]), torch.zeros(1, 4))
        with edits.undone():
            edits.write(columns, torch.tensor([0, 2]), torch.ones(3, 2))
            edits.write(TensorDim("b", 0), torch.tensor([1]), torch.zeros(1))
            assert tensors["a"][1].tolist() == [1, 0, 1, 0]
            assert edits.names == {"a", "b"}
        assert edits.names == {"a"}
        assert tensors["a"][1].tolist() == [0, 0, 0, 0]
        assert torch.equal(tensors["a"][0], before["a"][0])
    assert not edits.names
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
