"""See every linear operation on a parameter, in any kind of layer.

Linear layers, Transformers' ``Conv1D``, stacked experts and bare parameters all call a few
functions of torch. Those are watched, so no layer type or name has to be listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..graph.cut_list import matrix_of
from ..model.sharded import is_dtensor
from ..model.tensors import owner
from .batches import models_in

Select = Callable[..., Any]  # a function of torch that selects from its first argument


@dataclass(frozen=True)
class Consumer:
    """A weight that reads channels: one dimension of a parameter that is summed over."""

    parameter: str  # the first of its names in the model
    dim: int
    part: int | None = None  # index of the matrix in a stack (an expert); None: no stack

    def matrix_of(self, values: Tensor) -> tuple[Tensor, int]:
        return matrix_of(values, self.dim, self.part)


@dataclass(frozen=True)
class LinearOp:
    """One call of a linear operation, before it runs."""

    consumer: Consumer
    inputs: Tensor  # what the weight reads
    axis: int
    run: Callable[..., Any]  # computes the result; an argument replaces ``inputs``
    is_unread: bool = False  # the weight embeds tokens too, but no input was looked up there

    def channels_last(self) -> Tensor:
        return self.inputs.movedim(self.axis, -1).flatten(0, -2)  # (tokens, channels)

    def shaped(self, rows: Tensor) -> Tensor:
        """Return ``(tokens, channels)`` with the shape, axis order and dtype of the inputs."""
        moved = self.inputs.movedim(self.axis, -1)
        return rows.to(self.inputs.dtype).view(moved.shape).movedim(-1, self.axis)


@dataclass(frozen=True)
class _Reads:
    """Which arguments are inputs and weight, and which of their axes are summed over."""

    inputs: int
    axis: int
    weight: int
    weight_axis: int


class WatchedOps(TorchFunctionMode):
    """Passes each linear operation on a model's parameters to ``visit``, which returns the result.

    ``selected`` gets each selection of rows: function, arguments, keyword arguments, result.
    ``embedded`` gets the name of a table of embeddings and what was looked up in it, and returns
    that. ``experts`` follows every call.
    """

    def __init__(
        self,
        model: nn.Module,
        visit: Callable[[LinearOp], Any],
        selected: Callable[[Select, Sequence[Any], Mapping[str, Any], Any], None] | None = None,
        experts: ExpertOutputs | None = None,
        embedded: Callable[[str, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.visit, self._selected, self._experts = visit, selected, experts
        self._embedded = embedded
        self._tables: set[str] = set()  # of the model's inputs
        self._looked_up: set[str] = set()
        self._model = model
        self._owners = [(name, *owner(model, name)) for name, _ in model.named_parameters()]
        self._by_storage: dict[int, dict[str, Tensor]] = {}
        self.locate(model)

    def locate(self, part: nn.Module) -> None:
        """Note where a submodule's parameters are now: FSDP2 gathers them into new storages."""
        inside = set(part.modules())
        for name, module, key in self._owners:
            parameter = module._parameters[key] if module in inside else None
            if parameter is not None and not is_dtensor(parameter):
                self._by_storage.setdefault(_storage(parameter), {})[name] = parameter
        for table in _input_tables(self._model):  # inputs_embeds bypass F.embedding
            self._tables.update(self._names_of(table))

    def _parameters_at(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        at = 0 if is_dtensor(values) else _storage(values)
        found = self._by_storage.get(at, {})
        # FSDP2 frees the storages that it gathered
        yield from ((name, each) for name, each in found.items() if _storage(each) == at)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        names = _ARGUMENTS.get(func)
        if names is None:
            result = func(*args, **given)
            if func is F.embedding:
                table = args[1] if len(args) > 1 else given.get("weight")
                result = self._looked_up_in(table, result)
            if func in _SELECTIONS and self._selected is not None:
                self._selected(func, args, given, result)
            return self._followed(func, args, given, result)
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

                axis = reads.axis % inputs.ndim
                unread = consumer.parameter in self._tables - self._looked_up
                result = self.visit(LinearOp(consumer, inputs, axis, run, unread))
                return self._followed(func, values, given, result, [consumer])
        stack = self._stack(values[-1]) if func in _BATCH_PRODUCTS else []
        return self._followed(func, values, given, func(*values, *rest, **given), stack)

    def _followed(
        self, func: Any, args: Any, kwargs: Any, result: Any, consumers: Sequence[Consumer] = ()
    ) -> Any:
        if self._experts is not None:
            self._experts.follow(func, args, kwargs, result, consumers)
        return result

    def _stack(self, weight: Tensor) -> list[Consumer]:
        """Return a consumer for each matrix, if a weight is a whole stack; else nothing."""
        for name, parameter in self._parameters_at(weight):
            view = _view_of(weight, parameter)
            if view is not None and weight.ndim == 3 and weight.numel() == parameter.numel():
                stacked, dim, _ = view.dims
                if stacked == 0 and dim is not None:
                    return [Consumer(name, dim, part) for part in range(len(weight))]
        return []

    def _names_of(self, table: Any) -> list[str]:
        found = self._parameters_at(table) if isinstance(table, Tensor) else ()
        return [name for name, parameter in found if _view_of(table, parameter) is not None]

    def _looked_up_in(self, table: Any, values: Tensor) -> Tensor:
        for name in self._names_of(table):
            self._looked_up.add(name)
            if self._embedded is not None:
                values = self._embedded(name, values)
        return values

    def _consumer(self, weight: Any, axis: int) -> Consumer | None:
        """Return the parameter's dimension that an axis of a weight, perhaps a view, runs along."""
        if not isinstance(weight, Tensor):
            return None
        for name, parameter in self._parameters_at(weight):
            view = _view_of(weight, parameter)
            dim = None if view is None else view.dims[axis % weight.ndim]
            if view is None or dim is None or weight.shape[axis] != parameter.shape[dim]:
                continue
            stacked = [d for d, n in enumerate(parameter.shape) if n > 1 and d not in view.dims]
            if len(stacked) <= 1:
                return Consumer(name, dim, view.begins[stacked[0]] if stacked else None)
        return None


@dataclass
class Contribution:
    """What an expert added to the outputs of its layer, its routing weights included."""

    norms: float = 0.0  # sum over its tokens of the norm of what it added
    tokens: int = 0

    def add(self, other: Contribution) -> None:
        self.norms += other.norms
        self.tokens += other.tokens

    @property
    def score(self) -> float:
        """REAP's saliency: the mean norm; 0 without tokens."""
        return self.norms / self.tokens if self.tokens else 0.0


class ExpertOutputs:
    """Measures what each expert adds to the output of its layer (REAP, arXiv 2510.13999).

    Layers add up their experts with a few functions of torch. The rows that such a function adds
    are followed from the linear operation that computed them, through operations that keep rows and
    size: a product with routing weights, a bias, a cast.
    """

    def __init__(self, contributions: dict[Consumer, Contribution]):
        self._contributions = contributions
        # tensor -> the consumers that computed its rows, in order, and the number of their rows
        self._rows: Any = WeakTensorKeyDictionary()

    def follow(
        self, func: Any, args: Any, kwargs: Any, output: Any, consumers: Sequence[Consumer]
    ) -> None:
        """Follow one call. ``consumers`` computed the output, each as many of its rows."""
        if not isinstance(output, Tensor) or not args:
            return
        first = args[0]
        if consumers:
            count = output.shape[:-1].numel() // len(consumers)
            self._rows[output] = [(consumer, count) for consumer in consumers]
        elif func in _ROW_ADDITIONS:
            added = args[3] if len(args) > 3 else kwargs["source"]
            self._add(added, self._rows_of(added))
        elif func in _SUMS and _dim(args, kwargs) in (0, (0,), [0]):
            rows = self._rows_of(first)
            if len({count for _, count in rows}) == 1 and len(rows) == len(first) > 1:
                self._add(first, rows, only_nonzero=True)  # each expert has a row for every token
        elif func in _JOINS and _dim(args, kwargs) in (None, 0):
            parts = [self._rows_of(part) for part in first]
            if all(parts):
                self._rows[output] = [rows for part in parts for rows in part]
        else:
            same = (v for v in args if isinstance(v, Tensor) and _same_rows(v, output))
            rows = next(filter(None, map(self._rows_of, same)), [])
            # rows of several experts have to keep their order
            if len(rows) == 1 or (rows and func not in _REORDERS and output.is_contiguous()):
                self._rows[output] = rows

    def _rows_of(self, values: Tensor) -> list[tuple[Consumer, int]]:
        rows: list[tuple[Consumer, int]] = self._rows.get(values, [])
        return rows

    def _add(
        self, values: Tensor, rows: Sequence[tuple[Consumer, int]], only_nonzero: bool = False
    ) -> None:
        counts = [count for _, count in rows]
        if not rows or sum(counts) != values.shape[:-1].numel():
            return
        exact = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        norms = exact.flatten(0, -2).norm(dim=-1).double()
        for (consumer, _), some in zip(rows, norms.split(counts), strict=True):
            tokens = int(some.count_nonzero()) if only_nonzero else len(some)
            expert = self._contributions.setdefault(consumer, Contribution())
            expert.add(Contribution(float(some.sum()), tokens))


def _dim(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("dim")


def _same_rows(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and one.shape[-1:] == other.shape[-1:]


def _input_tables(model: nn.Module) -> Iterator[Tensor]:
    for each in models_in(model):
        with suppress(AttributeError, NotImplementedError):  # a model without token inputs
            embeddings = each.get_input_embeddings()
            if isinstance(embeddings, nn.Embedding):
                yield embeddings.weight


def _storage(values: Tensor) -> int:
    return values.untyped_storage().data_ptr()


@dataclass(frozen=True)
class _View:
    # For each axis of the view, the parameter's dimension; None for an axis of size 1.
    dims: tuple[int | None, ...]
    begins: tuple[int, ...]  # for each dimension of the parameter, where the view begins


def _view_of(view: Tensor, parameter: Tensor) -> _View | None:
    """Return where a view lies in a parameter; ``None``: in another one that shares its storage."""
    by_stride = {parameter.stride(d): d for d in range(parameter.ndim) if parameter.shape[d] > 1}
    sizes: dict[int, int] = {}
    dims: list[int | None] = []
    for stride, size in zip(view.stride(), view.shape, strict=True):
        dims.append(by_stride.get(stride) if size > 1 else None)
        if size > 1:
            if stride not in by_stride:
                return None  # this axis runs along no dimension
            sizes[by_stride[stride]] = size
    begins = [0] * parameter.ndim
    offset = int(view.storage_offset()) - int(parameter.storage_offset())
    for stride, dim in sorted(by_stride.items(), reverse=True):
        begins[dim], offset = divmod(offset, stride) if stride else (0, offset)
        if not 0 <= begins[dim] <= parameter.shape[dim] - sizes.get(dim, 1):
            return None
    return _View(tuple(dims), tuple(begins)) if offset == 0 else None


_MATRIX_PRODUCTS = (
    torch.mm,
    torch.Tensor.mm,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
)
_BATCH_PRODUCTS = (torch.bmm, torch.Tensor.bmm, *_MATRIX_PRODUCTS[2:])
_ADDED_PRODUCTS = (torch.addmm, torch.Tensor.addmm)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_SELECTIONS = (torch.Tensor.__getitem__, torch.Tensor.index_select, torch.index_select)
_REORDERS = (*_SELECTIONS, torch.gather, torch.Tensor.gather)
_ROW_ADDITIONS = (torch.index_add, torch.Tensor.index_add, torch.Tensor.index_add_)
_SUMS = (torch.sum, torch.Tensor.sum)
_JOINS = (torch.cat, torch.concat)
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight"),
    torch.einsum: ("equation", "first", "second"),
    **dict.fromkeys(_BATCH_PRODUCTS, ("input", "mat2")),
    **dict.fromkeys(_MATRIX_PRODUCTS, ("input", "other")),
    **dict.fromkeys(_ADDED_PRODUCTS, ("input", "mat1", "mat2")),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight")),
    **dict.fromkeys(_TRANSPOSED, ("input", "weight")),
}


def _reads_of(func: Any, values: Sequence[Any]) -> Iterator[_Reads]:
    """Yield how a function may read: a matrix product takes inputs and weight in either order."""
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
    """Yield how an ``einsum`` of two tensors reads, if it sums over exactly one label."""
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
