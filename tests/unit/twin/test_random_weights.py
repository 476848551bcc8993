"""Random weights of tiny models."""

from __future__ import annotations

import pytest
from torch import nn

from tp_hf_config.twin.tiny.random_weights import randomise


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_channels_has_no_weights() -> None:
    model = nn.Sequential(nn.Conv2d(4, 0, 1), nn.Conv1d(4, 0, 1), nn.ConvTranspose1d(4, 4, 3))
    randomise(model)
    assert [tuple(layer.weight.shape) for layer in model] == [(0, 4, 1, 1), (0, 4, 1), (4, 4, 3)]
