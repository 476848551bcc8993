"""Read parameters and buffers by name, and find tied weights.

A tied weight is one Parameter with several names. Torch-Pruning replaces it under each name
separately, which unties it silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .build import Refusal
from .paging import is_paged, new_empty

PIECE = 1 << 20  # bytes per step; small enough that the next step reuses it in the CPU cache
# words are summed by position modulo this prime, so that a checksum depends on their order
_COLUMNS = 1021
_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> dtype


def select(tensor: torch.Tensor, positions: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Copy some positions of some dimensions (dim -> 1-d index tensor; at least one dim)."""
    (dim, index), *others = sorted((d, i.to(tensor.device)) for d, i in positions.items())
    shape = [len(positions[d]) if d in positions else n for d, n in enumerate(tensor.shape)]
    result = new_empty(tensor, shape)
    if not others:
        return _select_along(tensor, dim, index, result)
    last, last_index = others[-1]
    # a few rows at a time, because intermediate tensors would need memory
    rows = max(1, PIECE * tensor.shape[dim] // max(1, tensor.nbytes))
    for start in range(0, len(index), rows):
        piece = tensor.index_select(dim, index[start : start + rows])
        for other, other_index in others[:-1]:
            piece = piece.index_select(other, other_index)
        _select_along(piece, last, last_index, result.narrow(dim, start, piece.shape[dim]))
    return result


def _select_along(
    tensor: torch.Tensor, dim: int, index: torch.Tensor, result: torch.Tensor
) -> torch.Tensor:
    """Fill ``result`` with some positions of one dimension, and return it."""
    # gather is 2 to 5 times as fast as index_select on the last dimension, but lacks some dtypes
    if dim == tensor.ndim - 1 > 0:
        bits = _OF_SIZE.get(tensor.dtype.itemsize, tensor.dtype)
        numbers, target = tensor.view(bits), result.view(bits)
        torch.gather(numbers, dim, index.expand(result.shape), out=target)
        return result
    return torch.index_select(tensor, dim, index, out=result)


@dataclass(frozen=True)
class Tie:
    """Names that share one Parameter."""

    names: tuple[str, ...]  # in the model's order
    parameter: nn.Parameter  # when the tie was found

    def pruned(self, model: nn.Module) -> list[str]:
        """Return the names that now hold another Parameter."""
        # others are of layers the pruner did not see (T5's shared)
        return [name for name in self.names if model.get_parameter(name) is not self.parameter]

    def keeper(self, model: nn.Module) -> str:
        """The name whose Parameter all names get: the first pruned one, or the first."""
        return next(iter(self.pruned(model)), self.names[0])

    def conflict(self, model: nn.Module) -> Refusal | None:
        """Return why the names cannot share one Parameter again; ``None`` if they can."""
        first, *others = self.pruned(model) or self.names[:1]
        weight = model.get_parameter(first)
        refusal = shapes_apart({n: tuple(model.get_parameter(n).shape) for n in (first, *others)})
        if refusal is not None:
            return refusal
        for name in others:
            other = model.get_parameter(name)
            if other is not weight and not torch.equal(other, weight):
                return channels_apart(first, name)
        return None


def shapes_apart(shapes: Mapping[str, tuple[int, ...]]) -> Refusal | None:
    """Return why names with these shapes cannot share one Parameter, or ``None``."""
    (first, shape), *others = shapes.items()
    for name, other in others:
        if other != shape:
            return Refusal(
                f"{first} has shape {list(shape)} and {name} {list(other)}, but they are tied, one "
                "weight under two names"
            )
    return None


def channels_apart(first: str, other: str) -> Refusal:
    return Refusal(
        f"{first} and {other} are tied, one weight under two names, but lost different channels"
    )


def parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def put_parameter(model: nn.Module, names: Sequence[str], parameter: nn.Parameter) -> None:
    for module, key in (owner(model, name) for name in names):
        setattr(module, key, parameter)  # setattr, because an LSTM also keeps a list of them


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The floating point buffers that are saved with the model (a router's bias)."""
    return {
        f"{name}.{key}".lstrip("."): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
        and buffer.is_floating_point()
        and key not in module._non_persistent_buffers_set
    }


def tensor(model: nn.Module, name: str) -> torch.Tensor:
    module, key = owner(model, name)
    value: torch.Tensor = getattr(module, key)
    return value


def ties_of(model: nn.Module) -> list[Tie]:
    return [
        Tie(tuple(names), parameter)
        for parameter, names in parameter_names(model).items()
        if len(names) > 1
    ]


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return a value that changes whenever a weight does: a checksum of each parameter."""
    return tuple(
        # writes through .data (merged adapter, moving average) change no version counter
        (name, parameter.dtype, tuple(parameter.shape), _checksum(parameter))
        if type(parameter) is nn.Parameter and not parameter.is_meta and not is_paged()
        # gathered from shards, or paged: not read
        else (name, id(parameter), tuple(parameter.shape), parameter._version)
        for name, parameter in model.named_parameters()
    )


def _checksum(values: torch.Tensor) -> int:
    """A number that depends on every bit; the tensor is read once, at memory speed."""
    bits = values.detach().flatten().view(torch.uint8)
    if len(bits) % 8 or bits.storage_offset() % 8:
        bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)])
    words = bits.view(torch.int64)
    rows = len(words) // _COLUMNS
    sums = words[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0)
    sums[: len(words) % _COLUMNS] += words[rows * _COLUMNS :]
    return int((sums * torch.arange(1, 2 * _COLUMNS, 2, device=sums.device)).sum())


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter or buffer, and the name it has there."""
    module_name, _, key = name.rpartition(".")
    return model.get_submodule(module_name), key


def is_matrix_stack(model: nn.Module, name: str) -> bool:
    """True if a parameter stacks several matrices (experts), and no convolution has it."""
    shape = tensor(model, name).shape
    # with a weight norm, a convolution's weight is two modules deeper
    owners = (name.rsplit(".", depth)[0] for depth in (1, 3) if name.count(".") >= depth)
    return (
        len(shape) == 3
        and 1 not in shape[1:]  # a scale for each channel of an image (SwiftFormer)
        and not any(
            isinstance(model.get_submodule(layer), nn.modules.conv._ConvNd) for layer in owners
        )
    )


def compute_unsaved(model: Any) -> set[str]:
    """Initialise unsaved parameters (Marian's positions) as loading does; return names."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    names = {name for name, _ in model.named_parameters() if name in ignored}
    for parameter, aliases in parameter_names(model).items() if names else ():
        if parameter.is_meta and aliases[0] in names:
            put_parameter(model, aliases, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    with torch.no_grad():
        for layer in {name.rpartition(".")[0] for name in names}:
            model._init_weights(model.get_submodule(layer))
    return names
