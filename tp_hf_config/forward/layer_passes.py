"""Find the hidden states that go into a layer and come out, and run a model without some layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def hidden_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states among a layer's arguments: the first floating point tensor."""
    values = (*args, *kwargs.values())
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def hidden_out(output: Any) -> Tensor | None:
    """Return the hidden states that a layer returns, alone or as the first of several results."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@contextmanager
def without_layers(layers: Sequence[nn.Module]) -> Iterator[list[str]]:
    """While open, these layers return the hidden states that they are given.

    Whatever else a layer returns stays what it computes.

    Yields:
        The classes of layers for which that cannot be: their output is of another shape.
    """
    impossible: list[str] = []

    def pass_on(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = hidden_in(args, kwargs), hidden_out(output)
        if before is None or after is None or before.shape != after.shape:
            impossible.append(type(layer).__name__)
            return output
        return before if isinstance(output, Tensor) else type(output)((before, *output[1:]))

    handles = [layer.register_forward_hook(pass_on, with_kwargs=True) for layer in layers]
    try:
        yield impossible
    finally:
        for handle in handles:
            handle.remove()
