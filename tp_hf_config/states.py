"""States of an encoder that is no part of the model: an input as wide as the layer that reads it.

A decoder alone (Whisper's, BART's) makes the keys and values of its cross-attention from what some
encoder hands over.  Without it those layers do not run.  Which layer reads it, and so how wide it
is, is seen in a run without data.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENTS = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
"""What forward passes call the states of an encoder."""

AXIS = 2
"""Along which axis of the states their channels stand."""

_LENGTH = 4
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class States:
    """An input of states, and the dimension of a parameter that it is as wide as.

    Attributes:
        argument: its name.
        reader: the parameter.
        dim: the dimension.
    """

    argument: str
    reader: str
    dim: int

    @property
    def layer(self) -> str:
        """The layer that reads them."""
        return self.reader.rpartition(".")[0]


_reads: dict[type, States] = {}
"""What a class reads, in its first layer that does; layers without their numbers."""

_in_vain: set[tuple[type, frozenset[str]]] = set()
"""Classes and layers of them that states did not let run."""


def states_of(model: nn.Module) -> States | None:
    """The states that a model reads, as far as its class was seen to."""
    read = _reads.get(type(model))
    if read is None:
        return None
    names = (name for name, _ in model.named_parameters() if _NUMBER.sub(".*", name) == read.reader)
    reader = next(names, None)  # none: this config builds no cross-attention
    return None if reader is None else States(read.argument, reader, read.dim)


def made_states(model: nn.Module) -> dict[str, Tensor]:
    """Random states of one sample, as a keyword argument; none for a model that reads none."""
    read = states_of(model)
    if read is None:
        return {}
    parameter = model.get_parameter(read.reader)
    return {read.argument: _random(parameter, parameter.shape[read.dim])}


def look_for_states(
    model: nn.Module,
    inputs: Mapping[str, Any],
    idle: Iterable[str],
    run: Callable[[Mapping[str, Any]], bool],
) -> bool:
    """See whether states of an encoder let layers run that do not without, and which reads them.

    A model with an encoder in it leaves that out when it is given states: those it does not need.

    Args:
        model: on the meta device.
        inputs: keyword arguments of a forward pass, without states.
        idle: layers that do not run with these.
        run: runs the model on keyword arguments, and says whether it came to its end.
    """
    offered = [name for name in ARGUMENTS if name in inspect.signature(model.forward).parameters]
    tried = (type(model), frozenset(_NUMBER.sub(".*", f"{name}.") for name in idle))
    if not offered or not tried[1] or tried in _in_vain:
        return False
    without = _followed(model, inputs, run)
    for argument in offered:
        narrow = _random(next(model.parameters()), 1)
        read = _followed(model, {**inputs, argument: narrow}, run, narrow).read
        if read is None:
            continue
        name, dim = read
        parameter = model.get_parameter(name)
        states = _random(parameter, parameter.shape[dim])
        found = _followed(model, {**inputs, argument: states}, run)
        if found.called > without.called and found.ended >= without.ended:
            _reads[type(model)] = States(argument, _NUMBER.sub(".*", name), dim)
            return True
    _in_vain.add(tried)
    return False


@dataclass(frozen=True)
class _Followed:
    """The layers that a run called, whether it ended, and the first dimension that reads states."""

    called: set[str]
    ended: bool
    read: tuple[str, int] | None


def _followed(
    model: nn.Module,
    inputs: Mapping[str, Any],
    run: Callable[[Mapping[str, Any]], bool],
    states: Tensor | None = None,
) -> _Followed:
    called: set[str] = set()
    read: list[tuple[str, int]] = []

    def note(name: str, module: nn.Module, handed: tuple[Any, ...]) -> None:
        called.add(name)
        dim = _input_dim(module)
        if states is not None and handed and handed[0] is states and dim is not None:
            read.append((f"{name}.weight", dim))

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        ended = run(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return _Followed(called, ended, next(iter(read), None))


def _random(like: Tensor, width: int) -> Tensor:
    return torch.rand((1, _LENGTH, width), device=like.device).to(like.dtype)


def _input_dim(module: nn.Module) -> int | None:
    """The dimension of a layer's weight that is as long as its input is wide."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim > 2:
        return None
    return 1 if isinstance(module, nn.Linear) else 0  # Conv1D stands the other way round


def states_in(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The states of an encoder among the inputs of a model's forward pass, by their name."""
    read = states_of(model)
    given = None if read is None else inputs.get(read.argument)
    return {read.argument: given} if read is not None and isinstance(given, Tensor) else {}
