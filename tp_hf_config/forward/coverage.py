"""Find inputs that reach as many parameters of the tiny model as possible.

A parameter that no output depends on proves nothing. A longer text, a video beside the image,
optional arguments, or methods beside the forward pass may reach more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError, in_one_line
from ..model.build import Refusal
from ..model.surroundings import note_shortage
from .inputs import (
    example_inputs,
    function_name,
    given_inputs,
    input_forms,
    optional_arguments,
    second_sample,
    text_inputs,
    video_forms,
)
from .observed_pass import AllFloat64
from .output_tensors import methods_beside, outputs_of, tensors_in
from .run_recipe import PLAIN, MakeInputs, RunRecipe, encoder_states_in

_LONG_TEXT = 32


@dataclass(frozen=True)
class WorkingInputs:
    inputs: dict[str, Any]  # keyword arguments of a forward pass of two samples
    partial: bool  # text alone, though the class also takes images or sound
    recipe: RunRecipe  # with the methods that reach more parameters


class InputsRefusal(Refusal):
    """The user's ``make_inputs=`` failed; ``reason`` names the function and the fix."""


class GradientsError(Exception):
    """A class runs, but torch cannot differentiate its outputs, so experiments are impossible."""


def working_inputs(model: nn.Module, recipe: RunRecipe = PLAIN) -> WorkingInputs | Refusal:
    """Return inputs of two samples and a recipe with which the model runs, or the first error."""
    if recipe.make_inputs is not None:
        return _users_inputs(model, recipe, recipe.make_inputs)
    first = example_inputs(model, recipe)  # it got furthest on the meta device
    short = islice(input_forms(model, recipe, length=3), 1)  # there may be few positions
    forms = chain([first], input_forms(model, recipe), short)
    states = encoder_states_in(model, first, recipe.encoder_states)
    bare = [{name: value for name, value in first.items() if name not in states}] if states else []
    text = text_inputs(model)
    first_error: Refusal | None = None
    for form, partial in chain(((form, False) for form in chain(forms, bare)), ((text, True),)):
        if form is None:
            continue
        inputs = second_sample(form)
        stopped = forward_error(model, inputs)
        if stopped is None:
            try:
                return _with_more_reached(model, WorkingInputs(inputs, partial, recipe))
            except GradientsError as error:
                stopped = Refusal(str(error))
        first_error = first_error or stopped
    reason = "" if first_error is None else first_error.reason
    return Refusal(f"the tiny model does not run: {reason}")


def _users_inputs(
    model: nn.Module, recipe: RunRecipe, make_inputs: MakeInputs
) -> WorkingInputs | Refusal:
    try:
        inputs = given_inputs(model, make_inputs)
    except UnsupportedModelError as error:
        return InputsRefusal(str(error))
    stopped = forward_error(model, inputs)
    if stopped is not None:
        return InputsRefusal(
            f"{type(model).__name__} does not run with what make_inputs="
            f"{function_name(make_inputs)} returned for a small {type(model.config).__name__}, "
            f"{_shapes_in(inputs)}: {stopped.reason.rstrip('.')}. Take every size from the "
            "config that the function is given, and return all that model(**inputs) needs."
        )
    try:
        methods = _methods_reaching(model, inputs, unreached_by(model, inputs))
    except GradientsError as error:
        return Refusal(f"the tiny model does not run: {error}")
    return WorkingInputs(inputs, False, replace(recipe, methods=methods))


def _shapes_in(inputs: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else name
        for name, value in inputs.items()
    )


def _with_more_reached(model: nn.Module, working: WorkingInputs) -> WorkingInputs:
    """Return inputs and methods that reach as many parameters as possible."""
    inputs, recipe = working.inputs, working.recipe
    unreached = unreached_by(model, inputs)
    if unreached and "input_ids" in inputs:
        # a short text may leave experts without tokens; in Transformers 4 each has its own layers
        longer = second_sample(example_inputs(model, recipe, length=_LONG_TEXT))
        if longer.keys() == inputs.keys():
            inputs, unreached = _better(model, longer, inputs, unreached, by_chance=True)
    for form in video_forms(model, recipe) if unreached else ():
        inputs, unreached = _better(model, second_sample(form), inputs, unreached)
    for make in optional_arguments(model, inputs) if unreached else ():
        extended = {**inputs, **make(model, inputs)}
        inputs, unreached = _better(model, extended, inputs, unreached)
    methods = _methods_reaching(model, inputs, unreached)
    return WorkingInputs(inputs, working.partial, replace(recipe, methods=methods))


def _methods_reaching(
    model: nn.Module, inputs: dict[str, Any], unreached: set[str]
) -> tuple[str, ...]:
    chosen = PLAIN
    for name in methods_beside(model, inputs) if unreached else ():
        trial = RunRecipe(methods=(*chosen.methods, name))
        if forward_error(model, inputs, trial) is not None:
            continue
        remaining = unreached_by(model, inputs, trial)
        if remaining < unreached:
            chosen, unreached = trial, remaining
    return chosen.methods


def _better(
    model: nn.Module,
    other: dict[str, Any],
    inputs: dict[str, Any],
    unreached: set[str],
    by_chance: bool = False,
) -> tuple[dict[str, Any], set[str]]:
    """Return the better of two inputs, and the parameters that it does not reach."""
    if forward_error(model, other) is not None:
        return inputs, unreached
    remaining = unreached_by(model, other)
    # if chance decides what is reached, the number counts; else nothing may be lost
    improves = len(remaining) < len(unreached) if by_chance else remaining < unreached
    return (other, remaining) if improves else (inputs, unreached)


def unreached_by(model: nn.Module, inputs: dict[str, Any], recipe: RunRecipe = PLAIN) -> set[str]:
    """Return the names of the parameters that no output depends on."""
    with AllFloat64():
        computed = tensors_in(outputs_of(model, inputs, recipe))
        outputs = [tensor for tensor in computed if tensor.requires_grad]
    names, parameters = zip(*model.named_parameters(), strict=True)
    if not outputs:  # integer outputs have no gradients (WavTokenizer's codes)
        return set(names)
    total = torch.stack([tensor.sum() for tensor in outputs]).sum()
    try:
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
    except RuntimeError as error:  # Doge divides normed scores of its experts in place
        note_shortage(error)
        reason = in_one_line(error)[:200]
        raise GradientsError(f"torch cannot compute its gradients: {reason}") from error
    return {name for name, grad in zip(names, grads, strict=True) if grad is None}


def forward_error(
    model: nn.Module, inputs: dict[str, Any], recipe: RunRecipe = PLAIN
) -> Refusal | None:
    try:
        with torch.no_grad(), AllFloat64():
            outputs_of(model, inputs, recipe)
    except Exception as error:  # whatever a class's forward pass raises
        note_shortage(error)
        return Refusal(in_one_line(error)[:200])
    return None
