"""A tiny copy of a class, for experiments: every mechanism of it, none of its size."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layer_counts import are_whole, is_numbers
from .learn import ConfigMap, learn
from .methods import outputs_of
from .passes import AllFloat64, Result, tensors_in, watched_results
from .reach import Working, unreached_by, why_not, working_inputs
from .reference import Builder, FieldPath, Refusal, attention_of, shapes, with_values
from .shrinking import shrunken, small_tokens
from .states import states_in
from .ties import compute_unsaved, saved_buffers

_LAYERS = 2
"""As many layers of a kind are left at least."""
_DRAWS = 40
"""How often other weights are tried, so that all of many alike parts are reached."""
_NO_CHANCE = 4
"""So often the same parts are left out where it is no chance."""
_OTHER_ATTENTION = "sdpa"
_NAMING = ("layer", "index")
"""In the names of settings that name layers."""


@dataclass(frozen=True)
class Miniature:
    """A class at tiny widths.

    Attributes:
        known: the map of the class around the tiny config.
        full: the map around the config that it is a tiny copy of.
        model: the class with random weights, none of them trivial, in float64 and eval mode.
        inputs: keyword arguments of one forward pass of two samples.
        partial: it runs on text alone, though the class takes images or sound too.
        watched: what counts as an output beside the outputs: of parts that run without any.
    """

    known: ConfigMap
    full: ConfigMap
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
        made = _build(known, shrunken(known, small_tokens(known), together))
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
        working = working_inputs(model)
        data, model, working = _with_layers_named(known, data, model, working)
        if isinstance(working, Refusal):
            return working
        inputs, partial = _reaching_alike(model, working)
        model = _with_numbers(builder, data, model, inputs)
        full = builder.build(data)
    if isinstance(full, Refusal):
        return full
    around = learn(builder, builder.config(data), full, tiny=True)
    watched = () if partial else watched_results(model, inputs)
    return Miniature(around, known, model, inputs, partial, watched)


def _reaching_alike(
    model: nn.Module, working: tuple[dict[str, Any], bool]
) -> tuple[dict[str, Any], bool]:
    """The inputs, with other weights where some of many alike parts are left out by chance.

    Of Switch's eight experts the best one is taken for each token: some may be best for none.
    """
    left_out = _left_out(model, working[0])
    if not 0 < max(left_out.values(), default=0) < 0.5:
        return working
    before, same = copy.deepcopy(model.state_dict()), 0
    for _ in range(_DRAWS):
        _draw(model)
        again = working_inputs(model)
        now = left_out if isinstance(again, Refusal) else _left_out(model, again[0])
        if not isinstance(again, Refusal) and not now:
            return again
        same = same + 1 if now == left_out else 0
        if same == _NO_CHANCE:
            break
    model.load_state_dict(before)
    return working


def _left_out(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """Which share is not reached of several parts told apart by their number alone."""
    alike = Counter(_numbered(name) for name, _ in model.named_parameters())
    unreached = Counter(map(_numbered, unreached_by(model, inputs)))
    return {name: n / alike[name] for name, n in unreached.items() if n < alike[name]}


def _numbered(name: str) -> str:
    return re.sub(r"\d+(?=\D*$)", "*", name)


def _with_numbers(
    builder: Builder, data: dict[str, Any], model: nn.Module, inputs: dict[str, Any]
) -> nn.Module:
    """The model, or with another attention where only that computes numbers.

    Nemotron's streaming encoder hides all that it should see from the eager one.
    """
    if _computes_numbers(model, inputs) or builder.model_class in attention_of:
        return model
    attention_of[builder.model_class] = _OTHER_ATTENTION
    other = builder.build_real(data)
    if not isinstance(other, Refusal):
        other.load_state_dict(model.state_dict())
        if why_not(other, inputs) is None and _computes_numbers(other, inputs):
            return other
    del attention_of[builder.model_class]
    return model


def _computes_numbers(model: nn.Module, inputs: dict[str, Any]) -> bool:
    with torch.no_grad(), AllFloat64():
        return not any(one.isnan().any() for one in tensors_in(outputs_of(model, inputs)))


def _with_layers_named(
    known: ConfigMap, data: dict[str, Any], model: nn.Module, working: Working
) -> tuple[dict[str, Any], nn.Module, Working]:
    """The config and its class, layers named by numbers that are left, if more is reached.

    What Qwen3-VL has beside its layers 8, 16 and 24 would never run in a copy of two layers, and
    VipLLaVA finds no layer 6 there to read.
    """
    unreached = _left(model, working)
    for named in _numbers_of_layers(known, data) if unreached else ():
        trial = with_values(data, named)
        bare = known.builder.build(trial)
        if isinstance(bare, Refusal) or shapes(bare) != shapes(model):
            continue
        other = known.builder.build_real(trial)
        if isinstance(other, Refusal):
            continue
        randomise(other)
        tried = working
        if isinstance(working, Refusal) or working[1]:
            tried = working_inputs(other)
        left = _left(other, tried)
        if left < unreached:
            data, model, working, unreached = trial, other, tried, left
    return data, model, working


def _left(model: nn.Module, working: Working) -> float:
    """How many parameters the outputs do not depend on with these inputs."""
    if isinstance(working, Refusal):
        return math.inf
    stops = why_not(model, working[0]) is not None
    return math.inf if stops else len(unreached_by(model, working[0]))


def _numbers_of_layers(known: ConfigMap, data: dict[str, Any]) -> Iterator[dict[FieldPath, Any]]:
    """Lists and numbers in a config that can name layers, naming those that are left.

    A number that the config hands on to one of its parts (MiniCPM-V 4.6) is given in both.
    """
    numbers: dict[str, list[FieldPath]] = {}

    def visit(node: Any, path: FieldPath) -> Iterator[dict[FieldPath, Any]]:
        for key, value in node.items() if isinstance(node, dict) else ():
            here: FieldPath = (*path, key)
            said = any(word in key for word in _NAMING)
            if is_numbers(value) or (said and are_whole(value)):
                places = range(len(value))
                yield {here: list(places)}
                yield {here: [place % _LAYERS for place in places]}
                yield {here: [_LAYERS - 1 for _ in places]}
            elif said and type(value) is int:
                numbers.setdefault(key, []).append(here)
                if here not in known.silent | known.sizes:
                    yield {here: 0}
            yield from visit(value, here)

    yield from visit(data, ())
    for paths in numbers.values():
        if len(paths) > 1:
            yield dict.fromkeys(paths, 0)


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
            if parameter.ndim > 1:
                parameter.copy_(_matrix(model, name, parameter))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))

        for buffer in saved_buffers(model).values():
            buffer.mul_(1 + 0.3 * torch.rand_like(buffer))  # a variance stays above 0
            buffer.add_(0.3 * torch.rand_like(buffer))


def _draw(model: nn.Module) -> None:
    """Other random values for every matrix that is saved."""
    unsaved = compute_unsaved(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name not in unsaved:
                parameter.copy_(_matrix(model, name, parameter))


def _matrix(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    spread: float = _fan_in(model, name, parameter) ** 0.5
    return torch.randn_like(parameter) / spread


def _fan_in(model: nn.Module, name: str, parameter: torch.Tensor) -> int:
    """How many numbers a parameter sums up, as far as that keeps what flows from growing.

    Stacks of convolutions over sound have no norms between: behind them numbers of 1e11 would be
    all that shows, and what attention adds less than counts as a difference (Mimi).
    """
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return parameter[:, 0].numel() if module.transposed else parameter[0].numel()
    return parameter.shape[-1]
