"""Run a model and take the tensors out of what it returns.

Some methods of a class use parts of it that its forward pass leaves out: text that looks at an
image (BLIP's ``get_multimodal_features``), features behind a projection (FLAVA), contacts of a
protein (ESM). What these methods compute counts as outputs of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from ..model.config_json import is_own
from .run_recipe import PLAIN, RunRecipe

Inputs = Mapping[str, Any]
_PREFIXES = ("get_", "predict_", "encode", "decode", "compute_")
"""Prefixes of methods that return something and change nothing."""
_MASKED = 1e30
"""A larger score marks what is masked; beside it every difference would vanish."""


def outputs_of(model: nn.Module, inputs: Inputs, recipe: RunRecipe = PLAIN) -> Any:
    """Return the forward pass's outputs; with methods in the recipe, a list that adds theirs.

    The model keeps nothing that the pass computed.
    """
    with _tensors_put_back(model):
        outputs = model(**inputs)
        method_outputs = []
        for name in recipe.methods:
            method = getattr(model, name)
            arguments = _arguments(model, method, inputs)
            if arguments is not None:
                method_outputs.append(method(**arguments))
    return [outputs, *method_outputs] if method_outputs else outputs


@contextmanager
def _tensors_put_back(model: nn.Module) -> Iterator[None]:
    """While open, modules may keep tensors that they compute; then they get back what they had.

    LeViT's attention keeps its biases from one pass to the next, Mimi its codebooks, RecurrentGemma
    its states. With other weights, the next pass would compute with the tensors of the old ones.
    They are among a module's own attributes, in dictionaries of its own, and buffers. Torch's
    modules keep none.
    """
    before = [
        (holder, dict(holder))
        for module in model.modules()
        if not type(module).__module__.startswith("torch.nn.")
        for holder in _holders(vars(module))
    ]
    try:
        yield
    finally:
        for holder, had in before:
            for key in holder.keys() | had.keys():
                value, old = holder.get(key), had.get(key)
                if value is old or not (isinstance(value, Tensor) or isinstance(old, Tensor)):
                    continue
                if key in had:
                    holder[key] = old
                else:
                    del holder[key]


def _holders(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the dictionaries of a module that may get tensors; the first is its attributes."""
    own = [value for key, value in attributes.items() if type(value) is dict and is_own(key)]
    return [attributes, attributes["_buffers"], *own]


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


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a model's output, however it is nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def unmasked(scores: Tensor) -> Tensor:
    """Return scores with 0 for masked ones.

    A head that is masked as a whole leaves nothing but zeros, as it does where no score is masked.
    """
    masked = scores.detach().abs() > _MASKED
    return scores.masked_fill(masked, 0.0) if bool(masked.any()) else scores


def largest_in(tensor: Tensor | None) -> float:
    """Return the largest absolute value of a tensor; 0 if there is none."""
    if tensor is None or not tensor.numel():
        return 0.0
    values = tensor.detach()
    least, most = torch.aminmax(values.abs() if values.is_complex() else values)
    return max(-float(least), float(most))


def largest_by_name(tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Return the largest absolute value of each tensor; 0: there is none."""
    return {name: largest_in(one) for name, one in tensors.items()}
