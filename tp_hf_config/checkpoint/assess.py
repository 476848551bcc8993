"""A config against the tensors of a checkpoint: what loads, what does not, what belongs nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..reference import Refusal
from .building import Classes, build
from .headers import Stored
from .loading import Loaded, load_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Assessment:
    """One config and the checkpoint's tensors.

    Attributes:
        loaded: what Transformers makes of the tensors.
        lists: the model's lists of layers, and how long they are.
        lost: tensors of the checkpoint that belong to a part which the model has, without a place.
        unused: other tensors of the checkpoint that the model has no place for (another head).
        tied: names of the model that share a tensor, by name.
    """

    loaded: Loaded
    lists: dict[str, int]
    lost: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tied: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Every tensor of the model is there, in its shape, and none is lost."""
        found = self.loaded
        return not (found.missing or found.mismatched or found.failed or self.lost)

    @property
    def misplaced(self) -> int:
        """How many tensors are missing or have no place."""
        return len(self.loaded.missing) + len(self.lost) + len(self.loaded.failed)


def assess(
    classes: Classes, data: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> Assessment | Refusal:
    """Build the class from a config and load the tensors into it, all without data."""
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
    tied = _tied(model)
    loaded = load_shapes(model, tensors)
    prefix = model.base_model_prefix
    lost: list[str] = []
    unused: list[str] = []
    for name in loaded.unknown:
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        if any(one in buffers for one in names):
            continue
        known = any(_belongs(one, lists, modules) for one in names)
        (lost if known else unused).append(name)
    return Assessment(loaded, lists, tuple(lost), tuple(unused), tied)


def _belongs(name: str, lists: Mapping[str, int], modules: set[str]) -> bool:
    """Whether a tensor would be in a list of layers, or in a module, that the model has."""
    parts = name.split(".")
    inside = any(".".join(parts[:end]) in lists for end in range(1, len(parts)))
    return inside or ".".join(parts[:-1]) in modules


def _tied(model: PreTrainedModel) -> dict[str, frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    groups = (frozenset(group) for group in names.values() if len(group) > 1)
    return {name: group for group in groups for name in group}


def lists_of(name: str, lists: Mapping[str, int], prefix: str = "") -> Iterator[tuple[str, int]]:
    """The lists of layers of the model that a tensor is or would be in, and the layer's number."""
    for full in (name, f"{prefix}.{name}"):
        parts = full.split(".")
        for index, part in enumerate(parts):
            where = ".".join(parts[:index])
            if part.isdecimal() and len(part) < 10 and where in lists:
                yield where, int(part)
