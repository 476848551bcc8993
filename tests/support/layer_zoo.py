"""Classes whose layers may differ: the zoo's, and five more; and what stands in their layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tiny
import transformers as hf
import zoo

from tp_hf_config.model.config_json import config_nodes
from tp_hf_config.model.layer_entries import entries_of, entries_supported

ENTRIES = entries_supported()
_MORE: dict[str, Any] = {
    "mistral": lambda: (
        hf.MistralForCausalLM,
        hf.MistralConfig(**zoo._GQA, head_dim=12, sliding_window=4),
    ),
    "smollm3": lambda: (hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**zoo._GQA, no_rope_layers=[1, 0])),
    "olmo2": lambda: (hf.Olmo2ForCausalLM, hf.Olmo2Config(**zoo._GQA)),
    "glm4": lambda: (hf.Glm4ForCausalLM, hf.Glm4Config(**zoo._GQA, head_dim=12)),
    "dinov2": lambda: (
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config(**zoo._VISION, num_labels=5, mlp_ratio=4),
    ),
}
# Class -> the fields to prune, as they are called for all layers.
FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "smollm3", "olmo2", "gemma2", "gemma3", "phi3"),
        ("intermediate_size", "num_attention_heads"),
    ),
    "glm4": ("intermediate_size", "num_attention_heads"),
    "gpt_oss": ("intermediate_size", "num_attention_heads", "num_local_experts"),
    "mixtral": ("intermediate_size", "num_attention_heads", "num_local_experts"),
    "qwen3_moe": ("intermediate_size", "moe_intermediate_size", "num_attention_heads"),
    "deepseek_v3": ("intermediate_size", "q_lora_rank", "kv_lora_rank"),
    "bert": ("intermediate_size",),
    "modernbert": ("intermediate_size",),
    "t5": ("d_ff",),
    "bart": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "whisper": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "vit": ("intermediate_size", "num_attention_heads"),
    "dinov2": ("mlp_ratio",),
    "qwen2_vl": ("text_config.intermediate_size",),
    "wav2vec2": ("intermediate_size",),
    "gpt2": ("n_inner",),
}
# (class, way) -> a part of the reason for which it is refused.
REFUSED = dict.fromkeys(
    [("t5", "global"), ("t5", "isomorphic")],
    r"the 2 groups of per_layer_config\.0\.d_ff, .* one config field cannot describe that",
)
NO_STATIC_CACHE: tuple[str, ...] = ()


def build(name: str) -> Any:
    """A random model in eval mode."""
    if name not in _MORE:
        return zoo.build(name)
    cls, config = _MORE[name]()
    model = cls(config)
    tiny.randomise(model, 0)
    return model.eval()


def widths(model: Any, fields: Iterable[str]) -> dict[str, list[int]]:
    """Field -> its value in each layer."""
    found: dict[str, list[int]] = {}
    for path, config in config_nodes(model.config):
        for field in fields:
            *outer, key = field.split(".")
            if tuple(outer) == path:
                layers = range(config.num_hidden_layers)
                found[field] = [getattr(config.per_layer_config[n], key) for n in layers]
    return found


def has_entries(model: Any) -> bool:
    """Whether some layer of a model has an entry of its own."""
    return any(entries_of(config) for _, config in config_nodes(model.config))
