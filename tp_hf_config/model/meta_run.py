"""Run forward passes on the meta device, also where the model's code asks for values.

Weights and what is computed from them have shapes only. Integers and masks (token ids, an image's
grid, positions) have values on the CPU, so sizes computed from them are known.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .surroundings import replaced, without_caches

_COPY = torch.ops.aten._to_copy.default
_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
_PUT = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_NONZERO = torch.ops.aten.nonzero.default
_META = torch.device("meta")
_FEW = 8  # positions that are selected in a one-dimensional tensor
_WAVES = (torch.ops.aten.sin.default, torch.ops.aten.cos.default)
_LARGE = 2**21  # numbers; a larger tensor holds no sizes
_SCATTER = torch.ops.aten.masked_scatter.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_CONVOLUTION = torch.ops.aten.convolution.default
_PADDING = 4  # index of the argument of a convolution
# they read values of meta tensors, may move a tensor to another device, or refuse real values
_CHOOSING = (_NONZERO, _ITEM, _COPY, _SCATTER, _CONVOLUTION, *_PUT, *_INDEX)
_VALUES = (torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__index__)


@contextmanager
def _plain_on_meta() -> Iterator[None]:
    """While open, meta forward passes skip autocast and compilation."""
    original: Any = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        # Transformers 4 and Hub code disable autocast for rotary embeddings, which raises on meta
        on_meta = device_type == "meta"
        return nullcontext() if on_meta else original(device_type, *args, **kwargs)

    # imported only to compile, as ModernBERT does if Triton is installed
    dynamo = sys.modules.get("torch._dynamo")
    uncompiled = nullcontext() if dynamo is None else dynamo.config.patch(disable=True)
    with replaced(torch, "autocast", autocast), uncompiled:
        yield


class NoValues(TorchFunctionMode):
    """Answers questions about values that masks ask; the caches of classes are not used."""

    def __enter__(self) -> Any:
        self._around = ExitStack()
        self._around.enter_context(_plain_on_meta())
        self._around.enter_context(without_caches())
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._around.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _VALUES and args[0].is_meta:
            return True  # masks ask whether anything is masked
        if func is torch.Tensor.__contains__ and args[0].is_meta:
            return False  # the question is whether there is a padding token
        if func is torch.Tensor.tolist and args[0].is_meta:
            return torch.ones(args[0].shape, device="cpu", dtype=torch.long).tolist()
        return func(*args, **(kwargs or {}))


class RealNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes integers, and the few floats made from them; all else has shapes only.

    Where values select (the tokens of an expert, the images that are not padding), everything is
    selected. In one dimension only the first ``_FEW`` positions are, because all are alike.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.guessed = False  # a meta value selected something: with data the pass may differ
        self.numbers = 0  # in the results of all operations together

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; dynamo's guard takes most of the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        tensors = _tensors(args, kwargs)
        if kwargs and kwargs.get("device") == _META and self._stays_real(func, tensors, kwargs):
            kwargs["device"] = torch.device("cpu")
        places = {tensor.is_meta for tensor in tensors}
        on_meta = True in places
        if on_meta and (False in places or func in _CHOOSING):
            if func is _NONZERO:
                self.guessed = True
                chosen = torch.ones(tensors[0].shape, device="cpu").nonzero()
                return chosen[:_FEW] if chosen.shape[1] == 1 else chosen
            if func is _ITEM:
                self.guessed = True
                return 1
            if func is _COPY and "device" in kwargs:
                kwargs["device"] = _META
            if func is _SCATTER and _too_few(*args):
                raise RuntimeError("fewer features than places for them")  # as on a real device
            if func in _PUT and not self.guessed:
                _check_broadcast(*args[:3])
            if func in _INDEX:
                self.guessed |= any(
                    mask.is_meta for mask in tensors[1:] if mask.dtype == torch.bool
                )
                args = (args[0], _positions(args[1]), *args[2:])
            if func in _INDEX or False in places:
                args, kwargs = _without_data((args, kwargs))
            if func is _CONVOLUTION and min(args[_PADDING], default=0) < 0:
                raise RuntimeError("negative padding is not supported")  # as on a real device
        output = func(*args, **kwargs) if on_meta else _real(func, args, kwargs, tensors)
        if isinstance(output, torch.Tensor):
            self.numbers += output.numel()
        return output

    @staticmethod
    def _stays_real(func: Any, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
        """True if an operation that asks for the meta device runs on the CPU."""
        if func is _COPY:
            dtype = kwargs.get("dtype") or tensors[0].dtype
            return not tensors[0].is_meta and not dtype.is_floating_point
        if tensors:
            return not any(tensor.is_meta for tensor in tensors)
        dtype = kwargs.get("dtype")
        return (dtype is not None and not dtype.is_floating_point) or "arange" in str(func)


def _real(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    """Run an operation with values; sinusoids and large results get shapes only."""
    new = _makes_new(func)
    pointwise = new and torch.Tag.pointwise in func.tags
    if pointwise and prod(tensor.numel() for tensor in tensors) > _LARGE:
        meta_args, meta_kwargs = _without_data((args, kwargs))
        shape = func(*meta_args, **meta_kwargs)
        if _is_large(shape):  # LightGlue multiplies every position by every other
            return shape
    output = func(*args, **kwargs)
    return _without_data(output) if func in _WAVES or (new and _is_large(output)) else output


def _is_large(output: Any) -> bool:
    """True if a result is too large to hold sizes; never for a mask, which selects."""
    if not isinstance(output, torch.Tensor) or output.dtype == torch.bool:
        return False
    return output.numel() > _LARGE


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += [item for item in value if isinstance(item, torch.Tensor)]
    return tensors


@cache
def _makes_new(func: Any) -> bool:
    """True if an operation returns only new tensors: no views, nothing in place."""
    schema = func._schema
    single = all(str(result.type) == "Tensor" for result in schema.returns)
    values = (*schema.arguments, *schema.returns)
    return single and all(value.alias_info is None for value in values)


def _too_few(values: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> bool:
    """True if ``source`` has fewer numbers than the mask selects; False for a meta mask."""
    if mask.is_meta:
        return False
    own = mask  # without the repeats of an expanded mask
    for dim, stride in enumerate(mask.stride()):
        own = own.narrow(dim, 0, 1) if stride == 0 else own
    return source.numel() * own.numel() < int(own.sum()) * values.numel()


def _check_broadcast(values: torch.Tensor, indices: Any, source: torch.Tensor) -> None:
    """Raise torch's error if ``source`` does not fit its positions; meta ones are not checked."""
    positions = _positions(indices)
    if any(index is not None and index.is_meta for index in (*indices, *positions)):
        return
    target = torch.ops.aten.index.Tensor(*_without_data((values, positions))).shape
    sizes = zip(reversed(source.shape), reversed(target), strict=False)
    if source.ndim > len(target) or any(size not in (1, wanted) for size, wanted in sizes):
        raise RuntimeError(
            f"shape mismatch: value tensor of shape {list(source.shape)} cannot be broadcast to "
            f"indexing result of shape {list(target)}"
        )


def _positions(indices: Any) -> list[Any]:
    """Replace masks by positions, whose number is a size; a meta mask selects all positions."""
    result: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
            mask = torch.ones(index.shape, device="cpu") if index.is_meta else index
            result += mask.nonzero(as_tuple=True)
        else:
            result.append(index)
    return result


def _without_data(value: Any) -> Any:
    """Move the tensors of a value, also in containers, to the meta device."""
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(map(_without_data, value))
    if isinstance(value, dict):
        return {key: _without_data(item) for key, item in value.items()}
    return value
