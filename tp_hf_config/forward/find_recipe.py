"""Run a class on the meta device, to find out whether and how it runs with a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import in_one_line
from ..model.build import Refusal
from ..model.config_json import configs_of
from ..model.meta_run import NoValues, RealNumbers
from ..model.surroundings import note_shortage, same_random_state
from .head_splits import splits_with
from .inputs import example_inputs, input_forms
from .run_recipe import (
    STATES,
    EncoderStates,
    MakeInputs,
    RunRecipe,
    in_all_layers,
    random_states,
)


class DryPass(NamedTuple):
    """A forward pass on the meta device that completed."""

    inputs: dict[str, Any]  # keyword arguments; only integers and masks have values
    guessed: bool  # values of meta tensors decide what is computed


def dry_pass(
    model: nn.Module, recipe: RunRecipe, watched: AbstractContextManager[Any] | None = None
) -> DryPass | Refusal:
    """Run a model on the meta device inside ``watched``; return the pass, or the error."""
    for config in configs_of(model):
        if hasattr(type(config), "_experts_implementation"):
            config._experts_implementation = "batched_mm"  # its shapes do not depend on routing
    numbers = RealNumbers()
    try:
        with torch.no_grad(), same_random_state(), numbers:
            inputs = example_inputs(model, recipe)
            with NoValues(), watched or nullcontext():
                model(**inputs)
    except Exception as error:  # whatever a class's forward pass raises
        note_shortage(error)
        return Refusal(in_one_line(error)[:200])
    return DryPass(inputs, numbers.guessed)


def find_recipe(model: nn.Module, make_inputs: MakeInputs | None = None) -> RunRecipe:
    """Find the form of inputs and the encoder states of a class; calls ``make_inputs`` if given."""
    recipe = RunRecipe(_best_form(model) if make_inputs is None else 0, make_inputs=make_inputs)
    with torch.no_grad(), RealNumbers():
        inputs = example_inputs(model, recipe)
    if make_inputs is not None:
        if not any(name in inputs for name in STATES):
            return recipe
        inputs = {name: value for name, value in inputs.items() if name not in STATES}
    return replace(recipe, encoder_states=_find_states(model, inputs))


def _best_form(model: nn.Module) -> int:
    """Index of the input form with which the forward pass gets furthest."""
    calls: list[str] = []
    best, most = 0, -1
    forms = input_forms(model)
    with _hooked(model, nn.Module.register_forward_hook, lambda name, *_: calls.append(name)):
        for number in count():
            # only here: nested around the run, it loses integers
            with torch.no_grad(), RealNumbers():
                inputs = next(forms, None)
            if inputs is None:
                break
            calls.clear()
            if splits_with(model, inputs).ended:
                return number
            if len(calls) > most:
                best, most = number, len(calls)
    return best


def _find_states(model: nn.Module, inputs: Mapping[str, Any]) -> EncoderStates | None:
    """Encoder states with which otherwise idle layers run; ``None`` if there are none."""
    offered = [name for name in STATES if name in inspect.signature(model.forward).parameters]
    without = splits_with(model, inputs) if offered else None
    if without is None or not without.idle:
        return None
    for argument in offered:
        # the first run finds the layer that reads the states, and so their width
        read = _reader(model, inputs, argument)
        if read is None:
            continue
        name, dim = read
        parameter = model.get_parameter(name)
        states = random_states(parameter, parameter.shape[dim])
        with_states = splits_with(model, {**inputs, argument: states})
        # a model with an encoder of its own skips it when given states, and needs none
        if with_states.idle < without.idle and with_states.ended >= without.ended:
            return EncoderStates(argument, in_all_layers(name), dim)
    return None


def _reader(model: nn.Module, inputs: Mapping[str, Any], argument: str) -> tuple[str, int] | None:
    """The first weight that reads encoder states, and the dim that matches their width."""
    states = random_states(next(model.parameters()), 1)
    read: list[tuple[str, int]] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        dim = _input_dim(module)
        if args and args[0] is states and dim is not None:
            read.append((f"{name}.weight", dim))

    with _hooked(model, nn.Module.register_forward_pre_hook, note):
        splits_with(model, {**inputs, argument: states})
    return next(iter(read), None)


def _input_dim(module: nn.Module) -> int | None:
    """The dimension of a layer's weight that matches its input width, or ``None``."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim > 2:
        return None
    return 1 if isinstance(module, nn.Linear) else 0  # the weight of Conv1D is transposed


@contextmanager
def _hooked(
    model: nn.Module, register: Callable[..., Any], hook: Callable[..., None]
) -> Iterator[None]:
    """While open, every module with parameters of its own has a hook that gets its name."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.enter_context(register(module, partial(hook, name)))
        yield
