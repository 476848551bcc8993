"""The masked check: what it compares a pruned model with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from masked import masked_difference
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class FrozenBatchNorm(nn.Module):
    """A norm of images with buffers alone, as RT-DETR's backbone has."""

    def __init__(self, width: int):
        super().__init__()
        for name in ("weight", "bias"):
            self.register_buffer(name, torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        return x * self.weight.view(shape) + self.bias.view(shape)


class Net(nn.Module):
    """Channels, a frozen norm, and a bottleneck behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 1, bias=False)
        self.norm = FrozenBatchNorm(3)
        self.wide = nn.Conv2d(3, 4, 1)
        self.narrow = nn.Conv2d(4, 2, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.wide(self.norm(self.first(pixel_values)))
        result: torch.Tensor = self.narrow(hidden.relu())
        return result


def without_first_channel(net: nn.Module) -> Any:
    pruned: Any = copy.deepcopy(net)
    pruned.wide.weight = nn.Parameter(pruned.wide.weight[1:])
    pruned.wide.bias = nn.Parameter(pruned.wide.bias[1:])
    pruned.narrow.weight = nn.Parameter(pruned.narrow.weight[:, 1:])
    return pruned


def test_a_frozen_batch_norm_runs_over_columns_of_zeros_too() -> None:
    torch.manual_seed(0)
    net = Net().double().eval()
    pruned = without_first_channel(net)
    pixels = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    pixels[..., -1] = 0  # an image with a black edge
    assert masked_difference(net, pruned, pruned, {"pixel_values": pixels}) is None
    with torch.no_grad():
        pruned.narrow.bias.add_(0.1)
    assert masked_difference(net, pruned, pruned, {"pixel_values": pixels}) is not None


class Scores(Net):
    """Scores, the first two masked, as those of Grounding DINO of words that are not there."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        scores = super().forward(pixel_values).flatten(1)
        return torch.where(torch.arange(scores.shape[1]) < 2, -torch.inf, scores)


def test_scores_that_are_masked_in_both_are_equal() -> None:
    torch.manual_seed(0)
    net = Scores().double().eval()
    pruned = without_first_channel(net)
    pixels = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    assert masked_difference(net, pruned, pruned, {"pixel_values": pixels}) is None
    with torch.no_grad():
        pruned.narrow.bias.fill_(torch.inf)  # infinite where the original's are not
    assert masked_difference(net, pruned, pruned, {"pixel_values": pixels}) is not None


class Normed(nn.Module):
    """Two convolutions whose weights have directions and lengths, as a codec's."""

    def __init__(self, width: int):
        super().__init__()
        self.wide = weight_norm(nn.Conv1d(2, width, 1))
        self.narrow = weight_norm(nn.Conv1d(width, 2, 1))

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.narrow(self.wide(input_values).relu())
        return result


def test_a_removed_channel_of_a_weight_norm_has_no_direction() -> None:
    torch.manual_seed(0)
    net, pruned = Normed(4).double().eval(), Normed(3).double().eval()
    with torch.no_grad():
        for name, tensor in pruned.named_parameters():
            full = net.get_parameter(name)
            for dim, size in enumerate(tensor.shape):
                full = full.narrow(dim, full.shape[dim] - size, size)
            tensor.copy_(full)
    sound = {"input_values": torch.randn(2, 2, 8, dtype=torch.float64)}
    assert masked_difference(net, pruned, pruned, sound) is None
    with torch.no_grad():
        pruned.wide.parametrizations.weight.original0.add_(0.1)
    assert masked_difference(net, pruned, pruned, sound) is not None
