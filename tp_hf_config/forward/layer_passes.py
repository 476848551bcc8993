"""Find the hidden states that layers take and return; run a model without some layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def hidden_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Hidden states among a layer's arguments: the first floating point tensor."""
    values = (*args, *kwargs.values())
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def hidden_out(output: Any) -> Tensor | None:
    """Hidden states that a layer returns, alone or as the first of several results."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


Argument = int | str  # position or name


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Argument, Any]:
    return dict([*enumerate(args), *kwargs.items()])


@contextmanager
def handed_on(layers: Sequence[nn.Module]) -> Iterator[dict[int, Argument]]:
    """Note place among a layer's results -> argument of the next layer that is this tensor."""
    # LUKE's layers pass on the states of words and those of entities
    handed: dict[int, Argument] = {}
    places: dict[int, int] = {}  # id of a tensor that the previous layer returned -> its place
    alive: list[Any] = []  # keeps the ids unique

    def receive(layer: nn.Module, args: Any, kwargs: Any) -> None:
        for argument, value in _arguments(args, kwargs).items():
            if id(value) in places:
                handed.setdefault(places[id(value)], argument)

    def give(layer: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        places.clear()
        places.update({id(v): n for n, v in enumerate(outputs) if isinstance(v, Tensor)})
        alive[:] = outputs

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(receive, with_kwargs=True))
            stack.enter_context(layer.register_forward_hook(give))
        yield handed


def _same_shape(value: Any, result: Any) -> Any:
    both = isinstance(value, Tensor) and isinstance(result, Tensor)
    return value if both and value.shape == result.shape else result


@contextmanager
def without_layers(
    layers: Sequence[nn.Module], handed: Mapping[int, Argument] | None = None
) -> Iterator[list[str]]:
    """While open, these layers return the hidden states that they are given.

    Results in ``handed`` are hidden states too; others stay as computed. Yields the classes of
    layers that cannot be skipped, because their output has another shape.
    """
    impossible: list[str] = []

    def pass_on(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = hidden_in(args, kwargs), hidden_out(output)
        if before is None or after is None or before.shape != after.shape:
            impossible.append(type(layer).__name__)
            return output
        if isinstance(output, Tensor):
            return before
        arguments = _arguments(args, kwargs)
        given = {place: arguments.get(name) for place, name in (handed or {}).items() if place}
        return type(output)(
            (before, *(_same_shape(given.get(n), value) for n, value in enumerate(output[1:], 1)))
        )

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(pass_on, with_kwargs=True))
        yield impossible
