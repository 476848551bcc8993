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

from .kept_tensors import tensors_put_back
from .run_recipe import PLAIN, RunRecipe

Inputs = Mapping[str, Any]
_PREFIXES = ("get_", "predict_", "encode", "decode", "compute_")
"""Prefixes of methods that return something and change nothing."""


def outputs_of(model: nn.Module, inputs: Inputs, recipe: RunRecipe = PLAIN) -> Any:
    """Return the forward pass's outputs; with methods in the recipe, a list that adds theirs.

    The model keeps nothing that the pass computed.
    """
    with tensors_put_back(model):
        outputs = model(**inputs)
        method_outputs = []
        for name in recipe.methods:
            method = getattr(model, name)
            arguments = _arguments(model, method, inputs)
            if arguments is not None:
                method_outputs.append(method(**arguments))
    return [outputs, *method_outputs] if method_outputs else outputs


def methods_beside(model: nn.Module, inputs: Inputs) -> Iterator[str]:
    """Yield the names of the methods, other than those of all models, that take these inputs."""
    for name, _ in inspect.getmembers(type(model), inspect.isfunction):
        own = not any(hasattr(base, name) for base in (PreTrainedModel, GenerationMixin))
        may_return = own and name.startswith(_PREFIXES)
        if may_return and _arguments(model, getattr(model, name), inputs) is not None:
            yield name


def _arguments(
    model: nn.Module, method: Callable[..., Any], inputs: Inputs
) -> dict[str, Any] | None:
    """Return the inputs that a method takes, or None if it takes none or needs others too.

    A required first parameter that has another name than all inputs gets the main input (ESM's
    tokens). A required ``attention_mask`` masks no token.
    """
    named = inspect.signature(method).parameters.values()
    arguments = {
        parameter.name: inputs[parameter.name] for parameter in named if parameter.name in inputs
    }
    needed = [
        parameter.name
        for parameter in named
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    main = inputs.get(getattr(model, "main_input_name", ""))
    for position, name in enumerate(needed):
        if name in arguments or not isinstance(main, Tensor):
            continue
        if name == "attention_mask":
            arguments[name] = torch.ones_like(main)
        elif position == 0:
            arguments[name] = main
    tensors = any(isinstance(value, Tensor) for value in arguments.values())
    return arguments if tensors and arguments.keys() >= {*needed} else None
