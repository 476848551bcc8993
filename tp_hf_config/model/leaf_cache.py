"""Build a torch layer once for each set of arguments; after that, copy it.

Learning builds a class hundreds of times, and most of a build is layers that no change touches.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    _BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Embedding,
)
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device}
_CONTAINERS = {dict, OrderedDict, list, set}
_MOST = 10_000  # layers in the cache before it is emptied


class _Leaf(NamedTuple):
    """A layer after its constructor; every copy gets its own Parameters and buffers.

    Attributes:
        attributes: the layer's instance attributes.
        parameters: name -> the parameter's data, and whether it requires gradients.
        buffers: name -> buffer.
    """

    attributes: dict[str, Any]
    parameters: dict[str, tuple[torch.Tensor, bool]]
    buffers: dict[str, torch.Tensor]


_leaves: dict[Any, _Leaf] = {}


@contextmanager
def copied_leaves() -> Iterator[None]:
    """While open, this thread's torch layers are copies of the first one with equal arguments.

    Use it only for builds without data: there, equal arguments always give equal layers.
    """
    thread = threading.get_ident()
    constructors = {kind: kind.__init__ for kind in _KINDS}
    try:
        for kind, constructor in constructors.items():
            setattr(kind, "__init__", _copying(constructor, thread))
        yield
    finally:
        for kind, constructor in constructors.items():
            setattr(kind, "__init__", constructor)


def _copying(constructor: Any, thread: int) -> Any:
    """Return a constructor that copies a cached layer where it can, and else calls the real one."""

    @wraps(constructor)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        kinds = (*map(type, given),)
        fresh = not vars(self)  # a subclass may have set attributes before
        if not fresh or threading.get_ident() != thread or not all(map(_is_plain, given)):
            constructor(self, *args, **kwargs)
            return
        key = (type(self), torch.get_default_dtype(), args, *kwargs.items(), *kinds)
        cached = _leaves.get(key)
        if cached is None:
            constructor(self, *args, **kwargs)
            if len(_leaves) >= _MOST:
                _leaves.clear()
            if not self._modules:
                _leaves[key] = _leaf_of(self)
        else:
            _copy(cached, self)

    return __init__


def _is_plain(value: Any) -> bool:
    """True if a value can be part of a cache key: plain, or a tuple of plain values."""
    return all(map(_is_plain, value)) if type(value) is tuple else type(value) in _PLAIN


def _leaf_of(layer: nn.Module) -> _Leaf:
    parameters = {
        name: (tensor.data, tensor.requires_grad)
        for name, tensor in layer._parameters.items()
        if tensor is not None
    }
    buffers = {name: tensor for name, tensor in layer._buffers.items() if tensor is not None}
    return _Leaf(_contents(vars(layer)), parameters, buffers)


def _copy(leaf: _Leaf, layer: nn.Module) -> None:
    vars(layer).update(_contents(leaf.attributes))
    for name, (data, trained) in leaf.parameters.items():
        layer._parameters[name] = nn.Parameter(data, trained)
    for name, buffer in leaf.buffers.items():
        layer._buffers[name] = buffer.detach()


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes with a copy of every container, so that layers share none."""
    return {
        name: value.copy() if type(value) in _CONTAINERS else value
        for name, value in attributes.items()
    }
