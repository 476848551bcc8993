"""Layers dropped, and layers that differ: how a copy is made, and what it has to compute.

Nothing here is the library's: which lists of layers a model has is read off its modules. Without
some of them, it has to compute what it computes where those pass on their input.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

from generation import Precise, outputs_of, plain_copy
from oracle import ALLOWED, WrongError, error_of
from torch import Tensor, nn

_FEWEST = 2


def lists_of_layers(model: Any) -> dict[str, nn.ModuleList]:
    """The lists of two or more layers that hold no other such list, by name."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) >= _FEWEST and _is_uniform(module)
    }
    return {
        name: layers
        for name, layers in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }


def _is_uniform(layers: nn.ModuleList) -> bool:
    """Layers, not projections or experts: each holds modules with parameters of their own."""
    return all(len([m for m in layer.modules() if m._parameters]) > 2 for layer in layers)


def some_layers(rng: Random, count: int) -> list[int]:
    """The numbers of one or more layers, of which some stay."""
    return sorted(rng.sample(range(count), rng.randint(1, max(1, count // 2))))


def check_dropped(
    original: Any, dropped: Any, name: str, layers: list[int], inputs: Mapping[str, Any]
) -> None:
    """Compare with the original whose dropped layers pass their input on.

    Raises:
        WrongError: other tensors, or other outputs.
    """
    before, after = original.state_dict(), dropped.state_dict()
    for key, value in after.items():
        old = before.get(_old_name(key, name, layers))
        if old is None or old.shape != value.shape or not bool((old == value).all()):
            raise WrongError(f"{key} is not the tensor of the layer that stayed")
    bypassed = plain_copy(original).double()
    with passing_on(bypassed.get_submodule(name), layers), Precise():
        expected = outputs_of(bypassed, inputs)
    with Precise():
        got = outputs_of(plain_copy(dropped).double(), inputs)
    if len(got) != len(expected):  # an output for each layer
        expected, got = expected[:1], got[:1]
    for number, (full, value) in enumerate(zip(expected, got, strict=True)):
        off = error_of(full, value) if full.shape == value.shape else float("inf")
        if not off <= ALLOWED:
            raise WrongError(f"output {number} is {off:.0e} off where layers pass on")


def _old_name(key: str, name: str, layers: list[int]) -> str:
    """The name that a tensor had before layers were dropped."""
    prefix = f"{name}."
    if not key.startswith(prefix):
        return key
    number, _, rest = key.removeprefix(prefix).partition(".")
    old = int(number)
    for gone in layers:
        old += gone <= old
    return f"{prefix}{old}.{rest}"


@contextmanager
def passing_on(modules: Any, layers: list[int]) -> Iterator[None]:
    """While open, these layers give what they are given: their first floating point tensor."""

    def instead(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = next(
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and value.is_floating_point()
        )
        if isinstance(output, Tensor):
            return given
        return type(output)((given, *output[1:])) if isinstance(output, (tuple, list)) else output

    handles = [
        modules[number].register_forward_hook(instead, with_kwargs=True) for number in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def differing_settings(rng: Random, model: Any) -> dict[str, Any]:
    """Arguments of a pruner that make layers differ: ranked together, or some left alone."""
    lists = list(lists_of_layers(model).values())
    ratio = round(rng.uniform(0.1, 0.6), 2)
    if not lists or rng.random() < 0.5:
        return {"pruning_ratio": ratio, "global_pruning": True}
    ignored = [layers[number] for layers in lists for number in some_layers(rng, len(layers))]
    return {"pruning_ratio": ratio, "ignored_layers": ignored}


def copied_for(model: Any, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A copy of a model, and settings with the copy's modules in the place of the model's."""
    names = {id(module): name for name, module in model.named_modules()}
    copied = copy.deepcopy(model)
    settings = dict(settings)
    if "ignored_layers" in settings:
        settings["ignored_layers"] = [
            copied.get_submodule(names[id(module)]) for module in settings["ignored_layers"]
        ]
    return copied, settings
