"""Tied weights: one Parameter under several names, which pruning silently takes apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Tie:
    """Names that share one Parameter.

    Attributes:
        names: the names, in the model's order.
        parameter: what they shared when last looked at.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter

    def pruned(self, model: nn.Module) -> list[str]:
        """The names under which there is another Parameter now.

        A name under which the old one still is belongs to a layer that the pruner did not see
        (T5's ``shared``): it follows the others.
        """
        return [name for name in self.names if model.get_parameter(name) is not self.parameter]

    def keeper(self, model: nn.Module) -> str:
        """The name whose Parameter all names shall have."""
        return next(iter(self.pruned(model)), self.names[0])

    def conflict(self, model: nn.Module, alike: bool = False) -> str | None:
        """Why they cannot be one Parameter again; None: they can.

        ``alike``: all are known to have lost the same channels, so values need no comparing.
        """
        first, *others = self.pruned(model) or self.names[:1]
        weight = model.get_parameter(first)
        apart = shapes_apart({n: tuple(model.get_parameter(n).shape) for n in (first, *others)})
        if apart is not None:
            return apart
        for name in others:
            other = model.get_parameter(name)
            if not alike and not torch.equal(other, weight):
                return channels_apart(first, name)
        return None


def shapes_apart(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why names with these shapes cannot be one Parameter; None: they are alike."""
    (first, shape), *others = shapes.items()
    for name, other in others:
        if other != shape:
            return (
                f"{first} has shape {list(shape)} and {name} {list(other)}, but they are tied, one "
                "weight under two names"
            )
    return None


def channels_apart(first: str, other: str) -> str:
    """That two names of one weight lost different channels."""
    return f"{first} and {other} are tied, one weight under two names, but lost different channels"


def parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every Parameter with all of its names; the first is the one that the model lists it by."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The floating point buffers that are saved with the model (a router's bias)."""
    return {
        f"{name}.{key}".lstrip("."): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
        and buffer.is_floating_point()
        and key not in module._non_persistent_buffers_set
    }


def tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its name."""
    module, key = owner(model, name)
    found: torch.Tensor = getattr(module, key)
    return found


def ties_of(model: nn.Module) -> list[Tie]:
    """Every Parameter that has several names."""
    return [
        Tie(tuple(names), parameter)
        for parameter, names in parameter_names(model).items()
        if len(names) > 1
    ]


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    module_name, _, key = name.rpartition(".")
    return model.get_submodule(module_name), key


def stacks(model: nn.Module, name: str) -> bool:
    """Whether a parameter is several matrices in one (experts), and not a convolution's weight.

    The weight of a convolution may have a norm: it stands deeper then.  A scale for each channel of
    an image (SwiftFormer) is no matrix.
    """
    shape = tensor(model, name).shape
    owners = (name.rsplit(".", depth)[0] for depth in (1, 3) if name.count(".") >= depth)
    return (
        len(shape) == 3
        and 1 not in shape[1:]
        and not any(isinstance(model.get_submodule(one), nn.modules.conv._ConvNd) for one in owners)
    )


def compute_unsaved(model: Any) -> set[str]:
    """Give parameters that are not saved (Marian's positions) loading's values; their names."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    names = {name for name, _ in model.named_parameters() if name in ignored}
    with torch.no_grad():
        for layer in {name.rpartition(".")[0] for name in names}:
            model._init_weights(model.get_submodule(layer))
    return names
