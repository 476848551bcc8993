"""Tensors that are gathered from shards when they are computed with, and freed again.

A :class:`LazyTensor` has a shape, a dtype, strides, and a function that reads its values.  What
only moves values (selecting channels, casting) gives another lazy tensor and reads nothing;
anything else reads the values, computes, and forgets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
_VIEWS = {
    *_SAME,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unbind.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}
"""Operations whose results have the storage of their first argument, as with plain tensors."""
_MOVES = {
    *_VIEWS,
    _aten._to_copy.default,
    _aten.cat.default,
    _aten.clone.default,
    _aten.index_select.default,
    _aten.stack.default,
}
"""Operations that only move or cast values; their results are lazy."""


_SHAPES = {
    _aten.empty_like.default,
    _aten.full_like.default,
    _aten.new_empty.default,
    _aten.new_full.default,
    _aten.new_zeros.default,
    _aten.ones_like.default,
    _aten.rand_like.default,
    _aten.randn_like.default,
    _aten.zeros_like.default,
}
"""Operations that look at shape and dtype alone."""


class LazyTensor(Tensor):
    """A tensor on the CPU whose values are read at each use.

    ``like``: a tensor on the meta device with the shape, dtype, strides and storage offset.

    Attributes:
        like: as given.
        read: as given.
    """

    like: Tensor
    read: Callable[[], Tensor]
    _storage: _Storage

    @staticmethod
    def __new__(  # noqa: D102
        cls, like: Tensor, read: Callable[[], Tensor], storage: _Storage | None = None
    ) -> LazyTensor:
        wrapper: Any = Tensor._make_wrapper_subclass
        tensor: LazyTensor = wrapper(
            cls,
            like.shape,
            dtype=like.dtype,
            device="cpu",
            strides=like.stride(),
            storage_offset=like.storage_offset(),
        )
        return tensor

    def __init__(
        self, like: Tensor, read: Callable[[], Tensor], storage: _Storage | None = None
    ) -> None:
        self.like, self.read = like, read
        self._storage = storage or _Storage(like.nbytes)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        """Return a lazy tensor for what only moves values; else read them and compute.

        Raises:
            RuntimeError: the operation writes to a lazy tensor.
        """
        kwargs = dict(kwargs or {})
        if func in _SAME:
            return _same(args[0])
        if func in _MOVES and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return _moved(func, args, kwargs)
        if func in _SHAPES:
            kwargs["device"] = kwargs.get("device") or torch.device("cpu")
            return func(*tree_map(_shape_of, args), **kwargs)
        _check_not_written(func, args, kwargs)
        return func(*tree_map(_values, args), **tree_map(_values, kwargs))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a lazy tensor of the same values, or a Parameter of one."""
        copied: Any = _same(self, _Storage(self.like.nbytes))
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def untyped_storage(self) -> Any:
        """Return what tells tied weights from others; it holds no data."""
        return self._storage


class _Storage:
    """Stands for the memory that a lazy tensor would have."""

    def __init__(self, size: int):
        self._size = size

    def data_ptr(self) -> int:
        """Return a number that no other storage has while this one lives."""
        return id(self)

    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self._size


def _same(source: LazyTensor, storage: _Storage | None = None) -> LazyTensor:
    """Return another lazy tensor of the same values."""
    return LazyTensor(source.like, source.read, storage or source._storage)


def _moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the lazy result, or results, of an operation that only moves values."""
    plain = {key: value for key, value in kwargs.items() if key != "device"}
    results = func(*tree_map(_shape_of, args), **plain)

    def read() -> Any:
        return func(*tree_map(_values, args), **kwargs)

    storage = args[0]._storage if func in _VIEWS and isinstance(args[0], LazyTensor) else None
    if isinstance(results, Tensor):
        return LazyTensor(results, read, storage)
    return [
        LazyTensor(result, partial(_item, read, number), storage)
        for number, result in enumerate(results)
    ]


def _item(read: Callable[[], Sequence[Tensor]], number: int) -> Tensor:
    return read()[number].clone()  # the others are freed


def _shape_of(value: Any) -> Any:
    """Return a tensor's counterpart on the meta device; any other value as it is."""
    if isinstance(value, LazyTensor):
        return value.like
    return value.to("meta") if isinstance(value, Tensor) else value


def _values(value: Any) -> Any:
    """Return the values of a lazy tensor; any other value as it is."""
    return value.read() if isinstance(value, LazyTensor) else value


def values_of(tensor: Tensor) -> Tensor:
    """Return a tensor with its values in memory; one that is not lazy is returned itself."""
    return cast(Tensor, _values(tensor.detach())) if isinstance(tensor, LazyTensor) else tensor


def _check_not_written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if an operation would change a lazy tensor: the change would be lost."""
    if not func._schema.is_mutable:
        return
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        alias = argument.alias_info
        if alias is not None and alias.is_write and isinstance(value, LazyTensor):
            raise RuntimeError(
                f"{func}: these weights are gathered from shards when they are used, and cannot be "
                "changed in place. Train the sharded model"
            )


def is_lazy(model: nn.Module) -> bool:
    """True if some of a model's parameters are gathered when they are used."""
    return any(isinstance(parameter, LazyTensor) for parameter in model.parameters())


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Hold a module's own lazy parameters in memory while the block runs: they are read once."""
    parameters: dict[str, Any] = module._parameters
    lazy = {key: value for key, value in parameters.items() if isinstance(value, LazyTensor)}
    try:
        for key, parameter in lazy.items():
            held = nn.Parameter(values_of(parameter), parameter.requires_grad)
            held.grad = None if parameter.grad is None else values_of(parameter.grad)
            parameters[key] = held
        yield
    finally:
        parameters.update(lazy)
