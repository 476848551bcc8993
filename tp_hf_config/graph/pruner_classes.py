"""Torch-Pruning's pruner classes, and the subclasses that others make of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch_pruning as tp

BasePruner: Any = tp.pruner.BasePruner


def family(cls: Any = BasePruner) -> Iterator[Any]:
    """Yield a pruner class and all its subclasses, recursively; by default every pruner class."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from family(subclass)
