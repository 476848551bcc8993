"""Configs for model types whose default builds no model, or one that does not run.

Written from memory of the types' checkpoints, or the first values with which the class runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Recipe = Callable[[Any], Any]


def _given(**settings: Any) -> Recipe:
    """The default with some settings; those of a nested config go beside its defaults."""
    return lambda config_class: config_class(**settings)


def _as_wide_as_text(**fields: str) -> Recipe:
    """The field of each part (``vision_config="out_hidden_size"``) is the text's hidden size."""

    def recipe(config_class: Any) -> Any:
        width = config_class().text_config.hidden_size
        return config_class(**{part: {field: width} for part, field in fields.items()})

    return recipe


def _chameleon(config_class: Any) -> Any:
    """The names of image tokens are their numbers in letters."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = {f"IMGIMG{str(n).translate(letters)}Z": 4 + n for n in range(8192)}
    return config_class(vocabulary_map={"<image>": 8711, **names}, image_token_id=8711)


_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_BY_LAYER = {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}}
_QSA = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
_SIGLIP = {"image_size": 896, "patch_size": 14}
_MROPE = {
    **_ROTARY,
    "partial_rotary_factor": 0.5,
    "mrope_section": [8, 12, 12],
}
_HUNYUAN = {**_ROTARY, "mrope_section": [16, 16, 16, 16]}
_REPVIT = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m1",
    "num_classes": 1000,
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
}
_PERCEPTION = {
    "model_type": "timm_wrapper",
    "architecture": "vit_pe_lang_large_patch14_448",
    "model_args": {"embed_dim": 1024, "depth": 23, "img_size": [448, 448]},
}

RECIPES: dict[str, Recipe] = {
    # images and sound as wide as the text
    **dict.fromkeys(
        (
            "cosmos3_omni",
            "exaone4_5",
            "glm5_next",
            "glm_ocr",
            "qwen2_5_vl",
            "qwen3_vl",
            "qwen3_vl_moe",
        ),
        _as_wide_as_text(vision_config="out_hidden_size"),
    ),
    "qwen2_vl": _as_wide_as_text(vision_config="hidden_size"),
    "qwen3_omni_moe_thinker": _given(
        text_config={"num_attention_heads": 32, "head_dim": 128, "vocab_size": 152064},
        vision_config={"out_hidden_size": 2048},
        audio_config={"output_dim": 2048},
    ),
    "qwen3_asr": _as_wide_as_text(audio_config="output_dim"),
    "janus": _as_wide_as_text(vision_config="projection_dim"),
    "molmo2": _as_wide_as_text(adapter_config="text_hidden_size"),
    "ovis2": _given(hidden_size=4096),
    # sections of rotary embeddings
    **dict.fromkeys(
        ("glm4v", "glm46v", "glmga", "glm_image"), _given(text_config={"rope_parameters": _MROPE})
    ),
    **dict.fromkeys(("glm4v_text", "glm_image_text"), _given(rope_parameters=_MROPE)),
    "glm4v_moe": _given(text_config={"rope_parameters": _MROPE, "head_dim": 128}),
    "glm4v_moe_text": _given(rope_parameters=_MROPE, head_dim=128),
    "cohere_compass_text": _given(**_BY_LAYER),
    "cohere_compass": _given(text_config=_BY_LAYER, vision_config={"out_hidden_size": 8192}),
    # images as large as the checkpoints take them
    **dict.fromkeys(("gemma3", "shieldgemma2"), _given(vision_config=_SIGLIP)),
    "t5gemma2": _given(encoder={"vision_config": _SIGLIP}),
    "aria": _given(vision_config={"image_size": 490, "patch_size": 14}),
    "aya_vision": _given(vision_config={"image_size": 364, "num_attention_heads": 16}),
    **dict.fromkeys(
        ("idefics3", "smolvlm", "modernvbert", "ultravbert"),
        _given(vision_config={"image_size": 512, "patch_size": 16}),
    ),
    # tokens that stand for an image or a sound
    **dict.fromkeys(("blip-2", "instructblip"), _given(image_token_index=50265)),
    "instructblipvideo": _given(video_token_index=32000),
    "voxtral": _given(audio_token_id=24),
    # towers that the default leaves out
    "edgetam": _given(vision_config={"backbone_config": _REPVIT}),
    "edgetam_vision_model": _given(backbone_config=_REPVIT),
    "lw_detr": _given(projector_scale_factors=[1.0]),
    "timm_backbone": _given(backbone="resnet18", use_pretrained_backbone=False),
    **dict.fromkeys(
        ("granite_speech", "granite_speech_plus"),
        _given(projector_config={"model_type": "blip_2_qformer", "encoder_hidden_size": 1024}),
    ),
    # sizes without a default
    **dict.fromkeys(
        ("autoformer", "informer", "time_series_transformer"), _given(prediction_length=24)
    ),
    **dict.fromkeys(("hunyuan_v1_dense", "ministral"), _given(head_dim=128)),
    "hunyuan_v1_moe": _given(head_dim=128, num_experts=16, moe_topk=2),
    "hunyuan_vl_text": _given(head_dim=128, rope_parameters=_HUNYUAN),
    "hunyuan_vl": _given(text_config={"head_dim": 128, "rope_parameters": _HUNYUAN}),
    "nemotron": _given(num_key_value_heads=8),
    "moonshine_streaming": _given(num_key_value_heads=8),
    "esm": _given(vocab_size=33, pad_token_id=1, mask_token_id=32),
    "dbrx": _given(attn_config={"rope_theta": 500000.0, "clip_qkv": 8.0}),
    "dots1": _given(n_routed_experts=128, n_shared_experts=2, num_experts_per_tok=6),
    "deepseek_v2": _given(num_experts_per_tok=6),
    "lfm2_moe": _given(layer_types=8 * [*3 * ["conv"], "full_attention"]),
    "granitemoehybrid": _given(layer_types=8 * [*3 * ["mamba"], "attention"]),
    "diffusion_gemma": _given(
        text_config={"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    ),
    "deepseek_ocr2": _given(
        text_config={"mlp_layer_types": ["dense", *31 * ["sparse"]], "num_experts_per_tok": 6},
        vision_config={
            "encoder_config": {
                "hidden_size": 896,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
            }
        },
    ),
    "granite4_vision": _given(
        vision_config={"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16},
        image_grid_pinpoints=[[384, 384], [384, 768]],
        deepstack_layer_map=[(-2, 0), (-4, 8)],
        downsample_rate="4/8",
        vision_feature_select_strategy="full",
    ),
    "chameleon": _chameleon,
    "t5gemma2_encoder": _given(text_config={"dropout_rate": 0.0}, vision_config=_SIGLIP),
    "perception_lm": _given(vision_config=_PERCEPTION),
    "qwen4_exp_text": _given(**_QSA),
    "qwen4_exp": _given(text_config=_QSA),
    "causal-lm.reformer": _given(is_decoder=True),
    "xmod": _given(default_language="en_XX"),
}
