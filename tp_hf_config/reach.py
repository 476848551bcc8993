"""Inputs that reach as much of the tiny copy as can be: what no output depends on proves nothing.

A longer text, a video beside the image, arguments that a class can do without, methods beside the
forward pass.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from .inputs import example_inputs, input_forms, second_sample, text_inputs, video_forms
from .methods import methods_beside, methods_of, outputs_of
from .optional import optional_arguments, with_optional
from .passes import AllFloat64, tensors_in
from .reference import Refusal
from .states import states_in

_LONG_TEXT = 32

Working = tuple[dict[str, Any], bool] | Refusal
"""Inputs with which a model runs, and whether they are text alone; or why it does not."""


class GradientsError(Exception):
    """A class runs, and its outputs cannot be differentiated: no experiment can be made."""


def working_inputs(model: nn.Module) -> Working:
    """Inputs of two samples with which the model runs, and whether it is text alone.

    Three tokens come last: there may be few positions. Before text alone, states of an encoder are
    left out.
    """
    methods_of.pop(type(model), None)
    first = example_inputs(model)  # it went furthest without data
    forms = chain([first], input_forms(model), islice(input_forms(model, length=3), 1))
    states = states_in(model, first)
    bare = [{name: value for name, value in first.items() if name not in states}] if states else []
    text = text_inputs(model)
    reason = ""
    for form, partial in chain(((form, False) for form in chain(forms, bare)), ((text, True),)):
        stopped = "" if form is None else why_not(model, inputs := second_sample(form))
        if form is not None and stopped is None:
            try:
                return _reaching(model, inputs), partial
            except GradientsError as error:
                stopped = str(error)
        reason = reason or stopped or ""
    return Refusal(f"the tiny copy does not run: {reason}")


def _reaching(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """These inputs, or others where those reach more of the model.

    A longer text: no token of a short one may go to some expert; Transformers 4 keeps each as
    layers of its own.  Images and videos too, then arguments that no class has to be given, then
    methods beside the forward pass.
    """
    unreached = unreached_by(model, inputs)
    if unreached and "input_ids" in inputs:
        longer = second_sample(example_inputs(model, length=_LONG_TEXT))
        if longer.keys() == inputs.keys():
            inputs, unreached = _better(model, longer, inputs, unreached, by_chance=True)
    for form in video_forms(model) if unreached else ():
        inputs, unreached = _better(model, second_sample(form), inputs, unreached)
    for argument in optional_arguments(model, inputs) if unreached else ():
        more = with_optional(model, inputs, argument)
        inputs, unreached = _better(model, more, inputs, unreached)
    _run_by_methods(model, inputs, unreached)
    return inputs


def _run_by_methods(model: nn.Module, inputs: dict[str, Any], unreached: set[str]) -> None:
    """Let methods run what the forward pass leaves out, those that reach more."""
    for name in methods_beside(model, inputs) if unreached else ():
        before = methods_of.get(type(model), ())
        methods_of[type(model)] = (*before, name)
        left = unreached if why_not(model, inputs) is not None else unreached_by(model, inputs)
        if left < unreached:
            unreached = left
        else:
            methods_of[type(model)] = before


def _better(
    model: nn.Module,
    other: dict[str, Any],
    inputs: dict[str, Any],
    unreached: set[str],
    by_chance: bool = False,
) -> tuple[dict[str, Any], set[str]]:
    """The other inputs where they reach more, and what is left unreached.

    All that these do and more, but where it is chance what is reached: there more is enough.
    """
    if why_not(model, other) is not None:
        return inputs, unreached
    left = unreached_by(model, other)
    more = len(left) < len(unreached) if by_chance else left < unreached
    return (other, left) if more else (inputs, unreached)


def unreached_by(model: nn.Module, inputs: dict[str, Any]) -> set[str]:
    """The parameters that the outputs do not depend on.

    Raises:
        GradientsError: torch cannot compute their gradients (Doge's experts with normed scores,
            which it divides in place).
    """
    with AllFloat64():
        outputs = [t for t in tensors_in(outputs_of(model, inputs)) if t.requires_grad]
    names, parameters = zip(*model.named_parameters(), strict=True)
    if not outputs:  # numbers of codes (WavTokenizer's encoder): they have no gradients
        return set(names)
    total = torch.stack([tensor.sum() for tensor in outputs]).sum()
    try:
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
    except RuntimeError as error:
        raise GradientsError(f"torch cannot compute its gradients: {_said(error)}") from error
    return {name for name, grad in zip(names, grads, strict=True) if grad is None}


def why_not(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """What a forward pass breaks off with; ``None``: it does not."""
    try:
        with torch.no_grad(), AllFloat64():
            outputs_of(model, inputs)
    except Exception as error:  # whatever a class's forward pass raises
        return _said(error)
    return None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
