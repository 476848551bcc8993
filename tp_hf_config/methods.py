"""Methods of a class that run parts of it which its forward pass leaves out.

Text that looks at an image (BLIP's ``get_multimodal_features``), features behind a projection
(FLAVA), contacts of a protein (ESM): a class has weights for them that no input of the forward pass
reaches.  What they compute counts as outputs of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

Inputs = Mapping[str, Any]

_GIVING = ("get_", "predict_", "encode", "decode", "compute_")
"""How methods begin that give something and change nothing."""

methods_of: dict[type, tuple[str, ...]] = {}
"""The methods that a class is run by beside its forward pass: seen when it was first run."""


def outputs_of(model: nn.Module, inputs: Inputs) -> Any:
    """What the forward pass gives, and what those methods make of the same inputs."""
    outputs = model(**inputs)
    beside = []
    for name in methods_of.get(type(model), ()):
        method = getattr(model, name)
        given = _arguments(model, method, inputs)
        if given is not None:
            beside.append(method(**given))
    return [outputs, *beside] if beside else outputs


def methods_beside(model: nn.Module, inputs: Inputs) -> Iterator[str]:
    """Methods of the class, none that all models have, which make something of these inputs."""
    for name, _ in inspect.getmembers(type(model), inspect.isfunction):
        own = not any(hasattr(base, name) for base in (PreTrainedModel, GenerationMixin))
        gives = own and name.startswith(_GIVING)
        if gives and _arguments(model, getattr(model, name), inputs) is not None:
            yield name


def _arguments(
    model: nn.Module, method: Callable[..., Any], inputs: Inputs
) -> dict[str, Any] | None:
    """What a method takes of the inputs; ``None``: it takes none of them, or something else.

    What it calls otherwise and names first is the main input (ESM's tokens); no token is masked.
    """
    named = inspect.signature(method).parameters.values()
    given = {one.name: inputs[one.name] for one in named if one.name in inputs}
    needed = [
        one.name
        for one in named
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
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
