"""Take a forward pass's inputs from a function of the user's: ``make_inputs=``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import UnsupportedModelError, in_one_line
from .run_recipe import MakeInputs


def given_inputs(model: nn.Module, make_inputs: MakeInputs, config: Any = None) -> dict[str, Any]:
    """Return what the user's function makes for a config, as the model can take it.

    Floating point tensors get the model's dtype and device, and have no data on the meta device.
    Whole numbers and masks stay real there, on the CPU: sizes are computed from them.

    Raises:
        UnsupportedModelError: the function raises, or returns something else than a dict.
    """
    config = model.config if config is None else config
    name, kind = function_name(make_inputs), type(config).__name__
    try:
        inputs = make_inputs(config)
    except Exception as error:  # whatever the user's function raises
        message = in_one_line(error).rstrip(".")
        raise UnsupportedModelError(
            f"make_inputs={name} raised {type(error).__name__} for a {kind}: {message}. "
            "It is called with small configs of this class too: take every size from the config "
            "that it is given."
        ) from error
    if not isinstance(inputs, Mapping):
        raise UnsupportedModelError(
            f"make_inputs={name} returned a {type(inputs).__name__} for a {kind}. Return a dict of "
            f"what {type(model).__name__}'s forward pass takes, as {{'input_ids': ids}}."
        )
    parameter = next(model.parameters())

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.cpu() if parameter.is_meta else value.to(parameter.device)
        if parameter.is_meta:
            return torch.empty(value.shape, dtype=parameter.dtype, device="meta")
        return value.to(parameter.device, parameter.dtype)

    return {argument: tree_map(converted, value) for argument, value in inputs.items()}


def function_name(make_inputs: MakeInputs) -> str:
    """Return the name of a user's function; of another callable, the name of its class."""
    return getattr(make_inputs, "__name__", type(make_inputs).__name__)


def shapes_in(inputs: Mapping[str, Any]) -> str:
    """Return the names of inputs in one text, tensors with their shapes."""
    return ", ".join(
        f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else name
        for name, value in inputs.items()
    )
