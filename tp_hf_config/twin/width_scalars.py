"""Give a masked original the numbers, such as scales, that the pruned model has for its widths.

A masked original is as wide as before pruning, but has to divide by what the pruned model divides
by. Attributes are read from a reference build of the pruned config. Sizes that the pass reads off
tensors, and the share that softmax gives to removed units, are corrected during the pass.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..model.surroundings import replaced

_ROUNDING = 1e-6  # largest relative difference that rounding to another precision makes


class CutDim(NamedTuple):
    size: int  # before pruning
    kept: Tensor  # positions in rising order, shape (kept,)

    @property
    def removed(self) -> Tensor:
        is_removed = torch.ones(self.size, dtype=torch.bool)
        is_removed[self.kept] = False
        return is_removed.nonzero().view(-1)

    @property
    def cut(self) -> bool:
        return len(self.kept) < self.size


def take_scales(model: nn.Module, reference_build: nn.Module) -> None:
    """Set the numbers that depend on widths (attention scales) to those of a reference build."""
    # not the pruned model's: a number that pruning did not update has to show as a difference
    counterparts = dict(reference_build.named_modules())
    for name, module in model.named_modules():
        counterpart = counterparts.get(name)
        if counterpart is None:
            continue
        _take_numbers(module, counterpart)
        if "config" in vars(module):  # Falcon divides by a width of its config in the pass
            _take_numbers(module.config, counterpart.config)
        for key, buffer in module._buffers.items():
            new = counterpart._buffers.get(key)
            unsaved = key in module._non_persistent_buffers_set
            if unsaved and buffer is not None and new is not None and buffer.ndim == 0:
                number = new.to(buffer)
                # equal up to the precision: it does not depend on a width
                same = torch.isclose(number, buffer, rtol=_ROUNDING, atol=0.0)
                module._buffers[key] = buffer if same else number


def _take_numbers(target: Any, source: Any) -> None:
    """Set the numbers of ``target`` to those of ``source``; whole ones as ``DualWidth``."""
    if not (hasattr(target, "__dict__") and hasattr(source, "__dict__")):
        return  # Idefics has a None for a module's config
    for key, value in list(vars(target).items()):
        new = vars(source).get(key)
        if isinstance(value, float) and isinstance(new, float):
            vars(target)[key] = new
        elif type(value) is int and type(new) is int and value != new:
            vars(target)[key] = DualWidth(value, new)


class DualWidth(int):
    """A width that reshapes with its old value and scales (``width**-0.5``) with its new one."""

    new: int  # after pruning; the integer itself is the width before

    def __new__(cls, value: int, new: int) -> DualWidth:
        self = super().__new__(cls, value)
        self.new = new
        return self

    def __pow__(self, exponent: Any, *rest: Any) -> Any:
        return pow(self.new, exponent, *rest)

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        return DualWidth(int(self) * int(other), self.new * getattr(other, "new", other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int) or not other or not getattr(other, "new", other):
            return NotImplemented
        return DualWidth(int(self) // int(other), self.new // getattr(other, "new", other))

    def __float__(self) -> float:  # math.sqrt calls this
        return float(self.new)

    def __deepcopy__(self, memo: Any) -> DualWidth:
        return self


class SizesRead(TorchFunctionMode):
    """Records every size that a model reads off a tensor while it runs, in order."""

    def __init__(self) -> None:
        super().__init__()
        # for each read, all sizes of a tensor or one of them; for fused attention, the head dim
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
    """Gives a masked model sizes that scale like those that the pruned model reads."""

    def __init__(self, pruned_sizes: Sequence[tuple[int, ...]], dims: Iterable[CutDim]):
        super().__init__()
        self.pruned_sizes = iter(pruned_sizes)  # both run the same code, so in the same order
        self.cut_dims = {(dim.size, tuple(dim.kept.tolist())): dim for dim in dims if dim.cut}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and isinstance(args[0], DualWidth):
            return func(args[0].new, *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention:
            (head_dim,) = next(self.pruned_sizes, (0,))
            if kwargs.get("scale") is None and head_dim:
                kwargs["scale"] = head_dim**-0.5
        if func is F.multi_head_attention_forward:
            old = args[3] // args[4]
            (head_dim,) = next(self.pruned_sizes, (old,))
            factor = (old / head_dim) ** 0.5
            args = _with_scaled_queries(args, factor)
            if kwargs.get("q_proj_weight") is not None:  # WavLM's are separate
                kwargs["q_proj_weight"] = kwargs["q_proj_weight"] * factor
        if func in (torch.softmax, Tensor.softmax, F.softmax) and args:
            args = (self._without_removed(args[0]), *args[1:])
        result = func(*args, **kwargs)
        if not _reads_sizes(func):
            return result
        old = result if isinstance(result, tuple) else (result,)
        new = next(self.pruned_sizes, old)
        if len(new) != len(old) or new == old:
            return result
        pairs = zip(old, new, strict=True)
        widths = _Sizes(o if o == n else DualWidth(o, n) for o, n in pairs)
        return widths if isinstance(result, tuple) else widths[0]

    def _without_removed(self, x: Tensor) -> Tensor:
        """Return softmax scores with removed units at minus infinity."""
        for dim in self.cut_dims.values():
            if x.ndim > 1 and x.shape[-1] == dim.size:
                # the last axis is of units if exactly the removed ones are zero everywhere
                empty = (x == 0).flatten(0, -2).all(0)
                if bool(empty[dim.removed].all()) and not bool(empty[dim.kept].any()):
                    return x.index_fill(-1, dim.removed, -math.inf)
        return x


def _with_scaled_queries(args: Sequence[Any], factor: float) -> Sequence[Any]:
    width = args[3]
    scaled = list(args)
    for place in (5, 6):  # weight and bias of queries, keys and values
        if scaled[place] is not None:
            scaled[place] = torch.cat([scaled[place][:width] * factor, scaled[place][width:]])
    return scaled


def _reads_sizes(func: Any) -> bool:
    return func is Tensor.size or func == _SHAPE


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]  # what ``tensor.shape`` calls


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run functions that a model's file compiles with ``torch.jit.script`` as plain Python."""
    # the modes above do not see sizes that these read (Transformers 4: DeBERTa's scaled_size_sqrt)
    with ExitStack() as stack:
        for name in {type(module).__module__ for module in model.modules()}:
            source = sys.modules[name]
            for key, value in list(vars(source).items()):
                plain = getattr(value, "_torchdynamo_inline", None)
                if isinstance(value, torch.jit.ScriptFunction) and plain is not None:
                    stack.enter_context(replaced(source, key, plain))
        yield


class _Sizes(tuple[int, ...]):
    def numel(self) -> int:
        return math.prod(map(int, self))
