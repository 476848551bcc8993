"""Thirty tiny random models: two layers or stages, small widths that differ where the class allows.

Every parameter is random (``tiny.randomise``).
"""

from __future__ import annotations

from collections.abc import Callable

import small
import tiny
import torch
import transformers as hf

VOCAB = 99
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False, **_TOKENS}
_GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    **_TOKENS,
    "decoder_start_token_id": 2,
}
_FLOAT32 = {"dtype": "float32"}  # what Transformers writes into nested configs at a reload
_ROPE = "rope_parameters" if small.TRANSFORMERS >= (5,) else "rope_scaling"
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}

_Made = tuple[type[hf.PreTrainedModel], hf.PretrainedConfig]
_MODELS: dict[str, Callable[[], _Made]] = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**_GQA)),
    "qwen2": lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_GQA)),
    "qwen3": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_GQA, head_dim=12)),
    "gemma2": lambda: (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**{**_GQA, "tie_word_embeddings": True}, head_dim=12, sliding_window=4),
    ),
    "gemma3": lambda: (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**{**_GQA, "tie_word_embeddings": True}, head_dim=12, sliding_window=4),
    ),
    "phi3": lambda: (hf.Phi3ForCausalLM, hf.Phi3Config(**_GQA)),
    "gpt2": lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(**_GPT, n_inner=96, **_TOKENS)),
    "gpt_neox": lambda: (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_TEXT, **_TOKENS)),
    "bloom": lambda: (
        hf.BloomForCausalLM,
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, **_TOKENS),
    ),
    "falcon": lambda: (
        hf.FalconForCausalLM,
        hf.FalconConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_hidden_size=96,
            **_TOKENS,
        ),
    ),
    "opt": lambda: (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            word_embed_proj_dim=48,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            **_TOKENS,
        ),
    ),
    "mixtral": lambda: (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**_GQA, num_local_experts=4, **_EXPERTS),
    ),
    "qwen3_moe": lambda: (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(
            **_GQA,
            head_dim=12,
            moe_intermediate_size=40,
            num_experts=4,
            mlp_only_layers=[0],
            **_EXPERTS,
        ),
    ),
    "gpt_oss": lambda: (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(**_GQA, head_dim=12, num_local_experts=4, sliding_window=4, **_EXPERTS),
    ),
    "deepseek_v3": lambda: (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            **{**_GQA, "num_key_value_heads": 4},
            moe_intermediate_size=40,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=24,
            kv_lora_rank=20,
            qk_nope_head_dim=12,
            qk_rope_head_dim=8,
            v_head_dim=10,
        ),
    ),
    "mamba2": lambda: (
        hf.Mamba2ForCausalLM,
        hf.Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            expand=2,
            head_dim=16,
            num_heads=4,
            n_groups=2,
            state_size=12,
            chunk_size=4,
            **_TOKENS,
        ),
    ),
    "bert": lambda: (hf.BertForSequenceClassification, hf.BertConfig(**_TEXT, num_labels=5)),
    "distilbert": lambda: (
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(
            vocab_size=VOCAB,
            dim=64,
            hidden_dim=96,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            num_labels=5,
        ),
    ),
    "deberta_v2": lambda: (
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config(
            **_TEXT,
            num_labels=5,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            position_biased_input=False,
            norm_rel_ebd="layer_norm",
        ),
    ),
    "modernbert": lambda: (
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig(
            **_TEXT, num_labels=5, local_attention=4, **_TOKENS, cls_token_id=1, sep_token_id=2
        ),
    ),
    "t5": lambda: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCAB,
            d_model=64,
            d_ff=96,
            d_kv=12,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
    "bart": lambda: (
        hf.BartForConditionalGeneration,
        hf.BartConfig(**_BART, max_position_embeddings=64, forced_eos_token_id=2),
    ),
    "whisper": lambda: (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **_BART,
            num_mel_bins=20,
            max_source_positions=16,
            max_target_positions=32,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
    ),
    "vit": lambda: (hf.ViTForImageClassification, hf.ViTConfig(**_VISION, num_labels=5)),
    "swin": lambda: (
        hf.SwinForImageClassification,
        hf.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
            num_labels=5,
        ),
    ),
    "convnext": lambda: (
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig(
            image_size=32, num_stages=2, hidden_sizes=[16, 24], depths=[2, 2], num_labels=5
        ),
    ),
    # timm's: what sets the widths is no part of the config, but stands behind the name
    "timm_vit": lambda: (
        hf.TimmWrapperForImageClassification,
        hf.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224",
            model_args={"depth": 2, "img_size": 32, "patch_size": 8, "num_heads": 4},
            num_labels=5,
        ),
    ),
    "timm_convnext": lambda: (
        hf.TimmWrapperForImageClassification,
        hf.TimmWrapperConfig(
            architecture="test_convnext", model_args={"depths": [2, 1, 1, 1]}, num_labels=5
        ),
    ),
    "clip": lambda: (
        hf.CLIPModel,
        hf.CLIPConfig(
            text_config={**_TEXT, "hidden_size": 48, **_TOKENS, **_FLOAT32},
            vision_config={**_VISION, **_FLOAT32},
            projection_dim=40,
        ),
    ),
    "siglip": lambda: (
        hf.SiglipModel,
        hf.SiglipConfig(
            text_config={**_TEXT, "projection_size": 64, **_TOKENS, **_FLOAT32},
            vision_config={**_VISION, **_FLOAT32},
        ),
    ),
    "wav2vec2": lambda: (
        hf.Wav2Vec2ForCTC,
        hf.Wav2Vec2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            conv_dim=[24, 32],
            conv_stride=[5, 4],
            conv_kernel=[10, 8],
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            **_TOKENS,
        ),
    ),
    "qwen2_vl": lambda: (
        hf.Qwen2VLForConditionalGeneration,
        hf.Qwen2VLConfig(
            text_config={
                **_GQA,
                **_FLOAT32,
                _ROPE: {
                    "rope_type": "default",
                    "mrope_section": [2, 3, 3],
                    "rope_theta": 10000.0,
                },
            },
            vision_config={
                **_FLOAT32,
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
            },
            tie_word_embeddings=False,
            image_token_id=90,
            video_token_id=91,
            vision_start_token_id=92,
            vision_end_token_id=93,
        ),
    ),
}

NAMES = tuple(_MODELS)


def build(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random model in eval mode; the same name and seed give the same weights."""
    cls, config = _MODELS[name]()
    model = cls(config)
    tiny.randomise(model, seed)
    return model.eval()


def inputs(model: hf.PreTrainedModel, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of two; other inputs than those that the library experiments with."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, 80, (2, length), generator=generator)

    kind = model.config.model_type
    if kind == "wav2vec2":
        return {"input_values": rand(2, 1200)}
    if kind == "whisper":
        return {"input_features": rand(2, 20, 32), "decoder_input_ids": ids(5)}
    if kind in ("clip", "siglip"):
        return {"input_ids": ids(7), "pixel_values": rand(2, 3, 32, 32)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": rand(2, 3, 32, 32)}
    if model.config.is_encoder_decoder:
        return {"input_ids": ids(7), "decoder_input_ids": ids(5)}
    if kind == "qwen2_vl":  # 4 x 4 patches, merged to 2 x 2: four image tokens in each sample
        tokens = ids(9)
        tokens[:, 1], tokens[:, 2:6], tokens[:, 6] = 92, 90, 93
        return {
            "input_ids": tokens,
            "pixel_values": rand(2 * 16, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            **({"mm_token_type_ids": (tokens == 90).int()} if small.TRANSFORMERS >= (5,) else {}),
        }
    return {"input_ids": ids(7)}
