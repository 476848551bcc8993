"""Run the methods of a class that use parts of it which its forward pass leaves out.

Text that looks at an image (BLIP's ``get_multimodal_features``), features behind a projection
(FLAVA), contacts of a protein (ESM): a class has weights for them that no input of the forward pass
reaches. What these methods compute counts as outputs of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from .run_recipe import PLAIN, RunRecipe

Inputs = Mapping[str, Any]
_GIVING = ("get_", "predict_", "encode", "decode", "compute_")
"""Prefixes of methods that return something and change nothing."""


def outputs_of(model: nn.Module, inputs: Inputs, recipe: RunRecipe = PLAIN) -> Any:
    """Return the forward pass's outputs; if methods are run too, a list with theirs behind."""
    outputs = model(**inputs)
    beside = []
    for name in recipe.methods:
        method = getattr(model, name)
        given = _arguments(model, method, inputs)
        if given is not None:
            beside.append(method(**given))
    return [outputs, *beside] if beside else outputs


def methods_beside(model: nn.Module, inputs: Inputs) -> Iterator[str]:
    """Yield the class's own methods, not those that all models have, which take these inputs."""
    for name, _ in inspect.getmembers(type(model), inspect.isfunction):
        own = not any(hasattr(base, name) for base in (PreTrainedModel, GenerationMixin))
        gives = own and name.startswith(_GIVING)
        if gives and _arguments(model, getattr(model, name), inputs) is not None:
            yield name


def _arguments(
    model: nn.Module, method: Callable[..., Any], inputs: Inputs
) -> dict[str, Any] | None:
    """Return the inputs that a method takes, or None if it takes none or needs others too.

    A required first parameter that has another name than all inputs gets the main input (ESM's
    tokens). A required ``attention_mask`` masks no token.
    """
    named = inspect.signature(method).parameters.values()
    given = {
        parameter.name: inputs[parameter.name] for parameter in named if parameter.name in inputs
    }
    needed = [
        parameter.name
        for parameter in named
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    main = inputs.get(getattr(model, "main_input_name", ""))
    for place, name in enumerate(needed):
        if name in given or not isinstance(main, Tensor):
            continue
        if name == "attention_mask":
            given[name] = torch.ones_like(main)
        elif place == 0:
            given[name] = main
    tensors = any(isinstance(value, Tensor) for value in given.values())
    return given if tensors and given.keys() >= {*needed} else None
