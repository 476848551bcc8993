"""Rehearse a cut on the tiny model: build the class smaller and run the masked check on it.

A permutation shows that units are interchangeable, but not that the class counts them in this way:
with as many heads as dimensions in a head, one dimension of every head looks like one head. So the
class is built from the smaller config with the weights that are left. It has to equal the original
with the removed units at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..fieldmap.unit_shares import units_of
from ..forward.observed_pass import outputs_in_float64
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.tensors import compute_unsaved, saved_buffers, select
from .masked_check import EXACT, difference, inputs_left

if TYPE_CHECKING:
    from .group import Finding, TinyGroup
    from .tiny.tiny_model import TinyModel

_BLIND_CUTS = 4
"""After this many cuts that change no output, no more are tried."""


def rehearse(tiny: TinyModel, finding: Finding) -> str | None:
    """Cut about half of a tiny width and compare; return why the width cannot be cut, or None.

    Args:
        tiny: the tiny model.
        finding: a width with its groups.

    Returns:
        ``None`` if a smaller build equals the original with the removed units at zero. Else a
        sentence: it computes something else, no cut changes an output, or the class refuses every
        cut.
    """
    name = " and ".join(map(field_name, finding.fields))
    original = _tensors(tiny.model)
    blind, refused = 0, ""
    for smaller, groups in _cuts(tiny, finding):
        fresh = tiny.field_map.builder.build_real(tiny.field_map.config_at(smaller))
        if isinstance(fresh, Refusal):
            refused = f": {fresh.reason}"
            continue
        fresh.tie_weights()  # type: ignore[operator]
        added = min(_tensors(fresh).keys() - original.keys(), default=None)
        if added is not None:  # Jamba's layers with a single expert have no experts
            refused = f": it builds {added} then"
            continue
        reason = _carried(fresh, original, groups) or _wrong(tiny, fresh)
        if reason is not None:
            return f"with less of {name} the class computes something else than is left: {reason}"
        if _shows(tiny, fresh):
            return None
        blind += 1  # only padding of a sound may be left: other cuts may show more
        if blind == _BLIND_CUTS:
            break
    if blind:
        return f"less of {name} changes no output, so that nothing shows what is left"
    return f"less of {name} cannot be built in the tiny model, so that nothing shows it{refused}"


def _wrong(tiny: TinyModel, fresh: nn.Module) -> str | None:
    """Return why a smaller build fails the masked check or does not run, or None if it passes."""
    try:
        return difference(tiny.model, fresh, fresh, tiny.inputs, tiny.watched, tiny.recipe)
    except Exception as error:  # a class may stop with any exception
        return f"it does not run then: {type(error).__name__}: {' '.join(str(error).split())}"


def _shows(tiny: TinyModel, fresh: nn.Module) -> bool:
    """True if a cut changes any output. If it changes none, equal outputs prove nothing."""
    inputs = inputs_left(tiny.model, fresh, tiny.inputs, tiny.recipe)
    if isinstance(inputs, Refusal):
        return True
    with torch.no_grad():
        before = outputs_in_float64(tiny.model, tiny.inputs, tiny.watched, tiny.recipe)
        after = outputs_in_float64(fresh, inputs, tiny.watched, tiny.recipe)
    return any(
        one.shape != two.shape or bool((one - two).norm() > EXACT * one.norm())
        for one, two in zip(before, after, strict=True)
    )


_Left = list[tuple["TinyGroup", Tensor]]
"""Groups, each with the units that stay."""


def _cuts(tiny: TinyModel, finding: Finding) -> Iterator[tuple[dict[FieldPath, int], _Left]]:
    """Yield smaller values of a width's fields, nearest to half first, with the units that stay.

    Every channel group loses the same number of units.
    """
    values, units = tiny.field_map.values, units_of(tiny.field_map, finding.fields)
    for units_left in sorted(range(finding.minimum, units), key=lambda n: abs(2 * n - units)):
        if all(
            units_left * group.per_field_unit % group.channel_groups == 0
            for group in finding.groups
        ):
            smaller = {field: values[field] // units * units_left for field in finding.fields}
            yield (
                smaller,
                [
                    (group, _staying(group, units_left * group.per_field_unit))
                    for group in finding.groups
                ],
            )


def _staying(group: TinyGroup, left: int) -> Tensor:
    """Return the ``left`` units that stay: as many of every channel group, at random places."""
    generator = torch.Generator().manual_seed(left)
    size = group.units // group.channel_groups
    starts = range(0, group.units, size)
    chosen = [
        start + torch.randperm(size, generator=generator)[: left // group.channel_groups]
        for start in starts
    ]
    return torch.cat(chosen).sort().values


def _carried(fresh: nn.Module, original: dict[str, Tensor], groups: _Left) -> str | None:
    """Copy what is left of the original into a smaller build; return why that fails, or None."""
    masks: dict[str, dict[int, Tensor]] = {}
    for group, staying in groups:
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[staying] = False
        for dim in (dim for dim in group.dims if dim.name in original):  # not encoder states
            size = original[dim.name].shape[dim.dim]
            mask = masks.setdefault(dim.name, {}).setdefault(dim.dim, torch.ones(size).bool())
            mask[dim.layout.table(group.units)[gone].flatten()] = False
    computed = compute_unsaved(fresh)
    with torch.no_grad():
        for name, value in _tensors(fresh).items():
            kept = {axis: mask.nonzero().view(-1) for axis, mask in masks.get(name, {}).items()}
            remaining = select(original[name], kept) if kept else original[name]
            if remaining.shape != value.shape:
                return f"{name} has {list(remaining.shape)}, the class builds {list(value.shape)}"
            if name in computed and not torch.equal(remaining, value):
                return (
                    f"{name} is not saved, and computed anew from the config it holds other values"
                )
            value.copy_(remaining)
    return None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer by its name."""
    return {**dict(model.named_parameters()), **saved_buffers(model)}
