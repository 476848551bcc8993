"""Random weights of tiny models: deep stacks of convolutions neither explode nor fade."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tp_hf_config.twin.tiny.random_weights import randomise

DEPTH = 40


def block(activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU])
def test_the_image_is_seen_behind_many_convolutions(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(block(activation) for _ in range(DEPTH))).double().eval()
    randomise(model)
    one, other = torch.rand(2, 3, 8, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        first, second = model(one), model(other)
    assert float(first.abs().max()) < 1e8  # what attention adds behind them is not lost
    assert float((first - second).norm() / first.norm()) > 1e-6


def test_a_layer_without_channels_has_no_weights() -> None:
    """SAM 3's tracker builds one at tiny size."""
    model = nn.Sequential(nn.Conv2d(4, 0, 1), nn.ConvTranspose1d(4, 4, 3))
    randomise(model)
    assert model[0].weight.shape == (0, 4, 1, 1)
