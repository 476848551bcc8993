"""Which positions of which Parameter are left, while something records it."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.pruner.function import BasePruningFunc

from tp_hf_config.graph.origins import recording_origins


def test_recordings_that_overlap_end_in_any_order() -> None:
    """The one that began first ended first, and Torch-Pruning's function stayed patched."""
    own = BasePruningFunc._prune_parameter_and_grad
    layer = nn.Linear(4, 4)
    before = layer.weight
    first, second = recording_origins(), recording_origins()
    one = first.__enter__()
    two = second.__enter__()
    tp.prune_linear_out_channels(layer, [1])
    first.__exit__(None, None, None)
    tp.prune_linear_out_channels(layer, [0])
    second.__exit__(None, None, None)
    assert BasePruningFunc._prune_parameter_and_grad is own
    assert two.origin_of(layer.weight).parameter is before
    assert torch.equal(two.origin_of(layer.weight).kept[0], torch.tensor([2, 3]))
    assert one.origin_of(layer.weight).parameter is layer.weight  # cut after it had ended
