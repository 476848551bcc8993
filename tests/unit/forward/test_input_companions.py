"""Images, sound and text in one forward pass, and the widths that stand in all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.coverage import unreached_by, working_inputs
from tp_hf_config.forward.inputs import example_inputs
from tp_hf_config.model.build import Refusal, without_data
from tp_hf_config.twin.find_groups import _find, equal_together
from tp_hf_config.twin.masked_check import rehearse
from tp_hf_config.twin.prove import is_unread
from tp_hf_config.twin.tiny.shrink import small_tokens
from tp_hf_config.twin.tiny.tiny_model import TinyModel, randomise, tiny_model

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_AUDIO, _IMAGE, _VIDEO = 5, 6, 7


def _omni() -> Any:
    """Qwen2.5-Omni, whose config does not say with which token an image begins."""
    return hf.Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": _ROTARY,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 40,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "d_model": 48,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 56,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "n_window": 10,
            "output_dim": 32,
        },
        audio_token_index=_AUDIO,
        image_token_index=_IMAGE,
        video_token_index=_VIDEO,
        audio_start_token_id=4,
        audio_end_token_id=3,
        user_token_id=1,
    )


_Omni = getattr(hf, "Qwen2_5OmniThinkerModel", hf.Qwen2_5OmniThinkerForConditionalGeneration)


def test_an_image_and_a_sound_in_one_text() -> None:
    """Without a mask of the text no class asks where in it images begin."""
    model = _Omni(_omni()).eval()
    inputs = example_inputs(model)
    assert "attention_mask" not in inputs
    assert [int((inputs["input_ids"] == token).sum()) for token in (_IMAGE, _AUDIO)] == [4, 10]
    with torch.no_grad():
        model(**inputs)


def test_three_widths_that_stand_in_one_text() -> None:
    """One of its parameters, a table of two tokens, no code reads."""
    model = without_data(_Omni, _omni())
    assert not isinstance(model, Refusal)
    tiny = tiny_model(map_of(model))
    assert isinstance(tiny, TinyModel)
    assert not tiny.partial
    fields = [path for path in tiny.field_map.values if tiny.field_map.moves_shapes(path)]
    (together,) = equal_together(tiny.field_map, set(fields), frozenset())
    assert together == (
        ("audio_config", "output_dim"),
        ("text_config", "hidden_size"),
        ("vision_config", "out_hidden_size"),
    )
    found = _find(tiny, together)
    assert found.reason is None
    assert found.unobserved_parameters == ("audio_tower.audio_bos_eos_token.weight",)
    assert rehearse(tiny, found) is None


def test_what_no_code_reads() -> None:
    model = without_data(_Omni, _omni())
    assert not isinstance(model, Refusal)
    assert is_unread(model, "audio_tower.audio_bos_eos_token")
    assert not is_unread(model, "language_model.embed_tokens")
    assert not is_unread(model, "language_model.layers.0")


def _molmo2() -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = hf.Molmo2Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "image_size": [20, 20],
            "patch_size": 4,
            **heads,
        },
        adapter_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "text_hidden_size": 32,
            "vision_feature_layer": [0, 1],
            **heads,
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "vocab_size": 64,
            "additional_vocab_size": 8,
            **heads,
        },
        image_patch_id=_IMAGE,
    )
    return hf.Molmo2Model(config)


@pytest.mark.skipif(not hasattr(hf, "Molmo2Model"), reason="this Transformers has no Molmo 2")
def test_patches_that_are_pooled_by_their_numbers() -> None:
    """All patches of an image in one row, and for each token those that it is made of."""
    model = _molmo2().double().eval()
    working = working_inputs(model)
    assert not isinstance(working, Refusal)
    inputs, partial = working.inputs, working.partial
    assert not partial
    assert inputs["pixel_values"].shape == (2, 25, 48)
    assert inputs["image_token_pooling"][:4].flatten().tolist() == list(range(16))
    assert inputs["image_grids"].tolist() == [[2, 2, 0, 0]] * 2
    assert inputs["mm_token_type_ids"][0].tolist() == [1] * 4 + [0] * 8
    assert unreached_by(model, inputs) == set()


@pytest.mark.skipif(not hasattr(hf, "Molmo2Model"), reason="this Transformers has no Molmo 2")
def test_the_token_of_an_image_by_another_name() -> None:
    """It is small in the tiny model, as all are: the vocabulary is."""
    config = _molmo2().config
    config.image_patch_id, config.image_end_token_id = 60, 61
    model = without_data(hf.Molmo2Model, config)
    assert not isinstance(model, Refusal)
    data = small_tokens(map_of(model))
    assert (data["image_patch_id"], data["image_end_token_id"]) == (4, 3)


def test_a_protein_beside_a_text() -> None:
    """None of its tokens is padding, hidden or the end."""
    config_class = getattr(hf, "EvollaConfig", None)
    if config_class is None:
        pytest.skip("this Transformers has no Evolla")
    layer = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = config_class(
        **layer,
        vocab_size=40,
        num_hidden_layers=2,
        num_key_value_heads=2,
        aligner_num_add_layers=1,
        resampler_depth=1,
        resampler_dim_head=8,
        resampler_heads=2,
        resampler_num_latents=3,
        protein_encoder_config={
            **layer,
            "vocab_size": 12,
            "num_hidden_layers": 1,
            "pad_token_id": 1,
            "mask_token_id": 4,
            "max_position_embeddings": 30,
        },
    )
    model = hf.EvollaModel(config).double().eval()
    randomise(model)
    working = working_inputs(model)
    assert not isinstance(working, Refusal)
    inputs, partial = working.inputs, working.partial
    assert not partial
    assert inputs["protein_input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 10, 11, 5],
        [5, 11, 10, 9, 8, 7, 6, 5],
    ]
    assert inputs["protein_attention_mask"].tolist() == [[1] * 8] * 2
    assert unreached_by(model, inputs) == set()


def _phi4() -> Any:
    """Tokens of images and sound stand in their parts of the config."""
    layer = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = {
        **layer,
        "num_hidden_layers": 2,
        "image_size": 32,
        "crop_size": 32,
        "patch_size": 8,
        "image_token_id": _IMAGE,
    }
    audio = {
        **layer,
        "num_blocks": 2,
        "input_size": 16,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 8,
        "audio_token_id": _AUDIO,
    }
    return hf.Phi4MultimodalConfig(
        **layer,
        vocab_size=40,
        num_hidden_layers=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=[2],
        vision_config=vision,
        audio_config=audio,
    )


def test_as_many_tokens_as_the_forward_pass_says() -> None:
    """Phi-4-multimodal has no method that makes features; it stops where they do not fit."""
    model = hf.Phi4MultimodalForCausalLM(_phi4()).double().eval()
    randomise(model)
    working = working_inputs(model)
    assert not isinstance(working, Refusal)
    inputs, partial = working.inputs, working.partial
    assert not partial
    # a crop of 2 x 2 tokens and the whole, each row with one more, and one between; 64 / 8 of sound
    tokens = [int((inputs["input_ids"][0] == token).sum()) for token in (_IMAGE, _AUDIO)]
    assert tokens == [2 * 2 * 3 + 1, 8]
    left = {name.split(".")[2] for name in unreached_by(model, inputs)}
    assert left == {"audio_embed", "image_embed"}
    never = ("for_speech", "post_layernorm", "img_processor.head", "encoder.layers.1")
    assert [n for n in unreached_by(model, inputs) if not any(one in n for one in never)] == []


def test_the_tokens_and_lists_of_several_parts_of_a_config() -> None:
    config = _phi4()
    config.vision_config.image_token_id, config.audio_config.audio_token_id = 30, 31
    model = without_data(hf.Phi4MultimodalForCausalLM, config)
    assert not isinstance(model, Refusal)
    field_map = map_of(model)
    # of eight steps of sound three convolutions make one: eight modules in a row are no layers
    assert field_map.depth.data["audio_config"]["time_reduction"] == 8
    data = small_tokens(field_map)
    tokens = (data["audio_config"]["audio_token_id"], data["vision_config"]["image_token_id"])
    assert (sorted(tokens), data["bos_token_id"]) == ([3, 4], 1)
