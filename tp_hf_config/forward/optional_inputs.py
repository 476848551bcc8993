"""Make optional arguments of a forward pass without which parts of a model do not run.

Examples are global attention for some tokens, entities beside the words, steps of a sound that are
hidden: a class has weights for them that no other input reaches.
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


_TEXT = ("input_ids",)
_SOUND = ("input_values", "input_features")
_OPTIONAL: dict[str, tuple[tuple[str, ...], _MakeOptional]] = {
    "global_attention_mask": (_TEXT, _first_token),
    "entity_ids": (_TEXT, _entities),
    "moe_mm_token_type_ids": (_TEXT, _half_image),
    "mask_time_indices": (_SOUND, _hidden_steps),
}
"""Argument -> the inputs it goes beside (any one of them), and the function that makes it."""
