"""Tiny random models with as many attention heads as are asked for: two layers, head dim 8.

Every parameter is random (``tiny.randomise``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tiny
import transformers as hf

VOCAB = 99
HEAD_DIM = 8
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Shape(NamedTuple):
    """Query heads, and key/value heads where a class has its own number of them."""

    queries: int
    groups: int | None = None

    def __str__(self) -> str:
        return f"{self.queries}" if self.groups is None else f"{self.queries}/{self.groups}"


SHAPES = tuple(Shape(*pair) for pair in ((9, 3), (8, 2), (8, 1), (24, 8), (32, 8), (14, 2)))
PLAIN = tuple(Shape(queries) for queries in (9, 8, 24, 32, 14))


def _text(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HEAD_DIM * shape.queries,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": shape.queries,
        "max_position_embeddings": 32,
        **_TOKENS,
    }


def _grouped(shape: Shape) -> dict[str, Any]:
    return {**_text(shape), "num_key_value_heads": shape.groups, "tie_word_embeddings": False}


def _narrow(shape: Shape) -> dict[str, Any]:
    """The head dim is said: the hidden size need not be that of all heads together."""
    return {**_grouped(shape), "hidden_size": 2 * shape.queries, "head_dim": HEAD_DIM}


def _falcon(shape: Shape, **kind: Any) -> Any:
    config = {**_text(shape), "ffn_hidden_size": 48, **kind}
    return hf.FalconForCausalLM, hf.FalconConfig(**config)


_Made = tuple[type[hf.PreTrainedModel], hf.PretrainedConfig]
GROUPED: dict[str, Callable[[Shape], _Made]] = {
    "llama": lambda s: (hf.LlamaForCausalLM, hf.LlamaConfig(**_narrow(s))),
    "qwen2": lambda s: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_grouped(s))),
    "qwen3": lambda s: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_narrow(s))),
    "mistral": lambda s: (hf.MistralForCausalLM, hf.MistralConfig(**_narrow(s))),
    "gemma2": lambda s: (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**_narrow(s) | {"tie_word_embeddings": True}, sliding_window=4),
    ),
    "gemma3": lambda s: (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**_narrow(s) | {"tie_word_embeddings": True}, sliding_window=4),
    ),
    "phi3": lambda s: (hf.Phi3ForCausalLM, hf.Phi3Config(**_grouped(s))),
    "falcon_new": lambda s: _falcon(s, new_decoder_architecture=True, num_kv_heads=s.groups),
}
ALONE: dict[str, Callable[[Shape], _Made]] = {
    "gpt_neox": lambda s: (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_text(s))),
    "falcon_multi_query": lambda s: _falcon(s, multi_query=True),
    "falcon_alibi": lambda s: _falcon(s, multi_query=False, alibi=True),
    "bloom": lambda s: (
        hf.BloomForCausalLM,
        hf.BloomConfig(
            vocab_size=VOCAB,
            hidden_size=HEAD_DIM * s.queries,
            n_layer=2,
            n_head=s.queries,
            **_TOKENS,
        ),
    ),
    "gpt2": lambda s: (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=VOCAB,
            n_embd=HEAD_DIM * s.queries,
            n_layer=2,
            n_head=s.queries,
            n_inner=48,
            n_positions=32,
            **_TOKENS,
        ),
    ),
    "opt": lambda s: (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HEAD_DIM * s.queries,
            word_embed_proj_dim=44,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=s.queries,
            max_position_embeddings=32,
            **_TOKENS,
        ),
    ),
    "bert": lambda s: (
        hf.BertForSequenceClassification,
        hf.BertConfig(**_text(s), num_labels=5),
    ),
    "vit": lambda s: (
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=HEAD_DIM * s.queries,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=s.queries,
            image_size=32,
            patch_size=8,
            num_labels=5,
        ),
    ),
    "t5": lambda s: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_ff=48,
            d_kv=HEAD_DIM,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=s.queries,
            decoder_start_token_id=0,
        ),
    ),
    "whisper": lambda s: (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            vocab_size=VOCAB,
            d_model=HEAD_DIM * s.queries,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=40,
            encoder_attention_heads=s.queries,
            decoder_attention_heads=s.queries,
            num_mel_bins=20,
            max_source_positions=16,
            max_target_positions=32,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            decoder_start_token_id=2,
            **_TOKENS,
        ),
    ),
}
OTHERS: dict[str, Callable[[Shape], _Made]] = {
    "olmo2": lambda s: (hf.Olmo2ForCausalLM, hf.Olmo2Config(**_grouped(s))),
    "siglip_vision": lambda s: (
        hf.SiglipVisionModel,
        hf.SiglipVisionConfig(
            hidden_size=HEAD_DIM * s.queries,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=s.queries,
            image_size=32,
            patch_size=8,
        ),
    ),
}


def build(name: str, shape: Shape) -> hf.PreTrainedModel:
    """A random model in eval mode; the same name and shape give the same weights."""
    cls, config = (GROUPED | ALONE | OTHERS)[name](shape)
    model = cls(config)
    tiny.randomise(model)
    return model.eval()
