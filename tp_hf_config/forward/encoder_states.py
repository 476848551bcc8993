"""Make encoder states: an input of a decoder that an encoder outside the model makes.

A decoder alone (Whisper's, BART's) computes the keys and values of its cross-attention from the
states of some encoder. Without them those layers do not run. A run without data shows which layer
reads the states, and so how wide they are.
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
"""Names that classes give the argument for encoder states."""
AXIS = 2
"""The axis of the states along which their channels stand."""
_LENGTH = 4
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class EncoderStates:
    """The argument for encoder states, and the dimension of the parameter that reads them."""

    argument: str
    reader: str
    dim: int

    @property
    def layer(self) -> str:
        """The name of the layer that reads the states."""
        return self.reader.rpartition(".")[0]


def encoder_states_of(model: nn.Module, states: EncoderStates | None) -> EncoderStates | None:
    """Return the states that a model reads, with the first layer that reads them; None if none.

    ``states`` are those of its class, with ``*`` for numbers of layers in the reader's name.
    """
    if states is None:
        return None
    names = (
        name for name, _ in model.named_parameters() if _NUMBER.sub(".*", name) == states.reader
    )
    reader = next(names, None)  # None: no cross-attention
    return None if reader is None else EncoderStates(states.argument, reader, states.dim)


def random_encoder_states(model: nn.Module, states: EncoderStates | None) -> dict[str, Tensor]:
    """Return random states of one sample as a keyword argument; empty if the model reads none."""
    states = encoder_states_of(model, states)
    if states is None:
        return {}
    parameter = model.get_parameter(states.reader)
    return {states.argument: _random(parameter, parameter.shape[states.dim])}


def arguments_for_states(model: nn.Module) -> list[str]:
    """Return the arguments of a model's forward pass that take encoder states."""
    return [name for name in ARGUMENTS if name in inspect.signature(model.forward).parameters]


def find_encoder_states(
    model: nn.Module,
    inputs: Mapping[str, Any],
    idle: Iterable[str],
    run: Callable[[Mapping[str, Any]], bool],
) -> EncoderStates | None:
    """Return the encoder states without which ``idle`` layers do not run; None if there are none.

    A model that contains an encoder skips it when it is given states: it does not need them.
    ``run`` returns True if the model (on the meta device) ran to its end with these keyword
    arguments.
    """
    offered = arguments_for_states(model)
    if not offered or not any(True for _ in idle):
        return None
    without = _run_watched(model, inputs, run)
    for argument in offered:
        narrow = _random(next(model.parameters()), 1)
        read = _run_watched(model, {**inputs, argument: narrow}, run, narrow).read
        if read is None:
            continue
        name, dim = read
        parameter = model.get_parameter(name)
        states = _random(parameter, parameter.shape[dim])
        with_states = _run_watched(model, {**inputs, argument: states}, run)
        if with_states.called > without.called and with_states.ended >= without.ended:
            return EncoderStates(argument, _NUMBER.sub(".*", name), dim)
    return None


@dataclass(frozen=True)
class _Pass:
    """The layers that were called, whether the pass ended, and the first weight to read states."""

    called: set[str]
    ended: bool
    read: tuple[str, int] | None


def _run_watched(
    model: nn.Module,
    inputs: Mapping[str, Any],
    run: Callable[[Mapping[str, Any]], bool],
    states: Tensor | None = None,
) -> _Pass:
    """Run the model; return which layers it calls and, if given, which one reads the states."""
    called: set[str] = set()
    read: list[tuple[str, int]] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        called.add(name)
        dim = _input_dim(module)
        if states is not None and args and args[0] is states and dim is not None:
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
    return _Pass(called, ended, next(iter(read), None))


def _random(like: Tensor, width: int) -> Tensor:
    """Return random states of one sample, on the device and in the dtype of a tensor."""
    return torch.rand((1, _LENGTH, width), device=like.device).to(like.dtype)


def _input_dim(module: nn.Module) -> int | None:
    """Return the dimension of a layer's weight that is as long as its input is wide, or None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim > 2:
        return None
    return 1 if isinstance(module, nn.Linear) else 0  # the weight of Conv1D is transposed


def encoder_states_in(
    model: nn.Module, inputs: Mapping[str, Any], states: EncoderStates | None
) -> dict[str, Tensor]:
    """Return the encoder states among the inputs of a forward pass, by name; empty if none."""
    states = encoder_states_of(model, states)
    value = None if states is None else inputs.get(states.argument)
    return {states.argument: value} if states is not None and isinstance(value, Tensor) else {}
