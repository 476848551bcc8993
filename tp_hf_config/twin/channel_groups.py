"""Find which field says how many channel groups the units of a group form, by experiment.

Mamba 2's heads share states in as many groups as ``n_groups`` says, a number that no layer shows.
The tiny model is built with another number: with the field that counts them, units form as many
channel groups as it says then.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..forward.coverage import why_not
from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..model.shapes import shapes
from .group import TinyGroup
from .layout import TensorDim
from .prove import channel_groups_of
from .tiny.tiny_model import TinyModel, randomise
from .twin_test import TwinTest


def counted_by(group: TinyGroup, tiny: TinyModel) -> list[FieldPath]:
    """Return the fields that are seen to count the channel groups of a group."""
    numbers = tiny.field_map.values | tiny.field_map.silent
    alike = [field for field, value in numbers.items() if value == group.channel_groups]
    return [field for field in alike if field not in group.fields and _counts(field, group, tiny)]


def _counts(field: FieldPath, group: TinyGroup, tiny: TinyModel) -> bool:
    """True if units form as many channel groups as a field says, at every other number that runs.

    One number is not enough: if the channel groups are a common multiple of this field and another
    (SqueezeBERT), this one may be the larger. False if no other number runs.
    """
    others = [
        n for n in range(1, group.units) if group.units % n == 0 and n != group.channel_groups
    ]
    ran = False
    for number in others:
        model = _with_other(tiny, field, number)
        if model is None:
            continue
        ran, dims = True, _moved(group, tiny, model)
        if dims is None or _classes(group, tiny, model, dims) != number:
            return False
    return ran


def _classes(
    group: TinyGroup, tiny: TinyModel, model: nn.Module, dims: list[TensorDim]
) -> int | None:
    """Return the number of channel groups in another build; None: no permutation is neutral."""
    runs = sorted({dim.layout.parts * dim.layout.run for dim in dims})
    return channel_groups_of(TwinTest(model, tiny.inputs, group.units, runs, tiny.watched), dims)


def _with_other(tiny: TinyModel, field: FieldPath, number: int) -> nn.Module | None:
    """Return the tiny model built with another value of a field and random weights.

    ``None``: it cannot be built, or does not run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny.field_map.builder.build_real(tiny.field_map.config_at({field: number}))
        if isinstance(model, Refusal):
            return None
        randomise(model)
    return model if why_not(model, tiny.inputs) is None else None


def _moved(group: TinyGroup, tiny: TinyModel, model: nn.Module) -> list[TensorDim] | None:
    """Return the tensor dims of a group in another build, where the rest of them may be longer.

    The rest is what is not of its units. ``None``: the units themselves changed.
    """
    was, now = shapes(tiny.model), shapes(model)
    dims = []
    for dim in group.dims if was.keys() == now.keys() else ():
        layout, size = dim.layout, was[dim.name][dim.dim]
        longer = now[dim.name][dim.dim] - size
        rest = size - group.units * layout.parts * layout.run
        if longer and (layout.gap or not rest or rest + longer < 0):
            return None
        offset = layout.offset + longer if layout.offset else 0
        dims.append(replace(dim, layout=replace(layout, offset=offset)))
    return dims or None
