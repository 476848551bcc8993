"""Compare a config with a checkpoint's tensors: what loads, what does not, what has no place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..model.build import Refusal
from ..model.tensors import ties_of
from .building import Classes, build
from .headers import Stored
from .loading import LoadResult, load_shapes


@dataclass(frozen=True)
class Assessment:
    """How a checkpoint's tensors load into the class built from one config.

    Attributes:
        loaded: what Transformers makes of the tensors.
        lists: name of each list of layers in the model -> how many layers it has.
        lost: tensors of the checkpoint that belong to a part that the model has, but have no place.
        unused: other tensors of the checkpoint that the model has no place for (another head).
        tied: name -> all names under which the model shares that tensor.
    """

    loaded: LoadResult
    lists: dict[str, int]
    lost: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tied: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """True if every tensor of the model is there in its shape, and none is lost."""
        loaded = self.loaded
        return not (loaded.missing or loaded.mismatched or loaded.failed or self.lost)

    @property
    def misplaced(self) -> int:
        """Return how many tensors are missing, have no place, or cannot be put together."""
        return len(self.loaded.missing) + len(self.lost) + len(self.loaded.failed)


def assess(
    classes: Classes, data: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> Assessment | Refusal:
    """Build the class from a config and load the tensors into it, all without data.

    Returns:
        How the tensors load, or the class's refusal of the config.
    """
    model = build(classes, data)
    if isinstance(model, Refusal):
        return model
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name
    }
    modules = {name for name, _ in model.named_modules()}
    buffers = {name for name, _ in model.named_buffers()}
    tied = {name: frozenset(tie.names) for tie in ties_of(model) for name in tie.names}
    loaded = load_shapes(model, tensors)
    prefix = model.base_model_prefix
    lost: list[str] = []
    unused: list[str] = []
    for name in loaded.unexpected:
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        if any(candidate in buffers for candidate in names):
            continue
        belongs = any(_belongs(candidate, lists, modules) for candidate in names)
        (lost if belongs else unused).append(name)
    return Assessment(loaded, lists, tuple(lost), tuple(unused), tied)


def _belongs(name: str, lists: Mapping[str, int], modules: set[str]) -> bool:
    """True if a tensor's name is inside a list of layers, or directly in a module, of the model."""
    parts = name.split(".")
    inside = any(".".join(parts[:end]) in lists for end in range(1, len(parts)))
    return inside or ".".join(parts[:-1]) in modules


def lists_of(name: str, lists: Mapping[str, int], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield each list of layers that a tensor's name is inside, and the layer's number.

    Args:
        name: the tensor's name.
        lists: name of each list of layers in the model -> how many layers it has.
        prefix: the base model's prefix, which ``name`` may lack.
    """
    for full in (name, f"{prefix}.{name}"):
        parts = full.split(".")
        for index, part in enumerate(parts):
            where = ".".join(parts[:index])
            if part.isdecimal() and len(part) < 10 and where in lists:
                yield where, int(part)
