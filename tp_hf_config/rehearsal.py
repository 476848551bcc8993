"""Rehearse a cut on the tiny copy: does the class, built smaller, compute what is left?

A permutation shows that units are alike, not that the class counts them so: with as many heads as
dimensions in a head, one dimension out of every head looks like one head.  Built from the smaller
config with the weights that are left, the class has to be the original with the units masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cuts import select
from .directions import units_of
from .masked import EXACT, difference, inputs_left
from .passes import outputs_in_float64
from .reference import FieldPath, Refusal, field_name
from .ties import compute_unsaved, saved_buffers

if TYPE_CHECKING:
    from .miniature import Miniature
    from .proofs import Finding, Group


_BLIND_CUTS = 4


def rehearse(mini: Miniature, finding: Finding) -> str | None:
    """Why a width may not be cut: what comes of about half of it, where the class is built so.

    Returns:
        ``None`` where the result is the original with the units masked.
    """
    name = " and ".join(map(field_name, finding.fields))
    blind, refused = 0, ""
    for less, groups in _cuts(mini, finding):
        fresh = mini.known.builder.build_real(mini.known.config_at(less))
        if isinstance(fresh, Refusal):
            refused = f": {fresh.reason}"
            continue
        fresh.tie_weights()  # type: ignore[operator]
        wrong = _carried(fresh, _tensors(mini.model), groups) or _wrong(mini, fresh)
        if wrong is not None:
            return f"with less of {name} the class computes something else than is left: {wrong}"
        if _shows(mini, fresh):
            return None
        blind += 1  # what is left of a sound was padding, say: other units may show
        if blind == _BLIND_CUTS:
            break
    if blind:
        return f"less of {name} changes no output, so that nothing shows what is left"
    return f"less of {name} cannot be built in the tiny copy, so that nothing shows it{refused}"


def _wrong(mini: Miniature, fresh: nn.Module) -> str | None:
    """Where a smaller build is not the original with the units masked; ``None``: nowhere."""
    try:
        return difference(mini.model, fresh, fresh, mini.inputs, mini.watched)
    except Exception as error:  # a class may stop with any exception
        return f"it does not run then: {type(error).__name__}: {' '.join(str(error).split())}"


def _shows(mini: Miniature, fresh: nn.Module) -> bool:
    """Whether a cut changes any output; where it changes none, agreeing proves nothing."""
    left = inputs_left(mini.model, fresh, mini.inputs)
    if isinstance(left, Refusal):
        return True
    with torch.no_grad():
        before = outputs_in_float64(mini.model, mini.inputs, mini.watched)
        after = outputs_in_float64(fresh, left, mini.watched)
    return any(
        one.shape != two.shape or bool((one - two).norm() > EXACT * one.norm())
        for one, two in zip(before, after, strict=True)
    )


_Left = list[tuple["Group", Tensor]]
"""Groups, each with the units that stay."""


def _cuts(mini: Miniature, finding: Finding) -> Iterator[tuple[dict[FieldPath, int], _Left]]:
    """Smaller values of a width, the nearest to half first, with what stays of every group."""
    values, units = mini.known.values, units_of(mini.known, finding.fields)
    for left in sorted(range(finding.least, units), key=lambda n: abs(2 * n - units)):
        if all(left * group.grain % group.classes == 0 for group in finding.groups):
            less = {path: values[path] // units * left for path in finding.fields}
            yield less, [(group, _staying(group, left * group.grain)) for group in finding.groups]


def _staying(group: Group, left: int) -> Tensor:
    """The same number of every class, at random places."""
    generator = torch.Generator().manual_seed(left)
    size = group.units // group.classes
    starts = range(0, group.units, size)
    chosen = [
        start + torch.randperm(size, generator=generator)[: left // group.classes]
        for start in starts
    ]
    return torch.cat(chosen).sort().values


def _carried(fresh: nn.Module, original: dict[str, Tensor], groups: _Left) -> str | None:
    """Fill a smaller build with what is left of the original; why that fails, or ``None``."""
    masks: dict[str, dict[int, Tensor]] = {}
    for group, staying in groups:
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[staying] = False
        for dim in (dim for dim in group.dims if dim.name in original):  # not the inputs
            size = original[dim.name].shape[dim.dim]
            mask = masks.setdefault(dim.name, {}).setdefault(dim.dim, torch.ones(size).bool())
            mask[dim.layout.table(group.units)[gone].flatten()] = False
    computed = compute_unsaved(fresh)
    with torch.no_grad():
        for name, value in _tensors(fresh).items():
            kept = {axis: mask.nonzero().view(-1) for axis, mask in masks.get(name, {}).items()}
            left = select(original[name], kept) if kept else original[name]
            if left.shape != value.shape:
                return f"{name} has {list(left.shape)}, the class builds {list(value.shape)}"
            if name in computed and not torch.equal(left, value):
                return (
                    f"{name} is not saved, and computed anew from the config it holds other values"
                )
            value.copy_(left)
    return None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **saved_buffers(model)}
