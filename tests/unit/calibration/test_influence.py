"""How much layers change hidden states: along which axis the channels are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
import transformers as hf
import zoo
from torch import Tensor, nn

from tp_hf_config.calibration.importance import layer_influence

pytestmark = pytest.mark.usefixtures("one_thread")


class Scaling(nn.Module):
    """A norm over channels and a factor: no direction changes, if ``turn`` is 0."""

    def __init__(self, channels: int, axis: int, turn: float) -> None:
        super().__init__()
        self.axis, self.turn = axis, turn
        self.norm = nn.LayerNorm(channels)

    def forward(self, states: Tensor) -> Tensor:
        factors = torch.rand(states.select(self.axis, 0).shape) + 0.5
        return states * factors.unsqueeze(self.axis) + self.turn * states.roll(1, self.axis)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 6, 5, 3), 1), ((2, 5, 3, 6), 3), ((2, 5, 6), 2), ((2, 6, 4, 4), 1)]
)
def test_the_cosine_is_along_the_channels(shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(0)
    for turn, low, high in ((0.0, -1e-9, 1e-9), (1.0, 0.01, 2.0)):
        layer = Scaling(6, axis, turn)
        model = nn.Sequential(layer)
        (influence,) = layer_influence(model, [layer], [{"input": torch.rand(shape)}])
        assert low <= influence <= high


def poolformer() -> hf.PreTrainedModel:
    config = hf.PoolFormerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 12, 16, 20], image_size=64, num_labels=5
    )
    model = hf.PoolFormerForImageClassification(config)
    tiny.randomise(model, 0)
    return model.eval()


@pytest.mark.parametrize("build", [lambda: zoo.build("convnext"), poolformer])
def test_of_images_the_channels_come_second(build: Callable[[], hf.PreTrainedModel]) -> None:
    """The cosines, computed once more."""
    torch.manual_seed(0)
    model = build()
    kinds = ("ConvNextLayer", "PoolFormerLayer")
    layers = [each for each in model.modules() if type(each).__name__ in kinds]
    images = torch.rand(2, 3, 64, 64)
    expected: list[float] = []

    def note(layer: nn.Module, args: tuple[Tensor], output: Tensor | tuple[Tensor]) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        cosines = torch.cosine_similarity(args[0].double(), after.double(), dim=1)
        expected.append(float((1 - cosines).mean()))

    handles = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    found = layer_influence(model, layers, [{"pixel_values": images}])
    assert found == pytest.approx(tuple(expected))
