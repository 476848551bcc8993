"""Find out without data how a class is run with one config."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import torch
from torch import nn

from ..model.meta_run import RealNumbers
from .encoder_states import ARGUMENTS, arguments_for_states, find_encoder_states
from .head_splits import splits_with
from .inputs import example_inputs, input_forms
from .run_recipe import MakeInputs, RunRecipe


def find_recipe(model: nn.Module, make_inputs: MakeInputs | None = None) -> RunRecipe:
    """Return how a class is run: the form of its inputs, and the encoder states that it reads.

    Raises:
        UnsupportedModelError: the user's function raises, or returns no dict.
    """
    recipe = RunRecipe(_best_form(model) if make_inputs is None else 0, make_inputs=make_inputs)
    with torch.no_grad(), RealNumbers():
        inputs = example_inputs(model, recipe)
    if make_inputs is not None:
        if not any(name in inputs for name in ARGUMENTS):
            return recipe
        inputs = {name: value for name, value in inputs.items() if name not in ARGUMENTS}
    if not arguments_for_states(model):
        return recipe
    idle = splits_with(model, inputs).idle
    encoder_states = find_encoder_states(
        model, inputs, idle, lambda given: splits_with(model, given).ended
    )
    return replace(recipe, encoder_states=encoder_states)


def _best_form(model: nn.Module) -> int:
    """Return the index of the input form with which the forward pass goes furthest."""
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    best, most = 0, -1
    forms = input_forms(model)
    try:
        for number in count():
            with torch.no_grad(), RealNumbers():  # around the run too it would lose whole numbers
                inputs = next(forms, None)
            if inputs is None:
                break
            calls.clear()
            if splits_with(model, inputs).ended:
                return number
            if len(calls) > most:
                best, most = number, len(calls)
    finally:
        for handle in handles:
            handle.remove()
    return best
