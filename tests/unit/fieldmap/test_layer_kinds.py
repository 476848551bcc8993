"""Layers are of one kind only where the class built them alike, and every kind is learned from."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch_pruning as tp
import transformers as hf
from masked import masked_difference
from torch import nn

from tp_hf_config import HFConfigSyncHook
from tp_hf_config.errors import UnsupportedModelError
from tp_hf_config.fieldmap import layer_kinds
from tp_hf_config.fieldmap.field_map import Depth
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.fieldmap.lower_depth import shallow
from tp_hf_config.forward.inputs import example_inputs, second_sample
from tp_hf_config.graph.prunable import widths_of
from tp_hf_config.model.build import Builder, Refusal, without_data
from tp_hf_config.model.config_json import config_json
from tp_hf_config.twin.tiny.tiny_model import TinyModel, randomise, tiny_model

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _smollm3(rope: list[int]) -> Any:
    """SmolLM3; 1 in ``rope``: a layer with rotary positions."""
    config_class = getattr(hf, "SmolLM3Config", None)
    if config_class is None:
        pytest.skip("this Transformers has no SmolLM3")
    config = config_class(**_TEXT, num_hidden_layers=len(rope), no_rope_layers=rope)
    torch.manual_seed(0)
    model = hf.SmolLM3ForCausalLM(config).double().eval()
    model.set_attn_implementation("eager")
    randomise(model)
    return model


def _left(rope: list[int]) -> list[int]:
    data = map_of(_smollm3(rope)).depth.data
    return list(data["no_rope_layers"])[: data["num_hidden_layers"]]


def test_a_kind_that_only_later_layers_are_of_is_looked_at() -> None:
    """Without rotary positions dims of heads may change places, with them they may not."""
    model = _smollm3([0, 0, 1, 1])
    with pytest.raises(
        UnsupportedModelError, match=r"units are not interchangeable in model\.layers"
    ):
        tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=tp.importance.GroupMagnitudeImportance(),
            hooks=[HFConfigSyncHook(prune="head_dim")],
        )
    assert {width.name: width.reason for width in widths_of(model)}["hidden_size"] is None


def test_a_width_that_all_kinds_allow_goes_in_all_layers() -> None:
    model = _smollm3([0, 0, 0, 0, 0, 1, 0, 0])
    assert _left([0, 0, 0, 0, 0, 1, 0, 0]) == [0, 1]
    original = _smollm3([0, 0, 0, 0, 0, 1, 0, 0])
    widths = ("hidden_size", "intermediate_size", "num_attention_heads")
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=(*widths, "num_key_value_heads"))],
    ).step()
    config = model.config
    assert [getattr(config, width) for width in widths] == [16, 24, 2]
    assert config.no_rope_layers == [0, 0, 0, 0, 0, 1, 0, 0]
    assert {layer.mlp.up_proj.out_features for layer in model.model.layers} == {24}
    fresh = Builder(model).build_real(config_json(config))
    assert not isinstance(fresh, Refusal)
    inputs = second_sample(example_inputs(original))
    assert masked_difference(original, model, fresh, inputs) is None


@pytest.mark.parametrize(
    ("rope", "left"),
    [
        ([1, 1, 1, 1, 1, 1], [1, 1]),
        ([1, 1, 1, 0, 1, 1, 1, 0], [1, 0]),
        ([1] * 39 + [0], [1, 0]),
        ([0] + [1] * 39, [0, 1]),
        ([0, 1], [0, 1]),
    ],
)
def test_one_layer_of_each_kind_is_left(rope: list[int], left: list[int]) -> None:
    assert _left(rope) == left


def test_names_of_layers_that_were_chosen_are_those_of_the_first_like_them() -> None:
    field_map = map_of(_smollm3([1, 1, 1, 0, 1, 0]))
    weight = "model.layers.{}.mlp.up_proj.weight"
    places = [field_map.depth.canonical(weight.format(layer)) for layer in range(6)]
    assert places == [weight.format(layer) for layer in (0, 0, 0, 1, 0, 1)]
    assert [field_map.depth.first(weight.format(layer)) for layer in (0, 1)] == [
        weight.format(0),
        weight.format(1),
    ]
    origins = [field_map.depth.origin(weight.format(layer)) for layer in (0, 1)]
    assert origins == [weight.format(0), weight.format(3)]
    assert field_map.depth.canonical("lm_head.weight") == "lm_head.weight"


class Layer(nn.Module):
    """A layer that says what it is given."""

    def __init__(self, **said: Any):
        super().__init__()
        self.up = nn.Linear(4, 4)
        for key, value in said.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(key, value, persistent=False)
            else:
                setattr(self, key, value)


def _first(said: list[Any], **more: list[Any]) -> tuple[int, ...]:
    """For each of several layers, the first that the class built like it."""
    columns = {"said": said, **more}
    rows = [{key: column[n] for key, column in columns.items()} for n in range(len(said))]
    model = nn.ModuleDict({"layers": nn.ModuleList(Layer(**row) for row in rows)})
    return layer_kinds.kinds_in(model)["layers"].first


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ([True, False, True], (0, 1, 0)),
        (["full", "sliding", "full"], (0, 1, 0)),
        ([None, 8, None, 8], (0, 1, 0, 1)),
        ([1e4, 1e6, 1e4], (0, 1, 0)),
        ([(7, 7), (7, 7), (14, 14)], (0, 0, 2)),
        ([0, 1, 2, 3, 4, 5], (0,) * 6),  # the layer's number
        ([5, 4, 3, 2, 1, 0], (0,) * 6),
        ([0, 1], (0, 0)),
        ([32, 64], (0, 1)),
        ([0.1, 0.2, 0.3, 0.4], (0, 1, 2, 3)),  # each of few may be of its own kind
        ([0.1, 0.2, 0.3, 0.4, 0.5], (0,) * 5),  # a rate that rises with depth
        ([0.0, 0.2, 0.3, 0.4, 0.5], (0, 1, 1, 1, 1)),  # 0 takes something away
        ([32, 64, 128, 256, 512], (0,) * 5),
        ([0.1, 0.2, 0.3, 0.4, 0.1], (0, 1, 2, 3, 0)),
        ([torch.relu, torch.tanh, torch.relu], (0, 1, 0)),
        ([functools.partial(torch.add, alpha=n) for n in (1, 2, 1)], (0, 1, 0)),
        ([nn.ReLU(), nn.GELU(), nn.ReLU()], (0, 1, 0)),
        ([nn.Dropout(0.0), nn.Identity(), nn.Dropout(0.5)], (0, 0, 0)),  # nothing, in eval mode
        ([torch.ones(2), torch.ones(3), torch.ones(2)], (0, 1, 0)),
        ([torch.float32, torch.bfloat16], (0, 1)),
        (["layer_3", "layer_4", "layer_5"], (0, 0, 0)),  # the layer's place in a cache
        (["layer_3", "layer_4", "block_5"], (0, 1, 2)),
        (["layer_3", "layer_4", "layer"], (0, 1, 2)),
        (["1x1", "2x2", "3x3"], (0, 1, 2)),  # not one number
        (["layer_3", "layer_9", "layer_5"], (0, 1, 2)),
    ],
)
def test_kinds_are_what_the_class_left_in_layers(said: list[Any], first: tuple[int, ...]) -> None:
    assert _first(said) == first


def test_numbers_of_layers_of_one_kind_among_others_are_counts_too() -> None:
    """Jamba's attention layers know their number, and there are few of them."""
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                Layer(number=n, inner=Layer(number=n) if n % 3 == 2 else nn.ReLU())
                for n in range(9)
            )
        }
    )
    assert layer_kinds.kinds_in(model)["layers"].first == (0, 0, 2) * 3


def _shallow(config: hf.PreTrainedConfig, cls: Any) -> tuple[Depth, Any]:
    model = without_data(cls, config)
    assert not isinstance(model, Refusal)
    builder = Builder(model)
    data = config_json(model.config, use_diff=False)
    full = builder.build(data)
    assert not isinstance(full, Refusal)
    return shallow(builder, data, full), full


def test_layers_that_a_config_names_by_number_keep_one_that_is_named() -> None:
    """Which layers of Qwen2.5-VL's images see all of them, a list in its config alone says."""
    vision = {"depth": 12, "hidden_size": 32, "num_heads": 2, "fullatt_block_indexes": [5, 11]}
    config_class = getattr(hf.Qwen2_5_VLConfig, "sub_configs", {})["vision_config"]
    config = config_class(**vision, intermediate_size=48, out_hidden_size=32)
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    found, _ = _shallow(config, qwen.Qwen2_5_VisionTransformerPretrainedModel)
    assert (found.data["depth"], found.data["fullatt_block_indexes"]) == (2, [1])


@pytest.mark.parametrize(
    ("module", "name", "depths", "fewer"),
    [
        ("maskformer.modeling_maskformer_swin", "MaskFormerSwin", [2, 2, 6, 2], [2, 2, 2, 2]),
        ("florence2.modeling_florence2", "Florence2Vision", [1, 1, 9, 1], [1, 1, 2, 1]),
    ],
)
def test_a_stage_has_fewer_layers_where_norms_or_convolutions_stand_beside_the_stages(
    module: str, name: str, depths: list[int], fewer: list[int]
) -> None:
    """They are as many as the config's depths, which say something else of one of them then."""
    modeling = pytest.importorskip(f"transformers.models.{module}")
    config = getattr(modeling, f"{name}Config")(depths=depths)
    depth, _ = _shallow(config, getattr(modeling, f"{name}Backbone"))
    assert depth.data["depths"] == fewer


def test_the_tiny_copy_has_every_kind() -> None:
    tiny = tiny_model(map_of(_smollm3([0, 0, 1, 1])))
    assert isinstance(tiny, TinyModel)
    assert [layer.self_attn.use_rope for layer in tiny.model.model.layers] == [0, 1]


def test_a_config_that_one_kind_of_layers_holds_makes_no_other_kinds_at_another_depth() -> None:
    """BLIP-2's layers with attention to images hold the config, which says how many there are."""
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    found, _ = _shallow(hf.Blip2QFormerConfig(**sizes, num_hidden_layers=8), Blip2QFormerModel)
    assert found.data["num_hidden_layers"] == 2
    weight = "encoder.layer.{}.output_query.dense.weight"
    assert found.canonical(weight.format(5)) == weight.format(1)


def _llama(name: str, **own: Any) -> Any:
    config_class = getattr(hf, f"{name}TextConfig", None) or getattr(hf, f"{name}Config")
    return config_class(**_TEXT, **own), getattr(hf, f"{name}ForCausalLM")


def _gpt_neo() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_heads": 2, "num_layers": 8}
    config = hf.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 4]])
    return config, hf.GPTNeoForCausalLM


def _modernbert() -> Any:
    sizes = {key: _TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = hf.ModernBertConfig(
        **sizes, num_attention_heads=4, num_hidden_layers=9, pad_token_id=0
    )
    return config, hf.ModernBertModel


@pytest.mark.parametrize(
    ("made", "kinds_of", "layers"),
    [
        (lambda: _llama("Llama", num_hidden_layers=12), (0,) * 12, 2),
        (lambda: _llama("Cohere2", num_hidden_layers=8), (0, 0, 0, 1) * 2, 2),
        (lambda: _llama("Gemma2", num_hidden_layers=6), (0, 1) * 3, 2),
        (lambda: _llama("Gemma3", num_hidden_layers=12), ((0,) * 5 + (1,)) * 2, 2),
        (
            lambda: _llama(
                "Qwen2", num_hidden_layers=8, use_sliding_window=True, max_window_layers=6
            ),
            (0,) * 6 + (1,) * 2,
            2,
        ),
        (lambda: _llama("DiffLlama", num_hidden_layers=8), (0,) * 8, 2),
        (lambda: _llama("MiniMax", num_hidden_layers=8), (0, 1) * 4, 2),
        (lambda: _llama("Jamba", num_hidden_layers=16), (0, 1, 0, 1, 4, 1, 0, 1) * 2, 5),
        (_gpt_neo, (0, 1) * 4, 2),
        (_modernbert, (0, 1, 1, 2, 1, 1, 2, 1, 1), 3),
    ],
)
def test_kinds_of_layers_of_many_classes(made: Any, kinds_of: tuple[int, ...], layers: int) -> None:
    """``kinds_of``: for each layer, which of those that are left stands for it."""
    found, full = _shallow(*made())
    (name,) = [n for n, one in layer_kinds.lists_of(full).items() if len(one) == len(kinds_of)]
    shown = [found.canonical(f"{name}.{n}").rpartition(".")[2] for n in range(len(kinds_of))]
    assert tuple(map(int, shown)) == kinds_of
    assert len(found.first_of_kind[name]) == layers
