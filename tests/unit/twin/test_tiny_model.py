"""Layers that a config names by their numbers: the tiny model has few, and runs what they have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from masked import masked_difference
from torch import nn

from tp_hf_config import HFConfigSyncHook
from tp_hf_config.fieldmap.layer_kinds import may_name_layers
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.coverage import unreached_by
from tp_hf_config.forward.inputs import example_inputs, second_sample
from tp_hf_config.graph.full_size import expand
from tp_hf_config.graph.prunable import widths_of
from tp_hf_config.model.build import Builder, Refusal
from tp_hf_config.model.config_json import config_json
from tp_hf_config.twin.find_groups import find_groups
from tp_hf_config.twin.tiny.tiny_model import TinyModel, randomise, tiny_model

pytestmark = pytest.mark.skipif(
    small.TRANSFORMERS < (5,), reason="Transformers 4 has other configs of Qwen3-VL"
)


_TEXT = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_IMAGES = {
    "hidden_size": 64,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _qwen3_vl() -> Any:
    """Features of layers 1, 3 and 5 of the images go into the text's first three layers."""
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    text = {
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": rotary,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 7,
        "hidden_size": 64,
        "intermediate_size": 56,
        "num_heads": 4,
        "out_hidden_size": 48,
        "deepstack_visual_indexes": [1, 3, 5],
    }
    tokens = {
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    }
    torch.manual_seed(0)
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    model = hf.Qwen3VLModel(config).double().eval()
    model.set_attn_implementation("eager")
    randomise(model)
    return model


def test_the_tiny_copy_names_layers_that_it_has() -> None:
    field_map = map_of(_qwen3_vl())
    assert field_map.depth.canonical("visual.deepstack_merger_list.2.norm.weight") == (
        "visual.deepstack_merger_list.0.norm.weight"
    )
    tiny = tiny_model(field_map)
    assert isinstance(tiny, TinyModel)
    vision = tiny.field_map.data["vision_config"]
    assert (vision["depth"], vision["deepstack_visual_indexes"]) == (2, [1])


def test_images_stay_as_wide_as_the_text_that_they_go_into() -> None:
    model = _qwen3_vl()
    reasons = {width.name: width.reason for width in widths_of(model)}
    both = "text_config.hidden_size + vision_config.out_hidden_size"
    assert reasons[both] is None
    assert reasons["vision_config.num_heads + vision_config.hidden_size"] is None
    assert "not interchangeable" in str(reasons["text_config.hidden_size"])
    pruned = copy.deepcopy(model)
    tp.pruner.MetaPruner(
        pruned,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=both.split(" + "))],
    ).step()
    config = pruned.config
    assert (config.text_config.hidden_size, config.vision_config.out_hidden_size) == (24, 24)
    assert config.vision_config.deepstack_visual_indexes == [1, 3, 5]
    assert [merger.linear_fc2.out_features for merger in pruned.visual.deepstack_merger_list] == [
        24,
        24,
        24,
    ]
    fresh = Builder(pruned).build_real(config_json(config))
    assert not isinstance(fresh, Refusal)
    assert masked_difference(model, pruned, fresh, second_sample(example_inputs(model))) is None


def test_features_of_layers_that_the_tiny_copy_has_not_are_of_others() -> None:
    """VipLLaVA reads five layers of its images, counted from both ends."""
    config = hf.VipLlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={"model_type": "clip_vision_model", **_IMAGES, "num_hidden_layers": 12},
        image_token_index=90,
        vision_feature_layers=[-2, -5, -8, -11, 6],
    )
    tiny = tiny_model(map_of(hf.VipLlavaModel(config)))
    assert isinstance(tiny, TinyModel)
    assert (tiny.partial, "pixel_values" in tiny.inputs) == (False, True)
    (named,) = (value for key, value in tiny.field_map.data.items() if "feature_layer" in key)
    assert named == [0, 1, 0, 1, 0]


def test_a_layer_behind_which_something_stands_is_one_that_is_left() -> None:
    config_class = getattr(hf, "MiniCPMV4_7VisionConfig", None)
    if config_class is None:
        pytest.skip("this Transformers has no MiniCPM-V 4.7")
    config = config_class(**_IMAGES, num_hidden_layers=8, insert_layer_id=6)
    tiny = tiny_model(map_of(hf.MiniCPMV4_7VisionModel(config)))
    assert isinstance(tiny, TinyModel)
    assert (tiny.field_map.data["num_hidden_layers"], tiny.field_map.data["insert_layer_id"]) == (
        2,
        0,
    )
    assert unreached_by(tiny.model, tiny.inputs) == set()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([8, 16, 24], True),
        ([0, 3], True),
        ([2, 2, 6, 2], False),
        ([3, 1], False),
        ([-1, 4], False),
        ([5], False),
        ([1, True], False),
        ([0.5, 1.5], False),
        ("12", False),
        (7, False),
    ],
)
def test_numbers_of_layers_are_whole_and_rise(value: Any, expected: bool) -> None:
    assert may_name_layers(value) is expected


def test_a_layer_that_was_not_looked_at_is_not_left_as_wide_as_it_was() -> None:
    model = small.llama()
    field_map = map_of(model)
    tiny = tiny_model(field_map)
    assert isinstance(tiny, TinyModel)
    (finding,) = [one for one in find_groups(tiny) if one.fields == (("intermediate_size",),)]
    model.beside = nn.Linear(model.config.intermediate_size, 3)
    assert expand(finding, tiny, field_map, model) == Refusal(
        "beside.weight is as wide, and no layer of its kind was examined"
    )


def test_a_layer_that_two_parts_of_a_config_name_is_one_in_both() -> None:
    """MiniCPM-V 4.6 sets its images' number to its own whenever a config is made."""
    config_class = getattr(hf, "MiniCPMV4_6Config", None)
    if config_class is None:
        pytest.skip("this Transformers has no MiniCPM-V 4.6")
    text = {"model_type": "llama", **_TEXT}
    vision = {**_IMAGES, "num_hidden_layers": 8}
    config = config_class(text_config=text, vision_config=vision, image_token_id=90)
    tiny = tiny_model(map_of(hf.MiniCPMV4_6Model(config)))
    assert isinstance(tiny, TinyModel)
    parts = (tiny.field_map.data, tiny.field_map.data["vision_config"])
    assert [part["insert_layer_id"] for part in parts] == [0, 0]
    assert unreached_by(tiny.model, tiny.inputs) == set()
