"""Numbers that are a width for shapes, and a smaller width where a class computes with them.

A masked model is as wide as before, but has to scale (``size ** -0.5``) as the pruned one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


class Narrowed(int):
    """The old number to torch and to other whole numbers, the new one to fractions and powers."""

    new: int

    def __new__(cls, old: int, new: int) -> Narrowed:
        """Both numbers."""
        self = super().__new__(cls, old)
        self.new = new
        return self

    def __float__(self) -> float:
        return float(self.new)

    def __pow__(self, power: Any, *rest: Any) -> Any:
        return self.new**power

    def __truediv__(self, other: Any) -> Any:
        return self.new / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.new

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, int):
            return Narrowed(int(self) * int(other), self.new * getattr(other, "new", other))
        return NotImplemented if isinstance(other, Tensor) else self.new * other

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        new = getattr(other, "new", other)
        if isinstance(other, int) and other and new:
            return Narrowed(int(self) // int(other), self.new // new)
        return NotImplemented

    def __deepcopy__(self, memo: Any) -> Narrowed:
        return self


class Sizes(TorchFunctionMode):
    """Last sizes that a masked model reads off its tensors, without the channels that went.

    Those are zero: as many in every row, which no chance makes. Where an activation may have made
    others zero as well, ``numbers`` says what sizes became of which.
    """

    def __init__(self, numbers: set[tuple[int, int]]):
        super().__init__()
        self.numbers = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and isinstance(args[0], Narrowed):
            return func(args[0].new, *args[1:], **kwargs)
        if func is F.multi_head_attention_forward:
            return _scaled_as_narrow(args, kwargs)
        result = func(*args, **kwargs)
        if func is Tensor.size and not isinstance(result, tuple):
            return self._last(args[0], result) if _names_last(args, kwargs) else result
        if func is Tensor.size or func == _SHAPE:
            return (*result[:-1], self._last(args[0], result[-1])) if len(result) > 1 else result
        return result

    def _last(self, x: Tensor, size: int) -> int:
        with torch._C.DisableTorchFunction():
            if x.ndim < 2 or not x.is_floating_point() or not x.numel():
                return size
            gone = _always_zero(x, least=bool(self.numbers))
        if self.numbers:
            gone = max((o - n for o, n in self.numbers if o == size and o - n <= gone), default=0)
        return Narrowed(size, size - gone) if 0 < gone < size else size


def _scaled_as_narrow(args: Any, kwargs: Any) -> Any:
    """Attention of which nothing inside is seen, its queries scaled by the new head dim."""
    width, heads = args[3], args[4]
    new = getattr(width, "new", width) / getattr(heads, "new", heads)
    args, kwargs, factor = list(args), dict(kwargs), (int(width) / int(heads) / new) ** 0.5
    if kwargs.get("use_separate_proj_weight"):
        kwargs["q_proj_weight"] = kwargs["q_proj_weight"] * factor
    for place in (5, 6):  # weights and biases of queries, keys and values, one below the other
        if args[place] is not None and args[place].numel():
            args[place] = torch.cat([args[place][:width] * factor, args[place][width:]])
    return F.multi_head_attention_forward(*args, **kwargs)


def _names_last(args: Any, kwargs: Any) -> bool:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    with torch._C.DisableTorchFunction():
        return dim in (-1, args[0].ndim - 1)


def _always_zero(x: Tensor, least: bool) -> int:
    """How many channels are zero whatever the rest is; 0: not as many of every head.

    A channel that an activation made zero is so here and there; of each head others may have gone.
    """
    zero, gone = x == 0, 0
    for dim in range(x.ndim - 1):
        others = [other for other in range(x.ndim - 1) if other != dim]
        always = zero.movedim(dim, 0).flatten(1, -2).all(1) if others else zero
        counts = always.sum(-1)
        if least or int(counts.min()) == int(counts.max()):
            gone = max(gone, int(counts.min()))
    return gone


def take_sizes(model: nn.Module, fresh: nn.Module) -> Iterator[tuple[int, int]]:
    """Put the whole numbers of every module, and of its config, that are others in the new class.

    Yields:
        The old number and the new one.
    """
    built = dict(fresh.named_modules())
    for name, module in model.named_modules():
        other = built.get(name)
        if other is None:
            continue
        yield from _take(module, other)
        if hasattr(vars(module).get("config"), "to_dict"):
            yield from _take(module.config, other.config)


def _take(one: Any, other: Any) -> Iterator[tuple[int, int]]:
    for key, old in list(vars(one).items()):
        new = vars(other).get(key)
        if type(old) is int and type(new) is int and old != new:
            vars(one)[key] = Narrowed(old, new)
            yield old, new


@contextmanager
def as_narrow(model: nn.Module, fresh: nn.Module, by_number: bool = False) -> Iterator[None]:
    """While it runs, the model computes with the new widths."""
    numbers = set(take_sizes(model, fresh))
    with Sizes(numbers if by_number else set()):
        yield


@contextmanager
def nothing(model: nn.Module, fresh: nn.Module) -> Iterator[None]:
    """It computes with the attributes that it has."""
    yield
