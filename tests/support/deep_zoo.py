"""Models of four layers, and an original of which some layers pass on what they are given."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import layer_zoo
import tiny
import torch
import transformers as hf
import zoo

DEPTH = 4
_COUNTS = (
    *("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"),
    *("n_layer", "depth"),
)
_MORE: dict[str, dict[str, Any]] = {  # what the classes of two layers do not say
    "gemma3": {"layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 0, 1]},
    "qwen3_moe": {"mlp_only_layers": [0, 2]},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "swin": {"depths": [2, DEPTH]},
    "t5": {"num_layers": 6},  # with fewer than the decoder has, its cache is too short
}
_OF_TWO = ("layer_types", "out_features", "out_indices", "stage_names")
"""Lists that the config classes have made for two layers."""


def _deeper(config: hf.PretrainedConfig, more: dict[str, Any]) -> hf.PretrainedConfig:
    """The config with four layers for two."""
    values = {key: value for key, value in config.to_dict().items() if key not in _OF_TWO}
    values |= {key: DEPTH for key in _COUNTS if values.get(key) == 2}
    for key, value in values.items():
        if key.endswith("_config") and isinstance(value, dict):
            values[key] = _deeper(getattr(config, key), {}).to_dict()
    return type(config).from_dict({**values, **more})


def build(name: str, **changes: Any) -> Any:
    """A random model of four layers (in every list of layers), in eval mode."""
    cls, config = {**zoo._MODELS, **layer_zoo._MORE}[name]()
    model = cls(_deeper(config, {**_MORE.get(name, {}), **changes}))
    tiny.randomise(model, 0)
    return model.eval()


def passing_on(model: Any, layers: str, dropped: Sequence[int]) -> Any:
    """A copy in which some layers give out the hidden states that they are given."""
    original = copy.deepcopy(model)
    for number in dropped:
        _pass_on(original.get_submodule(layers)[number])
    return original


def _pass_on(layer: Any) -> None:
    computed = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        output = computed(*args, **kwargs)
        return given if isinstance(output, torch.Tensor) else (given, *output[1:])

    layer.forward = forward
