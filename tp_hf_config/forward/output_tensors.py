"""Run a model and collect the tensors in its outputs.

Some methods of a class use parts that its forward pass does not: text that attends to an image
(BLIP's ``get_multimodal_features``), projected features (FLAVA), contacts of a protein (ESM). Their
results count as outputs.
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
# of methods that return something and change nothing
_PREFIXES = ("get_", "predict_", "encode", "decode", "compute_")
_MASKED = 1e30  # larger scores are masked; beside them every difference would vanish


def outputs_of(model: nn.Module, inputs: Inputs, recipe: RunRecipe = PLAIN) -> Any:
    """Outputs of the forward pass, in a list with those of the recipe's methods, if any."""
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
    """Restore tensors that modules keep as attributes, in dictionaries or as buffers.

    LeViT keeps its attention biases between passes, Mimi its codebooks, RecurrentGemma its states.
    With other weights, the next pass would use the old tensors. Torch's modules keep none.
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
    """Dictionaries of a module that may get tensors; the first holds its attributes."""
    own = [value for key, value in attributes.items() if type(value) is dict and is_own(key)]
    return [attributes, attributes["_buffers"], *own]


def methods_beside(model: nn.Module, inputs: Inputs) -> Iterator[str]:
    for name, _ in inspect.getmembers(type(model), inspect.isfunction):
        own = not any(hasattr(base, name) for base in (PreTrainedModel, GenerationMixin))
        may_return = own and name.startswith(_PREFIXES)
        if may_return and _arguments(model, getattr(model, name), inputs) is not None:
            yield name


def _arguments(
    model: nn.Module, method: Callable[..., Any], inputs: Inputs
) -> dict[str, Any] | None:
    """The inputs that a method takes; ``None`` if it takes none, or needs others.

    A required first parameter with an unknown name gets the main input (ESM's tokens). A required
    ``attention_mask`` masks nothing.
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
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def unmasked(scores: Tensor) -> Tensor:
    """Set masked scores to 0, so that all scores of a removed head are 0."""
    masked = scores.detach().abs() > _MASKED
    return scores.masked_fill(masked, 0.0) if bool(masked.any()) else scores


def largest_in(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.numel():
        return 0.0
    values = tensor.detach()
    least, most = torch.aminmax(values.abs() if values.is_complex() else values)
    return max(-float(least), float(most))


def largest_by_name(tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
    return {name: largest_in(one) for name, one in tensors.items()}
