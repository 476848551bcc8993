"""How a class is run with one config: its inputs, and the methods beside the forward pass.

A decoder alone (Whisper's, BART's) computes keys and values of its cross-attention from the states
of an encoder outside the model. Without them those layers do not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# a user's function: config -> keyword arguments of the forward pass
MakeInputs = Callable[[Any], Mapping[str, Any]]
# argument names for encoder states
STATES = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
AXIS = 2  # of the channels of encoder states
_LENGTH = 4
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class EncoderStates:
    """The argument for encoder states, and the parameter that reads them."""

    argument: str
    reader: str  # parameter name; for a class with * as layer numbers
    dim: int  # of the parameter

    @property
    def layer(self) -> str:
        return self.reader.rpartition(".")[0]


@dataclass(frozen=True)
class RunRecipe:
    """How a class is run with one config. Running the tiny model may add methods and attention."""

    form: int = 0  # index in input_forms()
    methods: tuple[str, ...] = ()  # run beside the forward pass; their results count as outputs
    attention: str = "eager"  # eager, unless that computes NaN
    encoder_states: EncoderStates | None = None
    make_inputs: MakeInputs | None = None  # the user's function; then there is no form


PLAIN = RunRecipe()  # the first form of inputs, and the forward pass alone


def in_all_layers(name: str) -> str:
    return _NUMBER.sub(".*", name)


def encoder_states_of(model: nn.Module, states: EncoderStates | None) -> EncoderStates | None:
    """The class's states with the first layer of this model that reads them, or ``None``."""
    if states is None:
        return None
    for name, _ in model.named_parameters():
        if in_all_layers(name) == states.reader:
            return EncoderStates(states.argument, name, states.dim)
    return None  # no cross-attention


def encoder_states_in(
    model: nn.Module, inputs: Mapping[str, Any], states: EncoderStates | None
) -> dict[str, Tensor]:
    states = encoder_states_of(model, states)
    value = None if states is None else inputs.get(states.argument)
    return {states.argument: value} if states is not None and isinstance(value, Tensor) else {}


def random_encoder_states(model: nn.Module, states: EncoderStates | None) -> dict[str, Tensor]:
    """Random states of one sample as a keyword argument; empty if none are read."""
    states = encoder_states_of(model, states)
    if states is None:
        return {}
    parameter = model.get_parameter(states.reader)
    return {states.argument: random_states(parameter, parameter.shape[states.dim])}


def random_states(like: Tensor, width: int) -> Tensor:
    return torch.rand((1, _LENGTH, width), device=like.device).to(like.dtype)
