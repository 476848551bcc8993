"""Compute parameters, bytes and FLOPs of a class at some widths, without building weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from ..calibration.measured import gram_bytes
from ..fieldmap.field_map import FieldMap
from ..forward.find_recipe import dry_pass
from ..model.build import Refusal
from ..model.config_json import FieldPath

_TOKENS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Size:
    """How large a model is and what it computes.

    Attributes:
        parameters: how many there are; tied ones count once.
        bytes: the size of the parameters and saved buffers in the model's dtype.
        flops: FLOPs of a forward pass, for each token (of a short text) or for each other input;
            ``None`` if the class does not run without data.
        gram_bytes: the size of the Gram matrices that ``calibrate`` keeps if memory
            has room for all; ``None`` if the class does not run at tiny widths.
    """

    parameters: int
    bytes: int
    flops: int | None
    gram_bytes: int | None


def size_of(field_map: FieldMap, full: nn.Module, shallow: nn.Module) -> tuple[Size, str | None]:
    """Return the size of a class built without data, and a note on what is not known of it.

    Args:
        field_map: the field map of the class.
        full: the class with all layers, on the meta device.
        shallow: the shallow model, on the meta device.

    Returns:
        The size, and a note if the FLOPs are not known, else ``None``.
    """
    saved: list[torch.Tensor] = list(full.parameters())
    for module in full.modules():
        hidden = module._non_persistent_buffers_set
        saved += [b for key, b in module._buffers.items() if b is not None and key not in hidden]
    flops = flops_of(field_map, full, shallow)
    size = Size(
        parameters=sum(parameter.numel() for parameter in full.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in saved),
        flops=None if isinstance(flops, Refusal) else flops,
        gram_bytes=gram_bytes(field_map, full),
    )
    if isinstance(flops, Refusal):
        return size, f"FLOPs are not known, the class does not run without data: {flops.reason}"
    return size, None


def flops_of(field_map: FieldMap, full: nn.Module, shallow: nn.Module) -> int | Refusal:
    """Return the FLOPs per token or input of the full model, from one run of the shallow model.

    What each module computes by itself counts once for every module of the full model that is like
    it, and more where that is larger (it holds a piece for each layer). A ``Refusal``: the class
    does not run without data, or values decide what it computes.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    ran = dry_pass(shallow, field_map.recipe, counter)
    if isinstance(ran, Refusal):
        return ran
    if ran.guessed:
        return Refusal("values decide what is computed")
    counts = {str(name): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    own = _own_flops(counts, type(shallow).__name__)
    like = dict(shallow.named_modules())
    total: float = 0
    for name, module in full.named_modules():
        canonical = field_map.depth.canonical(name)
        if own.get(canonical):
            total += own[canonical] * _own_size(module) / _own_size(like[canonical])
    tokens = sum(ran.inputs[name].numel() for name in _TOKENS if name in ran.inputs)
    return int(total // max(1, tokens))


def _own_size(module: nn.Module) -> int:
    """Return how many numbers are in a module's own parameters; 1 if it has none."""
    return sum(parameter.numel() for parameter in module.parameters(recurse=False)) or 1


def _own_flops(counts: Mapping[str, int], root: str) -> Counter[str]:
    """Return the FLOPs of each module without those of the modules in it.

    FlopCounterMode counts both. ``root`` is the name of the model's class.
    """
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
    """Compute the number of parameters from the fields, with the field map: no building."""

    def __init__(self, field_map: FieldMap, full: nn.Module):
        self.field_map = field_map
        self._kinds = Counter(
            (field_map.depth.canonical(name), tuple(parameter.shape))
            for name, parameter in full.named_parameters()
        )

    def at(self, values: Mapping[FieldPath, int]) -> int:
        """Return how many there are at these values; tied ones count once."""
        changes = {field: value - self.field_map.values[field] for field, value in values.items()}
        return sum(
            number
            * prod(self._dimension(name, dim, size, changes) for dim, size in enumerate(shape))
            for (name, shape), number in self._kinds.items()
        )

    def _dimension(self, name: str, dim: int, size: int, changes: Mapping[FieldPath, int]) -> int:
        """Return the size of a tensor dim after the fields change by ``changes``."""
        expression = self.field_map.expression_of(name, dim)
        if expression is None or not expression.fields & changes.keys():
            return size
        return int(expression.evaluate(changes))
