"""A tiny copy of a class, for experiments: every mechanism of it, none of its size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .heads import Layout, observe
from .inputs import example_inputs, second_sample, text_alone
from .learn import ConfigMap, learn
from .reference import FieldPath, Refusal, shapes, with_values
from .ties import saved_buffers

_FEW = 8
_HEAD_DIM = 16
_PLACES = ("image", "video", "audio", "vision")
_LADDERS: tuple[tuple[int | None, tuple[int, ...]], ...] = (
    (_FEW, (4, 2, 3, 6, 8)),
    (63, (4, 6, 8, 12, 16)),
    (None, (16, 24, 32, 40, 48, 64, 96, 128)),
)


@dataclass(frozen=True)
class Miniature:
    """A class at tiny widths.

    Attributes:
        known: the map of the class around the tiny config.
        model: the class with random weights, none of them trivial, in float64 and eval mode.
        inputs: keyword arguments of one forward pass of two samples.
        partial: it runs on text alone, though the class takes images or sound too.
    """

    known: ConfigMap
    model: nn.Module
    inputs: dict[str, Any]
    partial: bool = False


def miniature(known: ConfigMap) -> Miniature | Refusal:
    """Make every width that a class lets shrink small, and see that the model still runs.

    Where it does not, some widths have to stay equal to each other: those go together then.
    """
    refusal = Refusal("not tried")
    for together in (False, True):
        found = _build(known, _shrunken(known, _small_tokens(known.depth.data), together))
        if isinstance(found, Miniature):
            return found
        refusal = found
    return refusal


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
        _randomise(model)
        inputs = _working_inputs(model)
        if isinstance(inputs, Refusal):
            return inputs
    partial = not example_inputs(model).keys() <= inputs.keys()
    return Miniature(
        learn(builder, builder.config(data), full, all_set=True), model, inputs, partial
    )


def _working_inputs(model: nn.Module) -> dict[str, Any] | Refusal:
    """Inputs of two samples with which the model runs: all kinds that it takes, or text alone."""
    everything = second_sample(example_inputs(model))
    short = second_sample(example_inputs(model, length=3))  # few positions in the tiny copy
    text = second_sample(text_alone(example_inputs(model)))
    reason = ""
    for inputs in (everything, short, text) if "input_ids" in text else (everything,):
        stopped = why_not(model, inputs)
        if stopped is None:
            return inputs
        reason = reason or stopped
    return Refusal(f"the tiny copy does not run: {reason}")


def why_not(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """What a forward pass breaks off with; ``None``: it does not."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # whatever a class's forward pass raises
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _shrunken(known: ConfigMap, data: dict[str, Any], together: bool) -> dict[str, Any]:
    """Lower one field after the other, as long as the class builds and runs as far as before."""
    base = known.builder.build(data)
    if isinstance(base, Refusal):
        return data
    names, before = set(shapes(base)), observe(base)
    data = with_values(data, {path: known.sizes[path] for path in known.unset})
    for path in sorted(known.sizes, key=lambda path: known.sizes[path]):
        for change in _smaller(known, data, path, together):
            trial = with_values(data, dict(change))
            model = known.builder.build(trial)
            if isinstance(model, Refusal) or set(shapes(model)) != names:
                continue
            if _alike(before, observe(model)):
                data = trial
                break
    return data


def _alike(before: Layout, after: Layout) -> bool:
    """Whether a forward pass goes as far, over heads wide enough for all that is in them.

    A head of two dimensions has no partial rotary embedding any more.
    """
    if after.steps < before.steps:
        return False
    for layer, splits in before.heads.items():
        now = after.heads.get(layer, ())
        if len(now) != len(splits):
            return False
        if any(new[-1] < min(old[-1], _HEAD_DIM) for new, old in zip(now, splits, strict=True)):
            return False
    return True


def _smaller(
    known: ConfigMap, data: dict[str, Any], path: FieldPath, together: bool
) -> Iterator[dict[FieldPath, int]]:
    """Smaller values of a field, alone (but if ``together``) and with all fields equal to it.

    Values that no other field has come first, so that what is different stays different; small
    numbers (heads, experts) take no others.
    """
    if path in known.linked:
        return
    value = _get(data, path)
    heads = path in known.count_fields()
    if value <= _LADDERS[0][1][0] and _stacked(known, path):
        return  # of fewer experts a router would take all
    few = value <= _FEW or heads
    ladder = next(steps for limit, steps in _LADDERS if few or limit is None or value <= limit)
    if heads:  # even numbers: several may have to go in proportion (Whisper's encoder, decoder)
        ladder = tuple(sorted(ladder, key=lambda step: step % 2))
    followers = [other for other, leader in known.linked.items() if leader == path]
    current = {other: _get(data, other) for other in known.sizes}
    equals = [
        other
        for other, size in current.items()
        if size == value and (other in known.count_fields()) == heads
    ]
    taken = {size for size in current.values() if size != value}
    fresh = [step for step in ladder if step < value and step not in taken]
    used = [step for step in ladder if step < value and step in taken and not few]
    for step in fresh + used:
        if not together or len(equals) == 1:
            yield dict.fromkeys([path, *followers], step)
        if len(equals) > 1:
            yield dict.fromkeys([path, *followers, *equals], step)


def _stacked(known: ConfigMap, path: FieldPath) -> bool:
    """Whether a field counts weights that are stacked in one tensor (experts)."""
    return any(
        path in expression.fields and dim == 0 and len(known.shapes[name]) == 3
        for (name, dim), expression in known.expressions.items()
    )


def _get(data: Any, path: FieldPath) -> int:
    for key in path:
        data = data[key]
    return int(data)


def _small_tokens(data: dict[str, Any]) -> dict[str, Any]:
    """Special tokens in the first few of the vocabulary, so that the vocabulary can be small."""

    def visit(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {
            key: 1
            if key.endswith("_token_id") and isinstance(value, int) and value > 2
            else visit(value)
            for key, value in node.items()
        }

    result: dict[str, Any] = visit(data)
    places = [k for k in result if k.startswith(_PLACES) and k.endswith("_token_id")]
    result.update({key: 3 + number for number, key in enumerate(places)})  # each another
    return result


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # fixed position tables have dimensions too
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * noise)

        for buffer in saved_buffers(model).values():
            buffer.mul_(1 + 0.3 * torch.rand_like(buffer))  # a variance stays above 0
            buffer.add_(0.3 * torch.rand_like(buffer))
