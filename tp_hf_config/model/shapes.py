"""Read the shapes of a model's tensors, and compare those of two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> its shape."""


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all parameters (tied ones under each name) and saved buffers."""
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
    """Yield every module under each of its names."""
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules(remove_duplicate=False)
    return modules


def vanished_counts(old: nn.Module, new: nn.Module) -> list[str]:
    """Return the whole-number attributes that are above 0 in ``old`` and 0 in ``new``.

    Then a field that sets no shape should have changed too: DeepSeek's ``num_key_value_groups`` is
    heads over ``num_key_value_heads``, which its latent attention does not use for any weight.

    Args:
        old: a build of the class.
        new: another build of it, at other values.

    Returns:
        The attributes' full names (``model.layers.0.self_attn.num_key_value_groups``).
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
    """A live tensor whose shape the config does not build.

    Attributes:
        name: the tensor's name.
        shape: its shape in the live model.
        expected: the shape that the config builds; ``None`` if it builds no such tensor.
    """

    name: str
    shape: tuple[int, ...]
    expected: tuple[int, ...] | None

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.name}: found {list(self.shape)}, but the config builds no such tensor"
        return f"{self.name}: found {list(self.shape)}, the config builds {list(self.expected)}"


def compare(live: Shapes, built: Shapes) -> Sequence[Mismatch]:
    """Return a mismatch for every live tensor that the build lacks or has in another shape."""
    return [
        Mismatch(name, shape, built.get(name))
        for name, shape in live.items()
        if built.get(name) != shape
    ]
