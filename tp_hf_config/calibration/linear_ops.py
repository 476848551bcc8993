"""See every linear operation in which a parameter is the weight, whatever layer it is in.

A linear layer, ``Conv1D`` of Transformers, a stacked expert and a bare parameter all end in a few
functions of torch. They are watched there, so no layer type and no layer name has to be listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..graph.edits import matrix_of


@dataclass(frozen=True)
class Consumer:
    """A weight that reads channels: one dimension of a parameter that is summed over.

    Attributes:
        parameter: the first of the parameter's names in the model.
        dim: the dimension that is as long as what is read.
        part: the number of the matrix in a stack (an expert); ``None``: the parameter is no stack.
    """

    parameter: str
    dim: int
    part: int | None = None

    def matrix_of(self, values: Tensor) -> tuple[Tensor, int]:
        """Return a view of the parameter's values without its other parts, and the dimension."""
        return matrix_of(values, self.dim, self.part)


@dataclass(frozen=True)
class LinearOp:
    """One call of a linear operation, before it runs.

    Attributes:
        consumer: its weight.
        inputs: what the weight reads.
        axis: the axis of ``inputs`` that is summed over.
        run: computes the result; an argument takes the place of ``inputs``.
        is_table: True if the weight is a table of embeddings too (a tied head).
    """

    consumer: Consumer
    inputs: Tensor
    axis: int
    run: Callable[..., Any]
    is_table: bool = False

    def channels_last(self) -> Tensor:
        """Return the inputs as ``(tokens, channels)``."""
        return self.inputs.movedim(self.axis, -1).flatten(0, -2)

    def shaped(self, rows: Tensor) -> Tensor:
        """Return ``(tokens, channels)`` in the shape, order of axes and dtype of the inputs."""
        moved = self.inputs.movedim(self.axis, -1)
        return rows.to(self.inputs.dtype).view(moved.shape).movedim(-1, self.axis)


@dataclass(frozen=True)
class _Reads:
    """Which arguments of a function are inputs and weight, and which of their axes are summed."""

    inputs: int
    axis: int
    weight: int
    weight_axis: int


class WatchedOps(TorchFunctionMode):
    """Hands every linear operation on a model's parameters to a function, while it is entered.

    ``visit``: gets each :class:`LinearOp`, and returns what the operation is to return.
    """

    def __init__(self, model: nn.Module, visit: Callable[[LinearOp], Any]):
        super().__init__()
        self.visit = visit
        self._tables: set[str] = set()
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            self._by_storage.setdefault(_storage(parameter), []).append((name, parameter))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        names = _ARGUMENTS.get(func)
        if func is F.embedding:
            self._note_table(args, given)
        if names is None:
            return func(*args, **given)
        values = [*args[: len(names)]]
        while len(values) < len(names) and names[len(values)] in given:
            values.append(given.pop(names[len(values)]))
        rest = args[len(names) :]
        for reads in _reads_of(func, values):
            consumer = self._consumer(values[reads.weight], reads.weight_axis)
            if consumer is not None:
                inputs = values[reads.inputs]

                def run(changed: Tensor | None = None, at: int = reads.inputs) -> Any:
                    now = list(values)
                    if changed is not None:
                        now[at] = changed
                    return func(*now, *rest, **given)

                axis, table = reads.axis % inputs.ndim, consumer.parameter in self._tables
                return self.visit(LinearOp(consumer, inputs, axis, run, table))
        return func(*values, *rest, **given)

    def _note_table(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        table = args[1] if len(args) > 1 else kwargs.get("weight")
        if isinstance(table, Tensor):
            same = self._by_storage.get(_storage(table), ())
            self._tables |= {name for name, _ in same}

    def _consumer(self, weight: Any, axis: int) -> Consumer | None:
        """Return the parameter's dimension that an axis of a weight is; ``None``: of no parameter.

        A weight may be a view: transposed, or one matrix of a stack.
        """
        if not isinstance(weight, Tensor):
            return None
        for name, parameter in self._by_storage.get(_storage(weight), ()):
            dims = _dims_of_view(weight, parameter)
            dim = None if dims is None else dims[axis % weight.ndim]
            if dims is None or dim is None or weight.shape[axis] != parameter.shape[dim]:
                continue
            stacked = [d for d, n in enumerate(parameter.shape) if n > 1 and d not in dims]
            if len(stacked) > 1:
                continue
            offset = weight.storage_offset() - parameter.storage_offset()
            part = offset // parameter.stride(stacked[0]) if stacked else None
            return Consumer(name, dim, part)
        return None


def _storage(values: Tensor) -> int:
    return values.untyped_storage().data_ptr()


def _dims_of_view(view: Tensor, parameter: Tensor) -> list[int | None] | None:
    """Return for each axis of a view the parameter's dimension that it runs along.

    ``None`` for an axis of size 1, or as the result if an axis runs along no dimension.
    """
    by_stride = {parameter.stride(d): d for d in range(parameter.ndim) if parameter.shape[d] > 1}
    dims: list[int | None] = []
    for axis in range(view.ndim):
        dim = by_stride.get(view.stride(axis)) if view.shape[axis] > 1 else None
        if dim is None and view.shape[axis] > 1:
            return None
        dims.append(dim)
    return dims


_MATRIX_PRODUCTS = (
    torch.mm,
    torch.Tensor.mm,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
)
_ADDED_PRODUCTS = (torch.addmm, torch.Tensor.addmm)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight"),
    torch.einsum: ("equation", "first", "second"),
    **dict.fromkeys(_MATRIX_PRODUCTS, ("input", "other")),
    **dict.fromkeys(_ADDED_PRODUCTS, ("input", "mat1", "mat2")),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight")),
    **dict.fromkeys(_TRANSPOSED, ("input", "weight")),
}


def _reads_of(func: Any, values: Sequence[Any]) -> Iterator[_Reads]:
    """Yield how a function may read: inputs and weight can stand in either order."""
    if func is torch.einsum:
        yield from _reads_of_einsum(values)
    elif func in _CONVOLUTIONS:
        if values[0].shape[-values[1].ndim + 1] == values[1].shape[1]:  # not in channel groups
            yield _Reads(0, -values[1].ndim + 1, 1, 1)
    elif func in _TRANSPOSED:
        yield _Reads(0, -values[1].ndim + 1, 1, 0)
    elif func is F.linear:
        yield _Reads(0, -1, 1, -1)
    else:
        first = len(values) - 2
        left, right = values[first], values[first + 1]
        if min(left.ndim, right.ndim) > 1:
            if right.ndim == 2:
                yield _Reads(first, -1, first + 1, -2)
            if left.ndim == 2:
                yield _Reads(first + 1, -2, first, -1)


def _reads_of_einsum(values: Sequence[Any]) -> Iterator[_Reads]:
    """Yield how ``einsum`` of two tensors reads, where one label alone is summed over."""
    if len(values) != 3 or not isinstance(values[0], str) or "..." in values[0]:
        return
    if not all(isinstance(value, Tensor) for value in values[1:]):
        return
    left, _, result = values[0].replace(" ", "").partition("->")
    first, _, second = left.partition(",")
    summed = (set(first) & set(second)) - set(result)
    shared = set(first) & set(second) & set(result)
    if len(summed) != 1 or shared:
        return
    (label,) = summed
    yield _Reads(1, first.index(label), 2, second.index(label))
    yield _Reads(2, second.index(label), 1, first.index(label))
