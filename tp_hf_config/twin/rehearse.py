"""Rehearse a cut on the tiny model: build the class smaller and run the masked check on it.

A permutation shows that units are interchangeable, but not that the class counts them in this way:
with as many heads as dimensions in a head, one dimension of every head looks like one head. So the
class is built from the smaller config with the weights of the units that stay. It has to equal the
original with the removed units at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..fieldmap.unit_shares import units_of
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.shortage import note_shortage
from ..model.tensors import compute_unsaved, parameter_names, put_parameter, saved_buffers, select
from .masked_check import EXACT, difference_of_pass, pruned_pass
from .width_scalars import CutDim

if TYPE_CHECKING:
    from .group import Finding, TinyGroup
    from .tiny.tiny_model import TinyModel

_BLIND_CUTS = 4
"""After this many cuts that change no output, no more are tried."""


def rehearse(tiny: TinyModel, finding: Finding) -> Refusal | None:
    """Cut about half of a tiny width and compare; return why the width cannot be cut, or None.

    A smaller build has to equal the original with the removed units at zero. It may compute
    something else, no cut may change an output, or the class may refuse every cut.
    """
    name = " and ".join(map(field_name, finding.fields))
    original = own_tensors(tiny.model)
    blind_cuts, unbuilt = 0, ""
    for values, staying in _cuts(tiny, finding):
        smaller = tiny.field_map.builder.build_unfilled(tiny.field_map.config_at(values))
        if isinstance(smaller, Refusal):
            unbuilt = f": {smaller.reason}"
            continue
        smaller.tie_weights()  # type: ignore[operator]
        added = min(own_tensors(smaller).keys() - original.keys(), default=None)
        if added is not None:  # Jamba's layers with a single expert have no experts
            unbuilt = f": it builds {added} then"
            continue
        outputs = fill(smaller, original, staying) or _outputs(tiny, smaller)
        if isinstance(outputs, Refusal):
            return Refusal(
                f"with less of {name} the class computes something else than is left: "
                f"{outputs.reason}"
            )
        if _is_change(tiny.outputs, outputs):
            return None
        blind_cuts += 1  # only padding of a sound may be left: other cuts may show more
        if blind_cuts == _BLIND_CUTS:
            break
    if blind_cuts:
        return Refusal(f"less of {name} changes no output, so that nothing shows what is left")
    return Refusal(
        f"less of {name} cannot be built in the tiny model, so that nothing shows it{unbuilt}"
    )


def _outputs(tiny: TinyModel, smaller: nn.Module) -> list[Tensor] | Refusal:
    """Return the outputs of a smaller build, or why it fails the masked check or does not run."""
    given = (tiny.inputs, tiny.watched, tiny.recipe)
    try:
        run = pruned_pass(tiny.model, smaller, *given)
        if isinstance(run, Refusal):
            return run
        return difference_of_pass(run, tiny.model, smaller, *given) or run.outputs
    except Exception as error:  # a class may stop with any exception
        note_shortage(error)
        text = " ".join(str(error).split())
        return Refusal(f"it does not run then: {type(error).__name__}: {text}")


def _is_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """True if a cut changes any output. If it changes none, equal outputs prove nothing."""
    return any(
        old.shape != new.shape or bool((old - new).norm() > EXACT * old.norm())
        for old, new in zip(before, after, strict=True)
    )


_Staying = list[tuple["TinyGroup", Tensor]]
"""Groups, each with the units that stay."""


def _cuts(tiny: TinyModel, finding: Finding) -> Iterator[tuple[dict[FieldPath, int], _Staying]]:
    """Yield smaller values of a width's fields, nearest to half first, with the units that stay."""
    values, units = tiny.field_map.values, units_of(tiny.field_map, finding.fields)
    for count in sorted(range(finding.minimum, units), key=lambda n: abs(2 * n - units)):
        counts = [(group, count * group.per_field_unit) for group in finding.groups]
        if all(number % group.channel_groups == 0 for group, number in counts):
            smaller = {field: values[field] // units * count for field in finding.fields}
            yield smaller, [(group, _random_units(group, number)) for group, number in counts]


def _random_units(group: TinyGroup, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    size, per_channel_group = group.units // group.channel_groups, count // group.channel_groups
    chosen = [
        start + torch.randperm(size, generator=generator)[:per_channel_group]
        for start in range(0, group.units, size)
    ]
    return torch.cat(chosen).sort().values


def fill(smaller: nn.Module, original: dict[str, Tensor], groups: _Staying) -> Refusal | None:
    """Give a smaller build the units that stay; return why that fails, or None.

    Parameters of which all stays are those of the original (:func:`own_tensors`); with no groups,
    that is every one.
    """
    masks: dict[str, dict[int, Tensor]] = {}
    for group, staying in groups:
        removed = CutDim(group.units, staying).removed
        for dim in (dim for dim in group.dims if dim.name in original):  # not encoder states
            size = original[dim.name].shape[dim.dim]
            mask = masks.setdefault(dim.name, {}).setdefault(dim.dim, torch.ones(size).bool())
            mask[dim.layout.table(group.units)[removed].flatten()] = False
    computed = compute_unsaved(smaller)
    names = {names[0]: names for names in parameter_names(smaller).values()}
    for name, value in own_tensors(smaller).items():
        kept = {axis: mask.nonzero().view(-1) for axis, mask in masks.get(name, {}).items()}
        cut = select(original[name].detach(), kept) if kept else original[name]
        if cut.shape != value.shape:
            return Refusal(f"{name} has {list(cut.shape)}, the class builds {list(value.shape)}")
        if name in computed and not torch.equal(cut, value):
            return Refusal(
                f"{name} is not saved, and computed anew from the config it holds other values"
            )
        if name not in names:  # a buffer
            value.copy_(cut.detach())
            continue
        put_parameter(
            smaller, names[name], cut if isinstance(cut, nn.Parameter) else nn.Parameter(cut)
        )
    return None


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer by its name, tied ones by their first."""
    return {**dict(model.named_parameters()), **saved_buffers(model)}
