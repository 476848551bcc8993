"""Make optional arguments of a forward pass without which parts of a model do not run.

Examples are global attention for some tokens, entities beside the words, a voice before the text: a
class has weights for them that no other input reaches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .input_shapes import size_of

Inputs = Mapping[str, Any]
_MakeOptional = Callable[[nn.Module, Inputs], dict[str, Any]]
"""Returns the arguments to add, from a model and its other inputs."""


def optional_arguments(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return the names of the optional arguments that a class takes beside these inputs."""
    parameters = inspect.signature(model.forward).parameters
    return [
        name
        for name, (companions, _) in _OPTIONAL.items()
        if name in parameters and name not in inputs and inputs.keys() & set(companions)
    ]


def with_optional(model: nn.Module, inputs: Inputs, argument: str) -> dict[str, Any]:
    """Return the inputs with one optional argument more, and with what goes beside it."""
    return {**inputs, **_OPTIONAL[argument][1](model, inputs)}


def _first_token(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return a mask that makes the attention of the first token global."""
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, 0] = 1
    return {"global_attention_mask": mask}


def _entities(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return two entities: one of two words and one of a single word."""
    ids = inputs["input_ids"]
    count = max(2, size_of(model.config, "entity_vocab_size"))
    places = torch.tensor([[0, 1], [2, -1]], device=ids.device)
    return {
        "entity_ids": (torch.arange(1, 3, device=ids.device) % count).repeat(len(ids), 1),
        "entity_position_ids": places.repeat(len(ids), 1, 1),
    }


def _half_image(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return token types, half text and half image: each kind has experts of its own."""
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[:, : kinds.shape[1] // 2] = 1
    return {"moe_mm_token_type_ids": kinds}


def _hidden_steps(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return a mask that hides the first two steps of the sound from the model."""
    if "input_features" in inputs:
        steps = inputs["input_features"].shape[1]
    else:
        lengths = getattr(model, "_get_feat_extract_output_lengths", int)
        steps = int(lengths(inputs["input_values"].shape[-1]))
    samples = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
    return {"mask_time_indices": (torch.arange(steps) < 2).repeat(samples, 1)}


def _behind(config: Any, ids: Tensor, name: str, count: int) -> Tensor:
    """Return the text, special tokens made plain, behind ``count`` tokens of this name."""
    special = {
        value
        for key, value in vars(config).items()
        if key.endswith("token_id") and isinstance(value, int)
    }
    plain = next(token for token in range(len(special) + 1) if token not in special)
    text = ids.masked_fill(torch.isin(ids, torch.tensor(sorted(special), device=ids.device)), plain)
    return torch.cat([torch.full_like(ids[:, :count], getattr(config, name, 0)), text], dim=1)


def _voice(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return two steps of a voice, and the text behind their tokens."""
    config, ids = model.config, inputs["input_ids"]
    width = size_of(config, "audio_prompt_dim", "latent_dim")
    parameter = next(model.parameters())
    voice = torch.rand((len(ids), 2, width), device=ids.device, dtype=parameter.dtype)
    text = _behind(config, ids, "audio_prompt_token_id", 2)
    return {"input_ids": text, "audio_prompt_latents": voice}


def _codes(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return two steps of sound in codebooks, and the text behind their tokens."""
    config, ids = model.config, inputs["input_ids"]
    codes = torch.ones_like(ids[:, :2])[..., None].repeat(1, 1, size_of(config, "num_codebooks"))
    return {"input_ids": _behind(config, ids, "audio_token_id", 2), "audio_input_ids": codes}


_TEXT = ("input_ids",)
_SOUND = ("input_values", "input_features")
_OPTIONAL: dict[str, tuple[tuple[str, ...], _MakeOptional]] = {
    "global_attention_mask": (_TEXT, _first_token),
    "entity_ids": (_TEXT, _entities),
    "moe_mm_token_type_ids": (_TEXT, _half_image),
    "audio_prompt_latents": (_TEXT, _voice),
    "audio_input_ids": (_TEXT, _codes),
    "mask_time_indices": (_SOUND, _hidden_steps),
}
"""Argument -> the inputs it goes beside (any one of them), and the function that makes it."""
