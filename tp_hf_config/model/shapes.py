"""Read the shapes of a model's tensors, and compare those of two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]  # by tensor name


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters (tied ones under each name) and saved buffers."""
    result: dict[str, tuple[int, ...]] = {}
    buffers: dict[str, tuple[int, ...]] = {}
    visited: set[int] = set()
    for module_name, module in named_modules(model):
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                result[prefix + name] = tuple(parameter.shape)
        hidden = module._non_persistent_buffers_set
        for name, buffer in module._buffers.items() if id(module) not in visited else ():
            if buffer is not None and name not in hidden:
                buffers[prefix + name] = tuple(buffer.shape)
        visited.add(id(module))
    return result | buffers


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules(remove_duplicate=False)
    return modules


def vanished_counts(old: nn.Module, new: nn.Module) -> list[str]:
    """Names of int attributes that are positive in ``old`` and 0 in ``new``.

    Then a field that sets no shape should have changed too: DeepSeek's ``num_key_value_groups`` is
    heads over ``num_key_value_heads``, which sets no weight's shape in its latent attention.
    """
    before = dict(old.named_modules())
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in new.named_modules()
        for key, value in vars(module).items()
        if type(value) is int and value == 0
        for was in [vars(before[name]).get(key) if name in before else None]
        if type(was) is int and was > 0
    ]


@dataclass(frozen=True)
class Mismatch:
    name: str
    shape: tuple[int, ...]  # in the live model
    expected: tuple[int, ...] | None  # built from the config; None: no such tensor

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.name}: found {list(self.shape)}, but the config builds no such tensor"
        return f"{self.name}: found {list(self.shape)}, the config builds {list(self.expected)}"


def compare(live: Shapes, built: Shapes) -> Sequence[Mismatch]:
    return [
        Mismatch(name, shape, built.get(name))
        for name, shape in live.items()
        if built.get(name) != shape
    ]
