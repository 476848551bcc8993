"""Find norms in front of weights, and compute what a weight reads once channels are removed.

A norm's output for one channel depends on all its inputs, so removing channels changes the
remaining ones. Norms are found by experiment: a copy with fewer channels returns other values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions

from ..model.sharded import behind, plain_class, whole
from ..model.surroundings import raise_shortage
from .linear_ops import Select

_weak_ref: Any = reductions.StorageWeakRef
_LONGEST = 3  # layers from a norm to the weight that reads it: the norm, dropout, an activation
# names of layers in the order in which they run, the first a norm; may hold SELECTION
Chain = tuple[str, ...]
# instead of a layer's name: rows of the last output are selected (as experts do)
SELECTION = "[...]"


@dataclass(frozen=True)
class _Call:
    """One call of a layer, or of a function that selects rows (``select``).

    Its result is not kept alive; ``layout`` is valid while something else holds it (``in_use``).
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    layout: tuple[torch.dtype, Any, torch.Size, tuple[int, ...]]
    in_use: Callable[[], bool]
    select: Select | None = None

    def output(self, values: Tensor) -> Tensor:
        """Return the result, from any tensor on its storage."""
        dtype, *layout = self.layout
        return values.new_empty(0, dtype=dtype).set_(values.untyped_storage(), *layout)


def use_of(values: Tensor) -> Callable[[], bool]:
    """Return a function that is true while something else holds the storage of ``values``."""
    weak = _weak_ref(values.untyped_storage())
    return lambda: not weak.expired()


class Sources:
    """Remembers the calls of leaf modules (of ``names``, if given) in the current forward pass."""

    def __init__(self, model: nn.Module, names: set[str] | None = None):
        self.model = behind(model)
        self.names = names
        self._calls: dict[int, _Call] = {}  # by the result's place

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, module in self.model.named_modules():
                has_parts = any(True for _ in module.children())
                if name in self.names if self.names is not None else not has_parts:
                    handles.append(
                        module.register_forward_hook(self._noting(name), with_kwargs=True)
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.forget()

    def forget(self) -> None:
        self._calls.clear()

    def forget_unused(self) -> None:
        calls = self._calls
        for pointer, call in reversed([*calls.items()]):  # each may hold an earlier call's result
            if not call.in_use():
                del calls[pointer], call

    def chain_of(self, values: Tensor, axis: int) -> Chain:
        """Return the layers from the last norm to the weight that reads ``values``.

        Empty: no norm.
        """
        calls = self._calls_before(values)
        size = values.shape[axis]
        for number, (call, output) in enumerate(calls):
            try:
                if call.select is None and _mixes(self._layer(call), call, output, size):
                    return tuple(c.name for c, _ in reversed(calls[: number + 1]))
            except Exception as error:  # the layer does not run with fewer channels: no norm
                raise_shortage(error)
                return ()
        return ()

    def after_cut(
        self, values: Tensor, size: int, chain: Chain, kept: Tensor, copies: dict[str, nn.Module]
    ) -> Tensor | None:
        """Return what a weight reads if its norm gets only the kept channels, ``(tokens, kept)``.

        ``None``: other layers than those of ``chain`` ran. Missing copies are added to ``copies``.
        """
        calls = self._calls_before(values)[: len(chain)]
        if tuple(call.name for call, _ in reversed(calls)) != chain:
            return None
        result: Tensor | None = None
        for call, _ in reversed(calls):
            if call.select is not None:
                assert result is not None  # the first call is of a norm
                result = result.reshape(*call.args[0].shape[:-1], len(kept))
                result = call.select(result, *call.args[1:], **call.kwargs)
                continue
            if call.name not in copies:
                copies[call.name] = cut_copy(self._layer(call), size, kept)
            args, kwargs = _cut_arguments(call, size, kept)
            if result is not None:
                args = (result, *args[1:])
            result = copies[call.name](*args, **kwargs)
        assert result is not None
        return result.movedim(_axis(calls[0][1], size), -1).flatten(0, -2)

    def note_selection(
        self, select: Select, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Remember that a torch function selected rows, with all channels, of a layer's output."""
        values = args[0] if args else None
        if not isinstance(values, Tensor) or not isinstance(output, Tensor):
            return
        before = self._calls_before(values)[:1]
        if before and output.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
            source = before[0][1]
            in_order = values.is_contiguous() and source.is_contiguous()
            same = source.shape[-1:] == values.shape[-1:]
            if in_order and same and _selects_rows(select, args, kwargs):
                self._remember(SELECTION, (*args,), kwargs, output, select)

    def _layer(self, call: _Call) -> nn.Module:
        return self.model.get_submodule(call.name)

    def _calls_before(self, values: Tensor) -> list[tuple[_Call, Tensor]]:
        """Return the latest calls, the last one first, each with its result."""
        calls: list[tuple[_Call, Tensor]] = []
        while len(calls) < _LONGEST:
            call = self._calls.get(values.untyped_storage().data_ptr())
            if call is None or not call.in_use() or call.layout[2].numel() != values.numel():
                break
            calls.append((call, call.output(values)))
            values = call.args[0]
        return calls

    def _noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
                return
            pointer = output.untyped_storage().data_ptr()
            if args[0].shape == output.shape and args[0].untyped_storage().data_ptr() != pointer:
                self._remember(name, args, kwargs, output)

        return note

    def _remember(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
        select: Select | None = None,
    ) -> None:
        pointer = output.untyped_storage().data_ptr()
        self.forget_unused()  # frees the arguments of calls whose results nothing holds
        self._calls.pop(pointer, None)
        layout = output.dtype, output.storage_offset(), output.shape, output.stride()
        self._calls[pointer] = _Call(name, args, kwargs, layout, use_of(output), select)


def _selects_rows(select: Select, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if a selection keeps all channels, along the last axis, in their order."""
    channels = torch.arange(args[0].shape[-1], device=args[0].device)
    found = select(channels.expand(args[0].shape), *args[1:], **kwargs)
    return found.shape[-1:] == channels.shape and bool((found == channels).all())


def cut_copy(layer: nn.Module, size: int, kept: Tensor) -> nn.Module:
    """Return a copy of a leaf module that takes only the kept ones of its ``size`` channels."""
    plain: Any = plain_class(type(layer))
    duplicate: nn.Module = plain.__new__(plain)  # copy.copy would construct FSDP2's wrapper
    vars(duplicate).update(vars(layer))
    for kind in ("_parameters", "_buffers"):
        tensors = dict(getattr(layer, kind))
        for key, values in tensors.items():
            if values is not None:
                tensors[key] = _select(values, size, kept)
        vars(duplicate)[kind] = tensors
    vars(duplicate).update(_forward_hooks={}, _forward_pre_hooks={})
    vars(duplicate).pop("forward", None)  # accelerate's, which would run the original layer
    for key, value in vars(layer).items():
        if isinstance(value, int) and not isinstance(value, bool) and value == size:
            setattr(duplicate, key, len(kept))
        elif isinstance(value, tuple) and value and value[-1] == size:
            setattr(duplicate, key, type(value)((*value[:-1], len(kept))))
    return duplicate


def _select(values: Tensor, size: int, kept: Tensor) -> Any:
    result = whole(values.detach())
    for dim, length in enumerate(values.shape):
        if length == size:
            result = result.index_select(dim, kept.to(values.device))
    return nn.Parameter(result, False) if isinstance(values, nn.Parameter) else result


def _cut_arguments(call: _Call, size: int, kept: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with only the kept channels of every tensor that has ``size``."""
    axis = _axis(call.args[0], size)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > max(0, axis) and value.shape[axis] == size:
            return value.index_select(axis, kept.to(value.device))
        return value

    return tuple(map(cut, call.args)), {key: cut(value) for key, value in call.kwargs.items()}


def _axis(values: Tensor, size: int) -> int:
    return -1 if values.shape[-1] == size or values.ndim < 3 else 1  # 1: images


def _mixes(layer: nn.Module, call: _Call, output: Tensor, size: int) -> bool:
    """True if a layer's output for some channels depends on the others."""
    kept = torch.arange(max(1, size * 2 // 5))  # not half: both halves may hold the same units
    args, kwargs = _cut_arguments(call, size, kept)
    result = cut_copy(layer, size, kept)(*args, **kwargs)
    expected = output.index_select(_axis(output, size), kept.to(output.device))
    return not torch.allclose(result, expected, rtol=1e-3, atol=1e-5)
