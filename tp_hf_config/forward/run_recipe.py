"""How a class is run with one config: its inputs, and what runs beside the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .encoder_states import EncoderStates

MakeInputs = Callable[[Any], Mapping[str, Any]]
"""A user's function: takes a config, returns keyword arguments of the forward pass."""


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
