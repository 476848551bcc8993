"""How a class is run with one config: its inputs, and what runs beside the forward pass.

A decoder alone (Whisper's, BART's) computes the keys and values of its cross-attention from the
states of an encoder outside the model. Without them those layers do not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MakeInputs = Callable[[Any], Mapping[str, Any]]
"""A user's function: takes a config, returns keyword arguments of the forward pass."""
STATES = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
"""Names that classes give the argument for encoder states."""
AXIS = 2
"""The axis of the states along which their channels stand."""
_LENGTH = 4
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class EncoderStates:
    """The argument for encoder states, and the dimension of the parameter that reads them.

    In the name of a ``reader``, ``*`` stands for numbers of layers where it is that of a class.
    """

    argument: str
    reader: str
    dim: int

    @property
    def layer(self) -> str:
        """The name of the layer that reads the states."""
        return self.reader.rpartition(".")[0]


@dataclass(frozen=True)
class RunRecipe:
    """How a class is run with one config.

    :func:`~tp_hf_config.forward.find_recipe.find_recipe` makes it without data; the tiny model,
    which runs with data, may add methods and another attention.

    Attributes:
        form: the index of the form of its inputs, as
            :func:`~tp_hf_config.forward.inputs.input_forms` yields them.
        methods: methods to run beside the forward pass; their results count as outputs.
        attention: the attention implementation: eager, unless that computes NaN.
        encoder_states: which encoder states it reads, if any.
        make_inputs: the user's function that makes the inputs; then they have no form.
    """

    form: int = 0
    methods: tuple[str, ...] = ()
    attention: str = "eager"
    encoder_states: EncoderStates | None = None
    make_inputs: MakeInputs | None = None


PLAIN = RunRecipe()
"""The first form of inputs, and the forward pass alone."""


def in_all_layers(name: str) -> str:
    """Return a parameter's name with ``*`` for numbers of layers."""
    return _NUMBER.sub(".*", name)


def encoder_states_of(model: nn.Module, states: EncoderStates | None) -> EncoderStates | None:
    """Return the states that a model reads, with the first layer that reads them; None if none.

    ``states`` are those of its class.
    """
    if states is None:
        return None
    for name, _ in model.named_parameters():
        if in_all_layers(name) == states.reader:
            return EncoderStates(states.argument, name, states.dim)
    return None  # no cross-attention


def encoder_states_in(
    model: nn.Module, inputs: Mapping[str, Any], states: EncoderStates | None
) -> dict[str, Tensor]:
    """Return the encoder states among the inputs of a forward pass, by name; empty if none."""
    states = encoder_states_of(model, states)
    value = None if states is None else inputs.get(states.argument)
    return {states.argument: value} if states is not None and isinstance(value, Tensor) else {}


def random_encoder_states(model: nn.Module, states: EncoderStates | None) -> dict[str, Tensor]:
    """Return random states of one sample as a keyword argument; empty if the model reads none."""
    states = encoder_states_of(model, states)
    if states is None:
        return {}
    parameter = model.get_parameter(states.reader)
    return {states.argument: random_states(parameter, parameter.shape[states.dim])}


def random_states(like: Tensor, width: int) -> Tensor:
    """Return random states of one sample, on the device and in the dtype of a tensor."""
    return torch.rand((1, _LENGTH, width), device=like.device).to(like.dtype)
