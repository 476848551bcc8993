"""A tiny copy of a class, for experiments: every mechanism of it, none of its size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from .depth import is_numbers
from .inputs import example_inputs, input_forms, second_sample, text_inputs
from .learn import ConfigMap, learn
from .passes import AllFloat64, Result, tensors_in, watched_results
from .reference import Builder, FieldPath, Refusal, shapes, with_values
from .shrinking import shrunken, small_tokens
from .states import states_in
from .ties import compute_unsaved, saved_buffers

_LONG_TEXT = 32


@dataclass(frozen=True)
class Miniature:
    """A class at tiny widths.

    Attributes:
        known: the map of the class around the tiny config.
        model: the class with random weights, none of them trivial, in float64 and eval mode.
        inputs: keyword arguments of one forward pass of two samples.
        partial: it runs on text alone, though the class takes images or sound too.
        watched: what counts as an output beside the outputs: of parts that run without any.
    """

    known: ConfigMap
    model: nn.Module
    inputs: dict[str, Any]
    partial: bool = False
    watched: tuple[Result, ...] = ()

    @property
    def states(self) -> dict[str, torch.Tensor]:
        """The states of an encoder among the inputs: units stand along them too."""
        return states_in(self.model, self.inputs)


def miniature(known: ConfigMap) -> Miniature | Refusal:
    """Make every width that a class lets shrink small, and see that the model still runs.

    Where it does not, some widths have to stay equal to each other: those go together then.
    """
    found: list[Miniature | Refusal] = []
    for together in (False, True):
        made = _build(known, shrunken(known, small_tokens(known.depth.data), together))
        if isinstance(made, Miniature) and not made.partial:
            return made
        found.append(made)
    return next((one for one in found if isinstance(one, Miniature)), found[-1])


def _build(known: ConfigMap, data: dict[str, Any]) -> Miniature | Refusal:
    """The class at these widths with random weights, if it runs."""
    builder = known.builder
    full = builder.build(data)
    if isinstance(full, Refusal):
        return full
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = builder.build_real(data)
        if isinstance(model, Refusal):
            return model
        randomise(model)
        working = _working_inputs(model)
        if isinstance(working, Refusal):
            return working
        inputs, partial = working
        data, model = _with_layers_named(builder, data, model, inputs)
        full = builder.build(data)
    if isinstance(full, Refusal):
        return full
    around = learn(builder, builder.config(data), full, all_set=True)
    watched = () if partial else watched_results(model, inputs)
    return Miniature(around, model, inputs, partial, watched)


def _with_layers_named(
    builder: Builder, data: dict[str, Any], model: nn.Module, inputs: dict[str, Any]
) -> tuple[dict[str, Any], nn.Module]:
    """The config and its class, lists of layers naming those that are left, if more is reached.

    What Qwen3-VL has beside its layers 8, 16 and 24 would never run in a copy of two layers.
    """
    unreached = _unreached(model, inputs)
    for path, length in _numbers_of_layers(data) if unreached else ():
        named: dict[FieldPath, Any] = {path: list(range(length))}
        trial = with_values(data, named)
        other = builder.build_real(trial)
        if isinstance(other, Refusal) or shapes(other) != shapes(model):
            continue
        randomise(other)
        if why_not(other, inputs) is None and _unreached(other, inputs) < unreached:
            data, model, unreached = trial, other, _unreached(other, inputs)
    return data, model


def _numbers_of_layers(node: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    """Lists in a config that can name layers by their numbers, and how long they are."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if is_numbers(value):
            yield (*path, key), len(value)
        yield from _numbers_of_layers(value, (*path, key))


def _working_inputs(model: nn.Module) -> tuple[dict[str, Any], bool] | Refusal:
    """Inputs of two samples with which the model runs, and whether it is text alone.

    Three tokens come last: there may be few positions. Before text alone, states of an encoder are
    left out.
    """
    first = example_inputs(model)  # it went furthest without data
    forms = chain([first], input_forms(model), islice(input_forms(model, length=3), 1))
    states = states_in(model, first)
    bare = [{name: value for name, value in first.items() if name not in states}] if states else []
    text = text_inputs(model)
    reason = ""
    for form, partial in chain(((form, False) for form in chain(forms, bare)), ((text, True),)):
        stopped = "" if form is None else why_not(model, inputs := second_sample(form))
        if form is not None and stopped is None:
            return _reaching(model, inputs), partial
        reason = reason or stopped or ""
    return Refusal(f"the tiny copy does not run: {reason}")


def _reaching(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """These inputs, or a longer text where that reaches more of the model.

    No token of a short one may go to some expert; Transformers 4 keeps each as layers of its own.
    """
    unreached = _unreached(model, inputs)
    if unreached and "input_ids" in inputs:
        longer = second_sample(example_inputs(model, length=_LONG_TEXT))
        alike = longer.keys() == inputs.keys() and why_not(model, longer) is None
        if alike and _unreached(model, longer) < unreached:
            return longer
    return inputs


def _unreached(model: nn.Module, inputs: dict[str, Any]) -> int:
    """How many parameters the outputs do not depend on."""
    with AllFloat64():
        outputs = [tensor for tensor in tensors_in(model(**inputs)) if tensor.requires_grad]
    total = torch.stack([tensor.sum() for tensor in outputs]).sum()
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return sum(grad is None for grad in grads)


def why_not(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """What a forward pass breaks off with; ``None``: it does not."""
    try:
        with torch.no_grad(), AllFloat64():
            model(**inputs)
    except Exception as error:  # whatever a class's forward pass raises
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def randomise(model: nn.Module) -> None:
    """Random values for every parameter and buffer that is saved, none of them trivial.

    Those that are not (Marian's positions) are what the class computes for this config: loading
    computes them again, for another width other values.
    """
    unsaved = compute_unsaved(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(True)  # fixed position tables have dimensions too
            if name in unsaved:
                continue
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * noise)

        for buffer in saved_buffers(model).values():
            buffer.mul_(1 + 0.3 * torch.rand_like(buffer))  # a variance stays above 0
            buffer.add_(0.3 * torch.rand_like(buffer))
