"""What else a config field may say: found in the class's own sources, in its type, by its name."""

from __future__ import annotations

import inspect
import re
import sys
from random import Random
from typing import Any

ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "leaky_relu",
    "mish",
    "prelu",
    "quick_gelu",
    "relu",
    "relu2",
    "sigmoid",
    "silu",
    "tanh",
)
LEFT_ALONE = re.compile(
    r"^_|architectures|model_type|dtype|transformers_version|id2label|label2id|use_cache|output_|"
    r"return_|problem_type|initializer|init_|dropout|drop_|pdrop|_eps$|eps_|epsilon|summary|chunk_size|token|task|torch|"
    r"pruned_heads|name_or_path|_cls$|vocabulary|attn_implementation|jitter|gradient|backbone|"
    r"num_return|beam|_loss|loss_|layerdrop|noise|rescale_prenorm|is_encoder_decoder"
)
"""Fields that set nothing of a model that computes, or name what is outside of it."""
_HEADS = re.compile(r"heads?$|^n_head|num_.*head")
_HEAD_DIM = re.compile(r"head_dim|head_size|d_kv|_head_width")
_LAYERS = re.compile(r"layers?$|^n_layer|depth$|num_.*blocks?$|num_hidden_layers|num_.*stages?$")
_EXPERTS = re.compile(r"expert|top_?k|moe_k")
_NUMBERED = re.compile(r"vocab|position|image_size|patch|channels|stride|kernel|type_vocab")
_UNSET: dict[str, tuple[Any, ...]] = {
    "head_dim": (8, 10, 16, 24),
    "num_key_value_heads": (1, 2, 4),
    "sliding_window": (4, 7),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 500.0},),
    "n_inner": (40, 72, 90),
    "q_lora_rank": (12, 20),
    "embedding_size": (24, 40),
}


def other_values(rng: Random, key: str, value: Any, config: Any) -> list[Any]:
    """Other values of a field, in a random order; none where it is to be left alone.

    Args:
        rng: decides.
        key: the field's name.
        value: what it says.
        config: the config that it stands in.
    """
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return _drawn(rng, _UNSET.get(key, ()), 1)
    if isinstance(value, int):
        return _numbers(rng, key, value)
    if isinstance(value, float):
        return [value * rng.choice((0.5, 0.75, 1.5, 2.0))] if value else []
    if isinstance(value, str):
        return _drawn(rng, set(_words(key, config)) - {value}, 2)
    if isinstance(value, list) and value:
        return _lists(rng, key, value, config)
    if isinstance(value, dict) and "rope_type" in value:
        return [_rope(rng, value)]
    return []


def is_depth(key: str, value: Any) -> bool:
    """Whether a field counts layers."""
    return type(value) is int and 0 < value < 64 and bool(_LAYERS.search(key))


def _drawn(rng: Random, values: Any, most: int) -> list[Any]:
    values = sorted(values, key=str)
    return rng.sample(values, min(most, len(values)))


def _numbers(rng: Random, key: str, value: int) -> list[Any]:
    if _HEAD_DIM.search(key):
        return _drawn(rng, {6, 8, 10, 12, 16, 20, 24, 32} - {value}, 3)
    if _HEADS.search(key):
        return [*_drawn(rng, {2, 3, 4, 6, 8} - {value}, 4), 1]
    if _EXPERTS.search(key):
        return _drawn(rng, {1, 2, 3, 4, 6} - {value}, 2) if value < 16 else []
    if _NUMBERED.search(key) or value < 2:
        return []
    if value < 8:
        return _drawn(rng, {1, 2, 3, 4, 5, 6} - {value}, 2)
    multiples = {value * n // 2 for n in (3, 4, 5, 6, 8)} - {value}
    odd = {n for n in (rng.randint(18, 64) for _ in range(4)) if n > value // 2}
    return [n for n in _drawn(rng, multiples, 2) + _drawn(rng, odd, 2) if n <= 192]


def _lists(rng: Random, key: str, value: list[Any], config: Any) -> list[Any]:
    """The entries in another order, drawn anew, or one of them another."""
    found: list[Any] = []
    words = set(value) if all(isinstance(one, str) for one in value) else set()
    if words:
        choices = sorted(words | set(_words(key, config)) if rng.random() < 0.5 else words)
        found.append([rng.choice(choices) for _ in value])
    if all(type(one) is int for one in value):
        if set(value) <= {0, 1}:
            found.append([rng.randint(0, 1) for _ in value])
        elif max(value) >= 8 or _HEADS.search(key) or _LAYERS.search(key):
            place = rng.randrange(len(value))
            for other in _numbers(rng, key.rstrip("s"), value[place])[:2]:
                found.append([*value[:place], other, *value[place + 1 :]])
    found.append(rng.sample(value, len(value)))
    return [one for one in found if one != value]


def _rope(rng: Random, value: dict[str, Any]) -> dict[str, Any]:
    """Other rotary embeddings; a section or a share of the head stays as it is, or is drawn."""
    kept = {k: v for k, v in value.items() if k in ("partial_rotary_factor", "mrope_section")}
    kept["rope_theta"] = rng.choice((100.0, 10000.0, 500000.0))
    if rng.random() < 0.4 and "mrope_section" not in kept:
        kept["partial_rotary_factor"] = rng.choice((0.25, 0.5, 1.0))
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ]
    return {**rng.choice(kinds), **kept}


def _words(key: str, config: Any) -> list[str]:
    """What a field of text may say: activations, or the words that the class compares it with."""
    if re.search(r"act$|activation|hidden_act|act_fn|nonlinearity", key):
        return list(ACTIVATIONS)
    found: set[str] = set()
    name = re.escape(key)
    compared = rf"\b{name}\b[^\n]*?(?:==|!=| in |Literal\[)([^\n]*)"
    documented = rf"^ *{name} \(`(?:.(?!\n *\w+ \(`))*"
    for text in _sources(type(config)):
        for said in re.findall(compared, text):
            found |= set(re.findall(r"\"([a-z][\w-]*)\"", said))
        for said in re.findall(documented, text, re.M | re.S):
            found |= set(re.findall(r"`\"([a-z][\w-]*)\"`", said))
    return sorted(found)


def _sources(config_class: type) -> list[str]:
    """The class's own configuration file and the modelling file beside it."""
    name = config_class.__module__
    modules = (name, name.replace(".configuration_", ".modeling_"))
    return [inspect.getsource(sys.modules[one]) for one in modules if one in sys.modules]
