"""Prove the groups of one width: a permutation decides on what the twin test linked."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import listed
from ..fieldmap.names_in_code import names_of
from ..model.config_json import FieldPath
from .group import Finding, TinyGroup, as_in_like_layers, in_parts_alike
from .layout import TensorDim
from .links import Links
from .twin_test import TwinTest


def named(dims: Sequence[TensorDim]) -> str:
    """Return three parameter names as text, and how many more there are; like layers count once."""
    return listed(list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", dim.name) for dim in dims)))


def proved(
    test: TwinTest,
    sources: Mapping[TensorDim, FieldPath | None],
    fields: tuple[FieldPath, ...],
    links: Links,
) -> Finding:
    """Return the linked groups with their unobserved companions, each proved by permutation.

    A finding's reason is that no permutation is neutral in a group, that no output depends on some
    tensor dims, or that there is no group. ``sources`` are the fields that set the tensor dims.
    """
    groups: list[TinyGroup] = []
    members, unplaced = _members(test, links)
    for group in members:
        channel_groups = channel_groups_of(test, group)
        if channel_groups is None or not test.alike(group, channel_groups):
            reason = f"no permutation of units is neutral in {named(group)}"
            return Finding(fields, reason=reason, disproved=True)
        by_field = tuple(sources[dim] for dim in group)
        groups.append(TinyGroup(fields, tuple(group), by_field, test.units, channel_groups))
    groups = as_in_like_layers(groups)
    unobserved = tuple(dim.name for dim in unplaced)
    if unplaced and test.unused(unobserved):
        groups, unplaced = in_parts_alike(test.model, groups, unplaced)
    stream = _stream(test, unplaced, groups) if unplaced else None
    if unplaced and stream is None:
        reason = f"the outputs do not depend on {named(unplaced)}"
        return Finding(fields, tuple(groups), reason, unobserved=True)
    if not groups:
        return Finding(fields, reason="it sets no parameter that the outputs depend on")
    if stream is not None:
        stream_group = groups[stream]
        added = tuple(sources[dim] for dim in unplaced)
        groups[stream] = replace(
            stream_group,
            dims=(*stream_group.dims, *unplaced),
            sources=(*stream_group.sources, *added),
        )
    return Finding(fields, tuple(groups), unobserved_parameters=unobserved)


def second_look(
    test: TwinTest,
    sources: Mapping[TensorDim, FieldPath | None],
    fields: tuple[FieldPath, ...],
    links: Links,
) -> Finding | None:
    """Return the finding after a second twin test that disturbs every tensor dim in doubt.

    A group that is not proved lacks tensor dims that are linked too faintly to show. All in doubt
    together lack none: if no permutation of these is neutral, they belong nowhere, and ``None`` is
    returned. If one is, and they are not seen to be several groups, they are one, and units are
    removed from all of them at once.
    """
    doubted = _doubted(test, links)
    if not doubted or channel_groups_of(test, doubted) is None:
        return None
    links = test.links(list(sources), doubted=doubted, still_doubted=partial(_doubted, test))
    finding = proved(test, sources, fields, links)
    still_doubted = _doubted(test, links) if finding.disproved else []
    if not still_doubted or channel_groups_of(test, still_doubted) is None:
        return finding
    settled = [group for group in links.groups if not {*group} & {*still_doubted}]
    unobserved = tuple(dim for dim in links.unobserved if dim not in still_doubted)
    joined = Links((*settled, tuple(still_doubted)), links.unequal, unobserved)
    return proved(test, sources, fields, joined)


def _members(test: TwinTest, links: Links) -> tuple[list[list[TensorDim]], list[TensorDim]]:
    """Return the linked groups with unobserved companions, and unobserved dims without a group."""
    unplaced: list[TensorDim] = []
    members: list[list[TensorDim]] = [list(group) for group in links.groups]
    for vectors in [g for g in members if all(test.parameters[d.name].ndim == 1 for d in g)]:
        # before an almost closed activation, no link from a bias to its weight shows
        others = [group for group in members if group is not vectors]
        homes = [companion(dim, others) for dim in vectors]
        if homes[0] is not None and all(home is homes[0] for home in homes):
            homes[0].extend(vectors)
            members = others
    for dim in links.unobserved:
        group = _group_of_copy(test, dim, members) or companion(dim, members)
        (unplaced if group is None else group).append(dim)
    return members, unplaced


def _doubted(test: TwinTest, links: Links) -> list[TensorDim]:
    """Return the tensor dims in doubt: of unproved groups, and unobserved ones if any is used."""
    members, unplaced = _members(test, links)
    unproved = (group for group in members if channel_groups_of(test, group) is None)
    used = [] if test.unused(dim.name for dim in unplaced) else unplaced
    return list(dict.fromkeys(chain(*unproved, used)))


def _stream(test: TwinTest, unused: Sequence[TensorDim], groups: Sequence[TinyGroup]) -> int | None:
    """Return the index of the group that unused vectors go with, or None: the residual stream.

    The class has such vectors and does not use them: the token of a mask that was not given
    (DINOv2), a tensor without elements (DINOv3), a layer that no code reads (Qwen2.5-Omni's table,
    MarkupLM's projection). If all channels of a single group of the width are interchangeable, and
    a norm is in it, it is the residual stream. They can only belong there, channel by channel. If
    there are several such groups (MBart's encoder and decoder have each their own table, which
    ``shared`` is not), a layer that no code reads may go with any. It goes with the first that has
    a tensor of its shape.
    """
    layouts = {dim.layout for dim in unused}
    streams = [
        number
        for number, group in enumerate(groups)
        if group.channel_groups == 1
        and any(d.layout in layouts and _is_in_norm(test.model, d) for d in group.dims)
    ]
    if len(streams) > 1 and all(is_unread(test.model, dim.layer) for dim in unused):
        shapes = _shapes(test, unused)
        streams = [number for number in streams if shapes <= _shapes(test, groups[number].dims)][:1]
    fits = (
        len(streams) == len(layouts) == 1
        and all(_fills(test, dim) and _is_of_vectors(test, dim) for dim in unused)
        and test.unused(dim.name for dim in unused)
    )
    return streams[0] if fits else None


def _shapes(test: TwinTest, dims: Sequence[TensorDim]) -> set[tuple[int, torch.Size]]:
    """Return the dimension of each tensor dim, with the shape of its tensor."""
    return {(dim.dim, test.parameters[dim.name].shape) for dim in dims}


def _is_of_vectors(test: TwinTest, dim: TensorDim) -> bool:
    """True if a parameter is empty or a vector along this dim, or of a layer that no code reads."""
    parameter = test.parameters[dim.name]
    vector = parameter.numel() in (0, max(parameter.shape))
    return vector or is_unread(test.model, dim.layer)


def _fills(test: TwinTest, dim: TensorDim) -> bool:
    """True if units fill a dimension, in one block without offset and gaps."""
    size = test.units * dim.layout.parts * dim.layout.run
    return dim.layout.is_plain and size == test.parameters[dim.name].shape[dim.dim]


def _is_in_norm(model: nn.Module, dim: TensorDim) -> bool:
    """True if a parameter is of a norm or a scale: its module's own parameters are all vectors."""
    own = list(model.get_submodule(dim.layer).parameters(recurse=False))
    return bool(own) and all(parameter.ndim == 1 for parameter in own)


def companion(unobserved: TensorDim, groups: Sequence[list[TensorDim]]) -> list[TensorDim] | None:
    """Return the group with the outputs of the layer of an unobserved tensor dim, or None."""
    output = (unobserved.layer, 0, unobserved.layout)
    return next((g for g in groups if any((d.layer, d.dim, d.layout) == output for d in g)), None)


def _group_of_copy(
    test: TwinTest, unobserved: TensorDim, groups: Sequence[list[TensorDim]]
) -> list[TensorDim] | None:
    """Return the group with the same dimension of a like tensor in the same layer, or None.

    A like tensor has the same shape: I-BERT keeps integers for every weight, which are only read
    once it is quantised.
    """

    def is_copy(dim: TensorDim) -> bool:
        same = dim != unobserved == replace(dim, name=unobserved.name)
        shapes = [test.parameters[name].shape for name in (dim.name, unobserved.name)]
        return same and dim.layer == unobserved.layer and shapes[0] == shapes[1]

    return next((group for group in groups if any(map(is_copy, group))), None)


def channel_groups_of(test: TwinTest, dims: Sequence[TensorDim]) -> int | None:
    """Return in how many channel groups a permutation has to stay to be neutral; None: none is."""
    for channel_groups in (n for n in range(1, test.units) if test.units % n == 0):
        if test.proves(dims, list(order_of(test.units, channel_groups, swap=True))):
            is_neutral = test.proves(dims, list(order_of(test.units, channel_groups, swap=False)))
            return channel_groups if is_neutral else None
    return None


def order_of(units: int, channel_groups: int, swap: bool) -> Iterator[int]:
    """Yield an order of the units that moves none to another channel group.

    With ``swap`` only the first and last unit of the first one change places; else it is random.
    """
    size = units // channel_groups
    generator = torch.Generator().manual_seed(units)
    for start in range(0, units, size):
        if swap:
            order = list(range(size))
            if start == 0:
                order[0], order[-1] = order[-1], order[0]
        else:
            order = torch.randperm(size, generator=generator).tolist()
        yield from (start + unit for unit in order)


_MAKERS = ("__init__",)
"""The methods that make layers."""
_ACCESSORS = ("get_input_embeddings", "set_input_embeddings")
"""Methods that only hand over a layer: what nobody calls runs nothing (MBart's ``shared``)."""


def is_unread(model: nn.Module, layer: str) -> bool:
    """True if no code reads this layer's attribute: only ``__init__`` and accessors name it.

    This looks at all code of the Python modules that define the classes of the model.
    """
    names = [part for part in layer.split(".") if not part.isdigit()]
    sources = {type(module).__module__ for module in model.modules()}
    return bool(names) and not any(names[-1] in _named_in(source) for source in sources)


@cache
def _named_in(source: str) -> frozenset[str]:
    """Return all names in a module's code, but of ``__init__`` and accessors that nothing calls."""
    functions = [f for f in _functions(sys.modules[source], source) if f.__name__ not in _MAKERS]
    names = _names([f for f in functions if f.__name__ not in _ACCESSORS])
    return names | _names([f for f in functions if f.__name__ in names.intersection(_ACCESSORS)])


def _names(functions: Iterable[FunctionType]) -> frozenset[str]:
    """Return all names and texts in the code of some functions."""
    return frozenset(name for function in functions for name in names_of(function.__code__))


def _functions(source: ModuleType, defined_in: str) -> Iterator[FunctionType]:
    """Yield the functions that a Python module has or imports, and those of its own classes."""
    values = list(vars(source).values())
    for cls in [value for value in values if inspect.isclass(value)]:
        if cls.__module__ == defined_in:
            values += vars(cls).values()
    for value in values:
        yield from _unwrapped(value)


def _unwrapped(value: Any) -> Iterator[FunctionType]:
    """Yield the functions behind a method, a property or a decorator."""
    if isinstance(value, property):
        values = [value.fget, value.fset]
    else:
        values = [getattr(value, "__func__", value)]
    for function in values:
        while isinstance(function, FunctionType):
            yield function
            function = getattr(function, "__wrapped__", None)
