"""Layers of torch that are built with the same arguments again and again: made once, then copied.

Learning builds a class hundreds of times, and most of a build is the layers that no change touches.
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
_MOST = 10_000


class _Made(NamedTuple):
    """What a constructor left; of the tensors each copy has its own."""

    attributes: dict[str, Any]
    parameters: dict[str, tuple[torch.Tensor, bool]]
    buffers: dict[str, torch.Tensor]


_made: dict[Any, _Made] = {}


@contextmanager
def copied_leaves() -> Iterator[None]:
    """Inside, this thread's layers of torch are copies of the first one like each.

    Only for builds without data, which all make the same of the same arguments.
    """
    thread = threading.get_ident()
    own = {kind: kind.__init__ for kind in _KINDS}
    try:
        for kind, constructor in own.items():
            setattr(kind, "__init__", _copying(constructor, thread))
        yield
    finally:
        for kind, constructor in own.items():
            setattr(kind, "__init__", constructor)


def _copying(constructor: Any, thread: int) -> Any:
    """The constructor, which copies where it can."""

    @wraps(constructor)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        kinds = (*map(type, given),)
        fresh = not vars(self)  # a class of its own may have set something first
        if not fresh or threading.get_ident() != thread or not all(map(_is_plain, given)):
            constructor(self, *args, **kwargs)
            return
        key = (type(self), torch.get_default_dtype(), args, *kwargs.items(), *kinds)
        made = _made.get(key)
        if made is None:
            constructor(self, *args, **kwargs)
            if len(_made) >= _MOST:
                _made.clear()
            if not self._modules:
                _made[key] = _remembered(self)
        else:
            _copy(made, self)

    return __init__


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) is tuple else type(value) in _PLAIN


def _remembered(layer: nn.Module) -> _Made:
    parameters = {
        name: (one.data, one.requires_grad)
        for name, one in layer._parameters.items()
        if one is not None
    }
    buffers = {name: one for name, one in layer._buffers.items() if one is not None}
    return _Made(_contents(vars(layer)), parameters, buffers)


def _copy(made: _Made, layer: nn.Module) -> None:
    vars(layer).update(_contents(made.attributes))
    for name, (data, trained) in made.parameters.items():
        layer._parameters[name] = nn.Parameter(data, trained)
    for name, buffer in made.buffers.items():
        layer._buffers[name] = buffer.detach()


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes with containers of their own."""
    return {
        name: value.copy() if type(value) in _CONTAINERS else value
        for name, value in attributes.items()
    }
