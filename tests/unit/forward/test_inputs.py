"""Example inputs: exact shapes for every kind of model, found from names and the config's sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
import zoo

from tp_hf_config.forward.find_recipe import find_recipe
from tp_hf_config.forward.head_splits import observe
from tp_hf_config.forward.inputs import (
    example_inputs,
    input_forms,
    second_sample,
    text_inputs,
    video_forms,
)
from tp_hf_config.forward.run_recipe import PLAIN
from tp_hf_config.model.build import Refusal, without_data
from tp_hf_config.model.meta_run import RealNumbers

_LAYER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_TEXT = {**_LAYER, "vocab_size": 99, "eos_token_id": 2}
_IMAGE = {"image_size": 32, "patch_size": 8}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_IMAGE_TOKEN = 5


def _qwen2_vl() -> hf.PreTrainedModel:
    config = hf.Qwen2VLConfig(
        text_config={**_TEXT, "num_key_value_heads": 2, "rope_parameters": _ROTARY},
        vision_config={
            "embed_dim": 32,
            "hidden_size": 32,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 4,
        },
        image_token_id=_IMAGE_TOKEN,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return hf.Qwen2VLModel(config)


def _paligemma(**vision: Any) -> hf.PreTrainedModel:
    config = hf.PaliGemmaConfig(
        text_config={"model_type": "gemma", **_TEXT, "num_key_value_heads": 1, "head_dim": 16},
        vision_config={"model_type": "siglip_vision_model", **_LAYER, **_IMAGE, **vision},
        image_token_index=_IMAGE_TOKEN,
        projection_dim=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _wav2vec2() -> hf.PreTrainedModel:
    config = hf.Wav2Vec2Config(
        **_TEXT,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return hf.Wav2Vec2Model(config)


def _timesformer() -> hf.PreTrainedModel:
    config = hf.TimesformerConfig(**_LAYER, **_IMAGE, num_frames=3)
    return hf.TimesformerForVideoClassification(config)


def _encodec() -> hf.PreTrainedModel:
    config = hf.EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=8, codebook_dim=16, num_lstm_layers=1
    )
    return hf.EncodecModel(config)


def _siglip2() -> hf.PreTrainedModel:
    vision = {**_LAYER, "num_patches": 16, "patch_size": 8}
    return hf.Siglip2ForImageClassification(hf.Siglip2Config(vision_config=vision))


_SHAPES: list[tuple[Any, dict[str, tuple[int, ...]]]] = [
    (lambda: zoo.build("llama"), {"input_ids": (1, 8)}),
    (lambda: zoo.build("bert"), {"input_ids": (1, 8)}),
    (lambda: zoo.build("vit"), {"pixel_values": (1, 3, 32, 32)}),
    (lambda: zoo.build("t5"), {"input_ids": (1, 8), "decoder_input_ids": (1, 8)}),
    (_timesformer, {"pixel_values": (1, 3, 3, 32, 32)}),
    (_wav2vec2, {"input_values": (1, 7680)}),
    (
        _qwen2_vl,
        {
            "pixel_values": (16, 3 * 2 * 4 * 4),
            "image_grid_thw": (1, 3),
            "input_ids": (1, 4 + 8),
            "mm_token_type_ids": (1, 4 + 8),
        },
    ),
    (
        _paligemma,
        {
            "pixel_values": (1, 3, 32, 32),
            "input_ids": (1, 16 + 8),
            "token_type_ids": (1, 16 + 8),
        },
    ),
    (
        _siglip2,
        {"pixel_values": (1, 16, 192), "spatial_shapes": (1, 2), "pixel_attention_mask": (1, 16)},
    ),
]


@pytest.mark.parametrize(("make", "expected"), _SHAPES)
def test_the_first_form(make: Any, expected: dict[str, tuple[int, ...]]) -> None:
    model = make()
    inputs = next(input_forms(model))
    shapes = {name: tuple(value.shape) for name, value in inputs.items() if name != "use_cache"}
    assert shapes == expected
    with torch.no_grad():
        model(**inputs)


def test_a_spectrogram_of_the_length_that_the_class_takes() -> None:
    config = hf.WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=99,
        num_mel_bins=16,
        max_source_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = hf.WhisperForConditionalGeneration(config)
    inputs = example_inputs(model)
    assert {
        name: tuple(inputs[name].shape) for name in ("input_features", "decoder_input_ids")
    } == {
        "input_features": (1, 16, 40),
        "decoder_input_ids": (1, 8),
    }
    model(**inputs)


@pytest.mark.parametrize("make", [_qwen2_vl, _paligemma])
def test_a_token_for_every_feature_of_an_image(make: Any) -> None:
    model = make()
    inputs = example_inputs(model)
    method = next(m for m in model.modules() if hasattr(m, "get_image_features")).get_image_features
    names = ("pixel_values", "image_grid_thw")
    made = method(**{name: inputs[name] for name in names if name in inputs}).pooler_output
    features = sum(len(part.reshape(-1, 32)) for part in made)
    assert int((inputs["input_ids"] == _IMAGE_TOKEN).sum()) == features
    assert not (text_inputs(model) or {})["input_ids"].eq(_IMAGE_TOKEN).any()


def test_no_sound_is_padding() -> None:
    """Gemma 3n's mask says where there is none."""
    config = hf.Gemma3nAudioConfig(conf_num_hidden_layers=1)
    with torch.device("meta"):
        model = hf.Gemma3nAudioEncoder(config)
    given = example_inputs(model)
    assert given["audio_mel_mask"].shape == given["audio_mel"].shape[:2]
    assert not given["audio_mel_mask"].any()


def test_tokens_follow_the_size_of_the_image() -> None:
    assert example_inputs(_paligemma(image_size=48))["input_ids"].shape == (1, 36 + 8)


def test_two_samples() -> None:
    model = _qwen2_vl()
    inputs = second_sample(example_inputs(model))
    assert {name: tuple(v.shape) for name, v in inputs.items() if name != "use_cache"} == {
        "pixel_values": (32, 96),
        "image_grid_thw": (2, 3),
        "input_ids": (2, 12),
        "mm_token_type_ids": (2, 12),
    }
    first, second = inputs["input_ids"]
    assert torch.equal(first.flip(-1), second)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert inputs["use_cache"] is False
    with torch.no_grad():
        model(**inputs)


def test_patches_of_two_images_in_one_row() -> None:
    strip, sizes = torch.rand(1, 3, 4, 16), torch.tensor([[2, 2]])
    both = second_sample({"pixel_values": strip, "target_sizes": sizes})
    assert both["pixel_values"].shape == (1, 3, 4, 32)
    assert both["target_sizes"].tolist() == [[2, 2], [2, 2]]


def test_the_form_that_runs_is_found_without_data() -> None:
    """EnCodec takes one channel of sound; its first form has none."""
    model = without_data(hf.Siglip2ForImageClassification, _siglip2().config)
    assert not isinstance(model, Refusal)
    assert observe(model, find_recipe(model)).ended
    sound = _encodec()
    with RealNumbers(), torch.no_grad():
        shapes = [tuple(form["input_values"].shape) for form in input_forms(sound)]
    assert shapes[0][:1] == (1,)
    assert shapes[1] == (1, 1, shapes[0][1])
    assert find_recipe(sound.to("meta")).form == 1


def test_a_model_of_text_has_no_text_alone() -> None:
    assert text_inputs(zoo.build("llama")) is None
    assert text_inputs(zoo.build("vit")) is None
    assert (text_inputs(_paligemma()) or {}).keys() == {"input_ids", "use_cache"}


def test_a_video_goes_beside_an_image() -> None:
    vision = {"model_type": "clip_vision_model", **_LAYER, **_IMAGE}
    config = hf.VideoLlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config=vision,
        image_token_index=5,
        video_token_index=6,
    )
    model = hf.VideoLlavaForConditionalGeneration(config)
    inputs = next(video_forms(model, PLAIN))
    assert (inputs["pixel_values"].shape, inputs["pixel_values_videos"].ndim) == (
        (1, 3, 32, 32),
        5,
    )
    assert {token: int((inputs["input_ids"] == token).sum()) > 0 for token in (5, 6)} == {
        5: True,
        6: True,
    }
    model(**inputs)
    assert list(video_forms(_paligemma(), PLAIN)) == []


def test_a_token_for_every_query_where_nothing_counts_features() -> None:
    config = hf.InstructBlipConfig(
        text_config={"model_type": "opt", **_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
        vision_config={**_LAYER, **_IMAGE},
        qformer_config={**_LAYER, "vocab_size": 99, "encoder_hidden_size": 32},
        num_query_tokens=6,
        image_token_index=_IMAGE_TOKEN,
    )
    make = getattr(hf, "InstructBlipModel", None)
    if make is None:
        pytest.skip("this Transformers has no bare InstructBLIP")
    ids = example_inputs(make(config))["input_ids"]
    assert int((ids == _IMAGE_TOKEN).sum()) == 6


def test_no_time_is_padding() -> None:
    config = hf.TimesFmConfig(
        **_LAYER, patch_length=8, context_length=32, horizon_length=16, head_dim=16
    )
    inputs = example_inputs(hf.TimesFmModel(config))
    assert inputs["past_values_padding"].tolist() == [[0] * 32]


def test_a_mask_of_images_is_only_for_several() -> None:
    """FLAVA's is of the patches of one image, and may be left out."""
    config = hf.FlavaConfig(
        text_config=_TEXT,
        image_config={**_LAYER, **_IMAGE},
        multimodal_config=_LAYER,
    )
    model = hf.FlavaModel(config)
    inputs = example_inputs(model)
    assert "image_attention_mask" not in inputs
    model(**inputs)
