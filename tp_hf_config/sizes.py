"""What a class costs at some widths: parameters, bytes and FLOPs, without building weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from .dry_pass import dry_pass
from .learn import ConfigMap
from .reference import FieldPath, Refusal

_TOKENS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Size:
    """What a model weighs and costs.

    Attributes:
        parameters: how many there are; tied ones count once.
        bytes: what they and the saved buffers take in the model's dtype.
        flops: of a forward pass, for each token (of a short text) or each other input; ``None``
            where the class does not run without data.
    """

    parameters: int
    bytes: int
    flops: int | None

    def to_dict(self) -> dict[str, int | None]:
        """The size for ``json.dumps``."""
        return {"parameters": self.parameters, "bytes": self.bytes, "flops": self.flops}


def size_of(known: ConfigMap, full: nn.Module, shallow: nn.Module) -> tuple[Size, str | None]:
    """The size of a class built without data, whole and at its learned depth; what is not known."""
    saved: list[torch.Tensor] = list(full.parameters())
    for module in full.modules():
        hidden = module._non_persistent_buffers_set
        saved += [b for key, b in module._buffers.items() if b is not None and key not in hidden]
    flops = flops_of(known, full, shallow)
    size = Size(
        parameters=sum(parameter.numel() for parameter in full.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in saved),
        flops=None if isinstance(flops, Refusal) else flops,
    )
    if isinstance(flops, Refusal):
        return size, f"FLOPs are not known, the class does not run without data: {flops.reason}"
    return size, None


def flops_of(known: ConfigMap, full: nn.Module, shallow: nn.Module) -> int | Refusal:
    """FLOPs per token of the whole model, from a run of the shallow one on the meta device.

    What each module computes by itself is counted once for every module of the whole model that is
    like it.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    ran = dry_pass(shallow, counter)
    if isinstance(ran, Refusal):
        return ran
    if ran.guessed:
        return Refusal("values decide what is computed")
    counts = {str(name): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    own = _own_flops(counts, type(shallow).__name__)
    total = sum(own.get(known.depth.canonical(name), 0) for name, _ in full.named_modules())
    tokens = sum(ran.inputs[name].numel() for name in _TOKENS if name in ran.inputs)
    return int(total // max(1, tokens))


def _own_flops(counts: Mapping[str, int], root: str) -> Counter[str]:
    """What each module computes itself; FlopCounterMode counts what is inside it as well."""
    inside = {
        name.removeprefix(root).lstrip("."): count
        for name, count in counts.items()
        if name != "Global"
    }
    own = Counter(inside)
    for name, count in inside.items():
        outer = name
        while outer:
            outer = outer.rpartition(".")[0]
            if outer in inside:
                own[outer] -= count
                break
    return own


class ParameterCount:
    """The number of parameters as a function of the fields, from the map: no building."""

    def __init__(self, known: ConfigMap, full: nn.Module):
        self.known = known
        self._kinds = Counter(
            (known.depth.canonical(name), tuple(parameter.shape))
            for name, parameter in full.named_parameters()
        )

    def at(self, values: Mapping[FieldPath, int]) -> int:
        """How many there are at these values; ties count once."""
        moves = {path: value - self.known.values[path] for path, value in values.items()}
        return sum(
            number * prod(self._dimension(name, dim, size, moves) for dim, size in enumerate(shape))
            for (name, shape), number in self._kinds.items()
        )

    def _dimension(self, name: str, dim: int, size: int, moves: Mapping[FieldPath, int]) -> int:
        expression = self.known.expressions.get((name, dim))
        if expression is None or not expression.fields & moves.keys():
            return size
        return int(expression.evaluate(moves))
