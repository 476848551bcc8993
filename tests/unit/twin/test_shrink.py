"""Widths whose proportion only the forward pass shows: the tiny model has it too, and is tiny."""

from __future__ import annotations

from typing import Any

import pytest
import small
import transformers as hf

from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.graph.prunable import widths_of
from tp_hf_config.model.build import without_data
from tp_hf_config.model.config_json import value_at
from tp_hf_config.twin.tiny.compute_budget import with_smaller_inputs
from tp_hf_config.twin.tiny.requirements import Requirements
from tp_hf_config.twin.tiny.shrink import shrunken, small_tokens
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model

pytestmark = pytest.mark.skipif(
    small.TRANSFORMERS < (5,), reason="Transformers 4 has other configs of Voxtral"
)


@pytest.mark.parametrize(
    ("name", "config", "widths"),
    [
        (
            # attention reads the hidden state and the embeddings side by side
            "ZambaForCausalLM",
            lambda: hf.ZambaConfig(num_hidden_layers=9),
            {"hidden_size": 58, "attention_hidden_size": 116},
        ),
        (
            # four positions of sound stand side by side in one token
            "VoxtralForConditionalGeneration",
            lambda: hf.VoxtralConfig(audio_token_id=24),
            {"audio_config.hidden_size": 40},
        ),
    ],
)
def test_widths_that_a_pass_needs_in_proportion_shrink_together(
    name: str, config: Any, widths: dict[str, int]
) -> None:
    model = without_data(getattr(hf, name), config())
    tiny = tiny_model(map_of(model))  # type: ignore[arg-type]
    assert isinstance(tiny, TinyModel)
    values = {".".join(map(str, field)): n for field, n in tiny.field_map.values.items()}
    assert {field: values[field] for field in widths} == widths
    assert sum(parameter.numel() for parameter in tiny.model.parameters()) < 400_000


@pytest.mark.parametrize(
    ("name", "given", "values"),
    [
        # 300 objects need an image of 128 pixels, 10 do with the smallest
        (
            "LwDetrModel",
            {"projector_scale_factors": [1.0]},
            {"num_queries": 10, "backbone_config.image_size": 64},
        ),
        # the form of inputs that the config needs has 512 pixels
        ("RfDetrModel", {}, {"num_queries": 10}),
        # seven stages, each twice as wide as the one before: 48 million parameters from 12 on
        ("VibeVoiceAcousticTokenizerEncoderModel", {}, {"num_filters": 4}),
    ],
)
def test_a_model_that_is_slow_at_its_tiny_widths_gets_smaller_ones(
    name: str, given: dict[str, Any], values: dict[str, int]
) -> None:
    model_class = getattr(hf, name)
    field_map = map_of(without_data(model_class, model_class.config_class(**given)))
    data = shrunken(field_map, small_tokens(field_map), together=False)
    assert {field: value_at(data, tuple(field.split("."))) for field in values} == values
    required = Requirements(field_map, field_map.builder.build(data))
    required.run_with(with_smaller_inputs(field_map.builder.build(data), field_map.recipe))
    assert required.cost(data) < 60e6  # before: 275, 260 and 195 million


@pytest.mark.full
def test_numbers_that_a_class_takes_only_when_all_are_equal_shrink_together() -> None:
    """D-FINE takes no other ``d_model`` alone, nor one of its three maps, nor another head dim."""
    one = [1, 1, 1, 1]
    backbone = hf.HGNetV2Config(
        stem_channels=[3, 8, 12],
        stage_in_channels=[12, 24, 32, 40],
        stage_mid_channels=[8, 8, 12, 12],
        stage_out_channels=[24, 32, 40, 48],
        stage_num_blocks=one,
        stage_numb_of_layers=one,
        stage_light_block=[False] * 4,
        hidden_sizes=[24, 32, 40, 48],
        embedding_size=12,
        depths=one,
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 10, "decoder_layers": 1}
    config = hf.DFineConfig(backbone_config=backbone, encoder_in_channels=[32, 40, 48], **sizes)
    field_map = map_of(without_data(hf.DFineModel, config))  # type: ignore[arg-type]
    data = shrunken(field_map, small_tokens(field_map), together=False)
    assert (data["d_model"], data["encoder_hidden_dim"]) == (64, 64)
    assert data["decoder_in_channels"] == [64, 64, 64]
    assert (data["decoder_attention_heads"], data["head_dim"]) == (2, 32)


@pytest.mark.full
def test_heads_show_in_attention_over_a_pool_of_few_positions() -> None:
    """A pool of one position makes 49 that are alike: no head could be told from another."""
    config = hf.PvtV2Config(
        image_size=64,
        linear_attention=True,
        depths=[2, 2, 2, 2],
        hidden_sizes=[12, 32, 64, 192],
        num_attention_heads=[1, 2, 8, 8],
        patch_sizes=[3, 6, 3, 3],
        sr_ratios=[8, 6, 2, 1],
        strides=[2, 2, 4, 2],
    )
    model = hf.PvtV2ForImageClassification(config)
    (width,) = (width for width in widths_of(model) if width.name == "hidden_sizes[3]")
    value = "pvt_v2.encoder.layers.3.blocks.0.attention.value.weight"
    (group,) = (
        group for group in width.groups if any((d.name, d.dim) == (value, 0) for d in group.dims)
    )
    assert group.count.channel_groups == 8
