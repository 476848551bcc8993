"""Units of channels that stand apart: one of every group of a convolution (wav2vec 2.0)."""

from __future__ import annotations

import copy
from math import lcm
from typing import Any

import pytest
import torch
import torch_pruning as tp
import transformers as hf
from masked import masked_difference
from torch import nn

from tp_hf_config import HFConfigSyncHook, prunable
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.inputs import example_inputs
from tp_hf_config.graph.full_size import Group, _uneven_heads
from tp_hf_config.graph.prunable import Width, widths_of
from tp_hf_config.graph.unit_count import UnitCount
from tp_hf_config.model.build import Builder, Refusal, module_of
from tp_hf_config.model.config_json import config_json
from tp_hf_config.twin.layout import TensorDim, UnitLayout
from tp_hf_config.twin.tiny.tiny_model import TinyModel, randomise, tiny_model
from tp_hf_config.twin.twin_test import TwinTest

_SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 12,
    "num_conv_pos_embedding_groups": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "conv_dim": [16, 24],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
}


def _model(kind: str) -> Any:
    """Twelve heads of 16, sixteen groups of 12 channels: neither is a multiple of the other."""
    torch.manual_seed(0)
    if kind == "data2vec":
        config: Any = hf.Data2VecAudioConfig(**_SIZES, num_conv_pos_embeddings=2)
        model: Any = hf.Data2VecAudioModel(config)
    else:
        config = hf.Wav2Vec2Config(**_SIZES, num_conv_pos_embeddings=8)
        model = hf.Wav2Vec2Model(config)
    model = model.double().eval()
    randomise(model)
    return model


def _width(model: Any, name: str) -> Width:
    (found,) = (width for width in widths_of(model) if width.name == name)
    assert found.reason is None
    return found


def _pruned(model: Any, fields: tuple[str, ...], ratio: float, **options: Any) -> Any:
    pruned = copy.deepcopy(model)
    pruner = tp.pruner.MetaPruner(
        pruned,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        hooks=[HFConfigSyncHook(prune=fields)],
        **options,
    )
    pruner.step()
    return pruned


def _off(model: Any, pruned: Any) -> Refusal | None:
    torch.manual_seed(1)
    inputs = {"input_values": torch.randn(2, 1200, dtype=torch.float64)}
    fresh = Builder(pruned).build_real(config_json(pruned.config))
    assert not isinstance(fresh, Refusal)
    return masked_difference(model, pruned, fresh, inputs)


@pytest.mark.parametrize("kind", ["wav2vec2", "data2vec"])
def test_one_channel_of_every_group_is_a_unit(kind: str) -> None:
    model = _model(kind)
    width = _width(model, "hidden_size")
    assert width.units == 12
    found = {(m.name, m.dim): (g, m.layout) for g in width.groups for m in g.dims}
    stream, layout = found["encoder.layer_norm.weight", 0]
    assert (stream.count.units, stream.count.channel_groups, stream.count.per_field_unit) == (
        12,
        1,
        1,
    )
    assert layout == UnitLayout(parts=16)
    heads, layout = found["encoder.layers.0.attention.q_proj.weight", 0]
    assert (heads.count.units, heads.count.channel_groups, heads.count.per_field_unit) == (
        192,
        12,
        16,
    )
    assert layout == UnitLayout()


@pytest.mark.parametrize(
    ("ratio", "options", "left"),
    [(0.5, {}, 96), (0.3, {}, 96), (0.2, {}, 144), (0.5, {"round_to": 32}, 96)],
)
def test_the_hidden_size_stays_a_multiple_of_heads_and_groups(
    ratio: float, options: dict[str, Any], left: int
) -> None:
    model = _model("wav2vec2")
    pruned = _pruned(model, ("hidden_size",), ratio, **options)
    assert pruned.config.hidden_size == left
    assert pruned.encoder.layers[0].attention.head_dim == left // 12
    assert _off(model, pruned) is None


@pytest.mark.parametrize("kind", ["wav2vec2", "data2vec"])
def test_whole_heads_go_with_channels_of_every_group(kind: str) -> None:
    model = _model(kind)
    fields = ("num_attention_heads", "hidden_size")
    width = _width(model, " + ".join(fields))
    assert width.units == 12
    pruned = _pruned(model, fields, 0.5)
    assert (pruned.config.num_attention_heads, pruned.config.hidden_size) == (6, 96)
    assert _off(model, pruned) is None


def test_a_norm_of_the_weight_runs_over_what_is_left() -> None:
    model = _model("wav2vec2")
    pruned = _pruned(model, ("hidden_size",), 0.5)
    conv = pruned.encoder.pos_conv_embed.conv
    weight = conv.parametrizations.weight
    assert weight.original1.shape == (96, 6, 8)
    torch.testing.assert_close(conv.weight.norm(dim=(0, 1)), weight.original0.flatten().abs())


@pytest.mark.full
def test_attention_scaled_by_torch_is_compared_with_the_new_scale() -> None:
    """WavLM hands its query weights to torch, which scales by the head dim that it sees."""
    torch.manual_seed(0)
    sizes = {**_SIZES, "conv_kernel": [7, 5]}  # 10 would be 6 in the tiny model, as are the heads
    model = hf.WavLMModel(hf.WavLMConfig(**sizes, num_conv_pos_embeddings=8)).double().eval()
    randomise(model)
    assert _width(model, "hidden_size").units == 4
    pruned = _pruned(model, ("hidden_size",), 0.5)
    assert pruned.config.hidden_size == 96
    assert _off(model, pruned) is None


def test_units_of_heads_and_of_groups_are_of_several_positions_in_the_tiny_copy() -> None:
    """WavLM's 48 channels of a unit are four of each head and three of each group."""
    config = hf.WavLMConfig(num_hidden_layers=2)
    tiny = tiny_model(map_of(module_of(config, hf.WavLMModel)))
    assert isinstance(tiny, TinyModel)
    small: Any = tiny.model.config
    unit = lcm(small.num_attention_heads, small.num_conv_pos_embedding_groups)
    assert unit > max(small.num_attention_heads, small.num_conv_pos_embedding_groups)
    assert small.hidden_size >= 2 * unit
    (width,) = (
        one
        for one in prunable(config, model_class=hf.WavLMModel).widths
        if one.names == ("hidden_size",)
    )
    assert (width.reason, width.units) == (None, 16)


def test_heads_that_were_not_seen_are_not_guessed() -> None:
    """The tiny model has two heads, and much else that is two; the model has four."""
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_attention_heads": 4, "num_conv_pos_embedding_groups": 8}
    model = hf.WavLMModel(hf.WavLMConfig(**sizes, num_conv_pos_embeddings=8))
    reasons = {width.name: width.reason for width in widths_of(model)}
    assert reasons["hidden_size"] == (
        "its units are in 2 channel groups in the tiny model, and in 2 or 4 at full size"
    )


def test_units_of_unequal_parts_of_heads_are_refused() -> None:
    model = _model("wav2vec2")
    field_map = map_of(model)
    path = ("hidden_size",)
    name = "encoder.layers.0.attention.q_proj.weight"
    wrong = Group((path,), (TensorDim(name, 0, UnitLayout(parts=16)),), UnitCount(12))
    assert _uneven_heads(wrong, field_map) == Refusal(
        f"{name}: its units are not the same share of every head"
    )
    right = Group((path,), (TensorDim(name, 0, UnitLayout(parts=12)),), UnitCount(16))
    assert _uneven_heads(right, field_map) is None


class _Grouped(nn.Module):
    """A convolution in three groups between two projections that have six channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(5, 6)
        self.conv = nn.Conv1d(6, 6, 3, groups=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.inside(x).transpose(1, 2)
        return self.conv(hidden).transpose(1, 2)


def test_channels_of_a_convolution_in_groups_change_places_in_all_groups_at_once() -> None:
    torch.manual_seed(0)
    model = _Grouped().double()
    test = TwinTest(model, {"x": torch.randn(2, 9, 5, dtype=torch.float64)}, 2, (3,))
    dims = [
        TensorDim(name, 0, UnitLayout(parts=3))
        for name in ("inside.weight", "inside.bias", "conv.weight", "conv.bias")
    ]
    dims.append(TensorDim("conv.weight", 1))
    links = test.links(dims)
    assert not links.unequal
    assert not links.unobserved
    assert all(test.proves(group, [1, 0]) for group in links.groups)
    runs = [TensorDim(dim.name, 0, UnitLayout(run=3)) for dim in dims[:4]]
    assert test.links([*runs, dims[4]]).unequal


def test_a_head_is_as_wide_as_it_is_at_full_size() -> None:
    config_class = getattr(hf, "Sapiens2Config", None)
    if config_class is None:
        pytest.skip("this Transformers has no Sapiens 2")
    config = config_class(
        hidden_size=256,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads_per_layer=[8, 2],
        image_size=32,
        num_register_tokens=2,
    )
    torch.manual_seed(0)
    model = hf.Sapiens2Model(config).double().eval()
    randomise(model)
    (width,) = (width for width in widths_of(model) if "num_attention_heads" in width.names)
    assert width.reason is None
    units = [group.count.units for group in width.groups]
    assert units == [8, 2, 256]  # heads of 32 channels; four heads each; the residual stream
    pruned = _pruned(model, width.names, 0.5)
    assert pruned.config.num_key_value_heads_per_layer == [4, 1]
    fresh = Builder(pruned).build_real(config_json(pruned.config))
    assert not isinstance(fresh, Refusal)
    assert masked_difference(model, pruned, fresh, example_inputs(model)) is None


def test_layers_that_read_each_other_and_of_which_the_tiny_copy_has_fewer() -> None:
    """Data2Vec's four convolutions over positions: each reads the one before it."""
    config: Any = hf.Data2VecAudioConfig(**_SIZES, num_conv_pos_embeddings=4)
    widths = {width.name: width.reason for width in prunable(hf.Data2VecAudioModel(config)).widths}
    assert widths["intermediate_size"] is None
    assert widths["hidden_size"] == (
        "encoder.pos_conv_embed.layers.0.conv.weight: dimension 0 is in two groups at full size, "
        "because layers read each other, and the tiny model has fewer of them"
    )


def test_the_size_of_a_kernel_is_no_width() -> None:
    """TextNet's kernels are many fields of value 3, which all would be tried together."""
    kernels = [[[3, 3], [3, 1]], [[1, 3], [3, 3]], [[3, 3]], [[3, 3], [3, 3]]]
    config = hf.TextNetConfig(
        conv_layer_kernel_sizes=kernels,
        conv_layer_strides=[[1, 2], [2, 1], [2], [2, 1]],
        hidden_sizes=[8, 12, 16, 24, 32],
        stem_out_channels=8,
        image_size=[64, 64],
    )
    widths = widths_of(hf.TextNetForImageClassification(config).eval())
    assert not [width.name for width in widths if "kernel" in width.name]
    assert {width.name for width in widths if width.reason is None} == {
        *(f"hidden_sizes[{stage}]" for stage in (1, 2, 3, 4)),
        "hidden_sizes[0] + stem_out_channels",
    }
