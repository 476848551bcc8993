"""Random weights of tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import MobileViTConfig, MobileViTModel, RTDetrConfig, RTDetrModel

from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.observed_pass import outputs_in_float64
from tp_hf_config.forward.run_recipe import PLAIN
from tp_hf_config.model.build import without_data
from tp_hf_config.twin.tiny.tiny_model import TinyModel, randomise, scale_convolutions, tiny_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_channels_has_no_weights() -> None:
    model = nn.Sequential(nn.Conv2d(4, 0, 1), nn.Conv1d(4, 0, 1), nn.ConvTranspose1d(4, 4, 3))
    randomise(model)
    assert [tuple(layer.weight.shape) for layer in model] == [(0, 4, 1, 1), (0, 4, 1), (4, 4, 3)]


class Stack(nn.Module):
    """Runs a stack of layers on ``x``."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the last layer returns."""
        result: torch.Tensor = self.layers(x)
        return result


def scaled(*layers: nn.Module, image: torch.Tensor) -> tuple[Stack, torch.Tensor]:
    """Return a stack with random weights and scaled convolutions, and what it makes of an image."""
    torch.manual_seed(0)
    stack = Stack(*layers).double()
    randomise(stack)
    scale_convolutions(stack, {"x": image}, PLAIN)
    with torch.no_grad():
        return stack, stack(image)


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.ConvTranspose1d, nn.Conv2d, nn.Conv3d])
def test_twenty_convolutions_neither_explode_nor_fade(convolution: Any) -> None:
    lengths = [9] * (int(convolution.__name__[-2]))
    image = torch.rand(2, 16, *lengths, dtype=torch.float64)
    layers = (convolution(16, 16, 3, padding=1, bias=n % 2 == 0) for n in range(20))
    _, result = scaled(*layers, image=image)
    difference = (result - result.mean(dim=0)).square().mean().sqrt()
    assert float(difference) == pytest.approx(1.0)


def test_large_values_that_hardly_differ_do_not_saturate_a_gate() -> None:
    image = 1 + 1e-6 * torch.rand(2, 4, 8, 8, dtype=torch.float64)
    _, result = scaled(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 6, 1, bias=False), image=image)
    assert float(result.square().mean().sqrt()) == pytest.approx(4.0)


def test_a_convolution_that_is_called_twice_is_scaled_by_its_first_call() -> None:
    image = torch.rand(2, 8, 9, 9, dtype=torch.float64)
    shared = nn.Conv2d(8, 8, 3, padding=1)
    alone, _ = scaled(shared, image=image)
    weight = alone.layers[0].weight.clone()
    twice, _ = scaled(shared, shared, image=image)
    assert torch.equal(twice.layers[0].weight, weight)


def test_what_a_layer_keeps_of_the_pass_does_not_stay() -> None:
    """LeViT's attention adds biases that the first pass in eval mode kept; others install hooks."""

    class Keeps(nn.Linear):
        """A layer that keeps its weight as it was in the first pass, and looks at its results."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept: Any = getattr(self, "kept", self.weight.clone())
            self.register_forward_hook(lambda *_: None)
            return nn.functional.linear(x, self.kept)

    stack = Stack(Keeps(9, 9), nn.Conv1d(4, 4, 3)).double()
    scale_convolutions(stack, {"x": torch.rand(2, 4, 9, dtype=torch.float64)}, PLAIN)
    assert not hasattr(stack.layers[0], "kept")
    assert not any(layer._forward_hooks for layer in stack.modules())


def test_weights_that_a_weight_norm_computes_stay() -> None:
    image = torch.rand(2, 8, 9, 9, dtype=torch.float64)
    stack = Stack(weight_norm(nn.Conv2d(8, 8, 3))).double()
    before = [parameter.clone() for parameter in stack.parameters()]
    scale_convolutions(stack, {"x": image}, PLAIN)
    assert all(map(torch.equal, before, stack.parameters()))


def sensitivity(tiny: TinyModel, name: str) -> float:
    """Return how far outputs move, in their standard deviations, as a parameter grows by 1 %."""
    with torch.no_grad():
        parameter = tiny.model.get_parameter(name)
        kept = parameter.clone()
        before = outputs_in_float64(tiny.model, tiny.inputs, (), tiny.recipe)
        parameter.mul_(1.01)
        after = outputs_in_float64(tiny.model, tiny.inputs, (), tiny.recipe)
        parameter.copy_(kept)
    pairs = zip(before, after, strict=True)
    return max(float((b - a).abs().max() / a.std()) for a, b in pairs)


@pytest.mark.parametrize(
    ("model_class", "config", "name"),
    [
        # with unscaled convolutions large values hide the encoder
        (RTDetrModel, RTDetrConfig(), "layers.0.mlp.fc1.weight"),
        # with the square root of the fan-in for all, the image fades: 1e-8
        (
            MobileViTModel,
            MobileViTConfig(
                hidden_sizes=[64, 80, 96],
                neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320],
                expand_ratio=2.0,
            ),
            "conv_stem.convolution.weight",
        ),
    ],
)
def test_outputs_depend_visibly_on(model_class: type, config: object, name: str) -> None:
    tiny = tiny_model(map_of(without_data(model_class, config)))
    assert isinstance(tiny, TinyModel)
    full_name = next(n for n, _ in tiny.model.named_parameters() if n.endswith(name))
    assert sensitivity(tiny, full_name) > 1e-4
