"""The numbers in a forward pass that follow widths, in a model that stands for a narrower one.

A masked original is as wide as before; what it divides by has to be what the pruned model divides
by.  Attributes are read from a build of the pruned config; sizes that are read off tensors as the
model runs, and what softmax makes of units that are not there, are set right while it runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ROUNDING = 1e-6


class Side(NamedTuple):
    """One dimension of a tensor: how long it was, and which of its positions are left."""

    size: int
    left: Tensor

    @property
    def gone(self) -> Tensor:
        """The positions that are not."""
        gone = torch.ones(self.size, dtype=torch.bool)
        gone[self.left] = False
        return gone.nonzero().view(-1)

    @property
    def cut(self) -> bool:
        """Whether any position went."""
        return len(self.left) < self.size


def take_scales(model: nn.Module, fresh: nn.Module) -> None:
    """Numbers that follow widths (attention scales), as the class computes them for the new ones.

    Read from a model freshly built from the pruned config, so that a number that was not refreshed
    in the pruned model shows as a difference.
    """
    built = dict(fresh.named_modules())
    for name, module in model.named_modules():
        other = built.get(name)
        if other is None:
            continue
        _take_numbers(module, other)
        if "config" in vars(module):  # Falcon divides by a width of its config as it runs
            _take_numbers(module.config, other.config)
        for key, buffer in module._buffers.items():
            new = other._buffers.get(key)
            hidden = key in module._non_persistent_buffers_set
            if hidden and buffer is not None and new is not None and buffer.ndim == 0:
                made = new.to(buffer)
                # the same number in another precision does not follow a width
                same = torch.isclose(made, buffer, rtol=_ROUNDING, atol=0.0)
                module._buffers[key] = buffer if same else made


def _take_numbers(one: Any, other: Any) -> None:
    """Set the numbers of one object that are others in another."""
    if not (hasattr(one, "__dict__") and hasattr(other, "__dict__")):
        return  # Idefics has a None there
    for key, value in list(vars(one).items()):
        new = vars(other).get(key)
        if isinstance(value, float) and isinstance(new, float):
            vars(one)[key] = new
        elif type(value) is int and type(new) is int and value != new:
            vars(one)[key] = Width(value, new)


class Width(int):
    """A width that reshapes as it was and scales (``width**-0.5``) as it is after pruning."""

    new: int

    def __new__(cls, value: int, new: int) -> Width:  # noqa: D102
        self = super().__new__(cls, value)
        self.new = new
        return self

    def __pow__(self, exponent: Any, *rest: Any) -> Any:
        return pow(self.new, exponent, *rest)

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        return Width(int(self) * int(other), self.new * getattr(other, "new", other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int) or not other or not getattr(other, "new", other):
            return NotImplemented
        return Width(int(self) // int(other), self.new // getattr(other, "new", other))

    def __float__(self) -> float:  # what math.sqrt asks for
        return float(self.new)

    def __deepcopy__(self, memo: Any) -> Width:
        return self


class SizesRead(TorchFunctionMode):
    """Notes every size that a model reads off a tensor as it runs, in order.

    Attributes:
        sizes: what was read: all sizes of a tensor, or one; of an attention that torch computes in
            one piece, the size of a head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _reads_sizes(func):
            self.sizes.append(result if isinstance(result, tuple) else (result,))
        elif func is F.scaled_dot_product_attention:
            self.sizes.append((result.shape[-1],))
        elif func is F.multi_head_attention_forward:
            self.sizes.append((args[3] // args[4],))
        return result


class AsNarrow(TorchFunctionMode):
    """While a masked model runs, sizes that it reads off tensors scale like those after pruning.

    Both run the same code, so the sizes are read in the same order.  In a softmax over units, those
    that are gone count for nothing.

    Args:
        read: the sizes that the pruned model read.
        sides: dimensions that were cut.
    """

    def __init__(self, read: Sequence[tuple[int, ...]], sides: Iterable[Side]):
        super().__init__()
        self.read = iter(read)
        self.sides = {(side.size, tuple(side.left.tolist())): side for side in sides if side.cut}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and isinstance(args[0], Width):
            return func(args[0].new, *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention:
            (head_dim,) = next(self.read, (0,))
            if kwargs.get("scale") is None and head_dim:
                kwargs["scale"] = head_dim**-0.5
        if func is F.multi_head_attention_forward:
            old = args[3] // args[4]
            (head_dim,) = next(self.read, (old,))
            factor = (old / head_dim) ** 0.5
            args = _with_queries(args, factor)
            if kwargs.get("q_proj_weight") is not None:  # WavLM's stand apart
                kwargs["q_proj_weight"] = kwargs["q_proj_weight"] * factor
        if func in (torch.softmax, Tensor.softmax, F.softmax) and args:
            args = (self._without_gone(args[0]), *args[1:])
        result = func(*args, **kwargs)
        if not _reads_sizes(func):
            return result
        old = result if isinstance(result, tuple) else (result,)
        new = next(self.read, old)
        if len(new) != len(old) or new == old:
            return result
        pairs = zip(old, new, strict=True)
        widths = _Sizes(o if o == n else Width(o, n) for o, n in pairs)
        return widths if isinstance(result, tuple) else widths[0]

    def _without_gone(self, x: Tensor) -> Tensor:
        for side in self.sides.values():
            if x.ndim > 1 and x.shape[-1] == side.size:
                empty = (x == 0).flatten(0, -2).all(0)
                if bool(empty[side.gone].all()) and not bool(empty[side.left].any()):
                    return x.index_fill(-1, side.gone, -math.inf)
        return x


def _with_queries(args: Sequence[Any], factor: float) -> Sequence[Any]:
    """Arguments of ``F.multi_head_attention_forward`` with its queries scaled."""
    width = args[3]
    scaled = list(args)
    for place in (5, 6):  # weight and bias of queries, keys and values
        if scaled[place] is not None:
            scaled[place] = torch.cat([scaled[place][:width] * factor, scaled[place][width:]])
    return scaled


def _reads_sizes(func: Any) -> bool:
    return func is Tensor.size or func == _SHAPE


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Functions that a model's file compiles with ``torch.jit.script`` run as they are written.

    What is compiled reads sizes past the modes above (Transformers 4: DeBERTa's
    ``scaled_size_sqrt``).
    """
    with ExitStack() as stack:
        for name in {type(module).__module__ for module in model.modules()}:
            place = sys.modules[name]
            for key, value in list(vars(place).items()):
                plain = getattr(value, "_torchdynamo_inline", None)
                if isinstance(value, torch.jit.ScriptFunction) and plain is not None:
                    stack.enter_context(patch.object(place, key, plain))
        yield


class _Sizes(tuple[int, ...]):
    """Sizes of a tensor, some of them a ``Width``."""

    def numel(self) -> int:
        """How many elements."""
        return math.prod(map(int, self))
