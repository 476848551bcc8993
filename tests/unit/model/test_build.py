"""Builds without data: nothing of a class is computed, whatever device it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from torch import nn

from tp_hf_config.model.build import Builder, Refusal, without_data


class Numbered(hf.PreTrainedModel):
    """Computes from positions as it is built, as MiniMax's linear attention does."""

    config_class = hf.LlamaConfig

    def __init__(self, config: hf.LlamaConfig, device: torch.device | None = None):
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, 2)
        positions = torch.arange(1, config.hidden_size, 2, device=device) + 1
        self.register_buffer("decay", torch.exp(-positions[:, None] * positions[None, :]))
        self.post_init()


def test_positions_on_no_device_have_no_values() -> None:
    model = Numbered(hf.LlamaConfig(hidden_size=8, num_attention_heads=2))
    assert model.decay.shape == (4, 4)
    built = Builder(model).build({"hidden_size": 20, "num_attention_heads": 2})
    assert isinstance(built, nn.Module)
    assert not isinstance(built, Refusal)
    assert built.decay.shape == (10, 10)  # type: ignore[union-attr]
    assert built.decay.is_meta


class Frozen(nn.Linear):
    """Stays in training mode, and notes what it was asked for."""

    def train(self, mode: bool = True) -> Frozen:
        self.seen = mode
        return self


class WithFrozenPart(Numbered):
    """Has a layer that decides for itself what a mode is."""

    def __init__(self, config: hf.LlamaConfig):
        super().__init__(config)
        self.down = nn.Sequential(Frozen(2, 2), nn.Dropout())


def test_a_build_is_in_eval_mode() -> None:
    built: Any = Builder(WithFrozenPart(hf.LlamaConfig(hidden_size=32))).build({"hidden_size": 64})
    by_torch = WithFrozenPart(hf.LlamaConfig(hidden_size=64)).eval()
    modes = [[module.training for module in model.modules()] for model in (built, by_torch)]
    assert modes[0] == modes[1]
    assert True in modes[0]
    assert built.down[0].seen is False


class Keywords(Numbered):
    """Makes positions from keyword arguments alone, as RT-DETR makes anchors."""

    def __init__(self, config: hf.LlamaConfig):
        super().__init__(config)
        positions = torch.arange(end=config.hidden_size, device="cpu")
        self.register_buffer("scaled", positions * torch.tensor(data=2, device="cpu"))


def test_positions_made_of_keywords_are_positions() -> None:
    builder = Builder(Keywords(hf.LlamaConfig(hidden_size=8, num_attention_heads=2)))
    built: Any = builder.build({"hidden_size": 20, "num_attention_heads": 2})
    assert not isinstance(built, Refusal)
    assert built.scaled.tolist() == list(range(0, 40, 2))


def test_an_inference_mode_around_a_build_stays_outside() -> None:
    builder = Builder(Numbered(hf.LlamaConfig(hidden_size=8, num_attention_heads=2)))
    data = {"hidden_size": 20, "num_attention_heads": 2}
    with torch.inference_mode():
        builds = [
            builder.build(data),
            builder.build(data, buffers=True),
            builder.build_real(data),
            builder.build_unfilled(data),
        ]
    for built in builds:
        assert not isinstance(built, Refusal)
        assert not any(one.is_inference() for one in (*built.parameters(), *built.buffers()))


def test_a_default_device_is_not_where_buffers_and_initial_values_go() -> None:
    builder = Builder(Numbered(hf.LlamaConfig(hidden_size=8, num_attention_heads=2)))
    data = {"hidden_size": 20, "num_attention_heads": 2}
    with torch.device("meta"):
        with_buffers: Any = builder.build(data, buffers=True)
        real: Any = builder.build_real(data)
    assert not with_buffers.decay.is_meta
    assert not real.decay.is_meta
    assert not real.up.weight.is_meta


class WithTable(Numbered):
    """Keeps a table beside a layer: of random values, or made of the layer's weights."""

    own = False

    def __init__(self, config: hf.LlamaConfig):
        super().__init__(config)
        self.register_buffer("table", self.up.weight.detach() * 2 if self.own else torch.rand(3))


@pytest.mark.parametrize("own", [False, True])
def test_a_build_without_initial_weights_has_all_buffers(
    monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    monkeypatch.setattr(WithTable, "own", own)
    builder = Builder(WithTable(hf.LlamaConfig(hidden_size=8, num_attention_heads=2)))
    built: Any = builder.build_unfilled({"hidden_size": 20, "num_attention_heads": 2})
    real: Any = builder.build_real({"hidden_size": 20, "num_attention_heads": 2})
    assert built.up.weight.is_meta is not own  # else it is built with initial weights
    assert built.up.weight.dtype is torch.float64
    assert built.decay.equal(real.decay)
    assert not built.table.is_meta
    if own:
        assert built.table.equal(2 * built.up.weight)


def test_a_build_that_would_not_end_is_refused() -> None:
    config = zoo.build("bart").config
    config.decoder_layers = 10**9
    built = without_data(type(zoo.build("bart")), config, max_modules=200)
    assert built == Refusal("it asks for more than 200 modules, far more than any model has")
