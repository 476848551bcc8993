"""Which field says into how many classes the units of a group fall, by experiment.

Mamba 2's heads share states in as many groups as ``n_groups`` says, a number that no layer shows.
The tiny copy is built with another number: units of the field that counts their classes fall into
as many then.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from .miniature import Miniature, randomise
from .proofs import Group, classes_of
from .reach import why_not
from .reference import FieldPath, Refusal, shapes
from .twins import Dim, TwinTest


def counted_by(group: Group, mini: Miniature) -> list[FieldPath]:
    """The fields that are seen to count the classes of a group's units."""
    numbers = mini.known.values | mini.known.silent
    alike = [path for path, value in numbers.items() if value == group.classes]
    return [path for path in alike if path not in group.fields and _counts(path, group, mini)]


def _counts(path: FieldPath, group: Group, mini: Miniature) -> bool:
    """Whether units fall into as many classes as a field says, at every other number that runs.

    One would not do: of a common multiple with another field (SqueezeBERT) it may be the larger.
    """
    others = [n for n in range(1, group.units) if group.units % n == 0 and n != group.classes]
    ran = False
    for number in others:
        model = _with_other(mini, path, number)
        if model is None:
            continue
        ran, dims = True, _moved(group, mini, model)
        if dims is None or _classes(group, mini, model, dims) != number:
            return False
    return ran


def _classes(group: Group, mini: Miniature, model: nn.Module, dims: list[Dim]) -> int | None:
    runs = sorted({dim.layout.parts * dim.layout.run for dim in dims})
    return classes_of(TwinTest(model, mini.inputs, group.units, runs, mini.watched), dims)


def _with_other(mini: Miniature, path: FieldPath, number: int) -> nn.Module | None:
    """The tiny copy with another number of classes and random weights, where it runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mini.known.builder.build_real(mini.known.config_at({path: number}))
        if isinstance(model, Refusal):
            return None
        randomise(model)
    return model if why_not(model, mini.inputs) is None else None


def _moved(group: Group, mini: Miniature, model: nn.Module) -> list[Dim] | None:
    """A group's dimensions in another build, in which what is not of its units is longer.

    ``None``: the units themselves are others there.
    """
    was, now = shapes(mini.model), shapes(model)
    found = []
    for dim in group.dims if was.keys() == now.keys() else ():
        layout, size = dim.layout, was[dim.name][dim.dim]
        longer = now[dim.name][dim.dim] - size
        rest = size - group.units * layout.parts * layout.run
        if longer and (layout.gap or not rest or rest + longer < 0):
            return None
        offset = layout.offset + longer if layout.offset else 0
        found.append(replace(dim, layout=replace(layout, offset=offset)))
    return found or None
