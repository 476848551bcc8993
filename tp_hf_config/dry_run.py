"""A forward pass of a model without data that gets past the places where values decide.

Weights and what is computed from them have shapes only.  Whole numbers and masks (token ids, an
image's grid, positions) stay real on the CPU, so that sizes made from them are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .versions import plain_on_meta

_COPY = torch.ops.aten._to_copy.default
_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
_PUT = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_NONZERO = torch.ops.aten.nonzero.default
_FEW = 8
_MOST_SEEN = 100_000
_WAVES = (torch.ops.aten.sin.default, torch.ops.aten.cos.default)
_LARGE = 2**21
"""So many numbers are no sizes."""
_SCATTER = torch.ops.aten.masked_scatter.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_CONVOLUTION = torch.ops.aten.convolution.default
_PADDING = 4
"""Which argument of a convolution that is."""

_VALUES = (
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
)


class NoValues(TorchFunctionMode):
    """A forward pass on the meta device: questions about values, which masks ask, are answered."""

    def __enter__(self) -> Any:
        self._plain = plain_on_meta()
        self._plain.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._plain.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _VALUES and args[0].is_meta:
            return True  # masks ask whether anything is masked; no value is known here
        if func is torch.Tensor.__contains__ and args[0].is_meta:
            return False  # is there a padding token?
        if func is torch.Tensor.tolist and args[0].is_meta:
            return torch.ones(args[0].shape, device="cpu", dtype=torch.long).tolist()
        return func(*args, **(kwargs or {}))


def _interpolated(
    values: torch.Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any
) -> torch.Tensor:
    """What ``interpolate`` returns; torch's own way there takes long on the meta device."""
    spatial = values.shape[2:]
    wanted = scale_factor if size is None else size
    each = wanted if isinstance(wanted, (tuple, list)) else (wanted,) * len(spatial)
    if size is None:
        each = [int(length * factor) for length, factor in zip(spatial, each, strict=True)]
    return values.new_empty((*values.shape[:2], *map(int, each)))


class KnownShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is computed on the meta device is shaped once."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as below

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = any(one.is_meta for one in _flat(args, {}) if isinstance(one, torch.Tensor))
        kwargs = kwargs or {}
        return _shaped(func, args, kwargs) if on_meta else func(*args, **kwargs)


class RealNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whole numbers and the few others made of them are computed, all else has shapes only.

    Where values choose (which tokens an expert takes, which images are more than padding), all are
    chosen; of a long row (experts, one after the other) the first few, which are like all others.

    Attributes:
        guessed: values have chosen something, so that not all that was computed is what would be.
        numbers: how many numbers the operations made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.guessed = False
        self.numbers = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles here, and its guard costs more than all else

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in _flat(args, kwargs) if isinstance(value, torch.Tensor)]
        if kwargs.get("device") == torch.device("meta") and self._stays_real(func, tensors, kwargs):
            kwargs["device"] = torch.device("cpu")
        on_meta = any(tensor.is_meta for tensor in tensors)
        if on_meta:
            if func is _NONZERO:
                self.guessed = True
                chosen = torch.ones(tensors[0].shape, device="cpu").nonzero()
                return chosen[:_FEW] if chosen.shape[1] == 1 else chosen
            if func is _ITEM:
                self.guessed = True
                return 1
            if func is _COPY and "device" in kwargs:
                kwargs["device"] = torch.device("meta")
            if func is _SCATTER and _too_few(*args):
                raise RuntimeError("fewer features than places for them")  # as where it computes
            if func in _PUT and not self.guessed:
                _check_broadcast(*args[:3])
            if func in _INDEX:
                self.guessed |= any(one.is_meta for one in tensors[1:] if one.dtype == torch.bool)
                args = (args[0], _positions(args[1]), *args[2:])
            if func in _INDEX or not all(tensor.is_meta for tensor in tensors):
                args, kwargs = tree_map(_without_data, (args, kwargs))
        output = _shaped(func, args, kwargs) if on_meta else _small(func, args, kwargs, tensors)
        if isinstance(output, torch.Tensor):
            self.numbers += output.numel()
        return output

    @staticmethod
    def _stays_real(func: Any, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
        if func is _COPY:
            dtype = kwargs.get("dtype") or tensors[0].dtype
            return not tensors[0].is_meta and not dtype.is_floating_point
        if tensors:
            return not any(tensor.is_meta for tensor in tensors)
        dtype = kwargs.get("dtype")
        return (dtype is not None and not dtype.is_floating_point) or "arange" in str(func)


def _small(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    """What an operation computes; a shape where that is of so many numbers that nothing asks."""
    new = _makes_new(func)
    pointwise = new and torch.Tag.pointwise in func.tags
    if pointwise and prod(tensor.numel() for tensor in tensors) > _LARGE:
        shape = _shaped(func, *tree_map(_without_data, (args, kwargs)))
        if _is_large(shape):  # LightGlue multiplies every place by every other
            return shape
    output = func(*args, **kwargs)
    return _without_data(output) if func in _WAVES or (new and _is_large(output)) else output


def _is_large(output: Any) -> bool:
    """Whether these are more numbers than sizes come from; a mask is asked whatever its size."""
    if not isinstance(output, torch.Tensor) or output.dtype == torch.bool:
        return False
    return output.numel() > _LARGE


def _flat(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """An operation's arguments, and what is in those that are lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


_seen: dict[Any, tuple[Any, ...]] = {}
"""What operations make of which shapes: most do it in Python on the meta device, which is slow."""


def _shaped(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation returns on the meta device; asked once for arguments of the same shapes."""
    if not _makes_new(func):
        return func(*args, **kwargs)
    described = (*map(_described, args), *kwargs, *map(_described, kwargs.values()))
    key = (func, torch.get_default_dtype(), *described)
    try:
        known = _seen.get(key)
    except TypeError:  # something that cannot be compared
        return func(*args, **kwargs)
    if known is None:
        if func is _CONVOLUTION and min(args[_PADDING], default=0) < 0:
            raise RuntimeError("negative padding is not supported")  # as where it computes
        output = func(*args, **kwargs)
        made = output if isinstance(output, tuple) else (output,)
        if all(isinstance(one, torch.Tensor) and one.is_meta for one in made):
            if len(_seen) >= _MOST_SEEN:
                _seen.clear()
            _seen[key] = tuple(map(_described, made))
        return output
    again = [torch.empty_strided(*sizes, dtype=dtype, device="meta") for *sizes, dtype in known]
    return again[0] if len(func._schema.returns) == 1 else tuple(again)


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operation makes tensors of its own: neither views nor in place."""
    schema = func._schema
    aliases = [one.alias_info for one in (*schema.arguments, *schema.returns)]
    single = all(str(one.type) == "Tensor" for one in schema.returns)
    return single and all(one is None for one in aliases)


def _described(value: Any) -> Any:
    """All of an argument that decides on shapes."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return (type(value), value)


def _too_few(values: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether there is less in a source than a mask has places for, as far as that is known."""
    if mask.is_meta:
        return False
    return source.numel() < int(mask.expand(values.shape).sum())


def _check_broadcast(values: torch.Tensor, indices: Any, source: torch.Tensor) -> None:
    """Stop where numbers are put into other places than there are, in torch's words for it."""
    known = _positions(indices)
    if any(one is not None and one.is_meta for one in (*indices, *known)):
        return
    found = torch.ops.aten.index.Tensor(*tree_map(_without_data, (values, known))).shape
    sizes = zip(reversed(source.shape), reversed(found), strict=False)
    if source.ndim > len(found) or any(size not in (1, wanted) for size, wanted in sizes):
        raise RuntimeError(
            f"shape mismatch: value tensor of shape {list(source.shape)} cannot be broadcast to "
            f"indexing result of shape {list(found)}"
        )


def _positions(indices: Any) -> list[Any]:
    """Masks as the positions that they choose, whose number is a size."""
    result: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
            known = torch.ones(index.shape, device="cpu") if index.is_meta else index
            result += known.nonzero(as_tuple=True)
        else:
            result.append(index)
    return result


def _without_data(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value
