"""Leave nothing in a model that a forward pass computed of its weights.

Some classes keep tensors from one pass to the next: LeViT's attention its biases, Mimi its
codebooks, RecurrentGemma its states. With other weights, the next pass would compute with the
tensors of the old ones, and its results would not be those of the first pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..model.config_json import is_own

_Attributes = dict[str, Any]


@contextmanager
def tensors_put_back(model: nn.Module) -> Iterator[None]:
    """While open, modules may keep tensors that they compute; then they get back what they had.

    That is the tensors among a module's own attributes, in dictionaries of its own, and buffers.
    Torch's modules keep none.
    """
    before = [
        (holder, dict(holder))
        for module in model.modules()
        if not type(module).__module__.startswith("torch.nn.")
        for holder in _holders(vars(module))
    ]
    try:
        yield
    finally:
        for holder, had in before:
            _put_back(holder, had)


def _holders(attributes: _Attributes) -> list[_Attributes]:
    """Return the dictionaries of a module that may get tensors; the first is its attributes."""
    own = [value for key, value in attributes.items() if type(value) is dict and is_own(key)]
    return [attributes, attributes["_buffers"], *own]


def _put_back(holder: _Attributes, had: _Attributes) -> None:
    """Give a dictionary its entries back where one of both is a tensor."""
    changed = [
        key
        for key in holder.keys() | had.keys()
        if (value := holder.get(key)) is not (old := had.get(key))
        and (isinstance(value, Tensor) or isinstance(old, Tensor))
    ]
    for key in changed:
        if key in had:
            holder[key] = had[key]
        else:
            del holder[key]
